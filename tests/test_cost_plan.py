"""`scmmgpt plan`: costs of a sample on this machine become hours, memory and storage for many cells."""

import json
from dataclasses import replace

import pytest

from scmmgpt import synthetic
from scmmgpt.__main__ import main
from scmmgpt.commands.plan import Costs, describe_plan, plan


HOUR = Costs(
    seconds=0.01,
    clock_seconds=0.01,
    load_seconds=36.0,
    input_bytes=2000.0,
    result_bytes=1000.0,
    partition_bytes=500.0,
    worker_bytes=2 * 10**9,
    disk_rate=1e8,
    dimensions=256,
    n_cells=5,
    n_sampled=512,
    device="cpu",
)


def test_the_arithmetic_of_a_plan():
    found = plan(HOUR, 10_000_000, 10)
    assert found["compute_hours"] == pytest.approx((36 + 10_000_000 * 0.01 / 10) / 3600, abs=1e-3)
    assert found["copy_hours"] == pytest.approx(10_000_000 * 2000 / 1e8 / 3600, abs=1e-3)
    assert found["join_hours"] == pytest.approx(10_000_000 * 2 * 1000 / 1e8 / 3600, abs=1e-3)
    assert found["hours"] == pytest.approx(found["compute_hours"] + found["join_hours"], abs=2e-3)
    assert found["useful_workers"] == 500  # 100,000 seconds of computing, 200 of copying
    assert found["memory_gb"] == 20.0
    assert found["read_rate_mb_s"] == 2.0
    assert [found[f"{name}_gb"] for name in ("input", "partitions", "output", "index")] == [20.0, 5.0, 30.0, 2.68]


def test_more_workers_than_are_useful_wait_for_the_copy_of_the_input():
    found = plan(HOUR, 10_000_000, 1000)
    assert found["compute_hours"] < found["copy_hours"]
    assert found["hours"] == pytest.approx(found["copy_hours"] + found["join_hours"], abs=2e-3)


def test_twice_the_cells_take_twice_the_time_and_storage_after_the_start():
    one, two = plan(HOUR, 10**8, 100), plan(HOUR, 2 * 10**8, 100)
    assert two["output_gb"] == pytest.approx(2 * one["output_gb"])
    assert two["hours"] - one["hours"] == pytest.approx(one["hours"] - 36 / 3600, abs=0.01)


@pytest.mark.parametrize("verb", ["annotate", "embed"])
def test_a_sample_of_a_file_is_measured(verb, adata, checkpoint, tmp_path, capsys):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    words = ["plan", str(tmp_path / "cells.h5ad"), "--model", checkpoint, "--verb", verb, "--json"]
    assert main([*words, "--seconds", "0.01", "--cells", "1000000", "--workers", "1", "4"]) == 0
    found = json.loads(capsys.readouterr().out)
    measured = found["measured"]
    assert measured["seconds"] > 0
    assert measured["n_sampled"] >= 60
    assert measured["input_bytes"] == pytest.approx((tmp_path / "cells.h5ad").stat().st_size / 60, rel=1e-3)
    # 12 dimensions of 4 bytes, or 2 probabilities, three numbers and two codes of words
    assert measured["result_bytes"] == (48 if verb == "embed" else 28)
    assert [entry["workers"] for entry in found["plans"]] == [1, 4]
    assert found["plans"][1]["compute_hours"] < found["plans"][0]["compute_hours"]


@pytest.mark.parametrize("words", [["audit", "--label-key", "cell_type"], ["search", "--text", "a B cell"]])
def test_an_audit_and_a_search_are_planned_too(words, tmp_path, capsys):
    synthetic.fitted_pipeline().save_pretrained(tmp_path / "checkpoint")
    synthetic.synthetic_adata().write_h5ad(tmp_path / "cells.h5ad")
    given = ["plan", str(tmp_path / "cells.h5ad"), "--model", str(tmp_path / "checkpoint"), "--seconds", "0.01"]
    assert main([*given, "--verb", *words, "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)["measured"]
    assert measured["seconds"] > 0
    assert measured["result_bytes"] > 0
    assert main([*given, "--verb", "audit", "--label-key", "type"]) == 2
    assert "obs has no column 'type'" in capsys.readouterr().err


def test_the_lines_of_a_plan_have_a_column_for_each_number_of_workers(adata, checkpoint, tmp_path, capsys):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    words = ["plan", str(tmp_path / "cells.h5ad"), "--model", checkpoint, "--verb", "embed"]
    assert main([*words, "--seconds", "0.01", "--workers", "1", "8", "--quiet"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "ms a cell" in lines[0]
    assert next(line.split() for line in lines if line.startswith("workers")) == ["workers", "1", "8"]


def test_a_person_reads_hours_minutes_and_what_more_workers_bring():
    lines = describe_plan(HOUR, 10_000_000, [10, 1000])[1]
    words = [" ".join(line.split()) for line in lines]
    assert "time in all 2.8 h 6.7 min" in words  # 10,036 or 136 s of computing, 200 s of copying, 200 s of joining
    assert "copying the input, meanwhile 3.3 min 3.3 min" in words
    assert "output on disk 30 GB 30 GB" in words
    assert words[-2].startswith("More than 500 workers do not help")
    assert words[-1].startswith("A partition of 16,384 cells takes 2.7 min")
    slow_disk = replace(HOUR, disk_rate=1.0)
    assert "More than 1 worker does not help: " in " ".join(describe_plan(slow_disk, 10_000, [1])[1])
