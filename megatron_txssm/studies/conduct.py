"""Conducts a study: writes its runs, trains or submits them, times a step of each, prints and writes what they show."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_txssm.errors import UserError
from megatron_txssm.evaluation.harness.stated import check_stated_tasks
from megatron_txssm.files import JsonObject
from megatron_txssm.jobs.submit import submit
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.reporting.runs import ask_queue, state
from megatron_txssm.studies.study import StudyRun, begin, begin_timing, runs_of
from megatron_txssm.studies.trainings import train


@dataclass(frozen=True)
class Study:
    """What is compared."""

    name: str
    folder: Path
    # Name -> recipe; the seed is each run's own.
    variants: Mapping[str, Recipe]
    # Raises UserError if recipes of its runs cannot be compared.
    check: Callable[[Sequence[Recipe]], None]
    # Prints and writes what the runs in a study's folder show.
    show: Callable[[Path], None]
    # For study.json: the command that begins it, the preset.
    facts: JsonObject
    # Whether a run whose loss or gradient became NaN or infinite is a result, and not trained again.
    may_diverge: bool = False
    # Called for every run after the trainings, before the results are shown.
    measure: Callable[[StudyRun], None] | None = None


def conduct(study: Study, *, seeds: int, parallel: int = 1, timing_rounds: int = 2, allow_unequal: bool = False) -> int:
    """Train what is left of a study and show its results; returns the exit code, 1 if runs failed.

    seeds: their number, from 1 on; parallel: runs at once; timing_rounds: short runs of each variant, one at a time,
    after the trainings, which measure the time of a step. UserError as for `study.begin`.
    """
    check_counts(seeds, parallel, timing_rounds)
    _begin(study, seeds, allow_unequal)
    try:
        failed = train(study.name, runs_of(study.folder), parallel=parallel, may_diverge=study.may_diverge)
        if timing_rounds and not failed:
            failed = train(f"{study.name}, timing", begin_timing(study.folder, timing_rounds))
        if study.measure is not None:
            for run in runs_of(study.folder):
                study.measure(run)
        study.show(study.folder)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(
            f"{study.folder} cannot be used: {error.strerror or error}; make room, and repeat the command"
        ) from error
    for run in failed:
        print(f"failed: txssm why {run.path}")
    return 1 if failed else 0


def check_counts(seeds: int, parallel: int = 1, timing_rounds: int = 0) -> None:
    """UserError for numbers with which nothing would be trained."""
    for option, value, least in (("--seeds", seeds, 1), ("--parallel", parallel, 1), ("--rounds", timing_rounds, 0)):
        if value < least:
            raise UserError(f"{option} {value} must be at least {least}")


def submit_study(study: Study, *, seeds: int, allow_unequal: bool = False, **allocation: Any) -> int:
    """Queue a Slurm job for each run that is neither finished, running nor queued; returns the exit code.

    allocation: as for `jobs.submit.submit`.
    """
    check_counts(seeds)
    _begin(study, seeds, allow_unequal)
    runs = runs_of(study.folder)
    queue = ask_queue([run.path for run in runs])
    check = partial(check_stated_tasks, afterwards=False)
    for run in runs:
        found = state(run.path, run.recipe, run.steps_done, queue)
        if found == "failed" and study.may_diverge and run.has_diverged:
            found = "diverged"
        if found in ("finished", "diverged", "running", "queued"):
            print(f"{run.path.name}: {found}")
        elif code := submit(run.path / "recipe.yaml", check=check, **allocation):
            return code
    return 0


def _begin(study: Study, seeds: int, allow_unequal: bool) -> None:
    """As `study.begin`; UserError also if nothing would be validated: the last validation is what a study compares."""
    if any(recipe.logging.eval_iters == 0 for recipe in study.variants.values()):
        raise UserError("logging.eval_iters=0 leaves out the validations, which a study compares; leave it out")
    facts: JsonObject = {"study": study.name, "unequal_allowed": allow_unequal, **study.facts}
    check = None if allow_unequal else study.check
    begin(study.folder, study.variants, range(1, seeds + 1), facts, check)
