"""What a question about cells asks: its topic, and the genes, types, columns and values that it names.

Words decide the topic. The text encoder of a checkpoint, which knows captions, chooses worse (`train/LOG.md`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from scmmgpt.genes_scmmgpt import GeneIndex
from scmmgpt.labels_scmmgpt import normalize_label
from scmmgpt.unseen_scmmgpt import ANTIGENS, GENE_WORD


# Topic -> patterns of the words that ask for it; a dot is a space. The first topic with a match wins.
TOPICS = {
    topic: re.compile("|".join(words.split()), re.IGNORECASE)
    for topic, words in {
        "state": r"""\bcycl divid prolif mito[st]i replicating \b[SM].phase \bG[012] activat \bresting quiescen naive
            interferon \bifn vir(us|al) exhaust dysfunc inhibitory cytotox (?<!natural.)kill effector stress
            heat.?shock programme inflam cytokine \bstates?\b \bdoing\b""",
        "genes": r"""genes?\b.*\b(high|up|low|down|expressed|define|specific|enriched) apart distin discrimin
            differ(?!ent[.?!]*$) compar regulated \bthan\b \bdegs?\b relative.to separate signature enriched versus
            \bvs\b \bwhat.do\b.*express \bonly\b.*express exclusiv \buniqu (top|best|strongest).(\w+.)?(genes|hits)""",
        "markers": r"""\bmarkers?\b hallmark""",
        "whynot": r"""\bwhy\b.*(\bnot\b|n't) against rul\w+.(\w+.)*out \bout.of.the exclud dismiss contradict instead
            \bcould \bmight (are|is)n't (sure|certain|convinced?|know)\b.*(\bnot?\b|n't)""",
        "alternatives": r"""\belse\b alternativ compet rival runner second next.(best|most|closest) (closest|nearest)
            (an)?other.(type|label|name|one) plausib confus mistak if.not\b otherwise \bbe.something""",
        "sure": r"""\bsure\b certain confiden \bscores?\b probab unknown correct \bright\b wrong doubt trust \breli
            how.(good|close) \bbet\b shak[ey] ambig borderline clear.cut safe solid robust believe (poor|bad)ly
            mis(class|label)""",
        "why": r"""\bwhy\b evidence \bhow.(do|did|was|were|can)\b.*(know|tell|call|label|decide|arriv|conclu)
            what.makes convinc \bbas(ed|is)\b ground reason rationale justif explain support behind
            \b(speak|argue|case|account)s?.for points?.to \bled\b (ma[dk]es?|let).(you|the|it) \bch(o|oo)se""",
        "quality": r"""\b(how.(many|few)|number.of|few).(\w+.)?(cells|counts|genes|umis) \bumis?\b \breads\b
            how.(big|large|deep) depth library (mean|median|total).counts? quality healthy viab doublet \bdead \bdying
            damag debris broken ambient empty mitoch""",
        "describe": r"""descri summar sum.(\w+.)?up characteri sentence paragraph \babout.(them|these|this|it) notab
            interesting special overview caption legend one.line walk.me in.(\w+.)?words (should|must).i.know
            \bgist\b""",
        "column": r"""donor patient tissue condition batch sample (?<!this.)(?<!the.)(?<!my.)cluster disease \bsex\b
            assay (come|are.they).from""",
        "types": r"""\btypes?\b \bkinds?\b compos population lineage subset mixture (homo|hetero)gen \bdivers
            \bwhat.(are|is|have|did).(they|these|those|this|here|in|i)\b \bwho('s|.is|.are)\b consist identit made.of
            \bpure\b break.*down labels \blabel.is \bname\b""",
    }.items()
}
# What no count of a file answers, however many types it names: the literature, medicine and work for other programs.
REFUSED = re.compile(
    r"\b(papers?|reviews?|literature|publications?|cite|drugs?|dos(e|age)|therap\w+|inhibitors?|surviv\w+|prognos\w+|"
    r"cures?|buy|plot|draw|heatmap|umap|translate|install|save|export|trajector\w+)\b",
    re.IGNORECASE,
)
# Of a type, too: "How many counts do monocytes have?".
ABOUT_COUNTS = re.compile(
    r"counts?\b|genes?\b|\bumis?\b|\breads\b|depth|librar|qualit|health|viab|doublet|\bdead|\bdying|damag|debris|broken|"
    r"ambient|empty|mitoch",
    re.IGNORECASE,
)
EXAMPLES = (
    "Which types are here? Describe them. Why this label? Why not NK cells? What else could they be? How sure is it? "
    "Which markers are missing? Do they express CD4? Which genes set them apart from monocytes? Are they dividing? "
    "Which donors are they from? How many counts do they have?"
)
TARGETS = ("types", "whynot", "why", "markers", "column")  # topics that are asked about a type or value itself
FOLLOWS = re.compile(r"\s*(and|or|also|then|what about|how about|same)\b", re.IGNORECASE)
REFERENCE = re.compile(
    r"\b(against|from|than|versus|vs\.?|with|to|unlike)\s+((the|all|other|an?)\s+)*$", re.IGNORECASE
)
SUBJECT = re.compile(r"\b(of|in|among|for|within|from)\s+((the|all)\s+)*$", re.IGNORECASE)
MANY_GENES = re.compile(r"\bgenes\b", re.IGNORECASE)
HOW_MANY = re.compile(r"\s*(and.)?how.(many|much|few)\b", re.IGNORECASE)
SELECTION = re.compile(r"\b(this|the|my|that)\s+$", re.IGNORECASE)  # "this cluster" is the selection
WORD = re.compile(r"[A-Za-z0-9][\w.-]*\w|\w")
CLUSTERS = ("leiden", "louvain", "seurat_clusters", "clusters")  # columns that are called clusters
NO_COLUMN = ("cell", "cells", "label", "labels", "type", "types", "score", "name")  # words of prose
LONGEST = 7  # words of a name
Group = tuple[str, str]  # "type" or a column of obs, and a value


@dataclass
class Question:
    """What a question asks.

    Args:
        text: The question.
        topic: A key of `TOPICS`, or "gene"; "" for none.
        genes, columns: Symbols, and columns of `obs`, that it names.
        roles: The groups that it names: the cells that it asks about ("subject"), those that it compares them with
            ("reference"), and what it asks whether they are ("target").
    """

    text: str
    topic: str = ""
    genes: list[str] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    roles: dict[str, Group] = field(default_factory=dict)


class QuestionReader:
    """Reads questions about the cells of one file.

    Args:
        types: Name of a type in any words, as [`simple`] -> the type.
        columns: Columns of `obs` -> their values.
        gene_index: Genes of the model.
    """

    def __init__(self, types: Mapping[str, str], columns: Mapping[str, set[str]], gene_index: GeneIndex) -> None:
        self.columns, self.gene_index = columns, gene_index
        self.symbols = {number: name for name, number in gene_index.vocabulary.items()}
        self.groups: dict[str, Group] = {}
        for column, values in columns.items():
            shown = "cluster" if column in CLUSTERS else simple(column.removesuffix("_id"))
            self.groups |= {f"{shown} {simple(value)}": (column, value) for value in values}
            self.groups |= {simple(value): (column, value) for value in values if len(values) > 1 and _tells(value)}
        self.groups |= {name: ("type", kind) for name, kind in types.items()}

    def __call__(self, text: str, last: Question) -> Question:
        """Read a question; what it leaves out is taken from the last one if it follows it ("and ...?")."""
        asked, follows = Question(text), bool(FOLLOWS.match(text))
        groups = self.find_names(asked)
        topics = [topic for topic, words in TOPICS.items() if words.search(text)]
        has_type = any(column == "type" for column, _ in groups)
        if not has_type and "whynot" in topics:  # "could they be doublets" names no type
            topics.remove("whynot")
        if has_type and topics == ["quality"] and not ABOUT_COUNTS.search(text):  # "how large a share are B cells?"
            topics = ["types"]
        if asked.columns and topics[:1] == ["state"] and "column" in topics:  # "which replicates are they from?"
            topics.remove("state")
        if follows and groups and topics == ["column"]:  # "and in donor 2?"
            topics = []
        if asked.genes and "markers" not in topics and not MANY_GENES.search(text):
            topics = ["gene"]
        guess = last.topic if follows else ""
        guess = guess or ("types" if has_type else "column" if groups or asked.columns else "")
        guess = guess or ("genes" if MANY_GENES.search(text) else "quality" if HOW_MANY.match(text) else "")
        asked.topic = (topics or [guess])[0]
        if REFUSED.search(text) and asked.topic in ("types", "column") and not asked.columns:
            asked.topic = ""
        for group, before in groups.items():
            is_target = asked.topic in TARGETS and (group[0] == "type") == (asked.topic != "column")
            if asked.topic == "genes" and REFERENCE.search(before):
                asked.roles["reference"] = group
            else:
                asked.roles["target" if is_target and not (follows and SUBJECT.search(before)) else "subject"] = group
        if follows:
            asked.genes, asked.columns = asked.genes or last.genes, asked.columns or last.columns
            asked.roles = last.roles | asked.roles
        target = asked.roles.get("target")
        if target is not None and (target[0] == "type") == (asked.topic == "column"):  # of another topic
            del asked.roles["target"]
        if asked.topic == "whynot" and "target" not in asked.roles:  # "and why not in B cells?"
            if asked.roles.get("subject", ("",))[0] == "type":
                asked.roles["target"] = asked.roles.pop("subject")
            else:
                asked.topic = "why"
        return asked

    def find_names(self, asked: Question) -> dict[Group, str]:
        """Groups that a question names -> the words before; the longest name first. Adds genes and columns."""
        words, found = list(WORD.finditer(asked.text)), {}
        taken = np.zeros(len(words), dtype=bool)
        for length in range(min(LONGEST, len(words)), 0, -1):
            for i in range(len(words) - length + 1):
                group = self.groups.get(" ".join(simple(word.group()) for word in words[i : i + length]))
                if group is not None and not taken[i : i + length].any():
                    taken[i : i + length] = True
                    found[group] = asked.text[: words[i].start()]
        for match in (word for word, is_taken in zip(words, taken, strict=True) if not is_taken):
            word, before = match.group(), asked.text[: match.start()]
            asked.genes += self.genes_of(word)
            asked.columns += [c for c in self.columns if simple(word) in simple(c).split() and word not in NO_COLUMN]
            if simple(word) == "cluster" and not (word == "cluster" and SELECTION.search(before)):
                asked.columns += [name for name in self.columns if name in CLUSTERS]
        return found

    def genes_of(self, word: str) -> list[str]:
        """Symbols of the genes that a word names; a word that looks like one is kept."""
        if word.upper() in ANTIGENS:
            return list(ANTIGENS[word.upper()])
        if len(word) < 3 or word.isdigit() or not (word.isupper() or re.search(r"\d", word)):
            return []
        ids = [self.gene_index.lookup(spelling)[0] for spelling in (word, word.upper(), word.upper().replace("-", ""))]
        found = [self.symbols[number] for number in ids if number in self.symbols][:1]
        return found or ([word] if GENE_WORD.fullmatch(word) and re.search(r"\d", word) else [])


def _tells(value: str) -> bool:
    """Whether a value of a column is a name by itself: neither a number nor a word of questions ("cell", "tissue")."""
    asks = any(words.fullmatch(value) for words in TOPICS.values())
    return len(value) > 3 and not value.isdigit() and not asks and simple(value) not in NO_COLUMN


def simple(words: str) -> str:
    """Words in lower case and the singular, so that spellings compare equal."""
    return " ".join(word.removesuffix("s") for word in normalize_label(words).split())
