"""Checksums of a checkpoint: what is written is what is found, and every damage of a file has its words."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_txssm.checkpoint import checksums
from megatron_txssm.checkpoint.checksums import (
    Checksum,
    DamagedCheckpoint,
    HashingFile,
    checksum,
    files_to_hash,
    read_checksums,
    to_text,
    verify_files,
)
from megatron_txssm.checkpoint.steps import damage


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of three files, the largest in several blocks."""
    contents = {"__0_0.distcp": bytes(range(256)) * 20_000, ".metadata": b"index", "metadata.json": b"{}"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "checksums.json").write_text(to_text({name: checksum(tmp_path / name) for name in contents}))
    return tmp_path


def test_a_whole_checkpoint(folder: Path) -> None:
    for verify in (True, "sample", False):
        verify_files(folder, verify)
    entry = json.loads((folder / "checksums.json").read_text())["files"]["metadata.json"]
    # xxhsum -H2 of the two bytes.
    assert entry == {"algorithm": "xxh3_128", "size": 2, "digest": checksums.xxhash.xxh3_128(b"{}").hexdigest()}


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def remove(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "metadata.json"])
@pytest.mark.parametrize(
    ("harm", "words"),
    [(cut, "is cut short"), (lengthen, "is too long"), (flip, "is not what was saved"), (remove, "is missing")],
)
def test_damage_is_named(folder: Path, name: str, harm: Callable[[Path], None], words: str) -> None:
    harm(folder / name)
    with pytest.raises(DamagedCheckpoint, match=rf"{name} {words}.*; copy the checkpoint again"):
        verify_files(folder, True)
    verify_files(folder, False)
    # Without reading: all but the contents.
    assert ("is not what" in words) == (damage(folder) == "")


def test_unreadable_checksums_are_damage(folder: Path) -> None:
    for text in ("", "{", "[]", '{"files": {"a": 1}}', '{"files": {"a": {"size": 1, "digest": "x", "colour": 2}}}'):
        (folder / "checksums.json").write_text(text)
        with pytest.raises(DamagedCheckpoint, match=r"checksums.json is not readable"):
            read_checksums(folder)
        assert "checksums.json is not readable" in damage(folder)


def test_a_checkpoint_without_checksums_is_not_refused(folder: Path) -> None:
    (folder / "checksums.json").unlink()
    flip(folder / "__0_0.distcp")
    verify_files(folder, True)
    assert damage(folder) == ""


def test_another_algorithm_is_not_guessed_at(folder: Path) -> None:
    # Of a version to come: sizes still count.
    later = {"__0_0.distcp": Checksum((folder / "__0_0.distcp").stat().st_size, "abc", "blake9")}
    (folder / "checksums.json").write_text(to_text(later))
    verify_files(folder, True)


def test_a_sample_takes_small_files_and_by_turns_every_large_one() -> None:
    files = {f"__{n}_0.distcp": Checksum(1 << 30, "x") for n in range(40)} | {".metadata": Checksum(100, "x")}
    turns = [files_to_hash(files, "sample", turn) for turn in range(0, 320, 20)]
    assert all(".metadata" in names and len(names) <= 4 for names in turns)
    assert {name for turn in range(16) for name in files_to_hash(files, "sample", turn)} == set(files)
    assert files_to_hash(files, False) == []
    assert set(files_to_hash(files, True)) == set(files)
    assert files_to_hash({}, "sample") == []


def test_what_is_written_through_a_hashing_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with HashingFile(path.open("wb")) as file:
        file.write(b"first")
        file.write(memoryview(b"second"))
        # Before an fsync, what Python holds is handed on.
        assert file.fileno() and path.read_bytes() == b"firstsecond"
        assert file.tell() == 11
    assert file.stream.closed
    assert file.checksum() == checksum(path)
    assert HashingFile(io.BytesIO(), hashed=False).checksum() == Checksum(0, None, None)
