"""Cases of a small model, by Megatron's own arguments, run and compared as megatron_txssm.check does."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_txssm.check import tokens
from megatron_txssm.check.runs import Run, worst_gradient
from megatron_txssm.platform import prepare_platform
from tests.support.megatron_tasks import Task, run_tasks

__all__ = ["Case", "run_cases", "worst_gradient", "write_tokens"]

# Four blocks, one for each stage of PP2 x VPP2; sizes that TP=2 divides; a length that the chunk does not divide.
MODEL = """
--hybrid-layer-pattern M-M-*-M- --hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 80
--mamba-state-dim 16 --mamba-head-dim 8 --mamba-num-groups 2 --ssd-chunk-size 16 --position-embedding-type rope
--normalization RMSNorm --swiglu --disable-bias-linear --attention-dropout 0 --hidden-dropout 0 --init-method-std 0.08
--seq-length 40 --max-position-embeddings 40 --vocab-size 63 --make-vocab-size-divisible-by 16 --padded-vocab-size 64
--spec megatron_txssm.model.layer_specs transxssm_stack_spec
"""
# The same layers in two stages, and in two with two virtual stages each.
PP2 = "--pipeline-model-parallel-size 2 --hybrid-layer-pattern M-M-|*-M-"
PP2_VPP2 = "--pipeline-model-parallel-size 2 --hybrid-layer-pattern M-|M-|*-|M-"
TRAINING = """
--micro-batch-size 1 --global-batch-size 4 --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine --lr-warmup-fraction 0.1
--weight-decay 0.01 --adam-beta2 0.999 --seed 1234 --split 90,10,0 --tokenizer-type NullTokenizer
--dist-ckpt-optim-fully-reshardable --ckpt-format torch_dist
--log-interval 1 --eval-interval 1000 --eval-iters 0 --num-workers 0
"""


@dataclass(frozen=True)
class Case(Run):
    """One run: where its files go, and its Megatron arguments behind the common ones."""

    arguments: str
    distributed_optimizer: bool = True
    # Common to the cases of one launch.
    data_prefix: Path | None = None

    def task(self) -> dict[str, Any]:
        words = [*MODEL.split(), *TRAINING.split(), "--data-path", str(self.data_prefix), *self.arguments.split()]
        return {"arguments": [*words, *(["--use-distributed-optimizer"] if self.distributed_optimizer else [])]}


def run_cases(world_size: int, cases: list[Case], data_prefix: Path, after: Sequence[Task] = ()) -> None:
    """Run `cases`, and `after` them other tasks, one after another on `world_size` gloo processes."""
    for case in cases:
        case.out.mkdir(parents=True, exist_ok=True)
    tasks: list[Task] = [(_run, {"case": replace(case, data_prefix=data_prefix)}) for case in cases]
    run_tasks(world_size, [*tasks, *after], cases[0].out / "ranks")


def _run(case: Case) -> None:
    from megatron_txssm.check import worker

    worker.run(case.out, [*case.task()["arguments"], *prepare_platform()])


def write_tokens(prefix: Path) -> Path:
    """Short documents of a learnable sequence each, for the vocabulary of MODEL."""
    return tokens.write_tokens(prefix, vocab_size=63)
