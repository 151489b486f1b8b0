"""Every parallel layout computes what one process does: Megatron's loop, from one checkpoint, loss and gradients."""

import pytest

from tests.parity.harness import PP2, PP2_VPP2, Case, run_cases, worst_gradient, write_tokens

VARIANTS = {
    "rope": "--position-encoding rope",
    "conv1d_d": "--position-encoding conv1d_d --state-space-gated",
    "a_t": "--position-encoding a_t",
    # C is scaled by the position in a document.
    "rope_documents": "--position-encoding rope --isolate-documents --length-scaling-base 8",
    "conv1d_d_documents": "--position-encoding conv1d_d --isolate-documents",
    # A learning rate of its own for each of several groups of parameters.
    "mup": "--position-encoding conv1d_d --use-mup --mup-base-hidden-size 16 --mup-attn-scale-power 0.5",
}
LAYOUTS = {
    "tp2": (2, "--tensor-model-parallel-size 2"),
    "tp2_sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2": (2, PP2),
    "pp2_vpp2": (2, PP2_VPP2),
    # Stages of different lengths, one of which begins with an FFN.
    "pp2_uneven": (2, "--pipeline-model-parallel-size 2 --hybrid-layer-pattern M-M-*|-M-"),
    "pp2_vpp2_uneven": (2, "--pipeline-model-parallel-size 2 --hybrid-layer-pattern M|-M-*|-M|-"),
    "dp2_zero1": (2, ""),
    "dp2_zero1_overlap": (2, "--overlap-grad-reduce --overlap-param-gather"),
    "cp2": (2, "--context-parallel-size 2"),
    "cp2_all_to_all": (2, "--context-parallel-size 2 --state-context-parallel all_to_all"),
    "cp4": (4, "--context-parallel-size 4"),
    "cp2_tp2_sp": (4, "--context-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel"),
    "cp2_pp2": (4, f"--context-parallel-size 2 {PP2}"),
    "tp2_pp2": (4, f"--tensor-model-parallel-size 2 {PP2}"),
    "full_recompute": (1, "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"),
}
# Variants share most of their code: each layout that one of them could break.
LAYOUTS_OF = {
    "rope": tuple(LAYOUTS),
    "conv1d_d": ("tp2", "tp2_sp", "pp2_vpp2", "dp2_zero1", "cp2", "cp2_all_to_all", "cp4", "cp2_tp2_sp", "tp2_pp2"),
    "a_t": ("tp2_sp", "cp2", "full_recompute"),
    "rope_documents": ("tp2_sp", "pp2_vpp2", "cp2", "cp2_all_to_all", "cp4", "cp2_pp2", "full_recompute"),
    "conv1d_d_documents": ("cp2", "cp2_all_to_all", "cp4", "cp2_tp2_sp"),
    "mup": ("tp2_sp", "pp2", "dp2_zero1"),
}
# A run that a first layout saves in the middle goes on in a second; this variant has the most packed tensors.
RESHARDED = "conv1d_d"
SAVED_BY = "--tensor-model-parallel-size 2 --sequence-parallel"
CONTINUED_BY = {
    "pp2": PP2,
    "dp2_zero1": "",
}
# The first checkpoint is saved after a step, so that the optimizer's state is in it, too; a step's gradient shows the
# state that the step before used.
START, MIDDLE, END = 1, 2, 4
STEPS = range(START + 1, END + 1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(variant, layout) -> Case; a launch for each number of processes, all from the one-process run's checkpoint."""
    root = tmp_path_factory.mktemp("parity")
    data = write_tokens(root / "tokens")

    def case(variant: str, layout: str, arguments: str) -> Case:
        return Case(root / variant / layout, f"{VARIANTS[variant]} --train-iters {END} {arguments}")

    def resumed(variant: str, layout: str, arguments: str) -> Case:
        return case(variant, layout, f"{arguments} --load {root / variant / 'start' / 'checkpoint'}")

    def saved(variant: str, name: str, step: int) -> str:
        return f"--save {root / variant / name / 'checkpoint'} --save-interval 100 --exit-interval {step}"

    starts = [case(variant, "start", saved(variant, "start", START)) for variant in VARIANTS]
    cases = {(variant, "one_process"): (1, resumed(variant, "one_process", "")) for variant in VARIANTS}
    cases["mup", "undisturbed"] = (1, case("mup", "undisturbed", ""))
    cases |= {
        (variant, layout): (world_size, resumed(variant, layout, arguments))
        for variant, layouts in LAYOUTS_OF.items()
        for layout, (world_size, arguments) in LAYOUTS.items()
        if layout in layouts
    }
    middle = f"{SAVED_BY} {saved(RESHARDED, 'middle', MIDDLE)}"
    cases[RESHARDED, "middle"] = (2, resumed(RESHARDED, "middle", middle))
    for layout, arguments in CONTINUED_BY.items():
        name, load = f"middle_to_{layout}", f"--load {root / RESHARDED / 'middle' / 'checkpoint'}"
        cases[RESHARDED, name] = (2, case(RESHARDED, name, f"{arguments} {load}"))
    for world_size in (1, 2, 4):
        batch = [case for size, case in cases.values() if size == world_size]
        run_cases(world_size, starts + batch if world_size == 1 else batch, data)
    return {key: case for key, (_, case) in cases.items()}


@pytest.mark.parametrize(("variant", "layout"), [(v, layout) for v, some in LAYOUTS_OF.items() for layout in some])
def test_loss_and_gradients_equal_one_process(runs, variant, layout):
    reference, case = runs[variant, "one_process"], runs[variant, layout]
    losses, expected = case.losses(), reference.losses()
    assert set(expected) == set(STEPS)
    loss_error = max(abs(losses[step] - expected[step]) for step in STEPS)
    gradient_error, where = worst_gradient(case, reference, STEPS)
    print(f"loss {loss_error:.1e}, gradient {gradient_error:.1e} ({where})")
    assert loss_error <= 1e-6
    assert gradient_error <= 1e-5, where
    # Weights and data move on from step to step; otherwise equality would mean little.
    assert len(set(expected.values())) == len(STEPS)


@pytest.mark.parametrize("layout", CONTINUED_BY)
def test_a_run_saved_at_one_layout_goes_on_at_another(runs, layout):
    reference, case = runs[RESHARDED, "one_process"], runs[RESHARDED, f"middle_to_{layout}"]
    steps = range(MIDDLE + 1, END + 1)
    losses, expected = case.losses(), reference.losses()
    assert set(losses) == set(steps)
    assert max(abs(losses[step] - expected[step]) for step in steps) <= 1e-6
    gradient_error, where = worst_gradient(case, reference, steps)
    assert gradient_error <= 1e-5, where


def test_a_run_under_mup_goes_on_bit_for_bit(runs):
    losses = runs["mup", "undisturbed"].losses()
    assert runs["mup", "one_process"].losses() == {step: losses[step] for step in STEPS}
