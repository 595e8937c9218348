"""Whatever a file, a checkpoint or a disk does: one line, an exit code, nothing left behind, no memory on trust."""

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

from scmmgpt.__main__ import TRAINING, main
from scmmgpt.commands.checkpoints import check_checkpoint, find_checkpoint
from scmmgpt.commands.errors import as_options, explain, naming, run_command, take_debug
from scmmgpt.synthetic import synthetic_adata


@pytest.fixture
def checkpoint(checkpoint):
    """The folder of a checkpoint to damage."""
    return Path(checkpoint)


# -- the door ---------------------------------------------------------------------------------------------------------


def raising(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ValueError("two\nlines"), "two lines"),
        (KeyError("id"), "KeyError"),
        (IndexError("out of range"), "cells.h5ad cannot be used"),
        (AssertionError(), "AssertionError"),
        (RecursionError("maximum recursion depth exceeded"), "RecursionError"),
        (MemoryError(), "Memory ran out"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "Memory ran out"),
        (OSError(errno.ENOSPC, "No space left on device", "out.h5ad"), "No space left on device"),
        (RuntimeError("PytorchStreamWriter: write failed (os error 28)"), "No space left on device"),
        (ModuleNotFoundError("No module named 'trl'", name="trl"), "Install `scmmgpt[train]`"),
        (BaseException("a panic of Rust"), "a panic of Rust"),
    ],
)
def test_every_error_is_one_line_and_an_exit_code(error, says, capsys):
    assert run_command("scmmgpt test", raising(error), inputs=["cells.h5ad"]) == 2
    written = capsys.readouterr().err
    assert written.startswith("scmmgpt test: ")
    assert written.count("\n") == 1
    assert says in written


def test_a_full_disk_is_named_by_the_output_on_it(tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    space = {tmp_path: 10**9, tmp_path / "full": 0}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=space[path]))
    outputs = [tmp_path / "out.h5ad", tmp_path / "full" / "table.csv"]
    said = explain(OSError(errno.ENOSPC, "No space left on device"), outputs=outputs)
    assert said == f"No space left on device: {outputs[1]} needs more than the 0 bytes that are free. Make room."


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM")
@pytest.mark.parametrize("forks", [False, True])
def test_sigterm_stops_a_command_as_ctrl_c_does_and_leaves_no_file(tmp_path, forks):
    script = tmp_path / "command.py"
    script.write_text(
        "import os, sys, time\n"
        "from scmmgpt.commands.errors import run_command\n"
        "from scmmgpt.commands.files import whole_file\n"
        "def work():\n"
        f"    with whole_file({str(tmp_path / 'out.txt')!r}) as temporary:\n"
        "        temporary.write_text('half')\n"
        f"        child = os.fork() if {forks} else None\n"
        "        os.write(1, b'%d\\n' % (child or 0))\n"
        "        time.sleep(60)\n"
        "sys.exit(run_command('test', work))\n"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, script], stdout=pipe, stderr=pipe, text=True) as command:
        numbers = {int(command.stdout.readline()) for _ in range(1 + forks)}
        for child in numbers - {0}:  # ends without a word, and without the files of its parent
            os.kill(child, signal.SIGTERM)
            time.sleep(0.5)
            assert list(tmp_path.glob(".*.tmp.txt"))
        command.terminate()
        said = command.stderr.read()
    assert said == "test: stopped.\n"
    assert command.returncode == 128 + signal.SIGTERM
    assert [path.name for path in tmp_path.iterdir()] == ["command.py"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["anotate"], "there is no command 'anotate', do you mean 'annotate'?"),
        (["frobnicate"], "there is no command 'frobnicate' ("),
        (
            ["finetune", "--adata", "x"],
            "'finetune' is a command of training: `python -m scmmgpt.train finetune --help`",
        ),
    ],
)
def test_an_unknown_command_brings_the_one_that_is_meant(words, says, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err


def test_no_command_of_training_hides_one_of_the_command_line():
    from scmmgpt.train.__main__ import ABOUT

    assert set(TRAINING) == set(ABOUT) - {"plan"}


def test_remedies_are_options_of_the_command():
    assert as_options("; `proof=True` describes by counts") == "; `--proof` describes by counts"


def test_debug_shows_the_traceback_of_any_error():
    with pytest.raises(KeyError):
        run_command("scmmgpt test", raising(KeyError("id")), debug=True)


def test_stopping_is_no_error(capsys):
    assert run_command("scmmgpt test", raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "scmmgpt test: stopped.\n"


def test_a_bare_debug_is_ours_and_one_with_a_value_that_of_transformers():
    assert take_debug(["--debug", "--seed", "1"]) == (["--seed", "1"], True)
    assert take_debug(["--debug", "underflow_overflow"]) == (["--debug", "underflow_overflow"], False)


def test_a_long_message_of_a_library_is_shortened():
    assert len(explain(KeyError("x" * 5000))) < 500


@pytest.mark.parametrize("command", ["train prepare", "eval annotation"])
def test_help_without_an_extra_names_the_extra(command):
    """As if the libraries of the extra were not installed."""
    package, name = command.split()
    code = (
        "import sys\n"
        "for name in ('trl', 'pyarrow', 'sklearn'): sys.modules[name] = None\n"
        f"from scmmgpt.{package}.__main__ import main\n"
        f"sys.exit(main([{name!r}, '--help']))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "Traceback" not in run.stderr
    assert f"scmmgpt[{package}]" in run.stderr.splitlines()[-1]


# -- checkpoints ------------------------------------------------------------------------------------------------------


def edit(change):
    """Change `config.json`."""

    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def cell(**fields):
    return edit(lambda config: config["cell_config"].update(fields))


def truncate(name, size):
    return lambda folder: os.truncate(folder / name, size)


def put(name, text):
    return lambda folder: (folder / name).write_text(text)


def flip(name, place):
    def damage(folder):
        content = bytearray((folder / name).read_bytes())
        content[place] ^= 0xFF
        (folder / name).write_bytes(content)

    return damage


def far_gene(folder):
    path = folder / "gene_tokenizer" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["FAR"] = 10**12
    path.write_text(json.dumps(tokenizer))


DAMAGES = {
    "a configuration that is a list": (put("config.json", "[1]"), "holds a list"),
    "a configuration that is cut": (truncate("config.json", 100), "not JSON"),
    "no attention heads": (cell(num_attention_heads=0), "num_attention_heads = 0"),
    "a negative width": (cell(hidden_size=-16), "hidden_size = -16"),
    "a width of words": (cell(hidden_size="wide"), "'wide'"),
    "a width of a billion": (cell(hidden_size=10**9), "1,000,000,000"),
    "a billion layers": (cell(num_hidden_layers=10**9), "more than the weights"),
    "a layer without weights": (cell(num_hidden_layers=3), "weights .* are missing"),
    "heads that do not divide the width": (cell(num_attention_heads=3), "3 attention heads"),
    "a part that is a list": (edit(lambda config: config.update(text_config=[1])), "text_config"),
    "labels that are a list": (edit(lambda config: config.update(annotation={"labels": ["B"]})), "annotation"),
    "weights that are cut": (truncate("model.safetensors", 200_000), "truncated: 200,000 of"),
    "weights that are empty": (truncate("model.safetensors", 0), "truncated"),
    "weights of another header": (flip("model.safetensors", 40), "damaged"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
    "a tokenizer that is a list": (put("tokenizer.json", "[]"), "holds a list"),
    "aliases that are a list": (put("gene_aliases.json", "[1]"), "holds a list"),
    "a gene of id 1e12": (far_gene, "1000000000000"),
    "no genes": (lambda folder: shutil.rmtree(folder / "gene_tokenizer"), "gene vocabulary"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_refused_before_memory_is_asked_for(name, checkpoint):
    damage, says = DAMAGES[name]
    damage(checkpoint)
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        check_checkpoint(str(checkpoint))


def test_a_checkpoint_without_a_language_model_passes_with_the_sizes_of_one(checkpoint):
    """Stage 1 saves the defaults of a language model, whose vocabulary is larger than anything in its weights."""
    weights = load_file(checkpoint / "model.safetensors")
    without = {name: value for name, value in weights.items() if "language_model." not in name}
    save_file(without, checkpoint / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((checkpoint / "config.json").read_text())
    config["text_config"]["vocab_size"] = 32_000
    (checkpoint / "config.json").write_text(json.dumps(config))
    check_checkpoint(str(checkpoint))
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="text_config.vocab_size = 32,000"):
        check_checkpoint(str(checkpoint))


def test_a_damaged_checkpoint_is_one_line_and_leaves_nothing(checkpoint, tmp_path, capsys):
    synthetic_adata(5).write_h5ad(tmp_path / "cells.h5ad")
    os.truncate(checkpoint / "model.safetensors", 1000)
    before = set(tmp_path.rglob("*"))
    arguments = ["annotate", str(tmp_path / "cells.h5ad"), "--model", str(checkpoint), "--quiet"]
    assert main([*arguments, "-o", str(tmp_path / "out.h5ad")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "truncated" in lines[0]
    assert set(tmp_path.rglob("*")) == before


def test_a_mistyped_folder_is_not_looked_up_on_the_hub(checkpoint, monkeypatch):
    """Neither retries nor advice about the network; the folder that was meant is named."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **kwargs: pytest.fail("asked the Hub"))
    monkeypatch.chdir(checkpoint.parent.parent)
    for name in (str(checkpoint.parent / "chekpoint"), f"{checkpoint.parent.name}/chekpoint"):
        with pytest.raises(FileNotFoundError, match=r"There is no folder .* has checkpoint\."):
            find_checkpoint(name)
    with pytest.raises(FileNotFoundError, match="There is no folder 'chekpoint'"):
        find_checkpoint("chekpoint")


def test_a_model_id_without_a_network_says_both(monkeypatch):
    import huggingface_hub

    def offline(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", offline)
    with pytest.raises(FileNotFoundError, match="no folder 'nobody/nothing', and the Hub cannot be searched"):
        find_checkpoint("nobody/nothing")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_whoever_may_read_new_files_may_read_the_weights(labelled_checkpoint):
    umask = os.umask(0)
    os.umask(umask)
    for path in Path(labelled_checkpoint).rglob("*"):
        if path.is_file():
            assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path


# -- files of cells ---------------------------------------------------------------------------------------------------


def test_a_command_gives_each_warning_once(caplog):
    logger = logging.getLogger("scmmgpt.test")

    def work():
        for _ in range(2):
            logger.warning("The file lacks CD4.")

    for _ in range(2):
        assert run_command("scmmgpt test", work) == 0
        assert caplog.text.count("lacks CD4") == 1
        caplog.clear()


def test_two_files_have_the_same_warning_each(caplog):
    def work():
        for path in ("a.h5ad", "b.h5ad", "b.h5ad"):
            with naming(path):
                logging.getLogger("scmmgpt.test").warning("The file lacks CD4.")

    assert run_command("scmmgpt test", work) == 0
    assert [record.message for record in caplog.records if record.is_repeated is False] == [
        "a.h5ad: The file lacks CD4.",
        "b.h5ad: The file lacks CD4.",
    ]
