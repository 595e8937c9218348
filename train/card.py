"""The model card of a checkpoint, `README.md`: its training data, its origins, its measured numbers, its limits.

Everything is read from the run itself: the corpus's manifest, the arguments, and the trainer's log.
"""

from collections import Counter
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from scmmgpt.train.data.corpus import Corpus, Manifest


DEMO_CELLS = 100_000  # trained on fewer, a checkpoint shows that everything runs, and little else
TITLES = {"align": "cells aligned with texts (stage 1)", "tune": "cells described and generated (stage 2)"}
TAGS = ["biology", "single-cell", "scrna-seq", "scmmgpt"]
LIMITS = (
    "It names the likeliest of the labels it is given and cannot say that a cell is none of them, except by a low "
    "score. It is no medical device. Cell types, tissues and assays that its training cells lack are extrapolated."
)


def write_card(output_dir: str, command: str, corpus: Corpus, log_history: list[dict], **bases: str | None) -> Path:
    """Write `README.md` beside a checkpoint.

    Args:
        output_dir: The checkpoint.
        command: `align` or `tune`.
        corpus: The training data.
        log_history: The trainer's; the card has the last value of every `eval_` number.
        bases: Part -> the checkpoint that it started from; `None` for a new part.

    Returns:
        The file.
    """
    manifest = corpus.manifest
    cells: Counter[str] = Counter()
    for shard in manifest.shards:
        cells[shard.split] += shard.n_cells
    metrics = {name: value for line in log_history for name, value in line.items() if is_measured(name)}
    hub_ids = [base for base in bases.values() if base is not None and is_hub_id(base)]
    # The licence follows the parts that the weights start from (Llama-2 has its own); the text names these parts.
    data = ModelCardData(library_name="transformers", tags=TAGS, base_model=hub_ids or None, license="other")
    sections = [f"# scMMGPT: {TITLES[command]}"]
    if cells["train"] < DEMO_CELLS:
        sections.append(
            f"**A demonstration.** It was trained on {cells['train']:,} cells, enough to show that each step works "
            "and not enough for use on other data."
        )
    sections += ["## Data", describe_data(manifest, cells), "## Started from", describe_bases(bases)]
    sections += ["## Measured", describe_metrics(metrics, manifest, cells), "## Limits", LIMITS]
    path = Path(output_dir, "README.md")
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n").save(path)
    return path


def is_measured(name: str) -> bool:
    """Whether a logged number describes the model rather than the machine."""
    return name.startswith("eval_") and not name.endswith(("runtime", "per_second"))


def is_hub_id(base: str) -> bool:
    """Whether a base is a name on the Hub, `owner/name`, and no file or package of this machine."""
    return base.count("/") == 1 and ":" not in base and not Path(base).exists()


def describe_data(manifest: Manifest, cells: Counter[str]) -> str:
    """Cells by split, sources and their licences, and the hashes that identify both."""
    sources = [(source.get("name", "unnamed"), source.get("licence") or "not stated") for source in manifest.sources]
    lines = [
        f"{sum(cells.values()):,} cells ({', '.join(f'{split} {n:,}' for split, n in cells.items())}), divided by "
        f"{manifest.split_by or 'a given list'}, over a vocabulary of {manifest.vocabulary_size:,} tokens.",
        "",
        *(f"- {name}: licence {licence}" for name, licence in sources),
        "",
        f"Vocabulary `{manifest.vocabulary_hash[:16]}`, splits `{(manifest.splits_hash or 'none')[:16]}` (sha256).",
    ]
    return "\n".join(lines)


def describe_bases(bases: dict[str, str | None]) -> str:
    """Each part's origin. Licences are their owners' and are not known here."""
    lines = [f"- {part.replace('_', ' ')}: {base or 'new'}" for part, base in bases.items()]
    return "\n".join([*lines, "", "Parts that are not new keep the licences of those who made them."])


def describe_metrics(metrics: dict[str, float], manifest: Manifest, cells: Counter[str]) -> str:
    """The last validation numbers, and of which split."""
    if not metrics:
        return "Nothing was measured while training."
    split = f"{cells['validation']:,} validation cells of splits `{(manifest.splits_hash or 'none')[:16]}`"
    rows = [f"| {name.removeprefix('eval_').replace('_', ' ')} | {value:.4g} |" for name, value in metrics.items()]
    return "\n".join([f"On the {split}:", "", "| | |", "| --- | ---: |", *rows])
