"""Types that no training cell has: what their reference profiles name, and what known cells keep."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from scmmgpt.annotation_scmmgpt import name_by_profile
from scmmgpt.cells_scmmgpt import Cells
from scmmgpt.evidence_scmmgpt import Explainer, label_members
from scmmgpt.labels_scmmgpt import candidate_columns, profiled_types, with_types
from scmmgpt.novelty_scmmgpt import Neighbours
from scmmgpt.profiles_scmmgpt import NO_SIBLING, SIBLING_LEAD, ProfiledTypes, broader_answers, kinds_of_terms
from scmmgpt.readout_scmmgpt import ScMMGPTLabelReadout
from scmmgpt.regression_scmmgpt import solve_groups, with_profiles


pytest.importorskip("cellxgene_ontology_guide")

from scmmgpt.eval import left_out as evaluation
from scmmgpt.eval import untrained
from scmmgpt.tests.test_left_out import LIVER, MARKERS_AND_LIVER, MEANINGS, N_OTHERS, TYPES, wide_dataset
from scmmgpt.train import left_out
from scmmgpt.train.data import ontology
from scmmgpt.train.references import Reference, TypeProfiles


PROFILES = np.hstack([np.repeat(MARKERS_AND_LIVER[[0, LIVER]], 2, axis=1), np.full((2, N_OTHERS), 5.0)]) + 0.1
LIVER_LABEL = 4  # the first after the trained ones
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
    found = profiled_types({"Hepatocytes": "Hepatocytes", "B cell": "B cell"}, {}, {"B cell": "."}, [HEPATOCYTE])
    assert found == {"A liver cell.": 0}
    by_id = profiled_types({"mine": "mine"}, {"mine": "CL:0000182"}, {}, [HEPATOCYTE])
    assert by_id == {"A liver cell.": 0}
    ids = {"liver cell": "CL:0000182"}
    assert profiled_types({"hepatocyte": "h"}, ids, {"liver cell": "."}, [HEPATOCYTE]) == {}


def test_a_type_with_a_profile_means_itself_and_the_trained_labels_below_it():
    stored = [{"id": "CL:0000165", "names": ["neuroendocrine cell"], "labels": ["D cell"]}]
    known = {"id": "CL:0000165", "name": "neuroendocrine cell", "names": ["neuroendocrine cell"]}
    known |= {"labels": ["neuroendocrine cell"], "text": "A cell."}
    trained = {"D cell": ".", "B cell": "."}
    assert profiled_types({"Neuroendocrine cells": "."}, {}, trained, [known]) == {"A cell.": 0}
    terms = with_types(stored, [known])
    columns = {"D cell": 0, "B cell": 1, "neuroendocrine cell": 2}
    found = label_members(["neuroendocrine cell", "Neuroendocrine cells", "D cell"], columns, terms)
    assert found.tolist() == [[True, False, True], [True, False, True], [True, False, False]]
    asked = {"neuroendocrine cell": "neuroendocrine cell", "B cell": "."}
    candidates = candidate_columns(asked, trained | {"neuroendocrine cell": "A cell."}, {}, terms)
    assert candidates.meant["neuroendocrine cell"] == ["neuroendocrine cell", "D cell"]


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


def test_a_sibling_that_a_profile_explains_as_well_goes_up_and_known_cells_stay(readout):
    """B cells, of which the readout has a profile alone, beside cells of its labels in one file."""
    left = untrained.without_label(readout, 0)
    TypeProfiles(["CL:0000236"], PROFILES[:1], np.arange(PROFILES.shape[1]), [-1]).add_to(left)
    panel, cells, is_b = left.for_genes(np.arange(30)), cells_of([0, 1, 2, 3], 2), np.arange(120) < 30
    file = Neighbours(Neighbours.of_scores(panel.scores(cells)), np.zeros(120, np.float32))
    types = ProfiledTypes.of(left, panel, np.full((3, 1), 7))
    assert types.lead == np.inf  # 30 genes are a panel, where leads are small
    types = replace(types, lead=SIBLING_LEAD)
    file = types.with_types(file, cells)
    near = np.tile([0.2, -1], (120, 1))  # nothing is novel by itself
    novelty, names = types.judge(cells, near, file)
    assert (novelty[is_b, 0] > 1).mean() > 0.9
    assert (novelty[is_b & (novelty[:, 0] > 1), 1] == 7).all()
    assert (novelty[~is_b, 0] > 1).mean() < 0.05
    np.testing.assert_array_equal(novelty[novelty[:, 0] <= 1], near[novelty[:, 0] <= 1])
    assert (names[:, 0] == -1).all()
    one_by_one = [types.judge(cells[[cell]], near[:1], file)[0][0] for cell in range(120)]
    np.testing.assert_array_equal(novelty, one_by_one)
    novel = np.tile([2.0, -1], (120, 1))
    np.testing.assert_array_equal(types.judge(cells, novel, file)[0], novel)  # novelty has its own answer
    above = replace(types, broader=np.full((3, 1), NO_SIBLING))
    np.testing.assert_array_equal(above.judge(cells, near, file)[0], near)  # the label is right for the type, too
    named = types.judge(cells, novel, file)[1][:, 0] == 0
    assert not named[~is_b].any()
    assert ProfiledTypes.of(left, panel).with_types(file, cells) is file  # an older checkpoint


def test_a_novel_cell_is_of_the_broader_type_that_its_kinds_explain_together(readout):
    """Neurons that are like no single kind of neuron, on scores of four labels and three types."""
    terms = [{"id": "CL:0000540", "labels": ["a"]}, {"id": "CL:0000988", "labels": ["b", "c"]}]
    kinds = kinds_of_terms([*"abcd", *map(str, range(18))], terms, [{"above": ["CL:0000540"]}] * 2 + [{"above": []}])
    assert kinds == [[0, 22, 23], [1, 2]]
    assert kinds_of_terms([*"abcd"], terms, [{"above": ["CL:0000540"]}] * 2) == [[], []]  # too many of all types
    assert kinds_of_terms([*"abcd", *map(str, range(18))], terms, [{}]) == [[], []]  # an older checkpoint
    four = ProfiledTypes.of(readout, readout.for_genes(np.arange(30)), kinds=[[0, 4, 5], [1, 2]])
    types = replace(four, bias=np.zeros(7, dtype=np.float32), lead=0.0)
    scores = [
        [0.3, 0.1, 0.1, 0.1, 0.25, 0.2, 0.1],  # together 0.75, and 0.65 more than any other
        [0.3, 0.1, 0.1, 0.1, 0.25, 0.2, 0.4],  # another type is best
        [0.2, 0.1, 0.1, 0.1, 0.15, 0.1, 0.0],  # together 0.45
        [0.4, 0.1, 0.1, 0.3, 0.2, 0.0, 0.1],  # 0.3 more than a type of none
        [0.1, 0.5, 0.4, 0.1, 0.1, 0.0, 0.1],
    ]
    assert types.term_of(np.array(scores)).tolist() == [0, -1, -1, -1, 1]
    assert (replace(types, lead=np.inf).term_of(np.array(scores)) == -1).all()  # few genes


def test_only_novel_cells_without_a_name_get_the_broader_type_of_their_kinds(readout):
    left = untrained.without_label(readout, 0)
    TypeProfiles(["CL:0000236"], PROFILES[:1], np.arange(PROFILES.shape[1]), [-1]).add_to(left)
    panel, cells = left.for_genes(np.arange(30)), cells_of([0, 1, 2, 3], 2)
    file = Neighbours(Neighbours.of_scores(panel.scores(cells)), np.zeros(120, np.float32))
    types = ProfiledTypes.of(left, panel, np.full((3, 1), NO_SIBLING), [[0, 1, 3], [0, 1]])
    types = replace(types, lead=SIBLING_LEAD)
    file = types.with_types(file, cells)
    novelty = np.array([[0.2, -1], [2, -1], [2, 1]])[np.arange(120) % 3]
    judged, names = types.judge(cells, novelty, file)
    open_cells = (np.arange(120) % 3 == 1) & (names[:, 0] < 0)
    np.testing.assert_array_equal(judged[~open_cells], novelty[~open_cells])
    assert (judged[open_cells & (np.arange(120) // 30 == 1), 1] == 0).mean() > 0.9  # one of the two labels of the term


def test_the_answer_for_label_and_type_is_their_narrowest_common_ancestor():
    names = {"natural killer cell": "CL:0000623", "macrophage": "CL:0000235", "epithelial cell": "CL:0000066"}
    names |= {"B cell": "CL:0000236", "neuron": "CL:0000540"}
    terms = ontology.label_terms(names)
    types = [{"above": ontology.shared(term, names.values())} for term in ("CL:0000625", "CL:0000182")]
    answers = broader_answers(list(names), terms, types)  # CD8-positive T cell, hepatocyte
    assert terms[answers[0, 0]]["name"] == "lymphocyte"
    assert answers[2].tolist() == [-1, NO_SIBLING]  # a hepatocyte is an epithelial cell
    assert (answers[[0, 1, 3, 4], 1] == -1).all()
    assert broader_answers(list(names), terms, [HEPATOCYTE]) is None


def test_the_report_of_labels_left_out_counts_how_their_cells_are_named(monkeypatch):
    genes, terms = np.arange(PROFILES.shape[1]), ["CL:0000236", "CL:0000182"]
    reference = Reference(csr_matrix(PROFILES.astype(np.float32)), genes, np.eye(5)[[0, 4]], 4)
    datasets = [wide_dataset([0, 1, 2, 3], 0), wide_dataset([0, 1, 2, 3], 1)]
    profiles = TypeProfiles(terms, PROFILES, genes, [-1, 0])
    sources = evaluation.Sources(["one", "two"], datasets, TYPES, MEANINGS, reference, profiles)
    monkeypatch.setattr(evaluation, "read_sources", lambda folder: sources)
    report = evaluation.evaluate_left_out("folder", "labels")
    for part in ("known_laboratories", "new_laboratory"):
        assert report[part]["n_labels"] == 4
        of_b = report[part]["labels"]["B cell"]
        assert of_b["n_cells"] == 60
        assert of_b["right"] > 0.7
        np.testing.assert_allclose(of_b["right"], of_b["called_it"] + of_b["ancestor"] + of_b["unknown"])
    assert report["own_types"]["n_labels"] == 0
    assert report["known_cells"]["n_cells"] == 240
    assert report["known_cells"]["lost"] < 0.05


def test_the_evidence_for_a_type_with_a_profile_is_of_the_genes_of_its_cells(readout):
    members = np.eye(5, dtype=bool)[[LIVER_LABEL, 0]]
    explainer = Explainer.of(readout, np.arange(30), members, [0])
    liver = np.flatnonzero(np.repeat(MARKERS_AND_LIVER[LIVER], 2) > np.repeat(MARKERS_AND_LIVER[0], 2))
    markers = explainer.panel.gene_ids[explainer.markers[0][explainer.markers[0] >= 0]]
    assert set(liver) <= set(markers.tolist())
    cells = cells_of([LIVER], 3)
    found, _ = explainer(cells, np.zeros(len(cells), int), np.ones(len(cells), int))
    assert (explainer.panel.gene_ids[found.genes[:, 0]][:, None] == liver).any(axis=1).mean() > 0.9
