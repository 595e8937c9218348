"""Cells and their annotations -> inputs of the models, through [`ScMMGPTProcessor`]."""

from collections.abc import Mapping

import numpy as np
import torch

from scmmgpt.cells_scmmgpt import DIRECTION_SEED, Cells, hash_names
from scmmgpt.collator_scmmgpt import type_ids
from scmmgpt.feature_extraction_scmmgpt import mask_genes
from scmmgpt.processing_scmmgpt import ScMMGPTProcessor
from scmmgpt.train.data.captions import CAPTION_COLUMNS, CaptionSampler


def rows_of(obs: Mapping[str, np.ndarray], chosen: np.ndarray) -> dict[str, np.ndarray]:
    """The chosen rows of every column; `chosen` is bool `(n_cells,)`."""
    return {name: np.asarray(values, dtype=object)[chosen] for name, values in obs.items()}


class AlignmentCollator:
    """Batches of stage 1: cells, one caption per cell, and ids that captions of the same meaning share.

    Args:
        mask_ratio: Share of genes to hide for the masked-expression loss; `None` leaves that loss out.
        mask_value: Value of hidden genes, `ScGPTConfig.mask_value`.
        paired: Whether the only positive of a cell is its own caption, as published; otherwise every caption of the
            same meaning is a positive.
    """

    def __init__(
        self,
        processor: ScMMGPTProcessor,
        captions: CaptionSampler,
        *,
        mask_ratio: float | None = None,
        mask_value: float = -1.0,
        paired: bool = False,
    ) -> None:
        self.processor, self.captions, self.paired = processor, captions, paired
        self.mask_ratio, self.mask_value = mask_ratio, mask_value
        self.gene_symbols = processor.gene_symbols(range(len(processor.gene_tokenizer)))

    def __call__(self, cells: Cells, obs: Mapping[str, np.ndarray], *, epoch: int = 0) -> dict[str, torch.Tensor]:
        """Inputs of [`ScMMGPTForCellTextAlignment`]."""
        texts = self.captions.caption(obs, cells, self.gene_symbols, epoch=epoch)
        batch = dict(self.processor(cells=cells, qformer_text=texts, epoch=epoch))
        batch["text_ids"] = torch.arange(len(texts)) if self.paired else type_ids(obs, texts)
        if self.mask_ratio is not None:
            extractor = self.processor.feature_extractor
            genes = batch["gene_ids"], batch["cell_attention_mask"], cells.cell_ids
            hidden = mask_genes(*genes, self.mask_ratio, seed=extractor.seed, epoch=epoch)
            batch["expression_labels"] = batch["expression"].masked_fill(~hidden, -100)
            batch["masked_expression"] = batch["expression"].masked_fill(hidden, self.mask_value)
        return batch


class TuningCollator:
    """Batches of stage 2: every cell is either described (cell -> text) or generated (text -> cell).

    Target cells with the same prompt share one row of `input_ids`, so the language model encodes the prompt once.

    Args:
        captions: Draws descriptions (`answer`) and prompts (`caption`).
        text_to_cell_ratio: Share of cells to generate; they are chosen by a hash of cell and epoch.
        prompts_per_epoch: Number of prompts in an epoch for all cells with equal annotations; by default a prompt is
            drawn for each cell.
        target_genes: Vocabulary ids of the genes that the corpus measured.
    """

    def __init__(
        self,
        processor: ScMMGPTProcessor,
        captions: CaptionSampler,
        *,
        text_to_cell_ratio: float = 0.5,
        prompts_per_epoch: int | None = None,
        target_genes: np.ndarray | None = None,
    ) -> None:
        self.processor, self.captions = processor, captions
        self.text_to_cell_ratio, self.prompts_per_epoch = text_to_cell_ratio, prompts_per_epoch
        self.target_genes = target_genes
        self.gene_symbols = processor.gene_symbols(range(len(processor.gene_tokenizer)))

    def __call__(self, cells: Cells, obs: Mapping[str, np.ndarray], *, epoch: int = 0) -> dict[str, torch.Tensor]:
        """Inputs of [`ScMMGPTForConditionalGeneration`]: described cells first, then the distinct prompts."""
        generated = self.is_generated(cells.cell_ids, epoch)
        answers = self.captions.answer(rows_of(obs, ~generated), cells[~generated], self.gene_symbols, epoch=epoch)
        # Captions without `cells` name no marker genes: a prompt must not give its target away.
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
        )
        return dict(batch)

    def prompt_ids(self, obs: Mapping[str, np.ndarray], cell_ids: np.ndarray) -> np.ndarray:
        """Id that seeds the draw of each cell's prompt, uint64 `(n_cells,)`.

        The id is the cell's own, or one of `prompts_per_epoch` ids that all cells with equal annotations share.
        """
        if self.prompts_per_epoch is None:
            return cell_ids
        columns = [np.asarray(obs[name], dtype=object) for name in CAPTION_COLUMNS if name in obs]
        annotations = ["\0".join(map(str, values)) for values in zip(*columns, strict=True)]
        return hash_names(np.array(annotations, dtype=str)) + cell_ids % np.uint64(self.prompts_per_epoch)

    def is_generated(self, cell_ids: np.ndarray, epoch: int) -> np.ndarray:
        """Whether each cell is generated in this epoch, bool `(n_cells,)`; other cells are described."""
        names = np.char.add(np.asarray(cell_ids).astype(str), f"/{epoch}/{DIRECTION_SEED}")
        return hash_names(names) < np.uint64(self.text_to_cell_ratio * float(2**64 - 2**11))
