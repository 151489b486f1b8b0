"""Plays the Python of a job's steps: a trainer without Megatron, for tests of what happens round it.

    stand_in_trainer.py -u -m megatron_txssm.cli pretrain RUN/recipe.yaml

Its loss is its state, which goes through the checkpoints: steps lost or done on another's state give other losses.
Rank 0 writes metrics.jsonl and the checkpoints; every rank ends as RUN/fault.json says:
{"node": "n2", "step": 25, "do": "kill", "once": true}. Anything else is handed to the real Python.
"""

import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

STEPS, SAVE_INTERVAL, SECONDS = 60, 10, 0.05


def main() -> None:
    if "pretrain" not in sys.argv:
        os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
    rank, node = int(os.environ["SLURM_PROCID"]), os.environ["SLURMD_NODENAME"]
    run = Path(sys.argv[sys.argv.index("pretrain") + 1]).parent
    attempt = Path(os.environ["TXSSM_ATTEMPT"])
    checkpoints, metrics = run / "checkpoints", run / "metrics.jsonl"
    checkpoints.mkdir(exist_ok=True)
    tracker = checkpoints / "latest_checkpointed_iteration.txt"
    stopped = False

    def stop(number: int, frame: object) -> None:
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGTERM, stop)
    step = int(tracker.read_text()) if tracker.exists() else 0
    state = float((checkpoints / f"iter_{step:07d}" / "state").read_text()) if step else 0.0
    while step < STEPS and not stopped:
        time.sleep(SECONDS)
        step += 1
        fail_if_asked(run, attempt, rank, node, step)
        # As in a collective: without one rank, none goes on.
        (attempt / f"step_{rank}").write_text(str(step))
        while not stopped and any(done < step for done in steps_of_all(attempt)):
            time.sleep(SECONDS / 5)
        state = after(state, step)
        if rank == 0:
            line = {"iteration": step, "lm loss": state, "grad_norm": 1.0, "time": time.time(), "step_seconds": SECONDS}
            with metrics.open("a") as file:
                file.write(json.dumps(line) + "\n")
        if (step % SAVE_INTERVAL == 0 or stopped) and rank == 0:
            save(checkpoints / f"iter_{step:07d}", state)
            tracker.write_text(str(step))
    if stopped and rank == 0:
        (attempt / "stopped").touch()


def after(state: float, step: int) -> float:
    """The state behind a step: all before it show in it."""
    return math.sin(997 * state + step)


def losses() -> dict[int, float]:
    """Of a run that nothing disturbs."""
    found = {0: 0.0}
    for step in range(1, STEPS + 1):
        found[step] = after(found[step - 1], step)
    del found[0]
    return found


def steps_of_all(attempt: Path) -> list[int]:
    """OSError where the run's folder is gone."""
    attempt.stat()
    files = [attempt / f"step_{rank}" for rank in range(int(os.environ["SLURM_STEP_NUM_TASKS"]))]
    return [int(file.read_text() or 0) if file.exists() else 0 for file in files]


def save(folder: Path, state: float) -> None:
    """The state, and what shows that a checkpoint is whole."""
    folder.mkdir(exist_ok=True)
    (folder / "state").write_text(repr(state))
    (folder / ".metadata").write_text("index")
    (folder / "metadata.json").write_text("{}")


def fail_if_asked(run: Path, attempt: Path, rank: int, node: str, step: int) -> None:
    try:
        fault = json.loads((run / "fault.json").read_text())
    except (OSError, ValueError):
        return
    if fault["node"] != node or step < fault["step"]:
        return
    if fault.get("once"):
        (run / "fault.json").unlink(missing_ok=True)
    if fault["do"] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault["do"] == "hang":
        signal.pause()
    fail(attempt, rank, fault["do"])


def fail(attempt: Path, rank: int, text: str) -> NoReturn:
    """End as run_worker does after an exception."""
    record = {"message": {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}}
    (attempt / f"rank_{rank}.json").write_text(json.dumps(record))
    sys.exit(1)


if __name__ == "__main__":
    main()
