"""Labels of cells for fine-tuning, texts of labels, and held-out splits."""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold, StratifiedShuffleSplit

from scmmgpt.readers.label_lists import read_label_list
from scmmgpt.train.arguments import FinetuneDataArguments
from scmmgpt.train.data import ontology
from scmmgpt.train.data.captions import CaptionSampler
from scmmgpt.train.data.label_checks import clean_label, count_labels, label_warnings


logger = logging.getLogger(__name__)


@dataclass
class Labels:
    """Labels of the labelled rows of an AnnData."""

    rows: np.ndarray  # int64 (n_labelled,): rows of the AnnData with a label
    targets: np.ndarray  # int64 (n_labelled,): positions in `names`
    names: list[str]  # sorted
    texts: list[str]  # the description of each label
    cl_ids: dict[str, str]  # label -> Cell Ontology id, where known
    tissues: list[dict[str, Any]]  # see `ontology.tissues_of`


def column_of(obs: Any, name: str) -> np.ndarray:
    """Read a column of `obs` as cleaned strings, None where the value is missing, object `(n_obs,)`."""
    if name not in obs:
        raise ValueError(f"obs has no column {name!r}; it has {', '.join(map(str, obs.columns))}.")
    values = np.asarray(obs[name], dtype=object)
    return np.array([None if ontology.is_missing(value) else clean_label(value) for value in values], dtype=object)


def read_labels(obs: Any, data_args: FinetuneDataArguments) -> Labels:
    """Read the labels of the cells, and their texts: given texts, or else name and definition in the Cell Ontology."""
    values = column_of(obs, data_args.label_key)
    rows = np.flatnonzero(values != None)  # noqa: E711 (elementwise)
    unique, targets = np.unique(values[rows].astype(str), return_inverse=True)
    labels = unique.tolist()
    if len(labels) < 2:
        raise ValueError(
            f"obs[{data_args.label_key!r}] has {len(labels)} labels {labels}; fine-tuning needs two or more."
        )
    counts = count_labels(values)
    one_each = data_args.shots == 1 and set(counts.values()) == {1}  # with `--shots 1`, single cells are intended
    for warning in () if one_each else label_warnings(counts, f"obs[{data_args.label_key!r}]"):
        logger.warning(warning)
    ids_key = data_args.ontology_key or f"{data_args.label_key}_ontology_term_id"
    ids: dict[str, str] = {}
    if data_args.ontology_key or ids_key in obs:
        id_of_cell = column_of(obs, ids_key)[rows]
        for number, name in enumerate(labels):
            ids_of_label = {value for value in id_of_cell[targets == number] if value}
            if len(ids_of_label) == 1:
                ids[name] = ids_of_label.pop()
    given: dict[str, str] = {}
    if data_args.label_texts:
        given = read_label_list(data_args.label_texts).texts
        unknown = sorted(set(given) - set(labels))
        if unknown:
            raise ValueError(f"{data_args.label_texts} describes {unknown[:5]}, but the labels are {labels[:5]}...")
    captions = CaptionSampler()
    texts = [given.get(name) or captions.label_text(name, ids.get(name)) for name in labels]
    # Two labels of one term have the same text; the names of the labels make the texts differ.
    texts = [f"{name}: {text}" if texts.count(text) > 1 else text for name, text in zip(labels, texts, strict=True)]
    return Labels(rows, targets, labels, texts, ids, ontology.tissues_of(obs.iloc[rows], values[rows]))


def hold_out(
    labels: Labels, groups: np.ndarray | None, data_args: FinetuneDataArguments, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Divide the labelled cells into a training part and a validation part; with `shots`, the latter is empty.

    No group is in both parts; `groups` are those of all rows of the AnnData, `(n_obs,)`, or None.

    Returns:
        Positions in `labels.rows` of the training part and of the validation part, int64, ascending.
    """
    everything = np.arange(len(labels.rows))
    counts = np.bincount(labels.targets)
    if data_args.shots is not None:
        return draw_shots(labels.targets, data_args.shots, np.random.default_rng(seed)), everything[:0]
    if counts.max() == 1:
        raise ValueError(
            f"Every label of obs[{data_args.label_key!r}] has a single cell, so none can be held out; train on all "
            "cells with --shots 1."
        )
    if groups is not None:
        return hold_out_groups(labels, groups[labels.rows].astype(str), data_args, seed)
    # A label with a single cell stays in training.
    common = everything[counts[labels.targets] > 1]
    n_validation = max(round(data_args.validation_share * len(common)), int((counts > 1).sum()))
    if len(common) < 2 * n_validation:
        raise ValueError(
            f"{len(everything)} labelled cells of {len(labels.names)} labels are too few to hold some out; train on "
            f"all cells with --shots {counts.max()}."
        )
    split = StratifiedShuffleSplit(1, test_size=n_validation, random_state=seed)
    _, held_out = next(split.split(common, labels.targets[common]))
    validation = np.sort(common[held_out])
    return np.setdiff1d(everything, validation), validation


def draw_shots(labels: np.ndarray, shots: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the rows of `shots` cells of every label (all cells if there are fewer), ascending."""
    chosen = [rng.permutation(np.flatnonzero(labels == label))[:shots] for label in np.unique(labels)]
    return np.sort(np.concatenate(chosen))


def hold_out_rest(labels: Labels, n_train: int, data_args: FinetuneDataArguments) -> tuple[np.ndarray, np.ndarray]:
    """Hold out the rows from `n_train` on, because the cells come with a validation split; see `hold_out`."""
    if data_args.shots is not None or data_args.group_key is not None:
        name = "shots" if data_args.shots is not None else "group_key"
        raise ValueError(f"{name} divides cells, but these come with a validation split; leave out one of the two.")
    is_train = labels.rows < n_train
    trained = set(labels.targets[is_train].tolist())
    if missing := [name for i, name in enumerate(labels.names) if i not in trained]:
        logger.warning("The training split has no cell of %s, which are held out and not trained.", missing[:5])
    return np.flatnonzero(is_train), np.flatnonzero(~is_train)


def hold_out_groups(
    labels: Labels, groups: np.ndarray, data_args: FinetuneDataArguments, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Hold out whole groups, with similar proportions of the labels in both parts; see `hold_out`.

    `groups` are those of the labelled cells, `(n_labelled,)`.
    """
    n_groups = len(np.unique(groups))
    if n_groups < 2:
        raise ValueError(
            f"obs[{data_args.group_key!r}] has one group, which cannot be divided; leave out --group_key."
        )
    pairs = np.unique(np.stack([labels.targets.astype(str), groups]), axis=1)
    groups_of_label = np.unique(pairs[0], return_counts=True)[1]
    if (groups_of_label == 1).all():
        raise ValueError(
            f"Every label of obs[{data_args.label_key!r}] is in one group of obs[{data_args.group_key!r}], so the "
            "labels of held-out groups have no training cells. Name a column whose groups share labels, such as the "
            "donor, or leave out --group_key."
        )
    if (groups_of_label == 1).any():
        logger.warning(
            f"{(groups_of_label == 1).sum()} of {len(labels.names)} labels occur in one group of "
            f"obs[{data_args.group_key!r}] only. Each of these labels is either trained or held out."
        )
    n_folds = min(n_groups, round(1 / data_args.validation_share), int(np.bincount(labels.targets).max()))
    folds = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
    return next(folds.split(labels.rows, labels.targets, groups))
