"""What must not change training: processes, accumulation, precision and memory savings."""

import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from torch.distributed.fsdp import fully_shard

from scmmgpt.modeling_scmmgpt import ScMMGPTForCellTextAlignment
from scmmgpt.train import plan
from scmmgpt.train.trainer import flatten_scalars


ACCELERATE = Path(plan.__file__).parent / "configs" / "accelerate"


@pytest.fixture
def alignment(tiny_config):
    """A stage-1 model without dropout that learns by contrast alone."""
    torch.manual_seed(0)
    tiny_config.matching_weight = 0.0  # its negatives are drawn at random, on each rank from its own rows
    tiny_config.qformer_config.hidden_dropout_prob = 0.0
    tiny_config.qformer_config.attention_probs_dropout_prob = 0.0
    return ScMMGPTForCellTextAlignment(tiny_config).train()


@pytest.fixture
def batch(tiny_processor, adata):
    """Eight cells of four types, a text for each."""
    cells, _ = tiny_processor.read_cells(adata[:8].copy())
    types = adata.obs["cell_type"][:8].astype(str)
    inputs = dict(tiny_processor(cells=cells, qformer_text=types.tolist()))
    return {**inputs, "text_ids": torch.from_numpy(np.unique(types, return_inverse=True)[1])}


def gradients_of(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _one_rank(rank, world_size, folder, model, batch, sharded, rows):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    if sharded:  # as `accelerate` does by `configs/accelerate/fsdp.yaml`, which it ignores on CPUs
        flatten_scalars(model)
        mesh = torch.distributed.init_device_mesh("cpu", (world_size,))
        for module in [module for module in model.modules() if type(module).__name__ in sharded]:
            fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
    loss, gradients = gradients_of(model, {name: value[rows[rank]] for name, value in batch.items()})
    if sharded:
        gradients = {name: gradient.full_tensor() for name, gradient in gradients.items()}
    else:
        for gradient in gradients.values():  # what DistributedDataParallel does
            torch.distributed.all_reduce(gradient)
            gradient /= world_size
    torch.save((loss, gradients), os.path.join(folder, f"{rank}.pt"))
    torch.distributed.destroy_process_group()


def check_two_processes(folder, model, batch, sharded, rows):
    """Loss and gradients of two processes, which see these rows of the batch, are those of one that sees it all."""
    loss, gradients = gradients_of(model, batch)
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_one_rank, args=(rank, 2, str(folder), model, batch, sharded, rows))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    for rank in range(2):
        their_loss, theirs = torch.load(folder / f"{rank}.pt")
        assert their_loss == pytest.approx(loss, rel=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(theirs[name].view_as(gradient), gradient, rtol=1e-3, atol=1e-6, msg=name)


@pytest.fixture
def sharded():
    """The layers that FSDP shards one by one."""
    settings = load_config_from_file(str(ACCELERATE / "fsdp.yaml")).fsdp_config
    return settings["fsdp_transformer_layer_cls_to_wrap"].split(",")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_contrast_like_one(alignment, batch, tmp_path, strategy, sharded):
    halves = slice(0, 4), slice(4, 8)
    check_two_processes(tmp_path, alignment, batch, sharded if strategy == "fsdp" else [], halves)


def test_two_processes_tell_texts_without_ids_apart(alignment, batch, tmp_path):
    order = [0, 1, 2, 3, 5, 6, 7, 4]  # else the texts of both halves would have the same row numbers
    batch = {name: value[order] for name, value in batch.items() if name != "text_ids"}
    check_two_processes(tmp_path, alignment, batch, [], (slice(0, 4), slice(4, 8)))


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view")  # logits, which nothing writes into
def test_the_generative_model_can_be_sharded(tiny_model, tiny_processor, adata, tmp_path, sharded):
    cells, _ = tiny_processor.read_cells(adata[:4].copy())
    batch = tiny_processor(
        text=["<cell> a"] * 2 + ["b"] * 2,
        cells=cells[:2],
        answers=["b", "a", "", ""],
        target_cells=cells[2:],
        target_rows=np.array([2, 3]),
    )
    check_two_processes(tmp_path, tiny_model.train(), dict(batch), sharded, (slice(None), slice(None)))


def test_a_cell_is_projected_once_for_contrast_and_matching_and_nothing_changes(alignment, batch):
    alignment.config.matching_weight = alignment.config.captioning_weight = 1.0
    cross_attention = alignment.qformer.encoder.layer[0].crossattention.attention
    projections = []
    cross_attention.key.register_forward_hook(lambda module, args, output: projections.append(len(output)))
    torch.manual_seed(0)
    loss, gradients = gradients_of(alignment, batch)
    assert projections == [8]
    # Checkpointing computes every pass anew.
    alignment.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(0)
    their_loss, theirs = gradients_of(alignment, batch)
    assert len(projections) > 4
    assert their_loss == pytest.approx(loss, rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(theirs[name], gradient, msg=name)


def test_bfloat16_follows_float32(alignment, batch):
    losses = {}
    start = {name: value.clone() for name, value in alignment.state_dict().items()}
    for use_bf16 in (False, True):
        alignment.load_state_dict(start)
        optimizer = torch.optim.AdamW(alignment.parameters(), lr=1e-3)
        losses[use_bf16] = []
        for _ in range(15):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=use_bf16):
                loss = alignment(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[use_bf16].append(loss.item())
    np.testing.assert_allclose(losses[True], losses[False], rtol=0.05, atol=0.05)


def test_eight_cells_can_be_memorised(alignment, batch):
    optimizer = torch.optim.AdamW(alignment.parameters(), lr=3e-3)
    for _ in range(60):
        alignment(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    similarity = torch.einsum("cqd,td->cqt", *[alignment(**batch)[k] for k in ("cell_features", "text_features")])
    answers = similarity.amax(dim=1).argmax(dim=1)
    assert batch["text_ids"][answers].tolist() == batch["text_ids"].tolist()
