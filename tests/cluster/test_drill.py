"""Faults drawn at random over one run, which ends with the losses of an undisturbed one, bit for bit.

It saves asynchronously and keeps two checkpoints. Its report has the goodput that the logs show by hand.

pytest tests/cluster/test_drill.py --faults 40 --drill-seed 7
"""

import datetime
import itertools
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from megatron_txssm.metrics import MetricsLine, metrics_lines
from tests.cluster.sandbox import Sandbox
from tests.cluster.training_job import SAVE_INTERVAL, TrainingJob, txssm, write_data

NODES = ["n1", "n2", "n3"]
# The farthest step behind a resume at which a fault comes.
MAX_STEPS = 15
# slurmctld is away for so long.
AWAY_SECONDS = 15
LOOK_SECONDS = 5
KEEP_LAST = 2
SAVES = ["--set", f"checkpoint.keep_last={KEEP_LAST}", "--set", "megatron.async_save=true"]


def kill_worker(job: TrainingJob, draw: random.Random) -> None:
    job.process(draw.randrange(2)).kill()


def stop_worker(job: TrainingJob, draw: random.Random) -> None:
    job.process(draw.randrange(2)).suspend()


def cancel_step(job: TrainingJob, draw: random.Random) -> None:
    job.sandbox.slurm("scancel", job.step_id())


def kill_supervisor(job: TrainingJob, draw: random.Random) -> None:
    job.supervisor().kill()


def preempt(job: TrainingJob, draw: random.Random) -> None:
    script = job.folder / "urgent.sh"
    script.write_text("#!/bin/bash\nsleep 2\n")
    job.sandbox.slurm("sbatch", "--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null", str(script))


def power_off(job: TrainingJob, draw: random.Random) -> None:
    lose_node(job, draw, "poweroff", "poweron")


def unplug(job: TrainingJob, draw: random.Random) -> None:
    lose_node(job, draw, "unplug", "plug")


def lose_node(job: TrainingJob, draw: random.Random, lose: str, give_back: str) -> None:
    """Until the job has noticed: a short break of the network alone it may well survive."""
    before = job.attempts()
    node = draw.choice(before[-1].nodes)
    job.sandbox.must(lose, node)
    try:
        job.wait_until(
            lambda: len(job.attempts()) > len(before) or job.sandbox.job_state(job.job) == "PENDING",
            f"the loss of {node}",
        )
    finally:
        job.sandbox.must(give_back, node)


def lose_slurmctld_and_a_worker(job: TrainingJob, draw: random.Random) -> None:
    worker = job.process(draw.randrange(2))
    # Else the run may be over before.
    worker.suspend()
    job.wait_state_saved()
    job.sandbox.must("kill-slurmctld")
    try:
        worker.kill()
        time.sleep(AWAY_SECONDS)
    finally:
        job.sandbox.must("start-slurmctld")


def damage_newest_checkpoint(job: TrainingJob, draw: random.Random) -> None:
    """A flipped bit, which only the next start meets."""
    folder = job.run / "checkpoints" / f"iter_{job.saved():07d}"
    shard = draw.choice(sorted(folder.glob("*.distcp")))
    content = bytearray(shard.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    shard.write_bytes(content)
    kill_worker(job, draw)


FAULTS = [
    *(kill_worker, stop_worker, cancel_step, kill_supervisor, preempt, power_off, unplug),
    *(lose_slurmctld_and_a_worker, damage_newest_checkpoint),
]


def wait_for(job: TrainingJob, condition: Callable[[], bool], what: str) -> None:
    """As long as it takes Slurm, with an administrator who looks after drained nodes."""
    looked = time.monotonic()

    def tended() -> bool:
        nonlocal looked
        if time.monotonic() - looked > LOOK_SECONDS:
            job.sandbox.resume_drained(job.sandbox.node_states())
            looked = time.monotonic()
        return condition()

    job.wait_until(tended, what)


def wait_for_step(job: TrainingJob, step: int) -> None:
    wait_for(job, lambda: job.is_over() or job.farthest_step() >= step, f"step {step}")


def strike(job: TrainingJob, fault: Callable[[TrainingJob, random.Random], None], draw: random.Random) -> str:
    """Do a fault and wait until it is overcome; returns what came of it."""
    began, attempts, done = time.monotonic(), len(job.attempts()), job.farthest_step()
    try:
        fault(job, draw)
    except (psutil.Error, AssertionError) as missed:
        # The trainer was not there: between two steps of Slurm's, or the run was over.
        return f"not done, {str(missed).splitlines()[0]}"
    wait_for(job, lambda: job.is_over() or len(job.attempts()) > attempts, "the next attempt")
    wait_for_step(job, done + 1)
    return f"{job.attempts()[attempts - 1].cause}, {time.monotonic() - began:5.1f} s to the next new step"


def goodput_by_hand(run: Path) -> tuple[float, float]:
    """The active share and the median recovery in seconds, from the times in the run's files alone."""
    records = [json.loads(path.read_bytes()) for path in sorted(run.glob("attempts/*/attempt.json"))]
    steps = [line for line in metrics_lines(run / "metrics.jsonl") if "grad_norm" in line]
    submitted = json.loads((run / "submission.json").read_bytes())["submitted"]
    wall = records[-1]["ended"] - datetime.datetime.fromisoformat(submitted).timestamp()
    last_of_each = {line["iteration"]: line["step_seconds"] for line in steps}
    # Each new farthest step, and when it was done.
    new = [
        line["time"] for line, before in zip(steps, farthest_before(steps), strict=True) if line["iteration"] > before
    ]
    recoveries: dict[float, float] = {}
    for record, after in itertools.pairwise(records):
        end = record["ended"]
        if record["exit_code"] is None and not record["hang"] and not record["told_to_stop"]:
            # The supervisor died, too: with its last step.
            times = (line["time"] for line in steps if record["started"] < line["time"] < after["started"])
            end = min(end, max(times, default=end))
        recovered = min((at for at in new if at > after["started"]), default=None)
        if recovered is not None:
            recoveries.setdefault(recovered, recovered - end)
    return sum(last_of_each.values()) / wall, statistics.median(recoveries.values())


def farthest_before(steps: list[MetricsLine]) -> Iterator[int]:
    """The highest step before each line."""
    return itertools.accumulate([0, *(line["iteration"] for line in steps[:-1])], max)


@pytest.fixture
def whole_again(sandbox: Sandbox) -> Iterator[None]:
    yield
    sandbox.mend(NODES)


@pytest.mark.slow
def test_faults_at_random(
    sandbox: Sandbox,
    tmp_path: Path,
    whole_again: None,
    report: Callable[[str], None],
    request: pytest.FixtureRequest,
) -> None:
    count, seed = (int(request.config.getoption(name, 0) or 0) for name in ("--faults", "--drill-seed"))
    draw = random.Random(seed)
    # All of them in turn, each time in another order.
    drawn = [fault for _ in range(1 + count // len(FAULTS)) for fault in draw.sample(FAULTS, len(FAULTS))][:count]
    data, iterations = write_data(tmp_path / "data"), f"training.train_iters={40 + (MAX_STEPS + 5) * count}"
    undisturbed = TrainingJob(sandbox, tmp_path / "undisturbed", data)
    undisturbed.submit("--set", iterations)
    undisturbed.wait_over()

    job = TrainingJob(sandbox, tmp_path / "job", data)
    job.submit("--set", iterations, *SAVES, "--step-timeout", "60", "--save-timeout", "60", "--max-requeues", "1000")
    done = 0
    for fault in drawn:
        # Behind the last fault: a fault in each start would keep any run from its end.
        done = max(done, SAVE_INTERVAL) + draw.randint(1, MAX_STEPS)
        wait_for_step(job, done)
        done = job.farthest_step()
        report(f"{fault.__name__:30} at step {done:4}: {strike(job, fault, draw)}")
    job.wait_over()
    assert dict(job.steps()) == dict(undisturbed.steps())
    report(f"seed {seed}, {count} faults, {len(job.attempts())} attempts, {len(job.steps())} steps for {iterations}")
    report(job.why())
    assert len(list((job.run / "checkpoints").glob("iter_*"))) == KEEP_LAST
    share, recovery = goodput_by_hand(job.run)
    report(f"by hand: active {share:.1%}, recovery {recovery:.1f} s")
    made = txssm(sandbox, "report", str(job.run))
    assert made.returncode == 0, made.stderr
    page = (job.run / "report.html").read_text()
    assert f"{share:.1%}" in page and f"{datetime.timedelta(seconds=round(recovery))} (" in page
