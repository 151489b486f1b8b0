"""A bf16 model has fp32 parameters, too: its checkpoints hold the optimizer's state of both."""

from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_txssm.model.state_space_parameters import FP32_PARAMETERS
from tests.parity.harness import PP2_VPP2, Case, run_cases, write_tokens
from tests.parity.test_resume import SAVE_INTERVAL, finish, losses, start

pytestmark = [
    pytest.mark.slow,
    # Of the checkpoint's reader, in this process.
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
]

VARIANTS = {
    "rope": "--position-encoding rope",
    "conv1d_d": "--position-encoding conv1d_d --state-space-gated",
}
# (processes, arguments, with the distributed optimizer)
LAYOUTS = {
    "one_process": (1, "", True),
    "one_process_plain": (1, "", False),
    "tp2": (2, "--tensor-model-parallel-size 2", True),
    "tp2_plain": (2, "--tensor-model-parallel-size 2", False),
    # A gradient buffer of many buckets, some of them padded.
    "dp2_zero1": (2, "--overlap-grad-reduce --ddp-bucket-size 3000", True),
    "pp2_vpp2": (2, PP2_VPP2, True),
}
# conv1d_d has every kind of parameter that rope has; every layout would take too long for both.
CASES = [("conv1d_d", layout) for layout in LAYOUTS] + [("rope", "one_process"), ("rope", "tp2_plain")]
# What a TP2 run saved goes on in one process.
RESHARDED = [("conv1d_d", "tp2"), ("conv1d_d", "tp2_plain"), ("rope", "tp2_plain")]
MIDDLE, END = 2, 4
STEPS = range(MIDDLE + 1, END + 1)
# Per step a weight of this many times the learning rate loses a tenth; Adam moves it by at most about the rate, 1e-3.
DECAY = 100


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("bf16")


@pytest.fixture(scope="module")
def data(root: Path) -> Path:
    return write_tokens(root / "tokens")


@pytest.fixture(scope="module")
def runs(root: Path, data: Path) -> dict[tuple[str, ...], Case]:
    """(variant, layout) -> a run that saves in the middle, (variant, layout, "resumed") -> one that goes on there."""

    def case(variant: str, name: str, arguments: str, distributed_optimizer: bool = True) -> Case:
        out = root / variant / name
        saving = f"--save {out / 'checkpoint'} --save-interval {MIDDLE} --train-iters {END}"
        # The two optimizers sum up the norm to clip by in different orders.
        common = f"--bf16 --clip-grad 0 {VARIANTS[variant]} {saving}"
        return Case(out, f"{common} {arguments}", distributed_optimizer)

    def from_middle(variant: str, layout: str) -> str:
        return f"--load {root / variant / layout / 'checkpoint'} --ckpt-step {MIDDLE}"

    cases: dict[tuple[str, ...], tuple[int, Case]] = {}
    for variant, layout in CASES:
        size, arguments, distributed = LAYOUTS[layout]
        cases[variant, layout] = size, case(variant, layout, arguments, distributed)
        resumed = f"{arguments} {from_middle(variant, layout)}"
        cases[variant, layout, "resumed"] = size, case(variant, f"{layout}_resumed", resumed, distributed)
    for variant, layout in RESHARDED:
        resharded = case(variant, f"{layout}_resharded", from_middle(variant, layout), LAYOUTS[layout][2])
        cases[variant, layout, "resharded"] = 1, resharded
    for decay in (0, DECAY):
        name = f"decay_{decay}"
        arguments = f"--weight-decay {decay} --lr-warmup-fraction 0 --exit-interval 1"
        cases["conv1d_d", name] = 1, case("conv1d_d", name, arguments)
    for world_size in (2, 1):
        run_cases(world_size, [case for size, case in cases.values() if size == world_size], data)
    return {key: case for key, (_, case) in cases.items()}


def saved(case: Case, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole."""
    reader = FileSystemReader(case.out / "checkpoint" / f"iter_{step:07d}")
    entries = reader.read_metadata().state_dict_metadata.items()
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries
        if isinstance(entry, TensorStorageMetadata)
    }
    load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def fp32_parameters(tensors: dict[str, torch.Tensor]) -> list[str]:
    """The names of the state-space layers' fp32 parameters in a checkpoint."""
    return [key for key in tensors if key.startswith("decoder.") and key.rsplit(".", 1)[-1] in FP32_PARAMETERS]


@pytest.mark.parametrize(("variant", "layout"), CASES)
def test_a_resumed_run_goes_on_bit_for_bit(runs, variant, layout):
    run, resumed = runs[variant, layout], runs[variant, layout, "resumed"]
    expected = run.losses()
    assert resumed.losses() == {step: expected[step] for step in STEPS}
    # The runs learn; otherwise equality would mean little.
    assert expected[END] < expected[1]
    tensors, expected_tensors = saved(resumed, END), saved(run, END)
    assert tensors.keys() == expected_tensors.keys()
    assert [key for key in tensors if not torch.equal(tensors[key], expected_tensors[key])] == []


@pytest.mark.parametrize(("variant", "layout"), CASES)
def test_state_is_saved_under_its_parameters_name(runs, variant, layout):
    tensors = saved(runs[variant, layout], END)
    copy = "param" if LAYOUTS[layout][2] else "fp32_param"
    parameters = [key for key in tensors if not key.startswith("optimizer.") and "_extra_state" not in key]
    assert len(fp32_parameters(tensors)) == 3 * (2 if variant == "rope" else 3)  # three state-space layers
    for key in parameters:
        assert tensors[key].dtype == (torch.float32 if key in fp32_parameters(tensors) else torch.bfloat16), key
        # What Adam updates is fp32, and becomes the parameter by rounding.
        assert tensors[f"optimizer.state.{copy}.{key}"].dtype == torch.float32, key
        assert torch.equal(tensors[f"optimizer.state.{copy}.{key}"].to(tensors[key].dtype), tensors[key]), key
        for moment in ("exp_avg", "exp_avg_sq"):
            assert tensors[f"optimizer.state.{moment}.{key}"].shape == tensors[key].shape
            assert tensors[f"optimizer.state.{moment}.{key}"].count_nonzero() > 0, key


@pytest.mark.parametrize("layout", ["one_process", "tp2"])
def test_both_optimizers_save_the_same_state(runs, layout):
    """They find it by different ways, so that parameters of one shape cannot have been confused in both."""
    distributed, plain = saved(runs["conv1d_d", layout], END), saved(runs["conv1d_d", f"{layout}_plain"], END)
    plain = {key.replace(".fp32_param.", ".param."): tensor for key, tensor in plain.items()}
    assert distributed.keys() == plain.keys()
    assert [key for key in plain if not torch.equal(distributed[key], plain[key])] == []


@pytest.mark.parametrize(("variant", "layout"), RESHARDED)
def test_a_run_saved_at_tp2_goes_on_in_one_process(runs, variant, layout):
    run, resharded = runs[variant, layout], runs[variant, layout, "resharded"]
    losses, expected = resharded.losses(), run.losses()
    assert set(losses) == set(STEPS)
    loss_error = max(abs(losses[step] - expected[step]) for step in STEPS)
    tensors, expected_tensors = saved(resharded, END), saved(run, END)
    assert tensors.keys() == expected_tensors.keys()
    errors = {
        key: float((tensors[key] - expected_tensors[key]).norm() / expected_tensors[key].norm())
        for key in tensors
        if key.startswith("optimizer.")
    }
    worst = max(errors, key=lambda key: errors[key])
    print(f"loss {loss_error:.1e}, state {errors[worst]:.1e} ({worst})")
    # bf16 rounds to 8 bits, at other places in another layout.
    assert loss_error <= 5e-3
    assert errors[worst] <= 0.1, worst


def test_what_decays_has_no_weight_decay(runs):
    """The first step has the same gradients with and without: only the decay differs."""
    without, with_decay = (saved(runs["conv1d_d", f"decay_{decay}"], 1) for decay in (0, DECAY))
    for key in fp32_parameters(without):
        assert torch.equal(without[key], with_decay[key]), key
    weight = "decoder.layers.0.mixer.out_proj.weight"
    assert with_decay[weight].norm() < 0.95 * without[weight].norm()


def test_started_again_it_gives_the_same_losses_bit_for_bit(data, tmp_path):
    """As a user has it: `txssm pretrain`, in new processes, from a step in the middle."""
    steps = range(SAVE_INTERVAL + 1, 2 * SAVE_INTERVAL + 1)
    layout = "parallel.tensor_model_parallel_size=2"
    words = ["training.precision=bf16", f"training.train_iters={steps[-1]}", layout]
    finish(start(tmp_path, data, *words))
    expected = losses(tmp_path)
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(f"{SAVE_INTERVAL}")
    (tmp_path / "metrics.jsonl").unlink()
    finish(start(tmp_path, data, *words))
    assert losses(tmp_path) == {step: expected[step] for step in steps}
