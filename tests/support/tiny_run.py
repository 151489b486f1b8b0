"""A tiny run as a user starts it: `txssm` in processes of its own, on two layers and random tokens."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_txssm.recipe.changes import Changes
from tests.support.recipes import TINY, write_recipe

VOCAB_SIZE = TINY.data.vocab_size


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class TinyRun:
    """A folder with data and recipe.yaml; the recipe's run directory is run/ there."""

    folder: Path

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yaml"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def checkpoints(self) -> Path:
        return self.run / "checkpoints"

    def pretrain(self, *words: str, fields: Sequence[str] = ()) -> Done:
        return txssm("pretrain", str(self.recipe), *words, *sets(fields))

    def pretrain_and_interrupt(self, text: str) -> Done:
        """Press Ctrl-C, as a terminal does, when the output holds `text`."""
        output, errors = self.folder / "stdout", self.folder / "stderr"
        with output.open("w") as stdout, errors.open("w") as stderr:
            process = subprocess.Popen(
                command("pretrain", str(self.recipe)),
                stdout=stdout,
                stderr=stderr,
                env=ENVIRONMENT,
                # A process group of its own: the launcher's, which a terminal's Ctrl-C would reach.
                start_new_session=True,
            )
        end = time.monotonic() + 600
        while text not in output.read_text() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
        try:
            code = process.wait(timeout=600)
        finally:
            process.kill()
        return Done(code, output.read_text(), errors.read_text())


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "megatron_txssm.cli", *words]


def txssm(*words: str) -> Done:
    done = subprocess.run(command(*words), capture_output=True, text=True, env=ENVIRONMENT, timeout=900)
    return Done(done.returncode, done.stdout, done.stderr)


def sets(fields: Sequence[str]) -> list[str]:
    return [word for field in fields for word in ("--set", field)]


def make_tiny_run(folder: Path) -> TinyRun:
    from megatron_txssm.data.corpus.shard import write_shard

    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    documents = [[draw.randrange(VOCAB_SIZE - 1) for _ in range(50)] for _ in range(200)]
    write_shard(documents, folder / "data", VOCAB_SIZE, VOCAB_SIZE - 1)
    made, data = TinyRun(folder), ((1.0, str(folder / "data")),)
    changes: Changes = {
        "training.train_iters": 2000,
        "data.train": data,
        "data.validation": data,
        "data.tokenizer_type": "NullTokenizer",
        "checkpoint.save_interval": 2000,
        "logging.eval_iters": 1,
    }
    write_recipe(made.recipe, changes, run=made.run)
    return made
