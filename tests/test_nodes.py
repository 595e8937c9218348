"""Training on several machines: a rank that is killed is started again by torchrun, and the weights are the same."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from scmmgpt.tests.test_train import SIZES, words_of


# What each process runs. Rank 1 dies in the fourth step of the first start, as if its machine were switched off.
SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
from transformers import Trainer
torch.set_num_threads(1)
from scmmgpt.train.__main__ import main

marker, words = Path(sys.argv[1]), sys.argv[2:]
step = Trainer.training_step

def dying(self, *args, **kwargs):
    if self.state.global_step == 3 and os.environ["RANK"] == "1" and marker.parent.is_dir() and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **kwargs)

Trainer.training_step = dying
sys.exit(main(words))
"""


def train_on_two_nodes(corpus, bert, folder, marker):
    """Run `align` by `torchrun` on two nodes of one process each, which meet at a rendezvous, over gloo."""
    values = {"corpus": corpus, "bert": bert, "output_dir": folder / "out", "learning_rate": 1e-3}
    values |= {"cell_config": {**SIZES, "hidden_dropout": 0.1}, "qformer_config": {"cross_attention_frequency": 1}}
    values |= {"model_config": {"num_query_tokens": 2, "projection_dim": 8}, "per_device_train_batch_size": 4}
    values |= {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "report_to": "none", "use_cpu": True}
    values |= {"disable_tqdm": True, "logging_steps": 1, "resume_from_checkpoint": "latest", "ddp_backend": "gloo"}
    folder.mkdir()
    (folder / "script.py").write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", folder.name]
    command += ["--max-restarts", "1", str(folder / "script.py"), str(marker), "align", *words_of(values)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    logs = [(folder / f"node{node}.log").open("w") for node in range(2)]
    nodes = [subprocess.Popen(command, stdout=log, stderr=log, env=environment) for log in logs]
    codes = [node.wait(timeout=400) for node in nodes]
    assert codes == [0, 0], (folder / "node0.log").read_text()[-3000:]
    state = json.loads((folder / "out" / "trainer_state.json").read_text())
    return load_file(folder / "out" / "model.safetensors"), [
        entry["loss"] for entry in state["log_history"] if "loss" in entry
    ]


@pytest.mark.slow
def test_a_rank_that_is_killed_goes_on_from_the_last_checkpoint_to_the_same_weights(corpus, bert, tmp_path):
    (tmp_path / "marks").mkdir()
    marker = tmp_path / "marks" / "killed"
    weights, losses = train_on_two_nodes(corpus, bert, tmp_path / "whole", tmp_path / "nowhere" / "never")
    resumed, losses_after = train_on_two_nodes(corpus, bert, tmp_path / "killed", marker)
    assert marker.exists()
    assert losses_after == losses
    assert len(losses) == 6
    for name, value in weights.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0, msg=name)
