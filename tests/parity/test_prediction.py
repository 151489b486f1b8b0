"""Multi-token prediction: every layout trains the depths as one process does, and takes over its checkpoint."""

import pytest

from tests.parity.harness import Case, run_cases, worst_gradient, write_tokens

DEPTHS = "/*-M/*-M"
VARIANTS = {
    # Mixers that look back, in depths that read the tokens of one document.
    "documents": "--isolate-documents --mtp-loss-scaling-factor 1.0",
    "untied": "--untie-embeddings-and-output-weights",
}
ONE_STAGE = f"--hybrid-layer-pattern M-*-{DEPTHS}"
PP2 = f"--pipeline-model-parallel-size 2 --hybrid-layer-pattern M-|*-{DEPTHS}"
LAYOUTS = {
    "tp2_sp": f"--tensor-model-parallel-size 2 --sequence-parallel {ONE_STAGE}",
    "pp2": PP2,
    "pp2_vpp2": f"--pipeline-model-parallel-size 2 --hybrid-layer-pattern M|-|*|-{DEPTHS}",
    "cp2": f"--context-parallel-size 2 {ONE_STAGE}",
    "dp2_zero1": ONE_STAGE,
}
# Saved by the first, continued by the second, from whose start the depths' weights and Adam's moments come.
SAVED, END = 2, 5
STEPS = range(SAVED + 1, END + 1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(variant, layout) -> Case, all from the checkpoint that two pipeline stages save."""
    root = tmp_path_factory.mktemp("prediction")
    data = write_tokens(root / "tokens")

    def case(variant: str, name: str, arguments: str) -> Case:
        return Case(root / variant / name, f"{VARIANTS[variant]} --train-iters {END} {arguments}")

    def checkpoint(variant: str) -> str:
        return str(root / variant / "start" / "checkpoint")

    starts = [
        case(v, "start", f"{PP2} --save {checkpoint(v)} --save-interval 100 --exit-interval {SAVED}") for v in VARIANTS
    ]
    found = {
        (variant, layout): case(variant, layout, f"{arguments} --load {checkpoint(variant)}")
        for variant in VARIANTS
        for layout, arguments in {"one_process": ONE_STAGE, **LAYOUTS}.items()
    }
    of_one = [key for key in found if key[1] == "one_process"]
    run_cases(2, [*starts, *(case for key, case in found.items() if key not in of_one)], data)
    run_cases(1, [found[key] for key in of_one], data)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_gradients_equal_one_process(runs, variant: str, layout: str) -> None:
    reference, case = runs[variant, "one_process"], runs[variant, layout]
    losses, expected = case.losses(), reference.losses()
    assert set(expected) == set(losses) == set(STEPS)
    assert max(abs(losses[step] - expected[step]) for step in STEPS) <= 1e-6
    gradient_error, where = worst_gradient(case, reference, STEPS)
    assert gradient_error <= 1e-5, where


def test_every_depth_has_gradients(runs) -> None:
    gradients = runs["documents", "one_process"].gradients(END)
    for depth in (0, 1):
        own = {key: tensor for key, tensor in gradients.items() if key.startswith(f"mtp.layers.{depth}.")}
        assert {key.split(".")[3] for key in own} == {"enorm", "hnorm", "eh_proj", "mtp_model_layer", "final_layernorm"}
        assert all(tensor.abs().max() > 0 for tensor in own.values())
