"""Where cells come from: files of one dataset each, or a filtered slice of the CELLxGENE Census.

A `SourceSpec` describes a source as plain data, which travels to workers; `open_source` opens the source there. Both
kinds of source read any range of their cells without the rest, give obs in the columns of the corpus, and convert
values to counts by an `InputChoice`, made once for the whole source.
"""

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from scmmgpt.cells_scmmgpt import Cells, hash_names
from scmmgpt.genes_scmmgpt import GeneIndex
from scmmgpt.readers import read_file
from scmmgpt.reading_scmmgpt import InputChoice, choose_input
from scmmgpt.train.data import ontology
from scmmgpt.train.data.corpus import OBS_COLUMNS, SMALL_CORPUS_BYTES, hash_file


CENSUS_LICENCE = "cc-by-4.0"  # all CELLxGENE Discover data
# The Census has no barcodes; its `observation_joinid` identifies a cell across releases.
CENSUS_COLUMNS = (*(name for name in OBS_COLUMNS if name != "barcode"), "observation_joinid")
N_SAMPLED_CELLS = 512  # of a Census slice, to choose how to read it


@dataclasses.dataclass(frozen=True)
class SourceSpec:
    """A source as plain data.

    Args:
        kind: `"file"` or `"census"`.
        name: Short name; the dataset id of cells that have none of their own.
        path: The file, or the URI of a SOMA, or a Census release such as `2025-01-30`.
        columns: Corpus column -> the source's obs column that holds it, where the names differ.
        constants: Corpus column -> value for all cells.
        licence: Licence of the data, or None if the source says.
        options: Arguments of `choose_input` for a file; `organism`, `value_filter` and `joinids` (an `.npy` file) for
            the Census.
    """

    kind: str
    name: str
    path: str
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    constants: Mapping[str, str] = dataclasses.field(default_factory=dict)
    licence: str | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        """The spec as text, which also identifies it."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "SourceSpec":
        """The spec that `to_json` wrote."""
        return cls(**json.loads(text))


class FileSource:
    """One file of cells of any format that `readers.read_file` opens, its rows read when they are asked for."""

    def __init__(self, spec: SourceSpec) -> None:
        self.spec = spec
        self.adata = read_file(spec.path, backed=True)
        self.n_cells = self.adata.n_obs

    def obs(self, start: int = 0, stop: int | None = None) -> pd.DataFrame:
        """Obs of a range of cells in the columns of the corpus, labels as the source gives them."""
        return _standard_obs(self.adata.obs.iloc[start:stop], self.spec)

    def column(self, name: str, start: int, stop: int) -> np.ndarray:
        """Values of any obs column."""
        if name not in self.adata.obs:
            raise ValueError(f"{self.spec.path} has no obs column {name!r}; it has {list(self.adata.obs)}.")
        return self.adata.obs[name].iloc[start:stop].to_numpy(dtype=object)

    def choose(self, gene_index: GeneIndex) -> InputChoice:
        """How to read the counts, decided on a sample of the rows."""
        return choose_input(self.adata, gene_index, **self.spec.options)

    def cells(self, start: int, stop: int, choice: InputChoice) -> Cells:
        """Counts of a range of cells, read as chosen."""
        return choice.convert(self.adata[start:stop])

    def provenance(self) -> dict[str, Any]:
        """What identifies the file and its terms of use."""
        path = Path(self.spec.path)
        n_bytes = sum(file.stat().st_size for file in _files_of(path))
        found: dict[str, Any] = {"bytes": n_bytes}
        if path.is_file() and n_bytes <= SMALL_CORPUS_BYTES:
            found["sha256"] = hash_file(path)
        licence = self.spec.licence
        for key in ("licence", "license"):
            licence = licence or _text(self.adata.uns.get(key))
        found["licence"] = licence or "unknown"
        for key in ("title", "citation", "schema_version"):
            if text := _text(self.adata.uns.get(key)):
                found[key] = text
        return found


class CensusSource:
    """Cells of the CELLxGENE Census, or of a SOMA laid out like it, that pass a value filter.

    Their joinids are listed once, by `find_joinids`, so that cell i is the same cell for every worker.
    """

    def __init__(self, spec: SourceSpec) -> None:
        self.spec = spec
        self.joinids = np.load(spec.options["joinids"], mmap_mode="r")
        self.n_cells = len(self.joinids)
        self._census = open_census(spec.path)
        self._obs = self._census["census_data"][spec.options["organism"]].obs

    def _known_columns(self) -> list[str]:
        return [name for name in CENSUS_COLUMNS if name in self._obs.keys()]

    def _read_obs(self, start: int, stop: int | None, columns: list[str]) -> pd.DataFrame:
        joinids = np.asarray(self.joinids[start:stop])
        frame = self._obs.read(coords=(joinids,), column_names=["soma_joinid", *columns]).concat().to_pandas()
        return frame.set_index("soma_joinid", drop=False).loc[joinids]

    def _read(self, joinids: np.ndarray) -> Any:
        """The AnnData of some cells."""
        import cellxgene_census

        adata = cellxgene_census.get_anndata(
            self._census,
            self.spec.options["organism"],
            obs_coords=np.asarray(joinids),
            obs_column_names=["soma_joinid", *self._known_columns()],
            var_column_names=["feature_id", "feature_name"],
        )
        adata.obs.index = _census_names(adata.obs)
        if not np.array_equal(adata.obs["soma_joinid"], joinids):
            raise ValueError(f"{self.spec.path} returned other cells than the {len(joinids)} asked for.")
        return adata

    def obs(self, start: int = 0, stop: int | None = None) -> pd.DataFrame:
        """Obs of a range of cells in the columns of the corpus, labels as the source gives them."""
        frame = self._read_obs(start, stop, self._known_columns())
        frame.index = _census_names(frame)
        return _standard_obs(frame, self.spec)

    def column(self, name: str, start: int, stop: int) -> np.ndarray:
        """Values of any obs column."""
        return self._read_obs(start, stop, [name])[name].to_numpy(dtype=object)

    def choose(self, gene_index: GeneIndex) -> InputChoice:
        """How to read the counts, decided on a sample of the cells."""
        sampled = np.unique(np.linspace(0, self.n_cells - 1, min(self.n_cells, N_SAMPLED_CELLS)).astype(int))
        return choose_input(self._read(self.joinids[sampled]), gene_index)

    def cells(self, start: int, stop: int, choice: InputChoice) -> Cells:
        """Counts of a range of cells, read as chosen."""
        return choice.convert(self._read(self.joinids[start:stop]))

    def provenance(self) -> dict[str, Any]:
        """What identifies the slice and its terms of use."""
        info: dict[str, Any] = {"licence": self.spec.licence or CENSUS_LICENCE}
        info |= {name: self.spec.options[name] for name in ("organism", "value_filter")}
        summary = self._census["census_info"]["summary"] if "census_info" in self._census else None
        if summary is not None:
            frame = summary.read().concat().to_pandas()
            info["census"] = dict(zip(frame["label"].astype(str), frame["value"].astype(str), strict=True))
        return info

    def citations(self, dataset_ids: Iterable[str]) -> dict[str, str]:
        """Citation of each dataset, where the Census gives them."""
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
            f"{release_or_uri!r} is another Census release every few months, and this build could not be repeated or "
            "resumed. Pin one by its date, such as 2025-01-30."
        )
    return cellxgene_census.open_soma(census_version=release_or_uri)


def find_joinids(release_or_uri: str, organism: str, value_filter: str | None) -> np.ndarray:
    """List the cells of a Census that pass a filter, as ascending int64 joinids."""
    census = open_census(release_or_uri)["census_data"]
    if organism not in census:
        raise ValueError(f"{release_or_uri} has no organism {organism!r}; it has {sorted(census.keys())}.")
    reader = census[organism].obs.read(value_filter=value_filter, column_names=["soma_joinid"])
    joinids = np.sort(reader.concat()["soma_joinid"].to_numpy())
    if not len(joinids):
        raise ValueError(f"No cell of {release_or_uri} ({organism}) passes the filter {value_filter!r}.")
    return joinids


Source = FileSource | CensusSource


def open_source(spec: SourceSpec) -> Source:
    """Open a source, or return it if this process has it open and it has not changed since."""
    return _open(spec.to_json(), json.dumps(fingerprint(spec)))


@functools.lru_cache(maxsize=4)  # files that one process keeps open
def _open(spec_json: str, _fingerprint: str) -> Source:
    spec = SourceSpec.from_json(spec_json)
    return FileSource(spec) if spec.kind == "file" else CensusSource(spec)


def _files_of(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def fingerprint(spec: SourceSpec) -> dict[str, int]:
    """What must not change between the parts of one build: size and time of change of a source's files."""
    if spec.kind == "census":
        return {}
    files = _files_of(Path(spec.path))
    if not Path(spec.path).exists():
        raise FileNotFoundError(f"There is no source file {spec.path}.")
    return {"bytes": sum(f.stat().st_size for f in files), "changed": max(f.stat().st_mtime_ns for f in files)}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _standard_obs(frame: pd.DataFrame, spec: SourceSpec) -> pd.DataFrame:
    """Select and name the columns of the corpus; what a source does not say is None."""
    columns = {}
    for name in OBS_COLUMNS:
        source = spec.columns.get(name, name)
        if source in frame:
            columns[name] = frame[source].astype(object).where(frame[source].notna(), None)
        else:
            columns[name] = spec.constants.get(name)
    standard = pd.DataFrame(columns, index=frame.index, columns=list(OBS_COLUMNS), dtype=object)
    standard["barcode"] = frame.index.astype(str)
    standard["dataset_id"] = [spec.name if ontology.is_missing(name) else str(name) for name in standard["dataset_id"]]
    standard["donor_id"] = [None if ontology.is_missing(name) else str(name) for name in standard["donor_id"]]
    return standard


def resolve_labels(obs: pd.DataFrame, report: dict[str, Any] | None = None) -> pd.DataFrame:
    """Replace labels and ids by ontology terms, each distinct pair looked up once.

    Args:
        obs: Frame with every column of `ontology.ONTOLOGIES` and its partner of ids.
        report: Is filled, or added to, by column: `cells`, numbers of cells by how their label was resolved, and the
            labels that were `renamed`, `unmatched` or in `conflicts` with their id.

    Returns:
        A copy of the frame with these columns resolved.
    """
    obs, report = obs.copy(), {} if report is None else report
    for column in ontology.ONTOLOGIES:
        partner = f"{column}_ontology_term_id"
        labels, label_values = pd.factorize(obs[column])  # -1 where missing
        ids, id_values = pd.factorize(obs[partner])
        pairs, cells = np.unique((labels + 1) * (len(id_values) + 1) + ids + 1, return_inverse=True)
        n_cells = np.bincount(cells, minlength=len(pairs))
        found, terms = report.setdefault(column, {"cells": {}}), []
        for pair, n in zip(pairs.tolist(), n_cells.tolist(), strict=True):
            label_code, id_code = divmod(pair, len(id_values) + 1)
            label = label_values[label_code - 1] if label_code else None
            term = ontology.resolve(column, label, id_values[id_code - 1] if id_code else None)
            terms.append(term)
            _add(found["cells"], term.how, n)
            if term.how == "unmatched":
                _add(found.setdefault("unmatched", {}), str(label), n)
            elif term.how == "conflict":
                _add(found.setdefault("conflicts", {}), f"{label} / {term.term_id} {term.name}", n)
            elif term.name != label and label is not None:
                found.setdefault("renamed", {})[str(label)] = f"{term.name} ({term.term_id}, by {term.how})"
        obs[column] = np.array([term.name for term in terms], dtype=object)[cells]
        obs[partner] = np.array([term.term_id for term in terms], dtype=object)[cells]
    return obs


def _add(counts: dict[str, int], key: str, n: int) -> None:
    counts[key] = counts.get(key, 0) + n


def cell_ids(obs: pd.DataFrame) -> np.ndarray:
    """Identity of each cell in the corpus, `uint64 (n_cells,)`, by dataset and barcode: barcodes alone repeat."""
    return hash_names((obs["dataset_id"] + "/" + obs["barcode"]).to_numpy().astype(np.str_))
