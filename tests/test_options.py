"""Options of the training commands: few, described once, and refused where they mean nothing."""

import dataclasses
import importlib
from pathlib import Path

import pytest

from scmmgpt.configuration_scmmgpt import ScGPTConfig
from scmmgpt.train import __main__ as train_main
from scmmgpt.train import options
from scmmgpt.train.arguments import AlignModelArguments, FinetuneModelArguments, TuneModelArguments


PATHS = {
    "pretrain": ["--corpus", "corpus"],
    "align": ["--corpus", "corpus", "--bert", "bert"],
    "tune": ["--corpus", "corpus", "--aligned", "aligned", "--language_model", "scratch"],
    "reinforce": ["--corpus", "corpus", "--checkpoint", "tuned"],
    "finetune": ["--adata", "cells.h5ad", "--label_key", "label"],
}


def parse(command, folder, *words):
    parser = importlib.import_module(f"scmmgpt.train.{command}").make_parser()
    return parser.parse_args_and_config([*PATHS[command], "--output_dir", str(folder), *words])


@pytest.mark.parametrize("command", PATHS)
def test_a_training_command_has_at_most_fifteen_options_of_ours_and_describes_each(command):
    parser = importlib.import_module(f"scmmgpt.train.{command}").make_parser()
    own = [item for cls in parser.dataclass_types for item in options.own_options(cls)]
    assert 5 < len(own) <= 15
    assert all(item.metadata["help"].endswith(".") for item in own)
    for cls in parser.dataclass_types:
        for item in options.own_options(cls):
            if cls.__doc__.count("Args:") == 1:
                assert f"    {item.name}: {item.metadata['help']}" in cls.__doc__


@pytest.mark.parametrize("command", [*PATHS, "plan"])
def test_help_fits_two_screens_and_help_all_has_the_rest(command, capsys):
    shown = []
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as stop:
            train_main.main([command, flag])
        assert stop.value.code == 0
        shown.append(capsys.readouterr().out)
    assert len(shown[0].splitlines()) <= 64
    if command != "plan":
        assert "--output_dir" in shown[0]
        assert "--lr_scheduler_type" in shown[1].replace(shown[0], "")
        assert "--lr_scheduler_type" not in shown[0]


def test_the_page_of_options_is_current():
    page = Path(options.__file__).parents[1] / "docs" / "options.md"
    renew = "renew it by `python -m scmmgpt.train options > docs/options.md`"
    assert page.read_text(encoding="utf-8") == options.options_page(), renew


@pytest.mark.parametrize(
    ("command", "words", "hint"),
    [
        ("align", ["--cell_config", "hiden_size=64"], "did you mean 'hidden_size'?"),
        ("align", ["--cell_config", '{"hiden_size": 64}'], "did you mean 'hidden_size'?"),
        ("align", ["--qformer_config", "num_layers=1"], "did you mean 'num_hidden_layers'?"),
        ("align", ["--model_config", "expression_head=nb"], "has no field 'expression_head'"),
        ("align", ["--cell_config", "[1]"], "neither a JSON object"),
        ("pretrain", ["--cell_config", "n_bin=5"], "did you mean 'n_bins'?"),
        ("tune", ["--lora_config", "lora_rank=8"], "did you mean"),
        ("tune", ["--language_model_config", "hidden_sizes=8"], "did you mean 'hidden_size'?"),
        (
            "tune",
            ["--model_config", '{"text_to_cell_config": {"num_layers": 1}}'],
            "did you mean 'num_hidden_layers'?",
        ),
        ("tune", ["--train_parts", "language_model=qlora"], "not one of ('lora', 'full', 'frozen')"),
        ("tune", ["--train_parts", "cells=full"], "has no field 'cells'"),
        ("finetune", ["--new_model", '{"cell_config": {"hiden_size": 64}}'], "did you mean 'hidden_size'?"),
        ("finetune", ["--new_model", "bert_layers=1"], "has no field 'bert_layers'"),
        ("finetune", ["--cell_config", "{}"], "is a field of new_model"),
        ("align", ["--corpse", "there"], "did you mean 'corpus'?"),
    ],
)
def test_what_is_no_option_is_refused_with_its_place(command, words, hint, tmp_path, capsys):
    assert train_main.main([command, *PATHS[command], "--output_dir", str(tmp_path), *words]) == 2
    message = capsys.readouterr().err
    assert hint in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        (None, "There is no --config file"),
        ("cell_config: {hidden_size: 64", "is not YAML"),
        ("- corpus", "must contain a YAML mapping"),
        ("matching_weight: 0", "is a field of model_config"),
        ("qformer_config: {cross_attention: 1}", "did you mean 'cross_attention_frequency'?"),
        ("cell_config: {hiden_size: 64}", "did you mean 'hidden_size'?"),
        ("corpse: there", "did you mean 'corpus'?"),
        ("cell_model: none\nstandardise_projections: true", "did you mean 'standardize_projections'?"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_one_line_and_exit_status_2(text, hint, tmp_path, capsys):
    path = tmp_path / "align.yaml"
    if text is not None:
        path.write_text(text)
    words = ["align", "--config", str(path), *PATHS["align"], "--output_dir", str(tmp_path / "out")]
    assert train_main.main(words) == 2
    message = capsys.readouterr().err
    assert hint in message
    assert message.count("\n") == 1
    assert train_main.main(["align", "--config"]) == 2


def test_fields_of_the_command_line_leave_those_of_the_file_and_those_leave_the_defaults(tmp_path):
    path = tmp_path / "tune.yaml"
    path.write_text("model_config: {num_condition_tokens: 4, language_weight: 2}\nlora_config: {r: 4}\n")
    words = [
        "--config",
        str(path),
        "--model_config",
        "language_weight=3",
        "--model_config",
        '{"expression_weight": 5}',
    ]
    _, model_args, _ = parse("tune", tmp_path, *words)
    assert model_args.model_config == {
        "expression_head": "nb",
        "num_state_components": 32,
        "num_condition_tokens": 4,
        "language_weight": 3,
        "expression_weight": 5,
    }
    assert model_args.lora_config == {"r": 4, "lora_alpha": 32, "lora_dropout": 0.1}


def test_a_new_model_of_finetune_keeps_the_defaults_that_are_not_named(tmp_path):
    _, model_args, _ = parse("finetune", tmp_path, "--new_model", '{"cell_config": {"hidden_size": 32}}')
    arguments, defaults = model_args.align_arguments(), FinetuneModelArguments().align_arguments()
    assert arguments.cell_config == defaults.cell_config | {"hidden_size": 32}
    assert (arguments.value_mode, arguments.bert) == ("log1p", model_args.bert)


def test_a_language_model_from_scratch_is_small_whatever_is_not_named():
    sizes = TuneModelArguments("", "scratch", {"hidden_size": 64}).language_model_config
    assert sizes["hidden_size"] == 64
    assert sizes["num_hidden_layers"] * sizes["intermediate_size"] < 1000


def test_two_models_do_not_share_their_mappings():
    first, second = AlignModelArguments(bert=""), AlignModelArguments(bert="")
    first.cell_config["hidden_size"] = 1
    assert second.cell_config == {}


def test_every_field_that_is_accepted_is_one_of_the_configuration():
    options.check_fields("cell_config", {item.name: None for item in dataclasses.fields(ScGPTConfig)}, ScGPTConfig)
    with pytest.raises(ValueError, match="no field 'hiden_size'"):
        AlignModelArguments(bert="", cell_config={"hiden_size": 64})
