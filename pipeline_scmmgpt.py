"""The tasks of scMMGPT over AnnData: annotate, explain, audit, describe, generate, embed and search cells.

Each task is a verb of [`ScMMGPTPipeline`]. A verb adds its results to the AnnData under names that begin with
`scmmgpt`, and removes nothing:

>>> pipeline = ScMMGPTPipeline.from_pretrained("path/to/checkpoint")  # doctest: +SKIP
>>> pipeline.annotate(adata).obs["scmmgpt_cell_type"]  # doctest: +SKIP

In transformers, `pipeline("cell-annotation", model=path, trust_remote_code=True)` returns the same object.

`adata.uns["scmmgpt"]` holds the choice of matrix and genes with the evidence for this choice, and the settings and the
receipt of each verb (`receipt_scmmgpt`). The result of a cell does not depend on its batch or position. In `annotate`
it may depend on other cells of the file, see `read_batch`.
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
from .passes_scmmgpt import uncounted, whole_number
from .processing_scmmgpt import ScMMGPTProcessor
from .receipt_scmmgpt import with_receipt
from .records_scmmgpt import add_column, clusters_of, finish_report, recorded, words_of
from .scoring_scmmgpt import encode_texts
from .searching_scmmgpt import SearchSteps


logger = logging.get_logger(__name__)

READ_OPTIONS = ("layer", "assume", "gene_column", "organism", "force")  # options of `read_cells`, for every verb


class ScMMGPTPipeline(DescriptionSteps, SearchSteps):
    """A model and its processor, with every task as a verb over AnnData.

    A verb has a few lines in this file. The base classes have the steps of the verbs, which are public for commands
    that compute partitions of the cells. The call path of `annotate(adata)`, file by file:

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
        model: [`ScMMGPTForConditionalGeneration`], or [`ScMMGPTForCellTextAlignment`], a checkpoint of stage 1, which
            has no language model for `describe` and `generate`.
        processor: The processor that was saved with the model.
        task: The verb that a call of the pipeline runs, one of `PIPELINE_TASKS`. Every verb works with every task.
        device: By default CUDA, else MPS of Apple, else the CPU.
        batch_size: Cells per batch, for every verb; by default each verb has its own value. The batch size does not
            change results: lower it if memory runs out.
        dtype: Ignored; `transformers.pipeline` passes the dtype with which it has loaded the model.
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
        """Load a checkpoint from a folder or the Hub. No code of the checkpoint is run.

        Args:
            checkpoint: Folder, or model id on the Hub.
            dtype: By default the dtype of the checkpoint, or float32 on a CPU that is faster in float32.
            device, task, batch_size: As in the class.
            kwargs: Options of `from_pretrained` of model and processor (`revision`, `token`, ...).

        Raises:
            FileNotFoundError: If the folder has no checkpoint.
            ValueError: If the checkpoint holds another kind of model.
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
        """Save model and processor as one checkpoint, which transformers also loads without this package."""
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
        """Annotate every cell with the candidate label that fits the cell best.

        A label may be in other words than in training: a synonym, a spelling, a plural, an id of the Cell Ontology, or
        a broader type, whose probability is the sum over its kinds. Known labels that are no candidates compete, too,
        so a cell of none of the candidates has a low score. A cell that resembles no known type is `"Unknown"`, if the
        checkpoint stores novelty. A checkpoint of `release` names such a cell by a profiled type, a type with a
        reference profile and no training cells, if this type leads clearly (`profiles_scmmgpt`).

        Args:
            adata: AnnData with any matrix and gene names that [`read_cells`] understands.
            labels: Label -> description, or labels alone; by default the labels of the checkpoint. A label without a
                description has the text of the checkpoint, else the label itself. Labels of profiled types are scored
                by profile, and labels of other untrained types by text.
            tissue: Candidates are the checkpoint's labels of this tissue. Other labels compete, too, so a cell of
                another tissue has a low score.
            cl_ids: Label -> Cell Ontology id, in addition to the ids of the checkpoint.
            cluster_key: Column of `obs` with clusters. Adds the commonest label of each cluster to `obs`, and to `uns`
                the narrowest type of each cluster with the votes of its cells.
            min_score: A cell with a lower score gets the narrowest broader type that is probable enough, if the labels
                are those of the checkpoint, else `"Unknown"`. With 0 every cell gets a label. By default, for the
                labels of the checkpoint, the stored value, which grows with novelty.
            error_rate: Add label sets that miss the true label in at most this share of cells, if the cells are
                exchangeable with the cells that `finetune` or [`calibrate`] held out. Needs the checkpoint's labels.
            matching_weight: Weight of matching against similarity, 0 to 1.
            matching_candidates: Number of labels, the most similar ones, that are matched with each cell.
            temperature: Temperature of the softmax over labels. [`calibrate`] stores this and the two values above.
            unseen_bonus: Calibrated stacking: added to the similarity of an untrained label, as cells are more similar
                to trained texts. By default the value of an older checkpoint; newer ones have a fitted gate instead
                (`unseen_scmmgpt`).
            read_batch: Read a sample of the file first, so that labels depend on other cells. With True, the cells
                most similar to an untrained label correct its predicted profile. By default, a file of `MIN_FILE`
                cells refines the labels of a checkpoint of `release` (`refinement_scmmgpt`). From `MIN_BATCH` cells
                on, novelty is averaged over nearest neighbours, and the cells give a prior of labels by tissue
                (`tissues_scmmgpt`). With False each cell is labelled independently.
            key_added: Prefix of the added names.
            batch_size: Cells per batch, 64 by default.
            read_kwargs: Options of [`read_cells`]: `layer`, `assume`, `gene_column`, `organism`, `force`.

        Returns:
            `adata` with new columns in `obs`: `{key}_cell_type`, `{key}_cl_id`, `{key}_score` (probability of the
            label), `{key}_margin` (of the best candidate over the second), `{key}_entropy` (0 certain .. 1 uniform),
            `{key}_novelty` (above 1 the cell resembles no known type; NaN if too few genes are measured); by default
            `{key}_by_profile` (whether a profiled type names the cell); with `error_rate` `{key}_label_set` (labels
            joined by " | ", the most probable first). `obsm["{key}_probabilities"]` `(n_obs, n_labels)` is in the
            order of `uns["{key}"]["annotate"]["labels"]`; the rest of a row that sums to less than 1 belongs to known
            labels that are no candidates.
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

        The runner-up of a label of [`annotate`] is one of the candidates; else any label of the checkpoint. The terms
        are the exact terms of the label readout (`evidence_scmmgpt`), without similarity and matching.

        Args:
            label_key: Column of `obs` with labels in any words. A cell with a label that the checkpoint does not know
                gets no evidence.
            cluster_key: Column of `obs` with clusters; the commonest label of each cluster is explained, too.
            adata, key_added, batch_size, read_kwargs: As in [`annotate`]; 512 cells per batch by default.

        Returns:
            [`Evidence`] with the tables `group_rows` and `cell_rows`. `obs` gets `{key}_evidence` (genes, the largest
            term first), `{key}_rival` (the runner-up) and `{key}_marker_support` (share of the label's markers that a
            cell expresses). `uns["{key}"]["explain"]` gets the genes of each label.

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
        """Check the given labels of cells by file, model and markers, and rank the doubtful labels.

        A given label may be in any words, and broader than trained labels. If the checkpoint does not know a label,
        the other cells of the file alone judge its cells (`audit_scmmgpt`). Results of [`annotate`] do not change.

        Args:
            label_key: Column of `obs` with the given labels.
            cluster_key: Column of `obs` with clusters, which are ranked, too.
            adata, key_added, batch_size, read_kwargs: As in [`annotate`].

        Returns:
            [`Audit`] with the tables `group_rows` and `cell_rows`. `obs` gets `{key}_audit` (verdict),
            `{key}_audit_score` (log odds; larger is more doubtful), `{key}_audit_suggested` (the best other label) and
            `{key}_audit_genes` (genes that speak for the other label against the given label).
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
        """Fit matching weight and temperature on labelled *validation* cells, never on test cells, and store both.

        Both minimise the negative log-likelihood of the true labels on a grid. The configuration of the model stores
        both as the defaults of [`annotate`], with the labels and their texts. If `finetune` or `release` chose the
        label readout alone, only the temperature is fitted.

        Args:
            adata: AnnData of validation cells.
            label_key: Column of `obs` with the true labels. Cells with a label outside `labels` are left out.
            labels, cl_ids, batch_size, read_kwargs: As in [`annotate`].

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

        A description agrees with the cell type in `obs["{key}_cell_type"]`, or with the default result of
        [`annotate`].
        The language model describes cells of trained labels only: it does not run for cells that are `"Unknown"`, or
        have a broader or a profiled type.

        Args:
            prompt: A question about one cell; by default the prompt of training. `<cell>` in the prompt stands for the
                cell; a prompt without `<cell>` follows the cell.
            max_new_tokens: Longest description, in tokens.
            proof: Describe by counts instead of the language model: the type, notable genes compared with other cells
                of the file, and alternatives, each with the genes and counts that support it (`proof_scmmgpt`).
            cluster_key: Column of `obs` with clusters, which are described, too; needs `proof`.
            adata, key_added, batch_size: As in [`annotate`]; 16 cells per batch by default.
            kwargs: Options of [`read_cells`], as in [`annotate`], and of `generate` of the language model
                (`num_beams`, `do_sample`, `temperature`, ...). Decoding is greedy by default.

        Returns:
            `adata` with `obs["{key}_description"]`. With `proof`, `uns["{key}"]["describe"]` gets the tables `clauses`
            (a row for each gene of each clause of each cell) and `groups` (types and clusters).
        """
        if proof:
            strange = {"prompt": prompt, **kwargs}.items() - {("prompt", None)}
            if given := sorted(name for name, _ in strange if name not in READ_OPTIONS):
                raise ValueError(f"{given} are options of the language model, which proof=True does not use.")
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
            prompts: Descriptions of cells; or label -> description, with the labels in `obs["cell_type"]`.
            n_cells: Cells per prompt.
            genes: Symbols, aliases or Ensembl ids; by default the whole gene vocabulary.
            library_size: Total counts of a sampled cell over all genes, a number or `(n_cells,)`. By default the size
                is drawn with the cell state; a checkpoint without cell states uses the size of a typical training
                cell.
            do_sample: Sample counts; by default if the checkpoint predicts a distribution (it has cell states, or
                `expression_head` is `nb` or `zinb`). Without sampling every cell is the mean of its prompt.
            seed: Seed of the draws, together with the prompt and the number of the cell.
            max_genes: Genes that a checkpoint without cell states decodes in one turn; by default as many as in
                training. The prediction of a gene depends slightly on the other genes of the turn, and so on `genes`.
            key_added, batch_size: As in [`annotate`]; 32 cells per batch by default.

        Returns:
            A new `AnnData` `(len(prompts) * n_cells, n_genes)`. `X` is log1p(CP10k); with sampling, `layers["counts"]`
            has the counts. `obs["prompt"]` has the prompts, and `var_names` are gene symbols. If the checkpoint stores
            states of training cells, `obs["training_distance"]`, and `diversity` of each prompt in
            `uns[key_added]["generate"]`, compare the cells with training cells (see [`compare_cells`]).
        """
        try:
            from anndata import AnnData
            from scipy.sparse import csr_matrix, vstack  # most values of a cell are zero
        except ImportError as error:
            raise ImportError("generate returns an AnnData; install anndata with `pip install anndata`.") from error

        model, config = self._language_model("generate"), self.model.config
        labels, prompts = labels_and_prompts(prompts)
        n_cells = whole_number(n_cells, "n_cells")
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
            # One prompt at a time: padding changes the last bits of features.
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
        # The library size includes all genes of the model, also genes outside `genes`.
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
            of: `"cell-text"`: the mean of the cell's queries in the shared space, of width `projection_dim`. `"cell"`:
                the embedding of the cell model (the `<cls>` state, as in scGPT), of width `hidden_size`. `"profile"`:
                the position among the groups of the label readout ([`ProfileEmbedding`], a closed form without the
                network), of width `num_groups`. All are L2-normalised. By default `config.cell_embedding`.
            key_added: Name in `obsm`.
            adata, batch_size, read_kwargs: As in [`annotate`].

        Returns:
            `adata` with the float32 embedding in `obsm[key_added]`.
        """
        choice = self.processor.choose_input(adata, **read_kwargs)
        embedding = self.embed_cells(adata, choice, of, batch_size)
        return self.add_embedding(adata, choice, embedding, of, key_added)

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings of texts in the space of `embed(of="cell-text")`, float32 `(n_texts, projection_dim)`."""
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
        """Find the cells that fit a text best, or that are most similar to example cells.

        Args:
            text: Description of the wanted cells, one text or several. Words after "without", "lacking", "but not" or
                ", not", and before "-negative", count against a cell: genes by expression, other words by similarity.
                Genes and programmes after "high" or "low", and in "more CD8A than CD4", count by expression
                (`query_scmmgpt`).
            top_k: Cells to return per text.
            like: Instead of a text, names of one or more example cells. Other cells are ranked by the cosine
                similarity of their embedding ([`embed`]) with the mean embedding of the example cells.
            by: `"similarity"`: similarity of cell and text in the shared space. If fine-tuning chose the readout
                alone, similarity of the text with the texts of the labels, weighted by the cell's probabilities.
                `"genes"`: expression of the genes whose own texts are most similar, which finds conditions that no
                training cell shows; needs a checkpoint that was trained with `gene_texts`.
            key_added: New column of `obs` with the score of every cell (one text only).
            adata, batch_size, read_kwargs: As in [`annotate`].

        Returns:
            Hits, best first; for several texts, a list of such lists. A hit has `rank`, `cell` (name), `index` (row),
            `score`, and `z` (standard deviations above the mean score of these cells). The score is a cosine, -1 to 1
            (0 does not mean "no match"), plus the probability of a profiled type that the text names. Scores by genes
            are in standard deviations of training cells; with denials or comparisons, of these cells.

        Raises:
            ValueError: If not exactly one of `text` and `like` is given, or an option does not apply.
        """
        top_k = whole_number(top_k, "top_k")
        if (text is None) == (like is None):
            raise ValueError("Pass either text or like, to say which cells are wanted.")
        if text is None:
            if by != "similarity":
                raise ValueError(f"by={by!r} needs a text; like compares cells by similarity.")
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


def _dtype_on_cpu(given: torch.dtype | None, stored: str | torch.dtype | None) -> torch.dtype | None:
    """The given dtype, with a warning if it is slow on this CPU; else float32 if the stored dtype is slow."""
    stored = getattr(torch, stored) if isinstance(stored, str) else stored
    dtype = given or stored
    if dtype is None or cpu_dtype(dtype) == dtype:
        return given
    name, wide = str(dtype).removeprefix("torch."), cpu_dtype(dtype)
    if given is None:
        logger.info(
            f"This CPU is faster in float32 than in {name}, the checkpoint's dtype: the model runs in float32."
        )
        return wide
    logger.warning(f"This CPU is slower in {name} than in float32, often many times: omit dtype, or pass {wide}.")
    return given
