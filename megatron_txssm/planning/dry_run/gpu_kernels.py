"""Stand-ins for a GPU's kernels on fake tensors: what they keep for the backward pass, and make on the way.

The local modules run, as on a CPU, but attention, norms, rotation, SwiGLU, scan and optimizer allocate as Transformer
Engine's, mamba-ssm's and our kernels do. Values mean nothing. FP8 is counted as bf16.
"""

# B=batch L=sequence H=heads P=head dim G=groups N=state S=sequence T=tokens K, N=channels

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_txssm.planning.dry_run.fakes import replaced


@contextlib.contextmanager
def as_on_a_gpu(args: Any) -> Iterator[None]:
    """In this context, models are built and trained with the stand-ins; `args`: Megatron's, which it changes."""
    from megatron.core.fusions import fused_bias_swiglu
    from megatron.core.tensor_parallel import layers, mappings
    from megatron.core.transformer import attention

    import megatron_txssm.ops.ssd as ssd
    from megatron_txssm.model import local_modules, state_space_mixer
    from megatron_txssm.ops import ssd_fused_triton
    from megatron_txssm.platform.adam import Adam
    from megatron_txssm.platform.gradient_accumulation import stand_in_for_apex
    from megatron_txssm.platform.token_exchange import UNEQUAL_PARTS

    # Without a GPU, the platform has turned them off.
    args.bias_swiglu_fusion = args.gradient_accumulation_fusion = True
    stand_in_for_apex()
    changed: list[tuple[Any, str, Any]] = [
        (layers.fused_weight_gradient_mlp_cuda, "wgrad_gemm_accum_fp32", _add_weight_gradient(args)),
        (fused_bias_swiglu, "swiglu", lambda x: x.new_empty(*x.shape[:-1], x.shape[-1] // 2)),
        (fused_bias_swiglu, "swiglu_back", lambda _, x: torch.empty_like(x)),
        (attention, "apply_rotary_pos_emb", lambda t, freqs, **_: _Rotation.apply(t, freqs)),
        (local_modules.RMSNorm, "forward", lambda self, x: _Norm.apply(x, self.weight)),
        (local_modules.ScaledDotProductAttention, "forward", _attend),
        (state_space_mixer, "apply_rotary", lambda x, cos, sin, **_: _Rotation.apply(x, cos)),
        (state_space_mixer, "is_fused", lambda *_: True),
        (state_space_mixer, "has_scan_outside_autograd", lambda: True),
        (state_space_mixer, "gated_rms_norm", lambda y, z, weight, **_: _GatedNorm.apply(y, z, weight)),
        (state_space_mixer, "causal_convolution", _convolve),
        (ssd_fused_triton, "_kernels", lambda: (_scan_forward, _scan_backward)),
        (ssd_fused_triton, "_launch", lambda *_: None),
        (ssd, "_chosen", lambda *_: "triton"),
        (ssd, "ssd_triton", _scan),
        (Adam, "_update", _make_moments),
        # What the platform does in place of NCCL's gathers and reductions of unequal parts (token_exchange.py).
        *((mappings, name, inspect.unwrap(getattr(mappings, name))) for name in UNEQUAL_PARTS),
    ]
    with replaced(changed):
        yield


def _add_weight_gradient(args: Any) -> Any:
    """Transformer Engine's GEMMs add in place; the LM head's, which is Megatron's own, does not (platform/).

    Transformer Engine keeps one placeholder of each weight's shape, which autograd takes for the gradient.
    """
    from megatron_txssm.platform.gradient_accumulation import add_weight_gradient

    placeholders: dict[torch.Size, Tensor] = {}

    def add(input_TK: Tensor, grad_output_TN: Tensor, main_grad_NK: Tensor) -> None:
        shape = main_grad_NK.shape
        if shape[0] * args.tensor_model_parallel_size == args.padded_vocab_size:
            add_weight_gradient(input_TK, grad_output_TN, main_grad_NK)
        elif shape not in placeholders:
            placeholders[shape] = grad_output_TN.new_empty(shape)

    return add


def _attend(
    self: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, packed_seq_params: Any = None, **__: Any
) -> Tensor:
    """[S, B, H, P], [S, B, G, P], [S, B, G, P] → [S, B, H·P]; packed documents are one call, too."""
    ring = self.zigzag.group if self.zigzag.size > 1 else None
    if ring is not None and packed_seq_params is not None:
        # As model/document_attention.py does.
        key, value = self.zigzag.gather_tokens(torch.stack([key, value], dim=2)).unbind(2)
        ring = None
    # Transformer Engine copies what is not contiguous, which frees the projection that value is a part of.
    return _Attention.apply(query, key, value.contiguous(), ring)


def _pass_around(ring: Any, block: Tensor, times: int) -> None:
    """Each rank sends a block to the next, and receives one from the one before, into one of two buffers."""
    ranks = torch.distributed.get_process_group_ranks(ring)
    own = ring.rank()
    buffers = [torch.empty_like(block) for _ in range(min(2, times))]
    for turn in range(times):
        torch.distributed.isend(block, ranks[(own + 1) % len(ranks)], group=ring)
        torch.distributed.irecv(buffers[turn % 2], ranks[own - 1], group=ring)


def _convolve(x_BLE: Tensor, weight: Tensor, bias: Tensor, *, backend: str = "auto", **options: Any) -> Tensor:
    if backend == "torch":
        # Under context parallelism.
        from megatron_txssm.ops.mamba2 import causal_convolution

        return causal_convolution(x_BLE, weight, bias, backend=backend, **options)
    return _Convolution.apply(x_BLE, weight, bias)


class _Rotation(torch.autograd.Function):
    """Out of place; keeps only the angles."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, angles: Tensor) -> Tensor:
        ctx.save_for_backward(angles)
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return torch.empty_like(dy, memory_format=torch.contiguous_format), None


class _Norm(torch.autograd.Function):
    """Keeps its input and one number per token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class _Attention(torch.autograd.Function):
    """Flash attention: keeps its inputs, its output and one number per head and token.

    Under context parallelism, keys and values go around the `ring` of ranks.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, ring: Any) -> Tensor:
        if ring is not None:
            _pass_around(ring, torch.stack([key, value]), ring.size() - 1)
        ctx.ring = ring
        out = query.new_empty(*query.shape[:2], query.shape[2] * query.shape[3])
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        if ctx.ring is not None:
            # Keys and values, and their gradients, which go one step further, home.
            _pass_around(ctx.ring, torch.stack([key, value]), 2 * (ctx.ring.size() - 1) + 1)
        return *(t.new_empty(t.shape) for t in (query, key, value)), None


class _GatedNorm(torch.autograd.Function):
    """mamba-ssm's norm of y·silu(z)."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(y, z, weight, y.new_empty(y.shape[:-1], dtype=torch.float32))
        return torch.empty_like(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        y, z, weight, _ = ctx.saved_tensors
        return torch.empty_like(y), z.new_empty(z.shape), torch.empty_like(weight)


class _Convolution(torch.autograd.Function):
    """causal-conv1d: keeps its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return x.new_empty(x.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        x, weight, bias = ctx.saved_tensors
        return x.new_empty(x.shape), torch.empty_like(weight), torch.empty_like(bias)


def _decays_and_states(x: Tensor, B: Tensor, chunk_size: int) -> tuple[Tensor, ...]:
    """What both directions of mamba-ssm 2.3.2's scan make first: the decays within chunks, their sizes, pair scores."""
    (b, length, h, p), (g, n) = x.shape, B.shape[2:]
    chunks = -(-length // chunk_size)
    decays, steps = (_fp32(x, b, h, chunks, chunk_size) for _ in range(2))
    return decays, steps, _fp32(x, b, chunks, h, p, n), _fp32(x, b, chunks, g, chunk_size, chunk_size)


def _fp32(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(*shape, dtype=torch.float32)


def _scan_forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, chunk_size: int, seq_idx: Tensor | None = None
) -> tuple[Tensor, ...]:
    """mamba-ssm's _mamba_chunk_scan_combined_fwd: (y, decays, final state)."""
    decays, steps, states, pairs = _decays_and_states(x, B, chunk_size)
    passed = states.to(C.dtype)
    del steps, states, passed, pairs
    (b, _, h, p), n = x.shape, B.shape[3]
    return x.new_empty(x.shape), decays, x.new_empty(b, h, p, n, dtype=torch.float32)


def _scan_backward(
    dy: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    y: Tensor,
    chunk_size: int,
    *,
    seq_idx: Tensor | None = None,
    **given: Tensor,
) -> tuple[Tensor, ...]:
    """mamba-ssm's _mamba_chunk_scan_combined_bwd, which writes dx, ddt, dB and dC where it is told."""
    (b, length, _, _), (g, n) = x.shape, B.shape[2:]
    kept = dt.clone()
    decays, steps, states, pairs = _decays_and_states(x, B, chunk_size)
    passed = torch.empty_like(states)
    dstates = torch.empty_like(states)
    of_x = dstates.to(x.dtype), passed.to(x.dtype)
    del states, passed, dstates
    ddecays = torch.empty_like(decays)
    sums = [x.new_empty(b, length, 1, g, n, dtype=torch.float32) for _ in ("dB", "dC")]
    dpairs = torch.empty_like(pairs)
    del kept, of_x, ddecays, sums, dpairs, steps
    return x, dt, torch.empty_like(A)


class _Scan(torch.autograd.Function):
    """mamba-ssm's own autograd function, which also keeps y."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, chunk: int
    ) -> tuple[Tensor, Tensor]:
        y, decays, state = _scan_forward(x, dt, A, B, C, chunk_size=chunk)
        ctx.save_for_backward(y, x, dt, decays, A, B, C, D)
        ctx.chunk = chunk
        return y, state

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        y, x, dt, _, A, B, C, D = ctx.saved_tensors
        dx, ddt, dB, dC = (t.new_empty(t.shape) for t in (x, dt, B, C))
        _, _, dA = _scan_backward(dy, x, dt, A, B, C, y, ctx.chunk)
        return dx, ddt, dA, dB, dC, None if D is None else torch.empty_like(D), None


def _scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, chunk_size: int, D_H: Tensor | None = None, **_: Any
) -> tuple[Tensor, Tensor]:
    from megatron_txssm.ops.ssd_triton import rounded_chunk_size

    return _Scan.apply(x, dt, A, B.to(x.dtype), C.to(x.dtype), D_H, rounded_chunk_size(chunk_size))


def _make_moments(self: Any, param: Tensor, group: dict[str, Any]) -> None:
    """A fused Adam makes nothing else."""
    if not self.state[param]:
        self.state[param].update(exp_avg=torch.zeros_like(param), exp_avg_sq=torch.zeros_like(param))
