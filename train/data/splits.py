"""Which cells train, validate and test: whole datasets where they are known, else whole donors, else single cells."""

import numpy as np
import pandas as pd

from scmmgpt.cells_scmmgpt import RandomStream, cell_keys, hash_names
from scmmgpt.train.data import ontology
from scmmgpt.train.data.corpus import SPLITS


SPELLINGS = {"val": "validation", "valid": "validation", "dev": "validation", "eval": "validation"}
MIN_UNITS = 3  # one for each split


def split_units(units, fractions, *, by="auto", seed=0):
    """Divide datasets or donors among the splits.

    Units are taken in a random order, and given to the test split, then to validation, as long as they fit into the
    split's share; if none fits, the smallest one left is given. What remains trains.

    Args:
        units: `(dataset_id, donor_id or None, n_cells)` of every donor of every dataset.
        fractions: Share of the cells for `"test"` and `"validation"`.
        by: `"dataset"`, `"donor"`, `"cell"`, or `"auto"`: datasets if there are at least three, else donors if there
            are, else cells.
        seed: Seed of the order.

    Returns:
        Content of `splits.json`: `by`, `why`, and the `units` of each split; for `by="cell"` without units.
    """
    datasets, donors = {}, {}
    for dataset, donor, n_cells in units:
        datasets[(dataset,)] = datasets.get((dataset,), 0) + n_cells
        # Cells of a dataset that names no donor for them stay together.
        key = (dataset, donor or "")
        donors[key] = donors.get(key, 0) + n_cells
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
    content = {"by": by, "why": why, "seed": seed, "fractions": dict(fractions)}
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
    chosen = {name: [] for name in SPLITS}
    for name in ("test", "validation"):
        room = fractions[name] * total
        for unit in [u for u in order if u not in chosen["test"]] if room else []:
            if left[unit] <= room:
                chosen[name].append(unit)
                room -= left[unit]
        taken = len(chosen["test"]) + len(chosen["validation"])
        if fractions[name] and not chosen[name] and len(order) - taken > 1:
            remaining = [u for u in order if u not in chosen["test"]]
            chosen[name] = [min(remaining, key=lambda unit: left[unit])]
    held_out = {*chosen["test"], *chosen["validation"]}
    chosen["train"] = [unit for unit in order if unit not in held_out]
    return content | {"units": {name: sorted(list(unit) for unit in members) for name, members in chosen.items()}}


def split_cells(ids, cell_types, fractions, *, seed=0):
    """Divide single cells, the same share of every cell type, by cut-offs of a hash of the cell's identity.

    Args:
        ids: uint64 `(n_cells,)`.
        cell_types: Their types, sequence of `n_cells` of str or None.
        fractions: Share of the cells for `"test"` and `"validation"`. Rounded by type, but a type of at least three
            cells has one in each split that asks for any.
        seed: Seed of the hash.

    Returns:
        Cell type -> `[cut-off of test, cut-off of validation]`: cells whose hash is below the first test, and those
        below the second validate.
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


def assign_splits(obs, ids, splits, column=None):
    """Split of every cell, as indices into `SPLITS`.

    Args:
        obs: Frame with `dataset_id`, `donor_id` and the resolved `cell_type`.
        ids: uint64 `(n_cells,)`.
        splits: Content of `splits.json`.
        column: Values of the column that says the split, for `by="column"`.
    """
    if splits["by"] == "column":
        return np.array([_spelled(value) for value in column], dtype=np.int8)
    if splits["by"] == "cell":
        keys = cell_keys(ids, seed=splits["seed"], epoch=0, stream=RandomStream.SPLIT)
        cutoffs = splits["cutoffs"]
        limits = np.array([cutoffs[name or ""] for name in obs["cell_type"]], dtype=np.uint64).reshape(-1, 2)
        test, validation, train = (SPLITS.index(name) for name in ("test", "validation", "train"))
        return np.where(keys < limits[:, 0], test, np.where(keys < limits[:, 1], validation, train)).astype(np.int8)
    split_of = {tuple(unit): SPLITS.index(name) for name, members in splits["units"].items() for unit in members}
    if splits["by"] == "dataset":
        units = [(name,) for name in obs["dataset_id"]]
    else:
        units = list(zip(obs["dataset_id"], obs["donor_id"].fillna("").astype(str), strict=True))
    return np.array([split_of[unit] for unit in units], dtype=np.int8)


def _spelled(value):
    name = None if ontology.is_missing(value) else str(value).strip().lower()
    name = SPELLINGS.get(name, name)
    if name not in SPLITS:
        raise ValueError(f"The split column holds {value!r}; its values must be among {SPLITS}. Correct it in obs.")
    return SPLITS.index(name)
