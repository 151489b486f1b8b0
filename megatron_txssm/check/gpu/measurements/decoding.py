"""Tokens per second of greedy decoding after a context: TransXSSM and a Llama with as many parameters (320M)."""

import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, StaticCache

from megatron_txssm.hf import TransXSSMCache, TransXSSMConfig
from megatron_txssm.hf.cache_transxssm import StateSpaceCacheLayer

CONTEXTS = (4096, 16384, 65536)
BATCH, WARM_UP, TOKENS = 1, 4, 24
SHAPE: dict[str, Any] = {"hidden_size": 768, "num_hidden_layers": 24, "num_attention_heads": 12, "vocab_size": 50277}
OURS: dict[str, Any] = {"intermediate_size": 4224, "state_size": 128, "state_num_groups": 4}
LLAMA: dict[str, Any] = {"intermediate_size": 4096}
SMALL: dict[str, Any] = {"hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4, "vocab_size": 512}


def tokens_per_second(device: str, *, small: bool) -> dict[str, dict[str, float]]:
    """By context: {"TransXSSM", "Llama"}. The context is not read: caches are filled with random numbers instead."""
    contexts = (128,) if small else CONTEXTS
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    common = (SMALL if small else SHAPE) | {"max_position_embeddings": 2 * max(contexts)}
    configs = {"TransXSSM": TransXSSMConfig(**common, **OURS), "Llama": LlamaConfig(**common, **LLAMA)}
    speeds: dict[str, dict[str, float]] = {str(context): {} for context in contexts}
    for name, config in configs.items():
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        for context in contexts:
            cache = filled_cache(config, BATCH, context, dtype, device)
            speeds[str(context)][name] = BATCH * TOKENS / seconds_of_decoding(model, cache, WARM_UP, TOKENS)
    return speeds


def filled_cache(
    config: Any, batch: int, context: int, dtype: torch.dtype, device: str, max_cache_len: int | None = None
) -> Any:
    """The model's own cache as after `context` tokens, with random values; a static one with `max_cache_len`."""
    static = max_cache_len is not None
    kinds: Any = TransXSSMCache if isinstance(config, TransXSSMConfig) else StaticCache if static else DynamicCache
    cache = kinds(config=config, **({"max_cache_len": max_cache_len} if static else {}))
    key_shape: Any = (batch, config.num_key_value_heads, context, config.head_dim)
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, StateSpaceCacheLayer):
            shape: Any = (batch, config.state_num_heads, config.state_head_dim, config.state_size)
            layer.replace(torch.randn(shape, device=device), _conv_inputs(config, batch, dtype, device))
        else:
            keys, values = (torch.randn(key_shape, dtype=dtype, device=device) for _ in range(2))
            cache.update(keys, values, index)
    if isinstance(cache, TransXSSMCache):
        cache.count(context, torch.device(device))
    return cache


def _conv_inputs(config: Any, batch: int, dtype: torch.dtype, device: str) -> Any:
    """Random last inputs of a state-space layer's convolution; None if it has none."""
    if config.position_encoding != "conv1d_d":
        return None
    channels = config.state_inner_size + 2 * config.state_num_groups * config.state_size
    shape: Any = (batch, channels, config.conv_kernel - 1)
    return torch.randn(shape, dtype=dtype, device=device)


@torch.inference_mode()
def seconds_of_decoding(model: Any, cache: Any, warm_up: int, tokens: int) -> float:
    """Of `tokens` greedy tokens one by one, after `warm_up` others; the cache has been filled for one text."""
    ids = torch.zeros(BATCH, 1, dtype=torch.long, device=model.device)
    begin = 0.0
    for step in range(warm_up + tokens):
        if step == warm_up:
            wait_for_gpu(model)
            begin = time.perf_counter()
        ids = model(ids, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
    wait_for_gpu(model)
    return time.perf_counter() - begin


def wait_for_gpu(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
