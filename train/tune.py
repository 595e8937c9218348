"""Stage 2: teach a language model to describe cells, and the cell model to generate them from texts.

```
python -m scmmgpt.train tune --config train/configs/tune_demo.yaml --corpus DIR --aligned DIR --output_dir DIR
accelerate launch --num_processes 8 -m scmmgpt.train tune --config train/configs/tune_base.yaml --corpus ...
```

`--output_dir` holds a complete checkpoint; with LoRA, `--output_dir/adapter` also holds the adapter alone, and
`--output_dir/base` the model that it adapts. The checkpoint loads in float32 unless `dtype` names another type.
Weights of a lower `--language_model_precision` are stored in bfloat16.
"""

import dataclasses
import functools
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTTrainer

from scmmgpt.modeling_scmmgpt import ScMMGPTForCellTextAlignment, ScMMGPTForConditionalGeneration
from scmmgpt.processing_scmmgpt import ScMMGPTProcessor
from scmmgpt.train import adapter, initialize
from scmmgpt.train.align import CELL_DECODERS, finish, make_captions
from scmmgpt.train.arguments import TrainedParts, TuneConfig, TuneDataArguments, TuneModelArguments
from scmmgpt.train.card import write_card
from scmmgpt.train.data.captions import CaptionSampler, read_gene_means
from scmmgpt.train.data.collate import TuningCollator
from scmmgpt.train.data.corpus import Corpus, open_corpus
from scmmgpt.train.data.instructions import InstructionBatches, read_instructions
from scmmgpt.train.language_model import add_lora, build_language_model, skip_other_parts
from scmmgpt.train.options import OptionParser
from scmmgpt.train.states import fit_cell_states
from scmmgpt.train.trainer import StreamTrainer, data_seed, freeze, make_datasets


logger = logging.getLogger(__name__)

PROJECTOR = {"num_hidden_layers": 2, "cross_attention_frequency": 1}  # other fields are those of the Q-Former
NEW_PARTS = ("language_projection", "label_projection", "text_to_cell", "expression_head")


class TuneTrainer(StreamTrainer, SFTTrainer):
    """`SFTTrainer` with TRL's language loss, plus the expression loss of generated cells.

    TRL runs the backbone and computes the language loss from the last hidden states. TRL ignores other losses of
    `forward`, so a hook takes the expression loss from the same pass of the backbone.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.num_targets_in_batch: int | None = None
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # TRL divides the loss by the tokens of the whole step

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Also count the target genes of the whole step, so that every gene has the same weight in the step's loss."""
        samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        targets = torch.tensor(sum(count_targets(batch) for batch in samples), device=device)
        self.num_targets_in_batch = int(self.accelerator.gather(targets).sum())
        return samples, num_items

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return `language_weight` * TRL's loss + `expression_weight` * mean loss over target genes."""
        self.turn_off_frozen_dropout()
        unwrapped: Any = self.accelerator.unwrap_model(model)
        backbone: Any = unwrapped.get_base_model() if isinstance(unwrapped, PeftModel) else unwrapped
        outputs: list = []
        # The head costs as much as the layers, so only states with a label pass through the head; prompts have none.
        labels = inputs["labels"][:, 1:]
        labelled = labels != -100

        def keep_labelled(module: torch.nn.Module, args: Any, output: Any) -> Any:
            outputs.append(output)
            return dataclasses.replace(output, last_hidden_state=output.last_hidden_state[:, :-1][labelled][None])

        def show_expression_loss(module: torch.nn.Module, args: Any, output: Any) -> Any:
            # DDP takes a parameter for unused if no returned field depends on it; TRL's output has a field `aux_loss`.
            output["aux_loss"] = outputs[0].expression_loss
            return output

        hooks = [
            backbone.model.register_forward_hook(keep_labelled),
            unwrapped.register_forward_hook(show_expression_loss),
        ]
        scored = {name: value for name, value in inputs.items() if name != "labels"}
        scored["shift_labels"] = targets = labels[labelled][None]  # already shifted, for TRL
        try:
            language_loss = super().compute_loss(model, scored, num_items_in_batch=num_items_in_batch)
        finally:
            for hook in hooks:
                hook.remove()
        loss = backbone.config.language_weight * language_loss
        expression_loss = outputs[0].expression_loss
        n_targets = count_targets(inputs)
        if expression_loss is not None:
            scale = 1.0
            if model.training and self.num_targets_in_batch:
                # Weight the mean over this micro-batch by its share of the step's genes. The number of ranks undoes
                # DDP's averaging of gradients.
                scale = n_targets / self.num_targets_in_batch * self.accelerator.num_processes
            loss = loss + backbone.config.expression_weight * scale * expression_loss
        mean = self.mean_language_loss(language_loss, inputs, num_items_in_batch) if targets.numel() else None
        self.record_losses(language_loss=mean, expression_loss=expression_loss if n_targets else None)
        return (loss, outputs[0]) if return_outputs else loss

    def mean_language_loss(self, loss: torch.Tensor, inputs: dict, num_items_in_batch: Any) -> torch.Tensor:
        """Turn TRL's loss into the mean over the tokens of the micro-batch, for the log.

        TRL divides the loss by the tokens of the whole step, and multiplies it by the number of ranks, because DDP
        averages gradients.
        """
        if num_items_in_batch is None:
            return loss
        n_ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return loss * num_items_in_batch / (inputs["labels"][:, 1:] != -100).sum().clamp(min=1) / n_ranks


def count_targets(batch: dict) -> int:
    """Count the target values of a batch, over all target cells."""
    return int(batch["target_attention_mask"][batch["target_rows"]].sum()) if "target_rows" in batch else 0


def build_model(
    corpus: Corpus, captions: CaptionSampler, model_args: TuneModelArguments, device: torch.device
) -> tuple[ScMMGPTForConditionalGeneration, ScMMGPTProcessor]:
    """Build the model to tune and its processor.

    Raises:
        ValueError: If `aligned` is not a checkpoint of `align`.
    """
    language_model, tokenizer = build_language_model(corpus, captions, model_args, device)
    architecture = (
        ScMMGPTForCellTextAlignment.config_class.from_pretrained(model_args.aligned).architectures or [""]
    )[0]
    if architecture != "ScMMGPTForCellTextAlignment":
        raise ValueError(f"{model_args.aligned} holds a {architecture}; name a checkpoint of `align`.")
    alignment = ScMMGPTForCellTextAlignment.from_pretrained(model_args.aligned, dtype=torch.float32)
    processor = join_processor(model_args.aligned, tokenizer, corpus)
    model = join(alignment, language_model, processor, model_args)
    processor.num_cell_tokens = model.config.num_cell_tokens
    if model.config.cell_tokens != "queries":
        processor.feature_extractor.return_profile = True  # the readout needs whole profiles
    if model_args.language_model_precision == "4bit":  # intermediate checkpoints store the frozen weights in 4 bits
        skip_other_parts(model)
    return model, processor


def join(
    alignment: ScMMGPTForCellTextAlignment,
    language_model: PreTrainedModel,
    processor: ScMMGPTProcessor,
    model_args: TuneModelArguments,
) -> ScMMGPTForConditionalGeneration:
    """Join a stage-1 model and a language model to a stage-2 model; add `<cell>` to the token embeddings."""
    embeddings: Any = language_model.get_input_embeddings()
    if len(processor.tokenizer) > embeddings.num_embeddings:
        language_model.resize_token_embeddings(len(processor.tokenizer))
    projector = alignment.config.qformer_config.to_dict() | PROJECTOR | {"use_qformer_text_input": False}
    projector |= model_args.model_config.get("text_to_cell_config", {})
    cell_tokens = "queries" if alignment.config.label_readout is None else "both"
    fields = {"cell_tokens": cell_tokens, **model_args.model_config, "text_to_cell_config": projector}
    if model_args.trained.qformer and fields.get("num_state_components"):
        logger.warning("No cell states are fitted: they depend on the Q-Former, which this run trains further.")
        fields["num_state_components"] = None
    return ScMMGPTForConditionalGeneration.from_components(
        alignment, language_model, cell_token_id=processor.cell_token_id, **fields
    )


def join_processor(aligned: str, tokenizer: PreTrainedTokenizerBase, corpus: Corpus) -> ScMMGPTProcessor:
    """Join the processor of a stage-1 checkpoint, a language model's tokenizer and the library size of the corpus."""
    start = ScMMGPTProcessor.from_pretrained(aligned)
    open_corpus(corpus.path, vocabulary=start.gene_tokenizer.get_vocab(), verify=False)  # refuses other vocabularies
    parts = start.feature_extractor, tokenizer, start.qformer_tokenizer, start.gene_tokenizer
    lengths: Any = {"num_query_tokens": start.num_query_tokens, "qformer_max_length": start.qformer_max_length}
    processor = ScMMGPTProcessor(*parts, **lengths, library_size=typical_library_size(corpus))
    processor.gene_aliases = start.gene_aliases
    return processor


def saved_parts(trained: TrainedParts, cell_tokens: str = "queries") -> list[str]:
    """List the parts that are trained in full and saved with the LoRA adapter.

    An adapter stores modules only. The query tokens, a parameter of the whole model, therefore keep their values.
    """
    cell_model = {"full": ("cell_model",), "decoders": CELL_DECODERS, "frozen": ()}[trained.cell_model]
    new = [name for name in NEW_PARTS if name != "label_projection" or cell_tokens != "queries"]
    return [*new, *cell_model, *(["qformer", "cell_norm"] if trained.qformer else [])]


def is_frozen(name: str, trained: TrainedParts, expression_head: str) -> bool:
    """Whether a parameter keeps its value in stage 2."""
    name = name.replace("modules_to_save.default.", "").removeprefix("base_model.model.").removeprefix("model.")
    if "original_module." in name or name.startswith("cell_model.embeddings.flag"):
        return True
    if name.startswith("cell_model.expression_decoder.") and expression_head != "mse":
        return True
    if name.startswith("cell_model."):
        decodes = name.startswith(CELL_DECODERS)
        return trained.cell_model == "frozen" or (trained.cell_model == "decoders" and not decodes)
    if name.startswith(NEW_PARTS):
        return False
    if name.startswith(("language_model.", "lm_head.")):
        return trained.language_model == "frozen" or (trained.language_model == "lora" and "lora_" not in name)
    if name.startswith(("qformer.", "query_tokens", "query_means", "cell_norm.")):
        return not trained.qformer
    # No loss of stage 2 reaches contrast, matching and the text branch; the states of cells have a fit of their own.
    return True


def unused_parts(text_to_cell_ratio: float, has_instructions: bool, cell_tokens: str) -> tuple[str, ...]:
    """Parts that no loss reaches: those of generation, or those of description, where no cell needs them."""
    if text_to_cell_ratio == 1 and not has_instructions:
        return (".language_projection.", ".label_projection.")
    unused = (".language_projection.",) if cell_tokens == "labels" else ()
    return (*unused, ".text_to_cell.", ".expression_head.") if text_to_cell_ratio == 0 else unused


def is_pretrained(name: str) -> bool:
    """Whether a parameter learns at `pretrained_learning_rate`: parts of stage 1, and the text-to-cell Q-Former.

    At the learning rate of the heads, the post-norm layers of the text-to-cell Q-Former lose the differences between
    texts.
    """
    return "qformer." in name or ("cell_model." in name and "_decoder." not in name)


def typical_library_size(corpus: Corpus) -> float:
    """Median library size of the first 100,000 training cells."""
    sizes: list[np.ndarray] = []
    for cells, _ in corpus.row_groups("train", columns=[]):
        sizes.append(cells.library_sizes())
        if sum(map(len, sizes)) >= 100_000:
            break
    return float(np.median(np.concatenate(sizes)))


def make_parser(prog: str | None = None) -> OptionParser:
    """The command line."""
    return OptionParser((TuneDataArguments, TuneModelArguments, TuneConfig), prog=prog, description=__doc__)


def main(
    data_args: TuneDataArguments,
    model_args: TuneModelArguments,
    training_args: TuneConfig,
    *,
    cells: Mapping[str, Any] | None = None,
) -> None:
    """Join the models, initialise the new parts, train, save.

    Args:
        cells: See [`make_datasets`].
    """
    torch.manual_seed(training_args.seed)
    corpus = open_corpus(data_args.corpus)
    captions = make_captions(corpus, data_args, training_args)
    model, processor = build_model(corpus, captions, model_args, training_args.device)
    measured = np.array([i for name, i in corpus.vocabulary.items() if not name.startswith("<")], dtype=np.int64)
    collate = TuningCollator(
        processor,
        captions,
        text_to_cell_ratio=training_args.text_to_cell_ratio,
        prompts_per_epoch=training_args.prompts_per_epoch,
        target_genes=measured,
    )
    train_dataset, eval_dataset = make_datasets(corpus, collate, training_args, cells=cells, balance=data_args.balance)
    instructions = None
    if data_args.instructions:
        limit = getattr(model.config.text_config, "max_position_embeddings", None)
        instructions = read_instructions(data_args.instructions, corpus, processor, max_tokens=limit)
    # FSDP broadcasts no weights, so every rank computes the same initial weights from the same cells.
    initialize.start_from_mean_profile(model, read_gene_means(corpus.path))
    if model.config.cell_tokens != "labels":
        initialize.standardize_language_projection(model, train_dataset.of_all_ranks())
    if model.config.cell_tokens != "queries":
        initialize.start_label_projection(model, processor)
    if training_args.text_to_cell_ratio > 0:
        initialize.standardize_text_to_cell(model, train_dataset.of_all_ranks())
    if model.config.num_state_components is not None:
        seed = data_seed(training_args)
        fit_cell_states(model, corpus, captions, processor, seed=seed, balance=data_args.balance)
    if instructions is not None:
        ratio, seed = data_args.instruction_ratio, data_seed(training_args)
        train_dataset = InstructionBatches(train_dataset, instructions, ratio=ratio, seed=seed)
    lora = add_lora(model_args, saved_parts(model_args.trained, model.config.cell_tokens))
    if lora is not None:
        resumed, writes = training_args.resume_from_checkpoint is not None, training_args.process_index == 0
        adapter.save_base(model, processor, str(training_args.output_dir), resumed=resumed, writes=writes)
    language_model = None if model_args.language_model == "scratch" else model_args.language_model
    bases: dict[str, Any] = {"aligned": model_args.aligned, "language_model": language_model}
    card = functools.partial(write_card, command="tune", corpus=corpus, **bases)
    trainer = TuneTrainer(
        model=model,
        args=training_args,
        processing_class=processor,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=lora,
        is_pretrained=is_pretrained,
        write_card=card,
    )
    in_4bit = model_args.language_model_precision == "4bit"
    if in_4bit and trainer.is_fsdp_enabled:
        raise ValueError("FSDP cannot shard a language model in 4 bits; use DDP, or language_model_precision 'bf16'.")
    unused = unused_parts(training_args.text_to_cell_ratio, instructions is not None, model.config.cell_tokens)
    trained, head = model_args.trained, model.config.expression_head
    freeze(trainer.model, lambda name: is_frozen(name, trained, head) or any(part in name for part in unused))
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    if isinstance(trainer.model, PeftModel) and trainer.is_world_process_zero():
        adapter.save_adapter(trainer)
    trainer.model = adapter.merge(trainer.model, model, in_4bit)
    finish(trainer, "tune", data=data_args, model=model_args, training=training_args)
