"""Conversion tasks on whole models, each in its own process: Megatron can be initialised only once per process.

    python -m megatron_txssm.convert.proof.worker TASK JSON

TASK is a function of this module, JSON its arguments. `run_task` runs one, with its output in a log.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Container
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_txssm.checkpoint.tensors import Weights, is_kept_in_fp32
from megatron_txssm.errors import UserError

if TYPE_CHECKING:
    import torch

    from megatron_txssm.files import Json

# Largest difference of fp32 logits, in units of the largest logit (at least 1): the order of sums differs.
TOLERANCE = 1e-5


class TaskFailed(Exception):
    """A task failed for a reason other than a user error; the message names its log."""


def run_task(task: str, **arguments: "Json | Path") -> None:
    """Run a task to its end; raises its UserError, or TaskFailed if it failed otherwise."""
    # -P: the current folder may be a download with its own json.py, which must not be imported.
    words = [sys.executable, "-P", "-m", "megatron_txssm.convert.proof.worker"]
    words += [task, json.dumps(arguments, default=str)]
    # Both sides of a comparison compute on the CPU.
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    handle, name = tempfile.mkstemp(prefix=f"txssm-{task}-", suffix=".log")
    code = None
    try:
        with open(handle, "w", encoding="utf-8") as log:
            done = subprocess.run(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False
            )
        code = done.returncode
        said = Path(name).read_text(encoding="utf-8", errors="replace").strip()
    finally:
        # The log is useful only after an unexpected failure.
        if code in (None, 0, 2):
            Path(name).unlink()
    if code == 2:
        raise UserError(said.rpartition("\nerror: ")[2].removeprefix("error: "))
    if code == -signal.SIGKILL:
        raise TaskFailed(
            f"{task} was killed, most likely for want of memory: it takes some 7 bytes a parameter; "
            "ask for more, or leave the proof out with --no-verify"
        )
    if code != 0:
        raise TaskFailed(f"{said.rpartition(chr(10))[2]} ({task}, exit code {code}; its log: {name})")


def save_megatron(folder: str, recipe: str, out: str, as_transxssm: bool = False, stated_by: str | None = None) -> None:
    """Write a Megatron checkpoint of a folder's weights, as a `release` in `out`; `recipe` is a recipe's YAML file.

    as_transxssm: the folder holds a Transformer, which recipe `stated_by` describes (None: the folder itself).

    The vocabulary's padding rows are the mean of its rows. A padding row's logit is then the mean logit, so by Jensen's
    inequality its probability is at most a token's average probability.
    """
    from megatron_txssm.checkpoint.load import WEIGHTS_ONLY, build_model, one_process_recipe
    from megatron_txssm.convert.from_transformer import FromTransformer
    from megatron_txssm.convert.huggingface.folder import HfFolder, open_hf_folder
    from megatron_txssm.recipe.changes import changed
    from megatron_txssm.recipe.loader import load_recipe

    made_by = load_recipe(recipe)
    source: HfFolder | FromTransformer
    if as_transxssm:
        transformer = open_hf_folder(Path(folder), load_recipe(stated_by) if stated_by else None)
        source = FromTransformer(transformer, made_by)
    else:
        source = open_hf_folder(Path(folder), made_by)
    options = [f"--save={out}", "--no-save-optim", "--no-save-rng"]
    one_process = one_process_recipe(changed(made_by, WEIGHTS_ONLY), Path(recipe))
    model = build_model(one_process, options, initialize=as_transxssm)
    _fill(model, source, source.shapes)
    from megatron.training.checkpointing import save_checkpoint

    save_checkpoint(0, [model], None, None, 0, release=True)


def _fill(model: "torch.nn.Module", source: Weights, names: Container[str]) -> None:
    """Copy the named tensors of `source` into a Megatron model of one process; all others stay as initialised."""
    import torch

    from megatron_txssm.model.shards import model_shards

    with torch.no_grad():
        # A SwiGLU's gate and up-projection are two shards of one tensor.
        for shard in model_shards(model):
            if shard.key not in names:
                continue
            assert shard.data is not None
            whole = _padded(source.read([shard.key])[shard.key], shard.global_shape[0])
            shard.data.copy_(whole[shard.global_slice()])


def _padded(tensor: "torch.Tensor", rows: int) -> "torch.Tensor":
    """Append rows to the vocabulary, each the mean of its rows."""
    padding = rows - len(tensor)
    if padding == 0:
        return tensor
    import torch

    mean = tensor.double().mean(0, keepdim=True).to(tensor.dtype)
    return torch.cat([tensor, mean.expand(padding, *mean.shape[1:])])


def megatron_logits(
    checkpoints: str,
    step: int,
    tokens: list[int],
    decoded: int,
    round_to: str | None,
    out: str,
    recipe: str | None = None,
) -> None:
    """Logits of a checkpoint by Megatron, in fp32, with weights rounded to `round_to` (None: as they are).

    `recipe`: YAML file of the recipe that trained it, if not the one beside it.

    Writes to `out`: "full", [L, V], from one pass over all tokens, and "decoded", [decoded, V], for the last tokens,
    read one at a time after a pass over the others.
    """
    import torch

    from megatron_txssm.checkpoint.load import WEIGHTS_ONLY, load_model
    from megatron_txssm.convert.proof.stepping import next_token_logits

    changes = {"training.precision": "fp32", **WEIGHTS_ONLY}
    loaded = load_model(Path(checkpoints), changes, step=step, recipe_file=Path(recipe) if recipe else None)
    # Megatron may only be imported from here on.
    from megatron.core.inference.contexts.static_context import StaticInferenceContext

    _round(loaded.model, round_to)
    vocab_size = loaded.recipe.data.vocab_size
    with torch.inference_mode():
        tokens_BL = torch.tensor([tokens], device=torch.cuda.current_device())
        positions_BL = torch.arange(len(tokens), device=tokens_BL.device)[None]
        full_LV = loaded.model(tokens_BL, positions_BL, None)[0, :, :vocab_size].float()
    context = StaticInferenceContext(max_batch_size=1, max_sequence_length=len(tokens))
    first = len(tokens) - decoded
    next_token_logits(loaded.model, context, tokens[:first], vocab_size)
    steps = [next_token_logits(loaded.model, context, [token], vocab_size) for token in tokens[first:]]
    _save(out, full_LV, steps)


def hf_logits(
    folder: str,
    recipe: str | None,
    tokens: list[int],
    decoded: int,
    round_to: str | None,
    out: str,
    generated: str | None = None,
) -> None:
    """The same for a folder of weights, by transformers; for formats without a class there, by our class.

    Also tries generate() (greedy.py), and writes the result to `generated`, as JSON.
    """
    import torch

    from megatron_txssm.convert.huggingface.folder import open_hf_folder
    from megatron_txssm.convert.huggingface.model import load_hf_model
    from megatron_txssm.convert.proof.greedy import try_generate
    from megatron_txssm.convert.proof.stepping import HfText
    from megatron_txssm.recipe.loader import load_recipe

    model = load_hf_model(open_hf_folder(Path(folder), load_recipe(recipe) if recipe else None))
    _round(model, round_to)
    first = len(tokens) - decoded
    with torch.inference_mode():
        tokens_BL = torch.tensor([tokens])
        full_LV = model(tokens_BL, use_cache=False).logits[0]
        text = HfText(model)
        text.next_logits(tokens[:first])
        steps = [text.next_logits([token]) for token in tokens[first:]]
    _save(out, full_LV, steps)
    if generated is not None:
        limit = TOLERANCE * max(1.0, full_LV.abs().max().item())
        Path(generated).write_text(json.dumps(asdict(try_generate(model, tokens, limit))), encoding="utf-8")


def _round(model: "torch.nn.Module", to: str | None) -> None:
    import torch

    for name, parameter in model.named_parameters():
        if to is not None and not is_kept_in_fp32(name):
            parameter.data = parameter.data.to(getattr(torch, to)).to(parameter.dtype)


def _save(out: str, full_LV: "torch.Tensor", steps: "list[torch.Tensor]") -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"full": full_LV.cpu().contiguous(), "decoded": torch.stack(steps).cpu()}, out)


TASKS = {task.__name__: task for task in (save_megatron, megatron_logits, hf_logits)}


def main() -> int:
    try:
        TASKS[sys.argv[1]](**json.loads(sys.argv[2]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
