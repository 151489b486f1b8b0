"""txssm generate: continue a prompt token by token, with a cache of keys, values and states."""

import argparse
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from megatron_txssm.cli import add_verb
from megatron_txssm.errors import UserError

EXAMPLES = (
    "txssm generate runs/demo/checkpoints --prompt 'def main('",
    "txssm generate runs/demo/checkpoints --prompt 'import os' --temperature 0 --max-new-tokens 50",
)


def add_parser(subparsers: Any) -> None:
    parser = add_verb(subparsers, "generate", EXAMPLES)
    parser.add_argument("checkpoint", type=Path, help="a run's checkpoints folder")
    parser.add_argument("--prompt", required=True, help="the text to continue")
    parser.add_argument(
        "--max-new-tokens", type=int, default=100, metavar="N", help="stop after N tokens (default: 100)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0: the likeliest token each time (default: 0.8)"
    )
    parser.add_argument(
        "--top-k", type=int, default=50, help="sample from the k likeliest tokens; 0: all (default: 50)"
    )
    parser.add_argument("--seed", type=int, default=1234, help="of the sampling (default: 1234)")


def run(args: argparse.Namespace) -> int:
    for name, value, least in (("max-new-tokens", args.max_new_tokens, 1), ("temperature", args.temperature, 0)):
        if value < least:
            raise UserError(f"--{name} {value} must be at least {least}")
    if not args.prompt:
        raise UserError("--prompt is empty; give at least one character")
    from megatron_txssm.checkpoint.load import checkpoint_recipe
    from megatron_txssm.training.output import output_redirected

    checkpoint_recipe(args.checkpoint)
    handle, name = tempfile.mkstemp(prefix="txssm-generate-", suffix=".log")
    os.close(handle)
    log = Path(name)
    failure: Exception | None = None
    with output_redirected(log) as terminal:
        try:
            write(args, terminal)
        except (UserError, BrokenPipeError):
            log.unlink()
            raise
        except Exception as error:
            traceback.print_exc()
            failure = error
    if failure is not None:
        print(f"error: {type(failure).__name__}: {failure}\nIts log: {log}", file=sys.stderr)
        return 1
    log.unlink()
    return 0


def write(args: argparse.Namespace, terminal: TextIO) -> None:
    """Load the model and write the prompt and what follows it to `terminal`, piece by piece."""
    from megatron_txssm.checkpoint.load import load_model

    loaded = load_model(args.checkpoint)
    try:
        tokens = loaded.tokenizer.tokenize(args.prompt)
    except ValueError as error:
        raise UserError(f"--prompt {args.prompt!r} cannot be tokenised: {error}") from error
    print(f"step {loaded.iteration} of {args.checkpoint}\n\n{args.prompt}", file=terminal, end="")
    start, written, new = time.perf_counter(), loaded.tokenizer.detokenize(tokens), []
    for token in generate_tokens(
        loaded.model,
        tokens,
        args.max_new_tokens,
        vocab_size=loaded.tokenizer.vocab_size,
        temperature=args.temperature,
        top_k=args.top_k,
        seed=args.seed,
    ):
        if token == loaded.tokenizer.eod:
            break
        new.append(token)
        text = loaded.tokenizer.detokenize(tokens + new)
        # The last token may be the first bytes of a character that the next ones complete.
        if not text.endswith("\ufffd"):
            print(text[len(written) :], file=terminal, end="", flush=True)
            written = text
    seconds = time.perf_counter() - start
    print(f"\n\n{len(new)} tokens, {len(new) / seconds:.1f} tokens/s", file=terminal)


def generate_tokens(
    model: Any, prompt: list[int], max_new_tokens: int, *, vocab_size: int, temperature: float, top_k: int, seed: int
) -> Iterator[int]:
    """Token after token behind `prompt`. The prompt goes through in one pass; each token then costs the same, but for
    attention layers, whose cost grows with the keys they hold.
    """
    import torch
    from megatron.core.inference.contexts.static_context import StaticInferenceContext

    generator = torch.Generator().manual_seed(seed)
    context = StaticInferenceContext(max_batch_size=1, max_sequence_length=len(prompt) + max_new_tokens)
    tokens = prompt
    for _ in range(max_new_tokens):
        logits_V = next_token_logits(model, context, tokens, vocab_size)
        token = sample(logits_V, temperature=temperature, top_k=top_k, generator=generator)
        yield token
        tokens = [token]


def next_token_logits(model: Any, context: Any, tokens: list[int], vocab_size: int) -> Any:
    """[vocab_size] fp32 logits of the token behind `tokens`, which continue the sequence that `context` has seen.

    The embedding's padding rows behind `vocab_size` are no tokens.
    """
    import torch

    with torch.inference_mode():
        tokens_BL = torch.tensor([tokens], device=torch.cuda.current_device())
        positions_BL = torch.arange(len(tokens), device=tokens_BL.device)[None] + context.sequence_len_offset
        logits_BLV = model(tokens_BL, positions_BL, None, inference_context=context, runtime_gather_output=True)
    context.increment_sequence_len_offset(len(tokens))
    return logits_BLV[0, -1, :vocab_size].float()


def sample(logits_V: Any, *, temperature: float, top_k: int, generator: Any) -> int:
    """One token id: the likeliest at temperature 0, otherwise drawn from the `top_k` likeliest (0: from all)."""
    import torch

    if temperature == 0:
        return int(logits_V.argmax())
    values, ids = logits_V.topk(min(top_k, len(logits_V)) if top_k > 0 else len(logits_V))
    probabilities = torch.softmax(values / temperature, dim=-1).cpu()
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])
