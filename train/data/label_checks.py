"""Clean labels as users write them, and warn of labels that are not names."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from scmmgpt.commands.writing import text_of
from scmmgpt.train.data.ontology import is_missing


SHOWN = 5  # most labels that a warning lists


def clean_label(value: Any) -> str:
    """Return a label as text: single spaces between words, none around; whole numbers without decimals.

    >>> clean_label(" B  cell "), clean_label(2.0)
    ('B cell', '2')
    """
    return " ".join(text_of(value).split())


def check_labels(labels: Iterable[Any], where: str) -> list[str]:
    """Warn, one sentence each, of a single label for all cells, of missing labels, and of [`label_warnings`].

    `where` names the column in the messages. A column without any label is refused.
    """
    values = [None if is_missing(label) else clean_label(label) for label in labels]
    counts = count_labels(values)
    if not counts:
        raise ValueError(f"None of the {len(values)} cells has a label in {where}. Name another column of `obs`.")
    warnings = []
    if len(counts) == 1:
        warnings.append(f"{where} has one label for all cells ({next(iter(counts))!r}): there is nothing to learn.")
    if counts.total() < len(values):
        warnings.append(f"{len(values) - counts.total()} of {len(values)} cells have no label in {where}.")
    return warnings + label_warnings(counts, where)


def label_warnings(counts: Mapping[str, int], where: str) -> list[str]:
    """Warn, one sentence each, of codes, of labels that differ in spelling alone, and of many labels with one cell.

    `counts` are the numbers of cells by label; `where` names the column in the messages.
    """
    warnings = []
    codes = [label for label in counts if is_code(label)]
    if codes and 2 * len(codes) > len(counts):
        warnings.append(
            f"{where} has codes, not names ({listed(sorted(codes))}), and a code says nothing about a cell. Name the "
            "column with the names, or replace each code by its name in obs."
        )
    spellings: dict[str, list[str]] = defaultdict(list)
    for label in counts:
        spellings[spelling_key(label)].append(label)
    same = [
        " and ".join(f"{label!r} ({counts[label]})" for label in alike) for alike in spellings.values() if alike[1:]
    ]
    if same:
        more = f"; and {len(same) - SHOWN} more" if len(same) > SHOWN else ""
        warnings.append(
            f"{where} has labels that differ in spelling alone and stay separate: {'; '.join(same[:SHOWN])}{more}. If "
            "they mean the same, rename them in obs."
        )
    single = [label for label, n in counts.items() if n == 1]
    if len(counts) > 2 and 2 * len(single) > len(counts):
        warnings.append(
            f"{len(single)} of {len(counts)} labels of {where} have a single cell ({listed(single)}). If these are "
            "names of cells, name another column."
        )
    return warnings


def is_code(label: str) -> bool:
    """Whether a label is a number, or a number after a word such as "cluster" or "leiden"."""
    return (
        re.fullmatch(r"(cluster|leiden|louvain|seurat|clust|c|k)?[\s_.-]*\d+([.,]\d+)?", label.strip(), re.I)
        is not None
    )


def spelling_key(label: str) -> str:
    """Key that is equal for labels that differ only in case, or in spaces, hyphens and underscores between words.

    Signs of markers stay: CD4+ and CD4- differ.
    """
    return re.sub(r"(?<=\w)[\s_]+(?=\w)|(?<=[^\W\d_])-(?=[^\W\d_])", " ", label.casefold())


def listed(labels: Iterable[str]) -> str:
    """List the first `SHOWN` labels in quotes, then "..." if there are more."""
    labels = list(labels)
    return ", ".join(map(repr, labels[:SHOWN])) + (", ..." if len(labels) > SHOWN else "")


def count_labels(values: Iterable[Any]) -> Counter[str]:
    """Count the cells of each label, without `None`."""
    return Counter(value for value in values if value is not None)
