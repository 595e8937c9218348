"""Labels that were never trained: genes that a text names, the place that a text predicts, and the gate."""

import json

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

from scmmgpt.cells_scmmgpt import Cells
from scmmgpt.genes_scmmgpt import GeneIndex
from scmmgpt.readout_scmmgpt import PROFILE_SCALE
from scmmgpt.train.data.gene_tables import load_gene_texts
from scmmgpt.train.readout import LabelledProfiles, fit_label_readout, fit_regression, profile_matrix
from scmmgpt.train.unseen import COMMON_EPISODES, COMMON_WEIGHTS, embed_gene_texts, fit_gate, towards_common
from scmmgpt.unseen_scmmgpt import GeneSearch, LabelSpace, TextScores, named_genes


INDEX = GeneIndex(
    {name: i for i, name in enumerate(["CD3D", "CD19", "MS4A1", "IL2RA", "GATA3", "NCAM1", "GNLY", "CD4"])},
    {"CD20": "MS4A1", "CD25": "IL2RA", "CD56": "NCAM1"},
)
TEXTS = ["type a", "type b", "type c", "type d", "type e"]


@pytest.mark.parametrize(
    ("text", "genes"),
    [
        ("A cell that is CD19-positive and CD25-negative.", {"CD19": 1, "IL2RA": -1}),
        ("It expresses CD4 and is negative for the lineage markers CD3D, CD19, and CD20.",
         {"CD4": 1, "CD3D": -1, "CD19": -1, "MS4A1": -1}),
        ("T cells with the phenotype GATA-3-positive, CD56-low.", {"GATA3": 1, "NCAM1": -1}),
        ("It lacks CD3D. It expresses GNLY.", {"CD3D": -1, "GNLY": 1}),
        ("A cell of the blood, NK or not.", {}),
    ],
)  # fmt: skip
def test_a_text_names_genes_for_and_against(text, genes):
    assert named_genes(text, INDEX) == {INDEX.vocabulary[name]: sign for name, sign in genes.items()}


def typed_cells(seed=0, n_cells=300):
    """Cells of five types; type k expresses genes 4k to 4k + 3, and the types lie in a row: neighbours share genes."""
    rng = np.random.default_rng(seed)
    types = np.arange(n_cells) % 5
    place = (np.arange(24) - 2) / 4
    rates = 2 + 25 * np.exp(-((place[None] - types[:, None]) ** 2))
    counts = rng.poisson(rates)
    return Cells.from_csr(csr_matrix(counts.astype(np.float32)), np.arange(24)), types


def fit(cells, types, n_types=5):
    """A readout of the types of cells."""
    profiles = profile_matrix(cells, 24)
    data = LabelledProfiles(profiles, types, n_types, np.arange(len(types)), np.arange(0), profiles[:0])
    return fit_label_readout(data, fit_regression(profiles, types, n_types, 0.01), 1.0)


def typed_readout(n_cells=300):
    """Cells of five types, their types, and a readout of them."""
    cells, types = typed_cells(n_cells=n_cells)
    return cells, types, fit(cells, types)


@pytest.fixture
def embeddings():
    """Texts in a row, as the cells are."""
    angles = np.arange(5) * 0.35
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


@pytest.fixture
def scores_without(embeddings):
    """Scores of cells for all five types where one was not trained, of any genes."""

    def without(left_out, step=1):
        cells, types = typed_cells()
        kept, others = np.flatnonzero(types != left_out), np.delete(np.arange(5), left_out)
        targets = np.searchsorted(others, types[kept])
        readout = fit(cells[kept], targets, 4)
        gate = fit_gate(readout, cells[kept], targets, embeddings[others], [{}] * 4)
        trained = [TEXTS[i] for i in others]
        embed = lambda texts: embeddings[[TEXTS.index(text) for text in texts]]  # noqa: E731
        unseen = np.arange(5) == left_out
        return TextScores.of(readout, trained, TEXTS, unseen, np.arange(0, 24, step), vars(gate), INDEX, embed)

    return without


def test_weights_of_a_gate_are_drawn_towards_those_of_other_datasets_the_more_the_fewer_its_episodes():
    own = np.array([3.0, 0, 0, 0, 0, 4.0, 0])
    drawn = towards_common(own, COMMON_EPISODES)
    np.testing.assert_allclose(drawn[3], 5 * COMMON_WEIGHTS[3] / 2)  # a column that the gate did not use
    np.testing.assert_allclose(towards_common(10 * own, COMMON_EPISODES), 10 * drawn)
    np.testing.assert_allclose(towards_common(own, 10**9), own, atol=1e-6)
    cosine = lambda a: a @ COMMON_WEIGHTS / np.linalg.norm(a) / np.linalg.norm(COMMON_WEIGHTS)  # noqa: E731
    assert cosine(own) < cosine(drawn) < cosine(towards_common(own, 3))


def test_the_scale_of_a_gate_is_fitted_after_its_weights_are_drawn(scores_without):
    gate = scores_without(2).scores.gate
    assert len(gate.weights) == len(gate.scale) == len(COMMON_WEIGHTS)
    # The markers of each type are alone: the episodes are told apart with a steep slope, far above the common weights.
    assert np.linalg.norm(gate.weights) > 2 * np.linalg.norm(COMMON_WEIGHTS)
    assert min(gate.weights) > 0


def test_cells_of_a_label_that_was_never_trained_are_found_by_its_text(scores_without):
    new, truth = typed_cells(seed=1)
    answers = scores_without(2)(new).argmax(axis=1)
    assert (answers == truth)[truth == 2].mean() > 0.9
    assert (answers == truth)[truth != 2].mean() > 0.9


def test_probabilities_of_trained_and_untrained_labels_sum_to_one_for_every_cell_alone(scores_without):
    new, _ = typed_cells(seed=1, n_cells=20)
    scores = scores_without(2)
    together = scores(new)
    np.testing.assert_allclose(np.exp(together).sum(axis=1), 1, rtol=1e-4)
    np.testing.assert_array_equal(scores(new[7])[0], together[7])


def test_a_batch_moves_the_predicted_profile_to_the_cells_of_the_label(scores_without):
    new, truth = typed_cells(seed=1)
    alone = scores_without(2)
    read = alone.read_batch(new)
    mean = profile_matrix(new[np.flatnonzero(truth == 2)], 24).mean(axis=0) * PROFILE_SCALE
    distances = [np.linalg.norm(scores.scores.space.predicted[0] - mean) for scores in (alone, read)]
    assert distances[1] < distances[0] / 3
    assert (read(new).argmax(axis=1) == truth).mean() > 0.9
    np.testing.assert_array_equal(alone(new), scores_without(2)(new))  # the scores of cells alone stay


def test_an_unseen_label_is_found_in_a_panel(scores_without):
    new, truth = typed_cells(seed=1)
    answers = scores_without(2, step=2)(new).argmax(axis=1)
    assert (answers == truth)[truth == 2].mean() > 0.8


def test_a_gene_that_a_text_names_speaks_for_cells_that_express_it():
    arrays = {
        "gene_ids": np.arange(3),
        "centroids": np.eye(3)[:2] * PROFILE_SCALE,
        "mean": np.full(3, 2.0),
        "factors": np.zeros((1, 3)),
        "noise": np.full(3, 4.0),
    }
    space = LabelSpace.of(arrays, np.ones(3, bool), np.eye(2), np.eye(2)[:1], [{2: 1, 0: -1, 9: 1}])
    np.testing.assert_allclose(space.named[0], [-0.5 / 2**0.5, 0, 0.5 / 2**0.5])  # gene 9 is not measured
    ragged = np.array([0, 1, 2]), np.array([2, 0]), np.array([8.0, 8.0], dtype=np.float32)
    of_genes = space.products(ragged)[2][:, 0]
    np.testing.assert_allclose(of_genes, [[4 / 2**0.5, 0, 0], [-4 / 2**0.5, 0, 0]], rtol=1e-6)


def test_a_gene_whose_text_is_like_that_of_a_label_speaks_for_cells_that_express_it():
    arrays = {
        "gene_ids": np.arange(4),
        "centroids": np.zeros((2, 4)),
        "mean": np.zeros(4),
        "factors": np.zeros((1, 4)),
        "noise": np.full(4, 4.0),
        "gene_texts": np.array([[0, 3.0], [0, 1.0], [0, -1.0], [0, 0.0]]),  # the last gene has no text
    }
    space = LabelSpace.of(arrays, np.ones(4, bool), np.array([[1.0, 0], [1, 1]]), np.array([[1.0, 1]]), [{}])
    # Similarities 3, 1 and -1 around their mean 1, and a length of one in standard deviations of 2. The second trained
    # label has the same text, which tells nothing.
    direction = np.array([2, 0, -2, 0]) / (2 * 8**0.5)
    np.testing.assert_allclose(space.contrasts[0] @ space.similar, [direction, direction, np.zeros(4)], atol=1e-12)


def test_genes_in_pairs_count_from_the_mean_of_each_trained_label_and_relatives_and_doubt_by_nearness():
    arrays = {
        "gene_ids": np.arange(3),
        "centroids": np.array([[8.0, 0, 0], [0, 8.0, 0]]),
        "mean": np.zeros(3),
        "factors": np.zeros((1, 3)),
        "noise": np.ones(3),
        "gene_texts": np.eye(3),
    }
    texts = np.array([[1.0, 0, 0], [0, 1, 0]])
    space = LabelSpace.of(arrays, np.ones(3, bool), texts, np.array([[0.6, 0, 0.8]]), [{}])
    ragged = np.array([0, 1, 2]), np.array([0, 2]), np.array([8.0, 8.0], dtype=np.float32)
    trained, new, of_genes = space.products(ragged)
    # Against the first label the third gene speaks for the new one, against the second the first and third.
    against = np.array([[-0.4, 0, 0.8], [0.6, -1, 0.8]])
    against -= against.mean(axis=1, keepdims=True)
    against /= np.linalg.norm(against, axis=1, keepdims=True)
    cells = np.array([[8.0, 0, 0], [0, 0, 8.0]])
    expected = [
        [(cell - mean) @ way for mean, way in zip(arrays["centroids"], against, strict=True)] for cell in cells
    ]
    np.testing.assert_allclose(of_genes[:, 0, 2], np.min(expected, axis=1), rtol=1e-6, atol=1e-6)
    relatives, doubt = space.evidence(trained, new, of_genes)[:, 0, 5:].T
    np.testing.assert_allclose(relatives, [1, 0.5], atol=1e-6)  # at the likest label; as far from both
    np.testing.assert_allclose(doubt, [0, np.log(2)], atol=1e-6)


def test_directions_of_genes_are_embeddings_of_their_texts_around_the_mean():
    _, _, readout = typed_readout(n_cells=40)
    tables = {3: "one", 7: "three", 99: "a gene that no cell expresses"}, {7: "gene 7", 8: "gene 8b"}
    lengths = lambda texts: np.array([[len(text), 1.0] for text in texts])  # noqa: E731
    directions = embed_gene_texts(readout, tables, lengths)
    expected = np.zeros((24, 2))
    expected[[3, 7, 8], 0] = [-1, (1 - 0.5) / 2, 0.5]
    np.testing.assert_allclose(directions, expected)
    with pytest.raises(ValueError, match="None of the genes"):
        embed_gene_texts(readout, [{99: "a gene"}], lengths)


def test_a_search_by_genes_finds_cells_that_express_genes_whose_texts_are_nearest():
    cells, types, readout = typed_readout()
    directions = np.zeros((24, 2))
    directions[:, 0] = -1 / 5
    directions[4:8] = [1.0, 0.0]  # what type 1 expresses
    readout.set_gene_texts(directions)
    search = GeneSearch.of(readout, np.arange(24), np.array([[1.0, 0.0]]))
    scores = search(cells)[:, 0]
    assert scores[types == 1].min() > scores[types == 4].max()
    np.testing.assert_array_equal(search(cells[5])[0], search(cells)[5])  # a cell alone
    with pytest.raises(ValueError, match="no gene that this checkpoint has a text about"):
        GeneSearch.of(readout, np.array([99]), np.eye(2))


def test_of_two_genes_with_equal_texts_the_one_that_varies_less_counts_more_in_a_search():
    cells, types, readout = typed_readout()
    directions = np.zeros((24, 2))
    directions[:, 0] = -1 / 11
    directions[[10, 23]] = [1.0, 0.0]  # a marker of a type, and a gene that hardly varies
    readout.set_gene_texts(directions)
    weights = GeneSearch.of(readout, np.arange(24), np.array([[1.0, 0.0]])).weights[0]
    variance = (readout.factors.double() ** 2).sum(dim=0).numpy() + readout.noise.double().numpy()
    assert weights[23] > weights[10] > 0
    np.testing.assert_allclose(weights[23] / weights[10], np.sqrt(variance[10] / variance[23]))
    np.testing.assert_allclose((weights**2 * variance).sum(), 1)


def test_texts_of_genes_are_read_from_a_table_with_symbol_and_summary(tmp_path):
    path = tmp_path / "genes.csv.gz"
    pd.DataFrame({"symbol": ["CD19", None], "summary": ["A receptor of B cells.", "?"]}).to_csv(path, index=False)
    summaries, names = load_gene_texts(path)
    assert summaries == {"CD19": "A receptor of B cells."}
    assert names.get("CD19", "CD19: CD19 molecule") == "CD19: CD19 molecule"  # of a package that may be missing
    (tmp_path / "other.csv").write_text("gene,text\nCD19,x\n")
    with pytest.raises(ValueError, match=r"lacks the columns \['summary', 'symbol'\]"):
        load_gene_texts(tmp_path / "other.csv")


def test_two_labels_are_too_few_for_a_gate():
    cells, types = typed_cells(n_cells=40)
    readout = fit(cells, types % 2, 2)
    assert fit_gate(readout, cells, types % 2, np.eye(2), [{}] * 2) is None
    assert (
        TextScores.of(readout, ["a", "b"], ["a", "b", "c"], np.arange(3) == 2, np.arange(24), None, INDEX, len) is None
    )


def test_annotate_answers_a_label_that_was_not_trained_from_its_gate(bert, tmp_path):
    from scmmgpt.eval.annotators import run_finetune
    from scmmgpt.tests.test_label_readout import SIZES

    rng = np.random.default_rng(0)
    symbols = "CD3D CD3E IL7R CCR7 MS4A1 CD79A CD79B CD19 LYZ CD14 S100A8 S100A9 NKG7 GNLY PRF1 GZMB PPBP PF4".split()
    symbols += "ACTB GAPDH B2M RPL3 RPS6 RPL5".split()
    names = ["T cell", "B cell", "monocyte", "NK cell"]
    types = np.arange(200) % 4
    counts = rng.poisson(1.0, (200, len(symbols)))
    for row, kind in enumerate(types):
        counts[row, kind * 4 : kind * 4 + 4] += rng.poisson(12, 4)
    obs = pd.DataFrame({"label": np.array(names)[types]}, index=[f"c{i}" for i in range(200)])
    cells = anndata.AnnData(csr_matrix(counts.astype(np.float32)), obs=obs, var=pd.DataFrame(index=symbols))
    table = pd.DataFrame({"symbol": ["GNLY", "CD3D"], "summary": ["Of NK cells.", "Of T cells."]})
    table.to_csv(tmp_path / "genes.csv", index=False)
    sizes = json.dumps({**json.loads(SIZES), "gene_texts": str(tmp_path / "genes.csv")})
    pipeline = run_finetune(
        cells[types != 3].copy(), tmp_path, label_key="label", options=["--bert", bert, "--new_model", sizes]
    )
    assert len(pipeline.model.config.annotation["unseen_gate"]["weights"]) == 7
    assert pipeline.model.label_readout.gene_texts.any(dim=1).sum() >= 2
    stored = pipeline.model.config.annotation["labels"]
    asked = {**stored, "NK cell": "a lymphocyte that expresses NKG7, GNLY, PRF1 and GZMB"}
    found = pipeline.annotate(cells.copy(), labels=asked, min_score=0).obs["scmmgpt_cell_type"]
    assert (np.asarray(found)[types == 3] == "NK cell").mean() > 0.8
    assert (np.asarray(found)[types != 3] == np.array(names)[types[types != 3]]).mean() > 0.8
    found = pipeline.search(cells, "NK cells", 3, by="genes", key_added="by_genes")
    assert {names[types[hit["index"]]] for hit in found} <= set(names)
    for name in stored:  # by the markers of the type, whatever genes have letters of its name
        found = pipeline.search(cells, f"a {name}", 10, by="genes")
        assert {names[types[hit["index"]]] for hit in found} == {name}
    assert cells.uns["scmmgpt"]["search"]["by"] == "genes"
    # By similarity, far beyond the sign of a place between labels: probabilities weigh the texts of the labels.
    hits = pipeline.search(cells, stored["B cell"], len(cells))
    assert {names[types[hit["index"]]] for hit in hits[:50]} == {"B cell"}
    assert all(abs(hit["score"]) <= 1 for hit in hits)
    alone = pipeline.search(cells[[hits[0]["index"]]].copy(), stored["B cell"])
    assert alone[0]["score"] == hits[0]["score"]
    # Row i alone is row i of a batch, but where the batch is read by request, which is recorded.
    alone = pipeline.annotate(cells[3:4].copy(), labels=asked)
    together = pipeline.annotate(cells.copy(), labels=asked)
    read = pipeline.annotate(cells.copy(), labels=asked, read_batch=True)
    rows = [a.obsm["scmmgpt_probabilities"] for a in (alone, together[3:4], read[3:4])]
    np.testing.assert_array_equal(rows[0], rows[1])
    assert not np.array_equal(rows[1], rows[2])
    assert [a.uns["scmmgpt"]["annotate"]["read_batch"] for a in (alone, together, read)] == [False, False, True]
    assert read.uns["scmmgpt"]["input"]["cells"] == together.uns["scmmgpt"]["input"]["cells"]
    few = pipeline.annotate(cells[:20].copy(), labels=asked, read_batch=True)
    np.testing.assert_array_equal(few.obsm["scmmgpt_probabilities"], together.obsm["scmmgpt_probabilities"][:20])
    assert not few.uns["scmmgpt"]["annotate"]["read_batch"]
    trained = [
        pipeline.annotate(cells.copy(), read_batch=read).obsm["scmmgpt_probabilities"] for read in (False, True)
    ]
    np.testing.assert_array_equal(*trained)


def test_a_search_by_genes_needs_a_checkpoint_with_texts_about_genes(tiny_pipeline):
    from scmmgpt.synthetic import synthetic_adata

    with pytest.raises(ValueError, match="no texts about genes"):
        tiny_pipeline.search(synthetic_adata(4), "stimulated", by="genes")
    with pytest.raises(ValueError, match="by is 'words'"):
        tiny_pipeline.search(synthetic_adata(4), "stimulated", by="words")
