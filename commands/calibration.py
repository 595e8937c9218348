"""Fit the matching weight and temperature of a checkpoint on validation cells, and store them in `config.json`."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scmmgpt.annotation_scmmgpt import least_error_rate
from scmmgpt.commands.files import check_file, read_json, whole_file
from scmmgpt.expression_scmmgpt import share
from scmmgpt.labels_scmmgpt import trained_labels_of
from scmmgpt.records_scmmgpt import MISSING, need_columns, words_of


if TYPE_CHECKING:
    from scmmgpt.pipeline_scmmgpt import ScMMGPTPipeline

LOW_ACCURACY = 0.5  # of the fit, below which a warning asks for the column of labels
GIVEN = "scmmgpt_given"  # a temporary column of obs


def check_config(checkpoint: str) -> None:
    """Refuse a checkpoint that is not a local folder, or whose configuration is not writable.

    Raises:
        FileNotFoundError: If there is no `config.json`.
        OSError: If `config.json` cannot be written.
    """
    config_file = Path(checkpoint) / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(f"No config.json in {checkpoint!r}. Pass the local folder of a checkpoint.")
    check_file(config_file)


def calibrate_checkpoint(
    pipeline: "ScMMGPTPipeline", adata: Any, checkpoint: str, source: Path, label_key: str, reading: dict[str, Any]
) -> dict[str, Any]:
    """Calibrate a checkpoint on labelled cells, and write its configuration.

    A checkpoint of `finetune` or `release` keeps its labels; the labels of the cells may be synonyms of them. Any
    other checkpoint gets the labels of the cells or, if `source` is a corpus, those of its training split.

    Args:
        pipeline: The checkpoint.
        adata: The validation cells.
        checkpoint: Folder of the checkpoint.
        source: File or corpus of the cells.
        label_key: Column of `obs` with the labels.
        reading: Options of reading, passed to `pipeline.calibrate`.

    Returns:
        The numbers of the fit, the number of labels, and the least error rate that the number of cells allows.

    Raises:
        ValueError: If no label of the cells means a label of the checkpoint, or all cells have one label.
    """
    stored = pipeline.model.config.annotation or {}
    if pipeline.can_explain and "similarity_weight" in stored:
        words = trained_words(words_of(adata.obs, label_key), stored, label_key)
        if len(found := set(words.tolist()) & set(stored["labels"])) == 1:
            raise ValueError(
                f"obs[{label_key!r}] has one label of the checkpoint only, {found.pop()!r}: probabilities are fitted "
                "on cells of several labels. Name another column by --label-key, or take cells of more types."
            )
        adata.obs[GIVEN] = words
        done = pipeline.calibrate(adata, GIVEN, **reading)
    else:
        done = _calibrate_anew(pipeline, adata, source, label_key, reading)
    if done["accuracy"] < LOW_ACCURACY:
        logging.getLogger("scmmgpt").warning(
            f"In {share(done['accuracy'])} of the cells only, obs[{label_key!r}] has the label that the checkpoint "
            "gives. Check the column: with wrong labels, all probabilities become low. `config.json` has new values."
        )
    config_file = Path(checkpoint) / "config.json"
    config = read_json(config_file, dict)
    config["annotation"] = pipeline.model.config.annotation
    with whole_file(config_file) as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    names = ("matching_weight", "temperature", "nll", "accuracy", "n_cells", "n_left_out")
    summary = {"model": str(checkpoint), "labels": len(done["labels"]), **{name: done[name] for name in names}}
    return {**summary, "least_error_rate": least_error_rate(done["n_cells"])}


def trained_words(given: np.ndarray, stored: Mapping[str, Any], label_key: str) -> np.ndarray:
    """Replace the label of each cell by the trained label with the same meaning.

    A label that means no trained label, or several, is kept.

    Args:
        given: Label of each cell, str `(n_cells,)`.
        stored: `config.annotation`, with `labels` and `terms`.
        label_key: Column of the labels, for messages.

    Returns:
        str `(n_cells,)`.

    Raises:
        ValueError: If no label means exactly one trained label.
    """
    names, numbers = np.unique(given, return_inverse=True)
    known, terms = list(stored["labels"]), stored.get("terms", [])
    meant = [trained_labels_of(str(name), None, known, terms) for name in names]
    if not any(len(labels) == 1 for labels in meant):
        raise ValueError(
            f"None of the {len(names)} labels of obs[{label_key!r}] ({str(names[0])!r}, ...) is a label of the "
            f"checkpoint ({', '.join(map(repr, known[:3]))}, ...). "
            "Train new labels with `python -m scmmgpt.train finetune`."
        )
    of_name = [labels[0] if len(labels) == 1 else str(name) for name, labels in zip(names, meant, strict=True)]
    if left := [str(name) for name, labels in zip(names, meant, strict=True) if len(labels) != 1 and name != MISSING]:
        shown = ", ".join(map(repr, left[:3])) + (", ..." if len(left) > 3 else "")
        logging.getLogger("scmmgpt").warning(
            f"{len(left)} of {len(names)} labels of obs[{label_key!r}] {'does' if len(left) == 1 else 'do'} not match "
            f"exactly one label of the checkpoint ({shown}). Their cells are left out."
        )
    return np.asarray(of_name, dtype=str)[numbers]


def _calibrate_anew(
    pipeline: "ScMMGPTPipeline", adata: Any, source: Path, label_key: str, reading: dict[str, Any]
) -> dict[str, Any]:
    """Calibrate, and replace the labels of the checkpoint by those of the cells."""
    from scmmgpt.train.data.captions import CaptionSampler
    from scmmgpt.train.data.ontology import label_terms, tissues_of

    before = (pipeline.model.config.annotation or {}).get("labels") or {}
    labelled = adata.obs
    if (source / "manifest.json").is_file():  # a corpus: the labels of the training split are the candidates
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
            f"{len(lost)} of the {len(before)} labels of the checkpoint are not labels of {source}, and are removed "
            f"({', '.join(map(repr, lost[:3]))}{', ...' if len(lost) > 3 else ''})."
        )
    known = {"terms": label_terms(ids), "tissues": tissues_of(labelled, labelled[label_key])}
    pipeline.model.config.annotation = {**(pipeline.model.config.annotation or {}), **known}
    return pipeline.calibrate(adata, label_key, labels, cl_ids=cl_ids, **reading)
