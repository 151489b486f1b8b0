"""The checkpoints of a folder: the newest, the whole ones, and the damage of the others. Does not import torch.

CHECKPOINTS/latest_checkpointed_iteration.txt   the tracker: the step of the newest, or `release`
CHECKPOINTS/iter_0000020/                       a step: *.distcp, then .metadata, metadata.json, checksums.json
CHECKPOINTS/removed_iter_0000020_<token>/       a step whose files are being deleted (retention.py)
"""

import contextlib
import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_txssm.checkpoint.checksums import CHECKSUMS, DamagedCheckpoint, wrong_sizes
from megatron_txssm.errors import UserError

TRACKER = "latest_checkpointed_iteration.txt"
# torch_dist's index, and the file that Megatron writes after it.
INDEX, FORMAT = ".metadata", "metadata.json"
# What a merge consists of (merging.py): weights without optimizer state.
MERGE = "merge.json"
# The beginning of the name of a checkpoint that is being removed.
REMOVED = "removed_"


@dataclass(frozen=True)
class Step:
    """One checkpoint; a `release` is step 0."""

    number: int
    folder: Path


@dataclass(frozen=True)
class Newest:
    """The newest whole checkpoint (None: there has never been one), and the damage of newer ones."""

    step: Step | None
    # "the newest checkpoint, of step 20, is damaged (...)", in the order of the search.
    lost: tuple[str, ...] = ()


def tracker_step(checkpoints: Path) -> int | None:
    """The step named by the tracker, whole or not; None without a tracker, UserError if its content is invalid."""
    tracker = checkpoints / TRACKER
    # Path.is_file raises for overlong names.
    if not os.path.isfile(tracker):
        return None
    text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if text == "release":
        return 0
    # Python converts no more than 4,300 digits.
    if not text.isdecimal() or len(text) > 15:
        raise UserError(
            f"{tracker} says {text[:40]!r}, not a step; write the number of the newest iter_* folder into it"
        )
    return int(text)


def tracked(checkpoints: Path) -> Step | None:
    """The checkpoint named by the tracker, which may not exist; None without a tracker, UserError if it is invalid."""
    number = tracker_step(checkpoints)
    if number is None:
        return None
    is_release = number == 0 and "release" in (checkpoints / TRACKER).read_text(errors="replace")
    return Step(number, checkpoints / ("release" if is_release else f"iter_{number:07d}"))


def branch_step(folder: Path) -> Step:
    """The step that checkpoint.branch_from names; UserError if it is none, or visibly damaged."""
    number = folder.name.removeprefix("iter_")
    if folder.name == number or not number.isdecimal():
        raise UserError(
            f"checkpoint.branch_from={folder} is not a step of a run, such as runs/NAME/checkpoints/iter_0000100; "
            "checkpoint.load_from takes weights alone, from a checkpoint directory"
        )
    if why := damage(folder):
        others = ", ".join(step.folder.name for step in reversed(whole_steps(folder.parent)))
        raise UserError(
            f"checkpoint.branch_from={folder}: {lost_step(Step(int(number), folder), why)}; put it back"
            + (f", or name another step ({others})" if others else "")
        )
    return Step(int(number), folder)


def saved_step(checkpoints: Path) -> int | None:
    """The step of the newest checkpoint, by its tracker; by the folders if the tracker is invalid."""
    try:
        return tracker_step(checkpoints)
    except UserError:
        steps = whole_steps(checkpoints)
        return steps[0].number if steps else None


def damage(folder: Path) -> str:
    """The visible damage of one checkpoint; empty if there is none. Only reads names and sizes."""
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
    """Completely written checkpoints without visible damage, the newest first."""
    return [step for step in _ended_steps(checkpoints) if not damage(step.folder)]


def _ended_steps(checkpoints: Path) -> list[Step]:
    """Checkpoints with the file that is written last, except checksums and tracker; the newest first."""
    return _steps_with(FORMAT, checkpoints)


def _steps_with(name: str, checkpoints: Path) -> list[Step]:
    steps = [
        Step(int(number), folder)
        for folder in _folders(checkpoints)
        if (number := folder.name.removeprefix("iter_")).isdecimal() and (folder / name).exists()
    ]
    return sorted(steps, key=lambda step: -step.number)


def _folders(checkpoints: Path) -> list[Path]:
    # Path.glob raises for overlong names.
    return sorted(checkpoints.glob("iter_*")) if os.path.isdir(checkpoints) else []


def candidates(checkpoints: Path) -> tuple[list[Step], list[str]]:
    """The checkpoints that a run may resume from, the best first, and the tracker's fault, if any.

    The one named by the tracker comes first, then older ones: a user may have gone back on purpose. Without a valid
    tracker, all completely written ones.
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
    """The checkpoint that a run resumes from; DamagedCheckpoint if there are some, but none is whole."""
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
    """One line: the lost checkpoints, and the step that the run resumes from instead; empty if none is lost."""
    if not newest.lost or newest.step is None:
        return ""
    steps = (tracked_step or 0) - newest.step.number
    again = f": {steps} step{'s' if steps > 1 else ''} done again" if steps > 0 else ""
    return f"{'; '.join(newest.lost)}; the run goes on from step {newest.step.number}{again}"


def check_tracker(checkpoints: Path) -> None:
    """UserError if a folder has checkpoints with an index, but no tracker."""
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
def whole_or_not_at_all(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write, which atomically replaces `path` once it is flushed to disk."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        flush_to_disk(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    flush_to_disk(path.parent)


def flush_to_disk(path: Path) -> None:
    """fsync a file, or the entries of a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def interrupted_saves(checkpoints: Path) -> list[Path]:
    """Remains of failed saves, which cannot be loaded: torch_dist folders without the file that is written last."""
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


def interrupted_removals(checkpoints: Path) -> list[Path]:
    """Checkpoints whose removal was not finished."""
    return sorted(checkpoints.glob(f"{REMOVED}iter_*")) if os.path.isdir(checkpoints) else []


def _named(checkpoints: Path) -> str | None:
    with contextlib.suppress(UserError):
        step = tracked(checkpoints)
        return step.folder.name if step else None


def remove_step(folder: Path) -> None:
    """Remove a checkpoint, so that an interrupted removal does not leave one that looks whole."""
    for name in (FORMAT, CHECKSUMS, INDEX):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def folder_bytes(folder: Path) -> int:
    """Size of all files, except those that vanish meanwhile: other ranks may still write, rename and remove."""
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(where, name)).st_size
    return total
