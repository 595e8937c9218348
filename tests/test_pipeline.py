"""The verbs over AnnData, with a tiny random model: what they write, what they leave alone, what they refuse."""

import anndata
import numpy as np
import pandas as pd
import pytest
import torch

from scmmgpt import synthetic
from scmmgpt.annotation_scmmgpt import label_probabilities, normalized_entropy
from scmmgpt.configuration_scmmgpt import PIPELINE_TASKS
from scmmgpt.generation_scmmgpt import gene_turns
from scmmgpt.modeling_scmmgpt import ScMMGPTForCellTextAlignment
from scmmgpt.pipeline_scmmgpt import ScMMGPTPipeline
from scmmgpt.records_scmmgpt import MISSING, words_of
from scmmgpt.tests.test_remote_code import run_without_package
from scmmgpt.votes_scmmgpt import cluster_answers, majority_vote


LABELS = {"B": "a B cell", "T": "a T cell", "NK": "natural killer cell", "Mono": "monocyte of blood"}


@pytest.fixture
def counting_pipeline():
    """A pipeline whose model samples counts."""
    return synthetic.tiny_pipeline(expression_head="nb")


# -- decisions from scores --------------------------------------------------------------------------------------------


def test_probabilities_sum_to_one_whatever_the_mixture():
    rng = np.random.default_rng(0)
    similarity, match = rng.uniform(-1, 1, (20, 6)), rng.uniform(0, 1, (20, 6))
    match[:, 3:] = np.nan
    for weight in (0.0, 0.3, 1.0):
        mixed = label_probabilities(similarity, match, logit_scale=10, matching_weight=weight)
        np.testing.assert_allclose(mixed.sum(axis=1), 1, atol=1e-5)


def test_matching_moves_nothing_to_or_from_labels_that_it_did_not_look_at():
    similarity, match = np.array([[0.2, 0.1, 0.0]]), np.array([[0.0, 1.0, np.nan]])
    alone = label_probabilities(similarity, logit_scale=1)
    mixed = label_probabilities(similarity, match, logit_scale=1, matching_weight=1)
    np.testing.assert_allclose(mixed, [[0, alone[0, 0] + alone[0, 1], alone[0, 2]]], atol=1e-6)


def test_a_weight_of_zero_is_similarity_alone():
    similarity, match = np.array([[0.2, 0.1]]), np.array([[0.0, 1.0]])
    alone = label_probabilities(similarity, logit_scale=5)
    np.testing.assert_array_equal(label_probabilities(similarity, match, logit_scale=5, matching_weight=0), alone)


def test_a_cell_that_matches_nothing_keeps_its_similarities():
    similarity, match = np.array([[0.2, 0.1]]), np.zeros((1, 2))
    alone = label_probabilities(similarity, logit_scale=5)
    np.testing.assert_allclose(label_probabilities(similarity, match, logit_scale=5, matching_weight=1), alone)


def test_entropy_is_between_certain_and_no_idea():
    np.testing.assert_allclose(normalized_entropy(np.array([[1.0, 0, 0], [1 / 3] * 3])), [0, 1], atol=1e-6)
    assert normalized_entropy(np.ones((2, 1))).tolist() == [0, 0]


def test_a_tie_goes_to_the_label_that_sorts_first():
    assert majority_vote(np.array(["T", "B"]), np.array(["0", "0"])).tolist() == ["B", "B"]
    votes = np.array(["T", "T", "B"]), np.array(["0", "0", MISSING])
    assert majority_vote(*votes).tolist() == ["T", "T", "B"]
    assert [row["cluster"] for row in cluster_answers(*votes, ["T", "B"], {})] == ["0"]


def test_a_type_of_a_profile_that_is_a_broader_term_too_votes_as_the_term():
    term = {"id": "CL:0000164", "name": "enteroendocrine cell", "names": [], "labels": ["alpha", "beta"]}
    labels = np.array(["alpha", "beta", "enteroendocrine cell"])
    votes = labels, np.array(["0"] * 3), ["alpha", "beta", "B", "T"], {}, [term]
    (answer,) = cluster_answers(*votes, {"enteroendocrine cell": "CL:0000164", "hepatocyte": "CL:0000182"})
    assert (answer["label"], answer["share"]) == ("enteroendocrine cell", 1)


# -- annotate ---------------------------------------------------------------------------------------------------------


def test_annotate_adds_to_the_same_object_and_drops_nothing(tiny_pipeline, adata):
    adata.layers["mine"] = adata.X.copy()
    adata.obsm["X_pca"] = np.ones((adata.n_obs, 2))
    adata.uns["mine"] = {"a": 1}
    before = adata.copy()
    result = tiny_pipeline.annotate(adata, LABELS, cl_ids={"B": "CL:0000236"})
    assert result is adata
    assert (result.X != before.X).nnz == 0
    assert (result.layers["mine"] != before.layers["mine"]).nnz == 0
    assert result.uns["mine"] == {"a": 1}
    assert "X_pca" in result.obsm
    assert result.var.equals(before.var)
    assert result.obs[before.obs.columns].equals(before.obs)
    added = set(result.obs.columns) - set(before.obs.columns)
    assert added == {f"scmmgpt_{name}" for name in ("cell_type", "cl_id", "score", "margin", "entropy")}
    assert set(result.obs["scmmgpt_cell_type"]) <= set(LABELS)
    assert set(result.obs["scmmgpt_cl_id"][result.obs["scmmgpt_cell_type"] == "B"]) <= {"CL:0000236"}


def test_an_annotated_file_comes_back_as_it_was_written(tiny_pipeline, adata, tmp_path):
    tiny_pipeline.annotate(adata, {"CD4+/CD25 T Reg": "a T cell", "B": "a B cell"})
    adata.write_h5ad(tmp_path / "annotated.h5ad")
    again = anndata.read_h5ad(tmp_path / "annotated.h5ad")
    assert again.obs["scmmgpt_cell_type"].equals(adata.obs["scmmgpt_cell_type"])
    assert again.uns["scmmgpt"]["annotate"]["labels"].tolist() == ["CD4+/CD25 T Reg", "B"]
    assert again.uns["scmmgpt"]["input"]


def test_the_score_is_the_probability_of_the_answer(tiny_pipeline, adata):
    tiny_pipeline.annotate(adata, LABELS)
    probabilities = adata.obsm["scmmgpt_probabilities"]
    labels = adata.uns["scmmgpt"]["annotate"]["labels"]
    assert adata.obs["scmmgpt_cell_type"].tolist() == labels[probabilities.argmax(axis=1)].tolist()
    np.testing.assert_allclose(adata.obs["scmmgpt_score"], probabilities.max(axis=1))
    ranked = np.sort(probabilities, axis=1)
    np.testing.assert_allclose(adata.obs["scmmgpt_margin"], ranked[:, -1] - ranked[:, -2], rtol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_a_cells_answer_depends_on_that_cell_alone(tiny_pipeline, adata, batch_size):
    reference = tiny_pipeline.annotate(adata.copy(), LABELS).obsm["scmmgpt_probabilities"]
    order = np.random.default_rng(0).permutation(adata.n_obs)[:23]
    some = tiny_pipeline.annotate(adata[order].copy(), LABELS, batch_size=batch_size)
    np.testing.assert_allclose(some.obsm["scmmgpt_probabilities"], reference[order], atol=1e-5)


def test_each_candidate_is_matched_as_the_model_matches_it_alone(tiny_pipeline, adata):
    settings = tiny_pipeline.annotation_settings(LABELS, matching_weight=1, matching_candidates=2)
    cells, _ = tiny_pipeline.processor.read_cells(adata)
    similarity, match, _ = tiny_pipeline._label_scores(
        [cells], len(cells), list(LABELS.values()), settings, batch_size=8
    )
    assert (np.isfinite(match).sum(axis=1) == 2).all()
    row, column = 5, int(np.argmax(similarity[5]))
    inputs = tiny_pipeline.processor(cells=cells[[row]], qformer_text=[list(LABELS.values())[column]])
    with torch.no_grad():
        alone = tiny_pipeline.model.match(**inputs).item()
    assert match[row, column] == pytest.approx(alone, abs=1e-5)


def test_below_the_least_score_a_cell_is_unknown(tiny_pipeline, adata):
    tiny_pipeline.annotate(adata, LABELS, min_score=1.1)
    assert set(adata.obs["scmmgpt_cell_type"]) == {"Unknown"}
    assert set(adata.obs["scmmgpt_cl_id"]) == {""}


def test_a_path_in_place_of_cells_is_refused_with_the_way_out(tiny_pipeline):
    for verb in (tiny_pipeline.embed, tiny_pipeline.describe):
        with pytest.raises(TypeError, match=r"'cells\.h5ad' is not an AnnData; read a file first"):
            verb("cells.h5ad")


@pytest.mark.parametrize("verb", ["annotate", "embed", "search"])
def test_an_unknown_option_is_refused_by_its_name(tiny_pipeline, adata, verb):
    texts = ["a B cell"] if verb == "search" else []
    with pytest.raises(TypeError, match="There is no option 'candidate_labels': `help` of the method"):
        getattr(tiny_pipeline, verb)(adata, *texts, candidate_labels=["B cell"])


def test_clusters_get_their_commonest_label(tiny_pipeline, adata):
    adata.obs["cluster"] = np.resize(["0", "1"], adata.n_obs)
    tiny_pipeline.annotate(adata, LABELS, cluster_key="cluster")
    voted = adata.obs.groupby("cluster", observed=True)["scmmgpt_cell_type_majority"].nunique()
    assert (voted == 1).all()
    table = adata.uns["scmmgpt"]["annotate"]["clusters"]
    assert table["cluster"].tolist() == ["0", "1"]
    assert table["cells"].tolist() == [30, 30]
    assert all(votes.endswith(" %") for votes in table["votes"])


def test_one_label_for_nearly_all_cells_is_reported_as_collapse(tiny_pipeline, adata, monkeypatch):
    said = []
    monkeypatch.setattr("scmmgpt.labelling_scmmgpt.logger.warning", said.append)
    tiny_pipeline.annotate(adata, {"B": "a B cell", "T": "a T cell"}, min_score=1.1)
    assert bool(adata.uns["scmmgpt"]["annotate"]["collapsed"])
    assert "100% of 60 cells were labelled 'Unknown', of 2 labels" in said[-1]


def test_calibration_is_kept_with_the_checkpoint_and_used(tiny_pipeline, adata, tmp_path):
    labels = {name: f"a {name}" for name in adata.obs["cell_type"].cat.categories[:3]}
    done = tiny_pipeline.calibrate(adata, "cell_type", labels, cl_ids={"B cell": "CL:0000236"})
    assert done["n_left_out"] == (~adata.obs["cell_type"].isin(labels)).sum()
    assert done["n_cells"] + done["n_left_out"] == adata.n_obs
    tiny_pipeline.save_pretrained(tmp_path / "checkpoint")
    loaded = ScMMGPTPipeline.from_pretrained(tmp_path / "checkpoint", device="cpu")
    settings = loaded.annotation_settings()
    assert settings["labels"] == labels
    assert settings["cl_ids"] == {"B cell": "CL:0000236"}
    assert settings["matching_weight"] == done["matching_weight"]
    assert settings["temperature"] == pytest.approx(done["temperature"])
    expected = tiny_pipeline.annotate(adata.copy())
    np.testing.assert_allclose(
        loaded.annotate(adata).obsm["scmmgpt_probabilities"], expected.obsm["scmmgpt_probabilities"], atol=1e-6
    )


def test_calibration_is_no_worse_than_what_it_started_from(tiny_pipeline, adata):
    labels = {name: f"a {name}" for name in adata.obs["cell_type"].cat.categories}
    truth = np.array([list(labels).index(name) for name in adata.obs["cell_type"]])

    def nll():
        probabilities = tiny_pipeline.annotate(adata.copy(), labels).obsm["scmmgpt_probabilities"]
        return -np.log(probabilities[np.arange(len(truth)), truth]).mean()

    before = nll()
    done = tiny_pipeline.calibrate(adata, "cell_type", labels)
    assert nll() == pytest.approx(done["nll"], abs=1e-4)
    assert done["nll"] <= before + 1e-6


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"labels": None}, "no labels to choose from"),
        ({"labels": []}, "no labels to choose from"),
        ({"labels": {"B": " "}}, "text of 1 labels is empty"),
        ({"labels": LABELS, "cluster_key": "leiden"}, "no column 'leiden'"),
        ({"labels": LABELS, "matching_weight": 2}, "from 0 to 1"),
        ({"labels": LABELS, "temperature": 0.0}, "must be positive"),
        ({"labels": LABELS, "batch_size": -1}, "at least 1"),
    ],
)
def test_annotate_says_what_is_wrong(tiny_pipeline, adata, kwargs, message):
    before = list(adata.obs.columns)
    with pytest.raises(ValueError, match=message):
        tiny_pipeline.annotate(adata, **kwargs)
    assert list(adata.obs.columns) == before
    assert not adata.uns


def test_one_string_is_no_list_of_labels(tiny_pipeline, adata):
    with pytest.raises(TypeError, match="one string 'B cell'"):
        tiny_pipeline.annotate(adata, "B cell")


# -- describe ---------------------------------------------------------------------------------------------------------


def test_descriptions_are_what_the_model_says_of_each_cell_alone(tiny_pipeline, adata):
    adata = adata[:9].copy()
    tiny_pipeline.describe(adata, max_new_tokens=6, batch_size=4)
    processor, model = tiny_pipeline.processor, tiny_pipeline.model
    for row in range(adata.n_obs):
        inputs = processor(text=[processor.render_prompt("describe")], cells=adata[[row]])
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        alone = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()
        assert adata.obs["scmmgpt_description"].iloc[row] == alone


def test_a_question_may_leave_the_cell_unnamed(tiny_pipeline, adata):
    tiny_pipeline.describe(adata, "what type is this cell ?", max_new_tokens=3)
    assert "<cell>\nwhat type" in adata.uns["scmmgpt"]["describe"]["prompt"]


def test_a_question_about_two_cells_is_refused(tiny_pipeline, adata):
    with pytest.raises(ValueError, match="names 2 cells"):
        tiny_pipeline.describe(adata, "<cell> or <cell> ?")


# -- generate ---------------------------------------------------------------------------------------------------------


def test_generated_cells_come_as_anndata(tiny_pipeline):
    cells = tiny_pipeline.generate(["a B cell", "a T cell"], genes=["CD19", "CD3E", "LYZ"])
    assert cells.shape == (2, 3)
    assert list(cells.var_names) == ["CD19", "CD3E", "LYZ"]
    assert cells.obs["prompt"].tolist() == ["a B cell", "a T cell"]
    assert cells.obs_names.tolist() == ["prompt0-cell0", "prompt1-cell0"]
    assert cells.X.min() >= 0


def test_all_genes_of_the_vocabulary_by_default(tiny_pipeline, gene_vocabulary):
    assert tiny_pipeline.generate("a B cell").n_vars == len(gene_vocabulary) - 3


def test_means_equal_the_models_own(tiny_pipeline):
    genes = ["CD19", "LYZ"]
    ours = tiny_pipeline.generate("a B cell", genes=genes).X.toarray()
    processor = tiny_pipeline.processor
    inputs = processor(text=[processor.render_prompt("generate", text="a B cell")])
    theirs = tiny_pipeline.model.generate_cells(**inputs, target_gene_ids=torch.tensor(processor.gene_ids_of(genes)))
    np.testing.assert_allclose(ours, theirs.expression.numpy(), atol=1e-6)


def test_sampled_counts_are_integers_and_normalise_to_x(counting_pipeline):
    cells = counting_pipeline.generate("a B cell", 5, library_size=500)
    counts = cells.layers["counts"].toarray()
    assert np.issubdtype(counts.dtype, np.integer)
    expected = np.log1p(counts / 500 * 1e4)
    np.testing.assert_allclose(cells.X.toarray(), expected, rtol=1e-5)
    assert len(np.unique(counts, axis=0)) == 5


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_sampled_cell_is_the_same_in_any_batch_and_beside_any_other_prompt(counting_pipeline, batch_size):
    alone = counting_pipeline.generate("a T cell", 4).layers["counts"].toarray()
    beside = counting_pipeline.generate(["a B cell", "a T cell"], 4, batch_size=batch_size)
    np.testing.assert_array_equal(beside[beside.obs["prompt"] == "a T cell"].layers["counts"].toarray(), alone)
    assert (counting_pipeline.generate("a T cell", 4, seed=1).layers["counts"].toarray() != alone).any()


def test_more_genes_than_fit_are_decoded_in_turns(tiny_pipeline):
    cells = tiny_pipeline.generate("a B cell", max_genes=7)
    assert cells.uns["scmmgpt"]["generate"]["turns"] == 6
    assert np.isfinite(cells.X.toarray()).all()
    chunks = gene_turns(40, 7)
    assert np.sort(np.concatenate(chunks)).tolist() == list(range(40))
    assert max(map(len, chunks)) <= 7


def test_labels_of_prompts_are_kept(tiny_pipeline):
    cells = tiny_pipeline.generate({"B": "a B cell", "T": "a T cell"}, 2)
    assert cells.obs["cell_type"].tolist() == ["B", "B", "T", "T"]


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        (("a B cell",), {"genes": ["CD19", "NOTAGENE"]}, "'NOTAGENE'"),
        (("a B cell",), {"genes": ["CD19", "CD19"]}, "are named twice"),
        (("a B cell",), {"genes": []}, "genes is empty"),
        (("a B cell", 0), {}, "n_cells is 0"),
        (([],), {}, "prompts is empty|no prompt"),
        ((["a B cell", " "],), {}, "prompts is empty|no prompt"),
        (("a B cell",), {"library_size": -5.0}, "positive"),
        (("a B cell",), {"do_sample": True}, "cannot be sampled"),
    ],
)
def test_generate_says_what_is_wrong(tiny_pipeline, args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline.generate(*args, **kwargs)


# -- embed and search -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("of", "width"), [("cell-text", 12), ("cell", 16)])
def test_embeddings_have_unit_length_and_do_not_depend_on_the_batch(tiny_pipeline, adata, of, width):
    together = tiny_pipeline.embed(adata.copy(), of=of).obsm["X_scmmgpt"]
    alone = tiny_pipeline.embed(adata.copy(), of=of, batch_size=1).obsm["X_scmmgpt"]
    assert together.shape == (adata.n_obs, width)
    assert together.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_hits_are_the_most_similar_cells_in_order(tiny_pipeline, adata):
    hits = tiny_pipeline.search(adata, "a B cell", top_k=5, key_added="similarity")
    similarity = adata.obs["similarity"].to_numpy()
    assert [hit["index"] for hit in hits] == np.argsort(-similarity, kind="stable")[:5].tolist()
    assert [hit["cell"] for hit in hits] == adata.obs_names[[hit["index"] for hit in hits]].tolist()
    assert [hit["rank"] for hit in hits] == [1, 2, 3, 4, 5]


def test_cells_like_a_cell_are_the_others_by_the_cosine_of_embeddings(tiny_pipeline, adata):
    name, other = adata.obs_names[[7, 31]]
    places = tiny_pipeline.embed(adata.copy()).obsm["X_scmmgpt"]
    hits = tiny_pipeline.search(adata, like=name, top_k=4, key_added="alike")
    similarity = adata.obs["alike"].to_numpy()
    np.testing.assert_allclose(similarity, places @ places[7], atol=1e-5)  # 1 for the cell itself
    order = [row for row in np.argsort(-similarity, kind="stable") if row != 7]
    assert [hit["index"] for hit in hits] == order[:4]
    tiny_pipeline.search(adata, like=name, batch_size=1, key_added="alone")
    np.testing.assert_allclose(adata.obs["alone"], similarity, atol=1e-5)

    both = tiny_pipeline.search(adata, like=[other, name], top_k=adata.n_obs)
    mean = places[[7, 31]].mean(axis=0)
    assert both[0]["score"] == pytest.approx(np.delete(places @ mean / np.linalg.norm(mean), [7, 31]).max(), abs=1e-5)
    assert {hit["cell"] for hit in both} == set(adata.obs_names) - {name, other}


def test_a_cell_that_is_not_there_is_named_with_those_that_may_be_meant(tiny_pipeline, adata):
    adata.obs_names = [f"AAACCT{i:03d}-1" for i in range(adata.n_obs)]
    with pytest.raises(ValueError, match=r"No cell is called 'aaacct007'. Do you mean 'AAACCT007-1'"):
        tiny_pipeline.search(adata, like=["aaacct007"])
    with pytest.raises(
        ValueError, match=r"No cell is called 'x' \(nor 1 others of the 3\). The names are those of obs"
    ):
        tiny_pipeline.search(adata, like=["x", "AAACCT001-1", "y"])
    with pytest.raises(ValueError, match="like is empty"):
        tiny_pipeline.search(adata, like=[])
    adata.obs_names = ["a", "a", *adata.obs_names[2:]]
    with pytest.raises(ValueError, match="2 cells are called 'a': make names unique"):
        tiny_pipeline.search(adata, like="a")


def test_several_texts_give_a_list_of_hits_each(tiny_pipeline, adata):
    both = tiny_pipeline.search(adata, ["a B cell", "monocyte"], top_k=2)
    assert both[1] == tiny_pipeline.search(adata, "monocyte", top_k=2)
    assert len(tiny_pipeline.search(adata[:3].copy(), "a B cell", top_k=10)) == 3


@pytest.mark.parametrize(
    ("text", "kwargs", "message"),
    [
        ("", {}, "empty"),
        ("B", {"top_k": 0}, "top_k"),
        (["B", "T"], {"key_added": "x"}, "one column"),
        (None, {}, "either text or like"),
        ("B", {"like": "cell0"}, "either text or like"),
        (None, {"like": "cell0", "by": "genes"}, "by='genes' needs a text"),
    ],
)
def test_search_says_what_is_wrong(tiny_pipeline, adata, text, kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline.search(adata, text, **kwargs)


# -- checkpoints ------------------------------------------------------------------------------------------------------


def test_a_stage_1_checkpoint_annotates_but_does_not_describe(tiny_config, tiny_processor, adata, tmp_path):
    torch.manual_seed(0)
    ScMMGPTPipeline(ScMMGPTForCellTextAlignment(tiny_config), tiny_processor, device="cpu").save_pretrained(tmp_path)
    loaded = ScMMGPTPipeline.from_pretrained(tmp_path, device="cpu")
    assert type(loaded.model) is ScMMGPTForCellTextAlignment
    loaded.annotate(adata, LABELS)
    for verb in ("describe", "generate"):
        with pytest.raises(ValueError, match=f"no language model, so it cannot {verb}"):
            getattr(loaded, verb)(adata)


def test_a_folder_without_a_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="No checkpoint at"):
        ScMMGPTPipeline.from_pretrained(tmp_path)


def test_an_unknown_task_is_refused(tiny_model, tiny_processor):
    with pytest.raises(ValueError, match="cell-annotation"):
        ScMMGPTPipeline(tiny_model, tiny_processor, task="translation")


PROGRAM = """
import sys
import anndata
from transformers import pipeline

path, cells, out = sys.argv[1:]
pipe = pipeline("cell-annotation", model=path, trust_remote_code=True, device="cpu")
pipe(anndata.read_h5ad(cells), ["a B cell", "a T cell"]).write_h5ad(out)
pipe.save_pretrained(path + "-again")
again = pipeline("cell-search", model=path + "-again", trust_remote_code=True, device="cpu")
print(len(again(anndata.read_h5ad(cells), "a B cell", top_k=3)))
"""


def test_transformers_finds_the_pipeline_where_the_package_is_not_installed(tiny_pipeline, adata, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "checkpoint")
    adata.write_h5ad(tmp_path / "cells.h5ad")
    paths = [tmp_path / name for name in ("checkpoint", "cells.h5ad", "out.h5ad")]
    assert run_without_package(PROGRAM, tmp_path, *paths) == 3
    ours = tiny_pipeline.annotate(adata, ["a B cell", "a T cell"]).obsm["scmmgpt_probabilities"]
    theirs = anndata.read_h5ad(tmp_path / "out.h5ad").obsm["scmmgpt_probabilities"]
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_every_task_is_a_verb():
    assert all(callable(getattr(ScMMGPTPipeline, verb)) for verb in PIPELINE_TASKS.values())


# -- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("is_fast", "loaded"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_checkpoint_in_bfloat16_runs_in_what_the_cpu_is_fast_in(
    tiny_pipeline, tmp_path, monkeypatch, is_fast, loaded
):
    rates = {torch.float32: 100.0, torch.bfloat16: 400.0 if is_fast else 1.0}
    monkeypatch.setattr("scmmgpt.machine_scmmgpt.cpu_rate", rates.__getitem__)
    said = []
    monkeypatch.setattr("scmmgpt.pipeline_scmmgpt.logger.warning", said.append)
    tiny_pipeline.model.to(torch.bfloat16)
    tiny_pipeline.save_pretrained(tmp_path / "checkpoint")
    pipeline = ScMMGPTPipeline.from_pretrained(tmp_path / "checkpoint", device="cpu")
    assert pipeline.model.dtype == loaded
    assert not said
    asked = ScMMGPTPipeline.from_pretrained(tmp_path / "checkpoint", device="cpu", dtype=torch.bfloat16)
    assert asked.model.dtype == torch.bfloat16
    assert len(said) == (0 if is_fast else 1)


def test_labels_are_the_same_bits_whatever_the_precision_of_the_network(tmp_path):
    pipeline, cells = synthetic.fitted_pipeline(), synthetic.synthetic_adata(60, seed=5)
    pipeline.save_pretrained(tmp_path)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        loaded = ScMMGPTPipeline.from_pretrained(tmp_path, device="cpu", dtype=dtype)
        assert loaded.model.dtype == dtype
        found.append(loaded.annotate(cells.copy()))
    np.testing.assert_array_equal(*(adata.obsm["scmmgpt_probabilities"] for adata in found))


def test_a_missing_label_is_no_word_and_whole_numbers_beside_it_stay_whole():
    obs = pd.DataFrame({"a": [1.0, np.nan], "b": ["x", None], "c": pd.Categorical(["y", None]), "d": [0.5, np.nan]})
    obs["e"], obs["f"] = [np.inf, 1.0], ["z", " "]
    found = {name: words_of(obs, name).tolist() for name in obs}
    assert found.pop("e") == ["inf", "1.0"]
    assert found == {
        "a": ["1", MISSING],
        "b": ["x", MISSING],
        "c": ["y", MISSING],
        "d": ["0.5", MISSING],
        "f": ["z", MISSING],
    }


def test_a_search_by_any_name_of_a_type_finds_its_cells():
    pipeline, adata = synthetic.fitted_pipeline(), synthetic.synthetic_adata(60, seed=3)
    types = adata.obs["cell_type"].to_numpy()
    for text, kinds in {
        "B cells from blood": ["B cell"],
        "naive T cell": ["T cell"],
        "any lymphocyte": ["B cell", "T cell", "natural killer cell"],
    }.items():
        hits = pipeline.search(adata, text, top_k=int(np.isin(types, kinds).sum()))
        assert {types[hit["index"]] for hit in hits} <= set(kinds)
    assert pipeline._labels_named("a cell that is unlike a T cell") == []  # a sentence, not a name
