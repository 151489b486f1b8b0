"""save_pretrained and from_pretrained: the same logits for every way of storing and placing the weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from megatron_txssm.hf import TransXSSMForCausalLM, TransXSSMModel
from megatron_txssm.hf.standalone import AUTO_MAP, code_files
from tests.hf.tiny import VARIANTS, VOCABULARY, generate, random_ids, tiny_config, tiny_model

variants = pytest.mark.parametrize("variant", VARIANTS)
tied = pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
FP32 = ("A_log", "dt_bias", "D")


@variants
@tied
def test_a_saved_model_loads_with_the_same_bits(variant: str, tie: bool, tmp_path: Path) -> None:
    model, ids = tiny_model(variant, tie_word_embeddings=tie), random_ids(2, 20)
    model.save_pretrained(tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) is not tie
    answer: Any = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    loaded, report = answer
    assert type(loaded) is TransXSSMForCausalLM
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tie


@variants
def test_shards_load_with_the_same_bits(variant: str, tmp_path: Path) -> None:
    model, ids = tiny_model(variant), random_ids(2, 20)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert torch.equal(TransXSSMForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def test_the_model_without_its_head_loads_from_the_whole(tmp_path: Path) -> None:
    model, ids = tiny_model(), random_ids(2, 20)
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is TransXSSMModel
    assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)


@variants
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_sets_the_decay_stays_fp32(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """When a model is loaded in half precision, and when that model is saved and loaded again."""
    model = tiny_model(variant)
    model.save_pretrained(tmp_path / "fp32")
    half = TransXSSMForCausalLM.from_pretrained(tmp_path / "fp32", dtype=dtype)
    half.save_pretrained(tmp_path / "half")
    again = TransXSSMForCausalLM.from_pretrained(tmp_path / "half")
    exact = dict(model.named_parameters())
    for loaded in (half, again):
        for name, parameter in loaded.named_parameters():
            keeps = name.rpartition(".")[2] in FP32
            assert parameter.dtype == (torch.float32 if keeps else dtype), name
            assert torch.equal(parameter, exact[name].to(parameter.dtype))
    ids = random_ids(2, 20)
    logits = half(ids).logits
    assert logits.dtype == dtype and torch.equal(again(ids).logits, logits)
    tokens = generate(half, ids, max_new_tokens=5)
    assert tokens.shape == (2, 25)
    assert (logits.float() - model(ids).logits).norm() < 0.05 * model(ids).logits.norm()


@pytest.mark.parametrize("cast", ["from_config", "to", "bfloat16"])
def test_what_sets_the_decay_stays_fp32_however_a_model_is_cast(cast: str) -> None:
    """from_pretrained's list of fp32 modules is ignored by from_config and by later casts."""
    if cast == "from_config":
        model = AutoModelForCausalLM.from_config(tiny_config("mamba2"), dtype=torch.bfloat16)
    else:
        model: Any = tiny_model("mamba2")
        model = model.to(torch.bfloat16) if cast == "to" else model.bfloat16()
    for name, parameter in model.named_parameters():
        expected = torch.float32 if name.rpartition(".")[2] in FP32 else torch.bfloat16
        assert parameter.dtype == expected, name
    assert {parameter.dtype for parameter in model.double().parameters()} == {torch.float64}


def test_the_code_is_saved_beside_the_weights(tmp_path: Path) -> None:
    """Also when this package's class loads a model from such a folder and saves it elsewhere."""
    model = tiny_model()
    for folder in (tmp_path / "first", tmp_path / "again"):
        model.save_pretrained(folder)
        assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP
        assert {name: (folder / name).read_text() for name in code_files()} == code_files()
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert type(model) is TransXSSMForCausalLM


@pytest.mark.parametrize(
    "options",
    [
        {"device_map": "auto"},
        {"device_map": "cpu"},
        {"device_map": {"": "cpu"}},
        # Layers on disk get hooks that move every input to where the layer runs.
        {"device_map": {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu"}},
    ],
    ids=["auto", "cpu", "all on cpu", "layers on disk"],
)
@variants
def test_device_maps_load_the_same_model(variant: str, options: dict[str, Any], tmp_path: Path) -> None:
    model, ids = tiny_model(variant, tie_word_embeddings=False), random_ids(2, 20)
    model.save_pretrained(tmp_path)
    device_map = options["device_map"]
    if isinstance(device_map, dict) and "" not in device_map:
        layers = {f"model.layers.{index}": "disk" if index % 2 else "cpu" for index in range(3)}
        device_map = {**device_map, **layers}
    loaded = TransXSSMForCausalLM.from_pretrained(
        tmp_path, device_map=device_map, offload_folder=tmp_path / "offloaded", max_memory={"cpu": "1GB"}
    )
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert torch.equal(generate(loaded, ids, max_new_tokens=5), generate(model, ids, max_new_tokens=5))


def test_a_model_is_made_without_memory() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("jamba"))
    assert type(model) is TransXSSMForCausalLM
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not list(model.buffers())


@tied
@pytest.mark.parametrize("size", [VOCABULARY + 20, VOCABULARY - 40])
def test_the_vocabulary_can_be_resized(tie: bool, size: int, tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=tie)
    ids = random_ids(2, 20) % (VOCABULARY - 40)
    before = model(ids).logits
    model.resize_token_embeddings(size, mean_resizing=False)
    assert model.config.vocab_size == size
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tie
    after = model(ids, labels=ids)
    both = min(size, VOCABULARY)
    torch.testing.assert_close(after.logits[..., :both], before[..., :both], rtol=0, atol=1e-6)
    assert after.logits.shape[-1] == size and torch.isfinite(after.loss)
    model.save_pretrained(tmp_path)
    assert torch.equal(TransXSSMForCausalLM.from_pretrained(tmp_path)(ids).logits, after.logits)
