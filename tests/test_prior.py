"""What a checkpoint knows of the labels of a file, as the start of the regression that learns them from few cells."""

import tracemalloc

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression

from scmmgpt.cells_scmmgpt import Cells
from scmmgpt.train import prior, readout


GENES, TYPES = 60, ("B cell", "T cell", "monocyte")
TERMS = [
    {"id": "CL:0000542", "names": ["lymphocyte"], "labels": ["B cell", "T cell"]},
    {"id": "CL:0000084", "names": ["t cell"], "labels": ["T cell"]},
]


def cells_of(targets, seed, rate=3):
    """Cells of three types with ten planted markers each."""
    rng = np.random.default_rng(seed)
    rates = np.ones((len(targets), GENES))
    for row, target in enumerate(targets):
        rates[row, 10 * target : 10 * target + 10] = rate
    return Cells.from_csr(csr_matrix(rng.poisson(rates).astype(np.float32)), np.arange(GENES, dtype=np.int32))


@pytest.fixture(scope="module")
def checkpoint():
    """The label readout of 300 cells, its texts, and the annotation of its checkpoint."""
    targets = np.arange(300) % 3
    profiles = readout.profile_matrix(cells_of(targets, 0), GENES)
    rows = np.arange(300)
    data = readout.LabelledProfiles(profiles, targets, 3, rows, rows[:0], profiles[:0])
    model = readout.fit_regression(profiles, targets, 3, readout.DEFAULT_STRENGTH)
    texts = [f"a {name}" for name in TYPES]
    annotation = {"labels": dict(zip(TYPES, texts, strict=True)), "terms": TERMS}
    return readout.fit_label_readout(data, model, 0.5), texts, annotation


def known(checkpoint, names, cells, measured=None):
    measured = np.arange(GENES) if measured is None else measured
    return prior.known_regression(*checkpoint, names, measured, cells, readout.profile_matrix(cells, GENES))


def test_a_label_has_the_scores_of_the_trained_label_that_it_means(checkpoint):
    cells = cells_of(np.arange(30) % 3, 1)
    model = known(checkpoint, ["monocytes", "somatotroph", "CL:0000084", "B-cell"], cells)
    scores = model.scores(readout.profile_matrix(cells, GENES))
    exact = checkpoint[0].for_genes(np.arange(GENES)).scores(cells) / 0.5
    np.testing.assert_allclose(scores[:, [3, 2, 0]], prior.PRIOR_WEIGHT * exact, rtol=1e-3, atol=1e-3)
    assert not scores[:, 1].any()


def test_a_trained_label_belongs_to_the_narrowest_label_that_means_it(checkpoint):
    cells = cells_of(np.arange(30) % 3, 1)
    broad = known(checkpoint, ["lymphocyte", "T cell"], cells)
    alone = known(checkpoint, ["B cell", "T cell"], cells)
    np.testing.assert_allclose(broad.weights, alone.weights)


def test_nothing_is_known_of_a_single_label_or_of_other_genes(checkpoint):
    cells = cells_of(np.arange(30) % 3, 1)
    assert known(checkpoint, ["B cell", "somatotroph", "ionocyte"], cells) is None
    assert known(checkpoint, ["B cell", "T cell"], cells, measured=np.array([GENES + 5])) is None


def test_one_cell_of_each_label_is_enough_for_labels_that_the_checkpoint_knows(checkpoint):
    targets = np.arange(303) % 3
    cells = cells_of(targets, 2)
    profiles = readout.profile_matrix(cells, GENES)
    data = readout.LabelledProfiles(profiles, targets, 3, np.arange(3), np.empty(0, dtype=int), profiles[:0])
    alone = readout.fit_regressions(data, 1).everything
    data.prior = known(checkpoint, list(TYPES), cells)
    beside = readout.fit_regressions(data, 1).everything
    right = [(model.scores(profiles).argmax(axis=1) == targets)[3:].mean() for model in (alone, beside)]
    assert right[1] > right[0] + 0.05


def test_cells_without_a_label_help_beside_what_the_checkpoint_knows(checkpoint):
    """Of three types with one labelled cell each, the checkpoint knows two."""
    targets = np.arange(303) % 3
    cells = cells_of(targets, 2, rate=2.2)
    profiles = readout.profile_matrix(cells, GENES)
    data = readout.LabelledProfiles(profiles[:3], targets[:3], 3, np.arange(3), np.empty(0, dtype=int), profiles[3:])
    spread = readout.fit_regressions(data, 1)
    data.prior = known(checkpoint, ["B cell", "T cell", "ionocyte"], cells)
    both = readout.fit_regressions(data, 1)
    data.unlabelled = profiles[:0]
    beside = readout.fit_regressions(data, 1)
    assert (spread.strength, both.strength) == (readout.SPREAD, readout.KNOWN_SPREAD)
    right = [(fit.everything.scores(profiles).argmax(axis=1) == targets)[3:].mean() for fit in (spread, beside, both)]
    assert right[2] > max(right[:2]) + 0.03, right


def test_the_regression_on_components_needs_no_memory_of_pairs_of_cells():
    targets = np.arange(6000) % 3
    points = np.random.default_rng(0).normal(size=(6000, 5)) / readout.PROFILE_SCALE
    tracemalloc.start()
    readout.fit_beside(points, targets, 3, 0.01, np.zeros((6000, 3)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6000 * 6000  # bytes; 288 MB for all pairs


def test_cells_that_contradict_the_checkpoint_are_believed(checkpoint):
    """A file whose "B cell" are the monocytes of the checkpoint."""
    targets = np.arange(300) % 3
    cells = cells_of(targets, 3)
    profiles = readout.profile_matrix(cells, GENES)
    data = readout.LabelledProfiles(profiles, targets, 3, np.arange(60), np.empty(0, dtype=int), profiles[60:])
    data.prior = known(checkpoint, ["monocyte", "B cell", "T cell"], cells)
    chosen = readout.fit_regressions(data)
    assert chosen.strength not in (readout.KNOWN, readout.KNOWN_COMPONENTS)
    assert (chosen.everything.scores(profiles).argmax(axis=1) == targets).mean() > 0.9


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_the_regression_beside_nothing_is_that_of_scikit_learn(kind):
    targets = np.arange(90) % 3
    profiles = readout.profile_matrix(cells_of(targets, 4), GENES)
    profiles = profiles if kind == "sparse" else profiles.toarray()
    exact = LogisticRegression(C=0.01, class_weight="balanced", max_iter=10_000, tol=1e-9)
    exact.fit(profiles * readout.PROFILE_SCALE, targets)
    reference = readout.linear_model(exact.coef_, exact.intercept_, exact.classes_, 4)
    found = readout.fit_beside(profiles, targets, 4, 0.01, np.zeros((90, 4)))
    np.testing.assert_allclose(found.weights, reference.weights, atol=0.02 * abs(reference.weights).max())
    probabilities = [softmax(model.scores(profiles), axis=1) for model in (found, reference)]
    np.testing.assert_allclose(*probabilities, atol=0.01)
