"""What the page reads and says in words: the fields, the labels in them, and messages of the library."""

import logging
import re
import threading
from collections.abc import Mapping
from typing import Any

from scmmgpt.commands.errors import DEBUG, as_options
from scmmgpt.labels_scmmgpt import trained_labels_of


SPLIT_PERCENT = re.compile(r"(?<=\d) (?=%)")  # "10 %", which a line may break
FIELDS = {"labels": "Cell types", "tissue": "Tissue", "min_score": "Minimum score"}  # of the page, by argument


class Warnings(logging.Handler):
    """Collects the warnings of the thread that made it, to show them in the browser of that user."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.thread = threading.get_ident()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the message of a record."""
        if record.thread == self.thread:
            self.messages.append(record.getMessage())

    def __enter__(self) -> "Warnings":
        logging.getLogger("scmmgpt").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("scmmgpt").removeHandler(self)


def unbroken(text: str) -> str:
    r"""A text in which no line ends between a number and its percent sign.

    >>> unbroken("11 % of 20 cells")
    '11\xa0% of 20 cells'
    """
    return SPLIT_PERCENT.sub("\N{NO-BREAK SPACE}", text)


def on_page(text: str) -> str:
    """A message of the library in the words of the page, which has fields for a few arguments and none for the others.

    >>> on_page("If the cells are of one, name it by `tissue=`: blood.")
    'If the cells are of one, name it by "Tissue": blood.'
    """

    def field_of(found: re.Match) -> str:
        return f'"{FIELDS[found[1]]}"' + (f" {found[2]}" if found[2] else "")

    text = text.replace(DEBUG, "").replace("look at uns['scmmgpt']['input']: ", "")
    said = re.sub(rf"`({'|'.join(FIELDS)})=([^`]*)`", field_of, text)
    as_command = as_options(said)
    if as_command != said:
        as_command += " Options that begin with -- are those of the command `scmmgpt annotate`; the page has none."
    if "`adata" in said:
        as_command += " Here `adata` is the file in Python: change it there, write it, and open it again."
    if "folder" in text:
        as_command += " The page opens files alone; the command `scmmgpt annotate` opens folders, too."
    return as_command


def named_labels(text: str, stored: Mapping[str, Any]) -> list[str]:
    """The labels of a field, one a line; commas set labels apart where the checkpoint knows each of them.

    A name of the Cell Ontology may have a comma.

    >>> named_labels("B cell, T cells", {"labels": {"B cell": "", "T cell": ""}})
    ['B cell', 'T cells']
    >>> named_labels("CD4-positive, alpha-beta T cell", {"labels": {"T cell": ""}})
    ['CD4-positive, alpha-beta T cell']
    """
    trained, terms = list(stored.get("labels", {})), stored.get("terms") or []
    found: list[str] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        parts = [part.strip() for part in re.split("[,;]", line) if part.strip()]
        found += parts if all(trained_labels_of(part, None, trained, terms) for part in parts) else [line]
    return found
