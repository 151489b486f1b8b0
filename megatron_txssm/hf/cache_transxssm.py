"""What generation carries from token to token: keys and values of attention layers, states of state-space layers.

B=batch  H=heads  P=head dim  N=state size  E=channels of the convolution  K=its taps
"""

from typing import Any, NoReturn

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, LinearAttentionLayer


class StateSpaceCacheLayer(LinearAttentionLayer):
    """A state-space layer's state, [B, H, P, N], and where it has a convolution, its last inputs, [B, E, K-1].

    Of constant size, whatever the length of the text. A new state takes the place of the old one, which stays as it
    was: gradients may flow through it.
    """

    is_compileable = False

    @property
    def state_BHPN(self) -> torch.Tensor | None:
        return self.recurrent_states[0] if self.has_previous_state[0] else None

    @property
    def history_BEK(self) -> torch.Tensor | None:
        return self.conv_states[0] if self.has_previous_state[0] else None

    def replace(self, state_BHPN: torch.Tensor, history_BEK: torch.Tensor | None) -> None:
        """The state and the convolution's inputs behind the last token."""
        self.device, self.dtype = state_BHPN.device, state_BHPN.dtype
        self.recurrent_states[0], self.is_recurrent_states_initialized[0] = state_BHPN, True
        self.conv_states[0], self.is_conv_states_initialized[0] = history_BEK, history_BEK is not None
        self.has_previous_state[0] = True

    def _map(self, function: Any) -> None:
        for states in (self.recurrent_states, self.conv_states):
            if (tensor := states[0]) is not None:
                states[0] = function(tensor)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map(lambda tensor: tensor[indices])


class TransXSSMCache(DynamicCache):
    """The cache of one batch of texts: `TransXSSMCache(model.config)`, then `cache` of forward or generate.

    It counts the tokens that it has seen, as a model without attention layers has no keys that would tell.
    """

    def __init__(self, config: PreTrainedConfig):
        kinds = {"linear_attention": StateSpaceCacheLayer, "full_attention": DynamicLayer}
        Cache.__init__(self, layers=[kinds[kind]() for kind in config.layer_types])
        self.seen_tokens = 0
        # Its keys are those of several documents in a row, and nothing in it says which is whose.
        self.packed = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen_tokens

    @property
    def is_linear(self) -> list[bool]:
        """Of state-space layers alone it would tell generate() of 5.24 that no tokens are counted: it would feed all
        tokens again where a text goes on from this cache."""
        linear = [isinstance(layer, StateSpaceCacheLayer) for layer in self.layers]
        return linear if not all(linear) else [False] * len(linear)

    def reset(self) -> None:
        super().reset()
        self.seen_tokens, self.packed = 0, False

    def crop(self, tokens_to_remove: int) -> NoReturn:
        raise ValueError(
            "a state-space layer's state cannot be rolled back; keep a copy.deepcopy of the cache from before"
        )

    def nbytes(self) -> int:
        """Memory of everything it holds, in bytes."""
        tensors: list[Any] = []
        for layer in self.layers:
            if isinstance(layer, StateSpaceCacheLayer):
                tensors += [layer.recurrent_states[0], layer.conv_states[0]]
            elif isinstance(layer, DynamicLayer):
                tensors += [layer.keys, layer.values]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)
