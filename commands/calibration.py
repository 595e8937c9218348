"""Fit matching weight and temperature of a checkpoint on validation cells, and store them in its configuration."""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scmmgpt.commands.files import check_file, read_json, whole_file
from scmmgpt.records_scmmgpt import need_columns


if TYPE_CHECKING:
    from scmmgpt.pipeline_scmmgpt import ScMMGPTPipeline


def check_config(checkpoint: str) -> None:
    """Refuse a checkpoint that is not a folder here, or whose configuration cannot be written."""
    config_file = Path(checkpoint) / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(f"No config.json in {checkpoint!r}: name the folder of a checkpoint to write to.")
    check_file(config_file)


def calibrate_checkpoint(
    pipeline: "ScMMGPTPipeline", adata: Any, checkpoint: str, source: Path, label_key: str, reading: dict[str, Any]
) -> dict[str, Any]:
    """Calibrate on the cells of `source`, write the configuration, and return the numbers of the fit.

    The labels of the cells become those of the checkpoint; of a corpus, those of the training split are among them.
    """
    from scmmgpt.train.data.captions import CaptionSampler
    from scmmgpt.train.data.ontology import label_terms, tissues_of

    before = (pipeline.model.config.annotation or {}).get("labels") or {}
    labelled = adata.obs
    if (source / "manifest.json").is_file():  # the labels of the training split are candidates too
        from scmmgpt.train.data.corpus import open_corpus

        labelled = open_corpus(source).obs("train").to_pandas()
    need_columns(labelled, label_key)
    id_key = f"{label_key}_ontology_term_id"
    table = labelled.assign(**({} if id_key in labelled else {id_key: None}))[[label_key, id_key]]
    table = table.astype(object).where(table.notna(), None).drop_duplicates(label_key).sort_values(label_key)
    ids = {str(label): term for label, term in table.itertuples(index=False) if label is not None}
    sampler = CaptionSampler()
    labels = {label: sampler.label_text(label, term) for label, term in ids.items()}
    cl_ids = {label: term for label, term in ids.items() if term}
    lost = sorted(set(before) - set(labels))
    if lost:
        logging.getLogger("scmmgpt").warning(
            f"{len(lost)} of the {len(before)} labels that the checkpoint had are none of {source}, and no longer "
            f"its labels ({', '.join(map(repr, lost[:3]))}{', ...' if len(lost) > 3 else ''})."
        )
    known = {"terms": label_terms(ids), "tissues": tissues_of(labelled, labelled[label_key])}
    pipeline.model.config.annotation = {**(pipeline.model.config.annotation or {}), **known}
    done = pipeline.calibrate(adata, label_key, labels, cl_ids=cl_ids, **reading)

    config_file = Path(checkpoint) / "config.json"
    config = read_json(config_file, dict)
    config["annotation"] = pipeline.model.config.annotation
    with whole_file(config_file) as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    names = ("matching_weight", "temperature", "nll", "accuracy", "n_cells", "n_left_out")
    return {"model": str(checkpoint), "labels": len(labels), **{name: done[name] for name in names}}
