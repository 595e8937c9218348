"""Addresses in place of paths: what comes from a store and goes to a store is what a folder would hold."""

import json

import anndata
import fsspec
import pandas as pd
import pytest

from scmmgpt import synthetic
from scmmgpt.__main__ import main
from scmmgpt.commands import storage
from scmmgpt.tests import test_partitions as partitions
from scmmgpt.train.__main__ import main as train_main
from scmmgpt.train.data.corpus import open_corpus


@pytest.fixture(autouse=True)
def staging(tmp_path, monkeypatch):
    """The staging folder of a test."""
    monkeypatch.setenv("SCMMGPT_STAGING", str(tmp_path / "staging"))
    return tmp_path / "staging"


@pytest.fixture(scope="module")
def server():
    """A local S3 server; yields its address."""
    moto = pytest.importorskip("moto.server", reason="the extra `dev` installs moto")
    running = moto.ThreadedMotoServer(port=0, verbose=False)
    running.start()
    yield "http://{}:{}".format(*running.get_host_and_port())
    running.stop()


@pytest.fixture(params=["memory", "s3"])
def bucket(request, monkeypatch):
    """The address of an empty bucket, in memory and on a server, whose credentials are in the environment."""
    if request.param == "s3":
        monkeypatch.setenv("AWS_ENDPOINT_URL", request.getfixturevalue("server"))
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "name")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    store = fsspec.filesystem(request.param, skip_instance_cache=True)
    store.invalidate_cache() if request.param == "s3" else None
    fsspec.config.conf.clear()
    if store.exists("cells"):
        store.rm("cells", recursive=True)
    store.mkdir("cells")
    type(store).clear_instance_cache()
    return f"{request.param}://cells"


def put(path, address):
    store, place = fsspec.core.url_to_fs(address)
    store.put(str(path), place, recursive=path.is_dir())
    type(store).clear_instance_cache()


def get(address, path):
    store, place = fsspec.core.url_to_fs(address)
    store.get(place, str(path), recursive=True)
    return path


def test_files_come_from_a_store_and_go_to_one(bucket, adata, checkpoint, tmp_path, staging, capsys):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    put(tmp_path / "cells.h5ad", f"{bucket}/in/cells.h5ad")
    words = ["--model", checkpoint, "--json", "-o"]
    assert main(["annotate", str(tmp_path / "cells.h5ad"), *words, str(tmp_path / "here.h5ad")]) == 0
    capsys.readouterr()
    out, table = f"{bucket}/out/cells.h5ad", f"{bucket}/out/cells.csv"
    assert main(["annotate", f"{bucket}/in/cells.h5ad", *words, out, f"--table={table}"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["output"] == out
    assert "very-secret" not in said.out + said.err
    partitions.assert_same(get(out, tmp_path / "there.h5ad"), tmp_path / "here.h5ad")
    assert len(pd.read_csv(get(table, tmp_path / "there.csv"))) == 60
    assert not any(staging.rglob("*.*"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("bucket", ["s3"], indirect=True)
@pytest.mark.parametrize("verb", ["annotate", "embed"])
def test_two_workers_from_a_store_to_a_store_give_the_bits_of_one_process_on_a_disk(bucket, tmp_path, verb):
    synthetic.fitted_pipeline().save_pretrained(tmp_path / "checkpoint")
    adata = synthetic.synthetic_adata(8200)
    adata.write_h5ad(tmp_path / "a.h5ad")
    with anndata.settings.override(zarr_write_format=3):
        adata[::-1].copy().write_zarr(tmp_path / "b.zarr")
    inputs = [f"{bucket}/in/{name}" for name in ("a.h5ad", "b.zarr")]
    for address in inputs:
        put(tmp_path / address.rpartition("/")[2], address)
    words = [verb, "--model", str(tmp_path / "checkpoint"), "--quiet", "--cells-per-partition", "1", "--workers"]
    assert main([*words, "2", *inputs, "-o", f"{bucket}/out"]) == 0
    assert main([*words, "1", str(tmp_path / "a.h5ad"), "-o", str(tmp_path / "one.h5ad")]) == 0
    there = get(f"{bucket}/out", tmp_path / "there")
    partitions.assert_same(there / "a.h5ad", tmp_path / "one.h5ad")
    assert main([*words, "1", str(tmp_path / "b.zarr"), "-o", str(tmp_path / "one.h5ad")]) == 0
    partitions.assert_same(there / "b.h5ad", tmp_path / "one.h5ad")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_folders_of_files_and_zarr_stores_do_too(bucket, adata, checkpoint, tmp_path):
    adata[:20].copy().write_h5ad(tmp_path / "a.h5ad")
    with anndata.settings.override(zarr_write_format=3):
        adata[20:].copy().write_zarr(tmp_path / "b.zarr")
    put(tmp_path / "a.h5ad", f"{bucket}/in/a.h5ad")
    put(tmp_path / "b.zarr", f"{bucket}/in/b.zarr")
    assert main(["embed", f"{bucket}/in", "--model", checkpoint, "-o", f"{bucket}/out", "--quiet"]) == 0
    assert main(["embed", str(tmp_path / "b.zarr"), "--model", checkpoint, "-o", str(tmp_path / "b.h5ad")]) == 0
    there = get(f"{bucket}/out", tmp_path / "there")
    assert sorted(path.name for path in there.iterdir()) == ["a.h5ad", "b.h5ad"]
    partitions.assert_same(there / "b.h5ad", tmp_path / "b.h5ad")


def test_a_corpus_is_built_from_a_store_in_a_store_and_read_from_it(bucket, adata, checkpoint, tmp_path):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    put(tmp_path / "cells.h5ad", f"{bucket}/cells.h5ad")
    words = ["prepare", f"{bucket}/cells.h5ad", "--output", f"{bucket}/corpus", "--split-by", "cell"]
    words += ["--test-fraction", "0.3", "--workers", "1"]
    assert train_main(words) == 0
    corpus = open_corpus(get(f"{bucket}/corpus", tmp_path / "corpus"), verify=True)
    assert sum(corpus.n_cells(split) for split in corpus.split_names) == 60
    assert main(["annotate", f"{bucket}/corpus", "--model", checkpoint, "-o", str(tmp_path / "out.h5ad")]) == 0
    assert anndata.read_h5ad(tmp_path / "out.h5ad").n_obs == corpus.n_cells("test")
    assert train_main(words) == 0  # the corpus there is complete


def test_what_is_not_there_is_named_by_its_address(bucket, checkpoint, tmp_path, staging, capsys):
    words = ["--model", checkpoint, "-o", f"{bucket}/out.h5ad"]
    assert main(["annotate", f"{bucket}/none.h5ad", *words]) == 2
    assert capsys.readouterr().err == f"scmmgpt: There is nothing at {bucket}/none.h5ad. Correct the address.\n"
    (tmp_path / "cells.h5ad").write_text("nothing")
    put(tmp_path / "cells.h5ad", f"{bucket}/bad.h5ad")
    assert main(["annotate", f"{bucket}/bad.h5ad", *words]) == 2
    assert f"scmmgpt annotate: {bucket}/bad.h5ad is not an HDF5 file" in capsys.readouterr().err
    store, place = fsspec.core.url_to_fs(bucket)
    assert [name.rpartition("/")[2] for name in store.find(place)] == ["bad.h5ad"], "a failed command uploads nothing"
    assert not any(path.is_file() for path in staging.rglob("*"))


def test_an_upload_that_fails_leaves_no_object(checkpoint, tmp_path, monkeypatch, capsys):
    bucket = "memory://failing"
    synthetic.synthetic_adata(8).write_h5ad(tmp_path / "cells.h5ad")
    store, place = fsspec.core.url_to_fs(bucket)
    monkeypatch.setattr(type(store), "put_file", lambda *_, **__: (_ for _ in ()).throw(OSError("connection reset")))
    words = ["embed", str(tmp_path / "cells.h5ad"), "--model", checkpoint, "-o", f"{bucket}/out.h5ad", "--quiet"]
    assert main(words) == 2
    assert f"{bucket}/out.h5ad cannot be uploaded (OSError: connection reset)" in capsys.readouterr().err
    assert not store.exists(f"{place}/out.h5ad")


def test_a_download_that_stopped_is_completed(adata, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        (tmp_path / "in" / name).write_text(name * 9)
    put(tmp_path / "in", "memory://parts")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "a").write_text("a" * 4)
    storage.download("memory://parts", tmp_path / "copy")
    assert {path.name: path.read_text() for path in (tmp_path / "copy").iterdir()} == {"a": "a" * 9, "b": "b" * 9}


def test_a_store_whose_package_is_missing_is_named(monkeypatch):
    def lacking(address):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec.core, "url_to_fs", lacking)
    with pytest.raises(ImportError, match="gs:// needs gcsfs. Run `pip install gcsfs`"):
        storage.download("gs://bucket/cells.h5ad", None)


def test_two_equal_commands_do_not_share_a_staging_folder_at_once(checkpoint, tmp_path, monkeypatch, capsys):
    synthetic.synthetic_adata(8).write_h5ad(tmp_path / "cells.h5ad")
    put(tmp_path / "cells.h5ad", "memory://shared/cells.h5ad")
    words, second = (
        ["embed", "memory://shared/cells.h5ad", "--model", checkpoint, "-o", "memory://shared/out.h5ad"],
        [],
    )

    def twice(address, path, **options):
        if not second:
            second.append(main(words))
        return download(address, path, **options)

    download = storage.download
    monkeypatch.setattr(storage, "download", twice)
    assert (main(words), second) == (0, [2])
    assert "Another command is at work on" in capsys.readouterr().err


def test_other_words_of_a_command_line_stay(tmp_path):
    words = ["annotate", "cells.h5ad", "--cluster", "tcp://host:8786", "--text", "s3 or not", "-o", "out.h5ad"]
    seen = []
    assert storage.run_staged("scmmgpt", words, lambda given: seen.append(given) or 0) == 0
    assert seen == [words]
