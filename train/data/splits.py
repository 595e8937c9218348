"""Divide cells into train, validation and test: by whole datasets, else by whole donors, else by single cells."""

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
    """Divide datasets or donors ("units") among the splits.

    1. Shuffle the units. 2. Test takes every unit that fits into the rest of its share. Validation does the same with
    the remaining units. 3. A split into which no unit fits takes the smallest remaining unit. All other units train.

    Args:
        units: `(dataset_id, donor_id or None, n_cells)` of every donor of every dataset.
        fractions: Share of the cells for `"test"` and `"validation"`.
        by: `"dataset"`, `"donor"`, `"cell"`, or `"auto"`: datasets if there are at least three, else donors if there
            are at least three, else cells.

    Returns:
        Content of `splits.json`: `by`, `why`, and the `units` of each split (none for `by="cell"`).
    """
    datasets: Counter[tuple[str, ...]] = Counter()
    donors: Counter[tuple[str, ...]] = Counter()
    for dataset, donor, n_cells in units:
        datasets[(dataset,)] += n_cells
        donors[(dataset, donor or "")] += n_cells  # cells of a dataset without a donor stay together
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

    `ids` are the identities, uint64 `(n_cells,)`. The number of cells is rounded for each type, but a split with a
    share gets at least one cell of a type of three or more.

    Returns:
        Cell type -> `[test, validation]` cut-offs. Cells with a hash below the first belong to test, and other cells
        with a hash below the second to validation.
    """
    keys = cell_keys(ids, seed=seed, epoch=0, stream=RandomStream.SPLIT)
    codes, names = pd.factorize(np.array([name or "" for name in cell_types], dtype=object), sort=True)
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
    """Return the split of every cell as an index into `SPLITS`, int8 `(n_cells,)`, by the content of `splits.json`.

    `obs` has `dataset_id`, `donor_id` and the resolved `cell_type`; `ids` are identities, uint64 `(n_cells,)`;
    `column` names every cell's split, for `by="column"`.
    """
    if column is not None:
        return np.array([_split_index(value) for value in column], dtype=np.int8)
    if splits["by"] == "cell":
        keys = cell_keys(ids, seed=splits["seed"], epoch=0, stream=RandomStream.SPLIT)
        cutoffs = [splits["cutoffs"][name or ""] for name in obs["cell_type"]]
        limits = np.array(cutoffs, dtype=np.uint64).reshape(-1, 2)
        test, validation, train = (SPLITS.index(name) for name in ("test", "validation", "train"))
        return np.where(keys < limits[:, 0], test, np.where(keys < limits[:, 1], validation, train)).astype(np.int8)
    split_of = {tuple(unit): SPLITS.index(name) for name, members in splits["units"].items() for unit in members}
    units = [obs["dataset_id"]]
    if splits["by"] == "donor":
        units.append(obs["donor_id"].fillna("").astype(str))
    return np.array([split_of[unit] for unit in zip(*units, strict=True)], dtype=np.int8)


def _split_index(value: Any) -> int:
    name = "" if ontology.is_missing(value) else str(value).strip().lower()
    name = SPELLINGS.get(name, name)
    if name not in SPLITS:
        raise ValueError(f"The split column has the value {value!r}; correct it in obs to one of {SPLITS}.")
    return SPLITS.index(name)
