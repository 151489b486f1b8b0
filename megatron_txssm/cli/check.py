"""txssm check <command>: verify parallel layouts, document isolation and a GPU's results on this machine."""

import argparse
from pathlib import Path

from megatron_txssm.cli.parsing import Subparsers, add_commands, add_set_option
from megatron_txssm.errors import UserError

# Command -> (one line of help, examples).
COMMANDS = {
    "parity": (
        "compare the loss and every gradient of all parallel layouts with one process, for a scaled-down recipe",
        (
            "txssm check parity demo_cpu",
            "txssm check parity transxssm_1.3b --nproc 8 --set model.state_num_groups=2",
            "txssm check parity my_recipe.yaml --nproc 2 --layout tp2_sp --layout pp2_vpp2",
            "txssm check parity demo_cpu --fuzz 300 --seed 7",
        ),
    ),
    "leakage": (
        "verify that with data.isolate_documents, a document's logits do not depend on other documents, bit for bit",
        (
            "txssm check leakage demo_cpu",
            "txssm check leakage transxssm_1.3b --packings 1000 --layout tp2_sp_cp2",
        ),
    ),
    "gpu": (
        "on a GPU node, check this installation's results and compare its speed with Llama 3, in ten minutes",
        (
            "txssm check gpu",
            "srun --gpus=1 --cpus-per-task=8 txssm check gpu --out gpu-check.json",
            "txssm check gpu --only kernels,trainings --budget 200",
            "txssm check gpu --device cpu --small   # the check itself, on a machine without a GPU",
        ),
    ),
}

# The parts in check/gpu/parts.py, which is imported only when needed.
GPU_PARTS = (
    "environment",
    "kernels",
    "trainings",
    "variants",
    "bandwidth",
    "speed",
    "scan",
    "decoding",
    "long",
)


def add_parser(subparsers: Subparsers) -> None:
    add = {"parity": _add_parity, "leakage": _add_leakage, "gpu": _add_gpu}
    for name, command in add_commands(subparsers, "check", COMMANDS).items():
        add[name](command)


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument("recipe", metavar="RECIPE", help="a name that `txssm recipes` lists, or a YAML file")
    command.add_argument(
        "--nproc", type=int, default=4, metavar="N", help="maximum number of processes of a layout (default: 4)"
    )
    add_set_option(command)
    command.add_argument(
        "--layout",
        action="append",
        default=[],
        metavar="NAME",
        help="check only this layout, such as tp2_sp, or `recipe` for the recipe's own; repeatable (default: all)",
    )
    command.add_argument("--seed", type=int, default=0, metavar="S", help="random seed (default: 0)")


def _add_parity(command: argparse.ArgumentParser) -> None:
    _add_common(command)
    command.add_argument("--steps", type=int, default=2, metavar="N", help="number of optimizer steps (default: 2)")
    command.add_argument(
        "--precision",
        choices=("fp64", "fp32"),
        default="fp64",
        help="precision of the computation (default: fp64, in which rounding neither hides a fault nor looks like one)",
    )
    command.add_argument(
        "--fuzz",
        type=int,
        metavar="N",
        help="check N random architectures, lengths and layouts instead of the recipe's",
    )


def _add_leakage(command: argparse.ArgumentParser) -> None:
    _add_common(command)
    command.add_argument(
        "--packings", type=int, default=200, metavar="N", help="number of random packings (default: 200)"
    )


def _add_gpu(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--budget",
        type=int,
        default=600,
        metavar="SECONDS",
        help="time budget; parts that would exceed it are skipped (default: 600)",
    )
    command.add_argument("--only", default="", metavar="PART,PART", help=f"check only these, of {', '.join(GPU_PARTS)}")
    command.add_argument(
        "--out",
        type=Path,
        default=Path("gpu-check.json"),
        metavar="FILE",
        help="write all figures to this file (default: gpu-check.json)",
    )
    command.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="device to check (default: cuda)")
    command.add_argument("--small", action="store_true", help="use small sizes, for a machine without a GPU")


def run(args: argparse.Namespace) -> int:
    # Imported here: --help does not need them.
    if args.command == "gpu":
        from megatron_txssm.check.gpu.check import check_gpu

        parts = args.only.split(",") if args.only else ()
        return check_gpu(budget=args.budget, parts=parts, out=args.out, device=args.device, small=args.small)
    common = {"nproc": args.nproc, "overrides": args.overrides}
    if args.command == "leakage":
        from megatron_txssm.check.leakage import check_leakage

        return check_leakage(args.recipe, layouts=args.layout, seed=args.seed, packings=args.packings, **common)
    common |= {"steps": args.steps, "precision": args.precision}
    if args.fuzz is None:
        from megatron_txssm.check.parity import check_parity

        return check_parity(args.recipe, layouts=args.layout, **common)
    if args.layout:
        raise UserError("--fuzz draws its own layouts; leave --layout out")
    from megatron_txssm.check.fuzz import fuzz_parity

    return fuzz_parity(args.recipe, args.fuzz, seed=args.seed, **common)
