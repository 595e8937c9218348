"""The steps of `embed` (embeddings of cells) and of `search` (scores of cells for texts, or for example cells)."""

import re
import textwrap
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from .cells_scmmgpt import Cells
from .configuration_scmmgpt import CELL_EMBEDDINGS
from .conversion_scmmgpt import InputChoice
from .evidence_scmmgpt import NONE, Explainer
from .labels_scmmgpt import names_known_type
from .modeling_scmmgpt import CELL_INPUTS, cell_text_similarity
from .passes_scmmgpt import LINEAR_BATCH, CellFunction, CellPasses, uncounted
from .query_scmmgpt import MIN_VOCABULARY, Search, is_understood, vocabulary_of
from .records_scmmgpt import finish_report, rows_named
from .scoring_scmmgpt import encode_texts, mean_similarity, text_states
from .unseen_scmmgpt import GeneSearch


SHOWN_TEXT = 60  # characters of a text, in a warning
ARTICLE = re.compile(r"^(?:an?|the|any|all)\s+", re.IGNORECASE)
PLACE = re.compile(r"\s+(?:from|in|of)\s.*$", re.IGNORECASE)
PROSE = re.compile(r"\b(?:an?|the|that|which|than|like|not|with|without)\b", re.IGNORECASE)  # in no name of a type
logger = logging.get_logger(__name__)


class SearchSteps(CellPasses):
    """The steps of [`ScMMGPTPipeline.embed`] and of [`ScMMGPTPipeline.search`]."""

    def embed_cells(
        self, adata: Any, choice: InputChoice, of: str | None = None, batch_size: int | None = None
    ) -> np.ndarray:
        """Embeddings of the cells of `adata`, float32 `(n_obs, width)`, L2-normalised.

        `adata` is the data that `choice` was made for, or a part of the data; `of` is as in [`embedding_of`].
        """
        of = self.embedding_of(of)
        profile = self._bridge().label_readout.embedding_for(choice.match.measured) if of == "profile" else None
        features_of = self.features_of(choice) if of == "cell-text" else None

        def embedding(cells: Cells) -> tuple[torch.Tensor, ...]:
            if profile is not None:
                return (torch.from_numpy(profile(cells)),)
            if features_of is None:
                inputs = self._inputs(cells)
                inputs = {name: inputs[name] for name in CELL_INPUTS}
                embedded = self._bridge().cell_model(**inputs, cls_only=True).pooler_output
            else:
                embedded = features_of(cells).mean(dim=1)
            return (torch.nn.functional.normalize(embedded.float(), dim=-1),)

        is_padded, chunks = profile is None, self._chunks(adata, choice)
        batch_size = self._batch_size(batch_size, 64 if is_padded else LINEAR_BATCH)
        return self._map_cells(embedding, chunks, batch_size, "Embedding", adata.shape[0], is_padded)[0]

    def embedding_of(self, of: str | None = None) -> str:
        """The kind of embedding, see [`ScMMGPTPipeline.embed`]; by default the one of the checkpoint.

        Raises:
            ValueError: If there is no such kind, or the checkpoint does not support it.
        """
        of = self.model.config.cell_embedding if of is None else of
        if of not in CELL_EMBEDDINGS:
            raise ValueError(f"of is {of!r}; choose one of {CELL_EMBEDDINGS}.")
        if of == "profile" and not (self.model.config.label_readout or {}).get("num_groups"):
            raise ValueError(
                "This checkpoint has no groups of cells, which embeddings of profiles need and `release` fits; choose "
                "'cell-text' or 'cell'."
            )
        return of

    def add_embedding(
        self,
        adata: Any,
        choice: InputChoice,
        embedding: Any,
        of: str | None = None,
        key_added: str = "X_scmmgpt",
    ) -> Any:
        """Add the result of [`embed_cells`] for all cells to `adata`."""
        finish_report(choice.report)
        adata.obsm[key_added] = embedding
        return self._record(adata, "scmmgpt", choice.report, embed={"of": self.embedding_of(of), "key": key_added})

    def search_cells(
        self,
        adata: Any,
        choice: InputChoice,
        text: str | Sequence[str],
        by: str = "similarity",
        batch_size: int | None = None,
        places: Callable[[], np.ndarray] | None = None,
    ) -> np.ndarray:
        """The columns that [`add_search`] needs, float32 `(n_obs, n_columns)`, for all the data of a choice or a part.

        Args:
            adata: The cells.
            choice: Matrix and genes.
            text: One search text or more.
            by: "similarity" or "genes".
            batch_size: Cells per batch.
            places: Returns the result of [`place_cells`] for these cells. Searches of the same cells may share it.

        Raises:
            ValueError: If a text is empty, `by` is unknown, or the checkpoint has no texts of genes.
        """
        texts = [text] if isinstance(text, str) else [str(item) for item in text]
        if not texts or not all(item.strip() for item in texts):
            raise ValueError("The text to search for is empty; describe the wanted cells.")
        if by not in ("similarity", "genes"):
            raise ValueError(f"by is {by!r}; choose 'similarity' or 'genes'.")
        if by == "genes" and "text_width" not in (self.model.config.label_readout or {}):
            raise ValueError(
                "This checkpoint has no texts about genes; train with gene_texts, or pass by='similarity'."
            )
        score, place_texts = self._search_scores(texts, by, choice, placed=places is not None)
        batch_size = self._batch_size(batch_size, 64)
        columns = self._map_cells(score, self._chunks(adata, choice), batch_size, "Searching", adata.shape[0])
        if places is not None and place_texts is not None:
            columns[0] += cell_text_similarity(torch.from_numpy(places()), place_texts.float().cpu()).numpy()
        return np.concatenate(columns, axis=1)

    def place_cells(self, adata: Any, choice: InputChoice) -> np.ndarray:
        """Features of all cells in the shared space, float32 `(n_cells, num_query_tokens, projection_dim)`."""
        features_of, batch_size = self.features_of(choice), self._batch_size(None, 64)
        chunks = self._chunks(adata, choice)
        return self._map_cells(lambda cells: (features_of(cells),), chunks, batch_size, "Searching", adata.shape[0])[0]

    def places_named(self, adata: Any, choice: InputChoice, like: Sequence[str], of: str | None = None) -> np.ndarray:
        """Embeddings of the cells with the names `like`, float32 `(n, width)`, as from [`embed_cells`].

        Raises:
            ValueError: As in [`rows_named`].
        """
        rows, choice = rows_named(adata.obs_names, like), uncounted(choice)
        runs = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)  # files on disk are read by ranges of rows
        return np.concatenate([self.embed_cells(adata[int(run[0]) : int(run[-1]) + 1], choice, of) for run in runs])

    def compare_with_cells(
        self, adata: Any, choice: InputChoice, places: np.ndarray, batch_size: int | None = None
    ) -> np.ndarray:
        """Cosine similarity of cells with the mean of `places`, float32 `(n_obs, 1)`: a column for [`add_search`].

        Args:
            adata: All the data of `choice`, or a part.
            choice: Matrix and genes.
            places: The result of [`places_named`].
            batch_size: Cells per batch.
        """
        # A sum per cell: rounding in a matrix product depends on the other cells of the batch.
        return (self.embed_cells(adata, choice, None, batch_size) * middle(places)).sum(axis=1, keepdims=True)

    def add_search(
        self,
        adata: Any,
        choice: InputChoice,
        columns: np.ndarray,
        text: str | Sequence[str] | None,
        top_k: int,
        by: str = "similarity",
        key_added: str | None = None,
        like: Sequence[str] | None = None,
    ) -> list[list[dict[str, Any]]]:
        """The `top_k` hits of each text, or of example cells; scores of the first text are added as `obs[key_added]`.

        Args:
            adata: All the data.
            choice: Matrix and genes.
            columns: The result of [`search_cells`] for all cells; without a text, of [`compare_with_cells`].
            text: The search texts; None to search by example cells.
            top_k: Number of hits.
            by: As in [`search_cells`].
            key_added: Name of the new column, or None.
            like: Names of the example cells, which are no hits.

        Returns:
            For each text a list of hits: `rank`, `cell`, `index`, `score`, `z`, and `warning` for an unknown text.
        """
        finish_report(choice.report)
        if text is None:
            if key_added is not None:
                adata.obs[key_added] = columns[:, 0]
                done = {"like": np.asarray(like, dtype=object), "key": key_added}
                self._record(adata, "scmmgpt", choice.report, search=done)
            return [_best_hits(columns[:, 0], adata.obs.index, top_k, set(map(str, like or ())))]
        texts = [text] if isinstance(text, str) else list(text)
        plan = self._search_plan(texts, choice)
        if plan.absent:
            logger.warning(f"The file does not measure {', '.join(plan.absent)}: the search has no counts to compare.")
        if plan.unknown:
            logger.warning(
                f"The checkpoint has no gene {', '.join(plan.unknown)}: the search treats such a word as text."
            )
        strange = self.warn_of_strange(texts)
        scores = columns if by == "genes" else plan.scores(columns)
        if key_added is not None:
            adata.obs[key_added] = scores[:, 0]
            done = {"text": texts[0], "by": by, "key": key_added}
            self._record(adata, "scmmgpt", choice.report, search=done)
        hits_of_texts = [_best_hits(column, adata.obs.index, top_k) for column in scores.T]
        warned = ((hits, strange.get(text)) for text, hits in zip(texts, hits_of_texts, strict=True))
        return [[hit | {"warning": warning} for hit in hits] if warning else hits for hits, warning in warned]

    def warn_of_strange(self, texts: Sequence[str]) -> dict[str, str]:
        """Log a warning for each text without a word that the checkpoint knows; return text -> warning."""
        known = vocabulary_of(self.model.config.annotation or {})
        if len(known) < MIN_VOCABULARY:
            return {}
        warnings = {
            text: f"The checkpoint knows no word of {textwrap.shorten(text, SHOWN_TEXT, placeholder=' ...')!r}: no "
            "type, tissue or state, and no gene (genes are in capitals). The order of the cells may mean nothing."
            for text in texts
            if not is_understood(text, known, self.processor.gene_index)
        }
        for message in warnings.values():
            logger.warning(message)
        return warnings

    def _markers_named(self, texts: list[str], measured: np.ndarray) -> list[np.ndarray]:
        """Vocabulary ids of the markers of the type that each text names; empty for a text that names no type."""
        members, _, _, profiles = self.meanings([ARTICLE.sub("", text.strip(" .")) for text in texts])
        explainer = Explainer.of(self._bridge().label_readout, measured, members, profiles)
        markers = explainer.markers[: len(texts)]
        return [explainer.panel.gene_ids[row[row != NONE]] for row in markers]

    def _search_plan(self, texts: list[str], choice: InputChoice) -> Search:
        return Search(texts, self.processor.gene_index, choice.match.measured)

    def _search_scores(
        self, texts: list[str], by: str, choice: InputChoice, placed: bool = False
    ) -> tuple[CellFunction, torch.Tensor | None]:
        """The function of a batch of cells that gives the columns of [`search_cells`], and features of the texts.

        With `placed`, the function leaves out similarities in the shared space, and the features of the texts are
        returned for the caller to add these similarities. The features are None if the search does not use the space.
        """
        if by == "genes":
            states = text_states(self._bridge(), self.processor, texts)
            readout, measured = self._bridge().label_readout, choice.match.measured
            genes = GeneSearch.of(readout, measured, states, self._markers_named(texts, measured))
            return lambda cells: (torch.from_numpy(genes(cells)),), None
        plan, bridge = self._search_plan(texts, choice), self._bridge()
        if not plan.texts:  # expression alone decides
            return lambda cells: (torch.from_numpy(plan.expression(cells)),), None
        stored = self.model.config.annotation or {}
        if bridge.config.profile_readout and stored.get("similarity_weight") == 0:  # fine-tuning chose the readout
            panel = bridge.label_readout.for_genes(choice.match.measured)
            trained = self.model.config.label_readout["texts"]
            of_labels = mean_similarity(bridge, self.processor, plan.texts, trained, panel)
            return lambda cells: (torch.from_numpy(of_labels(cells)), torch.from_numpy(plan.expression(cells))), None
        text_features = encode_texts(bridge, self.processor, plan.texts)
        features_of, of_types = self.features_of(choice), self._types_named(plan.texts, choice.match.measured)

        def similarity(cells: Cells) -> tuple[torch.Tensor, ...]:
            score = of_types(cells)
            if not placed:
                score = score.to(text_features) + cell_text_similarity(features_of(cells), text_features)
            return score, torch.from_numpy(plan.expression(cells))

        return similarity, text_features

    def _types_named(self, texts: Sequence[str], measured: np.ndarray) -> Callable[[Cells], torch.Tensor]:
        """Cells -> total probability of the types that each text names, `(n_cells, n_texts)`; 0 for none.

        The shared space has no place for profiled types such as goblet cells, and knows other names of trained labels
        ("insulin-secreting cell") by their words alone. Profiled types compete with the trained labels as in
        `annotate --labels`.
        """
        of_text, trained = [self.profiles_named(text) for text in texts], [self._labels_named(text) for text in texts]
        named = sorted({number for numbers in of_text for number in numbers})
        if not named and not any(trained):
            return lambda cells: torch.zeros(len(cells), len(texts))
        panel, n_labels = self._bridge().label_readout.for_genes(measured, named), len(self._readout_columns())
        shares = torch.zeros(n_labels + len(named), len(texts))
        for text, (labels, numbers) in enumerate(zip(trained, of_text, strict=True)):
            shares[[*labels, *(n_labels + named.index(number) for number in numbers)], text] = 1
        return lambda cells: torch.from_numpy(panel(cells)).exp() @ shares

    def _labels_named(self, text: str) -> list[int]:
        """Columns of the trained labels that a text means, in any name of the type or of a broader type.

        The text may name a place: "B lymphocytes from blood".
        """
        if self.model.config.label_readout is None:
            return []
        name, n_labels = ARTICLE.sub("", text.strip(" .")), len(self._readout_columns())
        for words in (name, PLACE.sub("", name)):
            meant = [] if PROSE.search(words) else np.flatnonzero(self.meanings([words])[0][0, :n_labels]).tolist()
            if meant:
                return meant
        return []

    def profiles_named(self, text: str) -> list[int]:
        """Numbers of the profiled types that a text names."""
        types = (self.model.config.annotation or {}).get("profiles", [])
        return [number for number, profiled in enumerate(types) if names_known_type(text, profiled["names"], [])]

    def features_of(self, choice: InputChoice) -> Callable[[Cells], torch.Tensor]:
        """Cells -> features in the shared space. If labels have features, the readout for the file's genes is used."""
        bridge = self._bridge()
        places = "feature_width" in (bridge.config.label_readout or {})
        panel = bridge.label_readout.for_genes(choice.match.measured) if places else None

        def features(cells: Cells) -> torch.Tensor:
            inputs = self._inputs(cells)
            if panel is not None:
                inputs["readout_scores"] = torch.from_numpy(panel(cells)).to(self.device)
            return bridge.get_cell_features(**inputs)

        return features


def middle(places: np.ndarray) -> np.ndarray:
    """The mean of embeddings `(n, width)`, scaled to unit length, `(width,)`."""
    mean = places.mean(axis=0)
    return mean / max(float(np.linalg.norm(mean)), 1e-12)


def _best_hits(similarity: np.ndarray, names: Any, top_k: int, without: Collection[str] = ()) -> list[dict[str, Any]]:
    order = np.argsort(-similarity, kind="stable")[: top_k + len(without)].tolist()
    best = enumerate([i for i in order if not without or str(names[i]) not in without][:top_k], start=1)
    exact = similarity.astype(np.float64)
    z = (exact - exact.mean()) / max(exact.std(), 1e-9)
    return [
        {
            "rank": rank,
            "cell": str(names[i]),
            "index": i,
            "score": round(float(similarity[i]), 6),
            "z": round(float(z[i]), 3),
        }
        for rank, i in best
    ]
