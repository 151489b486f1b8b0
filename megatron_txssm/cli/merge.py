"""txssm merge: the weighted mean of a run's checkpoints, as a model of its own."""

import argparse
from pathlib import Path

from megatron_txssm.checkpoint.merge_weights import DECAYS
from megatron_txssm.checkpoint.merging import merge
from megatron_txssm.cli.parsing import Subparsers, add_verb

EXAMPLES = (
    "txssm merge runs/demo --last 3",
    "txssm merge runs/transxssm_1.3b --steps 18000,19000,20000 --shape wsd --decay-shape minus_sqrt",
    "txssm merge runs/transxssm_1.3b --last 10 --shape ema --ema-decay 0.7 --out runs/merged_1.3b",
    "txssm eval loss runs/demo/merged/mean_160_to_320",
)


def add_parser(subparsers: Subparsers) -> None:
    parser = add_verb(subparsers, "merge", EXAMPLES)
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder, or its checkpoints")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--steps", type=_steps, metavar="N,N,...", default=(), help="steps of the checkpoints")
    which.add_argument("--last", type=int, metavar="N", help="the newest N checkpoints")
    parser.add_argument(
        "--shape",
        choices=("mean", "wsd", "ema"),
        default="mean",
        help="weights: equal; as if the learning rate had fallen as in WSD; falling into the past (default: mean)",
    )
    parser.add_argument(
        "--decay-shape", choices=tuple(DECAYS), help="of wsd (default: the recipe's optimizer.wsd_decay_shape)"
    )
    parser.add_argument(
        "--ema-decay",
        type=float,
        metavar="D",
        help="of ema: the weight of a checkpoint, relative to that of the next (default: 0.8)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="OUT", help="the run folder to create (default: RUN/merged/SHAPE_FIRST_to_LAST)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier merge")


def _steps(text: str) -> list[int]:
    try:
        return [int(step) for step in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of steps, such as 100,200") from None


def run(args: argparse.Namespace) -> int:
    return merge(
        args.run,
        args.out,
        steps=args.steps,
        last=args.last,
        shape=args.shape,
        decay_shape=args.decay_shape,
        ema_decay=args.ema_decay,
        overwrite=args.overwrite,
    )
