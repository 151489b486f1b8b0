"""One layout of `txssm check leakage` on this rank: the effect of the first document on the logits after it.

B=batch  L=length of a sample  V=this tensor-parallel rank's share of the vocabulary
"""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Packings per micro-batch, and pairs of micro-batches that go through a pipeline together.
ROWS, PAIRS_AT_A_TIME = 8, 4
# Without isolation, few suffice to show that leaks are detected.
PACKINGS_THAT_LEAK = ROWS


def run(out: Path, arguments: list[str], packings: int, seed: int) -> None:
    """Write leaks.json: by mode, how many logits after the first documents were compared, and how many changed."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import training

    from megatron_txssm.session.start import initialize_arguments, model_config

    args = initialize_arguments(arguments)
    training.initialize_megatron()
    config = model_config(args)
    stages = config.get_builder_cls()(config).build_distributed_models(
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(), wrap_with_ddp=False
    )
    config.pre_wrap_hooks[-1](stages)
    for stage in stages:
        stage.eval()
    found = {
        "isolated": _count(stages, args, packings, seed, isolated=True),
        "packed": _count(stages, args, PACKINGS_THAT_LEAK, seed, isolated=False),
    }
    if args.rank == 0:
        (out / "leaks.partial").write_text(json.dumps(found), encoding="utf-8")
        (out / "leaks.partial").rename(out / "leaks.json")
    torch.distributed.barrier()


def _count(stages: list[Any], args: Any, packings: int, seed: int, *, isolated: bool) -> dict[str, float]:
    """Over all ranks: logits compared, logits that changed at all, and the largest change."""
    generator = torch.Generator().manual_seed(seed)
    counts, largest = torch.zeros(2, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    pairs = -(-packings // ROWS)
    for start in range(0, pairs, PAIRS_AT_A_TIME):
        batches = [batch for _ in range(min(PAIRS_AT_A_TIME, pairs - start)) for batch in _pair(args, generator)]
        logits = _forward(stages, args, batches, isolated=isolated)
        # Only the last pipeline stage has logits.
        for first, second, batch in zip(logits[::2], logits[1::2], batches[::2], strict=bool(logits)):
            before, after = (found["logits"][found["behind"]] for found in (first, second))
            assert torch.isfinite(before).all() and len(before) == int(batch["behind_here"])
            counts += torch.tensor([before.numel(), int((before != after).sum())])
            if before.numel():
                largest = torch.maximum(largest, (before - after).abs().max().double())
    torch.distributed.all_reduce(counts)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return {"compared": counts[0].item(), "changed": counts[1].item(), "largest": largest.item()}


def _pair(args: Any, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
    """Random packings of documents, with odd lengths and single tokens, and the same with other first documents."""
    from megatron_txssm.training.forward_step import on_this_rank

    shape = (ROWS, args.seq_length)

    def draw(below: int) -> int:
        return int(torch.randint(below, (1,), generator=generator))

    starts = torch.zeros(shape, dtype=torch.bool)
    starts[:, 0] = True
    for row in starts:
        # At least one document after the first.
        row[1 + draw(args.seq_length - 1)] = True
        row[torch.randint(1, args.seq_length, (draw(6),), generator=generator)] = True
    documents = starts.cumsum(1)
    indices = torch.arange(args.seq_length).expand(shape)
    positions = indices - torch.where(starts, indices, 0).cummax(1).values
    tokens = torch.randint(args.vocab_size, shape, generator=generator)
    other = torch.randint(1, args.vocab_size, shape, generator=generator)
    changed = torch.where(documents == 1, (tokens + other) % args.vocab_size, tokens)
    behind = documents > 1
    common = {"position_ids": positions, "behind": behind, "behind_here": on_this_rank(behind).sum()}
    yield {"tokens": tokens, **common}
    yield {"tokens": changed, **common}


def _forward(
    stages: list[Any], args: Any, batches: list[dict[str, Tensor]], *, isolated: bool
) -> list[dict[str, Tensor]]:
    """This rank's logits [B, L, V] of every micro-batch, and which tokens come after the first document."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    # An interleaved pipeline needs a multiple of its size.
    padding = -len(batches) % args.pipeline_model_parallel_size
    rounds = batches + batches[-1:] * padding
    found = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, isolated=isolated),
        data_iterator=[iter(rounds) for _ in stages] if len(stages) > 1 else iter(rounds),
        model=stages,
        num_microbatches=len(rounds),
        seq_length=args.seq_length,
        micro_batch_size=ROWS,
        forward_only=True,
        collect_non_loss_data=True,
    )
    return found[: len(batches)]


def _forward_step(data_iterator: Iterator[dict[str, Tensor]], model: Any, *, isolated: bool) -> tuple[Tensor, Any]:
    from megatron_txssm.training.forward_step import on_this_rank, packed_documents

    batch = next(data_iterator)
    documents = packed_documents(batch["position_ids"]) if isolated else None
    tokens, positions, behind = (on_this_rank(batch[key]) for key in ("tokens", "position_ids", "behind"))
    with torch.no_grad():
        output = model(tokens, positions, None, packed_seq_params=documents)
    return output, lambda logits, non_loss_data: {"logits": logits, "behind": behind}
