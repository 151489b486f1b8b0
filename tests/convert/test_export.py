"""txssm convert export, from checkpoints of random weights: files, what lies beside them, and what is refused."""

import errno
import hashlib
import importlib.metadata
import json
import pickle
import shutil
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_txssm.checkpoint.saved_model import open_checkpoint
from megatron_txssm.checkpoint.torch_dist import IndexReader
from megatron_txssm.cli.main import main
from megatron_txssm.convert.export import export as export_weights
from megatron_txssm.convert.export_files import write_configuration
from megatron_txssm.convert.formats.format import choose_format
from megatron_txssm.convert.formats.mapping import HALVES, TABLES
from megatron_txssm.convert.huggingface.folder import open_hf_folder
from megatron_txssm.convert.huggingface.weights import Export, write_weights
from megatron_txssm.convert.proof.proof import compare_tensors, versions
from megatron_txssm.errors import UserError
from megatron_txssm.files import complete_folder
from megatron_txssm.terminal import progress_bar
from tests.convert.trained import ARCHITECTURES
from tests.convert.untrained import Evil, make_run, random_weights


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy it before changing it."""
    return make_run(tmp_path_factory.mktemp("saved"))


def export(run: Path, out: Path, *options: str) -> dict[str, torch.Tensor]:
    """The weights, read back from wherever the index says."""
    assert main(["convert", "export", str(run), str(out), "--no-verify", *options]) == 0
    return {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_megatrons_format_is_what_was_saved_without_padding(run_folder: Path, tmp_path: Path) -> None:
    for step, options in ((2, []), (1, ["--step", "1"])):
        weights = export(run_folder, tmp_path / str(step), "--layout", "megatron", *options)
        saved = random_weights(open_checkpoint(run_folder).recipe, seed=step)
        padded = "embedding.word_embeddings.weight"
        assert same(weights, saved | {padded: saved[padded][:301]})


def test_several_files_and_their_index(run_folder: Path, tmp_path: Path) -> None:
    whole = export(run_folder, tmp_path / "one")
    assert not (tmp_path / "one" / "model.safetensors.index.json").exists()
    out = tmp_path / "new" / "out"
    assert same(export(run_folder, out, "--max-file-gb", "2e-5"), whole)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    read = {file: load_file(out / file) for file in files}
    assert {name: file for file, tensors in read.items() for name in tensors} == index["weight_map"]
    sizes = {file: sum(tensor.nbytes for tensor in tensors.values()) for file, tensors in read.items()}
    assert all(size <= 20_000 or len(read[file]) == 1 for file, size in sizes.items())
    assert index["metadata"]["total_size"] == sum(sizes.values()) == sum(tensor.nbytes for tensor in whole.values())


def test_a_run_notes_what_was_exported_from_it(run_folder: Path, tmp_path: Path) -> None:
    run = shutil.copytree(run_folder, tmp_path / "run")
    shutil.copyfile(run / "checkpoints" / "recipe.yaml", run / "recipe.yaml")
    export(run, tmp_path / "one", "--step", "1")
    export(run, tmp_path / "two", "--layout", "megatron")
    one, two = map(json.loads, (run / "conversions.jsonl").read_text().splitlines())
    assert (one["step"], one["layout"], one["out"], one["proof"]) == (1, "transxssm", str(tmp_path / "one"), [])
    assert (two["step"], two["layout"]) == (2, "megatron")
    # What cannot be noted is exported all the same.
    (run / "conversions.jsonl").unlink()
    (run / "conversions.jsonl").mkdir()
    export(run, tmp_path / "three")


def test_what_lies_beside_the_weights(run_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    weights = export(run_folder, out)
    assert (out / "recipe.yaml").read_bytes() == (run_folder / "checkpoints/recipe.yaml").read_bytes()
    facts = json.loads((out / "export.json").read_text())
    files = {str(file.relative_to(out)): file for file in out.rglob("*") if file.name != "export.json"}
    assert facts["sha256"] == {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()}
    assert {"model.safetensors", "config.json", "generation_config.json", "README.md"} <= files.keys()
    assert (facts["step"], facts["layout"], facts["dtypes"]) == (2, "transxssm", ["float32"])
    assert (facts["vocab_size"], facts["padding_rows_removed"]) == (301, 3)
    assert facts["parameters"] == sum(map(torch.numel, weights.values()))
    assert "Not verified" in (out / "README.md").read_text()
    assert (out / "model.safetensors").stat().st_mode == (out / "recipe.yaml").stat().st_mode, "others may read it"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_stock_megatrons_checkpoints_need_a_recipe(run_folder: Path, tmp_path: Path, refused: Any) -> None:
    """They lie in a folder without recipe.yaml; the rest is alike."""
    run, recipe = tmp_path / "copy" / "run", tmp_path / "mine.yaml"
    shutil.copytree(run_folder, run)
    (run / "checkpoints/recipe.yaml").rename(recipe)
    weights = export(run, tmp_path / "out", "--recipe", str(recipe))
    assert same(weights, export(run_folder, tmp_path / "expected"))
    assert (tmp_path / "out/recipe.yaml").read_text() == recipe.read_text()
    # And it is another one only where it fits.
    changed = tmp_path / "changed.yaml"
    changed.write_text(recipe.read_text().replace("layer_pattern: M-*-M-*-", "layer_pattern: M-*-M-*-M-*-"))
    refused(
        ["convert", "export", run, tmp_path / "none", "--recipe", changed],
        ["is not the model that recipe run describes: decoder.layers.8."],
    )


def test_of_several_tasks_one_exports(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(["convert", "export", str(run_folder), str(tmp_path / "out")]) == 0
    assert not list(tmp_path.iterdir())


def test_the_bar_hears_of_every_byte(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved, heard = open_checkpoint(run_folder), []
    planned = Export(saved, choose_format(saved.recipe, None), "bf16")
    hashes = write_weights(planned, tmp_path, max_file_bytes=30_000, advance=heard.append)
    assert sum(heard) == planned.nbytes and hashes.keys() == saved.shapes.keys()
    with progress_bar("exporting", sum(heard), of_bytes=True) as advance:
        advance(1)
    assert capsys.readouterr().out == "", "nobody looks on"


def test_a_broken_mapping_is_seen_in_the_tensors(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = open_checkpoint(run_folder)
    planned = Export(saved, "transxssm", None)
    hashes = write_weights(planned, tmp_path, max_file_bytes=10**9)
    (tmp_path / "recipe.yaml").write_text(saved.recipe.to_yaml())
    write_configuration(planned, None, tmp_path)
    written = open_hf_folder(tmp_path)
    assert not compare_tensors(saved, written, list(saved.shapes), hashes).different
    # Up above gate, on the way back alone.
    swapped = replace(HALVES, from_hf=lambda tensors, sizes, shapes: [torch.cat(tensors[::-1])])
    rows = [
        replace(row, transform=swapped if row.transform is HALVES else row.transform) for row in TABLES["transxssm"]
    ]
    monkeypatch.setitem(TABLES, "transxssm", tuple(rows))
    found = compare_tensors(saved, open_hf_folder(tmp_path), list(saved.shapes), hashes)
    assert list(found.different) == [f"decoder.layers.{layer}.mlp.linear_fc1.weight" for layer in (1, 3, 5, 7)]
    assert found.compared == len(saved.shapes) == len(found.sha256) + 4


def checkpoint_file(run: Path, name: str) -> Path:
    return run / "checkpoints" / "iter_0000002" / name


def cut_a_file(run: Path) -> None:
    with checkpoint_file(run, "__0_0.distcp").open("r+b") as stream:
        stream.truncate(1000)


def overwrite_a_file(run: Path) -> None:
    file = checkpoint_file(run, "__0_0.distcp")
    file.write_bytes(bytes(file.stat().st_size))


def describe_more_layers(run: Path) -> None:
    file = run / "checkpoints/recipe.yaml"
    file.write_text(file.read_text().replace("layer_pattern: M-*-M-*-", "layer_pattern: M-*-M-*-M-*-"))


def evil_index(run: Path) -> None:
    checkpoint_file(run, ".metadata").write_bytes(pickle.dumps(Evil(run.parent.parent / "ran")))


def evil_tensor(run: Path) -> None:
    """An honest index that points at a pickle."""
    torch.save(Evil(run.parent.parent / "ran"), checkpoint_file(run, "evil"))
    size = checkpoint_file(run, "evil").stat().st_size
    metadata = IndexReader(run / "checkpoints/iter_0000002").read_metadata()
    storage: Any = metadata.storage_data
    for index, piece in storage.items():
        storage[index] = replace(piece, relative_path="evil", offset=0, length=size)
    checkpoint_file(run, ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize(
    ("damage", "wanted"),
    [
        (lambda run: checkpoint_file(run, "__0_1.distcp").unlink(), ["__0_1.distcp is missing, one of 2 files"]),
        (cut_a_file, ["__0_0.distcp is cut short: 1,000 bytes of at least", "or take another step with --step"]),
        (overwrite_a_file, ["iter_0000002 is damaged (", "copy it again, or take another step with --step"]),
        (lambda run: checkpoint_file(run, ".metadata").unlink(), ["is no whole torch_dist checkpoint", ".metadata"]),
        (lambda run: checkpoint_file(run, ".metadata").write_bytes(b"no pickle"), [".metadata is damaged ("]),
        (lambda run: checkpoint_file(run, ".metadata").write_bytes(pickle.dumps([])), ["it holds a list, not an"]),
        (evil_index, [".metadata is damaged (", "it asks for posix.mkdir, which no checkpoint needs"]),
        (evil_tensor, ["iter_0000002 is damaged ("]),
        (
            lambda run: (run / "checkpoints/recipe.yaml").unlink(),
            ["checkpoints has no recipe.yaml", "stock Megatron-LM does not: copy", "takes it as --recipe"],
        ),
        (
            lambda run: shutil.rmtree(run / "checkpoints/iter_0000002"),
            ["has no step 2, which latest_checkpointed_iteration.txt names; use --step with one of 1"],
        ),
        (describe_more_layers, ["is not the model that", "decoder.layers.8.", "is missing, and"]),
        (
            lambda run: (run / "checkpoints/latest_checkpointed_iteration.txt").unlink(),
            ["checkpoints holds checkpoints (1, 2), but not latest_checkpointed_iteration.txt", "(echo 2 > "],
        ),
    ],
)
def test_a_damaged_checkpoint(
    run_folder: Path, tmp_path: Path, damage: Callable[[Path], object], wanted: list[str], refused: Any
) -> None:
    run = tmp_path / "copy" / "run"
    shutil.copytree(run_folder, run)
    damage(run)
    refused(["convert", "export", run, tmp_path / "out"], wanted)
    assert not (tmp_path / "ran").exists()


def test_a_wrong_option(run_folder: Path, tmp_path: Path, refused: Any) -> None:
    words = ["convert", "export", run_folder, tmp_path / "out"]
    refused([*words, "--step", "7"], ["has no step 7, which --step 7 names; use --step with one of 1, 2"])
    for size in ("0", "-1", "nan"):
        refused([*words, "--max-file-gb", size], [f"--max-file-gb {size} must be above 0"])
    refused(
        [*words, "--layout", "llama"], ["--layout llama cannot hold run: it has state-space layers; leave --layout"]
    )


def test_layers_that_are_no_blocks_have_no_format(tmp_path: Path, refused: Any) -> None:
    run = make_run(tmp_path / "mixed", ARCHITECTURES["jamba"] | {"layer_pattern": "MM-*-M"})
    for layout in ([], ["--layout", "transxssm"], ["--layout", "granitemoehybrid"]):
        refused(
            ["convert", "export", run, tmp_path / "out", "--no-verify", *layout],
            ["model.layer_pattern=MM-*-M is not a sequence of blocks, each a mixer (M or *) and an FFN (- or E)"],
        )
    assert "decoder.layers.1.mixer.D" in export(run, tmp_path / "megatron", "--layout", "megatron")


def test_each_side_of_a_comparison_has_a_step(run_folder: Path, tmp_path: Path, refused: Any) -> None:
    words = ["convert", "verify", run_folder, run_folder]
    refused([*words, "--step", "3"], ["has no step 3, which --step 3 names; use --step with one of 1, 2"])
    refused([*words, "--step-b", "3"], ["has no step 3, which --step-b 3 names; use --step-b with one of 1, 2"])
    run = tmp_path / "copy" / "run"
    shutil.copytree(run_folder, run)
    cut_a_file(run)
    refused(["convert", "verify", run_folder, run], ["is cut short", "or take another step with --step-b"])
    (tmp_path / "config.json").touch()
    refused(["convert", "verify", run_folder, tmp_path, "--step-b", "1"], ["--step-b 1 is of checkpoints, but "])


def test_a_full_disk(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Any) -> None:
    import safetensors.torch

    words = ["convert", "export", run_folder, tmp_path / "out"]
    wanted = ["out cannot be written: No space left on device; it takes", "make room"]
    usage = namedtuple("usage", "free")
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda path: usage(1000))
        refused(words, wanted)

    def fill_up(tensors: object, file: Path, metadata: object) -> None:
        file.write_bytes(b"some")
        # What safetensors raises on a full disk, word for word.
        raise safetensors.SafetensorError(f"Error while serializing: I/O error: no space (os error {errno.ENOSPC})")

    monkeypatch.setattr(safetensors.torch, "save_file", fill_up)
    refused(words, wanted)


def test_an_interrupted_export_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), complete_folder(tmp_path / "out", 0) as folder:
        (folder / "model.safetensors").touch()
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no checkpoint"):
        open_checkpoint(tmp_path)


def test_a_checkout_that_is_not_installed_names_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the comparison: a failure would cost it all."""
    known = versions()
    found = importlib.metadata.version

    def lacks(name: str) -> str:
        if name in ("megatron_txssm", "megatron-core"):
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(importlib.metadata, "version", lacks)
    assert versions() == known | {"megatron-core": "none"}


@pytest.mark.parametrize(("name", "value"), [("format", "gguf"), ("dtype", "fp16")])
def test_an_unknown_name_from_python_is_refused(tmp_path: Path, name: str, value: str) -> None:
    asked: Any = {name: value}
    with pytest.raises(UserError, match=f"{value} is unknown; use one of .*(llama|bf16)"):
        export_weights(tmp_path / "run", tmp_path / "out", **asked)
