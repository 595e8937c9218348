"""Names that a question may use for types: labels, broader types, kinds of labels, and everyday names."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from scmmgpt.genes_scmmgpt import GeneIndex
from scmmgpt.labels_scmmgpt import EVERYDAY, TISSUE_WORDS, normalize_label


Term = Mapping[str, Any]
SHORTEST_NAME = 3  # letters of a name without "cell": "epithelial" for "epithelial cell", never "d" for "D cell"


def simple(words: str) -> str:
    """Convert words to normalised lower case and the singular, so that spellings compare equal."""
    return " ".join(word.removesuffix("s") for word in normalize_label(words).split())


def names_of_types(
    names: Collection[str], terms: Sequence[Term], stored: Mapping[str, Any], gene_index: GeneIndex
) -> tuple[dict[str, str], dict[str, str]]:
    """The names of types in questions, and the types that the checkpoint does not tell from a label.

    Args:
        names: Labels of the file and of the checkpoint, and names of `terms`.
        terms: Terms above some labels.
        stored: `config.annotation`; `kinds` and `profiles` may be missing.
        gene_index: Genes of the model. A name of one word that is a gene ("VIP") means the gene.

    Returns:
        Simplified name -> type; and kind -> the label that the kind is counted as, such as "Kupffer cell" ->
        "macrophage".
    """
    profiles, kinds = stored.get("profiles", []), stored.get("kinds", [])
    stands_for = {str(kind["name"]): kind["labels"][0] for kind in kinds if kind["name"] not in names}
    types: dict[str, str] = {}
    for kind in kinds:
        types |= {simple(word): kind["name"] for word in kind["names"] if _is_name(word, gene_index)}
    for known in (*profiles, *terms):
        types |= {simple(word): known["name"] for word in known["names"] if len(word) > 1}
    types |= {simple(name): name for name in (*(known["name"] for known in profiles), *names)}
    for word, kind in list(types.items()):
        short = word.removesuffix(" cell")
        is_clear = len(short) >= SHORTEST_NAME and short not in TISSUE_WORDS and kind not in stands_for
        if is_clear and gene_index.lookup(short.upper())[0] < 0:
            types.setdefault(short, kind)
    for word, name in EVERYDAY.items():
        kind = types.get(simple(name))
        if kind is None:
            continue
        if kind in [known["name"] for known in profiles]:  # a platelet is no kind of megakaryocyte
            stands_for[word] = kind
        types[simple(word)] = word if word in stands_for else kind
    return types, stands_for


def broader_types(terms: Sequence[Term], stored: Mapping[str, Any]) -> dict[str, set[str]]:
    """Profiled type -> names of the terms above the type; no label of such a term is the type."""
    name_of = {term["id"]: term["name"] for term in terms}
    return {
        known["name"]: {name_of[number] for number in known.get("above", []) if number in name_of}
        for known in stored.get("profiles", [])
    }


def _is_name(word: str, gene_index: GeneIndex) -> bool:
    """Whether a name of a kind can stand in a question: several words, or a word that is no gene."""
    return " " in word or (len(word) >= SHORTEST_NAME and gene_index.lookup(word.upper())[0] < 0)
