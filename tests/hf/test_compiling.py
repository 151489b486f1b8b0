"""torch.export, torch.compile and torch.func give the model's results (compile_checks.py)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.hf.tiny import random_ids, tiny_model, worst_difference

REPOSITORY = Path(__file__).parents[2]


def check(*names: str, **environment: str) -> None:
    # The suite's platform sets it for Megatron; children would inherit it and compile nothing.
    inherited = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.hf.compile_checks", *names],
        env=inherited | environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
def test_what_is_exported_or_compiled_computes_the_same() -> None:
    check("export", "aot_eager")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++, and there is no g++")
def test_what_inductor_writes_computes_the_same(tmp_path: Path) -> None:
    check("inductor", TORCHINDUCTOR_CACHE_DIR=str(tmp_path))


def test_the_gradient_of_every_text_by_vmap() -> None:
    model, ids = tiny_model("jamba", attn_implementation="eager"), random_ids(2, 20)
    parameters: dict[str, Tensor] = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], ids_L: Tensor) -> Tensor:
        text = {"input_ids": ids_L[None], "labels": ids_L[None], "use_cache": False}
        return torch.func.functional_call(model, parameters, (), text).loss

    by_text = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, ids)
    for row in range(2):
        exact = torch.autograd.grad(loss(parameters, ids[row]), list(parameters.values()))
        for (name, actual), expected in zip(by_text.items(), exact, strict=True):
            assert worst_difference(actual[row], expected) < 1e-4 * expected.abs().max(), name
