"""Stage 1: align cells and texts with contrastive and matching losses.

```
python -m scmmgpt.train align --config train/configs/align_demo.yaml --corpus results/demo/corpus --output_dir DIR
accelerate launch --num_processes 8 -m scmmgpt.train align --config train/configs/align_base.yaml --corpus ...
```

The checkpoint in `--output_dir` embeds, finds and annotates cells, and `tune` starts from it.
"""

import copy
import functools
import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import PreTrainedTokenizerBase, TrainingArguments

from scmmgpt.configuration_scmmgpt import ScGPTConfig, ScMMGPTConfig
from scmmgpt.feature_extraction_scmmgpt import ScMMGPTFeatureExtractor
from scmmgpt.modeling_scgpt import ScGPTModel
from scmmgpt.modeling_scmmgpt import ScMMGPTForCellTextAlignment, cell_text_similarity
from scmmgpt.processing_scmmgpt import ScMMGPTProcessor
from scmmgpt.train.arguments import AlignConfig, AlignModelArguments, DataArguments
from scmmgpt.train.card import write_card
from scmmgpt.train.convert import make_gene_tokenizer, qformer_from_bert
from scmmgpt.train.corpus_readout import choose_places, fit_corpus_readout, place_labels
from scmmgpt.train.curves import save_curves
from scmmgpt.train.data.captions import CaptionSampler, read_gene_means
from scmmgpt.train.data.collate import AlignmentCollator
from scmmgpt.train.data.corpus import Corpus, first_groups, open_corpus
from scmmgpt.train.data.sharing import push_folder
from scmmgpt.train.initialize import TrainingCells, embed_genes_by_coexpression, standardize_projections
from scmmgpt.train.options import OptionParser
from scmmgpt.train.trainer import ModelLossTrainer, data_seed, freeze, make_datasets, save_run
from scmmgpt.train.unseen import add_gene_texts


logger = logging.getLogger(__name__)


MAX_VALIDATION_CELLS = 2_000  # for annotation and retrieval in an evaluation
CELL_DECODERS = ("cell_model.mvc_decoder", "cell_model.expression_decoder")
UNTRAINED_PARTS = (*CELL_DECODERS, "cell_model.embeddings.flag")  # if `cell_pretraining_weight` is 0
MASK_RATIO = 0.4  # share of hidden genes in the masked-expression loss, as in scGPT's fine-tuning
RECALL_AT = (1, 5, 10)
TEXTS_AT_ONCE = 256


class AlignTrainer(ModelLossTrainer):
    """Trainer of [`ScMMGPTForCellTextAlignment`]; an evaluation adds zero-shot accuracy and retrieval recall."""

    def __init__(self, *args: Any, captions: CaptionSampler, **kwargs: Any) -> None:
        self.captions = captions
        super().__init__(*args, **kwargs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Validation losses and the scores of [`zero_shot`]."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        scores = {f"{metric_key_prefix}_{name}": value for name, value in self.zero_shot().items()}
        self.log(scores)
        return metrics | scores

    @torch.no_grad()
    def zero_shot(self) -> dict[str, float]:
        """Compute zero-shot accuracy, mean recall over cell types, and retrieval recall in both directions.

        The cells are whole batches of the validation split, until there are `MAX_VALIDATION_CELLS`.
        """
        model: Any = self.accelerator.unwrap_model(self.model).eval()
        for name in ("get_cell_features", "get_text_features"):
            if name not in vars(model):  # FSDP gathers weights only for `forward`; without FSDP, no effect
                register_fsdp_forward_method(model, name)
        # All ranks score the same cells, because retrieval among one rank's share of the cells would be easier.
        dataset = self.eval_dataset.of_all_ranks()
        collate: Any = dataset.collate
        feature_pieces, type_pieces, captions = [], [], []
        for cells, obs, _ in first_groups(dataset.source.batches(), MAX_VALIDATION_CELLS):
            inputs = collate.processor(cells=cells).to(self.args.device)
            feature_pieces.append(model.get_cell_features(**inputs))
            type_pieces.append(obs["cell_type"])
            captions += self.captions.caption(obs, cells, collate.gene_symbols)
        features, types = torch.cat(feature_pieces), np.concatenate(type_pieces)

        def similarity_to(texts: list[str]) -> torch.Tensor:
            pieces = [texts[start : start + TEXTS_AT_ONCE] for start in range(0, len(texts), TEXTS_AT_ONCE)]
            inputs = (collate.processor(qformer_text=piece).to(self.args.device) for piece in pieces)
            # Score texts in pieces: the similarity of all queries of all cells to all captions takes half a gigabyte.
            text_features = (model.get_text_features(**piece) for piece in inputs)
            return torch.cat([cell_text_similarity(features, piece).float().cpu() for piece in text_features], dim=1)

        different, own = np.unique(captions, return_inverse=True)
        scores = retrieval_recall(similarity_to(different.tolist()), torch.from_numpy(own))
        known = np.array([bool(name) for name in types])
        names = sorted(set(types[known]))
        if not names:
            return scores
        similarity = similarity_to([self.captions.label_text(name) for name in names])
        predicted = np.array(names)[similarity[torch.from_numpy(known)].argmax(dim=1).numpy()]
        right = predicted == types[known]
        recall = np.mean([right[types[known] == name].mean() for name in names])
        shares = {"zero_shot_accuracy": right.mean(), "zero_shot_recall": recall}
        return {name: round(float(share), 4) for name, share in shares.items()} | scores


def retrieval_recall(similarity: torch.Tensor, own: torch.Tensor) -> dict[str, float]:
    """Recall at k of a cell's own text among all texts, and of the best own cell of a text among all cells.

    `own` is the column of each cell's own text in `similarity` `(num_cells, num_texts)`, int64 `(num_cells,)`; every
    text is the own text of a cell. Ties are misses, so a model with constant features has recall 0.

    >>> similarity = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.4]])
    >>> scores = retrieval_recall(similarity, torch.tensor([0, 1, 1]))
    >>> scores["cell_to_text_recall_at_1"], scores["text_to_cell_recall_at_1"]
    (0.6667, 1.0)
    """
    is_own = torch.nn.functional.one_hot(own, similarity.shape[1]).bool()
    right = similarity.gather(1, own[:, None])
    best = similarity.masked_fill(~is_own, float("-inf")).amax(dim=0)
    ranks = {
        "cell_to_text": ((similarity >= right) & ~is_own).sum(dim=1),
        "text_to_cell": ((similarity >= best) & ~is_own).sum(dim=0),
    }
    return {
        f"{direction}_recall_at_{k}": round((rank < k).float().mean().item(), 4)
        for direction, rank in ranks.items()
        for k in RECALL_AT
    }


def build_processor(
    corpus: TrainingCells, qformer_tokenizer: PreTrainedTokenizerBase, model_args: AlignModelArguments
) -> ScMMGPTProcessor:
    """Build the processor of a stage-1 checkpoint. `tune` replaces the `tokenizer` by the language model's."""
    extractor = ScMMGPTFeatureExtractor(
        max_genes=model_args.max_genes or 1200,
        value_mode=model_args.value_mode,
        selection=model_args.selection,
        pad_token_id=corpus.vocabulary["<pad>"],
        cls_token_id=corpus.vocabulary["<cls>"],
    )
    processor = ScMMGPTProcessor(
        extractor,
        copy.deepcopy(qformer_tokenizer),
        qformer_tokenizer,
        make_gene_tokenizer(corpus.vocabulary),
        num_query_tokens=model_args.model_config.get("num_query_tokens", ScMMGPTConfig.num_query_tokens),
        qformer_max_length=model_args.qformer_max_length,
    )
    processor.gene_aliases = corpus.gene_aliases
    return processor


def build_model(
    corpus: TrainingCells, model_args: AlignModelArguments, **fields: Any
) -> tuple[ScMMGPTForCellTextAlignment, PreTrainedTokenizerBase, set[str]]:
    """Build a stage-1 model for the gene vocabulary of the corpus, with further fields of `ScMMGPTConfig`.

    Return also the tokenizer of the Q-Former, and the names of the pretrained parameters.
    """
    cell_model, cell_config = load_cell_model(corpus, model_args)
    settings = dict(model_args.qformer_config)
    qformer_config, weights, qformer_tokenizer = qformer_from_bert(
        model_args.bert,
        cross_attention_frequency=settings.pop("cross_attention_frequency", 2),
        num_layers=settings.pop("num_hidden_layers", None),
        encoder_hidden_size=cell_config.hidden_size,
    )
    # Dropout of attention weights rules out the fused kernel on a CPU. The cell model has no such dropout either.
    qformer_config.update({"attention_probs_dropout_prob": 0.0} | settings)
    parts: dict[str, Any] = {"cell_config": cell_config, "qformer_config": qformer_config}
    model = ScMMGPTForCellTextAlignment(ScMMGPTConfig(**parts | model_args.model_config | fields))
    weights = {re.sub("^embeddings", "qformer_embeddings", name): value for name, value in weights.items()}
    if cell_model is not None:
        weights |= {f"cell_model.{name}": value for name, value in cell_model.state_dict().items()}
    report = model.load_state_dict(weights, strict=False)
    if report.unexpected_keys:
        raise ValueError(f"These weights have no place in the model: {report.unexpected_keys}.")
    if cell_model is None:
        embed_genes_by_coexpression(model.cell_model, corpus)
    return model, qformer_tokenizer, set(weights)


def load_cell_model(corpus: TrainingCells, model_args: AlignModelArguments) -> tuple[ScGPTModel | None, ScGPTConfig]:
    """Load the given checkpoint of the cell model (`None` for a new one), and the configuration of the cell model."""
    vocabulary = corpus.vocabulary
    if model_args.cell_model is None:
        fields: dict[str, Any] = {"pad_token_id": vocabulary["<pad>"], "cls_token_id": vocabulary["<cls>"]}
        return None, ScGPTConfig(vocab_size=len(vocabulary), **fields | model_args.cell_config)
    cell_model = ScGPTModel.from_pretrained(model_args.cell_model, dtype=torch.float32)
    n_tokens = cell_model.config.vocab_size
    if n_tokens != len(vocabulary):
        raise ValueError(
            f"{model_args.cell_model} has {n_tokens} gene tokens, but the training cells have "
            f"{len(vocabulary)}. Prepare the corpus with `--vocabulary {model_args.cell_model}/vocab.json`."
        )
    return cell_model, cell_model.config


def make_captions(corpus: Corpus, data_args: DataArguments, training_args: TrainingArguments) -> CaptionSampler:
    """Make the sampler of training captions."""
    return CaptionSampler(data_args.templates, seed=data_seed(training_args), gene_means=read_gene_means(corpus.path))


def make_parser(prog: str | None = None) -> OptionParser:
    """The command line."""
    return OptionParser((DataArguments, AlignModelArguments, AlignConfig), prog=prog, description=__doc__)


def main(
    data_args: DataArguments,
    model_args: AlignModelArguments,
    training_args: AlignConfig,
    *,
    cells: Mapping[str, Any] | None = None,
    fit_readout: Callable[..., Any] = fit_corpus_readout,
) -> None:
    """Build the model and its batches, train, save; `cells`: see [`make_datasets`].

    `fit_readout` has the signature of [`fit_corpus_readout`], and fits `model.label_readout`.
    """
    torch.manual_seed(training_args.seed)
    corpus = open_corpus(data_args.corpus)
    model, qformer_tokenizer, pretrained = build_model(corpus, model_args)
    processor = build_processor(corpus, qformer_tokenizer, model_args)
    captions = make_captions(corpus, data_args, training_args)
    fit_readout(model, corpus, seed=data_seed(training_args))
    config = model.config
    collate = AlignmentCollator(
        processor,
        captions,
        mask_ratio=MASK_RATIO if config.cell_pretraining_weight else None,
        mask_value=config.cell_config.mask_value,
        paired=config.contrastive_group_size is not None,
    )
    train_dataset, eval_dataset = make_datasets(corpus, collate, training_args, cells=cells, balance=data_args.balance)
    if model_args.standardize_projections and training_args.resume_from_checkpoint is None:
        standardize_projections(model, train_dataset.of_all_ranks())
    place_labels(model, processor)
    unused: tuple[str, ...] = () if config.cell_pretraining_weight else CELL_DECODERS
    unused = unused if config.matching_weight else (*unused, "matching_head.")
    keep = training_args.pretrained_learning_rate == 0
    freeze(model, lambda name: name.startswith(unused) or (keep and name in pretrained))
    bases: dict[str, Any] = {"cell_model": model_args.cell_model, "text_branch": model_args.bert}
    trainer = AlignTrainer(
        model=model,
        args=training_args,
        processing_class=processor,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        is_pretrained=pretrained.__contains__,
        captions=captions,
        write_card=functools.partial(write_card, command="align", corpus=corpus, **bases),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    if trainer.is_fsdp_enabled:  # `choose_places` calls parts of the model, and FSDP gathers shards for `forward` only
        logger.warning("Under FSDP the weight of the labels' places is not chosen; the initial weight stays.")
    else:
        choose_places(model.eval(), processor, corpus, captions)
    if eval_dataset is not None:
        trainer.evaluate()
    add_gene_texts(model.eval(), processor, model_args.gene_texts)  # needs the trained text encoder
    finish(trainer, "align", data=data_args, model=model_args, training=training_args)


def finish(trainer: Any, command: str, **arguments: Any) -> None:
    """Save the model, its processor and card, state, arguments and curves; push them with `push_to_hub`."""
    trainer.save_model(_internal_call=True)  # the internal call does not push; the push comes last
    trainer.save_state()
    if trainer.is_world_process_zero():
        save_run(trainer.args.output_dir, command, **arguments)
        save_curves(trainer.state.log_history, trainer.args.output_dir)
    trainer.create_model_card()
    if trainer.args.push_to_hub and trainer.is_world_process_zero():
        trainer._finish_current_push()
        push_folder(trainer.args.output_dir, **trainer.hub)
