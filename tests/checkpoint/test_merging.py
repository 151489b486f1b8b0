"""A merge is the weighted mean, written whole or not at all; what cannot be merged is refused."""

import errno
import io
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter, save

from megatron_txssm.checkpoint import merged_files
from megatron_txssm.checkpoint.checksums import CHECKSUMS, checksum, to_text, verify_files
from megatron_txssm.checkpoint.merge_weights import DECAYS, ema_weights, mean_weights, wsd_weights
from megatron_txssm.checkpoint.merging import merge
from megatron_txssm.checkpoint.saved_model import find_checkpoints, open_checkpoint, read_weights
from megatron_txssm.checkpoint.steps import FORMAT, MERGE, TRACKER
from megatron_txssm.checkpoint.tensors import model_shapes
from megatron_txssm.errors import UserError
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.training.launch.preflight import check_checkpoint
from tests.support.recipes import TINY, write_recipe

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

WEIGHT = "decoder.layers.0.mixer.out_proj.weight"
STEPS = (100, 200, 300)


def tensors_of(step: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    shapes = model_shapes(TINY)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def save_step(checkpoints: Path, step: int, tensors: dict[str, torch.Tensor]) -> None:
    """As Megatron saves it, as far as a merge is concerned."""
    folder = checkpoints / f"iter_{step:07d}"
    others: dict[str, Any] = {
        "common_state/shard_0_1": ["of step", step],
        "decoder.layers.0.mixer.out_proj._extra_state/shard_0_1": io.BytesIO(b"scales"),
        "rng_state/shard_0.0_1.1": [1, 2, 3],
        "rerun_state_machine_state/shard_0_1": ["not running"],
        f"optimizer.state.exp_avg.{WEIGHT}": torch.zeros(3),
    }
    save({**tensors, **others}, storage_writer=FileSystemWriter(folder), no_dist=True)
    (folder / FORMAT).write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    (folder / CHECKSUMS).write_text(to_text({path.name: checksum(path) for path in folder.iterdir()}))
    (checkpoints / TRACKER).write_text(str(step))


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("merged") / "run"
    changes = {"checkpoint.save_interval": 100, "optimizer.decay_style": "constant", "megatron.mock_data": True}
    write_recipe(run / "checkpoints" / "recipe.yaml", changes, run=run)
    for step in STEPS:
        save_step(run / "checkpoints", step, tensors_of(step))
    return run


@pytest.fixture
def run(template: Path, tmp_path: Path) -> Path:
    return shutil.copytree(template, tmp_path / "run")


def test_weights_of_a_decay() -> None:
    even = (10, 20, 30, 40)
    assert wsd_weights(even, "linear") == pytest.approx(mean_weights(even)) == [0.25] * 4
    # The learning rate's first fall is the steepest, so the oldest counts most.
    assert wsd_weights(even, "minus_sqrt") == pytest.approx(
        [math.sqrt((j + 1) / 4) - math.sqrt(j / 4) for j in range(4)]
    )
    for steps in (even, (3, 5, 40), (7, 8)):
        for name, decay in DECAYS.items():
            weights = wsd_weights(steps, name)
            assert sum(weights) == pytest.approx(1) and min(weights) > 0
            # An update counts by the weights of all later checkpoints: as much as the learning rate after it.
            end = steps[-1] + (steps[-1] - steps[0]) / (len(steps) - 1)
            for number in range(1, len(steps)):
                rate = decay((steps[number] - steps[0]) / (end - steps[0]))
                assert sum(weights[number:]) == pytest.approx(rate), (steps, name, number)


def test_weights_that_fall_into_the_past() -> None:
    assert ema_weights((1, 2, 3), 0.5) == pytest.approx([1 / 7, 2 / 7, 4 / 7])
    assert ema_weights((0, 20, 40), 0.5) == pytest.approx([1 / 7, 2 / 7, 4 / 7])
    for wrong in (0.0, 1.0, math.nan):
        with pytest.raises(UserError, match="--ema-decay"):
            ema_weights((1, 2), wrong)


def test_it_is_the_weighted_mean(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert merge(run, steps=[300, 100], shape="ema", ema_decay=0.25) == 0
    out = run / "merged" / "ema_100_to_300"
    assert f"txssm eval loss {out}" in capsys.readouterr().out
    place = out / "checkpoints" / "iter_0000300"
    verify_files(place, True)
    merged = dict(read_weights(place))
    first, last = tensors_of(100), tensors_of(300)
    assert merged.keys() == first.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, 0.2 * first[name] + 0.8 * last[name])
    facts = json.loads((place / MERGE).read_text())
    assert [(part["step"], part["weight"]) for part in facts["parts"]] == [(100, pytest.approx(0.2)), (300, 0.8)]
    assert len({part["sha256"] for part in facts["parts"]}) == 2
    # What is no weight comes from the last part, to the byte; states of optimizer and generators are left out.
    entries = open_checkpoint(out).index.state_dict_metadata
    assert {name.partition("/")[0] for name in entries.keys() - merged.keys()} == {
        "common_state",
        "rerun_state_machine_state",
        "decoder.layers.0.mixer.out_proj._extra_state",
    }
    assert open_checkpoint(out).step == 300
    assert not list(run.rglob("reading_*")), "the marks of readers are gone"
    with pytest.raises(UserError, match=r"ema_100_to_300 exists"):
        merge(run, steps=[100, 300], shape="ema")


def test_the_hash_of_a_part_is_that_of_its_weights(run: Path) -> None:
    """However they are stored."""

    def hashes(out: str) -> list[str]:
        merge(run, run / out, last=2)
        facts = json.loads((run / out / "checkpoints" / "iter_0000300" / MERGE).read_text())
        return [part["sha256"] for part in facts["parts"]]

    first = hashes("a")
    shutil.rmtree(run / "checkpoints" / "iter_0000200")
    save_step(run / "checkpoints", 200, dict(reversed(tensors_of(200).items())))
    (run / "checkpoints" / TRACKER).write_text("300")
    assert hashes("b") == first
    tensors = tensors_of(200)
    tensors[WEIGHT][0, 0] += 1
    shutil.rmtree(run / "checkpoints" / "iter_0000200")
    save_step(run / "checkpoints", 200, tensors)
    (run / "checkpoints" / TRACKER).write_text("300")
    assert hashes("c") != first


def test_bf16_is_averaged_in_fp32(run: Path) -> None:
    for step in STEPS:
        shutil.rmtree(run / "checkpoints" / f"iter_{step:07d}")
        save_step(run / "checkpoints", step, tensors_of(step, torch.bfloat16))
    merge(run, run / "out", last=3)
    merged = dict(read_weights(run / "out" / "checkpoints" / "iter_0000300"))
    for name, tensor in merged.items():
        exact = torch.stack([tensors_of(step, torch.bfloat16)[name].double() for step in STEPS]).mean(dim=0)
        assert torch.equal(tensor, exact.to(torch.float32).to(torch.bfloat16)) or torch.allclose(
            tensor.double(), exact, rtol=2**-8, atol=1e-6
        )
        assert tensor.dtype is torch.bfloat16


def test_an_earlier_merge_is_replaced_when_told_and_nothing_else(run: Path) -> None:
    out = run / "out"
    merge(run, out, last=2)
    (out / "evaluation").mkdir()
    merge(run, out, last=3, overwrite=True)
    facts = json.loads((out / "checkpoints" / "iter_0000300" / MERGE).read_text())
    assert len(facts["parts"]) == 3
    assert not (out / "evaluation").exists(), "it was of the other model"
    with pytest.raises(UserError, match="is no merge, which --overwrite could replace"):
        merge(run, run / "checkpoints", last=2, overwrite=True)
    with pytest.raises(UserError, match="where runs remove old checkpoints"):
        merge(run, run / "checkpoints" / "iter_0000100" / "out", last=2)
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "out"]


def damage(run: Path) -> None:
    file = run / "checkpoints" / "iter_0000200" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def break_a_weight(run: Path) -> None:
    tensors = tensors_of(200)
    tensors[WEIGHT][3, 4] = math.nan
    shutil.rmtree(run / "checkpoints" / "iter_0000200")
    save_step(run / "checkpoints", 200, tensors)
    (run / "checkpoints" / TRACKER).write_text("300")


def other_sizes(run: Path) -> None:
    tensors = tensors_of(200)
    tensors[WEIGHT] = tensors[WEIGHT][:-1].clone()
    shutil.rmtree(run / "checkpoints" / "iter_0000200")
    save_step(run / "checkpoints", 200, tensors)
    (run / "checkpoints" / TRACKER).write_text("300")


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (damage, r"iter_0000200/__0_0.distcp is not what was saved"),
        (break_a_weight, rf"{WEIGHT} of step 200 is NaN or infinite; leave that step out"),
        (other_sizes, rf"iter_0000200 is not the model that .*: {WEIGHT} is \[31, 32\], not \[32, 32\]"),
    ],
)
def test_a_broken_part_is_refused(run: Path, harm: Any, why: str) -> None:
    harm(run)
    with pytest.raises(UserError, match=why):
        merge(run, last=3)
    assert not [path for path in run.rglob("*") if "merged" in path.name and path.is_file()]
    assert not list(run.glob("merged/.*"))


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ({"steps": [100]}, "a merge is of at least two checkpoints"),
        ({"steps": [100, 100]}, "a merge is of at least two checkpoints"),
        ({"steps": [100, 150]}, "has no step 150, which --steps 150 names; use --steps with one of 100, 200, 300"),
        ({"last": 1}, "--last 1 must be from 2 to the number of checkpoints, and .* holds 3; a run keeps more"),
        ({"last": 4}, "--last 4 must be from 2 .* holds 3; "),
        ({}, "state either --steps"),
        ({"last": 2, "steps": [100, 200]}, "state either --steps"),
        ({"last": 2, "shape": "median"}, "--shape median is unknown"),
        ({"last": 2, "ema_decay": 0.5}, "--ema-decay 0.5 has no effect with --shape mean"),
        ({"last": 2, "shape": "ema", "decay_shape": "linear"}, "--decay-shape linear has no effect with --shape ema"),
    ],
)
def test_a_wrong_choice_is_refused(run: Path, words: Any, why: str) -> None:
    with pytest.raises(UserError, match=why):
        merge(run, **words)
    assert not (run / "merged").exists()


@pytest.mark.parametrize("interrupt", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
def test_a_full_disk_or_an_interrupt_leaves_nothing(
    run: Path, interrupt: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    mean, left = merged_files._MeanPlanner._mean, [3]

    def stop(self: Any, name: str) -> torch.Tensor:
        left[0] -= 1
        if left[0] == 0:
            raise interrupt
        return mean(self, name)

    monkeypatch.setattr(merged_files._MeanPlanner, "_mean", stop)
    expected = UserError if isinstance(interrupt, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match=r"No space left|^$"):
        merge(run, run / "out", last=3)
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints"]


def test_a_note_where_the_learning_rate_falls_already(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merge(run, run / "a", last=2, shape="wsd", decay_shape="linear")
    assert "note:" not in capsys.readouterr().out
    recipe = run / "checkpoints" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("decay_style: constant", "decay_style: cosine"))
    merge(run, run / "b", last=2, shape="wsd")
    assert "decay_style=cosine lowers the learning rate before step 300" in capsys.readouterr().out


def test_no_run_resumes_from_a_merge(run: Path) -> None:
    merge(run, run / "out", last=2)
    own = load_recipe(str(run / "checkpoints" / "recipe.yaml"), [f"run_directory={run / 'out'}"])
    with pytest.raises(UserError, match=r"is a merge, without the optimizer state .* set checkpoint.load_from="):
        check_checkpoint(own)
    source = f"checkpoint.load_from={find_checkpoints(run / 'out')}"
    check_checkpoint(load_recipe(str(run / "checkpoints" / "recipe.yaml"), [f"run_directory={run / 'new'}", source]))
