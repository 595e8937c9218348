"""What a batch of stage 2 holds: who is described, who is generated, and from which prompt."""

import numpy as np
import pytest

from scmmgpt.train.data.captions import CaptionSampler, find_markers
from scmmgpt.train.data.collate import TuningCollator


@pytest.fixture
def cells(tiny_processor, adata):
    return tiny_processor.read_cells(adata[:24].copy())[0]


@pytest.fixture
def obs(adata):
    return {"cell_type": adata.obs["cell_type"][:24].astype(str).to_numpy(), "tissue": np.array(["blood"] * 24)}


def collator(processor, **options):
    return TuningCollator(processor, CaptionSampler(), text_to_cell_ratio=1.0, **options)


def prompts_of(processor, batch):
    """The prompt of every target cell."""
    texts = processor.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    return [texts[row] for row in batch["target_rows"]]


def test_cells_of_the_same_prompt_share_its_row(tiny_processor, cells, obs):
    batch = collator(tiny_processor, prompts_per_epoch=1)(cells, obs)
    assert len(batch["input_ids"]) == len(set(obs["cell_type"]))
    assert len(batch["target_rows"]) == len(batch["target_counts"]) == 24
    prompts = np.array(prompts_of(tiny_processor, batch))
    for cell_type in set(obs["cell_type"]):
        assert len(set(prompts[obs["cell_type"] == cell_type])) == 1


@pytest.mark.parametrize("prompts_per_epoch", [None, 1, 3])
def test_a_cells_prompt_does_not_depend_on_its_batch(tiny_processor, cells, obs, prompts_per_epoch):
    collate = collator(tiny_processor, prompts_per_epoch=prompts_per_epoch)
    together = prompts_of(tiny_processor, collate(cells, obs))
    alone = [
        prompts_of(tiny_processor, collate(cells[i : i + 1], {k: v[i : i + 1] for k, v in obs.items()}))[0]
        for i in range(24)
    ]
    assert alone == together


def test_another_epoch_has_other_prompts_and_other_annotations_their_own(tiny_processor, cells, obs):
    collate = collator(tiny_processor, prompts_per_epoch=1)
    epochs = {tuple(prompts_of(tiny_processor, collate(cells, obs, epoch=epoch))) for epoch in range(8)}
    assert len(epochs) > 1
    split = {**obs, "tissue": np.repeat(["blood", "lung"], 12)}
    annotations = set(zip(split["cell_type"], split["tissue"], strict=True))
    assert len(set(collate.prompt_ids(split, cells.cell_ids))) == len(annotations) > len(set(obs["cell_type"]))


def test_every_cell_is_either_described_or_generated(tiny_processor, cells, obs):
    collate = TuningCollator(tiny_processor, CaptionSampler(), text_to_cell_ratio=0.5)
    batch = collate(cells, obs)
    generated = collate.is_generated(cells.cell_ids, 0)
    assert 0 < generated.sum() < 24
    assert len(batch["target_rows"]) == generated.sum()
    described = (batch["labels"] != -100).any(dim=1)
    assert len(batch["gene_ids"]) == described.sum() == (~generated).sum()
    assert not described[batch["target_rows"]].any()


def test_a_described_cell_may_name_its_own_markers_and_a_prompt_never_does(tiny_processor, cells, obs, monkeypatch):
    means = np.full(len(tiny_processor.gene_tokenizer), 1e-3)
    captions, texts = CaptionSampler("markers", gene_means=means), {}

    def note(name):
        write = getattr(captions, name)

        def written(*args, **kwargs):
            texts[name] = write(*args, **kwargs)
            return texts[name]

        monkeypatch.setattr(captions, name, written)

    note("answer")
    note("caption")
    markers = find_markers(cells, tiny_processor.gene_symbols(range(len(means))), means)
    assert all(markers)
    TuningCollator(tiny_processor, captions, text_to_cell_ratio=0.0)(cells, obs)
    for text, genes in zip(texts["answer"], markers, strict=True):
        assert text.endswith(f"{genes[-1]}.")
        assert all(gene in text for gene in genes)
    TuningCollator(tiny_processor, captions, text_to_cell_ratio=1.0)(cells, obs)
    assert len(texts["caption"]) == 24
    assert not any(gene in text.split() for text in texts["caption"] for genes in markers for gene in genes)
