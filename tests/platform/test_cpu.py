"""Megatron on CPU: when the adapter refuses, and what each mapping prevents."""

import ast
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_txssm.platform import cpu, prepare_platform

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the adapter is for machines without a GPU")


def test_refuses_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_installed", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="machines without a GPU"):
        cpu.install()
    assert cpu._installed is None
    # The trainer then runs on the GPU, unfused if the kernels of apex and Transformer Engine are missing.
    monkeypatch.setattr("megatron_txssm.platform.prefer_torchs_cudnn", lambda: None)
    assert prepare_platform() == ["--no-rope-fusion", "--no-gradient-accumulation-fusion"]


def test_refuses_after_megatron_was_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    import megatron.core

    assert megatron.core
    monkeypatch.setattr(cpu, "_installed", None)
    with pytest.raises(RuntimeError, match="must come before the first import of Megatron"):
        cpu.install()
    assert cpu._installed is None


def test_kernels_that_are_installed_are_not_called(tmp_path: Path) -> None:
    """On a node with hidden GPUs, Transformer Engine is installed but fails at its first kernel."""
    for package in ("transformer_engine", "apex"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    script = "from megatron_txssm.platform import prepare_platform; prepare_platform(); import megatron.core.optimizer"
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_installs_once() -> None:
    mode, device = cpu._installed, torch.cuda.current_device
    assert prepare_platform() == list(cpu.MEGATRON_ARGUMENTS)
    assert prepare_platform() == list(cpu.MEGATRON_ARGUMENTS)
    assert cpu._installed is mode
    assert torch.cuda.current_device is device
    assert sum(isinstance(m, cpu._CudaNamesToCpu) for m in torch.overrides._get_current_function_mode_stack()) == 1


def test_says_no_gpu_to_whoever_asks() -> None:
    assert not torch.cuda.is_available()


@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda"), torch.device("cuda", 1)])
@pytest.mark.parametrize("factory", [torch.zeros, torch.ones, torch.empty, torch.rand])
def test_cuda_factories_make_cpu_tensors(factory, device) -> None:
    assert factory(2, device=device).device.type == "cpu"


@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda")])
def test_other_ways_to_name_cuda(device) -> None:
    x = torch.arange(3)
    assert torch.tensor([1.0], device=device).device.type == "cpu"
    assert torch.arange(3, device=device).equal(x)
    assert torch.zeros_like(x, device=device).equal(torch.zeros_like(x))
    assert x.to(device).equal(x)
    assert x.to(device=device).equal(x)
    assert x.to(device, torch.float32, non_blocking=True).dtype == torch.float32


def test_cuda_method_gives_the_tensor_itself() -> None:
    x = torch.zeros(2, requires_grad=True)
    assert x.cuda() is x
    assert x.cuda(0, non_blocking=True) is x


def test_other_devices_stay() -> None:
    assert torch.empty(2, device="meta").device.type == "meta"
    assert torch.zeros(1).to("meta").device.type == "meta"


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.float32, "torch.cuda.FloatTensor"),
        (torch.bfloat16, "torch.cuda.BFloat16Tensor"),
        (torch.float16, "torch.cuda.HalfTensor"),
    ],
)
def test_type_names_are_those_the_optimizers_sort_by(dtype: torch.dtype, name: str) -> None:
    # megatron/core/optimizer/optimizer.py rejects parameters with any other type().
    assert torch.zeros(1, dtype=dtype).type() == name
    # Conversions are unaffected.
    assert torch.zeros(1).type(torch.float64).dtype == torch.float64


def test_random_states_are_really_restored() -> None:
    torch.manual_seed(5)
    state = torch.cuda.get_rng_state()
    first = torch.rand(4)
    torch.rand(7)
    torch.cuda.set_rng_state(state)
    assert torch.rand(4).equal(first)
    torch.cuda.random.set_rng_state(torch.cuda.random.get_rng_state(device="cuda:0"), device=0)
    torch.cuda.manual_seed(5)
    assert torch.rand(4).equal(first)


def test_manual_seed_leaves_the_generator_where_torch_put_it() -> None:
    # torch.manual_seed calls torch.cuda.manual_seed_all, too.
    generator = torch.Generator().manual_seed(11)
    torch.manual_seed(11)
    torch.cuda.manual_seed_all(12)
    assert torch.rand(3).equal(torch.rand(3, generator=generator))


def test_lazy_calls_are_called() -> None:
    # torch defers them until CUDA is initialised, which never happens; Megatron restores random states through them.
    called = []
    torch.cuda._lazy_call(lambda: called.append(1), seed=True)
    assert called == [1]


def test_megatrons_own_restoring_of_random_states_works(one_process) -> None:
    from megatron.core.tensor_parallel import random

    state = random._get_cuda_rng_state()
    first = torch.rand(4)
    random._set_cuda_rng_state(state)
    assert torch.rand(4).equal(first)
    tracker: Any = random.get_cuda_rng_tracker()
    before = torch.get_rng_state()
    with tracker.fork():
        inside = torch.rand(4)
    assert torch.get_rng_state().equal(before)
    with tracker.fork():
        assert not torch.rand(4).equal(inside)


def test_default_generators_are_the_cpus() -> None:
    generators: Any = torch.cuda.default_generators
    assert generators[3] is torch.default_generator
    assert len(generators) == 1


def test_devices_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch.cuda.current_device() == torch.device("cpu")
    torch.cuda.set_device(3)
    # Zero would make Megatron skip the initialisation of model parallelism.
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert torch.cuda.device_count() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert torch.cuda.device_count() == 4
    properties = torch.cuda.get_device_properties(0)
    assert properties.total_memory > 2**28
    # Below every compute capability that switches a kernel on.
    assert torch.cuda.get_device_capability() == (0, 0) == (properties.major, properties.minor)
    assert torch.cuda.memory_stats()["anything"] == 0
    before = torch.cuda.max_memory_allocated()
    block = torch.ones(2**26)  # 256 MiB, written to
    assert torch.cuda.max_memory_allocated() >= max(before, block.nbytes)
    with torch.cuda.device(1):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def test_streams_and_events() -> None:
    side, main = torch.cuda.Stream(), torch.cuda.current_stream()
    side.wait_stream(main)
    began = time.monotonic()
    with torch.cuda.stream(side), side:
        start = side.record_event()
        start.record()
        time.sleep(0.02)
        end = torch.cuda.Event(enable_timing=True)
        end.record(side)
    main.wait_event(end)
    torch.cuda.synchronize()
    assert end.query() and main.query()
    assert 20 <= start.elapsed_time(end) <= 1e3 * (time.monotonic() - began)
    torch.cuda.nvtx.range_push("step")
    torch.cuda.nvtx.range_pop()
    assert not torch.cuda.is_current_stream_capturing()


def test_recompute_gives_the_same_gradients(one_process) -> None:
    # The recomputed forward pass restores random states, which dropout reveals.
    from megatron.core.tensor_parallel import checkpoint

    torch.manual_seed(3)
    weight = torch.randn(8, 8, requires_grad=True)
    x = torch.randn(4, 8, requires_grad=True)

    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(torch.tanh(x @ weight), 0.5)

    gradients = []
    for forward in (function, lambda x: checkpoint(function, False, x)):
        torch.manual_seed(4)
        output = forward(x)
        output.square().sum().backward()
        assert weight.grad is not None and x.grad is not None
        gradients.append((output.detach(), weight.grad, x.grad))
        weight.grad = x.grad = None
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain.equal(recomputed)


def test_megatron_uses_the_resumable_adam() -> None:
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distributed

    from megatron_txssm.platform.adam import Adam

    assert optimizer.Adam is distributed.Adam is Adam
    assert not optimizer.USING_PYTORCH_OPTIMIZER
    assert distributed.HAVE_APEX_OR_TE


def test_jitted_functions_run_eagerly() -> None:
    assert os.environ["TORCHDYNAMO_DISABLE"] == "1"
    from megatron.core.fusions.fused_bias_swiglu import swiglu

    x = torch.randn(2, 6)
    gate, value = x.chunk(2, -1)
    assert torch.allclose(swiglu(x), torch.nn.functional.silu(gate) * value)


@pytest.mark.parametrize("async_ops", [False, True])
def test_tensors_of_several_dtypes_are_gathered_together(one_process, async_ops: bool) -> None:
    import torch.distributed as dist
    from megatron.core.distributed import param_and_grad_buffer

    tensors = [torch.arange(8).bfloat16(), torch.arange(100.0, 104.0), torch.arange(4).bfloat16()]
    expected = [tensor.clone() for tensor in tensors]
    with param_and_grad_buffer._coalescing_manager(dist.group.WORLD, async_ops=async_ops) as manager:
        for tensor in tensors:
            dist.all_gather_into_tensor(tensor, tensor[:], async_op=async_ops)
    manager.wait()
    assert all(torch.equal(tensor, wanted) for tensor, wanted in zip(tensors, expected, strict=True))


def test_no_assert_does_anything() -> None:
    """Python's -O and PYTHONOPTIMIZE remove asserts together with the calls in them."""
    changing = {
        "setdefault",
        "pop",
        "popitem",
        "append",
        "add",
        "update",
        "extend",
        "insert",
        "remove",
        "discard",
        "clear",
    }
    package = Path(cpu.__file__).parents[1]
    found = [
        f"{file.relative_to(package)}:{node.lineno}"
        for file in sorted(package.rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Assert)
        for call in ast.walk(node.test)
        if (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in changing)
        or isinstance(call, ast.NamedExpr)
    ]
    assert found == []
