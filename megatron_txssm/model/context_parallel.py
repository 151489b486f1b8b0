"""Context parallelism: how a sequence is divided over ranks, and what its pieces exchange.

Megatron's attention cuts a sequence into 2·size pieces; rank n holds the n-th from the front and the n-th from the
back, so that causal attention costs the same on every rank (a "zigzag"). L=length on this rank, l=length of a piece,
B=batch, b=B·pieces where each piece is a row.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import all_to_all, gather_from_sequence_parallel_region
from torch import Tensor


@dataclass(frozen=True)
class Zigzag:
    """One rank among `size`; without context parallelism its only piece is the whole sequence."""

    size: int = 1
    rank: int = 0
    group: Any = None

    @classmethod
    def of(cls, group: Any) -> "Zigzag":
        """This rank's zigzag in a process group."""
        return cls() if group is None or group.size() == 1 else cls(group.size(), group.rank(), group)

    @property
    def pieces(self) -> tuple[int, ...]:
        """Indices of this rank's pieces."""
        return (0,) if self.size == 1 else (self.rank, 2 * self.size - 1 - self.rank)

    def ranges(self, length: int, offset: int = 0) -> list[slice]:
        """The positions, in the whole sequence starting at `offset`, of the pieces of a rank's `length` tokens."""
        piece = length // len(self.pieces)
        return [slice(offset + number * piece, offset + (number + 1) * piece) for number in self.pieces]

    def own(self, whole: Tensor, dim: int = 1) -> Tensor:
        """This rank's tokens of a tensor that holds the whole sequence along `dim`."""
        if self.size == 1:
            return whole
        ranges = self.ranges(whole.shape[dim] // self.size)
        return torch.cat([whole.narrow(dim, r.start, r.stop - r.start) for r in ranges], dim=dim)

    def fold(self, t_BL: Tensor) -> Tensor:
        """[B, L, …] → [b, l, …]: one row per piece."""
        return t_BL.unflatten(1, (len(self.pieces), -1)).flatten(0, 1)

    def unfold(self, t_bl: Tensor) -> Tensor:
        """Inverse of `fold`."""
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
        """Indices of all pieces, rank by rank."""
        return [piece for rank in range(self.size) for piece in Zigzag(self.size, rank).pieces]

    @property
    def _order_of_sequence(self) -> list[int]:
        """Each piece's index in `_order_of_ranks`."""
        return sorted(range(2 * self.size), key=self._order_of_ranks.__getitem__)

    def gather_tokens(self, t_LB: Tensor) -> Tensor:
        """[L, B, …] → the whole sequence, [L·size, B, …]; differentiable."""
        return self.gather(t_LB.unflatten(0, (len(self.pieces), -1))).flatten(0, 1)

    def previous_tails(self, t_bl: Tensor, tokens: int) -> Tensor:
        """The last `tokens` tokens of each piece's predecessor, [b, tokens, …]; zeros before the first piece.

        Differentiable.
        """
        tails = t_bl[:, -tokens:].unflatten(0, (-1, len(self.pieces))).transpose(0, 1)
        tails = self.gather(tails)
        before = torch.cat([torch.zeros_like(tails[:1]), tails[:-1]])[list(self.pieces)]
        return before.transpose(0, 1).flatten(0, 1)

    def pass_states(self, added_bHPN: Tensor, decay_bH: Tensor) -> Tensor:
        """The state entering each piece, [b, H, P, N], from every piece's added state and decay; differentiable.

        Every rank receives all pieces' (state, decay), so communication is independent of the length, and accumulates
        the pieces before its own: entering of the next = decay · entering + added.
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
        """[B, L, H, …] → [B, L·size, H / size, …]: 1/size of the heads for all tokens, in order; differentiable."""
        of_heads = t_BLH.unflatten(2, (self.size, -1)).movedim(2, 0).contiguous()
        of_ranks = all_to_all(self.group, of_heads)
        pieces = of_ranks.unflatten(2, (2, -1)).transpose(1, 2).flatten(0, 1)
        return pieces[torch.tensor(self._order_of_sequence, device=pieces.device)].transpose(0, 1).flatten(1, 2)

    def tokens_for_heads(self, t_BLH: Tensor) -> Tensor:
        """Inverse of `heads_for_tokens`."""
        pieces = t_BLH.unflatten(1, (2 * self.size, -1)).transpose(0, 1)
        pieces = pieces[torch.tensor(self._order_of_ranks, device=pieces.device)]
        of_ranks = pieces.unflatten(0, (self.size, 2)).transpose(1, 2).flatten(2, 3).contiguous()
        of_heads = all_to_all(self.group, of_ranks)
        return of_heads.movedim(0, 2).flatten(2, 3)
