"""The `megatron:` section of a recipe: checks names, spelling and types without importing Megatron.

A key may be an argument's name in Megatron's namespace or its flag, with dashes or underscores. A recipe stores the
name, so that later layers and readers refer to the same entry.
"""

import contextlib
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from megatron_txssm.recipe.megatron_arguments.table import GPUS_ONLY, NAMES_OF_FIELDS, OTHER_FLAGS, PASSES, REFUSED
from megatron_txssm.recipe.schema import FIXED_ARGUMENTS, SECTIONS
from megatron_txssm.recipe.settings.setting import argument, section_fields


@dataclass(frozen=True)
class Argument:
    """An argument that recipes may set: its name in Megatron's namespace, and its values."""

    name: str
    # on or off: a switch with this default. Otherwise int, float, text or path.
    kind: str
    choices: tuple[str, ...] = ()
    is_list: bool = False

    @property
    def is_switch(self) -> bool:
        return self.kind in ("on", "off")

    def words(self, value: object) -> list[str]:
        """A value as words of Megatron's command line."""
        if value is None:
            return []
        if self.is_switch:
            return [_flag(self.name, value is True)] if value is (self.kind == "on") else []
        if self.is_list:
            return [_flag(self.name), *map(str, value if isinstance(value, list) else [value])]
        return argument(_flag(self.name), value)

    def check(self, value: object) -> None:
        """ValueError unless Megatron's parser would accept the value."""
        if self.is_switch:
            if not isinstance(value, bool):
                raise ValueError("must be true or false")
            return
        if isinstance(value, list) and not self.is_list:
            raise ValueError("must be one value, not a list")
        for item in value if isinstance(value, list) else [value]:
            self._check_item(item)

    def _check_item(self, item: object) -> None:
        if isinstance(item, bool) or item is None:
            raise ValueError(f"must be {'values' if self.is_list else 'a value'}, not true, false or null")
        if self.is_list and isinstance(item, str) and item.startswith("-"):
            raise ValueError("must not hold a value that begins with a dash")
        if self.choices and str(item) not in self.choices:
            raise ValueError(f"must be one of {', '.join(self.choices)}")
        if self.kind == "int" and not isinstance(item, int):
            raise ValueError("must be an integer")
        if self.kind == "float" and not isinstance(item, int | float):
            raise ValueError("must be a number")


@functools.cache
def passing() -> dict[str, Argument]:
    """The arguments that a recipe may pass on, by name."""
    return {found.name: found for text in PASSES.values() for found in map(_read, text.split())}


def of_gpus(entries: Mapping[str, object]) -> list[str]:
    """The names of a section's entries that require a GPU."""
    names = [word.partition(":")[0] for word in PASSES[GPUS_ONLY].split()]
    return [name for name in names if passing()[name].words(entries.get(name))]


def entry(key: str, value: Any) -> tuple[str, Any]:
    """(name, value) of an entry as a recipe stores it; KeyError if Megatron lacks it, ValueError if it is invalid."""
    name, inverted = resolve(key)
    if name in owners():
        raise ValueError(f": set {owners()[name]} instead, the recipe's field for {_flag(name)}")
    if name in _fixed():
        raise ValueError(f": every recipe has {_fixed()[name]}; leave it out")
    if reason := refusal(name):
        raise ValueError(f" is refused: {reason}")
    found = passing()[name]
    if value is None:
        return name, None
    try:
        found.check(value)
    except ValueError as error:
        raise ValueError(f" {error}") from None
    return name, not value if inverted else value


def resolve(key: str) -> tuple[str, bool]:
    """(name, whether the key negates it); KeyError if Megatron has no such argument."""
    spelled = key.lstrip("-").replace("-", "_")
    if spelled in OTHER_FLAGS:
        return OTHER_FLAGS[spelled].removeprefix("not "), OTHER_FLAGS[spelled].startswith("not ")
    if spelled in NAMES_OF_FIELDS:
        return NAMES_OF_FIELDS[spelled], False
    if _known(spelled):
        return spelled, False
    for prefix in ("no_", "disable_"):
        if spelled.startswith(prefix):
            with contextlib.suppress(KeyError):
                name, inverted = resolve(spelled.removeprefix(prefix))
                if name not in passing() or passing()[name].is_switch:
                    return name, not inverted
    raise KeyError(spelled)


def known_names() -> list[str]:
    """Every name, for hints."""
    refused = (name for text in REFUSED.values() for name in text.split() if not name.endswith("*"))
    return [*passing(), *owners(), *_fixed(), *OTHER_FLAGS, *refused]


def refusal(name: str) -> str | None:
    """Why an argument is rejected; None if it is not."""
    for reason, text in REFUSED.items():
        if any(fnmatchcase(name, pattern) for pattern in text.split()):
            return reason
    return None


@functools.cache
def owners() -> dict[str, str]:
    """Megatron's flag, with underscores -> the dotted recipe field that sets it."""
    owned: dict[str, str] = {}
    for section_name, section in SECTIONS.items():
        for field in section_fields(section):
            for flag in (*field.setting.flags, *field.setting.owns):
                owned.setdefault(flag.lstrip("-").replace("-", "_"), f"{section_name}.{field.name}")
    return owned


@functools.cache
def _fixed() -> dict[str, str]:
    return {words[0].lstrip("-").replace("-", "_"): " ".join(words) for words in FIXED_ARGUMENTS}


def _known(name: str) -> bool:
    return name in passing() or name in owners() or name in _fixed() or refusal(name) is not None


def _read(text: str) -> Argument:
    name, _, kind = text.partition(":")
    is_list = kind.endswith("+")
    kind = kind.removesuffix("+") or "on"
    if "|" in kind:
        return Argument(name, "text", tuple(kind.split("|")), is_list)
    return Argument(name, kind, (), is_list)


@functools.cache
def _other_flags() -> dict[str, str]:
    return {meaning: flag for flag, meaning in OTHER_FLAGS.items()}


def _flag(name: str, on: bool = True) -> str:
    """Megatron's flag that sets an argument, or switches it off."""
    spelled = name if on else f"no_{name}"
    return "--" + _other_flags().get(name if on else f"not {name}", spelled).replace("_", "-")
