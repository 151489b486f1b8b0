"""Layers of experts: every layout computes what one process does, and a run goes on at another, optimizer included.

The experts' weights have an optimizer of their own, which a stage without experts has, too.
"""

import pytest

from tests.parity.harness import Case, run_cases, worst_gradient, write_tokens

pytestmark = pytest.mark.slow

ONE_PROCESS = "one_process"
EXPERTS = """
--hybrid-layer-pattern M-MEM*EM- --position-encoding rope
--num-experts 8 --moe-router-topk 3 --moe-ffn-hidden-size 48 --moe-shared-expert-intermediate-size 24
--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.3 --moe-token-dispatcher-type alltoall
--moe-router-dtype fp32
"""
# Precision and optimizer -> arguments, with the distributed optimizer. Mixed precision's two optimizers sum up the norm
# to clip by in different orders.
KINDS = {
    "fp32": ("", True),
    "fp32_plain": ("", False),
    "bf16": ("--bf16 --clip-grad 0", True),
    "bf16_plain": ("--bf16 --clip-grad 0", False),
}
LAYOUTS = {
    ONE_PROCESS: (1, ""),
    "full_recompute": (1, "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"),
    "selective_recompute": (1, "--recompute-granularity selective --recompute-modules moe shared_experts"),
    "ep2": (2, "--expert-model-parallel-size 2"),
    "cp2_ep2": (2, "--context-parallel-size 2 --expert-model-parallel-size 2"),
    "tp2_sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    # A stage without experts, the first and the last.
    "pp2_late": (2, "--pipeline-model-parallel-size 2 --hybrid-layer-pattern M-|MEM*EM-"),
    "pp2_early": (2, "--pipeline-model-parallel-size 2 --hybrid-layer-pattern M-MEM*E|M-"),
    "pp2_vpp2": (2, "--pipeline-model-parallel-size 2 --hybrid-layer-pattern M-|ME|M*E|M-"),
    # Of the two that share the experts, both have a tensor-parallel pair.
    "tp2_ep2": (4, "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2"),
}
IN_BF16 = ("ep2", "pp2_late")
LAYOUTS_OF = {
    "fp32": tuple(name for name in LAYOUTS if name != ONE_PROCESS),
    "fp32_plain": ("ep2", "pp2_late", "tp2_ep2"),
    "bf16": IN_BF16,
    "bf16_plain": IN_BF16,
}
CASES = [(kind, layout) for kind, layouts in LAYOUTS_OF.items() for layout in layouts]
# A plain optimizer's checkpoint has a state for each weight, whatever the precision; recomputation changes no layout.
CHANGED = [(kind, layout) for kind, layout in CASES if kind != "bf16_plain" and LAYOUTS[layout][0] > 1]
MIDDLE, END = 2, 4
STEPS = range(1, END + 1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(kind, layout) -> an undisturbed run; (kind, layout, layout of the rest) -> what its checkpoint goes on to."""
    root = tmp_path_factory.mktemp("experts")
    data = write_tokens(root / "tokens")

    def case(kind: str, name: str, layout: str, more: str) -> Case:
        arguments, distributed_optimizer = KINDS[kind]
        words = f"{EXPERTS} --train-iters {END} --lr 3e-3 {arguments} {LAYOUTS[layout][1]} {more}"
        return Case(root / kind / name, words, distributed_optimizer)

    undisturbed, resumed = {}, {}
    for kind, layouts in LAYOUTS_OF.items():
        for layout in (ONE_PROCESS, *layouts):
            save = f"--save {root / kind / layout / 'checkpoint'} --save-interval {MIDDLE}"
            undisturbed[kind, layout] = case(kind, layout, layout, save)
        for layout in layouts:
            changed = [(layout, ONE_PROCESS), (ONE_PROCESS, layout)] if (kind, layout) in CHANGED else []
            for first, rest in [(layout, layout), *changed]:
                load = f"--load {root / kind / first / 'checkpoint'} --ckpt-step {MIDDLE}"
                resumed[kind, first, rest] = case(kind, f"{first}_to_{rest}", rest, load)
    for cases in (undisturbed, resumed):
        for world_size in (1, 2, 4):
            run_cases(world_size, [case for key, case in cases.items() if LAYOUTS[key[-1]][0] == world_size], data)
    return undisturbed | resumed


def assert_same(case: Case, reference: Case, steps: range, *, bf16: bool) -> None:
    losses, expected = case.losses(), reference.losses()
    assert set(losses) == set(steps)
    loss_error = max(abs(losses[step] - expected[step]) for step in steps)
    gradient_error, where = worst_gradient(case, reference, steps)
    print(f"loss {loss_error:.1e}, gradient {gradient_error:.1e} ({where})")
    # bf16 rounds to 8 bits, at other places in another layout.
    assert loss_error <= (5e-3 if bf16 else 1e-6)
    assert gradient_error <= (0.3 if bf16 else 1e-5), where


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_loss_and_gradients_equal_one_process(runs, kind, layout):
    reference = runs[kind, ONE_PROCESS]
    assert_same(runs[kind, layout], reference, STEPS, bf16=kind.startswith("bf16"))
    # Weights and data move on from step to step; otherwise equality would mean little.
    assert len(set(reference.losses().values())) == len(STEPS)


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_a_run_goes_on_bit_for_bit_at_its_own_layout(runs, kind, layout):
    losses = runs[kind, layout].losses()
    assert runs[kind, layout, layout].losses() == {step: losses[step] for step in range(MIDDLE + 1, END + 1)}


@pytest.mark.parametrize("to_one_process", [False, True])
@pytest.mark.parametrize(("kind", "layout"), CHANGED)
def test_a_run_saved_at_one_layout_goes_on_at_another(runs, kind, layout, to_one_process):
    first, rest = (layout, ONE_PROCESS) if to_one_process else (ONE_PROCESS, layout)
    case, reference = runs[kind, first, rest], runs[kind, ONE_PROCESS]
    assert_same(case, reference, range(MIDDLE + 1, END + 1), bf16=kind.startswith("bf16"))
