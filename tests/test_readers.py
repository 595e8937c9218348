"""Every format gives the same cells, whole or in chunks; every broken file gives one clear error."""

import gzip

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse as sp

from scmmgpt.readers.cell_files import CellFile, read_file
from scmmgpt.readers.disk_parts import DiskRows, DiskTable
from scmmgpt.readers.text_tables import FileError


pytestmark = pytest.mark.filterwarnings("ignore:Writing zarr v2")

GENES = ["ACTB", "GAPDH", "CD3E", "CD19", "MS4A1", "MALAT1", "B2M"]
CELLS = [f"AAAC{i:02d}-1" for i in range(12)]


@pytest.fixture
def counts():
    return np.random.default_rng(0).poisson(1.0, (12, 7)).astype(np.float32)


@pytest.fixture
def cells(counts):
    adata = ad.AnnData(sp.csr_matrix(counts), pd.DataFrame(index=CELLS), pd.DataFrame(index=GENES))
    adata.obs["cell_type"] = ["B cell", "T cell"] * 6
    return adata


def write_h5ad(adata, folder):
    adata.write_h5ad(folder / "cells.h5ad")
    return folder / "cells.h5ad"


def write_h5ad_by_column(adata, folder):
    adata = adata.copy()
    adata.X = adata.X.tocsc()
    return write_h5ad(adata, folder)


def write_loom(adata, folder):
    with h5py.File(folder / "cells.loom", "w") as file:
        file["matrix"] = adata.X.toarray().T
        file["row_attrs/Gene"] = np.array(GENES, dtype="S")
        file["col_attrs/CellID"] = np.array(CELLS, dtype="S")
    return folder / "cells.loom"


def write_mtx(adata, folder):
    scipy.io.mmwrite(folder / "matrix.mtx", adata.X.T)
    (folder / "matrix.mtx.gz").write_bytes(gzip.compress((folder / "matrix.mtx").read_bytes()))
    (folder / "matrix.mtx").unlink()
    features = "".join(f"ENSG{i:011d}\t{gene}\tGene Expression\n" for i, gene in enumerate(GENES))
    (folder / "features.tsv.gz").write_bytes(gzip.compress(features.encode()))
    (folder / "barcodes.tsv.gz").write_bytes(gzip.compress("\n".join(CELLS).encode()))
    return folder


def iter_chunks(path, n_cells):
    """A file, so many cells at a time."""
    with read_file(path, backed=True) as file:
        for start in range(0, file.n_obs, n_cells):
            yield file[start : start + n_cells].to_memory()


def dense(matrix):
    return matrix.toarray() if sp.issparse(matrix) else np.asarray(matrix)


def test_layers_raw_and_obs_stay_with_their_rows(cells, counts, tmp_path):
    cells.layers["counts"] = cells.X * 2
    cells.raw = cells
    chunk = list(iter_chunks(write_h5ad(cells, tmp_path), 5))[1]
    np.testing.assert_array_equal(dense(chunk.layers["counts"]), counts[5:10] * 2)
    np.testing.assert_array_equal(dense(chunk.raw.X), counts[5:10])
    assert list(chunk.obs["cell_type"]) == list(cells.obs["cell_type"][5:10])


def test_a_backed_file_reads_only_the_rows_asked_for(cells, tmp_path):
    with read_file(write_h5ad(cells, tmp_path), backed=True) as file:
        assert isinstance(file, CellFile)
        assert isinstance(file.X, DiskRows)
        assert file[3:5].X[0:2].shape == (2, 7)


def test_a_matrix_stored_by_column_is_gathered_in_blocks_of_rows(cells, counts, tmp_path, monkeypatch):
    monkeypatch.setattr("scmmgpt.readers.disk_parts.COLUMN_BLOCK_BYTES", cells.X.nnz * 8 // 3)
    monkeypatch.setattr("scmmgpt.readers.disk_parts.COLUMN_ENTRIES", 10)
    chunks = list(iter_chunks(write_h5ad_by_column(cells, tmp_path), 5))
    np.testing.assert_array_equal(np.concatenate([dense(chunk.X) for chunk in chunks]), counts)


def test_a_damaged_column_of_a_table_on_disk_is_refused(cells, tmp_path):
    path = write_h5ad(cells, tmp_path)
    with h5py.File(path, "r+") as file:
        assert list(DiskTable(file["obs"])["cell_type"]) == list(cells.obs["cell_type"])
        file["obs"].create_dataset("short", data=np.arange(4))
        file["obs"].attrs["column-order"] = ["cell_type", "short", "gone"]
        for name in ("short", "gone"):
            with pytest.raises(FileError, match=f"'{name}' is missing or too short"):
                DiskTable(file["obs"], 0, 3)[name]


def truncated(cells, folder):
    path = write_h5ad(cells, folder)
    path.write_bytes(path.read_bytes()[:9000])
    return path


def named(name, content):
    def write(cells, folder):
        (folder / name).write_bytes(content)
        return folder / name

    return write


def without_barcodes(cells, folder):
    write_mtx(cells, folder)
    (folder / "barcodes.tsv.gz").unlink()
    return folder


def of_other_files(cells, folder):
    write_mtx(cells, folder)
    (folder / "barcodes.tsv.gz").write_bytes(gzip.compress(b"one\ntwo"))
    return folder


def bare_hdf5(cells, folder):
    with h5py.File(folder / "cells.h5ad", "w") as file:
        file["pictures"] = [1]
    return folder / "cells.h5ad"


def short_matrix(cells, folder):
    path = write_h5ad(cells, folder)
    with h5py.File(path, "a") as file:
        values = file["X/data"][:-3]
        del file["X/data"]
        file["X/data"] = values
    return path


def dead_link(cells, folder):
    (folder / "cells.h5ad").symlink_to(folder / "moved.h5ad")
    return folder / "cells.h5ad"


LONG_TABLE = "".join(f"{gene}\tAAAC{i:02d}\t{i + 1}\n" for gene in GENES for i in range(12)).encode()  # no header


@pytest.mark.parametrize(
    ("write", "error", "words"),
    [
        (lambda cells, folder: folder / "nothing.h5ad", FileNotFoundError, r"no file .*nothing\.h5ad"),
        (truncated, ValueError, r"truncated: 9,000 of .* copy it again"),
        (named("cells.h5ad", b""), ValueError, r"empty \(0 bytes\)"),
        (named("cells.h5ad", b"a text"), ValueError, r"not an HDF5 file"),
        (named("cells.h5ad", gzip.compress(b"x")), ValueError, r"gunzip"),
        (named("cells.rds", b"X"), ValueError, r"R object.*anndataR"),
        (named("cells.pdf", b"X"), ValueError, r"unknown format.*\.h5ad"),
        (named("cells.csv", b"\n"), ValueError, r"is empty|no column of numbers"),
        (named("cells.csv", b"name,what\na,b\nc,d\n"), ValueError, r"no column of numbers"),
        (named("cells.csv.gz", b"\x1f\x8b\x08\x00"), ValueError, r"damaged"),
        (named("cells.mtx", b"%%MatrixMarket"), FileNotFoundError, r"no features\.tsv"),
        (without_barcodes, FileNotFoundError, r"no barcodes\.tsv"),
        (of_other_files, ValueError, r"7 features and 2 barcodes.*do not belong together"),
        (bare_hdf5, ValueError, r"neither AnnData.*pictures"),
        (short_matrix, ValueError, r"the file is damaged"),
        (dead_link, FileNotFoundError, r"cells.h5ad is a link to .*moved.h5ad, which does not exist"),
        (named("cells.parquet", b"PAR1"), FileError, r"is a table in an unsupported format. Save it as .csv"),
        (lambda *to: write_mtx(*to) / "barcodes.tsv.gz", ValueError, r"has names, not counts: pass the matrix"),
        (named("cells.tsv", LONG_TABLE), ValueError, r"its first line has 'ACTB', 'AAAC00', '1'. Add a first line"),
        (lambda *_: "https://example.org/cells.h5ad", ValueError, r"is an address, not a file: download it"),
        (lambda cells, folder: folder, ValueError, r"not a \.zarr and has no.*nothing"),
    ],
)
def test_a_file_that_cannot_be_read_gets_one_clear_error(write, error, words, cells, tmp_path):
    path = write(cells, tmp_path)
    for backed in (False, True):
        with pytest.raises(error, match=words):
            read_file(path, backed=backed)


@pytest.mark.parametrize("text", ["", "NA", "NaN"])
def test_a_table_with_fields_without_a_number_is_refused_with_the_first(text, tmp_path):
    rows = [f"AAAC-{i}," + ",".join("123456") for i in range(12)]
    rows[3] = f"AAAC-3,1,2,{text},4,5,6"
    (tmp_path / "cells.csv").write_text("\n".join([",CD3E,CD19,LYZ,NKG7,MS4A1,GNLY", *rows]) + "\n")
    with pytest.raises(ValueError, match="1 fields without a number .* at cell 'AAAC-3', gene 'LYZ'. Write 0"):
        read_file(tmp_path / "cells.csv")


@pytest.mark.parametrize("backed", [False, True])
def test_values_come_in_the_byte_order_of_this_machine(backed, cells, counts, tmp_path):
    path = write_loom(cells, tmp_path)
    with h5py.File(path, "a") as file:  # as programs in Java write it
        del file["matrix"]
        file["matrix"] = counts.T.astype(">f4")
    with read_file(path, backed=True) as file:
        block = file.X[:12] if backed else read_file(path).X
    assert block.dtype.isnative
    np.testing.assert_array_equal(block, counts)


def test_names_of_loomR_are_those_of_cells_and_genes(tmp_path):
    with h5py.File(tmp_path / "cells.loom", "w") as file:
        file["matrix"] = np.arange(6).reshape(3, 2)
        file["row_attrs/gene_names"] = np.array(["CD3E", "CD19", "LYZ"], dtype="S")
        file["col_attrs/cell_names"] = np.array(["AAAC", "AAAG"], dtype="S")
    adata = read_file(tmp_path / "cells.loom")
    assert list(adata.obs_names) == ["AAAC", "AAAG"]
    assert list(adata.var_names) == ["CD3E", "CD19", "LYZ"]
    with h5py.File(tmp_path / "cells.loom", "r+") as file:
        del file["col_attrs"]
    with pytest.raises(ValueError, match="not a complete loom file: it lacks col_attrs"):
        read_file(tmp_path / "cells.loom")


def test_descriptions_of_a_gct_that_are_all_na_are_no_cell(cells, tmp_path):
    frame = cells.to_df().astype(int).T.rename_axis("NAME")
    frame.insert(0, "Description", "na")
    (tmp_path / "cells.gct").write_text("#1.2\n7\t12\n" + frame.to_csv(sep="\t"))
    adata = read_file(tmp_path / "cells.gct")
    assert list(adata.obs_names) == CELLS
    np.testing.assert_array_equal(adata.to_df()[GENES], cells.to_df())


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_a_slice_of_a_table_on_disk_has_the_values_of_the_table_in_memory(tmp_path, suffix):
    obs = pd.DataFrame(
        {
            "type": pd.Categorical(["B", "T", "B", "NK"], categories=["T", "NK", "B"], ordered=True),
            "text": ["a", "b", "ä", "d"],
            "number": [1.5, 2.5, np.nan, 4.5],
            "flag": [True, False, True, True],
            "masked": pd.array([1, None, 3, 4], dtype="Int64"),
        },
        index=["cell 1", "cell 2", "cell 3", "cell 4"],
    )
    adata, path = ad.AnnData(np.eye(4, dtype=np.float32), obs=obs), tmp_path / f"cells{suffix}"
    getattr(adata, f"write_{suffix[1:]}")(path)
    with read_file(path, backed=True, obs_on_disk=True) as file:
        part = file[1:4][:2]
        assert part.shape == (2, 4)
        assert list(part.obs_names) == ["cell 2", "cell 3"]
        assert list(part.obs.columns) == list(obs.columns)
        assert "type" in part.obs
        assert "names" not in part.obs
        for name in obs:
            pd.testing.assert_series_equal(part.obs[name], obs[name].iloc[1:3], check_names=True, check_dtype=False)
