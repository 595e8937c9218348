"""Pictures of the report: each figure as a data URI, with its alternative text and its caption."""

import logging
from collections.abc import Sequence

import numpy as np

from scmmgpt.eval import figures, generation
from scmmgpt.eval.cells import LabelledCells
from scmmgpt.eval.metrics.generated_cell_knn.generated_cell_knn import fit_cell_space
from scmmgpt.train.curves import training_figure


logger = logging.getLogger(__name__)

MAX_ON_MAP = 2000  # cells of each kind on the UMAP


def annotation_pictures(result: dict) -> dict:
    """Figures of the annotation section, each a data URI with its alternative text."""
    counts = np.array(result["confusion"]["counts"])
    right = int(sum(counts[i, i] for i in range(len(counts))))
    labels, columns = result["confusion"]["labels"], result["confusion"]["columns"]
    errors = [(counts[i, j], labels[i], columns[j]) for i, j in np.ndindex(counts.shape) if i != j]
    n, true, predicted = max(errors, default=(0, "", ""))
    slip = f" The commonest error is {true} annotated as {predicted}, {n} cells." if n else ""
    pictures = {
        "confusion": {
            "src": figures.data_uri(figures.confusion_figure(result["confusion"])),
            "alt": f"Confusion matrix of {counts.sum()} held-out cells; {right} lie on the diagonal.{slip}",
            "caption": "Confusion matrix: true types down, predicted across. Numbers are cells, shade is the share of "
            f"the true type.{slip}",
        }
    }
    if result["calibration"]:
        pictures["calibration"] = {
            "src": figures.data_uri(figures.calibration_figure(result["calibration"])),
            "alt": "Accuracy against confidence in "
            + ", ".join(f"{b['confidence']:.2f}: {b['accuracy']:.2f}" for b in result["calibration"]),
            "caption": "Calibration: on the dashed line, confidence equals accuracy. Larger points hold more cells.",
        }
    return pictures


def generation_pictures(
    matrix: np.ndarray, prompts: np.ndarray, genes: np.ndarray, train: LabelledCells, test: LabelledCells, *, seed: int
) -> dict:
    """Figures of the generation section, each a data URI with its alternative text.

    Args:
        matrix: Generated log1p(CP10k), shape `(n_generated, n_genes)`.
        prompts: Prompted types.
        genes: Symbols of the columns.
        train: Training cells, which define the space and the markers.
        test: Held-out cells.
        seed: Seed of the map and of the cells shown on it.
    """
    matrix, train, test = generation.align_genes(matrix, genes, train, test)
    rng = np.random.default_rng(seed)
    mine = np.sort(rng.permutation(len(matrix))[:MAX_ON_MAP])
    theirs = np.sort(rng.permutation(len(test))[:MAX_ON_MAP])
    space = fit_cell_space(train.expression, seed=seed)
    points = np.concatenate([space.transform(test.expression[theirs]), space.transform(matrix[mine])])
    coordinates = figures.umap_coordinates(points, seed=seed)
    real, generated = coordinates[: len(theirs)], coordinates[len(theirs) :]
    colors = figures.type_colors([*test.labels, *prompts])
    by_type, by_origin = figures.umap_figures(real, test.labels[theirs], generated, prompts[mine], colors)
    markers = figures.marker_genes(train)
    column = {gene: i for i, gene in enumerate(train.genes)}
    columns = [column[gene] for _, gene in markers]
    types = [
        label for label in dict.fromkeys(label for label, _ in markers) if label in test.labels and label in prompts
    ]
    real_means = np.stack([np.asarray(test.expression[test.labels == t][:, columns].mean(0)).ravel() for t in types])
    generated_means = np.stack([matrix[prompts == t][:, columns].mean(0) for t in types])
    match = float(np.corrcoef(real_means.ravel(), generated_means.ravel())[0, 1])
    return {
        "umap_type": {
            "src": figures.data_uri(by_type),
            "alt": f"UMAP of {len(theirs)} real held-out cells and {len(mine)} generated cells, coloured by type.",
            "caption": "Real held-out cells (circles) and generated cells (triangles) on one UMAP, by type.",
        },
        "umap_origin": {
            "src": figures.data_uri(by_origin),
            "alt": "The same UMAP coloured by origin: real cells grey, generated cells orange.",
            "caption": "The same map by origin. Orange alone: generated cells unlike any real cell. "
            "Grey alone: real cells unlike any generated cell.",
        },
        "markers": {
            "src": figures.data_uri(figures.marker_figure(markers, types, real_means, generated_means)),
            "alt": f"Heat map of {len(markers)} marker genes by {len(types)} types, real above generated; the two "
            f"correlate by {match:.2f}.",
            "caption": f"Mean expression of marker genes (found in training cells) by type, real held-out cells above "
            f"generated ones, each gene relative to its largest real mean. "
            f"Correlation of the two panels: {match:.2f}.",
        },
    }


def training_pictures(runs: Sequence[dict]) -> list[dict]:
    """A figure a run with its alternative text; runs that logged no loss are left out."""
    pictures = []
    for run in runs:
        figure = training_figure(run["history"])
        if figure is None:
            logger.warning("The training log of %r holds no loss.", run["name"])
            continue
        losses = [entry["loss"] for entry in run["history"] if "loss" in entry]
        change = f" The loss went from {losses[0]:.3g} to {losses[-1]:.3g}." if losses else ""
        pictures.append(
            {
                "src": figures.data_uri(figure),
                "alt": f"Training losses of {run['name']} over {run['steps']} steps.{change}",
                "caption": f"{run['name']}: losses over {run['steps']} optimiser steps.{change}",
            }
        )
    return pictures
