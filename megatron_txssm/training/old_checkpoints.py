"""Removes a run's old checkpoints after its saves (checkpoint.keep_last), on rank 0, beside the training loop."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from megatron_txssm.checkpoint.retention import remove_old
from megatron_txssm.checkpoint.steps import folder_bytes, saved_step, tracked
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.session.hooks import Call, Listener, listening
from megatron_txssm.training.saving import warn_without_room

# How long the end of a run waits for a removal; what is left of it then is removed at the next start.
_WAIT_SECONDS = 60


@contextlib.contextmanager
def removing_old_checkpoints(recipe: Recipe, rank: int, say: Callable[[str], None]) -> Iterator[None]:
    """For the duration of the training loop. `say` writes a line to the terminal, on rank 0, in the main thread."""
    if rank > 0 or recipe.checkpoint.keep_last is None or recipe.checkpoint.save_interval is None:
        yield
        return
    removal = _Removal(recipe, say)
    with listening(removal):
        try:
            yield
        except SystemExit:  # Megatron's exit after a signal
            removal.end()
            raise
        removal.end()


@dataclass
class _Removal(Listener):
    """Starts a thread for each save whose checkpoint has become the newest; at most one at a time."""

    recipe: Recipe
    say: Callable[[str], None]
    # The step of the last save, until the tracker names it: an asynchronous save (async_save) ends some steps later.
    awaited: int | None = field(default=None, init=False)
    thread: threading.Thread | None = field(default=None, init=False)
    # What the thread has to say.
    lines: list[str] = field(default_factory=list, init=False)

    def after_save(self, call: Call, result: object) -> None:
        if not call.non_persistent_ckpt:
            self.awaited = call.iteration
            self._look()

    def after_finalize(self, call: Call, result: object) -> None:
        if self.awaited is not None or self.lines:
            self._look()

    def end(self) -> None:
        # The first may have kept the last save waiting.
        for _ in range(2):
            if self.thread is not None:
                self.thread.join(_WAIT_SECONDS)
            self._look()

    def _look(self) -> None:
        while self.lines:
            self.say(self.lines.pop(0))
        is_busy = self.thread is not None and self.thread.is_alive()
        if self.awaited is None or is_busy or saved_step(self.recipe.checkpoint_path) != self.awaited:
            return
        self.awaited = None
        self.thread = threading.Thread(target=self._remove, daemon=True, name="old checkpoints")
        self.thread.start()

    def _remove(self) -> None:
        folder, fields = self.recipe.checkpoint_path, self.recipe.checkpoint
        assert fields.keep_last is not None
        try:
            for problem in remove_old(folder, fields.keep_last, fields.keep_every):
                self.lines.append(f"warning: {problem}")
            if (newest := tracked(folder)) is not None:
                warn_without_room(self.recipe, folder_bytes(newest.folder), self.lines.append)
        except OSError as error:
            self.lines.append(f"warning: old checkpoints in {folder} could not be removed: {error}")
