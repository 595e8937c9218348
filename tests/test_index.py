"""The index of many cells finds what exact search finds, grows, and is opened without loading it."""

import json

import anndata
import numpy as np
import pytest

from scmmgpt import synthetic
from scmmgpt.__main__ import main


pytest.importorskip("faiss", reason="the extra `index` installs FAISS")

from scmmgpt.commands import index


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def write_embedded(path, vectors, tissue="blood", checkpoint="model", of="cell-text"):
    """A file as `embed` writes it."""
    adata = anndata.AnnData(np.zeros((len(vectors), 1), np.float32))
    adata.obs_names = [f"{path.stem}-{i}" for i in range(len(vectors))]
    adata.obs["tissue"] = tissue
    adata.obs["number"] = np.arange(len(vectors))
    adata.obsm["X_scmmgpt"] = vectors
    adata.uns["scmmgpt"] = {"embed": {"of": of}, "checkpoint": checkpoint}
    adata.write_h5ad(path)
    return path


@pytest.fixture
def vectors():
    """Three hundred vectors of unit length, of 16 dimensions."""
    return unit(np.random.default_rng(0).normal(size=(300, 16)))


@pytest.fixture
def folder(vectors, tmp_path):
    """An index of two files: 200 cells of blood, 100 of lung."""
    write_embedded(tmp_path / "blood.h5ad", vectors[:200])
    write_embedded(tmp_path / "lung.h5ad", vectors[200:], "lung")
    index.add_files(tmp_path / "index", [tmp_path / "blood.h5ad", tmp_path / "lung.h5ad"])
    return tmp_path / "index"


def test_the_best_hits_are_those_of_exact_search(folder, vectors):
    found = total = 0
    for query in unit(np.random.default_rng(1).normal(size=(20, 16))):
        exact = np.argsort(-(vectors @ query))[:10]
        names = {f"blood-{i}" if i < 200 else f"lung-{i - 200}" for i in exact}
        hits = index.search_index(folder, query, 10)
        found, total = found + len(names & {hit.cell for hit in hits}), total + 10
        assert [hit.rank for hit in hits] == list(range(1, 11))
        assert hits[0].score == pytest.approx((vectors @ query).max(), abs=1e-5)
    assert found / total >= 0.98
    hit = index.search_index(folder, vectors[250], 1)[0]
    assert (hit.cell, hit.file, hit.row) == ("lung-50", str(folder.parent / "lung.h5ad"), 50)


def test_an_index_cannot_leave_out_what_a_text_denies(folder):
    with pytest.raises(ValueError, match="cannot exclude 'CD8'; search FILE"):
        index.find_text(folder, "T cell without CD8", None, "model", 5)


def test_a_cell_of_one_file_is_sought_in_the_index_of_many_without_itself(folder, vectors, tmp_path):
    adata = anndata.AnnData(obs={"row": range(3)})
    adata.obs_names = ["blood-5", "blood-6", "lung-7"]  # the last is another cell of the same name
    asked = []

    class Pipeline:
        class processor:
            choose_input = staticmethod(lambda adata, **reading: reading)

        @staticmethod
        def places_named(adata, choice, like, of):
            asked.append((list(like), of, choice))
            return vectors[[{"blood-5": 5, "blood-6": 6, "lung-7": 60}[name] for name in like]]

    hits = index.find_like(folder, adata, ["blood-5"], Pipeline, "model", 3, layer="counts")
    assert asked == [(["blood-5"], "cell-text", {"layer": "counts"})]
    exact = np.argsort(-(vectors @ vectors[5]))
    assert exact[0] == 5
    assert [hit.rank for hit in hits] == [1, 2, 3]
    assert [int(hit.cell.split("-")[1]) + 200 * hit.cell.startswith("lung") for hit in hits] == exact[1:4].tolist()
    everywhere = index.find_like(folder, adata, ["lung-7", "blood-6"], Pipeline, "model", 300)
    assert {f"blood-{i}" for i in range(200)} - {hit.cell for hit in everywhere} == {"blood-6"}
    assert "lung-7" in {hit.cell for hit in everywhere}
    only = index.find_like(folder, adata, ["blood-5"], Pipeline, "model", 2, "tissue == 'lung'")
    assert all(hit.cell.startswith("lung") for hit in only)


def test_cells_called_by_a_profile_come_first(folder, vectors, tmp_path, caplog):
    query = vectors[0]
    plain = index.search_index(folder, query, 5)
    assert index.with_called(plain, folder, query, 5, None, ["hepatocyte"]) == plain
    assert "Annotate the cells before `scmmgpt index`" in caplog.text

    path = write_embedded(tmp_path / "liver.h5ad", vectors)
    adata = anndata.read_h5ad(path)
    adata.obs["scmmgpt_cell_type"] = ["hepatocyte" if i in (7, 8) else "B cell" for i in range(300)]
    adata.write_h5ad(path)
    index.add_files(tmp_path / "other", [path])
    plain = index.search_index(tmp_path / "other", query, 5)
    found = index.with_called(plain, tmp_path / "other", query, 5, None, ["hepatocyte"])
    assert sorted(hit.row for hit in found[:2]) == [7, 8]
    assert [hit.rank for hit in found] == [1, 2, 3, 4, 5]
    assert found[2].row == 0
    exact = {row: round(float(vectors[row] @ query) + 1, 4) for row in (7, 8)}
    assert {hit.row: round(hit.score, 4) for hit in found[:2]} == exact
    where = index.with_called(plain, tmp_path / "other", query, 5, "number == 8", ["hepatocyte"])
    assert where[0].row == 8
    assert index.with_called(plain, tmp_path / "other", query, 5, None, ["enterocyte"]) == plain


def test_a_condition_on_obs_keeps_the_best_cells_that_fulfil_it(folder, vectors):
    hits = index.search_index(folder, vectors[0], 3, "tissue == 'lung' and number < 5")
    exact = 200 + np.argsort(-(vectors[200:205] @ vectors[0]))[:3]
    assert [hit.cell for hit in hits] == [f"lung-{i - 200}" for i in exact]
    with pytest.raises(ValueError, match="No cell of"):
        index.search_index(folder, vectors[0], 3, "tissue == 'liver'")
    with pytest.raises(ValueError, match="'organ == 1' is not a condition on columns of obs"):
        index.search_index(folder, vectors[0], 3, "organ == 1")


def test_cells_are_added_once_and_change_no_segment(folder, vectors, tmp_path):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    write_embedded(tmp_path / "new.h5ad", vectors[:5])
    done = index.add_files(folder, [tmp_path / "blood.h5ad", tmp_path / "new.h5ad"])
    assert done == {"added": 5, "cells": 305, "left_out": 1}
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_segment_that_cannot_be_written_leaves_the_index_as_it_was(folder, vectors, tmp_path, monkeypatch):
    import faiss

    write_embedded(tmp_path / "new.h5ad", vectors[:5])
    before = sorted(folder.rglob("*"))
    monkeypatch.setattr(faiss, "write_index", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        index.add_files(folder, [tmp_path / "new.h5ad"])
    assert sorted(folder.rglob("*")) == before


@pytest.mark.slow
def test_segments_that_workers_build_find_the_cells_of_one_process(vectors, tmp_path, monkeypatch):
    monkeypatch.setattr(index, "CELLS_PER_SEGMENT", 25)
    write_embedded(tmp_path / "cells.h5ad", vectors)
    found = []
    for workers in (1, 2):
        assert index.add_files(tmp_path / str(workers), [tmp_path / "cells.h5ad"], workers)["cells"] == len(vectors)
        assert len(index.read_segments(tmp_path / str(workers))) == -(-len(vectors) // 25)
        found.append(index.search_index(tmp_path / str(workers), vectors[3], 5))
    assert found[0] == found[1]


def test_cells_without_an_embedding_are_left_out(vectors, tmp_path):
    vectors[3] = np.nan
    write_embedded(tmp_path / "cells.h5ad", vectors)
    done = index.add_files(tmp_path / "index", [tmp_path / "cells.h5ad"])
    assert done["cells"] == 299
    assert index.search_index(tmp_path / "index", vectors[4], 1)[0].row == 4


def test_many_cells_in_lists_are_found_and_not_loaded(tmp_path, monkeypatch):
    import faiss

    monkeypatch.setattr(index, "EXACT_BELOW", 1000)
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(30, 16))
    vectors = unit(centres[rng.integers(30, size=4000)] + 0.4 * rng.normal(size=(4000, 16)))
    write_embedded(tmp_path / "cells.h5ad", vectors)
    index.add_files(tmp_path / "index", [tmp_path / "cells.h5ad"])
    path = str(tmp_path / "index" / "segment-00000" / "vectors.faiss")
    opened = faiss.read_index(path, faiss.IO_FLAG_MMAP)
    assert opened.nlist == 252
    assert type(faiss.downcast_InvertedLists(opened.invlists)).__name__ == "OnDiskInvertedLists"
    queries = unit(centres[rng.integers(30, size=20)] + 0.4 * rng.normal(size=(20, 16)))
    found = [{hit.row for hit in index.search_index(tmp_path / "index", query, 10)} for query in queries]
    exact = [set(np.argsort(-(vectors @ query))[:10].tolist()) for query in queries]
    assert np.mean([len(a & b) for a, b in zip(found, exact, strict=True)]) / 10 >= 0.95
    rare = index.search_index(tmp_path / "index", queries[0], 5, "number < 8")
    assert {hit.row for hit in rare} == set(np.argsort(-(vectors[:8] @ queries[0]))[:5].tolist())


@pytest.mark.parametrize(("change", "word"), [({"checkpoint": "other"}, "checkpoint"), ({"of": "cell"}, "'cell'")])
def test_embeddings_that_do_not_fit_are_refused(folder, vectors, tmp_path, change, word):
    write_embedded(tmp_path / "other.h5ad", vectors, **change)
    with pytest.raises(ValueError, match=word):
        index.add_files(folder, [tmp_path / "other.h5ad"])


def test_embed_index_and_search_go_together(checkpoint, tmp_path, capsys):
    synthetic.synthetic_adata(60).write_h5ad(tmp_path / "cells.h5ad")
    embedded, folder = str(tmp_path / "embedded.h5ad"), str(tmp_path / "index")
    assert main(["embed", str(tmp_path / "cells.h5ad"), "--model", checkpoint, "-o", embedded, "--quiet"]) == 0
    assert main(["index", embedded, "-o", folder]) == 0
    capsys.readouterr()
    words = ["search", "--index", folder, "--model", checkpoint, "--text", "a B cell", "--top-k", "4", "--json"]
    assert main([*words, "--where", "donor_id == 'donor-2'"]) == 0
    hits = json.loads(capsys.readouterr().out)
    assert len(hits) == 4
    assert all(hit["row"] >= 30 for hit in hits)
    scores = [hit["score"] for hit in hits]
    assert scores == sorted(scores, reverse=True)


def test_what_is_no_index_and_what_is_not_embedded_is_named(checkpoint, tmp_path, capsys):
    synthetic.synthetic_adata(8).write_h5ad(tmp_path / "cells.h5ad")
    assert main(["index", str(tmp_path / "cells.h5ad"), "-o", str(tmp_path / "index")]) == 2
    assert "has no embeddings of `scmmgpt embed`" in capsys.readouterr().err
    assert not (tmp_path / "index").exists()
    words = ["search", "--model", checkpoint, "--text", "a B cell"]
    assert main([*words, "--index", str(tmp_path)]) == 2
    assert "is not an index" in capsys.readouterr().err
    assert main(words) == 2
    assert "either FILE or --index" in capsys.readouterr().err
