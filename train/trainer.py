"""What the trainers of both stages share: finished batches from a stream, two learning rates, losses by name."""

import json
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from scmmgpt.train.data.batches import BatchDataset
from scmmgpt.train.data.corpus import Corpus
from scmmgpt.train.data.stream import CellStream


logger = logging.getLogger(__name__)


def data_seed(training_args: TrainingArguments) -> int:
    """Seed of order, captions and sampling."""
    return training_args.seed if training_args.data_seed is None else training_args.data_seed


def make_datasets(
    corpus: Corpus,
    collate: Callable[..., Mapping[str, Any]],
    training_args: TrainingArguments,
    *,
    columns: list[str] | None = None,
    token_budget: int | None = None,
    **order: Any,
) -> tuple[BatchDataset, BatchDataset | None]:
    """Training and validation batches of this rank; no validation batches where none are asked for or there are.

    Args:
        corpus: The cells.
        collate: See [`BatchDataset`].
        training_args: Sizes of the batches, seed and rank.
        columns: Annotations that `collate` reads; by default all but the barcode.
        token_budget: Tokens in a training batch, in place of a number of cells.
        order: More settings of the training stream; see [`CellStream`].
    """
    shared: dict[str, Any] = {
        "columns": columns,
        "rank": training_args.process_index,
        "world_size": training_args.world_size,
    }
    size: dict[str, Any] = {"token_budget": token_budget}
    if token_budget is None:
        size = {
            "batch_size": training_args.per_device_train_batch_size,
            "drop_last": training_args.dataloader_drop_last,
        }
    train = BatchDataset(CellStream(corpus, seed=data_seed(training_args), **size, **order, **shared), collate)
    if "validation" not in corpus.split_names or training_args.eval_strategy == "no":
        return train, None
    eval_size = training_args.per_device_eval_batch_size
    validation = CellStream(corpus, "validation", batch_size=eval_size, shuffle=False, **shared)
    return train, BatchDataset(validation, collate)


class BatchLoader(DataLoader):
    """Goes through a [`BatchDataset`], one finished batch at a time."""

    dataset: BatchDataset

    def __init__(self, dataset: BatchDataset) -> None:
        super().__init__(dataset, batch_size=None)

    def set_epoch(self, epoch: int) -> None:
        """Called by `Trainer` at the start of an epoch."""
        self.dataset.set_epoch(epoch)


class ResumedPosition(TrainerCallback):
    """Takes the training data to where a resumed run goes on.

    `Trainer` asks the loader for the batches of this epoch that were trained on, and throws them away; it does not
    tell that loader the epoch. Here the dataset learns the epoch, and that these batches need not be made.
    """

    def __init__(self, dataset: BatchDataset) -> None:
        self.dataset = dataset

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """`state` is that of the checkpoint, or a new one."""
        steps_per_epoch = max(-(-len(self.dataset) // args.gradient_accumulation_steps), 1)
        epoch, step = divmod(state.global_step, steps_per_epoch)
        self.dataset.set_epoch(epoch)
        self.dataset.skim(0 if args.ignore_data_skip else step * args.gradient_accumulation_steps)


class StreamTrainer(Trainer):
    """`Trainer` whose `train_dataset` and `eval_dataset` are `BatchDataset`s; for TRL's, put it first among the bases.

    Args:
        is_pretrained: Whether a parameter, by name, takes `args.pretrained_learning_rate`; by default none does.
        write_card: `write_card(log_history)` writes the model card, in place of the trainer's own.
        kwargs: For the trainer.
    """

    train_dataset: BatchDataset
    eval_dataset: BatchDataset
    model: torch.nn.Module
    args: Any  # `TrainingArguments` and the fields of `StageArguments`

    def __init__(
        self,
        *args: Any,
        is_pretrained: Callable[[str], bool] = lambda name: False,
        write_card: Callable[[list[dict]], object] | None = None,
        **kwargs: Any,
    ) -> None:
        self.is_pretrained = is_pretrained
        self.losses_by_name: dict[str, list[torch.Tensor]] = defaultdict(list)
        self.write_card = write_card
        self._last_log: tuple[float, int] | None = None
        self._frozen_modules: list[torch.nn.Module] | None = None
        super().__init__(*args, **kwargs)
        self.add_callback(ResumedPosition(self.train_dataset))
        if self.is_fsdp_enabled:
            flatten_scalars(self.model)

    def get_train_dataloader(self) -> BatchLoader:
        """Finished batches of this rank."""
        return BatchLoader(self.train_dataset)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> BatchLoader:
        """Finished validation batches of this rank."""
        return BatchLoader(self.eval_dataset)

    def num_examples(self, dataloader: DataLoader) -> int:
        """Cells, not batches."""
        assert isinstance(dataloader.dataset, BatchDataset)
        return dataloader.dataset.n_cells

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As `Trainer`'s, with the pretrained parameters in groups of their own."""
        if self.optimizer is not None:
            return self.optimizer
        model = self.model if model is None else model
        decayed = set(self.get_decay_parameter_names(model))
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
        groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = defaultdict(list)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                pretrained = self.args.pretrained_learning_rate is not None and self.is_pretrained(name)
                groups[pretrained, name in decayed].append(parameter)
        self.optimizer = optimizer_class(
            [
                {
                    "params": parameters,
                    "lr": self.args.pretrained_learning_rate if pretrained else self.args.learning_rate,
                    "weight_decay": self.args.weight_decay if decay else 0.0,
                }
                for (pretrained, decay), parameters in groups.items()
            ],
            **options,
        )
        return self.optimizer

    def still_frozen_parts(self) -> None:
        """Let what is frozen give the same states at every step: `Trainer` puts all in training mode before each."""
        if self._frozen_modules is None:
            self._frozen_modules = frozen_modules(self.model)
        for module in self._frozen_modules:
            module.training = False

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The card of this project, of data, parts and limits, whenever the trainer saves or pushes one."""
        if self.write_card is None:
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            self.write_card(self.state.log_history)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if state_dict is not None and self.is_fsdp_enabled:  # back to how the model defines them
            scalars = {name for name in state_dict if name.endswith("logit_scale")}
            state_dict = {name: value.reshape(()) if name in scalars else value for name, value in state_dict.items()}
        super()._save(output_dir, state_dict)

    def record_losses(self, **losses: torch.Tensor | None) -> None:
        """Remember components for the next log line; training and evaluation apart."""
        prefix = "" if self.model.training else "eval_"
        for name, loss in losses.items():
            if loss is not None:
                self.losses_by_name[prefix + name].append(loss.detach())

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the mean of every recorded component over all ranks and, in training, the speed since the last line."""
        if "loss" in logs:
            now, n_cells = time.perf_counter(), self.train_dataset.n_cells_read * self.args.world_size
            if self._last_log is not None:
                then, n_before = self._last_log
                logs["cells_per_second"] = round((n_cells - n_before) / (now - then), 2)
            self._last_log = now, n_cells
        prefix = "eval_" if any(name.startswith("eval_") for name in logs) else ""
        names = [name for name in self.losses_by_name if name.startswith("eval_") == bool(prefix)]
        own = {name: torch.stack(self.losses_by_name.pop(name)).float() for name in names}
        # A rank has what its batches had: one may have described no cell where another did.
        ranks = gather_object([{name: (values.sum().item(), len(values)) for name, values in own.items()}])
        for name in sorted({name for rank in ranks for name in rank}):
            totals, counts = zip(*(rank[name] for rank in ranks if name in rank), strict=True)
            logs[name] = round(sum(totals) / sum(counts), 4)
        super().log(logs, *args, **kwargs)


class ModelLossTrainer(StreamTrainer):
    """`Trainer` of a model that returns its loss, and the components of it as `*_loss`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The losses are means over the batch: `Trainer` averages them over accumulation steps.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The model's own loss; its components are logged by name."""
        self.still_frozen_parts()
        outputs = model(**inputs)
        self.record_losses(**{name: value for name, value in outputs.items() if name.endswith("_loss")})
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def prediction_step(
        self, model: torch.nn.Module, inputs: dict, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor, None, None]:
        """Losses alone: features of a whole validation split are not worth gathering."""
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None


def flatten_scalars(model: torch.nn.Module) -> None:
    """Make parameters without a dimension, which FSDP refuses, vectors of length 1."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dim() == 0:
                flat = torch.nn.Parameter(parameter.detach()[None], requires_grad=parameter.requires_grad)
                setattr(module, name, flat)


def freeze(model: torch.nn.Module, should_freeze: Callable[[str], bool]) -> list[str]:
    """Turn off the gradient of every parameter whose name is chosen; returns those that stay trainable."""
    trainable = []
    for name, parameter in model.named_parameters():
        if should_freeze(name):
            parameter.requires_grad_(False)
        elif parameter.requires_grad:
            trainable.append(name)
    return trainable


def frozen_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Modules of parts none of whose parameters is trained: noise in them costs time and teaches nothing.

    Dropout is a module, or a function that a module calls in training mode, as attention does. All are to leave that
    mode but those that can be checkpointed, which they are in it alone: the gradient passes frozen layers too.
    """
    parameters = list(model.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        return [module for module in model.modules() if not hasattr(module, "gradient_checkpointing")]
    return [module for child in model.children() for module in frozen_modules(child)]


def save_run(output_dir: str, command: str, **arguments: Any) -> None:
    """Write the resolved arguments beside the checkpoint, as `training.json`."""
    document: dict[str, Any] = {"command": command}
    for name, value in arguments.items():
        document[name] = value.to_dict() if hasattr(value, "to_dict") else vars(value)
    path = Path(output_dir, "training.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2, default=str) + "\n", encoding="utf-8")
