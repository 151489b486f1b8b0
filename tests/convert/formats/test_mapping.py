"""The tables of mapping.py: every tensor of every model, in order, and each way back the inverse of the way there."""

from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import nested_values
from transformers import AutoConfig, AutoModelForCausalLM

import megatron_txssm.hf  # noqa: F401  (our class)
from megatron_txssm.architecture.parameters import ModelSizes, count_parameters
from megatron_txssm.checkpoint.tensors import EMBEDDING, OUTPUT_LAYER, layer_of, model_shapes
from megatron_txssm.convert.formats.config import hf_config
from megatron_txssm.convert.formats.format import ARCHITECTURES, FORMATS, refusal
from megatron_txssm.convert.formats.mapping import CONCAT, DECAY_RATE, HALVES, QKV, SAME, Group, hf_tensors, plan
from megatron_txssm.convert.huggingface.weights import Export, split_files
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.recipe import Recipe
from tests.support.built_model import build_model

# Every size differs from every other; 11 rows of padding.
SMALL = (
    *("model.hidden_size=48", "model.ffn_hidden_size=80", "model.num_attention_heads=6"),
    *("model.num_query_groups=2", "model.state_head_dim=12", "model.state_size=20", "model.state_num_groups=2"),
    *("data.train=a", "data.validation=a", "data.tokenizer_model=b", "data.vocab_size=245"),
    *("training.seq_length=64", "training.global_batch_tokens=64", "training.train_tokens=6400"),
    *("training.micro_batch_size=1", "training.precision=fp32", "training.transformer_impl=local"),
)
_EXPERTS = "num_experts=5 moe_router_topk=3 moe_ffn_hidden_size=28"
_REFERENCE = "state_dt_bias=false state_num_groups=6 state_size=8 state_head_dim=8 num_query_groups=null"
# Variant -> recipe, changes of its model.
VARIANTS = {
    "transxssm": ("transxssm_320m", ""),
    "llama3": ("llama3_320m", "kv_channels=10"),
    "mamba2": ("mamba2_320m", "state_num_heads=8"),
    "jamba": ("jamba_320m", "tie_embeddings=false"),
    "a_t": ("transxssm_320m", "position_encoding=a_t layer_pattern=M-*- state_dt_bias=false tie_embeddings=false"),
    "gated rope": ("transxssm_320m", "state_gated=true length_scaling_base=16"),
    "jamba without a gate": ("jamba_320m", "state_gated=false"),
    "reference": ("transxssm_320m", _REFERENCE),
    "under muP": ("jamba_320m", "mup_base_hidden_size=36"),
    "some experts": ("transxssm_320m", f"layer_pattern=M-MEM-*E {_EXPERTS}"),
    "jamba with experts": (
        "jamba_320m",
        f"layer_pattern=MEME*EME {_EXPERTS} moe_shared_expert_intermediate_size=36",
    ),
}
# What each format can hold of these; transxssm and megatron hold all.
HELD = {
    "llama": {"llama3"},
    "granitemoehybrid": {"mamba2", "jamba", "jamba with experts", "under muP"},
    "reference": {"reference"},
}
LAST_NORM = "decoder.final_norm.weight"
# Parameters of transformers' class -> their names in files, which transformers renames.
IN_FILES = {
    "block_sparse_moe.router.weight": "block_sparse_moe.router.layer.weight",
    "block_sparse_moe.experts.gate_up_proj": "block_sparse_moe.input_linear.weight",
    "block_sparse_moe.experts.down_proj": "block_sparse_moe.output_linear.weight",
}


def load(variant: str, further: str = "") -> Recipe:
    name, changes = VARIANTS[variant]
    eight_blocks = f"model.layer_pattern={load_recipe(name, SMALL).layers[:16]}"
    return load_recipe(name, [*SMALL, eight_blocks, *(f"model.{change}" for change in f"{changes} {further}".split())])


@pytest.fixture(params=VARIANTS)
def recipe(request: pytest.FixtureRequest) -> Recipe:
    return load(request.param)


def test_shapes_are_those_of_megatrons_own_checkpoint(
    one_process: None, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(recipe, monkeypatch)
    saved: dict[str, tuple[int, ...]] = {}
    for entry in nested_values(model.sharded_state_dict()):
        for shard in entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]:
            if isinstance(shard, ShardedTensor):
                saved[shard.key] = tuple(shard.global_shape)
    for name in {EMBEDDING, OUTPUT_LAYER} & saved.keys():
        assert saved[name] == (256, 48)
        saved[name] = (245, 48)
    assert model_shapes(recipe) == saved


def test_sizes_add_up_to_the_parameters_without_padding(recipe: Recipe) -> None:
    padding = 11 * 48 * (1 if recipe.model.tie_embeddings else 2)
    elements = sum(torch.Size(shape).numel() for shape in model_shapes(recipe).values())
    assert elements == count_parameters(recipe.sizes).total - padding


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_format_holds_the_whole_model_or_says_why_not(variant: str, format: str) -> None:
    recipe = load(variant)
    held = variant in HELD.get(format, VARIANTS)
    assert (refusal(recipe, format) is None) == held
    if not held:
        return
    shapes, sizes = model_shapes(recipe), recipe.sizes
    groups = plan(format, shapes)
    assert sorted(name for group in groups for name in group.megatron) == sorted(shapes)
    tensors = hf_tensors(groups, sizes)
    assert len(tensors) == sum(len(group.hf) for group in groups), "each name once"
    values = {name: torch.randn(shape) for name, shape in shapes.items()}
    there = {name: tensor for group in groups for name, tensor in group.to_hf(values, sizes).items()}
    assert {name: tensor.shape for name, tensor in there.items()} == {name: t.shape for name, t in tensors.items()}
    back = {name: tensor for group in groups for name, tensor in group.from_hf(there, sizes).items()}
    for name, value in values.items():
        exact = format != "reference" or not name.endswith("A_log")
        exact &= variant != "under muP" or name != LAST_NORM
        torch.testing.assert_close(back[name], value, rtol=0, atol=0 if exact else 1e-6)
    if format in ARCHITECTURES:
        assert torch.equal(there["model.norm.weight"], values[LAST_NORM] * (0.75 if variant == "under muP" else 1))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**hf_config(recipe, format)))
        wanted = {in_files(name): tensor.shape for name, tensor in model.named_parameters()}
        assert {name: tensor.shape for name, tensor in tensors.items()} == wanted


def in_files(name: str) -> str:
    return next((name.replace(*names) for names in IN_FILES.items() if name.endswith(names[0])), name)


@pytest.mark.parametrize(("format", "variant"), [("reference", "reference"), ("transxssm", "jamba")])
def test_a_plan_goes_through_the_model_in_order(format: str, variant: str) -> None:
    shapes = model_shapes(load(variant))
    groups = plan(format, shapes)
    places = [list(shapes).index(group.megatron[0]) for group in groups if group.megatron]
    assert places == sorted(places)
    layers = [layer_of(group.hf[0]) for group in groups]
    assert layers[0] is None, "the embedding"
    inner = [layer for layer in layers[1:] if layer is not None]
    assert inner == sorted(inner) and set(inner) == set(range(8))
    assert layers[1:] == [*inner, None] + ([] if "output_layer.weight" not in shapes else [None])
    with_ones = [n for n, group in enumerate(groups) if not group.megatron]
    assert len(with_ones) == (16 if format == "reference" else 0)
    for n in with_ones:
        rest = [group for group in groups[n + 1 :] if layer_of(group.hf[0]) == layers[n]]
        assert not any(group.megatron for group in rest), "at their layer's end"


def test_a_table_that_lacks_a_tensor_is_no_plan() -> None:
    shapes = model_shapes(load("transxssm"))
    with pytest.raises(AssertionError, match="layout llama does not cover"):
        plan("llama", shapes)


def sizes_of(heads: int, groups: int, channels: int) -> ModelSizes:
    return ModelSizes("*-", 6, 10, heads, groups, channels, 16, True, None)


@pytest.mark.parametrize(("heads", "groups", "channels"), [(1, 1, 1), (4, 4, 3), (4, 1, 2), (6, 2, 5), (12, 3, 4)])
def test_qkv_there_and_back(heads: int, groups: int, channels: int) -> None:
    sizes = sizes_of(heads, groups, channels)
    whole = torch.randn((heads + 2 * groups) * channels, 6)
    parts = QKV.to_hf([whole], sizes)
    assert [len(part) for part in parts] == [heads * channels, groups * channels, groups * channels]
    assert torch.equal(QKV.from_hf(parts, sizes, [(len(whole), 6)])[0], whole)
    halves = HALVES.to_hf([whole.repeat(2, 1)], sizes)
    assert torch.equal(HALVES.from_hf(halves, sizes, [(2 * len(whole), 6)])[0], whole.repeat(2, 1))


def test_qkv_by_hand() -> None:
    """Two groups of two heads, two channels each: rows are numbered as Megatron has them."""
    whole = torch.arange(16)[:, None]
    q, k, v = QKV.to_hf([whole], sizes_of(heads=4, groups=2, channels=2))
    assert q.flatten().tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert k.flatten().tolist() == [4, 5, 12, 13]
    assert v.flatten().tolist() == [6, 7, 14, 15]


def test_gate_and_up_by_hand() -> None:
    gate, up = HALVES.to_hf([torch.arange(6)[:, None]], sizes_of(1, 1, 1))
    assert (gate.flatten().tolist(), up.flatten().tolist()) == ([0, 1, 2], [3, 4, 5])


def test_components_are_joined_in_order() -> None:
    shapes = model_shapes(load("mamba2"))
    group = next(group for group in plan("transxssm", shapes) if group.hf[0].endswith("0.mixer.in_proj.weight"))
    assert [name.rpartition(".")[2] for name in group.megatron] == ["z", "x", "B", "C", "dt"]
    parts = [torch.full(shape, float(n)) for n, shape in enumerate(group.shapes)]
    [joined] = CONCAT.to_hf(parts, sizes_of(1, 1, 1))
    # 8 heads of 12 channels, 2 groups of 20 states.
    assert joined[:, 0].tolist() == [0.0] * 96 + [1.0] * 96 + [2.0] * 40 + [3.0] * 40 + [4.0] * 8


def test_rates_that_let_a_state_grow_are_refused() -> None:
    sizes, logs = sizes_of(1, 1, 1), torch.tensor([-3.0, 0.0, 2.5])
    [rates] = DECAY_RATE.to_hf([logs], sizes)
    torch.testing.assert_close(rates, torch.tensor([-0.049787067, -1.0, -12.182494]))
    torch.testing.assert_close(DECAY_RATE.from_hf([rates], sizes, [(3,)])[0], logs)
    for wrong in (0.0, 1.0, torch.nan):
        with pytest.raises(ValueError, match="states that grow"):
            DECAY_RATE.from_hf([torch.tensor([-1.0, wrong])], sizes, [(2,)])


def test_files_are_filled_in_order() -> None:
    rows = (1, 2, 9, 1, 3)
    groups = tuple(Group((f"t{n}",), (f"t{n}",), SAME, ((n, 10),)) for n in rows[:3])
    groups += (Group(("t1b", "t3"), ("t1b", "t3"), SAME, ((1, 10), (3, 10))),)
    names = ("t1", "t2", "t9", "t1b", "t3")
    tensors = {name: torch.empty(n, 10, dtype=torch.bfloat16) for name, n in zip(names, rows, strict=True)}
    nothing: Any = None
    export = Export(nothing, "megatron", "bf16")
    # In place of what it would derive from a checkpoint.
    vars(export).update(groups=groups, tensors=tensors)
    files = split_files(export, 100)
    assert list(files) == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    held = [[name for group in file for name in group.hf] for file in files.values()]
    assert held == [["t1", "t2"], ["t9"], ["t1b", "t3"]], "a group too large has a file of its own"
    assert split_files(export, 320) == {"model.safetensors": list(groups)}
    assert len(split_files(export, 319)) == 2
