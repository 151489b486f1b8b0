"""Our Transformer Engine block spec, built of its real classes; test_transformer_engine.py runs it under te_stub.py."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.extensions import transformer_engine as te
from megatron.core.transformer.identity_op import IdentityOp
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.support.tiny_model import (
    assembled,
    build_hybrid,
    perturb,
    pieces,
    state_space_config,
    transformer_config,
)

PATTERN = "M-*-"
STATE_SPACE = state_space_config(position_encoding="conv1d_d", gated=True)
IMPLEMENTATIONS = ("local", "transformer_engine")


@contextlib.contextmanager
def world(tensor: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One rank of `tensor` ones, whose collectives do nothing; modules see a GPU while they are built."""
    if tensor == 1:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=tensor)
    parallel_state.initialize_model_parallel(tensor, create_gloo_process_groups=False)
    tensor_parallel.model_parallel_cuda_manual_seed(1234, force_reset_rng=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    yield
    monkeypatch.undo()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with world(1, monkeypatch):
        yield


@pytest.fixture
def one_of_two_ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with world(2, monkeypatch):
        yield


def build(implementation: str, **overrides: Any) -> Any:
    config = transformer_config(
        num_layers=len(PATTERN),
        is_hybrid_model=True,
        transformer_impl=implementation,
        sequence_parallel=parallel_state.get_tensor_model_parallel_world_size() > 1,
        **overrides,
    )
    return build_hybrid(PATTERN, config, STATE_SPACE)


def metadata() -> dict[str, Any]:
    return {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def shards(model: Any) -> dict[str, tuple[Any, ...]]:
    """(global shape, this rank's shape, type) by name in the checkpoint; nothing for objects that are no tensors."""
    found: dict[str, tuple[Any, ...]] = {}
    for entry in nested_values(model.sharded_state_dict(metadata=metadata())):
        for shard in nested_values(entry.build()) if isinstance(entry, ShardedTensorFactory) else [entry]:
            found[shard.key] = (shard.global_shape, shard.local_shape, shard.dtype) if is_tensor(shard) else ()
    return found


def is_tensor(shard: Any) -> bool:
    return isinstance(shard, ShardedTensor)


def test_the_classes_are_transformer_engines(one_rank: None) -> None:
    state_space, *ffns, attention = (build("transformer_engine").decoder.layers[layer] for layer in (0, 1, 3, 2))
    assert type(state_space.mixer.in_proj) is te.TELayerNormColumnParallelLinear
    assert type(state_space.mixer.out_proj) is te.TERowParallelLinear
    assert type(attention.self_attention.linear_qkv) is te.TELayerNormColumnParallelLinear
    assert type(attention.self_attention.linear_proj) is te.TERowParallelLinear
    assert isinstance(attention.self_attention.core_attention, te.TEDotProductAttention)
    for layer in ffns:
        assert type(layer.mlp.linear_fc1) is te.TELayerNormColumnParallelLinear
        assert type(layer.mlp.linear_fc2) is te.TERowParallelLinear
    assert {type(norm) for norm in (state_space.norm, attention.input_layernorm, ffns[0].pre_mlp_layernorm)} == {
        IdentityOp
    }


def test_every_norm_is_there_and_is_rms(one_rank: None) -> None:
    """With TEColumnParallelLinear in the place of TELayerNormColumnParallelLinear all would build, without norms."""
    decoder = build("transformer_engine").decoder
    norms = {name for name, _ in decoder.named_parameters() if "norm" in name}
    assert norms == {
        "layers.0.mixer.in_proj.layer_norm_weight",
        "layers.0.mixer.norm_weight",
        "layers.1.mlp.linear_fc1.layer_norm_weight",
        "layers.2.self_attention.linear_qkv.layer_norm_weight",
        "layers.3.mlp.linear_fc1.layer_norm_weight",
        "final_norm.weight",
    }
    linears = [module for module in decoder.modules() if isinstance(module, te.TELayerNormColumnParallelLinear)]
    assert [linear.normalization for linear in linears] == ["RMSNorm"] * 4
    assert isinstance(decoder.final_norm, te.te.pytorch.RMSNorm)


def test_checkpoints_of_the_two_implementations_have_the_same_tensors(one_rank: None) -> None:
    local, engine = (shards(build(implementation)) for implementation in IMPLEMENTATIONS)
    assert engine == local
    assert "decoder.layers.0.mixer.in_proj.weight.x" in engine


def test_two_ranks_have_the_shards_of_the_local_modules(one_of_two_ranks: None) -> None:
    local, engine = (build(implementation) for implementation in IMPLEMENTATIONS)
    assert shards(engine) == shards(local)
    mixer = engine.decoder.layers[0].mixer
    rows = sum(STATE_SPACE.in_proj_sizes.values())
    assert mixer.in_proj.weight.shape == (rows // 2 + mixer.padding, STATE_SPACE.hidden_size)
    assert mixer.out_proj.weight.shape == (STATE_SPACE.hidden_size, STATE_SPACE.inner_size // 2)
    # The norms' gradients are summed over the ranks, each of which sees half of the tokens.
    for model in (local, engine):
        norms = [
            p
            for name, p in model.named_parameters()
            if name.endswith(("norm.weight", "layer_norm_weight", "layernorm.weight"))
        ]
        assert len(norms) == 5 and all(parameter.sequence_parallel for parameter in norms)
    for name, parameter in mixer.named_parameters():
        if name != "in_proj.layer_norm_weight":
            assert parameter.tensor_model_parallel, name
            assert parameter.partition_dim == (1 if name == "out_proj.weight" else 0), name


@pytest.mark.parametrize(("saved", "loaded"), [IMPLEMENTATIONS, IMPLEMENTATIONS[::-1]], ids=["from-local", "to-local"])
def test_a_checkpoint_of_one_implementation_loads_into_the_other(
    one_rank: None, tmp_path: Path, saved: str, loaded: str
) -> None:
    source, target = build(saved), build(loaded)
    perturb(source)
    dist_checkpointing.save(source.sharded_state_dict(metadata=metadata()), str(tmp_path))
    state = dist_checkpointing.load(target.sharded_state_dict(metadata=metadata()), str(tmp_path))
    target.load_state_dict(state)
    written, read = (assembled([pieces(model, dict(model.named_parameters()))]) for model in (source, target))
    assert written.keys() == read.keys()
    assert all(torch.equal(tensor, read[key]) for key, tensor in written.items())


def test_decays_stay_fp32_in_a_bf16_model(one_rank: None) -> None:
    model = build("transformer_engine", bf16=True, params_dtype=torch.bfloat16).bfloat16()
    fp32 = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    assert fp32 == {f"decoder.layers.0.mixer.{name}" for name in ("A_log", "dt_bias", "D")}


def test_builds_on_the_meta_device(one_of_two_ranks: None) -> None:
    model = build("transformer_engine", init_model_with_meta_device=True, perform_initialization=False)
    engines = (te.TELayerNormColumnParallelLinear, te.TERowParallelLinear, te.te.pytorch.RMSNorm)
    devices = {p.device.type for m in model.modules() if isinstance(m, engines) for p in m.parameters()}
    assert devices == {"meta"}
    on_cpu = build("transformer_engine")
    assert [p.shape for p in model.parameters()] == [p.shape for p in on_cpu.parameters()]
