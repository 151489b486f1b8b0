"""Runs a test's function on several gloo ranks, each a fresh process.

A fork server imports Megatron once per test process; ranks are forked from it and start within milliseconds.
"""

import contextlib
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_txssm.platform import prepare_platform

# Before the first import of Megatron, in the fork server as well.
prepare_platform()

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

# Longer than anything takes here, also on a loaded machine; whatever takes longer hangs.
TIMEOUT_SECONDS = 3600
# What the fork server imports, as it takes longer than most functions; this module comes first, for its platform.
PRELOADED = [__name__, "megatron.core.models.gpt", "megatron.training", "transformers"]


def run_ranks(function: Callable[..., Any], world_size: int, folder: Path, *arguments: Any) -> list[Any]:
    """Run `function(*arguments)` on every rank of a fresh gloo world; returns the results in rank order.

    `function` must be at module level (it is passed by name). A result consists of tensors, numbers, strings and
    containers of them, and is passed through a file in `folder`, which must be new to `run_ranks`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    with _importable(Path(__file__).parents[2]):
        context.set_forkserver_preload(PRELOADED)
        ranks = [
            context.Process(target=_rank, args=(function, rank, world_size, folder, arguments))
            for rank in range(world_size)
        ]
        for rank in ranks:
            rank.start()
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while any(rank.is_alive() for rank in ranks) and time.monotonic() < deadline:
        if any(rank.exitcode for rank in ranks):
            break  # the others would wait for this rank in a collective
        ranks[0].join(0.02) if ranks[0].is_alive() else time.sleep(0.02)
    for rank in ranks:
        rank.kill()
        rank.join()
    errors = [path.read_text() for path in sorted(folder.glob("error_*"))]
    assert all(rank.exitcode == 0 for rank in ranks), (
        "\n".join(errors)
        or f"exit codes {[rank.exitcode for rank in ranks]}: killed, or no end within {TIMEOUT_SECONDS} s"
    )
    return [torch.load(folder / f"result_{rank}.pt", weights_only=True) for rank in range(world_size)]


def join_ranks(store: Path) -> None:
    """Start torch.distributed on this rank of `run_ranks`, which meets the others through the new file `store`.

    The function of `run_ranks` finds it started; Megatron's destroy_global_state ends it.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", store=dist.FileStore(str(store), world_size), rank=rank, world_size=world_size)


@contextlib.contextmanager
def model_parallel(
    tensor: int = 1,
    pipeline: int = 1,
    *,
    context: int = 1,
    expert: int = 1,
    virtual: int | None = None,
    seed: int = 1234,
) -> Iterator[None]:
    """Megatron's parallel state over this world's ranks, within a `with` block."""
    parallel_state.initialize_model_parallel(
        tensor,
        pipeline,
        virtual_pipeline_model_parallel_size=virtual,
        context_parallel_size=context,
        expert_model_parallel_size=expert,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    yield
    parallel_state.destroy_model_parallel()


def _rank(function: Callable[..., Any], rank: int, world_size: int, folder: Path, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    # Otherwise a rank would start its own children (data loaders, checkpoint writers) from a fork server, too.
    multiprocessing.set_start_method("fork", force=True)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    try:
        join_ranks(folder / "store")
        torch.save(function(*arguments), folder / f"result_{rank}.pt")
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        (folder / f"error_{rank}").write_text(f"rank {rank}: {traceback.format_exc()}")
        raise


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """The fork server is a new interpreter, which finds modules through PYTHONPATH."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), before)))
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
