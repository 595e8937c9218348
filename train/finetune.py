"""Fine-tune for your own labelled cells, with many labels or few.

```
python -m scmmgpt.train finetune --adata cells.h5ad --label_key cell_type --group_key donor --output_dir DIR
python -m scmmgpt.train finetune --adata cells.h5ad --label_key cell_type --checkpoint ALIGNED --output_dir DIR
scmmgpt annotate new_cells.h5ad --model DIR --output annotated.h5ad
```

What is learned, in this order:

1. A **profile readout**: the square root of every gene's share of the cell, times one learned direction per gene,
   lands in the space that cells and texts share. The directions solve a multinomial logistic regression and are then
   turned so that a cell's products with the labels' texts are the regression's scores. A cell so becomes a mixture of
   the texts of the labels it resembles, which is why a label that was never trained, given as text, can still be
   answered. Why linear: with a few thousand labelled cells a regression on the whole transcriptome is hard to beat.
   Why the square root: it keeps the variance of counts even and gives every cell the same length (Hellinger
   distance). `python -m scmmgpt.eval finetuning` shows it beside a regression on log1p of counts per 10,000. The
   regression's strength is chosen on held-out cells; with a group key these are other donors or batches.
2. Gradient steps on the whole model (cell model, Q-Former, readout), which start from there and stop when the
   validation loss does. They are kept only if held-out cells say so.
3. The readout is solved once more with the held-out cells, at the strength that was chosen, and the temperature of
   `annotate` is the one that fits the held-out cells best (chosen before).

With `--shots` nothing is held out, and the strength is the default. Cells of the file that have no label help where
labels are few: see [`fit_spread_regression`]. From a checkpoint the readout adds to what its queries say, in the
proportion that fits held-out cells best; a new model has queries that begin by saying nothing.
`finetune.json` in the output says what was tried and what came out.
"""

import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix, diags, vstack
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedGroupKFold, StratifiedShuffleSplit
from sklearn.neighbors import kneighbors_graph
from torch.nn import functional as F
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy
from trl import TrlParser

from scmmgpt.cells_scmmgpt import Cells, hellinger_profile
from scmmgpt.genes_scmmgpt import GeneIndex
from scmmgpt.modeling_scmmgpt import CELL_INPUTS, MAX_LOGIT_SCALE, ScMMGPTForCellTextAlignment, cell_text_similarity
from scmmgpt.pipeline_scmmgpt import ScMMGPTPipeline
from scmmgpt.processing_scmmgpt import ScMMGPTProcessor
from scmmgpt.readers import read_file
from scmmgpt.reading_scmmgpt import choose_input, read_cells
from scmmgpt.train.align import build_model, build_processor, data_seed
from scmmgpt.train.arguments import FinetuneConfig, FinetuneDataArguments, FinetuneModelArguments
from scmmgpt.train.data import ontology
from scmmgpt.train.data.captions import CaptionSampler
from scmmgpt.train.data.gene_tables import build_gene_aliases, reference_gene_index
from scmmgpt.train.data.labelled import LabelledBatches
from scmmgpt.train.data.prepare import SPECIAL_TOKENS
from scmmgpt.train.trainer import ModelLossTrainer, freeze, save_run


logger = logging.getLogger(__name__)

PROFILE_SCALE = 100.0  # profiles have length 1; the regression sees sqrt(counts per 10k), whose length is 100
STRENGTHS = (0.001, 0.003, 0.01, 0.03)  # inverse L2 penalties that are tried, on that scale
MAX_ITERATIONS, TOLERANCE = 200, 1e-3
DEFAULT_STRENGTH = 0.01  # where nothing is held out
ONE_SHOT_STRENGTH = 0.0001  # with one cell of each label: what sets single cells apart is mostly noise
SPREAD = "spread"  # in place of a strength: `fit_spread_regression`
SPREAD_COMPONENTS, SPREAD_NEIGHBOURS, SPREAD_SHARE, SPREAD_STEPS = 20, 15, 0.5, 20
DEFAULT_TEMPERATURE = 0.1
BONUS_COMPONENTS, UNSEEN_BONUSES = 50, np.arange(0, 1.5, 0.02).round(2)
TEMPERATURES = 2.0 ** np.arange(-7, 1.25, 0.25)
READOUT_SHARES = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # of the readout, in lengths of what a checkpoint's queries say
REFERENCE_TEXTS = 400  # cell types of the ontology that the axes of a new text projection are computed from, at most
DEFAULT_EPOCHS = 3


# ---------------------------------------------------------------------------------------------------------------------
# Cells, labels and their texts
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class CellTable:
    """Cells in memory, with what `align` asks of a corpus: a vocabulary and all cells in turn."""

    vocabulary: dict[str, int]
    gene_aliases: dict
    cells: list[Cells] = field(default_factory=list)
    path: str = "of these files"

    def iter_cells(self, split: str = "train", columns=None) -> Iterator[tuple[Cells, None]]:
        """Every file's cells."""
        for cells in self.cells:
            yield cells, None


@dataclass
class Labels:
    """Labels of some rows of an AnnData.

    Args:
        rows: int64 `(n_labelled,)`: the rows that have a label.
        targets: int64 `(n_labelled,)`: positions in `names`.
        names: The labels, sorted.
        texts: What describes each.
        cl_ids: Label -> Cell Ontology id, where known.
    """

    rows: np.ndarray
    targets: np.ndarray
    names: list[str]
    texts: list[str]
    cl_ids: dict[str, str]


def column_of(obs, name: str) -> np.ndarray:
    """A column of `obs` as strings, `None` where nothing is known, object `(n_obs,)`."""
    if name not in obs:
        raise ValueError(f"obs has no column {name!r}; it has {', '.join(map(str, obs.columns))}.")
    values = np.asarray(obs[name], dtype=object)
    return np.array([None if ontology.is_missing(value) else str(value) for value in values], dtype=object)


def read_labels(obs, data_args: FinetuneDataArguments) -> Labels:
    """Labels of the cells, and the text of each: given, or name and definition in the Cell Ontology."""
    values = column_of(obs, data_args.label_key)
    rows = np.flatnonzero(values != None)  # noqa: E711 (elementwise)
    names, targets = np.unique(values[rows].astype(str), return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"obs[{data_args.label_key!r}] has {len(names)} labels; there is nothing to tell apart.")
    ids_key = data_args.ontology_key or f"{data_args.label_key}_ontology_term_id"
    ids = {}
    if data_args.ontology_key or ids_key in obs:
        of_cell = column_of(obs, ids_key)[rows]
        for number, name in enumerate(names):
            found = {value for value in of_cell[targets == number] if value}
            if len(found) == 1:
                ids[str(name)] = found.pop()
    given = {}
    if data_args.label_texts:
        given = json.loads(Path(data_args.label_texts).read_text(encoding="utf-8"))
        unknown = sorted(set(given) - set(names))
        if unknown:
            raise ValueError(f"{data_args.label_texts} describes {unknown[:5]}, which are no labels of these cells.")
    captions = CaptionSampler()
    texts = [given.get(name) or captions.label_text(name, ids.get(name)) for name in names]
    # Two labels may mean one term; their own names then tell them apart.
    texts = [f"{name}: {text}" if texts.count(text) > 1 else text for name, text in zip(names, texts, strict=True)]
    return Labels(rows, targets, [str(name) for name in names], texts, ids)


def hold_out(labels: Labels, groups: np.ndarray | None, data_args: FinetuneDataArguments, seed: int):
    """Positions in `labels.rows` to train on and to validate on; the latter are none with `shots`."""
    rng = np.random.default_rng(seed)
    everything = np.arange(len(labels.rows))
    if data_args.shots is not None:
        chosen = [
            rng.permutation(np.flatnonzero(labels.targets == label))[: data_args.shots]
            for label in range(len(labels.names))
        ]
        return np.sort(np.concatenate(chosen)), everything[:0]
    if groups is not None:
        groups = groups[labels.rows].astype(str)
        n_groups = len(np.unique(groups))
        if n_groups < 2:
            raise ValueError(
                f"obs[{data_args.group_key!r}] has one group, which cannot be in two parts; leave it out."
            )
        folds = StratifiedGroupKFold(
            min(n_groups, round(1 / data_args.validation_share)), shuffle=True, random_state=seed
        )
        return next(folds.split(everything, labels.targets, groups))
    # Labels with a single cell stay in training: none is left to be asked about.
    counts = np.bincount(labels.targets)
    common = everything[counts[labels.targets] > 1]
    n_validation = max(round(data_args.validation_share * len(common)), int((counts > 1).sum()))
    if len(common) < 2 * n_validation:
        raise ValueError(
            f"{len(everything)} labelled cells of {len(labels.names)} labels are too few to hold some out; "
            f"train on all of them with --shots {counts.max()}."
        )
    split = StratifiedShuffleSplit(1, test_size=n_validation, random_state=seed)
    _, held_out = next(split.split(common, labels.targets[common]))
    validation = np.sort(common[held_out])
    return np.setdiff1d(everything, validation), validation


def gene_vocabulary(adatas: list, read_options: dict) -> dict[str, int]:
    """A vocabulary of every gene that these files measure and that has an approved symbol."""
    reference = reference_gene_index()
    symbols = {i: symbol for symbol, i in reference.vocabulary.items()}
    found = set()
    for adata in adatas:
        ids = choose_input(adata, reference, **read_options).match.ids
        found |= {symbols[i] for i in ids[ids >= 0].tolist()}
    return {name: i for i, name in enumerate([*SPECIAL_TOKENS, *sorted(found)])}


# ---------------------------------------------------------------------------------------------------------------------
# The profile readout
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class LinearModel:
    """A multinomial logistic regression on profiles: scores are `profile @ weights.T + bias`.

    Args:
        weights: float64 `(n_labels, n_genes)`; of a label without a cell, the mean of the others' scores.
        bias: float64 `(n_labels,)`.
    """

    weights: np.ndarray
    bias: np.ndarray


def profile_matrix(cells: Cells, n_genes: int) -> csr_matrix:
    """Profiles as a sparse matrix `(n_cells, n_genes)`."""
    return csr_matrix((hellinger_profile(cells), cells.gene_ids, cells.indptr), shape=(len(cells), n_genes))


def fit_regressions(
    profiles: csr_matrix, targets: np.ndarray, n_labels: int, strengths: Sequence[float]
) -> Iterator[LinearModel]:
    """Solve the regression for ascending strengths (inverse L2 penalties), each starting from the one before."""
    model = LogisticRegression(warm_start=True, max_iter=MAX_ITERATIONS, tol=TOLERANCE)
    for strength in strengths:
        model.C = strength
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # stopping early is a penalty more
            model.fit(profiles * PROFILE_SCALE, targets)
        yield linear_model(model, n_labels)


def linear_model(
    regression: LogisticRegression, n_labels: int, axes: np.ndarray | None = None, mean: np.ndarray | None = None
) -> LinearModel:
    """A fitted regression on scaled profiles, or on their coordinates along `axes` around `mean`, as one on profiles.

    Args:
        regression: Fitted to `profiles * PROFILE_SCALE`, or to `(profiles - mean) @ axes.T * PROFILE_SCALE`.
        n_labels: How many labels there are, seen or not.
        axes: `(n_axes, n_genes)`.
        mean: `(n_genes,)`.
    """
    weights, bias = regression.coef_, regression.intercept_
    if len(weights) == 1:  # scikit-learn keeps one score for two classes
        weights, bias = np.concatenate([-weights, weights]) / 2, np.concatenate([-bias, bias]) / 2
    # Scores count only up to a constant: centred, a label that was not seen is neither likely nor unlikely.
    weights, bias = (weights - weights.mean(axis=0)) * PROFILE_SCALE, bias - bias.mean()
    if axes is not None:
        weights = weights @ axes
        bias = bias - weights @ mean
    all_weights, all_bias = np.zeros((n_labels, weights.shape[1])), np.zeros(n_labels)
    all_weights[regression.classes_], all_bias[regression.classes_] = weights, bias
    return LinearModel(all_weights, all_bias)


def fit_spread_regression(
    labelled: csr_matrix, targets: np.ndarray, unlabelled: csr_matrix, n_labels: int
) -> LinearModel:
    """A regression that also learns from cells without a label: how cells vary, and what their neighbours are called.

    All cells give the principal components that the regression reads, and a graph of neighbours along which the known
    labels spread (Zhou et al. 2004); every label is given the same weight in all. The regression is then fitted to
    every cell that a label reached. It gains where labels are few, and loses where all cells have one: see
    `train/LOG.md`.

    Args:
        labelled: Profiles `(n_labelled, n_genes)`.
        targets: int64 `(n_labelled,)`.
        unlabelled: Profiles `(n_unlabelled, n_genes)`.
        n_labels: How many labels there are.
    """
    profiles = vstack([labelled, unlabelled], format="csr")
    n_axes = min(SPREAD_COMPONENTS, min(profiles.shape) - 1)
    pca = PCA(n_axes, svd_solver="arpack", random_state=0)
    points = pca.fit_transform(profiles.astype(np.float64)) * PROFILE_SCALE
    graph = kneighbors_graph(points, min(SPREAD_NEIGHBOURS, len(points) - 1), mode="connectivity")
    graph = graph.maximum(graph.T)
    scale = diags(1 / np.sqrt(np.asarray(graph.sum(axis=1)).ravel()))
    graph = scale @ graph @ scale
    known = np.zeros((len(points), n_labels))
    known[np.arange(len(targets)), targets] = 1
    spread = known
    for _ in range(SPREAD_STEPS):
        spread = SPREAD_SHARE * (graph @ spread) + (1 - SPREAD_SHARE) * known
    spread = spread / np.maximum(spread.sum(axis=0), 1e-12)
    reached = spread.any(axis=1)
    answers = spread.argmax(axis=1)
    answers[: len(targets)] = targets
    model = LogisticRegression(C=DEFAULT_STRENGTH, max_iter=MAX_ITERATIONS, tol=TOLERANCE)
    model.fit(points[reached], answers[reached])
    return linear_model(model, n_labels, pca.components_, pca.mean_)


def negative_log_likelihood(scores: np.ndarray, targets: np.ndarray) -> float:
    """Mean over cells of -log softmax(scores)[target]."""
    return F.cross_entropy(torch.from_numpy(np.asarray(scores, dtype=np.float64)), torch.from_numpy(targets)).item()


def choose_regression(
    train: csr_matrix,
    train_targets: np.ndarray,
    validation: csr_matrix,
    validation_targets: np.ndarray,
    n_labels: int,
    unlabelled: csr_matrix,
) -> dict:
    """Validation loss by strength, over `STRENGTHS`, and of `SPREAD` where there are cells without a label.

    Each has its best temperature, as that is fitted later anyway.
    """
    models = zip(STRENGTHS, fit_regressions(train, train_targets, n_labels, STRENGTHS), strict=True)
    if unlabelled.shape[0]:
        models = [*models, (SPREAD, fit_spread_regression(train, train_targets, unlabelled, n_labels))]
    losses = {}
    for name, model in models:
        scores = validation @ model.weights.T + model.bias
        scores /= max(np.abs(scores).max(), 1e-9)  # the temperatures are made for cosines
        temperature = fit_temperature(scores, validation_targets)
        losses[name] = round(negative_log_likelihood(scores / temperature, validation_targets), 4)
        logger.info("Readout of strength %s: validation loss %.4f", name, losses[name])
    return losses


def readout_of(model: LinearModel, text_features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights `(n_genes, projection_dim)` and bias whose products with the texts are the regression's scores.

    The shortest such vectors lie in the span of the texts, which is what makes a cell a mixture of texts. With more
    labels than dimensions the scores are met in the least-squares sense.
    """
    to_text_space = torch.linalg.pinv(text_features.double(), rcond=1e-4).t().cpu()  # (n_labels, projection_dim)
    weights = torch.from_numpy(model.weights).t() @ to_text_space
    bias = torch.from_numpy(model.bias) @ to_text_space
    return weights.float(), bias.float()


def choose_unseen_bonus(
    train: csr_matrix,
    train_targets: np.ndarray,
    validation: csr_matrix,
    validation_targets: np.ndarray,
    text_features: torch.Tensor,
) -> float:
    """What to add to the similarity of a text that was not trained, so that it can be answered at all.

    Cells lie among the texts of trained labels, so any other text is hardly ever the nearest. Each label in turn is
    left out of the regression (here on principal components, for speed) and looked for by its text among all; chosen
    is the bonus with the best harmonic mean of the recall of what was left out and of the others, both means over the
    turns (calibrated stacking, Chao et al. 2016). With two labels there is nothing to leave out: 0.

    Args:
        train, validation: Profiles.
        train_targets, validation_targets: int64.
        text_features: `(n_labels, projection_dim)`.
    """
    n_labels = len(text_features)
    common = [label for label in range(n_labels) if (validation_targets == label).any()]
    if n_labels < 3 or len(common) < 2:
        return 0.0
    pca = PCA(min(BONUS_COMPONENTS, min(train.shape) - 1), svd_solver="arpack", random_state=0)
    train_points = csr_matrix(pca.fit_transform(train.astype(np.float64)))
    points = csr_matrix(pca.transform(validation.astype(np.float64)))
    texts = text_features.double().cpu()
    recalls = np.zeros((2, len(UNSEEN_BONUSES)))
    for label in common:
        others = np.delete(np.arange(n_labels), label)
        rows = train_targets != label
        model = next(fit_regressions(train_points[rows], train_targets[rows], n_labels, [DEFAULT_STRENGTH]))
        seen = LinearModel(model.weights[others], model.bias[others])
        weights, bias = readout_of(seen, texts[others])
        features = torch.from_numpy(points @ weights.double().numpy()) + bias
        similarity = (F.normalize(features, dim=-1) @ texts.t()).numpy()
        missing = validation_targets == label
        best_seen = others[similarity[:, others].argmax(axis=1)]
        right = best_seen == validation_targets
        gap = similarity[:, others].max(axis=1) - similarity[:, label]
        for number, bonus in enumerate(UNSEEN_BONUSES):
            recalls[0, number] += (gap[missing] < bonus).mean()
            recalls[1, number] += (right & (gap >= bonus))[~missing].mean()
    harmonic = recalls.prod(axis=0) / np.maximum(recalls.sum(axis=0), 1e-9)
    return float(UNSEEN_BONUSES[harmonic.argmax()])


@torch.no_grad()
def set_readout(model: ScMMGPTForCellTextAlignment, weights: torch.Tensor, bias: torch.Tensor, scale: float) -> None:
    """Write the readout's parameters, multiplied by `scale`."""
    model.profile_readout.gene_weights.weight.copy_(weights * scale)
    model.profile_readout.bias.copy_(bias * scale)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


class FinetuneTrainer(ModelLossTrainer):
    """Trainer of cell -> label, each label standing by its text."""

    eval_dataset: LabelledBatches

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Cross-entropy over the labels, from similarities at the temperature that the readout was given."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        outputs = model(**inputs, return_loss=False)
        scale = self.accelerator.unwrap_model(model).logit_scale.exp()
        logits = cell_text_similarity(outputs.cell_features, outputs.text_features).float() * scale
        loss = F.cross_entropy(logits, labels, label_smoothing=self.args.label_smoothing_factor)
        return (loss, outputs) if return_outputs else loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss, accuracy and macro-F1 on the validation cells; every rank reads all of them."""
        similarity = read_similarity(self.accelerator.unwrap_model(self.model), self.eval_dataset)
        scale = self.accelerator.unwrap_model(self.model).logit_scale.exp().item()
        scores = scores_of(similarity * scale, self.eval_dataset.targets.numpy())
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def scores_of(logits: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Loss, accuracy and macro-F1 of `(n_cells, n_labels)` logits."""
    predicted = logits.argmax(axis=1)
    return {
        "loss": round(negative_log_likelihood(logits, targets), 4),
        "accuracy": round(float((predicted == targets).mean()), 4),
        "macro_f1": round(float(f1_score(targets, predicted, average="macro", labels=np.unique(targets))), 4),
    }


@torch.no_grad()
def read_similarity(model: ScMMGPTForCellTextAlignment, batches: LabelledBatches) -> np.ndarray:
    """Cosine similarity of every cell with every label's text, `(n_cells, n_labels)`."""
    model.eval()
    device = model.logit_scale.device
    text_features = model.get_text_features(**{name: value.to(device) for name, value in batches.text_inputs.items()})
    rows = []
    for batch in batches:
        inputs = {k: v.to(device) for k, v in batch.items() if k != "labels" and not k.startswith("qformer_")}
        rows.append(cell_text_similarity(model.get_cell_features(**inputs), text_features))
    return torch.cat(rows).float().cpu().numpy()


def fit_temperature(similarity: np.ndarray, targets: np.ndarray) -> float:
    """The temperature whose softmax fits the labels best, of `TEMPERATURES`."""
    return float(min(TEMPERATURES, key=lambda t: negative_log_likelihood(similarity / t, targets)))


def set_temperature(model: ScMMGPTForCellTextAlignment, temperature: float) -> None:
    """Make `logit_scale` the temperature's inverse."""
    with torch.no_grad():
        model.logit_scale.fill_(min(-np.log(temperature), MAX_LOGIT_SCALE))


@torch.no_grad()
def begin_with_texts(model: ScMMGPTForCellTextAlignment, processor: ScMMGPTProcessor, texts: list[str]) -> None:
    """For a new model: the shared space is that of the BERT's texts, and queries begin by saying nothing.

    The text projection is centred on cell types of the ontology and turned to their principal axes, without stretching
    any: what BERT finds alike stays alike. The cell projection starts at 0, so cells are where the readout puts them.
    """
    captions = CaptionSampler()
    names = list(ontology.names_of("cell_type"))
    references = [captions.label_text(name) for name in names[:: max(1, len(names) // REFERENCE_TEXTS)]]
    states = []
    for start in range(0, len(references), 64):
        states.append(model.read_texts(**processor(qformer_text=references[start : start + 64])))
    states = torch.cat([*states, model.read_texts(**processor(qformer_text=texts))])
    mean = states.mean(dim=0)
    axes = torch.linalg.svd(states - mean, full_matrices=False)[2][: model.text_projection.out_features]
    model.text_projection.weight.zero_()
    model.text_projection.weight[: len(axes)] = axes
    model.text_projection.bias.copy_(-model.text_projection.weight @ mean)
    model.cell_projection.weight.zero_()
    model.cell_projection.bias.zero_()


def load_checkpoint(path: str):
    """A checkpoint with a profile readout, which starts at 0 where it had none, and its processor."""
    processor = ScMMGPTProcessor.from_pretrained(path)
    config = ScMMGPTForCellTextAlignment.config_class.from_pretrained(path)
    if (config.architectures or [""])[0] != "ScMMGPTForCellTextAlignment":
        raise ValueError(f"{path} holds a {config.architectures}; fine-tuning starts from a checkpoint of `align`.")
    config.profile_readout = True
    model, info = ScMMGPTForCellTextAlignment.from_pretrained(path, config=config, output_loading_info=True)
    missing = [key for key in info["missing_keys"] if not key.startswith("profile_readout.")]
    if missing or info["unexpected_keys"]:
        raise ValueError(f"{path} does not fit: missing {missing}, unexpected {sorted(info['unexpected_keys'])}.")
    return model, processor


@torch.no_grad()
def add_readout(model, readout, profiles: csr_matrix, eval_batches: LabelledBatches | None) -> float:
    """Set the readout and the temperature; returns what the readout was multiplied by.

    Queries that say something already (a checkpoint's) and the readout are added in the proportion that fits the
    held-out cells best, or in equal lengths without any. Where queries say nothing, no factor changes anything but 1.
    """
    model.eval()
    weights, bias = readout
    set_readout(model, weights, bias, 1.0)
    silent = not model.cell_projection.weight.any()
    length = float(np.linalg.norm(profiles @ weights.numpy() + bias.numpy(), axis=1).mean())
    if silent:
        candidates = [1 / length]
    else:
        unit = projected_length(model, eval_batches) / length if eval_batches is not None else 1 / length
        candidates = [unit * share for share in (READOUT_SHARES if eval_batches is not None else (1.0,))]
    best = None
    for scale in candidates:
        set_readout(model, weights, bias, scale)
        if eval_batches is None:
            set_temperature(model, DEFAULT_TEMPERATURE)
            return scale
        similarity, targets = read_similarity(model, eval_batches), eval_batches.targets.numpy()
        temperature = fit_temperature(similarity, targets)
        loss = negative_log_likelihood(similarity / temperature, targets)
        if best is None or loss < best[0]:
            best = loss, scale, temperature
    set_readout(model, weights, bias, best[1])
    set_temperature(model, best[2])
    return best[1]


def projected_length(model, batches: LabelledBatches) -> float:
    """Mean length of what the queries of the first batch's cells say in the shared space, before normalisation."""
    inputs = next(iter(batches))
    states = model.encode_cells(*(inputs[name] for name in CELL_INPUTS))
    queries = model.query_cells(states, inputs["cell_attention_mask"])
    return model.cell_projection(queries).norm(dim=-1).mean().item()


def take_gradient_steps(
    model: ScMMGPTForCellTextAlignment,
    processor: ScMMGPTProcessor,
    train_batches: LabelledBatches,
    eval_batches: LabelledBatches | None,
    training_args: FinetuneConfig,
    pretrained: set[str],
) -> list[dict]:
    """Train the whole model; the weights of the best epoch stay, which may be those before the first."""
    unused = (
        "cell_model.mvc_decoder.",
        "cell_model.expression_decoder.",
        "cell_model.embeddings.flag",
        "matching_head.",
    )
    freeze(model, lambda name: name.startswith(unused) or name == "logit_scale")
    callbacks = []
    if eval_batches is not None:
        training_args.eval_strategy = IntervalStrategy.EPOCH
        callbacks.append(KeepBest(model, training_args.patience))
    trainer = FinetuneTrainer(
        model=model,
        args=training_args,
        processing_class=processor,
        train_dataset=train_batches,
        eval_dataset=eval_batches,
        is_pretrained=pretrained.__contains__,
        callbacks=callbacks,
    )
    if eval_batches is not None:
        trainer.evaluate()
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    if eval_batches is not None:
        callbacks[0].restore()
    model.requires_grad_(True)
    return [line for line in trainer.state.log_history if "eval_loss" in line]


class KeepBest(TrainerCallback):
    """Remembers the weights with the lowest validation loss, the first ones included, and stops when none follow."""

    def __init__(self, model: torch.nn.Module, patience: int) -> None:
        self.model, self.patience = model, patience
        self.loss, self.waited = float("inf"), 0
        self.weights: dict[str, torch.Tensor] = {}

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Compare this loss with the best one."""
        assert metrics is not None
        if metrics["eval_loss"] < self.loss:
            self.loss, self.waited = metrics["eval_loss"], 0
            self.weights = {name: value.detach().cpu().clone() for name, value in self.model.state_dict().items()}
        else:
            self.waited += 1
            control.should_training_stop = self.waited >= self.patience

    def restore(self) -> None:
        """Put the best weights back."""
        self.model.load_state_dict(self.weights)


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def make_parser(prog: str | None = None) -> TrlParser:
    """The command line."""
    return TrlParser((FinetuneDataArguments, FinetuneModelArguments, FinetuneConfig), prog=prog, description=__doc__)


def main(data_args: FinetuneDataArguments, model_args: FinetuneModelArguments, training_args: FinetuneConfig) -> None:
    """Read, fit the readout, train, refit, save."""
    # --- Cells and labels
    torch.manual_seed(training_args.seed)
    seed = data_seed(training_args)
    read_options = {name: getattr(data_args, name) for name in ("layer", "assume", "gene_column", "organism")}
    adata = read_file(data_args.adata)
    labels = read_labels(adata.obs, data_args)
    groups = None if data_args.group_key is None else column_of(adata.obs, data_args.group_key)
    train, validation = hold_out(labels, groups, data_args, seed)
    unlabelled_rows = np.setdiff1d(np.arange(adata.n_obs), labels.rows)

    # --- Model
    if model_args.checkpoint is not None:
        if data_args.unlabelled:
            raise ValueError("Unlabelled files start a new model's gene embeddings; a checkpoint has its own.")
        model, processor = load_checkpoint(model_args.checkpoint)
        pretrained = {name for name, _ in model.named_parameters() if not name.startswith("profile_readout.")}
        all_cells, _ = processor.read_cells(adata, **read_options)
    else:
        unlabelled = [read_file(path) for path in data_args.unlabelled]
        vocabulary = gene_vocabulary([adata, *unlabelled], read_options)
        table = CellTable(vocabulary, build_gene_aliases(vocabulary))
        gene_index = GeneIndex(vocabulary, table.gene_aliases)
        all_cells, _ = read_cells(adata, gene_index, **read_options)
        # What is held out has no part in the gene embeddings either.
        table.cells = [
            all_cells[np.union1d(labels.rows[train], unlabelled_rows)],
            *(read_cells(a, gene_index, **read_options)[0] for a in unlabelled),
        ]
        model, qformer_tokenizer, pretrained = build_model(table, model_args, profile_readout=True)
        processor = build_processor(table, qformer_tokenizer, model_args, model_args.max_genes)
        begin_with_texts(model.eval(), processor, labels.texts)
    processor.feature_extractor.return_profile = True
    cells = all_cells[labels.rows]

    def batches(rows: np.ndarray, batch_size: int, **order) -> LabelledBatches:
        return LabelledBatches(
            processor, cells[rows], labels.targets[rows], labels.texts, batch_size=batch_size, **order
        )

    # --- The readout
    n_labels = len(labels.names)
    n_genes = len(processor.gene_tokenizer)
    profiles, unlabelled = profile_matrix(cells, n_genes), profile_matrix(all_cells[unlabelled_rows], n_genes)
    targets = labels.targets
    eval_batches = batches(validation, training_args.per_device_eval_batch_size) if len(validation) else None
    record = {"labels": dict(zip(labels.names, labels.texts, strict=True))}
    record["cells"] = {"train": len(train), "validation": len(validation), "unlabelled": len(unlabelled_rows)}
    if eval_batches is not None:
        record["readout_losses"] = choose_regression(
            profiles[train], targets[train], profiles[validation], targets[validation], n_labels, unlabelled
        )
        strength = min(record["readout_losses"], key=record["readout_losses"].get)
    elif len(unlabelled_rows) > len(train):
        strength = SPREAD
    else:
        strength = ONE_SHOT_STRENGTH if data_args.shots == 1 else DEFAULT_STRENGTH
    record["readout_strength"] = strength

    def fit_regression(rows: np.ndarray) -> LinearModel:
        if strength == SPREAD:
            return fit_spread_regression(profiles[rows], targets[rows], unlabelled, n_labels)
        return next(fit_regressions(profiles[rows], targets[rows], n_labels, [strength]))

    text_features = model.eval().get_text_features(**processor(qformer_text=labels.texts)).detach()
    first = readout_of(fit_regression(train), text_features)
    share = add_readout(model, first, profiles[train], eval_batches)
    record["readout_share"] = share

    # --- Gradient steps
    epochs = training_args.num_train_epochs
    if epochs is None:
        epochs = DEFAULT_EPOCHS if model_args.checkpoint is not None else 0
    if eval_batches is not None:
        record["before"] = scores_of(
            read_similarity(model, eval_batches) * model.logit_scale.exp().item(), eval_batches.targets.numpy()
        )
    if epochs > 0:
        training_args.num_train_epochs = epochs
        train_batches = batches(
            train,
            training_args.per_device_train_batch_size,
            seed=seed,
            rank=training_args.process_index,
            world_size=training_args.world_size,
        )
        record["epochs"] = take_gradient_steps(
            model, processor, train_batches, eval_batches, training_args, pretrained
        )

    # --- All labelled cells, temperature, checkpoint
    temperature = DEFAULT_TEMPERATURE
    if eval_batches is not None:
        similarity = read_similarity(model, eval_batches)
        temperature = fit_temperature(similarity, eval_batches.targets.numpy())
        record["after"] = scores_of(similarity / temperature, eval_batches.targets.numpy())
        everything = readout_of(fit_regression(np.arange(len(targets))), text_features)
        readout = model.profile_readout
        with torch.no_grad():  # what gradient steps added stays
            readout.gene_weights.weight.add_((everything[0] - first[0]) * share)
            readout.bias.add_((everything[1] - first[1]) * share)
    set_temperature(model, temperature)
    record["temperature"] = temperature
    bonus = 0.0
    if eval_batches is not None and not model.cell_projection.weight.any():  # cells lie where the readout puts them
        held_out = profiles[validation], targets[validation]
        bonus = choose_unseen_bonus(profiles[train], targets[train], *held_out, text_features)
    record["unseen_bonus"] = bonus
    if training_args.process_index == 0:
        model.config.annotation = {
            "labels": dict(zip(labels.names, labels.texts, strict=True)),
            "cl_ids": labels.cl_ids,
            "matching_weight": 0.0,  # the matching head is not trained here
            "matching_candidates": n_labels,
            "temperature": temperature,
            "unseen_bonus": bonus,
        }
        ScMMGPTPipeline(model, processor, device="cpu").save_pretrained(training_args.output_dir)
        save_run(training_args.output_dir, "finetune", data=data_args, model=model_args, training=training_args)
        text = json.dumps(record, indent=2)
        Path(training_args.output_dir, "finetune.json").write_text(text + "\n", encoding="utf-8")
    logger.info("Held-out scores: %s", record.get("after", "nothing was held out"))


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
