"""JSON that does not fit the types it is read as."""

from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import pytest

from megatron_txssm.typed_json import is_date, misfit, parse_json, read_json, typed_fields


class Inner(TypedDict):
    size: float
    kind: NotRequired[Literal["a", "b"]]


class Color(StrEnum):
    RED = "red"


class Outer:
    number: int
    flag: bool
    inner: Inner | None
    names: list[str]
    lists: dict[str, list[int]]
    color: Color | str | None
    folder: Path


SOUND = {"number": 3, "flag": True, "inner": {"size": 1}, "names": ["é"], "lists": {"a": [1]}, "color": "red"}


@pytest.mark.parametrize(
    "fields",
    [
        SOUND,
        {},
        {"inner": None, "color": None, "names": [], "lists": {}},
        # Of later versions.
        {"inner": {"more": []}, "color": "blue", "more": {}},
        {"inner": {"size": 1.5, "kind": "c"}},
    ],
)
def test_what_fits(fields: dict[str, Any]) -> None:
    assert typed_fields(fields, Outer) == {name: value for name, value in fields.items() if name != "more"}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"number": None}, "number=null"),
        ({"number": "3"}, 'number="3"'),
        ({"number": True}, "number=true"),
        ({"number": 1.5}, "number=1.5"),
        ({"number": 10**30}, f"number={10**30}"),
        ({"flag": 1}, "flag=1"),
        ({"inner": []}, "inner=[]"),
        ({"inner": {"size": float("nan")}}, 'inner={"size": NaN}'),
        ({"inner": {"size": float("inf")}}, 'inner={"size": Infinity}'),
        ({"names": "abc"}, 'names="abc"'),
        ({"names": ["a", None]}, "names[1]=null"),
        ({"lists": [1]}, "lists=[1]"),
        ({"lists": {"a": ["x"]}}, 'lists.a[0]="x"'),
        ({"color": 3}, "color=3"),
        ({"color": ["x" * 100]}, f'color=["{"x" * 38}…'),
    ],
)
def test_what_does_not_fit_is_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError) as error:
        typed_fields(SOUND | fields, Outer)
    assert str(error.value) == f"it has {named}"


@pytest.mark.parametrize("record", [None, [], "x", 3])
def test_no_object(record: Any) -> None:
    with pytest.raises(ValueError, match="not a JSON object"):
        typed_fields(record, Outer)
    assert misfit(record, Inner, "it") is not None


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe{}", b"[" * 200_000, b'{"a":' * 100_000, b"1" * 10_000, b"\0"])
def test_what_is_no_json_is_a_value_error(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "file").write_bytes(text)
    with pytest.raises(ValueError):
        read_json(tmp_path / "file")
    with pytest.raises(ValueError):
        parse_json(text)


def test_dates() -> None:
    assert list(map(is_date, (0, 1.8e9, -1, 1e300, float("nan")))) == [True, True, False, False, False]
