"""Transformer Engine's fused accumulation of weight gradients, without apex.

Transformer Engine's layers add a weight's gradient to the gradient buffer within the GEMM. Megatron enables this for
all layers or none, and its own layer, the LM head, then needs a kernel from apex. Here that layer uses a GEMM and an
addition instead.

T=tokens  K=channels of the input  N=outputs
"""

from types import SimpleNamespace

from torch import Tensor


def add_weight_gradient(input_TK: Tensor, grad_output_TN: Tensor, main_grad_NK: Tensor) -> None:
    """Same function as apex's wgrad_gemm_accum_fp32 and _fp16."""
    main_grad_NK.add_(grad_output_TN.t().matmul(input_TK))


def stand_in_for_apex() -> None:
    """Install `add_weight_gradient` as apex's kernel (idempotent)."""
    from megatron.core.tensor_parallel import layers

    kernel = SimpleNamespace(wgrad_gemm_accum_fp32=add_weight_gradient, wgrad_gemm_accum_fp16=add_weight_gradient)
    setattr(layers, "fused_weight_gradient_mlp_cuda", kernel)
    setattr(layers, "_grad_accum_fusion_available", True)
