"""Reads JSON that a program of ours wrote and that anything may have damaged, and compares it with type annotations."""

import json
from collections.abc import Iterable
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NotRequired, TypeAliasType, Union, get_args, get_origin, get_type_hints, is_typeddict


def parse_json(text: str | bytes) -> Any:
    """ValueError if it is not JSON, or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path) -> Any:
    """OSError if it cannot be read, ValueError if it is not JSON."""
    return parse_json(path.read_bytes())


def typed_fields(record: Any, of: type) -> dict[str, Any]:
    """A JSON object's values for the annotated fields of a class; other versions may write others, or not all.

    ValueError if it is no object, or a value does not fit its field's annotation.
    """
    if not isinstance(record, dict):
        raise ValueError("it is not a JSON object")
    hints = get_type_hints(of, include_extras=True)
    found = {name: value for name, value in record.items() if name in hints}
    if wrong := _first(misfit(value, hints[name], name) for name, value in found.items()):
        raise ValueError(f"it has {wrong}")
    return found


def is_date(seconds: float) -> bool:
    """Whether a number may be a time in seconds since the epoch: later than the year 5138 nothing can show it."""
    return 0 <= seconds < 1e11


def misfit(value: Any, annotation: Any, name: str) -> str | None:
    """Which part of a JSON value does not fit a type annotation, such as "jobs.pretrain=3"; None if all of it does.

    name: of the value, for the answer. Other versions may write fewer fields of a TypedDict, or others, and other texts
    for a Literal or an enum. Numbers must be finite and fit 64 bits.
    """
    origin, args = get_origin(annotation), get_args(annotation)
    if isinstance(annotation, TypeAliasType):
        return misfit(value, annotation.__value__, name)
    if origin in (Union, UnionType):
        return None if any(misfit(value, each, name) is None for each in args) else _shown(name, value)
    if origin is NotRequired:
        return misfit(value, args[0], name)
    if origin is list and isinstance(value, list):
        return _first(misfit(each, args[0], f"{name}[{index}]") for index, each in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return _first(misfit(each, args[1], f"{name}.{key}") for key, each in value.items())
    if is_typeddict(annotation) and isinstance(value, dict):
        hints = get_type_hints(annotation, include_extras=True)
        return _first(misfit(value[key], hint, f"{name}.{key}") for key, hint in hints.items() if key in value)
    return None if _is_plain(value, str if origin is Literal else annotation) else _shown(name, value)


def _is_plain(value: Any, annotation: Any) -> bool:
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    if is_typeddict(annotation):
        return False
    if annotation is None or annotation is type(None):
        return value is None
    return isinstance(annotation, type) and isinstance(value, str if issubclass(annotation, str) else annotation)


def _first(found: Iterable[str | None]) -> str | None:
    return next((each for each in found if each is not None), None)


def _shown(name: str, value: Any) -> str:
    text = json.dumps(value)
    return f"{name}={text if len(text) <= 40 else text[:40] + '…'}"
