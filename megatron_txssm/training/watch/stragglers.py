"""Watches a training for slowness: all ranks take part, rank 0 judges (`throughput.py`)."""

import functools
import socket
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from megatron_txssm.metrics import metrics_tail
from megatron_txssm.training.watch.collective_trace import Trace, read_trace
from megatron_txssm.training.watch.throughput import ThroughputWatch, Verdict, judge

# Steps between checks, at which rank 0 broadcasts its request to the others.
CHECK_STEPS = 10
_NOTHING, _AS_USUAL, _SLOW = range(3)


class SlowRunWatch:
    """One per rank. Costs a broadcast of one number every `CHECK_STEPS` steps; more only while the run is slow.

    Validations, saves and the first steps after a start are not counted.
    """

    def __init__(self, fraction: float | None, metrics_file: Path, rank: int, world_size: int):
        self.is_on = fraction is not None
        self.rank, self.world_size = rank, world_size
        self.watch = ThroughputWatch(fraction or 0.0, earlier_throughput(metrics_file, world_size) if not rank else ())
        # Every rank's fraction of a step in collectives, while the run was not slow.
        self.usual: list[float] | None = None
        # Set while the run is slow; `named`: whether a verdict has named ranks since then.
        self.verdict: Verdict | None = None
        self.named = False
        self.warm = False
        self.flops, self.seconds = 0.0, 0.0
        self.collectives = CollectiveTime(CHECK_STEPS) if self.is_on and world_size > 1 else None

    def begin_step(self) -> None:
        if self.collectives is not None:
            self.collectives.begin_step()

    def end_step(self, seconds: float) -> None:
        self.seconds += seconds
        if self.collectives is not None:
            self.collectives.end_step()

    def after_step(self, iteration: int, flops: float) -> bool:
        """Called on every rank after each step, with the step's FLOPs over all ranks.

        True on rank 0 if `verdict` was set or cleared, or is the first of a slow period to name ranks.
        """
        self.flops += flops / self.world_size
        if not self.is_on or iteration % CHECK_STEPS:
            return False
        changed, wanted = False, _NOTHING
        if self.rank == 0 and self.warm:
            changed = self.watch.add(self.flops, self.seconds)
            if self.watch.is_slow:
                wanted = _SLOW
            elif self.usual is None and self.watch.is_as_usual:
                wanted = _AS_USUAL
        self.warm, self.flops, self.seconds = True, 0.0, 0.0
        shares, hosts = [0.0], [socket.gethostname()]
        if self.collectives is not None:
            wanted = told_by_first_rank(wanted)
            if wanted != _NOTHING:
                shares, hosts = gather_shares(self.collectives.share())
        if wanted == _AS_USUAL:
            self.usual = shares
        if wanted != _SLOW:
            self.verdict, self.named = None, False
        elif self.watch.share is not None:  # on rank 0
            self.verdict = judge(self.watch.share, shares, hosts, self.usual)
            if self.verdict.ranks and not self.named:
                changed = self.named = True
        return changed


def earlier_throughput(metrics_file: Path, world_size: int) -> list[float]:
    """FLOP/s per rank of the last steps in metrics.jsonl with the same world size, except slow and skipped ones."""
    return [
        line["model_tflops_per_second_per_rank"] * 1e12
        for line in metrics_tail(metrics_file)
        if line.get("world_size") == world_size and "slow" not in line and line.get("grad_norm") is not None
    ]


class CollectiveTime:
    """The fraction of the last steps' time that this rank spent in collectives, including waits."""

    def __init__(self, num_steps: int):
        # (begin, end, seconds that the host waited) of each step; begin and end in ns since the epoch.
        self.steps: deque[tuple[int, int, float]] = deque(maxlen=num_steps)
        self.began, self.waited, self.waited_before = 0, 0.0, 0.0
        self._time_waits()

    def begin_step(self) -> None:
        self.began, self.waited_before = time.time_ns(), self.waited

    def end_step(self) -> None:
        self.steps.append((self.began, time.time_ns(), self.waited - self.waited_before))

    def share(self) -> float:
        if torch.distributed.get_backend() == "nccl":
            try:
                from torch._C._distributed_c10d import _dump_nccl_trace  # pyright: ignore[reportAttributeAccessIssue]

                return share_of_trace(read_trace(_dump_nccl_trace(True, False, False)), self.steps)
            except Exception:  # a newer format may fail in any way; monitoring must not end a training
                return 0.0
        seconds = sum(end - begin for begin, end, _ in self.steps) / 1e9
        return min(1.0, sum(waited for *_, waited in self.steps) / max(seconds, 1e-9))

    def _time_waits(self) -> None:
        """On a CPU, waits for collectives and messages happen in this method; with NCCL the GPU waits."""
        work: Any = torch.distributed.Work
        wait = work.wait

        @functools.wraps(wait)
        def timed_wait(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return wait(*args, **kwargs)
            finally:
                self.waited += time.perf_counter() - start

        work.wait = timed_wait


def share_of_trace(trace: Trace, steps: Iterable[tuple[int, int, float]]) -> float:
    """The same from NCCL's flight recorder, for GPUs, where the host does not wait; 0 if it has no durations.

    The recorder holds only the last collectives: steps that began earlier are not counted, except the last one.
    """
    entries = [entry for entry in trace.get("entries", []) if entry.get("duration_ms") is not None]
    if not entries:
        return 0.0
    oldest = min(entry["time_created_ns"] for entry in entries)
    spans = [(begin, end) for begin, end, _ in steps]
    spans = [span for span in spans if span[0] >= oldest] or [(max(oldest, begin), end) for begin, end in spans[-1:]]
    total = sum(end - begin for begin, end in spans) / 1e6
    spent = sum(
        entry["duration_ms"]
        for entry in entries
        if any(begin <= entry["time_created_ns"] <= end for begin, end in spans)
    )
    # Collectives that overlap in several streams may add up to more than the total.
    return min(1.0, spent / max(total, 1e-9))


def gather_shares(share: float) -> tuple[list[float], list[str]]:
    """Every rank's fraction and host name; a collective."""
    answers: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(answers, (share, socket.gethostname()))
    return [share for share, _ in answers], [host for _, host in answers]


def told_by_first_rank(number: int) -> int:
    """Rank 0's `number`, on every rank; a collective."""
    box = torch.tensor([number], device=torch.cuda.current_device())
    torch.distributed.broadcast(box, src=0)
    return int(box.item())
