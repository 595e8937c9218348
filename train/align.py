"""Stage 1: align cells and texts, by contrast and matching.

```
python -m scmmgpt.train align --config train/configs/align_demo.yaml --corpus results/demo/corpus --output_dir DIR
accelerate launch --num_processes 8 -m scmmgpt.train align --config train/configs/align_base.yaml --corpus ...
```

The checkpoint in `--output_dir` embeds, finds and annotates cells, and is what `tune` starts from.
"""

import copy
import functools

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast
from trl import TrlParser

from scmmgpt.configuration_scmmgpt import ScGPTConfig, ScMMGPTConfig
from scmmgpt.feature_extraction_scmmgpt import ScMMGPTFeatureExtractor
from scmmgpt.modeling_scgpt import ScGPTModel
from scmmgpt.modeling_scmmgpt import ScMMGPTForCellTextAlignment, cell_text_similarity
from scmmgpt.processing_scmmgpt import ScMMGPTProcessor
from scmmgpt.train.arguments import AlignConfig, AlignModelArguments, DataArguments
from scmmgpt.train.card import write_card
from scmmgpt.train.convert import qformer_from_bert
from scmmgpt.train.data.batches import BatchDataset
from scmmgpt.train.data.captions import CaptionSampler, read_gene_means
from scmmgpt.train.data.collate import AlignmentCollator
from scmmgpt.train.data.corpus import Corpus, open_corpus
from scmmgpt.train.initialize import PROJECTION_CELLS, embed_genes_by_coexpression, embed_genes_by_name, standardize
from scmmgpt.train.trainer import ModelLossTrainer, data_seed, freeze, make_datasets, save_curves, save_run


MAX_VALIDATION_CELLS = 2_000  # cells that are annotated and retrieved while training, at most
RECALL_AT = (1, 5, 10)
TEXTS_AT_ONCE = 256


class AlignTrainer(ModelLossTrainer):
    """Trainer of [`ScMMGPTForCellTextAlignment`]; `evaluate` adds zero-shot accuracy and retrieval recall."""

    def __init__(self, *args, captions: CaptionSampler, **kwargs):
        self.captions = captions
        super().__init__(*args, **kwargs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Validation losses, and what [`zero_shot`] measures."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        scores = self.zero_shot()
        self.log({f"{metric_key_prefix}_{name}": value for name, value in scores.items()})
        return {**metrics, **{f"{metric_key_prefix}_{name}": value for name, value in scores.items()}}

    @torch.no_grad()
    def zero_shot(self) -> dict[str, float]:
        """Zero-shot accuracy and mean recall per type over all types of the validation split; retrieval recall.

        Retrieval is among the captions and the cells of the split, of at most `MAX_VALIDATION_CELLS` cells.
        """
        model = self.accelerator.unwrap_model(self.model).eval()
        # All ranks measure the same cells: among a share of them each would find more.
        dataset, features, types, captions = self.eval_dataset.of_all_ranks(), [], [], []
        collate = dataset.collate
        for cells, obs, _ in dataset.source.batches():
            inputs = collate.processor(cells=cells, max_genes=collate.max_genes).to(self.args.device)
            features.append(model.get_cell_features(**inputs))
            types.append(obs["cell_type"])
            captions += self.captions.caption(obs, cells, collate.gene_symbols)
            if sum(map(len, types)) >= MAX_VALIDATION_CELLS:
                break
        features, types = torch.cat(features), np.concatenate(types)

        def similarity_to(texts: list[str]) -> torch.Tensor:
            pieces = [texts[start : start + TEXTS_AT_ONCE] for start in range(0, len(texts), TEXTS_AT_ONCE)]
            inputs = (collate.processor(qformer_text=piece).to(self.args.device) for piece in pieces)
            # Piece by piece: every query of every cell against every caption at once would take half a gigabyte.
            text_features = (model.get_text_features(**piece) for piece in inputs)
            return torch.cat([cell_text_similarity(features, piece).float().cpu() for piece in text_features], dim=1)

        captions, own = np.unique(captions, return_inverse=True)
        scores = retrieval_recall(similarity_to(captions.tolist()), torch.from_numpy(own))
        known = np.array([bool(name) for name in types])
        names = sorted(set(types[known]))
        if not names:
            return scores
        similarity = similarity_to([self.captions.label_text(name) for name in names])
        predicted = np.array(names)[similarity[torch.from_numpy(known)].argmax(dim=1).numpy()]
        right = predicted == types[known]
        recall = np.mean([right[types[known] == name].mean() for name in names])
        accuracy = {"zero_shot_accuracy": round(float(right.mean()), 4), "zero_shot_recall": round(float(recall), 4)}
        return {**accuracy, **scores}


def retrieval_recall(similarity: torch.Tensor, own: torch.Tensor) -> dict[str, float]:
    """How often the right text is among the k most similar to a cell, and a right cell among those to a text.

    Ties count as misses: a model to which all is the same retrieves nothing.

    Args:
        similarity: `(num_cells, num_texts)`.
        own: `(num_cells,)` int64: the text of each cell; every text has a cell.

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


def gene_tokenizer_of(vocabulary: dict[str, int]) -> PreTrainedTokenizerFast:
    """The gene vocabulary as an ordinary word-level tokenizer: `<pad>` for what it does not know, as scGPT has it."""
    from tokenizers import Tokenizer, models

    backend = Tokenizer(models.WordLevel(dict(vocabulary), unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<pad>", pad_token="<pad>", cls_token="<cls>")


def build_processor(corpus: Corpus, qformer_tokenizer, model_args: AlignModelArguments, max_genes: int | None):
    """The processor of a stage-1 checkpoint; its `tokenizer` stands in until `tune` brings the language model's."""
    extractor = ScMMGPTFeatureExtractor(
        max_genes=max_genes or 1200,
        value_mode=model_args.value_mode,
        selection=model_args.selection,
        pad_token_id=corpus.vocabulary["<pad>"],
        cls_token_id=corpus.vocabulary["<cls>"],
    )
    processor = ScMMGPTProcessor(
        extractor,
        copy.deepcopy(qformer_tokenizer),
        qformer_tokenizer,
        gene_tokenizer_of(corpus.vocabulary),
        num_query_tokens=model_args.num_query_tokens,
        qformer_max_length=model_args.qformer_max_length,
    )
    processor.gene_aliases = corpus.gene_aliases
    return processor


def build_model(corpus: Corpus, model_args: AlignModelArguments, **objective):
    """A stage-1 model and the tokenizer of its text branch.

    Args:
        corpus: Its gene vocabulary is the model's.
        model_args: Where the parts come from.
        objective: Weights of the losses and the like, fields of `ScMMGPTConfig`.

    Returns:
        Model, Q-Former tokenizer, and the names of the parameters that come pretrained.
    """
    vocabulary = corpus.vocabulary
    cell_model = None
    if model_args.cell_model is not None:
        cell_model = ScGPTModel.from_pretrained(model_args.cell_model)
        cell_config = cell_model.config
        if cell_config.vocab_size != len(vocabulary):
            raise ValueError(
                f"{model_args.cell_model} has {cell_config.vocab_size} gene tokens, but the corpus {corpus.path} has "
                f"{len(vocabulary)}. Prepare the corpus with `--vocabulary {model_args.cell_model}/vocab.json`."
            )
    else:
        cell_config = ScGPTConfig(
            vocab_size=len(vocabulary),
            pad_token_id=vocabulary["<pad>"],
            cls_token_id=vocabulary["<cls>"],
            **model_args.cell_config,
        )
    qformer_config, qformer_weights, qformer_tokenizer = qformer_from_bert(
        model_args.bert,
        cross_attention_frequency=model_args.cross_attention_frequency,
        num_layers=model_args.bert_layers,
        encoder_hidden_size=cell_config.hidden_size,
    )
    # Attention weights are not dropped, as in the cell model: on a CPU that rules out the fused kernel.
    qformer_config.attention_probs_dropout_prob = 0.0
    if model_args.qformer_dropout is not None:
        qformer_config.hidden_dropout_prob = model_args.qformer_dropout
    config = ScMMGPTConfig(
        cell_config=cell_config,
        qformer_config=qformer_config,
        num_query_tokens=model_args.num_query_tokens,
        projection_dim=model_args.projection_dim,
        text_pooling=model_args.text_pooling,
        **objective,
    )
    model = ScMMGPTForCellTextAlignment(config)

    if model_args.bert_weights == "random":
        qformer_weights = {}
    weights = {
        name.replace("embeddings.", "qformer_embeddings.", 1) if name.startswith("embeddings.") else name: value
        for name, value in qformer_weights.items()
    }
    if cell_model is not None:
        weights.update({f"cell_model.{name}": value for name, value in cell_model.state_dict().items()})
    report = model.load_state_dict(weights, strict=False)
    if report.unexpected_keys:
        raise ValueError(f"These weights have no place in the model: {report.unexpected_keys}.")
    if cell_model is None and model_args.gene_embeddings == "svd":
        embed_genes_by_coexpression(model.cell_model, corpus)
    elif cell_model is None and model_args.gene_embeddings == "text":
        embed_genes_by_name(model, qformer_tokenizer, vocabulary)
    return model, qformer_tokenizer, set(weights)


@torch.no_grad()
def standardize_projections(model: ScMMGPTForCellTextAlignment, dataset: BatchDataset) -> None:
    """Start both projections into the shared space from what they will read; see [`standardize`]."""
    model.eval()
    query_states, text_states = [], []
    for batch in dataset:
        cell_states = model.encode_cells(batch["gene_ids"], batch["expression"], batch["cell_attention_mask"])
        query_states.append(model.query_cells(cell_states, batch["cell_attention_mask"]))
        text_states.append(model.read_texts(batch["qformer_input_ids"], batch["qformer_attention_mask"]))
        if sum(map(len, text_states)) >= PROJECTION_CELLS:
            break
    query_states = torch.cat(query_states)
    model.query_means.copy_(query_states.mean(dim=0, keepdim=True))
    standardize(model.cell_projection, (query_states - model.query_means).flatten(0, 1))
    standardize(model.text_projection, torch.cat(text_states))
    model.train()


def make_parser(prog: str | None = None) -> TrlParser:
    """The command line."""
    return TrlParser((DataArguments, AlignModelArguments, AlignConfig), prog=prog, description=__doc__)


def main(data_args: DataArguments, model_args: AlignModelArguments, training_args: AlignConfig) -> None:
    """Build, train, save."""
    # --- Corpus and model
    torch.manual_seed(training_args.seed)
    corpus = open_corpus(data_args.corpus)
    objective = (
        "contrastive_weight matching_weight captioning_weight cell_pretraining_weight matching_batch_size "
        "contrastive_group_size"
    ).split()
    model, qformer_tokenizer, pretrained = build_model(
        corpus, model_args, **{name: getattr(training_args, name) for name in objective}
    )
    processor = build_processor(corpus, qformer_tokenizer, model_args, data_args.max_genes)

    # --- Batches
    captions = CaptionSampler(
        data_args.templates, seed=data_seed(training_args), gene_means=read_gene_means(corpus.path)
    )
    mask_ratio = training_args.mask_ratio if training_args.cell_pretraining_weight else None
    collate = AlignmentCollator(
        processor,
        captions,
        mask_ratio=mask_ratio,
        mask_value=model.config.cell_config.mask_value,
        max_genes=data_args.max_genes,
        paired=training_args.contrastive_group_size is not None,
    )
    train_dataset, eval_dataset = make_datasets(
        corpus, collate, training_args, balance=data_args.balance, temperature=data_args.balance_temperature
    )

    if model_args.standardize_projections and training_args.resume_from_checkpoint is None:
        standardize_projections(model, train_dataset.of_all_ranks())

    # --- Training
    unused = ["cell_model.mvc_decoder.", "cell_model.expression_decoder."]
    if training_args.cell_pretraining_weight:
        unused = []
    if not training_args.matching_weight:
        unused.append("matching_head.")
    frozen = pretrained if training_args.pretrained_learning_rate == 0 else set()
    freeze(model, lambda name: name.startswith(tuple(unused)) or name in frozen)
    bases = {"cell_model": model_args.cell_model, "text_branch": model_args.bert}
    trainer = AlignTrainer(
        model=model,
        args=training_args,
        processing_class=processor,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        is_pretrained=pretrained.__contains__,
        captions=captions,
        write_card=functools.partial(write_card, training_args.output_dir, "align", corpus, **bases),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    if eval_dataset is not None:
        trainer.evaluate()
    finish(trainer, "align", data=data_args, model=model_args, training=training_args)


def finish(trainer, command: str, **arguments) -> None:
    """Save the model, its processor and card, the state, the arguments and the curves; push them if that was asked."""
    trainer.save_model(_internal_call=True)  # the push comes last, when everything is there
    trainer.save_state()
    if trainer.is_world_process_zero():
        save_run(trainer.args.output_dir, command, **arguments)
        save_curves(trainer.state.log_history, trainer.args.output_dir)
    trainer.create_model_card()
    if trainer.args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
