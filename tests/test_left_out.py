"""Datasets that a readout has not seen: what is scored, what is fitted to the scores, and the report of it."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

from scmmgpt.annotation_scmmgpt import choose_labels, least_scores
from scmmgpt.cells_scmmgpt import Cells
from scmmgpt.labels_scmmgpt import UNKNOWN
from scmmgpt.novelty_scmmgpt import (
    N_NEIGHBOURS,
    NEIGHBOUR_WEIGHT,
    PANEL_WEIGHT,
    SCORE_STEPS,
    Neighbours,
    Novelty,
    first_term,
)
from scmmgpt.regression_scmmgpt import scale_groups, solve_groups
from scmmgpt.synthetic import fitted_pipeline, synthetic_adata


pytest.importorskip("cellxgene_ontology_guide")

from scmmgpt.eval import left_out as evaluation
from scmmgpt.train import left_out
from scmmgpt.train.left_out import ABSENT, LeftOut
from scmmgpt.train.pooled import Dataset
from scmmgpt.train.references import Reference, type_name


B, CD4, CD8, MAST = "CL:0000236", "CL:0000624", "CL:0000625", "CL:0000097"
TYPES = [B, CD4, CD8, MAST]
T_CELL = 4  # a target that may be either T cell
MEANINGS = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [0, 0.5, 0.5, 0]])
MARKERS = np.array([[8, 0, 0, 0], [0, 6, 0, 0], [0, 0, 6, 0], [0, 0, 0, 8], [0, 3, 3, 0]])  # of each target
N_OTHERS = 20


def dataset(targets, seed, markers=MARKERS, scales=(0.5, 2)):
    """Thirty cells of each target, whose first genes are two markers of each type, and twenty genes of all types."""
    rng = np.random.default_rng(seed)
    targets = np.repeat(targets, 30)
    rates = np.hstack([np.repeat(markers[targets], 2, axis=1), np.full((len(targets), N_OTHERS), 5.0)])
    rates = (rates + 0.1) * rng.uniform(*scales, rates.shape[1])  # every laboratory has its own scale of a gene
    return Dataset(csr_matrix(rng.poisson(rates).astype(np.float32)), np.arange(rates.shape[1]), targets)


@pytest.fixture(scope="module")
def datasets():
    return [dataset([0, 1, 2], 0), dataset([0, 1, 2, T_CELL], 1), dataset([0, 3], 2)]


@pytest.fixture(scope="module")
def cells(datasets):
    return left_out.leave_each_out(datasets, MEANINGS)


def test_a_dataset_is_scored_by_the_labels_of_the_others_alone(datasets, cells):
    assert np.bincount(cells.datasets).tolist() == [90, 90, 60]  # the T cells of unknown kind have no label
    mast = cells.targets == TYPES.index(MAST)
    assert cells.known.tolist() == (~mast).tolist()  # no other dataset has them
    assert (cells.scores[cells.datasets == 2, TYPES.index(MAST)] == ABSENT).all()
    named = cells.scores.argmax(axis=1) == cells.targets
    assert named[~mast].mean() > 0.9
    alone = left_out.leave_out(datasets, MEANINGS, [2])
    assert set(alone.datasets) == {2}
    np.testing.assert_array_equal(alone.scores, cells.scores[cells.datasets == 2])


def test_one_dataset_leaves_nothing_to_calibrate_on(datasets):
    nothing = left_out.leave_each_out(datasets[:1], MEANINGS)
    assert nothing is None
    assert left_out.calibrate(nothing) == {}


LIVER = 5  # a row of `MARKERS_AND_LIVER`: no label, but a profile of the reference
MARKERS_AND_LIVER = np.pad(MARKERS, ((0, 1), (0, 1)))
MARKERS_AND_LIVER[LIVER, -1] = 8


def wide_dataset(targets, seed):
    """As [`dataset`], with two genes of the liver."""
    return dataset(targets, seed, MARKERS_AND_LIVER, (0.7, 1.4))


def test_cells_of_a_reference_profile_that_is_no_label_are_novel_in_a_panel_too():
    profiles = np.hstack([np.repeat(MARKERS_AND_LIVER[[0, LIVER]], 2, axis=1), np.full((2, N_OTHERS), 5.0)]) + 0.1
    meanings = np.array([[1, 0, 0, 0, 0], [0, 0, 0, 0, 1.0]])
    reference = Reference(csr_matrix(profiles.astype(np.float32)), np.arange(profiles.shape[1]), meanings, 4)
    train = [wide_dataset([0, 1, 2, 3], 0), wide_dataset([0, 1, 2, 3], 1)]
    readout, labels = left_out.fit_known(train, MEANINGS, reference)
    assert (labels.tolist(), readout.num_others, readout.bias.shape) == ([0, 1, 2, 3], 1, (4,))
    known, liver = wide_dataset([0, 1, 2, 3], 2), wide_dataset([LIVER], 3)
    for genes in (np.arange(30), np.arange(16)):  # a panel without half of the common genes
        panel = readout.for_genes(genes)
        novelty = [panel.novelty(Cells.from_csr(data.counts, np.arange(30)), [[1, 2]]) for data in (known, liver)]
        of_label, of_term = np.concatenate(novelty).T
        assert np.median(of_label[:120]) < 0.2
        assert np.quantile(of_label[:120], 0.95) < 0.7 < np.quantile(of_label[120:], 0.05)
        assert np.isinf(of_term[:30]).all()  # B cells, which are no T cells
        assert np.median(of_term[30:90]) < 0.2
    with pytest.raises(ValueError, match="no other cells"):
        left_out.fit_known(train, MEANINGS)[0].for_genes().novelty(Cells.from_csr(known.counts, np.arange(30)))
    assert reference.without(0).meanings.tolist() == [[0, 0, 0, 0, 1]]


def scaled_to_two_genes(cells: np.ndarray) -> dict[str, np.ndarray]:
    """A group of each cell, of a label of its own, scaled to a panel of the first two of three genes."""
    logs, half = np.log1p(cells), np.full(2, 0.5)
    arrays = {"groups": logs, "group_labels": np.eye(2), "group_weights": half, "bias": np.zeros(2)}
    return scale_groups(arrays | {"group_mean": logs.mean(axis=0)}, np.array([True, True, False]))


def test_a_type_that_expresses_more_of_a_panel_has_lower_values_in_each_gene_of_it():
    cells = np.array([[9.0, 1, 10], [1, 1, 18]])  # ten and two of twenty counts are of the first two genes
    scaled = scaled_to_two_genes(cells)
    panel = np.expm1(scaled["groups"])[:, :2]
    np.testing.assert_allclose(panel, [[5.4, 0.6], [3, 3]])  # six counts, the mean of ten and two, in each cell
    np.testing.assert_allclose(scaled["group_mean"], scaled["groups"].mean(axis=0))


def test_a_group_below_no_expression_in_a_gene_has_none_at_any_scale():
    cells = np.array([[0.1, -0.05, 99.95], [10, 5, 85]])  # the panel has a thousandth of the first cell
    scaled = scaled_to_two_genes(cells)
    panel = np.expm1(scaled["groups"])[:, :2]
    np.testing.assert_allclose(panel[0], [7.55, 0], atol=0.02)  # half of 15 + 0.1 counts
    assert np.isfinite(scaled["group_mean"]).all()


def test_a_novel_cell_gets_a_broader_term_that_is_not_novel_and_else_none():
    unit, novelty = 0.6, np.array([[0.05, 0.05], [0.5, 0.05], [np.inf, 0.9]])
    broader = first_term(novelty, unit)
    assert broader.tolist() == [0, 1, -1]
    terms = [{"id": "CL:0000084", "name": "T cell", "labels": ["CD4", "CD8"]}]
    terms += [{"id": "CL:0000542", "name": "lymphocyte", "labels": ["CD4", "CD8", "B"]}]
    sure = np.tile([0.7, 0.2, 0.05, 0.05], (3, 1))
    columns = choose_labels(
        sure, ["CD4", "CD8", "B", "mast cell"], {}, novelty=np.full(3, 2.0), terms=terms, broader=broader
    )
    assert columns["cell_type"].tolist() == ["T cell", "lymphocyte", UNKNOWN]
    np.testing.assert_allclose(columns["score"], [0.9, 0.95, 0.7])


def test_a_cell_is_judged_with_the_cells_of_the_most_similar_scores_alike_in_any_batch():
    rng = np.random.default_rng(0)
    scores = rng.normal(0, 0.3, (300, 9)).astype(np.float32)
    novelty = rng.normal(0.5, 0.2, 300).astype(np.float32)
    file = Neighbours(Neighbours.of_scores(scores), novelty)
    added = file.difference(scores, novelty)
    one_by_one = [file.difference(scores[i : i + 1], novelty[i : i + 1])[0] for i in range(300)]
    np.testing.assert_array_equal(added, one_by_one)
    np.testing.assert_array_equal(file.difference(scores + 1, novelty), added)  # what all labels have in common
    steps = np.rint(SCORE_STEPS * (scores - scores.mean(axis=1, keepdims=True, dtype=float)))
    nearest = NearestNeighbors(n_neighbors=N_NEIGHBOURS).fit(steps).kneighbors(steps, return_distance=False)
    expected = NEIGHBOUR_WEIGHT * (novelty[nearest].mean(axis=1) - novelty)
    assert np.isclose(added, expected, atol=1e-6).mean() > 0.98  # but where two are equally far
    equal = Neighbours(np.zeros((10, 2), np.int16), np.arange(10, dtype=np.float32))
    np.testing.assert_allclose(equal.difference(np.zeros((1, 2)), np.zeros(1)), NEIGHBOUR_WEIGHT * 4.5)  # all ten


def test_known_and_new_cells_are_told_apart_better_with_the_cells_of_their_file():
    rng = np.random.default_rng(0)
    new = np.repeat([False, True], 200)
    scores = np.where(new[:, None], [0.4, 0.4, 0], [1.0, 0, 0]) + rng.normal(0, 0.1, (400, 3))
    novelty = (0.5 * new + rng.normal(0, 0.5, 400)).astype(np.float32)
    cells = LeftOut(
        scores.astype(np.float32), np.zeros(400, int), np.zeros(400, int), np.arange(400), novelty, None, scores
    )
    cells = left_out.with_neighbours(replace(cells, of_terms=np.zeros((400, 0), np.float32)))
    assert roc_auc_score(new, novelty) < 0.8 < 0.9 < roc_auc_score(new, cells.novelty)


@pytest.mark.parametrize("mixes", [True, False])
def test_labels_of_a_panel_have_the_mean_weights_of_groups_on_its_scale_and_as_they_are(mixes):
    train = [wide_dataset([0, 1, 2, 3], 0), wide_dataset([0, 1, 2, 3], 1)]
    readout, _ = left_out.fit_known(train, MEANINGS)
    readout.mixes_panels = mixes  # older checkpoints do not
    arrays, here = readout.arrays(), np.arange(30) < 6
    scaled, plain = (solve_groups(a, here)[0] for a in (scale_groups(arrays, here), arrays))
    expected = (scaled + plain) / 2 if mixes else scaled
    assert np.abs(scaled - plain).max() > 1e-3
    np.testing.assert_allclose(readout.for_genes(np.arange(6)).weights, expected.T, atol=1e-6)
    scale = readout.for_genes(np.arange(28)).weights  # nearly all of the expression
    np.testing.assert_allclose(
        scale, solve_groups(scale_groups(arrays, np.arange(30) < 28), np.arange(30) < 28)[0].T, atol=1e-6
    )


def test_the_name_of_a_profile_is_the_type_without_gene_and_tissue():
    assert type_name("B cell (Plasmocyte)_IGHG3 high_AdultColon1") == "b cell (plasmocyte)"
    assert type_name("Loop of henle _SPP1 high_AdultKidney2") == "loop of henle"


def test_numbers_come_from_datasets_that_are_not_judged_by_them(datasets, cells, monkeypatch):
    sources = evaluation.Sources(["one", "two", "three"], datasets, TYPES, MEANINGS)
    seen, real = [], left_out.calibrate

    def calibrate(cells, with_others=False):
        seen.append(set(cells.datasets))
        return real(cells, with_others)

    monkeypatch.setattr(left_out, "calibrate", calibrate)
    evaluation.leave_datasets_out(sources, cells, [[0], [1], [2]])
    assert seen == [{1, 2}, {0, 2}, {0, 1}]


def test_temperature_and_least_score_are_those_of_the_cells():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4000, 5))
    truth = (logits + 0.2 * rng.gumbel(size=logits.shape)).argmax(axis=1)  # of the softmax at a temperature of 0.2
    novelty = np.where(np.arange(4000) < 1000, np.nan, 0.5)
    none = np.zeros((4000, 0), dtype=np.float32)
    cells = LeftOut(logits.astype(np.float32), truth, np.zeros(4000, int), np.arange(4000), novelty, none, logits)
    fitted = left_out.calibrate(cells)
    assert fitted["temperature"] == pytest.approx(0.2, rel=0.1)
    assert fitted["doubt"] == 0
    probabilities = left_out.probabilities_of(cells, fitted["temperature"])
    right = probabilities.argmax(axis=1) == truth
    lost = (probabilities.max(axis=1) < least_scores(fitted["min_score"], novelty)) & right
    assert lost.sum() / right.sum() == pytest.approx(left_out.LOST, abs=0.002)
    sure = probabilities[np.arange(4000), truth] >= fitted["label_sets"]["thresholds"][9]
    assert sure.mean() == pytest.approx(0.9, abs=0.01)


def test_a_term_of_half_of_the_labels_is_no_answer_for_a_cell_that_is_like_none():
    names = [f"kind {number} of leukocyte" for number in range(4)] + [f"neuron {number}" for number in range(4)]
    terms = [{"id": "CL:0000738", "name": "leukocyte", "labels": names[:4]}]
    like_none = np.full(8, 0.125) + np.array([0.02, 0, 0, 0, -0.02, 0, 0, 0])
    torn = np.array([0.24, 0.24, 0.24, 0.2, 0.02, 0.02, 0.02, 0.02])
    columns = choose_labels(np.stack([like_none, torn]), names, {}, min_score=0.5, terms=terms)
    assert columns["cell_type"].tolist() == [UNKNOWN, "leukocyte"]


def test_a_least_score_of_0_names_novel_cells_if_the_user_gives_it_and_not_if_it_was_fitted():
    sure, novelty = np.array([[0.9, 0.1], [0.9, 0.1]]), np.array([2.0, 0.0])
    for least, first in ((least_scores(0.0, novelty), UNKNOWN), (None, UNKNOWN), (0, "B"), (0.0, "B")):
        columns = choose_labels(sure, ["B", "T"], {}, least, novelty=novelty)
        assert columns["cell_type"].tolist() == [first, "B"]


def test_the_least_score_of_a_checkpoint_holds_for_its_own_labels_until_another_is_given():
    pipeline, cells = fitted_pipeline(), synthetic_adata(20)
    pipeline.model.config.annotation["min_score"] = 1.1
    own = list(pipeline.model.config.annotation["labels"])
    unknown = {
        name: (pipeline.annotate(cells, **options).obs["scmmgpt_cell_type"] == UNKNOWN).mean()
        for name, options in {"default": {}, "never": {"min_score": 0}, "given": {"labels": own}}.items()
    }
    assert unknown["default"] == 1
    assert unknown["never"] == unknown["given"] == 0


def test_a_dataset_is_judged_by_its_most_variable_genes_alone():
    counts = csr_matrix(np.array([[0.0, 5, 4, 1], [10, 5, 6, 1], [0, 5, 5, 1], [10, 5, 4, 1]]))
    narrow = evaluation.most_variable(Dataset(counts, np.array([0, 1, 2]), np.zeros(4, int)), 1)
    assert narrow.measured.tolist() == [0]  # of genes 0 to 2; gene 3 is not measured
    assert narrow.counts.toarray().tolist() == [[0, 0, 0, 0], [10, 0, 0, 0], [0, 0, 0, 0], [10, 0, 0, 0]]


def test_known_cells_keep_their_names_and_a_label_that_is_left_out_is_reported(datasets, monkeypatch):
    sources = evaluation.Sources(["one", "two", "three"], datasets, TYPES, MEANINGS)
    monkeypatch.setattr(evaluation, "read_sources", lambda folder: sources)
    report = evaluation.evaluate_left_out("folder")
    assert report["known_together"]["n_cells"] == 210
    assert report["known_together"]["accuracy"] > 0.85
    assert report["known_together"]["label_sets"]["0.1"]["coverage"] > 0.8
    (mast,) = report["new"]
    assert (mast["type"], mast["n_cells"]) == ("mast cell", 30)
    assert report["known"]["three"]["auroc_novelty"] == 0.5  # too few cells for a measure
    narrow = evaluation.evaluate_left_out("folder", n_genes=8)["known_together"]  # the markers
    assert narrow["forced_accuracy"] > 0.85
    labels = evaluation.evaluate_left_out("folder", "labels")["known_laboratories"]["labels"]
    assert labels.keys() >= {"B cell", "mast cell"}
    with pytest.raises(ValueError, match="too few to calibrate"):
        evaluation.evaluate_left_out("folder", together=["one", "two"])
    monkeypatch.setattr(left_out, "MIN_CELLS", 20)
    both = evaluation.evaluate_left_out("folder", together=["one", "two"])
    assert set(both["known"]) == {"one", "two"}  # by the third
    with pytest.raises(ValueError, match="no datasets"):
        evaluation.evaluate_left_out("folder", together=["four"])


@pytest.mark.parametrize(("n_genes", "weight"), [(204, 1), (900, PANEL_WEIGHT), (5000, 1)])
def test_what_a_lead_lacks_counts_less_in_a_panel_of_some_hundred_genes(n_genes, weight):
    missing = np.array([[0.5, 0.2], [1.0, 0.1]], dtype=np.float32)
    panel = SimpleNamespace(gene_ids=np.arange(n_genes), novelty=lambda cells, terms, asked: missing)
    cells = Cells.from_csr(csr_matrix(np.ones((2, n_genes), np.float32)), np.arange(n_genes))
    np.testing.assert_allclose(Novelty(None, 1.0, panel).raw(cells), missing * weight, rtol=1e-6)
