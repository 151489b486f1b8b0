"""txssm bench: compare the speed and memory of models of one size."""

import argparse
import shlex
import sys
from pathlib import Path

from megatron_txssm.cli.parsing import Subparsers, add_commands

COMMANDS = {
    "throughput": (
        "time training, prefill and decoding of TransXSSM, Llama 3, Mamba-2 and Jamba over sequence lengths (figure 4)",
        (
            "txssm bench throughput",
            "txssm bench throughput --lengths 4096 16384 --turns 3 --parts training",
            "txssm bench throughput --preset 320m --models transxssm llama3 llama3_materialised",
            "txssm bench throughput --table",
            "srun --gpus=1 --cpus-per-task=8 txssm bench throughput --preset 1.3b --cuda-graph",
        ),
    ),
}


def add_parser(subparsers: Subparsers) -> None:
    parser = add_commands(subparsers, "bench", COMMANDS)["throughput"]
    parser.add_argument(
        "--preset",
        default="small",
        metavar="NAME",
        help="sizes: small, for CPUs, 15 minutes on two cores (default); 320m and 1.3b, the paper's, for a GPU",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder (default: runs/bench/throughput-PRESET)")
    parser.add_argument("--parts", nargs="+", metavar="PART", help="training, prefill, decoding (default: all)")
    parser.add_argument(
        "--models",
        nargs="+",
        metavar="MODEL",
        help="transxssm, llama3, llama3_materialised (attention's scores as a matrix), llama3_static_cache (decoding), "
        "mamba2, jamba (default: all)",
    )
    for option, about in (("--lengths", "of training and prefill"), ("--contexts", "before decoding")):
        parser.add_argument(option, nargs="+", type=int, metavar="N", help=f"tokens {about} (default: the preset's)")
    parser.add_argument("--turns", type=int, metavar="N", help="of each model, one after another (default: 2 or 3)")
    parser.add_argument("--steps", type=int, metavar="N", help="timed in each turn (default: small 3, others 6)")
    parser.add_argument("--cuda-graph", action="store_true", help="train each step as one CUDA graph")
    parser.add_argument("--table", action="store_true", help="measure nothing: show what there is")


def run(args: argparse.Namespace) -> int:
    from megatron_txssm.bench.plan import plan
    from megatron_txssm.bench.throughput import show_folder, throughput

    names = ("parts", "models", "lengths", "contexts", "turns", "steps")
    asked = plan(args.preset, **{name: getattr(args, name) for name in names})
    folder = args.out or Path("runs", "bench", f"throughput-{args.preset}")
    if args.table:
        show_folder(folder)
        return 0
    return throughput(asked, folder, cuda_graph=args.cuda_graph, command=shlex.join(["txssm", *sys.argv[1:]]))
