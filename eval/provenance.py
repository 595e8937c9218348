"""The sources of the numbers of a report: corpus, checkpoint, training runs, settings, files and versions."""

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scmmgpt.receipt_scmmgpt import installed_versions
from scmmgpt.train.data.corpus import hash_file


if TYPE_CHECKING:
    from scmmgpt.train.data.corpus import Corpus

PACKAGES = (
    "scmmgpt torch transformers peft trl datasets numpy scipy scikit-learn POT sacrebleu rouge-score scanpy umap-learn"
).split()


def describe_evaluation(
    corpus: "Corpus", files: Sequence[str], *, command: str, checkpoint: str | None, runs: Sequence[dict], seed: int
) -> dict:
    """Collect the provenance for `metrics.json`: corpus, files, checkpoint, training runs, settings and versions."""
    provenance = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "corpus": describe_corpus(corpus),
        "checkpoint": None if checkpoint is None else describe_checkpoint(checkpoint),
        "files": {path: hash_file(path) for path in files},
        "settings": recorded_settings(files),
        "training": [{"name": run["name"], "steps": run["steps"]} for run in runs],
        "versions": installed_versions(tuple(PACKAGES)),
        "seed": seed,
    }
    warning = None if checkpoint is None else trained_elsewhere(checkpoint, corpus)
    return provenance if warning is None else provenance | {"warning": warning}


def describe_checkpoint(path: str | Path) -> dict:
    """Architecture and size of a checkpoint, from `config.json` and the headers of the weights; nothing is loaded."""
    from safetensors import safe_open

    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json. Name a folder that `save_pretrained` wrote.")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    parameters = 0
    for weights in sorted(folder.glob("*.safetensors")):
        with safe_open(weights, framework="np") as file:
            parameters += sum(int(np.prod(file.get_slice(key).get_shape())) for key in file.keys())
    cell, text, qformer = (config.get(f"{part}_config") or {} for part in ("cell", "text", "qformer"))
    return {
        "path": str(folder),
        "architecture": ", ".join(config.get("architectures") or []) or None,
        "parameters": parameters or None,
        "cell model": _size(cell),
        "Q-Former": _size(qformer),
        "language model": _size(text, text.get("_name_or_path") or text.get("model_type")),
        "query tokens": config.get("num_query_tokens"),
        "expression head": config.get("expression_head"),
        "config sha256": hash_file(folder / "config.json"),
    }


def trained_elsewhere(checkpoint: str | Path, corpus: "Corpus") -> str | None:
    """Return a warning if `training.json` of the checkpoint names another corpus, else None.

    Training cells of another corpus may be test cells of this corpus.
    """
    log = Path(checkpoint) / "training.json"
    if not log.is_file():
        return None
    trained_on = Path(json.loads(log.read_text(encoding="utf-8")).get("data", {}).get("corpus") or "")
    manifest = trained_on / "manifest.json"
    if not manifest.is_file() or hash_file(manifest) == hash_file(corpus.path / "manifest.json"):
        return None
    return (
        f"The checkpoint was trained on {trained_on}, not on {corpus.path}: "
        "its training cells may be among the held-out cells of this report."
    )


def _size(config: dict, name: str | None = None) -> str | None:
    if not config:
        return None
    size = f"{config.get('num_hidden_layers', '?')} layers, {config.get('hidden_size', '?')} wide"
    return f"{Path(name).name}: {size}" if name else size


def recorded_settings(paths: Sequence[str]) -> dict[str, dict]:
    """Settings of commands from `uns["scmmgpt"]` of the `.h5ad` files: verb -> its settings with a single value."""
    import anndata

    settings: dict[str, dict] = {}
    for path in (path for path in paths if str(path).endswith(".h5ad")):
        noted = anndata.read_h5ad(path, backed="r").uns.get("scmmgpt", {})
        for verb in ("annotate", "describe", "generate"):
            single = {name: np.asarray(value) for name, value in dict(noted.get(verb, {})).items()}
            single = {name: value.item() for name, value in single.items() if value.ndim == 0}
            settings |= {verb: single} if single else {}
    return settings


def describe_corpus(corpus: "Corpus") -> dict:
    """Sources, sizes and splits of a corpus."""
    manifest = corpus.manifest
    return {
        "path": str(corpus.path),
        "manifest sha256": hash_file(corpus.path / "manifest.json"),
        "splits sha256": manifest.splits_hash,
        "gene vocabulary sha256": manifest.vocabulary_hash,
        "split by": manifest.split_by,
        "cells": {split: corpus.n_cells(split) for split in corpus.split_names},
        "sources": [source.get("name") or source.get("dataset_id") or str(source) for source in manifest.sources],
        "command": manifest.command,
    }


def read_training(folders: Sequence[str | Path]) -> list[dict]:
    """Read the log of each training run from `trainer_state.json` of the folder, or of its last checkpoint."""
    runs = []
    for folder in map(Path, folders):
        states = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda p: int(p.parent.name.split("-")[1]))
        candidates = [path for path in (folder / "trainer_state.json", *reversed(states)) if path.is_file()]
        if not candidates:
            raise FileNotFoundError(
                f"{folder} has no trainer_state.json, nor a checkpoint-* with one. Name the folder of a training run."
            )
        state = json.loads(candidates[0].read_text(encoding="utf-8"))
        runs.append({"name": folder.name, "steps": state.get("global_step"), "history": state.get("log_history", [])})
    return runs
