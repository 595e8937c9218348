"""Scores of labels for a batch of cells: similarity with texts, matching, label readout and novelty."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .cells_scmmgpt import Cells
from .modeling_scmmgpt import ScMMGPTBridgeModel, cell_text_similarity
from .processing_scmmgpt import ScMMGPTProcessor
from .readout_scmmgpt import PanelReadout
from .unseen_scmmgpt import TextScores


TEXTS_AT_ONCE = 256


def encode_texts(
    bridge: ScMMGPTBridgeModel, processor: ScMMGPTProcessor, texts: Sequence[str], *, projected: bool = True
) -> Tensor:
    """Features of texts in the shared space, `(n_texts, projection_dim)`, L2-normalised.

    With `projected=False`, the states before the projection, `(n_texts, hidden_size)`.
    """
    inputs = processor(qformer_text=list(texts)).to(bridge.device)
    with torch.inference_mode():
        ids, mask = inputs["qformer_input_ids"], inputs["qformer_attention_mask"]
        batches = zip(ids.split(TEXTS_AT_ONCE), mask.split(TEXTS_AT_ONCE), strict=True)
        outputs = [bridge.get_text_features(*batch, return_dict=True) for batch in batches]
        return torch.cat([of.pooler_output if projected else of.last_hidden_state for of in outputs])


def text_states(bridge: ScMMGPTBridgeModel, processor: ScMMGPTProcessor, texts: Sequence[str]) -> np.ndarray:
    """States of texts before the projection, float64 `(n_texts, hidden_size)`, L2-normalised.

    Before the projection, texts keep distinctions that no training cell shows. Texts of similar length share a batch.
    """
    order = np.argsort([len(text) for text in texts], kind="stable")
    pieces = [order[start : start + TEXTS_AT_ONCE] for start in range(0, len(order), TEXTS_AT_ONCE)]
    states = np.zeros((len(texts), bridge.config.qformer_config.hidden_size))
    for rows in pieces:
        inputs = processor(qformer_text=[texts[row] for row in rows]).to(bridge.device)
        with torch.inference_mode():
            features = bridge.get_text_features(**inputs, return_dict=True).last_hidden_state
        states[rows] = torch.nn.functional.normalize(features.cpu().double(), dim=-1).numpy()
    return states


def mean_similarity(
    bridge: ScMMGPTBridgeModel,
    processor: ScMMGPTProcessor,
    texts: Sequence[str],
    trained: Sequence[str],
    panel: PanelReadout,
) -> Callable[[Cells], np.ndarray]:
    """A function of cells: expected similarity of each text with the text of the cell's label.

    The expectation is over the label probabilities of the readout. A cosine with the features of a cell would lose how
    certain a label is, as the features are normalised.

    Args:
        bridge, processor: The checkpoint.
        texts: The search texts.
        trained: Texts of the labels of the readout.
        panel: The readout for the genes of the file.

    Returns:
        Cells -> float32 `(n_cells, n_texts)`.
    """
    similarity = text_states(bridge, processor, trained) @ text_states(bridge, processor, texts).T

    def score(cells: Cells) -> np.ndarray:
        return (np.exp(panel(cells).astype(np.float64)) @ similarity).astype(np.float32)

    return score


class LabelScorer:
    """Similarity of cells with texts; matching and novelty, if requested.

    With a readout, the similarity is `readout_temperature * (log probability + similarity_weight * cosine)`.
    `label_probabilities` divides by the temperature that the user or `calibrate` chose. The transformer does not run
    if `similarity_weight` is 0 and there is no matching.

    Args:
        bridge, processor: The checkpoint.
        texts: The texts of the labels.
        settings: `readout_temperature`, `matching_weight` (0 for no matching) and `matching_candidates`.
        similarity_weight: Weight of the cosine beside the readout, chosen by `finetune`.
        readout: Scores of the texts by the label readout, for the genes of the file.
        novelty_of: Cells -> novelty, float32 `(n_cells,)` or `(n_cells, n_columns)`.
    """

    def __init__(
        self,
        bridge: ScMMGPTBridgeModel,
        processor: ScMMGPTProcessor,
        texts: list[str],
        settings: dict[str, Any],
        similarity_weight: float = 0.0,
        readout: TextScores | None = None,
        novelty_of: Callable[[Cells], np.ndarray] | None = None,
    ) -> None:
        self.bridge, self.processor, self.readout, self.novelty_of = bridge, processor, readout, novelty_of
        self.readout_temperature, self.similarity_weight = settings["readout_temperature"], similarity_weight
        self.num_candidates = min(settings["matching_candidates"], len(texts)) if settings["matching_weight"] else 0
        self.readout_alone = readout is not None and not similarity_weight and not settings["matching_weight"]
        if not self.readout_alone:
            self.text_inputs = processor(qformer_text=texts).to(bridge.device)
            self.text_features = encode_texts(bridge, processor, texts)

    def __call__(self, cells: Cells) -> tuple[Tensor, ...]:
        """Similarity and matching, `(n_cells, n_texts)`, and novelty of a batch of cells.

        Matching is NaN for texts that are no candidates. Results that are not computed are left out; see [`name`].
        """
        # Novelty comes second: it reuses the scores that the readout has cached for these cells.
        from_readout = None if self.readout is None else torch.from_numpy(self.readout(cells))
        novelty = () if self.novelty_of is None else (torch.from_numpy(self.novelty_of(cells)),)
        if from_readout is not None and self.readout_alone:
            return (self.readout_temperature * from_readout, *novelty)
        inputs = self.processor(cells=cells).to(self.bridge.device)
        similarity = cell_text_similarity(self.bridge.get_cell_features(**inputs), self.text_features)
        if from_readout is not None:
            scores = from_readout.to(similarity)
            similarity = self.readout_temperature * (scores + self.similarity_weight * similarity)
        if not self.num_candidates:
            return (similarity, *novelty)
        best = similarity.topk(self.num_candidates, dim=1).indices
        rows = torch.arange(len(best), device=best.device).repeat_interleave(self.num_candidates)
        pairs = torch.stack([rows, best.flatten()], dim=1)
        match = torch.full_like(similarity, torch.nan)
        match[pairs[:, 0], pairs[:, 1]] = self.bridge.match(**inputs, **self.text_inputs, pairs=pairs).to(match)
        return (similarity, match, *novelty)

    def name(self, scores: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """Similarity, matching and novelty from the joined results of all calls; None for what is not computed."""
        return (
            scores[0],
            scores[1] if self.num_candidates else None,
            None if self.novelty_of is None else scores[-1],
        )
