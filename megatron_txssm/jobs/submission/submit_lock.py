"""One `txssm submit` per run folder at a time: of several that start at once, one queues and the others fail."""

from pathlib import Path

from megatron_txssm.errors import UserError
from megatron_txssm.holders import living_holder
from megatron_txssm.training.launch.run_lock import RunLock

NAME = "submitting.json"


class SubmitLock(RunLock):
    """Locks a run folder while its jobs are queued; a killed submission's lock is treated like RunLock's."""

    name = NAME

    def choose_folders(self) -> list[Path]:
        return [self.recipe.run_path]

    def check(self) -> None:
        (folder,) = self.folders
        if (holder := living_holder(folder, self.me, NAME)) is not None:
            raise UserError(
                f"{folder} is being submitted by another txssm submit ({holder}); see txssm jobs "
                f"(if it has ended, remove {folder / NAME})"
            )

    def _write(self, file: Path) -> None:
        try:
            super()._write(file)
        except FileExistsError:
            raise
        except OSError as error:
            raise UserError(f"run_directory={file.parent} cannot be written: {error.strerror}") from None
