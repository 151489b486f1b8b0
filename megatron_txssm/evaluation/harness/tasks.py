"""Loads lm_eval's tasks by name."""

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_txssm.errors import UserError, nearest
from megatron_txssm.evaluation.harness.suites import BENCHMARKS, RULER, RULER_LENGTHS, SUITES
from megatron_txssm.recipe.settings.paths import is_task_file
from megatron_txssm.terminal import doing

# lm_eval's own seed for the choice of examples.
FEWSHOT_SEED = 1234


class MissingData(Exception):
    """A folder lacks a data set."""

    def __init__(self, folder: Path, dataset: str):
        super().__init__(f"{folder} does not have the data set {dataset}")
        self.folder = folder


def named_tasks(words: Sequence[str]) -> list[str]:
    """The tasks that --tasks names, each once: a suite's name stands for its tasks."""
    names = [name for word in words for name in SUITES.get(word, (word,))]
    if not all(names) or not names:
        raise UserError(f"--tasks names no task; use a suite ({', '.join(SUITES)}), or tasks of lm_eval")
    return list(dict.fromkeys(names))


class LoadedTasks(NamedTuple):
    """lm_eval's TaskDict, and the names of those tasks and groups in it that were asked for."""

    tasks: dict[str, Any]
    asked: list[str]


def load_tasks(
    names: Sequence[str], num_fewshot: int | None = None, metadata: Mapping[str, Any] | None = None
) -> LoadedTasks:
    """Load these tasks, groups, tags or YAML files, with their data.

    num_fewshot: examples in a prompt; None: as the suite's table says, otherwise as the task itself does. metadata:
    what RULER's tasks need. UserError if there is no such task, if a task has a metric that cannot be computed, or if
    two that differ have one name.
    """
    manager = task_manager(names, metadata)
    loaded = LoadedTasks({"tasks": {}, "groups": {}, "group_map": {}}, [])
    for name in names:
        found = _load(manager, name)
        stated = BENCHMARKS[name].num_fewshot if name in BENCHMARKS else None
        for task in found["tasks"].values():
            _set_fewshot(task, stated if num_fewshot is None else num_fewshot)
            _check_metrics(name, task)
        _check_names_differ(name, found["tasks"], loaded.tasks["tasks"])
        for part, members in found.items():
            loaded.tasks[part].update(members)
        # A tag or a file stands for its tasks.
        known = {**found["groups"], **found["tasks"]}
        loaded.asked.extend([name] if name in known else found["groups"] or found["tasks"])
    return loaded


def task_manager(names: Sequence[str], metadata: Mapping[str, Any] | None = None) -> Any:
    """lm_eval's TaskManager that knows the named tasks; UserError if it knows none of that name."""
    import lm_eval.tasks

    own = Path(lm_eval.tasks.__file__).parent
    plain = [name for name in names if not is_task_file(name)]
    for name in names:
        if is_task_file(name) and not os.path.isfile(name):
            raise UserError(f"--tasks {name}: no such file")
    # To read all of its 14,000 tasks takes lm_eval ten seconds.
    known = all(name in BENCHMARKS for name in plain)
    folders = [own / BENCHMARKS[name].folder for name in plain] if known else []
    manager = lm_eval.tasks.TaskManager(
        include_path=list(dict.fromkeys(folders)), include_defaults=not known, metadata=dict(metadata or {})
    )
    for name in plain:
        if name not in manager.task_index:
            hint = nearest(name, manager.task_index) or f"; use a suite ({', '.join(SUITES)}), or a task of lm_eval"
            raise UserError(f"--tasks {name}: lm_eval has no such task{hint}")
    return manager


def check_names(names: Sequence[str]) -> None:
    """UserError if lm_eval has no task of a name; those that no suite of ours has take seconds."""
    if others := [name for name in names if name not in BENCHMARKS and not is_task_file(name)]:
        with doing("looking for the tasks in lm_eval"):
            task_manager(others)


def _load(manager: Any, name: str) -> dict[str, Any]:
    from datasets.exceptions import DatasetGenerationError, DatasetsError

    try:
        return manager.load(name)
    except MissingData as missing:
        raise UserError(
            f"{missing}; on a machine that reaches the hub, use `txssm eval fetch {missing.folder} --tasks {name}`"
        ) from None
    except (DatasetsError, OSError, ImportError) as error:
        _check_cache(error)
        # datasets names the place in a file, and what is wrong there, in the cause.
        what = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        reason = f"{type(what).__name__}: {str(what).strip().partition(chr(10))[0]}"
        # A file may name others, and data of its own.
        mended = "correct the file and what it names, or, if its data are on the hub and " if is_task_file(name) else ""
        raise UserError(
            f"--tasks {name}: its data cannot be loaded ({reason}); {mended or 'where '}the hub cannot be reached, "
            f"fetch them on a node that reaches it (txssm eval fetch FOLDER --tasks {shlex.quote(name)}) and name the "
            "folder with --data"
        ) from error
    except (Exception, SystemExit) as error:
        if isinstance(error, UserError) or not is_task_file(name):
            raise
        # The user's mistakes in it are of many kinds; its code may even end the process.
        raise unusable(name, error) from error


def _check_cache(error: BaseException) -> None:
    """UserError if an error is of the folder in which data sets are kept, as where the home folder is read-only."""
    from huggingface_hub.constants import HF_HOME

    if isinstance(error, OSError) and str(error.filename or "").startswith(HF_HOME):
        raise UserError(
            f"{error.filename}, in which data sets are kept, cannot be used ({error.strerror}); name a folder in which "
            "you may write with the environment variable HF_HOME"
        ) from error


def unusable(file: str, error: BaseException) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(f"--tasks {file}: lm_eval cannot use this file ({type(error).__name__}: {reason}); mend it")


def _check_metrics(name: str, task: Any) -> None:
    """UserError if a task has a metric, or a way to average it, that lm_eval does not know.

    name: what --tasks calls it. lm_eval itself leaves out such a metric, or fails when all answers are there.
    """
    from lm_eval.api.task import ConfigurableTask

    unknown = [metric for metric, average in task.aggregation().items() if average is None]
    # A task with its own way from answers to metrics needs no functions.
    if type(task).process_results is ConfigurableTask.process_results and task.config.process_results is None:
        unknown += [metric for metric, function in task._metric_fn_list.items() if function is None]
    if unknown:
        raise UserError(
            f"--tasks {name}: lm_eval cannot compute the metric {unknown[0]!r} of task {task.task_name}, or does not "
            "know its aggregation; correct its metric_list, or, if the metric is one of the `evaluate` library, "
            "install that and use a machine that reaches the hub"
        )


def _check_names_differ(name: str, tasks: Mapping[str, Any], others: Mapping[str, Any]) -> None:
    """UserError if a task has the name of another: lm_eval would ask one of them, and show its scores for both."""
    for each in tasks.keys() & others.keys():
        if tasks[each].dump_config() != others[each].dump_config():
            raise UserError(
                f"--tasks {name}: its task {each} has the name of another task, with other contents or another number "
                "of examples; rename it in its file, or evaluate the two one after the other"
            )


def _set_fewshot(task: Any, number: int | None) -> None:
    # A task that has stated 0 cannot have examples.
    if number is not None and task.get_config("num_fewshot") != 0:
        task.set_config("num_fewshot", number)
    elif task.get_config("num_fewshot") is None:
        task.set_config("num_fewshot", 0)


def ruler_metadata(names: Sequence[str], max_length: int, tokenizer: Callable[[], Path]) -> dict[str, Any]:
    """What RULER's tasks need to make their texts: lengths that fit the model, and a folder with its tokenizer."""
    if not set(names) & {*RULER, "ruler"}:
        return {}
    lengths = [length for length in RULER_LENGTHS if length <= max_length]
    if not lengths:
        raise UserError(
            f"--tasks: RULER's texts have {RULER_LENGTHS[0]:,} tokens and more, the model's at most {max_length:,}; "
            "leave RULER's tasks out"
        )
    return {"max_seq_lengths": lengths, "tokenizer": str(tokenizer())}
