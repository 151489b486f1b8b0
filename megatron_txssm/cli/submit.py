"""txssm submit: check a recipe against the cluster, freeze it in its run folder, queue its job or a chain of jobs."""

import argparse
import shlex
import sys
from functools import partial

from megatron_txssm.cli.parsing import Subparsers, add_allocation_options, add_set_option, add_verb
from megatron_txssm.evaluation.harness.stated import check_stated_tasks
from megatron_txssm.jobs.limits import LIMIT_OPTIONS, Limits
from megatron_txssm.jobs.submit import submit

EXAMPLES = (
    "txssm submit transxssm_1.3b --nodes 4 --gpus-per-node 8 --time 24:00:00",
    "txssm submit transxssm_1.3b --nodes 4 --gpus-per-node 8 --partition batch --sbatch exclusive --dry-run",
    "txssm submit demo_cpu --nodes 2 --nproc-per-node 1",
    "txssm submit runs/transxssm_1.3b/recipe.yaml --nodes 8",
    "txssm submit transxssm_320m --nodes 1 --chain --corpus smollm_corpus",
)


def add_parser(subparsers: Subparsers) -> None:
    parser = add_verb(subparsers, "submit", EXAMPLES)
    parser.add_argument("recipe", help="a name that `txssm recipes` lists, or a YAML file")
    add_allocation_options(parser, required=True)
    parser.add_argument(
        "--spare", type=int, default=0, metavar="N", help="additional nodes, which replace nodes that fail"
    )
    add_set_option(parser)
    parser.add_argument("--after", action="append", default=[], metavar="JOB", help="start only if this job succeeds")
    parser.add_argument(
        "--chain",
        action="store_true",
        help="shard the corpus, pretrain, convert and evaluate, each as its own job, then score evaluation.tasks",
    )
    parser.add_argument(
        "--corpus",
        metavar="RECIPE",
        help="the corpus recipe that --chain shards (default: the one that makes data.corpus)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check, and print the batch script; write and queue nothing"
    )
    parser.add_argument(
        "--no-freeze-code",
        action="store_false",
        dest="freeze_code",
        help="at each start, run the checkout as it is then, not the copy in RUN/code",
    )
    for limit in LIMIT_OPTIONS:
        parser.add_argument(limit.option, type=int, metavar=limit.unit, default=limit.default, help=limit.help)


def run(args: argparse.Namespace) -> int:
    return submit(
        args.recipe,
        nodes=args.nodes,
        gpus_per_node=args.gpus_per_node,
        nproc_per_node=args.nproc_per_node,
        spare=args.spare,
        time=args.time,
        partition=args.partition,
        account=args.account,
        sbatch=args.sbatch,
        overrides=args.overrides,
        after=args.after,
        chain=args.chain,
        corpus=args.corpus,
        dry_run=args.dry_run,
        freeze_code=args.freeze_code,
        limits=Limits.parsed(vars(args)),
        command=shlex.join(["txssm", *sys.argv[1:]]),
        check=partial(check_stated_tasks, afterwards=args.chain),
    )
