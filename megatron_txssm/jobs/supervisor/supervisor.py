"""The batch script's process: checks the nodes, runs the trainer as a step, and decides what follows.

    python -m megatron_txssm.jobs.supervisor.supervisor RECIPE [--set a.b=c] [--step-timeout SECONDS] …

Slurm itself requeues a job that is preempted or loses a node. The supervisor requeues the others: a job near its time
limit (`--signal=TERM@120` tells the trainer, which saves), one whose worker fails, and one that hangs.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from megatron_txssm.errors import UserError
from megatron_txssm.jobs.attempts import Attempt, attempts, new_attempt
from megatron_txssm.jobs.cause import Cause
from megatron_txssm.jobs.diagnosis.diagnosis import Diagnosis, close, record, recorded
from megatron_txssm.jobs.diagnosis.lost_node import lost_nodes, reconsider
from megatron_txssm.jobs.nodes.node_preflight import NodePreflight
from megatron_txssm.jobs.run_jobs import check_no_other_job
from megatron_txssm.jobs.supervisor.decision import MAX_IDLE_ATTEMPTS, ROUTINE, Decision, decide, idle_attempts
from megatron_txssm.jobs.supervisor.failed_task import FailedTaskWatch
from megatron_txssm.jobs.supervisor.requeue import requeue, requeue_without
from megatron_txssm.jobs.supervisor.settings import Settings, parse_settings
from megatron_txssm.jobs.supervisor.stall import StallWatch, end_leftover_steps
from megatron_txssm.jobs.supervisor.time_limit import TimeLimit
from megatron_txssm.jobs.supervisor.unfit_node import check_checkpoints, check_run_folder, leave_node, say
from megatron_txssm.notify import notify, wait_for_notifications
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.slurm import client as slurm
from megatron_txssm.slurm.environment import srun_words, step_python
from megatron_txssm.slurm.words import why_slurm_ended_it
from megatron_txssm.training.launch.preflight import is_finished, make_run_directory
from megatron_txssm.training.launch.run_lock import check_not_running

POLL_SECONDS = 0.5


def main(argv: list[str] | None = None) -> int:
    settings = parse_settings(argv)
    recipe = Path(settings.recipe)
    try:
        if "SLURM_JOB_ID" not in os.environ:
            raise UserError("this process is not part of a Slurm job; submit one: txssm submit --help")
        try:
            check_run_folder(recipe)
            return Supervisor(settings).run()
        except UserError as error:
            if isinstance(error.__cause__, OSError):
                # The run's records could not be read or written.
                leave_node(recipe.parent, error.__cause__)
            raise
        except (OSError, ImportError) as error:
            # The run folder also holds the code.
            leave_node(recipe.parent, error)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


class Supervisor:
    """One start of a job: an attempt, and further ones while the trainer can be restarted on the job's nodes."""

    def __init__(self, settings: Settings):
        self.settings, self.limits = settings, settings.limits
        self.recipe = load_recipe(settings.recipe, settings.overrides)
        self.job_id = os.environ["SLURM_JOB_ID"]
        self.nodes = slurm.hostnames(os.environ["SLURM_JOB_NODELIST"])
        self.num_nodes = settings.nodes or len(self.nodes)
        tasks = os.environ.get("SLURM_NTASKS_PER_NODE")
        self.nproc_per_node = int(tasks or int(os.environ.get("SLURM_NTASKS", "1")) // len(self.nodes))
        self.time_limit = TimeLimit(self.job_id, self.limits.stop_before)
        self.told_to_stop = False
        self.trouble: OSError | None = None
        # Ranks of the last step may survive, unknown to slurmctld.
        self.lost_step = False
        # Slurm signals the trainer at the same time; this process must outlive it to record what happened.
        signal.signal(signal.SIGTERM, self._note_stop)

    def run(self) -> int:
        """Run the job; returns its exit code. Does not return if the job is requeued."""
        check_no_other_job(self.recipe.run_path, self.job_id)
        self._close_last_attempt()
        if is_finished(self.recipe):
            say(f"{self.recipe.name}: already finished; {self.recipe.checkpoint_path} holds its last step")
            return 0
        check_checkpoints(self.recipe.checkpoint_path)
        make_run_directory(self.recipe)
        restarts = self.limits.restarts
        while True:
            before = attempts(self.recipe.run_path)
            self._reconsider([attempt for attempt in before if attempt.job_id == self.job_id])
            if (idle := idle_attempts(before, self.job_id)) >= MAX_IDLE_ATTEMPTS:
                raise UserError(f"{idle} attempts in a row made no progress; see: txssm why {self.recipe.run_path}")
            attempt = new_attempt(self.recipe, self.job_id, self.nodes, self.nproc_per_node)
            self._train(attempt)
            diagnosis = self._diagnose(attempt)
            decision = self._decide(attempt, diagnosis, before, restarts)
            diagnosis = recorded(attempt) or diagnosis
            if decision is not None:
                self._note_action(attempt, str(decision))
            self._notify(attempt, diagnosis, decision)
            if self.trouble is not None and decision is not None:
                # The decision is not reliable then: it rests on the contents of the run folder.
                leave_node(self.recipe.run_path, self.trouble)
            if decision is None or decision.do == "end":
                return self._exit_code(attempt, diagnosis)
            if decision.do != "restart":
                wait_for_notifications()
                requeue(self.job_id, decision.leave_out, decision.take_back, hold=decision.do == "hold")
            restarts -= diagnosis.cause != Cause.REWIND
            self.nodes = [node for node in self.nodes if node not in decision.leave_out]

    def _close_last_attempt(self) -> None:
        """Complete the last attempt's record if its supervisor was killed (with its node, or out of memory).

        UserError if it belongs to another job that still trains here.
        """
        before = attempts(self.recipe.run_path)
        if before and before[-1].cause is None:
            own = before[-1].job_id == self.job_id
            if not own:
                check_not_running(self.recipe)
            gone = not own or end_leftover_steps(self.job_id)
            close(before[-1], self.recipe, started_again=own)
            before[-1].save()
            if not gone and not self.told_to_stop:
                say("Slurm cannot end a step of the last attempt: requeueing")
                requeue(self.job_id)

    def _train(self, attempt: Attempt) -> None:
        """Run preflight and trainer; records in `attempt` where they ran and how they ended."""
        timeout = self.limits.preflight_timeout
        preflight = NodePreflight(self.recipe, self.settings.recipe, self.nodes, attempt.folder, timeout)
        failed = preflight.run()
        if self.told_to_stop:
            return
        healthy = [node for node in self.nodes if node not in failed]
        if len(healthy) < self.num_nodes:
            attempt.failed_nodes = failed
            return
        # The remaining nodes are spare.
        self.nodes, attempt.nodes = healthy, healthy[: self.num_nodes]
        attempt.skip_output()
        say(f"START attempt {attempt.number} of {self.recipe.run_path}: job {self.job_id} on {_named(attempt.nodes)}")
        self._save(attempt)
        # Tells a worker where to record its error and where to meet the other ranks.
        environment = os.environ | {
            "TXSSM_ATTEMPT": str(attempt.folder),
            "MASTER_ADDR": attempt.nodes[0],
            "MASTER_PORT": str(preflight.port),
        }
        step = subprocess.Popen(self._step_command(attempt.nodes), env=environment)
        watch = StallWatch(self.recipe.run_path, self.recipe.checkpoint_path, self.limits.seconds_of_phases)
        failed_task = FailedTaskWatch(attempt)
        while (code := step.poll()) is None and not (self.told_to_stop and self.time_limit.is_reached()):
            time.sleep(POLL_SECONDS)
            if attempt.hang is None and not self.told_to_stop and (phase := watch.stalled_phase()):
                num_ranks = len(attempt.nodes) * self.nproc_per_node
                attempt.hang = watch.end_step(self.job_id, step, num_ranks, phase)
                self.lost_step = attempt.hang["silent_ranks"] is None
            elif not self.told_to_stop and failed_task.ends(self.job_id, step):
                code, self.lost_step = 1, True
                break
        attempt.exit_code = code

    def _step_command(self, nodes: list[str]) -> list[str]:
        trainer = [step_python(), "-u", "-m", "megatron_txssm.cli", "pretrain", self.settings.recipe]
        trainer += [word for text in self.settings.overrides for word in ("--set", text)]
        return [
            *srun_words("train"),
            f"--nodes={len(nodes)}",
            f"--nodelist={','.join(nodes)}",
            f"--ntasks={len(nodes) * self.nproc_per_node}",
            f"--ntasks-per-node={self.nproc_per_node}",
            "--distribution=block",
            # A rank's failure ends the step: the others would wait for it.
            "--kill-on-bad-exit=1",
            *trainer,
        ]

    def _diagnose(self, attempt: Attempt) -> Diagnosis:
        attempt.told_to_stop = self.told_to_stop
        diagnosis = close(attempt, self.recipe)
        if diagnosis.cause in (Cause.STOPPED, Cause.STEP_CANCELLED) and self.time_limit.is_near():
            record(attempt, diagnosis := Diagnosis(Cause.TIME_LIMIT))
        self._save(attempt)
        say(f"END attempt {attempt.number}: {diagnosis}")
        return diagnosis

    def _decide(self, attempt: Attempt, diagnosis: Diagnosis, before: list[Attempt], restarts: int) -> Decision | None:
        """What to do next; None if there is nothing to do."""
        if diagnosis.cause == Cause.FINISHED:
            return None
        if diagnosis.cause == Cause.PREEMPTED:
            # Slurm requeues it itself, except under PreemptMode=CANCEL.
            return Decision("requeue")
        if attempt.told_to_stop and diagnosis.cause != Cause.TIME_LIMIT_HIT:
            # Slurm itself restarts the job if necessary; a requeue here would revive a cancelled job.
            self._note_action(attempt, "Slurm ended the job, and restarts it itself if a node was lost")
            return None
        if diagnosis.cause == Cause.PREFLIGHT:
            if diagnosis.node is None:
                # No node answered: the fault is Slurm's.
                return Decision("requeue")
            return requeue_without(self.job_id, list(attempt.failed_nodes), self.nodes, before)
        decision = self._decide_by_nodes(attempt, before, restarts)
        gone = decision.do == "restart" and not self.lost_step and end_leftover_steps(self.job_id)
        if self._reconsider([attempt]):
            # Slurm has noticed meanwhile that a node is lost.
            decision = self._decide_by_nodes(attempt, before, restarts)
        if decision.do == "restart" and not gone:
            decision = Decision("requeue", leave_out=decision.leave_out)
        if self.told_to_stop and not attempt.told_to_stop:
            # The signal came while this process waited for slurmctld.
            return Decision("requeue") if self._was_told_as_routine(attempt) else None
        if decision.do == "requeue" and decision.leave_out:
            decision = requeue_without(self.job_id, decision.leave_out, attempt.nodes, before)
            # Training on a suspect node is better than not training.
            return Decision("requeue") if decision.do == "end" else decision
        return decision

    def _decide_by_nodes(self, attempt: Attempt, before: list[Attempt], restarts: int) -> Decision:
        """What to do with the job's nodes, without those that do not respond now."""
        lost = lost_nodes(self.nodes)
        self.nodes = [node for node in self.nodes if node not in lost]
        return decide(attempt, before, self.limits.max_requeues, restarts, self.nodes)

    def _reconsider(self, found: list[Attempt]) -> bool:
        """Correct the record of attempts that a lost node ended; returns whether one was changed."""
        changed = reconsider(found)
        for attempt in changed:
            self._save(attempt)
            say(f"attempt {attempt.number}, on second thoughts: {recorded(attempt)}")
        return bool(changed)

    def _was_told_as_routine(self, attempt: Attempt) -> bool:
        """Whether Slurm's SIGTERM meant the time limit or a preemption, not a cancel, which a requeue would undo."""
        ended = why_slurm_ended_it(attempt.read_output())
        return (ended is not None and Cause(ended[0]) in ROUTINE) or self.time_limit.is_near()

    def _exit_code(self, attempt: Attempt, diagnosis: Diagnosis) -> int:
        if diagnosis.cause == Cause.FINISHED:
            return 0
        if diagnosis.cause in (Cause.REFUSED, Cause.PREFLIGHT):
            return 2
        # Megatron's own exits return 0, but jobs that depend on this one must not start. To entrypoint.sh, a signal's
        # code would mean that this process was killed.
        code = attempt.exit_code or 1
        return code if 0 < code <= 128 else 1

    def _note_action(self, attempt: Attempt, text: str) -> None:
        attempt.action = text
        self._save(attempt)
        say(text)

    def _notify(self, attempt: Attempt, diagnosis: Diagnosis, decision: Decision | None) -> None:
        """Notify people of failures, hangs, excluded nodes and the finished run, not of routine ends."""
        if diagnosis.cause in ROUTINE or (decision is None and diagnosis.cause != Cause.FINISHED):
            return
        event = diagnosis.cause if diagnosis.cause in (Cause.FINISHED, Cause.HUNG) else "failed"
        facts = {"attempt": attempt.number, "step": attempt.last_step, "cause": diagnosis.cause, "nodes": attempt.nodes}
        text = f"{diagnosis}{'' if decision is None else f'; {decision}'}"
        notify(self.recipe.run_path, event, text, **facts)
        if decision is not None and decision.leave_out:
            named = ", ".join(decision.leave_out)
            notify(self.recipe.run_path, "excluded", f"{named}: {diagnosis}", **facts | {"nodes": decision.leave_out})

    def _save(self, attempt: Attempt) -> None:
        """Save the record; a full or lost disk must not stop the supervisor."""
        try:
            attempt.save()
        except OSError as error:
            self.trouble = error
            say(f"{attempt.folder} cannot be written: {error.strerror}")

    def _note_stop(self, number: int, frame: FrameType | None) -> None:
        self.told_to_stop = True


def _named(nodes: list[str]) -> str:
    """Their number and a few names; attempt.json has all."""
    names = ", ".join(nodes if len(nodes) <= 8 else [*nodes[:4], "…", nodes[-1]])
    return f"{len(nodes)} node{'s' if len(nodes) > 1 else ''} ({names})"


if __name__ == "__main__":
    sys.exit(main())
