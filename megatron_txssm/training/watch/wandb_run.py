"""Weights & Biases: a resumed run continues the same W&B run.

Megatron starts W&B without an id, so each resume would create another run. W&B reads an id from the environment.
"""

import os
import uuid

from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.training.launch.preflight import saved_step


def name_wandb_run(recipe: Recipe) -> None:
    """Let W&B continue the run named in RUN/wandb/run_id; a training that begins at step 0 gets a new one.

    W&B rejects steps that it has seen, which would be all steps of a training that begins again. Variables that the
    user has set are kept. Called on every rank; Megatron starts W&B on the last.
    """
    if recipe.logging.wandb_project is None or os.environ["RANK"] != str(int(os.environ["WORLD_SIZE"]) - 1):
        return
    kept = recipe.run_path / "wandb" / "run_id"
    resumed = recipe.checkpoint.save_interval is not None and (saved_step(recipe.checkpoint_path) or 0) > 0
    if not (resumed and kept.is_file()):
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(f"{uuid.uuid4().hex[:12]}\n", encoding="utf-8")
    os.environ.setdefault("WANDB_RUN_ID", kept.read_text(encoding="utf-8").strip())
    os.environ.setdefault("WANDB_RESUME", "allow")
    _allow_changes_of_the_configuration()


def _allow_changes_of_the_configuration() -> None:
    """Megatron passes the Slurm job's name to W&B, which rejects a changed one when a run resumes."""
    from wandb import Config  # pyright: ignore[reportAttributeAccessIssue]  it is there

    update = Config.update

    def update_and_allow(self: Config, d: object, allow_val_change: bool | None = None) -> None:
        update(self, d, allow_val_change=True if allow_val_change is None else allow_val_change)

    Config.update = update_and_allow
