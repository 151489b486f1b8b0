"""A trained model in one process, from a checkpoint saved at any layout."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_txssm.data.tokenizer.kept_tokenizer import tokenizer_source
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.validate import check_tokenizer_file
from megatron_txssm.session.hooks import Call, Listener, listening
from megatron_txssm.session.start import start_megatron

# Megatron's own modules, as they need no GPU.
_ONE_PROCESS = (
    "training.transformer_impl=local",
    "model.ssd_backend=auto",
    # A way to train; the weights are those of a bf16 model.
    "training.fp8=null",
    "training.fp8_recipe=delayed",
    "training.fp8_attention=false",
    "training.first_last_layers_bf16=0",
    "parallel.tensor_model_parallel_size=1",
    "parallel.pipeline_model_parallel_size=1",
    "parallel.virtual_pipeline_stages=null",
    "parallel.context_parallel_size=1",
    "parallel.sequence_parallel=false",
    "logging.tensorboard=false",
    "logging.wandb_project=null",
)


@dataclass(frozen=True)
class LoadedModel:
    """A GPTModel in evaluation mode, its tokenizer (Megatron's), the recipe and the step it was saved at."""

    model: Any
    tokenizer: Any
    recipe: Recipe
    iteration: int


def checkpoint_recipe(checkpoint: Path, overrides: tuple[str, ...] = (), file: Path | None = None) -> Recipe:
    """The recipe in `file`, or that a checkpoint directory holds, for one process.

    It needs no data, and takes the tokenizer that lies beside the checkpoints.
    """
    file = file or checkpoint / "recipe.yaml"
    recipe = one_process_recipe(file, (*overrides, *_without_data(load_recipe(file, overrides), checkpoint)))
    check_tokenizer_file(recipe)
    return recipe


def one_process_recipe(name: str | Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """A recipe, changed by `overrides`, for one process that has no GPU and does not train.

    Of its `megatron:` section remains only what stands for data: the rest is of training, of a cluster or a GPU, or
    names files and code, which nobody else's checkpoint shall do here. Nothing in it changes a model's function.
    """
    without = (f"megatron.{key}=null" for key in load_recipe(name, overrides).megatron if key != "mock_data")
    return load_recipe(name, (*overrides, *_ONE_PROCESS, *without))


def _without_data(recipe: Recipe, checkpoint: Path) -> tuple[str, ...]:
    """Overrides that keep the tokenizer, but need none of the tokens."""
    source = tokenizer_source(recipe, checkpoint)
    return (
        *(f"data.{name}=null" for name in ("corpus", "weights", "stages", "train", "validation", "blend", "split")),
        f"data.tokenizer_type={source.type if source else 'NullTokenizer'}",
        f"data.tokenizer_model={json.dumps(source.model if source else None)}",
        "megatron.mock_data=true",
    )


def load_model(
    checkpoint: Path, overrides: tuple[str, ...] = (), *, step: int | None = None, recipe_file: Path | None = None
) -> LoadedModel:
    """Load a checkpoint (the newest, or that of a `step`) into this process, which must not have initialised Megatron
    yet. `overrides` change the recipe, as --set does; it is in `recipe_file`, or beside the checkpoints.
    `saved_model.open_checkpoint` says what is wrong with one.
    """
    recipe = checkpoint_recipe(checkpoint, overrides, recipe_file)
    model = build_model(recipe, load_options(checkpoint, step))
    from megatron.training import get_tokenizer, training

    with listening(FailedLoads()):
        iteration, _ = training.load_checkpoint([model], None, None)
    return LoadedModel(model.eval(), get_tokenizer(), recipe, int(iteration))


def load_options(checkpoint: Path, step: int | None) -> list[str]:
    """Megatron's arguments for the weights of a step (None: the newest) and nothing else."""
    options = ["--no-load-optim", "--no-load-rng", f"--load={checkpoint}"]
    # In a corpus no text has a token around it that is not in the text; so no prompt has, whatever the tokenizer adds.
    options += ["--tokenizer-hf-no-include-special-tokens"]
    # A `release` is step 0, which Megatron finds by itself.
    return [*options, f"--ckpt-step={step}"] if step else options


def build_model(recipe: Recipe, options: list[str]) -> Any:
    """Initialise Megatron in this process, the only one, and build a recipe's GPTModel, whose weights are not set yet.

    `options` are Megatron's, behind the recipe's own.
    """
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="0")
    args = start_megatron(recipe, after=[*options, "--no-initialization"])
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import training
    from megatron.training.argument_utils import gpt_config_from_args

    training.initialize_megatron()
    config = gpt_config_from_args(args)
    [model] = config.get_builder_cls()(config).build_distributed_models(
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(), wrap_with_ddp=False
    )
    return model


@dataclass(frozen=True)
class FailedLoads(Listener):
    """Lets the training loop's load_checkpoint fail with one sentence that names the checkpoint."""

    def around_load(self, call: Call, proceed: Callable[[], Any]) -> Any:
        from torch.distributed.checkpoint import CheckpointException

        from megatron_txssm.compat import get_args

        try:
            return proceed()
        # torch's CheckpointException is no Exception.
        except (Exception, CheckpointException) as error:
            folder = get_args().load
            raise RuntimeError(
                f"the newest checkpoint in {folder} cannot be loaded ({first_cause(error)}); {_advice(folder, error)}"
            ) from error


def _advice(folder: str, error: BaseException) -> str:
    """What to do about it: nobody shall go back to an older step whose newest one is sound."""
    from megatron_txssm.checkpoint.saved_model import damage_of_newest

    if damage := damage_of_newest(Path(folder)):
        return f"{damage}; to go back, write an older step into {folder}/latest_checkpointed_iteration.txt"
    if "OptimizerParamScheduler" in str(error):
        return (
            "it was trained under another schedule: set megatron.override_opt_param_scheduler=true to go on under this "
            "recipe's, or megatron.use_checkpoint_opt_param_scheduler=true to keep the checkpoint's"
        )
    return "its files are all there and of full length, so look first at what changed since it was saved"


def first_cause(error: BaseException) -> str:
    """The first line of what went wrong, on the first rank that failed."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
