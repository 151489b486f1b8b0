"""why, cancel and logs of a run, with stand-ins for Slurm's commands."""

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_txssm.cli.main import main
from megatron_txssm.errors import UserError
from megatron_txssm.jobs import logs, run_jobs
from megatron_txssm.jobs.run_jobs import check_no_other_job, jobs_of
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.slurm.client import queue
from megatron_txssm.training.launch import run_lock
from megatron_txssm.training.launch.run_lock import RunLock
from tests.jobs.some_attempt import some_attempt
from tests.jobs.stand_in_slurm import AWAY, away, output, told, write_command
from tests.slurm.some_queue import write_queue

COMMAND = "txssm submit demo_cpu --nodes 2 --nproc-per-node 2"


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    recipe = load_recipe("demo_cpu", [f"run_directory={tmp_path}/runs/demo"])
    recipe.run_path.mkdir(parents=True)
    (recipe.run_path / "logs").mkdir()
    (recipe.run_path / "recipe.yaml").write_text(recipe.frozen(recipe.run_path))
    submit(recipe, pretrain=["17"])
    return recipe


def submit(recipe: Recipe, **jobs: list[str]) -> None:
    record = {"command": COMMAND, "directory": "/home/somebody", "jobs": jobs}
    (recipe.run_path / "submission.json").write_text(json.dumps(record))


def ours(recipe: Recipe, number: int = 17, state: str = "RUNNING", **more: str) -> dict[str, str | int]:
    return {"job_id": number, "state": state, "command": f"{recipe.run_path}/pretrain.sbatch"} | more


def steps(recipe: Recipe, last: int) -> None:
    lines = (json.dumps({"iteration": step, "grad_norm": 1.0}) for step in range(1, last + 1))
    (recipe.run_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def ended(recipe: Recipe, cause: str, **fields: Any) -> None:
    fields = {"job_id": "17", "started": time.time() - 100, "ended": time.time() - 10, "last_step": 25, **fields}
    some_attempt(recipe.run_path, cause=cause, **fields).save()


# --- Run folders of other versions.


@pytest.fixture
def other_versions(cluster: Path, recipe: Recipe) -> Recipe:
    """Attempts of the first version, whose record of a hang has fewer fields, of this one, and of a later one."""
    first = {"job_id": "17", "nodes": ["n1"], "nproc_per_node": 1, "started": 1000.0, "ended": 2000.0, "last_step": 2}
    hung = first | {"hang": {"seconds": 61.0, "silent_ranks": [0]}, "started": 2100.0, "ended": 2300.0, "cause": "hung"}
    later = hung | {
        "started": 2400.0,
        "ended": 2500.0,
        "cause": "meteorite_strike",
        "detail": "in Chelyabinsk",
        "hang": {"during": "evaluation", "stacks": {"0": "…"}},
        "impact": {"megatons": 0.4},
        "schema": 7,
    }
    for number, fields in enumerate((first, hung, later), 1):
        folder = recipe.run_path / "attempts" / f"{number:04d}"
        folder.mkdir(parents=True)
        (folder / "attempt.json").write_text(json.dumps(fields))
    # The first version wrote no times.
    lines = ({"iteration": step, "lm loss": 3.0, "grad_norm": 1.0, "tokens_per_second": 9.0} for step in (1, 2))
    (recipe.run_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return recipe


def test_attempts_of_other_versions_are_explained(
    cluster: Path, other_versions: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    first, hung, later, *_ = told(capsys, "why", "demo", "--all").splitlines()
    assert "to step 2" in first and "its end was not recorded" in first
    assert hung.endswith("the trainer hung")
    assert later.endswith("meteorite strike: in Chelyabinsk")
    why = told(capsys, "why", "demo")
    assert "attempt 3 (job 17) ended after 0:01:40: meteorite strike\n" in why
    assert "read the job's output; submit it again: cd /home/somebody && " in why


def test_jobs_of_runs_of_other_versions_are_listed(
    cluster: Path, other_versions: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    write_queue(cluster, ours(other_versions))
    listed = told(capsys, "jobs")
    assert "runs/demo" in listed and "2 of 320" in listed
    assert "unknown" in told(capsys, "jobs", "--goodput").splitlines()[1]


def test_an_open_attempt_of_a_later_version_is_diagnosed(
    cluster: Path, other_versions: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its supervisor was killed after the hang, so that this version looks for the cause."""
    path = other_versions.run_path / "attempts" / "0003" / "attempt.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"cause": None, "ended": None}))
    assert "the trainer hung\n  details        no step\n" in told(capsys, "why", "demo")


# --- why, while Slurm does not answer.


def test_a_job_that_trains_is_not_said_to_have_ended(
    cluster: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    away(cluster)
    steps(recipe, 12)
    some_attempt(recipe.run_path, job_id="17", started=time.time()).save()
    with RunLock(recipe):
        why = told(capsys, "why", "demo")
    assert "attempt 1 of job 17 trains (process " in why and "step 12 of" in why and AWAY in why
    assert "ended after" not in why and "what to do" not in why


def test_nor_one_that_gives_no_sign_of_life(cluster: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    # Its trainer starts only now, or it was killed.
    away(cluster)
    some_attempt(recipe.run_path, job_id="17", started=time.time()).save()
    why = told(capsys, "why", "demo")
    assert "attempt 1 of job 17 may run or have ended" in why and "ended after" not in why and AWAY in why


def test_an_end_on_record_is_told_whether_slurm_answers_or_not(
    cluster: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    away(cluster)
    ended(recipe, "killed", detail="killed by SIGKILL", rank=1, node="n1", action="the job was requeued")
    why = told(capsys, "why", "demo")
    assert "a rank was killed by a signal" in why and "memory is the usual reason" in why and AWAY in why
    assert "no such job" not in why


def test_a_trainer_that_lives_although_slurm_knows_no_job(
    cluster: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    # This login node is another cluster's.
    some_attempt(recipe.run_path, job_id="17", started=time.time()).save()
    with RunLock(recipe):
        assert "trains, although Slurm does not show its job (process " in told(capsys, "why", "demo")


def test_what_died_long_ago_is_not_waited_for(
    cluster: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_jobs, "living_holder", lambda *_: pytest.fail("it waits for a sign of life"))
    lock = recipe.run_path / run_lock.NAME
    lock.write_text("{}")
    os.utime(lock, (time.time() - 120, time.time() - 120))
    some_attempt(recipe.run_path, job_id="17", started=time.time() - 300).save()
    why = told(capsys, "why", "demo")
    assert "ended after" in why and "for an unknown reason" in why


# --- why: what to do.


def test_a_preempted_job_that_slurm_has_forgotten_is_submitted_again(
    cluster: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    ended(recipe, "preempted", action="Slurm ended the job; it starts again what it preempted and what lost a node")
    why = told(capsys, "why", "demo")
    assert f"PreemptMode=CANCEL, or --no-requeue); submit it again: cd /home/somebody && {COMMAND}" in why
    write_queue(cluster, ours(recipe, state="PENDING", reason="BeginTime"))
    why = told(capsys, "why", "demo")
    assert "nothing: job 17 continues by itself" in why and "job 17 is PENDING (BeginTime)" in why


def test_the_end_of_a_killed_job_is_that_of_its_output(
    cluster: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not the moment when somebody asks."""
    output = recipe.run_path / "logs" / "pretrain-17.out"
    output.write_text("slurmstepd-n1: error: *** JOB 17 ON n1 CANCELLED AT 2026-11-26T07:45:24 ***\n")
    os.utime(output, (5000.0, 5000.0))
    some_attempt(recipe.run_path, job_id="17", started=4900.0, output=str(output)).save()
    assert "ended after 0:01:40: somebody cancelled the job" in told(capsys, "why", "demo")


def test_a_refused_requeue(cluster: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    ended(recipe, "failed", detail="IndexError: 7", action="the job was not requeued: it has failed 10 times before")
    why = told(capsys, "why", "demo")
    assert "it has failed 10 times before" in why and f"submit it again: cd /home/somebody && {COMMAND}" in why


def test_a_requeue_that_slurm_refused(cluster: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    ended(recipe, "time_limit", action="the job was requeued")
    said = "error: scontrol requeue 17: Requested operation is presently disabled for job 17\n"
    (recipe.run_path / "logs" / "pretrain-17.out").write_text(f"iteration 25/60\n{said}")
    why = told(capsys, "why", "demo")
    assert "the job was requeued, but Slurm no longer has such a job" in why and said.strip() in why
    assert f"submit it again to continue from its checkpoint: cd /home/somebody && {COMMAND}" in why


@pytest.mark.parametrize(
    ("reason", "todo"),
    [
        ("JobHeldUser", "scontrol release 17"),
        ("JobHeldAdmin", "scontrol release 17"),
        ("job requeued in held state", "scontrol release 17"),
        ("job_requeued_in_held_state", "scontrol release 17"),
        ("launch failed requeued held", "scontrol release 17"),
        ("DependencyNeverSatisfied", "scancel 17"),
        ("PartitionTimeLimit", "submit it with less"),
        ("QOSMaxNodePerUserLimit", "a limit of its QOS"),
        ("AssocGrpNodeLimit", "a limit of its account"),
        ("ReqNodeNotAvail, UnavailableNodes:n[1-2]", "sinfo --list-reasons"),
        (
            "Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions",
            "sinfo --list-reasons",
        ),
    ],
)
def test_a_job_that_waits_for_somebody(
    cluster: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str], reason: str, todo: str
) -> None:
    write_queue(cluster, ours(recipe, state="PENDING", reason=reason, nodes=""))
    assert todo in told(capsys, "why", "demo")
    assert f"job 17: {told(capsys, 'jobs').split('job 17: ')[1]}".count(todo) == 1
    # Where an attempt has ended, it comes with what that needs.
    ended(recipe, "disk_full", detail="OSError: [Errno 122] Disk quota exceeded")
    why = told(capsys, "why", "demo")
    assert "quota -s" in why and why.count(todo) == 1


@pytest.mark.parametrize("reason", ["Priority", "Resources", "BeginTime", "Dependency"])
def test_a_job_that_only_waits(cluster: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str], reason: str) -> None:
    write_queue(cluster, ours(recipe, state="PENDING", reason=reason, nodes=""))
    assert "what to do     nothing: " in told(capsys, "why", "demo")
    assert "job 17: " not in told(capsys, "jobs")


def test_nan_names_the_sound_steps_and_the_commands(
    cluster: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (10, 20):
        (recipe.checkpoint_path / f"iter_{step:07d}").mkdir(parents=True)
        for name in (".metadata", "metadata.json"):
            (recipe.checkpoint_path / f"iter_{step:07d}" / name).write_text("{}")
    tracker = recipe.checkpoint_path / "latest_checkpointed_iteration.txt"
    tracker.write_text("20")
    ended(recipe, "nan", detail="FloatingPointError: the loss is NaN", rank=1, node="n1")
    why = told(capsys, "why", "demo")
    assert f"the last sound step is 20; to go back to step 10: echo 10 > {tracker}" in why
    rate = f"{recipe.optimizer.learning_rate / 2:g}"
    changes = f"--set optimizer.learning_rate={rate} --set optimizer.schedule_at_resume=recipe"
    assert f"cd /home/somebody && {COMMAND} {changes}" in why
    # A trainer that has looked for them knows better.
    said = "The last sound checkpoint is that of step 10: its weights were read and are finite. To go on from it: …"
    ended(recipe, "nan", detail=f"FloatingPointError: the loss is NaN. {said}", rank=1, node="n1")
    assert f"what to do     {said}" in told(capsys, "why", "demo")


def test_a_result_that_was_not_finite_on_one_node_only(
    cluster: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    ended(recipe, "nan", detail="FloatingPointError: NaN", rank=2, node="n2")
    ended(recipe, "time_limit", number=2, last_step=25, nodes=["n1", "n3"])
    assert "did not come again" not in told(capsys, "why", "demo", "--all")
    ended(recipe, "time_limit", number=3, last_step=40, nodes=["n1", "n2"])
    assert "did not come again" not in told(capsys, "why", "demo", "--all")
    ended(recipe, "time_limit", number=4, last_step=40, nodes=["n1", "n3"])
    first, *others = told(capsys, "why", "demo", "--all").splitlines()[:4]
    assert "without n2 it did not happen again: have its GPUs tested" in first
    assert not any("did not come again" in line for line in others)


def test_why_from_anywhere_of_a_recipe_with_relative_paths(
    cluster: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # As earlier versions kept it.
    (recipe.run_path / "recipe.yaml").write_text("extends: demo_cpu\nname: demo\nrun_directory: runs/demo\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    steps(recipe, 12)
    recipe.checkpoint_path.mkdir()
    (recipe.checkpoint_path / "latest_checkpointed_iteration.txt").write_text("10")
    some_attempt(recipe.run_path, job_id="17", started=time.time() - 300, done_before=0).save()
    why = told(capsys, "why", str(recipe.run_path))
    assert "last step      12 of" in why and f"step 10 in {recipe.checkpoint_path}" in why


# --- why: the stages of a chain.


@pytest.fixture
def chain(recipe: Recipe, tmp_path: Path) -> Recipe:
    """Jobs 15 (an array), 17, 18 and 19; the shards of a corpus have logs."""
    text = (recipe.run_path / "recipe.yaml").read_text()
    assert "corpus:" in text
    (recipe.run_path / "recipe.yaml").write_text(
        "\n".join(f"  corpus: {tmp_path}/corpus" if "  corpus:" in line else line for line in text.splitlines())
    )
    submit(recipe, shard=["15"], pretrain=["17"], convert=["18"], evaluate=["19"])
    (tmp_path / "corpus" / "logs" / "web" / "slurm_logs").mkdir(parents=True)
    return recipe


def test_a_chain_that_runs_through(
    cluster: Path, chain: Recipe, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    logs = tmp_path / "corpus" / "logs" / "web" / "slurm_logs"
    for task in range(3):
        (logs / f"15_{task}.out").write_text(output("shard", 0))
    ended(chain, "finished")
    (chain.run_path / "logs" / "convert-18.out").write_text(output("convert", 0))
    write_queue(cluster, {"job_id": 19, "state": "RUNNING", "command": f"{chain.run_path}/evaluate.sbatch"})
    why = told(capsys, "why", "demo")
    assert "shard          job 15: 3 tasks are finished, 0 failed\n" in why
    assert "convert        job 18 is finished" in why and "evaluate       job 19 is RUNNING on n1" in why


def test_a_failed_shard_and_what_it_took_along(
    cluster: Path, chain: Recipe, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    logs = tmp_path / "corpus" / "logs" / "web" / "slurm_logs"
    (logs / "15_0.out").write_text(output("shard", 0))
    noise = "srun: error: n1: task 0: Exited with exit code 1"
    # Of the first start, which a signal ended, nothing counts.
    first = output("shard", 137, "the wrong words")
    (logs / "15_1.out").write_text(first + output("shard", 1, "Traceback", "ValueError: no JSON in line 7", noise))
    why = told(capsys, "why", "demo")
    assert "1 tasks are finished, 1 failed; 15_1: ValueError: no JSON in line 7" in why
    assert f"finished tasks are kept: cd /home/somebody && {COMMAND}" in why
    assert "job 18 never started: Slurm removed it since pretrain did not succeed" in why
    assert f"when convert has succeeded: sbatch {chain.run_path.relative_to(tmp_path)}/evaluate.sbatch" in why


def test_a_failed_export(cluster: Path, chain: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    ended(chain, "finished")
    log = chain.run_path / "logs" / "convert-18.out"
    log.write_text(output("convert", 2, "error: export is there; remove it"))
    why = told(capsys, "why", "demo")
    assert "job 18 failed (exit code 2): error: export is there; remove it" in why and "convert-18.out" in why
    assert "fix the cause, then: sbatch runs/demo/convert.sbatch" in why
    # Ended by Slurm, before it could say so.
    cancelled = "[2026-11-26T06:36:16.026] error: *** JOB 18 ON n1 CANCELLED AT 2026-11-26T06:36:16 DUE {} ***"
    log.write_text(output("convert", None, cancelled.format("TO TIME LIMIT")))
    assert "job 18 ended: the time limit was hit" in told(capsys, "why", "demo")
    log.write_text(output("convert", None, cancelled.format("to SIGNAL Terminated")))
    assert "job 18 ended: somebody cancelled the job" in told(capsys, "why", "demo")
    log.write_text(output("convert", None, "halfway"))
    assert "job 18 ended: the reason is unknown; its last output: halfway" in told(capsys, "why", "demo")
    away(cluster)
    assert "job 18: unknown, since Slurm does not answer" in told(capsys, "why", "demo")


# --- Which jobs are a run's.


def test_a_runs_jobs_by_number_by_script_and_by_attempt(cluster: Path, recipe: Recipe, tmp_path: Path) -> None:
    other = tmp_path / "runs" / "other"
    other.mkdir()
    (other / "submission.json").write_text("{}")
    some_attempt(recipe.run_path, job_id="22").save()
    (tmp_path / "link").symlink_to(recipe.run_path)
    write_queue(
        cluster,
        ours(recipe, 17),
        # Of three who submitted at once, submission.json knows the last.
        ours(recipe, 16),
        ours(recipe, 15, command=f"{tmp_path}/link/pretrain.sbatch"),
        {"job_id": 18, "command": "./evaluate.sbatch", "folder": str(recipe.run_path)},
        # By hand, with a script of somebody's own: its attempt is here.
        {"job_id": 22, "command": "/home/somebody/my.sbatch"},
        # Over, and of others.
        ours(recipe, 14, "COMPLETED"),
        {"job_id": 30, "command": f"{other}/pretrain.sbatch"},
        {"job_id": 31, "command": "/home/somebody/my.sbatch"},
    )
    assert [job.job_id for job in jobs_of(recipe.run_path, queue())] == ["15", "16", "17", "18", "22"]


def test_a_number_that_is_another_runs_now(cluster: Path, recipe: Recipe, tmp_path: Path) -> None:
    # The folder was copied from another cluster, or to another run.
    other = tmp_path / "runs" / "other"
    other.mkdir()
    (other / "submission.json").write_text("{}")
    write_queue(cluster, {"job_id": 17, "command": f"{other}/pretrain.sbatch"})
    assert jobs_of(recipe.run_path, queue()) == []


# --- One job a folder.


@pytest.mark.parametrize("state", ["RUNNING", "SUSPENDED"])
def test_a_job_by_hand_leaves_the_one_that_runs_alone(cluster: Path, recipe: Recipe, state: str) -> None:
    """Also while that is in its preflight: its attempt is open."""
    some_attempt(recipe.run_path, job_id="17").save()
    write_queue(cluster, ours(recipe, 17, state), ours(recipe, 18))
    with pytest.raises(UserError, match=r"is in use by job 17, on n1; wait for its end, or: scancel 17$"):
        check_no_other_job(recipe.run_path, "18")
    check_no_other_job(recipe.run_path, "17")


def test_a_job_that_another_ones_trainer_stands_in_the_way_of(
    cluster: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its attempt's record is gone, or was closed by an earlier version."""
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    write_queue(cluster, ours(recipe, 17), ours(recipe, 18))
    with RunLock(recipe), pytest.raises(UserError, match="is in use by job 17"):
        check_no_other_job(recipe.run_path, "18")
    check_no_other_job(recipe.run_path, "18")


def test_a_job_whose_predecessor_has_ended_or_is_not_known(cluster: Path, recipe: Recipe) -> None:
    some_attempt(recipe.run_path, job_id="17").save()
    for queued in [(), (ours(recipe, 17, "PENDING"),), (ours(recipe, 17, "NODE_FAIL"),)]:
        write_queue(cluster, *queued, ours(recipe, 18))
        check_no_other_job(recipe.run_path, "18")
    away(cluster)
    check_no_other_job(recipe.run_path, "18")


# --- cancel.


def test_cancel_ends_all_of_them_the_waiting_ones_first(
    cluster: Path, chain: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    write_queue(cluster, ours(chain, 16), ours(chain, 17), {"job_id": "15_3"}, {"job_id": 18, "state": "PENDING"})
    out = told(capsys, "cancel", "demo")
    assert (cluster / "cancelled").read_text().split() == ["18", "17", "16", "15_3"]
    assert "cancelled job 16 (x, RUNNING)" in out


def test_cancel_says_that_slurm_does_not_answer(
    cluster: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    away(cluster)
    error = told(capsys, "cancel", "demo", code=2)
    assert "no job of runs/demo was cancelled: Slurm does not answer" in error
    assert AWAY in error and "try again when `scontrol ping`" in error
    # A number that no run here knows.
    assert "no run here was submitted as job 4711; name the run's folder" in told(capsys, "cancel", "4711", code=2)


def test_cancel_goes_on_where_one_job_cannot_be_cancelled(
    cluster: Path, chain: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    write_queue(cluster, ours(chain, 17), {"job_id": 18}, {"job_id": 19})
    write_command(
        cluster,
        "scancel",
        f"""case $1 in
          19) echo 'scancel: error: Kill job error on job id 19: Unable to contact slurm controller' >&2; exit 8 ;;
          18) echo 'scancel: error: Kill job error on job id 18: Invalid job id specified' >&2; exit 1 ;;
        esac; echo $1 >>{cluster}/cancelled""",
    )
    assert main(["cancel", "demo"]) == 2
    captured = capsys.readouterr()
    assert "cancelled job 17" in captured.out and "job 18 (x) has already ended" in captured.out
    assert "1 of 3 jobs were not cancelled: Slurm does not answer" in captured.err


def test_cancel_of_a_run_without_slurm(cluster: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    (recipe.run_path / "submission.json").unlink()
    (cluster / "squeue").unlink()
    assert "was not submitted to Slurm" in told(capsys, "cancel", "demo", code=2)


# --- logs -f.


def test_logs_follow_until_slurm_says_that_the_job_is_over(
    cluster: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(logs, "ASK_SECONDS", 0.05)
    log = recipe.run_path / "logs" / "pretrain-17.out"
    log.write_text("first\n")
    away(cluster)
    asked = cluster / "asked"
    write_command(cluster, "squeue", f"echo >>{asked}; echo '{AWAY}' >&2; exit 1")

    def come_back() -> None:
        while not asked.exists() or asked.stat().st_size < 5:
            time.sleep(0.01)
        with log.open("a") as file:
            file.write("while it was away\n")
        write_queue(cluster, ours(recipe))
        (cluster / "squeue.args").unlink(missing_ok=True)
        while not (cluster / "squeue.args").exists():
            time.sleep(0.01)
        write_queue(cluster)

    thread = threading.Thread(target=come_back)
    thread.start()
    assert main(["logs", "-f", "demo"]) == 0
    thread.join()
    captured = capsys.readouterr()
    assert captured.out == "first\nwhile it was away\n"
    assert captured.err.count("\n") == 1
    assert "unknown whether job 17 has ended, still following: Slurm does not answer" in captured.err


def test_logs_that_are_not_there_while_slurm_does_not_answer(
    cluster: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    away(cluster)
    assert "job 17 is in an unknown state" in told(capsys, "logs", "demo", code=2)
