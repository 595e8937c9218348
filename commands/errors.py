"""Errors of commands: every exception becomes one line on stderr.

Every command runs its work by `run_command`. The checks of this package raise `ValueError`, `TypeError`, `OSError` or
`ImportError`, whose message is printed. For any other exception, the line names its type and the input files of the
command. `--debug` shows the traceback.
"""

import argparse
import contextlib
import difflib
import errno
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn


FAILED, STOPPED, TERMINATED = 2, 130, 128 + signal.SIGTERM  # exit codes
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SHOWN_CHARACTERS = 200  # most characters of a library's message
LITTLE_SPACE = 2**20  # bytes; a disk with less free space counts as full
# Messages of libraries that run out of memory and raise a `RuntimeError` instead of a `MemoryError`.
NO_MEMORY = re.compile(r"out of memory|can't allocate memory|cannot allocate|unable to allocate|bad_alloc", re.I)
NO_SPACE = re.compile(r"no space left|disk quota exceeded|os error 28|errno = 28|file too large", re.I)
# Arguments in messages of the library that are options of a command.
OPTIONS = (
    *("layer", "assume", "gene_column", "organism", "force"),
    *("min_score", "error_rate", "labels", "tissue", "proof"),
)
REWORDINGS: list[Callable[[str], str]] = []  # applied to all messages, for example to show addresses instead of copies
DEBUG = "; `--debug` shows where it happened"  # hint for command lines only
CHECKED = (ValueError, TypeError, OSError, ImportError)  # types that the checks of this package raise
# Module -> name of its distribution, for errors about missing packages.
DISTRIBUTIONS = {
    "yaml": "pyyaml",
    "sklearn": "scikit-learn",
    "ot": "POT",
    "umap": "umap-learn",
    "rouge_score": "rouge-score",
}


class OneLineParser(argparse.ArgumentParser):
    """Argument parser with errors of one line and a short help; `--help-all` shows the whole help.

    Args:
        rare: Names of options that only `--help-all` shows.
    """

    def __init__(self, *args: Any, rare: Iterable[str] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rare = set(rare)
        self.words: list[str] = []  # of the command line
        text = "show every option and the whole description"
        self.add_argument("--help-all", action=HelpAll, nargs=0, default=argparse.SUPPRESS, help=text)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuse an unknown command, and suggest a similar one."""
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            near = difflib.get_close_matches(value, action.choices, n=1)
            raise argparse.ArgumentError(
                None, f"there is no command {value!r}{f', do you mean {near[0]!r}?' if near else ''}"
            )
        super()._check_value(action, value)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse; an error then knows whether `--json` was given."""
        self.words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Exit with the message and the way to the help, without the usage."""
        text = f"{' '.join(message.split())} (`{self.prog} --help` lists the options)"
        if "--json" in self.words:
            write_error(text)
        self.exit(FAILED, f"{self.prog}: {text}\n")

    def format_help(self, everything: bool = False) -> str:
        """Format a short usage, the first paragraphs of the description, and the options that are not rare."""
        formatter = self._get_formatter()
        shown = [action for action in self._actions if everything or action.dest not in self.rare]
        needed = [f"{action.option_strings[0]} {self._metavar(action)}" for action in shown if self._is_needed(action)]
        places = [self._metavar(action) for action in shown if not action.option_strings]
        usage = " ".join(["%(prog)s", *places, *needed, "[OPTIONS]"]).replace("%(prog)s", self.prog).replace("%", "%%")
        formatter.add_usage(usage, self._actions, [])
        formatter.add_text(self.description if everything else first_paragraphs(self.description or ""))
        for group in self._action_groups:
            formatter.start_section(group.title)
            formatter.add_text(group.description)
            formatter.add_arguments([action for action in group._group_actions if action in shown])
            formatter.end_section()
        return formatter.format_help()

    @staticmethod
    def _is_needed(action: argparse.Action) -> bool:
        return action.required and bool(action.option_strings)

    @staticmethod
    def _metavar(action: argparse.Action) -> str:
        name = action.metavar or (action.dest if not action.option_strings else action.dest.upper())
        name = name if isinstance(name, str) else " ".join(name)
        return f"[{name} ...]" if action.nargs == "*" else name


class HelpAll(argparse.Action):
    """Print the whole help."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        """Print it and exit."""
        sys.stdout.write(parser.format_help(everything=True) if isinstance(parser, OneLineParser) else "")
        parser.exit()


class PrintCompletion(argparse.Action):
    """Print the script by which a shell completes commands, options and paths."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: object, shell: Any, *_: object) -> None:
        """Print it and exit."""
        try:
            import shtab

            from scmmgpt.commands.completion import completes
        except ModuleNotFoundError:
            parser.error("shtab is not installed. Install `scmmgpt[completion]`.")
        subs = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        for one in (parser, *(child for sub in subs for child in sub.choices.values())):
            for action in one._actions:
                if action.metavar == "FOLDER" or action.dest == "model":
                    action.complete = shtab.DIR  # shtab reads this attribute
                elif action.type is Path:
                    action.complete = shtab.FILE
                elif shell == "bash" and (function := completes(action.dest)) is not None:
                    action.complete = function
        sys.stdout.write(shtab.complete(parser, shell) + "\n")
        parser.exit()


class PrintVersion(argparse.Action):
    """Print the version of this package."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        """Print it and exit."""
        from importlib.metadata import version

        sys.stdout.write(f"{parser.prog} {version('scmmgpt')}\n")
        parser.exit()


def first_paragraphs(text: str) -> str:
    """First two paragraphs of a description: the summary and the examples."""
    return "\n\n".join(text.split("\n\n")[:2])


def number(kind: type, least: float, most: float = math.inf, *, above: bool = False) -> Callable[[str], Any]:
    """Make the `type` of a numeric option with values from `least` (exclusive with `above`) to `most`."""
    what = "a whole number" if kind is int else "a number"
    if above:
        text = f"{what} above {least:g}"
    else:
        text = f"{what} of at least {least:g}" if most == math.inf else f"{what} from {least:g} to {most:g}"

    def parse(word: str) -> Any:
        try:
            value = kind(word)
        except ValueError:
            value = math.nan
        if not least <= value <= most or above and value == least or value == math.inf:
            raise argparse.ArgumentTypeError(f"{word!r} is not {text}")
        return value

    return parse


class Terminated(KeyboardInterrupt):
    """SIGTERM, which schedulers, containers and `kill` send to end a process."""


@contextlib.contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Let SIGTERM stop a command as Ctrl-C does, so that temporary files are removed and workers end.

    A second SIGTERM ends the process at once. Copies of the process by `fork` end at once, too.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    owner = os.getpid()

    def stop(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() != owner:
            signal.raise_signal(number)
        raise Terminated

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def run_command(
    name: str,
    work: Callable[[], int | None],
    *,
    debug: bool = False,
    as_json: bool = False,
    inputs: Iterable[Any] = (),
    outputs: Iterable[Any] = (),
    extra: str = "train",
) -> int:
    """Run a command and return its exit status; every error is one line on stderr that starts with `name`.

    Args:
        debug: Raise errors, for their traceback.
        as_json: Write errors to stdout too, as [`write_error`] does.
        inputs: Files that the command was given; named by errors that no check foresaw.
        outputs: Files and folders that it writes, to recognise a full disk by.
        extra: Extra of this package that installs a missing module.
    """
    OPTION_WORDS.said.clear()
    handlers = [handler for handler in (*logging.getLogger().handlers, logging.lastResort) if handler is not None]
    for handler in handlers:
        handler.addFilter(OPTION_WORDS)
    try:
        with stopped_by_sigterm():
            return work() or 0
    except KeyboardInterrupt as stop:
        sys.stderr.write(f"{name}: stopped.\n")
        return TERMINATED if isinstance(stop, Terminated) else STOPPED
    except SystemExit:
        raise
    except BaseException as error:  # panics of Rust libraries are not `Exception`
        if debug:
            raise
        said = as_options(explain(error, inputs, outputs, extra), can_force=not name.startswith("scmmgpt.train"))
        sys.stderr.write(reworded(f"{name}: {said}\n"))
        if as_json:
            write_error(said)
        return FAILED
    finally:
        for handler in handlers:
            handler.removeFilter(OPTION_WORDS)


def write_error(text: str, **found: Any) -> None:
    """Write an error to stdout as the JSON that a program reads there in place of a result."""
    sys.stdout.write(json.dumps({**found, "error": reworded(text)}) + "\n")


def as_options(text: str, *, can_force: bool = True) -> str:
    """Replace arguments in a message of the library by options of the command line.

    Without `can_force`, for commands without `--force`, the sentence about `force=True` is removed.

    >>> as_options("Pass `layer=`, `assume='normalized'` or `force=True`.")
    'Pass `--layer`, `--assume normalized` or `--force`.'
    >>> as_options("layer='counts' is not in the data.")
    '--layer counts is not in the data.'
    """
    names = "|".join(OPTIONS)

    def option(found: re.Match) -> str:
        value = "" if found[2] == "True" else found[2].strip("'\"")
        return f"`--{found[1].replace('_', '-')}{' ' if value else ''}{value}`"

    text = text if can_force else re.sub(r" Or pass `force=True`[^.]*\.", "", text)
    text = re.sub(rf"`({names})=([^`]*)`", option, text)
    return re.sub(rf"(?<![\w.])({names})=('[^']*'|[\d.]*\d)", lambda found: option(found).strip("`"), text)


def reworded(text: str) -> str:
    """Apply all `REWORDINGS` to a text."""
    for change in REWORDINGS:
        text = change(text)
    return text


class _OptionWords(logging.Filter):
    """Log filter that turns arguments into options (see [`as_options`]) and drops repeated warnings.

    Within [`naming`], a warning begins with the path, so that the same warning appears once for each file.
    """

    def __init__(self) -> None:
        super().__init__()
        self.said: set[str] = set()
        self.path: Any = None

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name.startswith("scmmgpt"):
            record.msg, record.args = reworded(as_options(record.getMessage())), None
            if "is_repeated" not in vars(record):  # each handler passes the record through this filter
                if self.path is not None and record.levelno == logging.WARNING:
                    record.msg = f"{self.path}: {record.msg}"
                vars(record)["is_repeated"] = record.levelno == logging.WARNING and record.msg in self.said
                self.said.add(record.msg)
            return not vars(record)["is_repeated"]
        return True


OPTION_WORDS = _OptionWords()


@contextlib.contextmanager
def naming(path: Any) -> Iterator[None]:
    """Prefix the warnings of a command with the path of one of several files; None adds no prefix."""
    OPTION_WORDS.path = path
    try:
        yield
    finally:
        OPTION_WORDS.path = None


def explain(
    error: BaseException, inputs: Iterable[Any] = (), outputs: Iterable[Any] = (), extra: str = "train"
) -> str:
    """Turn an error into a message of one line; notes of the error (`add_note`) come last."""
    return " ".join([_explained(error, inputs, outputs, extra), *getattr(error, "__notes__", ())])


def _explained(error: BaseException, inputs: Iterable[Any], outputs: Iterable[Any], extra: str) -> str:
    text, kind = " ".join(str(error).split()), type(error).__name__
    if isinstance(error, ModuleNotFoundError) and error.name and text.startswith(("No module", "import of")):
        module = error.name.partition(".")[0]
        return f"{DISTRIBUTIONS.get(module, module)} is not installed. Install `scmmgpt[{extra}]`."
    if full := full_disk(error, text, outputs):
        return full
    if isinstance(error, MemoryError) or NO_MEMORY.search(text):
        return (
            f"Memory ran out ({shortened(text) or kind}). Lower the batch size, or take fewer cells or genes at once."
        )
    if isinstance(error, CHECKED) and text:
        return text
    given = ", ".join(str(path) for path in inputs if path is not None)
    return (
        f"{given or 'The input'} cannot be used: its content does not fit any known format ({kind}: "
        f"{shortened(text) or 'no message'}). Write or copy it again{DEBUG}."
    )


def full_disk(error: BaseException, text: str, outputs: Iterable[Any]) -> str | None:
    """Message of a full disk, or None; libraries wrap errors of full disks in many types."""
    is_full = isinstance(error, OSError) and error.errno in DISK_FULL or NO_SPACE.search(text)
    frees = [(shutil.disk_usage(existing_parent(Path(path))).free, path) for path in outputs]
    if frees:
        free, path = min(frees, key=lambda pair: pair[0])  # a table may be on another disk than the cells
        if is_full or free < LITTLE_SPACE and not isinstance(error, CHECKED):
            if "bytes are free" in text:  # `prepare` has a more detailed message
                return text
            return f"No space left on device: {path} needs more than the {free:,} bytes that are free. Make room."
    return f"No space left on device ({shortened(text)}). Make room." if is_full else None


def existing_parent(path: Path) -> Path:
    """Nearest existing parent folder of a path."""
    path = path.absolute()
    while not path.is_dir():
        path = path.parent
    return path


def shortened(text: str) -> str:
    """The first `SHOWN_CHARACTERS` of a text."""
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + " ..."


def take_debug(words: list[str]) -> tuple[list[str], bool]:
    """Remove a bare `--debug` from a command line; return the words, and whether `--debug` was there.

    `--debug underflow_overflow` is an option of transformers and is kept.
    """
    for i, word in enumerate(words):
        if word == "--debug" and (i + 1 == len(words) or words[i + 1].startswith("-")):
            return words[:i] + words[i + 1 :], True
    return words, False
