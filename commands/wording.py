"""Answers in the words of an instruct model of Hugging Face that the user names, checked against what was counted."""

import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from scmmgpt.commands.chat import Answer, Chat
from scmmgpt.commands.questions import Question, QuestionReader


INSTRUCTION = (
    "You answer questions about single cells from the facts alone, in one or two sentences. Copy numbers and names."
)
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
MAX_TOKENS = 120  # of an answer


class Wording:
    """Words answers by a language model.

    Args:
        folder: Model and tokenizer, which has a chat template.
        read: Finds the genes and types that a text names.

    Raises:
        ValueError: If there is no such model.
    """

    def __init__(self, folder: Path, read: QuestionReader) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} is no folder of a language model: it has no config.json.")
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if self.tokenizer.chat_template is None:
            raise ValueError(f"The tokenizer of {folder} has no chat template; name an instruct model.")
        self.model, self.read = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval(), read

    def __call__(self, question: str, answer: Answer) -> str:
        """The answer in other words, or "" where the model adds to it or says nothing of it."""
        text = f"{INSTRUCTION}\n\nFacts: {answer.text}\n\nQuestion: {question}"  # not every template has a system
        turns = [{"role": "user", "content": text}]
        inputs: Any = self.tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = self.model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)
        words = str(self.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()
        return words if self.keeps_to(words, answer.text) else ""

    def keeps_to(self, words: str, facts: str) -> bool:
        """Whether all numbers, genes and types of a text are in the facts, and a number follows the gene that it did.

        It must have one of the numbers, if there are some.
        """
        numbers, theirs = set(NUMBER.findall(words)), set(NUMBER.findall(self.without_genes(facts)))
        return (
            bool(words)
            and set(NUMBER.findall(self.without_genes(words))) <= theirs
            and bool(numbers & theirs or not theirs)
            and self.names(words) <= self.names(facts)
            and self.of_genes(words) <= self.of_genes(facts)
        )

    def names(self, text: str) -> set[Any]:
        """Genes and groups that a text names."""
        asked = Question(text)
        return {*self.read.find_names(asked), *asked.genes}

    def without_genes(self, text: str) -> str:
        """A text whose numbers are none of a name."""
        return re.sub(r"[A-Za-z][\w.-]*", "", text)

    def of_genes(self, text: str) -> set[tuple[str, str]]:
        """Genes with the numbers up to the next gene or the end of the sentence."""
        found, gene = set(), ""
        for word in re.findall(r"[A-Za-z][\w-]*|\d+(?:[.,]\d+)*|\.\s", text):
            if word[0].isalpha():
                gene = next(iter(self.read.genes_of(word)), gene)
            elif word[0] == ".":
                gene = ""
            elif gene:
                found.add((gene, word))
        return found


def answers(
    chat: Chat, questions: Iterable[str] | None, folder: Path | None, as_list: bool
) -> Iterator[tuple[Any, list[str]]]:
    """Each answer with its lines, or all as a list; without questions, lines of standard input are."""
    wording = None if folder is None else Wording(folder, chat.read)

    def found() -> Iterator[dict[str, str]]:
        for text in map(str.strip, read_lines() if questions is None else questions):
            answer = chat.ask(text)
            if wording is not None and answer.topic:
                answer.worded = wording(text, answer)
            yield {"question": text, **vars(answer)}

    if as_list:
        yield list(found()), []
        return
    for row in found():
        asked = [] if questions is None else [f"> {row['question']}"]
        worded = [row["worded"], f"Counted: {row['text']}"] if row["worded"] else [row["text"]]
        yield row, [*asked, *worded, ""]


def read_lines() -> Iterator[str]:
    """Questions of standard input, until it ends."""
    while True:
        if sys.stdin.isatty():
            sys.stderr.write("> ")
            sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()
