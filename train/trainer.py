"""Trainers on streamed batches: exact resuming, two learning rates, and a log line per component of the loss."""

import json
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from peft.utils import CONFIG_NAME
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from scmmgpt.commands.files import obey_umask, read_json
from scmmgpt.train.data.batches import BatchDataset
from scmmgpt.train.data.corpus import Corpus
from scmmgpt.train.data.order import BALANCE_TEMPERATURE
from scmmgpt.train.data.streamed import open_cells


SHOWN = 5  # most names that an error lists
UNFINISHED = ".checkpoint-unfinished"  # where a checkpoint is while it is being written


def data_seed(training_args: TrainingArguments) -> int:
    """Seed of the order of cells, of captions, and of all random draws of batches."""
    return training_args.seed if training_args.data_seed is None else training_args.data_seed


def make_datasets(
    corpus: Corpus,
    collate: Callable[..., Mapping[str, Any]],
    training_args: TrainingArguments,
    *,
    cells: Mapping[str, Any] | None = None,
    columns: list[str] | None = None,
    token_budget: int | None = None,
    **order: Any,
) -> tuple[BatchDataset, BatchDataset | None]:
    """Make the training and validation batches of this rank.

    Args:
        collate: See [`BatchDataset`].
        cells: Split -> dataset, map-style or streamed, that replaces the corpus's cells; see [`open_cells`].
        columns: Annotations that `collate` takes; default: all except the barcode.
        token_budget: Most tokens of a training batch; replaces `per_device_train_batch_size`.
        order: More settings of the training [`CellStream`].

    Returns:
        Training batches, and validation batches or `None` if `eval_strategy` is "no" or there is no such split.
    """
    shared: dict[str, Any] = {"columns": columns}
    shared |= {"rank": training_args.process_index, "world_size": training_args.world_size}
    if token_budget is not None:
        order["token_budget"] = token_budget
    else:
        order["batch_size"] = training_args.per_device_train_batch_size
        order["drop_last"] = training_args.dataloader_drop_last
    splits: Mapping[str, Any] = dict.fromkeys(corpus.split_names, corpus) if cells is None else cells
    if "train" not in splits:
        raise ValueError(f"There is no split 'train' to train on; the splits are {list(splits)}. Add it.")
    order |= {"seed": data_seed(training_args), "temperature": BALANCE_TEMPERATURE}
    stream = open_cells(splits["train"], **order, **shared)
    train = BatchDataset(stream, collate)
    if splits.get("validation") is None or training_args.eval_strategy == "no":
        return train, None
    eval_size = training_args.per_device_eval_batch_size
    validation = open_cells(splits["validation"], "validation", batch_size=eval_size, shuffle=False, **shared)
    return train, BatchDataset(validation, collate)


def as_batches(
    dataset: Any, collator: Any, training_args: TrainingArguments, split: str = "train"
) -> BatchDataset | None:
    """Make this rank's batches of a map-style or streamed dataset with a cell in every row; see [`open_cells`].

    A map-style training set is shuffled; a streamed dataset keeps its order.
    """
    if dataset is None or isinstance(dataset, BatchDataset):
        return dataset
    if collator is None:
        raise ValueError("A dataset of rows needs a data_collator: `processor.data_collator()`.")
    trains = split == "train"
    size = training_args.per_device_train_batch_size if trains else training_args.per_device_eval_batch_size
    settings: dict[str, Any] = {"batch_size": size, "shuffle": trains, "seed": data_seed(training_args)}
    settings |= {"rank": training_args.process_index, "world_size": training_args.world_size}
    settings["drop_last"] = trains and training_args.dataloader_drop_last
    return BatchDataset(open_cells(dataset, split, **settings), getattr(collator, "collate", collator))


class BatchLoader(DataLoader):
    """Loads a [`BatchDataset`], in which one example is one finished batch."""

    dataset: BatchDataset

    def __init__(self, dataset: BatchDataset) -> None:
        super().__init__(dataset, batch_size=None)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; `Trainer` calls this method at the start of every epoch."""
        self.dataset.set_epoch(epoch)


class ResumedPosition(TrainerCallback):
    """Moves the training data to the position of a resumed run.

    `Trainer` reloads the finished batches of the epoch and discards them, without setting the epoch first. This
    callback sets the epoch, and [`BatchDataset.skim`] makes the discarded batches empty.
    """

    def __init__(self, dataset: BatchDataset) -> None:
        self.dataset = dataset

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compute epoch and batch from `state.global_step`, which is 0 for a new run."""
        steps_per_epoch = max(-(-len(self.dataset) // args.gradient_accumulation_steps), 1)
        epoch, step = divmod(state.global_step, steps_per_epoch)
        self.dataset.set_epoch(epoch)
        self.dataset.skim(0 if args.ignore_data_skip else step * args.gradient_accumulation_steps)


class CheckpointTrainer(Trainer):
    """`Trainer` that writes every checkpoint whole or not at all, with the model card of this project.

    To combine this trainer with a trainer of TRL, make this class the first base.

    Args:
        write_card: `write_card(folder, log_history=..., repo_id=...)` writes the model card instead of `Trainer`; with
            `adapter_base=..., base_revision=...` the card of an adapter. Default: the card of `Trainer`.
    """

    model: torch.nn.Module
    args: Any  # `TrainingArguments` and the fields of `RunArguments`

    def __init__(self, *args: Any, write_card: Callable[..., object] | None = None, **kwargs: Any) -> None:
        self.write_card = write_card
        self._unfinished: Path | None = None  # folder of the checkpoint that is being written
        self._frozen_modules: list[torch.nn.Module] | None = None
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled:
            flatten_scalars(self.model)

    def turn_off_frozen_dropout(self) -> None:
        """Turn off dropout in frozen parts, because `Trainer` sets the whole model to training mode at every step."""
        if self._frozen_modules is None:
            self._frozen_modules = frozen_modules(self.model)
        for module in self._frozen_modules:
            module.training = False

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the model card of this project: data, origins of the parts, metrics and limits."""
        if self.write_card is None:
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            repo_id = None if self.hub is None else self.hub["repo_id"]
            self.write_card(self.args.output_dir, log_history=self.state.log_history, repo_id=repo_id)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuse a checkpoint with other weights: the weights that it lacks would silently be initialised again."""
        own = set(load_result.missing_keys) - set(getattr(self.model, "all_tied_weights_keys", None) or ())
        if own or load_result.unexpected_keys:
            raise ValueError(
                f"The checkpoint to resume lacks the weights {sorted(own)[:SHOWN]} of the model and has the weights "
                f"{sorted(load_result.unexpected_keys)[:SHOWN]}, which the model lacks. Resume with the release and "
                "the options that wrote the checkpoint, or start again in another --output_dir."
            )

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._unfinished is None else str(self._unfinished)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._unfinished is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write `checkpoint-N` to a hidden folder and then rename it, so that a killed run leaves no part of one."""
        run_dir, state = Path(self._get_output_dir(trial)), self.state
        name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        self._unfinished = run_dir / UNFINISHED
        if self.args.should_save:
            shutil.rmtree(self._unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
        finally:
            whole, self._unfinished = self._unfinished / name, None
        if self.args.should_save:
            best = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
            if state.best_global_step and (best.name == name or best.exists()):
                state.best_model_checkpoint = str(best)
                state.save_to_json(str(whole / TRAINER_STATE_NAME))
            shutil.rmtree(run_dir / name, ignore_errors=True)  # an earlier run may have written the same step
            whole.rename(run_dir / name)
            whole.parent.rmdir()
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run_dir / name))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if state_dict is not None and self.is_fsdp_enabled:  # undo `flatten_scalars`
            for name in [name for name in state_dict if name.endswith("logit_scale")]:
                state_dict[name] = state_dict[name].reshape(())
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            if isinstance(self.model, PeftModel):  # in place of PEFT's empty template
                self.write_adapter_card(output_dir or str(self.args.output_dir))
            obey_umask(output_dir or self.args.output_dir)

    def write_adapter_card(self, folder: str) -> None:
        """Write the card of the adapter in a folder; the card names the base of `adapter_config.json`."""
        if self.write_card is None:
            return
        config = read_json(Path(folder, CONFIG_NAME))
        base = {"adapter_base": config["base_model_name_or_path"], "base_revision": config.get("revision")}
        is_pushed = self.hub is not None and Path(folder).name == "adapter"
        repo_id = f"{self.hub_model_id}-adapter" if is_pushed else None
        self.write_card(folder, log_history=self.state.log_history, repo_id=repo_id, **base)

    @property
    def hub(self) -> dict[str, Any] | None:
        """Arguments of [`push_folder`] for the checkpoint's repository; `None` without `push_to_hub`."""
        if not self.args.push_to_hub:
            return None
        args = {"private": self.args.hub_private_repo, "token": self.args.hub_token}
        return {"repo_id": self.hub_model_id, "revision": self.args.hub_revision, **args}


class StreamTrainer(CheckpointTrainer):
    """`Trainer` over [`BatchDataset`]s. To combine it with a trainer of TRL, make `StreamTrainer` the first base.

    Args:
        train_dataset, eval_dataset: [`BatchDataset`]s, or datasets with a cell in every row, which [`as_batches`]
            turns into batches.
        data_collator: Collator for datasets of rows: [`ScMMGPTDataCollator`], or `collate(cells, columns, epoch=...)`.
        is_pretrained: Name of a parameter -> whether the parameter learns at `args.pretrained_learning_rate`; default:
            none does.
        kwargs: Arguments of [`CheckpointTrainer`].
    """

    train_dataset: BatchDataset
    eval_dataset: BatchDataset

    def __init__(
        self,
        model: torch.nn.Module,
        args: TrainingArguments,
        *,
        train_dataset: Any,
        eval_dataset: Any = None,
        data_collator: Any = None,
        is_pretrained: Callable[[str], bool] = lambda name: False,
        **kwargs: Any,
    ) -> None:
        train_dataset = as_batches(train_dataset, data_collator, args)
        eval_dataset = as_batches(eval_dataset, data_collator, args, "validation")
        self.is_pretrained = is_pretrained
        self.losses_by_name: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._last_log: tuple[float, int] | None = None  # time, and cells so far
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=dict,  # a `BatchDataset` yields collated batches
            **kwargs,
        )
        self.add_callback(ResumedPosition(self.train_dataset))

    def get_train_dataloader(self) -> BatchLoader:
        """Finished batches of this rank."""
        return BatchLoader(self.train_dataset)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> BatchLoader:
        """Finished validation batches of this rank."""
        return BatchLoader(self.eval_dataset)

    def num_examples(self, dataloader: DataLoader) -> int:
        """Number of cells, because cells are the unit of epochs and of speed."""
        assert isinstance(dataloader.dataset, BatchDataset)
        return dataloader.dataset.n_cells

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create the optimizer of `Trainer`, with separate parameter groups for the pretrained parameters."""
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
        described = []
        for (pretrained, decay), parameters in groups.items():
            rate = self.args.pretrained_learning_rate if pretrained else self.args.learning_rate
            weight_decay = self.args.weight_decay if decay else 0.0
            described.append({"params": parameters, "lr": rate, "weight_decay": weight_decay})
        self.optimizer = optimizer_class(described, **options)
        return self.optimizer

    def record_losses(self, **losses: torch.Tensor | None) -> None:
        """Keep components of the loss for the next log line; in evaluation under the names `eval_*`."""
        prefix = "" if self.model.training else "eval_"
        for name, loss in losses.items():
            if loss is not None:
                self.losses_by_name[prefix + name].append(loss.detach())

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, in addition, the mean of every loss component over all ranks and, in training, the cells per second."""
        if "loss" in logs:
            now, n_cells = time.perf_counter(), self.train_dataset.n_cells_read * self.args.world_size
            if self._last_log is not None:
                then, n_before = self._last_log
                logs["cells_per_second"] = round((n_cells - n_before) / (now - then), 2)
            self._last_log = now, n_cells
        prefix = "eval_" if any(name.startswith("eval_") for name in logs) else ""
        names = [name for name in self.losses_by_name if name.startswith("eval_") == bool(prefix)]
        own = {name: torch.stack(self.losses_by_name.pop(name)).float() for name in names}
        # Ranks may have different components: a rank whose batches describe no cell has no language loss.
        ranks = gather_object([{name: (values.sum().item(), len(values)) for name, values in own.items()}])
        for name in sorted({name for rank in ranks for name in rank}):
            totals, counts = zip(*(rank[name] for rank in ranks if name in rank), strict=True)
            logs[name] = round(sum(totals) / sum(counts), 4)
        super().log(logs, *args, **kwargs)

    def prediction_step(
        self, model: torch.nn.Module, inputs: dict, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor, None, None]:
        """Return the loss alone, because nothing uses the outputs of a whole validation split."""
        with torch.no_grad():
            loss: Any = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None


class ModelLossTrainer(StreamTrainer):
    """Trainer of a model whose output has `loss`, and components of the loss named `*_loss`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # `Trainer` averages losses, which are means, over accumulation steps

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the model's own loss, and keep the components for the log."""
        self.turn_off_frozen_dropout()
        outputs = model(**inputs)
        self.record_losses(**{name: value for name, value in outputs.items() if name.endswith("_loss")})
        return (outputs.loss, outputs) if return_outputs else outputs.loss


def flatten_scalars(model: torch.nn.Module) -> None:
    """Turn scalar parameters, which FSDP refuses, into vectors of length 1."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dim() == 0:
                flat = torch.nn.Parameter(parameter.detach()[None], requires_grad=parameter.requires_grad)
                setattr(module, name, flat)


def freeze(model: torch.nn.Module, should_freeze: Callable[[str], bool]) -> None:
    """Turn off the gradients of the parameters whose names `should_freeze` accepts."""
    for name, parameter in model.named_parameters():
        if should_freeze(name):
            parameter.requires_grad_(False)


def frozen_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """List the modules of parts without trained parameters, in which dropout is turned off.

    Dropout is a module, or a function that a module (for example, attention) calls in training mode. Modules with
    `gradient_checkpointing` are left out: they checkpoint only in training mode, and gradients also pass through
    frozen layers.
    """
    parameters = list(model.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        return [module for module in model.modules() if not hasattr(module, "gradient_checkpointing")]
    return [module for child in model.children() for module in frozen_modules(child)]


def save_run(output_dir: str, command: str, **arguments: Any) -> None:
    """Write the resolved arguments beside the checkpoint, as `training.json`."""
    values = {name: item.to_dict() if hasattr(item, "to_dict") else vars(item) for name, item in arguments.items()}
    path = Path(output_dir, "training.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"command": command, **values}, indent=2, default=str) + "\n", encoding="utf-8")
