"""GRPO with rewards that the corpus verifies: rewards by value, and training on tiny models."""

import functools
import json
import re
from pathlib import Path

import datasets
import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from trl import GRPOTrainer

from scmmgpt import synthetic
from scmmgpt.genes_scmmgpt import GeneIndex
from scmmgpt.modeling_scmmgpt import ScMMGPTForConditionalGeneration
from scmmgpt.processing_scmmgpt import ScMMGPTProcessor
from scmmgpt.tests.corpora import SHORT
from scmmgpt.tests.test_train import run_ranks, run_tune, words_of
from scmmgpt.train import reinforce
from scmmgpt.train.reinforce import CellGRPOTrainer
from scmmgpt.train.rewards import genes_in_text, reward_functions, score_genes, score_type


GENES = GeneIndex({"CD19": 3, "LYZ": 4, "IL2RA": 5, "CD14": 6, "MT-ND1": 7}, {"CD25": "IL2RA"})


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


# -- rewards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("This cell is a B cell.", 1),
        ("B cells are lymphocytes.", 1),
        ("a lymphocyte of B lineage", 5 / 6),
        ("This cell is a lymphocyte, maybe a B cell", 4 / 6),
        ("mononuclear cell", 3 / 6),
        ("This is a cell.", 0),
        ("A naive B cell.", 0),
        ("This cell is a T cell, no B cell.", 0),
        ("Nothing is known.", 0),
        ("", 0),
    ],
)
def test_a_type_counts_by_its_depth_on_the_way_to_the_true_one(text, score):
    for truth in (("B cell", "CL:0000236"), ("B cell", None), ("B-cells", None), (None, "CL:0000236")):
        assert score_type(text, *truth) == pytest.approx(score)


def test_a_type_without_a_term_is_right_by_its_name_alone():
    assert score_type("An alien blob from space.", "alien blob") == 1
    assert score_type("A B cell.", "alien blob") == 0
    assert score_type("A B cell.", None) is None
    assert score_type("A B cell.", "unknown", None) is None


@pytest.mark.parametrize(
    ("text", "expressed", "score"),
    [
        ("High levels of CD19 and LYZ.", {3}, 1 / 2),
        ("High levels of CD19 and LYZ.", {3, 4}, 1),
        ("CD19, CD19 and CD19", {4}, 0),
        ("CD19, CD19, CD19 and LYZ", {3, 4}, 2 / 4),
        ("CD25 and IL2RA", {5}, 1 / 2),
        ("CD25-negative, with CD19", {3}, 1),
        ("It lacks LYZ.", {4}, 0),
        ("It expresses CD25.", {5}, 1),
        ("A CD14-positive monocyte with LYZ.", {4}, 1),
        ("High MT-ND1.", {7}, 0),
        ("This cell is a B cell.", {3, 4}, 0),
        ("lyz and Lyz are not symbols", {4}, 0),
    ],
)
def test_genes_count_by_the_share_of_mentions_that_are_true_and_new(text, expressed, score):
    assert score_genes(genes_in_text(text, GENES), expressed) == score


def test_genes_of_a_text_come_with_what_the_text_says_of_them():
    assert genes_in_text("A CD14-positive monocyte with LYZ but CD19-negative; high MT-ND1", GENES) == [
        (4, 1),
        (3, -1),
    ]


def test_rewards_read_texts_and_messages_and_the_columns_of_the_rows():
    of_type, of_genes = reward_functions(["cell_type", "genes"], GENES)
    assert (of_type.__name__, of_genes.__name__) == ("cell_type", "genes")  # the names in the log
    columns = {"cell_type": ["B cell", "T cell", None], "expressed_genes": [{3}, {4}, {4}], "trainer_state": None}
    completions = ["A B cell with CD19.", [{"role": "assistant", "content": "A B cell with CD19."}], "LYZ"]
    assert of_type(completions, **columns) == [1, 0, None]
    assert of_genes(completions, **columns) == [1, 0, 1]


def test_a_type_cannot_be_rewarded_without_the_column():
    (of_type,) = reward_functions(["cell_type"], GENES)
    with pytest.raises(ValueError, match="needs a column 'cell_type'"):
        of_type(["A B cell."])


# -- training ---------------------------------------------------------------------------------------------------------


OPTIONS = {
    **SHORT,
    "num_generations": 4,
    "max_completion_length": 4,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
}


@pytest.fixture(scope="module")
def tuned(corpus, aligned, tmp_path_factory):
    path = str(tmp_path_factory.mktemp("tuned"))
    run_tune(corpus, aligned, path, {"num_state_components": None})
    return path


def rows_of(adata, processor, **columns):
    rows = processor.read_cells(adata)[0].to_rows()
    return datasets.Dataset.from_list([{**row, "number": i} for i, row in enumerate(rows)])


def nothing(completions, **columns):
    """A reward of nothing."""
    return [0.0] * len(completions)


def trainer_of(tmp_path, rows, reward=nothing, kind=CellGRPOTrainer, given=(), **options):
    """A trainer of the tiny model on rows of a dataset, or of an AnnData."""
    pipeline = synthetic.tiny_pipeline()
    rows = rows if isinstance(rows, datasets.Dataset) else rows_of(rows, pipeline.processor)
    arguments = reinforce.ReinforceConfig(str(tmp_path), **{**OPTIONS, "max_steps": 1, **options})
    parts = {"args": arguments, "processing_class": pipeline.processor, "train_dataset": rows, **dict(given)}
    return kind(pipeline.model, reward_funcs=reward, **parts)


def train(*arguments, **options):
    trainer = trainer_of(*arguments, **options)
    trainer.train()
    return trainer


def test_some_steps_raise_a_reward_that_is_easy_to_learn(tmp_path, adata):
    def share_of_even_tokens(completion_ids, **columns):
        return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]

    trainer = train(tmp_path, adata, share_of_even_tokens, max_steps=15, temperature=1.0)
    rewards = [line["reward"] for line in trainer.state.log_history if "reward" in line]
    assert len(rewards) == 15
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.25, rewards


def test_a_completion_keeps_its_cell_from_generation_to_the_loss(tmp_path, adata, monkeypatch):
    written, parts, losses = {}, [], []

    def note(completion_ids, expressed_genes, number, **columns):
        written.update(zip(map(tuple, completion_ids), expressed_genes, strict=True))
        return number

    compute_loss = CellGRPOTrainer._compute_loss

    def watch(trainer, model, inputs):
        parts.append(inputs)
        losses.append(compute_loss(trainer, model, inputs))
        return losses[-1]

    monkeypatch.setattr(CellGRPOTrainer, "_compute_loss", watch)
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "max_completion_length": 8}
    trainer = train(tmp_path, adata, note, max_steps=2, **sizes, learning_rate=0)
    assert len(parts) == 6
    assert len(written) > 20  # nearly all of 24 differ
    model = trainer.model.eval()
    for part in parts:
        names = ("completion_ids", "completion_mask", "gene_ids", "cell_attention_mask")
        rows = zip(*(part[name] for name in names), strict=True)
        for ids, mask, genes, shown in rows:
            shown_genes = set(genes[shown.bool()].tolist()) - {1}  # without <cls>
            assert shown_genes
            assert shown_genes <= written[tuple(ids[mask.bool()].tolist())]
        # TRL's log-probabilities are those of the model's own forward, for a row alone.
        cells = {name: part[name] for name in ("gene_ids", "expression", "cell_attention_mask")}
        trainer._cells = cells
        whole = [torch.cat([part[f"prompt_{name}"], part[f"completion_{name}"]], dim=1) for name in ("ids", "mask")]
        length = part["completion_ids"].shape[1]
        with torch.no_grad():
            found, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, *whole, length, batch_size=3)
            for row in range(len(found)):
                one = {name: value[row : row + 1] for name, value in cells.items()}
                logits = model(input_ids=whole[0][[row]], attention_mask=whole[1][[row]], **one).logits
                expected = logits.log_softmax(-1)[0, -length - 1 : -1].gather(1, part["completion_ids"][row][:, None])
                shown = part["completion_mask"][row].bool()
                torch.testing.assert_close(found[row][shown], expected[:, 0][shown], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("prompt", ["a cell", "<cell> a <cell>"])
def test_a_prompt_that_shows_no_cell_or_two_is_refused(tmp_path, adata, tiny_processor, prompt):
    rows = rows_of(adata, tiny_processor)
    with pytest.raises(ValueError, match=f"A prompt mentions {prompt.count('<cell>')} cells"):
        train(tmp_path, rows.add_column("prompt", [prompt] * len(rows)))


def test_rows_bring_messages_and_cells_in_every_form(tmp_path, adata, tiny_processor):
    cells = tiny_processor.read_cells(adata)[0]
    question = [{"role": "user", "content": "<cell> what is this ?"}]
    rows = {"as columns": cells.to_rows(), "as cells": [{"cells": [row]} for row in cells.to_rows()]}
    seen = {}
    for name, forms in rows.items():
        shown = seen.setdefault(name, [])

        def note(prompts, completions, expressed_genes, shown=shown, **columns):
            assert prompts == [question] * 8
            assert completions[0][0]["role"] == "assistant"
            shown.extend(expressed_genes)
            return [0.0] * 8

        train(tmp_path, datasets.Dataset.from_list([{**row, "prompt": question} for row in forms]), note)
    assert seen["as columns"] == seen["as cells"]
    assert [seen["as cells"].count(genes) for genes in seen["as cells"]] == [4] * 8  # two cells, four texts each


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ({"rollout_func": print}, {}, "rollout_func makes prompts without cells"),
        ({"tools": [print]}, {}, "tools makes prompts without cells"),
        ({}, {"use_transformers_continuous_batching": True}, "take texts only"),
    ],
)
def test_what_generates_without_cells_is_refused(tmp_path, adata, given, options, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, adata, given=given, **options)


def test_the_trainer_of_trl_says_that_its_prompts_show_no_cells(tmp_path, adata, tiny_processor):
    question = [{"role": "user", "content": "<cell>\nWhich cell is this?"}]
    rows = rows_of(adata, tiny_processor).map(lambda row: {"prompt": question})
    with pytest.raises(ValueError, match="but 0 cells were given"):
        train(tmp_path, rows, kind=GRPOTrainer)


def test_a_question_is_asked_as_describe_asks_it(tiny_pipeline):
    processor = tiny_pipeline.processor
    for question in ("what is this ?", "what is <cell> ?"):
        assert reinforce.render_question(processor, question) == tiny_pipeline._prompt(question)
    assert reinforce.render_question(processor, None) is None


def run(corpus, tuned, output_dir, cells=None, reward_funcs=None, **options):
    run_only(corpus, tuned, output_dir, cells, reward_funcs, **options)
    return load_file(output_dir / "model.safetensors")


def run_only(corpus, tuned, output_dir, cells=None, reward_funcs=None, **options):
    values = {"corpus": corpus, "checkpoint": tuned, "output_dir": output_dir, **OPTIONS, "max_steps": 2, **options}
    arguments = reinforce.make_parser().parse_args_and_config(words_of(values))
    reinforce.main(*arguments, cells=cells, reward_funcs=reward_funcs)


def short(completion_ids, **columns):
    return [-float(len(ids)) - sum(ids) / 1000 for ids in completion_ids]


def test_the_command_trains_lora_on_the_language_model_and_saves_all(corpus, tuned, tmp_path):
    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "validation_cells": 2, "per_device_eval_batch_size": 4}
    weights = run(corpus, tuned, tmp_path, reward_funcs=[short], **evaluation)
    before = load_file(Path(tuned, "model.safetensors"))
    changed = {name for name, value in weights.items() if not torch.equal(value, before[name])}
    assert changed
    assert all(re.search(r"language_model\..*_proj", name) for name in changed)
    card = ModelCard.load(tmp_path / "README.md")
    assert "with descriptions rewarded for truth" in card.text
    assert "reward" in card.text.split("## Measured")[1]
    # The adapter on the checkpoint is the new checkpoint; on the new checkpoint it would count twice.
    base = ScMMGPTForConditionalGeneration.from_pretrained(tuned)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == tuned
    merged = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().state_dict()
    assert all(torch.allclose(merged[name], value, atol=1e-6) for name, value in weights.items())
    again = ScMMGPTForConditionalGeneration.from_pretrained(tmp_path)
    assert again.config.adapter_bases == [*base.config.adapter_bases, tuned]  # that of before counts twice, too
    with pytest.raises(ValueError, match="would count twice"):
        PeftModel.from_pretrained(again, tmp_path / "adapter")
    assert (tmp_path / "adapter" / "README.md").exists()
    assert ScMMGPTProcessor.from_pretrained(tmp_path).num_query_tokens == 2


def test_a_run_that_is_cut_in_two_ends_like_one_that_is_not(corpus, tuned, tmp_path):
    options = {"reward_funcs": [short], "max_steps": 12, "per_device_train_batch_size": 16}
    saving = {"save_strategy": "steps", "save_steps": 10, "save_total_limit": 2}
    whole = run(corpus, tuned, tmp_path / "whole", **options, **saving)
    resumed = {"resume_from_checkpoint": tmp_path / "whole" / "checkpoint-10"}  # in the second epoch of eight steps
    again = run(corpus, tuned, tmp_path / "again", **options, **resumed)
    for name, value in whole.items():
        assert torch.equal(value, again[name]), name


def test_every_epoch_has_an_order_of_its_own():
    sampler = reinforce.EpochSampler(range(8), 2, batch_size=4, seed=3)
    orders = []
    for epoch in (0, 1, 1):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] != orders[1] == orders[2]
    assert orders[0][::2] == orders[0][1::2]


def test_a_dataset_in_place_of_the_corpus_trains_alike(corpus, tuned, tmp_path):
    files = f"{corpus}/data/train-*.parquet"
    load = functools.partial(datasets.load_dataset, "parquet", data_files=files, split="train")
    whole = run(corpus, tuned, tmp_path / "corpus", reward_funcs=[short])
    given = run(corpus, tuned, tmp_path / "map-style", {"train": load()}, [short])
    assert all(torch.equal(value, given[name]) for name, value in whole.items())
    streamed = run(corpus, tuned, tmp_path / "streamed", {"train": load(streaming=True)}, [short])
    before = load_file(Path(tuned, "model.safetensors"))
    assert any(not torch.equal(value, streamed[name]) for name, value in before.items())


def test_two_processes_write_and_learn_together(corpus, tuned, tmp_path):
    run_ranks(run_only, corpus, tuned, tmp_path, per_device_train_batch_size=4)
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoint": "aligned"}, "name a checkpoint of `tune`"),
        ({"rewards": "cell_type cell_type"}, "each once"),
        ({"rewards": "beauty"}, "choose among cell_type, genes"),
        ({"validation_cells": 0}, "choose at least 1"),
        ({"label_smoothing_factor": 0.1}, "no label smoothing"),
    ],
)
def test_what_makes_no_sense_is_refused(corpus, tuned, aligned, tmp_path, options, message):
    values = {"corpus": corpus, "checkpoint": tuned, "output_dir": tmp_path, **OPTIONS, **options}
    values["checkpoint"] = aligned if values["checkpoint"] == "aligned" else tuned
    words = [word for part in words_of(values) for word in part.split(" ")]
    with pytest.raises(ValueError, match=message):
        reinforce.main(*reinforce.make_parser().parse_args_and_config(words))
