"""A tokenizer as transformers loads it: tokenizer.json and tokenizer_config.json, and nothing that runs code."""

import json
from pathlib import Path
from typing import Any

from megatron_txssm.data.corpus_recipe import TokenizerSource
from megatron_txssm.data.manifest import TokenizerFacts
from megatron_txssm.data.tokenizer import load_tokenizer
from megatron_txssm.data.tokenizer_files import install_tokenizer
from megatron_txssm.errors import UserError

# A space, as SentencePiece writes it.
_SPACE = "\u2581"


def export_tokenizer(source: TokenizerSource, folder: Path, text: str) -> tuple[TokenizerFacts, list[int]]:
    """Write a tokenizer to `folder`; returns what is to be known of it, and the tokens of a test text.

    UserError where it cannot be read, or a SentencePiece model gives `text` other tokens than its tokenizer.json.
    """
    from tokenizers import Tokenizer

    facts = install_tokenizer(source, folder)
    (folder / "facts.json").unlink()
    if facts.type == "SentencePieceTokenizer":
        _from_sentencepiece(folder / "tokenizer.model").save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": facts.eod_token,
        # Padding is masked: any token serves.
        "pad_token": facts.eod_token,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokens = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    if facts.type == "SentencePieceTokenizer" and tokens != load_tokenizer(source.model).EncodeAsIds(text):
        raise UserError(f"{source.model} cannot be expressed as a tokenizer.json: a test text becomes other tokens")
    return facts, tokens


def _from_sentencepiece(model: Path) -> Any:
    """A SentencePiece model's tokens from the tokenizers library, for models as `train_sentencepiece` makes them.

    That is: no normalisation, no space put in front, rare characters as bytes.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers

    pieces = load_tokenizer(model)
    tokenizer = Tokenizer(_bpe(pieces) if _is_bpe(pieces) else _unigram(pieces))
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    special = [pieces.IdToPiece(n) for n in range(len(pieces)) if pieces.IsControl(n) or pieces.IsUnknown(n)]
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    return tokenizer


def _is_bpe(pieces: Any) -> bool:
    """BPE's scores count its merges, 0, -1, -2, …; a unigram model's are log-probabilities."""
    scores = [pieces.GetScore(n) for n in range(len(pieces)) if _is_text(pieces, n)]
    return all(score == round(score) for score in scores)


def _is_text(pieces: Any, n: int) -> bool:
    return not (pieces.IsControl(n) or pieces.IsUnknown(n) or pieces.IsByte(n) or pieces.IsUnused(n))


def _bpe(pieces: Any) -> Any:
    from tokenizers.models import BPE

    vocabulary = {pieces.IdToPiece(n): n for n in range(len(pieces))}
    scores = {piece: pieces.GetScore(n) for piece, n in vocabulary.items() if _is_text(pieces, n)}
    # SentencePiece joins the two neighbours whose union scores highest, however that union divides.
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(scores, key=lambda piece: -scores[piece])
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    unknown = pieces.IdToPiece(pieces.unk_id())
    return BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)


def _unigram(pieces: Any) -> Any:
    from tokenizers.models import Unigram

    scored = [(pieces.IdToPiece(n), pieces.GetScore(n)) for n in range(len(pieces))]
    return Unigram(scored, unk_id=pieces.unk_id(), byte_fallback=True)
