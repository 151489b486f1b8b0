"""A model on a GPU decodes and prefills with mamba-ssm's kernels (tests/ops/test_ssd_triton.py tests the kernels)."""

import importlib.util

import pytest
import torch

from tests.hf.tiny import VARIANTS, generate, padded_left, tiny_model

# Relative, for fp32 weights: the kernels multiply in TF32, which has 10 bits.
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


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_on_the_gpu_says_what_it_says_on_the_cpu(variant: str) -> None:
    model, (ids, mask) = tiny_model(variant, hidden_size=64, state_head_dim=16), padded_left()
    expected = model(ids, attention_mask=mask).logits[mask.bool()]
    model, ids, mask = model.to(torch.device("cuda")), ids.cuda(), mask.cuda()  # pyright: ignore
    logits = model(ids, attention_mask=mask).logits[mask.bool()]
    assert ((logits.cpu() - expected).norm() / expected.norm()).item() < TOLERANCE
    options = {"max_new_tokens": 8, "output_logits": True, "return_dict_in_generate": True}
    cached, uncached = (generate(model, ids, mask, use_cache=use_cache, **options) for use_cache in (True, False))
    first = [torch.stack(result.logits[:1]) for result in (cached, uncached)]
    assert ((first[0] - first[1]).norm() / first[1].norm()).item() < TOLERANCE
