"""Pre-train the cell model alone, or continue a converted scGPT on your own corpus.

```
python -m scmmgpt.train pretrain --corpus corpus/ --output_dir checkpoints/cell --max_steps 1000
python -m scmmgpt.train pretrain --corpus corpus/ --output_dir checkpoints/cell --cell_model checkpoints/scgpt-human
```

The model predicts the expression of hidden genes with scGPT's three objectives; see
[`ScGPTForPreTraining`]. The choice of hidden genes is hashed from seed, epoch and cell, and does not depend on
batches, workers or ranks. The output folder holds a [`ScGPTModel`], its gene vocabulary and its feature extractor;
`align` takes the folder as `--cell_model`.

scGPT was trained with a dropout of 0.2 on attention weights too. Here this dropout is off, because it rules out fused
attention kernels; `--cell_config '{"attention_dropout": 0.2}'` turns it on.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from scmmgpt.cells_scmmgpt import Cells
from scmmgpt.commands.files import read_json
from scmmgpt.configuration_scmmgpt import ScGPTConfig
from scmmgpt.feature_extraction_scmmgpt import ScMMGPTFeatureExtractor, mask_genes
from scmmgpt.modeling_scgpt import IGNORED_LABEL, ScGPTForPreTraining, ScGPTModel
from scmmgpt.train.arguments import AlignModelArguments, StageArguments
from scmmgpt.train.convert import save_cell_model, scgpt_feature_extractor
from scmmgpt.train.data.corpus import Corpus, open_corpus
from scmmgpt.train.options import CheckedFields, OptionParser, described, option, shared
from scmmgpt.train.trainer import ModelLossTrainer, make_datasets, save_run


@described
@dataclass
class PretrainArguments(CheckedFields):
    """Corpus, model and objectives of pre-training."""

    corpus: str = option("Folder written by `prepare`.")
    cell_model: str | None = option("Checkpoint of the cell model to continue; default: a new cell model.", None)
    cell_config: dict[str, Any] = option(
        "Fields of `ScGPTConfig`, for a new model, or to override the checkpoint's.", {}, fields=ScGPTConfig
    )
    objectives: list[str] = option(
        "Any of masked, gene_prompt, cell_prompt; see `ScGPTForPreTraining`.", list(ScGPTForPreTraining.OBJECTIVES)
    )
    mask_ratios: list[float] = option(
        "Shares of a cell's genes to hide; each cell draws one. scGPT was pre-trained with these.", [0.25, 0.5, 0.75]
    )
    max_genes: int | None = option("Most tokens of a cell, with `<cls>`; default: the checkpoint's, or 1,200.", None)
    token_budget: int | None = option(
        "Most tokens of a training batch of cells of similar length; replaces `per_device_train_batch_size`.", None
    )
    value_mode: Literal["binned", "log1p", "raw"] = shared(AlignModelArguments, "value_mode")
    selection: Literal["random", "top"] = shared(AlignModelArguments, "selection")


@dataclass
class PretrainConfig(StageArguments, TrainingArguments):
    """`TrainingArguments` of pre-training, with scGPT's learning rate for all parameters."""

    pretrained_learning_rate: float | None = field(default=None, init=False)  # no option of this command


def collate_masked(
    extractor: ScMMGPTFeatureExtractor, mask_ratios: list[float], cells: Cells, obs: Any, *, epoch: int = 0
) -> dict[str, torch.Tensor]:
    """Inputs of [`ScGPTForPreTraining`]: tokens, values and `labels`, the values of the hidden genes.

    Each cell draws one of `mask_ratios`, shares of genes to hide. Annotations (`obs`) are not used.
    """
    batch = dict(extractor(cells, epoch=epoch))
    genes = batch["gene_ids"], batch["cell_attention_mask"], cells.cell_ids
    hidden = mask_genes(*genes, mask_ratios, seed=extractor.seed, epoch=epoch)
    batch["labels"] = batch["expression"].masked_fill(~hidden, IGNORED_LABEL)
    return batch


def build_model(corpus: Corpus, arguments: PretrainArguments) -> tuple[ScGPTForPreTraining, ScMMGPTFeatureExtractor]:
    """The model to train and its feature extractor."""
    vocabulary, objectives, checkpoint = corpus.vocabulary, tuple(arguments.objectives), arguments.cell_model
    if checkpoint is None:
        fields: dict[str, Any] = {"pad_token_id": vocabulary["<pad>"], "cls_token_id": vocabulary["<cls>"]}
        fields |= {"vocab_size": len(vocabulary), "use_flag_embedding": "gene_prompt" in objectives}
        config = ScGPTConfig(**fields | arguments.cell_config)
        extractor = scgpt_feature_extractor(config)
        extractor.value_mode, extractor.selection = arguments.value_mode, arguments.selection
        model = ScGPTForPreTraining(config, objectives=objectives)
    else:
        path = Path(checkpoint, "vocab.json")
        if not path.is_file():
            raise FileNotFoundError(
                f"{checkpoint} has no vocab.json. Give a folder that `convert scgpt` or `pretrain` wrote."
            )
        corpus.check_vocabulary(read_json(path, dict), checkpoint)
        fields = {"objectives": objectives, "dtype": torch.float32, **arguments.cell_config}
        model = ScGPTForPreTraining.from_pretrained(checkpoint, **fields)
        extractor = ScMMGPTFeatureExtractor.from_pretrained(checkpoint)
    if arguments.max_genes is not None:
        extractor.max_genes = arguments.max_genes
    return model, extractor


def make_parser(prog: str | None = None) -> OptionParser:
    """The command line."""
    return OptionParser((PretrainArguments, PretrainConfig), prog=prog, description=__doc__)


def main(
    arguments: PretrainArguments, training_args: PretrainConfig, *, cells: Mapping[str, Any] | None = None
) -> None:
    """Build the model and its batches, train, save; `cells`: see [`make_datasets`]."""
    torch.manual_seed(training_args.seed)
    corpus = open_corpus(arguments.corpus)
    model, extractor = build_model(corpus, arguments)
    flag_embedding = model.cell_model.embeddings.flag_embedding
    if "gene_prompt" not in model.objectives and flag_embedding is not None:
        flag_embedding.requires_grad_(False)  # no objective uses it
    collate = functools.partial(collate_masked, extractor, arguments.mask_ratios)
    train_dataset, eval_dataset = make_datasets(
        corpus,
        collate,
        training_args,
        cells=cells,
        columns=[],
        token_budget=arguments.token_budget,
        max_genes=extractor.max_genes,
    )
    trainer = ModelLossTrainer(model, training_args, train_dataset=train_dataset, eval_dataset=eval_dataset)
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    if eval_dataset is not None:
        trainer.evaluate()
    trainer.save_state()
    if trainer.is_world_process_zero():
        cell_model: ScGPTModel = trainer.accelerator.unwrap_model(trainer.model).cell_model
        output_dir = str(training_args.output_dir)
        save_cell_model(output_dir, cell_model, corpus.vocabulary, corpus.gene_aliases, extractor)
        save_run(output_dir, "pretrain", model=arguments, training=training_args)
