"""Explains a loss, gradient or weight that is NaN or infinite: where it began, and how to recover."""

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from megatron_txssm.checkpoint.fallback import from_rank_0, newest_finite
from megatron_txssm.checkpoint.steps import TRACKER, Step, saved_step, whole_steps
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.slurm.environment import attempt_folder
from megatron_txssm.slurm.submission import read_submission

# Megatron's exit codes for a non-finite result: a rerun on the same GPU gave the same result, or another.
SAME_AGAIN, NOT_THE_SAME = 16, 17
# Time limit for reading large checkpoints' weights: half of torch.distributed's timeout.
READ_SECONDS = 300


@dataclass(frozen=True)
class Suspect:
    """A rank whose own result was the first non-finite one."""

    rank: int
    node: str
    # None without a GPU.
    device: int | None
    result: str

    def __str__(self) -> str:
        device = "" if self.device is None else f", GPU {self.device}"
        return f"rank {self.rank} (node {self.node}{device}: {self.result})"


def explain_not_finite(recipe: Recipe, code: int) -> str:
    """Why Megatron stops with exit code 16 or 17. A collective: every rank gets the same text."""
    from megatron.core.rerun_state_machine import RerunState, get_rerun_state_machine

    from megatron_txssm.compat import get_args

    from_checkpoint = get_rerun_state_machine().state is RerunState.RERUNNING_FROM_CHECKPOINT
    suspects = _suspects()
    where = f" on {', '.join(map(str, suspects[:4]))}{' and others' if len(suspects) > 4 else ''}" if suspects else ""
    if code == SAME_AGAIN:
        again = "computed again on the same GPU, it came out the same: the training diverges, or that GPU is broken"
    elif from_checkpoint:
        again = "it was computed again on another GPU"
    else:
        again = "computed again on the same GPU, it came out differently: a passing error of that GPU is likely"
    return (
        f"the loss or a gradient of step {get_args().curr_iteration + 1} is NaN or infinite{where}; {again} "
        f"(Megatron's exit code {code}). {way_back(recipe)}"
    )


def _suspects() -> list[Suspect]:
    import torch
    import torch.distributed as dist
    from megatron.core.rerun_state_machine import get_rerun_state_machine

    call = get_rerun_state_machine().failed_validation_call
    ours = None
    if call is not None:
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        ours = Suspect(dist.get_rank(), os.uname().nodename, device, call.caller.message)
    found: list[Suspect | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, ours)
    return [suspect for suspect in found if suspect is not None]


def way_back(recipe: Recipe) -> str:
    """The last checkpoint with finite weights, as read by rank 0, and the command that resumes from it."""
    folder = recipe.checkpoint_path
    step, proof, newest = from_rank_0(lambda: (*_last_sound(folder), saved_step(folder)))
    if step is None:
        return "No checkpoint has finite weights; start again with a lower optimizer.learning_rate"
    command = f"{_start(recipe)} --set optimizer.learning_rate={recipe.optimizer.learning_rate / 2:g}"
    command += " --set optimizer.schedule_at_resume=recipe"
    if step.number != newest:
        command = f"echo {step.number} > {shlex.quote(str(folder.absolute() / TRACKER))} && {command}"
    return (
        f"The last sound checkpoint is that of step {step.number}: {proof}. To continue from it with a lower learning "
        f"rate: {command}"
    )


def _last_sound(folder: Path) -> tuple[Step | None, str]:
    """The checkpoint, and how it is known to be sound. The other ranks wait in a collective with a timeout."""
    try:
        return newest_finite(folder, READ_SECONDS), "its weights were read and are finite"
    except TimeoutError:
        whole = whole_steps(folder)
        return (whole[0] if whole else None), "it is complete, and was checked for NaN when it was saved"


def _start(recipe: Recipe) -> str:
    """The command line that restarts this run."""
    submitted = read_submission(recipe.run_path).get("command") if attempt_folder() is not None else None
    if submitted:
        return f"cd {shlex.quote(os.environ.get('SLURM_SUBMIT_DIR', '.'))} && {submitted}"
    return shlex.join(["txssm", "pretrain", str(recipe.run_path.absolute() / "recipe.yaml")])
