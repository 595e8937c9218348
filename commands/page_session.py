"""The cells of one browser on the page: what is drawn, selected and asked about."""

import secrets
from dataclasses import dataclass, field
from typing import Any

import anndata
import numpy as np
import pandas as pd

from scmmgpt.commands.cell_map import draw
from scmmgpt.commands.chat import Chat
from scmmgpt.commands.page_words import as_text
from scmmgpt.proof_scmmgpt import Proof


NO_SELECTION = "No cells selected: draw a loop around some, or click a type below the map."
SEARCHED, DESCRIPTION = "scmmgpt_search", "scmmgpt_description"  # columns of obs
SHOWN_KINDS = 6  # kinds of cells that are counted in a sentence


@dataclass
class Session:
    """The cells of one browser. Another browser has another session; it ends an hour after its last use.

    The browser gets the secret of its session, and only who has the secret gets the session back after a reload.
    """

    adata: anndata.AnnData
    name: str  # of the file
    places: np.ndarray  # (n, 2), of the map
    what: str  # the places are of
    color: str | None = None  # column of obs
    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))  # selected, none: all cells
    marks: np.ndarray | None = None  # rows of cells that generated cells are like, one for each
    query: str = ""  # of the last search
    placed: np.ndarray | None = None  # by the network, for the searches
    proof: Proof | None = None  # of the labels, for descriptions and the chat
    chat: Chat | None = None  # about the selected cells
    turns: list[dict[str, str]] = field(default_factory=list)  # of the chat
    secret: str = field(default_factory=secrets.token_urlsafe, repr=False)

    def name_of(self, column: str) -> str:
        """A column of `obs` in words: those that the page adds have no prefix."""
        if column == SEARCHED:
            return f"match with {self.query or 'a search'}"
        added = column.removeprefix("scmmgpt_")
        return column if added == column else f"{added.replace('_', ' ')} (scMMGPT)"

    def map(self) -> dict:
        """The value of the map."""
        title = f"{self.name}: {self.adata.n_obs:,} {'cell' if self.adata.n_obs == 1 else 'cells'}. {self.what}."
        if self.color is not None:
            title += f" Colour: {self.name_of(self.color)}."
        if self.marks is not None:
            title += f" Crosses: generated cells, each at a cell that is like it{self.kinds(self.marks)}"
        values = None if self.color is None else self.adata.obs[self.color]
        marks = None if self.marks is None else self.places[self.marks]
        return draw(self.places, title, values, marks, self.rows)

    def kinds(self, rows: np.ndarray) -> str:
        """How many rows are of which kinds, by the colour of the map, else by type; the end of a sentence."""
        is_number = self.color is None or self.adata.obs[self.color].dtype.kind in "fiu"
        column = "scmmgpt_cell_type" if is_number else self.color
        if column not in self.adata.obs:
            return "."
        counts = self.adata.obs[column].iloc[rows].astype(str).value_counts()
        kinds = ", ".join(f"{name} {n:,}" for name, n in counts.head(SHOWN_KINDS).items())
        return f": {kinds}{', ...' if len(counts) > SHOWN_KINDS else '.'}"

    def said(self) -> str:
        """How many cells are selected, and of which kinds, as Markdown; a name of the file is text, never HTML."""
        if not len(self.rows):
            return NO_SELECTION
        kinds = as_text(self.kinds(self.rows))
        return f"{len(self.rows):,} {'cell' if len(self.rows) == 1 else 'cells'} selected{kinds}"

    def relabelled(self, color: str | None) -> None:
        """Show new labels, without what was said of those before them."""
        self.color, self.chat, self.proof = color, None, None
        if DESCRIPTION in self.adata.obs:
            del self.adata.obs[DESCRIPTION]

    def proved(self, pipeline: Any) -> Proof:
        """The proof of the labels, which needs all cells and is kept."""
        if self.proof is None:
            self.proof = pipeline.prove(self.adata, pipeline.processor.choose_input(self.adata))
        return self.proof

    def describe(self, pipeline: Any, most: int) -> pd.Series:
        """Descriptions with proof of the selected cells, at most `most`, which `obs` gets; other cells keep theirs."""
        proof, rows = self.proved(pipeline), self.chosen_rows(most)
        known = self.adata.obs.get(DESCRIPTION)
        texts = np.full(self.adata.n_obs, "", dtype=object) if known is None else np.asarray(known, dtype=object)
        texts[rows] = proof.texts(rows)
        self.adata.obs[DESCRIPTION] = texts.astype(str)
        return self.adata.obs[DESCRIPTION].iloc[rows]

    def chosen_rows(self, most: int) -> np.ndarray:
        """The selected rows, at most `most`; without a selection the first ones."""
        return (self.rows if len(self.rows) else np.arange(self.adata.n_obs))[:most]

    def chosen(self, most: int) -> anndata.AnnData:
        """A copy of the cells of `chosen_rows`."""
        return self.adata[self.chosen_rows(most)].copy()

    def counts(self) -> pd.DataFrame:
        """The number of cells of each annotated type, no row before there are types."""
        types = self.adata.obs.get("scmmgpt_cell_type", pd.Series(dtype="category"))
        counts = types.value_counts().rename_axis("cell type").reset_index(name="cells")
        return counts[counts["cells"] > 0]
