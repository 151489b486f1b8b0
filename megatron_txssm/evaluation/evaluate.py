"""The loss of a run's checkpoint on all of its validation data, by Megatron's own evaluation.

Each sample counts once: Megatron's full validation reads a set once per micro-batch of a training step, and here a step
has one micro-batch. As in Megatron, a shard's last tokens that do not fill a sample are left out.
"""

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from megatron_txssm.checkpoint.load import load_options
from megatron_txssm.checkpoint.saved_model import find_checkpoints, step_folder
from megatron_txssm.errors import UserError
from megatron_txssm.metrics import perplexity
from megatron_txssm.recipe.changes import WITHOUT_REPORTS, Changes, changed
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.validation.validate import validate
from megatron_txssm.session.arguments import whole_validation_arguments
from megatron_txssm.session.hooks import Call, Listener, listen, listening
from megatron_txssm.session.start import end_at_once_on_sigterm, start_megatron
from megatron_txssm.slurm.environment import adopt_slurm_step, is_worker
from megatron_txssm.terminal import print_table
from megatron_txssm.training.processes import launch, worker_command


class SetLoss(NamedTuple):
    """The loss on one validation set, in nats per token, and its number of tokens.

    by_position: the loss in equal parts of all samples, from their first token to their last; empty: not asked for.
    """

    loss: float
    tokens: int
    by_position: tuple[float, ...] = ()


def evaluate(
    run: str | Path,
    *,
    step: int | None = None,
    by_position: int | None = None,
    output: Path | None = None,
    overrides: Sequence[str] = (),
    nproc: int | None = None,
    port: int | None = None,
) -> int:
    """Write the loss of a run's checkpoint on all validation data to validation.json in `output`; the exit code.

    step: which checkpoint (None: the newest). by_position: also the loss in so many equal parts of the samples. output:
    a folder (None: RUN/evaluation). The rest is as in `training.processes.pretrain`.
    """
    adopt_slurm_step()
    recipe = evaluation_recipe(Path(run), overrides, output)
    if step is not None:
        step_folder(Path(recipe.checkpoint.load_from or ""), step)
    if by_position is not None:
        _check_parts(recipe, by_position)
    if is_worker():
        from megatron_txssm.training.pretrain import run_worker

        return run_worker(recipe, partial(evaluate_as_worker, step=step, by_position=by_position))
    options = {"--step": step, "--by-position": by_position, "--output": output}
    words = [str(run), *(word for name, value in options.items() if value is not None for word in (name, str(value)))]
    return launch(recipe, nproc, worker_command("eval", "loss", *words, overrides=overrides), port=port)


def _check_parts(recipe: Recipe, parts: int) -> None:
    length = recipe.training.seq_length
    if parts < 1 or length % parts:
        raise UserError(f"--by-position {parts} does not divide training.seq_length={length}")
    if recipe.parallel.context_parallel_size > 1:
        raise UserError(
            f"--by-position {parts}: ranks of context parallelism have pieces of a sample, not one after another; add "
            "--set parallel.context_parallel_size=1"
        )


def evaluation_recipe(run: Path, overrides: Sequence[str], output: Path | None = None) -> Recipe:
    """The recipe of a run's checkpoints, with the user's `overrides`, changed to only evaluate.

    No checkpoints are saved, and all output goes to `output` (None: RUN/evaluation). UserError without a checkpoint or
    validation data.
    """
    checkpoints = find_checkpoints(run)
    if checkpoints == run:
        raise UserError(f"{run} is a checkpoints folder; name the run's own folder, such as {run.absolute().parent}")
    made_by = next((file for folder in (checkpoints, run) if (file := folder / "recipe.yaml").is_file()), None)
    if made_by is None:
        raise UserError(f"{run} has no recipe.yaml; `txssm pretrain` writes one")
    recipe = load_recipe(made_by, overrides)
    _check_validation_data(run, recipe)
    ours: Changes = {
        **WITHOUT_REPORTS,
        "run_directory": str(output or run / "evaluation"),
        "checkpoint.directory": None,
        # With an interval, preflight would try to write to the checkpoints.
        "checkpoint.save_interval": None,
        # Preflight compares the model with the checkpoint's.
        "checkpoint.load_from": str(checkpoints),
        "checkpoint.branch_from": None,
        # Virtual stages need several micro-batches per step, but here a step has one.
        "parallel.virtual_pipeline_stages": None,
        "logging.eval_iters": None,
        "megatron.skip_train": True,
        "megatron.exit_duration_in_mins": None,
    }
    recipe = changed(recipe, ours)
    validate(recipe, source=made_by)
    return recipe


def _check_validation_data(run: Path, recipe: Recipe) -> None:
    data = recipe.data
    if data.corpus is not None:
        from megatron_txssm.data.corpus.blend import recipe_blend

        found = bool(recipe_blend(recipe).shards("validation"))
    elif data.blend is not None:
        found = float((f"{data.split},0").split(",")[1]) > 0
    else:
        found = bool(data.validation or data.recall_pairs)
    if not found:
        raise UserError(
            f"{run} has no validation data: its recipe's data hold none; "
            "name token files with --set data.train=PREFIX --set data.validation=PREFIX"
        )


@listening()
def evaluate_as_worker(
    recipe: Recipe, terminal: TextIO, *, step: int | None = None, by_position: int | None = None
) -> None:
    """As one Megatron worker, evaluate a step (None: the newest); rank 0 writes validation.json and the table."""
    args = start_megatron(recipe, after=evaluation_arguments(recipe, step), trains=False)
    import torch.distributed
    from rich.progress import Progress

    from megatron_txssm.terminal import beside_the_log

    hidden = args.rank > 0 or not terminal.isatty()
    with Progress(**beside_the_log(terminal), transient=True, disable=hidden) as progress:
        update = partial(progress.update, progress.add_task("evaluating"))
        validation = _Validation(recipe, args, update, by_position)
        listen(validation)
        run_validation(recipe, args, validation.forward_step)
    if args.rank == 0:
        report(recipe, args.iteration, validation.results, terminal)
    torch.distributed.destroy_process_group()


def run_validation(recipe: Recipe, args: Any, forward_step: Callable[..., Any]) -> None:
    """Megatron's loop without training: load the checkpoint, and run `forward_step` on the validation data.

    Megatron has been started with `args`; its listeners are removed by the caller (hooks.listening).
    """
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_txssm.checkpoint.former_checkpoint import FormerCheckpoints
    from megatron_txssm.checkpoint.load import FailedLoads
    from megatron_txssm.session.start import model_config
    from megatron_txssm.training.resuming import SoundLoads

    end_at_once_on_sigterm(args)
    listen(SoundLoads(recipe, lambda text: print(text, flush=True) if args.rank == 0 else None))
    listen(FailedLoads())
    listen(FormerCheckpoints())
    config = pretrain_cfg_container_from_args(args, model_config(args))
    datasets_provider = partial(_validation_sets, args=args)
    # Tells Megatron that every rank may call it.
    setattr(datasets_provider, "is_distributed", True)
    try:
        pretrain(config, datasets_provider, ModelType.encoder_or_decoder, forward_step)
    except SystemExit as stop:
        # Megatron's bare sys.exit() follows an error message.
        raise RuntimeError(f"Megatron ended with exit code {stop.code}; see the log of this rank") from None


def evaluation_arguments(recipe: Recipe, step: int | None) -> list[str]:
    """Megatron arguments placed after the recipe's own, which they override."""
    words = load_options(Path(recipe.checkpoint.load_from or ""), step)
    words += whole_validation_arguments(recipe, int(os.environ["WORLD_SIZE"]))
    for flag, blend in (("--valid-data-path", recipe.data.validation), ("--data-path", recipe.data.blend)):
        # Without weights, so that all data are read.
        words += [flag, *(prefix for _, prefix in blend)] if blend else []
    return words


class _Validation(Listener):
    """The forward step of Megatron's loop, which sums each set's loss in fp64 on every rank."""

    def __init__(self, recipe: Recipe, args: Any, progress: Callable[..., None], parts: int | None):
        self.args, self.progress, self.parts = args, progress, parts
        prefixes = [prefix for _, prefix in recipe.data.validation or ()]
        # The subsets of a corpus, otherwise token files.
        self.names = args.validation_set_names or prefixes or ["validation"]
        self.results: dict[str, SetLoss] = {}
        self.batches = 0
        # For the current set, on this rank: [loss, tokens], and the same of each part of the samples, [2, parts].
        self.sums: Any = 0.0
        self.sums_of_parts: Any = None

    def before_validation_set(self, call: Call) -> None:
        self.sums, self.sums_of_parts, self.batches = 0.0, None, 0

    def after_validation_set(self, call: Call, result: object) -> None:
        self.results[self.names[len(self.results)]] = self._over_all_ranks()

    def forward_step(self, data_iterator: Any, model: Any) -> Any:
        """Megatron's forward step, with the losses also summed here: Megatron's own sum is fp32."""
        from rich.markup import escape

        from megatron_txssm.training.forward_step import forward_step

        output, loss_function = forward_step(data_iterator, model)
        self.batches += 1
        number = len(self.results)
        name = escape(self.names[number])
        self.progress(completed=self.batches, total=self.args.eval_iters[number], description=name)
        return output, partial(self._add, loss_function)

    def _add(self, loss_function: Callable[..., Any], losses_BL: Any) -> Any:
        """Called only on the last pipeline stage."""
        import torch

        loss, num_tokens, reported = loss_function(losses_BL)
        self.sums = self.sums + torch.stack([loss.double(), num_tokens.double()])
        if self.parts is not None:
            # The argument that forward_step bound is the mask.
            found = by_parts(losses_BL, loss_function.args[0], self.parts)
            self.sums_of_parts = found if self.sums_of_parts is None else self.sums_of_parts + found
        return loss, num_tokens, reported

    def _over_all_ranks(self) -> SetLoss:
        import torch
        from megatron.core import parallel_state

        box: list[Any] = [None]
        if parallel_state.is_pipeline_last_stage():
            group = parallel_state.get_data_parallel_group(with_context_parallel=True)
            torch.distributed.all_reduce(self.sums, group=group)
            loss, tokens = self.sums.tolist()
            box = [SetLoss(loss / tokens, int(tokens))]
            if self.sums_of_parts is not None:
                torch.distributed.all_reduce(self.sums_of_parts, group=group)
                losses, counts = self.sums_of_parts
                box = [box[0]._replace(by_position=tuple((losses / counts).tolist()))]
        torch.distributed.broadcast_object_list(box, src=torch.distributed.get_world_size() - 1)
        return box[0]


def by_parts(losses_BL: Any, mask_BL: Any, parts: int) -> Any:
    """[2, parts] fp64: the sum of the losses that count, and their number, in equal parts of the samples."""
    import torch

    masked = torch.stack([losses_BL.double() * mask_BL, mask_BL.double()])
    return masked.unflatten(2, (parts, -1)).sum((1, 3))


def _validation_sets(num_samples: list[Any], vp_stage: int | None = None, *, args: Any) -> list[Any]:
    """The run's datasets, only those for validation."""
    from megatron_txssm.training.forward_step import datasets_provider

    # Otherwise the training shards' indices would be built needlessly.
    args.train_data_path = args.blend_stages = None
    _, validation, _ = datasets_provider(num_samples, vp_stage)
    return [None, validation, None]


def report(recipe: Recipe, step: int, results: dict[str, SetLoss], terminal: TextIO) -> None:
    """Write RUN/evaluation/validation.json, append it to history.jsonl beside it, and print it as a table."""
    from megatron_txssm.files import append_json, write_json

    sets = {
        name: {"loss": found.loss, "perplexity": perplexity(found.loss), "tokens": found.tokens}
        | ({"by_position": list(found.by_position)} if found.by_position else {})
        for name, found in results.items()
    }
    file = recipe.run_path / "validation.json"
    found = {"name": recipe.name, "step": step, "checkpoint": recipe.checkpoint.load_from, "sets": sets}
    write_json(file, found)
    append_json(recipe.run_path / "history.jsonl", found | {"time": round(time.time(), 3)})

    rows = [
        (name, f"{loss:.4f}", f"{perplexity(loss):,.2f}", f"{tokens:,}") for name, (loss, tokens, _) in results.items()
    ]
    print_table(("validation set", ">nats/token", ">perplexity", ">tokens"), rows, terminal)
    print(f"step {step}; {file}", file=terminal)
