"""Emulated FP8 against explicit rounding and GEMMs, which layers use it, and under tensor parallelism."""

from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, scatter_to_sequence_parallel_region
from torch import Tensor

from megatron_txssm.errors import UserError
from megatron_txssm.model.fp8_emulation import (
    FORMATS,
    Float8ColumnParallelLinear,
    Float8RowParallelLinear,
    Float8ScaledDotProductAttention,
    Float8Settings,
    Rounding,
    emulated_fp8,
    round_to_float8,
)
from megatron_txssm.model.local_modules import ScaledDotProductAttention
from tests.support.ranks import model_parallel, run_ranks
from tests.support.tiny_model import (
    VOCABULARY,
    build_hybrid,
    perturb,
    relative_error,
    state_space_config,
    transformer_config,
)

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
ONE = torch.tensor(1.0)
RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")
WIDTH = 64


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("dtype", "mantissa_bits", "least_exponent", "largest"), [(E4M3, 3, -6, 448.0), (E5M2, 2, -14, 57344.0)]
)
def test_a_normal_number_is_off_by_half_a_unit_of_its_last_bit(
    dtype: torch.dtype, mantissa_bits: int, least_exponent: int, largest: float
) -> None:
    """1.b₁b₂b₃·2ᵉ: the spacing is 2^(e-3) in e4m3, so the error is at most 2^-4 of the number; below 2^-6, 2^-10."""
    x = torch.logspace(least_exponent, torch.log2(torch.tensor(largest)).item(), 5000, base=2.0)
    x = torch.cat([x, -x])
    error = (round_to_float8(x, dtype, ONE) - x).abs()
    assert (error <= 2.0 ** -(mantissa_bits + 1) * x.abs()).all()
    assert error.max() > 0.9 * 2.0 ** -(mantissa_bits + 1) * largest / 2
    small = torch.linspace(0, 2.0**least_exponent, 1000)
    assert (round_to_float8(small, dtype, ONE) - small).abs().max() <= 2.0 ** (least_exponent - mantissa_bits - 1)
    beyond = torch.tensor([2 * largest, -1e30, 0.0])
    assert torch.equal(round_to_float8(beyond, dtype, ONE), torch.tensor([largest, -largest, 0.0]))


def by_hand(x: Tensor, recipe: str, dtype: torch.dtype, along: str, *, square: bool = False) -> Tensor:
    """A [M, K] tensor rounded block by block, in fp64 except for the cast."""
    largest = torch.finfo(dtype).max
    side = {"delayed": None, "tensorwise": None, "blockwise": 128, "mxfp8": 32}[recipe]
    rows, columns = (
        x.shape if side is None else (side if along == "M" or square else 1, side if along == "K" or square else 1)
    )
    out = torch.empty_like(x, dtype=torch.float64)
    for i in range(0, x.shape[0], rows):
        for j in range(0, x.shape[1], columns):
            block = x[i : i + rows, j : j + columns]
            scale = largest / block.abs().max().double()
            if side is not None:
                scale = 2.0 ** torch.floor(torch.log2(scale))
            rounded = (block.double() * scale).float().clamp(-largest, largest).to(dtype).double()
            out[i : i + rows, j : j + columns] = rounded / scale
    return out


def settings_of(recipe: str, fp8_format: str = "hybrid", **others: Any) -> Float8Settings:
    return Float8Settings(fp8_format, recipe, **others)


def config_of(recipe: str, fp8_format: str = "hybrid", **others: Any) -> Any:
    config = transformer_config(fp8=fp8_format, fp8_recipe=recipe, **others)
    assert emulated_fp8(config) is not None and config.fp8 is None
    return config


def column_linear(config: Any, rows: int, **kwargs: Any) -> Any:
    return Float8ColumnParallelLinear(
        WIDTH, rows, config=config, init_method=torch.nn.init.normal_, bias=False, skip_bias_add=False, **kwargs
    )


@pytest.mark.parametrize("fp8_format", list(FORMATS))
@pytest.mark.parametrize("recipe", RECIPES)
def test_three_gemms_of_rounded_operands(one_process: None, recipe: str, fp8_format: str) -> None:
    """Blocks lie along the sum of each GEMM, and the gradient ignores the rounding (straight-through)."""
    tokens, rows = 136, 96
    linear = column_linear(config_of(recipe, fp8_format), rows, gather_output=False)
    x = (numbers(tokens // 2, 2, WIDTH) * torch.logspace(-2, 2, WIDTH)).requires_grad_()
    grad = numbers(tokens // 2, 2, rows, seed=1) * torch.logspace(-3, 3, rows)
    output = linear(x)[0]
    output.backward(grad)
    forward, backward = FORMATS[fp8_format]
    x_MK, dy_MN = x.detach().flatten(0, 1), grad.flatten(0, 1)
    weight = linear.weight.detach()
    square = recipe == "blockwise"

    def weight_along(side: str) -> Tensor:
        return by_hand(weight, recipe, forward, side, square=square)

    expected = by_hand(x_MK, recipe, forward, "K") @ weight_along("K").T
    dx = by_hand(dy_MN, recipe, backward, "K") @ weight_along("M")
    dw = by_hand(dy_MN, recipe, backward, "M").T @ by_hand(x_MK, recipe, forward, "M")
    assert x.grad is not None
    assert relative_error(output.detach().flatten(0, 1), expected) <= 1e-6
    assert relative_error(x.grad.flatten(0, 1), dx) <= 1e-6
    assert relative_error(linear.weight.grad, dw) <= 1e-6
    # Rounding does take place.
    assert relative_error(output.detach().flatten(0, 1), x_MK.double() @ weight.double().T) > 1e-3


@pytest.mark.parametrize(("algo", "chosen"), [("most_recent", 3.7), ("max", 7.3)])
def test_delayed_scaling_takes_the_maxima_of_calls_before(one_process: None, algo: str, chosen: float) -> None:
    rounding = Rounding(settings_of("delayed", amax_history_len=2, amax_compute_algo=algo), E4M3)

    def amax_behind(amax: float, *, record: bool = True) -> float:
        """The amax used to scale a tensor whose own is `amax`."""
        x = torch.tensor([[amax, 0.0111]])
        rounded = rounding(x, record=record)[0]
        scales = {largest: 448.0 / torch.tensor(largest) for largest in (1.1, 1.9, 3.7, 7.3)}
        (found,) = (m for m, scale in scales.items() if torch.equal(rounded, round_to_float8(x, E4M3, scale)))
        return found

    assert amax_behind(1.9) == 1.9  # no history: its own
    assert amax_behind(7.3) == 1.9
    assert amax_behind(3.7) == 7.3
    assert amax_behind(1.1, record=False) == chosen  # a validation changes nothing
    assert amax_behind(1.1) == chosen
    assert amax_behind(1.1) == (3.7 if algo == "max" else 1.1)  # 7.3 has left the history


def test_blocks_keep_an_outlier_to_themselves() -> None:
    x = numbers(4, 256)
    x[0, 0] = 1e6

    def error(recipe: str) -> float:
        rounded = Rounding(settings_of(recipe), E4M3)(x, record=True)[0]
        return ((rounded - x)[1:].abs() / x[1:].abs()).median().item()

    assert error("tensorwise") == 1.0  # all else is zero
    assert error("blockwise") < 0.03 and error("mxfp8") < 0.03


def test_zeros_and_the_smallest_numbers_stay_finite() -> None:
    for recipe in RECIPES:
        for x in (torch.zeros(3, 40), torch.full((3, 40), 1e-42), torch.zeros(0, 40)):
            for rounded in Rounding(settings_of(recipe), E4M3)(x, record=False):
                assert rounded.shape == x.shape and torch.isfinite(rounded).all()


def test_layers_are_emulated_but_embedding_lm_head_and_the_ends(one_process: None) -> None:
    pattern = "M-*-M-*-"
    plain = build_hybrid(pattern)
    ends = {"fp8": "hybrid", "fp8_recipe": "tensorwise", "first_last_layers_bf16": True}
    ends |= {"num_layers_at_start_in_bf16": 2, "num_layers_at_end_in_bf16": 2}
    config = transformer_config(num_layers=8, is_hybrid_model=True, fp8_dot_product_attention=True, **ends)
    model = build_hybrid(pattern, config, share_embeddings_and_output_weights=False)
    types = (Float8ColumnParallelLinear, Float8RowParallelLinear, Float8ScaledDotProductAttention)
    emulated = {name for name, module in model.named_modules() if isinstance(module, types)}
    mixer = {"mixer.in_proj", "mixer.out_proj"}
    attention = {"self_attention.linear_qkv", "self_attention.linear_proj", "self_attention.core_attention"}
    ffn = {"mlp.linear_fc1", "mlp.linear_fc2"}
    layers = {2: attention, 3: ffn, 4: mixer, 5: ffn}
    assert emulated == {f"decoder.layers.{layer}.{name}" for layer, names in layers.items() for name in names}
    # Checkpoints of the two are interchangeable.
    names = [name for name in model.state_dict() if not name.startswith("output_layer")]
    assert names == [name for name in plain.state_dict() if not name.startswith("output_layer")]


def test_attention_rounds_what_it_takes_and_the_gradient_of_what_it_gives(one_process: None) -> None:
    config = transformer_config(fp8="hybrid", fp8_recipe="tensorwise", fp8_dot_product_attention=True)
    layer: Any = build_hybrid("*-", config).decoder.layers[0]
    attention = layer.self_attention.core_attention
    assert isinstance(attention, Float8ScaledDotProductAttention)
    q, k, v = (numbers(12, 2, 4, 8, seed=seed).requires_grad_() for seed in range(3))
    grad = numbers(12, 2, 32, seed=4)
    out = attention(q, k, v, None)
    out.backward(grad)
    scale = 448.0 / torch.stack([t.detach().abs().max() for t in (q, k, v)]).max()
    rounded = [round_to_float8(t.detach(), E4M3, scale).requires_grad_() for t in (q, k, v)]
    expected = ScaledDotProductAttention.forward(attention, rounded[0], rounded[1], rounded[2], None)
    expected.backward(round_to_float8(grad, E5M2, 57344.0 / grad.abs().max()))
    assert torch.equal(out, expected)
    for t, other in zip((q, k, v), rounded, strict=True):
        assert t.grad is not None and other.grad is not None
        assert torch.equal(t.grad, other.grad)


def test_what_cannot_be_emulated_is_refused(one_process: None) -> None:
    with pytest.raises(UserError, match="delayed is not emulated with recomputed layers"):
        config_of("delayed", recompute_granularity="selective", recompute_modules=["core_attn"])
    with pytest.raises(UserError, match="fp8_wgrad=False is not emulated"):
        config_of("tensorwise", fp8_wgrad=False)
    assert emulated_fp8(transformer_config()) is None


TOKENS = 64


def two_linears(
    recipe: str, sequence_parallel: bool, weights: list[Tensor]
) -> tuple[Tensor, Tensor, list[Tensor], Any]:
    """A column-parallel, then a row-parallel layer on this rank: output, gradients, the roundings."""
    config = config_of(recipe, sequence_parallel=sequence_parallel)
    size, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    first = column_linear(config, 4 * WIDTH, gather_output=False)
    second: Any = Float8RowParallelLinear(
        4 * WIDTH,
        WIDTH,
        config=config,
        init_method=torch.nn.init.normal_,
        bias=False,
        skip_bias_add=True,
        input_is_parallel=True,
    )
    first.weight.data.copy_(weights[0].chunk(size, 0)[rank])
    second.weight.data.copy_(weights[1].chunk(size, 1)[rank])
    x = numbers(TOKENS, 1, WIDTH, seed=2).requires_grad_()
    given = scatter_to_sequence_parallel_region(x) if sequence_parallel else x
    output = second(torch.tanh(first(given)[0]))[0]
    if sequence_parallel:
        output = gather_from_sequence_parallel_region(output, tensor_parallel_output_grad=False)
    (output * numbers(TOKENS, 1, WIDTH, seed=3)).sum().backward()
    assert x.grad is not None
    return output.detach(), x.grad, [first.weight.grad, second.weight.grad], (first, second)


def on_a_rank(weights: dict[str, list[Tensor]]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    with model_parallel(tensor=2):
        for recipe in RECIPES:
            for sequence_parallel in (False, True):
                *found, linears = two_linears(recipe, sequence_parallel, weights[recipe])
                roundings = [
                    r for linear in linears for r in (linear.round_input, linear.round_weight, linear.round_grad)
                ]
                results[f"{recipe}_{sequence_parallel}"] = (*found, [rounding.history for rounding in roundings])
    return results


@pytest.fixture(scope="module")
def ranks_and_weights(tmp_path_factory: pytest.TempPathFactory, one_process: None) -> Any:
    column, row = numbers(4 * WIDTH, WIDTH, seed=5) / 8, numbers(WIDTH, 4 * WIDTH, seed=6) / 16
    weights = {recipe: [column, row] for recipe in RECIPES}
    # There each shard has its own scale: with opposite shards all maxima are equal.
    half_column, half_row = column.chunk(2, 0)[0], row.chunk(2, 1)[0]
    weights["tensorwise"] = [torch.cat([half_column, -half_column]), torch.cat([half_row, -half_row], 1)]
    return run_ranks(on_a_rank, 2, tmp_path_factory.mktemp("fp8"), weights), weights


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["TP2", "TP2-SP"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_two_tensor_parallel_ranks_are_one(ranks_and_weights: Any, recipe: str, sequence_parallel: bool) -> None:
    """Identical numbers: no block is split, and ranks share the maxima of "delayed"."""
    ranks, weights = ranks_and_weights
    output, grad, of_weights, _ = two_linears(recipe, False, weights[recipe])
    results = [rank[f"{recipe}_{sequence_parallel}"] for rank in ranks]
    for result in results:
        assert relative_error(result[0], output) <= 1e-5
        assert relative_error(result[1], grad) <= 1e-5
    for layer, dim in ((0, 0), (1, 1)):
        assert relative_error(torch.cat([result[2][layer] for result in results], dim), of_weights[layer]) <= 1e-5
    if recipe == "delayed":
        assert all(torch.equal(one, other) for one, other in zip(*(result[3] for result in results), strict=True))


def test_a_model_with_fp8_is_near_the_one_without(one_process: None) -> None:
    sizes = state_space_config()
    tokens = torch.randint(VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0))
    arguments = (tokens, torch.arange(16).expand(2, -1), None)
    plain = build_hybrid("M-*-", transformer_config(), sizes)
    perturb(plain)
    with torch.no_grad():
        logits = plain(*arguments)
    for recipe in RECIPES:
        model = build_hybrid("M-*-", transformer_config(fp8="hybrid", fp8_recipe=recipe), sizes)
        model.load_state_dict(plain.state_dict())
        with torch.no_grad():
            error = (model(*arguments) - logits).norm() / logits.norm()
        assert 0.01 < error < 0.2, recipe
