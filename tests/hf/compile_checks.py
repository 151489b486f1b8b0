"""Compiles and exports the models, in a separate process: run by test_compiling.py.

The suite's own process cannot: its CPU platform replaces torch's functions with a mode under which torch.compile does
nothing, and buffers that threads keep between calls already exist.

    python -m tests.hf.compile_checks export aot_eager inductor
"""

import sys
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend
from transformers import CompileConfig

from megatron_txssm.hf import TransXSSMCache
from megatron_txssm.ops.rotary import apply_rotary
from tests.hf.tiny import VARIANTS, generate, padded_left, random_ids, tiny_model, worst_difference

# torch.empty returns NaN, as in the suite.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True  # pyright: ignore[reportAttributeAccessIssue]

TWO_LAYERS: dict[str, Any] = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}


def main() -> None:
    torch.set_num_threads(1)
    checks = {"export": check_export, "aot_eager": check_aot_eager, "inductor": check_inductor}
    for name in sys.argv[1:]:
        checks[name]()


def check_export() -> None:
    """Export first in the process, without and with gradients; then check that the model still computes the same."""
    model, ids, other = tiny_model(), random_ids(2, 40), random_ids(2, 40, seed=1)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            program = torch.export.export(model, (ids,), {"use_cache": False}).module()
            assert worst_difference(program(other, use_cache=False).logits, model(other).logits) < 2e-5


def check_aot_eager() -> None:
    """aot_eager traces both passes down to operators, as inductor does, but generates no code."""
    check_rotation()
    check_training("transxssm", "aot_eager", **TWO_LAYERS)
    check_training("jamba", "aot_eager", **TWO_LAYERS)
    check_training("experts", "aot_eager", **TWO_LAYERS, mlp_layer_types=["sparse", "dense"])
    check_packed_inference("jamba", "aot_eager", **TWO_LAYERS)
    check_decoding("jamba", **TWO_LAYERS)
    for variant in VARIANTS:
        check_static_decoding(variant, "aot_eager")


def check_inductor() -> None:
    check_training("transxssm", "inductor", **TWO_LAYERS)
    check_static_decoding("transxssm", "inductor")


def compiled(function: Any, backend: Any) -> Any:
    """Compiled from scratch, without graph breaks."""
    torch.compiler.reset()
    return torch.compile(function, backend=backend, fullgraph=True)


def check_training(variant: str, backend: str, **overrides: Any) -> None:
    model, (ids, mask) = tiny_model(variant, **overrides), padded_left()
    losses, gradients = [], []
    for function in (model, compiled(model, backend)):
        loss = function(ids, attention_mask=mask, labels=ids, use_cache=False).loss
        losses.append(loss)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    torch.testing.assert_close(losses[1], losses[0])
    for (name, _), expected, actual in zip(model.named_parameters(), *gradients, strict=True):
        assert worst_difference(actual, expected) < 1e-4 * expected.abs().max(), (variant, backend, name)


@torch.no_grad()
def check_packed_inference(variant: str, backend: str, **overrides: Any) -> None:
    model, ids = tiny_model(variant, **overrides), random_ids(2, 40)
    positions = torch.cat([torch.arange(13), torch.arange(27)])[None]
    functions = (model, compiled(model, backend))
    expected, actual = (f(ids, position_ids=positions, use_cache=False).logits for f in functions)
    assert worst_difference(actual, expected) < 2e-5, variant


@torch.no_grad()
def check_decoding(variant: str, **overrides: Any) -> None:
    """A prompt and two more tokens, each through a compiled forward with a cache."""
    model, ids = tiny_model(variant, **overrides), random_ids(2, 22)
    function, cache = compiled(model, "aot_eager"), None
    logits: list[Tensor] = []
    for part in ids.split([20, 1, 1], dim=1):
        output = function(part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    assert worst_difference(torch.cat(logits, dim=1), model(ids).logits) < 1e-4, variant


@torch.no_grad()
def check_static_decoding(variant: str, backend: str) -> None:
    """One graph decodes every token of two padded texts, by generate() and by forward alone."""
    model, (ids, mask) = tiny_model(variant), padded_left()
    graphs: list[Any] = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return lookup_backend(backend)(graph, inputs)

    torch.compiler.reset()
    options = CompileConfig(backend=counting, fullgraph=True, mode=None)  # pyright: ignore[reportArgumentType]
    # Also compile on a CPU.
    options._compile_all_devices = True  # pyright: ignore[reportAttributeAccessIssue]
    settings: dict[str, Any] = {"max_new_tokens": 24, "no_repeat_ngram_size": 2}
    for text, seen in ((ids, mask), (random_ids(4, 33, seed=1), mask[:, 7:])):
        expected = generate(model, text, seen, **settings)
        static = {"cache_implementation": "static", "compile_config": options}
        assert torch.equal(generate(model, text, seen, **static, **settings), expected), variant
    assert len(graphs) == 1, (variant, len(graphs))

    function, cache = compiled(model, counting), TransXSSMCache(model.config, 64)
    whole = torch.nn.functional.pad(mask, (0, 24))
    logits = [model(ids[:, :20], attention_mask=whole, past_key_values=cache).logits]
    for token in ids[:, 20:].split(1, dim=1):
        logits.append(function(token, attention_mask=whole, past_key_values=cache).logits)
    expected = model(ids, attention_mask=mask).logits
    assert worst_difference(torch.cat(logits, dim=1)[mask.bool()], expected[mask.bool()]) < 1e-4, variant
    assert len(graphs) == 2, (variant, len(graphs))


def check_rotation() -> None:
    x, angles = torch.randn(2, 5, 3, 8).bfloat16().requires_grad_(), torch.randn(5, 4)
    results = []
    for function in (apply_rotary, compiled(apply_rotary, "aot_eager")):
        y = function(x, angles.cos(), angles.sin())
        results.append((y, *torch.autograd.grad(y, x, torch.ones_like(y))))
    torch.testing.assert_close(*results)


if __name__ == "__main__":
    main()
