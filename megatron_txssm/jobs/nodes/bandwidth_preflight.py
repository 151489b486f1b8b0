"""Measures the network between a job's nodes before training, and names a node that is slower than the others."""

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
# Of each rank: enough for the network's full speed, on CPUs for seconds at most.
GPU_MEGABYTES, CPU_MEGABYTES = 256, 16
# Of the others' median, at which a node is the slow one.
SLOW_SHARE = 0.5


class Measured(TypedDict):
    """As bandwidth_check prints it: GB/s over all ranks, GB/s into each node from the one before it, seconds."""

    allreduce: float
    links: list[float]
    seconds: float


@dataclass
class Bandwidth:
    """What was found; `problems` names the nodes that are at fault."""

    # Empty where it was not measured.
    measured: Measured | dict[str, Never] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)
    problems: dict[str, list[str]] = field(default_factory=dict)


def measure(nodes: list[str], gpus: int, port: int, timeout_seconds: float) -> Bandwidth:
    """All-reduce over every rank of the nodes; nothing where the site wants none.

    Without a limit of the site's it is measured on several nodes with GPUs only. Where it is too slow and no node
    stands out, that is said, and the run begins: no other nodes would be better.
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
            why = f"its step ended with exit code {srun.returncode}; see srun's words above"
        except subprocess.TimeoutExpired:
            srun.kill()
            output, _ = srun.communicate()
            why = f"it did not end within {timeout_seconds:g} s (--preflight-timeout)"
    answers = cast(list[Measured], json_lines(output, '{"allreduce": '))
    if not answers:
        found.words.append(f"all-reduce between nodes could not be measured: {why} ({_LIMIT}=off leaves it out)")
        return found
    found.measured = answers[-1]
    _judge(found, answers[-1], nodes, least)
    return found


def json_lines(output: str, begin: str) -> list[dict[str, object]]:
    """The lines of a step's output that begin so; one that was cut off when srun was killed is left out."""
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
    # A node is as good as the better of its two links: the other may be slow for the neighbour's sake.
    best = [max(links[place], links[(place + 1) % len(links)]) for place in range(len(links))]
    usual = statistics.median(best)
    for node, own in zip(nodes, best, strict=True):
        if own < SLOW_SHARE * usual:
            found.problems[node] = [
                f"its network carries {own:.2f} GB/s, the other nodes' {usual:.2f}; an all-reduce over all makes "
                f"{rate:.2f} GB/s (limit {least:g}: {_LIMIT})"
            ]
    if not found.problems:
        found.words.append(f"that is below the limit {least:g} ({_LIMIT}), and no node is slower than the others")
