"""The stream: every cell once, in an order that only the seed and the epoch decide."""

import json
import os
import signal

import numpy as np
import pytest

from scmmgpt.cells_scmmgpt import Cells
from scmmgpt.feature_extraction_scmmgpt import ScMMGPTFeatureExtractor
from scmmgpt.train.data.corpus import open_corpus
from scmmgpt.train.data.corpus_writer import write_corpus
from scmmgpt.train.data.stream import CellStream, as_dataset, build_cache, take_batch


N_GENES = 300
VOCABULARY = {"<pad>": 0, "<cls>": 1, "<eoc>": 2, **{f"G{i}": i for i in range(3, N_GENES)}}
TYPES = ["T cell"] * 16 + ["B cell"] * 3 + ["dendritic cell"]


def make_cells(n_cells, seed=0, dtype=np.uint16, first_id=0):
    """Random cells of 0 to 59 genes; the counts of a float32 cell are no integers."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 60, n_cells)
    gene_ids = [np.sort(rng.choice(np.arange(3, N_GENES), n, replace=False)) for n in lengths]
    counts = rng.integers(1, 2000, lengths.sum())
    counts = counts + rng.random(len(counts)) if dtype == np.float32 else counts
    return Cells(
        indptr=np.append(0, np.cumsum(lengths)),
        gene_ids=np.concatenate(gene_ids).astype(np.uint16),
        counts=counts.astype(dtype),
        cell_ids=np.arange(first_id, first_id + n_cells, dtype=np.uint64),
        total_counts=rng.integers(50, 5000, n_cells).astype(np.float32),
    )


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
    corpus = open_corpus(path)
    build_cache(corpus)
    return corpus


LAYOUTS = [("published", False), ("cache", False), ("published", True), ("cache", True)]


def stream_of(corpus, **settings):
    settings = {"batch_size": 32, "pool_size": 200, "seed": 3, "in_memory": False, **settings}
    if settings.get("token_budget"):
        settings["batch_size"] = None
        settings.setdefault("max_genes", 50)
    return CellStream(corpus, **settings)


def ids_of(batches):
    return [cells.cell_ids.tolist() for cells, _ in batches]


def flat(batches):
    return [cell_id for batch in batches for cell_id in batch]


@pytest.mark.parametrize(("layout", "in_memory"), LAYOUTS)
def test_an_epoch_holds_every_cell_once_with_its_own_values(corpus, layout, in_memory):
    stored = make_cells(1000)
    seen = []
    for cells, obs in stream_of(corpus, layout=layout, in_memory=in_memory):
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
def test_all_layouts_give_the_same_batches(corpus, settings):
    expected = ids_of(stream_of(corpus, layout="published", **settings))
    for layout, in_memory in LAYOUTS[1:]:
        assert ids_of(stream_of(corpus, layout=layout, in_memory=in_memory, **settings)) == expected


def test_the_order_depends_on_seed_and_epoch_alone(corpus):
    stream = stream_of(corpus)
    first = ids_of(stream)
    assert ids_of(stream) == first
    assert ids_of(stream_of(corpus, num_threads=1)) == first
    assert ids_of(stream_of(corpus, seed=4)) != first
    stream.set_epoch(1)
    second = ids_of(stream)
    assert second != first
    assert sorted(flat(second)) == sorted(flat(first))
    # Hardly a cell keeps its place: the epochs are unrelated.
    assert np.mean(np.array(flat(first)) == np.array(flat(second))) < 0.02


def test_without_shuffling_cells_come_as_stored(corpus):
    assert flat(ids_of(stream_of(corpus, shuffle=False))) == list(range(1000))


def test_a_batch_is_not_one_dataset(corpus):
    """Cells are stored by dataset, 100 each; a pool of ten row groups of 20 mixes several."""
    numbers = [len(set(obs["dataset_id"])) for _, obs in stream_of(corpus) if len(obs["dataset_id"]) == 32]
    assert np.mean(numbers) > 5
    assert min(numbers) > 2


def test_neighbours_in_the_store_are_not_neighbours_in_a_batch(corpus):
    together = []
    for batch in ids_of(stream_of(corpus)):
        groups = np.array(batch) // 20
        together.append(np.mean([np.sum(groups == group) - 1 for group in groups]))
    assert np.mean(together) < 5  # of 31 others; 31 if a batch were one row group, 3.1 if pools mix perfectly


@pytest.mark.parametrize("settings", [{}, {"token_budget": 900}, {"balance": "cell_type", "max_repeats": 4}])
@pytest.mark.parametrize("stop", [0, 1, 7, 13, 19])
def test_a_killed_run_resumes_without_losing_or_repeating_a_cell(corpus, settings, stop):
    expected = ids_of(stream_of(corpus, epoch=2, **settings))
    killed = stream_of(corpus, epoch=2, **settings)
    before = []
    for cells, _ in killed:
        if len(before) == stop:
            break
        before.append(cells.cell_ids.tolist())
        state = json.dumps(killed.state_dict())  # saved after each step, as a trainer would
    state = state if stop else json.dumps(stream_of(corpus, epoch=2, **settings).state_dict())
    resumed = stream_of(corpus, **settings)
    resumed.load_state_dict(json.loads(state))
    assert before + ids_of(resumed) == expected


def test_a_position_loaded_in_an_epoch_survives_set_epoch_of_that_epoch(corpus):
    stream = stream_of(corpus)
    stream.load_state_dict({**stream.state_dict(), "epoch": 1, "step": 30})
    stream.set_epoch(1)
    assert len(list(stream)) == len(stream) - 30
    assert len(list(stream)) == len(stream)  # the next iteration begins at the beginning


def test_seeking_counts_batches_over_epochs(corpus):
    stream = stream_of(corpus)
    stream.seek(len(stream) + 5)
    assert (stream.state_dict()["epoch"], stream.state_dict()["step"]) == (1, 5)
    assert ids_of(stream) == ids_of(stream_of(corpus, epoch=1))[5:]


def test_a_position_of_another_order_is_refused(corpus):
    state = stream_of(corpus).state_dict()
    with pytest.raises(ValueError, match="seed=3, but this stream has 4"):
        stream_of(corpus, seed=4).load_state_dict(state)


def read_ranks(corpus, world_size, n_steps=None, state=None, **settings):
    """Cells that all ranks read in `n_steps` batches each, and the state after that."""
    seen = []
    for rank in range(world_size):
        stream = stream_of(corpus, rank=rank, world_size=world_size, epoch=2, **settings)
        if state is not None:
            stream.load_state_dict(json.loads(state))
        for step, (cells, _) in enumerate(stream, start=1):
            seen += cells.cell_ids.tolist()
            if step == n_steps:
                break
    return seen, json.dumps(stream.state_dict()), stream.plan()


@pytest.mark.parametrize(("few", "many"), [(2, 3), (1, 4)])
@pytest.mark.parametrize("settings", [{}, {"token_budget": 900}, {"balance": "cell_type", "max_repeats": 4}])
def test_another_number_of_ranks_takes_over_within_an_epoch(corpus, few, many, settings):
    everything = sorted(flat(ids_of(stream_of(corpus, epoch=2, **settings))))
    first, state, _ = read_ranks(corpus, many, 3, **settings)
    second, state, _ = read_ranks(corpus, few, 4, state=state, **settings)
    if "token_budget" not in settings:
        settings = {**settings, "batch_size": 24}  # and batches of another size
    third, _, plan = read_ranks(corpus, many, None, state=state, **settings)
    assert min(map(len, (first, second, third))) > 0
    repeated = len(first + second + third) - len(everything)
    assert repeated == plan.n_repeated
    numbers = np.bincount(first + second + third, minlength=1000) - np.bincount(everything, minlength=1000)
    assert numbers.min() == 0  # nothing is lost
    assert numbers.sum() == repeated


@pytest.mark.parametrize("settings", [{}, {"token_budget": 900}])
def test_other_ranks_find_nothing_left_of_a_finished_epoch(corpus, settings):
    _, state, _ = read_ranks(corpus, 3, **settings)
    rest, _, plan = read_ranks(corpus, 2, state=state, **settings)
    assert rest == []
    assert plan.n_steps == 0


def test_dropping_the_only_batch_is_refused(corpus):
    with pytest.raises(ValueError, match="a rank has 30 cells, batch_size is 32"):
        len(stream_of(corpus, split="test", drop_last=True))


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("uneven", ["wrap", "drop"])
@pytest.mark.parametrize("settings", [{}, {"token_budget": 900}, {"drop_last": True}])
def test_ranks_share_the_cells_in_equal_numbers_of_batches(corpus, world_size, uneven, settings):
    streams = [
        stream_of(corpus, rank=rank, world_size=world_size, uneven=uneven, **settings) for rank in range(world_size)
    ]
    batches = [ids_of(stream) for stream in streams]
    plan = streams[0].plan()
    assert {len(own) for own in batches} == {plan.n_steps} == {len(stream) for stream in streams}
    seen = flat(cell_ids for own in batches for cell_ids in own)
    if not settings.get("drop_last"):
        assert 1000 - len(set(seen)) == plan.n_dropped
        assert len(seen) - len(set(seen)) == plan.n_repeated
        assert plan.n_dropped == 0 if uneven == "wrap" else plan.n_repeated == 0
    else:
        assert len(set(map(len, (b for own in batches for b in own)))) == 1
        assert len(seen) == 1000 + plan.n_repeated - plan.n_dropped


def test_more_ranks_than_row_groups_still_share_evenly(corpus):
    batches = [ids_of(stream_of(corpus, split="test", rank=rank, world_size=8, batch_size=2)) for rank in range(8)]
    assert {len(own) for own in batches} == {2}
    assert set(flat(b for own in batches for b in own)) == set(range(5000, 5030))


def tensors_by_cell(corpus, epoch=5, **settings):
    """What the feature extractor makes of every cell, by cell id, without padding."""
    extractor = ScMMGPTFeatureExtractor(max_genes=20, seed=1)
    found = {}
    for rank in range(settings.get("world_size", 1)):
        for cells, _ in stream_of(corpus, rank=rank, epoch=epoch, **settings):
            batch = extractor(cells, epoch=epoch)
            for row, cell_id in enumerate(cells.cell_ids.tolist()):
                n = int(batch["cell_attention_mask"][row].sum())
                found[cell_id] = (batch["gene_ids"][row, :n].tolist(), batch["expression"][row, :n].tolist())
    return found


@pytest.mark.parametrize(
    "settings",
    [{"batch_size": 7}, {"token_budget": 900}, {"world_size": 4}, {"num_threads": 1}, {"pool_size": 64}, {"seed": 9}],
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
    build_cache(corpus, compression="zstd")
    assert [shard.counts_dtype for shard in corpus.shards("train")] == ["uint16", "float32", "float32"]
    position = {cell_id: i for i, cell_id in enumerate(everything.cell_ids.tolist())}
    for layout in ("published", "cache"):
        seen = []
        for cells, _ in stream_of(corpus, layout=layout, pool_size=32):
            expected = everything[np.array([position[c] for c in cells.cell_ids.tolist()])]
            np.testing.assert_array_equal(cells.counts, expected.counts)
            seen += cells.cell_ids.tolist()
        assert sorted(seen) == sorted(position)


def test_cells_without_genes_pass_through(tmp_path):
    cells = Cells(np.zeros(6, int), np.zeros(0, int), np.zeros(0, int), np.arange(5, dtype=np.uint64))
    write_corpus(tmp_path, VOCABULARY, {"train": (cells, {})})
    corpus = open_corpus(tmp_path)
    build_cache(corpus)
    for layout in ("published", "cache"):
        assert sorted(flat(ids_of(stream_of(corpus, layout=layout)))) == list(range(5))


# Balancing


def share_by_type(corpus, epochs=4, **settings):
    numbers = dict.fromkeys(TYPES, 0)
    stream = stream_of(corpus, balance="cell_type", **settings)
    for epoch in range(epochs):
        stream.set_epoch(epoch)
        for _, obs in stream:
            for label in obs["cell_type"]:
                numbers[label] += 1
    total = sum(numbers.values())
    return {label: n / total for label, n in numbers.items()}, total / epochs


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [1 / 3, 1 / 3, 1 / 3]),
        ({"temperature": 1}, [0.8, 0.15, 0.05]),
        ({"temperature": 2}, [0.593, 0.257, 0.148]),
        ({"weights": {"T cell": 0.0}}, [0.0, 0.5, 0.5]),
        ({"weights": {"B cell": 2.0}}, [0.25, 0.5, 0.25]),
    ],
    ids=str,
)
def test_balancing_gives_labels_their_shares(corpus, settings, expected):
    shares, per_epoch = share_by_type(corpus, max_repeats=20, **settings)
    np.testing.assert_allclose(
        [shares[label] for label in ("T cell", "B cell", "dendritic cell")], expected, atol=0.02
    )
    assert abs(per_epoch - 1000) < 30


def test_a_balanced_batch_holds_every_type(corpus):
    batches = [obs["cell_type"] for _, obs in stream_of(corpus, balance="cell_type") if len(obs["cell_type"]) == 32]
    assert np.mean([len(set(types)) == 3 for types in batches]) > 0.95


def test_no_cell_is_drawn_more_often_than_allowed(corpus):
    seen = flat(ids_of(stream_of(corpus, balance="cell_type", max_repeats=2)))
    assert np.unique(seen, return_counts=True)[1].max() == 2


def test_balanced_ranks_draw_the_same_cells_as_one(corpus):
    alone = sorted(flat(ids_of(stream_of(corpus, balance="cell_type"))))
    split = [ids_of(stream_of(corpus, balance="cell_type", rank=r, world_size=3, uneven="drop")) for r in range(3)]
    together = sorted(flat(b for own in split for b in own))
    assert len(alone) - 2 <= len(together) <= len(alone)
    assert set(together) <= set(alone)


def test_a_weight_for_an_absent_label_is_refused(corpus):
    with pytest.raises(ValueError, match="'NK cell'.*'T cell'"):
        stream_of(corpus, balance="cell_type", weights={"NK cell": 2.0}).plan()


# The cache


def test_a_flipped_byte_in_the_cache_is_refused(tmp_path):
    write_corpus(tmp_path, VOCABULARY, {"train": (make_cells(50), {})})
    corpus = open_corpus(tmp_path)
    cache = build_cache(corpus)
    for path in (cache / "train" / "genes-00000.bin", cache / "train" / "total_counts.npy"):
        content = path.read_bytes()
        path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        with pytest.raises(ValueError, match=f"{path.name}.*checksum.*build it again"):
            list(stream_of(corpus))
        path.write_bytes(content)
    (cache / "train" / "genes-00000.bin").write_bytes(b"short")
    with pytest.raises(ValueError, match="has 5 bytes instead of"):
        stream_of(corpus)


def test_a_flipped_byte_in_a_shard_is_refused_while_streaming(tmp_path):
    import pyarrow.parquet as pq

    write_corpus(tmp_path, VOCABULARY, {"train": (make_cells(50), {})})
    corpus = open_corpus(tmp_path)
    shard = tmp_path / corpus.shards("train")[0].path
    chunk = pq.read_metadata(shard).row_group(0).column(2)  # gene ids
    content = bytearray(shard.read_bytes())
    content[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"Row group 0 of .*train-00000-of-00001.parquet can't be read.*damaged"):
        list(stream_of(corpus))


def test_a_cache_of_another_state_of_the_corpus_is_not_used(tmp_path, caplog):
    write_corpus(tmp_path / "a", VOCABULARY, {"train": (make_cells(50), {})})
    write_corpus(tmp_path / "b", VOCABULARY, {"train": (make_cells(50, seed=8, first_id=100), {})})
    build_cache(open_corpus(tmp_path / "a"), tmp_path / "b" / "cache")
    corpus = open_corpus(tmp_path / "b")
    assert sorted(flat(ids_of(stream_of(corpus)))) == list(range(100, 150))
    assert "not used" in caplog.text
    with pytest.raises(ValueError, match="no cache of this corpus"):
        stream_of(corpus, layout="cache")
    with pytest.raises(ValueError, match="another state of the corpus"):
        build_cache(corpus)


def test_an_interrupted_build_leaves_no_cache(tmp_path, monkeypatch):
    write_corpus(tmp_path, VOCABULARY, {"train": (make_cells(50), {})})
    corpus = open_corpus(tmp_path)
    monkeypatch.setattr(np, "save", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        build_cache(corpus)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "manifest.json", "splits.json", "vocab.json"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked on POSIX only")
def test_a_killed_build_is_cleared_away_by_the_next(tmp_path):
    write_corpus(tmp_path, VOCABULARY, {"train": (make_cells(50), {})})
    corpus = open_corpus(tmp_path)
    pid = os.fork()
    if pid == 0:
        np.save = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
        build_cache(corpus)
    os.waitpid(pid, 0)
    assert len(list(tmp_path.glob(".cache.*.tmp"))) == 1
    build_cache(corpus)
    assert not list(tmp_path.glob(".cache.*.tmp"))
    assert len(flat(ids_of(stream_of(corpus, layout="cache")))) == 50


def test_the_command_builds_a_cache_elsewhere(tmp_path):
    from scmmgpt.train.__main__ import main

    write_corpus(tmp_path / "corpus", VOCABULARY, {"train": (make_cells(50), {})})
    arguments = ["cache", str(tmp_path / "corpus"), "--output", str(tmp_path / "cache"), "--compression", "zstd"]
    assert main(arguments) == 0
    assert main(arguments) == 0  # what is there is kept
    stream = stream_of(open_corpus(tmp_path / "corpus"), layout="cache", cache_dir=tmp_path / "cache")
    assert sorted(flat(ids_of(stream))) == list(range(50))


def test_barcodes_come_from_the_published_layout(corpus):
    for cells, obs in stream_of(corpus, columns=["barcode"]):
        assert obs["barcode"].tolist() == [f"cell {i}" for i in cells.cell_ids.tolist()]


# `datasets` and trainers


def collate(cells, obs, *, epoch):
    import torch

    return {"cell_ids": torch.from_numpy(cells.cell_ids.astype(np.int64)), "epoch": epoch}


def test_a_dataset_yields_finished_batches_epoch_after_epoch(corpus):
    dataset = as_dataset(stream_of(corpus), collate, num_epochs=2)
    found = [(batch["epoch"], batch["cell_ids"].tolist()) for batch in dataset]
    expected = [(e, batch) for e in range(2) for batch in ids_of(stream_of(corpus, epoch=e))]
    assert found == expected
    assert [batch["cell_ids"].tolist() for batch in dataset] == [batch for _, batch in expected]


def test_a_dataset_is_split_by_rank_along_the_plan(corpus):
    from datasets.distributed import split_dataset_by_node

    dataset = as_dataset(stream_of(corpus, world_size=3), collate, num_epochs=1)
    for rank in range(3):
        own = split_dataset_by_node(dataset, rank=rank, world_size=3)
        assert [batch["cell_ids"].tolist() for batch in own] == ids_of(stream_of(corpus, rank=rank, world_size=3))


def test_the_position_of_a_dataset_counts_what_was_handed_out(corpus):
    stream = stream_of(corpus)
    batches = iter(as_dataset(stream, collate, workers=2))
    before = [next(batches)["cell_ids"].tolist() for _ in range(40)]
    resumed = stream_of(corpus)
    resumed.load_state_dict(stream.state_dict())
    after = [batch["cell_ids"].tolist() for batch in as_dataset(resumed, collate, num_epochs=1)]
    del batches
    assert before + after == [batch for epoch in range(2) for batch in ids_of(stream_of(corpus, epoch=epoch))]


def test_a_datasets_state_resumes_exactly(corpus):
    dataset = as_dataset(stream_of(corpus), collate, num_epochs=1)
    before = []
    for batch in dataset:
        before.append(batch["cell_ids"].tolist())
        if len(before) == 11:
            state = dataset.state_dict()
            break
    resumed = as_dataset(stream_of(corpus), collate, num_epochs=1)
    resumed.load_state_dict(state)
    assert before + [batch["cell_ids"].tolist() for batch in resumed] == ids_of(stream_of(corpus))


def test_trainer_sees_each_batch_as_it_is_and_resumes_by_seeking(corpus, tmp_path):
    import torch
    from transformers import Trainer, TrainingArguments

    class Recorder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.seen = []

        def forward(self, cell_ids, epoch):
            self.seen.append(cell_ids.tolist())
            return {"loss": self.weight * 0}

    def train(stream, max_steps, **settings):
        model = Recorder()
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=1,
            max_steps=max_steps,
            save_steps=5,
            remove_unused_columns=False,
            accelerator_config={"dispatch_batches": False},
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            **settings,
        )
        dataset = as_dataset(stream, collate)
        trainer = Trainer(model, arguments, train_dataset=dataset, data_collator=take_batch)
        trainer.train(resume_from_checkpoint=bool(settings))
        return model.seen

    first = train(stream_of(corpus), 35)
    resumed = stream_of(corpus)
    resumed.seek(35)
    second = train(resumed, 40, ignore_data_skip=True)
    expected = [batch for epoch in range(2) for batch in ids_of(stream_of(corpus, epoch=epoch))]
    assert first + second == expected[:40]


# Faults of the process


def test_abandoned_iterations_leave_no_thread(corpus):
    import threading

    before = threading.active_count()
    for _ in range(3):
        batches = iter(stream_of(corpus))
        next(batches)
        batches.close()
    assert threading.active_count() == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the data loader forks on POSIX only")
def test_a_forked_data_loader_worker_reads_the_same(corpus):
    from torch.utils.data import DataLoader

    dataset = as_dataset(stream_of(corpus), collate, num_epochs=1)
    loader = DataLoader(dataset, batch_size=1, collate_fn=take_batch, num_workers=1)
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
