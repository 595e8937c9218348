"""Fine-tune for your own labelled cells, with many labels or few.

```
python -m scmmgpt.train finetune --adata cells.h5ad --label_key cell_type --group_key donor --output_dir DIR
python -m scmmgpt.train finetune --adata cells.h5ad --label_key cell_type --checkpoint ALIGNED --output_dir DIR
scmmgpt annotate new_cells.h5ad --model DIR --output annotated.h5ad
```

Three steps:

1. **Fit the profile readout** (`readout`). A multinomial logistic regression reads the square root of every gene's
   share of the cell, and its weights are turned into the space that cells and texts share: a cell becomes a mixture
   of the texts of the labels that it resembles. So a label that was never trained can be given as a text. The model
   is linear because a regression on the whole transcriptome is hard to beat with a few thousand labelled cells. The
   square root keeps the variance of counts even and gives every cell the same length (Hellinger distance). Held-out
   cells choose the strength of the regression; with `--group_key` these are cells of other donors or batches.
2. **Take gradient steps** on the whole model: cell model, Q-Former, readout. Training stops when the validation loss
   stops to fall, and the weights with the lowest one stay, which may be those of step 1.
3. **Refit the readout** with the held-out cells, at the same strength. The temperature of `annotate` is the one that
   fits the held-out cells best, and was chosen before the refit.

The cell projection of a new model starts at zero, so its queries contribute nothing and cells lie where the readout
puts them; no gradient step is taken by default. From a checkpoint the readout is added to the projected queries, in
the proportion that fits the held-out cells best. With `--shots` nothing is held out, and the strength is the default.
Cells without a label help where labels are few: see `readout.fit_spread_regression`. `finetune.json` in the output
records what was tried and how it scored.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from scmmgpt.cells_scmmgpt import Cells
from scmmgpt.files import write_json
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
from scmmgpt.train.data.corpus import SPECIAL_TOKENS, Corpus
from scmmgpt.train.data.gene_tables import build_gene_aliases, reference_gene_index
from scmmgpt.train.labels import Labels, column_of, hold_out, read_labels
from scmmgpt.train.options import OptionParser
from scmmgpt.train.readout import (
    LabelledProfiles,
    choose_unseen_bonus,
    fit_regressions,
    fit_temperature,
    negative_log_likelihood,
    profile_matrix,
    readout_of,
    scores_of,
)
from scmmgpt.train.trainer import ModelLossTrainer, freeze, save_run


logger = logging.getLogger(__name__)

DEFAULT_TEMPERATURE = 0.1  # where nothing is held out
READOUT_SHARES = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # lengths of the readout, in those of a checkpoint's queries
REFERENCE_TEXTS = 400  # cell types of the ontology that the axes of a new text projection are computed from, at most
DEFAULT_EPOCHS = 3  # from a checkpoint


@dataclass
class CellTable:
    """Cells in memory, with what `build_model` asks of a corpus: a vocabulary and all cells in turn."""

    vocabulary: dict[str, int]
    gene_aliases: dict[str, str]
    cells: list[Cells] = field(default_factory=list)
    path: str = "of these files"

    def row_groups(self, split: str = "train", columns: list[str] | None = None) -> Iterator[tuple[Cells, None]]:
        """Every file's cells."""
        for cells in self.cells:
            yield cells, None


def gene_vocabulary(adatas: list, read_options: dict[str, Any]) -> dict[str, int]:
    """A vocabulary of every gene that these files measure and that has an approved symbol."""
    reference = reference_gene_index()
    symbols = {i: symbol for symbol, i in reference.vocabulary.items()}
    found: set[str] = set()
    for adata in adatas:
        ids = choose_input(adata, reference, **read_options).match.ids
        found |= {symbols[i] for i in ids[ids >= 0].tolist()}
    return {name: i for i, name in enumerate([*SPECIAL_TOKENS, *sorted(found)])}


Start: TypeAlias = tuple[ScMMGPTForCellTextAlignment, ScMMGPTProcessor, set[str], Cells]  # see `load_checkpoint`


def load_checkpoint(path: str, adata: Any, read_options: dict[str, Any]) -> Start:
    """A checkpoint to fine-tune, with a profile readout of zeros if it had none.

    Returns:
        The model, its processor, the names of its pretrained parameters, and the cells of `adata` in its vocabulary.
    """
    processor = ScMMGPTProcessor.from_pretrained(path)
    config = ScMMGPTForCellTextAlignment.config_class.from_pretrained(path)
    if (config.architectures or [""])[0] != "ScMMGPTForCellTextAlignment":
        raise ValueError(f"{path} holds a {config.architectures}; fine-tuning starts from a checkpoint of `align`.")
    config.profile_readout = True
    loaded: Any = ScMMGPTForCellTextAlignment.from_pretrained(path, config=config, output_loading_info=True)
    model, info = loaded
    missing = [key for key in info["missing_keys"] if not key.startswith("profile_readout.")]
    if missing or info["unexpected_keys"]:
        raise ValueError(f"{path} does not fit: missing {missing}, unexpected {sorted(info['unexpected_keys'])}.")
    pretrained = {name for name, _ in model.named_parameters() if not name.startswith("profile_readout.")}
    return model, processor, pretrained, processor.read_cells(adata, **read_options)[0]


def new_model(
    adata: Any, others: list, rows: np.ndarray, model_args: FinetuneModelArguments, read_options: dict[str, Any]
) -> Start:
    """A new model of the genes that these files measure; returns what `load_checkpoint` does.

    Args:
        adata: The labelled cells.
        others: Files of unlabelled cells.
        rows: Rows of `adata` that are not held out: what is held out has no part in the gene embeddings either.
        model_args: Sizes, and where the parts come from.
        read_options: For `read_cells`.
    """
    vocabulary = gene_vocabulary([adata, *others], read_options)
    table = CellTable(vocabulary, build_gene_aliases(vocabulary))
    gene_index = GeneIndex(vocabulary, table.gene_aliases)
    cells, *more = (read_cells(each, gene_index, **read_options)[0] for each in (adata, *others))
    table.cells = [cells[rows], *more]
    corpus = cast(Corpus, table)
    model, qformer_tokenizer, pretrained = build_model(corpus, model_args, profile_readout=True)
    return model, build_processor(corpus, qformer_tokenizer, model_args, model_args.max_genes), pretrained, cells


@torch.no_grad()
def begin_with_texts(model: ScMMGPTForCellTextAlignment, processor: ScMMGPTProcessor, texts: list[str]) -> None:
    """Make the shared space of a new model that of the BERT's texts, and set the cell projection to zero.

    The text projection is centred on cell types of the ontology and turned to their principal axes, without stretching
    any: texts that BERT finds alike stay alike. Queries contribute nothing, so cells are where the readout puts them.
    """
    captions = CaptionSampler()
    names = list(ontology.names_of("cell_type"))
    references = [captions.label_text(name) for name in names[:: max(1, len(names) // REFERENCE_TEXTS)]]
    pieces = [references[start : start + 64] for start in range(0, len(references), 64)]
    states = torch.cat([model.read_texts(**processor(qformer_text=piece)) for piece in [*pieces, texts]])
    mean = states.mean(dim=0)
    axes = torch.linalg.svd(states - mean, full_matrices=False)[2][: model.text_projection.out_features]
    model.text_projection.weight.zero_()
    model.text_projection.weight[: len(axes)] = axes
    model.text_projection.bias.copy_(-model.text_projection.weight @ mean)
    model.cell_projection.weight.zero_()
    model.cell_projection.bias.zero_()


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


class LabelledBatches(Dataset):
    """Batches of labelled cells by their number within the epoch; every batch also holds the texts of all labels.

    Args:
        processor: Makes every input.
        cells: The cells.
        targets: int64 `(n_cells,)`.
        texts: Of all labels.
        batch_size: Cells per batch.
        seed: Of the order, which is another one in every epoch; `None` keeps the cells in theirs.
        rank, world_size: This process, of how many.
    """

    def __init__(self, processor, cells, targets, texts, *, batch_size, seed=None, rank=0, world_size=1):
        self.processor, self.cells, self.targets = processor, cells, torch.from_numpy(targets)
        self.text_inputs = dict(processor(qformer_text=list(texts)))
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.set_epoch(0)

    def __len__(self) -> int:
        per_rank = -(-len(self.cells) // self.world_size)
        return -(-per_rank // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch: its order, and the draws of the feature extractor."""
        self.epoch = epoch
        order = np.arange(len(self.cells))
        if self.seed is not None:
            order = np.random.default_rng([self.seed, epoch]).permutation(order)
        # Every rank takes as many steps; the last ones repeat a few cells where the number does not divide.
        per_rank = -(-len(order) // self.world_size)
        self.order = np.resize(order, per_rank * self.world_size)[self.rank :: self.world_size]

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        rows = self.order[step * self.batch_size : (step + 1) * self.batch_size]
        inputs = self.processor(cells=self.cells[rows], epoch=self.epoch if self.seed is not None else 0)
        return {**inputs, **self.text_inputs, "labels": self.targets[rows]}


class FinetuneTrainer(ModelLossTrainer):
    """Trainer of cell -> label, each label standing by its text."""

    def num_examples(self, dataloader) -> int:
        """Cells, not batches."""
        return len(dataloader.dataset.cells)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Cross-entropy over the labels, from similarities at the temperature that the readout was given."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        outputs = model(**inputs, return_loss=False)
        scale = self.accelerator.unwrap_model(model).logit_scale.exp()
        logits = cell_text_similarity(outputs.cell_features, outputs.text_features).float() * scale
        loss = F.cross_entropy(logits, labels, label_smoothing=self.args.label_smoothing_factor)
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Loss, accuracy and macro-F1 on the validation cells; every rank reads all of them."""
        similarity = read_similarity(self.accelerator.unwrap_model(self.model), self.eval_batches)
        scale = self.accelerator.unwrap_model(self.model).logit_scale.exp().item()
        scores = scores_of(similarity * scale, self.eval_batches.targets.numpy())
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


@torch.no_grad()
def read_similarity(model: ScMMGPTForCellTextAlignment, batches: LabelledBatches) -> np.ndarray:
    """Cosine similarity of every cell with every label's text, `(n_cells, n_labels)`."""
    model.eval()
    device = model.logit_scale.device
    text_features = model.get_text_features(**{name: value.to(device) for name, value in batches.text_inputs.items()})
    rows = []
    for step in range(len(batches)):
        inputs = {k: v.to(device) for k, v in batches[step].items() if k != "labels" and not k.startswith("qformer_")}
        rows.append(cell_text_similarity(model.get_cell_features(**inputs), text_features))
    return torch.cat(rows).float().cpu().numpy()


def take_gradient_steps(model, processor, train_batches, eval_batches, training_args, pretrained: set[str]) -> list:
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
        train_batches=train_batches,
        eval_batches=eval_batches,
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

    def __init__(self, model, patience: int):
        self.model, self.patience = model, patience
        self.loss, self.weights, self.waited = float("inf"), None, 0

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """Compare this loss with the best one."""
        if metrics["eval_loss"] < self.loss:
            self.loss, self.waited = metrics["eval_loss"], 0
            self.weights = {name: value.detach().cpu().clone() for name, value in self.model.state_dict().items()}
        else:
            self.waited += 1
            control.should_training_stop = self.waited >= self.patience

    def restore(self) -> None:
        """Put the best weights back."""
        self.model.load_state_dict(self.weights)


def queries_contribute(model: ScMMGPTForCellTextAlignment) -> bool:
    """Whether queries move cells at all: the cell projection of a new model is zero."""
    return bool(model.cell_projection.weight.any())


@torch.no_grad()
def set_readout(model: ScMMGPTForCellTextAlignment, weights: torch.Tensor, bias: torch.Tensor, scale: float) -> None:
    """Write the readout's parameters, multiplied by `scale`."""
    model.profile_readout.gene_weights.weight.copy_(weights * scale)
    model.profile_readout.bias.copy_(bias * scale)


@torch.no_grad()
def add_to_readout(model: ScMMGPTForCellTextAlignment, weights: torch.Tensor, bias: torch.Tensor) -> None:
    """Add to the readout's parameters, on whichever device training has left them."""
    readout = model.profile_readout
    readout.gene_weights.weight.add_(weights.to(readout.gene_weights.weight.device))
    readout.bias.add_(bias.to(readout.bias.device))


@torch.no_grad()
def set_temperature(model: ScMMGPTForCellTextAlignment, temperature: float) -> None:
    """Make `logit_scale` the log of the temperature's inverse."""
    model.logit_scale.fill_(min(-np.log(temperature), MAX_LOGIT_SCALE))


@torch.no_grad()
def add_readout(
    model: ScMMGPTForCellTextAlignment,
    weights: torch.Tensor,
    bias: torch.Tensor,
    profiles: csr_matrix,
    eval_batches: LabelledBatches | None,
) -> float:
    """Set the readout and the temperature; returns the factor of the readout.

    Projected queries of a checkpoint and the readout are added in the proportion that fits the held-out cells best, or
    in equal lengths where none are held out. If queries contribute nothing, the factor changes nothing, as cells are
    normalised.
    """
    model.eval()
    unit = 1 / float(np.linalg.norm(profiles @ weights.numpy() + bias.numpy(), axis=1).mean())
    shares: tuple[float, ...] = (1.0,)
    if eval_batches is None:
        set_readout(model, weights, bias, unit)
        set_temperature(model, DEFAULT_TEMPERATURE)
        return unit
    if queries_contribute(model):
        unit, shares = unit * projected_length(model, eval_batches), READOUT_SHARES
    fits = []
    for share in shares:
        set_readout(model, weights, bias, unit * share)
        similarity, targets = read_similarity(model, eval_batches), eval_batches.targets.numpy()
        temperature = fit_temperature(similarity, targets)
        fits.append((negative_log_likelihood(similarity / temperature, targets), unit * share, temperature))
    _, scale, temperature = min(fits)
    set_readout(model, weights, bias, scale)
    set_temperature(model, temperature)
    return scale


@torch.no_grad()
def projected_length(model: ScMMGPTForCellTextAlignment, batches: LabelledBatches) -> float:
    """Mean length of the projected queries of the first batch's cells, before normalisation."""
    inputs = next(iter(batches))
    states = model.encode_cells(*(inputs[name] for name in CELL_INPUTS))
    queries = model.query_cells(states, inputs["cell_attention_mask"])
    return model.cell_projection(queries - model.query_means).norm(dim=-1).mean().item()


def save_checkpoint(
    model: ScMMGPTForCellTextAlignment, processor: ScMMGPTProcessor, labels: Labels, record: dict, output: str
) -> None:
    """Write the checkpoint, with what `annotate` takes from its configuration, and `finetune.json`."""
    model.config.annotation = {
        "labels": labels.text_of,
        "cl_ids": labels.cl_ids,
        "matching_weight": 0.0,  # the matching head is not trained here
        "matching_candidates": len(labels.names),
        "temperature": record["temperature"],
        "unseen_bonus": record["unseen_bonus"],
    }
    ScMMGPTPipeline(model, processor, device="cpu").save_pretrained(output)
    write_json(Path(output, "finetune.json"), record)


def make_parser(prog: str | None = None) -> OptionParser:
    """The command line."""
    parts: Any = (FinetuneDataArguments, FinetuneModelArguments, FinetuneConfig)
    return OptionParser(parts, prog=prog, description=__doc__)


def main(data_args: FinetuneDataArguments, model_args: FinetuneModelArguments, training_args: FinetuneConfig) -> None:
    """Read, fit the readout, train, refit, save."""
    # --- Cells, labels and model
    torch.manual_seed(training_args.seed)
    seed = data_seed(training_args)
    adata = read_file(data_args.adata)
    labels = read_labels(adata.obs, data_args)
    groups = None if data_args.group_key is None else column_of(adata.obs, data_args.group_key)
    train, validation = hold_out(labels, groups, data_args, seed)
    unlabelled = np.setdiff1d(np.arange(adata.n_obs), labels.rows)
    read_options = {name: getattr(data_args, name) for name in ("layer", "assume", "gene_column", "organism")}
    if model_args.checkpoint is None:
        others = [read_file(path) for path in data_args.unlabelled]
        rows = np.union1d(labels.rows[train], unlabelled)
        model, processor, pretrained, cells = new_model(adata, others, rows, model_args, read_options)
        begin_with_texts(model.eval(), processor, labels.texts)
    elif data_args.unlabelled:
        raise ValueError("Unlabelled files start a new model's gene embeddings; a checkpoint has its own.")
    else:
        model, processor, pretrained, cells = load_checkpoint(model_args.checkpoint, adata, read_options)
    processor.feature_extractor.return_profile = True

    def batches(part: np.ndarray, batch_size: int, **order: Any) -> LabelledBatches:
        part_cells, targets = cells[labels.rows[part]], labels.targets[part]
        return LabelledBatches(processor, part_cells, targets, labels.texts, batch_size=batch_size, **order)

    eval_batches = batches(validation, training_args.per_device_eval_batch_size) if len(validation) else None
    record: dict[str, Any] = {"labels": labels.text_of}
    record["cells"] = {"train": len(train), "validation": len(validation), "unlabelled": len(unlabelled)}

    # --- The readout
    profiles = profile_matrix(cells, model.config.cell_config.vocab_size)
    data = LabelledProfiles(
        profiles[labels.rows], labels.targets, len(labels.names), train, validation, profiles[unlabelled]
    )
    regressions = fit_regressions(data, data_args.shots)
    text_features = model.eval().get_text_features(**processor(qformer_text=labels.texts)).detach()
    weights, bias = readout_of(regressions.train, text_features)
    share = add_readout(model, weights, bias, data.profiles[train], eval_batches)
    record |= {"readout_losses": regressions.losses} if regressions.losses else {}
    record |= {"readout_strength": regressions.strength, "readout_share": share}

    # --- Gradient steps
    if eval_batches is not None:
        logits = read_similarity(model, eval_batches) * model.logit_scale.exp().item()
        record["before"] = scores_of(logits, eval_batches.targets.numpy())
    epochs = training_args.num_train_epochs
    if epochs is None:
        epochs = DEFAULT_EPOCHS if model_args.checkpoint is not None else 0
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

    # --- The refit, the temperature and the bonus
    temperature, bonus = DEFAULT_TEMPERATURE, 0.0
    if eval_batches is not None:
        similarity = read_similarity(model, eval_batches)
        temperature = fit_temperature(similarity, eval_batches.targets.numpy())
        record["after"] = scores_of(similarity / temperature, eval_batches.targets.numpy())
        all_weights, all_bias = readout_of(regressions.everything, text_features)
        add_to_readout(model, (all_weights - weights) * share, (all_bias - bias) * share)  # gradient steps' part stays
        if not queries_contribute(model):  # cells lie where the readout puts them
            bonus = choose_unseen_bonus(data, text_features)
    set_temperature(model, temperature)
    record |= {"temperature": temperature, "unseen_bonus": bonus}
    if training_args.process_index == 0:
        save_checkpoint(model, processor, labels, record, str(training_args.output_dir))
        save_run(str(training_args.output_dir), "finetune", data=data_args, model=model_args, training=training_args)
    logger.info("Held-out scores: %s", record.get("after", "nothing was held out"))


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
