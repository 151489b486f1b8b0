"""`txssm data shard`: on processes of this machine, or as job arrays."""

import argparse
import os
import time

from megatron_txssm.data.corpus.manifest import Plan
from megatron_txssm.data.corpus.recipe import CorpusRecipe, load_corpus_recipe
from megatron_txssm.data.corpus.status import CorpusStatus
from megatron_txssm.data.status_command import print_status, progress, tasks_text
from megatron_txssm.errors import UserError
from megatron_txssm.terminal import print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a name in recipes/corpora/, a YAML file, or a corpus directory to go on with")
    parser.add_argument("--workers", type=int, metavar="N", help="processes of this machine (default: its cores)")
    parser.add_argument("--slurm", action="store_true", help="submit job arrays instead, one per subset")
    parser.add_argument("--plan", action="store_true", help="only list the sources, and say which tasks there would be")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", dest="overrides", help="change a field")


def run(args: argparse.Namespace) -> int:
    recipe = load_corpus_recipe(args.recipe, args.overrides)
    workers = len(os.sched_getaffinity(0)) if args.workers is None else args.workers
    if workers < 1:
        raise UserError(f"--workers {workers} must be at least 1")
    if args.plan:
        return _print_plan(recipe)
    if args.slurm:
        return _submit(recipe)
    return shard(recipe, workers)


def prepare(recipe: CorpusRecipe) -> Plan:
    """Make what all tasks share, unless it is there: the frozen recipe, the tokenizer, the plan."""
    from megatron_txssm.data.sharding.plan import freeze_recipe, make_plan
    from megatron_txssm.data.tokenizer.install import check_tokenizer, install_tokenizer
    from megatron_txssm.files import remove_abandoned

    folder = recipe.path / "tokenizer"
    for place in (recipe.path, folder, *(recipe.path / subset for subset in recipe.subsets)):
        remove_abandoned(place)
    try:
        freeze_recipe(recipe)
        # What an earlier command left that did not come as far as the plan may be another recipe's.
        if not (recipe.path / "plan.json").exists() or not (folder / "facts.json").exists():
            install_tokenizer(recipe.tokenizer, folder)
        check_tokenizer(recipe.path)
        return make_plan(recipe)
    except OSError as error:
        where = error.filename2 or error.filename or recipe.path
        raise UserError(
            f"{where}: {error.strerror or error}; free the disk, mend the path, or use another output"
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
        print(f"{recipe.path}: all {sum(s.tasks for s in before)} tasks were finished before")
        return 0
    start = time.monotonic()
    try:
        with progress(status):
            run_locally(recipe, plan, workers)
    except KeyboardInterrupt:
        after = status.read()
        print(f"stopped; {tasks_text(after)} are finished, and the same command goes on")
        return 130
    after, seconds = status.read(), time.monotonic() - start
    text = sum(s.text_bytes for s in after) - sum(s.text_bytes for s in before)
    print_status(after)
    print(
        f"{recipe.path}: {tasks_text(after)}; {text / 1e6:,.1f} MB in {seconds:.1f} s, {text / 1e6 / seconds:.1f} MB/s"
    )
    return 0


def _submit(recipe: CorpusRecipe) -> int:
    from megatron_txssm.data.sharding.slurm_array import submit
    from megatron_txssm.slurm.batch_script import load_site_settings

    load_site_settings()
    plan = prepare(recipe)
    submitted = submit(recipe, plan)
    for subset, job_ids in submitted.items():
        print(f"{subset}: job array{'s' if len(job_ids) > 1 else ''} {', '.join(job_ids)}")
    if not submitted:
        print(f"{recipe.path}: all tasks are finished")
    else:
        print(f"follow with: txssm data status {recipe.path}")
    return 0


def _print_plan(recipe: CorpusRecipe) -> int:
    from megatron_txssm.data.sharding.plan import list_files, plan_subset

    rows = []
    for name, subset in recipe.subsets.items():
        files = list_files(name, subset)
        tasks = plan_subset(name, subset, files)
        largest = max(sum(piece.bytes for piece in task) for task in tasks)
        total = sum(size for _, size in files)
        rows.append((name, f"{len(files):,}", f"{total / 1e9:,.2f} GB", f"{len(tasks):,}", f"{largest / 1e6:,.0f} MB"))
    print_table(("subset", ">files", ">bytes", ">tasks", ">largest task"), rows)
    for name, subset in recipe.subsets.items():
        if subset.filters:
            print(f"{name}: only rows with {' and '.join(subset.filters)}")
    return 0
