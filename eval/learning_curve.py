"""Learning curve: annotate left-out datasets by systems that learn from a share of the cells of the other datasets.

```
python -m scmmgpt.eval learning_curve --data ../shared/data --sets liver_he lymphoid_ref ... --output DIR
```

Datasets and classes are those of `eval crossdata`. The datasets of `--sets` form three groups (every third), and each
group is left out in turn. In the other datasets, a fifth of the cells of each class is held out. The systems learn
from a share of the remaining cells, at least one cell of each class of a dataset. All systems see the same cells:

* `linear` (wide): the pooled readout, solved for the genes of a dataset;
* `logistic regression`: balanced, C = `INVERSE_PENALTY`, on log1p(CP10k) of the 2,000 most variable genes that the
  left-out dataset measures; for held-out cells, the genes are chosen among all genes;
* `network` (deep): a new cell model with a linear layer on the mean of its states. The input is the most expressed of
  the 2,000 most variable genes. The number of steps is the same for every share, and batches are balanced over classes
  and datasets;
* `both`: log probabilities of `linear` plus a multiple of the log probabilities of `network`. The multiple has the
  best mean macro-F1 on the datasets that the other two folds leave out.

The table has the mean macro-F1 over left-out datasets, and over held-out cells of the training datasets. `±` is the
standard deviation over seeds, which draw the share of the cells and initialise the network. `slope` is the gain in
points for ten times the cells, by least squares over the shares. The outputs in DIR are `results.json`, `table.md` and
the scores.
"""

import argparse
import itertools
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import vstack
from transformers import get_cosine_schedule_with_warmup

from scmmgpt.cells_scmmgpt import Cells
from scmmgpt.commands.errors import OneLineParser
from scmmgpt.commands.files import write_json
from scmmgpt.configuration_scmmgpt import ScGPTConfig
from scmmgpt.eval import baselines, crossdata
from scmmgpt.eval.crossdata import LabelledSet, LeftOutSet, macro_f1, read_sets, shared_expression, thin
from scmmgpt.eval.results import markdown
from scmmgpt.eval.task import COUNT, SHARE
from scmmgpt.modeling_scgpt import ScGPTModel
from scmmgpt.train.finetune import CellsOfVocabulary
from scmmgpt.train.initialize import embed_genes_by_coexpression
from scmmgpt.train.pooled import Dataset, dense_expression, expected_shares, fit_pooled_readout, variable_genes


logger = logging.getLogger(__name__)

SHARES = (0.01, 0.03, 0.1, 0.3, 1.0)
N_FOLDS = 3
HELD_OUT = 0.2  # share of the cells of a class of a training dataset
N_GENES = 2000  # genes of logistic regression and of the network
INVERSE_PENALTY = 0.03  # C of logistic regression, the middle of those of `eval crossdata`
SIZES: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
MAX_TOKENS = 64  # genes of a cell
TOKEN_DROPOUT = 0.2  # share of a cell's genes that a step drops, because datasets differ in the detected genes
BATCH_SIZE, WARMUP, LEARNING_RATE, WEIGHT_DECAY = 32, 20, 2e-3, 0.01
N_SPECIAL = 2  # padding and `<cls>`
MULTIPLES = (0.0, 0.1, 0.3, 1.0, 3.0)  # candidate weights of the network's log probabilities in `both`
PLACES = {"new": "datasets left out", "known": "held-out cells"}

Scores = list[np.ndarray]  # log probabilities (n_cells, n_classes) of each part to annotate


@dataclass(frozen=True)
class Fold:
    """Training cells, held-out cells of the same datasets (`known`), and left-out datasets (`new`)."""

    train: list[LabelledSet]
    known: list[LabelledSet]
    new: list[LabelledSet]
    classes: list[str]
    n_genes: int  # size of the vocabulary

    @property
    def parts(self) -> list[LabelledSet]:
        """All cells to annotate."""
        return [*self.known, *self.new]

    def dataset(self, part: LabelledSet) -> Dataset:
        """Convert one part to a [`Dataset`] with targets in `classes`."""
        return part.dataset(self.n_genes, self.classes)


def make_folds(sets: Sequence[LabelledSet], names: Sequence[str], n_genes: int) -> list[Fold]:
    """Leave out each third of the named datasets in turn, and hold out `HELD_OUT` of the other cells of each class.

    Left-out cells of classes without training cells are dropped, and so are held-out parts with a single class.
    """
    folds = []
    for number_ in range(N_FOLDS):
        out, train, known = names[number_::N_FOLDS], [], []
        for part in sets:
            if part.name not in out:
                rng = np.random.default_rng(0)
                rows = [rng.permutation(np.flatnonzero(part.labels == label)) for label in np.unique(part.labels)]
                cuts = [round(HELD_OUT * len(own)) for own in rows]
                held_out = np.concatenate([own[:cut] for own, cut in zip(rows, cuts, strict=True)])
                known.append(part.take(np.sort(held_out)))
                train.append(part.take(np.setdiff1d(np.arange(len(part.labels)), held_out)))
        classes = sorted({label for part in train for label in part.labels})
        new = [part.take(np.flatnonzero(np.isin(part.labels, classes))) for part in sets if part.name in out]
        folds.append(Fold(train, [part for part in known if len(set(part.labels)) > 1], new, classes, n_genes))
    return folds


def linear(fold: Fold, seed: int, steps: int) -> Scores:
    """Score all parts by the pooled readout."""
    readout = fit_pooled_readout([fold.dataset(part) for part in fold.train], len(fold.classes))
    return [readout.for_genes(part.measured)(part.cells) for part in fold.parts]


def logistic_regression(fold: Fold, seed: int, steps: int) -> Scores:
    """Fit one regression for all held-out cells, and one for each left-out dataset."""
    counts = vstack([part.cells.to_csr(fold.n_genes) for part in fold.known], format="csr")
    everything = np.arange(fold.n_genes)
    known = replace(fold.known[0], cells=Cells.from_csr(counts, everything), measured=everything)
    scores: Scores = []
    for part in (known, *fold.new):
        kept = np.ones((0, len(fold.classes)), dtype=bool)
        case = LeftOutSet(fold.train, part, fold.classes, fold.n_genes, kept)
        train, labels, test = shared_expression(case, N_GENES)
        fitted = baselines.fit_quietly(crossdata.new_regression().set_params(C=INVERSE_PENALTY), train, labels)
        scores.append(fitted.predict_log_proba(test))
    lengths = np.cumsum([len(part.labels) for part in fold.known])[:-1]
    return [*np.split(scores[0], lengths), *scores[1:]]


def tokenise(data: Dataset, genes: np.ndarray, shares: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokenise cells: `<cls>` and the most expressed of `genes`, with log1p(CP10k) on the whole-transcriptome scale.

    Ids (int64), expression (float32) and mask (int64) are each `(n_cells, 1 + MAX_TOKENS)`.
    """
    values = np.log1p(dense_expression(data, genes, shares))
    top = np.argsort(-values, axis=1, kind="stable")[:, :MAX_TOKENS]
    expression = np.take_along_axis(values, top, axis=1)
    ids = np.pad(top + N_SPECIAL, ((0, 0), (1, 0)), constant_values=1)
    mask = np.pad(expression > 0, ((0, 0), (1, 0)), constant_values=True)
    expression = np.pad(expression, ((0, 0), (1, 0)), constant_values=-2)
    return torch.from_numpy(ids * mask), torch.from_numpy(expression), torch.from_numpy(mask.astype(np.int64))


class MeanClassifier(torch.nn.Module):
    """A new cell model with a linear classifier on the mean state of the tokens; `<cls>` alone learns too slowly."""

    def __init__(self, config: ScGPTConfig, n_classes: int) -> None:
        super().__init__()
        self.cell_model = ScGPTModel(config, add_decoders=False)
        self.head = torch.nn.Linear(config.hidden_size, n_classes)

    def forward(self, ids: torch.Tensor, expression: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """`(batch_size, num_tokens)` each -> logits `(batch_size, n_classes)`."""
        states = self.cell_model(ids, expression, mask, return_dict=True).last_hidden_state
        return self.head(states.sum(dim=1) / mask.sum(dim=1, keepdim=True))


def network(fold: Fold, seed: int, steps: int) -> Scores:
    """Train a new cell model and its classifier on the labels, and score all parts."""
    datasets = [fold.dataset(part) for part in fold.train]
    shares = expected_shares(datasets, len(fold.classes))
    genes = variable_genes(datasets, np.flatnonzero(shares), shares, N_GENES)
    inputs = [torch.cat(of) for of in zip(*(tokenise(data, genes, shares) for data in datasets), strict=True)]
    targets = np.concatenate([data.targets for data in datasets])
    groups = np.concatenate([data.targets + len(fold.classes) * i for i, data in enumerate(datasets)])
    _, where, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    n_datasets = np.bincount(np.unique(groups) % len(fold.classes))
    chances = 1 / (len(fold.classes) * n_datasets[targets] * sizes[where])
    cells = Cells.from_csr(vstack([data.counts[:, genes] for data in datasets], format="csr"), np.arange(len(genes)))
    cells = replace(cells, gene_ids=cells.gene_ids + N_SPECIAL)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        ids: dict[str, Any] = {"vocab_size": N_SPECIAL + len(genes), "pad_token_id": 0, "cls_token_id": 1}
        model = MeanClassifier(ScGPTConfig(**ids, **SIZES, hidden_dropout=0.1), len(fold.classes))
        embed_genes_by_coexpression(model.cell_model, CellsOfVocabulary({}, {}, cells))
        train(model, inputs, torch.from_numpy(targets), chances, seed, steps)
        return [predict(model, *tokenise(fold.dataset(part), genes, shares)) for part in fold.parts]


def train(
    model: MeanClassifier,
    inputs: Sequence[torch.Tensor],
    targets: torch.Tensor,
    chances: np.ndarray,
    seed: int,
    steps: int,
) -> None:
    """Train on batches of cells drawn with probabilities `chances`, `(n_cells,)`."""
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = get_cosine_schedule_with_warmup(optimizer, WARMUP, steps)
    model.train()
    for _ in range(steps):
        rows = torch.from_numpy(rng.choice(len(targets), BATCH_SIZE, p=chances))
        ids, expression, mask = (of[rows] for of in inputs)
        seen = torch.rand(mask.shape) >= TOKEN_DROPOUT
        seen[:, 0] = True
        torch.nn.functional.cross_entropy(model(ids, expression, mask * seen), targets[rows]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


@torch.inference_mode()
def predict(model: MeanClassifier, *inputs: torch.Tensor) -> np.ndarray:
    """Log probabilities of the classes, float32 `(n_cells, n_classes)`."""
    batches = zip(*(of.split(8 * BATCH_SIZE) for of in inputs), strict=True)
    return torch.cat([model(*batch).log_softmax(dim=1) for batch in batches]).numpy()


SYSTEMS: dict[str, Callable[[Fold, int, int], Scores]] = {
    "linear": linear,
    "network": network,
    "logistic regression": logistic_regression,
}


def scores_of_parts(fold: Fold, scores: Sequence[np.ndarray]) -> dict[str, dict[str, float]]:
    """Compute macro-F1 of each part: `known` or `new` -> dataset -> value."""
    names = np.asarray(fold.classes)
    f1 = [macro_f1(part.labels, names[of.argmax(axis=1)]) for part, of in zip(fold.parts, scores, strict=True)]
    values = list(zip((part.name for part in fold.parts), f1, strict=True))
    return {"known": dict(values[: len(fold.known)]), "new": dict(values[len(fold.known) :])}


def stack(folds: Sequence[Fold], wide: Sequence[Scores], deep: Sequence[Scores]) -> Iterator[tuple[float, Scores]]:
    """Yield, for each fold, the multiple chosen on the left-out datasets of the other folds, and the summed scores."""
    sums = [
        [[w + m * d for w, d in zip(*pair, strict=True)] for pair in zip(wide, deep, strict=True)] for m in MULTIPLES
    ]
    found = [[scores_of_parts(fold, of)["new"].values() for fold, of in zip(folds, row, strict=True)] for row in sums]
    for place in range(len(folds)):
        means = [np.mean([value for other, of in enumerate(row) if other != place for value in of]) for row in found]
        best = int(np.argmax(means))  # the least of equals
        yield MULTIPLES[best], sums[best][place]


def summarise(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Compute, for each system and place, mean and standard deviation over seeds at each share, and the slope."""
    rows = []
    for system, place in dict.fromkeys((run["system"], place) for run in runs for place in PLACES):
        own = [run for run in runs if run["system"] == system]
        shares = sorted({run["share"] for run in own})
        means: dict[float, list[float]] = {share: [] for share in shares}
        for run in own:
            means[run["share"]].append(100 * float(np.mean(list(run[place].values()))))
        n_cells = [next(run["n_cells"] for run in own if run["share"] == share) for share in shares]
        row: dict[str, Any] = {"system": system, "place": place, "n_cells": dict(zip(shares, n_cells, strict=True))}
        row["means"] = {share: mean_and_spread(values) for share, values in means.items()}
        if len(shares) > 1:
            curves = zip(*(values[: min(map(len, means.values()))] for values in means.values()), strict=True)
            row["slope"] = mean_and_spread([float(np.polyfit(np.log10(n_cells), curve, 1)[0]) for curve in curves])
        rows.append(row)
    return rows


def mean_and_spread(values: Sequence[float]) -> list[float]:
    """Mean, followed by the standard deviation if there are several values."""
    spread = [float(np.std(values, ddof=1))] if len(values) > 1 else []
    return [float(np.mean(values)), *spread]


def table_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format a Markdown table for each place: systems x shares, macro-F1 x 100."""
    tables = []
    for place, title in PLACES.items():
        own = [row for row in rows if row["place"] == place]
        titles = [f"{100 * share:g} % ({n:,.0f} cells)" for share, n in own[0]["n_cells"].items()]
        values = ((row["system"], [*row["means"].values(), row.get("slope", ())]) for row in own)
        words = ([system, *(" ± ".join(f"{x:.1f}" for x in pair) for pair in pairs)] for system, pairs in values)
        tables.append(markdown([title, *titles, "slope"], words))
    return "\n".join(tables)


def run_share(args: argparse.Namespace, folds: Sequence[Fold], share: float, seed: int) -> Iterator[dict[str, Any]]:
    """Yield the records of all systems at one share; scores in the output folder are reused."""
    thinned = [replace(fold, train=[thin(part, share, seed) for part in fold.train]) for fold in folds]
    found: dict[str, list[Scores]] = {}
    for system, place in ((system, place) for system in SYSTEMS for place in range(len(folds))):
        own_seed = seed if share < 1 or system == "network" else 0  # other systems have no randomness of their own
        path = Path(args.output, "scores", f"{system}-{share:g}-{own_seed}-{place}.npz")
        if not path.is_file():
            start = time.process_time()
            scores = SYSTEMS[system](thinned[place], own_seed, args.steps)
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(path, *[of.astype(np.float32) for of in scores])
            logger.info("%s: %.0f s", path.stem, time.process_time() - start)
        with np.load(path) as stored:
            found.setdefault(system, []).append([stored[f"arr_{i}"] for i in range(len(stored.files))])
    multiples, both = zip(*stack(folds, found["linear"], found["network"]), strict=True)
    found["both"] = list(both)
    n_cells = float(np.mean([sum(len(part.labels) for part in fold.train) for fold in thinned]))
    for system, of_folds in found.items():
        by_fold = [scores_of_parts(fold, of) for fold, of in zip(folds, of_folds, strict=True)]
        record: dict[str, Any] = {"system": system, "share": share, "seed": seed, "n_cells": n_cells}
        record["new"] = {name: value for of in by_fold for name, value in of["new"].items()}
        record["known"] = {
            f"{name}, {i}": value for i, of in enumerate(by_fold) for name, value in of["known"].items()
        }
        yield record | ({"multiples": multiples} if system == "both" else {})


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = OneLineParser(prog="python -m scmmgpt.eval learning_curve", description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", required=True, help="folder of .h5ad files with tables/label_classes.json")
    parser.add_argument("--sets", nargs="+", required=True, help="datasets to leave out, at least three")
    parser.add_argument("--output", required=True, help="folder for results.json and table.md")
    parser.add_argument("--max-cells", type=COUNT, default=100, help="cells of each label (%(default)s)")
    parser.add_argument("--steps", type=COUNT, default=300, help="steps of the network (%(default)s)")
    parser.add_argument("--seeds", type=COUNT, default=2, help="repetitions (%(default)s)")
    parser.add_argument(
        "--shares", type=SHARE, nargs="+", default=list(SHARES), help="shares of the training cells (%(default)s)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    args = make_parser().parse_args(argv)
    sets, n_genes = read_sets(args.data, "coarse", args.max_cells)
    unknown = sorted(set(args.sets) - {part.name for part in sets})
    if unknown or len(set(args.sets)) < N_FOLDS:
        raise ValueError(f"--sets is {args.sets}; name three or more of {[part.name for part in sets]}.")
    about = {"sets": args.sets, "max_cells": args.max_cells, "steps": args.steps}
    known, path = Path(args.output, "about.json"), Path(args.output, "results.json")
    if known.is_file() and json.loads(known.read_text(encoding="utf-8")) != about:
        raise ValueError(f"{args.output} has scores of other cells or options. Give another --output.")
    Path(args.output).mkdir(parents=True, exist_ok=True)
    write_json(known, about)
    folds, table = make_folds(sets, args.sets, n_genes), ""
    runs: list[dict[str, Any]] = []
    for seed, share in itertools.product(range(args.seeds), args.shares):
        runs += run_share(args, folds, share, seed)
        rows = summarise(runs)
        table = table_of(rows)
        write_json(path, {"task": "learning_curve", **about, "rows": rows, "runs": runs})
        Path(args.output, "table.md").write_text(table, encoding="utf-8")
    sys.stdout.write(table)
    return 0
