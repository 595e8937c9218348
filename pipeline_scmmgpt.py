"""The tasks of scMMGPT over AnnData: annotate, describe, generate, embed and search cells.

Each task is a verb of [`ScMMGPTPipeline`]. A verb adds its results to the AnnData under names that begin with
`scmmgpt`, drops nothing and returns the same object:

>>> pipeline = ScMMGPTPipeline.from_pretrained("path/to/checkpoint")  # doctest: +SKIP
>>> pipeline.annotate(adata).obs["scmmgpt_cell_type"]  # doctest: +SKIP

Through transformers the same object is `pipeline("cell-annotation", model=path, trust_remote_code=True)`.

`adata.uns["scmmgpt"]` holds the matrix and the genes that were read, the evidence for that choice, and the settings
and the receipt of each verb (`receipt_scmmgpt`). The result of a cell does not depend on its batch or its place, and
that of `annotate` on other cells only as `read_batch` says.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from .audit_scmmgpt import Audit
from .cells_scmmgpt import log1p_cp10k
from .configuration_scmmgpt import PIPELINE_TASKS, ScMMGPTConfig
from .describing_scmmgpt import DescriptionSteps
from .evidence_scmmgpt import Evidence
from .generation_scmmgpt import (
    compare_cells,
    decide_sampling,
    decode_cells,
    draw_cells,
    gene_turns,
    labels_and_prompts,
    library_sizes,
    target_genes,
    warn_of_panels,
    warn_of_unknown_types,
)
from .machine_scmmgpt import best_device, cpu_dtype
from .modeling_scmmgpt import ScMMGPTForCellTextAlignment, ScMMGPTForConditionalGeneration
from .passes_scmmgpt import uncounted
from .processing_scmmgpt import ScMMGPTProcessor
from .receipt_scmmgpt import with_receipt
from .records_scmmgpt import add_column, clusters_of, finish_report, recorded, words_of
from .scoring_scmmgpt import encode_texts
from .searching_scmmgpt import SearchSteps


logger = logging.get_logger(__name__)

READ_OPTIONS = ("layer", "assume", "gene_column", "organism", "force")  # of `read_cells`, taken by every verb


class ScMMGPTPipeline(DescriptionSteps, SearchSteps):
    """A model and its processor, with every task as a verb over AnnData.

    A verb is a few lines here. The steps of the verbs, which are public for commands that compute a part of the cells
    at a time, are in the classes below. The call path of `annotate(adata)`, file by file:

        choose_input              reading_scmmgpt: which matrix and genes, and a report of the choice
                                      -> matrices_scmmgpt: the kind of each matrix
                                      -> genes_scmmgpt: variables -> genes of the vocabulary
        annotation_settings       labelling_scmmgpt: the labels, temperature, matching weight
                                      -> labels_scmmgpt: labels in any words -> texts to score
        labelling                     -> unseen_scmmgpt, readout_scmmgpt: the readout for the genes of the file
        label_cells                   -> passes_scmmgpt: batch by batch,
                                          conversion_scmmgpt: rows of the AnnData -> Cells
                                          scoring_scmmgpt: Cells -> scores of the texts, and novelty
                                              -> feature_extraction_scmmgpt: Cells -> gene ids and values
                                              -> modeling_scmmgpt: similarity and matching with the texts
                                      -> annotation_scmmgpt: scores -> probabilities -> the label of each cell
        add_labels                    -> votes_scmmgpt: labels of clusters
                                      -> records_scmmgpt: columns, settings and report -> the AnnData
        with_receipt              receipt_scmmgpt: what the result was computed from

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
        super().__init__(model, processor, device, batch_size)
        self.task = task

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
        read_batch: bool | None = None,
        key_added: str = "scmmgpt",
        batch_size: int | None = None,
        **read_kwargs: Any,
    ) -> Any:
        """Annotate every cell with the candidate label whose text fits the cell best.

        A label may be in other words than those of training: a synonym, a spelling, a plural, an id of the Cell
        Ontology, or a broader type, whose probability is the sum over its kinds. The labels that the checkpoint knows
        compete even if they are not candidates, so a cell that is none of the candidates has a low score. A cell that
        is like no known type is `"Unknown"`, if `finetune` or `calibrate` stored what no known type expresses. A
        checkpoint of `release` names such a cell by the reference profile of a type that no training cell had, if one
        leads by far; in `labels` these types are candidates by their profiles, other types by their texts.

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
            read_batch: Look at the other cells before the first is annotated; the result of a cell then depends on
                them. With True, the place of each label that was never trained is corrected by the cells that are most
                like it. By default, where the checkpoint is one of `release`, the cells of a file of `MIN_FILE` or
                more refine the labels (`refinement_scmmgpt`), and from `MIN_BATCH` cells on novelty is judged with
                those of the most similar scores, and labels are weighed by the tissues that the cells are like
                (`tissues_scmmgpt`). With False each cell is alone.
            key_added: Prefix of the added names.
            batch_size: Cells per batch, 64 by default.
            read_kwargs: For [`read_cells`]: `layer`, `assume`, `gene_column`, `organism`, `force`.

        Returns:
            The same `adata`, with `obs`: `{key}_cell_type`, `{key}_cl_id`, `{key}_score` (probability of the label),
            `{key}_margin` (of the best candidate over the runner-up), `{key}_entropy` (0 certain .. 1 uniform) and
            `{key}_novelty` (above 1 the cell is like no known type; NaN if too few genes are measured), by default
            `{key}_by_profile` (whether the label rests on a reference profile and no training cell), with `error_rate`
            `{key}_label_set` (joined by " | ", the most probable first);
            `obsm["{key}_probabilities"]` `(n_obs, n_labels)` in the order of `uns["{key}"]["annotate"]["labels"]`. A
            row that sums to less than 1 leaves the rest to known labels that are not candidates.
        """
        clusters = None if cluster_key is None else clusters_of(adata.obs, cluster_key)
        choice = self.processor.choose_input(adata, **read_kwargs)
        settings = self.annotation_settings(labels, cl_ids, matching_weight, matching_candidates, temperature, tissue)
        labelling = self.labelling(choice, settings, labels is None, min_score, unseen_bonus, error_rate)
        labelling = self.read_batch(adata, labelling, read_batch)
        columns, probabilities = self.label_cells(adata, labelling, batch_size)
        return self.add_labels(adata, labelling, columns, probabilities, clusters, key_added)

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

        The runner-up of a label of [`annotate`] is one of its candidates; else any label that the checkpoint knows.

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
        clusters = None if cluster_key is None else clusters_of(adata.obs, cluster_key)
        choice = self.processor.choose_input(adata, **read_kwargs)
        labels = words_of(adata.obs, label_key)
        done = recorded(adata, key_added, "annotate") if label_key == f"{key_added}_cell_type" else {}
        candidates = None if "labels" not in done else [str(name) for name in done["labels"]]
        evidence = self.explain_cells(adata, choice, labels, np.unique(labels), clusters, batch_size, candidates)
        return self.add_evidence(adata, choice, evidence, evidence.columns(), label_key, key_added)

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
        """Judge the labels that cells were given, by the file, the model and markers, and rank the doubtful ones.

        A label of the file may be in any words, or broader than those of training; cells of labels that the checkpoint
        does not know are judged by the other cells of the file alone (`audit_scmmgpt`). Results of [`annotate`] stay
        as they are.

        Args:
            label_key: Column of `obs` with the given labels.
            cluster_key: Column of `obs` with clusters, which are ranked too.
            adata, key_added, batch_size, read_kwargs: As for [`annotate`].

        Returns:
            [`Audit`], whose `group_rows` and `cell_rows` are tables. `obs` gets `{key}_audit` (verdict),
            `{key}_audit_score` (log odds, the larger the more doubtful), `{key}_audit_suggested` (the best other
            label) and `{key}_audit_genes` (genes that speak for the other label and against the given one).
        """
        given = words_of(adata.obs, label_key)
        clusters = None if cluster_key is None else clusters_of(adata.obs, cluster_key)
        choice = self.processor.choose_input(adata, **read_kwargs)
        labelling = self.read_batch(adata, self.labelling(uncounted(choice), self.annotation_settings()))
        sets = np.unique(given)
        file = self.read_labels(adata, labelling, given, sets)
        columns = self.audit_cells(adata, replace(labelling, choice=choice), given, sets, batch_size, file)
        return self.add_audit(adata, choice, label_key, given, columns, clusters, key_added)

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
        with the labels and their texts, as the defaults of [`annotate`]. Where `finetune` or `release` chose the label
        readout alone, the network stays out, and the temperature alone is fitted.

        Args:
            adata: AnnData of validation cells.
            label_key: Column of `obs` with the true labels. Cells whose label is not among `labels` are left out.
            labels, cl_ids, batch_size, read_kwargs: As for [`annotate`].

        Returns:
            The stored settings, `nll`, `accuracy`, `n_cells` and `n_left_out`.
        """
        alone = self.can_explain and (self.model.config.annotation or {}).get("similarity_weight") == 0
        settings = self.annotation_settings(labels, cl_ids, matching_weight=0.0 if alone else 0.5)
        self.need_trained(settings["labels"])
        truth = words_of(adata.obs, label_key)
        usable = np.isin(truth, list(settings["labels"]))
        if not usable.any():
            raise ValueError(
                f"None of the {len(truth)} labels in obs[{label_key!r}] is among the {len(settings['labels'])} "
                f"candidates, for instance {truth[0]!r}; the candidates begin with {list(settings['labels'])[:3]}."
            )
        choice = self.processor.choose_input(adata, **read_kwargs)
        cells = choice.convert(adata)[np.flatnonzero(usable)]
        stored, fit = self.fit_settings(adata, cells, truth[usable], choice, settings, batch_size)
        self.model.config.annotation = stored
        return {**stored, **fit, "n_cells": len(cells), "n_left_out": int((~usable).sum())}

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

        Descriptions keep to the types that [`annotate`] gave the cells, in `obs["{key}_cell_type"]`, or would give
        them by default: the language model describes cells of trained labels, and is not asked about a cell that is
        `"Unknown"`, or of a broader type or a type with a profile alone.

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
            raise ValueError("Clusters are described by counts: pass `proof=True`.")
        self._language_model("describe")
        prompt = self._prompt(prompt)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
        read_kwargs = {name: kwargs.pop(name) for name in READ_OPTIONS if name in kwargs}
        options = {"do_sample": False, **kwargs, "max_new_tokens": max_new_tokens}
        if options.get("num_return_sequences", 1) != 1:
            raise ValueError("describe returns one description per cell; call model.generate for several.")
        choice = self.processor.choose_input(adata, **read_kwargs)
        can_call = self.can_explain and bool((self.model.config.annotation or {}).get("labels"))
        called = self.called_types(adata, choice, key_added) if can_call else None
        texts = self.describe_cells(adata, choice, prompt, options, called, batch_size)
        finish_report(choice.report)
        adata.obs[f"{key_added}_description"] = texts.astype(str)
        done = {"prompt": prompt, "max_new_tokens": max_new_tokens, "distinct": len(set(texts))}
        return self._record(adata, key_added, choice.report, describe=done)

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
        if states is not None and do_sample and genes is None:
            warn_of_panels(values, sizes)
        # The library size counts all genes of the cell; `genes` may be some of them.
        generated = AnnData(X=log1p_cp10k(values, sizes) if do_sample else values[rows])
        generated.obs_names = [f"prompt{p}-cell{i}" for p in range(len(prompts)) for i in range(n_cells)]
        generated.var_names = self.processor.gene_symbols(gene_ids)
        for name, words in {"prompt": prompts, "cell_type": labels}.items():
            if words:
                add_column(generated, name, np.repeat(np.asarray(words, dtype=object), n_cells))
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
        of: str | None = None,
        key_added: str = "X_scmmgpt",
        batch_size: int | None = None,
        **read_kwargs: Any,
    ) -> Any:
        """Embed every cell.

        Args:
            of: `"cell-text"` is the mean of the cell's queries in the shared space, `projection_dim` wide; `"cell"` is
                the cell model's own embedding (the `<cls>` state, as scGPT's), `hidden_size` wide; `"profile"` is the
                cell's place among the groups of the label readout ([`ProfileEmbedding`], in a closed form without
                the network), `num_groups` wide. All are L2-normalised. By default `config.cell_embedding`.
            key_added: Name in `obsm`.
            adata, batch_size, read_kwargs: As for [`annotate`].

        Returns:
            The same `adata`, with the float32 embedding in `obsm[key_added]`.
        """
        choice = self.processor.choose_input(adata, **read_kwargs)
        embedding = self.embed_cells(adata, choice, of, batch_size)
        return self.add_embedding(adata, choice, embedding, of, key_added)

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings of texts in the space of [`embed`]'s `"cell-text"`, float32 `(n_texts, projection_dim)`."""
        if not len(texts) or not all(text.strip() for text in texts):
            raise ValueError("The text to search for is empty; describe the wanted cells.")
        return encode_texts(self._bridge(), self.processor, texts).float().cpu().numpy()

    @with_receipt
    def search(
        self,
        adata: Any,
        text: str | Sequence[str] | None = None,
        top_k: int = 10,
        *,
        like: str | Sequence[str] | None = None,
        by: str = "similarity",
        key_added: str | None = None,
        batch_size: int | None = None,
        **read_kwargs: Any,
    ) -> list:
        """Find the cells that a text describes best, or that are most like some cells.

        Args:
            text: Description of the wanted cells, one text or several. What follows "without", "lacking", "but not"
                or ", not", and what "-negative" follows, counts against a cell: a gene by its expression, other words
                by their similarity. Genes and programmes after "high", "low" or in "more CD8A than CD4" count by their
                expression (`query_scmmgpt`).
            top_k: Cells to return per text.
            like: In place of a text, the name of a cell, or names of several: the others are ordered by the cosine
                similarity of their embedding ([`embed`]) with that of the cell, or with the mean of several.
            by: `"similarity"` of cell and text in the shared space; where fine-tuning chose the readout alone, of the
                text and the texts of the labels, weighted by the cell's probabilities. Or `"genes"`: the expression of
                the genes whose own texts are nearest, which finds conditions that no cell of training shows. It needs
                a checkpoint that was trained with `gene_texts`.
            key_added: Column of `obs` to add every cell's similarity as (one text only).
            adata, batch_size, read_kwargs: As for [`annotate`].

        Returns:
            Hits, best first, each with `rank`, `cell` (its name), `index` (its row), `score` (cosine similarity, -1 to
            1, which has no zero that means "no match", plus the probability of a type that the text names and that has
            a profile alone; by genes, in standard deviations of training cells; where the text denies or compares
            something, in standard deviations of these cells) and `z` (standard deviations of the score above the mean
            of these cells); for several texts, a list of such lists.
        """
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}; it must be at least 1.")
        if (text is None) == (like is None):
            raise ValueError("Say which cells are wanted: either a text, or cells that they are like.")
        if text is None:
            if by != "similarity":
                raise ValueError(f"by is {by!r}, which is for texts; cells are compared by similarity.")
            like = [like] if isinstance(like, str) else list(like or ())
            choice = self.processor.choose_input(adata, **read_kwargs)
            columns = self.compare_with_cells(adata, choice, self.places_named(adata, choice, like), batch_size)
            return self.add_search(adata, choice, columns, None, top_k, by, key_added, like)[0]
        if key_added is not None and not isinstance(text, str) and len(text) > 1:
            raise ValueError(f"key_added names one column of obs, but there are {len(text)} texts; pass one text.")
        choice = self.processor.choose_input(adata, **read_kwargs)
        columns = self.search_cells(adata, choice, text, by, batch_size)
        hits = self.add_search(adata, choice, columns, text, top_k, by, key_added)
        return hits[0] if isinstance(text, str) else hits

    # -- shared -------------------------------------------------------------------------------------------------------


# -- small parts ------------------------------------------------------------------------------------------------------


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
