"""Resumes a run from the newest checkpoint that is whole and finite, and reports skipped ones."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_txssm.checkpoint.checksums import DamagedCheckpoint
from megatron_txssm.checkpoint.fallback import SoundSteps, find_damage, from_rank_0, note_without_checksums
from megatron_txssm.checkpoint.reading import Reading
from megatron_txssm.checkpoint.steps import (
    Newest,
    Step,
    branch_step,
    folder_bytes,
    going_back,
    interrupted_removals,
    interrupted_saves,
    remove_step,
    saved_step,
    tracked,
)
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.session.hooks import Call, Listener, tracker_naming

if TYPE_CHECKING:
    from megatron_txssm.compat import MegatronArguments

# Megatron's arguments that load_checkpoint sets, and expects to have their initial values.
_SET_BY_A_LOAD = ("consumed_train_samples", "skipped_train_samples", "consumed_valid_samples", "finetune")


@dataclass(frozen=True)
class SoundLoads(Listener):
    """Lets Megatron load a checkpoint only if its files are whole, and continue only from finite weights.

    If the newest of the run's own checkpoints is unsound, an older one is used, and `say` reports it on rank 0. A run
    that has none continues checkpoint.branch_from, if stated. DamagedCheckpoint if none is left, or if the checkpoint
    selected by load_from, branch_from or megatron.ckpt_step is damaged.
    """

    recipe: Recipe
    say: Callable[[str], None]

    def around_load(self, call: Call, proceed: Callable[[], object]) -> object:
        from megatron_txssm.compat import get_args

        options, checkpoint = get_args(), self.recipe.checkpoint
        own = options.load == str(self.recipe.checkpoint_path) and not options.ckpt_step
        if own and (loaded := self._load_own(call, proceed)):
            return loaded
        source = None if options.ckpt_step else checkpoint.branch_from
        branch = None if source is None else branch_step(Path(source))
        with _checked(branch or _chosen(options), checkpoint.verify, self.say):
            return proceed() if branch is None else _load_step(branch, proceed)

    def _load_own(self, call: Call, proceed: Callable[[], object]) -> object:
        """Load the run's newest sound checkpoint; None if it has never had any."""
        from megatron_txssm.compat import get_args
        from megatron_txssm.training.finite import first_not_finite

        ours, options = self.recipe.checkpoint_path, get_args()
        steps = SoundSteps(ours, self.recipe.checkpoint.verify)
        before = from_rank_0(lambda: saved_step(ours))
        _remove_remains(ours, self.say)
        at_start = {name: getattr(options, name, None) for name in _SET_BY_A_LOAD}
        while (newest := steps.find_next()).step is not None:
            _go_back(steps, newest, before, self.say)
            loaded = _load_step(newest.step, proceed)
            if not (why := first_not_finite(call.ddp_model, call.optimizer)):
                return loaded
            steps.reject(f"{why} is NaN or infinite")
            vars(options).update(at_start)
            # Loading adds to num_steps.
            call.opt_param_scheduler.num_steps = 0
        return None


def _go_back(steps: SoundSteps, newest: Newest, before: int | None, say: Callable[[str], None]) -> None:
    assert newest.step is not None
    if lost := going_back(newest, before):
        say(f"warning: {lost}")
        steps.make_newest(newest.step)
    if note := from_rank_0(lambda: note_without_checksums(newest.step, steps.verify)):  # pyright: ignore[reportArgumentType]
        say(f"note: {note}")


def _load_step(step: Step, load: Callable[[], object]) -> object:
    """Load this step on every rank, even if a rank's network file system still shows an older tracker."""
    from megatron_txssm.compat import get_args

    options = get_args()
    ours, pretrained = options.load, options.pretrained_checkpoint
    # Megatron would load the pretrained checkpoint if the tracker is not visible yet.
    options.load, options.ckpt_step, options.pretrained_checkpoint = str(step.folder.parent), step.number or None, None
    try:
        with tracker_naming(step.number, release=step.folder.name == "release"):
            return load()
    finally:
        options.load, options.ckpt_step, options.pretrained_checkpoint = ours, None, pretrained


def _chosen(options: "MegatronArguments") -> Step | None:
    """The checkpoint that Megatron's own arguments select; it is not replaced by another."""
    folder = options.load if options.load and tracked_anything(options.load) else options.pretrained_checkpoint
    if folder is None:
        return None
    if options.ckpt_step:
        return Step(options.ckpt_step, Path(folder) / f"iter_{options.ckpt_step:07d}")
    return from_rank_0(lambda: tracked(Path(folder)))


def tracked_anything(folder: str) -> bool:
    return from_rank_0(lambda: saved_step(Path(folder))) is not None


@contextlib.contextmanager
def _checked(step: Step | None, verify: bool | str, say: Callable[[str], None]) -> Iterator[None]:
    """For the duration of a load of another run's checkpoint, which that run may want to remove."""
    import torch.distributed

    if step is None:
        yield
        return
    # Rank 0 looks first, so that no rank reads without the mark.
    with Reading(step.folder) if torch.distributed.get_rank() == 0 else contextlib.nullcontext():
        if why := find_damage(step, verify):
            raise DamagedCheckpoint(f"{step.folder} is damaged ({why}); copy it again, or name another")
        if note := from_rank_0(lambda: note_without_checksums(step, verify)):
            say(f"note: {note}")
        yield


def _remove_remains(checkpoints: Path, say: Callable[[str], None]) -> None:
    """Remove the remains of interrupted saves and removals: nobody can load them, but they take space."""

    def remove() -> None:
        for what, folders in (("save", interrupted_saves(checkpoints)), ("removal", interrupted_removals(checkpoints))):
            for folder in folders:
                size = folder_bytes(folder)
                remove_step(folder)
                say(f"note: removed {folder} ({size:,} bytes), the remains of an interrupted {what}")

    from_rank_0(remove)
