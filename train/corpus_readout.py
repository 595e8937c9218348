"""The linear readout of cell types that stage 1 gives to a model: annotation starts where the closed form ends.

A regression on the profiles of training cells takes seconds, while contrast and matching learn from noise on a few
hundred cells. `annotate` and `calibrate` use the scores of the readout for the cell types of training, mixed with
those of matching. Search, retrieval and other labels use the shared space as before.
"""

import logging

import numpy as np
import torch
from scipy.sparse import csr_matrix, vstack

from scmmgpt.modeling_scmmgpt import ScMMGPTForCellTextAlignment
from scmmgpt.train import readout
from scmmgpt.train.data.captions import CaptionSampler
from scmmgpt.train.data.corpus import Corpus


logger = logging.getLogger(__name__)

MAX_CELLS = 20_000  # of a split: the regression takes a minute or two
LABEL_COLUMNS = ("cell_type", "cell_type_ontology_term_id")


def fit_corpus_readout(
    model: ScMMGPTForCellTextAlignment, corpus: Corpus, *, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Fit `model.label_readout` to the cell types of the training split.

    The validation split chooses penalty and temperature; its cells are not in the regression. A corpus with fewer than
    two cell types leaves the model as it is.

    Returns:
        `validation`: `loss`, `accuracy` and `macro_f1` on the validation split; empty if there is none.
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


def codes_of(names: list[str | None], labels: list[str]) -> np.ndarray:
    """Positions of names among the labels, int64; -1 for other names and none."""
    position = {label: code for code, label in enumerate(labels)}
    return np.array([-1 if name is None else position.get(name, -1) for name in names], dtype=np.int64)
