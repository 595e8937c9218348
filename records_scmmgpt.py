"""Access to an AnnData: columns of `obs` that a verb reads; columns, tables, settings and reports that a verb adds.

This file travels with the weights, so it imports neither AnnData nor pandas.
"""

import difflib
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np


logger = logging.getLogger(__name__)
MISSING = "(missing)"  # stands for a missing label or cluster
NAMED = 3  # most names that a warning lists
MOST_CLUSTERS = 20  # a column with more values, most of them in one cell only, is no clustering
NEAR_ENDS, MOST_NEAR = 4, 10_000  # letters that similar names share at one end; most names that are compared


def need_columns(obs: Any, *names: str) -> None:
    """Check that `obs`, or another table, has some columns.

    Raises:
        ValueError: If a column is missing. The message names the missing columns, all columns, and a similar name.
    """
    missing = [name for name in names if name not in obs]
    if not missing:
        return
    columns = [str(name) for name in obs.columns]
    given = [name for name in columns if not name.startswith("scmmgpt_") or missing[0].startswith("scmmgpt")]
    near = difflib.get_close_matches(missing[0], given, n=1)
    available = f"it has {columns}" if columns else "it has no columns"
    which = f"column {missing[0]!r}" if len(missing) == 1 else f"columns {missing}"
    raise ValueError(f"obs has no {which}; {available}." + (f" Do you mean {near[0]!r}?" if near else ""))


def words_of(obs: Any, key: str) -> np.ndarray:
    """A column of `obs` as str `(n_obs,)`; no value, or a blank, is `MISSING`, and 3.0 among whole numbers is "3"."""
    need_columns(obs, key)
    values, absent = obs[key], np.asarray(obs[key].isna())
    present = np.asarray(values[~absent])
    if present.dtype.kind == "f" and (np.isfinite(present) & (present == np.floor(present))).all():
        present = present.astype(np.int64)  # integers with missing values are stored as floats
    words = np.full(len(values), MISSING, dtype=object)
    words[~absent] = present.astype(str)
    words[np.char.strip(words.astype(str)) == ""] = MISSING  # how tables of text write a missing value
    return words.astype(str)


def clusters_of(obs: Any, key: str) -> np.ndarray:
    """The clusters in a column of `obs`, from [`words_of`].

    Raises:
        ValueError: If no cell has a cluster, or if most values occur in one cell only, as measurements and names do.
    """
    clusters = words_of(obs, key)
    if len(clusters) and (clusters == MISSING).all():
        raise ValueError(
            f"obs[{key!r}] has no value for any of the {len(clusters)} cells; name a column with clusters."
        )
    names, sizes = np.unique(clusters[clusters != MISSING], return_counts=True)
    if len(names) > MOST_CLUSTERS and (sizes == 1).sum() > len(clusters) / 2:
        raise ValueError(
            f"obs[{key!r}] has {len(names):,} values in {len(clusters):,} cells, most of them in one cell (such as "
            f"{str(names[0])!r}): these are no clusters. Name a column with clusters, such as 'leiden'."
        )
    return clusters


def rows_named(names: Iterable[Any], wanted: Sequence[str]) -> np.ndarray:
    """Rows of the cells with the `wanted` names, int64, ascending and unique.

    Args:
        names: Names of all cells.
        wanted: Names to look for.

    Raises:
        ValueError: If `wanted` is empty, or if no cell or several cells have a wanted name.
    """
    rows: dict[str, list[int]] = {str(name): [] for name in wanted}
    if not rows:
        raise ValueError("like is empty; name one cell or more, as in obs_names.")
    for row, name in enumerate(names):
        if str(name) in rows:
            rows[str(name)].append(row)
    if missing := [name for name, rows_of in rows.items() if not rows_of]:
        near = names_near(missing[0], names)
        meant = f" Do you mean {' or '.join(map(repr, near))}?" if near else ""
        others = f" (nor {len(missing) - 1} others of the {len(rows)})" if len(missing) > 1 else ""
        raise ValueError(f"No cell is called {missing[0]!r}{others}.{meant or ' The names are those of obs_names.'}")
    if repeated := [name for name, rows_of in rows.items() if len(rows_of) > 1]:
        raise ValueError(
            f"{len(rows[repeated[0]])} cells are called {repeated[0]!r}: make names unique with "
            "`adata.obs_names_make_unique()`."
        )
    return np.unique(np.array([row for rows_of in rows.values() for row in rows_of], dtype=np.int64))


def names_near(name: str, names: Iterable[Any]) -> list[str]:
    """Up to three similar names with the same first or last letters, the most similar first.

    >>> names_near("aaacct", ["AAACCT-1", "GGGTTT-1", "AAAGGT-1"])
    ['AAACCT-1']
    """
    word = name.casefold()
    ends = word[:NEAR_ENDS], word[-NEAR_ENDS:]
    similar = (
        str(other)
        for other in names
        if str(other).casefold().startswith(ends[0]) or str(other).casefold().endswith(ends[1])
    )
    spelt = {other.casefold(): other for other in islice(similar, MOST_NEAR)}
    return [spelt[near] for near in difflib.get_close_matches(word, spelt, n=3, cutoff=0.7)]


def some_of(names: Sequence[str], most: int = NAMED) -> str:
    """The first names of many, and how many others there are.

    >>> some_of(["'a'", "'b'"]), some_of(["'a'", "'b'", "'c'", "'d'"], 2)
    ("'a', 'b'", "'a', 'b' and 2 more")
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


def in_few_lines(messages: Iterable[str]) -> list[str]:
    """Messages that differ by one quoted name alone as one message, with the first names; no message twice.

    >>> in_few_lines(["obsm['a'] is left out.", "No counts.", "obsm['b'] is left out.", "No counts."])
    ["obsm['a', 'b'] is left out.", 'No counts.']
    """
    groups: list[tuple[list[str], list[str], int | None]] = []  # parts of a message, names, the part that differs
    for parts in (re.split("('[^']*')", message) for message in dict.fromkeys(messages)):
        for i, (like, names, place) in enumerate(groups):
            differs = [k for k in range(len(parts)) if parts[k] != like[k]] if len(parts) == len(like) else []
            if len(differs) == 1 and differs[0] % 2 and place in (None, differs[0]):
                groups[i] = like, [*names, parts[differs[0]]], differs[0]
                break
        else:
            groups.append((parts, [], None))
    return [
        "".join(parts if k is None else [*parts[:k], some_of([parts[k], *names]), *parts[k + 1 :]])
        for parts, names, k in groups
    ]


def add_column(adata: Any, name: str, values: np.ndarray) -> None:
    """Add a column to `obs`; strings become categories, which scanpy can plot."""
    adata.obs[name] = values
    if values.dtype.kind in "UO":
        adata.obs[name] = adata.obs[name].astype("category")


def table_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Rows -> columns of types that `.h5ad` files can store."""
    rows = list(rows)
    table = {name: np.asarray([row[name] for row in rows]) for name in (rows[0] if rows else ())}
    return {name: values.astype(object) if values.dtype.kind == "U" else values for name, values in table.items()}


def storable(value: Any) -> Any:
    """A part of a report in types that `.h5ad` files can store."""
    if isinstance(value, Mapping):
        return {str(k).replace("/", "_"): storable(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return np.array(value, dtype=object if any(isinstance(v, str) for v in value) else None)
    return value


def finish_report(report: dict[str, Any]) -> None:
    """Add the warnings about the converted cells to the report, and log them.

    Raises:
        ValueError: If no cell expresses a gene of the vocabulary.
    """
    cells, messages = report["cells"], []
    converted = cells.get("converted", 0)
    if cells.get("without_genes"):
        if cells["without_genes"] == converted:
            raise ValueError(
                f"None of the {converted} cells expresses a gene of the vocabulary: every value of the matched genes "
                "is zero. Pass another `layer=`."
            )
        messages.append(
            f"{cells['without_genes']} of {converted} cells express no gene of the vocabulary and stay as empty cells."
        )
    if cells.get("counts_not_recovered"):
        messages.append(
            f"In {cells['counts_not_recovered']} of {converted} cells the values are not multiples of one unit: these "
            "cells keep the normalised values."
        )
    for message in messages:
        logger.warning(message)
    report["warnings"] += messages


def record(adata: Any, key: str, report: dict[str, Any] | None, **done: Any) -> Any:
    """Add the settings of a verb, and the report of the input, to `uns`; entries of other verbs stay."""
    added = [(key, done)] if report is None else [("scmmgpt", {"input": storable(report)}), (key, done)]
    for name, entries in added:
        before = adata.uns.get(name, {})
        if not isinstance(before, Mapping):
            logger.warning(f"uns[{name!r}] was {str(before)[:60]!r}; the results replace this value.")
            before = {}
        adata.uns[name] = {**before, **entries}
    return adata


def recorded(adata: Any, key: str, verb: str) -> Mapping[str, Any]:
    """The entry of a verb in `uns[key]`, from [`record`]; empty if `uns[key]` holds no such entry."""
    entry: Any = adata.uns
    for name in (key, verb):
        entry = entry.get(name) if isinstance(entry, Mapping) else None
    return entry if isinstance(entry, Mapping) else {}
