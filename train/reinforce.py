"""Stage 3, after `tune`: reinforce descriptions that are true of their cells (GRPO).

```
python -m scmmgpt.train reinforce --config train/configs/reinforce_tiny.yaml --corpus DIR --checkpoint DIR \
    --output_dir DIR
```

The model writes `num_generations` descriptions of each cell. Training makes the descriptions with a higher reward more
likely. Rewards need no reference text: they compare a description with the cell type (by the Cell Ontology) and the
counts of the cell (`train/rewards.py`). Only LoRA on the language model is trained.

`--output_dir` holds a complete checkpoint with LoRA merged. `--output_dir/adapter` holds LoRA alone, which belongs to
`--checkpoint`. [`CellGRPOTrainer`] takes any dataset of cells and any rewards.
"""

import functools
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


TYPE_COLUMNS = ("cell_type", "cell_type_ontology_term_id")


class EpochSampler(RepeatSampler):
    """TRL's order of prompts, seeded by seed and epoch, so that a resumed run repeats the order of its epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; `Trainer` calls this method at the start of every epoch."""
        if self.shuffle:
            self.generator.manual_seed((self.seed or 0) + epoch)


class CellGRPOTrainer(CheckpointTrainer, GRPOTrainer):
    """`GRPOTrainer` for prompts that show a cell.

    TRL's trainer supports texts and images. This trainer passes the inputs of a row's cell on with the row: into
    generation, through the shuffling of completions, and into every pass that computes log-probabilities.

    A row of the dataset has one cell, as the columns `cell_id`, `gene_ids` and `counts` or as `cells`. The optional
    column `prompt` is a text or messages with one `<cell>`. Reward functions get the other columns, and
    `expressed_genes`: the vocabulary ids of the cell's genes with a count.

    Args:
        processing_class: The checkpoint's [`ScMMGPTProcessor`].
        prompt: Prompt of rows without a `prompt`; default: the checkpoint's prompt for descriptions.
        kwargs: Arguments of `GRPOTrainer` and [`CheckpointTrainer`].

    Raises:
        ValueError: If an option of `GRPOTrainer` is given that takes texts alone or makes prompts without cells.
    """

    def __init__(
        self, model: Any, *, args: Any, processing_class: Any, prompt: str | None = None, **kwargs: Any
    ) -> None:
        if args.use_vllm or args.use_transformers_continuous_batching:
            raise ValueError("use_vllm and use_transformers_continuous_batching take texts only; prompts show cells.")
        if refused := [name for name in ("tools", "rollout_func", "environment_factory") if kwargs.get(name)]:
            raise ValueError(f"{refused[0]} makes prompts without cells; leave it out.")
        self.prompt = processing_class.render_prompt("describe") if prompt is None else prompt
        self._shown = Cells.from_rows([])  # cells of the current prompts
        self._cells: dict[str, torch.Tensor] = {}  # model inputs of the cells of the current rows
        # A generated `<cell>` would be a placeholder without a cell.
        without_placeholder = {"suppress_tokens": [processing_class.cell_token_id]}
        args.generation_kwargs = without_placeholder | (args.generation_kwargs or {})
        super().__init__(model=model, args=args, processing_class=processing_class.tokenizer, **kwargs)
        # Set after TRL's `__init__`, which checks whether the class processes images.
        self.processing_class: Any = processing_class

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
        return super()._generate_and_score_completions(rows) | self._cells  # TRL splits these inputs with the rows

    def _tokenize_prompts(self, prompts: list) -> tuple[list[list[int]], None, dict[str, torch.Tensor]]:
        """Return the token ids of the prompts, placeholders of cells included, and the model inputs of the cells."""
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
        """TRL's method divides the rows into pieces; a hook adds the cells of each piece."""
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
    """Load the cells of a split and their types; the library `datasets` memory-maps a copy in its cache."""
    files = [str(corpus.path / shard.path) for shard in corpus.shards(split)]
    cells = datasets.load_dataset("parquet", data_files=files, split="train", features=corpus.features())
    return cells.select_columns([*CELL_COLUMNS, *TYPE_COLUMNS])


def load_model(checkpoint: str) -> tuple[ScMMGPTForConditionalGeneration, ScMMGPTProcessor]:
    """Load the model and the processor of a checkpoint of `tune`; the model's name is the absolute path."""
    config = ScMMGPTForConditionalGeneration.config_class.from_pretrained(checkpoint)
    architecture = (config.architectures or [""])[0]
    if architecture != "ScMMGPTForConditionalGeneration":
        raise ValueError(f"{checkpoint} holds a {architecture}; name a checkpoint of `tune`.")
    model = ScMMGPTForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    if Path(checkpoint).is_dir():
        model.name_or_path = model.config._name_or_path = str(Path(checkpoint).absolute())
    return model, ScMMGPTProcessor.from_pretrained(checkpoint)


def render_question(processor: ScMMGPTProcessor, question: str | None) -> str | None:
    """Render a question as `scmmgpt describe` does; a question without `<cell>` gets the cell in front."""
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
    """Load the checkpoint and its cells, train with GRPO, save.

    `cells` maps splits to datasets of the library `datasets`, map-style or streamed, that replace the corpus's cells;
    `reward_funcs`, reward functions of `GRPOTrainer`, replace the option `rewards`.
    """
    torch.manual_seed(training_args.seed)
    corpus = open_corpus(data_args.corpus)
    model, processor = load_model(model_args.checkpoint)
    corpus.check_vocabulary(processor.gene_tokenizer.get_vocab(), model_args.checkpoint)
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
