"""Ours beside the methods of others: sentences of genes, retrieval, clusters, and the whole command in small."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from scipy.sparse import csr_matrix

from scmmgpt.cells_scmmgpt import Cells, hash_names
from scmmgpt.eval import all as comparison
from scmmgpt.eval import baselines, claims, clustering, methods, results, retrieval
from scmmgpt.eval.cells import LabelledCells
from scmmgpt.tests.conftest import TYPES
from scmmgpt.tests.corpora import SIZES, write_corpus


GENES = ["CD19", "CD79A", "MS4A1", "CD3D", "CD3E", "CD2", "LYZ", "CD14", "S100A8"]
GENES += "ACTB B2M FTL FTH1 GAPDH PTMA RPL3 RPS6 RPL5 TMSB4X TPT1 VIM".split()


def counts_of(types, seed=0):
    """Three markers of twenty-one genes are high in each type."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(2.0, (len(types), len(GENES)))
    for row, name in enumerate(types):
        first = 3 * list(TYPES).index(name)
        counts[row, first : first + 3] += rng.poisson(15, 3)
    return counts


def cells_of(types, seed=0):
    counts = counts_of(types, seed)
    names = np.array([f"cell{seed}-{i}" for i in range(len(types))])
    totals = counts.sum(axis=1).astype(float)
    return LabelledCells(csr_matrix(counts, dtype=np.float32), totals, np.array(GENES), np.array(types), names)


def test_a_cell_is_a_sentence_of_its_genes_by_falling_expression():
    counts = csr_matrix(np.array([[0, 5, 9, 1]], dtype=np.float32))
    cells = LabelledCells(counts, np.array([15.0]), np.array(["A", "B", "C", "D"]), np.array(["x"]), np.array(["c"]))
    assert methods.CellSentences.fit(cells).write(cells) == ["C B D"]


def test_a_sentence_is_expression_that_falls_with_the_rank():
    sentences = methods.CellSentences(np.array(["A", "B", "C"]), intercept=3.0, slope=-1.0)
    (values,) = sentences.read(["C nonsense A C"])
    # Three known words; C has ranks 0 and 2, on average 1, and so has A.
    np.testing.assert_allclose(values, [3 - np.log10(2), 0, 3 - np.log10(2)], rtol=1e-6)
    assert not sentences.read([""]).any()


def test_sentences_keep_the_types_of_cells():
    types = [list(TYPES)[i % 3] for i in range(60)]
    train, test = cells_of(types, 0), cells_of(types, 1)
    sentences = methods.CellSentences.fit(train)
    assert sentences.slope < 0
    found = baselines.nearest_centroid(train.expression, train.labels, sentences.read(sentences.write(test)))
    assert (found.labels == test.labels).mean() > 0.9


def test_negative_binomial_cells_have_the_mean_and_the_spread_of_training_cells():
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.gamma(2, 10 / 2, (4000, 20)))  # mean 10, variance 10 + 50
    totals = np.full(4000, 200.0)
    labels, names = np.full(4000, "x"), np.arange(4000).astype(str)
    genes = np.array([f"G{i}" for i in range(20)])
    train = LabelledCells(csr_matrix(counts, dtype=np.float32), totals, genes, labels, names)
    drawn = np.expm1(baselines.negative_binomial_cells(labels, train)) * 200 / 1e4
    np.testing.assert_allclose(drawn.mean(), 10, rtol=0.05)
    np.testing.assert_allclose(drawn.var(axis=0).mean(), 60, rtol=0.1)


def test_retrieval_counts_texts_of_the_type_and_ties_as_misses():
    types = np.array(["B", "B", "T"])
    perfect = (types[:, None] == np.array(["B", "T"])).astype(float)
    found = retrieval.evaluate_retrieval({results.MODEL_NAME: perfect, "constant": perfect * 0}, types, ["B", "T"])
    values = {(row["system"], row["metric"]): row["value"] for row in found["rows"]}
    assert values[results.MODEL_NAME, "cell_to_text_map"] == 1
    assert values[results.MODEL_NAME, "text_to_cell_recall_1"] == 1
    assert values["constant", "cell_to_text_recall_1"] == 0
    assert found["n_texts"] == 2


def test_clusters_that_are_types_and_batches_that_are_mixed_score_best():
    rng = np.random.default_rng(0)
    types, batches = np.repeat(["a", "b"], 60), np.tile(["1", "2"], 60)
    apart = rng.normal(size=(120, 4)) + 20 * (types == "a")[:, None]
    noise = rng.normal(size=(120, 4))
    by_batch = apart + 20 * (batches == "1")[:, None] * np.array([0, 0, 1, -1])
    found = clustering.evaluate_clustering(
        {results.MODEL_NAME: apart, "noise": noise, "batches": by_batch}, types, batches
    )
    values = {(row["system"], row["metric"]): row["value"] for row in found["rows"]}
    assert values[results.MODEL_NAME, "avg_bio"] > 0.9 > 0.5 > values["noise", "avg_bio"]
    assert values[results.MODEL_NAME, "nearest"] == 1
    assert values["noise", "nearest"] == pytest.approx(0.5, abs=0.06)
    assert values[results.MODEL_NAME, "avg_batch"] > 0.9 > values["batches", "avg_batch"]


def test_variable_genes_are_those_that_tell_cells_apart(monkeypatch):
    monkeypatch.setattr(clustering, "N_VARIABLE", 3)
    rng = np.random.default_rng(0)
    rates = np.expm1(rng.uniform(0.5, 3, size=400)) * rng.uniform(0.9, 1.1, size=(60, 400))
    rates[::2, [40, 90, 300]] *= 2  # of the same mean, so that variance alone tells them
    rates[1::2, [40, 90, 300]] = 0
    assert np.flatnonzero(clustering.variable_genes(np.log1p(rates))).tolist() == [40, 90, 300]


def test_a_margin_says_by_how_much_it_is_missed_and_what_was_possible():
    draws = results.bootstrap_draws(4)
    measured = {"ours": np.array([1.0, 1, 1, 1]), "sentences": np.array([1.0, 1, 1, 0])}
    estimates = {name: {"accuracy": results.mean_estimate(values, draws)} for name, values in measured.items()}
    measures = {"accuracy": results.Measure("accuracy", True, "")}
    roles = {"ours": results.MODEL, "sentences": results.BASELINE}
    empty = {"comparisons": [], "rows": []}
    tasks = {"annotation": results.tabulate(measures, roles, estimates), "description": empty, "generation": empty}
    (row,) = claims.find_claims(tasks, "sentences")
    assert row["reached"] == pytest.approx(1 / 3)
    assert row["missed_by"] == 0
    assert row["possible"] == pytest.approx(1 / 3)
    assert "reached |" in claims.markdown_claims([row], "sentences")
    assert row["has_learned"] is None  # no row that knows nothing
    row |= {"reached": 0.1, "missed_by": 0.105, "possible": 0.15}
    assert "missed by 10.5 (at most 15.0 is possible)" in claims.markdown_claims([row], "sentences")


def test_no_share_of_a_discrepancy_by_chance_can_be_saved():
    empty = {"comparisons": [], "rows": []}
    rows = [{"system": name, "metric": "mmd2", "value": 0.001, "ci": [-0.002, 0.004]} for name in ("ours", "theirs")]
    same = {"system": "theirs", "metric": "mmd2", "relative": 0.0, "relative_ci": [-9.0, 9.0]}
    tasks = {"description": {"model": "ours", "rows": rows, "comparisons": [same]}, "annotation": empty}
    (row,) = claims.find_claims(tasks | {"generation": empty}, "theirs")
    assert row["reached"] is None
    assert "| missed: theirs is 0 within the interval |" in claims.markdown_claims([row], "theirs")


def test_a_method_that_is_no_better_than_the_majority_has_not_learned():
    rows = [
        {"system": "majority class", "metric": "accuracy", "value": 0.4, "ci": [0.3, 0.5]},
        {"system": "weak", "metric": "accuracy", "value": 0.45, "ci": None},
        {"system": "strong", "metric": "accuracy", "value": 0.6, "ci": None},
    ]
    judged = [claims.has_learned({"rows": rows}, name, "accuracy", "majority class") for name in ("weak", "strong")]
    assert judged == [False, True]


def document_of(seed, accuracies):
    """What one seed of the command has found: accuracies of ours and of sentences, and four empty tables."""
    values = dict(zip((results.MODEL_NAME, comparison.SENTENCES), accuracies, strict=True))
    draws = results.bootstrap_draws(10)
    right = {name: {"accuracy": results.mean_estimate(np.arange(10) < 10 * x, draws)} for name, x in values.items()}
    roles = {results.MODEL_NAME: results.MODEL, comparison.SENTENCES: results.BASELINE}
    table = results.tabulate({"accuracy": results.Measure("accuracy", True, "")}, roles, right)
    empty = {"measures": {}, "model": results.MODEL_NAME, "rows": [], "comparisons": []}
    tasks = dict.fromkeys(comparison.TASKS, empty) | {"annotation": table}
    about = {
        "seed": seed,
        "seconds": {"scMMGPT": 1.0},
        "n_candidates": 2,
        "corpus": {"path": "c", "splits sha256": ""},
    }
    return {**about, **tasks, "claims": claims.find_claims(tasks, comparison.SENTENCES)}


def test_seeds_are_averaged_with_their_spread_and_each_margin_says_what_each_seed_reached(
    tmp_path, monkeypatch, capsys
):
    accuracies = {3: (0.8, 0.5), 4: (0.6, 0.5)}
    monkeypatch.setattr(comparison, "compare_methods", lambda args, _: document_of(args.seed, accuracies[args.seed]))
    words = ["--corpus", "c", "--output", str(tmp_path), "--seed", "3", "--seeds", "2"]
    assert comparison.main(words) == 0
    shown = capsys.readouterr().out
    assert "seed 3, 4." in shown
    assert "| scMMGPT | 0.700 ± 0.141 [" in shown
    assert "| 0.7000 | 0.5000 | +20.5 | +40.0 [" in shown
    assert "; by seed +60.0, +20.0 | reached |" in shown
    (row,) = json.loads((tmp_path / "results.json").read_text())["annotation"]["comparisons"]
    assert row["difference"] == pytest.approx(0.2)


def test_what_one_seed_lacks_is_in_no_mean():
    both, one = (document_of(0, (0.8, 0.5))["annotation"] for _ in range(2))
    one["rows"], one["comparisons"] = one["rows"][:1], []
    found = results.average([both, one])
    assert [row["system"] for row in found["rows"]] == [results.MODEL_NAME]
    assert found["comparisons"] == []


@pytest.fixture
def study(tmp_path, bert):
    """A corpus of ninety cells, and configurations of two steps."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<cls>", "<eoc>", *GENES])}
    splits = {}
    for seed, (split, n) in enumerate({"train": 48, "validation": 12, "test": 30}.items()):
        types = [list(TYPES)[i % 3] for i in range(n)]
        names = [f"{split}{i}" for i in range(n)]
        counts = csr_matrix(counts_of(types, seed))
        cells = Cells.from_csr(counts, np.arange(3, 3 + len(GENES)), cell_ids=hash_names(names))
        ids = [TYPES[name] for name in types]
        obs = {"barcode": names, "cell_type": types, "cell_type_ontology_term_id": ids, "tissue": ["blood"] * n}
        splits[split] = (cells, obs | {"dataset_id": ["one", "two"] * (n // 2)})
    corpus = tmp_path / "corpus"
    write_corpus(corpus, vocabulary, splits)
    shares = np.full(len(vocabulary), 1 / len(GENES))
    pq.write_table(pa.table({"gene_id": np.arange(len(shares)), "mean_share": shares}), corpus / "genes.parquet")
    shared = {"per_device_train_batch_size": 8, "max_steps": 2, "learning_rate": 1e-3, "save_strategy": "no"}
    aligning = {"bert": bert, "cell_config": SIZES, "model_config": {"num_query_tokens": 2, "projection_dim": 8}}
    aligning |= {"qformer_config": {"cross_attention_frequency": 1}, **shared, "use_cpu": True}
    tuning = {"language_model": "scratch", "language_model_config": {**SIZES, "num_key_value_heads": 2}}
    tuning |= {"train_parts": {"language_model": "full"}, "templates": "short", **shared, "use_cpu": True}
    tuning["model_config"] = {"num_state_components": None, "text_to_cell_config": {"num_hidden_layers": 1}}
    words = ["--corpus", str(corpus), "--output", str(tmp_path / "out"), "--cells-per-label", "6"]
    words += ["--time-factor", "0.3"]
    for name, values in {"align": aligning, "tune": tuning}.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
        words += [f"--{name}-config", str(tmp_path / f"{name}.yaml")]
    return words, tmp_path / "out"


@pytest.mark.slow
def test_one_command_trains_all_methods_once_and_puts_them_side_by_side(study, monkeypatch, capsys):
    words, output = study
    monkeypatch.setattr(methods, "embed_texts", lambda texts: np.eye(384)[[hash(text) % 384 for text in texts]])
    monkeypatch.setattr(comparison, "embed_texts", methods.embed_texts)
    assert comparison.main(words) == 0
    found = json.loads((output / "results.json").read_text())
    systems = {task: {row["system"] for row in found[task]["rows"]} for task in ("annotation", "generation")}
    assert systems["annotation"] >= {"scMMGPT", "Cell2Sentence-style", "LangCell-style", "GenePT-style", "ridge"}
    assert systems["annotation"] >= {"CellTypist", "logistic regression"}
    assert systems["generation"] >= {"Cell2Sentence-style", "mean profile + negative binomial"}
    assert {row["system"] for row in found["description"]["rows"]} >= {"Cell2Sentence-style"}
    assert {row["metric"] for row in found["clustering"]["rows"]} >= {"avg_bio", "avg_batch"}
    assert [row["margin"] for row in found["claims"]] == [0.84, 0.205, 0.04]
    assert "| against Cell2Sentence-style |" in capsys.readouterr().out
    monkeypatch.setattr(comparison, "train_ours", lambda study: pytest.fail("trained again"))
    with pytest.raises(ValueError, match="another corpus or other options"):
        comparison.main([*words, "--seed", "1"])


def test_scvi_draws_cells_of_a_type_from_its_prior(tmp_path):
    pytest.importorskip("scvi")
    train = cells_of([list(TYPES)[i % 3] for i in range(60)])
    labels = train.labels
    methods.train_scvi(train, tmp_path, seconds=5.0)
    drawn = methods.scvi_cells(labels, train, tmp_path)
    np.testing.assert_array_equal(drawn, methods.scvi_cells(labels, train, tmp_path))
    # The corpus has a tenth of a cell's counts: so many are drawn, and normalised by all.
    deep = replace(train, total_counts=train.total_counts * 10)
    np.testing.assert_allclose(np.expm1(methods.scvi_cells(labels, deep, tmp_path)), np.expm1(drawn) / 10, rtol=1e-4)
    means = [(drawn[labels == name].mean(0), train.expression[labels == name].mean(0)) for name in TYPES]
    assert all(np.corrcoef(made, np.asarray(real).ravel())[0, 1] > 0.5 for made, real in means)
