"""Shards: what is written is what Megatron reads, and a damaged shard is named before Megatron sees it."""

import struct

import numpy as np
import pytest

from megatron_txssm.data.corpus import shard
from megatron_txssm.data.corpus.shard import ShardCounts, check_shard, read_tokens, write_shard
from megatron_txssm.errors import UserError

EOD = 1
DOCUMENTS = [[5, 6, 7], [], [300], [8] * 1000]


@pytest.mark.parametrize(("vocab_size", "token_type"), [(4096, np.uint16), (65499, np.uint16), (65500, np.int32)])
def test_megatron_reads_what_was_written(tmp_path, vocab_size, token_type):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    documents = [*DOCUMENTS, [vocab_size - 1, 0]]
    counts = write_shard(documents, tmp_path / "a.b", vocab_size, EOD)
    dataset = IndexedDataset(str(tmp_path / "a.b"))
    expected = [[*ids, EOD] for ids in documents if ids]
    assert [np.asarray(dataset[index]).tolist() for index in range(len(dataset))] == expected
    assert dataset.document_indices.tolist() == list(range(len(expected) + 1))
    assert dataset.index.dtype is token_type
    tokens = sum(map(len, expected))
    assert counts == ShardCounts(documents=4, tokens=tokens, bytes=tokens * np.dtype(token_type).itemsize)
    assert check_shard(tmp_path / "a.b") == counts
    assert read_tokens(tmp_path / "a.b").tolist() == [token for ids in expected for token in ids]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.b.bin", "a.b.idx"]


def test_layout_is_megatrons():
    from megatron.core.datasets import indexed_dataset

    assert shard.INDEX_MAGIC == indexed_dataset._INDEX_HEADER
    integers = {member.value: member.name for member in indexed_dataset.DType if "float" not in member.name}
    assert integers == shard.TOKEN_TYPE_OF_CODE


def test_same_input_same_bytes(tmp_path):
    for name in ("one", "two"):
        write_shard(DOCUMENTS, tmp_path / name, 512, EOD)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"two{suffix}").read_bytes()


def test_interrupted_write_leaves_the_old_shard_and_no_partial_file(tmp_path):
    def interrupted():
        yield [1, 2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(interrupted(), tmp_path / "new", 512, EOD)
    assert list(tmp_path.iterdir()) == []

    before = write_shard(DOCUMENTS, tmp_path / "old", 512, EOD)
    with pytest.raises(KeyboardInterrupt):
        write_shard(interrupted(), tmp_path / "old", 512, EOD)
    assert check_shard(tmp_path / "old") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old.bin", "old.idx"]


@pytest.mark.parametrize("ids", [[512], [-1], [70000]])
def test_ids_outside_the_vocabulary_are_refused(tmp_path, ids):
    with pytest.raises(ValueError, match="outside the vocabulary of 512"):
        write_shard([[1], ids], tmp_path / "x", 512, EOD)
    assert list(tmp_path.iterdir()) == []


def test_no_documents_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no document"):
        write_shard([[]], tmp_path / "x", 512, EOD)
    assert list(tmp_path.iterdir()) == []


def test_missing_files(tmp_path):
    with pytest.raises(UserError, match=r"x\.idx does not exist"):
        check_shard(tmp_path / "x")
    write_shard(DOCUMENTS, tmp_path / "x", 512, EOD)
    with pytest.raises(UserError, match=r"without \.bin or \.idx"):
        check_shard(tmp_path / "x.bin")
    (tmp_path / "x.bin").unlink()
    with pytest.raises(UserError, match=r"x\.bin does not exist"):
        check_shard(tmp_path / "x")


def _with_field(index: bytes, offset: int, layout: str, value: int) -> bytes:
    field = struct.pack(layout, value)
    return index[:offset] + field + index[offset + len(field) :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda index: b"", "not a Megatron index"),
        (lambda index: b"PK\x03\x04" + index[4:], "not a Megatron index"),
        (lambda index: index[:20], "cut off within its header"),
        (lambda index: _with_field(index, 9, "<Q", 2), "index version 2"),
        (lambda index: _with_field(index, 17, "<B", 7), "token type code 7"),
        (lambda index: _with_field(index, 17, "<B", 99), "token type code 99"),
        (lambda index: index[:-1], "cut off or corrupt"),
        (lambda index: _with_field(index, 18, "<Q", 2**60), "cut off or corrupt"),
        (lambda index: _with_field(index, 34, "<i", -5), "contradict"),
        (lambda index: _with_field(index, 34 + 3 * 4 + 8, "<q", 10**12), "contradict"),
        (lambda index: _with_field(index, len(index) - 8, "<q", 77), "contradict"),
        (lambda index: _with_field(index, 34 + 2 * 4, "<i", 1002), "do not belong together"),
        (lambda index: _with_field(index, 17, "<B", 1), "contradict"),
    ],
)
def test_a_corrupt_index_is_named(tmp_path, damage, message):
    write_shard(DOCUMENTS, tmp_path / "x", 512, EOD)
    index = (tmp_path / "x.idx").read_bytes()
    (tmp_path / "x.idx").write_bytes(damage(index))
    with pytest.raises(UserError, match=message) as caught:
        check_shard(tmp_path / "x")
    assert str(tmp_path / "x") in str(caught.value)


@pytest.mark.parametrize("change", [-2, 2])
def test_a_bin_of_another_size_is_named(tmp_path, change):
    write_shard(DOCUMENTS, tmp_path / "x", 512, EOD)
    content = (tmp_path / "x.bin").read_bytes()
    (tmp_path / "x.bin").write_bytes(content[:change] if change < 0 else content + bytes(change))
    with pytest.raises(UserError, match=r"x\.bin: \d+ bytes, but x\.idx describes"):
        check_shard(tmp_path / "x")
    with pytest.raises(UserError, match="do not belong together"):
        read_tokens(tmp_path / "x")


def test_index_without_documents(tmp_path):
    header = shard.INDEX_MAGIC + struct.pack("<QBQQ", 1, 8, 0, 1) + struct.pack("<q", 0)
    (tmp_path / "x.idx").write_bytes(header)
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(UserError, match="holds no document"):
        check_shard(tmp_path / "x")
