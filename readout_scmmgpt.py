"""A linear readout of labels from cells, which is solved again for the genes that a file has.

A linear classifier of all genes is hard to beat with a few thousand labelled cells, but its weights belong to the
genes of training: in a file without one of these genes, a zero or a mean in the place of the gene gives confident
errors. `ScMMGPTLabelReadout` therefore stores, beside the weights, a factor model of the training cells:

    profile = mean + factors^T z + noise,  z ~ N(0, I)

`ScMMGPTLabelReadout.for_genes` takes the conditional expectation of the classifier's scores given the genes at hand.
The weights of absent genes move to the present genes that predict them, by Woodbury's identity on a few dozen factors
(milliseconds). With all genes at hand the weights are those of training. What the present genes cannot predict
remains as a covariance of the scores, and the probabilities are averaged over it: a label whose decisive genes are
absent loses confidence.

A readout of several datasets stores groups, the mean profile of each label in each dataset, in place of fixed weights.
[`solve_groups`] is the ridge regression of the labels on the groups, for the genes at hand alone, with factors and
noise as the variance within a group. The profiles are then log1p(CP10k). In a panel few genes may decide the scale of
a group ([`scale_groups`]): the labels' weights are the mean of those with that scale and without. Beside the groups of
its labels it may have groups of other cells, reference profiles of organs that no dataset has. They compete in the
regression, and the lead of a cell's label over them says whether the cell is one of the labels at all:
[`PanelReadout.novelty`].

The same groups, factors and noise place a cell among the types without naming one: [`ProfileEmbedding`].

Else a profile is `PROFILE_SCALE * sqrt(share of the counts)`. In a file with a part of the genes, shares are of the
genes at hand times the share of expression that these genes are expected to have, so that a panel of 200 genes and a
whole transcriptome have profiles of one scale.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from .cells_scmmgpt import Cells, segment
from .contrasts_scmmgpt import LITTLE_EVIDENCE, compare_labels
from .regression_scmmgpt import (
    LOG_STEPS,
    AmongLabels,
    condition,
    others_of,
    root_shares,
    scale_groups,
    solve_embedding,
    solve_groups,
    sum_weights,
    with_profiles,
    without_labels,
)


PROFILE_SCALE = 100.0  # profiles are sqrt(counts per 10,000)
N_DRAWS, DRAW_SEED = 64, 0x6E05  # of the scores' uncertainty: equal for all cells of a file, and for all files
PANEL_SHARE = 0.5  # of the expression: a file with less is a panel
LEAST_LEAD = 0.1  # over other cells, of the mean cell of a label
# Values that told apart known and new cells best, over datasets left out and panels of them (`train/LOG.md`).
LEAST_SPREAD = 0.2  # of leads over other cells
SCORE_WEIGHT = 0.15  # of a low score of the label, beside the missing lead
# Added to the score of a type that has a profile and no cells, where it is a candidate: its one group has less weight
# in the regression than a label of many. Known cells lose 1.4 of a hundred by one such candidate (`train/LOG.md`).
PROFILE_BONUS = 0.15


@dataclass
class PanelReadout:
    """The readout for the genes of one file. The scores of a cell depend on that cell alone.

    Args:
        gene_ids: int64 `(n_genes,)`: vocabulary ids of the genes at hand, ascending.
        weights: float32 `(n_genes, n_labels)`, for profiles.
        bias: float32 `(n_labels,)`.
        share: Share of the expression that these genes are expected to have.
        spread: float32 `(n_draws, n_labels)`: draws of the part of the scores that the absent genes decide. Empty if
            nothing is absent.
        temperature: Divides the scores before the softmax.
        evidence: float64 `(n_labels, n_labels)`: of the difference of two labels' scores between the two labels' mean
            cells, the part that remains; NaN on the diagonal.
        decisive: Absent genes, vocabulary ids, that separate two labels, the most important first, by label pair.
        log: Whether the weights are for log1p(CP10k), the logarithm of one plus a squared profile.
        others: float32 `(n_genes, n_others)`, weights of kinds of other cells, and `others_bias` `(n_others,)`; of a
            panel the labels' come first, `(n_genes, n_labels + n_others)`, all on the scale of the panel.
        typical: float64 `(n_labels, n_labels + n_others)`: the scores of each label's mean cell, other cells' last.
        file_weights, file_bias: The same for probabilities, once cells of the file were read (`refinement_scmmgpt`).
        file_shares: float32 `(n_genes, n_labels)`: weights of [`root_shares`] beside them, of a narrow panel.
        among: The regression of some labels alone, for cells of none of them; see [`ScMMGPTLabelReadout.among`].
    """

    gene_ids: np.ndarray
    weights: np.ndarray
    bias: np.ndarray
    share: float
    spread: np.ndarray
    temperature: float
    evidence: np.ndarray
    decisive: dict[tuple[int, int], list[int]]
    log: bool = False
    others: np.ndarray | None = None
    others_bias: np.ndarray | None = None
    typical: np.ndarray | None = None
    file_weights: np.ndarray | None = None
    file_bias: np.ndarray | None = None
    file_shares: np.ndarray | None = None
    among: AmongLabels | None = None
    _last: Any = field(default=None, init=False, repr=False)  # the last cells: profiles, scores, those of other cells

    def profiles(self, cells: Cells) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ragged profiles over the genes at hand: first entry of each cell, positions in `gene_ids`, values."""
        starts, positions, values = panel_profiles(cells, self.gene_ids, self.share)
        return starts, positions, np.log1p(values**2) if self.log else values

    def _scores(self, cells: Cells) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
        """Profiles and scores of the labels; kept for the next call, since probabilities and novelty are of both."""
        last = self._last
        if last is None or last[0] is not cells:
            profiles = self.profiles(cells)
            last = self._last = [cells, profiles, sum_weights(*profiles, self.weights) + self.bias, None]
        return last[1], last[2]

    def scores(self, cells: Cells) -> np.ndarray:
        """Scores of the labels, float32 `(n_cells, n_labels)`: about 1 for the right one, 0 for the others."""
        return self._scores(cells)[1]

    def last_profiles(self, cells: Cells) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """[`profiles`], not computed again for the last cells that were scored."""
        return self._scores(cells)[0]

    def __call__(self, cells: Cells) -> np.ndarray:
        """Log probabilities of the labels, float32 `(n_cells, n_labels)`."""
        profiles, scores = self._scores(cells)
        if self.file_weights is not None and self.file_bias is not None:
            scores = sum_weights(*profiles, self.file_weights) + self.file_bias
        if self.file_shares is not None:
            scores = scores + sum_weights(*root_shares(*profiles), self.file_shares)
        logits = torch.from_numpy(scores / np.float32(self.temperature))
        if not len(self.spread):
            found = logits.log_softmax(dim=1).numpy()
            return found if self.among is None else self.among.share_out(found, profiles, self)
        draws = torch.from_numpy(self.spread / np.float32(self.temperature))
        pieces = [(piece[:, None] + draws).log_softmax(dim=2).logsumexp(dim=1) for piece in logits.split(1024)]
        return (torch.cat(pieces) - np.log(len(draws))).numpy() if pieces else logits.numpy()

    def novelty(
        self, cells: Cells, terms: Sequence[Sequence[int]] = (), asked: np.ndarray | None = None
    ) -> np.ndarray:
        """Novelty of each cell by its best label, then by broader terms, float32 `(n_cells, 1 + n_terms)`.

        The lead of a cell is the score of a label above the best score of other cells. Novelty is what the lead lacks
        of the lead of the label's mean cell (which has novelty 0), divided by that lead plus a slack for laboratories
        and for cells of few genes, since the leads of a panel are small; and a share of what the score itself lacks.

        Args:
            cells: Counts.
            terms: Labels of each broader term, whose score is the sum of their scores. Infinite for a cell whose best
                label is not among them.
            asked: bool `(n_cells,)`: the cells whose terms are computed, by default all; infinite for the others.
        """
        if self.others is None or self.others_bias is None or self.typical is None:
            raise ValueError("This readout has no other cells; novelty needs a checkpoint of `release`.")
        profiles, scores = self._scores(cells)
        best, n_labels = scores.argmax(axis=1), scores.shape[1]
        if self._last[3] is None:
            self._last[3] = sum_weights(*profiles, self.others) + self.others_bias
        found = self._last[3]
        if found.shape[1] == self.typical.shape[1]:  # a panel
            scores, found = found[:, :n_labels], found[:, n_labels:]
        others = found.max(axis=1, initial=-np.inf)
        of_others = self.typical[:, n_labels:].max(axis=1, initial=-np.inf)
        slack = LEAST_SPREAD + 1 / np.sqrt(np.diff(profiles[0]).clip(min=1))

        def missing(rows: np.ndarray, score: np.ndarray, expected: np.ndarray) -> np.ndarray:
            """Of some cells, from their score of a set of labels, and that of each label's mean cell for the set."""
            lead = (expected - of_others).clip(min=LEAST_LEAD)[best[rows]]
            weak = 1 - score / expected.clip(min=LEAST_LEAD)[best[rows]]
            return (lead - (score - others[rows])) / (lead + slack[rows]) + SCORE_WEIGHT * weak

        found, every = np.full((len(best), 1 + len(terms)), np.inf, dtype=np.float32), np.arange(len(best))
        found[:, 0] = missing(every, scores[every, best], np.diag(self.typical))
        rows = every if asked is None else np.flatnonzero(asked)
        if not len(terms) or not len(rows):
            return found
        members = np.zeros((n_labels, len(terms)))
        for column, term in enumerate(terms):
            members[list(term), column] = 1
        below = members[best[rows]] > 0
        for number in np.flatnonzero(below.any(axis=0)):
            some, labels = rows[below[:, number]], np.flatnonzero(members[:, number])
            score = scores[some][:, labels].sum(axis=1, dtype=np.float64)  # exact, for the same bits in every batch
            found[some, number + 1] = missing(some, score, self.typical[:, labels].sum(axis=1))
        return found

    def select(self, labels: Sequence[int]) -> "PanelReadout":
        """The readout of some of the labels, in the given order."""
        place = {label: number for number, label in enumerate(labels)}
        decisive = {
            (min(place[i], place[j]), max(place[i], place[j])): genes
            for (i, j), genes in self.decisive.items()
            if i in place and j in place
        }
        columns = list(labels)
        n_labels = len(self.bias)
        others = range(n_labels, n_labels if self.typical is None else self.typical.shape[1])
        own = [*columns, *others] if self.others is not None and self.others.shape[1] > len(others) else None
        return replace(
            self,
            weights=np.ascontiguousarray(self.weights[:, columns]),
            bias=self.bias[columns],
            spread=self.spread[:, columns],
            evidence=self.evidence[np.ix_(columns, columns)],
            decisive=decisive,
            others=self.others if own is None or self.others is None else np.ascontiguousarray(self.others[:, own]),
            others_bias=self.others_bias if own is None or self.others_bias is None else self.others_bias[own],
            typical=None if self.typical is None else self.typical[np.ix_(columns, [*columns, *others])],
            file_weights=None if self.file_weights is None else np.ascontiguousarray(self.file_weights[:, columns]),
            file_bias=None if self.file_bias is None else self.file_bias[columns],
            file_shares=None if self.file_shares is None else np.ascontiguousarray(self.file_shares[:, columns]),
            among=None,
        )

    def weak_labels(self, likely: np.ndarray) -> dict[int, tuple[int, float, list[int]]]:
        """Labels that the genes hardly separate from another: label -> the other, what is left, absent genes.

        Args:
            likely: bool `(num_labels,)`: the labels that the cells at hand may have. No other label is considered.
        """
        weak = {}
        for label in np.flatnonzero(likely).tolist():
            row = np.where(likely, self.evidence[label], np.nan)
            if np.isfinite(row).any():
                other = int(np.nanargmin(row))
                if row[other] < LITTLE_EVIDENCE:
                    pair = min(label, other), max(label, other)
                    weak[label] = other, float(row[other]), self.decisive.get(pair, [])
        return weak


@dataclass
class ProfileEmbedding:
    """Cells -> embeddings, for the genes of one file; see [`solve_embedding`]. That of a cell depends on it alone.

    Files of other genes have the same space: a gene that is absent is less evidence for a place in it.

    Args:
        gene_ids: int64 `(n_genes,)`: vocabulary ids of the genes at hand, ascending.
        weights: float32 `(n_genes, n_groups)`, for profiles of log1p(CP10k).
        bias: float32 `(n_groups,)`.
        share: Share of the expression that these genes are expected to have.
    """

    gene_ids: np.ndarray
    weights: np.ndarray
    bias: np.ndarray
    share: float

    def __call__(self, cells: Cells) -> np.ndarray:
        """Embeddings of counts, float32 `(n_cells, n_groups)`, L2-normalised."""
        starts, positions, values = panel_profiles(cells, self.gene_ids, self.share)
        sums = sum_weights(starts, positions, np.log1p(values**2), self.weights) + self.bias
        return F.normalize(torch.from_numpy(sums), dim=1).numpy()


class ScMMGPTLabelReadout(nn.Module):
    """Weights of the labels, and the statistics of the training cells that [`PanelReadout`] is solved from.

    All tensors are buffers: they are computed in closed form, and no gradient step changes them.

    Args:
        num_labels, num_genes, num_factors: Sizes; the genes are those that the training cells express.
        num_groups: Groups of cells of one label and dataset, if the readout is of several datasets.
        num_others: Kinds of other cells that groups may be of.
        text_width: Width of the embeddings of texts about genes; 0 if there are none.
        feature_width: Width of the labels' places in the space shared with texts; 0 if there are none.
        mixes_panels: Whether the labels' weights for a panel are the mean of two regressions, as newer checkpoints do.
        num_profiles, num_profile_genes: Types that have a profile and no cells, and the genes that profiles have.
        num_texts: Genes that have a text; `None` in older checkpoints, whose `gene_texts` has a row for each gene.
    """

    gene_ids: torch.Tensor
    weights: torch.Tensor
    bias: torch.Tensor
    centroids: torch.Tensor
    factors: torch.Tensor
    mean: torch.Tensor
    noise: torch.Tensor
    shares: torch.Tensor
    temperature: torch.Tensor
    gene_texts: torch.Tensor
    gene_text_places: torch.Tensor
    features: torch.Tensor
    groups: torch.Tensor
    group_mean: torch.Tensor
    group_labels: torch.Tensor
    group_weights: torch.Tensor
    profiles: torch.Tensor
    profile_places: torch.Tensor
    profile_others: torch.Tensor

    def __init__(
        self,
        num_labels: int,
        num_genes: int,
        num_factors: int,
        num_groups: int = 0,
        num_others: int = 0,
        text_width: int = 0,
        feature_width: int = 0,
        mixes_panels: bool = False,
        num_profiles: int = 0,
        num_profile_genes: int = 0,
        num_texts: int | None = None,
    ) -> None:
        super().__init__()
        self.num_groups, self.num_others, self.mixes_panels = num_groups, num_others, mixes_panels
        self._solved: tuple[Any, ProfileEmbedding] | None = None  # for the genes of the last file
        # Loading in bfloat16 makes that the default precision, and labels would depend on the device.
        half, single = torch.float16, torch.float32
        self.register_buffer("gene_ids", torch.zeros(num_genes, dtype=torch.int32))  # ascending vocabulary ids
        self.register_buffer("weights", torch.zeros(num_labels, num_genes, dtype=half))
        self.register_buffer("bias", torch.zeros(num_labels, dtype=single))
        self.register_buffer("centroids", torch.zeros(num_labels, num_genes, dtype=half))  # mean profile of each label
        self.register_buffer("factors", torch.zeros(num_factors, num_genes, dtype=half))
        self.register_buffer("mean", torch.zeros(num_genes, dtype=single))  # over labels, of equal weight
        self.register_buffer("noise", torch.ones(num_genes, dtype=single))  # variance beside the factors
        self.register_buffer("shares", torch.zeros(num_genes, dtype=single))  # expected share of a cell's counts
        self.register_buffer("temperature", torch.ones((), dtype=single))
        if text_width:
            rows = num_genes if num_texts is None else num_texts
            self.register_buffer("gene_texts", torch.zeros(rows, text_width, dtype=half))
        if num_texts is not None:
            self.register_buffer("gene_text_places", torch.zeros(num_texts, dtype=torch.int32))
        if feature_width:
            self.set_features(torch.zeros(num_labels, feature_width))
        if num_groups:
            self.register_buffer("groups", torch.zeros(num_groups, num_genes, dtype=half))  # mean log1p(CP10k)
            # Values of groups that do not measure a gene, and shares of labels, of sum 1.
            self.register_buffer("group_mean", torch.zeros(num_genes, dtype=single))
            self.register_buffer("group_labels", torch.zeros(num_groups, num_labels + num_others, dtype=single))
            self.register_buffer("group_weights", torch.zeros(num_groups, dtype=single))  # of sum 1
        if num_profiles:
            self.set_profiles(np.zeros((num_profiles, num_profile_genes)), np.arange(num_profile_genes), [0])

    @classmethod
    def from_statistics(cls, **tensors: np.ndarray) -> "ScMMGPTLabelReadout":
        """A readout with these buffers."""
        num_labels, num_genes = tensors["weights"].shape
        num_groups = len(tensors.get("groups", ()))
        num_others = tensors["group_labels"].shape[1] - num_labels if num_groups else 0
        sizes = num_labels, num_genes, len(tensors["factors"]), num_groups, num_others
        readout = cls(*sizes, mixes_panels=num_groups > 0)
        for name, value in tensors.items():
            buffer = getattr(readout, name)
            buffer.copy_(torch.as_tensor(np.asarray(value)).to(buffer.dtype))
        return readout

    def sizes(self) -> dict[str, int]:
        """The sizes beside the number of labels, as `config.label_readout` has them, and `mixes_panels`."""
        num_factors, num_genes = self.factors.shape
        sizes = {"num_genes": num_genes, "num_factors": num_factors}
        return sizes | {n: v for n in ("num_groups", "num_others", "mixes_panels") if (v := getattr(self, n))}

    def set_gene_texts(self, directions: np.ndarray) -> None:
        """Keep embeddings of texts about the genes, `(num_genes, text_width)`, 0 for a gene without a text.

        The rows that are not 0 are kept, and the positions of their genes in `gene_ids`.
        """
        texts = torch.as_tensor(directions, device=self.mean.device).half()
        places = texts.any(dim=1).nonzero()[:, 0]
        self.register_buffer("gene_texts", texts[places])
        self.register_buffer("gene_text_places", places.to(torch.int32))

    def set_features(self, features: torch.Tensor) -> None:
        """Keep the places of the labels in the space shared with texts, `(num_labels, feature_width)`."""
        self.register_buffer("features", features.detach().to(self.mean.device, torch.float32))

    def set_profiles(self, profiles: np.ndarray, places: np.ndarray, others: Sequence[int]) -> None:
        """Keep profiles of types that no training cell has.

        Args:
            profiles: Log1p(CP10k), `(num_profiles, num_profile_genes)`, to 1 / 28; on the scale of the groups.
            places: Positions of the genes in `gene_ids`.
            others: The kind of other cells that each profile is part of, -1 for none.
        """
        values = (np.asarray(profiles) * LOG_STEPS).round().clip(0, 255).astype(np.uint8)
        self.register_buffer("profiles", torch.from_numpy(values).to(self.mean.device))
        for name, given in (("profile_places", places), ("profile_others", np.resize(others, len(values)))):
            self.register_buffer(name, torch.as_tensor(np.asarray(given), dtype=torch.int32, device=self.mean.device))

    def mean_profiles(self, profiles: Sequence[int] | None = None, here: np.ndarray | None = None) -> np.ndarray:
        """Mean profiles of the labels, then of types that have a profile alone, float64 `(n_types, num_genes)`.

        They are in the units of [`PanelReadout.profiles`]: log1p(CP10k) of a readout with groups, where a gene that no
        profile has is at the mean of the groups; else square roots of shares.

        Args:
            profiles: Numbers of the types, as for [`for_genes`]; by default all.
            here: bool `(num_genes,)`: genes of a file, on the scale of which the means are; by default all.
        """
        a = self.arrays()
        if not self.num_groups:
            return a["centroids"]
        profiles = range(len(a.get("profiles", ()))) if profiles is None else profiles
        if len(profiles):
            a = with_profiles(a, profiles)
        if here is not None and not here.all():
            a = scale_groups(a, here)
        of_types = a["group_labels"][:, : len(a["bias"])].T * a["group_weights"]
        return of_types @ a["groups"] / of_types.sum(axis=1, keepdims=True).clip(min=1e-12)

    def place(self, scores: torch.Tensor) -> torch.Tensor:
        """Places of cells in the space shared with texts, `(num_cells, feature_width)`: means of the labels' places.

        `scores` are log probabilities of the labels, `(num_cells, num_labels)`. Cells of no known type lie together at
        the labels that are probable for them: for such cells, embed with the cell model alone.
        """
        return scores.exp().to(self.features.dtype) @ self.features

    def forward(self, profile_gene_ids: torch.Tensor, profile: torch.Tensor) -> torch.Tensor:
        """Log probabilities of the labels for cells in which all genes of training were measured.

        Args:
            profile_gene_ids, profile: Vocabulary ids and square roots of the genes' shares of a cell,
                `(num_cells, num_genes)`, as the feature extractor makes them; padding has a value of 0.

        Returns:
            float32 `(num_cells, num_labels)`. Each cell depends on itself alone. [`PanelReadout`] has the same values
            for the same cells, and others where a file lacks genes.
        """
        scores = self._sum_weights(profile_gene_ids, profile, self.weights.float().t().contiguous())
        return ((scores + self.bias) / self.temperature).float().log_softmax(dim=1)

    def embed(self, profile_gene_ids: torch.Tensor, profile: torch.Tensor) -> torch.Tensor:
        """Embeddings of cells in which all genes of training were measured, by [`ProfileEmbedding`].

        Args:
            profile_gene_ids, profile: As for `forward`.

        Returns:
            float32 `(num_cells, num_groups)`, L2-normalised. Each cell depends on itself alone.
        """
        solved = self.embedding_for()
        weights, bias = (torch.from_numpy(part).to(profile.device) for part in (solved.weights, solved.bias))
        return F.normalize(self._sum_weights(profile_gene_ids, profile, weights) + bias, dim=1)

    def _sum_weights(
        self, profile_gene_ids: torch.Tensor, profile: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """The product of padded profiles with `weights` `(num_genes, width)`, float32 `(num_cells, width)`."""
        gene_ids = self.gene_ids.long()
        places = torch.searchsorted(gene_ids, profile_gene_ids.contiguous()).clamp(max=len(gene_ids) - 1)
        values = profile.float() * (gene_ids[places] == profile_gene_ids)
        length = values.norm(dim=1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
        values = values * (PROFILE_SCALE * self.shares.float().sum().sqrt() / length)
        values = (values**2).log1p() if self.num_groups else values
        return F.embedding_bag(places, weights, mode="sum", per_sample_weights=values)

    def arrays(self) -> dict[str, np.ndarray]:
        """The buffers as float64 arrays, `gene_ids` as int64, and `gene_texts` with a row for each gene."""
        arrays = {name: value.cpu().double().numpy() for name, value in self.named_buffers()}
        arrays["gene_ids"] = arrays["gene_ids"].astype(np.int64)
        if (places := arrays.pop("gene_text_places", None)) is not None:
            texts = np.zeros((len(arrays["gene_ids"]), arrays["gene_texts"].shape[1]))
            texts[places.astype(np.int64)] = arrays["gene_texts"]
            arrays["gene_texts"] = texts
        return arrays

    def for_genes(self, measured: np.ndarray | None = None, profiles: Sequence[int] = ()) -> PanelReadout:
        """The readout for a file.

        Args:
            measured: Vocabulary ids of the genes that the file measures, expressed or not; by default all genes.
            profiles: Types that have a profile and no cells, which become labels after the others.

        Raises:
            ValueError: If the file measures no gene of the training cells.
        """
        a, here = self._measured(measured)
        bonus = np.repeat([0, PROFILE_BONUS], [len(a["bias"]), len(profiles)])
        if len(profiles):
            a = with_profiles(a, profiles)
            a["weights"], a["bias"] = (of[: len(bonus)] for of in solve_groups(a, np.ones(len(here), bool)))
        spread = np.zeros((0, len(a["bias"])))
        others: dict[str, Any] = {}
        if self.num_groups:
            scaled, *as_they_are = self.versions(a, here)
            weights, bias = solve_groups(scaled, here)
            bias[: len(bonus)] += bonus
            others = others_of(scaled, here, weights, bias, bool(as_they_are)) if len(bias) > len(bonus) else {}
            if as_they_are:
                plain = solve_groups(a, here)
                plain[1][: len(bonus)] += bonus
                weights, bias = (weights + plain[0]) / 2, (bias + plain[1]) / 2
            weights, bias = weights[: len(a["bias"])], bias[: len(a["bias"])]
        else:
            weights, bias, covariance = condition(a, here)
        if not self.num_groups and not here.all():
            values, axes = np.linalg.eigh(covariance)
            draws = np.random.default_rng(DRAW_SEED).standard_normal((N_DRAWS // 2, len(bias)))
            spread = np.concatenate([draws, -draws]) @ (axes * np.sqrt(values.clip(min=0))).T
        evidence, decisive = compare_labels(a, here, weights)
        return PanelReadout(
            gene_ids=a["gene_ids"][here],
            weights=np.ascontiguousarray(weights.T, dtype=np.float32),
            bias=bias.astype(np.float32),
            share=float(a["shares"][here].sum()),
            spread=spread.astype(np.float32),
            temperature=float(a["temperature"]),
            evidence=evidence,
            decisive=decisive,
            log=self.num_groups > 0,
            **others,
        )

    def among(self, panel: PanelReadout, columns: Sequence[int], profiles: Sequence[int] = ()) -> PanelReadout:
        """The panel where a cell of no candidate gets the one that a regression of the candidates alone says.

        Args:
            panel: All labels of this readout, which has groups, then `profiles`, for the genes of a file.
            columns: Positions in the panel of the candidates.
            profiles: As for [`for_genes`].
        """
        a = self.arrays()
        here = np.isin(a["gene_ids"], panel.gene_ids)
        bonus = np.repeat([0, PROFILE_BONUS], [len(a["bias"]), len(profiles)])
        a, some = with_profiles(a, profiles) if len(profiles) else a, np.asarray(columns)
        solved = [solve_groups(without_labels(version, some), here) for version in self.versions(a, here)]
        weights, bias = (np.mean(parts, axis=0)[: len(some)] for parts in zip(*solved, strict=True))
        rows = np.ascontiguousarray(weights.T, dtype=np.float32)
        return replace(panel, among=AmongLabels(some, rows, (bias + bonus[some]).astype(np.float32)))

    def versions(self, a: dict[str, np.ndarray], here: np.ndarray) -> list[dict[str, np.ndarray]]:
        """The arrays whose regressions have the labels' weights as their mean: on the scale of the genes `here`.

        Of a panel (`PANEL_SHARE`) also as they are.
        """
        is_panel = self.mixes_panels and a["shares"][here].sum() < PANEL_SHARE * a["shares"].sum()
        return [a if here.all() else scale_groups(a, here), *([a] if is_panel else [])]

    def embedding_for(self, measured: np.ndarray | None = None) -> ProfileEmbedding:
        """The embedding for a file, kept for the next call; arguments and errors as for [`for_genes`].

        Raises:
            ValueError: Also if this readout has no groups.
        """
        if not self.num_groups:
            raise ValueError("This readout has no groups to embed cells by; they need a checkpoint of `release`.")
        key = self.groups.data_ptr(), self.groups._version, None if measured is None else measured.tobytes()
        if self._solved is None or self._solved[0] != key:
            a, here = self._measured(measured)
            weights, bias = solve_embedding(a, here)
            solved = ProfileEmbedding(
                gene_ids=a["gene_ids"][here],
                weights=np.ascontiguousarray(weights.T, dtype=np.float32),
                bias=bias.astype(np.float32),
                share=float(a["shares"][here].sum()),
            )
            self._solved = key, solved
        return self._solved[1]

    def _measured(self, measured: np.ndarray | None) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The arrays, and which of the genes are measured, bool `(num_genes,)`."""
        a = self.arrays()
        here = np.ones(len(a["gene_ids"]), bool) if measured is None else np.isin(a["gene_ids"], measured)
        if not here.any():
            raise ValueError("The file measures none of the genes that the cells of fine-tuning expressed.")
        return a, here


def panel_profiles(cells: Cells, gene_ids: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Profiles over some genes, ragged as `cells` are.

    Args:
        cells: Counts of any genes of the vocabulary.
        gene_ids: int64 `(n_genes,)`, ascending: the genes to keep.
        share: Share of the counts that these genes are expected to have; the square of a profile's length is
            `share * PROFILE_SCALE ** 2`.

    Returns:
        `indptr` int64 `(n_cells + 1,)`, positions in `gene_ids` int64 `(nnz,)`, values float32 `(nnz,)`.
    """
    table = np.full(1 + max(gene_ids.max(initial=0), cells.gene_ids.max(initial=0)), -1, dtype=np.int32)
    table[gene_ids] = np.arange(len(gene_ids))
    places = table[cells.gene_ids]  # a search in sorted ids takes ten times as long
    kept = np.flatnonzero(places >= 0)
    indptr = np.searchsorted(kept, cells.indptr)
    counts = cells.counts[kept].astype(np.float64)
    scale = share / segment(np.add, counts, indptr, empty=1.0)
    values = PROFILE_SCALE * np.sqrt(counts * np.repeat(scale, np.diff(indptr)))
    return indptr, places[kept].astype(np.int64), values.astype(np.float32)
