"""A small run on the simulated cluster, as a user submits and follows it."""

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from megatron_txssm.jobs.attempts import Attempt, attempts
from megatron_txssm.recipe.changes import Changes
from megatron_txssm.slurm.time_limit import limit_seconds
from tests.cluster.sandbox import Sandbox
from tests.support.recipes import FOUR_LAYERS, tokens_of, write_recipe
from tests.support.tiny_run import command

# A start takes 10 s on two quiet cores.
PATIENCE = 600  # seconds
SAVE_INTERVAL = 10
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", ""}


def txssm(sandbox: Sandbox, *words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    # One thread a process: sums in another order would be other bits.
    environment = sandbox.env | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command(*words), env=environment, cwd=cwd, capture_output=True, text=True, timeout=PATIENCE)


@dataclass
class TrainingJob:
    """A recipe in a folder of its own; `submit` queues it."""

    sandbox: Sandbox
    folder: Path
    data: Path
    job: str = field(default="", init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        changes: Changes = {
            "name": self.folder.name,
            "training.train_iters": 60,
            "checkpoint.save_interval": SAVE_INTERVAL,
        }
        write_recipe(self.recipe, FOUR_LAYERS, tokens_of(self.data), changes, run=self.run)

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yaml"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def submit(self, *words: str, nodes: int = 2, nproc: int = 1) -> None:
        layout = ["--nodes", str(nodes), "--nproc-per-node", str(nproc)]
        done = txssm(self.sandbox, "submit", str(self.recipe), *layout, *words, cwd=self.folder)
        assert done.returncode == 0, done.stderr
        self.job = json.loads((self.run / "submission.json").read_text())["jobs"]["pretrain"][0]

    def why(self, *words: str) -> str:
        done = txssm(self.sandbox, "why", str(self.run), *words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def output(self) -> str:
        path = self.run / "logs" / f"pretrain-{self.job}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def attempts(self) -> list[Attempt]:
        return attempts(self.run)

    def steps(self, offset: int = 0) -> list[tuple[int, float]]:
        """(step, loss) in the order in which they were done, behind `offset` bytes of metrics.jsonl."""
        path = self.run / "metrics.jsonl"
        lines = path.read_bytes()[offset:].decode().splitlines() if path.exists() else []
        return [(line["iteration"], line["lm loss"]) for line in map(json.loads, lines) if "lm loss" in line]

    def farthest_step(self) -> int:
        return max((step for step, _ in self.steps()), default=0)

    def is_over(self) -> bool:
        return self.sandbox.job_state(self.job) in OVER

    def saved(self) -> int:
        tracker = self.run / "checkpoints" / "latest_checkpointed_iteration.txt"
        return int(tracker.read_text()) if tracker.exists() else 0

    def wait_step(self, step: int) -> None:
        self.wait_until(lambda: (self.steps() or [(0, 0.0)])[-1][0] >= step, f"step {step}")

    def wait_until(self, condition: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
        end = (looked := time.monotonic()) + seconds
        while not condition():
            if time.monotonic() > end:
                raise AssertionError(f"after {seconds} s still waiting for {what}:\n{self.output()}\n{self.why()}")
            # Looking takes a fifth of a core at most: the job needs the rest.
            time.sleep(max(0.02, 4 * (time.monotonic() - looked)))
            looked = time.monotonic()

    def wait_over(self, state: str = "COMPLETED") -> None:
        self.wait_until(self.is_over, "the end")
        assert self.sandbox.job_state(self.job) == state, f"{self.output()}\n{self.why()}"

    def wait_state_saved(self) -> None:
        """slurmctld writes down what it knows within 5 s of a change; what came later it would forget when it dies."""
        state, began = self.sandbox.directory / "state" / "job_state", time.time()
        self.sandbox.slurm("scontrol", "update", f"JobId={self.job}", "Comment=changed")
        self.wait_until(lambda: state.exists() and state.stat().st_mtime > began, "slurmctld's state")

    def minutes(self) -> int:
        """Whole minutes since the job's start."""
        elapsed = self.sandbox.slurm("squeue", "--noheader", f"--jobs={self.job}", "--format=%M").strip()
        seconds = limit_seconds(elapsed)
        assert seconds is not None, elapsed
        return int(seconds // 60)

    def set_time_limit(self, minutes: int) -> None:
        """Counted from the job's start, as Slurm does."""
        self.sandbox.slurm("scontrol", "update", f"JobId={self.job}", f"TimeLimit={minutes}")

    def step_id(self) -> str:
        """Slurm's number of the trainer's step."""
        lines = self.sandbox.slurm("squeue", "--noheader", "--steps", f"--jobs={self.job}", "--format=%i %j")
        steps = [step for step, name in map(str.split, lines.splitlines()) if name == "train"]
        assert steps, f"slurmctld knows no step of the trainer: {lines}"
        return steps[0]

    def supervisor(self) -> psutil.Process:
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if "megatron_txssm.jobs.supervisor.supervisor" in words and f"{self.run}/recipe.yaml" in words:
                return process
        raise AssertionError(f"no supervisor:\n{self.output()}")

    def process(self, rank: int) -> psutil.Process:
        """The trainer's process of a rank."""
        for process in psutil.process_iter():
            try:
                environment = process.environ()
                parent = process.parent()
            except psutil.Error:
                continue
            ours = environment.get("TXSSM_ATTEMPT", "").startswith(str(self.run))
            # Not srun, and not the processes of its data loader.
            if ours and environment.get("SLURM_PROCID") == str(rank) and parent and "slurmstepd" in parent.name():
                return process
        raise AssertionError(f"rank {rank} has no process:\n{self.output()}")


def write_data(folder: Path) -> Path:
    from tests.parity.harness import write_tokens

    return write_tokens(folder / "tokens")
