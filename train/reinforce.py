"""After `tune`: reinforce descriptions whose statements are true of their cells (GRPO).

```
python -m scmmgpt.train reinforce --config train/configs/reinforce_tiny.yaml --corpus DIR --checkpoint DIR \
    --output_dir DIR
```

The model writes `num_generations` descriptions of each cell, and those with a higher reward than the others become
likelier. Rewards need no reference text. They need what the corpus knows of the cell: its type, with the Cell
Ontology, and its counts (`train/rewards.py`). LoRA on the language model is all that is trained.

`--output_dir` holds a complete checkpoint with LoRA merged. `--output_dir/adapter` holds LoRA alone, which belongs to
`--checkpoint`. [`CellGRPOTrainer`] takes any dataset of cells and any rewards.
"""

import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from peft import LoraConfig, PeftModel
from torch.utils.data import Sampler
from trl import GRPOTrainer
from trl.trainer.utils import RepeatSampler

from scmmgpt.cells_scmmgpt import Cells
from scmmgpt.collator_scmmgpt import read_rows
from scmmgpt.modeling_scmmgpt import PROMPT_CELL_INPUTS, ScMMGPTForConditionalGeneration
from scmmgpt.processing_scmmgpt import ScMMGPTProcessor
from scmmgpt.train import adapter
from scmmgpt.train.align import finish
from scmmgpt.train.arguments import ReinforceConfig, ReinforceDataArguments, ReinforceModelArguments
from scmmgpt.train.card import write_card
from scmmgpt.train.data.corpus import CELL_COLUMNS, Corpus, open_corpus
from scmmgpt.train.options import OptionParser
from scmmgpt.train.rewards import reward_functions
from scmmgpt.train.trainer import CheckpointTrainer, data_seed


logger = logging.getLogger(__name__)

TYPE_COLUMNS = ("cell_type", "cell_type_ontology_term_id")


class EpochSampler(RepeatSampler):
    """TRL's order of prompts, drawn by seed and epoch, so that a resumed run finds it in every epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; `Trainer` calls this at the start of each."""
        if self.shuffle:
            self.generator.manual_seed((self.seed or 0) + epoch)


class CellGRPOTrainer(CheckpointTrainer, GRPOTrainer):
    """`GRPOTrainer` for prompts that show a cell.

    TRL's trainer knows texts and images. Here the inputs of a row's cell go with the row: into generation, through the
    shuffling of completions, and into every pass that computes log-probabilities.

    Rows of the dataset have one cell each, as the columns `cell_id`, `gene_ids` and `counts` or as `cells`, and a
    `prompt`, a text or messages, with one `<cell>`. Rewards get the other columns, and `expressed_genes`: the
    vocabulary ids of the cell's genes with a count.

    Args:
        processing_class: The checkpoint's [`ScMMGPTProcessor`].
        prompt: The prompt of rows without one; by default the checkpoint's for descriptions.
        kwargs: For `GRPOTrainer` and [`CheckpointTrainer`].
    """

    def __init__(
        self, model: Any, *, args: Any, processing_class: Any, prompt: str | None = None, **kwargs: Any
    ) -> None:
        if args.use_vllm or args.use_transformers_continuous_batching:
            raise ValueError("use_vllm and use_transformers_continuous_batching take texts alone; prompts show cells.")
        if refused := [name for name in ("tools", "rollout_func", "environment_factory") if kwargs.get(name)]:
            raise ValueError(f"{refused[0]} makes prompts of its own, which have no cells; leave it out.")
        self.prompt = processing_class.render_prompt("describe") if prompt is None else prompt
        self._shown = Cells.from_rows([])  # of the prompts at hand
        self._cells: dict[str, torch.Tensor] = {}  # inputs of the cells of the rows at hand
        never = {"suppress_tokens": [processing_class.cell_token_id]}  # a placeholder without a cell
        args.generation_kwargs = never | (args.generation_kwargs or {})
        super().__init__(model=model, args=args, processing_class=processing_class.tokenizer, **kwargs)
        self.processing_class: Any = processing_class  # after TRL has made sure that it handles no images

    def _get_train_sampler(self, dataset: Any = None) -> Sampler:
        sampler: Any = super()._get_train_sampler(dataset)
        settings = ("mini_repeat_count", "batch_size", "repeat_count", "shuffle", "seed")
        return EpochSampler(sampler.data_source, **{name: getattr(sampler, name) for name in settings})

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        self.turn_off_frozen_dropout()  # before generation, and before the loss
        return super()._prepare_inputs(generation_batch)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        cells, _ = read_rows(inputs, self.processing_class)
        if cells is None or len(cells) != len(inputs):
            raise ValueError(
                f"{len(inputs)} prompts come with {0 if cells is None else len(cells)} cells; a row has one, as "
                "`cell_id`, `gene_ids` and `counts`, or as `cells`."
            )
        self._shown = cells
        parts = np.split(cells.gene_ids, cells.indptr[1:-1])
        rows = []
        for row, genes in zip(inputs, parts, strict=True):
            columns = {name: value for name, value in row.items() if name not in (*CELL_COLUMNS, "cells")}
            rows.append({"prompt": self.prompt, **columns, "expressed_genes": set(genes.tolist())})
        return super()._generate_and_score_completions(rows) | self._cells  # which splits with the rows

    def _tokenize_prompts(self, prompts: list) -> tuple[list[list[int]], None, dict[str, torch.Tensor]]:
        """The prompts with the places of their cells, and the inputs of the cells for generation."""
        options = {"add_generation_prompt": True, "tokenize": False}
        render = functools.partial(self.processing_class.apply_chat_template, **options)
        texts = [prompt if isinstance(prompt, str) else render(prompt) for prompt in prompts]
        for text in texts:
            if (mentioned := text.count(self.processing_class.cell_token)) != 1:
                token = self.processing_class.cell_token
                raise ValueError(f"A prompt mentions {mentioned} cells; write {token} once: {text!r}.")
        inputs = self.processing_class(text=texts, cells=self._shown).to(self.args.device)
        self._cells = {name: inputs[name] for name in PROMPT_CELL_INPUTS if name in inputs}
        rows = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        return [ids[mask.bool()].tolist() for ids, mask in rows], None, self._cells

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        self._cells = {name: inputs[name] for name in PROMPT_CELL_INPUTS if name in inputs}
        return super()._compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """TRL's method, which divides the rows into pieces; each piece gets its cells."""
        done = 0

        def add_cells(module: torch.nn.Module, args: tuple, inputs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            nonlocal done
            rows = slice(done, done + len(inputs["input_ids"]))
            done = rows.stop
            return args, inputs | {name: value[rows] for name, value in self._cells.items()}

        hook = model.register_forward_pre_hook(add_cells, with_kwargs=True)
        try:
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        finally:
            hook.remove()


def load_cells(corpus: Corpus, split: str) -> datasets.Dataset:
    """Cells of a split and their types, memory-mapped by `datasets`, which keeps a copy in its cache."""
    files = [str(corpus.path / shard.path) for shard in corpus.shards(split)]
    cells = datasets.load_dataset("parquet", data_files=files, split="train", features=corpus.features())
    return cells.select_columns([*CELL_COLUMNS, *TYPE_COLUMNS])


def load_model(checkpoint: str) -> tuple[ScMMGPTForConditionalGeneration, ScMMGPTProcessor]:
    """The model of a checkpoint of `tune`, which names itself by its absolute path, and its processor."""
    config = ScMMGPTForConditionalGeneration.config_class.from_pretrained(checkpoint)
    architecture = (config.architectures or [""])[0]
    if architecture != "ScMMGPTForConditionalGeneration":
        raise ValueError(f"{checkpoint} holds a {architecture}; name a checkpoint of `tune`.")
    model = ScMMGPTForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    if Path(checkpoint).is_dir():
        model.name_or_path = model.config._name_or_path = str(Path(checkpoint).absolute())
    return model, ScMMGPTProcessor.from_pretrained(checkpoint)


def render_question(processor: ScMMGPTProcessor, question: str | None) -> str | None:
    """A question in the form of `scmmgpt describe`: a question without `<cell>` follows the cell."""
    if question is None:
        return None
    token = processor.cell_token
    return processor.render_question(question if token in question else f"{token}\n{question}")


def make_parser(prog: str | None = None) -> OptionParser:
    """The command line."""
    parts = ReinforceDataArguments, ReinforceModelArguments, ReinforceConfig
    return OptionParser(parts, prog=prog, description=__doc__)


def main(
    data_args: ReinforceDataArguments,
    model_args: ReinforceModelArguments,
    training_args: ReinforceConfig,
    *,
    cells: Mapping[str, Any] | None = None,
    reward_funcs: list[Callable[..., list[float | None]]] | None = None,
) -> None:
    """Describe, compare, train, save.

    Args:
        cells: Split -> dataset of the library `datasets`, map-style or streamed, in place of the corpus's cells.
        reward_funcs: Rewards in place of those that `rewards` names, as `GRPOTrainer` takes them.
    """
    torch.manual_seed(training_args.seed)
    corpus = open_corpus(data_args.corpus)
    model, processor = load_model(model_args.checkpoint)
    open_corpus(corpus.path, vocabulary=processor.gene_tokenizer.get_vocab(), verify=False)  # refuses another one
    evaluates = training_args.eval_strategy != "no"
    if cells is None:
        names = ["train", "validation"] if evaluates and "validation" in corpus.split_names else ["train"]
        cells = {split: load_cells(corpus, split) for split in names}
    validation = cells.get("validation") if evaluates else None
    if isinstance(validation, datasets.Dataset):
        shuffled = validation.shuffle(seed=data_seed(training_args), keep_in_memory=True)
        validation = shuffled.select(range(min(len(shuffled), data_args.validation_cells)))
    elif validation is not None:
        validation = validation.take(data_args.validation_cells)
    if reward_funcs is None:
        reward_funcs = reward_functions(model_args.rewards, processor.gene_index)
    lora: dict[str, Any] = {"target_modules": model.lora_target_modules, "task_type": "CAUSAL_LM"}
    bases: dict[str, Any] = {"checkpoint": model_args.checkpoint}
    trainer = CellGRPOTrainer(
        model,
        args=training_args,
        processing_class=processor,
        prompt=render_question(processor, data_args.question),
        reward_funcs=reward_funcs,
        train_dataset=cells["train"],
        eval_dataset=validation,
        peft_config=LoraConfig(**lora | model_args.lora_config),
        write_card=functools.partial(write_card, command="reinforce", corpus=corpus, **bases),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    if isinstance(trainer.model, PeftModel) and trainer.is_world_process_zero():
        adapter.save_adapter(trainer)
    trainer.model = adapter.merge(trainer.model, model, in_4bit=False)
    finish(trainer, "reinforce", data=data_args, model=model_args, training=training_args)
