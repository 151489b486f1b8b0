"""The demo's data: enough real text, the same each time, and nothing of validation in training."""

import json

import pytest

from megatron_txssm.data import demo_corpus
from megatron_txssm.data.demo_corpus import Document, collect_documents, prepare_demo_data, split_documents
from megatron_txssm.data.shard import read_tokens
from megatron_txssm.data.tokenizer import load_tokenizer
from megatron_txssm.errors import UserError

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


def test_no_validation_text_is_in_training(documents):
    train, validation = split_documents(documents)
    assert len(train) + len(validation) == len(documents)
    assert not {document.text for document in train} & {document.text for document in validation}
    fraction = sum(document.num_bytes for document in validation) / sum(document.num_bytes for document in documents)
    assert 0.03 <= fraction <= 0.04
    assert len(validation) >= 8


def test_the_split_does_not_depend_on_the_order():
    documents = [Document(f"{index}.py", "x" * 1000) for index in range(300)]
    _, validation = split_documents(documents)
    _, reversed_validation = split_documents(documents[::-1])
    assert validation == reversed_validation[::-1]
    assert len(validation) == 9


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


def test_prepared_data_holds_the_documents_and_is_reused(small_library, tmp_path, monkeypatch):
    data = prepare_demo_data(tmp_path / "data", **_options(small_library))
    tokenizer = load_tokenizer(data.tokenizer_model)
    train, validation = split_documents(list(collect_documents(small_library, minimum_bytes=1000)))
    for prefix, counts, split in (
        (data.train_prefix, data.train, train),
        (data.validation_prefix, data.validation, validation),
    ):
        tokens = read_tokens(prefix).tolist()
        assert counts.documents == len(split) == tokens.count(data.eod)
        assert counts.tokens == len(tokens)
        assert tokens[-1] == data.eod
        assert tokenizer.decode(tokens) == "".join(document.text for document in split)
    assert data.validation_text_bytes == sum(document.num_bytes for document in validation)

    with monkeypatch.context() as patch:
        patch.setattr(demo_corpus, "collect_documents", None)
        assert prepare_demo_data(tmp_path / "data", vocab_size=VOCAB_SIZE) == data
        # A moved directory is still complete.
        (tmp_path / "data").rename(tmp_path / "moved")
        moved = prepare_demo_data(tmp_path / "moved", vocab_size=VOCAB_SIZE)
        assert moved.train == data.train and moved.train_prefix.startswith(str(tmp_path / "moved"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "manifest.json").write_text('{"format": 1'),
        lambda folder: (folder / "manifest.json").write_text("[]"),
        lambda folder: (folder / "train.idx").write_bytes(b"junk"),
        lambda folder: (folder / "validation.bin").unlink(),
        lambda folder: (folder / "tokenizer.model").write_bytes(b"junk"),
    ],
)
def test_incomplete_data_is_made_again_with_the_same_bytes(small_library, tmp_path, damage):
    data = prepare_demo_data(tmp_path / "data", **_options(small_library))
    folder = tmp_path / "data" / f"vocab_{VOCAB_SIZE}"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(before) == {
        "manifest.json", "tokenizer.model", "train.bin", "train.idx", "validation.bin", "validation.idx"
    }  # fmt: skip
    damage(folder)
    assert prepare_demo_data(tmp_path / "data", **_options(small_library)) == data
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_manifest_is_written_last(small_library, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo_corpus, "write_shard", fail)
        with pytest.raises(KeyboardInterrupt):
            prepare_demo_data(tmp_path / "data", **_options(small_library))
    folder = tmp_path / "data" / f"vocab_{VOCAB_SIZE}"
    assert not (folder / "manifest.json").exists()
    prepare_demo_data(tmp_path / "data", **_options(small_library))
    assert json.loads((folder / "manifest.json").read_text())["vocab_size"] == VOCAB_SIZE


def test_a_directory_that_cannot_be_made(small_library, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose a directory"):
        prepare_demo_data(tmp_path / "file", **_options(small_library))
