"""A TransXSSM begun from a Llama: what its layers compute, its checkpoint, and what cannot become one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

from megatron_txssm.checkpoint.saved_model import open_checkpoint
from megatron_txssm.cli.main import main
from megatron_txssm.convert.formats.config import hf_config
from megatron_txssm.convert.from_transformer import FromTransformer, transxssm_of
from megatron_txssm.convert.huggingface.folder import open_hf_folder
from megatron_txssm.hf import TransXSSMConfig, TransXSSMForCausalLM
from megatron_txssm.ops.rotary import apply_rotary
from megatron_txssm.ops.ssd_reference import ssd_reference
from megatron_txssm.ops.unified_rope import UnifiedRotaryEmbedding
from megatron_txssm.recipe.loader import load_recipe

HEADS, GROUPS, CHANNELS, HIDDEN, BASE = 4, 2, 16, 48, 5_000


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers; two query heads share a key; all heads together are wider than the model."""
    folder = tmp_path_factory.mktemp("hf") / "small-llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        head_dim=CHANNELS,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": float(BASE)},
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_state_space_layer_without_decay_is_attention_without_softmax(llama: Path) -> None:
    opened = open_hf_folder(llama)
    source = FromTransformer(opened, transxssm_of(opened.recipe))
    length = 9
    h_BLD = torch.randn(1, length, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    # transformers' attention, without its softmax.
    model: Any = LlamaForCausalLM.from_pretrained(llama, dtype=torch.float64)
    attention = model.model.layers[1].self_attn
    q, k, v = (
        projection(h_BLD).unflatten(-1, (-1, CHANNELS)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    q, k = apply_rotary_pos_emb(q, k, *model.model.rotary_emb(h_BLD, torch.arange(length)[None]))
    k, v = repeat_kv(k, HEADS // GROUPS), repeat_kv(v, HEADS // GROUPS)
    scores = (q @ k.mT / CHANNELS**0.5).tril()
    expected = attention.o_proj((scores @ v).transpose(1, 2).flatten(2))

    names = [f"decoder.layers.2.mixer.{name}.weight" for name in ("in_proj", "out_proj")]
    parts = {part: f"{names[0]}.{part}" for part in ("x", "B", "C")}
    tensors = {name: tensor.double() for name, tensor in source.read([*parts.values(), names[1]]).items()}
    x, B, C = ((h_BLD @ tensors[name].T).unflatten(-1, (HEADS, CHANNELS)) for name in parts.values())
    cos_LR, sin_LR = UnifiedRotaryEmbedding(base=BASE).cos_sin(length, CHANNELS)
    B, C = (apply_rotary(tensor, cos_LR, sin_LR) for tensor in (B, C))
    ones = torch.ones(1, length, HEADS, dtype=torch.float64)
    y_BLHP, _ = ssd_reference(x, ones, torch.zeros(HEADS, dtype=torch.float64), B, C)
    torch.testing.assert_close(y_BLHP.flatten(2) @ tensors[names[1]].T, expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_the_checkpoint_holds_the_transformers_weights(
    llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "started"
    assert main(["convert", "import", str(llama), str(out), "--as", "transxssm"]) == 0
    said = capfd.readouterr().out
    assert f"txssm pretrain {out / 'recipe.yaml'} --set checkpoint.load_from={out}" in said
    found = json.loads((out / "verification.json").read_text())
    assert found["passed"] and found["logits"] is None and found["tensors"]["different"] == {}

    recipe = load_recipe(out / "recipe.yaml")
    # The last of fewer than eight blocks keeps its attention.
    assert recipe.layers == "M-M-*-" and recipe.name == "small-llama_transxssm"
    saved, transformer = open_checkpoint(out), open_hf_folder(llama)
    copied = [name for name in saved.shapes if ".mixer." not in name]
    for name, tensor in transformer.read(copied).items():
        # The recipe trains in bf16.
        assert torch.equal(saved.read([name])[name], tensor.bfloat16()), name
    new = saved.read(name for name in saved.shapes if name.endswith(("A_log", "dt_bias", "in_proj.weight.dt")))
    # As a new model's, of two layers: arXiv:2405.21060.
    for layer in (0, 2):
        mixer = f"decoder.layers.{layer}.mixer"
        A, dt = new[f"{mixer}.A_log"].exp(), F.softplus(new[f"{mixer}.dt_bias"])
        assert ((A >= 1) & (A <= 16)).all() and ((dt > 0.9e-3) & (dt < 0.11)).all()
        assert new[f"{mixer}.in_proj.weight.dt"].std().item() == pytest.approx(0.2, rel=0.3)
    assert len(new) == 6
    assert len(found["tensors"]["sha256"]) == len(saved.shapes) - len(new)


@pytest.mark.parametrize(("blocks", "kept"), [(2, [1]), (7, [6]), (8, [7]), (12, [7]), (24, [7, 15, 23])])
def test_where_attention_stays(blocks: int, kept: list[int]) -> None:
    recipe = transxssm_of(load_recipe("llama3_320m", [f"model.layer_pattern={'*-' * blocks}"]))
    assert [block for block in range(blocks) if recipe.layers[2 * block] == "*"] == kept
    state = recipe.state_space
    assert state is not None and recipe.sizes.num_attention_heads == state.num_groups == state.num_heads


def test_another_model_cannot_become_one(llama: Path, tmp_path: Path, refused: Callable[..., None]) -> None:
    config: dict[str, Any] = hf_config(load_recipe("transxssm_320m"), "transxssm")
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 100}
    folder = tmp_path / "hybrid"
    TransXSSMForCausalLM(TransXSSMConfig(**config | sizes)).save_pretrained(folder)
    words = ["convert", "import", folder, tmp_path / "out", "--as", "transxssm"]
    refused(words, ["--as transxssm: hybrid has layers M-M-", "only a Transformer can become one"])
