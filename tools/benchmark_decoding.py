#!/usr/bin/env python3
"""Speed and memory of decoding: TransXSSM and transformers' own LlamaForCausalLM with as many parameters.

All in one run on one machine, with random weights. Tokens are decoded one by one after a context, by the model's
forward and its cache: TransXSSMCache, or DynamicCache, which copies all keys and values at each token. With "-static"
it is TransXSSMCache(max_cache_len) or StaticCache, and with "-compiled" these under torch.compile (needs g++). Rivals
take turns, and the median round counts. All caches are in memory at once: use fewer rivals for long contexts.

The context is not read: the caches are filled with random keys, values and states of the shapes that it would leave,
which avoids a slow prefill and does not affect the cost of decoding. The table of bytes counts the tensors of such
caches on torch's meta device, which takes no memory.

    .venv/bin/python tools/benchmark_decoding.py
    .venv/bin/python tools/benchmark_decoding.py --context 1024 4096 16384 --dtype bf16 --json decoding.json
    .venv/bin/python tools/benchmark_decoding.py --context 65536 --rivals transxssm llama
    .venv/bin/python tools/benchmark_decoding.py --layers 8 --hidden-size 256 --heads 4 --intermediate-size 704 \\
        --llama-intermediate-size 688 --vocab-size 4096 --rounds 9
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.cache_utils import StaticLayer

from megatron_txssm.check.gpu.measurements.decoding import filled_cache
from megatron_txssm.hf import TransXSSMCache, TransXSSMConfig
from megatron_txssm.hf.cache_transxssm import StateSpaceCacheLayer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TABLE = (1024, 4096, 16384)
WARM_UP = 3
RIVALS = tuple(f"{model}{how}" for how in ("", "-static", "-compiled") for model in ("transxssm", "llama"))


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    configs = {"transxssm": transxssm_config(args), "llama": llama_config(args)}
    models = {
        name: AutoModelForCausalLM.from_config(config, dtype=DTYPES[args.dtype]).eval()
        for name, config in configs.items()
    }
    sizes = {name: sum(parameter.numel() for parameter in model.parameters()) for name, model in models.items()}
    print(f"batch {args.batch}, {args.dtype}, {args.threads} threads, {args.tokens} tokens in {args.rounds} rounds")
    print(f"parameters: transxssm {sizes['transxssm']:,}  llama {sizes['llama']:,}", flush=True)
    result: dict[str, Any] = {"settings": vars(args) | {"json": str(args.json)}, "parameters": sizes}
    result["cache_bytes"] = {context: compare_bytes(configs, args, context) for context in TABLE}
    for context in args.context:
        result.setdefault("decoding", {})[context] = compare_speed(models, args, context)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    number: dict[str, Any] = {"type": int, "metavar": "N"}
    parser.add_argument("--context", nargs="+", default=[4096], help="tokens before (default: 4096)", **number)
    parser.add_argument(
        "--rivals",
        nargs="+",
        choices=RIVALS,
        default=["transxssm", "llama", "llama-static"],
        help="(default: %(default)s)",
    )
    parser.add_argument("--tokens", default=32, help="decoded in each round (default: %(default)s)", **number)
    parser.add_argument("--rounds", default=5, help="of each rival and context (default: %(default)s)", **number)
    parser.add_argument("--batch", default=1, help="texts at a time (default: %(default)s)", **number)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="(default: %(default)s)")
    parser.add_argument("--threads", default=len(os.sched_getaffinity(0)), help="(default: all cores)", **number)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write settings and all figures there, too")
    shapes = parser.add_argument_group("shapes (default: the paper's 320M model)")
    shapes.add_argument("--hidden-size", default=768, **number)
    shapes.add_argument("--layers", default=24, help="of TransXSSM every eighth is attention", **number)
    shapes.add_argument("--heads", default=12, help="of attention", **number)
    shapes.add_argument("--state-size", default=128, **number)
    shapes.add_argument("--state-groups", default=4, **number)
    shapes.add_argument("--intermediate-size", default=4224, **number)
    shapes.add_argument("--llama-intermediate-size", default=4096, **number)
    shapes.add_argument("--vocab-size", default=50277, **number)
    return parser.parse_args()


def transxssm_config(args: argparse.Namespace) -> TransXSSMConfig:
    return TransXSSMConfig(
        intermediate_size=args.intermediate_size,
        state_size=args.state_size,
        state_num_groups=args.state_groups,
        **common_settings(args),
    )


def llama_config(args: argparse.Namespace) -> LlamaConfig:
    return LlamaConfig(intermediate_size=args.llama_intermediate_size, **common_settings(args))


def common_settings(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "hidden_size": args.hidden_size,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "vocab_size": args.vocab_size,
        "max_position_embeddings": max(*args.context, *TABLE) + args.tokens,
        "tie_word_embeddings": True,
    }


def own_cache(config: Any, args: argparse.Namespace, context: int, device: str, static: bool = False) -> Any:
    room = context + max(WARM_UP, args.tokens) + 1 if static else None
    return filled_cache(config, args.batch, context, DTYPES[args.dtype], device, room)


def rewind(cache: Any, tokens: int) -> None:
    """Back to the context's length; states are kept, because their size does not change."""
    for layer in cache.layers:
        if isinstance(layer, StaticLayer):
            layer.cumulative_length -= tokens
        elif not isinstance(layer, StateSpaceCacheLayer):
            layer.crop(-tokens)
    if isinstance(cache, TransXSSMCache):
        cache.seen_tokens -= tokens


def cache_bytes(cache: Any) -> int:
    if isinstance(cache, TransXSSMCache):
        return cache.nbytes()
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def compare_bytes(configs: dict[str, Any], args: argparse.Namespace, context: int) -> dict[str, int]:
    counted = {name: cache_bytes(own_cache(config, args, context, "meta")) for name, config in configs.items()}
    texts = "   ".join(f"{name} {count / 2**20:9.1f} MiB" for name, count in counted.items())
    print(f"cache at {context}:".ljust(24), texts, f"  ratio {counted['transxssm'] / counted['llama']:.3f}")
    return counted


@torch.inference_mode()
def compare_speed(models: dict[str, Any], args: argparse.Namespace, context: int) -> dict[str, Any]:
    functions, caches = {}, {}
    for rival in args.rivals:
        name, _, how = rival.partition("-")
        functions[rival] = torch.compile(models[name]) if how == "compiled" else models[name]
        caches[rival] = own_cache(models[name].config, args, context, "cpu", static=bool(how))
        decode(functions[rival], caches[rival], args.batch, WARM_UP)
    seconds: dict[str, list[float]] = {rival: [] for rival in args.rivals}
    for turn in range(args.rounds):
        # The order alternates, so that no rival always follows the same other.
        for rival in sorted(args.rivals, reverse=bool(turn % 2)):
            seconds[rival].append(decode(functions[rival], caches[rival], args.batch, args.tokens))
    count = args.tokens * args.batch
    speeds = {rival: count / statistics.median(of_rounds) for rival, of_rounds in seconds.items()}
    ratios = {rival: speeds[args.rivals[0]] / speed for rival, speed in speeds.items()}
    print(f"decoding behind {context}, and how many times as fast {args.rivals[0]} is:")
    for rival, speed in speeds.items():
        print(f"  {rival:20} {speed:9.2f} tokens/s {ratios[rival]:9.3f}", flush=True)
    return {
        "tokens_per_second": speeds,
        "ratios": ratios,
        "seconds_of_rounds": seconds,
        "cache_bytes": {rival: cache_bytes(cache) for rival, cache in caches.items()},
    }


def decode(model: Any, cache: Any, batch: int, tokens: int) -> float:
    """Seconds for `tokens` greedy tokens one by one, after one that is not timed; then the cache is rewound.

    The first is not timed because a write after a rewind may copy the cache first.
    """
    ids, begin = torch.zeros(batch, 1, dtype=torch.long), 0.0
    for step in range(tokens + 1):
        if step == 1:
            begin = time.perf_counter()
        ids = model(ids, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
    seconds = time.perf_counter() - begin
    rewind(cache, tokens + 1)
    return seconds


if __name__ == "__main__":
    main()
