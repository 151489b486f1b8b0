"""Times prefill and decoding of a recipe's model as a transformers model with random weights, one text at a time."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_txssm import hf  # registers our model  # noqa: F401
from megatron_txssm.bench.models import DECODING, PREFILL
from megatron_txssm.check.gpu.measurements.decoding import filled_cache, seconds_of_decoding, wait_for_gpu
from megatron_txssm.convert.formats.config import hf_config
from megatron_txssm.convert.formats.format import choose_format
from megatron_txssm.errors import described
from megatron_txssm.recipe.loader import load_recipe

BATCH, WARM_UP = 1, 2


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Figures of each of the task's "prefill" lengths and "decoding" contexts: part -> length -> figures or an error.

    Lengths ascend, because on a CPU the process's memory is what counts.
    """
    torch.manual_seed(0)
    device, parts = task["device"], {PREFILL: _prefill, DECODING: _decode}
    model = _model(task, max(max(task[part], default=0) for part in parts) + task["tokens"] + WARM_UP)
    found: dict[str, Any] = {part: {} for part in parts}
    for part, function in parts.items():
        for length in sorted(task[part]):
            _reset_peak(device)
            found[part][str(length)] = _attempt(lambda at=function, n=length: at(model, n, task))
    return found


def _model(task: dict[str, Any], longest: int) -> Any:
    recipe = load_recipe(task["recipe"])
    format = choose_format(recipe, None)
    # Positions only limit what may be computed.
    fields = hf_config(recipe, format) | {"max_position_embeddings": longest, "dtype": None}
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    attention = "eager" if task["materialised"] else "sdpa"
    with torch.device(task["device"]):
        return AutoModelForCausalLM.from_config(config, dtype=_dtype(task), attn_implementation=attention).eval()


def _dtype(task: dict[str, Any]) -> torch.dtype:
    return torch.float32 if task["device"] == "cpu" else torch.bfloat16


def _attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The figures, or the error: a length that does not fit the memory must not lose the others."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        torch.cuda.empty_cache()
        return {"error": described(error)[:300]}


@torch.inference_mode()
def _prefill(model: Any, length: int, task: dict[str, Any]) -> dict[str, Any]:
    """Seconds until the next token's logits and the cache of a text are there."""
    ids = torch.randint(0, model.config.vocab_size, (BATCH, length), device=model.device)
    seconds: list[float] = []
    for _ in range(WARM_UP + task["steps"]):
        wait_for_gpu(model)
        began = time.perf_counter()
        model(ids, use_cache=True, logits_to_keep=1)
        wait_for_gpu(model)
        seconds.append(time.perf_counter() - began)
    return {"tokens": BATCH * length, "seconds": seconds[WARM_UP:], "peak_memory_bytes": _peak(task["device"])}


def _decode(model: Any, length: int, task: dict[str, Any]) -> dict[str, Any]:
    """Seconds of some tokens after a context, which is not read: the cache is filled with random values."""
    tokens, room = task["tokens"], length + WARM_UP + task["tokens"] if task["static_cache"] else None
    cache = filled_cache(model.config, BATCH, length, _dtype(task), task["device"], room)
    cached = sum(_bytes_of(layer) for layer in cache.layers)
    seconds = seconds_of_decoding(model, cache, WARM_UP, tokens)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return {"tokens": BATCH * tokens, "seconds": [seconds], "cache_bytes": cached, "weight_bytes": weights}


def _bytes_of(layer: Any) -> int:
    return layer.nbytes() if hasattr(layer, "nbytes") else layer.keys.nbytes + layer.values.nbytes


def _reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        # proc(5): "5" resets the peak resident size. Where it may not be written, the largest length so far counts.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def _peak(device: str) -> int:
    """Bytes: of tensors on a GPU, of this process on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    [kilobytes] = [line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line]
    return 1024 * int(kilobytes)
