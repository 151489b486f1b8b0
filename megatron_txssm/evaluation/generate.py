"""txssm generate: continue a prompt, from one of Megatron's checkpoints or from a Hugging Face model."""

import argparse
import os
import re
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

from megatron_txssm.checkpoint.saved_model import how_to_make, open_checkpoint
from megatron_txssm.cli import add_verb
from megatron_txssm.convert.hf_folder import is_hf_folder
from megatron_txssm.errors import UserError, readable
from megatron_txssm.terminal import doing

EXAMPLES = (
    "txssm generate runs/demo --prompt 'def main('",
    "txssm generate exports/demo --prompt 'import os' --temperature 0 --max-new-tokens 50",
    "txssm generate runs/transxssm_1.3b --step 20000 --prompt 'The aim of'",
    "txssm generate --hub HuggingFaceTB/SmolLM2-135M --prompt 'The aim of'",
    "txssm generate exports/demo --prompt - --top-p 0.9 --repetition-penalty 1.1 < prompt.txt",
)
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def add_parser(subparsers: Any) -> None:
    parser = add_verb(subparsers, "generate", EXAMPLES)
    parser.add_argument(
        "model", metavar="CHECKPOINT_OR_HF", help="a run, its checkpoints, a Hugging Face folder, or with --hub a name"
    )
    parser.add_argument("--hub", action="store_true", help="the model is a name on the Hugging Face hub")
    parser.add_argument("--step", type=int, metavar="N", help="which checkpoint (default: the newest)")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the text to continue; -: standard input")
    parser.add_argument(
        "--max-new-tokens", type=int, default=100, metavar="N", help="stop after N tokens (default: 100)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.8, metavar="T", help="0: the likeliest token each time (default: 0.8)"
    )
    parser.add_argument(
        "--top-k", type=int, default=50, metavar="K", help="sample from the K likeliest tokens; 0: all (default: 50)"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample from the likeliest tokens that together have probability P (default: 1, all)",
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="R",
        help="above 1: make tokens that stand in the text less likely (default: 1)",
    )
    parser.add_argument("--seed", type=int, default=1234, help="of the sampling (default: 1234)")


def run(args: argparse.Namespace) -> int:
    _check(args)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    if not prompt:
        raise UserError("--prompt is empty; give at least one character")
    model = Path(args.model).expanduser()
    if args.hub or is_hf_folder(model):
        args.model = args.model if args.hub else str(model)
        return write(args, prompt, sys.stdout)
    if not os.path.exists(model) and _HUB_NAME.fullmatch(args.model):
        raise UserError(f"{model}: no such folder; {how_to_make(model)} (add --hub for a name on the Hugging Face hub)")
    saved = open_checkpoint(model, args.step)
    args.model, args.step = saved.checkpoints, saved.step
    return _by_megatron(args, prompt)


def _check(args: argparse.Namespace) -> None:
    if args.hub and not _HUB_NAME.fullmatch(args.model):
        raise UserError(f"--hub {args.model}: a name on the Hugging Face hub is ORGANISATION/MODEL")
    if args.step is not None and (args.hub or is_hf_folder(Path(args.model).expanduser())):
        raise UserError(f"--step {args.step} is of checkpoints, but {args.model} is a Hugging Face model; leave it out")
    least = {"max_new_tokens": 1, "temperature": 0, "top_k": 0}
    for name, value in least.items():
        if not getattr(args, name) >= value:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least {value}")
    if not 0 < args.top_p <= 1:
        raise UserError(f"--top-p {args.top_p} must be above 0 and at most 1")
    if not args.repetition_penalty > 0:
        raise UserError(f"--repetition-penalty {args.repetition_penalty} must be above 0; 1 changes nothing")


def _by_megatron(args: argparse.Namespace, prompt: str) -> int:
    """Megatron prints much: into a log, of which only a failure tells."""
    from megatron_txssm.training.output import output_redirected

    handle, name = tempfile.mkstemp(prefix="txssm-generate-", suffix=".log")
    os.close(handle)
    log = Path(name)
    failure: Exception | None = None
    with output_redirected(log) as terminal:
        try:
            write(args, prompt, terminal)
        except (UserError, BrokenPipeError, KeyboardInterrupt):
            log.unlink()
            raise
        except Exception as error:
            traceback.print_exc()
            failure = error
    if failure is not None:
        print(readable(f"error: {type(failure).__name__}: {failure}\nIts log: {log}"), file=sys.stderr)
        return 1
    log.unlink()
    return 0


def write(args: argparse.Namespace, prompt: str, terminal: TextIO) -> int:
    """Load the model and write the prompt and what follows it to `terminal`, piece by piece."""
    from megatron_txssm.evaluation.decoding import HfDecoder, MegatronDecoder, Sampling, generate_tokens

    with doing(f"loading {args.model}", terminal):
        if isinstance(args.model, Path):
            # A token has a byte at least.
            decoder = MegatronDecoder(args.model, len(prompt.encode()) + args.max_new_tokens, args.step)
        else:
            decoder = HfDecoder(args.model)
    try:
        tokens = decoder.encode(prompt)
    except ValueError as error:
        raise UserError(f"--prompt {prompt!r} cannot be tokenised: {error}") from error
    if not tokens:
        raise UserError(f"--prompt {prompt!r} gives no token; give more text")
    print(f"{decoder.description}\n\n{prompt}", file=terminal, end="", flush=True)
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.repetition_penalty)
    written, new = decoder.decode(tokens), list[int]()
    begin = first = time.perf_counter()
    for token in generate_tokens(decoder, tokens, args.max_new_tokens, sampling, args.seed):
        if not new:
            first = time.perf_counter()
        if token == decoder.eod:
            break
        new.append(token)
        text = decoder.decode(tokens + new)
        # The last token may be the first bytes of a character that the next ones complete.
        if not text.endswith("\ufffd"):
            print(_shown(text[len(written) :], terminal), file=terminal, end="", flush=True)
            written = text
    # A character that was never completed.
    print(_shown(decoder.decode(tokens + new)[len(written) :], terminal), file=terminal, end="")
    print(f"\n\n{_speed(len(tokens), len(new), begin, first, time.perf_counter())}", file=terminal)
    return 0


def _shown(text: str, terminal: TextIO) -> str:
    """On a terminal without what it would obey: a model may write anything."""
    if not terminal.isatty():
        return text
    return "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in text)


def _speed(prompt: int, new: int, begin: float, first: float, end: float) -> str:
    """The prompt's pass ends with the first new token; the others tell the speed of decoding."""
    said = f"{prompt} tokens of prompt in {first - begin:.1f} s, {new} new tokens"
    return said if new < 2 else f"{said}, {(new - 1) / (end - first):.1f} tokens/s"
