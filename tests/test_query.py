"""A search says what cells should be, what they should lack, and what should be high or low in them."""

import json
from pathlib import Path

import numpy as np
import pytest

from scmmgpt import query_scmmgpt
from scmmgpt.genes_scmmgpt import GeneIndex
from scmmgpt.processing_scmmgpt import ScMMGPTProcessor
from scmmgpt.query_scmmgpt import Part, Query, Search, combine, is_understood, read_query, vocabulary_of
from scmmgpt.synthetic import synthetic_adata


@pytest.mark.parametrize(
    ("text", "levels"),
    [
        ("T cells that are not high CD4", [("", "CD4")]),
        ("T cells with no high CD4", [("", "CD4")]),
        ("T cells not expressing high CD4", [("", "CD4")]),
        ("T cells without low CD4", [("CD4", "")]),
        ("T cells, not high CD4", [("", "CD4")]),
        ("T cells not low CD4", [("CD4", "")]),
    ],
)
def test_a_denied_level_is_the_other_level(text, levels):
    query = read_query(text, lambda term: term == "CD4")
    assert [(level.high, level.low) for level in query.levels] == levels
    assert (query.wanted, query.denied) == ("T cells", ())


@pytest.mark.parametrize(
    ("text", "wanted", "denied"),
    [
        ("a cell that makes antibodies", "a cell that makes antibodies", ()),
        ("T cells without CD8, high interferon", "T cells, high interferon", ("CD8",)),
        ("T cells without CD8 or CD25", "T cells", ("CD8", "CD25")),
        ("CD8-negative T cell", "T cell", ("CD8",)),
        ("a lymphocyte, not a B cell", "a lymphocyte", ("B cell",)),
        ("blood cells but not monocytes", "blood cells", ("monocytes",)),
        ("a lymphocyte that is not a T cell", "a lymphocyte", ("T cell",)),
        ("cells that are not B cells", "", ("B cells",)),
        ("lymphocytes which are not monocytes or NK cells", "lymphocytes", ("monocytes", "NK cells")),
        ("cells that are not expressing high levels", "cells that are not expressing high levels", ()),
        ("a T cell that is not regulatory", "a T cell that is not regulatory", ()),
        ("a cell that does not divide", "a cell that does not divide", ()),
    ],
)
def test_a_text_is_split_into_what_is_wanted_and_what_is_denied(text, wanted, denied):
    assert read_query(text) == Query(wanted, denied)


@pytest.mark.parametrize(
    ("text", "wanted", "levels"),
    [
        ("T cells with higher interferon than other T cells", "T cells", [("interferon", "")]),
        ("T cells without CD8, high interferon", "T cells", [("interferon", "")]),
        ("monocytes with low HLA-DRA and high S100A8", "monocytes", [("", "HLA-DRA"), ("S100A8", "")]),
        ("less CD4 than CD8A", "", [("CD8A", "CD4")]),
        ("cells with a strong type I interferon response", "", [("type I interferon response", "")]),
        ("NK cells that express high levels of GZMB", "NK cells", [("GZMB", "")]),
        ("lymphocyte, more like a B cell than a T cell", "lymphocyte", [("B cell", "T cell")]),
        ("high endothelial venule cell", "high endothelial venule cell", []),
        ("a cell with more cytoplasm than a lymphocyte", "a cell with more cytoplasm than a lymphocyte", []),
    ],
)
def test_what_should_be_high_or_low_is_read_where_genes_or_programmes_are_named(text, wanted, levels):
    symbols = ["CD4", "CD8A", "CD8B", "HLA-DRA", "S100A8", "GZMB", "ISG15", "MX1"]
    (query,) = Search([text], GeneIndex({symbol: i for i, symbol in enumerate(symbols)})).queries
    assert query.wanted == wanted
    assert [(level.high, level.low) for level in query.levels] == levels


def test_cells_are_ordered_by_the_difference_of_two_genes(tiny_pipeline):
    adata = synthetic_adata(60)
    logs = np.log1p(1e4 * adata.X.toarray() / adata.X.toarray().sum(axis=1, keepdims=True))
    one, other = (logs[:, adata.var_names.get_loc(gene)] for gene in ("CD19", "CD14"))
    hits = tiny_pipeline.search(adata, "more CD19 than CD14", top_k=adata.n_obs)
    expected = (one - other - (one - other).mean()) / (one - other).std()
    assert [hit["score"] for hit in hits] == pytest.approx(np.sort(expected)[::-1], abs=1e-4)


def test_genes_that_the_file_does_not_measure_are_named():
    index = GeneIndex({symbol: i for i, symbol in enumerate(["CD4", "CD8A", "CD8B", "CD19"])})
    measured = np.array([0, 2])
    assert Search(["high CD4, no CD19.", "T cells without CD8"], index, measured).absent == ["CD19"]
    assert Search(["high CD4, no CD19"], index).absent == []
    assert Search(["T cells with high CD300X, CD301Y-negative, of COVID"], index).unknown == ["CD300X", "CD301Y"]
    assert Search(["CD4+ and CD8-positive T cells"], index).unknown == []


@pytest.mark.parametrize("text", ["without CD8", "not a B cell", "No B cells", "everything but T cells"])
def test_a_text_of_denials_alone_is_refused(text):
    with pytest.raises(ValueError, match="names only what cells lack: name the wanted cells"):
        read_query(text)


def test_a_denied_gene_counts_against_a_cell_and_a_denied_text_only_where_it_fits_better():
    wanted = np.array([1.0, 1.0, -1.0, -1.0])
    assert combine(wanted, [], [np.array([0.0, 2.0, 0.0, 2.0])]).tolist() == [2, 0, 0, -2]
    assert combine(wanted, [np.array([-1.0, 1.0, -1.0, 1.0])], []).tolist() == [1, 1, -1, -3]


def test_of_any_cells_those_least_like_a_denied_text_are_the_best():
    likeness = np.array([[0.9], [0.1], [0.5]])
    scores = Part(denied_texts=[0]).score(likeness, np.zeros((3, 0)))
    assert np.argsort(-scores).tolist() == [1, 2, 0]


def test_a_search_without_a_gene_ranks_cells_that_express_it_last(tiny_pipeline):
    adata = synthetic_adata(60)
    gene = "CD19"
    counts = np.asarray(adata[:, gene].X.todense()).ravel()
    hits = tiny_pipeline.search(adata, [f"T cell without {gene}", "T cell"], top_k=adata.n_obs)
    ranked = counts[[hit["index"] for hit in hits[0]]]
    assert ranked[:20].mean() < ranked[-20:].mean()
    assert {hit["cell"] for hit in hits[0]} == set(adata.obs_names)
    plain = tiny_pipeline.search(adata, "T cell", top_k=adata.n_obs)
    assert [hit["score"] for hit in plain] == pytest.approx([hit["score"] for hit in hits[1]], abs=1e-5)
    assert all(abs(hit["score"]) <= 1 for hit in plain)


NONSENSE = ["asdf", "qwerty cells", "the weather in Paris", "cells without", "not", "What's up?", "12 3", "CD4K cells"]
QUERIES = [
    "a cell that makes antibodies",
    "a cytotoxic lymphocyte",
    "stimulated with interferon",
    "t cells",
    "B-cell",
    "micro",
    "LYZ",
    "high CD8A",
    "cells of the liver",
    "This cell is a malignant cell.",
    "hepatocytes, not dividing",
]


@pytest.fixture(scope="module")
def known():
    """Words and genes of the checkpoint at the root."""
    root = Path(__file__).resolve().parents[1]
    stored = json.loads((root / "config.json").read_text(encoding="utf-8"))["annotation"]
    return vocabulary_of(stored), ScMMGPTProcessor.from_pretrained(str(root)).gene_index, stored


@pytest.mark.parametrize("text", NONSENSE)
def test_a_text_of_no_known_word_is_not_understood(known, text):
    assert not is_understood(text, *known[:2])


def test_texts_about_cells_are_understood(known):
    words, gene_index, stored = known
    texts = [*QUERIES, *stored["labels"], *(text for _, _, text, *_ in DENIALS)]
    texts += [
        name for key in ("profiles", "tissues", "kinds", "terms") for term in stored[key] for name in term["names"]
    ]
    strange = {text for text in texts if not is_understood(text, words, gene_index)}
    assert strange <= {"be cell", "cell"}  # of common words


def test_a_search_for_nothing_known_warns_in_log_and_hits(tiny_pipeline, caplog, monkeypatch):
    adata = synthetic_adata(20)
    assert not any("warning" in hit for hit in tiny_pipeline.search(adata, "asdf"))  # it stores no words at all
    tiny_pipeline.model.config.annotation = {"labels": {"plasma cell": "A cell that secretes antibodies."}}
    monkeypatch.setattr("scmmgpt.searching_scmmgpt.MIN_VOCABULARY", 5)
    caplog.clear()
    strange, fine = tiny_pipeline.search(adata, ["asdf", "antibody"], top_k=2)
    assert [hit["warning"] for hit in strange] == [caplog.messages[-1]] * 2
    assert "knows no word of 'asdf'" in caplog.messages[-1]
    assert not any("warning" in hit for hit in fine)


BLOOD = ["CD4+", "CD8+", "CD56+", "CD19+", "CD34+"]  # all but monocytes
DENIALS = [  # file, column, text, how the labels of the wanted cells begin, AUROC as one embedding and apart
    ("pbmc_facs", "facs_label", "T cell without CD8", ["CD4+"], 0.85, 0.98),
    ("pbmc_facs", "facs_label", "lymphocyte, not a B cell", ["CD4+", "CD8+", "CD56+"], 0.35, 0.99),
    ("pbmc_facs", "facs_label", "lymphocyte, not a T cell", ["CD19+", "CD56+"], 0.67, 0.99),
    ("pbmc_facs", "facs_label", "blood cell, not a monocyte", BLOOD, 0.01, 0.99),
    ("lymphoid_ref", "cell_type", "T cell without CD8", ["T_CD4"], 0.91, 0.96),
    ("lymphoid_ref", "cell_type", "lymphocyte, not a B cell", ["T_", "NK", "ILC"], 0.78, 0.90),
    ("lymphoid_ref", "cell_type", "lymphocyte, not a T cell", ["B", "NK", "ILC"], 0.80, 0.97),
    ("lymphoid_ref", "cell_type", "myeloid cell, not a monocyte", ["Macrophages", "DC"], 0.89, 0.78),
    ("kang_pbmc_unlabelled", "condition", "cells with high interferon", ["interferon"], 0.59, 0.99),
    ("pbmc_facs", "facs_label", "T cell with more CD8A than CD4", ["CD8+"], 0.85, 0.89),
    ("pbmc_facs", "facs_label", "T cell with low CD8", ["CD4+"], 0.86, 0.98),
    ("pbmc_facs", "facs_label", "lymphocyte, more like a B cell than a T cell", ["CD19+"], 0.99, 1.00),
    ("pbmc_facs", "facs_label", "T cells with high cytotoxicity", ["CD8+ Cytotoxic"], 0.33, 0.85),
    ("lymphoid_ref", "cell_type", "T cell with more CD8A than CD4", ["T_CD8"], 0.92, 0.97),
    ("lymphoid_ref", "cell_type", "T cell with low CD8", ["T_CD4"], 0.94, 0.96),
    ("lymphoid_ref", "cell_type", "lymphocyte, more like a B cell than a T cell", ["B"], 0.75, 0.98),
    ("lymphoid_ref", "cell_type", "lymphocyte with high cytotoxicity", ["NK"], 0.76, 0.99),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "column", "text", "wanted", "as_one", "apart"), DENIALS)
def test_cells_are_found_by_what_they_lack_or_show(
    name, column, text, wanted, as_one, apart, shared_data, monkeypatch
):
    from sklearn.metrics import roc_auc_score

    import scmmgpt as sm

    adata = sm.read(shared_data / f"{name}.h5ad")
    is_wanted = adata.obs[column].astype(str).str.startswith(tuple(wanted))

    def auroc():
        scores = np.empty(adata.n_obs)
        for hit in sm.tl.search(adata, text, top_k=adata.n_obs):
            scores[hit["index"]] = hit["score"]
        return roc_auc_score(is_wanted, scores)

    found = auroc()
    monkeypatch.setattr(query_scmmgpt, "read_query", lambda text, is_expressed: Query(text))
    assert (found, auroc()) == pytest.approx((apart, as_one), abs=0.02)
