"""The fit of [`ScMMGPTCellStates`]: a factor model of the training cells, whose states the model keeps.

1. Closed form: principal components of log1p(CP10k) give gene directions and a linear encoder, and ridge regression
   the mean state of a text.
2. Gradient steps on the factor model of the most expressed genes: the likelihood of the counts under the states that
   the encoder finds, and the divergence of these states from the prior (a variational autoencoder with a linear
   decoder).
3. Rounds of expectation and maximisation: the posterior of each state, by Newton's method, and the regression of the
   counts of each gene on states drawn from it, which gives bias, direction and dispersion; in the end of every gene.
4. What the factors miss of the mean profile of each type in each dataset: few directions do not hold the genes of rare
   types, such as insulin.

The encoder is of the fit alone: no cell is read when cells are generated. `train/LOG.md` has the choices.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import torch
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.utils.sparsefuncs import mean_variance_axis
from torch import Tensor, nn
from tqdm.auto import tqdm

from scmmgpt.cells_scmmgpt import COUNTS_PER_10K, log1p_cp10k
from scmmgpt.modeling_scmmgpt import ScMMGPTForConditionalGeneration
from scmmgpt.processing_scmmgpt import ScMMGPTProcessor
from scmmgpt.states_scmmgpt import ScMMGPTCellStates
from scmmgpt.train.data import ontology
from scmmgpt.train.data.captions import CAPTION_COLUMNS, CaptionSampler, with_article
from scmmgpt.train.data.corpus import Corpus
from scmmgpt.train.data.order import BALANCE_TEMPERATURE


logger = logging.getLogger(__name__)

MAX_CELLS = 10_000  # of the training split: some minutes of one core
LEAST_HELD, LEAST_OTHERS = 0.5, 20  # see `not_of_panels`
CAPTION_EPOCHS = 4  # captions of a cell from each set of templates
TEXTS_AT_ONCE = 128
NUM_GENES = 3000  # the most expressed genes, which determine the states
FACTOR_BATCH = 128
FACTOR_EPOCHS, MAX_FACTOR_STEPS = 50, 1000
EM_ROUNDS = 3
FACTOR_RATE, ENCODER_RATE = 3e-3, 3e-4  # peak learning rates of Adam
WARM_UP = 0.2  # share of the steps over which the divergence gains its weight
RIDGE = 1.0
START_SCALE = 0.5  # of the directions: the scores of principal components hold noise, which states do not
DIRECTION_PRECISION = 20.0  # of the Gaussian prior of a gene's direction
MIN_SCALE = 1e-3  # of scores along an axis, and of what a text leaves open
LIBRARY_NOISE = 0.1  # of the log library size around that of a training cell, which is not copied
PROFILE_COUNTS = 1.0  # see `missed_profiles`
MAX_GROUPS = 256  # that have a profile: the largest ones, and the last of all others
MIN_RATE = 1e-4  # counts per 10,000 of a gene that no training cell expresses
NEWTON_STEPS, MAX_CHANGE = 8, 1.5  # of regression and posterior, and the largest change of a log rate in a step
GENES_AT_ONCE, CELLS_AT_ONCE = 128, 256  # in the regression, where 512 take twice the time each, and of the posterior
DISPERSIONS = (0.1, 0.2, 0.5, 1.0, 2.0, 4.0, 7.0, 12.0, 20.0, 35.0, 60.0, 100.0, 300.0, 1000.0)


@dataclass(eq=False)
class TextedCells:
    """Training cells, and the features of texts about them.

    Args:
        counts: Raw counts, CSR float32 `(n_cells, vocab_size)`.
        total_counts: Library sizes, `(n_cells,)`.
        features: Features of the distinct texts, float32 `(n_texts, text_width)`.
        texts: Rows of `features`, int64 `(n_cells, n_draws)`: the texts of each cell.
        weights: Relative frequency of each cell in the batches, and weight in the regressions, `(n_cells,)`; default:
            equal.
        groups: The group of each cell, such as a type in a dataset, int64 `(n_cells,)`; default: one group.
    """

    counts: sparse.csr_matrix
    total_counts: np.ndarray
    features: Tensor
    texts: np.ndarray
    weights: np.ndarray = field(default_factory=lambda: np.ones(1))
    groups: np.ndarray = field(default_factory=lambda: np.zeros(1, dtype=np.int64))

    def __post_init__(self) -> None:
        self.weights = np.broadcast_to(self.weights / self.weights.mean(), len(self))
        self.groups = np.broadcast_to(self.groups, len(self))

    def __len__(self) -> int:
        return len(self.total_counts)

    def mean_features(self) -> np.ndarray:
        """Mean features of each cell's texts, `(n_cells, text_width)`."""
        return self.features.numpy()[self.texts].mean(axis=1)

    def draw_features(self, rows: np.ndarray, rng: np.random.Generator) -> Tensor:
        """Features of one text of each of the cells `rows`."""
        return self.features[self.texts[rows, rng.integers(self.texts.shape[1], size=len(rows))]]


@dataclass(frozen=True)
class Posterior:
    """Means `(N, K)` of the states of cells, and Cholesky factors `(N, K, K)` of their covariances."""

    mean: Tensor
    factor: Tensor

    def draw(self, rows: np.ndarray | slice, generator: torch.Generator) -> Tensor:
        """States of the cells `rows`, `(n_rows, K)`."""
        mean = self.mean[rows]
        return mean + torch.einsum("nij,nj->ni", self.factor[rows], torch.randn(mean.shape, generator=generator))


class FactorModel(nn.Module):
    """The factor model of some genes, with an encoder: mean and log variance of a state, linear in log1p(CP10k)."""

    def __init__(self, cells: TextedCells, genes: np.ndarray, num_components: int, seed: int) -> None:
        super().__init__()
        self.genes = genes
        counts = cells.counts[:, genes]
        expression = log1p_cp10k(counts, cells.total_counts)
        axes, centre, scores = principal_axes(expression, num_components, seed)
        text = Ridge(RIDGE).fit(cells.mean_features(), scores, cells.weights)
        scale = np.maximum((scores - text.predict(cells.mean_features())).std(axis=0), MIN_SCALE)
        # A change of log1p(CP10k) is one of the log rate where a gene is high, and a multiple of it where it is low.
        height = np.clip(np.asarray(expression.mean(axis=0)).ravel(), 0.1, 1.0)
        rate = np.asarray(counts.sum(axis=0)).ravel() / cells.total_counts.sum() * COUNTS_PER_10K
        weights = axes / scale[:, None]
        self.directions = parameter(START_SCALE * axes * scale[:, None] / height)
        self.bias = parameter(np.log(np.maximum(rate, MIN_RATE)))
        self.log_dispersion = parameter(np.zeros(len(genes)))
        self.encoder = parameter(np.concatenate([weights, np.zeros_like(weights)]).T)
        self.encoder_bias = parameter(np.concatenate([-weights @ centre, np.full(num_components, -2.0)]))
        self.text_weights = parameter((text.coef_ / scale[:, None]).T)
        self.text_bias = parameter(text.intercept_ / scale)

    def encode(self, counts: sparse.csr_matrix, total_counts: np.ndarray) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the states, `(N, K)`, of counts of the model's genes `(N, n_genes)`."""
        expression = torch.from_numpy(log1p_cp10k(counts, total_counts).toarray())
        mean, log_variance = (expression @ self.encoder + self.encoder_bias).chunk(2, dim=1)
        return mean, log_variance.clamp(-8, 4)

    def log_likelihood(self, states: Tensor, counts: sparse.csr_matrix, totals: Tensor) -> Tensor:
        """Mean over cells of the log-likelihood of their counts, without terms of the counts alone.

        Most counts are 0, whose probability has a short form: only the others take logarithms of gamma functions.
        """
        theta = self.log_dispersion.exp()
        mean = (states @ self.directions + self.bias).clamp(-12, 8).exp() * (totals[:, None] / COUNTS_PER_10K)
        of_zeros = -(theta * torch.log1p(mean / theta)).sum()
        rows = torch.from_numpy(np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr)))
        columns, y = torch.from_numpy(counts.indices.astype(np.int64)), torch.from_numpy(counts.data)
        mu, t = mean[rows, columns], theta[columns]
        of_counts = y * (mu.log() - (mu + t).log()) + torch.lgamma(y + t) - torch.lgamma(t)
        return (of_zeros + of_counts.sum()) / counts.shape[0]


def principal_axes(
    expression: sparse.csr_matrix, num_components: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Axes `(K, n_genes)`, centre `(n_genes,)` and scores `(N, K)`; those beyond the rank are 0."""
    n_cells, n_genes = expression.shape
    axes, scores = np.zeros((num_components, n_genes)), np.zeros((n_cells, num_components))
    rank = min(num_components, n_cells - 1, n_genes - 1)
    centre, variances = mean_variance_axis(expression, axis=0)
    if rank < 1 or not variances.any():
        return axes, centre, scores
    pca = PCA(rank, svd_solver="arpack", random_state=seed)
    scores[:, :rank] = pca.fit_transform(expression)
    axes[:rank] = pca.components_
    return axes, pca.mean_, scores


def parameter(values: np.ndarray) -> nn.Parameter:
    """A float32 parameter."""
    return nn.Parameter(torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)))


def batches(weights: np.ndarray, size: int, steps: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Rows of each step, from shuffled epochs in which a row occurs in proportion to its weight."""
    ends, order = np.cumsum(weights / weights.mean()), np.empty(0, dtype=np.int64)
    for _ in range(steps):
        while len(order) < size:
            times: np.ndarray = np.diff(np.floor(ends + rng.random()).astype(np.int64), prepend=0)
            order = np.concatenate([order, rng.permutation(np.repeat(np.arange(len(weights)), times))])
        yield order[:size]
        order = order[size:]


def cosine_schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """A warm-up over a twentieth of the steps, then a cosine to 0."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, 20 * (step + 1) / steps) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )


def fit_factors(cells: TextedCells, genes: np.ndarray, num_components: int, *, steps: int, seed: int) -> Posterior:
    """Maximise the evidence lower bound of the genes' counts; the states of the cells as the encoder finds them."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    model = FactorModel(cells, genes, num_components, seed)
    encoder = [model.encoder, model.encoder_bias]
    others = [parameter for name, parameter in model.named_parameters() if not name.startswith("encoder")]
    optimizer = torch.optim.Adam([{"params": others, "lr": FACTOR_RATE}, {"params": encoder, "lr": ENCODER_RATE}])
    schedule = cosine_schedule(optimizer, steps)
    counts, totals = cells.counts[:, genes], torch.from_numpy(cells.total_counts.astype(np.float32))
    progress = tqdm(batches(cells.weights, FACTOR_BATCH, steps, rng), "Fitting the factors of cells", total=steps)
    for step, rows in enumerate(progress):
        mean, log_variance = model.encode(counts[rows], cells.total_counts[rows])
        drawn = mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, generator=generator)
        expected = cells.draw_features(rows, rng) @ model.text_weights + model.text_bias
        divergence = 0.5 * ((mean - expected) ** 2 + log_variance.exp() - 1 - log_variance).sum(dim=1).mean()
        likelihood = model.log_likelihood(drawn, counts[rows], totals[rows])
        prior = 0.5 * DIRECTION_PRECISION * model.directions.square().sum() / len(cells)
        loss = min(1.0, step / (WARM_UP * steps)) * divergence - likelihood + prior
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    logger.info("Factor model: loss of the last batch %.1f, divergence %.2f", loss.item(), divergence.item())
    with torch.no_grad():
        pieces = [
            model.encode(counts[first : first + 1024], cells.total_counts[first : first + 1024])
            for first in range(0, len(cells), 1024)
        ]
    means, log_variances = zip(*pieces, strict=True)
    return Posterior(torch.cat(means), torch.diag_embed((0.5 * torch.cat(log_variances)).exp()))


@torch.no_grad()
def find_posterior(
    states: ScMMGPTCellStates, cells: TextedCells, genes: np.ndarray, start: Tensor, expected: Tensor
) -> Posterior:
    """Mode and curvature of each cell's state, given its counts of the genes and the mean of its prior `(N, K)`."""
    directions, bias = states.gene_directions.weight[genes], states.gene_bias.weight[genes, 0]
    theta, k = states.dispersion()[genes], states.num_components
    squares = (directions[:, :, None] * directions[:, None, :]).flatten(1)  # (G, K * K)
    counts, means, factors = cells.counts[:, genes], [], []
    for first in range(0, len(cells), CELLS_AT_ONCE):
        rows = slice(first, first + CELLS_AT_ONCE)
        y = torch.from_numpy(counts[rows].toarray())
        sizes = torch.from_numpy(cells.total_counts[rows].astype(np.float32))[:, None] / COUNTS_PER_10K
        z = start[rows]
        for _ in range(NEWTON_STEPS):
            mean = (z @ directions.t() + bias).clamp(-12, 8).exp() * sizes
            share = theta / (theta + mean)
            gradient = ((y - mean) * share) @ directions - (z - expected[rows])
            precision = ((mean * share) @ squares).unflatten(1, (k, k)) + torch.eye(k)
            step = torch.linalg.solve(precision, gradient[..., None])[..., 0]
            change = (step @ directions.t()).abs().amax(dim=1, keepdim=True)
            z = z + step * (MAX_CHANGE / change.clamp(min=MAX_CHANGE))
        means.append(z)
        factors.append(torch.linalg.cholesky(torch.linalg.inv(precision)))
    return Posterior(torch.cat(means), torch.cat(factors))


def regress_genes(states: ScMMGPTCellStates, drawn: Tensor, cells: TextedCells, genes: np.ndarray) -> None:
    """Fit bias, direction and dispersion of the genes, given states `(N, K)`."""
    sizes = torch.from_numpy(cells.total_counts / COUNTS_PER_10K)
    z = torch.cat([drawn, torch.ones(len(drawn), 1)], dim=1).double()
    by_gene = cells.counts.tocsc()
    for first in range(0, len(genes), GENES_AT_ONCE):
        some = genes[first : first + GENES_AT_ONCE]
        counts = torch.from_numpy(by_gene[:, some].toarray().T.astype(np.float64))
        table = regress_counts(counts, z, sizes).float()
        with torch.no_grad():
            states.gene_directions.weight[some] = table[:, :-2]
            states.gene_bias.weight[some] = table[:, -2:-1]
            states.gene_log_dispersion.weight[some] = table[:, -1:]


def regress_counts(counts: Tensor, z: Tensor, sizes: Tensor) -> Tensor:
    """Negative-binomial regression of each gene by Newton's method.

    The directions have a Gaussian prior, so a gene of few counts stays near its mean.

    Args:
        counts: float64 `(G, N)`.
        z: States and a column of ones, float64 `(N, K + 1)`.
        sizes: Library sizes in 10,000 counts, float64 `(N,)`.

    Returns:
        Direction, bias and log inverse dispersion, float64 `(G, K + 2)`.
    """
    width = z.shape[1]
    squares = (z[:, :, None] * z[:, None, :]).flatten(1).float()  # (N, (K + 1)**2)
    precision = torch.diag(torch.tensor([DIRECTION_PRECISION] * (width - 1) + [1e-3], dtype=torch.float64))
    prior = torch.zeros(len(counts), width, dtype=torch.float64)
    prior[:, -1] = (counts.sum(dim=1) / sizes.sum()).clamp(min=MIN_RATE).log()
    beta = prior.clone()
    for _ in range(NEWTON_STEPS):
        mean = (beta @ z.t()).clamp(-12, 8).exp() * sizes
        excess = ((counts - mean).square() - mean).sum(dim=1).clamp(min=1e-9)
        theta = (mean.square().sum(dim=1) / excess).clamp(0.1, 100.0)
        share = theta[:, None] / (theta[:, None] + mean)
        gradient = ((counts - mean) * share) @ z - (beta - prior) @ precision
        hessian = ((mean * share).float() @ squares).double().unflatten(1, (width, width)) + precision
        step = torch.linalg.solve(hessian, gradient[..., None])[..., 0]
        change = (step @ z.t()).abs().amax(dim=1, keepdim=True)  # Newton's steps can overshoot
        beta += step * (MAX_CHANGE / change.clamp(min=MAX_CHANGE))
    mean = (beta @ z.t()).clamp(-12, 8).exp() * sizes
    return torch.cat([beta, likely_dispersion(counts.float(), mean.float()).log()[:, None]], dim=1)


def likely_dispersion(counts: Tensor, mean: Tensor) -> Tensor:
    """Maximum-likelihood inverse dispersion of each gene, among `DISPERSIONS`; counts and means are `(G, N)`."""
    rows, columns = counts.nonzero(as_tuple=True)
    y, mu = counts[rows, columns], mean[rows, columns]
    scores = []
    for value in DISPERSIONS:
        theta = torch.tensor(value, dtype=torch.float64)
        of_counts = y * (mu.log() - (mu + value).log()) + (torch.lgamma(y + theta) - torch.lgamma(theta))
        of_zeros = -value * torch.log1p(mean / value).sum(dim=1)
        scores.append(of_zeros.double().index_add(0, rows, of_counts.double()))
    return torch.tensor(DISPERSIONS)[torch.stack(scores).argmax(dim=0)]


def text_means(posterior: Posterior, cells: TextedCells) -> Tensor:
    """The mean state of the texts of each cell, by ridge regression, `(N, K)`."""
    features = cells.mean_features()
    ridge = Ridge(RIDGE).fit(features, posterior.mean.numpy(), cells.weights)
    return torch.from_numpy(ridge.predict(features)).float()


def fit_states(states: ScMMGPTCellStates, cells: TextedCells, *, seed: int = 0) -> None:
    """Fit all parameters, and keep the cells; the same cells, texts and seed give the same states."""
    generator = torch.Generator().manual_seed(seed)
    totals = np.asarray(cells.counts.sum(axis=0)).ravel()
    genes = np.sort(np.argsort(-totals, kind="stable")[:NUM_GENES])
    genes = genes[totals[genes] > 0]
    with torch.no_grad():
        states.gene_directions.weight.zero_()
        states.gene_bias.weight.fill_(math.log(MIN_RATE))
        states.gene_log_dispersion.weight.zero_()
    steps = min(MAX_FACTOR_STEPS, -(-FACTOR_EPOCHS * len(cells) // FACTOR_BATCH))
    posterior = fit_factors(cells, genes, states.num_components, steps=steps, seed=seed)
    for _ in tqdm(range(EM_ROUNDS), "Refining the factors"):
        regress_genes(states, posterior.draw(slice(None), generator), cells, genes)
        posterior = find_posterior(states, cells, genes, posterior.mean, text_means(posterior, cells))
    regress_genes(states, posterior.draw(slice(None), generator), cells, np.flatnonzero(totals))
    keep_cells(states, posterior, cells)


@torch.no_grad()
def keep_cells(states: ScMMGPTCellStates, posterior: Posterior, cells: TextedCells) -> None:
    """Keep states, library sizes, groups and texts of the cells, and the scales of noise and of states."""
    weights = torch.from_numpy(cells.weights.astype(np.float32))
    noise = posterior.factor.square().sum(dim=2).mean(dim=0)
    left = (posterior.mean - text_means(posterior, cells)).square()
    states.training_states = posterior.mean
    states.training_log_sizes = torch.from_numpy(np.log(cells.total_counts).astype(np.float32))
    states.training_weights = weights
    states.training_groups = torch.from_numpy(cells.groups.astype(np.int32))
    states.training_texts = torch.from_numpy(cells.texts.astype(np.int32))
    states.text_features = cells.features.clone()
    states.state_noise = torch.cat([noise.sqrt(), torch.tensor([LIBRARY_NOISE])])
    states.state_scale = (weights @ left / weights.sum() + noise).sqrt().clamp(min=MIN_SCALE)
    profiles = torch.zeros(cells.counts.shape[1], cells.groups.max() + 1)
    states.gene_profiles = nn.Embedding.from_pretrained(profiles, freeze=False)
    states.gene_profiles.weight.copy_(missed_profiles(states, cells).t())


@torch.no_grad()
def missed_profiles(states: ScMMGPTCellStates, cells: TextedCells) -> Tensor:
    """Log of the counts of each group over those that its states let expect, float32 `(n_groups, vocab_size)`.

    A gene of few counts is shrunk towards the states, by `PROFILE_COUNTS` counts. The noise of the states raises the
    mean of a rate.
    """
    n_groups, rows = cells.groups.max() + 1, np.arange(len(cells))
    of_groups = sparse.csr_matrix((np.ones(len(cells)), (cells.groups, rows)), (n_groups, len(cells)))
    expected = np.zeros((n_groups, cells.counts.shape[1]))
    raised = 0.5 * states.gene_directions.weight.square() @ states.state_noise[:-1].square()
    for first in range(0, len(cells), CELLS_AT_ONCE):
        part = rows[first : first + CELLS_AT_ONCE]
        log_rate = states.log_rate(states.training_states[part], torch.from_numpy(part))
        rates = (log_rate + raised).exp().numpy() * (cells.total_counts[part, None] / COUNTS_PER_10K)
        expected += of_groups[:, part] @ rates
    counted = (of_groups @ cells.counts).toarray()
    return torch.from_numpy(np.log((counted + PROFILE_COUNTS) / (expected + PROFILE_COUNTS)).astype(np.float32))


def new_states(vocab_size: int, num_components: int, text_width: int) -> ScMMGPTCellStates:
    """Cell states without a model, to be fitted."""
    sizes = {"num_state_components": num_components, "projection_dim": text_width}
    sizes |= dict.fromkeys(("num_state_groups", "num_training_states", "num_training_texts", "num_texts_of_cell"), 0)
    return ScMMGPTCellStates(SimpleNamespace(cell_config=SimpleNamespace(vocab_size=vocab_size), **sizes))


@torch.no_grad()
def read_texted_cells(
    corpus: Corpus,
    captions: CaptionSampler,
    model: ScMMGPTForConditionalGeneration,
    processor: ScMMGPTProcessor,
    seed: int = 0,
    balance: str | None = None,
) -> TextedCells:
    """At most `MAX_CELLS` training cells, of row groups at random, and the features of captions about them.

    The texts are captions of the training, short ones, which name little but the type, and all names of the type and
    of the types above it with an article, so that all kinds of prompt are known. No text names genes of its cell,
    which would give the target away. Cells of gene panels are left out if wider datasets have the type
    ([`not_of_panels`]). Rare labels of the column `balance` are drawn more often, as for the other losses of `tune`.
    """
    columns = {column + suffix for column in CAPTION_COLUMNS for suffix in ("", "_ontology_term_id")} | {"dataset_id"}
    cells, table = corpus.sample("train", MAX_CELLS, sorted(columns | ({balance} if balance else set())), seed=seed)
    obs = {name: np.asarray(values, dtype=object) for name, values in table.to_pandas().items()}
    vocab_size = model.config.cell_config.vocab_size
    kept = np.flatnonzero(not_of_panels(cells.to_csr(vocab_size), obs["dataset_id"].astype(str), types_of(obs)))
    cells, obs = cells[kept], {name: values[kept] for name, values in obs.items()}
    samplers = (captions, CaptionSampler("short", seed=captions.seed))
    draws = [
        sampler.caption(obs, cell_ids=cells.cell_ids, epoch=epoch)
        for sampler in samplers
        for epoch in range(CAPTION_EPOCHS)
    ]
    short = draws[-1]
    for names in names_of(obs):
        draws.append([with_article(name) if name else text for name, text in zip(names, short, strict=True)])
    texts, rows = np.unique(np.array(draws, dtype=object).astype(str), return_inverse=True)
    features = []
    for first in range(0, len(texts), TEXTS_AT_ONCE):
        inputs = processor(qformer_text=texts[first : first + TEXTS_AT_ONCE].tolist()).to(model.device)
        features.append(model.get_text_features(**inputs).float().cpu())
    counts = cells.to_csr(vocab_size)
    sizes = np.maximum(cells.library_sizes().astype(np.float64), 1.0)
    weights: np.ndarray = np.ones(len(cells))
    if balance:
        _, of_label, n_cells = np.unique(obs[balance].astype(str), return_inverse=True, return_counts=True)
        weights = n_cells[of_label] ** (1 / BALANCE_TEMPERATURE - 1)
    pairs = np.stack([obs["dataset_id"].astype(str), types_of(obs)]).astype(str)
    _, of_pair, n_cells = np.unique(pairs, axis=1, return_inverse=True, return_counts=True)
    groups = np.minimum((-n_cells).argsort(kind="stable").argsort()[of_pair.reshape(-1)], MAX_GROUPS - 1)
    return TextedCells(counts, sizes, torch.cat(features), rows.reshape(len(draws), len(cells)).T, weights, groups)


def names_of(obs: Mapping[str, np.ndarray]) -> list[list[str | None]]:
    """All names of each cell, a list for each place: of its type, and of every type above it in the Cell Ontology.

    "Monocyte" or "leukocyte" may thus be any cell of its kinds. A cell with fewer names has its type again.
    """
    ids = [term if isinstance(term, str) else "" for term in obs["cell_type_ontology_term_id"]]
    types: list[str | None] = [name if isinstance(name, str) else None for name in obs["cell_type"]]
    names: dict[str, list[str]] = {term: [] for term in sorted(set(ids) - {""})}
    for above in ontology.label_terms({term: term for term in names}):
        for term in above["labels"]:
            names[term] += above["names"]
    most = max(map(len, names.values()), default=0)
    at = {term: [*own, *[None] * (most - len(own))] for term, own in names.items()} | {"": [None] * most}
    cells = list(zip(ids, types, strict=True))
    return [types, *([at[term][place] or name for term, name in cells] for place in range(most))]


def types_of(obs: Mapping[str, np.ndarray]) -> np.ndarray:
    """The Cell Ontology id of each cell, else its type, else its dataset, str `(n_cells,)`."""
    columns = (obs[name] for name in ("cell_type_ontology_term_id", "cell_type", "dataset_id"))
    return np.array([next(x for x in names if isinstance(x, str) and x) for names in zip(*columns, strict=True)])


def not_of_panels(counts: sparse.csr_matrix, datasets: np.ndarray, types: np.ndarray) -> np.ndarray:
    """Mark the cells to keep. A gene panel does not measure the other genes, so their zeros are not zeros of the type.

    The cells of a type in a dataset are left out if datasets with more genes have as many cells of the type, or
    `LEAST_OTHERS` cells, in which the genes of this dataset have less than `LEAST_HELD` of the counts. Cells of a type
    that only one panel has are kept.

    Args:
        counts: Raw counts, CSR `(n_cells, n_genes)`; the genes of a dataset are those with a count in it.
        datasets, types: Of each cell, str `(n_cells,)`.

    Returns:
        bool `(n_cells,)`.

    >>> counts = sparse.csr_matrix(np.array([[5, 0, 0], [1, 2, 7], [0, 4, 0]]))
    >>> not_of_panels(counts, np.array(["panel", "whole", "panel"]), np.array(["B", "B", "T"]))
    array([False,  True,  True])
    """
    pairs = np.stack([datasets, types]).astype(str)
    pairs, groups, n_cells = np.unique(pairs, axis=1, return_inverse=True, return_counts=True)
    groups, rows = groups.reshape(-1), np.arange(counts.shape[0])
    sums = (sparse.csr_matrix((np.ones(len(rows)), (groups, rows)), (len(n_cells), len(rows))) @ counts).toarray()
    genes = np.stack([(sums[pairs[0] == name] > 0).any(axis=0) for name in pairs[0]])
    held = sums @ genes.T / sums.sum(axis=1, keepdims=True).clip(min=1e-9)  # [i, j]: of the counts of i, by genes of j
    wider = genes.sum(axis=1)[:, None] > genes.sum(axis=1)
    others = (pairs[1][:, None] == pairs[1]) & wider & (held < LEAST_HELD)
    return (n_cells @ others < np.minimum(n_cells, LEAST_OTHERS))[groups]


def fit_cell_states(
    model: ScMMGPTForConditionalGeneration,
    corpus: Corpus,
    captions: CaptionSampler,
    processor: ScMMGPTProcessor,
    *,
    seed: int = 0,
    balance: str | None = None,
) -> None:
    """Fit the states of the model to the training cells of the corpus, and to the texts as the model encodes them."""
    was_training, states = model.training, model.model.cell_states
    device, dtype = states.gene_bias.weight.device, states.gene_bias.weight.dtype
    model.eval()
    cells = read_texted_cells(corpus, captions, model, processor, seed, balance)
    fit_states(states.to("cpu", torch.float32), cells, seed=seed)
    states.to(device, dtype)
    model.config.num_training_states, model.config.num_texts_of_cell = states.training_texts.shape
    model.config.num_training_texts = len(states.text_features)
    model.config.num_state_groups = states.gene_profiles.embedding_dim
    model.train(was_training)
