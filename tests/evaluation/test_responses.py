"""Kept responses: what a killed evaluation left is used, and only that."""

import math
from pathlib import Path

import pytest

from megatron_txssm.errors import UserError
from megatron_txssm.evaluation.harness.models import Prompt, Question
from megatron_txssm.evaluation.harness.responses import Responses

FIRST, SECOND = Question((1, 2, 3), ((3, 4),)), Question((1, 2, 3), ((3, 5),))


def test_responses_come_back_bit_for_bit(tmp_path: Path) -> None:
    value = math.nextafter(-1 / 3, 0)
    Responses(tmp_path / "new" / "file").add([FIRST, SECOND], [[(value, True)], [(-math.inf, False)]])
    read = Responses(tmp_path / "new" / "file")
    assert read.of([SECOND, FIRST]) == [[[-math.inf, False]], [[value, True]]]


def test_a_batch_is_known_as_a_whole(tmp_path: Path) -> None:
    kept = Responses(tmp_path / "file")
    kept.add([FIRST], [[(-1.0, True)]])
    assert kept.of([FIRST]) == [[(-1.0, True)]]
    assert kept.of([FIRST, SECOND]) is None
    assert kept.of([Prompt((1, 2, 3), ("\n",), 3)]) is None


def test_a_torn_line_is_forgotten(tmp_path: Path) -> None:
    file = tmp_path / "file"
    kept = Responses(file)
    kept.add([FIRST], [[(-1.0, True)]])
    whole = file.read_bytes()
    kept.add([SECOND], [[(-2.0, True)]])
    file.write_bytes(file.read_bytes()[:-5])
    read = Responses(file)
    assert read.of([FIRST]) is not None and read.of([SECOND]) is None
    assert file.read_bytes() == whole


def test_a_line_torn_in_the_middle_costs_only_its_own_responses(tmp_path: Path) -> None:
    file = tmp_path / "file"
    kept = Responses(file)
    kept.add([FIRST], [[(-1.0, True)]])
    with file.open("ab") as stream:
        stream.write(b'{"abc": [[-1.\n' + bytes(7) + b"\n")
    kept.add([SECOND], [[(-2.0, True)]])
    read = Responses(file)
    assert len(read) == 2 and read.of([FIRST, SECOND]) == [[[-1.0, True]], [[-2.0, True]]]


def test_a_damaged_file_and_a_full_disk_are_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("[1]\n")
    with pytest.raises(UserError, match="is damaged; remove it"):
        Responses(tmp_path / "file")
    with pytest.raises(UserError, match="cannot be read: Is a directory; move it away"):
        Responses(tmp_path)
    kept = Responses(tmp_path / "other")
    kept.file = Path("/dev/full")
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\); make room"):
        kept.add([FIRST], [[(-1.0, True)]])
    assert kept.of([FIRST]) is None
