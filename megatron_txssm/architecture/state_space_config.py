"""Sizes, variants and costs of the state-space mixer; plain Python, without torch.

D=hidden size  H=heads  P=head dim  G=groups  N=state size  K=convolution kernel  Q=chunk length
"""

from dataclasses import dataclass

from megatron_txssm.choices import (
    POSITION_ENCODINGS,
    SSD_BACKENDS,
    ContextParallelMethod,
    PositionEncoding,
    SsdBackend,
)
from megatron_txssm.errors import UserError


@dataclass(frozen=True)
class StateSpaceConfig:
    """One state-space layer's mixer (arXiv:2506.09507, sections 2.1, 2.2 and table 2; Mamba-2: arXiv:2405.21060)."""

    hidden_size: int
    num_heads: int
    # Channels per head (P).
    head_dim: int = 64
    # Channels of the recurrent state per head channel (N); the paper's d_state.
    state_size: int = 128
    # B and C are shared by the num_heads / num_groups heads of a group, as keys are in grouped-query attention.
    num_groups: int = 8
    position_encoding: PositionEncoding = "rope"
    # Mamba-2's output gate and the grouped RMSNorm after it.
    gated: bool = False
    # A learned bias under the softplus of dt, as in Mamba-2; it spreads the heads' first dt over [0.001, 0.1]. Without
    # it, as in the authors' public parameter layout, every head starts at dt = softplus(~0) = 0.69, as theirs do.
    dt_bias: bool = True
    # Chunk length of the parallel scan, in tokens (the paper's chunk_len).
    chunk_size: int = 256
    ssd_backend: SsdBackend = "auto"
    # Appendix A: beyond this many tokens, C is scaled by log_base(position). None: never.
    length_scaling_base: int | None = None
    context_parallel_method: ContextParallelMethod = "state_passing"
    # Taps of the causal convolution of "conv1d_d".
    conv_kernel: int = 4

    def __post_init__(self) -> None:
        if self.position_encoding not in POSITION_ENCODINGS:
            raise UserError(
                f"position_encoding={self.position_encoding!r} is unknown; use one of {', '.join(POSITION_ENCODINGS)}"
            )
        if self.ssd_backend not in SSD_BACKENDS:
            raise UserError(f"ssd_backend={self.ssd_backend!r} is unknown; use one of {', '.join(SSD_BACKENDS)}")
        for name in ("hidden_size", "num_heads", "head_dim", "state_size", "num_groups", "chunk_size", "conv_kernel"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if self.num_heads % self.num_groups != 0:
            raise UserError(
                f"num_groups={self.num_groups} does not divide the state-space heads ({self.num_heads}); "
                f"use one of {_listed(_divisors(self.num_heads))}"
            )
        if self.position_encoding == "rope" and self.state_size % 2 != 0:
            raise UserError(
                f"state_size={self.state_size} is odd, but Unified RoPE rotates pairs of channels; "
                f"use {self.state_size + 1}, or position_encoding: a_t"
            )
        if self.length_scaling_base is not None and self.length_scaling_base < 2:
            raise UserError(f"length_scaling_base={self.length_scaling_base} tokens must be at least 2")

    def check_context_parallel(self, size: int, tensor_parallel_size: int) -> None:
        """UserError if heads are exchanged and the groups are not divisible among `size` ranks."""
        if self.context_parallel_method == "all_to_all" and self.num_groups % (tensor_parallel_size * size) != 0:
            raise UserError(
                f"num_groups={self.num_groups} is not divisible by tensor_model_parallel_size={tensor_parallel_size} x "
                f"context_parallel_size={size}; use state_context_parallel: state_passing, or more groups"
            )

    def check_tensor_parallel(self, size: int) -> None:
        """UserError unless the groups (and so the heads) are divisible among `size` tensor-parallel ranks."""
        if self.num_groups % size != 0:
            raise UserError(
                f"num_groups={self.num_groups} is not divisible by tensor_model_parallel_size={size}; "
                f"use one of {_listed(_divisors(self.num_groups))}, or more groups"
            )

    @property
    def inner_size(self) -> int:
        """Channels of x, over all heads (H·P)."""
        return self.num_heads * self.head_dim

    @property
    def in_proj_sizes(self) -> dict[str, int]:
        """Rows of the packed in-projection by component, in order, over all tensor-parallel ranks."""
        sizes = {"x": self.inner_size, "B": self.num_groups * self.state_size, "C": self.num_groups * self.state_size}
        if self.gated:
            sizes = {"z": self.inner_size, **sizes}
        return {**sizes, "dt": self.num_heads}

    @property
    def conv_sizes(self) -> dict[str, int]:
        """Channels of the causal convolution by component; empty if the variant has none."""
        if self.position_encoding != "conv1d_d":
            return {}
        return {name: self.in_proj_sizes[name] for name in ("x", "B", "C")}

    def num_params(self) -> int:
        """Parameters of the mixer, without the norm before it."""
        projections = self.hidden_size * (sum(self.in_proj_sizes.values()) + self.inner_size)
        per_head = self.num_heads * (1 + self.dt_bias + bool(self.conv_sizes))  # A_log, dt_bias, D
        convolution = sum(self.conv_sizes.values()) * (self.conv_kernel + 1)
        return projections + per_head + convolution + (self.inner_size if self.gated else 0)

    def flops_per_token(self, seq_length: int) -> float:
        """Model FLOPs per token, forward and backward (backward = 2 × forward), of the mixer.

        A multiply-add counts two. Projections: 2 per weight; convolution: 2 per channel and tap; and the scan. Not
        counted: rotation, norms, gates, decays (elementwise).
        """
        projections = 2 * self.hidden_size * (sum(self.in_proj_sizes.values()) + self.inner_size)
        convolution = 2 * sum(self.conv_sizes.values()) * self.conv_kernel
        return 3.0 * (projections + convolution + self.scan_flops_per_token(seq_length, whole_chunks=False))

    def scan_flops_per_token(self, seq_length: int, *, whole_chunks: bool) -> float:
        """FLOPs per token of the chunked scan, forward only: 2·Q·(G·N + H·P) + 4·H·P·N (derived in ops/README.md).

        The four GEMMs of arXiv:2405.21060, section 6: scores C·Bᵀ of a group and scores·x of a head, over all Q×Q pairs
        of a chunk (`whole_chunks`: what the operator executes if Q divides the length) or over their causal half
        (model FLOPs, which count only attention's causal half: Q in the formula becomes Q/2); building and reading the
        chunk states. Omitted: the recurrence over chunk states, 2·H·P·N/Q.
        """
        chunk = min(self.chunk_size, seq_length)
        pairs = 2 * chunk * (self.num_groups * self.state_size + self.inner_size)
        states = 4 * self.inner_size * self.state_size
        return (pairs if whole_chunks else pairs / 2) + states


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _listed(values: list[int]) -> str:
    return ", ".join(map(str, values))
