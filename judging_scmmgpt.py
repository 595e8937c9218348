"""The steps of `explain` (genes behind a label) and of `audit` (check of given labels)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from transformers.utils import logging

from .audit_scmmgpt import Audit, judge, log_pooled, nested_sets
from .cells_scmmgpt import Cells
from .conversion_scmmgpt import InputChoice
from .crossfit_scmmgpt import FileRegression, best_other_label
from .evidence_scmmgpt import Evidence, Explainer, label_members
from .labelling_scmmgpt import Labelling, LabellingSteps, read_ranges
from .labels_scmmgpt import UNKNOWN, profiled_types, with_types
from .passes_scmmgpt import uncounted
from .records_scmmgpt import MISSING, add_column, finish_report, some_of, table_of


logger = logging.get_logger(__name__)

FITTED_CELLS, BELIEF_CELLS = 4096, 1024  # cells, at most, for the regression of the given labels, and for its weight
RARE_CELLS = 30  # cells of each label for the regression, if available: five folds of six cells
ROWS_AT_ONCE = 64  # adjacent rows of one read
CELLS_AT_ONCE = 512  # cells of one array of cells x labels: a file may have hundreds of labels


def spread_rows(total: int, most: int) -> list[tuple[int, int]]:
    """Ranges of `ROWS_AT_ONCE` rows, evenly spaced over the data, about `most` rows in all; one range if all rows fit.

    >>> spread_rows(50, 1024), spread_rows(1000, 128)
    ([(0, 50)], [(0, 64), (936, 1000)])
    """
    if total <= most:
        return [(0, total)]
    starts = np.linspace(0, total - ROWS_AT_ONCE, most // ROWS_AT_ONCE).astype(np.int64)
    return [(start, start + ROWS_AT_ONCE) for start in starts.tolist()]


def rows_of_rare(numbers: np.ndarray, ranges: Sequence[tuple[int, int]], most: int) -> list[tuple[int, int]]:
    """More rows for rare labels, as ranges of one row, so that every label has `RARE_CELLS` cells, or all its cells.

    Args:
        numbers: int64 `(n_cells,)`: the number of each cell's label; -1 for none.
        ranges: The result of [`spread_rows`].
        most: Limit of rows for all labels together; with many labels, each gets an equal share.

    >>> rows_of_rare(np.array([0] * 90 + [1, 1, -1]), [(0, 64)], 100)
    [(90, 91), (91, 92)]
    """
    taken = np.zeros(len(numbers), dtype=bool)
    for start, stop in ranges:
        taken[start:stop] = True
    labels = np.unique(numbers[numbers >= 0])
    added: list[int] = []
    for label in labels:
        mine = numbers == label
        rows = np.flatnonzero(mine & ~taken)
        lacking = min(min(RARE_CELLS, most // len(labels)) - int((mine & taken).sum()), len(rows))
        added += rows[np.linspace(0, len(rows) - 1, max(lacking, 0)).astype(np.int64)].tolist()
    return [(row, row + 1) for row in sorted(added)]


def _few_at_once(adata: Any, choice: InputChoice) -> Iterator[tuple[int, Cells]]:
    """All cells in chunks of at most `CELLS_AT_ONCE`, each with the row of its first cell."""
    first = 0
    for chunk in uncounted(choice).iter_cells(adata):
        for start in range(0, len(chunk), CELLS_AT_ONCE):
            yield first + start, chunk[start : start + CELLS_AT_ONCE]
        first += len(chunk)


class EvidenceSteps(LabellingSteps):
    """The steps of [`ScMMGPTPipeline.explain`] and of [`ScMMGPTPipeline.audit`]."""

    @property
    def can_explain(self) -> bool:
        """Whether the checkpoint has a label readout, whose terms are the evidence of [`explain`]."""
        return getattr(self._bridge(), "label_readout", None) is not None

    def explain_cells(
        self,
        adata: Any,
        choice: InputChoice,
        labels: np.ndarray,
        sets: np.ndarray,
        clusters: np.ndarray | None = None,
        batch_size: int | None = None,
        candidates: Sequence[str] | None = None,
    ) -> Evidence:
        """Evidence for the labels of the cells of `adata`: the data that `choice` was made for, or a part of the data.

        Args:
            adata: The cells.
            choice: Matrix and genes.
            labels: str `(n_obs,)`: the labels of these cells.
            sets: All labels of the data, sorted.
            clusters: str `(n_obs,)`, or None.
            batch_size: Cells per batch.
            candidates: As in [`evidence_of`].
        """
        evidence = self.evidence_of(choice, labels, sets, clusters, candidates=candidates)
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
        candidates: Sequence[str] | None = None,
    ) -> Evidence:
        """[`Evidence`] without cells, for the labels of [`explain_cells`]; `called` is as in [`meanings`].

        A runner-up is a label that `candidates` mean, in any words; by default any label of the checkpoint or `sets`.

        Raises:
            ValueError: If the checkpoint has no label readout.
        """
        if not self.can_explain:
            raise ValueError(
                "This checkpoint has no label readout, whose terms are the evidence for a label. Train one with "
                "`python -m scmmgpt.train finetune` or `align`."
            )
        members, known, terms, profiles = self.meanings(sets.tolist(), None if called is None else called.tolist())
        competing = np.ones(members.shape[1], dtype=bool)
        if candidates is not None:
            meant = label_members(list(candidates), known, terms, self.model.config.annotation or {})
            competing = meant.any(axis=0, out=competing)
        readout = self._bridge().label_readout
        explainer = Explainer.of(readout, choice.match.measured, members, profiles, competing)
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
        """Add the columns of evidence to `adata.obs`, and a table of the genes of each label to `adata.uns`."""
        finish_report(choice.report)
        for name, values in columns.items():
            add_column(adata, f"{key_added}_{name}", values)
        table = table_of(row for row in evidence.group_rows() if row["level"] == "label")
        if not table and (named := [name for name in evidence.sets if name not in (MISSING, UNKNOWN)]):
            logger.warning(
                f"No cell has evidence: the checkpoint knows no label of obs[{label_key!r}] "
                f"({some_of([repr(name) for name in named])}). Rename the labels to a name, a synonym or an id of the "
                "Cell Ontology."
            )
        self._record(adata, key_added, choice.report, explain={"label_key": label_key, **table})
        return evidence

    def read_labels(
        self, adata: Any, labelling: Labelling, given: np.ndarray, sets: np.ndarray
    ) -> FileRegression | None:
        """Fit a regression of the given labels on about `FITTED_CELLS` cells, and on more cells of rare labels.

        The weights of file and checkpoint are fitted on about `BELIEF_CELLS` cells.

        Args:
            adata, labelling, sets: As in [`audit_cells`], for all the data.
            given: str `(n_obs,)`: the given labels.

        Returns:
            None if fewer than two labels have enough cells.
        """
        choice = labelling.choice
        numbers = np.where(np.isin(given, (MISSING, UNKNOWN)), -1, np.searchsorted(sets, given))
        ranges = spread_rows(len(given), FITTED_CELLS)
        ranges = [*ranges, *rows_of_rare(numbers, ranges, FITTED_CELLS)]
        fitted = read_ranges(adata, uncounted(choice), ranges)
        cells = [cells for _, _, cells in fitted]
        of_cells = np.concatenate([numbers[start:stop] for start, stop, _ in fitted])
        file = FileRegression.of(type(cells[0]).concatenate(cells), of_cells, len(sets), numbers)
        if file is None:
            return None
        wide, types, members = self._audit_labelling(choice, sets)
        logs, model, own = [], [], []
        quiet = replace(labelling, choice=uncounted(choice))
        for start, stop, some in read_ranges(adata, uncounted(choice), spread_rows(len(given), BELIEF_CELLS)):
            part = adata if stop - start == len(given) else adata[start:stop]
            logs.append(file.log_probabilities(some))
            model.append(log_pooled(self._audit_probabilities(part, quiet, wide, types)[1], members))
            own.append(numbers[start:stop])
        labelled = np.concatenate(own) >= 0
        own_labels = np.concatenate(own)[labelled]
        return file.believing(np.concatenate(logs)[labelled], np.concatenate(model)[labelled], own_labels)

    def audit_cells(
        self,
        adata: Any,
        labelling: Labelling,
        given: np.ndarray,
        sets: np.ndarray,
        batch_size: int | None = None,
        file: FileRegression | None = None,
    ) -> dict[str, np.ndarray]:
        """The columns that [`add_audit`] needs, for the cells of `adata`: all the data of `labelling`, or a part.

        Profiled types that `sets` name compete as in `annotate --labels`.

        Args:
            adata: The cells.
            labelling: The labelling of `annotate`, after [`read_batch`].
            given: str `(n_obs,)`: the given labels of these cells.
            sets: All given labels of the data, sorted.
            batch_size: Cells per batch.
            file: The result of [`read_labels`].
        """
        choice = labelling.choice
        wide, types, members = self._audit_labelling(choice, sets)
        columns, probabilities = self._audit_probabilities(adata, labelling, wide, types, batch_size)
        names = wide.candidates.names
        set_of_cell = np.searchsorted(sets, given)
        best, odds = judge(probabilities, members, set_of_cell)
        novel = np.asarray(columns.get("novelty", np.zeros(len(given)))) > 1
        if "by_profile" in columns:  # the model judges a cell of a profiled type only if the given label means one
            by_type: Any = members[:, np.isin(names, [str(known["name"]) for known in types])].any(axis=1)
            novel = np.where(columns["by_profile"], ~by_type[set_of_cell], novel)
        n_cells, rival = len(given), np.full(len(given), -1)
        file_odds, both_odds = np.full((2, n_cells), np.nan)
        if file is not None:
            ours, nested, parts = ~novel & ~np.isnan(odds), nested_sets(members), []
            for first, cells in _few_at_once(adata, choice):
                here = slice(first, first + len(cells))
                model = np.where(ours[here, None], log_pooled(probabilities[here], members), np.nan)
                logs = file.log_probabilities(cells)
                parts.append(best_other_label(logs, model, set_of_cell[here], nested, file.belief))
            rival, both_odds, file_odds = (np.concatenate(part) for part in zip(*parts, strict=True))
            both_odds[(given == MISSING) | (given == UNKNOWN)] = np.nan
            rival = np.where(both_odds > 0, rival, -1)  # markers are compared for the label that the file prefers
            of_rival = np.where(members[rival] & ~members[set_of_cell], probabilities, -1.0)
            best = np.where(rival < 0, best, np.where(of_rival.max(axis=1) >= 0, of_rival.argmax(axis=1), -1))
        genes, marker_odds = np.full(n_cells, "", dtype=object), np.full(n_cells, np.nan, dtype=np.float32)
        if self.can_explain:
            self._add_markers(adata, choice, names, sets, (best, set_of_cell), (odds, marker_odds, genes), batch_size)
        if file is not None and (rival >= 0).any():
            self._add_genes_of_file(adata, choice, file, np.where(genes == "", rival, -1), set_of_cell, genes)
        columns = {name: columns[name] for name in ("cell_type", "entropy", "novelty") if name in columns}
        columns["suggested"] = np.where(rival >= 0, sets[rival], np.asarray([*names, ""], dtype=str)[best])
        columns |= {"file_odds": file_odds, "both_odds": both_odds}
        return {**columns, "novel": novel, "odds": odds, "marker_odds": marker_odds, "genes": genes.astype(str)}

    def _add_markers(
        self,
        adata: Any,
        choice: InputChoice,
        names: Sequence[str],
        sets: np.ndarray,
        labels: tuple[np.ndarray, np.ndarray],
        results: tuple[np.ndarray, np.ndarray, np.ndarray],
        batch_size: int | None,
    ) -> None:
        """Fill in log odds by markers, and genes, for the best other label against the given label. Works in place.

        Args:
            adata, choice, batch_size: As in [`audit_cells`].
            names: Names of the competing labels.
            sets: All given labels.
            labels: int64 `(n_obs,)` each: the best other label, in `names`, and the given label, in `sets`.
            results: `(n_obs,)` each: log odds of the model, set to NaN for cells without a measured gene; log odds of
                the markers; genes.
        """
        (best, set_of_cell), (odds, marker_odds, genes) = labels, results
        of_readout, known, _, profiles = self.meanings(sets.tolist())
        explainer = Explainer.of(self._bridge().label_readout, choice.match.measured, of_readout, profiles)
        symbols = np.asarray([*self.processor.gene_symbols(explainer.panel.gene_ids.tolist()), ""], dtype=object)
        readout_columns = np.array([*(known.get(name, -1) for name in names), -1], dtype=np.int64)[best]
        usable: np.ndarray = (readout_columns >= 0) & of_readout[set_of_cell].any(axis=1)
        own = np.where(usable, readout_columns + explainer.first_label, 0)
        chunks, size = self._chunks(adata, uncounted(choice)), self._batch_size(batch_size, 512)
        for rows, cells in self._batches(chunks, size, "Auditing", len(best)):
            rivals = np.where(usable[rows], set_of_cell[rows], -1)
            told, (at, positions, values, _) = explainer(cells, own[rows], rivals)
            odds[rows[np.bincount(at, minlength=len(rows)) == 0]] = np.nan  # cells without a measured gene
            genes[rows] = [", ".join(row[row != ""]) for row in symbols[told.genes]]
            odds_of = explainer.marker_odds(at, positions, values, own[rows], set_of_cell[rows])
            marker_odds[rows] = np.where(usable[rows], odds_of, np.nan)

    def _add_genes_of_file(
        self,
        adata: Any,
        choice: InputChoice,
        file: FileRegression,
        rival: np.ndarray,
        given: np.ndarray,
        genes: np.ndarray,
    ) -> None:
        """Fill in the genes that speak for `rival` against `given` in the file's regression. Works in place."""
        for first, cells in _few_at_once(adata, choice):
            rows = slice(first, first + len(cells))
            for row, ids in enumerate(file.genes_for(cells, rival[rows], given[rows]), first):
                if len(ids):
                    genes[row] = ", ".join(self.processor.gene_symbols(ids.tolist()))

    def _audit_probabilities(
        self,
        adata: Any,
        labelling: Labelling,
        wide: Labelling,
        types: Sequence[Mapping[str, Any]],
        batch_size: int | None = None,
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Columns of `annotate` by `labelling`, and probabilities of the labels of `wide`, `(n_obs, n_labels)`.

        The two labellings differ only if there are `types`.
        """
        columns, probabilities = self.label_cells(adata, labelling, batch_size)
        if types:
            quiet = replace(wide, choice=uncounted(labelling.choice))
            _, probabilities = self.label_cells(adata, quiet, batch_size)
        return columns, probabilities

    def _audit_labelling(
        self, choice: InputChoice, sets: np.ndarray
    ) -> tuple[Labelling, list[Mapping[str, Any]], np.ndarray]:
        """The labelling with all labels that compete with given labels.

        Returns:
            The labelling; the profiled types that `sets` name; the competing labels that each of `sets` means, bool
            `(n_sets, n_labels)`.
        """
        settings, stored = self.annotation_settings(), self.model.config.annotation or {}
        labels, profiles = {name: name for name in sets.tolist()}, stored.get("profiles", [])
        named = profiled_types(labels, settings["cl_ids"], settings["labels"], profiles)
        settings["labels"] |= {str(profiles[number]["name"]): text for text, number in named.items()}
        wide, types = self.labelling(choice, settings, not named), [profiles[number] for number in named.values()]
        numbers = {name: i for i, name in enumerate(wide.candidates.names)}
        return wide, types, label_members(sets.tolist(), numbers, with_types(stored.get("terms", []), types), stored)

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
        finish_report(choice.report)
        for warning in self.summarize(labelling, columns)[1]:
            logger.warning(warning)
        wide, _, members = self._audit_labelling(choice, sets)
        names = wide.candidates.names
        called = np.asarray(columns["cell_type"])
        if n_missing := int((given == MISSING).sum()):
            logger.warning(f"{n_missing} of {len(given)} cells have no label in obs[{label_key!r}]: not judged.")
        if strange := sets[~members.any(axis=1) & (sets != MISSING) & (sets != UNKNOWN)].tolist():
            names_of_strange, n_called = np.unique(called[given == strange[0]], return_counts=True)
            logger.warning(
                f"{len(strange)} of {(sets != MISSING).sum()} labels of obs[{label_key!r}] mean no type that the "
                f"checkpoint knows ({', '.join(map(repr, strange[:3]))}; it knows {', '.join(map(repr, names[:3]))}, "
                "...). Only the other cells of the file judge such a label, and a label of few cells is not judged. "
                "Rename the labels to a name, a synonym or an id of the Cell Ontology. By `annotate`, "
                f"{n_called.max() / n_called.sum():.0%} of the cells with {strange[0]!r} are "
                f"{str(names_of_strange[n_called.argmax()])!r}."
            )
        judged = {
            name: columns[name]
            for name in ("suggested", "odds", "marker_odds", "file_odds", "both_odds", "genes", "novel")
        }
        audit = Audit(given=given, called=called, clusters=clusters, **judged)
        columns_of = {"audit": audit.verdict, "audit_score": audit.score, "audit_suggested": audit.suggested}
        for name, values in {**columns_of, "audit_genes": audit.genes}.items():
            add_column(adata, f"{key_added}_{name}", values)
        done = {name.replace(" ", "_"): n for name, n in audit.summary().items()}
        self._record(adata, key_added, choice.report, audit={"label_key": label_key, **done})
        return audit
