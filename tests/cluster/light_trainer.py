"""Plays the Python of a job's steps: a trainer without Megatron that steps until it is told to stop.

    light_trainer.py -u -m megatron_txssm.cli pretrain RUN/recipe.yaml

Anything but `pretrain` is handed to the real Python.
"""

import json
import os
import signal
import sys
import threading
from pathlib import Path


def main() -> None:
    if "pretrain" not in sys.argv:
        os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
    from megatron_txssm.recipe.loader import load_recipe
    from megatron_txssm.training.launch.run_lock import RunLock

    recipe = load_recipe(sys.argv[sys.argv.index("pretrain") + 1])
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    if os.environ["SLURM_PROCID"] != "0":
        while not stopped.wait(0.2):
            pass
        return
    step = 0
    with RunLock(recipe):
        while not stopped.wait(0.2):
            step += 1
            with (recipe.run_path / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"iteration": step, "lm loss": 1 / step, "grad_norm": 1.0}) + "\n")
    (Path(os.environ["TXSSM_ATTEMPT"]) / "stopped").touch()


if __name__ == "__main__":
    main()
