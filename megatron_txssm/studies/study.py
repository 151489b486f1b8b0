"""A study: variants of one recipe, each trained with the same seeds, as ordinary runs below the study's folder.

STUDY/study.json                  the command, and a digest of the training data
STUDY/runs/VARIANT-seedN/         a run folder, with its recipe.yaml from the beginning
STUDY/timing/VARIANT-roundN/      a short run that only measures the time of a step
STUDY/results.json, results.png   what the finished runs show
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_txssm.architecture.parameters import count_parameters
from megatron_txssm.data.corpus.blend import recipe_blend
from megatron_txssm.data.corpus.manifest import SPLITS
from megatron_txssm.errors import UserError
from megatron_txssm.files import JsonObject, write_file_atomically, write_json
from megatron_txssm.jobs.attempts import attempts, load_run
from megatron_txssm.jobs.cause import Cause
from megatron_txssm.jobs.diagnosis.causes import cause_of
from megatron_txssm.metrics import last_step
from megatron_txssm.recipe.changes import WITHOUT_REPORTS, Changes, changed, differences
from megatron_txssm.recipe.recipe import Recipe, with_paths
from megatron_txssm.training.launch.ended import local_end
from megatron_txssm.training.launch.preflight import is_finished

# Largest part by which the parameters of compared models may differ.
PARAMETERS_MAY_DIFFER = 0.02
RUNS, TIMING = "runs", "timing"
# Of a timing run. The first steps are slower: memory is allocated, kernels are chosen.
TIMING_STEPS, TIMING_WARMUP_STEPS = 10, 3
# What runs of a study may differ in beside its own fields.
_OWN_FIELDS = ("name", "description", "run_directory", "training.seed")
_RUN_NAME = re.compile(r"(.+)-(?:seed|round)(\d+)")


@dataclass(frozen=True)
class StudyRun:
    """One training of a study; `number` is its seed, or its round if it only measures time."""

    variant: str
    number: int
    recipe: Recipe

    @property
    def path(self) -> Path:
        return self.recipe.run_path

    @property
    def steps_done(self) -> int:
        return min(last_step(self.path / "metrics.jsonl") or 0, self.recipe.train_iters)

    @property
    def is_finished(self) -> bool:
        if self.recipe.checkpoint.save_interval is None:
            return self.steps_done == self.recipe.train_iters
        return is_finished(self.recipe)

    @property
    def has_diverged(self) -> bool:
        """Whether its loss, gradient or weights became NaN or infinite, in its last training here or on Slurm."""
        if self.is_finished:
            return False
        here, on_slurm = local_end(self.path), attempts(self.path)[-1:]
        if here is None or (on_slurm and here.ended < on_slurm[0].started):
            return bool(on_slurm) and on_slurm[0].cause in (Cause.NAN, Cause.DIVERGED)
        # "rank 0 failed (exit code 1): " and the error.
        return cause_of(here.what.partition("): ")[2]) in (Cause.NAN, Cause.DIVERGED)


def runs_of(folder: Path, part: str = RUNS) -> list[StudyRun]:
    """The runs in a study's folder, by seed or round: all variants once, then all of them again."""
    found = []
    for file in (folder / part).glob("*/recipe.yaml"):
        if name := _RUN_NAME.fullmatch(file.parent.name):
            found.append(StudyRun(name[1], int(name[2]), load_run(file.parent)))
    return sorted(found, key=lambda run: (run.number, run.variant))


def begin(
    folder: Path,
    variants: Mapping[str, Recipe],
    seeds: Collection[int],
    facts: JsonObject,
    check: Callable[[Sequence[Recipe]], None] | None,
) -> None:
    """Write the recipes of a study's runs, or check that those there are the same; nothing is trained.

    facts: written to study.json, as the study is first begun; check: raises UserError if the recipes of the runs cannot
    be compared; None: they and their data may be unequal.

    UserError if the study was begun with others.
    """
    runs = [
        absolute(changed(recipe, _own(folder, name, seed) | _validation_at_the_end(recipe)))
        for seed in seeds
        for name, recipe in variants.items()
    ]
    before = {run.recipe.name: absolute(run.recipe) for run in runs_of(folder)}
    facts = {**facts, "data_sha256": data_digest(runs[0])}
    _check_same(folder, facts, before, runs, may_differ=check is None)
    if check is not None:
        check([*before.values(), *runs])
    try:
        for recipe in runs:
            recipe.run_path.mkdir(parents=True, exist_ok=True)
            if not (recipe.run_path / "recipe.yaml").exists():
                _write(recipe)
        if not (folder / "study.json").exists():
            write_json(folder / "study.json", facts)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}; name another folder with --out") from None


def begin_timing(folder: Path, rounds: int) -> list[StudyRun]:
    """Short runs of every variant, `rounds` times each, that measure the time of a step and save nothing."""
    # Of the lowest seed.
    for run in {run.variant: run for run in reversed(runs_of(folder))}.values():
        for number in range(1, rounds + 1):
            place = folder / TIMING / f"{run.variant}-round{number}"
            changes = {
                **WITHOUT_REPORTS,
                "name": place.name,
                "run_directory": str(place),
                "training.train_tokens": None,
                "training.train_iters": TIMING_STEPS,
                "checkpoint.save_interval": None,
                "checkpoint.keep_last": None,
                "logging.eval_interval": None,
                "logging.eval_iters": 0,
            }
            place.mkdir(parents=True, exist_ok=True)
            _write(changed(run.recipe, changes))
    return runs_of(folder, TIMING)


def check_comparable(recipes: Sequence[Recipe], varied: Collection[str]) -> None:
    """UserError if recipes differ in more than `varied` and the seed, in size, or in the seeds of each variant."""
    for field, values in differences(recipes, but=(*varied, *_OWN_FIELDS)).items():
        stated = sorted({str(value) for value in values})
        raise UserError(
            f"the runs differ in {field} ({', '.join(stated)}), so they cannot be compared; train them alike in "
            "another folder (--out), or accept it with --allow-unequal"
        )
    counts = [(count_parameters(recipe.sizes).total, recipe.name) for recipe in recipes]
    (least, small), (most, large) = min(counts), max(counts)
    if most > (1 + PARAMETERS_MAY_DIFFER) * least:
        raise UserError(
            f"{large} has {most:,} parameters, {small} {least:,}: more than {PARAMETERS_MAY_DIFFER:.0%} apart; choose "
            "sizes that agree, or accept it with --allow-unequal"
        )


def data_digest(recipe: Recipe) -> str | None:
    """SHA-256 over the shards of a recipe's corpus, which decides the order of its samples; None without a corpus."""
    if recipe.data.corpus is None:
        return None
    blend = recipe_blend(recipe)
    digests = [record.sha256[".bin"] for split in SPLITS for _, _, record in blend.shards(split)]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def study_facts(folder: Path) -> JsonObject:
    """study.json; UserError if there is none, or a damaged one."""
    file = folder / "study.json"
    try:
        found = json.loads(file.read_bytes())
    except OSError:
        raise UserError(f"{folder} holds no study (no study.json); name its folder with --out, or begin one") from None
    except ValueError:
        found = None
    if not isinstance(found, dict) or not {"study", "data_sha256"} <= found.keys():
        raise UserError(f"{file} is damaged; remove it, and repeat the study's command, which writes it again")
    return found


def check_study(folder: Path, name: str) -> None:
    """UserError unless the folder holds runs of this study."""
    if (there := study_facts(folder)["study"]) != name:
        raise UserError(f"{folder} holds a study of {there}; name another folder with --out")
    if not runs_of(folder):
        raise UserError(f"{folder} has no runs; repeat the study's command, or name another folder with --out")


def absolute(recipe: Recipe) -> Recipe:
    """The recipe with absolute paths, as those in run folders have them."""
    return with_paths(recipe, os.path.abspath)


def _write(recipe: Recipe) -> None:
    """The recipe.yaml of a run, which after a kill is whole or not there."""
    write_file_atomically(recipe.run_path / "recipe.yaml", recipe.frozen(recipe.run_path).encode())


def _own(folder: Path, variant: str, seed: int) -> Changes:
    name = f"{variant}-seed{seed}"
    return {"name": name, "run_directory": str(folder / RUNS / name), "training.seed": seed}


def _validation_at_the_end(recipe: Recipe) -> Changes:
    """At a step of the interval Megatron validates before it saves; else a kill after the last save loses the loss."""
    interval = recipe.logging.eval_interval
    ends_with_one = interval is not None and recipe.train_iters % interval == 0
    return {} if ends_with_one else {"logging.eval_interval": recipe.train_iters}


def _check_same(
    folder: Path, facts: JsonObject, before: Mapping[str, Recipe], runs: Sequence[Recipe], *, may_differ: bool
) -> None:
    """UserError if the study was begun as another, or with other recipes or data."""
    there = study_facts(folder) if (folder / "study.json").exists() else facts
    remedy = "repeat its command, or name another folder with --out"
    if there["study"] != facts["study"]:
        raise UserError(f"{folder} holds a study of {there['study']}; name another folder with --out")
    for recipe in runs:
        found = differences([before.get(recipe.name, recipe), recipe], but=("run_directory",))
        for field, (old, new) in found.items():
            raise UserError(f"{folder} was begun with {field}={old}, now it is {new}; {remedy}")
    if there["data_sha256"] != facts["data_sha256"] and not may_differ:
        raise UserError(f"{folder} was begun with other training data ({runs[0].data.corpus} has changed); {remedy}")
