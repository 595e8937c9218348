"""Descriptions of cells: by the language model, or by counts with proof."""

from typing import Any

import numpy as np
import torch
from transformers.utils import logging


try:  # as a package or as remote code
    from .conversion_scmmgpt import InputChoice
    from .evidence_scmmgpt import Explainer, label_members
    from .judging_scmmgpt import EvidenceSteps
    from .labels_scmmgpt import UNKNOWN
    from .passes_scmmgpt import uncounted
    from .proof_scmmgpt import MIN_SCORE, Expression, Proof, excluded_lineages, propose, terms_above, tissues_of
    from .records_scmmgpt import MISSING, finish_report, table_of, words_of
except ImportError:  # as a flat module in a clone
    from conversion_scmmgpt import InputChoice
    from evidence_scmmgpt import Explainer, label_members
    from judging_scmmgpt import EvidenceSteps
    from labels_scmmgpt import UNKNOWN
    from passes_scmmgpt import uncounted
    from proof_scmmgpt import MIN_SCORE, Expression, Proof, excluded_lineages, propose, terms_above, tissues_of
    from records_scmmgpt import MISSING, finish_report, table_of, words_of


logger = logging.get_logger(__name__)


class DescriptionSteps(EvidenceSteps):
    """The steps of [`ScMMGPTPipeline.describe`]."""

    def describe_cells(
        self, adata: Any, choice: InputChoice, prompt: str, options: dict[str, Any], batch_size: int | None = None
    ) -> np.ndarray:
        """Answers of the language model to `prompt`, str `(n_cells,)`; `options` are for the model's `generate`."""
        model = self._language_model("describe")
        reads_labels = self.model.config.cell_tokens != "queries"
        panel = model.model.label_readout.for_genes(choice.match.measured) if reads_labels else None
        # Without queries, the cells of a label are one input: each label is described once, unless words are drawn.
        once = self.model.config.cell_tokens == "labels" and not options["do_sample"]
        chunks, batch_size = self._chunks(adata, choice), self._batch_size(batch_size, 128 if once else 16)
        texts = np.empty(choice.report["cells"]["cells"], dtype=object)
        described: dict[int, str] = {}  # of labels, or of rows
        for rows, cells in self._batches(chunks, batch_size, "Describing", len(texts)):
            scores = None if panel is None else panel(cells)
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
        return texts

    def warn_of_novel_cells(self, adata: Any, choice: InputChoice) -> None:
        """Warn of cells of no trained type: the language model reads the likest one all the same."""
        readout = getattr(self._bridge(), "label_readout", None)
        if readout is None or not readout.num_others:
            return
        labelling = self.labelling(uncounted(choice), self.annotation_settings())
        columns, _ = self.label_cells(adata, labelling)
        novel = (columns["cell_type"] == UNKNOWN) | columns.get("by_profile", False)
        if number := int(novel.sum()):
            logger.warning(
                f"{number:,} of {len(novel):,} cells are like no type that the checkpoint was trained on. The "
                "language model describes such a cell as the likest of these types. `annotate` says which cells they "
                "are, and `describe --proof` writes what the counts show."
            )

    def _describe_with_proof(
        self, adata: Any, cluster_key: str | None, key_added: str, batch_size: int, read_kwargs: dict[str, Any]
    ) -> Any:
        """[`describe`] by counts. All cells are in memory."""
        if not self.can_explain:
            raise ValueError("This checkpoint has no label readout, whose genes are the proof of a description.")
        clusters = None if cluster_key is None else words_of(adata.obs, cluster_key)
        choice = self.processor.choose_input(adata, **read_kwargs)
        labelling = self.labelling(choice, self.annotation_settings(), min_score=MIN_SCORE)
        columns, scores = self.label_cells(adata, labelling)
        for warning in self.summarize(labelling, columns, scores)[1]:
            logger.warning(warning)
        terms, known = (self.model.config.annotation or {}).get("terms", []), self._readout_columns()
        kinds, kind_of_cell = np.unique(np.asarray(columns["cell_type"]).astype(str), return_inverse=True)
        members = label_members(kinds.tolist(), known, terms)
        members[members.sum(axis=1) > len(known) / 2] = False  # a term of most labels says nothing
        names = labelling.candidates.names
        readout_columns = [known[name] for name in names if name in known]
        probabilities = np.zeros((len(kind_of_cell), len(known)), dtype=np.float32)
        probabilities[:, readout_columns] = np.asarray(scores)[:, [name in known for name in names]]

        parts = list(self._chunks(adata, uncounted(choice)))
        cells = type(parts[0]).concatenate(parts)
        finish_report(choice.report)
        explainer = Explainer.of(self._bridge().label_readout, choice.match.measured, members)
        genes = np.unique(choice.match.measured)
        words = genes, kinds.tolist(), list(known)
        proposed = propose(cells, explainer, *words, kind_of_cell, probabilities, batch_size)
        expression = Expression(cells, genes, self.processor.gene_symbols(genes.tolist()))
        typed = np.where(members.any(axis=1), kinds, "")[kind_of_cell].astype(object)
        within = {name: terms_above(mine, known, terms) for name, mine in zip(kinds.tolist(), members, strict=True)}
        excluded = {
            name: excluded_lineages(mine, known, terms) for name, mine in zip(kinds.tolist(), members, strict=True)
        }
        proved = Proof(expression, typed, *proposed, within, excluded, tissues_of(adata.obs))
        adata.obs[f"{key_added}_description"] = proved.texts().astype(str)
        groups = list(proved.group_rows("label", np.where(typed == "", "Unknown", typed)))
        if clusters is not None:
            groups += (row for row in proved.group_rows("cluster", clusters) if row["name"] != MISSING)
        done = {"proof": True, "clauses": table_of(proved.rows(adata.obs_names)), "groups": table_of(groups)}
        return self._record(adata, key_added, choice.report, describe=done)

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
