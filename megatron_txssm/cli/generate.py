"""txssm generate: continue a prompt with a Megatron checkpoint or a Hugging Face model."""

import argparse
import sys

from megatron_txssm.cli.parsing import Subparsers, add_verb
from megatron_txssm.evaluation.generate import generate
from megatron_txssm.evaluation.sampling import Sampling

EXAMPLES = (
    "txssm generate runs/demo --prompt 'def main('",
    "txssm generate exports/demo --prompt 'import os' --temperature 0 --max-new-tokens 50",
    "txssm generate runs/transxssm_1.3b --step 20000 --prompt 'The aim of'",
    "txssm generate --hub HuggingFaceTB/SmolLM2-135M --prompt 'The aim of'",
    "txssm generate exports/demo --prompt - --top-p 0.9 --repetition-penalty 1.1 < prompt.txt",
)


def add_parser(subparsers: Subparsers) -> None:
    parser = add_verb(subparsers, "generate", EXAMPLES)
    parser.add_argument(
        "model",
        metavar="CHECKPOINT_OR_HF",
        help="a run, its checkpoints, a Hugging Face folder or, with --hub, a model's name",
    )
    parser.add_argument("--hub", action="store_true", help="load the model from the Hugging Face hub")
    parser.add_argument("--step", type=int, metavar="N", help="step of the checkpoint (default: the newest)")
    parser.add_argument(
        "--prompt", required=True, metavar="TEXT", help="the text to continue; - reads it from standard input"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=100, metavar="N", help="maximum number of tokens (default: 100)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.8, metavar="T", help="0 always takes the likeliest token (default: 0.8)"
    )
    parser.add_argument(
        "--top-k",
        type=int,
        default=50,
        metavar="K",
        help="sample from the K likeliest tokens; 0: from all (default: 50)",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample from the likeliest tokens that together have probability P (default: 1, from all)",
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="R",
        help="above 1: make tokens that occur in the text less likely (default: 1)",
    )
    parser.add_argument("--seed", type=int, default=1234, help="random seed of the sampling (default: 1234)")


def run(args: argparse.Namespace) -> int:
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.repetition_penalty)
    prompt = sys.stdin if args.prompt == "-" else args.prompt
    words = {"hub": args.hub, "step": args.step, "max_new_tokens": args.max_new_tokens, "seed": args.seed}
    return generate(args.model, prompt, sampling=sampling, **words)
