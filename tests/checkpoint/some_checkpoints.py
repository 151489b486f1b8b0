"""Folders that look like checkpoints to code that reads names, sizes and checksums."""

from collections.abc import Iterable
from pathlib import Path

from megatron_txssm.checkpoint.checksums import CHECKSUMS, checksum, to_text
from megatron_txssm.checkpoint.steps import FORMAT, INDEX, TRACKER

DATA = "__0_0.distcp"


def make_steps(checkpoints: Path, steps: Iterable[int]) -> Path:
    """Whole checkpoints of these steps; the tracker names the last."""
    checkpoints.mkdir(exist_ok=True)
    for step in steps:
        folder = checkpoints / f"iter_{step:07d}"
        folder.mkdir()
        for name in (DATA, INDEX, FORMAT):
            (folder / name).write_text(f"{name} of step {step}")
        (folder / CHECKSUMS).write_text(to_text({name: checksum(folder / name) for name in (DATA, INDEX, FORMAT)}))
        (checkpoints / TRACKER).write_text(str(step))
    return checkpoints


def steps_in(checkpoints: Path) -> list[int]:
    """The steps that have a folder, whole or not."""
    return sorted(int(folder.name.removeprefix("iter_")) for folder in checkpoints.glob("iter_*"))
