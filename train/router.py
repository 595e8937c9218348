"""Comparison of linear readout, network and both on held-out cells: accuracy, macro-F1 and time per cell."""

import time
from collections.abc import Callable, Mapping
from typing import TypeVar


T = TypeVar("T")
PARTS = ("readout", "transformer", "both")


def timed(work: Callable[[], T], n_cells: int) -> tuple[T, float]:
    """The result of `work`, and its time in milliseconds per cell."""
    began = time.perf_counter()
    result = work()
    return result, 1e3 * (time.perf_counter() - began) / n_cells


def verdict(parts: Mapping[str, Mapping[str, float]], used: str, was_trained: bool = False) -> str:
    """State which part `annotate` uses (`readout` or `both`), and why, from the scores of the parts.

    `transformer` is missing if its queries contribute nothing: if gradient steps were taken, no epoch lowered the
    validation loss.
    """
    if "transformer" not in parts and was_trained:
        return "`annotate` uses the linear readout. No epoch of the network lowered the loss, and training was undone."
    if "transformer" not in parts:
        return "`annotate` uses the linear readout. The network was not trained; `--num_train_epochs 3` compares it."
    readout, network = parts["readout"]["accuracy"], parts["transformer"]["accuracy"]
    relation = "beats" if readout > network else "equals" if readout == network else "loses to"
    compared = f"On your cells the linear readout {relation} the network: {readout:.3f} against {network:.3f}."
    if used == "readout":
        return f"{compared} `annotate` uses the readout alone, as the gain of both is within its standard error."
    return f"{compared} `annotate` uses both, which fit better by more than the standard error."


def comparison(parts: Mapping[str, Mapping[str, float]], used: str, n_cells: int, was_trained: bool = False) -> str:
    """A table of held-out accuracy, macro-F1 and time of each part, with a mark at `used`, and the verdict."""
    lines = [f"{f'{n_cells} held-out cells':<24}{'accuracy':>9}{'macro-F1':>10}{'ms a cell':>11}"]
    for name in PARTS:
        row = parts.get(name, {})
        numbers = [f"{row[key]:.3f}" if row else "-" for key in ("accuracy", "macro_f1", "ms_per_cell")]
        mark = "  used" if name == used else ""
        lines.append(f"{name:<24}{numbers[0]:>9}{numbers[1]:>10}{numbers[2]:>11}{mark}")
    return "\n".join([*lines, verdict(parts, used, was_trained)])
