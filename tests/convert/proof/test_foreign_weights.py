"""Weights from elsewhere: other dtypes, stock classes without a cache, folders that hold code."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

from megatron_txssm.checkpoint.saved_model import open_checkpoint
from megatron_txssm.convert.proof.proof import compare_tensors
from megatron_txssm.convert.proof.stepping import HfText
from megatron_txssm.convert.proof.worker import run_task
from megatron_txssm.errors import UserError
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.recipe import Recipe
from tests.convert.untrained import make_run


@dataclass(frozen=True)
class InMemory:
    """Weights, as `compare_tensors` takes them."""

    tensors: dict[str, torch.Tensor]
    recipe: Recipe

    def dtype(self, name: str) -> Any:
        return self.tensors[name].dtype

    def read(self, names: Iterable[str]) -> dict[str, Any]:
        return {name: self.tensors[name] for name in names}


@pytest.mark.parametrize("fine", [torch.float32, torch.float16], ids=str)
def test_what_bf16_rounded_is_compared_in_bf16(fine: torch.dtype) -> None:
    recipe = load_recipe("transxssm_320m")
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(fine)
    stored, rounded = InMemory({"w": values}, recipe), InMemory({"w": values.bfloat16()}, recipe)
    for a, b in ((stored, rounded), (rounded, stored)):
        found = compare_tensors(a, b, ["w"])
        assert not found.different and found.rounded == 1
    rounded.tensors["w"][3] *= 1.01
    assert list(compare_tensors(stored, rounded, ["w"]).different) == ["w"]


@pytest.mark.parametrize("layers", [["linear_attention"] * 2, ["linear_attention", "full_attention"]])
@torch.inference_mode()
def test_a_stock_model_decodes_with_and_without_a_cache(layers: list[str]) -> None:
    torch.manual_seed(0)
    config = GraniteMoeHybridConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        layer_types=layers,
        num_attention_heads=2,
        shared_intermediate_size=24,
        num_local_experts=0,
        mamba_n_heads=4,
        mamba_expand=1,
        mamba_d_state=8,
        use_cache="full_attention" in layers,
    )
    model = GraniteMoeHybridForCausalLM(config).eval()
    tokens = torch.randint(50, (20,), generator=torch.Generator().manual_seed(0)).tolist()
    text = HfText(model)
    steps = [text.next_logits(tokens[:12]), *(text.next_logits([token]) for token in tokens[12:])]
    expected = model(torch.tensor([tokens]), use_cache=False).logits[0, 11:]
    torch.testing.assert_close(torch.stack(steps), expected, rtol=0, atol=1e-5)


def test_code_in_the_current_folder_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who converts `.` stands in the downloaded folder; the worker's imports must not find its files."""
    for name in ("json", "torch", "transformers", "subprocess"):
        (tmp_path / f"{name}.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        run_task("hf_logits", folder=".", recipe=None, tokens=[1], decoded=1, round_to=None, out="out")
    assert not (tmp_path / "ran").exists()


def test_a_release_is_what_the_tracker_calls_one(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    checkpoints = run / "checkpoints"
    (checkpoints / "iter_0000001").rename(checkpoints / "release")
    (checkpoints / "iter_0000002").rename(checkpoints / "iter_0000000")
    tracker = checkpoints / "latest_checkpointed_iteration.txt"
    for said, folder in (("release", "release"), ("0", "iter_0000000")):
        tracker.write_text(said)
        assert open_checkpoint(run).folder.name == folder
