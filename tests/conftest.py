"""What every test stands on: Megatron on this machine, and fresh memory that is never zero by luck."""

import os
import signal
from collections.abc import Iterator

# Two workers of pytest share two cores; before torch is imported, so that it counts here and in every process started.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Submissions would each build their model once; tests/planning/test_check_build.py does.
os.environ.setdefault("TXSSM_CHECK_BUILD", "0")

import pytest
import torch

from megatron_txssm.ops.ssd_triton import import_error
from megatron_txssm.platform import prepare_platform

# Before any test module imports Megatron.
prepare_platform()

# A shell starts background jobs with Ctrl-C ignored, nohup with hang-ups. What is ignored stays so in every child: the
# launcher obeys.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Imported in deterministic mode, mamba-ssm's kernels would have one size of blocks, and none chosen by its speed.
if torch.cuda.is_available():
    import_error()

# torch.empty returns NaN, so that a kernel that forgets to write shows (torch fills it in deterministic mode).
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True  # pyright: ignore[reportAttributeAccessIssue]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: two processes that share the files then end at about the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """A test computes with the same random numbers alone as after others."""
    torch.manual_seed(1234)


@pytest.fixture(autouse=True)
def kernels_of_trainings(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test on a GPU runs the kernels that trainings run, which are not the deterministic ones."""
    on_gpu = request.node.get_closest_marker("gpu") is not None
    if on_gpu:
        torch.use_deterministic_algorithms(False)
    yield
    if on_gpu:
        torch.use_deterministic_algorithms(True, warn_only=True)


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
