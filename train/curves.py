"""Training curves, and the style of all figures of the project. Drawing needs matplotlib (extra `eval`)."""

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


logger = logging.getLogger(__name__)

Curve = list[tuple[int, float]]  # step, value


def figure_style() -> AbstractContextManager[None]:
    """Context manager with the style of figures; draw and save figures inside it."""
    import matplotlib

    return matplotlib.rc_context(
        {
            "font.size": 9,
            "font.family": "sans-serif",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 10,
            "axes.titleweight": "bold",
            "axes.edgecolor": "#52606d",
            "text.parse_math": False,  # labels are plain text, dollar signs included
            "svg.hashsalt": "scmmgpt",  # equal figures are equal files
        }
    )


def save_curves(log_history: Sequence[Mapping], output_dir: str | Path) -> None:
    """Draw training and validation curves as `curves.png`; without matplotlib, log how to install it."""
    try:
        figure = training_figure(log_history)
    except ImportError as error:
        logger.info("No picture of the training curves: %s. Install scmmgpt[eval].", error)
        return
    if figure is not None:
        figure.savefig(Path(output_dir, "curves.png"), dpi=120)  # a tight box would draw it twice


def training_figure(history: Sequence[Mapping]) -> "Figure | None":
    """Draw losses over steps, and below them accuracies and recalls of validation; `None` without a logged loss.

    Solid lines are training; dashed lines with points are validation.
    """
    from matplotlib.figure import Figure

    curves = read_curves(history)
    losses = sorted((n for n in curves if n.endswith("loss")), key=lambda n: (n.startswith("eval_"), n != "loss", n))
    shares = sorted(set(curves) - set(losses))
    if not losses:
        return None
    with figure_style():
        figure = Figure(figsize=(4.8, 5.2 if shares else 3.4), layout="constrained")
        heights = [2, 1] if shares else [2]
        panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for axes, names in zip(panels, (losses, shares)[: len(panels)], strict=True):
            draw_curves(axes, {name: curves[name] for name in names})
            axes.set_ylabel("loss" if names is losses else "validation")
            axes.set_ylim(bottom=min(0, axes.get_ylim()[0]), top=1.02 if axes is not panels[0] else None)
            below = -0.3 if axes is panels[-1] else -0.12
            axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, below), ncols=2)
        panels[-1].set_xlabel("optimiser step")
    return figure


def read_curves(history: Sequence[Mapping]) -> dict[str, Curve]:
    """Extract losses, and accuracies and recalls of validation: name in the log -> `(step, value)`s."""
    curves: dict[str, Curve] = {}
    for entry in history:
        for name, value in entry.items():
            is_loss = name == "loss" or name.endswith("_loss") and name != "train_loss"
            is_share = name.startswith("eval_") and name.endswith(("_accuracy", "_recall", "_recall_at_10"))
            if (is_loss or is_share) and isinstance(value, int | float) and math.isfinite(value):
                curves.setdefault(name, []).append((entry["step"], float(value)))
    return curves


def draw_curves(axes: "Axes", curves: Mapping[str, Curve]) -> None:
    """Draw curves in order; the training curve and the validation curve of a loss share a colour."""
    import matplotlib

    colors = iter(matplotlib.color_sequences["tab10"] * 4)
    color_of: dict[str, object] = {}
    for name, curve in curves.items():
        steps, values = zip(*curve, strict=True)
        base = name.removeprefix("eval_")
        color = color_of.setdefault(base, next(colors))
        title = base.removesuffix("_loss").replace("_", " ")
        if name.startswith("eval_"):
            title += ", validation" if name.endswith("loss") else ""
            axes.plot(steps, values, "o--", color=color, markersize=4, linewidth=0.8, label=title)
        else:
            axes.plot(steps, values, color=color, linewidth=2 if name == "loss" else 1.2, label=title)
