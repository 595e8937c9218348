"""Python searches for no garbage while a command starts, and does again whatever becomes of the start."""

import argparse
import gc

import pytest

from scmmgpt.__main__ import load_pipeline, main
from scmmgpt.commands.garbage import started, starting


@pytest.fixture(autouse=True)
def new_process():
    """Objects are searched as in a process that has started nothing; afterwards as `conftest` has it."""
    gc.unfreeze()
    yield
    gc.enable()
    gc.freeze()


def test_no_garbage_is_searched_until_all_is_loaded_once_in_a_process():
    with starting():
        assert not gc.isenabled()
        started()
        assert gc.isenabled()
        assert gc.get_freeze_count() > 0  # what was loaded is not searched
    with starting():
        assert gc.isenabled()


def test_garbage_is_searched_again_after_an_error():
    with pytest.raises(ZeroDivisionError), starting():
        raise ZeroDivisionError
    assert gc.isenabled()


def test_garbage_is_searched_once_a_checkpoint_is_there(monkeypatch):
    seen = []
    monkeypatch.setattr("scmmgpt.commands.checkpoints.check_checkpoint", lambda name: None)
    found = staticmethod(lambda *_, **__: seen.append(gc.isenabled()))
    monkeypatch.setattr("scmmgpt.pipeline_scmmgpt.ScMMGPTPipeline.from_pretrained", found)
    with starting():
        load_pipeline(argparse.Namespace(model="", device=None, batch_size=None, quiet=True, json=False))
        assert gc.isenabled()
    assert seen == [False]


def test_a_command_without_a_checkpoint_leaves_the_search_on(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "none.h5ad")]) == 2
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("words", "function"), [(["index", "a.h5ad", "-o", "I"], "add_files"), (["mcp", "--folder", "."], "serve")]
)
def test_commands_that_go_on_without_a_checkpoint_search(words, function, tmp_path, monkeypatch):
    seen = []
    module = {"add_files": "index", "serve": "mcp_server"}[function]
    found = lambda *_: seen.append(gc.isenabled()) or {}  # noqa: E731
    monkeypatch.setattr(f"scmmgpt.commands.{module}.{function}", found)
    monkeypatch.chdir(tmp_path)
    assert main(words) == 0
    assert seen == [True]
