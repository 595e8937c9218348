"""Building a corpus: nothing lost, nothing twice, the same bytes however it is built, and a manifest that is true."""

import json
import os
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp


pytest.importorskip("cellxgene_ontology_guide")

from scmmgpt.genes_scmmgpt import GeneIndex
from scmmgpt.synthetic import synthetic_adata
from scmmgpt.train.data import build as builder
from scmmgpt.train.data import build_steps, ontology, prepare
from scmmgpt.train.data.captions import read_gene_means
from scmmgpt.train.data.corpus import SPLITS, hash_file, open_corpus
from scmmgpt.train.data.splits import split_cells, split_units


GENES = list(synthetic_adata(4).var_names)
SMALL = ["--cells-per-shard", "40", "--cells-per-partition", "25"]


@pytest.fixture
def own_genes(monkeypatch):
    """Judge genes by those of the synthetic cells alone: the real tables take seconds to load."""
    index = GeneIndex({symbol: i for i, symbol in enumerate(GENES)})
    monkeypatch.setattr(build_steps, "reference_gene_index", lambda: index)
    monkeypatch.setattr(builder, "build_gene_aliases", lambda vocabulary: {"aliases": {}, "orthologs": {}})
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # many tiny files, none of which outlives the test


@pytest.fixture
def folder(tmp_path):
    """Three files of 60 cells each, with two donors each."""
    path = tmp_path / "sources"
    path.mkdir()
    for i in range(3):
        adata = synthetic_adata(60, seed=i)
        adata.obs["donor_id"] = [f"{i}-{name}" for name in adata.obs["donor_id"]]
        adata.write_h5ad(path / f"set{i}.h5ad")
    return path


@pytest.fixture
def build(tmp_path, own_genes):
    """Run the command, and open what it made."""

    def run(*arguments, output="corpus"):
        path = tmp_path / output
        prepare.main(prepare.make_parser().parse_args([*map(str, arguments), "--output", str(path)]))
        return open_corpus(path)

    return run


def read_all(corpus):
    """Every cell of a corpus as {(dataset, barcode): ({symbol: count}, obs row with its split)}."""
    found = {}
    for split in corpus.split_names:
        cells, table = corpus.load(split)
        for i, row in enumerate(table.to_pylist()):
            span = slice(cells.indptr[i], cells.indptr[i + 1])
            symbols = corpus.gene_symbols[cells.gene_ids[span]]
            counts = dict(zip(symbols, cells.counts[span].tolist(), strict=True))
            key = row["dataset_id"], row["barcode"]
            assert key not in found
            found[key] = counts, row | {"split": split, "total": cells.total_counts[i], "id": cells.cell_ids[i]}
    return found


def bytes_of(corpus):
    return {shard.path: shard.sha256 for shard in corpus.manifest.shards}


def test_every_cell_of_every_source_is_there_once_with_its_counts(build, folder):
    found = read_all(build(folder, *SMALL))
    assert len(found) == 180
    for path in sorted(folder.iterdir()):
        adata = anndata.read_h5ad(path)
        for name, row, label in zip(adata.obs_names, adata.X.toarray(), adata.obs["cell_type"], strict=True):
            counts, obs = found[path.stem, name]
            assert counts == {gene: count for gene, count in zip(GENES, row.tolist(), strict=True) if count}
            assert obs["cell_type"] == label
            assert obs["total"] == row.sum()
    assert len({obs["id"] for _, obs in found.values()}) == 180


def test_the_cells_of_all_sources_are_mixed_in_every_shard(build, folder):
    corpus = build(folder, "--split-by", "cell", *SMALL)
    tables = [corpus.open_shard(shard).read(["dataset_id"])["dataset_id"] for shard in corpus.shards("train")]
    assert len(tables) >= 4
    for table in tables:
        assert set(table.to_pylist()) == {"set0", "set1", "set2"}


def test_the_bytes_do_not_depend_on_partitions_or_order_of_files(build, folder):
    first = build(folder, "--cells-per-shard", 40, "--cells-per-partition", 25)
    files = sorted(folder.iterdir(), reverse=True)
    second = build(*files, "--cells-per-shard", 40, "--cells-per-partition", 7, output="other")
    assert bytes_of(first) == bytes_of(second)
    assert (first.path / "genes.parquet").read_bytes() == (second.path / "genes.parquet").read_bytes()


def test_worker_processes_write_the_same_bytes(build, folder):
    assert bytes_of(build(folder, *SMALL)) == bytes_of(build(folder, *SMALL, "--workers", 2, output="parallel"))


def test_a_dask_cluster_writes_the_same_bytes(build, folder):
    distributed = pytest.importorskip("distributed", reason="Dask is not installed (extra `cluster`)")
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with distributed.LocalCluster(**options) as cluster:
        parallel = build(folder, *SMALL, "--cluster", cluster.scheduler_address, output="parallel")
    assert bytes_of(build(folder, *SMALL)) == bytes_of(parallel)


def test_datasets_are_kept_together(build, folder):
    corpus = build(folder, *SMALL)
    assert corpus.manifest.split_by == "dataset"
    splits = {dataset: obs["split"] for (dataset, _), (_, obs) in read_all(corpus).items()}
    assert sorted(splits.values()) == ["test", "train", "validation"]
    for (dataset, _), (_, obs) in read_all(corpus).items():
        assert obs["split"] == splits[dataset]
    assert corpus.splits["units"][splits["set0"]] == [["set0"]]


def test_donors_are_kept_together_where_there_are_too_few_datasets(build, folder):
    corpus = build(folder / "set0.h5ad", folder / "set1.h5ad", *SMALL)
    assert corpus.manifest.split_by == "donor"
    splits = {}
    for _, obs in read_all(corpus).values():
        splits.setdefault(obs["donor_id"], set()).add(obs["split"])
    assert len(splits) == 4
    assert all(len(found) == 1 for found in splits.values())


def test_cells_are_split_only_where_nothing_else_is_known(build, tmp_path):
    adata = synthetic_adata(200)
    del adata.obs["donor_id"]
    adata.write_h5ad(tmp_path / "one.h5ad")
    corpus = build(tmp_path / "one.h5ad", "--test-fraction", 0.2, "--validation-fraction", 0.1)
    assert corpus.manifest.split_by == "cell"
    assert "no donors are known" in corpus.manifest.notes["split"]
    table = pd.DataFrame([obs for _, obs in read_all(corpus).values()])
    # 50 cells of each of the four types
    assert (table.groupby(["cell_type", "split"]).size().unstack()[list(SPLITS)] == [35, 5, 10]).all(axis=None)


def test_a_column_can_say_the_split(build, tmp_path):
    adata = synthetic_adata(60)
    adata.obs["fold"] = np.resize(["train", "val", "test", "Train"], 60)
    adata.write_h5ad(tmp_path / "one.h5ad")
    found = read_all(build(tmp_path / "one.h5ad", "--split-column", "fold"))
    expected = {"train": "train", "val": "validation", "test": "test", "Train": "train"}
    for name, fold in adata.obs["fold"].items():
        assert found["one", name][1]["split"] == expected[fold]


def test_units_fill_the_splits_to_their_shares():
    units = [(f"d{i}", None, 10) for i in range(100)]
    content = split_units(units, {"test": 0.2, "validation": 0.1})
    assert {name: len(members) for name, members in content["units"].items()} == {
        "train": 70,
        "validation": 10,
        "test": 20,
    }
    assert split_units(units, {"test": 0.2, "validation": 0.1}, seed=1)["units"] != content["units"]


def test_one_unit_cannot_be_split():
    with pytest.raises(ValueError, match="belong to one dataset"):
        split_units([("d", None, 10)], {"test": 0.2, "validation": 0.1}, by="dataset")


def test_a_type_of_three_cells_is_in_every_split():
    cutoffs = split_cells(np.arange(3, dtype=np.uint64), ["rare"] * 3, {"test": 0.05, "validation": 0.05})
    assert cutoffs["rare"][0] < cutoffs["rare"][1] < 2**64 - 1


def test_excluded_datasets_are_absent_and_recorded(build, folder):
    corpus = build(folder, "--exclude-dataset", "set1", *SMALL)
    assert {dataset for dataset, _ in read_all(corpus)} == {"set0", "set2"}
    assert corpus.manifest.excluded_datasets == ["set1"]
    assert corpus.manifest.dropped["cells"]["excluded_dataset"] == 60
    assert "set1" in (corpus.path / "README.md").read_text()


def test_a_given_vocabulary_is_kept(build, folder, tmp_path):
    vocabulary = {"<pad>": 0, "GNLY": 1, "<cls>": 2, "CD14": 3, "<eoc>": 4}
    vocabulary |= {gene: 5 + i for i, gene in enumerate(GENES[:30]) if gene not in vocabulary}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    corpus = build(folder, "--vocabulary", tmp_path / "vocab.json", *SMALL)
    assert corpus.vocabulary == vocabulary
    adata = anndata.read_h5ad(folder / "set0.h5ad")
    counts, obs = read_all(corpus)["set0", "cell-3"]
    expected = dict(zip(GENES, adata["cell-3"].X.toarray()[0].tolist(), strict=True))
    assert counts == {gene: count for gene, count in expected.items() if count and gene in vocabulary}
    assert obs["total"] == sum(expected.values())
    unmatched = len(set(GENES) - vocabulary.keys())
    assert corpus.manifest.dropped["genes"]["set0"]["unmatched"] == unmatched > 0


def test_labels_are_resolved_and_what_is_not_is_listed(build, tmp_path):
    adata = synthetic_adata(60)
    adata.obs["label"] = np.resize(["B-cell", "CD14+ Monocyte", "cluster 9"], 60)
    adata.obs = adata.obs[["label"]]
    adata.write_h5ad(tmp_path / "one.h5ad")
    corpus = build(tmp_path / "one.h5ad", "--column", "cell_type=label", "--constant", "tissue=PBMC")
    labels = corpus.manifest.sources[0]["labels"]["cell_type"]
    assert labels["unmatched"] == {"cluster 9": 20}
    assert sum(labels["cells"].values()) == 60
    rows = [obs for _, obs in read_all(corpus).values()]
    named = {(row["cell_type"], row["cell_type_ontology_term_id"]) for row in rows}
    assert named == {("B cell", "CL:0000236"), ("CD14-positive monocyte", "CL:0001054"), ("cluster 9", None)}
    assert {(row["tissue"], row["tissue_ontology_term_id"]) for row in rows} == {("blood", "UBERON:0000178")}


def test_values_that_are_no_16_bit_integers_are_kept_exactly_in_shards_of_their_own(build, folder):
    adata = synthetic_adata(60, seed=9)
    adata.X.data *= np.random.default_rng(0).uniform(0.3, 3, adata.X.nnz).astype(np.float32)
    adata.X.data[0] = 70_001.5
    adata.write_h5ad(folder / "fractions.h5ad")
    corpus = build(folder, "--split-by", "cell", "--assume", "normalized", *SMALL)
    assert {shard.counts_dtype for shard in corpus.shards("train")} == {"uint16", "float32"}
    found = read_all(corpus)
    for name, row in zip(adata.obs_names, adata.X.toarray().astype(np.float32), strict=True):
        counts, _ = found["fractions", name]
        assert counts == {gene: value for gene, value in zip(GENES, row.tolist(), strict=True) if value}
    assert found["set1", "cell-1"][0].keys() <= set(GENES)


def test_copies_of_a_cell_are_dropped_and_namesakes_renamed(build, folder):
    first = anndata.read_h5ad(folder / "set0.h5ad")
    second = anndata.read_h5ad(folder / "set1.h5ad")
    second = anndata.concat([first[:10], second[10:]])  # ten copies, and fifty others of the same barcodes
    for name, adata in (("set0", first), ("set1", second)):
        adata.obs["dataset_id"] = "one"
        adata.obs["donor_id"] = "donor"
        adata.write_h5ad(folder / f"{name}.h5ad")
    (folder / "set2.h5ad").unlink()
    corpus = build(folder, "--test-fraction", 0, "--validation-fraction", 0, *SMALL)
    assert corpus.manifest.n_cells == 110
    assert corpus.manifest.dropped["cells"]["duplicates"] == 10
    assert corpus.manifest.notes["renamed_cells"] == 50
    assert len(np.unique(corpus.load("train")[0].cell_ids)) == 110


@pytest.mark.parametrize("split_by", ["dataset", "cell"])
def test_a_cell_of_two_sources_is_in_one_split(build, folder, split_by, monkeypatch):
    """Copies have other barcodes and datasets, and other genes beside the common ones."""
    monkeypatch.setattr(builder, "MIN_COMMON_GENES", 30)
    monkeypatch.setattr(build_steps, "MIN_COPIED_GENES", 5)
    first = anndata.read_h5ad(folder / "set0.h5ad")
    copies = first[:20, :38].copy()
    copies.obs_names = [f"merged-{name}" for name in copies.obs_names]
    anndata.concat([anndata.read_h5ad(folder / "set1.h5ad")[:, :38], copies], merge="same").write_h5ad(
        folder / "set1.h5ad"
    )
    corpus = build(folder, "--split-by", split_by, *SMALL)
    assert corpus.manifest.dropped["cells"]["duplicates"] == 20
    found = read_all(corpus)
    common = set(GENES[:38])
    contents = [tuple(sorted((g, n) for g, n in counts.items() if g in common)) for counts, _ in found.values()]
    assert len(set(contents)) == len(contents) == 180


def test_equal_cells_of_few_genes_are_no_copies(build, folder):
    for name in ("set0", "set1"):
        adata = anndata.read_h5ad(folder / f"{name}.h5ad")
        counts = np.zeros(adata.shape, dtype=np.float32)
        counts[:, :3] = 1
        adata.X = sp.csr_matrix(counts)
        adata.write_h5ad(folder / f"{name}.h5ad")
    assert build(folder, *SMALL).manifest.dropped["cells"]["duplicates"] == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--column", "cell_type=celltype"], r"no obs column 'celltype' to take 'cell_type' from; it has .*cell_type"),
        (["--split-column", "fold"], r"no obs column 'fold'; it has"),
        (["--exclude-dataset", "set9"], r"names \['set9'\], but the sources have the datasets set0, set1, set2"),
        (["--licence", "set9=cc0"], r"names \['set9'\], but the sources are called set0, set1, set2"),
        (["--layer", "counts"], "counts"),
        (["--column", "colour=hue"], "'colour' is not a column"),
    ],
)
def test_a_name_that_the_sources_lack_is_refused_with_those_they_have(build, folder, tmp_path, words, says):
    for path in folder.glob("*.h5ad"):  # datasets are called like their sources
        adata = anndata.read_h5ad(path)
        adata.obs = adata.obs.drop(columns="dataset_id", errors="ignore")
        adata.write_h5ad(path)
    with pytest.raises(ValueError, match=says):
        build(folder, *words, *SMALL)
    assert not (tmp_path / "corpus").exists() or words[0] == "--exclude-dataset"  # known once the sources are read
    build(folder, *SMALL)  # in the same folder, once the mistake is mended


def test_a_folder_of_other_files_does_not_become_a_corpus(build, folder, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds other files, such as 'config.json'"):
        build(folder, output="model")
    assert (tmp_path / "model" / "config.json").read_text() == "{}"


def test_sources_of_one_name_are_called_by_the_folder_that_differs():
    def names(*paths):
        return prepare.name_sources([Path(path) for path in paths])

    assert names("A/outs/m.h5", "B/outs/m.h5") == ["A", "B"]
    assert names("run1/A/outs/m.h5", "run1/B/outs/m.h5", "C.h5ad") == ["A", "B", "C"]
    assert names("x/A/m.h5", "x/B/m.h5", "y/A/m.h5") == ["x-A", "x-B", "y-A"]
    assert names("A/m.h5", "B/m.h5", "A.h5ad") == ["A-m", "B", "A"]
    assert names("A/filtered", "B/filtered") == ["A", "B"]
    assert names("one.h5ad", "two.h5ad") == ["one", "two"]


def test_labels_are_cleaned_and_codes_are_doubted(build, folder, caplog):
    adata = anndata.read_h5ad(folder / "set0.h5ad")
    adata.obs["cell_type"] = [" foo  cell", "foo cell "] * 30
    adata.obs["cell_type_ontology_term_id"] = "unknown"
    adata.write_h5ad(folder / "set0.h5ad")
    adata = anndata.read_h5ad(folder / "set1.h5ad")
    adata.obs["cell_type"] = [0.0, 1.0] * 30
    adata.obs["cell_type_ontology_term_id"] = "unknown"
    adata.write_h5ad(folder / "set1.h5ad")
    found = {row["cell_type"] for _, row in read_all(build(folder, *SMALL)).values()}
    assert {"foo cell", "0", "1"} <= found
    assert "foo cell " not in found
    assert "cell_type of set1 has codes, not names ('0', '1')" in caplog.text


def test_cells_with_too_few_genes_are_dropped_and_counted(build, folder):
    adata = anndata.read_h5ad(folder / "set0.h5ad")
    counts = adata.X.toarray()
    counts[:8] = 0
    counts[7, 3] = 5
    adata.X = sp.csr_matrix(counts)
    adata.write_h5ad(folder / "set0.h5ad")
    assert build(folder, *SMALL).manifest.dropped["cells"]["too_few_genes"] == 7
    assert build(folder, "--min-genes", 2, *SMALL, output="two").manifest.dropped["cells"]["too_few_genes"] == 8


def test_a_finished_corpus_is_left_alone(build, folder):
    corpus = build(folder, *SMALL)
    before = {path: path.stat().st_mtime_ns for path in corpus.path.glob("data/*")}
    build(folder, *SMALL)
    with pytest.raises(ValueError, match=r"other sources or options \(seed differ\)"):
        build(folder, *SMALL, "--seed", 1)
    assert before == {path: path.stat().st_mtime_ns for path in corpus.path.glob("data/*")}
    assert not (corpus.path / ".build").exists()


def test_the_manifest_gives_the_command(build, folder):
    arguments = [str(folder), "--exclude-dataset", "set1", "--seed", "3", *SMALL]
    corpus = build(*arguments)
    words = corpus.manifest.command.split()
    assert words[:4] == ["python", "-m", "scmmgpt.train", "prepare"]
    again = prepare.make_parser().parse_args(words[4:])
    assert again == prepare.make_parser().parse_args([*arguments, "--output", str(corpus.path)])


def test_the_card_loads_the_corpus_with_datasets(build, folder):
    yaml = pytest.importorskip("yaml")
    datasets = pytest.importorskip("datasets")
    corpus = build(folder, "--licence", "cc-by-4.0", *SMALL)
    card = (corpus.path / "README.md").read_text().split("---")
    front = yaml.safe_load(card[1])
    assert front["license"] == "cc-by-4.0"
    files = {entry["split"]: str(corpus.path / entry["path"]) for entry in front["configs"][0]["data_files"]}
    assert set(files) == set(SPLITS)
    rows = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    barcodes = [row["barcode"] for row in rows]
    assert sorted(barcodes) == sorted(corpus.obs("train", ["barcode"])["barcode"].to_pylist())


def test_gene_means_are_those_of_the_training_cells(build, folder):
    corpus = build(folder, *SMALL)
    (dataset,) = corpus.splits["units"]["train"][0]
    counts = anndata.read_h5ad(folder / f"{dataset}.h5ad").X.toarray()
    expected = (counts / counts.sum(axis=1, keepdims=True)).mean(axis=0)
    means = read_gene_means(corpus.path)
    np.testing.assert_allclose(means[[corpus.vocabulary[gene] for gene in GENES]], expected, rtol=1e-6)


def test_a_source_that_cannot_be_read_is_named(build, folder):
    adata = synthetic_adata(60)
    adata.var_names = [f"thing{i}" for i in range(adata.n_vars)]
    adata.write_h5ad(folder / "wrong.h5ad")
    with pytest.raises(ValueError, match=r"wrong.h5ad: Only 0 of"):
        build(folder, *SMALL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Name the sources"),
        (["--demo", "pbmc68k", "--census", "2025-01-30"], "one kind at a time"),
        (["--demo", "pbmc68k", "--test-fraction", "1"], "leave cells to train on"),
    ],
)
def test_wrong_arguments_are_refused(build, arguments, message):
    with pytest.raises(ValueError, match=message):
        build(*arguments)


def test_census_releases_must_be_pinned():
    pytest.importorskip("cellxgene_census", reason="extra `census` is not installed")
    from scmmgpt.train.data.sources import open_census

    with pytest.raises(ValueError, match="Pin one by its date"):
        open_census("stable")


def test_a_census_slice_becomes_a_corpus(build, tmp_path):
    """The client code of the real Census, on a SOMA of the same layout written here."""
    soma = pytest.importorskip("tiledbsoma", reason="extra `census` is not installed")
    pytest.importorskip("cellxgene_census", reason="extra `census` is not installed")
    import tiledbsoma.io

    adata = synthetic_adata(80)
    adata.obs["is_primary_data"] = np.arange(80) % 4 != 0
    adata.obs["tissue_general"] = np.where(np.arange(80) < 60, "blood", "lung")
    adata.obs["dataset_id"] = [f"dataset-{i % 5}" for i in range(80)]
    adata.obs["observation_joinid"] = [f"joinid-{i}" for i in range(80)]
    adata.obs = adata.obs.drop(columns=["organism", "organism_ontology_term_id"])
    adata.var["feature_id"] = adata.var["feature_name"] = adata.var_names
    uri = str(tmp_path / "census")
    with soma.Collection.create(uri) as census:
        data = census.add_new_collection("census_data")
        human = f"{uri}/census_data/homo_sapiens"
        tiledbsoma.io.from_anndata(human, adata, measurement_name="RNA", X_layer_name="raw")
        data["homo_sapiens"] = soma.Experiment.open(human)
    corpus = build("--census", uri, "--filter", "tissue_general == 'blood'", *SMALL)
    found = read_all(corpus)
    taken = [i for i in range(60) if i % 4]
    assert {barcode for _, barcode in found} == {f"joinid-{i}" for i in taken}
    for i in taken:
        counts, obs = found[f"dataset-{i % 5}", f"joinid-{i}"]
        row = adata.X[i].toarray()[0].tolist()
        assert counts == {gene: count for gene, count in zip(GENES, row, strict=True) if count}
        assert obs["cell_type"] == adata.obs["cell_type"].iloc[i]
        assert obs["organism"] == "Homo sapiens"
    assert corpus.manifest.split_by == "dataset"
    assert corpus.manifest.sources[0]["licence"] == "cc-by-4.0"
    assert "is_primary_data" in corpus.manifest.sources[0]["value_filter"]


def test_the_demo_is_real_counts(tmp_path):
    scanpy = pytest.importorskip("scanpy")
    prepare.main(prepare.make_parser().parse_args(["--demo", "pbmc68k", "--output", str(tmp_path / "demo")]))
    corpus = open_corpus(tmp_path / "demo")
    assert {split: corpus.n_cells(split) for split in SPLITS} == {"train": 488, "validation": 70, "test": 142}
    adata = scanpy.datasets.pbmc68k_reduced()
    found = read_all(corpus)
    assert len({obs["cell_type"] for _, obs in found.values()}) == adata.obs["bulk_labels"].nunique()
    for name in adata.obs_names[:20]:
        counts, obs = found["pbmc68k_reduced", name]
        row = dict(zip(adata.raw.var_names, np.expm1(adata.raw[name].X.toarray()[0]), strict=True))
        # CP10k of integer counts over all genes, whose number per cell is known
        scale = adata.obs["n_counts"][name] / 1e4
        for symbol, count in counts.items():
            if symbol in row:
                assert abs(row[symbol] * scale - count) < 0.02 * count + 0.05
        assert obs["total"] == pytest.approx(adata.obs["n_counts"][name], rel=0.01)


def test_the_development_data_become_one_corpus(shared_data, tmp_path):
    n_cells = {"pbmc_facs": 3874, "kang_pbmc_unlabelled": 2000}
    files = [str(shared_data / f"{name}.h5ad") for name in n_cells]
    prepare.main(prepare.make_parser().parse_args([*files, "--output", str(tmp_path / "all")]))
    corpus = open_corpus(tmp_path / "all")
    assert {source["name"]: source["n_cells"] for source in corpus.manifest.sources} == n_cells
    for source in corpus.manifest.sources:
        adata = anndata.read_h5ad(shared_data / f"{source['name']}.h5ad", backed="r")
        assert source["n_cells"] == source["n_kept"] == adata.n_obs
        assert source["sha256"] == hash_file(shared_data / f"{source['name']}.h5ad")
        assert source["genes"]["matched"] > 0.97 * adata.n_vars
        assert "unmatched" not in source["labels"]["cell_type"]


def test_a_reviewed_table_names_the_types_of_each_file_and_leaves_other_files_out(folder, build, tmp_path):
    types = sorted(set(synthetic_adata(60, seed=0).obs["cell_type"]))
    labels = dict.fromkeys(types) | {types[0]: "CL:0000236"}
    entry = {"label_key": "cell_type", "labels": labels, "constants": {"tissue": "liver"}, "licence": "cc0-1.0"}
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"sets": {"set1": entry}}))
    corpus = build(folder, "--labels", table, "--split-by", "cell")
    assert [(source["name"], source["licence"]) for source in corpus.manifest.sources] == [("set1", "cc0-1.0")]
    obs = pd.concat([corpus.obs(split).to_pandas() for split in SPLITS])
    assert set(obs["cell_type"].dropna()) == {"B cell"}
    assert obs["cell_type"].isna().any()
    assert set(obs["tissue_ontology_term_id"]) == {"UBERON:0002107"}
    del labels[types[1]]
    table.write_text(json.dumps({"sets": {"set1": entry}}))
    with pytest.raises(ValueError, match="which the table of labels lacks"):
        build(folder, "--labels", table, output="other")
    with pytest.raises(FileNotFoundError, match="no table of labels"):
        build(folder, "--labels", "nobody", output="third")


def test_the_table_of_this_package_names_terms_of_the_cell_ontology():
    table = prepare.read_label_table("human")
    ids = {term for entry in table["sets"].values() for term in entry.get("labels", {}).values() if term}
    names = {term: ontology.term_name(term) for term in ids | set(table["types"])}
    assert [term for term, name in names.items() if name is None or "obsolete" in name] == []
