"""The whole model from its equations, in fp64, the state-space layers token by token; for texts without padding.

It uses only the configuration's sizes from the package.
B=batch L=sequence length D=hidden size H=heads P=head dim G=groups N=state size E=channels of the convolution
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_txssm.hf import TransXSSMConfig


def logits_by_hand(config: TransXSSMConfig, parameters: dict[str, Tensor], input_ids: Tensor) -> Tensor:
    """[B, L] → [B, L, vocabulary]; `parameters` by their names in the model."""
    embedding = parameters["model.embed_tokens.weight"]
    hidden_BLD = embedding[input_ids]
    for index, kind in enumerate(config.layer_types or ()):
        prefix = f"model.layers.{index}."
        own = {name.removeprefix(prefix): tensor for name, tensor in parameters.items() if name.startswith(prefix)}
        mix = attention if kind == "full_attention" else state_space
        hidden_BLD = hidden_BLD + mix(config, own, rms_norm(config, hidden_BLD, own["input_layernorm.weight"]))
        normed_BLD = rms_norm(config, hidden_BLD, own["post_attention_layernorm.weight"])
        hidden_BLD = hidden_BLD + (experts if "mlp.gate.weight" in own else ffn)(config, own, normed_BLD)
    final_BLD = rms_norm(config, hidden_BLD, parameters["model.norm.weight"])
    return final_BLD @ parameters.get("lm_head.weight", embedding).T


def swiglu(u: Tensor, gate_weight: Tensor, up_weight: Tensor, down_weight: Tensor) -> Tensor:
    gate = u @ gate_weight.T
    return (gate * gate.sigmoid() * (u @ up_weight.T)) @ down_weight.T


def ffn(config: TransXSSMConfig, own: dict[str, Tensor], u: Tensor, prefix: str = "mlp") -> Tensor:
    return swiglu(u, *(own[f"{prefix}.{name}_proj.weight"] for name in ("gate", "up", "down")))


def experts(config: TransXSSMConfig, own: dict[str, Tensor], u_BLD: Tensor) -> Tensor:
    """Every expert computes every token; the weights of those that a token does not choose are zero."""
    logits_BLN = u_BLD @ own["mlp.gate.weight"].T
    # Rank 0: the largest.
    ranks_BLN = logits_BLN.argsort(-1, descending=True).argsort(-1)
    weights_BLN = logits_BLN.masked_fill(ranks_BLN >= config.num_experts_per_tok, -math.inf).softmax(-1)
    out_BLD = ffn(config, own, u_BLD, "mlp.shared_expert") if config.shared_expert_intermediate_size else 0.0 * u_BLD
    for n, (gate_up, down) in enumerate(
        zip(own["mlp.experts.gate_up_proj"], own["mlp.experts.down_proj"], strict=True)
    ):
        half = len(gate_up) // 2
        out_BLD = out_BLD + weights_BLN[..., n, None] * swiglu(u_BLD, gate_up[:half], gate_up[half:], down)
    return out_BLD


def rms_norm(config: TransXSSMConfig, x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weight


def rotated(config: TransXSSMConfig, vectors: Tensor, position: int) -> Tensor:
    """Plane i of the last dimension, (v[i], v[i + width/2]), rotated by position · base^(-2i/width)."""
    rope = config.rope_parameters or {}
    half = vectors.shape[-1] // 2
    frequencies = rope.get("rope_theta", 10000.0) ** -(torch.arange(half, dtype=torch.float64) / half)
    turn = torch.polar(torch.ones_like(frequencies), position / rope.get("factor", 1.0) * frequencies)
    turned = torch.complex(vectors[..., :half], vectors[..., half:]) * turn
    return torch.cat([turned.real, turned.imag], dim=-1)


def attention(config: TransXSSMConfig, own: dict[str, Tensor], u_BLD: Tensor) -> Tensor:
    """Each token attends to itself and all before it; query head h reads key head h // (queries / keys)."""
    length, width = u_BLD.shape[1], config.head_dim or 0
    q, k, v = ((u_BLD @ own[f"self_attn.{name}_proj.weight"].T).unflatten(-1, (-1, width)) for name in "qkv")
    if config.attention_position_encoding == "rope":
        q, k = (torch.stack([rotated(config, x[:, t], t) for t in range(length)], dim=1) for x in (q, k))
    heads = []
    for h in range(q.shape[2]):
        group = h // (q.shape[2] // k.shape[2])
        scores = q[:, :, h] @ k[:, :, group].mT / math.sqrt(width)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        heads.append(scores.masked_fill(future, -math.inf).softmax(-1) @ v[:, :, group])
    return torch.cat(heads, dim=-1) @ own["self_attn.o_proj.weight"].T


def state_space(config: TransXSSMConfig, own: dict[str, Tensor], u_BLD: Tensor) -> Tensor:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_tᵀ, y_t = h_t C_t, and the rest of the mixer."""
    heads, groups, inner = config.state_num_heads or 0, config.state_num_groups, config.state_inner_size
    widths = [inner * config.state_gated, inner + 2 * groups * config.state_size, heads]
    z_BLE, xBC_BLE, raw_dt_BLH = (u_BLD @ own["mixer.in_proj.weight"].T).split(widths, dim=-1)
    state_BHPN = u_BLD.new_zeros(u_BLD.shape[0], heads, config.state_head_dim, config.state_size)
    outputs = []
    for t in range(u_BLD.shape[1]):
        xBC_BE = xBC_BLE[:, t]
        if config.position_encoding == "conv1d_d":
            taps_EK = own["mixer.conv1d.weight"][:, 0].flip(-1)
            reach = range(min(config.conv_kernel, t + 1))
            xBC_BE = F.silu(own["mixer.conv1d.bias"] + sum(taps_EK[:, back] * xBC_BLE[:, t - back] for back in reach))
        x_BE, B_BE, C_BE = xBC_BE.split([inner, groups * config.state_size, groups * config.state_size], dim=-1)
        x_BHP = x_BE.unflatten(-1, (heads, -1))
        B_BHN, C_BHN = (p.unflatten(-1, (groups, -1)).repeat_interleave(heads // groups, 1) for p in (B_BE, C_BE))
        if config.position_encoding == "rope":
            B_BHN, C_BHN = rotated(config, B_BHN, t), rotated(config, C_BHN, t)
        if config.length_scaling_base is not None:
            C_BHN = C_BHN * max(1.0, math.log(t + 1, config.length_scaling_base))
        dt_BH = F.softplus(raw_dt_BLH[:, t] + own.get("mixer.dt_bias", 0.0))
        decay_BH = torch.exp(-own["mixer.A_log"].exp() * dt_BH)
        added_BHPN = torch.einsum("bh,bhp,bhn->bhpn", dt_BH, x_BHP, B_BHN)
        state_BHPN = decay_BH[..., None, None] * state_BHPN + added_BHPN
        y_BHP = torch.einsum("bhpn,bhn->bhp", state_BHPN, C_BHN)
        if config.position_encoding == "conv1d_d":
            y_BHP = y_BHP + own["mixer.D"][:, None] * x_BHP
        y_BE = y_BHP.flatten(1)
        if config.state_gated:
            gated_BGE = (y_BE * F.silu(z_BLE[:, t])).unflatten(-1, (groups, -1))
            y_BE = rms_norm(config, gated_BGE, own["mixer.norm.weight"].unflatten(0, (groups, -1))).flatten(1)
        outputs.append(y_BE @ own["mixer.out_proj.weight"].T)
    return torch.stack(outputs, dim=1)
