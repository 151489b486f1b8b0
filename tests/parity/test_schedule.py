"""A resume under another schedule, at every layout and optimizer: with the switch, this run's holds."""

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tests.parity.harness import PP2, Case, run_cases, write_tokens

pytestmark = [
    pytest.mark.slow,
    # Of the checkpoint's reader, in this process.
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
]

SAVED, END = 2, 3
# Optimizer -> (arguments, whether it is the distributed one, where its fp32 weights are saved).
OPTIMIZERS = {
    "bf16_zero1": ("--bf16", True, "optimizer.state.param."),
    "fp32": ("", False, "decoder."),
    "bf16": ("--bf16", False, "optimizer.state.fp32_param."),
}
SAVED_BY = "--tensor-model-parallel-size 2"
# Where each goes on; the checkpoint's own layout is among them.
LAYOUTS = {
    "bf16_zero1": PP2,
    "fp32": SAVED_BY,
    "bf16": "",
}
ENDS = {
    "undisturbed": "",
    "twice_the_rate": "--override-opt-param-scheduler --lr 2e-3 --min-lr 2e-4",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(optimizer, end) -> Case; `start` is what the others go on from."""
    root = tmp_path_factory.mktemp("schedule")
    data = write_tokens(root / "tokens")
    cases = {}
    for optimizer, (arguments, distributed, _) in OPTIMIZERS.items():
        common = f"--position-encoding rope --train-iters 8 --weight-decay 0 --save-interval 100 {arguments}"
        folders = {end: root / optimizer / end for end in ("start", *ENDS)}
        for end, out in folders.items():
            if end == "start":
                more = f"{SAVED_BY} --exit-interval {SAVED}"
            else:
                more = (
                    f"{LAYOUTS[optimizer]} --load {folders['start'] / 'checkpoint'} --exit-interval {END} {ENDS[end]}"
                )
            cases[optimizer, end] = Case(out, f"{common} --save {out / 'checkpoint'} {more}", distributed)
    run_cases(2, list(cases.values()), data)
    return cases


def weights(case: Case, step: int, optimizer: str) -> torch.Tensor:
    """All fp32 weights of a checkpoint in a row."""
    prefix = OPTIMIZERS[optimizer][2]
    reader = FileSystemReader(case.out / "checkpoint" / f"iter_{step:07d}")
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in sorted(reader.read_metadata().state_dict_metadata.items())
        if key.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    load(tensors, storage_reader=reader, no_dist=True)
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_runs_own_schedule_holds(runs, optimizer):
    start = weights(runs[optimizer, "start"], SAVED, optimizer)
    update, twice = (weights(runs[optimizer, end], END, optimizer) - start for end in ("undisturbed", "twice_the_rate"))
    assert update.abs().max() > 1e-4
    # Differences of weights of up to 3, which are rounded to 2.4e-7.
    torch.testing.assert_close(twice, 2 * update, rtol=1e-4, atol=1e-6)
