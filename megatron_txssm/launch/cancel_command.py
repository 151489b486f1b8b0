"""txssm cancel: end a run's jobs; the trainer finishes its step and saves in the time that Slurm leaves it."""

import argparse
from typing import Any

from megatron_txssm.cli import add_verb
from megatron_txssm.errors import UserError
from megatron_txssm.launch import slurm
from megatron_txssm.launch.run_folder import find_run, job_ids

EXAMPLES = ("txssm cancel runs/transxssm_1.3b", "txssm cancel 17")


def add_parser(subparsers: Any) -> None:
    parser = add_verb(subparsers, "cancel", EXAMPLES)
    parser.add_argument("run", help="a run folder, a name under runs/, or the number of one of its jobs")


def run(args: argparse.Namespace) -> int:
    folder = find_run(args.run)
    ours = job_ids(folder)
    if not ours:
        raise UserError(
            f"{folder} was not submitted to Slurm; Ctrl-C in its terminal, or SIGTERM, lets it save and stop"
        )
    jobs = [job for job in slurm.queue() if not job.is_over and job.job_id.partition("_")[0] in ours]
    if not jobs:
        print(f"{folder} has no job that is pending or running")
        return 0
    for job in jobs:
        slurm.run_slurm("scancel", job.job_id)
        print(f"cancelled job {job.job_id} ({job.name}, {job.state})")
    return 0
