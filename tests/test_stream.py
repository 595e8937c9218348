"""The stream: every cell once, in an order that only the seed and the epoch decide."""

import dataclasses
import functools
import json
import operator
import os
import shutil
import signal
import threading

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from scmmgpt.cells_scmmgpt import Cells
from scmmgpt.feature_extraction_scmmgpt import ScMMGPTFeatureExtractor
from scmmgpt.tests.corpora import QUIET, random_cells, write_corpus
from scmmgpt.train.data.batches import BatchDataset
from scmmgpt.train.data.cache import write_cache
from scmmgpt.train.data.corpus import open_corpus
from scmmgpt.train.data.order import CellOrder
from scmmgpt.train.data.stream import CellStream


N_GENES = 300
VOCABULARY = {"<pad>": 0, "<cls>": 1, "<eoc>": 2, **{f"G{i}": i for i in range(3, N_GENES)}}
TYPES = ["T cell"] * 16 + ["B cell"] * 3 + ["dendritic cell"]
make_cells = functools.partial(random_cells, n_genes=N_GENES, most_genes=59, most_counts=1999)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """1,000 training cells in the order of their datasets, 30 test cells; row groups of 20."""
    path = tmp_path_factory.mktemp("corpus")
    obs = {
        "barcode": [f"cell {i}" for i in range(1000)],
        "cell_type": np.resize(np.array(TYPES, dtype=object), 1000),
        "dataset_id": [f"dataset {i // 100}" for i in range(1000)],
        "tissue": [None if i % 2 else "blood" for i in range(1000)],
    }
    splits = {"train": (make_cells(1000), obs), "test": (make_cells(30, seed=1, first_id=5000), {})}
    write_corpus(path, VOCABULARY, splits, cells_per_shard=300, row_group_size=20)
    return open_corpus(path)


@pytest.fixture(scope="module")
def cached(corpus, tmp_path_factory):
    """The same, with the copy that streams faster."""
    path = shutil.copytree(corpus.path, tmp_path_factory.mktemp("cached") / "corpus")
    write_cache(open_corpus(path))
    return open_corpus(path)


def stream_of(corpus, *, pool_size=200, in_memory=False, **settings):
    settings = {"batch_size": 32, "seed": 3, **settings}
    if settings.get("token_budget"):
        settings["batch_size"] = None
        settings.setdefault("max_genes", 50)
    with pytest.MonkeyPatch.context() as patch:
        if not in_memory:
            patch.setattr("scmmgpt.train.data.stream.IN_MEMORY_BYTES", -1)
        stream = CellStream(corpus, **settings)
    stream.order = dataclasses.replace(stream.order, pool_size=pool_size)
    return stream


def ids_of(batches):
    return [cells.cell_ids.tolist() for cells, *_ in batches]


def flat(batches):
    return [cell_id for batch in batches for cell_id in batch]


@pytest.mark.parametrize(("layout", "in_memory"), [("corpus", False), ("cached", False), ("corpus", True)])
def test_an_epoch_holds_every_cell_once_with_its_own_values(request, layout, in_memory):
    stored = make_cells(1000)
    seen = []
    for cells, obs in stream_of(request.getfixturevalue(layout), in_memory=in_memory):
        expected = stored[cells.cell_ids.astype(int)]
        for name in ("indptr", "gene_ids", "counts", "total_counts"):
            np.testing.assert_array_equal(getattr(cells, name), getattr(expected, name), err_msg=name)
        for row, cell_id in enumerate(cells.cell_ids.tolist()):
            assert obs["cell_type"][row] == TYPES[cell_id % 20]
            assert obs["dataset_id"][row] == f"dataset {cell_id // 100}"
            assert obs["tissue"][row] == (None if cell_id % 2 else "blood")
            assert obs["disease"][row] is None
        seen += cells.cell_ids.tolist()
    assert sorted(seen) == list(range(1000))


@pytest.mark.parametrize("settings", [{}, {"token_budget": 900}, {"balance": "cell_type"}])
def test_the_copy_and_memory_give_the_same_batches(corpus, cached, settings):
    expected = ids_of(stream_of(corpus, **settings))
    assert ids_of(stream_of(cached, **settings)) == expected
    assert ids_of(stream_of(corpus, in_memory=True, **settings)) == expected


def test_the_order_depends_on_seed_and_epoch_alone(corpus):
    stream = stream_of(corpus)
    first = ids_of(stream)
    assert ids_of(stream) == first
    assert ids_of(stream_of(corpus, seed=4)) != first
    second = ids_of(stream.batches(1))
    assert second != first
    assert sorted(flat(second)) == sorted(flat(first))
    # Hardly a cell keeps its place: the epochs are unrelated.
    assert np.mean(np.array(flat(first)) == np.array(flat(second))) < 0.02


def test_without_shuffling_cells_come_as_stored(corpus):
    assert flat(ids_of(stream_of(corpus, shuffle=False))) == list(range(1000))


def test_neighbours_in_the_store_are_not_neighbours_in_a_batch(corpus):
    together = []
    for batch in ids_of(stream_of(corpus)):
        groups = np.array(batch) // 20
        together.append(np.mean([np.sum(groups == group) - 1 for group in groups]))
    assert np.mean(together) < 5  # of 31 others; 31 if a batch were one row group, 3.1 if pools mix perfectly


SETTINGS = [{}, {"token_budget": 900}, {"balance": "cell_type"}]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("start", [1, 7, 19, 31])
def test_any_step_of_any_epoch_is_found_without_the_steps_before(corpus, settings, start):
    for epoch in (0, 3):
        expected = ids_of(stream_of(corpus, **settings).batches(epoch))
        assert ids_of(stream_of(corpus, **settings).batches(epoch, start)) == expected[start:]


@pytest.mark.parametrize("settings", [{"token_budget": 300}, {"balance": "cell_type", "batch_size": 7}])
@pytest.mark.parametrize("world_size", [1, 3])
def test_epochs_are_equally_long_and_lose_no_batch(corpus, settings, world_size):
    """With balancing and with token budgets, epochs of the order are longer or shorter than the first."""
    stream = stream_of(corpus, rank=world_size - 1, world_size=world_size, **settings)
    own = [stream.order.epoch(epoch) for epoch in range(8)]
    assert len({order.n_steps for order in own}) > 1
    expected = [batch for order in own for batch in ids_of(stream._read(order, 0))]
    found = [ids_of(stream.batches(epoch)) for epoch in range(7)]
    assert {len(batches) for batches in found} == {len(stream)}
    assert [batch for batches in found for batch in batches] == expected[: 7 * len(stream)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("settings", [{}, {"token_budget": 900}, {"drop_last": True}])
def test_ranks_share_the_cells_in_equal_numbers_of_batches(corpus, world_size, settings):
    streams = [stream_of(corpus, rank=rank, world_size=world_size, **settings) for rank in range(world_size)]
    batches = [ids_of(stream) for stream in streams]
    assert {len(own) for own in batches} == {len(stream) for stream in streams}
    seen = flat(cell_ids for own in batches for cell_ids in own)
    if settings.get("drop_last"):
        assert {len(batch) for own in batches for batch in own} == {32}
        assert len(seen) >= 1000 - 32 * world_size
    else:
        assert set(seen) == set(range(1000))
    if not settings:
        assert len(seen) == -(-1000 // world_size) * world_size  # a few cells twice, so that ranks are equal


def test_dropping_the_only_batch_is_refused(corpus):
    with pytest.raises(ValueError, match="a rank has 30 cells, batch_size is 32"):
        len(stream_of(corpus, split="test", drop_last=True))


def test_more_ranks_than_row_groups_still_share_evenly(corpus):
    batches = [ids_of(stream_of(corpus, split="test", rank=rank, world_size=8, batch_size=2)) for rank in range(8)]
    assert {len(own) for own in batches} == {2}
    assert set(flat(b for own in batches for b in own)) == set(range(5000, 5030))


def tensors_by_cell(corpus, epoch=5, **settings):
    """What the feature extractor makes of every cell, by cell id, without padding."""
    extractor = ScMMGPTFeatureExtractor(max_genes=20, seed=1)
    found = {}
    for rank in range(settings.get("world_size", 1)):
        stream = stream_of(corpus, rank=rank, **settings)
        for cells, _ in stream._read(stream.order.epoch(epoch), 0):
            batch = extractor(cells, epoch=epoch)
            for row, cell_id in enumerate(cells.cell_ids.tolist()):
                n = int(batch["cell_attention_mask"][row].sum())
                found[cell_id] = (batch["gene_ids"][row, :n].tolist(), batch["expression"][row, :n].tolist())
    return found


@pytest.mark.parametrize(
    "settings",
    [{"batch_size": 7}, {"token_budget": 900}, {"world_size": 4}, {"pool_size": 64}, {"seed": 9}],
    ids=str,
)
def test_a_cell_looks_the_same_whatever_the_batch_rank_or_order(corpus, settings):
    assert tensors_by_cell(corpus, **settings) == tensors_by_cell(corpus)


def test_batches_stay_within_the_token_budget(corpus):
    padded, tokens = 0, 0
    for cells, _ in stream_of(corpus, token_budget=900, max_genes=50, pool_size=1000):
        lengths = np.minimum(np.diff(cells.indptr) + 1, 50)
        assert lengths.max() * len(lengths) <= 900
        padded, tokens = padded + lengths.max() * len(lengths), tokens + lengths.sum()
    assert tokens / padded > 0.9  # batches hold cells of like length


def test_batch_order_says_nothing_about_length(corpus):
    lengths = [np.diff(cells.indptr).mean() for cells, _ in stream_of(corpus, token_budget=900)]
    assert abs(np.corrcoef(lengths, np.arange(len(lengths)))[0, 1]) < 0.3


def test_float_and_large_values_pass_exactly_beside_small_counts(tmp_path):
    small = make_cells(50)
    floats = make_cells(50, seed=2, dtype=np.float32, first_id=100)
    large = Cells(np.array([0, 2]), np.array([5, 9]), np.array([70_001, 3]), np.array([200], np.uint64))
    large.total_counts = np.float32([70_004])
    everything = Cells.concatenate([small, floats, large])
    write_corpus(tmp_path, VOCABULARY, {"train": (everything, {})}, cells_per_shard=50, row_group_size=20)
    corpus = open_corpus(tmp_path)
    assert [shard.counts_dtype for shard in corpus.shards("train")] == ["uint16", "float32", "float32"]
    position = {cell_id: i for i, cell_id in enumerate(everything.cell_ids.tolist())}
    for copied in (False, True):
        if copied:
            write_cache(corpus)
        seen = []
        for cells, _ in stream_of(corpus, pool_size=32):
            expected = everything[np.array([position[c] for c in cells.cell_ids.tolist()])]
            np.testing.assert_array_equal(cells.counts, expected.counts)
            seen += cells.cell_ids.tolist()
        assert sorted(seen) == sorted(position)


def test_cells_without_genes_pass_through(tmp_path):
    cells = Cells(np.zeros(6, int), np.zeros(0, int), np.zeros(0, int), np.arange(5, dtype=np.uint64))
    write_corpus(tmp_path, VOCABULARY, {"train": (cells, {})})
    corpus = open_corpus(tmp_path)
    assert sorted(flat(ids_of(stream_of(corpus)))) == list(range(5))
    write_cache(corpus)
    assert sorted(flat(ids_of(stream_of(corpus)))) == list(range(5))


# Balancing


def share_by_type(corpus, epochs=4, **settings):
    numbers = dict.fromkeys(TYPES, 0)
    stream = stream_of(corpus, balance="cell_type", **settings)
    for epoch in range(epochs):
        for _, obs in stream._read(stream.order.epoch(epoch), 0):
            for label in obs["cell_type"]:
                numbers[label] += 1
    total = sum(numbers.values())
    return {label: n / total for label, n in numbers.items()}, total / epochs


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"temperature": 4},
            [0.473, 0.311, 0.216],
        ),  # proportional to 800, 150 and 50 to the power of 1/4 below the cap
        ({"temperature": 1}, [0.8, 0.15, 0.05]),
        ({"temperature": 2}, [0.593, 0.257, 0.148]),
    ],
    ids=str,
)
def test_balancing_gives_labels_their_shares(corpus, settings, expected):
    shares, per_epoch = share_by_type(corpus, **settings)
    np.testing.assert_allclose(
        [shares[label] for label in ("T cell", "B cell", "dendritic cell")], expected, atol=0.02
    )
    assert abs(per_epoch - 1000) < 30


def test_a_balanced_batch_holds_every_type(corpus):
    batches = [obs["cell_type"] for _, obs in stream_of(corpus, balance="cell_type") if len(obs["cell_type"]) == 32]
    assert np.mean([len(set(types)) == 3 for types in batches]) > 0.95


def test_no_cell_is_drawn_more_than_ten_times():
    codes = np.append(np.zeros(997, np.int32), np.ones(3, np.int32))
    order = CellOrder(np.full(50, 20), np.full(1000, 7, np.uint16), batch_size=8, label_codes=codes)
    assert order.draw_repeats(0)[codes == 1].tolist() == [10, 10, 10]


def test_balanced_ranks_draw_the_same_cells_as_one(corpus):
    alone = sorted(flat(ids_of(stream_of(corpus, balance="cell_type"))))
    split = [ids_of(stream_of(corpus, balance="cell_type", rank=r, world_size=3)) for r in range(3)]
    together = sorted(flat(b for own in split for b in own))
    assert len(alone) <= len(together) <= len(alone) + 2
    assert set(together) == set(alone)


# The copy


def test_a_copy_of_another_state_of_the_corpus_is_not_used(tmp_path, caplog):
    write_corpus(tmp_path / "a", VOCABULARY, {"train": (make_cells(50), {})})
    write_corpus(tmp_path / "b", VOCABULARY, {"train": (make_cells(50, seed=8, first_id=100), {})})
    shutil.copytree(write_cache(open_corpus(tmp_path / "a")), tmp_path / "b" / "cache")
    corpus = open_corpus(tmp_path / "b")
    assert sorted(flat(ids_of(stream_of(corpus)))) == list(range(100, 150))
    assert "not used" in caplog.text
    caplog.clear()
    write_cache(corpus)  # copies it anew
    caplog.clear()
    assert sorted(flat(ids_of(stream_of(corpus)))) == list(range(100, 150))
    assert caplog.text == ""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked on POSIX only")
def test_a_killed_build_leaves_whole_copies_and_goes_on(tmp_path):
    write_corpus(tmp_path, VOCABULARY, {"train": (make_cells(50), {})}, cells_per_shard=25)
    corpus = open_corpus(tmp_path)
    pid = os.fork()
    if pid == 0:
        replace = os.replace
        os.replace = lambda *paths: replace(*paths) or os.kill(os.getpid(), signal.SIGKILL)
        write_cache(corpus)
    os.waitpid(pid, 0)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["train-00000-of-00002.arrow"]
    assert sorted(flat(ids_of(stream_of(corpus)))) == list(range(50))  # half from the copy
    first = (tmp_path / "cache" / "train-00000-of-00002.arrow").stat().st_mtime_ns
    write_cache(corpus)
    assert sorted(path.name for path in (tmp_path / "cache").iterdir())[1:] == ["train-00001-of-00002.arrow"]
    assert (tmp_path / "cache" / "train-00000-of-00002.arrow").stat().st_mtime_ns == first


def test_the_command_copies_a_corpus(tmp_path):
    from scmmgpt.train.__main__ import main

    write_corpus(tmp_path, VOCABULARY, {"train": (make_cells(50), {})})
    assert main(["cache", str(tmp_path)]) == 0
    assert main(["cache", str(tmp_path)]) == 0  # what is there is kept
    (tmp_path / "data" / "train-00000-of-00001.parquet").chmod(0)
    assert sorted(flat(ids_of(stream_of(open_corpus(tmp_path, verify=False))))) == list(range(50))


@pytest.mark.parametrize("layout", ["corpus", "cached"])
def test_barcodes_are_read_where_they_are_wanted(request, layout):
    for cells, obs in stream_of(request.getfixturevalue(layout), columns=["barcode"]):
        assert obs["barcode"].tolist() == [f"cell {i}" for i in cells.cell_ids.tolist()]


# `datasets` and trainers


def collate(cells, obs, *, epoch):
    return {"cell_ids": torch.from_numpy(cells.cell_ids.astype(np.int64)), "epoch": epoch}


def dataset_of(corpus, **settings):
    return BatchDataset(stream_of(corpus, in_memory=True, **settings), collate)


def seen_in(dataset):
    return [(batch["epoch"], batch["cell_ids"].tolist()) for batch in dataset]


def test_a_dataset_yields_finished_batches_of_the_epoch_that_is_set(corpus):
    dataset, stream = dataset_of(corpus), stream_of(corpus)
    assert isinstance(dataset, datasets.IterableDataset)
    assert isinstance(dataset, torch.utils.data.IterableDataset)
    for epoch in (0, 2, 0):
        dataset.set_epoch(epoch)
        assert seen_in(dataset) == [(epoch, batch) for batch in ids_of(stream.batches(epoch))]
    assert dataset.n_cells_read == 3000


def test_a_thread_collates_with_a_copy(corpus):
    class Collator:
        calls = ()

        def __call__(self, cells, obs, *, epoch):
            self.calls = (*self.calls, threading.current_thread().name)
            return {"n_calls": len(self.calls)}

    dataset = BatchDataset(stream_of(corpus), Collator())
    assert [batch["n_calls"] for batch in dataset] == list(range(1, len(dataset) + 1))
    assert dataset.collate.calls == ()


def test_a_batch_that_can_not_be_made_is_an_error_of_the_consumer(corpus):
    def broken(cells, obs, *, epoch):
        raise KeyError("no such column")

    with pytest.raises(KeyError, match="no such column"):
        next(iter(BatchDataset(stream_of(corpus), broken)))


def test_a_dataset_is_dealt_out_to_ranks(corpus):
    whole = dataset_of(corpus)
    for rank in range(3):
        own = whole.shard(3, rank)
        assert len(own) == len(stream_of(corpus, rank=rank, world_size=3))
        assert [ids for _, ids in seen_in(own)] == ids_of(stream_of(corpus, rank=rank, world_size=3))
        assert own.shard(3, rank) is own
        assert seen_in(own.of_all_ranks()) == seen_in(whole)
    with pytest.raises(ValueError, match="share of rank 2 of 3"):
        own.shard(2, 0)


def test_what_datasets_derives_sees_the_same_batches(corpus):
    from datasets.distributed import split_dataset_by_node

    dataset = dataset_of(corpus)
    expected = [ids for _, ids in seen_in(dataset)]
    shares = [[batch["cell_ids"].tolist() for batch in split_dataset_by_node(dataset, r, 2)] for r in range(2)]
    assert shares == [expected[::2], expected[1::2]]
    assert [len(batch["cell_ids"]) for batch in dataset.take(2)] == [32, 32]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("stop", [0, 5, 17])
def test_a_datasets_state_resumes_exactly_in_any_epoch(corpus, settings, stop):
    dataset = dataset_of(corpus, **settings)
    dataset.set_epoch(2)
    expected = seen_in(dataset)
    before, state = [], json.dumps(dataset_of(corpus, **settings).state_dict() | {"epoch": 2})
    for batch in dataset:
        if len(before) == stop:
            break
        before.append((batch["epoch"], batch["cell_ids"].tolist()))
        state = json.dumps(dataset.state_dict())
    resumed = dataset_of(corpus, **settings)
    resumed.load_state_dict(json.loads(state))
    resumed.set_epoch(2)  # as a trainer would, which leaves the position alone
    assert before + seen_in(resumed) == expected
    assert seen_in(resumed) == expected  # the next iteration begins at the beginning


def test_a_position_of_another_order_is_refused(corpus):
    state = dataset_of(corpus).state_dict()
    with pytest.raises(ValueError, match="seed=3, but this stream has 4"):
        dataset_of(corpus, seed=4).load_state_dict(state)


def test_batches_that_are_skimmed_are_not_made(corpus):
    made, dataset = [], dataset_of(corpus)
    dataset.collate = lambda cells, obs, epoch: made.append(len(cells)) or collate(cells, obs, epoch=epoch)
    dataset.set_epoch(1)
    expected = ids_of(stream_of(corpus).batches(1))
    dataset.skim(20)
    batches = list(dataset)
    assert batches[:20] == [{}] * 20
    assert [batch["cell_ids"].tolist() for batch in batches[20:]] == expected[20:]
    assert len(made) == len(expected) - 20
    assert len(list(dataset)) == len(made) - len(expected) + 20 == len(dataset)


class Recorder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def forward(self, cell_ids, epoch):
        self.seen.append((epoch, cell_ids.tolist()))
        return {"loss": self.weight * 0}


@pytest.mark.parametrize("settings", [{"batch_size": 100}, {"batch_size": 100, "balance": "cell_type"}])
@pytest.mark.parametrize("cut", [2, 7, 16])
def test_a_plain_trainer_resumes_exactly_in_any_epoch(corpus, tmp_path, settings, cut):
    def train(max_steps, **options):
        model = Recorder()
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            max_steps=max_steps,
            save_steps=cut,
            remove_unused_columns=False,
            accelerator_config={"dispatch_batches": False},
            **QUIET,
        )
        trainer = Trainer(
            model, arguments, train_dataset=dataset_of(corpus, **settings), data_collator=operator.itemgetter(0)
        )
        trainer.train(**options)
        return model.seen, trainer.state.epoch

    stream = stream_of(corpus, **settings)
    assert len(stream) == 10
    first, _ = train(cut)
    second, epoch = train(19, resume_from_checkpoint=str(tmp_path / f"checkpoint-{cut}"))
    expected = [(own, cells.cell_ids.tolist()) for e in range(4) for cells, _, own in stream.batches(e)]
    assert first + second == expected[:38]
    assert epoch == 3.8


# Faults of the process


def test_abandoned_iterations_leave_no_thread(corpus):
    before = threading.active_count()
    for _ in range(3):
        batches = iter(dataset_of(corpus))
        next(batches)
        batches.close()
    assert threading.active_count() == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the data loader forks on POSIX only")
@pytest.mark.parametrize("num_workers", [1, 2])
def test_forked_data_loader_workers_read_the_same(corpus, num_workers):
    loader = DataLoader(dataset_of(corpus), batch_size=None, num_workers=num_workers)
    assert [batch["cell_ids"].tolist() for batch in loader] == ids_of(stream_of(corpus))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": None}, "batch_size .* or token_budget"),
        ({"rank": 2, "world_size": 2}, "rank is 2 of world_size 2"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"split": "dev"}, r"no split 'dev'; it has \['train', 'test'\]"),
        ({"columns": ["louvain"]}, "no annotation 'louvain'"),
        ({"token_budget": 10}, "does not hold one cell"),
        ({"temperature": 0.5}, "temperature is 0.5"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(corpus, settings, message):
    with pytest.raises(ValueError, match=message):
        stream_of(corpus, **settings)
