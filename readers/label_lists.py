"""Lists of labels in user files: JSON, tables (CSV, TSV) and text files."""

import csv
import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from scmmgpt.commands.files import exists, read_json


SUFFIXES = (".json", ".csv", ".tsv", ".txt")
SPREADSHEETS = (".xlsx", ".xls", ".ods", ".numbers")
OTHERS = (".yaml", ".yml", ".xml", ".html", ".toml")  # text files that are not lists
BYTE_ORDER_MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


class LabelList(NamedTuple):
    """Labels in the order of the file."""

    labels: list[str]
    texts: dict[str, str]  # label -> description, for labels with one
    cl_ids: dict[str, str]  # label -> id of the Cell Ontology, for labels with one


def read_words(words: list[str]) -> LabelList:
    """Read labels of a command line: the path of one file, or the labels.

    Raises:
        ValueError: If there are files beside labels, a label is empty, or one word seems to list several labels.
    """
    paths = [word for word in words if exists(Path(word)) and Path(word).is_file()]
    named = [word for word in words if Path(word).suffix.lower() in (*SUFFIXES, *SPREADSHEETS, *OTHERS)]
    if len(words) == 1 and (paths or named):
        return read_label_list(words[0])
    if paths or named:
        raise ValueError(f"{(paths or named)[0]!r} among the labels is a file. Give either one file or only labels.")
    if any(not word.strip() for word in words):
        raise ValueError(f"A label is empty: {words}. Leave it out.")
    if len(words) == 1 and re.search(r"\S[,;]\S", words[0]):  # names of the Cell Ontology have a space after a comma
        apart = " ".join(f'"{word.strip()}"' for word in re.split("[,;]", words[0]))
        raise ValueError(f"{words[0]!r} is one label. Quote each label separately: {apart}.")
    return LabelList(list(dict.fromkeys(" ".join(word.split()) for word in words)), {}, {})


def read_label_list(path: str | Path) -> LabelList:
    """Read a file of labels.

    The file has one of three forms: one label per line; a table with the column `label` and, if wanted, `text` and
    `cl_id`; or JSON with a list of labels or an object label -> text. Lines that start with `#` are comments.
    Separators may be commas, semicolons or tabs. Encodings may be UTF-8, UTF-16 or Windows-1252, as from Excel.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file has another form, an entry has no label, or two entries describe a label differently.
    """
    path = Path(path)
    if path.suffix.lower() in SPREADSHEETS and path.is_file():
        raise ValueError(f"{path} is a spreadsheet. Save it as CSV with a column 'label', and pass the CSV file.")
    if path.suffix.lower() in OTHERS and path.is_file():
        raise ValueError(
            f"{path} is not a list of labels. Pass a .txt with one label per line, or a CSV with 'label'."
        )
    if path.suffix.lower() == ".json":
        return _from_json(path)
    lines = ["" if line.lstrip().startswith("#") else line for line in read_text(path).splitlines()]
    header = next((line for line in lines if line.strip()), "")
    separator = max(("\t", ";", ","), key=header.count)
    columns = [name.strip().lower() for name in next(csv.reader([header], delimiter=separator), [])]
    if "label" in columns:
        rows = csv.reader(lines[lines.index(header) :], delimiter=separator)
        return _from_rows(path, columns, rows)
    if path.suffix.lower() != ".txt" and separator in header:
        raise ValueError(f"{path} has no column 'label'; it has {columns}.")
    return _labels(path, ((number, line, "", "") for number, line in enumerate(lines, 1) if line.strip()))


def read_text(path: str | Path) -> str:
    """Read a text file in UTF-8, UTF-16 with a byte-order mark, or Windows-1252.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If `path` is a folder or a binary file.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder. Pass a text file.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {str(path)!r}.")
    content = path.read_bytes()
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError:
        text = content.decode("cp1252", errors="replace")
    if "\0" in text:
        raise ValueError(f"{path} is not a text file. Pass a text file.")
    return text


def _from_json(path: Path) -> LabelList:
    content = read_json(path)
    if isinstance(content, list):
        content = dict.fromkeys(map(_word, content), "")
    if not isinstance(content, dict) or not all(isinstance(text, str) for text in content.values()):
        raise ValueError(f"{path} holds {json.dumps(content)[:60]}. Write {{label: text}} or a list of labels.")
    return _labels(path, ((number, label, text, "") for number, (label, text) in enumerate(content.items(), 1)))


def _word(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"The list of labels has {json.dumps(value)[:60]}. Write each label as a string.")
    return value


def _from_rows(path: Path, columns: list[str], rows: Iterable[list[str]]) -> LabelList:
    def entries() -> Iterable[tuple[int, str, str, str]]:
        for number, row in enumerate(rows, 1):
            if number > 1 and any(value.strip() for value in row):
                if any(value.strip() for value in row[len(columns) :]):
                    raise ValueError(
                        f"Entry {number} of {path} has {len(row)} fields for {len(columns)} columns {columns}. Quote "
                        "texts that contain the separator."
                    )
                named = dict(itertools.zip_longest(columns, row[: len(columns)], fillvalue=""))
                yield number, named["label"], named.get("text", ""), named.get("cl_id", "")

    return _labels(path, entries())


def _labels(path: Path, entries: Iterable[tuple[int, str, str, str]]) -> LabelList:
    """Collect entries `(number, label, text, cl_id)`; runs of white space become one space."""
    collected = LabelList([], {}, {})
    for number, *words in entries:
        label, text, cl_id = (" ".join(word.split()) for word in words)
        if not label:
            raise ValueError(f"Entry {number} of {path} has no label ({text!r}). Write one, or remove the entry.")
        if label in collected.labels:
            if text and collected.texts.get(label, text) != text:
                raise ValueError(f"{path} describes {label!r} twice, with different texts. Keep one description.")
        else:
            collected.labels.append(label)
        collected.texts.update({label: text} if text else {})
        collected.cl_ids.update({label: cl_id} if cl_id else {})
    if not collected.labels:
        raise ValueError(f"{path} has no labels. Write one label per line.")
    return collected
