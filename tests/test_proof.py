"""Descriptions with proof: what they say of known cells, and an independent check that finds every planted lie."""

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

from scmmgpt import synthetic
from scmmgpt.__main__ import main
from scmmgpt.cells_scmmgpt import Cells
from scmmgpt.commands.verify import verify_file
from scmmgpt.eval.proof import LIES, Checker, evaluate_proof, sentences
from scmmgpt.expression_scmmgpt import share
from scmmgpt.programmes_scmmgpt import PROGRAMMES
from scmmgpt.proof_scmmgpt import NO_TYPE, Expression
from scmmgpt.synthetic import synthetic_adata


@pytest.fixture(scope="module")
def described(pipeline):
    """Cells of four types, thirty of each."""
    return pipeline.describe(synthetic_adata(120), proof=True)


def cells_with(counts):
    """A hundred and twenty cells, in which some genes of a cell have other counts."""
    adata = synthetic_adata(120)
    changed = adata.X.tolil()
    for cell, genes in counts.items():
        for gene, count in genes.items():
            changed[cell, adata.var_names.get_loc(gene)] = count
    adata.X = changed.tocsr()
    return adata


def checker_of(adata):
    counts = adata.X.tocsr()
    sizes = np.asarray(counts.sum(axis=1)).ravel()
    return Checker(adata.obs["scmmgpt_description"].tolist(), counts, adata.var_names, sizes)


def test_a_cell_is_described_by_markers_with_their_counts(described):
    text = described.obs["scmmgpt_description"].iloc[0]
    assert text.startswith("A B cell from blood, shown by ")
    clauses = pd.DataFrame(described.uns["scmmgpt"]["describe"]["clauses"])
    mine = clauses[(clauses.cell == "cell-0") & (clauses.kind == "type")]
    for row in mine.itertuples():
        assert described[row.cell, row.gene].X.toarray().item() == row.count
        assert f"{row.gene} ({row.count:g}" in text
        assert row.percentile > 50
    assert set(mine.gene) <= set(synthetic.MARKERS["B cell"][1])


def test_all_clauses_are_supported_and_lies_are_found(pipeline):
    result = evaluate_proof(pipeline, synthetic_adata(120))
    assert result["unsupported"] == 0
    assert result["lies"]["another type and its markers"] == {"told": 120, "not_decidable": 0, "caught": 1}
    assert result["lies"]["a gene without counts"]["caught"] == 1
    assert result["lies"]["another cell of the type"] == {"told": 120, "not_decidable": 0, "caught": 1}
    assert set(result["lies"]) == set(LIES)


def test_what_is_unusual_for_a_kind_is_said_of_that_cell_alone(pipeline):
    adata = cells_with({0: {"CD14": 40}, 4: {"CD14": 40}})  # one such cell is an accident
    pipeline.describe(adata, proof=True)
    unusual = [s for text in adata.obs["scmmgpt_description"] for s in sentences(text) if "Unusually" in s]
    assert [s for s in unusual if "CD14 (40)" in s] == ["Unusually high for its kind: CD14 (40)."] * 2
    assert "CD14 (40)" in adata.obs["scmmgpt_description"].iloc[0]


@pytest.mark.parametrize(
    ("share", "is_slide", "is_news"), [(0.15, False, False), (0.6, False, True), (0.6, True, False), (1.5, True, True)]
)
def test_a_trace_of_another_type_is_no_news(pipeline, monkeypatch, share, is_slide, is_news):
    stored = pipeline.model.config.annotation  # terms say that no type is a kind of another
    terms = [
        {"id": f"CL:{i}", "name": name, "names": [name], "labels": [name]} for i, name in enumerate(stored["labels"])
    ]
    monkeypatch.setitem(stored, "terms", terms)
    adata = synthetic_adata(120)
    counts = adata.X.tolil()
    gene, is_monocyte = adata.var_names.get_loc("CD14"), (adata.obs["cell_type"] == "monocyte").to_numpy()
    sizes = np.asarray(adata.X.sum(axis=1)).ravel()
    for cell in np.flatnonzero(is_monocyte):  # a tenth of the counts of a monocyte
        counts[cell, gene] = round(sizes[cell] / 5)
    rate = np.mean([counts[cell, gene] / (sizes[cell] + counts[cell, gene]) for cell in np.flatnonzero(is_monocyte)])
    for cell in (0, 4):
        counts[cell, gene] = round(share * rate * sizes[cell])
    adata.X = counts.tocsr()
    if is_slide:
        adata.obsm["spatial"] = np.zeros((120, 2))
    texts = pipeline.describe(adata, proof=True).obs["scmmgpt_description"].iloc[[0, 4]]
    assert [("Unusually" in text and "CD14" in text) for text in texts] == [is_news] * 2


def test_a_type_of_ten_cells_refutes_another():
    kinds = ["mast cell"] * 25 + ["macrophage"] * 12
    texts = [f"A {kind}, shown by CD68 (1 count)." for kind in kinds]
    rates = np.array([[1.0, 9.0]] * 25 + [[5.0, 5.0]] * 12)
    checker = Checker(texts, csr_matrix(rates), ["CD68", "X"], np.full(37, 10.0))
    assert checker.better_kinds("mast cell", ["CD68"]) == ["macrophage"]
    few = Checker(texts[:34], csr_matrix(rates[:34]), ["CD68", "X"], np.full(34, 10.0))
    assert few.better_kinds("mast cell", ["CD68"]) == []


def test_a_file_of_unknown_cells_alone_is_described(pipeline):
    adata = synthetic_adata(8)
    adata.obs["scmmgpt_cell_type"] = "Unknown"
    assert set(pipeline.describe(adata, proof=True).obs["scmmgpt_description"]) == {NO_TYPE.format("none")}


def test_a_cell_whose_counts_show_no_type_is_called_none(pipeline):
    names = synthetic_adata(1).var_names
    adata = cells_with({0: {**dict.fromkeys(names, 0), synthetic.BACKGROUND[0]: 50}})
    texts = pipeline.describe(adata, proof=True).obs["scmmgpt_description"]
    assert texts.iloc[0].startswith("No type is shown by its counts; the model proposes ")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("A B cell, shown by {gene} ({count}).", None),
        ("A B cell, shown by {gene} (999).", "other counts of ['{gene}']"),
        ("A B cell, shown by NOGENE (1).", "other counts of ['NOGENE']"),
        ("A B cell of great beauty.", "no such sentence: A B cell of great beauty."),
        ("A monocyte, shown by {gene} ({count}).", "{gene} is not of monocyte"),
        (
            "Cell cycle: {gene} ({count}), more of these genes than 99 % of the 29 other cells of its kind.",
            "no such sentence",
        ),
    ],
)
def test_the_check_names_what_is_wrong(described, text, fault):
    checker = checker_of(described)
    clauses = pd.DataFrame(described.uns["scmmgpt"]["describe"]["clauses"])
    row = clauses[(clauses.cell == "cell-0") & (clauses.kind == "type")].iloc[0]
    words = {"gene": row.gene, "count": f"{row['count']:g}"}
    found = checker.faults(0, text.format(**words))
    assert found == [] if fault is None else found[0].startswith(fault.format(**words))


def test_types_exclude_each_other_unless_a_type_of_the_file_is_both():
    kinds = ["T cell", "lymphocyte", "phagocyte", "myeloid cell", "B cell"]
    texts = [f"A {kind}, shown by CD19 (1 count)." for kind in kinds]

    def checker(texts):
        return Checker(texts, csr_matrix(np.ones((len(texts), 1))), ["CD19"], np.ones(len(texts)))

    alone, beside = checker(texts), checker([*texts, "A macrophage, shown by CD19 (1 count)."])
    assert alone.excludes("T cell", "B cell")
    assert not alone.excludes("T cell", "lymphocyte")
    assert alone.excludes("phagocyte", "myeloid cell")
    assert not beside.excludes("phagocyte", "myeloid cell")


T_CELLS = {"id": "CL:0000084", "name": "T cell", "names": ["T cell"], "labels": ["T cell"]}


@pytest.fixture
def with_t_cells(pipeline):
    """The pipeline whose checkpoint has the term of T cells, too."""
    terms = pipeline.model.config.annotation["terms"]
    terms.append(T_CELLS)
    yield pipeline
    terms.remove(T_CELLS)


def cells_with_t_genes(n_cells, kind, foreign):
    """Cells, of which some of a type have the genes of T cells in earnest, and all others a trace of them."""
    adata = synthetic_adata(n_cells)
    counts = adata.X.tolil()
    mine = np.flatnonzero(adata.obs["cell_type"] == kind)[:foreign]
    for gene in ("CD3D", "CD3E"):
        counts[mine, adata.var_names.get_loc(gene)] = 30
    adata.X = counts.tocsr()
    return adata, mine


def test_genes_of_another_lineage_speak_against_a_type(with_t_cells):
    adata, mine = cells_with_t_genes(120, "natural killer cell", foreign=4)
    result = evaluate_proof(with_t_cells, adata)
    texts = adata.obs["scmmgpt_description"].tolist()
    against = [i for i, text in enumerate(texts) if "Against it speak" in text]
    assert against == mine.tolist()
    assert "Against it speak CD3D (30) and CD3E (30), genes of T cells." in texts[mine[0]]
    assert sentences(texts[mine[0]])[1].endswith(", genes of T cells.")
    assert result["unsupported"] == 0
    kinds = pd.DataFrame(adata.uns["scmmgpt"]["describe"]["clauses"]).query("kind == 'against'")
    assert set(kinds.cell) == {f"cell-{i}" for i in mine}
    hidden = [" ".join(s for s in sentences(texts[i]) if "Against" not in s) for i in mine]
    checker = checker_of(adata)
    faults = [checker.faults(cell, text)[0] for cell, text in zip(mine, hidden, strict=True)]
    assert all("speak against natural killer cell" in fault for fault in faults)
    lie = "A T cell, shown by CD3D (30 counts). Against it speak CD3D (30 counts), genes of T cells."
    assert "['CD3D'] do not speak against T cell" in checker.faults(mine[0], lie)


def test_a_type_of_few_cells_is_refuted_by_a_lineage_or_not_decidable(with_t_cells):
    adata, mine = cells_with_t_genes(60, "natural killer cell", foreign=2)  # of 15
    with_t_cells.describe(adata, proof=True)
    texts = adata.obs["scmmgpt_description"].tolist()
    assert all(texts[i] == NO_TYPE.format("natural killer cell") for i in mine)
    checker = checker_of(adata)
    own = np.flatnonzero(adata.obs["cell_type"] == "natural killer cell")[3]
    t_cell = np.flatnonzero(adata.obs["cell_type"] == "T cell")[0]
    assert checker.verdict(own, texts[own]) == "not decidable"  # 13 cells, and no lineage of which it is
    assert checker.verdict(t_cell, texts[t_cell]) == "supported"  # by the receptor of T cells
    lie = texts[own].split("shown by")[0] + "shown by " + texts[t_cell].split("shown by ")[1]
    assert checker.verdict(t_cell, lie) == "unsupported"


def test_values_that_are_no_counts_are_not_called_so(pipeline):
    adata = synthetic_adata(120)
    adata.X.data = (adata.X.data * 211.37).astype(np.float32)
    adata.X = adata.X.multiply(np.random.default_rng(0).uniform(0.9, 1.1, adata.shape)).tocsr()
    text = pipeline.describe(adata, proof=True).obs["scmmgpt_description"].iloc[0]
    assert text.startswith("A B cell from blood, shown by ")
    assert " count" not in text.partition(".")[0]
    assert "e+" not in text
    assert evaluate_proof(pipeline, adata)["unsupported"] == 0


def test_a_gene_far_below_its_kind_does_not_show_a_type(pipeline):
    adata = cells_with({0: {"MS4A1": 1}})  # of some 35 in the other B cells
    text = pipeline.describe(adata, proof=True).obs["scmmgpt_description"].iloc[0]
    assert text.startswith("A B cell from blood, shown by ")
    assert "MS4A1" not in text


def test_genes_of_the_donor_and_of_the_handling_are_no_news():
    symbols = ["XIST", "HBB", "ACTB", "MT-CO1", "RPL3", "CD14"]
    cells = Cells.from_csr(csr_matrix(np.full((50, 6), 4.0, dtype=np.float32)), np.arange(6))
    expression = Expression(cells, np.arange(6), symbols)
    assert np.asarray(symbols)[expression.recurs].tolist() == ["CD14"]
    assert np.asarray(symbols)[expression.tells_types].tolist() == ["XIST", "HBB", "CD14"]


def test_no_gene_is_in_two_programmes_and_each_has_a_source():
    genes = [gene for programme in PROGRAMMES for gene in programme.genes]
    assert len(genes) == len(set(genes))
    assert all(programme.source and len(programme.genes) >= 3 for programme in PROGRAMMES)


def test_groups_are_described_with_the_shares_of_their_cells(pipeline):
    adata = synthetic_adata(120)
    pipeline.describe(adata, proof=True, cluster_key="cell_type")
    groups = pd.DataFrame(adata.uns["scmmgpt"]["describe"]["groups"])
    row = groups[(groups.level == "cluster") & (groups.name == "B cell")].iloc[0]
    assert row.cells == 30
    assert row.text.startswith("30 cells, 100 % B cell, shown by ")
    gene = row.text.split("shown by ")[1].split(" ")[0]
    has = adata[:, gene].X.toarray().ravel() > 0
    is_b = (adata.obs["cell_type"] == "B cell").to_numpy()
    assert f"{gene} ({share(has[is_b].mean())} of its cells, {share(has[~is_b].mean())} of the others)" in row.text


def test_the_command_writes_texts_and_a_table_that_verify_repeats(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "model")
    synthetic_adata(60).write_h5ad(tmp_path / "cells.h5ad")
    paths = [str(tmp_path / name) for name in ("cells.h5ad", "out.h5ad", "proof.tsv")]
    words = ["describe", paths[0], "-o", paths[1], "--proof", paths[2], "--model", str(tmp_path / "model"), "--quiet"]
    assert main(words) == 0
    table = pd.read_csv(paths[2], sep="\t")
    assert list(table)[:4] == ["cell", "clause", "kind", "text"]
    out = anndata.read_h5ad(paths[1])
    assert out.obs["scmmgpt_description"].str.startswith(("A ", "An ", "No ")).all()
    assert verify_file(paths[1], pipeline)["results"][0]["changed_cells"] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "What?", "proof": True}, "prompt"),
        ({"num_beams": 2, "proof": True}, "num_beams"),
        ({"cluster_key": "a"}, "proof=True"),
    ],
)
def test_options_that_mean_nothing_are_refused(pipeline, options, message):
    with pytest.raises(ValueError, match=message):
        pipeline.describe(synthetic_adata(8), **options)
