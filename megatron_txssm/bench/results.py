"""The result file of a benchmark, which is written after every measurement, so that the same command continues it."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from megatron_txssm.bench.models import DECODING, ENTRANTS, PARTS
from megatron_txssm.errors import UserError
from megatron_txssm.files import write_results

FILE = "results.json"
# Seconds, bytes, FLOPs of one measurement; or {"error": why there are none}.
type Figures = dict[str, Any]


class Key(NamedTuple):
    """What was measured: a part, a model, tokens, and in which turn."""

    part: str
    model: str
    length: int
    turn: int

    def __str__(self) -> str:
        return f"{self.part} {self.model} {self.length} turn {self.turn}"


class Results:
    """All measurements so far, in a folder's results.json.

    facts: what measurements depend on; UserError if those in the file were made with others.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any] | None = None):
        self.file = folder / FILE
        there = _read(self.file)
        if facts is None and there is None:
            raise UserError(f"{self.file} is not there; measure first, or name the folder of a benchmark with --out")
        if facts is not None and there is not None:
            _check_same(self.file, there, facts)
        content = there or {}
        self.about: dict[str, Any] = {name: value for name, value in content.items() if name != "measurements"}
        self.about |= facts or {}
        self._found = {_key(row): _figures(row) for row in content.get("measurements", ())}

    def has(self, key: Key) -> bool:
        """Whether it was measured; what failed was not."""
        return key in self._found and "error" not in self._found[key]

    def add(self, found: Mapping[Key, Figures], **about: Any) -> None:
        """Keep measurements and other facts; written at once. UserError if the disk does not take them."""
        self._found |= found
        self.about |= about
        rows = [{**key._asdict(), **figures} for key, figures in sorted(self._found.items())]
        write_results(self.file, self.about | {"measurements": rows})

    def of(self, part: str) -> Iterator[tuple[Key, Figures]]:
        return ((key, figures) for key, figures in self._found.items() if key.part == part)


def _read(file: Path) -> dict[str, Any] | None:
    if not file.exists():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        _ = content["settings"]["preset"], content["machine"]["device"]
        valid = all(map(_is_valid, content["measurements"]))
    except (OSError, ValueError, KeyError, TypeError):
        valid = False
    if not valid:
        raise UserError(f"{file} is no result of this benchmark; remove it, or name another folder with --out")
    return content


def _is_valid(row: Mapping[str, Any]) -> bool:
    """False or an error for a measurement that was not written here."""
    key = _key(row)
    numbers = [key.length, key.turn]
    if "error" not in row:
        memory = ("cache_bytes", "weight_bytes") if key.part == DECODING else ("peak_memory_bytes",)
        numbers += [row[name] for name in ("tokens", "flops_per_token", *memory)]
        numbers += [min(row["seconds"]), max(row["seconds"])]
    return key.part in PARTS and key.model in ENTRANTS and all(0 < number < math.inf for number in numbers)


def _key(row: Mapping[str, Any]) -> Key:
    return Key(*(row[name] for name in Key._fields))


def _figures(row: Mapping[str, Any]) -> Figures:
    return {name: value for name, value in row.items() if name not in Key._fields}


def _check_same(file: Path, there: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    for name, wanted in facts.items():
        old = there.get(name)
        if isinstance(old, dict) and isinstance(wanted, dict):
            for inner in sorted(old.keys() | wanted.keys()):
                _refuse_other(file, f"{name}.{inner}", old.get(inner), wanted.get(inner))
        else:
            _refuse_other(file, name, old, wanted)


def _refuse_other(file: Path, name: str, old: Any, new: Any) -> None:
    if old != new:
        raise UserError(
            f"{file} was measured with {name}={old}, now it is {new}; these cannot be compared: repeat its command on "
            "its machine, or name another folder with --out"
        )
