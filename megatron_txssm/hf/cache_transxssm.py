"""The generation cache: keys and values of attention layers, states of state-space layers.

B=batch  H=heads  T=tokens  P=head dim  N=state size  E=channels of the convolution  K=its taps
"""

from typing import Any, NoReturn

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, LinearAttentionLayer, StaticLayer

from megatron_txssm.ops.tracing import is_traced

# Tokens per allocation: all keys and values are copied once per so many steps, and at most so many places are unused.
BLOCK_TOKENS = 256


class AttentionCacheLayer(DynamicLayer):
    """An attention layer's keys and values, [B, H, T, P], in buffers ("rooms") with spare places for the next tokens.

    `keys` and `values` are views of the tokens so far. Tokens in a view are never overwritten: code that replaces or
    slices these tensors abandons the buffers.
    """

    def __init__(self) -> None:
        super().__init__()
        # Buffers of keys and values, and the views of them that the last update returned.
        self.rooms: tuple[torch.Tensor, ...] = ()
        self.shown: tuple[Any, ...] = (None, None)
        # Tokens in the buffers: one shared number for all layers that share them, such as copies of this layer.
        self.written = [0]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        old: tuple[Any, ...] = (self.keys, self.values)
        new = (key_states, value_states)
        if not self._may_write(old, new):
            self._leave_rooms()
            return super().update(key_states, value_states, *args, **kwargs)
        seen, tokens = old[0].shape[-2], key_states.shape[-2]
        if not self._shows_rooms() or self.written[0] != seen or seen + tokens > self.rooms[0].shape[-2]:
            self.rooms, self.written = tuple(_with_room(tensor, seen + tokens) for tensor in old), [seen]
        for room_BHTP, states_BHTP in zip(self.rooms, new, strict=True):
            room_BHTP[:, :, seen : seen + tokens] = states_BHTP
        self.written[0] = seen + tokens
        return self._show(seen + tokens)

    @staticmethod
    def _may_write(old: tuple[Any, ...], new: tuple[torch.Tensor, ...]) -> bool:
        """Whether new tokens may be written after the old ones, without a copy of them all.

        A text's first tokens get no spare places. A backward pass needs unmodified keys, and a compiler its own memory.
        Where dtypes or shapes differ, torch.cat decides the result.
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

    def _shows_rooms(self) -> bool:
        return self.keys is not None and self.keys is self.shown[0] and self.values is self.shown[1]

    def _leave_rooms(self) -> None:
        self.rooms, self.shown, self.written = (), (None, None), [0]

    def reset(self) -> None:
        super().reset()
        self._leave_rooms()

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._leave_rooms()

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._leave_rooms()

    def reorder_cache(self, beam_idx: Any) -> None:
        """Reorders the buffers, too: beam search calls it before each token, so this saves one of two copies."""
        if self.keys is None or not self._shows_rooms():
            super().reorder_cache(beam_idx)
            return
        tokens = self.keys.shape[-2]
        self.rooms = tuple(_selected(room_BHTP, beam_idx.to(room_BHTP.device)) for room_BHTP in self.rooms)
        self.written = [tokens]
        self._show(tokens)

    def nbytes(self) -> int:
        tensors = self.rooms if self._shows_rooms() else (self.keys, self.values)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _with_room(tensor_BHTP: torch.Tensor, tokens: int) -> torch.Tensor:
    """A copy with places for at least `tokens`, in whole blocks."""
    batch, heads, seen, width = tensor_BHTP.shape
    # A tensor created in inference mode could not be written to outside of it.
    with torch.inference_mode(False):
        room_BHTP = tensor_BHTP.new_empty(batch, heads, -(-tokens // BLOCK_TOKENS) * BLOCK_TOKENS, width)
    room_BHTP[:, :, :seen] = tensor_BHTP
    return room_BHTP


def _selected(room_BHTP: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode(False):
        selected_BHTP = room_BHTP.new_empty(len(rows), *room_BHTP.shape[1:])
    return torch.index_select(room_BHTP, 0, rows, out=selected_BHTP)


class StateSpaceCacheLayer(LinearAttentionLayer):
    """A state-space layer's state, [B, H, P, N], and its convolution's last inputs, if it has one, [B, E, K-1].

    The size is independent of the text's length. A new state replaces the old tensor without modifying it, so gradients
    can flow through it.
    """

    is_compileable = False

    @property
    def state_BHPN(self) -> torch.Tensor | None:
        return self.recurrent_states[0] if self.has_previous_state[0] else None

    @property
    def history_BEK(self) -> torch.Tensor | None:
        return self.conv_states[0] if self.has_previous_state[0] else None

    def replace(self, state_BHPN: torch.Tensor, history_BEK: torch.Tensor | None) -> None:
        """Set the state and the convolution's inputs after the last token."""
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


class StaticStateSpaceCacheLayer(StateSpaceCacheLayer):
    """The same at a fixed address: a new state overwrites the old one."""

    is_compileable = True

    def replace(self, state_BHPN: torch.Tensor, history_BEK: torch.Tensor | None) -> None:
        check_no_gradient(state_BHPN)
        if not self.is_recurrent_states_initialized[0]:
            self.lazy_initialization(conv_states=history_BEK, recurrent_states=state_BHPN)
        places: tuple[Any, ...] = (self.recurrent_states[0], self.conv_states[0])
        for place, tensor in zip(places, (state_BHPN, history_BEK), strict=True):
            if tensor is not None:
                place.copy_(tensor)
        self.device, self.dtype = state_BHPN.device, state_BHPN.dtype
        self.has_previous_state[0] = True

    def reorder_cache(self, beam_idx: Any) -> None:
        for states in (self.recurrent_states, self.conv_states):
            if (tensor := states[0]) is not None:
                tensor.copy_(tensor.index_select(0, beam_idx.to(tensor.device)))


class StaticAttentionCacheLayer(StaticLayer):
    """An attention layer's keys and values, [B, H, max_cache_len, P], at a fixed address."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        check_no_gradient(key_states, value_states)
        return super().update(key_states, value_states, *args, **kwargs)

    def _map(self, function: Any) -> None:
        if self.keys is not None and self.values is not None:
            self.keys, self.values = function(self.keys), function(self.values)

    def reorder_cache(self, beam_idx: Any) -> None:
        self._map(lambda tensor: tensor.copy_(tensor.index_select(0, beam_idx.to(tensor.device))))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map(lambda tensor: tensor[indices])

    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.keys, self.values) if tensor is not None)


def check_no_gradient(*tensors: torch.Tensor) -> None:
    """ValueError if a backward pass would need tensors that a static cache overwrites."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise ValueError(
            "a static cache overwrites tensors that a backward pass would need; compute under torch.no_grad(), or "
            "leave max_cache_len out"
        )


class TransXSSMCache(DynamicCache):
    """The cache of one batch of texts: `TransXSSMCache(model.config)`, passed to forward or generate as `cache`.

    With `max_cache_len` it is static: all tensors keep their address and have their final shape, so that one compiled
    graph decodes every token. Otherwise keys and values grow.

    It counts the tokens itself, because a model without attention layers has no keys to count.
    """

    def __init__(self, config: PreTrainedConfig, max_cache_len: int | None = None):
        self.max_cache_len = max_cache_len
        layers: list[Any] = []
        for kind in config.layer_types:
            if max_cache_len is None:
                layers.append(StateSpaceCacheLayer() if kind == "linear_attention" else AttentionCacheLayer())
            elif kind == "linear_attention":
                layers.append(StaticStateSpaceCacheLayer())
            else:
                layers.append(StaticAttentionCacheLayer(max_cache_len))
        Cache.__init__(self, layers=layers)
        # A tensor in a static cache: a graph would specialise on an int.
        self.seen_tokens: Any = 0 if max_cache_len is None else torch.tensor(0)
        # Whether a static cache has seen any tokens.
        self._begun = False
        # Whether a row's keys belong to several documents; the cache does not record which.
        self.packed = False

    @property
    def begun(self) -> bool:
        """Whether it has seen any tokens; does not synchronise with the GPU."""
        return self.seen_tokens > 0 if self.max_cache_len is None else self._begun

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """An int; for a static cache a tensor, which later tokens modify in place."""
        return self.seen_tokens

    def count(self, tokens: int, device: torch.device) -> None:
        """Count new tokens, after all layers were updated with them."""
        if self.max_cache_len is not None and not self.begun:
            self.seen_tokens = self.seen_tokens.to(device)
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(self.seen_tokens)
        self.seen_tokens += tokens
        self._begun = True

    def new_tokens(self, length: int, device: torch.device) -> Any:
        """The places of the next `length` tokens: a slice; for a static cache a tensor."""
        if self.max_cache_len is None:
            return slice(self.seen_tokens, self.seen_tokens + length)
        return torch.arange(length, device=device) + self.seen_tokens.to(device)

    def whole_mask(self, mask_BT: torch.Tensor) -> torch.Tensor:
        """The mask padded to a static cache's capacity, 0 at empty places."""
        return torch.nn.functional.pad(mask_BT, (0, (self.max_cache_len or mask_BT.shape[1]) - mask_BT.shape[1]))

    @property
    def is_linear(self) -> list[bool]:
        """Which layers are state-space layers; all False if they all are.

        All True would tell transformers 5.24's generate() that the cache does not count tokens, and it would feed all
        tokens again when it continues a text.
        """
        linear = [isinstance(layer, StateSpaceCacheLayer) for layer in self.layers]
        return linear if not all(linear) else [False] * len(linear)

    def reset(self) -> None:
        super().reset()
        self.seen_tokens *= 0
        self._begun = self.packed = False

    def crop(self, tokens_to_remove: int) -> NoReturn:
        raise ValueError(
            "a state-space layer's state cannot be rolled back; keep a copy.deepcopy of the cache from before"
        )

    def nbytes(self) -> int:
        """Memory of all tensors in it, in bytes."""
        layers: list[Any] = self.layers
        return sum(layer.nbytes() for layer in layers)
