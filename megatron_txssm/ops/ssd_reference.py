"""State-space duality (SSD), token by token: the specification that every faster backend is tested against.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_tᵀ        y_t = h_t C_t

Source: arXiv:2405.21060 (Mamba-2), section 3; arXiv:2506.09507, section 2.1. The derivation is in ops/README.md.
"""

# B=batch L=sequence H=heads P=head dim G=groups N=state

import torch
from torch import Tensor
from torch.nn import functional as F


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """The dtype of states and decays: fp32 for bf16, fp16 and fp32 inputs, fp64 for fp64 inputs."""
    return torch.promote_types(x.dtype, torch.float32)


def number_documents(seq_idx_BL: Tensor) -> Tensor:
    """Number the packed documents 0, 1, 2, … by counting the changes of `seq_idx`, [B, L], int32.

    Unlike values of `seq_idx`, a number never recurs: equal numbers mean no reset in between. The initial state belongs
    to document 0.
    """
    changes = seq_idx_BL[:, 1:] != seq_idx_BL[:, :-1]
    return F.pad(changes.cumsum(1, dtype=torch.int32), (1, 0))


def ssd_step(
    x_BHP: Tensor, dt_BH: Tensor, A_H: Tensor, B_BGN: Tensor, C_BGN: Tensor, state_BHPN: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: decay the state, add the token, read the state out. Decoding uses it, too.

    `dt_BH` is the step after softplus (> 0), `A_H` is negative; head h reads group h // (H / G) of B and C.
    Returns `y_BHP` in x's dtype and the new state in fp32 (fp64 for fp64 inputs).
    """
    dtype = accumulation_dtype(x_BHP)
    dt_BH11 = dt_BH.to(dtype)[:, :, None, None]
    decay_BH11 = torch.exp(dt_BH11 * A_H.to(dtype)[:, None, None])
    heads_per_group = x_BHP.shape[1] // B_BGN.shape[1]
    B_BH1N = B_BGN.to(dtype).repeat_interleave(heads_per_group, dim=1)[:, :, None, :]
    C_BH1N = C_BGN.to(dtype).repeat_interleave(heads_per_group, dim=1)[:, :, None, :]

    state_BHPN = decay_BH11 * state_BHPN.to(dtype) + dt_BH11 * x_BHP.to(dtype)[..., None] * B_BH1N
    # Not a matmul: autocast would round its operands to bf16.
    y_BHP = (state_BHPN * C_BH1N).sum(-1)
    return y_BHP.to(x_BHP.dtype), state_BHPN


def ssd_reference(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    *,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`ssd_step` over every token: `(y_BLHP in x's dtype, final_state_BHPN in fp32 or fp64)`.

    `initial_state` (BHPN, zero if absent) belongs to the document of token 0. `seq_idx` (BL, integers) numbers the
    packed documents: the state is zeroed before token t wherever seq_idx[t] differs from seq_idx[t-1].
    """
    batch, _, heads, head_dim = x_BLHP.shape
    state_BHPN = initial_state
    if state_BHPN is None:
        state_BHPN = x_BLHP.new_zeros(batch, heads, head_dim, B_BLGN.shape[-1], dtype=accumulation_dtype(x_BLHP))

    # unbind, not x[:, t]: the backward of each index makes a full-length tensor, so the loop would be O(L²).
    tokens = zip(x_BLHP.unbind(1), dt_BLH.unbind(1), B_BLGN.unbind(1), C_BLGN.unbind(1), strict=True)
    outputs = []
    for t, (x_BHP, dt_BH, B_BGN, C_BGN) in enumerate(tokens):
        if seq_idx is not None and t > 0:
            starts_B = seq_idx[:, t] != seq_idx[:, t - 1]
            state_BHPN = state_BHPN.masked_fill(starts_B[:, None, None, None], 0.0)
        y_BHP, state_BHPN = ssd_step(x_BHP, dt_BH, A_H, B_BGN, C_BGN, state_BHPN)
        outputs.append(y_BHP)
    return torch.stack(outputs, dim=1), state_BHPN.to(accumulation_dtype(x_BLHP))
