"""Context parallelism: how a sequence is divided over ranks, and what its pieces pass to each other.

Each rank holds two pieces, as Megatron's attention wants them: of 2·size pieces the rank-th from the front and from the
back, so that causal attention is the same work everywhere (a "zigzag"). L=length on this rank, l=length of a piece,
B=batch; where a tensor's pieces are rows of their own, its letter is b = B·pieces.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import all_to_all, gather_from_sequence_parallel_region
from torch import Tensor


@dataclass(frozen=True)
class Zigzag:
    """The place of one rank among `size` ones; without context parallelism its only piece is the whole sequence."""

    size: int = 1
    rank: int = 0
    group: Any = None

    @classmethod
    def of(cls, group: Any) -> "Zigzag":
        """Of this rank in a process group."""
        return cls() if group is None or group.size() == 1 else cls(group.size(), group.rank(), group)

    @property
    def pieces(self) -> tuple[int, ...]:
        """The numbers of this rank's pieces."""
        return (0,) if self.size == 1 else (self.rank, 2 * self.size - 1 - self.rank)

    def ranges(self, length: int, offset: int = 0) -> list[slice]:
        """Where the pieces of a rank's `length` tokens are in the whole sequence, which begins at `offset`."""
        piece = length // len(self.pieces)
        return [slice(offset + number * piece, offset + (number + 1) * piece) for number in self.pieces]

    def own(self, whole: Tensor, dim: int = 1) -> Tensor:
        """This rank's tokens of a tensor that holds the whole sequence along `dim`."""
        if self.size == 1:
            return whole
        ranges = self.ranges(whole.shape[dim] // self.size)
        return torch.cat([whole.narrow(dim, r.start, r.stop - r.start) for r in ranges], dim=dim)

    def fold(self, t_BL: Tensor) -> Tensor:
        """[B, L, …] → [b, l, …]: every piece as a row."""
        return t_BL.unflatten(1, (len(self.pieces), -1)).flatten(0, 1)

    def unfold(self, t_bl: Tensor) -> Tensor:
        """The contrary of `fold`."""
        return t_bl.unflatten(0, (-1, len(self.pieces))).flatten(1, 2)

    def gather(self, own: Tensor) -> Tensor:
        """[pieces of this rank, …] → [all pieces, …], in the order of the sequence; differentiable."""
        if self.size == 1:
            return own
        gathered = gather_from_sequence_parallel_region(
            own.contiguous(), tensor_parallel_output_grad=True, group=self.group
        )
        return gathered[torch.tensor(self._order_of_sequence, device=own.device)]

    @property
    def _order_of_ranks(self) -> list[int]:
        """The numbers of all pieces, rank by rank."""
        return [piece for rank in range(self.size) for piece in Zigzag(self.size, rank).pieces]

    @property
    def _order_of_sequence(self) -> list[int]:
        """Where among these each piece stands."""
        return sorted(range(2 * self.size), key=self._order_of_ranks.__getitem__)

    def gather_tokens(self, t_LB: Tensor) -> Tensor:
        """[L, B, …] → the whole sequence, [L·size, B, …]; differentiable."""
        return self.gather(t_LB.unflatten(0, (len(self.pieces), -1))).flatten(0, 1)

    def previous_tails(self, t_bl: Tensor, tokens: int) -> Tensor:
        """What stands before each piece, its predecessor's last `tokens` ones, [b, tokens, …]; zeros before the first.

        Differentiable.
        """
        tails = t_bl[:, -tokens:].unflatten(0, (-1, len(self.pieces))).transpose(0, 1)
        tails = self.gather(tails)
        before = torch.cat([torch.zeros_like(tails[:1]), tails[:-1]])[list(self.pieces)]
        return before.transpose(0, 1).flatten(0, 1)

    def pass_states(self, added_bHPN: Tensor, decay_bH: Tensor) -> Tensor:
        """The state that enters each piece, [b, H, P, N], from what every piece adds and lets through; differentiable.

        All ranks get all pieces' (state, decay), so that what is sent is independent of the length, and add up those
        before their own: entering of the next = decay · entering + added.
        """
        packed = torch.cat([added_bHPN.flatten(2), decay_bH[..., None]], dim=-1)
        packed = self.gather(packed.unflatten(0, (-1, len(self.pieces))).transpose(0, 1))
        added, decay = packed[..., :-1], packed[..., -1:]
        entering = [torch.zeros_like(added[0])]
        for piece in range(max(self.pieces)):
            entering.append(torch.addcmul(added[piece], decay[piece], entering[-1]))
        own = torch.stack([entering[piece] for piece in self.pieces], dim=1)
        return own.flatten(0, 1).view_as(added_bHPN)

    def heads_for_tokens(self, t_BLH: Tensor) -> Tensor:
        """[B, L, H, …] → [B, L·size, H / size, …]: a share of the heads for all tokens, in order; differentiable."""
        of_heads = t_BLH.unflatten(2, (self.size, -1)).movedim(2, 0).contiguous()
        of_ranks = all_to_all(self.group, of_heads)
        pieces = of_ranks.unflatten(2, (2, -1)).transpose(1, 2).flatten(0, 1)
        return pieces[torch.tensor(self._order_of_sequence, device=pieces.device)].transpose(0, 1).flatten(1, 2)

    def tokens_for_heads(self, t_BLH: Tensor) -> Tensor:
        """The contrary of `heads_for_tokens`."""
        pieces = t_BLH.unflatten(1, (2 * self.size, -1)).transpose(0, 1)
        pieces = pieces[torch.tensor(self._order_of_ranks, device=pieces.device)]
        of_ranks = pieces.unflatten(0, (self.size, 2)).transpose(1, 2).flatten(2, 3).contiguous()
        of_heads = all_to_all(self.group, of_ranks)
        return of_heads.movedim(0, 2).flatten(2, 3)
