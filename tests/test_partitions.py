"""Many cells: partitions on several processes give the answers of one, and a run that was stopped goes on."""

import errno
import json
import multiprocessing
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest

from scmmgpt import synthetic
from scmmgpt.__main__ import main
from scmmgpt.annotation_scmmgpt import fit_label_sets
from scmmgpt.cells_scmmgpt import Cells
from scmmgpt.commands import partition_tasks, partitions, results
from scmmgpt.commands.partition_tasks import Job, Partition, default_options, file_name
from scmmgpt.commands.results import RowBlocks
from scmmgpt.commands.sources import Source
from scmmgpt.labelling_scmmgpt import Labelling
from scmmgpt.novelty_scmmgpt import Neighbours
from scmmgpt.pipeline_scmmgpt import ScMMGPTPipeline
from scmmgpt.readers.cell_files import CellFile
from scmmgpt.tests.corpora import write_corpus
from scmmgpt.train.data import ontology


LABELS = {"B": "a B cell", "T": "a T cell", "NK": "killer lymphocyte"}


@pytest.fixture
def checkpoint(tiny_pipeline, tmp_path):
    """A saved tiny checkpoint with three labels."""
    tiny_pipeline.model.config.annotation = {"labels": LABELS, "cl_ids": {"B": "CL:0000236"}}
    tiny_pipeline.save_pretrained(tmp_path / "checkpoint")
    return str(tmp_path / "checkpoint")


@pytest.fixture
def small(monkeypatch):
    """Partitions of this process with seven cells or a multiple, and batches within them."""
    monkeypatch.setattr("scmmgpt.passes_scmmgpt.SORTED_CELLS", 7)
    monkeypatch.setattr("scmmgpt.conversion_scmmgpt.CHUNK_ROWS", 7)
    monkeypatch.setattr("scmmgpt.conversion_scmmgpt.CACHED_ROWS", 7)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A saved checkpoint with a readout that knows four types, and a gate for labels that it does not know."""
    pipeline, folder = synthetic.fitted_pipeline(), tmp_path_factory.mktemp("fitted") / "checkpoint"
    gate = {"weights": [1, 1, 1], "offset": 0, "scale": [999, 999, 99], "depth": [0, 0, 0]}
    pipeline.model.config.annotation["unseen_gate"] = {**gate, "batch_weights": [1, 1, 1], "batch_offset": 0.5}
    names = list(pipeline.model.config.annotation["labels"])
    pipeline.model.config.annotation["tissues"] = ontology.tissue_terms([("lung", name) for name in names[:2]])
    sure = np.random.default_rng(0).dirichlet(np.ones(len(names)), size=200)
    pipeline.model.config.annotation["label_sets"] = fit_label_sets(sure, sure.argmax(axis=1))
    pipeline.save_pretrained(folder)
    return str(folder)


def run(command, *words, checkpoint, status=0):
    """A command with one thread, which partitions have: sums by several threads differ in the last bit."""
    with partition_tasks.one_thread():
        code = main([command, *map(str, words), "--model", checkpoint, "--quiet"])
    assert code == status


def assert_same(path, other):
    """Two results are equal in every bit."""
    one, two = anndata.read_h5ad(path), anndata.read_h5ad(other)
    pd.testing.assert_frame_equal(one.obs, two.obs, check_exact=True)
    assert set(one.obsm) == set(two.obsm)
    for name in one.obsm:
        np.testing.assert_array_equal(one.obsm[name], two.obsm[name])
    assert (one.X != two.X).sum() == 0
    assert repr(one.uns) == repr(two.uns)


COMMANDS = [
    ["annotate", "--error-rate", "0.1", "--cluster-key", "donor_id"],
    ["annotate", "--tissue", "lung", "--evidence"],
    ["audit", "--cluster-key", "donor_id", "--table"],
    ["search", "--text", "a T cell without CD19"],
    ["embed"],
    ["annotate", "--labels", "B cell", "T cell", "a cell that expresses LYZ and CD14", "--read-batch"],
    ["annotate", "--cluster-key", "donor_id", "--min-score", "0.34"],
]


def in_ways(tmp_path, ways, verb, *words, checkpoint):
    """Run a command once for each of two ways; the results are equal, and so are the tables of a last option."""
    found = []
    for number, where in enumerate(ways):
        name = tmp_path / f"way{number}"
        table = [f"{name}.csv"] if words[-1] in ("--evidence", "--table") else []
        run(verb, tmp_path / "cells.h5ad", *words, *table, "-o", f"{name}.h5ad", *where, checkpoint=checkpoint)
        assert not list(tmp_path.glob("*.parts"))
        found.append([Path(path).read_text() for path in table])
    assert_same(tmp_path / "way1.h5ad", tmp_path / "way0.h5ad")
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("words", "size"),
    [
        *((words, 14) for words in COMMANDS[:2]),
        *((["annotate", "--cluster-key", "donor_id", "--evidence"], size) for size in (7, 28)),
        *((COMMANDS[-1], size) for size in (7, 20, 1000)),
    ],
)
def test_partitions_of_any_size_give_the_answers_of_the_whole(fitted, tmp_path, small, words, size):
    synthetic.synthetic_adata().write_h5ad(tmp_path / "cells.h5ad")
    in_ways(tmp_path, [[], ["--workers", 1, "--cells-per-partition", size]], *words, checkpoint=fitted)


def test_an_audit_in_partitions_has_the_ranks_of_the_whole(fitted, tmp_path, small, capsys):
    adata = synthetic.synthetic_adata()
    adata.obs["given"] = np.where(np.arange(60) % 9 == 0, "monocyte", adata.obs["cell_type"].astype(str))
    adata.write_h5ad(tmp_path / "cells.h5ad")
    words = [tmp_path / "cells.h5ad", "--label-key", "given", "--cluster-key", "donor_id", "--json", "--table"]
    run("audit", *words, tmp_path / "whole.csv", "-o", tmp_path / "whole.h5ad", checkpoint=fitted)
    whole = json.loads(capsys.readouterr().out)
    where = ["-o", tmp_path / "parts.h5ad", "--workers", 1, "--cells-per-partition", 7]
    run("audit", *words, tmp_path / "parts.csv", *where, checkpoint=fitted)
    assert_same(tmp_path / "parts.h5ad", tmp_path / "whole.h5ad")
    assert (tmp_path / "parts.csv").read_text() == (tmp_path / "whole.csv").read_text()
    assert json.loads(capsys.readouterr().out) == {**whole, "output": str(tmp_path / "parts.h5ad")}
    assert whole["contradicted"] == 6


@pytest.mark.parametrize("types", [None, np.ones((3, 4), np.float32)])
def test_an_audit_in_partitions_has_the_neighbours_of_the_whole(tmp_path, types):
    near = Neighbours(np.arange(6, dtype=np.int16).reshape(3, 2), np.arange(3, dtype=np.float32), types)
    plain = Labelling(*[None] * 9)
    pipeline = Mock(audit_cells=Mock(return_value={}), labelling=Mock(return_value=plain))
    pipeline.read_batch.return_value = replace(plain, neighbours=near)
    pipeline.read_labels.return_value = None
    adata = anndata.AnnData(obs=pd.DataFrame({"given": ["B", "T"]}, index=["1", "2"]))
    job, choice = Mock(verb="audit", options={"label_key": "given"}), Mock()
    choice.match.ids = np.arange(2)
    partition_tasks.write_decided(tmp_path, partition_tasks.decide(pipeline, adata, choice, job))
    partition_tasks.compute_part(pipeline, adata, choice, job, partition_tasks.read_decided(tmp_path))
    found = pipeline.audit_cells.call_args.args[1].neighbours
    for name in ("scores", "novelty", "types"):
        np.testing.assert_array_equal(getattr(found, name), getattr(near, name))


@pytest.mark.parametrize("read_cells", [60, 10_000])
def test_a_look_at_the_whole_file_corrects_labels_in_all_partitions(fitted, tmp_path, small, monkeypatch, read_cells):
    monkeypatch.setattr("scmmgpt.labelling_scmmgpt.READ_CELLS", read_cells)
    synthetic.synthetic_adata(91).write_h5ad(tmp_path / "cells.h5ad")
    words = [tmp_path / "cells.h5ad", "--labels", "B cell", "T cell", "a cell that expresses LYZ and CD14"]
    run("annotate", *words, "-o", tmp_path / "plain.h5ad", checkpoint=fitted)
    words += ["--read-batch"]
    run("annotate", *words, "-o", tmp_path / "whole.h5ad", checkpoint=fitted)
    where = ["--workers", 1, "--cells-per-partition", 21]
    run("annotate", *words, "-o", tmp_path / "parts.h5ad", *where, checkpoint=fitted)
    assert_same(tmp_path / "parts.h5ad", tmp_path / "whole.h5ad")
    plain, whole = (anndata.read_h5ad(tmp_path / name) for name in ("plain.h5ad", "whole.h5ad"))
    assert not np.array_equal(plain.obsm["scmmgpt_probabilities"], whole.obsm["scmmgpt_probabilities"])


@pytest.mark.parametrize(
    "wanted", [["--text", "a B cell"], ["--text", "a T cell without CD19, not a monocyte"], ["--like", "c3", "c50"]]
)
def test_a_search_in_partitions_finds_the_hits_of_the_whole(adata, checkpoint, tmp_path, small, capsys, wanted):
    adata.obs_names = [f"c{i}" for i in range(adata.n_obs)]
    adata.write_h5ad(tmp_path / "cells.h5ad")
    words = [tmp_path / "cells.h5ad", *wanted, "--top-k", 5]
    capsys.readouterr()
    run("search", *words, "-o", tmp_path / "whole.h5ad", checkpoint=checkpoint)
    hits = capsys.readouterr().out
    run("search", *words, "--workers", 1, checkpoint=checkpoint, status=2)
    assert "need --output" in capsys.readouterr().err
    where = ["--workers", 1, "--cells-per-partition", 14]
    run("search", *words, "-o", tmp_path / "parts.h5ad", *where, checkpoint=checkpoint)
    assert capsys.readouterr().out == hits
    assert_same(tmp_path / "parts.h5ad", tmp_path / "whole.h5ad")
    run("verify", tmp_path / "parts.h5ad", checkpoint=checkpoint)


def test_the_model_of_the_package_is_named_in_each_result(adata, checkpoint, tmp_path, small, monkeypatch):
    identity = {"name": "the model", "version": "1", "sha256": "0" * 64}
    monkeypatch.setattr("scmmgpt.commands.checkpoints.root_checkpoint", lambda: checkpoint)
    monkeypatch.setattr("scmmgpt.commands.checkpoints.identify", lambda path: identity)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    words = ["embed", str(tmp_path / "cells.h5ad"), "--quiet", "-o"]
    assert main([*words, str(tmp_path / "whole.h5ad")]) == 0
    assert main([*words, str(tmp_path / "parts.h5ad"), "--workers", "1"]) == 0
    assert_same(tmp_path / "parts.h5ad", tmp_path / "whole.h5ad")
    assert anndata.read_h5ad(tmp_path / "parts.h5ad").uns["scmmgpt"]["model"] == identity


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("words", COMMANDS)
def test_partitions_of_a_zarr_store_give_the_results_of_an_h5ad(fitted, tmp_path, small, words):
    adata = synthetic.synthetic_adata()
    adata.write_h5ad(tmp_path / "cells.h5ad")
    with anndata.settings.override(zarr_write_format=3):
        adata.write_zarr(tmp_path / "cells.zarr", chunks=(8, 8))
    words = words[:-1] if words[-1] in ("--evidence", "--table") else words
    for name, where in (("h5ad", []), ("zarr", ["--workers", 1, "--cells-per-partition", 14])):
        where = ["-o", tmp_path / f"of_{name}.h5ad", *where]
        run(words[0], tmp_path / f"cells.{name}", *words[1:], *where, checkpoint=fitted)
    assert_same(tmp_path / "of_zarr.h5ad", tmp_path / "of_h5ad.h5ad")


@pytest.mark.slow
@pytest.mark.parametrize("words", COMMANDS)
def test_two_processes_give_the_bits_of_one(fitted, tmp_path, words):
    synthetic.synthetic_adata(4200).write_h5ad(tmp_path / "cells.h5ad")
    ways = [["--cells-per-partition", 1, "--workers", workers] for workers in (1, 2)]
    in_ways(tmp_path, ways, *words, checkpoint=fitted)


def test_a_readout_is_solved_once_and_a_partition_is_read_while_others_are_computed(
    fitted, tmp_path, small, monkeypatch
):
    synthetic.synthetic_adata(30).write_h5ad(tmp_path / "in.h5ad")
    done: list[str] = []

    def note(owner, name):
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **given: done.append(name) or function(*args, **given))

    note(ScMMGPTPipeline, "labelling")
    note(partition_tasks, "write_partition")
    note(partition_tasks, "read_found")
    note(partitions, "read_columns")  # of the arrays, which stay on disk
    out = tmp_path / "out.h5ad"
    run("annotate", tmp_path / "in.h5ad", "-o", out, "--cells-per-partition", 14, "--workers", 1, checkpoint=fitted)
    assert done == ["labelling", *["write_partition", "read_found"] * 3, *["read_columns"] * 3]


def test_a_worker_solves_the_readout_before_its_first_partition(fitted, tmp_path, monkeypatch):
    path, pipeline = tmp_path / "in.h5ad", ScMMGPTPipeline.from_pretrained(fitted, device="cpu")
    synthetic.synthetic_adata(30).write_h5ad(path)
    source = Source(path, "test", fitted)
    job = Job("annotate", fitted, None, None, default_options("annotate"), {})
    cells, parts = source.open(), tmp_path / "parts"
    choice = pipeline.processor.choose_input(cells)
    with partition_tasks.using(pipeline, job):
        partition_tasks.write_decided(parts, partition_tasks.decide(pipeline, cells, choice, job))
    with partition_tasks.using(pipeline, job):
        partition_tasks.prepare(job, source)
        monkeypatch.setattr(pipeline, "labelling", lambda *_: pytest.fail("the readout was solved again"))
        for task in (Partition(job, source, choice, a, b, parts / file_name(a, b)) for a, b in ((0, 20), (20, 30))):
            assert partition_tasks.compute_partition(task) == task.stop - task.start
            assert task.path.is_file()


def test_preparation_leaves_errors_and_warnings_to_the_command(fitted, tmp_path, caplog):
    job = Job("annotate", fitted, None, None, default_options("annotate"), {})
    pipeline = ScMMGPTPipeline.from_pretrained(fitted, device="cpu")
    few = synthetic.synthetic_adata(30)
    few.var_names = [name if i % 2 else f"unknown{i}" for i, name in enumerate(few.var_names)]
    few.write_h5ad(tmp_path / "few.h5ad")
    few[:, :0].copy().write_h5ad(tmp_path / "none.h5ad")
    for name in ("few", "none", "absent"):
        with partition_tasks.using(pipeline, job):
            partition_tasks.prepare(job, Source(tmp_path / f"{name}.h5ad", "test", fitted))
    assert not caplog.records
    pipeline.processor.choose_input(few)
    assert caplog.records


def test_workers_begin_before_a_command_imports_libraries_and_before_the_checkpoint_is_loaded(
    adata, checkpoint, tmp_path, monkeypatch
):
    adata.write_h5ad(tmp_path / "in.h5ad")
    done: list[str] = []
    monkeypatch.setattr("scmmgpt.commands.cluster.preload_workers", lambda: done.append("preload"))
    found = {Source(tmp_path / "in.h5ad", "test", checkpoint): tmp_path / "out.h5ad"}
    monkeypatch.setattr("scmmgpt.__main__.several_outputs", lambda args: done.append("outputs") or found)
    monkeypatch.setattr(partitions.Workers, "__enter__", lambda self: done.append("workers") or self)
    monkeypatch.setattr("scmmgpt.__main__.load_pipeline", lambda args: done.append("load") or 1 / 0)
    words = ["embed", tmp_path / "in.h5ad", "-o", tmp_path / "out.h5ad", "--workers", 2]
    run(*words, checkpoint=checkpoint, status=2)
    assert done == ["preload", "outputs", "workers", "load"]


@pytest.mark.parametrize("is_file", [False, True])
def test_rows_of_no_block_are_missing(tmp_path, is_file):
    blocks = [(1, np.array([[1, 2]], dtype=np.float32)), (3, np.array([[3, 4], [5, 6]], dtype=np.float32))]
    array = RowBlocks((6, 2), lambda: iter(blocks), np.zeros((2, 2), np.float32))
    with h5py.File(tmp_path / "out.h5", "w") as file:
        results._replace(file, "found", array)
        found = file["found"][:] if is_file else array.to_memory()
    gap = [np.nan, np.nan]
    np.testing.assert_array_equal(found, [gap, [1, 2], gap, [3, 4], [5, 6], gap])


@pytest.mark.parametrize(("size", "rest"), [(20, [28, 42, 56]), (7, [28, 35, 42, 49, 56]), (1000, [28])])
def test_a_second_run_computes_only_what_is_missing_also_in_partitions_of_another_size(
    adata, checkpoint, tmp_path, small, monkeypatch, size, rest
):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    out, done = tmp_path / "out.h5ad", []
    words = ["embed", tmp_path / "cells.h5ad", "-o", out, "--workers", 1, "--cells-per-partition"]
    compute = partition_tasks.compute_partition

    def stopped(task):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(task.start)
        return compute(task)

    monkeypatch.setattr(partition_tasks, "compute_partition", stopped)
    run(*words, 20, checkpoint=checkpoint, status=130)
    assert not out.exists()
    monkeypatch.setattr(partition_tasks, "compute_partition", lambda task: done.append(task.start) or compute(task))
    run(*words, size, checkpoint=checkpoint)
    assert done == [0, 14, *rest]
    run("embed", tmp_path / "cells.h5ad", "-o", tmp_path / "whole.h5ad", checkpoint=checkpoint)
    assert_same(out, tmp_path / "whole.h5ad")


def test_partitions_of_other_options_or_weights_are_refused_but_not_of_an_edited_folder(
    adata, checkpoint, tmp_path, small, monkeypatch, capsys
):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    words = ["embed", tmp_path / "cells.h5ad", "-o", tmp_path / "out.h5ad", "--workers", 1]
    with monkeypatch.context() as stopped:
        stopped.setattr(partitions.PartitionedRun, "join", lambda *_: 1 / 0)
        run(*words, checkpoint=checkpoint, status=2)
    run(*words, "--of", "cell", checkpoint=checkpoint, status=2)
    assert "partitions of another command: of differ" in capsys.readouterr().err
    config = tmp_path / "checkpoint" / "config.json"
    before = config.read_text()
    config.write_text(before.replace("killer lymphocyte", "a killer"))
    run(*words, checkpoint=checkpoint, status=2)
    assert "partitions of another command: config, settings differ" in capsys.readouterr().err
    config.write_text(before)
    (tmp_path / "checkpoint" / "README.md").write_text("More about this model.")
    (tmp_path / "checkpoint").rename(tmp_path / "elsewhere")
    monkeypatch.setattr(partition_tasks, "compute_partition", lambda task: pytest.fail("a partition was done twice"))
    run(*words, checkpoint=str(tmp_path / "elsewhere"))


def test_a_partition_that_loses_its_workers_is_cut_and_only_the_piece_that_loses_them_fails(
    adata, checkpoint, tmp_path, small, monkeypatch, capsys
):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    words = ["embed", tmp_path / "cells.h5ad", "-o", tmp_path / "out.h5ad"]
    words += ["--workers", 1, "--cells-per-partition", 28]

    def run_pieces(self, function, tasks, split):
        for piece in [piece for task in tasks for piece in split(task)]:
            yield (piece, None, OSError("lost")) if piece.start in (35, 42) else (piece, function(piece), None)

    with monkeypatch.context() as lossy:
        lossy.setattr(partitions.Workers, "run", run_pieces)
        run(*words, checkpoint=checkpoint, status=3)
    assert capsys.readouterr().err.count("cells.h5ad, cells 35 to 48: lost") == 1
    assert np.isnan(anndata.read_h5ad(tmp_path / "out.h5ad").obsm["X_scmmgpt"]).any(axis=1).nonzero()[0].tolist() == [
        *range(35, 49)
    ]
    run(*words, checkpoint=checkpoint)
    run("embed", tmp_path / "cells.h5ad", "-o", tmp_path / "whole.h5ad", checkpoint=checkpoint)
    assert_same(tmp_path / "out.h5ad", tmp_path / "whole.h5ad")


def test_two_commands_do_not_write_one_output_at_once(adata, checkpoint, tmp_path, small, monkeypatch, capsys):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    words = ["embed", tmp_path / "cells.h5ad", "-o", tmp_path / "out.h5ad", "--workers", 1]
    compute, second = partition_tasks.compute_partition, []

    def twice(task):
        if not second:
            second.append(main([*map(str, words), "--model", checkpoint, "--quiet"]))
        return compute(task)

    monkeypatch.setattr(partition_tasks, "compute_partition", twice)
    run(*words, "--cells-per-partition", 20, checkpoint=checkpoint)
    assert second == [2]
    assert f"Another command is at work on {tmp_path / 'out.h5ad.parts'} (process " in capsys.readouterr().err
    monkeypatch.undo()
    run("embed", tmp_path / "cells.h5ad", "-o", tmp_path / "whole.h5ad", checkpoint=checkpoint)
    assert_same(tmp_path / "out.h5ad", tmp_path / "whole.h5ad")
    assert sorted(path.name for path in tmp_path.glob("*out*")) == ["out.h5ad"]


def test_a_partition_that_fails_is_reported_and_left_out(adata, checkpoint, tmp_path, small, monkeypatch, capsys):
    adata.obs["cluster"] = "all"
    adata.write_h5ad(tmp_path / "cells.h5ad")
    words = ["annotate", tmp_path / "cells.h5ad", "--cluster-key", "cluster"]
    run(*words, "-o", tmp_path / "whole.h5ad", checkpoint=checkpoint)
    rows = CellFile.__getitem__
    capsys.readouterr()

    def damaged(self, here):
        if here.start == 14:
            raise OSError("chunk 3 of X is damaged")
        return rows(self, here)

    monkeypatch.setattr(CellFile, "__getitem__", damaged)
    out, table = tmp_path / "out.h5ad", tmp_path / "out.csv"
    words += ["-o", out, "--table", table, "--workers", 1, "--cells-per-partition", 7, "--json"]
    run(*words, checkpoint=checkpoint, status=3)
    said = capsys.readouterr()
    assert f"{tmp_path / 'cells.h5ad'}, cells 14 to 20: chunk 3 of X is damaged" in said.err
    assert json.loads(said.out)["failed"] == 7
    result, whole = anndata.read_h5ad(out), anndata.read_h5ad(tmp_path / "whole.h5ad")
    missing = np.isin(np.arange(60), np.arange(14, 21))
    assert result.obs["scmmgpt_cell_type"].isna().tolist() == missing.tolist()
    assert pd.read_csv(table)["scmmgpt_score"].isna().tolist() == missing.tolist()
    kept = (result[~missing].obs["scmmgpt_cell_type"], whole[~missing].obs["scmmgpt_cell_type"])
    assert kept[0].astype(str).equals(kept[1].astype(str))
    probabilities = result.obsm["scmmgpt_probabilities"]
    np.testing.assert_array_equal(probabilities[~missing], whole.obsm["scmmgpt_probabilities"][~missing])
    assert np.isnan(probabilities[missing]).all()
    assert result.uns["scmmgpt"]["failed"].tolist() == ["14-21: chunk 3 of X is damaged"]
    monkeypatch.setattr(CellFile, "__getitem__", rows)  # once the file is mended, the rest follows
    run(*words, checkpoint=checkpoint)
    assert_same(out, tmp_path / "whole.h5ad")


def test_a_full_disk_stops_the_run_and_keeps_what_is_done(adata, checkpoint, tmp_path, small, monkeypatch, capsys):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    write, written = partition_tasks.write_partition, []

    def full(path, *rest):
        if written:
            raise OSError(28, "No space left on device")
        written.append(path)
        write(path, *rest)

    monkeypatch.setattr(partition_tasks, "write_partition", full)
    words = ["embed", tmp_path / "cells.h5ad", "-o", tmp_path / "out.h5ad", "--workers", 1]
    run(*words, "--cells-per-partition", 7, checkpoint=checkpoint, status=2)
    assert "No space left on device" in capsys.readouterr().err
    assert written[0].is_file()


def test_a_disk_that_fills_while_results_are_joined_loses_nothing(adata, checkpoint, tmp_path, small, monkeypatch):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    words = ["embed", tmp_path / "cells.h5ad", "--cells-per-partition", 20, "--workers", 1, "-o"]

    def full(self, array):
        array[:7] = 0
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(RowBlocks, "fill", full)
        run(*words, tmp_path / "out.h5ad", checkpoint=checkpoint, status=2)
    assert [path.name for path in tmp_path.glob("*out*")] == ["out.h5ad.parts"]
    with monkeypatch.context() as done:
        done.setattr(partition_tasks, "compute_partition", lambda task: pytest.fail("a partition was done twice"))
        run(*words, tmp_path / "out.h5ad", checkpoint=checkpoint)
    run(*words, tmp_path / "again.h5ad", checkpoint=checkpoint)
    assert_same(tmp_path / "out.h5ad", tmp_path / "again.h5ad")


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["annotate", "embed", "audit"])
def test_a_disk_that_is_full_at_any_moment_loses_nothing_and_leaves_no_half_result(
    fitted, tmp_path, small, small_disk, capfd, verb
):
    synthetic.synthetic_adata(200).write_h5ad(tmp_path / "cells.h5ad")
    words = [verb, tmp_path / "cells.h5ad"]
    run(*words, "-o", tmp_path / "whole.h5ad", checkpoint=fitted)
    kilobytes = (tmp_path / "cells.h5ad").stat().st_size // 1024 + 24
    out, done, statuses = small_disk(kilobytes) / "out.h5ad", 0, []
    words += ["-o", out, "--workers", 1, "--cells-per-partition", 28, "--model", fitted, "--quiet"]
    while not statuses or statuses[-1] == 2:
        # In a process that ends without the exit handlers of C: HDF5's crashes after a write to a full disk.
        command = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(main([*map(str, words)])))
        command.start()
        command.join(300)
        statuses.append(command.exitcode)
        parts = len(list(out.parent.glob("out.h5ad.parts/*/0*.parquet")))
        said = capfd.readouterr().err
        assert statuses[-1] == 0 or (parts >= done and ("No space left on device" in said or "are free" in said))
        assert out.exists() == (statuses[-1] == 0)
        assert not list(out.parent.glob(".*.tmp*"))
        done, kilobytes = parts, kilobytes + 24
        small_disk(kilobytes)
    assert len(statuses) > 4
    assert_same(out, tmp_path / "whole.h5ad")


@pytest.mark.parametrize(
    "words",
    [
        ["annotate", "--evidence"],
        ["annotate", "--table"],
        ["annotate", "--workers", 1, "--evidence"],
        ["audit", "--table"],
        ["describe", "--proof"],
    ],
    ids=lambda words: " ".join(map(str, words)),
)
def test_a_table_that_cannot_be_written_leaves_the_cells_whole_and_the_error_says_so(
    words, fitted, tmp_path, small, monkeypatch, capsys
):
    def fail(*_, **__):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    synthetic.synthetic_adata().write_h5ad(tmp_path / "cells.h5ad")
    for module in (partitions, results):
        monkeypatch.setattr(module, "write_table", fail)
    verb, *options = words
    out, table = tmp_path / "out.h5ad", tmp_path / "table.csv"
    run(verb, tmp_path / "cells.h5ad", *options, table, "-o", out, checkpoint=fitted, status=2)
    assert capsys.readouterr().err.endswith(f" The cells with all results are written ({out}), the table is not.\n")
    columns = {"annotate": "scmmgpt_cell_type", "audit": "scmmgpt_audit", "describe": "scmmgpt_description"}
    assert anndata.read_h5ad(out).obs[columns[verb]].notna().all()
    assert not table.exists()


def test_damaged_partitions_are_named_and_computed_again(fitted, tmp_path, small, monkeypatch, caplog):
    synthetic.synthetic_adata().write_h5ad(tmp_path / "cells.h5ad")
    words = ["annotate", tmp_path / "cells.h5ad", "--evidence", tmp_path / "evidence.csv", "-o"]
    run(*words, tmp_path / "whole.h5ad", checkpoint=fitted)
    words += [tmp_path / "out.h5ad", "--workers", 1, "--cells-per-partition", 14]
    with monkeypatch.context() as stopped:
        stopped.setattr(partitions, "write_cells", lambda *_: 1 / 0)
        run(*words, checkpoint=fitted, status=2)
    labels = sorted((tmp_path / "out.h5ad.parts").glob("cells-*/*.parquet"))
    sums = sorted((tmp_path / "out.h5ad.parts").glob("evidence/*/0*.npz"))
    labels[0].write_bytes(labels[0].read_bytes()[:-9])  # truncated
    damaged = bytearray(labels[2].read_bytes())
    damaged[90] ^= 1  # one bit of a value
    labels[2].write_bytes(damaged)
    sums[1].write_bytes(sums[1].read_bytes()[:100])
    done, compute = [], partition_tasks.compute_partition
    monkeypatch.setattr(partition_tasks, "compute_partition", lambda task: done.append(task) or compute(task))
    run(*words, checkpoint=fitted)
    assert [(task.job.verb, task.start) for task in done] == [("annotate", 0), ("annotate", 28), ("explain", 14)]
    assert caplog.text.count("was damaged") == 3
    assert_same(tmp_path / "out.h5ad", tmp_path / "whole.h5ad")


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EIO, "Input/output error")])
def test_a_partition_that_could_not_be_read_for_another_reason_is_kept(tmp_path, monkeypatch, error):
    path = tmp_path / "0.parquet"
    computed = partition_tasks.Computed(columns={"score": np.zeros(2)}, arrays={}, sums={})
    partition_tasks.write_partition(path, ["a", "b"], computed, {})

    def fail(*_, **__):
        raise error

    with monkeypatch.context() as failing:
        failing.setattr("pyarrow.parquet.ParquetFile", fail)
        with pytest.raises(type(error)):
            partition_tasks.read_columns(path)
    assert partition_tasks.read_columns(path)["barcode"].tolist() == ["a", "b"]


def test_a_folder_of_files_becomes_a_folder_of_results(adata, checkpoint, tmp_path, small, capsys):
    (tmp_path / "in" / "more").mkdir(parents=True)
    adata[:30].copy().write_h5ad(tmp_path / "in" / "a.h5ad")
    adata[30:].copy().write_h5ad(tmp_path / "in" / "more" / "b.h5ad")
    (tmp_path / "in" / "c.h5ad").write_text("nothing")
    out, table = tmp_path / "out", tmp_path / "all.csv"
    run("annotate", tmp_path / "in", "-o", out, "--table", table, checkpoint=checkpoint, status=3)
    assert sorted(path.name for path in out.iterdir()) == ["a.h5ad", "more-b.h5ad"]
    assert f"{tmp_path / 'in' / 'c.h5ad'} is not an HDF5 file" in capsys.readouterr().err
    run("annotate", tmp_path / "in" / "more" / "b.h5ad", "-o", tmp_path / "b.h5ad", checkpoint=checkpoint)
    assert_same(out / "more-b.h5ad", tmp_path / "b.h5ad")
    rows = pd.read_csv(table)
    assert rows["barcode"].tolist() == adata.obs_names.tolist()
    assert rows["file"].nunique() == 2


def test_results_of_several_files_do_not_replace_these(adata, checkpoint, tmp_path, capsys):
    files = [tmp_path / "a.h5ad", tmp_path / "b.h5ad"]
    for file in files:
        adata[:30].copy().write_h5ad(file)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "b.h5ad").hardlink_to(files[1])
    before = files[0].read_bytes()
    for folder, name in ((tmp_path, "a"), (tmp_path / "out", "b")):
        run("embed", *files, "-o", folder, "--workers", "2", checkpoint=checkpoint, status=2)
        assert f"The result {str(folder / name)!r}"[:-1] in capsys.readouterr().err
    assert files[0].read_bytes() == files[1].read_bytes() == before


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_zarr_store_keeps_everything_and_is_never_loaded_whole(adata, checkpoint, tmp_path, small, monkeypatch):
    adata.layers["mine"] = adata.X.toarray()
    adata.raw = adata.copy()
    adata.obsm["X_pca"] = np.arange(120.0).reshape(60, 2)
    adata.obsp["near"] = adata.X @ adata.X.T
    adata.uns["mine"] = {"words": np.array(["a", "b"], dtype=object), "flag": True, "number": 2.5}
    adata.obs["open"] = pd.array([True, None] * 30, dtype="boolean")
    with anndata.settings.override(zarr_write_format=3):
        adata.write_zarr(tmp_path / "cells.zarr", chunks=(8, 8))
    adata.write_h5ad(tmp_path / "cells.h5ad")
    run("embed", tmp_path / "cells.h5ad", "-o", tmp_path / "from_h5ad.h5ad", checkpoint=checkpoint)
    monkeypatch.setattr(CellFile, "to_memory", lambda self: pytest.fail("the matrices were loaded whole"))
    monkeypatch.setattr(anndata, "read_zarr", lambda path: pytest.fail("the matrices were loaded whole"))
    where = ["--workers", 1, "--cells-per-partition", 14]
    run("embed", tmp_path / "cells.zarr", "-o", tmp_path / "out.h5ad", *where, checkpoint=checkpoint)
    assert_same(tmp_path / "out.h5ad", tmp_path / "from_h5ad.h5ad")
    result = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert (result.raw.X != adata.raw.X).nnz == 0
    assert (result.obsp["near"] != adata.obsp["near"]).nnz == 0
    np.testing.assert_array_equal(result.layers["mine"], adata.layers["mine"])


def test_a_corpus_is_read_by_rows(adata, checkpoint, tmp_path, small):
    names = ["<pad>", "<cls>", "<eoc>", *adata.var_names]
    cells = Cells.from_csr(adata.X, np.arange(3, 43), cell_ids=np.arange(60, dtype=np.uint64))
    obs = {"barcode": adata.obs_names.tolist(), "cell_type": adata.obs["cell_type"].tolist()}
    vocabulary = {name: i for i, name in enumerate(names)}
    write_corpus(tmp_path / "corpus", vocabulary, {"test": (cells, obs)}, cells_per_shard=25, row_group_size=10)
    run("annotate", tmp_path / "corpus", "-o", tmp_path / "whole.h5ad", checkpoint=checkpoint)
    where = ["--workers", 1, "--cells-per-partition", 7]
    run("annotate", tmp_path / "corpus", "-o", tmp_path / "parts.h5ad", *where, checkpoint=checkpoint)
    assert_same(tmp_path / "parts.h5ad", tmp_path / "whole.h5ad")


def test_a_query_of_a_soma_experiment_is_read_by_rows_and_written_without_a_matrix_in_memory(
    adata, checkpoint, tmp_path, small, monkeypatch
):
    soma = pytest.importorskip("tiledbsoma.io", reason="TileDB-SOMA is not installed (extra `census`)")
    adata.obs["sampled"] = pd.Categorical(np.where(np.arange(60) % 5, "yes", "no"))
    soma.from_anndata(str(tmp_path / "experiment"), adata, measurement_name="RNA", X_layer_name="raw")
    (tmp_path / "some.soma.json").write_text(json.dumps({"uri": "experiment", "value_filter": "sampled == 'yes'"}))
    some = adata[adata.obs["sampled"] == "yes"].copy()
    some.write_h5ad(tmp_path / "some.h5ad")
    run("annotate", tmp_path / "some.h5ad", "-o", tmp_path / "whole.h5ad", checkpoint=checkpoint)
    monkeypatch.setattr("scmmgpt.commands.results.ROWS_COPIED", 9)
    monkeypatch.setattr(CellFile, "to_memory", lambda self: pytest.fail("the matrices were loaded whole"))
    where = ["--workers", 1, "--cells-per-partition", 14]
    run("annotate", tmp_path / "some.soma.json", "-o", tmp_path / "parts.h5ad", *where, checkpoint=checkpoint)
    one, two = (anndata.read_h5ad(tmp_path / name) for name in ("parts.h5ad", "whole.h5ad"))
    added = [name for name in two.obs if name.startswith("scmmgpt")]
    pd.testing.assert_frame_equal(one.obs[added], two.obs[added], check_exact=True)
    assert one.obs["tissue"].tolist() == two.obs["tissue"].tolist()
    np.testing.assert_array_equal(*(each.obsm["scmmgpt_probabilities"] for each in (one, two)))
    assert (one.X != two.X).sum() == 0
    run("annotate", tmp_path / "experiment", "-o", tmp_path / "all.h5ad", checkpoint=checkpoint)
    assert anndata.read_h5ad(tmp_path / "all.h5ad").n_obs == 60


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["annotate", "embed"])
def test_two_workers_read_a_query_of_a_soma_experiment_and_give_the_bits_of_one_process_and_an_h5ad(
    fitted, tmp_path, verb
):
    soma = pytest.importorskip("tiledbsoma.io", reason="TileDB-SOMA is not installed (extra `census`)")
    adata = synthetic.synthetic_adata(9000)
    adata.obs["sampled"] = pd.Categorical(np.where(np.arange(9000) % 10, "yes", "no"))
    soma.from_anndata(str(tmp_path / "experiment"), adata, measurement_name="RNA", X_layer_name="raw")
    (tmp_path / "some.soma.json").write_text(json.dumps({"uri": "experiment", "value_filter": "sampled == 'yes'"}))
    adata[adata.obs["sampled"] == "yes"].copy().write_h5ad(tmp_path / "some.h5ad")
    for workers, name in ((1, "some.h5ad"), (2, "some.soma.json")):
        where = ["-o", tmp_path / f"{workers}.h5ad", "--workers", workers, "--cells-per-partition", 1]
        run(verb, tmp_path / name, *where, checkpoint=fitted)
    one, two = (anndata.read_h5ad(tmp_path / f"{workers}.h5ad") for workers in (1, 2))
    added = [name for name in one.obs if name.startswith("scmmgpt")]
    pd.testing.assert_frame_equal(one.obs[added].reset_index(drop=True), two.obs[added].reset_index(drop=True))
    assert set(one.obsm) == set(two.obsm)
    for name in one.obsm:
        np.testing.assert_array_equal(one.obsm[name], two.obsm[name])
    assert (one.X != two.X).nnz == 0
