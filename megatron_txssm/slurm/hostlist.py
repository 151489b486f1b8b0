"""Expands Slurm's compressed lists of nodes without Slurm: the ranks' container may lack scontrol."""

import itertools
import math
import re

from megatron_txssm.errors import UserError, shown

# More than any cluster has; rejects typing errors such as [1-99999999].
MAX_HOSTS = 200_000
# A part of a name: the text in brackets, or text outside them.
_PART = re.compile(r"\[([^\[\]]*)\]|([^\[\],]+)")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?", re.ASCII)


def expand(nodes: str) -> list[str]:
    """The hosts of a list such as `gpu[03-07,11]` or `rack[1-2]n[01-04]-ib,login1`, like `scontrol show hostnames`.

    In the list's order; of several brackets, the last varies fastest. Duplicates are kept. UserError if the list is
    malformed.
    """
    hosts: list[str] = []
    for name in _names(nodes):
        hosts += _hosts(name, nodes)
        if len(hosts) > MAX_HOSTS:
            raise _malformed(nodes)
    return hosts


def _names(nodes: str) -> list[str]:
    """The list's elements; commas in brackets do not separate elements."""
    outside = re.sub(r"\[[^\[\]]*\]", lambda bracket: bracket[0].replace(",", ";"), nodes)
    return [name.strip().replace(";", ",") for name in outside.split(",") if name.strip()]


def _hosts(name: str, nodes: str) -> list[str]:
    parts: list[list[str]] = []
    end = 0
    for match in _PART.finditer(name):
        if match.start() != end:
            raise _malformed(nodes)
        end = match.end()
        parts.append([match[2]] if match[2] else _numbers(match[1], nodes))
    if end != len(name) or math.prod(map(len, parts)) > MAX_HOSTS:
        raise _malformed(nodes)
    return ["".join(words) for words in itertools.product(*parts)]


def _numbers(text: str, nodes: str) -> list[str]:
    """03, 04, 05, 06, 07, 11 for `03-07,11`. Leading zeros are part of a name."""
    found: list[str] = []
    for piece in text.split(","):
        match = _RANGE.fullmatch(piece.strip())
        if match is None:
            raise _malformed(nodes)
        first, last = match[1], match[2] or match[1]
        if not int(first) <= int(last) < int(first) + MAX_HOSTS:
            raise _malformed(nodes)
        found += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return found


def _malformed(nodes: str) -> UserError:
    return UserError(f"{shown(nodes)} is not a list of nodes as Slurm writes them, such as gpu[03-07,11]")
