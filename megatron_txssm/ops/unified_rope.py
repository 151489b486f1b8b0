"""Unified rotary position embedding (arXiv:2506.09507, eq. 1-5): one spectrum for attention's Q, K and SSD's C, B.

θ_i = base^(-2i/d), i = 0 … d/2-1, for a vector of width d. Attention heads (d = 64) and the state (d = 128) differ in
width, not in spectrum: the narrower one uses every second frequency of the wider one.
"""

# L=sequence R=width/2 planes of rotation

import math

import torch
from torch import Tensor

TABLE_PRECISIONS = ("fp32", "fp64")


class UnifiedRotaryEmbedding:
    """Owns the spectrum: angles, and their cosines and sines, for any width.

    A plain object, not a module: it has no parameters and adds nothing to a checkpoint.

    base:                 θ_i = base^(-2i/d).
    interpolation_factor: positions are divided by it (linear interpolation, arXiv:2306.15595).
    table_precision:      "fp32" multiplies position and frequency in fp32, bitwise as Megatron does; the angle's
                          error grows with the position (1e-3 rad at 16 thousand tokens, 6e-2 at a million).
                          "fp64" multiplies in fp64 and reduces to [-π, π] before rounding to fp32: below 2e-7 rad
                          at every position.
    """

    def __init__(
        self, *, base: float = 10000.0, interpolation_factor: float = 1.0, table_precision: str = "fp32"
    ) -> None:
        if base <= 1:
            raise ValueError(f"base={base} is not above 1; use 10000")
        if interpolation_factor <= 0:
            raise ValueError(f"interpolation_factor={interpolation_factor} is not positive; use 1 or more")
        if table_precision not in TABLE_PRECISIONS:
            raise ValueError(f"table_precision={table_precision!r} is unknown; use {' or '.join(TABLE_PRECISIONS)}")
        self.base = base
        self.interpolation_factor = interpolation_factor
        self.table_precision = table_precision
        # (width, device) -> first position of the cached table, its cosines, its sines.
        self._cos_sin: dict[tuple[int, torch.device], tuple[int, Tensor, Tensor]] = {}
        # The last table made for Megatron's attention, with its key.
        self._megatron_table: tuple[tuple[int, int, int, str] | None, Tensor] = (None, torch.empty(0))

    def angle_table(
        self,
        length: int,
        width: int,
        *,
        offset: int = 0,
        positions_L: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Angles in radians, [length, width / 2], fp32, of the tokens at offset, offset + 1, …

        Explicit `positions_L` (context parallelism's zigzag) replace the offset; their shape must be [length].
        """
        if width % 2:
            raise ValueError(f"width={width} is odd and has no pairs to rotate; use an even head_dim or d_state")
        dtype = torch.float64 if self.table_precision == "fp64" else torch.float32
        if positions_L is None:
            positions_L = torch.arange(length, device=device, dtype=dtype) + offset
        elif positions_L.shape != (length,) or offset:
            raise ValueError(
                f"positions_L.shape={list(positions_L.shape)} with length={length} and offset={offset} is ambiguous; "
                f"give `length` positions and no offset"
            )
        positions_L = positions_L.to(device=device, dtype=dtype)
        if self.interpolation_factor != 1:
            # Multiply by the reciprocal, as Megatron does: division would round differently.
            positions_L = positions_L * (1 / self.interpolation_factor)
        # Always on the CPU, so that every device uses the same frequencies.
        exponents_R = torch.arange(0, width, 2, device="cpu", dtype=dtype) / width
        frequencies_R = 1.0 / self.base**exponents_R
        angles_LR = torch.outer(positions_L, frequencies_R.to(positions_L.device))
        if dtype == torch.float64:
            angles_LR = angles_LR - 2 * math.pi * torch.round(angles_LR / (2 * math.pi))
        return angles_LR.float()

    def cos_sin(
        self,
        length: int,
        width: int,
        *,
        offset: int = 0,
        positions_L: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines of `angle_table`, for `apply_rotary`: two [length, width / 2], fp32.

        Without explicit positions they are slices of one table per width and device, shared by all layers: a block (at
        most two) of 1024 · 2^k positions around the requested ones. The next block replaces it, so decoding computes
        one table every 1024 tokens and keeps only one.
        """
        if positions_L is not None:
            angles_LR = self.angle_table(length, width, offset=offset, positions_L=positions_L, device=device)
            return angles_LR.cos(), angles_LR.sin()
        # None and "cuda" mean the current device; the key must name it.
        device = torch.empty(0, device=device).device
        end = offset + length
        nothing = torch.empty(0, width // 2, device=device)
        start, cos_LR, sin_LR = self._cos_sin.get((width, device), (0, nothing, nothing))
        if offset < start or end > start + len(cos_LR):
            block = 1 << (max(length, 1024) - 1).bit_length()
            start = offset // block * block
            # A table created in inference mode could not be saved for a later backward pass.
            with torch.inference_mode(False):
                rows = -(-(end - start) // block) * block
                angles_LR = self.angle_table(rows, width, offset=start, device=device)
                cos_LR, sin_LR = angles_LR.cos(), angles_LR.sin()
            self._cos_sin[width, device] = (start, cos_LR, sin_LR)
        return cos_LR[offset - start : end - start], sin_LR[offset - start : end - start]

    def megatron_table(
        self,
        length: int,
        width: int,
        *,
        offset: int = 0,
        positions_L: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """The angles in Megatron attention's format: both halves of a head alike, [length, 1, 1, width], fp32."""
        key = (length, width, offset, str(device))
        # All attention layers of a step request the same table; only the last is kept.
        if positions_L is None and self._megatron_table[0] == key:
            return self._megatron_table[1]
        # Outside inference mode, so that a later backward pass can use it, too.
        with torch.inference_mode(False):
            angles_LR = self.angle_table(length, width, offset=offset, positions_L=positions_L, device=device)
            table = torch.cat((angles_LR, angles_LR), dim=-1)[:, None, None, :]
        if positions_L is None:
            self._megatron_table = (key, table)
        return table


def length_scale(positions_L: Tensor, length_scaling_base: float) -> Tensor:
    """The factor max(1, log_base(n)) on C for length extension (arXiv:2506.09507, appendix A), [L], fp32.

    `length_scaling_base` is the mean effective training length in tokens; shorter sequences are unaffected. The paper
    has one factor for a sequence of n tokens. Here n counts the tokens up to and including each one (position + 1), so
    that decoding step by step equals the parallel form; at the last of n tokens it is the paper's factor.
    """
    if length_scaling_base <= 1:
        raise ValueError(f"length_scaling_base={length_scaling_base} is not above 1; use the mean training length")
    # fp64: n = base must give a logarithm of exactly 1.
    n_L = positions_L.double() + 1
    return (n_L.log() / math.log(length_scaling_base)).clamp(min=1.0).float()
