"""The machine and the installed packages, as `scmmgpt doctor` shows them."""

import os
import platform
from importlib.metadata import distributions
from typing import Any

import torch

from scmmgpt.machine_scmmgpt import best_device, cpu_dtype, cpu_rate


def describe_machine() -> dict[str, dict[str, Any]]:
    """Collect device, speed and versions, by section."""
    installed = {package.name: package.version for package in distributions()}
    device = best_device()
    names = "scmmgpt torch transformers numpy anndata safetensors numba scanpy datasets peft trl evaluate gradio"
    return {
        "machine": {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "device": torch.cuda.get_device_name() if device == "cuda" else device,
            "threads": torch.get_num_threads(),
            "instructions of the CPU": torch.backends.cpu.get_cpu_capability(),
            "float32 on the CPU": f"{cpu_rate(torch.float32) / 1e9:,.0f} GFLOP/s",
            "bfloat16 on the CPU": f"{cpu_rate(torch.bfloat16) / 1e9:,.0f} GFLOP/s",
            "precision for the CPU": str(cpu_dtype(torch.bfloat16)).removeprefix("torch."),
            "bfloat16 on the device": bool(device == "cuda" and torch.cuda.is_bf16_supported()),
            "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "not set"),
        },
        "packages": {name: installed.get(name, "not installed") for name in names.split()},
    }


def check_device(name: str | None) -> None:
    """Refuse a device that PyTorch does not know or cannot use."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        why = " ".join(str(error).split())[:120]
        why = "it is not a device of PyTorch" if why.startswith("Expected one of") else why
        raise ValueError(f"--device {name!r} cannot be used ({why}). Name cpu, cuda or mps.") from None
