"""Fit the linear readout of cell types that is part of a stage-1 model.

A regression on the profiles of training cells takes seconds, and needs far fewer cells than the contrastive and
matching losses. `annotate` and `calibrate` mix the scores of the readout with the matching scores for the cell types
of training.

Each label also has a place: a vector in the shared space of cells and texts. The embedding of a cell is the
probability-weighted mean of the places, plus the output of the network. A text about a label lies near the place of
the label. Search and embeddings use these places.
"""

import logging
from collections.abc import Sequence

import numpy as np
import torch
from scipy.sparse import csr_matrix, vstack
from torch.nn import functional as F

from scmmgpt.modeling_scmmgpt import CELL_INPUTS, ScMMGPTForCellTextAlignment, cell_text_similarity
from scmmgpt.processing_scmmgpt import ScMMGPTProcessor
from scmmgpt.scoring_scmmgpt import encode_texts
from scmmgpt.train import readout
from scmmgpt.train.data.captions import CaptionSampler
from scmmgpt.train.data.corpus import Corpus


logger = logging.getLogger(__name__)

PLACE_CELLS = 1_000  # cells whose captions fit the places (training split) and choose their weight (validation split)
PLACE_EPOCHS = 4  # epochs of captions for the fit of the places
SPREAD = 0.5  # power of the singular values of the labels' places: 1 keeps the places, 0 makes them orthogonal
TEXT_PENALTY = 0.01  # ridge penalty of the regression to places, relative to the mean square of the text states
PLACE_SHARES = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # candidate lengths of a place / length of network output
CELLS_AT_ONCE = 64
MAX_CELLS = 20_000  # most cells of a split, for which the regression takes a minute or two
LABEL_COLUMNS = ("cell_type", "cell_type_ontology_term_id")


def fit_corpus_readout(
    model: ScMMGPTForCellTextAlignment, corpus: Corpus, *, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Fit `model.label_readout` to the cell types of the training split.

    The validation split chooses penalty and temperature; its cells are not in the regression. Without two cell types,
    the model is not changed. The scores are `{"validation": {"loss", "accuracy", "macro_f1"}}`, empty without such a
    split.
    """
    cells, table = corpus.sample("train", MAX_CELLS, LABEL_COLUMNS, seed=seed)
    pairs = {name: term for name, term in zip(*table.to_pydict().values(), strict=True) if name}
    labels, sampler = sorted(pairs), CaptionSampler()
    if len(labels) < 2:
        return {}
    texts = [sampler.label_text(name, pairs[name]) for name in labels]
    vocab_size = model.config.cell_config.vocab_size
    profiles, targets = [readout.profile_matrix(cells, vocab_size)], [codes_of(table.column(0).to_pylist(), labels)]
    if "validation" in corpus.split_names:
        cells, table = corpus.sample("validation", MAX_CELLS, LABEL_COLUMNS, seed=seed)
        profiles.append(readout.profile_matrix(cells, vocab_size))
        targets.append(codes_of(table.column(0).to_pylist(), labels))
    known = [codes >= 0 for codes in targets]
    profiles = [rows[kept] for rows, kept in zip(profiles, known, strict=True)]
    targets = [codes[kept] for codes, kept in zip(targets, known, strict=True)]

    both, n_train = vstack(profiles, format="csr"), len(targets[0])
    own, held_out = np.split(np.arange(both.shape[0]), [n_train])
    nothing = csr_matrix((0, vocab_size), dtype=np.float32)
    data = readout.LabelledProfiles(both, np.concatenate(targets), len(labels), own, held_out, nothing)
    regression, temperature, scores = readout.fit_regressions(data).train, 1.0, {}
    if len(held_out):
        logits = regression.scores(profiles[1])
        temperature = readout.fit_temperature_of_scores(logits, targets[1])
        scores["validation"] = readout.scores_of(logits / temperature, targets[1])
        logger.info("The readout of cell types on the validation split: %s", scores["validation"])
    of_training = readout.LabelledProfiles(profiles[0], targets[0], len(labels), own, held_out[:0], nothing)
    model.label_readout = readout.fit_label_readout(of_training, regression, temperature, seed)
    model.config.label_readout = {"texts": texts, "labels": labels, **model.label_readout.sizes()}
    model.label_readout.to(torch.device(model.logit_scale.device))
    return scores


def place_labels(model: ScMMGPTForCellTextAlignment, processor: ScMMGPTProcessor, weight: float = 1.0) -> None:
    """Place each label of the readout at the embedding of its text, scaled to length `weight`.

    The processor then returns whole profiles, the input of the readout. Without a readout, nothing changes.
    """
    if (readout := model.config.label_readout) is None:
        return
    features = encode_texts(model, processor, readout["texts"])
    model.label_readout.set_features(weight * features)
    model.config.label_readout = {**readout, "feature_width": features.shape[1]}
    processor.feature_extractor.return_profile = True


@torch.no_grad()
def set_apart(
    model: ScMMGPTForCellTextAlignment, processor: ScMMGPTProcessor, corpus: Corpus, captions: CaptionSampler
) -> None:
    """Spread the places of the labels, and fit the text projection to the new places.

    After contrastive training, texts of similar cell types, such as subtypes of T cells, have similar embeddings. A
    caption may then be as near to another label as to its own. `SPREAD` flattens the singular values of the places. A
    ridge regression from text states to the remaining difference, over captions of training cells and texts of labels,
    updates the text projection.
    """
    if (readout := model.config.label_readout) is None:
        return
    labels, cells, table = readout["labels"], *corpus.sample("train", PLACE_CELLS)
    obs = {name: np.array(values, dtype=object) for name, values in table.to_pydict().items()}
    pairs = set(zip(readout["texts"], range(len(labels)), strict=True))
    for epoch in range(PLACE_EPOCHS):
        texts = captions.caption(obs, cell_ids=cells.cell_ids, epoch=epoch)
        pairs |= {
            pair for pair in zip(texts, codes_of(obs["cell_type"], labels).tolist(), strict=True) if pair[1] >= 0
        }
    ordered = sorted(pairs)
    codes = torch.tensor([code for _, code in ordered], device=model.device)
    states = encode_texts(model, processor, [text for text, _ in ordered], projected=False).float()
    projection = model.text_projection
    projected = projection(states).float()
    left, spread, right = torch.linalg.svd(model.label_readout.features.float(), full_matrices=False)
    places = F.normalize(left * (spread / spread[0]) ** SPREAD @ right, dim=-1)
    residuals = places[codes] * projected.norm(dim=-1, keepdim=True) - projected
    rows = F.pad(states, (0, 1), value=1.0)
    weighted = rows / torch.bincount(codes)[codes, None]  # every label has the same weight
    squares = weighted.T @ rows
    squares.diagonal().add_(TEXT_PENALTY * squares.diagonal().mean())
    update = torch.linalg.solve(squares, weighted.T @ residuals)
    projection.weight.add_(update[:-1].T)
    projection.bias.add_(update[-1])
    model.label_readout.set_features(places)


@torch.no_grad()
def choose_places(
    model: ScMMGPTForCellTextAlignment, processor: ScMMGPTProcessor, corpus: Corpus, captions: CaptionSampler
) -> dict[float, float]:
    """Place the labels again with the trained text branch, spread them (see [`set_apart`]), and choose their weight.

    The weight is the smallest whose retrieval loss on validation captions is within one standard error of the best. A
    small weight is preferred, because the network's output is the only information about a cell of unknown type.

    Returns:
        Weight -> mean cross-entropy of a cell's own caption among the captions of all sampled cells, at the best
        temperature; empty without readout or validation split.
    """
    if model.config.label_readout is None:
        return {}
    place_labels(model, processor)
    set_apart(model, processor, corpus, captions)
    if "validation" not in corpus.split_names:
        return {}
    cells, table = corpus.sample("validation", PLACE_CELLS)
    obs = {name: np.array(values, dtype=object) for name, values in table.to_pydict().items()}
    texts, own = np.unique(captions.caption(obs, cell_ids=cells.cell_ids), return_inverse=True)
    text_features, pieces = encode_texts(model, processor, texts.tolist()), []
    for start in range(0, len(cells), CELLS_AT_ONCE):
        inputs = processor(cells=cells[start : start + CELLS_AT_ONCE]).to(model.device)
        states = model.encode_cells(*(inputs[name] for name in CELL_INPUTS))
        queries = model.query_cells(states, inputs["cell_attention_mask"]) - model.query_means
        scores = model.label_readout(inputs["profile_gene_ids"], inputs["profile"])
        pieces.append((model.cell_projection(queries), model.label_readout.place(scores)))
    added, places = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    unit, of_cells = (added.norm(dim=-1).mean() / places.norm(dim=-1).mean()).item(), {}
    for share in PLACE_SHARES:
        weight = share * unit
        features = F.normalize(added + weight * places[:, None], dim=-1)
        similarity = cell_text_similarity(features, text_features).cpu().numpy()
        logits = similarity / readout.best_temperature(similarity, own)
        of_cells[weight] = readout.losses_of_cells(logits, own)
    losses = {weight: float(of_weight.mean()) for weight, of_weight in of_cells.items()}
    best = of_cells[min(losses, key=lambda weight: losses[weight])]
    worse = {weight: of_weight - best for weight, of_weight in of_cells.items()}
    as_good = [weight for weight, of_each in worse.items() if of_each.mean() <= of_each.std() / np.sqrt(len(best))]
    model.label_readout.features.mul_(min(as_good))
    logger.info("Loss of captions of validation cells by the weight of the labels' places: %s", losses)
    return losses


def codes_of(names: Sequence[str | None] | np.ndarray, labels: list[str]) -> np.ndarray:
    """Positions of names in `labels`, int64 `(n_names,)`; -1 for None and for names that are not labels."""
    position = {label: code for code, label in enumerate(labels)}
    return np.array([-1 if name is None else position.get(name, -1) for name in names], dtype=np.int64)
