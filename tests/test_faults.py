"""What goes wrong while a corpus is built or kept: nothing may be lost, nothing may be silently wrong."""

import errno
import functools
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest


pytest.importorskip("cellxgene_ontology_guide")

from scmmgpt.commands.files import whole_folder
from scmmgpt.synthetic import synthetic_adata
from scmmgpt.train.__main__ import main
from scmmgpt.train.data import build, build_steps, prepare
from scmmgpt.train.data import corpus as corpus_files
from scmmgpt.train.data import sources as source_files
from scmmgpt.train.data.corpus import hash_file, open_corpus
from scmmgpt.train.data.workers import start_workers


GENES = list(synthetic_adata(4).var_names)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two files of 120 cells, and the vocabulary of their genes, which saves the builds the search for it."""
    folder = tmp_path_factory.mktemp("sources")
    for i in range(2):
        synthetic_adata(120, seed=i).write_h5ad(folder / f"set{i}.h5ad")
    (folder / "vocab.json").write_text(json.dumps({g: i for i, g in enumerate(["<pad>", "<cls>", "<eoc>", *GENES])}))
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No gene-name tables, which take seconds to load, and no syncing: processes are killed here, not machines."""
    monkeypatch.setattr(build, "build_gene_aliases", lambda vocabulary: {"aliases": {}, "orthologs": {}})
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def arguments(sources, output, *more):
    words = [*sorted(map(str, sources.glob("*.h5ad"))), "--vocabulary", str(sources / "vocab.json")]
    words += ["--split-by", "cell", "--cells-per-shard", "30", "--cells-per-partition", "20", "--workers", "1"]
    return prepare.make_parser().parse_args([*words, "--output", str(output), *more])


@pytest.fixture(scope="module")
def whole(sources, tmp_path_factory):
    """A corpus that was built in peace."""
    output = tmp_path_factory.mktemp("whole") / "corpus"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "build_gene_aliases", lambda vocabulary: {"aliases": {}, "orthologs": {}})
        prepare.main(arguments(sources, output))
    return output


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of it to damage."""
    shutil.copytree(whole, tmp_path / "corpus")
    return tmp_path / "corpus"


def start_builder(sources, output):
    """Build in a process of its own; forked, because importing anew would take longer than the build."""
    for cache in (source_files._open, build_steps._chosen_source):
        cache.cache_clear()  # an open file is not to be shared between processes
    process = multiprocessing.get_context("fork").Process(target=prepare.main, args=(arguments(sources, output),))
    process.start()
    return process


def shard_bytes(corpus):
    return {path.name: hash_file(path) for path in sorted(corpus.glob("data/*"))}


def shard_path(corpus):
    return sorted(corpus.glob("data/train-*.parquet"))[1]


def test_a_build_killed_at_twenty_random_moments_ends_with_the_same_bytes(sources, whole, tmp_path):
    """Kills fall between any two files that the build makes, and into their writing."""
    rng = np.random.default_rng(0)
    output, builds, kills, finished = tmp_path / "corpus-0", 0, 0, 0

    def n_files():
        return sum(len(files) for _, _, files in os.walk(output))

    def check_and_start_over():
        nonlocal output, finished
        assert shard_bytes(output) == shard_bytes(whole)
        assert (output / "splits.json").read_bytes() == (whole / "splits.json").read_bytes()
        open_corpus(output, verify=True)
        finished += 1
        output = tmp_path / f"corpus-{finished}"

    while kills < 20:
        builds += 1
        assert builds < 60, f"only {kills} builds of {builds} could be killed before they ended"
        enough = n_files() + rng.integers(1, 12)
        process = start_builder(sources, output)
        deadline = time.monotonic() + 30
        while process.is_alive() and n_files() < enough and time.monotonic() < deadline:
            time.sleep(0.003)
        time.sleep(rng.uniform(0, 0.03))
        process.kill()
        process.join()
        if process.exitcode == 0:
            check_and_start_over()
        else:
            assert process.exitcode == -9
            kills += 1
    prepare.main(arguments(sources, output))
    check_and_start_over()
    names = {"manifest.json", "vocab.json", "gene_aliases.json", "splits.json", "genes.parquet", "README.md"}
    for folder in tmp_path.glob("corpus-*"):
        assert {path.name for path in folder.iterdir()} == names | {"data", ".lock"}


def test_a_finished_shard_is_never_written_again(sources, whole, tmp_path, monkeypatch):
    output = tmp_path / "corpus"
    monkeypatch.setattr(build.CorpusBuilder, "_finish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare.main(arguments(sources, output))
    before = {path: path.stat().st_mtime_ns for path in output.glob("data/*")}
    assert len(before) == len(shard_bytes(whole))
    monkeypatch.undo()
    monkeypatch.setattr(build, "build_gene_aliases", lambda vocabulary: {"aliases": {}, "orthologs": {}})
    prepare.main(arguments(sources, output))
    assert before == {path: path.stat().st_mtime_ns for path in output.glob("data/*")}
    assert shard_bytes(output) == shard_bytes(whole)


def test_two_builders_at_once_do_not_mix(sources, tmp_path):
    with build.lock_folder(tmp_path / "corpus"):
        message = f"Another command is at work on .*process {os.getpid()} on"
        with pytest.raises(ValueError, match=message):
            prepare.main(arguments(sources, tmp_path / "corpus"))
    prepare.main(arguments(sources, tmp_path / "corpus"))


def test_builders_that_start_together_leave_one_whole_corpus(sources, whole, tmp_path):
    builders = [start_builder(sources, tmp_path / "c") for _ in range(2)]
    for builder in builders:
        builder.join()
    assert 0 in {builder.exitcode for builder in builders}
    assert shard_bytes(tmp_path / "c") == shard_bytes(whole)


def test_a_file_too_large_for_the_disk_is_said_clearly_and_resumed(sources, whole, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    largest = max(path.stat().st_size for path in whole.glob("data/*"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 100, hard))
    try:
        with pytest.raises(OSError, match=r"bytes are free.*give the same command again") as error:
            prepare.main(arguments(sources, tmp_path / "corpus"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.errno == errno.EFBIG
    with pytest.raises(FileNotFoundError, match="its build did not finish"):
        open_corpus(tmp_path / "corpus")
    prepare.main(arguments(sources, tmp_path / "corpus"))
    assert shard_bytes(tmp_path / "corpus") == shard_bytes(whole)


def test_a_full_disk_is_said_clearly_and_resumed(sources, whole, small_disk):
    corpus = small_disk(160) / "corpus"
    with pytest.raises(OSError, match=r"No space left on device while writing.*give the same command again"):
        prepare.main(arguments(sources, corpus))
    small_disk(20_000)
    prepare.main(arguments(sources, corpus))
    assert shard_bytes(corpus) == shard_bytes(whole)


def test_a_build_goes_on_with_smaller_partitions(sources, whole, tmp_path, monkeypatch):
    """After running out of memory, say."""
    merge, output = build_steps.merge_shard, tmp_path / "corpus"
    shards = iter(range(3))
    monkeypatch.setattr(build_steps, "merge_shard", lambda *a, **b: merge(*a, **b) if next(shards) < 2 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare.main(arguments(sources, output))
    assert len(shard_bytes(output)) == 2
    monkeypatch.setattr(build_steps, "merge_shard", merge)
    prepare.main(arguments(sources, output, "--cells-per-partition", "9"))
    assert shard_bytes(output) == shard_bytes(whole)


def test_a_worker_that_the_system_ends_is_said_clearly():
    with pytest.raises(ValueError, match="ended a worker process"), start_workers(2) as run:
        run([functools.partial(os._exit, 1)], "ended")


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "says"),
    [(lambda path: os.truncate(path, path.stat().st_size - 10), "truncated"), (flip_a_byte, "sha256")],
    ids=["truncated", "a flipped byte"],
)
def test_a_damaged_shard_is_refused_until_it_is_deleted_and_built_again(sources, copy, whole, damage, says):
    path = shard_path(copy)
    damage(path)
    with pytest.raises(ValueError, match=f"{path.name} .*{says}"):
        open_corpus(copy)
    with pytest.raises(ValueError, match=f"{path.name} .*{says}.*Delete the shard"):
        prepare.main(arguments(sources, copy))
    path.unlink()
    with pytest.raises(FileNotFoundError, match=path.name):
        open_corpus(copy)
    prepare.main(arguments(sources, copy))
    assert shard_bytes(copy) == shard_bytes(whole)
    ours, theirs = (json.loads((folder / "manifest.json").read_text()) for folder in (copy, whole))
    assert ours | {"command": ""} == theirs | {"command": ""}


def edit_manifest(corpus, change):
    manifest = json.loads((corpus / "manifest.json").read_text())
    manifest = change(manifest) or manifest
    (corpus / "manifest.json").write_text(json.dumps(manifest))


def rewrite(corpus, change):
    """Another table in the place of a shard, with a manifest that agrees."""
    path = shard_path(corpus)
    pq.write_table(change(pq.read_table(path, partitioning=None)), path)
    name = str(path.relative_to(corpus))

    def agree(manifest):
        for shard in manifest["shards"]:
            if shard["path"] == name:
                shard.update(n_bytes=path.stat().st_size, sha256=hash_file(path))

    edit_manifest(corpus, agree)


SPOILT = {
    "a manifest that is a list": (lambda c: edit_manifest(c, lambda m: [m]), "holds a list"),
    "a manifest that is cut": (lambda c: os.truncate(c / "manifest.json", 100), "not JSON"),
    "a manifest without shards": (lambda c: edit_manifest(c, lambda m: m.pop("shards") and None), "damaged"),
    "shards that are words": (lambda c: edit_manifest(c, lambda m: m.update(shards=["a"])), "damaged"),
    "a negative number of cells": (
        lambda c: edit_manifest(c, lambda m: m["shards"][0].update(n_cells=-1)),
        "n_cells of a shard is -1",
    ),
    "a shard elsewhere": (
        lambda c: edit_manifest(c, lambda m: m["shards"][0].update(path="../../etc/passwd")),
        "lies outside the corpus",
    ),
    "another number of cells": (
        lambda c: edit_manifest(c, lambda m: m["shards"][0].update(n_cells=7)),
        "7 in the manifest",
    ),
    "a missing column": (lambda c: rewrite(c, lambda table: table.drop_columns("counts")), "has no columns counts"),
    "missing rows": (lambda c: rewrite(c, lambda table: table.slice(1)), "in the manifest"),
    "genes of absurd ids": (
        lambda c: (c / "vocab.json").write_text(json.dumps({"A": 10**12})),
        "1000000000000",
    ),
    "a vocabulary that is a list": (lambda c: (c / "vocab.json").write_text("[]"), "holds a list"),
    "splits that are not JSON": (lambda c: (c / "splits.json").write_text("{"), "splits.json"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_corpus_is_one_line(copy, name, capsys):
    """From the command that reads every value, and the command that trains."""
    spoil, says = SPOILT[name]
    spoil(copy)
    assert main(["cache", str(copy), "--num-threads", "1"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("scmmgpt.train cache: ")]
    assert len(lines) == 1
    assert says in lines[0]
    assert not any((copy / "cache").glob(".*")), "no half-written copy is left"


@pytest.mark.parametrize("seed", range(3))
def test_flipped_bytes_of_a_shard_are_found_without_checksums_too(copy, seed, monkeypatch, capsys):
    """In a large corpus the checksums of files are not compared; each page has its own."""
    monkeypatch.setattr(corpus_files, "SMALL_CORPUS_BYTES", 0)
    path = shard_path(copy)
    content = bytearray(path.read_bytes())
    for place in np.random.default_rng(seed).integers(4, len(content) - 8, 20):
        content[place] ^= 0xFF
    path.write_bytes(content)
    assert main(["cache", str(copy), "--num-threads", "1"]) == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    assert len([line for line in errors.splitlines() if line.startswith("scmmgpt.train cache: ")]) == 1


def test_a_source_that_changed_is_not_mixed_with_the_old_one(sources, tmp_path, monkeypatch):
    folder = tmp_path / "sources"
    shutil.copytree(sources, folder)
    monkeypatch.setattr(build.CorpusBuilder, "_finish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare.main(arguments(folder, tmp_path / "corpus"))
    (folder / "set1.h5ad").unlink()
    synthetic_adata(120, seed=7).write_h5ad(folder / "set1.h5ad")
    with pytest.raises(ValueError, match=r"other sources or options \(sources differ\)"):
        prepare.main(arguments(folder, tmp_path / "corpus"))


def test_shards_of_unknown_origin_are_not_adopted(sources, copy):
    (copy / "manifest.json").unlink()
    with pytest.raises(ValueError, match="an unknown build"):
        prepare.main(arguments(sources, copy))


def test_workers_end_with_a_killed_builder():
    """A killed builder leaves no process behind that works on for nobody."""
    program = """
import os, time
from scmmgpt.train.data.workers import start_workers
with start_workers(2) as run:
    print(*run([os.getpid], "asked"), flush=True)
    time.sleep(60)
"""
    builder = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    worker = int(builder.stdout.readline())
    builder.kill()
    builder.wait()
    for _ in range(1000):
        if not Path(f"/proc/{worker}").exists():
            return
        time.sleep(0.01)
    pytest.fail(f"worker {worker} still runs")


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder"

    def write(content):
        with whole_folder(path) as temporary:
            (temporary / "half").write_text("")
            (temporary / "file").write_bytes(content)

    with pytest.raises(TypeError):
        write(None)
    assert not list(tmp_path.iterdir())
    write(b"first")
    write(b"second")
    assert (path / "file").read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]
