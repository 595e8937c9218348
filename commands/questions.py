"""Parse a question about cells: its topic, and the genes, types, columns and values that it names.

Keywords decide the topic; the text encoder of a checkpoint, which is trained on captions, is worse (`train/LOG.md`).
A question with a word that is neither a name nor a word of the topic gets no answer, because it may ask for something
else.
"""

import difflib
import itertools
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from scmmgpt.commands.type_names import simple
from scmmgpt.genes_scmmgpt import GeneIndex
from scmmgpt.labels_scmmgpt import UNKNOWN
from scmmgpt.unseen_scmmgpt import ANTIGENS, GENE_WORD


# Topic -> patterns of its keywords; a dot is a space. The first topic with a match wins.
GAP = re.compile(r"\.\*|\(\\w\+\.\)[?*]")  # any words, in a pattern of `TOPICS`


def _with_gaps(words: str) -> re.Pattern:
    """Compile patterns, set apart by white space, so that the words in a gap are groups "gap0", "gap1", ..."""
    numbers = itertools.count()
    either = "|".join(words.split())
    return re.compile(GAP.sub(lambda gap: f"(?P<gap{next(numbers)}>{gap.group()})", either), re.IGNORECASE)


TOPICS = {
    topic: _with_gaps(words)
    for topic, words in {
        "state": r"""\bcycl divid prolif mito[st]i replicating \b[SM].phase \bG[012] activat \bresting quiescen
            interferon \bifn vir(us|al) exhaust dysfunc inhibitory cytotox (?<!natural.)kill(?!er.cell) effector stress
            heat.?shock programme inflam cytokine \bstates?\b \bdoing\b""",
        "genes": r"""genes?\b.*\b(high|up|low|down|expressed|define|specific|enriched) apart distin discrimin
            typical \bmarks?\b.*\bout\b
            differ(?!ent[.?!]*$) compar regulated \bthan\b \bdegs?\b relative.to separate signature enriched versus
            \bvs\b \bwhat.do\b.*(express|have)
            \bonly\b.*express exclusiv \buniqu (top|best|strongest).(\w+.)?(genes|hits)""",
        "markers": r"""\bmark(er)?s?\b hallmark""",
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
            how.(big|large|deep) depth library (mean|median|total).(counts?|genes|umis) quality healthy viab
            \bdead \bdying
            damag debris broken ambient empty mito(ch|\b) deep(ly)?.sequenced measured""",
        "describe": r"""descri summar sum.(\w+.)?up characteri sentence paragraph \babout.(them|these|this|it) notab
            interesting special overview caption legend one.line walk.me in.(\w+.)?words (should|must).i.know
            \bgist\b""",
        "column": r"""donor patient tissue condition batch sample (?<!this.)(?<!the.)(?<!my.)cluster disease \bsex\b
            assay (come|are.they).from""",
        "types": r"""\btypes?\b \bkinds?\b compos population lineage subset mixture (homo|hetero)gen \bdivers
            \bwhat.(are|is|have|did).(they|these|those|this|here|in|i)\b \bwho('s|.is|.are)\b consist identit made.of
            \bpure\b break.*down labels \blabel.is \bname\b frequent.labels? smallest biggest largest commonest
            \b(what|which).cells.(are|do).(these|they|those|here|there|we|i)\b""",
        "like": r"""\b(most|more|rather|looks?).(\w+.)?like\b \b(closest|nearest|similar)\b \bresembl""",
    }.items()
}
# Requests that the counts of a file cannot answer: about literature or medicine, or for other programs.
REFUSED = re.compile(
    r"\b(papers?|reviews?|literature|publications?|cite|drugs?|dos(e|age)|therap\w+|inhibitors?|surviv\w+|prognos\w+|"
    r"cures?|buy|plot|draw|heatmap|umap|translate|install|save|export|trajector\w+|correlat\w+|"
    r"what do(es)?\b.*\bdo|how (do|can|should) i (?!know|tell)\w+|"
    r"genes.*\bshare|in common)\b",
    re.IGNORECASE,
)
# Words about counts, also with a type: "How many counts do monocytes have?".
ABOUT_COUNTS = re.compile(
    r"counts?\b|genes?\b|\bumis?\b|\breads\b|depth|librar|qualit|health|viab|\bdead|\bdying|damag|debris|broken|"
    r"ambient|empty|mito(ch|\b)|sequenc",
    re.IGNORECASE,
)
EXAMPLES = (
    "Which types are here? How many are T cells? Describe them. Why this label? Why not NK cells? What else could "
    "they be? How sure is it? Which markers are missing? Do they express CD4? Which type expresses most CD14? Which "
    "genes set them apart from monocytes? Are they dividing? Which donors are they from? How many counts do they have?"
)
# Words of prose, and of questions of any topic, that need no answer of their own.
PLAIN = frozenset(
    """neither nor groups a about left
    actually again against all also among amount an and any anybody anyone anything apparently
    approximately
    are aren around as at available be been being between both but by call called came can case cell cells check
    compare compared could couldn count counts data dataset did didn different do does doesn doing dominate done
    each either else elsewhere even every everybody everyone everything exactly fewer file find for found
    fraction frequency from general get give got group had has hasn have haven having here hi higher how i
    identified if in inside instead into is it its itself just know less let like list look looking looks lower
    make many may me mean might mine more most mostly much my name named need negative no none not now number
    observed of off ok on one only or other others our out over overall own part per percent percentage picked
    please portion positive possible present proportion question quick quite rather really roughly same sample
    say see seem seems seen selected selection set several share should shouldn show shown sign simply so some
    somehow something sort speak still such tell than that the their them then there these they thing things
    this those through to today together too total typical under up us very want was wasn we well were weren
    what when where whether which while who whole whose why will with within would wouldn write yes yet you
    your""".split()
)
# Topic -> further words that may occur in its questions.
ALSO = {
    topic: re.compile(rf"\b({'|'.join(words.split())})\b", re.IGNORECASE)
    for topic, words in {
        "types": r"""made.of come abundan\w+ common\w* rare\w* frequent\w* big\w* large\w*
            small\w* least major\w* minor\w*
            ratio top versus vs express\w*
            few\w* dominat\w+ left left.over remain\w* subtypes? belong named main share annotat\w+
            pick\w* lasso blob circle\w* represented more.than.one.type""",
        "gene": r"""restricted rich\w* distribut\w+ express\w* co-?express\w* level\w* average\w*
            median detect\w* measur\w+ transcripts?
            signal lack\w*
            without high\w* low\w* strong\w* weak\w* types? labels? populations? clusters? rank
            marker good absent missing anywhere counts? genes? double surface protein rna mrna
            exist\w* contain\w* half least best simultaneous\w*""",
        "genes": r"""strongly cluster group express\w* most top best ten five strong\w* genes? hits
            transcripts? level\w*
            rest markers? high\w* low\w*""",
        "markers": r"""express\w* top best genes? missing lack\w* canonical classical\w* usual expected key
            absent complete
            pass carry support\w* panel""",
        "quality": r"""pick sequencing median average\w* mean typical high\w* low\w* normal big size large
            types? labels?
            clusters? populations? content deep sequenced have most least contain\w* (?:how.)?much
            rna detected good bad poor fine""",
        "sure": r"""classified label\w* annotat\w* prediction\w* call\w* model mean low\w* high\w* few too name
            most least""",
        "why": r"""think label\w* annotat\w* call\w* model gene\w* markers? decision name\w*""",
        "whynot": r"""label\w* annotat\w* call\w* model exclu\w+ argu\w+ just""",
        "alternatives": r"""label\w* annotat\w* likely possib\w+ next guess choice types? label""",
        "column": r"""come many per distribut\w+ overlap contribut\w+ represent\w+ lie spread""",
        "describe": r"""unusual paper slides? cluster\w* groups? short figure""",
        "state": r"""dissociation sign\w* activ\w+ response respond\w* (?:any.)?express\w* programme phase
            genes fraction stimulat\w+ most least high\w* low\w* strong\w* weak\w* levels?""",
        "like": r"""closest nearest similar resembl\w+ looks? expression transcriptom\w+ (?:the.)?(?:most|next) types?
            labels? populations?""",
    }.items()
}
WHY_NOT = re.compile(r"\bwhy\b.*(\bnot\b|n't)", re.IGNORECASE)
RANKED = re.compile(r"\b(most|least|(high|low|strong|weak)est)\b", re.IGNORECASE)
TARGETS = ("types", "whynot", "why", "markers", "column", "like")  # topics that are asked about a type or value itself
FOLLOWS = re.compile(r"\s*(and|or|also|then|what about|how about|same)\b", re.IGNORECASE)
REFERENCE = re.compile(
    r"\b(against|from|than|versus|vs\.?|with|(compared|relative|opposed|contrast) to|"
    r"unlike)\s+((the|all|other|an?)\s+)*(in\s+)?$",
    re.IGNORECASE,
)
SUBJECT = re.compile(r"\b(of|in|among|for|within|from)\s+((the|all)\s+)*$", re.IGNORECASE)
MANY_GENES = re.compile(r"\bgenes\b", re.IGNORECASE)
HOW_MANY = re.compile(r"\s*(and.)?how.(many|much|few)\b", re.IGNORECASE)
COUNTED = re.compile(
    r"\b(how (many|common|frequent|abundant)|number|fraction|per ?cent(age)?|proportion|portion|share|ratio|any)\b|%|"
    r"\b(more|fewer|less|rarer|bigger|larger)\b.*\b(or|than)\b|\b(frequent|abundant|common)\b",
    re.IGNORECASE,
)
EACH = re.compile(  # request for each type, or for each value of a column
    r"\b(per|by|across|each|every|over|among|between|in|which|what|rank|compare)\s+(?:(?:the|of|cell|different|all)\s+)*"
    r"(types?|labels?|populations?|subsets?|lineages?|kinds?|cells|clusters?|donors?|patients?|samples?|conditions?)\b",
    re.IGNORECASE,
)
# Words before a group that is excluded.
NOT_OF = re.compile(
    r"(\bnot|n't|\bother than|\bneither|\bnor)\s+((from|in|of|called)\s+)?((an?|the)\s+)?$", re.IGNORECASE
)
WITHOUT = re.compile(
    r"\b(without|not?|neither|nor|lack\w*|negative for|n't|absence of)\s+((express\w*|any|of|for)\s+)*$", re.IGNORECASE
)
OFF = re.compile(r"(\s*-\s*|\s+(is|are)?\s*)(negative|absent|missing|off)\b|-(?!\w)", re.IGNORECASE)
ONLY_GENES = re.compile(r"\b(express\w*|regulated|distin\w+|separat\w+|differ\w*)\b", re.IGNORECASE)
T_CELLS = re.compile(
    r"\b(T|CD[48]\+?) (and|or|nor|vs\.?|versus|to|than) (CD[48]\+? T cells?|(?:B|NK) cells?)\b", re.IGNORECASE
)
LISTED = re.compile(
    r"\b(\d+|three|five|ten)\s+(\w+\s+)?(genes|markers|hits|types|labels|populations)\b", re.IGNORECASE
)
SELECTION = re.compile(r"\b(this|the|my|that)\s+$", re.IGNORECASE)  # "this cluster" means the selected cells
WORD = re.compile(r"[A-Za-z0-9][\w.-]*\w|\w")
CLUSTERS = ("leiden", "louvain", "seurat_clusters", "clusters")  # columns that the word "cluster" means
# Words in capitals that are not genes.
CAPITALS = {"RNA", "MRNA", "DNA", "UMI", "UMIS", "DEG", "DEGS", "UMAP", "PCA", "PBMC", "IFN", "QC", "G2M"}
NO_COLUMN = ("cell", "cells", "label", "labels", "type", "types", "score", "name")  # words that never mean a column
# Most words of a name; fewest letters of a word that is checked; smallest similarity of a misspelt word.
LONGEST, SHORTEST, LIKE = 7, 4, 0.84
Group = tuple[str, str]  # "type" or a column of obs, and a value


@dataclass
class Question:
    """A parsed question.

    Args:
        text: The question.
        topic: A key of `TOPICS`, or "gene"; "" for none.
        genes: Symbols of the named genes.
        columns: Named columns of `obs`.
        without: Named genes that the cells must not express.
        roles: Role -> named group: "subject" (cells that the question is about), "reference" (cells to compare with)
            and "target" (type or value in question).
        groups: Named types and values, in the order of the question.
        denied: Named groups that the cells must not belong to.
        each: "type" or a column, if the question is about each type or each value of the column.
        unread: Words that are not understood; a question with such words gets no answer.
        names: Words that name a gene, column or group.
        is_misspelt: Whether a misspelt word was corrected.
    """

    text: str
    topic: str = ""
    genes: list[str] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    without: set[str] = field(default_factory=set)
    roles: dict[str, Group] = field(default_factory=dict)
    groups: list[Group] = field(default_factory=list)
    denied: list[Group] = field(default_factory=list)
    each: str = ""
    unread: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    is_misspelt: bool = False


class QuestionReader:
    """Parses questions about the cells of one file.

    Args:
        types: Name of a type, simplified by [`simple`] -> the type; a type may have several names.
        columns: Column of `obs` -> its values.
        gene_index: Gene names of the model.
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
        """Parse a question. A follow-up ("and ...?") takes missing parts from the last question.

        A misspelt word is replaced by the most similar known word, if the question can then be answered.
        """
        asked = self.read(text, last)
        if asked.unread:
            known = sorted({*PLAIN, *(word for name in self.groups for word in name.split())})
            known = [word for word in known if len(word) >= SHORTEST]
            for word in asked.unread:
                turned = [other for other in known if sorted(other) == sorted(word.lower())]  # "waht"
                text = text.replace(word, [*turned, *difflib.get_close_matches(word.lower(), known, 1, LIKE), word][0])
            again = self.read(text, last)
            if again.topic and not again.unread:
                again.is_misspelt = True
                return again
        return asked

    def read(self, text: str, last: Question) -> Question:
        """Parse a question without correcting misspelt words; see [`__call__`]."""
        text = T_CELLS.sub(_whole_names, text)
        asked, follows = Question(text), bool(FOLLOWS.match(text))
        groups = self.find_names(asked)
        asked.groups = list(groups)
        asked.denied = [group for group, before in groups.items() if NOT_OF.search(before)]
        if asked.genes and (each := EACH.search(text)):
            asked.each = self.column_called(each.group(2))
        asked.topic = self.find_topic(asked, last.topic if follows else "")
        if asked.topic in ("quality", "sure", "state") and (each := EACH.search(text)) and not groups:
            is_ranked = asked.topic != "quality" and RANKED.search(text)
            asked.each = self.column_called(each.group(2)) * bool(each.group(2).lower() != "cells" or is_ranked)
        self.assign_roles(asked, groups, follows)
        if follows:
            if not asked.genes and re.search(r"\bwithout (it|them)\b", text, re.IGNORECASE):
                asked.without = set(last.genes)
            asked.genes, asked.columns = asked.genes or last.genes, asked.columns or last.columns
            asked.roles = last.roles | asked.roles
        target = asked.roles.get("target")
        if target is not None and asked.topic != "types" and (target[0] == "type") == (asked.topic == "column"):
            del asked.roles["target"]  # a type can't answer a question about a column, nor the reverse
        if asked.topic == "whynot" and "target" not in asked.roles:  # "and why not in B cells?"
            subject = asked.roles.get("subject", ("", ""))
            if subject[0] == "type" or (subject in groups and not SUBJECT.search(groups[subject])):
                asked.roles["target"] = asked.roles.pop("subject")
            else:
                asked.topic = "why"
        asked.unread = self.find_unread(asked)
        return asked

    def find_topic(self, asked: Question, before: str) -> str:
        """Find the topic of a question whose names are already found; without keywords, the topic is `before`."""
        text, kinds = asked.text, {column for column, _ in asked.groups}
        topics = topics_of(text, kinds)
        has_type, counted = "type" in kinds, COUNTED.search(text) and not MANY_GENES.search(text)
        if REFUSED.search(text) and (set(topics) <= {"types", "column"} or not {"describe", "genes"} & set(topics)):
            return ""
        if asked.genes and not MANY_GENES.search(text):
            return "gene"
        if topics[:1] == ["types"] and re.search("who.(are|is).you", text, re.IGNORECASE):
            return ""
        if "like" in topics:
            return "like"
        if ("type", UNKNOWN) in asked.groups and (counted or re.search(r"\bwhy\b", text, re.IGNORECASE)):
            return "why" if re.search(r"\bwhy\b", text, re.IGNORECASE) else "types"
        if has_type and counted and not kinds - {"type"} and topics[:1] == ["genes"] and ONLY_GENES.search(text):
            return "genes"
        if has_type and counted and not ABOUT_COUNTS.search(text) and not {"state", "sure"} & set(topics):
            return "types"  # "how large a share are B cells?"
        if EACH.search(text) and ABOUT_COUNTS.search(text) and set(topics) <= {"types", "quality", "column"}:
            return "quality"  # "which type has the most counts?"
        if "sure" in topics and "quality" in topics and ABOUT_COUNTS.search(text):  # "how good is the quality?"
            return "quality"
        if has_type and topics == ["quality"] and not ABOUT_COUNTS.search(text):
            return "types"
        if asked.columns and topics[:1] == ["state"] and "column" in topics:  # "which replicates are they from?"
            topics.remove("state")
        if before and kinds and topics == ["column"]:  # "and in donor 2?"
            topics = []
        guess = before or ("types" if has_type else "column" if kinds or asked.columns else "")
        guess = guess or ("genes" if MANY_GENES.search(text) else "quality" if HOW_MANY.match(text) else "")
        return (topics or [guess])[0]

    def assign_roles(self, asked: Question, groups: Mapping[Group, str], follows: bool) -> None:
        """Assign the roles "subject", "reference" and "target" to the groups of a question.

        Args:
            groups: Named group -> words before it.
            follows: Whether the question is a follow-up.
        """
        are_mixed = len({group[0] == "type" for group in groups}) == 2
        if asked.topic in ("types", "column") and are_mixed:  # "what share of cluster 4 is macrophages?"
            places = [i for i, before in enumerate(groups.values()) if SUBJECT.search(before)] or [len(groups) - 1]
            subject = list(groups)[places[-1]]
            asked.roles = {
                "subject": subject,
                "target": next(g for g in groups if (g[0] == "type") != (subject[0] == "type")),
            }
            asked.topic = "types"
            return
        within = [group for group, before in groups.items() if SUBJECT.search(before) and group[0] == "type"]
        if asked.topic == "types" and len(groups) == 2 and len(within) == 1 and not asked.denied:
            # "what share of the T cells are regulatory T cells?"
            asked.roles = {"subject": within[0], "target": next(group for group in groups if group != within[0])}
            return
        for group, before in groups.items():
            is_target = asked.topic in TARGETS and (group[0] == "type") == (asked.topic != "column")
            if asked.topic == "genes" and (REFERENCE.search(before) or "subject" in asked.roles):
                asked.roles["reference"] = group
            else:
                asked.roles["target" if is_target and not (follows and SUBJECT.search(before)) else "subject"] = group

    def find_unread(self, asked: Question) -> list[str]:
        """Find the words that are not prose, not names, and not of the topic; of a refused request, its keywords."""
        if not asked.topic and (refused := REFUSED.search(asked.text)):
            return [refused.group()]
        patterns = [LISTED, *(words for words in (TOPICS.get(asked.topic), ALSO.get(asked.topic)) if words)]
        if asked.each or asked.topic in ("types", "gene"):
            patterns += [EACH, TOPICS["types"]] if asked.topic == "types" else [EACH]
        read = [span for words in patterns for match in words.finditer(asked.text) for span in _spans(match)]
        unread = []
        for match in WORD.finditer(asked.text):
            word, (start, stop) = match.group().lower(), match.span()
            is_short = len(word) < 3 and not word.isdigit()
            is_short |= word == "cluster" and SELECTION.search(asked.text[:start]) is not None
            is_read = is_short or word in PLAIN or any(a < stop and start < b for a, b in read)
            if not is_read and match.group() not in asked.names:
                unread.append(match.group())
        return unread

    def column_called(self, word: str) -> str:
        """Find the column of `obs` that a noun means; "type" for labels, "" for none."""
        if re.fullmatch("clusters?", word, re.IGNORECASE):
            return next((name for name in self.columns if name in CLUSTERS), "")
        if re.match("donor|patient|sample|condition", word, re.IGNORECASE):
            stem = simple(word)
            return next((name for name in self.columns if stem in simple(name).split()), "")
        return "type"

    def find_names(self, asked: Question) -> dict[Group, str]:
        """Find the named groups -> text before each, in the order of the question; add genes, columns and names.

        Longer names win over shorter names.
        """
        words, before_group = list(WORD.finditer(asked.text)), {}
        taken = np.zeros(len(words), dtype=bool)
        for length in range(min(LONGEST, len(words)), 0, -1):
            for i in range(len(words) - length + 1):
                group = self.groups.get(" ".join(simple(word.group()) for word in words[i : i + length]))
                if group is not None and not taken[i : i + length].any():
                    taken[i : i + length] = True
                    before_group[group] = asked.text[: words[i].start()]
        asked.names += [word.group() for word, is_taken in zip(words, taken, strict=True) if is_taken]
        for match in (word for word, is_taken in zip(words, taken, strict=True) if not is_taken):
            word, before, after = match.group(), asked.text[: match.start()], asked.text[match.end() :]
            genes = self.genes_of(word) or self.genes_of(
                re.sub("-(negative|positive)$", "", word, flags=re.IGNORECASE)
            )
            columns = [c for c in self.columns if simple(word) in simple(c).split() and word not in NO_COLUMN]
            columns = [c for c in columns if c == word] or columns  # "tissue", beside "Tissue" and "tissue of origin"
            if simple(word) == "cluster" and not (word == "cluster" and SELECTION.search(before)):
                columns += [name for name in self.columns if name in CLUSTERS]
            if WITHOUT.search(before) or OFF.match(after) or word.lower().endswith("-negative"):
                asked.without |= set(genes)
            asked.genes, asked.columns = asked.genes + genes, asked.columns + columns
            asked.names += [word] if genes or columns else []
        return dict(sorted(before_group.items(), key=lambda item: len(item[1])))

    def genes_of(self, word: str) -> list[str]:
        """Symbols of the genes that a word names; a word that looks like an unknown symbol is returned as it is."""
        if word.upper() in ANTIGENS:
            return list(ANTIGENS[word.upper()])
        if len(word) < 3 or word.isdigit() or not (word.isupper() or re.search(r"\d", word)):
            return []
        ids = [self.gene_index.lookup(spelling)[0] for spelling in (word, word.upper(), word.upper().replace("-", ""))]
        known = [self.symbols[number] for number in ids if number in self.symbols][:1]
        is_symbol_like = GENE_WORD.fullmatch(word) and word.upper() not in CAPITALS
        return known or ([word] if is_symbol_like else [])


def topics_of(text: str, named: Collection[str]) -> list[str]:
    """The topics that words of a question ask for, in the order of `TOPICS`.

    Args:
        text: The question.
        named: What it names values of: "type" or columns.
    """
    topics = [topic for topic, words in TOPICS.items() if words.search(text)]
    if {"whynot", "alternatives"} <= set(topics) and re.search(r"\b(else|other)\b", text, re.IGNORECASE):
        topics.remove("whynot")  # "what else could the monocytes be?"
    usable = {"like": "type" in named, "whynot": "type" in named or bool(named and WHY_NOT.search(text))}
    return [topic for topic in topics if usable.get(topic, True)]  # "what do they look like?" names no type


def _whole_names(match: re.Match) -> str:
    """Both names of "T and B cells", or of "CD4 and CD8 T cells", in full."""
    first = "T" if match[1].upper() == "T" else f"{match[1]} T"
    return f"{first} cells {match[2]} {match[3]}"


def _spans(match: re.Match) -> list[tuple[int, int]]:
    """The parts of a match outside its gaps; "ductal" of "How many ductal cells" is in a gap."""
    edges = [match.start()]
    for name in match.re.groupindex:
        edges += match.span(name) if match.start(name) >= 0 else ()
    edges.append(match.end())
    return [(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True) if start < stop]


def _tells(value: str) -> bool:
    """Whether a value of a column can be named alone: not short, no number, no word of questions ("cell")."""
    asks = any(words.fullmatch(value) for words in TOPICS.values())
    return len(value) > 3 and not value.isdigit() and not asks and simple(value) not in NO_COLUMN
