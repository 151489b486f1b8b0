"""From Megatron's checkpoints to transformers and back: the same bits, the same logits, the same gradients."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GraniteMoeHybridForCausalLM, LlamaForCausalLM

from megatron_txssm.checkpoint.saved_model import open_checkpoint
from megatron_txssm.checkpoint.tensors import EMBEDDING, OUTPUT_LAYER
from megatron_txssm.cli.main import main
from megatron_txssm.convert.formats.mapping import TABLES
from megatron_txssm.convert.huggingface.folder import open_hf_folder
from megatron_txssm.convert.huggingface.model import load_hf_model
from megatron_txssm.convert.importer import _as_yaml
from megatron_txssm.convert.proof.proof import compare_tensors, sample_text
from megatron_txssm.convert.proof.worker import megatron_logits, save_megatron
from megatron_txssm.data.tokenizer.sentencepiece import load_tokenizer
from megatron_txssm.errors import UserError
from megatron_txssm.hf import TransXSSMForCausalLM
from megatron_txssm.model.state_space_parameters import FP32_PARAMETERS
from megatron_txssm.recipe.loader import load_recipe
from tests.convert.gradients import megatron_gradients
from tests.convert.trained import Trained, matrix, reference, train, with_experts
from tests.support.megatron_tasks import Task, run_tasks

pytestmark = pytest.mark.slow

TOKENS, DECODED = 512, 32
MATRIX = [model.name for model in (*matrix(Path()), *with_experts(Path()))]
# (trained model, format); None: the one that an export takes by itself.
EXPORTS: list[tuple[str, str | None]] = [
    *((name, None) for name in MATRIX),
    *((name, "granitemoehybrid") for name in MATRIX if name.startswith(("mamba2", "jamba"))),
    ("reference", "reference"),
    ("transxssm_tp2pp2", "megatron"),
]
CLASSES: dict[str | None, type] = {"llama": LlamaForCausalLM, "granitemoehybrid": GraniteMoeHybridForCausalLM}
on_every_export = pytest.mark.parametrize(("name", "format"), EXPORTS, ids=str)
on_every_model = pytest.mark.parametrize("name", MATRIX)


@dataclass(frozen=True)
class Converted:
    """Trained models, their exports, checkpoints made of these, and what Megatron computes with the trained ones."""

    folder: Path
    models: dict[str, Trained]
    tokens: list[int]

    def exported(self, name: str, format: str | None = None) -> Path:
        return self.folder / "exports" / f"{name}_{format}"

    def imported(self, name: str, format: str | None = None) -> Path:
        return self.folder / "imports" / f"{name}_{format}"

    def result(self, name: str, what: str) -> Path:
        return self.folder / f"{name}.{what}"


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    folder = tmp_path_factory.mktemp("converted")
    models = {model.name: model for model in (*matrix(folder), *with_experts(folder), reference(folder))}
    train(list(models.values()), folder)
    tokenizer = load_tokenizer(models[MATRIX[0]].checkpoints / "tokenizer" / "tokenizer.model")
    made = Converted(folder, models, tokenizer.EncodeAsIds(sample_text())[:TOKENS])
    tasks: list[Task] = []
    for name, format in EXPORTS:
        export(made, name, format)
        out = made.imported(name, format)
        out.mkdir(parents=True)
        recipe = out / "recipe.yaml"
        recipe.write_text(_as_yaml(load_recipe(made.exported(name, format) / "recipe.yaml")))
        tasks.append(
            (save_megatron, {"folder": str(made.exported(name, format)), "recipe": str(recipe), "out": str(out)})
        )
    for name, model in models.items():
        common = {"checkpoints": str(model.checkpoints), "step": 2, "tokens": made.tokens}
        rest = {"decoded": DECODED, "round_to": None, "out": str(made.result(name, "logits"))}
        tasks.append((megatron_logits, common | rest))
        tasks.append((megatron_gradients, common | {"out": str(made.result(name, "gradients"))}))
    run_tasks(1, tasks, folder / "computed")
    return made


def export(converted: Converted, name: str, format: str | None, *options: str, out: Path | None = None) -> Path:
    out = out or converted.exported(name, format)
    words = ["convert", "export", str(converted.models[name].run), str(out), "--no-verify", *options]
    assert main([*words, *(["--layout", format] if format else [])]) == 0
    return out


@on_every_export
def test_every_tensor_comes_back_bit_for_bit(converted: Converted, name: str, format: str | None) -> None:
    old = open_checkpoint(converted.models[name].run)
    new = open_checkpoint(converted.imported(name, format))
    assert old.step == 2 and new.step == 0, "a release"
    before, after = old.read(old.shapes), new.read(new.shapes)
    assert before.keys() == after.keys()
    for tensor, value in before.items():
        assert after[tensor].dtype == value.dtype == torch.float32, tensor
        if format == "reference" and tensor.endswith(".A_log"):
            torch.testing.assert_close(after[tensor], value, rtol=1e-6, atol=0)
        else:
            assert torch.equal(after[tensor], value), tensor


@on_every_export
def test_padding_rows_come_back_as_the_mean(converted: Converted, name: str, format: str | None) -> None:
    new = open_checkpoint(converted.imported(name, format))
    size = converted.models[name].vocab_size
    for tensor in {EMBEDDING, OUTPUT_LAYER} & set(new.entries):
        assert new.entries[tensor].size[0] == 304
        whole = replace(new, shapes=new.shapes | {tensor: tuple(new.entries[tensor].size)}).read([tensor])[tensor]
        expected = whole[:size].mean(0).expand(304 - size, -1)
        torch.testing.assert_close(whole[size:], expected, rtol=0, atol=1e-7)


@on_every_export
@torch.inference_mode()
def test_transformers_gives_megatrons_logits(converted: Converted, name: str, format: str | None) -> None:
    """fp32, in one pass and token by token."""
    expected = load_file(converted.result(name, "logits"))
    folder = converted.exported(name, format)
    if format in ("reference", "megatron"):
        # transformers has no class for them.
        model = load_hf_model(open_hf_folder(folder))
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
        stock = format or ("llama" if name.startswith("llama3") else None)
        assert type(model) is CLASSES.get(stock, TransXSSMForCausalLM)
    tokens_BL = torch.tensor([converted.tokens])
    full_LV = model(tokens_BL, use_cache=False).logits[0]
    assert expected["full"].std() > 0.1 and full_LV.shape == (TOKENS, converted.models[name].vocab_size)
    assert difference(full_LV, expected["full"]) <= 1e-5
    assert difference(decoded(model, tokens_BL), expected["decoded"]) <= 1e-5
    assert difference(expected["decoded"], expected["full"][-DECODED:]) <= 1e-5


def decoded(model: Any, tokens_BL: torch.Tensor) -> torch.Tensor:
    """Logits of the last tokens, one at a time behind a pass over the others."""
    assert model.config.use_cache or (model.config.model_type == "granitemoehybrid" and not has_attention(model))
    if not model.config.use_cache:
        # transformers' cache fails without attention; generate() must not.
        ids_BL = model.generate(tokens_BL[:, :8], max_new_tokens=2, do_sample=False)
        assert ids_BL.shape == (1, 10)
        ends = range(TOKENS - DECODED, TOKENS)
        return torch.stack([model(tokens_BL[:, : end + 1], use_cache=False).logits[0, -1] for end in ends])
    cache, steps = model(tokens_BL[:, :-DECODED], use_cache=True).past_key_values, []
    for token in tokens_BL[0, -DECODED:]:
        output = model(token[None, None], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits[0, -1])
    return torch.stack(steps)


def has_attention(model: Any) -> bool:
    return "full_attention" in model.config.layer_types


@on_every_model
def test_every_gradient_is_megatrons(converted: Converted, name: str) -> None:
    """Of the mean loss over 512 tokens; fp32, by the norm of each tensor's difference."""
    source = open_hf_folder(converted.exported(name))
    model = AutoModelForCausalLM.from_pretrained(source.folder)
    tokens_BL = torch.tensor([converted.tokens])
    model(tokens_BL, labels=tokens_BL, use_cache=False).loss.backward()
    ours = {parameter: tensor.grad for parameter, tensor in model.named_parameters() if tensor.grad is not None}
    found: dict[str, torch.Tensor] = {}
    for group in set(source.groups.values()):
        # Gradients move as the tensors do: all that these formats do is cut and join.
        found |= group.from_hf(ours, source.recipe.sizes)
    # Except that the gradient of what is multiplied is multiplied where the tensor is divided.
    found["decoder.final_norm.weight"] *= source.recipe.sizes.logits_multiplier**2
    expected = load_file(converted.result(name, "gradients"))
    assert found.keys() == expected.keys() == source.shapes.keys()
    for tensor, gradient in expected.items():
        padding = gradient[len(found[tensor]) :]
        assert not padding.any()
        assert gradient.norm() > 1e-6, f"{tensor} has no gradient"
        error = (found[tensor] - gradient[: len(found[tensor])]).norm() / gradient.norm()
        assert error <= 1e-5, f"{tensor}: {error:.1e}"


@pytest.mark.parametrize(
    ("name", "megatron", "order"),
    [
        ("llama3_tp2", "linear_qkv.weight", [0, 2, 1]),
        ("jamba_tp2", "linear_qkv.weight", [0, 2, 1]),
        ("transxssm_tp2", "mlp.linear_fc1.weight", [1, 0]),
        ("jamba_experts_tp1", "shared_experts.linear_fc1.weight", [1, 0]),
    ],
)
@torch.inference_mode()
def test_what_is_wrong_both_ways_shows_in_the_logits(
    converted: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, megatron: str, order: list[int]
) -> None:
    """Keys for values, the gate for the up-projection: the same bits come back."""
    format = "llama" if name.startswith("llama3") else "transxssm"
    rows = [
        replace(row, hf=tuple(row.hf[n] for n in order)) if row.megatron[0].endswith(megatron) else row
        for row in TABLES[format]
    ]
    monkeypatch.setitem(TABLES, format, tuple(rows))
    out = export(converted, name, None, out=tmp_path / "out")
    source, saved = open_hf_folder(out), open_checkpoint(converted.models[name].run)
    assert not compare_tensors(saved, source, list(saved.shapes)).different
    logits = AutoModelForCausalLM.from_pretrained(out)(torch.tensor([converted.tokens])).logits[0]
    assert difference(logits, load_file(converted.result(name, "logits"))["full"]) > 1e-3


@pytest.mark.parametrize("name", ["transxssm_tp2", "mamba2_tp2pp2"])
def test_bf16_keeps_what_decays_in_fp32(converted: Converted, name: str, tmp_path: Path) -> None:
    out = export(converted, name, None, "--dtype", "bf16", out=tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (converted.exported(name), out))
    kept = {tensor for tensor in before if tensor.rpartition(".")[2] in FP32_PARAMETERS}
    assert len(kept) == (4 * 3 if name.startswith("mamba2") else 3 * 2)
    assert before.keys() == after.keys()
    for tensor, value in before.items():
        expected = value if tensor in kept else value.bfloat16()
        assert after[tensor].dtype == expected.dtype and torch.equal(after[tensor], expected), tensor
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


# As the authors' public code names them; @ stands for a layer.
REFERENCE_NAMES = {
    "": "model.word_embed.weight model.final_layernorm.weight",
    "SA": "@.pre_sequence_layernorm.weight @.pre_state_layernorm.weight @.feed_forward.gate_proj.weight "
    "@.feed_forward.up_proj.weight @.feed_forward.down_proj.weight @.post_sequence_residual.weight "
    "@.post_state_residual.weight",
    "S": "@.ssd.x_proj.weight @.ssd.b_proj.weight @.ssd.c_proj.weight @.ssd.dt_proj.weight @.ssd.out_proj.weight "
    "@.ssd.A",
    "A": "@.attn.q_proj.weight @.attn.k_proj.weight @.attn.v_proj.weight @.attn.o_proj.weight",
}


def test_the_reference_format_has_the_authors_names(converted: Converted) -> None:
    written = load_file(converted.exported("reference", "reference") / "model.safetensors")
    names = set(REFERENCE_NAMES[""].split())
    for layer, kind in enumerate("SSSSSSSA"):
        for kinds in ("SA", kind):
            names |= set(REFERENCE_NAMES[kinds].replace("@", f"model.layers.{layer}").split())
    assert written.keys() == names
    saved = open_checkpoint(converted.models["reference"].run)
    for layer in range(7):
        a_log = f"decoder.layers.{2 * layer}.mixer.A_log"
        assert torch.equal(written[f"model.layers.{layer}.ssd.A"], -saved.read([a_log])[a_log].exp())
        for residual in ("post_sequence_residual", "post_state_residual"):
            assert torch.equal(written[f"model.layers.{layer}.{residual}.weight"], torch.ones(32))


def grow(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.3.ssd.A"][1] = 0


def scale(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.7.post_state_residual.weight"][5] = 1.01


@pytest.mark.parametrize(
    ("change", "wanted"), [(grow, r"layers\.3\.ssd\.A holds rates of 0"), (scale, r"layers\.7\.post_state_.*than one")]
)
def test_what_our_layers_cannot_express_is_refused(
    converted: Converted, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], wanted: str
) -> None:
    source = converted.exported("reference", "reference")
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=wanted):
        opened = open_hf_folder(tmp_path, load_recipe(source / "recipe.yaml"))
        opened.read(opened.shapes)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest; NaN where there is one."""
    assert a.shape == b.shape
    return (a - b).abs().max().item()
