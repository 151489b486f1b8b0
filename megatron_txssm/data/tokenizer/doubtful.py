"""Finds the characters that two encoders may treat differently because they follow different versions of Unicode.

A library leaves a mark that it does not know in place, and sorts one that it knows among the others (NFC); a letter of
a new script is a symbol to the older library. To find such characters, both libraries encode short texts ("questions")
under the normaliser and the splitting rules of the given tokenizer. Characters that are not asked about, such as those
unknown to Python itself, are doubtful.

A block of characters is asked about when one of them first occurs in a text: asking about all would cost every process
a second, and a process may run only one task. The answer depends only on the block, so it is the same in any process.
"""

import functools
import itertools
import json
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

CODE_POINTS = 0x110000
# Smaller blocks would cost more calls; larger ones would include more characters that no text contains.
BLOCK = 8
# Ranges of one kind: CJK ideographs, Hangul syllables, private use. Those beyond U+20000 are not asked about.
_RUNS = (range(0x3400, 0x4DC0), range(0x4E00, 0xA000), range(0xAC00, 0xD7A4), range(0xE000, 0xF900))
_OTHERS = (range(0x80, 0x20000), range(0xE0000, 0xE0200))
# Marks of the highest and the lowest combining class: only a starter stays between them in this order.
_HIGHEST, _LOWEST = "\u0345", "\u0334"

_SURE, _DOUBTFUL, _NOT_ASKED = np.arange(3, dtype=np.uint8)

# Texts -> the ids of each.
Encode = Callable[[Sequence[str]], Sequence[np.ndarray]]


class _Question(NamedTuple):
    """A text, and the characters that are doubtful if the two libraries differ on it."""

    text: str
    characters: str


class DoubtfulCharacters:
    """The characters on which two encoders may differ."""

    def __init__(self, fast: Encode, reference: Encode) -> None:
        self._fast, self._reference = fast, reference
        self._answers = np.full(CODE_POINTS, _NOT_ASKED)
        self._answers[:0x80] = _SURE

    def among(self, codes: np.ndarray) -> np.ndarray:
        """[n] code points -> [n] whether the two may differ on a text that contains it."""
        answers = self._answers[codes]
        if (answers == _NOT_ASKED).any():
            for block in np.unique(codes[answers == _NOT_ASKED] // BLOCK).tolist():
                self._ask(range(block * BLOCK, (block + 1) * BLOCK))
            answers = self._answers[codes]
        return answers == _DOUBTFUL

    def _ask(self, block: range) -> None:
        questions = list(_questions(block))
        sure = {question.characters[0] for question in questions}
        if self._differ("".join(question.text for question in questions)):
            differing = [question for question in questions if self._differ(question.text)]
            # If no single question differs, the difference depends on neighbours.
            sure -= {character for question in differing or questions for character in question.characters}
        self._answers[block] = [_SURE if chr(code) in sure else _DOUBTFUL for code in block]

    def _differ(self, text: str) -> bool:
        return not np.array_equal(self._fast([text])[0], self._reference([text])[0])


def shows_cuts(tokenizer: dict[str, Any]) -> bytes:
    """A byte-level tokenizer.json with its tokens replaced by ones that show how a text was normalised and split.

    The real tokens may not: two libraries that split "ab" differently agree wherever no token spans a and b.
    """
    names = _byte_names()
    pairs = [(a, b) for a in b"aA1!' q" for b in range(0x80, 0x100)]
    pairs += [(b, a) for a, b in pairs] + [(a, b) for a in range(0x80, 0xC0) for b in range(0xC2, 0xF5)]
    merges = [[names[a], names[b]] for a, b in pairs]
    vocab = {token: i for i, token in enumerate([*names, *map("".join, merges)])}
    model = tokenizer["model"] | {"vocab": vocab, "merges": merges, "unk_token": None}
    return json.dumps(tokenizer | {"model": model, "added_tokens": [], "post_processor": None}).encode()


def is_byte_level(tokenizer: dict[str, Any]) -> bool:
    """Whether a tokenizer's tokens are strings of bytes, so that `shows_cuts` can replace them."""
    return tokenizer["model"]["type"] == "BPE" and '"ByteLevel"' in json.dumps(tokenizer.get("pre_tokenizer"))


def _questions(block: range) -> Iterator[_Question]:
    """Questions about the characters of a block, and about those composed of them."""
    characters = [chr(code) for code in block if unicodedata.category(chr(code)) not in ("Cn", "Cs")]
    # A letter before the character shows whether it is a letter, too.
    yield from (_Question("a" + character, character) for character in characters if _is_in(character, _RUNS))
    others = [character for character in characters if _is_other(character)]
    composed = {whole for part in others for whole in _made_of().get(part, ())}
    for character in [*others, *sorted(composed - set(others))]:
        parts = unicodedata.normalize("NFD", character)
        yield _Question(_in_every_place(character) + (parts if parts != character else ""), character + parts)
    for mark in others:
        if unicodedata.combining(mark):
            # Its position among marks of all classes: from either end, it is moved to the place of its class.
            yield _Question(f"q{mark}{_every_class()}q{_every_class()}{mark}", mark)


@functools.cache
def _every_class() -> str:
    """A mark of each combining class, the highest first; all from an old Unicode, which every library knows."""
    old = unicodedata.ucd_3_2_0
    marks = [chr(code) for code in range(0xFFFF, 0x80, -1) if old.combining(chr(code))]
    of_class = {old.combining(m): m for m in marks if old.combining(m) == unicodedata.combining(m)}
    return "".join(of_class[number] for number in sorted(of_class, reverse=True))


@functools.cache
def _made_of() -> dict[str, list[str]]:
    """A character -> those whose canonical decompositions contain it."""
    wholes: dict[str, list[str]] = {}
    for character in map(chr, itertools.chain(*_OTHERS)):
        # "<" begins the compatibility decompositions.
        if unicodedata.decomposition(character)[:1] not in ("", "<") and _is_other(character):
            for part in unicodedata.normalize("NFD", character):
                wholes.setdefault(part, []).append(character)
    return wholes


def _is_other(character: str) -> bool:
    is_known = unicodedata.category(character) not in ("Cn", "Cs", "Co")
    return is_known and _is_in(character, _OTHERS) and not _is_in(character, _RUNS)


def _is_in(character: str, parts: tuple[range, ...]) -> bool:
    return any(ord(character) in part for part in parts)


def _in_every_place(character: str) -> str:
    """The character next to letters of both cases, a digit, a symbol, an apostrophe, a space and marks."""
    return f"a{character}A1{character}!{character}'{character} {character}q{_HIGHEST}{character}{_LOWEST}"


def _byte_names() -> list[str]:
    """[byte] -> its character in a byte-level vocabulary: itself if printable, otherwise one from U+0100 on."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(0x100) if byte not in shown]
    return [chr(byte) if byte in shown else chr(0x100 + hidden.index(byte)) for byte in range(0x100)]
