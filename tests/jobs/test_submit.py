"""What `txssm submit` refuses before anything is written or queued, and what it queues; scripts play Slurm."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest

from megatron_txssm.cli.main import main
from megatron_txssm.errors import UserError
from megatron_txssm.evaluation.harness import tasks as harness_tasks
from megatron_txssm.home import HOME
from megatron_txssm.jobs import submit
from megatron_txssm.jobs.limits import Limits
from megatron_txssm.jobs.submission import submission
from megatron_txssm.jobs.submission.request import Request
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.sizes import checkpoint_bytes
from megatron_txssm.slurm import client as slurm
from megatron_txssm.training.launch import preflight
from tests.data.in_process import web_recipe
from tests.slurm.some_queue import write_queue

# Says no to a script that states what `refuse` names, or to its nth submission; keeps what it was given.
SBATCH = """\
#!/bin/bash
here=$(dirname "$0")
file=${@: -1}
[ "$file" = --test-only ] && file=/dev/stdin
text=$(cat "$file")
if [ -e "$here/refuse" ] && grep -q -f "$here/refuse" <<< "$text"; then
    echo "sbatch: error: Batch job submission failed: Invalid partition name specified" >&2
    exit 1
fi
[ "$1" = --test-only ] && { echo "sbatch: Job 3 to start at noon" >&2; exit 0; }
number=$(( $(ls "$here/queued" | wc -l) + 1 ))
if [ "$number" = "$(cat "$here/refuse_number" 2> /dev/null)" ]; then
    echo "sbatch: error: Socket timed out on send/recv operation" >&2
    exit 1
fi
printf '%s\\n' "$@" > "$here/queued/$number"
env > "$here/environment"
cat "$here/answer" 2> /dev/null || echo "$((100 + number))"
"""
SCANCEL = """\
#!/bin/bash
printf '%s\\n' "$@" >> "$(dirname "$0")/cancelled"
"""


@dataclass
class Cluster:
    folder: Path

    @property
    def queued(self) -> list[list[str]]:
        """The words of each submission."""
        paths = sorted((self.folder / "queued").iterdir(), key=lambda path: int(path.name))
        return [path.read_text().splitlines() for path in paths]

    @property
    def cancelled(self) -> list[str]:
        path = self.folder / "cancelled"
        return path.read_text().splitlines() if path.exists() else []

    @property
    def environment(self) -> dict[str, str]:
        lines = (self.folder / "environment").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)

    def holds(self, *jobs: dict) -> None:
        """What squeue shows."""
        write_queue(self.folder, *jobs)

    def refuses(self, text: str) -> None:
        (self.folder / "refuse").write_text(f"{text}\n")


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """In an empty folder, whose runs/ is the place of the runs."""
    folder = tmp_path / "bin"
    (folder / "queued").mkdir(parents=True)
    for name, text in (("sbatch", SBATCH), ("scancel", SCANCEL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    before = dict(os.environ)
    for name in before:
        if name.startswith(("TXSSM_", "SBATCH_", "SLURM_", "SQUEUE_")):
            monkeypatch.delenv(name)
    settings = tmp_path / "env.sh"
    settings.touch()
    monkeypatch.setenv("TXSSM_ENV", str(settings))
    monkeypatch.setenv("TXSSM_CHECK_BUILD", "0")
    monkeypatch.setenv("PATH", f"{folder}:{before['PATH']}")
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    found = Cluster(folder)
    found.holds()
    yield found
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


MICRO = "training.micro_batch_size=1"
# No data, no tokenizer: nothing but the model.
FIELDS = ("megatron.mock_data=true", "logging.eval_iters=1", MICRO)
LAYOUT = ("--nodes=2", "--nproc-per-node=2")


def submit_demo(*words: str, fields: tuple[str, ...] = (), layout: tuple[str, ...] = LAYOUT) -> int:
    """The exit code."""
    return main(["submit", "demo_cpu", *layout, *(f"--set={text}" for text in (*FIELDS, *fields)), *words])


def assert_refused(cluster: Cluster, capsys: pytest.CaptureFixture[str], code: int, *reasons: str) -> None:
    """With one clear line, before anything was queued or written."""
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, ""), captured
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    for reason in reasons:
        assert reason in captured.err
    assert cluster.queued == [] and cluster.cancelled == []
    assert list(Path.cwd().iterdir()) == []


# --- Refusals.


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


# --- What is written and queued.


def test_the_run_folder_of_a_submission(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit_demo("--time=1:00:00", "--partition=main", "--sbatch=exclusive", fields=("training.seed=7",)) == 0
    run = Path.cwd() / "runs" / "demo"
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoints",
        "code",
        "logs",
        "pretrain.sbatch",
        "recipe.yaml",
        "submission.json",
    ]
    frozen = load_recipe(run / "recipe.yaml")
    assert frozen == load_recipe("demo_cpu", [*FIELDS, "training.seed=7", f"run_directory={run}"])
    script = (run / "pretrain.sbatch").read_text()
    options = {line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")}
    assert options >= {
        "job-name=demo_cpu-pretrain",
        f"output={run}/logs/pretrain-%j.out",
        "nodes=2",
        "ntasks-per-node=2",
        "time=1:00:00",
        "partition=main",
        "exclusive",
        "signal=TERM@120",
    }
    assert not any(option.startswith("gpus") for option in options)
    limits = "--start-timeout=1800 --step-timeout=1800 --save-timeout=1800 --stop-before=120 --preflight-timeout=300"
    words = f"{shlex.quote(f'{run}/recipe.yaml')} {limits} --restarts=3 --max-requeues=10"
    assert f"\nset -- {words}\n" in script
    (queued,) = cluster.queued
    assert queued[0] == "--parsable" and Path(queued[-1]).resolve() == run / "pretrain.sbatch"
    record = json.loads((run / "submission.json").read_text())
    assert record["jobs"] == {"pretrain": ["101"]}
    assert (record["recipe"], record["nodes"], record["nproc_per_node"], record["gpus_per_node"]) == (
        "demo_cpu",
        2,
        2,
        0,
    )
    assert record["overrides"] == [*FIELDS, "training.seed=7"]
    assert record["directory"] == str(Path.cwd())
    assert "pretrain: job 101 (2 nodes x 2 processes)\n" in capsys.readouterr().out


def test_limits_and_gpus_reach_the_script(cluster: Cluster) -> None:
    layout = ("--nodes=1", "--gpus-per-node=4")
    timeouts = ("--start-timeout=70", "--step-timeout=60", "--save-timeout=80", "--preflight-timeout=9")
    assert submit_demo("--stop-before=300", "--max-requeues=3", "--restarts=0", *timeouts, layout=layout) == 0
    script = Path("runs/demo/pretrain.sbatch").read_text()
    assert "#SBATCH --gpus-per-node=4\n" in script and "#SBATCH --ntasks-per-node=4\n" in script
    assert "#SBATCH --signal=TERM@300\n" in script
    words = "--start-timeout=70 --step-timeout=60 --save-timeout=80 --stop-before=300 --preflight-timeout=9"
    assert f" {words} --restarts=0 --max-requeues=3\n" in script


def test_spare_nodes_are_asked_for_and_not_trained_on(cluster: Cluster) -> None:
    assert submit_demo("--spare=2") == 0
    script = Path("runs/demo/pretrain.sbatch").read_text()
    assert "#SBATCH --nodes=4\n" in script and " --nodes=2\n" in script
    # Else a lost node would end the job.
    assert "#SBATCH --no-kill\n" in script
    assert json.loads(Path("runs/demo/submission.json").read_text())["nodes"] == 2


def test_the_sites_options_hold_unless_the_user_says_otherwise(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "env.sh").write_text(
        "TXSSM_SBATCH_OPTIONS='exclusive mem=0 partition=site time=1:00:00'\nTXSSM_GPUS_PER_NODE=4\n"
    )
    assert submit_demo("--partition=mine", "--sbatch=mem=1G", layout=("--nodes=1",)) == 0
    script = Path("runs/demo/pretrain.sbatch").read_text()
    for line in ("exclusive", "mem=1G", "partition=mine", "time=1:00:00", "gpus-per-node=4"):
        assert f"#SBATCH --{line}\n" in script


def test_spare_nodes_are_asked_for(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit_demo("--spare=1") == 0
    script = Path("runs/demo/pretrain.sbatch").read_text()
    assert "#SBATCH --nodes=3\n" in script and "#SBATCH --ntasks-per-node=2\n" in script
    # The supervisor trains on so many.
    assert script.splitlines()[-3].endswith(" --nodes=2")
    assert "pretrain: job 101 (2 nodes x 2 processes and 1 spare)\n" in capsys.readouterr().out
    record = json.loads(Path("runs/demo/submission.json").read_text())
    assert (record["nodes"], record["spare_nodes"]) == (2, 1)


def test_costly_defaults_of_a_gpu_job_are_named(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    layout = ("--nodes=1", "--gpus-per-node=4")
    assert submit_demo("--dry-run", layout=layout) == 0
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: this job does not ask for cpus-per-task=N (") and "--sbatch OPTION" in warning
    assert submit_demo("--dry-run", *(f"--sbatch={text}" for text in ("exclusive", "mem=0")), layout=layout) == 0
    assert capsys.readouterr().err == ""


def test_the_same_run_from_another_folder(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # run_directory is runs/demo, from where it was submitted first.
    assert submit_demo() == 0
    run = Path.cwd() / "runs" / "demo"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["submit", str(run / "recipe.yaml"), *LAYOUT]) == 0
    assert [Path(words[-1]) for words in cluster.queued] == [run / "pretrain.sbatch"] * 2
    assert list(Path.cwd().iterdir()) == []
    frozen = load_recipe(run / "recipe.yaml")
    assert (frozen.run_path, frozen.checkpoint_path) == (run, run / "checkpoints")


def test_a_finished_run_needs_no_job(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = load_recipe("demo_cpu", FIELDS)
    recipe.checkpoint_path.mkdir(parents=True)
    (recipe.checkpoint_path / "latest_checkpointed_iteration.txt").write_text(str(recipe.train_iters))
    (recipe.checkpoint_path / f"iter_{recipe.train_iters:07d}").mkdir()
    (recipe.checkpoint_path / f"iter_{recipe.train_iters:07d}" / ".metadata").write_text("index")
    assert submit_demo() == 0
    assert "demo_cpu: already finished; runs/demo/checkpoints holds step 320" in capsys.readouterr().out
    assert cluster.queued == []


def test_a_submission_after_other_jobs(cluster: Cluster) -> None:
    assert submit_demo("--after=7", "--after=8") == 0
    assert cluster.queued[0][1:-1] == ["--dependency=afterok:7:8"]


@pytest.mark.parametrize("answer", ["17", "17;cluster"])
def test_the_jobs_number(cluster: Cluster, answer: str) -> None:
    (cluster.folder / "answer").write_text(f"{answer}\n")
    assert submit_demo() == 0
    assert json.loads(Path("runs/demo/submission.json").read_text())["jobs"] == {"pretrain": ["17"]}


@pytest.mark.parametrize("answer", ["\n", "Submitted batch job 17\n", "Usage: sbatch [OPTIONS]\n"])
def test_an_answer_that_is_no_number(cluster: Cluster, capsys: pytest.CaptureFixture[str], answer: str) -> None:
    (cluster.folder / "answer").write_text(answer)
    assert submit_demo() == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: sbatch ") and captured.err.count("\n") == 1


def test_a_refusal_at_the_end_leaves_no_job_behind(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    (cluster.folder / "refuse_number").write_text("1")
    assert submit_demo() == 2
    assert "Socket timed out" in capsys.readouterr().err
    assert cluster.queued == [] and cluster.cancelled == []
    assert json.loads(Path("runs/demo/submission.json").read_text())["jobs"] == {}


# --- From Python.


def test_submit_from_python_queues_what_the_command_line_does(cluster: Cluster) -> None:
    limits = Limits(step_timeout=60, restarts=0)
    words = ("--after=7", "--time=2:00:00", "--sbatch=mem=0", "--spare=1", "--step-timeout=60", "--restarts=0")
    assert submit_demo(*words) == 0
    script, record = (Path(f"runs/demo/{name}").read_text() for name in ("pretrain.sbatch", "submission.json"))
    given: dict[str, Any] = {"after": [7], "time": "2:00:00", "sbatch": ["mem=0"], "spare": 1, "limits": limits}
    assert submit.submit("demo_cpu", nodes=2, nproc_per_node=2, overrides=FIELDS, **given) == 0
    assert Path("runs/demo/pretrain.sbatch").read_text() == script
    assert cluster.queued[0] == cluster.queued[1]
    ours, theirs = json.loads(Path("runs/demo/submission.json").read_text()), json.loads(record)
    for name in ("command", "submitted", "jobs"):
        del ours[name], theirs[name]
    assert ours == theirs


def test_the_command_that_submits_again_what_python_submitted(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every argument, changed; parsed, it asks for the same."""
    request = Request(
        "a recipe.yaml",
        nodes=3,
        gpus_per_node=4,
        nproc_per_node=4,
        spare=1,
        time="1-0",
        partition="big",
        account="us",
        sbatch=("exclusive", "mem=0"),
        overrides=("data.train=[a b]", "name=x"),
        after=("7", "8"),
        chain=True,
        corpus="c",
        dry_run=True,
        freeze_code=False,
        limits=Limits(*range(1, 8)),
    )
    assert all(getattr(request, each.name) != each.default for each in fields(Request))
    asked = []
    monkeypatch.setattr(submit, "plan_submission", lambda request, *_: asked.append(request))
    assert main(shlex.split(request.command)[1:]) == 0
    assert asked == [request]


def test_an_error_from_python_is_raised(cluster: Cluster) -> None:
    with pytest.raises(UserError, match="--step-timeout 0 must be at least 1"):
        submit.submit("demo_cpu", nodes=1, nproc_per_node=2, limits=Limits(step_timeout=0))
    assert cluster.queued == []


# --- Chains.


@pytest.fixture
def corpus(tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, ...]]:
    """The fields of a run on a corpus that counts as sharded."""
    monkeypatch.setattr(submit, "_is_sharded", lambda directory: True)
    monkeypatch.setattr(submit, "check_run", lambda recipe, world_size: None)
    yield ("data.corpus=corpus", "data.tokenizer_type=NullTokenizer", MICRO)


def submit_chain(corpus: tuple[str, ...], *words: str) -> int:
    return main(["submit", "demo_cpu", *LAYOUT, "--chain", *(f"--set={text}" for text in corpus), *words])


def test_a_chain_is_queued_one_after_the_other(cluster: Cluster, corpus: tuple[str, ...]) -> None:
    assert submit_chain(corpus, "--after=7") == 0
    stages = [Path(words[-1]).stem for words in cluster.queued]
    assert stages == ["pretrain", "convert", "evaluate"]
    dependencies = [words[1:-1] for words in cluster.queued]
    assert dependencies == [[f"--dependency=afterok:{job}"] for job in ("7", "101", "102")]
    record = json.loads(Path("runs/demo/submission.json").read_text())
    assert record["jobs"] == {"pretrain": ["101"], "convert": ["102"], "evaluate": ["103"]}
    run = Path.cwd() / "runs" / "demo"
    assert f"\nset -- {run} {run}/export\n" in (run / "convert.sbatch").read_text()
    evaluate = (run / "evaluate.sbatch").read_text()
    assert "#SBATCH --nodes=2\n" in evaluate and "#SBATCH --ntasks-per-node=2\n" in evaluate
    # One core is enough.
    assert "#SBATCH --nodes=1\n" in (run / "convert.sbatch").read_text()


def test_a_chain_ends_with_the_tasks_of_the_recipe(cluster: Cluster, corpus: tuple[str, ...]) -> None:
    assert submit_chain(corpus, "--set", "evaluation.tasks=[piqa]", "--set", "evaluation.limit=5") == 0
    run = Path.cwd() / "runs" / "demo"
    assert [Path(words[-1]).stem for words in cluster.queued][-2:] == ["evaluate", "harness"]
    assert cluster.queued[-1][1:-1] == ["--dependency=afterok:103"]
    harness = (run / "harness.sbatch").read_text()
    assert f"\nset -- {run} --trust-recipe\n" in harness and "#SBATCH --ntasks-per-node=2\n" in harness


@pytest.mark.parametrize(
    ("tasks", "reason"),
    [
        ("[piqa, my.yaml]", "evaluation.tasks: my.yaml: no such file"),
        ("[piqa, a b]", "evaluation.data=no sets: no such folder; `txssm eval fetch 'no sets' --tasks piqa 'a b'`"),
    ],
)
def test_tasks_that_the_last_job_would_not_find(
    cluster: Cluster, corpus: tuple[str, ...], capsys: pytest.CaptureFixture[str], tasks: str, reason: str
) -> None:
    code = submit_chain(corpus, "--set", f"evaluation.tasks={tasks}", "--set", "evaluation.data=no sets")
    assert_refused(cluster, capsys, code, reason)


def test_tasks_that_lm_eval_does_not_have(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `task_manager` says it, which would take seconds."""

    def refuse(names: list[str]) -> None:
        assert names == ["piqq"]
        raise UserError("--tasks piqq: lm_eval has no such task")

    monkeypatch.setattr(harness_tasks, "task_manager", refuse)
    code = submit_demo(fields=("evaluation.tasks=[paper, piqq, my.yaml]",))
    assert_refused(cluster, capsys, code, "evaluation.tasks piqq: lm_eval has no such task")


@pytest.mark.parametrize("number", [2, 3])
def test_a_chain_that_breaks_off_is_taken_back(
    cluster: Cluster, corpus: tuple[str, ...], capsys: pytest.CaptureFixture[str], number: int
) -> None:
    (cluster.folder / "refuse_number").write_text(str(number))
    assert submit_chain(corpus) == 2
    assert "Socket timed out" in capsys.readouterr().err
    assert cluster.cancelled == ["101", "102"][: number - 1]


def test_a_disk_that_fills_up_takes_the_chain_back(
    cluster: Cluster, corpus: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = submission.write_json

    def full(path: Path, data: dict) -> None:
        if len(data["jobs"]) == 2:
            raise OSError(28, "No space left on device")
        write(path, data)

    monkeypatch.setattr(submission, "write_json", full)
    assert submit_chain(corpus) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert cluster.cancelled == ["101", "102"]


def test_a_job_that_is_gone_does_not_keep_the_others(
    cluster: Cluster, corpus: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    (cluster.folder / "refuse_number").write_text("3")
    with (cluster.folder / "scancel").open("a") as file:
        file.write('[ "$1" = 101 ] && { echo "scancel: error: Kill job error on job id 101" >&2; exit 1; }\nexit 0\n')
    assert submit_chain(corpus) == 2
    # The reason, not what followed from it.
    assert "Socket timed out" in capsys.readouterr().err
    assert cluster.cancelled == ["101", "102"]


def test_a_chain_does_not_convert_into_what_is_there(
    cluster: Cluster, corpus: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("runs/demo/export").mkdir(parents=True)
    assert submit_chain(corpus) == 2
    assert "export exists" in capsys.readouterr().err
    assert cluster.queued == []


def test_a_chain_without_texts_is_refused_before_anything_is_written(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts").mkdir()
    corpus = web_recipe(tmp_path, tmp_path / "texts")
    code = submit_chain((f"data.corpus={tmp_path}/corpus",), f"--corpus={corpus}")
    assert_refused(cluster, capsys, code, "texts holds no .parquet", "it is empty, or not a folder")


def test_a_chain_needs_a_corpus(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(cluster, capsys, submit_demo("--chain"), "--chain shards data.corpus")


def test_a_corpus_recipe_that_makes_another(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["submit", "demo_cpu", *LAYOUT, "--chain", "--corpus=smollm_corpus"])
    assert_refused(cluster, capsys, code, "smollm_corpus", "data.corpus=runs/demo/data/vocab_1024")


# --- The environment.


def test_variables_do_not_overrule_what_the_script_states(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    overruling = [
        "PARTITION",
        "TIMELIMIT",
        "JOB_NAME",
        "SIGNAL",
        "OPEN_MODE",
        "NO_REQUEUE",
        "MEM_PER_NODE",
        "MEM_PER_CPU",
    ]
    # What makes another job of it, or lets sbatch wait for its end.
    overruling += ["ARRAY_INX", "WAIT", "CLUSTERS"]
    # What takes the job's words elsewhere, its input from what is not there, or lets it live on without a node.
    overruling += ["ERROR", "OUTPUT", "INPUT", "NO_KILL", "GPUS", "GPUS_PER_NODE", "GPUS_PER_TASK"]
    for name in overruling:
        monkeypatch.setenv(f"SBATCH_{name}", "x")
    for name in ("SLURM_JOB_ID", "SLURM_CPUS_PER_TASK", "SLURM_NTASKS", "SLURM_MEM_PER_NODE", "SLURM_EXPORT_ENV"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SBATCH_ACCOUNT", "site")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm/slurm.conf")
    monkeypatch.setenv("TXSSM_TEST_A", "kept")
    assert submit_demo("--partition=main", "--time=1:00:00", "--sbatch=mem=0") == 0
    environment = cluster.environment
    slurms = {name for name in environment if name.startswith(("SBATCH_", "SLURM_"))}
    # Not stated: the user's own default.
    assert slurms - {"SBATCH_CLUSTERS"} == {"SBATCH_ACCOUNT", "SLURM_CONF"}
    assert environment["TXSSM_TEST_A"] == "kept"


def test_the_check_has_the_same_environment(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SBATCH_PARTITION", "x")
    script = "#!/bin/bash\n#SBATCH --partition=main\n"
    assert "SBATCH_PARTITION" not in slurm._environment(script)
    assert "SBATCH_PARTITION" in slurm._environment("#!/bin/bash\n# SBATCH --partition=main\n")


# --- --dry-run.


def test_a_dry_run_prints_and_leaves_all_as_it_is(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit_demo("--dry-run", "--partition=main") == 0
    captured = capsys.readouterr()
    assert "#SBATCH --partition=main\n" in captured.out
    assert "demo_cpu: 2 nodes x 2 processes; checked, nothing written, nothing queued\n" in captured.out
    assert captured.err == ""
    assert cluster.queued == [] and list(Path.cwd().iterdir()) == []


def test_a_dry_run_asks_the_cluster(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.refuses("#SBATCH --partition=nowhere")
    assert_refused(cluster, capsys, submit_demo("--dry-run", "--partition=nowhere"), "Invalid partition")


def test_a_dry_run_without_a_cluster(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Bash for the settings, but no sbatch.
    (tmp_path / "plain").mkdir()
    for name in ("bash", "env", "git"):
        (tmp_path / "plain" / name).symlink_to(f"/usr/bin/{name}")
    monkeypatch.setenv("PATH", str(tmp_path / "plain"))
    assert submit_demo("--dry-run") == 0
    captured = capsys.readouterr()
    assert "#SBATCH --nodes=2\n" in captured.out
    assert captured.err == "there is no sbatch on this machine: not checked against a cluster\n"
    assert list(Path.cwd().iterdir()) == []
    assert_refused(cluster, capsys, submit_demo("--dry-run", "--sbatch=-N2"), "must be a long option")
