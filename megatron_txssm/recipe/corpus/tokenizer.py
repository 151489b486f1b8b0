"""The tokenizer of a corpus, used by recipes that name the corpus."""

import json
from dataclasses import dataclass
from pathlib import Path

from megatron_txssm.choices import CorpusTokenizerType
from megatron_txssm.errors import UserError
from megatron_txssm.recipe.corpus.loader import how_to_make


@dataclass(frozen=True)
class TokenizerFacts:
    """The tokenizer of a corpus."""

    # Megatron's class.
    type: CorpusTokenizerType
    # SHA-256 of tokenizer.json or tokenizer.model.
    fingerprint: str
    # One more than the largest id.
    vocab_size: int
    eod: int
    eod_token: str


class NoCorpus(UserError):
    """A directory holds no corpus, or an unfinished one; the message names the command that makes it."""


def tokenizer_model(directory: Path, facts: TokenizerFacts) -> str:
    """The value of Megatron's --tokenizer-model: the copy in a corpus directory, or beside checkpoints."""
    folder = directory / "tokenizer"
    return str(folder / "tokenizer.model" if facts.type == "SentencePieceTokenizer" else folder)


def read_tokenizer_facts(directory: Path) -> TokenizerFacts:
    """The facts in a corpus directory; NoCorpus if it holds no corpus."""
    path = directory / "tokenizer" / "facts.json"
    try:
        return TokenizerFacts(**json.loads(path.read_bytes()))
    except FileNotFoundError:
        raise NoCorpus(
            f"{directory} holds no corpus (no {path.relative_to(directory)}); {how_to_make(directory)}"
        ) from None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not readable ({error}); shard the corpus again") from None
