"""Every input of `cases/inputs.py` gives the right cells with the right barcodes, or one clear error."""

import json
import logging
import re

import anndata as ad
import numpy as np
import pytest

from scmmgpt.__main__ import main
from scmmgpt.readers.cell_files import read_file
from scmmgpt.tests.cases.inputs import CASES, COUNTS


pytestmark = pytest.mark.filterwarnings("ignore:Writing zarr v2", "ignore:Observation names are not unique")


def in_one_line(arguments, capsys):
    """Exit code and the one line of an error."""
    capsys.readouterr()
    code = main(arguments)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what)
def test_every_input_is_read_right_or_refused_in_one_line(case, labelled_checkpoint, tmp_path, capsys, caplog):
    (tmp_path / "input").mkdir()
    path = case.build(tmp_path / "input")
    code, captured = in_one_line(["inspect", str(path), "--model", labelled_checkpoint], capsys)
    if case.refused:
        assert code == 2
        assert re.search(case.refused, captured.err), captured.err
        output = tmp_path / "out.h5ad"
        code, captured = in_one_line(
            ["annotate", str(path), "--model", labelled_checkpoint, "-o", str(output)], capsys
        )
        assert code == 2
        assert re.search(case.refused, captured.err), captured.err
        assert not output.exists()
        return
    assert code == 0, captured.out
    assert re.search(case.says, captured.out, re.DOTALL), captured.out
    with read_file(path, backed=True) as file:
        chunks = [file[start : start + 9].to_memory() for start in range(0, file.n_obs, 9)]
    adata = read_file(path)
    expected = COUNTS[case.cells]
    if len(expected):
        assert sorted(bare(name) for name in adata.obs_names) == sorted(expected.index)
        assert_same_counts(adata, expected)
        assert [name for chunk in chunks for name in chunk.obs_names] == list(adata.obs_names)
        assert_same_counts(ad.concat(chunks, merge="same"), expected)
    assert adata.n_vars - len(set(gene_names(adata)) & set(COUNTS.columns)) == case.aside or not len(expected)
    for name in case.obs:
        assert name in adata.obs, list(adata.obs)
    for name in case.var:
        assert name in adata.var, list(adata.var)


def bare(name):
    """A barcode without the path and the ending that featureCounts keeps."""
    return name.rsplit("/", 1)[-1].removesuffix(".bam")


def gene_names(adata):
    return next((list(adata.var[c]) for c in ("feature_name", "gene_name") if c in adata.var), list(adata.var_names))


def assert_same_counts(adata, expected):
    frame = adata.to_df()
    frame.index, frame.columns = [bare(name) for name in frame.index], gene_names(adata)
    shared = [gene for gene in frame.columns if gene in expected.columns]
    assert len(shared) >= 24
    scale = 4 if (frame[shared].to_numpy() % 1).any() else 1  # of the tables with fractions
    np.testing.assert_array_equal(frame.loc[expected.index, shared] * scale, expected[shared])


def test_what_inspect_says_is_what_the_commands_log_and_read(labelled_checkpoint, tmp_path, capsys, caplog):
    case = next(case for case in CASES if case.what == "metadata of Seurat")
    path = case.build(tmp_path)
    assert main(["inspect", str(path), "--model", labelled_checkpoint, "--json"]) == 0
    notes = json.loads(capsys.readouterr().out)["file"]["notes"]
    output = str(tmp_path / "out.h5ad")
    with caplog.at_level(logging.WARNING, "scmmgpt"):
        options = ["--cluster-key", "seurat_clusters", "--quiet"]
        assert main(["annotate", str(path), "--model", labelled_checkpoint, "-o", output, *options]) == 0
    assert all(any(note in record.getMessage() for record in caplog.records) for note in notes)
