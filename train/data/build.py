"""Building a corpus: an external sort by a random key, so that the cells of all sources lie mixed in every shard.

1. Scan: read every source's annotations, genes and kind of values. The gene vocabulary and the splits follow.
2. Map: turn every partition (a range of cells of one source) into scratch files sorted by split and key.
3. Merge: write every shard (a range of keys of one split) from its slices of all scratch files.

`CorpusBuilder` lists the tasks, `build_steps` holds the three steps, and `workers` runs tasks in processes. Every step
writes whole files, and is skipped if its files are there. A build that was killed, or ran out of disk, goes on where
it stopped, and ends with the same bytes, whatever the number of workers.
"""

import contextlib
import dataclasses
import errno
import json
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from scmmgpt.files import read_json, whole_file, write_json
from scmmgpt.train.data import ontology
from scmmgpt.train.data.build_steps import (
    COUNT_KINDS,
    SHARE_UNITS,
    PartitionTask,
    ScanTask,
    ShardTask,
    map_partition,
    merge_shard,
    open_writer,
    scan_source,
)
from scmmgpt.train.data.corpus import (
    MAX_VOCABULARY_SIZE,
    SCHEMA_VERSION,
    SPECIAL_TOKENS,
    SPLITS,
    Manifest,
    check_shard,
    hash_vocabulary,
)
from scmmgpt.train.data.dataset_card import dataset_card
from scmmgpt.train.data.gene_tables import build_gene_aliases
from scmmgpt.train.data.sources import SourceSpec, cell_ids, find_joinids, fingerprint, open_source, resolve_labels
from scmmgpt.train.data.splits import split_cells, split_units
from scmmgpt.train.data.workers import start_workers


Results = list[dict[str, Any]]  # of one step, by task

logger = logging.getLogger(__name__)

SMALL_SOURCES_BYTES = 2**28  # built faster than worker processes start
DROP_REASONS = ("excluded_dataset", "too_few_genes")
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CorpusBuilder:
    """Builds a corpus, or finishes one whose build was interrupted.

    Args:
        output: Folder of the corpus.
        sources: Where the cells come from.
        vocabulary: Gene symbol -> id; by default every approved symbol that a source measures.
        options: `excluded_datasets`, `min_genes`, `fractions`, `split_by`, `split_column`, `seed` and
            `cells_per_shard`. With the sources and the vocabulary they decide the bytes of the corpus.
        cells_per_partition: Most cells that a worker holds at once: decides memory, not bytes.
        command: For the manifest.
    """

    def __init__(
        self,
        output: Path,
        sources: list[SourceSpec],
        vocabulary: dict[str, int] | None,
        options: dict[str, Any],
        *,
        cells_per_partition: int,
        command: str,
    ) -> None:
        self.output, self.sources, self.vocabulary, self.command = output, sources, vocabulary, command
        self.cells_per_partition = cells_per_partition
        request = {
            "schema_version": SCHEMA_VERSION,
            "sources": [dataclasses.asdict(spec) | fingerprint(spec) for spec in sources],
            "vocabulary": hash_vocabulary(vocabulary) if vocabulary else None,
            **options,
        }
        # As JSON gives it back, so that requests can be compared.
        self.request = json.loads(json.dumps(request))
        self.scratch = output / ".build"
        self.parts = self.scratch / f"parts-{cells_per_partition}"

    def run(self, workers: int | None = None, cluster: str | None = None) -> Manifest:
        """Build what is not there yet.

        Args:
            workers: Processes; by default one per core, or one for a small corpus.
            cluster: Address of a Dask scheduler whose workers see the same folders, instead.

        Returns:
            The manifest of the finished corpus.
        """
        if workers is None:
            small = all(spec.kind == "file" for spec in self.sources)
            small = small and sum(fingerprint(spec)["bytes"] for spec in self.sources) <= SMALL_SOURCES_BYTES
            workers = 1 if small else os.cpu_count() or 1
        try:
            with lock_folder(self.output):
                manifest = self._finished_manifest()
                if manifest is None:
                    manifest = self._build(workers, cluster)
                    logger.info("%s: %d cells in %d shards.", self.output, manifest.n_cells, len(manifest.shards))
                else:
                    logger.info("%s is complete: %d cells.", self.output, manifest.n_cells)
                with whole_file(self.output / "README.md") as temporary:
                    temporary.write_text(dataset_card(self.output.name, manifest), encoding="utf-8")
                shutil.rmtree(self.scratch, ignore_errors=True)
                return manifest
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise
            free = shutil.disk_usage(self.output).free
            raise OSError(
                error.errno,
                f"{error.strerror} while writing to {self.output}, where {free:,} bytes are free. What is finished is "
                "kept: make room and give the same command again, and it goes on from there",
                error.filename,
            ) from error

    def _build(self, workers: int, cluster: str | None) -> Manifest:
        self._prepare_scratch()
        has_vocabulary = self.vocabulary is not None
        if self.vocabulary is not None:
            self._write_vocabulary(self.vocabulary)
        specs = [self._listed(i, spec) for i, spec in enumerate(self.sources)]
        with start_workers(workers, cluster) as run:
            tasks = [ScanTask(self.scratch, i, spec, has_vocabulary) for i, spec in enumerate(specs)]
            scans = run(scan_source, tasks, "sources scanned")
            if not has_vocabulary:
                symbols = sorted(set().union(*(scan["symbols"] for scan in scans)))
                self._write_vocabulary({name: i for i, name in enumerate([*SPECIAL_TOKENS, *symbols])})
            splits = self._splits(specs, scans)
            parts = run(map_partition, self._partitions(specs, scans), "partitions read")
            merged = run(merge_shard, self._shards(parts), "shards written")
        return self._finish(specs, scans, splits, parts, merged)

    def _finished_manifest(self) -> Manifest | None:
        """Check that the folder is new or of this very build; return the manifest if nothing is left to do."""
        manifest = None
        if (self.output / "manifest.json").exists():
            manifest = Manifest.read(self.output / "manifest.json")
        found = None
        if (self.scratch / "request.json").exists():
            found = read_json(self.scratch / "request.json")
        elif manifest is not None:
            found = manifest.notes.get("request")
        elif any(self.output.glob("data/[!.]*.parquet")):
            raise ValueError(f"{self.output / 'data'} holds shards of an unknown build. Choose another folder.")
        if found is not None and found != self.request:
            changed = sorted(key for key in self.request if found.get(key) != self.request[key])
            raise ValueError(
                f"{self.output} holds a corpus of other sources or options ({', '.join(changed)} differ). Choose "
                "another folder, or remove this one to build it anew."
            )
        missing = []
        for shard in manifest.shards if manifest else []:
            if (self.output / shard.path).exists():
                check_shard(self.output, shard, checksum=True)
            else:
                missing.append(shard.path)
        if missing:
            logger.warning("Building %d missing shards of %s again: %s", len(missing), self.output, missing[:5])
            return None
        return manifest

    def _prepare_scratch(self) -> None:
        """Make the scratch folders, and remove what a killed builder left half-written."""
        for pattern in (".*.tmp*", "data/.*.tmp*", ".build/.*.tmp*", ".build/*/.*.tmp*"):
            for leftover in self.output.glob(pattern):
                shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)
        for folder in (self.scratch / "scan", self.parts, self.scratch / "shards"):
            folder.mkdir(parents=True, exist_ok=True)
        if not (self.scratch / "request.json").exists():
            write_json(self.scratch / "request.json", self.request)

    def _listed(self, index: int, spec: SourceSpec) -> SourceSpec:
        """List the cells of a Census slice once; files need no list."""
        if spec.kind == "file":
            return spec
        path = self.scratch / f"joinids-{index}.npy"
        if not path.exists():
            joinids = find_joinids(spec.path, spec.options["organism"], spec.options["value_filter"])
            with whole_file(path) as temporary:
                np.save(temporary, joinids)
        return dataclasses.replace(spec, options={**spec.options, "joinids": str(path)})

    def _write_vocabulary(self, vocabulary: dict[str, int]) -> None:
        """Write the genes and their other names, once."""
        if (self.scratch / "vocab.json").exists():
            return
        if len(vocabulary) > MAX_VOCABULARY_SIZE:
            raise ValueError(
                f"The sources measure {len(vocabulary)} genes, more than the {MAX_VOCABULARY_SIZE} that a corpus can "
                "number. Choose the genes with `--vocabulary vocab.json`."
            )
        write_json(self.scratch / "gene_aliases.json", build_gene_aliases(vocabulary))
        write_json(self.scratch / "vocab.json", vocabulary)

    def _splits(self, specs: list[SourceSpec], scans: Results) -> dict[str, Any]:
        """Decide the splits, once."""
        path, request = self.scratch / "splits.json", self.request
        if path.exists():
            return read_json(path)
        excluded, seed, fractions = set(request["excluded_datasets"]), request["seed"], request["fractions"]
        units = [unit for scan in scans for unit in scan["units"] if unit[0] not in excluded]
        if not units:
            raise ValueError(f"All {len(excluded)} datasets of the sources are excluded: no cell is left.")
        content: dict[str, Any]
        if request["split_column"]:
            content = {"by": "column", "why": f"as obs[{request['split_column']!r}] says"}
        elif not any(fractions.values()):
            every = sorted({(dataset,) for dataset, _, _ in units})
            content = {"by": "dataset", "why": "all cells train", "units": {"train": every}}
        else:
            content = split_units(units, fractions, by=request["split_by"], seed=seed)
        if content["by"] == "cell":
            frames = [resolve_labels(open_source(spec).obs()) for spec in specs]
            obs = pd.concat([frame[~frame["dataset_id"].isin(excluded)] for frame in frames])
            content["cutoffs"] = split_cells(cell_ids(obs), obs["cell_type"], fractions, seed=seed)
        write_json(path, content)
        return read_json(path)

    def _partitions(self, specs: list[SourceSpec], scans: Results) -> list[PartitionTask]:
        tasks: list[PartitionTask] = []
        options = {key: self.request[key] for key in ("excluded_datasets", "min_genes", "split_column", "seed")}
        for spec, scan in zip(specs, scans, strict=True):
            for start in range(0, scan["n_cells"], self.cells_per_partition):
                stop = min(start + self.cells_per_partition, scan["n_cells"])
                folder = self.parts / f"{len(tasks):06d}"
                tasks.append(PartitionTask(self.scratch, folder, spec, start, stop, **options))
        return tasks

    def _shards(self, parts: Results) -> list[ShardTask]:
        """Number the shards of each split: those of 16-bit counts first, then those of other values."""
        tasks = []
        folders = [self.parts / f"{number:06d}" for number in range(len(parts))]
        for split in SPLITS:
            slices = []
            for kind in COUNT_KINDS:
                n_cells = sum(stop - start for part in parts for start, stop in [part["rows"][kind][split]])
                n_slices = -(-n_cells // self.request["cells_per_shard"])
                slices += [(kind, i, n_slices) for i in range(n_slices)]
            for index, of_kind in enumerate(slices):
                tasks.append(ShardTask(self.scratch, self.output, folders, split, index, len(slices), *of_kind))
        if not tasks:
            genes = self.request["min_genes"]
            raise ValueError(f"No cell of the {len(self.sources)} sources expresses {genes} genes of the vocabulary.")
        return tasks

    def _finish(
        self, specs: list[SourceSpec], scans: Results, splits: dict[str, Any], parts: Results, merged: Results
    ) -> Manifest:
        """Write genes, vocabulary, splits and manifest."""
        writer = open_writer(self.scratch, self.output)
        self._write_gene_table(writer.vocabulary, len(parts))
        dropped = {reason: sum(part["dropped"][reason] for part in parts) for reason in DROP_REASONS}
        dropped["duplicates"] = sum(shard["duplicates"] for shard in merged)
        sources, start = [], 0
        for spec, scan in zip(specs, scans, strict=True):
            n_parts = -(-scan["n_cells"] // self.cells_per_partition)
            own, start = parts[start : start + n_parts], start + n_parts
            named = {"name": spec.name, "kind": spec.kind, "path": spec.path}
            sources.append(named | scan["record"] | {"n_kept": sum(part["n_kept"] for part in own)})
        return writer.finish(
            splits=splits,
            split_by=splits["by"],
            sources=sources,
            excluded_datasets=self.request["excluded_datasets"],
            dropped={"cells": dropped, "genes": {s["name"]: s["genes"] for s in sources}},
            command=self.command,
            notes={
                "split": splits["why"],
                "request": self.request,
                "ontologies": f"CELLxGENE schema {ontology.ontology_version()}",
                "renamed_cells": sum(shard["renamed"] for shard in merged),
            },
        )

    def _write_gene_table(self, vocabulary: dict[str, int], n_parts: int) -> None:
        """Write what an average training cell expresses; `captions.read_gene_means` reads it."""
        size = max(vocabulary.values()) + 1
        share, n_cells, n_train = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64), 0
        for part in range(n_parts):
            with np.load(self.parts / f"{part:06d}" / "genes.npz") as sums:
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
        with whole_file(self.output / "genes.parquet") as temporary:
            pq.write_table(table, temporary)


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold the folder for this builder; the system lets go of it when the process ends, however it ends."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"Another builder is at work on {folder} ({file.read().strip() or 'unknown'}). Wait for it, or stop "
                "it and give this command again to go on where it stopped."
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
