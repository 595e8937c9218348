"""Checks of HDF5 and Zarr files before their values are loaded; damage is an error of one line.

The libraries of both formats read a missing chunk as zeros, and do not compare the sizes of arrays.
"""

from collections.abc import Iterator
from typing import Any

import anndata
import h5py
import numpy as np

from scmmgpt.readers.text_tables import FileError


try:  # the import registers more filters with HDF5
    import hdf5plugin  # noqa: F401
except ImportError:
    pass


# Encodings of anndata's on-disk format that all supported versions read; others may need a package.
ENCODINGS = frozenset(
    "anndata raw dict array csr_matrix csc_matrix dataframe categorical string string-array numeric-scalar rec-array "
    "nullable-integer nullable-boolean nullable-string-array bytes null".split()
)


def check_links(file: h5py.File) -> None:
    """Refuse a file with parts in other files: a link in a foreign file could expose any file of this machine."""

    def stop_at(name: str, link: Any) -> tuple[str, str] | None:  # returns, since HDF5 drops errors raised here
        part = file[name] if isinstance(link, h5py.HardLink) else None
        others = [link.filename] if isinstance(link, h5py.ExternalLink) else []
        if isinstance(part, h5py.Dataset):
            others += [name for name, *_ in part.external or ()]
            others += [source.file_name for source in part.virtual_sources()] if part.is_virtual else []
        outside = sorted(set(others) - {".", file.filename})
        return (name, outside[0]) if outside else None

    if outside := file.visititems_links(stop_at):
        name, other = outside
        raise FileError(f"{name} of {file.filename} is in another file, {other!r}. Copy all parts into one file.")


def check_parts(group: Any) -> None:
    """Refuse a file with any part that cannot be read, since anndata reads all parts with the cells."""
    for name, part in _walk(group, ""):
        encoding = attribute(part, "encoding-type")
        if encoding not in (None, "", *ENCODINGS):
            try:
                anndata.io.read_elem(part)
            except Exception as error:  # readers of other packages raise errors of many types
                remedy = f"the installed anndata does not know ({type(error).__name__}). Update anndata"
                if isinstance(error, ImportError):
                    package = str(encoding).removesuffix("-array")
                    remedy = f"needs the package {package}, which is not installed. Run `pip install {package}`"
                raise FileError(f"{name} is encoded as {encoding!r}, which {remedy}, or delete that part.") from error
        if isinstance(part, h5py.Dataset) or "/_index" in name and not name.endswith("/mask"):
            if getattr(part, "shape", ()):  # an array: no scalar, and no group of values and mask
                check_stored(part)
        elif name.endswith("/codes") and part.nchunks and not part.nchunks_initialized:
            _check_labels(group, name, part)


def _check_labels(group: Any, name: str, codes: Any) -> None:
    """Refuse a column of several labels without stored codes. With one label, all codes are 0, and Zarr omits them."""
    if group[name.removesuffix("codes") + "categories"].shape[0] > 1:
        check_stored(codes, zeros_mean="every cell would have the first label")


def _walk(group: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Parts of a group and their names, at any depth, except parts within encodings other than `ENCODINGS`."""
    for key in group:
        part, name = group[key], f"{prefix}{key}"
        yield name, part
        if hasattr(part, "keys") and attribute(part, "encoding-type") in (None, "", *ENCODINGS):
            yield from _walk(part, f"{name}/")


def check_stored(array: Any, *, zeros_mean: str = "the values are lost") -> Any:
    """Return an array if all its chunks are stored, else refuse it: a missing chunk would be read as zeros."""
    remedy = "Copy the data again, or write them again"
    if isinstance(array, h5py.Dataset):
        if not array.size or array.is_virtual:
            return array
        _check_filters(array)
        n_chunks = int(np.prod([-(-n // c) for n, c in zip(array.shape, array.chunks or array.shape, strict=True)]))
        if array.chunks:
            n_stored = array.id.get_num_chunks()
        else:  # the size of strings on disk is not `nbytes`
            size = 1 if array.dtype.kind == "O" else array.nbytes
            n_stored = int(array.id.get_storage_size() >= size or bool(array.external))
    else:
        n_chunks, n_stored = array.nchunks, array.nchunks_initialized
        remedy += " (Zarr also omits chunks that are all zeros: store such a matrix as a sparse one)"
    if n_stored < n_chunks:
        raise FileError(
            f"{where(array)} lacks {n_chunks - n_stored} of {n_chunks} chunks, which would be read as zeros: "
            f"{zeros_mean}. {remedy}."
        )
    return array


def _check_filters(array: h5py.Dataset) -> None:
    """Refuse an array whose HDF5 filter is not installed."""
    properties = array.id.get_create_plist()
    for i in range(properties.get_nfilters()):
        code, _, _, name = properties.get_filter(i)
        if not h5py.h5z.filter_avail(code):
            raise FileError(
                f"{where(array)} is compressed by the HDF5 filter {name.decode() or code}, which is not installed. "
                "Run `pip install hdf5plugin`, or write the file with gzip."
            )


def where(array: Any) -> str:
    """Name of an array and its file, for error messages."""
    file = array.file.filename if isinstance(array, h5py.Dataset) else str(array.store_path).removeprefix("file://")
    return f"{array.name} of {file}" if isinstance(array, h5py.Dataset) else file


def load(array: Any, selection: Any) -> np.ndarray:
    """Load values of an array on disk, in the byte order of this machine.

    Raises:
        FileError: If the values cannot be read.
    """
    try:
        values = array[selection]
    except Exception as error:  # h5py, zarr and their filters raise errors of many types
        raise FileError(
            f"{where(array)} cannot be read ({type(error).__name__}: {error}): the file is damaged. Copy it again."
        ) from error
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def check_indices(indices: np.ndarray, n: int, name: str) -> None:
    """Refuse indices of a sparse matrix outside of its `n` columns (CSR) or rows (CSC)."""
    if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < n:
        raise FileError(
            f"{name} has entries at {int(indices.min())} to {int(indices.max())}, but only {n} positions: the file is "
            "damaged. Write or copy it again."
        )


def attribute(group: Any, name: str) -> Any:
    """An attribute of a group, with bytes decoded; `None` if the group lacks it."""
    value = group.attrs.get(name)
    return value.decode() if isinstance(value, bytes) else value
