"""`scmmgpt inspect` says what is in a file, for people and for programs."""

import json
import logging

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scmmgpt.__main__ import main
from scmmgpt.commands import inspect_input
from scmmgpt.commands.inspect_input import inspect_file, render
from scmmgpt.genes_scmmgpt import GeneIndex


SYMBOLS = [f"GENE{i}" for i in range(60)]


REFERENCE = inspect_input._reference


@pytest.fixture
def gene_index():
    return GeneIndex({symbol: i for i, symbol in enumerate(SYMBOLS)})


@pytest.fixture(autouse=True)
def _judge_by_few_genes(gene_index, monkeypatch):
    monkeypatch.setattr(inspect_input, "_reference", lambda: (gene_index, "sixty genes"))


@pytest.fixture
def counts():
    return np.random.default_rng(0).poisson(1.5, (30, 60)).astype(np.float32)


def write(matrix, path, names=SYMBOLS, **obs):
    obs = pd.DataFrame(obs, index=[f"cell{i}" for i in range(len(matrix))])
    ad.AnnData(sp.csr_matrix(matrix), obs, pd.DataFrame(index=list(names))).write_h5ad(path)
    return path


def test_without_the_table_of_genes_the_checkpoint_of_the_package_judges_names(monkeypatch):
    def missing():
        raise ImportError("The gene table comes with the package celltypist, which is not installed.")

    monkeypatch.setattr("scmmgpt.train.data.gene_tables.reference_gene_index", missing)
    index, name = REFERENCE()
    assert name == "the checkpoint of this package"
    assert index.lookup("CD3E")[1] == "symbol"


def test_a_good_file_is_described_and_can_be_used(counts, tmp_path):
    path = write(counts, tmp_path / "cells.h5ad", cell_type=["B cell", "T cell"] * 15)
    text = render(inspect_file(path))
    assert "cells.h5ad: 30 cells x 60 variables (sparse, by row" in text
    assert "-> X: integer counts" in text
    assert "60 of 60 match (100.0%), with 100.0% of the expression; judged by sixty genes" in text
    assert "cell_type: 2 values, 50%" in text
    assert "=> can be used: scmmgpt annotate" in text


def test_logarithms_of_any_total_are_described(counts, tmp_path):
    values = np.random.default_rng(1).uniform(0, 14, counts.shape) * (counts > 1)  # log2 of more than any usual total
    text = render(inspect_file(write(values, tmp_path / "cells.h5ad")))
    assert "on the scale of the values" in text
    assert "=> can be used" in text


def test_a_report_is_json_with_an_exit_status(counts, tmp_path, capsys):
    path = write(np.log1p(counts), tmp_path / "cells.h5ad")
    assert main(["inspect", str(path), "--json"]) == 0
    assert logging.getLogger("scmmgpt").level == logging.NOTSET  # the caller's log is as it was
    report = json.loads(capsys.readouterr().out)
    assert report["usable"]
    assert report["matrix"]["kind"] == "log1p"
    assert report["cells"]["total_median"] == np.median(counts.sum(axis=1))


def test_a_file_that_cannot_be_used_says_why_and_what_it_holds(counts, tmp_path, capsys):
    path = write(counts - 1.5, tmp_path / "cells.h5ad")
    assert main(["inspect", str(path)]) == 2
    out = capsys.readouterr().out
    assert "X: scaled values" in out
    assert "=> cannot be used: X has negative values" in out


def test_an_assumption_that_is_none_names_the_choices(counts, tmp_path, capsys):
    path = write(counts, tmp_path / "cells.h5ad")
    assert main(["inspect", str(path), "--assume", "nonsense"]) == 2
    assert "--assume nonsense is not a kind" in capsys.readouterr().out


def test_foreign_genes_are_reported_with_their_species(counts, tmp_path):
    report = inspect_file(write(counts, tmp_path / "cells.h5ad", [f"Gene{i}" for i in range(60)]))
    assert not report["usable"]
    assert "These are mouse genes" in report["error"]
    assert report["genes"]["species"] == "mouse"


@pytest.mark.parametrize("flag", [[], ["--json"]])
def test_a_missing_file_is_one_line_and_status_2(flag, tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "nothing.h5ad"), *flag]) == 2
    captured = capsys.readouterr()
    text = captured.out if flag else captured.err
    assert "There is no file" in text
    assert len(text.splitlines()) == 1


def test_a_large_file_is_judged_by_parts_of_it(counts, tmp_path):
    report = inspect_file(write(np.vstack([counts] * 4), tmp_path / "cells.h5ad"), max_cells=40)
    assert (report["cells"]["cells"], report["cells"]["converted"]) == (120, 40)


def test_one_label_for_all_is_warned_of(counts, tmp_path):
    report = inspect_file(write(counts, tmp_path / "cells.h5ad", cell_type=["malignant cell"] * 30))
    assert "one label for all cells ('malignant cell')" in report["warnings"][0]


def test_the_file_is_not_changed(counts, tmp_path):
    path = write(counts, tmp_path / "cells.h5ad")
    before = path.read_bytes()
    inspect_file(path)
    assert path.read_bytes() == before


def test_the_command_line_says_its_own_options(counts, tmp_path, capsys, caplog):
    names = [f"PROBE{i}" for i in range(50)] + SYMBOLS[:10]
    path = write(counts, tmp_path / "cells.h5ad", names)
    assert main(["inspect", str(path)]) == 2
    out = capsys.readouterr().out
    assert "with `--gene-column`" in out
    assert "Or pass `--force` to read" in out
    assert "gene_column=" not in out
