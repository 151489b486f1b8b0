"""The norm of the recurrent state of every state-space layer over position, read by hooks on a checkpoint's mixers.

B=batch  L=sequence length  D=hidden size  E=in-projection's rows  H=heads  P=head dim  N=state size
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from megatron_txssm.checkpoint.load import load_options
from megatron_txssm.checkpoint.saved_model import step_folder
from megatron_txssm.errors import UserError, require_count
from megatron_txssm.evaluation.evaluate import evaluation_recipe, run_validation
from megatron_txssm.files import JsonObject, write_results
from megatron_txssm.recipe.changes import ONE_MODEL_PARALLEL_RANK, changed
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.validation.validate import validate
from megatron_txssm.session.hooks import Call, Listener, listen, listening
from megatron_txssm.session.start import start_megatron
from megatron_txssm.slurm.environment import adopt_slurm_step, is_worker
from megatron_txssm.training.processes import launch, worker_command

if TYPE_CHECKING:
    from torch import Tensor

RESULTS = "states.json"
# Decides which validation samples are read: the same ones for all checkpoints.
_SEED = 1234


def evaluate_states(
    run: Path,
    output: Path,
    *,
    length: int,
    samples: int = 8,
    every: int = 256,
    step: int | None = None,
    overrides: Sequence[str] = (),
) -> int:
    """Write the norms of a checkpoint's states to states.json in `output`, by one process; returns the exit code.

    length: tokens of a validation sample; samples: their number; every: tokens between positions that are measured.
    The rest is as in `evaluate.evaluate`. Samples are read as one text each, whatever data.isolate_documents says.
    """
    adopt_slurm_step()
    recipe = states_recipe(run, output, length=length, samples=samples, every=every, overrides=overrides)
    if step is not None:
        step_folder(Path(recipe.checkpoint.load_from or ""), step)
    if is_worker():
        from megatron_txssm.training.pretrain import run_worker

        return run_worker(recipe, partial(states_as_worker, every=every, step=step))
    options = {"--output": output, "--length": length, "--samples": samples, "--every": every, "--step": step}
    words = [str(run), *(word for name, value in options.items() if value is not None for word in (name, str(value)))]
    return launch(recipe, 1, worker_command("eval", "states", *words, overrides=overrides))


def states_recipe(
    run: Path, output: Path, *, length: int, samples: int, every: int, overrides: Sequence[str] = ()
) -> Recipe:
    """The recipe by which a run's states are measured; UserError for a model without states, or wrong numbers."""
    require_count(length=length, every=every, samples=samples)
    if length % every:
        raise UserError(f"--every {every} does not divide --length {length}; use a divisor of it")
    longer = [f"training.seq_length={length}", f"training.global_batch_tokens={length}", "training.micro_batch_size=1"]
    one_rank = [f"{name}={str(value).lower()}" for name, value in ONE_MODEL_PARALLEL_RANK.items() if value is not None]
    recipe = evaluation_recipe(run, [*overrides, *longer, *one_rank], output)
    if not recipe.has_state_space:
        raise UserError(f"{run} has no state-space layer (layer_pattern {recipe.model.layer_pattern}), and so no state")
    recipe = changed(recipe, {"logging.eval_iters": samples, "data.isolate_documents": False, "training.seed": _SEED})
    validate(recipe)
    return recipe


@listening()
def states_as_worker(recipe: Recipe, terminal: TextIO, *, every: int, step: int | None) -> None:
    """As the only Megatron worker, measure the states of a step (None: the newest), and write states.json."""
    args = start_megatron(recipe, after=load_options(Path(recipe.checkpoint.load_from or ""), step), trains=False)
    import torch.distributed

    from megatron_txssm.terminal import progress_bar
    from megatron_txssm.training.forward_step import forward_step

    norms = StateNorms(every)
    listen(norms)
    samples = recipe.logging.eval_iters or 0
    with progress_bar("samples", samples) as advance:

        def step_forward(data_iterator: Any, model: Any) -> Any:
            advance(1)
            return forward_step(data_iterator, model)

        run_validation(recipe, args, step_forward)
    about: JsonObject = {
        "name": recipe.name,
        "step": args.iteration,
        "checkpoint": recipe.checkpoint.load_from,
        "samples": samples,
        "positions": [*range(every, recipe.training.seq_length + 1, every)],
    }
    write_results(recipe.run_path / RESULTS, about | {"layers": [*norms.as_json()]})
    print(f"step {args.iteration}; {recipe.run_path / RESULTS}", file=terminal)
    torch.distributed.destroy_process_group()


class StateNorms(Listener):
    """Measures the states of every mixer of the model while it validates.

    A mixer reads its input once more, in pieces of `every` tokens, with the cache with which it decodes: so the state
    is known after each piece, and no other is kept.
    """

    def __init__(self, every: int):
        self.every = every
        # Layer, from 1 -> for each batch: the states' norms, and the share of a state that outlives a piece; [C, B, H].
        self.norms_CBH: dict[int, list[Tensor]] = {}
        self.shares_CBH: dict[int, list[Tensor]] = {}

    def after_setup(self, call: Call, result: Any) -> None:
        models, *_ = result
        self.watch(models)

    def watch(self, models: Sequence[Any]) -> None:
        from megatron_txssm.model.state_space_mixer import StateSpaceMixer

        for module in (module for model in models for module in model.modules()):
            if isinstance(module, StateSpaceMixer):
                module.register_forward_pre_hook(self._measure)

    def _measure(self, mixer: Any, inputs: tuple[Any, ...]) -> None:
        import torch
        from megatron.core.inference.contexts.static_context import StaticInferenceContext

        (hidden_LBD,) = inputs
        length, batch, _ = hidden_LBD.shape
        context, norms_CBH, shares_CBH = StaticInferenceContext(batch, length), [], []
        with torch.no_grad():
            for piece_LBD in hidden_LBD.split(self.every):
                # Not by a call, which would come here again.
                mixer.forward(piece_LBD, inference_context=context)
                context.sequence_len_offset += len(piece_LBD)
                state_BHPN = context.key_value_memory_dict[mixer.layer_number].state_BHPN
                norms_CBH.append(torch.linalg.vector_norm(state_BHPN.double(), dim=(-2, -1)))
                shares_CBH.append(_surviving_share(mixer, piece_LBD))
        self.norms_CBH.setdefault(mixer.layer_number, []).append(torch.stack(norms_CBH).cpu())
        self.shares_CBH.setdefault(mixer.layer_number, []).append(torch.stack(shares_CBH).cpu())

    def as_json(self) -> list[JsonObject]:
        """For each layer: the norms' means and largest at each position, the share of a state left after a piece."""
        import torch

        found: list[JsonObject] = []
        for layer in sorted(self.norms_CBH):
            norms_CN = torch.cat(self.norms_CBH[layer], dim=1).flatten(1)
            found.append(
                {
                    "layer": layer,
                    "mean": [_finite(value) for value in norms_CN.mean(1).tolist()],
                    "largest": [_finite(value) for value in norms_CN.amax(1).tolist()],
                    "surviving_share": _finite(float(torch.cat(self.shares_CBH[layer], dim=1).mean())),
                }
            )
        return found


def _surviving_share(mixer: Any, hidden_LBD: "Tensor") -> "Tensor":
    """exp of the sum of dt·A over the tokens, [B, H]: the share of the state before them that is left after them."""
    projected_LBE, _ = mixer.in_proj(hidden_LBD)
    heads, end = mixer.in_proj_sizes["dt"], sum(mixer.in_proj_sizes.values())
    dt_LBH = mixer.step_sizes(projected_LBE[..., end - heads : end])
    return (-mixer.A_log.exp() * dt_LBH).double().sum(0).exp()


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if abs(value) < float("inf") else None
