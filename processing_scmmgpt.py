"""The processor of scMMGPT: cells and texts -> model inputs, for training, evaluation and the pipeline alike."""

import json
import os
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import BatchFeature, PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import cached_file

from .cells_scmmgpt import COUNTS_PER_10K, TARGET_SEED, Cells, cells_in, cells_of, log1p_cp10k, show_module
from .feature_extraction_scmmgpt import ScMMGPTFeatureExtractor, mask_genes
from .genes_scmmgpt import GeneIndex
from .reading_scmmgpt import InputChoice, choose_input, read_cells


GENE_ALIASES_FILE = "gene_aliases.json"
CELL_KWARGS = ("max_genes", "selection")
# Of a tokenizer's arguments, those that have a meaning here; see `ScMMGPTProcessor.__call__`.
TEXT_KWARGS = (
    *("add_special_tokens", "padding", "padding_side", "pad_to_multiple_of", "truncation", "max_length"),
    *("return_offsets_mapping", "return_text_replacement_offsets"),
)

# The prompt of each task in training; saved with the checkpoint, so that training and use can't drift apart.
DEFAULT_PROMPTS = {
    "describe": "<cell>\nDescribe this cell.",
    "generate": "Generate the gene expression of this cell: {text}",
}
# For language models without a chat template (Llama-2 base, for instance).
PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: "
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}\n{% endfor %}{% if add_generation_prompt %}Assistant: {% endif %}"
)


class ScGPTProcessor(ProcessorMixin):
    """Turns AnnData and counts into the inputs of scGPT: the processor of a checkpoint of the cell model alone.

    Args:
        feature_extractor: Counts -> gene tokens and expression values.
        gene_tokenizer: The gene vocabulary, one word per gene symbol.
    """

    tokenizer_names: tuple[str, ...] = ("gene_tokenizer",)
    feature_extractor: ScMMGPTFeatureExtractor
    gene_tokenizer: PreTrainedTokenizerBase

    def __init__(self, feature_extractor: ScMMGPTFeatureExtractor, gene_tokenizer: PreTrainedTokenizerBase) -> None:
        self.gene_aliases: dict[str, Any] = {}  # the `aliases` of `GeneIndex`; saved in a separate file
        super().__init__(feature_extractor, gene_tokenizer)
        self.tokenizer = gene_tokenizer  # `Trainer` compares its special tokens with the model's

    @cached_property
    def gene_index(self) -> GeneIndex:
        """Gene names, aliases and Ensembl ids -> ids in the gene vocabulary."""
        return GeneIndex(self.gene_tokenizer.get_vocab(), self.gene_aliases)

    @property
    def model_input_names(self) -> list[str]:
        """Every key of a call's result that the model takes."""
        return [*self.feature_extractor.model_input_names, "labels"]

    def read_cells(self, adata: Any, **kwargs: Any) -> tuple[Cells, dict[str, Any]]:
        """AnnData -> `Cells` of this vocabulary, and a report; see `reading_scmmgpt.read_cells`."""
        return read_cells(adata, self.gene_index, **kwargs)

    def choose_input(self, adata: Any, **kwargs: Any) -> InputChoice:
        """Which matrix and genes of an AnnData to read; see `reading_scmmgpt.choose_input`."""
        return choose_input(adata, self.gene_index, **kwargs)

    def add_genes(self, symbols: list[str]) -> int:
        """Add genes to the vocabulary; the model needs `resize_gene_embeddings` of the size that is returned."""
        self.gene_tokenizer.add_tokens(symbols)
        self.__dict__.pop("gene_index", None)
        return len(self.gene_tokenizer)

    def gene_ids_of(self, genes: list[str]) -> np.ndarray:
        """Vocabulary ids, int64 `(len(genes),)`, of gene symbols, aliases or Ensembl ids.

        Raises:
            ValueError: If a gene is not in the vocabulary.
        """
        ids = [self.gene_index.lookup(gene)[0] for gene in genes]
        unknown = [gene for gene, i in zip(genes, ids, strict=True) if i < 0]
        if unknown:
            raise ValueError(
                f"{len(unknown)} of {len(genes)} genes are not in this model's vocabulary of {len(self.gene_index)}: "
                f"{', '.join(map(repr, unknown[:5]))}{' ...' if len(unknown) > 5 else ''}. Leave these genes out, or "
                "check that they are human gene symbols or Ensembl ids."
            )
        return np.asarray(ids, dtype=np.int64)

    def gene_symbols(self, gene_ids: Iterable[int]) -> list[str]:
        """Symbols of vocabulary ids."""
        return list(self.gene_tokenizer.convert_ids_to_tokens([int(i) for i in gene_ids]))

    def __call__(
        self,
        cells: Any,
        labels: Any = None,
        *,
        mask_ratio: float | Sequence[float] | None = None,
        epoch: int = 0,
        return_tensors: str = "pt",
        max_genes: int | None = None,
        selection: str | None = None,
    ) -> BatchFeature:
        """Make model inputs, each `(n_cells, n_tokens)`.

        Args:
            cells: [`Cells`], an AnnData, or rows; see [`cells_of`].
            labels: One per cell, for [`ScGPTForSequenceClassification`]: class numbers, numbers to predict, or rows of
                0 and 1.
            mask_ratio: Share of each cell's genes to hide, for [`ScGPTForPreTraining`]; `labels` are then the values
                of the hidden genes, and -100 elsewhere. Of several shares, each cell draws one. scGPT was pre-trained
                with 0.25, 0.5 and 0.75, and fine-tuned with 0.4.
            epoch: With each cell's id, the seed of gene sampling, binning and hiding.
            return_tensors: `"pt"`, PyTorch.
            max_genes, selection: In place of the feature extractor's own.

        Raises:
            ValueError: If labels and cells differ in number, or labels and `mask_ratio` are both given.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors={return_tensors!r} is not supported; use 'pt', PyTorch.")
        cells = cells_of(cells, self)
        batch = self.feature_extractor(cells, epoch=epoch, max_genes=max_genes, selection=selection)
        if mask_ratio is not None:
            if labels is not None:
                raise ValueError("labels and mask_ratio are both given; with mask_ratio, the labels are made here.")
            genes = batch["gene_ids"], batch["cell_attention_mask"], cells.cell_ids
            hidden = mask_genes(*genes, mask_ratio, seed=self.feature_extractor.seed, epoch=epoch)
            batch["labels"] = batch["expression"].masked_fill(~hidden, -100)
        elif labels is not None:
            values = np.asarray(labels)
            if len(values) != len(cells) or values.dtype.kind not in "biuf":
                raise ValueError(
                    f"{len(values)} labels of type {values.dtype} were given for {len(cells)} cells; pass one number "
                    "for each, for instance `model.config.label2id[name]`."
                )
            batch["labels"] = torch.as_tensor(values.astype(np.float32 if values.dtype.kind == "f" else np.int64))
        return batch

    # -- files --------------------------------------------------------------------------------------------------------

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Save every part and the gene aliases."""
        os.makedirs(save_directory, exist_ok=True)
        Path(save_directory, GENE_ALIASES_FILE).write_text(json.dumps(self.gene_aliases, sort_keys=True), "utf-8")
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, processor_dict: dict | None = None, **kwargs: Any
    ) -> list[Any]:
        # The auto class of the feature extractor would load the checkpoint's copy of the class, which needs
        # `trust_remote_code` even where this package is installed.
        extractor = ScMMGPTFeatureExtractor.from_pretrained(pretrained_model_name_or_path, **kwargs)
        kwargs.setdefault("config", PreTrainedConfig())  # else each tokenizer would ask for `trust_remote_code`
        load = cls._load_tokenizer_from_pretrained
        return [extractor, *(load(name, pretrained_model_name_or_path, **kwargs) for name in cls.tokenizer_names)]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """Load every part and the gene aliases."""
        processor = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        wanted = ("cache_dir", "revision", "token", "local_files_only")
        options = {name: kwargs[name] for name in wanted if name in kwargs}
        path = cached_file(
            pretrained_model_name_or_path, GENE_ALIASES_FILE, _raise_exceptions_for_missing_entries=False, **options
        )
        if path is not None:
            processor.gene_aliases = json.loads(Path(path).read_text(encoding="utf-8"))
        return processor


class ScMMGPTProcessor(ScGPTProcessor):
    """Turns AnnData, counts and texts into the inputs of scMMGPT.

    Args:
        feature_extractor: Counts -> gene tokens and expression values.
        tokenizer: The language model's; `<cell>` is added if it is missing. A stage-1 checkpoint has no language model
            and holds a copy of `qformer_tokenizer` in this place.
        qformer_tokenizer: The Q-Former text branch's.
        gene_tokenizer: The gene vocabulary, one word per gene symbol.
        chat_template: By default the tokenizer's own.
        num_query_tokens: Q-Former queries per cell, as in the model's configuration.
        cell_token: The placeholder.
        qformer_max_length: Texts for the Q-Former are truncated to this number of tokens.
        max_target_genes: Genes per generated training cell; of more, each text draws a random subset.
        library_size: Total counts of a typical training cell, the default for sampled cells.
        prompts: The prompt of each task; `{text}` in it is replaced by the description of a cell.
        num_cell_tokens: Placeholders per cell, as in the model's configuration; by default `num_query_tokens`.
    """

    tokenizer_names = ("tokenizer", "qformer_tokenizer", "gene_tokenizer")
    tokenizer: PreTrainedTokenizerBase
    qformer_tokenizer: PreTrainedTokenizerBase

    def __init__(
        self,
        feature_extractor: ScMMGPTFeatureExtractor,
        tokenizer: PreTrainedTokenizerBase,
        qformer_tokenizer: PreTrainedTokenizerBase,
        gene_tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        num_query_tokens: int = 32,
        cell_token: str = "<cell>",
        qformer_max_length: int = 128,
        max_target_genes: int = 1200,
        library_size: float = COUNTS_PER_10K,
        prompts: dict[str, str] | None = None,
        num_cell_tokens: int | None = None,
    ) -> None:
        self.num_query_tokens = num_query_tokens
        self.num_cell_tokens = num_query_tokens if num_cell_tokens is None else num_cell_tokens
        self.cell_token = cell_token
        self.qformer_max_length = qformer_max_length
        self.max_target_genes = max_target_genes
        self.library_size = library_size
        self.prompts = dict(DEFAULT_PROMPTS if prompts is None else prompts)
        self.gene_aliases: dict[str, Any] = {}  # the `aliases` of `GeneIndex`; saved in a separate file
        if cell_token not in tokenizer.get_vocab():
            tokenizer.add_special_tokens({"extra_special_tokens": [cell_token]}, replace_extra_special_tokens=False)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        # Generation continues at the right end; also for who loads the saved tokenizer alone.
        tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
        chat_template = chat_template or tokenizer.chat_template or PLAIN_CHAT_TEMPLATE
        parts = (feature_extractor, tokenizer, qformer_tokenizer, gene_tokenizer)
        ProcessorMixin.__init__(self, *parts, chat_template=chat_template)

    # -- parts --------------------------------------------------------------------------------------------------------

    @property
    def cell_token_id(self) -> int:
        """Id of `<cell>` in the language model's tokenizer."""
        return cast(int, self.tokenizer.convert_tokens_to_ids(self.cell_token))

    @property
    def model_input_names(self) -> list[str]:
        """Every key of a call's result that the model takes."""
        text = "input_ids attention_mask labels qformer_input_ids qformer_attention_mask"
        cells = "gene_ids expression cell_attention_mask profile_gene_ids profile readout_scores"
        targets = "target_gene_ids target_attention_mask target_rows target_expression target_counts library_size"
        return f"{text} {cells} {targets}".split()

    # -- cells and texts in -------------------------------------------------------------------------------------------

    def __call__(  # type: ignore[override]  # texts come first
        self,
        text: str | list[str] | None = None,
        cells: Any = None,
        images: None = None,
        videos: None = None,
        audio: None = None,
        *,
        answers: list[str] | None = None,
        qformer_text: str | list[str] | None = None,
        target_cells: Cells | None = None,
        target_rows: np.ndarray | None = None,
        target_genes: np.ndarray | None = None,
        epoch: int = 0,
        return_tensors: str = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Make model inputs. Every argument is optional; the result holds the keys of the given ones.

        Args:
            text: Texts for the language model, with one `<cell>` for every cell they mention; each `<cell>` becomes
                `num_cell_tokens` tokens.
            cells: [`Cells`], an AnnData, or rows, in the order in which the texts mention them; see [`cells_of`].
            answers: One per text, appended to it; `labels` is -100 for all other tokens. An empty answer has no loss.
            qformer_text: Texts for the Q-Former's text branch (captions, labels, search texts).
            target_cells: The cells that the texts should generate.
            target_rows: Int `(len(target_cells),)`: the text that generates each cell; by default the texts in order.
            target_genes: Vocabulary ids of the measured genes that may be generated; by default the whole vocabulary.
            epoch: With each cell's id, the seed of gene sampling and binning.
            kwargs: `max_genes` and `selection`, in place of the feature extractor's own; and for `text`, with the
                meaning that they have for a tokenizer: `padding` (by default to the longest text), `padding_side`
                (left), `pad_to_multiple_of`, `truncation` with `max_length`, `add_special_tokens` (by default where a
                text does not begin with one), `return_offsets_mapping`. A text with its answer is truncated as one.

        Raises:
            ValueError: If placeholders and cells, texts and answers, or targets and rows differ in number, if a
                target's row has no text, or if a text were truncated within or before one of its cells.
            TypeError: If there is no such argument, or if a text is not a string.
        """
        unknown = sorted(set(kwargs) - {*CELL_KWARGS, *TEXT_KWARGS})
        if unknown:
            raise TypeError(
                f"ScMMGPTProcessor has no arguments {unknown}; beside its own it takes "
                f"{', '.join((*CELL_KWARGS, *TEXT_KWARGS))}."
            )
        if images is not None or videos is not None or audio is not None:
            raise ValueError("images, videos and audio are not supported; pass text and cells.")
        if return_tensors != "pt":
            raise ValueError(f"return_tensors={return_tensors!r} is not supported; use 'pt', PyTorch.")
        data: dict[str, torch.Tensor] = {}
        if cells is not None:
            cells = cells_of(cells, self)
            options = {name: kwargs[name] for name in CELL_KWARGS if kwargs.get(name) is not None}
            data.update(self.feature_extractor(cells, epoch=epoch, return_tensors="pt", **options))
        if qformer_text is not None:
            data.update(self._qformer_inputs(qformer_text))
        if text is not None:
            text = _list_texts(text)
            if not text:
                raise ValueError("text is an empty list; pass at least one text, or leave it out.")
            options = {name: kwargs[name] for name in TEXT_KWARGS if kwargs.get(name) is not None}
            data.update(self._text_inputs(text, answers, 0 if cells is None else len(cells), **options))
        if target_cells is not None:
            n_texts = 0 if text is None else len(text)
            rows = _check_target_rows(target_rows, n_texts, len(target_cells))
            data.update(self.encode_targets(target_cells, target_genes, rows=rows, n_rows=n_texts, epoch=epoch))
        if not data:
            raise ValueError("Nothing to process: pass text, cells or qformer_text.")
        return BatchFeature(data)

    def _qformer_inputs(self, text: str | list[str]) -> dict[str, torch.Tensor]:
        texts = _list_texts(text)
        options = {"padding": True, "truncation": True, "max_length": self.qformer_max_length}
        inputs = self.qformer_tokenizer(texts, **options, return_tensors="pt")
        return {f"qformer_{name}": inputs[name] for name in ("input_ids", "attention_mask")}

    def _text_inputs(
        self,
        text: list[str],
        answers: list[str] | None,
        num_cells: int,
        *,
        add_special_tokens: bool | None = None,
        return_offsets_mapping: bool = False,
        return_text_replacement_offsets: bool = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        **padding: Any,
    ) -> dict[str, Any]:
        mentioned = sum(t.count(self.cell_token) for t in text)
        if mentioned != num_cells:
            raise ValueError(
                f"The texts mention {mentioned} cells ({self.cell_token}), but {num_cells} cells were given. Write "
                f"{self.cell_token} once for each cell; a trainer needs `data_collator=processor.data_collator()`."
            )
        rows: dict[str, list[list]] = {"input_ids": [], "attention_mask": []}
        for t in text:
            special = not self.has_special_start(t) if add_special_tokens is None else add_special_tokens
            options = {"add_special_tokens": special, "return_offsets_mapping": return_offsets_mapping}
            encoded = self.tokenizer(t.replace(self.cell_token, self.cell_token * self.num_cell_tokens), **options)
            rows["input_ids"].append(list(encoded["input_ids"]))
            if return_offsets_mapping:
                rows.setdefault("offset_mapping", []).append(encoded["offset_mapping"])
        if answers is not None:
            if len(answers) != len(text):
                raise ValueError(f"{len(answers)} answers were given for {len(text)} texts; pass one for each text.")
            # Prompt and answer are tokenised apart, so that the prompt has the same tokens as at generation.
            end = [self.tokenizer.eos_token_id]
            tokens = [self.tokenizer(a, add_special_tokens=False)["input_ids"] + end if a else [] for a in answers]
            rows["labels"] = [[-100] * len(i) + a for i, a in zip(rows["input_ids"], tokens, strict=True)]
            rows["input_ids"] = [i + a for i, a in zip(rows["input_ids"], tokens, strict=True)]
            if return_offsets_mapping:  # an answer is not a part of the text
                spans = rows["offset_mapping"]
                rows["offset_mapping"] = [o + [(0, 0)] * len(a) for o, a in zip(spans, tokens, strict=True)]
        if truncation not in (False, "do_not_truncate"):
            self._truncate(rows, self.tokenizer.model_max_length if max_length is None else max_length)
        elif max_length is not None and padding.get("padding") != "max_length":
            raise ValueError(f"max_length={max_length} needs truncation=True or padding='max_length' beside it.")
        rows["attention_mask"] = [[1] * len(i) for i in rows["input_ids"]]
        data = self.pad_rows(rows, max_length, **padding)
        if return_text_replacement_offsets:  # for the masks of assistant tokens
            data["text_replacement_offsets"] = [self._find_expansions(t) for t in text]
        return data

    def _truncate(self, rows: dict[str, list[list]], max_length: int) -> None:
        """Cut every row to `max_length` tokens, at the tokenizer's `truncation_side`, but never a cell."""
        kept = slice(-max_length, None) if self.tokenizer.truncation_side == "left" else slice(max_length)
        for row, ids in enumerate(rows["input_ids"]):
            if ids[kept].count(self.cell_token_id) != ids.count(self.cell_token_id):
                raise ValueError(
                    f"Text {row} has {len(ids)} tokens, and max_length={max_length} would cut off some of its "
                    f"{self.num_cell_tokens} tokens a cell; raise max_length or shorten the text."
                )
        for name, values in rows.items():
            rows[name] = [row[kept] for row in values]

    def pad_rows(
        self,
        rows: dict[str, list[list]],
        max_length: int | None = None,
        padding: bool | str = True,
        padding_side: str | None = None,
        pad_to_multiple_of: int | None = None,
    ) -> dict[str, Any]:
        """Rows of equal length, as tensors `(n_texts, length)` int64; `offset_mapping` as lists.

        Args:
            rows: `input_ids`, `attention_mask`, `labels` and `offset_mapping` of each text, as many as there are.
            max_length, padding, padding_side, pad_to_multiple_of: As for a tokenizer.
        """
        lengths = {len(ids) for ids in rows["input_ids"]}
        if padding not in (True, False, "longest", "max_length", "do_not_pad"):
            raise ValueError(f"padding is {padding!r}; choose True (to the longest text), 'max_length' or False.")
        if padding in (False, "do_not_pad") and len(lengths) > 1:
            raise ValueError(f"Texts of {sorted(lengths)} tokens make no tensor without padding; use padding=True.")
        if padding == "max_length" and max_length is None:
            raise ValueError("padding='max_length' needs max_length, the number of tokens.")
        length = max(lengths)
        if padding == "max_length":
            length = max(length, cast(int, max_length))
        if pad_to_multiple_of is not None:
            length = -(-length // pad_to_multiple_of) * pad_to_multiple_of
        side = self.tokenizer.padding_side if padding_side is None else padding_side
        values = {"input_ids": self.tokenizer.pad_token_id, "attention_mask": 0, "labels": -100}
        data: dict[str, Any] = {}
        for name, value_rows in rows.items():
            fills = [[values.get(name, (0, 0))] * (length - len(row)) for row in value_rows]
            filled = [f + r if side == "left" else r + f for f, r in zip(fills, value_rows, strict=True)]
            data[name] = torch.tensor(filled, dtype=torch.long) if name in values else filled
        return data

    def _find_expansions(self, text: str) -> list[dict[str, tuple[int, int]]]:
        """Where each `<cell>` of a text begins and ends, and where its placeholders do in the expanded text."""
        spans, size = [match.span() for match in re.finditer(re.escape(self.cell_token), text)], len(self.cell_token)
        added = size * (self.num_cell_tokens - 1)
        new = [(start + i * added, end + (i + 1) * added) for i, (start, end) in enumerate(spans)]
        return [{"span": old, "new_span": expanded} for old, expanded in zip(spans, new, strict=True)]

    def has_special_start(self, text: str) -> bool:
        """Whether a text begins with a special token other than `<cell>`, as the output of a chat template does."""
        starts = (token for token in self.tokenizer.all_special_tokens if token and token != self.cell_token)
        return text.startswith(tuple(starts))

    def encode_targets(
        self,
        cells: Cells,
        genes: np.ndarray | None = None,
        *,
        rows: np.ndarray | None = None,
        n_rows: int | None = None,
        epoch: int = 0,
    ) -> dict[str, torch.Tensor]:
        """The genes that each text should generate, zeros included, and the target counts of its cells.

        Args:
            cells: The cells to generate.
            genes: Vocabulary ids `(num_measured,)` of the genes that were measured in the cells; by default all.
            rows: Int `(len(cells),)`: the text that generates each cell; by default each cell has its own.
            n_rows: Number of texts; those without a cell generate nothing.
            epoch: With the id of a text's first cell, the seed of the random subset of `max_target_genes` genes.

        Returns:
            Of the texts, `target_gene_ids` and `target_attention_mask`, int64 `(n_rows, num_genes)`. Of the cells,
            `target_rows` int64 and `library_size` float32, `(len(cells),)`, and `target_counts` (raw counts) and
            `target_expression` (log1p(CP10k)), float32 `(len(cells), num_genes)`.
        """
        genes = np.unique(list(self.gene_index.vocabulary.values()) if genes is None else genes).astype(np.int64)
        rows = np.arange(len(cells)) if rows is None else rows
        n_rows = len(cells) if n_rows is None else n_rows

        # step 1: the genes of each text that generates
        generating, first_cells, place = np.unique(rows, return_index=True, return_inverse=True)
        n = len(generating)
        if len(genes) > self.max_target_genes:
            # The subset is drawn as a mask of masked-gene training is: by a hash of (cell, epoch, gene).
            candidates = np.tile(np.concatenate([[self.feature_extractor.cls_token_id], genes]), (n, 1))
            share = (self.max_target_genes + 0.5) / len(genes)
            ids = cells.cell_ids[first_cells]
            chosen = mask_genes(candidates, np.ones_like(candidates), ids, share, seed=TARGET_SEED, epoch=epoch)
            gene_ids = candidates[chosen].reshape(n, self.max_target_genes)
        else:
            gene_ids = np.broadcast_to(genes, (n, len(genes)))

        # step 2: each cell's counts of its text's genes
        n_ids = int(max(genes.max(), cells.gene_ids.max(initial=0))) + 1
        counts = np.zeros((len(cells), n_ids), dtype=np.float32)
        counts[cells.rows(), cells.gene_ids] = cells.counts
        counts = np.take_along_axis(counts, gene_ids[place], axis=1)
        library_size = cells.library_sizes().astype(np.float32)

        data = {
            "target_gene_ids": np.full((n_rows, gene_ids.shape[1]), self.feature_extractor.pad_token_id, np.int64),
            "target_attention_mask": np.zeros((n_rows, gene_ids.shape[1]), np.int64),
            "target_rows": rows.astype(np.int64),
            "target_counts": counts,
            "target_expression": log1p_cp10k(counts, library_size),
            "library_size": library_size,
        }
        data["target_gene_ids"][generating] = gene_ids
        data["target_attention_mask"][generating] = 1
        return {name: torch.from_numpy(value) for name, value in data.items()}

    # -- conversations ------------------------------------------------------------------------------------------------

    def render_prompt(self, task: str, *, text: str = "") -> str:
        r"""The prompt of a task as in training, chat template included.

        `text` replaces `{text}`. Nothing else in a prompt is interpreted, since a prompt comes with a checkpoint.

        >>> processor.render_prompt("generate", text="A B cell.")  # doctest: +SKIP
        '<|im_start|>user\nGenerate the gene expression of this cell: A B cell.<|im_end|>\n<|im_start|>assistant\n'
        """
        if task not in self.prompts:
            raise ValueError(f"Task {task!r} has no prompt in this checkpoint; choose one of {sorted(self.prompts)}.")
        return self.render_question(self.prompts[task].replace("{text}", text))

    def render_question(self, question: str) -> str:
        """A user's message in the chat template, up to the beginning of the answer."""
        message = {"role": "user", "content": question}
        return self.apply_chat_template([message], add_generation_prompt=True, tokenize=False)

    def apply_chat_template(self, conversation: list, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; parts `{"type": "cell"}` stand for cells.

        The cells are the `cell` of each part, [`Cells`], an AnnData or a row, or are given for all conversations in
        order as `processor_kwargs={"cells": ...}`.

        Raises:
            ValueError: If cells are given in both ways, if a part is of another type than "cell" or "text", or if
                `sanitize_control_tokens` is set, which would turn the `<cell>` of a cell into plain text.
        """
        if kwargs.get("sanitize_control_tokens"):
            raise ValueError("sanitize_control_tokens would turn <cell> into plain text; remove it from the texts.")
        single = bool(conversation) and isinstance(conversation[0], dict)
        conversations = [conversation] if single else conversation
        cells = [cell for messages in conversations for cell in cells_in(messages)]
        if cells and kwargs.get("tokenize"):
            options = kwargs.get("processor_kwargs") or {}
            if options.get("cells") is not None:
                raise ValueError("Cells are given twice, in the messages and in processor_kwargs; leave one out.")
            kwargs["processor_kwargs"] = {**options, "cells": cells}
        flat = [self.flatten_messages(messages) for messages in conversations]
        return super().apply_chat_template(flat[0] if single else flat, *args, **kwargs)

    def flatten_messages(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Messages whose contents are strings, since the chat templates of most language models take no parts."""
        return [{**message, "content": self._flatten_content(message["content"])} for message in messages]

    def _flatten_content(self, content: str | list[dict[str, Any]]) -> str:
        if isinstance(content, str):
            return content
        if other := [part.get("type") for part in content if part.get("type") not in ("cell", "text")]:
            raise ValueError(f"A part of a message has the type {other[0]!r}; scMMGPT reads 'cell' and 'text'.")
        return "\n".join(self.cell_token if part["type"] == "cell" else part["text"] for part in content)

    def data_collator(self, *args: Any, **kwargs: Any) -> Any:
        """[`ScMMGPTDataCollator`] of this processor: rows of a dataset -> batches of a trainer.

        The import is here because it loads transformers' trainer, which inference does not need.
        """
        from .collator_scmmgpt import ScMMGPTDataCollator

        return ScMMGPTDataCollator(self, *args, **kwargs)

    def pipeline(self, model: Any, **kwargs: Any) -> Any:
        """[`ScMMGPTPipeline`] of this processor and its model.

        The circular import is needed: a checkpoint gets its code files by following the imports of its processor, and
        `transformers.pipeline` looks for the pipeline's file in the checkpoint.
        """
        from .pipeline_scmmgpt import ScMMGPTPipeline

        return ScMMGPTPipeline(model, self, **kwargs)


def _list_texts(text: Any) -> list[str]:
    """One text or several as a list."""
    texts = []
    for one in [text] if isinstance(text, str) else text:
        if not isinstance(one, str):
            raise TypeError(
                f"{type(text).__name__} is not a text or a list of texts; pass cells by name, as processor(cells=...)."
            )
        texts.append(one)
    return texts


def _check_target_rows(target_rows: np.ndarray | None, n_texts: int, n_targets: int) -> np.ndarray:
    """Row number of the text of each target cell; by default each text generates one cell."""
    rows = np.arange(n_texts) if target_rows is None else np.asarray(target_rows)
    if rows.dtype == bool:
        raise TypeError("target_rows are bool; pass row numbers of texts, one for each target cell.")
    if len(rows) != n_targets:
        raise ValueError(f"{n_targets} target cells were given for {len(rows)} target rows; pass one row for each.")
    if len(rows) and not 0 <= rows.min() <= rows.max() < n_texts:
        raise ValueError(f"target_rows go from {rows.min()} to {rows.max()}, but there are {n_texts} texts (from 0).")
    return rows


show_module(__name__)
ScGPTProcessor.register_for_auto_class("AutoProcessor")
ScMMGPTProcessor.register_for_auto_class("AutoProcessor")
