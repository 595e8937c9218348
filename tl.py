"""Tools in the style of scverse: functions that add their results to an AnnData.

    import scmmgpt as sm

    adata = sm.read("cells.h5ad")
    sm.tl.annotate(adata, model="CHECKPOINT")     # obs["scmmgpt_cell_type"], obs["scmmgpt_evidence"], ...
    sm.pl.umap(adata)

Each tool is a verb of [`ScMMGPTPipeline`] with the additional argument `model`: a folder, an id on the Hub, or a
pipeline. Without `model`, the environment variable `SCMMGPT_MODEL` names the checkpoint. Without the variable, the
checkpoint of this package is used. The last two checkpoints stay loaded. With `copy=True` a tool returns a copy of
`adata` with the results, and `adata` does not change.
"""

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from scmmgpt.audit_scmmgpt import Audit
from scmmgpt.commands.chat import Chat
from scmmgpt.commands.checkpoints import check_checkpoint, root_checkpoint
from scmmgpt.evidence_scmmgpt import Evidence
from scmmgpt.pipeline_scmmgpt import READ_OPTIONS, ScMMGPTPipeline


Model: TypeAlias = str | os.PathLike | ScMMGPTPipeline | None
LOADED = 2  # number of checkpoints that stay in memory


def load(model: Model = None, device: str | None = None) -> ScMMGPTPipeline:
    """The pipeline of a checkpoint, loaded at the first call. A given pipeline is returned.

    Raises:
        FileNotFoundError: If the checkpoint does not exist, or no checkpoint is named and the package has none.
    """
    if isinstance(model, ScMMGPTPipeline):
        return model
    name = model or os.environ.get("SCMMGPT_MODEL") or root_checkpoint()
    path = Path(name).expanduser()
    if not (path / "config.json").is_file():
        return _load(os.fspath(name), device, 0)
    return _load(str(path.resolve()), device, (path / "config.json").stat().st_mtime_ns)


@functools.lru_cache(maxsize=LOADED)
def _load(name: str, device: str | None, changed: int) -> ScMMGPTPipeline:
    check_checkpoint(name)
    return ScMMGPTPipeline.from_pretrained(name, device=device)


def _copy(adata: Any) -> Any:
    """A copy in memory, also of an AnnData on disk."""
    return adata.to_memory() if getattr(adata, "isbacked", False) else adata.copy()


def annotate(
    adata: Any,
    labels: dict[str, str] | Sequence[str] | None = None,
    *,
    model: Model = None,
    evidence: bool = True,
    copy: bool = False,
    device: str | None = None,
    **options: Any,
) -> Any:
    """Name the type of every cell, and the genes that speak for the type.

    Args:
        labels: Candidates; by default all labels of the checkpoint.
        evidence: Also add the genes by [`explain`], if the checkpoint has a label readout.
        options: Options of [`ScMMGPTPipeline.annotate`].
        adata, model, copy, device: See the module.

    Returns:
        None, or with `copy` the new AnnData.
    """
    pipeline, adata = load(model, device), _copy(adata) if copy else adata
    pipeline.annotate(adata, labels, **options)
    if evidence and pipeline.can_explain:
        key = options.get("key_added", "scmmgpt")
        shared = {name: options[name] for name in ("cluster_key", "key_added", *READ_OPTIONS) if name in options}
        pipeline.explain(adata, f"{key}_cell_type", **shared)
    return adata if copy else None


def explain(
    adata: Any,
    label_key: str = "scmmgpt_cell_type",
    *,
    model: Model = None,
    device: str | None = None,
    **options: Any,
) -> Evidence:
    """Name the genes that speak for the label of every cell; see [`ScMMGPTPipeline.explain`]."""
    return load(model, device).explain(adata, label_key, **options)


def audit(adata: Any, label_key: str, *, model: Model = None, device: str | None = None, **options: Any) -> Audit:
    """Check given labels by file, model and markers; see [`ScMMGPTPipeline.audit`]."""
    return load(model, device).audit(adata, label_key, **options)


def describe(adata: Any, *, model: Model = None, copy: bool = False, device: str | None = None, **options: Any) -> Any:
    """Describe every cell in words; see [`ScMMGPTPipeline.describe`]. Returns None, or the copy."""
    adata = _copy(adata) if copy else adata
    load(model, device).describe(adata, **options)
    return adata if copy else None


def embed(adata: Any, *, model: Model = None, copy: bool = False, device: str | None = None, **options: Any) -> Any:
    """Embed every cell in `obsm["X_scmmgpt"]`; see [`ScMMGPTPipeline.embed`]. Returns None, or the copy."""
    adata = _copy(adata) if copy else adata
    load(model, device).embed(adata, **options)
    return adata if copy else None


def search(
    adata: Any,
    text: str | Sequence[str] | None = None,
    *,
    model: Model = None,
    device: str | None = None,
    **options: Any,
) -> list:
    """Find the cells that fit a text, or with `like` the cells similar to others; see [`ScMMGPTPipeline.search`]."""
    return load(model, device).search(adata, text, **options)


def chat(adata: Any, select: Any = None, *, model: Model = None, device: str | None = None, **options: Any) -> Chat:
    """Ask questions about cells, `chat.ask("Why not NK cells?").text`; see [`Chat`]."""
    return Chat(load(model, device), adata, select, **options)


def generate(
    prompts: str | Sequence[str] | dict[str, str], *, model: Model = None, device: str | None = None, **options: Any
) -> Any:
    """Generate cells from descriptions, as a new AnnData; see [`ScMMGPTPipeline.generate`]."""
    return load(model, device).generate(prompts, **options)


def verify(path: str | os.PathLike, *, model: Model = None, device: str | None = None) -> dict[str, Any]:
    """Compute the results in a file again and report changes; see `scmmgpt.commands.verify.verify_file`.

    By default `model` is the checkpoint that the receipts in the file name.
    """
    from scmmgpt.commands.verify import checkpoint_of, verify_file

    path = Path(path)
    return verify_file(path, load(checkpoint_of(path) if model is None else model, device))
