"""Rows that cannot be used: counted in full, listed in part, and too many stop the task."""

import json

import dill
import pytest
from datatrove.utils.logging import logger

from megatron_txssm.data.sharding.broken_rows import (
    EMPTY_TEXT,
    INVALID_JSON,
    MISSING_BLOB,
    NULL_TEXT,
    PLACES_KEPT,
    UNREADABLE_FILE,
    BrokenRows,
)
from megatron_txssm.errors import UserError


@pytest.fixture
def log():
    """The messages of the block, in order."""
    messages = []
    handler = logger.add(lambda message: messages.append(message.record["message"]), level="WARNING")
    yield messages
    logger.remove(handler)


def _lenient():
    return BrokenRows("web", max_broken_fraction=1, max_broken_files=10)


def test_counts_and_places(log):
    broken = _lenient()
    broken.seen(10)
    broken.report("a.jsonl", 3, INVALID_JSON, "unexpected character")
    broken.report("a.jsonl", 7, NULL_TEXT)
    broken.report("b.parquet", 0, NULL_TEXT)
    broken.report("c.parquet", None, UNREADABLE_FILE, "no footer")
    broken.finish()
    assert broken.counts == {INVALID_JSON: 1, NULL_TEXT: 2, UNREADABLE_FILE: 1}
    assert (broken.rows, broken.broken_rows, broken.broken_files) == (10, 3, 1)
    assert broken.places[0] == {
        "file": "a.jsonl",
        "row": 3,
        "reason": INVALID_JSON,
        "detail": "unexpected character",
    }
    assert [(place["file"], place["row"]) for place in broken.places[1:]] == [
        ("a.jsonl", 7),
        ("b.parquet", 0),
        ("c.parquet", None),
    ]
    assert log[:4] == [
        "a.jsonl, row 3: invalid JSON (unexpected character)",
        "a.jsonl, row 7: null text",
        "b.parquet, row 0: null text",
        "c.parquet: unreadable file (no footer)",
    ]
    assert "3 of 10 rows broken (30.000%; 1 × invalid JSON, 2 × null text, 1 × unreadable file)" in log[4]
    assert len(log) == 5


def test_a_task_without_faults_says_nothing(log):
    broken = BrokenRows("web", max_broken_fraction=0)
    broken.finish()
    broken.seen(5000)
    broken.finish()
    assert log == [] and broken.counts == {}


def test_many_places_are_counted_but_not_listed(log):
    broken = _lenient()
    for row in range(10_000):
        broken.seen()
        broken.report("a.jsonl", row, EMPTY_TEXT)
    assert broken.counts == {EMPTY_TEXT: 10_000}
    assert [place["row"] for place in broken.places] == list(range(PLACES_KEPT))
    assert len(log) == PLACES_KEPT + 2
    assert log[-1].startswith("10,000 of 10,000 rows broken") and "row 9999" in log[-1]


def test_a_detail_is_one_line_that_json_can_hold(log):
    broken = _lenient()
    broken.seen()
    broken.report("a.jsonl", 0, INVALID_JSON, "first\r\nsecond \x1b[31mred \ud800 end" + "x" * 1_000_000)
    detail = broken.places[0]["detail"]
    assert detail.startswith("first second [31mred endx") and len(detail) == 200
    json.dumps(broken.places, ensure_ascii=False).encode()
    assert "\x1b" not in log[0] and "\n" not in log[0]


def test_the_share_is_judged_from_1000_rows_on():
    broken = BrokenRows("web", max_broken_fraction=0.002)
    for row in range(999):
        broken.seen()
        if row < 2:
            broken.report("a.parquet", row, NULL_TEXT)
    broken.seen()
    with pytest.raises(UserError) as caught:
        broken.report("b.parquet", 0, MISSING_BLOB, "NoSuchKey")
    for words in (
        "subsets.web.max_broken_fraction=0.002 is exceeded",
        "3 of 1,000 rows",
        "1 × missing blob, 2 × null text",
        "  a.parquet, row 1: null text",
        "  b.parquet, row 0: missing blob (NoSuchKey)",
        "raise subsets.web.max_broken_fraction in the corpus recipe",
    ):
        assert words in str(caught.value)


@pytest.mark.parametrize("step", [1, 256])
def test_early_faults_stop_the_task_at_row_1000(step):
    broken = BrokenRows("web", max_broken_fraction=0.01)
    broken.seen(100)
    for row in range(50):
        broken.report("a.parquet", row, NULL_TEXT)
    with pytest.raises(UserError, match="max_broken_fraction"):
        while broken.rows < 2000:
            broken.seen(step)
    assert 1000 <= broken.rows < 1000 + step


def test_a_small_task_is_judged_at_its_end():
    broken = BrokenRows("web", max_broken_fraction=0.001)
    broken.seen(10)
    broken.report("a.parquet", 4, NULL_TEXT)
    with pytest.raises(UserError, match=r"1 of 10 rows broken \(10\.000%"):
        broken.finish()


def test_the_share_may_be_reached():
    broken = BrokenRows("web", max_broken_fraction=0.1)
    broken.seen(10)
    broken.report("a.parquet", 4, NULL_TEXT)
    broken.finish()
    assert broken.broken_rows == 1


def test_unreadable_files_have_their_own_threshold():
    broken = BrokenRows("web", max_broken_fraction=0, max_broken_files=1)
    broken.seen(5000)
    broken.report("a.parquet", None, UNREADABLE_FILE, "no footer")
    broken.finish()
    with pytest.raises(UserError, match="max_broken_files=1 is exceeded"):
        broken.report("b.parquet", None, UNREADABLE_FILE, "no footer")


def test_it_travels_to_another_process():
    broken = _lenient()
    broken.seen(3)
    broken.report("a.parquet", 0, NULL_TEXT)
    again = dill.loads(dill.dumps(broken))
    assert vars(again) == vars(broken)
