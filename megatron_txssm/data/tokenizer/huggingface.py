"""Exports a tokenizer for transformers: tokenizer.json and tokenizer_config.json, without code."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_txssm.data.tokenizer.install import install_tokenizer
from megatron_txssm.data.tokenizer.sentencepiece import load_tokenizer
from megatron_txssm.errors import UserError
from megatron_txssm.recipe.corpus.schema import TokenizerSource
from megatron_txssm.recipe.corpus.tokenizer import TokenizerFacts

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer
    from tokenizers.models import BPE, Unigram

# A space, as SentencePiece writes it.
_SPACE = "\u2581"


def export_tokenizer(
    source: TokenizerSource, folder: Path, text: str, vocab_size: int | None = None
) -> tuple[TokenizerFacts, list[int]]:
    """Write a tokenizer to `folder`, for a model of `vocab_size` tokens (None: enough for all of them).

    Returns its facts, and the tokens of `text`, a test text.

    UserError if it cannot be read, or if a SentencePiece model and its tokenizer.json give `text` different tokens.
    """
    from tokenizers import Tokenizer

    facts = install_tokenizer(source, folder)
    (folder / "facts.json").unlink()
    file, config_file = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if facts.type == "SentencePieceTokenizer":
        _from_sentencepiece(folder / "tokenizer.model").save(str(file))
        pad_token = _sentencepiece_padding(folder / "tokenizer.model", facts.eod)
    else:
        _leave_texts_alone(file)
        pad_token = json.loads(config_file.read_bytes()).get("pad_token")
    tokenizer = Tokenizer.from_file(str(file))
    pad = None if pad_token is None else tokenizer.token_to_id(pad_token)
    if pad is None or pad >= (vocab_size or pad + 1):
        # Padding is masked: without a padding token, any token will do.
        pad_token = facts.eod_token
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": facts.eod_token,
        "pad_token": pad_token,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokens = tokenizer.encode(text).ids
    if facts.type == "SentencePieceTokenizer" and tokens != load_tokenizer(source.model).EncodeAsIds(text):
        raise UserError(f"{source.model} cannot be expressed as a tokenizer.json: a test text becomes other tokens")
    return facts, tokens


def _leave_texts_alone(file: Path) -> None:
    """Remove added tokens, truncation and padding from a tokenizer.json: training used none of them."""
    described = json.loads(file.read_text(encoding="utf-8"))
    post = described.get("post_processor") or {}
    steps = post.get("processors", []) if post.get("type") == "Sequence" else [post]
    # The other processors add tokens; this one corrects offsets.
    kept = next((step for step in steps if step.get("type") == "ByteLevel"), None)
    if kept != described.get("post_processor") or described.get("truncation") or described.get("padding"):
        described |= {"post_processor": kept, "truncation": None, "padding": None}
        file.write_text(json.dumps(described, indent=2, ensure_ascii=False), encoding="utf-8")


def _sentencepiece_padding(model: Path, eod: int) -> str | None:
    pieces = load_tokenizer(model)
    pad = pieces.pad_id()
    return pieces.IdToPiece(pad) if pad >= 0 and pad != eod else None


def _from_sentencepiece(model: Path) -> "Tokenizer":
    """A tokenizer of the tokenizers library that gives the tokens of a SentencePiece model.

    For models of `train_sentencepiece`: no normalisation, no space added in front, rare characters as bytes.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers

    pieces = load_tokenizer(model)
    tokenizer = Tokenizer(_bpe(pieces) if _is_bpe(pieces) else _unigram(pieces))
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    special = [pieces.IdToPiece(n) for n in range(len(pieces)) if pieces.IsControl(n) or pieces.IsUnknown(n)]
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    return tokenizer


def _is_bpe(pieces: "SentencePieceProcessor") -> bool:
    """Whether a model is BPE: its scores count its merges, 0, -1, -2, …; a unigram model's are log-probabilities."""
    scores = [pieces.GetScore(n) for n in range(len(pieces)) if _is_text(pieces, n)]
    return all(score == round(score) for score in scores)


def _is_text(pieces: "SentencePieceProcessor", n: int) -> bool:
    return not (pieces.IsControl(n) or pieces.IsUnknown(n) or pieces.IsByte(n) or pieces.IsUnused(n))


def _bpe(pieces: "SentencePieceProcessor") -> "BPE":
    from tokenizers.models import BPE

    vocabulary = {pieces.IdToPiece(n): n for n in range(len(pieces))}
    scores = {piece: pieces.GetScore(n) for piece, n in vocabulary.items() if _is_text(pieces, n)}
    # SentencePiece merges the two neighbours whose union scores highest, wherever the union is divided.
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(scores, key=lambda piece: -scores[piece])
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    unknown = pieces.IdToPiece(pieces.unk_id())
    return BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)


def _unigram(pieces: "SentencePieceProcessor") -> "Unigram":
    from tokenizers.models import Unigram

    scored = [(pieces.IdToPiece(n), pieces.GetScore(n)) for n in range(len(pieces))]
    return Unigram(scored, unk_id=pieces.unk_id(), byte_fallback=True)


def padding_id(folder: Path) -> int:
    """The padding id of the tokenizer that `export_tokenizer` wrote to a folder."""
    from tokenizers import Tokenizer

    pad_token = json.loads((folder / "tokenizer_config.json").read_bytes())["pad_token"]
    pad = Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id(pad_token)
    assert pad is not None
    return pad
