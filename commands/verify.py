"""Recompute the results of a file, and report changes: of cells, weights, code or versions.

Every result has a receipt (`receipt_scmmgpt`). `verify` repeats the command with the options of the receipt, on the
cells of the file or of its original input, and compares. Labels and texts must be equal; numbers may differ by
`TOLERANCE`, because processors round differently.
"""

import contextlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd

from scmmgpt.pipeline_scmmgpt import READ_OPTIONS, ScMMGPTPipeline
from scmmgpt.receipt_scmmgpt import superseded


TOLERANCE = 1e-3  # largest absolute difference of scores and embeddings
SHOWN = 5  # most changed cells that the report names
# In the order of recomputation: `explain` needs the labels of `annotate`.
VERBS = ("annotate", "audit", "explain", "describe", "generate", "embed", "search")
# Verb -> columns of obs that must be equal, without their prefix.
EXACT = {
    "annotate": ("cell_type", "cell_type_majority", "label_set"),
    "audit": ("audit", "audit_suggested"),
    "explain": ("evidence", "rival"),
    "describe": ("description",),
}
DECODING = ("num_beams", "do_sample", "temperature", "top_k", "top_p")  # options of `describe` for the language model
CHECKPOINT = ("weights", "language_model", "settings", "vocabulary")  # entries that differ for another checkpoint
ENVIRONMENT = ("code", "device", "dtype")
MEANING = {
    "cells": "the cells",
    "weights": "the weights",
    "language_model": "the weights of the language model",
    "settings": "the labels and thresholds of the checkpoint",
    "vocabulary": "the gene or word vocabulary",
}


NOTHING_COMPARED: dict[str, Any] = {
    "cells": 0,
    "changed_cells": [],
    "was": [],
    "now": [],
    "missing_cells": [],
    "largest_difference": 0.0,
    "changes": {},
}
COMMANDS = {"explain": "annotate --evidence", "describe": "describe"}  # commands that recompute superseded results


def receipts(uns: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield the receipts in `uns` of a file: key of `uns`, verb, receipt."""
    for key, entry in uns.items():
        for verb in VERBS:
            done = entry.get(verb) if isinstance(entry, Mapping) else None
            if isinstance(done, Mapping) and "receipt" in done:
                yield key, verb, dict(done["receipt"])


def read_receipts(path: Path) -> list[tuple[str, str, dict[str, Any]]]:
    """Read the receipts of an `.h5ad` file.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file has no receipt.
    """
    from scmmgpt.commands.results import can_copy

    if not path.exists():
        raise FileNotFoundError(f"There is no file {str(path)!r}.")
    found = list(receipts(anndata.read_h5ad(path, backed="r").uns)) if can_copy(path) else []
    if not found:
        raise ValueError(
            f"{path} has no receipt in uns: it is not a result of this version of scmmgpt. Compute it again."
        )
    return found


def checkpoint_of(path: Path) -> str:
    """Name of the checkpoint in the receipts of a file.

    Raises:
        ValueError: If the receipts name no checkpoint, or several.
    """
    names = sorted({receipt.get("checkpoint", "") for _, _, receipt in read_receipts(path)})
    if len(names) > 1 or not names[0]:
        raise ValueError(f"The receipts of {path} name the checkpoints {names}. Name one with --model.")
    return names[0]


def verify_file(path: str | Path, pipeline: ScMMGPTPipeline, open_input: Callable[[], Any] | None = None) -> dict:
    """Recompute every result of a file, and compare.

    Args:
        path: An `.h5ad` file that this package wrote.
        pipeline: The checkpoint.
        open_input: Opens the file of cells from which the results were computed; default: the cells of `path`.

    Returns:
        JSON-able dict: `verified` (whether all results are the same, from the same cells and checkpoint), and
        `results`, a list of dicts:

        - `key` and `verb`;
        - `cells` (number of compared cells), `changed_cells` and `missing_cells` (names; the latter are not in the
          input), and `was` and `now` (labels or texts of the changed cells);
        - `largest_difference` of numbers;
        - `changes`: entry of the receipt -> old and new value;
        - `verified`; `superseded` for a result of labels that the file no longer has, which is not compared.
    """
    from scmmgpt.readers.cell_files import read_file

    path = Path(path)
    stored, found = anndata.read_h5ad(path, backed="r"), read_receipts(path)
    cells = None
    if any(verb != "generate" for _, verb, _ in found):
        cells = open_input() if open_input is not None else read_file(path, backed=True)
    results = []
    for key, verb, receipt in sorted(found, key=lambda entry: VERBS.index(entry[1])):
        options = options_of(verb, receipt, path)
        if verb in superseded(stored, key):
            results.append({"key": key, "verb": verb, "superseded": True, "verified": False, **NOTHING_COMPARED})
            continue
        if verb == "generate":
            fresh = pipeline.generate(**options, key_added=key)
        else:
            fresh = cells
            key = options.pop("key_added", key)
            with _without_labels(fresh, key if receipt.get("labels") == "" else None):
                getattr(pipeline, verb)(fresh, **options, key_added=key)
        results.append({"key": key, "verb": verb, **compare(stored, fresh, key, verb)})
        now = fresh.uns["scmmgpt" if verb in ("embed", "search") else key][verb]["receipt"]
        results[-1]["changes"] = changes = differences(receipt, now)
        other = any(name in changes for name in ("cells", *CHECKPOINT))
        results[-1]["verified"] = not (results[-1]["changed_cells"] or results[-1]["missing_cells"] or other)
    return {"verified": all(result["verified"] for result in results), "results": results}


@contextlib.contextmanager
def _without_labels(adata: Any, key: str | None) -> Iterator[None]:
    """Hide the label columns of `key` within the context, for a result that was computed before these labels."""
    names = [] if key is None else [n for n in (f"{key}_cell_type", f"{key}_by_profile") if n in adata.obs]
    held = {name: adata.obs.pop(name) for name in names}
    try:
        yield
    finally:
        for name, column in held.items():
            adata.obs[name] = column


def options_of(verb: str, receipt: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Read the options of a receipt; refuse options that are not of the verb, because a file is not trusted.

    Raises:
        ValueError: If the receipt has an unknown option.
    """
    options = json.loads(receipt["options"])
    named = inspect.signature(getattr(ScMMGPTPipeline, verb)).parameters.values()
    known = {parameter.name for parameter in named if parameter.kind is not parameter.VAR_KEYWORD}
    known |= {*READ_OPTIONS, *(DECODING if verb == "describe" else ())}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(f"{path}: the receipt of {verb} has the options {unknown}, which cannot be repeated from it.")
    if verb == "generate":
        options.pop("key_added", None)
    return options


def compare(stored: Any, fresh: Any, key: str, verb: str) -> dict[str, Any]:
    """Compare the results of a verb, cell by cell, matched by name; see [`verify_file`]."""
    rows = pd.Index(fresh.obs_names).get_indexer(stored.obs_names) if fresh.obs_names.is_unique else None
    if rows is None or not stored.obs_names.is_unique:  # repeated names: match cells by position
        places = np.arange(stored.n_obs)
        rows = np.where(places < fresh.obs.shape[0], places, -1)
    here = rows >= 0
    names, rows = np.asarray(stored.obs_names)[here], rows[here]
    changed = np.zeros(len(names), dtype=bool)
    was, now = np.full(len(names), "", dtype=object), np.full(len(names), "", dtype=object)
    for column in (f"{key}_{name}" for name in EXACT.get(verb, ())):
        if column in stored.obs and column in fresh.obs:
            pair = [np.asarray(obs[column], dtype=str) for obs in (stored.obs.iloc[here], fresh.obs.iloc[rows])]
            new = (pair[0] != pair[1]) & ~changed
            was[new], now[new] = pair[0][new], pair[1][new]
            changed |= new
    difference = 0.0
    for one, other in numbers(stored, fresh, key, verb):
        gap = np.abs(np.nan_to_num(one[here]) - np.nan_to_num(other[rows])).reshape(len(names), -1)
        largest = gap.max(axis=1, initial=0.0)
        changed |= ~(largest <= TOLERANCE)
        difference = max(difference, float(largest.max(initial=0.0)))
    return {
        "cells": len(names),
        "changed_cells": names[changed].tolist(),
        "was": was[changed].tolist(),
        "now": now[changed].tolist(),
        "missing_cells": np.asarray(stored.obs_names)[~here].tolist(),
        "largest_difference": difference,
    }


def numbers(stored: Any, fresh: Any, key: str, verb: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield pairs of float64 arrays `(n_obs, ...)`: stored and recomputed numbers of a verb."""
    column = {"annotate": f"{key}_score", "search": key}.get(verb)
    pair: tuple[Any, Any]
    if column is not None:
        if column not in stored.obs:
            return
        pair = stored.obs[column], fresh.obs[column]
    elif verb == "embed":
        if key not in stored.obsm:
            return
        pair = stored.obsm[key], fresh.obsm[key]
    elif verb == "generate":
        genes = [name for name in stored.var_names if name in fresh.var_names]
        pair = stored[:, genes].to_memory().X.toarray(), fresh[:, genes].X.toarray()
    else:
        return
    yield np.asarray(pair[0], dtype=np.float64), np.asarray(pair[1], dtype=np.float64)


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[str]]:
    """Differences of two receipts, with one entry for each package: name -> old and new value."""
    before, after = ({**r, **r.get("versions", {})} for r in (was, now))
    names = [*MEANING, *ENVIRONMENT, *after.get("versions", {})]
    pairs = {name: [str(before.get(name, "none")), str(after.get(name, "none"))] for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def render(report: Mapping[str, Any]) -> list[str]:
    """Format the report as lines of text."""
    lines = []
    for result in report["results"]:
        if result.get("superseded"):
            command = COMMANDS[result["verb"]]
            lines.append(
                f"{result['verb']}: superseded, of labels that the file no longer has. Run `{command}` again."
            )
            continue
        n, changed, missing = result["cells"], result["changed_cells"], result["missing_cells"]
        gap = f", numbers within {result['largest_difference']:.2g}" if result["largest_difference"] else ""
        lines.append(f"{result['verb']}: {n - len(changed)} of {n} cells have the same result{gap}")
        for name, was, now in list(zip(changed, result["was"], result["now"], strict=True))[:SHOWN]:
            lines.append(f"  {name}: " + (f"{was} -> {now}" if was or now else "another number"))
        if len(changed) > SHOWN:
            lines.append(f"  and {len(changed) - SHOWN} more (--json lists all)")
        if missing:
            lines.append(f"  {len(missing)} cells are not in the input, such as {missing[0]}")
        for name, (was, now) in result["changes"].items():
            lines.append(f"  changed: {MEANING.get(name, name)}, {was} -> {now}")
    lines.append("verified" if report["verified"] else "NOT verified")
    return lines
