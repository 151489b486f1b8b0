"""Transformer Engine's fused accumulation of weight gradients where apex is missing.

Its layers add a weight's gradient to the buffer of gradients within the GEMM, but Megatron switches that on for all
layers or for none, and builds the LM head, which is its own layer, only with a kernel of apex. Here that one layer gets
a GEMM and an addition in the kernel's place.

T=tokens  K=channels of the input  N=outputs
"""

from types import SimpleNamespace

from torch import Tensor


def add_weight_gradient(input_TK: Tensor, grad_output_TN: Tensor, main_grad_NK: Tensor) -> None:
    """What apex's wgrad_gemm_accum_fp32 and _fp16 do."""
    main_grad_NK.add_(grad_output_TN.t().matmul(input_TK))


def stand_in_for_apex() -> None:
    """Let Megatron find apex's kernel (idempotent)."""
    from megatron.core.tensor_parallel import layers

    kernel = SimpleNamespace(wgrad_gemm_accum_fp32=add_weight_gradient, wgrad_gemm_accum_fp16=add_weight_gradient)
    setattr(layers, "fused_weight_gradient_mlp_cuda", kernel)
    setattr(layers, "_grad_accum_fusion_available", True)
