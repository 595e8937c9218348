"""Questions about a selection: the topic is understood, and every number is what an independent count gives."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest

import scmmgpt as sm
from scmmgpt import synthetic
from scmmgpt.__main__ import main
from scmmgpt.commands.chat import LIKENESS, Chat
from scmmgpt.commands.questions import EXAMPLES, Question
from scmmgpt.expression_scmmgpt import share
from scmmgpt.synthetic import MARKERS, synthetic_adata


@pytest.fixture(scope="module")
def adata():
    adata = synthetic_adata(120)
    adata.obs["leiden"] = [str(i % 4) for i in range(120)]  # the types alternate
    return adata


@pytest.fixture
def chat(pipeline, adata):
    """About the 30 B cells of 120."""
    return Chat(pipeline, adata, 'leiden == "0"')


def check_shares(text, adata, mask, other):
    """Count each "GENE (a % against b %)" again."""
    found = re.findall(r"([A-Z0-9-]+) \(([\d.]+ %)(?: against ([\d.]+ %))?\)", text)
    for gene, here, there in found:
        counts = adata[:, gene].X.toarray().ravel()
        assert here == share((counts[mask] > 0).mean()), gene
        assert not there or there == share((counts[other] > 0).mean()), gene
    return [gene for gene, _, _ in found]


def test_every_number_of_an_answer_is_counted(chat, adata):
    mine = (adata.obs["leiden"] == "0").to_numpy()
    asked = chat.ask("Which genes set them apart?")
    assert len(set(check_shares(asked.text, adata, mine, ~mine)) & set(MARKERS["B cell"][1])) >= 3
    asked = chat.ask("Which genes set them apart from monocytes?")
    monocytes = (adata.obs["cell_type"] == "monocyte").to_numpy()
    assert {"CD14", "CD19"} <= set(check_shares(asked.text, adata, mine, monocytes))
    asked = chat.ask("Why this label?")
    rival = re.search(r"against ([\w ]+):", asked.text).group(1)
    assert check_shares(asked.text, adata, mine, (adata.obs["cell_type"] == rival).to_numpy())
    asked = chat.ask("Which markers of T cells do they have?")
    assert check_shares(asked.text, adata, mine, ~mine)

    counts = adata[:, "CD19"].X.toarray().ravel()
    text = chat.ask("Do they express CD19?").text
    here, there = share((counts[mine] > 0).mean()), share((counts[~mine] > 0).mean())
    assert text.startswith(f"CD19: counts in {here} of the 30 selected cells (")
    assert f", in {there} of the 90 other cells (" in text


UNREAD = "no gene, label, column or subject of these answers"


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ("Which types are here?", "Labels of the 30 selected cells: B cell (100 %)."),
        ("How many are T cells?", "0 of the 30 selected cells (0 %) are called T cell or a kind of it."),
        ("How many are not T cells?", "30 of the 30 selected cells (100 %) are not called T cell or a kind of it."),
        ("How many are not from donor-1?", "15 of the 30 selected cells (50 %) are not of donor_id donor-1."),
        (
            "Are they lymphocytes?",
            "30 of the 30 selected cells (100 %) are called lymphocyte or a kind of it: B cell (100 %).",
        ),
        ("Why not monocytes?", "0 of the 30 selected cells (0 %) are called monocyte or a kind of it. Genes"),
        ("What is this cluster?", "Labels of the 30 selected cells: B cell (100 %)."),
        ("How good is the quality?", "The median of the 30 selected cells is "),
        ("Which donors are they from?", "Of the 30 selected cells: donor_id: donor-1 (50 %) and donor-2 (50 %)."),
        ("How many are from donor-1?", "15 of the 30 selected cells (50 %) are of donor_id donor-1."),
        ("Is FOXP3 there?", "The file does not measure FOXP3."),
        ("Do they express FOXP3 and CD19?", "The file does not measure FOXP3. CD19: counts in "),
        ("How many express CD19 but not FOXP3?", "The file does not measure FOXP3. CD19: counts in "),
        ("How large a share are B cells?", "30 of the 30 selected cells (100 %) are called B cell or a kind of it."),
        ("Do you know a review on B cells?", 'The counts do not answer that ("review":'),
        ("Give me the best genes of this cluster", "Against the 90 other cells, the 30 selected cells are higher in"),
        (
            "How common are T cells and B cells?",
            "0 of the 30 selected cells (0 %) are called T cell or a kind of it. 30 ",
        ),
        ("What share of donor-1 is B cells?", "15 of the 60 cells of donor_id donor-1 (25 %) are called B cell or"),
        ("Which type has the most counts?", "Medians of the 30 selected cells, the highest first. B cell: "),
        ("Are there any monocyts?", 'Read as "Are there any monocyte?": 0 of the 30 selected cells'),
        ("What is the weather?", f'The counts do not answer that ("weather": {UNREAD}). You can ask: {EXAMPLES}'),
        ("How many hepatocytes are there?", f'The counts do not answer that ("hepatocytes": {UNREAD}).'),
        ("Does CD19 correlate with MS4A1?", 'The counts do not answer that ("correlate":'),
        ("Plot CD19", 'The counts do not answer that ("Plot":'),
        ("How many ductal cells are there?", f'The counts do not answer that ("ductal": {UNREAD}).'),
        ("How many red cells?", f'The counts do not answer that ("red": {UNREAD}).'),
        ("What do the FOOBAR-like blobs express?", "The counts do not answer that ("),
        (
            "Are there lymphoid cells?",
            "30 of the 30 selected cells (100 %) are called lymphocyte or a kind of it: B cell",
        ),
        ("How many killer cells?", "0 of the 30 selected cells (0 %) are called natural killer cell or a kind of it."),
        ("How many are neither T nor B cells?", "0 of the 30 selected cells (0 %) are neither T cell nor B cell."),
        ("What share of the lymphocytes are B cells?", "30 of the "),
        ("Remove the B cells", 'The counts do not answer that ("Remove":'),
        ("How many have more than 1000 counts?", 'The counts do not answer that ("1000":'),
    ],
)
def test_a_question_is_answered_in_words(chat, question, words):
    assert chat.ask(question).text.startswith(words)


def test_genes_are_counted_together_and_for_each_type(pipeline, adata):
    chat = Chat(pipeline, adata)
    on = {gene: adata[:, gene].X.toarray().ravel() > 0 for gene in ("CD19", "CD3E")}

    def part(mask):
        return f"{mask.sum()} of the 120 cells ({share(mask.mean())})."

    assert part(on["CD19"] & on["CD3E"]) in chat.ask("How many express both CD19 and CD3E?").text
    assert part(on["CD19"] | on["CD3E"]) in chat.ask("How many express CD19 or CD3E?").text
    assert part(on["CD3E"] & ~on["CD19"]) in chat.ask("How many are positive for CD3E but not CD19?").text
    assert part(~on["CD19"]) in chat.ask("How many cells are CD19-negative?").text
    kinds = {kind: on["CD19"][(adata.obs["cell_type"] == kind).to_numpy()].mean() for kind in ("B cell", "T cell")}
    assert kinds["B cell"] > kinds["T cell"]
    for question in ("Which type expresses the most CD19?", "Is CD19 higher in T cells or in B cells?"):
        said = re.findall(r"(B cell|T cell) \(([\d.]+ %)", chat.ask(question).text)
        assert said[:1] == [("B cell", share(kinds["B cell"]))]
        assert ("T cell", share(kinds["T cell"])) in said
    assert chat.ask("Compare B cells and T cells").text.startswith("Against the 30 cells called T cell, the 30 cells ")


def test_turns_keep_the_topic_and_the_subject(chat):
    chat.ask("Do they express CD19?")
    assert chat.ask("And CD3E?").text.startswith("CD3E: counts in ")
    assert "of the 30 cells called T cell (" in chat.ask("and of the T cells?").text
    answer = chat.ask("and MS4A1?").text
    assert answer.startswith("MS4A1: ")
    assert "of the 30 cells called T cell (" in answer
    assert "of the 60 cells of donor_id donor-1 (" in chat.ask("And in donor-1?").text
    assert "of the 30 selected cells (" in chat.ask("Do they express CD19?").text


def test_cells_without_a_label_are_unknown(pipeline, adata):
    adata = adata.copy()
    pipeline.annotate(adata)
    adata.obs.loc[adata.obs_names[:6], ["scmmgpt_cell_type", "scmmgpt_score"]] = np.nan  # as where files were joined
    chat = Chat(pipeline, adata)
    assert "nan" not in chat.ask("Which types are here?").text
    assert "for 5 % it is below 0.5, and 5 % are Unknown" in chat.ask("How sure are the labels?").text


def test_a_chat_is_about_the_labels_of_now(pipeline, adata):
    adata = adata.copy()
    pipeline.annotate(adata)
    pipeline.describe(adata, proof=True)
    pipeline.annotate(adata, ["B cell", "T cell"])
    assert "T cell" in Chat(pipeline, adata).ask("Describe them.").text


def test_labels_of_another_checkpoint_are_told(pipeline, adata, caplog):
    adata = adata.copy()
    pipeline.annotate(adata)
    pipeline.describe(adata, proof=True)
    assert "another checkpoint" not in caplog.text
    adata.uns["scmmgpt"]["annotate"]["receipt"] |= {"weights": "0" * 16, "checkpoint": "theirs"}
    pipeline.describe(adata, proof=True)
    assert "has labels of another checkpoint (theirs)" in caplog.text


def test_all_cells_can_be_asked_about_and_a_selection_of_none_is_refused(pipeline, adata):
    chat = Chat(pipeline, adata)
    assert chat.ask("Which types?").text.startswith("Labels of the 120 cells: ")
    assert chat.ask("Which genes set them apart?").text.startswith("There are no cells to compare the 120 cells with")
    assert "of the 30 cells called B cell" in chat.ask("Do the B cells express CD19?").text
    few = Chat(pipeline, adata[adata.obs["cell_type"] == "monocyte"].copy())
    assert few.ask("Do the B cells express CD19?").text == "The file has no cells called B cell."
    with pytest.raises(ValueError, match="No cell is selected by 'leiden == \"9\"'"):
        Chat(pipeline, adata, 'leiden == "9"')
    with pytest.raises(ValueError, match="is not a condition on columns of obs"):
        Chat(pipeline, adata, "cluster = 3")


QUESTIONS = Path(__file__).parent / "cases" / "questions.tsv"  # sets, written one after the other


def test_the_questions_of_the_list_are_understood(chat):
    rows = list(csv.DictReader(QUESTIONS.open(), delimiter="\t"))
    chat.read.groups |= {name: ("type", name) for name in ("dendritic cell", "plasma cell", "macrophage", "nk cell")}
    asked = [chat.read(row["question"], Question("")) for row in rows]
    right = np.array([(q.topic * (not q.unread) or "none") == r["topic"] for q, r in zip(asked, rows, strict=True)])
    assert len(right) == 257
    assert right.mean() >= 0.97, [rows[i] for i in np.flatnonzero(~right)]


def test_a_checkpoint_without_a_readout_is_refused_at_once(adata):
    with pytest.raises(ValueError, match="This checkpoint has no label readout"):
        Chat(synthetic.tiny_pipeline(), adata)


def test_the_tool_answers(pipeline, adata):
    chat = sm.tl.chat(adata, 'leiden == "1"', model=pipeline)
    assert chat.ask("What are they?").text == "Labels of the 30 selected cells: T cell (100 %)."


def test_the_command_lists_questions_and_answers(pipeline, adata, tmp_path, capsys):
    pipeline.save_pretrained(tmp_path / "checkpoint")
    adata.write_h5ad(tmp_path / "cells.h5ad")
    words = ["chat", str(tmp_path / "cells.h5ad"), "--model", str(tmp_path / "checkpoint")]
    words += ["--select", "leiden == '0'", "--ask", "What are they?"]
    assert main([*words, "--json"]) == 0
    text = "Labels of the 30 selected cells: B cell (100 %)."
    assert json.loads(capsys.readouterr().out) == [{"question": "What are they?", "text": text, "topic": "types"}]
    assert main(words) == 0
    assert capsys.readouterr().out == f"> What are they?\n{text}\n\n"


@pytest.fixture(scope="module")
def whole(pipeline, adata):
    """A chat about all cells."""
    return Chat(pipeline, adata.copy())


def test_shares_say_of_whose_cells_they_are(whole, adata):
    chat = whole
    text = chat.ask("Why not monocytes?").text
    label, n = re.search(r"The commonest label of the 120 cells is ([\w ]+), of (\d+)\.", text).groups()
    assert f"(shares of the {n} cells called {label} and of the 30 cells called monocyte)" in text
    mine, theirs = ((adata.obs["cell_type"] == kind).to_numpy() for kind in (label, "monocyte"))
    assert len(check_shares(text, adata, mine, theirs)) > 3
    text = chat.ask("Which markers do the B cells have?").text
    assert text.startswith(
        "Markers of B cell by the share of the 30 cells called B cell, against the share of the 90 "
    )
    assert "cells have less than the median of the 30 cells called B cell" in chat.ask("Do B cells express CD19?").text


def test_cells_like_a_type_are_ordered_by_its_probability_and_are_not_the_cells_of_the_type(pipeline, adata):
    adata = adata.copy()
    chat = Chat(pipeline, adata)
    text = chat.ask("Which cells are most like B cells?").text
    assert text.startswith(
        "30 of the 120 cells (25 %) are called B cell or a kind of it. Mean probability of B cell in"
    )
    labels = [str(name) for name in adata.uns["scmmgpt"]["annotate"]["labels"]]
    odds = adata.obsm["scmmgpt_probabilities"][:, labels.index("B cell")]
    means = {kind: odds[(adata.obs["scmmgpt_cell_type"] == kind).to_numpy()].mean() for kind in set(chat.labels)}
    best = max(set(means) - {"B cell"}, key=lambda kind: means[kind])
    assert f"in the others: {best} (30 cells): {means[best]:.2g}" in text
    assert text.endswith(LIKENESS)


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ("Which cells are these?", "Labels of the 120 cells: "),
        ("How many donors are there?", "Of the 120 cells: donor_id: donor-1 (50 %) and donor-2 (50 %)."),
        ("How many batches are there?", 'No column of obs is called "batch". Of the 120 cells: '),
        ("What else could the monocytes be?", "The runner-up is "),
        ("Which cells are least certain?", "Mean probability of the labels: "),
        (
            "Which type has the strongest interferon response?",
            "Interferon response, share of cells with counts of 3 or",
        ),
        ("Are the cells stimulated by interferon?", "Of the 120 cells, the share with counts of 3 or more genes of a"),
        ("Which type has the lowest number of genes?", "Medians of the 120 cells, the lowest first. "),
        ("How many mitochondrial reads?", "The median of the 120 cells is "),
        ("Are there any doublets?", 'The counts do not answer that ("doublets": no gene, label, column or subject of'),
    ],
)
def test_questions_of_a_stranger_have_their_own_answers(whole, question, words):
    assert whole.ask(question).text.startswith(words)


def test_types_are_ordered_by_genes_where_a_question_asks_for_genes(whole):
    chat = whole
    for question, unit in (
        ("Which type has the fewest genes?", "genes"),
        ("Which type has the fewest counts?", "counts"),
    ):
        middle = [float(n.replace(",", "")) for n in re.findall(rf"([\d,]+) {unit}", chat.ask(question).text)]
        assert middle == sorted(middle)
        assert len(middle) > 1
    assert chat.ask("How many mitochondrial reads?").text.endswith("none of them mitochondrial.")
    assert "`scanpy.pp.scrublet` looks for doublets." in chat.ask("Any doublets?").text


def test_a_label_of_the_file_is_taken_for_the_type_that_its_cells_are_called(pipeline, adata):
    adata = adata.copy()
    adata.obs["given"] = adata.obs["cell_type"].astype(str).replace({"monocyte": "delta"})
    text = Chat(pipeline, adata).ask("Why are these not delta cells?").text
    assert text.startswith(
        "Of the 30 cells of given delta 30 are called monocyte. 30 of the 120 cells (25 %) are called"
    )
