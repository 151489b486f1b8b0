"""Parameter and FLOP formulas against the model that Megatron builds, and against a FLOP counter."""

from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_txssm.architecture.flops import FORWARD_AND_BACKWARD, flops_per_token
from megatron_txssm.architecture.layer_pattern import ATTENTION, STATE_SPACE
from megatron_txssm.architecture.parameters import count_parameters
from megatron_txssm.model.state_space_mixer import StateSpaceMixer
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.recipe import Recipe
from tests.support.built_model import build_model

ARCHITECTURES = ("transxssm_320m", "llama3_320m", "mamba2_320m", "jamba_320m")
# All sizes differ, which exposes a formula that uses the wrong one.
SMALL = [
    "model.hidden_size=48",
    "model.ffn_hidden_size=80",
    "model.num_attention_heads=6",
    "model.num_query_groups=2",
    "model.state_head_dim=12",
    "model.state_size=20",
    "model.state_num_groups=2",
    "model.chunk_size=16",
    "data.vocab_size=200",
    # Nothing is read, but a corpus would have to exist.
    "data.train=a",
    "data.validation=a",
    "data.tokenizer_model=b",
    "training.seq_length=64",
    "training.global_batch_tokens=64",
    "training.train_tokens=6400",
    "training.micro_batch_size=1",
    "training.precision=fp32",
    "training.transformer_impl=local",
]
EXPERTS = [
    "model.num_experts=5",
    "model.moe_router_topk=3",
    "model.moe_ffn_hidden_size=28",
    "model.moe_shared_expert_intermediate_size=36",
]
VARIANTS = [
    *((name, []) for name in ARCHITECTURES),
    ("transxssm_320m", ["model.state_gated=true"]),
    ("transxssm_320m", ["model.tie_embeddings=false"]),
    ("transxssm_320m", ["model.layer_pattern=M-*-", "model.ablation=no_norm"]),
    ("jamba_320m", ["model.state_gated=false", "model.tie_embeddings=false"]),
    ("transxssm_320m", ["model.layer_pattern=M-*-M-/*M-/*M-"]),
    ("transxssm_320m", ["model.position_encoding=a_t", "model.layer_pattern=M-*-M-*-", "model.state_dt_bias=false"]),
    ("transxssm_320m", ["model.layer_pattern=MEM-*EM", *EXPERTS]),
    ("llama3_320m", ["model.layer_pattern=*E*-*E", "model.num_experts=3", "model.tie_embeddings=false"]),
]


@pytest.fixture(params=VARIANTS, ids=lambda variant: "-".join([variant[0], *(s.split(".")[1] for s in variant[1])]))
def recipe(request: pytest.FixtureRequest) -> Recipe:
    name, changes = request.param
    eight_blocks = load_recipe(name, SMALL).layers[:16]
    return load_recipe(name, [*SMALL, f"model.layer_pattern={eight_blocks}", *changes])


@pytest.fixture
def model(one_process: None, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> Any:
    return build_model(recipe, monkeypatch)


def test_every_parameter_is_counted(recipe: Recipe, model: Any) -> None:
    counted = count_parameters(recipe.sizes)
    mixers = [module for module in model.modules() if isinstance(module, StateSpaceMixer)]
    padding = sum(mixer.padding for mixer in mixers) * recipe.model.hidden_size
    assert counted.total == sum(parameter.numel() for parameter in model.parameters()) - padding
    experts: list[Any] = [module for module in model.modules() if isinstance(module, MoELayer)]
    assert counted.experts == sum(parameter.numel() for layer in experts for parameter in layer.parameters())
    # All but the tokens' choice of each layer, of experts of one size.
    unused = [list(layer.experts.local_experts)[layer.config.moe_router_topk :] for layer in experts]
    assert counted.inactive == sum(p.numel() for some in unused for expert in some for p in expert.parameters())
    assert counted.state_space == sum(mixer.num_params() for mixer in mixers)


def test_flops_are_those_of_the_model(recipe: Recipe, model: Any) -> None:
    """Forward and backward; accounts for the three differences between model FLOPs and executed FLOPs."""
    length = recipe.training.seq_length
    tokens = torch.zeros(1, length, dtype=torch.long)
    positions = torch.arange(length)[None]
    # The counter does not know torch's fused CPU attention; plain attention multiplies the same matrices.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens, positions, None, labels=tokens).sum().backward()
    by_operator = {str(operator): count for operator, count in counter.get_flop_counts()["Global"].items()}
    # The counter treats the weight gradient of a depthwise convolution as that of a dense one.
    by_operator.pop("aten.convolution_backward", None)
    executed = sum(by_operator.values()) / length

    expected = flops_per_token(recipe.sizes, length)
    # Padding rows of the in-projections.
    padding = sum(module.padding for module in model.modules() if isinstance(module, StateSpaceMixer))
    expected += FORWARD_AND_BACKWARD * 2 * padding * recipe.model.hidden_size
    kinds = recipe.sizes.all_layers
    # Model FLOPs count the causal half of attention's scores; plain attention executes the full square: Q·Kᵀ and
    # scores·V, one multiply-add each per key, head and channel, half of which the figure already includes.
    half_of_scores = 2 * length * recipe.model.num_attention_heads * recipe.kv_channels
    expected += FORWARD_AND_BACKWARD * kinds.count(ATTENTION) * half_of_scores
    if sizes := recipe.state_space:
        # The same for the scan's chunks.
        whole, half = (sizes.scan_flops_per_token(length, whole_chunks=flag) for flag in (True, False))
        expected += FORWARD_AND_BACKWARD * kinds.count(STATE_SPACE) * (whole - half)
        # Its backward pass recomputes the scores, and the states that chunks add.
        scores = 2 * min(sizes.chunk_size, length) * sizes.num_groups * sizes.state_size
        again = scores + 2 * sizes.inner_size * sizes.state_size
        # The counter does not know baddbmm_, which turns the scores' gradients into those of B and C.
        expected += kinds.count(STATE_SPACE) * (again - 2 * scores)
        # The backward pass of the convolution, see above: twice its forward pass.
        convolution = 2 * sum(sizes.conv_sizes.values()) * sizes.conv_kernel
        expected -= 2 * kinds.count(STATE_SPACE) * convolution
    assert executed == expected
