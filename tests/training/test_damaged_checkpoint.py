"""A run whose newest checkpoint is damaged goes on from the one before, aloud, and computes what it would have."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_txssm.checkpoint.checksums import verify_files
from megatron_txssm.checkpoint.torch_dist import IndexReader
from tests.support.tiny_run import TinyRun

pytestmark = pytest.mark.slow

EVERY_2 = ["checkpoint.save_interval=2"]
WEIGHT = "decoder.layers.0.mixer.out_proj.weight"


def losses(run: TinyRun) -> dict[int, float]:
    """Of each step; every line of a step must say the same."""
    found: dict[int, float] = {}
    for line in map(json.loads, (run.run / "metrics.jsonl").read_text().splitlines()):
        if "grad_norm" in line:
            assert found.setdefault(line["iteration"], line["lm loss"]) == line["lm loss"]
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A run of two ranks with the steps 2 and 4; copy it."""
    from tests.support.tiny_run import make_tiny_run

    run = make_tiny_run(tmp_path_factory.mktemp("trained") / "tiny")
    done = run.pretrain("--nproc", "2", fields=[*EVERY_2, "megatron.exit_interval=4"])
    assert done.code == 0, done
    for step in (2, 4):
        verify_files(run.checkpoints / f"iter_{step:07d}", True)
    return run


@pytest.fixture(scope="module")
def expected(trained: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of six steps where nothing is damaged."""
    run = copy(trained, tmp_path_factory.mktemp("undisturbed") / "tiny")
    assert run.pretrain("--nproc", "2", fields=[*EVERY_2, "megatron.exit_interval=6"]).code == 0
    return losses(run)


def copy(source: TinyRun, folder: Path) -> TinyRun:
    shutil.copytree(source.folder, folder)
    run = TinyRun(folder)
    for recipe in (run.recipe, run.checkpoints / "recipe.yaml", run.run / "recipe.yaml"):
        recipe.write_text(recipe.read_text().replace(str(source.folder), str(folder)))
    return run


def write_nan(folder: Path, name: str) -> None:
    """NaN into a tensor of a checkpoint, where it lies."""
    for index, piece in IndexReader(folder).read_metadata().storage_data.items():
        if index.fqn == name:
            file = folder / piece.relative_path
            content = bytearray(file.read_bytes())
            tensor = torch.load(io.BytesIO(content[piece.offset : piece.offset + piece.length]))
            was = tensor.contiguous().numpy().tobytes()
            at = content.index(was, piece.offset)
            content[at : at + len(was)] = torch.full_like(tensor, float("nan")).numpy().tobytes()
            file.write_bytes(content)
            return
    raise AssertionError(name)


def flip_a_bit(checkpoints: Path) -> None:
    file = checkpoints / "iter_0000004" / "__1_0.distcp"
    content = bytearray(file.read_bytes())
    content[100_000] ^= 4
    file.write_bytes(content)


def lose_a_byte_and_the_tracker(checkpoints: Path) -> None:
    file = checkpoints / "iter_0000004" / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1])
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("")


def break_a_weight(checkpoints: Path) -> None:
    # As an older version may have saved it.
    (checkpoints / "iter_0000004" / "checksums.json").unlink()
    write_nan(checkpoints / "iter_0000004", WEIGHT)


def break_a_moment(checkpoints: Path) -> None:
    (checkpoints / "iter_0000004" / "checksums.json").unlink()
    write_nan(checkpoints / "iter_0000004", f"optimizer.state.exp_avg_sq.{WEIGHT}")


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (flip_a_bit, "__1_0.distcp is not what was saved"),
        (lose_a_byte_and_the_tracker, "__0_0.distcp is cut short"),
        (break_a_weight, f"the weight {WEIGHT} on rank 0 is NaN or infinite"),
        (break_a_moment, "the optimizer's exp_avg_sq on rank "),
    ],
)
def test_a_run_goes_on_behind_a_damaged_checkpoint(
    trained: TinyRun, expected: dict[int, float], tmp_path: Path, harm: Callable[[Path], None], why: str
) -> None:
    run = copy(trained, tmp_path / "tiny")
    harm(run.checkpoints)
    # Of a save that was killed: nobody can load it.
    (run.checkpoints / "iter_0000005").mkdir()
    (run.checkpoints / "iter_0000005" / "__0_0.distcp").write_bytes(bytes(1000))
    done = run.pretrain("--nproc", "2", fields=[*EVERY_2, "megatron.exit_interval=6"])
    assert done.code == 0, done
    assert "the checkpoint of step 4 is damaged (" in done.stdout
    assert why in done.stdout
    assert "; the run goes on from step 2" in done.stdout
    assert why in (run.run / "logs" / "rank_0.log").read_text()
    assert losses(run) == expected
    assert (run.checkpoints / "latest_checkpointed_iteration.txt").read_text() == "6"
    # The damaged one was replaced as a whole when its step was saved again.
    for step in (2, 4, 6):
        verify_files(run.checkpoints / f"iter_{step:07d}", True)
    assert not (run.checkpoints / "iter_0000005").exists()


def test_a_run_ends_where_none_is_whole(trained: TinyRun, tmp_path: Path) -> None:
    run = copy(trained, tmp_path / "tiny")
    for step in (2, 4):
        file = run.checkpoints / f"iter_{step:07d}" / "__0_0.distcp"
        file.write_bytes(bytes(file.stat().st_size))
    done = run.pretrain("--nproc", "2", fields=EVERY_2)
    assert done.code == 2, done
    assert "step 4 is damaged (" in done.stderr
    assert "step 2 is damaged (" in done.stderr
    assert "no whole checkpoint is left" in done.stderr
    assert "Traceback" not in done.stderr


def test_unverified_the_same_damage_goes_unseen_and_says_nothing(trained: TinyRun, tmp_path: Path) -> None:
    run = copy(trained, tmp_path / "tiny")
    flip_a_bit(run.checkpoints)
    fields = [*EVERY_2, "checkpoint.verify=false", "megatron.exit_interval=6"]
    done = run.pretrain("--nproc", "2", fields=fields)
    assert "damaged" not in done.stdout
    saved = json.loads((run.checkpoints / "iter_0000006" / "checksums.json").read_text())["files"]
    assert {entry["digest"] for entry in saved.values()} == {None}
    assert saved["__0_0.distcp"]["size"] == (run.checkpoints / "iter_0000006" / "__0_0.distcp").stat().st_size
