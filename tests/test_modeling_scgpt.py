import pytest
import torch
from accelerate import disk_offload
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from scmmgpt import modeling_scgpt
from scmmgpt.configuration_scmmgpt import ScGPTConfig
from scmmgpt.modeling_scgpt import (
    IGNORED_LABEL,
    Packing,
    ScGPTForPreTraining,
    ScGPTModel,
    Segments,
    masked_expression_loss,
    packed_attention,
)


LENGTHS = (9, 4, 0, 7, 4, 1)  # the third cell is all padding; two have the same length


def make_config(**overrides):
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    ids = {"intermediate_size": 24, "pad_token_id": 0, "cls_token_id": 1}
    return ScGPTConfig(**(sizes | ids | {"initializer_range": 0.3, "hidden_dropout": 0.0} | overrides))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return ScGPTModel(make_config()).eval()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    gene_ids = torch.randint(3, 40, mask.shape, generator=generator)
    gene_ids[:, 0] = 1
    expression = torch.randint(1, 51, mask.shape, generator=generator).float()
    expression[:, 0] = -2.0
    return {
        "gene_ids": gene_ids * mask,
        "expression": torch.where(mask.bool(), expression, -2.0),
        "cell_attention_mask": mask,
    }


def test_each_cell_is_independent_of_its_batch(model, batch):
    together = model(**batch).last_hidden_state
    for row, length in enumerate(LENGTHS):
        if length:
            alone = model(
                batch["gene_ids"][row : row + 1, :length], batch["expression"][row : row + 1, :length]
            ).last_hidden_state
            torch.testing.assert_close(together[row, :length], alone[0])


def test_the_order_of_the_genes_does_not_matter(model, batch):
    order = torch.tensor([0, 5, 2, 8, 1, 7, 3, 6, 4])
    shuffled = {name: value[:1, order] for name, value in batch.items()}
    torch.testing.assert_close(model(**shuffled).pooler_output, model(**batch).pooler_output[:1])


def test_what_stands_in_the_padding_does_not_matter(model, batch):
    other = dict(batch, gene_ids=batch["gene_ids"].masked_fill(batch["cell_attention_mask"] == 0, 7))
    other["expression"] = batch["expression"].masked_fill(batch["cell_attention_mask"] == 0, 33.0)
    torch.testing.assert_close(model(**other).last_hidden_state, model(**batch).last_hidden_state)


@pytest.mark.parametrize("cls_only", [False, True])
def test_packed_attention_equals_eager_attention(model, batch, cls_only):
    packed = model(**batch, cls_only=cls_only)
    model.set_attn_implementation("eager")
    eager = model(**batch, cls_only=cls_only)
    torch.testing.assert_close(packed.last_hidden_state, eager.last_hidden_state)
    torch.testing.assert_close(packed.pooler_output, eager.pooler_output)


def test_cutting_the_packed_row_into_pieces_changes_nothing(model, batch, monkeypatch):
    expected = model(**batch).last_hidden_state
    monkeypatch.setattr(modeling_scgpt, "CPU_PIECE_BYTES", 8 * 16 * 4)
    with torch.no_grad():
        packing = Packing.of(torch.zeros(6, 9, 16), batch["cell_attention_mask"])
        assert [segments.lengths for segments in packing.pieces] == [[1, 4], [4], [7], [9]]
        torch.testing.assert_close(model(**batch).last_hidden_state, expected)
        torch.testing.assert_close(model(**batch, cls_only=True).pooler_output, expected[:, 0])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_cell_that_is_all_padding_has_states_of_zero(model, batch, implementation):
    model.set_attn_implementation(implementation)
    outputs = model(**batch)
    assert (outputs.last_hidden_state[2] == 0).all()
    assert (outputs.pooler_output[2] == 0).all()
    assert outputs.last_hidden_state.isfinite().all()


def test_a_batch_of_empty_cells_has_states_of_zero(model, batch):
    empty = {name: value[2:3] for name, value in batch.items()}
    assert (model(**empty).last_hidden_state == torch.zeros(1, 9, 16)).all()
    states = model(**empty, cls_only=True, output_hidden_states=True).hidden_states
    assert [tuple(state.shape) for state in states] == [(1, 9, 16)] * 3 + [(1, 1, 16)]
    assert all((state == 0).all() for state in states)


def test_no_mask_means_no_padding(model, batch):
    full = {name: value[:1] for name, value in batch.items()}
    expected = model(**full).last_hidden_state
    del full["cell_attention_mask"]
    assert torch.equal(model(**full).last_hidden_state, expected)


@pytest.mark.parametrize("cls_only", [False, True])
def test_hidden_states_are_the_embeddings_and_every_layer(model, batch, cls_only, monkeypatch):
    monkeypatch.setattr(modeling_scgpt, "CPU_PIECE_BYTES", 8 * 16 * 4)
    mask = batch["cell_attention_mask"][..., None]
    with torch.no_grad():
        packed = model(**batch, cls_only=cls_only, output_hidden_states=True)
        assert torch.equal(packed.last_hidden_state, model(**batch, cls_only=cls_only).last_hidden_state)
        assert packed.hidden_states[-1] is packed.last_hidden_state
        embeddings = model.embeddings(batch["gene_ids"], batch["expression"])
        torch.testing.assert_close(packed.hidden_states[0], embeddings * mask)
        by_layer, expected = [], embeddings
        for layer in model.encoder.layers:
            expected = layer(expected, torch.zeros(6, 1, 9, 9).masked_fill(~mask.bool().mT[:, None], -1e9))
            by_layer.append(expected * mask)
        by_layer[-1] = by_layer[-1][:, :1] if cls_only else by_layer[-1]
        torch.testing.assert_close(packed.hidden_states[1:], tuple(by_layer))
        model.set_attn_implementation("eager")
        eager = model(**batch, cls_only=cls_only, output_hidden_states=True)
    torch.testing.assert_close(packed.hidden_states, eager.hidden_states)


def test_hidden_states_by_configuration(batch):
    model = ScGPTModel(make_config(output_hidden_states=True)).eval()
    assert len(model(**batch).hidden_states) == 4
    assert model(**batch, output_hidden_states=False).hidden_states is None


def test_attentions_are_returned_by_eager_attention_and_refused_elsewhere(model, batch):
    with pytest.raises(ValueError, match=r"'sdpa' runs fused kernels.*set_attn_implementation\('eager'\)"):
        model(**batch, output_attentions=True)
    model.set_attn_implementation("eager")
    outputs = model(**batch, output_attentions=True)
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(6, 2, 9, 9)] * 3
    torch.testing.assert_close(outputs.attentions[0].sum(-1), torch.ones(6, 2, 9))
    assert (outputs.attentions[0][1, :, :, 4:] == 0).all()  # the second cell has four tokens
    assert model(**batch).attentions is None


def test_outputs_are_tuples_on_request(batch):
    model = ScGPTModel(make_config()).eval()
    outputs = model(**batch)
    assert all(map(torch.equal, model(**batch, return_dict=False), outputs.values()))
    assert len(model(**batch, return_dict=False)) == len(outputs)
    labels = batch["expression"].masked_fill(batch["expression"] < 25, IGNORED_LABEL)
    assert len(model(**batch, expression_labels=labels, return_dict=False)) == 7
    trained = ScGPTForPreTraining(make_config(return_dict=False)).eval()
    parts = trained(**hide(batch))
    torch.testing.assert_close(parts[0], sum(parts[2:]))
    assert len(parts) == 5  # the logits come after the loss


def test_bfloat16_on_the_cpu_stays_close_to_float32(model, batch):
    expected = model(**batch).pooler_output
    with torch.no_grad():
        ours = model.to(torch.bfloat16)(**batch, cls_only=True).pooler_output
    real = torch.tensor(LENGTHS) > 0
    assert torch.cosine_similarity(ours.float(), expected)[real].min() > 0.999


def test_cells_are_packed_in_order_of_length():
    mask = torch.tensor([[1, 1, 1], [0, 0, 0], [1, 0, 0], [1, 1, 0]])
    embeds = torch.arange(12.0).reshape(4, 3, 1)
    packing = Packing.of(embeds, mask)
    (segments,) = packing.pieces
    assert segments.lengths == [1, 2, 3]
    assert segments.ends.tolist() == [0, 1, 3, 6]
    assert packing.rows.tolist() == [2, 3, 0]
    assert packing.pack(embeds)[0].flatten().tolist() == [6, 9, 10, 0, 1, 2]
    assert packing.unpack(packing.pack(embeds)).flatten().tolist() == [0, 1, 2, 0, 0, 0, 6, 0, 0, 9, 10, 0]


@pytest.mark.parametrize("first_only", [False, True])
def test_the_variable_length_kernel_is_given_what_the_loop_computes(monkeypatch, first_only):
    """The kernel exists on CUDA alone; what stands in for it here follows its documentation."""

    def stand_in(query, key, value, query_ends, key_ends, longest_query, longest_key, *, scale):
        assert longest_query == (1 if first_only else 3)
        assert longest_key == 3
        output = torch.empty_like(query)
        for cell in range(len(key_ends) - 1):
            queries, keys = slice(*query_ends[cell : cell + 2]), slice(*key_ends[cell : cell + 2])
            scores = torch.einsum("qhd,khd->hqk", query[queries], key[keys]) * scale
            output[queries] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value[keys])
        return output

    segments = Segments.of([1, 2, 3], torch.device("cpu"))
    key, value = torch.randn(2, 6, 2, 8)
    query = torch.randn(3 if first_only else 6, 2, 8)
    expected = packed_attention(query, key, value, segments, scaling=0.3)
    monkeypatch.setattr(modeling_scgpt, "varlen_attn", stand_in)
    monkeypatch.setattr(modeling_scgpt, "_has_varlen_kernel", lambda query: True)
    torch.testing.assert_close(packed_attention(query, key, value, segments, scaling=0.3), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("cls_only", [False, True])
def test_the_variable_length_kernel_of_cuda_equals_eager_attention(batch, cls_only):
    torch.manual_seed(0)
    model = ScGPTModel(make_config(hidden_size=64)).to("cuda", torch.bfloat16)
    inputs = {name: value.cuda() for name, value in batch.items()}
    outputs, gradients = [], []
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        outputs.append(model(**inputs, cls_only=cls_only).last_hidden_state)
        outputs[-1].float().square().mean().backward()
        gradients.append(model.encoder.layers[0].attention.q_proj.weight.grad.clone())
    torch.testing.assert_close(*outputs, rtol=0.05, atol=0.05)
    torch.testing.assert_close(*gradients, rtol=0.1, atol=1e-3)


@pytest.mark.slow  # it compiles
def test_flex_attention_equals_packed_attention(model, batch):
    with torch.no_grad():  # it has no backward pass on a CPU
        for inputs in (batch, generation_batch(batch)):
            model.set_attn_implementation("sdpa")
            expected = model(**inputs).last_hidden_state
            model.set_attn_implementation("flex_attention")
            torch.testing.assert_close(model(**inputs).last_hidden_state, expected)


def test_condition_tokens_stand_before_the_genes(model, batch):
    conditions = torch.randn(6, 3, 16)
    outputs = model(**batch, condition_embeds=conditions)
    assert outputs.last_hidden_state.shape == (6, 12, 16)
    # Rows that are all padding still have their conditions.
    assert (outputs.last_hidden_state[2, 3:] == 0).all()
    assert (outputs.last_hidden_state[2, :3] != 0).any()
    model.set_attn_implementation("eager")
    eager = model(**batch, condition_embeds=conditions)
    torch.testing.assert_close(outputs.last_hidden_state, eager.last_hidden_state)


def test_genes_without_expression_carry_no_value(model, batch):
    gene_ids = batch["gene_ids"][:1, 1:]
    conditions = torch.randn(1, 2, 16)
    outputs = model(gene_ids, condition_embeds=conditions)
    by_hand = model.encoder(torch.cat([conditions, model.embeddings.embed_genes(gene_ids)], dim=1))
    torch.testing.assert_close(outputs.last_hidden_state, by_hand[-1])


def test_generation_puts_the_embedding_in_the_place_of_cls(model, batch):
    prompt = torch.randn(6, 16)
    generated = model.generate_expression(batch["gene_ids"], prompt, batch["cell_attention_mask"])
    assert generated.shape == batch["gene_ids"].shape
    other = batch["gene_ids"].clone()
    other[:, 0] = 5
    torch.testing.assert_close(model.generate_expression(other, prompt, batch["cell_attention_mask"]), generated)
    assert not torch.allclose(model.generate_expression(other, prompt + 1, batch["cell_attention_mask"]), generated)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_genes_that_attend_to_conditions_equal_eager_attention_under_that_mask(model, batch, dtype):
    gene_ids, mask, conditions = batch["gene_ids"], batch["cell_attention_mask"], torch.randn(6, 3, 16)
    inputs = {"gene_ids": gene_ids, "condition_embeds": conditions, "cell_attention_mask": mask}
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        states = model(**inputs, genes_attend_to="conditions").last_hidden_state.float()
    mask = nn.functional.pad(mask, (3, 0), value=1)
    visible = torch.eye(12, dtype=torch.bool)
    visible[:3] = visible[:, :3] = True
    visible = visible & mask[:, None].bool() | torch.eye(12, dtype=torch.bool)
    additive = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[:, None]
    expected = torch.cat([conditions, model.embeddings.embed_genes(gene_ids)], dim=1)
    model.set_attn_implementation("eager")
    padded = model(**inputs, genes_attend_to="conditions").last_hidden_state
    for layer in model.encoder.layers:
        expected = layer(expected, additive)
    torch.testing.assert_close(padded, expected * mask[..., None])
    tolerance = {"rtol": 0, "atol": 0.1} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(states, expected * mask[..., None], **tolerance)


def test_a_gene_reaches_another_through_the_conditions_alone(model, batch):
    gene_ids, conditions = batch["gene_ids"][:1], torch.randn(1, 2, 16)
    other = gene_ids.clone()
    other[0, 4] = 39
    model.encoder.layers = model.encoder.layers[:1]  # one layer: conditions have told nobody yet
    before, after = (
        model(ids, condition_embeds=conditions, genes_attend_to="conditions").last_hidden_state[0]
        for ids in (gene_ids, other)
    )
    changed = (before != after).any(dim=-1)
    assert changed.nonzero().flatten().tolist() == [0, 1, 2 + 4]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"genes_attend_to": "none"}, "choose 'all' or 'conditions'"),
        ({"genes_attend_to": "conditions", "condition_embeds": None}, "needs condition_embeds"),
        ({"genes_attend_to": "conditions", "cls_only": True}, "cls_only"),
    ],
)
def test_what_genes_attend_to_is_checked(model, batch, inputs, message):
    with pytest.raises(ValueError, match=message):
        model(**{**batch, "condition_embeds": torch.randn(6, 2, 16), **inputs})


@pytest.mark.parametrize("kind", ["generate", "by conditions"])
def test_flash_attention_is_refused_where_it_would_show_what_is_hidden(model, batch, kind):
    model.config._attn_implementation_internal = "flash_attention_2"  # as if it were installed
    inputs = generation_batch(batch)
    if kind == "by conditions":
        inputs = {**batch, "condition_embeds": torch.randn(6, 2, 16), "genes_attend_to": "conditions"}
    with pytest.raises(ValueError, match="lets genes see all others"):
        model(**inputs)


def test_the_mvc_decoder_can_be_adapted(model, batch):
    cell, genes = torch.randn(6, 16), batch["gene_ids"]
    settings = LoraConfig(target_modules=".*mvc_decoder.*_proj", init_lora_weights=False)
    adapted = get_peft_model(model, settings)
    with_lora = model.decode_mvc(cell, genes)
    with_lora.sum().backward()
    assert all(weight.grad.any() for weight in adapted.parameters() if weight.requires_grad)
    torch.testing.assert_close(adapted.merge_and_unload().decode_mvc(cell, genes), with_lora)


def test_an_offloaded_model_predicts_the_same(batch, tmp_path):
    torch.manual_seed(0)
    config = make_config(use_flag_embedding=True)
    model = ScGPTModel(config).eval()
    hidden = torch.zeros_like(batch["gene_ids"])
    hidden[:, 2] = 1
    inputs = {**batch, "generation_mask": hidden, "expression_labels": batch["expression"]}
    expected = model(**inputs)
    offloaded = disk_offload(model, tmp_path, execution_device=torch.device("cpu"), offload_buffers=True)
    outputs = offloaded(**inputs)
    torch.testing.assert_close(outputs.mvc_expression, expected.mvc_expression)
    torch.testing.assert_close(outputs.last_hidden_state, expected.last_hidden_state)


def test_expression_cannot_be_forgotten(model, batch):
    with pytest.raises(ValueError, match="expression is None"):
        model(batch["gene_ids"])


def test_the_loss_is_the_mean_square_over_labels():
    predicted = torch.tensor([[9.0, 1.0, 2.0], [9.0, 3.0, 9.0]])
    labels = torch.tensor([[-100.0, 3.0, 2.0], [-100.0, 2.0, -100.0]])
    assert masked_expression_loss(predicted, labels) == (4 + 0 + 1) / 3
    assert masked_expression_loss(predicted, torch.full((2, 3), -100.0)) == 0


def test_both_decoders_are_trained_on_the_labels(model, batch):
    labels = torch.full_like(batch["expression"], IGNORED_LABEL)
    labels[:2, 1:4] = batch["expression"][:2, 1:4]
    outputs = model(**batch, expression_labels=labels)
    decoded = model.decode_expression(model(**batch).last_hidden_state)
    asked = model.decode_mvc(model(**batch).pooler_output, batch["gene_ids"])
    torch.testing.assert_close(outputs.predicted_expression, decoded)
    torch.testing.assert_close(outputs.mvc_expression, asked)
    expected = masked_expression_loss(decoded, labels) + masked_expression_loss(asked, labels)
    torch.testing.assert_close(outputs.loss, expected)
    with pytest.raises(ValueError, match="cls_only"):
        model(**batch, expression_labels=labels, cls_only=True)


def generation_batch(batch):
    mask = torch.zeros_like(batch["gene_ids"])
    mask[:, 3:] = batch["cell_attention_mask"][:, 3:]
    return dict(batch, generation_mask=mask)


def test_genes_to_be_generated_are_seen_by_themselves_alone(model, batch):
    """Each gets the state that it has when it is the only one, and the prompt's states do not change."""
    together = model(**generation_batch(batch)).last_hidden_state[0]  # three shown, six to be generated
    prompt = {name: value[:1, :3] for name, value in batch.items()}
    torch.testing.assert_close(together[:3], model(**prompt).last_hidden_state[0])
    for position in range(3, 9):
        chosen = [0, 1, 2, position]
        alone = {name: value[:1, chosen] for name, value in generation_batch(batch).items()}
        torch.testing.assert_close(together[position], model(**alone).last_hidden_state[0, 3])


def test_values_of_genes_to_be_generated_are_not_read(model, batch):
    changed = generation_batch(batch)
    expected = model(**changed).last_hidden_state
    changed["expression"] = torch.where(changed["generation_mask"] == 1, 17.0, changed["expression"])
    torch.testing.assert_close(model(**changed).last_hidden_state, expected)


def test_the_flag_marks_genes_to_be_generated(batch):
    model = ScGPTModel(make_config(use_flag_embedding=True)).eval()
    inputs = generation_batch(batch)
    before = model(**inputs).last_hidden_state
    with torch.no_grad():
        model.embeddings.flag_embedding.weight[1] += 1
    after = model(**inputs).last_hidden_state
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.allclose(before[0, 3:], after[0, 3:])


@pytest.mark.parametrize("kind", ["read", "generate", "by conditions"])
def test_eager_and_sdpa_have_the_same_gradients(model, batch, kind):
    inputs = generation_batch(batch) if kind == "generate" else batch
    if kind == "by conditions":
        conditions = torch.randn(6, 2, 16, generator=torch.Generator().manual_seed(1))
        inputs = {**batch, "condition_embeds": conditions, "genes_attend_to": "conditions"}
    labels = torch.where(batch["cell_attention_mask"] == 1, batch["expression"], float(IGNORED_LABEL))
    gradients = []
    for implementation in ("sdpa", "eager"):
        model.zero_grad()
        model.set_attn_implementation(implementation)
        model(**inputs, expression_labels=labels).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.isfinite().all(), name
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-3)


def test_every_parameter_is_trained(batch):
    torch.manual_seed(0)
    model = ScGPTModel(make_config(use_flag_embedding=True, hidden_dropout=0.1, attention_dropout=0.1)).train()
    labels = torch.where(batch["cell_attention_mask"] == 1, batch["expression"], float(IGNORED_LABEL))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for inputs in (batch, generation_batch(batch)):
        model(**inputs, expression_labels=labels).loss.backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), f"{name} has not changed"


def test_attention_dropout_is_a_setting_of_its_own(batch):
    torch.manual_seed(0)
    model = ScGPTModel(make_config(attention_dropout=0.5)).train()
    assert not torch.allclose(model(**batch).pooler_output, model(**batch).pooler_output)
    model.config.attention_dropout = 0.0
    torch.testing.assert_close(model(**batch).pooler_output, model(**batch).pooler_output)


def hide(batch):
    hidden = torch.zeros_like(batch["gene_ids"], dtype=torch.bool)
    hidden[:, 2:4] = batch["cell_attention_mask"][:, 2:4].bool()
    return dict(batch, labels=batch["expression"].masked_fill(~hidden, IGNORED_LABEL))


def test_a_plain_trainer_evaluates_the_loss(batch, tmp_path):
    inputs = {name: value[[0, 1, 3, 4]] for name, value in batch.items()}
    torch.manual_seed(0)
    model = ScGPTModel(make_config()).eval()
    hidden = (inputs["gene_ids"] > 20) & (inputs["cell_attention_mask"] == 1)
    inputs["expression_labels"] = inputs["expression"].masked_fill(~hidden, IGNORED_LABEL)
    rows = [{name: value[row] for name, value in inputs.items()} for row in range(4)]
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True)
    evaluated = Trainer(model, arguments, eval_dataset=rows).evaluate()
    assert evaluated["eval_loss"] == pytest.approx(model(**inputs).loss.item(), rel=1e-4)


def test_every_objective_of_pre_training_is_reported_and_summed(batch):
    torch.manual_seed(0)
    model = ScGPTForPreTraining(make_config(use_flag_embedding=True)).eval()
    outputs = model(**hide(batch))
    parts = [outputs.masked_loss, outputs.gene_prompt_loss, outputs.cell_prompt_loss]
    torch.testing.assert_close(outputs.loss, torch.stack(parts).sum())
    masked = ScGPTForPreTraining(model.config, objectives=("masked",)).eval()
    masked.load_state_dict(model.state_dict())
    torch.testing.assert_close(masked(**hide(batch)).loss, outputs.masked_loss)
    assert masked(**hide(batch)).cell_prompt_loss is None


@pytest.mark.parametrize("objective", ["masked", "gene_prompt"])
def test_pre_training_reads_no_value_that_it_hides(batch, objective):
    model = ScGPTForPreTraining(make_config(), objectives=(objective, "cell_prompt")).eval()
    inputs, predictions = hide(batch), []
    model.cell_model.expression_decoder.register_forward_hook(lambda module, args, output: predictions.append(output))
    model(**inputs)
    model(**dict(inputs, expression=inputs["expression"].masked_fill(inputs["labels"] != IGNORED_LABEL, 44.0)))
    torch.testing.assert_close(predictions[:2], predictions[2:])


@pytest.mark.parametrize("objectives", [("cell_prompt",), ("masked", "guessing"), ()])
def test_objectives_are_checked(objectives):
    with pytest.raises(ValueError, match="choose from"):
        ScGPTForPreTraining(make_config(), objectives=objectives)


def test_a_new_value_encoder_tells_values_apart():
    """Without random biases the encoding of every positive value would be the same."""
    model = ScGPTModel(make_config(initializer_range=0.02))
    assert model.embeddings.value_encoder.linear1.bias.abs().min() > 0
    one, two, fifty = model.embeddings.value_encoder(torch.tensor([[1.0, 2.0, 50.0]]))[0]
    assert (one - two).abs().max() > 0.1
    assert (two - fifty).abs().max() > 0.1


def test_gene_embeddings_start_uniform_as_in_scgpt():
    weight = ScGPTModel(make_config(vocab_size=4000)).embeddings.gene_embedding.weight[1:]
    assert weight.abs().max() <= 0.1001
    assert weight.std().item() == pytest.approx(0.2 / 12**0.5, rel=0.02)


@pytest.mark.parametrize("kind", [ScGPTModel, ScGPTForPreTraining])
def test_the_cell_model_is_saved_alone_or_in_a_model_of_pre_training_and_loads(batch, tmp_path, kind):
    model = kind(make_config()).eval()
    model.save_pretrained(tmp_path)
    loaded, report = ScGPTModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    cell_model = model if kind is ScGPTModel else model.cell_model
    assert torch.equal(loaded(**batch).last_hidden_state, cell_model(**batch).last_hidden_state)
    assert {"modeling_scgpt.py", "configuration_scmmgpt.py"} <= {path.name for path in tmp_path.iterdir()}


def test_weights_that_a_checkpoint_lacks_are_initialised(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = make_config(use_flag_embedding=True, num_hidden_layers=4)
    loaded, report = ScGPTModel.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert "embeddings.flag_embedding.weight" in report["missing_keys"]
    assert all(parameter.isfinite().all() and parameter.abs().max() < 3 for parameter in loaded.parameters())
    assert torch.equal(loaded.embeddings.value_encoder.linear1.bias, model.embeddings.value_encoder.linear1.bias)


def test_the_whole_model_compiles_as_one_graph(model, batch):
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**batch).last_hidden_state, model(**batch).last_hidden_state)
