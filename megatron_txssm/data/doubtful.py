"""Which characters the fast encoder may read otherwise than the reference: they follow different versions of Unicode.

A mark that a library does not know stays where it is, one that it knows is sorted among the others (NFC); a letter of
a new script is a symbol to the older library. Which characters these are is asked of the two libraries, under the
normaliser and the cutting rules of the tokenizer at hand. What is not asked, such as characters that Python itself
does not know, is doubtful.
"""

import json
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

CODE_POINTS = 0x110000
# A few long texts take less time than many short ones.
QUESTIONS_PER_TEXT = 64
# Where neighbours are of one kind: CJK ideographs, Hangul syllables, private use. Those beyond U+20000 are not asked.
_RUNS = (range(0x3400, 0x4DC0), range(0x4E00, 0xA000), range(0xAC00, 0xD7A4), range(0xE000, 0xF900))
_OTHERS = (range(0x80, 0x20000), range(0xE0000, 0xE0200))
# Marks of the lowest and of the highest combining class: only a starter stays between them in this order.
_HIGHEST, _LOWEST = "\u0345", "\u0334"

# Texts to the ids of each.
Encode = Callable[[Sequence[str]], Sequence[np.ndarray]]


class _Question(NamedTuple):
    """A text, and the characters that are doubtful where the two libraries differ on it."""

    text: str
    characters: str


def doubtful_characters(fast: Encode, reference: Encode) -> np.ndarray:
    """[code point] -> whether the two may differ on a text that holds it. Takes about 0.3 s."""
    doubtful = np.ones(CODE_POINTS, dtype=bool)
    doubtful[:0x80] = False

    def ask(questions: Sequence[_Question]) -> None:
        groups = [questions[i : i + QUESTIONS_PER_TEXT] for i in range(0, len(questions), QUESTIONS_PER_TEXT)]
        for group in _differing(groups, lambda group: "".join(question.text for question in group), fast, reference):
            # Where no single one differs, it is a matter of neighbours.
            for question in list(_differing(group, lambda question: question.text, fast, reference)) or group:
                doubtful[[ord(character) for character in question.characters if not character.isascii()]] = True

    questions = list(_questions())
    doubtful[[ord(question.characters[0]) for question in questions]] = False
    ask(questions)
    ask(_mark_questions([chr(code) for code in np.flatnonzero(~doubtful) if unicodedata.combining(chr(code))]))
    return doubtful


def shows_cuts(tokenizer_json: bytes) -> bytes:
    """A byte-level tokenizer with other tokens, which show how a text was normalised and where it was cut.

    The real ones would not: two libraries that cut "ab" differently agree wherever no token spans a and b.
    """
    described = json.loads(tokenizer_json)
    names = _byte_names()
    pairs = [(a, b) for a in b"aA1!' q" for b in range(0x80, 0x100)]
    pairs += [(b, a) for a, b in pairs] + [(a, b) for a in range(0x80, 0xC0) for b in range(0xC2, 0xF5)]
    merges = [[names[a], names[b]] for a, b in pairs]
    tokens = [*names, *map("".join, merges)]
    described["model"] |= {"vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges, "unk_token": None}
    return json.dumps(described | {"added_tokens": [], "post_processor": None}).encode()


def is_byte_level(tokenizer_json: bytes) -> bool:
    """Whether its tokens are strings of bytes, so that `shows_cuts` can replace them."""
    described = json.loads(tokenizer_json)
    return described["model"]["type"] == "BPE" and '"ByteLevel"' in json.dumps(described.get("pre_tokenizer"))


def _questions() -> Iterator[_Question]:
    runs = [code for run in _RUNS for code in run]
    others = [chr(code) for code in sorted({code for part in _OTHERS for code in part} - set(runs))]
    others = [character for character in others if unicodedata.category(character) not in ("Cn", "Cs", "Co")]
    for character in others:
        parts = unicodedata.normalize("NFD", character)
        yield _Question(_in_every_place(character) + (parts if parts != character else ""), character + parts)
    # A letter before them shows whether they are letters, too.
    yield from (_Question("a" + chr(code), chr(code)) for code in runs if unicodedata.category(chr(code)) != "Cn")


def _mark_questions(marks: Sequence[str]) -> list[_Question]:
    """Which place each mark gets among those of all classes."""
    of_class = {unicodedata.combining(mark): mark for mark in reversed(marks)}
    # Highest class first: from either end, a mark is moved to where its class is.
    every_class = "".join(of_class[number] for number in sorted(of_class, reverse=True))
    return [_Question(f"q{mark}{every_class}q{every_class}{mark}", mark) for mark in marks]


def _in_every_place(character: str) -> str:
    """Beside letters of both cases, number, symbol, contraction, space and marks."""
    return f"a{character}A1{character}!{character}'{character} {character}q{_HIGHEST}{character}{_LOWEST}"


def _differing(items: Sequence[Any], text: Callable[[Any], str], fast: Encode, reference: Encode) -> Iterator[Any]:
    texts = [text(item) for item in items]
    for item, a, b in zip(items, fast(texts), reference(texts), strict=True):
        if not np.array_equal(a, b):
            yield item


def _byte_names() -> list[str]:
    """[byte] -> its character in a byte-level vocabulary: itself where it can be seen, else one from U+0100 on."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(0x100) if byte not in shown]
    return [chr(byte) if byte in shown else chr(0x100 + hidden.index(byte)) for byte in range(0x100)]
