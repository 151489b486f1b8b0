"""What a benchmark of throughput measures, and in which order."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from megatron_txssm.bench.models import DECODING, ENTRANTS, PARTS, PREFILL, PRESETS, REFERENCE, TRAINING
from megatron_txssm.bench.results import Key
from megatron_txssm.errors import UserError, require_count

# A chunk of the scan holds as many.
SHORTEST = 64


@dataclass(frozen=True)
class Unit:
    """What one process measures of a model: a training at one length, or inference at several."""

    model: str
    turn: int
    keys: tuple[Key, ...]

    def lengths(self, part: str) -> list[int]:
        return [key.length for key in self.keys if key.part == part]

    @property
    def name(self) -> str:
        parts = "-".join(dict.fromkeys(key.part for key in self.keys))
        return f"{parts}-{self.model}-{max(key.length for key in self.keys)}-turn{self.turn}"


@dataclass(frozen=True)
class Plan:
    """Models, parts, and tokens: `lengths` of training and prefill, `contexts` before decoding; `steps` of a turn."""

    preset: str
    parts: Sequence[str]
    models: Sequence[str]
    lengths: Sequence[int]
    contexts: Sequence[int]
    turns: int
    steps: int

    def units(self) -> Iterator[Unit]:
        """Models take turns at every length, so that a drift of the machine's speed meets all of them."""
        for turn in range(1, self.turns + 1):
            for length in self.lengths:
                yield from self._units(turn, {TRAINING: (length,)})
            yield from self._units(turn, {PREFILL: self.lengths, DECODING: self.contexts})

    def _units(self, turn: int, tokens: dict[str, Sequence[int]]) -> Iterator[Unit]:
        for model in self.models:
            parts = [part for part in tokens if part in self.parts and part in ENTRANTS[model].parts]
            keys = tuple(Key(part, model, length, turn) for part in parts for length in tokens[part])
            if keys:
                yield Unit(model, turn, keys)


def plan(
    preset: str = "small",
    *,
    parts: Sequence[str] | None = None,
    models: Sequence[str] | None = None,
    lengths: Sequence[int] | None = None,
    contexts: Sequence[int] | None = None,
    turns: int | None = None,
    steps: int | None = None,
) -> Plan:
    """The plan; None: all parts and models, and the preset's numbers. UserError for what cannot be measured."""
    _check_names("--preset", [preset], PRESETS)
    _check_names("--parts", parts or (), PARTS)
    _check_names("--models", models or (), ENTRANTS)
    if models and REFERENCE not in models:
        raise UserError(f"--models {' '.join(models)}: add {REFERENCE}, with which all others are compared")
    sizes = PRESETS[preset]
    found = Plan(
        preset,
        [part for part in PARTS if parts is None or part in parts],
        [model for model in ENTRANTS if models is None or model in models],
        sorted(set(sizes.lengths if lengths is None else lengths)),
        sorted(set(sizes.contexts if contexts is None else contexts)),
        sizes.turns if turns is None else turns,
        sizes.steps if steps is None else steps,
    )
    least = {"--lengths": (found.lengths, SHORTEST), "--contexts": (found.contexts, 1)}
    least |= {"--turns": ([found.turns], 1), "--steps": ([found.steps], 1)}
    for option, (values, smallest) in least.items():
        for value in values:
            require_count(smallest, **{option.removeprefix("--"): value})
    return found


def _check_names(option: str, names: Sequence[str], known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            raise UserError(f"{option} {name}: use {'one' if len(names) == 1 else 'some'} of {', '.join(known)}")
