"""mamba-ssm's kernels, which a model on CUDA decodes and prefills with, against the PyTorch backend."""

# B=batch L=sequence H=heads P=head dim G=groups N=state

import importlib.util

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_txssm.ops.ssd import ssd, ssd_step
from tests.hf.tiny import VARIANTS, generate, padded_left, tiny_model

HEADS, HEAD_DIM, GROUPS, STATE = 4, 64, 2, 128
NAMES = ("x", "dt", "A", "B", "C", "initial_state")
# Relative to the largest entry, for fp32 inputs: the kernels multiply in TF32, which has 10 bits. Not measured yet, as
# these tests have never run (docs/gpu-status.md).
TOLERANCE = 5e-3

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA device: `python -m pytest tests/hf` on a GPU node"
    ),
    pytest.mark.skipif(
        importlib.util.find_spec("mamba_ssm") is None, reason="needs mamba-ssm; docs/gpu.md says how to install it"
    ),
]


def make_inputs(length: int, batch: int = 2) -> dict[str, Tensor]:
    """What a mixer sends at initialisation, fp32, on the GPU."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    spread = torch.empty(HEADS).uniform_(1e-3, 1e-1, generator=generator).expm1().log()
    inputs = {
        "x": normal(batch, length, HEADS, HEAD_DIM),
        "dt": F.softplus(0.5 * normal(batch, length, HEADS) + spread),
        "A": -torch.empty(HEADS).uniform_(1, 16, generator=generator),
        "B": normal(batch, length, GROUPS, STATE) / STATE**0.5,
        "C": normal(batch, length, GROUPS, STATE),
        "initial_state": normal(batch, HEADS, HEAD_DIM, STATE),
    }
    return {name: tensor.cuda() for name, tensor in inputs.items()}


def run(backend: str, inputs: dict[str, Tensor], seq_idx: Tensor | None) -> dict[str, Tensor]:
    """Outputs and, for one fixed random cotangent, all gradients, by name."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    x, dt, A, B, C, state = (leaves[name] for name in NAMES)
    y, final = ssd(x, dt, A, B, C, chunk_size=64, initial_state=state, seq_idx=seq_idx, backend=backend)
    generator = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(tensor.shape, generator=generator).to(tensor) for tensor in (y, final)]
    gradients = torch.autograd.grad([y, final], list(leaves.values()), cotangents)
    return {"y": y, "final_state": final} | {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, b in expected.items():
        error = ((actual[name].double() - b.double()).abs().max() / b.double().abs().max()).item()
        assert error <= TOLERANCE, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("length", [1, 63, 64, 200, 1024])
def test_triton_equals_torch(length: int) -> None:
    inputs = make_inputs(length)
    assert_close(run("triton", inputs, None), run("torch", inputs, None))


def test_packed_documents_by_triton_equal_those_by_torch() -> None:
    """Without a state before the text, which the kernels would give to every document that starts in chunk 0."""
    inputs = make_inputs(200)
    inputs["initial_state"] = torch.zeros_like(inputs["initial_state"])
    seq_idx = torch.repeat_interleave(torch.arange(4), torch.tensor([70, 1, 57, 72])).expand(2, -1).cuda()
    actual, expected = run("triton", inputs, seq_idx), run("torch", inputs, seq_idx)
    del actual["dinitial_state"], expected["dinitial_state"]
    assert_close(actual, expected)


def test_a_step_by_triton_equals_one_by_torch_and_leaves_the_old_state() -> None:
    inputs = make_inputs(1)
    x, dt, A, B, C, state = (inputs[name] for name in NAMES)
    before = state.clone()
    results = []
    for backend in ("triton", "torch"):
        y, new_state = ssd_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], state, backend=backend)
        results.append({"y": y, "state": new_state})
    assert_close(*results)
    assert torch.equal(state, before)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_on_the_gpu_says_what_it_says_on_the_cpu(variant: str) -> None:
    """Kernels take no head dim below 16."""
    model, (ids, mask) = tiny_model(variant, hidden_size=64, state_head_dim=16), padded_left()
    expected = model(ids, attention_mask=mask).logits[mask.bool()]
    model, ids, mask = model.to(torch.device("cuda")), ids.cuda(), mask.cuda()  # pyright: ignore
    logits = model(ids, attention_mask=mask).logits[mask.bool()]
    assert ((logits.cpu() - expected).norm() / expected.norm()).item() < TOLERANCE
    options = {"max_new_tokens": 8, "output_logits": True, "return_dict_in_generate": True}
    cached, uncached = (generate(model, ids, mask, use_cache=use_cache, **options) for use_cache in (True, False))
    first = [torch.stack(result.logits[:1]) for result in (cached, uncached)]
    assert ((first[0] - first[1]).norm() / first[1].norm()).item() < TOLERANCE
