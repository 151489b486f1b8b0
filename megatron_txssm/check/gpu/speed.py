"""Tokens per second of a recipe's training steps, compared with Llama 3 with as many parameters."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_txssm.architecture.gpus import gpu_of
from megatron_txssm.architecture.layer_pattern import MODULE
from megatron_txssm.check.gpu.bench import Bench
from megatron_txssm.check.gpu.children import Child
from megatron_txssm.check.gpu.findings import Finding, failed
from megatron_txssm.check.gpu.trainings import LOCAL, SMALL_BATCH, SMALL_LENGTH, SMALL_VOCABULARY, VOCABULARY, Training
from megatron_txssm.recipe.changes import Changes

# The first steps compile, tune block sizes, and record the graph.
WARM_UP, TIMED = 5, 6
AS_A_GRAPH: Changes = {
    "megatron.cuda_graph_impl": "full_iteration",
    "megatron.cuda_graph_warmup_steps": 2,
    "megatron.check_for_nan_in_loss_and_grad": False,
}
# Seconds: limit for one training, including start-up and compilation without a cache; minimum left to start one.
LIMIT, LEAST = 150, 20


@dataclass(frozen=True)
class Pair:
    """A recipe and its rival, timed with the same batch size.

    A step has two micro-batches, because more than one is usual. `graph`: run both as one CUDA graph, which excludes
    the CPU's time for launching kernels.
    """

    ours: str
    rival: str
    seq_length: int
    micro_batch_size: int
    graph: bool = False

    def __str__(self) -> str:
        graph = ", CUDA graph" if self.graph else ""
        return f"{self.ours}, {self.seq_length} tokens, micro-batch {self.micro_batch_size}{graph}"

    @property
    def trainings(self) -> tuple[Training, Training]:
        changes: Changes = {
            "training.seq_length": self.seq_length,
            "training.micro_batch_size": self.micro_batch_size,
            "training.global_batch_tokens": 2 * self.micro_batch_size * self.seq_length,
            "training.train_iters": WARM_UP + TIMED,
            **(AS_A_GRAPH if self.graph else {}),
        }
        suffix = f"_{self.seq_length}{'_graph' if self.graph else ''}"
        ours, rival = (Training(name + suffix, name, changes) for name in (self.ours, self.rival))
        return ours, rival


# Replaces all others on a machine that is too small for them.
SMALL_PAIRS = (Pair("transxssm_320m", "llama3_320m", SMALL_LENGTH, SMALL_BATCH),)
# The most informative first.
PAIRS = (
    Pair("transxssm_320m", "llama3_320m", 4096, 4, graph=True),
    Pair("transxssm_1.3b", "llama3_1.3b", 4096, 2, graph=True),
    Pair("transxssm_320m", "llama3_320m", 4096, 4),
    Pair("transxssm_1.3b", "llama3_1.3b", 4096, 2),
    Pair("transxssm_1.3b_fp8_h100", "llama3_1.3b_fp8_h100", 4096, 2),
)
LONG_PAIRS = (
    Pair("transxssm_320m", "llama3_320m", 16384, 1, graph=True),
    Pair("transxssm_1.3b", "llama3_1.3b", 16384, 1, graph=True),
    Pair("transxssm_320m", "llama3_320m", 8192, 2, graph=True),
    Pair("transxssm_1.3b", "llama3_1.3b", 8192, 1, graph=True),
)


def speed_of_pairs(bench: Bench, pairs: Sequence[Pair]) -> Iterator[Finding]:
    """One finding per pair. While one training is timed, the next has finished its imports and waits."""
    changes = {} if bench.transformer_engine else LOCAL
    if bench.small:
        changes = changes | {"model.layer_pattern": MODULE}
    waiting = [training for pair in pairs for training in pair.trainings]
    prepared: list[Child] = []
    for pair in pairs:
        found: list[dict[str, Any]] = []
        for _ in pair.trainings:
            while waiting and len(prepared) < 2:
                prepared.append(_prepared(bench, waiting.pop(0), changes))
            child = prepared.pop(0)
            if bench.seconds_left < LEAST:
                child.end()
                found.append({"refused": "no time left"})
                continue
            child.begin()
            found.append(bench.finish(child, LIMIT))
        yield _finding(pair, *found)


def _prepared(bench: Bench, training: Training, changes: Changes) -> Child:
    training = replace(training, changes=training.changes | changes)
    return bench.start_training(training, SMALL_VOCABULARY if bench.small else VOCABULARY, waits=True)


def _finding(pair: Pair, ours: dict[str, Any], rival: dict[str, Any]) -> Finding:
    claim = str(pair)
    for name, found in ((pair.ours, ours), (pair.rival, rival)):
        if failure := failed(claim, found, of=name):
            return failure
    mine, theirs = _figures(ours), _figures(rival)
    ratio = mine["tokens_per_second"] / theirs["tokens_per_second"]
    flops = rival["flops_per_token"] / ours["flops_per_token"]
    said = f"{_said(mine)}; {pair.rival} {_said(theirs)}: {ratio:.2f}x (by FLOPs {flops:.2f}x)"
    return Finding(claim, "measured", said, {"ours": mine, "rival": theirs, "ratio": ratio, "ratio_of_flops": flops})


def _figures(found: dict[str, Any]) -> dict[str, Any]:
    rows = [row for row in found["rows"] if "step_seconds" in row]
    timed = rows[WARM_UP:]
    speed = statistics.median(row["tokens_per_second"] for row in timed)
    figures = {
        "tokens_per_second": speed,
        "peak_GiB": max(row["peak_memory_bytes"] for row in rows) / 2**30,
        "first_step_seconds": rows[0]["step_seconds"],
        "step_seconds": [row["step_seconds"] for row in timed],
        "losses": [row["lm loss"] for row in rows],
    }
    if (gpu := gpu_of(found["device"])) is not None:
        # Of bf16's peak, in FP8 as well.
        figures["MFU"] = speed * found["flops_per_token"] / gpu.bf16_flops
    return figures


def _said(figures: dict[str, Any]) -> str:
    mfu = f", MFU {figures['MFU']:.1%}" if "MFU" in figures else ""
    return f"{figures['tokens_per_second']:,.0f} tokens/s{mfu}, {figures['peak_GiB']:.1f} GiB"
