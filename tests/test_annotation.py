"""Labels in other words, room for "none of these", broader answers, and cells that are like no known type."""

import itertools
import json
import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

from scmmgpt.annotation_scmmgpt import choose_labels, fit_mixture, label_probabilities
from scmmgpt.cells_scmmgpt import Cells
from scmmgpt.eval.abstention import evaluate_abstention
from scmmgpt.evidence_scmmgpt import likely_label
from scmmgpt.labels_scmmgpt import (
    candidate_columns,
    labels_with_texts,
    trained_labels_of,
)
from scmmgpt.novelty_scmmgpt import Novelty, absent_genes, fit_novelty, novelty_of
from scmmgpt.tissues_scmmgpt import advice_on_tissues, labels_of_tissue, tissue_prior
from scmmgpt.train.data import ontology


TRAINED = {
    "B cell": "CL:0000236",
    "natural killer cell": "CL:0000623",
    "CD14-positive monocyte": "CL:0001054",
    "CD4-positive, alpha-beta memory T cell": "CL:0000897",
    "naive thymus-derived CD4-positive, alpha-beta T cell": "CL:0000895",
    "naive thymus-derived CD8-positive, alpha-beta T cell": "CL:0000900",
}
TEXTS = {label: f"text of {label}" for label in TRAINED}
T_CELLS = [label for label in TRAINED if label.endswith("T cell")]


@pytest.fixture(scope="module")
def terms():
    """The terms that a checkpoint of `TRAINED` stores."""
    return ontology.label_terms(TRAINED)


# -- labels in other words --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("B cell", ["B cell"]),
        ("b-cells", ["B cell"]),
        ("B_cell", ["B cell"]),
        ("B lymphocyte", ["B cell"]),
        ("CL:0000236", ["B cell"]),
        ("NK cells", ["natural killer cell"]),
        ("monocytes", ["CD14-positive monocyte"]),
        ("T cell", T_CELLS),
        ("T lymphocytes", T_CELLS),
        ("CD4+ T cell", T_CELLS[:2]),
        ("naive T cell", T_CELLS[1:]),
        ("hepatocyte", []),
        ("gamma-delta T cell", []),
    ],
)
def test_a_label_in_other_words_means_the_trained_ones(terms, words, meant):
    assert sorted(trained_labels_of(words, None, list(TRAINED), terms)) == sorted(meant)


def test_an_id_decides_before_the_words(terms):
    assert trained_labels_of("cluster 7", "CL:0000623", list(TRAINED), terms) == ["natural killer cell"]


def test_spellings_are_understood_without_an_ontology():
    assert trained_labels_of("t-CELLS", None, ["T cell", "B cell"], []) == ["T cell"]


def test_labels_that_differ_in_case_alone_are_one_in_the_spelling_of_the_checkpoint():
    stored = {"B cell": "A lymphocyte.", "T cell": "Another."}
    assert labels_with_texts(["b cell", "B cell", "x", "X"], stored) == {"B cell": "A lymphocyte.", "x": "x"}
    assert labels_with_texts(["b cell"], stored) == {"b cell": "b cell"}  # words of the user alone
    assert labels_with_texts({"NK": "A killer.", "nk": "nk"}, {}) == {"NK": "A killer."}
    with pytest.raises(ValueError, match="differ in case only"):
        labels_with_texts({"NK": "A killer.", "nk": "Another."}, {})


# -- tissues ----------------------------------------------------------------------------------------------------------


def test_a_tissue_has_the_labels_of_its_parts_and_those_of_blood():
    pairs = [
        ("PBMC", "B cell"),
        ("UBERON:0009834", "neuron"),
        ("my organoid", "stem cell"),
        ("nan", "x"),
        ("lung", ""),
    ]
    tissues = {term["name"]: term for term in ontology.tissue_terms(pairs)}
    assert {name: term["labels"] for name, term in tissues.items()} == {
        "blood": ["B cell"],
        "brain": ["B cell", "neuron"],
        "dorsolateral prefrontal cortex": ["B cell", "neuron"],
        "my organoid": ["B cell", "stem cell"],
    }
    stored = {"labels": dict.fromkeys(["neuron", "stem cell", "B cell"], "A text."), "tissues": list(tissues.values())}
    for words in ("Brain", "brains", "UBERON:0000955"):
        assert list(labels_of_tissue(words, stored)) == ["neuron", "B cell"]
    assert list(labels_of_tissue("peripheral blood", stored)) == ["B cell"]


@pytest.fixture
def with_tissues(tiny_pipeline, adata):
    labels = {str(name): str(name) for name in adata.obs["cell_type"].cat.categories}
    tissues = ontology.tissue_terms([("lung", "B cell"), ("lung", "monocyte"), ("blood", "monocyte")])
    tiny_pipeline.model.config.annotation = {"labels": labels, "tissues": tissues, "temperature": 0.1}
    return tiny_pipeline


def test_annotate_chooses_from_the_labels_of_a_tissue_and_the_others_compete(with_tissues, adata):
    every = with_tissues.annotate(adata.copy()).obsm["scmmgpt_probabilities"]
    few = with_tissues.annotate(adata.copy(), tissue="lung")
    names = list(with_tissues.model.config.annotation["labels"])
    assert few.uns["scmmgpt"]["annotate"]["labels"].tolist() == ["B cell", "monocyte"]
    assert set(few.obs["scmmgpt_cell_type"]) <= {"B cell", "monocyte"}
    expected = every[:, [names.index("B cell"), names.index("monocyte")]]
    np.testing.assert_allclose(few.obsm["scmmgpt_probabilities"], expected, atol=1e-6)
    assert json.loads(few.uns["scmmgpt"]["annotate"]["receipt"]["options"])["tissue"] == "lung"


def test_labels_of_other_tissues_bring_the_advice_to_name_the_tissue(with_tissues, adata, caplog):
    adata.obs["tissue"] = "lung"
    common = with_tissues.annotate(adata.copy()).obs["scmmgpt_cell_type"].value_counts()
    with_tissues.model.config.annotation["tissues"] = [
        {"id": "UBERON:0002048", "name": "lung", "names": ["lung"], "labels": list(common.index[1:])}
    ]
    caplog.clear()
    with_tissues.annotate(adata.copy())
    assert f"the tissue 'lung', but {common.iloc[0]} of {len(adata)} cells have labels of other tissues" in caplog.text
    assert f"({common.index[0]}). Pass `tissue='lung'` to choose" in caplog.text
    adata.obs["tissue"] = "kidney"  # which the checkpoint does not know
    caplog.clear()
    with_tissues.annotate(adata)
    assert "tissue" not in caplog.text


def test_labels_of_several_tissues_bring_the_advice_where_the_file_names_none():
    counts = dict.fromkeys(["B cell", "T cell", "monocyte", "neuron", "leukocyte"], 10)
    for n_others in (2, 3):  # a few labels of others are no sign
        tissues = [{"name": "blood", "labels": list(counts)[n_others:]}, {"name": "lung", "labels": []}]
        advice = advice_on_tissues([], counts, {"labels": counts, "tissues": tissues})
        assert advice == [] if n_others == 2 else "beside blood: B cell, T cell, monocyte" in advice[0]


def test_labels_of_other_tissues_than_those_of_the_cells_are_unlikely_beside_them():
    labels = ["B cell", "T cell", "macrophage", "neuron", "alpha cell"]
    blood, brain = {"labels": labels[:2]}, {"labels": labels[:4]}
    islet = {"labels": ["B cell", "T cell", "macrophage", "alpha cell"]}

    def seen(*counts):  # cells that are nine times as like their label as like each other
        own = np.repeat(np.eye(5), counts, axis=0)
        return tissue_prior((1 + 8 * own) / 13, labels, [blood, brain, islet])

    of_blood = seen(50, 50, 3, 0, 0)
    assert (of_blood[:2] > 6 * of_blood[3:].max()).all()
    assert of_blood[2] < 0.5 * of_blood[0]
    of_brain = seen(1, 2, 10, 60, 3)
    assert of_brain[4] < 0.3 * of_brain[3]
    assert of_brain[2] == pytest.approx(of_brain[3])
    mixed = seen(0, 0, 0, 50, 50)  # a tissue that no one of these is: any label, or both tissues
    assert mixed[3] == pytest.approx(mixed[4], rel=0.01)
    np.testing.assert_allclose(seen(20, 20, 20, 20, 20) @ np.ones(5), 5)  # shares of all labels sum to 1
    np.testing.assert_allclose(tissue_prior(np.full((3, 5), 0.2), labels, [{"labels": ["keratinocyte"]}]), 1)
    renamed = ["B", "T cell", "macrophage"]  # no tissue has a label "B": it is as common as those of blood
    b_cells = np.tile([0.8, 0.1, 0.1], (50, 1))
    of_b_cells = tissue_prior(b_cells, renamed, [{"labels": ["B cell", "T cell"]}, {"labels": ["macrophage"]}])
    assert of_b_cells[0] == of_b_cells.max() > 1


def test_the_temperature_is_fitted_with_what_is_known_of_how_common_labels_are():
    rng, prior = np.random.default_rng(0), np.array([2.5, 1.2, 0.2, 0.1])
    scores = rng.normal(scale=0.3, size=(4000, 4))
    truth = (scores + 0.2 * (np.log(prior) + rng.gumbel(size=scores.shape))).argmax(axis=1)
    asked = []
    fitted = fit_mixture(scores, None, truth, 0.2, prior_at=lambda temperature: asked.append(temperature) or prior)
    plain = fit_mixture(scores, None, truth, 0.2)
    assert fitted["temperature"] == 0.2
    assert plain["nll"] > fitted["nll"] + 0.1
    assert len(asked) == 13  # once for a temperature


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tissue": "kidney"}, "knows no tissue 'kidney'; it knows blood, lung\\.$"),
        ({"tissue": "Lumg"}, "it knows blood, lung. Did you mean 'lung'"),
        ({"tissue": "lung", "labels": ["B cell"]}, "pass one of the two"),
    ],
)
def test_a_tissue_that_says_nothing_is_refused(with_tissues, adata, options, message):
    with pytest.raises(ValueError, match=message):
        with_tissues.annotate(adata, **options)
    with_tissues.model.config.annotation.pop("tissues")
    with pytest.raises(ValueError, match="stores no tissues|pass one of the two"):
        with_tissues.annotate(adata, **options)


def candidates_of(labels, terms):
    labels = labels if isinstance(labels, dict) else {label: TEXTS.get(label, label) for label in labels}
    return candidate_columns(labels, TEXTS, {}, terms)


def test_labels_that_mean_trained_ones_are_scored_by_the_texts_of_training(terms):
    candidates = candidates_of(["B-cells", "T lymphocyte"], terms)
    assert candidates.texts == list(TEXTS.values())
    assert not candidates.unseen.any()
    # Nobody asked for NK cells and monocytes: they compete, so that a cell may be neither.
    assert candidates.owners.tolist() == [0, -1, -1, 1, 1, 1]
    pooled = candidates.pool(np.array([[0.1, 0.1, 0.5, 0.1, 0.1, 0.1]]))
    np.testing.assert_allclose(pooled, [[0.1, 0.3]])


def test_a_label_that_means_several_trained_ones_has_no_larger_share_of_the_doubt(terms):
    candidates = candidates_of(["B cell", "T cell"], terms)
    similarity = np.zeros((1, 6))
    similarity[0, 2] = 100  # a monocyte, which is no candidate
    options = {"logit_scale": 1.0, "doubt": 0.2}
    found = candidates.pool(label_probabilities(similarity, parts=candidates.doubt_parts(), **options))
    np.testing.assert_allclose(found, [[0.05, 0.05]], rtol=1e-6)  # NK cells and monocytes have the other halves
    own = candidates_of(list(TRAINED), terms)  # each label by its own text: as ever
    np.testing.assert_array_equal(
        label_probabilities(similarity, parts=own.doubt_parts(), **options), label_probabilities(similarity, **options)
    )


def test_a_trained_label_belongs_to_the_narrowest_label_that_means_it(terms):
    candidates = candidates_of(["T cell", "CD4 T cell"], terms)
    assert [candidates.names[owner] for owner in candidates.owners[3:]] == ["CD4 T cell", "CD4 T cell", "T cell"]


def test_only_a_label_without_a_trained_meaning_is_unseen(terms):
    candidates = candidates_of(["B lymphocyte", "hepatocyte"], terms)
    assert candidates.texts[candidates.unseen.argmax()] == "hepatocyte"
    assert candidates.unseen.sum() == 1


def test_a_description_of_a_trained_label_speaks_for_it_beside_the_text_of_training(terms):
    candidates = candidates_of({"B cell": "a lymphocyte that makes antibodies", "T cell": "T cell"}, terms)
    owned = [text for text, owner in zip(candidates.texts, candidates.owners, strict=True) if owner == 0]
    assert owned == ["text of B cell", "a lymphocyte that makes antibodies"]
    assert not candidates.unseen.any()


def test_a_broader_trained_label_does_not_compete_with_its_own_kinds():
    texts = {"T cell": "text of T", "B cell": "text of B"}
    terms = ontology.label_terms(dict.fromkeys(texts))
    candidates = candidate_columns({"CD8-positive T cell": "CD8", "gamma-delta T cell": "gd"}, texts, {}, terms)
    assert candidates.texts == ["text of B", "CD8", "gd"]
    assert candidates.owners.tolist() == [-1, 0, 1]


def test_without_known_labels_the_candidates_are_all_there_is():
    candidates = candidate_columns({"B": "a B cell", "T": "a T cell"}, {}, {}, [])
    assert candidates.texts == ["a B cell", "a T cell"]
    assert candidates.owners.tolist() == [0, 1]


def test_annotate_takes_other_words_and_leaves_room_for_none(tiny_pipeline, adata, terms):
    labels = {label: f"a {label}" for label in TRAINED}
    tiny_pipeline.model.config.annotation = {"labels": labels, "cl_ids": TRAINED, "terms": terms, "unseen_bonus": 9.0}
    everything = tiny_pipeline.annotate(adata.copy(), matching_weight=0).obsm["scmmgpt_probabilities"]
    tiny_pipeline.annotate(adata, ["B cells", "T-lymphocyte"], matching_weight=0)
    expected = np.stack([everything[:, 0], everything[:, 3:].sum(axis=1)], axis=1)
    np.testing.assert_allclose(adata.obsm["scmmgpt_probabilities"], expected, atol=1e-6)
    assert set(adata.obs["scmmgpt_cl_id"]) <= {"CL:0000236", "CL:0000084"}


def test_cells_of_a_label_that_was_never_trained_bring_a_warning(tiny_pipeline, adata, terms, caplog):
    labels = {label: f"a {label}" for label in TRAINED}
    for bonus, stored, n_warnings in ((9.0, labels, 1), (-9.0, labels, 0), (9.0, {}, 0)):
        caplog.clear()
        tiny_pipeline.model.config.annotation = {"labels": stored, "terms": terms, "unseen_bonus": bonus}
        with caplog.at_level("WARNING", "scmmgpt"):
            found = tiny_pipeline.annotate(adata, ["B cell", "hepatocyte"], matching_weight=0).obs["scmmgpt_cell_type"]
        said = f"{(found == 'hepatocyte').sum()} of {adata.n_obs} cells have labels without training cells"
        assert sum(f"{said} ('hepatocyte')" in message for message in caplog.messages) == n_warnings


def test_a_label_that_is_spelt_wrongly_or_in_short_brings_the_known_name(tiny_pipeline, adata, terms, caplog):
    labels = {label: f"a {label}" for label in TRAINED}
    tiny_pipeline.model.config.annotation = {"labels": labels, "terms": terms, "unseen_bonus": 9.0}
    with caplog.at_level("WARNING", "scmmgpt"):
        tiny_pipeline.annotate(adata, ["B cel", "hepatocyte"], matching_weight=0)
    (said,) = [message for message in caplog.messages if "without training cells" in message]
    assert "Do you mean 'B cell' by 'B cel'?" in said
    assert "by 'hepatocyte'" not in said
    pancreas = [{"id": "CL:0000169", "names": ["pancreatic beta cell"], "labels": ["type B pancreatic cell"]}]
    assert likely_label("beta", ["B cell"], pancreas) == "type B pancreatic cell"


def test_a_column_without_any_cluster_is_refused(tiny_pipeline, adata):
    adata.obs["empty"] = pd.Categorical([None] * adata.n_obs, categories=["never used"])
    with pytest.raises(ValueError, match=rf"obs\['empty'\] has no value for any of the {adata.n_obs} cells"):
        tiny_pipeline.annotate(adata, cluster_key="empty")
    with pytest.raises(ValueError, match="name a column with clusters"):
        tiny_pipeline.explain(adata, "cell_type", cluster_key="empty")


def test_a_column_of_measurements_is_no_column_of_clusters(tiny_pipeline, adata):
    adata.obs["n_counts"] = np.arange(adata.n_obs) + 0.25
    with pytest.raises(
        ValueError, match=rf"obs\['n_counts'\] has {adata.n_obs} values in {adata.n_obs} cells, .*'0.25'"
    ):
        tiny_pipeline.annotate(adata, cluster_key="n_counts")
    adata.obs["pairs"] = np.arange(adata.n_obs) // 2  # small clusters are clusters
    tiny_pipeline.annotate(adata, {"B": "a B cell", "T": "a T cell"}, cluster_key="pairs")


def test_the_certainty_of_a_cell_does_not_depend_on_the_other_cells_of_the_file(tiny_pipeline, adata, monkeypatch):
    labels = {label: f"a {label}" for label in TRAINED}
    tiny_pipeline.model.config.annotation = {"labels": labels, "cl_ids": TRAINED}
    probabilities = np.array([[0.5, 0.5], [0.3, 0.3]])  # of the first cell, nothing is left to other labels

    def scores(cells, labelling, _):
        owners = labelling.candidates.owners
        rest = (1 - probabilities.sum(axis=1, keepdims=True)).clip(min=1e-300) / max((owners < 0).sum(), 1)
        logits = np.log(np.where(owners < 0, rest, probabilities[:, owners.clip(min=0)]))[: cells.n_obs]
        return logits * labelling.settings["temperature"], None, None, np.zeros(cells.n_obs, bool)

    monkeypatch.setattr(tiny_pipeline, "_scores", scores)
    names = list(TRAINED)[:2]
    together = tiny_pipeline.annotate(adata[:2].copy(), names).obs["scmmgpt_entropy"]
    alone = tiny_pipeline.annotate(adata[:1].copy(), names).obs["scmmgpt_entropy"]
    assert together.iloc[0] == alone.iloc[0] == pytest.approx(np.log(2) / np.log(3))
    tiny_pipeline.model.config.annotation = None  # no label competes but the candidates
    assert tiny_pipeline.annotate(adata[:1].copy(), names).obs["scmmgpt_entropy"].iloc[0] == 1


# -- broader answers --------------------------------------------------------------------------------------------------


def test_below_the_least_score_the_answer_is_the_narrowest_type_that_reaches_it(terms):
    names = list(TRAINED)
    probabilities = np.array(
        [
            [0.9, 0, 0, 0, 0, 0.1],  # certain
            [0, 0, 0.05, 0.5, 0.4, 0.05],  # CD4 of some kind
            [0, 0, 0.04, 0.32, 0.32, 0.32],  # T of some kind
            [0.3, 0.3, 0, 0.3, 0.1, 0],  # a lymphocyte
            [0.3, 0.1, 0.35, 0.05, 0.1, 0.1],  # anything
        ]
    )
    columns = choose_labels(probabilities, names, TRAINED, min_score=0.8, terms=terms)
    expected = ["B cell", "CD4-positive, alpha-beta T cell", "T cell", "lymphocyte", "Unknown"]
    assert columns["cell_type"].tolist() == expected
    assert columns["cl_id"].tolist() == ["CL:0000236", "CL:0000624", "CL:0000084", "CL:0000542", ""]
    np.testing.assert_allclose(columns["score"], [0.9, 0.9, 0.96, 1.0, 0.35])


def test_a_type_of_nearly_all_labels_is_not_an_answer():
    names = [f"type {i}" for i in range(20)]
    probabilities = np.full((1, 20), 1 / 19)
    probabilities[0, -1] = 0
    terms = [{"name": "eukaryotic cell", "id": "CL:0000255", "labels": names[:-1], "names": ["eukaryotic cell"]}]
    assert choose_labels(probabilities, names, {}, min_score=0.5, terms=terms)["cell_type"].tolist() == ["Unknown"]
    terms[0]["labels"] = names[:10]
    probabilities = np.repeat([[0.1, 0.0]], 10, axis=1)
    assert choose_labels(probabilities, names, {}, min_score=0.5, terms=terms)["cell_type"].tolist() == [
        terms[0]["name"]
    ]


# -- novelty ----------------------------------------------------------------------------------------------------------


def draw_cells(rates, n_cells, seed):
    """Cells of Poisson counts; `rates` are `(n_genes,)`."""
    counts = np.random.default_rng(seed).poisson(rates, (n_cells, len(rates)))
    rows, genes = counts.nonzero()
    indptr = np.concatenate([[0], np.cumsum((counts > 0).sum(axis=1))])
    return Cells(indptr, genes, counts[rows, genes], np.arange(n_cells, dtype=np.uint64))


@pytest.fixture
def types():
    """Two known types and a new one over 60 genes: 20 shared, 10 of each known type, 20 of the new one."""
    shared, one, two, new = np.zeros((4, 60))
    shared[:20], one[20:30], two[30:40], new[40:] = 100, 100, 100, 60
    leak = np.full(60, 0.01)
    return {"one": shared + one + leak, "two": shared + two + leak, "new": shared + new}


@pytest.fixture
def known(types):
    cells = [draw_cells(types[name], 200, seed) for seed, name in enumerate(("one", "two"))]
    return Cells.concatenate(cells), np.repeat([0, 1], 200)


def test_novelty_is_the_share_of_a_cell_in_genes_that_no_known_type_expresses(known, types):
    cells, targets = known
    absent = absent_genes(cells, targets, 60)
    assert np.flatnonzero(absent).tolist() == list(range(40, 60))
    cell = Cells(np.array([0, 3]), np.array([0, 21, 45]), np.array([4, 9, 25]), np.zeros(1, dtype=np.uint64))
    assert novelty_of(cell, absent).tolist() == [0.5]  # 5 of 2 + 3 + 5


def test_a_new_type_is_above_one_and_known_cells_are_not(known, types):
    cells, targets = known
    measured = np.arange(60)
    novelty = Novelty.of(fit_novelty(cells, targets, measured, 60), measured, 60)
    assert (novelty(draw_cells(types["new"], 50, 9)) > 1).all()
    assert (novelty(draw_cells(types["one"], 200, 8)) > 1).mean() < 0.03


def test_genes_that_were_never_measured_are_not_absent(known):
    cells, targets = known
    stored = fit_novelty(cells, targets, np.arange(50), 60)
    assert np.flatnonzero(Novelty.of(stored, np.arange(60), 60).absent).tolist() == list(range(40, 50))


def test_a_panel_of_few_genes_says_nothing_about_novelty(known):
    cells, targets = known
    stored = fit_novelty(cells, targets, np.arange(60), 60)
    assert Novelty.of(stored, np.arange(10), 60) is None
    assert Novelty.of(None, np.arange(60), 60) is None


def test_too_few_cells_give_no_measure_of_novelty(known):
    cells, targets = known
    assert fit_novelty(cells[:50], targets[:50], np.arange(60), 60) is None


def test_novel_cells_are_unknown_unless_every_cell_shall_get_a_label():
    probabilities, novelty = np.array([[0.9, 0.1], [0.9, 0.1], [0.9, 0.1]]), np.array([0.5, 1.5, np.nan])
    columns = choose_labels(probabilities, ["B", "T"], {"B": "CL:0000236"}, novelty=novelty)
    assert columns["cell_type"].tolist() == ["B", "Unknown", "B"]
    assert columns["cl_id"].tolist() == ["CL:0000236", "", "CL:0000236"]
    columns = choose_labels(probabilities, ["B", "T"], {}, min_score=0, novelty=novelty)
    assert columns["cell_type"].tolist() == ["B", "B", "B"]


@pytest.fixture
def calibrated(tiny_pipeline, adata):
    """A pipeline calibrated on 120 cells that lack the last ten genes, and cells of those genes."""
    adata.X = adata.X.multiply(np.arange(40) < 30).tocsr()
    twice = anndata.concat({"a": adata, "b": adata}, index_unique="-")
    labels = {str(name): str(name) for name in adata.obs["cell_type"].cat.categories}
    tiny_pipeline.calibrate(twice, "cell_type", labels)
    new = adata[:20].copy()
    new.X = csr_matrix(np.tile(np.arange(40) >= 30, (20, 1)) * np.arange(1.0, 41))
    return tiny_pipeline, adata, new


def test_calibration_tells_new_cells_on_one_line(calibrated, monkeypatch):
    pipeline, known, new = calibrated
    said = []
    monkeypatch.setattr("scmmgpt.labelling_scmmgpt.logger.warning", said.append)
    pipeline.annotate(known)
    assert not (known.obs["scmmgpt_cell_type"] == "Unknown").any()
    pipeline.annotate(new, force=True)
    assert (new.obs["scmmgpt_cell_type"] == "Unknown").all()
    assert (new.obs["scmmgpt_novelty"] > 1).all()
    assert new.uns["scmmgpt"]["annotate"]["novel_cells"] == 20
    (line,) = [line for line in said if "resemble no type" in line]
    assert line.startswith("20 of 20 cells resemble no type that this checkpoint knows (4 cell types, such as")


def test_calibration_keeps_what_fine_tuning_stored(tiny_pipeline, adata):
    labels = {str(name): str(name) for name in adata.obs["cell_type"].cat.categories}
    tiny_pipeline.model.config.annotation = {"labels": labels, "unseen_bonus": 0.3, "terms": [], "temperature": 0.1}
    tiny_pipeline.calibrate(adata, "cell_type")
    assert tiny_pipeline.model.config.annotation["unseen_bonus"] == 0.3
    assert tiny_pipeline.model.config.annotation["terms"] == []


def test_abstention_is_evaluated_on_known_and_new_cells(calibrated, monkeypatch):
    pipeline, known, new = calibrated
    original = pipeline.annotate
    monkeypatch.setattr(pipeline, "annotate", lambda cells, **given: original(cells, force=True, **given))
    result = evaluate_abstention(pipeline, known, new, "cell_type")
    assert (result["new"]["unknown"], result["new"]["auroc_novelty"]) == (1, 1)
    assert result["known"]["unknown"] == 0
    assert result["known"]["accuracy"] == result["known"]["accuracy_of_answers"]
    known.obs["spelled"] = [None, *(f" {name} " for name in known.obs["cell_type"][1:])]
    spelled = evaluate_abstention(pipeline, known, new, "spelled")["known"]
    assert spelled["n_cells"] == len(known) - 1  # a cell without a label is not wrong
    assert spelled["accuracy"] > 0
    assert spelled["accuracy"] == pytest.approx(result["known"]["accuracy"], abs=1 / len(known))
    with pytest.raises(ValueError, match="no column 'type'"):
        evaluate_abstention(pipeline, known, new, "type")


def test_a_cell_without_a_gene_is_unknown_unless_every_cell_gets_a_label(tiny_pipeline, adata):
    full = adata.copy()
    adata.X = csr_matrix(np.where(np.arange(60)[:, None] == 3, 0, adata.X.toarray()))
    labels = ["B cell", "T cell"]
    found = tiny_pipeline.annotate(adata, labels).obs["scmmgpt_cell_type"]
    assert found.iloc[3] == "Unknown"
    others = np.arange(60) != 3
    expected = tiny_pipeline.annotate(full, labels).obs["scmmgpt_cell_type"]
    assert found[others].tolist() == expected[others].tolist()
    assert tiny_pipeline.annotate(adata, labels, min_score=0).obs["scmmgpt_cell_type"].iloc[3] in labels


# -- the path ---------------------------------------------------------------------------------------------------------


def test_annotate_enters_each_file_of_a_stage_once(tiny_pipeline, adata):
    entered, frames = [], set()
    stages = "reading conversion annotation votes records".split()

    def follow(frame, event, _):
        if event == "call" and frame.f_back and frame not in frames:  # a generator that goes on is no call
            frames.add(frame)
            caller, called = (Path(f.f_code.co_filename).stem.removesuffix("_scmmgpt") for f in (frame.f_back, frame))
            if called in stages and caller not in stages:
                entered.append(called)

    sys.setprofile(follow)
    try:
        tiny_pipeline.annotate(adata[:8].copy(), list(TRAINED)[:2])
    finally:
        sys.setprofile(None)
    assert [stage for stage, _ in itertools.groupby(entered)] == stages
    assert entered.count("annotation") == 1
