"""Receipts name what a result came from, and `verify` computes it again and names what changed."""

import json
from types import SimpleNamespace

import anndata
import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scmmgpt import cells_scmmgpt
from scmmgpt.__main__ import main
from scmmgpt.cells_scmmgpt import Cells, CellsHash
from scmmgpt.commands.report import warnings_of
from scmmgpt.pipeline_scmmgpt import ScMMGPTPipeline
from scmmgpt.receipt_scmmgpt import hash_tensors, superseded
from scmmgpt.records_scmmgpt import recorded


LABELS = {"B": "a B cell", "T": "a T cell"}


@pytest.fixture
def annotated(checkpoint, adata, tmp_path):
    """The path of annotated cells."""
    adata.write_h5ad(tmp_path / "cells.h5ad")
    path = str(tmp_path / "annotated.h5ad")
    assert main(["annotate", str(tmp_path / "cells.h5ad"), "--model", checkpoint, "-o", path, "--quiet"]) == 0
    return path


def verify(capsys, *arguments):
    capsys.readouterr()
    status = main(["verify", *arguments, "--json"])
    return status, json.loads(capsys.readouterr().out)


def hash_of(cells, size=100):
    total = CellsHash()
    for start in range(0, len(cells), size):
        total.update(cells[start : start + size])
    return total.hexdigest()


@settings(deadline=None)  # the first call may load the compiled loop
@given(st.integers(1, 12), st.randoms(use_true_random=False))
def test_the_hash_of_cells_is_that_of_names_genes_and_counts_alone(size, random):
    rows = [random.sample(range(50), random.randint(0, 6)) for _ in range(10)]
    shuffled = [random.sample(row, len(row)) for row in rows]

    def cells(rows, kind):
        genes = np.array([gene for row in rows for gene in row], dtype=np.int64)
        return Cells(np.cumsum([0, *map(len, rows)]), genes, (genes + 1).astype(kind), np.arange(10, dtype=np.uint64))

    assert hash_of(cells(rows, np.int32)) == hash_of(cells(shuffled, np.float32), size)


@pytest.mark.parametrize("kind", [np.int32, np.uint16, np.float32])
def test_the_compiled_hash_of_cells_is_that_of_numpy(kind, monkeypatch):
    cells = Cells([0, 2, 2, 5], [7, 9, 1, 2, 60_000], np.array([1, 5, 2, 3, 900]).astype(kind), np.zeros(3, np.uint64))
    found = []
    for is_compiled in (False, True):
        monkeypatch.setattr(cells_scmmgpt, "kernels_pay", lambda n_cells, pays=is_compiled: pays)
        found.append(cells_scmmgpt.fingerprints(cells).tolist())
    assert found[0] == found[1]
    assert found[0][1] == 0


@pytest.mark.parametrize("change", ["gene", "count", "name", "swap", "fewer"])
def test_the_hash_of_cells_changes_with_one_gene_count_name_or_cell(change):
    cells = Cells([0, 2, 4], [5, 6, 7, 8], [1, 2, 3, 4], np.array([3, 4], dtype=np.uint64))
    before = hash_of(cells)
    if change == "gene":
        cells.gene_ids[0] = 9
    elif change == "count":
        cells.counts[3] = 5
    elif change == "name":
        cells.cell_ids[1] = 5
    elif change == "swap":
        cells.cell_ids = cells.cell_ids[::-1]
    else:
        cells = cells[:1]
    assert hash_of(cells) != before


def test_weights_in_bfloat16_have_one_hash_at_any_precision():
    stored = torch.linspace(0, 1, 9).to(torch.bfloat16)
    assert hash_tensors({"a": stored}) == hash_tensors({"a": stored.float()})
    assert hash_tensors({"a": stored}) != hash_tensors({"b": stored})
    assert hash_tensors({"a": stored}) != hash_tensors({"a": stored + 1})


def test_every_verb_leaves_a_receipt_with_its_options(adata, tiny_pipeline):
    tiny_pipeline.annotate(adata, LABELS, min_score=0.5)
    tiny_pipeline.describe(adata, max_new_tokens=2, num_beams=2)
    tiny_pipeline.embed(adata)
    tiny_pipeline.search(adata, "a B cell", key_added="b")
    generated = tiny_pipeline.generate("a B cell", genes=["CD19"], seed=5)
    receipts = {verb: adata.uns["scmmgpt"][verb]["receipt"] for verb in ("annotate", "describe", "embed", "search")}
    receipts["generate"] = generated.uns["scmmgpt"]["generate"]["receipt"]
    options = {verb: json.loads(receipt["options"]) for verb, receipt in receipts.items()}
    wanted = {"labels": LABELS, "min_score": 0.5, "key_added": "scmmgpt"}
    assert wanted.items() <= options["annotate"].items()
    wanted = {"max_new_tokens": 2, "num_beams": 2, "proof": False, "key_added": "scmmgpt"}
    assert options["describe"] == wanted
    assert options["generate"]["seed"] == 5
    assert len({receipt["weights"] for receipt in receipts.values()}) == 1
    assert len({receipts[verb]["cells"] for verb in ("annotate", "describe", "embed", "search")}) == 1
    assert [verb for verb, receipt in receipts.items() if "language_model" in receipt] == ["describe", "generate"]
    assert receipts["embed"]["versions"]["torch"] == torch.__version__


def test_a_receipt_notices_weights_that_changed_in_place(adata, tiny_pipeline):
    tiny_pipeline.embed(adata)
    before = adata.uns["scmmgpt"]["embed"]["receipt"]["weights"]
    with torch.no_grad():
        tiny_pipeline.model.model.cell_projection.weight[0, 0] += 1
    tiny_pipeline.embed(adata)
    assert adata.uns["scmmgpt"]["embed"]["receipt"]["weights"] != before


def test_results_that_can_be_computed_again_are_verified(annotated, capsys):
    status, report = verify(capsys, annotated)
    assert status == 0
    assert report["verified"]
    (result,) = report["results"]
    assert (result["verb"], result["cells"], result["changed_cells"]) == ("annotate", 60, [])
    assert result["changes"] == {}


def test_descriptions_embeddings_and_searches_are_verified_too(checkpoint, annotated, tmp_path, capsys):
    paths = [annotated, *(str(tmp_path / f"{name}.h5ad") for name in "abc")]
    base = ["--model", checkpoint, "--quiet", "-o"]
    assert main(["describe", paths[0], *base, paths[1], "--max-new-tokens", "3"]) == 0
    assert main(["embed", paths[1], *base, paths[2], "--of", "cell"]) == 0
    assert main(["search", paths[2], *base, paths[3], "--text", "a B cell"]) == 0
    status, report = verify(capsys, paths[3])
    assert status == 0
    assert {result["verb"] for result in report["results"]} == {"annotate", "describe", "embed", "search"}
    assert all(result["verified"] for result in report["results"])


def test_descriptions_that_came_before_the_labels_are_verified_as_such(checkpoint, adata, tmp_path, capsys):
    paths = [str(tmp_path / f"{name}.h5ad") for name in "abc"]
    adata.write_h5ad(paths[0])
    base = ["--model", checkpoint, "--quiet", "-o"]
    assert main(["describe", paths[0], *base, paths[1], "--max-new-tokens", "3"]) == 0
    assert main(["annotate", paths[1], *base, paths[2], "--labels", "B", "NK cell"]) == 0
    status, report = verify(capsys, paths[2])
    assert status == 0
    assert [result["verified"] for result in report["results"]] == [True, True]


def test_descriptions_of_labels_that_are_gone_are_named_as_superseded(checkpoint, annotated, tmp_path, capsys, caplog):
    base = ["--model", checkpoint, "-o"]
    described, again = str(tmp_path / "described.h5ad"), str(tmp_path / "again.h5ad")
    assert main(["describe", annotated, *base, described, "--max-new-tokens", "3", "--quiet"]) == 0
    capsys.readouterr()
    assert main(["annotate", described, *base, again, "--labels", "NK cell", "a mast cell"]) == 0
    assert "results of describe in this file are for other labels" in caplog.text
    status, report = verify(capsys, again)
    assert status == 1
    assert [(r["verb"], r.get("superseded", False), r["verified"]) for r in report["results"]] == [
        ("annotate", False, True),
        ("describe", True, False),
    ]
    assert main(["verify", again, "--quiet"]) == 1
    assert (
        "describe: superseded, of labels that the file no longer has. Run `describe` again." in capsys.readouterr().out
    )
    assert "The descriptions are of other labels" in " ".join(warnings_of(anndata.read_h5ad(again)))


def test_descriptions_of_some_of_the_cells_are_not_superseded(checkpoint, annotated, tmp_path):
    described = str(tmp_path / "described.h5ad")
    words = ["describe", annotated, "--model", checkpoint, "-o", described, "--max-new-tokens", "3", "--quiet"]
    assert main(words) == 0
    adata = anndata.read_h5ad(described)
    assert superseded(adata, "scmmgpt") == superseded(adata[:20].copy(), "scmmgpt") == []
    adata.obs["scmmgpt_cell_type"] = "a mast cell"
    assert superseded(adata, "scmmgpt") == ["describe"]


def test_generated_cells_are_verified(checkpoint, tmp_path, capsys):
    path = str(tmp_path / "generated.h5ad")
    words = ["generate", "a B cell", "--genes", "CD19", "LYZ", "--n-cells", "2"]
    assert main([*words, "--model", checkpoint, "-o", path, "--quiet"]) == 0
    assert verify(capsys, path)[0] == 0
    with h5py.File(path, "r+") as file:
        file["X/data"][0] += 1
    status, report = verify(capsys, path)
    assert status == 1
    assert report["results"][0]["changed_cells"] == ["prompt0-cell0"]


def test_an_edited_label_is_named(annotated, capsys):
    adata = anndata.read_h5ad(annotated)
    labels = adata.obs["scmmgpt_cell_type"].astype(str)
    right, wrong = labels.iloc[7], "T" if labels.iloc[7] == "B" else "B"
    labels.iloc[7] = wrong
    adata.obs["scmmgpt_cell_type"] = labels
    adata.write_h5ad(annotated)
    status, report = verify(capsys, annotated)
    (result,) = report["results"]
    assert status == 1
    assert (result["changed_cells"], result["was"], result["now"]) == (["cell-7"], [wrong], [right])
    assert main(["verify", annotated, "--quiet"]) == 1
    assert f"cell-7: {wrong} -> {right}" in capsys.readouterr().out


def test_an_edited_count_is_told_from_an_edited_label(annotated, capsys):
    with h5py.File(annotated, "r+") as file:
        file["X/data"][0] += 1
    status, report = verify(capsys, annotated)
    assert status == 1
    assert list(report["results"][0]["changes"]) == ["cells"]


def test_another_checkpoint_is_named_by_what_differs(annotated, checkpoint, tmp_path, capsys):
    pipeline = ScMMGPTPipeline.from_pretrained(checkpoint)
    pipeline.model.config.annotation["temperature"] = 0.5
    pipeline.save_pretrained(tmp_path / "other")
    status, report = verify(capsys, annotated, "--model", str(tmp_path / "other"))
    assert status == 1
    assert list(report["results"][0]["changes"]) == ["settings"]


def test_other_versions_alone_are_reported_and_fail_nothing(annotated, capsys):
    with h5py.File(annotated, "r+") as file:
        versions = file["uns/scmmgpt/annotate/receipt/versions"]
        del versions["torch"]
        versions["torch"] = "1.0"
        versions["torch"].attrs.update({"encoding-type": "string", "encoding-version": "0.2.0"})
    status, report = verify(capsys, annotated)
    assert status == 0
    assert report["results"][0]["changes"] == {"torch": ["1.0", torch.__version__]}


def test_results_are_verified_against_the_first_file_in_any_order(annotated, adata, tmp_path, capsys):
    adata[::-1].copy().write_h5ad(tmp_path / "reversed.h5ad")
    status, report = verify(capsys, annotated, "--input", str(tmp_path / "reversed.h5ad"))
    assert status == 0
    adata[3:].copy().write_h5ad(tmp_path / "fewer.h5ad")
    status, report = verify(capsys, annotated, "--input", str(tmp_path / "fewer.h5ad"))
    assert status == 1
    assert report["results"][0]["missing_cells"] == ["cell-0", "cell-1", "cell-2"]


def test_a_file_without_a_receipt_and_options_of_strangers_are_refused(annotated, tmp_path, capsys):
    cells = str(tmp_path / "cells.h5ad")
    assert main(["verify", cells]) == 2
    assert "has no receipt" in capsys.readouterr().err
    adata = anndata.read_h5ad(annotated)
    adata.uns["scmmgpt"]["annotate"]["receipt"]["options"] = '{"custom_generate": "someone/code"}'
    adata.write_h5ad(annotated)
    assert main(["verify", annotated, "--quiet"]) == 2
    assert "custom_generate" in capsys.readouterr().err


@pytest.mark.parametrize("entry", ["mine", {"describe": "mine"}, {}])
def test_what_others_keep_under_our_name_is_no_record_of_a_verb(entry):
    adata = SimpleNamespace(uns={"scmmgpt": entry})
    assert recorded(adata, "scmmgpt", "describe") == {}
    assert superseded(adata, "scmmgpt") == []
