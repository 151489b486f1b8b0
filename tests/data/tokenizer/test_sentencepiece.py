"""The tokenizer gives every text back, trains to the same bytes, and Megatron builds the same one from its file."""

import argparse
import inspect
import json

import pytest

from megatron_txssm.data.corpus import shard
from megatron_txssm.data.tokenizer import sentencepiece
from megatron_txssm.data.tokenizer.install import install_tokenizer
from megatron_txssm.data.tokenizer.sentencepiece import (
    is_representable,
    load_tokenizer,
    train_sentencepiece,
)
from megatron_txssm.demo import corpus as demo_corpus
from megatron_txssm.errors import UserError
from megatron_txssm.recipe.corpus.schema import TokenizerSource

VOCAB_SIZE = 600
TEXTS = [inspect.getsource(module) for module in (json, argparse, demo_corpus, shard, sentencepiece)]

AWKWARD_TEXTS = [
    "",
    "\n",
    "\n\n\n",
    " ",
    "   leading, trailing   ",
    "\tdef f(x):\n\t\treturn x  # tab\n",
    "if x:\n        pass\n\n\n    else:\n",
    "windows\r\nline\rends\f\v",
    "a  b   c    d\n \n  \n",
    "naïve Ωμέγα 漢字 🙂 e\u0301 \u00a0\u200b\ufeff",
    "ﬁ ½ Ａ ™",
    "</s> <unk> <s> <0x0A> <0x41>",
    "x" * 5000,
    "".join(map(chr, range(1, 0x250))),
]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return train_sentencepiece(TEXTS, tmp_path_factory.mktemp("tokenizer") / "code", VOCAB_SIZE)


@pytest.mark.parametrize("text", AWKWARD_TEXTS + TEXTS)
def test_decode_gives_the_text_back(model_path, text):
    processor = load_tokenizer(model_path)
    ids = processor.encode(text)
    assert processor.decode(ids) == text
    assert processor.unk_id() not in ids
    assert processor.eos_id() not in ids


def test_vocabulary_is_as_asked_and_compresses(model_path):
    processor = load_tokenizer(model_path)
    assert processor.get_piece_size() == VOCAB_SIZE
    assert len(TEXTS[1]) / len(processor.encode(TEXTS[1])) > 1.7


def test_the_two_characters_sentencepiece_keeps_are_known():
    assert is_representable("▂ plain")
    assert not is_representable("a \u2581 bar")
    assert not is_representable("a \0 byte")


def test_same_texts_same_bytes(model_path, tmp_path):
    again = train_sentencepiece(iter(TEXTS), tmp_path / "again", VOCAB_SIZE)
    assert again.read_bytes() == model_path.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again.model"]


def test_megatron_builds_the_same_tokenizer(model_path):
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    arguments = argparse.Namespace(
        tokenizer_type="SentencePieceTokenizer",
        tokenizer_model=str(model_path),
        chat_template=None,
        tokenizer_sentencepiece_ignore_extra_whitespaces=True,
        tokenizer_sentencepiece_legacy=False,
        special_tokens=None,
        metadata_path=None,
        pad_vocab_size=False,
    )
    megatron_tokenizer = build_tokenizer(arguments)
    processor = load_tokenizer(model_path)
    assert megatron_tokenizer.vocab_size == VOCAB_SIZE
    assert megatron_tokenizer.eod == processor.eos_id() >= 0
    for text in (*AWKWARD_TEXTS, TEXTS[0]):
        ids = megatron_tokenizer.tokenize(text)
        assert ids == processor.encode(text)
        assert megatron_tokenizer.detokenize([*ids, megatron_tokenizer.eod]) == text


def test_a_tokenizer_without_end_of_document_is_refused(tmp_path):
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[0].splitlines()), model_writer=model, vocab_size=100, eos_id=-1, minloglevel=2
    )
    (tmp_path / "x.model").write_bytes(model.getvalue())
    with pytest.raises(UserError, match="no end-of-document token"):
        install_tokenizer(
            TokenizerSource(type="SentencePieceTokenizer", model=str(tmp_path / "x.model")), tmp_path / "corpus"
        )


@pytest.mark.parametrize("vocab_size", [100, 1_000_000])
def test_an_impossible_vocabulary_is_a_user_error(tmp_path, vocab_size):
    with pytest.raises(UserError, match=f"vocab_size={vocab_size}: "):
        train_sentencepiece(TEXTS[:1], tmp_path / "x", vocab_size)
    assert list(tmp_path.iterdir()) == []


def test_missing_and_damaged_models(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_tokenizer(tmp_path / "x.model")
    (tmp_path / "x.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path / "x.model")
