"""The demo's data: enough real text, reproducible, and no validation text in training."""

import pytest

from megatron_txssm.data.corpus.manifest import is_held_out
from megatron_txssm.data.corpus.shard import read_tokens
from megatron_txssm.data.tokenizer.sentencepiece import load_tokenizer
from megatron_txssm.demo import corpus as demo_corpus
from megatron_txssm.demo.corpus import collect_documents, prepare_demo_corpus
from megatron_txssm.errors import UserError
from megatron_txssm.recipe.corpus.tokenizer import tokenizer_model
from tests.data.corpus_recipes import corpus_bytes

VOCAB_SIZE = 320


@pytest.fixture(scope="module")
def documents():
    return list(collect_documents())


def _options(root):
    return {"vocab_size": VOCAB_SIZE, "root": root, "minimum_bytes": 1000}


@pytest.fixture
def small_library(tmp_path):
    """A library of 150 small files."""
    root = tmp_path / "library"
    for index in range(150):
        path = root / f"package_{index % 7}" / f"module_{index}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""Module {index}."""\n\n\ndef f_{index}(x):\n    return x * {index}\n' * 5)
    return root


def test_the_library_is_large_enough_and_in_order(documents):
    assert sum(document.num_bytes for document in documents) > 5_000_000
    sources = [document.source for document in documents]
    assert sources == sorted(set(sources))
    assert not any("site-packages" in source or "/test/" in source for source in sources)
    assert documents == list(collect_documents())


def test_the_reference_is_prose(documents):
    (reference,) = [document for document in documents if document.source == demo_corpus.REFERENCE_TOPICS]
    assert 'The "assert" statement\n*******' in reference.text


def test_what_is_not_a_document(small_library):
    (small_library / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\nname = '\xe9t\xe9'\n")
    (small_library / "invalid.py").write_bytes(b"name = '\xff\xfe'\n")
    (small_library / "cookie.py").write_bytes(b"# coding: no-such-encoding\n")
    (small_library / "block.py").write_text("bar = '\u2581'\n", encoding="utf-8")
    (small_library / "empty.py").write_text("\n")
    (small_library / "copy.py").write_bytes((small_library / "package_0/module_0.py").read_bytes())
    (small_library / "test").mkdir()
    (small_library / "test" / "test_x.py").write_text("assert True\n")
    (small_library / "_sysconfigdata_linux.py").write_text("prefix = '/somewhere'\n")
    skipped = []
    found = {
        document.source: document.text
        for document in collect_documents(small_library, minimum_bytes=1000, skipped=skipped)
    }
    assert len(found) == 151
    assert found["latin.py"].endswith("name = 'été'\n")
    assert "copy.py" in found and "package_0/module_0.py" not in found
    assert sorted(skipped) == ["block.py", "cookie.py", "invalid.py"]


def test_too_little_text_is_a_user_error(tmp_path):
    (tmp_path / "one.py").write_text("x = 1\n")
    with pytest.raises(UserError, match=r"holds 0\.0 MB .*needs 5\.0 MB; use a Python whose standard library"):
        collect_documents(tmp_path)


def test_the_corpus_holds_the_documents_and_is_reused(small_library, tmp_path, monkeypatch):
    corpus = prepare_demo_corpus(tmp_path / "data", **_options(small_library))
    subset = corpus.subsets[demo_corpus.SUBSET]
    tokenizer = load_tokenizer(tokenizer_model(corpus.directory, corpus.tokenizer))
    documents = list(collect_documents(small_library, minimum_bytes=1000))
    for split, held_out in (("train", False), ("validation", True)):
        texts = [document.text for document in documents if is_held_out(document.text, 0.03) == held_out]
        tokens = [token for prefix, _ in subset.shards(split) for token in read_tokens(prefix).tolist()]
        assert subset.documents(split) == len(texts) == tokens.count(corpus.tokenizer.eod)
        assert tokens[-1] == corpus.tokenizer.eod
        assert tokenizer.decode(tokens) == "".join(texts)
    assert corpus.tokenizer.vocab_size == VOCAB_SIZE

    with monkeypatch.context() as patch:
        patch.setattr(demo_corpus, "collect_documents", None)
        assert prepare_demo_corpus(tmp_path / "data", vocab_size=VOCAB_SIZE) == corpus


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "python-library/00000.json").unlink(),
        lambda folder: (folder / "python-library/00000.train.idx").write_bytes(b"junk"),
        lambda folder: (folder / "python-library/00000.validation.bin").unlink(),
        lambda folder: (folder / "source/tokenizer.model").unlink(),
    ],
)
def test_a_damaged_corpus_is_made_again_with_the_same_bytes(small_library, tmp_path, damage):
    corpus = prepare_demo_corpus(tmp_path / "data", **_options(small_library))
    before = corpus_bytes(corpus.directory)
    damage(corpus.directory)
    assert prepare_demo_corpus(tmp_path / "data", **_options(small_library)) == corpus
    assert corpus_bytes(corpus.directory) == before


def test_a_directory_that_cannot_be_made(small_library, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose a directory"):
        prepare_demo_corpus(tmp_path / "file", **_options(small_library))
