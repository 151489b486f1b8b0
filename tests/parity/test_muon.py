"""Muon: every layout computes what one process does, and a run goes on at its own layout bit for bit, or at another.

The matrices of a layer are orthogonalized whole, whichever process has their rows, and so are the components of packed
ones; momenta are saved as weights are.
"""

from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tests.parity.harness import Case, run_cases, worst_gradient, write_tokens

pytestmark = [
    pytest.mark.slow,
    # Of the checkpoint's reader, in this process.
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
]

ONE_PROCESS = "one_process"
MUON = """
--optimizer muon --muon-momentum 0.95 --muon-nesterov --muon-extra-scale-factor 0.2 --muon-tp-mode duplicated
--hybrid-layer-pattern M-*ME- --position-encoding conv1d_d --state-space-gated
--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 48 --moe-shared-expert-intermediate-size 24
--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.1 --moe-token-dispatcher-type alltoall
--moe-router-dtype fp32 --lr 3e-3
"""
# In bf16, rounding makes the norm to clip by another one in another layout.
KINDS = {"fp32": "--muon-fp32-matmul-prec high", "bf16": "--bf16 --clip-grad 0"}
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
LAYOUTS = {
    ONE_PROCESS: (1, ""),
    "tp2": (2, TP2),
    "tp2_distributed": (2, f"{TP2} --muon-tp-mode distributed"),
    # The first stage has no experts.
    "pp2": (2, "--pipeline-model-parallel-size 2 --hybrid-layer-pattern M-*|ME-"),
    "ep2": (2, "--expert-model-parallel-size 2"),
}
LAYOUTS_OF = {"fp32": ("tp2", "tp2_distributed", "pp2", "ep2"), "bf16": ("tp2",)}
# What a first layout saves goes on in a second.
CONTINUED = [("fp32", layout, layout) for layout in ("tp2", "pp2", "ep2")] + [("bf16", "tp2", "tp2")]
RESHARDED = [("fp32", layout, ONE_PROCESS) for layout in ("tp2", "pp2", "ep2")] + [("bf16", "tp2", ONE_PROCESS)]
RESHARDED += [("fp32", ONE_PROCESS, layout) for layout in ("tp2", "pp2")]
CASES = [(kind, layout) for kind, layouts in LAYOUTS_OF.items() for layout in layouts]
MIDDLE, END = 2, 4
STEPS = range(1, END + 1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(kind, layout) -> an undisturbed run; (kind, layout, layout of the rest) -> what its checkpoint goes on to."""
    root = tmp_path_factory.mktemp("muon")
    data = write_tokens(root / "tokens")

    def case(kind: str, name: str, layout: str, more: str) -> Case:
        words = f"{MUON} --train-iters {END} {KINDS[kind]} {LAYOUTS[layout][1]} {more}"
        return Case(root / kind / name, words, distributed_optimizer=False)

    undisturbed, resumed = {}, {}
    for kind, layouts in LAYOUTS_OF.items():
        for layout in (ONE_PROCESS, *layouts):
            save = f"--save {root / kind / layout / 'checkpoint'} --save-interval {MIDDLE}"
            undisturbed[kind, layout] = case(kind, layout, layout, save)
    for kind, first, rest in CONTINUED + RESHARDED:
        read = f"--load {root / kind / first / 'checkpoint'} --ckpt-step {MIDDLE}"
        resumed[kind, first, rest] = case(kind, f"{first}_to_{rest}", rest, read)
    for cases in (undisturbed, resumed):
        for world_size in (1, 2):
            run_cases(world_size, [case for key, case in cases.items() if LAYOUTS[key[-1]][0] == world_size], data)
    return undisturbed | resumed


def assert_same(case: Case, reference: Case, steps: range, kind: str) -> None:
    losses, expected = case.losses(), reference.losses()
    assert set(losses) == set(steps)
    loss_error = max(abs(losses[step] - expected[step]) for step in steps)
    gradient_error, where = worst_gradient(case, reference, steps)
    print(f"loss {loss_error:.1e}, gradient {gradient_error:.1e} ({where})")
    # bf16 rounds to 8 bits, at other places in another layout.
    assert loss_error <= (5e-3 if kind == "bf16" else 1e-6)
    assert gradient_error <= (0.3 if kind == "bf16" else 1e-5), where


def saved(case: Case) -> dict[str, torch.Tensor]:
    """Every tensor of the weights and the optimizer in the last checkpoint."""
    reader = FileSystemReader(case.out / "checkpoint" / f"iter_{END:07d}")
    metadata = reader.read_metadata().state_dict_metadata
    tensors: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata) and "rng_state" not in name and "rerun" not in name
    }
    load(tensors, storage_reader=reader)
    return tensors


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_loss_and_gradients_equal_one_process(runs, kind, layout):
    reference = runs[kind, ONE_PROCESS]
    assert_same(runs[kind, layout], reference, STEPS, kind)
    # Weights and data move on from step to step; otherwise equality would mean little.
    assert len(set(reference.losses().values())) == len(STEPS)


@pytest.mark.parametrize("layout", LAYOUTS_OF["fp32"])
def test_saved_weights_and_momenta_equal_one_process(runs, layout):
    ours, expected = saved(runs["fp32", layout]), saved(runs["fp32", ONE_PROCESS])
    assert set(ours) == set(expected)
    momenta = {name for name in expected if ".momentum_buffer." in name}
    for component in ("z", "x", "B", "C", "dt"):
        assert any(name.endswith(f"decoder.layers.0.mixer.in_proj.weight.{component}") for name in momenta), momenta
    for name, tensor in expected.items():
        assert (ours[name] - tensor).norm() <= 1e-4 * tensor.norm(), name


@pytest.mark.parametrize(("kind", "layout", "same"), CONTINUED)
def test_a_run_goes_on_bit_for_bit_at_its_own_layout(runs, kind, layout, same):
    losses = runs[kind, layout].losses()
    assert runs[kind, layout, same].losses() == {step: losses[step] for step in range(MIDDLE + 1, END + 1)}


@pytest.mark.parametrize(("kind", "first", "rest"), RESHARDED)
def test_a_run_saved_at_one_layout_goes_on_at_another(runs, kind, first, rest):
    assert_same(runs[kind, first, rest], runs[kind, ONE_PROCESS], range(MIDDLE + 1, END + 1), kind)
