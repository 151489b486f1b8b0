"""What `txssm submit` writes and queues; scripts play Slurm."""

import json
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from megatron_txssm.cli.main import main
from megatron_txssm.errors import UserError
from megatron_txssm.jobs import submit
from megatron_txssm.jobs.limits import Limits
from megatron_txssm.jobs.submission.request import Request
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.slurm import client as slurm
from tests.jobs.submissions.stand_in_cluster import FIELDS, LAYOUT, Cluster, assert_refused, submit_demo


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
