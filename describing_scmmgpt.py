"""Descriptions of cells: by the language model, or by counts with proof."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from .annotation_scmmgpt import choose_labels
from .conversion_scmmgpt import InputChoice
from .evidence_scmmgpt import NONE, Explainer, label_members
from .expression_scmmgpt import Expression
from .judging_scmmgpt import EvidenceSteps
from .labelling_scmmgpt import Labelling
from .labels_scmmgpt import UNKNOWN, normalize_label
from .passes_scmmgpt import uncounted
from .proof_scmmgpt import (
    MIN_SCORE,
    TRACE,
    TRACE_ON_SLIDE,
    Proof,
    article,
    excluded_lineages,
    terms_above,
    tissues_of,
)
from .proposals_scmmgpt import Proposals
from .records_scmmgpt import MISSING, clusters_of, finish_report, table_of


logger = logging.get_logger(__name__)


UNLIKELY = -30.0  # log probability of a label that a cell is not called by


class DescriptionSteps(EvidenceSteps):
    """The steps of [`ScMMGPTPipeline.describe`]."""

    def describe_cells(
        self,
        adata: Any,
        choice: InputChoice,
        prompt: str,
        options: dict[str, Any],
        called: Mapping[str, np.ndarray] | None = None,
        batch_size: int | None = None,
    ) -> np.ndarray:
        """Answers of the language model to `prompt`, str `(n_cells,)`; `options` are for the model's `generate`.

        With `called`, what [`called_types`] has, an answer keeps to it: a language model that reads labels is given
        the label that the cell is called by, and a cell of a type that the language model does not know, or for which
        it names another type, gets a sentence with its type.
        """
        model = self._language_model("describe")
        reads_labels = self.model.config.cell_tokens != "queries"
        panel = model.model.label_readout.for_genes(choice.match.measured) if reads_labels else None
        # Without queries, the cells of a label are one input: each label is described once, unless words are drawn.
        once = self.model.config.cell_tokens == "labels" and not options["do_sample"]
        chunks, batch_size = self._chunks(adata, choice), self._batch_size(batch_size, 128 if once else 16)
        n_cells = choice.report["cells"]["cells"]
        texts = np.full(n_cells, "", dtype=object)
        labels = None if called is None else self._labels_called(called)
        described: dict[int, str] = {}  # of labels, or of rows
        for rows, cells in self._batches(chunks, batch_size, "Describing", n_cells):
            if labels is not None:
                known = labels[rows] >= 0
                rows, cells = rows[known], cells[np.flatnonzero(known)]
            scores = None if panel is None or labels is not None else panel(cells)
            if reads_labels and labels is not None:
                scores = np.where(np.eye(len(self._readout_columns()), dtype=bool)[labels[rows]], 0.0, UNLIKELY)
                scores = scores.astype(np.float32)
            kinds = rows if scores is None or not once else scores.argmax(axis=1)
            firsts = np.sort(np.unique(kinds, return_index=True)[1])
            new = np.array([row for row in firsts if kinds[row] not in described], dtype=np.int64)
            if len(new):
                inputs = self.processor(text=[prompt] * len(new), cells=cells[new]).to(self.device)
                if scores is not None:
                    inputs["readout_scores"] = torch.from_numpy(scores[new]).to(self.device)
                with torch.inference_mode():
                    ids = model.generate(**inputs, **options)  # type: ignore[misc]
                words = self.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
                described |= zip(kinds[new].tolist(), (text.strip() for text in words), strict=True)
            texts[rows] = [described[kind] for kind in kinds.tolist()]
        if called is None or labels is None:
            return texts
        names_type = self.model.config.cell_tokens == "labels" and prompt == self._prompt(None)
        return self._kept_to(called, labels, texts, names_type)

    def _labels_called(self, called: Mapping[str, np.ndarray]) -> np.ndarray:
        """The column of the readout of the one trained label that each cell is called by, int64; -1 for none.

        A type that has a profile alone is none, also where it is a kind of one trained label.
        """
        names, numbers = np.unique(np.asarray(called["cell_type"]).astype(str), return_inverse=True)
        members = self.meanings(names.tolist())[0]
        columns = np.where(members.sum(axis=1) == 1, members.argmax(axis=1), NONE)
        columns = np.where(columns < len(self._readout_columns()), columns, NONE)[numbers]
        return np.where(called.get("by_profile", False), NONE, columns)

    def _kept_to(
        self, called: Mapping[str, np.ndarray], labels: np.ndarray, texts: np.ndarray, names_type: bool
    ) -> np.ndarray:
        """The texts of cells that agree with their types (see [`agrees`]), else the types in words."""
        known, terms = list(self._readout_columns()), (self.model.config.annotation or {}).get("terms", [])
        by_profile = called.get("by_profile", np.zeros(len(texts), dtype=bool))
        other = np.zeros(len(texts), dtype=bool)
        for text, label in set(zip(texts.tolist(), labels.tolist(), strict=True)):
            if label >= 0 and not agrees(text, known[label], known, terms, names_type):
                other |= (texts == text) & (labels == label)
        if other.any():
            first = int(other.argmax())
            logger.warning(
                f"The language model does not name the type of {int(other.sum()):,} of {len(texts):,} cells (for "
                f"{known[labels[first]]!r} it writes {texts[first]!r}): they are described by their type."
            )
        for row in np.flatnonzero(other | (labels < 0)):
            texts[row] = type_in_words(str(called["cell_type"][row]), bool(by_profile[row]))
        return texts

    def _describe_with_proof(
        self, adata: Any, cluster_key: str | None, key_added: str, batch_size: int, read_kwargs: dict[str, Any]
    ) -> Any:
        """[`describe`] by counts. All cells are in memory."""
        if not self.can_explain:
            raise ValueError("This checkpoint has no label readout, whose genes are the proof of a description.")
        clusters = None if cluster_key is None else clusters_of(adata.obs, cluster_key)
        choice = self.processor.choose_input(adata, **read_kwargs)
        proof = self.prove(adata, choice, key_added, batch_size)
        adata.obs[f"{key_added}_description"] = proof.texts().astype(str)
        groups = list(proof.group_rows("label", np.where(proof.asked == "", "Unknown", proof.asked)))
        if clusters is not None:
            groups += (row for row in proof.group_rows("cluster", clusters) if row["name"] != MISSING)
        done = {"proof": True, "clauses": table_of(proof.rows(adata.obs_names)), "groups": table_of(groups)}
        return self._record(adata, key_added, choice.report, describe=done)

    def prove(
        self, adata: Any, choice: InputChoice, key_added: str = "scmmgpt", batch_size: int | None = None
    ) -> Proof:
        """The proof of [`describe`]: what it needs of all cells is computed, the text of a cell when it is asked for.

        The cells stay in memory with it.
        """
        labelling = self.read_batch(adata, self.labelling(choice, self.annotation_settings()))
        columns, scores = self.label_cells(adata, labelling)
        for warning in self.summarize(labelling, columns, scores)[1]:
            logger.warning(warning)
        called = self.called_types(adata, choice, key_added, columns)["cell_type"].astype(str)
        kind_names = self._types_to_prove(called, np.asarray(scores), labelling)
        kinds, kind_of_cell = np.unique(kind_names, return_inverse=True)
        members, known, terms, profiles = self.meanings(kinds.tolist())
        members[members.sum(axis=1) > len(known) / 2] = False  # a term of most labels says nothing
        names = labelling.candidates.names
        probabilities = np.zeros((len(kind_of_cell), len(known)), dtype=np.float32)
        probabilities[:, [known[name] for name in names if name in known]] = np.asarray(scores)[
            :, [name in known for name in names]
        ]

        parts = list(self._chunks(adata, uncounted(choice)))
        cells = type(parts[0]).concatenate(parts)
        finish_report(choice.report)
        explainer = Explainer.of(self._bridge().label_readout, choice.match.measured, members, profiles)
        genes = np.unique(choice.match.measured)
        asked = genes, kinds.tolist(), list(known), kind_of_cell, probabilities
        proposals = Proposals(cells, explainer, *asked, self._batch_size(batch_size, 512))
        expression = Expression(cells, genes, self.processor.gene_symbols(genes.tolist()))
        typed = np.where(members.any(axis=1), kinds, "")[kind_of_cell].astype(object)
        within = {name: terms_above(mine, known, terms) for name, mine in zip(kinds.tolist(), members, strict=True)}
        excluded = {
            name: excluded_lineages(mine, known, terms) for name, mine in zip(kinds.tolist(), members, strict=True)
        }
        words = np.where(called == UNKNOWN, "none", called)
        elsewhere = self._rates_elsewhere(dict(zip(kinds.tolist(), members, strict=True)), list(known), genes)
        trace = TRACE_ON_SLIDE if "spatial" in adata.obsm else TRACE
        return Proof(expression, typed, proposals, within, excluded, tissues_of(adata.obs), words, elsewhere, trace)

    def _rates_elsewhere(
        self, members: Mapping[str, np.ndarray], labels: Sequence[str], genes: np.ndarray
    ) -> dict[str, np.ndarray]:
        """The highest mean counts per 10,000 of genes in the types of the checkpoint that are not of a kind.

        Args:
            members: Kind -> labels of it, bool `(n_labels,)`.
            labels: Trained ones, and types that have a profile alone.
            genes: int64 `(n_genes,)`, ascending vocabulary ids.

        Returns:
            Kind -> float `(n_genes,)`; nothing where the checkpoint keeps no groups of cells.
        """
        readout = self._bridge().label_readout
        if not readout.num_groups:
            return {}
        types = [str(known["name"]) for known in (self.model.config.annotation or {}).get("profiles", [])]
        names, logs = [*list(self._readout_columns()), *types], readout.mean_profiles()
        rates = np.zeros((len(names), len(genes)), dtype=np.float32)
        ids = readout.gene_ids.cpu().numpy()
        here = np.isin(ids, genes)
        rates[:, np.searchsorted(genes, ids[here])] = np.expm1(logs[: len(names), here])
        of_kind = {
            kind: np.isin(names, [label for label, is_one in zip(labels, mine, strict=True) if is_one])
            for kind, mine in members.items()
        }
        return {kind: rates[~mine].max(axis=0, initial=0.0) for kind, mine in of_kind.items()}

    def _types_to_prove(self, called: np.ndarray, scores: np.ndarray, labelling: Labelling) -> np.ndarray:
        """The type of each cell, str `(n_cells,)`: as it is called, broader where that is not probable enough.

        "" where no broader type is probable either, or where the cell is unknown.
        """
        names, terms = labelling.candidates.names, labelling.broader
        kinds, kind_of_cell = np.unique([*called, UNKNOWN], return_inverse=True)
        columns = {name: column for column, name in enumerate(names)}
        members = label_members(kinds.tolist(), columns, terms)
        of_cell = members[kind_of_cell[:-1]]
        low = of_cell.any(axis=1) & ((scores * of_cell).sum(axis=1) < MIN_SCORE)
        broader = choose_labels(scores, names, {}, MIN_SCORE, None, terms)["cell_type"]
        above = label_members(np.unique(broader).tolist(), columns, terms)[np.unique(broader, return_inverse=True)[1]]
        broader = np.where((of_cell & ~above).any(axis=1) | (broader == UNKNOWN), "", broader)
        return np.where(called == UNKNOWN, "", np.where(low, broader, called)).astype(str)

    def _prompt(self, question: str | None) -> str:
        if question is None:
            return self.processor.render_prompt("describe")
        if not question.strip():
            raise ValueError("The prompt is empty; pass a question about the cell, or no prompt.")
        token = self.processor.cell_token
        if question.count(token) > 1:
            raise ValueError(f"The prompt names {question.count(token)} cells ({token}); name one, the cell of a row.")
        return self.processor.render_question(question if token in question else f"{token}\n{question}")

    def label_prompts(self) -> dict[str, str]:
        """Label -> a prompt of its type alone, of the kind that the checkpoint was trained on.

        States of cells are fitted to texts of which some name the type alone. Without states, the stored text, which
        also has the definition, is among the captions of most templates.
        """
        if not (self.model.config.annotation or {}).get("labels"):
            raise ValueError(
                "This checkpoint stores no labels to generate. `scmmgpt calibrate CELLS --model CHECKPOINT` stores "
                "those of labelled cells; or say in words what to generate."
            )
        texts = self.annotation_settings()["labels"]
        if self.model.config.num_state_components is None:
            return texts
        return {label: f"{text.split('. ')[0].removesuffix('.')}." for label, text in texts.items()}


def type_in_words(name: str, by_profile: bool = False) -> str:
    """A sentence with the type of a cell.

    >>> type_in_words("hepatocyte", by_profile=True)
    'This cell is a hepatocyte, by the reference profile of the type.'
    """
    if name in (UNKNOWN, ""):
        return "The type of this cell is unknown."
    return f"This cell is {article(name, 'a')}{', by the reference profile of the type' * by_profile}."


def agrees(
    text: str, label: str, known: Sequence[str], terms: Sequence[Mapping[str, Any]], names_type: bool = False
) -> bool:
    """Whether a text names a trained label or a type above it, or no type at all; with `names_type` the label alone.

    Args:
        text: Of a cell.
        label: The trained label of the cell.
        known: All trained labels.
        terms: As for [`trained_labels_of`].
        names_type: Whether the text has to name the label.

    >>> terms = [{"id": "CL:0000084", "names": ["t cell"], "labels": ["CD4 T cell", "CD8 T cell"]}]
    >>> [agrees(text, "CD4 T cell", ["CD4 T cell", "CD8 T cell", "B cell"], terms)
    ...  for text in ("CD4 T cells.", "It is a T cell.", "A CD8 T cell.", "It is active.")]
    [True, True, False, True]
    """
    meant = {_singular(name): {name} for name in known}
    for term in terms:
        for name in term["names"] if len(term["labels"]) < len(known) else ():
            meant.setdefault(_singular(name), set(term["labels"]))
    words, found = f" {_singular(text)} ", []
    for name in sorted(meant, key=len, reverse=True):  # "CD8 T cell" names no T cell of another kind
        if f" {name} " in words:
            words = words.replace(f" {name} ", "  ")
            found.append(meant[name])
    return {label} in found if names_type else not found or any(label in labels for labels in found)


def _singular(text: str) -> str:
    return " ".join(word.removesuffix("s") for word in normalize_label(text).split())
