"""Continues a prompt with a Megatron checkpoint or a Hugging Face model."""

import os
import re
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TextIO

from megatron_txssm.checkpoint.saved_model import how_to_make, open_checkpoint
from megatron_txssm.convert.huggingface.folder import is_hf_folder
from megatron_txssm.errors import UserError
from megatron_txssm.evaluation.sampling import Sampling
from megatron_txssm.terminal import doing

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass(frozen=True)
class Request:
    """A text to continue, the model, and how to choose tokens."""

    # Path: Megatron's checkpoints. str: a folder, or a model's name on the Hugging Face hub.
    model: Path | str
    # For Megatron's checkpoints; None: the newest.
    step: int | None
    prompt: str
    max_new_tokens: int
    sampling: Sampling
    seed: int


def generate(
    model: str | Path,
    prompt: str | TextIO,
    *,
    hub: bool = False,
    step: int | None = None,
    max_new_tokens: int = 100,
    sampling: Sampling | None = None,
    seed: int = 1234,
) -> int:
    """Print a prompt and a model's continuation, token by token; returns the exit code.

    model: a run, its checkpoints (`step`: which; None: the newest), a Hugging Face folder, or with `hub` a name on the
    Hugging Face hub. prompt: the text, or a file that holds it, which is read once the model is found. UserError if
    there is no model.
    """
    if hub and not _HUB_NAME.fullmatch(str(model)):
        raise UserError(f"--hub {model}: a name on the Hugging Face hub is ORGANISATION/MODEL")
    place = Path(model).expanduser()
    of_transformers = hub or is_hf_folder(place)
    if step is not None and of_transformers:
        raise UserError(f"--step {step} is of checkpoints, but {model} is a Hugging Face model; leave it out")
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {max_new_tokens} must be at least 1")
    _check_not_empty(prompt)
    if not of_transformers and not os.path.exists(place) and _HUB_NAME.fullmatch(str(model)):
        raise UserError(f"{place}: no such folder; {how_to_make(place)} (add --hub for a name on the Hugging Face hub)")
    saved = None if of_transformers else open_checkpoint(place, step)
    text = prompt if isinstance(prompt, str) else prompt.read()
    _check_not_empty(text)
    request = Request(str(model) if hub else str(place), step, text, max_new_tokens, sampling or Sampling(), seed)
    if saved is None:
        return write(request, sys.stdout)
    return _by_megatron(replace(request, model=saved.checkpoints, step=saved.step))


def _check_not_empty(prompt: str | TextIO) -> None:
    if prompt == "":
        raise UserError("--prompt is empty; give at least one character")


def _by_megatron(request: Request) -> int:
    """Send Megatron's output to a log, which is kept only after a failure."""
    from megatron_txssm.session.output import run_redirected

    handle, name = tempfile.mkstemp(prefix="txssm-generate-", suffix=".log")
    os.close(handle)
    log = Path(name)
    code = 0
    try:
        code = run_redirected(log, partial(write, request))
    finally:
        if code == 0:
            log.unlink()
    return code


def write(request: Request, terminal: TextIO) -> int:
    """Load the model, and write the prompt and its continuation to `terminal`, piece by piece."""
    from megatron_txssm.checkpoint.load import load_model
    from megatron_txssm.evaluation.decoding import HfDecoder, MegatronDecoder, generate_tokens

    prompt = request.prompt
    with doing(f"loading {request.model}", terminal):
        if isinstance(request.model, Path):
            loaded = load_model(request.model, step=request.step)
            # A token has at least one byte.
            decoder = MegatronDecoder(loaded, request.model, len(prompt.encode()) + request.max_new_tokens)
        else:
            decoder = HfDecoder(request.model)
    try:
        tokens = decoder.encode(prompt)
    except ValueError as error:
        raise UserError(f"--prompt {prompt!r} cannot be tokenised: {error}") from error
    if not tokens:
        raise UserError(f"--prompt {prompt!r} gives no token; give more text")
    print(f"{decoder.description}\n\n{prompt}", file=terminal, end="", flush=True)
    written, new = decoder.decode(tokens), list[int]()
    begin = first = time.perf_counter()
    for token in generate_tokens(decoder, tokens, request.max_new_tokens, request.sampling, request.seed):
        if not new:
            first = time.perf_counter()
        if token == decoder.eod:
            break
        new.append(token)
        text = decoder.decode(tokens + new)
        # The last token may be the first bytes of a character that later tokens complete.
        if not text.endswith("\ufffd"):
            print(_shown(text[len(written) :], terminal), file=terminal, end="", flush=True)
            written = text
    # The rest, if a character was never completed.
    print(_shown(decoder.decode(tokens + new)[len(written) :], terminal), file=terminal, end="")
    print(f"\n\n{_speed(len(tokens), len(new), begin, first, time.perf_counter())}", file=terminal)
    return 0


def _shown(text: str, terminal: TextIO) -> str:
    """Replace control characters if the output is a terminal: a model may write anything."""
    if not terminal.isatty():
        return text
    return "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in text)


def _speed(prompt: int, new: int, begin: float, first: float, end: float) -> str:
    """The prompt's pass ends with the first new token; the others measure the decoding speed."""
    said = f"{prompt} tokens of prompt in {first - begin:.1f} s, {new} new tokens"
    return said if new < 2 else f"{said}, {(new - 1) / (end - first):.1f} tokens/s"
