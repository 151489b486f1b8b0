"""Measures the network between a job's nodes before training, and names nodes that are slower than the others."""

import contextlib
import json
import os
import statistics
import subprocess
from dataclasses import dataclass, field
from typing import Never, TypedDict, cast

from megatron_txssm.jobs.nodes.gpu_check import limit
from megatron_txssm.slurm.environment import srun_words, step_python

_MODULE = "megatron_txssm.jobs.nodes.bandwidth_check"
_LIMIT = "TXSSM_PREFLIGHT_ALLREDUCE_GB_PER_S"
# Per rank: enough for the network's full speed; on CPUs, small enough to take seconds at most.
GPU_MEGABYTES, CPU_MEGABYTES = 256, 16
# A node below this share of the nodes' median is slow.
SLOW_SHARE = 0.5


class Measured(TypedDict):
    """bandwidth_check's output: GB/s over all ranks, GB/s into each node from the one before it, total seconds."""

    allreduce: float
    links: list[float]
    seconds: float


@dataclass
class Bandwidth:
    """Result of the measurement; `problems`: nodes at fault -> their problems."""

    # Empty if not measured.
    measured: Measured | dict[str, Never] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)
    problems: dict[str, list[str]] = field(default_factory=dict)


def measure(nodes: list[str], gpus: int, port: int, timeout_seconds: float) -> Bandwidth:
    """Measure an all-reduce over all ranks of the nodes, unless the site turns it off.

    A single node is not measured, and nodes without GPUs only against a limit set by the site. If the all-reduce is too
    slow but no node is slower than the others, this is reported and the run begins: other nodes would not be better.
    """
    found = Bandwidth()
    least = limit(_LIMIT.removeprefix("TXSSM_PREFLIGHT_"), 0 if gpus else None, found.words)
    if least is None or len(nodes) < 2:
        return found
    command = [
        *srun_words("bandwidth"),
        *(f"--nodes={len(nodes)}", f"--nodelist={','.join(nodes)}", f"--ntasks={len(nodes) * max(gpus, 1)}"),
        *(f"--ntasks-per-node={max(gpus, 1)}", "--distribution=block"),
        "--kill-on-bad-exit=1",
        *(step_python(), "-m", _MODULE),
        f"--megabytes={GPU_MEGABYTES if gpus else CPU_MEGABYTES}",
        f"--timeout={timeout_seconds:g}",
    ]
    environment = os.environ | {"MASTER_ADDR": nodes[0], "MASTER_PORT": str(port)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, errors="replace", env=environment) as srun:
        try:
            output, _ = srun.communicate(timeout=timeout_seconds)
            why = f"its step ended with exit code {srun.returncode}; see srun's messages above"
        except subprocess.TimeoutExpired:
            srun.kill()
            output, _ = srun.communicate()
            why = f"it did not end within {timeout_seconds:g} s (--preflight-timeout)"
    answers = cast(list[Measured], json_lines(output, '{"allreduce": '))
    if not answers:
        found.words.append(f"all-reduce between nodes could not be measured: {why} ({_LIMIT}=off disables it)")
        return found
    found.measured = answers[-1]
    _judge(found, answers[-1], nodes, least)
    return found


def json_lines(output: str, begin: str) -> list[dict[str, object]]:
    """The output lines that start with `begin`, parsed; a line cut off when srun was killed is skipped."""
    found = []
    for line in output.splitlines():
        if line.startswith(begin):
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return found


def _judge(found: Bandwidth, measured: Measured, nodes: list[str], least: float) -> None:
    rate, seconds = measured["allreduce"], measured["seconds"]
    found.words.append(f"all-reduce over {len(nodes)} nodes: {rate:.2f} GB/s (measured in {seconds:.1f} s)")
    if rate >= least:
        return
    links = measured["links"]
    # The better of a node's two links counts: the other may be slow because of the neighbour.
    best = [max(links[place], links[(place + 1) % len(links)]) for place in range(len(links))]
    usual = statistics.median(best)
    for node, own in zip(nodes, best, strict=True):
        if own < SLOW_SHARE * usual:
            found.problems[node] = [
                f"its network reaches {own:.2f} GB/s, that of the other nodes {usual:.2f}; an all-reduce over all "
                f"reaches {rate:.2f} GB/s (limit {least:g}: {_LIMIT})"
            ]
    if not found.problems:
        found.words.append(f"that is below the limit {least:g} ({_LIMIT}), and no node is slower than the others")
