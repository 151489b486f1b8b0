"""worker.py with two faults: sequence parallelism forgets to sum the norms' gradients, full recomputation fails."""

import importlib
import sys
from pathlib import Path

from megatron_txssm.check import worker

run = worker.run


def run_broken(out: Path, arguments: list[str]) -> None:
    # Its package has a function of the same name.
    finalize = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    setattr(finalize, "_allreduce_non_tensor_model_parallel_grads", lambda *_, **__: None)
    if "--recompute-granularity" in arguments:
        raise RuntimeError("recomputed in vain\nat length")
    run(out, arguments)


if __name__ == "__main__":
    setattr(worker, "run", run_broken)
    worker.main(*sys.argv[1:])
