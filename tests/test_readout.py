"""The profile readout: regressions on profiles, label spreading, and what turns scores into the shared space."""

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from sklearn.semi_supervised import LabelSpreading

from scmmgpt.train import readout


def planted_profiles(targets, n_markers=10, rate=4.0):
    """Profiles of cells in which every label has its own `n_markers` genes."""
    rng = np.random.default_rng(0)
    rates = np.ones((targets.max() + 1, (targets.max() + 1) * n_markers))
    for label, row in enumerate(rates):
        row[label * n_markers : (label + 1) * n_markers] = rate
    profiles = np.sqrt(rng.poisson(rates[targets] * 3))
    return csr_matrix(profiles / np.linalg.norm(profiles, axis=1, keepdims=True))


def divided(profiles, targets, train, validation, unlabelled=None):
    unlabelled = profiles[:0] if unlabelled is None else unlabelled
    return readout.LabelledProfiles(profiles, targets, targets.max() + 1, train, validation, unlabelled)


def test_a_readout_meets_the_scores_of_the_regression_exactly():
    torch.manual_seed(0)
    texts = torch.nn.functional.normalize(torch.randn(3, 8), dim=-1)
    model = readout.LinearModel(np.random.default_rng(0).normal(size=(3, 5)), np.array([0.1, -0.2, 0.1]))
    weights, bias = readout.readout_of(model, texts)
    np.testing.assert_allclose((weights @ texts.T).numpy(), model.weights.T, atol=1e-5)
    np.testing.assert_allclose((bias @ texts.T).numpy(), model.bias, atol=1e-5)


def test_labels_spread_to_neighbours_without_one():
    rng = np.random.default_rng(0)
    types = np.arange(120) % 2
    rates = np.ones((2, 60))
    rates[0, :30], rates[1, 30:] = 2.0, 2.0
    profiles = np.sqrt(rng.poisson(rates[types]))
    profiles = csr_matrix(profiles / np.linalg.norm(profiles, axis=1, keepdims=True))
    shown, hidden = np.arange(2), np.arange(2, 120)
    data = readout.LabelledProfiles(profiles[shown], types[shown], 2, shown, shown[:0], profiles[hidden])
    spread = readout.FileComponents.of(data, shown, readout.SPREAD_COMPONENTS).fit_spread()
    alone = readout.fit_regression(profiles[shown], types[shown], 2, readout.DEFAULT_STRENGTH)

    def accuracy(model):
        return (model.scores(profiles[hidden]).argmax(axis=1) == types[hidden]).mean()

    assert accuracy(spread) > accuracy(alone) + 0.1


def test_a_label_has_the_same_weight_however_many_cells_it_has():
    """Five copies of each cell of a label change nothing but the total weight, which the strength makes up for."""
    targets = np.arange(90) % 3
    profiles = planted_profiles(targets, rate=1.3)
    rows = np.concatenate([np.arange(90), np.repeat(np.flatnonzero(targets == 0), 4)])
    alone = readout.fit_regression(profiles, targets, 3, 0.01)
    repeated = readout.fit_regression(profiles[rows], targets[rows], 3, 0.01 * 90 / len(rows))
    np.testing.assert_allclose(repeated.scores(profiles), alone.scores(profiles), atol=0.02)


@pytest.mark.parametrize("turns", [[0, 0, 0, 1], [0, 0, 1, 2, 3]])
def test_the_strength_is_that_of_the_lowest_validation_loss_and_both_fits_are_at_it(turns):
    targets, n_labels = np.resize(turns, 200), max(turns) + 1
    profiles = planted_profiles(targets, rate=1.3)
    train, validation = np.arange(140), np.arange(140, 200)
    found = readout.fit_regressions(divided(profiles, targets, train, validation))
    assert found.strength == min(found.losses, key=found.losses.get)
    for model, rows in ((found.train, train), (found.everything, np.arange(200))):
        alone = readout.fit_regression(profiles[rows], targets[rows], n_labels, found.strength)
        np.testing.assert_allclose(model.scores(profiles), alone.scores(profiles), atol=0.05)
    for strength, loss in found.losses.items():
        model = readout.fit_regression(profiles[train], targets[train], n_labels, strength)
        expected = readout.modest_loss(model.scores(profiles[validation]), targets[validation])
        assert loss == pytest.approx(expected, abs=2e-3)


def test_a_label_that_only_held_out_cells_have_is_neither_likely_nor_unlikely():
    targets = np.arange(200) % 4
    profiles = planted_profiles(targets)
    train, validation = np.flatnonzero(targets[:140] < 3), np.arange(140, 200)
    found = readout.fit_regressions(divided(profiles, targets, train, validation))
    assert not found.train.weights[3].any()
    np.testing.assert_allclose(found.train.scores(profiles)[:, :3].sum(axis=1), 0, atol=1e-6)
    right = found.everything.scores(profiles).argmax(axis=1) == targets
    assert right.mean() > 0.95


def test_labels_that_no_held_out_cell_has_do_not_stop_the_choice():
    targets = np.arange(200) % 4
    profiles = planted_profiles(targets)
    train, validation = np.arange(140), 140 + np.flatnonzero(targets[140:] < 3)
    found = readout.fit_regressions(divided(profiles, targets, train, validation))
    assert np.mean(found.train.scores(profiles).argmax(axis=1) == targets) > 0.95


def test_every_label_has_the_same_weight_when_labels_spread():
    """A label of one cell gets more of its cluster than by the largest share alone, which labels of many cells win."""
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.normal(0, 1, (60, 2)), rng.normal(4, 1, (60, 2))])
    targets = np.full(120, -1)
    targets[:10], targets[60] = 0, 1
    graph = readout.neighbour_graph(points)
    spread = readout.spread_labels(graph, targets, np.zeros((120, 2)), readout.SPREAD_SHARE)
    largest = LabelSpreading(kernel=lambda *_: graph, alpha=readout.SPREAD_SHARE).fit(points, targets)
    assert (spread[targets >= 0] == targets[targets >= 0]).all()
    assert np.mean(spread[60:] == 1) > np.mean(largest.transduction_[60:] == 1)


def test_cells_that_no_label_reaches_have_none():
    points = np.concatenate([np.random.default_rng(0).normal(0, 1, (20, 2)) + 100 * i for i in range(3)])
    targets = np.full(60, -1)
    targets[0], targets[20] = 0, 1
    spread = readout.spread_labels(readout.neighbour_graph(points), targets, np.zeros((60, 2)), 0.5)
    assert spread.tolist() == [0] * 20 + [1] * 20 + [-1] * 20


def test_few_cells_choose_a_strength_by_their_number():
    targets = np.arange(12) % 3
    profiles = planted_profiles(targets)
    rows = np.arange(12)
    assert readout.fit_regressions(divided(profiles, targets, rows, rows[:0])).strength == readout.DEFAULT_STRENGTH
    one = readout.fit_regressions(divided(profiles, targets, rows[:3], rows[:0]), shots=1)
    assert one.strength == readout.ONE_SHOT_STRENGTH
    many = divided(profiles, targets, rows[:3], rows[:0], unlabelled=profiles[3:])
    assert readout.fit_regressions(many, shots=1).strength == readout.SPREAD


def few_labels(activity):
    """Forty labelled and 200 unlabelled cells of two types, with 30 programs of genes that vary within both types."""
    rng = np.random.default_rng(0)
    targets = np.arange(240) % 2
    programs = rng.gamma(0.5, activity, (240, 30))
    markers = np.where(np.arange(2) == targets[:, None], 4, 1)
    rates = 1 + np.concatenate([np.repeat(programs, 5, axis=1), np.repeat(markers, 15, axis=1)], axis=1)
    profiles = np.sqrt(rng.poisson(rates))
    profiles = csr_matrix(profiles / np.linalg.norm(profiles, axis=1, keepdims=True))
    rows = np.arange(40)
    data = readout.LabelledProfiles(profiles[:40], targets[:40], 2, rows, rows[:0], profiles[40:])
    return data, profiles[40:], targets[40:]


def test_labels_do_not_spread_where_cross_validation_says_that_neighbours_do_not_share_them():
    data, cells, targets = few_labels(activity=20)
    found = readout.fit_regressions(data, shots=20)
    assert set(found.losses) == {readout.DEFAULT_STRENGTH, readout.COMPONENTS, readout.SPREAD}
    assert found.strength == min(found.losses, key=found.losses.get)
    spread = readout.FileComponents.of(data, data.train, readout.SPREAD_COMPONENTS).fit_spread()
    chosen, of_spread = (np.mean(m.scores(cells).argmax(axis=1) == targets) for m in (found.train, spread))
    assert chosen > of_spread + 0.1


def test_regressions_are_averaged_by_their_losses(monkeypatch):
    data, cells, targets = few_labels(activity=5)
    mean = readout.fit_regressions(data, shots=20)
    with monkeypatch.context() as patched:
        patched.setattr(readout, "LOSS_SCALE", 1e6)
        best = readout.fit_regressions(data, shots=20)
    components = readout.FileComponents.of(data, data.train, readout.N_COMPONENTS)
    alone = {
        readout.DEFAULT_STRENGTH: readout.fit_regression(data.profiles, data.targets, 2, readout.DEFAULT_STRENGTH),
        readout.COMPONENTS: components.fit(data.train),
        readout.SPREAD: components.fit_spread(),
    }
    assert mean.losses == best.losses
    assert best.strength == min(best.losses, key=best.losses.get)
    np.testing.assert_allclose(best.train.scores(cells), alone[best.strength].scores(cells), rtol=1e-6)
    losses = {name: readout.calibrated_loss(model.scores(cells), targets) for name, model in alone.items()}
    assert readout.calibrated_loss(mean.train.scores(cells), targets) < losses[best.strength], losses


def test_one_cell_of_each_label_has_factors():
    """Their mean is their weighted sum, so that they map a vector of ones to exactly 0."""
    profiles = csr_matrix(np.eye(16, 40) + np.eye(16, 40, 3)) * readout.PROFILE_SCALE
    mean = np.asarray(profiles.mean(axis=0)).ravel()
    factors, rest = readout.principal_factors(profiles, mean, np.full(16, 1 / 16))
    centred = (profiles.toarray() - mean) / 4
    np.testing.assert_allclose(factors.T @ factors, centred.T @ centred, atol=1e-6 * readout.PROFILE_SCALE**2)
    assert rest.max() < 1e-6 * readout.PROFILE_SCALE**2


def test_the_only_cell_of_a_label_is_never_held_out():
    data, cells, targets = few_labels(activity=0)
    data.targets[0], data.n_labels = 2, 4  # and one without a cell
    found = readout.fit_regressions(data, shots=20)
    assert np.isfinite(list(found.losses.values())).all()
    scores = found.train.scores(cells)
    assert scores.shape == (200, 4)
    assert np.mean(scores[:, :2].argmax(axis=1) == targets) > 0.9
