"""FP8 without Transformer Engine: every GEMM operand is rounded to FP8, then multiplied in fp32.

It shows FP8's effect on the loss; it saves neither time nor memory. Rounded: the linear layers of mixer, attention and
FFN (input, weight, gradient of the output) and, with FP8 attention, core attention's Q, K, V and the gradient of its
output. Not rounded: embedding, LM head, norms, the scan; nor attention's scores and inner gradients, which Transformer
Engine rounds, but which torch keeps inside a fused kernel.

M=rows (tokens, or a weight's outputs)  K=columns (channels of the input)
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron_txssm.errors import UserError
from megatron_txssm.model.local_modules import ScaledDotProductAttention, TorchSpecProvider

FORMATS = {
    # Format of inputs and weights, format of gradients.
    "e4m3": (torch.float8_e4m3fn, torch.float8_e4m3fn),
    "hybrid": (torch.float8_e4m3fn, torch.float8_e5m2),
}
# Elements per scale, along the summed dimension; "blockwise" uses square blocks for weights.
BLOCK_LENGTHS = {"blockwise": 128, "mxfp8": 32}


@dataclass(frozen=True)
class Float8Settings:
    """Megatron's FP8 settings, with its defaults."""

    fp8_format: str
    recipe: str = "delayed"
    amax_history_len: int = 1
    amax_compute_algo: str = "most_recent"
    margin: int = 0
    tp_only_amax_red: bool = False


def emulated_fp8(config: Any) -> Float8Settings | None:
    """Remove FP8 from a TransformerConfig, for which Megatron would need Transformer Engine; None if it has none.

    The settings are kept as an attribute of the config, which the modules below read.
    """
    if config.fp8 is None:
        return getattr(config, "emulated_fp8", None)
    for name, value in {"fp8_wgrad": True, "fp8_param": False, "fp8_output_proj": False}.items():
        if getattr(config, name) != value:
            raise UserError(f"{name}={not value} is not emulated; it needs Transformer Engine and a GPU")
    if config.fp8_recipe == "delayed" and config.recompute_granularity is not None:
        raise UserError(
            "fp8_recipe=delayed is not emulated with recomputed layers, whose scale would differ by then; "
            "set recompute: none, or another fp8_recipe"
        )
    config.emulated_fp8 = Float8Settings(
        config.fp8,
        str(getattr(config.fp8_recipe, "value", config.fp8_recipe)),
        config.fp8_amax_history_len,
        config.fp8_amax_compute_algo,
        config.fp8_margin,
        config.tp_only_amax_red,
    )
    config.fp8 = None
    return config.emulated_fp8


def round_to_float8(x: Tensor, dtype: torch.dtype, scale: Tensor) -> Tensor:
    """x·scale rounded to the nearest FP8 number, saturating, divided by scale."""
    largest = torch.finfo(dtype).max
    return (x.float() * scale).clamp(-largest, largest).to(dtype).float() / scale


def scale_to(amax: Tensor, dtype: torch.dtype, *, power_of_two: bool = False) -> Tensor:
    """The scale that maps `amax` to the format's largest number; 1 where there is nothing to scale."""
    scale = (torch.finfo(dtype).max / amax).clamp(max=2.0**126)
    if power_of_two:
        mantissa, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.ones_like(mantissa), exponent - 1)
    return torch.where(amax > 0, scale, torch.ones_like(scale))


def block_amax(x_MK: Tensor, rows: int, columns: int) -> Tensor:
    """[M, K] → [M, K]: for each element, the largest magnitude in its block of rows × columns."""
    M, K = x_MK.shape
    padded = F.pad(x_MK.abs(), (0, -K % columns, 0, -M % rows))
    amax = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).amax((1, 3))
    return amax.repeat_interleave(rows, 0)[:M].repeat_interleave(columns, 1)[:, :K]


class Rounding:
    """Rounds one operand of a GEMM in every step; under "delayed" it keeps the amax history.

    The history is not saved: at the start, and after a resume, the first scale comes from the tensor itself.
    """

    def __init__(self, settings: Float8Settings, dtype: torch.dtype, *, square_blocks: bool = False):
        self.settings, self.dtype, self.square_blocks = settings, dtype, square_blocks
        self.history: Tensor | None = None

    def __call__(self, x_MK: Tensor, *, record: bool) -> tuple[Tensor, Tensor]:
        """[M, K] → the operand in fp32, rounded for a sum over K and for a sum over M: blocks lie along the sum."""
        x_MK = x_MK.float()
        length = BLOCK_LENGTHS.get(self.settings.recipe)
        if length is None:
            amax = x_MK.abs().max() if x_MK.numel() else x_MK.new_zeros(())
            if self.settings.recipe == "delayed":
                amax = self._delayed(amax, record)
            scale = scale_to(amax, self.dtype) / 2.0**self.settings.margin
            rounded = round_to_float8(x_MK, self.dtype, scale)
            return rounded, rounded
        across = length if self.square_blocks else 1
        along_K, along_M = (
            round_to_float8(x_MK, self.dtype, scale_to(block_amax(x_MK, *block), self.dtype, power_of_two=True))
            for block in ((across, length), (length, across))
        )
        return along_K, along_M

    def _delayed(self, amax: Tensor, record: bool) -> Tensor:
        """The amax to scale by, from the history; if `record`, adds the tensor's own, reduced over all ranks."""
        if not record:
            return amax if self.history is None else self._chosen(self.history)
        if dist.is_initialized():
            group = parallel_state.get_amax_reduction_group(
                with_context_parallel=True, tp_only_amax_red=self.settings.tp_only_amax_red
            )
            dist.all_reduce(amax, dist.ReduceOp.MAX, group=group)
        history = amax[None] if self.history is None else self.history
        self.history = torch.cat([amax[None], history])[: self.settings.amax_history_len]
        return self._chosen(history)

    def _chosen(self, history: Tensor) -> Tensor:
        return history[0] if self.settings.amax_compute_algo == "most_recent" else history.max()


class _Float8GEMM(torch.autograd.Function):
    """y = x·Wᵀ and the two GEMMs of its backward pass, with rounded operands."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, linear: "_Float8Linear", record: bool) -> Tensor:
        x_along_K, x_along_M = linear.round_input(x.reshape(-1, x.shape[-1]), record=record)
        weight_along_K, weight_along_M = linear.round_weight(weight, record=record)
        ctx.save_for_backward(x_along_M, weight_along_M)
        ctx.linear, ctx.dtypes, ctx.record = linear, (x.dtype, weight.dtype), record
        return (x_along_K @ weight_along_K.T).to(x.dtype).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight = ctx.saved_tensors
        grad = grads[0]
        grad_along_K, grad_along_M = ctx.linear.round_grad(grad.reshape(-1, grad.shape[-1]), record=ctx.record)
        x_dtype, weight_dtype = ctx.dtypes
        grad_x = (grad_along_K @ weight).to(x_dtype).unflatten(0, grad.shape[:-1])
        return grad_x, (grad_along_M.T @ x).to(weight_dtype), None, None


class _Float8Linear:
    """Replaces the GEMM of Megatron's two parallel linear layers, with the collectives that they leave to it."""

    config: Any
    training: bool

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        settings: Float8Settings = self.config.emulated_fp8
        forward, backward = FORMATS[settings.fp8_format]
        self.round_input, self.round_grad = Rounding(settings, forward), Rounding(settings, backward)
        self.round_weight = Rounding(settings, forward, square_blocks=settings.recipe == "blockwise")

    def _forward_impl(
        self, input: Tensor, weight: Tensor, *, allreduce_dgrad: bool, sequence_parallel: bool, tp_group: Any, **_: Any
    ) -> Tensor:
        # Gather before rounding, so that the amax covers all ranks' tokens, as in Transformer Engine.
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, group=tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        result: Any = _Float8GEMM.apply(input, weight, self, self.training and torch.is_grad_enabled())
        return result


class Float8ColumnParallelLinear(_Float8Linear, ColumnParallelLinear):
    """Megatron's, with rounded operands."""


class Float8RowParallelLinear(_Float8Linear, RowParallelLinear):
    """Megatron's, with rounded operands."""


class _Round(torch.autograd.Function):
    """Rounds a tensor in the forward pass, or its gradient in the backward pass; the other passes unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounding: Rounding | None, grad_rounding: Rounding | None, record: bool) -> Tensor:
        ctx.grad_rounding, ctx.record = grad_rounding, record
        return x.view_as(x) if rounding is None else _rounded(x, rounding, record)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad = grads[0] if ctx.grad_rounding is None else _rounded(grads[0], ctx.grad_rounding, ctx.record)
        return grad, None, None, None


def _rounded(x: Tensor, rounding: Rounding, record: bool) -> Tensor:
    return rounding(x.reshape(-1, x.shape[-1]), record=record)[0].to(x.dtype).view(x.shape)


class Float8ScaledDotProductAttention(ScaledDotProductAttention):
    """Core attention that rounds Q, K and V, with one scale as in Transformer Engine, and its output's gradient."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        forward, backward = FORMATS[config.emulated_fp8.fp8_format]
        self.round_qkv, self.round_grad = (Rounding(config.emulated_fp8, dtype) for dtype in (forward, backward))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As ScaledDotProductAttention."""
        record = self.training and torch.is_grad_enabled()
        vectors = torch.cat([t.reshape(-1, t.shape[-1]) for t in (query, key, value)])
        rounded: Any = _Round.apply(vectors, self.round_qkv, None, record)
        parts = rounded.split([t.numel() // t.shape[-1] for t in (query, key, value)])
        query, key, value = (part.view(t.shape) for part, t in zip(parts, (query, key, value), strict=True))
        out: Any = _Round.apply(super().forward(query, key, value, *args, **kwargs), None, self.round_grad, record)
        return out


class Float8SpecProvider(TorchSpecProvider):
    """Local modules with emulated FP8."""

    def __init__(self, *, attention: bool):
        self.attention = attention

    def column_parallel_linear(self) -> type:
        return Float8ColumnParallelLinear

    def row_parallel_linear(self) -> type:
        return Float8RowParallelLinear

    def core_attention(self) -> type:
        return Float8ScaledDotProductAttention if self.attention else super().core_attention()
