"""Serve the commands to agents as tools of the Model Context Protocol, for the files of one folder.

A tool runs a command with `--json` in this process and returns its summary, with the warnings as `messages`. All paths
must be inside the user's folder, including links and external links of HDF5 files. No tool replaces a file. The user
chooses the checkpoint; no tool has an argument for it. Calls run one at a time. A client can request progress reports.
A cancelled call stops at the next batch and writes nothing.
"""

import contextlib
import inspect
import io
import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, get_type_hints

import anyio
import h5py
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import ToolAnnotations
from pydantic import Field, ValidationError

from scmmgpt.commands.checkpoints import find_checkpoint, root_checkpoint
from scmmgpt.commands.errors import OPTION_WORDS
from scmmgpt.commands.options import READ_HELP
from scmmgpt.readers.disk_checks import check_links
from scmmgpt.readers.text_tables import FileError


INSTRUCTIONS = (
    "Annotate, describe, search, embed, generate and audit single cells (scRNA-seq) in files of one folder, and ask "
    "about them. Call `inspect` before the first use of a file. Labels are predictions: report score and `Unknown` "
    "with them, and call `audit` where the file has labels already."
)
NAMED_FILES = 20  # most files that the error about a missing file lists
SECONDS = 0.5  # shortest time between two progress reports
CONTEXT: ContextVar[Context | None] = ContextVar("CONTEXT", default=None)  # context of the current call

File: TypeAlias = Annotated[str, Field(description="file of cells in the folder: .h5ad, .zarr, 10x .h5, .loom, .csv")]
Output: TypeAlias = Annotated[str, Field(description="name of a new .h5ad file in the folder")]
Table: TypeAlias = Annotated[str | None, Field(description="name of a new .csv file in the folder")]
Clusters: TypeAlias = Annotated[str | None, Field(description="column of obs with clusters")]
Reading: TypeAlias = Annotated[
    dict[str, str] | None, Field(description=f"how to read the file, only if `inspect` is wrong: {READ_HELP}")
]
Command: TypeAlias = Callable[[list[str]], int]


class Steps:
    """Reports the progress bars of a call to the client; replaces tqdm.

    Args:
        context: Context of the call.
    """

    def __init__(self, context: Context) -> None:
        self.context, self.done, self.all, self.told = context, 0.0, 0.0, -SECONDS

    def bar(self, _: Any, args: Sequence[Any], options: Mapping[str, Any]) -> "Steps.Bar":
        """Hook of transformers that replaces a bar of tqdm."""
        items = args[0] if args else options.get("iterable", ())
        total = options.get("total") or (len(items) if hasattr(items, "__len__") else 0)
        self.all = self.done + total
        return self.Bar(self, items, str(options.get("desc") or ""))

    def tell(self, n: float, what: str) -> None:
        """Count steps, and report them to the client at most every `SECONDS`.

        Raises:
            KeyboardInterrupt: If the client has cancelled the call.
        """
        self.done += n
        try:
            anyio.from_thread.check_cancelled()
        except BaseException as error:  # the exception type depends on the event loop
            raise KeyboardInterrupt from error
        if time.monotonic() >= self.told + SECONDS:
            self.told = time.monotonic()
            anyio.from_thread.run(self.context.report_progress, self.done, max(self.all, self.done) or None, what)

    class Bar(contextlib.AbstractContextManager):
        """The part of tqdm's interface that commands use."""

        def __init__(self, steps: "Steps", items: Iterable[Any], what: str) -> None:
            self.steps, self.items, self.what = steps, items, what

        def __iter__(self) -> Iterator[Any]:
            for item in self.items:
                yield item
                self.update()

        def update(self, n: float = 1) -> None:
            """Count steps."""
            self.steps.tell(n, self.what)

        def close(self, *_: object) -> None:
            """Do nothing: no resource is open."""

        __exit__ = set_postfix = set_description = refresh = close


class CellTools:
    """The tools: each turns its arguments into a command line, runs the command and returns the summary.

    Args:
        folder: Folder of all files.
        run: Function of the words of a command line that returns the exit status; see `scmmgpt.__main__`.
        model: Checkpoint for `verify`, which would otherwise load the checkpoint named in a file.
        settings: Options of every command that loads a checkpoint, such as `--device=cpu`.
    """

    def __init__(self, folder: Path, run: Command, model: str, settings: Sequence[str] = ()) -> None:
        self.folder, self.model, self.settings = Path(os.path.realpath(folder)), model, list(settings)
        self._run, self._lock = run, threading.Lock()

    def inspect(self, file: File, reading: Reading = None) -> dict[str, Any]:
        """Report what a file holds, whether it can be used, and which matrix and genes are read."""
        settings = [word for word in self.settings if word.startswith("--model=")]
        return self._call("inspect", self._existing(file), *_reading(reading), settings=settings)

    def annotate(
        self,
        file: File,
        output: Output,
        labels: Annotated[
            list[str] | dict[str, str] | None,
            Field(description="candidate labels, or label -> description; default: the labels of the checkpoint"),
        ] = None,
        tissue: Annotated[str | None, Field(description="use the checkpoint's labels of this tissue")] = None,
        cluster_key: Clusters = None,
        min_score: Annotated[float | None, Field(ge=0, le=1, description="below this, a cell is Unknown")] = None,
        table: Table = None,
        evidence: Annotated[str | None, Field(description="new .csv file for the genes behind each label")] = None,
        reading: Reading = None,
    ) -> dict[str, Any]:
        """Predict the type of every cell: obs['scmmgpt_cell_type'], with a score; Unknown if no label fits."""
        words = _options(tissue=tissue, cluster_key=cluster_key, min_score=min_score)
        words += self._outputs(output=output, table=table, evidence=evidence)
        with tempfile.TemporaryDirectory() as folder:
            if labels is not None:  # pass labels in a file, because a label could look like an option or a path
                path = Path(folder, "labels.json")
                path.write_text(json.dumps(labels), encoding="utf-8")
                words.append(f"--labels={path}")
            return self._call("annotate", self._existing(file), *words, *_reading(reading))

    def describe(
        self,
        file: File,
        output: Output,
        table: Table = None,
        proof: Annotated[str | None, Field(description="new .csv: describe by counts, and list the genes")] = None,
        reading: Reading = None,
    ) -> dict[str, Any]:
        """Describe every cell in words: obs['scmmgpt_description']. Prefer `proof`: a model writes freely."""
        words = self._outputs(output=output, table=table, proof=proof)
        return self._call("describe", self._existing(file), *words, *_reading(reading))

    def ask(
        self,
        file: File,
        questions: Annotated[list[str], Field(min_length=1, description="such as: Why not NK cells? And CD4?")],
        column: Annotated[str | None, Field(description="column of obs that selects the cells")] = None,
        value: Annotated[str | None, Field(description="value of `column` that the cells have")] = None,
        reading: Reading = None,
    ) -> dict[str, Any]:
        """Ask about selected cells: types, genes, markers, evidence, donors. Answers are counted, not generated."""
        if (column is None) != (value is None):
            raise ToolError("Name a column of obs and a value together.")
        words = [] if column is None else [f"--select=`{column}` in {_readings(value or '')}"]
        padded = [f" {question}" for question in questions]  # the space keeps a question from being an option
        return self._call("chat", *words, *_reading(reading), self._existing(file), "--ask", *padded)

    def search(
        self,
        file: File,
        text: Annotated[
            str | None, Field(description="description of the wanted cells; may deny: T cell without CD8")
        ] = None,
        like: Annotated[
            list[str] | None, Field(description="instead of text: names of cells, to find the most similar cells")
        ] = None,
        top_k: Annotated[int, Field(ge=1, le=1000)] = 10,
        by: Annotated[
            Literal["similarity", "genes"],
            Field(description="'genes': markers of a type named in the text, or genes related to its words"),
        ] = "similarity",
        output: Annotated[str | None, Field(description="new .h5ad file with every cell's score")] = None,
        reading: Reading = None,
    ) -> dict[str, Any]:
        """Find the cells that a text describes best; scores rank cells, and no score value means "no match"."""
        words = [*_options(text=text, top_k=top_k, by=by), *self._outputs(output=output)]
        words += [f"--like={name}" for name in like or ()]
        return self._call("search", self._existing(file), *words, *_reading(reading))

    def embed(self, file: File, output: Output, reading: Reading = None) -> dict[str, Any]:
        """Embed every cell for neighbours, UMAP and clustering: obsm['X_scmmgpt']."""
        return self._call("embed", self._existing(file), *self._outputs(output=output), *_reading(reading))

    def generate(
        self,
        prompts: Annotated[list[str], Field(min_length=1, description="descriptions of cells")],
        output: Output,
        n_cells: Annotated[int, Field(ge=1, le=100_000, description="cells for each prompt")] = 1,
        seed: Annotated[int, Field(ge=0)] = 0,
    ) -> dict[str, Any]:
        """Generate expression profiles of cells from descriptions. These are simulated cells: say so."""
        words = [*self._outputs(output=output), *_options(n_cells=n_cells, seed=seed)]
        return self._call("generate", *words, "--", *prompts)

    def audit(
        self,
        file: File,
        output: Output,
        label_key: Annotated[str, Field(description="column of obs with the given labels")] = "cell_type",
        cluster_key: Clusters = None,
        table: Table = None,
        reading: Reading = None,
    ) -> dict[str, Any]:
        """Rank given labels, clusters and cells that file, model and markers contradict: obs['scmmgpt_audit']."""
        words = [*_options(label_key=label_key, cluster_key=cluster_key), *self._outputs(output=output, table=table)]
        return self._call("audit", self._existing(file), *words, *_reading(reading))

    def verify(
        self,
        file: Annotated[str, Field(description="result of annotate, describe, embed or audit")],
        input: Annotated[str | None, Field(description="file of cells that it was computed from")] = None,
    ) -> dict[str, Any]:
        """Recompute the results of a file and report changes."""
        words = [f"--model={self.model}"] + ([] if input is None else [f"--input={self._existing(input)}"])
        return self._call("verify", self._existing(file), *words)

    # -- shared -------------------------------------------------------------------------------------------------------

    def _call(self, *words: str, settings: Sequence[str] | None = None) -> dict[str, Any]:
        """Run a command; return its output with its warnings as `messages`."""
        command, *rest = words
        own = self.settings if settings is None else settings
        printed, reported = io.StringIO(), io.StringIO()
        warnings = logging.StreamHandler(reported)
        warnings.setLevel(logging.WARNING)
        warnings.addFilter(OPTION_WORDS)
        package = logging.getLogger("scmmgpt")
        with self._lock, _told(command), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(reported):
            package.addHandler(warnings)
            propagates, package.propagate = package.propagate, False  # the server's log also goes to stderr
            try:
                self._run([command, "--json", *own, *rest])
            except SystemExit:
                pass  # the parser has already reported its error
            finally:
                package.removeHandler(warnings)
                package.propagate = propagates
        messages = [line for line in reported.getvalue().splitlines() if line.strip()]
        try:
            summary = json.loads(printed.getvalue())
        except ValueError:
            raise ToolError(messages[-1] if messages else f"scmmgpt {command} returned no result.") from None
        if isinstance(summary, dict) and summary.get("error"):
            raise ToolError(f"scmmgpt {command}: {summary['error']}")
        return {**(summary if isinstance(summary, dict) else {"found": summary}), "messages": messages}

    def _existing(self, name: str) -> str:
        """Return the path of an input; refuse links that lead out of the folder."""
        path = self._inside(name)
        if not path.exists():
            names = sorted(path.name for path in self.folder.iterdir() if not path.name.startswith("."))
            shown = ", ".join(names[:NAMED_FILES]) + (" ..." if len(names) > NAMED_FILES else "")
            raise ToolError(f"There is no {name!r} in the folder; it has: {shown or 'no files'}.")
        links = (part for part in path.rglob("*") if part.is_symlink()) if path.is_dir() else ()
        for link in links:
            self._inside(str(link))
        if path.is_file() and h5py.is_hdf5(path):
            with h5py.File(path) as file:
                try:
                    check_links(file)
                except FileError as error:
                    raise ToolError(str(error)) from None
        return str(path)

    def _outputs(self, **names: str | None) -> list[str]:
        """Make the options of outputs; refuse a file that exists."""
        words = []
        for option, name in names.items():
            if name is not None:
                path = self._inside(name)
                if path.exists():
                    raise ToolError(f"{name!r} exists already, and no tool replaces a file. Name a new one.")
                words.append(f"--{option}={path}")
        return words

    def _inside(self, name: str) -> Path:
        try:
            path = Path(os.path.realpath(self.folder / name))
        except (OSError, ValueError):
            raise ToolError(f"{name!r} is not a path. Name a file of the folder.") from None
        if not path.is_relative_to(self.folder):
            raise ToolError(f"{name!r} lies outside of {self.folder}, the folder of this server. Name a file in it.")
        return path


@contextlib.contextmanager
def _told(command: str) -> Iterator[None]:
    """Report the progress of a command to the client of the current call, if there is one."""
    from transformers.utils import logging as progress_logging

    if (context := CONTEXT.get()) is None:
        yield
        return
    steps = Steps(context)
    before = progress_logging.set_tqdm_hook(steps.bar)
    try:
        steps.tell(0, command)
        yield
    finally:
        progress_logging.set_tqdm_hook(before)


def _with_context(tool: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a tool so that the server passes it the context of a call, which is not an argument for clients."""

    def run(context: Context, **arguments: Any) -> Any:
        CONTEXT.set(context)  # affects only this thread's copy of the variable
        return tool(**arguments)

    served: Any = run  # the server takes the arguments of a tool from its signature
    own = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=Context)
    signature = inspect.signature(tool)
    served.__signature__ = signature.replace(parameters=[*signature.parameters.values(), own])
    served.__annotations__ = {**get_type_hints(tool, include_extras=True), "context": Context}
    served.__name__, served.__doc__ = tool.__name__, tool.__doc__
    return served


def _options(**values: Any) -> list[str]:
    """Make words `--name=value` of options; skip None."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items() if value is not None]


def _reading(options: Mapping[str, str] | None) -> list[str]:
    """Make words of the options for reading a file."""
    if unknown := sorted(set(options or ()) - set(READ_HELP)):
        raise ToolError(f"reading has {unknown}; choose among {list(READ_HELP)}.")
    return _options(**(options or {}))


class Server(MCPServer):
    """Server with one-line errors about arguments."""

    async def call_tool(self, name: str, arguments: dict[str, Any], context: Any = None) -> Any:
        """Call a tool."""
        try:
            return await super().call_tool(name, arguments, context)
        except ToolError as error:
            if not isinstance(error.__cause__, ValidationError):
                raise
            errors = error.__cause__.errors(include_url=False, include_context=False, include_input=False)
            texts = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in errors]
            raise ToolError(f"Error executing tool {name}: {'; '.join(texts)}.") from None


def make_server(folder: Path, run: Command, model: str, settings: Sequence[str] = ()) -> Server:
    """Make a server with the tools of [`CellTools`].

    Raises:
        ValueError: If `folder` is not a folder.
    """
    if not folder.is_dir():
        raise ValueError(f"--folder {str(folder)!r} is not a folder; name the folder of your files.")
    tools = CellTools(folder, run, model, settings)
    server = Server("scmmgpt", instructions=INSTRUCTIONS, version=version("scmmgpt"), log_level="WARNING")
    local: Any = {"open_world_hint": False, "destructive_hint": False}
    readers: list[Callable[..., Any]] = [tools.inspect, tools.ask, tools.verify]
    writers: list[Callable[..., Any]] = [
        tools.annotate,
        tools.describe,
        tools.search,
        tools.embed,
        tools.generate,
        tools.audit,
    ]
    for tool in readers:
        server.add_tool(_with_context(tool), annotations=ToolAnnotations(read_only_hint=True, **local))
    for tool in writers:
        server.add_tool(_with_context(tool), annotations=ToolAnnotations(read_only_hint=False, **local))
    return server


def serve(folder: Path, run: Command, model: str | None, settings: Mapping[str, Any]) -> None:
    """Serve over standard input and output.

    Args:
        settings: Option -> value; None for an option that is not given.
    """
    checkpoint = model or root_checkpoint()
    find_checkpoint(checkpoint)
    words = _options(**{"model": model, **settings})
    make_server(folder, run, checkpoint, words).run("stdio")


def _readings(value: str) -> list[str | float]:
    """Return a value as text, and also as a number if it is one."""
    try:
        return [value, float(value)]
    except ValueError:
        return [value]
