"""txssm eval harness: scores on the tasks of EleutherAI's harness."""

import argparse
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from megatron_txssm.cli.parsing import (
    ALLOCATION,
    add_allocation_options,
    add_run_options,
    add_tasks_option,
    check_submit_options,
)
from megatron_txssm.errors import UserError
from megatron_txssm.evaluation.harness.harness import evaluate_tasks
from megatron_txssm.evaluation.harness.queued import job_words
from megatron_txssm.evaluation.harness.stated import settings_for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="CHECKPOINT_OR_HF", type=Path, help="a run, its checkpoints, or a Hugging Face folder"
    )
    parser.add_argument("--step", type=int, metavar="N", help="step of the checkpoint (default: the newest)")
    add_tasks_option(parser, None, "the run's evaluation.tasks, otherwise paper")
    parser.add_argument(
        "--trust-recipe",
        action="store_true",
        help="accept files of tasks that the run's recipe names; they may run code",
    )
    parser.add_argument(
        "--num-fewshot",
        type=int,
        metavar="N",
        help="examples in each prompt (default: as the suite states, otherwise the task)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions of each task, for trials")
    parser.add_argument("--batch-size", type=int, metavar="N", help="texts in a batch, for each replica (default: 8)")
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="read data sets from this folder, which `txssm eval fetch` fills"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="where results go (default: evaluation/harness in the run or the Hugging Face folder)",
    )
    add_run_options(parser)
    parser.add_argument("--submit", action="store_true", help="queue a Slurm job instead, with these options:")
    add_allocation_options(parser)
    parser.add_argument("--dry-run", action="store_true", help="check, and print the batch script; queue nothing")


def run(args: argparse.Namespace) -> int:
    check_submit_options(args)
    asked = (args.tasks, args.num_fewshot, args.limit, args.batch_size)
    settings, data = settings_for(args.model, *asked, data=args.data, trust_recipe=args.trust_recipe)
    words = {"data": data, "output": args.output, "step": args.step, "overrides": args.overrides}
    if args.submit:
        return _submit(args, partial(job_words, args.model, settings, **words))
    return evaluate_tasks(args.model, settings, nproc=args.nproc, port=args.port, **words)


def _submit(args: argparse.Namespace, words: Callable[[int], tuple[Path, list[str]]]) -> int:
    from megatron_txssm.jobs.evaluation_job import submit_evaluation
    from megatron_txssm.jobs.limits import Limits
    from megatron_txssm.jobs.submission.request import Request

    if args.nproc is not None or args.port is not None:
        raise UserError("--nproc and --port are for this machine; with --submit, state --nproc-per-node")
    stated = {name: getattr(args, name) for name in (*ALLOCATION, "dry_run")}
    # The job has nothing to save before its time limit.
    request = Request(str(args.model), **stated, sbatch=tuple(args.sbatch), limits=Limits(stop_before=1))
    return submit_evaluation("harness", request, words, shlex.join(["txssm", *sys.argv[1:]]))
