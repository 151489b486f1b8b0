"""Stock Megatron-LM: a script that knows only the name of our stack spec."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_txssm.model import stock
from megatron_txssm.platform import prepare_platform
from tests.support.ranks import run_ranks

# Does what pretrain_hybrid.py does, on Megatron's mock data, and records the resulting model and its losses.
SCRIPT = """
import json
import sys

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.utils import unwrap_model
from megatron.training import get_args, get_tokenizer, pretrain
from megatron.training.argument_utils import hybrid_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args

seen = {"losses": []}


def provider(num_samples, vp_stage=None):
    args = get_args()
    config = GPTDatasetConfig(
        random_seed=args.seed, sequence_length=args.seq_length, split="1,0,0", tokenizer=get_tokenizer(),
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
    )
    return BlendedMegatronDatasetBuilder(MockGPTDataset, num_samples, lambda: True, config).build()


def loss_func(mask, losses):
    loss = (losses.view(-1) * mask.view(-1)).sum()
    seen["losses"].append(loss.item() / mask.sum().item())
    return loss, mask.sum().int(), {"lm loss": torch.stack([loss.detach(), mask.sum()])}


def forward_step(iterator, model):
    whole = unwrap_model(model)
    depths = [depth.mtp_model_layer.layers for depth in whole.mtp.layers] if whole.mtp_process else []
    mixers, *of_depths = [
        [getattr(layer, "mixer", None) or layer.self_attention for layer in layers]
        for layers in [whole.decoder.layers, *depths]
    ]
    seen["layers"], *seen["depths"] = [[type(mixer).__name__ for mixer in some] for some in [mixers, *of_depths]]
    seen["position_encoding"] = [m.state_space.position_encoding for m in mixers if hasattr(m, "state_space")]
    batch = next(iterator)
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return output, lambda losses: loss_func(batch["loss_mask"], losses)


if __name__ == "__main__":
    args = parse_and_validate_args()
    config = hybrid_config_from_args(args)
    pretrain(pretrain_cfg_container_from_args(args, config), provider, ModelType.encoder_or_decoder, forward_step)
    with open(__file__.replace("pretrain_hybrid.py", "seen.json"), "w") as file:
        json.dump(seen, file)
"""

SPEC = ["--spec", "megatron_txssm.model.layer_specs", "transxssm_stack_spec"]
OPTIONS = {
    "hybrid-layer-pattern": "M-M-M-M-M-M-M-*-",
    "hidden-size": 32,
    "num-attention-heads": 4,
    "ffn-hidden-size": 48,
    "mamba-state-dim": 8,
    "mamba-head-dim": 8,
    "mamba-num-groups": 2,
    "normalization": "RMSNorm",
    "position-embedding-type": "rope",
    "seq-length": 32,
    "max-position-embeddings": 32,
    "tokenizer-type": "NullTokenizer",
    "vocab-size": 63,
    "split": "1,0,0",
    "micro-batch-size": 1,
    "global-batch-size": 2,
    "train-iters": 2,
    "eval-iters": 0,
    "eval-interval": 10,
    "log-interval": 1,
    "lr": 1e-3,
}
FLAGS = ["--swiglu", "--disable-bias-linear", "--mock-data", "--no-create-attention-mask-in-dataloader"]
ARGUMENTS = [*SPEC, *FLAGS, *(word for name, value in OPTIONS.items() for word in (f"--{name}", str(value)))]


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "pretrain_hybrid.py"
    path.write_text(SCRIPT)
    return path


def test_our_arguments_reach_the_model_through_the_wrapper(script: Path) -> None:
    ours = ["--position-encoding", "a_t", "--hybrid-layer-pattern", "M-*-M-*-M-*-M-*-"]
    done = subprocess.run(
        [sys.executable, "-m", "megatron_txssm.model.stock", str(script), *ARGUMENTS, *ours],
        env={**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    seen = json.loads(script.with_name("seen.json").read_text())
    assert seen["layers"] == ["StateSpaceMixer", "IdentityOp", "UnifiedRotarySelfAttention", "IdentityOp"] * 4
    assert seen["position_encoding"] == ["a_t"] * 4
    # Two iterations of two micro-batches, each near ln(64) = 4.16 for 64 words.
    assert len(seen["losses"]) == 4 and all(3 < loss < 6 for loss in seen["losses"])


def run_stock(path: str, arguments: list[str]) -> None:
    import runpy

    from megatron_txssm import compat

    # A Megatron-LM checkout has the Makefile that the wheel lacks; the stack spec applies our other patches.
    compat._use_compiled_dataset_helpers()
    sys.argv = [path, *arguments, *prepare_platform()]
    runpy.run_path(path, run_name="__main__")


def test_without_the_wrapper_our_defaults_hold(script: Path, tmp_path: Path) -> None:
    saving = ["--bf16", "--save", str(tmp_path / "saved"), "--save-interval", "2", "--ckpt-format", "torch_dist"]
    depths = ["--hybrid-layer-pattern", f"{OPTIONS['hybrid-layer-pattern']}/*-M-"]
    run_ranks(run_stock, 1, tmp_path / "ranks", str(script), [*ARGUMENTS, *saving, *depths])
    assert (tmp_path / "saved" / "latest_checkpointed_iteration.txt").read_text() == "2"
    seen = json.loads(script.with_name("seen.json").read_text())
    assert seen["layers"] == ["StateSpaceMixer", "IdentityOp"] * 7 + ["UnifiedRotarySelfAttention", "IdentityOp"]
    assert seen["position_encoding"] == ["rope"] * 7
    assert seen["depths"] == [["UnifiedRotarySelfAttention", "IdentityOp", "StateSpaceMixer", "IdentityOp"]]
    assert len(seen["losses"]) == 4 and all(3 < loss < 6 for loss in seen["losses"])


@pytest.mark.parametrize("argv", [[], ["missing.py"]], ids=["no script", "missing script"])
def test_a_wrong_command_line_ends_with_its_usage(
    argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["stock", *argv])
    with pytest.raises(SystemExit) as stop:
        stock.main()
    assert stop.value.code == 2
    assert stock.USAGE in capsys.readouterr().err


def test_what_only_our_loop_obeys_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Otherwise a run would train on documents that leak into each other."""
    script = tmp_path / "pretrain_hybrid.py"
    script.touch()
    monkeypatch.setattr(sys, "argv", ["stock", str(script), "--isolate-documents"])
    with pytest.raises(SystemExit) as stop:
        stock.main()
    assert stop.value.code == 2
    assert "--isolate-documents only works with `txssm pretrain`" in capsys.readouterr().err
