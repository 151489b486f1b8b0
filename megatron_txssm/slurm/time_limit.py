"""Converts Slurm's time limits to seconds."""

import re

_FORMATS = (
    # minutes, minutes:seconds, hours:minutes:seconds
    r"(?P<minutes>\d+)(?::(?P<seconds>\d+))?",
    r"(?P<hours>\d+):(?P<minutes>\d+):(?P<seconds>\d+)",
    # days-hours, days-hours:minutes, days-hours:minutes:seconds
    r"(?P<days>\d+)-(?P<hours>\d+)(?::(?P<minutes>\d+)(?::(?P<seconds>\d+))?)?",
)
_SECONDS = {"days": 86_400, "hours": 3_600, "minutes": 60, "seconds": 1}


def limit_seconds(text: str) -> float | None:
    """A time limit in sbatch's format, in seconds; infinite if unlimited, None for a text left to sbatch."""
    if text.lower() in ("unlimited", "infinite", "-1"):
        return float("inf")
    for form in _FORMATS:
        if match := re.fullmatch(form, text, re.ASCII):
            seconds = sum(int(number or 0) * _SECONDS[unit] for unit, number in match.groupdict().items())
            # Zero means unlimited.
            return seconds or float("inf")
    return None
