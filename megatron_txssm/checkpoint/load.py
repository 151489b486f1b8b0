"""Loads a trained model into one process, from a checkpoint saved at any layout."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_txssm.checkpoint.former_checkpoint import FormerCheckpoints
from megatron_txssm.checkpoint.steps import tracked
from megatron_txssm.data.tokenizer.kept_tokenizer import tokenizer_source
from megatron_txssm.recipe.changes import (
    ONE_MODEL_PARALLEL_RANK,
    WITHOUT_FP8,
    WITHOUT_REPORTS,
    WITHOUT_TOKENIZER,
    WITHOUT_TOKENS,
    Changes,
    changed,
    without_prediction,
)
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.validation.data_checks import check_tokenizer_file
from megatron_txssm.recipe.validation.validate import validate
from megatron_txssm.session.hooks import Call, Listener, listening
from megatron_txssm.session.start import end_at_once_on_sigterm, start_megatron

# FP8 is only a way to train: the weights are those of a bf16 model. Megatron's own modules need no GPU.
_ONE_PROCESS: Changes = {
    **ONE_MODEL_PARALLEL_RANK,
    **WITHOUT_FP8,
    **WITHOUT_REPORTS,
    # Mock data cannot be validated on as a whole.
    "logging.eval_iters": 0,
    "training.transformer_impl": "local",
    "model.ssd_backend": "auto",
}
# A model that is given its weights needs no tokens, tokenizer or checkpoints.
WEIGHTS_ONLY: Changes = {
    **WITHOUT_TOKENS,
    **WITHOUT_TOKENIZER,
    "megatron.mock_data": True,
    "checkpoint.directory": None,
    "checkpoint.load_from": None,
    "checkpoint.branch_from": None,
}


@dataclass(frozen=True)
class LoadedModel:
    """A HybridModel in evaluation mode, its tokenizer (Megatron's), its recipe and the step at which it was saved."""

    model: Any
    tokenizer: Any
    recipe: Recipe
    iteration: int


def checkpoint_recipe(
    checkpoint: Path, changes: Changes, file: Path | None = None, overrides: Sequence[str] = ()
) -> Recipe:
    """The recipe in `file`, or in a checkpoint directory, with the user's `overrides` and changes, for one process.

    It needs no data, and uses the tokenizer beside the checkpoints.
    """
    file = file or checkpoint / "recipe.yaml"
    recipe = changed(load_recipe(file, overrides), changes)
    source = tokenizer_source(recipe, checkpoint)
    tokenizer: Changes = dict(WITHOUT_TOKENIZER)
    if source is not None:
        tokenizer = {"data.tokenizer_type": source.type, "data.tokenizer_model": source.model}
    recipe = one_process_recipe(changed(recipe, {**WITHOUT_TOKENS, **tokenizer, "megatron.mock_data": True}), file)
    check_tokenizer_file(recipe)
    return recipe


def one_process_recipe(recipe: Recipe, source: Path | None = None) -> Recipe:
    """A recipe for one process without a GPU that does not train, so without prediction depths.

    Its `megatron:` section keeps only entries that replace data. The others concern training, a cluster or a GPU, or
    name files and code, which must not be used from someone else's checkpoint. They do not change the model's function.
    `source` is the recipe's file, for error messages.
    """
    without = {f"megatron.{key}": None for key in recipe.megatron if key != "mock_data"}
    recipe = without_prediction(changed(recipe, {**_ONE_PROCESS, **without}))
    validate(recipe, source=source)
    return recipe


def load_model(
    checkpoint: Path,
    changes: Changes | None = None,
    *,
    step: int | None = None,
    recipe_file: Path | None = None,
) -> LoadedModel:
    """Load a checkpoint (the newest, or that of a `step`) into this process.

    Megatron must not be initialised yet. `changes` are applied to the recipe, which is in `recipe_file` or beside the
    checkpoints. `saved_model.open_checkpoint` reports the faults of a checkpoint.
    """
    _be_the_only_rank()
    return load_weights(checkpoint_recipe(checkpoint, changes or {}, recipe_file), checkpoint, step)


def load_weights(recipe: Recipe, checkpoint: Path, step: int | None) -> LoadedModel:
    """Load a checkpoint into the model of a recipe, on the rank that the environment gives."""
    model = build_rank(recipe, load_options(checkpoint, step))
    from megatron.training import get_tokenizer, training

    with listening(FailedLoads(), FormerCheckpoints()):
        iteration, _ = training.load_checkpoint([model], None, None)
    return LoadedModel(model.eval(), get_tokenizer(), recipe, int(iteration))


def load_options(checkpoint: Path, step: int | None) -> list[str]:
    """Megatron's arguments that load only the weights of a step (None: the newest)."""
    options = ["--no-load-optim", "--no-load-rng", f"--load={checkpoint}"]
    options += plain_texts()
    # A `release` is step 0, which Megatron finds by itself.
    return [*options, f"--ckpt-step={step}"] if step else options


def plain_texts() -> list[str]:
    """Megatron's arguments for a tokenizer that adds no special tokens to a text, as texts of a corpus have none."""
    return ["--tokenizer-hf-no-include-special-tokens"]


def build_model(recipe: Recipe, options: list[str], *, initialize: bool = False) -> Any:
    """Initialise Megatron in this process, the only one, and build a recipe's HybridModel.

    options: Megatron arguments after the recipe's own. initialize: give the weights values, as a new training does.
    """
    _be_the_only_rank()
    return build_rank(recipe, options, initialize=initialize)


def _be_the_only_rank() -> None:
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="0")


def build_rank(recipe: Recipe, options: list[str], *, initialize: bool = False) -> Any:
    """The same on the rank that the environment gives."""
    args = start_megatron(recipe, after=options if initialize else [*options, "--no-initialization"])
    end_at_once_on_sigterm(args)
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import training
    from megatron.training.argument_utils import hybrid_config_from_args

    training.initialize_megatron()
    config = hybrid_config_from_args(args)
    [model] = config.get_builder_cls()(config).build_distributed_models(
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(), wrap_with_ddp=False
    )
    return model


@dataclass(frozen=True)
class FailedLoads(Listener):
    """Makes a failing load_checkpoint in the training loop raise one sentence that names the checkpoint."""

    def around_load(self, call: Call, proceed: Callable[[], Any]) -> Any:
        from torch.distributed.checkpoint import CheckpointException

        from megatron_txssm.compat import get_args

        try:
            return proceed()
        # torch's CheckpointException is not an Exception.
        except (Exception, CheckpointException) as error:
            args = get_args()
            # A fresh run starts from another's checkpoint (checkpoint.load_from).
            folder = args.load if args.load and tracked(Path(args.load)) else args.pretrained_checkpoint or args.load
            raise RuntimeError(
                f"the newest checkpoint in {folder} cannot be loaded ({first_cause(error)}); {_advice(folder, error)}"
            ) from error


def _advice(folder: str, error: BaseException) -> str:
    """The remedy; an older step is suggested only if the newest is damaged."""
    from megatron_txssm.checkpoint.saved_model import damage_of_newest

    if damage := damage_of_newest(Path(folder)):
        return f"{damage}; to go back, write an older step into {folder}/latest_checkpointed_iteration.txt"
    # Megatron looks parameter groups up by their learning rates, in a tuple with others.
    unknown_group = isinstance(error, KeyError) and any(isinstance(key, tuple) for key in error.args)
    if unknown_group or "OptimizerParamScheduler" in str(error):
        return (
            "it was trained under another schedule: set optimizer.schedule_at_resume=recipe to continue under this "
            "recipe's, or state the checkpoint's"
        )
    return "its files are all there and of full length, so look first at what changed since it was saved"


def first_cause(error: BaseException) -> str:
    """The first line of the error, from the first rank that failed."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
