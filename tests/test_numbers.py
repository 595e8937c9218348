"""Numbers that several pages state: they agree with each other, with `.eval_results` and with the checkpoint."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import yaml


ROOT = Path(__file__).parents[1]
README, EVALUATION, CARD = (
    (ROOT / path).read_text() for path in ("README.md", "docs/evaluation.md", "docs/checkpoint.md")
)
OURS = "with reference profiles, as in the checkpoint"
REGRESSION, CELLTYPIST = "logistic regression, 4,000 genes", "CellTypist, 4,000 genes"
# A row of the docs -> the system of `eval crossdata`.
SYSTEMS = {
    "pooled readout": "pooled readout",
    "by types": "pooled readout, by types",
    "by types, each cell alone": "pooled readout, by types, each cell alone",
    f"by types, {OURS}": "pooled readout, by types, with reference profiles",
}


def table(title):
    """Rows of the table of docs/evaluation.md whose first column has this title: name -> mean, then by dataset."""
    (_, after) = EVALUATION.split(f"\n| {title} | mean |")
    rows = {}
    for line in after.splitlines()[2:]:
        if not line.startswith("| "):
            break
        name, *cells = (cell.strip().replace("*", "") for cell in line.strip("| ").split("|"))
        rows[name] = [float(cell.split()[0]) for cell in cells]
    return rows


def claim(start):
    """The row of the claims that starts so, as text without bold type."""
    (line,) = (line for line in EVALUATION.splitlines() if line.startswith(f"| {start}"))
    return line


@pytest.mark.parametrize("title", ["all classes", "the tissue's classes", "terms", "hierarchical F1"])
def test_the_mean_of_a_row_is_that_of_its_datasets(title):
    for name, (mean, *by_set) in table(title).items():
        assert len(by_set) == 11, name
        assert mean == pytest.approx(sum(by_set) / 11, abs=0.3), name  # datasets are stated as whole numbers


def test_the_stored_results_are_those_of_the_table():
    entries = yaml.safe_load((ROOT / ".eval_results" / "crossdata.yaml").read_text())
    stored = {entry["notes"].split(";")[0]: entry["value"] for entry in entries}
    assert {system: stored[system] for system in SYSTEMS.values()} == {
        system: pytest.approx(table("all classes")[name][0] / 100, abs=0.00051) for name, system in SYSTEMS.items()
    }


def test_claims_and_first_page_state_the_means_of_the_tables():
    rows, tissue, terms = (table(title) for title in ("all classes", "the tissue's classes", "terms"))
    ours, plain = rows[f"by types, {OURS}"][0], rows["by types"][0]
    regression, celltypist = rows[REGRESSION][0], rows[CELLTYPIST][0]
    text = " ".join(README.split())
    assert f"mean macro-F1 of {ours} over 18 classes, and {plain} without reference profiles" in text
    assert f"(logistic regression: {regression}, CellTypist: {celltypist};" in text
    alone = rows["by types, each cell alone"][0]
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert f"macro-F1 {plain} in place of {alone}; {ours} with reference profiles" in changes
    words = claim("datasets left out: macro-F1")
    assert f"| {ours} with reference profiles; without {plain} by types, {rows['pooled readout'][0]} |" in words
    assert f"| {regression} logistic regression, {celltypist} CellTypist |" in words
    leads = [float(lead) for lead in re.search(r"won: ([\d.]+); ([\d.]+), ([\d.]+)", words).groups()]
    expected = [value - regression for value in (ours, plain, rows["pooled readout"][0])]
    assert leads == pytest.approx(expected, abs=0.11)  # each is of numbers before they were rounded
    words = claim("the same, candidates of the tissue")
    assert f"| {tissue[f'by types, {OURS}'][0]} with reference profiles" in words
    assert f"| {tissue[REGRESSION][0]}, {tissue[CELLTYPIST][0]} |" in words
    words = claim("the same, Cell Ontology terms")
    assert f"| {terms[OURS][0]} with reference profiles, {terms['pooled readout'][0]} without" in words
    assert f"| {terms[REGRESSION][0]} logistic regression, {terms[CELLTYPIST][0]} CellTypist" in words


def test_what_the_page_says_of_the_learning_curve_follows_from_its_table():
    rows = {}
    for line in EVALUATION.split("| datasets left out | 1 % (57 cells)")[1].splitlines()[2:6]:
        name, *cells = (cell.strip() for cell in line.strip("| ").split("|"))
        rows[name.split()[0]] = [float(cell.split()[0]) for cell in cells[:-1]]
    behind = [
        [full - deep for full, deep in zip(rows[name], rows["network"], strict=True)]
        for name in ("pooled", "logistic")
    ]
    ends = [f"{int(min(gaps))} to {round(max(gaps))} points" for gaps in behind]
    assert f"stays behind by {ends[0]}" in EVALUATION
    assert f"behind logistic regression by {ends[1].removesuffix(' points')}." in EVALUATION


def test_the_checkpoint_that_pages_name_is_that_of_the_repository():
    digest = hashlib.sha256((ROOT / "model.safetensors").read_bytes()).hexdigest()[:16]
    version = re.match(r"# (scmmgpt-human \S+)", CARD)[1]
    assert f"Model: {version}, sha256 {digest}, of this package." in README
    assert f"checkpoint {version}, sha256 {digest}" in (ROOT / "docs" / "citing.md").read_text()
    cells, types = re.search(r"trained on ([\d,]+) human cells .* names (\d+) cell types", CARD).groups()
    assert f"knows {types} cell types" in README
    assert f"from {cells} labelled cells" in " ".join(README.split())
    assert len(json.loads((ROOT / "config.json").read_text())["annotation"]["labels"]) == int(types)
