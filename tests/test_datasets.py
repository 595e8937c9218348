"""Cells of any dataset train like the cells of a corpus: the same batches, losses and weights."""

import json
import os
from pathlib import Path

import anndata
import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.sparse import csr_matrix
from torch.utils.data import DataLoader, default_collate
from transformers import Trainer, TrainingArguments

from scmmgpt.cells_scmmgpt import Cells
from scmmgpt.modeling_scmmgpt import ScMMGPTForCellTextAlignment
from scmmgpt.processing_scmmgpt import ScMMGPTProcessor
from scmmgpt.tests.corpora import QUIET, SHORT, SIZES, write_corpus
from scmmgpt.tests.test_finetune import GENES
from scmmgpt.tests.test_train import align_only, log_of, run_ranks, tune_only, words_of
from scmmgpt.train import finetune, pretrain
from scmmgpt.train.data.batches import BatchDataset
from scmmgpt.train.data.captions import CaptionSampler
from scmmgpt.train.data.collate import AlignmentCollator
from scmmgpt.train.data.corpus import open_corpus
from scmmgpt.train.data.streamed import open_cells
from scmmgpt.train.trainer import ModelLossTrainer


class Rows(torch.utils.data.Dataset):
    """One's own map-style dataset of an AnnData."""

    def __init__(self, adata, vocabulary):
        gene_ids = np.array([vocabulary[name] for name in adata.var_names])
        self.cells = Cells.from_csr(csr_matrix(adata.X), gene_ids, adata.obs["cell_id"].to_numpy())
        self.obs = adata.obs

    def __len__(self):
        return len(self.cells)

    def __getitem__(self, i):
        names = ("cell_type", "cell_type_ontology_term_id", "tissue", "dataset_id")
        return {"cells": self.cells[i], **{name: self.obs[name].iloc[i] for name in names}}


def load(corpus, split="train", streaming=False):
    return datasets.load_dataset(
        "parquet", data_files={split: f"{corpus}/data/{split}-*.parquet"}, split=split, streaming=streaming
    )


def own_rows(corpus, split="train"):
    """The cells of a split by way of an AnnData."""
    opened = open_corpus(corpus)
    cells, table = opened.load(split)
    counts = csr_matrix((cells.counts, cells.gene_ids, cells.indptr), shape=(len(cells), 33)).toarray()[:, 3:]
    obs = table.to_pandas().set_index(cells.cell_ids.astype(str))
    adata = anndata.AnnData(counts.astype(np.float32), obs=obs)
    adata.var_names = list(opened.vocabulary)[3:]
    adata.obs["cell_id"] = cells.cell_ids
    return Rows(adata, opened.vocabulary)


ROADS = {"map-style": load, "own": own_rows}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path(tmp_path / "datasets"))


def assert_equal_batches(ours, theirs):
    assert len(ours) == len(theirs) > 1
    for own, their in zip(ours, theirs, strict=True):
        assert own.keys() == their.keys()
        for name, value in own.items():
            assert torch.equal(value, their[name]), name


def batches_of(cells, collate, epoch=0, **settings):
    dataset = BatchDataset(open_cells(cells, **settings), collate)
    dataset.set_epoch(epoch)
    return list(dataset)


@pytest.fixture
def collate(aligned):
    return AlignmentCollator(ScMMGPTProcessor.from_pretrained(aligned), CaptionSampler())


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 5},
        {"batch_size": 8, "rank": 1, "world_size": 2},
        {"token_budget": 200, "max_genes": 40},
        {"batch_size": 6, "balance": "cell_type"},
        {"batch_size": 5, "shuffle": False},
    ],
    ids=str,
)
def test_rows_of_a_dataset_make_the_batches_of_the_corpus(corpus, collate, road, settings, monkeypatch):
    monkeypatch.setattr("scmmgpt.train.data.blocks.ROW_GROUP_SIZE", 8)  # that of the corpus
    for epoch in (0, 3):
        options = {"seed": 4, **settings}
        ours = batches_of(open_corpus(corpus), collate, epoch, **options)
        assert_equal_batches(ours, batches_of(ROADS[road](corpus), collate, epoch, **options))


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_dataset_that_is_read_as_needed_makes_the_same_batches(corpus, collate, monkeypatch, in_memory):
    monkeypatch.setattr("scmmgpt.train.data.blocks.ROW_GROUP_SIZE", 8)
    if not in_memory:
        monkeypatch.setattr("scmmgpt.train.data.stream.IN_MEMORY_BYTES", -1)
    ours = batches_of(open_corpus(corpus), collate, batch_size=5)
    for rows in (load(corpus), own_rows(corpus)):
        assert_equal_batches(ours, batches_of(rows, collate, batch_size=5))


def test_a_streamed_dataset_makes_the_batches_of_the_corpus_in_its_order(corpus, collate):
    ours = batches_of(open_corpus(corpus), collate, 2, batch_size=5, shuffle=False)
    assert_equal_batches(ours, batches_of(load(corpus, streaming=True), collate, 2, batch_size=5))


def test_ranks_share_a_streamed_dataset_as_a_plain_trainer_shares_it(corpus):
    stream = load(corpus, streaming=True)
    everything = [int(i) % 2**64 for i in load(corpus)["cell_id"]]
    seen = []
    for rank in range(2):
        share = open_cells(stream, batch_size=3, rank=rank, world_size=2)
        seen.append([cells.cell_ids.tolist() for cells, _, _ in share.batches()])
    assert [len(rank) for rank in seen] == [6, 6]
    assert sum((a + b for a, b in zip(*seen, strict=True)), []) == everything  # 32 = 5 x 6 + 2
    assert seen[1][0] == everything[3:6]


@pytest.mark.parametrize("batch_size", [3, 5, 8])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_read_the_same_batches_by_all_roads(corpus, collate, monkeypatch, batch_size, world_size):
    monkeypatch.setattr("scmmgpt.train.data.blocks.ROW_GROUP_SIZE", 8)  # that of the corpus
    roads = {"stream": load(corpus, streaming=True), "map-style": load(corpus), "own": own_rows(corpus)}
    for rank in range(world_size):
        options = {"batch_size": batch_size, "rank": rank, "world_size": world_size, "shuffle": False}
        ours = list(open_cells(open_corpus(corpus), **options).batches(1))
        for name, cells in roads.items():
            theirs = list(open_cells(cells, **options).batches(1))
            found = [[part.cell_ids.tolist() for part, *_ in batches] for batches in (ours, theirs)]
            assert found[0] == found[1], name
            assert [epoch for *_, epoch in ours] == [epoch for *_, epoch in theirs]
        later = [part.cell_ids.tolist() for part, *_ in open_cells(open_corpus(corpus), **options).batches(1, start=1)]
        assert later == found[0][1:]


def test_a_shuffled_stream_differs_between_epochs_and_resumes_in_each(corpus):
    stream = load(corpus, streaming=True).shuffle(seed=1, buffer_size=16)
    source = open_cells(stream, batch_size=5)
    epochs = [[cells.cell_ids.tolist() for cells, *_ in source.batches(epoch)] for epoch in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    assert {i for batch in epochs[0] for i in batch} == {i for batch in epochs[2] for i in batch}
    assert [cells.cell_ids.tolist() for cells, *_ in source.batches(2, start=3)] == epochs[2][3:]


def test_a_streamed_dataset_is_filtered_and_mapped_as_any(corpus):
    stream = load(corpus, streaming=True).filter(lambda row: row["cell_type"] == "B cell")
    stream = stream.map(lambda row: {"tissue": row["tissue"].upper()})
    cells, obs, _ = next(open_cells(stream, batch_size=4).batches())
    assert len(cells) == 4
    assert set(obs["cell_type"]) == {"B cell"}
    assert set(obs["tissue"]) == {"BLOOD"}


@pytest.mark.parametrize("setting", [{"balance": "cell_type"}, {"token_budget": 100}])
def test_what_needs_random_access_is_refused_for_a_stream(corpus, setting):
    with pytest.raises(ValueError, match="has no random access"):
        open_cells(load(corpus, streaming=True), batch_size=4, **setting)


def test_a_dataset_without_the_columns_of_a_cell_says_so(corpus):
    with pytest.raises(ValueError, match="has no column 'counts'"):
        open_cells(load(corpus).remove_columns("counts"), batch_size=4)
    with pytest.raises(ValueError, match="has no column 'cell_id'"):
        open_cells(load(corpus, streaming=True).rename_column("cell_id", "id"), batch_size=4)
    source = open_cells(load(corpus, streaming=True).map(lambda row: {"cell_id": None}), batch_size=4)
    with pytest.raises(ValueError, match="has nulls in the column 'cell_id'"):
        next(source.batches())
    with pytest.raises(ValueError, match="Row 0 has no 'gene_ids'"):
        Cells.from_rows([{"cell_id": 1, "counts": [1]}])


# -- identities -------------------------------------------------------------------------------------------------------


def test_cell_ids_survive_torch(corpus):
    cells, _ = open_corpus(corpus).load("train", columns=[])
    assert (cells.cell_ids > 2**63).any()
    rows = load(corpus).select_columns(["cell_id", "total_counts"])
    by_default = torch.cat([batch["cell_id"] for batch in DataLoader(rows, batch_size=7)])
    in_torch = rows.with_format("torch")["cell_id"][:]
    for ids in (by_default, in_torch, default_collate(rows["cell_id"][:])):
        assert ids.dtype == torch.int64
        assert np.array_equal(ids.numpy().view(np.uint64), cells.cell_ids)


@pytest.mark.parametrize("kind", [None, "numpy", "torch"])
def test_cells_come_from_rows_in_every_format_and_go_back(corpus, kind):
    rows = load(corpus) if kind is None else load(corpus).with_format(kind)
    cells, _ = open_corpus(corpus).load("train", columns=[])
    for found in (Cells.from_rows([rows[i] for i in range(32)]), Cells.from_rows(cells.to_rows())):
        for name in ("indptr", "gene_ids", "counts", "cell_ids", "total_counts"):
            np.testing.assert_array_equal(getattr(found, name), getattr(cells, name))
    again = datasets.Dataset.from_list(cells.to_rows())
    np.testing.assert_array_equal(Cells.from_rows(list(again)).cell_ids, cells.cell_ids)


# -- commands and trainers --------------------------------------------------------------------------------------------


def align_on(corpus, bert, output_dir, road="corpus", **options):
    cells = None if road == "corpus" else {"train": ROADS[road](corpus)}
    steps = {"cell_config": SIZES, "max_steps": 20, "lr_scheduler_type": "constant"}  # with dropout
    align_only(corpus, bert, output_dir, cells=cells, **steps | options)


def assert_equal_runs(ours, theirs):
    assert log_of(ours, "loss") == log_of(theirs, "loss")
    assert_equal_weights(ours, theirs)


def assert_equal_weights(ours, theirs):
    weights, others = (load_file(path / "model.safetensors") for path in (ours, theirs))
    for name, value in weights.items():
        assert torch.equal(value, others[name]), name


@pytest.mark.parametrize("road", ROADS)
def test_twenty_steps_on_a_dataset_end_like_twenty_on_the_corpus_also_resumed(
    corpus, bert, tmp_path, road, monkeypatch
):
    monkeypatch.setattr("scmmgpt.train.data.blocks.ROW_GROUP_SIZE", 8)
    align_on(corpus, bert, tmp_path / "corpus")
    saving = {"save_strategy": "steps", "save_steps": 14}  # in epoch 3, of four steps each
    align_on(corpus, bert, tmp_path / road, road, **saving)
    assert_equal_runs(tmp_path / "corpus", tmp_path / road)
    resumed = {"resume_from_checkpoint": tmp_path / road / "checkpoint-14"}
    align_on(corpus, bert, tmp_path / road, road, **saving, **resumed)
    assert_equal_runs(tmp_path / "corpus", tmp_path / road)


def test_two_processes_train_on_a_dataset_as_on_the_corpus(corpus, bert, tmp_path, monkeypatch):
    monkeypatch.setattr("scmmgpt.train.data.blocks.ROW_GROUP_SIZE", 8)
    options = {"per_device_train_batch_size": 4, "max_steps": 6}
    for road in ("corpus", "map-style"):
        run_ranks(align_on, corpus, bert, tmp_path / road, road, **options)
    assert_equal_runs(tmp_path / "corpus", tmp_path / "map-style")


def in_the_order_of_the_commands(corpus):
    """The cells of a corpus as a stream, in the order in which a command reads them in its first epoch."""
    rows, batches = load(corpus), open_cells(open_corpus(corpus), batch_size=8, seed=42).batches()
    places = {cell_id % 2**64: place for place, cell_id in enumerate(rows["cell_id"])}
    return rows.select([places[i] for cells, *_ in batches for i in cells.cell_ids.tolist()]).to_iterable_dataset()


def test_the_other_commands_train_on_a_dataset_too(corpus, aligned, tmp_path, monkeypatch):
    monkeypatch.setattr("scmmgpt.train.data.blocks.ROW_GROUP_SIZE", 8)
    for road, cells in {"corpus": None, "streamed": {"train": in_the_order_of_the_commands(corpus)}}.items():
        values = {**SHORT, "max_steps": 3, "corpus": corpus, "cell_config": SIZES}
        values |= {"output_dir": tmp_path / f"pretrain {road}"}
        pretrain.main(*pretrain.make_parser().parse_args_and_config(words_of(values)), cells=cells)
        tune_only(corpus, aligned, tmp_path / f"tune {road}", cells=cells, max_steps=3)
    for command in ("pretrain", "tune"):
        assert_equal_runs(tmp_path / f"{command} corpus", tmp_path / f"{command} streamed")


def finetune_on(adata, bert, output_dir, cells=None, **options):
    sizes = {"cell_config": SIZES, "qformer_config": {"num_hidden_layers": 1}}
    sizes["model_config"] = {"num_query_tokens": 2, "projection_dim": 8}
    values = {name: SHORT[name] for name in ("use_cpu", "disable_tqdm", "save_strategy", "learning_rate")}
    values |= {"adata": adata, "label_key": "cell_type", "bert": bert, "output_dir": output_dir, "new_model": sizes}
    values |= {"num_train_epochs": 1, "per_device_train_batch_size": 8, **options}
    finetune.main(*finetune.make_parser().parse_args_and_config(words_of(values)), cells=cells)
    record = json.loads((output_dir / "finetune.json").read_text())
    for part in record["parts"].values():
        del part["ms_per_cell"]  # measured, so never the same twice
    return record


@pytest.fixture(scope="module")
def named_corpus(corpus, tmp_path_factory):
    """The cells of `corpus` over genes that have approved symbols."""
    path, opened = tmp_path_factory.mktemp("named"), open_corpus(corpus)
    names = [*list(opened.vocabulary)[:3], *GENES, "CD8A", "CD8B", "FCGR3A", "MS4A7", "FCER1A", "CST3"]
    splits = {}
    for split in ("train", "validation"):
        cells, table = opened.load(split)
        splits[split] = cells, {name: table[name].to_pylist() for name in ("cell_type", "tissue", "dataset_id")}
    write_corpus(path, {name: i for i, name in enumerate(names)}, splits, row_group_size=8)
    return str(path)


def split_by_rows(corpus, streaming=False):
    return {split: load(corpus, split, streaming) for split in ("train", "validation")}


FINETUNE_ROADS = {
    "corpus": lambda corpus: None,
    "streamed": lambda corpus: split_by_rows(corpus, streaming=True),
    "own": lambda corpus: {split: own_rows(corpus, split) for split in ("train", "validation")},
}


def test_fine_tuning_on_datasets_ends_like_fine_tuning_on_the_corpus(named_corpus, bert, tmp_path, monkeypatch):
    batches, make_batches = {}, finetune.FineTuning.batches

    def note(self, part, batch_size, **order):
        found = make_batches(self, part, batch_size, **order)
        batches[road].append((self.labels.names, found.source.cells, found.targets, list(found)))
        return found

    monkeypatch.setattr(finetune.FineTuning, "batches", note)
    records = {}
    for road, cells in FINETUNE_ROADS.items():
        batches[road] = []
        records[road] = finetune_on(named_corpus, bert, tmp_path / road, cells(named_corpus))
    assert records["corpus"]["cells"] == {"train": 32, "validation": 8, "unlabelled": 0}
    assert len(batches["corpus"]) == 2  # held out, and trained on
    for road in list(FINETUNE_ROADS)[1:]:
        for ours, theirs in zip(batches["corpus"], batches[road], strict=True):
            assert ours[0] == theirs[0]
            for name in ("indptr", "gene_ids", "counts", "cell_ids", "total_counts"):
                np.testing.assert_array_equal(getattr(ours[1], name), getattr(theirs[1], name))
            assert torch.equal(ours[2], theirs[2])
            for own, their in zip(ours[3], theirs[3], strict=True):
                assert all(torch.equal(value, their[name]) for name, value in own.items())
        assert records[road] == records["corpus"]
        assert_equal_weights(tmp_path / "corpus", tmp_path / road)


def test_fine_tuning_on_rows_of_a_file_ends_like_fine_tuning_on_the_file(named_corpus, bert, tmp_path):
    adata = open_corpus(named_corpus).to_adata("train")
    adata.obs_names = [f"cell {i}" for i in range(len(adata))]
    adata.obs["donor"] = [f"donor {i % 4}" for i in range(len(adata))]
    adata.write_h5ad(tmp_path / "cells.h5ad")
    options = {"group_key": "donor", "validation_share": 0.25}
    of_file = finetune_on(tmp_path / "cells.h5ad", bert, tmp_path / "file", **options)
    rows = load(named_corpus).add_column("donor", adata.obs["donor"].tolist())
    of_rows = finetune_on(named_corpus, bert, tmp_path / "rows", {"train": rows}, **options)
    assert of_file["cells"] == of_rows["cells"] == {"train": 24, "validation": 8, "unlabelled": 0}
    assert of_file == of_rows
    assert_equal_weights(tmp_path / "file", tmp_path / "rows")


def test_fine_tuning_reads_its_own_cells_from_a_checkpoint_too(corpus, aligned, tmp_path):
    records = [
        finetune_on(corpus, "unused", tmp_path / name, cells, checkpoint=aligned, new_model={})
        for name, cells in {"corpus": None, "streamed": split_by_rows(corpus, streaming=True)}.items()
    ]
    assert records[0] == records[1]
    assert_equal_weights(tmp_path / "corpus", tmp_path / "streamed")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"shots": 1}, "shots divides cells"), ({"group_key": "tissue"}, "group_key divides cells")],
)
def test_what_divides_cells_is_refused_where_they_come_divided(named_corpus, bert, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        finetune_on(named_corpus, bert, tmp_path, split_by_rows(named_corpus), **options)
    with pytest.raises(ValueError, match="no split 'train'"):
        finetune_on(named_corpus, bert, tmp_path, {"validation": load(named_corpus, "validation")})


def test_a_label_that_is_held_out_alone_is_named(named_corpus, bert, tmp_path, caplog):
    few = load(named_corpus).filter(lambda row: row["cell_type"] != "monocyte")
    record = finetune_on(named_corpus, bert, tmp_path, {**split_by_rows(named_corpus), "train": few})
    assert "The training split has no cell of ['monocyte']" in caplog.text
    assert set(record["labels"]) == {"B cell", "T cell", "monocyte"}


def by_hand(aligned, output_dir, trainer=ModelLossTrainer, resume=None, **options):
    """A stage-1 model trained for twenty steps by a trainer; the losses of its steps, and its weights."""
    model = ScMMGPTForCellTextAlignment.from_pretrained(aligned)
    arguments = TrainingArguments(
        output_dir,
        per_device_train_batch_size=8 // int(os.environ.get("WORLD_SIZE", "1")),
        max_steps=20,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        **QUIET,
        save_steps=14,  # in epoch 3, of four steps each
        remove_unused_columns=False,
        accelerator_config={"dispatch_batches": False},
    )
    arguments.pretrained_learning_rate = None
    runner = trainer(model, arguments, **options)
    runner.train(resume_from_checkpoint=None if resume is None else str(resume))
    return [line["loss"] for line in runner.state.log_history if "loss" in line], model.state_dict()


def by_hand_on_a_rank(corpus, aligned, output_dir, road, resume=None):
    """One of several processes, on cells in their own order."""
    order = {"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"]), "shuffle": False}
    collate = AlignmentCollator(ScMMGPTProcessor.from_pretrained(aligned), CaptionSampler())
    rows, stream = collate.processor.data_collator(collate), load(corpus, streaming=True)
    if road == "plain":
        options = {"train_dataset": rows.with_length(stream), "data_collator": rows, "callbacks": [rows]}
        found = by_hand(aligned, output_dir, Trainer, resume, **options)
    elif road == "streamed":
        found = by_hand(aligned, output_dir, resume=resume, train_dataset=stream, data_collator=rows)
    else:
        cells = open_corpus(corpus) if road == "fast" else own_rows(corpus)
        dataset = BatchDataset(open_cells(cells, batch_size=4, **order), collate)
        found = by_hand(aligned, output_dir, resume=resume, train_dataset=dataset)
    if order["rank"] == 0:
        torch.save(found, output_dir / "found.pt")


@pytest.mark.slow
@pytest.mark.parametrize("road", ["streamed", "own", "plain"])
def test_two_processes_end_alike_by_all_roads_also_resumed(corpus, aligned, tmp_path, monkeypatch, road):
    monkeypatch.setattr("scmmgpt.train.data.blocks.ROW_GROUP_SIZE", 8)
    run_ranks(by_hand_on_a_rank, corpus, aligned, tmp_path / "fast", "fast")
    losses, weights = torch.load(tmp_path / "fast" / "found.pt")
    assert len(losses) == 20
    assert losses[0] != losses[4]  # epochs differ in their draws
    for resume in (None, tmp_path / road / "checkpoint-14"):
        run_ranks(by_hand_on_a_rank, corpus, aligned, tmp_path / road, road, resume=resume)
        theirs = torch.load(tmp_path / road / "found.pt")
        assert theirs[0] == losses
        assert all(torch.equal(value, theirs[1][name]) for name, value in weights.items())


def plain_arguments(output_dir, **options):
    """Arguments of a plain trainer: batches of 8, every loss logged, by default a checkpoint after step 14."""
    return TrainingArguments(
        output_dir,
        per_device_train_batch_size=8,
        logging_steps=1,
        lr_scheduler_type="constant",
        remove_unused_columns=False,
        **{**QUIET, "save_steps": 14, **options},
    )


@pytest.mark.slow
def test_a_plain_trainer_that_resumes_in_epoch_three_ends_like_one_that_does_not(corpus, aligned, collate, tmp_path):
    losses = {}
    for name, checkpoint in {"whole": None, "cut": tmp_path / "checkpoint-14"}.items():
        rows = collate.processor.data_collator(collate)
        arguments = plain_arguments(tmp_path, max_steps=20)
        model = ScMMGPTForCellTextAlignment.from_pretrained(aligned)
        trainer = Trainer(model, arguments, train_dataset=load(corpus), data_collator=rows, callbacks=[rows])
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        losses[name] = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses["whole"] == losses["cut"]


def plain_on_a_stream(corpus, aligned, collate, output_dir, checkpoint=None, *, sized, **options):
    """Losses and cells of a plain trainer on a shuffled stream."""
    seen = []

    def note(cells, columns, *, epoch=0):
        batch = collate(cells, columns, epoch=epoch)
        batch["cell_ids"] = cells.cell_ids
        return batch

    class Watching(Trainer):
        def compute_loss(self, model, inputs, **kwargs):
            seen.append(inputs.pop("cell_ids").tolist())
            return super().compute_loss(model, inputs, **kwargs)

    rows = collate.processor.data_collator(note)
    stream = load(corpus, streaming=True).shuffle(seed=3, buffer_size=16)
    arguments = plain_arguments(output_dir, **options)
    model = ScMMGPTForCellTextAlignment.from_pretrained(aligned)
    dataset = rows.with_length(stream) if sized else stream
    trainer = Watching(model, arguments, train_dataset=dataset, data_collator=rows, callbacks=[rows])
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return [line["loss"] for line in trainer.state.log_history if "loss" in line], seen


def test_a_plain_trainer_resumes_exactly_on_a_shuffled_stream_whose_length_is_known(
    corpus, aligned, collate, tmp_path
):
    options = {"sized": True, "num_train_epochs": 3, "save_steps": 10}
    whole, cells = plain_on_a_stream(corpus, aligned, collate, tmp_path, **options)
    cut, cells_after = plain_on_a_stream(corpus, aligned, collate, tmp_path, tmp_path / "checkpoint-10", **options)
    assert cells[0] != cells[4]
    assert cells_after == cells[10:]  # in the third epoch of four steps
    assert cut == whole
    # Without the length a run is the same, but transformers resumes it in the wrong epoch.
    options = {"sized": False, "max_steps": 12, "save_steps": 10}
    assert plain_on_a_stream(corpus, aligned, collate, tmp_path / "un", **options) == (whole, cells)
    checkpoint = tmp_path / "un" / "checkpoint-10"
    assert plain_on_a_stream(corpus, aligned, collate, tmp_path / "un", checkpoint, **options)[1] != cells[10:]


def test_the_collator_makes_the_batches_of_stage_1_from_rows_with_captions(corpus, collate):
    texts = CaptionSampler()
    cells, table = open_corpus(corpus).load("train")
    obs = {name: np.array(table[name].to_pylist(), dtype=object) for name in table.column_names}
    ours = collate(cells, obs, epoch=0)
    captions = texts.caption(obs, cells, collate.gene_symbols, epoch=0)
    rows = load(corpus).add_column("caption", captions)
    theirs = collate.processor.data_collator()([rows[i] for i in range(len(rows))])
    assert_equal_batches([ours] * 2, [theirs] * 2)


def test_the_position_of_a_stream_is_json(corpus, collate):
    dataset = BatchDataset(open_cells(load(corpus, streaming=True), batch_size=5), collate)
    dataset.set_epoch(3)
    batches = iter(dataset)
    for _ in range(2):
        next(batches)
    state = json.loads(json.dumps(dataset.state_dict()))
    rest = list(batches)
    again = BatchDataset(open_cells(load(corpus, streaming=True), batch_size=5), collate)
    again.load_state_dict(state)
    assert_equal_batches(rest, list(again))
