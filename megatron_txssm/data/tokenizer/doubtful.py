"""Which characters the fast encoder may read otherwise than the reference: they follow different versions of Unicode.

A mark that a library does not know stays where it is, one that it knows is sorted among the others (NFC); a letter of
a new script is a symbol to the older library. Which characters these are is asked of the two libraries, under the
normaliser and the cutting rules of the tokenizer at hand. What is not asked, such as characters that Python itself
does not know, is doubtful.

A block of characters is asked about when a text first holds one of it: all of them would take a second of every
process, and a task may be its only one. The answer depends on the block alone, so a task's is the same in any process.
"""

import functools
import itertools
import json
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

CODE_POINTS = 0x110000
# Fewer would cost more calls, more would be about characters that no text holds.
BLOCK = 8
# Where neighbours are of one kind: CJK ideographs, Hangul syllables, private use. Those beyond U+20000 are not asked.
_RUNS = (range(0x3400, 0x4DC0), range(0x4E00, 0xA000), range(0xAC00, 0xD7A4), range(0xE000, 0xF900))
_OTHERS = (range(0x80, 0x20000), range(0xE0000, 0xE0200))
# Marks of the lowest and of the highest combining class: only a starter stays between them in this order.
_HIGHEST, _LOWEST = "\u0345", "\u0334"

_SURE, _DOUBTFUL, _NOT_ASKED = np.arange(3, dtype=np.uint8)

# Texts to the ids of each.
Encode = Callable[[Sequence[str]], Sequence[np.ndarray]]


class _Question(NamedTuple):
    """A text, and the characters that are doubtful where the two libraries differ on it."""

    text: str
    characters: str


class DoubtfulCharacters:
    """Those on which two encoders may differ."""

    def __init__(self, fast: Encode, reference: Encode) -> None:
        self._fast, self._reference = fast, reference
        self._answers = np.full(CODE_POINTS, _NOT_ASKED)
        self._answers[:0x80] = _SURE

    def among(self, codes: np.ndarray) -> np.ndarray:
        """[n] code points -> [n] whether the two may differ on a text that holds it."""
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
            # Where no single one differs, it is a matter of neighbours.
            sure -= {character for question in differing or questions for character in question.characters}
        self._answers[block] = [_SURE if chr(code) in sure else _DOUBTFUL for code in block]

    def _differ(self, text: str) -> bool:
        return not np.array_equal(self._fast([text])[0], self._reference([text])[0])


def shows_cuts(tokenizer: dict[str, Any]) -> bytes:
    """The tokenizer.json of a byte-level one with other tokens, which show how a text was normalised and cut.

    The real ones would not: two libraries that cut "ab" differently agree wherever no token spans a and b.
    """
    names = _byte_names()
    pairs = [(a, b) for a in b"aA1!' q" for b in range(0x80, 0x100)]
    pairs += [(b, a) for a, b in pairs] + [(a, b) for a in range(0x80, 0xC0) for b in range(0xC2, 0xF5)]
    merges = [[names[a], names[b]] for a, b in pairs]
    vocab = {token: i for i, token in enumerate([*names, *map("".join, merges)])}
    model = tokenizer["model"] | {"vocab": vocab, "merges": merges, "unk_token": None}
    return json.dumps(tokenizer | {"model": model, "added_tokens": [], "post_processor": None}).encode()


def is_byte_level(tokenizer: dict[str, Any]) -> bool:
    """Whether its tokens are strings of bytes, so that `shows_cuts` can replace them."""
    return tokenizer["model"]["type"] == "BPE" and '"ByteLevel"' in json.dumps(tokenizer.get("pre_tokenizer"))


def _questions(block: range) -> Iterator[_Question]:
    """About those of a block, and about the characters that are made of them."""
    characters = [chr(code) for code in block if unicodedata.category(chr(code)) not in ("Cn", "Cs")]
    # A letter before them shows whether they are letters, too.
    yield from (_Question("a" + character, character) for character in characters if _is_in(character, _RUNS))
    others = [character for character in characters if _is_other(character)]
    composed = {whole for part in others for whole in _made_of().get(part, ())}
    for character in [*others, *sorted(composed - set(others))]:
        parts = unicodedata.normalize("NFD", character)
        yield _Question(_in_every_place(character) + (parts if parts != character else ""), character + parts)
    for mark in others:
        if unicodedata.combining(mark):
            # Which place it gets among marks of all classes: from either end, it is moved to where its class is.
            yield _Question(f"q{mark}{_every_class()}q{_every_class()}{mark}", mark)


@functools.cache
def _every_class() -> str:
    """A mark of each combining class, the highest first; all of an old Unicode, which every library knows."""
    old = unicodedata.ucd_3_2_0
    marks = [chr(code) for code in range(0xFFFF, 0x80, -1) if old.combining(chr(code))]
    of_class = {old.combining(m): m for m in marks if old.combining(m) == unicodedata.combining(m)}
    return "".join(of_class[number] for number in sorted(of_class, reverse=True))


@functools.cache
def _made_of() -> dict[str, list[str]]:
    """A character -> those whose canonical decompositions hold it."""
    wholes: dict[str, list[str]] = {}
    for character in map(chr, itertools.chain(*_OTHERS)):
        # "<" begins the other decompositions.
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
    """Beside letters of both cases, number, symbol, contraction, space and marks."""
    return f"a{character}A1{character}!{character}'{character} {character}q{_HIGHEST}{character}{_LOWEST}"


def _byte_names() -> list[str]:
    """[byte] -> its character in a byte-level vocabulary: itself where it can be seen, else one from U+0100 on."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(0x100) if byte not in shown]
    return [chr(byte) if byte in shown else chr(0x100 + hidden.index(byte)) for byte in range(0x100)]
