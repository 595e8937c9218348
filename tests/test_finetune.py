"""Fine-tuning for labelled cells: from nothing or a checkpoint, held out by group, and what its checkpoint answers."""

import json
from types import SimpleNamespace
from unittest.mock import Mock

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from scipy.sparse import csr_matrix

from scmmgpt.cells_scmmgpt import Cells, hellinger_profile
from scmmgpt.configuration_scmmgpt import ScGPTConfig
from scmmgpt.feature_extraction_scmmgpt import ScMMGPTFeatureExtractor
from scmmgpt.modeling_scgpt import ScGPTModel
from scmmgpt.pipeline_scmmgpt import ScMMGPTPipeline
from scmmgpt.tests.corpora import SIZES
from scmmgpt.train import finetune, labels, prior, readout, router
from scmmgpt.train.arguments import FinetuneDataArguments
from scmmgpt.train.convert import save_cell_model


GENES = (
    "CD3D CD3E IL7R CCR7 MS4A1 CD79A CD79B CD19 LYZ CD14 S100A8 S100A9 NKG7 GNLY "
    "ACTB GAPDH B2M RPL3 RPS6 RPL5 RPL7 RPS3 RPS4X TMSB4X"
).split()
MARKERS = {"T cell": slice(0, 4), "B cell": slice(4, 8), "monocyte": slice(8, 12)}


@pytest.fixture(scope="module")
def cells():
    """Ninety cells of three types from three donors, with planted markers."""
    rng = np.random.default_rng(0)
    types = np.array(list(MARKERS))[np.arange(90) % 3]
    counts = rng.poisson(1.0, (90, len(GENES)))
    for row, name in enumerate(types):
        counts[row, MARKERS[name]] += rng.poisson(3, 4)
    obs = pd.DataFrame(
        {"label": types, "donor": [f"d{i // 30}" for i in range(90)]}, index=[f"c{i}" for i in range(90)]
    )
    return anndata.AnnData(csr_matrix(counts.astype(np.float32)), obs=obs, var=pd.DataFrame(index=GENES))


def run(adata, bert, path, **options):
    adata.write_h5ad(path / "cells.h5ad")
    values = {
        "adata": path / "cells.h5ad",
        "label_key": "label",
        "bert": bert,
        "new_model": json.dumps(
            {
                "cell_config": SIZES,
                "qformer_config": {"num_hidden_layers": 1},
                "model_config": {"num_query_tokens": 2, "projection_dim": 16},
            }
        ),
        "output_dir": path / "out",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        **options,
    }
    arguments = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    finetune.main(*finetune.make_parser().parse_args_and_config(arguments))
    return json.loads((path / "out" / "finetune.json").read_text())


@pytest.fixture(scope="module")
def tuned(cells, bert, tmp_path_factory):
    path = tmp_path_factory.mktemp("tuned")
    return run(cells[:72].copy(), bert, path, group_key="donor"), path / "out"


def test_a_fine_tuned_checkpoint_annotates_new_cells_with_its_labels(cells, tuned):
    pipeline = ScMMGPTPipeline.from_pretrained(str(tuned[1]), device="cpu")
    annotated = pipeline.annotate(cells[72:].copy())
    assert np.mean(annotated.obs["scmmgpt_cell_type"] == annotated.obs["label"]) > 0.9


def test_scores_of_an_annotation_are_those_of_the_regression(cells, tuned):
    pipeline = ScMMGPTPipeline.from_pretrained(str(tuned[1]), device="cpu")
    counts, _ = pipeline.processor.read_cells(cells)
    profiles = readout.profile_matrix(counts, len(pipeline.processor.gene_tokenizer))
    names = sorted(MARKERS)
    rows = np.arange(72)
    targets = np.array([names.index(label) for label in cells.obs["label"]])
    model = readout.fit_regression(profiles[rows], targets[rows], 3, tuned[0]["readout_strength"])
    expected = (profiles @ model.weights.T + model.bias).argmax(axis=1)
    annotated = pipeline.annotate(cells.copy())
    assert annotated.obs["scmmgpt_cell_type"].tolist() == [names[i] for i in expected]


def test_a_label_that_was_not_trained_can_be_answered(cells, tuned):
    pipeline = ScMMGPTPipeline.from_pretrained(str(tuned[1]), device="cpu")
    annotated = pipeline.annotate(
        cells[:6].copy(), labels={"lymphocyte": "lymphocyte", "monocyte": "cell type monocyte"}
    )
    assert set(annotated.obs["scmmgpt_cell_type"]) <= {"lymphocyte", "monocyte"}


def test_no_donor_is_in_training_and_validation_both(cells):
    data_args = FinetuneDataArguments(adata="", label_key="label", group_key="donor", validation_share=0.3)
    labelled = labels.read_labels(cells.obs, data_args)
    donors = labels.column_of(cells.obs, "donor")
    train, validation = labels.hold_out(labelled, donors, data_args, seed=0)
    assert len(validation)
    assert not set(donors[labelled.rows[train]]) & set(donors[labelled.rows[validation]])


def test_few_shots_train_on_so_many_cells_of_each_label(cells):
    data_args = FinetuneDataArguments(adata="", label_key="label", shots=2)
    labelled = labels.read_labels(cells.obs, data_args)
    train, validation = labels.hold_out(labelled, None, data_args, seed=0)
    assert np.bincount(labelled.targets[train]).tolist() == [2, 2, 2]
    assert len(validation) == 0


@pytest.mark.parametrize("group_key", [None, "donor"])
def test_labels_of_one_cell_each_are_refused_with_the_way_out(cells, group_key):
    obs = cells.obs.iloc[[0, 31, 62]]
    data_args = FinetuneDataArguments(adata="", label_key="label", group_key=group_key)
    labelled = labels.read_labels(obs, data_args)
    groups = None if group_key is None else labels.column_of(obs, group_key)
    with pytest.raises(ValueError, match="Every label .* has a single cell.* --shots 1"):
        labels.hold_out(labelled, groups, data_args, seed=0)


def test_labels_of_fewer_cells_than_there_are_folds_are_held_out_by_group(cells):
    obs = cells.obs.iloc[[0, 1, 2, 30, 31, 32]].copy()
    obs["donor"] = [f"d{i}" for i in range(6)]
    data_args = FinetuneDataArguments(adata="", label_key="label", group_key="donor", validation_share=0.2)
    labelled = labels.read_labels(obs, data_args)
    train, validation = labels.hold_out(labelled, labels.column_of(obs, "donor"), data_args, seed=0)
    assert sorted([*train, *validation]) == list(range(6))
    assert len(validation)


def test_the_refit_goes_to_the_device_of_the_model():
    with torch.device("meta"):
        readout_module = SimpleNamespace(
            gene_weights=torch.nn.Embedding(3, 2), bias=torch.nn.Parameter(torch.zeros(2))
        )
    changes = Mock(), Mock()
    changes[0].to.return_value, changes[1].to.return_value = torch.ones(3, 2), torch.ones(2)
    finetune.add_to_readout(SimpleNamespace(profile_readout=readout_module), *changes)
    for change in changes:
        change.to.assert_called_once_with(torch.device("meta"))


def test_queries_are_as_long_as_the_cell_projection_makes_them_without_their_means(cells, tuned):
    pipeline = ScMMGPTPipeline.from_pretrained(str(tuned[1]), device="cpu")
    model, processor = pipeline.model.eval(), pipeline.processor
    inputs = processor(cells=processor.read_cells(cells[:1].copy())[0])
    with torch.no_grad():
        torch.nn.init.normal_(model.cell_projection.weight)
        states = model.encode_cells(inputs["gene_ids"], inputs["expression"], inputs["cell_attention_mask"])
        queries = model.query_cells(states, inputs["cell_attention_mask"])
        model.query_means.copy_(queries - 1)
    expected = model.cell_projection.weight.sum(dim=1).norm().item()  # of ones
    assert finetune.projected_length(model, [inputs]) == pytest.approx(expected, rel=1e-4)


def test_similarities_are_those_of_the_network_also_where_it_says_nothing_and_does_not_run(cells, tuned, monkeypatch):
    pipeline = ScMMGPTPipeline.from_pretrained(str(tuned[1]), device="cpu")
    some, _ = pipeline.processor.read_cells(cells[:9].copy())
    batches = finetune.LabelledBatches(pipeline.processor, some, np.zeros(9, dtype=int), ["a", "b"], batch_size=4)
    with monkeypatch.context() as patched:
        patched.setattr(pipeline.model, "encode_cells", Mock(side_effect=AssertionError("the network ran")))
        alone = finetune.similarities(pipeline.model, batches)
    monkeypatch.setattr(finetune, "queries_contribute", lambda _: True)
    np.testing.assert_array_equal(alone, finetune.similarities(pipeline.model, batches))


def test_a_checkpoint_is_fine_tuned_further_by_gradient_steps(cells, tuned, bert, tmp_path):
    noisy = cells.copy()
    noisy.obs["label"] = np.where(np.arange(90) % 5, noisy.obs["label"], "monocyte")
    record = run(noisy, bert, tmp_path, checkpoint=tuned[1], num_train_epochs=2, learning_rate=1e-3)
    assert len(record["epochs"]) == 2
    assert record["before"]["loss"] > 0
    best = min([record["before"]["loss"], *(line["eval_loss"] for line in record["epochs"])])
    assert record["after"]["loss"] <= best + 1e-3  # the best weights stay, at the temperature that fits them


def test_a_network_that_no_held_out_cell_has_judged_has_no_say_in_the_labels(cells, tuned, bert, tmp_path):
    record = run(cells[:9].copy(), bert, tmp_path, checkpoint=tuned[1], shots=3, learning_rate=1e-2)
    pipeline = ScMMGPTPipeline.from_pretrained(str(tmp_path / "out"), device="cpu")
    assert finetune.queries_contribute(pipeline.model)
    assert (record["similarity_weight"], record["used"]) == (0, "readout")
    assert pipeline.model.config.annotation["similarity_weight"] == 0


def test_a_checkpoint_that_knows_the_labels_needs_one_cell_of_each(cells, tuned, bert, tmp_path, monkeypatch):
    accuracy = {}
    for name, weight in (("beside", prior.PRIOR_WEIGHT), ("alone", 0.0)):
        monkeypatch.setattr(prior, "PRIOR_WEIGHT", weight)
        (tmp_path / name).mkdir()
        record = run(cells[72:75].copy(), bert, tmp_path / name, checkpoint=tuned[1], shots=1, num_train_epochs=0)
        pipeline = ScMMGPTPipeline.from_pretrained(str(tmp_path / name / "out"), device="cpu")
        annotated = pipeline.annotate(cells[:72].copy())
        accuracy[name] = np.mean(annotated.obs["scmmgpt_cell_type"] == annotated.obs["label"])
    assert record["known"] == []
    assert accuracy["beside"] > max(0.9, accuracy["alone"] + 0.05)


def test_unlabelled_cells_are_left_out_and_a_single_label_is_refused(cells):
    obs = cells.obs.copy()
    obs["label"] = obs["label"].replace({"monocyte": "unknown"})
    labelled = labels.read_labels(obs, FinetuneDataArguments(adata="", label_key="label"))
    assert labelled.names == ["B cell", "T cell"]
    obs["label"] = "B cell"
    with pytest.raises(ValueError, match="fine-tuning needs two or more"):
        labels.read_labels(obs, FinetuneDataArguments(adata="", label_key="label"))


def test_labels_of_one_meaning_have_texts_of_their_own(cells):
    obs = cells.obs.replace({"label": {"monocyte": "B-cell"}})
    labelled = labels.read_labels(obs, FinetuneDataArguments(adata="", label_key="label"))
    assert len(set(labelled.texts)) == 3


def test_a_profile_is_the_root_of_every_genes_share():
    cells = Cells.from_csr(csr_matrix([[1, 3, 0], [0, 0, 4]]), np.array([5, 6, 7]))
    np.testing.assert_allclose(hellinger_profile(cells), [0.5, 0.75**0.5, 1.0], rtol=1e-6)


def test_a_profile_holds_all_genes_whatever_the_cell_model_reads():
    cells = Cells.from_csr(csr_matrix([[1, 3, 12], [0, 0, 4]]), np.array([5, 6, 7]))
    inputs = ScMMGPTFeatureExtractor(max_genes=2, return_profile=True)(cells)
    assert inputs["gene_ids"].shape == (2, 2)
    assert inputs["profile_gene_ids"].tolist() == [[5, 6, 7], [7, 0, 0]]
    torch.testing.assert_close(inputs["profile"], torch.tensor([[0.25, 0.1875**0.5, 0.75**0.5], [1.0, 0, 0]]))


def test_cells_without_a_label_are_read_where_labels_are_few(cells, bert, tmp_path):
    few = cells.copy()
    few.obs["label"] = np.where(np.arange(90) < 6, few.obs["label"].astype(str), "unknown")
    record = run(few, bert, tmp_path, shots=2)
    assert record["readout_strength"] == "spread"
    assert record["cells"] == {"train": 6, "validation": 0, "unlabelled": 84}
    pipeline = ScMMGPTPipeline.from_pretrained(str(tmp_path / "out"), device="cpu")
    annotated = pipeline.annotate(cells.copy())
    assert np.mean(annotated.obs["scmmgpt_cell_type"] == annotated.obs["label"]) > 0.95


# -- labels as people write them --------------------------------------------------------------------------------------


def labels_of(values, **options):
    """`read_labels` of a column of `obs`, without the ontology."""
    obs = pd.DataFrame({"label": pd.Series(values, dtype=object)})
    return labels.read_labels(obs, FinetuneDataArguments(adata="", label_key="label", **options))


def test_spaces_around_labels_have_no_meaning():
    found = labels_of(["B cell", " B  cell ", "T cell\t", "T cell", None, "nan"])
    assert found.names == ["B cell", "T cell"]
    assert found.rows.tolist() == [0, 1, 2, 3]


def test_labels_of_two_spellings_are_named(caplog):
    labels_of(["B cell", "B CELL", "B_cell", "B-cell", "CD4+ T", "CD4- T"] * 2)
    assert "'B cell' (2) and 'B CELL' (2) and 'B_cell' (2) and 'B-cell' (2)" in caplog.text
    assert "CD4" not in caplog.text


@pytest.mark.parametrize("values", [[0.0, 1.0, np.nan], ["0", "1", None], ["cluster 1", "cluster 2", "3"], [0, 1, 2]])
def test_codes_in_place_of_names_are_doubted(values, caplog):
    found = labels_of(values * 3)
    assert "obs['label'] has codes, not names" in caplog.text
    assert not any(name.endswith(".0") for name in found.names)


def test_names_of_cells_are_doubted(caplog):
    labels_of([f"cell {i}x" for i in range(20)])
    assert "20 of 20 labels of obs['label'] have a single cell" in caplog.text


def test_ordinary_labels_are_not_doubted(caplog):
    labels_of(["B cell", "T cell", "CD4+ T", "CD4- T", "Th1", "Th17"] * 3)
    assert not caplog.records


def test_groups_that_equal_labels_are_refused():
    found = labels_of(["B", "T", "NK"] * 10)
    arguments = FinetuneDataArguments(adata="", label_key="label", group_key="sample")
    groups = np.array(["s1", "s2", "s3"] * 10)
    with pytest.raises(ValueError, match="Every label .* is in one group of .*'sample'"):
        labels.hold_out(found, groups, arguments, seed=0)
    labels.hold_out(found, np.array(["d1"] * 15 + ["d2"] * 15), arguments, seed=0)


def test_a_converted_cell_model_is_fine_tuned_in_its_own_vocabulary(cells, bert, tmp_path):
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<cls>", "<eoc>", *GENES[::-1], "OTHER"])}
    torch.manual_seed(0)
    model = ScGPTModel(ScGPTConfig(vocab_size=len(vocabulary), pad_token_id=0, cls_token_id=1, **SIZES))
    extractor = ScMMGPTFeatureExtractor(pad_token_id=0, cls_token_id=1)
    save_cell_model(tmp_path / "scgpt", model, vocabulary, {}, extractor)
    new_model = {
        "cell_model": str(tmp_path / "scgpt"),
        "qformer_config": {"num_hidden_layers": 1},
        "model_config": {"num_query_tokens": 2, "projection_dim": 16},
    }
    record = run(cells, bert, tmp_path, new_model=json.dumps(new_model), num_train_epochs=1)
    assert record["epochs"]
    assert set(record["parts"]) in ({"readout"}, {"readout", "transformer", "both"})
    assert all(row["ms_per_cell"] > 0 for row in record["parts"].values())
    assert record["used"] == ("both" if record["similarity_weight"] else "readout")
    assert ("training was undone" in record["verdict"]) == ("transformer" not in record["parts"])
    if record["similarity_weight"]:  # only what fits the held-out cells better stays
        assert record["parts"]["both"]["loss"] < record["parts"]["readout"]["loss"]
    pipeline = ScMMGPTPipeline.from_pretrained(str(tmp_path / "out"), device="cpu")
    assert pipeline.processor.gene_tokenizer.get_vocab() == vocabulary
    annotated = pipeline.annotate(cells.copy())
    assert np.mean(annotated.obs["scmmgpt_cell_type"] == annotated.obs["label"]) > 0.9


def test_similarities_that_say_nothing_about_the_labels_get_no_weight():
    rng = np.random.default_rng(0)
    targets = np.arange(60) % 3
    logits = 3.0 * np.eye(3)[targets] + rng.normal(size=(60, 3))
    assert readout.fit_similarity_weight(logits, rng.normal(size=(60, 3)) / 10, targets)[0] == 0
    weight, both = readout.fit_similarity_weight(logits, np.eye(3)[targets] / 2, targets)
    assert weight > 1
    assert readout.scores_of(both, targets)["accuracy"] == 1


def test_a_checkpoint_with_a_language_model_can_be_fine_tuned(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "tuned")
    table = SimpleNamespace(read=lambda index: index.vocabulary)
    model, _, pretrained, vocabulary, *_ = finetune.load_checkpoint(str(tmp_path / "tuned"), table)
    before = tiny_pipeline.model.model.cell_model.state_dict()
    after = model.cell_model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert not hasattr(model, "language_model")
    assert {f"cell_model.{name}" for name, _ in model.cell_model.named_parameters()} <= pretrained
    assert "CD3D" in vocabulary
    model.save_pretrained(tmp_path / "fine-tuned")
    assert load_file(tmp_path / "fine-tuned" / "model.safetensors").keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    ("network", "used", "sentences"),
    [
        (0.80, "readout", ["readout beats the network: 0.900 against 0.800", "uses the readout alone"]),
        (0.95, "both", ["readout loses to the network: 0.900 against 0.950", "uses both"]),
        (None, "readout", ["The network was not trained"]),
    ],
)
def test_the_table_says_which_part_held_out_cells_chose_and_what_it_costs(network, used, sentences):
    parts = {"readout": {"accuracy": 0.9, "macro_f1": 0.85, "ms_per_cell": 0.05}}
    if network is not None:
        parts["transformer"] = {"accuracy": network, "macro_f1": 0.7, "ms_per_cell": 12.0}
        parts["both"] = {"accuracy": 0.96, "macro_f1": 0.9, "ms_per_cell": 12.05}
    lines = router.comparison(parts, used, 120).splitlines()
    assert lines[0].split() == ["120", "held-out", "cells", "accuracy", "macro-F1", "ms", "a", "cell"]
    assert lines[1].split()[:4] == ["readout", "0.900", "0.850", "0.050"]
    assert [line.split()[0] for line in lines[1:4] if line.endswith("used")] == [used]
    assert all(sentence in lines[-1] for sentence in sentences)


def test_a_network_that_no_epoch_made_better_was_trained_all_the_same():
    parts = {"readout": {"accuracy": 0.9, "macro_f1": 0.8, "ms_per_cell": 0.01}}
    said = router.comparison(parts, "readout", 120, was_trained=True)
    assert said.endswith("No epoch of the network lowered the loss, and training was undone.")
