"""Finds ranks that did not join a collective, from the dumps of torch's flight recorder in an attempt's folder.

torch's own tool (`torchfrtrace DIR --prefix collectives_rank_`) unpickles arbitrary objects and needs complete NCCL
dumps of all ranks. Here only plain containers are unpickled, and dumps may be missing or truncated.
"""

import io
import pickle
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypedDict, cast

# A dump's file name, followed by the rank.
PREFIX = "collectives_rank_"
# Maximum number of ranks listed.
_MOST_RANKS = 8
# Collectives kept per rank: enough for one of each of its groups.
_LAST_ENTRIES = 128


# One call of a collective; a newer recorder may write it otherwise.
type Entry = dict[str, Any]


class Trace(TypedDict, total=False):
    """The parts of a dump that are read; NCCL's and gloo's recorder, and their versions, do not write all of them."""

    entries: list[Entry]
    # Group's number -> its "desc", and its "ranks" as a text.
    pg_config: dict[str, dict[str, str]]
    # A rank's own number of a group -> "last_enqueued_collective", "last_completed_collective".
    pg_status: dict[str, dict[str, int]]


@dataclass
class Group:
    """A process group, as described by the dumps."""

    # For example TENSOR_MODEL_PARALLEL_GROUP, or its number.
    name: str = ""
    # Its members, including those without a dump; empty if unknown.
    ranks: set[int] = field(default_factory=set)
    # Rank -> the number of its last collective, begun and completed.
    begun: dict[int, int] = field(default_factory=dict)
    completed: dict[int, int] = field(default_factory=dict)
    # (rank, number of the collective) -> the function called, and its input sizes.
    calls: dict[tuple[int, int], tuple[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Wait:
    """Ranks inside a collective that others have not joined."""

    what: str
    waiting: frozenset[int]
    missing: frozenset[int]


def explain_hang(folder: Path, num_ranks: int) -> list[str]:
    """Explanations of a hang from an attempt's dumps, one line each; empty without dumps or if nobody waits."""
    traces = dict(_read_dumps(folder))
    groups = _groups(traces, num_ranks)
    waits = [*_collective_waits(groups), *_message_waits(traces)]
    # A rank that itself waits is not a cause; if all wait, they wait for each other.
    waiting = _waiting(groups, waits)
    causes = [wait for wait in waits if wait.missing - waiting] or waits
    silent = set(range(num_ranks)) - set(traces)
    lines = list(dict.fromkeys(_describe(wait, wait.missing - waiting or wait.missing, silent) for wait in causes))
    return [*lines[:4], *_mismatches(groups), *(_unfinished(groups) if not waits else ())]


def missing_ranks(folder: Path, num_ranks: int) -> list[int]:
    """The ranks that all others wait for, in order; empty if unknown."""
    traces = dict(_read_dumps(folder))
    groups = _groups(traces, num_ranks)
    waits = [*_collective_waits(groups), *_message_waits(traces)]
    return sorted({rank for wait in waits for rank in wait.missing} - _waiting(groups, waits))


def read_trace(dump: bytes) -> Trace:
    """A dump's content; pickle.UnpicklingError if it contains anything but plain containers."""
    found = _PlainUnpickler(io.BytesIO(dump)).load()
    if not isinstance(found, dict):
        raise pickle.UnpicklingError("no dictionary")
    return cast(Trace, found)


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> NoReturn:
        raise pickle.UnpicklingError(f"a dump holds no {module_name}.{global_name}")


def _what_is_read(trace: Trace) -> Trace:
    """Drop stacks and old entries: with thousands of ranks, all dumps are in memory at once."""
    last = trace.get("entries", [])[-_LAST_ENTRIES:]
    entries: list[Entry] = [{name: entry[name] for name in entry if name != "frames"} for entry in last]
    return trace | {"entries": entries}


def _read_dumps(folder: Path) -> Iterator[tuple[int, Trace]]:
    for path in folder.glob(f"{PREFIX}*"):
        rank = path.name.removeprefix(PREFIX)
        try:
            trace = _what_is_read(read_trace(path.read_bytes()))
            # Parsed alone first: one bad file must not hide the others.
            alone = {int(rank): trace}
            _groups(alone, 0)
            list(_message_waits(alone))
        except Exception:  # truncated, of another kind, or in a newer format: any error is possible
            continue
        yield int(rank), trace


def _groups(traces: dict[int, Trace], num_ranks: int) -> dict[str, Group]:
    groups: dict[str, Group] = defaultdict(Group)
    for rank, trace in traces.items():
        for number, config in trace.get("pg_config", {}).items():
            groups[number].ranks |= {int(word) for word in re.findall(r"\d+", str(config.get("ranks", "")))}
            groups[number].name = _name(config.get("desc", ""), number)
        # The numbers in pg_status are local to each rank.
        names = {str(entry["pg_id"]): entry["process_group"][0] for entry in trace.get("entries", [])}
        for number, status in trace.get("pg_status", {}).items():
            if number not in names:
                continue
            group = groups[names[number]]
            group.begun[rank] = max(0, status["last_enqueued_collective"])
            group.completed[rank] = max(0, status["last_completed_collective"])
        for entry in trace.get("entries", []):
            if entry.get("is_p2p"):
                continue
            number, description = entry["process_group"]
            group = groups[number]
            group.name = _name(description, number)
            call = entry["profiling_name"].partition(":")[2]
            group.calls[rank, entry["collective_seq_id"]] = call, str(entry.get("input_sizes", ""))
            if description == "default_pg":
                group.ranks |= set(range(num_ranks))
    return groups


def _name(description: str, number: str) -> str:
    known = {"default_pg": "all ranks", "undefined": f"group {number}", "": f"group {number}"}
    return known.get(description, description)


def _waiting(groups: dict[str, Group], waits: Iterable[Wait]) -> set[int]:
    """The ranks inside a collective or a message, even if it is unknown for whom they wait."""
    begun = ((group, rank, number) for group in groups.values() for rank, number in group.begun.items())
    unfinished = {rank for group, rank, number in begun if number > group.completed[rank]}
    return unfinished.union(*(wait.waiting for wait in waits))


def _collective_waits(groups: dict[str, Group]) -> Iterator[Wait]:
    for group in groups.values():
        last = max(group.begun.values(), default=0)
        # A rank without a dump counts as missing if others wait.
        waiting = {rank for rank, begun in group.begun.items() if begun == last and group.completed[rank] < last}
        missing = {rank for rank in group.ranks if group.begun.get(rank, 0) < last}
        if waiting and missing:
            call = next((group.calls[rank, last][0] for rank in waiting if (rank, last) in group.calls), "collective")
            yield Wait(f"{call} {last} of {group.name}", frozenset(waiting), frozenset(missing))


def _message_waits(traces: dict[int, Trace]) -> Iterator[Wait]:
    """Sends and receives that did not complete."""
    for rank, trace in traces.items():
        for entry in trace.get("entries", []):
            # For example `nccl:recv 3<-0`, with ranks within the group.
            found = re.search(r"(send|recv) (\d+)(?:->|<-)(\d+)", entry["profiling_name"])
            if not entry.get("is_p2p") or found is None or entry.get("state") == "completed" or entry.get("retired"):
                continue
            config = trace.get("pg_config", {}).get(entry["process_group"][0], {})
            members = sorted(int(word) for word in re.findall(r"\d+", str(config.get("ranks", ""))))
            peer = int(found[3])
            if peer < len(members):
                name = _name(entry["process_group"][1], entry["process_group"][0])
                yield Wait(f"{found[1]} of {name}", frozenset({rank}), frozenset({members[peer]}))


def _mismatches(groups: dict[str, Group]) -> Iterator[str]:
    """Ranks that call different collectives at the same place: their programs have diverged."""
    for group in groups.values():
        for number in sorted({number for _, number in group.calls}):
            ranks_by_call: dict[str, list[int]] = defaultdict(list)
            for (rank, of), (call, _) in group.calls.items():
                if of == number:
                    ranks_by_call[call].append(rank)
            if len(ranks_by_call) > 1:
                calls = "; ".join(f"{_ranks(ranks)} called {call}" for call, ranks in sorted(ranks_by_call.items()))
                yield f"the ranks' programs diverged at collective {number} of {group.name}: {calls}"
                break


def _unfinished(groups: dict[str, Group]) -> Iterator[str]:
    """Collectives that all ranks joined, but that do not complete."""
    for group in groups.values():
        last = max(group.begun.values(), default=0)
        inside = {rank for rank, begun in group.begun.items() if begun == last and group.completed[rank] < last}
        if last and inside == group.ranks:
            call = next((call for (_, number), (call, _) in group.calls.items() if number == last), "collective")
            yield f"every rank joined {call} {last} of {group.name}, which does not complete: check the network"


def _describe(wait: Wait, causes: Iterable[int], silent: set[int]) -> str:
    causes = sorted(causes)
    without = [rank for rank in causes if rank in silent]
    note = f" ({_ranks(without)} left no dump)" if without else ""
    return f"{_ranks(causes)} did not join {wait.what}, in which {_ranks(wait.waiting)} waited{note}"


def _ranks(ranks: Iterable[int]) -> str:
    """`rank 3` or `ranks 0, 2, 3`; only the first few are listed."""
    ranks = sorted(ranks)
    more = f" and {len(ranks) - _MOST_RANKS} more" if len(ranks) > _MOST_RANKS else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:_MOST_RANKS]))}{more}"
