"""Inputs that people have had trouble with, one line a case: what it is, how it is built, what must come out.

A case is read or refused. If it is read, the cells are `CELLS` (or the `cells` of the case) with `COUNTS`, by the
names of barcodes and genes. Add a case by a builder, which writes into a folder and returns the path to pass, and a
line in `CASES`.
"""

import gzip
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.io
import scipy.sparse as sp

from scmmgpt.synthetic import synthetic_adata


N = 24
COUNTS = pd.DataFrame(synthetic_adata(N).to_df().astype(int))
COUNTS.index = pd.Index(
    ["".join("ACGT"[(i // 4**k) % 4] for k in range(4)) + "TTTGCAGTCATG-1" for i in range(0, 10 * N, 10)]
)
CELLS, GENES = list(COUNTS.index), list(COUNTS.columns)
IDS = [f"ENSG{i:011d}" for i in range(len(GENES))]
TYPES = [("B cell", "T cell", "monocyte")[i % 3] for i in range(N)]
FIRST, SECOND = slice(0, N // 2), slice(N // 2, N)  # two samples of as many cells each
OTHERS = ["".join("TGCA"["ACGT".index(letter)] for letter in name[:-2]) + "-1" for name in CELLS]


@dataclass(frozen=True)
class Case:
    """One input and what must come of it."""

    what: str
    build: Callable[[Path], Path]
    refused: str = ""  # words of the error, a regular expression; empty if the cells are read
    says: str = ""  # words of what `inspect` says, a regular expression
    cells: slice = field(default_factory=lambda: slice(None))
    obs: tuple[str, ...] = ()  # columns that the cells have
    var: tuple[str, ...] = ()
    aside: int = 0  # variables that are not genes


# -- Matrix Market ----------------------------------------------------------------------------------------------------


def write_mtx(
    folder, matrix="matrix.mtx", features="features.tsv", barcodes="barcodes.tsv", *, rows=slice(None), names=None
):
    """A matrix of 10x with its tables, each under a name or left out."""
    folder.mkdir(parents=True, exist_ok=True)
    table = COUNTS[rows]
    if matrix:
        scipy.io.mmwrite(folder / matrix, sp.coo_matrix(table.T.to_numpy()))
    if features:
        lines = [f"{i}\t{gene}\tGene Expression" for i, gene in zip(IDS, GENES, strict=True)]
        (folder / features).write_text("\n".join(lines) + "\n")
    if barcodes:
        (folder / barcodes).write_text("\n".join(names or table.index) + "\n")
    return folder


def two_samples(pattern, *, second):
    """Two samples in one folder; the path of the folder or of the second matrix."""

    def build(folder):
        for sample, rows in (("GSM1_T1", FIRST), ("GSM2_T2", SECOND)):
            names = [pattern.format(sample=sample, what=what) for what in ("matrix", "features", "barcodes")]
            write_mtx(folder, f"{names[0]}.mtx", f"{names[1]}.tsv", f"{names[2]}.tsv", rows=rows)
        return folder / f"{pattern.format(sample='GSM2_T2', what='matrix')}.mtx" if second else folder

    return build


def shared_features(folder):
    for sample, rows in (("GSM1_T1", FIRST), ("GSM2_T2", SECOND)):
        write_mtx(folder, f"{sample}_matrix.mtx", "GSE9_features.tsv", f"{sample}_barcodes.tsv", rows=rows)
    return folder / "GSM2_T2_matrix.mtx"


def shared_barcodes(folder):
    for sample, rows in (("GSM1_T1", FIRST), ("GSM2_T2", SECOND)):
        write_mtx(folder, f"{sample}_matrix.mtx", "features.tsv", "barcodes.tsv", rows=rows)
    return folder / "GSM2_T2_matrix.mtx"


def barcodes_of_another_sample(folder):
    write_mtx(folder, "GSM2_T2_matrix.mtx", "features.tsv", "GSM1_T1_barcodes.tsv", rows=SECOND, names=OTHERS[SECOND])
    return folder


def of_the_series(folder):
    return write_mtx(folder, "counts.mtx", "GSE9_genes.tsv", "GSE9_barcodes.tsv")


def cellranger_outs(*folders):
    def build(folder):
        for name in folders:
            write_mtx(folder / "outs" / name)
        return folder

    return build


def cellranger_multi(*samples):
    def build(folder):
        for sample in samples:
            path = folder / "outs" / "per_sample_outs" / sample / "count" / "sample_filtered_feature_bc_matrix"
            write_mtx(path)
        return folder / "outs"

    return build


def starsolo_variants(folder):
    write_mtx(folder)
    other = sp.coo_matrix(COUNTS.T.to_numpy() * 2.5)
    scipy.io.mmwrite(folder / "UniqueAndMult-EM.mtx", other)
    return folder


def parts(spliced, unspliced, ambiguous, *, cells_first=False, tables=("features.tsv", "barcodes.tsv")):
    """Spliced, unspliced and ambiguous counts, of which the spliced and ambiguous sum to `COUNTS`."""

    def build(folder):
        write_mtx(folder, "", *tables)
        counts = COUNTS.to_numpy()
        split = {spliced: counts - counts // 3, ambiguous: counts // 3, unspliced: counts // 2}
        for name, part in split.items():
            scipy.io.mmwrite(folder / name, sp.coo_matrix(part if cells_first else part.T))
        return folder

    return build


def parts_of_other_cells(folder):
    for part, names in (("spliced", CELLS), ("unspliced", OTHERS), ("ambiguous", CELLS)):
        write_mtx(folder, f"{part}.mtx", f"{part}.genes.tsv", f"{part}.barcodes.tsv", names=names)
    return folder


def of_macos(folder):
    for name in ("._matrix.mtx", "._features.tsv", "._barcodes.tsv"):
        (folder / name).write_bytes(b"\x00\x05\x16\x07 Mac OS X")
    return write_mtx(folder)


def kallisto(folder):
    scipy.io.mmwrite(folder / "cells_x_genes.mtx", sp.coo_matrix(COUNTS.to_numpy()))
    (folder / "cells_x_genes.genes.txt").write_text("\n".join(IDS))
    (folder / "cells_x_genes.genes.names.txt").write_text("\n".join(GENES))
    (folder / "cells_x_genes.barcodes.txt").write_text("\n".join(CELLS))
    return folder


def alevin_usa(folder):
    counts = COUNTS.to_numpy()
    whole = np.hstack([counts - counts // 3, counts // 2, counts // 3])
    scipy.io.mmwrite(folder / "quants_mat.mtx", sp.coo_matrix(whole))
    (folder / "quants_mat_rows.txt").write_text("\n".join(CELLS))
    names = [f"{gene}{end}" for end in ("", "-U", "-A") for gene in GENES]
    (folder / "quants_mat_cols.txt").write_text("\n".join(names))
    return folder


def parse_biosciences(folder):
    scipy.io.mmwrite(folder / "count_matrix.mtx", sp.coo_matrix(COUNTS.to_numpy()))
    genes = pd.DataFrame({"gene_id": IDS, "gene_name": GENES, "genome": "hg38"})
    genes.to_csv(folder / "all_genes.csv", index=False)
    cells = pd.DataFrame({"bc_wells": CELLS, "sample": "s1", "tscp_count": COUNTS.sum(axis=1).to_numpy()})
    cells.to_csv(folder / "cell_metadata.csv", index=False)
    return folder


def square_of_kallisto(folder):
    """As many cells as genes: only the names of the files say which side is which."""
    scipy.io.mmwrite(folder / "cells_x_genes.mtx", sp.coo_matrix(COUNTS.iloc[:, :N].to_numpy()))
    (folder / "cells_x_genes.genes.txt").write_text("\n".join(GENES[:N]))
    (folder / "cells_x_genes.barcodes.txt").write_text("\n".join(CELLS))
    return folder


def with_headers(folder):
    write_mtx(folder)
    (folder / "features.tsv").unlink()
    (folder / "barcodes.tsv").unlink()
    pd.Series(CELLS, name="x").rename(lambda i: i + 1).to_csv(folder / "barcodes.csv")
    pd.DataFrame({"gene_id": IDS, "gene_name": GENES}).to_csv(folder / "genes.csv", index=False)
    return folder


def huge_header(folder):
    write_mtx(folder)
    lines = (folder / "matrix.mtx").read_text().splitlines()
    sizes = next(i for i, line in enumerate(lines) if not line.startswith("%"))
    lines[sizes] = lines[sizes].rsplit(" ", 1)[0] + " 900000000000"
    (folder / "matrix.mtx").write_text("\n".join(lines))
    return folder


def truncated_mtx(folder):
    write_mtx(folder)
    data = gzip.compress((folder / "matrix.mtx").read_bytes())
    (folder / "matrix.mtx").unlink()
    (folder / "matrix.mtx.gz").write_bytes(data[: len(data) // 2])
    return folder


def raw_droplets(folder):
    rng = np.random.default_rng(0)
    genes = [f"GENE{i}" for i in range(260)] + GENES
    cells = np.hstack([np.ones((N, 260), dtype=int), COUNTS.to_numpy()])
    counts = sp.vstack([sp.coo_matrix(cells), sp.random(400, 300, 0.005, rng=rng, data_rvs=lambda n: np.ones(n))])
    scipy.io.mmwrite(folder / "matrix.mtx", counts.T)
    (folder / "features.tsv").write_text("\n".join(genes))
    (folder / "barcodes.tsv").write_text("\n".join([*CELLS, *(f"EMPTY{i}" for i in range(400))]))
    return folder


# -- text tables ------------------------------------------------------------------------------------------------------


def table(name, change=lambda frame: frame, *, turned=False, encoding="utf-8", edit=lambda text: text, **options):
    """The counts as a table, changed before and after it is turned into text."""

    def build(folder):
        frame = change(COUNTS.T.copy() if turned else COUNTS.copy())
        text = edit(frame.to_csv(**options))
        data = text.encode(encoding)
        (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return folder / name

    return build


def seurat(frame):
    notes = {
        "seurat_clusters": [i % 4 for i in range(N)],
        "cell_type": TYPES,
        "percent.mt": [i / 7 for i in range(N)],
        "nCount_RNA": frame.sum(axis=1),
        "nFeature_RNA": (frame > 0).sum(axis=1),
    }
    return pd.concat([pd.DataFrame(notes, index=frame.index), frame], axis=1)


def scanpy_at_the_end(frame):
    notes = {"n_genes_by_counts": 30, "leiden": 1, "UMAP_1": [i - 2.5 for i in range(N)], "age_years": 61}
    return pd.concat([frame, pd.DataFrame(notes, index=frame.index)], axis=1)


def unheard_of(frame):
    """Annotations of no known name: what tells them is that the other columns are genes."""
    return pd.concat([pd.DataFrame({"my own gate": 3, "zScore": 1.5}, index=frame.index), frame], axis=1)


def feature_counts(frame):
    frame.columns = [f"/data/bam/{name}.bam" for name in frame.columns]
    notes = {"Chr": "chr1", "Start": range(1, 41), "End": range(900, 940), "Strand": "+", "Length": 899}
    return pd.concat([pd.DataFrame(notes, index=frame.index), frame], axis=1).rename_axis("Geneid")


def metadata_rows(frame):
    notes = {"nCount_RNA": COUNTS.sum(axis=1), "seurat_clusters": np.arange(N) % 4}
    rows = pd.DataFrame(notes, index=frame.columns).T
    return pd.concat([rows, frame])


def row_of_words(frame):
    words = pd.DataFrame([TYPES], index=["cell_type"], columns=frame.columns)
    return pd.concat([words, frame])


def htseq(frame):
    extra = pd.DataFrame(9, index=["__no_feature", "__ambiguous", "__not_aligned"], columns=frame.columns)
    return pd.concat([frame, extra])


def abseq(names):
    return lambda frame: frame.assign(**dict.fromkeys(names, 500))


def long_table(columns, *, extra=None, counter=False):
    def build(folder):
        stacked = COUNTS.stack()
        stacked = stacked[stacked > 0].reset_index()
        stacked.columns = ["cell", "gene", "count"]
        stacked = stacked[list(columns)].rename(columns=columns)
        if extra:
            stacked[extra] = 2
        stacked.to_csv(folder / "long.tsv", sep="\t", index=counter)
        return folder / "long.tsv"

    return build


def numbers_as(decimal):
    """The text of a semicolon table with thirds, so that every count has a fraction."""

    def edit(text):
        header, *rows = text.splitlines()
        fields = ([row.split(";")[0], *(f"{int(v) / 4:.2f}" for v in row.split(";")[1:])] for row in rows)
        return "\n".join([header, *(";".join(row).replace(".", decimal) for row in fields)])

    return edit


def thousands(text):
    header, *rows = text.splitlines()
    large = ";".join([rows[0].split(";")[0], *("1,234" for _ in rows[0].split(";")[1:])])
    return "\n".join([header, large, *rows[1:]])


def without_header(text):
    return "\n".join(text.splitlines()[1:])


def quoted(text):
    return "\n".join(",".join(f'"{field}"' for field in line.split(",")) for line in text.splitlines())


def with_a_word(text):
    header, first, *rows = text.splitlines()
    name, _, *fields = first.split(",")
    return "\n".join([header, ",".join([name, "many", *fields]), *rows])


def counted(frame):
    frame = frame.rename_axis("barcode").reset_index()
    frame.insert(0, "orig.ident", "pbmc")
    return frame


def probes(frame):
    frame.insert(0, "symbol", frame.index)
    return frame.set_axis([f"probe_{i}_at" for i in range(len(frame))], axis=0)


def long_with_sample(frame):
    frame = frame.stack().rename_axis(["cell", "gene"]).rename("count").reset_index()
    return frame.assign(sample=["s1" if cell < "C" else "s2" for cell in frame["cell"]])


def long_twice(frame):
    frame = long_with_sample(frame)
    return pd.concat([frame, frame.assign(sample="s3")])


def spreadsheet(folder):
    (folder / "t.xlsx").write_bytes(b"PK")
    return folder / "t.xlsx"


def zero_padded(frame):
    frame.index = [f"{i:05d}" for i in range(N)]
    return frame


# -- HDF5 and Zarr ----------------------------------------------------------------------------------------------------


def make_adata():
    adata = ad.AnnData(sp.csr_matrix(COUNTS.to_numpy(dtype=np.float32)), COUNTS[[]].copy(), pd.DataFrame(index=GENES))
    adata.obs["cell_type"] = pd.Categorical(TYPES)
    return adata


def h5ad(change=lambda adata: None, damage=lambda file: None, name="cells.h5ad"):
    def build(folder):
        adata = make_adata()
        adata = change(adata) or adata
        adata.write_h5ad(folder / name)
        with h5py.File(folder / name, "r+") as file:
            damage(file)
        return folder / name

    return build


def biotypes(adata):
    adata.var["feature_name"] = adata.var_names
    adata.var_names = IDS
    adata.var["feature_type"] = pd.Categorical(["protein_coding" if i % 3 else "lncRNA" for i in range(len(IDS))])
    adata.raw = adata


def by_column(adata):
    adata.X = adata.X.tocsc()


def as_array(adata):
    adata.X = adata.X.toarray()


def spike_ins(adata):
    adata.var["feature_biotype"] = "gene"
    adata.var["feature_type"] = "mRNA"


def locations(adata):
    adata.var["interval"] = [f"chr1:{i}00-{i}99" for i in range(1, 41)]


def airr(file):
    group = file["obsm"].create_group("airr")
    group.attrs.update({"encoding-type": "awkward-array", "encoding-version": "0.1.0", "form": "{}", "length": N})


def unknown_encoding(file):
    file["uns/new"] = np.zeros(3)
    file["uns/new"].attrs.update({"encoding-type": "of-tomorrow", "encoding-version": "9.0.0"})


def replaced(key, values):
    def damage(file):
        old = file[key]
        attributes = dict(old.attrs)
        new = values(old)
        del file[key]
        file.create_dataset(key, **new) if isinstance(new, dict) else file.create_dataset(key, data=new)
        file[key].attrs.update(attributes)

    return damage


def far_index(old):
    indices = old[:]
    indices[3] = 2**30
    return indices


def unknown_filter(file):
    values = file["X/data"][:]
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk(values.shape)
    properties.set_filter(399, h5py.h5z.FLAG_OPTIONAL)  # a number that HDF5 reserves for tests
    del file["X/data"]
    space = h5py.h5s.create_simple(values.shape)
    stored = h5py.h5d.create(file["X"].id, b"data", h5py.h5t.NATIVE_FLOAT, space, properties)
    stored.write_direct_chunk((0,), values.tobytes(), 0)


def falling_pointers(old):
    pointers = old[:]
    pointers[5] = 0
    return pointers


def never_written(old):
    return {"shape": old.shape, "dtype": old.dtype, "chunks": old.shape}


def of_two_billion(old):
    return {"shape": (2**31,), "dtype": "i8", "chunks": (2**20,)}


def ten_x(*, version=3, ids=True, extra=False, genomes=("GRCh38",)):
    def build(folder):
        matrix = sp.csr_matrix(COUNTS.to_numpy())
        with h5py.File(folder / "cells.h5", "w") as file:
            for genome in ("matrix",) if version == 3 else genomes:
                group = file.create_group(genome)
                for name in ("data", "indices", "indptr"):
                    group[name] = getattr(matrix, name)
                group["shape"] = COUNTS.shape[::-1]
                group["barcodes"] = np.array(CELLS, dtype="S")
                stored = ("features/name", "features/id") if version == 3 else ("gene_names", "genes")
                group[stored[0]] = np.array(GENES, dtype="S")
                if ids:
                    group[stored[1]] = np.array(IDS, dtype="S")
            if extra:
                file["version"] = 2
                file["latents/z"] = np.zeros(3)
        return folder / "cells.h5"

    return build


def compressed(name):
    def build(folder):
        path = h5ad()(folder)
        (folder / name).write_bytes(gzip.compress(path.read_bytes()))
        return folder / name

    return build


def h5mu(folder):
    prot = ad.AnnData(np.ones((N, 2), dtype=np.float32), COUNTS[[]].copy(), pd.DataFrame(index=["CD3", "CD19"]))
    with h5py.File(folder / "cells.h5mu", "w") as file:
        ad.io.write_elem(file, "mod/rna", make_adata())
        ad.io.write_elem(file, "mod/prot", prot)
        ad.io.write_elem(file, "obs", pd.DataFrame({"leiden_wnn": np.arange(N) % 3}, index=pd.Index(CELLS)))
    return folder / "cells.h5mu"


def zarr(*lost, dense=False, inside=("",)):
    """Stores of cells below one folder, of which some chunks are deleted."""

    def build(folder):
        import zarr as zarr_package

        store = folder / "cells.zarr"
        zarr_package.open_group(str(store), mode="w")
        for place in inside:
            adata = make_adata()
            adata.X = adata.X.toarray() if dense else adata.X
            adata.write_zarr(store / place)
        for part in lost:
            chunks = [p for p in (store / part).rglob("*") if p.is_file() and not p.name.startswith((".z", "zarr."))]
            chunks[0].unlink()
        return store

    return build


def loom_of_r(folder):
    with h5py.File(folder / "cells.loom", "w") as file:
        file["matrix"] = COUNTS.T.to_numpy()
        file["row_attrs/Gene"] = np.array(GENES, dtype="S")
        file["col_attrs/CellID"] = np.array(CELLS, dtype="S")
        file["attrs/LOOM_SPEC_VERSION"] = "3.0.0"
    return folder / "cells.loom"


def archive(folder):
    write_mtx(folder / "matrix")
    return Path(shutil.make_archive(str(folder / "cells"), "gztar", folder / "matrix"))


def retired_ids(adata):
    adata.var_names = [f"{gene}_ENSG{99900000000 + i:011d}" for i, gene in enumerate(GENES)]


T = table  # a table of the counts
NO_GENE = r"not genes were moved to obs"
CASES = [
    # several matrices in a folder
    Case("two samples of GEO", two_samples("{sample}_{what}", second=False), r"2 matrices: GSM1_T1.*GSM2_T2"),
    Case("the second sample of GEO", two_samples("{sample}_{what}", second=True), cells=SECOND),
    Case("the second sample, dots", two_samples("{sample}.{what}", second=True), cells=SECOND),
    Case("the second sample, at the end", two_samples("{what}_{sample}", second=True), cells=SECOND),
    Case("a second sample with the features of the series", shared_features, cells=SECOND, says="GSE9_features"),
    Case("barcodes that two samples could claim", shared_barcodes, r"no barcodes\.tsv"),
    Case("barcodes of another sample alone", barcodes_of_another_sample, r"other names: GSM1_T1_barcodes"),
    Case("tables of the series", of_the_series, says="read with GSE9_genes"),
    Case("outs of cellranger", cellranger_outs("raw_feature_bc_matrix", "filtered_feature_bc_matrix"), r"2 data sets"),
    Case("outs of cellranger, one matrix", cellranger_outs("filtered_feature_bc_matrix"), says="filtered_feature"),
    Case("outs of cellranger multi, one sample", cellranger_multi("s1"), says="per_sample_outs/s1"),
    Case("outs of cellranger multi", cellranger_multi("s1", "s2"), r"2 data sets.*s1.*s2"),
    Case("STARsolo with multimappers", starsolo_variants, says="also holds UniqueAndMult-EM"),
    Case("STARsolo Velocyto", parts("spliced.mtx", "unspliced.mtx", "ambiguous.mtx"), says=r"spliced \+ ambiguous"),
    Case("parts of other cells", parts_of_other_cells, r"have different cells or genes"),
    Case("files that macOS leaves", of_macos),
    Case(
        "kallisto nac",
        parts(
            *(f"cells_x_genes.{part}.mtx" for part in ("mature", "nascent", "ambiguous")),
            cells_first=True,
            tables=("cells_x_genes.genes.txt", "cells_x_genes.barcodes.txt"),
        ),
        says=r"mature \+ ambiguous",
    ),
    Case("kallisto", kallisto),
    Case("kallisto, as many cells as genes", square_of_kallisto),
    Case("alevin-fry in USA mode", alevin_usa, says=r"spliced \+ ambiguous"),
    Case("Parse Biosciences", parse_biosciences, obs=("sample", "tscp_count")),
    Case("tables with headers and row numbers", with_headers),
    Case("a header of too many entries", huge_header, r"too short for them"),
    Case("a truncated matrix", truncated_mtx, r"truncated or not a Matrix Market"),
    Case("droplets without cells", raw_droplets, says="unfiltered", cells=slice(0, 0)),
    Case("an archive", archive, r"unpack it first"),
    # text tables
    Case("metadata of Seurat", T("t.csv", seurat), says=NO_GENE, obs=("seurat_clusters", "percent.mt", "cell_type")),
    Case("metadata at the end", T("t.csv", scanpy_at_the_end), says=NO_GENE, obs=("leiden", "UMAP_1", "age_years")),
    Case("metadata of unknown names", T("t.csv", unheard_of), says=NO_GENE, obs=("my own gate", "zScore")),
    Case(
        "featureCounts",
        T("t.txt", feature_counts, turned=True, sep="\t"),
        says="moved to var",
        var=("Start", "Length"),
    ),
    Case("metadata in rows", T("t.csv", metadata_rows, turned=True), obs=("nCount_RNA", "seurat_clusters")),
    Case("a row of words", T("t.csv", row_of_words, turned=True), obs=("cell_type",)),
    Case("htseq-count", T("t.tsv", htseq, turned=True, sep="\t"), aside=3),
    Case("AbSeq", T("t.csv", abseq(["CD3:UCHT1|CD3E|AHS0231|pAbO", "CD4:SK3|CD4|AHS0032|pAbO"])), aside=2),
    Case("AbSeq from R", T("t.csv", abseq(["CD3.UCHT1.CD3E.AHS0231.pAbO", "HTO_1"])), aside=2),
    Case("CITE-seq-Count tags", T("t.csv", abseq(["CD3-CTCATTGTAACTCCT", "Hashtag1-ACCCACCAGTAAGAC"])), aside=2),
    Case("a panel with its genes in rows", T("t.csv", lambda f: f.iloc[:30], turned=True), says="transposed"),
    Case(
        "a long table of UMI-tools", long_table({"gene": "gene", "cell": "cell", "count": "count"}), says="long format"
    ),
    Case("a long table of other words", long_table({"cell": "barcode", "gene": "symbol", "count": "n"}), says="long"),
    Case("a long table with row numbers", long_table({"cell": "cb", "gene": "gene", "count": "umi"}, counter=True)),
    Case(
        "a long table of two counts",
        long_table({"cell": "cell", "gene": "gene", "count": "reads"}, extra="molecules"),
        r"long format.*'reads', 'molecules'",
    ),
    Case("a decimal comma", T("t.csv", sep=";", edit=numbers_as(",")), says="decimal mark is a comma"),
    Case("commas of two meanings", T("t.csv", sep=";", edit=thousands), r"'1,234'.*decimals or thousands"),
    Case("a semicolon", T("t.csv", sep=";")),
    Case("a bar", T("t.txt", sep="|")),
    Case("a line that states the separator", T("t.csv", sep=";", edit=lambda text: "sep=;\n" + text)),
    Case("comments", T("t.csv", edit=lambda text: "#### BD\n## 2021\n####\n" + text)),
    Case("a header that begins with #", T("t.tsv", sep="\t", turned=True, edit=lambda text: "#gene" + text)),
    Case("a separator at the end of lines", T("t.csv", edit=lambda text: text.replace("\n", ",\n"))),
    Case("quoted fields", T("t.csv", edit=quoted)),
    Case("Excel's UTF-8", T("t.csv", encoding="utf-8-sig")),
    Case("Excel's UTF-16", T("t.txt", encoding="utf-16", sep="\t")),
    Case("Windows' letters", T("t.csv", lambda f: f.assign(Spülung="Köln"), encoding="latin-1"), obs=("Spülung",)),
    Case("row numbers before the names", T("t.csv", lambda f: f.rename_axis("barcode").reset_index())),
    Case("row names of R", T("t.tsv", sep="\t", edit=lambda text: text.lstrip("\t"))),
    Case("names with zeros in front", T("t.csv", zero_padded), cells=slice(0, 0), says="24 cells x 40"),
    Case("a gene with a word among its counts", T("t.csv", edit=with_a_word), r"Column 'ACTB'.*mixes 'many'"),
    Case("a cell with a word among its counts", T("t.csv", turned=True, edit=with_a_word), r"mixes 'many'"),
    Case("a header and no rows", T("t.csv", lambda f: f.iloc[:0]), r"no rows"),
    Case("a number of the row, the sample and the barcode", T("t.csv", counted), obs=("orig.ident",)),
    Case("a gene's probe before its symbol", T("t.csv", probes, turned=True), var=("symbol",), cells=slice(0, 0)),
    Case("a long table with samples", T("t.csv", long_with_sample, index=False), obs=("sample",)),
    Case("a long table of cells of one name", T("t.csv", long_twice, index=False), r"'sample' has several values"),
    Case("a compressed table", T("t.tsv.gz", sep="\t", turned=True)),
    Case("no header", T("t.csv", turned=True, edit=without_header), r"has no header"),
    Case("genes by genes", T("t.csv", lambda f: f.T @ f), r"genes in both rows and columns"),
    Case("a spreadsheet", spreadsheet, r"Save it as"),
    # HDF5 and Zarr
    Case("an h5ad by column", h5ad(by_column)),
    Case("an h5ad without zeros left out", h5ad(as_array)),
    Case("a Zarr", zarr()),
    Case("10x", ten_x()),
    Case("biotypes of CELLxGENE", h5ad(biotypes)),
    Case("a biotype that is a word of ours", h5ad(spike_ins)),
    Case("locations of the genes", h5ad(locations)),
    Case("retired ids with symbols", h5ad(retired_ids), says="40 of 40 match", cells=slice(0, 0)),
    Case("a part of a missing package", h5ad(damage=airr), r"obsm/airr.*package awkward"),
    Case("a part of an unknown encoding", h5ad(damage=unknown_encoding), r"uns/new.*'of-tomorrow'"),
    Case("a filter that is not installed", h5ad(damage=unknown_filter), r"X/data.*filter 399.*hdf5plugin"),
    Case("10x without ids", ten_x(ids=False)),
    Case("10x version 2 with more in the file", ten_x(version=2, extra=True)),
    Case("10x of two genomes", ten_x(version=2, genomes=("GRCh38", "mm10")), r"several genomes \(GRCh38, mm10\)"),
    Case("a compressed h5ad", compressed("cells.h5ad.gz"), r"gunzip"),
    Case("a compressed h5", compressed("cells.h5.gz"), r"gunzip"),
    Case("a h5mu with proteins", h5mu, says="mod/prot is neither read", obs=("leiden_wnn", "cell_type")),
    Case("SpatialData", zarr(inside=("tables/table",)), says="tables/table of the store"),
    Case("SpatialData with two tables", zarr(inside=("tables/a", "tables/b")), r"2 tables of cells.*a.*b"),
    Case("a Zarr without a chunk of values", zarr("X/data"), r"lacks 1 of 1 chunks"),
    Case("a Zarr without a chunk of positions", zarr("X/indices"), r"lacks 1 of 1 chunks"),
    Case("a Zarr without a dense chunk", zarr("X", dense=True), r"lacks 1 of 1 chunks"),
    Case("a Zarr without its barcodes", zarr("obs/_index"), r"lacks 1 of 1 chunks"),
    Case("a Zarr without its labels", zarr("obs/cell_type/codes"), r"first label"),
    Case("an index out of range", h5ad(damage=replaced("X/indices", far_index)), r"only 40 positions"),
    Case("pointers that fall", h5ad(damage=replaced("X/indptr", falling_pointers)), r"is damaged"),
    Case("values that were never written", h5ad(damage=replaced("X/data", never_written)), r"lacks 1 of 1 chunks"),
    Case("two billion pointers", h5ad(damage=replaced("X/indptr", of_two_billion)), r"lacks 2048 of 2048 chunks"),
    Case("a loom", loom_of_r),
]
