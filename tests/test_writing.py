"""What `.h5ad` cannot hold is found and mended before a model runs."""

import logging
import os
import signal
import subprocess
import sys

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scmmgpt.commands import files
from scmmgpt.commands.files import check_file, check_folder, check_paths, filled_folder, read_json, whole_file
from scmmgpt.commands.results import rehearse, write_cells
from scmmgpt.commands.writing import make_writable, nullable_strings, size_in_memory
from scmmgpt.readers.cell_files import read_file


COLUMNS = {
    "mixed": [1, "b", None, 2.0],
    "_index": [1, 2, 3, 4],
    "a/b": [1, 2, 3, 4],
    5: ["x", "y", "x", "y"],
    "dates": pd.to_datetime(["2020-01-01"] * 4),
    "intervals": pd.cut(np.arange(4), 2),
    "nullable": pd.array(["a", None, "b", "c"], dtype="string"),
    "lists": [[1], [2], [1], [2]],
    "some true": np.array([True, None, False, True], dtype=object),
    "some numbers": np.array([1, None, 2, 3], dtype=object),
    "sparse": pd.arrays.SparseArray([0, 0, 1, 0]),
    "categories": pd.Categorical([1, "a", 1, "a"]),
    "plain": ["B", None, "T", "B"],
}


@pytest.fixture
def adata():
    obs = pd.DataFrame(COLUMNS, index=pd.Index([f"c{i}" for i in range(4)], name="_index"))
    found = anndata.AnnData(sp.csr_matrix(np.ones((4, 3), dtype=np.float32)), obs=obs)
    found.raw = anndata.AnnData(
        found.X, obs=obs[[]], var=pd.DataFrame({"_index": ["g0", "g1", "g2"]}, index=["0", "1", "2"])
    )
    return found


def test_every_column_can_be_written_and_keeps_its_values(adata, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        changes = make_writable(adata)
    adata.write_h5ad(tmp_path / "out.h5ad")
    obs = anndata.read_h5ad(tmp_path / "out.h5ad").obs
    assert list(obs.index) == ["c0", "c1", "c2", "c3"]
    assert obs["mixed"].astype(object).where(obs["mixed"].notna(), None).tolist() == ["1", "b", None, "2"]
    assert obs["index"].tolist() == obs["a_b"].tolist() == [1, 2, 3, 4]
    assert obs["5"].tolist() == ["x", "y", "x", "y"]
    assert obs["dates"].tolist() == ["2020-01-01 00:00:00"] * 4
    assert obs["sparse"].tolist() == [0, 0, 1, 0]
    assert obs["some true"].tolist() == [True, pd.NA, False, True]
    assert obs["some numbers"].tolist() == [1, pd.NA, 2, 3]
    assert obs["plain"].astype(object).where(obs["plain"].notna(), None).tolist() == ["B", None, "T", "B"]
    said = " ".join(changes)
    assert "'_index' is now 'index'" in said
    assert "mixed" in said
    assert "plain" not in said, "text that stays text is not a change"
    assert caplog.messages == changes


def test_the_reserved_column_of_raw_is_renamed(adata, tmp_path):
    make_writable(adata)
    adata.write_h5ad(tmp_path / "out.h5ad")
    assert anndata.read_h5ad(tmp_path / "out.h5ad").raw.var["index"].tolist() == ["g0", "g1", "g2"]


def test_uns_keeps_what_has_a_form_and_says_what_it_drops(adata, tmp_path):
    adata.obs = adata.obs[["plain"]]
    adata.uns = {"day": pd.Timestamp("2020-01-01"), "deep": {"set": {1}, "words": ["a", 1]}, "code": len, 3: 4}
    adata.obsm["odd"] = np.array([[object()]] * 4, dtype=object)
    said = " ".join(make_writable(adata))
    adata.write_h5ad(tmp_path / "out.h5ad")
    uns = anndata.read_h5ad(tmp_path / "out.h5ad").uns
    assert uns["day"] == "2020-01-01 00:00:00"
    assert uns["deep"]["set"].tolist() == [1]
    assert uns["deep"]["words"].tolist() == ["a", "1"]
    assert uns["3"] == 4
    assert "code" not in uns
    assert "uns['code'] is left out" in said
    assert "obsm['odd'] is left out" in said


def test_no_entry_of_uns_takes_the_place_of_another(adata, tmp_path):
    adata.uns = {"a/b": 1, "a_b": 2, "deep": {3: 3, "3": 4}}
    changes = make_writable(adata)
    adata.write_h5ad(tmp_path / "out.h5ad")
    uns = anndata.read_h5ad(tmp_path / "out.h5ad").uns
    assert (uns["a_b_1"], uns["a_b"]) == (1, 2)
    assert sorted(uns["deep"].values()) == [3, 4]
    assert any("uns: 'a/b' is now 'a_b_1'" in change for change in changes)


def test_a_file_without_faults_stays_as_it_is():
    adata = anndata.AnnData(np.ones((2, 2), dtype=np.float32), obs=pd.DataFrame({"n": [1, 2]}, index=["a", "b"]))
    assert make_writable(adata) == []


def test_a_nullable_index_is_written(tmp_path):
    adata = anndata.AnnData(np.ones((2, 2), dtype=np.float32))
    adata.obs.index = pd.Index(["a", "b"], dtype="string")
    make_writable(adata)
    adata.write_h5ad(tmp_path / "out.h5ad")
    assert anndata.read_h5ad(tmp_path / "out.h5ad").obs_names.tolist() == ["a", "b"]


# -- paths ------------------------------------------------------------------------------------------------------------


def test_the_matrices_of_the_genes_of_raw_stay_beside_a_reserved_column(adata):
    adata.raw = anndata.AnnData(adata.X, obs=adata.obs[[]], var=adata.raw.var, varm={"loadings": np.eye(3)})
    make_writable(adata)
    assert adata.raw.varm["loadings"].tolist() == np.eye(3).tolist()


@pytest.mark.filterwarnings("ignore:.*zarr v[23]")  # of formats to come
@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_nullable_strings_of_a_file_stay_what_they_are(suffix, tmp_path):
    words = pd.array(["a", None, "b"], dtype="string")
    adata = anndata.AnnData(np.ones((3, 3), dtype=np.float32), uns={"words": words})
    adata.obsm["table"] = pd.DataFrame({"words": words}, index=adata.obs_names)
    path, output = tmp_path / f"cells{suffix}", tmp_path / "out.h5ad"
    with nullable_strings():
        (adata.write_h5ad if suffix == ".h5ad" else adata.write_zarr)(path)
    assert not anndata.settings.allow_write_nullable_strings
    cells = read_file(path, backed=True)
    rehearse(cells, path, output)
    cells.uns["scmmgpt"] = {}
    write_cells(cells, path, output)
    written = anndata.read_h5ad(output)
    assert written.uns["words"].tolist() == written.obsm["table"]["words"].tolist() == ["a", pd.NA, "b"]


def test_the_disk_must_have_room_for_the_matrices(tmp_path):
    adata = anndata.AnnData(np.ones((3, 5), dtype=np.float32))
    assert 60 < size_in_memory(adata) < 200_000
    check_file(tmp_path / "out.h5ad", size_in_memory(adata))
    with pytest.raises(OSError, match=r"takes some 1,152,921,504,606,846,976 bytes, but only"):
        check_file(tmp_path / "out.h5ad", 2**60)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_filled_whole_or_not_at_all(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "old").write_text("kept")
    with pytest.raises(TypeError), filled_folder(path) as temporary:
        (temporary / "half").write_text(None)
    assert [entry.name for entry in tmp_path.rglob("*")] == ["model", "old"]
    with filled_folder(path) as temporary:
        (temporary / "part").mkdir()
        (temporary / "part" / "file").write_text("new")
        (temporary / "old").write_text("replaced")
    assert (path / "part" / "file").read_text() == "new"
    assert (path / "old").read_text() == "replaced"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


@pytest.mark.skipif(not files.BOOT.is_file(), reason="only Linux numbers its starts")
def test_temporary_files_of_killed_processes_are_removed_before_the_next_output_and_no_others(tmp_path):
    script = """if True:
        import os, signal, sys
        from pathlib import Path
        from scmmgpt.commands.files import filled_folder, whole_file, whole_folder
        with whole_file(sys.argv[1] + "/out.h5ad") as file, whole_folder(sys.argv[1] + "/a.b") as folder:
            with filled_folder(sys.argv[1] + "/model") as other:
                for path in (file, folder / "part", other / "part"):
                    path.write_text("half")
                os.kill(os.getpid(), signal.SIGKILL)
    """
    assert subprocess.run([sys.executable, "-c", script, tmp_path]).returncode == -signal.SIGKILL
    left = {path.name for path in tmp_path.iterdir()}
    assert len(left) == 3
    machine, process, _ = min(left).strip(".").split("-")
    others = [  # of another machine, of this process, without a machine, and of another program
        min(left).replace(machine, machine[::-1]),
        min(left).replace(f"-{process}-", f"-{os.getpid()}-"),
        min(left).replace(machine, 16 * "0"),
        f".{'0' * 32}.tmp.h5ad",
        f"copy of {min(left)}",
    ]
    for name in others:
        (tmp_path / name).write_text("kept")
    with whole_file(tmp_path / "now.csv") as temporary:
        temporary.write_text("at work")
        check_file(tmp_path / "next.h5ad")
        assert {path.name for path in tmp_path.iterdir()} == {*others, temporary.name}


def test_a_new_folder_is_checked_without_the_leftovers_beside_it(tmp_path, monkeypatch):
    (tmp_path / files.temporary_name("model.")).mkdir()
    check_folder(tmp_path / "model")
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(files, "_is_running", lambda process: False)
    check_folder(tmp_path / "model")
    assert len(list(tmp_path.iterdir())) == (0 if files.BOOT.is_file() else 1)


def test_an_output_is_no_folder_no_device_and_in_a_folder(tmp_path):
    (tmp_path / "folder.h5ad").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="is a folder"):
        check_file(tmp_path / "folder.h5ad")
    with pytest.raises(OSError, match="is not a file"):
        check_file("/dev/null")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        check_file(tmp_path / "none" / "out.h5ad")
    with pytest.raises(OSError, match="is a file; name another folder"):
        check_folder(tmp_path / "file")
    with pytest.raises(OSError, match="which is a file"):
        check_folder(tmp_path / "file" / "new")
    check_folder(tmp_path / "new" / "deeper")
    assert not (tmp_path / "new").exists()


def test_an_output_that_is_an_input_by_any_name_is_refused(tmp_path):
    source = tmp_path / "in.h5ad"
    source.write_text("cells")
    (tmp_path / "link.h5ad").symlink_to(source)
    (tmp_path / "hard.h5ad").hardlink_to(source)
    for output in (source, tmp_path / "link.h5ad", tmp_path / "hard.h5ad", tmp_path / "x" / ".." / "in.h5ad"):
        with pytest.raises(ValueError, match="would replace a file of the input"):
            check_paths({"FILE": source}, {"--output": output})
    with pytest.raises(ValueError, match="one would replace the other"):
        check_paths({}, {"--output": tmp_path / "a", "--table": tmp_path / "b" / ".." / "a"})
    check_paths({"FILE": source, "--labels": ["B", "T"]}, {"--output": tmp_path / "out.h5ad", "--table": None})


def test_parts_of_an_input_folder_are_not_replaced(tmp_path):
    (tmp_path / "cells.zarr").mkdir()
    (tmp_path / "cells.zarr" / "zarr.json").write_text("{}")
    (tmp_path / "run").mkdir()
    for name in ("matrix.mtx", "barcodes.tsv", "annotated.h5ad"):
        (tmp_path / "run" / name).write_text("")
    for source, output in (
        ("cells.zarr", "cells.zarr/out.h5ad"),
        ("run", "run/barcodes.tsv"),
        ("run/matrix.mtx", "run/barcodes.tsv"),
    ):
        with pytest.raises(ValueError, match="would replace a file of the input"):
            check_paths({"FILE": tmp_path / source}, {"--output": tmp_path / output})
    check_paths({"FILE": tmp_path / "run"}, {"--output": tmp_path / "run" / "annotated.h5ad"})


@pytest.mark.parametrize("content", ["{", "[" * 100_000, "\udcff", "[1]"])
def test_json_that_is_none_or_of_another_kind_is_one_line(tmp_path, content):
    path = tmp_path / "file.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match="file.json (is|holds)"):
        read_json(path, dict)


def test_parts_that_are_left_out_for_one_reason_are_one_warning(caplog):
    adata = anndata.AnnData(np.ones((2, 3), dtype=np.float32))
    adata.uns = {f"part{i}": object() for i in range(9)}
    make_writable(adata)
    (said,) = caplog.messages
    assert said.startswith("uns['part0', 'part1', 'part2' and 6 more] is left out")
