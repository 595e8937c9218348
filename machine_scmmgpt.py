"""The fastest device of this machine, and the fastest precision of its CPU."""

import functools
import time

import torch


PROBE_SECONDS = 0.05  # least CPU time of the measurement in [`cpu_rate`], so that a busy moment does not decide


def best_device() -> str:
    """`"cuda"`, `"mps"` or `"cpu"`: the fastest that this machine has."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


@functools.cache
def cpu_rate(dtype: torch.dtype) -> float:
    """Operations per second of CPU time in a matrix product, measured once per process.

    bfloat16 is four times as fast as float32 on a CPU that multiplies it (AMX, AVX512_BF16), and a hundred times as
    slow if PyTorch emulates it (AVX2). The rate is measured, as a list of instruction sets does not predict it.
    """
    tokens, weight = torch.ones(64, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
    seconds: list[float] = []
    while len(seconds) < 5 or sum(seconds) < PROBE_SECONDS:  # the first product includes the setup of the kernel
        start = time.process_time()  # CPU time of all threads, busy waiting included
        torch.mm(tokens, weight)
        seconds.append(time.process_time() - start)
    return 2 * tokens.numel() * len(weight) / max(min(seconds), 1e-9)


def cpu_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in on this CPU: `dtype`, or float32 if `dtype` is a slower half precision."""
    is_half = dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if is_half and cpu_rate(dtype) < cpu_rate(torch.float32) else dtype
