"""The fast encoder gives the reference's ids, or is not used, or not for the texts on which they may differ."""

import importlib
import io
import json
import random
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from datatrove.data import Document

from megatron_txssm.data.sharding import shard_task
from megatron_txssm.data.tokenizer import checked_encoder, encoder
from megatron_txssm.data.tokenizer.checked_encoder import CheckedEncoder
from megatron_txssm.data.tokenizer.encoder import Encoder, load_encoders
from megatron_txssm.data.tokenizer.sentencepiece import train_sentencepiece
from megatron_txssm.recipe.corpus.tokenizer import TokenizerFacts
from tests.data.corpora import ODD_TEXTS, library_texts
from tests.data.corpus_recipes import EOD_TOKEN, byte_level_bpe
from tests.data.in_process import manifest_of, run_tasks_here, shard, web_recipe

HUGGINGFACE = TokenizerFacts("HuggingFaceTokenizer", "", 1200, 0, EOD_TOKEN)
SENTENCEPIECE = TokenizerFacts("SentencePieceTokenizer", "", 800, 1, "</s>")

TEXTS = (
    *ODD_TEXTS,
    "",
    "</s>",
    "<unk>",
    "<s>",
    "<0x0A>",
    "a</s>b <unk> c<s>",
    "\u2581",
    "a \u2581 b \u2581\u2581",
    "\0",
    "\0\0a\0",
    f"{EOD_TOKEN}{EOD_TOKEN} {EOD_TOKEN}\n",
    *library_texts(60, seed=5),
)


def load_encoder(folder: Path, facts: TokenizerFacts) -> Encoder:
    fast, reference = load_encoders(folder, facts)
    return fast or reference


def load_reference(folder: Path, facts: TokenizerFacts) -> Encoder:
    return load_encoders(folder, facts, "reference")[1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """tokenizer/ folders, by the type of the tokenizer."""
    huggingface, pieces = (tmp_path_factory.mktemp(name) for name in ("huggingface", "sentencepiece"))
    (huggingface / "tokenizer.json").write_text(byte_level_bpe(), encoding="utf-8")
    train_sentencepiece(library_texts(100), pieces / "tokenizer", 800)
    return {HUGGINGFACE.type: huggingface, SENTENCEPIECE.type: pieces}


def changed_bpe(folder: Path, **changes: Any) -> Path:
    """A folder with the byte-level BPE under other settings."""
    (folder / "tokenizer.json").write_text(json.dumps(json.loads(byte_level_bpe()) | changes), encoding="utf-8")
    return folder


def added_token(token_id: int, content: str, **rules: bool) -> dict[str, Any]:
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return {"id": token_id, "content": content} | {name: rules.get(name, False) for name in names}


def ids_of(encoder: Encoder, texts: Sequence[str]) -> list[list[int]]:
    return [ids.tolist() for ids in encoder.encode(texts)]


@pytest.mark.parametrize("facts", [HUGGINGFACE, SENTENCEPIECE], ids=lambda facts: facts.type)
def test_gigatoken_gives_the_ids_of_the_library_itself(folders: dict[str, Path], facts: TokenizerFacts) -> None:
    folder = folders[facts.type]
    fast, reference = load_encoder(folder, facts), load_reference(folder, facts)
    assert fast.name.startswith("gigatoken ")
    if facts is HUGGINGFACE:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        expected = [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]
    else:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        expected = [processor.encode(text) for text in TEXTS]
        # The end of a document comes from no text.
        assert not any(facts.eod in ids for ids in expected)
    for tested in (fast, reference):
        assert ids_of(tested, TEXTS) == expected
        for text, ids in zip(TEXTS, expected, strict=True):
            assert ids_of(tested, [text]) == [ids]


def test_settings_of_the_training_script_change_no_id(tmp_path: Path) -> None:
    expected = ids_of(load_reference(changed_bpe(tmp_path), HUGGINGFACE), TEXTS)
    padding = {"strategy": {"Fixed": 900}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    padding |= {"pad_type_id": 0, "pad_token": EOD_TOKEN}
    special = {"SpecialToken": {"id": EOD_TOKEN, "type_id": 0}}
    changes = (
        {"truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}},
        {"padding": padding},
        # A tokenizer that puts a token before every text: one text is not one document here.
        {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [special, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [special, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {EOD_TOKEN: {"id": EOD_TOKEN, "ids": [0], "tokens": [EOD_TOKEN]}},
            }
        },
    )
    for change in changes:
        folder = changed_bpe(tmp_path, **change)
        assert load_encoder(folder, HUGGINGFACE).name.startswith("gigatoken")
        assert ids_of(load_encoder(folder, HUGGINGFACE), TEXTS) == expected, change
        assert ids_of(load_reference(folder, HUGGINGFACE), TEXTS) == expected, change


class _OneIdChanged:
    """An encoder that is wrong in one token of the texts that hold a word."""

    name = "fake 1"

    def __init__(self, right: Encoder, word: str, token: int = 0, cut: bool = False) -> None:
        self.right, self.word, self.token, self.cut = right, word, token, cut

    def doubtful(self, codes: np.ndarray) -> np.ndarray:
        return np.zeros(len(codes), dtype=bool)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        lists = ids_of(self.right, texts)
        for ids, text in zip(lists, texts, strict=True):
            if self.word in text:
                if self.cut:
                    del ids[self.token :]
                else:
                    ids[self.token] += 1
        return [np.array(ids, dtype=np.uint32) for ids in lists]


def documents(texts: Sequence[str]) -> list[Document]:
    return [Document(text=text, id=f"a.jsonl:{number}", metadata={}) for number, text in enumerate(texts)]


@pytest.mark.parametrize("cut", [False, True])
def test_a_difference_is_encoded_by_the_reference_and_named(folders: dict[str, Path], cut: bool) -> None:
    reference = load_reference(folders[HUGGINGFACE.type], HUGGINGFACE)
    texts = ["first", "a second", "the third needle here", "needle"]
    expected = ids_of(reference, texts)
    checked = CheckedEncoder(_OneIdChanged(reference, "needle", 1, cut), reference)
    assert [ids.tolist() for ids in checked.encode(documents(texts))] == expected
    wrong = [] if cut else [expected[2][1] + 1, *expected[2][2:6]]
    assert checked.differences[0] == {
        "document": "a.jsonl:2",
        "detail": f"the ids differ from token 1 on ({wrong} against {expected[2][1:6]})",
        # No rare character is to blame.
        "characters": [],
    }
    # Every text is the reference's from there on, whatever is in it.
    assert checked.referred == 4 and checked.encode(documents(["x"]))[0].tolist() == ids_of(reference, ["x"])[0]
    assert checked.referred == 5


def test_the_characters_of_a_difference_are_doubtful_for_the_rest_of_the_task(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checked_encoder, "COMPARED_FIRST_BYTES", 0)
    monkeypatch.setattr(checked_encoder, "COMPARED_SHARE", 1)
    reference = load_reference(folders[HUGGINGFACE.type], HUGGINGFACE)
    fast = _OneIdChanged(reference, "\u0c4d")
    checked = CheckedEncoder(fast, reference)
    found = f"{'plain words ' * 100}é \u0c4d ü{' and more' * 100}"
    assert [ids.tolist() for ids in checked.encode(documents(["ü", found]))] == ids_of(reference, ["ü", found])
    assert [difference["characters"] for difference in checked.differences] == [["U+0C4D"]] and checked.referred == 1
    # Nothing is compared from here on: what is right below is so for what was found.
    monkeypatch.setattr(checked_encoder, "COMPARED_SHARE", 2**40)
    texts = ["é ü", "another \u0c4d", "\u0c4e"]
    assert [ids.tolist() for ids in checked.encode(documents(texts))] == ids_of(reference, texts)
    assert checked.referred == 2
    # Another task knows nothing of it: it must not depend on what ran before in its process.
    assert not CheckedEncoder(fast, reference)._is_doubtful("\u0c4d")


@pytest.mark.parametrize(
    "text",
    [
        # Telugu nukta, Unicode 14; Arabic small high word, 14; a letter that is two, 13; a letter of 17; an ideograph.
        "a\u0301\u0c3c",
        "\u0628\u064b\u0898",
        "\U00011935\U00011930",
        "a\U00016ea0b",
        "\U00020000",
    ],
    ids=ascii,
)
def test_texts_with_characters_of_another_unicode_are_the_references(folders: dict[str, Path], text: str) -> None:
    fast, reference = load_encoders(folders[HUGGINGFACE.type], HUGGINGFACE)
    assert fast is not None
    checked = CheckedEncoder(fast, reference)
    assert checked._is_doubtful(text) and not checked.differences
    assert ids_of_checked(checked, text) == ids_of(reference, [text])[0] and checked.referred == 1


def ids_of_checked(checked: CheckedEncoder, text: str) -> list[int]:
    return checked.encode(documents([text]))[0].tolist()


def test_common_texts_are_not_doubtful(folders: dict[str, Path]) -> None:
    """Vietnamese, Hindi, Arabic, Hebrew, Thai, Korean, Chinese, emoji and DOS lines stay with the fast encoder."""
    fast, reference = load_encoders(folders[HUGGINGFACE.type], HUGGINGFACE)
    checked = CheckedEncoder(fast, reference)
    # A private character of the last plane is not common.
    odd = [text for text in ODD_TEXTS if "\U0010fffd" not in text]
    texts = [*odd, "Tiếng Việt", "हिन्दी में", "مَرْحَبًا", "שָׁלוֹם", "ภาษาไทย", "한국어", "中文", "🙂 👩‍👩‍👧‍👦 🇩🇪"]
    assert not [text for text in texts if checked._is_doubtful(text)]


def test_the_two_agree_on_random_texts_of_rare_marks_and_scripts(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checked_encoder, "COMPARED_FIRST_BYTES", 0)
    monkeypatch.setattr(checked_encoder, "COMPARED_SHARE", 2**40)
    fast, reference = load_encoders(folders[HUGGINGFACE.type], HUGGINGFACE)
    draw = random.Random(0)
    marks = [chr(code) for code in range(0x80, 0x20000) if unicodedata.combining(chr(code))]
    scripts = [range(0x80, 0x600), range(0x600, 0x1100), range(0x1100, 0x2C00), range(0x11000, 0x12000)]
    known = ["\r\n", " ", "a", "e\u0301", "1", "!", EOD_TOKEN, "\ufe0f", "\u1100\u1161"]

    def word() -> str:
        kind = draw.randrange(3)
        if kind == 0:
            return draw.choice(known)
        if kind == 1:
            return "".join(draw.choice(marks) for _ in range(draw.randint(1, 4)))
        return chr(draw.choice(draw.choice(scripts)))

    texts = ["".join(word() for _ in range(draw.randint(1, 8))) for _ in range(3000)]
    checked = CheckedEncoder(fast, reference)
    assert [ids.tolist() for ids in checked.encode(documents(texts))] == ids_of(reference, texts)
    # Both ways were taken, and it was needed.
    assert 500 < checked.referred < 2500 and fast is not None and ids_of(fast, texts) != ids_of(reference, texts)


def write_texts(folder: Path, texts: Sequence[str]) -> Path:
    source = folder / "source"
    source.mkdir()
    (source / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return source


def test_a_task_goes_on_after_a_difference_reports_it_and_gives_the_references_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def load(folder: Path, facts: TokenizerFacts, choice: str) -> tuple[Any, Encoder]:
        reference = load_reference(folder, facts)
        return _OneIdChanged(reference, "é", 0), reference

    monkeypatch.setattr(shard_task, "load_encoders", load)
    run_tasks_here(monkeypatch)
    texts = ["fine", "fine", "é in the hay", "é"]
    assert shard(web_recipe(tmp_path, write_texts(tmp_path, texts))) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "web task 0: a.jsonl:2: the ids differ from token 0 on" in out and "texts with U+00E9" in out
    manifest = manifest_of(tmp_path / "corpus")
    assert manifest.differences[0]["document"] == "a.jsonl:2" and manifest.referred_documents == 2
    tokens = np.fromfile(tmp_path / "corpus" / "web" / "00000.train.bin", np.uint16).tolist()
    reference = load_reference(tmp_path / "corpus" / "tokenizer", HUGGINGFACE)
    assert tokens == [token for ids in ids_of(reference, texts) for token in [*ids, 0]]


def test_every_task_compares_its_first_documents_and_a_share_of_the_others(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checked_encoder, "COMPARED_FIRST_BYTES", 1000)
    monkeypatch.setattr(checked_encoder, "COMPARED_SHARE", 10)
    texts = [f"{number:05d} " + "word " * 10 for number in range(3000)]
    fast, reference = load_encoders(folders[HUGGINGFACE.type], HUGGINGFACE)
    checked = CheckedEncoder(fast, reference)
    compared: list[Document] = []
    monkeypatch.setattr(checked, "_compare", compared.extend)
    for start in range(0, len(texts), 1000):
        checked.encode(documents(texts)[start : start + 1000])
    rows = [int(document.id.rpartition(":")[2]) for document in compared]
    first = -(-1000 // len(texts[0]))
    assert rows[:first] == list(range(first)) and 200 < len(rows) - first < 400 and rows[-1] > 2500


def unigram_json() -> dict[str, Any]:
    from tokenizers import Tokenizer, models

    return json.loads(Tokenizer(models.Unigram([("<unk>", 0.0), ("x", -1.0), (EOD_TOKEN, -2.0)], unk_id=0)).to_str())


def word_level_json() -> dict[str, Any]:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "one": 1, "two": 2, EOD_TOKEN: 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    return json.loads(tokenizer.to_str())


@pytest.mark.parametrize("described", [unigram_json, word_level_json])
def test_a_tokenizer_that_gigatoken_cannot_load_is_encoded_by_the_reference_with_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture, described: Any
) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(described()))
    recipe = web_recipe(
        tmp_path,
        write_texts(tmp_path, ["one two", "x", "two"]),
        {"model": str(tmp_path / "tokenizer.json"), "eod_token": EOD_TOKEN},
    )
    assert shard(recipe) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("tokenizer:")]
    assert line.startswith("tokenizer: tokenizers 0") and "(gigatoken cannot load it: " in line
    manifest = manifest_of(tmp_path / "corpus")
    assert "gigatoken cannot load it" in manifest.encoder and manifest.compared_documents == 0
    assert manifest.shards["train"].documents == 3


def test_a_sentencepiece_unigram_model_is_encoded_by_sentencepiece_with_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model = train_sentencepiece(library_texts(12), tmp_path / "unigram", 390, model_type="unigram")
    texts = ["one two", "drei</s>vier", "  x\n"]
    tokenizer = {"type": "SentencePieceTokenizer", "model": str(model)}
    assert shard(web_recipe(tmp_path, write_texts(tmp_path, texts), tokenizer)) == 0
    assert "tokenizer: sentencepiece 0" in (out := capsys.readouterr().out) and "gigatoken cannot load it" in out
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    tokens = np.fromfile(tmp_path / "corpus" / "web" / "00000.train.bin", np.uint16).tolist()
    assert tokens == [token for text in texts for token in [*processor.encode(text), processor.eos_id()]]


@pytest.mark.parametrize(
    "token",
    [added_token(1200, "one", lstrip=True, rstrip=True), added_token(1200, "one", single_word=True)],
    ids=["strips spaces", "single word"],
)
def test_an_added_token_with_rules_that_gigatoken_does_not_follow_is_not_left_to_chance(
    tmp_path: Path, token: dict[str, Any]
) -> None:
    """A sample of the documents would hardly hold it."""
    tokens = [*json.loads(byte_level_bpe())["added_tokens"], token]
    fast, chosen = load_encoders(changed_bpe(tmp_path, added_tokens=tokens), HUGGINGFACE)
    texts = [*TEXTS, "stone one  one, one", "none"]
    assert ids_of(chosen, texts) == ids_of(load_reference(tmp_path, HUGGINGFACE), texts)
    assert fast is None and "gigatoken does not follow its rules: 'a" in chosen.name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"user_defined_symbols": ["<sep>"]},
        {"control_symbols": ["<sep>"]},
        {"normalization_rule_name": "identity"},
        {"remove_extra_whitespaces": False},
        {"add_dummy_prefix": False},
        {"treat_whitespace_as_suffix": True},
        {"byte_fallback": False},
    ],
    ids=str,
)
def test_a_sentencepiece_model_of_any_settings_gives_the_ids_of_sentencepiece(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    model = io.BytesIO()
    settings: dict[str, Any] = {"byte_fallback": True, "vocab_size": 700, "model_type": "bpe"} | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(library_texts(40)),
        model_writer=model,
        minloglevel=2,
        max_sentence_length=2**20,
        character_coverage=0.99,
        **settings,
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    texts = [*TEXTS[: len(ODD_TEXTS) + 10], "a<sep>b <sep> c", "\r\nDOS\r\n"]
    assert ids_of(load_encoder(tmp_path, SENTENCEPIECE), texts) == [processor.encode(text) for text in texts]


class _Panic(BaseException):
    """What pyo3 raises for a panic of Rust code is no Exception."""


@pytest.mark.parametrize("error", [ValueError("line one\n\nLocation:\n  src/x.rs"), _Panic("line one")])
def test_whatever_gigatoken_raises_is_one_line_and_no_end(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(encoder, "_Gigatoken", fail)
    fast, chosen = load_encoders(folders[HUGGINGFACE.type], HUGGINGFACE)
    assert fast is None and chosen.name.endswith("(gigatoken cannot load it: line one)")


def test_ctrl_c_is_not_taken_for_a_tokenizer_that_cannot_be_loaded(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(encoder, "_Gigatoken", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_encoder(folders[HUGGINGFACE.type], HUGGINGFACE)


@pytest.mark.parametrize("facts", [HUGGINGFACE, SENTENCEPIECE], ids=lambda facts: facts.type)
def test_the_fast_tokenizer_is_renewed_after_so_many_bytes_and_gives_the_same_ids(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, facts: TokenizerFacts
) -> None:
    gigatoken = importlib.import_module("gigatoken")
    loaded: list[Any] = []
    from_json = gigatoken.Tokenizer.from_json
    monkeypatch.setattr(encoder, "RENEW_AFTER_BYTES", 1000)
    fast: Any = load_encoder(folders[facts.type], facts)
    monkeypatch.setattr(fast, "_load", lambda content: loaded.append(content) or from_json(content))
    fast.encode(["x" * 1100])
    number = len(loaded)
    texts = ["a few words " * 10] * 5
    first = ids_of(fast, texts)
    # The one before this had more than 1,000 bytes; then 600 at a time.
    assert len(loaded) == number + 1
    before, renewed = fast._tokenizer, []
    for _ in range(8):
        assert ids_of(fast, texts) == first
        renewed.append(fast._tokenizer is not before)
        before = fast._tokenizer
    assert renewed == [False, True, False, True, False, True, False, True]
    assert set(loaded) == {fast._content}
