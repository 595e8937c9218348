"""What the trainers of both stages share: finished batches from a stream, two learning rates, losses by name."""

import json
import logging
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer

from scmmgpt.train.data.stream import Batch, CellStream, take_batch


logger = logging.getLogger(__name__)


class StreamBatches(Dataset):
    """The batches of a stream by their number within the epoch.

    Being able to ask for batch `i` makes resuming exact and free: `Trainer` skips numbers, not data.

    Args:
        stream: The cells, already this rank's share.
        collate: `collate(cells, obs, epoch=...)` -> the model's inputs.
    """

    def __init__(self, stream: CellStream, collate: Callable):
        self.stream, self.collate = stream, collate
        self._cells, self._next = None, None
        self.n_cells_read = 0

    def __len__(self) -> int:
        return len(self.stream)

    def of_all_ranks(self) -> "StreamBatches":
        """The batches that a single process would see: the same on every rank."""
        return StreamBatches(self.stream.for_single_process(), self.collate)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; its order and its random draws are its own."""
        self.stream.set_epoch(epoch)
        self._next = None

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        cells, obs = self.read(step)
        return self.collate(cells, obs, epoch=self.stream.epoch)

    def read(self, step: int) -> Batch:
        """Cells and annotations of a step of the epoch."""
        if step != self._next:
            self.stream.load_state_dict({**self.stream.state_dict(), "step": step})
            self._cells = iter(self.stream)
        self._next = step + 1
        cells, obs = next(self._cells)
        self.n_cells_read += len(cells)
        return cells, obs


class BatchLoader(DataLoader):
    """Goes through `StreamBatches` in order; the stream has shuffled and divided them among ranks."""

    def __init__(self, batches: StreamBatches):
        super().__init__(batches, batch_size=1, shuffle=False, collate_fn=take_batch)

    def set_epoch(self, epoch: int) -> None:
        """Called by `Trainer` at the start of an epoch."""
        self.dataset.set_epoch(epoch)


class StreamTrainerMixin:
    """For a `Trainer` class: put it first among the bases.

    Args:
        train_batches, eval_batches: Where batches come from.
        is_pretrained: Whether a parameter, by name, takes `args.pretrained_learning_rate`; by default none does.
        write_card: `write_card(log_history)` writes the model card, in place of the trainer's own.
        kwargs: For the trainer.
    """

    def __init__(
        self,
        *args,
        train_batches: StreamBatches,
        eval_batches: StreamBatches | None = None,
        is_pretrained: Callable[[str], bool] = lambda name: False,
        write_card: Callable[[list[dict]], object] | None = None,
        **kwargs,
    ):
        self.train_batches, self.eval_batches = train_batches, eval_batches
        self.is_pretrained = is_pretrained
        self.losses_by_name = defaultdict(list)
        self.write_card = write_card
        self._last_log = None
        self._frozen_modules = None
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled:
            flatten_scalars(self.model)

    def get_train_dataloader(self):
        """Finished batches of this rank."""
        return BatchLoader(self.train_batches)

    def get_eval_dataloader(self, eval_dataset=None):
        """Finished validation batches of this rank."""
        return BatchLoader(self.eval_batches)

    def num_examples(self, dataloader) -> int:
        """Cells, not batches."""
        return dataloader.dataset.stream.n_cells

    def create_optimizer(self, model=None):
        """As `Trainer`'s, with the pretrained parameters in groups of their own."""
        if self.optimizer is not None:
            return self.optimizer
        model = self.model if model is None else model
        decayed = set(self.get_decay_parameter_names(model))
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
        groups = defaultdict(list)
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

    def create_model_card(self, *args, **kwargs):
        """The card of this project, of data, parts and limits, whenever the trainer saves or pushes one."""
        if self.write_card is None:
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            self.write_card(self.state.log_history)

    def _save(self, output_dir=None, state_dict=None):
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

    def log(self, logs, *args, **kwargs):
        """Add the mean of every recorded component over all ranks and, in training, the speed since the last line."""
        if "loss" in logs and hasattr(self.train_batches, "n_cells_read"):
            now, n_cells = time.perf_counter(), self.train_batches.n_cells_read * self.args.world_size
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


class ModelLossTrainer(StreamTrainerMixin, Trainer):
    """`Trainer` of a model that returns its loss, and the components of it as `*_loss`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # The losses are means over the batch: `Trainer` averages them over accumulation steps.
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The model's own loss; its components are logged by name."""
        self.still_frozen_parts()
        outputs = model(**inputs)
        self.record_losses(**{name: value for name, value in outputs.items() if name.endswith("_loss")})
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
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


def save_run(output_dir: str, command: str, **arguments) -> None:
    """Write the resolved arguments beside the checkpoint, as `training.json`."""
    document = {"command": command}
    for name, value in arguments.items():
        document[name] = value.to_dict() if hasattr(value, "to_dict") else vars(value)
    path = Path(output_dir, "training.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2, default=str) + "\n", encoding="utf-8")
