"""`txssm data shard`: on processes of this machine, or as job arrays."""

import argparse
import os

from megatron_txssm.data.sharding.make import prepare, shard
from megatron_txssm.errors import UserError
from megatron_txssm.recipe.corpus_recipe import CorpusRecipe, load_corpus_recipe
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
