"""Slurm's client commands and their answers."""

import contextlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_txssm.errors import UserError, shown
from megatron_txssm.slurm.hostlist import expand

# Allowed in a batch script's header: what a shell and sbatch read as one word.
PLAIN_WORD = re.compile(r"[\w.,:=@%/+\[\]*()-]+", re.ASCII)
# Allowed in a run folder's path: no %, since sbatch would expand it.
PLAIN_PATH = re.compile(r"[\w.,:=@/+-]+", re.ASCII)
# squeue's letters for the fields of `Job`, and the separators before a job and between fields: no name contains them.
_FIELDS = ("%i", "%j", "%T", "%r", "%N", "%P", "%o", "%x", "%e", "%Z")
_JOB, _FIELD = "\x1e", "\x1f"
# States of a job that has ended, in Slurm 21.08 to 26.05; squeue shows COMPLETING until all its processes have ended.
OVER = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
    # REVOKED: another cluster of the federation runs it.
    *("REVOKED", "TIMEOUT"),
}
# States in which a job has its nodes, or is getting them.
RUNS = {"COMPLETING", "CONFIGURING", "RESIZING", "RUNNING", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED"}
# Printed by Slurm's commands if slurmctld is down or too busy.
_NO_ANSWER = re.compile(
    r"Unable to contact slurm controller|Unexpected message received|Zero Bytes were transmitted|[Tt]imed out"
    r"|[Cc]onnection (?:refused|reset|failure)"
)
_PATIENCE_SECONDS = 120

# Option -> variables, without SBATCH_, that override it, if their names differ from the option's.
_VARIABLES = {
    "TIME": ("TIMELIMIT",),
    "REQUEUE": ("REQUEUE", "NO_REQUEUE"),
    "MEM": ("MEM_PER_NODE", "MEM_PER_CPU", "MEM_PER_GPU"),
    "SWITCHES": ("REQ_SWITCH",),
}
# Never inherited: ARRAY_INX would put several jobs into one run folder, WAIT would block, ERROR would move the job's
# messages, INPUT may not exist, NO_KILL would keep a job without a lost node, and GPUS* would change the allocation.
_NEVER = (
    *("ARRAY_INX", "WAIT", "ERROR", "INPUT", "NO_KILL"),
    *("GPUS", "GPUS_PER_NODE", "GPUS_PER_SOCKET", "GPUS_PER_TASK"),
)


class NoAnswer(UserError):
    """slurmctld does not answer: the state of jobs is unknown."""


@dataclass(frozen=True)
class Job:
    """One job, or one task of a job array, as squeue shows it."""

    # "17", or "17_3" for a task of an array.
    job_id: str
    name: str
    # PENDING, RUNNING, COMPLETING …
    state: str
    # Why it is pending; "None" if it is not.
    reason: str
    # Slurm's compressed list; empty while pending.
    nodes: str
    partition: str
    # The script that sbatch was given, without its arguments.
    script: Path
    # Slurm's compressed list of nodes that the job avoids.
    excluded: str
    # Seconds since the epoch; 0 if unknown.
    end_time: int

    @property
    def is_over(self) -> bool:
        return self.state in OVER

    @property
    def runs(self) -> bool:
        """Whether it may have processes: it is neither over nor waiting."""
        return self.state in RUNS


def run_slurm(*command: str, stdin: str | None = None, env: dict[str, str] | None = None) -> str:
    """The output of a Slurm command; UserError with its reason if it fails, NoAnswer if slurmctld is down."""
    try:
        return subprocess.run(
            command,
            check=True,
            capture_output=True,
            text=True,
            errors="replace",
            input=stdin,
            env=env,
            timeout=_PATIENCE_SECONDS,
        ).stdout
    except FileNotFoundError:
        raise UserError(f"there is no {command[0]} on this machine; run it on a login node of the cluster") from None
    except subprocess.CalledProcessError as error:
        reason = " ".join(error.stderr.split()) or f"exit code {error.returncode}"
        said = shlex.join(word for word in command if not word.startswith("--format="))
        if _NO_ANSWER.search(reason):
            raise no_answer(f"{said}: {reason}") from None
        raise UserError(f"{said}: {reason}") from None
    except subprocess.TimeoutExpired:
        raise no_answer(f"{command[0]} has not answered for {_PATIENCE_SECONDS} s") from None
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"{command[0]} cannot be run: {error}") from None


def no_answer(reason: str) -> NoAnswer:
    return NoAnswer(
        f"Slurm does not answer ({reason}); running jobs continue; try again when `scontrol ping` reports UP"
    )


def queue() -> list[Job]:
    """This user's pending, running and ending jobs, sorted by number.

    Read as text: before 23.02, --json ignores --me and returns everybody's jobs, 20 kB each.
    """
    form = _JOB + _FIELD.join(_FIELDS)
    text = run_squeue("--me", "--all", f"--format={form}")
    before, *entries = text.split(_JOB)
    rows = [entry.removesuffix("\n").split(_FIELD) for entry in entries]
    if before.strip() or any(len(row) != len(_FIELDS) for row in rows):
        raise UserError(f"squeue answers {shown(text)}, not a list of jobs; does `squeue --me` work?")
    return sorted(map(_job, rows), key=lambda job: [int(number) for number in re.findall(r"\d+", job.job_id)])


def time_limit_of(job_id: str, *, at_start: bool = False) -> float:
    """When Slurm will end this process's job, in seconds since the epoch; infinite if unknown.

    `scontrol update` may have changed it since the job's start, so slurmctld is asked, unless `at_start`.
    """
    known = os.environ.get("SLURM_JOB_END_TIME", "")
    if not (at_start and known.isdecimal()):
        with contextlib.suppress(UserError):
            if end_time := next((job.end_time for job in queue() if job.job_id == job_id), 0):
                return end_time
    return float(known) if known.isdecimal() else float("inf")


def run_squeue(*options: str) -> str:
    """The output of squeue, regardless of the user's SQUEUE_ variables; times in seconds since the epoch."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}
    return run_slurm("squeue", "--noheader", *options, env=environment | {"SLURM_TIME_FORMAT": "%s"})


def _job(row: list[str]) -> Job:
    job_id, name, state, reason, nodes, partition, command, excluded, end_time, folder = row
    return Job(
        # An array's pending tasks, 17_[3-9%2], get the array's number.
        job_id=job_id.partition("_[")[0],
        name=name,
        state=state,
        reason=reason,
        nodes=nodes,
        partition=partition,
        script=_script(command, Path(folder)),
        excluded=excluded,
        end_time=int(end_time) if end_time.isdecimal() else 0,
    )


def _script(command: str, folder: Path) -> Path:
    """The script that sbatch was given in `folder`; older versions of squeue also show its arguments."""
    if command == "(null)":
        return Path()
    words = command.split(" ")
    for count in range(1, len(words)):
        script = folder / " ".join(words[:count])
        if os.path.isfile(script):
            return script
    return folder / command


def check_submission(script: str) -> None:
    """UserError with Slurm's reason if the cluster would reject a script: an unknown partition, a bad time …"""
    try:
        run_slurm("sbatch", "--test-only", stdin=script, env=_environment(script))
    except UserError as error:
        # Slurm reports nodes that do not exist and nodes that are down alike; sbatch itself accepts the latter.
        if "node configuration is not available" not in str(error):
            raise
        print(f"warning: {error}; if that is because nodes are down, the job waits for them", file=sys.stderr)


def submit(script: Path, *options: str) -> str:
    """Queue a batch script; returns the job's number."""
    # sbatch prints "17" or "17;cluster".
    environment = _environment(script.read_text(encoding="utf-8"))
    answer = run_slurm("sbatch", "--parsable", *options, str(script), env=environment).strip()
    job = answer.partition(";")[0]
    if not job.isdecimal():
        raise UserError(f"sbatch {script} answers {shown(answer)}, not the number of a job; see squeue")
    return job


def _environment(script: str) -> dict[str, str]:
    return sbatch_environment(re.findall(r"^#SBATCH --([a-z-]+)", script, re.MULTILINE))


def sbatch_environment(stated: Iterable[str]) -> dict[str, str]:
    """This process's variables, without those that override a batch script's options (SBATCH_PARTITION and the like
    take precedence over #SBATCH lines), and without those of the job that this process may run in."""
    names = {name.upper().replace("-", "_") for name in stated}
    hidden = {f"SBATCH_{variable}" for name in names for variable in _VARIABLES.get(name, (name,))}
    hidden |= {f"SBATCH_{name}" for name in _NEVER}
    return {
        name: value
        for name, value in os.environ.items()
        if name not in hidden and (name == "SLURM_CONF" or not name.startswith("SLURM_"))
    }


def hostnames(nodes: str) -> list[str]:
    """The hosts in Slurm's compressed list, such as `gpu[03-07,11]`."""
    return expand(nodes)
