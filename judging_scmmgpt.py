"""Labels against the genes of the cells: the evidence for a label, and the audit of labels that cells were given."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from transformers.utils import logging

from .audit_scmmgpt import Audit, judge
from .conversion_scmmgpt import InputChoice
from .evidence_scmmgpt import Evidence, Explainer, label_members
from .labelling_scmmgpt import Labelling, LabellingSteps
from .labels_scmmgpt import UNKNOWN, profiled_types, with_types
from .passes_scmmgpt import uncounted
from .records_scmmgpt import MISSING, add_column, finish_report, table_of


logger = logging.get_logger(__name__)


class EvidenceSteps(LabellingSteps):
    """The steps of [`ScMMGPTPipeline.explain`] and of [`ScMMGPTPipeline.audit`]."""

    @property
    def can_explain(self) -> bool:
        """Whether the checkpoint has a label readout, which [`explain`] takes its terms from."""
        return getattr(self._bridge(), "label_readout", None) is not None

    def explain_cells(
        self,
        adata: Any,
        choice: InputChoice,
        labels: np.ndarray,
        sets: np.ndarray,
        clusters: np.ndarray | None = None,
        batch_size: int | None = None,
    ) -> Evidence:
        """Evidence for the labels of cells: of all the data that `choice` was made for, or of a part of them.

        `sets` are all labels of the data, sorted.
        """
        evidence = self.evidence_of(choice, labels, sets, clusters)
        chunks, batch_size = self._chunks(adata, choice), self._batch_size(batch_size, 512)
        for rows, cells in self._batches(chunks, batch_size, "Explaining", len(labels)):
            evidence.add(rows, cells)
        return evidence

    def evidence_of(
        self,
        choice: InputChoice,
        labels: np.ndarray,
        sets: np.ndarray,
        clusters: np.ndarray | None = None,
        called: np.ndarray | None = None,
    ) -> Evidence:
        """The evidence of [`explain_cells`], to which no cell is added yet; `called` as for [`meanings`]."""
        if not self.can_explain:
            raise ValueError(
                "This checkpoint has no label readout, whose terms are the evidence for a label. Train one with "
                "`python -m scmmgpt.train finetune` or `align`."
            )
        members, known, _, profiles = self.meanings(sets.tolist(), None if called is None else called.tolist())
        explainer = Explainer.of(self._bridge().label_readout, choice.match.measured, members, profiles)
        numbers = np.searchsorted(sets, labels)
        return Evidence(explainer, sets.tolist(), numbers, list(known), clusters, self.processor.gene_symbols)

    def add_evidence(
        self,
        adata: Any,
        choice: InputChoice,
        evidence: Evidence,
        columns: dict[str, np.ndarray],
        label_key: str,
        key_added: str = "scmmgpt",
    ) -> Evidence:
        """Add the columns of the evidence of all cells to `adata`, and the genes of each label."""
        finish_report(choice.report)
        for name, values in columns.items():
            add_column(adata, f"{key_added}_{name}", values)
        table = table_of(row for row in evidence.group_rows() if row["level"] == "label")
        self._record(adata, key_added, choice.report, explain={"label_key": label_key, **table})
        return evidence

    def audit_cells(
        self,
        adata: Any,
        labelling: Labelling,
        given: np.ndarray,
        sets: np.ndarray,
        batch_size: int | None = None,
    ) -> dict[str, np.ndarray]:
        """What [`add_audit`] needs of cells: of all the data that `labelling` was made for, or of a part of them.

        `given` are the labels of these cells, `sets` all labels of the data, sorted. `labelling` is that of
        `annotate`, after [`read_batch`]. Types that `sets` name by a profile alone compete as in `annotate --labels`.
        """
        choice = labelling.choice
        columns, probabilities = self.label_cells(adata, labelling, batch_size)
        wide, types = self._audit_labelling(choice, sets)
        if types:
            _, probabilities = self.label_cells(adata, replace(wide, choice=uncounted(choice)), batch_size)
        names, terms = wide.candidates.names, with_types((self.model.config.annotation or {}).get("terms", []), types)
        set_of_cell = np.searchsorted(sets, given)
        members = label_members(sets.tolist(), {name: i for i, name in enumerate(names)}, terms, stored)
        best, odds = judge(probabilities, members, set_of_cell)
        novel = np.asarray(columns.get("novelty", np.zeros(len(given)))) > 1
        if "by_profile" in columns:  # like no trained label: judged by a label that is such a type, too
            by_type: Any = members[:, np.isin(names, [str(known["name"]) for known in types])].any(axis=1)
            novel = np.where(columns["by_profile"], ~by_type[set_of_cell], novel)
        genes, marker_odds = np.full(len(given), "", dtype=object), np.full(len(given), np.nan, dtype=np.float32)
        if self.can_explain:
            of_readout, known, _, profiles = self.meanings(sets.tolist())
            explainer = Explainer.of(self._bridge().label_readout, choice.match.measured, of_readout, profiles)
            symbols = np.asarray([*self.processor.gene_symbols(explainer.panel.gene_ids.tolist()), ""], dtype=object)
            readout_columns = np.array([*(known.get(name, -1) for name in names), -1], dtype=np.int64)[best]
            usable: np.ndarray = (readout_columns >= 0) & of_readout[set_of_cell].any(axis=1)
            own = np.where(usable, readout_columns + explainer.first_label, 0)
            chunks, size = self._chunks(adata, uncounted(choice)), self._batch_size(batch_size, 512)
            for rows, cells in self._batches(chunks, size, "Auditing", len(given)):
                rivals = np.where(usable[rows], set_of_cell[rows], -1)
                found, (at, positions, values, _) = explainer(cells, own[rows], rivals)
                odds[rows[np.bincount(at, minlength=len(rows)) == 0]] = np.nan  # nothing is measured in these cells
                words = [", ".join(row[row != ""]) for row in symbols[found.genes]]
                genes[rows] = words
                odds_of = explainer.marker_odds(at, positions, values, own[rows], set_of_cell[rows])
                marker_odds[rows] = np.where(usable[rows], odds_of, np.nan)
        columns = {name: columns[name] for name in ("cell_type", "entropy", "novelty") if name in columns}
        columns["suggested"] = np.asarray([*names, ""], dtype=str)[best]
        return {**columns, "novel": novel, "odds": odds, "marker_odds": marker_odds, "genes": genes.astype(str)}

    def _audit_labelling(self, choice: InputChoice, sets: np.ndarray) -> tuple[Labelling, list[Mapping[str, Any]]]:
        """The labels that compete with given ones, and the types among them that have a profile and no cells."""
        settings, stored = self.annotation_settings(), self.model.config.annotation or {}
        labels, types = {name: name for name in sets.tolist()}, stored.get("profiles", [])
        asked = profiled_types(labels, settings["cl_ids"], settings["labels"], types)
        settings["labels"] |= {str(types[number]["name"]): text for text, number in asked.items()}
        return self.labelling(choice, settings, not asked), [types[number] for number in asked.values()]

    def add_audit(
        self,
        adata: Any,
        choice: InputChoice,
        label_key: str,
        given: np.ndarray,
        columns: dict[str, np.ndarray],
        clusters: np.ndarray | None = None,
        key_added: str = "scmmgpt",
    ) -> Audit:
        """Add the verdicts on the given labels of all cells to `adata`, from the columns of [`audit_cells`]."""
        labelling, sets = self.labelling(choice, self.annotation_settings()), np.unique(given)
        wide, types = self._audit_labelling(choice, sets)
        finish_report(choice.report)
        for warning in self.summarize(labelling, columns)[1]:
            logger.warning(warning)
        names, terms = wide.candidates.names, with_types((self.model.config.annotation or {}).get("terms", []), types)
        members = label_members(sets.tolist(), {name: i for i, name in enumerate(names)}, terms, stored)
        called = np.asarray(columns["cell_type"])
        if n_missing := int((given == MISSING).sum()):
            logger.warning(f"obs[{label_key!r}] has no label of {n_missing} of {len(given)} cells: not judged.")
        if strange := sets[~members.any(axis=1) & (sets != MISSING) & (sets != UNKNOWN)].tolist():
            found, n_called = np.unique(called[given == strange[0]], return_counts=True)
            logger.warning(
                f"{len(strange)} of {(sets != MISSING).sum()} labels of obs[{label_key!r}] mean no type that the "
                f"checkpoint knows ({', '.join(map(repr, strange[:3]))}; it knows {', '.join(map(repr, names[:3]))}, "
                "...): their cells are not judged. Rename them to a type, a synonym or an id of the Cell Ontology; of "
                f"{strange[0]!r} {n_called.max() / n_called.sum():.0%} are called {str(found[n_called.argmax()])!r}."
            )
        judged = {name: columns[name] for name in ("suggested", "odds", "marker_odds", "genes", "novel")}
        audit = Audit(given=given, called=called, clusters=clusters, **judged)
        columns_of = {"audit": audit.verdict, "audit_score": audit.score, "audit_suggested": audit.suggested}
        for name, values in {**columns_of, "audit_genes": audit.genes}.items():
            add_column(adata, f"{key_added}_{name}", values)
        done = {name.replace(" ", "_"): n for name, n in audit.summary().items()}
        self._record(adata, key_added, choice.report, audit={"label_key": label_key, **done})
        return audit
