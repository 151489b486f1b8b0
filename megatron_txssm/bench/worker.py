"""One process of `txssm bench`, which measures one model.

    python -m megatron_txssm.bench.worker TASK.json

TASK is as that of megatron_txssm/check/gpu/worker.py, with {"materialised": bool}.
"""

import contextlib
import sys
from typing import Any

from megatron_txssm.check.gpu import worker


def train(task: dict[str, Any]) -> dict[str, Any]:
    """As `check.gpu.worker.train`, on request with materialised scores in torch's attention."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH) if task["materialised"] else contextlib.nullcontext():
        return worker.train(task)


def infer(task: dict[str, Any]) -> dict[str, Any]:
    from megatron_txssm.bench.inference import measure

    return measure(task)


KINDS: worker.Kinds = {"environment": worker.environment, "train": train, "infer": infer}

if __name__ == "__main__":
    sys.exit(worker.main(sys.argv[1], KINDS))
