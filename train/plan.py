"""Compute the memory that a configuration takes per GPU; needs no GPU.

```
python -m scmmgpt.train plan --config train/configs/plan_llama2_7b.yaml
python -m scmmgpt.train plan --text_config '{"model_type": "llama"}' --gpus 8 --strategy fsdp --batch_size 4
```

The model is built on the meta device, as shapes without numbers: seven billion parameters take seconds and no memory.
Weights, gradients, optimiser states, and the activations that autograd keeps are counted exactly, but with the fused
attention of a CPU instead of a GPU's. With checkpointing, the activations are an estimate. Allocators and buffers of
communication are not counted; a fifth of the memory is reserved for them.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from peft import LoraConfig
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.blip_2.configuration_blip_2 import Blip2QFormerConfig

from scmmgpt.configuration_scmmgpt import ScGPTConfig, ScMMGPTConfig
from scmmgpt.modeling_scmmgpt import LORA_LAYERS, ScMMGPTForCellTextAlignment, ScMMGPTForConditionalGeneration
from scmmgpt.train.align import UNTRAINED_PARTS
from scmmgpt.train.arguments import ALIGN_FIELDS, TUNE_FIELDS, TrainedParts, TuneModelArguments
from scmmgpt.train.options import CheckedFields, OptionParser, check_fields, described, option, shared
from scmmgpt.train.trainer import freeze
from scmmgpt.train.tune import PROJECTOR, is_frozen, saved_parts


GIB = 2**30
# Bytes per weight of QLoRA (Dettmers et al. 2023, section 3): 4 bits, one byte for the maximum of each block of 64
# weights, and four bytes for the scale of the maxima of 256 blocks.
NF4_BYTES = 4 / 8 + 1 / 64 + 4 / (64 * 256)
Storages: TypeAlias = dict[int, torch.UntypedStorage]
Kept: TypeAlias = tuple[str, int, int, Storages]  # part, number of layers, bytes of a layer's input, saved storages


@described
@dataclass
class PlanArguments(CheckedFields):
    """A model, its training, and its batches. The default sizes are those of scGPT whole-human and PubMedBERT."""

    stage: int = option("1 (`align`) or 2 (`tune`).", 2)
    cell_config: dict[str, Any] = option("Fields of `ScGPTConfig`.", {}, fields=ScGPTConfig)
    qformer_config: dict[str, Any] = option(
        "Fields of `Blip2QFormerConfig`.", {"cross_attention_frequency": 2}, fields=Blip2QFormerConfig
    )
    text_config: dict[str, Any] = option(
        "Fields of the language model's configuration, with its `model_type`; default: Llama-2 7B.", {}, fields=()
    )
    model_config: dict[str, Any] = option(
        "Fields of `ScMMGPTConfig`, as for `align` and `tune`.",
        {"expression_head": "nb"},
        fields=(*ALIGN_FIELDS, *TUNE_FIELDS),
    )
    train_parts: dict[str, Any] = shared(TuneModelArguments, "train_parts")
    language_model_precision: Literal["fp32", "bf16", "4bit"] = shared(TuneModelArguments, "language_model_precision")
    lora_config: dict[str, Any] = option("Fields of PEFT's `LoraConfig`.", {"r": 8}, fields=LoraConfig)
    strategy: Literal["ddp", "fsdp"] = option(
        "`ddp` keeps everything on every GPU; `fsdp` shards weights, gradients and optimiser states.", "ddp"
    )
    gpus: int = option("Number of GPUs.", 8)
    gpu_gib: float = option("Memory of one GPU in GiB.", 80.0)
    batch_size: int = option("Cells per GPU and step.", 4)
    cell_length: int = option("Tokens of a cell.", 1200)
    text_length: int = option("Tokens of a text, queries included.", 160)
    precision: Literal["bf16", "fp32"] = option(
        "`bf16` is mixed precision: trained weights in fp32, activations in bfloat16.", "bf16"
    )
    gradient_checkpointing: bool = option("Recompute layers in the backward pass to save memory.", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        text_type = self.text_config.get("model_type", "llama")
        if text_type not in CONFIG_MAPPING:
            raise ValueError(f"text_config has the model_type {text_type!r}; name one of transformers' models.")
        self.trained = TrainedParts(**self.train_parts)
        check_fields("text_config", self.text_config, CONFIG_MAPPING[text_type])
        if self.stage not in (1, 2):
            raise ValueError(f"stage is {self.stage}; choose 1 (align) or 2 (tune).")
        if self.language_model_precision == "4bit" and self.strategy == "fsdp":
            raise ValueError("FSDP cannot shard a language model in 4 bits; use ddp, or bf16.")
        for name in ("gpus", "batch_size", "cell_length", "text_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; choose at least 1.")


def build_config(args: PlanArguments) -> ScMMGPTConfig:
    """The configuration of the model to plan."""
    projector = PROJECTOR | args.model_config.get("text_to_cell_config", {})
    parts = {
        "cell_config": ScGPTConfig(**args.cell_config),
        "qformer_config": Blip2QFormerConfig(**args.qformer_config),
        "text_config": AutoConfig.for_model(**{"model_type": "llama"} | args.text_config),
        "text_to_cell_config": Blip2QFormerConfig(**args.qformer_config | projector),
    }
    return ScMMGPTConfig(**args.model_config | parts)


def build_shapes(config: ScMMGPTConfig, stage: int) -> PreTrainedModel:
    """The model on the meta device."""
    with torch.device("meta"):
        return (ScMMGPTForCellTextAlignment if stage == 1 else ScMMGPTForConditionalGeneration)(config)


def count_parameters(model: PreTrainedModel, args: PlanArguments) -> dict[str, dict[str, int]]:
    """Count trained and frozen parameters by part; LoRA is a separate part. Tied weights count once."""
    parts: dict[str, dict[str, int]] = defaultdict(lambda: {"trained": 0, "frozen": 0})
    trained, head = args.trained, model.config.expression_head
    for name, parameter in model.named_parameters():
        frozen = is_frozen(name, trained, head) if args.stage == 2 else name.startswith(UNTRAINED_PARTS)
        part = name.removeprefix("model.").split(".")[0]
        parts[part]["frozen" if frozen else "trained"] += parameter.numel()
    if args.stage == 2 and trained.language_model == "lora":
        for name, module in model.named_modules():
            is_adapted = isinstance(module, torch.nn.Linear) and name.rsplit(".", 1)[-1] in LORA_LAYERS
            if "language_model." in name and is_adapted:
                parts["lora"]["trained"] += args.lora_config["r"] * (module.in_features + module.out_features)
        for name in saved_parts(trained):  # PEFT trains a copy of the part and keeps the original
            parts["originals"]["frozen"] += sum(p.numel() for p in model.model.get_submodule(name).parameters())
    return parts


def spared_bytes(model: PreTrainedModel, args: PlanArguments) -> int:
    """Bytes that a lower precision of the language model's weights saves against fp32; the head is never in 4 bits."""
    if args.stage == 1 or args.language_model_precision == "fp32":
        return 0
    body = model.model.language_model
    if args.language_model_precision == "bf16":
        return sum(p.numel() for p in {*body.parameters(), *model.lm_head.parameters()}) * 2
    return int(sum(m.weight.numel() for m in body.modules() if isinstance(m, torch.nn.Linear)) * (4 - NF4_BYTES))


@contextmanager
def kept_storages() -> Iterator[Storages]:
    """Collect every storage that autograd keeps for the backward pass of the body, by its address."""
    seen: Storages = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        seen.setdefault(storage._cdata, storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield seen


def activation_bytes(config: ScMMGPTConfig, args: PlanArguments) -> dict[str, int]:
    """Bytes that each part keeps for the backward pass of one GPU's batch.

    In stage 2, half of the cells are described and half are generated. The parts run forward on fake tensors, and the
    sizes of the tensors that autograd saves are added up, in mixed precision with the bfloat16 copies of fp32 weights.
    With checkpointing, a layer keeps only its input, and one layer at a time is recomputed in full.
    """
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
        run: Callable[[Any, PlanArguments], Iterator[Kept]]
        model: PreTrainedModel
        if args.stage == 1:
            run, model = run_align, ScMMGPTForCellTextAlignment(config)
        else:
            dtype = torch.float32 if args.language_model_precision == "fp32" else torch.bfloat16
            language_model = AutoModelForCausalLM.from_config(config.text_config, dtype=dtype)
            run, model = run_tune, ScMMGPTForConditionalGeneration(config, language_model)
            # Autograd saves the input of a layer under LoRA as it does in full training.
            trained, head = args.trained, config.expression_head
            if trained.language_model == "lora":
                trained = replace(trained, language_model="full")
            freeze(model, lambda name: is_frozen(name, trained, head))
        known = {p.untyped_storage()._cdata: p.untyped_storage() for p in model.parameters()}
        result = {}
        for part, layers, state_bytes, seen in run(model.train(), args):
            full = sum(storage.nbytes() for address, storage in seen.items() if address not in known)
            known |= seen  # keeps the storages alive, so that no later storage gets the same address
            checkpointed = layers * state_bytes + full // max(layers, 1)
            result[part] = checkpointed if args.gradient_checkpointing and layers else full
    return result


def run_align(model: ScMMGPTForCellTextAlignment, args: PlanArguments) -> Iterator[Kept]:
    """Run stage 1 forward, part by part."""
    batch, texts = args.batch_size, args.text_length
    gene_ids = torch.zeros(batch, args.cell_length, dtype=torch.long)
    with kept_storages() as seen:
        states = model.encode_cells(gene_ids, torch.zeros(gene_ids.shape))
    yield "cell", model.config.cell_config.num_hidden_layers, states.nbytes, seen
    with kept_storages() as seen:
        projected: dict = {}
        model.project_cells(model.query_cells(states, projected=projected))
        ids = torch.zeros(batch, texts, dtype=torch.long)
        embeds = model.qformer_embeddings(input_ids=ids)
        model.project_texts(model.encode_texts(embeds))
        pairs = torch.arange(3 * batch) % batch  # matching pairs each cell with three texts
        length = model.config.num_query_tokens + texts
        mask = torch.zeros(3 * batch, 1, length, length)
        matched = model.query_cells(states, None, embeds[pairs], mask, cell_rows=pairs, projected=projected)
        model.matching_head(matched[:, : model.config.num_query_tokens])
    yield "qformer", model.config.qformer_config.num_hidden_layers, matched.nbytes, seen


def run_tune(model: ScMMGPTForConditionalGeneration, args: PlanArguments) -> Iterator[Kept]:
    """Run stage 2 forward, part by part."""
    parts, config, half = model.model, model.config, max(1, args.batch_size // 2)
    gene_ids = torch.zeros(half, args.cell_length, dtype=torch.long)
    with kept_storages() as seen:
        states = parts.encode_cells(gene_ids, torch.zeros(gene_ids.shape))
    cell_bytes = states.nbytes
    yield "cell", config.cell_config.num_hidden_layers, cell_bytes, seen
    with kept_storages() as seen:
        states = parts.query_cells(states)
        parts.language_projection(states)
    yield "qformer", config.qformer_config.num_hidden_layers, states.nbytes, seen
    dtype = parts.get_input_embeddings().weight.dtype
    embeds = torch.zeros(args.batch_size, args.text_length, config.text_config.hidden_size, dtype=dtype)
    mask = torch.ones(embeds.shape[:2], dtype=torch.long)
    mask[:, 0] = 0  # batches are padded on the left
    with kept_storages() as seen:
        inputs = {"inputs_embeds": embeds.requires_grad_(), "attention_mask": mask, "use_cache": False}
        states = parts.language_model(**inputs).last_hidden_state
    yield "text", config.text_config.num_hidden_layers, states.nbytes, seen
    with kept_storages() as seen:
        logits = model.lm_head(states).float()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.zeros(logits[..., 0].numel(), dtype=torch.long))
    seen[-1] = torch.empty_like(logits).untyped_storage()  # gradient of the logits, at the peak of the memory
    yield "logits", 0, 0, seen
    with kept_storages() as seen:
        parts.decode_cells(states[:half], mask[:half], gene_ids)
    yield "generated cell", config.cell_config.num_hidden_layers, cell_bytes, seen


def make_plan(args: PlanArguments) -> dict:
    """Compute the parameters by part, the bytes per GPU by purpose, and whether the sum fits the GPU."""
    config = build_config(args)
    activations = activation_bytes(config, args)
    model = build_shapes(config, args.stage)
    parts = count_parameters(model, args)
    trained, frozen = (sum(part[kind] for part in parts.values()) for kind in ("trained", "frozen"))
    shards = args.gpus if args.strategy == "fsdp" else 1
    # DDP's buckets hold a second copy of the gradients; FSDP gathers one layer at a time.
    communication = trained * 4 if args.strategy == "ddp" else largest_layer(model) * 4
    memory = {
        "weights": ((trained + frozen) * 4 - spared_bytes(model, args)) // shards,
        "gradients": trained * 4 // shards,
        "optimiser": trained * 8 // shards,  # AdamW: two fp32 moments
        "communication": communication if args.gpus > 1 else 0,
        "activations": sum(activations.values()),
    }
    total = sum(memory.values())
    return {
        "parameters": parts,
        "trained": trained,
        "frozen": frozen,
        "bytes_per_gpu": {**memory, "total": total},
        "activations": activations,
        "fits": total <= 0.8 * args.gpu_gib * GIB,
    }


def largest_layer(model: PreTrainedModel) -> int:
    """Parameters of the largest module that FSDP gathers at once."""
    names = set(model._no_split_modules or [])
    layers = [m for m in model.modules() if type(m).__name__ in names or type(m).__name__.endswith("DecoderLayer")]
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    return max([*sizes, max(p.numel() for p in model.parameters())])


def format_plan(plan: dict, args: PlanArguments) -> str:
    """Format the plan as two tables, and a line that tells whether the configuration fits the GPU."""
    lines = [f"{'part':<22}{'trained':>16}{'frozen':>16}"]
    lines += [f"{part:<22}{n['trained']:>16,}{n['frozen']:>16,}" for part, n in plan["parameters"].items()]
    lines += [f"{'all':<22}{plan['trained']:>16,}{plan['frozen']:>16,}", ""]
    lines += [f"per GPU, {args.strategy} on {args.gpus}, {args.batch_size} cells a step, {args.precision}:"]
    lines += [f"  {name:<20}{size / GIB:>10.2f} GiB" for name, size in plan["bytes_per_gpu"].items()]
    verdict = "fits" if plan["fits"] else "does not fit"
    lines += ["", f"It {verdict} into {args.gpu_gib:g} GiB, a fifth of which is left for allocator and communication."]
    return "\n".join(lines) + "\n"


def make_parser(prog: str | None = None) -> OptionParser:
    """The command line."""
    return OptionParser((PlanArguments,), prog=prog, description=__doc__)


def main(args: PlanArguments) -> None:
    """Print the plan."""
    sys.stdout.write(format_plan(make_plan(args), args))
