"""FP8 by Transformer Engine's and Megatron's own Python code, on GPUs that are reported; run as te_checks.py is.

What recipe/validation/fp8_checks.py refuses is compared with what they do, so that an upgrade of either shows here.
"""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.extensions import transformer_engine as te
from megatron.core.fp8_utils import get_fp8_context, get_fp8_recipe
from te_checks import build, metadata, world  # pyright: ignore[reportMissingImports]
from transformer_engine.common import recipe as scaling  # pyright: ignore[reportMissingImports]
from transformer_engine.pytorch import quantization  # pyright: ignore[reportMissingImports]
from transformer_engine.pytorch import utils as te_utils  # pyright: ignore[reportMissingImports]
from transformer_engine.pytorch.attention.dot_product_attention import (  # pyright: ignore[reportMissingImports]
    utils as attention_utils,
)

from megatron_txssm.errors import UserError
from megatron_txssm.platform import ALLOW_EXTRA_STATE
from megatron_txssm.recipe.loader import load_recipe, recipe_names
from megatron_txssm.recipe.validation.fp8_checks import check_fp8_on
from tests.support.built_model import build_with_arguments
from tests.support.tiny_model import transformer_config

HOPPER, BLACKWELL = (9, 0), (10, 0)
CLASSES = {
    "delayed": scaling.DelayedScaling,
    "tensorwise": scaling.Float8CurrentScaling,
    "blockwise": scaling.Float8BlockScaling,
    "mxfp8": scaling.MXFP8BlockScaling,
}
# Narrow models whose GEMMs still have sides as FP8 wants them, and attention its heads of 128.
SMALL = (
    "model.hidden_size=256",
    "model.ffn_hidden_size=512",
    "model.num_attention_heads=2",
    "model.state_num_groups=2",
    "model.state_size=16",
    "model.state_num_heads=32",
    "model.state_head_dim=8",
    "data.vocab_size=128",
)
OWN_DATA = ("data.train=a", "data.validation=a", "data.tokenizer_model=b", "logging.tensorboard=false")


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Report a GPU of a compute capability to Transformer Engine, which asks once and remembers."""

    def forget() -> None:
        te_utils._get_device_compute_capability.cache_clear()
        for name in ("_FP8_SUPPORT", "_MXFP8_SUPPORT", "_FP8_BLOCK_SCALING_SUPPORT"):
            setattr(quantization, name, None)

    def as_gpu(capability: tuple[int, int]) -> None:
        properties = SimpleNamespace(major=capability[0], minor=capability[1], name="gpu", multi_processor_count=132)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        forget()

    yield as_gpu
    forget()


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with world(1, monkeypatch):
        yield


def linears(model: Any) -> list[Any]:
    classes = (te.TELayerNormColumnParallelLinear, te.TERowParallelLinear)
    return [module for module in model.decoder.modules() if isinstance(module, classes)]


def fp8_config(way: str, attention: bool) -> Any:
    return transformer_config(fp8="hybrid", fp8_recipe=way, fp8_dot_product_attention=attention)


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("way", CLASSES)
def test_megatron_passes_fp8_attention_on_but_for_blockwise(one_rank: None, way: str, attention: bool) -> None:
    made: Any = get_fp8_recipe(fp8_config(way, attention))
    assert isinstance(made, CLASSES[way])
    assert made.fp8_dpa is (attention and way != "blockwise")
    overrides = [
        "training.fp8=hybrid",
        f"training.fp8_recipe={way}",
        f"training.fp8_attention={str(attention).lower()}",
    ]
    if made.fp8_dpa == attention:
        load_recipe("transxssm_1.3b", overrides)
    else:
        with pytest.raises(UserError, match="would be dropped"):
            load_recipe("transxssm_1.3b", overrides)


@pytest.mark.parametrize(
    ("way", "gpu", "works"),
    [
        ("delayed", (8, 0), False),
        ("delayed", HOPPER, True),
        ("tensorwise", (8, 0), False),
        ("tensorwise", HOPPER, True),
        ("blockwise", (8, 0), False),
        ("blockwise", HOPPER, True),
        ("mxfp8", HOPPER, False),
        ("mxfp8", BLACKWELL, True),
        ("mxfp8", (12, 0), False),
    ],
)
def test_what_a_gpu_cannot_scale_is_refused(
    one_rank: None, report: Any, way: str, gpu: tuple[int, int], works: bool
) -> None:
    report(gpu)
    recipe = load_recipe("transxssm_1.3b", ["training.fp8=hybrid", f"training.fp8_recipe={way}"])
    if works:
        with get_fp8_context(fp8_config(way, False)):
            pass
        check_fp8_on(recipe, gpu, (9, 20, 0))
        return
    with pytest.raises(RuntimeError), get_fp8_context(fp8_config(way, False)):
        pass
    with pytest.raises(UserError):
        check_fp8_on(recipe, gpu, (9, 20, 0))


def has_attention(way: str, **others: Any) -> bool:
    """Whether Transformer Engine's Python lets a backend pass; the last word on the fused one is cuDNN's."""
    made = CLASSES[way](fp8_dpa=True)
    parameters = attention_utils.AttentionParams(
        qkv_dtype=torch.bfloat16,
        qkv_layout="sbhd_sbhd_sbhd",
        batch_size=1,
        num_heads=16,
        num_gqa_groups=16,
        max_seqlen_q=4096,
        max_seqlen_kv=4096,
        head_dim_qk=128,
        head_dim_v=128,
        attn_mask_type="causal",
        is_training=True,
        fp8=True,
        fp8_meta={"recipe": made, "local_recipes": [made]},
        **others,
    )
    flash, _, fused, _, unfused, *_ = attention_utils.get_attention_backend(parameters)
    return bool(flash or fused or unfused)


@pytest.mark.parametrize("cudnn", [(9, 13, 0), (9, 20, 0), (9, 21, 0), (9, 23, 0)], ids=str)
@pytest.mark.parametrize("gpu", [(8, 9), HOPPER, BLACKWELL, (12, 0)], ids=str)
@pytest.mark.parametrize("way", ["delayed", "tensorwise", "mxfp8"])
def test_what_has_no_attention_is_refused(
    monkeypatch: pytest.MonkeyPatch, report: Any, way: str, gpu: tuple[int, int], cudnn: tuple[int, int, int]
) -> None:
    report(gpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(attention_utils, "get_cudnn_version", lambda: cudnn)
    # The query that needs a driver; of Ada cuDNN would say no.
    backends = attention_utils.FusedAttnBackend
    found = (backends.FP8 if gpu >= HOPPER else backends.No_Backend).value
    monkeypatch.setattr(attention_utils, "_get_fused_attn_backend", lambda **_: (found, ""))
    overrides = ["training.fp8=hybrid", f"training.fp8_recipe={way}", "training.fp8_attention=true"]
    recipe = load_recipe("transxssm_1.3b", [*overrides, "model.num_attention_heads=16"])
    try:
        check_fp8_on(recipe, gpu, cudnn)
        accepted = True
    except UserError:
        accepted = False
    # Without GEMMs of that kind, attention does not matter.
    supported = not (way == "mxfp8" and not BLACKWELL <= gpu < (12, 0))
    assert accepted is (supported and has_attention(way))


@pytest.mark.parametrize("communication", ["p2p", "all_gather", "a2a"])
def test_context_parallelism_keeps_fp8_attention(
    monkeypatch: pytest.MonkeyPatch, report: Any, communication: str
) -> None:
    report(HOPPER)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(attention_utils, "get_cudnn_version", lambda: (9, 20, 0))
    found = attention_utils.FusedAttnBackend.FP8.value
    monkeypatch.setattr(attention_utils, "_get_fused_attn_backend", lambda **_: (found, ""))
    assert has_attention("delayed", context_parallel=True, cp_comm_type=communication)


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.endswith(("_h100", "_b200"))])
def test_each_recipe_builds_transformer_engines_layers(
    one_rank: None, report: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Made narrow, from the arguments that Megatron gets; the precision of each layer is as the recipe says."""
    report(HOPPER if name.endswith("h100") else BLACKWELL)
    one = ["parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false"]
    eight_blocks = load_recipe(name, [*OWN_DATA]).layers[:16]
    sizes = [*SMALL, f"model.layer_pattern={eight_blocks}"]
    recipe = load_recipe(name, [*OWN_DATA, "megatron.tp_comm_overlap=null", *one, *sizes])
    model = build_with_arguments(recipe, ["--no-gradient-accumulation-fusion"], monkeypatch)
    transformer = model.config
    assert (transformer.fp8, transformer.fp8_dot_product_attention) == (
        recipe.training.fp8,
        recipe.training.fp8_attention,
    )
    assert len(linears(model)) == 2 * transformer.num_layers
    assert type(model.output_layer).__module__ == "megatron.core.tensor_parallel.layers"
    if recipe.training.fp8 is None:
        return
    made: Any = get_fp8_recipe(transformer)
    assert isinstance(made, CLASSES[recipe.training.fp8_recipe])
    assert made.fp8_dpa is recipe.training.fp8_attention
    assert made.fp8_format is (scaling.Format.HYBRID if recipe.training.fp8 == "hybrid" else scaling.Format.E4M3)
    if recipe.training.fp8_recipe == "delayed":
        assert (made.amax_history_len, made.amax_compute_algo) == (1024, "max")
    multiple = 32 if recipe.training.fp8_recipe == "mxfp8" else 16
    for linear in linears(model):
        assert all(side % multiple == 0 for side in linear.weight.shape)
        te_utils.assert_dim_for_fp8_exec(linear.weight)


def test_fp8_statistics_in_a_checkpoint_hinder_nobody(
    one_rank: None, report: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Delayed scaling saves its history as extra state: it comes back, and local modules load the weights beside it."""
    report(HOPPER)
    history = {"fp8_amax_history_len": 4, "fp8_amax_compute_algo": "max"}
    source, target = (build("transformer_engine", fp8="hybrid", **history) for _ in range(2))
    for model in (source, target):
        with get_fp8_context(model.config):
            for module in linears(model):
                module.init_fp8_metadata()
    for number, module in enumerate(linears(source)):
        module.fp8_meta["scaling_fwd"].amax_history.fill_(number + 1.0)
    dist_checkpointing.save(source.sharded_state_dict(metadata=metadata()), str(tmp_path))
    state: Any = dist_checkpointing.load(target.sharded_state_dict(metadata=metadata()), str(tmp_path))
    # Transformer Engine 2.20 no longer unpickles it unless told; platform/__init__.py tells it.
    monkeypatch.delenv(ALLOW_EXTRA_STATE, raising=False)
    with pytest.raises(RuntimeError, match=f"set {ALLOW_EXTRA_STATE}=1"):
        target.load_state_dict(state)
    monkeypatch.setenv(ALLOW_EXTRA_STATE, "1")
    target.load_state_dict(state)
    for number, module in enumerate(linears(target)):
        found = module.fp8_meta["scaling_fwd"].amax_history
        assert found.shape[0] == 4 and torch.equal(found, torch.full_like(found, number + 1.0))
    local = build("local")
    local.load_state_dict(dist_checkpointing.load(local.sharded_state_dict(metadata=metadata()), str(tmp_path)))
    weight = "decoder.layers.1.mlp.linear_fc2.weight"
    assert torch.equal(local.state_dict()[weight], source.state_dict()[weight])
