"""The checkpoints of a folder: which is the newest, which are whole, and what is wrong with the others. Without torch.

CHECKPOINTS/latest_checkpointed_iteration.txt   the tracker: the step of the newest, or `release`
CHECKPOINTS/iter_0000020/                       a step: *.distcp, then .metadata, metadata.json, checksums.json
"""

import contextlib
import os
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_txssm.checkpoint.checksums import CHECKSUMS, DamagedCheckpoint, wrong_sizes
from megatron_txssm.errors import UserError

TRACKER = "latest_checkpointed_iteration.txt"
# Of torch_dist: its index, and the file that Megatron writes behind it.
INDEX, FORMAT = ".metadata", "metadata.json"


@dataclass(frozen=True)
class Step:
    """One checkpoint; a `release` is step 0."""

    number: int
    folder: Path


@dataclass(frozen=True)
class Newest:
    """The newest whole checkpoint (None: there has never been one), and what is wrong with those before it."""

    step: Step | None
    # "the newest checkpoint, of step 20, is damaged (...)", in the order in which they were looked at.
    lost: tuple[str, ...] = ()


def tracker_step(checkpoints: Path) -> int | None:
    """The step that the tracker names, whole or not; None without a tracker, UserError where it names none."""
    tracker = checkpoints / TRACKER
    # Path.is_file would raise for a name that is too long.
    if not os.path.isfile(tracker):
        return None
    text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if text == "release":
        return 0
    if not text.isdecimal():
        raise UserError(
            f"{tracker} says {text[:40]!r}, not a step; write the number of the newest iter_* folder into it"
        )
    return int(text)


def tracked(checkpoints: Path) -> Step | None:
    """What the tracker names, which need not be there; None without a tracker, UserError where it names none."""
    number = tracker_step(checkpoints)
    if number is None:
        return None
    is_release = number == 0 and "release" in (checkpoints / TRACKER).read_text(errors="replace")
    return Step(number, checkpoints / ("release" if is_release else f"iter_{number:07d}"))


def saved_step(checkpoints: Path) -> int | None:
    """The step of the newest checkpoint by its tracker; by the folders, where the tracker says nothing of use."""
    try:
        return tracker_step(checkpoints)
    except UserError:
        steps = whole_steps(checkpoints)
        return steps[0].number if steps else None


def damage(folder: Path) -> str:
    """What is plainly missing of one checkpoint; empty where nothing is. Reads names and sizes only."""
    if not folder.is_dir():
        return f"{folder} is not there"
    has_index = (folder / INDEX).is_file() and (folder / INDEX).stat().st_size > 0
    if (folder / FORMAT).is_file() and not has_index:
        return f"{folder} has no index ({INDEX})"
    # Megatron's other formats have neither.
    if not has_index and not any(name.startswith("mp_rank_") for name in os.listdir(folder)):
        return f"{folder} holds no checkpoint"
    return wrong_sizes(folder)


def whole_steps(checkpoints: Path) -> list[Step]:
    """Those that were written to their end and of which nothing is plainly missing; the newest first."""
    return [step for step in _ended_steps(checkpoints) if not damage(step.folder)]


def _ended_steps(checkpoints: Path) -> list[Step]:
    """Those with the file that is written last but checksums and tracker; the newest first."""
    return _steps_with(FORMAT, checkpoints)


def _steps_with(name: str, checkpoints: Path) -> list[Step]:
    steps = [
        Step(int(number), folder)
        for folder in _folders(checkpoints)
        if (number := folder.name.removeprefix("iter_")).isdecimal() and (folder / name).exists()
    ]
    return sorted(steps, key=lambda step: -step.number)


def _folders(checkpoints: Path) -> list[Path]:
    # Path.glob raises where the name is too long for a file system.
    return sorted(checkpoints.glob("iter_*")) if os.path.isdir(checkpoints) else []


def candidates(checkpoints: Path) -> tuple[list[Step], list[str]]:
    """From which checkpoints a run may go on, the best first, and what is wrong with the tracker, if anything.

    What the tracker names comes first, then the older ones: somebody may have gone back on purpose. Without a usable
    tracker, all that were written to their end.
    """
    try:
        named, lost = tracked(checkpoints), []
    except UserError as error:
        named, lost = None, [str(error).partition(";")[0]]
    ended = _ended_steps(checkpoints)
    if named is not None:
        return [named, *(step for step in ended if step.number < named.number)], []
    if ended and not lost:
        lost = [f"{checkpoints} has no {TRACKER}, which names the newest checkpoint"]
    return ended, lost


def find_newest(checkpoints: Path, find_damage: Callable[[Path], str] = damage) -> Newest:
    """The checkpoint from which a run goes on; DamagedCheckpoint where there are some, but none is whole."""
    steps, lost = candidates(checkpoints)
    for step in steps:
        if not (why := find_damage(step.folder)):
            return Newest(step, tuple(lost))
        lost.append(lost_step(step, why))
    if lost:
        raise none_is_whole(checkpoints, lost)
    return Newest(None)


def lost_step(step: Step, why: str) -> str:
    return f"the checkpoint of step {step.number} is damaged ({why})"


def none_is_whole(checkpoints: Path, lost: list[str]) -> DamagedCheckpoint:
    return DamagedCheckpoint(
        f"{'; '.join(lost)}; no whole checkpoint is left in {checkpoints}: put the files back, or move the folder away "
        "to begin again"
    )


def going_back(newest: Newest, tracked_step: int | None = None) -> str:
    """What is lost and from where the run goes on instead, in one line; empty where nothing is lost."""
    if not newest.lost or newest.step is None:
        return ""
    steps = (tracked_step or 0) - newest.step.number
    again = f": {steps} step{'s' if steps > 1 else ''} done again" if steps > 0 else ""
    return f"{'; '.join(newest.lost)}; the run goes on from step {newest.step.number}{again}"


def check_tracker(checkpoints: Path) -> None:
    """UserError where a folder holds checkpoints with an index, but not the file that says which is the newest."""
    steps, tracker = [str(step.number) for step in reversed(_steps_with(INDEX, checkpoints))], checkpoints / TRACKER
    if steps and not os.path.isfile(tracker):
        raise UserError(
            f"{checkpoints} holds checkpoints ({', '.join(steps)}), but not {TRACKER}, which names the newest; to go "
            f"on, write its step there (echo {steps[-1]} > {shlex.quote(str(tracker))}); to begin again, move the "
            "iter_* folders away"
        )


def write_tracker(checkpoints: Path, step: Step) -> None:
    with whole_or_not_at_all(checkpoints / TRACKER) as partial:
        partial.write_text("release" if step.folder.name == "release" else str(step.number))


@contextlib.contextmanager
def whole_or_not_at_all(path: Path):
    """The path of a file to write, which takes the place of `path` once it is on the disk."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        flush_to_disk(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    flush_to_disk(path.parent)


def flush_to_disk(path: Path) -> None:
    """fsync of a file, or of a folder: of the names in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def interrupted_saves(checkpoints: Path) -> list[Path]:
    """What killed or failed saves left: folders of torch_dist without the file that ends one. Nobody can load them."""
    tracker = _named(checkpoints)
    return [
        folder
        for folder in _folders(checkpoints)
        if folder.name != tracker
        and folder.name.removeprefix("iter_").isdecimal()
        and folder.is_dir()
        and not folder.is_symlink()
        and not (folder / FORMAT).exists()
        and all(name.endswith((".distcp", ".tmp")) or name in (INDEX, CHECKSUMS) for name in os.listdir(folder))
    ]


def _named(checkpoints: Path) -> str | None:
    with contextlib.suppress(UserError):
        step = tracked(checkpoints)
        return step.folder.name if step else None


def remove_step(folder: Path) -> None:
    """Remove a checkpoint; a removal that is cut short leaves nothing that could be taken for a whole one."""
    for name in (FORMAT, CHECKSUMS, INDEX):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def folder_bytes(folder: Path) -> int:
    """What vanishes meanwhile is not counted: other ranks may still write, rename and remove."""
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(where, name)).st_size
    return total
