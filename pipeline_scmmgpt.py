"""The tasks of scMMGPT over AnnData: annotate, describe, generate, embed and search cells.

Each task is a verb of [`ScMMGPTPipeline`]. A verb adds its results to the AnnData under names that begin with
`scmmgpt`, drops nothing and returns the same object:

>>> pipeline = ScMMGPTPipeline.from_pretrained("path/to/checkpoint")  # doctest: +SKIP
>>> pipeline.annotate(adata).obs["scmmgpt_cell_type"]  # doctest: +SKIP

Through transformers the same object is `pipeline("cell-annotation", model=path, trust_remote_code=True)`.

`adata.uns["scmmgpt"]` holds the matrix and the genes that were read, the evidence for that choice, and the settings of
each verb. The result of a cell depends on that cell alone, not on its batch or its place.
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
    from .annotation_scmmgpt import choose_labels, fit_mixture, label_probabilities
    from .cells_scmmgpt import Cells, log1p_cp10k
    from .configuration_scmmgpt import PIPELINE_TASKS, ScMMGPTConfig
    from .modeling_scmmgpt import (
        CELL_INPUTS,
        ScMMGPTBridgeModel,
        ScMMGPTForCellTextAlignment,
        ScMMGPTForConditionalGeneration,
        cell_text_similarity,
    )
    from .processing_scmmgpt import ScMMGPTProcessor
    from .reading_scmmgpt import InputChoice, finish_report
    from .readout_scmmgpt import PanelReadout
except ImportError:  # as a flat module in a clone
    from annotation_scmmgpt import choose_labels, fit_mixture, label_probabilities
    from cells_scmmgpt import Cells, log1p_cp10k
    from configuration_scmmgpt import PIPELINE_TASKS, ScMMGPTConfig
    from modeling_scmmgpt import (
        CELL_INPUTS,
        ScMMGPTBridgeModel,
        ScMMGPTForCellTextAlignment,
        ScMMGPTForConditionalGeneration,
        cell_text_similarity,
    )
    from processing_scmmgpt import ScMMGPTProcessor
    from reading_scmmgpt import InputChoice, finish_report
    from readout_scmmgpt import PanelReadout


logger = logging.get_logger(__name__)

READ_OPTIONS = ("layer", "assume", "gene_column", "organism", "force")  # of `read_cells`, taken by every verb
# Inputs of a batch of cells -> tensors with one row a cell.
CellFunction = Callable[[dict[str, torch.Tensor]], tuple[torch.Tensor, ...]]
# An annotation of at least this many cells is reported as collapsed if one label has at least this share of them.
COLLAPSE_MIN_CELLS, COLLAPSE_SHARE = 50, 0.98
WEAK_LABELS = 5  # labels whose decisive genes a file lacks that get a warning each


class ScMMGPTPipeline:
    """A model and its processor, with every task as a verb over AnnData.

    The call path of `annotate(adata)`, from top to bottom. Other verbs over cells differ in what the model computes.

        annotation_settings             labels and their texts, temperature, matching weight
        processor.read_cells            processing_scmmgpt -> reading_scmmgpt: AnnData -> Cells and a report
                                            -> matrices_scmmgpt: the kind of each matrix; its values -> counts
                                            -> genes_scmmgpt: variables -> genes of the vocabulary
                                            -> cells_scmmgpt: counts -> Cells
        _label_scores, batch by batch
            processor                   feature_extraction_scmmgpt: Cells -> gene ids and values
            model                       modeling_scmmgpt: similarity with all labels, matching with the best
        label_probabilities             annotation_scmmgpt: similarity and matching -> probabilities
        choose_labels                   annotation_scmmgpt: the label of each cell and its certainty
        _record                         settings and report -> adata.uns

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

        `dtype` is by default that of the checkpoint. `kwargs` go to `from_pretrained` of model and processor
        (`revision`, `token`, `cache_dir`, ...); the other arguments are as for the class.
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
        """Annotate every cell with the candidate label whose text fits the cell best.

        Args:
            adata: AnnData with any matrix and gene names that [`read_cells`] understands.
            labels: Label -> text that describes it, or labels alone; by default those stored with the checkpoint. The
                text of a label alone is the one stored with the checkpoint, else the label itself.
            cl_ids: Label -> Cell Ontology id, beside those stored with the checkpoint.
            cluster_key: Column of `obs` with clusters; adds the commonest label of each cell's cluster.
            min_score: Cells whose best label is less probable are labelled `"Unknown"`.
            matching_weight: Weight of matching against similarity, 0 to 1.
            matching_candidates: Labels of each cell, the most similar ones, that are matched with it.
            temperature: Temperature of the softmax over labels. [`calibrate`] stores the defaults of matching weight,
                matching candidates and temperature.
            unseen_bonus: Calibrated stacking: added to the similarity of texts that the checkpoint was not fine-tuned
                for, since cells lie near the texts of training. The default is the value stored by `finetune`.
            key_added: Prefix of the added names.
            batch_size: Cells per batch, 64 by default.
            read_kwargs: For [`read_cells`]: `layer`, `assume`, `gene_column`, `organism`, `force`.

        Returns:
            The same `adata`, with `obs`: `{key}_cell_type`, `{key}_cl_id`, `{key}_score` (probability of the label
            among the candidates), `{key}_margin` (over the runner-up), `{key}_entropy` (0 certain .. 1 uniform);
            `obsm["{key}_probabilities"]` `(n_obs, n_labels)` in the order of `uns["{key}"]["annotate"]["labels"]`.
        """
        settings = self.annotation_settings(labels, cl_ids, matching_weight, matching_candidates, temperature)
        names, texts = list(settings["labels"]), list(settings["labels"].values())
        clusters = None if cluster_key is None else _words(adata, cluster_key)
        choice = self.processor.choose_input(adata, **read_kwargs)
        cells, report = choice.convert(adata), choice.report
        finish_report(report)
        readout = self._panel_readout(texts, choice)
        similarity, match = self._label_scores(cells, settings, batch_size, readout)
        stored = self.model.config.annotation or {}
        bonus = stored.get("unseen_bonus", 0.0) if unseen_bonus is None else unseen_bonus
        similarity = similarity + bonus * ~np.isin(texts, list(stored.get("labels", {}).values()))
        weight, temperature = settings["matching_weight"], settings["temperature"]
        probabilities = label_probabilities(similarity, match, logit_scale=1 / temperature, matching_weight=weight)
        columns = choose_labels(probabilities, names, settings["cl_ids"], min_score, clusters)

        for name, values in columns.items():
            _add_obs(adata, f"{key_added}_{name}", values, categorical=values.dtype.kind == "U")
        adata.obsm[f"{key_added}_probabilities"] = probabilities
        found, found_cells = np.unique(columns["cell_type"], return_counts=True)
        share = found_cells.max() / len(cells)
        collapsed = len(names) > 1 and len(cells) >= COLLAPSE_MIN_CELLS and bool(share >= COLLAPSE_SHARE)
        if collapsed:
            logger.warning(
                f"{share:.0%} of {len(cells)} cells were labelled {str(found[found_cells.argmax()])!r}, of "
                f"{len(names)} labels. If you don't expect that, look at uns['scmmgpt']['input']: the matrix or the "
                "genes may be the wrong ones, or the texts of the labels too alike."
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
        if readout is not None:
            done["weak_labels"] = self._warn_of_weak_labels(readout, names)
        return self._record(adata, key_added, report, annotate=done)

    def annotation_settings(
        self,
        labels: dict[str, str] | Sequence[str] | None = None,
        cl_ids: dict[str, str] | None = None,
        matching_weight: float | None = None,
        matching_candidates: int | None = None,
        temperature: float | None = None,
    ) -> dict[str, Any]:
        """The settings of [`annotate`]: the arguments, else the values stored with the checkpoint, else defaults.

        Returns:
            `labels` (label -> text), `cl_ids` (label -> id), `matching_weight`, `matching_candidates`, `temperature`.
        """
        stored = self.model.config.annotation or {}

        def given(value: float | None, name: str, default: float) -> float:
            return stored.get(name, default) if value is None else value

        settings: dict[str, Any] = {
            "labels": _labels_with_texts(labels, stored.get("labels", {})),
            "cl_ids": {**stored.get("cl_ids", {}), **(cl_ids or {})},
            "matching_weight": float(given(matching_weight, "matching_weight", 0.5)),
            "matching_candidates": int(given(matching_candidates, "matching_candidates", 4)),
            "temperature": float(given(temperature, "temperature", 1 / self._bridge().inverse_temperature().item())),
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
        readout = self._panel_readout(list(settings["labels"].values()), choice)
        similarity, match = self._label_scores(cells, settings, batch_size, readout)
        target = np.asarray([names.index(label) for label in truth[usable]])
        best = fit_mixture(similarity, match, target, settings["temperature"])
        cl_ids = {name: i for name, i in settings["cl_ids"].items() if name in settings["labels"]}
        fitted = {name: best[name] for name in ("temperature", "matching_weight")}
        self.model.config.annotation = stored = {**settings, "cl_ids": cl_ids, **fitted}
        return {**stored, **best, "n_cells": len(target), "n_left_out": int((~usable).sum())}

    def _panel_readout(self, texts: Sequence[str], choice: InputChoice) -> PanelReadout | None:
        """The readout of these texts' labels for the genes of a file, or None if there is none of every text."""
        readout = getattr(self._bridge(), "label_readout", None)
        trained = [] if readout is None else self.model.config.label_readout["texts"]
        if readout is None or not set(texts) <= set(trained):
            return None
        measured = np.unique(choice.match.ids[choice.match.ids >= 0])
        return readout.for_genes(measured).select([trained.index(text) for text in texts])

    def _warn_of_weak_labels(self, readout: PanelReadout, names: Sequence[str]) -> np.ndarray:
        """Warn of labels whose decisive genes the file lacks; returns these labels."""
        weak = readout.weak_labels()
        for label, (other, evidence, absent) in list(weak.items())[:WEAK_LABELS]:
            logger.warning(
                f"The file lacks {', '.join(self.processor.gene_symbols(absent))}, which tell {names[label]!r} from "
                f"{names[other]!r}: {max(evidence, 0):.0%} of the evidence is left, and the scores are lower for it."
            )
        if len(weak) > WEAK_LABELS:
            logger.warning(f"The file lacks decisive genes of {len(weak) - WEAK_LABELS} more labels.")
        return np.asarray([names[label] for label in weak], dtype=object)

    def _label_scores(
        self, cells: Cells, settings: dict[str, Any], batch_size: int | None, readout: PanelReadout | None = None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Similarity and matching for [`label_probabilities`]; no matching if the matching weight is 0.

        With `readout` the first are its log probabilities, plus similarities at the weight that `finetune` chose for
        them; at weight 0 the transformer does not run. They are multiplied by the temperature, by which
        [`label_probabilities`] divides them.
        """
        similarity_weight = (self.model.config.annotation or {}).get("similarity_weight", 0.0)
        if readout is not None:
            log_probabilities = readout(cells)
            if not similarity_weight and not settings["matching_weight"]:
                return log_probabilities * settings["temperature"], None
        texts = list(settings["labels"].values())
        text_inputs = self.processor(qformer_text=texts).to(self.device)
        text_features = self._text_features(text_inputs)
        num_candidates = min(settings["matching_candidates"], len(texts)) if settings["matching_weight"] else 0

        def score(inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
            similarity = cell_text_similarity(self._bridge().get_cell_features(**inputs), text_features)
            if not num_candidates:
                return (similarity,)
            best = similarity.topk(num_candidates, dim=1).indices
            rows = torch.arange(len(best), device=best.device).repeat_interleave(num_candidates)
            pairs = torch.stack([rows, best.flatten()], dim=1)
            match = torch.full_like(similarity, torch.nan)
            match[pairs[:, 0], pairs[:, 1]] = self._bridge().match(**inputs, **text_inputs, pairs=pairs).to(match)
            return similarity, match

        # Each cell is matched with each of its candidates: the pairs of these cells fill a batch.
        batch_size = max(self._batch_size(batch_size, 64) // max(num_candidates, 1), 1)
        scores = self._map_cells(score, cells, batch_size, "Annotating")
        if readout is not None:
            scores[0] = (log_probabilities + similarity_weight * scores[0]) * settings["temperature"]
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
            prompt: A question about one cell; by default the prompt of training. `<cell>` in the prompt stands for the
                cell; a prompt without `<cell>` follows the cell.
            max_new_tokens: Longest description, in tokens.
            adata, key_added, batch_size: As for [`annotate`]; 16 cells a batch by default.
            kwargs: For [`read_cells`], as for [`annotate`]; the others for the model's `generate` (`num_beams`,
                `do_sample`, `temperature`, ...). Decoding is greedy by default.

        Returns:
            The same `adata`, with `obs["{key}_description"]`.
        """
        model = self._language_model("describe")
        prompt = self._prompt(prompt)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
        read_kwargs = {name: kwargs.pop(name) for name in READ_OPTIONS if name in kwargs}
        options = {"do_sample": False, **kwargs, "max_new_tokens": max_new_tokens}
        if options.get("num_return_sequences", 1) != 1:
            raise ValueError("describe returns one description per cell; call model.generate for several.")
        cells, report = self.processor.read_cells(adata, **read_kwargs)

        texts = np.empty(len(cells), dtype=object)
        for rows in self._batches(cells, self._batch_size(batch_size, 16), "Describing"):
            inputs = self.processor(text=[prompt] * len(rows), cells=cells[rows]).to(self.device)
            with torch.inference_mode():
                ids = model.generate(**inputs, **options)  # type: ignore[misc]
            answers = self.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            texts[rows] = [answer.strip() for answer in answers]
        adata.obs[f"{key_added}_description"] = texts.astype(str)
        done = {"prompt": prompt, "max_new_tokens": max_new_tokens, "distinct": len(set(texts))}
        return self._record(adata, key_added, report, describe=done)

    def _prompt(self, question: str | None) -> str:
        if question is None:
            return self.processor.render_prompt("describe")
        if not question.strip():
            raise ValueError("The prompt is empty; pass a question about the cell, or no prompt.")
        token = self.processor.cell_token
        if question.count(token) > 1:
            raise ValueError(f"The prompt names {question.count(token)} cells ({token}); name one, the cell of a row.")
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
        """Generate expression profiles of cells from descriptions in words.

        Args:
            prompts: Descriptions of cells; or label -> description, whose labels are kept in `obs["cell_type"]`.
            n_cells: Cells per prompt.
            genes: Symbols, aliases or Ensembl ids; by default the whole gene vocabulary.
            library_size: Counts of a sampled cell over all genes, a number or `(n_cells,)`; by default those of a
                typical training cell.
            do_sample: Draw counts from the predicted distribution, by default wherever the checkpoint predicts one
                (`expression_head` is `nb` or `zinb`). Without sampling every cell of a prompt is the predicted mean.
            seed: Seed of the draws, together with the prompt and the cell's number.
            max_genes: Genes that are decoded together, by default as many as in training; more are decoded in turns.
                The prediction of a gene depends a little on the other genes of its turn, and so on `genes` too.
            key_added, batch_size: As for [`annotate`]; 32 cells a batch by default.

        Returns:
            A new `AnnData` `(len(prompts) * n_cells, n_genes)`: `X` is log1p of counts per 10,000; with sampling,
            `layers["counts"]` has the counts; `obs["prompt"]`; `var_names` are the model's gene symbols.
        """
        try:
            from anndata import AnnData
            from scipy.sparse import csr_matrix  # most values of a cell are zero
        except ImportError as error:
            raise ImportError("Generated cells are an AnnData; install it with `pip install anndata`.") from error

        model = self._language_model("generate")
        labels, prompts = _labels_and_prompts(prompts)
        if n_cells < 1:
            raise ValueError(f"n_cells is {n_cells}; it must be at least 1.")
        do_sample = self._may_sample(do_sample, n_cells)
        gene_ids = self._gene_ids(genes)
        turns = self._gene_turns(gene_ids, max_genes)
        sizes = self._library_sizes(library_size, n_cells)
        values = self._decode_prompts(model, prompts, gene_ids, turns, sizes, do_sample, seed, batch_size)
        if do_sample:
            # The library size counts all genes of the cell; `genes` may be some of them.
            expression = log1p_cp10k(values, np.tile(sizes, len(prompts)))
        else:
            expression = np.repeat(values, n_cells, axis=0)

        generated = AnnData(X=csr_matrix(expression))
        generated.obs_names = [f"prompt{p}-cell{i}" for p in range(len(prompts)) for i in range(n_cells)]
        generated.var_names = self.processor.gene_symbols(gene_ids)
        for name, words in {"prompt": prompts, "cell_type": labels}.items():
            if words:
                _add_obs(generated, name, np.repeat(np.asarray(words, dtype=object), n_cells), categorical=True)
        if do_sample:
            generated.layers["counts"] = csr_matrix(values)
            generated.obs["library_size"] = np.tile(sizes, len(prompts))
        done = {"prompts": np.asarray(prompts, dtype=object), "n_cells": n_cells, "seed": seed}
        return self._record(generated, key_added, None, generate={**done, "sampled": do_sample, "turns": len(turns)})

    def _decode_prompts(
        self,
        model: ScMMGPTForConditionalGeneration,
        prompts: list[str],
        gene_ids: np.ndarray,
        turns: list[np.ndarray],
        sizes: np.ndarray,
        do_sample: bool,
        seed: int,
        batch_size: int | None,
    ) -> np.ndarray:
        """Decode the expression of the genes; the cells of a prompt are consecutive rows.

        Returns:
            With sampling, drawn counts, int32 `(len(prompts) * len(sizes), n_genes)`; else the expected log1p(CP10k),
            float32 `(len(prompts), n_genes)`: the same for all cells of a prompt.
        """
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
            raise ValueError("A mean (expression_head='mse') cannot be sampled; pass do_sample=False.")
        if n_cells > 1 and not do_sample:
            logger.warning(f"Without sampling, the {n_cells} cells of a prompt are equal: each is the predicted mean.")
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
            raise ValueError("genes is empty; name at least one gene, or pass None for the whole vocabulary.")
        ids = self.processor.gene_ids_of(genes)
        unique, first = np.unique(ids, return_index=True)
        if len(unique) < len(ids):
            repeated = sorted({genes[i] for i in set(range(len(ids))) - set(first.tolist())})
            raise ValueError(f"{len(ids) - len(unique)} genes are asked for twice: {repeated[:5]}; name each once.")
        return ids

    def _gene_turns(self, gene_ids: np.ndarray, max_genes: int | None) -> list[np.ndarray]:
        """Columns of each turn of decoding: turns are of nearly equal size, each spread over all genes."""
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
            of: `"cell-text"` is the mean of the cell's queries in the shared space, `projection_dim` wide; `"cell"` is
                the cell model's own embedding (the `<cls>` state, as scGPT's), `hidden_size` wide. Both are
                L2-normalised.
            key_added: Name in `obsm`.
            adata, batch_size, read_kwargs: As for [`annotate`].

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

        cells, report = self.processor.read_cells(adata, **read_kwargs)
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
            text: Description of the wanted cells, one text or several.
            top_k: Cells to return per text.
            key_added: Column of `obs` to add every cell's similarity as (one text only).
            adata, batch_size, read_kwargs: As for [`annotate`].

        Returns:
            Hits, best first, each with `rank`, `cell` (its name), `index` (its row) and `score` (cosine similarity,
            -1 to 1); for several texts, a list of such lists.
        """
        texts = [text] if isinstance(text, str) else [str(item) for item in text]
        if not texts or not all(item.strip() for item in texts):
            raise ValueError("The text to search for is empty; describe the wanted cells.")
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}; it must be at least 1.")
        if key_added is not None and len(texts) > 1:
            raise ValueError(f"key_added names one column of obs, but there are {len(texts)} texts; pass one text.")
        text_features = self._text_features(self.processor(qformer_text=texts).to(self.device))

        def score(inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
            return (cell_text_similarity(self._bridge().get_cell_features(**inputs), text_features),)

        cells, report = self.processor.read_cells(adata, **read_kwargs)
        (similarity,) = self._map_cells(score, cells, self._batch_size(batch_size, 64), "Searching")
        if key_added is not None:
            adata.obs[key_added] = similarity[:, 0]
            self._record(adata, "scmmgpt", report, search={"text": texts[0], "key": key_added})
        hits = [_best_hits(column, adata.obs_names, top_k) for column in similarity.T]
        return hits[0] if isinstance(text, str) else hits

    # -- shared -------------------------------------------------------------------------------------------------------

    def _bridge(self) -> ScMMGPTBridgeModel:
        """Cell model, Q-Former, contrast and matching, the part that both kinds of checkpoint have."""
        return cast(ScMMGPTBridgeModel, getattr(self.model, "model", self.model))

    def _language_model(self, verb: str) -> ScMMGPTForConditionalGeneration:
        """The model, which must have a language model for `verb`."""
        if not hasattr(self.model, "generate_cells"):
            raise ValueError(
                f"This checkpoint has no language model (it is of stage 1), so it cannot {verb}; it can annotate, "
                "embed and search. Train stage 2 with `python -m scmmgpt.train tune`."
            )
        return cast(ScMMGPTForConditionalGeneration, self.model)

    def _batch_size(self, given: int | None, default: int) -> int:
        batch_size = given or self.batch_size or default
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
        return batch_size

    def _batches(self, cells: Cells, batch_size: int, what: str) -> Iterator[np.ndarray]:
        """Row numbers of each batch: cells alike in length, so that little is padded; the longest first."""
        order = np.argsort(-np.diff(cells.indptr), kind="stable")
        with logging.tqdm(total=len(order), desc=what, unit="cell", disable=len(order) <= batch_size) as progress:
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                yield rows
                progress.update(len(rows))

    def _map_cells(self, function: CellFunction, cells: Cells, batch_size: int, what: str) -> list[np.ndarray]:
        """Apply `function` to all cells, batch by batch; float32 arrays in the cells' order."""
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

    def _text_features(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Texts in the shared space, `(n_texts, projection_dim)`, from the processor's `qformer_text` inputs."""
        with torch.inference_mode():
            ids, mask = inputs["qformer_input_ids"], inputs["qformer_attention_mask"]
            batches = zip(ids.split(256), mask.split(256), strict=True)
            return torch.cat([self._bridge().get_text_features(*batch) for batch in batches])

    def _record(self, adata: Any, key: str, report: dict[str, Any] | None, **done: Any) -> Any:
        """Add the settings of a verb, and the report of what was read, to `uns`; entries of other verbs stay."""
        if report is not None:
            adata.uns.setdefault("scmmgpt", {})["input"] = storable(report)
        done["checkpoint"] = str(self.model.config._name_or_path or "")
        adata.uns[key] = {**adata.uns.get(key, {}), **done}
        return adata


# -- small parts ------------------------------------------------------------------------------------------------------


def best_device() -> str:
    """`"cuda"`, `"mps"` or `"cpu"`: the fastest that this machine has."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _labels_with_texts(labels: dict[str, str] | Sequence[str] | None, stored: dict[str, str]) -> dict[str, str]:
    """Label -> text that describes it: the given text, else the stored one, else the label itself."""
    if isinstance(labels, str):
        raise TypeError(f"labels is the one string {labels!r}; pass a list of labels, or a dict label -> text.")
    if labels is None:
        labels = stored
    elif not isinstance(labels, dict):
        labels = {label: stored.get(label, label) for label in labels}
    labels = {str(label): str(text) for label, text in labels.items()}
    if not labels:
        raise ValueError("There are no labels to choose from; pass a list of labels, or a dict label -> text.")
    empty = [label for label, text in labels.items() if not text.strip()]
    if empty:
        raise ValueError(f"The text of {len(empty)} labels is empty: {empty[:5]}. Describe each, or leave it out.")
    return labels


def _labels_and_prompts(prompts: str | Sequence[str] | dict[str, str]) -> tuple[list[str], list[str]]:
    """Labels, the keys of a dict, and texts of the prompts."""
    labels = list(prompts) if isinstance(prompts, dict) else []
    texts = [prompts] if isinstance(prompts, str) else list(prompts.values() if isinstance(prompts, dict) else prompts)
    n_empty = sum(not text.strip() for text in texts)
    if n_empty or not texts:
        raise ValueError(f"Pass one prompt or more; each needs some text, but {n_empty} of {len(texts)} are empty.")
    return labels, texts


def _best_hits(similarity: np.ndarray, names: Any, top_k: int) -> list[dict[str, Any]]:
    best = enumerate(np.argsort(-similarity, kind="stable")[:top_k].tolist(), start=1)
    return [
        {"rank": rank, "cell": str(names[i]), "index": i, "score": round(float(similarity[i]), 6)} for rank, i in best
    ]


def _words(adata: Any, key: str) -> np.ndarray:
    """A column of `obs`, as str `(n_obs,)`."""
    if key not in adata.obs:
        raise ValueError(f"obs has no column {key!r}; it has {list(adata.obs.columns)}.")
    return np.asarray(adata.obs[key], dtype=str)


def _add_obs(adata: Any, name: str, values: np.ndarray, categorical: bool) -> None:
    adata.obs[name] = values
    if categorical:
        adata.obs[name] = adata.obs[name].astype("category")


def _cell_id(prompt: str, number: int) -> int:
    """A 63-bit identity of the n-th cell of a prompt, which does not depend on the other prompts."""
    digest = hashlib.blake2b(f"{number}\n{prompt}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def storable(value: Any) -> Any:
    """A part of a report in types that `.h5ad` files hold."""
    if isinstance(value, Mapping):
        return {str(k).replace("/", "_"): storable(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return np.array(value, dtype=object if any(isinstance(v, str) for v in value) else None)
    return value
