"""Build a corpus: from files of cells, folders of them, or the CELLxGENE Census, to shuffled Parquet shards.

    python -m scmmgpt.train prepare --demo pbmc68k --output corpora/pbmc68k
    python -m scmmgpt.train prepare data/*.h5ad --output corpora/mine --workers 8
    python -m scmmgpt.train prepare --census 2025-01-30 --filter "tissue_general == 'lung'" --output corpora/lung

The build is an external sort by a random key, so that the cells of all sources lie mixed in every shard:

1. scan: every source's annotations, genes and kind of values; the gene vocabulary and the splits follow.
2. map: every partition (a range of cells of one source) becomes a scratch file sorted by split and key.
3. reduce: every shard (a range of keys of one split) merges its slices of all scratch files.

Each step writes whole files, under a temporary name first, and is skipped if its file is there. A build that was
killed, or ran out of disk, goes on where it stopped when the same command is given again, and ends with the same
bytes, whatever the number of workers. One builder at a time holds the folder's lock.

Partitions and shards are built by processes of this machine (`--workers`), or of many machines by a Dask cluster
(`--cluster tcp://host:8786`, extra `cluster`) that sees the same folders: plain functions of one file each need no
data engine, and Dask runs them wherever a scheduler (SLURM, Kubernetes, SSH) can start its workers.
"""

import argparse
import contextlib
import dataclasses
import errno
import functools
import importlib.util
import json
import logging
import multiprocessing
import os
import shlex
import shutil
import socket
import string
import threading
import uuid
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from scmmgpt.cells_scmmgpt import Cells, RandomStream, cell_keys
from scmmgpt.files import whole_file, write_json
from scmmgpt.genes_scmmgpt import GeneIndex
from scmmgpt.train.data import ontology
from scmmgpt.train.data.corpus import (
    MAX_VOCABULARY_SIZE,
    OBS_COLUMNS,
    SCHEMA_VERSION,
    SPLITS,
    CorpusWriter,
    Manifest,
    hash_file,
    hash_vocabulary,
    table_to_cells,
)
from scmmgpt.train.data.gene_tables import build_gene_aliases, reference_gene_index
from scmmgpt.train.data.sources import SourceSpec, cell_ids, find_joinids, fingerprint, open_source, resolve_labels
from scmmgpt.train.data.splits import assign_splits, split_cells, split_units


logger = logging.getLogger(__name__)

SPECIAL_TOKENS = ("<pad>", "<cls>", "<eoc>")
# About 130 MB a shard, and 1 GB of memory at most for a worker, at 1,500 genes a cell.
CELLS_PER_SHARD = 65_536
CELLS_PER_PARTITION = 16_384
SHARE_UNITS = 2**36  # fine enough for one count in a million, and 10^8 cells still sum to less than 2^63
CELLS_TAKEN = 2_048  # read or gathered at once
CELLS_PER_SCAN = 500_000  # annotations held at once
SMALL_SOURCES_BYTES = 2**28  # built faster than worker processes start
SOURCE_SUFFIXES = (".h5ad", ".h5mu", ".h5", ".loom")  # found in folders; a table has to be named itself
DROP_REASONS = ("excluded_dataset", "too_few_genes")
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

DEMOS = {
    "pbmc68k": {
        "package": "scanpy",
        "path": "datasets/10x_pbmc68k_reduced.h5ad",
        "name": "pbmc68k_reduced",
        "columns": {"cell_type": "bulk_labels"},
        "constants": {
            "tissue": "blood",
            "disease": "normal",
            "assay": "10x 3' v1",
            "organism": "Homo sapiens",
        },
        "licence": "cc-by-4.0",  # 10x Genomics data sets
    }
}


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def make_parser(prog: str = "python -m scmmgpt.train prepare") -> argparse.ArgumentParser:
    """Arguments of `python -m scmmgpt.train prepare`."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = parser.add_argument_group("sources")
    source.add_argument("sources", nargs="*", help="files of cells (.h5ad and others), or folders of them")
    source.add_argument("--demo", choices=sorted(DEMOS), help="real data that come with an installed package")
    source.add_argument("--census", metavar="RELEASE", help="Census release by date, or the URI of a SOMA")
    source.add_argument("--filter", help="Census cells to take, e.g. \"tissue_general == 'lung'\"")
    source.add_argument("--organism", default="homo_sapiens", help="Census organism")
    source.add_argument("--all-data", action="store_true", help="take Census cells that are not primary data as well")
    source.add_argument("--layer", help="matrix of the files to read, instead of the best one found")
    source.add_argument("--assume", help="what that matrix holds, instead of what is found")
    source.add_argument("--gene-column", help="column of `var` with gene names, instead of the best one found")
    source.add_argument(
        "--column", action="append", default=[], metavar="NAME=COLUMN", help="obs column that holds NAME, repeatable"
    )
    source.add_argument(
        "--constant", action="append", default=[], metavar="NAME=VALUE", help="value of NAME for all cells, repeatable"
    )
    source.add_argument(
        "--licence", action="append", default=[], metavar="[SOURCE=]LICENCE", help="terms of the data, repeatable"
    )
    source.add_argument("--exclude-dataset", action="append", default=[], metavar="ID", help="repeatable")

    corpus = parser.add_argument_group("corpus")
    corpus.add_argument("--output", required=True, help="folder of the corpus")
    corpus.add_argument("--vocabulary", help="vocab.json of a model; default: all genes that the sources measure")
    corpus.add_argument("--min-genes", type=int, default=1, help="leave out cells that express fewer genes")
    corpus.add_argument("--split-by", choices=("auto", "dataset", "donor", "cell"), default="auto")
    corpus.add_argument("--split-column", metavar="COLUMN", help="obs column that says train, validation or test")
    corpus.add_argument("--test-fraction", type=float, help="share of the cells; default 0.05, for --demo 0.2")
    corpus.add_argument("--validation-fraction", type=float, help="share of the cells; default 0.05, for --demo 0.1")
    corpus.add_argument("--seed", type=int, default=0)
    corpus.add_argument("--cells-per-shard", type=int, default=CELLS_PER_SHARD)
    corpus.add_argument("--cells-per-partition", type=int, default=CELLS_PER_PARTITION)

    machine = parser.add_argument_group("machine")
    machine.add_argument("--workers", type=int, help="processes; default: as many as cores, one for a small corpus")
    machine.add_argument("--cluster", metavar="ADDRESS", help="scheduler of a Dask cluster to build on")
    return parser


def main(args: argparse.Namespace) -> Manifest:
    """Run the command."""
    specs = list_sources(args)
    default = (0.2, 0.1) if args.demo else (0.05, 0.05)
    fractions = {
        "test": default[0] if args.test_fraction is None else args.test_fraction,
        "validation": default[1] if args.validation_fraction is None else args.validation_fraction,
    }
    return prepare(
        args.output,
        specs,
        vocabulary=args.vocabulary,
        excluded_datasets=args.exclude_dataset,
        min_genes=args.min_genes,
        fractions=fractions,
        split_by=args.split_by,
        split_column=args.split_column,
        seed=args.seed,
        cells_per_shard=args.cells_per_shard,
        cells_per_partition=args.cells_per_partition,
        workers=args.workers,
        cluster=args.cluster,
        command=_command(args),
    )


def list_sources(args: argparse.Namespace) -> list[SourceSpec]:
    """The sources that the arguments name, in a fixed order."""
    if bool(args.sources) + bool(args.demo) + bool(args.census) != 1:
        raise ValueError("Name the sources: files or folders, or `--demo`, or `--census`, and one kind at a time.")
    columns, constants = (_pairs(getattr(args, name), name) for name in ("column", "constant"))
    for name in [*columns, *constants]:
        if name not in OBS_COLUMNS:
            raise ValueError(f"{name!r} is no column of a corpus; it has {', '.join(OBS_COLUMNS)}.")
    if args.demo:
        demo = DEMOS[args.demo]
        package = importlib.util.find_spec(demo["package"])
        if package is None:
            raise ImportError(f"The data of --demo {args.demo} come with {demo['package']}. Install `scmmgpt[train]`.")
        path = str(Path(package.submodule_search_locations[0]) / demo["path"])
        names = {key: demo[key] for key in ("name", "licence")}
        return [SourceSpec("file", path=path, columns=demo["columns"], constants=demo["constants"], **names)]
    licences = dict(part.split("=", 1) if "=" in part else ("", part) for part in args.licence)
    if args.census:
        value_filter = None if args.all_data else "is_primary_data == True"
        if args.filter:
            value_filter = f"({args.filter}) and {value_filter}" if value_filter else args.filter
        name = f"census-{Path(args.census).name}"
        options = {"organism": args.organism, "value_filter": value_filter}
        constants = {"organism": args.organism.replace("_", " ").capitalize()} | constants
        return [SourceSpec("census", name, args.census, columns, constants, licences.get(""), options)]
    options = {"layer": args.layer, "assume": args.assume, "gene_column": args.gene_column}
    specs = []
    for path in _expand(args.sources):
        name = Path(path).name.removesuffix(".gz").removesuffix(Path(path).suffix) or Path(path).name
        specs.append(SourceSpec("file", name, path, columns, constants, licences.get(name, licences.get("")), options))
    names = [spec.name for spec in specs]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"Several sources are called {repeated}; the name tells datasets apart, so give the files different names."
        )
    return specs


def _expand(paths: list[str]) -> list[str]:
    files = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"There is no source {path}.")
        if path.is_dir() and not _is_source(path):
            found = sorted(p for p in path.rglob("*") if _is_source(p))
            if not found:
                raise FileNotFoundError(f"The folder {path} holds no file of cells, such as .h5ad.")
            files += found
        else:
            files.append(path)
    return [str(path) for path in dict.fromkeys(files)]


def _is_source(path: Path) -> bool:
    if path.is_dir():
        return path.suffix == ".zarr" or any(path.glob("matrix.mtx*"))
    return path.suffix in SOURCE_SUFFIXES and not any(parent.suffix == ".zarr" for parent in path.parents)


def _pairs(items: list[str], option: str) -> dict[str, str]:
    for item in items:
        if "=" not in item:
            raise ValueError(f"--{option} {item!r} must have the form NAME=VALUE.")
    return dict(item.split("=", 1) for item in items)


def _command(args: argparse.Namespace) -> str:
    """The command line that gives these arguments, defaults left out."""
    parser, words = make_parser(), []
    for name, value in vars(args).items():
        if name == "sources" or value == parser.get_default(name) or name not in parser.parse_args(["--output", ""]):
            continue
        option = "--" + name.replace("_", "-")
        for item in value if isinstance(value, list) else [value]:
            words += [option] if item is True else [option, str(item)]
    return shlex.join(["python", "-m", "scmmgpt.train", "prepare", *args.sources, *words])


# ---------------------------------------------------------------------------------------------------------------------
# The build
# ---------------------------------------------------------------------------------------------------------------------


def prepare(
    output: str | os.PathLike,
    sources: list[SourceSpec],
    *,
    vocabulary: str | os.PathLike | None = None,
    excluded_datasets: list[str] = (),
    min_genes: int = 1,
    fractions: dict[str, float] | None = None,
    split_by: str = "auto",
    split_column: str | None = None,
    seed: int = 0,
    cells_per_shard: int = CELLS_PER_SHARD,
    cells_per_partition: int = CELLS_PER_PARTITION,
    workers: int | None = None,
    cluster: str | None = None,
    command: str | None = None,
) -> Manifest:
    """Build a corpus, or finish one whose build was interrupted.

    Args:
        output: Folder of the corpus.
        sources: Where the cells come from.
        vocabulary: Path of a model's `vocab.json`; by default every approved symbol that a source measures.
        excluded_datasets: Dataset ids to leave out and to record, such as those of evaluation sets.
        min_genes: Cells that express fewer genes of the vocabulary are left out.
        fractions: Share of the cells for `"test"` and `"validation"`, 0.05 each by default.
        split_by: Unit that no two splits share; see `splits.split_units`.
        split_column: Obs column that holds the split of every cell, instead.
        seed: Seed of the order of the cells and of the splits.
        cells_per_shard: Mean number of cells of a shard.
        cells_per_partition: Most cells that a worker holds at once.
        workers: Processes; by default one per core, or none for a small corpus.
        cluster: Address of a Dask scheduler whose workers see the same folders, instead.
        command: For the manifest.

    Returns:
        The manifest of the finished corpus.
    """
    output = Path(output)
    fractions = fractions or {"test": 0.05, "validation": 0.05}
    if min(fractions.values()) < 0 or sum(fractions.values()) >= 1:
        raise ValueError(f"The fractions {fractions} must not be negative, and leave cells to train on.")
    given = json.loads(Path(vocabulary).read_text(encoding="utf-8")) if vocabulary else None
    request = {
        "schema_version": SCHEMA_VERSION,
        "sources": [dataclasses.asdict(spec) | fingerprint(spec) for spec in sources],
        "vocabulary": hash_vocabulary(given) if given else None,
        "excluded_datasets": sorted(excluded_datasets),
        "min_genes": min_genes,
        "fractions": fractions,
        "split_by": split_by,
        "split_column": split_column,
        "seed": seed,
        "cells_per_shard": cells_per_shard,
    }
    # The size of a partition is not part of the request: it decides memory, not bytes.
    build = _Build(output, sources, request, command, cells_per_partition)
    try:
        with _lock(output):
            return build.run(given, workers=workers, cluster=cluster)
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        free = shutil.disk_usage(output).free
        raise OSError(
            error.errno,
            f"{error.strerror} while writing to {output}, where {free:,} bytes are free. What is finished is kept: "
            "make room and give the same command again, and it goes on from there",
            error.filename,
        ) from error


@contextlib.contextmanager
def _lock(output: Path):
    """Hold the folder for this builder; the system lets go of it when the process ends, however it ends."""
    import fcntl

    output.mkdir(parents=True, exist_ok=True)
    with open(output / ".lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"Another builder is at work on {output} ({file.read().strip() or 'unknown'}). Wait for it, or stop "
                "it and give this command again to go on where it stopped."
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


class _Build:
    """One build: the steps of `prepare`, each of which leaves alone what is done."""

    def __init__(
        self, output: Path, sources: list[SourceSpec], request: dict, command: str | None, cells_per_partition: int
    ):
        self.output, self.sources, self.command = output, sources, command
        self.cells_per_partition = cells_per_partition
        # As JSON gives it back, so that requests can be compared.
        self.request = json.loads(json.dumps(request))
        self.scratch = output / ".build"
        self.parts = self.scratch / f"parts-{cells_per_partition}"

    def run(self, vocabulary: dict | None, *, workers: int | None, cluster: str | None) -> Manifest:
        if (manifest := self._claim()) is not None:
            logger.info("%s is complete: %d cells.", self.output, manifest.n_cells)
            return self._close(manifest)
        if vocabulary is not None and not (self.scratch / "vocab.json").exists():
            self._write_vocabulary(vocabulary)
        specs = [self._listed(i, spec) for i, spec in enumerate(self.sources)]
        with _executor(workers, cluster, specs) as run:
            tasks = [
                {"scratch": str(self.scratch), "index": i, "spec": spec, "given": vocabulary is not None}
                for i, spec in enumerate(specs)
            ]
            scans = run(scan_source, tasks, "sources scanned")
            if vocabulary is None and not (self.scratch / "vocab.json").exists():
                self._write_vocabulary(_union_vocabulary(scans))
            splits = self._splits(specs, scans)
            tasks = self._partitions(specs, scans)
            parts = run(map_partition, tasks, "partitions read")
            shards = self._shards(parts)
            merged = run(merge_shard, shards, "shards written")
        manifest = self._finish(specs, scans, splits, parts, merged)
        logger.info("%s: %d cells in %d shards.", self.output, manifest.n_cells, len(manifest.shards))
        return self._close(manifest)

    def _close(self, manifest: Manifest) -> Manifest:
        """Write the card and clear the scratch files of a finished corpus."""
        with whole_file(self.output / "README.md") as temporary:
            temporary.write_text(dataset_card(self.output.name, manifest), encoding="utf-8")
        shutil.rmtree(self.scratch, ignore_errors=True)
        return manifest

    def _claim(self) -> Manifest | None:
        """Check that the folder is new or of this very build; return the manifest if nothing is left to do."""
        found, path = None, self.scratch / "request.json"
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
        elif (self.output / "manifest.json").exists():
            manifest = Manifest.read(self.output / "manifest.json")
            found = manifest.notes.get("request")
        elif any(self.output.glob("data/*.parquet")):
            raise ValueError(f"{self.output / 'data'} holds shards of an unknown build. Choose another folder.")
        if found is not None and found != self.request:
            changed = sorted(key for key in self.request if found.get(key) != self.request[key])
            raise ValueError(
                f"{self.output} holds a corpus of other sources or options ({', '.join(changed)} differ). Choose "
                "another folder, or remove this one to build it anew."
            )
        if (self.output / "manifest.json").exists():
            manifest = Manifest.read(self.output / "manifest.json")
            missing = []
            for shard in manifest.shards:
                file = self.output / shard.path
                if not file.exists():
                    missing.append(shard.path)
                elif file.stat().st_size != shard.n_bytes or hash_file(file) != shard.sha256:
                    raise ValueError(
                        f"Shard {file} is damaged: it is not what the manifest says ({file.stat().st_size} of "
                        f"{shard.n_bytes} bytes). Delete it and give the same command again to build it anew."
                    )
            if not missing:
                return manifest
            logger.warning("Building %d missing shards of %s again: %s", len(missing), self.output, missing[:5])
        for pattern in (".*.tmp*", "data/.*.tmp*", ".build/.*.tmp*", ".build/*/.*.tmp*"):
            for leftover in self.output.glob(pattern):
                shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)
        for folder in (self.scratch / "scan", self.parts, self.scratch / "shards"):
            folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_json(path, self.request)
        return None

    def _listed(self, index: int, spec: SourceSpec) -> SourceSpec:
        """List the cells of a Census slice once; files need no list."""
        if spec.kind == "file":
            return spec
        path = self.scratch / f"joinids-{index}.npy"
        if not path.exists():
            joinids = find_joinids(spec.path, spec.options["organism"], spec.options["value_filter"])
            with whole_file(path) as temporary, open(temporary, "wb") as file:
                np.save(file, joinids)
        return dataclasses.replace(spec, options={**spec.options, "joinids": str(path)})

    def _write_vocabulary(self, vocabulary: dict[str, int]) -> None:
        if len(vocabulary) > MAX_VOCABULARY_SIZE:
            raise ValueError(
                f"The sources measure {len(vocabulary)} genes, more than the {MAX_VOCABULARY_SIZE} that a corpus can "
                "number. Choose the genes with `--vocabulary vocab.json`."
            )
        write_json(self.scratch / "gene_aliases.json", build_gene_aliases(vocabulary))
        write_json(self.scratch / "vocab.json", vocabulary)

    def _splits(self, specs: list[SourceSpec], scans: list[dict]) -> dict:
        """Decide the splits, once."""
        path, request = self.scratch / "splits.json", self.request
        if not path.exists():
            excluded = set(request["excluded_datasets"])
            units = [unit for scan in scans for unit in scan["units"] if unit[0] not in excluded]
            if not units:
                raise ValueError(f"All {len(excluded)} datasets of the sources are excluded: no cell is left.")
            if request["split_column"]:
                content = {"by": "column", "why": f"as obs[{request['split_column']!r}] says"}
            elif not any(request["fractions"].values()):
                every = sorted({(dataset,) for dataset, _, _ in units})
                content = {"by": "dataset", "why": "all cells train", "units": {"train": every}}
            else:
                by, seed = request["split_by"], request["seed"]
                content = split_units(units, request["fractions"], by=by, seed=seed)
            if content["by"] == "cell":
                frames = [resolve_labels(open_source(spec).obs())[0] for spec in specs]
                obs = pd.concat([frame[~frame["dataset_id"].isin(excluded)] for frame in frames])
                content["cutoffs"] = split_cells(
                    cell_ids(obs), obs["cell_type"], request["fractions"], seed=request["seed"]
                )
            write_json(path, content)
        return json.loads(path.read_text(encoding="utf-8"))

    def _partitions(self, specs: list[SourceSpec], scans: list[dict]) -> list[dict]:
        tasks, size = [], self.cells_per_partition
        options = {key: self.request[key] for key in ("excluded_datasets", "min_genes", "split_column", "seed")}
        for spec, scan in zip(specs, scans, strict=True):
            for start in range(0, scan["n_cells"], size):
                stop = min(start + size, scan["n_cells"])
                task = {"scratch": str(self.scratch), "folder": str(self.parts / f"{len(tasks):06d}"), "spec": spec}
                tasks.append(task | {"start": start, "stop": stop} | options)
        return tasks

    def _shards(self, parts: list[dict]) -> list[dict]:
        """Number the shards of each split: those of 16-bit counts first, then those of other values."""
        tasks = []
        for split in SPLITS:
            ranges = []
            for kind in ("uint16", "float32"):
                n_cells = sum(stop - start for part in parts for start, stop in [part["rows"][kind][split]])
                n_shards = -(-n_cells // self.request["cells_per_shard"])
                ranges += [(kind, i, n_shards) for i in range(n_shards)]
            for index, (kind, slice_index, n_slices) in enumerate(ranges):
                task = {"scratch": str(self.scratch), "output": str(self.output)}
                task |= {"parts": str(self.parts), "n_parts": len(parts)}
                task |= {"split": split, "index": index, "n_shards": len(ranges)}
                tasks.append(task | {"kind": kind, "slice": (slice_index, n_slices)})
        if not tasks:
            genes = self.request["min_genes"]
            raise ValueError(f"No cell of the {len(self.sources)} sources expresses {genes} genes of the vocabulary.")
        return tasks

    def _finish(self, specs, scans, splits, parts, merged) -> Manifest:
        writer = _writer(self.scratch, self.output)
        _write_gene_table(self.output / "genes.parquet", writer.vocabulary, self.parts, len(parts))
        dropped = {reason: sum(part["dropped"][reason] for part in parts) for reason in DROP_REASONS}
        dropped["duplicates"] = sum(shard["duplicates"] for shard in merged)
        sources, start = [], 0
        for spec, scan in zip(specs, scans, strict=True):
            n_parts = -(-scan["n_cells"] // self.cells_per_partition)
            own, start = parts[start : start + n_parts], start + n_parts
            kept = sum(part["n_kept"] for part in own)
            named = {"name": spec.name, "kind": spec.kind, "path": spec.path}
            sources.append(named | scan["record"] | {"n_kept": kept})
        notes = {
            "split": splits["why"],
            "request": self.request,
            "ontologies": f"CELLxGENE schema {ontology.ontology_version()}",
            "renamed_cells": sum(shard["renamed"] for shard in merged),
        }
        manifest = writer.finish(
            splits=splits,
            split_by=splits["by"],
            sources=sources,
            excluded_datasets=self.request["excluded_datasets"],
            dropped={"cells": dropped, "genes": {s["name"]: s["genes"] for s in sources}},
            command=self.command,
            notes=notes,
        )
        return manifest


# ---------------------------------------------------------------------------------------------------------------------
# The three steps. Each task is plain data and runs in any process that sees the folders.
# ---------------------------------------------------------------------------------------------------------------------


def scan_source(task: dict) -> dict:
    """Step 1: read what a source has, but not its counts."""
    path = Path(task["scratch"]) / "scan" / f"{task['index']:05d}.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    spec = task["spec"]
    source = open_source(spec)
    gene_index = _gene_index(task["scratch"]) if task["given"] else reference_gene_index()
    with _naming(spec):
        plan = source.plan(gene_index)
    symbols = {i: symbol for symbol, i in gene_index.vocabulary.items()}
    units, labels = {}, {}
    for start in range(0, source.n_cells, CELLS_PER_SCAN):
        obs, report = resolve_labels(source.obs(start, start + CELLS_PER_SCAN))
        for unit, n_cells in obs.groupby(["dataset_id", obs["donor_id"].fillna("")], sort=False).size().items():
            units[unit] = units.get(unit, 0) + n_cells
        for column, found in report.items():
            for key, counts in found.items():
                kept = labels.setdefault(column, {}).setdefault(key, {})
                for name, value in counts.items():
                    kept[name] = value if key == "renamed" else kept.get(name, 0) + value
    datasets = {}
    for (dataset, _), n_cells in units.items():
        datasets[dataset] = datasets.get(dataset, 0) + n_cells
    genes = plan.match.report
    record = {
        **source.provenance(),
        "n_cells": source.n_cells,
        "datasets": datasets,
        "n_donors": sum(donor != "" for _, donor in units),
        "values": {key: plan.report["matrix"][key] for key in ("chosen", "kind", "conversion")},
        "genes": {
            "measured": genes["genes"],
            "matched": genes["matched"],
            "unmatched": genes["genes"] - genes["matched"],
            "share_expression_matched": genes.get("share_expression_matched"),
            "largest_unmatched": genes["largest_unmatched"],
        },
        "labels": labels,
        "warnings": plan.report["warnings"],
    }
    if spec.kind == "census":
        record["citations"] = source.citations(datasets)
    scan = {
        "n_cells": source.n_cells,
        "units": [[dataset, donor or None, int(n_cells)] for (dataset, donor), n_cells in units.items()],
        "symbols": sorted({symbols[i] for i in plan.match.ids[plan.match.ids >= 0].tolist()}),
        "record": record,
    }
    write_json(path, scan)
    return json.loads(path.read_text(encoding="utf-8"))


def map_partition(task: dict) -> dict:
    """Step 2: turn a range of cells of one source into scratch files sorted by split and random key."""
    folder = Path(task["folder"])
    if folder.exists():
        return json.loads((folder / "part.json").read_text(encoding="utf-8"))
    spec = task["spec"]
    source, plan = _planned_source(spec.to_json(), task["scratch"])
    raw = source.obs(task["start"], task["stop"])
    obs, _ = resolve_labels(raw)
    with _naming(spec):
        starts = range(task["start"], task["stop"], CELLS_TAKEN)
        read = (source.cells(start, min(start + CELLS_TAKEN, task["stop"]), plan) for start in starts)
        parts = [cells.sorted_by_gene() for cells in read]
    cells = Cells.concatenate(parts)
    del parts
    cells.cell_ids = cell_ids(obs)

    # step 1: leave out what is not wanted
    excluded = obs["dataset_id"].isin(task["excluded_datasets"]).to_numpy()
    poor = ~excluded & (np.diff(cells.indptr) < max(task["min_genes"], 1))
    kept = np.flatnonzero(~excluded & ~poor)
    if len(kept) < len(cells):
        cells, obs = _take(cells, kept), obs.iloc[kept]

    # step 2: sort by type of counts, split and key
    splits = json.loads((Path(task["scratch"]) / "splits.json").read_text(encoding="utf-8"))
    column = task["split_column"] and source.column(task["split_column"], task["start"], task["stop"])[kept]
    split = assign_splits(obs, cells.cell_ids, splits, column)
    keys = cell_keys(cells.cell_ids, seed=task["seed"], epoch=0, stream=RandomStream.ORDER)
    wide = _needs_float(cells)
    order = np.lexsort((keys, split, wide))
    cells, obs, keys, split, wide = _take(cells, order), obs.iloc[order], keys[order], split[order], wide[order]

    # step 3: write them, and the sums from which the mean expression follows
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir()
    rows = {}
    for kind, stop in (("uint16", int((~wide).sum())), ("float32", len(cells))):
        start = 0 if kind == "uint16" else int((~wide).sum())
        edges = np.searchsorted(split[start:stop], np.arange(len(SPLITS) + 1)).tolist()
        rows[kind] = {name: edges[i : i + 2] for i, name in enumerate(SPLITS)}
        if stop > start:
            table = _scratch_table(cells[start:stop], obs.iloc[start:stop], keys[start:stop], kind)
            with open(temporary / f"{kind}.arrow", "wb") as file:
                with pa.ipc.new_file(file, table.schema) as writer:
                    writer.write_table(table)
                _flush(file)
    with open(temporary / "genes.npz", "wb") as file:
        np.savez(file, **_gene_sums(cells, split == SPLITS.index("train"), Path(task["scratch"])))
        _flush(file)
    dropped = {"excluded_dataset": int(excluded.sum()), "too_few_genes": int(poor.sum())}
    write_json(temporary / "part.json", {"rows": rows, "dropped": dropped, "n_kept": len(cells)})
    try:
        os.rename(temporary, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        shutil.rmtree(temporary)  # another worker was first, with the same content
    return json.loads((folder / "part.json").read_text(encoding="utf-8"))


def merge_shard(task: dict) -> dict:
    """Step 3: merge one range of keys of all scratch files into a shard."""
    scratch = Path(task["scratch"])
    writer = _writer(scratch, Path(task["output"]))
    shard = writer.shard_path(task["split"], task["index"], task["n_shards"])
    path = scratch / "shards" / f"{shard.stem}.json"
    if shard.exists() and path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    number, n_slices = task["slice"]
    tables = []
    for part in range(task["n_parts"]):
        folder = Path(task["parts"]) / f"{part:06d}"
        start, stop = json.loads((folder / "part.json").read_text(encoding="utf-8"))["rows"][task["kind"]][
            task["split"]
        ]
        if stop > start:
            table = pa.ipc.open_file(pa.memory_map(str(folder / f"{task['kind']}.arrow"))).read_all()
            keys = table["key"].to_numpy()[start:stop]
            first, last = np.searchsorted(keys, [_key_bound(number, n_slices), _key_bound(number + 1, n_slices)])
            last = stop - start if number + 1 == n_slices else last
            tables.append(table.slice(start + int(first), int(last - first)))
    table = pa.concat_tables(tables).unify_dictionaries()
    # Cells of one identity stay in the order of the partitions.
    order = np.argsort(table["key"].to_numpy(), kind="stable")
    cells = _take(table_to_cells(table), order)
    kept, renamed = _tell_apart(cells)
    obs = table.select(OBS_COLUMNS).combine_chunks().take(order[kept])
    del table, tables
    stats = {"duplicates": len(cells) - len(kept), "renamed": renamed}
    if len(kept) < len(cells):
        cells = _take(cells, kept)
    write_json(path, stats)
    writer.write_shard(task["split"], task["index"], task["n_shards"], cells, obs)
    return stats


def _take(cells: Cells, rows: np.ndarray) -> Cells:
    """`cells[rows]`, some at a time: the positions of all values at once would take several times their memory."""
    indptr = np.concatenate([[0], np.cumsum(np.diff(cells.indptr)[rows])])
    gene_ids = np.empty(indptr[-1], cells.gene_ids.dtype)
    counts = np.empty(indptr[-1], cells.counts.dtype)
    for start in range(0, len(rows), CELLS_TAKEN):
        part = cells[rows[start : start + CELLS_TAKEN]]
        span = slice(indptr[start], indptr[start + len(part)])
        gene_ids[span], counts[span] = part.gene_ids, part.counts
    return Cells(indptr, gene_ids, counts, cells.cell_ids[rows], cells.library_sizes()[rows])


def _gene_sums(cells: Cells, train: np.ndarray, scratch: Path) -> dict:
    """Sum over training cells of each gene's share of the counts, and number of cells that express it.

    Shares are summed as whole multiples of 1 / `SHARE_UNITS`: sums of floats would depend on the partitions.
    """
    size = max(json.loads((scratch / "vocab.json").read_text(encoding="utf-8")).values()) + 1
    share, n_cells = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
    totals = cells.library_sizes().astype(np.float64)
    for start in range(0, len(cells), CELLS_TAKEN):
        part = cells[start : start + CELLS_TAKEN]
        weights = np.repeat(
            train[start : start + CELLS_TAKEN] / totals[start : start + CELLS_TAKEN], np.diff(part.indptr)
        )
        units = np.rint(part.counts * weights * SHARE_UNITS)
        share += np.bincount(part.gene_ids, weights=units, minlength=size).astype(np.int64)
        n_cells += np.bincount(part.gene_ids[weights > 0], minlength=size)
    return {"share": share, "n_cells": n_cells, "n_train": int(train.sum())}


def _tell_apart(cells: Cells) -> tuple[np.ndarray, int]:
    """Among neighbours of one identity, drop exact copies and rename the rest, in place.

    Returns:
        Positions of the cells to keep, and the number of renamed ones.
    """
    ids = cells.cell_ids.copy()
    kept, renamed = np.ones(len(cells), dtype=bool), 0
    for i in np.flatnonzero(ids[1:] == ids[:-1]) + 1:
        first = i
        while first > 0 and ids[first - 1] == ids[i]:
            first -= 1
        twins = [j for j in range(first, i) if kept[j]]
        mine = slice(cells.indptr[i], cells.indptr[i + 1])
        for j in twins:
            other = slice(cells.indptr[j], cells.indptr[j + 1])
            if np.array_equal(cells.gene_ids[mine], cells.gene_ids[other]) and np.array_equal(
                cells.counts[mine], cells.counts[other]
            ):
                kept[i] = False
                break
        else:
            renamed += 1
            cells.cell_ids[i] = cell_keys(ids[i : i + 1], seed=len(twins), epoch=0, stream=RandomStream.DUPLICATE)[0]
    return np.flatnonzero(kept), renamed


def _key_bound(number: int, n_slices: int) -> np.uint64:
    return np.uint64(min(number * 2**64 // n_slices, 2**64 - 1))


def _needs_float(cells: Cells) -> np.ndarray:
    """Which cells hold a count that is no 16-bit integer, bool `(n_cells,)`. No cell may be empty."""
    counts = cells.counts
    fits = (counts == np.rint(counts)) & (counts <= np.iinfo(np.uint16).max)
    return ~np.logical_and.reduceat(fits, cells.indptr[:-1]) if len(cells) else np.zeros(0, dtype=bool)


def _scratch_table(cells: Cells, obs: pd.DataFrame, keys: np.ndarray, kind: str) -> pa.Table:
    offsets = pa.array(cells.indptr.astype(np.int32))
    columns = {
        "key": pa.array(keys),
        "cell_id": pa.array(cells.cell_ids),
        "gene_ids": pa.ListArray.from_arrays(offsets, pa.array(cells.gene_ids.astype(np.uint16))),
        "counts": pa.ListArray.from_arrays(offsets, pa.array(cells.counts.astype(kind))),
        "total_counts": pa.array(cells.library_sizes()),
    }
    for name in OBS_COLUMNS:
        values = pa.array(obs[name].to_numpy(dtype=object), pa.string(), from_pandas=True)
        columns[name] = values if name == "barcode" else values.dictionary_encode()
    return pa.table(columns)


# ---------------------------------------------------------------------------------------------------------------------
# Helpers of the steps
# ---------------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def _gene_index(scratch: str) -> GeneIndex:
    folder = Path(scratch)
    return GeneIndex(
        json.loads((folder / "vocab.json").read_text(encoding="utf-8")),
        json.loads((folder / "gene_aliases.json").read_text(encoding="utf-8")),
    )


@functools.lru_cache(maxsize=4)
def _planned_source(spec_json: str, scratch: str):
    spec = SourceSpec(**json.loads(spec_json))
    source = open_source(spec)
    with _naming(spec):
        return source, source.plan(_gene_index(scratch))


def _union_vocabulary(scans: list[dict]) -> dict[str, int]:
    symbols = sorted(set().union(*(scan["symbols"] for scan in scans)))
    return {name: i for i, name in enumerate([*SPECIAL_TOKENS, *symbols])}


def _writer(scratch: Path, output: Path) -> CorpusWriter:
    return CorpusWriter(
        output,
        json.loads((scratch / "vocab.json").read_text(encoding="utf-8")),
        gene_aliases=json.loads((scratch / "gene_aliases.json").read_text(encoding="utf-8")),
    )


def _write_gene_table(path: Path, vocabulary: dict[str, int], parts: Path, n_parts: int) -> None:
    """Write what an average training cell expresses; `captions.read_gene_means` reads it."""
    size = max(vocabulary.values()) + 1
    share, n_cells, n_train = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64), 0
    for part in range(n_parts):
        with np.load(parts / f"{part:06d}" / "genes.npz") as sums:
            share += sums["share"]
            n_cells += sums["n_cells"]
            n_train += int(sums["n_train"])
    ids = np.array(list(vocabulary.values()))
    table = pa.table(
        {
            "symbol": list(vocabulary),
            "gene_id": pa.array(ids.astype(np.uint16)),
            "n_cells": n_cells[ids],
            "mean_share": share[ids] / SHARE_UNITS / max(n_train, 1),
        }
    )
    with whole_file(path) as temporary:
        pq.write_table(table, temporary)


def _flush(file) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def _naming(spec: SourceSpec):
    """Say which source an error is about."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise type(error)(f"{spec.path}: {error}") from error


@contextlib.contextmanager
def _executor(workers: int | None, cluster: str | None, specs: list[SourceSpec]):
    """Yield `run(function, tasks, what) -> results`, which runs tasks in this process, in several, or on a cluster."""
    with contextlib.ExitStack() as stack:
        executor = None
        if cluster is not None:
            try:
                from distributed import Client
            except ImportError as error:
                raise ImportError("`--cluster` needs Dask. Install `scmmgpt[cluster]`.") from error
            executor = stack.enter_context(stack.enter_context(Client(cluster)).get_executor())
        else:
            if workers is None:
                small = all(spec.kind == "file" for spec in specs)
                small = small and sum(fingerprint(spec)["bytes"] for spec in specs) <= SMALL_SOURCES_BYTES
                workers = 1 if small else os.cpu_count()
            if workers > 1:
                method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
                context = multiprocessing.get_context(method)
                executor = ProcessPoolExecutor(workers, context, initializer=_end_with_parent)
                stack.callback(executor.shutdown, cancel_futures=True)

        def run(function, tasks, what):
            if executor is None:
                return [function(task) for task in tasks]
            futures = {executor.submit(function, task): i for i, task in enumerate(tasks)}
            results = [None] * len(tasks)
            for n, future in enumerate(as_completed(futures), 1):
                try:
                    results[futures[future]] = future.result()
                except BrokenExecutor as error:
                    raise ValueError(
                        "The system ended a worker process, most likely for want of memory. Give the command again "
                        "with fewer `--workers` or a smaller `--cells-per-partition`; what is finished is kept."
                    ) from error
                logger.info("%d of %d %s", n, len(tasks), what)
            return results

        yield run


def _end_with_parent() -> None:
    """End this worker process when its builder is gone, killed or not: nobody would collect its work."""

    def watch(parent):
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, args=(multiprocessing.parent_process(),), daemon=True).start()


# ---------------------------------------------------------------------------------------------------------------------
# The dataset card
# ---------------------------------------------------------------------------------------------------------------------


def dataset_card(name: str, manifest: Manifest) -> str:
    """The corpus's README: how to load it, its schema, splits, sources and licences."""
    template = Path(__file__).parent / "templates" / "dataset_card.md"
    found = {split: [shard for shard in manifest.shards if shard.split == split] for split in SPLITS}
    found = {split: shards for split, shards in found.items() if shards}
    licences = sorted({source["licence"] for source in manifest.sources})
    data_files = "".join(f"  - split: {split}\n    path: data/{split}-*.parquet\n" for split in found)
    rows = "".join(
        f"| {split} | {sum(s.n_cells for s in shards):,} | {len(shards)} | {sum(s.n_bytes for s in shards):,} |\n"
        for split, shards in found.items()
    )
    sources = "".join(
        f"| {s['name']} | {s['n_kept']:,} | {s['genes']['matched']:,} of {s['genes']['measured']:,} "
        f"| {s['values']['kind']} | {s['licence']} |\n"
        for s in manifest.sources
    )
    excluded = manifest.excluded_datasets
    size = len(str(max(manifest.n_cells, 1))) - 1  # the power of ten below
    edges = ["1", "10", "100", "1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B"]
    dropped = [f"{n:,} cells ({reason.replace('_', ' ')})" for reason, n in manifest.dropped["cells"].items() if n]
    return string.Template(template.read_text(encoding="utf-8")).substitute(
        name=name,
        licence=licences[0] if len(licences) == 1 and licences != ["unknown"] else "other",
        size_category="n<1K" if size < 3 else f"{edges[size]}<n<{edges[size + 1]}",
        data_files=data_files.rstrip("\n"),
        n_cells=f"{manifest.n_cells:,}",
        n_sources=f"{len(manifest.sources)} source{'s' if len(manifest.sources) > 1 else ''}",
        n_genes=f"{manifest.vocabulary_size - len(SPECIAL_TOKENS):,}",
        schema_version=manifest.schema_version,
        splits=rows.rstrip("\n"),
        split_unit=manifest.split_by,
        split_why=manifest.notes["split"],
        excluded=f"Left out on purpose, for evaluation: {', '.join(excluded)}." if excluded else "",
        sources=sources.rstrip("\n"),
        dropped=", ".join(dropped) or "nothing",
        command=manifest.command,
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(make_parser().parse_args())
