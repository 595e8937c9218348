"""The commands as tools of the Model Context Protocol, for agents, over the files of one folder.

A tool runs a command with `--json` in this process and returns its summary, with the warnings as `messages`. Every
path is in the folder that the user named, links and parts of HDF5 files included; no tool replaces a file. The
checkpoint is the choice of the user, too: a tool names none. Calls run one after the other; a client that asks for it
is told how far a call is, and a call that it cancels stops at the next batch and writes nothing.
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
NAMED_FILES = 20  # in the error about a missing file
SECONDS = 0.5  # between two notifications of progress
CONTEXT: ContextVar[Context | None] = ContextVar("CONTEXT", default=None)  # of the call that runs

File: TypeAlias = Annotated[str, Field(description="file of cells in the folder: .h5ad, .zarr, 10x .h5, .loom, .csv")]
Output: TypeAlias = Annotated[str, Field(description="name of a new .h5ad file in the folder")]
Table: TypeAlias = Annotated[str | None, Field(description="name of a new .csv file in the folder")]
Clusters: TypeAlias = Annotated[str | None, Field(description="column of obs with clusters")]
Reading: TypeAlias = Annotated[
    dict[str, str] | None, Field(description=f"how to read the file, only if `inspect` is wrong: {READ_HELP}")
]
Command: TypeAlias = Callable[[list[str]], int]


class Steps:
    """What the progress bars of a call count, told to the client; in the manner of tqdm.

    Args:
        context: Of the call.
    """

    def __init__(self, context: Context) -> None:
        self.context, self.done, self.all, self.told = context, 0.0, 0.0, -SECONDS

    def bar(self, _: Any, args: Sequence[Any], options: Mapping[str, Any]) -> "Steps.Bar":
        """The hook of transformers: a bar in place of one of tqdm."""
        items = args[0] if args else options.get("iterable", ())
        total = options.get("total") or (len(items) if hasattr(items, "__len__") else 0)
        self.all = self.done + total
        return self.Bar(self, items, str(options.get("desc") or ""))

    def tell(self, n: float, what: str) -> None:
        """Count steps and tell the client, unless it was told just now.

        Raises:
            KeyboardInterrupt: If the client has cancelled the call.
        """
        self.done += n
        try:
            anyio.from_thread.check_cancelled()
        except BaseException as error:  # that of the loop, which this thread has no name for
            raise KeyboardInterrupt from error
        if time.monotonic() >= self.told + SECONDS:
            self.told = time.monotonic()
            anyio.from_thread.run(self.context.report_progress, self.done, max(self.all, self.done) or None, what)

    class Bar(contextlib.AbstractContextManager):
        """A bar of tqdm, as far as commands use it."""

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
            """Nothing is left open."""

        __exit__ = set_postfix = set_description = refresh = close


class CellTools:
    """The tools: arguments in, a command line, its summary out.

    Args:
        folder: All files are in it.
        run: Takes the words of a command line and returns the exit status; see `scmmgpt.__main__`.
        model: Checkpoint of `verify`, which would else take the one that a file names.
        settings: Words for every command that loads a checkpoint, such as `--device=cpu`.
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
            Field(description="candidate labels, or label -> description; by default those of the checkpoint"),
        ] = None,
        tissue: Annotated[str | None, Field(description="take the checkpoint's labels of this tissue")] = None,
        cluster_key: Clusters = None,
        min_score: Annotated[float | None, Field(ge=0, le=1, description="below this, a cell is Unknown")] = None,
        table: Table = None,
        evidence: Annotated[str | None, Field(description="new .csv file for the genes behind each label")] = None,
        reading: Reading = None,
    ) -> dict[str, Any]:
        """Name the type of every cell: obs['scmmgpt_cell_type'], with score, and Unknown where nothing fits."""
        words = _options(tissue=tissue, cluster_key=cluster_key, min_score=min_score)
        words += self._outputs(output=output, table=table, evidence=evidence)
        with tempfile.TemporaryDirectory() as folder:
            if labels is not None:  # in a file, where a label is never taken for an option or a path
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
        asked = [f" {question}" for question in questions]  # none is an option
        return self._call("chat", *words, *_reading(reading), self._existing(file), "--ask", *asked)

    def search(
        self,
        file: File,
        text: Annotated[
            str | None, Field(description="description of the wanted cells; may deny: T cell without CD8")
        ] = None,
        like: Annotated[
            list[str] | None, Field(description="in place of text: names of cells, to find the cells most like them")
        ] = None,
        top_k: Annotated[int, Field(ge=1, le=1000)] = 10,
        by: Annotated[
            Literal["similarity", "genes"],
            Field(description="'genes': the markers of a type that the text names, or genes near to its words"),
        ] = "similarity",
        output: Annotated[str | None, Field(description="new .h5ad file with every cell's score")] = None,
        reading: Reading = None,
    ) -> dict[str, Any]:
        """Find the cells that a text describes best; scores order cells and have no zero that means no match."""
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
        """Rank given labels, clusters and cells that the file, model and markers contradict: obs['scmmgpt_audit']."""
        words = [*_options(label_key=label_key, cluster_key=cluster_key), *self._outputs(output=output, table=table)]
        return self._call("audit", self._existing(file), *words, *_reading(reading))

    def verify(
        self,
        file: Annotated[str, Field(description="result of annotate, describe, embed or audit")],
        input: Annotated[str | None, Field(description="file of cells that it was computed from")] = None,
    ) -> dict[str, Any]:
        """Compute the results of a file again and name what changed."""
        words = [f"--model={self.model}"] + ([] if input is None else [f"--input={self._existing(input)}"])
        return self._call("verify", self._existing(file), *words)

    # -- shared -------------------------------------------------------------------------------------------------------

    def _call(self, *words: str, settings: Sequence[str] | None = None) -> dict[str, Any]:
        """Run a command; what it prints is the result, and what it warns of goes beside it."""
        command, *rest = words
        own = self.settings if settings is None else settings
        printed, said = io.StringIO(), io.StringIO()
        warnings = logging.StreamHandler(said)
        warnings.setLevel(logging.WARNING)
        warnings.addFilter(OPTION_WORDS)
        package = logging.getLogger("scmmgpt")
        with self._lock, _told(command), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
            package.addHandler(warnings)
            propagates, package.propagate = package.propagate, False  # to the server's log, which is on stderr, too
            try:
                self._run([command, "--json", *own, *rest])
            except SystemExit:
                pass  # of the parser, which has said why
            finally:
                package.removeHandler(warnings)
                package.propagate = propagates
        messages = [line for line in said.getvalue().splitlines() if line.strip()]
        try:
            found = json.loads(printed.getvalue())
        except ValueError:
            raise ToolError(messages[-1] if messages else f"scmmgpt {command} said nothing.") from None
        if isinstance(found, dict) and found.get("error"):
            raise ToolError(f"scmmgpt {command}: {found['error']}")
        return {**(found if isinstance(found, dict) else {"found": found}), "messages": messages}

    def _existing(self, name: str) -> str:
        """The path of an input, of which no part leads out of the folder."""
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
        """Options of output; a file that exists is never replaced."""
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
    """Tell the client of the call that runs, if there is one, how far a command is."""
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
    """A tool that the server gives the context of a call, which no client sees among its arguments."""

    def run(context: Context, **arguments: Any) -> Any:
        CONTEXT.set(context)  # of this thread's copy of the variables
        return tool(**arguments)

    served: Any = run  # the server reads the arguments of a tool off its signature
    own = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=Context)
    signature = inspect.signature(tool)
    served.__signature__ = signature.replace(parameters=[*signature.parameters.values(), own])
    served.__annotations__ = {**get_type_hints(tool, include_extras=True), "context": Context}
    served.__name__, served.__doc__ = tool.__name__, tool.__doc__
    return served


def _options(**values: Any) -> list[str]:
    """Words of options, each with its value: `--name=value`."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items() if value is not None]


def _reading(options: Mapping[str, str] | None) -> list[str]:
    """Words of the options of reading."""
    if unknown := sorted(set(options or ()) - set(READ_HELP)):
        raise ToolError(f"reading has {unknown}; choose among {list(READ_HELP)}.")
    return _options(**(options or {}))


class Server(MCPServer):
    """A server whose errors about arguments are one line, as all others are."""

    async def call_tool(self, name: str, arguments: dict[str, Any], context: Any = None) -> Any:
        """Call a tool."""
        try:
            return await super().call_tool(name, arguments, context)
        except ToolError as error:
            if not isinstance(error.__cause__, ValidationError):
                raise
            found = error.__cause__.errors(include_url=False, include_context=False, include_input=False)
            said = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in found]
            raise ToolError(f"Error executing tool {name}: {'; '.join(said)}.") from None


def make_server(folder: Path, run: Command, model: str, settings: Sequence[str] = ()) -> Server:
    """A server with the tools of [`CellTools`].

    Raises:
        ValueError: If `folder` is not a folder.
    """
    if not folder.is_dir():
        raise ValueError(f"--folder {str(folder)!r} is not a folder; name the one that holds your files.")
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
    """Serve over standard input and output; `settings` are values of options, None where an option is not given."""
    checkpoint = model or root_checkpoint()
    find_checkpoint(checkpoint)
    words = _options(**{"model": model, **settings})
    make_server(folder, run, checkpoint, words).run("stdio")


def _readings(value: str) -> list[str | float]:
    """A value of a column as text, and as the number that it may be."""
    try:
        return [value, float(value)]
    except ValueError:
        return [value]
