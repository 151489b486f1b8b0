"""Times collectives among all processes of this machine, at two sizes each."""

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_txssm.planning.corrections import Link
from megatron_txssm.planning.rates import sent_bytes

# Bytes of the largest tensor, and repetitions.
SIZES = {2**16: 20, 2**24: 8}
FP32 = 4


def measure_links() -> dict[str, Link]:
    """Collective -> its link; all ranks call this together and get the slowest one's figures."""
    return {name: _link(name, call) for name, call in CALLS.items()}


def _all_reduce(whole: Tensor, part: Tensor) -> None:
    dist.all_reduce(whole)


def _all_gather(whole: Tensor, part: Tensor) -> None:
    dist.all_gather_into_tensor(whole, part)


def _reduce_scatter(whole: Tensor, part: Tensor) -> None:
    dist.reduce_scatter_tensor(part, whole)


def _all_to_all(whole: Tensor, part: Tensor) -> None:
    dist.all_to_all_single(torch.empty_like(whole), whole)


def _send_recv(whole: Tensor, part: Tensor) -> None:
    """To the next rank, from the one before."""
    rank, size = dist.get_rank(), dist.get_world_size()
    received = torch.empty_like(whole)
    transfers = [dist.P2POp(dist.isend, whole, (rank + 1) % size), dist.P2POp(dist.irecv, received, (rank - 1) % size)]
    for work in dist.batch_isend_irecv(transfers):
        work.wait()


CALLS: dict[str, Callable[[Tensor, Tensor], None]] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "send_recv": _send_recv,
}


def _link(name: str, call: Callable[[Tensor, Tensor], None]) -> Link:
    """Latency and bandwidth from the line through both sizes' seconds."""
    (small, few), (large, many) = ((size, _seconds(call, size, count)) for size, count in SIZES.items())
    sent = sent_bytes(name, dist.get_world_size())
    bandwidth = sent * (large - small) / max(many - few, 1e-9)
    return Link(latency=max(0.0, few - sent * small / bandwidth), bandwidth=bandwidth)


def _seconds(call: Callable[[Tensor, Tensor], None], size: int, count: int) -> float:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    members = dist.get_world_size()
    whole = torch.zeros(size // FP32 // members * members, device=device)
    part = torch.zeros(whole.numel() // members, device=device)
    found: list[float] = []
    for _ in range(count + 2):
        dist.barrier()
        began = time.perf_counter()
        call(whole, part)
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    # The first two warm up.
    slowest = torch.tensor(statistics.median(found[2:]), dtype=torch.float64, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)
