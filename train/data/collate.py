"""Cells and their annotations -> training batches, through the one processor."""

from collections.abc import Mapping

import numpy as np
import torch

from scmmgpt.cells_scmmgpt import DIRECTION_SEED, Cells, hash_names
from scmmgpt.feature_extraction_scmmgpt import mask_genes
from scmmgpt.processing_scmmgpt import ScMMGPTProcessor
from scmmgpt.train.data.captions import CAPTION_COLUMNS, CaptionSampler


def type_ids(obs: Mapping[str, np.ndarray], captions: list[str]) -> torch.Tensor:
    """What each caption means, int64 `(n_cells,)`: the cell type's id, its name, or the caption itself.

    Two captions of one type differ in words, tissue or markers; as answers to "what is this cell" they agree.
    """
    names = np.array(captions, dtype=object)
    for column in ("cell_type", "cell_type_ontology_term_id"):
        values = np.asarray(obs.get(column, np.full(len(captions), None)), dtype=object)
        known = np.array([bool(value) and value != "unknown" for value in values])
        names[known] = values[known]
    return torch.from_numpy(hash_names(names.astype(str)).view(np.int64))


def rows_of(obs: Mapping[str, np.ndarray], chosen: np.ndarray) -> dict[str, np.ndarray]:
    """The chosen rows of every column; `chosen` is bool `(n_cells,)`."""
    return {name: np.asarray(values, dtype=object)[chosen] for name, values in obs.items()}


class AlignmentCollator:
    """Batches of stage 1: cells, captions, and which captions mean the same.

    Args:
        processor: Makes every input.
        captions: Writes the texts.
        mask_ratio: Share of genes hidden for the masked-expression loss; `None` leaves that loss out.
        mask_value: What stands in place of a hidden value, `ScGPTConfig.mask_value`.
        max_genes: Longest cell; by default the processor's.
        paired: Whether only a cell's own text is right for it, whatever others mean, as published.
    """

    def __init__(
        self,
        processor: ScMMGPTProcessor,
        captions: CaptionSampler,
        *,
        mask_ratio: float | None = None,
        mask_value: float = -1.0,
        max_genes: int | None = None,
        paired: bool = False,
    ) -> None:
        self.processor, self.captions, self.paired = processor, captions, paired
        self.mask_ratio, self.mask_value, self.max_genes = mask_ratio, mask_value, max_genes
        self.gene_symbols = processor.gene_symbols(range(len(processor.gene_tokenizer)))

    def __call__(self, cells: Cells, obs: Mapping[str, np.ndarray], *, epoch: int = 0) -> dict[str, torch.Tensor]:
        """Inputs of [`ScMMGPTForCellTextAlignment`]."""
        texts = self.captions.caption(obs, cells, self.gene_symbols, epoch=epoch)
        batch = dict(self.processor(cells=cells, qformer_text=texts, epoch=epoch, max_genes=self.max_genes))
        batch["text_ids"] = torch.arange(len(texts)) if self.paired else type_ids(obs, texts)
        if self.mask_ratio is not None:
            extractor = self.processor.feature_extractor
            hidden = mask_genes(
                batch["gene_ids"],
                batch["cell_attention_mask"],
                cells.cell_ids,
                self.mask_ratio,
                seed=extractor.seed,
                epoch=epoch,
            )
            batch["expression_labels"] = batch["expression"].masked_fill(~hidden, -100)
            batch["masked_expression"] = batch["expression"].masked_fill(hidden, self.mask_value)
        return batch


class TuningCollator:
    """Batches of stage 2: every cell is either described (cell -> text) or generated (text -> cell).

    Cells of a batch that are to be generated from the same prompt share its row: the language model reads it once.

    Args:
        processor: Makes every input.
        captions: Writes descriptions (`answer`) and prompts (`caption`).
        text_to_cell_ratio: Share of cells to generate; which ones is a hash of cell and epoch.
        prompts_per_epoch: Different prompts that cells of equal annotations are generated from in an epoch; by default
            each cell's prompt is drawn for itself.
        target_genes: Vocabulary ids of the genes that the corpus measured.
        max_genes: Longest cell; by default the processor's.
    """

    def __init__(
        self,
        processor: ScMMGPTProcessor,
        captions: CaptionSampler,
        *,
        text_to_cell_ratio: float = 0.5,
        prompts_per_epoch: int | None = None,
        target_genes: np.ndarray | None = None,
        max_genes: int | None = None,
    ) -> None:
        self.processor, self.captions = processor, captions
        self.text_to_cell_ratio, self.prompts_per_epoch = text_to_cell_ratio, prompts_per_epoch
        self.target_genes, self.max_genes = target_genes, max_genes

    def __call__(self, cells: Cells, obs: Mapping[str, np.ndarray], *, epoch: int = 0) -> dict[str, torch.Tensor]:
        """Inputs of [`ScMMGPTForConditionalGeneration`]: described cells first, then the distinct prompts."""
        generated = self.is_generated(cells.cell_ids, epoch)
        # Neither text is told about the cell's own genes: a prompt must not hint at its target.
        answers = self.captions.answer(rows_of(obs, ~generated), cell_ids=cells.cell_ids[~generated], epoch=epoch)
        targets = rows_of(obs, generated)
        drawn_for = self.prompt_ids(targets, cells.cell_ids[generated])
        captions = self.captions.caption(targets, cell_ids=drawn_for, epoch=epoch)
        prompts = {text: row for row, text in enumerate(dict.fromkeys(captions), start=len(answers))}
        batch = self.processor(
            text=[self.processor.render_prompt("describe")] * len(answers)
            + [self.processor.render_prompt("generate", text=prompt) for prompt in prompts],
            cells=cells[~generated] if answers else None,
            answers=answers + [""] * len(prompts),
            target_cells=cells[generated] if self.text_to_cell_ratio else None,
            target_rows=np.array([prompts[text] for text in captions], dtype=np.int64),
            target_genes=self.target_genes,
            epoch=epoch,
            max_genes=self.max_genes,
        )
        return dict(batch)

    def prompt_ids(self, obs: Mapping[str, np.ndarray], cell_ids: np.ndarray) -> np.ndarray:
        """uint64 `(n_cells,)`: what each prompt is drawn for, whatever the batch: the cell, or one of a few slots of
        all cells that are annotated alike.
        """
        if self.prompts_per_epoch is None:
            return cell_ids
        columns = [np.asarray(obs[name], dtype=object) for name in CAPTION_COLUMNS if name in obs]
        annotations = ["\0".join(map(str, values)) for values in zip(*columns, strict=True)]
        return hash_names(np.array(annotations, dtype=str)) + cell_ids % np.uint64(self.prompts_per_epoch)

    def is_generated(self, cell_ids: np.ndarray, epoch: int) -> np.ndarray:
        """Bool `(n_cells,)`: which cells are generated in this epoch."""
        names = np.char.add(np.asarray(cell_ids).astype(str), f"/{epoch}/{DIRECTION_SEED}")
        return hash_names(names) < np.uint64(self.text_to_cell_ratio * float(2**64 - 2**11))
