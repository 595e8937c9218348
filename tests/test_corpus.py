"""The corpus on disk: what is written is read back exactly. `test_faults.py` damages corpora."""

import functools
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scmmgpt.cells_scmmgpt import Cells
from scmmgpt.tests.corpora import random_cells, write_corpus
from scmmgpt.train.data.corpus import Manifest, hash_vocabulary, open_corpus
from scmmgpt.train.data.corpus_writer import CorpusWriter


N_GENES = 200
VOCABULARY = {"<pad>": 0, "<cls>": 1, "<eoc>": 2, **{f"G{i}": i for i in range(3, N_GENES)}}
make_cells = functools.partial(random_cells, n_genes=N_GENES, most_genes=39, most_counts=49)


def assert_same_cells(ours, theirs):
    for name in ("indptr", "gene_ids", "counts", "cell_ids", "total_counts"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)


@pytest.fixture
def corpus_path(tmp_path):
    """300 training cells in three shards, 20 test cells in one."""
    train, test = make_cells(300), make_cells(20, seed=1, first_id=1000)
    obs = {
        "cell_type": [None if i % 3 == 0 else f"type {i % 3}" for i in range(300)],
        "barcode": list(map(str, range(300))),
    }
    splits = {"train": (train, obs), "test": (test, {})}
    write_corpus(tmp_path / "corpus", VOCABULARY, splits, cells_per_shard=100, row_group_size=32)
    return tmp_path / "corpus"


def test_cells_and_annotations_come_back_as_they_were_written(corpus_path):
    corpus = open_corpus(corpus_path)
    cells, obs = corpus.load("train")
    assert_same_cells(cells, make_cells(300))
    assert obs["cell_type"].to_pylist()[:4] == [None, "type 1", "type 2", None]
    assert obs["barcode"].to_pylist()[-1] == "299"
    assert corpus.n_cells("train") == 300
    assert len(corpus.shards("train")) == 3
    table = corpus.obs("train", ["cell_id", "cell_type"])
    assert isinstance(table, pa.Table)
    assert table.to_pandas()["cell_type"].value_counts().to_dict() == {"type 1": 100, "type 2": 100}


@pytest.mark.parametrize(
    ("values", "stored"),
    [
        ([1, 65_535], "uint16"),
        ([1, 65_536], "float32"),
        ([1, 2**24], "float32"),
        ([0.1, 1234.567], "float32"),
    ],
)
def test_every_value_is_kept_exactly(tmp_path, values, stored):
    values = np.array(values)
    values = values.astype(np.float32) if values.dtype.kind == "f" else values
    cells = Cells(np.array([0, 2]), np.array([3, 9]), values, np.array([7], np.uint64))
    write_corpus(tmp_path, VOCABULARY, {"train": (cells, {})})
    corpus = open_corpus(tmp_path)
    read, _ = corpus.load("train")
    assert corpus.shards("train")[0].counts_dtype == stored
    np.testing.assert_array_equal(read.counts, values)


def cell_of(genes, counts):
    """One cell."""
    return Cells(np.array([0, len(genes)]), np.array(genes), np.array(counts), np.array([7], np.uint64))


@pytest.mark.parametrize(
    ("vocabulary", "cells", "obs", "says"),
    [
        (VOCABULARY, cell_of([3], [2**24 + 1]), {}, "16777217"),  # which float32 would round
        ({symbol: i for symbol, i in VOCABULARY.items() if i < 50}, make_cells(20), {}, "another vocabulary"),
        (VOCABULARY, cell_of([5, 5], [1, 1]), {}, "gene ids of cell 0 are not ascending and unique"),
        (VOCABULARY, make_cells(2), {"louvain": ["1", "2"]}, "louvain"),
    ],
    ids=["count", "vocabulary", "order", "annotation"],
)
def test_what_a_corpus_cannot_hold_is_refused_when_it_is_written(tmp_path, vocabulary, cells, obs, says):
    with pytest.raises(ValueError, match=says):
        write_corpus(tmp_path, vocabulary, {"train": (cells, obs)})


def test_the_same_cells_give_the_same_bytes(tmp_path):
    paths = [CorpusWriter(tmp_path / name, VOCABULARY).write_shard("train", 0, 1, make_cells(99), {}) for name in "ab"]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_a_missing_shard_stops_the_build_from_finishing(tmp_path):
    writer = CorpusWriter(tmp_path, VOCABULARY)
    writer.write_shard("train", 0, 2, make_cells(10), {})
    with pytest.raises(ValueError, match=r"1 of 2 shards; missing are numbers \[1\]"):
        writer.finish()
    with pytest.raises(FileNotFoundError, match="build did not finish"):
        open_corpus(tmp_path)


def test_a_write_that_fails_leaves_no_shard(tmp_path, monkeypatch):
    writer = CorpusWriter(tmp_path, VOCABULARY)
    monkeypatch.setattr(pq.ParquetWriter, "write_table", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        writer.write_shard("train", 0, 1, make_cells(10), {})
    assert list((tmp_path / "data").iterdir()) == []


def test_another_model_vocabulary_is_refused(corpus_path):
    swapped = {**VOCABULARY, "G3": 4, "G4": 3}
    with pytest.raises(ValueError, match=r"2 with another id \['G3', 'G4'\]"):
        open_corpus(corpus_path).check_vocabulary(swapped, "the model")
    open_corpus(corpus_path).check_vocabulary(
        dict(reversed(VOCABULARY.items())), "the model"
    )  # the order of entries means nothing


@pytest.mark.parametrize("name", ["vocab.json", "splits.json"])
def test_a_changed_side_file_is_refused(corpus_path, name):
    content = json.loads((corpus_path / name).read_text())
    (corpus_path / name).write_text(json.dumps({**content, "extra": 1}))
    with pytest.raises(ValueError, match=name):
        open_corpus(corpus_path)


def test_a_newer_schema_is_refused(corpus_path):
    path = corpus_path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 99}))
    with pytest.raises(ValueError, match=r"schema version 99; this release reads 2"):
        open_corpus(corpus_path)


def test_the_manifest_survives_a_round_trip(tmp_path):
    manifest = write_corpus(
        tmp_path,
        VOCABULARY,
        {"train": (make_cells(5), {})},
        split_by="donor",
        splits={"train": ["d1"]},
        sources=[{"name": "a.h5ad", "n_cells": 5}],
        dropped={"cells": {"empty": 2}},
        command="prepare a.h5ad",
    )
    assert Manifest.read(tmp_path / "manifest.json") == manifest
    assert open_corpus(tmp_path).splits == {"train": ["d1"]}


def test_the_vocabulary_hash_is_that_of_its_canonical_json():
    # printf '{"<pad>":0,"A":1}' | sha256sum
    expected = "fbc1a9921b7c0d2def31b4c0bd18c164e013e7a03bd7483d1cc0787a32624564"
    assert hash_vocabulary({"A": 1, "<pad>": 0}) == expected


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_reads_the_published_layout(tmp_path, streaming, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    floats = make_cells(10, seed=3, dtype=np.float32, first_id=500)
    writer = CorpusWriter(tmp_path / "corpus", VOCABULARY)
    writer.write_shard("train", 0, 2, make_cells(10), {"cell_type": ["B cell"] * 10})
    writer.write_shard("train", 1, 2, floats, {})
    writer.finish()
    rows = datasets.load_dataset(
        "parquet",
        data_files=str(tmp_path / "corpus" / "data" / "train-*.parquet"),
        split="train",
        streaming=streaming,
        features=open_corpus(tmp_path / "corpus").features(),
        cache_dir=str(tmp_path / "hf"),
    )
    rows = list(rows)
    assert [row["cell_id"] for row in rows] == [*range(10), *range(500, 510)]
    assert rows[0]["cell_type"] == "B cell"
    assert rows[10]["counts"] == floats.counts[: floats.indptr[1]].tolist()
