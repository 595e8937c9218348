"""Pictures of the report: name -> `{"src", "alt", "caption"}`, with the figure as a data URI."""

import logging
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from scmmgpt.eval import figures, generation
from scmmgpt.eval.cells import LabelledCells
from scmmgpt.eval.metrics.generated_cell_knn.generated_cell_knn import fit_cell_space
from scmmgpt.train.curves import training_figure


logger = logging.getLogger(__name__)

MAX_ON_MAP = 2000  # cells of each kind on the map


def _picture(figure: Figure, alt: str, caption: str) -> dict[str, str]:
    return {"src": figures.data_uri(figure), "alt": alt, "caption": caption}


def annotation_pictures(result: dict) -> dict[str, dict]:
    """The confusion matrix, and the calibration where there are confidences."""
    counts = np.array(result["confusion"]["counts"])
    right = np.trace(counts)
    labels, columns = result["confusion"]["labels"], result["confusion"]["columns"]
    errors = [(counts[i, j], labels[i], columns[j]) for i, j in np.ndindex(counts.shape) if i != j]
    n, true, predicted = max(errors, default=(0, "", ""))
    slip = f" The commonest error is {true} annotated as {predicted}, {n} cells." if n else ""
    pictures = {
        "confusion": _picture(
            figures.confusion_figure(result["confusion"]),
            f"Confusion matrix of {counts.sum()} held-out cells; {right} lie on the diagonal.{slip}",
            "Confusion matrix: true types in rows, predicted types in columns. Numbers count cells, the shade is the "
            f"share of the true type.{slip}",
        )
    }
    if result["calibration"]:
        values = ", ".join(f"{b['confidence']:.2f}: {b['accuracy']:.2f}" for b in result["calibration"])
        pictures["calibration"] = _picture(
            figures.calibration_figure(result["calibration"]),
            f"Accuracy against confidence in {values}",
            "Calibration: on the dashed line, confidence equals accuracy. Larger points hold more cells.",
        )
    return pictures


def generation_pictures(
    generated_cells: generation.GeneratedCells, train: LabelledCells, test: LabelledCells, *, seed: int
) -> dict[str, dict]:
    """Two maps of held-out and generated cells in components of training cells, and the expression of marker genes.

    The seed draws the cells on the map.
    """
    (matrix, prompts, *_), train, test = generation.align_genes(generated_cells, train, test)
    rng = np.random.default_rng(seed)
    mine = np.sort(rng.permutation(len(matrix))[:MAX_ON_MAP])
    theirs = np.sort(rng.permutation(len(test))[:MAX_ON_MAP])
    space = fit_cell_space(train.expression, seed=seed)
    points = np.concatenate([space.transform(test.expression[theirs]), space.transform(matrix[mine])])
    coordinates = figures.tsne_coordinates(points, seed=seed)
    real, generated = coordinates[: len(theirs)], coordinates[len(theirs) :]
    colors = figures.type_colors([*test.labels, *prompts])
    by_type, by_origin = figures.map_figures(real, test.labels[theirs], generated, prompts[mine], colors)
    markers = figures.marker_genes(train)
    column = {gene: i for i, gene in enumerate(train.genes)}
    columns = [column[gene] for _, gene in markers]
    types = [t for t in dict.fromkeys(label for label, _ in markers) if t in test.labels and t in prompts]
    real_means = np.stack([np.asarray(test.expression[test.labels == t][:, columns].mean(0)).ravel() for t in types])
    generated_means = np.stack([matrix[prompts == t][:, columns].mean(0) for t in types])
    match = float(np.corrcoef(real_means.ravel(), generated_means.ravel())[0, 1])
    return {
        "map_type": _picture(
            by_type,
            f"t-SNE of {len(theirs)} real held-out cells and {len(mine)} generated cells, coloured by type.",
            "Real held-out cells (circles) and generated cells (triangles) on one map by t-SNE, by type.",
        ),
        "map_origin": _picture(
            by_origin,
            "The same t-SNE coloured by origin: real cells grey, generated cells orange.",
            "The same t-SNE by origin. Areas of orange alone: generated cells unlike any real cell. "
            "Areas of grey alone: real cells unlike any generated cell.",
        ),
        "markers": _picture(
            figures.marker_figure(markers, types, real_means, generated_means),
            f"Heat map of {len(markers)} marker genes by {len(types)} types, real cells above generated cells; the "
            f"correlation of the two panels is {match:.2f}.",
            "Mean expression of marker genes (of the training cells) by type, real held-out cells above generated "
            f"cells, relative to the largest real mean of each gene. Correlation of the two panels: {match:.2f}.",
        ),
    }


def training_pictures(runs: Sequence[dict]) -> list[dict]:
    """The training curves of each run that logged a loss."""
    pictures = []
    for run in runs:
        figure = training_figure(run["history"])
        if figure is None:
            logger.warning("The training log of %r holds no loss.", run["name"])
            continue
        losses = [entry["loss"] for entry in run["history"] if "loss" in entry]
        change = f" The loss went from {losses[0]:.3g} to {losses[-1]:.3g}." if losses else ""
        alt = f"Training losses of {run['name']} over {run['steps']} steps.{change}"
        pictures.append(_picture(figure, alt, f"{run['name']}: losses over {run['steps']} optimiser steps.{change}"))
    return pictures
