"""Which characters two encoders may read differently: made-up encoders, whose differences are known."""

from collections.abc import Callable, Sequence

import numpy as np

from megatron_txssm.data.tokenizer.doubtful import BLOCK, CODE_POINTS, DoubtfulCharacters, Encode


def code_points(texts: Sequence[str]) -> list[np.ndarray]:
    return [np.array(list(map(ord, text)), np.uint32) for text in texts]


def differing_where(differs: Callable[[str], bool]) -> Encode:
    return lambda texts: [ids + differs(text) for ids, text in zip(code_points(texts), texts, strict=True)]


def doubtful(differs: Callable[[str], bool], asked: Sequence[int]) -> set[int]:
    answers = DoubtfulCharacters(differing_where(differs), code_points)
    return {code for code in asked if answers.among(np.array([code], np.uint32))[0]}


def test_a_character_is_doubtful_where_a_text_with_it_differs() -> None:
    # What Python itself does not know is not asked, so doubtful.
    unknown = {code for code in range(0xC00, 0xC80) if not chr(code).isprintable()}
    assert doubtful(lambda text: "\u0c3d" in text, range(0xC00, 0xC80)) == unknown | {0xC3D}


def test_only_what_occurs_is_asked_about_and_once() -> None:
    asked: list[str] = []

    def counted(texts: Sequence[str]) -> list[np.ndarray]:
        asked.extend(texts)
        return code_points(texts)

    answers = DoubtfulCharacters(counted, code_points)
    assert not answers.among(np.arange(0x80)).any() and not asked
    assert not answers.among(np.array([0x61, 0x4E2D])).any()
    assert {ord(character) // BLOCK for text in asked for character in text} == {0x61 // BLOCK, 0x4E2D // BLOCK}
    del asked[:]
    assert not answers.among(np.array([0x4E2D, 0x4E2E])).any() and not asked
    # Planes that are not asked about.
    assert answers.among(np.array([0x20000, CODE_POINTS - 1])).all() and not any(asked)


def test_a_part_is_doubtful_where_what_it_makes_differs() -> None:
    # U+0958 is U+0915 and a nukta, U+093C.
    def differs(text: str) -> bool:
        return "\u0915\u093c" in text

    assert doubtful(differs, range(0x900, 0x980)) >= {0x915, 0x93C, 0x958}
    assert not doubtful(differs, [0x901, 0xE9])


def test_a_difference_between_neighbours_makes_all_of_a_block_doubtful() -> None:
    def differs(text: str) -> bool:
        return text.count("A1") > 1

    assert doubtful(differs, [0x410, 0x4E2D]) == {0x410}


def test_a_mark_is_doubtful_that_is_sorted_otherwise_among_others() -> None:
    # Only a text with a mark of every class has this one, a vowel point, beside it.
    assert 0x301 in doubtful(lambda text: "\u05b0" in text and "q\u0301" in text, [0x301, 0xE9])


def test_the_answers_depend_on_no_order() -> None:
    def differs(text: str) -> bool:
        return "\u0308" in text or "\u0430" in text

    codes = [*range(0x80, 0x600), *range(0x1E00, 0x2000)]
    together = DoubtfulCharacters(differing_where(differs), code_points).among(np.array(codes))
    expected = {code for code, answer in zip(codes, together, strict=True) if answer}
    assert doubtful(differs, codes) == doubtful(differs, codes[::-1]) == expected
    assert {0xE4, 0x308, 0x430} <= expected and 0xE9 not in expected
