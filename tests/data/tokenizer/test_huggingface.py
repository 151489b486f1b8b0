"""export_tokenizer: what transformers loads gives the ids that training used, on any text."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from megatron_txssm.cli.main import main
from megatron_txssm.convert.proof.proof import sample_text
from megatron_txssm.data.tokenizer.encoder import load_encoders
from megatron_txssm.data.tokenizer.huggingface import export_tokenizer, padding_id
from megatron_txssm.data.tokenizer.install import install_tokenizer
from megatron_txssm.data.tokenizer.sentencepiece import load_tokenizer, train_sentencepiece
from megatron_txssm.errors import UserError
from megatron_txssm.recipe.corpus.schema import TokenizerSource
from tests.convert.untrained import make_run
from tests.data.corpus_recipes import byte_level_bpe

TEXTS = (
    "",
    " ",
    "a",
    " leading and trailing ",
    "two  spaces,   three,\tone tab,\t\ttwo\n\n\nthree lines\r\n",
    "    def indented(value):\n        return value + 1\n",
    "digits 0 12 345 6789 10000000 3.14159",
    "naïve café, Ünïcödé, Straße, e\u0301 as two",
    "日本語のテキスト。中文文本，한국어",
    "emoji 🙂👩‍👩‍👧‍👦🏳️‍🌈 and flags 🇩🇪",
    "עברית العربية हिन्दी ไทย",
    "zero\u200bwidth, \ufeffmark, \u00a0no break, \u3000wide",
    "math ∑ᵢ xᵢ² ≤ ∞ and control \x01\x1f",
    "</s> <unk> <0x41> <s> written as text",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    sample_text()[:5000],
)


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def sentencepiece(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    texts = [sample_text()[start : start + 500] for start in range(0, 20_000, 500)]
    return train_sentencepiece(texts, folder / "trained", vocab_size=600, model_type=request.param)


def test_a_sentencepiece_model_gives_equal_ids(sentencepiece: Path, tmp_path: Path) -> None:
    source = TokenizerSource(type="SentencePieceTokenizer", model=str(sentencepiece))
    facts, tokens = export_tokenizer(source, tmp_path, TEXTS[-1])
    pieces, ours = load_tokenizer(sentencepiece), AutoTokenizer.from_pretrained(tmp_path)
    assert tokens == pieces.EncodeAsIds(TEXTS[-1])
    for text in TEXTS:
        ids = ours(text, add_special_tokens=False)["input_ids"]
        if "</s>" in text:
            # As everywhere in transformers, a special token in a text is that token.
            assert ids[0] == 1
            continue
        assert ids == pieces.EncodeAsIds(text), repr(text)
        assert ours.decode(ids) == text
    assert (facts.eod, ours.eos_token_id, ours.pad_token_id, len(ours)) == (1, 1, 1, 600)
    assert ours.padding_side == "left"


def test_a_tokenizer_json_gives_equal_ids(sentencepiece: Path, tmp_path: Path) -> None:
    made = TokenizerSource(type="SentencePieceTokenizer", model=str(sentencepiece))
    export_tokenizer(made, tmp_path / "json", TEXTS[-1])
    (tmp_path / "json" / "tokenizer.model").unlink()
    (tmp_path / "json" / "tokenization_evil.py").write_text("raise SystemExit")
    source = TokenizerSource(type="HuggingFaceTokenizer", model=str(tmp_path / "json"))
    facts, tokens = export_tokenizer(source, tmp_path / "out", TEXTS[-1])
    before, after = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("json", "out"))
    assert facts.eod_token == after.eos_token == "</s>"
    for text in TEXTS:
        assert before(text)["input_ids"] == after(text)["input_ids"], repr(text)
    assert tokens == after(TEXTS[-1])["input_ids"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_a_model_that_normalises_is_refused(tmp_path: Path) -> None:
    """Its ids would be others than those of the tokens it was trained on."""
    import sentencepiece as library

    text = tmp_path / "text"
    text.write_text(sample_text())
    library.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "nfkc"), vocab_size=600, byte_fallback=True, minloglevel=2
    )
    source = TokenizerSource(type="SentencePieceTokenizer", model=str(tmp_path / "nfkc.model"))
    with pytest.raises(UserError, match="cannot be expressed as a tokenizer"):
        export_tokenizer(source, tmp_path / "out", sample_text())


BEGIN, END, PAD = "<|begin|>", "<|endoftext|>", "<|padding|>"


def bpe_that_adds(folder: Path, sequence: bool) -> TokenizerSource:
    """A tokenizer.json that puts a token before every text and behind it, and cuts and pads texts."""
    from tokenizers import AddedToken, Tokenizer, processors

    tokenizer = Tokenizer.from_str(byte_level_bpe())
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (BEGIN, PAD)])
    ids = [(token, tokenizer.token_to_id(token)) for token in (BEGIN, END)]
    adding = processors.TemplateProcessing(single=f"{BEGIN} $A {END}", special_tokens=ids)
    level = processors.ByteLevel(trim_offsets=False)
    tokenizer.post_processor = processors.Sequence([level, adding]) if sequence else adding
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END, "bos_token": BEGIN}))
    return TokenizerSource(type="HuggingFaceTokenizer", model=str(folder))


@pytest.mark.parametrize("sequence", [False, True])
def test_no_token_is_added_that_training_never_saw(tmp_path: Path, sequence: bool) -> None:
    """Corpus, Megatron and export read a text alike; the padding is the tokenizer's own."""
    from megatron.core.tokenizers.text.libraries.huggingface_tokenizer import HuggingFaceTokenizer

    source = bpe_that_adds(tmp_path / "source", sequence)
    kept = tmp_path / "kept"
    facts = install_tokenizer(source, kept)
    _, tokens = export_tokenizer(TokenizerSource(type=facts.type, model=str(kept)), tmp_path / "out", TEXTS[-1])
    ours = AutoTokenizer.from_pretrained(tmp_path / "out")
    megatron = HuggingFaceTokenizer(str(kept), include_special_tokens=False)
    corpus: Any = load_encoders(kept, facts, "reference")[1]
    for text in TEXTS:
        expected = corpus.encode([text])[0].tolist()
        assert ours(text)["input_ids"] == expected == megatron.text_to_ids(text), repr(text)
    assert ours(TEXTS[-1])["input_ids"] == tokens and len(tokens) > 1000
    assert (ours.pad_token, ours.eos_token, ours.bos_token) == (PAD, END, None)
    assert padding_id(tmp_path / "out") == ours.pad_token_id == ours.eos_token_id + 1201
    before: Any = load_encoders(kept, facts, "reference")[1]
    assert AutoTokenizer.from_pretrained(kept)("one")["input_ids"] != before.encode(["one"])[0].tolist(), "it does add"


def test_padding_beyond_the_models_vocabulary_is_none(tmp_path: Path) -> None:
    source = bpe_that_adds(tmp_path / "source", sequence=False)
    for vocab_size, pad_token in ((1202, PAD), (1201, END)):
        out = tmp_path / str(vocab_size)
        export_tokenizer(source, out, "text", vocab_size)
        assert json.loads((out / "tokenizer_config.json").read_text())["pad_token"] == pad_token


def test_nothing_in_the_configuration_runs_code(sentencepiece: Path, tmp_path: Path) -> None:
    source = TokenizerSource(type="SentencePieceTokenizer", model=str(sentencepiece))
    export_tokenizer(source, tmp_path, "text")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and "auto_map" not in config


def test_a_tokenizer_that_does_not_fit_the_model_is_not_there(
    sentencepiece: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 600 tokens, beside a model of 301: a warning, and neither its files nor a card that speaks of them."""
    run, out = make_run(tmp_path), tmp_path / "out"
    source = TokenizerSource(type="SentencePieceTokenizer", model=str(sentencepiece))
    install_tokenizer(source, run / "checkpoints" / "tokenizer")
    assert main(["convert", "export", str(run), str(out), "--no-verify"]) == 0
    assert "warning: no tokenizer is exported: its ids reach" in capsys.readouterr().err
    assert not list(out.glob("tokenizer*"))
    assert "AutoTokenizer" not in (out / "README.md").read_text()
    assert json.loads((out / "config.json").read_text())["eos_token_id"] is None
