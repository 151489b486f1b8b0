"""Packed documents: which tokens of a sample belong together, for attention and state-space layers.

B=batch (samples)  L=length of the whole sample, also under context parallelism
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_txssm.model.context_parallel import Zigzag


class Segment(NamedTuple):
    """Consecutive queries of one document on this rank, and the keys that the last query sees."""

    row: int
    # Into this rank's tokens.
    queries: slice
    # Into the whole sample; queries and keys end at the same token.
    keys: slice


@dataclass
class PackedDocuments(PackedSeqParams):
    """Passed as Megatron's `packed_seq_params`: layers then keep documents separate.

    Megatron's own parameters flatten the samples of a micro-batch into one sequence ("thd"), which its pipeline does
    not expect; here samples keep their shape. Positions need not restart: rotation depends only on distances.
    """

    # Each token's document, numbered from 1; and the token's position in it.
    document_BL: Tensor | None = None
    position_BL: Tensor | None = None
    _segments: dict[Zigzag, list[Segment]] = field(default_factory=dict, repr=False)

    @classmethod
    def from_position_ids(cls, position_ids_BL: Tensor) -> "PackedDocuments":
        """From positions that restart at 0 in every document, as GPTDataset's inter_document_masking makes them."""
        length = position_ids_BL.shape[1]
        # Megatron takes the length of its rotary table from max_seqlen.
        return cls(
            qkv_format="sbhd",
            max_seqlen_q=length,
            max_seqlen_kv=length,
            document_BL=(position_ids_BL == 0).cumsum(1),
            position_BL=position_ids_BL,
        )

    def segments(self, zigzag: Zigzag) -> list[Segment]:
        """This rank's segments, row by row in token order; computed once for all layers."""
        if zigzag not in self._segments:
            assert self.position_BL is not None
            rows = enumerate(self.position_BL.tolist())
            self._segments[zigzag] = [segment for row, positions in rows for segment in _of_row(row, positions, zigzag)]
        return self._segments[zigzag]


def _of_row(row: int, positions: list[int], zigzag: Zigzag) -> list[Segment]:
    segments, local = [], 0
    for piece in zigzag.ranges(len(positions) // zigzag.size):
        starts = [piece.start, *(t for t in range(piece.start + 1, piece.stop) if positions[t] == 0)]
        for start, end in zip(starts, [*starts[1:], piece.stop], strict=True):
            queries = slice(local, local + end - start)
            segments.append(Segment(row, queries, slice(start - positions[start], end)))
            local = queries.stop
    return segments
