"""Batch scripts: the templates in slurm/ with their options filled in.

No recipe value is written into a script: the job reads the recipe from the run folder, whose path is one plain word.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_txssm.errors import UserError, shown
from megatron_txssm.home import BATCH_SCRIPTS, HOME
from megatron_txssm.notify import VARIABLE as WEBHOOK
from megatron_txssm.slurm.client import PLAIN_WORD
from megatron_txssm.slurm.sbatch_options import Options, split_options


def render(stage: str, options: Options, words: Sequence[str] = (), home: Path = HOME) -> str:
    """The batch script of a stage: slurm/STAGE.sbatch, its options overridden by `options`, with the arguments `words`.

    `home`: folder of the code that it runs, a checkout or a run's frozen copy. The site's settings are always this
    checkout's.
    """
    name = f"{stage}.sbatch"
    lines = (BATCH_SCRIPTS / name).read_text(encoding="utf-8").splitlines()
    merged = {**_options(lines), **options}
    body = [line for line in lines if line and not line.startswith("#")]
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            f"# From slurm/{name}.",
            *(f"#SBATCH --{_word(option, value)}" for option, value in merged.items() if value != ""),
            "",
            f"export TXSSM_HOME={shlex.quote(str(home))} TXSSM_PYTHON={shlex.quote(sys.executable)}",
            # Under `sbatch --export=NONE` the job inherits no variables.
            *([f"export TXSSM_ENV={shlex.quote(str(settings))}"] if (settings := site_settings()).exists() else []),
            f"set -- {shlex.join(words)}",
            *body,
            "",
        ]
    )


def site_settings() -> Path:
    """The file with the site's settings; it need not exist."""
    named = os.environ.get("TXSSM_ENV")
    return Path(named).absolute() if named else HOME / "slurm" / "env.sh"


def load_site_settings() -> None:
    """Load into this process's environment what slurm/env.sh, or the file that $TXSSM_ENV names, sets."""
    named = os.environ.get("TXSSM_ENV")
    path = site_settings()
    if not path.exists():
        if named:
            raise UserError(f"TXSSM_ENV={shown(named)}: no such file")
        return
    # The file is a program of the site's, which the batch scripts run, too.
    command = ["bash", "-c", 'set -ea; source "$1" >&2; env -0', "bash", str(path)]
    # Bytes: environment variables need not be text.
    done = subprocess.run(command, capture_output=True)
    if done.returncode != 0:
        said = " ".join(done.stderr.decode(errors="replace").split())[-400:]
        raise UserError(f"{path} fails (exit code {done.returncode}): {said}")
    for entry in done.stdout.split(b"\0"):
        name, equals, value = entry.partition(b"=")
        # Jobs source the file themselves; Slurm would store an inherited secret.
        if equals and name != WEBHOOK.encode():
            os.environb[name] = value
    if named:
        # The job may start in another folder.
        os.environ["TXSSM_ENV"] = str(path)


def _options(lines: Sequence[str]) -> dict[str, str | None]:
    """A template's options: the first word after #SBATCH, without the explanation after it."""
    words = [line.split()[1].removeprefix("--") for line in lines if line.startswith("#SBATCH ")]
    return split_options(words, "#SBATCH")


def _word(option: str, value: str | None) -> str:
    word = option if value is None else f"{option}={value}"
    if not PLAIN_WORD.fullmatch(word):
        raise UserError(
            f"--{option} {shown(value)} must be one plain word: letters, digits and . , : = @ % / + [ ] * ( ) -"
        )
    return word
