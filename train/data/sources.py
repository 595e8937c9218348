"""Where cells come from: files of one dataset each, or a filtered slice of the CELLxGENE Census.

A `SourceSpec` describes a source as plain data for workers, which open the source by `open_source`. Both kinds of
source read any range of cells alone, rename obs to the columns of the corpus, and convert values to counts by one
`InputChoice` for the whole source.
"""

import dataclasses
import difflib
import functools
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from scmmgpt.cells_scmmgpt import Cells, hash_names
from scmmgpt.genes_scmmgpt import GeneIndex
from scmmgpt.readers.cell_files import read_file
from scmmgpt.reading_scmmgpt import InputChoice, choose_input
from scmmgpt.train.data import ontology
from scmmgpt.train.data.corpus import OBS_COLUMNS, SMALL_CORPUS_BYTES, hash_file
from scmmgpt.train.data.label_checks import clean_label


# The Census has no barcodes; its `observation_joinid` identifies a cell across releases.
CENSUS_COLUMNS = (*(name for name in OBS_COLUMNS if name != "barcode"), "observation_joinid")
N_SAMPLED_CELLS = 512  # cells of a Census slice from which matrix, kind of values and genes are chosen


@dataclasses.dataclass(frozen=True)
class SourceSpec:
    """A source as plain data."""

    kind: str  # "file" or "census"
    name: str  # short; also the dataset id of cells without one
    path: str  # the file, the URI of a SOMA, or a Census release such as `2025-01-30`
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)  # corpus column -> obs column, if they differ
    constants: Mapping[str, str] = dataclasses.field(default_factory=dict)  # corpus column -> value for all cells
    licence: str | None = None  # default: as the source's metadata state
    # Arguments of `choose_input` for a file; `organism`, `value_filter` and `joinids` (an `.npy` file) for the Census.
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # Cell type in the source's own words -> Cell Ontology id, or None for a label that names no type. A label that is
    # not listed is refused.
    labels: Mapping[str, str | None] | None = None

    def __hash__(self) -> int:  # hashes the content, because workers cache open sources by their specs
        return hash(json.dumps(dataclasses.asdict(self), sort_keys=True))


class FileSource:
    """One file of cells of any format that `readers.read_file` opens; its rows stay on disk."""

    def __init__(self, spec: SourceSpec) -> None:
        self.spec = spec
        self.adata = read_file(spec.path, backed=True)
        self.n_cells = self.adata.n_obs
        check_columns(spec, list(self.adata.obs))

    def obs(self, start: int = 0, stop: int | None = None) -> pd.DataFrame:
        """Return obs of a range of cells in the columns of the corpus, with the source's own labels."""
        return _standard_obs(self.adata.obs.iloc[start:stop], self.spec)

    def column(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return the values of any obs column."""
        if name not in self.adata.obs:
            raise ValueError(f"{self.spec.path} has no obs column {name!r}; it has {list(self.adata.obs)}.")
        return self.adata.obs[name].iloc[start:stop].to_numpy(dtype=object)

    def choose(self, gene_index: GeneIndex) -> InputChoice:
        """Choose the matrix, its kind of values and its genes on a sample of the rows."""
        return choose_input(self.adata, gene_index, **self.spec.options)

    def cells(self, start: int, stop: int, choice: InputChoice) -> Cells:
        """Return the counts of a range of cells, by `choice`."""
        return choice.convert(self.adata[start:stop])

    def provenance(self) -> dict[str, Any]:
        """Return size, checksum, licence and citation of the file, for the manifest."""
        record: dict[str, Any] = {"bytes": fingerprint(self.spec)["bytes"]}
        if Path(self.spec.path).is_file() and record["bytes"] <= SMALL_CORPUS_BYTES:
            record["sha256"] = hash_file(self.spec.path)
        texts = {key: value for key, value in self.adata.uns.items() if isinstance(value, str) and value}
        record["licence"] = self.spec.licence or texts.get("licence") or texts.get("license") or "unknown"
        return record | {key: texts[key] for key in ("title", "citation", "schema_version") if key in texts}


class CensusSource:
    """Cells of the CELLxGENE Census, or of a SOMA of the same layout, that pass a value filter.

    `find_joinids` lists the cells once, so that cell i is the same cell for every worker.
    """

    def __init__(self, spec: SourceSpec) -> None:
        self.spec = spec
        self.joinids = np.load(spec.options["joinids"], mmap_mode="r")
        self.n_cells = len(self.joinids)
        self._census = open_census(spec.path)
        self._obs = self._census["census_data"][spec.options["organism"]].obs
        check_columns(spec, list(self._obs.keys()))
        wanted = (*CENSUS_COLUMNS, *spec.columns.values())
        self._columns = [name for name in dict.fromkeys(wanted) if name in self._obs.keys()]

    def _read_obs(self, start: int, stop: int | None, columns: list[str]) -> pd.DataFrame:
        joinids = np.asarray(self.joinids[start:stop])
        frame = self._obs.read(coords=(joinids,), column_names=["soma_joinid", *columns]).concat().to_pandas()
        return frame.set_index("soma_joinid", drop=False).loc[joinids]

    def _read(self, joinids: np.ndarray) -> Any:
        """Read an AnnData of some cells, in the order of their joinids."""
        import cellxgene_census

        adata = cellxgene_census.get_anndata(
            self._census,
            self.spec.options["organism"],
            obs_coords=np.asarray(joinids),
            obs_column_names=["soma_joinid", *self._columns],
            var_column_names=["feature_id", "feature_name"],
        )
        adata.obs.index = _census_names(adata.obs)
        if not np.array_equal(adata.obs["soma_joinid"], joinids):
            raise ValueError(
                f"{self.spec.path} returned other cells than the {len(joinids)} requested. Give the command again."
            )
        return adata

    def obs(self, start: int = 0, stop: int | None = None) -> pd.DataFrame:
        """Return obs of a range of cells in the columns of the corpus, with the source's own labels."""
        frame = self._read_obs(start, stop, self._columns)
        return _standard_obs(frame.set_index(_census_names(frame)), self.spec)

    def column(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return the values of any obs column."""
        return self._read_obs(start, stop, [name])[name].to_numpy(dtype=object)

    def choose(self, gene_index: GeneIndex) -> InputChoice:
        """Choose the matrix, its kind of values and its genes on a sample of the cells."""
        sampled = np.unique(np.linspace(0, self.n_cells - 1, min(self.n_cells, N_SAMPLED_CELLS)).astype(int))
        return choose_input(self._read(self.joinids[sampled]), gene_index)

    def cells(self, start: int, stop: int, choice: InputChoice) -> Cells:
        """Return the counts of a range of cells, by `choice`."""
        return choice.convert(self._read(self.joinids[start:stop]))

    def provenance(self) -> dict[str, Any]:
        """Return licence, filter and release of the slice, for the manifest."""
        info: dict[str, Any] = {"licence": self.spec.licence or "cc-by-4.0"}  # of all CELLxGENE Discover data
        info |= {name: self.spec.options[name] for name in ("organism", "value_filter")}
        summary = self._census["census_info"]["summary"] if "census_info" in self._census else None
        if summary is not None:
            frame = summary.read().concat().to_pandas()
            info["census"] = dict(zip(frame["label"].astype(str), frame["value"].astype(str), strict=True))
        return info

    def citations(self, dataset_ids: Iterable[str]) -> dict[str, str]:
        """Return the citation of each dataset that has one in the Census."""
        if "census_info" not in self._census or "datasets" not in self._census["census_info"]:
            return {}
        frame = self._census["census_info"]["datasets"].read().concat().to_pandas()
        if "citation" not in frame:
            return {}
        found = dict(zip(frame["dataset_id"].astype(str), frame["citation"].astype(str), strict=True))
        return {name: found[name] for name in dataset_ids if name in found}


def _census_names(frame: pd.DataFrame) -> pd.Index:
    return pd.Index(frame["observation_joinid" if "observation_joinid" in frame else "soma_joinid"].astype(str))


def open_census(release_or_uri: str) -> Any:
    """Open a Census release by its date, or any SOMA by its path or URI."""
    try:
        import cellxgene_census
    except ImportError as error:
        raise ImportError(
            "Reading the CELLxGENE Census needs `cellxgene-census`, which is not installed. Install `scmmgpt[census]`."
        ) from error
    if "/" in release_or_uri:
        return cellxgene_census.open_soma(uri=release_or_uri)
    if release_or_uri in ("stable", "latest"):
        raise ValueError(
            f"{release_or_uri!r} is another Census release every few months: the build could not be repeated or "
            "resumed. Pin one by its date, such as 2025-01-30."
        )
    return cellxgene_census.open_soma(census_version=release_or_uri)


def find_joinids(release_or_uri: str, organism: str, value_filter: str | None) -> np.ndarray:
    """Return the joinids of the cells of a Census that pass a filter, ascending int64 `(n_cells,)`."""
    census = open_census(release_or_uri)["census_data"]
    if organism not in census:
        raise ValueError(f"{release_or_uri} has no organism {organism!r}; it has {sorted(census.keys())}.")
    reader = census[organism].obs.read(value_filter=value_filter, column_names=["soma_joinid"])
    joinids = np.sort(reader.concat()["soma_joinid"].to_numpy())
    if not len(joinids):
        raise ValueError(f"No cell of {release_or_uri} ({organism}) passes the filter {value_filter!r}. Relax it.")
    return joinids


def check_columns(spec: SourceSpec, found: Sequence[str]) -> None:
    """Refuse a spec that names columns of obs which the source lacks: their values would all be unknown."""
    for name, column in spec.columns.items():
        if column not in found:
            near = difflib.get_close_matches(column, found, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            columns = ", ".join(map(str, found))
            raise ValueError(
                f"{spec.path} has no obs column {column!r} to take {name!r} from; it has {columns}.{hint}"
            )


Source = FileSource | CensusSource


def open_source(spec: SourceSpec) -> Source:
    """Open a source, or return the open source if its files have not changed since."""
    return _open(spec, tuple(fingerprint(spec).values()))


@functools.lru_cache(maxsize=4)  # the most files that one process keeps open
def _open(spec: SourceSpec, _fingerprint: tuple[int, ...]) -> Source:
    return FileSource(spec) if spec.kind == "file" else CensusSource(spec)


def fingerprint(spec: SourceSpec) -> dict[str, int]:
    """Return the size and the latest modification time (ns) of a source's files, which must not change in a build."""
    if spec.kind == "census":
        return {}
    path = Path(spec.path)
    if not path.exists():
        raise FileNotFoundError(f"There is no source file {path}. Correct the path.")
    stats = [file.stat() for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()]
    return {"bytes": sum(stat.st_size for stat in stats), "changed": max(stat.st_mtime_ns for stat in stats)}


def _standard_obs(frame: pd.DataFrame, spec: SourceSpec) -> pd.DataFrame:
    """Select and rename the columns of the corpus; unknown values are None."""
    columns: dict[str, Any] = {}
    for name in OBS_COLUMNS:
        source = spec.columns.get(name, name)
        # The source's ontology id may contradict the constant, so a constant replaces the label and the id.
        of_constant = name.removesuffix("_ontology_term_id") in spec.constants
        if source in frame and not of_constant:
            columns[name] = _cleaned(frame[source])
        else:
            columns[name] = spec.constants.get(name)
    standard = pd.DataFrame(columns, index=frame.index, columns=list(OBS_COLUMNS), dtype=object)
    standard["barcode"] = frame.index.astype(str)
    if spec.labels is not None:
        own = _own_labels(frame, spec)
        terms = {label: spec.labels[label] for label in set(own) if label is not None}
        standard["cell_type_ontology_term_id"] = [terms.get(label) for label in own]
        standard["cell_type"] = [label if terms.get(label) else None for label in own]
    standard["dataset_id"] = [spec.name if ontology.is_missing(name) else str(name) for name in standard["dataset_id"]]
    standard["donor_id"] = [None if ontology.is_missing(name) else str(name) for name in standard["donor_id"]]
    return standard


def _own_labels(frame: pd.DataFrame, spec: SourceSpec) -> np.ndarray:
    """Cell types in the words of the source, object `(n_cells,)`; refuses a label that `spec.labels` does not list."""
    column = spec.columns.get("cell_type", "cell_type")
    own = np.array([None if ontology.is_missing(name) else str(name) for name in frame[column]], dtype=object)
    unknown = sorted({name for name in own if name is not None} - set(spec.labels or {}))
    if unknown:
        raise ValueError(
            f"{spec.path} has the labels {unknown[:5]} in {column!r}, which the table of labels lacks. Add them, with "
            "null for a label that names no cell type."
        )
    return own


def _cleaned(column: pd.Series) -> np.ndarray:
    """Cleaned labels, None where the value is missing, object `(n_cells,)`."""
    codes, values = pd.factorize(column.astype(object))  # -1 where missing
    return np.array([*map(clean_label, values), None], dtype=object)[codes]


def resolve_labels(obs: pd.DataFrame, report: dict[str, Any] | None = None) -> pd.DataFrame:
    """Return a copy of obs with labels and ids replaced by ontology terms; resolve each distinct pair once.

    Args:
        obs: Frame with every column of `ontology.ONTOLOGIES` and its column of ids.
        report: Mapping to extend, obs column -> `cells` (number of cells by `ontology.Term.how`) and the labels that
            were `renamed`, `unmatched`, or in `conflicts` with their id.
    """
    obs, report = obs.copy(), {} if report is None else report
    for column in ontology.ONTOLOGIES:
        partner = f"{column}_ontology_term_id"
        labels, label_values = pd.factorize(obs[column])  # -1 where missing
        ids, id_values = pd.factorize(obs[partner])
        pairs, cells = np.unique((labels + 1) * (len(id_values) + 1) + ids + 1, return_inverse=True)
        n_cells = np.bincount(cells, minlength=len(pairs))
        entry, terms = report.setdefault(column, {"cells": Counter()}), []
        for pair, n in zip(pairs.tolist(), n_cells.tolist(), strict=True):
            label_code, id_code = divmod(pair, len(id_values) + 1)
            label = label_values[label_code - 1] if label_code else None
            term = ontology.resolve(column, label, id_values[id_code - 1] if id_code else None)
            terms.append(term)
            entry["cells"][term.how] += n
            if term.how == "unmatched":
                entry.setdefault("unmatched", Counter())[str(label)] += n
            elif term.how == "conflict":
                entry.setdefault("conflicts", Counter())[f"{label} / {term.term_id} {term.name}"] += n
            elif term.name != label and label is not None:
                entry.setdefault("renamed", {})[str(label)] = f"{term.name} ({term.term_id}, by {term.how})"
        obs[column] = np.array([term.name for term in terms], dtype=object)[cells]
        obs[partner] = np.array([term.term_id for term in terms], dtype=object)[cells]
    return obs


def cell_ids(obs: pd.DataFrame) -> np.ndarray:
    """Hash dataset id and barcode (barcodes alone repeat) to the identity of each cell, uint64 `(n_cells,)`."""
    return hash_names((obs["dataset_id"] + "/" + obs["barcode"]).to_numpy().astype(np.str_))
