"""txssm eval harness: lm_eval's tasks on a Megatron checkpoint or a Hugging Face folder."""

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from megatron_txssm.checkpoint.load import checkpoint_recipe
from megatron_txssm.checkpoint.saved_model import find_checkpoints, open_checkpoint, step_folder
from megatron_txssm.convert.huggingface.folder import is_hf_folder
from megatron_txssm.data.tokenizer.kept_tokenizer import tokenizer_source
from megatron_txssm.errors import UserError
from megatron_txssm.evaluation.harness.local_data import data_from, fetched_commits
from megatron_txssm.evaluation.harness.responses import Responses
from megatron_txssm.evaluation.harness.settings import HarnessSettings, ModelIdentity, checkpoint_sha256, hf_sha256
from megatron_txssm.evaluation.harness.tasks import FEWSHOT_SEED, load_tasks, ruler_metadata
from megatron_txssm.files import alone_in
from megatron_txssm.recipe.changes import changed
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.settings.paths import is_task_file
from megatron_txssm.recipe.sizes import smallest_world_size
from megatron_txssm.slurm.environment import adopt_slurm_step, is_worker
from megatron_txssm.terminal import beside_the_log, doing
from megatron_txssm.training.processes import launch, worker_command

if TYPE_CHECKING:
    from megatron_txssm.evaluation.harness.language_model import Bar
    from megatron_txssm.evaluation.harness.ranks import OneProcess, Replicas
    from megatron_txssm.evaluation.harness.tasks import LoadedTasks

# Resamplings for the standard error of a perplexity.
_BOOTSTRAP = 1000
# Between two lines of progress where the output is no terminal.
_SECONDS = 60


class Evaluation(NamedTuple):
    """A model, what it is asked, and the folder for its results."""

    model: ModelIdentity
    settings: HarnessSettings
    # With data sets; None: lm_eval loads them as ever.
    data: Path | None
    folder: Path


def evaluate_tasks(
    model: Path,
    settings: HarnessSettings,
    *,
    data: Path | None = None,
    output: Path | None = None,
    step: int | None = None,
    overrides: Sequence[str] = (),
    nproc: int | None = None,
    port: int | None = None,
) -> int:
    """Evaluate tasks and print their scores; returns the exit code.

    model: a run, its checkpoints, or a Hugging Face folder. data: a folder that `local_data.fetch` filled. output: the
    place for folders of evaluations (None: evaluation/harness in the run or the Hugging Face folder). The rest is for
    checkpoints, as in `evaluate`. An evaluation that was interrupted goes on where it was.
    """
    check_files(settings, data)
    if is_hf_folder(model):
        if step is not None or overrides or nproc is not None or port is not None:
            raise UserError(f"{model} is a Hugging Face model; --step, --set, --nproc and --port are for checkpoints")
        return _by_transformers(model, settings, data, output or harness_folder(model))
    adopt_slurm_step()
    checkpoints = find_checkpoints(model)
    step, saved = step_folder(checkpoints, step)
    recipe = harness_recipe(checkpoints, overrides)
    nproc = smallest_world_size(recipe) if nproc is None else nproc
    processes = int(os.environ["WORLD_SIZE"]) if is_worker() else nproc
    described = f"step {step} of {checkpoints}"
    identity = ModelIdentity(described, "megatron", step, checkpoint_sha256(saved), recipe.training.precision)
    output = (output or harness_folder(model)).absolute()
    evaluation = Evaluation(identity, settings, data, output / identity.folder_name(settings, processes))
    recipe = placed(recipe, evaluation.folder, checkpoints, processes)
    if is_worker():
        from megatron_txssm.training.pretrain import run_worker

        return run_worker(recipe, partial(evaluate_as_worker, evaluation=evaluation))
    # Verified once, and kept from being removed meanwhile.
    opened = open_checkpoint(checkpoints, step)
    words = option_words(settings, data, output, step)
    command = worker_command("eval", "harness", str(checkpoints), *words, overrides=overrides)
    code = launch(recipe, processes, command, port=port, resumes=f"{evaluation.folder} holds the responses so far")
    del opened
    return code


def check_files(settings: HarnessSettings, data: Path | None) -> None:
    """UserError if a file of tasks, or the folder of data sets, is missing, or the folder's record is damaged."""
    for name in settings.tasks:
        if is_task_file(name) and not os.path.isfile(name):
            raise UserError(f"--tasks {name}: no such file")
    if data is not None and not data.is_dir():
        raise UserError(f"--data {data}: no such folder; `txssm eval fetch {data} --tasks …` fills one")
    fetched_commits(data)


def harness_recipe(checkpoints: Path, overrides: Sequence[str]) -> Recipe:
    """The recipe of a checkpoint, for as many tensor-parallel ranks as it states, or the user does."""
    made_by = checkpoints / "recipe.yaml"
    recipe = checkpoint_recipe(checkpoints, {}, overrides=overrides)
    # Megatron's experts would need sequence parallelism, which our texts of any length do not allow.
    size = 1 if recipe.model.num_experts else load_recipe(made_by, overrides).parallel.tensor_model_parallel_size
    return changed(recipe, {"parallel.tensor_model_parallel_size": size})


def placed(recipe: Recipe, folder: Path, checkpoints: Path, processes: int) -> Recipe:
    """The recipe with its outputs in `folder`, and a batch that any number of replicas can share."""
    replicas = max(1, processes // recipe.parallel.tensor_model_parallel_size)
    return changed(
        recipe,
        {
            "run_directory": str(folder),
            "checkpoint.directory": None,
            "checkpoint.save_interval": None,
            "checkpoint.load_from": str(checkpoints),
            "checkpoint.branch_from": None,
            "training.micro_batch_size": 1,
            "training.global_batch_tokens": replicas * recipe.training.seq_length,
            # While rank 0 prepares a task's requests, the others wait in a collective.
            "megatron.distributed_timeout_minutes": 600,
        },
    )


def harness_folder(model: Path) -> Path:
    """Where results go unless the user names a folder: in the run, or in the Hugging Face folder."""
    is_run = is_hf_folder(model) or find_checkpoints(model) != model
    return (model if is_run else model.absolute().parent) / "evaluation" / "harness"


def option_words(settings: HarnessSettings, data: Path | None, output: Path, step: int | None) -> list[str]:
    """The options of an evaluation for another process."""
    words = ["--output", str(output), "--batch-size", str(settings.batch_size)]
    named = {"--step": step, "--num-fewshot": settings.num_fewshot, "--limit": settings.limit, "--data": data}
    words += [word for option, value in named.items() if value is not None for word in (option, str(value))]
    return [*words, "--tasks", *settings.tasks]


def evaluate_as_worker(recipe: Recipe, terminal: TextIO, *, evaluation: Evaluation) -> None:
    """As one Megatron worker: rank 0 evaluates, and the others compute with it."""
    checkpoints = Path(recipe.checkpoint.load_from or "")
    leads = os.environ["RANK"] == "0"
    with tempfile.TemporaryDirectory(prefix="txssm-tokenizer-") as folder:
        # The tasks first: their data may be missing.
        tokenizer = partial(exported_tokenizer, recipe, checkpoints, Path(folder))
        tasks = _tasks(evaluation, recipe.training.seq_length, tokenizer, terminal) if leads else None
    from megatron_txssm.checkpoint.load import load_weights
    from megatron_txssm.evaluation.harness.models import MegatronModel
    from megatron_txssm.evaluation.harness.ranks import Replicas

    with doing(f"loading {evaluation.model.description}", terminal if leads else None):
        loaded = load_weights(recipe, checkpoints, evaluation.model.step)
    ranks = Replicas(MegatronModel(loaded, checkpoints))
    if tasks is None:
        ranks.follow()
    else:
        run(evaluation, tasks, ranks, terminal)
        ranks.end()
    import torch.distributed

    torch.distributed.destroy_process_group()


def _by_transformers(folder: Path, settings: HarnessSettings, data: Path | None, output: Path) -> int:
    """In this process, whose output goes to a log."""
    from megatron_txssm.evaluation.harness.models import HfModel
    from megatron_txssm.evaluation.harness.ranks import OneProcess
    from megatron_txssm.session.output import run_redirected

    with doing(f"loading {folder}"):
        model = HfModel(folder)
    precision = str(model.model.dtype).removeprefix("torch.")
    identity = ModelIdentity(str(folder), "huggingface", None, hf_sha256(folder), precision)
    evaluation = Evaluation(identity, settings, data, output.absolute() / identity.folder_name(settings, 1))
    log = evaluation.folder / "logs" / "harness.log"

    def work(terminal: TextIO) -> None:
        try:
            run(evaluation, _tasks(evaluation, model.max_length, lambda: folder, terminal), OneProcess(model), terminal)
        except KeyboardInterrupt:
            print(f"\nstopped; {evaluation.folder} holds the responses so far: the same command goes on", file=terminal)
            raise

    with alone_in(log.parent, "--output"):
        return run_redirected(log, work)


def _tasks(evaluation: Evaluation, max_length: int, tokenizer: Callable[[], Path], terminal: TextIO) -> "LoadedTasks":
    with doing("loading tasks", terminal):
        return load_for(evaluation.settings, evaluation.data, max_length, tokenizer)


def load_for(
    settings: HarnessSettings, data: Path | None, max_length: int, tokenizer: Callable[[], Path]
) -> "LoadedTasks":
    """Load an evaluation's tasks; `tokenizer` makes the folder of a tokenizer, with which RULER measures its texts."""
    with data_from(data):
        metadata = ruler_metadata(settings.tasks, max_length, tokenizer)
        return load_tasks(settings.tasks, settings.num_fewshot, metadata)


def exported_tokenizer(recipe: Recipe, checkpoints: Path, folder: Path) -> Path:
    from megatron_txssm.data.tokenizer.huggingface import export_tokenizer

    source = tokenizer_source(recipe, checkpoints)
    if source is None:
        raise UserError(f"{checkpoints} has no tokenizer, with which RULER's tasks measure their texts")
    export_tokenizer(source, folder, "a text")
    return folder


def run(evaluation: Evaluation, tasks: "LoadedTasks", ranks: "OneProcess | Replicas", terminal: TextIO) -> None:
    """Evaluate tasks with a model; keeps and prints the results."""
    from megatron_txssm.evaluation.harness.results import keep, print_results

    if known := len(Responses(evaluation.folder / "responses.jsonl")):
        print(f"going on with {known:,} responses in {evaluation.folder / 'responses.jsonl'}", file=terminal)
    results = responses_to(evaluation, tasks, ranks, partial(_bar, terminal))
    keep(results, evaluation.folder)
    print_results(results, terminal)
    print(f"{results['model']['description']}; {evaluation.folder / 'results.json'}", file=terminal)


def responses_to(
    evaluation: Evaluation, tasks: "LoadedTasks", ranks: "OneProcess | Replicas", bar: "Bar"
) -> dict[str, Any]:
    """Ask a model the questions of tasks; returns the content of results.json."""
    # Otherwise lm_eval would start processes, which inherit Megatron's.
    os.environ["DISABLE_MULTIPROC"] = "1"
    import lm_eval.evaluator

    from megatron_txssm.evaluation.harness.language_model import HarnessModel
    from megatron_txssm.evaluation.harness.results import described_results

    model, settings, data, folder = evaluation
    for task in tasks.tasks["tasks"].values():
        # The same examples each time.
        task.set_fewshot_seed(FEWSHOT_SEED)
    asked = HarnessModel(ranks, Responses(folder / "responses.jsonl"), settings.batch_size, bar)
    try:
        found: Any = lm_eval.evaluator.evaluate(
            lm=asked, task_dict=tasks.tasks, limit=settings.limit, bootstrap_iters=_BOOTSTRAP, log_samples=True
        )
    except ValueError as error:
        # Of random.sample.
        if "larger than population" not in str(error):
            raise
        raise UserError(
            f"--num-fewshot {settings.num_fewshot} is more examples than a task has; state fewer"
        ) from error
    return described_results(found, tasks.asked, model, settings, asked, fetched_commits(data))


@contextmanager
def _bar(terminal: TextIO, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Progress on a terminal; elsewhere a line every minute."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = not terminal.isatty()
    with Progress(*columns, **beside_the_log(terminal), transient=True, disable=hidden) as progress:
        task, done, said = progress.add_task(what, total=total), 0, time.monotonic()

        def advance(count: int) -> None:
            nonlocal done, said
            done += count
            progress.advance(task, count)
            if hidden and time.monotonic() - said > _SECONDS:
                said = time.monotonic()
                print(f"{what}: {done:,} of {total:,}", file=terminal, flush=True)

        yield advance
