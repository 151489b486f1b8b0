"""SentencePiece tokenizers: training and loading.

The trained model is the one Megatron loads with `--tokenizer-type SentencePieceTokenizer --tokenizer-model X.model`.
"""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_txssm.errors import UserError
from megatron_txssm.files import write_file_atomically

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

# SentencePiece encodes a space as the first character and decodes every such character as a space, so a text that
# contains it does not survive a round trip. The second, NUL, ends a sentence for the trainer. Such texts are refused.
UNREPRESENTABLE_CHARACTERS = ("\u2581", "\0")


def is_representable(text: str) -> bool:
    """Whether decode(encode(text)) returns the text: false with the two characters that SentencePiece reserves."""
    return not any(character in text for character in UNREPRESENTABLE_CHARACTERS)


def train_sentencepiece(
    texts: Iterable[str],
    model_prefix: str | Path,
    vocab_size: int,
    *,
    model_type: str = "bpe",
    character_coverage: float = 0.9999,
) -> Path:
    """Train a lossless SentencePiece model on whole texts; returns the path of the model, `model_prefix` + ".model".

    The same texts in the same order give the same bytes. Ids: 0 unknown (never produced: rare characters fall back to
    bytes), 1 end of document, 2 to 257 the bytes, then the pieces.

    Measured on 10 MB of Python source, vocabulary 4,096: BPE trains in 2 s (3.51 characters per token), the unigram
    model in 46 s without compressing better; texts fed whole, so that ":\\n" may become a piece, need 7% fewer tokens
    than texts fed line by line.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(text for text in texts if text and is_representable(text)),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            byte_fallback=True,
            # Spaces, tabs, newlines and indentation are preserved.
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            # Longer sentences would be dropped silently.
            max_sentence_length=2**30,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            # One thread: the unigram trainer's sums depend on the number of threads.
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        # The message is "INTERNAL: file(line) [condition] what went wrong".
        reason = str(error).strip().rpartition("] ")[2] or type(error).__name__
        raise UserError(
            f"vocab_size={vocab_size}: SentencePiece cannot train a {model_type} model on these texts: {reason} "
            "(Two special ids and 256 bytes come before the characters: 512 to 32768 suits most texts.)"
        ) from error
    path = Path(f"{model_prefix}.model")
    write_file_atomically(path, model.getvalue())
    return path


def load_tokenizer(model_path: str | Path) -> "SentencePieceProcessor":
    """Load a SentencePiece model; UserError if the file is missing or damaged."""
    import sentencepiece

    path = Path(model_path)
    if not path.is_file():
        raise UserError(
            f"tokenizer_model={path}: no such file; train one (txssm data train-tokenizer) or correct the path"
        )
    tokenizer = sentencepiece.SentencePieceProcessor()
    try:
        tokenizer.LoadFromSerializedProto(path.read_bytes())
    except (RuntimeError, OSError) as error:
        raise UserError(f"tokenizer_model={path}: not a SentencePiece model; train or copy it again") from error
    return tokenizer
