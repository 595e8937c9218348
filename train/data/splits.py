"""Division of cells into train, validation and test: by whole datasets, else by whole donors, else by single cells."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from scmmgpt.cells_scmmgpt import RandomStream, cell_keys, hash_names
from scmmgpt.train.data import ontology
from scmmgpt.train.data.corpus import SPLITS


SPELLINGS = {"val": "validation", "valid": "validation", "dev": "validation", "eval": "validation"}
MIN_UNITS = 3  # one for each split


def split_units(
    units: Iterable[Sequence[Any]], fractions: Mapping[str, float], *, by: str = "auto", seed: int = 0
) -> dict[str, Any]:
    """Divide datasets or donors among the splits.

    Units come in a random order. Each goes to the test split if it fits into what is left of that split's share; of
    the others, each goes to validation in the same way. A split into which no unit fits takes the smallest one that
    is left. All other units train.

    Args:
        units: `(dataset_id, donor_id or None, n_cells)` of every donor of every dataset.
        fractions: Share of the cells for `"test"` and `"validation"`.
        by: `"dataset"`, `"donor"`, `"cell"`, or `"auto"`: datasets if there are at least three, else donors if there
            are at least three, else cells.
        seed: Seed of the order.

    Returns:
        Content of `splits.json`: `by`, `why`, and the `units` of each split; for `by="cell"` without units.
    """
    datasets: Counter[tuple[str, ...]] = Counter()
    donors: Counter[tuple[str, ...]] = Counter()
    for dataset, donor, n_cells in units:
        datasets[(dataset,)] += n_cells
        donors[(dataset, donor or "")] += n_cells  # cells of a dataset that names no donor for them stay together
    why = "asked for"
    if by == "auto":
        if len(datasets) >= MIN_UNITS:
            by, why = "dataset", f"there are {len(datasets)} datasets"
        elif len(donors) >= MIN_UNITS:
            by, why = "donor", f"there are only {len(datasets)} datasets, but {len(donors)} donors"
        elif len(donors) == 1:
            by, why = "cell", "there is one dataset, and no donors are known"
        else:
            by = "dataset" if len(datasets) > 1 else "donor"
            why = f"there are only {len(donors)} {by}s: the smaller one is the test split"
    content: dict[str, Any] = {"by": by, "why": why, "seed": seed, "fractions": dict(fractions)}
    if by == "cell":
        return content
    left = datasets if by == "dataset" else donors
    if len(left) < 2:
        raise ValueError(
            f"All {sum(left.values())} cells belong to one {by}, so they cannot be split by {by}. "
            "Use another `--split-by`, or `--test-fraction 0 --validation-fraction 0` to train on all."
        )
    total = sum(left.values())
    names = hash_names(["/".join(unit) for unit in left])
    keys = cell_keys(names, seed=seed, epoch=0, stream=RandomStream.SPLIT)
    order = [unit for _, unit in sorted(zip(keys.tolist(), left, strict=True))]
    chosen: dict[str, list[tuple[str, ...]]] = {name: [] for name in SPLITS}
    for name in ("test", "validation"):
        room = fractions[name] * total
        for unit in order if room else []:
            if left[unit] <= room:
                chosen[name].append(unit)
                room -= left[unit]
        if room and not chosen[name] and len(order) > 1:
            chosen[name] = [min(order, key=lambda unit: left[unit])]
        order = [unit for unit in order if unit not in chosen[name]]
    chosen["train"] = order
    return content | {"units": {name: sorted(list(unit) for unit in members) for name, members in chosen.items()}}


def split_cells(
    ids: np.ndarray, cell_types: Iterable[str | None], fractions: Mapping[str, float], *, seed: int = 0
) -> dict[str, list[int]]:
    """Divide single cells, the same share of every cell type, by cut-offs of a hash of the cell's identity.

    Args:
        ids: uint64 `(n_cells,)`.
        cell_types: Their types, `n_cells` of str or None.
        fractions: Share of the cells for `"test"` and `"validation"`. The number of cells is rounded for each type,
            but each split with a share gets at least one cell of a type of three or more.
        seed: Seed of the hash.

    Returns:
        Cell type -> `[cut-off of test, cut-off of validation]`. Cells whose hash is below the first cut-off test, and
        those between the two validate.
    """
    keys = cell_keys(ids, seed=seed, epoch=0, stream=RandomStream.SPLIT)
    codes, names = pd.factorize(
        np.array(["" if name is None else name for name in cell_types], dtype=object), sort=True
    )
    cutoffs = {}
    for code, name in enumerate(names):
        ordered = np.sort(keys[codes == code])
        stops, stop = [], 0
        for split in ("test", "validation"):
            n = round(fractions[split] * len(ordered))
            stop += max(n, 1) if fractions[split] and len(ordered) >= MIN_UNITS else n
            stops.append(int(ordered[stop]) if stop < len(ordered) else 2**64 - 1)
        cutoffs[name] = stops
    return cutoffs


def assign_splits(
    obs: pd.DataFrame, ids: np.ndarray, splits: Mapping[str, Any], column: np.ndarray | None = None
) -> np.ndarray:
    """Split of every cell, as indices into `SPLITS`, int8 `(n_cells,)`.

    Args:
        obs: Frame with `dataset_id`, `donor_id` and the resolved `cell_type`.
        ids: uint64 `(n_cells,)`.
        splits: Content of `splits.json`.
        column: The split of every cell in words, for `by="column"`.
    """
    if column is not None:
        return np.array([_spelled(value) for value in column], dtype=np.int8)
    if splits["by"] == "cell":
        keys = cell_keys(ids, seed=splits["seed"], epoch=0, stream=RandomStream.SPLIT)
        cutoffs = splits["cutoffs"]
        limits = np.array([cutoffs[name or ""] for name in obs["cell_type"]], dtype=np.uint64).reshape(-1, 2)
        test, validation, train = (SPLITS.index(name) for name in ("test", "validation", "train"))
        return np.where(keys < limits[:, 0], test, np.where(keys < limits[:, 1], validation, train)).astype(np.int8)
    split_of = {tuple(unit): SPLITS.index(name) for name, members in splits["units"].items() for unit in members}
    if splits["by"] == "dataset":
        units = [obs["dataset_id"]]
    else:
        units = [obs["dataset_id"], obs["donor_id"].fillna("").astype(str)]
    return np.array([split_of[unit] for unit in zip(*units, strict=True)], dtype=np.int8)


def _spelled(value: Any) -> int:
    name = "" if ontology.is_missing(value) else str(value).strip().lower()
    name = SPELLINGS.get(name, name)
    if name not in SPLITS:
        raise ValueError(f"The split column holds {value!r}; its values must be among {SPLITS}. Correct it in obs.")
    return SPLITS.index(name)
