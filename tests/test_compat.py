"""What compat.py takes from Megatron and mends in it: at an upgrade, these say what has moved."""

import ast
import gc
import importlib
import inspect
import multiprocessing
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from megatron_txssm import compat, compat_optimizers
from megatron_txssm.checkpoint import compat_saves
from tests.parity.harness import Case, run_cases, write_tokens
from tests.parity.test_experts import EXPERTS
from tests.support.ranks import model_parallel, run_ranks

ROOT = Path(__file__).parents[1]
PINNED = {"megatron-core": "0.19.2"}


@pytest.mark.parametrize("package", PINNED)
def test_checked_versions(package: str) -> None:
    assert version(package) == PINNED[package], "read compat.py against the new release, then change this pin"


def test_requirements_pin_the_same_versions() -> None:
    text = (ROOT / "requirements.txt").read_text()
    assert "megatron-core[training]==0.19.2" in text


def test_every_imported_name_exists() -> None:
    texts = [inspect.getsource(module) for module in (compat, compat_optimizers)]
    nodes = [node for text in texts for node in ast.walk(ast.parse(text))]
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    names = [(node.module, alias.name) for node in imports for alias in node.names if "megatron." in str(node.module)]
    assert ("megatron.core.ssm.utils", "_split_tensor_factory") in names
    for module, name in names:
        assert hasattr(importlib.import_module(str(module)), name), (module, name)


def test_get_args_is_megatrons(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.training import global_vars

    args = object()
    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", args)
    assert compat.get_args() is args


@pytest.fixture
def unmended(monkeypatch: pytest.MonkeyPatch):
    """Megatron as its wheel has it, whatever an earlier test mended."""
    import megatron.core.datasets.utils as utils
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import ChainedOptimizer, Float16OptimizerWithFloat16Params, FP32Optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker
    from megatron.training import checkpointing, global_vars

    monkeypatch.setattr(compat, "_mended", False)
    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", SimpleNamespace(override_opt_param_scheduler=False))
    for owner, names in (
        (DistributedOptimizer, ("load_state_dict", "sharded_param_state_fully_reshardable")),
        (Float16OptimizerWithFloat16Params, ("sharded_state_dict", "load_state_dict")),
        (FP32Optimizer, ("load_state_dict",)),
        (OptimizerParamScheduler, ("load_state_dict",)),
        (checkpointing, ("check_checkpoint_args",)),
        (ChainedOptimizer, ("_synchronize_steps",)),
        (MoEMetricsTracker, ("ensure_initialized",)),
        (TorchDistSaveShardedStrategy, ("save",)),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, inspect.unwrap(getattr(owner, name)))
    build: Any = DistributedOptimizer.__dict__["_build_optimizer_group_ranges"].__func__
    monkeypatch.setattr(
        DistributedOptimizer, "_build_optimizer_group_ranges", classmethod(getattr(build, "__wrapped__", build))
    )
    monkeypatch.setattr(utils, "compile_helpers", lambda: "compiled")
    return utils, DistributedOptimizer


def test_mending_twice_wraps_once(unmended) -> None:
    _, optimizer = unmended
    plain = optimizer.load_state_dict
    compat.mend_megatron()
    mended = optimizer.load_state_dict
    assert mended is not plain
    assert inspect.unwrap(mended) is plain
    compat.mend_megatron()
    assert optimizer.load_state_dict is mended


@pytest.mark.parametrize(("counts", "frozen"), [(True, False), (False, True)])
def test_triton_can_free_what_it_counts(counts: bool, frozen: bool) -> None:
    """Triton 3.9 would list hundreds of its objects as leaked, behind the last line of every command."""
    script = (
        "import atexit, gc, sys, types; atexit.register(lambda: print('frozen', gc.get_freeze_count() > 0)); "
        "from megatron_txssm.platform import prepare_platform; prepare_platform(); "
        "from megatron_txssm.compat import mend_megatron; mend_megatron(); "
        "library = sys.modules['triton._C.libtriton'] = types.ModuleType('libtriton'); "
        f"library.function = type('nb_func', (), {{'__module__': 'nanobind' if {counts} else 'builtins'}})()"
    )
    said = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[-1] == f"frozen {frozen}", said


def test_state_is_loaded_without_autograd(unmended, monkeypatch: pytest.MonkeyPatch) -> None:
    _, optimizer = unmended
    leaf = torch.zeros(4, requires_grad=True)

    def load_state_dict(self, state) -> None:
        leaf.view(-1)[:2].copy_(state)

    monkeypatch.setattr(optimizer, "load_state_dict", load_state_dict)
    with pytest.raises(RuntimeError, match="leaf"):
        load_state_dict(None, torch.ones(2))
    compat.mend_megatron()
    optimizer.load_state_dict(None, torch.ones(2))
    assert leaf.tolist() == [1, 1, 0, 0]


def parameters(*dtypes: torch.dtype) -> list[torch.nn.Parameter]:
    """Of 1, 2, … elements, so that none can be taken for another."""
    return [torch.nn.Parameter(torch.ones(size, dtype=dtype)) for size, dtype in enumerate(dtypes, start=1)]


def adams_groups(optimizer: Any, params: list[torch.nn.Parameter]) -> tuple[list[Any], dict[Any, tuple[int, int]]]:
    """What the distributed optimizer gives to Adam, and where it believes each parameter to be."""
    from megatron.core.optimizer.distrib_optimizer import Range

    # Two model chunks, as under a virtual pipeline; in each a gradient buffer of every dtype.
    buffers = [
        {dtype: [{"param_map": {param: {"param": Range(0, param.numel())} for param in chunk if param.dtype == dtype}}]}
        for chunk in (params[:3], params[3:])
        for dtype in dict.fromkeys(param.dtype for param in chunk)
    ]
    groups = [{"params": [param for param in params if param.numel() % 2 == odd]} for odd in (0, 1)]
    places, ranges = optimizer._build_optimizer_group_ranges(groups, buffers)
    config = SimpleNamespace(use_precision_aware_optimizer_no_fp8_or_ds_fp8=False, fp8_recipe=None)
    optimizer._build_model_and_main_param_groups(
        buffers, optimizer._build_model_param_gbuf_map(buffers), ranges, config
    )
    return [[shard.numel() for shard in group["params"]] for group in groups], places


MIXED = (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32, torch.bfloat16, torch.float32, torch.bfloat16)


def test_the_distributed_optimizer_finds_the_state_of_fp32_parameters(unmended) -> None:
    _, optimizer = unmended
    params = parameters(*MIXED)
    given, places = adams_groups(optimizer, params)
    assert any(given[i][j] != param.numel() for param, (i, j) in places.items()), "Megatron is mended: drop ours"
    compat.mend_megatron()
    given, places = adams_groups(optimizer, params)
    assert {param: given[i][j] for param, (i, j) in places.items()} == {param: param.numel() for param in params}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_order_of_one_dtype_stays(unmended, dtype: torch.dtype) -> None:
    """So that checkpoints that depend on it stay readable."""
    _, optimizer = unmended
    params = parameters(*[dtype] * 7)
    before = adams_groups(optimizer, params)
    compat.mend_megatron()
    assert adams_groups(optimizer, params) == before


def mixed_precision_optimizer(params: list[torch.nn.Parameter]) -> Any:
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
    from megatron.core.optimizer.optimizer_config import OptimizerConfig

    from megatron_txssm.platform.adam import Adam

    def init_state(adam: Any, *_: Any) -> None:
        for param in (param for group in adam.param_groups for param in group["params"]):
            adam.state[param] = {"exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param)}

    groups = [
        {"params": [param for param in params if param.numel() % 2 == odd], "wd_mult": float(odd)} for odd in (0, 1)
    ]
    return Float16OptimizerWithFloat16Params(Adam(groups), OptimizerConfig(bf16=True, lr=1.0), None, init_state)  # pyright: ignore[reportArgumentType]


def test_the_plain_optimizer_saves_and_loads_the_state_of_fp32_parameters(unmended, one_process: None) -> None:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.dist_checkpointing.utils import nested_values

    params = parameters(*MIXED)
    model = {f"p{param.numel()}": ShardedTensor.from_rank_offsets(f"p{param.numel()}", param) for param in params}
    optimizer = mixed_precision_optimizer(params)
    with pytest.raises((AssertionError, ValueError)):
        optimizer.sharded_state_dict(model, is_loading=True)
    compat.mend_megatron()
    saved = optimizer.sharded_state_dict(model, is_loading=True)
    shards = [entry for entry in nested_values(saved) if isinstance(entry, ShardedTensor)]
    assert {shard.key: tuple(shard.local_shape) for shard in shards} == {
        f"optimizer.state.{kind}.p{param.numel()}": (param.numel(),)
        for kind in ("fp32_param", "exp_avg", "exp_avg_sq")
        for param in params
    }
    # As a checkpoint is read: a tensor in the place of every shard.
    for group in saved["fp32_from_fp16_params"]:
        group[:] = [torch.full(shard.local_shape, float(shard.key[-1])) for shard in group]
    for state in saved["optimizer"]["state"].values():
        state.update({key: torch.full(shard.local_shape, float(shard.key[-1])) for key, shard in state.items()})
    for group in saved["optimizer"]["param_groups"]:
        group["params"] = group["params"].unwrap()
    optimizer.load_state_dict(saved)
    adam = optimizer.optimizer
    copies = [param for group in adam.param_groups for param in group["params"]]
    assert sorted(copy.numel() for copy in copies) == [param.numel() for param in params]
    for copy in copies:
        for tensor in (copy, adam.state[copy]["exp_avg"], adam.state[copy]["exp_avg_sq"]):
            assert tensor.tolist() == [copy.numel()] * copy.numel()


def test_padding_between_buckets_counts_while_state_is_saved(unmended, monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/parity/test_bf16.py saves such buckets."""
    _, optimizer = unmended
    buckets = [SimpleNamespace(numel_unpadded=used, grad_data=torch.empty(128)) for used in (64, 100)]
    holder = SimpleNamespace(buffers=[SimpleNamespace(numel=256, numel_unpadded=164, buckets=buckets)])

    def numbers(self) -> list[int]:
        return [part.numel_unpadded for buffer in self.buffers for part in (buffer, *buffer.buckets)]

    monkeypatch.setattr(optimizer, "sharded_param_state_fully_reshardable", numbers)
    compat.mend_megatron()
    assert optimizer.sharded_param_state_fully_reshardable(holder) == [256, 128, 128]
    assert numbers(holder) == [164, 64, 100]


@pytest.mark.parametrize("makefile", [False, True])
def test_helpers_are_compiled_only_where_they_can_be(
    unmended, makefile: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    utils, _ = unmended
    monkeypatch.setattr(utils, "__file__", str(tmp_path / "utils.py"))
    if makefile:
        (tmp_path / "Makefile").touch()
    compat.mend_megatron()
    assert utils.compile_helpers() == ("compiled" if makefile else None)


def test_the_wheel_ships_the_compiled_helpers() -> None:
    # Otherwise leaving the compilation out would end in an ImportError.
    import megatron.core.datasets.helpers_cpp as helpers

    assert callable(helpers.build_sample_idx_int32)


@pytest.mark.slow
def test_a_forgotten_training_leaves_nothing(tmp_path: Path) -> None:
    """Otherwise each further model in the same processes would be slower. Experts keep activations in the model."""
    layout = "--expert-model-parallel-size 2 --train-iters 1 --save-interval 1"
    case = Case(tmp_path / "run", f"{EXPERTS} {layout} --save {tmp_path / 'checkpoints'}")
    run_cases(2, [case], write_tokens(tmp_path / "tokens"), after=[(nothing_is_left, {})])


def nothing_is_left() -> None:
    from megatron.core.distributed import DistributedDataParallel

    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    # That of all ranks, which the next model uses, and two that Megatron's parallel_state still names; it made twenty.
    assert threads.count("gloo_tcp_loop") <= 3, threads
    assert not [thing for thing in gc.get_objects() if type(thing) is DistributedDataParallel]
    # The save needed no process beside its rank.
    assert psutil.Process().children() == []


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_the_helper_of_saves_ends_with_a_killed_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    monkeypatch.setattr(filesystem_async, "_results_queue", None)
    monkeypatch.setattr(filesystem_async, "get_write_results_queue", filesystem_async.get_write_results_queue)
    compat_saves.end_save_helpers_with_rank()
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()

    def rank() -> None:
        # As it is while a rank saves.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        queue: Any = filesystem_async.get_write_results_queue("fork")
        queue.put(7)
        theirs.send((queue._manager._process.pid, queue.get()))
        signal.pause()

    process = fork.Process(target=rank)
    process.start()
    assert ours.poll(300)
    pid, received = ours.recv()
    helper = psutil.Process(pid)
    assert received == 7
    process.kill()
    process.join()
    try:
        helper.wait(timeout=300)
    finally:
        if helper.is_running():
            helper.kill()


def test_the_steps_of_an_optimizer_without_parameters_are_counted(unmended) -> None:
    """As Transformer Engine's Adam leaves them on a first stage without experts, and on another after loading these."""
    from megatron.core.optimizer.optimizer import ChainedOptimizer

    def chained(*groups: dict[str, Any]) -> Any:
        optimizer: Any = ChainedOptimizer.__new__(ChainedOptimizer)
        inner = [SimpleNamespace(param_groups=[group]) for group in groups]
        optimizer.chained_optimizers = [SimpleNamespace(optimizer=each) for each in inner]
        return optimizer

    first = {"params": [0], "step": 7}, {"params": []}
    other = {"params": [0], "step": 7}, {"params": [1]}
    untrained = {"params": [0]}, {"params": []}
    assert chained(*first)._synchronize_steps() == 7 and "step" not in first[1]
    compat.mend_megatron()
    for groups, step in ((first, 7), (other, 7), (untrained, None)):
        assert chained(*groups)._synchronize_steps() == step
        assert [group.get("step") for group in groups] == [step, step]


def load_balance() -> float:
    """The first of two stages has the experts; each of its tensor-parallel ranks has a part of the sum."""
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker
    from megatron.training import global_vars

    holder: Any = global_vars
    holder._GLOBAL_ARGS = SimpleNamespace(num_layers=4, mtp_num_layers=1)
    compat.mend_megatron()
    with model_parallel(tensor=2, pipeline=2):
        tracker = MoEMetricsTracker()
        if parallel_state.is_pipeline_first_stage():
            part = torch.tensor(1.0 + parallel_state.get_tensor_model_parallel_rank())
            group: Any = parallel_state.get_tensor_and_context_parallel_group()
            tracker.record("load_balancing_loss", part, 2, 5, reduce_group=group)
        losses: dict[str, torch.Tensor] = {}
        tracker.report(
            1.0, 1, force_initialize=True, track_names="load_balancing_loss", num_layers=1, moe_layer_freq=1,
            mtp_num_layers=1, total_loss_dict=losses,
        )  # fmt: skip
    return losses["load_balancing_loss"].item()


def test_load_balance_is_whole_on_a_stage_without_experts(tmp_path: Path) -> None:
    assert run_ranks(load_balance, 4, tmp_path) == [3.0] * 4
