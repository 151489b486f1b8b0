"""Declaration of one recipe field: its type, default, meaning, limits, and the Megatron arguments that it sets."""

import dataclasses
import json
import math
import re
import types
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass
from typing import Any, Literal, TypedDict, Union, get_args, get_origin, get_type_hints

from megatron_txssm.errors import shown

# A mixture of data sets: (weight, path prefix of a .bin/.idx pair), weights in any unit.
Blend = tuple[tuple[float, str], ...]

# Subset of a corpus -> its share of the tokens, in any unit.
Weights = dict[str, float]


class Stage(TypedDict):
    """One of several consecutive parts of a training."""

    # Its length; None for the rest of the training.
    tokens: int | None
    weights: Weights


Stages = tuple[Stage, ...]
# Steps from 1, and ranges of them such as "1200-1210".
Steps = tuple[int | str, ...]
# A list of numbers from 1.
Counts = tuple[int, ...]
# A list of strings.
Words = tuple[str, ...]

_NAMES: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    Blend: "a path prefix, or a list of [weight, path prefix]",
    Weights: "a mapping of subsets to weights",
    Stages: "a list of stages, each {tokens: N, weights: {subset: weight}}, the last without tokens",
    Steps: 'a list of steps and of ranges such as "1200-1210"',
    Counts: "a list of integers from 1",
    Words: "a list of strings",
}


@dataclass(frozen=True)
class Setting:
    """A recipe field's declaration, besides its Python type and default."""

    # One line for users, with the unit.
    explanation: str
    # The Megatron arguments it sets: each gets the field's value, unless session/render.py renders the field otherwise.
    flags: tuple[str, ...]
    # Other Megatron arguments for the same setting, which a recipe's `megatron:` section may not use either.
    owns: tuple[str, ...] = ()
    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None
    # Raises UserError for a value with a mistake of its own.
    check: Callable[[Any], object] | None = None
    # A path, or a blend of them (paths.py).
    path: bool = False
    # null is allowed: the loader then finds the value.
    found: bool = False
    # Values that users may know from other models -> why they are refused.
    refused: dict[str, str] = dataclasses.field(default_factory=dict)


def setting(explanation: str, *flags: str, default: Any = MISSING, **limits: Any) -> Any:
    """Declare a field of a recipe section; `limits` are the other fields of `Setting`. Without a default: required."""
    return dataclasses.field(default=default, metadata={"setting": Setting(explanation, flags, **limits)})


def argument(flag: str, value: object) -> list[str]:
    """One Megatron argument: nothing for None and False, the bare flag for True."""
    if value is None or value is False:
        return []
    if value is True:
        return [flag]
    if isinstance(value, tuple):
        # A blend. Megatron reads an odd number of words as bare prefixes. Weights keep every digit, because those of a
        # corpus's hundreds of shards are small and add up.
        weighted = len(value) > 1
        return [
            flag,
            *(word for weight, prefix in value for word in ((repr(weight), prefix) if weighted else (prefix,))),
        ]
    # A value that begins with a dash would be read as a flag.
    return [f"{flag}={value}"] if str(value).startswith("-") else [flag, str(value)]


@dataclass(frozen=True)
class Field:
    """One field of a section, for the loader and the table of fields."""

    name: str
    type: Any
    default: Any
    setting: Setting

    @property
    def required(self) -> bool:
        return self.default is MISSING

    @property
    def choices(self) -> tuple[str, ...]:
        """The values of a closed vocabulary, as written in a recipe."""
        return _choices(_not_null(self.type))

    @property
    def is_text(self) -> bool:
        """Whether a value on the command line is taken as typed."""
        kind = _not_null(self.type)
        return kind is str or (get_origin(kind) is Literal and all(isinstance(word, str) for word in get_args(kind)))

    @property
    def type_name(self) -> str:
        return _type_name(self.type)


def section_fields(section: type) -> Iterator[Field]:
    """The declared fields of a section, in order."""
    hints = get_type_hints(section)
    for field in dataclasses.fields(section):
        if "setting" in field.metadata:
            yield Field(field.name, hints[field.name], field.default, field.metadata["setting"])


def table(section: type) -> dict[str, Field]:
    """The declared fields of a section, by name."""
    return {field.name: field for field in section_fields(section)}


def _not_null(hint: object) -> Any:
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    (inner,) = (part for part in get_args(hint) if part is not types.NoneType)
    return inner


def _choices(kind: object) -> tuple[str, ...]:
    if get_origin(kind) is not Literal:
        return ()
    return tuple(choice if isinstance(choice, str) else json.dumps(choice) for choice in get_args(kind))


def _type_name(hint: Any) -> str:
    """The expected type in words."""
    kind = _not_null(hint)
    choices = _choices(kind)
    name = f"one of {', '.join(choices)}" if choices else _NAMES[kind]
    return name if kind is hint else f"{name} or null"


def convert(value: object, field: Field) -> Any:
    """`value`, read from YAML, as the field's type; ValueError names what is expected."""
    if value is None and field.setting.found:
        return None
    if isinstance(value, str) and value in field.setting.refused:
        raise ValueError(field.setting.refused[value])
    converted = _as_type(value, field.type)
    if converted is None:
        return None
    rules = field.setting
    if rules.at_least is not None and converted < rules.at_least:
        raise ValueError(f"must be at least {rules.at_least:g}")
    if rules.at_most is not None and converted > rules.at_most:
        raise ValueError(f"must be at most {rules.at_most:g}")
    if rules.above is not None and converted <= rules.above:
        raise ValueError(f"must be above {rules.above:g}")
    if rules.below is not None and converted >= rules.below:
        raise ValueError(f"must be below {rules.below:g}")
    return converted


def _as_type(value: object, hint: Any) -> Any:
    inner = _not_null(hint)
    if value is None and inner is not hint:
        return None
    mistake = ValueError(f"must be {_type_name(hint)}")
    if get_origin(inner) is Literal:
        # By type, too: 1 and 0 equal True and False.
        if not any(type(value) is type(choice) and value == choice for choice in get_args(inner)):
            raise mistake
        return value
    if inner in _COMPOUND:
        return _COMPOUND[inner](value, mistake)
    if inner in (int, float):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise mistake
        # 2e11 tokens is an integer.
        if inner is int and value != int(value):
            raise mistake
        return inner(value)
    if not isinstance(value, inner):
        raise mistake
    return value


def _as_blend(value: object, mistake: ValueError) -> Blend:
    if isinstance(value, str):
        value = [[1.0, value]]
    if not isinstance(value, list) or not value:
        raise mistake
    blend = []
    for entry in value:
        if not isinstance(entry, list) or len(entry) != 2:
            raise mistake
        weight, prefix = entry
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not isinstance(prefix, str):
            raise mistake
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"must have weights above 0, not {weight}")
        if not prefix or prefix.startswith("-"):
            raise ValueError(f"must not contain a path that is empty or begins with a dash: {prefix!r}")
        blend.append((float(weight), prefix))
    return tuple(blend)


def _as_weights(value: object, mistake: ValueError) -> Weights:
    if not isinstance(value, dict) or not value:
        raise mistake
    for name, weight in value.items():
        if not isinstance(name, str) or isinstance(weight, bool) or not isinstance(weight, int | float):
            raise mistake
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"must have weights above 0, not {name}: {weight}; leave a subset out instead")
    return {name: float(weight) for name, weight in value.items()}


def _as_stages(value: object, mistake: ValueError) -> Stages:
    if not isinstance(value, list) or not value:
        raise mistake
    stages = []
    for position, stage in enumerate(value, 1):
        if not isinstance(stage, dict) or not set(stage) <= {"tokens", "weights"}:
            raise mistake
        tokens, last = stage.get("tokens"), position == len(value)
        if (tokens is None) != last:
            raise ValueError("must state tokens for every stage but the last, which takes the rest")
        if not last and (isinstance(tokens, bool) or not isinstance(tokens, int | float) or tokens < 1):
            raise ValueError(f"must have at least 1 token in stage {position}, not {shown(tokens)}")
        weights = _as_weights(stage.get("weights"), mistake)
        stages.append({"tokens": None if tokens is None else int(tokens), "weights": weights})
    return tuple(stages)


def _as_steps(value: object, mistake: ValueError) -> Steps:
    if not isinstance(value, list):
        raise mistake
    for entry in value:
        if isinstance(entry, bool) or not isinstance(entry, int | str):
            raise mistake
        if not step_numbers(entry):
            raise ValueError(f"must have steps from 1 and ranges such as 1200-1210, not {shown(entry)}")
    return tuple(value)


def step_numbers(entry: int | str) -> range:
    """The steps of an entry of `Steps`; empty if it is malformed."""
    numbers = re.fullmatch(r" *(\d{1,15}) *(?:- *(\d{1,15}) *)?", str(entry), re.ASCII)
    first = int(numbers[1]) if numbers else 0
    return range(first, int(numbers[2] or first) + 1) if numbers and first else range(0)


def _as_counts(value: object, mistake: ValueError) -> Counts:
    if not isinstance(value, list) or not value:
        raise mistake
    if not all(isinstance(each, int) and not isinstance(each, bool) and each >= 1 for each in value):
        raise mistake
    return tuple(value)


def _as_words(value: object, mistake: ValueError) -> Words:
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise mistake
    return tuple(value)


_COMPOUND: dict[Any, Callable[[object, ValueError], object]] = {
    Blend: _as_blend,
    Weights: _as_weights,
    Stages: _as_stages,
    Steps: _as_steps,
    Counts: _as_counts,
    Words: _as_words,
}
