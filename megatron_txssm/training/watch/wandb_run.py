"""Weights & Biases: a run that is resumed stays one run there.

Megatron starts W&B without an identity, so each resume would be another run. W&B reads one from its environment.
"""

import os
import uuid
from typing import Any

from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.training.launch.preflight import saved_step


def name_wandb_run(recipe: Recipe) -> None:
    """Let W&B go on with the run that RUN/wandb/run_id names; one that begins at step 0 is a new one.

    W&B refuses steps that it has seen, and so all of a training that begins again. What the user's own environment says
    holds. Called on every rank; Megatron starts W&B on the last.
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
    """Megatron tells W&B the Slurm job's name, which W&B refuses where a resumed run has another."""
    from wandb import Config  # pyright: ignore[reportAttributeAccessIssue]  it is there

    update = Config.update

    def update_and_allow(self: Any, d: Any, allow_val_change: bool | None = None) -> None:
        update(self, d, allow_val_change=True if allow_val_change is None else allow_val_change)

    Config.update = update_and_allow
