"""Measures a job's network before training: srun runs it on all nodes, and rank 0 prints one JSON object.

    {"allreduce": GB/s, "links": [GB/s into each node from the one before it, in a ring], "seconds": total}

The all-reduce's GB/s are nccl-tests' bus bandwidth: 2 (n - 1) / n times the bytes of a rank, per second.
"""

import argparse
import datetime
import json
import os
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from megatron_txssm.slurm.environment import adopt_slurm_step, end_with_launcher

WARMUPS, REPEATS = 2, 5


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=float, required=True, help="of each rank")
    parser.add_argument("--timeout", type=float, required=True, help="seconds")
    args = parser.parse_args()
    begin = time.monotonic()
    end_with_launcher()
    adopt_slurm_step()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_size = int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cpu")
    if torch.cuda.is_available():
        # Slurm may show a task only its own GPU.
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=args.timeout))
    data = torch.ones(int(args.megabytes * 1e6 / 4), dtype=torch.float32, device=device)
    num_bytes = data.numel() * 4
    seconds = _seconds(lambda: dist.all_reduce(data), device)
    allreduce = 2 * (world_size - 1) / world_size * num_bytes / seconds / 1e9
    # One rank of each node.
    leaders = list(range(0, world_size, local_size))
    group = dist.new_group(leaders)
    if rank in leaders:
        assert isinstance(group, dist.ProcessGroup)
        links = _links(data, leaders, leaders.index(rank), group, device)
        if rank == 0:
            found = {"allreduce": allreduce, "links": links, "seconds": time.monotonic() - begin}
            print(json.dumps(found), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def _links(
    data: torch.Tensor, leaders: list[int], place: int, group: dist.ProcessGroup, device: torch.device
) -> list[float]:
    """GB/s into every node from the node before it, with all links in use at once."""
    after, before = leaders[(place + 1) % len(leaders)], leaders[place - 1]
    received = torch.empty_like(data)

    def exchange() -> None:
        work = [dist.P2POp(dist.isend, data, after, group), dist.P2POp(dist.irecv, received, before, group)]
        # Wait for the receive first: it uses the link into this node, the send the one into the next node.
        for request in reversed(dist.batch_isend_irecv(work)):
            request.wait()

    mine = torch.tensor([data.numel() * 4 / _seconds(exchange, device) / 1e9], device=device)
    rates = [torch.empty_like(mine) for _ in leaders]
    dist.all_gather(rates, mine, group=group)
    return [float(rate) for rate in rates]


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Mean seconds per call."""
    for _ in range(WARMUPS):
        work()
    _wait(device)
    begin = time.perf_counter()
    for _ in range(REPEATS):
        work()
    _wait(device)
    return (time.perf_counter() - begin) / REPEATS


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
