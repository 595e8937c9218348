"""Options of the training commands: each is described once, where its field is defined.

`--help`, the documentation of the classes and `docs/options.md` are made from these descriptions. `--help` shows the
options of this project; `--help-all` adds those of transformers and TRL.

`python -m scmmgpt.train options > docs/options.md` renews the page.
"""

import argparse
import copy
import dataclasses
import difflib
import importlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from transformers import TrainingArguments
from trl import SFTConfig, TrlParser


T = TypeVar("T")
INHERITED = {item.name: item for item in dataclasses.fields(SFTConfig)}
COMMANDS = ("pretrain", "align", "tune", "finetune", "plan")
OLDER_FIELDS = {"model_type", "rope_theta", "rope_scaling", "torch_dtype"}  # of config.json files, still understood
# Former option -> where its value belongs now, or why it has no place.
MOVED = {
    "bert_layers": "is now num_hidden_layers of qformer_config",
    "qformer_dropout": "is now hidden_dropout_prob of qformer_config",
    "cross_attention_frequency": "is now a field of qformer_config",
    "text_to_cell_layers": "is now num_hidden_layers of model_config's text_to_cell_config",
    "lora_rank": "is now r of lora_config",
    **dict.fromkeys(("lora_alpha", "lora_dropout"), "is now a field of lora_config"),
    **{f"train_{part}": f"is now {part} of train_parts" for part in ("language_model", "cell_model", "qformer")},
    **dict.fromkeys(
        "num_query_tokens projection_dim text_pooling contrastive_weight matching_weight captioning_weight "
        "cell_pretraining_weight matching_batch_size contrastive_group_size expression_head num_condition_tokens "
        "language_weight expression_weight".split(),
        "is now a field of model_config",
    ),
    **dict.fromkeys(
        "cell_model cell_config qformer_config qformer_max_length model_config value_mode selection".split(),
        "is now a field of new_model",
    ),
    "max_genes": "is now a field of new_model in finetune, and that of the aligned checkpoint in tune",
    "ontology_temperature": "is gone, since soft targets brought nothing (train/LOG.md)",
    "gene_embeddings": "is gone: co-expression was the best start (train/LOG.md)",
    "bert_weights": "is gone: pretrained weights were the best start (train/LOG.md)",
    "unlabelled": "is gone: cells of other experiments brought nothing (train/LOG.md)",
    **{
        name: f"is always {value}"
        for name, value in (("balance_temperature", 2), ("mask_ratio", 0.4), ("patience", 2))
    },
}


def option(
    description: str, default: Any = MISSING, *, fields: type | Sequence[str] | None = None, hidden: bool = False
) -> Any:
    """A dataclass field and the only place of its description.

    Args:
        description: Shown by `--help`, in the class's documentation and in `docs/options.md`.
        default: Without one the option is required.
        fields: For an option that holds a mapping: the configuration class whose fields it may set, or their names.
        hidden: The field is no option of the command line.
    """
    metadata = {
        "help": description,
        **({"fields": fields} if fields is not None else {}),
        **({"hidden": True} if hidden else {}),
    }
    if isinstance(default, (dict, list)):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def inherited(name: str, default: Any) -> Any:
    """An option of transformers or TRL with another default."""
    return dataclasses.field(default=default, metadata=dict(INHERITED[name].metadata))


def own_options(cls: Any) -> list[Field]:
    """Fields of a dataclass that are options of this project."""
    usual = INHERITED if issubclass(cls, TrainingArguments) else {}
    return [item for item in dataclasses.fields(cls) if item.name not in usual and not item.metadata.get("hidden")]


def described(cls: type[T]) -> type[T]:
    """Add the descriptions of a dataclass's options to its documentation."""
    lines = [f"    {item.name}: {item.metadata['help']}" for item in own_options(cls)]
    cls.__doc__ = "\n".join([(cls.__doc__ or "").rstrip(), "", "Args:", *lines])
    return cls


def parse_fields(name: str, value: Any) -> dict[str, Any]:
    """A mapping from YAML as it is, or from words of the command line: a JSON object, or `FIELD=VALUE`.

    >>> parse_fields("cell_config", ["hidden_size=64", '{"n_bins": 51}'])
    {'hidden_size': 64, 'n_bins': 51}
    """
    if value is None or isinstance(value, Mapping):
        return dict(value or {})
    result: dict[str, Any] = {}
    for word in [value] if isinstance(value, str) else value:
        key, equals, text = str(word).partition("=")
        if equals and not key.lstrip().startswith("{"):
            try:
                result[key] = json.loads(text)
            except json.JSONDecodeError:
                result[key] = text  # a word needs no quotation marks
            continue
        try:
            result |= dict(json.loads(str(word)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} is no JSON object and no FIELD=VALUE: {word!r} ({error}).") from None
    return result


def check_fields(name: str, value: Mapping[str, Any], fields: type | Sequence[str]) -> None:
    """Refuse a key that is no field: configuration classes of transformers keep such a key in silence."""
    known, accepted = list(fields) if not isinstance(fields, type) else [], set()
    if isinstance(fields, type):
        known = [item.name for item in dataclasses.fields(fields)]
        accepted = {*OLDER_FIELDS, *(getattr(fields, "attribute_map", None) or {})}
    for key in value:
        if key not in accepted.union(known):
            raise ValueError(f"{name} has no field {key!r}; {suggest(key, known)}")


def suggest(name: str, known: Sequence[str]) -> str:
    """The known name that is nearest to another one, or all of a few."""
    nearest = difflib.get_close_matches(name, known, n=1)
    if nearest:
        return f"did you mean {nearest[0]!r}?"
    return f"there are {', '.join(known)}." if len(known) <= 20 else "nothing has a name like it."


class CheckedFields:
    """A dataclass that parses and checks its mappings; fields that are not given keep their defaults."""

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            if "fields" in item.metadata:
                value = parse_fields(item.name, getattr(self, item.name))
                if item.metadata["fields"]:  # of no class: the dataclass checks them itself
                    check_fields(item.name, value, item.metadata["fields"])
                assert item.default_factory is not MISSING
                setattr(self, item.name, item.default_factory() | value)


class MergeFields(argparse.Action):
    """Set the given fields of a mapping; the other fields of the `--config` file stay."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        """Merge one use of the option."""
        before = parse_fields(self.dest, getattr(namespace, self.dest))
        setattr(namespace, self.dest, before | parse_fields(self.dest, values))


class OptionFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """One spelling of an option, and its default where it has one."""

    def __init__(self, prog: str, **kwargs: Any) -> None:
        super().__init__(prog, max_help_position=34, width=119)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        values = "" if action.nargs == 0 else action.metavar or "VALUE"
        if action.choices is not None:
            values = "{" + ",".join(map(str, action.choices)) + "}"
        return f"{action.option_strings[0]} {values}{' ...' if action.nargs == '+' else ''}"

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.required:
            return f"{text} Required."
        return text if action.default in (None, {}, []) else super()._get_help_string(action) or text


class OptionParser(TrlParser):
    """`TrlParser` whose help shows the options of this project, and whose errors are one line."""

    def __init__(
        self, dataclass_types: Sequence[Any], prog: str | None = None, description: str | None = None
    ) -> None:
        usage = "%(prog)s [--config FILE.yaml] [--OPTION VALUE ...]"
        super().__init__(
            dataclass_types, prog=prog, description=description, usage=usage, formatter_class=OptionFormatter
        )
        self.own = {item.name for cls in dataclass_types for item in own_options(cls)}

    @staticmethod
    def _parse_dataclass_field(parser: argparse.ArgumentParser, field: Field) -> None:
        if field.metadata.get("hidden"):
            factory = field.default_factory
            parser.set_defaults(**{field.name: field.default if factory is MISSING else factory()})
        elif "fields" in field.metadata:
            assert field.default_factory is not MISSING
            settings = {"default": field.default_factory(), "help": field.metadata["help"], "metavar": "FIELD=VALUE"}
            spellings = f"--{field.name}", f"--{field.name.replace('_', '-')}"
            parser.add_argument(*spellings, action=MergeFields, nargs="+", **settings)
        else:
            TrlParser._parse_dataclass_field(parser, field)

    def format_help(self) -> str:
        """The options of this project and the folder that every run needs."""
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, [])
        formatter.add_text(self.description)
        formatter.start_section("options (--help-all: those of transformers and TRL too)")
        shown = {*self.own, "output_dir"}
        formatter.add_arguments(action for action in self._actions if action.dest in shown)
        formatter.end_section()
        return formatter.format_help()

    def parse_args_and_config(  # type: ignore[override]  # the rest passes through
        self, args: Iterable[str] | None = None, **kwargs: Any
    ) -> tuple[Any, ...]:
        """As `TrlParser`'s, after a check of the file and of all names.

        Raises:
            ValueError: If the file is no YAML mapping, or an option is unknown.
            FileNotFoundError: If there is no such file.
        """
        words = list(sys.argv[1:] if args is None else args)
        if "--help-all" in words:
            sys.stdout.write(super().format_help())
            self.exit()
        if "--config" in words:
            path = "".join(words[words.index("--config") + 1 :][:1])
            for name in read_yaml(path):
                self.check_name(name, path)
        for word in words:
            name = word.removeprefix("--").partition("=")[0]
            spellings = (spelling for spelling in self._option_string_actions if spelling.startswith(f"--{name}"))
            if word.startswith("--") and name not in ("", "config") and not any(spellings):
                self.check_name(name.replace("-", "_"), "the command line")
        return super().parse_args_and_config(args=words, **kwargs)

    def check_name(self, name: str, place: str) -> None:
        """Refuse a name that is no option, with its new place or the nearest name."""
        known = [action.dest for action in self._actions]
        if name not in known and name != "env":
            reason = f"it {MOVED[name]}." if name in MOVED else suggest(name, known)
            raise ValueError(f"{place} has an unknown option {name!r}: {reason}")


def read_yaml(path: str) -> dict[str, Any]:
    """The mapping in a YAML file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"--config: there is no file {path!r}.")
    try:
        document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise ValueError(f"{path} holds no YAML mapping of options to values.")
    return document


def table_of(parser: OptionParser) -> Iterable[str]:
    """Lines of Markdown: option, default, description; then the defaults that differ from transformers'."""
    yield from ("| option | default | |", "| --- | --- | --- |")
    for item in (item for cls in parser.dataclass_types for item in own_options(cls)):
        default = item.default if item.default_factory is MISSING else item.default_factory()
        shown = "required" if default is MISSING else "" if default in (None, {}, []) else f"`{default}`"
        yield f"| `{item.name}` | {shown} | {item.metadata['help']} |"
    parents = [item for base in (TrainingArguments, SFTConfig) for item in dataclasses.fields(base)]
    for cls in (cls for cls in parser.dataclass_types if issubclass(cls, TrainingArguments)):
        redefined = [item for item in dataclasses.fields(cls) if item.name in INHERITED and item not in parents]
        changed = [f"`{item.name}` {item.default}" for item in redefined if item.default is not MISSING]
        yield from ("", f"Other defaults than those of the parent class: {', '.join(changed)}.")


def options_page() -> str:
    """`docs/options.md`."""
    lines = [__doc__.split("\n", 1)[0].replace("Options", "# Options", 1).partition(":")[0], ""]
    lines += ["`python -m scmmgpt.train options` makes this page. Values come from `--config FILE.yaml` and from the"]
    lines += ["command line, which wins. An option that holds fields takes a mapping in YAML, and JSON or"]
    lines += ["`FIELD=VALUE ...` on the command line, which leaves the file's other fields as they are. Beside these"]
    lines += ["options stand those of transformers' `TrainingArguments` (for `tune`, of TRL's `SFTConfig`)."]
    for command in COMMANDS:
        parser = importlib.import_module(f"scmmgpt.train.{command}").make_parser()
        lines += ["", f"## {command}", "", *table_of(parser)]
    return "\n".join(lines) + "\n"


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line, which has no options."""
    return argparse.ArgumentParser(prog=prog, description=__doc__)


def main(args: argparse.Namespace) -> None:
    """Write the page to the standard output."""
    sys.stdout.write(options_page())
