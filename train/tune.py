"""Stage 2: teach a language model to describe cells, and the cell model to generate them from texts.

```
python -m scmmgpt.train tune --config train/configs/tune_demo.yaml --corpus DIR --aligned DIR --output_dir DIR
accelerate launch --num_processes 8 -m scmmgpt.train tune --config train/configs/tune_base.yaml --corpus ...
```

`--output_dir` ends up with a complete checkpoint; with LoRA, `--output_dir/adapter` also holds the adapter alone. The
checkpoint loads in float32 unless `dtype` says otherwise; weights that `--language_model_precision` held in less are
stored in bfloat16.
"""

import dataclasses
import functools
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, prepare_model_for_kbit_training
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, PreTrainedTokenizerFast
from transformers.integrations import dequantize_and_replace
from transformers.utils import is_bitsandbytes_available
from trl import SFTTrainer, TrlParser

from scmmgpt.modeling_scmmgpt import ScMMGPTForCellTextAlignment, ScMMGPTForConditionalGeneration
from scmmgpt.processing_scmmgpt import ScMMGPTProcessor
from scmmgpt.train.align import finish
from scmmgpt.train.arguments import TuneConfig, TuneDataArguments, TuneModelArguments
from scmmgpt.train.card import write_card
from scmmgpt.train.convert import load_causal_lm, resolve_source
from scmmgpt.train.data.batches import BatchDataset
from scmmgpt.train.data.captions import CaptionSampler, read_gene_means
from scmmgpt.train.data.collate import TuningCollator
from scmmgpt.train.data.corpus import Corpus, open_corpus
from scmmgpt.train.data.instructions import InstructionBatches, read_instructions
from scmmgpt.train.initialize import PROJECTION_CELLS, standardize, start_from_mean_profile
from scmmgpt.train.trainer import StreamTrainer, data_seed, freeze, make_datasets


# The language model's linear layers and nothing else: suffixes would also hit the Q-Former's.
LORA_TARGETS = r".*language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
PROMPT_CELLS = 128  # cells whose prompts the start of the text-to-cell projection is computed from, at most
CELL_DECODERS = ["cell_model.mvc_decoder", "cell_model.expression_decoder"]
NEW_PARTS = ("language_projection", "text_to_cell", "expression_head")
SCRATCH_TEXTS = 20_000  # captions and answers that a scratch tokenizer is trained on, at most
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class TuneTrainer(StreamTrainer, SFTTrainer):
    """`SFTTrainer` whose language loss stays TRL's, plus the expression loss of the cells that texts generate.

    TRL runs the backbone and computes the language loss from its last states; the expression loss comes out of the
    same pass (`hf.md`: a loss added in `forward` alone would be ignored).
    """

    def __init__(self, *args, language_weight: float, expression_weight: float, **kwargs):
        self.language_weight, self.expression_weight = language_weight, expression_weight
        self.num_targets_in_batch = None
        super().__init__(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Also count the target genes of the whole step, so that accumulation weighs every gene alike."""
        samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        targets = sum(count_targets(batch) for batch in samples)
        targets = torch.tensor(targets, device=device)
        self.num_targets_in_batch = int(self.accelerator.gather(targets).sum())
        return samples, num_items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """`language_weight` x TRL's loss + `expression_weight` x the mean loss of a target gene."""
        self.still_frozen_parts()
        unwrapped = self.accelerator.unwrap_model(model)
        backbone = unwrapped.get_base_model() if isinstance(unwrapped, PeftModel) else unwrapped
        outputs = []
        # A prompt has no label: only states that do go through the head, which costs as much as the layers.
        labels = inputs["labels"][:, 1:]
        labelled = labels != -100

        def keep_labelled(module, args, output):
            outputs.append(output)
            states = output.last_hidden_state[:, :-1][labelled][None]
            return dataclasses.replace(output, last_hidden_state=states)

        def show_expression_loss(module, args, output):
            # DDP takes for unused whatever it can't reach from what the model returns, and this is a field of it.
            output["aux_loss"] = outputs[0].expression_loss
            return output

        hooks = [
            backbone.model.register_forward_hook(keep_labelled),
            unwrapped.register_forward_hook(show_expression_loss),
        ]
        scored = {name: value for name, value in inputs.items() if name != "labels"}
        scored["shift_labels"] = labels[labelled][None]  # TRL scores these as they stand
        try:
            language_loss = super().compute_loss(model, scored, num_items_in_batch=num_items_in_batch)
        finally:
            for hook in hooks:
                hook.remove()
        loss = self.language_weight * language_loss
        expression_loss = outputs[0].expression_loss
        has_targets = count_targets(inputs) > 0
        if expression_loss is not None:
            scale = 1.0
            if self.model.training and self.num_targets_in_batch:
                # `expression_loss` is the mean over this micro-batch; the step's mean weighs it by its share of genes.
                # DDP averages gradients over ranks, hence the factor.
                share = count_targets(inputs) / self.num_targets_in_batch
                scale = share * self.accelerator.num_processes
            loss = loss + self.expression_weight * scale * expression_loss
        has_labels = bool((inputs["labels"] != -100).any())
        self.record_losses(
            language_loss=self.mean_language_loss(language_loss, inputs, num_items_in_batch) if has_labels else None,
            expression_loss=expression_loss if has_targets else None,
        )
        return (loss, outputs[0]) if return_outputs else loss

    def mean_language_loss(self, loss: torch.Tensor, inputs: dict, num_items_in_batch) -> torch.Tensor:
        """The micro-batch's own mean, for the log, from a loss that is divided by the tokens of the whole step.

        TRL multiplies that by the number of ranks, since DDP averages over them.
        """
        if num_items_in_batch is None:
            return loss
        n_ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return loss * num_items_in_batch / (inputs["labels"][:, 1:] != -100).sum().clamp(min=1) / n_ranks

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Losses alone."""
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None


def count_targets(batch: dict) -> int:
    """Values of target genes in a batch, over all target cells."""
    if "target_rows" not in batch:
        return 0
    return int(batch["target_attention_mask"][batch["target_rows"]].sum())


def train_tokenizer(texts: list[str], vocab_size: int = 2000) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a chat template, for a language model from scratch."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        extra_special_tokens=special[2:],
        chat_template=CHAT_TEMPLATE,
    )


def build_language_model(
    corpus: Corpus, captions: CaptionSampler, model_args: TuneModelArguments, device: torch.device
):
    """The causal language model and its tokenizer: loaded, or a small new one trained on this corpus's captions."""
    if model_args.language_model_precision == "4bit":
        return load_in_4bit(model_args.language_model, device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[model_args.language_model_precision]
    if model_args.language_model != "scratch":
        return load_causal_lm(model_args.language_model, dtype=dtype)
    texts = []
    for cells, table in corpus.iter_cells("train"):
        obs = {name: np.array(table[name].to_pylist(), dtype=object) for name in table.column_names}
        for write in (captions.caption, captions.answer):
            texts += write(obs, cell_ids=cells.cell_ids)
        if len(texts) >= SCRATCH_TEXTS:
            break
    tokenizer = train_tokenizer(texts)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 1,  # and `<cell>`
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        tie_word_embeddings=True,
        **model_args.language_model_config,
    )
    return AutoModelForCausalLM.from_config(config).to(dtype), tokenizer


def load_in_4bit(source: str, device: torch.device):
    """A causal language model on a device, its layers in NF4 as QLoRA holds them, and its tokenizer.

    Embeddings, norms and head are float32; the layers multiply in bfloat16.

    Raises:
        ImportError: If bitsandbytes is missing or does not know the device.
    """
    if not is_bitsandbytes_available() or device.type not in import_module("bitsandbytes").supported_torch_devices:
        raise ImportError(
            f"language_model_precision '4bit' needs bitsandbytes, and one that runs on {device.type!r}: "
            "`pip install -U 'scmmgpt[quantized]'`. 'bf16' halves the memory without it."
        )
    if resolve_source(source)[1] is not None:
        raise ValueError(
            f"{source} is a GGUF file, quantised already; make a checkpoint of it by `python -m scmmgpt.train convert "
            "lm` for language_model_precision '4bit'."
        )
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    language_model, tokenizer = load_causal_lm(
        source, dtype=torch.bfloat16, quantization_config=settings, device_map={"": str(device)}
    )
    for module in language_model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Else an evaluation on such a CPU rearranges the weights, and no gradient passes them from then on.
            module.support_avx512bf16_for_cpu = False
    return prepare_model_for_kbit_training(language_model, use_gradient_checkpointing=False), tokenizer


def dequantize(model: ScMMGPTForConditionalGeneration) -> None:
    """Make bfloat16 weights of the language model's 4-bit ones, in place, so that merging rounds no LoRA to 4 bits."""
    config = model.config.text_config
    dequantize_and_replace(model.model.language_model, config.quantization_config, dtype=torch.bfloat16)
    del config.quantization_config


def join(alignment: ScMMGPTForCellTextAlignment, language_model, processor: ScMMGPTProcessor, model_args, **weights):
    """Stage-2 model of a stage-1 model and a language model, the embeddings extended by `<cell>`."""
    if len(processor.tokenizer) > language_model.get_input_embeddings().num_embeddings:
        language_model.resize_token_embeddings(len(processor.tokenizer))
    projector = {
        **alignment.config.qformer_config.to_dict(),
        "num_hidden_layers": model_args.text_to_cell_layers,
        "cross_attention_frequency": 1,
        "use_qformer_text_input": False,
    }
    return ScMMGPTForConditionalGeneration.from_components(
        alignment,
        language_model,
        cell_token_id=processor.cell_token_id,
        expression_head=model_args.expression_head,
        num_condition_tokens=model_args.num_condition_tokens,
        text_to_cell_config=projector,
        **weights,
    )


@torch.no_grad()
def standardize_text_to_cell(model: ScMMGPTForConditionalGeneration, dataset: BatchDataset) -> None:
    """Start the projection onto condition tokens from what texts differ in."""
    model.eval()
    parts, prompts = model.model, {}
    n_cells = 0
    for batch in dataset:
        if n_cells >= PROMPT_CELLS:  # cells, not batches: the start must not depend on the batch size
            break
        generates = batch["target_attention_mask"].any(dim=1)
        n_cells += int((~generates).sum()) + len(batch["target_rows"])
        for ids, mask in zip(batch["input_ids"][generates], batch["attention_mask"][generates], strict=True):
            prompts.setdefault(tuple(ids[mask.bool()].tolist()))
    if prompts:
        inputs = dataset.collate.processor.tokenizer.pad(
            {"input_ids": [list(prompt) for prompt in prompts]}, padding_side="left", return_tensors="pt"
        ).to(model.device)
        states = parts.language_model(**inputs, use_cache=False).last_hidden_state.float()
        mask = inputs["attention_mask"]
        summaries = parts.text_to_cell.summarize(states, mask)
        standardize(parts.text_to_cell.summary_projection, summaries, unit=True)
        queries = parts.text_to_cell.read(states, mask)
        parts.text_to_cell.query_means.copy_(queries.mean(dim=0, keepdim=True))
        # To one per condition token and channel, as the gene tokens that it stands among.
        standardize(parts.text_to_cell.projection, (queries - parts.text_to_cell.query_means).flatten(0, 1), unit=True)
    model.train()


@torch.no_grad()
def standardize_language_projection(
    model: ScMMGPTForConditionalGeneration, dataset: BatchDataset, processor: ScMMGPTProcessor
) -> None:
    """Start the projection into the language model from what it will read, in the size of the model's embeddings."""
    model.eval()
    states = []
    for cells, *_ in dataset.source.batches():
        inputs = processor(cells=cells, max_genes=dataset.collate.max_genes).to(model.device)
        cell_states = model.model.encode_cells(**inputs)
        states.append(model.model.query_cells(cell_states, inputs["cell_attention_mask"]))
        if sum(map(len, states)) >= PROJECTION_CELLS:
            break
    first, _, last = model.model.language_projection
    states = (torch.cat(states) - model.model.query_means).flatten(0, 1)
    standardize(first, states)
    size = model.get_input_embeddings().weight.float().norm(dim=1).mean()
    last.weight.mul_(size / model.model.language_projection(states).norm(dim=1).mean())
    model.train()


def saved_parts(model_args: TuneModelArguments) -> list[str]:
    """Parts that are trained beside the language model's LoRA, and saved with it."""
    cell_model = {"full": ["cell_model"], "decoders": CELL_DECODERS, "frozen": []}[model_args.train_cell_model]
    return [*NEW_PARTS, *cell_model, *(["qformer"] if model_args.train_qformer else [])]


def add_lora(model: ScMMGPTForConditionalGeneration, model_args: TuneModelArguments) -> LoraConfig | None:
    """The PEFT configuration, or `None` where the language model is trained in full or not at all."""
    if model_args.train_language_model != "lora":
        return None
    return LoraConfig(
        r=model_args.lora_rank,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        target_modules=LORA_TARGETS,
        # The bridge of the text-to-cell projector is a `qformer` too; whole names keep the two apart.
        modules_to_save=[f"model.{part}" for part in saved_parts(model_args)],
        task_type="CAUSAL_LM",
    )


def is_frozen(name: str, model_args: TuneModelArguments, expression_head: str) -> bool:
    """Whether a parameter stays as it is in stage 2."""
    name = name.replace("modules_to_save.default.", "").removeprefix("base_model.model.").removeprefix("model.")
    if "original_module." in name:
        return True
    if name.startswith("cell_model.embeddings.flag"):
        return True
    if name.startswith("cell_model.expression_decoder.") and expression_head != "mse":
        return True
    if name.startswith("cell_model."):
        decodes = name.startswith(tuple(CELL_DECODERS))
        return model_args.train_cell_model == "frozen" or (model_args.train_cell_model == "decoders" and not decodes)
    if name.startswith(NEW_PARTS):
        return False
    if name.startswith(("language_model.", "lm_head.")):
        return model_args.train_language_model == "frozen" or (
            model_args.train_language_model == "lora" and "lora_" not in name
        )
    if name.startswith(("qformer.", "query_tokens", "query_means", "cell_norm.")):
        return not model_args.train_qformer
    return True  # contrast, matching and the text branch are done with stage 1


def unused_parts(text_to_cell_ratio: float, has_instructions: bool) -> tuple[str, ...]:
    """Parts that no loss reaches if cells are only described or talked about, or only generated."""
    if text_to_cell_ratio == 0:
        return (".text_to_cell.", ".expression_head.")
    return (".language_projection.",) if text_to_cell_ratio == 1 and not has_instructions else ()


def is_pretrained(name: str) -> bool:
    """Whether a parameter learns at the lower rate: what stage 1 has trained, and the text-to-cell Q-Former.

    At the rate of the heads its post-norm layers drift together, and what texts differ in is lost.
    """
    return "qformer." in name or ("cell_model." in name and "_decoder." not in name)


def typical_library_size(corpus: Corpus) -> float:
    """Median total counts of the training cells, of the first 100,000."""
    sizes, total = [], 0
    for cells, _ in corpus.iter_cells("train", columns=[]):
        sizes.append(cells.library_sizes())
        total += len(cells)
        if total >= 100_000:
            break
    return float(np.median(np.concatenate(sizes)))


def measured_genes(corpus: Corpus) -> np.ndarray:
    """Vocabulary ids of the genes that the corpus measured."""
    return np.array([i for name, i in corpus.vocabulary.items() if not name.startswith("<")], dtype=np.int64)


def make_parser(prog: str | None = None) -> TrlParser:
    """The command line."""
    return TrlParser((TuneDataArguments, TuneModelArguments, TuneConfig), prog=prog, description=__doc__)


def main(data_args: TuneDataArguments, model_args: TuneModelArguments, training_args: TuneConfig) -> None:
    """Join, train, save."""
    # --- Corpus and model
    torch.manual_seed(training_args.seed)
    corpus = open_corpus(data_args.corpus)
    gene_means = read_gene_means(corpus.path)
    captions = CaptionSampler(data_args.templates, seed=data_seed(training_args), gene_means=gene_means)
    language_model, tokenizer = build_language_model(corpus, captions, model_args, training_args.device)
    alignment = ScMMGPTForCellTextAlignment.from_pretrained(model_args.aligned)
    aligned = ScMMGPTProcessor.from_pretrained(model_args.aligned)
    aligned.feature_extractor.return_profile = False  # stage 2 has no profile readout
    processor = ScMMGPTProcessor(
        aligned.feature_extractor,
        tokenizer,
        aligned.qformer_tokenizer,
        aligned.gene_tokenizer,
        num_query_tokens=aligned.num_query_tokens,
        qformer_max_length=aligned.qformer_max_length,
        library_size=typical_library_size(corpus),
    )
    processor.gene_aliases = aligned.gene_aliases
    weights = {"language_weight": training_args.language_weight, "expression_weight": training_args.expression_weight}
    model = join(alignment, language_model, processor, model_args, **weights)
    in_4bit = model_args.language_model_precision == "4bit"
    if in_4bit:  # of a frozen one, checkpoints on the way are too; loading them must leave the other parts alone
        others = [f"model.{name}" for name, _ in model.model.named_children() if name != "language_model"]
        model.config.text_config.quantization_config.llm_int8_skip_modules = ["lm_head", *others]
    start_from_mean_profile(model, gene_means)

    # --- Batches
    collate = TuningCollator(
        processor,
        captions,
        text_to_cell_ratio=training_args.text_to_cell_ratio,
        prompts_per_epoch=training_args.prompts_per_epoch,
        target_genes=measured_genes(corpus),
        max_genes=data_args.max_genes,
    )
    train_dataset, eval_dataset = make_datasets(
        corpus, collate, training_args, balance=data_args.balance, temperature=data_args.balance_temperature
    )
    instructions = None
    if data_args.instructions is not None:
        instructions = read_instructions(data_args.instructions, corpus, processor)

    # Every rank starts from the same cells and so from the same weights; FSDP broadcasts none.
    standardize_language_projection(model, train_dataset.of_all_ranks(), processor)
    if training_args.text_to_cell_ratio > 0:
        standardize_text_to_cell(model, train_dataset.of_all_ranks())
    if instructions is not None:
        ratio, seed = data_args.instruction_ratio, data_seed(training_args)
        train_dataset = InstructionBatches(train_dataset, instructions, ratio=ratio, seed=seed)

    # --- Training
    base = None if model_args.language_model == "scratch" else model_args.language_model
    bases = {"aligned": model_args.aligned, "language_model": base}
    trainer = TuneTrainer(
        model=model,
        args=training_args,
        processing_class=processor,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=lambda examples: examples,
        peft_config=add_lora(model, model_args),
        is_pretrained=is_pretrained,
        write_card=functools.partial(write_card, training_args.output_dir, "tune", corpus, **bases),
        **weights,
    )
    if in_4bit and trainer.is_fsdp_enabled:
        raise ValueError("FSDP cannot shard a language model in 4 bits; use DDP, or language_model_precision 'bf16'.")
    unused = unused_parts(training_args.text_to_cell_ratio, instructions is not None)
    freeze(
        trainer.model,
        lambda name: is_frozen(name, model_args, model_args.expression_head) or any(part in name for part in unused),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    if isinstance(trainer.model, PeftModel):
        adapter = Path(training_args.output_dir, "adapter")
        if trainer.is_world_process_zero():
            trainer.model.save_pretrained(adapter)
    if in_4bit:
        dequantize(model)
    if isinstance(trainer.model, PeftModel):
        trainer.model = trainer.model.merge_and_unload()
    finish(trainer, "tune", data=data_args, model=model_args, training=training_args)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
