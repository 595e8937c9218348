"""The tasks of scMMGPT over AnnData: annotate, describe, generate, embed and search cells.

Each task is a verb of [`ScMMGPTPipeline`]. A verb adds its results to the AnnData under names that begin with
`scmmgpt`, drops nothing and returns the same object:

>>> pipeline = ScMMGPTPipeline.from_pretrained("path/to/checkpoint")  # doctest: +SKIP
>>> pipeline.annotate(adata).obs["scmmgpt_cell_type"]  # doctest: +SKIP

Through transformers the same object is `pipeline("cell-annotation", model=path, trust_remote_code=True)`.

`adata.uns["scmmgpt"]` holds the matrix and the genes that were read, the evidence for that choice, and the settings
and the receipt of each verb (`receipt_scmmgpt`). The result of a cell depends on that cell alone, not on its batch or
its place, but with `read_batch`.
"""

import copy
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers.utils import logging


try:  # as a package or as remote code
    from .annotation_scmmgpt import (
        Candidates,
        Novelty,
        candidate_columns,
        choose_labels,
        fit_label_sets,
        fit_mixture,
        fit_novelty,
        ids_of_labels,
        label_probabilities,
        label_sets,
        labels_of_tissue,
        labels_with_texts,
        least_scores,
        majority_vote,
        set_threshold,
        summarize_annotation,
        term_of,
    )
    from .audit_scmmgpt import Audit, judge
    from .cells_scmmgpt import Cells, log1p_cp10k
    from .configuration_scmmgpt import PIPELINE_TASKS, ScMMGPTConfig
    from .evidence_scmmgpt import Evidence, Explainer, label_members
    from .generation_scmmgpt import (
        compare_cells,
        decide_sampling,
        decode_cells,
        draw_cells,
        gene_turns,
        labels_and_prompts,
        library_sizes,
        target_genes,
        warn_of_unknown_types,
    )
    from .modeling_scgpt import cpu_dtype
    from .modeling_scmmgpt import (
        CELL_INPUTS,
        ScMMGPTBridgeModel,
        ScMMGPTForCellTextAlignment,
        ScMMGPTForConditionalGeneration,
        cell_text_similarity,
    )
    from .processing_scmmgpt import ScMMGPTProcessor
    from .proof_scmmgpt import MIN_SCORE, Expression, Proof, propose, terms_above, tissues_of
    from .query_scmmgpt import Search
    from .reading_scmmgpt import InputChoice, finish_report, need_columns
    from .receipt_scmmgpt import CellsHash, Signer, with_receipt
    from .scoring_scmmgpt import LabelScorer, encode_texts, mean_similarity, text_states
    from .unseen_scmmgpt import MIN_BATCH, GeneSearch, TextScores
    from .votes_scmmgpt import cluster_answers
except ImportError:  # as a flat module in a clone
    from annotation_scmmgpt import (
        Candidates,
        Novelty,
        candidate_columns,
        choose_labels,
        fit_label_sets,
        fit_mixture,
        fit_novelty,
        ids_of_labels,
        label_probabilities,
        label_sets,
        labels_of_tissue,
        labels_with_texts,
        least_scores,
        majority_vote,
        set_threshold,
        summarize_annotation,
        term_of,
    )
    from audit_scmmgpt import Audit, judge
    from cells_scmmgpt import Cells, log1p_cp10k
    from configuration_scmmgpt import PIPELINE_TASKS, ScMMGPTConfig
    from evidence_scmmgpt import Evidence, Explainer, label_members
    from generation_scmmgpt import (
        compare_cells,
        decide_sampling,
        decode_cells,
        draw_cells,
        gene_turns,
        labels_and_prompts,
        library_sizes,
        target_genes,
        warn_of_unknown_types,
    )
    from modeling_scgpt import cpu_dtype
    from modeling_scmmgpt import (
        CELL_INPUTS,
        ScMMGPTBridgeModel,
        ScMMGPTForCellTextAlignment,
        ScMMGPTForConditionalGeneration,
        cell_text_similarity,
    )
    from processing_scmmgpt import ScMMGPTProcessor
    from proof_scmmgpt import MIN_SCORE, Expression, Proof, propose, terms_above, tissues_of
    from query_scmmgpt import Search
    from reading_scmmgpt import InputChoice, finish_report, need_columns
    from receipt_scmmgpt import CellsHash, Signer, with_receipt
    from scoring_scmmgpt import LabelScorer, encode_texts, mean_similarity, text_states
    from unseen_scmmgpt import MIN_BATCH, GeneSearch, TextScores
    from votes_scmmgpt import cluster_answers


logger = logging.get_logger(__name__)

READ_OPTIONS = ("layer", "assume", "gene_column", "organism", "force")  # of `read_cells`, taken by every verb
CellFunction = Callable[[Cells], tuple[torch.Tensor, ...]]  # a batch of cells -> tensors with one row a cell
READ_CELLS = 10_000  # of a file, at most, that correct the place of labels that were never trained
STRANGE_SHARE, MIN_STRANGE = 0.02, 3  # cells, and labels, of other tissues that make `annotate` advise to name one
SORTED_CELLS = 4096  # cells in memory at a time; a batch takes those of like length, so that little is padded


@dataclass
class Labelling:
    """Decisions of [`ScMMGPTPipeline.annotate`] that hold for all cells of a file."""

    choice: InputChoice
    settings: dict[str, Any]
    candidates: Candidates
    readout: TextScores | None
    unseen_bonus: float
    min_score: float | None
    broader: Sequence[Mapping[str, Any]]  # terms for cells below `min_score`
    error_rate: float | None = None
    batch_read: bool = False
    fitted_score: float | None = None  # in place of `min_score`, for cells that are not novel: see `least_scores`


class ScMMGPTPipeline:
    """A model and its processor, with every task as a verb over AnnData.

    The call path of `annotate(adata)`, from top to bottom. Other verbs over cells differ in what the model computes.

        annotation_settings             labels and their texts, temperature, matching weight
        choose_input                    reading_scmmgpt: which matrix and genes, and a report
                                            -> matrices_scmmgpt: the kind of each matrix
                                            -> genes_scmmgpt: variables -> genes of the vocabulary
        labelling                       what is decided once for all cells
            candidate_columns           annotation_scmmgpt: labels in any words -> texts to score
            _text_scores                readout_scmmgpt, unseen_scmmgpt: the readout for the genes of the file
        _read_batch                     unseen_scmmgpt: a look at the cells first, if asked
        label_cells                     of all cells, or of a part of them
            _probabilities -> _label_scores, batch by batch
                _chunks                 reading_scmmgpt: the next rows of the AnnData -> Cells
                LabelScorer             scoring_scmmgpt: Cells -> scores of the texts, and novelty
                                            -> feature_extraction_scmmgpt: Cells -> gene ids and values
                                            -> modeling_scmmgpt: similarity with all texts, matching with the best
            label_probabilities         annotation_scmmgpt: similarity and matching -> probabilities
            choose_labels               annotation_scmmgpt: the label of each cell and its certainty
        add_labels                      columns -> adata.obs
            majority_vote               annotation_scmmgpt: labels of clusters
            summarize_annotation        annotation_scmmgpt: numbers of the whole, and warnings of an unlikely one
            _record                     settings and report -> adata.uns

    Args:
        model: [`ScMMGPTForConditionalGeneration`]; or [`ScMMGPTForCellTextAlignment`], a checkpoint of stage 1, which
            annotates, embeds and searches, but has no language model for `describe` and `generate`.
        processor: The processor that was saved with the model.
        task: The verb of a call of the pipeline itself, one of `PIPELINE_TASKS`. Every verb works with every task.
        device: By default CUDA, else Apple's MPS, else the CPU.
        batch_size: Cells per batch, for every verb; each verb has a default of its own. It changes no result: lower it
            where memory runs out.
        dtype: Passed by `transformers.pipeline`, which has loaded the model with it; not used here.
    """

    # `transformers.pipeline` loads the parts that are `True` and passes them to `__init__`.
    _load_processor = True
    _load_tokenizer = _load_feature_extractor = _load_image_processor = _load_video_processor = False

    def __init__(
        self,
        model: ScMMGPTForConditionalGeneration | ScMMGPTForCellTextAlignment,
        processor: ScMMGPTProcessor,
        task: str = "cell-annotation",
        device: str | int | torch.device | None = None,
        batch_size: int | None = None,
        dtype: Any = None,
    ) -> None:
        if task not in PIPELINE_TASKS:
            raise ValueError(f"Unknown task {task!r}; choose one of {sorted(PIPELINE_TASKS)}.")
        if isinstance(device, int):
            device = f"cuda:{device}" if device >= 0 else "cpu"
        self.task = task
        self.device = torch.device(device or best_device())
        self.model = model.to(self.device).eval()  # type: ignore[arg-type]
        self.processor = processor
        self.signer = Signer(self.model, processor)
        self.batch_size = batch_size

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | os.PathLike,
        *,
        device: str | int | torch.device | None = None,
        dtype: torch.dtype | None = None,
        task: str = "cell-annotation",
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> "ScMMGPTPipeline":
        """Load a checkpoint, a folder or a model id on the Hub. No code of the checkpoint is run.

        `dtype` is by default that of the checkpoint, or float32 on a CPU that is slower in it. `kwargs` go to
        `from_pretrained` of model and processor (`revision`, `token`, ...); the others are as for the class.
        """
        checkpoint = os.fspath(checkpoint)
        is_folder = Path(checkpoint).is_absolute() or checkpoint.startswith(".")
        if is_folder and not (Path(checkpoint) / "config.json").is_file():
            raise FileNotFoundError(f"No checkpoint at {checkpoint!r}; name a folder with config.json and weights.")
        config = ScMMGPTConfig.from_pretrained(checkpoint, **kwargs)
        kinds = {kind.__name__: kind for kind in (ScMMGPTForCellTextAlignment, ScMMGPTForConditionalGeneration)}
        architecture = (config.architectures or ["nothing"])[0]
        if architecture not in kinds:
            raise ValueError(f"{checkpoint!r} holds a {architecture}; the pipeline needs one of {sorted(kinds)}.")
        if torch.device(device if isinstance(device, str | torch.device) else best_device()).type == "cpu":
            dtype = _dtype_on_cpu(dtype, config.dtype)
        model = kinds[architecture].from_pretrained(checkpoint, config=config, dtype=dtype or "auto", **kwargs)
        processor = ScMMGPTProcessor.from_pretrained(checkpoint, **kwargs)
        return cls(model, processor, task=task, device=device, batch_size=batch_size)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the verb of the pipeline's task, by default [`annotate`]."""
        return getattr(self, PIPELINE_TASKS[self.task])(*args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Save model and processor as one checkpoint, which transformers loads without this package too."""
        self.model.save_pretrained(save_directory)
        self.processor.save_pretrained(save_directory)

    # -- annotate -----------------------------------------------------------------------------------------------------

    @with_receipt
    def annotate(
        self,
        adata: Any,
        labels: dict[str, str] | Sequence[str] | None = None,
        *,
        tissue: str | None = None,
        cl_ids: dict[str, str] | None = None,
        cluster_key: str | None = None,
        min_score: float | None = None,
        error_rate: float | None = None,
        matching_weight: float | None = None,
        matching_candidates: int | None = None,
        temperature: float | None = None,
        unseen_bonus: float | None = None,
        read_batch: bool = False,
        key_added: str = "scmmgpt",
        batch_size: int | None = None,
        **read_kwargs: Any,
    ) -> Any:
        """Annotate every cell with the candidate label whose text fits the cell best.

        A label may be in other words than those of training: a synonym, a spelling, a plural, an id of the Cell
        Ontology, or a broader type, whose probability is the sum over its kinds. The labels that the checkpoint knows
        compete even if they are not candidates, so a cell that is none of the candidates has a low score. A cell that
        is like no known type is `"Unknown"`, if `finetune` or `calibrate` stored what no known type expresses.

        Args:
            adata: AnnData with any matrix and gene names that [`read_cells`] understands.
            labels: Label -> text that describes it, or labels alone; by default those stored with the checkpoint. The
                text of a label alone is the one stored with the checkpoint, else the label itself.
            tissue: Choose from the checkpoint's labels that its training cells of this tissue had, or those of blood.
                The others compete all the same, so that a cell of another tissue has a low score.
            cl_ids: Label -> Cell Ontology id, beside those stored with the checkpoint.
            cluster_key: Column of `obs` with clusters; adds the commonest label of each cell's cluster, and to `uns`
                the narrowest type of each cluster with the votes of its cells.
            min_score: Cells whose best label is less probable get the narrowest broader type that is probable enough,
                if the labels are those of the checkpoint, else `"Unknown"`. With 0 every cell gets a label. By
                default the value stored with the checkpoint, for its labels, if there is one; it then grows with
                novelty.
            error_rate: Add the set of labels that holds the true one but for this share of cells, if the cells are
                like those that `finetune` or [`calibrate`] held out. Only with the labels of the checkpoint.
            matching_weight: Weight of matching against similarity, 0 to 1.
            matching_candidates: Labels of each cell, the most similar ones, that are matched with it.
            temperature: Temperature of the softmax over labels. [`calibrate`] stores the defaults of these three.
            unseen_bonus: Calibrated stacking: added to the similarity of a label that means no label of fine-tuning,
                since cells lie near the texts of training. By default the value stored with older checkpoints; others
                have a fitted gate in its place (`unseen_scmmgpt`).
            read_batch: Look at all cells before the first is annotated, and correct the place of each label that was
                never trained by the cells that are most like it. The result of a cell then depends on the other cells.
                Without such labels it changes nothing.
            key_added: Prefix of the added names.
            batch_size: Cells per batch, 64 by default.
            read_kwargs: For [`read_cells`]: `layer`, `assume`, `gene_column`, `organism`, `force`.

        Returns:
            The same `adata`, with `obs`: `{key}_cell_type`, `{key}_cl_id`, `{key}_score` (probability of the label),
            `{key}_margin` (of the best candidate over the runner-up), `{key}_entropy` (0 certain .. 1 uniform) and
            `{key}_novelty` (above 1 the cell is like no known type; NaN if too few genes are measured), with
            `error_rate` `{key}_label_set` (joined by " | ", the most probable first);
            `obsm["{key}_probabilities"]` `(n_obs, n_labels)` in the order of `uns["{key}"]["annotate"]["labels"]`. A
            row that sums to less than 1 leaves the rest to known labels that are not candidates.
        """
        clusters = None if cluster_key is None else _words(adata, cluster_key)
        settings = self.annotation_settings(labels, cl_ids, matching_weight, matching_candidates, temperature, tissue)
        choice = self.processor.choose_input(adata, **read_kwargs)
        labelling = self.labelling(choice, settings, labels is None, min_score, unseen_bonus, error_rate)
        if read_batch:
            labelling = self.read_batch(adata, labelling)
        columns, probabilities = self.label_cells(adata, labelling, batch_size)
        finish_report(choice.report)
        return self.add_labels(adata, labelling, columns, probabilities, clusters, key_added)

    def labelling(
        self,
        choice: InputChoice,
        settings: dict[str, Any],
        is_default: bool = True,
        min_score: float | None = None,
        unseen_bonus: float | None = None,
        error_rate: float | None = None,
    ) -> "Labelling":
        """What [`annotate`] decides once for all cells of the data that `choice` was made for.

        `settings` are those of [`annotation_settings`], and `is_default` says whether the labels are the checkpoint's.
        """
        stored = self.model.config.annotation or {}
        terms = stored.get("terms", [])
        candidates = candidate_columns(settings["labels"], stored.get("labels", {}), settings["cl_ids"], terms)
        readout = self._text_scores(candidates.texts, candidates.unseen, choice)
        if unseen_bonus is None:  # by default the readout's gate decides, not a bonus
            unseen_bonus = 0.0 if readout is not None else stored.get("unseen_bonus", 0.0)
        if error_rate is not None:
            set_threshold(stored.get("label_sets"), error_rate)
            same = all(settings[name] == stored.get(name) for name in ("temperature", "matching_weight"))
            if not is_default or not same or settings["labels"].keys() != stored["labels"].keys():
                raise ValueError("Sets of labels are of the checkpoint's own labels and settings: leave out others.")
        fitted_score = stored.get("min_score") if min_score is None and is_default else None
        broader = terms if is_default else []
        decided = choice, settings, candidates, readout, unseen_bonus, min_score, broader, error_rate
        return Labelling(*decided, fitted_score=fitted_score)

    def read_batch(self, adata: Any, labelling: "Labelling") -> "Labelling":
        """The same after a look at up to `READ_CELLS` cells from all over the data, if it has labels to correct."""
        readout, choice = labelling.readout, labelling.choice
        if readout is None or not readout.has_new_labels:
            return labelling
        total = choice.report["cells"]["cells"]
        if total < MIN_BATCH:
            logger.warning(f"{total} cells are too few to correct labels by; read_batch needs {MIN_BATCH}.")
            return labelling
        chosen = np.linspace(0, total - 1, min(total, READ_CELLS)).astype(np.int64)
        choice = _uncounted(choice)
        if total <= READ_CELLS:
            parts = list(choice.iter_cells(adata))
        else:  # without a pass over all
            parts = [cells for row in chosen.tolist() for cells in choice.iter_cells(adata[row : row + 1])]
        logger.info(f"Labels that were never trained were corrected by {len(chosen)} cells of the file (read_batch).")
        readout = readout.read_batch(type(parts[0]).concatenate(parts))
        return replace(labelling, readout=readout, batch_read=True)

    def label_cells(
        self, adata: Any, labelling: "Labelling", batch_size: int | None = None
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Columns of `obs` and probabilities `(n_obs, n_labels)` of cells: all of the data of a choice, or a part."""
        candidates, terms = labelling.candidates, (self.model.config.annotation or {}).get("terms", [])
        options = (labelling.choice, candidates, labelling.settings, labelling.readout, labelling.unseen_bonus)
        probabilities, novelty = self._probabilities(adata, *options, batch_size)
        names, others = candidates.names, bool((candidates.owners < 0).any())
        ids = ids_of_labels(names, labelling.settings["cl_ids"], terms)
        least: Any = labelling.min_score
        if labelling.fitted_score is not None:
            least = least_scores(labelling.fitted_score, novelty)
        columns = choose_labels(probabilities, names, ids, least, novelty, labelling.broader, others)
        if labelling.error_rate is not None:
            stored = (self.model.config.annotation or {})["label_sets"]
            columns["label_set"] = label_sets(probabilities, names, set_threshold(stored, labelling.error_rate))
        return columns, probabilities

    def add_labels(
        self,
        adata: Any,
        labelling: "Labelling",
        columns: dict[str, np.ndarray],
        probabilities: Any,
        clusters: np.ndarray | None = None,
        key_added: str = "scmmgpt",
    ) -> Any:
        """Add the results of [`label_cells`] for all cells to `adata`, with the votes of clusters and the summary."""
        settings, candidates = labelling.settings, labelling.candidates
        if clusters is not None:
            columns = {**columns, "cell_type_majority": majority_vote(columns["cell_type"], clusters)}
        for name, values in columns.items():
            _add_obs(adata, f"{key_added}_{name}", values)
        adata.obsm[f"{key_added}_probabilities"] = probabilities
        summary = self._warn_of_labels(labelling, columns, probabilities)
        stored = self.model.config.annotation or {}
        if settings["labels"].keys() == stored.get("labels", {}).keys():
            for advice in _advice_on_tissues(
                adata.obs, dict(zip(*_counted(columns["cell_type"]), strict=True)), stored
            ):
                logger.warning(advice)
        done = {
            "labels": np.asarray(candidates.names, dtype=object),
            "texts": np.asarray(list(settings["labels"].values()), dtype=object),
            **{name: settings[name] for name in ("matching_weight", "temperature")},
            "read_batch": labelling.batch_read,
            **summary,
        }
        if clusters is not None:
            ids = ids_of_labels(
                candidates.names, settings["cl_ids"], (self.model.config.annotation or {}).get("terms", [])
            )
            names = columns["cell_type"], clusters, candidates.names, ids, labelling.broader
            done["clusters"] = _table(cluster_answers(*names))
        return self._record(adata, key_added, labelling.choice.report, annotate=done)

    def _warn_of_labels(
        self, labelling: "Labelling", columns: dict[str, np.ndarray], probabilities: Any = None
    ) -> dict[str, Any]:
        """Warn of an unlikely annotation, and of labels whose decisive genes the file lacks; returns its numbers."""
        stored, texts = (self.model.config.annotation or {}).get("labels", {}), labelling.candidates.texts
        least = labelling.min_score if labelling.fitted_score is None else labelling.fitted_score or None
        summary, warnings = summarize_annotation(columns, labelling.candidates, list(stored), least)
        label_of = {text: label for label, text in stored.items()}
        if labelling.readout is not None:
            totals: Mapping[str, float]
            if probabilities is None:
                totals = Counter(np.asarray(columns["cell_type"]).tolist())
            else:
                totals = dict(zip(labelling.candidates.names, _sum_of_rows(probabilities).tolist(), strict=True))
            counts: Counter[str] = Counter()
            for label, total in totals.items():
                counts.update(dict.fromkeys(labelling.candidates.meant.get(label) or [label], total))
            names = [label_of.get(text, text) for text in self.model.config.label_readout["texts"] if text in texts]
            weak, more = labelling.readout.weak_labels(names, counts, self.processor.gene_symbols)
            summary, warnings = {**summary, "weak_labels": np.asarray(weak, dtype=object)}, [*warnings, *more]
        for warning in warnings:
            logger.warning(warning)
        return summary

    @property
    def can_explain(self) -> bool:
        """Whether the checkpoint has a label readout, which [`explain`] takes its terms from."""
        return getattr(self._bridge(), "label_readout", None) is not None

    @with_receipt
    def explain(
        self,
        adata: Any,
        label_key: str = "scmmgpt_cell_type",
        *,
        cluster_key: str | None = None,
        key_added: str = "scmmgpt",
        batch_size: int | None = None,
        **read_kwargs: Any,
    ) -> Evidence:
        """Find the genes that speak for the label of each cell, against the runner-up.

        Terms are those of the label readout, exact and gene by gene (`evidence_scmmgpt`). Similarities and matching,
        where a checkpoint uses them too, are not part of them.

        Args:
            label_key: Column of `obs` with labels: those of [`annotate`], or others that the checkpoint knows, in any
                words. Cells of labels that it does not know get no evidence.
            cluster_key: Column of `obs` with clusters; the commonest label of each is explained, too.
            adata, key_added, batch_size, read_kwargs: As for [`annotate`]; 512 cells a batch by default.

        Returns:
            [`Evidence`], whose `group_rows` and `cell_rows` are tables. `obs` gets `{key}_evidence` (genes, the most
            important first), `{key}_rival` (the runner-up) and `{key}_marker_support` (share of the markers of its
            label that a cell expresses); `uns["{key}"]["explain"]` has the genes of each label.

        Raises:
            ValueError: If the checkpoint has no label readout.
        """
        clusters = None if cluster_key is None else _words(adata, cluster_key)
        choice = self.processor.choose_input(adata, **read_kwargs)
        labels = _words(adata, label_key)
        evidence = self.explain_cells(adata, choice, labels, np.unique(labels), clusters, batch_size)
        finish_report(choice.report)
        return self.add_evidence(adata, choice, evidence, evidence.columns(), label_key, key_added)

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
        self, choice: InputChoice, labels: np.ndarray, sets: np.ndarray, clusters: np.ndarray | None = None
    ) -> Evidence:
        """The evidence of [`explain_cells`], to which no cell is added yet."""
        if not self.can_explain:
            raise ValueError(
                "This checkpoint has no label readout, whose terms are the evidence for a label. Train one with "
                "`python -m scmmgpt.train finetune` or `align`."
            )
        known = self._readout_columns()
        members = label_members(sets.tolist(), known, (self.model.config.annotation or {}).get("terms", []))
        explainer = Explainer.of(self._bridge().label_readout, choice.match.measured, members)
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
        for name, values in columns.items():
            _add_obs(adata, f"{key_added}_{name}", values)
        table = _table(row for row in evidence.group_rows() if row["level"] == "label")
        self._record(adata, key_added, choice.report, explain={"label_key": label_key, **table})
        return evidence

    def _readout_columns(self) -> dict[str, int]:
        """Trained label -> its column of the label readout, in the readout's order."""
        texts, stored = (
            self.model.config.label_readout["texts"],
            (self.model.config.annotation or {}).get("labels", {}),
        )
        label_of = {text: label for label, text in stored.items()}
        return {label_of.get(text, text): column for column, text in enumerate(texts)}

    @with_receipt
    def audit(
        self,
        adata: Any,
        label_key: str,
        *,
        cluster_key: str | None = None,
        key_added: str = "scmmgpt",
        batch_size: int | None = None,
        **read_kwargs: Any,
    ) -> Audit:
        """Judge the labels that cells were given, by the model and by markers, and rank the doubtful ones.

        A label of the file may be in any words, or broader than those of training; cells of labels that the checkpoint
        does not know are not judged (`audit_scmmgpt`). Results of [`annotate`] stay as they are.

        Args:
            label_key: Column of `obs` with the given labels.
            cluster_key: Column of `obs` with clusters, which are ranked too.
            adata, key_added, batch_size, read_kwargs: As for [`annotate`].

        Returns:
            [`Audit`], whose `group_rows` and `cell_rows` are tables. `obs` gets `{key}_audit` (verdict),
            `{key}_audit_score` (log odds, the larger the more doubtful), `{key}_audit_suggested` (the best other
            label) and `{key}_audit_genes` (genes that speak for the other label and against the given one).
        """
        given = _words(adata, label_key)
        clusters = None if cluster_key is None else _words(adata, cluster_key)
        choice = self.processor.choose_input(adata, **read_kwargs)
        columns = self.audit_cells(adata, choice, given, np.unique(given), batch_size)
        finish_report(choice.report)
        return self.add_audit(adata, choice, label_key, given, columns, clusters, key_added)

    def audit_cells(
        self, adata: Any, choice: InputChoice, given: np.ndarray, sets: np.ndarray, batch_size: int | None = None
    ) -> dict[str, np.ndarray]:
        """What [`add_audit`] needs of cells: of all the data that `choice` was made for, or of a part of them.

        `given` are the labels of these cells, and `sets` all labels of the data, sorted.
        """
        labelling = self.labelling(choice, self.annotation_settings())
        columns, probabilities = self.label_cells(adata, labelling, batch_size)
        names, terms = labelling.candidates.names, (self.model.config.annotation or {}).get("terms", [])
        set_of_cell = np.searchsorted(sets, given)
        members = label_members(sets.tolist(), {name: i for i, name in enumerate(names)}, terms)
        best, odds = judge(probabilities, members, set_of_cell)
        genes, marker_odds = np.full(len(given), "", dtype=object), np.full(len(given), np.nan, dtype=np.float32)
        if self.can_explain:
            known = self._readout_columns()
            of_readout = label_members(sets.tolist(), known, terms)
            explainer = Explainer.of(self._bridge().label_readout, choice.match.measured, of_readout)
            symbols = np.asarray([*self.processor.gene_symbols(explainer.panel.gene_ids.tolist()), ""], dtype=object)
            readout_columns = np.array([*(known.get(name, -1) for name in names), -1], dtype=np.int64)[best]
            usable: np.ndarray = (readout_columns >= 0) & of_readout[set_of_cell].any(axis=1)
            own = np.where(usable, readout_columns + explainer.first_label, 0)
            chunks, size = self._chunks(adata, _uncounted(choice)), self._batch_size(batch_size, 512)
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
        return {**columns, "odds": odds, "marker_odds": marker_odds, "genes": genes.astype(str)}

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
        self._warn_of_labels(labelling, columns)
        names, terms = labelling.candidates.names, (self.model.config.annotation or {}).get("terms", [])
        members = label_members(sets.tolist(), {name: i for i, name in enumerate(names)}, terms)
        called = np.asarray(columns["cell_type"])
        if strange := sets[~members.any(axis=1)].tolist():
            found, n_called = np.unique(called[given == strange[0]], return_counts=True)
            logger.warning(
                f"{len(strange)} of {len(sets)} labels of obs[{label_key!r}] mean no type that the checkpoint knows "
                f"({', '.join(map(repr, strange[:3]))}; it knows {', '.join(map(repr, names[:3]))}, ...): their cells "
                f"are not judged. Rename them to a type, a synonym or an id of the Cell Ontology; of {strange[0]!r} "
                f"{n_called.max() / n_called.sum():.0%} are called {str(found[n_called.argmax()])!r}."
            )
        novel = np.asarray(columns.get("novelty", np.zeros(len(given)))) > 1
        judged = {name: columns[name] for name in ("suggested", "odds", "marker_odds", "genes")}
        audit = Audit(given=given, novel=novel, called=called, clusters=clusters, **judged)
        columns_of = {"audit": audit.verdict, "audit_score": audit.score, "audit_suggested": audit.suggested}
        for name, values in {**columns_of, "audit_genes": audit.genes}.items():
            _add_obs(adata, f"{key_added}_{name}", values)
        done = {name.replace(" ", "_"): n for name, n in audit.summary().items()}
        self._record(adata, key_added, choice.report, audit={"label_key": label_key, **done})
        return audit

    def annotation_settings(
        self,
        labels: dict[str, str] | Sequence[str] | None = None,
        cl_ids: dict[str, str] | None = None,
        matching_weight: float | None = None,
        matching_candidates: int | None = None,
        temperature: float | None = None,
        tissue: str | None = None,
    ) -> dict[str, Any]:
        """The settings of [`annotate`]: the arguments, else the values stored with the checkpoint, else defaults.

        Returns:
            `labels` (label -> text), `cl_ids` (label -> id), `matching_weight`, `matching_candidates`, `temperature`
            and `readout_temperature`, at which probabilities are those of the label readout.
        """
        stored = self.model.config.annotation or {}
        if tissue is not None and labels is not None:
            raise ValueError("The candidates are either labels or those of a tissue; leave out one of both.")
        if tissue is not None:
            labels = labels_of_tissue(tissue, stored)
        before = stored.get("temperature", 1 / self._bridge().inverse_temperature().item())

        def given(value: float | None, name: str, default: float) -> float:
            return stored.get(name, default) if value is None else value

        settings: dict[str, Any] = {
            "labels": labels_with_texts(labels, stored.get("labels", {})),
            "cl_ids": {**stored.get("cl_ids", {}), **(cl_ids or {})},
            "matching_weight": float(given(matching_weight, "matching_weight", 0.5)),
            "matching_candidates": int(given(matching_candidates, "matching_candidates", 4)),
            "temperature": float(given(temperature, "temperature", before)),
            "readout_temperature": float(stored.get("readout_temperature", before)),
        }
        if not 0 <= settings["matching_weight"] <= 1:
            raise ValueError(f"matching_weight is {settings['matching_weight']}; it must be a share from 0 to 1.")
        if settings["temperature"] <= 0:
            raise ValueError(f"temperature is {settings['temperature']}; it must be positive.")
        return settings

    def calibrate(
        self,
        adata: Any,
        label_key: str,
        labels: dict[str, str] | Sequence[str] | None = None,
        *,
        cl_ids: dict[str, str] | None = None,
        batch_size: int | None = None,
        **read_kwargs: Any,
    ) -> dict[str, Any]:
        """Fit matching weight and temperature on labelled *validation* cells, never on test cells, and store them.

        Both minimise the negative log-likelihood of the true labels, on a grid. The model's configuration stores both,
        with the labels and their texts, as the defaults of [`annotate`].

        Args:
            adata: AnnData of validation cells.
            label_key: Column of `obs` with the true labels. Cells whose label is not among `labels` are left out.
            labels, cl_ids, batch_size, read_kwargs: As for [`annotate`].

        Returns:
            The stored settings, `nll`, `accuracy`, `n_cells` and `n_left_out`.
        """
        settings = self.annotation_settings(labels, cl_ids, matching_weight=0.5)
        names = list(settings["labels"])
        truth = _words(adata, label_key)
        usable = np.isin(truth, names)
        if not usable.any():
            raise ValueError(
                f"None of the {len(truth)} labels in obs[{label_key!r}] is among the {len(names)} candidates, "
                f"for instance {truth[0]!r}; the candidates begin with {names[:3]}."
            )
        choice = self.processor.choose_input(adata, **read_kwargs)
        cells = choice.convert(adata)[np.flatnonzero(usable)]
        texts = list(settings["labels"].values())
        readout = self._text_scores(texts, np.zeros(len(texts), bool), choice)
        similarity, match, _ = self._label_scores([cells], len(cells), texts, settings, batch_size, readout=readout)
        target = np.asarray([names.index(label) for label in truth[usable]])
        best = fit_mixture(similarity, match, target, settings["temperature"])
        cl_ids = {name: i for name, i in settings["cl_ids"].items() if name in settings["labels"]}
        fitted: dict[str, Any] = {name: best[name] for name in ("temperature", "matching_weight")}
        before = dict(self.model.config.annotation or {})
        before.pop("min_score", None)  # of another temperature
        if set(np.unique(target)) == set(range(len(names))):  # else a type without a cell would seem new
            vocab_size = self.model.config.cell_config.vocab_size
            novelty = fit_novelty(cells, target, choice.match.measured, vocab_size)
            kept = {k: v for k, v in (before.get("novelty") or {}).items() if k == "others_unit"}  # the readout's own
            fitted |= {} if novelty is None else {"novelty": {**kept, **novelty}}
        fitted["label_sets"] = fit_label_sets(
            label_probabilities(
                similarity, match, logit_scale=1 / best["temperature"], matching_weight=best["matching_weight"]
            ),
            target,
        )
        # What other commands stored stays: terms and bonus of fine-tuning.
        self.model.config.annotation = stored = {**before, **settings, "cl_ids": cl_ids, **fitted}
        return {**stored, **best, "n_cells": len(target), "n_left_out": int((~usable).sum())}

    def _probabilities(
        self,
        adata: Any,
        choice: InputChoice,
        candidates: Candidates,
        settings: dict[str, Any],
        readout: TextScores | None,
        unseen_bonus: float,
        batch_size: int | None,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Probabilities of the labels, `(n_cells, n_labels)`, and the novelty of each cell, None without a threshold.

        The novelty is NaN where the file measures too few genes.
        """
        stored = (self.model.config.annotation or {}).get("novelty")
        # Cells of a label that was never trained may be among the readout's cells of no label: the gate decides there.
        panel = None if readout is None or readout.has_new_labels else readout.panel
        novelty_of = Novelty.of(stored, choice.match.measured, self.model.config.cell_config.vocab_size, panel)
        chunks, n_cells = self._chunks(adata, choice), adata.shape[0]
        similarity, match, novelty = self._label_scores(
            chunks, n_cells, candidates.texts, settings, batch_size, novelty_of, readout
        )
        if stored and novelty is None:
            novelty = np.full(len(similarity), np.nan, dtype=np.float32)
        scale, weight = 1 / settings["temperature"], settings["matching_weight"]
        similarity = similarity + unseen_bonus * candidates.unseen
        of_texts = label_probabilities(similarity, match, logit_scale=scale, matching_weight=weight)
        return candidates.pool(of_texts), novelty

    def _text_scores(self, texts: Sequence[str], unseen: np.ndarray, choice: InputChoice) -> TextScores | None:
        """The label readout's scores of texts for the genes of a file, or None if it cannot score them."""
        readout = getattr(self._bridge(), "label_readout", None)
        if readout is None:
            return None
        trained = self.model.config.label_readout["texts"]

        def embed(texts: Sequence[str]) -> np.ndarray:
            return text_states(self._bridge(), self.processor, texts)

        gate, index = (self.model.config.annotation or {}).get("unseen_gate"), self.processor.gene_index
        return TextScores.of(readout, trained, texts, unseen, choice.match.measured, gate, index, embed)

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
        """Similarity, matching and novelty of all cells, or `None` in place of one; see [`LabelScorer`]."""
        weight = (self.model.config.annotation or {}).get("similarity_weight", 0.0)
        scorer = LabelScorer(self._bridge(), self.processor, texts, settings, weight, readout, novelty_of)
        # Each cell is matched with each of its candidates: the pairs of these cells fill a batch.
        batch_size = max(self._batch_size(batch_size, 64) // max(scorer.num_candidates, 1), 1)
        return scorer.name(self._map_cells(scorer, chunks, batch_size, "Annotating", n_cells))

    # -- describe -----------------------------------------------------------------------------------------------------

    @with_receipt
    def describe(
        self,
        adata: Any,
        prompt: str | None = None,
        *,
        max_new_tokens: int = 64,
        proof: bool = False,
        cluster_key: str | None = None,
        key_added: str = "scmmgpt",
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Describe every cell in words.

        Args:
            prompt: A question about one cell; by default the prompt of training. `<cell>` in the prompt stands for the
                cell; a prompt without `<cell>` follows the cell.
            max_new_tokens: Longest description, in tokens.
            proof: Describe by counts in place of the language model: type, what is notable against the other cells of
                the file, and the alternative, each with the genes and counts that show it (`proof_scmmgpt`).
            cluster_key: Column of `obs` with clusters to describe too, with `proof`.
            adata, key_added, batch_size: As for [`annotate`]; 16 cells a batch by default.
            kwargs: For [`read_cells`], as for [`annotate`]; the others for the model's `generate` (`num_beams`,
                `do_sample`, `temperature`, ...). Decoding is greedy by default.

        Returns:
            The same `adata`, with `obs["{key}_description"]`. With `proof`, `uns["{key}"]["describe"]` has the tables
            `clauses` (a row for each gene of each clause of each cell) and `groups` (of types and clusters).
        """
        if proof:
            strange = {"prompt": prompt, **kwargs}.items() - {("prompt", None)}
            if given := sorted(name for name, _ in strange if name not in READ_OPTIONS):
                raise ValueError(f"{given} are for the language model, which a description with proof does not ask.")
            return self._describe_with_proof(adata, cluster_key, key_added, self._batch_size(batch_size, 512), kwargs)
        if cluster_key is not None:
            raise ValueError("Clusters are described with proof=True.")
        model = self._language_model("describe")
        prompt = self._prompt(prompt)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
        read_kwargs = {name: kwargs.pop(name) for name in READ_OPTIONS if name in kwargs}
        options = {"do_sample": False, **kwargs, "max_new_tokens": max_new_tokens}
        if options.get("num_return_sequences", 1) != 1:
            raise ValueError("describe returns one description per cell; call model.generate for several.")
        choice = self.processor.choose_input(adata, **read_kwargs)

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
        finish_report(choice.report)
        adata.obs[f"{key_added}_description"] = texts.astype(str)
        done = {"prompt": prompt, "max_new_tokens": max_new_tokens, "distinct": len(set(texts))}
        return self._record(adata, key_added, choice.report, describe=done)

    def _describe_with_proof(
        self, adata: Any, cluster_key: str | None, key_added: str, batch_size: int, read_kwargs: dict[str, Any]
    ) -> Any:
        """[`describe`] by counts. All cells are in memory."""
        if not self.can_explain:
            raise ValueError("This checkpoint has no label readout, whose genes are the proof of a description.")
        clusters = None if cluster_key is None else _words(adata, cluster_key)
        choice = self.processor.choose_input(adata, **read_kwargs)
        labelling = self.labelling(choice, self.annotation_settings(), min_score=MIN_SCORE)
        columns, scores = self.label_cells(adata, labelling)
        self._warn_of_labels(labelling, columns, scores)
        terms, known = (self.model.config.annotation or {}).get("terms", []), self._readout_columns()
        kinds, kind_of_cell = np.unique(np.asarray(columns["cell_type"]).astype(str), return_inverse=True)
        members = label_members(kinds.tolist(), known, terms)
        members[members.sum(axis=1) > len(known) / 2] = False  # a term of most labels says nothing
        names = labelling.candidates.names
        readout_columns = [known[name] for name in names if name in known]
        probabilities = np.zeros((len(kind_of_cell), len(known)), dtype=np.float32)
        probabilities[:, readout_columns] = np.asarray(scores)[:, [name in known for name in names]]

        parts = list(self._chunks(adata, _uncounted(choice)))
        cells = type(parts[0]).concatenate(parts)
        finish_report(choice.report)
        explainer = Explainer.of(self._bridge().label_readout, choice.match.measured, members)
        genes = np.unique(choice.match.measured)
        words = genes, kinds.tolist(), list(known)
        proposed = propose(cells, explainer, *words, kind_of_cell, probabilities, batch_size)
        expression = Expression(cells, genes, self.processor.gene_symbols(genes.tolist()))
        typed = np.where(members.any(axis=1), kinds, "")[kind_of_cell].astype(object)
        within = {name: terms_above(mine, known, terms) for name, mine in zip(kinds.tolist(), members, strict=True)}
        proved = Proof(expression, typed, *proposed, within, tissues_of(adata.obs))
        adata.obs[f"{key_added}_description"] = proved.texts().astype(str)
        groups = list(proved.group_rows("label", np.where(typed == "", "Unknown", typed)))
        if clusters is not None:
            groups += proved.group_rows("cluster", clusters)
        done = {"proof": True, "clauses": _table(proved.rows(adata.obs_names)), "groups": _table(groups)}
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

    # -- generate -----------------------------------------------------------------------------------------------------

    @with_receipt
    def generate(
        self,
        prompts: str | Sequence[str] | dict[str, str],
        n_cells: int = 1,
        *,
        genes: str | Sequence[str] | None = None,
        library_size: float | np.ndarray | None = None,
        do_sample: bool | None = None,
        seed: int = 0,
        max_genes: int | None = None,
        key_added: str = "scmmgpt",
        batch_size: int | None = None,
    ) -> Any:
        """Generate expression profiles of cells from descriptions in words.

        Args:
            prompts: Descriptions of cells; or label -> description, whose labels are kept in `obs["cell_type"]`.
            n_cells: Cells per prompt.
            genes: Symbols, aliases or Ensembl ids; by default the whole gene vocabulary.
            library_size: Counts of a sampled cell over all genes, a number or `(n_cells,)`; by default drawn with the
                state of the cell, or, for a checkpoint without states, those of a typical training cell.
            do_sample: Draw counts, by default wherever the checkpoint predicts a distribution (it has states of cells,
                or `expression_head` is `nb` or `zinb`). Without sampling every cell is the mean of its prompt.
            seed: Seed of the draws, together with the prompt and the cell's number.
            max_genes: Genes that are decoded in one turn, by default as many as in training, by a checkpoint without
                states. The prediction of a gene depends a little on the other genes of its turn, and so on `genes`.
            key_added, batch_size: As for [`annotate`]; 32 cells a batch by default.

        Returns:
            A new `AnnData` `(len(prompts) * n_cells, n_genes)`: `X` is log1p of counts per 10,000; with sampling,
            `layers["counts"]` has the counts; `obs["prompt"]`; `var_names` are the model's gene symbols. Where the
            checkpoint keeps states of training cells, `obs["training_distance"]` and the `diversity` of each prompt in
            `uns[key_added]["generate"]` compare the cells with these (see [`compare_cells`]).
        """
        try:
            from anndata import AnnData
            from scipy.sparse import csr_matrix, vstack  # most values of a cell are zero
        except ImportError as error:
            raise ImportError("Generated cells are an AnnData; install it with `pip install anndata`.") from error

        model, config = self._language_model("generate"), self.model.config
        labels, prompts = labels_and_prompts(prompts)
        if n_cells < 1:
            raise ValueError(f"n_cells is {n_cells}; it must be at least 1.")
        warn_of_unknown_types(prompts, config.annotation or {})
        do_sample = decide_sampling(config, do_sample, n_cells)
        gene_ids = target_genes(self.processor, genes)
        turns = gene_turns(len(gene_ids), max_genes or self.processor.max_target_genes)
        states = model.model.cell_states
        blocks: Iterable[tuple[np.ndarray, np.ndarray]]
        if states is None:
            size = library_sizes(self.processor.library_size if library_size is None else library_size, n_cells)
            options = (do_sample, seed, self._batch_size(batch_size, 32))
            blocks = decode_cells(model, self.processor, prompts, gene_ids, turns, size, *options)
        else:
            # Each prompt is encoded alone, since padding changes bits.
            features = torch.cat([encode_texts(self._bridge(), self.processor, [prompt]) for prompt in prompts])
            turns = turns[:1]
            if do_sample:
                given = None if library_size is None else library_sizes(library_size, n_cells)
                blocks = draw_cells(states, features, prompts, n_cells, gene_ids, given, seed)
            else:
                blocks = [(states.mean_expression(features)[:, gene_ids], np.empty(0))]
        parts, sizes_of_parts = zip(*((csr_matrix(part), sizes) for part, sizes in blocks), strict=True)
        values, sizes = vstack(parts, format="csr"), np.concatenate(sizes_of_parts)
        rows = np.repeat(np.arange(len(prompts)), n_cells)
        # The library size counts all genes of the cell; `genes` may be some of them.
        generated = AnnData(X=log1p_cp10k(values, sizes) if do_sample else values[rows])
        generated.obs_names = [f"prompt{p}-cell{i}" for p in range(len(prompts)) for i in range(n_cells)]
        generated.var_names = self.processor.gene_symbols(gene_ids)
        for name, words in {"prompt": prompts, "cell_type": labels}.items():
            if words:
                _add_obs(generated, name, np.repeat(np.asarray(words, dtype=object), n_cells))
        if do_sample:
            generated.layers["counts"] = values
            generated.obs["library_size"] = sizes
        done = {"prompts": np.asarray(prompts, dtype=object), "n_cells": n_cells, "seed": seed}
        if states is not None and do_sample and (compared := compare_cells(states, features, prompts, n_cells, seed)):
            generated.obs["training_distance"], done["diversity"] = compared
        return self._record(generated, key_added, None, generate={**done, "sampled": do_sample, "turns": len(turns)})

    # -- embed and search ---------------------------------------------------------------------------------------------

    @with_receipt
    def embed(
        self,
        adata: Any,
        *,
        of: str = "cell-text",
        key_added: str = "X_scmmgpt",
        batch_size: int | None = None,
        **read_kwargs: Any,
    ) -> Any:
        """Embed every cell.

        Args:
            of: `"cell-text"` is the mean of the cell's queries in the shared space, `projection_dim` wide; `"cell"` is
                the cell model's own embedding (the `<cls>` state, as scGPT's), `hidden_size` wide. Both are
                L2-normalised.
            key_added: Name in `obsm`.
            adata, batch_size, read_kwargs: As for [`annotate`].

        Returns:
            The same `adata`, with the float32 embedding in `obsm[key_added]`.
        """
        choice = self.processor.choose_input(adata, **read_kwargs)
        embedding = self.embed_cells(adata, choice, of, batch_size)
        finish_report(choice.report)
        return self.add_embedding(adata, choice, embedding, of, key_added)

    def embed_cells(
        self, adata: Any, choice: InputChoice, of: str = "cell-text", batch_size: int | None = None
    ) -> np.ndarray:
        """Embeddings of cells, float32: of all of the data that `choice` was made for, or of a part."""
        if of not in ("cell-text", "cell"):
            raise ValueError(f"of is {of!r}; choose 'cell-text' (shared with text) or 'cell' (the cell model's own).")

        features_of = self.features_of(choice) if of == "cell-text" else None

        def embedding(cells: Cells) -> tuple[torch.Tensor, ...]:
            if features_of is None:
                inputs = self._inputs(cells)
                inputs = {name: inputs[name] for name in CELL_INPUTS}
                embedded = self._bridge().cell_model(**inputs, cls_only=True).pooler_output
            else:
                embedded = features_of(cells).mean(dim=1)
            return (torch.nn.functional.normalize(embedded.float(), dim=-1),)

        chunks, batch_size = self._chunks(adata, choice), self._batch_size(batch_size, 64)
        return self._map_cells(embedding, chunks, batch_size, "Embedding", adata.shape[0])[0]

    def add_embedding(
        self, adata: Any, choice: InputChoice, embedding: Any, of: str = "cell-text", key_added: str = "X_scmmgpt"
    ) -> Any:
        """Add the result of [`embed_cells`] for all cells to `adata`."""
        adata.obsm[key_added] = embedding
        return self._record(adata, "scmmgpt", choice.report, embed={"of": of, "key": key_added})

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings of texts in the space of [`embed`]'s `"cell-text"`, float32 `(n_texts, projection_dim)`."""
        if not len(texts) or not all(text.strip() for text in texts):
            raise ValueError("The text to search for is empty; describe the wanted cells.")
        return encode_texts(self._bridge(), self.processor, texts).float().cpu().numpy()

    @with_receipt
    def search(
        self,
        adata: Any,
        text: str | Sequence[str],
        top_k: int = 10,
        *,
        by: str = "similarity",
        key_added: str | None = None,
        batch_size: int | None = None,
        **read_kwargs: Any,
    ) -> list:
        """Find the cells that a text describes best.

        Args:
            text: Description of the wanted cells, one text or several. What follows "without", "lacking", "but not"
                or ", not", and what "-negative" follows, counts against a cell: a gene by its expression, other words
                by their similarity. Genes and programmes after "high", "low" or in "more CD8A than CD4" count by their
                expression (`query_scmmgpt`).
            top_k: Cells to return per text.
            by: `"similarity"` of cell and text in the shared space; where fine-tuning chose the readout alone, of the
                text and the texts of the labels, weighted by the cell's probabilities. Or `"genes"`: the expression of
                the genes whose own texts are nearest, which finds conditions that no cell of training shows. It needs
                a checkpoint that was trained with `gene_texts`.
            key_added: Column of `obs` to add every cell's similarity as (one text only).
            adata, batch_size, read_kwargs: As for [`annotate`].

        Returns:
            Hits, best first, each with `rank`, `cell` (its name), `index` (its row), `score` (cosine similarity, -1 to
            1, which has no zero that means "no match"; by genes, in standard deviations of training cells; where the
            text denies or compares something, in standard deviations of these cells) and `z`
            (standard deviations of the score above the mean of these cells); for several texts, a list of such lists.
        """
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}; it must be at least 1.")
        if key_added is not None and not isinstance(text, str) and len(text) > 1:
            raise ValueError(f"key_added names one column of obs, but there are {len(text)} texts; pass one text.")
        choice = self.processor.choose_input(adata, **read_kwargs)
        columns = self.search_cells(adata, choice, text, by, batch_size)
        finish_report(choice.report)
        hits = self.add_search(adata, choice, columns, text, top_k, by, key_added)
        return hits[0] if isinstance(text, str) else hits

    def search_cells(
        self,
        adata: Any,
        choice: InputChoice,
        text: str | Sequence[str],
        by: str = "similarity",
        batch_size: int | None = None,
    ) -> np.ndarray:
        """What [`add_search`] scores cells by, float32 `(n_cells, n_columns)`: all the data of a choice, or a part."""
        texts = [text] if isinstance(text, str) else [str(item) for item in text]
        if not texts or not all(item.strip() for item in texts):
            raise ValueError("The text to search for is empty; describe the wanted cells.")
        if by not in ("similarity", "genes"):
            raise ValueError(f"by is {by!r}; choose 'similarity' or 'genes'.")
        if by == "genes" and "text_width" not in (self.model.config.label_readout or {}):
            raise ValueError(
                "This checkpoint has no texts about genes; train with gene_texts, or search by similarity."
            )
        score, batch_size = self._search_scores(texts, by, choice), self._batch_size(batch_size, 64)
        columns = self._map_cells(score, self._chunks(adata, choice), batch_size, "Searching", adata.shape[0])
        return np.concatenate(columns, axis=1)

    def add_search(
        self,
        adata: Any,
        choice: InputChoice,
        columns: np.ndarray,
        text: str | Sequence[str],
        top_k: int,
        by: str = "similarity",
        key_added: str | None = None,
    ) -> list[list[dict[str, Any]]]:
        """The hits of each text, from what [`search_cells`] gives for all cells; scores are added as `key_added`."""
        texts = [text] if isinstance(text, str) else list(text)
        plan = self._search_plan(texts, choice)
        if plan.absent:
            logger.warning(f"The file does not measure {', '.join(plan.absent)}: the search cannot look at it.")
        scores = columns if by == "genes" else plan.scores(columns)
        if key_added is not None:
            adata.obs[key_added] = scores[:, 0]
            done = {"text": texts[0], "by": by, "key": key_added}
            self._record(adata, "scmmgpt", choice.report, search=done)
        return [_best_hits(column, adata.obs.index, top_k) for column in scores.T]

    def _search_plan(self, texts: list[str], choice: InputChoice) -> Search:
        return Search(texts, self.processor.gene_index, choice.match.measured)

    def _search_scores(self, texts: list[str], by: str, choice: InputChoice) -> CellFunction:
        """Scores of texts by genes; or similarities and expression, from which a search is scored."""
        if by == "genes":
            states = text_states(self._bridge(), self.processor, texts)
            genes = GeneSearch.of(self._bridge().label_readout, choice.match.measured, states)
            return lambda cells: (torch.from_numpy(genes(cells)),)
        plan, bridge = self._search_plan(texts, choice), self._bridge()
        if not plan.texts:  # counts alone decide
            return lambda cells: (torch.from_numpy(plan.expression(cells)),)
        stored = self.model.config.annotation or {}
        if bridge.config.profile_readout and stored.get("similarity_weight") == 0:  # the choice of fine-tuning
            panel = bridge.label_readout.for_genes(choice.match.measured)
            trained = self.model.config.label_readout["texts"]
            of_labels = mean_similarity(bridge, self.processor, plan.texts, trained, panel)
            return lambda cells: (torch.from_numpy(of_labels(cells)), torch.from_numpy(plan.expression(cells)))
        text_features = encode_texts(bridge, self.processor, plan.texts)
        features_of = self.features_of(choice)

        def similarity(cells: Cells) -> tuple[torch.Tensor, ...]:
            return cell_text_similarity(features_of(cells), text_features), torch.from_numpy(plan.expression(cells))

        return similarity

    def features_of(self, choice: InputChoice) -> Callable[[Cells], torch.Tensor]:
        """Cells -> features in the shared space; where labels place them, by the readout for the genes of the data."""
        bridge = self._bridge()
        places = "feature_width" in (bridge.config.label_readout or {})
        panel = bridge.label_readout.for_genes(choice.match.measured) if places else None

        def features(cells: Cells) -> torch.Tensor:
            inputs = self._inputs(cells)
            if panel is not None:
                inputs["readout_scores"] = torch.from_numpy(panel(cells)).to(self.device)
            return bridge.get_cell_features(**inputs)

        return features

    # -- shared -------------------------------------------------------------------------------------------------------

    def _bridge(self) -> ScMMGPTBridgeModel:
        """Cell model, Q-Former, contrast and matching, the part that both kinds of checkpoint have."""
        return cast(ScMMGPTBridgeModel, getattr(self.model, "model", self.model))

    def _language_model(self, verb: str) -> ScMMGPTForConditionalGeneration:
        """The model, which must have a language model for `verb`."""
        if not hasattr(self.model, "generate_cells"):
            by_counts = "; `proof=True` (`--proof`) describes by counts" if verb == "describe" else ""
            raise ValueError(
                f"This checkpoint has no language model (it is of `align` or `finetune`), so it cannot {verb}"
                f"{by_counts}. Train stage 2 with `python -m scmmgpt.train tune`."
            )
        return cast(ScMMGPTForConditionalGeneration, self.model)

    def _batch_size(self, given: int | None, default: int) -> int:
        batch_size = given or self.batch_size or default
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
        return batch_size

    def _inputs(self, cells: Cells) -> dict[str, Any]:
        """Model inputs of a batch of cells, on the device."""
        return dict(self.processor(cells=cells).to(self.device))

    def _chunks(self, adata: Any, choice: InputChoice) -> Iterator[Cells]:
        """The cells of an AnnData, at most `SORTED_CELLS` in memory at a time."""
        # The class is the processor's: a checkpoint may load each file twice.
        parts: list[Cells] = []
        cells_hash = CellsHash()
        for part in choice.iter_cells(adata):
            cells_hash.update(part)
            parts.append(part)
            if sum(map(len, parts)) + len(part) > SORTED_CELLS:
                yield type(part).concatenate(parts)
                parts = []
        if parts:
            yield type(part).concatenate(parts)
        choice.report["cells"]["hash"] = cells_hash.hexdigest()

    def _batches(
        self, chunks: Iterable[Cells], batch_size: int, what: str, total: int
    ) -> Iterator[tuple[np.ndarray, Cells]]:
        """Row numbers and cells of each batch: of a chunk, cells alike in length, the longest first."""
        first = 0
        with logging.tqdm(desc=what, unit="cell", total=total, delay=3) as progress:
            for chunk in chunks:
                order = np.argsort(-np.diff(chunk.indptr), kind="stable")
                for start in range(0, len(order), batch_size):
                    rows = order[start : start + batch_size]
                    yield first + rows, chunk[rows]
                    progress.update(len(rows))
                first += len(chunk)

    def _map_cells(
        self, function: CellFunction, chunks: Iterable[Cells], batch_size: int, what: str, total: int
    ) -> list[np.ndarray]:
        """Apply `function` to all cells, batch by batch; float32 arrays in the cells' order."""
        rows, results = [], []
        for numbers, cells in self._batches(chunks, batch_size, what, total):
            with torch.inference_mode():
                results.append([output.float().cpu().numpy() for output in function(cells)])
            rows.append(numbers)
        order = np.argsort(np.concatenate(rows))
        return [np.concatenate(parts)[order] for parts in zip(*results, strict=True)]

    def _record(self, adata: Any, key: str, report: dict[str, Any] | None, **done: Any) -> Any:
        """Add the settings of a verb, and the report of what was read, to `uns`; entries of other verbs stay."""
        done["checkpoint"] = str(self.model.config._name_or_path or "")
        added = [(key, done)] if report is None else [("scmmgpt", {"input": storable(report)}), (key, done)]
        for name, entries in added:
            before = adata.uns.get(name, {})
            if not isinstance(before, Mapping):
                logger.warning(f"uns[{name!r}] was {str(before)[:60]!r}; the results are now there.")
                before = {}
            adata.uns[name] = {**before, **entries}
        return adata


# -- small parts ------------------------------------------------------------------------------------------------------


def best_device() -> str:
    """`"cuda"`, `"mps"` or `"cpu"`: the fastest that this machine has."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _dtype_on_cpu(given: torch.dtype | None, stored: str | torch.dtype | None) -> torch.dtype | None:
    """The given precision, with a warning where it is slow, else float32 where the stored one is slow."""
    stored = getattr(torch, stored) if isinstance(stored, str) else stored
    dtype = given or stored
    if dtype is None or cpu_dtype(dtype) == dtype:
        return given
    name, wide = str(dtype).removeprefix("torch."), cpu_dtype(dtype)
    if given is None:
        logger.info(
            f"This CPU is faster in float32 than in {name}, the precision of the checkpoint: it runs in float32."
        )
        return wide
    logger.warning(f"This CPU is slower in {name} than in float32, often many times; leave dtype out, or pass {wide}.")
    return given


def _best_hits(similarity: np.ndarray, names: Any, top_k: int) -> list[dict[str, Any]]:
    best = enumerate(np.argsort(-similarity, kind="stable")[:top_k].tolist(), start=1)
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


def _uncounted(choice: InputChoice) -> InputChoice:
    """A copy of a choice with a report of its own, for a second pass over the cells."""
    return replace(choice, report=copy.deepcopy(choice.report))


def _counted(labels: np.ndarray) -> tuple[list[str], list[int]]:
    """Labels, and how many cells have each."""
    names, counts = np.unique(labels, return_counts=True)
    return names.tolist(), counts.tolist()


def _advice_on_tissues(obs: Any, counts: Mapping[str, int], stored: Mapping[str, Any]) -> list[str]:
    """Advice to name a tissue, where cells of one tissue have labels that no cell of it had in training.

    Args:
        obs: Of the data; its column "tissue", if any, says where the cells are from.
        counts: Label -> cells.
        stored: `labels` and `tissues`, terms, of the checkpoint.
    """
    tissues = stored.get("tissues") or []
    named = [str(word) for word in np.unique(tissues_of(obs).astype(str)) if word]
    terms = [term for name in named if (term := term_of(name, tissues)) is not None]
    if not tissues or len(named) > 1 or (named and not terms):
        return []

    def strange(term: Mapping[str, Any]) -> dict[str, int]:
        return {label: n for label, n in counts.items() if label in stored["labels"] and label not in term["labels"]}

    term = min(terms or tissues, key=lambda term: sum(strange(term).values()))
    others, n_cells = strange(term), sum(counts.values())
    if sum(others.values()) < STRANGE_SHARE * n_cells or (not named and len(others) < MIN_STRANGE):
        return []
    shown = ", ".join(sorted(others, key=lambda label: -others[label])[:3])
    if named:
        start = f"The file says that the tissue is {named[0]!r}; {sum(others.values())} of {n_cells} cells have labels"
        said = f"{start} that the checkpoint's cells of this tissue did not have ({shown})."
        return [f"{said} `tissue='{term['name']}'` chooses among the others."]
    known = ", ".join(str(term["name"]) for term in tissues)
    said = f"The {len(counts)} labels are of several tissues (beside {term['name']}: {shown})."
    return [f"{said} If the cells are of one, name it by `tissue=`: {known}."]


def _words(adata: Any, key: str) -> np.ndarray:
    """A column of `obs`, as str `(n_obs,)`."""
    need_columns(adata.obs, key)
    return np.asarray(adata.obs[key], dtype=str)


def _sum_of_rows(matrix: Any) -> np.ndarray:
    """The sum over all rows that have numbers, of an array or of one that comes in blocks of rows."""
    blocks = matrix.blocks() if hasattr(matrix, "blocks") else [(0, matrix)]
    return np.sum([np.nansum(block, axis=0) for _, block in blocks], axis=0)


def _table(rows: Iterable[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Rows as columns that `.h5ad` files hold."""
    rows = list(rows)
    table = {name: np.asarray([row[name] for row in rows]) for name in (rows[0] if rows else ())}
    return {name: values.astype(object) if values.dtype.kind == "U" else values for name, values in table.items()}


def _add_obs(adata: Any, name: str, values: np.ndarray) -> None:
    adata.obs[name] = values
    if values.dtype.kind in "UO":
        adata.obs[name] = adata.obs[name].astype("category")


def storable(value: Any) -> Any:
    """A part of a report in types that `.h5ad` files hold."""
    if isinstance(value, Mapping):
        return {str(k).replace("/", "_"): storable(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return np.array(value, dtype=object if any(isinstance(v, str) for v in value) else None)
    return value
