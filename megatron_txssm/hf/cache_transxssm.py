"""What generation carries from token to token: keys and values of attention layers, states of state-space layers.

B=batch  H=heads  T=tokens  P=head dim  N=state size  E=channels of the convolution  K=its taps
"""

from typing import Any, NoReturn

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, LinearAttentionLayer

from megatron_txssm.ops.tracing import is_traced

# Tokens that room is made for at a time: a copy of all keys and values in so many steps, and at most so much unused.
BLOCK_TOKENS = 256


class AttentionCacheLayer(DynamicLayer):
    """An attention layer's keys and values, [B, H, T, P]; behind them is room, which the next tokens are written into.

    `keys` and `values` are views of the tokens up to now. What is shown is never written again: whatever puts other
    tensors in their place, or cuts them, leaves the room behind.
    """

    def __init__(self) -> None:
        super().__init__()
        # Keys and values with their room, and the views of them that the last update showed.
        self.rooms: tuple[torch.Tensor, ...] = ()
        self.shown: tuple[Any, ...] = (None, None)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        old, new = (self.keys, self.values), (key_states, value_states)
        if not self._may_write(old, new):
            self.rooms, self.shown = (), (None, None)
            return super().update(key_states, value_states, *args, **kwargs)
        seen, tokens = old[0].shape[-2], key_states.shape[-2]
        if old[0] is not self.shown[0] or old[1] is not self.shown[1] or seen + tokens > self.rooms[0].shape[-2]:
            self.rooms = tuple(_with_room(tensor, seen + tokens) for tensor in old)
        for room_BHTP, states_BHTP in zip(self.rooms, new, strict=True):
            room_BHTP[:, :, seen : seen + tokens] = states_BHTP
        return self._show(seen + tokens)

    @staticmethod
    def _may_write(old: tuple[Any, ...], new: tuple[torch.Tensor, ...]) -> bool:
        """Whether new tokens may be written behind the old ones, and not into a copy of them all.

        A text's first tokens take no more than their own memory. A backward pass wants keys as they were, and a
        compiler memory that is its own. Where types or shapes differ, torch.cat says what comes of it.
        """
        if old[0] is None or old[0].dim() != 4 or torch.is_grad_enabled() or is_traced(*old, *new):
            return False
        return all(
            (was.dtype, was.device, was.shape[:2], was.shape[3]) == (now.dtype, now.device, now.shape[:2], now.shape[3])
            for was, now in zip(old, new, strict=True)
        )

    def _show(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys, self.values = (room_BHTP[:, :, :tokens] for room_BHTP in self.rooms)
        self.shown = (self.keys, self.values)
        return self.keys, self.values

    def reset(self) -> None:
        super().reset()
        self.rooms, self.shown = (), (None, None)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """With the room: beam search does this before each token, and then copies everything once and not twice."""
        if self.keys is None or self.keys is not self.shown[0] or self.values is not self.shown[1]:
            super().reorder_cache(beam_idx)
            return
        self.rooms = tuple(room_BHTP.index_select(0, beam_idx.to(room_BHTP.device)) for room_BHTP in self.rooms)
        self._show(self.keys.shape[-2])

    def nbytes(self) -> int:
        tensors = self.rooms or (self.keys, self.values)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _with_room(tensor_BHTP: torch.Tensor, tokens: int) -> torch.Tensor:
    """A copy with room for so many tokens, in whole blocks."""
    batch, heads, seen, width = tensor_BHTP.shape
    # What is made in inference mode could not be written outside.
    with torch.inference_mode(False):
        room_BHTP = tensor_BHTP.new_empty(batch, heads, -(-tokens // BLOCK_TOKENS) * BLOCK_TOKENS, width)
    room_BHTP[:, :, :seen] = tensor_BHTP
    return room_BHTP


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

    def nbytes(self) -> int:
        tensors = (self.recurrent_states[0], self.conv_states[0])
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


class TransXSSMCache(DynamicCache):
    """The cache of one batch of texts: `TransXSSMCache(model.config)`, then `cache` of forward or generate.

    It counts the tokens that it has seen, as a model without attention layers has no keys that would tell.
    """

    def __init__(self, config: PreTrainedConfig):
        kinds = {"linear_attention": StateSpaceCacheLayer, "full_attention": AttentionCacheLayer}
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
        layers: list[Any] = self.layers
        return sum(layer.nbytes() for layer in layers)
