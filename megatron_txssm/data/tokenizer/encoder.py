"""Encodes texts to token ids: with gigatoken, or with the reference tokenizer.

gigatoken gives the ids of `tokenizers` and `sentencepiece` tens of times faster; `checked_encoder` verifies them.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_txssm.data.tokenizer.doubtful import DoubtfulCharacters, is_byte_level, shows_cuts
from megatron_txssm.data.tokenizer.install import tokenizer_file
from megatron_txssm.recipe.corpus.tokenizer import TokenizerFacts

# gigatoken caches every word (measured: 1 byte of memory per byte of random text), and the cache cannot be cleared; a
# new instance costs 0.1 s.
RENEW_AFTER_BYTES = 256_000_000
# Texts for which tokenizers have rules, and which are so rare that a sample would miss them.
PROBES = (
    "\r\na line of DOS\r\n",
    "  spaces  ",
    "\n\n\n",
    "\t\ta\tb\v\f",
    "ﬁ ½ Ａ ™ e\u0301",
    "\u00a0\u2003\u200b\ufeff",
    "a\0b",
)


class Encoder(Protocol):
    """Encodes texts without adding tokens."""

    # Library and version.
    name: str

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text."""
        ...


class FastEncoder(Encoder, Protocol):
    """An encoder whose ids may differ from the reference's."""

    def doubtful(self, codes: np.ndarray) -> np.ndarray:
        """[n] code points -> [n] whether the ids may differ on texts that contain it."""
        ...


def load_encoders(folder: Path, facts: TokenizerFacts, choice: str = "auto") -> tuple[FastEncoder | None, Encoder]:
    """(fast encoder or None, reference) for a corpus's tokenizer/ folder.

    choice: `reference` for the reference alone; `auto` for gigatoken, too, if it supports the tokenizer. If it does
    not, the reference's `name` states the reason.
    """
    path = tokenizer_file(folder, facts)
    is_sentencepiece = facts.type == "SentencePieceTokenizer"
    reference = _SentencePiece(path) if is_sentencepiece else _Tokenizers(path.read_bytes())
    if choice == "reference":
        return None, reference
    try:
        fast = _Gigatoken(path.read_bytes(), is_sentencepiece)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in its Rust code is not an Exception
        reference.name += f" (gigatoken cannot load it: {str(error).strip().partition(chr(10))[0]})"
        return None, reference
    # Added tokens have their own rules.
    added = [text for token in fast.added_tokens for text in (f"a{token}b", f"a {token} b", f"{token} \n{token}")]
    probes = [*PROBES, *added]
    for probe, ours, theirs in zip(probes, fast.encode(probes), reference.encode(probes), strict=True):
        if not np.array_equal(ours, theirs):
            reference.name += f" (gigatoken does not follow its rules: {probe!r}: {difference(ours, theirs)})"
            return None, reference
    return fast, reference


def difference(ours: np.ndarray, theirs: np.ndarray) -> str:
    """Where two different lists of ids begin to differ."""
    both = min(len(ours), len(theirs))
    differs = ours[:both] != theirs[:both]
    first = int(np.argmax(differs)) if differs.any() else both
    here, there = ours[first : first + 5].tolist(), theirs[first : first + 5].tolist()
    return f"the ids differ from token {first} on ({here} against {there})"


class _Gigatoken:
    def __init__(self, content: bytes, is_sentencepiece: bool = False) -> None:
        import gigatoken

        self._is_sentencepiece = is_sentencepiece
        self._content = content
        if is_sentencepiece:
            self._content = _without_control_tokens(gigatoken.Tokenizer.from_sentencepiece(content)).encode()
        self._load = gigatoken.Tokenizer.from_json
        self._tokenizer = self._load(self._content)
        self._bytes = 0
        self._doubtful: DoubtfulCharacters | None = None
        # Parsed once: a large vocabulary takes time.
        described = json.loads(self._content)
        self.added_tokens: list[str] = [token["content"] for token in described.get("added_tokens", ())]
        self._shows_cuts = shows_cuts(described) if is_byte_level(described) else None
        self.name = f"gigatoken {_version('gigatoken')}"

    def doubtful(self, codes: np.ndarray) -> np.ndarray:
        if self._is_sentencepiece:
            # Both follow the table in the model, regardless of their Unicode versions.
            return np.zeros(len(codes), dtype=bool)
        if self._doubtful is None:
            content = self._shows_cuts or self._content
            self._doubtful = DoubtfulCharacters(_Gigatoken(content).encode, _Tokenizers(content).encode)
        return self._doubtful.among(codes)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self._bytes > RENEW_AFTER_BYTES:
            self._tokenizer, self._bytes = self._load(self._content), 0
        self._bytes += sum(map(len, texts))
        # One by one is as fast as its batches, which cost 0.4 s of imports; parallelism comes from the tasks.
        return [self._tokenizer.encode(text) for text in texts]


def _without_control_tokens(tokenizer: Any) -> str:
    """A SentencePiece model in gigatoken's format that reads "</s>" in a text as text, as sentencepiece does."""
    described = json.loads(tokenizer._hf_json)
    described["added_tokens"] = [token for token in described["added_tokens"] if not token["special"]]
    return json.dumps(described)


class _Tokenizers:
    def __init__(self, content: bytes) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_buffer(content)
        # Some files contain truncation and padding settings of a training script.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.name = f"tokenizers {_version('tokenizers')}"

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.uint32) for encoding in encodings]


class _SentencePiece:
    def __init__(self, path: Path) -> None:
        from megatron_txssm.data.tokenizer.sentencepiece import load_tokenizer

        self._model = load_tokenizer(path)
        self.name = f"sentencepiece {_version('sentencepiece')}"

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.asarray(ids, dtype=np.uint32) for ids in self._model.encode(list(texts), out_type=int)]


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)
