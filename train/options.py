"""Options of the training commands. Each option is described once, in the definition of its field.

`--help`, the documentation of the classes and `docs/options.md` are generated from these descriptions. `--help` shows
the options of this project; `--help-all` adds the options of transformers and TRL.

`python -m scmmgpt.train options > docs/options.md` regenerates the page.
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
from typing import Any, NoReturn, TypeAlias, TypeVar, cast

import yaml
from transformers import TrainingArguments
from trl import GRPOConfig, SFTConfig, TrlParser

from scmmgpt.commands.errors import OneLineParser, first_paragraphs


T = TypeVar("T")
Fields: TypeAlias = type | Sequence[str]  # a configuration class, or the names of some of its fields

PARENTS = (SFTConfig, GRPOConfig, TrainingArguments)  # our commands also accept the options of these classes
INHERITED = {item.name: item for cls in reversed(PARENTS) for item in dataclasses.fields(cls)}
OLDER_FIELDS = {"model_type", "rope_theta", "rope_scaling", "torch_dtype"}  # transformers still reads these fields
PAGE = """# Options of the training commands

`python -m scmmgpt.train options` generates this page. The command line overrides `--config FILE.yaml`. An option that
holds fields takes a mapping in YAML, and JSON or `FIELD=VALUE ...` on the command line; fields that the command line
does not name keep the values of the file. All options of transformers' `TrainingArguments` (for `tune`, of TRL's
`SFTConfig`, and for `reinforce`, of `GRPOConfig`) are accepted, too.
"""


def option(description: str, default: Any = MISSING, *, fields: Fields | None = None) -> Any:
    """Define a dataclass field with its description, the text of `--help`, of the class and of `docs/options.md`.

    The default `MISSING` makes the option required. `fields` are the allowed keys of an option that is a mapping.
    """
    metadata = {"help": description} | ({} if fields is None else {"fields": fields})
    if isinstance(default, (dict, list)):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def inherited(name: str, default: Any) -> Any:
    """Define an option of transformers or TRL again, with another default."""
    return dataclasses.field(default=default, metadata=dict(INHERITED[name].metadata))


def shared(cls: Any, name: str) -> Any:
    """Reuse the option `name` of another command's dataclass."""
    return copy.copy(cls.__dataclass_fields__[name])


def own_options(cls: Any) -> list[Field]:
    """List the fields of a dataclass that are options of this project, not of transformers or TRL."""
    theirs = INHERITED if issubclass(cls, TrainingArguments) else {}
    return [item for item in dataclasses.fields(cls) if item.init and item.name not in theirs]


def default_of(item: Field) -> Any:
    """Default of a field; `MISSING` if the option is required."""
    return item.default if item.default_factory is MISSING else item.default_factory()


def described(cls: type[T]) -> type[T]:
    """Add the descriptions of a dataclass's options to its documentation."""
    lines = [f"    {item.name}: {item.metadata['help']}" for item in own_options(cls)]
    cls.__doc__ = "\n".join([(cls.__doc__ or "").rstrip(), "", "Args:", *lines])
    return cls


def parse_fields(name: str, value: Any) -> dict[str, Any]:
    """Parse an option that is a mapping: a mapping from YAML, or words that are JSON objects or `FIELD=VALUE`.

    >>> parse_fields("cell_config", ["hidden_size=64", '{"n_bins": 51}'])
    {'hidden_size': 64, 'n_bins': 51}
    """
    if value is None or isinstance(value, Mapping):
        return dict(value or {})
    result: dict[str, Any] = {}
    for word in [value] if isinstance(value, str) else value:
        key, equals, text = str(word).partition("=")
        is_pair = equals and not key.lstrip().startswith("{")
        fields = {key: parse_value(text)} if is_pair else parse_value(str(word))
        if not isinstance(fields, Mapping):
            raise ValueError(f"{name} is neither a JSON object nor FIELD=VALUE: {word!r}.")
        result |= fields
    return result


def parse_value(text: str) -> Any:
    """Parse a value as JSON; text that is not JSON is a string."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def field_names(fields: Fields) -> list[str]:
    """Names of the keys that an option may set."""
    return [item.name for item in dataclasses.fields(fields)] if isinstance(fields, type) else list(fields)


def check_fields(name: str, value: Mapping[str, Any], fields: Fields) -> None:
    """Refuse a key that is not a field, because configuration classes of transformers silently keep such a key."""
    known = field_names(fields)
    accepted = {*OLDER_FIELDS, *(getattr(fields, "attribute_map", None) or {})} if isinstance(fields, type) else ()
    for key in value:
        if key not in known and key not in accepted:
            raise ValueError(f"{name} has no field {key!r}; {suggest(key, known)}")


def suggest(name: str, known: Sequence[str]) -> str:
    """Suggest the nearest known name; without a near name, list all names if there are at most 20."""
    if nearest := difflib.get_close_matches(name, known, n=1):
        return f"did you mean {nearest[0]!r}?"
    return f"there are {', '.join(known)}." if len(known) <= 20 else "no option has a similar name."


class CheckedFields:
    """Base class that parses and checks the mappings of a dataclass; keys that are not given keep their defaults."""

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            if "fields" in item.metadata:
                value = parse_fields(item.name, getattr(self, item.name))
                if item.metadata["fields"]:  # an option with `fields=()` is checked by its own dataclass
                    check_fields(item.name, value, item.metadata["fields"])
                setattr(self, item.name, default_of(item) | value)


class MergeFields(argparse.Action):
    """Set the given keys of a mapping; other keys of the `--config` file keep their values."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        """Merge one use of the option."""
        before = parse_fields(self.dest, getattr(namespace, self.dest))
        setattr(namespace, self.dest, before | parse_fields(self.dest, values))


class OptionFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with one spelling of each option, and its default."""

    def __init__(self, prog: str, **kwargs: Any) -> None:
        super().__init__(prog, max_help_position=34, width=119)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return f"{action.option_strings[0]} {self._format_args(action, 'VALUE')}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.required:
            return f"{action.help} Required."
        return action.help if action.default in (None, {}, []) else super()._get_help_string(action)


class OptionParser(TrlParser):
    """`TrlParser` whose help shows the options of this project, and whose errors are one line."""

    def __init__(self, dataclass_types: Sequence[Any], **kwargs: Any) -> None:
        usage = "%(prog)s [--config FILE.yaml] [--OPTION VALUE ...]"
        super().__init__(dataclass_types, usage=usage, formatter_class=OptionFormatter, **kwargs)

    @staticmethod
    def _parse_dataclass_field(parser: argparse.ArgumentParser, field: Field) -> None:
        if "fields" in field.metadata:
            spellings = f"--{field.name}", f"--{field.name.replace('_', '-')}"
            settings = {"default": default_of(field), "help": field.metadata["help"], "metavar": "FIELD=VALUE"}
            parser.add_argument(*spellings, action=MergeFields, nargs="+", **settings)
        else:
            TrlParser._parse_dataclass_field(parser, field)

    def error(self, message: str) -> NoReturn:
        """Exit with the message and a pointer to `--help`, without the usage."""
        OneLineParser.error(cast(OneLineParser, self), message)

    def format_help(self) -> str:
        """Format the help of the options of this project, and of `output_dir`."""
        shown = {"output_dir", *(item.name for cls in self.dataclass_types for item in own_options(cls))}
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, [])
        formatter.add_text(first_paragraphs(self.description or ""))
        formatter.start_section("options (--help-all: those of transformers and TRL too)")
        # transformers adds `--no_NAME` to a switch, with the help of the switch; `--NAME False` does the same.
        ours = (action for action in self._actions if action.dest in shown)
        formatter.add_arguments(action for action in ours if not action.option_strings[0].startswith("--no_"))
        formatter.end_section()
        return formatter.format_help()

    def parse_args_and_config(  # type: ignore[override]  # the rest passes through
        self, args: Iterable[str] | None = None, **kwargs: Any
    ) -> tuple[Any, ...]:
        """Parse as `TrlParser` does, after a check of all names and of the `--config` file."""
        words = list(sys.argv[1:] if args is None else args)
        if "--help-all" in words:
            sys.stdout.write(super().format_help())
            self.exit()
        if words[-1:] == ["--config"]:
            raise ValueError("--config has no value; name a YAML file.")
        for word in words:
            name = word.removeprefix("--").partition("=")[0]
            spellings = (spelling for spelling in self._option_string_actions if spelling.startswith(f"--{name}"))
            if word.startswith("--") and name not in ("", "config") and not any(spellings):
                self.check_name(name.replace("-", "_"), "The command line")
        try:
            return super().parse_args_and_config(args=words, **kwargs)
        except FileNotFoundError as error:
            raise ValueError(f"There is no --config file {error.filename}.") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"The --config file is not YAML: {' '.join(str(error).split())}") from None

    def set_defaults_with_config(self, **kwargs: Any) -> list[str]:
        """Set the defaults as `TrlParser` does, after a check of the names in the `--config` file."""
        for name in kwargs:
            self.check_name(name, "The --config file")
        return super().set_defaults_with_config(**kwargs)

    def check_name(self, name: str, place: str) -> None:
        """Refuse an unknown option; suggest the option that has a key of this name, or the nearest name."""
        known = [action.dest for action in self._actions]
        if name in known:
            return
        options = [item for cls in self.dataclass_types for item in own_options(cls)]
        holders = [item.name for item in options if name in field_names(item.metadata.get("fields", ()))]
        hint = f"it is a field of {holders[0]}." if holders else suggest(name, known)
        raise ValueError(f"{place} has an unknown option {name!r}: {hint}")


def table_of(parser: OptionParser) -> Iterable[str]:
    """Lines of Markdown: option, default, description; then the defaults that differ from transformers'."""
    yield from ("| option | default | |", "| --- | --- | --- |")
    for item in (item for cls in parser.dataclass_types for item in own_options(cls)):
        default = default_of(item)
        shown = "required" if default is MISSING else "" if default in (None, {}, []) else f"`{default}`"
        yield f"| `{item.name}` | {shown} | {item.metadata['help']} |"
    for cls in (cls for cls in parser.dataclass_types if issubclass(cls, TrainingArguments)):
        parent = next(parent for parent in PARENTS if issubclass(cls, parent))
        theirs = {item.name: default_of(item) for item in dataclasses.fields(parent)}
        ours = {item.name: default_of(item) for item in dataclasses.fields(cls) if item.name in theirs}
        changed = [f"`{name}` {value}" for name, value in ours.items() if value != theirs[name]]
        yield from ("", f"Other defaults than those of `{parent.__name__}`: {', '.join(changed)}.")


def options_page() -> str:
    """Return the text of `docs/options.md`."""
    lines = [PAGE.rstrip()]
    for command in ("pretrain", "align", "tune", "reinforce", "finetune", "plan"):
        parser = importlib.import_module(f"scmmgpt.train.{command}").make_parser()
        lines += ["", f"## {command}", "", *table_of(parser)]
    return "\n".join(lines) + "\n"


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line, which has no options."""
    return argparse.ArgumentParser(prog=prog, description=__doc__)


def main(args: argparse.Namespace) -> None:
    """Write the page to the standard output."""
    sys.stdout.write(options_page())
