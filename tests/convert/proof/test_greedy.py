"""What generate() is tried for: each way in which a model can read another text than it is given."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM, LlamaConfig, LlamaForCausalLM

from megatron_txssm.convert.proof.greedy import LENGTHS, NEW_TOKENS, try_generate
from megatron_txssm.hf.versions_transxssm import CACHE_NAME
from tests.hf.tiny import VARIANTS, random_ids, tiny_model

TOKENS = random_ids(1, sum(LENGTHS), seed=1)[0].tolist()


def llama() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=101, initializer_range=0.3, **sizes)).eval()


def granite(*layers: str) -> Any:
    torch.manual_seed(0)
    config = GraniteMoeHybridConfig(
        vocab_size=101,
        hidden_size=32,
        num_hidden_layers=len(layers),
        layer_types=list(layers),
        num_attention_heads=4,
        shared_intermediate_size=48,
        num_local_experts=0,
        mamba_n_heads=4,
        mamba_expand=1,
        mamba_d_state=8,
        initializer_range=0.3,
        use_cache="attention" in layers,
    )
    return GraniteMoeHybridForCausalLM(config).eval()


MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "granite": lambda: granite("mamba", "attention"),
    "granite without attention": lambda: granite("mamba", "mamba"),
    **{variant: lambda variant=variant: tiny_model(variant) for variant in VARIANTS},
}


@pytest.mark.parametrize("name", MODELS)
def test_a_right_model_passes(name: str) -> None:
    model = MODELS[name]()
    found = try_generate(model, TOKENS, 1e-5)
    assert found.passed, found.summary()
    cached = () if name == "granite without attention" else ("with a cache",)
    assert found.ways == ("in a padded batch", *cached)
    written = model.generate(torch.tensor([TOKENS[:24]]), max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=False)
    assert len(set(written[0, 24:].tolist())) > 2, "the same token again and again would show nothing"


def without(*names: str) -> Callable[[dict[str, Any]], None]:
    return lambda arguments: arguments.update(dict.fromkeys(names))


def crash(arguments: dict[str, Any]) -> None:
    if len(arguments["input_ids"]) > 1:
        raise ValueError("no such\nbatch")


@pytest.mark.parametrize(
    ("change", "way", "said"),
    [
        # A cache under another name is swallowed: each token sees itself alone.
        (without(CACHE_NAME, "attention_mask"), "with a cache", "text 1, new token 2 is "),
        (without("attention_mask"), "in a padded batch", "text 2, new token 1 is "),
        (crash, "in a padded batch", "ValueError: no such batch"),
    ],
)
def test_a_wrong_one_fails(monkeypatch: pytest.MonkeyPatch, change: Any, way: str, said: str) -> None:
    model = tiny_model()
    right = model.forward

    def wrong(*args: Any, **arguments: Any) -> Any:
        change(arguments)
        return right(*args, **arguments)

    monkeypatch.setattr(model, "forward", wrong)
    # generate() asks the forward pass which arguments it takes.
    monkeypatch.setattr(type(model), "_validate_model_kwargs", lambda *args: None)
    found = try_generate(model, TOKENS, 1e-5)
    assert not found.passed and found.different[way].startswith(said), found.summary()
    assert "NOT the same tokens" in found.summary()


def test_a_tie_may_end_either_way() -> None:
    model = tiny_model()
    embeddings: Any = model.get_input_embeddings()
    with torch.no_grad():
        # Every token has a twin.
        embeddings.weight[50:100] = embeddings.weight[:50]
    assert try_generate(model, TOKENS, 1e-5).passed
