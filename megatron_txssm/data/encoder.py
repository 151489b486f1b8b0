"""From texts to token ids: gigatoken, checked against the reference tokenizer, or the reference itself.

gigatoken gives the ids of `tokenizers` and `sentencepiece` tens of times faster. Its word is not taken: `compare`
encodes a sample of the documents with the reference as well, and a difference stops the task.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_txssm.data.manifest import TokenizerFacts
from megatron_txssm.data.tokenizer_files import tokenizer_file
from megatron_txssm.errors import UserError

# gigatoken keeps every word it has met (measured: 1 byte of memory per byte of random text) and cannot be told to
# forget; a fresh one costs 0.1 s.
RENEW_AFTER_BYTES = 256_000_000
# What tokenizers have rules for, and so few texts hold that a sample would miss it.
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
    """Texts to ids, without any token that is not in the text."""

    # Library and version.
    name: str
    # Whether its ids are right by definition.
    is_reference: bool

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(the ids of all texts one after another, the number of ids of each)."""
        ...


def load_encoders(folder: Path, facts: TokenizerFacts, choice: str = "auto") -> tuple[Encoder, Encoder]:
    """(the encoder, the reference) of a corpus's tokenizer/ folder.

    choice: `reference` for the reference as the encoder, too; `auto` for gigatoken where it knows the tokenizer. The
    encoder's `name` says which it became, and why.
    """
    path = tokenizer_file(folder, facts)
    reference = _SentencePiece(path) if facts.type == "SentencePieceTokenizer" else _Tokenizers(path)
    if choice == "reference":
        return reference, reference
    try:
        fast = _Gigatoken(path)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of its Rust code is no Exception
        reference.name += f" (gigatoken cannot load it: {str(error).strip().partition(chr(10))[0]})"
        return reference, reference
    # Added tokens, too, have rules of their own.
    added = [text for token in fast.added_tokens for text in (f"a{token}b", f"a {token} b", f"{token} \n{token}")]
    probes = [*PROBES, *added]
    try:
        compare(fast, reference, probes, list(map(repr, probes)))
    except UserError as error:
        reference.name += f" (gigatoken does not follow its rules: {str(error).partition(';')[0]})"
        return reference, reference
    return fast, reference


def compare(encoder: Encoder, reference: Encoder, texts: Sequence[str], places: Sequence[str]) -> None:
    """UserError for the first text to which the two give different ids; `places` name the texts."""
    if not texts:
        return
    (ours, our_lengths), (theirs, their_lengths) = encoder.encode(texts), reference.encode(texts)
    our_start = their_start = 0
    for place, ours_here, theirs_here in zip(places, our_lengths, their_lengths, strict=True):
        a = ours[our_start : our_start + ours_here]
        b = theirs[their_start : their_start + theirs_here]
        our_start, their_start = our_start + ours_here, their_start + theirs_here
        if not np.array_equal(a, b):
            both = min(len(a), len(b))
            first = int(np.argmax(a[:both] != b[:both])) if (a[:both] != b[:both]).any() else both
            raise UserError(
                f"{place}: {encoder.name} and {reference.name} differ from token {first} on "
                f"({a[first : first + 5].tolist()} against {b[first : first + 5].tolist()}); "
                "set tokenizer.encoder: reference, which is slower and right, and please report the text"
            )


class _Gigatoken:
    is_reference = False

    def __init__(self, path: Path) -> None:
        import gigatoken

        self._content = path.read_bytes()
        if path.suffix == ".model":
            self._content = _without_control_tokens(gigatoken.Tokenizer.from_sentencepiece(self._content))
        self._load = gigatoken.Tokenizer.from_json
        self._tokenizer = self._load(self._content)
        self._bytes = 0
        self.added_tokens: list[str] = [token["content"] for token in json.loads(self._content).get("added_tokens", ())]
        self.name = f"gigatoken {_version('gigatoken')}"

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        if self._bytes > RENEW_AFTER_BYTES:
            self._tokenizer, self._bytes = self._load(self._content), 0
        self._bytes += sum(map(len, texts))
        # One by one is as fast as its batches, which cost 0.4 s of imports; tasks are what runs in parallel.
        return _joined([self._tokenizer.encode(text) for text in texts])


def _without_control_tokens(tokenizer: Any) -> str:
    """A SentencePiece model in gigatoken's terms, to which "</s>" in a text is text, as it is to sentencepiece."""
    described = json.loads(tokenizer._hf_json)
    described["added_tokens"] = [token for token in described["added_tokens"] if not token["special"]]
    return json.dumps(described)


class _Tokenizers:
    is_reference = True

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(path))
        # Some files carry settings of the training script they come from.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.name = f"tokenizers {_version('tokenizers')}"

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return _joined([e.ids for e in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)])


class _SentencePiece:
    is_reference = True

    def __init__(self, path: Path) -> None:
        from megatron_txssm.data.tokenizer import load_tokenizer

        self._model = load_tokenizer(path)
        self.name = f"sentencepiece {_version('sentencepiece')}"

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return _joined(self._model.encode(list(texts), out_type=int))


def _joined(ids: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
    return np.concatenate([np.zeros(0, np.uint32), *(np.asarray(text, dtype=np.uint32) for text in ids)]), lengths


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)
