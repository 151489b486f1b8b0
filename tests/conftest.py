"""What every test stands on: Megatron on this machine, and fresh memory that is never zero by luck."""

import os
import signal

# Two workers of pytest share two cores; before torch is imported, so that it counts here and in every process started.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from megatron_txssm.platform import prepare_platform

# Before any test module imports Megatron.
prepare_platform()

# A shell starts background jobs with Ctrl-C ignored, nohup with hang-ups. What is ignored stays so in every child: the
# launcher obeys.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# torch.empty returns NaN, so that a kernel that forgets to write shows (torch fills it in deterministic mode).
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True  # pyright: ignore[reportAttributeAccessIssue]


@pytest.fixture(scope="session")
def one_process(tmp_path_factory):
    """Megatron's parallel state for a single process, over gloo, with seeded random states."""
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel

    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel(1, 1)
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
