"""Run one loader in a process of its own: `test_stream.py` in this folder builds the data, and lets loaders race.

Every loader yields shuffled batches of 64 cells; loaders named `*_tokens` tokenise them, with 1,200 tokens, 51 bins.

Loaders of other projects run their own code where it can be imported. `SCMMGPT_BENCHMARK_REFERENCE` names a checkout
of the published scMMGPT; packages that the measured functions do not need may be missing. annbatch needs Python 3.12:
`SCMMGPT_BENCHMARK_ANNBATCH` names an interpreter, which loads the feature extractor of this repository by path.
"""

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import signal
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np


REPOSITORY = Path(__file__).parents[2]
BATCH_SIZE = 64
MAX_TOKENS = 1200
WARM_UP = 2.0  # seconds
UNUSED_BY_REFERENCE = (  # imported by its files, but not used by the functions that are measured
    "pytorch_lightning",
    "scanpy",
    "scgpt",
    "scgpt.tokenizer",
    "torch_geometric",
    "torch_geometric.data",
    "torchtext",
    "torchtext.vocab",
)
LOADERS = {}


def loader(function):
    """Register a loader: a function that takes the data folder and returns an iterator over batch sizes."""
    LOADERS[function.__name__] = function
    return function


# What is measured


def race(batches, scores):
    """Warm up and stop; then keep `scores` (cells, whether warm, MB) while the parent continues and stops us."""
    peak = Peak()
    peak.start()
    end = time.perf_counter() + WARM_UP
    while time.perf_counter() < end:
        next(batches)
    scores[1] = 1
    os.kill(os.getpid(), signal.SIGSTOP)
    for n in batches:
        scores[0] += n
        scores[2] = int(peak.peak)


class Peak(threading.Thread):
    """Samples the anonymous memory of this process in MB, which leaves out files that it maps."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak = 0.0

    def run(self):
        while True:
            with open("/proc/self/status") as status:
                kilobytes = next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))
            self.peak = max(self.peak, kilobytes / 1024)
            time.sleep(0.05)


# Ours


def our_stream(data, corpus="corpus", **settings):
    from scmmgpt.train.data.blocks import BlockReader
    from scmmgpt.train.data.corpus import open_corpus
    from scmmgpt.train.data.stream import CellStream

    corpus = open_corpus(data / os.environ.get("SCMMGPT_BENCHMARK_CORPUS", corpus), verify=False)
    stream = CellStream(corpus, batch_size=BATCH_SIZE, **settings)
    assert isinstance(stream.reader, BlockReader)  # not in memory
    return stream


def our_raw_batches(stream):
    for epoch in itertools.count():
        yield from (len(cells) for cells, *_ in stream.batches(epoch))


def our_token_batches(stream):
    tokenise = our_tokens(stream)
    for epoch in itertools.count():
        yield from (len(tokenise(cells, obs)["gene_ids"]) for cells, obs, _ in stream.batches(epoch))


def warm(extractor, cells):
    """Tokenise some 20,000 cells: the extractor takes its compiled kernels after the first few thousand."""
    for _ in range(20_000 // len(cells)):
        extractor(cells, return_tensors="np")
    return extractor


def our_tokens(stream):
    from scmmgpt.feature_extraction_scmmgpt import ScMMGPTFeatureExtractor

    extractor = warm(ScMMGPTFeatureExtractor(max_genes=MAX_TOKENS), next(iter(stream))[0])
    return lambda cells, obs, epoch=0: extractor(cells, padding="max_length", epoch=epoch)


@loader
def ours_raw(data):
    return our_raw_batches(our_stream(data, columns=[]))


@loader
def ours_tokens(data):
    return our_token_batches(our_stream(data))


def trainer_batches(data, cells=None):
    """What a trainer reads: the loader of `StreamTrainer` over the datasets that the commands make."""
    from transformers import TrainingArguments

    from scmmgpt.train.data.corpus import open_corpus
    from scmmgpt.train.trainer import BatchLoader, make_datasets

    corpus = open_corpus(data / "corpus", verify=False)
    arguments = TrainingArguments(per_device_train_batch_size=BATCH_SIZE, use_cpu=True, report_to="none")
    dataset, _ = make_datasets(corpus, our_tokens(our_stream(data)), arguments, cells=cells)
    loader = BatchLoader(dataset)
    for epoch in itertools.count():
        loader.set_epoch(epoch)
        yield from (len(batch["gene_ids"]) for batch in loader)


@loader
def ours_dataset_tokens(data):
    """Finished batches of a corpus, collated ahead in a thread."""
    return trainer_batches(data)


@loader
def ours_streamed_tokens(data):
    """Finished batches of a streamed dataset in its own order."""
    import datasets

    files = str(data / "corpus" / "data" / "train-*.parquet")
    stream = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    return trainer_batches(data, {"train": stream})


@loader
def ours_tokens_one_thread(data):
    """One rank of several, each on one core."""
    rank, world_size = map(int, os.environ["SCMMGPT_BENCHMARK_RANK"].split("/"))
    os.sched_setaffinity(0, {rank % os.cpu_count()})
    return our_token_batches(our_stream(data, rank=rank, world_size=world_size))


@loader
def ours_published_raw(data):
    return our_raw_batches(our_stream(data, "corpus_published", columns=[]))


@loader
def ours_published_tokens(data):
    return our_token_batches(our_stream(data, "corpus_published"))


def ours_by_stage(data):
    """CPU microseconds per cell of each stage, one thread, over 20 row groups; the least of three runs."""
    from scmmgpt.feature_extraction_scmmgpt import ScMMGPTFeatureExtractor
    from scmmgpt.train.data.blocks import CellPool

    stream = our_stream(data, columns=[])
    reader, n_blocks = stream.reader, 20
    n_cells = int(reader.sizes[:n_blocks].sum())
    extractor = warm(ScMMGPTFeatureExtractor(max_genes=MAX_TOKENS), next(iter(stream))[0])

    def read():
        return [reader.read(block)[0] for block in range(n_blocks)]

    cells = read()
    places = np.random.default_rng(0).permutation(n_cells)
    pool = CellPool(stream.order.lengths[:n_cells][np.argsort(places)], reader.counts_dtype, [])
    places = np.split(places, np.cumsum(reader.sizes[: n_blocks - 1]))

    def copy_to_place():
        for block, own in zip(cells, places, strict=True):
            pool.fill(np.arange(len(block)), own, block, {})

    def tokenise():
        for block in cells:
            for start in range(0, len(block), BATCH_SIZE):
                extractor(block[start : start + BATCH_SIZE], padding="max_length")

    def arrange():
        order = stream.order.epoch(0)
        for first, last, *_ in itertools.islice(order.pools(0), 2):
            order.pool(first, last)
        return last

    stages = {
        "read and decompress": least_cpu(read) / n_cells,
        "copy to place": least_cpu(copy_to_place) / n_cells,
        "shuffle": least_cpu(arrange) / arrange(),
        "tokenise": least_cpu(tokenise) / n_cells,
    }
    return {name: seconds * 1e6 for name, seconds in stages.items()}


def least_cpu(function):
    times = []
    for _ in range(3):
        start = time.thread_time()
        function()
        times.append(time.thread_time() - start)
    return min(times)


# annbatch


def annbatch_batches(data):
    """annbatch over uint16 counts, with the fastest setting on this data: 64 chunks of 64 cells."""
    import annbatch
    import zarr
    import zarrs  # noqa: F401

    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
    collection = annbatch.DatasetCollection(data / "annbatch.zarr", mode="r")
    for seed in itertools.count():
        batches = annbatch.Loader(
            shuffle=True, batch_size=BATCH_SIZE, chunk_size=64, preload_nchunks=64, rng=np.random.default_rng(seed)
        )
        yield from batches.use_collection(collection)


@loader
def annbatch_raw(data):
    return (batch["X"].shape[0] for batch in annbatch_batches(data))


@loader
def annbatch_tokens(data):
    """annbatch, followed by this repository's feature extractor."""
    batches = annbatch_batches(data)
    first = next(batches)["X"]
    module = extractor_by_path()

    def cells_of(matrix):
        return module.Cells(matrix.indptr, matrix.indices, matrix.data, np.arange(matrix.shape[0], dtype=np.uint64))

    extractor = warm(module.ScMMGPTFeatureExtractor(max_genes=MAX_TOKENS), cells_of(first))
    for batch in batches:
        yield len(extractor(cells_of(batch["X"]), padding="max_length", return_tensors="np")["gene_ids"])


def extractor_by_path():
    """Load the feature extractor without the package, and without torch and transformers where they are absent."""
    stand_ins = {}
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
        for name in ("torch", "transformers", "transformers.feature_extraction_utils"):
            stand_ins[name] = types.ModuleType(name)
        stand_ins["torch"].Tensor = type("Tensor", (), {})  # signatures name it
        stand_ins["transformers.feature_extraction_utils"].BatchFeature = dict
        stand_ins["transformers.feature_extraction_utils"].FeatureExtractionMixin = type(
            "Mixin",
            (),
            {
                "__init__": lambda self, **settings: None,
                "register_for_auto_class": classmethod(lambda cls, name: None),
            },
        )
    package = sys.modules["travelling"] = types.ModuleType("travelling")
    package.__path__ = [str(REPOSITORY)]
    with imported(stand_ins):
        module = importlib.import_module("travelling.feature_extraction_scmmgpt")
    return module


@contextlib.contextmanager
def imported(modules):
    """Make these modules importable within the context; afterwards other libraries must not find them."""
    sys.modules.update(modules)
    yield
    for name in modules:
        del sys.modules[name]


def build_annbatch(data):
    """Write annbatch's own layout with its defaults: shuffled, chunks of 64 cells, lz4."""
    import annbatch

    annbatch.DatasetCollection(data / "annbatch.zarr").add_adatas([data / "cells.h5ad"])


# Other loaders


@loader
def datasets_numpy_tokens(data):
    """`datasets` streaming the published Parquet as NumPy arrays through its shuffle buffer, then our extractor."""
    import datasets

    from scmmgpt.cells_scmmgpt import Cells
    from scmmgpt.feature_extraction_scmmgpt import ScMMGPTFeatureExtractor
    from scmmgpt.train.data.corpus import open_corpus

    extractor = ScMMGPTFeatureExtractor(max_genes=MAX_TOKENS)
    warmed = None
    corpus = open_corpus(data / "corpus", verify=False)
    columns = ["cell_id", "gene_ids", "counts", "total_counts"]
    stream = datasets.load_dataset(
        "parquet",
        data_files=str(data / "corpus" / "data" / "*.parquet"),
        split="train",
        streaming=True,
        columns=columns,
        features=datasets.Features({name: corpus.features()[name] for name in columns}),
    )
    stream = stream.shuffle(seed=0, buffer_size=8192).with_format("numpy")
    for epoch in itertools.count():
        stream.set_epoch(epoch)
        for batch in stream.iter(BATCH_SIZE):
            cells = Cells(
                indptr=np.append(0, np.cumsum([len(genes) for genes in batch["gene_ids"]])),
                gene_ids=np.concatenate([np.asarray(genes, np.uint16) for genes in batch["gene_ids"]]),
                counts=np.concatenate([np.asarray(counts, np.uint16) for counts in batch["counts"]]),
                cell_ids=np.asarray(batch["cell_id"], np.uint64),
            )
            if not warmed:
                warmed = warm(extractor, cells)
            yield len(extractor(cells, padding="max_length")["gene_ids"])


# The reference implementation, from a checkout


def empty_class(attribute):
    if attribute.startswith("__"):
        raise AttributeError(attribute)
    return type(attribute, (), {})


def stand_ins(*names):
    """Stand-ins for modules that are missing, and that the measured functions do not use."""
    found = {}
    for name in names:
        if importlib.util.find_spec(name.partition(".")[0]) is None:
            found[name] = types.ModuleType(name)
            found[name].__getattr__ = empty_class
            found[name].__path__ = []
    return found


def random_order(n_cells):
    for seed in itertools.count():
        order = np.random.default_rng(seed).permutation(n_cells)
        for start in range(0, n_cells - BATCH_SIZE, BATCH_SIZE):
            yield order[start : start + BATCH_SIZE].tolist()


@loader
def reference_tokens(data):
    """The published scMMGPT: its `Stage1Dataset` item by item over Arrow, and its padding to the top genes."""
    import datasets

    sys.path.insert(0, os.environ["SCMMGPT_BENCHMARK_REFERENCE"])
    absent = stand_ins(*UNUSED_BY_REFERENCE)
    with imported(absent):
        from data_provider.pretrain_dataset import Stage1Dataset
        from data_provider.stage1_dm import pad_batch_hvalue

    vocabulary = {"<pad>": 0, "<cls>": 1}
    cells = object.__new__(Stage1Dataset)  # its constructor reads files of captions, which are not measured here
    cells.dataset, cells.vocab = datasets.load_from_disk(data / "reference"), vocabulary
    cells.cell_text_helper = types.SimpleNamespace(cellxgene_metadata_to_text=lambda metadata: "")
    for rows in random_order(len(cells.dataset)):
        items = [cells[row][0] for row in rows]
        batch = [(item["gene_ids"], item["values"], None) for item in items]
        padded = pad_batch_hvalue(batch, max_len=MAX_TOKENS, vocab=vocabulary)
        yield len(padded["genes"].eq(0))


TASKS = {"ours_by_stage": ours_by_stage, "build_annbatch": build_annbatch}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("loader", choices=[*LOADERS, *TASKS])
    parser.add_argument("data", type=Path)
    parser.add_argument("--scores", help="file of the scores, to take part in a race")
    arguments = parser.parse_args()
    if arguments.loader in TASKS:
        result = TASKS[arguments.loader](arguments.data)
    else:
        scores = np.memmap(arguments.scores, np.int64, "r+")
        result = race(LOADERS[arguments.loader](arguments.data), scores)
    sys.stdout.write("\n" + json.dumps(result) + "\n")
    sys.stdout.flush()
    os._exit(0)  # some loaders keep threads that do not end


if __name__ == "__main__":
    main()
