"""States of cells and a prior over them: [`ScMMGPTCellStates`], from which cells are generated.

A cell is a state z of a few components, a library size, and counts around the rates of the state:

1. log rate of gene g, in counts per 10,000: `bias_g + directions_g · z + profiles_g` of the cell's group, a type in a
   dataset, which holds the genes of the group's mean profile that the states miss;
2. counts: negative binomial, with one dispersion for each gene;
3. the prior of (z, log library size), given a text: the state of a training cell whose texts are similar, with noise
   as large as a state is uncertain (a kernel density).

Two cells of one text therefore differ in their states, which many genes share, and in the noise of their counts. A
gene is a row of four tables, so leaving a gene out is leaving a row out. `train/states.py` fits the parameters.

Shapes in comments: N cells, G genes of the vocabulary, K components, P groups, T training cells, M distinct texts of
these, E width of the text features.
"""

import copy
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .cells_scmmgpt import COUNTS_PER_10K, RandomStream, cell_keys


TEXT_TEMPERATURE = 0.005  # of the cosine between a text and the texts of training cells (`train/LOG.md`)
COMPARED_STATES = 2000  # training cells among which the distance of neighbours is measured
COMPARED_AT_ONCE = 256  # cells, whose distances to all training cells are in memory
MEAN_STATES = 256  # states whose rates are averaged for the mean profile of a text
MAX_LOG_RATE = math.log(COUNTS_PER_10K)  # no gene has more than all of a cell's counts


class ScMMGPTCellStates(nn.Module):
    """A factor model of counts, and the distribution of its states given the features of a text.

    Cells are drawn in float64 on the CPU, so that a row of a batch equals the row alone.
    """

    training_states: Tensor  # (T, K)
    training_log_sizes: Tensor  # (T,)
    training_weights: Tensor  # (T,): how often a cell is drawn
    training_groups: Tensor  # int32 (T,): columns of `gene_profiles`
    training_texts: Tensor  # int32 (T, num_texts_of_cell): rows of `text_features`
    text_features: Tensor  # (M, E)
    state_noise: Tensor  # (K + 1,): standard deviations around a training cell, of its log library size last
    state_scale: Tensor  # (K,): standard deviations of the states of training cells around the means of their texts

    def __init__(self, config: Any) -> None:
        super().__init__()
        vocab_size, n_cells = config.cell_config.vocab_size, config.num_training_states
        self.num_components = config.num_state_components
        self.gene_directions = nn.Embedding(vocab_size, self.num_components)
        self.gene_bias = nn.Embedding(vocab_size, 1)
        self.gene_log_dispersion = nn.Embedding(vocab_size, 1)
        self.gene_profiles = nn.Embedding(vocab_size, config.num_state_groups)
        self.register_buffer("training_states", torch.zeros(n_cells, self.num_components))
        self.register_buffer("training_log_sizes", torch.zeros(n_cells))
        self.register_buffer("training_weights", torch.ones(n_cells))
        self.register_buffer("training_groups", torch.zeros(n_cells, dtype=torch.int32))
        self.register_buffer("training_texts", torch.zeros(n_cells, config.num_texts_of_cell, dtype=torch.int32))
        self.register_buffer("text_features", torch.zeros(config.num_training_texts, config.projection_dim))
        self.register_buffer("state_noise", torch.zeros(self.num_components + 1))
        self.register_buffer("state_scale", torch.ones(self.num_components))

    def log_rate(self, states: Tensor, cells: Tensor) -> Tensor:
        """Log of the expected counts per 10,000, `(N, G)` over the whole vocabulary.

        Args:
            states: `(N, K)`.
            cells: Training cells near which the states are, int64 `(N,)`.
        """
        rates = states @ self.gene_directions.weight.t() + self.gene_bias.weight[:, 0]
        rates = rates + self.gene_profiles.weight.t()[self.training_groups[cells].long()]
        return rates.clamp(min=-MAX_LOG_RATE, max=MAX_LOG_RATE)

    def dispersion(self) -> Tensor:
        """Inverse dispersion theta of each gene, `(G,)`: the variance of a count is `mean + mean**2 / theta`."""
        return self.gene_log_dispersion.weight[:, 0].exp()

    def cell_shares(self, text_features: Tensor) -> Tensor:
        """Probability that a cell of each of the texts `(N, E)` has the state of each training cell, `(N, T)`.

        The probability grows with the similarity of the most similar text of the training cell, and with its weight.

        Raises:
            ValueError: If the model keeps no training cells.
        """
        if not len(self.training_states):
            raise ValueError(
                "The cell states of this model are not fitted, so it cannot generate. Train it by "
                "`python -m scmmgpt.train tune`, which fits them, or load a checkpoint of `tune`."
            )
        of_texts = (text_features @ self.text_features.t() / TEXT_TEMPERATURE).softmax(dim=1)  # (N, M)
        nearest = of_texts.new_zeros(len(of_texts), len(self.training_texts))
        for texts in self.training_texts.long().t():
            nearest = torch.maximum(nearest, of_texts[:, texts])
        shares = nearest * self.training_weights
        return shares / shares.sum(dim=1, keepdim=True)

    def place(self, uniform: Tensor, noise: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """States `(N, K)` and log library sizes `(N,)` near those of training cells, and these cells, int64 `(N,)`.

        Args:
            uniform: Which cell, `(N,)` between 0 and 1.
            noise: Standard normal, `(N, K + 1)`.
            text_features: Features of the text of each cell, `(N, E)`.
        """
        texts, rows = text_features.unique(dim=0, return_inverse=True)
        ends = self.cell_shares(texts).cumsum(dim=1)[rows]
        cells = torch.searchsorted(ends, uniform[:, None].contiguous())[:, 0].clamp(max=ends.shape[1] - 1)
        noise = noise * self.state_noise
        return self.training_states[cells] + noise[:, :-1], self.training_log_sizes[cells] + noise[:, -1], cells

    @torch.no_grad()
    def sample(
        self, text_features: Tensor, cell_ids: np.ndarray, *, seed: int = 0, library_size: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draw cells.

        A cell depends on its text, its id and the seed, not on other cells, and a gene not on other genes.

        Args:
            text_features: Features of each cell's text, `(N, E)`.
            cell_ids: Identities of the cells, integer `(N,)`.
            seed: Seed of the draws.
            library_size: Total counts of each cell, `(N,)`; by default drawn with the state.

        Returns:
            Counts, int64 `(N, G)` over the whole vocabulary, and library sizes, float64 `(N,)`.
        """
        exact = self._exact()
        draws, (states, log_size, cells) = exact._draw_states(text_features, cell_ids, seed)
        sizes = log_size.exp().numpy() if library_size is None else np.asarray(library_size, dtype=np.float64)
        means = exact.log_rate(states, cells).exp().numpy() * (sizes[:, None] / COUNTS_PER_10K)
        theta = exact.dispersion().numpy()
        rows = zip(draws, means, strict=True)
        return np.stack([rng.poisson(rng.standard_gamma(theta) / theta * mean) for rng, mean in rows]), sizes

    @torch.no_grad()
    def compare(
        self, text_features: Tensor, cell_ids: np.ndarray, *, seed: int = 0
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Compare the states of the cells that [`sample`] draws with those of training cells.

        Args:
            text_features, cell_ids, seed: As for [`sample`].

        Returns:
            The distance of each state to the nearest one of a training cell, float64 `(N,)`, where 1 is the median
            distance of a training cell to its nearest, without profiles of groups; and the states, float64 `(N, K)`,
            in units in which training cells have a total variance of 1 around the means of their texts. None if the
            model keeps a single state.
        """
        exact = self._exact()
        if len(exact.training_states) < 2:
            return None
        rows = torch.arange(0, len(exact.training_states), -(-len(exact.training_states) // COMPARED_STATES))
        to_others = torch.cdist(exact.training_states[rows], exact.training_states)
        to_others[torch.arange(len(rows)), rows] = math.inf  # a cell is no neighbour of its own
        unit = to_others.min(dim=1).values.median()
        nearest, places = [], []
        for first in range(0, len(cell_ids), COMPARED_AT_ONCE):
            part = slice(first, first + COMPARED_AT_ONCE)
            _, (states, _, _) = exact._draw_states(text_features[part], cell_ids[part], seed)
            nearest.append(torch.cdist(states, exact.training_states).min(dim=1).values / unit)
            places.append(states / exact.state_scale.norm())
        return torch.cat(nearest).numpy(), torch.cat(places).numpy()

    @torch.no_grad()
    def mean_expression(self, text_features: Tensor) -> np.ndarray:
        """log1p of the mean rates over the states of each text, float32 `(num_texts, G)`."""
        exact, means = self._exact(), []
        rng = np.random.default_rng(0)
        noise = torch.from_numpy(rng.standard_normal((MEAN_STATES, self.num_components + 1)))
        grid = (torch.arange(MEAN_STATES, dtype=torch.float64) + 0.5) / MEAN_STATES
        for text in text_features.cpu().double():
            states, _, cells = exact.place(grid, noise, text.expand(MEAN_STATES, -1))
            means.append(exact.log_rate(states, cells).exp().mean(dim=0))
        return torch.stack(means).log1p().float().numpy()

    def _draw_states(
        self, text_features: Tensor, cell_ids: np.ndarray, seed: int
    ) -> tuple[list[np.random.Generator], tuple[Tensor, Tensor, Tensor]]:
        """Generators of the cells, and their places (see [`place`]); of a float64 copy."""
        keys = cell_keys(np.asarray(cell_ids), seed=seed, epoch=0, stream=RandomStream.STATE)
        draws = [np.random.Generator(np.random.Philox(key=int(key))) for key in keys]
        noise = np.stack([rng.standard_normal(self.num_components + 1) for rng in draws])
        uniform = torch.tensor([rng.random() for rng in draws], dtype=torch.float64)
        return draws, self.place(uniform, torch.from_numpy(noise), text_features.cpu().double())

    def _exact(self) -> "ScMMGPTCellStates":
        """A copy in float64 on the CPU."""
        return copy.deepcopy(self).cpu().double()
