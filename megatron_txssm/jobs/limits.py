"""Limits that `txssm submit` passes to a job's supervisor: timeouts, and numbers of restarts and requeues.

The fields of `Limits` define the options of both command lines.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal, NamedTuple, Self

from megatron_txssm.errors import UserError

# Phases of the trainer in which it may hang.
Phase = Literal["start", "step", "save"]


def _limit(default: int, unit: str, meaning: str) -> int:
    return field(default=default, metadata={"unit": unit, "meaning": meaning})


@dataclass(frozen=True)
class Limits:
    """Each field's metadata holds its unit and meaning; `LIMIT_OPTIONS` lists them."""

    start_timeout: int = _limit(1800, "SECONDS", "end the trainer as hung if its first step takes longer")
    step_timeout: int = _limit(
        1800, "SECONDS", "end the trainer as hung after this time without a step or a validation"
    )
    save_timeout: int = _limit(1800, "SECONDS", "end the trainer as hung if a checkpoint takes longer")
    stop_before: int = _limit(
        120, "SECONDS", "how long before the time limit the trainer saves and the job requeues itself"
    )
    preflight_timeout: int = _limit(
        300, "SECONDS", "exclude a node that has not answered by then; loading a container image takes long"
    )
    restarts: int = _limit(3, "N", "failures after which the trainer is restarted within the job instead of a requeue")
    max_requeues: int = _limit(10, "N", "number of failures, restarts included, after which the job ends")

    @classmethod
    def parsed(cls, values: Mapping[str, int]) -> Self:
        """Limits from a parser's values, by field name; other values are ignored."""
        return cls(**{limit.name: values[limit.name] for limit in LIMIT_OPTIONS})

    def check(self) -> None:
        """UserError if a time is not positive or a number is negative."""
        for limit in LIMIT_OPTIONS:
            smallest = 1 if limit.unit == "SECONDS" else 0
            if (value := getattr(self, limit.name)) < smallest:
                raise UserError(f"{limit.option} {value} must be at least {smallest}")

    @property
    def seconds_of_phases(self) -> dict[Phase, float]:
        """Seconds without progress after which the trainer counts as hung."""
        return {"start": self.start_timeout, "step": self.step_timeout, "save": self.save_timeout}

    @property
    def words(self) -> list[str]:
        """All limits, as options of the supervisor's command line."""
        return [f"{limit.option}={getattr(self, limit.name)}" for limit in LIMIT_OPTIONS]


class LimitOption(NamedTuple):
    """A field of `Limits` as a command-line option."""

    name: str
    default: int
    unit: str
    meaning: str

    @property
    def option(self) -> str:
        return f"--{self.name.replace('_', '-')}"

    @property
    def help(self) -> str:
        return f"{self.meaning} (default: {self.default})"


DEFAULTS = Limits()
LIMIT_OPTIONS = tuple(
    LimitOption(each.name, getattr(DEFAULTS, each.name), each.metadata["unit"], each.metadata["meaning"])
    for each in fields(Limits)
)
