"""Which rank of a run this process is, according to the environment variables of torchrun or of a Slurm step."""

import contextlib
import ctypes
import multiprocessing
import os
import re
import shlex
import signal
import sys
from pathlib import Path
from typing import NoReturn

from megatron_txssm.errors import UserError
from megatron_txssm.process_tree import signal_descendants
from megatron_txssm.slurm.hostlist import expand

# Above the ports of the usual services, and the first port of Linux's outgoing connections
# (net.ipv4.ip_local_port_range).
FIRST_PORT, EPHEMERAL_PORT = 20000, 32768


def is_worker() -> bool:
    """True in a process that torchrun or a Slurm step started as one rank of a run."""
    return "RANK" in os.environ


def adopt_slurm_step() -> None:
    """Under srun, set what torch.distributed reads (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT).

    Variables that are already set take precedence, so a site may choose address and port. Does nothing outside a Slurm
    step: a batch script's own shell has SLURM_PROCID, but no step. Also does nothing in a step of one task that the
    supervisor did not start, such as the shell of `srun --pty bash`: commands typed there start their own processes.
    """
    env = os.environ
    if "RANK" in env or "SLURM_STEP_ID" not in env:
        return
    attempt = attempt_folder()
    if env["SLURM_STEP_NUM_TASKS"] == "1" and attempt is None:
        return
    env["RANK"] = env["SLURM_PROCID"]
    env.setdefault("WORLD_SIZE", env["SLURM_STEP_NUM_TASKS"])
    env.setdefault("LOCAL_RANK", env["SLURM_LOCALID"])
    tasks = _tasks_per_node(env["SLURM_STEP_TASKS_PER_NODE"])
    env.setdefault("LOCAL_WORLD_SIZE", str(tasks[int(env["SLURM_NODEID"])]))
    if "MASTER_ADDR" not in env:
        env["MASTER_ADDR"] = _first_host(env["SLURM_STEP_NODELIST"])
    env.setdefault("MASTER_PORT", str(rendezvous_port()))
    if attempt is not None:
        # Where torch's error handler records the error that ended this rank.
        env["TORCHELASTIC_ERROR_FILE"] = str(attempt / f"rank_{env['RANK']}.json")


def rendezvous_port(attempt: int = 0) -> int:
    """A TCP port that is the same on all nodes and differs between 12,768 consecutive jobs.

    It lies above the usual services and below the ports that Linux gives to outgoing connections (32768 and up), any of
    which may be taken at any moment. `attempt`: number of ports that were found taken.
    """
    # A stride that avoids the next jobs' first ports.
    return FIRST_PORT + (int(os.environ["SLURM_JOB_ID"]) + attempt * 4099) % (EPHEMERAL_PORT - FIRST_PORT)


def attempt_folder() -> Path | None:
    """The folder in which this process records its error; None if no batch job's supervisor started it."""
    return Path(os.environ["TXSSM_ATTEMPT"]) if "TXSSM_ATTEMPT" in os.environ else None


def step_python() -> str:
    """The Python interpreter of a step; in a container it differs from this process's."""
    return os.environ.get("TXSSM_STEP_PYTHON", sys.executable)


def srun_words(name: str) -> list[str]:
    """The beginning of an srun command in a batch job, with the site's options, such as those for a container."""
    words = ["srun", f"--job-name={name}", *shlex.split(os.environ.get("TXSSM_SRUN_OPTIONS", ""))]
    # srun does not inherit it from sbatch.
    cpus = os.environ.get("SLURM_CPUS_PER_TASK")
    return words if cpus is None else [*words, f"--cpus-per-task={cpus}"]


def end_with_launcher() -> None:
    """Under torchrun, get SIGTERM when torchrun itself dies; otherwise its workers would keep training, unnoticed."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _hear_of_parents_death(signal.SIGTERM)


def end_with_parent() -> None:
    """In a helper process, end when the process that started it ends for any reason."""
    _hear_of_parents_death(signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid != os.getppid():
        # The parent died before it could be watched.
        os._exit(1)


def _hear_of_parents_death(number: signal.Signals) -> None:
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, int(number))


def end_process(code: int) -> NoReturn:
    """End this process and its helpers now, whatever they wait for.

    At exit, Python would wait for every helper, forever: Megatron's, with which a save collects its results, ends only
    on request, and after an exception there is no request.
    """
    signal_descendants(os.getpid(), signal.SIGKILL)
    for stream in (sys.stdout, sys.stderr):
        # The disk may be full, or the terminal closed.
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _tasks_per_node(text: str) -> list[int]:
    """One number per node, from Slurm's run lengths: `8(x3),4` is 8, 8, 8, 4."""
    runs = (re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", run) for run in text.split(","))
    return [int(run[1]) for run in runs if run for _ in range(int(run[2] or 1))]


def _first_host(nodelist: str) -> str:
    """The first host in Slurm's compressed list, such as `gpu[03-07,11]`."""
    try:
        return expand(nodelist)[0]
    except (UserError, IndexError):
        raise UserError(
            f"SLURM_STEP_NODELIST={nodelist!r} is not a list of nodes as Slurm writes them; set MASTER_ADDR"
        ) from None
