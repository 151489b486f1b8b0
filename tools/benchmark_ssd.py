#!/usr/bin/env python3
"""Speed and memory of the state-space scan, forward and backward, and of two rivals in the same run.

Rivals: mamba-ssm's `ssd_minimal_discrete` (arXiv:2405.21060, listing 1) at its best chunk size, which needs B and C
repeated for every head, and torch's causal scaled_dot_product_attention with as many heads. All take turns; the median
round counts. Peak memory is measured in a separate process, above its memory before the first pass.

    .venv/bin/python tools/benchmark_ssd.py
    .venv/bin/python tools/benchmark_ssd.py --lengths 4096 --groups 12 --rounds 11 --no-attention
"""

import argparse
import functools
import importlib
import os
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_txssm.ops.ssd_torch import ssd_torch

# Installed by tools/bootstrap for the tests of the kernels.
RIVALS = Path(sys.prefix) / "mamba_ssm"
CHUNKS = (32, 64, 128)


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    if args.peak:
        print(peak_bytes(args.peak, args.lengths[0], args))
        return
    print(
        f"batch 1, {args.heads} heads of {args.head_dim}, state {args.state_size}, {args.groups} groups, fp32, ", end=""
    )
    print(f"{args.threads} threads, medians of {args.rounds} rounds", flush=True)
    contestants = [f"minimal {chunk}" for chunk in CHUNKS] + ["attention"] * args.attention
    ours = []
    for length in args.lengths:
        seconds = compare(["ours", *contestants], length, args)
        best = min((name for name in seconds if name.startswith("minimal")), key=seconds.__getitem__)
        ours.append(seconds["ours"])
        print(f"{length:6d} tokens: ours {seconds['ours']:.4f} s; ", end="")
        print(f"{best} {seconds[best]:.4f} s ({seconds[best] / seconds['ours']:.2f}x)", end="")
        if args.attention:
            print(f"; attention {seconds['attention']:.4f} s ({seconds['attention'] / seconds['ours']:.1f}x)", end="")
        peaks = [peak_in_a_process(name, length, args) for name in ("ours", best)]
        print(
            f"; peak {peaks[0] / 2**20:.0f} MiB against {peaks[1] / 2**20:.0f} ({peaks[0] / peaks[1]:.2f})", flush=True
        )
    print(f"ours, longest against shortest: {ours[-1] / ours[0]:.2f}x")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    number: dict[str, Any] = {"type": int, "metavar": "N"}
    parser.add_argument("--lengths", nargs="+", default=[4096, 16384], help="tokens (default: 4096 16384)", **number)
    parser.add_argument("--heads", default=12, help="(default: %(default)s)", **number)
    parser.add_argument("--groups", default=4, help="of heads that share B and C (default: %(default)s)", **number)
    parser.add_argument("--head-dim", default=64, help="(default: %(default)s)", **number)
    parser.add_argument("--state-size", default=128, help="(default: %(default)s)", **number)
    parser.add_argument("--rounds", default=5, help="of each (default: %(default)s)", **number)
    parser.add_argument("--threads", default=len(os.sched_getaffinity(0)), help="(default: all cores)", **number)
    parser.add_argument("--no-attention", dest="attention", action="store_false", help="leave the slow rival out")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(names: list[str], length: int, args: argparse.Namespace) -> dict[str, float]:
    """Median seconds of forward and backward, by contestant."""
    passes = {name: contestant(name, length, args) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_number in range(args.rounds + 1):
        for name, one_pass in passes.items():
            start = time.perf_counter()
            one_pass()
            # The first round warms up.
            if round_number:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def contestant(name: str, length: int, args: argparse.Namespace) -> Callable[[], None]:
    """A function that runs forward and backward, with gradients of all inputs."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, length, *shape, generator=generator)

    function: Any
    if name == "attention":
        leaves = [normal(args.heads, args.head_dim).transpose(1, 2).requires_grad_() for _ in range(3)]
        function = functools.partial(F.scaled_dot_product_attention, is_causal=True)
    else:
        x, dt = normal(args.heads, args.head_dim), F.softplus(normal(args.heads) - 4)
        A = -torch.empty(args.heads).uniform_(1, 16, generator=generator)
        B, C = (normal(args.groups, args.state_size) for _ in range(2))
        leaves = [t.requires_grad_() for t in (x, dt, A, B, C)]
        chunk = int(name.split()[-1]) if name != "ours" else None
        function = ours if chunk is None else functools.partial(minimal, chunk)
    cotangent = torch.randn(function(*leaves).shape, generator=generator)

    def one_pass() -> None:
        torch.autograd.grad(function(*leaves), leaves, cotangent)

    return one_pass


def ours(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    return ssd_torch(x, dt, A, B, C, chunk_size=256)[0]


def minimal(chunk: int, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    B, C = (t.repeat_interleave(x.shape[2] // t.shape[2], dim=2) for t in (B, C))
    return ssd_minimal_discrete()(x * dt[..., None], A * dt, B, C, chunk)[0]


@functools.cache
def ssd_minimal_discrete() -> Callable[..., tuple[Tensor, Tensor]]:
    """mamba-ssm's own function, imported without the package's __init__ and kernels, which need a GPU."""
    if not RIVALS.is_dir():
        sys.exit(f"no {RIVALS}; make env puts mamba-ssm there")
    sys.path.append(str(RIVALS))
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", "mamba_ssm.modules"):
        package = sys.modules[name] = types.ModuleType(name)
        package.__path__ = [str(RIVALS / name.replace(".", "/"))]
    kernels: Any = types.ModuleType("mamba_ssm.ops.triton.ssd_combined")
    kernels.mamba_chunk_scan_combined = None
    sys.modules[kernels.__name__] = kernels
    return importlib.import_module("mamba_ssm.modules.ssd_minimal").ssd_minimal_discrete


def peak_in_a_process(name: str, length: int, args: argparse.Namespace) -> int:
    shape = [f"--{option}={getattr(args, option.replace('-', '_'))}" for option in ("heads", "groups", "threads")]
    words = [sys.executable, __file__, f"--peak={name}", "--lengths", str(length), *shape]
    return int(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


def peak_bytes(name: str, length: int, args: argparse.Namespace) -> int:
    """The maximum that a pass adds to the resident size, including its inputs and their gradients."""
    # Loads the libraries.
    contestant(name, 256, args)()
    # Resets Linux's record of the peak resident size.
    Path("/proc/self/clear_refs").write_text("5")
    before = largest_resident_bytes()
    contestant(name, length, args)()
    return largest_resident_bytes() - before


def largest_resident_bytes() -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
