"""The device of this machine, and the precision that its CPU is fastest in."""

import functools
import time

import torch


PROBE_SECONDS = 0.05  # of processor time for [`cpu_rate`], so that a busy moment does not decide


def best_device() -> str:
    """`"cuda"`, `"mps"` or `"cpu"`: the fastest that this machine has."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


@functools.cache
def cpu_rate(dtype: torch.dtype) -> float:
    """Operations per second of CPU time in a matrix product, measured once a process.

    Instruction sets do not decide: bfloat16 is four times as fast as float32 where the CPU multiplies it (AMX,
    AVX512_BF16), and a hundredth where PyTorch has to emulate it (AVX2 alone).
    """
    tokens, weight = torch.ones(64, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
    seconds: list[float] = []
    while len(seconds) < 5 or sum(seconds) < PROBE_SECONDS:  # the first product also sets the kernel up
        start = time.process_time()  # of all threads, those that wait for a busy core among them
        torch.mm(tokens, weight)
        seconds.append(time.process_time() - start)
    return 2 * tokens.numel() * len(weight) / max(min(seconds), 1e-9)


def cpu_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision to compute in on this CPU: `dtype`, or float32 where that is faster.

    A CPU is some four times as fast in bfloat16, or a hundred times as slow, and other work rarely hides either.
    """
    is_half = dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if is_half and cpu_rate(dtype) < cpu_rate(torch.float32) else dtype
