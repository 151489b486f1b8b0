"""Makes a corpus: first what all its tasks share, then the tasks, on this machine or as job arrays."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_txssm.data.corpus.manifest import Plan
from megatron_txssm.data.corpus.status import CorpusStatus
from megatron_txssm.data.sharding.progress import print_status, progress, tasks_text
from megatron_txssm.errors import UserError, require_positive
from megatron_txssm.files import remove_abandoned
from megatron_txssm.recipe.corpus.loader import load_corpus_recipe
from megatron_txssm.recipe.corpus.schema import CorpusRecipe
from megatron_txssm.terminal import print_table


def shard_corpus(recipe: str | Path, *, overrides: Sequence[str] = (), workers: int | None = None) -> int:
    """Make or finish a corpus on `workers` processes of this machine (None: one per core); returns the exit code.

    recipe: a name in recipes/corpora/, a YAML file or a corpus directory; overrides: fields to change, as "a.b=c".
    UserError if the recipe, its sources or the disk are at fault.
    """
    require_positive(workers=workers)
    return shard(load_corpus_recipe(recipe, overrides), workers or len(os.sched_getaffinity(0)))


def submit_corpus(recipe: str | Path, *, overrides: Sequence[str] = ()) -> int:
    """Submit the unfinished tasks as Slurm job arrays, one per subset, and print their numbers; returns the exit code.

    The arguments are those of `shard_corpus`.
    """
    from megatron_txssm.data.sharding.slurm_array import submit
    from megatron_txssm.slurm.batch_script import load_site_settings

    corpus = load_corpus_recipe(recipe, overrides)
    load_site_settings()
    submitted = submit(corpus, prepare(corpus))
    for subset, job_ids in submitted.items():
        print(f"{subset}: job array{'s' if len(job_ids) > 1 else ''} {', '.join(job_ids)}")
    if not submitted:
        print(f"{corpus.path}: all tasks are finished")
    else:
        print(f"follow with: txssm data status {corpus.path}")
    return 0


def show_plan(recipe: str | Path, *, overrides: Sequence[str] = ()) -> int:
    """List a corpus's sources and print their division into tasks; returns the exit code. Writes nothing.

    The arguments are those of `shard_corpus`.
    """
    from megatron_txssm.data.sharding.plan import list_files, plan_subset

    corpus, rows = load_corpus_recipe(recipe, overrides), []
    for name, subset in corpus.subsets.items():
        files = list_files(name, subset)
        tasks = plan_subset(name, subset, files)
        largest = max(sum(piece.bytes for piece in task) for task in tasks)
        total = sum(size for _, size in files)
        rows.append((name, f"{len(files):,}", f"{total / 1e9:,.2f} GB", f"{len(tasks):,}", f"{largest / 1e6:,.0f} MB"))
    print_table(("subset", ">files", ">bytes", ">tasks", ">largest task"), rows)
    for name, subset in corpus.subsets.items():
        if subset.filters:
            print(f"{name}: only rows with {' and '.join(subset.filters)}")
    return 0


def prepare(recipe: CorpusRecipe) -> Plan:
    """Make what all tasks share, if it is missing: the frozen recipe, the tokenizer, the plan."""
    from megatron_txssm.data.sharding.plan import freeze_recipe, make_plan
    from megatron_txssm.data.tokenizer.install import check_tokenizer, install_tokenizer

    folder = recipe.path / "tokenizer"
    for place in (recipe.path, folder, *(recipe.path / subset for subset in recipe.subsets)):
        remove_abandoned(place)
    try:
        freeze_recipe(recipe)
        # Without a plan, a tokenizer left by an earlier command may be another recipe's.
        if not (recipe.path / "plan.json").exists() or not (folder / "facts.json").exists():
            install_tokenizer(recipe.tokenizer, folder)
        check_tokenizer(recipe.path)
        return make_plan(recipe)
    except OSError as error:
        where = error.filename2 or error.filename or recipe.path
        raise UserError(
            f"{where}: {error.strerror or error}; free disk space, correct the path, or use another output"
        ) from None


def shard(recipe: CorpusRecipe, workers: int) -> int:
    """Finish the corpus on this machine; returns the exit code."""
    from megatron_txssm.data.sharding.workers import start_worker_server

    start_worker_server()
    from megatron_txssm.data.sharding.run_local import run_locally, unfinished

    plan = prepare(recipe)
    status = CorpusStatus(recipe.path)
    before = status.read()
    if not sum(len(unfinished(recipe, plan, subset)) for subset in recipe.subsets):
        print(f"{recipe.path}: all {sum(s.tasks for s in before)} tasks are already finished")
        return 0
    start = time.monotonic()
    try:
        with progress(status):
            run_locally(recipe, plan, workers)
    except KeyboardInterrupt:
        after = status.read()
        print(f"stopped; {tasks_text(after)} are finished, and the same command resumes")
        return 130
    after, seconds = status.read(), time.monotonic() - start
    text = sum(s.text_bytes for s in after) - sum(s.text_bytes for s in before)
    print_status(after)
    print(
        f"{recipe.path}: {tasks_text(after)}; {text / 1e6:,.1f} MB in {seconds:.1f} s, {text / 1e6 / seconds:.1f} MB/s"
    )
    return 0
