"""Whatever is done to a layout, a file gives the right cells with the right barcodes, or one clear error.

Structure is mutated (names, prefixes, order, compression, separators, encodings, indexes, annotations, decoys), so
that the right cells are known; and bytes are damaged, where only a clear error or cells may come out. The variable
`SCMMGPT_EXAMPLES` sets how many of each are tried.
"""

import bz2
import gzip
import hashlib
import lzma
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse as sp
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from scmmgpt.commands.inspect_input import inspect_file
from scmmgpt.readers.cell_files import read_file
from scmmgpt.tests.cases import inputs
from scmmgpt.tests.cases.inputs import CELLS, COUNTS, GENES, IDS, TYPES


pytestmark = pytest.mark.filterwarnings("ignore:Writing zarr v2", "ignore::UserWarning")

quick = settings(
    max_examples=int(os.environ.get("SCMMGPT_EXAMPLES", "40")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
COMPRESSORS = {"": lambda data: data, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
# Annotations of cells, by name: numbers and words of Seurat, scanpy and of nobody.
NOTES = {
    "nCount_RNA": COUNTS.sum(axis=1).to_numpy(),
    "percent.mt": np.arange(len(CELLS)) / 7,
    "seurat_clusters": np.arange(len(CELLS)) % 4,
    "cell_type": np.array(TYPES),
    "UMAP_1": np.arange(len(CELLS)) - 3.25,
    "age": 61,
    "Sample": "donor one",
    "is_doublet": np.arange(len(CELLS)) % 2 == 0,
    "weird thing": 2,
}
flag = st.booleans()


@pytest.fixture
def folder(tmp_path):
    return tmp_path


def fresh(folder):
    """An empty folder for one example."""
    shutil.rmtree(folder / "example", ignore_errors=True)
    (folder / "example").mkdir()
    return folder / "example"


@st.composite
def table_text(draw):
    """The bytes of a table of `COUNTS`, and the names of its cells in place of `CELLS`."""
    frame = COUNTS.copy()
    cells = draw(st.sampled_from([CELLS, [f"{i:04d}" for i in range(len(CELLS))], [f"s1_{n}" for n in CELLS]]))
    kind = draw(st.sampled_from(["symbol", "id and symbol", "mixed"]))
    frame.index = cells
    if kind == "id and symbol":
        frame.columns = [f"{gene}_{name}" for gene, name in zip(GENES, IDS, strict=True)]
    elif kind == "mixed":
        frame.columns = [gene if i % 2 else gene.lower() for i, gene in enumerate(GENES)]
    frame = frame.iloc[draw(st.permutations(range(len(CELLS)))), draw(st.permutations(range(len(GENES))))]
    notes = draw(st.lists(st.sampled_from(list(NOTES)), unique=True, max_size=5))
    table = pd.DataFrame({name: NOTES[name] for name in notes}, index=pd.Index(cells)).loc[frame.index]
    form = draw(st.sampled_from(["wide", "turned", "long"]))
    if form == "long":
        stacked = frame.stack()
        frame = stacked[stacked > 0].reset_index()
        frame.columns = ["cell", "gene", "count"]
        frame = frame[draw(st.permutations(list(frame.columns)))]
    elif form == "wide":
        frame = pd.concat([table, frame] if draw(flag) else [frame, table], axis=1)
    else:
        words = [name for name in notes if table[name].dtype.kind not in "iuf"]
        frame = pd.concat([table.drop(columns=words).T, frame.T] if draw(flag) else [frame.T, table[words[:0]].T])
    separator = draw(st.sampled_from([",", "\t", ";", "|"]))
    quoting = draw(st.sampled_from([0, 2]))  # minimal, or all words
    text = frame.to_csv(sep=separator, index=form != "long", quoting=quoting, lineterminator="\n")
    if form != "long":
        if draw(flag):
            text = draw(st.sampled_from(["gene", "cell_id", "X", "Cell_Index"])) + text.removeprefix('""')
        elif draw(flag):  # as R writes it
            text = text.removeprefix('""').removeprefix(separator)
    if draw(flag):
        text = draw(st.sampled_from(["# made by a program\n", "## one\n## two\n", f"sep={separator}\n", "\n"])) + text
    if draw(flag):
        text += draw(st.sampled_from(["\n", "\n\n"]))
    if draw(flag):
        text = text.replace("\n", "\r\n")
    return text.encode(draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))), cells


def read_all(path):
    """The cells of a file, in memory and from disk, which must be the same."""
    adata = read_file(path)
    with read_file(path, backed=True) as file:
        chunk = file[: file.n_obs].to_memory()
    assert list(chunk.obs_names) == list(adata.obs_names)
    np.testing.assert_array_equal(chunk.to_df().to_numpy(), adata.to_df().to_numpy())
    return adata


def assert_right(adata, expected, cells=CELLS):
    """Every cell has its own counts, whatever the order; no cell and no gene more or less."""
    truth = expected.copy()
    truth.index = cells[: len(truth)] if cells is not CELLS else truth.index
    frame = adata.to_df()
    names = adata.var["gene_name"] if "gene_name" in adata.var else adata.var_names
    frame.columns = [name.split("_")[0].upper() for name in names]
    assert sorted(frame.index) == sorted(truth.index)
    present = [gene for gene in truth.columns if gene in set(frame.columns)]
    assert len(frame.columns) == len(present)
    np.testing.assert_array_equal(frame.loc[truth.index, present], truth[present])
    assert not truth.drop(columns=present).to_numpy().any()


def outcome(path):
    """The cells, or `None` where there is one clear error."""
    before = {p: hashlib.md5(p.read_bytes()).hexdigest() for p in Path(path).parent.rglob("*") if p.is_file()}
    try:
        adata = read_all(path)
    except (ValueError, FileNotFoundError) as error:
        message = str(error)
        assert len(message) > 30, message
        assert "\n" not in message.strip(), message
        adata = None
    after = {p: hashlib.md5(p.read_bytes()).hexdigest() for p in Path(path).parent.rglob("*") if p.is_file()}
    assert before == after, "a reader changes no file"
    return adata


@quick
@given(
    written=table_text(),
    ending=st.sampled_from(list(COMPRESSORS)),
    name=st.sampled_from(["t.csv", "t.tsv", "t.txt", "T.CSV"]),
)
def test_any_table_gives_its_cells(folder, written, ending, name):
    data, cells = written
    path = fresh(folder) / f"{name}{ending}"
    path.write_bytes(COMPRESSORS[ending](data))
    adata = outcome(path)
    assert adata is not None, "all of these tables are read"
    assert_right(adata, COUNTS, cells)


# -- folders ----------------------------------------------------------------------------------------------------------

DECOYS = ["barcodes.tsv", "GSM99_barcodes.tsv", "old_barcodes.tsv", "README.txt"]
ROWS = [slice(0, 8), slice(8, 16), slice(16, 24)]


@st.composite
def samples(draw):
    """How the files of up to three samples in one folder are called, which are missing, and what is passed."""
    n = draw(st.integers(1, 3))
    accession = draw(st.sampled_from(["GSM{}", "GSM{}_donor{}", "sample-{}", "Sample {}", "run{}.lib{}"]))
    joint = draw(st.sampled_from(["_", ".", "-"]))
    last = draw(flag)
    return {
        "n": n,
        "names": ["" if n == 1 and draw(flag) else accession.format(i + 1, i + 1) for i in range(n)],
        "joint": joint,
        "last": last,
        "features": draw(st.sampled_from(["features", "genes", "gene_names"])),
        "shared_features": draw(flag),
        "barcodes": draw(st.sampled_from(["barcodes", "cells", "cell_names"])),
        "matrix": draw(st.sampled_from(["matrix", "counts", "umi_count_matrix"])),
        "turned": draw(flag),
        "packed": [draw(flag) for _ in range(9)],
        "missing": draw(st.sampled_from(["", "", "", "features", "barcodes"])),
        "decoy": draw(st.sampled_from(["", "", *DECOYS])),
        "header": draw(flag),
        "same_barcodes": draw(flag),
        "passed": draw(st.integers(-1, n - 1)),  # the folder, or a sample's matrix
        "nested": draw(flag),
    }


def write_samples(folder, how):
    """Write the samples; the path to pass and the cells of each sample."""
    here = folder / "a" / "b" if how["nested"] else folder
    here.mkdir(parents=True, exist_ok=True)
    packed, truths, matrices = iter(how["packed"]), [], []

    def put(sample, what, ending, text):
        parts = [what, sample] if how["last"] else [sample, what]
        name = how["joint"].join(part for part in parts if part) + ending
        data = text.encode()
        if next(packed, False):
            name, data = name + ".gz", gzip.compress(data)
        (here / name).write_bytes(data)
        return here / name

    for i, sample in enumerate(how["names"]):
        truth = COUNTS[ROWS[i]].copy()
        truth.index = CELLS[:8] if how["same_barcodes"] else truth.index
        truths.append(truth)
        scipy.io.mmwrite(here / "tmp.mtx", sp.coo_matrix(truth.to_numpy().T if how["turned"] else truth.to_numpy()))
        matrices.append(put(sample, how["matrix"], ".mtx", (here / "tmp.mtx").read_text()))
        (here / "tmp.mtx").unlink()
        lacks = how["missing"] if i == len(how["names"]) - 1 else ""
        if lacks != "barcodes":
            lines = (["barcode"] if how["header"] else []) + list(truth.index)
            put(sample, how["barcodes"], ".tsv", "\n".join(lines) + "\n")
        if lacks != "features" and not (how["shared_features"] and i):
            put("" if how["shared_features"] else sample, how["features"], ".tsv", "\n".join(GENES) + "\n")
    if how["decoy"] and not any(p.name.startswith(how["decoy"]) for p in here.iterdir()):
        (here / how["decoy"]).write_text("\n".join(f"WRONG{i}" for i in range(8)))
    return (folder if how["passed"] < 0 else matrices[how["passed"]]), truths


@quick
@given(how=samples())
def test_any_folder_gives_the_cells_of_the_sample_with_their_barcodes(folder, how):
    path, truths = write_samples(fresh(folder), how)
    adata = outcome(path)
    event(f"read: {adata is not None}")
    alone = how["shared_features"] or how["names"] == [""]
    misled = how["decoy"] == "barcodes.tsv" and how["missing"] == "barcodes" and alone
    sound = not how["missing"] and not how["decoy"] and (how["n"] == 1 or how["passed"] >= 0)
    if adata is None:
        assert not sound, "nothing is missing and nothing may be confused"
        return
    if misled and how["n"] == 1:
        return  # `barcodes.tsv` and `features.tsv` beside one matrix: nothing tells that they are others'
    assert how["n"] == 1 or how["passed"] >= 0, "a folder of several samples is refused"
    assert_right(adata, truths[max(how["passed"], 0)])


# -- damage -----------------------------------------------------------------------------------------------------------

SOUND = [
    case.build
    for case in inputs.CASES
    if not case.refused and case.what not in ("droplets without cells", "retired ids with symbols")
]


@st.composite
def damages(draw):
    """A file of a sound input and what is done to it."""
    return {
        "build": draw(st.integers(0, len(SOUND) - 1)),
        "file": draw(st.integers(0, 50)),
        "where": draw(st.floats(0, 1)),
        "how": draw(st.sampled_from(["flip", "flip", "cut", "drop", "zeros", "double"])),
        "bits": draw(st.integers(1, 255)),
    }


@quick
@given(how=damages())
def test_damaged_bytes_give_cells_or_one_clear_error(folder, how):
    here = fresh(folder)
    path = SOUND[how["build"]](here)
    files = sorted(p for p in here.rglob("*") if p.is_file())
    victim = files[how["file"] % len(files)]
    data = bytearray(victim.read_bytes())
    place = min(int(how["where"] * len(data)), max(len(data) - 1, 0))
    if how["how"] == "flip" and data:
        data[place] ^= how["bits"]
    elif how["how"] == "cut":
        del data[place:]
    elif how["how"] == "zeros":
        data[place : place + 64] = bytes(len(data[place : place + 64]))
    elif how["how"] == "double":
        data += data[place:]
    victim.unlink() if how["how"] == "drop" else victim.write_bytes(data)
    adata = outcome(path)
    event(f"read: {adata is not None}")
    if adata is not None:
        try:
            report = inspect_file(path)
        except (ValueError, TypeError) as error:
            assert "\n" not in str(error).strip()  # noqa: PT017
        else:
            assert report["usable"] or report["error"]
