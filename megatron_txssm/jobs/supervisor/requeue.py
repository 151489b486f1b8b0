"""Requeues a job without its bad nodes, and waits for a slurmctld that is down."""

import os
import re
import signal
import time
from collections.abc import Callable, Collection, Sequence
from typing import NoReturn

from megatron_txssm.errors import UserError
from megatron_txssm.jobs.attempts import Attempt
from megatron_txssm.jobs.supervisor.decision import Decision
from megatron_txssm.slurm import client as slurm

# A request that slurmctld still refuses after this time is given up; the time restarts whenever slurmctld was down.
REQUEUE_SECONDS = 900
# Slurm's messages (slurm_errno.c) for permanent errors. All others are retried: Slurm has many for a slurmctld that is
# down, starting or busy, and new versions may add more.
_REFUSED = re.compile(
    r"Invalid job id|Access/permission denied|presently disabled|already completing or completed|Invalid user id"
    r"|Invalid node name|there is no \w+ on this machine"
)
_DONE_ALREADY = "Job is pending execution"


def requeue_without(job_id: str, leave_out: Sequence[str], nodes: list[str], before: list[Attempt]) -> Decision:
    """A requeue of a job on `nodes`, if necessary with nodes that it excluded earlier; the end if these are too few.

    `before`: earlier attempts.
    """
    partition, avoided = os.environ["SLURM_JOB_PARTITION"], excluded_nodes(job_id)
    if spare_nodes_refusal(leave_out, nodes, partition, avoided) is None:
        return Decision("requeue", leave_out=tuple(leave_out))
    # The job has never run on nodes that the user excluded.
    tried = {node for attempt in before if attempt.job_id == job_id for node in attempt.nodes}
    left_out = [node for node in avoided if node in tried]
    if why_not := spare_nodes_refusal(leave_out, nodes, partition, set(avoided) - tried):
        return Decision("end", why_not)
    return Decision("requeue", leave_out=tuple(leave_out), take_back=tuple(left_out))


def spare_nodes_refusal(
    leave_out: Sequence[str], nodes: list[str], partition: str, avoided: Collection[str] = ()
) -> str | None:
    """Why a job on `nodes` cannot exclude `leave_out`; None if other nodes can replace them.

    `avoided`: nodes that it already excludes.
    """
    if len(leave_out) == len(nodes):
        return "every node failed the preflight"
    command = ("sinfo", "--noheader", "--Node", f"--partition={partition}", "--format=%N %t")
    states = until_answered(slurm.run_slurm, *command)
    usable = {node for node, state in map(str.split, states.splitlines()) if not _is_lost(state)}
    if len(usable - set(leave_out) - set(avoided)) < len(nodes):
        return f"partition {partition} has no node that could replace {', '.join(leave_out)}"
    return None


def _is_lost(state: str) -> bool:
    # A star marks a node that does not respond.
    return state.endswith("*") or state.startswith(("down", "drain", "drng", "fail", "inval", "maint", "unk"))


def requeue(
    job_id: str, leave_out: Sequence[str] = (), take_back: Collection[str] = (), hold: bool = False
) -> NoReturn:
    """Requeue the job that this process belongs to, and end this process, so that Slurm need not wait to kill it.

    With `leave_out`, the job then avoids these nodes and those that it avoided before, except `take_back`. Slurm
    accepts this only while the job is pending: in the seconds between its SIGTERM, which this process and its scontrol
    must ignore, and its SIGKILL. UserError if Slurm refuses.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    nodes = sorted({*excluded_nodes(job_id)} - {*take_back} | {*leave_out}) if leave_out else []
    until_answered(_requeue_once, "requeuehold" if hold else "requeue", job_id)
    if nodes:
        until_answered(slurm.run_slurm, "scontrol", "update", f"JobId={job_id}", f"ExcNodeList={','.join(nodes)}")
    # Slurm ignores the exit code of a requeued job. One that a crashing slurmctld forgot must not count as finished.
    raise SystemExit(os.EX_TEMPFAIL)


def excluded_nodes(job_id: str) -> list[str]:
    """Nodes that the job avoids; waits for slurmctld."""

    def ask() -> str:
        excluded = next((job.excluded for job in slurm.queue() if job.job_id == job_id), None)
        if excluded is None:
            raise UserError(f"squeue does not know job {job_id}")
        return excluded

    return slurm.hostnames(until_answered(ask))


def _requeue_once(verb: str, job_id: str) -> None:
    try:
        slurm.run_slurm("scontrol", verb, job_id)
    except UserError as error:
        # Slurm has already requeued the job, or the answer to an earlier try was lost.
        if _DONE_ALREADY not in str(error):
            raise


def until_answered[**P, T](call: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
    """Result of `call`, retried for `REQUEUE_SECONDS` unless Slurm refuses, and for as long as slurmctld is down."""
    wait, deadline = 0.5, time.monotonic() + REQUEUE_SECONDS
    while True:
        try:
            return call(*args, **named)
        except UserError as error:
            if _REFUSED.search(str(error)) or time.monotonic() > deadline:
                raise
            if not _is_up():
                deadline = time.monotonic() + REQUEUE_SECONDS
        time.sleep(wait)
        wait = min(2 * wait, 15.0)


def _is_up() -> bool:
    """Whether slurmctld, or its backup, answers."""
    try:
        return "is UP" in slurm.run_slurm("scontrol", "ping")
    except UserError:
        return False
