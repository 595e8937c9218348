"""The package holds together: modules import, travelling files travel, the metadata agree with the code."""

import argparse
import ast
import doctest
import importlib
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest

from scmmgpt import __main__ as scmmgpt_main
from scmmgpt.eval import __main__ as eval_main
from scmmgpt.tests.test_main import COMMANDS
from scmmgpt.train import __main__ as train_main


ROOT = Path(__file__).parents[1]
TRAVELLING = (
    sorted(path.name for path in ROOT.glob("*_scmmgpt.py"))
    + ["modeling_scgpt.py"] * (ROOT / "modeling_scgpt.py").exists()
)
TRAVELLING_MAY_IMPORT = {"numpy", "torch", "transformers"}
OPTIONAL = {"anndata", "llvmlite", "numba", "scipy"}  # numba brings llvmlite
MODULES = sorted(
    ".".join(["scmmgpt", *path.relative_to(ROOT).with_suffix("").parts])
    for folder in (".", "commands", "readers", "train", "train/data", "eval")
    for path in ROOT.glob(f"{folder}/*.py")
    if path.name != "__init__.py"
)
METRICS = sorted(ROOT.glob("eval/metrics/*/*.py"))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def import_or_skip(name):
    """Import a module; an optional extra that is not installed skips the test, anything else fails it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name.split(".")[0] in {"gradio", "tiledbsoma", "cellxgene_census", "ray"}:
            pytest.skip(f"{name} needs {error.name}, which an extra installs")
        raise


@pytest.mark.parametrize("name", MODULES)
def test_every_module_imports(name):
    assert import_or_skip(name).__doc__, f"{name} has no docstring"


def test_files_and_functions_are_no_longer_than_the_contributing_guide_allows():
    long = []
    for name in MODULES:
        text = Path(ROOT, *name.split(".")[1:]).with_suffix(".py").read_text()
        if text.count("\n") > 600 and not name.startswith(("scmmgpt.modeling_", "scmmgpt.pipeline_")):
            long.append(name)
        functions = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef))
        long += [f.name for f in functions if f.end_lineno - f.body[0].end_lineno >= 80]  # without the docstring
    assert not long


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith(("__main__", "app"))])
def test_examples_in_docstrings_are_true(name):
    result = doctest.testmod(import_or_skip(name), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def imports_of(path):
    """Yield `(line, top-level name, siblings' names, whether inside a try)` for each import of a file."""
    tree = ast.parse(path.read_text())
    guarded = {id(node) for block in ast.walk(tree) if isinstance(block, ast.Try) for node in ast.walk(block)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name.split(".")[0], 0, id(node) in guarded
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, (node.module or "").split(".")[0], node.level, id(node) in guarded


@pytest.mark.parametrize("name", TRAVELLING)
def test_travelling_files_import_only_what_every_user_has(name):
    siblings = {path.removesuffix(".py") for path in TRAVELLING}
    for line, module, level, guarded in imports_of(ROOT / name):
        where = f"{name}:{line}"
        if level or module in siblings:
            assert level == 1, f"{where}: the Hub loader follows only `from .sibling import name`"
            assert module in siblings, f"{where}: only `from .sibling import name` is followed, not {module!r}"
        elif module in OPTIONAL:
            assert guarded, f"{where}: {module} is optional, so its import stands inside `try`"
        else:
            assert module in TRAVELLING_MAY_IMPORT | sys.stdlib_module_names, f"{where}: imports {module}"


@pytest.mark.parametrize("name", TRAVELLING)
def test_travelling_files_quote_no_relative_import(name):
    # The Hub loader reads raw text: an import in a docstring counts as one, and its file must exist.
    found = set(re.findall(r"^\s*from\s+\.(\S+)\s+import", (ROOT / name).read_text(), flags=re.MULTILINE))
    assert found <= {path.removesuffix(".py") for path in TRAVELLING}


def test_auto_map_names_classes_that_exist():
    configuration = importlib.import_module("scmmgpt.configuration_scmmgpt")
    for auto_map in (configuration.AUTO_MAP, configuration.ALIGNMENT_AUTO_MAP, configuration.CELL_AUTO_MAP):
        for target in auto_map.values():
            module, _, name = target.partition(".")
            if (ROOT / f"{module}.py").exists():
                assert hasattr(importlib.import_module(f"scmmgpt.{module}"), name), target


def test_constraints_satisfy_the_ranges_of_pyproject():
    from packaging.requirements import Requirement

    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    pins = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins.items()}
    extras = PYPROJECT["project"]["optional-dependencies"]
    installed = ("train", "eval", "census", "cluster", "completion", "docs", "index", "mcp", "storage", "dev")
    wanted = [*PYPROJECT["project"]["dependencies"], *(name for extra in installed for name in extras[extra])]
    for requirement in map(Requirement, wanted):
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        assert name in pins, f"constraints.txt does not pin {requirement.name}"
        assert requirement.specifier.contains(pins[name]), f"{requirement} excludes the pinned {pins[name]}"


def test_pinned_versions_run_on_the_oldest_python_of_pyproject():
    from importlib import metadata

    from packaging.specifiers import SpecifierSet

    oldest = PYPROJECT["project"]["requires-python"].removeprefix(">=") + ".0"
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    installed = [found for found in metadata.distributions() if pins.get(found.metadata["Name"]) == found.version]
    assert len(installed) > 50
    wanted = {found.metadata["Name"]: found.metadata.get("Requires-Python", "") for found in installed}
    refused = {name: versions for name, versions in wanted.items() if oldest not in SpecifierSet(versions)}
    assert refused == {}  # Debian 12 has Python 3.11.2


def test_constraints_begin_with_torch():
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert pins[0].startswith("torch==")


def test_every_code_folder_is_packaged():
    folders = {path.parent.relative_to(ROOT).as_posix() for path in ROOT.glob("[!.]*/**/__init__.py")}
    packaged = {
        name.removeprefix("scmmgpt").strip(".").replace(".", "/")
        for name in PYPROJECT["tool"]["setuptools"]["packages"]
    }
    assert folders == packaged - {""}


TRAIN_COMMANDS = [
    name
    for name, module in train_main.COMMANDS.items()
    if (ROOT / "train" / f"{module.replace('.', '/')}.py").exists()
]
EVAL_COMMANDS = [name for name in eval_main.COMMANDS if (ROOT / "eval" / f"{name}.py").exists()]
PAGES = [ROOT / "README.md", ROOT / "SKILL.md", *sorted((ROOT / "docs").rglob("*.md"))]
CONFIGS = sorted((ROOT / "train" / "configs").glob("*.yaml"))
# What a configuration leaves to the command line: the paths.
PATHS = {
    "align": ["--corpus", "corpus"],
    "tune": ["--corpus", "corpus", "--aligned", "aligned"],
    "reinforce": ["--corpus", "corpus", "--checkpoint", "tuned"],
}


@pytest.mark.parametrize(
    ("name", "main", "command"),
    [("python -m scmmgpt.train", train_main.main, command) for command in TRAIN_COMMANDS]
    + [("python -m scmmgpt.eval", eval_main.main, command) for command in EVAL_COMMANDS]
    + [("scmmgpt", scmmgpt_main.main, command) for command in COMMANDS],
)
def test_every_command_has_help(name, main, command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"usage: {name} {command}" in capsys.readouterr().out


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_configuration_is_understood_by_its_command(path, tmp_path):
    command = path.stem.split("_")[0]
    module = importlib.import_module(f"scmmgpt.train.{train_main.COMMANDS[command]}")
    paths = [*PATHS.get(command, ["--corpus", "corpus"]), "--output_dir", str(tmp_path)] if command != "plan" else []
    module.make_parser().parse_args_and_config(["--config", str(path), *paths])


def documented_commands(path):
    """Commands of a page: the lines of its bash blocks, code that begins a row of a table, tasks of evaluation."""
    text = path.read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    lines += re.findall(r"^\| `([^`]*)` \|", text, flags=re.MULTILINE)
    lines += [line for line in re.findall(r"`(python -m scmmgpt\.eval [^`]* --[^`]*)`", text) if "..." not in line]
    lines = [line.removeprefix(".venv/bin/") for line in lines]
    return [line for line in lines if re.match(r"(scmmgpt|python -m scmmgpt\.(train|eval)) \w", line)]


class Understood(Exception):
    """A command line was parsed."""


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_documented_commands_are_understood(path, monkeypatch):
    parse_args = argparse.ArgumentParser.parse_args

    def parse_only(parser, *words):
        raise Understood(parse_args(parser, *words))

    for line in documented_commands(path):
        words = shlex.split(line, comments=True)
        if "--help" in words:
            continue
        if words[0] == "scmmgpt":
            assert scmmgpt_main.make_parser().parse_args(words[1:])
        elif words[2] == "scmmgpt.eval":
            task = import_or_skip(f"scmmgpt.eval.{words[3]}")
            monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
            with pytest.raises(Understood):
                task.main(words[4:])
            monkeypatch.undo()
        else:
            module = importlib.import_module(f"scmmgpt.train.{train_main.COMMANDS[words[3]]}")
            parser, arguments = module.make_parser(), words[4:]
            if "--config" in arguments:
                arguments[arguments.index("--config") + 1] = str(ROOT / arguments[arguments.index("--config") + 1])
            parse = getattr(parser, "parse_args_and_config", parser.parse_args)
            assert parse(arguments)


def test_the_readme_documents_commands():
    assert len(documented_commands(ROOT / "README.md")) > 5


def test_links_between_pages_lead_somewhere():
    for path in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


@pytest.mark.parametrize("path", METRICS, ids=lambda path: path.name)
def test_a_metric_file_is_named_like_its_folder(path):
    # What `evaluate.load` demands of a local metric.
    assert path.stem == path.parent.name


def test_changelog_names_the_version_or_is_unreleased():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in text or f"## [{PYPROJECT['project']['version']}]" in text
