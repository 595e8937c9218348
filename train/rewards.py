"""Rewards for the verifiable parts of a description of a cell: the cell type and the genes that the text names.

[`score_type`] and [`score_genes`] score one text. [`reward_functions`] wraps them for TRL's `GRPOTrainer`.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeAlias

from scmmgpt.genes_scmmgpt import GeneIndex
from scmmgpt.train.data import ontology
from scmmgpt.train.data.captions import UNINFORMATIVE_GENES, parse_cell_type
from scmmgpt.unseen_scmmgpt import WORD, is_denied, named_genes


Completion: TypeAlias = str | list[dict[str, str]]  # a text, or the messages of an answer
RewardFunction: TypeAlias = Callable[..., list[float | None]]


def score_type(text: str, cell_type: str | None, term_id: str | None = None) -> float | None:
    """Score the first cell type that a text names, by [`ontology.depth_share`]; `None` without annotation.

    The score is 1 for the annotated type, less for a broader type, 0 for any other type or none. If the annotation is
    not in the Cell Ontology, only its own name scores. An annotation without an id is looked up by name.

    >>> score_type("This cell is a B cell.", "B cell"), score_type("This cell is a T cell.", "B cell")
    (1.0, 0.0)
    """
    truth = ontology.resolve("cell_type", cell_type, term_id)
    if truth.name is None:
        return None
    types = ontology.cell_types()
    named = parse_cell_type(text, types)
    if truth.term_id is not None and named is not None:
        return ontology.depth_share(types[named], truth.term_id)
    return float(named is None and parse_cell_type(text, {truth.name: truth.term_id}) is not None)


def score_genes(mentions: Sequence[tuple[int, int]], expressed: Collection[int]) -> float:
    """Share of the [`genes_in_text`] that are true of its cell and not repeated; 0 without mentions.

    - A gene that the text denies ("CD25-negative") is true if the cell does not express the gene.
    - A repeated mention counts as false, so that a model does not repeat a safe gene.

    `expressed` has the vocabulary ids of the genes with a count above zero.

    >>> index = GeneIndex({"CD19": 3, "LYZ": 4}, {})
    >>> score_genes(genes_in_text("A B cell with high levels of CD19 and LYZ.", index), {3})
    0.5
    """
    true = {gene for gene, sign in mentions if (gene in expressed) == (sign > 0)}
    return len(true) / max(len(mentions), 1)


def genes_in_text(text: str, gene_index: GeneIndex) -> list[tuple[int, int]]:
    """Find the gene mentions of a text: `(vocabulary id, sign)`, sign -1 if the text denies the gene.

    Genes in the name of the cell type, such as CD14 in "CD14-positive monocyte", and genes that are not specific to
    types (mitochondrial and ribosomal genes, MALAT1, ...) are left out.
    """
    mentions = []
    for match in WORD.finditer(text):
        word = match.group()
        genes = list(named_genes(word, gene_index))
        if not genes and len(word) > 2 and word.isupper():  # symbols without a digit, such as LYZ
            genes = [gene_index.vocabulary[word]] if word in gene_index.vocabulary else []
        mentions += [(gene, -1 if is_denied(text, match) else 1) for gene in genes]
    if not mentions:
        return []
    left_out = set(named_genes(parse_cell_type(text, ontology.cell_types()) or "", gene_index))
    named = {gene for gene, _ in mentions}
    left_out |= {i for name, i in gene_index.vocabulary.items() if i in named and UNINFORMATIVE_GENES.match(name)}
    return [mention for mention in mentions if mention[0] not in left_out]


def text_of(completion: Completion) -> str:
    """Text of a completion of TRL; a prompt of messages has a completion of messages."""
    return completion if isinstance(completion, str) else "\n".join(message["content"] for message in completion)


def reward_functions(names: Sequence[str], gene_index: GeneIndex) -> list[RewardFunction]:
    """Make reward functions: completions and columns of the dataset -> a reward for each completion.

    `cell_type` needs the columns `cell_type` and `cell_type_ontology_term_id`; `genes` needs the column
    `expressed_genes` (vocabulary ids), which `CellGRPOTrainer` adds.
    """

    def cell_type(
        completions: Sequence[Completion],
        cell_type: Sequence[str | None] | None = None,
        cell_type_ontology_term_id: Sequence[str | None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        if cell_type is None:
            raise ValueError("The reward cell_type needs a column 'cell_type' in the dataset; leave it out otherwise.")
        ids = [None] * len(completions) if cell_type_ontology_term_id is None else cell_type_ontology_term_id
        rows = zip(completions, cell_type, ids, strict=True)
        return [score_type(text_of(completion), name, term_id) for completion, name, term_id in rows]

    def genes(
        completions: Sequence[Completion], expressed_genes: Sequence[Collection[int]], **columns: Any
    ) -> list[float | None]:
        mentions = (genes_in_text(text_of(completion), gene_index) for completion in completions)
        return [score_genes(*row) for row in zip(mentions, expressed_genes, strict=True)]

    functions: dict[str, RewardFunction] = {"cell_type": cell_type, "genes": genes}
    return [functions[name] for name in names]
