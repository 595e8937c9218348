"""Build a corpus: from files of cells, folders of them, or the CELLxGENE Census, to shuffled Parquet shards.

    python -m scmmgpt.train prepare --demo pbmc68k --output corpora/pbmc68k
    python -m scmmgpt.train prepare data/*.h5ad --output corpora/mine --workers 8
    python -m scmmgpt.train prepare ../shared/data --labels human --output corpora/human
    python -m scmmgpt.train prepare --census 2025-01-30 --filter "tissue_general == 'lung'" --output corpora/lung

Cells of all sources are mixed at random and divided into train, validation and test. The same command, given again
after a build was killed or ran out of disk, goes on where the build stopped. The corpus has the same bytes for any
number of workers.

`--labels TABLE.json` reads the files by a reviewed table: `sets`, file name without suffix -> `label_key` (column of
the source's own labels), `labels` (label -> Cell Ontology id, or null), `columns`, `constants`, `licence` and `paper`.
Files that the table does not name are left out. `--labels human` takes this package's table of public human datasets.

Processes of this machine do the work (`--workers`), or a Dask cluster whose workers see the same folders (`--cluster
tcp://host:8786`, extra `cluster`), started by SLURM, Kubernetes or SSH.
"""

import argparse
import logging
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scmmgpt.commands.checkpoints import check_ids
from scmmgpt.commands.errors import OneLineParser, number
from scmmgpt.commands.files import read_json
from scmmgpt.train.data.build import CorpusBuilder
from scmmgpt.train.data.corpus import OBS_COLUMNS, Manifest
from scmmgpt.train.data.gene_tables import package_file
from scmmgpt.train.data.sources import SourceSpec


logger = logging.getLogger(__name__)

# Only `--help-all` shows these options.
RARE_OPTIONS = (
    "organism all_data exclude_dataset min_genes seed cells_per_shard cells_per_partition cluster assume gene_column"
).split()
SOURCE_SUFFIXES = (".h5ad", ".h5mu", ".h5", ".loom")  # taken from folders; a table must be named itself

# Fields of a `SourceSpec`; `path` is (package, file).
TABLES = Path(__file__).parent / "tables"

DEMOS: dict[str, dict[str, Any]] = {
    "pbmc68k": {
        "path": ("scanpy", "datasets/10x_pbmc68k_reduced.h5ad"),
        "name": "pbmc68k_reduced",
        "columns": {"cell_type": "bulk_labels"},
        "constants": {"tissue": "blood", "disease": "normal", "assay": "10x 3' v1", "organism": "Homo sapiens"},
        "licence": "cc-by-4.0",  # 10x Genomics data sets
    }
}


def make_parser(prog: str = "python -m scmmgpt.train prepare") -> argparse.ArgumentParser:
    """Return the parser of the command."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser(prog=prog, description=__doc__, formatter_class=raw, rare=RARE_OPTIONS)
    source = parser.add_argument_group("sources")
    source.add_argument("sources", nargs="*", help="files of cells (.h5ad and others), or folders of them")
    source.add_argument("--demo", choices=sorted(DEMOS), help="real data of an installed package")
    source.add_argument("--census", metavar="RELEASE", help="date of a Census release, or URI of a SOMA")
    source.add_argument("--filter", help="Census cells to take, e.g. \"tissue_general == 'lung'\"")
    source.add_argument("--organism", default="homo_sapiens", help="Census organism")
    source.add_argument("--all-data", action="store_true", help="also take Census cells that are not primary data")
    source.add_argument("--layer", help="matrix of the files to read; default: the best one found")
    source.add_argument("--assume", help="what the matrix holds; default: as its values suggest")
    source.add_argument("--gene-column", help="var column of gene names; default: the best one found")
    repeats: dict[str, Any] = {"action": "append", "default": []}
    source.add_argument("--column", **repeats, metavar="NAME=COLUMN", help="obs column to take as NAME, repeatable")
    source.add_argument("--constant", **repeats, metavar="NAME=VALUE", help="value of NAME for all cells, repeatable")
    source.add_argument("--licence", **repeats, metavar="[SOURCE=]LICENCE", help="licence of the data, repeatable")
    source.add_argument("--labels", metavar="TABLE", help="reviewed table of labels and files, or `human`")
    source.add_argument("--exclude-dataset", **repeats, metavar="ID", help="dataset to leave out, repeatable")

    corpus = parser.add_argument_group("corpus")
    corpus.add_argument("--output", required=True, help="folder of the corpus")
    corpus.add_argument("--vocabulary", help="vocab.json of a model; default: all measured genes")
    corpus.add_argument("--min-genes", type=number(int, 0), default=1, help="leave out cells that express fewer genes")
    share, at_least_one = number(float, 0, 1), number(int, 1)
    units = ("auto", "dataset", "donor", "cell")
    corpus.add_argument("--split-by", choices=units, default="auto", help="unit that no two splits share")
    corpus.add_argument("--split-column", metavar="COLUMN", help="obs column with the values train, validation, test")
    corpus.add_argument("--test-fraction", type=share, help="share of the cells; default 0.05, for --demo 0.2")
    corpus.add_argument("--validation-fraction", type=share, help="share of the cells; default 0.05, for --demo 0.1")
    corpus.add_argument("--seed", type=number(int, 0), default=0, help="seed of the order of cells and of the splits")
    # At 1,500 genes a cell, a shard has about 130 MB, and a worker takes at most 1 GB of memory.
    corpus.add_argument("--cells-per-shard", type=at_least_one, default=65_536, help="most cells of a shard")
    corpus.add_argument(
        "--cells-per-partition", type=at_least_one, default=16_384, help="most cells in the memory of a worker"
    )

    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--workers", type=at_least_one, help="processes; default: one per core, or one for small files"
    )
    machine.add_argument("--cluster", metavar="ADDRESS", help="scheduler of a Dask cluster to build on")
    return parser


def main(args: argparse.Namespace) -> Manifest:
    """Build the corpus of these arguments, or finish its build; return its manifest."""
    specs = list_sources(args)
    default = {"test": 0.2, "validation": 0.1} if args.demo else {"test": 0.05, "validation": 0.05}
    given = {"test": args.test_fraction, "validation": args.validation_fraction}
    fractions = {split: default[split] if share is None else share for split, share in given.items()}
    if min(fractions.values()) < 0 or sum(fractions.values()) >= 1:
        raise ValueError(f"The fractions {fractions} must be at least 0, and leave cells to train on.")
    options = {"excluded_datasets": sorted(args.exclude_dataset), "min_genes": args.min_genes, "fractions": fractions}
    options |= {name: getattr(args, name) for name in ("split_by", "split_column", "seed", "cells_per_shard")}
    vocabulary = read_json(args.vocabulary, dict) if args.vocabulary else None
    if vocabulary is not None:
        check_ids(Path(args.vocabulary), vocabulary)
    builder = CorpusBuilder(Path(args.output), specs, vocabulary, options, args.cells_per_partition, _command(args))
    return builder.run(args.workers, args.cluster)


def list_sources(args: argparse.Namespace) -> list[SourceSpec]:
    """Return the sources of these arguments, in a fixed order."""
    if bool(args.sources) + bool(args.demo) + bool(args.census) != 1:
        raise ValueError("Name the sources: files or folders, `--demo`, or `--census`, and one kind at a time.")
    columns, constants = (_pairs(getattr(args, name), name) for name in ("column", "constant"))
    for name in [*columns, *constants]:
        if name not in OBS_COLUMNS:
            raise ValueError(f"{name!r} is not a column of a corpus; choose one of {', '.join(OBS_COLUMNS)}.")
    if args.demo:
        demo = DEMOS[args.demo]
        path = package_file(*demo["path"])
        if path is None:
            raise ImportError(f"The data of --demo {args.demo} come with {demo['path'][0]}. Install `scmmgpt[train]`.")
        return [SourceSpec("file", **demo | {"path": str(path)})]
    licences = dict(part.split("=", 1) if "=" in part else ("", part) for part in args.licence)  # "": of all sources
    if args.census:
        value_filter = None if args.all_data else "is_primary_data == True"
        if args.filter:
            value_filter = f"({args.filter}) and {value_filter}" if value_filter else args.filter
        name = f"census-{Path(args.census).name}"
        options = {"organism": args.organism, "value_filter": value_filter}
        constants = {"organism": args.organism.replace("_", " ").capitalize()} | constants
        return [SourceSpec("census", name, args.census, columns, constants, licences.get(""), options)]
    options = {"layer": args.layer, "assume": args.assume, "gene_column": args.gene_column}
    files = _expand(args.sources)
    names = name_sources(files)
    if args.labels is not None:
        return reviewed_sources(dict(zip(names, files, strict=True)), read_label_table(args.labels), options, licences)
    if unknown := sorted(licences.keys() - {"", *names}):
        raise ValueError(f"--licence names {unknown}, but the sources are called {', '.join(names)}.")
    return [
        SourceSpec("file", name, str(file), columns, constants, licences.get(name, licences.get("")), options)
        for file, name in zip(files, names, strict=True)
    ]


def read_label_table(name: str) -> dict[str, Any]:
    """Read the reviewed table of `--labels`: a JSON file, or `human`, a table of this package."""
    path = TABLES / f"{name}_sets.json" if name.isidentifier() else Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"There is no table of labels {str(path)!r}. Name a JSON file, or `human`.")
    table = read_json(path, dict)
    if not isinstance(table.get("sets"), dict):
        raise ValueError(f"{path} has no `sets`; `prepare --help` has the form of a table of labels.")
    return table


def reviewed_sources(
    files: Mapping[str, Path],
    table: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
    licences: Mapping[str, str] | None = None,
) -> list[SourceSpec]:
    """List the sources that a reviewed table names, with the columns, constants and labels of the table.

    Args:
        files: Name of a source -> file.
        table: Result of [`read_label_table`].
        options: See [`SourceSpec`].
        licences: Name of a source -> licence, which overrides the table's; the empty name applies to all sources.
    """
    licences, specs = licences or {}, []
    for name, entry in table["sets"].items():
        if name in files:
            columns = dict(entry.get("columns", {}))
            columns |= {"cell_type": entry["label_key"]} if "label_key" in entry else {}
            licence = licences.get(name, licences.get("", entry.get("licence")))
            details = columns, entry.get("constants", {}), licence, dict(options or {}), entry.get("labels")
            specs.append(SourceSpec("file", name, str(files[name]), *details))
    if not specs:
        raise ValueError(
            f"The table of labels names {sorted(table['sets'])[:5]}, but the files are {sorted(files)[:5]}."
        )
    if others := sorted(set(files) - set(table["sets"])):
        logger.info("Left out, since the table of labels does not name them: %s", ", ".join(others))
    return specs


def name_sources(files: Sequence[Path]) -> list[str]:
    """Name source files, to identify datasets: by file name, or else by the nearest folder whose name differs.

    >>> name_sources([Path("A/outs/matrix.h5"), Path("B/outs/matrix.h5"), Path("C.h5ad")])
    ['A', 'B', 'C']
    """
    names = [file.name.removesuffix(".gz").removesuffix(file.suffix) or file.name for file in files]
    for name in sorted({name for name in names if names.count(name) > 1}):
        members = [i for i, other in enumerate(names) if other == name]
        folders = [list(reversed(files[i].absolute().parts[:-1])) for i in members]
        levels = list(zip(*folders, strict=False))
        telling = next((level for level in levels if len(set(level)) == len(level)), None)
        if telling is None:  # no single folder name differs between all files, but several together do
            differing = [level for level in reversed(levels) if len(set(level)) > 1]
            telling = tuple("-".join(parts) for parts in zip(*differing, strict=True))
        for i, folder in zip(members, telling, strict=False):
            names[i] = folder if folder not in names else f"{folder}-{name}"
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"Several sources are called {repeated}; the names identify datasets. Rename the files.")
    return names


def _expand(paths: list[str]) -> list[Path]:
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"There is no source {path}. Correct the path.")
        if path.is_dir() and not _is_source(path):
            members = sorted(p for p in path.rglob("*") if _is_source(p))
            if not members:
                raise FileNotFoundError(f"The folder {path} has no file of cells. Name one with, e.g., .h5ad files.")
            files += members
        else:
            files.append(path)
    return list(dict.fromkeys(files))


def _is_source(path: Path) -> bool:
    if path.is_dir():
        return path.suffix == ".zarr" or any(path.glob("matrix.mtx*"))
    return path.suffix in SOURCE_SUFFIXES and not any(parent.suffix == ".zarr" for parent in path.parents)


def _pairs(items: list[str], option: str) -> dict[str, str]:
    for item in items:
        if "=" not in item:
            raise ValueError(f"--{option} {item!r} must have the form NAME=VALUE.")
    return dict(item.split("=", 1) for item in items)


def _command(args: argparse.Namespace) -> str:
    """Return the command line of these arguments, without defaults."""
    defaults, words = vars(make_parser().parse_args(["--output", ""])), []
    for name, value in vars(args).items():
        if name == "sources" or value == defaults.get(name, value):
            continue
        option = "--" + name.replace("_", "-")
        for item in value if isinstance(value, list) else [value]:
            words += [option] if item is True else [option, str(item)]
    return shlex.join(["python", "-m", "scmmgpt.train", "prepare", *args.sources, *words])
