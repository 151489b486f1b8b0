"""Checks before a run starts: its layout, its files, the checkpoints that it would resume from."""

import contextlib
import importlib.util
import math
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from megatron_txssm.architecture.layer_pattern import DEPTH
from megatron_txssm.checkpoint.steps import (
    MERGE,
    TRACKER,
    Step,
    branch_step,
    check_tracker,
    damage,
    find_newest,
    folder_bytes,
    going_back,
    interrupted_removals,
    interrupted_saves,
    lost_step,
    saved_step,
    tracked,
    whole_steps,
)
from megatron_txssm.data.tokenizer.kept_tokenizer import other_tokenizer
from megatron_txssm.errors import UserError
from megatron_txssm.process_limits import check_open_files, check_shared_memory, check_temporary_folder
from megatron_txssm.recipe.changes import without_prediction
from megatron_txssm.recipe.corpus.tokenizer import read_tokenizer_facts
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.recipe import Recipe, with_paths
from megatron_txssm.recipe.sizes import checkpoint_bytes
from megatron_txssm.recipe.validation.data_checks import check_tokenizer_file
from megatron_txssm.recipe.validation.evaluation_checks import check_task_files
from megatron_txssm.recipe.validation.validate import validate
from megatron_txssm.training.launch.schedule import check_schedule, differences, schedule_warnings

# Fields of `model` that affect computation or initialisation, not a checkpoint's content.
_FREE_AT_RESUME = (
    *("chunk_size", "ssd_backend", "init_method_std", "rotary_table_precision"),
    *("moe_aux_loss_coeff", "mtp_loss_scaling_factor"),
)
# Fields that lengthen a trained model's context.
_FREE_AT_FINE_TUNING = (
    "model.rotary_base",
    "model.rope_scaling",
    "model.rotary_interpolation_factor",
    "model.length_scaling_base",
)
# Megatron's data loader: processes, batches prefetched by each, and bytes per token in a batch: the token, its label,
# its loss weight and its position.
_LOADERS, _BATCHES_AHEAD, _BYTES_A_TOKEN = 2, 2, 8 + 8 + 4 + 8


def check_run(recipe: Recipe, world_size: int) -> None:
    """UserError for the first problem that would stop a run of `world_size` processes; only reads, without torch."""
    validate(recipe, world_size=world_size)
    check_trackers(recipe)
    # One reader per machine: the indices of a large corpus take gigabytes.
    if os.environ.get("LOCAL_RANK", "0") == "0":
        check_files(recipe)
    # One reader per run: it queries the size of every file of the newest checkpoint, thousands on a large layout.
    if os.environ.get("RANK", "0") == "0":
        check_checkpoint(recipe)
        if not is_finished(recipe):
            check_room(recipe)


def check_trackers(recipe: Recipe) -> None:
    """UserError if the package of a tracker is not installed."""
    for name, package in (("wandb_project", "wandb"), ("mlflow_experiment", "mlflow")):
        value = getattr(recipe.logging, name)
        if value is not None and importlib.util.find_spec(package) is None:
            raise UserError(f"logging.{name}={value} needs {package}: pip install {package}, or set it to null")


def check_machine(recipe: Recipe, processes: int) -> None:
    """UserError if this machine lacks the resources for `processes` ranks of the run."""
    check_temporary_folder()
    check_open_files(number_of_shards(recipe))
    stated = recipe.megatron.get("num_workers")
    loaders = _LOADERS if stated is None else stated
    batch = recipe.training.micro_batch_size * recipe.training.seq_length * _BYTES_A_TOKEN
    check_shared_memory(processes * loaders * _BATCHES_AHEAD * batch)


def number_of_shards(recipe: Recipe) -> int:
    """Number of the run's token files, each named by its prefix."""
    if recipe.data.corpus is None:
        return sum(len(blend or ()) for blend in (recipe.data.train, recipe.data.validation, recipe.data.blend))
    from megatron_txssm.data.corpus.blend import recipe_blend

    blend = recipe_blend(recipe)
    return len(blend.shards("train")) + len(blend.shards("validation"))


def check_checkpoint(recipe: Recipe) -> None:
    """UserError if the run would resume another model or schedule, or if load_from holds no checkpoint."""
    source = recipe.checkpoint.load_from
    if source is not None:
        check_source(Path(source))
    if source is not None and (made_by := Path(source) / "recipe.yaml").is_file():
        # Megatron drops weights that a smaller model has no place for, and cannot tell position encodings with the same
        # weights apart.
        saved = load_recipe(made_by)
        # A model may leave prediction depths behind, but not find some where there are none.
        saved = saved if recipe.prediction_depths else without_prediction(saved)
        theirs, ours = (_architecture(each, _FREE_AT_FINE_TUNING) for each in (saved, recipe))
        if found := differences(theirs, ours):
            raise UserError(f"checkpoint.load_from={source} holds another model ({found}); use that model's recipe")
    step = continued_step(recipe)
    if step is None:
        return
    folder = step.folder.parent
    if (step.folder / MERGE).is_file():
        raise UserError(
            f"{step.folder} is a merge, without the optimizer state that a run resumes from; to train on from its "
            f"weights, set checkpoint.load_from={folder} and another run_directory"
        )
    if (saved := recipe_of(step)) is None:
        return
    branches = step.folder == Path(recipe.checkpoint.branch_from or "")
    if found := differences(_architecture(saved), _architecture(recipe)):
        remedy = "use another run_directory or checkpoint.directory, or remove it"
        # A branch's source is another run's, and must not be removed.
        remedy = "state that run's values, or branch from a run of this model" if branches else remedy
        raise UserError(f"{folder} holds checkpoints of another model ({found}); {remedy}")
    if other := other_tokenizer(recipe, folder):
        raise UserError(
            f"{folder} holds checkpoints of a model with another tokenizer ({other}); "
            f"use a corpus with that tokenizer, or {'branch from another run' if branches else 'another run_directory'}"
        )
    theirs, ours = saved.optimizer.name, recipe.optimizer.name
    if theirs != ours and not recipe.megatron.get("no_load_optim"):
        raise UserError(
            f"{folder} holds the state of optimizer.name={theirs}, not of {ours}; set optimizer.name={theirs}, or "
            f"start in another run_directory from its weights: checkpoint.load_from={folder}"
        )
    check_schedule(recipe, saved, step)


def continued_step(recipe: Recipe) -> Step | None:
    """The checkpoint that the run continues, its own or another run's; None if it begins at step 0.

    UserError if there are some, but none is whole.
    """
    own = None if recipe.checkpoint.save_interval is None else find_newest(recipe.checkpoint_path).step
    branch = recipe.checkpoint.branch_from
    return branch_step(Path(branch)) if own is None and branch is not None else own


def recipe_of(step: Step) -> Recipe | None:
    """The recipe by which a checkpoint was trained; None if it is not known."""
    file = step.folder.parent / "recipe.yaml"
    return load_recipe(file) if file.is_file() else None


def check_source(source: Path) -> None:
    """UserError unless the newest checkpoint in checkpoint.load_from is whole; choosing another is left to the user."""
    step = tracked(source)
    if step is None:
        check_tracker(source)
        raise UserError(f"checkpoint.load_from={source} holds no checkpoint; name a run's checkpoints folder")
    if why := damage(step.folder):
        others = [str(older.number) for older in reversed(whole_steps(source)) if older != step]
        other = f"or write another step into {source / TRACKER} ({', '.join(others)})" if others else "it has no other"
        raise UserError(f"checkpoint.load_from={source}: {lost_step(step, why)}; put it back, {other}")


def warnings(recipe: Recipe) -> Iterator[str]:
    """Things that a run may do, but that its user probably does not want."""
    if recipe.checkpoint.save_interval is not None:
        with contextlib.suppress(UserError):
            if lost := going_back(find_newest(recipe.checkpoint_path), saved_step(recipe.checkpoint_path)):
                yield lost
    with contextlib.suppress(UserError):
        if (step := continued_step(recipe)) is not None and (saved := recipe_of(step)) is not None:
            yield from schedule_warnings(recipe, saved, step)
            if again := reordered_subsets(saved, recipe):
                yield (
                    f"with this length, {', '.join(again)} is read another number of times, and therefore in another "
                    "order: some samples appear again, some never"
                )
    if changes := changed_data(recipe):
        yield f"this run continues on different data than its checkpoint was trained on ({changes})"
    source = recipe.checkpoint.load_from
    if source is not None and (other := other_tokenizer(recipe, Path(source))):
        yield f"checkpoint.load_from={source} is of a model with another tokenizer ({other})"
    corpus = Path(recipe.data.corpus or "")
    if (corpus / "tokenizer" / "facts.json").is_file():
        facts = read_tokenizer_facts(corpus)
        never = recipe.padded_vocab_size - facts.vocab_size
        if never > max(facts.vocab_size // 10, recipe.data.make_vocab_size_divisible_by):
            weights = never * recipe.model.hidden_size * (1 if recipe.model.tie_embeddings else 2)
            yield (
                f"data.vocab_size={recipe.data.vocab_size}, but the tokenizer of {corpus} has "
                f"{facts.vocab_size} tokens: {weights / 1e6:.1f}M weights belong to tokens that never occur; "
                "set data.vocab_size=null to have as many as the tokenizer"
            )


def is_finished(recipe: Recipe) -> bool:
    """Whether the newest checkpoint is whole and of the last step; resuming it would fail for lack of samples."""
    if recipe.checkpoint.save_interval is None or recipe.megatron.get("skip_train"):
        return False
    step = saved_step(recipe.checkpoint_path)
    if step is None or step < recipe.train_iters:
        return False
    with contextlib.suppress(UserError):
        newest = find_newest(recipe.checkpoint_path).step
        return newest is not None and newest.number >= recipe.train_iters
    return False


def check_room(recipe: Recipe) -> None:
    """UserError if the run saves checkpoints and the disk lacks space for one."""
    if recipe.checkpoint.save_interval is None:
        return
    needed, folder = checkpoint_bytes(recipe), recipe.checkpoint_path.absolute()
    there = next(parent for parent in (folder, *folder.parents) if os.path.exists(parent))
    disk = shutil.disk_usage(there)
    # The remains of interrupted saves and removals are removed when the run starts.
    reclaimed = sum(map(folder_bytes, [*interrupted_saves(folder), *interrupted_removals(folder)]))
    # disk.total is 0 on file systems without a disk, such as /proc.
    if disk.total and disk.free + reclaimed < needed:
        raise UserError(
            f"{there} has {disk.free / 1e9:.2f} GB left, and a checkpoint of {recipe.name} takes {needed / 1e9:.2f} "
            "GB; make room, or state another run_directory or checkpoint.directory"
        )


def changed_data(recipe: Recipe) -> str:
    """How the training data differ from the data of the checkpoint that the run resumes from; empty if they do not.

    A sample's position in the data follows from its number: with other data, documents may repeat or never come.
    """
    step = None
    with contextlib.suppress(UserError):
        step = continued_step(recipe)
    if step is None or step.number == 0 or (saved := recipe_of(step)) is None:
        return ""
    theirs, ours = (with_paths(each, os.path.abspath) for each in (saved, recipe))
    return differences(_training_data(theirs), _training_data(ours))


def reordered_subsets(saved: Recipe, recipe: Recipe) -> list[str]:
    """Subsets that the two recipes read in another order: Megatron shuffles by the number of epochs."""
    from megatron_txssm.data.corpus.blend import recipe_blend

    if saved.data.corpus is None or recipe.data.corpus is None:
        return []
    blends = map(recipe_blend, (saved, recipe))
    before, now = ({each.subset: math.ceil(each.epochs) for each in blend.shares(blend.average)} for blend in blends)
    return [name for name in now if before.get(name, now[name]) != now[name]]


def _training_data(recipe: Recipe) -> Mapping[str, object]:
    fields = {f"data.{name}": getattr(recipe.data, name) for name in ("corpus", "weights", "stages", "train", "blend")}
    return fields | {"training.seed": recipe.training.seed, "training.seq_length": recipe.training.seq_length}


def _architecture(recipe: Recipe, but: Collection[str] = ()) -> Mapping[str, object]:
    fields = {f"model.{name}": value for name, value in vars(recipe.model).items() if name not in _FREE_AT_RESUME}
    # Without the marks of pipeline stages, which any checkpoint may change.
    fields["model.layer_pattern"] = DEPTH.join([recipe.layers, *recipe.prediction_depths])
    fields["the embedding's rows (data.vocab_size, padded)"] = recipe.padded_vocab_size
    return {name: value for name, value in fields.items() if name not in but}


def make_run_directory(recipe: Recipe) -> None:
    """Create the folders that the run writes to; UserError if that fails."""
    folders = {"run_directory": recipe.run_path}
    if recipe.checkpoint.save_interval is not None:
        folders["checkpoint.directory"] = recipe.checkpoint_path
    for name, folder in folders.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise UserError(f"{name}={folder} cannot be written: {error.strerror}; state another {name}") from None


def check_files(recipe: Recipe) -> None:
    """UserError unless the files that the training reads exist and are whole: tokens, tokenizer, scored tasks."""
    from megatron_txssm.data.corpus.blend import check_corpus
    from megatron_txssm.data.corpus.shard import check_shard

    if recipe.data.corpus is not None:
        check_corpus(recipe)
    for blend in (recipe.data.train, recipe.data.validation, recipe.data.blend):
        for _, prefix in blend or ():
            check_shard(prefix)
    check_tokenizer_file(recipe)
    if recipe.evaluation.interval is not None:
        check_task_files(recipe)
