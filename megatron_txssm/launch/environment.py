"""Which process of a run this is, as the launcher's environment variables say: torchrun's, or those of a Slurm step."""

import ctypes
import os
import re
import signal
import subprocess

from megatron_txssm.errors import UserError


def is_worker() -> bool:
    """True in a process that torchrun or a Slurm step started as one rank of a run."""
    return "RANK" in os.environ


def adopt_slurm_step() -> None:
    """Under srun, set what torch.distributed reads (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT).

    Variables that are set already win, so a site may choose address and port. Nothing happens outside a Slurm step: a
    batch script's own shell has SLURM_PROCID too, but no step. Nor in a step of one task, such as the shell that
    `srun --pty bash` gives: what is typed there starts its processes itself.
    """
    env = os.environ
    if "RANK" in env or "SLURM_STEP_ID" not in env or env["SLURM_STEP_NUM_TASKS"] == "1":
        return
    env["RANK"] = env["SLURM_PROCID"]
    env.setdefault("WORLD_SIZE", env["SLURM_STEP_NUM_TASKS"])
    env.setdefault("LOCAL_RANK", env["SLURM_LOCALID"])
    tasks = _tasks_per_node(env["SLURM_STEP_TASKS_PER_NODE"])
    env.setdefault("LOCAL_WORLD_SIZE", str(tasks[int(env["SLURM_NODEID"])]))
    if "MASTER_ADDR" not in env:
        env["MASTER_ADDR"] = _first_host(env["SLURM_STEP_NODELIST"])
    # The same on all nodes and, within a range above the usual services, another for each job.
    env.setdefault("MASTER_PORT", str(20000 + int(env["SLURM_JOB_ID"]) % 20000))


def end_with_launcher() -> None:
    """Under torchrun, stop as at SIGTERM when torchrun itself dies, or its workers would train on unseen for ever."""
    pr_set_pdeathsig = 1
    if "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, int(signal.SIGTERM))


def _tasks_per_node(text: str) -> list[int]:
    """One number a node, from Slurm's run lengths: `8(x3),4` is 8, 8, 8, 4."""
    runs = (re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", run) for run in text.split(","))
    return [int(run[1]) for run in runs if run for _ in range(int(run[2] or 1))]


def _first_host(nodelist: str) -> str:
    """The first host of Slurm's compressed list, such as `gpu[03-07,11]`."""
    try:
        hosts = subprocess.run(
            ["scontrol", "show", "hostnames", nodelist], check=True, capture_output=True, text=True, timeout=60
        ).stdout.split()
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"scontrol cannot expand SLURM_STEP_NODELIST={nodelist!r} ({error}); set MASTER_ADDR") from None
    return hosts[0]
