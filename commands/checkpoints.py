"""Check a checkpoint before a model is built: whether it exists, and whether its files agree with each other.

Foreign files and broken copies are refused in one line, before memory is allocated or the network is used.
"""

import difflib
import hashlib
import json
import os
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from scmmgpt.commands.files import read_json


WEIGHTS = [f"{name}{index}" for name in ("model.safetensors", "pytorch_model.bin") for index in ("", ".index.json")]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# Fields of configurations that are sizes of tensors. `null` is a default.
SIZES = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "projection_dim num_query_tokens num_condition_tokens n_bins cross_attention_frequency encoder_hidden_size"
).split()
HEADER_BYTES = 100_000_000  # limit of the header in safetensors
LARGEST_ID = 2**24  # largest id of a vocabulary, because arrays have an entry for each id


def root_checkpoint() -> str:
    """Return the folder of the checkpoint of this package, which is the root of the package.

    Raises:
        FileNotFoundError: If the package was installed without its checkpoint.
    """
    root = Path(__file__).parents[1]
    if not (root / "config.json").is_file() or not (root / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"--model is missing, and {root} has no checkpoint. Name one, or build it in a clone by `make release`."
        )
    return str(root)


def identify(folder: str) -> dict[str, str]:
    """Read name and version of a checkpoint of `release`, and compute the sha256 of its weights."""
    release = read_json(Path(folder, "config.json"), dict).get("release") or {}
    with Path(folder, "model.safetensors").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    names = {key: str(release.get(key, "unknown")) for key in ("name", "version")}
    return {**names, "sha256": digest}


def find_checkpoint(name: str, *, short_ids: bool = False) -> None:
    """Refuse a name that is neither a folder nor a model of the Hub.

    A name counts as a folder if its first part exists on this machine, or if it has more parts than a model id. A
    model id that is not in the cache is looked up on the Hub, once.

    Args:
        short_ids: Whether ids without an owner, such as `gpt2`, are also model ids.

    Raises:
        FileNotFoundError: If there is neither; the message lists the nearest names.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return
    if path.is_file():
        raise FileNotFoundError(f"{name!r} is a file. Name the folder of a checkpoint, with config.json and weights.")
    parts = path.parts
    is_id = HUB_ID.fullmatch(name) is not None and (short_ids or len(parts) == 2)
    if not is_id or len(parts) == 2 and Path(parts[0]).exists():
        raise FileNotFoundError(f"There is no folder {name!r}.{similar_folders(path)}")
    _look_up(name)


def similar_folders(path: Path) -> str:
    """Return a sentence with the folders whose names are nearest to a missing folder, or an empty string."""
    parent = path.parent if str(path.parent) else Path(".")
    if not parent.is_dir():
        missing = next(folder for folder in reversed([path, *path.parents]) if not folder.exists())
        return f" Nor is there a folder {str(missing)!r}." if missing != path else ""
    names = sorted(entry.name for entry in parent.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    near = difflib.get_close_matches(path.name, names, n=3) or ([] if parent == Path(".") else names[:3])
    return f" {str(parent)!r} has {', '.join(near)}." if near else ""


def _look_up(name: str) -> None:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    if isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        huggingface_hub.HfApi().model_info(name, timeout=10)
    except RepositoryNotFoundError:
        raise FileNotFoundError(f"There is neither a folder nor a model of the Hub called {name!r}.") from None
    except HfHubHTTPError as error:
        raise FileNotFoundError(f"The Hub refuses {name!r}: {' '.join(str(error).split())[:200]}") from None
    except Exception as error:  # offline, or no network: each library raises its own types
        why = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else f"no connection: {type(error).__name__}"
        raise FileNotFoundError(
            f"There is no folder {name!r}, and the Hub cannot be searched for a model of that name ({why})."
        ) from None


def check_checkpoint(name: str, *, short_ids: bool = False) -> None:
    """Refuse a name that is not a checkpoint, or a folder whose files do not agree with each other.

    Models of the Hub are checked when they are loaded. `short_ids`: see [`find_checkpoint`].

    Raises:
        FileNotFoundError: If the folder, `config.json` or the weights are missing.
        ValueError: If a file is damaged, a size is impossible, or weights and configuration differ.
    """
    find_checkpoint(name, short_ids=short_ids)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return
    if not (folder / "config.json").is_file():
        content = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        raise FileNotFoundError(f"No checkpoint at {name!r}: no config.json (it holds {content}).")
    config = read_json(folder / "config.json", dict)
    shapes: dict[str, list[int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        shapes |= safetensors_shapes(path)
    if not str(config.get("model_type")).startswith("scmmgpt"):
        return  # transformers checks the files of its own models
    if not any((folder / file).is_file() for file in WEIGHTS):
        raise FileNotFoundError(f"No checkpoint at {name!r}: no {' or '.join(WEIGHTS)}.")
    for path in sorted([*folder.glob("*.json"), *folder.glob("*tokenizer/*.json")]):
        check_vocabulary(path, read_json(path, dict))
    check_parts(folder, config)
    check_sizes(folder / "config.json", config, shapes)
    if shapes:
        check_shapes(folder, config, shapes)


def check_parts(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse parts of a configuration of the wrong type, and a folder without the gene vocabulary."""
    path = folder / "config.json"
    kinds = {name: dict for name in config if name.endswith("_config")} | {"annotation": dict, "architectures": list}
    for name, kind in kinds.items():
        if config.get(name) is not None and not isinstance(config[name], kind):
            raise ValueError(f"{path} has {name} = {str(config[name])[:60]!r}; it must be a {kind.__name__}.")
    for name in ("labels", "cl_ids"):
        stored = (config.get("annotation") or {}).get(name, {})
        if not isinstance(stored, dict) or not all(isinstance(text, str) for text in stored.values()):
            raise ValueError(f"{path} has {name} of annotation that are not texts by label. Copy it again.")
    if "cell_config" in config and not (folder / "gene_tokenizer" / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{folder} has no gene_tokenizer/tokenizer.json, the gene vocabulary. Copy it again.")


def check_vocabulary(path: Path, content: Mapping[str, Any]) -> None:
    """Refuse invalid ids in a `vocab.json` or `tokenizer.json`; see [`check_ids`]."""
    vocabulary = content if path.name == "vocab.json" else None
    if path.name == "tokenizer.json":
        model = content.get("model")
        if not isinstance(model, dict):
            raise ValueError(f"{path} has no 'model': it is not a tokenizer. Copy it again.")
        vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        check_ids(path, vocabulary)


def check_ids(path: Path, vocabulary: Mapping[str, Any]) -> None:
    """Refuse an empty vocabulary, and ids that are not whole numbers below `LARGEST_ID` or are repeated."""
    for name, i in vocabulary.items():
        if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < LARGEST_ID:
            raise ValueError(
                f"{path} gives {name!r} the id {i!r}; ids are whole numbers from 0 to {LARGEST_ID - 1:,}."
            )
    if len(set(vocabulary.values())) < len(vocabulary):
        raise ValueError(f"{path} gives one id to several names. Write or copy it again.")
    if not vocabulary:
        raise ValueError(f"{path} has no names. Write or copy it again.")


def safetensors_shapes(path: Path) -> dict[str, list[int]]:
    """Read the shapes of the tensors of a safetensors file, by name, from its header; refuse a truncated file."""
    n_bytes = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        (length,) = struct.unpack("<Q", start) if len(start) == 8 else (n_bytes,)
        if length + 8 > n_bytes or length > HEADER_BYTES:
            raise ValueError(f"{path} is truncated or no safetensors file ({n_bytes:,} bytes). Copy it again.")
        try:
            header = json.loads(file.read(length))
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
            shapes = {name: [int(n) for n in entry["shape"]] for name, entry in tensors.items()}
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
            raise ValueError(f"{path} is damaged: its header is not that of safetensors. Copy it again.") from None
    if 8 + length + end != n_bytes:
        raise ValueError(f"{path} is truncated: {n_bytes:,} of {8 + length + end:,} bytes are there. Copy it again.")
    return shapes


def sizes_of(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every size of a configuration and of nested configurations: dotted name, value."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from sizes_of(value, f"{prefix}{name}.")
        elif name in SIZES and value is not None and not isinstance(value, list):
            yield prefix + name, value


def check_sizes(path: Path, config: Mapping[str, Any], shapes: Mapping[str, list[int]]) -> None:
    """Refuse sizes that are not positive whole numbers, or that exceed the sizes of the weights.

    A checkpoint of stage 1 has the configuration of a language model, but no language model. The sizes of this
    configuration are not checked.
    """
    largest = max((n for shape in shapes.values() for n in shape), default=2**31)
    if shapes and not any("language_model." in name for name in shapes):
        config = {name: value for name, value in config.items() if name != "text_config"}
    sizes = dict(sizes_of(config))
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{path} has {name} = {value!r}; it must be a whole number of at least 1.")
        limit = len(shapes) if name.endswith("layers") and shapes else largest
        if value > max(limit, 64) and not name.endswith("frequency"):
            raise ValueError(f"{path} has {name} = {value:,}, more than the weights beside it have ({limit:,}).")
    for name, width in sizes.items():
        heads = sizes.get(re.sub(r"hidden_size$", "num_attention_heads", name), 1)
        own_width = re.sub(r"hidden_size$", "head_dim", name) in sizes
        if (
            name.endswith("hidden_size")
            and not name.endswith("encoder_hidden_size")
            and not own_width
            and width % heads
        ):
            raise ValueError(f"{path} has {name} = {width} for {heads} attention heads; heads have equal widths.")


def check_shapes(folder: Path, config: Mapping[str, Any], shapes: Mapping[str, list[int]]) -> None:
    """Refuse missing weights, and weights of other shapes than the configuration gives; allocates no weights."""
    import torch

    from scmmgpt import modeling_scgpt, modeling_scmmgpt

    name = (config.get("architectures") or [""])[0]
    kind = getattr(modeling_scmmgpt, str(name), None) or getattr(modeling_scgpt, str(name), None)
    if kind is None or not isinstance(kind, type):
        return  # the command that loads the checkpoint names the class that it needs
    config_class: Any = kind.config_class  # type: ignore[attr-defined]
    with torch.device("meta"):
        model = kind(config_class.from_pretrained(folder))
    tied = {
        *(getattr(model, "all_tied_weights_keys", None) or {}),
        *(getattr(model, "_tied_weights_keys", None) or {}),
    }
    expected = {key: list(value.shape) for key, value in model.state_dict().items()}
    # As in transformers, the file of a model with a head is also valid for its base model.
    prefix = f"{kind.base_model_prefix}."  # type: ignore[attr-defined]
    shapes = {key if key in expected else key.removeprefix(prefix): shape for key, shape in shapes.items()}
    wrong = [key for key in expected if key in shapes and shapes[key] != expected[key]]
    if wrong:
        key = wrong[0]
        raise ValueError(
            f"{folder}: {len(wrong)} weights have other shapes than config.json gives, such as {key}: {shapes[key]}, "
            f"not {expected[key]}. The files are of different checkpoints, or config.json was edited."
        )
    # transformers renames some weights of language models as it loads them.
    missing = [key for key in expected if key not in shapes and key not in tied and "language_model" not in key]
    if missing:
        raise ValueError(
            f"{folder}: {len(missing)} weights that config.json asks for are missing, such as {missing[0]}. The files "
            "are of different checkpoints, or config.json was edited."
        )
