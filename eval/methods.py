"""Published methods, rebuilt from parts of this package and trained on the same corpus, without their code or weights.

* *Cell2Sentence-style* (Levine et al. 2024): a cell is a sentence of its gene names by descending expression. The
  language model of `tune` learns to describe sentences, and to write the sentence of a description.
* *LangCell-style* (Zhao et al. 2024): the same cell model and text encoder are trained with contrastive and matching
  losses. A cell gets the class with the best-matching name. No readout, no generation. `eval/all.py` trains this
  method by `align`.
* *GenePT-style* (Chen & Zou 2024): a cell is the expression-weighted mean of the embeddings of texts about its genes.
  Only a linear head is trained.
* *scVI-style* (Lopez et al. 2018): a variational autoencoder of counts with the type as covariate, if scvi-tools is
  installed; cells of a type are drawn from the prior.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from datasets import Dataset
from peft import LoraConfig
from scipy import sparse
from sklearn.linear_model import RidgeClassifierCV
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState
from trl import SFTConfig, SFTTrainer

from scmmgpt.cells_scmmgpt import hash_names, log1p_cp10k
from scmmgpt.commands.files import write_json
from scmmgpt.eval import baselines
from scmmgpt.eval.baselines import TypePrediction
from scmmgpt.eval.cells import LabelledCells
from scmmgpt.eval.metrics.text_discrepancy.text_discrepancy import embed_texts
from scmmgpt.train.arguments import TuneConfig, TuneModelArguments
from scmmgpt.train.data.captions import CaptionSampler
from scmmgpt.train.data.gene_tables import load_gene_texts, load_hgnc
from scmmgpt.train.language_model import load_causal_lm, new_language_model


SENTENCE_GENES = 100  # genes of a cell sentence, as in the first published models
VARIANTS = 4  # texts of each cell in training
WARMUP = 0.05  # share of the time in which the learning rate rises
MAX_GENE_TEXTS = 4000  # most expressed genes whose texts are embedded; more texts take minutes
DESCRIBE = "Describe the cell that expresses these genes, the highest first: {}"
WRITE = f"Write the {SENTENCE_GENES} genes that this cell expresses most, the highest first: {{}}"


@dataclass(frozen=True)
class CellSentences:
    """Converts cells to sentences of gene names, and sentences to expression.

    Expression falls about linearly with the logarithm of the rank. The line is fitted to training cells.
    """

    genes: np.ndarray  # symbols, `(n_genes,)`
    intercept: float
    slope: float

    @classmethod
    def fit(cls, train: LabelledCells) -> "CellSentences":
        """Fit the line of log1p(CP10k) over log10(1 + rank)."""
        values, ranks = [], []
        expression = train.expression
        for start, stop in zip(expression.indptr[:-1], expression.indptr[1:], strict=True):
            highest = -np.sort(-expression.data[start:stop])[:SENTENCE_GENES]
            values.append(highest)
            ranks.append(np.arange(len(highest)))
        slope, intercept = np.polyfit(np.log10(1 + np.concatenate(ranks)), np.concatenate(values), 1)
        return cls(train.genes, float(intercept), float(slope))

    def write(self, cells: LabelledCells, *, seed: int = 0) -> list[str]:
        """Write the names of the `SENTENCE_GENES` highest genes of each cell; equal counts are in random order."""
        rng = np.random.default_rng(seed)
        sentences = []
        for start, stop in zip(cells.counts.indptr[:-1], cells.counts.indptr[1:], strict=True):
            order = np.lexsort((rng.random(stop - start), -cells.counts.data[start:stop]))[:SENTENCE_GENES]
            sentences.append(" ".join(cells.genes[cells.counts.indices[start:stop][order]]))
        return sentences

    def read(self, sentences: Sequence[str]) -> np.ndarray:
        """Convert sentences to log1p(CP10k) by the ranks of the genes, float32 `(n_sentences, n_genes)`.

        Words that are not genes are skipped. A repeated gene gets its mean rank. Genes that are not named are 0.
        """
        place = {gene: i for i, gene in enumerate(self.genes)}
        result = np.zeros((len(sentences), len(self.genes)), dtype=np.float32)
        for row, sentence in enumerate(sentences):
            genes = np.array([place[word] for word in sentence.split() if word in place], dtype=np.int64)
            if len(genes):
                named, where, times = np.unique(genes, return_inverse=True, return_counts=True)
                ranks = np.bincount(where, weights=np.arange(len(genes))) / times
                result[row, named] = np.maximum(self.intercept + self.slope * np.log10(1 + ranks), 0)
        return result


class TimedTrainer(SFTTrainer):
    """Trains for a number of CPU seconds; the learning rate rises and then falls to 0 as a function of the time."""

    def __init__(self, *args: Any, seconds: float, **kwargs: Any) -> None:
        self.seconds, self.start = seconds, time.process_time()
        super().__init__(*args, **kwargs)
        self.add_callback(TimeLimit(self))

    @property
    def share(self) -> float:
        """Used share of the time."""
        return (time.process_time() - self.start) / self.seconds

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """Make a schedule that depends on the used time instead of the step."""

        def factor(step: int) -> float:
            return min(max(self.share, 0.01) / WARMUP, max(1 - self.share, 0.0))

        of: Any = self.optimizer if optimizer is None else optimizer
        self.lr_scheduler = LambdaLR(of, factor)
        return self.lr_scheduler


class TimeLimit(TrainerCallback):
    """Stops the training when its time is used."""

    def __init__(self, trainer: TimedTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check the time after each step."""
        control.should_training_stop = control.should_training_stop or self.trainer.share >= 1


@dataclass(frozen=True)
class CellSentenceModel:
    """A language model that reads and writes cell sentences."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sentences: CellSentences

    def describe(self, cells: LabelledCells, *, max_new_tokens: int, seed: int = 0) -> list[str]:
        """Describe each cell by greedy decoding."""
        prompts = [DESCRIBE.format(sentence) for sentence in self.sentences.write(cells, seed=seed)]
        return self._complete(prompts, max_new_tokens=max_new_tokens, do_sample=False)

    def generate(self, prompts: Sequence[str], *, max_new_tokens: int, seed: int = 0) -> np.ndarray:
        """Sample a sentence for each prompt, and return its log1p(CP10k), float32 `(n_prompts, n_genes)`."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            words = [WRITE.format(prompt) for prompt in prompts]
            return self.sentences.read(self._complete(words, max_new_tokens=max_new_tokens, do_sample=True))

    @torch.inference_mode()
    def _complete(self, prompts: Sequence[str], **options: Any) -> list[str]:
        model: Any = self.model.eval()
        self.tokenizer.padding_side, texts = "left", []
        for start in range(0, len(prompts), 32):
            talks = [[{"role": "user", "content": prompt}] for prompt in prompts[start : start + 32]]
            inputs: Any = self.tokenizer.apply_chat_template(
                talks, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
            )
            inputs = inputs.to(model.device)
            ids = model.generate(**inputs, **options, top_k=0, pad_token_id=self.tokenizer.pad_token_id)
            answers = ids[:, inputs["input_ids"].shape[1] :]
            texts += [text.strip() for text in self.tokenizer.batch_decode(answers, skip_special_tokens=True)]
        return texts


def alternate(
    first: list[tuple[str, str]], second: list[tuple[str, str]], size: int, *, seed: int = 0
) -> list[tuple[str, str]]:
    """Shuffle both lists, and alternate between them: `size` rows of the first, `size` rows of the second, and so on.

    >>> alternate([("a", "1")] * 5, [("b", "2")] * 5, 2)[:5]
    [('a', '1'), ('a', '1'), ('b', '2'), ('b', '2'), ('a', '1')]
    """
    rng = np.random.default_rng(seed)
    mixed = [[rows[i] for i in rng.permutation(len(rows))] for rows in (first, second)]
    starts = range(0, max(len(first) - size, 0) + 1, size)
    return [row for start in starts for rows in mixed for row in rows[start : start + size]]


def train_cell2sentence(
    train: LabelledCells,
    captions: CaptionSampler,
    model_args: TuneModelArguments,
    training_args: TuneConfig,
    output: Path,
    *,
    seconds: float,
) -> None:
    """Train the language model of `tune` on both directions in turn, for some CPU seconds, and save it in `output`.

    A batch has one direction, because the few tokens of descriptions would hardly count among those of sentences.
    """
    sentences, ids = CellSentences.fit(train), hash_names(train.names)
    described: list[tuple[str, str]] = []
    wanted: list[tuple[str, str]] = []
    for variant in range(VARIANTS):
        written = sentences.write(train, seed=variant)
        answers = captions.answer(train.obs, cell_ids=ids, epoch=variant)
        prompts = captions.caption(train.obs, cell_ids=ids, epoch=variant)
        described += [(DESCRIBE.format(sentence), answer) for sentence, answer in zip(written, answers, strict=True)]
        wanted += [(WRITE.format(prompt), sentence) for prompt, sentence in zip(prompts, written, strict=True)]
    rows = alternate(described, wanted, training_args.per_device_train_batch_size, seed=training_args.seed)
    if model_args.language_model == "scratch":
        model, tokenizer = new_language_model(
            [text for pair in rows for text in pair], model_args.language_model_config
        )
    else:
        model, tokenizer = load_causal_lm(model_args.language_model, dtype=torch.float32)
    lora = None
    if model_args.trained.language_model == "lora":
        lora = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **model_args.lora_config)
    talks = [
        {"prompt": [{"role": "user", "content": prompt}], "completion": [{"role": "assistant", "content": answer}]}
        for prompt, answer in rows
    ]
    settings = SFTConfig(
        output_dir=str(output),
        per_device_train_batch_size=training_args.per_device_train_batch_size,
        learning_rate=training_args.learning_rate,
        weight_decay=training_args.weight_decay,
        num_train_epochs=10_000,
        train_sampling_strategy="sequential",  # the rows alternate between both directions
        seed=training_args.seed,
        max_length=None,
        bf16=training_args.bf16,
        use_cpu=training_args.use_cpu,
        gradient_checkpointing=False,
        save_strategy="no",
        logging_steps=50,
        report_to="none",
        disable_tqdm=True,
    )
    data = Dataset.from_list(talks)
    trainer = TimedTrainer(
        model, args=settings, train_dataset=data, processing_class=tokenizer, peft_config=lora, seconds=seconds
    )
    trainer.train()
    trained: Any = trainer.model
    trained = trained if lora is None else trained.merge_and_unload()
    trained.save_pretrained(output)
    tokenizer.save_pretrained(output)
    state = {"steps": trainer.state.global_step, "intercept": sentences.intercept, "slope": sentences.slope}
    write_json(output / "sentences.json", state)


def load_cell2sentence(folder: Path, train: LabelledCells) -> CellSentenceModel:
    """Load the model that [`train_cell2sentence`] saved; `train` must be its training cells."""
    model, tokenizer = load_causal_lm(str(folder), dtype=torch.float32)
    return CellSentenceModel(model, tokenizer, CellSentences.fit(train))


def setup_scvi(train: LabelledCells) -> AnnData:
    """Set up the training cells for scVI, with the cell type as the batch covariate."""
    import scvi

    adata = AnnData(train.counts, obs=pd.DataFrame({"type": train.labels}, index=train.names))
    scvi.model.SCVI.setup_anndata(adata, batch_key="type")
    return adata


def train_scvi(train: LabelledCells, folder: Path, *, seconds: float, seed: int = 0) -> None:
    """Train scVI for its default number of epochs, but at most `seconds` of CPU time, and save the model."""
    import lightning
    import scvi

    end = time.process_time() + seconds

    def stop_in_time(trainer: Any, *args: Any) -> None:
        trainer.should_stop = trainer.should_stop or time.process_time() >= end

    scvi.settings.seed = seed
    model = scvi.model.SCVI(setup_scvi(train), gene_likelihood="nb")
    until = lightning.pytorch.callbacks.LambdaCallback(on_train_batch_end=stop_in_time)
    quiet = {"enable_progress_bar": False, "logger": False, "enable_checkpointing": False}
    model.train(accelerator="cpu", train_size=1.0, callbacks=[until], **quiet)
    model.save(str(folder), overwrite=True)


@torch.inference_mode()
def scvi_cells(prompts: np.ndarray, train: LabelledCells, folder: Path, *, seed: int = 0) -> np.ndarray:
    """Draw a cell for each prompted type; return log1p(CP10k), float32 `(n_cells, n_genes)`.

    Library sizes come from random training cells of the type: scVI gets the size over its own genes, and the cell is
    normalised by the size over all genes.
    """
    import scvi

    model = scvi.model.SCVI.load(str(folder), adata=setup_scvi(train), accelerator="cpu")
    names = model.adata_manager.get_state_registry("batch").categorical_mapping.astype(str)
    rows = baselines.sample_rows(prompts, train.labels, seed=seed)
    sizes = np.asarray(train.counts[rows].sum(axis=1)).ravel()
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(len(prompts), model.module.n_latent, generator=generator)
    codes = torch.from_numpy(np.array([list(names).index(name) for name in prompts]))[:, None]
    library = torch.from_numpy(np.log(sizes)).float()[:, None]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        counts = model.module.eval().generative(z=points, library=library, batch_index=codes)["px"].sample()
    return log1p_cp10k(counts.numpy(), train.total_counts[rows])


def embed_by_genes(cells: Sequence[LabelledCells], gene_texts: str | Path | None) -> list[np.ndarray]:
    """Embed cells as GenePT does, unit length `(n_cells, 384)`.

    The first of `cells` are the training cells, whose most expressed genes are used. `gene_texts` is a table of
    summaries, as for `align`; default: approved names of the genes.
    """
    if gene_texts is None:
        texts = {record.symbol: f"{record.symbol}: {record.name}" for record in load_hgnc() if record.name}
    else:
        texts = load_gene_texts(gene_texts)[0]
    train = cells[0]
    highest = train.genes[np.argsort(-np.asarray(train.expression.mean(axis=0)).ravel(), kind="stable")]
    genes = np.array([gene for gene in highest if gene in texts][:MAX_GENE_TEXTS])
    if not len(genes):
        raise ValueError("None of the genes of the training cells has a text. Name a table of other genes.")
    embedded = embed_texts([texts[gene] for gene in genes])
    sums = [of.select_genes(genes).expression @ embedded for of in cells]
    return [of / np.maximum(np.linalg.norm(of, axis=1, keepdims=True), 1e-12) for of in sums]


def ridge(train: baselines.Matrix, labels: np.ndarray, test: baselines.Matrix) -> TypePrediction:
    """Classify cells by balanced ridge regression; the penalty is chosen by leave-one-out cross-validation."""
    x, y = (np.asarray(m.toarray() if isinstance(m, sparse.csr_matrix) else m) for m in (train, test))
    model = RidgeClassifierCV(alphas=np.logspace(0, 5, 11), class_weight="balanced").fit(x, labels)
    return TypePrediction(model.predict(y), choices={"alpha": float(model.alpha_)})
