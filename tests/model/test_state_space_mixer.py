"""The mixer against the paper's equations, its decoding, its parameters, and its tensor parallelism."""

# B=batch L=sequence D=hidden H=heads P=head dim G=groups N=state K=convolution taps E=channels

import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, scatter_to_sequence_parallel_region
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from megatron_txssm.architecture.state_space_config import StateSpaceConfig
from megatron_txssm.choices import POSITION_ENCODINGS
from megatron_txssm.errors import UserError
from megatron_txssm.model import state_space_mixer
from megatron_txssm.model.context_parallel import Zigzag
from megatron_txssm.model.documents import PackedDocuments
from megatron_txssm.model.state_space_mixer import StateSpaceMixer
from megatron_txssm.model.state_space_parameters import FP32_PARAMETERS
from megatron_txssm.ops import ssd_triton
from megatron_txssm.ops.rotary import apply_rotary
from megatron_txssm.ops.ssd import ssd
from tests.ops import causal_conv1d_stand_in
from tests.support.ranks import model_parallel, run_ranks
from tests.support.tiny_model import (
    HIDDEN,
    assembled,
    build_mixer,
    perturb,
    pieces,
    place,
    relative_error,
    state_space_config,
    transformer_config,
)

VARIANTS = [(encoding, gated) for encoding in POSITION_ENCODINGS for gated in (False, True)]
variants = pytest.mark.parametrize(("encoding", "gated"), VARIANTS, ids=[f"{e}{'-gated' * g}" for e, g in VARIANTS])
BATCH, LENGTH = 2, 21


def hidden_states(length: int = LENGTH, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(length, BATCH, HIDDEN, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(dtype)


def paper(weights: dict[str, Tensor], x_LBD: Tensor, sizes: StateSpaceConfig, eps: float) -> Tensor:
    """The mixer token by token and head by head, in its arguments' dtype, from the equations alone."""
    H, P, G, N, K = sizes.num_heads, sizes.head_dim, sizes.num_groups, sizes.state_size, sizes.conv_kernel
    length = x_LBD.shape[0]
    ends = [H * P] * sizes.gated + [H * P, G * N, G * N, H]
    packed_LBE = x_LBD @ weights["in_proj.weight"][: sum(ends)].T
    parts = list(packed_LBE.split(ends, dim=-1))
    z = parts.pop(0) if sizes.gated else None
    dt = torch.nn.functional.softplus(parts.pop() + weights.get("dt_bias", 0.0))

    if sizes.position_encoding == "conv1d_d":
        # Mamba-2 (arXiv:2405.21060, section 7): a causal filter for each channel of x, B and C, then SiLU.
        seen_LBE = torch.cat(parts, dim=-1)
        filtered = []
        for t in range(length):
            out = weights["conv1d_bias"].expand_as(seen_LBE[t])
            for k in range(K):
                source = t - (K - 1) + k
                if source >= 0:
                    out = out + weights["conv1d_weight"][:, 0, k] * seen_LBE[source]
            filtered.append(out / (1 + torch.exp(-out)))
        parts = list(torch.stack(filtered).split(ends[sizes.gated : -1], dim=-1))
    x, B, C = parts[0].unflatten(-1, (H, P)), parts[1].unflatten(-1, (G, N)), parts[2].unflatten(-1, (G, N))

    if sizes.position_encoding == "rope":
        # Eq. 5: plane i of d/2 rotates by m·10000^(-2i/d); half-split pairing, one complex number per plane.
        theta = [10000 ** (-2 * i / N) for i in range(N // 2)]

        def turned(v: Tensor, m: int) -> Tensor:
            turn = torch.tensor([complex(math.cos(m * t), math.sin(m * t)) for t in theta], dtype=torch.complex128)
            plane = torch.complex(v[..., : N // 2], v[..., N // 2 :]) * turn
            return torch.cat([plane.real, plane.imag], dim=-1)

        B, C = (torch.stack([turned(v[m], m) for m in range(length)]) for v in (B, C))
    if sizes.length_scaling_base is not None:
        C = torch.stack([C[m] * max(1.0, math.log(m + 1, sizes.length_scaling_base)) for m in range(length)])

    outputs = []
    for h in range(H):
        state = x_LBD.new_zeros(BATCH, N, P)
        ys = []
        for t in range(length):
            g = h // (H // G)
            a = torch.exp(-torch.exp(weights["A_log"][h]) * dt[t, :, h])
            state = a[:, None, None] * state + B[t, :, g, :, None] * (dt[t, :, h, None] * x[t, :, h])[:, None, :]
            y = (C[t, :, g, :, None] * state).sum(1)
            if sizes.position_encoding == "conv1d_d":
                y = y + weights["D"][h] * x[t, :, h]
            ys.append(y)
        outputs.append(torch.stack(ys))
    y_LBE = torch.cat(outputs, dim=-1)

    if z is not None:
        gated = (y_LBE * z / (1 + torch.exp(-z))).unflatten(-1, (G, -1))
        y_LBE = (gated / torch.sqrt(gated.square().mean(-1, keepdim=True) + eps)).flatten(-2) * weights["norm_weight"]
    return y_LBE @ weights["out_proj.weight"].T


def build(encoding: str, gated: bool, **overrides: Any) -> StateSpaceMixer:
    mixer = build_mixer(state_space_config(position_encoding=encoding, gated=gated, **overrides))
    perturb(mixer)
    return mixer


def count_parameters(mixer: StateSpaceMixer) -> int:
    """This rank's parameters, without the in-projection's padding."""
    return sum(parameter.numel() for parameter in mixer.parameters()) - mixer.padding * HIDDEN


def gradients(output: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients by name, for one fixed cotangent."""
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = torch.autograd.grad(output, list(leaves.values()), cotangent.to(output.dtype))
    return dict(zip(leaves, found, strict=True))


def errors_against_paper(mixer: StateSpaceMixer, length: int = LENGTH) -> dict[str, float]:
    """Relative errors, by name: of the output and of the gradients of the input and every parameter."""
    x = hidden_states(length).requires_grad_()
    leaves = {**dict(mixer.named_parameters()), "input": x}
    output, bias = mixer(x)
    assert bias is None
    exact = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    expected = paper(exact, exact["input"], mixer.state_space, mixer.config.layernorm_epsilon)
    ours, theirs = gradients(output, leaves), gradients(expected, exact)
    return {"output": relative_error(output, expected)} | {n: relative_error(ours[n], theirs[n]) for n in leaves}


@variants
def test_mixer_is_the_papers_equations(one_process: None, encoding: str, gated: bool) -> None:
    errors = errors_against_paper(build(encoding, gated))
    names = {"in_proj.weight", "out_proj.weight", "A_log", "dt_bias", "input", "output"}
    names |= {"D", "conv1d_weight", "conv1d_bias"} if encoding == "conv1d_d" else set()
    assert set(errors) == names | ({"norm_weight"} if gated else set())
    # fp32 against fp64; torch 2.11 comes to 1.1e-5.
    assert max(errors.values()) <= 2e-5, errors


@pytest.mark.parametrize(("encoding", "gated"), [("rope", False), ("conv1d_d", True)])
def test_without_a_bias_dt_is_that_of_a_bias_of_zero(one_process: None, encoding: str, gated: bool) -> None:
    """`paper` uses zero where the weights have no bias; the other parameters keep their names in checkpoints."""
    mixer, biased = build(encoding, gated, dt_bias=False), build(encoding, gated)
    errors = errors_against_paper(mixer)
    assert max(errors.values()) <= 1e-5, errors
    names = set(dict(biased.named_parameters())) - {"dt_bias"}
    assert set(errors) == names | {"input", "output"}
    assert biased.sharded_state_dict().keys() - mixer.sharded_state_dict().keys() == {"dt_bias"}
    assert mixer.num_params() == count_parameters(mixer)


@pytest.mark.parametrize("encoding", ["rope", "a_t"])
def test_c_grows_with_the_logarithm_of_the_length_beyond_the_base(one_process: None, encoding: str) -> None:
    scaled = build(encoding, gated=False, length_scaling_base=5)
    plain = build(encoding, gated=False)
    plain.load_state_dict(scaled.state_dict())
    errors = errors_against_paper(scaled)
    assert max(errors.values()) <= 1e-5, errors
    x = hidden_states()
    with torch.no_grad():
        assert torch.equal(scaled(x)[0][:5], plain(x)[0][:5])
        assert not torch.allclose(scaled(x)[0][5:], plain(x)[0][5:], rtol=1e-3)


@variants
@pytest.mark.parametrize("prompt", [(9,), (5, 9), (1,)], ids=str)
def test_decoding_is_the_parallel_form(one_process: None, encoding: str, gated: bool, prompt: tuple[int, ...]) -> None:
    """A prompt in one or two pieces (ending inside a chunk), then token by token; with appendix A's scaling of C."""
    mixer = build(encoding, gated, length_scaling_base=7)
    x = hidden_states()
    context = StaticInferenceContext(max_batch_size=BATCH, max_sequence_length=LENGTH)
    with torch.inference_mode():
        whole = mixer(x)[0]
        outputs, cache_elements = [], set()
        for piece in [*prompt, *[1] * (LENGTH - sum(prompt))]:
            start = context.sequence_len_offset
            outputs.append(mixer(x[start : start + piece], inference_context=context)[0])
            context.sequence_len_offset += piece
            cache = context.key_value_memory_dict[mixer.layer_number]
            cache_elements.add(sum(t.numel() for t in vars(cache).values() if t is not None))
    assert relative_error(torch.cat(outputs), whole) <= 1e-5
    # The state of H·P·N and, with a convolution, K-1 inputs per channel: independent of the sequence length.
    sizes = mixer.state_space
    expected = sizes.inner_size * sizes.state_size + (sizes.conv_kernel - 1) * sum(sizes.conv_sizes.values())
    assert cache_elements == {BATCH * expected}


def test_a_new_sequence_starts_from_an_empty_state(one_process: None) -> None:
    mixer = build("conv1d_d", gated=False)
    x = hidden_states()
    context = StaticInferenceContext(max_batch_size=BATCH, max_sequence_length=LENGTH)
    with torch.inference_mode():
        first = mixer(x, inference_context=context)[0]
        context.sequence_len_offset = LENGTH
        context.reset()
        assert torch.equal(mixer(x, inference_context=context)[0], first)


@pytest.mark.parametrize("cast", ["bfloat16", "Float16Module", "to"])
def test_fp32_parameters_survive_a_cast_of_the_model(one_process: None, cast: str) -> None:
    mixer = build("conv1d_d", gated=True)
    x = hidden_states()
    expected = mixer(x)[0].detach()
    # Gradients are cast, too: a gradient whose dtype differs from its parameter's is an error.
    mixer(x)[0].sum().backward()
    before = {name: getattr(mixer, name).detach().clone() for name in FP32_PARAMETERS}
    if cast == "Float16Module":
        Float16Module(transformer_config(bf16=True, params_dtype=torch.bfloat16), mixer)
    elif cast == "bfloat16":
        mixer.bfloat16()
    else:
        mixer.to(dtype=torch.bfloat16)
    for name, parameter in mixer.named_parameters():
        assert parameter.dtype == (torch.float32 if name in FP32_PARAMETERS else torch.bfloat16), name
        assert parameter.grad is not None and parameter.grad.dtype == parameter.dtype, name
    assert all(torch.equal(getattr(mixer, name), value) for name, value in before.items())
    output = mixer(x.bfloat16())[0]
    assert output.dtype == torch.bfloat16
    assert relative_error(output, expected) < 0.05
    output.sum().backward()


def test_a_mixer_on_the_meta_device_can_be_given_memory(one_process: None) -> None:
    with torch.device("meta"):
        mixer = build_mixer(state_space_config(), transformer_config(perform_initialization=False))
    mixer.to("meta")
    mixer.to_empty(device="cpu")
    assert {(p.device.type, p.dtype) for p in mixer.parameters()} == {("cpu", torch.float32)}


def test_parameters_are_built_in_megatrons_type_except_the_fp32_ones(one_process: None) -> None:
    config = transformer_config(bf16=True, params_dtype=torch.bfloat16)
    mixer = build_mixer(state_space_config(position_encoding="conv1d_d", gated=True), config)
    for name, parameter in mixer.named_parameters():
        assert parameter.dtype == (torch.float32 if name in FP32_PARAMETERS else torch.bfloat16), name


def test_start_values_are_mamba_2s(one_process: None) -> None:
    mixer = build_mixer(state_space_config(num_heads=64, num_groups=2, position_encoding="conv1d_d", gated=True))
    assert mixer.dt_bias is not None and mixer.D is not None
    A, dt = mixer.A_log.detach().exp(), torch.nn.functional.softplus(mixer.dt_bias.detach())
    assert 1 <= A.min() < 4 and 13 < A.max() <= 16.0001
    assert 0.00099 < dt.min() < 0.003 and 0.03 < dt.max() < 0.1001
    assert mixer.D.eq(1).all() and mixer.norm_weight.eq(1).all()
    assert 0.4 < mixer.conv1d_weight.abs().max() <= 0.5


def test_weight_decay_spares_what_sets_the_decay_of_the_state(one_process: None) -> None:
    """As Megatron's own optimizer groups the parameters."""
    mixer = build("conv1d_d", gated=True)
    model = DistributedDataParallel(mixer.config, DistributedDataParallelConfig(), mixer)
    optimizer: Any = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-3, weight_decay=0.1), [model])
    names = {id(parameter): name for name, parameter in mixer.named_parameters()}
    decayed = {
        names[id(parameter)]: group["wd_mult"] for group in optimizer.param_groups for parameter in group["params"]
    }
    free = {*FP32_PARAMETERS, "conv1d_bias", "norm_weight"}
    assert decayed == {name: 0.0 if name in free else 1.0 for name in names.values()}


def test_parameters_say_how_they_are_sharded(one_process: None) -> None:
    parameters: dict[str, Any] = dict(build("conv1d_d", gated=True).named_parameters())
    for name, parameter in parameters.items():
        assert parameter.tensor_model_parallel is True, name
        assert parameter.partition_dim == (1 if name == "out_proj.weight" else 0), name


@variants
def test_num_params_counts_what_is_there(one_process: None, encoding: str, gated: bool) -> None:
    mixer = build(encoding, gated)
    assert mixer.num_params() == count_parameters(mixer)


def test_groups_must_fall_whole_to_the_ranks() -> None:
    with pytest.raises(
        UserError, match=r"num_groups=2 is not divisible by tensor_model_parallel_size=4; use one of 1, 2"
    ):
        state_space_config().check_tensor_parallel(4)
    with pytest.raises(
        UserError, match=r"num_groups=3 does not divide the state-space heads \(4\); use one of 1, 2, 4"
    ):
        state_space_config(num_groups=3)
    with pytest.raises(UserError, match=r"state_size=7 is odd.*use 8"):
        state_space_config(state_size=7)
    with pytest.raises(UserError, match=r"ssd_backend='cuda' is unknown; use one of auto, torch, triton"):
        state_space_config(ssd_backend="cuda")


def test_the_backend_is_handed_to_the_operator(one_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssd_triton, "import_error", lambda: ImportError("not here"))
    mixer = build_mixer(state_space_config(ssd_backend="triton"))
    with pytest.raises(ImportError, match=r"backend='triton' needs mamba-ssm"):
        mixer(torch.zeros(3, 1, HIDDEN))


def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Replace the fused kernels by PyTorch wherever the mixer allows them; returns the list of their results."""
    returned: list[Tensor] = []

    def scan_packed(
        packed_LBE: Tensor, A_log: Tensor, dt_bias: Tensor | None, tables: Any, sizes: Any, seq_idx: Tensor | None
    ) -> Tensor:
        H, P, G, N, chunk_size = A_log.shape[0], *sizes
        padding = packed_LBE.shape[-1] - H * P - 2 * G * N - H
        x, B, C, dt, _ = packed_LBE.transpose(0, 1).split([H * P, G * N, G * N, H, padding], dim=-1)
        B, C = (part.unflatten(-1, (G, N)) for part in (B, C))
        if tables is not None:
            B, C = apply_rotary(B, *tables), apply_rotary(C, *tables)
        dt = torch.nn.functional.softplus(dt if dt_bias is None else dt + dt_bias)
        y, _ = ssd(x.unflatten(-1, (H, P)), dt, -A_log.exp(), B, C, chunk_size=chunk_size, seq_idx=seq_idx)
        returned.append(y.transpose(0, 1).flatten(2))
        return returned[-1]

    module: Any = SimpleNamespace(scan_packed=scan_packed, Sizes=lambda *numbers: numbers)
    monkeypatch.setitem(sys.modules, "megatron_txssm.ops.ssd_fused_triton", module)
    monkeypatch.setattr(state_space_mixer, "is_fused", lambda *arguments: True)
    monkeypatch.setattr(state_space_mixer, "has_scan_outside_autograd", lambda: True)
    return returned


def some_documents() -> PackedDocuments:
    """Documents of uneven lengths, different in each row."""
    positions = [torch.cat([torch.arange(n) for n in row]) for row in ([5, 1, 15], [9, 12])]
    return PackedDocuments.from_position_ids(torch.stack(positions))


@pytest.mark.parametrize("packed", [False, True], ids=["one-document", "documents"])
@pytest.mark.parametrize("dt_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("encoding", ["rope", "a_t"])
def test_the_fused_kernels_are_given_what_they_need(
    one_process: None, monkeypatch: pytest.MonkeyPatch, encoding: str, dt_bias: bool, packed: bool
) -> None:
    mixer = build(encoding, gated=False, dt_bias=dt_bias)
    leaves = {**dict(mixer.named_parameters()), "input": hidden_states().requires_grad_()}
    documents = some_documents() if packed else None
    expected, _ = mixer(leaves["input"], packed_seq_params=documents)
    returned = stand_in(monkeypatch)
    actual, _ = mixer(leaves["input"], packed_seq_params=documents)
    assert len(returned) == 1
    assert relative_error(actual, expected) < 1e-5
    ours, theirs = gradients(actual, leaves), gradients(expected, leaves)
    assert {name: error for name in leaves if (error := relative_error(ours[name], theirs[name])) > 1e-5} == {}


@pytest.mark.parametrize(
    ("encoding", "gated", "overrides"),
    [("conv1d_d", False, {}), ("rope", True, {}), ("a_t", True, {}), ("rope", False, {"length_scaling_base": 5})],
)
def test_the_fused_kernels_are_not_asked_for_what_they_cannot_do(
    one_process: None, monkeypatch: pytest.MonkeyPatch, encoding: str, gated: bool, overrides: dict[str, Any]
) -> None:
    returned = stand_in(monkeypatch)
    build(encoding, gated, **overrides)(hidden_states())
    assert not returned


def test_neither_decoding_nor_context_parallelism_is_the_fused_kernels(
    one_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixer = build("rope", gated=False)
    returned = stand_in(monkeypatch)
    context = StaticInferenceContext(max_batch_size=BATCH, max_sequence_length=LENGTH)
    with torch.inference_mode():
        mixer(hidden_states(), inference_context=context)
    assert not returned
    assert mixer._is_fused(hidden_states())
    monkeypatch.setattr(mixer, "zigzag", SimpleNamespace(size=2))
    assert not mixer._is_fused(hidden_states())
    monkeypatch.setattr(mixer, "zigzag", SimpleNamespace(size=1))
    # A release of mamba-ssm without the private functions.
    monkeypatch.setattr(state_space_mixer, "has_scan_outside_autograd", lambda: False)
    assert not mixer._is_fused(hidden_states())


@pytest.mark.parametrize("packed", [False, True], ids=["one-document", "documents"])
def test_the_convolutions_kernel_is_given_what_it_needs(
    one_process: None, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    mixer = build("conv1d_d", gated=False)
    leaves = {**dict(mixer.named_parameters()), "input": hidden_states().requires_grad_()}
    documents = some_documents() if packed else None
    expected, _ = mixer(leaves["input"], packed_seq_params=documents)
    calls = causal_conv1d_stand_in.install(monkeypatch)
    actual, _ = mixer(leaves["input"], packed_seq_params=documents)
    assert [[part is not None for part in call] for call in calls] == [[packed, False]]
    assert relative_error(actual, expected) < 1e-5
    ours, theirs = gradients(actual, leaves), gradients(expected, leaves)
    assert {name: error for name in leaves if (error := relative_error(ours[name], theirs[name])) > 1e-5} == {}


@pytest.mark.parametrize("prompt", [(9,), (5, 9), (2,), (1,)], ids=str)
def test_decoding_by_the_convolutions_kernel_is_the_parallel_form(
    one_process: None, monkeypatch: pytest.MonkeyPatch, prompt: tuple[int, ...]
) -> None:
    mixer, x = build("conv1d_d", gated=False), hidden_states()
    context = StaticInferenceContext(max_batch_size=BATCH, max_sequence_length=LENGTH)
    pieces_of_x = [*prompt, *[1] * (LENGTH - sum(prompt))]
    outputs = []
    with torch.inference_mode():
        whole = mixer(x)[0]
        calls = causal_conv1d_stand_in.install(monkeypatch)
        for piece in pieces_of_x:
            start = context.sequence_len_offset
            outputs.append(mixer(x[start : start + piece], inference_context=context)[0])
            context.sequence_len_offset += piece
    assert [history is not None for _, history in calls] == [False] + [True] * (len(pieces_of_x) - 1)
    assert relative_error(torch.cat(outputs), whole) <= 1e-5


def test_a_context_parallel_rank_convolves_without_the_kernel(
    one_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixer = build("conv1d_d", gated=False)
    calls = causal_conv1d_stand_in.install(monkeypatch)
    monkeypatch.setattr(mixer, "zigzag", Zigzag(2, 0))
    monkeypatch.setattr(Zigzag, "previous_tails", lambda self, t_bl, tokens: torch.zeros_like(t_bl[:, :tokens]))
    mixer._convolve(torch.zeros(BATCH, 12, mixer.conv1d_weight.shape[0]), None, None)
    assert not calls


def test_a_mixer_refuses_a_layout_that_would_split_a_group(one_process: None) -> None:
    three_ranks: Any = SimpleNamespace(tp=SimpleNamespace(size=lambda: 3))
    with pytest.raises(UserError, match=r"num_groups=2 is not divisible by tensor_model_parallel_size=3"):
        build_mixer(state_space_config(), pg_collection=three_ranks)


@variants
def test_packed_documents_are_documents_alone(one_process: None, encoding: str, gated: bool) -> None:
    """Rows of a batch are packed differently; compares the output and every gradient, also of the input's parts."""
    mixer = build(encoding, gated, length_scaling_base=3)
    lengths = ([5, 1, 15], [9, 12])
    positions_BL = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    leaves = {**dict(mixer.named_parameters()), "input": hidden_states().requires_grad_()}
    packed, _ = mixer(leaves["input"], packed_seq_params=PackedDocuments.from_position_ids(positions_BL))
    rows = zip(leaves["input"].unbind(1), lengths, strict=True)
    alone = [torch.cat([mixer(part[:, None])[0] for part in row_LD.split(n)]) for row_LD, n in rows]
    expected = torch.cat(alone, dim=1)
    assert relative_error(packed, expected) < 1e-5
    ours, theirs = gradients(packed, leaves), gradients(expected, leaves)
    assert {name: error for name in leaves if (error := relative_error(ours[name], theirs[name])) > 1e-5} == {}


def test_packed_sequences_and_other_caches_are_refused(one_process: None) -> None:
    mixer = build("rope", gated=False)
    with pytest.raises(ValueError, match=r"only accept packed documents as documents\.PackedDocuments"):
        mixer(hidden_states(), packed_seq_params=object())
    dynamic = SimpleNamespace(is_static_batching=lambda: False)
    with pytest.raises(ValueError, match="StaticInferenceContext only"):
        mixer(hidden_states(), inference_context=dynamic)


# Tensor parallelism: two processes, with and without sequence parallelism, against one. A run takes seconds to start
# and to save, so one run covers all variants.


def metadata() -> dict[str, Any]:
    return {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def sharded_state(mixers: dict[str, StateSpaceMixer]) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for name, mixer in mixers.items():
        state.update(mixer.sharded_state_dict(prefix=f"{name}.", metadata=metadata()))
    return state


def all_variants(**overrides: Any) -> dict[str, StateSpaceMixer]:
    config = transformer_config(**overrides)
    sizes = {
        (encoding, gated): state_space_config(position_encoding=encoding, gated=gated) for encoding, gated in VARIANTS
    }
    return {f"{encoding}_{gated}": build_mixer(sizes[encoding, gated], config) for encoding, gated in VARIANTS}


def on_a_rank(weights: dict[str, dict[str, Tensor]], checkpoint: str) -> dict[bool, dict[str, Any]]:
    """Every variant at TP=2, by sequence parallelism and name: output, input gradient, parameter gradient shards."""
    results: dict[bool, dict[str, Any]] = {}
    with model_parallel(tensor=2):
        for sequence_parallel in (False, True):
            mixers = all_variants(sequence_parallel=sequence_parallel)
            results[sequence_parallel] = {}
            for name, mixer in mixers.items():
                place(mixer, weights[name])
                x = hidden_states(20).requires_grad_()
                output = mixer(scatter_to_sequence_parallel_region(x) if sequence_parallel else x)[0]
                if sequence_parallel:
                    output = gather_from_sequence_parallel_region(output, tensor_parallel_output_grad=False)
                found = gradients(output, {**dict(mixer.named_parameters()), "input": x})
                results[sequence_parallel][name] = {
                    "output": output.detach(),
                    "input": found.pop("input"),
                    "gradients": pieces(mixer, found),
                    "numel": count_parameters(mixer),
                }
        dist_checkpointing.save(sharded_state(mixers), checkpoint)
    return results


@pytest.fixture(scope="module")
def tensor_parallel_run(one_process: None, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The mixers in one process, two ranks' results with the same weights, and the checkpoint that they wrote."""
    folder = tmp_path_factory.mktemp("tensor_parallel")
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    mixers = all_variants()
    for mixer in mixers.values():
        perturb(mixer)
    weights = {name: assembled([pieces(mixer, dict(mixer.named_parameters()))]) for name, mixer in mixers.items()}
    return mixers, run_ranks(on_a_rank, 2, folder / "ranks", weights, str(checkpoint)), checkpoint


@variants
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["TP2", "TP2-SP"])
def test_two_tensor_parallel_ranks_are_one(
    tensor_parallel_run: Any, encoding: str, gated: bool, sequence_parallel: bool
) -> None:
    mixers, ranks, _ = tensor_parallel_run
    name = f"{encoding}_{gated}"
    mixer, results = mixers[name], [rank[sequence_parallel][name] for rank in ranks]
    x = hidden_states(20).requires_grad_()
    output = mixer(x)[0]
    found = gradients(output, {**dict(mixer.named_parameters()), "input": x})
    for result in results:
        assert relative_error(result["output"], output.detach()) <= 1e-6
        assert relative_error(result["input"], found["input"]) <= 1e-6
    expected = assembled([pieces(mixer, found)])
    actual = assembled([result["gradients"] for result in results])
    assert actual.keys() == expected.keys()
    errors = {key: relative_error(actual[key], gradient) for key, gradient in expected.items()}
    assert max(errors.values()) <= 2e-6, errors
    assert sum(result["numel"] for result in results) == mixer.num_params()


def test_packed_tensors_are_saved_by_component(one_process: None) -> None:
    """Each under its own name and global shape: the packed order depends on the number of ranks."""
    mixer = build("conv1d_d", gated=True)
    sizes = mixer.state_space
    shapes = {
        key: tuple(tensor.shape) for key, tensor in assembled([pieces(mixer, dict(mixer.named_parameters()))]).items()
    }
    expected = {f"in_proj.weight.{part}": (rows, HIDDEN) for part, rows in sizes.in_proj_sizes.items()}
    expected |= {f"conv1d_weight.{part}": (rows, 1, sizes.conv_kernel) for part, rows in sizes.conv_sizes.items()}
    expected |= {f"conv1d_bias.{part}": (rows,) for part, rows in sizes.conv_sizes.items()}
    expected |= dict.fromkeys(FP32_PARAMETERS, (sizes.num_heads,))
    expected |= {"norm_weight": (sizes.inner_size,), "out_proj.weight": (HIDDEN, sizes.inner_size)}
    assert shapes == expected


@variants
def test_padding_is_zero_and_is_not_trained(one_process: None, encoding: str, gated: bool) -> None:
    mixer = build_mixer(state_space_config(position_encoding=encoding, gated=gated))
    mixer(hidden_states())[0].sum().backward()
    weight = mixer.in_proj.weight
    for rows in (weight[-mixer.padding :], weight.grad[-mixer.padding :]):
        assert rows.shape == (mixer.padding, HIDDEN) and not rows.any()


@pytest.mark.parametrize("padded", [True, False])
@variants
def test_the_optimizer_finds_every_parameter_in_the_checkpoint(
    one_process: None, encoding: str, gated: bool, padded: bool
) -> None:
    """Megatron finds it by identity. 60 or 84 rows of the in-projection are padded, 64 are not."""
    full = {"num_groups": 1, "state_size": 6} if gated else {"head_dim": 7}
    mixer = build(encoding, gated, **({} if padded else full))
    assert (mixer.padding > 0) == padded
    found = {id(entry.data) for entry in mixer.sharded_state_dict().values() if hasattr(entry, "data")}
    assert {id(parameter) for parameter in mixer.parameters()} <= found


def test_a_checkpoint_of_two_ranks_loads_into_one_bit_by_bit(tensor_parallel_run: Any) -> None:
    mixers, _, checkpoint = tensor_parallel_run
    again = all_variants()
    state: Any = dist_checkpointing.load(sharded_state(again), str(checkpoint))
    for name, mixer in again.items():
        mixer.load_state_dict(
            {key.removeprefix(f"{name}."): v for key, v in state.items() if key.startswith(f"{name}.")}
        )
        assert mixer.padding > 0
        with torch.no_grad():
            # These tests put noise into every parameter; in the padding it has no effect and is not saved.
            mixers[name].in_proj.weight[-mixer.padding :] = 0
        for (key, parameter), reloaded in zip(mixers[name].named_parameters(), mixer.parameters(), strict=True):
            assert torch.equal(parameter, reloaded), f"{name}: {key}"
