"""One `txssm submit` a run folder at a time: of several that begin at once, one queues and the others refuse."""

from pathlib import Path

from megatron_txssm.errors import UserError
from megatron_txssm.training.launch.run_lock import RunLock, living_holder

NAME = "submitting.json"


class SubmitLock(RunLock):
    """Holds a run's folder while its jobs are queued; what a killed submission leaves counts as RunLock's does."""

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
