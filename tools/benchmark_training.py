#!/usr/bin/env python3
"""A training step of TransXSSM and of Llama 3 with as many parameters, in Megatron's loop, one process, in one run.

Llama 3 runs with torch's fused attention and, for comparison with the paper, with materialised scores. All take turns:
each turn is a process that trains a few steps on mock data; its first step warms up, and the median of all others
counts. Beside each ratio of times is that of the models' FLOPs (megatron_txssm/architecture/flops.py), which is the
same for materialised scores.

For CPUs; on a GPU, use `txssm check gpu --only speed`.

    .venv/bin/python tools/benchmark_training.py
    .venv/bin/python tools/benchmark_training.py --lengths 4096 --turns 1 --steps 5 --no-materialised
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.session.hooks import Call, Listener, listen

MODELS = ("transxssm", "llama3", "llama3 materialised")


def main() -> None:
    args = parse_arguments()
    if args.worker:
        work(args.worker[0], int(args.worker[1]), args)
        return
    refuse_gpus()
    models = MODELS if args.materialised else MODELS[:2]
    for length in args.lengths:
        steps: dict[str, list[float]] = {model: [] for model in models}
        for _ in range(args.turns):
            for model in models:
                steps[model] += in_a_process(model, length, args)
        medians = {model: statistics.median(seconds) for model, seconds in steps.items()}
        ours = medians.pop("transxssm")
        print(f"{length:6d} tokens: transxssm {ours:.2f} s", flush=True)
        by_flops = flops(MODELS[1], length, args) / flops(MODELS[0], length, args)
        for model, seconds in medians.items():
            print(f"    {model} {seconds:.2f} s: {comparison(seconds / ours, by_flops)}", flush=True)


def comparison(ratio: float, by_flops: float) -> str:
    verdict = "faster" if ratio > by_flops else "not faster"
    return f"{ratio:.2f}x, {by_flops:.3f}x by FLOPs: {verdict} than FLOPs alone explain"


def flops(model: str, length: int, args: argparse.Namespace) -> float:
    """Model FLOPs of one step, forward and backward."""
    from megatron_txssm.architecture.flops import flops_per_token

    recipe = small_recipe(model, length, args)
    return length * flops_per_token(recipe.sizes, length)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    number: dict[str, Any] = {"type": int, "metavar": "N"}
    parser.add_argument("--lengths", nargs="+", default=[4096, 8192, 16384], help="tokens of the one sample", **number)
    parser.add_argument("--turns", default=3, help="of each model (default: %(default)s)", **number)
    parser.add_argument(
        "--steps", default=3, help="of each turn, the first not counted (default: %(default)s)", **number
    )
    parser.add_argument("--threads", default=len(os.sched_getaffinity(0)), help="(default: all cores)", **number)
    parser.add_argument("--vocab-size", default=4096, help="small, as both models share it (default: 4096)", **number)
    parser.add_argument("--no-materialised", dest="materialised", action="store_false")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def refuse_gpus() -> None:
    """Exit on a GPU: fp32 in local modules is not how a GPU trains, and the timing does not synchronise with it."""
    import torch

    if torch.cuda.is_available():
        print("error: this measures CPUs; on a GPU, use: txssm check gpu --only speed", file=sys.stderr)
        sys.exit(2)


def in_a_process(model: str, length: int, args: argparse.Namespace) -> list[float]:
    options = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in ("steps", "threads", "vocab_size")]
    words = [sys.executable, __file__, "--worker", model, str(length), *options]
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{model} at {length} tokens failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def small_recipe(model: str, length: int, args: argparse.Namespace) -> Recipe:
    """The 320M recipe of a model, a third of it, on data in the current folder."""
    from megatron_txssm.recipe.loader import load_recipe

    sizes = {
        # Eight blocks of each model.
        "model.layer_pattern": load_recipe(f"{model.split()[0]}_320m").layers[:16],
        "training.seq_length": length,
        "training.global_batch_tokens": length,
        "training.micro_batch_size": 1,
        "training.train_tokens": "null",
        "training.train_iters": args.steps,
        "training.precision": "fp32",
        "training.transformer_impl": "local",
        "parallel.use_distributed_optimizer": "false",
        "data.tokenizer_type": "NullTokenizer",
        "data.vocab_size": args.vocab_size,
        "checkpoint.save_interval": "null",
        "logging.log_interval": 1,
        "logging.eval_iters": 0,
        "logging.tensorboard": "false",
        "data.blend": "tokens",
        "data.split": "100,0,0",
        "megatron.overlap_grad_reduce": "null",
        "megatron.overlap_param_gather": "null",
    }
    return load_recipe(f"{model.split()[0]}_320m", tuple(f"{name}={value}" for name, value in sizes.items()))


def work(model: str, length: int, args: argparse.Namespace) -> None:
    """Print the seconds of every step except the first."""
    from megatron_txssm.check.tokens import write_tokens
    from megatron_txssm.training.pretrain import pretrain

    write_tokens(Path("tokens"), args.vocab_size)
    recipe = small_recipe(model, length, args)
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="0")
    if "materialised" in model:
        materialise_scores()
    seconds: list[float] = []
    watch_steps(seconds)
    with open(os.devnull, "w") as nowhere:
        pretrain(recipe, nowhere)
    print(json.dumps(seconds[1:]))


def watch_steps(seconds: list[float]) -> None:
    """Time every forward, backward and optimizer step of Megatron's loop."""
    from megatron_txssm.platform import prepare_platform

    prepare_platform()
    listen(StepTimes(seconds))


class StepTimes(Listener):
    def __init__(self, seconds: list[float]):
        self.seconds = seconds

    def around_step(self, call: Call, proceed: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = proceed()
        self.seconds.append(time.perf_counter() - start)
        return result


def materialise_scores() -> None:
    """Replace core attention by the softmax of a matrix of all scores."""
    from megatron_txssm.platform import prepare_platform

    prepare_platform()
    import torch
    import torch.nn.functional as F

    def attend(query: Any, key: Any, value: Any, is_causal: bool = False, **options: Any) -> Any:
        length = query.shape[-2]
        scores = query @ key.mT * query.shape[-1] ** -0.5
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ value

    F.scaled_dot_product_attention = attend  # pyright: ignore[reportAttributeAccessIssue]


if __name__ == "__main__":
    main()
