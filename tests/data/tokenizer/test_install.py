"""The tokenizer of a corpus: its end-of-document token is looked up, and its copy never changes."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from megatron_txssm.cli.main import main
from megatron_txssm.data.corpus.manifest import is_held_out, open_corpus
from megatron_txssm.data.corpus.shard import ShardWriter
from megatron_txssm.data.tokenizer.install import install_tokenizer
from megatron_txssm.data.tokenizer.sentencepiece import train_sentencepiece
from megatron_txssm.errors import UserError
from megatron_txssm.recipe.corpus.schema import TokenizerSource
from megatron_txssm.recipe.corpus.tokenizer import TokenizerFacts, read_tokenizer_facts
from tests.data.corpora import library_texts
from tests.data.corpus_recipes import EOD_TOKEN, byte_level_bpe, corpus_bytes, write_byte_level_bpe
from tests.data.in_process import run_tasks_here, shard, web_recipe


def install(folder: Path, model: object, **fields: Any) -> TokenizerFacts:
    return install_tokenizer(TokenizerSource(model=str(model), **fields), folder / "installed")


def write_bpe(folder: Path, **configs: Any) -> Path:
    """A folder with the byte-level BPE and configuration files such as tokenizer_config={"eos_token": "x"}."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(byte_level_bpe(), encoding="utf-8")
    for name, content in configs.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def source_of(folder: Path, *texts: str) -> Path:
    source = folder / "source"
    source.mkdir()
    (source / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts or ("one", "two")))
    return source


AS_TOKEN = {"__type": "AddedToken", "content": EOD_TOKEN, "lstrip": False, "special": True}


@pytest.mark.parametrize(
    "configs",
    [
        {"tokenizer_config": {"eos_token": EOD_TOKEN}},
        {"tokenizer_config": {"eos_token": AS_TOKEN}},
        {"special_tokens_map": {"eos_token": EOD_TOKEN}},
        {"special_tokens_map": {"eos_token": AS_TOKEN}},
        {"tokenizer_config": {"eos_token": None}, "special_tokens_map": {"eos_token": EOD_TOKEN}},
        {"tokenizer_config": {"bos_token": "a"}, "special_tokens_map": {"eos_token": EOD_TOKEN}},
        {"tokenizer_config": "no JSON", "special_tokens_map": {"eos_token": EOD_TOKEN}},
        {"tokenizer_config": ["a list"], "special_tokens_map": {"eos_token": EOD_TOKEN}},
        {"tokenizer_config": {"eos_token": EOD_TOKEN}, "special_tokens_map": {"eos_token": "a"}},
    ],
    ids=str,
)
def test_the_end_of_a_document_is_what_the_files_beside_the_tokenizer_say(
    tmp_path: Path, configs: dict[str, Any]
) -> None:
    folder = write_bpe(tmp_path / "model", **configs)
    expected = json.loads(byte_level_bpe())["added_tokens"][0]
    for model in (folder, folder / "tokenizer.json"):
        facts = install(tmp_path, model)
        assert (facts.eod_token, facts.eod) == (EOD_TOKEN, expected["id"])


@pytest.mark.parametrize(
    ("stated", "special", "kept"),
    [
        (None, [], None),
        ("a", [], "a"),
        # No token of its vocabulary.
        ("<none>", [], None),
        # What pads would be left out of the loss.
        (EOD_TOKEN, [], None),
        # GPT-NeoX-20B, which states none; and others' names for it.
        (None, ["<|padding|>"], "<|padding|>"),
        (EOD_TOKEN, ["[PAD]"], "[PAD]"),
        (None, ["<pad>"], "<pad>"),
        (None, ["<padlock>"], None),
        ("a", ["<pad>"], "a"),
    ],
)
def test_the_padding_is_the_tokenizers_own(
    tmp_path: Path, stated: str | None, special: list[str], kept: str | None
) -> None:
    from tokenizers import AddedToken, Tokenizer

    folder = write_bpe(tmp_path / "model", tokenizer_config={"eos_token": EOD_TOKEN, "pad_token": stated})
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    install(tmp_path, folder)
    written = json.loads((tmp_path / "installed" / "tokenizer_config.json").read_text())
    assert written.get("pad_token") == kept
    # And from the copy.
    install_tokenizer(TokenizerSource(model=str(tmp_path / "installed")), tmp_path / "again")
    assert json.loads((tmp_path / "again" / "tokenizer_config.json").read_text()) == written


def test_the_recipe_may_name_another_end_of_a_document(tmp_path: Path) -> None:
    folder = write_bpe(tmp_path / "model", tokenizer_config={"eos_token": EOD_TOKEN})
    facts = install(tmp_path, folder, eod_token="a")
    assert (facts.eod_token, facts.eod) == ("a", json.loads(byte_level_bpe())["model"]["vocab"]["a"])


def test_a_tokenizer_that_does_not_say_is_refused_with_the_tokens_to_choose_from(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        install(tmp_path, write_bpe(tmp_path / "model", tokenizer_config={"model_max_length": 1}))
    assert "does not say which token ends a document" in str(caught.value)
    assert f"state tokenizer.eod_token, one of ['{EOD_TOKEN}']" in str(caught.value)
    assert not (tmp_path / "installed" / "facts.json").exists()


def test_an_end_of_a_document_that_is_no_token_is_refused(tmp_path: Path) -> None:
    folder = write_bpe(tmp_path / "model", tokenizer_config={"eos_token": "</s>"})
    with pytest.raises(UserError, match=r"tokenizer\.eod_token='</s>' is not a token of"):
        install(tmp_path, folder)
    with pytest.raises(UserError, match=r"tokenizer\.eod_token='two words' is not a token of"):
        install(tmp_path, folder, eod_token="two words")


def test_what_is_kept_is_all_that_loading_needs_and_no_code(tmp_path: Path) -> None:
    config = {"eos_token": EOD_TOKEN, "auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}, "tokenizer_class": "X"}
    folder = write_bpe(tmp_path / "model", tokenizer_config=config)
    (folder / "evil.py").write_text("raise SystemExit")
    facts = install(tmp_path, folder)
    installed = tmp_path / "installed"
    assert {path.name for path in installed.iterdir()} == {"tokenizer.json", "tokenizer_config.json", "facts.json"}
    kept = json.loads((installed / "tokenizer_config.json").read_text())
    assert "auto_map" not in kept and kept["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (installed / "tokenizer.json").read_text(encoding="utf-8") == byte_level_bpe()
    assert facts.fingerprint == hashlib.sha256(byte_level_bpe().encode()).hexdigest()
    vocabulary = json.loads(byte_level_bpe())["model"]["vocab"]
    assert facts.vocab_size == 1 + max(vocabulary.values()) == 1200

    before = {path.name: path.read_bytes() for path in installed.iterdir()}
    # Once more, and from its own copy.
    assert install(tmp_path, folder) == install(tmp_path, installed) == facts
    assert {path.name: path.read_bytes() for path in installed.iterdir()} == before


def test_the_vocabulary_counts_added_tokens_and_gaps(tmp_path: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, models

    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "one": 70_000}, unk_token="<unk>"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert install(tmp_path, tmp_path / "tokenizer.json", eod_token="<unk>").vocab_size == 70_001
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    facts = install(tmp_path, tmp_path / "tokenizer.json", eod_token="<end>")
    assert facts.eod == tokenizer.token_to_id("<end>") and facts.vocab_size == max(70_001, facts.eod + 1)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("missing.json", "tokenizer.model=missing.json: no such file"),
        ("a/missing.json", "tokenizer.model=a/missing.json: no such file"),
        ("./some/model", "tokenizer.model=./some/model: no such file"),
        ("/some/model", "tokenizer.model=/some/model: no such file"),
        ("../model", "tokenizer.model=../model: no such file"),
        ("empty", "tokenizer.model=empty: no such file"),
        ("garbage.json", "garbage.json is not a tokenizer.json"),
    ],
)
def test_a_file_that_is_missing_or_no_tokenizer_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "garbage.json").write_text('{"version": "1.0"}')
    with pytest.raises(UserError) as caught:
        install(tmp_path, model, eod_token="x")
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["EleutherAI/gpt-neox-20b", "Qwen/Qwen2.5-7B", "meta-llama/Llama-3.1-8B"])
def test_a_hub_name_without_the_hub_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, name: str
) -> None:
    import huggingface_hub.constants

    # HF_HUB_OFFLINE=1 in the environment, which is read at import.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    recipe = web_recipe(tmp_path, source_of(tmp_path), {"model": name})
    assert main(["data", "shard", str(recipe)]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: tokenizer.model={name}: no such folder, and the Hugging Face hub cannot")
    assert "copy its tokenizer.json and tokenizer_config.json and name their folder" in message
    assert "Traceback" not in message


def fake_hub(monkeypatch: pytest.MonkeyPatch, folder: Path, missing: type[Exception]) -> None:
    """A hub, or a cache of it, that holds a folder's files."""
    import huggingface_hub

    def download(name: str, file: str) -> str:
        assert name == "Some/Model-1.5"
        if not (folder / file).exists():
            raise missing(f"no {file}")
        return str(folder / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)


def test_a_hub_name_gives_the_files_that_the_hub_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    folder = write_bpe(tmp_path / "hub", tokenizer_config={"eos_token": EOD_TOKEN})
    # The other configuration file is not on the hub; or not in the cache, and the hub cannot be asked.
    for missing in (EntryNotFoundError, LocalEntryNotFoundError):
        fake_hub(monkeypatch, folder, missing)
        assert install(tmp_path, "Some/Model-1.5").eod_token == EOD_TOKEN
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"the Hugging Face hub cannot provide it: no tokenizer\.json"):
        install(tmp_path, "Some/Model-1.5")
    fake_hub(monkeypatch, folder, EntryNotFoundError)
    with pytest.raises(UserError, match=r"Some/Model-1.5 has no tokenizer.json; convert it to a fast tokenizer first"):
        install(tmp_path, "Some/Model-1.5")


def sentencepiece_model(path: Path, **settings: Any) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(library_texts(20)),
        model_writer=model,
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.99,
        max_sentence_length=2**20,
        minloglevel=2,
        **settings,
    )
    path.write_bytes(model.getvalue())
    return path


def test_a_sentencepiece_models_own_end_is_taken_or_the_recipes(tmp_path: Path) -> None:
    path = sentencepiece_model(tmp_path / "x.model", eos_id=5, eos_piece="<end>", control_symbols=["<doc>"])
    facts = install(tmp_path, path, type="SentencePieceTokenizer")
    assert (facts.eod, facts.eod_token, facts.vocab_size) == (5, "<end>", 600)
    assert facts.fingerprint == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (tmp_path / "installed" / "tokenizer.model").read_bytes() == path.read_bytes()
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    other = install(tmp_path, path, type="SentencePieceTokenizer", eod_token="<doc>")
    assert (other.eod, other.eod_token) == (processor.PieceToId("<doc>"), "<doc>")
    with pytest.raises(UserError, match=r"has no end-of-document token \('</s>' is not a piece\)"):
        install(tmp_path, path, type="SentencePieceTokenizer", eod_token="</s>")


def test_a_sentencepiece_model_without_an_end_is_refused(tmp_path: Path) -> None:
    path = sentencepiece_model(tmp_path / "x.model", eos_id=-1)
    with pytest.raises(UserError, match=r"has no end-of-document token \(its eos id is -1\)(.|\n)*train-tokenizer"):
        install(tmp_path, path, type="SentencePieceTokenizer")


@pytest.mark.parametrize("change", ["another tokenizer", "a damaged file", "a missing file"])
def test_a_tokenizer_that_was_changed_in_the_corpus_is_refused_by_every_command(
    tmp_path: Path, capsys: pytest.CaptureFixture, change: str
) -> None:
    source = source_of(tmp_path)
    recipe = web_recipe(tmp_path, source, task_bytes=1)
    assert shard(recipe) == 0
    # There is something left to do.
    (tmp_path / "corpus" / "web" / "00000.json").unlink()
    path = tmp_path / "corpus" / "tokenizer" / "tokenizer.json"
    if change == "another tokenizer":
        path.write_text(byte_level_bpe().replace("NFC", "NFD"), encoding="utf-8")
    elif change == "a damaged file":
        path.write_text(byte_level_bpe()[:-100])
    else:
        path.unlink()
    for words in (["shard", str(recipe)], ["shard", str(tmp_path / "corpus")], ["verify", str(tmp_path / "corpus")]):
        capsys.readouterr()
        assert main(["data", *words]) == 2
        message = capsys.readouterr().err
        assert f"{path} is not the tokenizer that this corpus was made with" in message and "put it back" in message
    path.write_text(byte_level_bpe(), encoding="utf-8")
    assert shard(recipe) == 0


def test_a_recipe_may_not_change_the_tokenizer_under_way_but_its_path(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_tasks_here(monkeypatch)
    recipe = web_recipe(tmp_path, source_of(tmp_path))
    assert shard(recipe) == 0
    before = corpus_bytes(tmp_path / "corpus")
    moved = tmp_path / "moved.json"
    (tmp_path / "tokenizer.json").rename(moved)
    assert shard(recipe, "--set", f"tokenizer.model={moved}") == 0
    capsys.readouterr()
    other = tmp_path / "other.json"
    other.write_text(json.dumps(json.loads(byte_level_bpe()) | {"normalizer": None}))
    assert shard(recipe, "--set", f"tokenizer.model={other}") == 2
    assert f"there, '{other}' here); only new subsets may be added: use another output" in capsys.readouterr().err
    assert corpus_bytes(tmp_path / "corpus") == before


def test_what_a_failed_beginning_left_does_not_decide_the_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first attempt names a wrong source, the second another tokenizer as well."""
    run_tasks_here(monkeypatch)
    recipe = web_recipe(tmp_path, tmp_path / "missing")
    assert shard(recipe) == 2
    first = read_tokenizer_facts(tmp_path / "corpus").fingerprint
    other = tmp_path / "other.json"
    other.write_text(json.dumps(json.loads(byte_level_bpe()) | {"normalizer": None}))
    words = ["--set", f"tokenizer.model={other}", "--set", f"subsets.web.source={source_of(tmp_path)}"]
    assert shard(recipe, *words) == 0
    facts = open_corpus(tmp_path / "corpus").tokenizer
    assert facts.fingerprint == hashlib.sha256(other.read_bytes()).hexdigest() != first


@pytest.mark.parametrize(("vocab_size", "width"), [(65_499, 2), (65_500, 4), (151_000, 4)])
def test_a_token_is_as_wide_as_megatron_reads_it(tmp_path: Path, vocab_size: int, width: int) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    documents = [[vocab_size - 1, 0], [], [vocab_size // 2] * 3]
    writer = ShardWriter(tmp_path / "x", vocab_size, eod=7)
    writer.write(np.array([token for ids in documents for token in ids]), np.array(list(map(len, documents))))
    writer.publish()
    dataset = IndexedDataset(str(tmp_path / "x"))
    assert [np.asarray(dataset[n]).tolist() for n in range(len(dataset))] == [[*ids, 7] for ids in documents]
    assert (tmp_path / "x.bin").stat().st_size == width * sum(len(ids) + 1 for ids in documents)


def test_train_tokenizer_makes_a_model_that_shards_and_knows_nothing_of_what_is_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run_tasks_here(monkeypatch)
    import megatron_txssm.data.sharding.train_tokenizer as module

    texts = [text[:3000] for text in library_texts(150, seed=3)]
    source = tmp_path / "source"
    source.mkdir()
    for file, part in (("a", texts[:40]), ("b", texts[40:])):
        lines = [json.dumps({"text": text}) + "\n" for text in part]
        (source / f"{file}.jsonl").write_text("no JSON\n" + "".join(lines))
    output = tmp_path / "made" / "x.model"
    recipe = web_recipe(
        tmp_path,
        source,
        {"type": "SentencePieceTokenizer", "model": str(output)},
        validation_fraction=0.3,
        max_broken_fraction=0.1,
    )
    trained_on: list[str] = []

    def train(texts: list[str], *words: Any, **fields: Any) -> Path:
        trained_on.extend(texts)
        return train_sentencepiece(texts, *words, **fields)

    monkeypatch.setattr(module, "train_sentencepiece", train)
    command = ["data", "train-tokenizer", str(recipe), "--output", str(output), "--vocab-size", "700"]
    assert main(command) == 0
    wanted = [text for text in texts if not is_held_out(text, 0.3)]
    assert trained_on == wanted and len(wanted) < len(texts) - 20
    assert f"training on {len(wanted)} documents" in (out := capsys.readouterr().out)
    assert f"{output}: 700 pieces; name it as tokenizer.model" in out
    processor = sentencepiece.SentencePieceProcessor(model_file=str(output))
    assert processor.GetPieceSize() == 700 and processor.eos_id() >= 0

    assert shard(recipe) == 0
    (prefix, _), *_ = open_corpus(tmp_path / "corpus").subsets["web"].shards("train")
    expected = [token for text in wanted for token in [*processor.encode(text), processor.eos_id()]]
    assert np.fromfile(f"{prefix}.bin", np.uint16).tolist() == expected

    # The same share of each file, up to so many bytes.
    trained_on.clear()
    assert main([*command, "--bytes", "20e3"]) == 0
    first, second = ([t for t in trained_on if t in part] for part in (texts[:40], texts[40:]))
    for part in (first, second):
        assert 10_000 <= sum(len(text.encode()) for text in part) < 10_000 + 3 * 3000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "x.json"], "--output x.json must end in .model"),
        (["--output", "x.model", "--bytes", "0"], "--bytes 0 must be at least 1"),
        (["--output", "x.model", "--vocab-size", "100"], "vocab_size=100: SentencePiece cannot train"),
    ],
)
def test_a_mistake_in_training_a_tokenizer_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = web_recipe(tmp_path, source_of(tmp_path), write_byte_level_bpe(tmp_path))
    assert main(["data", "train-tokenizer", str(recipe), *words]) == 2
    assert f"error: {message}" in capsys.readouterr().err
    assert not list(tmp_path.glob("x.*"))
