"""Fine-tune a model for your own labelled cells.

```
python -m scmmgpt.train finetune --adata cells.h5ad --label_key cell_type --group_key donor --output_dir DIR
python -m scmmgpt.train finetune --adata cells.h5ad --label_key cell_type --checkpoint ALIGNED --output_dir DIR
scmmgpt annotate new_cells.h5ad --model DIR --output annotated.h5ad
```

Three steps:

1. **Fit the profile readout** (`readout`): a multinomial logistic regression on the square root of every gene's share
   of the cell's counts, with the same weight for every label. The weights of the regression are mapped into the
   embedding space of cells and texts, where a cell becomes a mixture of the texts of similar labels. An untrained
   label can therefore be given as a text. The model is linear because a regression on the whole transcriptome is hard
   to beat with a few thousand labelled cells. The square root stabilises the variance of counts and gives every cell
   the same norm (Hellinger distance). Held-out cells choose the regularisation strength; with `--group_key` they are
   cells of other donors or batches.
2. **Take gradient steps** on the whole model: cell model, Q-Former, readout. Training stops when the validation loss
   stops falling. The weights with the lowest loss are kept, which may be those of step 1.
3. **Refit the readout** with the held-out cells, at the same strength. The temperature of `annotate` is fitted on the
   held-out cells before the refit. They also calibrate the label sets of `annotate --error-rate`.

The language model of `--checkpoint` is dropped, since it knows the labels of its own training. `describe --proof`
describes cells by counts instead. The checkpoint keeps the regression's logits of the labels, with statistics from
which `annotate` refits the regression on the genes of a file (`readout_scmmgpt`): a gene that a file lacks is missing,
not zero. Similarities to texts are added to these logits if the sum fits the held-out cells better by more than a
standard error. If not, `annotate` does not run the transformer. A table of readout, transformer and both, with
held-out scores and times, is printed and stored in `finetune.json`. A gate for untrained labels is fitted by leaving
out each label in turn (`unseen_scmmgpt`).

The cell projection of a new model starts at zero. Queries then contribute nothing, and the readout alone places the
cells; no gradient step is taken by default. With a converted scGPT as `cell_model` of `--new_model`, the file is read
in the vocabulary of that model, and gradient steps train the queries beside the readout. With `--checkpoint`, the
readout is added to the projected queries in the proportion that fits the held-out cells best. With `--shots`, no cells
are held out, and the readout alone gives the logits of the labels. The regression then starts from what the checkpoint
knows of labels of these names (`prior`). If the file also has cells without a label, four-fold cross-validation over
the labelled cells chooses one of up to five models: regressions on all genes and on principal components of all cells,
with what the checkpoint knows and without it, and label spreading over nearest neighbours (`readout.cross_validate`;
`finetune.json` has the losses).
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from scmmgpt.annotation_scmmgpt import fit_label_sets, label_probabilities
from scmmgpt.cells_scmmgpt import Cells
from scmmgpt.commands.files import filled_folder, write_json
from scmmgpt.genes_scmmgpt import GeneIndex
from scmmgpt.modeling_scmmgpt import CELL_INPUTS, MAX_LOGIT_SCALE, ScMMGPTForCellTextAlignment, cell_text_similarity
from scmmgpt.novelty_scmmgpt import fit_novelty
from scmmgpt.pipeline_scmmgpt import ScMMGPTPipeline
from scmmgpt.processing_scmmgpt import ScGPTProcessor, ScMMGPTProcessor
from scmmgpt.readout_scmmgpt import ScMMGPTLabelReadout
from scmmgpt.scoring_scmmgpt import text_states
from scmmgpt.train import readout
from scmmgpt.train.align import UNTRAINED_PARTS, build_model, build_processor
from scmmgpt.train.arguments import AlignModelArguments, FinetuneConfig, FinetuneDataArguments, FinetuneModelArguments
from scmmgpt.train.data import ontology
from scmmgpt.train.data.captions import CaptionSampler
from scmmgpt.train.data.corpus import SPECIAL_TOKENS
from scmmgpt.train.data.gene_tables import build_gene_aliases, reference_gene_index
from scmmgpt.train.data.labelled import CellTable, LabelledBatches, open_table
from scmmgpt.train.labels import column_of, hold_out, hold_out_rest, read_labels
from scmmgpt.train.options import OptionParser
from scmmgpt.train.prior import known_regression
from scmmgpt.train.router import comparison, timed, verdict
from scmmgpt.train.trainer import ModelLossTrainer, data_seed, freeze, save_run
from scmmgpt.train.unseen import add_gene_texts, embed_once, fit_gate
from scmmgpt.unseen_scmmgpt import named_genes


logger = logging.getLogger(__name__)

DEFAULT_TEMPERATURE = 0.1  # without held-out cells
READOUT_SHARES = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # norms of the readout, relative to the projected queries
REFERENCE_TEXTS = 400  # about how many cell types of the ontology define the axes of a new text projection
DEFAULT_EPOCHS = 3  # if the model or its cell model is pretrained; otherwise 0
PATIENCE = 2  # epochs without a lower validation loss before training stops
STARTS = ("ScMMGPTForCellTextAlignment", "ScMMGPTForConditionalGeneration")
LEFT_OUT = (
    "language_",
    "label_projection.",
    "lm_head.",
    "text_to_cell.",
    "expression_head.",
    "cell_states.",
)
FROZEN_PARTS = (*UNTRAINED_PARTS, "matching_head.", "logit_scale")


class Start(NamedTuple):
    """The model that fine-tuning starts from."""

    model: ScMMGPTForCellTextAlignment
    processor: ScMMGPTProcessor
    pretrained: set[str]  # names of the pretrained parameters
    cells: Cells  # all cells of the file, in the vocabulary of the model
    readout: ScMMGPTLabelReadout | None = None  # of the checkpoint's own labels
    texts: Sequence[str] = ()  # of these labels


@dataclass
class CellsOfVocabulary:
    """Cells in memory and their gene vocabulary, with the interface of [`TrainingCells`]."""

    vocabulary: dict[str, int]
    gene_aliases: dict[str, str]
    cells: Cells

    def row_groups(self, split: str, columns: list[str] | None = None) -> Iterator[tuple[Cells, None]]:
        """Yield all cells at once."""
        yield self.cells, None


def load_checkpoint(path: str, table: CellTable) -> Start:
    """Load a checkpoint to fine-tune, without its language model; a missing profile readout starts at zero.

    Args:
        path: Checkpoint of `align` or `tune`.
        table: The labelled cells.

    Raises:
        ValueError: If the checkpoint is of another class, or its parameters do not match the model.
    """
    processor = ScMMGPTProcessor.from_pretrained(path)
    config = ScMMGPTForCellTextAlignment.config_class.from_pretrained(path)
    if (config.architectures or [""])[0] not in STARTS:
        raise ValueError(f"{path} holds a {config.architectures}; fine-tuning starts from `align` or `tune`.")
    config.profile_readout, texts = True, (config.label_readout or {}).get("texts", ())
    config.cell_embedding = "cell-text"  # a readout of one dataset has no groups
    config.release = None  # the fine-tuned model is not the released one
    reporter = logging.getLogger("transformers.modeling_utils")
    reporter.disabled = True  # missing and unexpected keys are checked below
    try:
        loaded: Any = ScMMGPTForCellTextAlignment.from_pretrained(
            path, config=config, dtype=torch.float32, key_mapping={r"^model\.": ""}, output_loading_info=True
        )
    finally:
        reporter.disabled = False
    model, info = loaded
    model._weight_conversions = None  # otherwise `save_pretrained` restores the key prefix of the original class
    missing = [key for key in info["missing_keys"] if not key.startswith("profile_readout.")]
    unexpected = sorted(key for key in info["unexpected_keys"] if not key.startswith(LEFT_OUT))
    if missing or unexpected:
        raise ValueError(f"{path} does not fit: missing {missing}, unexpected {unexpected}.")
    known = model.label_readout if texts else None
    if known is not None:
        del model.label_readout  # `add_label_readout` fits one for the new labels
        model.config.label_readout = None
    pretrained = {name for name, _ in model.named_parameters() if not name.startswith("profile_readout.")}
    return Start(model, processor, pretrained, table.read(processor.gene_index), known, texts)


def new_model(table: CellTable, rows: np.ndarray, texts: list[str], model_args: AlignModelArguments) -> Start:
    """Make a new model of the measured genes that have an approved symbol.

    With a pretrained cell model, the genes are those of its vocabulary.

    Args:
        table: The labelled cells.
        rows: Rows of `table` from which gene embeddings are initialised, without the held-out cells, int `(n,)`.
        texts: Texts of the labels.
        model_args: Sizes and parts of the model.
    """
    if model_args.cell_model is None:
        reference = reference_gene_index()
        symbols = {i: symbol for symbol, i in reference.vocabulary.items()}
        measured = sorted(symbols[i] for i in table.measured(reference).tolist())
        vocabulary = {name: i for i, name in enumerate([*SPECIAL_TOKENS, *measured])}
        aliases = build_gene_aliases(vocabulary)
    else:
        stored = ScGPTProcessor.from_pretrained(model_args.cell_model)
        vocabulary, aliases = stored.gene_tokenizer.get_vocab(), stored.gene_aliases
    cells = table.read(GeneIndex(vocabulary, aliases))
    start = CellsOfVocabulary(vocabulary, aliases, cells[rows])
    model, qformer_tokenizer, pretrained = build_model(start, model_args, profile_readout=True)
    processor = build_processor(start, qformer_tokenizer, model_args)
    start_from_texts(model.eval(), processor, texts)
    return Start(model, processor, pretrained, cells)


@torch.no_grad()
def start_from_texts(model: ScMMGPTForCellTextAlignment, processor: ScMMGPTProcessor, texts: list[str]) -> None:
    """Initialise the embedding space of a new model from BERT's text embeddings, and the cell projection with zeros.

    The text projection centres texts on the mean of `texts` and of cell types of the ontology, and projects them onto
    the principal axes of both. Texts that are similar for BERT stay similar. Queries contribute nothing; the readout
    alone places the cells.
    """
    captions = CaptionSampler()
    names = ontology.names_of("cell_type")
    references = [captions.label_text(name) for name in names[:: max(1, len(names) // REFERENCE_TEXTS)]]

    def encode(texts: list[str]) -> np.ndarray:
        batches = [processor(qformer_text=texts[start : start + 64]) for start in range(0, len(texts), 64)]
        embeds: list[Any] = [model.qformer_embeddings(input_ids=batch["qformer_input_ids"]) for batch in batches]
        masks = [batch["qformer_attention_mask"] for batch in batches]
        return torch.cat([model.encode_texts(*pair) for pair in zip(embeds, masks, strict=True)]).numpy()

    states = torch.from_numpy(np.concatenate([embed_once(encode, references), encode(texts)]))
    mean = states.mean(dim=0)
    axes = torch.linalg.svd(states - mean, full_matrices=False)[2][: model.text_projection.out_features]
    model.text_projection.weight.zero_()
    model.text_projection.weight[: len(axes)] = axes
    model.text_projection.bias.copy_(-model.text_projection.weight @ mean)
    model.cell_projection.weight.zero_()
    model.cell_projection.bias.zero_()


class FinetuneTrainer(ModelLossTrainer):
    """Trainer that classifies cells by similarity to the text of each label."""

    eval_dataset: LabelledBatches

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Cross-entropy over the labels; logits are similarities at the temperature of the fitted readout."""
        labels = inputs["labels"]
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"}, return_loss=False)
        scale = self.accelerator.unwrap_model(model).logit_scale.exp()
        logits = cell_text_similarity(outputs.cell_features, outputs.text_features).float() * scale
        loss = F.cross_entropy(logits, labels, label_smoothing=self.args.label_smoothing_factor)
        return (loss, outputs) if return_outputs else loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss, accuracy and macro-F1 on the validation cells; every rank computes them on all cells."""
        scores = validate(self.accelerator.unwrap_model(self.model), self.eval_dataset)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class KeepBest(TrainerCallback):
    """Keeps the weights with the lowest validation loss, and stops after `PATIENCE` epochs without a lower one.

    The weights before the first epoch count, too.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.loss, self.waited = model, float("inf"), 0
        self.weights: dict[str, torch.Tensor] = {}

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        """Store the weights if the loss is the lowest so far, else count the epoch."""
        loss = metrics["eval_loss"]
        if loss < self.loss:
            self.loss, self.waited = loss, 0
            self.weights = {name: value.detach().cpu().clone() for name, value in self.model.state_dict().items()}
        else:
            self.waited += 1
            control.should_training_stop = self.waited >= PATIENCE


@torch.no_grad()
def similarities(model: ScMMGPTForCellTextAlignment, batches: LabelledBatches) -> np.ndarray:
    """Cosine similarity of every cell with the text of every label, float32 `(n_cells, n_labels)`.

    The transformer does not run if its queries contribute nothing.
    """
    model.eval()
    device = model.logit_scale.device
    text_features = model.get_text_features(**{name: value.to(device) for name, value in batches.text_inputs.items()})
    contributes = queries_contribute(model)
    rows = []
    for batch in batches:
        inputs = {k: v.to(device) for k, v in batch.items() if k != "labels" and not k.startswith("qformer_")}
        if contributes:
            features = model.get_cell_features(**inputs)
        else:
            queries = model.query_means.expand(len(inputs["profile"]), -1, -1)
            features = model.project_cells(queries, inputs["profile_gene_ids"], inputs["profile"])
        rows.append(cell_text_similarity(features, text_features))
    return torch.cat(rows).float().cpu().numpy()


def validate(model: ScMMGPTForCellTextAlignment, batches: LabelledBatches) -> dict[str, float]:
    """Loss, accuracy and macro-F1 at the temperature of the model."""
    return readout.scores_of(similarities(model, batches) * model.logit_scale.exp().item(), batches.targets.numpy())


def queries_contribute(model: ScMMGPTForCellTextAlignment) -> bool:
    """Whether queries affect the embeddings of cells: the cell projection of a new model is zero."""
    return bool(model.cell_projection.weight.any())


@torch.no_grad()
def set_readout(model: ScMMGPTForCellTextAlignment, weights: torch.Tensor, bias: torch.Tensor, scale: float) -> None:
    """Set the parameters of the readout to `scale` times the given ones."""
    model.profile_readout.gene_weights.weight.copy_(weights * scale)
    model.profile_readout.bias.copy_(bias * scale)


@torch.no_grad()
def add_to_readout(model: ScMMGPTForCellTextAlignment, weights: torch.Tensor, bias: torch.Tensor) -> None:
    """Add to the parameters of the readout, on their device."""
    weight, own_bias = model.profile_readout.gene_weights.weight, model.profile_readout.bias
    weight.add_(weights.to(weight.device))
    own_bias.add_(bias.to(own_bias.device))


@torch.no_grad()
def set_temperature(model: ScMMGPTForCellTextAlignment, temperature: float) -> None:
    """Set `logit_scale` to -log(`temperature`), at most `MAX_LOGIT_SCALE`."""
    model.logit_scale.fill_(min(-np.log(temperature), MAX_LOGIT_SCALE))


@torch.no_grad()
def projected_length(model: ScMMGPTForCellTextAlignment, batches: LabelledBatches) -> float:
    """Mean norm of the projected queries of the first batch, before normalisation."""
    inputs = next(iter(batches))
    states = model.encode_cells(*(inputs[name] for name in CELL_INPUTS))
    queries = model.query_cells(states, inputs["cell_attention_mask"])
    return model.cell_projection(queries - model.query_means).norm(dim=-1).mean().item()


def add_readout(
    model: ScMMGPTForCellTextAlignment,
    weights: torch.Tensor,
    bias: torch.Tensor,
    length: float,
    eval_batches: LabelledBatches | None,
) -> float:
    """Set the readout and the temperature of the model, and return the factor of the readout.

    Projected queries and readout are added in the proportion that fits the held-out cells best. Without held-out
    cells, the readout gets a mean norm of 1. If queries contribute nothing, the factor has no effect, since embeddings
    are normalised.

    Args:
        model: The model, changed in place.
        weights: Weights of the readout, `(n_genes, dim)`.
        bias: Bias of the readout, `(dim,)`.
        length: Mean norm of the readouts of the training cells.
        eval_batches: Held-out cells, if there are any.
    """
    model.eval()
    unit, shares = 1 / length, [1.0]
    if eval_batches is None:
        set_readout(model, weights, bias, unit)
        set_temperature(model, DEFAULT_TEMPERATURE)
        return unit
    if queries_contribute(model):
        unit, shares = unit * projected_length(model, eval_batches), list(READOUT_SHARES)
    fits = []
    for share in shares:
        set_readout(model, weights, bias, unit * share)
        similarity, targets = similarities(model, eval_batches), eval_batches.targets.numpy()
        temperature = readout.fit_temperature(similarity, targets)
        fits.append((readout.negative_log_likelihood(similarity / temperature, targets), unit * share, temperature))
    _, scale, temperature = min(fits)
    set_readout(model, weights, bias, scale)
    set_temperature(model, temperature)
    return scale


class FineTuning:
    """One run of fine-tuning: model, cells, and the record that becomes `finetune.json`."""

    def __init__(
        self,
        data_args: FinetuneDataArguments,
        model_args: FinetuneModelArguments,
        training_args: FinetuneConfig,
        cells_of: Mapping[str, Any] | None = None,
    ) -> None:
        self.arguments = {"data": data_args, "model": model_args, "training": training_args}
        self.shots, self.training_args = data_args.shots, training_args
        self.gene_texts = model_args.align_arguments().gene_texts
        logger.info("Reading %s", data_args.adata)
        read_options = {name: getattr(data_args, name) for name in ("layer", "assume", "gene_column", "organism")}
        table = open_table(data_args.adata, read_options, cells_of)
        obs = table.adata.obs
        self.labels = labels = read_labels(obs, data_args)
        if table.n_train is None:
            groups = None if data_args.group_key is None else column_of(obs, data_args.group_key)
            train, validation = hold_out(labels, groups, data_args, data_seed(training_args))
        else:
            train, validation = hold_out_rest(labels, table.n_train, data_args)
        unlabelled = np.setdiff1d(np.arange(len(obs)), labels.rows)
        logger.info("Matching genes and making the model for %d cells of %d labels", len(train), len(labels.names))
        if model_args.checkpoint is not None:
            start = load_checkpoint(model_args.checkpoint, table)
        else:
            rows = np.union1d(labels.rows[train], unlabelled)
            start = new_model(table, rows, labels.texts, model_args.align_arguments())
        self.model, self.processor, self.pretrained, cells = start[:4]
        self.measured = table.measured(self.processor.gene_index)
        self.processor.feature_extractor.return_profile = True
        if training_args.num_train_epochs is None:
            pretrained = model_args.checkpoint is not None or model_args.align_arguments().cell_model is not None
            training_args.num_train_epochs = DEFAULT_EPOCHS if pretrained else 0

        profiles = readout.profile_matrix(cells, self.model.config.cell_config.vocab_size)
        self.profiles = readout.LabelledProfiles(
            profiles[labels.rows], labels.targets, len(labels.names), train, validation, profiles[unlabelled]
        )
        if start.readout is not None:
            names, annotation = [labels.cl_ids.get(name, name) for name in labels.names], self.model.config.annotation
            checkpoint = start.readout, start.texts, annotation or {}
            self.profiles.prior = known_regression(*checkpoint, names, self.measured, cells, profiles)
        self.cells = cells[labels.rows]
        self.eval_batches = None
        if len(validation):
            self.eval_batches = self.batches(validation, training_args.per_device_eval_batch_size)
        self.record: dict[str, Any] = {"labels": dict(zip(labels.names, labels.texts, strict=True))}
        if (prior := self.profiles.prior) is not None:
            known = [labels.names[row] for row in np.flatnonzero(prior.weights.any(axis=1))]
            logger.info("The checkpoint knows %d of %d labels: %s", len(known), len(labels.names), ", ".join(known))
            self.record["known"] = known
        self.record["cells"] = {"train": len(train), "validation": len(validation), "unlabelled": len(unlabelled)}

    def batches(self, part: np.ndarray, batch_size: int, **order: Any) -> LabelledBatches:
        """Batches of the labelled cells at positions `part`; `order` are options of `LabelledBatches`."""
        cells, targets = self.cells[part], self.labels.targets[part]
        return LabelledBatches(self.processor, cells, targets, self.labels.texts, batch_size=batch_size, **order)

    def fit_readout(self) -> None:
        """Fit the regression, map it into the embedding space, and add it to the projected queries."""
        logger.info("Fitting the readout on %d cells", len(self.profiles.train))
        self.regressions = readout.fit_regressions(self.profiles, self.shots)
        texts = self.processor(qformer_text=self.labels.texts)
        self.text_features = self.model.eval().get_text_features(**texts).detach()
        self.weights, self.bias = readout.readout_of(self.regressions.train, self.text_features)
        readouts = self.profiles.profiles[self.profiles.train] @ self.weights.numpy() + self.bias.numpy()
        length = float(np.linalg.norm(readouts, axis=1).mean())
        self.share = add_readout(self.model, self.weights, self.bias, length, self.eval_batches)
        self.record |= {"readout_losses": self.regressions.losses} if self.regressions.losses else {}
        self.record |= {"readout_strength": self.regressions.strength, "readout_share": self.share}
        if self.eval_batches is not None:
            self.record["before"] = validate(self.model, self.eval_batches)

    def take_gradient_steps(self) -> None:
        """Train the whole model, and keep the weights with the lowest validation loss, if cells are held out."""
        model, args = self.model, self.training_args
        if not args.num_train_epochs:
            return
        ranks = {"rank": args.process_index, "world_size": args.world_size}
        size, seed = args.per_device_train_batch_size, data_seed(args)
        freeze(model, lambda name: name.startswith(FROZEN_PARTS))
        best = KeepBest(model)
        if self.eval_batches is not None:
            args.eval_strategy = IntervalStrategy.EPOCH
        trainer = FinetuneTrainer(
            model=model,
            args=args,
            processing_class=self.processor,
            train_dataset=self.batches(self.profiles.train, size, seed=seed, **ranks),
            eval_dataset=self.eval_batches,
            is_pretrained=self.pretrained.__contains__,
            callbacks=[best],
        )
        if self.eval_batches is not None:
            trainer.evaluate()
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        if self.eval_batches is not None:
            model.load_state_dict(best.weights)
        model.requires_grad_(True)
        self.record["epochs"] = [line for line in trainer.state.log_history if "eval_loss" in line]

    def refit_readout(self) -> None:
        """Choose the temperature on the held-out cells, then refit the readout with them."""
        temperature = DEFAULT_TEMPERATURE
        self.score_temperature, self.similarity_weight = 1.0, 0.0
        self.label_sets: dict[str, Any] | None = None
        if (batches := self.eval_batches) is not None:
            targets = batches.targets.numpy()
            similarity, cost = timed(lambda: similarities(self.model, batches), len(targets))
            self.compare_parts(similarity, cost, targets)
            temperature = readout.fit_temperature(similarity, targets)
            self.record["after"] = readout.scores_of(similarity / temperature, targets)
            weights, bias = readout.readout_of(self.regressions.everything, self.text_features)
            # Adding the difference keeps the changes that gradient steps made.
            add_to_readout(self.model, (weights - self.weights) * self.share, (bias - self.bias) * self.share)
        set_temperature(self.model, temperature)
        self.record["temperature"] = temperature
        self.record["similarity_weight"] = self.similarity_weight
        self.record["used"] = "both" if self.similarity_weight else "readout"
        if self.eval_batches is None:
            logger.info("No cells were held out: readout and network are not compared.")

    def compare_parts(self, similarity: np.ndarray, cost: float, targets: np.ndarray) -> None:
        """Record the held-out scores of readout, transformer and both, and choose the weight of similarities.

        Args:
            similarity: Cosine similarity of the held-out cells with the texts of the labels, `(n_cells, n_labels)`.
            cost: Time of `similarity` in milliseconds per cell.
            targets: Labels of the held-out cells, int `(n_cells,)`.
        """
        cells = self.cells[self.profiles.validation]
        n_genes = self.profiles.profiles.shape[1]
        scores, own_cost = timed(
            lambda: self.regressions.train.scores(readout.profile_matrix(cells, n_genes)), len(targets)
        )
        self.score_temperature = readout.fit_temperature_of_scores(scores, targets)
        logits = scores / self.score_temperature
        parts = {"readout": logits}
        if queries_contribute(self.model):
            weight, both = readout.fit_similarity_weight(logits, similarity, targets)
            parts |= {"transformer": similarity / readout.fit_temperature(similarity, targets), "both": both}
            self.similarity_weight = weight
        summed = logits + self.similarity_weight * similarity
        self.label_sets = fit_label_sets(label_probabilities(summed, logit_scale=1.0), targets)
        costs = {"readout": own_cost, "transformer": cost, "both": own_cost + cost}
        rows = {
            name: {**readout.scores_of(values, targets), "ms_per_cell": round(costs[name], 4)}
            for name, values in parts.items()
        }
        used = "both" if self.similarity_weight else "readout"
        was_trained = "epochs" in self.record
        self.record |= {"parts": rows, "verdict": verdict(rows, used, was_trained)}
        logger.info(comparison(rows, used, len(targets), was_trained))

    def add_label_readout(self) -> None:
        """Add the label readout (the regression and its statistics) to the model, and fit a gate for new labels."""
        model = self.model
        data, regression, seed = self.profiles, self.regressions.everything, data_seed(self.training_args)
        model.label_readout = readout.fit_label_readout(data, regression, self.score_temperature, seed)
        model.config.label_readout = {"texts": list(self.labels.texts), **model.label_readout.sizes()}
        add_gene_texts(model.eval(), self.processor, self.gene_texts)
        named = [named_genes(text, self.processor.gene_index) for text in self.labels.texts]
        embeddings = text_states(model, self.processor, self.labels.texts)
        cells, targets = self.cells, self.labels.targets
        self.unseen_gate = fit_gate(model.label_readout, cells, targets, embeddings, named, seed)

    def save(self) -> None:
        """Write `finetune.json` and the checkpoint, with the configuration of `annotate`."""
        if self.training_args.process_index != 0:
            return
        output = str(self.training_args.output_dir)
        logger.info("Writing %s", output)
        self.model.config.annotation = {
            "labels": self.record["labels"],
            "cl_ids": self.labels.cl_ids,
            "matching_weight": 0.0,  # the matching head is not trained here
            "matching_candidates": len(self.labels.names),
            "temperature": self.record["temperature"],
            "similarity_weight": self.record["similarity_weight"],
            "unseen_gate": None if self.unseen_gate is None else vars(self.unseen_gate),
            "terms": ontology.label_terms({name: self.labels.cl_ids.get(name) for name in self.labels.names}),
            "tissues": self.labels.tissues,
        }
        if self.label_sets is not None:
            self.model.config.annotation["label_sets"] = self.label_sets
        novelty = fit_novelty(self.cells, self.labels.targets, self.measured, self.model.config.cell_config.vocab_size)
        if novelty is not None:
            self.model.config.annotation["novelty"] = novelty
        with filled_folder(output) as folder:
            ScMMGPTPipeline(self.model, self.processor, device="cpu").save_pretrained(folder)
            write_json(folder / "finetune.json", self.record)
            save_run(str(folder), "finetune", **self.arguments)


def make_parser(prog: str | None = None) -> OptionParser:
    """Make the parser of `finetune`."""
    parts = FinetuneDataArguments, FinetuneModelArguments, FinetuneConfig
    return OptionParser(parts, prog=prog, description=__doc__)


def main(
    data_args: FinetuneDataArguments,
    model_args: FinetuneModelArguments,
    training_args: FinetuneConfig,
    *,
    cells: Mapping[str, Any] | None = None,
) -> None:
    """Run all steps of fine-tuning, and save the checkpoint.

    Args:
        data_args: Options of the cells and labels.
        model_args: Options of the model.
        training_args: Options of training.
        cells: Datasets in place of the cells of the corpus `adata`, in the form of [`open_table`].
    """
    torch.manual_seed(training_args.seed)
    run = FineTuning(data_args, model_args, training_args, cells)
    run.fit_readout()
    run.take_gradient_steps()
    run.refit_readout()
    run.add_label_readout()
    run.save()
