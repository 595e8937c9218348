"""States of cells: the fit recovers how cells vary, and what is drawn depends on text, id and seed alone."""

import copy
import hashlib

import numpy as np
import pytest
import torch
from scipy import sparse

from scmmgpt import synthetic
from scmmgpt.configuration_scmmgpt import ScMMGPTConfig
from scmmgpt.modeling_scmmgpt import ScMMGPTForConditionalGeneration
from scmmgpt.train.data.captions import CaptionSampler
from scmmgpt.train.data.corpus import open_corpus
from scmmgpt.train.states import (
    TextedCells,
    batches,
    find_posterior,
    fit_cell_states,
    fit_states,
    likely_dispersion,
    missed_profiles,
    names_of,
    new_states,
    not_of_panels,
    read_texted_cells,
    regress_counts,
    types_of,
)


N_GENES = 30
TEXTS = torch.eye(4)[:2]


def planted_cells(n=500, seed=0):
    """Two types of cells whose genes follow one state of each cell; the last two genes have no count."""
    rng = np.random.default_rng(seed)
    of_type = np.arange(n) % 2
    planted = np.random.default_rng(5)
    profiles, direction = planted.normal(0, 0.7, (2, N_GENES - 2)), planted.normal(0, 0.5, N_GENES - 2)
    rates = np.exp(profiles[of_type] + rng.normal(size=(n, 1)) * direction)
    totals = np.exp(rng.normal(6.5, 0.3, n))
    counts = np.zeros((n, N_GENES))
    counts[:, :-2] = rng.poisson(rates / rates.sum(axis=1, keepdims=True) * totals[:, None])
    matrix = sparse.csr_matrix(counts.astype(np.float32))
    return TextedCells(matrix, counts.sum(axis=1), TEXTS, of_type[:, None]), of_type


@pytest.fixture(scope="module")
def fitted():
    cells, of_type = planted_cells()
    states = new_states(N_GENES, 3, 4)
    fit_states(states, cells)
    return states, cells, of_type


@pytest.fixture
def pipeline():
    """A model with random states of 40 cells of about 1,100 counts, half of them of each of two texts."""
    pipeline = synthetic.tiny_pipeline(num_state_components=3)
    states, config, rng = pipeline.model.model.cell_states, pipeline.model.config, np.random.default_rng(0)
    states.training_states = torch.from_numpy(rng.normal(size=(40, 3))).float()
    states.training_log_sizes, states.training_weights = torch.full((40,), 7.0), torch.ones(40)
    states.training_groups = torch.zeros(40, dtype=torch.int32)
    states.gene_profiles = torch.nn.Embedding.from_pretrained(torch.zeros(config.cell_config.vocab_size, 1))
    states.training_texts = torch.arange(40, dtype=torch.int32)[:, None] % 2
    states.text_features = torch.eye(config.projection_dim)[:2]
    states.state_noise = torch.full((4,), 0.1)
    torch.nn.init.constant_(states.gene_bias.weight, 5.0)
    config.num_training_states, config.num_training_texts, config.num_texts_of_cell = 40, 2, 1
    config.num_state_groups = 1
    return pipeline


def correlation(expression):
    matrix = np.corrcoef(expression[:, :-2], rowvar=False)
    return np.abs(matrix[np.triu_indices(len(matrix), 1)]).mean()


def test_drawn_cells_have_the_profile_the_library_and_the_correlations_of_real_cells(fitted):
    states, cells, of_type = fitted
    for kind in (0, 1):
        counts, sizes = states.sample(TEXTS[[kind] * 250], np.arange(250))
        real = np.log1p(cells.counts.toarray()[of_type == kind] / cells.total_counts[of_type == kind][:, None] * 1e4)
        drawn = np.log1p(counts / sizes[:, None] * 1e4)
        assert np.abs(drawn.mean(axis=0) - real.mean(axis=0)).max() < 0.35
        assert np.log(sizes).mean() == pytest.approx(np.log(cells.total_counts[of_type == kind]).mean(), abs=0.1)
        assert np.log(sizes).std() == pytest.approx(0.3, abs=0.08)
        assert correlation(drawn) == pytest.approx(correlation(real), rel=0.25)
        noise = np.log1p(np.random.default_rng(0).poisson(real.mean(axis=0), real.shape))
        assert correlation(noise) < 0.6 * correlation(real)


def test_genes_of_a_type_that_no_direction_holds_are_those_of_its_profile():
    """Each of six types has a gene of its own, and three directions are too few for them."""
    rng = np.random.default_rng(0)
    of_type = np.arange(600) % 6
    rates = np.full((600, N_GENES), 10.0)
    rates[np.arange(600), of_type] = 40
    counts = sparse.csr_matrix(rng.poisson(rates).astype(np.float32))
    errors = {}
    for groups in (np.zeros(600, dtype=np.int64), of_type):
        cells = TextedCells(counts, counts.sum(axis=1).A1, torch.eye(6), of_type[:, None], groups=groups)
        states = new_states(N_GENES, 3, 6)
        fit_states(states, cells)
        drawn, sizes = states.sample(torch.eye(6)[of_type], np.arange(600))
        share = [(drawn[of_type == k, k] / sizes[of_type == k]).mean() for k in range(6)]
        errors[groups.max()] = np.abs(np.array(share) - 40 / 330).max()
    assert errors[5] < 0.01 < errors[0], errors


def test_a_text_draws_cells_whose_texts_are_similar(fitted):
    states, of_type = copy.deepcopy(fitted[0]), fitted[2]
    near = torch.nn.functional.normalize(TEXTS[0] + 0.1 * TEXTS[1], dim=0)
    shares = states.cell_shares(torch.stack([near, TEXTS[1]])).numpy()
    assert shares.sum(axis=1) == pytest.approx([1, 1])
    assert shares[0, of_type == 0].sum() > 0.99
    assert shares[1, of_type == 1].sum() > 0.99
    states.training_weights = torch.from_numpy(1.0 + 2 * (np.arange(500) < 250)).float()
    assert states.cell_shares(TEXTS[:1])[0, :250].sum() == pytest.approx(0.75, abs=0.01)


def test_a_cell_has_the_names_of_its_type_and_of_all_types_above():
    ids = np.array(["CL:0000860", "CL:0000576", None, "CL:0000236"], dtype=object)  # classical monocyte, monocyte
    types = np.array(["classical monocyte", "monocyte", "mine", "B cell"], dtype=object)
    columns = names_of({"cell_type_ontology_term_id": ids, "cell_type": types})
    classical, monocyte, mine, b_cell = (set(names) for names in zip(*columns, strict=True))
    assert columns[0] == types.tolist()
    assert {"monocyte", "myeloid cell", "white blood cell"} < classical & monocyte
    assert mine == {"mine"}
    assert {"b lymphocyte", "lymphocyte", "leukocyte"} < b_cell
    assert not {"b lymphocyte", "lymphocyte"} & monocyte


def test_prompts_by_synonyms_and_types_above_draw_cells_of_all_their_kinds(corpus, pipeline, monkeypatch):
    model, opened = pipeline.model, open_corpus(corpus)

    def encode(texts):  # each text has a direction of its own
        seeds = [int(hashlib.md5(text.encode()).hexdigest()[:8], 16) for text in texts]
        rows = [np.random.default_rng(seed).normal(size=model.config.projection_dim) for seed in seeds]
        return torch.nn.functional.normalize(torch.from_numpy(np.array(rows)).float(), dim=1)

    class Texts(dict):
        def to(self, device):
            return self

    monkeypatch.setattr(model, "get_text_features", encode)
    fit_cell_states(model, opened, CaptionSampler(), lambda qformer_text: Texts(texts=qformer_text))
    types = np.array(opened.sample("train", 32, ["cell_type"])[1].column(0).to_pylist())

    def share(prompt, *kinds):
        shares = model.model.cell_states.double().cell_shares(encode([f"a {prompt}"]).double())[0]
        return shares.numpy()[np.isin(types, kinds)].sum()

    assert share("b lymphocyte", "B cell") > 0.99
    assert share("lymphocyte", "B cell", "T cell", "natural killer cell") > 0.99
    assert min(share("lymphocyte", kind) for kind in ("B cell", "T cell")) > 0.1


def test_similar_texts_of_one_cell_do_not_make_it_more_frequent(fitted):
    states = copy.deepcopy(fitted[0])
    states.training_texts = torch.zeros(500, 3, dtype=torch.int32)
    states.training_texts[250:, 1:] = 1
    assert states.cell_shares(TEXTS[:1])[0, :250].sum() == pytest.approx(0.5)


def test_the_noise_of_states_does_not_raise_the_counts_of_a_group(fitted):
    states, cells = copy.deepcopy(fitted[0]), fitted[1]
    states.gene_profiles.weight.data.zero_()
    states.state_noise[:-1] = 1.0
    profiles = missed_profiles(states, cells)
    states.gene_profiles.weight.data.copy_(profiles.t())
    drawn, sizes = states.sample(TEXTS[fitted[2]], np.arange(500))
    real = np.asarray(cells.counts.sum(axis=0)).ravel() / cells.total_counts.sum()
    np.testing.assert_allclose((drawn.sum(axis=0) / sizes.sum())[:-2], real[:-2], rtol=0.25, atol=0.002)


def test_groups_are_types_in_datasets_and_the_smallest_ones_are_one(corpus, pipeline, tiny_processor, monkeypatch):
    monkeypatch.setattr("scmmgpt.train.states.types_of", lambda obs: np.repeat(["a", "b", "c", "d"], [3, 15, 4, 10]))
    arguments = open_corpus(corpus), CaptionSampler(), pipeline.model, tiny_processor
    assert np.bincount(read_texted_cells(*arguments).groups).tolist() == [15, 10, 4, 3]
    monkeypatch.setattr("scmmgpt.train.states.MAX_GROUPS", 3)
    assert np.bincount(read_texted_cells(*arguments).groups).tolist() == [15, 10, 7]


def test_cells_of_a_panel_are_left_out_where_others_have_the_type():
    rng = np.random.default_rng(0)
    of = np.repeat(np.arange(5), [100, 60, 30, 5, 30])  # cells of each group
    datasets = np.array(["panel", "whole", "panel", "whole", "library"])[of]
    types = np.array(["B cell", "B cell", "mast cell", "mast cell", "T cell"])[of]
    counts = rng.poisson(5, (len(of), 40))
    counts[datasets == "panel", 8:] = 0
    counts[np.ix_(datasets == "library", np.arange(30, 40))] = 0  # three quarters of the genes
    kept = not_of_panels(sparse.csr_matrix(counts), datasets, types)
    assert [set(kept[of == group]) for group in range(5)] == [{False}, {True}, {True}, {True}, {True}]
    types[types == "T cell"] = "B cell"  # of which a file of three quarters of the genes is no panel
    assert not_of_panels(sparse.csr_matrix(counts), datasets, types)[of == 4].all()
    others = datasets != "whole"  # now the file is the widest, and its 30 cells are enough
    kept = not_of_panels(sparse.csr_matrix(counts[others]), datasets[others], types[others])
    expected = {"B cell": [False] * 100 + [True] * 30, "mast cell": [True] * 30}
    assert {name: kept[types[others] == name].tolist() for name in expected} == expected


def test_a_cell_of_no_type_is_of_its_dataset_alone():
    obs = {"cell_type_ontology_term_id": ["CL:0000236", None, None], "cell_type": ["B cell", "my type", None]}
    assert types_of({**obs, "dataset_id": ["one"] * 3}).tolist() == ["CL:0000236", "my type", "one"]


def test_cells_are_drawn_as_often_as_their_weights_have_it():
    weights = np.array([1, 1, 2, 4.0])
    rows = np.concatenate(list(batches(weights, 10, 800, np.random.default_rng(0))))
    np.testing.assert_allclose(np.bincount(rows) / len(rows), weights / 8, atol=0.005)
    alike = np.concatenate(list(batches(np.ones(7), 7, 5, np.random.default_rng(0))))
    assert (np.sort(alike.reshape(5, 7), axis=1) == np.arange(7)).all()  # each once in an epoch


@pytest.mark.parametrize("n_cells", [1, 2, 3])
def test_fewer_cells_than_components_are_enough_for_a_fit(n_cells):
    cells, _ = planted_cells(n_cells)
    states = new_states(N_GENES, 3, 4)
    fit_states(states, cells)
    assert all(torch.isfinite(value).all() for value in states.state_dict().values())
    counts, sizes = states.sample(TEXTS[[0] * 20], np.arange(20))
    assert np.median(sizes) == pytest.approx(np.median(cells.total_counts), rel=0.5)
    assert counts.sum(axis=1).mean() == pytest.approx(sizes.mean(), rel=0.5)


def test_the_posterior_is_where_the_density_is_highest(fitted):
    states, cells, _ = fitted
    genes = np.arange(N_GENES - 2)
    prior = torch.from_numpy(np.random.default_rng(0).normal(size=(len(cells), 3))).float()
    found = find_posterior(states, cells, genes, torch.zeros(len(cells), 3), prior)
    z = found.mean[:5].clone().requires_grad_()
    theta = states.dispersion()[genes].detach()
    sizes = torch.from_numpy(cells.total_counts[:5].astype(np.float32))[:, None] / 1e4
    rates = z @ states.gene_directions.weight[genes].detach().t() + states.gene_bias.weight[genes, 0].detach()
    mean = rates.exp() * sizes
    y = torch.from_numpy(cells.counts[:5, genes].toarray())
    log_density = (y * mean.log() - (y + theta) * (theta + mean).log()).sum() - 0.5 * (z - prior[:5]).square().sum()
    (gradient,) = torch.autograd.grad(log_density, z)
    assert gradient.abs().max() < 0.05
    assert found.factor.shape == (500, 3, 3)


def test_a_gene_without_a_count_is_not_drawn(fitted):
    counts, _ = fitted[0].sample(TEXTS[[0] * 100], np.arange(100))
    assert counts[:, -2:].sum() == 0


def test_equal_cells_and_seeds_give_equal_states(fitted):
    cells, _ = planted_cells(100)
    one, two, other = (new_states(N_GENES, 3, 4) for _ in range(3))
    for states, seed in ((one, 0), (two, 0), (other, 1)):
        fit_states(states, cells, seed=seed)
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name
    assert not torch.equal(one.gene_directions.weight, other.gene_directions.weight)


def test_a_cell_depends_on_its_text_its_id_and_the_seed_alone(fitted):
    states = fitted[0]
    texts, ids = TEXTS[[0, 1, 0, 1]], np.array([7, 8, 9, 2**63 + 5], dtype=np.uint64)
    together, sizes = states.sample(texts, ids, seed=3)
    for row in range(4):
        alone, size = states.sample(texts[[row]], ids[[row]], seed=3)
        np.testing.assert_array_equal(alone[0], together[row])
        assert size[0] == pytest.approx(sizes[row], rel=1e-12)
    assert (states.sample(texts, ids, seed=4)[0] != together).any(axis=1).all()
    given, size = states.sample(texts, ids, seed=3, library_size=np.full(4, 5000.0))
    assert size.tolist() == [5000] * 4
    assert (given.sum(axis=1) > together.sum(axis=1)).all()


def test_the_mean_profile_of_a_text_is_that_of_its_cells(fitted):
    states = fitted[0]
    mean = np.expm1(states.mean_expression(TEXTS))
    counts, sizes = states.sample(TEXTS[[0] * 2000], np.arange(2000))
    drawn = (counts / sizes[:, None] * 1e4).mean(axis=0)
    np.testing.assert_allclose(mean[0, :-2], drawn[:-2], rtol=0.2, atol=2)


def test_the_regression_finds_planted_rates_and_dispersions():
    rng = np.random.default_rng(0)
    z = torch.cat([torch.from_numpy(rng.normal(size=(4000, 1))), torch.ones(4000, 1).double()], dim=1)
    sizes = torch.full((4000,), 0.2, dtype=torch.float64)
    mean = torch.exp(z @ torch.tensor([[0.5, 3.0], [0.0, 4.0]], dtype=torch.float64).t()) * sizes[:, None]
    gamma = rng.gamma(2.0, 1 / 2.0, (4000, 2)) * [1, 0] + [0, 1]  # the second gene is Poisson
    counts = torch.from_numpy(rng.poisson(mean.numpy() * gamma).T.astype(float))
    found = regress_counts(counts, z, sizes)
    np.testing.assert_allclose(found[:, :2].numpy(), [[0.5, 3.0], [0.0, 4.0]], atol=0.06)
    assert found[0, 2].exp().item() == pytest.approx(2)
    assert found[1, 2].exp().item() >= 60


def test_the_likely_dispersion_is_that_of_scipy():
    from scipy.stats import nbinom

    rng = np.random.default_rng(0)
    mean = rng.uniform(0.5, 5, 300)
    counts = rng.negative_binomial(4, 4 / (4 + mean))
    grid = np.array([1.0, 2.0, 4.0, 7.0, 12.0, 20.0])
    best = grid[np.argmax([nbinom.logpmf(counts, t, t / (t + mean)).sum() for t in grid])]
    assert (
        likely_dispersion(torch.from_numpy(counts)[None].float(), torch.from_numpy(mean)[None].float()).item() == best
    )


def test_states_are_fitted_to_a_corpus_and_its_captions(corpus, pipeline, tiny_processor):
    states = pipeline.model.model.cell_states
    arguments = open_corpus(corpus), CaptionSampler(), pipeline.model, tiny_processor
    names = np.array(open_corpus(corpus).sample("train", 32, ["cell_type"])[1].column(0).to_pylist())
    weights = read_texted_cells(*arguments, balance="cell_type").weights
    shares = [weights[names == name].sum() ** 2 / (names == name).sum() for name in np.unique(names)]
    assert len(shares) > 1
    assert shares == pytest.approx([shares[0]] * len(shares))  # of a label: the root of its number of cells
    cells = read_texted_cells(*arguments)
    assert (cells.weights == 1).all()
    assert cells.counts.shape == (32, pipeline.model.config.cell_config.vocab_size)
    assert cells.texts.shape[0] == 32
    assert torch.linalg.vector_norm(cells.features, dim=1).tolist() == pytest.approx([1] * len(cells.features))
    before = states.gene_bias.weight.clone()
    fit_cell_states(pipeline.model, open_corpus(corpus), CaptionSampler(), tiny_processor)
    assert not torch.equal(states.gene_bias.weight, before)
    sizes = pipeline.generate("cell type: B cell.", 50).obs["library_size"]
    assert sizes.median() == pytest.approx(np.median(cells.total_counts), rel=0.3)


def test_states_of_training_cells_travel_with_the_checkpoint(corpus, tiny_processor, tmp_path):
    pipeline = synthetic.tiny_pipeline(num_state_components=5)
    fit_cell_states(pipeline.model, open_corpus(corpus), CaptionSampler(), tiny_processor)
    states, config = pipeline.model.model.cell_states, pipeline.model.config
    assert states.training_states.shape == (32, 5)
    assert (config.num_training_states, config.num_texts_of_cell) == (32, states.training_texts.shape[1])
    drawn = pipeline.generate(["a B cell", "a T cell"], n_cells=3)
    assert (drawn.obs["training_distance"] > 0).all()
    pipeline.save_pretrained(tmp_path)
    again = type(pipeline).from_pretrained(str(tmp_path)).generate(["a B cell", "a T cell"], n_cells=3)
    np.testing.assert_array_equal(again.X.toarray(), drawn.X.toarray())
    means = pipeline.generate(["a B cell", "a T cell"], do_sample=False).X
    assert means.shape[0] == 2
    assert np.isfinite(means.toarray()).all()


def test_the_pipeline_draws_a_state_and_a_library_for_each_cell(pipeline):
    cells = pipeline.generate({"B": "a B cell", "T": "a T cell"}, 3)
    assert cells.obs["cell_type"].tolist() == ["B"] * 3 + ["T"] * 3
    assert cells.obs["library_size"].nunique() == 6
    assert (cells.layers["counts"].sum(axis=1) > 0).all()
    fewer = pipeline.generate("a T cell", 2)  # a cell does not depend on other prompts, nor on how many there are
    np.testing.assert_array_equal(fewer.X.toarray(), cells.X.toarray()[3:5])
    other = pipeline.generate("a T cell", 2, seed=1)
    assert (other.layers["counts"] != fewer.layers["counts"]).nnz
    given = pipeline.generate("a T cell", 2, library_size=500)
    assert given.obs["library_size"].tolist() == [500, 500]


def test_a_gene_does_not_depend_on_which_other_genes_are_generated(pipeline):
    whole = pipeline.generate("a B cell", 2)
    some = pipeline.generate("a B cell", 2, genes=["LYZ", "CD19"])
    np.testing.assert_array_equal(some.X.toarray(), whole[:, ["LYZ", "CD19"]].X.toarray())


def test_without_sampling_every_cell_of_a_prompt_is_the_mean(pipeline):
    cells = pipeline.generate(["a B cell", "a T cell"], 2, do_sample=False)
    assert "counts" not in cells.layers
    values = cells.X.toarray()
    np.testing.assert_array_equal(values[0], values[1])
    assert cells.shape[0] == 4


def test_cells_with_few_of_the_counts_of_their_library_are_told(pipeline, caplog):
    states = pipeline.model.model.cell_states
    n_genes = states.gene_bias.weight.shape[0]
    with torch.no_grad():
        states.gene_directions.weight.zero_()
        states.gene_bias.weight.fill_(np.log(1e4 / n_genes))
        states.gene_log_dispersion.weight.fill_(20.0)
    pipeline.generate("a B cell", 4)
    assert "of their library" not in caplog.text
    with torch.no_grad():
        states.gene_bias.weight.sub_(np.log(4))
    pipeline.generate("a B cell", 4, genes=["CD19", "CD14"])  # the others are not drawn
    assert "of their library" not in caplog.text
    pipeline.generate("a B cell", 4)
    assert "4 of 4 cells hold less than half of the counts of the library" in caplog.text


def test_states_travel_with_the_checkpoint(pipeline, tmp_path):
    pipeline.model.save_pretrained(tmp_path)
    loaded, info = ScMMGPTForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, value in pipeline.model.model.cell_states.state_dict().items():
        assert torch.equal(value, loaded.model.cell_states.state_dict()[name]), name


def test_a_checkpoint_without_states_generates_from_its_expression_head(tiny_model):
    assert tiny_model.model.cell_states is None
    assert not [name for name in tiny_model.state_dict() if "cell_states" in name]


def test_a_number_of_components_below_one_is_an_error():
    with pytest.raises(ValueError, match="num_state_components is 0"):
        ScMMGPTConfig(num_state_components=0)


def test_without_stored_labels_calibrate_is_named_as_the_way_out(pipeline):
    with pytest.raises(ValueError, match="scmmgpt calibrate CELLS"):
        pipeline.label_prompts()


def test_stored_labels_ask_by_the_kind_of_text_that_was_trained(pipeline, tiny_pipeline):
    text = "cell type: B cell. A lymphocyte of B lineage. It has a role."
    for each in (pipeline, tiny_pipeline):
        each.model.config.annotation = {"labels": {"B": text, "mine": "the cell that I sorted"}}
    assert pipeline.label_prompts() == {"B": "cell type: B cell.", "mine": "the cell that I sorted."}
    assert tiny_pipeline.label_prompts() == {"B": text, "mine": "the cell that I sorted"}


def test_generated_cells_are_compared_with_training_cells(fitted):
    states, cells, _ = fitted
    distances, places = states.compare(TEXTS[[0] * 300], np.arange(300))
    assert states.training_states.shape == (500, 3)
    assert 0.3 < np.median(distances) < 3  # as near as training cells are to each other, and no copies
    assert 0.5 < places.var(axis=0, ddof=1).sum() < 2
    _, sizes = states.sample(TEXTS[[0] * 300], np.arange(300))
    assert len(np.unique(sizes)) == 300
    assert not np.isin(sizes.round(), cells.total_counts).all()
    copied = copy.deepcopy(states)
    copied.state_noise = torch.zeros(4)
    assert (copied.compare(TEXTS[[0] * 300], np.arange(300))[0] < 1e-6).all()
    alone = states.compare(TEXTS[[0]], np.array([7]))
    assert np.allclose(alone[0], distances[7])
    assert np.allclose(alone[1], places[7])


def test_generate_writes_distance_and_diversity(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    loaded = type(pipeline).from_pretrained(str(tmp_path))
    generated = loaded.generate(["a B cell", "a T cell"], n_cells=3)
    assert generated.obs["training_distance"].shape == (6,)
    assert (generated.obs["training_distance"] > 0).all()
    assert generated.uns["scmmgpt"]["generate"]["diversity"].shape == (2,)
    assert np.isnan(loaded.generate("a B cell").uns["scmmgpt"]["generate"]["diversity"]).all()


def test_states_that_were_never_fitted_are_an_error_with_the_way_out():
    with pytest.raises(ValueError, match="cell states of this model are not fitted.*`python -m scmmgpt.train tune`"):
        synthetic.tiny_pipeline(num_state_components=3).generate("a B cell")
