"""How much memory a configuration takes per GPU, before anything is rented.

```
python -m scmmgpt.train plan --config train/configs/plan_llama2_7b.yaml
python -m scmmgpt.train plan --text_config '{"model_type": "llama"}' --gpus 8 --strategy fsdp --batch_size 4
```

The model is built on the meta device: shapes without numbers, so seven billion parameters take seconds and no memory.
Weights, gradients and optimiser states are then counted exactly, and so is what autograd keeps for the backward pass,
with the fused attention of a CPU in place of that of a GPU. With checkpointing that is an estimate. What allocators
and communication add is left out (allow a fifth).
"""

import sys
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.blip_2.configuration_blip_2 import Blip2QFormerConfig
from trl import TrlParser

from scmmgpt.configuration_scmmgpt import ScGPTConfig, ScMMGPTConfig
from scmmgpt.modeling_scmmgpt import ScMMGPTForCellTextAlignment, ScMMGPTForConditionalGeneration
from scmmgpt.train.arguments import TuneModelArguments, parse_fields
from scmmgpt.train.trainer import freeze
from scmmgpt.train.tune import is_frozen, saved_parts


GIB = 2**30
# Per weight, as QLoRA (Dettmers et al. 2023, section 3) counts: 4 bits, a byte per 64 for their maximum, and four
# bytes for the scale of 256 of those.
NF4_BYTES = 4 / 8 + 1 / 64 + 4 / (64 * 256)
LORA_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


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


def tune_rules(args: PlanArguments) -> TuneModelArguments:
    """What `tune` is told of how parts are trained."""
    return TuneModelArguments(
        aligned="",
        language_model="",
        train_language_model=args.train_language_model,
        language_model_precision=args.language_model_precision,
        lora_rank=args.lora_rank,
        train_cell_model=args.train_cell_model,
        train_qformer=args.train_qformer,
    )


def count_parameters(model, args: PlanArguments) -> dict[str, dict[str, int]]:
    """Trained and frozen parameters by part; LoRA's are a part of their own. Tied weights count once."""
    parts: dict[str, dict[str, int]] = {}

    def add(part: str, kind: str, number: int) -> None:
        parts.setdefault(part, {"trained": 0, "frozen": 0})[kind] += number

    rules = tune_rules(args)
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


def spared_bytes(model, args: PlanArguments) -> int:
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


@contextmanager
def counting_kept(seen: dict[int, torch.UntypedStorage]):
    """Collect every storage that autograd keeps for the backward pass of what runs inside, by its address."""

    def keep(tensor):
        storage = tensor.untyped_storage()
        seen.setdefault(storage._cdata, storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield


def activation_bytes(config: ScMMGPTConfig, args: PlanArguments) -> dict[str, int]:
    """What each part keeps for the backward pass, in bytes, for one GPU's batch; half of it is read, half generated.

    The parts run forward on fake tensors, shapes without numbers, and what autograd saves is added up. With mixed
    precision that holds copies of fp32 weights in bfloat16. With checkpointing a layer keeps its input only, and one
    layer at a time is recomputed in full.
    """
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
        if args.stage == 1:
            run, model = run_align, ScMMGPTForCellTextAlignment(config)
        else:
            held = torch.float32 if args.language_model_precision == "fp32" else torch.bfloat16
            language_model = AutoModelForCausalLM.from_config(config.text_config, dtype=held)
            run, model = run_tune, ScMMGPTForConditionalGeneration(config, language_model)
            # LoRA keeps the inputs of the layers that it adapts, as training them does.
            trained = "frozen" if args.train_language_model == "frozen" else "full"
            rules = replace(tune_rules(args), train_language_model=trained, language_model_precision="fp32")
            freeze(model, lambda name: is_frozen(name, rules, args.expression_head))
        known = {p.untyped_storage()._cdata: p.untyped_storage() for p in model.parameters()}
        result = {}
        for part, layers, state_bytes, seen in run(model.train(), args):
            full = sum(storage.nbytes() for address, storage in seen.items() if address not in known)
            known |= seen  # and is held, else a later storage may get the address of one of these
            checkpointed = layers * state_bytes + full // max(layers, 1)
            result[part] = checkpointed if args.gradient_checkpointing and layers else full
    return result


def run_align(model, args: PlanArguments):
    """Run stage 1 forward; yields (part, its layers, bytes of a layer's input, what was kept)."""
    batch, texts = args.batch_size, args.text_length
    gene_ids = torch.zeros(batch, args.cell_length, dtype=torch.long)
    with counting_kept(seen := {}):
        states = model.encode_cells(gene_ids, torch.zeros(gene_ids.shape))
    yield "cell", model.config.cell_config.num_hidden_layers, states.nbytes, seen
    with counting_kept(seen := {}):
        projected = {}
        model.project_cells(model.query_cells(states, projected=projected))
        ids = torch.zeros(batch, texts, dtype=torch.long)
        embeds = model.qformer_embeddings(input_ids=ids)
        model.project_texts(model.read_texts(ids, None, embeds))
        pairs = torch.arange(3 * batch) % batch  # matching reads three texts with each cell
        length = args.num_query_tokens + texts
        mask = torch.zeros(3 * batch, 1, length, length)
        matched = model.query_cells(states, None, embeds[pairs], mask, readers=pairs, projected=projected)
        model.matching_head(matched[:, : args.num_query_tokens])
    yield "qformer", model.config.qformer_config.num_hidden_layers, matched.nbytes, seen


def run_tune(model, args: PlanArguments):
    """Run stage 2 forward; as [`run_align`]."""
    parts, config, half = model.model, model.config, max(1, args.batch_size // 2)
    gene_ids = torch.zeros(half, args.cell_length, dtype=torch.long)
    with counting_kept(seen := {}):
        states = parts.encode_cells(gene_ids, torch.zeros(gene_ids.shape))
    cell_bytes = states.nbytes
    yield "cell", config.cell_config.num_hidden_layers, cell_bytes, seen
    with counting_kept(seen := {}):
        states = parts.query_cells(states)
        parts.language_projection(states)
    yield "qformer", config.qformer_config.num_hidden_layers, states.nbytes, seen
    held = parts.get_input_embeddings().weight.dtype
    embeds = torch.zeros(args.batch_size, args.text_length, config.text_config.hidden_size, dtype=held)
    mask = torch.ones(embeds.shape[:2], dtype=torch.long)
    mask[:, 0] = 0  # padded on the left, as batches are
    with counting_kept(seen := {}):
        inputs = {"inputs_embeds": embeds.requires_grad_(), "attention_mask": mask, "use_cache": False}
        states = parts.language_model(**inputs).last_hidden_state
    yield "text", config.text_config.num_hidden_layers, states.nbytes, seen
    with counting_kept(seen := {}):
        logits = model.lm_head(states).float()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.zeros(logits[..., 0].numel(), dtype=torch.long))
    seen[-1] = torch.empty_like(logits).untyped_storage()  # their gradient comes while all else is still held
    yield "logits", 0, 0, seen
    with counting_kept(seen := {}):
        parts.decode_cells(states[:half], mask[:half], gene_ids)
    yield "generated cell", config.cell_config.num_hidden_layers, cell_bytes, seen


def make_plan(args: PlanArguments) -> dict:
    """Bytes per GPU by what they are for, and whether they fit."""
    config = build_config(args)
    activations = activation_bytes(config, args)
    model = build_shapes(config, args.stage)
    parts = count_parameters(model, args)
    trained = sum(part["trained"] for part in parts.values())
    frozen = sum(part["frozen"] for part in parts.values())
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
