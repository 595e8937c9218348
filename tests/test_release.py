"""The checkpoint at the root of the repository: the command that builds it, and what lies there."""

import json
import shutil
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file

from scmmgpt import __main__ as command_line
from scmmgpt import novelty_scmmgpt, profiles_scmmgpt, readout_scmmgpt
from scmmgpt.annotation_scmmgpt import fit_label_sets
from scmmgpt.commands import checkpoints
from scmmgpt.pipeline_scmmgpt import ScMMGPTPipeline
from scmmgpt.synthetic import MARKERS, synthetic_adata
from scmmgpt.tests.corpora import SIZES
from scmmgpt.tests.test_remote_code import run_without_package


pytest.importorskip("cellxgene_ontology_guide")

from scmmgpt.train import release
from scmmgpt.train.data import ontology


ROOT = Path(__file__).parents[1]
TYPES = {name: term for name, (term, _) in MARKERS.items()}
STEPS = {"max_steps": 2, "per_device_train_batch_size": 8, "report_to": "none", "save_strategy": "no", "use_cpu": True}
PROGRAM = """
import sys
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor

names = [type(auto.from_pretrained(sys.argv[1], trust_remote_code=True)).__name__
         for auto in (AutoModel, AutoModelForCausalLM, AutoProcessor)]
print(str(names).replace("'", '"'))
"""


@pytest.fixture(scope="module")
def built(bert, tmp_path_factory):
    """A checkpoint of two small datasets, of which one has words of its own for the types."""
    path = tmp_path_factory.mktemp("release")
    (path / "data").mkdir()
    for seed, name in enumerate(("one", "two")):
        adata = synthetic_adata(120, seed=seed)
        adata.obs["donor_id"] = [f"{name} {donor}" for donor in adata.obs["donor_id"]]
        if name == "two":
            adata.obs["label"] = adata.obs["cell_type"].astype(str).str.replace("T cell", "T & NK")
            adata.obs = adata.obs.drop(columns=["cell_type", "cell_type_ontology_term_id"])
        adata.write_h5ad(path / "data" / f"{name}.h5ad")
    genes = sorted({gene for _, markers in MARKERS.values() for gene in markers} | {"ACTB", "RPL10", "FTL"})
    liver, b_cell = [[50.0 if gene in own else 1.0 for gene in genes] for own in ({"FTL"}, MARKERS["B cell"][1])]
    profiles = pd.DataFrame({"Hepatocyte_AdultLiver1": liver, "B cell_CordBlood1": b_cell}, index=genes)
    (path / "data" / "tables").mkdir()
    profiles.to_csv(path / "data" / "tables" / "hcl_pseudobulk_ref.csv.gz")
    labels = {name.replace("T cell", "T & NK"): term for name, term in TYPES.items()} | {"T & NK": "CL:0000542"}
    sets = {"one": {"paper": "Nobody 2026"}, "two": {"label_key": "label", "labels": labels}}
    table = {"types": list(TYPES.values()), "broad": ["CL:0000542"], "sets": sets}
    (path / "table.json").write_text(json.dumps(table))
    align = {"bert": bert, "cell_config": SIZES, "qformer_config": {"num_hidden_layers": 1}}
    align |= {"model_config": {"num_query_tokens": 2, "projection_dim": 8}, "qformer_max_length": 16, **STEPS}
    align["qformer_config"]["cross_attention_frequency"] = 1
    tune = {"language_model": "scratch", "language_model_config": {**SIZES, "num_key_value_heads": 1}, **STEPS}
    tune |= {"templates": "short", "train_parts": {"language_model": "full"}}
    tune["model_config"] = {"expression_head": "nb", "num_state_components": 2, "num_condition_tokens": 2}
    for name, config in (("align", align), ("tune", tune)):
        (path / f"{name}.yaml").write_text(yaml.safe_dump(config))
    words = ["--data", path / "data", "--output", path / "out", "--labels", path / "table.json"]
    words += ["--align-config", path / "align.yaml", "--tune-config", path / "tune.yaml"]
    return release.main(release.make_parser().parse_args([str(word) for word in words]))


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes(built, tmp_path):
    inputs = built.parents[1]
    words = ["--data", inputs / "data", "--output", tmp_path, "--labels", inputs / "table.json"]
    words += ["--align-config", inputs / "align.yaml", "--tune-config", inputs / "tune.yaml"]
    again = release.main(release.make_parser().parse_args([str(word) for word in words]))
    files = {path.relative_to(built) for path in built.rglob("*") if path.is_file()}
    assert {path.relative_to(again) for path in again.rglob("*") if path.is_file()} == files
    assert [str(name) for name in files if (again / name).read_bytes() != (built / name).read_bytes()] == []


def test_the_checkpoint_has_files_of_a_model_and_no_others(built):
    names = {path.name for path in built.iterdir()}
    assert {"config.json", "model.safetensors", "generation_config.json", "gene_tokenizer", "checkpoint.md"} <= names
    assert [name for name in names if name.endswith((".py", ".bin", ".png")) or name == "README.md"] == []
    kinds = {name: value.dtype for name, value in load_file(built / "model.safetensors").items()}
    kept = ("log_sizes", "weights", "groups", "texts", "text_features", "noise", "scale")  # of cells, small
    assert {k for n, k in kinds.items() if "label_readout" not in n and not n.endswith(kept)} == {torch.bfloat16}
    assert "Nobody 2026" in (built / "checkpoint.md").read_text()


def test_it_annotates_describes_finds_and_generates(built):
    pipeline = ScMMGPTPipeline.from_pretrained(str(built), device="cpu")
    cells = synthetic_adata(40, seed=5)
    annotated = pipeline.annotate(cells.copy())
    assert np.mean(annotated.obs["scmmgpt_cell_type"].astype(str) == cells.obs["cell_type"].astype(str)) > 0.9
    assert set(annotated.uns["scmmgpt"]["annotate"]["labels"]) == set(TYPES)
    assert pipeline.describe(cells.copy(), max_new_tokens=2).obs["scmmgpt_description"].notna().all()
    assert len(pipeline.search(cells, "a B cell", 3)) == 3
    assert pipeline.generate(["a B cell"], 2).shape == (2, 40)
    assert pipeline.annotate(cells, ["B cell", "mast cell"]).obs["scmmgpt_score"].between(0, 1).all()
    assert set(pipeline.annotate(cells, tissue="blood").uns["scmmgpt"]["annotate"]["labels"]) == set(TYPES)


def test_what_it_promises_comes_from_datasets_that_were_left_out(built):
    pipeline = ScMMGPTPipeline.from_pretrained(str(built), device="cpu")
    stored = pipeline.model.config.annotation
    assert stored["label_sets"]["n_cells"] >= 100
    assert 0 <= stored["min_score"] < 1
    assert stored["novelty"]["lead_unit"] > 0
    assert stored["novelty"]["batch_unit"] > 0
    assert pipeline.model.config.label_readout["mixes_panels"]
    assert pipeline.model.config.label_readout["num_others"] == 1  # the liver cells of the reference
    assert "Human Cell Landscape" in (built / "checkpoint.md").read_text()
    assert stored["temperature"] == 1  # the readout's own has been fitted
    sets = pipeline.annotate(synthetic_adata(40, seed=5), error_rate=0.1).obs["scmmgpt_label_set"]
    assert sets.str.split(" | ", regex=False).map(len).ge(1).all()


def test_the_gate_not_the_reference_profiles_judges_cells_of_labels_that_were_never_trained(built, monkeypatch):
    pipeline = ScMMGPTPipeline.from_pretrained(str(built), device="cpu")
    cells, panels = synthetic_adata(40, seed=5), []
    real = novelty_scmmgpt.Novelty.of

    def spy(stored, measured, n_genes, panel, terms):
        panels.append(panel)
        return real(stored, measured, n_genes, panel, terms)

    monkeypatch.setattr(novelty_scmmgpt.Novelty, "of", spy)
    pipeline.annotate(cells.copy())
    pipeline.annotate(cells.copy(), ["B cell", "astrocyte"])
    assert [panel is None for panel in panels] == [False, True]


@pytest.mark.parametrize("most", [64, 2048])
def test_cells_of_the_file_judge_novelty_and_refine_labels_in_partitions_too_unless_they_are_told_not_to(
    built, tmp_path, monkeypatch, most
):
    monkeypatch.setattr("scmmgpt.labelling_scmmgpt.NEIGHBOUR_CELLS", most)
    monkeypatch.setattr("scmmgpt.labelling_scmmgpt.CELLS_AT_ONCE", 16)
    synthetic_adata(150, seed=5).write_h5ad(tmp_path / "cells.h5ad")
    results = {}
    for name, words in {
        "whole": [],
        "parts": ["--workers", 1, "--cells-per-partition", 21],
        "alone": ["--no-read-batch"],
    }.items():
        words = ["annotate", tmp_path / "cells.h5ad", "-o", tmp_path / f"{name}.h5ad", "--model", built, *words]
        assert command_line.main([str(word) for word in words]) == 0
        results[name] = anndata.read_h5ad(tmp_path / f"{name}.h5ad")
    novelty = {name: adata.obs["scmmgpt_novelty"] for name, adata in results.items()}
    pd.testing.assert_series_equal(novelty["parts"], novelty["whole"], check_exact=True)
    assert not np.array_equal(novelty["alone"], novelty["whole"])
    done = {name: adata.uns["scmmgpt"]["annotate"] for name, adata in results.items()}
    used = {name: number["neighbour_cells"] for name, number in done.items()}
    assert used == {"whole": min(most, 150), "parts": min(most, 150), "alone": 0}
    labels = {name: adata.obsm["scmmgpt_probabilities"] for name, adata in results.items()}
    np.testing.assert_array_equal(labels["parts"], labels["whole"])
    assert np.abs(labels["alone"] - labels["whole"]).max() > 1e-4
    assert 0 < done["parts"]["refining_cells"] == done["whole"]["refining_cells"] <= min(most, 150)
    np.testing.assert_array_equal(done["parts"]["label_prior"], done["whole"]["label_prior"])
    assert "label_prior" not in done["alone"]
    pipeline = ScMMGPTPipeline.from_pretrained(str(built), device="cpu")
    for n_cells, is_alone in ((40, False), (19, True)):  # too few to judge novelty by, and too few to refine labels
        few = pipeline.annotate(results["alone"][:n_cells].copy())
        np.testing.assert_array_equal(few.obs["scmmgpt_novelty"], novelty["alone"][:n_cells])
        assert np.array_equal(few.obsm["scmmgpt_probabilities"], labels["alone"][:n_cells]) == is_alone
    audited, real = [], pipeline.add_audit
    monkeypatch.setattr(pipeline, "add_audit", lambda *args: audited.append(dict(args[4])) or real(*args))
    pipeline.audit(results["whole"].copy(), "scmmgpt_cell_type")
    for name, values in audited[0].items():
        if name in ("cell_type", "entropy", "novelty"):  # one verdict for a cell
            assert values.tolist() == results["whole"].obs[f"scmmgpt_{name}"].tolist()
    asked = pipeline.annotate(results["alone"].copy(), ["B cell", "Hepatocytes"])  # a type that has no group
    assert asked.uns["scmmgpt"]["annotate"]["refining_cells"] == 0
    pipeline.model.config.annotation.pop("refines")  # older checkpoints
    old = pipeline.annotate(results["alone"].copy())
    np.testing.assert_array_equal(old.obsm["scmmgpt_probabilities"], labels["alone"])


def test_a_kind_of_a_trained_label_stands_for_it(built, caplog):
    pipeline = ScMMGPTPipeline.from_pretrained(str(built), device="cpu")
    cells = synthetic_adata(40, seed=5)
    asked = [pipeline.annotate(cells.copy(), ["B cell", name]).obs for name in ("monocyte", "Classical monocytes")]
    assert "'Classical monocytes': scored as the broader label 'monocyte'" in caplog.text
    is_monocyte = asked[0]["scmmgpt_cell_type"] == "monocyte"
    assert 0 < is_monocyte.sum() < len(cells)
    assert ((asked[1]["scmmgpt_cell_type"] == "Classical monocytes") == is_monocyte).all()
    assert set(asked[1]["scmmgpt_cl_id"][is_monocyte]) == {"CL:0000860"}
    caplog.clear()
    pipeline.annotate(cells.copy(), ["B cell", "classical monocyte", "non-classical monocyte"])  # texts tell two kinds
    assert "scored as" not in caplog.text


def test_terms_below_labels_are_of_the_nearest_one_and_of_no_broad_label():
    below = ontology.terms_below(
        {"macrophage": "CL:0000235", "epithelial cell": "CL:0000066", "leukocyte": "CL:0000738"}
    )
    labels = {term["name"]: term["labels"] for term in below}
    assert labels["Kupffer cell"] == ["macrophage"]
    assert "hepatocyte" not in labels  # one of some hundred kinds of epithelial cells
    assert "macrophage" not in labels
    names = [term["name"] for term in ontology.terms_below({"macrophage": "CL:0000235"}, ["CL:0000091"])]
    assert "microglial cell" in names
    assert "Kupffer cell" not in names


def test_a_type_without_cells_is_a_candidate_and_a_name_by_its_profile(built, monkeypatch):
    monkeypatch.setattr(profiles_scmmgpt, "NAMING_LEAD", -10)  # some 20 genes, which all cells express, are few
    pipeline = ScMMGPTPipeline.from_pretrained(str(built), device="cpu")
    assert [known["name"] for known in pipeline.model.config.annotation["profiles"]] == ["hepatocyte"]
    liver = synthetic_adata(6, seed=5)
    ferritin = liver.var_names.get_loc("FTL")
    liver.X = liver.X.toarray() * 0 + 1
    liver.X[:, ferritin] = 50
    found = pipeline.annotate(liver.copy())
    assert (found.obs["scmmgpt_cell_type"] == "hepatocyte").all()
    assert (found.obs["scmmgpt_cl_id"] == "CL:0000182").all()
    assert found.obs["scmmgpt_by_profile"].all()
    described = pipeline.describe(liver.copy(), max_new_tokens=2)
    assert described.obs["scmmgpt_description"].str.contains("hepatocyte").all()
    asked = pipeline.annotate(liver.copy(), ["B cell", "Hepatocytes"])
    assert (asked.obsm["scmmgpt_probabilities"][:, 1] > 0).all()
    assert "scmmgpt_by_profile" not in pipeline.annotate(liver.copy(), min_score=0).obs
    sets = pipeline.annotate(liver.copy(), error_rate=0.1).obs["scmmgpt_label_set"]
    assert sets.str.startswith("hepatocyte | ").all()
    score = found.obs["scmmgpt_score"].max()
    assert pipeline.annotate(liver.copy(), min_score=score).obs["scmmgpt_by_profile"].any()
    assert not pipeline.annotate(liver.copy(), min_score=min(score + 0.01, 1)).obs["scmmgpt_by_profile"].any()


@pytest.fixture
def all_novel(built, monkeypatch):
    """A pipeline to which most cells are novel, and every broader term is near enough to name them."""
    pipeline = ScMMGPTPipeline.from_pretrained(str(built), device="cpu")
    stored = pipeline.model.config.annotation
    stored["novelty"]["lead_unit"] = 1e-6
    stored["terms"] = [
        {"id": "", "name": "antigen-presenting cell", "names": [], "labels": ["B cell", "monocyte"]},
        {"id": "CL:0000542", "name": "lymphocyte", "names": [], "labels": ["B cell", "T cell"]},
    ]
    three = ["B cell", "T cell", "natural killer cell"]
    stored["tissues"] = [{"id": "", "name": "lymph node", "names": ["lymph node"], "labels": three}]
    monkeypatch.setattr(novelty_scmmgpt, "BROADER_NOVELTY", 1e9)
    return pipeline


def test_a_novel_cell_gets_no_term_that_has_one_candidate_below_it(all_novel):
    cells = synthetic_adata(40, seed=5)
    is_b = (cells.obs["cell_type"] == "B cell").to_numpy()
    answers = all_novel.annotate(cells.copy()).obs["scmmgpt_cell_type"]
    assert set(answers[is_b]) & {"antigen-presenting cell", "lymphocyte"} == {"antigen-presenting cell"}
    answers = all_novel.annotate(cells.copy(), tissue="lymph node").obs["scmmgpt_cell_type"]
    assert set(answers[is_b]) & {"antigen-presenting cell", "lymphocyte"} == {"lymphocyte"}


def test_labels_and_novelty_of_a_batch_take_one_pass_over_its_counts(all_novel, monkeypatch):
    sizes, real = [], readout_scmmgpt.panel_profiles
    monkeypatch.setattr(
        readout_scmmgpt, "panel_profiles", lambda cells, *of: sizes.append(len(cells)) or real(cells, *of)
    )
    found = all_novel.annotate(synthetic_adata(40, seed=5), batch_size=40, read_batch=False)
    assert (found.obs["scmmgpt_novelty"] > 1).any()
    assert sizes == [40]


def test_the_unit_of_an_earlier_measure_of_novelty_is_not_taken_for_todays(built, monkeypatch):
    pipeline, cells, said = ScMMGPTPipeline.from_pretrained(str(built), device="cpu"), synthetic_adata(40, seed=5), []
    monkeypatch.setattr(novelty_scmmgpt.logger, "warning", said.append)
    pipeline.annotate(cells.copy())
    assert said == []
    stored = pipeline.model.config.annotation["novelty"]
    stored |= {"others_unit": stored.pop("lead_unit"), "unit": 0.1}
    found = pipeline.annotate(cells.copy()).obs
    (line,) = said
    assert "`others_unit`, the unit of an earlier measure" in line
    del stored["others_unit"]  # as in a checkpoint that knows absent genes alone
    pd.testing.assert_frame_equal(pipeline.annotate(cells.copy()).obs, found)
    assert len(said) == 1


def test_a_calibrated_checkpoint_still_knows_cells_of_no_label(built):
    pipeline = ScMMGPTPipeline.from_pretrained(str(built), device="cpu")
    before = pipeline.model.config.annotation["novelty"]["lead_unit"]
    pipeline.calibrate(synthetic_adata(200, seed=5), "cell_type", labels=list(TYPES))
    assert pipeline.model.config.annotation["novelty"]["lead_unit"] == before


@pytest.mark.parametrize("n_genes", [None, 12])
def test_evidence_compares_cells_with_mean_cells_in_the_same_units(built, n_genes):
    pipeline = ScMMGPTPipeline.from_pretrained(str(built), device="cpu")
    cells = synthetic_adata(120, seed=0)[:, :n_genes].copy()  # those of training: their mean is that of the label
    pipeline.annotate(cells, force=True, min_score=0)
    evidence = pipeline.explain(cells, "cell_type", force=True)
    panel = evidence.explainer.panel
    assert panel.log
    read, _ = pipeline.processor.read_cells(cells, force=True)
    starts, positions, values = panel.profiles(read)
    profiles = np.zeros((len(read), len(panel.gene_ids)))
    profiles[np.repeat(np.arange(len(read)), np.diff(starts)), positions] = values
    for number, name in enumerate(evidence.sets):
        mean = profiles[(cells.obs["cell_type"] == name).to_numpy()].mean(axis=0)
        known = evidence.explainer.centroids[:, number]
        assert abs(mean - known).mean() < 1  # log1p(CP10k); square roots of shares are some 30 larger


def test_sets_of_a_calibration_are_of_the_probabilities_that_annotate_gives(built, caplog):
    pipeline = ScMMGPTPipeline.from_pretrained(str(built), device="cpu")
    stored = pipeline.model.config.annotation
    assert stored["refines"]
    stored["doubt"] = 0.2
    n_before = stored["label_sets"]["n_cells"]
    cells = synthetic_adata(60, seed=5, mean_total=20)
    done = pipeline.calibrate(cells, "cell_type")
    assert done["doubt"] == 0.2  # of datasets left out, which 60 cells do not tell
    assert f"now rest on 60 cells; they rested on {n_before} cells" in caplog.text
    assert "60 cells support error rates of 0.02 and more" in caplog.text
    annotated = pipeline.annotate(cells.copy(), error_rate=0.05)
    names = list(annotated.uns["scmmgpt"]["annotate"]["labels"])
    truth = np.array([names.index(name) for name in cells.obs["cell_type"]])
    found = fit_label_sets(annotated.obsm["scmmgpt_probabilities"], truth)
    np.testing.assert_allclose(found["thresholds"], done["label_sets"]["thresholds"], rtol=1e-4)
    caplog.clear()
    pipeline.annotate(cells.copy(), error_rate=0.02)
    assert "set holds all labels" not in caplog.text
    pipeline.annotate(cells, error_rate=0.01)
    assert "of 0.02 and more: at a lower rate, every label set holds all labels" in caplog.text
    assert set(cells.obs["scmmgpt_label_set"].str.count(r"\|")) == {len(names) - 1}


def test_a_calibration_is_of_labels_that_tissues_weigh_as_annotate_has_them(built, caplog):
    pipeline = ScMMGPTPipeline.from_pretrained(str(built), device="cpu")
    stored = pipeline.model.config.annotation
    names = list(stored["labels"])
    tissues = [{"id": "", "name": own[0], "names": own[:1], "labels": own} for own in (names[:2], names[2:])]
    stored.update(tissues=tissues, doubt=0.1)
    cells = synthetic_adata(200, seed=5, mean_total=10)
    cells = cells[cells.obs["cell_type"].astype(str).isin(names[:2]).to_numpy()].copy()
    assert len(cells) >= 60
    done = pipeline.calibrate(cells, "cell_type")
    probabilities = pipeline.annotate(cells.copy()).obsm["scmmgpt_probabilities"]
    truth = np.array([names.index(name) for name in cells.obs["cell_type"]])
    assert done["nll"] == pytest.approx(-np.log(probabilities[np.arange(len(truth)), truth]).mean(), rel=1e-4)
    assert done["accuracy"] == (probabilities.argmax(axis=1) == truth).mean()
    del pipeline.model.config.annotation["tissues"]
    unweighed = pipeline.annotate(cells.copy()).obsm["scmmgpt_probabilities"]
    assert abs(unweighed - probabilities).max() > 0.01
    pipeline.model.config.annotation["tissues"] = tissues
    assert "matching weight" not in caplog.text
    pipeline.annotate(cells, matching_weight=0.5)
    assert "With a matching weight of 0.5 labels are not weighed by the tissues of the cells" in caplog.text


def test_calibrating_on_some_labels_keeps_the_others_and_asks_no_network(built, tmp_path, monkeypatch, caplog):
    copy = tmp_path / "checkpoint"
    shutil.copytree(built, copy)
    before = json.loads((copy / "config.json").read_text())["annotation"]
    cells = synthetic_adata(200, seed=5)
    words = {"B cell": "B lymphocytes", "monocyte": "monocytes", "T cell": "CL:0000084"}
    cells.obs["given"] = cells.obs["cell_type"].astype(str).map(lambda name: words.get(name, "my cluster 7"))
    cells.write_h5ad(tmp_path / "cells.h5ad")
    monkeypatch.setattr("scmmgpt.scoring_scmmgpt.encode_texts", None)
    words = ["calibrate", tmp_path / "cells.h5ad", "--model", copy, "--label-key", "given", "--quiet"]
    assert command_line.main([str(word) for word in words]) == 0
    after = json.loads((copy / "config.json").read_text())["annotation"]
    for name in ("labels", "terms", "profiles"):
        assert after[name] == before[name]
    assert after["matching_weight"] == 0
    assert after["doubt"] == before["doubt"]
    assert "1 of 4 labels of obs['given'] do not match exactly one label of the checkpoint ('my" in caplog.text
    words = ["annotate", tmp_path / "cells.h5ad", "--model", copy, "-o", tmp_path / "out.h5ad", "--quiet"]
    assert command_line.main([str(word) for word in words]) == 0
    words = ["calibrate", tmp_path / "cells.h5ad", "--model", copy, "--label-key", "donor_id", "--quiet"]
    assert command_line.main([str(word) for word in words]) == 2


def test_a_checkpoint_with_some_of_its_labels_still_answers(built):
    pipeline = ScMMGPTPipeline.from_pretrained(str(built), device="cpu")
    cells = synthetic_adata(200, seed=5)
    cells = cells[cells.obs["cell_type"].isin(["B cell", "monocyte"])].copy()
    pipeline.calibrate(cells, "cell_type", labels=["B cell", "monocyte"])
    annotated = pipeline.annotate(cells)
    assert (annotated.obs["scmmgpt_cell_type"].astype(str) == cells.obs["cell_type"].astype(str)).mean() > 0.8
    with pytest.raises(ValueError, match="not trained on 1 of 2 labels, such as 'ghost'"):
        pipeline.calibrate(cells, "cell_type", labels=["B cell", "ghost"])


def test_a_cell_counts_for_its_type_or_for_the_types_below_a_broad_term():
    types = ["CL:0000624", "CL:0000625", "CL:0000236", "CL:0000576"]
    found = release.place_terms(["CL:0000084", "CL:0000900", "CL:0000624", "CL:0001064"], types, ["CL:0000084"])
    assert found == {
        "CL:0000084": ("CL:0000624", "CL:0000625"),
        "CL:0000900": ("CL:0000625",),  # naive CD8 T cell
        "CL:0000624": ("CL:0000624",),
    }
    assert ontology.term_name("CL:0001064") == "malignant cell"  # is none of them


def test_the_command_line_takes_the_checkpoint_of_the_package_and_says_so(built, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoints, "root_checkpoint", lambda: str(built))
    synthetic_adata(12).write_h5ad(tmp_path / "cells.h5ad")
    words = ["annotate", str(tmp_path / "cells.h5ad"), "--output", str(tmp_path / "out.h5ad"), "--device", "cpu"]
    assert command_line.main(words) == 0
    assert f"Model: {release.NAME} {release.VERSION}, sha256" in capsys.readouterr().err
    stored = anndata.read_h5ad(tmp_path / "out.h5ad").uns["scmmgpt"]["model"]
    assert dict(stored) == checkpoints.identify(str(built))


def test_a_package_without_a_checkpoint_says_how_to_get_one(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "__file__", str(tmp_path / "commands" / "checkpoints.py"))
    with pytest.raises(FileNotFoundError, match="make release"):
        checkpoints.root_checkpoint()


def test_the_root_loads_by_auto_classes_without_the_package(tmp_path):
    if not (ROOT / "model.safetensors").is_file():
        pytest.skip("no weights lie at the root of the repository; `make release` builds them")
    names = run_without_package(PROGRAM, tmp_path, ROOT)
    assert names == ["ScMMGPTForConditionalGeneration"] * 2 + ["ScMMGPTProcessor"]
    n_bytes = sum(path.stat().st_size for path in ROOT.glob("*.safetensors"))
    assert n_bytes < release.MAX_BYTES
