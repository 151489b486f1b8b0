"""Model FLOPs per token from a model's sizes, without torch. tests/architecture holds them against a FLOP counter."""

from megatron_txssm.architecture.layer_pattern import ATTENTION, EXPERTS, FFN, STATE_SPACE
from megatron_txssm.architecture.parameters import ModelSizes

# The backward pass multiplies every matrix twice: once for the input's gradient, once for the weight's.
FORWARD_AND_BACKWARD = 3


def flops_per_token(sizes: ModelSizes, seq_length: int, document_length: float | None = None) -> float:
    """Model FLOPs per token of training, forward and backward; a multiply-add counts two.

    2 per weight and token forward and twice that backward, the 6·parameters of arXiv:2204.02311 (appendix B) and
    arXiv:2001.08361, over every projection of the mixers, the FFNs, a layer of experts as far as a token uses it, and
    the LM head (D·V, tied or not; the embedding lookup is not a matmul). Attention adds Q·Kᵀ and scores·V: a token at
    position t sees t keys, on average about half the sequence, so 2 · 2·(seq_length / 2)·H·K; Megatron's own count also
    uses this causal half (megatron.training.training.num_floating_point_operations). State-space layers add the scan,
    `StateSpaceConfig.flops_per_token`: linear in the length.

    `document_length`: if attention is isolated by document, the mean length of the document that a token is in: the sum
    of the documents' squared lengths over the number of tokens; None: the whole sample is one document.

    Each depth of multi-token prediction adds its projection, its layers and the LM head once more.

    Not counted: norms, rotations, activations, softmax, residuals, the optimizer, and recomputed activations: these are
    model FLOPs, as in MFU, not hardware FLOPs. Megatron's count does not apply: it assumes state-space layers with
    twice our inner width and a gate.
    """
    attended = seq_length if document_length is None else document_length
    scores = 2.0 * attended * sizes.num_attention_heads * sizes.kv_channels
    attention = FORWARD_AND_BACKWARD * (2.0 * sizes.attention_weights + scores)
    # The mixer's figure includes the backward pass.
    mixer = sizes.state_space.flops_per_token(seq_length) if sizes.state_space else 0.0
    ffn = FORWARD_AND_BACKWARD * 2.0 * sizes.ffn_weights
    experts = FORWARD_AND_BACKWARD * 2.0 * sizes.active_expert_weights
    logits = FORWARD_AND_BACKWARD * 2.0 * sizes.hidden_size * sizes.vocab_size
    per_layer = {ATTENTION: attention, STATE_SPACE: mixer, FFN: ffn, EXPERTS: experts}
    layers = sum(sizes.all_layers.count(layer) * flops for layer, flops in per_layer.items())
    depth = FORWARD_AND_BACKWARD * 2.0 * sizes.prediction_weights + logits
    return layers + logits + len(sizes.prediction_depths) * depth
