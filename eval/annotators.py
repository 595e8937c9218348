"""Systems that learn cell types from labelled cells: ours, regressions, CellTypist and simpler methods."""

import functools
import inspect
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold

from scmmgpt.cells_scmmgpt import log1p_cp10k
from scmmgpt.eval import baselines


if TYPE_CHECKING:
    from scmmgpt.pipeline_scmmgpt import ScMMGPTPipeline


logger = logging.getLogger(__name__)

FOLDS = 4  # folds of the cross-validation of C; fewer if a label has fewer cells
PRETRAINED = "finetune from the checkpoint"
COMPONENTS = 50  # scanpy's default number of principal components


@dataclass(frozen=True)
class LabelBudget:
    """Training cells, some of them with visible labels, and test cells to annotate."""

    adata: AnnData  # all training cells, with counts in `X`
    labels: np.ndarray  # labels of the training cells, `(n_obs,)`
    shown: np.ndarray  # rows whose labels a system may use
    test: AnnData
    seed: int  # seed of a system


def run_finetune(
    adata: AnnData, output: str | Path, *, label_key: str, seed: int = 0, options: Sequence[Any] = ()
) -> "ScMMGPTPipeline":
    """Run `python -m scmmgpt.train finetune` in this process and return the pipeline of its checkpoint.

    The folder `output` gets the cells and the checkpoint; `options` are further words of the command line.
    """
    from scmmgpt.pipeline_scmmgpt import ScMMGPTPipeline
    from scmmgpt.train import finetune

    path = Path(output, "cells.h5ad")
    adata.write_h5ad(path)
    checkpoint = Path(output, "checkpoint").resolve()
    words: list[Any] = ["--adata", path, "--label_key", label_key, "--output_dir", checkpoint, "--seed", seed]
    words += ["--save_strategy", "no", "--disable_tqdm", True, *options]
    finetune.main(*finetune.make_parser().parse_args_and_config([str(word) for word in words]))
    return ScMMGPTPipeline.from_pretrained(str(checkpoint))


def finetuned(
    budget: LabelBudget, *, label_key: str, options: Sequence[str] = (), unlabelled: bool = False
) -> np.ndarray:
    """Annotate the test cells by our fine-tuning, with further words of the command line (`options`).

    With `unlabelled`, the file also has the training cells without visible labels.
    """
    labels = np.full(budget.adata.n_obs, None, dtype=object)
    labels[budget.shown] = budget.labels[budget.shown]
    adata = budget.adata.copy()
    adata.obs[label_key] = labels
    if not unlabelled:
        adata = adata[budget.shown].copy()
    shots = np.unique(budget.labels[budget.shown], return_counts=True)[1].max()
    few = ["--shots", shots] if len(budget.shown) < budget.adata.n_obs else []
    with tempfile.TemporaryDirectory() as folder:
        pipeline = run_finetune(adata, folder, label_key=label_key, seed=budget.seed, options=[*few, *options])
    return np.asarray(pipeline.annotate(budget.test.copy()).obs["scmmgpt_cell_type"]).astype(str)


def expression(adata: AnnData) -> sparse.csr_matrix:
    """log1p(CP10k) of all genes of the file, CSR float32 `(n_obs, n_vars)`."""
    counts = sparse.csr_matrix(adata.X, dtype=np.float32)
    return log1p_cp10k(counts, np.asarray(counts.sum(axis=1)).ravel())


def cross_validated_regression(
    train: baselines.Matrix, labels: np.ndarray, test: baselines.Matrix, *, seed: int = 0
) -> np.ndarray:
    """Multinomial logistic regression; C is chosen by cross-validated accuracy, with seeded folds."""
    model = LogisticRegression(warm_start=True, max_iter=baselines.MAX_ITERATIONS, tol=1e-3)
    n_folds = min(FOLDS, np.unique(labels, return_counts=True)[1].min())
    best = 1.0  # scikit-learn's default, if a label has a single cell
    if n_folds > 1:
        folds = StratifiedKFold(n_folds, shuffle=True, random_state=seed).split(labels, labels)
        best, _ = baselines.choose_penalty(model, train, labels, folds)
    logger.info("Logistic regression: C = %g", best)
    return baselines.fit_quietly(model.set_params(C=best), train, labels).predict(test)


def regression(budget: LabelBudget) -> np.ndarray:
    """Logistic regression on all genes."""
    train = expression(budget.adata[budget.shown])
    return cross_validated_regression(train, budget.labels[budget.shown], expression(budget.test), seed=budget.seed)


def component_regression(budget: LabelBudget, scores: Callable[[AnnData], np.ndarray] | None = None) -> np.ndarray:
    """Logistic regression on principal components of log1p(CP10k) of all training cells.

    `scores` adds further features `(n_obs, n_features)` of an AnnData.
    """
    from sklearn.decomposition import PCA

    everything = expression(budget.adata)
    pca = PCA(min(COMPONENTS, *(n - 1 for n in everything.shape)), svd_solver="arpack", random_state=0)
    train = pca.fit_transform(everything)[budget.shown]
    test = pca.transform(expression(budget.test))
    if scores is not None:
        train = np.hstack([train, scores(budget.adata[budget.shown])])
        test = np.hstack([test, scores(budget.test)])
    return cross_validated_regression(train, budget.labels[budget.shown], test, seed=budget.seed)


def label_scores(adata: AnnData, checkpoint: str) -> np.ndarray:
    """Log probabilities of the labels of a checkpoint, `(n_obs, n_labels)`."""
    annotated = load_pipeline(checkpoint).annotate(adata.copy(), min_score=0)
    return np.log(np.asarray(annotated.obsm["scmmgpt_probabilities"], dtype=np.float64) + 1e-4)


@functools.lru_cache(maxsize=1)
def load_pipeline(checkpoint: str) -> "ScMMGPTPipeline":
    """Load a checkpoint, cached."""
    from scmmgpt.pipeline_scmmgpt import ScMMGPTPipeline

    return ScMMGPTPipeline.from_pretrained(checkpoint)


class _OneVersusRest:
    """One-versus-rest regression as `celltypist.train` expects it; scikit-learn 1.8 removed `multi_class="ovr"`."""

    def __init__(self, multi_class: str = "ovr", n_jobs: int | None = None, **options: Any) -> None:
        self.options = options

    def fit(self, x: np.ndarray, y: np.ndarray) -> "_OneVersusRest":
        self.classes_ = np.unique(y)
        x = np.asarray(x)
        targets = self.classes_ if len(self.classes_) > 2 else self.classes_[1:]
        models = [LogisticRegression(**self.options).fit(x, np.asarray(y) == target) for target in targets]
        self.coef_ = np.concatenate([model.coef_ for model in models])
        self.intercept_ = np.concatenate([model.intercept_ for model in models])
        return self

    def decision_function(self, x: np.ndarray) -> np.ndarray:
        scores = np.asarray(x) @ self.coef_.T + self.intercept_
        return scores if len(self.classes_) > 2 else scores[:, 0]


def celltypist_scores(budget: LabelBudget) -> pd.DataFrame:
    """Scores of the labels by CellTypist with its default training, cells x labels; the highest score is its label."""
    import celltypist as package

    def normalised(adata: AnnData) -> AnnData:
        return AnnData(expression(adata), obs=adata.obs, var=adata.var)

    module: Any = sys.modules["celltypist.train"]  # the package's attribute of that name is a function
    fits = "multi_class" in inspect.signature(LogisticRegression).parameters
    regression = LogisticRegression if fits else _OneVersusRest
    package.logger.set_level(logging.WARNING)
    with mock.patch.object(module, "LogisticRegression", regression), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = package.train(normalised(budget.adata[budget.shown]), labels=budget.labels[budget.shown], n_jobs=1)
        return package.annotate(normalised(budget.test), model=model).decision_matrix


def celltypist(budget: LabelBudget) -> np.ndarray:
    """Label with the highest [`celltypist_scores`] for each cell."""
    return celltypist_scores(budget).idxmax(axis=1).to_numpy().astype(str)


def centroid(budget: LabelBudget) -> np.ndarray:
    """Label with the nearest mean log1p(CP10k) for each cell."""
    train = expression(budget.adata[budget.shown])
    with warnings.catch_warnings():
        # With one cell of each label, scikit-learn divides by 0 in a standard deviation that is not used here.
        warnings.simplefilter("ignore", RuntimeWarning)
        return baselines.nearest_centroid(train, budget.labels[budget.shown], expression(budget.test)).labels


@dataclass(frozen=True)
class System:
    """One row of the table."""

    predict: Callable[[LabelBudget], np.ndarray]  # -> predicted labels of the test cells
    random: bool = False  # whether predictions on the same cells depend on the seed
    semi_supervised: bool = False  # whether it learns from unlabelled cells; skipped if all labels are visible


def make_systems(label_key: str, options: Sequence[str], checkpoint: str | None = None) -> dict[str, System]:
    """List all systems by name, in the order of the table; a checkpoint adds the systems that start from it."""
    ours = functools.partial(finetuned, label_key=label_key, options=options)
    pretrained: dict[str, System] = {}
    if checkpoint is not None:
        started = functools.partial(finetuned, label_key=label_key, options=[*options, "--checkpoint", checkpoint])
        scored = functools.partial(component_regression, scores=functools.partial(label_scores, checkpoint=checkpoint))
        pretrained = {
            PRETRAINED: System(started, random=True),
            f"{PRETRAINED}, unlabelled": System(
                functools.partial(started, unlabelled=True), random=True, semi_supervised=True
            ),
            "regression with its scores": System(scored, random=True),
        }
    return pretrained | {
        "finetune": System(ours, random=True),
        "finetune, unlabelled": System(functools.partial(ours, unlabelled=True), random=True, semi_supervised=True),
        "logistic regression": System(regression, random=True),
        "regression on components": System(component_regression, random=True),
        "CellTypist": System(celltypist),
        "nearest centroid": System(centroid),
        "majority class": System(lambda b: baselines.majority_class(b.labels[b.shown], b.test.n_obs).labels),
    }


def quieten() -> None:
    """Silence dozens of trainings in one process: no progress bars, and only warnings of the trainers."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("scmmgpt.train").setLevel(logging.WARNING)
