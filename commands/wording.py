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
TOKEN = re.compile(
    r"[A-Za-z][\w-]*|\d+(?:[.,]\d+)*(?: ?%| (?:cells|counts|genes)\b)?|\.\s"
)  # a word, a number with its unit, or an end
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

        It must have one of the numbers and genes, if there are some.
        """
        (mine, my_genes), (numbers, genes) = (self.numbers(text) for text in (words, facts))
        names, known = (set(self.read.find_names(Question(text))) for text in (words, facts))
        is_of_them = mine <= numbers and my_genes <= genes and names <= known
        return bool(words) and is_of_them and bool(mine or not numbers) and bool(my_genes or not genes)

    def numbers(self, text: str) -> tuple[set[str], set[tuple[str, str]]]:
        """Numbers of a text, with their unit; and each gene with the numbers up to the next or the sentence's end."""
        numbers, of_genes, gene = set(), set(), ""
        for word in TOKEN.findall(text):
            if word[0].isalpha():
                gene = next(iter(self.read.genes_of(word)), gene)
                of_genes |= {(gene, "")} if gene else set()
            elif word[0] == ".":
                gene = ""
            else:
                numbers.add(word.replace(" ", ""))
                of_genes |= {(gene, word.replace(" ", ""))} if gene else set()
        return numbers, of_genes


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
