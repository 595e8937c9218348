"""The model card of a checkpoint, `README.md`: training data, origins, metrics and limits.

The content comes from the run: the corpus's manifest, the arguments, and the trainer's log.
"""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.constants import EVAL_RESULTS_FOLDER

from scmmgpt.train.data.corpus import Corpus, Manifest


DEMO_CELLS = 100_000  # with fewer training cells, the card calls the checkpoint a demonstration
TITLES = {
    "align": "cells aligned with texts (stage 1)",
    "tune": "cells described and generated (stage 2)",
    "base": "stage 2 before its training, for an adapter",
    "reinforce": "cells described and generated, with descriptions rewarded for truth (stage 3)",
}
TAGS = ["biology", "single-cell", "scrna-seq", "scmmgpt"]
LIMITS = (
    "The model names the likeliest of the given labels; a low score is the only sign that no label fits a cell. "
    "The model is not a medical device. Predictions for cell types, tissues and assays outside its training cells are "
    "extrapolations."
)

USE = """```python
from transformers import AutoModel, AutoProcessor

revision = "main"  # on the Hub, pin a commit: the code of the checkpoint runs on your machine
model = AutoModel.from_pretrained("{name}", revision=revision, trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{name}", revision=revision, trust_remote_code=True)
```"""
# PEFT loads the base that `adapter_config.json` names; a base in another place is loaded by hand.
ADAPTER_USE = """The adapter belongs to the base `{base}` and to no other weights. It holds LoRA of the language
model and the parts that were trained in full.

```python
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM

revision = "main"  # on the Hub, pin a commit
model = AutoPeftModelForCausalLM.from_pretrained("{name}", revision=revision, trust_remote_code=True)  # and its base

base = AutoModelForCausalLM.from_pretrained("{base}", revision="{base_revision}", trust_remote_code=True)  # or a copy
model = PeftModel.from_pretrained(base, "{name}", revision=revision)
```"""


def write_card(
    output_dir: str | os.PathLike,
    command: str,
    corpus: Corpus,
    log_history: list[dict],
    *,
    repo_id: str | None = None,
    adapter_base: str | None = None,
    base_revision: str | None = None,
    **bases: str | None,
) -> Path:
    """Write `README.md` into the folder of a checkpoint or an adapter; return the path of the file.

    The card has the last value of every `eval_` metric in the log of the trainer. Metrics of a corpus of the Hub are
    also written in the Hub's format for evaluation results.

    Args:
        command: A key of `TITLES`.
        repo_id: Name on the Hub; default: name of the folder.
        adapter_base, base_revision: Name and commit of the base, if the folder holds an adapter.
        bases: Part -> the checkpoint that initialised it; `None` for a new part.
    """
    manifest = corpus.manifest
    cells: Counter[str] = Counter()
    for shard in manifest.shards:
        cells[shard.split] += shard.n_cells
    metrics = {name: value for line in log_history for name, value in line.items() if is_measured(name)}
    started_from = bases.values() if adapter_base is None else [adapter_base]
    # The licence depends on the initial parts (Llama-2 has its own licence), which the card lists.
    dataset, name = corpus.repo_id or corpus.path.name, repo_id or Path(output_dir).absolute().name
    data = ModelCardData(
        model_name=name,
        eval_results=[result_of(name, value, dataset) for name, value in metrics.items()] or None,
        library_name="transformers" if adapter_base is None else "peft",
        pipeline_tag="feature-extraction" if command == "align" else "image-text-to-text",
        tags=TAGS if adapter_base is None else [*TAGS, "lora"],
        base_model=[base for base in started_from if base is not None and is_hub_id(base)] or adapter_base,
        datasets=None if corpus.repo_id is None else [corpus.repo_id],
        license="other",
    )
    sections = [f"# scMMGPT: {TITLES[command]}{'' if adapter_base is None else ', LoRA adapter'}"]
    if cells["train"] < DEMO_CELLS:
        sections.append(
            f"**A demonstration.** The model was trained on {cells['train']:,} cells, enough to show that each step "
            "works, and too few for use on other data."
        )
    if adapter_base is None:
        sections += ["## Use", USE.format(name=name)]
    else:
        use = ADAPTER_USE.format(name=name, base=adapter_base, base_revision=base_revision or "main")
        sections += ["## Use", use]
    sections += ["## Data", describe_data(manifest, cells), "## Started from"]
    # Licences of the bases are not recorded.
    sections.append("\n".join(f"- {part.replace('_', ' ')}: {base or 'new'}" for part, base in bases.items()))
    sections.append("Parts that are not new keep their licences.")
    sections += ["## Measured", describe_metrics(metrics, manifest, cells), "## Limits", LIMITS]
    if corpus.repo_id is not None and metrics:
        entries = [EvalResultEntry(dataset, name, value, notes="validation split") for name, value in metrics.items()]
        results = Path(output_dir, EVAL_RESULTS_FOLDER, f"{command}.yaml")
        results.parent.mkdir(exist_ok=True)
        results.write_text(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False), encoding="utf-8")
    path = Path(output_dir, "README.md")
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n").save(path)
    return path


def result_of(name: str, value: float, dataset: str) -> EvalResult:
    """Convert a validation metric to an entry of the Hub's metadata."""
    measured = name.removeprefix("eval_")
    kinds = {"zero_shot": "zero-shot-classification", "recall": "text-retrieval"}
    task = next((task for word, task in kinds.items() if word in measured), "other")
    words: dict[str, Any] = {"task_type": task, "metric_type": measured, "metric_name": measured.replace("_", " ")}
    return EvalResult(
        dataset_type=dataset, dataset_name=dataset, dataset_split="validation", metric_value=value, **words
    )


def is_measured(name: str) -> bool:
    """Whether a logged number is a metric of the model, not a speed of the machine."""
    return name.startswith("eval_") and not name.endswith(("runtime", "per_second"))


def is_hub_id(base: str) -> bool:
    """Whether a base is a Hub id, `owner/name`, rather than a file or package of this machine."""
    return base.count("/") == 1 and ":" not in base and not Path(base).exists()


def describe_data(manifest: Manifest, cells: Counter[str]) -> str:
    """List the cells by split, the sources with licences, and the hashes of vocabulary and splits."""
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


def describe_metrics(metrics: dict[str, float], manifest: Manifest, cells: Counter[str]) -> str:
    """Table of the last validation metrics."""
    if not metrics:
        return "Training recorded no validation metrics."
    split = f"{cells['validation']:,} validation cells of splits `{(manifest.splits_hash or 'none')[:16]}`"
    rows = [f"| {name.removeprefix('eval_').replace('_', ' ')} | {value:.4g} |" for name, value in metrics.items()]
    return "\n".join([f"On the {split}:", "", "| | |", "| --- | ---: |", *rows])
