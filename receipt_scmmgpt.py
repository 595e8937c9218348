"""The receipt of a result: the cells, weights, code, versions and options that the result was computed from.

Every verb of the pipeline adds `uns[key][verb]["receipt"]`. `scmmgpt verify` computes the results again, and compares
results and receipts. A receipt guards against accidents (another checkpoint of the same name, an edited matrix, a new
version). It does not guard against forgery.

| entry | hash of |
| --- | --- |
| `cells` | names, genes and counts of the cells; the order of cells and the format of the file do not matter |
| `weights` | all tensors except those of the language model, as float32 |
| `language_model` | the tensors of the language model, for verbs that use the language model |
| `settings` | values that `calibrate` and `finetune` stored: labels, texts, temperature, thresholds |
| `vocabulary` | names and aliases of genes, and the words of the tokenizers |
| `code` | the travelling files |
| `labels` | the column of labels that was described or explained, and the names of the cells; "" for none |

`n_cells` is the number of cells of `labels`. `checkpoint`, `device`, `dtype` and `versions` are words. `options` is
JSON and includes seeds. A hash is the first 16 hexadecimal digits of SHA-256; the hash of cells is a sum of 64-bit
mixes.
"""

import functools
import hashlib
import inspect
import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

from .records_scmmgpt import recorded


P = ParamSpec("P")
R = TypeVar("R")

DIGITS = 16  # hexadecimal digits of a hash
PACKAGES = ("scmmgpt", "torch", "transformers", "tokenizers", "numpy", "scipy", "anndata", "numba")
LANGUAGE_VERBS = ("describe", "generate")  # verbs that run the language model
LANGUAGE_PARTS = ("language_model.", "lm_head.")
OF_LABELS = ("explain", "describe")  # verbs that read a column of labels
UNRECORDED = ("batch_size",)  # options that do not change the result


# -- hashes -----------------------------------------------------------------------------------------------------------


def digest(parts: Iterable[bytes | str]) -> str:
    """Hash of a sequence of texts and bytes."""
    total = hashlib.sha256()
    for part in parts:
        total.update(part.encode() if isinstance(part, str) else part)
        total.update(b"\0")
    return total.hexdigest()[:DIGITS]


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor; floats are converted to float32, so that the hash does not depend on the loaded dtype."""
    tensor = tensor.detach().cpu()
    tensor = tensor.float() if tensor.is_floating_point() else tensor
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data  # not a copy


def hash_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Hash of named tensors."""
    names = sorted(tensors)
    with ThreadPoolExecutor(max_workers=max(1, min(8, torch.get_num_threads()))) as pool:
        hashes = pool.map(lambda name: hashlib.sha256(tensor_bytes(tensors[name])).digest(), names)
        return digest(part for pair in zip(names, hashes, strict=True) for part in pair)


@functools.cache
def hash_code() -> str:
    """Hash of the travelling files beside this one."""
    files = sorted([*Path(__file__).parent.glob("*_scmmgpt.py"), *Path(__file__).parent.glob("modeling_scgpt.py")])
    return digest(part for file in files for part in (file.name, file.read_bytes().replace(b"\r\n", b"\n")))


@functools.cache
def installed_versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Versions of Python and of packages; by default the packages that affect results."""
    versions = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def hash_json(value: Any) -> str:
    """Hash of a value as JSON with sorted keys."""
    return digest([json.dumps(value, sort_keys=True, default=str)])


# -- the receipt ------------------------------------------------------------------------------------------------------


class Signer:
    """The part of a receipt that depends on checkpoint and environment. Hashes are cached until the weights change.

    Args:
        model, processor: The model and the processor of a pipeline.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        self.known: dict[str, tuple[Any, str]] = {}

    def sign(self, verb: str) -> dict[str, Any]:
        """The receipt of a verb, without `cells` and `options`."""
        config = self.model.config
        receipt: dict[str, Any] = {
            "checkpoint": str(config._name_or_path or ""),
            "weights": self._weights("weights", lambda name: not is_language(name)),
        }
        if verb in LANGUAGE_VERBS:
            receipt["language_model"] = self._weights("language_model", is_language)
        device = self.model.device
        name = torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else device.type
        return {
            **receipt,
            "settings": self._settings(),
            "vocabulary": self._vocabulary(),
            "code": hash_code(),
            "device": f"cpu ({name})" if device.type == "cpu" else name,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "versions": installed_versions(),
        }

    def _weights(self, part: str, belongs: Callable[[str], bool]) -> str:
        tensors = {name: value for name, value in self.model.state_dict().items() if belongs(name)}
        # Training changes a tensor in place, which increments the version of the tensor.
        state = [(name, value.data_ptr(), value._version) for name, value in tensors.items()]
        if self.known.get(part, (None, ""))[0] != state:
            self.known[part] = state, hash_tensors(tensors)
        return self.known[part][1]

    def _settings(self) -> str:
        extractor, config = self.processor.feature_extractor, self.model.config
        names = sorted(inspect.signature(type(extractor).__init__).parameters)
        of_cells = {name: getattr(extractor, name) for name in names if hasattr(extractor, name)}
        embedding = getattr(config, "cell_embedding", "cell-text")
        changed = [] if embedding == "cell-text" else [embedding]  # keeps the hash of older receipts
        return hash_json([config.annotation, getattr(config, "label_readout", None), of_cells, *changed])

    def _vocabulary(self) -> str:
        if "vocabulary" not in self.known:
            names = ("tokenizer", "qformer_tokenizer", "gene_tokenizer")
            tokenizers = [getattr(self.processor, name, None) for name in names]
            words = [None if tokenizer is None else tokenizer.get_vocab() for tokenizer in tokenizers]
            self.known["vocabulary"] = None, hash_json([*words, self.processor.gene_aliases])
        return self.known["vocabulary"][1]


def is_language(name: str) -> bool:
    """Whether the name of a tensor is that of a part of the language model."""
    return name.startswith(LANGUAGE_PARTS) or any(f".{part}" in name for part in LANGUAGE_PARTS)


def with_receipt(verb: Callable[P, R]) -> Callable[P, R]:
    """Decorate a verb of the pipeline: add a receipt to the settings that the verb records in `uns[key][verb]`.

    Before the work, the decorator checks that the AnnData can take results under the names of `key_added`. A call that
    records nothing, such as a search without `key_added`, gets no receipt.
    """

    @functools.wraps(verb)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = inspect.signature(verb).bind(*args, **kwargs)
        bound.apply_defaults()
        adata, key = bound.arguments.get("adata"), bound.arguments["key_added"]
        if key is not None or verb.__name__ != "search":  # a search without `key_added` adds nothing
            check_results_fit(adata, key)
        result = verb(*args, **kwargs)
        add_receipt(verb, result, *args, **kwargs)
        return result

    return run


def check_results_fit(adata: Any, key_added: Any) -> None:
    """Refuse, before the work, an AnnData that takes no results, and a name that `.h5ad` cannot store.

    Raises:
        TypeError: If `key_added` is not a text.
        ValueError: If `key_added` is blank or has a slash, or `adata` is a view of a file on disk.
    """
    if not isinstance(key_added, str):
        raise TypeError(f"key_added is {key_added!r}; it must be a text, with which the names of the results begin.")
    if not key_added.strip() or "/" in key_added:
        raise ValueError(f"key_added is {key_added!r}; it must not be blank, and must have no slash.")
    if getattr(adata, "is_view", False) and getattr(adata, "isbacked", False):
        raise ValueError("A view of a backed AnnData takes no results: pass `adata.to_memory()`, or the whole data.")


def add_receipt(verb: Callable[..., Any], result: Any, *args: Any, **kwargs: Any) -> None:
    """Add the receipt of a call of a verb to the AnnData that the verb changed, or to the result of the verb."""
    signature, name = inspect.signature(verb), verb.__name__
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    options = dict(bound.arguments)
    pipeline, adata = options.pop("self"), options.pop("adata", None)
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            options |= options.pop(parameter.name)
    uns = (result if adata is None else adata).uns
    # In `embed` and `search`, `key_added` names a column or an embedding; both record in uns["scmmgpt"].
    key = "scmmgpt" if name in ("embed", "search") else options["key_added"]
    if options["key_added"] is not None:
        cells = {} if adata is None else {"cells": uns["scmmgpt"]["input"]["cells"].get("hash", "")}
        if name in OF_LABELS:
            cells |= {"labels": hash_labels(adata, label_column(key, options)), "n_cells": adata.n_obs}
        uns[key][name]["receipt"] = {**cells, **pipeline.signer.sign(name), "options": recorded_options(options)}


def label_column(key: str, options: Mapping[str, Any]) -> str:
    """The column of `obs` with the labels that a verb of `OF_LABELS` reads with these options."""
    return str(options.get("label_key", f"{key}_cell_type"))


def hash_labels(adata: Any, column: str) -> str:
    """Hash of the labels and names of all cells, independent of the order of the cells; "" without the column."""
    if column not in adata.obs:
        return ""
    return digest(sorted(f"{name}\t{label}" for name, label in zip(adata.obs_names, adata.obs[column], strict=True)))


def superseded(adata: Any, key: str) -> list[str]:
    """Verbs whose results in `uns[key]` were computed from other labels than `obs` has now.

    In a subset of the cells, and in joined files, the hash of the labels cannot match: such results are not listed.
    """
    verbs = []
    for verb in OF_LABELS:
        receipt = recorded(adata, key, verb).get("receipt", {})
        if receipt.get("labels") and receipt.get("n_cells") == adata.n_obs:
            column = label_column(key, json.loads(receipt["options"]))
            verbs += [verb] * (hash_labels(adata, column) != receipt["labels"])
    return verbs


def recorded_options(options: Mapping[str, Any]) -> str:
    """Options that are not None as JSON, without the options that do not change the result."""

    def plain(value: Any) -> Any:
        return value.tolist() if hasattr(value, "tolist") else os.fspath(value)

    recorded_values = {name: value for name, value in options.items() if value is not None and name not in UNRECORDED}
    try:
        return json.dumps(recorded_values, default=plain)
    except TypeError:  # an object for `generate` of the language model, which JSON cannot hold
        return json.dumps(recorded_values, default=repr)
