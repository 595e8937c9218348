"""The bridge and the generative model on tiny configurations."""

import copy
import math

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    Qwen2Config,
    Trainer,
    TrainingArguments,
)

from scmmgpt.configuration_scmmgpt import ScMMGPTConfig
from scmmgpt.modeling_scmmgpt import (
    MAX_LOGIT_SCALE,
    ScMMGPTForCellTextAlignment,
    ScMMGPTForConditionalGeneration,
    cell_text_similarity,
    contrastive_loss,
    hash_texts,
    negative_binomial_nll,
    sample_hard_negatives,
)


NUM_QUERIES = 4


def build(config, kind=ScMMGPTForConditionalGeneration, **fields):
    """A model of random weights, whose configuration has other fields."""
    for name, value in fields.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    return kind(config).eval()


@pytest.fixture
def alignment_model(tiny_config):
    return build(tiny_config, ScMMGPTForCellTextAlignment)


@pytest.fixture
def model(tiny_config):
    return build(tiny_config)


def make_cells(lengths, seed=0, vocab_size=43):
    """Random cells, `<cls>` first and padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    gene_ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    expression = torch.full(gene_ids.shape, -2.0)
    for row, length in enumerate(lengths):
        gene_ids[row, 0] = 1
        gene_ids[row, 1:length] = torch.randperm(vocab_size - 3, generator=generator)[: length - 1] + 3
        expression[row, 1:length] = torch.randint(1, 51, (length - 1,), generator=generator).float()
    return {
        "gene_ids": gene_ids,
        "expression": expression,
        "cell_attention_mask": (gene_ids != 0).long(),
    }


def make_texts(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, 0] = 2
        ids[row, 1:length] = torch.randint(4, 40, (length - 1,), generator=generator)
    return {"qformer_input_ids": ids, "qformer_attention_mask": (ids != 0).long()}


def make_prompts(model, cells_per_row, words=5, seed=0):
    """Left-padded prompts in which every cell stands for `NUM_QUERIES` placeholders between words."""
    generator = torch.Generator().manual_seed(seed)
    cell = model.config.cell_token_id
    rows = []
    for row, cells in enumerate(cells_per_row):
        ids = torch.randint(4, 40, (words + row,), generator=generator).tolist()
        for _ in range(cells):
            ids += [cell] * NUM_QUERIES + torch.randint(4, 40, (2,), generator=generator).tolist()
        rows.append(ids)
    length = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[0] * (length - len(ids)) + ids for ids in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in rows]),
    }


def row_of(inputs, row):
    """One row of a batch, without its padding."""
    out = {}
    for mask, names in {
        "cell_attention_mask": ("gene_ids", "expression", "cell_attention_mask"),
        "qformer_attention_mask": ("qformer_input_ids", "qformer_attention_mask"),
        "attention_mask": ("input_ids", "attention_mask"),
    }.items():
        if mask in inputs:
            keep = inputs[mask][row].bool()
            out.update({name: inputs[name][row : row + 1, keep] for name in names if name in inputs})
    return out


# -- losses -----------------------------------------------------------------------------------------------------------


def test_contrastive_loss_is_clips_where_every_text_is_different():
    similarity = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(5)
    logits = similarity * 7.0
    clip = (
        torch.nn.functional.cross_entropy(logits, labels) + torch.nn.functional.cross_entropy(logits.t(), labels)
    ) / 2
    torch.testing.assert_close(contrastive_loss(similarity, torch.tensor(7.0), torch.eye(5)), clip)


def test_cells_of_one_caption_do_not_repel_each_other():
    similarity = torch.zeros(3, 3, requires_grad=True)
    targets = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    contrastive_loss(similarity, torch.tensor(1.0), targets).backward()
    assert (similarity.grad[targets.bool()] < 0).all()  # pulled together
    assert (similarity.grad[~targets.bool()] > 0).all()  # pushed apart


def test_hard_negatives_are_never_right_answers_and_rows_without_one_are_named():
    allowed = torch.tensor([[False, True, True], [False, False, False], [True, False, False]])
    for seed in range(20):
        torch.manual_seed(seed)
        columns, has_negative = sample_hard_negatives(torch.randn(3, 3), allowed, fixed=seed % 2 == 0)
        assert has_negative.tolist() == [True, False, True]
        assert allowed[[0, 2], columns[[0, 2]]].all()


def test_only_pairs_with_a_known_answer_are_matched(alignment_model):
    cells, texts = make_cells([9, 5, 7]), make_texts([6, 3, 8])
    inputs = {**cells, **texts, "text_ids": torch.tensor([4, 4, 4])}  # every text is right for every cell
    states = alignment_model.encode_cells(**cells)
    embeds = alignment_model.qformer_embeddings(input_ids=texts["qformer_input_ids"])
    logits = alignment_model.matching_logits(
        states, cells["cell_attention_mask"], embeds, texts["qformer_attention_mask"]
    )
    expected = torch.nn.functional.cross_entropy(logits, torch.ones(3, dtype=torch.long))
    torch.testing.assert_close(alignment_model(**inputs).matching_loss, expected)


@pytest.mark.parametrize("fixed", [False, True])
def test_negatives_are_as_frequent_as_the_softmax_of_their_similarity(fixed):
    torch.manual_seed(0)
    logits = torch.tensor([[9.0, 0.0, 2.0]]).expand(400, 3)
    columns, _ = sample_hard_negatives(logits, torch.tensor([[False, True, True]]).expand(400, 3), fixed=fixed)
    share = 1 / (1 + math.exp(-2))
    assert (columns == 2).float().mean().item() == pytest.approx(share, abs=0.005 if fixed else 0.05)
    assert (columns != 0).all()


def test_two_evaluations_have_the_same_matching_loss_and_leave_the_random_state_alone(alignment_model):
    inputs = {**make_cells([9, 5, 7, 8, 6, 4]), **make_texts([6, 3, 8, 5, 7, 4])}
    before = torch.get_rng_state()
    losses = [alignment_model(**inputs).matching_loss for _ in range(8)]
    assert len({loss.item() for loss in losses}) == 1
    assert torch.equal(torch.get_rng_state(), before)
    alignment_model.train()
    assert len({alignment_model(**inputs).matching_loss.item() for _ in range(8)}) > 1


def test_negative_binomial_nll_equals_scipys():
    from scipy import stats

    counts = torch.arange(6).double()
    mean, dispersion = torch.full((6,), 2.5).double(), torch.full((6,), 1.7).double()
    theirs = -stats.nbinom.logpmf(counts.numpy(), 1.7, 1.7 / (1.7 + 2.5))
    torch.testing.assert_close(negative_binomial_nll(counts, mean, dispersion), torch.tensor(theirs))


@pytest.mark.parametrize("dispersion", [1e5, 1e8])
def test_a_large_dispersion_is_poisson_in_float32(dispersion):
    nll = negative_binomial_nll(torch.tensor(2.0), torch.tensor(3.0), torch.tensor(dispersion))
    assert nll.dtype == torch.float32
    assert nll.item() == pytest.approx(3 - 2 * math.log(3) + math.log(2), abs=1e-4)


def test_zero_inflated_probabilities_sum_to_one_and_raise_the_zero():
    counts = torch.arange(400).double()
    mean, dispersion = torch.full((400,), 3.0).double(), torch.full((400,), 2.0).double()
    dropout_logits = torch.full((400,), 0.4).double()
    probabilities = (-negative_binomial_nll(counts, mean, dispersion, dropout_logits)).exp()
    assert probabilities.sum().item() == pytest.approx(1)
    assert probabilities[0] > (-negative_binomial_nll(counts, mean, dispersion)).exp()[0]


# -- alignment --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cell", "text"])
def test_features_of_a_row_equal_those_of_the_row_alone(alignment_model, kind):
    inputs = make_cells([9, 4, 13]) if kind == "cell" else make_texts([6, 3, 8])
    features = getattr(alignment_model, f"get_{kind}_features")
    together = features(**inputs)
    for row in range(3):
        torch.testing.assert_close(together[row : row + 1], features(**row_of(inputs, row)), atol=1e-5, rtol=1e-4)


def test_matching_of_a_pair_equals_that_of_the_pair_alone(alignment_model):
    inputs = {**make_cells([9, 4, 13]), **make_texts([6, 3, 8])}
    together = alignment_model.match(**inputs)
    assert ((together > 0) & (together < 1)).all()
    for row in range(3):
        torch.testing.assert_close(
            together[row : row + 1], alignment_model.match(**row_of(inputs, row)), atol=1e-5, rtol=1e-4
        )


def test_matching_of_all_pairs_equals_pair_by_pair(alignment_model):
    cells, texts = make_cells([9, 4]), make_texts([6, 3, 8])
    pairs = torch.cartesian_prod(torch.arange(2), torch.arange(3))
    together = alignment_model.match(**cells, **texts, pairs=pairs)
    for (cell, text), probability in zip(pairs.tolist(), together, strict=True):
        alone = alignment_model.match(**row_of(cells, cell), **row_of(texts, text))
        torch.testing.assert_close(probability[None], alone, atol=1e-5, rtol=1e-4)


def test_matching_names_both_numbers_when_they_do_not_pair_up(alignment_model):
    with pytest.raises(ValueError, match="2 cells and 3 texts"):
        alignment_model.match(**make_cells([9, 4]), **make_texts([6, 3, 8]))


def test_sdpa_equals_eager(alignment_model):
    inputs = {**make_cells([9, 4, 13]), **make_texts([6, 3, 8])}
    sdpa = alignment_model.match(**inputs), alignment_model.get_cell_features(**make_cells([9, 4, 13]))
    alignment_model.set_attn_implementation("eager")
    eager = alignment_model.match(**inputs), alignment_model.get_cell_features(**make_cells([9, 4, 13]))
    torch.testing.assert_close(sdpa, eager, atol=1e-5, rtol=1e-4)


def test_in_bfloat16_a_padded_cell_differs_from_the_cell_alone_by_rounding(alignment_model):
    cells = make_cells([3, 9, 31])
    alignment_model.to(torch.bfloat16)
    with torch.no_grad():
        padded = alignment_model.get_cell_features(**cells)
        alone = torch.cat([alignment_model.get_cell_features(**row_of(cells, row)) for row in range(3)])
    assert (
        padded - alone
    ).abs().max() <= 2**-7 * alone.abs().max()  # a rounding of the largest feature, as documented


def test_every_weighted_loss_is_returned_by_name_and_adds_up(tiny_config):
    weights = {"captioning_weight": 0.5, "cell_pretraining_weight": 0.25}
    model = build(tiny_config, ScMMGPTForCellTextAlignment, **weights).train()
    cells = make_cells([9, 4, 13])
    labels = torch.where(cells["expression"] > 25, cells["expression"], -100.0)
    masked = torch.where(labels > 0, -1.0, cells["expression"])
    out = model(**cells, **make_texts([6, 3, 8]), masked_expression=masked, expression_labels=labels)
    expected = out.contrastive_loss + out.matching_loss + 0.5 * out.captioning_loss + 0.25 * out.cell_pretraining_loss
    torch.testing.assert_close(out.loss, expected)
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_captioning_sees_no_later_word(alignment_model):
    """Changing the last word changes the loss of the last word only: the gradient route to earlier ones is closed."""
    cells, texts = make_cells([9]), make_texts([6])
    model, states = alignment_model, {}
    model.qformer.register_forward_hook(lambda module, args, out: states.update(last=out.last_hidden_state))

    def word_states(ids):
        cell_states = model.encode_cells(**cells)
        embeds = model.qformer_embeddings(input_ids=ids)
        model.captioning_loss(cell_states, cells["cell_attention_mask"], embeds, torch.ones_like(ids), ids)
        return states["last"][:, NUM_QUERIES:]

    before = word_states(texts["qformer_input_ids"])
    changed = texts["qformer_input_ids"].clone()
    changed[0, -1] = 41
    after = word_states(changed)
    torch.testing.assert_close(before[:, :-1], after[:, :-1])
    assert not torch.allclose(before[:, -1], after[:, -1])


def test_same_tokens_are_never_each_others_negatives(alignment_model):
    cells, texts = make_cells([9, 4, 13]), make_texts([6, 6, 6])
    texts["qformer_input_ids"][1] = texts["qformer_input_ids"][0]
    by_tokens = alignment_model(**cells, **texts).contrastive_loss
    by_ids = alignment_model(**cells, **texts, text_ids=torch.tensor([7, 7, 9])).contrastive_loss
    torch.testing.assert_close(by_tokens, by_ids)


def test_texts_have_one_number_where_their_tokens_are_equal():
    ids = torch.tensor([[2, 7, 9, 0], [0, 2, 7, 9], [2, 9, 7, 0], [2, 7, 0, 0], [2, 7, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 0]])
    first, same, *others = hash_texts(ids, mask).tolist()
    assert first == same
    assert len({first, *others}) == 4
    pairs = torch.cartesian_prod(torch.arange(300), torch.arange(300))
    assert len(hash_texts(pairs, torch.ones_like(pairs)).unique()) == 300**2


def test_a_batch_of_one_caption_has_a_finite_loss(alignment_model):
    loss = alignment_model(**make_cells([9, 4]), **make_texts([6, 6]), text_ids=torch.tensor([1, 1])).loss
    assert torch.isfinite(loss)


def test_the_inverse_temperature_is_at_most_a_hundred(alignment_model):
    for log_scale, expected in ((2.0, math.exp(2.0)), (MAX_LOGIT_SCALE, 100.0), (7.0, 100.0)):
        torch.nn.init.constant_(alignment_model.logit_scale, log_scale)
        assert alignment_model.inverse_temperature().item() == pytest.approx(expected)


@pytest.mark.parametrize("pairs_are_right", [False, True])
def test_a_temperature_beyond_its_ceiling_comes_back_and_goes_no_further(alignment_model, pairs_are_right):
    torch.nn.init.constant_(alignment_model.logit_scale, 7.0)
    texts = torch.tensor([[1.0, 0.0], [0.995, 0.1]])
    cells = texts if pairs_are_right else texts.flip(0)  # right pairs call for a higher scale, wrong ones for a lower
    alignment_model.contrastive_loss(cells[:, None], texts, torch.arange(2)).backward()
    gradient = alignment_model.logit_scale.grad.item()
    assert gradient == 0 if pairs_are_right else gradient > 0


def test_a_misspelled_input_is_refused_by_name(alignment_model):
    inputs = {**make_cells([9, 4]), **make_texts([6, 3])}
    with pytest.raises(TypeError, match=r"'text_id' is not an input of ScMMGPTForCellTextAlignment.* text_ids, "):
        alignment_model(**inputs, text_id=torch.arange(2))
    with pytest.raises(TypeError, match="'output_hidden_states' is not an input"):
        alignment_model(**inputs, output_hidden_states=True)
    with pytest.raises(TypeError, match="'profiles'"):
        alignment_model.match(**inputs, profiles=torch.ones(2, 9))
    passed_by_trainers = {"num_items_in_batch": torch.tensor(2), "return_loss": True, "output_attentions": False}
    assert alignment_model(**inputs, **passed_by_trainers, labels=None).loss.isfinite()


def test_words_can_be_added_to_a_stage_1_model(alignment_model, tmp_path):
    language_model_size = alignment_model.config.text_config.vocab_size
    alignment_model.resize_token_embeddings(50)
    alignment_model.save_pretrained(tmp_path)
    loaded = ScMMGPTForCellTextAlignment.from_pretrained(tmp_path)
    assert loaded.get_input_embeddings().num_embeddings == 50
    assert loaded.config.text_config.vocab_size == language_model_size


def test_similarity_is_the_best_querys_cosine():
    cell_features = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    text_features = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    assert cell_text_similarity(cell_features, text_features).tolist() == [[1.0, 0.0]]


# -- cell to text -----------------------------------------------------------------------------------------------------


def test_logits_of_a_left_padded_row_equal_those_of_the_row_alone(model):
    prompts, cells = make_prompts(model, [1, 1, 1]), make_cells([9, 4, 13])
    position_ids = (prompts["attention_mask"].cumsum(1) - 1).clamp(min=0)
    together = model(**prompts, **cells, position_ids=position_ids).logits
    for row in range(3):
        alone = model(**row_of({**prompts, **cells}, row)).logits
        keep = prompts["attention_mask"][row].bool()
        torch.testing.assert_close(together[row, keep], alone[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [GPT2Config, GPTNeoXConfig])
def test_the_language_loss_of_a_left_padded_row_equals_that_of_the_row_alone(tiny_config, kind):
    sizes = {"vocab_size": 48, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    tiny_config.text_config = kind(**sizes, bos_token_id=1, eos_token_id=1)
    torch.manual_seed(0)
    model = ScMMGPTForConditionalGeneration(ScMMGPTConfig(**tiny_config.to_dict())).eval()
    torch.nn.init.normal_(model.get_input_embeddings().weight)  # positions of the usual initialisation hardly matter
    for name, weight in model.model.language_model.named_parameters():
        if name.startswith("wpe"):
            torch.nn.init.normal_(weight)
    prompts = make_prompts(model, [0, 0])
    labels = torch.full_like(prompts["input_ids"], -100)
    labels[0, 2:] = prompts["input_ids"][0, 2:]  # the padded row alone; its first token, at 1, is predicted by nothing
    together = model(**prompts, labels=labels).language_loss
    alone = row_of(prompts, 0)
    torch.testing.assert_close(model(**alone, labels=alone["input_ids"]).language_loss, together, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beam"])
def test_generation_of_a_row_equals_that_of_the_row_alone(model, options):
    prompts, cells = make_prompts(model, [1, 1, 1]), make_cells([9, 4, 13])
    together = model.generate(**prompts, **cells, max_new_tokens=6, do_sample=False, **options)
    for row in range(3):
        alone = model.generate(**row_of({**prompts, **cells}, row), max_new_tokens=6, do_sample=False, **options)
        new = alone[0, prompts["attention_mask"][row].sum() :]
        assert together[row, prompts["input_ids"].shape[1] :][: len(new)].tolist() == new.tolist()


def test_a_language_model_that_returns_tuples_by_default_generates(model):
    inputs = {**make_prompts(model, [1]), **make_cells([9])}
    expected = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    model.config.text_config.return_dict = False
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).tolist() == expected.tolist()


def test_outputs_are_tuples_on_request(tiny_config, alignment_model, model):
    prompt = {**make_prompts(model, [1]), **make_cells([9]), "use_cache": False}
    for inputs, run in (
        (prompt, model),
        (prompt, model.model),
        ({**make_cells([9]), **make_texts([6])}, alignment_model),
    ):
        expected = run(**inputs, return_dict=True).to_tuple()
        assert len(expected) > 1
        torch.testing.assert_close(run(**inputs, return_dict=False), expected)
        run.config.return_dict = False  # as for any model of transformers
        torch.testing.assert_close(run(**inputs), expected)
    genes = torch.arange(3, 8)
    assert model.generate_cells(**make_prompts(model, [0]), target_gene_ids=genes).expression.shape == (1, 5)


def test_cached_generation_equals_uncached(model):
    prompts, cells = make_prompts(model, [1, 2]), make_cells([9, 4, 13])
    cached = model.generate(**prompts, **cells, max_new_tokens=6, do_sample=False)
    uncached = model.generate(**prompts, **cells, max_new_tokens=6, do_sample=False, use_cache=False)
    assert cached.tolist() == uncached.tolist()


def test_looking_words_up_in_the_prompt_changes_no_word(model):
    inputs = {**make_prompts(model, [1]), **make_cells([9])}
    alone = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    looked_up = model.generate(**inputs, max_new_tokens=6, do_sample=False, prompt_lookup_num_tokens=2)
    assert looked_up.tolist() == alone.tolist()


@pytest.mark.parametrize("num_cells", [1, 2])
def test_a_model_that_assists_reads_the_cells_too(model, num_cells):
    inputs = {**make_prompts(model, [num_cells]), **make_cells([9, 4][:num_cells])}
    alone = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assistant = copy.deepcopy(model)
    assistant.generation_config.num_assistant_tokens = 2
    assert model.generate(**inputs, max_new_tokens=6, do_sample=False, assistant_model=assistant).equal(alone)


def test_a_prompt_can_be_continued_from_a_cache(model):
    prompts, cells = make_prompts(model, [1]), make_cells([9])
    whole = model.generate(**prompts, **cells, max_new_tokens=6, do_sample=False)
    begun = model.generate(**prompts, **cells, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    name = "cache" if "cache" in begun else "past_key_values"
    mask = torch.ones_like(begun.sequences)
    mask[:, : prompts["attention_mask"].shape[1]] = prompts["attention_mask"]
    continued = model.generate(
        input_ids=begun.sequences, attention_mask=mask, max_new_tokens=3, do_sample=False, **{name: begun[name]}
    )
    assert continued.tolist() == whole.tolist()


def test_a_forward_pass_can_be_continued_from_a_cache(model):
    inputs = {**make_prompts(model, [1]), **make_cells([9])}
    whole = model(**inputs).logits
    start = model(**{**inputs, "input_ids": inputs["input_ids"][:, :-2], "attention_mask": None}, use_cache=True)
    name = "cache" if "cache" in start else "past_key_values"
    rest = model(input_ids=inputs["input_ids"][:, -2:], **{name: start[name]}).logits
    torch.testing.assert_close(rest, whole[:, -2:], atol=1e-5, rtol=1e-4)


def test_several_cells_with_beams_equal_the_embeddings_route(model):
    prompts, cells = make_prompts(model, [2, 1, 3]), make_cells([9, 4, 13, 5, 7, 3])
    beams = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 5, "do_sample": False}
    ours = model.generate(**prompts, **cells, **beams)[:, prompts["input_ids"].shape[1] :]
    with torch.no_grad():
        embeds = model.get_input_embeddings()(prompts["input_ids"])
        placeholders = prompts["input_ids"] == model.config.cell_token_id
        embeds[placeholders] = model.model.get_cell_tokens(**cells).flatten(0, 1)
    theirs = model.generate(inputs_embeds=embeds, attention_mask=prompts["attention_mask"], **beams)
    assert ours.tolist() == theirs.tolist()


def test_the_model_never_writes_a_placeholder(model):
    with torch.no_grad():
        model.lm_head.weight[model.config.cell_token_id] = 100 * model.lm_head.weight.sum(0)
    prompts, cells = make_prompts(model, [1, 1]), make_cells([9, 4])
    for options in ({"do_sample": False}, {"do_sample": True}):
        new = model.generate(**prompts, **cells, max_new_tokens=5, **options)[:, prompts["input_ids"].shape[1] :]
        assert (new != model.config.cell_token_id).all()


def test_more_placeholders_than_cells_names_both_numbers(model):
    for run in (model, lambda **inputs: model.generate(**inputs, max_new_tokens=2)):
        with pytest.raises(ValueError, match="has 4 cell placeholder tokens, but 0 cells x 4 tokens were given"):
            run(**make_prompts(model, [1]))
        with pytest.raises(ValueError, match=r"8 cell placeholder tokens.*1 cells x 4"):
            run(**make_prompts(model, [2]), **make_cells([9]))


# -- text to cell -----------------------------------------------------------------------------------------------------


def targets_for(batch_size, genes=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    counts = torch.poisson(torch.full((batch_size, genes), 2.0), generator=generator)
    return {
        "target_gene_ids": torch.arange(3, 3 + genes).expand(batch_size, -1),
        "target_attention_mask": torch.ones(batch_size, genes, dtype=torch.long),
        "target_counts": counts,
        "target_expression": torch.log1p(counts),
        "library_size": torch.full((batch_size,), 1000.0),
    }


@pytest.fixture(params=["mse", "nb", "zinb"])
def generator_model(tiny_config, request):
    return build(tiny_config, expression_head=request.param)


def test_generated_expression_of_a_row_equals_that_of_the_row_alone(generator_model):
    prompts = make_prompts(generator_model, [0, 0, 0])
    genes = torch.arange(3, 15)
    together = generator_model.generate_cells(**prompts, target_gene_ids=genes).expression
    assert (together >= 0).all()
    for row in range(3):
        alone = generator_model.generate_cells(**row_of(prompts, row), target_gene_ids=genes).expression
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-4, rtol=1e-4)


def test_cells_that_share_a_prompt_give_the_loss_of_as_many_prompts(generator_model):
    targets, prompt = targets_for(3), make_prompts(generator_model, [0])
    apart = {name: value.expand(3, -1) for name, value in prompt.items()}
    alone = generator_model(**apart, **targets)
    for name in ("target_gene_ids", "target_attention_mask"):
        targets[name] = targets[name][:1]
    shared = generator_model(**prompt, **targets, target_rows=torch.zeros(3, dtype=torch.long))
    torch.testing.assert_close(shared.expression_loss, alone.expression_loss)


def test_draws_from_one_prompt_are_those_of_the_prompt_repeated(tiny_config):
    model = build(tiny_config, expression_head="nb")
    arguments = {"target_gene_ids": torch.arange(3, 15), "library_size": 5e3, "do_sample": True}
    prompts = make_prompts(model, [0, 0])
    drawn = model.generate_cells(**prompts, **arguments, num_return_cells=3, cell_ids=np.arange(6))
    repeated = {name: value.repeat_interleave(3, dim=0) for name, value in prompts.items()}
    expected = model.generate_cells(**repeated, **arguments, cell_ids=list(range(6)))
    assert drawn.counts.tolist() == expected.counts.tolist()
    torch.testing.assert_close(drawn.expression, expected.expression)


def test_the_target_never_reaches_what_is_generated(generator_model):
    """The decoder's parameters are bit-identical whatever the target's counts are."""
    prompts = make_prompts(generator_model, [0, 0])
    seen = []
    head = generator_model.model.expression_head
    head.register_forward_hook(lambda module, args, out: seen.append(out["expression"].clone()))
    for seed in (0, 1):
        generator_model(**prompts, **targets_for(2, seed=seed))
    assert torch.equal(seen[0], seen[1])


def test_rows_without_targets_do_not_enter_the_expression_loss(generator_model):
    prompts, targets = make_prompts(generator_model, [0, 0, 0]), targets_for(3)
    targets["target_attention_mask"][1] = 0
    three = generator_model(**prompts, **targets).expression_loss
    keep = torch.tensor([0, 2])
    two = generator_model(
        **{k: v[keep] for k, v in prompts.items()}, **{k: v[keep] for k, v in targets.items()}
    ).expression_loss
    torch.testing.assert_close(three, two)


def test_a_batch_without_targets_has_a_differentiable_zero(generator_model):
    targets = targets_for(2)
    targets["target_attention_mask"][:] = 0
    loss = generator_model(**make_prompts(generator_model, [0, 0]), **targets).expression_loss
    loss.backward()
    assert loss.item() == 0


@pytest.mark.parametrize("kind", ["nb", "zinb"])
def test_sampled_counts_depend_on_seed_and_cell_alone(tiny_config, kind):
    model = build(tiny_config, expression_head=kind)
    prompts = make_prompts(model, [0, 0, 0])
    arguments = {"target_gene_ids": torch.arange(3, 15), "library_size": 5e3, "do_sample": True}
    together = model.generate_cells(**prompts, **arguments, cell_ids=[5, 6, 7]).counts
    assert together.dtype == torch.long
    assert (together >= 0).all()
    alone = model.generate_cells(**row_of(prompts, 1), **arguments, cell_ids=[6]).counts
    assert together[1].tolist() == alone[0].tolist()
    assert model.generate_cells(**prompts, **arguments, seed=1).counts.tolist() != together.tolist()


def test_sampled_counts_have_the_predicted_mean(tiny_config):
    model = build(tiny_config, expression_head="zinb")
    prompts = {name: value.expand(3000, -1) for name, value in make_prompts(model, [0]).items()}
    out = model.generate_cells(**prompts, target_gene_ids=torch.arange(3, 8), library_size=1e4, do_sample=True)
    mean = out.counts.double().mean(0)
    error = out.counts.double().std(0) / 3000**0.5
    assert ((mean - out.expression[0].expm1()).abs() < 5 * error).all()


def test_language_and_expression_losses_add_up_with_their_weights(tiny_config):
    model = build(tiny_config, language_weight=0.5, expression_weight=2.0).train()
    prompts = make_prompts(model, [1, 0])
    labels = prompts["input_ids"].masked_fill(prompts["attention_mask"] == 0, -100)
    targets = targets_for(2)
    targets["target_attention_mask"][0] = 0
    out = model(**prompts, **make_cells([9]), **targets, labels=labels)
    torch.testing.assert_close(out.loss, 0.5 * out.language_loss + 2 * out.expression_loss)


def test_accumulation_changes_no_gradient_of_a_plain_trainer(tiny_config, tmp_path):
    start = build(tiny_config, expression_head="nb").train()
    prompts, cells = make_prompts(start, [1] * 8), make_cells([9] * 8)
    length = len(make_prompts(start, [1])["input_ids"][0])
    inputs = {name: value[:, -length:] for name, value in prompts.items()}
    inputs.update(cells, labels=inputs["input_ids"].clone(), target_gene_ids=torch.arange(3, 8).expand(8, -1))
    inputs.update(target_counts=torch.arange(40).view(8, 5), library_size=torch.full((8,), 1e3))
    rows = [{name: value[row] for name, value in inputs.items()} for row in range(8)]
    weights = []
    for batch_size in (8, 2):
        model = ScMMGPTForConditionalGeneration(tiny_config)
        model.load_state_dict(start.state_dict())
        options = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0, "max_steps": 1, "use_cpu": True}
        options.update(per_device_train_batch_size=batch_size, gradient_accumulation_steps=8 // batch_size)
        arguments = TrainingArguments(
            str(tmp_path), save_strategy="no", report_to="none", disable_tqdm=True, **options
        )
        Trainer(model, arguments, train_dataset=rows).train()
        weights.append({name: value - start.state_dict()[name] for name, value in model.state_dict().items()})
    assert weights[0]["model.expression_head.projection.weight"].abs().max() > 1e-3
    for name, step in weights[0].items():
        torch.testing.assert_close(weights[1][name], step, rtol=1e-3, atol=1e-6, msg=name)


# -- joining and loading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tied", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_components_join_with_every_weight_accounted_for(tiny_config, alignment_model, tied, dtype):
    torch.manual_seed(1)
    tiny_config.text_config.tie_word_embeddings = tied
    language_model = AutoModelForCausalLM.from_config(tiny_config.text_config, dtype=dtype).eval()
    layer = language_model.base_model.layers[0].mlp
    layer.up_proj = torch.nn.Linear(layer.hidden_size, layer.intermediate_size, bias=False, dtype=dtype)  # by hand
    ids = torch.randint(4, 40, (2, 7))
    logits = language_model(input_ids=ids).logits
    weights = {name: value.clone() for name, value in language_model.state_dict().items()}
    places = {value.data_ptr() for value in language_model.parameters()}
    model = ScMMGPTForConditionalGeneration.from_components(
        alignment_model, language_model, cell_token_id=tiny_config.cell_token_id
    ).eval()
    for name, parameter in alignment_model.state_dict().items():
        assert torch.equal(model.model.state_dict()[name], parameter), name
    ours = model.state_dict()
    for name, value in weights.items():
        assert torch.equal(ours[name.replace("model.", "model.language_model.", 1)], value), name
    assert places <= {value.data_ptr() for value in model.parameters()}  # taken over, not copied
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert model.model.language_projection[0].weight.dtype == torch.float32
    assert torch.equal(model(input_ids=ids).logits, logits)


@pytest.mark.parametrize("kind", [GPT2Config, GPTNeoXConfig, Qwen2Config])
@pytest.mark.parametrize("tied", [False, True])
def test_a_language_model_stays_tied_or_not_whatever_its_embeddings_are_called(alignment_model, tmp_path, kind, tied):
    sizes = {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = kind(**sizes, num_key_value_heads=2, tie_word_embeddings=tied)
    language_model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(5, 40, (2, 7))
    logits = language_model(input_ids=ids).logits
    model = ScMMGPTForConditionalGeneration.from_components(alignment_model, language_model, cell_token_id=4)
    model.save_pretrained(tmp_path)
    for ours in (model.eval(), ScMMGPTForConditionalGeneration.from_pretrained(tmp_path).eval()):
        assert torch.equal(ours(input_ids=ids).logits, logits)
        ours.resize_token_embeddings(48)
        assert (ours.lm_head.weight is ours.get_input_embeddings().weight) == tied
        torch.testing.assert_close(ours(input_ids=ids).logits[..., :40], logits)


def test_joining_refuses_a_language_model_that_changes_what_its_head_gives(alignment_model, tiny_llama_config):
    language_model = AutoModelForCausalLM.from_config(tiny_llama_config)
    plain = language_model.forward

    def doubled(*args, **kwargs):
        output = plain(*args, **kwargs)
        output.logits = 2 * output.logits
        return output

    language_model.forward = doubled
    with pytest.raises(ValueError, match="'llama' language model changes the output of its head"):
        ScMMGPTForConditionalGeneration.from_components(alignment_model, language_model, cell_token_id=4)


def test_joining_refuses_a_model_with_foreign_weights(tiny_config, alignment_model):
    alignment_model.register_parameter("stranger", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(ValueError, match="stranger"):
        ScMMGPTForConditionalGeneration.from_components(
            alignment_model, AutoModelForCausalLM.from_config(tiny_config.text_config), cell_token_id=4
        )


def test_a_stage_1_checkpoint_loads_into_stage_2_by_its_key_names(alignment_model, tiny_config, tmp_path):
    alignment_model.save_pretrained(tmp_path)
    model, report = ScMMGPTForConditionalGeneration.from_pretrained(
        tmp_path, config=tiny_config, output_loading_info=True
    )
    assert not report["unexpected_keys"]
    new_parts = (
        "model.language_model.",
        "model.language_projection.",
        "model.text_to_cell.",
        "model.expression_head.",
    )
    assert all(key.startswith(new_parts) or key == "lm_head.weight" for key in report["missing_keys"])
    torch.testing.assert_close(
        model.get_cell_features(**make_cells([9, 4])), alignment_model.get_cell_features(**make_cells([9, 4]))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_and_loading_changes_nothing(model, tmp_path, dtype):
    model.save_pretrained(tmp_path)
    model = ScMMGPTForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    model.save_pretrained(tmp_path)
    loaded, report = ScMMGPTForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    prompts, cells = make_prompts(model, [1, 1]), make_cells([9, 4])
    cells["expression"] = cells["expression"].to(dtype)
    assert torch.equal(model(**prompts, **cells).logits, loaded(**prompts, **cells).logits)
    assert loaded.generation_config.suppress_tokens == [model.config.cell_token_id]


def test_gradients_are_equal_with_and_without_checkpointing(tiny_config):
    model = build(tiny_config).train()
    prompts, cells, targets = make_prompts(model, [1, 1]), make_cells([9, 4]), targets_for(2)
    labels = prompts["input_ids"].masked_fill(prompts["attention_mask"] == 0, -100)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**prompts, **cells, **targets, labels=labels, use_cache=False).loss.backward()
        gradients.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_the_text_of_a_configuration_names_the_settings_of_labels_without_their_values(tiny_config):
    tiny_config.annotation = {"labels": {"B": "a B cell"}, "temperature": 0.25}
    text = repr(tiny_config)
    assert '"labels": "..."' in text
    assert '"temperature": "..."' in text
    assert "a B cell" not in text
    assert f'"projection_dim": {tiny_config.projection_dim}' in text
    assert tiny_config.annotation["temperature"] == 0.25
    assert "a B cell" in tiny_config.to_json_string()
