"""The memory plan against a model that is really built."""

import contextlib
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from scmmgpt.modeling_scmmgpt import ScMMGPTForConditionalGeneration
from scmmgpt.train import plan
from scmmgpt.train.arguments import TuneModelArguments
from scmmgpt.train.language_model import add_lora
from scmmgpt.train.trainer import freeze
from scmmgpt.train.tune import is_frozen, saved_parts


ACCELERATE = Path(plan.__file__).parent / "configs" / "accelerate"
TINY = {
    "cell_config": {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "pad_token_id": 0,
        "cls_token_id": 1,
    },
    "qformer_config": {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    },
    "text_config": {
        "model_type": "llama",
        "vocab_size": 60,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 32,
    },
    "model_config": {"num_query_tokens": 2, "projection_dim": 8},
}


@pytest.mark.parametrize(("which", "held"), [("lora", "fp32"), ("full", "fp32"), ("frozen", "fp32"), ("lora", "bf16")])
def test_the_plan_counts_what_training_a_real_model_takes(which, held):
    parts = {"language_model": which}
    args = plan.PlanArguments(**TINY, train_parts=parts, language_model_precision=held, gpus=1, precision="fp32")
    planned = plan.make_plan(args)

    model = ScMMGPTForConditionalGeneration(plan.build_config(args))
    if held == "bf16":
        model.model.language_model.to(torch.bfloat16)
        model.lm_head.to(torch.bfloat16)
    rules = TuneModelArguments(aligned="", language_model="", train_parts=parts)
    lora = add_lora(rules, saved_parts(rules.trained))
    if lora is not None:
        from peft import get_peft_model

        model = get_peft_model(model, lora)
        model.requires_grad_(True)
    freeze(model, lambda name: is_frozen(name.replace("base_layer.", ""), rules.trained, "nb"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    sizes = {
        "weights": sum(p.nbytes for p in model.parameters()),
        "gradients": sum(p.grad.nbytes for p in trained),
        "optimiser": sum(s[k].nbytes for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")),
    }
    assert {name: planned["bytes_per_gpu"][name] for name in sizes} == sizes


def test_four_bits_are_counted_as_bitsandbytes_holds_them_and_for_the_layers_alone():
    fp32, held = (
        plan.make_plan(plan.PlanArguments(**TINY, language_model_precision=precision))["bytes_per_gpu"]["weights"]
        for precision in ("fp32", "4bit")
    )
    layers = 2 * (4 * 24 * 24 + 3 * 24 * 32)
    assert fp32 - held == pytest.approx((4 - plan.NF4_BYTES) * layers, abs=1)

    bitsandbytes = pytest.importorskip("bitsandbytes", reason="the extra `quantized` is not installed")
    layer = bitsandbytes.nn.Linear4bit(256, 256, bias=False, quant_type="nf4").to("cpu")
    maxima = layer.weight.quant_state
    size = layer.weight.nbytes + maxima.absmax.nbytes + maxima.state2.absmax.nbytes
    assert size == 256 * 256 * plan.NF4_BYTES


def test_fsdp_divides_by_the_number_of_gpus_and_ddp_does_not():
    one, ddp, fsdp = (
        plan.make_plan(plan.PlanArguments(**TINY, gpus=gpus, strategy=strategy))["bytes_per_gpu"]["optimiser"]
        for gpus, strategy in [(1, "ddp"), (4, "ddp"), (4, "fsdp")]
    )
    assert one == ddp == 4 * fsdp


def test_checkpointing_and_smaller_batches_save_activations():
    def activations(**options):
        return plan.make_plan(plan.PlanArguments(**TINY, **options))["bytes_per_gpu"]["activations"]

    assert activations(gradient_checkpointing=True, text_length=100) < activations(text_length=100)
    assert activations(batch_size=2, precision="fp32") < 0.6 * activations(batch_size=4, precision="fp32")
    # The bfloat16 copies of weights that are held in fp32
    assert activations(language_model_precision="bf16") < activations(language_model_precision="fp32")


@pytest.mark.parametrize("options", [{"stage": 1}, {}, {"precision": "fp32"}, {"language_model_precision": "bf16"}])
def test_what_tensors_without_numbers_save_is_what_real_ones_save(options, monkeypatch):
    args = plan.PlanArguments(**TINY, **options)
    planned = plan.activation_bytes(plan.build_config(args), args)
    monkeypatch.setattr(plan, "FakeTensorMode", contextlib.nullcontext)
    assert plan.activation_bytes(plan.build_config(args), args) == pytest.approx(planned, rel=0.01)
    assert all(planned.values())


def test_the_published_size_is_planned_from_its_file_without_being_built(capsys):
    path = Path(plan.__file__).parent / "configs" / "plan_llama2_7b.yaml"
    (args,) = plan.make_parser().parse_args_and_config(["--config", str(path)])
    plan.main(args)
    planned = plan.make_plan(args)
    parts = planned["parameters"]
    assert parts["language_model"]["frozen"] + parts["lm_head"]["frozen"] == 6_738_423_808  # Llama-2 7B and `<cell>`
    assert "It fits into 80 GiB" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(ACCELERATE.glob("*.yaml")), ids=lambda path: path.name)
def test_every_launch_configuration_is_understood_and_wraps_layers_that_exist(path):
    config = load_config_from_file(str(path))
    assert config.mixed_precision == "bf16"
    wrapped = (config.to_dict().get("fsdp_config") or {}).get("fsdp_transformer_layer_cls_to_wrap", "")
    args = plan.PlanArguments(**TINY)
    names = {type(module).__name__ for module in plan.build_shapes(plan.build_config(args), 2).modules()}
    assert set(filter(None, wrapped.split(","))) <= names
