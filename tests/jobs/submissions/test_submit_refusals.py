"""What `txssm submit` refuses before anything is written or queued; scripts play Slurm."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_txssm.cli.main import main
from megatron_txssm.home import HOME
from megatron_txssm.jobs import submit
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.sizes import checkpoint_bytes
from megatron_txssm.training.launch import preflight
from tests.jobs.submissions.stand_in_cluster import FIELDS, LAYOUT, Cluster, assert_refused, submit_demo


@pytest.mark.parametrize("name", ["run_directory", "checkpoint.directory"])
def test_a_name_too_long_for_a_file_system(cluster: Cluster, capsys: pytest.CaptureFixture[str], name: str) -> None:
    code = submit_demo(fields=(f"{name}=runs/{'x' * 10_000}",))
    assert code == 2 and cluster.queued == []
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "too long" in line


@pytest.mark.parametrize(
    ("layout", "fields", "reason"),
    [
        (("--nodes=1", "--nproc-per-node=3"), (), "3 processes cannot be divided into tensor_model_parallel_size=2"),
        (("--nodes=16", "--nproc-per-node=2"), (), "not divisible by micro_batch_size=1 x 16 data-parallel"),
        (("--nodes=1",), (), "state --gpus-per-node, or --nproc-per-node"),
        (("--nodes=0", "--nproc-per-node=2"), (), "--nodes 0 must be at least 1"),
        (("--nodes=-1", "--nproc-per-node=2"), (), "--nodes -1 must be at least 1"),
        (("--nodes=1", "--nproc-per-node=0"), (), "0 processes per node must be at least 1"),
        (("--nodes=1", "--gpus-per-node=0"), (), "0 processes per node must be at least 1"),
        (("--nodes=1", "--gpus-per-node=-2"), (), "must be at least 1"),
        (("--nodes=1", "--gpus-per-node=4", "--nproc-per-node=2"), (), "--nproc-per-node 2 is not --gpus-per-node 4"),
        (LAYOUT, ("parallel.tensor_model_parallel_size=3",), "tensor_model_parallel_size=3"),
        (LAYOUT, ("training.train_iterz=3",), "did you mean 'train_iters'"),
        ((*LAYOUT, "--step-timeout=0"), (), "--step-timeout 0 must be at least 1"),
        ((*LAYOUT, "--stop-before=0"), (), "--stop-before 0 must be at least 1"),
        ((*LAYOUT, "--preflight-timeout=0"), (), "--preflight-timeout 0 must be at least 1"),
        ((*LAYOUT, "--max-requeues=-1"), (), "--max-requeues -1 must be at least 0"),
        ((*LAYOUT, "--spare=-1"), (), "--spare -1 must be at least 0"),
        ((*LAYOUT, "--time=2"), (), "--time 2 is 120 s, and --stop-before 120 makes"),
        ((*LAYOUT, "--sbatch=nodes=4"), (), "--sbatch 'nodes=4' is set by --nodes; leave it out"),
        ((*LAYOUT, "--after=x"), (), "--after 'x' must be the number of a job"),
        ((*LAYOUT, "--after="), (), "--after '' must be the number of a job"),
        ((*LAYOUT, "--corpus=x"), (), "--corpus x goes with --chain"),
        ((*LAYOUT, "--partition="), (), "--partition is empty"),
        ((*LAYOUT, "--sbatch=-N4"), (), "--sbatch '-N4' must be a long option of sbatch"),
        ((*LAYOUT, "--partition=a b"), (), "--partition 'a b' must be one plain word"),
        (LAYOUT, ("run_directory=a b",), "contains characters that a batch script cannot"),
        (LAYOUT, ("run_directory=runs/%j",), "contains characters that a batch script cannot"),
    ],
)
def test_what_is_wrong_with_the_request(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], layout: tuple, fields: tuple, reason: str
) -> None:
    assert_refused(cluster, capsys, submit_demo(layout=layout, fields=fields), reason)


@pytest.mark.parametrize("option", ["array=0-1", "test-only", "wrap=x", "help", "version", "parsable", "wait"])
def test_options_that_make_another_job_of_it(cluster: Cluster, capsys: pytest.CaptureFixture[str], option: str) -> None:
    # Two trainers in one run folder, or no job at all where its number is expected.
    assert_refused(cluster, capsys, submit_demo(f"--sbatch={option}"), option.partition("=")[0])


def test_missing_data_and_an_unknown_recipe(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    layout = ("--nodes=1", "--nproc-per-node=2")
    assert_refused(cluster, capsys, main(["submit", "demo_cpu", *layout]), "runs/demo/data/vocab_1024")
    assert_refused(cluster, capsys, main(["submit", "demo_cpus", *LAYOUT]), "did you mean 'demo_cpu'")
    assert_refused(cluster, capsys, main(["submit", "./no.yaml", *LAYOUT]), "no such recipe file")


def test_a_corpus_that_is_not_made_yet(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["submit", "transxssm_320m", "--nodes=1", "--nproc-per-node=2"]
    assert_refused(cluster, capsys, main(words), "make it: txssm data shard smollm_corpus", "--chain")
    # To look at the script, one need not have 500 GB.
    assert main([*words, "--dry-run"]) == 0
    out, error = capsys.readouterr()
    assert "#SBATCH --nodes=1" in out
    assert error.startswith("warning: a submission would be refused: data.corpus: data/smollm-corpus holds no corpus")
    assert cluster.queued == [] and not Path("runs").exists()


def test_slurms_own_reason(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.refuses("#SBATCH --partition=nowhere")
    code = submit_demo("--partition", "nowhere")
    assert_refused(cluster, capsys, code, "Invalid partition name specified")


def test_a_wrong_option_of_the_site_is_named(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "env.sh").write_text("TXSSM_SBATCH_OPTIONS='exclusive -N2'\n")
    assert_refused(cluster, capsys, submit_demo(), "TXSSM_SBATCH_OPTIONS '-N2' must be")
    (tmp_path / "env.sh").write_text("echo 'no such module' >&2\nexit 1\n")
    assert_refused(cluster, capsys, submit_demo(), f"{tmp_path}/env.sh fails (exit code 1): no such module")


def test_no_slurm(cluster: Cluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(submit, "HOME", Path("/nowhere"))
    monkeypatch.setattr("megatron_txssm.jobs.submit.load_site_settings", lambda: None)
    assert_refused(cluster, capsys, submit_demo(), "on this machine; run it on a login node")


@pytest.mark.parametrize("answer", ["slurm_load_jobs error", "JOBID\n17\n", "\x1e17\x1fname\n"])
def test_an_answer_that_is_none(cluster: Cluster, capsys: pytest.CaptureFixture[str], answer: str) -> None:
    (cluster.folder / "queue").write_text(answer)
    assert_refused(cluster, capsys, submit_demo(), "squeue answers '", "not a list of jobs")


def test_a_controller_that_is_away(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    (cluster.folder / "squeue").write_text("#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact' >&2\nexit 1\n")
    assert_refused(cluster, capsys, submit_demo(), "squeue --noheader --me --all: slurm_load_jobs error: Unable")


def test_a_disk_without_room_for_a_checkpoint(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "checkpoint_bytes", lambda recipe: 10**24)
    home = Path.cwd()
    assert_refused(cluster, capsys, submit_demo(), f"{home} has ", "a checkpoint of demo_cpu takes", "make room")
    # A run that saves nothing needs none.
    assert submit_demo(fields=("checkpoint.save_interval=null",)) == 0


@pytest.fixture
def small_disk(cluster: Cluster, tmp_path: Path) -> Iterator[Path]:
    """A file system of half a megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs root that may mount a small file system: start the container with --privileged")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_real_small_disk(cluster: Cluster, capsys: pytest.CaptureFixture[str], small_disk: Path) -> None:
    fields = (f"run_directory={small_disk}/run",)
    assert checkpoint_bytes(load_recipe("demo_cpu", [*FIELDS, *fields])) > 512 * 1024
    assert_refused(cluster, capsys, submit_demo(fields=fields), f"{small_disk} has 0.00 GB left")
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("free", [0, 4096])
def test_a_real_full_disk(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], small_disk: Path, tmp_path: Path, free: int
) -> None:
    # Its checkpoints go elsewhere: so there is room for those, but not for the recipe.
    with (small_disk / "full").open("wb") as file:
        file.write(b"x" * (512 * 1024 - free))
    fields = (f"run_directory={small_disk}/run", f"checkpoint.directory={tmp_path}/checkpoints")
    code = submit_demo(fields=fields)
    assert_refused(cluster, capsys, code, f"run_directory={small_disk}/run cannot be written: No space left on device")
    assert list(small_disk.rglob("*.partial")) == []


def test_a_run_folder_that_cannot_be_made(cluster: Cluster, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code = submit_demo(fields=(f"run_directory={tmp_path}/file/run",))
    assert_refused(cluster, capsys, code, f"run_directory={tmp_path}/file/run cannot be written: Not a directory")


def test_a_run_folder_of_somebody_else(cluster: Cluster, tmp_path: Path) -> None:
    # Root may write anywhere but where nobody may.
    folder = tmp_path / "theirs"
    folder.mkdir()
    script = 'mount -t tmpfs -o ro none "$0" && exec "$@"'
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode != 0:
        pytest.skip("needs root that may make mount namespaces: start the container with --privileged")
    words = ["submit", "demo_cpu", *LAYOUT, *(f"--set={text}" for text in FIELDS)]
    words += [f"--set=run_directory={folder}/run", f"--set=checkpoint.directory={tmp_path}/checkpoints"]
    command = ["unshare", "--mount", "sh", "-c", script, str(folder), sys.executable, "-m", "megatron_txssm.cli"]
    done = subprocess.run(
        [*command, *words], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(HOME)}
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: run_directory={folder}/run cannot be written: Read-only file system")
    assert done.stderr.count("\n") == 1
    assert cluster.queued == [] and not (tmp_path / "checkpoints").exists()


# --- A run that has a job.


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "COMPLETING", "SUSPENDED"])
@pytest.mark.parametrize("stage", ["pretrain", "evaluate"])
def test_a_run_has_one_job_at_a_time(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], state: str, stage: str
) -> None:
    script = f"{Path.cwd()}/runs/demo/{stage}.sbatch"
    cluster.holds({"job_id": 55, "state": state, "command": script})
    assert_refused(cluster, capsys, submit_demo(), f"runs/demo already has job 55 ({state}); see txssm jobs")


@pytest.mark.parametrize(
    "job",
    [
        {"state": "COMPLETED"},
        {"state": "CANCELLED"},
        {"command": "elsewhere/pretrain.sbatch"},
        {"command": ""},
        {"command": "(null)"},
    ],
)
def test_other_jobs_are_no_obstacle(cluster: Cluster, job: dict) -> None:
    cluster.holds({"job_id": 55, "command": f"{Path.cwd()}/runs/demo/pretrain.sbatch", **job})
    assert submit_demo() == 0


def test_a_run_behind_a_link_has_one_job_too(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    # As where runs/ lies on another disk.
    (tmp_path / "disk").mkdir()
    Path("runs").symlink_to(tmp_path / "disk")
    assert submit_demo() == 0
    # Slurm keeps the path that sbatch was given, from the root on.
    cluster.holds({"job_id": 101, "command": str(Path.cwd() / cluster.queued[0][-1])})
    capsys.readouterr()
    assert submit_demo() == 2
    assert "already has job 101 (RUNNING)" in capsys.readouterr().err
    assert len(cluster.queued) == 1


def test_a_damaged_record_of_an_attempt(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    record = Path("runs/demo/attempts/0001/attempt.json")
    record.parent.mkdir(parents=True)
    record.write_text("{")
    assert submit_demo() == 2
    said = capsys.readouterr().err
    assert "attempts/0001/attempt.json: not readable" in said and "remove its folder" in said
    assert cluster.queued == []
