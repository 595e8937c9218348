"""Types that no training cell has: what their reference profiles name, and what known cells keep."""

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from scmmgpt.annotation_scmmgpt import name_by_profile
from scmmgpt.cells_scmmgpt import Cells
from scmmgpt.labels_scmmgpt import profiled_types
from scmmgpt.profiles_scmmgpt import ProfiledTypes
from scmmgpt.readout_scmmgpt import ScMMGPTLabelReadout
from scmmgpt.regression_scmmgpt import solve_groups, with_profiles


pytest.importorskip("cellxgene_ontology_guide")

from scmmgpt.eval import left_out as evaluation
from scmmgpt.tests.test_left_out import LIVER, MARKERS_AND_LIVER, MEANINGS, N_OTHERS, TYPES, wide_dataset
from scmmgpt.train import left_out
from scmmgpt.train.references import Reference, TypeProfiles


PROFILES = np.hstack([np.repeat(MARKERS_AND_LIVER[[0, LIVER]], 2, axis=1), np.full((2, N_OTHERS), 5.0)]) + 0.1
HEPATOCYTE = {"id": "CL:0000182", "name": "hepatocyte", "names": ["hepatocyte"], "text": "A liver cell."}


@pytest.fixture(scope="module")
def readout():
    """Four labels, the liver as a kind of other cells, and hepatocytes as a type of it."""
    meanings = np.array([[1, 0, 0, 0, 0], [0, 0, 0, 0, 1.0]])
    genes = np.arange(PROFILES.shape[1])
    reference = Reference(csr_matrix(PROFILES.astype(np.float32)), genes, meanings, 4)
    fitted, _ = left_out.fit_known([wide_dataset([0, 1, 2, 3], 0), wide_dataset([0, 1, 2, 3], 1)], MEANINGS, reference)
    TypeProfiles([HEPATOCYTE["id"]], PROFILES[1:], genes, [0]).add_to(fitted)
    return fitted


def cells_of(targets, seed):
    data = wide_dataset(targets, seed)
    return Cells.from_csr(data.counts, np.arange(data.counts.shape[1]))


def test_a_profile_names_novel_cells_of_its_type_and_no_known_ones(readout):
    types = ProfiledTypes.of(readout, readout.for_genes(np.arange(30)))
    liver, known = cells_of([LIVER], 3), cells_of([0, 1, 2, 3], 2)
    assert (types.name(liver, np.full(len(liver), 2.0))[:, 0] == 0).mean() > 0.4  # some 27 genes are few
    assert (types.name(known, np.full(len(known), 2.0))[:, 0] == -1).all()
    assert (types.name(liver, np.zeros(len(liver)))[:, 0] == -1).all()  # plainly of a trained label
    batch, alone = types.name(liver, np.full(len(liver), 2.0)), types.name(liver[[4]], np.full(1, 2.0))
    np.testing.assert_array_equal(batch[[4]], alone)


def test_a_candidate_with_a_profile_competes_with_the_labels(readout):
    panel = readout.for_genes(np.arange(30), [0])
    assert panel.bias.shape == (5,)
    assert panel.others is None  # the liver is no kind of other cells beside its own type
    assert (panel(cells_of([LIVER], 3)).argmax(axis=1) == 4).mean() > 0.9
    known = panel(cells_of([0, 1, 2, 3], 2)).argmax(axis=1)
    assert (known == np.repeat([0, 1, 2, 3], 30)).mean() > 0.9


def test_the_regression_with_a_profile_is_that_of_its_definition(readout):
    arrays = with_profiles(readout.arrays(), [0])
    np.testing.assert_allclose(arrays["group_weights"].sum(), 1)
    np.testing.assert_allclose(arrays["group_weights"] @ arrays["group_labels"], np.full(5, 0.2))
    root = np.sqrt(arrays["group_weights"])[:, None]
    x, y = root * (arrays["groups"] - arrays["group_mean"]), root * (arrays["group_labels"] - 0.2)
    within = arrays["factors"].T @ arrays["factors"] + np.diag(arrays["noise"])
    weights, _ = solve_groups(arrays, np.ones(len(arrays["noise"]), bool))
    np.testing.assert_allclose(weights, np.linalg.solve(x.T @ x + within, x.T @ y).T, atol=1e-9)


def test_profiles_are_saved_and_load_again(readout):
    sizes = readout.sizes() | dict(zip(("num_profiles", "num_profile_genes"), readout.profiles.shape, strict=True))
    other = ScMMGPTLabelReadout(4, **sizes)
    other.load_state_dict(readout.state_dict())
    liver, novelty = cells_of([LIVER], 3), np.full(30, 2.0)
    names = [ProfiledTypes.of(one, one.for_genes(np.arange(30))).name(liver, novelty) for one in (readout, other)]
    np.testing.assert_array_equal(*names)


def test_a_label_in_other_words_means_the_type_of_a_profile_unless_a_trained_label_is_meant():
    found = profiled_types({"Hepatocytes": "Hepatocytes", "B cell": "B cell"}, {}, {"B cell": "."}, [], [HEPATOCYTE])
    assert found == {"A liver cell.": 0}
    by_id = profiled_types({"mine": "mine"}, {"mine": "CL:0000182"}, {}, [], [HEPATOCYTE])
    assert by_id == {"A liver cell.": 0}
    terms = [{"id": "CL:0000182", "names": ["hepatocyte"], "labels": ["liver cell"]}]
    assert profiled_types({"hepatocyte": "h"}, {}, {"liver cell": "."}, terms, [HEPATOCYTE]) == {}


def test_names_by_a_profile_are_marked():
    columns = {
        "cell_type": np.array(["Unknown", "B cell"]),
        "cl_id": np.array(["", "CL:0000236"]),
        "score": np.array([0.2, 0.9], np.float32),
    }
    found = name_by_profile(columns, [HEPATOCYTE], np.array([0, -1.0]), np.array([0.7, 0]))
    assert found["cell_type"].tolist() == ["hepatocyte", "B cell"]
    assert found["cl_id"].tolist() == ["CL:0000182", "CL:0000236"]
    assert found["by_profile"].tolist() == [True, False]
    np.testing.assert_allclose(found["score"], [0.7, 0.9])


def test_the_report_of_a_label_left_out_counts_what_its_profile_names(monkeypatch):
    genes, terms = np.arange(PROFILES.shape[1]), ["CL:0000236", "CL:0000182"]
    reference = Reference(csr_matrix(PROFILES.astype(np.float32)), genes, np.eye(5)[[0, 4]], 4)
    datasets = [wide_dataset([0, 1, 2, 3], 0), wide_dataset([0, 1, 2, 3], 1)]
    profiles = TypeProfiles(terms, PROFILES, genes, [-1, 0])
    sources = evaluation.Sources(["one", "two"], datasets, TYPES, MEANINGS, reference, profiles)
    monkeypatch.setattr(evaluation, "read_sources", lambda folder: sources)
    report = evaluation.evaluate_left_out("folder", "labels")
    of_b = [row["profiles"] for row in report["new"] if row["type"] == "B cell"]
    assert all(row["as_candidate"]["called_it"] > 0.7 for row in of_b)
    assert all("as_candidate" not in row["profiles"] for row in report["new"] if row["type"] == "mast cell")
    assert report["by_profiles"]["with_a_profile"]["n_labels"] == 1
    lost = report["known_lost_mean_of_datasets"]
    assert max(lost["lost_by_default"], lost["lost_by_a_candidate"]) < 0.05
