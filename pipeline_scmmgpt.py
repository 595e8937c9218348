"""What a biologist does with scMMGPT, on AnnData: annotate, describe, generate, embed and search cells.

One object holds the model and its processor and offers every task as a verb. Each verb takes an AnnData, adds its
results under names that begin with `scmmgpt`, drops nothing and returns the same object:

>>> pipeline = ScMMGPTPipeline.from_pretrained("path/to/checkpoint")  # doctest: +SKIP
>>> pipeline.annotate(adata).obs["scmmgpt_cell_type"]  # doctest: +SKIP

Through transformers the same object is `pipeline("cell-annotation", model=path, trust_remote_code=True)`.

What was read from the AnnData (which matrix, which genes, with what evidence) and what was done with it is in
`adata.uns["scmmgpt"]`. The result of a cell depends on that cell alone, in whatever batch or order it comes.
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers.utils import logging


try:  # as a package or as remote code
    from .annotation_scmmgpt import (
        choose_labels,
        fit_mixture,
        is_collapsed,
        label_probabilities,
        labels_with_texts,
        majority_vote,
    )
    from .cells_scmmgpt import Cells, log1p_cp10k
    from .configuration_scmmgpt import PIPELINE_TASKS, ScMMGPTConfig
    from .modeling_scmmgpt import (
        CELL_INPUTS,
        MAX_LOGIT_SCALE,
        ScMMGPTBridgeModel,
        ScMMGPTForCellTextAlignment,
        ScMMGPTForConditionalGeneration,
        cell_text_similarity,
    )
    from .processing_scmmgpt import ScMMGPTProcessor
    from .reading_scmmgpt import store_report
except ImportError:  # as a flat module in a clone
    from annotation_scmmgpt import (
        choose_labels,
        fit_mixture,
        is_collapsed,
        label_probabilities,
        labels_with_texts,
        majority_vote,
    )
    from cells_scmmgpt import Cells, log1p_cp10k
    from configuration_scmmgpt import PIPELINE_TASKS, ScMMGPTConfig
    from modeling_scmmgpt import (
        CELL_INPUTS,
        MAX_LOGIT_SCALE,
        ScMMGPTBridgeModel,
        ScMMGPTForCellTextAlignment,
        ScMMGPTForConditionalGeneration,
        cell_text_similarity,
    )
    from processing_scmmgpt import ScMMGPTProcessor
    from reading_scmmgpt import store_report


logger = logging.get_logger(__name__)

READ_OPTIONS = ("layer", "assume", "gene_column", "organism", "force")  # of `read_cells`, taken by every verb
TEXT_INPUTS = ("qformer_input_ids", "qformer_attention_mask")


class ScMMGPTPipeline:
    """A model and its processor, with every task as a verb over AnnData.

    The way of `annotate(adata)`, from top to bottom. The other verbs over cells differ in what the model computes.

        annotation_settings              labels and their texts, temperature, matching weight
        _read: processor.read_cells      reading_scmmgpt: AnnData -> Cells, and a report of what was read
        _label_scores, batch by batch
            processor                    feature_extraction_scmmgpt: Cells -> gene ids and values
            model                        modeling_scmmgpt: similarity with all labels, matching with the best
        label_probabilities              annotation_scmmgpt: similarity and matching -> probabilities
        choose_labels                    annotation_scmmgpt: a label for each cell, and how certain it is
        _record                          labels and report -> adata

    Args:
        model: [`ScMMGPTForConditionalGeneration`]; or [`ScMMGPTForCellTextAlignment`], a checkpoint of stage 1, which
            annotates, embeds and searches, but has no language model to describe and generate with.
        processor: The processor that was saved with the model.
        task: What calling the pipeline does; one of `PIPELINE_TASKS`. All verbs work regardless.
        device: By default CUDA, else Apple's MPS, else the CPU.
        batch_size: Cells per batch, for every verb; each has a default of its own. It changes no result: lower it
            where memory runs out.
        dtype: Passed by `transformers.pipeline`, which has loaded the model with it; not used here.
    """

    # Read by `transformers.pipeline`, which loads what is asked for here and passes it to `__init__`.
    _load_processor = True
    _load_tokenizer = False
    _load_feature_extractor = False
    _load_image_processor = False
    _load_video_processor = False

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
        """Load a checkpoint from a local folder or the Hub.

        Args:
            checkpoint: A folder, or a model id on the Hub.
            device, task, batch_size: As for the class.
            dtype: By default the one that the checkpoint was saved in.
            kwargs: For `from_pretrained` of model and processor (`revision`, `token`, `cache_dir`, ...).
        """
        checkpoint = os.fspath(checkpoint)
        if Path(checkpoint).is_absolute() or checkpoint.startswith("."):
            if not (Path(checkpoint) / "config.json").is_file():
                raise FileNotFoundError(
                    f"No checkpoint at {checkpoint!r}: the folder must hold config.json, weights and processor."
                )
        # The classes beside this file, never code from the checkpoint: loading weights runs no code of theirs.
        config = ScMMGPTConfig.from_pretrained(checkpoint, **kwargs)
        kinds = {kind.__name__: kind for kind in (ScMMGPTForCellTextAlignment, ScMMGPTForConditionalGeneration)}
        architecture = (config.architectures or ["nothing"])[0]
        if architecture not in kinds:
            raise ValueError(f"{checkpoint!r} holds a {architecture}; the pipeline needs one of {sorted(kinds)}.")
        model = kinds[architecture].from_pretrained(checkpoint, config=config, dtype=dtype or "auto", **kwargs)
        processor = ScMMGPTProcessor.from_pretrained(checkpoint, **kwargs)
        return cls(model, processor, task=task, device=device, batch_size=batch_size)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Do the pipeline's task: [`annotate`] unless another was named."""
        return getattr(self, PIPELINE_TASKS[self.task])(*args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Save model and processor; the folder serves every task, without this package too."""
        self.model.save_pretrained(save_directory)
        self.processor.save_pretrained(save_directory)

    # -- annotate -----------------------------------------------------------------------------------------------------

    def annotate(
        self,
        adata: Any,
        labels: dict[str, str] | Sequence[str] | None = None,
        *,
        cl_ids: dict[str, str] | None = None,
        cluster_key: str | None = None,
        min_score: float | None = None,
        matching_weight: float | None = None,
        matching_candidates: int | None = None,
        temperature: float | None = None,
        unseen_bonus: float | None = None,
        key_added: str = "scmmgpt",
        batch_size: int | None = None,
        **read_kwargs: Any,
    ) -> Any:
        """Name the type of every cell: the label, of the given ones, whose text fits the cell best.

        Args:
            adata: AnnData, of any matrix and gene names that [`read_cells`] understands.
            labels: Label -> text that describes it, or labels alone; by default those stored with the checkpoint. A
                label alone brings the text that the checkpoint stores for it, else it is its own text.
            cl_ids: Label -> Cell Ontology id, beside those stored with the checkpoint.
            cluster_key: Column of `obs` with clusters: the commonest label of each cell's cluster is added as well.
            min_score: Cells whose best label is less probable are called `"Unknown"`.
            matching_weight, matching_candidates, temperature: How similarity and matching are mixed; by default as
                [`calibrate`] stored it with the checkpoint.
            unseen_bonus: Added to the similarity of texts that the checkpoint was not fine-tuned for, since cells lie
                near the texts of training; by default as `finetune` chose it.
            key_added: Prefix of what is added.
            batch_size: Cells per batch, 64 by default.
            read_kwargs: For [`read_cells`]: `layer`, `assume`, `gene_column`, `organism`, `force`.

        Returns:
            The same `adata`, with `obs`: `{key}_cell_type`, `{key}_cl_id`, `{key}_score` (probability of the label
            among the given ones), `{key}_margin` (over the runner-up), `{key}_entropy` (0 certain .. 1 no idea);
            `obsm["{key}_probabilities"]` `(n_obs, n_labels)` in the order of `uns["{key}"]["annotate"]["labels"]`.
        """
        settings = self.annotation_settings(labels, cl_ids, matching_weight, matching_candidates, temperature)
        names, texts = list(settings["labels"]), list(settings["labels"].values())
        clusters = None if cluster_key is None else np.asarray(_column(adata, cluster_key), dtype=str)
        cells, report = self._read(adata, **read_kwargs)
        similarity, match = self._label_scores(cells, settings, batch_size)
        similarity = similarity + self._unseen_bonus(texts, unseen_bonus)
        weight, temperature = settings["matching_weight"], settings["temperature"]
        probabilities = label_probabilities(similarity, match, logit_scale=1 / temperature, matching_weight=weight)
        columns = choose_labels(probabilities, names, settings["cl_ids"], min_score)
        if clusters is not None:
            columns["cell_type_majority"] = majority_vote(columns["cell_type"], clusters)

        for name, values in columns.items():
            _add_obs(adata, f"{key_added}_{name}", values, categorical=values.dtype.kind == "U")
        adata.obsm[f"{key_added}_probabilities"] = probabilities
        found, found_cells = np.unique(columns["cell_type"], return_counts=True)
        collapsed = is_collapsed(found_cells, len(names))
        if collapsed:
            logger.warning(
                f"{found_cells.max() / len(cells):.0%} of {len(cells)} cells were called "
                f"{str(found[found_cells.argmax()])!r}, of {len(names)} labels. If you don't expect that, look at "
                f"uns[{key_added!r}]['input'] and at the entropy: matrix or genes may not be what the model needs, or "
                "the labels' texts may be too alike."
            )
        done = {
            "labels": np.asarray(names, dtype=object),
            "texts": np.asarray(texts, dtype=object),
            "matching_weight": weight,
            "temperature": temperature,
            "found": np.asarray(found, dtype=object),
            "found_cells": found_cells,
            "mean_entropy": float(columns["entropy"].mean()),
            "collapsed": collapsed,
        }
        return self._record(adata, key_added, report, annotate=done)

    def annotation_settings(
        self,
        labels: dict[str, str] | Sequence[str] | None = None,
        cl_ids: dict[str, str] | None = None,
        matching_weight: float | None = None,
        matching_candidates: int | None = None,
        temperature: float | None = None,
    ) -> dict[str, Any]:
        """What [`annotate`] uses: given values first, then those stored with the checkpoint, then defaults.

        Returns:
            `labels` (label -> text), `cl_ids` (label -> id), `matching_weight`, `matching_candidates`, `temperature`.
        """
        stored = self._stored_annotation()

        def given(value: float | None, name: str, default: float) -> float:
            return stored.get(name, default) if value is None else value

        learned = self._bridge().logit_scale.clamp(max=MAX_LOGIT_SCALE).exp().item()
        settings: dict[str, Any] = {
            "labels": labels_with_texts(labels, stored.get("labels", {})),
            "cl_ids": {**stored.get("cl_ids", {}), **(cl_ids or {})},
            "matching_weight": float(given(matching_weight, "matching_weight", 0.5)),
            "matching_candidates": int(given(matching_candidates, "matching_candidates", 4)),
            "temperature": float(given(temperature, "temperature", 1 / learned)),
        }
        if not 0 <= settings["matching_weight"] <= 1:
            raise ValueError(f"matching_weight is {settings['matching_weight']}; it is a share, from 0 to 1.")
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

        Both minimise the negative log-likelihood of the true labels, on a grid. They are stored in the model's config,
        with the labels and their texts, and are what [`annotate`] uses by default.

        Args:
            adata: AnnData of validation cells.
            label_key: Column of `obs` with the true labels. Cells whose label is not among `labels` are left out.
            labels, cl_ids, batch_size, read_kwargs: As for [`annotate`].

        Returns:
            What was stored, `nll`, `accuracy`, `n_cells` and `n_left_out`.
        """
        settings = self.annotation_settings(labels, cl_ids, matching_weight=0.5)
        names = list(settings["labels"])
        truth = np.asarray(_column(adata, label_key), dtype=str)
        usable = np.isin(truth, names)
        if not usable.any():
            raise ValueError(
                f"None of the {len(truth)} labels in obs[{label_key!r}] is among the {len(names)} candidates, "
                f"for instance {truth[0]!r}; the candidates begin with {names[:3]}."
            )
        cells, _ = self._read(adata, **read_kwargs)
        similarity, match = self._label_scores(cells[np.flatnonzero(usable)], settings, batch_size)
        target = np.asarray([names.index(label) for label in truth[usable]])
        best = fit_mixture(similarity, match, target, settings["temperature"])
        stored = {
            **settings,
            "cl_ids": {name: i for name, i in settings["cl_ids"].items() if name in settings["labels"]},
            "temperature": best["temperature"],
            "matching_weight": best["matching_weight"],
        }
        self.model.config.annotation = stored
        return {**stored, **best, "n_cells": len(target), "n_left_out": int((~usable).sum())}

    def _stored_annotation(self) -> dict[str, Any]:
        """What [`calibrate`] or `finetune` stored with the checkpoint; empty if neither was run."""
        return getattr(self.model.config, "annotation", None) or {}

    def _unseen_bonus(self, texts: list[str], bonus: float | None) -> np.ndarray:
        """What is added to the similarity with each text, `(n_texts,)`: nothing for those that were fine-tuned for."""
        stored = self._stored_annotation()
        bonus = stored.get("unseen_bonus", 0.0) if bonus is None else bonus
        return bonus * ~np.isin(texts, list(stored.get("labels", {}).values()))

    def _label_scores(
        self, cells: Cells, settings: dict[str, Any], batch_size: int | None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Similarity and matching for [`label_probabilities`]; no matching if its weight is 0."""
        texts = list(settings["labels"].values())
        text_inputs = self.processor(qformer_text=texts).to(self.device)
        text_features = self._text_features(text_inputs)
        num_candidates = min(settings["matching_candidates"], len(texts)) if settings["matching_weight"] else 0

        def score(inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
            similarity = cell_text_similarity(self._bridge().get_cell_features(**inputs), text_features)
            if not num_candidates:
                return (similarity,)
            best = similarity.topk(num_candidates, dim=1).indices
            pairs = torch.stack(
                [torch.arange(len(best), device=best.device)[:, None].expand_as(best), best], dim=-1
            ).reshape(-1, 2)
            match = torch.full_like(similarity, torch.nan)
            match[pairs[:, 0], pairs[:, 1]] = self._bridge().match(**inputs, **text_inputs, pairs=pairs).to(match)
            return similarity, match

        # A cell is matched once with each of its candidates, so this many cells fill a batch.
        batch_size = max(self._batch_size(batch_size, 64) // max(num_candidates, 1), 1)
        scores = self._map_cells(score, cells, batch_size, "Annotating")
        return scores[0], scores[1] if num_candidates else None

    # -- describe -----------------------------------------------------------------------------------------------------

    def describe(
        self,
        adata: Any,
        prompt: str | None = None,
        *,
        max_new_tokens: int = 64,
        key_added: str = "scmmgpt",
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Describe every cell in words.

        Args:
            adata: AnnData.
            prompt: A question about one cell, in place of the one that the checkpoint was trained on. `<cell>` in it
                stands for the cell; without it, the cell goes first.
            max_new_tokens: Longest description, in tokens.
            key_added, batch_size: As for [`annotate`]; 16 cells a batch by default.
            kwargs: For [`read_cells`], as for [`annotate`]; the others for the model's `generate` (`num_beams`,
                `do_sample`, `temperature`, ...). Greedy by default.

        Returns:
            The same `adata`, with `obs["{key}_description"]`.
        """
        model = self._language_model("describe")
        prompt = self._prompt(prompt)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; an answer has at least one token.")
        cells, report = self._read(adata, **{name: kwargs.pop(name) for name in READ_OPTIONS if name in kwargs})
        options = {"do_sample": False, **kwargs, "max_new_tokens": max_new_tokens}
        if options.get("num_return_sequences", 1) != 1:
            raise ValueError("describe gives one description a cell; call model.generate for several.")

        texts = np.empty(len(cells), dtype=object)
        for rows in self._batches(cells, self._batch_size(batch_size, 16), "Describing"):
            inputs = self.processor(text=[prompt] * len(rows), cells=cells[rows]).to(self.device)
            with torch.inference_mode():
                ids = model.generate(**inputs, **options)  # type: ignore[misc]
            answers = self.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            texts[rows] = [answer.strip() for answer in answers]
        _add_obs(adata, f"{key_added}_description", texts.astype(str))
        done = {"prompt": prompt, "max_new_tokens": max_new_tokens, "distinct": len(set(texts))}
        return self._record(adata, key_added, report, describe=done)

    def _prompt(self, question: str | None) -> str:
        if question is None:
            return self.processor.render_prompt("describe")
        if not question.strip():
            raise ValueError("The prompt is empty; ask something about the cell, or leave it out.")
        token = self.processor.cell_token
        if question.count(token) > 1:
            raise ValueError(f"The prompt names {question.count(token)} cells ({token}), but each row has one.")
        return self.processor.render_question(question if token in question else f"{token}\n{question}")

    # -- generate -----------------------------------------------------------------------------------------------------

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
        """Generate expression profiles of cells from words.

        Args:
            prompts: Descriptions of cells, each of which gives `n_cells` cells; or label -> description, whose labels
                are kept in `obs["cell_type"]`.
            n_cells: Cells per prompt.
            genes: Symbols, aliases or Ensembl ids; by default the whole gene vocabulary.
            library_size: Total counts over all genes of the cells of a prompt, a number or `(n_cells,)`, for
                checkpoints that sample counts; by default that of a typical training cell.
            do_sample: Draw counts from the predicted distribution; by default wherever the checkpoint can
                (`expression_head` is `nb` or `zinb`). Without sampling every cell of a prompt is the predicted mean.
            seed: With the prompt and the cell's number, decides what is drawn.
            max_genes: Genes that are decoded together, by default as many as in training; more are decoded in turns.
                The prediction of a gene depends a little on the others of its turn, and so on `genes` too.
            key_added, batch_size: As for [`annotate`]; 32 cells a batch by default.

        Returns:
            A new `AnnData` `(len(prompts) * n_cells, n_genes)`: `X` is log1p of counts per 10,000; with sampling,
            `layers["counts"]` has the counts; `obs["prompt"]`; `var_names` are the model's gene symbols.
        """
        new_adata, sparse = _anndata_and_sparse()
        self._language_model("generate")
        labels, prompts = _labels_and_prompts(prompts)
        if n_cells < 1:
            raise ValueError(f"n_cells is {n_cells}; ask for at least one cell per prompt.")
        do_sample = self._may_sample(do_sample, n_cells)
        gene_ids = self._gene_ids(genes)
        turns = self._gene_turns(gene_ids, max_genes)
        sizes = self._library_sizes(library_size, n_cells)
        values = self._decode_prompts(prompts, gene_ids, turns, sizes, do_sample, seed, batch_size)
        if do_sample:
            # By the size of the whole cell: the genes asked for may be a part of it.
            expression = log1p_cp10k(values, np.tile(sizes, len(prompts)))
        else:
            expression = np.repeat(values, n_cells, axis=0)

        generated = new_adata(X=sparse(expression))
        generated.obs_names = [f"prompt{p}-cell{i}" for p in range(len(prompts)) for i in range(n_cells)]
        generated.var_names = [str(symbol) for symbol in self.processor.gene_symbols(gene_ids)]
        told = {"prompt": prompts} | ({"cell_type": labels} if labels else {})
        for name, words in told.items():
            _add_obs(generated, name, np.repeat(np.asarray(words, dtype=object), n_cells), categorical=True)
        if do_sample:
            generated.layers["counts"] = sparse(values)
            generated.obs["library_size"] = np.tile(sizes, len(prompts))
        done = {"prompts": np.asarray(prompts, dtype=object), "n_cells": n_cells, "seed": seed}
        return self._record(generated, key_added, None, generate={**done, "sampled": do_sample, "turns": len(turns)})

    def _decode_prompts(
        self,
        prompts: list[str],
        gene_ids: np.ndarray,
        turns: list[np.ndarray],
        sizes: np.ndarray,
        do_sample: bool,
        seed: int,
        batch_size: int | None,
    ) -> np.ndarray:
        """Expression of the genes as the model decodes it, the rows of a prompt together.

        Returns:
            With sampling, drawn counts, int32 `(len(prompts) * len(sizes), n_genes)`; else the expected log1p(CP10k),
            float32 `(len(prompts), n_genes)`: the same for all cells of a prompt.
        """
        model = self._language_model("generate")
        drawn = len(sizes) if do_sample else 1
        values = np.zeros((len(prompts) * drawn, len(gene_ids)), dtype=np.int32 if do_sample else np.float32)
        batch_size = max(1, self._batch_size(batch_size, 32) // drawn)
        genes = torch.from_numpy(gene_ids).to(self.device)
        starts = range(0, len(prompts), batch_size)
        for start in logging.tqdm(starts, desc="Generating", unit="batch", disable=len(starts) < 2):
            batch = prompts[start : start + batch_size]
            rows = slice(start * drawn, (start + len(batch)) * drawn)
            texts = [self.processor.render_prompt("generate", text=prompt) for prompt in batch]
            inputs = self.processor(text=texts).to(self.device)
            for turn, columns in enumerate(turns):
                with torch.inference_mode():
                    output = model.generate_cells(
                        **inputs,
                        target_gene_ids=cast(torch.LongTensor, genes[torch.from_numpy(columns)]),
                        library_size=torch.from_numpy(np.tile(sizes[:drawn], len(batch))).to(self.device),
                        num_return_cells=drawn,
                        do_sample=do_sample,
                        seed=seed + turn,
                        cell_ids=[_cell_id(prompt, number) for prompt in batch for number in range(drawn)],
                    )
                decoded = output["counts"] if do_sample else output["expression"].float()
                values[rows, columns] = decoded.cpu().numpy()
        return values

    def _may_sample(self, do_sample: bool | None, n_cells: int) -> bool:
        can_sample = self.model.config.expression_head != "mse"
        do_sample = can_sample if do_sample is None else bool(do_sample)
        if do_sample and not can_sample:
            raise ValueError(
                "This checkpoint predicts a mean (expression_head='mse') and cannot be sampled; pass do_sample=False."
            )
        if n_cells > 1 and not do_sample:
            logger.warning(
                f"Without sampling, the {n_cells} cells of a prompt are the same: the mean that the model expects."
            )
        return do_sample

    def _library_sizes(self, library_size: float | np.ndarray | None, n_cells: int) -> np.ndarray:
        library_size = self.processor.library_size if library_size is None else library_size
        sizes = np.broadcast_to(np.asarray(library_size, dtype=np.float32), (n_cells,)).copy()
        if not (np.isfinite(sizes).all() and (sizes > 0).all()):
            raise ValueError(f"library_size must be positive counts, but holds {sizes.min()}.")
        return sizes

    def _gene_ids(self, genes: str | Sequence[str] | None) -> np.ndarray:
        if genes is None:
            return np.sort(np.asarray(list(self.processor.gene_index.vocabulary.values()), dtype=np.int64))
        genes = [genes] if isinstance(genes, str) else list(genes)
        if not genes:
            raise ValueError("genes is empty; name at least one, or leave it out for the whole vocabulary.")
        ids = self.processor.gene_ids_of(genes)
        unique, first = np.unique(ids, return_index=True)
        if len(unique) < len(ids):
            repeated = sorted({genes[i] for i in set(range(len(ids))) - set(first.tolist())})
            raise ValueError(f"{len(ids) - len(unique)} genes are asked for twice, for instance {repeated[:5]}.")
        return ids

    def _gene_turns(self, gene_ids: np.ndarray, max_genes: int | None) -> list[np.ndarray]:
        """Columns that are decoded together: turns of nearly equal size, each spread over all genes."""
        n_turns = math.ceil(len(gene_ids) / (max_genes or self.processor.max_target_genes))
        return [np.arange(turn, len(gene_ids), n_turns) for turn in range(n_turns)]

    # -- embed and search ---------------------------------------------------------------------------------------------

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
            adata: AnnData.
            of: `"cell-text"` is the mean of the cell's queries in the space that cells share with text,
                `projection_dim` wide; `"cell"` is the cell model's own embedding (its `<cls>` state, as scGPT's),
                `hidden_size` wide. Both are L2-normalised.
            key_added: Name in `obsm`.
            batch_size, read_kwargs: As for [`annotate`].

        Returns:
            The same `adata`, with the float32 embedding in `obsm[key_added]`.
        """
        if of not in ("cell-text", "cell"):
            raise ValueError(f"of is {of!r}; choose 'cell-text' (shared with text) or 'cell' (the cell model's own).")

        def embedding(inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
            if of == "cell":
                inputs = {name: inputs[name] for name in CELL_INPUTS}
                embedded = self._bridge().cell_model(**inputs, cls_only=True).pooler_output
            else:
                embedded = self._bridge().get_cell_features(**inputs).mean(dim=1)
            return (torch.nn.functional.normalize(embedded.float(), dim=-1),)

        cells, report = self._read(adata, **read_kwargs)
        (adata.obsm[key_added],) = self._map_cells(embedding, cells, self._batch_size(batch_size, 64), "Embedding")
        return self._record(adata, "scmmgpt", report, embed={"of": of, "key": key_added})

    def search(
        self,
        adata: Any,
        text: str | Sequence[str],
        top_k: int = 10,
        *,
        key_added: str | None = None,
        batch_size: int | None = None,
        **read_kwargs: Any,
    ) -> list:
        """Find the cells that a text describes best.

        Args:
            adata: AnnData.
            text: What to look for, in words; one text or several.
            top_k: How many cells to return per text.
            key_added: Also add every cell's similarity as this column of `obs` (one text only).
            batch_size, read_kwargs: As for [`annotate`].

        Returns:
            Hits, best first, each with `rank`, `cell` (its name), `index` (its row) and `score` (cosine similarity,
            -1 to 1); for several texts, a list of such lists.
        """
        texts = [text] if isinstance(text, str) else [str(item) for item in text]
        if not texts or not all(item.strip() for item in texts):
            raise ValueError("There is nothing to search for: the text is empty.")
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}; ask for at least one cell.")
        if key_added is not None and len(texts) > 1:
            raise ValueError(f"key_added names one column of obs, but there are {len(texts)} texts.")
        text_features = self._text_features(self.processor(qformer_text=texts).to(self.device))

        def score(inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
            return (cell_text_similarity(self._bridge().get_cell_features(**inputs), text_features),)

        cells, report = self._read(adata, **read_kwargs)
        (similarity,) = self._map_cells(score, cells, self._batch_size(batch_size, 64), "Searching")
        if key_added is not None:
            _add_obs(adata, key_added, similarity[:, 0])
            self._record(adata, "scmmgpt", report, search={"text": texts[0], "key": key_added})
        hits = [_best_hits(column, adata.obs_names, top_k) for column in similarity.T]
        return hits[0] if isinstance(text, str) else hits

    # -- shared -------------------------------------------------------------------------------------------------------

    def _bridge(self) -> ScMMGPTBridgeModel:
        """The part that both kinds of checkpoint have: cell model, Q-Former, contrast and matching."""
        return cast(ScMMGPTBridgeModel, getattr(self.model, "model", self.model))

    def _language_model(self, verb: str) -> ScMMGPTForConditionalGeneration:
        """The model, if it has a language model; without one it cannot `verb`."""
        if not hasattr(self.model, "generate_cells"):
            raise ValueError(
                f"This checkpoint has no language model (it is of stage 1), so it cannot {verb}; it can annotate, "
                "embed and search. Stage 2, `python -m scmmgpt.train tune`, makes one that can."
            )
        return cast(ScMMGPTForConditionalGeneration, self.model)

    def _read(self, adata: Any, **kwargs: Any) -> tuple[Cells, dict[str, Any]]:
        cells, report = self.processor.read_cells(adata, **kwargs)
        if not len(cells):
            raise ValueError("There are no cells in this AnnData: it has 0 rows.")
        return cells, report

    def _batch_size(self, given: int | None, default: int) -> int:
        batch_size = given or self.batch_size or default
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
        return batch_size

    def _batches(self, cells: Cells, batch_size: int, what: str) -> Iterator[np.ndarray]:
        """Row numbers of cells that go together: alike in length, so that little is padded; the longest first."""
        order = np.argsort(-np.diff(cells.indptr), kind="stable")
        with logging.tqdm(total=len(order), desc=what, unit="cell", disable=len(order) <= batch_size) as progress:
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                yield rows
                progress.update(len(rows))

    def _map_cells(
        self,
        function: Callable[[dict[str, torch.Tensor]], tuple[torch.Tensor, ...]],
        cells: Cells,
        batch_size: int,
        what: str,
    ) -> list[np.ndarray]:
        """Apply `function(inputs) -> tensors, a row per cell` to all cells; float32 arrays in the cells' order."""
        results: list[np.ndarray] = []
        for rows in self._batches(cells, batch_size, what):
            inputs = self.processor(cells=cells[rows]).to(self.device)
            with torch.inference_mode():
                outputs = [output.float().cpu().numpy() for output in function(dict(inputs))]
            if not results:
                results = [np.empty((len(cells), *output.shape[1:]), dtype=np.float32) for output in outputs]
            for result, output in zip(results, outputs, strict=True):
                result[rows] = output
        return results

    def _text_features(self, inputs: Mapping[str, torch.Tensor], batch_size: int = 256) -> torch.Tensor:
        """Texts in the shared space, `(n_texts, projection_dim)`, from the processor's `qformer_text` inputs."""
        batches = zip(*(inputs[name].split(batch_size) for name in TEXT_INPUTS), strict=True)
        with torch.inference_mode():
            return torch.cat([self._bridge().get_text_features(*batch) for batch in batches])

    def _record(self, adata: Any, key: str, report: dict[str, Any] | None, **done: Any) -> Any:
        """Note in `uns` what was read and what was done, beside what earlier calls noted."""
        if report is not None:
            store_report(adata, report)
        checkpoint = str(self.model.config._name_or_path or "")
        adata.uns[key] = {**adata.uns.get(key, {}), **done, "checkpoint": checkpoint}
        return adata


# -- small parts ------------------------------------------------------------------------------------------------------


def best_device() -> str:
    """`"cuda"`, `"mps"` or `"cpu"`: the fastest that this machine has."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _labels_and_prompts(prompts: str | Sequence[str] | dict[str, str]) -> tuple[list[str], list[str]]:
    """Labels, if a dict brings them, and the texts of the prompts, of which none may be empty."""
    labels = list(prompts) if isinstance(prompts, dict) else []
    if isinstance(prompts, str):
        prompts = [prompts]
    texts = list(prompts.values()) if isinstance(prompts, dict) else list(prompts)
    if not texts or not all(text.strip() for text in texts):
        raise ValueError(f"Every prompt needs some text, but of {len(texts)} at least one has none.")
    return labels, texts


def _best_hits(similarity: np.ndarray, names: Any, top_k: int) -> list[dict[str, Any]]:
    best = np.argsort(-similarity, kind="stable")[:top_k].tolist()
    scores = [round(float(similarity[i]), 6) for i in best]
    return [
        {"rank": rank, "cell": str(names[i]), "index": i, "score": score}
        for rank, (i, score) in enumerate(zip(best, scores, strict=True), start=1)
    ]


def _column(adata: Any, key: str) -> Any:
    if key not in adata.obs:
        raise ValueError(f"obs has no column {key!r}; it has {list(adata.obs.columns)}.")
    return adata.obs[key]


def _add_obs(adata: Any, name: str, values: np.ndarray, categorical: bool = False) -> None:
    adata.obs[name] = values
    if categorical:
        adata.obs[name] = adata.obs[name].astype("category")


def _cell_id(prompt: str, number: int) -> int:
    """A stable 63-bit identity of the n-th cell of a prompt, whatever else is generated beside it."""
    digest = hashlib.blake2b(f"{number}\n{prompt}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _anndata_and_sparse() -> tuple[Any, Any]:
    """The classes of what is generated: AnnData, and SciPy's CSR, since most values of a cell are zero."""
    try:
        from anndata import AnnData
        from scipy.sparse import csr_matrix
    except ImportError as error:
        raise ImportError("Generated cells are returned as AnnData; install it with `pip install anndata`.") from error
    return AnnData, csr_matrix


__all__ = ["ScMMGPTPipeline", "best_device"]
