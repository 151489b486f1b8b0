"""What conftest.py sets for every test."""

import pytest
import torch


# The second needs no GPU, only the mark.
@pytest.mark.parametrize("deterministic", [True, pytest.param(False, marks=pytest.mark.gpu), True])
def test_only_tests_on_a_gpu_run_kernels_that_may_differ(deterministic: bool) -> None:
    assert torch.are_deterministic_algorithms_enabled() is deterministic
    assert not deterministic or torch.empty(3).isnan().all()
