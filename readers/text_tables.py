"""Text tables of cells: `read_table` finds the axis of the genes, and the columns that are annotations.

A table is wide (cells x genes, or genes x cells) or long (a row for each gene of each cell). The axis of the genes is
the one with more names of the vocabulary. Columns and rows that are not genes become annotations: of cells in `obs`,
of genes in `var`. `Contents.notes` lists them.
"""

import bz2
import contextlib
import csv
import gzip
import itertools
import lzma
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata.utils import make_index_unique

from scmmgpt.genes_scmmgpt import ENSEMBL, HUMAN_SYMBOL, MOUSE_SYMBOL, GeneIndex, classify_features, detect_species


BLOCK_ROWS = 2000  # rows parsed at a time; the first block decides the layout
SAMPLED_LINES = 60  # first lines that decide separator, header and decimal mark
MAX_LABEL_ROWS, MAX_EDGE = 10, 50  # rows of words under a header; columns without genes at one edge of a table
# First bytes of a compressed file -> the function that opens it, and the name of the compression in pandas.
COMPRESSIONS: dict[bytes, tuple[Callable[..., IO], str | None]] = {
    b"\x1f\x8b": (gzip.open, "gzip"),
    b"BZh": (bz2.open, "bz2"),
    b"\xfd7zXZ": (lzma.open, "xz"),
}
DAMAGED = (pd.errors.EmptyDataError, pd.errors.ParserError, pd.errors.ParserWarning, EOFError, OSError, lzma.LZMAError)

SEPARATOR_LINE = re.compile(r'^"?sep=(.)"?\s*$', re.IGNORECASE)  # the first line of a table for Excel
GROUPED = {mark: re.compile(rf"^-?[1-9]\d{{0,2}}(?:{re.escape(mark)}\d{{3}})+$") for mark in ",."}
FRACTION = {mark: re.compile(rf"^-?\d*{re.escape(mark)}\d+(?:[eE][-+]?\d+)?$") for mark in ",."}
PADDED = re.compile(r"^0\d+$")
BARCODE = re.compile(r"[ACGT]{8,}")

# Names of numeric columns that describe cells, in files of Seurat, scanpy and the pipelines of sequencing centres.
CELL_ANNOTATION = re.compile(
    r"n_?(counts?|features?|umis?|genes?|cells?|reads|molecules)([_.]\w+)*|(log1?p?_?10?_?)?(total|mean)[_.]?"
    r"(counts?|umis?|reads|features|genes)\w*|(percent|pct|perc|prop|proportion|frac|fraction)[._ ]?\w*([._]\w+)*|"
    r".*[._ ](percent|pct|ratio|fraction|score|id|index)|mito_?ratio|percent_?mito\w*|log10genesperumi|novelty|"
    r"(seurat_?|graph_?)?clusters?([._ ]?\w*)|(leiden|louvain|kmeans|doublet|scrublet|scdblfinder|harmony|spatial)\w*|"
    r"\w+_snn_res\.[\d.]+|res\.[\d.]+|df\.classifications\w*|pann\w*|"
    r"cell[_. ]?(index|id|name|barcode|types?|labels?|state|class|cycle|size|area|volume)?\w*|"
    r"(s|g2m|cc)\.?_?(score|difference)|phase|(umap|t-?sne|pca?|phate|lsi|ica|dim|x)[_. -]?\d{1,3}|"
    r"[xy]|[xyz]_?(coord\w*|pos\w*|centroid)|(center|centroid)_?[xyz]|array_(row|col)|pxl_\w+|image(row|col)|fov|area|"
    r"(batch|sample|donor|patient|subject|individual|lane|plate|well|library|dataset|study|condition|treatment|group|"
    r"stim|time|time_?point|day|replicate|run|pool|experiment|project)([_. ]?(id|name|no|number|size|index))?|"
    r"orig\.?ident|age|sex|gender|bmi|tissue|organ|disease|genotype|barcodes?|index|size_?factors?|lib\.?size|depth|"
    r"pseudotime|entropy|is_\w+|in_tissue|unnamed: \d+",
    re.IGNORECASE,
)
# Names of numeric columns that describe genes, in files of featureCounts, BioMart, scanpy and DESeq2.
GENE_ANNOTATION = re.compile(
    r"chr|chrom|chromosome(_?name)?|seqnames?|(gene_?|exon_?|transcript_?)?(start|end|length|width|size)(_?\w*)?|"
    r"strand|(effective_?)?length|(hgnc|mgi|entrez|ncbi|gene|probe|feature)[_. ]?(gene)?[_. ]?(ids?|index)|geneid|"
    r"(percentage_gene_)?gc(_?content)?|(log)?means?|var|variances?\w*|dispersions?\w*|vst\.\w+|highly_variable\w*|"
    r"basemean|log2?fc|log2?foldchange|lfcse|stat|p[_.]?val(ue)?\w*|padj|fdr|rank|n_cells\w*|(log1p_)?(total|mean)_counts|"
    r"pct_dropout\w*|exons?(_\w+)?|total|unnamed: \d+",
    re.IGNORECASE,
)
HEADER_OF_LONG = {
    "gene": re.compile(r"gene(_?(names?|ids?|symbols?))?|symbols?|features?(_?(names?|ids?))?|ensembl\w*", re.I),
    "cell": re.compile(r"cells?([_. ]?(ids?|names?|barcodes?|index))?|barcodes?|cb|bc|cell_?bc", re.I),
}
EXACT = ("symbol", "ensembl", "ortholog")  # kinds of match that are never a coincidence
COUNTER_NAME = re.compile(r"|unnamed: 0|index|level_0|x|\.\.\.1|v1|row(names|_?number)?", re.IGNORECASE)


class FileError(ValueError):
    """A file cannot be read. The message has one line and is shown to the user as it is."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class Contents(NamedTuple):
    """The contents of a text file, in memory, with the values of the file."""

    X: sp.csr_matrix  # cells x variables
    obs: pd.DataFrame
    var: pd.DataFrame
    notes: list[str]  # decisions of the reader, in sentences
    layers: dict[str, sp.csr_matrix] = {}


def read_table(path: Path, gene_index: GeneIndex | None = None) -> Contents:
    """Read a text table of cells.

    Args:
        path: `.csv`, `.tsv`, `.txt`, also compressed by gzip, bzip2 or xz.
        gene_index: The genes of a model. With those of GENCODE, if installed, they decide which axis has the genes.

    Returns:
        The matrix, float32, cells x genes, with `obs`, `var` and notes.

    Raises:
        FileError: If the file is damaged, or its layout is not supported.
    """
    for encoding in ("", "latin-1"):
        layout = find_layout(path, encoding)
        try:
            return _read(path, layout, _Recogniser(gene_index))
        except UnicodeDecodeError:
            continue
        except DAMAGED as error:
            message = f"{path} is damaged or not a table of numbers ({error}). Write or copy it again."
            raise FileError(message) from error
    raise AssertionError("latin-1 decodes any bytes")


# -- lines ------------------------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """The format of the lines of a text table."""

    separator: str
    encoding: str
    decimal: str
    thousands: str | None
    header: list[str]
    label_rows: list[list[str]]  # rows of words under the header, such as the type of each cell
    words: list[int]  # columns that are read as text even if they look like numbers: `0012` is not 12
    n_skipped: int  # lines before the first row of numbers


def find_layout(path: Path, encoding: str = "") -> Layout:
    """Separator, encoding, decimal mark and header of a text table, from its first lines."""
    encoding = encoding or _encoding(path)
    lines = first_lines(path, encoding)
    start, given = _preamble(lines)
    if start >= len(lines):
        raise FileError(f"{path} is empty or has only comments; copy the file again.")
    body = [line for line in lines[start:] if line.strip()]
    separator = given or _separator(body)
    header, *rows = (_fields(line, separator) for line in body)
    width = max((len(row) for row in rows), key=[len(row) for row in rows].count, default=len(header))
    if len(header) == width + 1 and not header[-1]:
        header.pop()
    if len(header) == width - 1:  # R writes no name above the names of rows
        header.insert(0, "")
    if rows and len(header) != width:
        raise FileError(
            f"{path} has {len(header)} names in its header, but {width} fields a row (separator {separator!r}): it is "
            "damaged or not a table. Write or copy it again."
        )
    header[0] = header[0].lstrip("#").strip()
    labels = _count_label_rows(rows)
    decimal, thousands = _number_marks(path, [field for row in rows[labels:] for field in row[1:]])
    n_skipped = start + [i for i, line in enumerate(lines[start:]) if line.strip()][labels] + 1
    padded = {i for row in rows[labels:] for i, field in enumerate(row) if PADDED.match(field)}
    named = {i for i, name in enumerate(header) if HEADER_OF_LONG["cell"].fullmatch(name)}
    words = sorted({0, *padded, *named})
    return Layout(separator, encoding, decimal, thousands, header, rows[:labels], words, n_skipped)


def first_lines(path: Path, encoding: str) -> list[str]:
    """The first `SAMPLED_LINES` lines of a text file, compressed or not, without line ends."""
    with _refusing_damage(path), compression(path)[0](path, "rt", encoding=encoding, errors="replace") as file:
        return [line.rstrip("\r\n") for line in itertools.islice(file, SAMPLED_LINES)]


@contextlib.contextmanager
def _refusing_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, lzma.LZMAError, UnicodeError) as error:
        raise FileError(f"{path} is damaged ({error}). Copy it again.") from error


def compression(path: Path) -> tuple[Callable[..., IO], str | None]:
    """The function that opens a file, and pandas' name of its compression. The first bytes decide, not the name."""
    with open(path, "rb") as file:
        start = file.read(6)
    return next((opener for first, opener in COMPRESSIONS.items() if start.startswith(first)), (open, None))


def _encoding(path: Path) -> str:
    with compression(path)[0](path, "rb") as file, _refusing_damage(path):
        first = file.read(4)
    return "utf-16" if first[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


def _preamble(lines: list[str]) -> tuple[int, str]:
    """Number of lines before the header, and the separator of a line `sep=`, if there is one."""
    n, given = 0, ""
    while n < len(lines) and (
        not lines[n].strip() or lines[n].lstrip('"').startswith("#") or SEPARATOR_LINE.match(lines[n])
    ):
        stated = SEPARATOR_LINE.match(lines[n])
        given = stated.group(1) if stated else given
        n += 1
    if lines and lines[0].startswith("#1.") and n < len(lines):  # GCT: a line with the size of the table
        return n + 1, "\t"
    if 0 < n < len(lines) and lines[n - 1].startswith("#") and not lines[n - 1].startswith("##"):
        separator = given or _separator(lines[n:])
        fields = len(_fields(lines[n - 1], separator))
        if fields > 1 and fields == len(_fields(lines[n], separator)):  # the header itself begins with #
            n -= 1
    return n, given


def _separator(lines: list[str]) -> str:
    """The mark that most often splits every line into the same number of fields; white space if no mark does."""
    bare = [re.sub(r'"[^"]*"', "", line) for line in lines]
    best, best_count = r"\s+", 0
    for mark in "\t,;|":
        header, *rows = (line.count(mark) for line in bare)
        usual = max(rows, key=rows.count, default=header)
        if usual > best_count and header - usual in (-1, 0, 1):
            best, best_count = mark, usual
    if best_count:
        return best
    header_counts = {mark: bare[0].count(mark) for mark in "\t,;"}
    most = max(header_counts, key=lambda mark: header_counts[mark])
    return most if header_counts[most] else r"\s+"


def _fields(line: str, separator: str) -> list[str]:
    if separator == r"\s+":
        return [field.strip('"') for field in re.findall(r'"[^"]*"|\S+', line)]
    try:
        return [field.strip() for field in next(csv.reader([line], delimiter=separator, skipinitialspace=True), [""])]
    except csv.Error:  # a field that is longer than any name
        return [field.strip(' "') for field in line.split(separator)]


def _count_label_rows(rows: list[list[str]]) -> int:
    """Number of rows of words between the header and rows of numbers."""
    words = [np.mean([_not_a_number(field.replace(",", ".")) for field in row[1:]] or [False]) for row in rows]
    n = next((i for i, share in enumerate(words) if share < 0.5), len(words))
    below = words[n : n + 5]
    return n if 0 < n <= MAX_LABEL_ROWS and below and max(below) < 0.1 else 0


def _number_marks(path: Path, fields: list[str]) -> tuple[str, str | None]:
    """The decimal mark of a table, and the mark between thousands, if there is one."""
    points, commas = ([f for f in fields if FRACTION[mark].match(f) or GROUPED[mark].match(f)] for mark in ".,")
    if commas and (points or any(f.count(",") > 1 for f in commas)):
        return ".", ","
    for numbers, mark, other in ((commas, ",", "."), (points, ".", None)):
        if numbers and all(GROUPED[mark].match(f) for f in numbers):
            if any(f.count(mark) > 1 for f in numbers):
                return other or ",", mark
            raise FileError(
                f"{path} has numbers such as {numbers[0]!r}, in which {mark!r} may mark decimals or thousands. Write "
                "the numbers with a decimal point and without marks between thousands."
            )
    return ("," if commas else "."), None


def _not_a_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return str(value).strip().upper() not in ("", "NA")
    return False


def _frames(path: Path, layout: Layout) -> Iterator[pd.DataFrame]:
    """Blocks of `BLOCK_ROWS` rows of a table; columns are called by position."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)  # a row with too many fields means a damaged file
        yield from pd.read_csv(
            path,
            sep=layout.separator,
            header=None,
            names=range(len(layout.header)),
            index_col=False,
            na_values=["na"],  # of GCT
            skiprows=layout.n_skipped,
            encoding=layout.encoding,
            compression=compression(path)[1],
            decimal=layout.decimal,
            thousands=layout.thousands,
            skipinitialspace=layout.separator != r"\s+",
            converters=dict.fromkeys(layout.words, str.strip),
            chunksize=BLOCK_ROWS,
            low_memory=False,
        )


# -- names ------------------------------------------------------------------------------------------------------------


class _Recogniser:
    """Recognises gene names of a model and of GENCODE (if installed), and Ensembl ids of any species."""

    def __init__(self, gene_index: GeneIndex | None) -> None:
        self.indexes = [] if gene_index is None else [gene_index]
        try:
            from scmmgpt.train.data.gene_tables import reference_gene_index

            self.indexes.append(reference_gene_index())
        except ImportError:  # without the extra `train`, only the genes of the model are known
            pass

    def kinds(self, names: Sequence[str]) -> np.ndarray:
        """Kind of match of each name (`GeneIndex.lookup`), str `(n,)`; empty for a name that is not a gene."""
        return np.array([self._kind(name) for name in names], dtype=object)

    def _kind(self, name: str) -> str:
        if ENSEMBL.match(name):
            return "ensembl"
        kinds = (index.lookup(name)[1] for index in self.indexes)
        return next((kind for kind in kinds if kind != "unmatched"), "")

    def share(self, names: Sequence[str]) -> float:
        """Share of the names that are genes, between 0 and 1."""
        return float((self.kinds(names) != "").mean()) if len(names) else 0.0


def _annotates_cells(names: Sequence[str], kinds: np.ndarray, odd: np.ndarray) -> np.ndarray:
    """Whether each name on the gene axis is an annotation of cells, bool `(n,)`.

    Args:
        names: Names on the gene axis.
        kinds: Kind of match of each name (`_Recogniser.kinds`).
        odd: Whether the values of each name include fractions or negative numbers, bool `(n,)`.
    """
    exact = np.isin(kinds, EXACT)
    feature = classify_features(names) != "gene"  # antibodies and the like stay variables
    named = np.array([CELL_ANNOTATION.fullmatch(name.strip()) is not None for name in names]) & ~exact & ~feature
    known = (kinds != "") & ~named
    if known.sum() < 3 or known.mean() < 0.2:  # genes of an unknown species: only known annotations are certain
        return named
    species = detect_species([name for name, is_known in zip(names, known, strict=True) if is_known])[0]
    spelling = MOUSE_SYMBOL if species == "mouse" else HUMAN_SYMBOL
    strange = np.array([not (spelling.match(name) or ENSEMBL.match(name)) for name in names]) & ~known & ~feature
    if not odd[known].any():  # genes have counts, so a name with fractions is not a gene
        named |= odd & ~known & ~feature
    loose = named | strange
    for run in (slice(None), slice(None, None, -1)):
        length = int(np.argmin(np.append(loose[run], False)))
        if length <= MAX_EDGE:
            named[run][:length] = True
    return named


# -- wide tables ------------------------------------------------------------------------------------------------------


class _Roles(NamedTuple):
    """Roles of the columns of a wide table, by position."""

    names: list[int]  # names of the rows; two columns are joined
    values: list[int]  # expression
    notes: list[int]  # annotations of the rows
    genes_in_rows: bool


def _read(path: Path, layout: Layout, genes: _Recogniser) -> Contents:
    frames = _frames(path, layout)
    first = next(frames)
    if first.empty:
        raise FileError(f"{path} has a header and no rows: it names no cells. Copy the file again.")
    frames = itertools.chain([first], frames)
    long = _long_columns(path, first, layout.header, genes)
    if long is not None:
        return _read_long(path, layout, frames, long)
    roles = _find_roles(path, first, layout, genes)
    names, notes, blocks = [], [], []
    for frame in frames:
        values = frame[roles.values]
        numeric = values.select_dtypes(include=["number", "bool"])
        if numeric.shape[1] < len(roles.values):
            _refuse_words(path, layout.header, values.drop(columns=numeric.columns))
        names += _row_names(frame, roles.names)
        notes.append(frame[roles.notes])
        blocks.append(sp.csr_matrix(values.to_numpy(dtype=np.float32)))
    matrix = sp.vstack(blocks, format="csr")
    columns = [layout.header[i] for i in roles.values]
    rows = pd.concat(notes).set_axis(pd.Index(names), axis=0)
    rows.columns = _distinct([layout.header[i] for i in roles.notes])
    titles = _distinct([row[0] or f"line {i + 2}" for i, row in enumerate(layout.label_rows)])
    labels = {
        title: [row[i] if i < len(row) else "" for i in roles.values]
        for title, row in zip(titles, layout.label_rows, strict=True)
    }
    described = pd.DataFrame(labels, index=pd.Index(columns, dtype=object))
    decisions = _describe_layout(roles, rows, described, layout)
    if not roles.genes_in_rows:
        return Contents(matrix, rows, described, decisions)
    kinds = genes.kinds(names)
    moved = _annotates_cells(names, kinds, _odd_rows(matrix))
    if moved.any():  # rows that describe the cells
        moved_names = [name for name, is_moved in zip(names, moved, strict=True) if is_moved]
        for name, values in zip(moved_names, matrix[moved].toarray(), strict=True):
            described[name] = values if _is_odd(values) else values.astype(np.int64)
        decisions.append(f"Rows that are not genes were moved to obs: {_list(moved_names)}.")
    return Contents(matrix[~moved].T.tocsr(), described, rows[~moved], decisions)


def _find_roles(path: Path, first: pd.DataFrame, layout: Layout, genes: _Recogniser) -> _Roles:
    header = layout.header
    text = [i for i in first.columns[1:] if first[i].dtype.kind not in "iuf"]
    numeric = [i for i in first.columns[1:] if first[i].dtype.kind in "iuf"]
    if not numeric:  # all values are True or False
        numeric = [i for i in text if first[i].dtype.kind == "b"]
        text = [i for i in text if i not in numeric]
    blank = [i for i in numeric if first[i].isna().all()]
    empty = [i for i in blank if not header[i]]  # from a separator at the end of every line
    numeric = [i for i in numeric if i not in blank]
    if not numeric:
        raise FileError(
            f"{path} has no column of numbers (separator {layout.separator!r}). Write cells in rows, genes in columns "
            "and names in the first row and column, or the transposed table."
        )
    unique = [i for i in text if first[i].is_unique and first[i].notna().all()]
    counter = COUNTER_NAME.fullmatch(header[0]) and first[0].tolist() in (
        [str(i) for i in range(len(first))],
        [str(i + 1) for i in range(len(first))],
    )
    names = [unique[0]] if counter and unique else [0]
    if not first[0].is_unique:  # for example a sample before the barcode, or a field of view before the cell's number
        called = [i for i in text if HEADER_OF_LONG["cell"].fullmatch(header[i])]
        called += [i for i in unique if BARCODE.search(str(first[i].iloc[0]))]
        alone = [i for i in called if i in unique]
        together = [i for i in called if not first.duplicated([0, i]).any()]
        names = alone[:1] or [0, *together[:1]]
    labels, columns = _row_names(first, names), [header[i] for i in numeric]
    _check_names(path, labels, columns, header, genes)
    named = [labels, *(first[i].dropna().astype(str).tolist() for i in text if i not in names)]
    in_rows, in_columns = max(genes.share(side) for side in named if side), genes.share(columns)
    if min(in_rows, in_columns) > 0.5 and set(labels) == set(columns):
        raise FileError(f"{path} has genes in both rows and columns: it is not a table of cells. Pass another file.")
    if min(in_rows, in_columns) > 0.5:  # for example a few cell types called CD4, CD8, ... and thousands of genes
        in_rows, in_columns = in_rows * len(labels), in_columns * len(columns)
    barcodes = [np.mean([bool(BARCODE.search(name)) for name in side]) for side in (labels, columns)]
    genes_in_rows = in_rows > in_columns or (in_rows == in_columns and barcodes[1] > barcodes[0])
    if genes_in_rows:
        words = sorted({0, *text})  # annotations are a block at the left with words in at least a third of its columns
        block = max((i for n, i in enumerate(words) if n + 1 >= (i + 1) / 3 and i < 20), default=0)
        expected = [i for i in text if i >= block and not GENE_ANNOTATION.fullmatch(header[i])]
        aside = [i for i in numeric if i < block or GENE_ANNOTATION.fullmatch(header[i])]
    else:
        exact = np.isin(genes.kinds([header[i] for i in text]), EXACT)
        expected = [i for i, is_gene in zip(text, exact, strict=True) if is_gene]
        odd = np.array([_is_odd(first[i].to_numpy()) for i in numeric])
        moved = _annotates_cells(columns, genes.kinds(columns), odd)
        aside = [i for i, is_moved in zip(numeric, moved, strict=True) if is_moved]
    mixed = [i for i in expected if np.mean([_not_a_number(value) for value in first[i].dropna()] or [True]) < 0.5]
    if mixed:  # genes or cells with a few values that are not numbers
        _refuse_words(path, header, first[mixed])
    values = [i for i in numeric if i not in set(aside)]
    if not values:
        raise FileError(
            f"{path} has no column of expression: the columns {_list(columns)} describe cells or genes. Pass another "
            "file."
        )
    taken = {*values, *empty, *([0] if counter else []), *(names if len(names) == 1 else [])}
    return _Roles(names, values, [i for i in first.columns if i not in taken], genes_in_rows)


def _row_names(frame: pd.DataFrame, columns: list[int]) -> list[str]:
    return ["_".join(parts) for parts in zip(*(frame[i].astype(str).tolist() for i in columns), strict=True)]


def _check_names(path: Path, labels: list[str], columns: list[str], header: list[str], genes: _Recogniser) -> None:
    """Refuse a table without names."""
    if any(_not_a_number(name) for name in columns):
        return
    if not any(_not_a_number(name) for name in labels):
        raise FileError(
            f"{path} has numbers only (its first row starts with {', '.join(columns[:3])}). Add a first row or column "
            "with the names of the genes."
        )
    if len(set(columns)) < len(columns) or genes.share([header[0]]):
        raise FileError(
            f"{path} has no header: its first line starts with {', '.join(header[:3])}. Add a first line with the "
            "names of the columns."
        )


def _refuse_words(path: Path, header: list[str], words: pd.DataFrame) -> None:
    column = words.columns[0]
    value = next((str(v) for v in words[column] if _not_a_number(v)), "True")
    decimal = " It has a decimal comma; write decimal points." if FRACTION[","].match(value) else " Keep one of both."
    raise FileError(f"Column {header[column]!r} of {path} mixes {value!r} and numbers.{decimal}")


def _is_odd(values: np.ndarray) -> bool:
    """Whether the values include fractions or negative numbers."""
    values = values[np.isfinite(values)]
    return bool(((values < 0) | (values != np.rint(values))).any())


def _odd_rows(matrix: sp.csr_matrix) -> np.ndarray:
    odd = (matrix.data < 0) | (matrix.data != np.rint(matrix.data))
    rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    return np.bincount(rows[odd], minlength=matrix.shape[0]) > 0


def _describe_layout(roles: _Roles, rows: pd.DataFrame, described: pd.DataFrame, layout: Layout) -> list[str]:
    """Notes on the layout of a wide table."""
    notes, (of_rows, of_columns) = [], ("var", "obs") if roles.genes_in_rows else ("obs", "var")
    if roles.genes_in_rows:
        notes.append("The genes are in the rows: the table was transposed.")
    if rows.shape[1]:
        others = "cells" if roles.genes_in_rows else "genes"
        notes.append(f"Columns that are not {others} were moved to {of_rows}: {_list(list(rows.columns))}.")
    if described.shape[1]:
        names = _list(list(described.columns))
        notes.append(f"Rows of words under the header were moved to {of_columns}: {names}.")
    if layout.decimal == ",":
        notes.append("The decimal mark is a comma.")
    return notes


def _distinct(names: Sequence[str]) -> pd.Index:
    """The names as an index; repeated names get a number."""
    return make_index_unique(pd.Index(names, dtype=object), join=".")


def _list(names: Sequence[Any]) -> str:
    shown = ", ".join(repr(str(name)) for name in names[:6])
    return shown if len(names) <= 6 else f"{shown} and {len(names) - 6} more"


# -- long tables ------------------------------------------------------------------------------------------------------


class _LongColumns(NamedTuple):
    """Positions of the columns of a long table (a row for each gene of each cell)."""

    gene: int
    cell: int
    value: int


def _long_columns(path: Path, first: pd.DataFrame, header: list[str], genes: _Recogniser) -> _LongColumns | None:
    """The columns of a long table; `None` for a wide table."""
    if not 3 <= len(header) <= 12:
        return None
    hinted = {what: [i for i, h in enumerate(header) if word.fullmatch(h)] for what, word in HEADER_OF_LONG.items()}
    text = [i for i in first.columns if i == 0 or first[i].dtype.kind not in "iufb"]
    shares = {i: genes.share(first[i].dropna().astype(str).drop_duplicates().tolist()) for i in text}
    gene = max(text, key=lambda i: (shares[i] >= 0.2, i in hinted["gene"], shares[i]))
    repeated = [i for i in text if i != gene and not first[i].is_unique and shares[i] < 0.2]
    cells = [i for i in hinted["cell"] if i != gene] or (repeated if len(text) == 2 else [])
    known = gene in hinted["gene"] or shares[gene] >= 0.5
    if not known or len(cells) != 1 or (first[gene].is_unique and first[cells[0]].is_unique and len(first) > 1):
        return None
    if first.duplicated([gene, cells[0]]).any() and gene not in hinted["gene"]:
        return None
    counts = [i for i in first.columns if i not in (gene, cells[0]) and not any(map(_not_a_number, first[i].dropna()))]
    counts = [i for i in counts if header[i] and not COUNTER_NAME.fullmatch(header[i])]
    if len(counts) != 1:
        raise FileError(
            f"{path} is a table in long format (a row for each gene of each cell) with {len(counts)} columns of "
            f"counts ({_list([header[i] for i in counts])}). Keep {header[cells[0]]}, {header[gene]} and counts."
        )
    if not _not_a_number(header[counts[0]]):
        raise FileError(
            f"{path} has no header: its first line has {_list(header)}. Add a first line, such as cell, gene, count."
        )
    return _LongColumns(gene, cells[0], counts[0])


def _read_long(path: Path, layout: Layout, frames: Iterator[pd.DataFrame], long: _LongColumns) -> Contents:
    header = layout.header
    table = pd.concat(frames, ignore_index=True)
    counts = pd.to_numeric(table[long.value], errors="coerce")
    if counts.isna().any():
        _refuse_words(path, header, table.loc[counts.isna(), [long.value]])
    if table[[long.gene, long.cell]].isna().any(axis=None):
        raise FileError(f"{path} is a table in long format with missing names. Drop the rows without a name.")
    (genes, gene_names), (cells, cell_names) = (pd.factorize(table[i].astype(str)) for i in (long.gene, long.cell))
    shape = len(cell_names), len(gene_names)
    matrix = sp.csr_matrix((counts.to_numpy(dtype=np.float32), (cells, genes)), shape=shape)
    columns = ", ".join(repr(header[i]) for i in (long.cell, long.gene, long.value))
    obs, var = pd.DataFrame(index=cell_names), pd.DataFrame(index=gene_names)
    further = [i for i in table if i not in long and table[i].dtype.kind not in "iuf"]
    further = [i for i in further if not COUNTER_NAME.fullmatch(header[i])]
    for i in further:  # cells of several samples that share a barcode must not be merged
        fits = [p for p in (long.cell, long.gene) if table.groupby(p, sort=False)[i].nunique(dropna=False).max() == 1]
        if not fits:
            raise FileError(
                f"{path} is a table in long format. Column {header[i]!r} has several values for one cell name, "
                f"perhaps because samples share it. Join {header[i]!r} and {header[long.cell]!r} to one name."
            )
        frame = obs if fits[0] == long.cell else var
        frame[header[i]] = table.drop_duplicates(fits[0])[i].to_numpy()
    note = f"The table is in long format, a row for each gene of each cell (columns {columns})."
    return Contents(matrix, obs, var, [note])
