"""txssm plan: which parallel layout to train a recipe in, on how many GPUs, and what that needs."""

import argparse
from pathlib import Path

from megatron_txssm.cli.parsing import Subparsers, add_set_option, add_verb

EXAMPLES = (
    "txssm plan transxssm_1.3b --gpus 64",
    "txssm plan transxssm_1.3b --gpus 512 --gpu h200 --out planned.yaml",
    "txssm plan transxssm_1.3b --gpus 16 --set parallel.tensor_model_parallel_size=4",
    "txssm plan transxssm_70b --gpus 512 --layout tp8_sp_pp4_zero1_mb1",
    "txssm plan transxssm_1.3b --gpus 8 --calibrate rates.json",
    "txssm plan transxssm_1.3b --gpus 64 --rates rates.json",
    "txssm plan transxssm_1.3b --sweep 8,64,512,4096 --plot scaling.png",
)


def add_parser(subparsers: Subparsers) -> None:
    parser = add_verb(subparsers, "plan", EXAMPLES)
    parser.add_argument("recipe", metavar="RECIPE", help="a name that `txssm recipes` lists, or a YAML file")
    parser.add_argument("--gpus", type=int, metavar="N", help="number of GPUs to plan for")
    parser.add_argument("--gpu", metavar="NAME", help="kind of GPU: h100-sxm, h200, b200, … (default: h100-sxm)")
    parser.add_argument(
        "--calibrate",
        type=Path,
        metavar="FILE",
        help="train a few steps on N GPUs, or CPU cores, of this machine, and write how they differ from the formulas",
    )
    parser.add_argument("--rates", type=Path, metavar="FILE", help="plan for the machine that --calibrate measured")
    parser.add_argument("--nodes-of", type=int, metavar="G", help="GPUs of a node (default: usually 8)")
    parser.add_argument(
        "--gpu-memory", type=float, metavar="GIB", help="memory of a GPU (default: from its data sheet)"
    )
    parser.add_argument(
        "--memory-fraction",
        type=float,
        default=0.92,
        metavar="X",
        help="what tensors may take of it; the rest is for NCCL and fragmentation (default: 0.92)",
    )
    parser.add_argument(
        "--target-tokens", type=int, metavar="N", help="tokens to train on, for days and GPU-hours (default: RECIPE's)"
    )
    parser.add_argument(
        "--layout", metavar="NAME", help="plan this layout alone, such as tp2_sp_pp4_zero1_mb1, as plans name them"
    )
    parser.add_argument(
        "--dry-runs",
        type=int,
        default=3,
        metavar="K",
        help="how many of the best to try: the real model on fake tensors, in half a minute (default: 3)",
    )
    parser.add_argument("--top", type=int, default=5, metavar="K", help="layouts to show (default: 5)")
    add_set_option(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the best layout as a recipe, FILE.yaml")
    parser.add_argument(
        "--sweep", type=_counts, default=(), metavar="N,N", help="show how the recipe scales to these numbers of GPUs"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the sweep, such as to scaling.png")


def _counts(text: str) -> list[int]:
    try:
        return [int(count) for count in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be numbers joined by commas, such as 8,64,512") from None


def run(args: argparse.Namespace) -> int:
    from megatron_txssm.planning.plan import plan

    return plan(
        args.recipe,
        gpus=args.gpus,
        gpu=args.gpu,
        rates=args.rates,
        calibrate=args.calibrate,
        nodes_of=args.nodes_of,
        gpu_memory=args.gpu_memory,
        memory_fraction=args.memory_fraction,
        target_tokens=args.target_tokens,
        top=args.top,
        layout=args.layout,
        dry_runs=args.dry_runs,
        overrides=args.overrides,
        out=args.out,
        sweep=args.sweep,
        plot=args.plot,
    )
