"""The steps of `annotate` and `calibrate`: settings of a file, labels of the cells, results in the AnnData."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers.utils import logging

from .annotation_scmmgpt import (
    advice_on_sets,
    annotate_scores,
    fit_label_sets,
    fit_mixture,
    label_probabilities,
    least_error_rate,
    set_threshold,
)
from .cells_scmmgpt import Cells
from .conversion_scmmgpt import InputChoice
from .labels_scmmgpt import (
    UNKNOWN,
    Candidates,
    candidate_columns,
    ids_of_labels,
    labels_with_texts,
    members_of_terms,
    profiled_types,
    terms_of_kinds,
    with_types,
)
from .novelty_scmmgpt import Neighbours, Novelty, fit_novelty
from .passes_scmmgpt import LINEAR_BATCH, CellPasses, uncounted
from .profiles_scmmgpt import ProfiledTypes, broader_answers, kinds_of_terms
from .proof_scmmgpt import tissues_of
from .receipt_scmmgpt import superseded
from .records_scmmgpt import MISSING, add_column, finish_report, in_few_lines, recorded, table_of, words_of
from .refinement_scmmgpt import MIN_FILE, FileMeans
from .scoring_scmmgpt import LabelScorer, text_states
from .tissues_scmmgpt import advice_on_tissues, labels_of_tissue, tissue_prior
from .unseen_scmmgpt import MIN_BATCH, TextScores
from .votes_scmmgpt import cluster_answers, majority_vote, summarize_annotation


logger = logging.get_logger(__name__)

READ_CELLS = 10_000  # cells of a file, at most, that correct the profiles of untrained labels
NEIGHBOUR_CELLS, CELLS_AT_ONCE = 2048, 64  # cells of a file, at most, for neighbours and refinement; rows of one read


@dataclass
class Labelling:
    """Decisions of [`ScMMGPTPipeline.annotate`] that hold for all cells of a file."""

    choice: InputChoice
    settings: dict[str, Any]  # of `annotation_settings`
    candidates: Candidates
    cl_ids: dict[str, str]  # label -> Cell Ontology id
    readout: TextScores | None
    unseen_bonus: float
    min_score: float | None
    broader: Sequence[Mapping[str, Any]]  # terms for cells below `min_score`
    error_rate: float | None = None
    batch_read: bool = False  # whether cells of the file corrected untrained labels
    fitted_score: float | None = None  # replaces `min_score` for cells that are not novel: see `least_scores`
    novelty: Novelty | None = None
    neighbours: Neighbours | None = None  # cells of the file that novelty averages over
    profiled: ProfiledTypes | None = None  # types without training cells, which may name a novel cell
    file: FileMeans | None = None  # mean profiles of cells of the file, which refined the readout
    prior: np.ndarray | None = None  # float64 (n_texts,), from `tissue_prior`; None: all labels are equally common


class LabellingSteps(CellPasses):
    """The steps of [`ScMMGPTPipeline.annotate`] and of [`ScMMGPTPipeline.calibrate`]."""

    def annotation_settings(
        self,
        labels: dict[str, str] | Sequence[str] | None = None,
        cl_ids: dict[str, str] | None = None,
        matching_weight: float | None = None,
        matching_candidates: int | None = None,
        temperature: float | None = None,
        tissue: str | None = None,
    ) -> dict[str, Any]:
        """The settings of [`annotate`]: the arguments, else the stored values of the checkpoint, else defaults.

        Returns:
            `labels` (label -> text), `cl_ids` (label -> id), `matching_weight` (0 to 1), `matching_candidates`,
            `temperature`, and `readout_temperature`, at which the probabilities equal those of the label readout.

        Raises:
            ValueError: If both `labels` and `tissue` are given, or a value is out of range.
        """
        stored = self.model.config.annotation or {}
        if tissue is not None and labels is not None:
            raise ValueError("`labels=` and `tissue=` both choose the candidate labels; pass one of the two.")
        if tissue is not None:
            labels = labels_of_tissue(tissue, stored)
        temperature_default = stored.get("temperature", 1 / self._bridge().inverse_temperature().item())

        def given(value: float | None, name: str, default: float) -> float:
            return stored.get(name, default) if value is None else value

        settings: dict[str, Any] = {
            "labels": labels_with_texts(labels, stored.get("labels", {})),
            "cl_ids": {**stored.get("cl_ids", {}), **(cl_ids or {})},
            "matching_weight": float(given(matching_weight, "matching_weight", 0.5)),
            "matching_candidates": int(given(matching_candidates, "matching_candidates", 4)),
            "temperature": float(given(temperature, "temperature", temperature_default)),
            "readout_temperature": float(stored.get("readout_temperature", temperature_default)),
        }
        if not 0 <= settings["matching_weight"] <= 1:
            raise ValueError(f"matching_weight is {settings['matching_weight']}; it must be a share from 0 to 1.")
        if settings["temperature"] <= 0:
            raise ValueError(f"temperature is {settings['temperature']}; it must be positive.")
        return settings

    def labelling(
        self,
        choice: InputChoice,
        settings: dict[str, Any],
        is_default: bool = True,
        min_score: float | None = None,
        unseen_bonus: float | None = None,
        error_rate: float | None = None,
    ) -> "Labelling":
        """The decisions of [`annotate`] for the data that `choice` was made for.

        Args:
            choice: Matrix and genes.
            settings: The result of [`annotation_settings`].
            is_default: Whether the labels are those of the checkpoint.
            min_score, unseen_bonus, error_rate: As in [`annotate`].

        Raises:
            ValueError: If `error_rate` is given, and labels or settings are not those that the checkpoint stores.
        """
        stored = self.model.config.annotation or {}
        terms, trained, types = stored.get("terms", []), stored.get("labels", {}), stored.get("profiles", [])
        profiles = {} if is_default else profiled_types(settings["labels"], settings["cl_ids"], trained, types)
        known = trained | {types[number]["name"]: text for text, number in profiles.items()}
        terms = with_types(terms, [types[number] for number in profiles.values()])
        if not is_default:
            terms = [*self._kinds_of_trained(settings, known, terms), *terms]
        candidates = candidate_columns(settings["labels"], known, settings["cl_ids"], terms)
        ids = ids_of_labels(candidates.names, settings["cl_ids"], terms)
        readout = self._text_scores(candidates.texts, candidates.unseen, choice, profiles)
        if readout is not None:
            readout = self._among_candidates(readout, candidates, list(profiles.values()))
        profiled = None
        has_all = readout is not None and len(readout.panel.bias) == len(self.model.config.label_readout["texts"])
        if types and is_default and min_score != 0 and readout is not None and has_all:
            named = self.model.config.label_readout["labels"], terms, types
            answers, kinds = broader_answers(*named), kinds_of_terms(*named)
            profiled = ProfiledTypes.of(self._bridge().label_readout, readout.panel, answers, kinds)
        if unseen_bonus is None:  # a readout has a gate for untrained labels and needs no bonus
            unseen_bonus = 0.0 if readout is not None else stored.get("unseen_bonus", 0.0)
        if error_rate is not None:
            set_threshold(stored.get("label_sets"), error_rate)
            same = all(settings[name] == stored.get(name) for name in ("temperature", "matching_weight"))
            if not is_default or not same or settings["labels"].keys() != stored["labels"].keys():
                raise ValueError(
                    "error_rate needs the labels and settings that the checkpoint stores: leave out labels, "
                    "temperature and matching_weight, or leave out error_rate."
                )
        fitted_score = stored.get("min_score") if min_score is None and is_default else None
        broader = terms if is_default else []
        novelty = self._novelty(choice, candidates, readout, broader)
        decided = choice, settings, candidates, ids, readout, unseen_bonus, min_score, broader, error_rate
        return Labelling(*decided, fitted_score=fitted_score, novelty=novelty, profiled=profiled)

    def _among_candidates(self, readout: TextScores, candidates: Candidates, profiles: Sequence[int]) -> TextScores:
        """Scores with a second regression, of the candidates alone, for cells that belong to no candidate."""
        columns = readout.columns[(candidates.owners >= 0) & (readout.columns >= 0)]
        label_readout, n_labels = self._bridge().label_readout, len(readout.panel.bias)
        is_whole = n_labels == len(label_readout.bias) + len(profiles)
        if readout.has_new_labels or not label_readout.num_groups or not is_whole or not 1 < len(columns) < n_labels:
            return readout
        panel = label_readout.among(readout.panel, columns.tolist(), profiles)
        return replace(readout, panel=panel, scores=panel)

    def _kinds_of_trained(
        self, settings: dict[str, Any], known: dict[str, str], terms: Sequence[Mapping[str, Any]]
    ) -> Sequence[Mapping[str, Any]]:
        """Terms of the candidates that are scored as the trained label above them, with a warning for each."""
        kinds = (self.model.config.annotation or {}).get("kinds", [])
        stand_ins = terms_of_kinds(settings["labels"], settings["cl_ids"], list(known), terms, kinds)
        text = "{!r}: scored as the broader label {!r}, so that all cells of the broader label get this name."
        messages = [text.format(term["name"], *term["labels"]) for term in stand_ins]
        for message in in_few_lines(messages) if messages else ():
            logger.warning(message)
        return stand_ins

    def read_batch(self, adata: Any, labelling: "Labelling", read_batch: bool | None = None) -> "Labelling":
        """The labelling, corrected by a sample of cells from the whole file.

        With untrained labels and `read_batch=True`, up to `READ_CELLS` cells correct the predicted profiles. Without
        untrained labels, up to `NEIGHBOUR_CELLS` cells are the neighbours for novelty, refine the readout
        ([`FileMeans`]), and give the prior of labels, as far as the checkpoint and the number of cells allow. With
        `read_batch=False` the labelling stays as it is.
        """
        readout, choice = labelling.readout, labelling.choice
        if readout is None or read_batch is False or (readout.has_new_labels and not read_batch):
            return labelling
        total = choice.report["cells"]["cells"]
        if readout.has_new_labels:
            if total < MIN_BATCH:
                logger.warning(
                    f"read_batch needs {MIN_BATCH} cells and the file has {total}: untrained labels are not corrected."
                )
                return labelling
            cells = _cells_all_over(adata, choice, READ_CELLS, 1)
            logger.info(f"{len(cells)} cells of the file corrected the untrained labels (read_batch).")
            return replace(labelling, readout=readout.read_batch(cells), batch_read=True)
        novelty = labelling.novelty if total >= MIN_BATCH else None
        has_neighbours = novelty is not None and novelty.batch_unit is not None
        refines = total >= MIN_FILE and self._labels_of_file(labelling) is not None
        if not has_neighbours and not refines:
            return labelling
        cells = _cells_all_over(adata, choice, NEIGHBOUR_CELLS, CELLS_AT_ONCE)
        if has_neighbours and novelty is not None:
            neighbours = novelty.with_neighbours(cells)
            if labelling.profiled is not None:
                neighbours = labelling.profiled.with_types(neighbours, cells)
            labelling = replace(labelling, neighbours=neighbours)
        if not refines:
            return labelling
        labelling = self.with_file(labelling, FileMeans.of(readout.panel, cells))
        return labelling if total < MIN_BATCH else self._with_prior(labelling, cells)

    def _with_prior(self, labelling: "Labelling", cells: Cells) -> "Labelling":
        """The labelling with [`tissue_prior`], if all labels of the checkpoint are candidates.

        The readout alone must give the scores: it learned all labels as equally common.
        """
        stored, settings, readout = self.model.config.annotation or {}, labelling.settings, labelling.readout
        names = labelling.candidates.names
        readout_alone = stored.get("similarity_weight") == 0
        if readout is None or not readout_alone or not stored.get("tissues") or set(names) != set(stored["labels"]):
            return labelling
        if settings["matching_weight"]:
            logger.warning(
                f"With a matching weight of {settings['matching_weight']:g} labels are not weighed by the tissues "
                "of the cells; matching_weight=0 weighs them."
            )
            return labelling
        logits = settings["readout_temperature"] * readout(cells)
        scale, doubt = 1 / settings["temperature"], stored.get("doubt", 0.0)
        probabilities = label_probabilities(logits, logit_scale=scale, doubt=doubt)
        labels = [names[owner] for owner in labelling.candidates.owners]
        return replace(labelling, prior=tissue_prior(probabilities, labels, stored["tissues"]))

    def with_file(self, labelling: "Labelling", file: FileMeans) -> "Labelling":
        """The labelling with a readout that is refined by cells of the file."""
        readout, labels = labelling.readout, self._labels_of_file(labelling)
        if readout is None or labels is None:
            return labelling
        panel = file.refine(self._bridge().label_readout, readout.panel, labels)
        readout = replace(readout, panel=panel, scores=panel)
        novelty, profiled = labelling.novelty, labelling.profiled  # both share the cached scores of the panel
        if novelty is not None and novelty.panel is not None:
            novelty = replace(novelty, panel=panel)
        if profiled is not None:
            profiled = replace(profiled, panel=panel)
        return replace(labelling, readout=readout, novelty=novelty, profiled=profiled, file=file)

    def _labels_of_file(self, labelling: "Labelling") -> list[int] | None:
        """Positions in the label readout of the labels that the file may refine; None if refinement is off.

        Refinement is off if the checkpoint has no `refines`, or if an untrained label or profiled type is a candidate.
        """
        readout = labelling.readout
        if readout is None or readout.has_new_labels or not (self.model.config.annotation or {}).get("refines"):
            return None
        trained, texts = self.model.config.label_readout["texts"], set(labelling.candidates.texts)
        labels = [number for number, text in enumerate(trained) if text in texts]
        return labels if len(labels) == len(readout.panel.bias) else None

    def label_cells(
        self, adata: Any, labelling: "Labelling", batch_size: int | None = None
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Columns of `obs` and probabilities `(n_obs, n_labels)` of the cells of `adata`.

        `adata` is the data that the labelling was made for, or a part of them.
        """
        scores = self._scores(adata, labelling, batch_size)
        return annotate_scores(*scores, labelling, self.model.config.annotation or {})

    def called_types(
        self, adata: Any, choice: InputChoice, key: str = "scmmgpt", columns: dict[str, np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        """Labels of the cells: `cell_type`, and `by_profile` if profiled types may name cells.

        The labels are the columns that [`ScMMGPTPipeline.annotate`] added to `obs`. Without these columns they are
        `columns`, and without `columns` they are computed with the settings of the checkpoint.
        """
        if f"{key}_cell_type" in adata.obs:
            receipt = recorded(adata, key, "annotate").get("receipt", {})
            if receipt.get("weights", now := self.signer.sign("annotate")["weights"]) != now:
                logger.warning(
                    f"obs['{key}_cell_type'] has labels of another checkpoint ({receipt.get('checkpoint')}), and the "
                    "results are for these labels. Annotate the cells again for labels of this checkpoint."
                )
            names = words_of(adata.obs, f"{key}_cell_type")
            stored = {"cell_type": np.where(names == MISSING, UNKNOWN, names)}  # joined files have missing labels
            if f"{key}_by_profile" in adata.obs:
                stored["by_profile"] = words_of(adata.obs, f"{key}_by_profile") == "True"
            return stored
        if columns is not None:
            return columns
        choice = uncounted(choice)
        labelling = self.read_batch(adata, self.labelling(choice, self.annotation_settings()))
        return self.label_cells(adata, labelling)[0]

    def add_labels(
        self,
        adata: Any,
        labelling: "Labelling",
        columns: dict[str, np.ndarray],
        probabilities: Any,
        clusters: np.ndarray | None = None,
        key_added: str = "scmmgpt",
    ) -> Any:
        """Add the results of [`label_cells`] for all cells to `adata`, with votes of clusters and a summary.

        Args:
            adata: The data.
            labelling: The decisions for this data.
            columns: Columns of `obs`, each `(n_obs,)`.
            probabilities: `(n_obs, n_labels)`: an array, or blocks of rows.
            clusters: str `(n_obs,)`: clusters that vote, or None.
            key_added: Prefix of the names in `obs`, `obsm` and `uns`.
        """
        settings, candidates, stored = labelling.settings, labelling.candidates, self.model.config.annotation or {}
        if clusters is not None:
            columns = {**columns, "cell_type_majority": majority_vote(columns["cell_type"], clusters)}
            names = columns["cell_type"], clusters, candidates.names, labelling.cl_ids, labelling.broader
            alone = {known["name"]: known["id"] for known in stored.get("profiles", ()) if labelling.profiled}
            answers = cluster_answers(*names, alone)
        summary, warnings = self.summarize(labelling, columns, probabilities)
        if settings["labels"].keys() == stored.get("labels", {}).keys():
            where = np.unique(tissues_of(adata.obs).astype(str)).tolist()
            warnings = [*warnings, *advice_on_tissues(where, Counter(columns["cell_type"].tolist()), stored)]
        n_held_out = (stored.get("label_sets") or {}).get("n_cells", 0)
        if labelling.error_rate is not None and labelling.error_rate < least_error_rate(n_held_out):
            warnings = [*warnings, *advice_on_sets(n_held_out)]
        finish_report(labelling.choice.report)
        for warning in warnings:
            logger.warning(warning)
        for name, values in columns.items():
            add_column(adata, f"{key_added}_{name}", values)
        adata.obsm[f"{key_added}_probabilities"] = probabilities
        if stale := superseded(adata, key_added):
            logger.warning(
                f"The results of {' and '.join(stale)} in this file are for other labels: compute them again."
            )
        done = {
            "labels": np.asarray(candidates.names, dtype=object),
            "texts": np.asarray(list(settings["labels"].values()), dtype=object),
            **{name: settings[name] for name in ("matching_weight", "temperature")},
            "read_batch": labelling.batch_read,
            "neighbour_cells": 0 if labelling.neighbours is None else len(labelling.neighbours.novelty),
            "refining_cells": 0 if labelling.file is None else int(labelling.file.n_cells.sum()),
            **({} if labelling.prior is None else {"label_prior": labelling.prior}),
            **summary,
        }
        if clusters is not None:
            done["clusters"] = table_of(answers)
        return self._record(adata, key_added, labelling.choice.report, annotate=done)

    def summarize(
        self, labelling: "Labelling", columns: dict[str, np.ndarray], probabilities: Any = None
    ) -> tuple[dict[str, Any], list[str]]:
        """Summary of an annotation, and warnings: unlikely results, and labels whose decisive genes the file lacks."""
        annotation = self.model.config.annotation or {}
        stored, texts = annotation.get("labels", {}), labelling.candidates.texts
        least = labelling.min_score if labelling.fitted_score is None else labelling.fitted_score or None
        summary, warnings = summarize_annotation(
            columns, labelling.candidates, list(stored), least, annotation.get("terms", [])
        )
        label_of = {text: label for label, text in stored.items()}
        label_of |= {t["text"]: t["name"] for t in annotation.get("profiles", []) if t["text"] in texts}
        if labelling.readout is not None:
            totals: Mapping[str, float]
            if probabilities is None:
                totals = Counter(np.asarray(columns["cell_type"]).tolist())
            else:
                totals = dict(zip(labelling.candidates.names, _sum_of_rows(probabilities).tolist(), strict=True))
            counts: Counter[str] = Counter()
            for label, total in totals.items():
                counts.update(dict.fromkeys(labelling.candidates.meant.get(label) or [label], total))
            profiled = [text for text, label in label_of.items() if label not in stored]
            trained = [*self.model.config.label_readout["texts"], *profiled]
            names = [label_of.get(text, text) for text in trained if text in texts]
            weak, more = labelling.readout.weak_labels(names, counts, self.processor.gene_symbols)
            summary, warnings = {**summary, "weak_labels": np.asarray(weak, dtype=object)}, [*warnings, *more]
        return summary, warnings

    def need_trained(self, labels: Mapping[str, str]) -> None:
        """Check that the label readout knows all of the labels (label -> text), or none.

        Raises:
            ValueError: If the readout knows some labels and not others: no cell would get an unknown label.
        """
        trained = (self.model.config.label_readout or {}).get("texts", [])
        new = [label for label, text in labels.items() if text not in trained]
        if new and len(new) < len(labels):
            raise ValueError(
                f"The checkpoint was not trained on {len(new)} of {len(labels)} labels, such as {new[0]!r}. "
                "Calibration fits the probabilities of trained labels and teaches no label: run `python -m "
                "scmmgpt.train finetune` on these cells."
            )

    def fit_settings(
        self,
        adata: Any,
        cells: Cells,
        truth: np.ndarray,
        choice: InputChoice,
        settings: dict[str, Any],
        batch_size: int | None = None,
    ) -> tuple[dict[str, Any], dict[str, float]]:
        """The annotation settings that [`calibrate`] stores, and the `nll` and `accuracy` of the fit.

        Args:
            adata: The data that `cells` are part of.
            cells: Raw counts of labelled cells.
            truth: str `(n_cells,)`: the true labels.
            choice: Matrix and genes of `adata`.
            settings: The result of [`annotation_settings`].
            batch_size: Cells per batch.
        """
        texts = list(settings["labels"].values())
        names = list(settings["labels"])
        readout = self._text_scores(texts, np.zeros(len(texts), bool), choice)
        labelling = self.read_batch(adata, self.labelling(choice, settings))  # `annotate` refines, too
        refined = labelling.readout
        if readout is not None and refined is not None and len(refined.panel.bias) == len(readout.panel.bias):
            readout = replace(readout, panel=refined.panel, scores=refined.panel)
        similarity, match, _ = self._label_scores([cells], len(cells), texts, settings, batch_size, readout=readout)
        target = np.asarray([names.index(label) for label in truth])
        before = dict(self.model.config.annotation or {})
        doubt = before.get("doubt", 0.0)  # fitted on left-out datasets, which one dataset cannot replace
        file = None if labelling.prior is None else _cells_all_over(adata, choice, NEIGHBOUR_CELLS, CELLS_AT_ONCE)

        def prior_at(temperature: float) -> np.ndarray | None:
            tried = replace(labelling, settings={**settings, "temperature": temperature})
            return None if file is None else self._with_prior(tried, file).prior

        best = fit_mixture(similarity, match, target, settings["temperature"], doubt, prior_at)
        cl_ids = {name: i for name, i in settings["cl_ids"].items() if name in settings["labels"]}
        fitted: dict[str, Any] = {name: best[name] for name in ("temperature", "matching_weight")}
        before.pop("min_score", None)  # fitted at another temperature
        if set(np.unique(target)) == set(range(len(names))):  # else a type without cells would seem novel
            vocab_size = self.model.config.cell_config.vocab_size
            novelty = fit_novelty(cells, target, choice.match.measured, vocab_size)
            units = {k: v for k, v in (before.get("novelty") or {}).items() if k.endswith("_unit")}  # of the readout
            fitted |= {} if novelty is None else {"novelty": {**units, **novelty}}
        options: dict[str, Any] = {
            "logit_scale": 1 / best["temperature"],
            "matching_weight": best["matching_weight"],
            "doubt": doubt,
        }
        fitted["label_sets"] = fit_label_sets(label_probabilities(similarity, match, **options), target)
        for advice in advice_on_sets(len(target), (before.get("label_sets") or {}).get("n_cells", 0)):
            logger.warning(advice)
        # Values that other commands stored stay, such as the terms of fine-tuning.
        return {**before, **settings, "cl_ids": cl_ids, **fitted}, best

    def _novelty(
        self,
        choice: InputChoice,
        candidates: Candidates,
        readout: TextScores | None,
        terms: Sequence[Mapping[str, Any]],
    ) -> Novelty | None:
        """Novelty for the genes of the file; None if none is stored, or if the file measures too few genes."""
        # Reference profiles of other cells may include an untrained label, so the gate decides alone on such labels.
        panel = None if readout is None or readout.has_new_labels else readout.panel
        members: list[list[int]] = []
        if panel is not None:  # only terms with candidates below them are answers
            stored_readout, texts = self.model.config.label_readout, set(candidates.texts)
            pairs = zip(stored_readout.get("labels", []), stored_readout["texts"], strict=False)
            trained = members_of_terms(terms, [label for label, text in pairs if text in texts])
            chosen = members_of_terms(terms, candidates.names)
            members = [labels if below else [] for labels, below in zip(trained, chosen, strict=True)]
        stored, size = (self.model.config.annotation or {}).get("novelty"), self.model.config.cell_config.vocab_size
        return Novelty.of(stored, choice.match.measured, size, panel, members)

    def _scores(
        self, adata: Any, labelling: "Labelling", batch_size: int | None
    ) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None, np.ndarray]:
        """Similarity, matching and novelty of cells, and whether a cell is empty: arguments of [`annotate_scores`]."""
        novelty_of: Any = labelling.novelty
        if novelty_of is not None:
            novelty_of = replace(novelty_of, neighbours=labelling.neighbours)
            if novelty_of.terms and labelling.profiled is not None:
                novelty_of = labelling.profiled.beside(novelty_of, labelling.neighbours)
        lengths: list[np.ndarray] = []

        def measured(chunks: Iterable[Cells]) -> Iterator[Cells]:
            for cells in chunks:
                lengths.append(np.diff(cells.indptr))
                yield cells

        chunks, n_cells = measured(self._chunks(adata, labelling.choice)), adata.shape[0]
        scores = self._label_scores(
            chunks, n_cells, labelling.candidates.texts, labelling.settings, batch_size, novelty_of, labelling.readout
        )
        return *scores, np.concatenate(lengths) == 0

    def _text_scores(
        self, texts: Sequence[str], unseen: np.ndarray, choice: InputChoice, profiled: Mapping[str, int] | None = None
    ) -> TextScores | None:
        """The label readout's scores of texts for the genes of a file; None without a readout that can score them.

        `profiled` is as in [`TextScores.of`].
        """
        readout = getattr(self._bridge(), "label_readout", None)
        if readout is None:
            return None
        trained = self.model.config.label_readout["texts"]

        def embed(texts: Sequence[str]) -> np.ndarray:
            return text_states(self._bridge(), self.processor, texts)

        gate, index = (self.model.config.annotation or {}).get("unseen_gate"), self.processor.gene_index
        return TextScores.of(readout, trained, texts, unseen, choice.match.measured, gate, index, embed, profiled)

    def _label_scores(
        self,
        chunks: Iterable[Cells],
        n_cells: int,
        texts: list[str],
        settings: dict[str, Any],
        batch_size: int | None,
        novelty_of: Callable[[Cells], np.ndarray] | None = None,
        readout: TextScores | None = None,
    ) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """Similarity, matching and novelty of all cells, or `None` for an absent one; see [`LabelScorer`]."""
        weight = (self.model.config.annotation or {}).get("similarity_weight", 0.0)
        scorer = LabelScorer(self._bridge(), self.processor, texts, settings, weight, readout, novelty_of)
        # Matching compares each cell with each candidate, and a batch counts pairs.
        is_padded = not scorer.readout_alone
        batch_size = self._batch_size(batch_size, 64 if is_padded else LINEAR_BATCH)
        batch_size = max(batch_size // max(scorer.num_candidates, 1), 1)
        return scorer.name(self._map_cells(scorer, chunks, batch_size, "Annotating", n_cells, is_padded))


def read_ranges(adata: Any, choice: InputChoice, ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int, Cells]]:
    """Read the cells of ranges of rows: `(start, stop, cells)` of each range that can be read.

    A range that cannot be read is left out here; the later pass over all cells reports the error.

    Raises:
        ValueError: If no range can be read: the error of the last range.
    """
    parts_read: list[tuple[int, int, Cells]] = []
    failed: ValueError | None = None
    for start, stop in ranges:
        try:
            parts = list(choice.iter_cells(adata if stop - start == adata.shape[0] else adata[start:stop]))
        except ValueError as error:
            failed = error
        else:
            parts_read.append((start, stop, type(parts[0]).concatenate(parts)))
    if failed is not None and not parts_read:
        raise failed
    return parts_read


def _cells_all_over(adata: Any, choice: InputChoice, most: int, at_once: int) -> Cells:
    """All cells, or about `most` of them in runs of `at_once` adjacent rows, evenly spaced over the data."""
    total, ranges = choice.report["cells"]["cells"], [(0, adata.shape[0])]
    if total > most:
        starts = np.linspace(0, total - at_once, most // at_once).astype(np.int64).tolist()
        ranges = [(row, row + at_once) for row in starts]
    parts = [cells for _, _, cells in read_ranges(adata, uncounted(choice), ranges)]
    return type(parts[0]).concatenate(parts)


def _sum_of_rows(matrix: Any) -> np.ndarray:
    """Column sums without NaN rows, of an array or of an array in blocks of rows."""
    return np.sum(matrix.totals if hasattr(matrix, "totals") else np.nansum(matrix, axis=0, keepdims=True), axis=0)
