"""Agents reach the commands over the Model Context Protocol, and files of one folder alone."""

import logging
import shutil
import sys

import anndata
import h5py
import pytest

from scmmgpt.__main__ import run_words
from scmmgpt.readers.cell_files import read_file


anyio = pytest.importorskip("anyio", reason="the server needs mcp, which the extra `mcp` installs")
mcp = pytest.importorskip("mcp", reason="the server needs mcp, which the extra `mcp` installs")


@pytest.fixture
def folder(adata, tmp_path):
    """The folder of the user, beside a file that is not in it."""
    folder = tmp_path / "mine"
    folder.mkdir()
    adata.obs["given"] = ["B", "T", "B"] * 20
    adata.write_h5ad(folder / "cells.h5ad")
    adata.write_h5ad(tmp_path / "secret.h5ad")
    return folder


@pytest.fixture
def call(checkpoint, folder):
    """Calls a tool by the client of the SDK, and returns its structured content or its error."""
    from scmmgpt.commands.mcp_server import make_server

    server = make_server(folder, run_words, checkpoint, [f"--model={checkpoint}"])

    def call(tool, **arguments):
        async def run():
            async with mcp.Client(server) as client:
                result = await client.call_tool(tool, arguments)
                return result.content[0].text if result.is_error else result.structured_content

        return anyio.run(run)

    return call


def test_the_client_of_the_sdk_sees_every_tool_over_stdio(folder):
    server = mcp.StdioServerParameters(
        command=sys.executable, args=["-m", "scmmgpt", "mcp", "--folder", str(folder)], cwd=str(folder)
    )

    async def tools():
        async with mcp.Client(mcp.stdio_client(server)) as client:
            return {tool.name: tool for tool in (await client.list_tools()).tools}

    found = anyio.run(tools)
    assert sorted(found) == [
        "annotate",
        "ask",
        "audit",
        "describe",
        "embed",
        "generate",
        "inspect",
        "search",
        "verify",
    ]
    assert found["annotate"].input_schema["required"] == ["file", "output"]
    assert found["inspect"].annotations.read_only_hint
    assert not found["annotate"].annotations.destructive_hint


def test_an_agent_inspects_annotates_and_verifies_a_file(call, folder):
    assert call("inspect", file="cells.h5ad")["usable"]
    found = call("annotate", file="cells.h5ad", output="out.h5ad", labels={"B": "a B cell", "--quiet": "a T cell"})
    annotated = anndata.read_h5ad(folder / "out.h5ad")
    assert found["labels"] == annotated.obs["scmmgpt_cell_type"].value_counts().to_dict()
    assert annotated.uns["scmmgpt"]["annotate"]["labels"].tolist() == ["B", "--quiet"]
    assert call("verify", file="out.h5ad")["verified"]


def test_a_warning_reaches_an_agent_once(call):
    class ServerLog(logging.StreamHandler):  # of the SDK, which follows sys.stderr
        stream = property(lambda _: sys.stderr, lambda *_: None)

    log = ServerLog()
    logging.getLogger().addHandler(log)
    try:
        found = call("annotate", file="cells.h5ad", output="out.h5ad", labels=["mast cell", "NK cell"])
    finally:
        logging.getLogger().removeHandler(log)
    assert sum("without training cells" in message for message in found["messages"]) == 1


def test_an_agent_searches_embeds_describes_and_generates(call, folder):
    hits = call("search", file="cells.h5ad", text="--output=x", top_k=3)["found"]
    assert [hit["rank"] for hit in hits] == [1, 2, 3]
    like = call("search", file="cells.h5ad", like=[hits[0]["cell"]], top_k=60)["found"]
    assert len(like) == 59
    assert hits[0]["cell"] not in {hit["cell"] for hit in like}
    assert call("embed", file="cells.h5ad", output="embedded.h5ad")["cells"] == 60
    assert call("describe", file="cells.h5ad", output="described.h5ad", table="words.csv")["cells"] == 60
    prompts = ["a B cell", "--output=/x.h5ad"]
    assert call("generate", prompts=prompts, output="new.h5ad", n_cells=2)["cells"] == 4
    written = {"embedded.h5ad", "described.h5ad", "words.csv", "new.h5ad"}
    assert written | {"cells.h5ad"} == {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["../secret.h5ad", "link.h5ad", "linked", "folder", "{parent}/secret.h5ad", "a\0b"])
def test_no_path_leads_out_of_the_folder(call, folder, name):
    (folder / "link.h5ad").symlink_to(folder.parent / "secret.h5ad")
    (folder / "linked").symlink_to(folder.parent)
    (folder / "folder").mkdir()
    (folder / "folder" / "matrix.mtx").symlink_to(folder.parent / "secret.h5ad")
    name = name.format(parent=folder.parent)
    said = call("inspect", file=name)
    assert "lies outside of" in said or "is not a path" in said
    said = call("embed", file="cells.h5ad", output=f"{name}/new.h5ad" if name == "linked" else f"../{name}")
    assert "lies outside of" in said or "is not a path" in said
    assert sorted(path.name for path in folder.parent.iterdir()) == ["checkpoint", "mine", "secret.h5ad"]


@pytest.mark.parametrize("kind", ["link", "external", "virtual"])
def test_no_part_of_a_file_leads_out_of_the_folder(call, folder, kind):
    secret, path = folder.parent / "secret.h5ad", folder / "new.h5ad"
    shutil.copy(folder / "cells.h5ad", path)
    with h5py.File(path, "r+") as file:
        del file["X/data"]
        if kind == "link":
            file["X/data"] = h5py.ExternalLink(str(secret), "X/data")
        elif kind == "external":
            file.create_dataset("X/data", (10,), "u1", external=[(str(secret), 0, 10)])
        else:
            layout = h5py.VirtualLayout((10,), "f4")
            layout[:] = h5py.VirtualSource(str(secret), "X/data", (10,))
            file.create_virtual_dataset("X/data", layout)
    for tool, arguments in (("inspect", {}), ("verify", {}), ("embed", {"output": "out.h5ad"})):
        assert f"is in another file, {str(secret)!r}" in call(tool, file="new.h5ad", **arguments)
    with pytest.raises(ValueError, match="X/data of .*new.h5ad is in another file"):
        read_file(path)


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        ("inspect", {"file": "cell.h5ad"}, "There is no 'cell.h5ad' in the folder; it has: cells.h5ad."),
        ("embed", {"file": "cells.h5ad", "output": "cells.h5ad"}, "'cells.h5ad' exists already"),
        ("embed", {"file": "cells.h5ad", "output": "new.csv"}, "its name must end in .h5ad"),
        ("audit", {"file": "cells.h5ad", "output": "new.h5ad", "label_key": "type"}, "type"),
        ("embed", {"file": "cells.h5ad", "output": "new.h5ad", "reading": {"model": "x"}}, "reading has ['model']"),
        ("search", {"file": "cells.h5ad", "text": " "}, "The text to search for is empty"),
        (
            "search",
            {"file": "cells.h5ad", "text": "T", "top_k": 0},
            "top_k: Input should be greater than or equal to 1.",
        ),
        ("inspect", {}, "Error executing tool inspect: file: Field required."),
        (
            "ask",
            {"file": "cells.h5ad", "questions": ["?"], "column": "given` or `given", "value": "B"},
            "This checkpoint has no label readout",
        ),
        (
            "ask",
            {"file": "cells.h5ad", "questions": ["?"], "column": "given"},
            "Name a column of obs and a value together",
        ),
    ],
)
def test_a_mistake_is_one_clear_error_and_writes_nothing(call, folder, tool, arguments, message):
    said = call(tool, **arguments)
    assert message in said
    assert "Traceback" not in said
    assert len(said.splitlines()) == 1
    assert [path.name for path in folder.iterdir()] == ["cells.h5ad"]


def test_a_client_is_told_how_far_a_call_is_and_can_cancel_it(folder, checkpoint, monkeypatch):
    from scmmgpt.commands import mcp_server

    monkeypatch.setattr(mcp_server, "SECONDS", 0)
    server = mcp_server.make_server(folder, run_words, checkpoint, [f"--model={checkpoint}", "--batch-size=1"])
    told = []

    async def run():
        async with mcp.Client(server) as client:
            result = None
            with anyio.CancelScope() as scope:

                async def cancel(done, total, message):
                    told.append((done, total, message))
                    if done >= 2 and "stopped.h5ad" in asked["output"]:
                        scope.cancel()

                asked = {"file": "cells.h5ad", "output": "whole.h5ad"}
                assert not (await client.call_tool("embed", asked, progress_callback=cancel)).is_error
                whole = list(told)
                asked = {"file": "cells.h5ad", "output": "stopped.h5ad"}
                result = await client.call_tool("embed", asked, progress_callback=cancel)
            assert scope.cancel_called
            assert result is None or "stopped" in result.content[0].text
            found = await client.call_tool("inspect", {"file": "cells.h5ad"})  # the next call does not wait for long
            return whole, found.structured_content["usable"]

    whole, usable = anyio.run(run)
    assert usable
    assert whole[0] == (0, None, "embed")
    assert whole[-1][0] == whole[-1][1]
    assert whole[-1][2].startswith("Embedding")
    assert [done for done, _, _ in whole] == sorted(done for done, _, _ in whole)
    assert len(told) < len(whole) + 20
    assert [path.name for path in folder.iterdir() if path.name != "cells.h5ad"] == ["whole.h5ad"]


def test_a_folder_that_is_none_is_refused(tmp_path, capsys):
    assert run_words(["mcp", "--folder", str(tmp_path / "none")]) == 2
    assert "is not a folder" in capsys.readouterr().err


def test_an_agent_asks_about_cells_that_a_column_selects(folder):
    from scmmgpt import synthetic
    from scmmgpt.commands.mcp_server import CellTools

    pipeline = synthetic.fitted_pipeline()
    pipeline.save_pretrained(folder.parent / "fitted")
    cells = synthetic.synthetic_adata()
    cells.obs["group of 4"] = [i % 4 for i in range(cells.n_obs)]
    cells.write_h5ad(folder / "blood.h5ad")
    tools = CellTools(folder, run_words, "", [f"--model={folder.parent / 'fitted'}"])
    asked = ["Which types are here?", "--language-model=/", "--help"]
    found = tools.ask("blood.h5ad", asked, column="group of 4", value="1")["found"]
    assert [row["question"] for row in found] == asked
    assert found[0]["text"] == "Labels of the 15 selected cells: T cell (100 %)."
