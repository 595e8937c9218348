"""Words of the page: its fields, the labels typed into a field, and messages of the library in terms of the page."""

import html
import logging
import re
import threading
from collections.abc import Mapping
from typing import Any

from scmmgpt.commands.errors import DEBUG, as_options
from scmmgpt.labels_scmmgpt import trained_labels_of


SPLIT_PERCENT = re.compile(r"(?<=\d) (?=%)")  # "10 %", which a line may break
FIELDS = {"labels": "Cell types", "tissue": "Tissue", "min_score": "Minimum score"}  # argument -> field of the page


class Warnings(logging.Handler):
    """Collect the warnings of the thread that creates this handler, to show them in the browser of the same user."""

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
    r"""Join each number with its percent sign by a no-break space.

    >>> unbroken("11 % of 20 cells")
    '11\xa0% of 20 cells'
    """
    return SPLIT_PERCENT.sub("\N{NO-BREAK SPACE}", text)


def as_text(text: str) -> str:
    """Let Markdown and messages of gradio, which show HTML, show a text as it is: a file may hold any words.

    >>> as_text("a<b & c")
    'a&lt;b &amp; c'
    """
    return html.escape(text, quote=False)


def on_page(text: str) -> str:
    """Replace the arguments in a message of the library by the fields of the page, or by options of the command.

    >>> on_page("If the cells are of one, name it by `tissue=`: blood.")
    'If the cells are of one, name it by "Tissue": blood.'
    """

    def field_of(found: re.Match) -> str:
        return f'"{FIELDS[found[1]]}"' + (f" {found[2]}" if found[2] else "")

    text = text.replace(DEBUG, "").replace("look at uns['scmmgpt']['input']: ", "")
    fields = re.sub(rf"`({'|'.join(FIELDS)})=([^`]*)`", field_of, text)
    as_command = as_options(fields)
    if as_command != fields:
        as_command += " Options that begin with -- are those of the command `scmmgpt annotate`; the page has none."
    if "`adata" in fields:
        as_command += " Here `adata` is the file in Python: change it there, write it, and open it again."
    if "folder" in text:
        as_command += " The page opens files alone; the command `scmmgpt annotate` opens folders, too."
    return as_command


def named_labels(text: str, stored: Mapping[str, Any]) -> list[str]:
    """The labels in a field, one per line. Commas separate labels if the checkpoint knows each part.

    A name of the Cell Ontology may contain a comma.

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
