"""How a job is requeued: with patience for a slurmctld that is away, and without its bad nodes."""

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

# What slurmctld goes on refusing after so long stays refused; the time begins anew whenever it was away.
REQUEUE_SECONDS = 900
# Slurm's own words (slurm_errno.c) for what will not change. It has many for a slurmctld that is away, starts or is
# busy: those are worth another try, whatever they are in the next version.
_REFUSED = re.compile(
    r"Invalid job id|Access/permission denied|presently disabled|already completing or completed|Invalid user id"
    r"|Invalid node name|there is no \w+ on this machine"
)
_DONE_ALREADY = "Job is pending execution"


def requeue_without(job_id: str, leave_out: Sequence[str], nodes: list[str], before: list[Attempt]) -> Decision:
    """A requeue of a job on `nodes`, if need be with nodes that it left out earlier; the end where these are too few.

    `before`: the attempts so far.
    """
    partition, avoided = os.environ["SLURM_JOB_PARTITION"], excluded_nodes(job_id)
    if spare_nodes_refusal(leave_out, nodes, partition, avoided) is None:
        return Decision("requeue", leave_out=tuple(leave_out))
    # What the user excluded, the job has never run on.
    tried = {node for attempt in before if attempt.job_id == job_id for node in attempt.nodes}
    left_out = [node for node in avoided if node in tried]
    if why_not := spare_nodes_refusal(leave_out, nodes, partition, set(avoided) - tried):
        return Decision("end", why_not)
    return Decision("requeue", leave_out=tuple(leave_out), take_back=tuple(left_out))


def spare_nodes_refusal(
    leave_out: Sequence[str], nodes: list[str], partition: str, avoided: Collection[str] = ()
) -> str | None:
    """Why a job on `nodes` cannot do without some of them; None where others can take their place.

    `avoided`: those that it does without already.
    """
    if len(leave_out) == len(nodes):
        return "every node failed the preflight"
    command = ("sinfo", "--noheader", "--Node", f"--partition={partition}", "--format=%N %t")
    states = until_answered(slurm.run_slurm, *command)
    usable = {node for node, state in map(str.split, states.splitlines()) if not _is_lost(state)}
    if len(usable - set(leave_out) - set(avoided)) < len(nodes):
        return f"partition {partition} has no node that could take the place of {', '.join(leave_out)}"
    return None


def _is_lost(state: str) -> bool:
    # The star: it does not answer.
    return state.endswith("*") or state.startswith(("down", "drain", "drng", "fail", "inval", "maint", "unk"))


def requeue(
    job_id: str, leave_out: Sequence[str] = (), take_back: Collection[str] = (), hold: bool = False
) -> NoReturn:
    """Requeue the job that this process belongs to; it does not return: Slurm then kills this process.

    It then avoids `leave_out` and what it avoided before, but for `take_back`. That can be said only while the job is
    pending, which is in the seconds between Slurm's SIGTERM, which neither this process nor its scontrol must obey, and
    its SIGKILL. UserError where Slurm refuses.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    nodes = sorted({*excluded_nodes(job_id)} - {*take_back} | {*leave_out}) if leave_out else []
    until_answered(_requeue_once, "requeuehold" if hold else "requeue", job_id)
    if nodes:
        until_answered(slurm.run_slurm, "scontrol", "update", f"JobId={job_id}", f"ExcNodeList={','.join(nodes)}")
    time.sleep(REQUEUE_SECONDS)
    raise UserError(f"job {job_id} was requeued, but Slurm did not end it")


def excluded_nodes(job_id: str) -> list[str]:
    """Those that the job avoids; waits for slurmctld."""

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
        # Slurm was quicker, or the answer to an earlier try was lost.
        if _DONE_ALREADY not in str(error):
            raise


def until_answered[**P, T](call: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
    """What `call` returns: called again and again unless Slurm refuses; a slurmctld that is away is waited for."""
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
