"""txssm study: train several models alike, with several seeds, and compare them."""

import argparse
import shlex
import sys
from pathlib import Path

from megatron_txssm.cli.parsing import (
    Subparsers,
    add_allocation_options,
    add_commands,
    add_set_option,
    check_submit_options,
)

COMMANDS = {
    "position-encoding": (
        "compare position encodings (table 2 of the paper): seven models of one size on the same tokens",
        (
            "txssm study position-encoding",
            "txssm study position-encoding --seeds 3 --parallel 2",
            "txssm study position-encoding --corpus data/my-corpus --set training.train_iters=1000",
            "txssm study position-encoding --table",
            "txssm study position-encoding --preset paper --submit --nodes 1 --gpus-per-node 8 --time 12:00:00",
        ),
    ),
    "scaling": (
        "compare how the paper's four architectures gain from size, with equally many tokens per parameter",
        (
            "txssm study scaling --parallel 2",
            "txssm study scaling --tokens-per-parameter 5 --seeds 2",
            "txssm study scaling --preset paper --seeds 1 --submit --nodes 4 --gpus-per-node 8 --time 24:00:00",
        ),
    ),
    "stability": (
        "train the hybrid also without residual connections, norms or FFNs: divergence, gradients, state norms",
        (
            "txssm study stability --parallel 2",
            "txssm study stability --set optimizer.learning_rate=1e-2 --out runs/studies/stability-fast",
            "txssm study stability --table",
        ),
    ),
    "mqar": (
        "compare how many keys' values four architectures recall (multi-query associative recall, made-up samples)",
        (
            "txssm study mqar --parallel 2",
            "txssm study mqar --set 'data.recall_pairs=[8, 16]' --set training.train_iters=2000",
            "txssm study mqar --table",
        ),
    ),
}


def add_parser(subparsers: Subparsers) -> None:
    parsers = add_commands(subparsers, "study", COMMANDS)
    for name, parser in parsers.items():
        add_arguments(parser, name)
    parsers["position-encoding"].add_argument(
        "--rounds", type=int, default=2, metavar="N", help="rounds of short runs that time a step, at the end"
    )
    parsers["scaling"].add_argument(
        "--tokens-per-parameter", type=float, metavar="X", help="of every model (default: small 2, paper 20)"
    )


def add_arguments(parser: argparse.ArgumentParser, name: str = "mqar") -> None:
    """The options of a study, by default of `txssm eval mqar`."""
    parser.set_defaults(rounds=0)
    folder = f"runs/studies/{name}"
    if name != "mqar":
        folder += "-PRESET"
        parser.add_argument(
            "--preset", choices=("small", "paper"), default="small", help="sizes: for CPUs (default), or the paper's"
        )
        parser.add_argument("--corpus", metavar="DIR", help="corpus to train on (default: the preset's)")
    parser.add_argument("--out", type=Path, metavar="STUDY", help=f"the study's folder (default: {folder})")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each model (default: 3)")
    parser.add_argument("--parallel", type=int, default=1, metavar="K", help="runs at once, sharing the cores")
    parser.add_argument("--allow-unequal", action="store_true", help="compare models of unequal size, or other data")
    parser.add_argument("--table", action="store_true", help="train nothing: show what is finished")
    add_set_option(parser)
    parser.add_argument("--submit", action="store_true", help="queue each run as a Slurm job, with these options:")
    add_allocation_options(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="print the batch scripts; write the recipes, but queue nothing"
    )


def run(args: argparse.Namespace) -> int:
    from megatron_txssm.studies import mqar, position_encoding, scaling, stability
    from megatron_txssm.studies.conduct import check_counts, conduct, submit_study
    from megatron_txssm.studies.study import check_study

    if args.table:
        shown = {study.NAME: study for study in (mqar, position_encoding, scaling, stability)}[args.command]
        preset = () if shown is mqar else (args.preset,)
        folder = args.out or shown.default_folder(*preset)
        check_study(folder, shown.NAME)
        shown.show(folder)
        return 0
    check_submit_options(args)
    # Before a corpus is made.
    check_counts(args.seeds, args.parallel, args.rounds)
    common = {"folder": args.out, "overrides": args.overrides, "command": shlex.join(["txssm", *sys.argv[1:]])}
    if args.command == mqar.NAME:
        study = mqar.mqar(**common)
    elif args.command == scaling.NAME:
        tokens = args.tokens_per_parameter
        study = scaling.scaling(args.preset, corpus=args.corpus, tokens_per_parameter=tokens, **common)
    elif args.command == stability.NAME:
        study = stability.stability(args.preset, corpus=args.corpus, **common)
    else:
        study = position_encoding.position_encoding(args.preset, corpus=args.corpus, **common)
    if not args.submit:
        return conduct(
            study,
            seeds=args.seeds,
            parallel=args.parallel,
            timing_rounds=args.rounds,
            allow_unequal=args.allow_unequal,
        )
    return submit_study(
        study,
        seeds=args.seeds,
        allow_unequal=args.allow_unequal,
        nodes=args.nodes,
        gpus_per_node=args.gpus_per_node,
        nproc_per_node=args.nproc_per_node,
        time=args.time,
        partition=args.partition,
        account=args.account,
        sbatch=args.sbatch,
        dry_run=args.dry_run,
    )
