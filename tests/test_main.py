"""The `scmmgpt` command: files in, files out, one clear line where that cannot be."""

import json
import subprocess
import sys
import time
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest

from scmmgpt.__main__ import main, make_parser
from scmmgpt.commands.files import whole_file
from scmmgpt.synthetic import synthetic_adata


COMMANDS = [
    "annotate",
    "audit",
    "report",
    "describe",
    "calibrate",
    "embed",
    "search",
    "generate",
    "inspect",
    "verify",
    "index",
    "plan",
    "export",
    "doctor",
    "mcp",
]


@pytest.fixture
def cells(adata, tmp_path):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    return str(tmp_path / "cells.h5ad")


def test_help_is_there_for_every_command_and_instant(capsys):
    start = time.perf_counter()
    code = "import sys; from scmmgpt.__main__ import main; main(['--help'])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert all(command in run.stdout for command in COMMANDS)
    assert time.perf_counter() - start < 5, "heavy imports belong inside the commands"


def test_no_command_shows_the_help(capsys):
    assert main([]) == 0
    assert "COMMAND" in capsys.readouterr().out


def test_a_shell_completes_commands_options_and_paths(tmp_path, capsys):
    pytest.importorskip("shtab", reason="completion needs shtab, which the extra `completion` installs")
    with pytest.raises(SystemExit) as stop:
        main(["--print-completion", "bash"])
    assert stop.value.code == 0
    (tmp_path / "completion").write_text(capsys.readouterr().out)
    (tmp_path / "cells.h5ad").touch()

    def completed(*words):
        quoted = " ".join(f"'{word}'" for word in words)
        shown = "printf '%s\n' \"${COMPREPLY[@]}\""
        complete = f"COMP_WORDS=(scmmgpt {quoted}); COMP_CWORD={len(words)}; _shtab_scmmgpt; {shown}"
        script = f"source completion 2>/dev/null; {complete}"
        run = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
        return run.stdout.splitlines()

    assert completed("an") == ["annotate"]
    assert sorted(completed("annotate", "--clu")) == ["--cluster", "--cluster-key"]
    assert completed("annotate", "cel") == ["cells.h5ad"]

    stored = {"labels": {"B cell": "a", "plasma cell": "b"}, "tissues": [{"name": "lymph node"}, {"name": "liver"}]}
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "config.json").write_text(json.dumps({"annotation": stored}))
    model = ["--model", "own"]
    assert completed("annotate", "cells.h5ad", *model, "--tissue", "") == [r"lymph\ node", "liver"]
    assert completed("annotate", "cells.h5ad", *model, "--labels", "b") == [r"B\ cell"]
    assert completed("annotate", "cells.h5ad", *model, "--labels", "B cell", "p") == [r"plasma\ cell"]
    assert completed("embed", "cells.h5ad", "--device", "c") == ["cpu", "cuda"]
    cells = synthetic_adata(3)
    cells.obs["$(touch run)"] = "a"  # is a word, in quotes and without, and no command
    cells.write_h5ad(tmp_path / "cells.h5ad")
    assert completed("audit", "cells.h5ad", "--label-key", '"$') == [r"\$(touch run)"]
    assert completed("audit", "cells.h5ad", "--label-key", "$") == [r"\$\(touch\ run\)"]
    assert not (tmp_path / "run").exists()
    assert completed("audit", "cells.h5ad", "--label-key", "cell") == ["cell_type", "cell_type_ontology_term_id"]
    assert completed("audit", "none.h5ad", "--label-key", "cell") == [""]


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("from scmmgpt.__main__ import make_parser; make_parser()", {"torch"}),
        ("import scmmgpt.commands.doctor", {"transformers"}),
        (
            "sys.argv = ['', 'labels', '', 'scmmgpt']; import runpy; "
            "runpy.run_module('scmmgpt.commands.completion', run_name='__main__')",
            {"torch", "numpy", "pandas", "h5py"},
        ),
    ],
    ids=["help", "doctor", "completion"],
)
def test_what_must_be_instant_imports_nothing_heavy(code, heavy):
    code = f"import sys; {code}; print({heavy} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "mcp"])
def test_every_command_prints_json_for_a_program_if_asked(command):
    parser = make_parser()._subparsers._group_actions[0].choices[command]
    assert any("--json" in action.option_strings for action in parser._actions)


def test_ctrl_c_while_a_command_starts_is_one_line():
    code = """
import sys

class Interrupt:
    def find_spec(self, name, path, target=None):
        if name == sys.argv[1]:
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupt())
from scmmgpt.__main__ import main
sys.exit(main(["--help"]))
"""
    for module in ("json", "scmmgpt.commands.options", "scmmgpt.readers.label_lists"):
        run = subprocess.run([sys.executable, "-c", code, module], capture_output=True, text=True, check=False)
        assert (run.returncode, run.stdout, run.stderr) == (130, "", "scmmgpt: stopped.\n"), module


def test_annotate_writes_the_file_and_the_table(checkpoint, cells, tmp_path, capsys):
    out, table = tmp_path / "annotated.h5ad", tmp_path / "annotated.csv"
    arguments = ["annotate", cells, "--model", checkpoint, "-o", str(out), "--table", str(table), "--json"]
    assert main([*arguments, "--columns", "cell_type"]) == 0
    summary = json.loads(capsys.readouterr().out)
    annotated = anndata.read_h5ad(out)
    assert summary["cells"] == annotated.n_obs == 60
    assert summary["labels"] == annotated.obs["scmmgpt_cell_type"].value_counts().to_dict()
    rows = pd.read_csv(table)
    assert rows.columns[:3].tolist() == ["barcode", "cell_type", "scmmgpt_cell_type"]
    assert rows["scmmgpt_cell_type"].tolist() == annotated.obs["scmmgpt_cell_type"].tolist()


@pytest.mark.parametrize(
    ("given", "texts"), [(["labels.csv"], ["a B cell", "monocyte"]), (["B", "Mono"], ["a B cell", "Mono"])]
)
def test_labels_come_from_a_file_or_the_command_line(checkpoint, cells, tmp_path, monkeypatch, given, texts):
    monkeypatch.chdir(tmp_path)
    Path("labels.csv").write_text("label,text,cl_id\nB,a B cell,CL:0000236\nMono,monocyte,\n")
    assert main(["annotate", cells, "--model", checkpoint, "-o", "out.h5ad", "--labels", *given, "--quiet"]) == 0
    stored = anndata.read_h5ad("out.h5ad").uns["scmmgpt"]["annotate"]
    assert (stored["labels"].tolist(), stored["texts"].tolist()) == (["B", "Mono"], texts)


def test_describe_writes_descriptions_beside_what_obs_would_say(checkpoint, cells, tmp_path):
    out, table = tmp_path / "described.h5ad", tmp_path / "descriptions.csv"
    arguments = ["describe", cells, "--model", checkpoint, "-o", str(out), "--table", str(table), "--quiet"]
    assert main([*arguments, "--columns", "cell_type", "--reference", "--max-new-tokens", "4"]) == 0
    rows = pd.read_csv(table, keep_default_na=False)
    assert set(rows.columns) == {"barcode", "cell_type", "description", "reference"}
    assert rows["description"].tolist() == anndata.read_h5ad(out).obs["scmmgpt_description"].tolist()
    assert rows["reference"].str.len().min() > 0


def test_the_table_of_descriptions_has_no_column_name_twice(checkpoint, cells, tmp_path):
    annotated, table = str(tmp_path / "annotated.h5ad"), tmp_path / "descriptions.csv"
    base = ["--model", checkpoint, "--quiet", "--table", str(table), "--columns", "cell_type", "-o"]
    assert main(["annotate", cells, *base, annotated]) == 0
    assert main(["describe", annotated, *base, str(tmp_path / "described.h5ad"), "--max-new-tokens", "2"]) == 0
    header = table.read_text().splitlines()[0].split(",")
    assert header == [
        "barcode",
        "cell_type",
        "scmmgpt_cell_type",
        "cl_id",
        "score",
        "margin",
        "entropy",
        "description",
    ]
    assert pd.read_csv(table)["cell_type"].tolist() == anndata.read_h5ad(cells).obs["cell_type"].tolist()


def test_embed_and_search(checkpoint, cells, tmp_path, capsys):
    out = tmp_path / "embedded.h5ad"
    assert main(["embed", cells, "--model", checkpoint, "-o", str(out), "--quiet"]) == 0
    assert anndata.read_h5ad(out).obsm["X_scmmgpt"].shape == (60, 12)
    capsys.readouterr()
    arguments = ["search", cells, "--model", checkpoint, "--text", "a B cell", "--top-k", "3", "--json"]
    assert main(arguments) == 0
    assert [hit["rank"] for hit in json.loads(capsys.readouterr().out)] == [1, 2, 3]


def test_generate_from_prompts_from_a_file_and_from_stored_labels(checkpoint, cells, tmp_path):
    out = tmp_path / "generated.h5ad"
    base = ["generate", "--model", checkpoint, "-o", str(out), "--quiet"]
    assert main([*base, "a B cell", "a T cell", "--n-cells", "2", "--genes", "CD19", "LYZ"]) == 0
    assert anndata.read_h5ad(out).shape == (4, 2)
    (tmp_path / "prompts.txt").write_text("a B cell\n\nmonocyte\n")
    assert main([*base, "--prompts-file", str(tmp_path / "prompts.txt")]) == 0
    assert anndata.read_h5ad(out).obs["prompt"].tolist() == ["a B cell", "monocyte"]
    assert main([*base, "--stored-labels", "--genes-of", cells]) == 0
    assert anndata.read_h5ad(out).obs["cell_type"].tolist() == ["B", "T"]


def test_calibration_is_written_into_the_checkpoint(checkpoint, cells, tmp_path, capsys):
    assert main(["calibrate", cells, "--model", checkpoint, "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    config = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    assert config["annotation"]["matching_weight"] == done["matching_weight"]
    assert sorted(config["annotation"]["labels"]) == ["B cell", "T cell", "monocyte", "natural killer cell"]
    assert config["annotation"]["cl_ids"]["B cell"] == "CL:0000236"
    assert "B cell" in config["annotation"]["labels"]["B cell"]
    out = tmp_path / "out.h5ad"
    assert main(["annotate", cells, "--model", checkpoint, "-o", str(out), "--quiet"]) == 0
    assert len(anndata.read_h5ad(out).uns["scmmgpt"]["annotate"]["labels"]) == 4


def test_doctor_names_versions_and_device(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["packages"]["torch"]
    assert report["machine"]["device"]


# -- what cannot be ---------------------------------------------------------------------------------------------------


def refused(arguments, capsys, tmp_path):
    """Run a command that must fail: its one line on stderr, after checking that nothing is left behind."""
    before = set(tmp_path.rglob("*"))
    capsys.readouterr()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" or "--json" in arguments and list(json.loads(captured.out)) == ["error"]
    lines = [line for line in captured.err.splitlines() if line.startswith("scmmgpt ")]
    assert len(lines) == 1
    assert "Traceback" not in captured.err
    assert set(tmp_path.rglob("*")) == before, "a failed command leaves nothing behind"
    return lines[0]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["-o", "cells.h5ad"], "would replace a file of the input FILE 'cells.h5ad'"),
        (["-o", "link.h5ad"], "would replace a file of the input"),
        (["--table", "cells.h5ad"], "must end in .csv, .tsv or .txt"),
        (["--table", "out.h5ad"], "must end in .csv, .tsv or .txt"),
        (["--table", "labels.csv", "--labels", "labels.csv"], "would replace a file of the input"),
        (["--table", "folder.csv"], "is a folder"),
        (["-o", "folder.h5ad"], "is a folder"),
        (["-o", "no/out.h5ad"], "does not exist"),
        (["-o", "out.csv"], ".h5ad"),
        (["--model", "nowhere"], "nowhere"),
        (["--cluster-key", "leiden"], "leiden"),
        (["--columns", "donor", "--table", "t.csv"], "donor"),
        (["--columns", "batch"], "--columns are those of --table, which is not named"),
        (["--labels", "labels.csv", "B"], "Give either one file or only labels"),
        (["--labels", "B", "CL:9999999"], "no type of the id 'CL:9999999'"),
        (["--labels", "B", "unknown"], "'unknown' is reserved for cells without a label"),
        (["--organism", "mice"], "choose one of human"),
        (["--layer", "counts"], "counts"),
        (["--device", "gpu"], "(it is not a device of PyTorch). Name cpu, cuda or mps"),
        (["--gene-column", "symbol"], "is not in var; it has no columns"),
        (["generate"], "Name the cells"),
        (["generate", "B", "--stored-labels"], "Name the cells"),
        (["generate", "B", "--genes", "NOTAGENE"], "NOTAGENE"),
        (["generate", "prompts.txt"], "'prompts.txt' is a file, not a description"),
        (["generate", "--prompts-file", "empty.txt"], "empty.txt has no prompts"),
        (["generate", "B", "--genes-of", "cells.h5ad", "-o", "cells.h5ad"], "the input --genes-of 'cells.h5ad'"),
        (["describe", "cells.h5ad", "--templates", "paper"], "--templates needs --reference"),
        (
            ["embed", "cells.h5ad", "--split", "test"],
            "--split test names a split of a corpus of `prepare`; cells.h5ad",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_the_model_runs(
    checkpoint, cells, tmp_path, capsys, monkeypatch, words, says
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("scmmgpt.pipeline_scmmgpt.ScMMGPTPipeline._map_cells", lambda *_: pytest.fail("the model ran"))
    (tmp_path / "link.h5ad").symlink_to("cells.h5ad")
    (tmp_path / "labels.csv").write_text("label\nB\n")
    (tmp_path / "prompts.txt").write_text("A B cell.\n")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "folder.h5ad").mkdir()
    before = {path: path.read_bytes() for path in tmp_path.glob("*.*") if path.is_file()}
    words = ["annotate", "cells.h5ad", *words] if words[0].startswith("-") else words
    words = [words[0], "--model", checkpoint, "-o", "out.h5ad", *words[1:]]
    assert says in refused(words, capsys, tmp_path)
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.parametrize(
    "words",
    [
        *(["annotate", "F", "--min-score", value] for value in ("50", "nan", "-1", "half")),
        ["annotate", "F", "--matching-weight", "2"],
        ["annotate", "F", "--batch-size", "0"],
        ["describe", "F", "--max-new-tokens", "0"],
        ["describe", "F", "--num-beams", "-1"],
        ["search", "F", "--text", "B", "--top-k", "0"],
        *(["generate", "B", "--library-size", value] for value in ("0", "inf", "nan")),
        ["generate", "B", "--n-cells", "0"],
        ["generate", "B", "--seed", "-1"],
        ["inspect", "F", "--max-cells", "0"],
    ],
)
def test_a_number_out_of_its_range_is_one_line(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*words, "--model", "M"])
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert f"argument {words[-2]}" in line
    assert repr(words[-1]) in line


def test_annotations_that_cannot_be_stored_are_mended_before_the_model_runs(checkpoint, adata, tmp_path):
    table = pd.DataFrame(adata.X.toarray(), index=adata.obs_names, columns=adata.var_names)
    table["note"] = np.array([1, "two"] * 30, dtype=object)
    table.to_csv(tmp_path / "cells.csv")
    out = tmp_path / "out.h5ad"
    arguments = ["annotate", str(tmp_path / "cells.csv"), "--model", checkpoint, "-o", str(out), "--quiet"]
    assert main(arguments) == 0
    assert anndata.read_h5ad(out).obs["note"].tolist() == ["1", "two"] * 30


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_fits_two_screens_and_the_rest_follows(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    texts = {}
    for option in ("--help", "--help-all"):
        with pytest.raises(SystemExit):
            main([command, option])
        texts[option] = capsys.readouterr().out
    assert len(texts["--help"].splitlines()) <= 48
    assert len(texts["--help-all"]) >= len(texts["--help"])


def test_a_failed_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "out.h5ad"
    target.write_text("old")

    def fail(path):
        Path(path).write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        with whole_file(target) as temporary:
            fail(temporary)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_every_option_has_a_help_text():
    for action in make_parser()._subparsers._group_actions[0].choices.values():
        assert all(option.help for option in action._actions)


def test_a_checkpoint_is_exported_in_two_parts(checkpoint, tmp_path, capsys):
    arguments = ["export", "--model", checkpoint, "--output", str(tmp_path / "exported"), "--json"]
    assert main(arguments) == 0
    paths = json.loads(capsys.readouterr().out)
    assert paths == {name: str(tmp_path / "exported" / name) for name in ("language_model", "cell_encoder")}
    assert all(Path(path, "config.json").is_file() for path in paths.values())
    assert "exists already" in refused(arguments, capsys, tmp_path)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["annotate", "missing.h5ad"], "There is no file missing.h5ad"),
        (["annotate", "cells.h5ad", "--batch-size", "0"], "'0' is not a whole number of at least 1"),
        (["search", "cells.h5ad", "--text", " "], "The text to search for is empty"),
    ],
)
def test_an_error_is_json_too_for_a_program(words, says, checkpoint, cells, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        status = main([*words, "--model", checkpoint, "-o", "out.h5ad", "--json"])
    except SystemExit as stop:
        status = stop.code
    said = capsys.readouterr()
    assert status == 2
    assert says in json.loads(said.out)["error"]
    assert says in said.err


def test_an_entry_of_another_kind_under_our_name_does_not_stop_the_result(checkpoint, adata, tmp_path, caplog):
    adata.uns["scmmgpt"] = "mine"
    adata.write_h5ad(tmp_path / "cells.h5ad")
    arguments = ["annotate", str(tmp_path / "cells.h5ad"), "--model", checkpoint, "-o", str(tmp_path / "out.h5ad")]
    assert main([*arguments, "--quiet"]) == 0
    assert list(anndata.read_h5ad(tmp_path / "out.h5ad").uns["scmmgpt"]["annotate"]["labels"]) == ["B", "T"]


def test_calibration_tells_which_labels_of_the_checkpoint_it_replaces(checkpoint, adata, tmp_path, caplog):
    adata.obs["cell_type"] = (["B", "monocyte"] * adata.n_obs)[: adata.n_obs]
    adata.write_h5ad(tmp_path / "cells.h5ad")
    assert main(["calibrate", str(tmp_path / "cells.h5ad"), "--model", checkpoint, "--quiet"]) == 0
    assert "1 of the 2 labels of the checkpoint are not labels of" in caplog.text
    assert "('T')" in caplog.text
