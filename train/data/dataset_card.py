"""The README of a corpus: a dataset card of the Hub."""

import string
from pathlib import Path

import datasets
from datasets.info import DatasetInfosDict
from huggingface_hub import DatasetCardData

from scmmgpt.train.data.corpus import SPECIAL_TOKENS, SPLITS, Manifest, features_of


TEMPLATE = Path(__file__).parent / "templates" / "dataset_card.md"
SIZE_EDGES = ("1", "10", "100", "1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B")  # size categories of the Hub


def dataset_card(name: str, manifest: Manifest) -> str:
    """Return the card of the corpus `name`: how to load it, its schema, splits, sources and licences."""
    shards = {split: found for split in SPLITS if (found := [s for s in manifest.shards if s.split == split])}
    licences = sorted({source["licence"] for source in manifest.sources})
    size = len(str(max(manifest.n_cells, 1))) - 1  # largest power of ten that is no larger
    dropped = [f"{n:,} cells ({reason.replace('_', ' ')})" for reason, n in manifest.dropped["cells"].items() if n]
    excluded = manifest.excluded_datasets
    return string.Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        name=name,
        licence=licences[0] if len(licences) == 1 and licences != ["unknown"] else "other",
        size_category="n<1K" if size < 3 else f"{SIZE_EDGES[size]}<n<{SIZE_EDGES[size + 1]}",
        data_files="\n".join(f"  - split: {split}\n    path: data/{split}-*.parquet" for split in shards),
        dataset_info=dataset_info(manifest),
        n_cells=f"{manifest.n_cells:,}",
        n_sources=f"{len(manifest.sources)} source{'s' if len(manifest.sources) > 1 else ''}",
        n_genes=f"{manifest.vocabulary_size - len(SPECIAL_TOKENS):,}",
        schema_version=manifest.schema_version,
        splits="\n".join(
            f"| {split} | {sum(s.n_cells for s in found):,} | {len(found)} | {sum(s.n_bytes for s in found):,} |"
            for split, found in shards.items()
        ),
        split_unit=manifest.split_by,
        split_why=manifest.notes["split"],
        excluded=f"Left out on purpose, for evaluation: {', '.join(excluded)}." if excluded else "",
        sources="\n".join(
            f"| {s['name']} | {s['n_kept']:,} | {s['genes']['matched']:,} of {s['genes']['measured']:,} "
            f"| {s['values']['kind']} | {s['licence']} |"
            for s in manifest.sources
        ),
        dropped=", ".join(dropped) or "nothing",
        command=manifest.command,
    )


def dataset_info(manifest: Manifest) -> str:
    """YAML of features and sizes; `datasets` reads it in place of the shards."""
    splits = datasets.SplitDict()
    for split in SPLITS:
        shards = [shard for shard in manifest.shards if shard.split == split]
        if shards:
            n_bytes, n_cells = sum(shard.n_bytes for shard in shards), sum(shard.n_cells for shard in shards)
            splits.add(datasets.SplitInfo(split, num_bytes=n_bytes, num_examples=n_cells))
    sizes = {"download_size": manifest.n_bytes, "dataset_size": manifest.n_bytes}
    info = datasets.DatasetInfo(features=features_of(manifest), splits=splits, **sizes)
    data = DatasetCardData()
    DatasetInfosDict({"default": info}).to_dataset_card_data(data)
    return data.to_yaml()
