"""The numbers of docs/scale.md that follow from others: computed again from the inputs that the tables state."""

import re
from pathlib import Path

import pytest


PAGE = (Path(__file__).parents[1] / "docs" / "scale.md").read_text()
CELLS, MANY = 27e6, 100e6
H100 = 989e12  # operations a second, dense bfloat16, published
BUSY = 0.4  # of the peak


def row(section, name):
    """The cells of a row of a table in a section, by its first cell."""
    part = PAGE.split(f"### {section}\n")[1].split("\n#")[0]
    (found,) = [line for line in part.splitlines() if line.startswith(f"| {name}")]
    return [cell.strip() for cell in found.strip("|").split("|")]


def numbers(text):
    """The numbers of a text, without those of names such as H100."""
    words = re.findall(r"(?<![A-Za-z\d.,-])\d[\d,]*(?:\.\d+)?(?![\d.,]*[A-Z]\b)", text)
    return [float(word.replace(",", "")) for word in words]


def says(text, *expected, rel=0.04):
    """The numbers of a text are the expected ones, as far as they are rounded."""
    assert numbers(text) == pytest.approx([*expected], rel=rel), text


PRETRAINING, ANNOTATION = "Pre-training on 27 million cells", "100 million cells annotated"


def test_bytes_and_core_hours_of_27_million_cells_are_those_of_a_cell_multiplied():
    small, large = 2.1e3, 2.1e3 * 1500 / 714  # bytes of a cell
    says(row(PRETRAINING, "download")[1], CELLS * small / 1e9, 2.1, 714, CELLS * large / 1e9, 1500)
    says(row(PRETRAINING, "download")[2], *(CELLS * size * 8 / 1e9 / 60 for size in (small, large)))
    hours = CELLS * 0.24e-3 / 3600
    says(row(PRETRAINING, "`prepare`")[1], hours, 714, hours * 1500 / 714, 1500)
    says(row(PRETRAINING, "`prepare`")[2], 0.24, 38_740)
    says(row(PRETRAINING, "corpus")[1], CELLS * 965 / 1e9, 714, 965, CELLS * 1.7e3 / 1e9, 1500, 1.7)
    says(row(PRETRAINING, "`cache`")[1], CELLS * 4.3e3 / 1e9, 4.3, 1500)


def scgpt_operations(n_genes):
    """Operations of one pass of scGPT's published size: 12 layers, 512 dimensions, feed-forward layers of 512."""
    dense = 2 * (4 * 512**2 + 2 * 512 * 512) * n_genes
    return 12 * (dense + 4 * n_genes**2 * 512)


def test_gpu_hours_of_pretraining_follow_from_rates_and_operations():
    a_cell = 3 * scgpt_operations(1200)  # forward, and twice that backward
    stage = row(PRETRAINING, "stage 1, an epoch")
    says(stage[1], CELLS * a_cell / (BUSY * H100) / 3600, CELLS / 842 / 3600)
    says(stage[2], 842, 1024, BUSY * H100 / a_cell, 40, 1200, a_cell / 1e9)
    forward = 2 * 6.74e9 * 160  # two operations a weight and token; LoRA has next to no weights to learn
    stage = row(PRETRAINING, "stage 2, an epoch, Llama-2")
    says(stage[1], *(CELLS * n * forward / (BUSY * H100) / 3600 for n in (2, 3)))
    says(stage[2], 40, 160, 6.74, *(n * forward / 1e12 for n in (2, 3)))


@pytest.mark.parametrize(
    "name", ["label readout alone", "places among types", "encoder of the root", "scGPT, 51 M", "the same on H100s"]
)
def test_hours_of_100_million_cells_follow_from_the_cost_of_a_cell(name):
    assert "2.1 kB a cell on disk, 620 MB/s to the disk" in PAGE
    rate, copied = 620e6, MANY * 2.1e3 / 620e6
    _, a_cell, one, many, useful, results, basis = row(ANNOTATION, name)
    joined = 2 * numbers(results)[0] * 1e9 / rate
    costs = [1e-3 * number for number in numbers(a_cell)]
    if "to join" in a_cell:
        joined = MANY * costs.pop()
    if name.startswith("the same"):
        operations = scgpt_operations(1200)
        assert costs == pytest.approx([operations / (share * H100) for share in (BUSY, 0.26)], rel=0.03)
        says(basis, 26, 40, 989, operations / 1e9)
    says(one, *((MANY * cost + joined) / 3600 for cost in costs))
    if many:
        says(many, *((max(MANY * cost / 64, copied) + joined) / 3600 for cost in costs))
    if useful:
        says(useful, *(MANY * cost / max(copied, joined) for cost in costs), rel=0.05)
