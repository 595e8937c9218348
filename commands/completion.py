"""Values for shell completion: labels and tissues of a checkpoint, columns of `obs`, devices.

    python -m scmmgpt.commands.completion labels WORD LINE ...

A shell waits for the values at each press of the Tab key, so this module imports only `json` and `h5py`.
"""

import itertools
import json
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path


KINDS = {  # option -> kind of its values
    "labels": "labels",
    "tissue": "tissues",
    "label_key": "columns",
    "cluster_key": "columns",
    "columns": "columns",
    "device": "devices",
}
DEVICES = ["cpu", "cuda", "mps"]
# Script for bash; one function for each kind follows.
PREAMBLE = """
_scmmgpt_values() {{
  "{python}" -P -m scmmgpt.commands.completion "$1" "$2" "${{COMP_WORDS[@]}}" 2>/dev/null
}}
"""
FUNCTION = '_scmmgpt_{kind}() {{ _scmmgpt_values {kind} "$1"; }}\n'


def completes(option: str) -> dict[str, object] | None:
    """Make the completion of an option for `shtab`; None for an option without known values."""
    kind = KINDS.get(option)
    if kind is None:
        return None
    bash = PREAMBLE.format(python=sys.executable) + "".join(FUNCTION.format(kind=k) for k in sorted({*KINDS.values()}))
    return {"bash": f"_scmmgpt_{kind}", "preamble": {"bash": bash}}


def values(kind: str, line: Sequence[str]) -> list[str]:
    """List the values of a kind; empty if no file can be read.

    Args:
        kind: "labels", "tissues", "columns" or "devices".
        line: Words of the command line, with `--model` for labels and tissues, and `.h5ad` files for columns.
    """
    if kind == "devices":
        return DEVICES
    if kind == "columns":
        return [name for word in line if word.endswith(".h5ad") for name in columns_of(Path(word))]
    words = [word for word in line if word != "="]  # bash splits `--model=NAME` at the sign
    given = [word for option, word in itertools.pairwise(words) if option == "--model"]
    config = (Path(given[-1]).expanduser() if given else Path(__file__).parents[1]) / "config.json"
    with suppress(OSError, ValueError, AttributeError):
        stored = json.loads(config.read_text(encoding="utf-8")).get("annotation") or {}
        names = stored.get("labels", {}) if kind == "labels" else [term["name"] for term in stored.get("tissues", [])]
        return [str(name) for name in names]
    return []


def columns_of(path: Path) -> list[str]:
    """List the columns of `obs` of an `.h5ad` file, without the index."""
    import h5py

    with suppress(OSError, KeyError), h5py.File(path) as file:
        obs = file["obs"]
        names = obs.dtype.names if isinstance(obs, h5py.Dataset) else obs.attrs.get("column-order", list(obs))
        return [str(name) for name in names if name not in ("_index", "index", "__categories")]
    return []


def matching(names: Sequence[str], word: str) -> list[str]:
    r"""List the names that begin with a word of a command line, ignoring case, quoted for the shell.

    >>> matching(["B cell", "T cell"], "b"), matching(["B cell"], r"B\ c"), matching(["B cell"], '"B c')
    (['B\\ cell'], ['B\\ cell'], ['B cell'])
    >>> matching(["$(ls)"], '"'), matching(["5' end"], "'5")
    (['\\$(ls)'], ["5'\\'' end"])
    """
    start = word[1:] if word[:1] == "'" else re.sub(r"\\(.)", r"\1", word.removeprefix('"'))
    matches = [name for name in names if name.casefold().startswith(start.casefold())]
    if word[:1] == "'":
        return [name.replace("'", r"'\''") for name in matches]
    special = r'(["$`\\])' if word[:1] == '"' else r"([^\w@%+=:,./-])"  # a file may have a column `$(command)`
    return [re.sub(special, r"\\\1", name) for name in matches]


if __name__ == "__main__":
    kind, word, *line = sys.argv[1:]
    sys.stdout.writelines(f"{name}\n" for name in matching(values(kind, line), word))
