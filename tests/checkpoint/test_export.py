"""txssm convert export: the weights of a sharded checkpoint, bit for bit, or one message and nothing written."""

import errno
import hashlib
import json
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_txssm.checkpoint.convert_command import complete_folder, progress_bar
from megatron_txssm.checkpoint.export import KEPT_IN_FP32, Tensor, export, open_checkpoint, split_files
from megatron_txssm.cli import main
from megatron_txssm.errors import UserError
from megatron_txssm.model.state_space_mixer import FP32_PARAMETERS
from megatron_txssm.planning.parameters import count_parameters
from megatron_txssm.recipe.loader import load_recipe
from tests.data.corpus_fixture import make_corpus, random_documents
from tests.training.tiny_run import ENVIRONMENT, txssm

# Every tensor there is: gate, convolution, grouped queries, an LM head of its own; 3 rows of padding.
RECIPE = """\
name: exported
run_directory: {folder}/run
model:
  num_layers: 4
  layer_pattern: SA
  hidden_size: 32
  ffn_hidden_size: 48
  num_attention_heads: 4
  num_query_groups: 2
  state_size: 16
  state_head_dim: 16
  state_num_groups: 2
  state_gated: true
  position_encoding: conv1d_d
  chunk_size: 16
  tie_embeddings: false
parallel: {parallel}
training:
  seq_length: 32
  micro_batch_size: 2
  global_batch_tokens: 256
  train_iters: 2
  precision: fp32
  transformer_impl: local
optimizer: {{learning_rate: 1e-2}}
data:
  corpus: {folder}/corpus
  vocab_size: 301
  make_vocab_size_divisible_by: 16
checkpoint: {{save_interval: 2}}
logging: {{log_interval: 1, eval_iters: 0, tensorboard: false}}
"""

LAYOUTS = {
    "tp2": "{tensor_model_parallel_size: 2, sequence_parallel: true, use_distributed_optimizer: true}",
    "pp2": "{pipeline_model_parallel_size: 2, virtual_pipeline_stages: 2}",
}
LOAD = """\
import sys, torch
from pathlib import Path
from megatron_txssm.checkpoint.load import load_model
checkpoints, out = map(Path, sys.argv[1:])  # Megatron's arguments take their place
state = load_model(checkpoints).model.state_dict()
torch.save({name: value for name, value in state.items() if isinstance(value, torch.Tensor)}, out)
"""


def train(folder: Path, layout: str) -> Path:
    """The run folder of two steps at a layout."""
    make_corpus(folder / "corpus", {"web": [random_documents(40, seed=0)]})
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder, parallel=LAYOUTS[layout]))
    done = txssm("pretrain", str(folder / "recipe.yaml"))
    assert done.code == 0, done.stdout + done.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run at TP=2. Copy it before changing it."""
    return train(tmp_path_factory.mktemp("tp2"), "tp2")


@pytest.fixture(scope="module")
def weights(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Its export, read back."""
    out = tmp_path_factory.mktemp("export") / "out"
    assert main(["convert", "export", str(run_folder), str(out)]) == 0
    return load_file(out / "model.safetensors")


def loaded_by_megatron(run: Path, out: Path) -> dict[str, torch.Tensor]:
    """The weights that load_model gives at TP=1, under a checkpoint's names: the layer's norms belong to the linear
    layers behind them (as in Transformer Engine), packed tensors come by component. Without padding.
    """
    script = [sys.executable, "-c", LOAD, str(run / "checkpoints"), str(out)]
    done = subprocess.run(script, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    recipe = load_recipe(run / "recipe.yaml")
    assert recipe.state_space is not None
    packed = {"in_proj.weight": recipe.state_space.in_proj_sizes}
    packed |= dict.fromkeys(("conv1d_weight", "conv1d_bias"), recipe.state_space.conv_sizes)
    expected = {}
    for name, value in torch.load(out, weights_only=True).items():
        kind = recipe.layer_kinds[int(name.split(".")[2])] if ".layers." in name else ""
        mixer = {"S": "in_proj", "A": "linear_qkv", "": ""}[kind]
        name = name.replace("input_layernorm.", f"self_attention.{mixer}.layer_norm_")
        name = name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
        sizes = next((sizes for key, sizes in packed.items() if name.endswith("self_attention." + key)), None)
        if sizes:
            parts = value.split(list(sizes.values()))
            expected |= {f"{name}.{part}": tensor for part, tensor in zip(sizes, parts, strict=True)}
        elif name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            assert len(value) == 304
            expected[name] = value[:301]
        else:
            expected[name] = value
    return expected


def check_equal(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert ours[name].dtype == value.dtype and torch.equal(ours[name], value), name


@pytest.mark.slow
def test_it_equals_the_loaded_model_bit_for_bit(
    run_folder: Path, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    expected = loaded_by_megatron(run_folder, tmp_path / "state.pt")
    check_equal(weights, expected)
    assert weights["decoder.layers.0.self_attention.in_proj.weight.B"].shape == (32, 32)
    recipe = load_recipe(run_folder / "recipe.yaml")
    assert sum(map(torch.numel, weights.values())) == count_parameters(recipe).total - 2 * 3 * 32


@pytest.mark.slow
def test_so_it_does_from_pipeline_stages(tmp_path: Path) -> None:
    run = train(tmp_path, "pp2")
    assert main(["convert", "export", str(run / "checkpoints"), str(tmp_path / "out")]) == 0
    check_equal(load_file(tmp_path / "out/model.safetensors"), loaded_by_megatron(run, tmp_path / "state.pt"))


@pytest.mark.slow
def test_several_files_and_their_index(run_folder: Path, weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    assert main(["convert", "export", str(run_folder), str(out), "--max-file-gb", "2e-5"]) == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert files == sorted(set(index["weight_map"].values()))
    read = {file: load_file(out / file) for file in files}
    check_equal({name: read[file][name] for name, file in index["weight_map"].items()}, weights)
    sizes = {file: sum(tensor.nbytes for tensor in tensors.values()) for file, tensors in read.items()}
    assert all(size <= 20_000 or len(read[file]) == 1 for file, size in sizes.items())
    assert index["metadata"]["total_size"] == sum(sizes.values()) == sum(tensor.nbytes for tensor in weights.values())
    assert sum(map(len, read.values())) == len(weights), "each tensor once"


@pytest.mark.slow
def test_bf16_keeps_what_decays_in_fp32(run_folder: Path, weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    assert KEPT_IN_FP32 == FP32_PARAMETERS
    assert main(["convert", "export", str(run_folder), str(tmp_path / "out"), "--dtype", "bf16"]) == 0
    kept = {name for name in weights if name.endswith(("A_log", "dt_bias", ".D"))}
    assert len(kept) == 2 * 3
    expected = {name: value if name in kept else value.bfloat16() for name, value in weights.items()}
    check_equal(load_file(tmp_path / "out/model.safetensors"), expected)


@pytest.mark.slow
def test_what_lies_beside_the_weights(run_folder: Path, weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["convert", "export", str(run_folder), str(out), "--step", "2"]) == 0
    assert (out / "recipe.yaml").read_bytes() == (run_folder / "checkpoints/recipe.yaml").read_bytes()
    facts = json.loads((out / "export.json").read_text())
    files = ["model.safetensors", "recipe.yaml", "tokenizer/tokenizer.model"]
    assert facts["sha256"] == {file: hashlib.sha256((out / file).read_bytes()).hexdigest() for file in files}
    assert (facts["step"], facts["layout"], facts["dtypes"]) == (2, "megatron", ["float32"])
    assert (facts["vocab_size"], facts["padding_rows_removed"]) == (301, 3)
    assert facts["parameters"] == sum(map(torch.numel, weights.values()))
    assert facts["tokenizer"] == "tokenizer/tokenizer.model"
    assert (out / "model.safetensors").stat().st_mode == (out / "recipe.yaml").stat().st_mode, "others may read it"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_of_several_tasks_one_exports(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(["convert", "export", str(run_folder), str(tmp_path / "out")]) == 0
    assert not list(tmp_path.iterdir())


def remove_a_file(run: Path) -> None:
    next(run.glob("checkpoints/iter_*/__1_0.distcp")).unlink()


def cut_a_file(run: Path) -> None:
    with next(run.glob("checkpoints/iter_*/__0_0.distcp")).open("r+b") as stream:
        stream.truncate(1000)


def overwrite_a_file(run: Path) -> None:
    file = next(run.glob("checkpoints/iter_*/__0_0.distcp"))
    file.write_bytes(bytes(file.stat().st_size))


def remove_the_index(run: Path) -> None:
    next(run.glob("checkpoints/iter_*/.metadata")).unlink()


def damage_the_index(run: Path) -> None:
    next(run.glob("checkpoints/iter_*/.metadata")).write_bytes(b"no pickle")


def remove_the_recipe(run: Path) -> None:
    (run / "checkpoints/recipe.yaml").unlink()


def remove_the_step(run: Path) -> None:
    shutil.rmtree(run / "checkpoints/iter_0000002")


def describe_more_layers(run: Path) -> None:
    file = run / "checkpoints/recipe.yaml"
    file.write_text(file.read_text().replace("num_layers: 4", "num_layers: 6"))


def remove_the_tracker(run: Path) -> None:
    (run / "checkpoints/latest_checkpointed_iteration.txt").unlink()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "wanted"),
    [
        (remove_a_file, ["__1_0.distcp is missing, one of 2 files", "copy it again"]),
        (cut_a_file, ["__0_0.distcp is cut short: 1,000 bytes of at least"]),
        (overwrite_a_file, ["iter_0000002 is damaged (", "export another step with --step"]),
        (remove_the_index, ["iter_0000002 is no whole torch_dist checkpoint", ".metadata"]),
        (damage_the_index, ["iter_0000002/.metadata is damaged ("]),
        (remove_the_recipe, ["checkpoints has no recipe.yaml"]),
        (remove_the_step, ["has no step 2, which latest_checkpointed_iteration.txt names"]),
        (describe_more_layers, ["parameters that", "recipe.yaml describes"]),
        (remove_the_tracker, ["run holds no checkpoint; name a run's folder"]),
    ],
)
def test_a_damaged_checkpoint(
    run_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    wanted: list[str],
) -> None:
    run = tmp_path / "copy" / "run"
    shutil.copytree(run_folder, run)
    damage(run)
    refused(["convert", "export", str(run), str(tmp_path / "out")], wanted, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("out", "options", "wanted"),
    [
        ("there", [], ["there exists; name another OUT"]),
        ("file/out", [], ["file cannot be written", "name another OUT"]),
        ("out", ["--step", "7"], ["has no step 7, which --step 7 names; use --step with one of 2"]),
        ("out", ["--max-file-gb", "0"], ["--max-file-gb 0 must be above 0"]),
    ],
)
def test_a_wrong_option(
    run_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    out: str,
    options: list[str],
    wanted: list[str],
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "file").touch()
    refused(["convert", "export", str(run_folder), str(tmp_path / out), *options], wanted, capsys)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "there"]


@pytest.mark.slow
def test_a_full_disk(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    command = ["convert", "export", str(run_folder), str(tmp_path / "out")]
    wanted = ["out cannot be written: No space left on device; it takes", "make room"]
    usage = namedtuple("usage", "free")
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda path: usage(1000))
        refused(command, wanted, capsys)

    def fill_up(tensors: object, file: Path, metadata: object) -> None:
        file.write_bytes(b"some")
        # What safetensors raises on a full disk, word for word.
        raise safetensors.SafetensorError(f"Error while serializing: I/O error: no space (os error {errno.ENOSPC})")

    monkeypatch.setattr(safetensors.torch, "save_file", fill_up)
    refused(command, wanted, capsys)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_export_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), complete_folder(tmp_path / "out", 0) as folder:
        (folder / "model.safetensors").touch()
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_files_are_filled_in_order() -> None:
    tensors = [Tensor(str(rows), (rows, 10), torch.bfloat16) for rows in (1, 2, 9, 1, 3)]
    assert [[tensor.nbytes for tensor in group] for group in split_files(tensors, 100).values()] == [
        [20, 40],
        [180],
        [20, 60],
    ]
    assert list(split_files(tensors, 320)) == ["model.safetensors"]


@pytest.mark.slow
def test_the_bar_hears_of_every_byte(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    heard: list[int] = []
    tensors = export(open_checkpoint(run_folder), tmp_path, advance=heard.append)
    assert sum(heard) == sum(tensor.nbytes for tensor in tensors)
    with progress_bar(sum(heard)) as advance:
        advance(1)
    assert capsys.readouterr().out == "", "nobody looks on"


def test_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no checkpoint"):
        open_checkpoint(tmp_path)


def refused(words: list[str], wanted: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 2 and one message with these texts."""
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    for text in wanted:
        assert text in captured.err, captured.err
