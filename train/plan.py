"""How much memory a configuration takes per GPU, before anything is rented.

```
python -m scmmgpt.train plan --config train/configs/plan_llama2_7b.yaml
python -m scmmgpt.train plan --text_config '{"model_type": "llama"}' --gpus 8 --strategy fsdp --batch_size 4
```

The model is built on the meta device: shapes without numbers, so seven billion parameters take seconds and no memory.
Weights, gradients and optimiser states are then counted exactly; activations are estimated from the shapes, with and
without activation checkpointing, and leave out what allocators and communication add (allow a fifth).
"""

import sys
from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers import AutoConfig
from transformers.models.blip_2.configuration_blip_2 import Blip2QFormerConfig
from trl import TrlParser

from scmmgpt.configuration_scmmgpt import ScGPTConfig, ScMMGPTConfig
from scmmgpt.modeling_scmmgpt import ScMMGPTForCellTextAlignment, ScMMGPTForConditionalGeneration
from scmmgpt.train.arguments import TuneModelArguments, parse_fields
from scmmgpt.train.tune import is_frozen, saved_parts


GIB = 2**30
BYTES = {"fp32": 4, "bf16": 2}
# Per weight, as QLoRA (Dettmers et al. 2023, section 3) counts: 4 bits, a byte per 64 for their maximum, and four
# bytes for the scale of 256 of those.
NF4_BYTES = 4 / 8 + 1 / 64 + 4 / (64 * 256)
LORA_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Tensors of the layer's width that one layer keeps for its backward pass, with fused attention: its input, two norms,
# queries, keys, values, attention's output and log-sums, two residuals; the feed-forward's own are counted apart.
WIDTHS_PER_LAYER = 10


@dataclass
class PlanArguments:
    """What is planned: a model, how it is trained, and on what.

    Args:
        stage: 1 (`align`) or 2 (`tune`).
        cell_config, qformer_config, text_config: Fields of the parts; the defaults are scGPT's whole-human, a
            BERT-base Q-Former (PubMedBERT's size) and Llama-2 7B.
        num_query_tokens, projection_dim, expression_head: As in `ScMMGPTConfig`.
        train_language_model, language_model_precision, lora_rank, train_cell_model, train_qformer: As in `tune`.
        strategy: `ddp` keeps everything on every GPU; `fsdp` shards weights, gradients and optimiser states.
        gpus, gpu_gib: How many, and the memory of one in GiB.
        batch_size: Cells per GPU and step.
        cell_length, text_length: Genes of a cell and tokens of a text, queries included.
        precision: `bf16` is mixed precision: what is trained in fp32, activations in bfloat16.
        gradient_checkpointing: Whether layers are recomputed in the backward pass.
    """

    stage: int = field(default=2, metadata={"help": "1 (align) or 2 (tune)."})
    cell_config: dict | str | None = field(default=None, metadata={"help": "Fields of ScGPTConfig, as JSON."})
    qformer_config: dict | str | None = field(
        default=None, metadata={"help": "Fields of Blip2QFormerConfig, as JSON."}
    )
    text_config: dict | str | None = field(default=None, metadata={"help": "Config of the language model, as JSON."})
    num_query_tokens: int = field(default=32, metadata={"help": "Queries per cell."})
    projection_dim: int = field(default=256, metadata={"help": "Width of the shared space."})
    expression_head: Literal["mse", "nb", "zinb"] = field(default="nb", metadata={"help": "Expression head."})
    train_language_model: Literal["lora", "full", "frozen"] = field(default="lora", metadata={"help": "As in tune."})
    language_model_precision: Literal["fp32", "bf16", "4bit"] = field(
        default="fp32", metadata={"help": "How frozen weights of the language model are held."}
    )
    lora_rank: int = field(default=8, metadata={"help": "Rank of LoRA."})
    train_cell_model: Literal["full", "decoders", "frozen"] = field(
        default="full", metadata={"help": "What of the cell model is trained in stage 2."}
    )
    train_qformer: bool = field(default=False, metadata={"help": "Whether the Q-Former is trained in stage 2."})
    strategy: Literal["ddp", "fsdp"] = field(default="ddp", metadata={"help": "How GPUs share the work."})
    gpus: int = field(default=8, metadata={"help": "Number of GPUs."})
    gpu_gib: float = field(default=80.0, metadata={"help": "Memory of one GPU in GiB."})
    batch_size: int = field(default=4, metadata={"help": "Cells per GPU and step."})
    cell_length: int = field(default=1200, metadata={"help": "Genes of a cell."})
    text_length: int = field(default=160, metadata={"help": "Tokens of a text, queries included."})
    precision: Literal["bf16", "fp32"] = field(default="bf16", metadata={"help": "Mixed precision, or none."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Recompute layers to save memory."})

    def __post_init__(self):
        if self.stage not in (1, 2):
            raise ValueError(f"stage is {self.stage}; there are 1 (align) and 2 (tune).")
        if self.language_model_precision == "4bit" and self.strategy == "fsdp":
            raise ValueError("FSDP cannot shard a language model in 4 bits; use ddp, or bf16.")
        for name in ("gpus", "batch_size", "cell_length", "text_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("cell_config", "qformer_config", "text_config"):
            setattr(self, name, parse_fields(name, getattr(self, name)))


def build_config(args: PlanArguments) -> ScMMGPTConfig:
    """The configuration whose memory is planned."""
    text = {"model_type": "llama", **args.text_config}
    return ScMMGPTConfig(
        cell_config=ScGPTConfig(**args.cell_config),
        qformer_config=Blip2QFormerConfig(**{"cross_attention_frequency": 2, **args.qformer_config}),
        text_config=AutoConfig.for_model(**text),
        text_to_cell_config=Blip2QFormerConfig(
            **{**args.qformer_config, "num_hidden_layers": 2, "cross_attention_frequency": 1}
        ),
        num_query_tokens=args.num_query_tokens,
        projection_dim=args.projection_dim,
        expression_head=args.expression_head,
    )


def build_shapes(config: ScMMGPTConfig, stage: int):
    """The model on the meta device."""
    with torch.device("meta"):
        return (ScMMGPTForCellTextAlignment if stage == 1 else ScMMGPTForConditionalGeneration)(config)


def count_parameters(model, args: PlanArguments) -> dict[str, dict[str, int]]:
    """Trained and frozen parameters by part; LoRA's are a part of their own. Tied weights count once."""
    parts: dict[str, dict[str, int]] = {}

    def add(part: str, kind: str, number: int) -> None:
        parts.setdefault(part, {"trained": 0, "frozen": 0})[kind] += number

    rules = TuneModelArguments(
        aligned="",
        language_model="",
        train_language_model=args.train_language_model,
        language_model_precision=args.language_model_precision,
        train_cell_model=args.train_cell_model,
        train_qformer=args.train_qformer,
    )
    for name, parameter in model.named_parameters():
        part = name.removeprefix("model.").split(".")[0]
        frozen = is_frozen(name, rules, args.expression_head) if args.stage == 2 else is_idle(name)
        add(part, "frozen" if frozen else "trained", parameter.numel())
    if args.stage == 2 and args.train_language_model == "lora":
        for name, module in model.named_modules():
            if "language_model." in name and name.rsplit(".", 1)[-1] in LORA_LAYERS:
                add("lora", "trained", args.lora_rank * (module.in_features + module.out_features))
        for name in saved_parts(rules):  # PEFT trains a copy and keeps the original
            add("originals", "frozen", sum(p.numel() for p in model.model.get_submodule(name).parameters()))
    return parts


def saved_bytes(model, args: PlanArguments) -> int:
    """What the language model's weights take less than in fp32: a head in 4 bits there is not."""
    if args.stage == 1 or args.language_model_precision == "fp32":
        return 0
    body = model.model.language_model
    if args.language_model_precision == "bf16":
        return sum(p.numel() for p in {*body.parameters(), *model.lm_head.parameters()}) * 2
    return int(sum(m.weight.numel() for m in body.modules() if isinstance(m, torch.nn.Linear)) * (4 - NF4_BYTES))


def is_idle(name: str) -> bool:
    """Whether stage 1 leaves a parameter alone: decoders of the cell model have no part in it."""
    return name.startswith(("cell_model.mvc_decoder.", "cell_model.expression_decoder.", "cell_model.embeddings.flag"))


def activation_bytes(config: ScMMGPTConfig, args: PlanArguments) -> dict[str, int]:
    """Estimate of what each part keeps for the backward pass, in bytes, for one GPU's batch.

    With checkpointing a layer keeps its input only, and one layer at a time is recomputed in full.
    """
    size = BYTES[args.precision]
    heads = {"cell": config.cell_config, "qformer": config.qformer_config, "text": config.text_config}
    tokens = {"cell": args.cell_length, "qformer": config.num_query_tokens, "text": args.text_length}
    if args.stage == 1:
        tokens["qformer"] = 3 * (config.num_query_tokens + args.text_length)  # matching reads three pairs per cell
        del heads["text"]
    result = {}
    for name, part in heads.items():
        width = part.hidden_size
        feed_forward = part.intermediate_size * (3 if name == "text" else 2)  # gated feed-forwards keep one more
        layer = args.batch_size * tokens[name] * (WIDTHS_PER_LAYER * width + feed_forward) * size
        kept = args.batch_size * tokens[name] * width * size
        n = part.num_hidden_layers
        result[name] = n * kept + layer if args.gradient_checkpointing else n * layer
    if args.stage == 2:
        # Logits and their gradient in fp32: the largest tensors of a step.
        result["logits"] = 2 * args.batch_size * args.text_length * config.text_config.vocab_size * 4
    return result


def make_plan(args: PlanArguments) -> dict:
    """Bytes per GPU by what they are for, and whether they fit."""
    config = build_config(args)
    model = build_shapes(config, args.stage)
    parts = count_parameters(model, args)
    trained = sum(part["trained"] for part in parts.values())
    frozen = sum(part["frozen"] for part in parts.values())
    shards = args.gpus if args.strategy == "fsdp" else 1
    # DDP's buckets hold a second copy of the gradients; FSDP gathers one layer at a time.
    communication = trained * 4 if args.strategy == "ddp" else largest_layer(model) * 4
    memory = {
        "weights": ((trained + frozen) * 4 - saved_bytes(model, args)) // shards,
        "gradients": trained * 4 // shards,
        "optimiser": trained * 8 // shards,  # AdamW: two fp32 moments
        "communication": communication if args.gpus > 1 else 0,
        "activations": sum(activation_bytes(config, args).values()),
    }
    total = sum(memory.values())
    return {
        "parameters": parts,
        "trained": trained,
        "frozen": frozen,
        "bytes_per_gpu": {**memory, "total": total},
        "activations": activation_bytes(config, args),
        "fits": total <= 0.8 * args.gpu_gib * GIB,
    }


def largest_layer(model) -> int:
    """Parameters of the largest module that FSDP gathers at once."""
    names = set(model._no_split_modules or [])
    layers = [m for m in model.modules() if type(m).__name__ in names or type(m).__name__.endswith("DecoderLayer")]
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    return max([*sizes, max(p.numel() for p in model.parameters())])


def format_plan(plan: dict, args: PlanArguments) -> str:
    """The plan as two tables and a verdict."""
    lines = [f"{'part':<22}{'trained':>16}{'frozen':>16}"]
    lines += [f"{part:<22}{n['trained']:>16,}{n['frozen']:>16,}" for part, n in plan["parameters"].items()]
    lines += [f"{'all':<22}{plan['trained']:>16,}{plan['frozen']:>16,}", ""]
    lines += [f"per GPU, {args.strategy} on {args.gpus}, {args.batch_size} cells a step, {args.precision}:"]
    lines += [f"  {name:<20}{size / GIB:>10.2f} GiB" for name, size in plan["bytes_per_gpu"].items()]
    verdict = "fits" if plan["fits"] else "does not fit"
    lines += ["", f"It {verdict} into {args.gpu_gib:g} GiB, a fifth of which is left for allocator and communication."]
    return "\n".join(lines) + "\n"


def make_parser(prog: str | None = None) -> TrlParser:
    """The command line."""
    return TrlParser((PlanArguments,), prog=prog, description=__doc__)


def main(args: PlanArguments) -> None:
    """Print the plan."""
    sys.stdout.write(format_plan(make_plan(args), args))


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
