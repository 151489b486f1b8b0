"""txssm submit: check a recipe against the cluster, freeze it in its run folder, queue its job or a chain of jobs."""

import argparse
import os
from typing import Any

from megatron_txssm.cli.parsing import add_verb
from megatron_txssm.errors import UserError
from megatron_txssm.jobs.limits import LIMITS, add_limits
from megatron_txssm.jobs.submission.allocation import Allocation
from megatron_txssm.jobs.submit import plan_submission
from megatron_txssm.slurm.batch_script import load_site_settings
from megatron_txssm.slurm.sbatch_options import check_time, parse_options

EXAMPLES = (
    "txssm submit transxssm_1.3b --nodes 4 --gpus-per-node 8 --time 24:00:00",
    "txssm submit transxssm_1.3b --nodes 4 --gpus-per-node 8 --partition batch --sbatch exclusive --dry-run",
    "txssm submit demo_cpu --nodes 2 --nproc-per-node 1",
    "txssm submit runs/transxssm_1.3b/recipe.yaml --nodes 8",
    "txssm submit transxssm_320m --nodes 1 --chain --corpus smollm_corpus",
)


def add_parser(subparsers: Any) -> None:
    parser = add_verb(subparsers, "submit", EXAMPLES)
    parser.add_argument("recipe", help="a name that `txssm recipes` lists, or a YAML file")
    parser.add_argument("--nodes", type=int, required=True, metavar="N", help="nodes of the job")
    parser.add_argument(
        "--spare", type=int, default=0, metavar="N", help="nodes beside those, for the place of one that fails"
    )
    parser.add_argument(
        "--gpus-per-node", type=int, metavar="G", help="with one process each (default: $TXSSM_GPUS_PER_NODE)"
    )
    parser.add_argument("--nproc-per-node", type=int, metavar="P", help="processes per node, where they have no GPUs")
    parser.add_argument("--time", metavar="LIMIT", help="such as 24:00:00; after it the job goes on by itself")
    parser.add_argument("--partition", metavar="NAME", help="(default: $SBATCH_PARTITION, or the cluster's)")
    parser.add_argument("--account", metavar="NAME", help="(default: $SBATCH_ACCOUNT, or the user's)")
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="any other of sbatch's: exclusive, mem=0, …"
    )
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", dest="overrides", help="change a field")
    parser.add_argument("--after", action="append", default=[], metavar="JOB", help="start only if this job succeeds")
    parser.add_argument(
        "--chain", action="store_true", help="shard the corpus, pretrain, convert, evaluate: each a job"
    )
    parser.add_argument("--corpus", metavar="RECIPE", help="the corpus recipe that --chain shards (default: found)")
    parser.add_argument("--dry-run", action="store_true", help="check, and print the batch script; write nothing")
    parser.add_argument(
        "--no-freeze-code",
        action="store_false",
        dest="freeze_code",
        help="run the checkout as it is at each start of the job, not a copy of it (default: RUN/code)",
    )
    add_limits(parser)


def run(args: argparse.Namespace) -> int:
    least = {"nodes": 1, "spare": 0} | {name: int(unit == "SECONDS") for name, (_, unit, _) in LIMITS.items()}
    for name, smallest in least.items():
        if (value := getattr(args, name.replace("-", "_"))) < smallest:
            raise UserError(f"--{name} {value} must be at least {smallest}")
    for job in args.after:
        if not job.isdecimal():
            raise UserError(f"--after {job!r} must be the number of a job")
    if args.corpus and not args.chain:
        raise UserError(f"--corpus {args.corpus} goes with --chain")
    load_site_settings()
    options = parse_options(os.environ.get("TXSSM_SBATCH_OPTIONS", "").split(), "TXSSM_SBATCH_OPTIONS")
    options |= parse_options(args.sbatch, "--sbatch")
    for name in ("time", "partition", "account"):
        if (value := getattr(args, name)) is not None:
            if not value:
                raise UserError(f"--{name} is empty; leave it out for the default")
            options[name] = value
    check_time(options, args.stop_before)
    submission = plan_submission(args.recipe, args.overrides, _allocation(args), options, args)
    if submission is None:
        return 0
    return submission.show() if args.dry_run else submission.submit()


def _allocation(args: argparse.Namespace) -> Allocation:
    gpus, nproc = args.gpus_per_node, args.nproc_per_node
    if gpus is None and nproc is None:
        site = os.environ.get("TXSSM_GPUS_PER_NODE")
        if site is None or not site.isdecimal():
            raise UserError(
                "state --gpus-per-node, or --nproc-per-node where nodes have no GPUs (or TXSSM_GPUS_PER_NODE in "
                "slurm/env.sh)"
            )
        gpus = int(site)
    if gpus and nproc and gpus != nproc:
        raise UserError(f"--nproc-per-node {nproc} is not --gpus-per-node {gpus}: each process has one GPU; state one")
    allocation = Allocation(args.nodes, nproc_per_node=nproc or gpus or 0, gpus_per_node=gpus or 0, spare=args.spare)
    if allocation.nproc_per_node < 1:
        raise UserError(f"{allocation.nproc_per_node} processes per node must be at least 1")
    return allocation
