"""Baselines, and the three tasks that put them beside a model, on synthetic cells with planted markers."""

import numpy as np
import pytest
from scipy import sparse
from sklearn.linear_model import LogisticRegression

from scmmgpt.eval import baselines, description, realism
from scmmgpt.eval.annotation import evaluate_annotation, hierarchical_f1
from scmmgpt.eval.cells import LabelledCells
from scmmgpt.eval.description import evaluate_descriptions
from scmmgpt.eval.generation import GeneratedCells, draw_real_cells, draw_systems, evaluate_generation, halve
from scmmgpt.eval.metrics.text_discrepancy.text_discrepancy import cell_types_in_text
from scmmgpt.eval.results import (
    BASELINE,
    MODEL,
    MODEL_NAME,
    Estimate,
    Measure,
    bootstrap_draws,
    mean_estimate,
    tabulate,
)
from scmmgpt.synthetic import synthetic_adata


def labelled(n_obs, seed):
    adata = synthetic_adata(n_obs, seed=seed, mean_total=100.0)
    # Padding genes that are never expressed: a matrix as wide as real ones, with empty columns.
    counts = sparse.hstack([adata.X, sparse.csr_matrix((n_obs, 20))], format="csr").astype(np.float32)
    return LabelledCells(
        counts=counts,
        total_counts=np.asarray(counts.sum(1)).ravel(),
        genes=np.array([*adata.var_names, *(f"EMPTY{i}" for i in range(20))]),
        labels=adata.obs["cell_type"].to_numpy().astype(str),
        names=np.array([f"{seed}-{name}" for name in adata.obs_names]),
    )


@pytest.fixture(scope="module")
def train():
    return labelled(120, seed=0)


@pytest.fixture(scope="module")
def test():
    return labelled(60, seed=1)


def rows(result, metric):
    return {row["system"]: row["value"] for row in result["rows"] if row["metric"] == metric}


# Types


def test_majority_class_is_the_most_frequent_training_type():
    prediction = baselines.majority_class(["a", "b", "b", "c"], 3)
    assert prediction.labels.tolist() == ["b", "b", "b"]
    assert prediction.confidences.tolist() == [0.5, 0.5, 0.5]


def test_logistic_regression_is_sklearns_with_the_chosen_penalty_and_learns_the_planted_types(train, test):
    prediction = baselines.logistic_regression(train.expression, train.labels, test.expression)
    theirs = LogisticRegression(C=prediction.choices["C"], max_iter=500).fit(train.expression, train.labels)
    np.testing.assert_array_equal(prediction.labels, theirs.predict(test.expression))
    assert (prediction.labels == test.labels).mean() > 0.9
    assert prediction.confidences.shape == (60,)
    scaled = baselines.logistic_regression(train.expression, train.labels, test.expression[:5] * 3)
    assert scaled.choices == prediction.choices  # the penalty does not depend on the cells to predict


def test_a_type_with_a_single_training_cell_can_be_learnt(train, monkeypatch):
    monkeypatch.setattr(baselines, "INVERSE_PENALTIES", (100.0,))
    labels = train.labels.copy()
    labels[0] = "once"
    prediction = baselines.logistic_regression(train.expression, labels, train.expression[:1])
    assert prediction.labels.tolist() == ["once"]


def test_too_few_cells_for_a_validation_part_are_refused():
    with pytest.raises(ValueError, match="3 training cells of 2 types are too few"):
        baselines.logistic_regression(np.eye(3), ["a", "a", "b"], np.eye(3))


def test_nearest_centroid_by_hand():
    x = np.array([[0.0, 0.0], [0.0, 2.0], [10.0, 0.0]])
    prediction = baselines.nearest_centroid(x, ["a", "a", "b"], np.array([[1.0, 1.0], [9.0, 0.0]]))
    assert prediction.labels.tolist() == ["a", "b"]


def test_nearest_centroid_is_the_same_for_sparse_and_dense(train, test):
    ours = baselines.nearest_centroid(train.expression, train.labels, test.expression)
    theirs = baselines.nearest_centroid(train.expression.toarray(), train.labels, test.expression.toarray())
    np.testing.assert_array_equal(ours.labels, theirs.labels)


# Texts


def test_shuffling_keeps_the_answers_and_not_their_places():
    values = [f"text {i}" for i in range(50)]
    shuffled = baselines.shuffled(values)
    assert sorted(shuffled) == sorted(values)
    assert (shuffled != np.array(values, dtype=object)).mean() > 0.8


def test_training_captions_come_from_cells_of_the_label():
    texts = baselines.training_captions(["b", "a", "b"], ["a", "b", "b"], ["of a", "of b", "also of b"])
    assert texts[1] == "of a"
    assert {texts[0], texts[2]} <= {"of b", "also of b"}


def test_an_unseen_type_is_named_in_the_error():
    with pytest.raises(ValueError, match="No training cell is of type 'c'"):
        baselines.sample_rows(["c"], ["a", "b"])


# Cells


def test_mean_cells_are_the_mean_profile_of_their_type(train):
    cells = baselines.mean_cells(["B cell", "T cell", "B cell"], train)
    theirs = train.expression.toarray()[train.labels == "B cell"].mean(0)
    np.testing.assert_allclose(cells[0], theirs, rtol=1e-5)
    np.testing.assert_array_equal(cells[0], cells[2])


def test_poisson_cells_have_the_profile_of_their_type_and_differ(train):
    cells = baselines.poisson_cells(["B cell"] * 400, train)
    of_type = train.labels == "B cell"
    share = np.asarray(train.counts[of_type].sum(0)).ravel() / train.total_counts[of_type].sum()
    np.testing.assert_allclose(np.expm1(cells).mean(0) / 1e4, share, atol=0.01)
    assert len(np.unique(cells, axis=0)) == 400


def test_real_cells_are_drawn_once_each(train):
    prompts = np.array(["T cell"] * 5 + ["B cell"] * 100)
    drawn = draw_real_cells(prompts, train, np.random.default_rng(0))
    assert (drawn.prompts == "T cell").sum() == 5
    assert (drawn.prompts == "B cell").sum() == 30  # all that there are
    pool = train.expression.toarray()[train.labels == "T cell"]
    assert all((pool == cell).all(1).any() for cell in drawn.expression[drawn.prompts == "T cell"])
    assert len(np.unique(drawn.expression, axis=0)) == len(drawn.prompts)


# Tables


def test_interval_of_a_mean_has_the_width_of_the_normal_one():
    values = np.r_[np.zeros(200), np.ones(200)]
    low, high = mean_estimate(values, bootstrap_draws(400, n_resamples=4000)).interval
    assert (low, high) == pytest.approx((0.5 - 1.96 * 0.025, 0.5 + 1.96 * 0.025), abs=0.005)


def test_a_difference_on_the_same_cells_is_paired():
    draws = bootstrap_draws(100)
    right = np.r_[np.ones(60), np.zeros(40)]
    almost = np.r_[np.ones(55), np.zeros(45)]  # wrong on five cells more, and nowhere else
    table = tabulate(
        {"accuracy": Measure("accuracy", True, "")},
        {"ours": MODEL, "theirs": BASELINE},
        {"ours": {"accuracy": mean_estimate(right, draws)}, "theirs": {"accuracy": mean_estimate(almost, draws)}},
    )
    (comparison,) = table["comparisons"]
    assert comparison["difference"] == pytest.approx(0.05)
    assert comparison["verdict"] == "better"
    assert comparison["ci"][1] < 0.12


def test_lower_is_better_turns_the_sign():
    table = tabulate(
        {"distance": Measure("distance", False, "")},
        {"ours": MODEL, "theirs": BASELINE},
        {name: {"distance": Estimate(v, 3, np.full(10, v))} for name, v in (("ours", 2.0), ("theirs", 1.0))},
    )
    assert table["comparisons"][0]["difference"] == -1
    assert table["comparisons"][0]["verdict"] == "worse"


# Tasks


def test_annotation_stands_beside_its_baselines(train, test):
    result = evaluate_annotation(test.labels, test.labels, train, test, confidences=np.ones(60), n_resamples=200)
    accuracy = rows(result, "accuracy")
    assert accuracy[MODEL_NAME] == 1
    assert accuracy["majority class"] == 0.25
    assert accuracy["shuffled labels"] < 0.5 < accuracy["logistic regression"]
    assert rows(result, "ece")[MODEL_NAME] == 0
    assert np.trace(result["confusion"]["counts"]) == 60
    verdicts = {c["system"]: c["verdict"] for c in result["comparisons"] if c["metric"] == "accuracy"}
    assert verdicts["majority class"] == verdicts["shuffled labels"] == "better"


def test_a_relative_in_the_ontology_is_partly_right(train, test):
    named = {
        name: baselines.TypePrediction(np.array([name])) for name in ("B cell", "lymphocyte", "neuron", "Unknown")
    }
    result = evaluate_annotation(["B cell"], ["B cell"], train, test.take([0]), others=named, n_resamples=9)
    shares = rows(result, "hierarchical_f1")
    assert shares["B cell"] == 1
    assert 1 > shares["lymphocyte"] > 0.5 > shares["neuron"] >= shares["Unknown"] == 0


def test_an_id_that_is_no_term_makes_no_relatives(train, test):
    ids = {"a": "unknown", "b": "unknown"}
    score = hierarchical_f1(np.array(["a", "b"]), np.array(["b", "a"]), ids, np.ones((1, 2)))
    assert score.value == 0


def test_missing_predictions_are_wrong_not_dropped(train, test):
    guess = test.labels.astype(object)
    guess[:15] = None
    result = evaluate_annotation(guess, test.labels, train, test, n_resamples=50)
    assert rows(result, "accuracy")[MODEL_NAME] == 0.75
    assert result["confusion"]["columns"][-1] == "unknown"


def letters(texts):
    """An embedder for tests: letter counts, unit length."""
    counts = np.array(
        [[text.count(letter) for letter in "abcdefghijklmnopqrstuvwxyzBT"] for text in texts], dtype=float
    )
    return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1)


TEXTS = {
    "label_text": "cell type: {}.".format,
    "parse": lambda text, labels: next(iter(cell_types_in_text(text, labels)), None),
    "embed": letters,
}


def test_descriptions_stand_beside_looked_up_captions(train, test):
    references = [f"This cell is of the type {label}, from blood." for label in test.labels]
    result = evaluate_descriptions(
        references,
        references,
        test.labels,
        train.labels,
        baseline_labels=np.roll(test.labels, 1),
        train_texts=[f"A cell: {label}." for label in train.labels],
        n_resamples=200,
        **TEXTS,
    )
    named = rows(result, "named_type_accuracy")
    assert named[MODEL_NAME] == named["label-only caption, true label"] == 1
    assert named["label of logistic regression"] == 0
    assert named["shuffled descriptions"] < 0.5
    assert rows(result, "bleu")[MODEL_NAME] == pytest.approx(100)
    assert {sample["cell_type"] for sample in result["samples"][:4]} == set(test.labels)
    for row in result["rows"]:
        assert row["ci"] is None or row["ci"][0] - 1e-9 <= row["value"] <= row["ci"][1] + 1e-9


def test_an_empty_description_names_nothing(train, test):
    texts = ["" for _ in test.labels]
    references = [f"A {label}." for label in test.labels]
    result = evaluate_descriptions(texts, references, test.labels, train.labels, n_resamples=50, **TEXTS)
    assert rows(result, "named_type_accuracy")[MODEL_NAME] == 0
    assert result["parsing"]["no_type_named"] == 1


def test_genes_of_descriptions_are_checked_where_the_references_name_genes(test):
    gene = test.genes[0]
    index = np.flatnonzero(test.counts[:, 0].toarray().ravel() > 0)[0]
    silent = description._checks(test, {}, ["This cell is a B cell."])
    assert set(silent) == {"type_depth"}  # nothing is missing from texts that are to name no gene
    named = description._checks(test, {}, [f"A B cell with {gene}."])
    assert named["grounded"](f"A cell with high levels of {gene}.", index) == 1
    assert named["genes_expressed"]("A cell.", index) == 0


@pytest.fixture(scope="module")
def varied():
    """Training, held-out and generated cells of two types whose genes share a state: 40 genes, 240 cells each."""

    def draw(seed, n=240):
        rng = np.random.default_rng(seed)
        labels = np.repeat(["B cell", "T cell"], n // 2)
        directions = np.random.default_rng(9).normal(0, 0.5, (2, 40))
        base = np.random.default_rng(8).normal(0, 0.5, (2, 40))
        rates = np.exp(base[(labels == "T cell").astype(int)] + rng.normal(size=(n, 2)) @ directions)
        totals = rng.integers(300, 700, n).astype(float)
        counts = rng.poisson(rates / rates.sum(1, keepdims=True) * totals[:, None])
        names = np.array([f"{seed}-{i}" for i in range(n)])
        genes = np.array([f"GENE{i}" for i in range(40)])
        return LabelledCells(sparse.csr_matrix(counts, dtype=np.float32), counts.sum(1), genes, labels, names)

    return draw(0), draw(1), draw(2)


def as_generated(cells):
    return GeneratedCells(cells.expression.toarray(), cells.labels, cells.genes, cells.total_counts)


@pytest.fixture(scope="module")
def of_varied(varied):
    train, test, other = varied
    return evaluate_generation(as_generated(other), train, test, n_resamples=60, n_draws=1)


def test_generated_cells_stand_beside_profiles_and_real_cells(of_varied):
    accuracy, distance = rows(of_varied, "knn_accuracy_5"), rows(of_varied, "energy_distance")
    assert accuracy[MODEL_NAME] > accuracy["shuffled prompts"]
    assert distance[MODEL_NAME] < distance["mean profile + Poisson"] < distance["mean profile"]
    # Other cells of the same kind are as near as training cells, which are the floor.
    assert abs(distance[MODEL_NAME]) < 0.25 * distance["mean profile + Poisson"]
    assert abs(distance["real training cells"]) < 0.25 * distance["mean profile + Poisson"]
    assert "real held-out cells" not in distance
    assert all(row["spread"] >= 0 for row in of_varied["rows"])
    resampled = [row for row in of_varied["rows"] if row["ci"] is not None]
    for row in resampled:
        assert row["ci"][0] - 1e-9 <= row["value"] <= row["ci"][1] + 1e-9
    assert {row["metric"] for row in resampled} >= {"energy_distance", "mmd2", "knn_accuracy_5"}


def test_without_components_other_cells_are_as_near_as_training_cells_and_a_mean_profile_is_not(of_varied):
    distance = rows(of_varied, "energy_distance_all_genes")
    assert abs(distance[MODEL_NAME]) < 0.25 * distance["mean profile + Poisson"] < distance["mean profile"]
    assert abs(distance["real training cells"]) < 0.25 * distance["mean profile + Poisson"]
    assert "real held-out cells" not in distance  # they are the cells compared with


def test_a_few_draws_of_the_same_cells_give_no_interval_and_no_verdict(of_varied):
    for name in ("two_sample_auc", "diversity", "detected_genes", "gene_correlation"):
        assert all(row["ci"] is None for row in of_varied["rows"] if row["metric"] == name), name
    verdicts = [c["verdict"] for c in of_varied["comparisons"] if c["metric"] == "two_sample_auc"]
    assert set(verdicts) == {"unclear"}


def test_independent_noise_around_one_mean_has_little_diversity(of_varied):
    diversity = rows(of_varied, "diversity")
    assert diversity["mean profile"] == pytest.approx(0, abs=1e-6)
    assert diversity["mean profile + Poisson"] < 0.4
    assert 0.6 < diversity[MODEL_NAME] < 1.5
    assert 0.6 < diversity["real training cells"] < 1.5


def test_cells_that_share_a_state_are_correlated_like_real_cells(of_varied):
    for name in ("gene_correlation", "largest_eigenvalue"):
        values = rows(of_varied, name)
        assert values[MODEL_NAME] == pytest.approx(values["real held-out cells"], rel=0.15)
        assert values["mean profile + Poisson"] < 0.7 * values["real held-out cells"]


def test_copies_of_training_cells_have_no_distance_to_them(varied, of_varied):
    train, test, _ = varied
    copied = evaluate_generation(as_generated(train), train, test, n_resamples=12, n_draws=1)
    near = rows(copied, "nearest_training_cell")
    assert near[MODEL_NAME] == pytest.approx(0, abs=1e-4)
    assert near["real held-out cells"] > 1
    new = rows(of_varied, "nearest_training_cell")
    assert new[MODEL_NAME] == pytest.approx(new["real held-out cells"], rel=0.1)


def test_library_size_zeros_and_genes_stand_beside_those_of_real_cells(varied, of_varied):
    _, test, other = varied
    assert rows(of_varied, "library_size")[MODEL_NAME] == pytest.approx(other.total_counts.mean(), rel=0.05)
    detected, zeros = rows(of_varied, "detected_genes"), rows(of_varied, "zero_fraction")
    assert detected["real held-out cells"] == pytest.approx(test.counts.getnnz(axis=1).mean(), rel=0.05)
    assert zeros["real held-out cells"] == pytest.approx(1 - detected["real held-out cells"] / 40)
    assert "mean profile" not in rows(of_varied, "library_size")


def test_a_classifier_tells_other_cells_apart_but_not_equal_ones():
    rng = np.random.default_rng(0)
    x, same, other = rng.normal(size=(200, 4)), rng.normal(size=(200, 4)), rng.normal(1, 1, size=(200, 4))
    wider = rng.normal(0, 3, size=(200, 4))  # the same mean
    assert realism.two_sample_auc(x, same) == pytest.approx(0.5, abs=0.08)
    assert realism.two_sample_auc(x, other) > 0.8
    assert realism.two_sample_auc(x, wider) > 0.8
    at_home = realism.gromov_wasserstein(x, same)
    assert realism.gromov_wasserstein(x + 9, same) == pytest.approx(at_home)  # absolute places do not count
    assert realism.gromov_wasserstein(x, x) == pytest.approx(0, abs=1e-6)
    assert realism.gromov_wasserstein(x / 2, same) > 2 * at_home


def test_genes_that_follow_one_state_have_one_large_eigenvalue():
    state = np.random.default_rng(0).normal(size=(50, 1))
    assert realism.gene_correlation(state * [1.0, -2.0, 3.0]) == pytest.approx((1, 3))
    mean, largest = realism.gene_correlation(np.column_stack([state, np.zeros(50), np.ones(50)]))
    assert (mean, largest) == pytest.approx((0, 1))


def test_both_halves_of_the_held_out_cells_have_every_type():
    labels = np.repeat(["a", "b"], [10, 7])
    half = halve(labels, seed=0)
    assert (half & (labels == "a")).sum() == 5
    assert (half & (labels == "b")).sum() in (3, 4)


def test_draws_share_no_cell_where_there_are_enough(varied):
    train, test, _ = varied
    cells = as_generated(train)
    numbered = np.arange(720.0)[:, None] * np.ones((1, 40))
    many = GeneratedCells(numbered, np.tile(cells.prompts, 3), cells.genes)
    drawn = [draw_systems(many, train, test, draw, 3, draw)[MODEL_NAME][1] for draw in range(3)]
    assert [len(one.prompts) for one in drawn] == [240, 240, 240]
    assert len(np.unique(np.concatenate([one.expression[:, 0] for one in drawn]))) == 720
    few = draw_systems(cells, train, test, 0, 3, 0)[MODEL_NAME][1]
    assert len(few.prompts) == 240  # all, in every draw


def test_a_type_without_variation_among_real_cells_has_no_diversity(train, test):
    chosen = [np.flatnonzero(test.labels == label)[0] for label in np.unique(test.labels)]
    prompts = np.repeat(np.unique(test.labels), 10)
    generated = GeneratedCells(baselines.poisson_cells(prompts, train), prompts, train.genes)
    result = evaluate_generation(generated, train, test.take(np.repeat(chosen, 8)), n_resamples=12, n_draws=1)
    assert rows(result, "diversity") == {}
    assert "diversity" not in result["per_type"][MODEL_NAME]["B cell"]


def test_genes_may_come_in_any_order(train, test):
    prompts = np.repeat(np.unique(test.labels), 10)
    generated = baselines.poisson_cells(prompts, train)
    order = np.random.default_rng(0).permutation(len(train.genes))
    options = {"n_resamples": 12, "n_draws": 1}
    one = evaluate_generation(GeneratedCells(generated, prompts, train.genes), train, test, **options)
    two = evaluate_generation(GeneratedCells(generated[:, order], prompts, train.genes[order]), train, test, **options)
    assert rows(one, "energy_distance")[MODEL_NAME] == pytest.approx(
        rows(two, "energy_distance")[MODEL_NAME], rel=1e-4
    )


def test_generated_genes_that_no_real_cell_has_are_an_error(train, test):
    with pytest.raises(ValueError, match="share 0 genes"):
        evaluate_generation(GeneratedCells(np.ones((4, 3)), np.repeat("B cell", 4), np.array([*"xyz"])), train, test)


def test_prompts_that_no_real_cell_has_are_an_error(train, test):
    with pytest.raises(ValueError, match="--prompt-key"):
        evaluate_generation(GeneratedCells(np.ones((4, 60)), np.repeat("dragon", 4), train.genes), train, test)
