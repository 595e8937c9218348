"""Build a corpus by an external sort by a random key, which mixes the cells of all sources in every shard.

1. Scan: read every source's annotations, genes and kind of values. The gene vocabulary and the splits follow.
2. Map: turn every partition (a range of cells of one source) into scratch files sorted by split and key.
3. Merge: write every shard (a range of keys of one split) from its slices of all scratch files.

`CorpusBuilder` lists the tasks, `build_steps` holds the three steps, and `workers` runs tasks in processes. A step
writes whole files and is skipped if its files exist. A build that was killed, or ran out of disk, therefore goes on
where it stopped, and ends with the same bytes for any number of workers.
"""

import contextlib
import dataclasses
import errno
import functools
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from scmmgpt.commands.files import LOCK, lock_folder, read_json, whole_file, write_json
from scmmgpt.train.data import build_steps, corpus, ontology
from scmmgpt.train.data.dataset_card import dataset_card
from scmmgpt.train.data.gene_tables import build_gene_aliases
from scmmgpt.train.data.label_checks import label_warnings
from scmmgpt.train.data.sources import SourceSpec, cell_ids, find_joinids, fingerprint, open_source, resolve_labels
from scmmgpt.train.data.splits import split_cells, split_units
from scmmgpt.train.data.workers import start_workers


Results = list[dict[str, Any]]  # one result for each task of a step

logger = logging.getLogger(__name__)

MIN_COMMON_GENES = 200  # if fewer genes are common to all sources, copies of a cell are compared by all genes
SMALL_SOURCES_BYTES = 2**28  # below this size, one process finishes before worker processes would have started


class CorpusBuilder:
    """Builds a corpus, or finishes one whose build was interrupted.

    Sources, vocabulary and options determine the bytes of the corpus; `cells_per_partition`, the most cells that a
    worker holds at once, determines memory alone.

    Args:
        vocabulary: Gene symbol -> id; default: every approved symbol that a source measures.
        options: `excluded_datasets`, `min_genes`, `fractions`, `split_by`, `split_column`, `seed` and
            `cells_per_shard`.
        command: The command line, for the manifest.
    """

    def __init__(
        self,
        output: Path,
        sources: list[SourceSpec],
        vocabulary: dict[str, int] | None,
        options: dict[str, Any],
        cells_per_partition: int,
        command: str,
    ) -> None:
        self.output, self.sources, self.vocabulary, self.command = output, sources, vocabulary, command
        self.cells_per_partition = cells_per_partition
        request = {
            "schema_version": corpus.SCHEMA_VERSION,
            "sources": [dataclasses.asdict(spec) | fingerprint(spec) for spec in sources],
            "vocabulary": corpus.hash_vocabulary(vocabulary) if vocabulary else None,
            **options,
        }
        # JSON turns tuples into lists: `_finished_manifest` compares this request with one from a file.
        self.request = json.loads(json.dumps(request))
        self.scratch = output / ".build"
        self.parts = self.scratch / f"parts-{cells_per_partition}"

    def run(self, workers: int | None = None, cluster: str | None = None) -> corpus.Manifest:
        """Build what is missing, and return the manifest of the finished corpus.

        Args:
            workers: Number of processes; default: one per core, or one for small files.
            cluster: Address of a Dask scheduler to use instead; its workers must see the same folders.
        """
        if workers is None:
            small = all(spec.kind == "file" for spec in self.sources)
            small = small and sum(fingerprint(spec)["bytes"] for spec in self.sources) <= SMALL_SOURCES_BYTES
            workers = 1 if small else os.cpu_count() or 1
        is_new = not self.output.exists()
        try:
            with lock_folder(self.output), self._leaving_nothing(is_new):
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
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            free = shutil.disk_usage(self.output).free
            raise OSError(
                error.errno,
                f"{error.strerror} while writing to {self.output}, where {free:,} bytes are free. Finished files are "
                "kept: make room and give the same command again to go on",
                error.filename,
            ) from error

    @contextlib.contextmanager
    def _leaving_nothing(self, is_new: bool) -> Iterator[None]:
        """If the build fails before it has read a source, remove its scratch folder, and its output folder if new."""
        try:
            yield
        except BaseException:
            if not self._has_work() and not any(self.scratch.glob("scan/*.json")):
                shutil.rmtree(self.scratch, ignore_errors=True)
                if is_new and [path.name for path in self.output.iterdir()] == [LOCK]:
                    shutil.rmtree(self.output, ignore_errors=True)
            raise

    def _has_work(self) -> bool:
        """Whether the output folder has files that took time to build."""
        patterns = ("manifest.json", "data/[!.]*.parquet", ".build/parts-*/*")
        return any(True for pattern in patterns for _ in self.output.glob(pattern))

    def _build(self, workers: int, cluster: str | None) -> corpus.Manifest:
        self._prepare_scratch()
        has_vocabulary = self.vocabulary is not None
        if self.vocabulary is not None:
            self._write_vocabulary(self.vocabulary)
        specs = [self._listed(i, spec) for i, spec in enumerate(self.sources)]
        with start_workers(workers, cluster) as run:
            options = {"has_vocabulary": has_vocabulary, "split_column": self.request["split_column"]}
            scan = functools.partial(build_steps.scan_source, self.scratch, **options)
            scans = run([functools.partial(scan, i, spec) for i, spec in enumerate(specs)], "sources scanned")
            if not has_vocabulary:
                symbols = sorted(set().union(*(scan["symbols"] for scan in scans)))
                self._write_vocabulary({name: i for i, name in enumerate([*corpus.SPECIAL_TOKENS, *symbols])})
            self._write_common_genes(scans)
            splits = self._splits(specs, scans)
            parts = run(self._partitions(specs, scans), "partitions read")
            build_steps.find_copies([self.parts / f"{number:06d}" for number in range(len(parts))])
            merged = run(self._shards(parts), "shards written")
        return self._finish(specs, scans, splits, parts, merged)

    def _finished_manifest(self) -> corpus.Manifest | None:
        """Check that the folder is new or belongs to this build; return the manifest if nothing is left to do."""
        path, earlier = self.output / "manifest.json", None
        has_work = self._has_work()
        if not has_work and (others := [entry.name for entry in self.output.iterdir() if entry.name[0] != "."]):
            raise ValueError(f"{self.output} holds other files, such as {min(others)!r}. Name a new folder.")
        manifest = corpus.Manifest.read(path) if path.exists() else None
        if (self.scratch / "request.json").exists():
            earlier = read_json(self.scratch / "request.json")
        elif manifest is not None:
            earlier = manifest.notes.get("request")
        elif any(self.output.glob("data/[!.]*.parquet")):
            raise ValueError(f"{self.output / 'data'} holds shards of an unknown build. Choose another folder.")
        if earlier is not None and earlier != self.request and not has_work:
            shutil.rmtree(self.scratch, ignore_errors=True)  # an earlier command failed and was then corrected
        elif earlier is not None and earlier != self.request:
            changed = sorted(key for key in self.request if earlier.get(key) != self.request[key])
            raise ValueError(
                f"{self.output} holds a corpus of other sources or options ({', '.join(changed)} differ). Choose "
                "another folder, or remove this one to build it again."
            )
        missing = []
        for shard in manifest.shards if manifest else []:
            if (self.output / shard.path).exists():
                corpus.check_shard(self.output, shard, checksum=True)
            else:
                missing.append(shard.path)
        if missing:
            logger.warning("Building %d missing shards of %s again: %s", len(missing), self.output, missing[:5])
            return None
        return manifest

    def _prepare_scratch(self) -> None:
        """Make the scratch folders, and remove half-written files of a killed builder."""
        for pattern in (".*.tmp*", "data/.*.tmp*", ".build/.*.tmp*", ".build/*/.*.tmp*"):
            for leftover in self.output.glob(pattern):
                shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)
        for folder in (self.scratch / "scan", self.parts, self.scratch / "shards"):
            folder.mkdir(parents=True, exist_ok=True)
        if not (self.scratch / "request.json").exists():
            write_json(self.scratch / "request.json", self.request)

    def _listed(self, index: int, spec: SourceSpec) -> SourceSpec:
        """Return the spec with the list of its cells, for a Census slice; write the list once."""
        if spec.kind == "file":
            return spec
        path = self.scratch / f"joinids-{index}.npy"
        if not path.exists():
            joinids = find_joinids(spec.path, spec.options["organism"], spec.options["value_filter"])
            with whole_file(path) as temporary:
                np.save(temporary, joinids)
        return dataclasses.replace(spec, options={**spec.options, "joinids": str(path)})

    def _write_vocabulary(self, vocabulary: dict[str, int]) -> None:
        """Write the genes and their aliases, once."""
        if (self.scratch / "vocab.json").exists():
            return
        if len(vocabulary) > corpus.MAX_VOCABULARY_SIZE:
            raise ValueError(
                f"The sources measure {len(vocabulary)} genes, but a corpus has at most {corpus.MAX_VOCABULARY_SIZE}. "
                "Choose the genes with `--vocabulary vocab.json`."
            )
        write_json(self.scratch / "gene_aliases.json", build_gene_aliases(vocabulary))
        write_json(self.scratch / "vocab.json", vocabulary)

    def _write_common_genes(self, scans: Results) -> None:
        """Write the ids of the genes that all sources measure, or of all genes if these are too few."""
        path, vocabulary = self.scratch / "common.npy", read_json(self.scratch / "vocab.json")
        if path.exists():
            return
        common = set.intersection(*(set(scan["symbols"]) for scan in scans))
        names = common if len(common) >= MIN_COMMON_GENES else vocabulary
        with whole_file(path) as temporary:
            np.save(temporary, np.array(sorted(vocabulary[name] for name in names), dtype=np.int64))

    def _splits(self, specs: list[SourceSpec], scans: Results) -> dict[str, Any]:
        """Divide the cells among the splits, once."""
        path, request = self.scratch / "splits.json", self.request
        if path.exists():
            return read_json(path)
        excluded, seed, fractions = set(request["excluded_datasets"]), request["seed"], request["fractions"]
        datasets = {unit[0] for scan in scans for unit in scan["units"]}
        if unknown := sorted(excluded - datasets):
            known = ", ".join(sorted(datasets)[:10])
            raise ValueError(f"--exclude-dataset names {unknown[:10]}, but the sources have the datasets {known}.")
        units = [unit for scan in scans for unit in scan["units"] if unit[0] not in excluded]
        if not units:
            raise ValueError(f"All {len(excluded)} datasets of the sources are excluded. Leave one in.")
        if request["split_column"]:
            content: dict[str, Any] = {"by": "column", "why": f"as obs[{request['split_column']!r}] says"}
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

    def _partitions(self, specs: list[SourceSpec], scans: Results) -> list[Callable[[], Any]]:
        tasks: list[Callable[[], Any]] = []
        options = {key: self.request[key] for key in ("excluded_datasets", "min_genes", "split_column", "seed")}
        read = functools.partial(build_steps.map_partition, self.scratch, **options)
        for spec, scan in zip(specs, scans, strict=True):
            for start in range(0, scan["n_cells"], self.cells_per_partition):
                stop = min(start + self.cells_per_partition, scan["n_cells"])
                folder = self.parts / f"{len(tasks):06d}"
                tasks.append(functools.partial(read, folder, spec, start, stop))
        return tasks

    def _shards(self, parts: Results) -> list[Callable[[], Any]]:
        """List the shards of each split: shards of 16-bit counts first, then shards of other values."""
        tasks: list[Callable[[], Any]] = []
        folders = [self.parts / f"{number:06d}" for number in range(len(parts))]
        merge = functools.partial(build_steps.merge_shard, self.scratch, self.output, folders)
        for split in corpus.SPLITS:
            slices = []
            for kind in build_steps.COUNT_KINDS:
                n_cells = sum(stop - start for part in parts for start, stop in [part["rows"][kind][split]])
                n_slices = -(-n_cells // self.request["cells_per_shard"])
                slices += [{"kind": kind, "slice_index": i, "n_slices": n_slices} for i in range(n_slices)]
            tasks += [functools.partial(merge, split, i, len(slices), **own) for i, own in enumerate(slices)]
        if not tasks:
            raise ValueError(
                f"No cell of the {len(self.sources)} sources expresses {self.request['min_genes']} genes of the "
                "vocabulary. Choose another `--vocabulary` or a smaller `--min-genes`."
            )
        return tasks

    def _finish(
        self, specs: list[SourceSpec], scans: Results, splits: dict[str, Any], parts: Results, merged: Results
    ) -> corpus.Manifest:
        """Write genes, vocabulary, splits and manifest."""
        writer = build_steps.open_writer(self.scratch, self.output)
        self._write_gene_table(writer.vocabulary, len(parts))
        reasons = ("excluded_dataset", "too_few_genes")
        dropped = {reason: sum(part["dropped"][reason] for part in parts) for reason in reasons}
        dropped["duplicates"] = sum(shard["duplicates"] for shard in merged)
        if dropped["duplicates"]:
            logger.warning("Left out %d copies: cells with the same counts as another cell.", dropped["duplicates"])
        sources, start = [], 0
        for spec, scan in zip(specs, scans, strict=True):
            without_term = scan["record"]["labels"].get("cell_type", {}).get("unmatched", {})
            for warning in label_warnings(without_term, f"cell_type of {spec.name}"):
                logger.warning(warning)
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
        """Write the mean share of each gene in the counts of a training cell, for `captions.read_gene_means`."""
        totals: dict[str, Any] = {"share": 0, "n_cells": 0, "n_train": 0}
        for part in range(n_parts):
            with np.load(self.parts / f"{part:06d}" / "genes.npz") as sums:
                totals = {name: total + sums[name] for name, total in totals.items()}
        ids = np.array(list(vocabulary.values()))
        columns = {"symbol": list(vocabulary), "gene_id": ids.astype(np.uint16), "n_cells": totals["n_cells"][ids]}
        columns["mean_share"] = totals["share"][ids] / build_steps.SHARE_UNITS / max(totals["n_train"], 1)
        with whole_file(self.output / "genes.parquet") as temporary:
            pq.write_table(pa.table(columns), temporary)
