"""The batch script's own process: checks the nodes, runs the trainer as a step, and decides what comes after it.

    python -m megatron_txssm.launch.supervisor RECIPE [--set a.b=c] [--step-timeout SECONDS] …

Slurm itself requeues a job that is preempted or loses a node. What it does not requeue, this does: a job that comes
near its time limit (`--signal=TERM@120` tells the trainer, which saves), one whose worker fails, and one that hangs.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from types import FrameType

from megatron_txssm.errors import UserError
from megatron_txssm.launch import slurm
from megatron_txssm.launch.diagnosis import Diagnosis, close, record
from megatron_txssm.launch.environment import srun_words, step_python
from megatron_txssm.launch.node_preflight import NodePreflight
from megatron_txssm.launch.preflight import is_finished, make_run_directory
from megatron_txssm.launch.requeue import MAX_IDLE_ATTEMPTS, idle_attempts, refusal, requeue, spare_nodes_refusal
from megatron_txssm.launch.run_folder import Attempt, attempts, new_attempt
from megatron_txssm.launch.stall import StallWatch
from megatron_txssm.recipe.loader import load_recipe

# Option -> (default, unit, what it says).
LIMITS = {
    "step-timeout": (1800, "SECONDS", "without a step or a validation for so long, the trainer is ended as hung"),
    "stop-before": (120, "SECONDS", "before the time limit, the trainer saves and the job requeues itself"),
    "max-requeues": (10, "N", "after failures; preemptions and time limits are not counted"),
}
POLL_SECONDS = 0.5
# Slurm sends the signal of --signal up to a minute early.
SIGNAL_SLACK_SECONDS = 75


def add_limits(parser: argparse.ArgumentParser) -> None:
    """The options that `txssm submit` hands on."""
    for name, (default, unit, meaning) in LIMITS.items():
        meaning += " (default: %(default)s)"
        parser.add_argument(f"--{name}", type=int, metavar=unit, default=default, help=meaning)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="supervisor")
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    add_limits(parser)
    args = parser.parse_args(argv)
    try:
        if "SLURM_JOB_ID" not in os.environ:
            raise UserError("this is no Slurm job; submit one: txssm submit --help")
        return Supervisor(args).run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


class Supervisor:
    """One attempt of a job."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.recipe = load_recipe(args.recipe, args.overrides)
        self.job_id = os.environ["SLURM_JOB_ID"]
        self.nodes = slurm.hostnames(os.environ["SLURM_JOB_NODELIST"])
        tasks = os.environ.get("SLURM_NTASKS_PER_NODE")
        self.nproc_per_node = int(tasks or int(os.environ.get("SLURM_NTASKS", "1")) // len(self.nodes))
        self.time_limit = self._time_limit()
        self.told_to_stop = False
        # Slurm tells the trainer at the same time; this process must outlive it, to say what happened.
        signal.signal(signal.SIGTERM, self._note_stop)

    def run(self) -> int:
        """The job's exit code; does not return where the job is requeued."""
        if is_finished(self.recipe):
            print(f"{self.recipe.name}: finished before; {self.recipe.checkpoint_path} holds its last step")
            return 0
        make_run_directory(self.recipe)
        before = attempts(self.recipe.run_path)
        if before and before[-1].cause is None:
            # Its supervisor was killed with its node, or before it could say.
            close(before[-1], self.recipe)
            before[-1].save()
        if (idle := idle_attempts(before, self.job_id)) >= MAX_IDLE_ATTEMPTS:
            raise UserError(f"{idle} attempts in a row came no further; see: txssm why {self.recipe.run_path}")
        attempt = new_attempt(self.recipe, self.job_id, self.nodes, self.nproc_per_node)
        nodes = f"{len(self.nodes)} node{'s' if len(self.nodes) > 1 else ''} ({', '.join(self.nodes)})"
        _say(f"START attempt {attempt.number} of {self.recipe.run_path}: job {self.job_id} on {nodes}")
        self._train(attempt)
        attempt.told_to_stop = self.told_to_stop
        diagnosis = close(attempt, self.recipe)
        if diagnosis.cause in ("stopped", "step_cancelled") and self._is_out_of_time(
            self.args.stop_before + SIGNAL_SLACK_SECONDS
        ):
            record(attempt, diagnosis := Diagnosis("time_limit"))
        attempt.save()
        _say(f"END attempt {attempt.number}: {diagnosis}")
        return self._go_on(attempt, diagnosis, before)

    def _train(self, attempt: Attempt) -> None:
        """Preflight and trainer; fills in how they ended."""
        preflight = NodePreflight(self.recipe, self.args.recipe, self.nodes, attempt.folder)
        attempt.failed_nodes = preflight.run()
        if attempt.failed_nodes or self.told_to_stop:
            return
        # What tells a worker that it is one, and where to leave its last words.
        environment = os.environ | {"TXSSM_ATTEMPT": str(attempt.folder), "MASTER_PORT": str(preflight.port)}
        step = subprocess.Popen(self._step_command(), env=environment)
        watch = StallWatch(self.recipe.run_path, self.args.step_timeout)
        while (code := step.poll()) is None and not (self.told_to_stop and self._is_out_of_time()):
            time.sleep(POLL_SECONDS)
            if attempt.hang is None and not self.told_to_stop and watch.is_stalled():
                attempt.hang = watch.end_step(self.job_id, step, len(self.nodes) * self.nproc_per_node)
        attempt.exit_code = code

    def _step_command(self) -> list[str]:
        trainer = [step_python(), "-u", "-m", "megatron_txssm.cli", "pretrain", self.args.recipe]
        trainer += [word for text in self.args.overrides for word in ("--set", text)]
        return [
            *srun_words("train"),
            f"--nodes={len(self.nodes)}",
            f"--ntasks-per-node={self.nproc_per_node}",
            "--distribution=block",
            # One rank's end is the step's: the others would wait for it.
            "--kill-on-bad-exit=1",
            *trainer,
        ]

    def _note_stop(self, number: int, frame: FrameType | None) -> None:
        self.told_to_stop = True

    def _time_limit(self) -> float:
        """When Slurm will end the job, in seconds since the epoch."""
        try:
            return next((job.end_time for job in slurm.queue() if job.job_id == self.job_id), 0) or float("inf")
        except UserError:
            return float("inf")

    def _is_out_of_time(self, margin_seconds: float = 2) -> bool:
        """At the time limit itself a trainer that still saves has KillWait left, and this process no longer."""
        return time.time() > self.time_limit - margin_seconds

    def _go_on(self, attempt: Attempt, diagnosis: Diagnosis, before: list[Attempt]) -> int:
        """Requeue the job, or end it with its exit code."""
        if diagnosis.cause == "finished":
            return 0
        if attempt.told_to_stop and diagnosis.cause != "time_limit_hit":
            # What it was told to stop for is Slurm's to mend: a requeue here would revive a cancelled job.
            attempt.action = "Slurm ended the job; it starts again what it preempted and what lost a node"
            attempt.save()
            return attempt.exit_code or 1
        if attempt.failed_nodes:
            why_not = spare_nodes_refusal(attempt, os.environ["SLURM_JOB_PARTITION"])
        else:
            why_not = refusal(attempt, before, self.args.max_requeues)
        attempt.action = "the job was requeued" if why_not is None else f"the job was not requeued: {why_not}"
        attempt.save()
        _say(attempt.action)
        if why_not is None:
            requeue(self.job_id, list(attempt.failed_nodes))
        if diagnosis.cause in ("refused", "preflight"):
            return 2
        # Megatron's own exits are no failure; whoever waits for this job must not take it for finished, though.
        return attempt.exit_code or 1


def _say(text: str) -> None:
    print(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
