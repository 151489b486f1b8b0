"""Texts with a hidden fact, and the question for it, of a stated number of tokens: tasks for lm_eval's harness.

A text is prose from a file, or Python's manual, into which one sentence with a number was put; the question at its end
is answered if every token of the number is the likeliest (arXiv:2506.09507, figure 5).
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from megatron_txssm.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

THINGS = ("garden", "harbour", "library", "bridge", "station", "museum", "castle", "market", "theatre", "tower")
NEEDLE = "The secret number of the {thing} is {number}. "
QUESTION = "\nWhat is the secret number of the {thing}? The secret number of the {thing} is"
SEED = 1234


@dataclass(frozen=True)
class Haystack:
    """Prose and the tokenizer that counts it."""

    tokenizer: "Tokenizer"
    text: str

    def question(self, length: int, depth: float, number: int) -> dict[str, str]:
        """Question `number`: {"context", "answer"}, of at most `length` tokens together.

        depth: from 0, the needle at the beginning of the prose, to 1, at its end. UserError if the length is too short
        for the needle and its question.
        """
        draw = random.Random(f"{SEED} {number}")
        thing, secret = draw.choice(THINGS), str(draw.randrange(10**6, 10**7))
        needle, question = NEEDLE.format(thing=thing, number=secret), QUESTION.format(thing=thing)
        answer = f" {secret}."
        # Tokens may join differently at the seams.
        taken = 8 + sum(self._count(part) for part in (needle, question, answer))
        if length <= taken:
            raise UserError(
                f"--lengths {length} leaves no room for prose: the hidden sentence, its question and answer take up to "
                f"{taken} tokens; use twice as many"
            )
        prose = self._prose(draw.randrange(len(self.text)), length - taken)
        place = _sentence(prose, round(depth * len(prose)))
        return {"context": prose[:place] + needle + prose[place:] + question, "answer": answer}

    def _count(self, text: str) -> int:
        return len(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def _prose(self, start: int, tokens: int) -> str:
        """So many tokens from the sentence behind a place on; at the text's end it begins again."""
        start = _sentence(self.text, start) % len(self.text)
        # A token has 16 characters at most in all but a few texts, such as rows of signs.
        wanted = 16 * tokens
        text = (self.text[start:] + self.text * (wanted // len(self.text) + 1))[:wanted]
        offsets = self.tokenizer.encode(text, add_special_tokens=False).offsets
        return text[: offsets[min(tokens, len(offsets)) - 1][1]] + " "


def _sentence(text: str, place: int) -> int:
    """The beginning of the sentence at a place; the text's, or its end, where there is none."""
    if place >= len(text):
        return len(text)
    return text.rfind(". ", 0, place) + 2 if ". " in text[:place] else 0


def write_tasks(
    folder: Path, haystack: Haystack, lengths: Sequence[int], depths: Sequence[float], samples: int
) -> list[Path]:
    """A task file with its questions for each length and depth, in this order."""
    folder.mkdir(parents=True, exist_ok=True)
    return [_write_task(folder, haystack, length, depth, samples) for length, depth in cells(lengths, depths)]


def cells(lengths: Sequence[int], depths: Sequence[float]) -> Iterator[tuple[int, float]]:
    return ((length, depth) for length in lengths for depth in depths)


def task_name(length: int, depth: float) -> str:
    return f"needle_{length}_{round(100 * depth)}"


def _write_task(folder: Path, haystack: Haystack, length: int, depth: float, samples: int) -> Path:
    name = task_name(length, depth)
    data, file = folder / f"{name}.jsonl", folder / f"{name}.yaml"
    questions = [haystack.question(length, depth, number) for number in range(samples)]
    data.write_text("".join(json.dumps(question) + "\n" for question in questions), encoding="utf-8")
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "num_fewshot": 0,
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        ],
        "metadata": {"version": 1},
    }
    file.write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")
    return file
