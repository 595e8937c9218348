"""Make an AnnData writable before a model runs: find and change the parts that `.h5ad` cannot store.

Annotations of other tools, tables and Python sessions can have types that `.h5ad` does not support: columns that mix
numbers and text, nullable strings, intervals, dates, reserved names. Writing would then fail after all cells are
computed. `make_writable` first writes each part (of a matrix, one row) to memory, and changes the parts that fail.
"""

import datetime
import logging
import numbers
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd

from scmmgpt.records_scmmgpt import in_few_lines
from scmmgpt.rows_scmmgpt import layers_of


logger = logging.getLogger(__name__)

RESERVED = "_index"  # anndata stores the index under this name
OVERHEAD = 2**17  # bytes of the structure of a file
SHOWN = 5  # most names that a warning lists


def make_writable(adata: anndata.AnnData) -> list[str]:
    """Change the parts of an AnnData that `.h5ad` cannot store, in place; return and log one sentence per change.

    Matrices keep their values. Columns that fail become text, with missing values kept. Other parts that fail are
    removed.
    """
    changes: list[str] = []
    adata.obs = writable_frame(adata.obs, "obs", changes)
    adata.var = writable_frame(adata.var, "var", changes)
    if adata.raw is not None:
        var = writable_frame(adata.raw.var, "raw.var", changes)
        if var is not adata.raw.var:
            adata.raw = anndata.AnnData(adata.raw.X, obs=adata.obs[[]], var=var, varm=dict(adata.raw.varm))
    for part in ("layers", "obsm", "varm", "obsp", "varp"):
        elements = getattr(adata, part)
        for name in [name for name in elements if name is not None]:  # None is X, see `layers_of`
            value = elements[name]
            if isinstance(value, pd.DataFrame):
                elements[name] = writable_frame(value, f"{part}[{name!r}]", changes)
            elif not fits(value[:1]) or "/" in name:
                del elements[name]
                changes.append(f"{part}[{name!r}] is left out: .h5ad cannot hold it ({type(value).__name__}).")
    adata.uns = writable_mapping(adata.uns, "uns", changes)
    for change in in_few_lines(changes):
        logger.warning(change)
    return changes


def size_in_memory(adata: anndata.AnnData) -> int:
    """Bytes of the matrices and tables of an AnnData, about the size of an uncompressed `.h5ad` file."""
    matrices = [adata.X, *layers_of(adata).values(), *(adata.obsm[name] for name in adata.obsm)]
    if adata.raw is not None:
        matrices.append(adata.raw.X)
    total = OVERHEAD + sum(int(table.memory_usage(deep=True).sum()) for table in (adata.obs, adata.var))
    for matrix in matrices:
        arrays = [getattr(matrix, name, None) for name in ("data", "indices", "indptr")]
        sizes = [array.nbytes for array in arrays if isinstance(array, np.ndarray)]
        total += sum(sizes) if sizes else getattr(matrix, "nbytes", 0)
    return int(total)


@contextmanager
def nullable_strings() -> Iterator[None]:
    """Let anndata write strings of which some are missing in the form that their file has: it refuses by default."""
    with anndata.settings.override(allow_write_nullable_strings=True):
        yield


def fits(value: Any) -> bool:
    """Whether `.h5ad` can hold a value; the value is written to a file in memory to find out."""
    in_memory = h5py.File("rehearsal", "w", driver="core", backing_store=False)
    with in_memory as file, warnings.catch_warnings(), nullable_strings():
        warnings.simplefilter("ignore")
        try:
            anndata.io.write_elem(file, "value", value)
        except Exception:  # anndata and h5py raise many types for a value without a writer
            return False
    return True


def writable_frame(frame: pd.DataFrame, name: str, changes: list[str]) -> pd.DataFrame:
    """Return the frame itself, or a copy with columns, names and index that `.h5ad` can store."""
    columns = writable_names(frame.columns, name, changes)
    index = frame.index
    if index.dtype != object or pd.api.types.infer_dtype(index, skipna=False) not in ("string", "empty"):
        index = pd.Index([str(value) for value in index], dtype=object, name=index.name)
    if index.name is not None and (not isinstance(index.name, str) or index.name in (RESERVED, *columns)):
        index = index.rename(None)
    failing = [i for i in range(frame.shape[1]) if not fits(frame.iloc[:, i].to_frame(columns[i]).set_axis(index))]
    if not failing and index is frame.index and columns == list(frame.columns):
        return frame
    done = frame.set_axis(columns, axis=1).set_axis(index)
    texts: list[str] = []
    for i in failing:
        column = frame.iloc[:, i]
        done[columns[i]], is_same = writable_column(column.set_axis(index))
        texts += [] if is_same else [columns[i]]
    if texts:
        more = "" if len(texts) <= SHOWN else f" and {len(texts) - SHOWN} more"
        changes.append(
            f"{name}: {', '.join(texts[:SHOWN])}{more} became text: .h5ad cannot hold the values as they are."
        )
    return done


def writable_column(column: pd.Series) -> tuple[pd.Series, bool]:
    """Convert a column for `.h5ad`; return it and whether its values are unchanged. Missing values stay missing."""
    if isinstance(column.dtype, pd.SparseDtype):
        return pd.Series(np.asarray(column), index=column.index), True
    if column.dtype == object:
        typed = column.convert_dtypes()  # numbers or booleans, some of them missing
        if typed.dtype != object and not isinstance(typed.dtype, pd.StringDtype) and fits(typed.to_frame("value")):
            return typed, True
    missing = np.asarray(column.isna(), dtype=bool)
    known = [value for value, absent in zip(column, missing, strict=True) if not absent]
    values = [None if absent else text_of(value) for value, absent in zip(column, missing, strict=True)]
    return pd.Series(pd.Categorical(values), index=column.index), all(isinstance(value, str) for value in known)


def writable_names(names: Iterable[Any], where: str, changes: list[str]) -> list[str]:
    """Turn names of columns or keys of `uns` into unique strings that are not reserved and contain no `/`."""
    done: list[str] = []
    names = list(names)
    for name in names:
        new = str(name).replace("/", "_")
        new = "index" if new == RESERVED else new
        stem, number = new, 1
        while new in done or (new != str(name) and new in set(map(str, names))):
            new, number = f"{stem}_{number}", number + 1
        if new != str(name):
            changes.append(f"{where}: {str(name)!r} is now {new!r}, as .h5ad reserves or repeats its name.")
        done.append(new)
    return done


def text_of(value: Any) -> str:
    """Convert a value to text: bytes are decoded, and whole numbers have no decimals.

    >>> text_of(b"B cell"), text_of(2.0), text_of(np.float32(0.5))
    ('B cell', '2', '0.5')
    """
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    is_whole = isinstance(value, float | np.floating) and float(value).is_integer()
    return str(int(value)) if is_whole else str(value)


def writable_mapping(mapping: Mapping[Any, Any], where: str, changes: list[str]) -> dict[str, Any]:
    """Copy `uns`, or a mapping in it, in types that `.h5ad` can store; small values that fail become text."""
    done: dict[str, Any] = {}
    for (key, value), name in zip(mapping.items(), writable_names(mapping, where, changes), strict=True):
        place = f"{where}[{key!r}]"
        if isinstance(value, Mapping):
            done[name] = writable_mapping(value, place, changes)
        elif isinstance(value, pd.DataFrame):
            done[name] = writable_frame(value, place, changes)
        elif fits(value):
            done[name] = value
        else:
            forms = ((form, form(value)) for form in FORMS)
            form, new = next(((form, new) for form, new in forms if new is not None and fits(new)), (None, None))
            if form is None:
                changes.append(f"{place} is left out: .h5ad cannot hold its type, {type(value).__name__}.")
                continue
            done[name] = new
            if form is not _array:
                changes.append(f"{place} became text: .h5ad cannot hold its type, {type(value).__name__}.")
    return done


def _array(value: Any) -> Any:
    """Convert a list, tuple or set to an array; None for other values."""
    return np.array(list(value)) if isinstance(value, list | tuple | set | frozenset) else None


def _texts(value: Any) -> Any:
    """Convert a collection of any types to an array of texts; None for other values."""
    is_many = isinstance(value, list | tuple | set | frozenset | np.ndarray | pd.Index | pd.Series)
    if not is_many or np.ndim(value) > 1:
        return None
    return np.array([text_of(item) for item in value], dtype=object)


def _text(value: Any) -> Any:
    """Convert a number, a date or a path to text; None for other values."""
    return text_of(value) if isinstance(value, SCALARS) else None


SCALARS = (numbers.Number, np.generic, datetime.date, datetime.timedelta, os.PathLike)
FORMS: tuple[Callable[[Any], Any], ...] = (_array, _texts, _text)
