"""The encoder of one task: gigatoken, and the reference for texts on which the two may differ.

Texts with doubtful characters (see `doubtful`) are encoded by the reference, a sample of the others by both. Where the
two differ, the reference is right, and the characters at that place are doubtful for the rest of the task. Which ones
are doubtful depends only on the tokenizer and the task's earlier documents, so a task gives the same bytes every time.
"""

import zlib
from collections.abc import Sequence
from typing import TypedDict

import numpy as np
from datatrove.data import Document
from datatrove.utils.logging import logger

from megatron_txssm.data.tokenizer.encoder import Encoder, FastEncoder, difference

# Encoded by both: one document in 400, and the first ones up to this many bytes of text.
COMPARED_SHARE = 400
COMPARED_FIRST_BYTES = 20_000
# Limit on encodings spent on finding the characters that make a difference.
_LARGEST_SEARCH = 400


class Difference(TypedDict):
    """A document whose ids from the two encoders differ."""

    document: str
    detail: str
    # Such as U+1234: doubtful from then on. None: every text is.
    characters: list[str]


class CheckedEncoder:
    """Encodes texts without adding tokens; without a fast encoder, the reference encodes them all."""

    def __init__(self, fast: FastEncoder | None, reference: Encoder) -> None:
        self.fast, self.reference = fast, reference
        self.name = reference.name if fast is None else fast.name
        # Numbers of documents encoded by both, and by the reference although there is a fast encoder.
        self.compared = self.referred = 0
        self.differences: list[Difference] = []
        self._first_bytes = 0
        self._all_doubtful = False
        # Doubtful characters besides the fast encoder's.
        self._found = np.zeros(0, dtype=np.uint32)

    def encode(self, documents: Sequence[Document]) -> list[np.ndarray]:
        """The ids of each document's text."""
        texts = [document.text for document in documents]
        if self.fast is None:
            return self.reference.encode(texts)
        self._compare([d for d in documents if self._is_compared(d.text) and not self._is_doubtful(d.text)])
        doubtful = [self._is_doubtful(text) for text in texts]
        self.referred += sum(doubtful)
        ids = iter(self.fast.encode([text for text, doubt in zip(texts, doubtful, strict=True) if not doubt]))
        return [
            self.reference.encode([text])[0] if doubt else next(ids)
            for text, doubt in zip(texts, doubtful, strict=True)
        ]

    def _is_compared(self, text: str) -> bool:
        if self._first_bytes < COMPARED_FIRST_BYTES:
            self._first_bytes += len(text)
            return True
        return zlib.crc32(text.encode()) % COMPARED_SHARE == 0

    def _compare(self, documents: Sequence[Document]) -> None:
        assert self.fast is not None
        texts = [document.text for document in documents]
        self.compared += len(texts)
        for document, ours, theirs in zip(
            documents, self.fast.encode(texts), self.reference.encode(texts), strict=True
        ):
            if not np.array_equal(ours, theirs):
                self._widen(document, difference(ours, theirs))

    def _is_doubtful(self, text: str) -> bool:
        if self._all_doubtful:
            return True
        if text.isascii():
            return False
        assert self.fast is not None
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        return bool(self.fast.doubtful(codes).any() or (self._found.size and np.isin(codes, self._found).any()))

    def _widen(self, document: Document, detail: str) -> None:
        """From now on, encode texts like this one by the reference."""
        assert self.fast is not None
        characters = sorted({c for c in self._smallest_difference(document.text) if not c.isascii()})
        if characters:
            self._found = np.union1d(self._found, np.array(list(map(ord, characters)), np.uint32))
        else:
            self._all_doubtful = True
        names = [f"U+{ord(character):04X}" for character in characters]
        self.differences.append({"document": document.id, "detail": detail, "characters": names})
        logger.warning(
            f"{document.id}: {self.fast.name} and {self.reference.name}: {detail}; the latter is right, and encodes "
            f"{'texts with ' + ', '.join(names) if names else 'every text'} for the rest of the task"
        )

    def _smallest_difference(self, text: str) -> str:
        """A text with parts removed, on which the two still differ."""
        tries, step = 0, len(text) // 2
        while step:
            for start in range(0, len(text), step):
                shorter = text[:start] + text[start + step :]
                tries += 1
                if tries > _LARGEST_SEARCH:
                    return text
                if self._differs(shorter):
                    text = shorter
                    break
            else:
                step //= 2
            step = min(step, len(text) // 2)
        return text

    def _differs(self, text: str) -> bool:
        assert self.fast is not None
        return not np.array_equal(self.fast.encode([text])[0], self.reference.encode([text])[0])
