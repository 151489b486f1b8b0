"""The local launcher: how many processes, which port, and what it says when they end, by fault or by signal."""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_txssm.cli.main import main
from megatron_txssm.errors import UserError
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.sizes import smallest_world_size
from megatron_txssm.training import processes
from megatron_txssm.training.launch.run_lock import Holder

EXPERTS = ("model.layer_pattern=ME", "model.num_experts=4")


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    # The workers of these tests train nothing.
    monkeypatch.setattr(processes, "check_run", lambda recipe, world_size: None)
    monkeypatch.setattr(processes, "check_machine", lambda recipe, processes: None)
    return load_recipe("demo_cpu", [f"run_directory={tmp_path}/run"])


@pytest.mark.parametrize(
    ("overrides", "size"),
    [
        ([], 2),
        (["parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false"], 1),
        (["parallel.pipeline_model_parallel_size=4"], 8),
        ([*EXPERTS, "parallel.expert_model_parallel_size=4"], 8),
        ([*EXPERTS, "parallel.context_parallel_size=4", "parallel.expert_model_parallel_size=2"], 8),
        ([*EXPERTS, "parallel.context_parallel_size=2", "parallel.expert_model_parallel_size=4"], 8),
    ],
)
def test_smallest_world_size(overrides: list[str], size: int) -> None:
    assert smallest_world_size(load_recipe("demo_cpu", overrides)) == size


@pytest.mark.parametrize("nproc", ["0", "-1"])
def test_nproc_must_be_positive(nproc: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "demo_cpu", "--nproc", nproc]) == 2
    assert f"--nproc {nproc} must be at least 1" in capsys.readouterr().err


@contextlib.contextmanager
def taken_port(address: str) -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind((address, 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.mark.parametrize("address", ["localhost", "0.0.0.0"])
def test_a_port_in_use_is_named(recipe: Recipe, address: str) -> None:
    with taken_port(address) as port:
        with pytest.raises(UserError, match=rf"--port {port} cannot be used: .*in use.*; use another"):
            processes.launch(recipe, 1, [], port=port)
    assert not recipe.run_path.exists()


def test_an_impossible_port_is_named(recipe: Recipe) -> None:
    with pytest.raises(UserError, match="--port 70000 cannot be used"):
        processes.launch(recipe, 1, [], port=70000)


def test_a_port_taken_after_the_check_is_named_at_once(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_check_port", lambda port: None)
    with taken_port("0.0.0.0") as port:
        with pytest.raises(UserError, match=rf"no TCP port .*--port {port}.*in use"):
            processes.launch(recipe, 1, [], port=port)


@pytest.fixture
def launch(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """Launch workers that run a shell script in the place of Python; $RANK is theirs, $RUN the run directory."""

    def launch(script: str, nproc: int = 1) -> int:
        worker = tmp_path / "worker"
        worker.write_text(f"#!/bin/bash\nRUN={recipe.run_path}\n{script}\n")
        worker.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(worker))
        return processes.launch(recipe, nproc, ["pretrain", "demo_cpu"])

    return launch


def test_the_workers_get_the_command_and_their_ranks(launch: Callable[..., int], recipe: Recipe) -> None:
    assert launch('echo "$@ $RANK/$WORLD_SIZE $MASTER_ADDR" > $RUN/$RANK', nproc=2) == 0
    words = [(recipe.run_path / str(rank)).read_text() for rank in range(2)]
    assert words == [f"-u -m megatron_txssm.cli pretrain demo_cpu {rank}/2 localhost\n" for rank in range(2)]


@pytest.mark.parametrize(
    ("script", "wanted"),
    [
        ("[ $RANK = 0 ] && sleep 60; exit 3", "rank 1 failed (exit code 3): it ended without an error message"),
        ("[ $RANK = 0 ] && sleep 60; kill -9 $$", "rank 1 failed (exit code -9): Signal 9 (SIGKILL) received by PID"),
    ],
)
def test_a_crash_is_one_message_with_rank_and_log(
    script: str, wanted: str, launch: Callable[..., int], recipe: Recipe, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launch(script, nproc=2) == 1
    # What rank 0 would write.
    (recipe.run_path / "recipe.yaml").write_text(recipe.to_yaml())
    output = capfd.readouterr()
    assert main(["why", str(recipe.run_path)]) == 0
    told = capfd.readouterr().out
    for text in (
        "exit code      1",
        f"details        {wanted}",
        "rank_1.log",
        "last step      0 of",
        "checkpoint     none",
    ):
        assert text in told
    assert output.err.startswith(f"error: {wanted}")
    assert output.err.endswith(f"Its log: {recipe.run_path}/logs/rank_1.log\n")
    assert output.err.count("\n") == 2
    assert output.out == f"demo_cpu: 2 processes, run directory {recipe.run_path}\n"


WENT_BACK = """
[ -e $RUN/$RANK ] && exit 0
touch $RUN/$RANK
echo '{"message": {"message": "Rewind: spike at step 9", "extraInfo": {"timestamp": "1"}}}' > $TORCHELASTIC_ERROR_FILE
exit 1
"""


def test_workers_that_the_spike_guard_sent_back_start_again(
    launch: Callable[..., int], recipe: Recipe, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launch(WENT_BACK) == 0
    output = capfd.readouterr()
    assert output.out.count("starting again, as the spike guard went back") == 1
    assert output.err == ""
    assert json.loads((recipe.run_path / "ended.json").read_bytes())["exit_code"] == 0


def test_why_of_a_run_that_was_killed(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    logs = recipe.run_path / "logs"
    logs.mkdir(parents=True)
    (recipe.run_path / "recipe.yaml").write_text(recipe.to_yaml())
    (logs / "rank_0.log").write_text("begins\nstep 7 begins\n\n")
    assert main(["why", str(recipe.run_path)]) == 0
    told = capsys.readouterr().out
    assert "unexpectedly: it was killed, or the machine went down" in told
    assert "last output    step 7 begins" in told
    assert "now            not running; the command that started it resumes it" in told
    assert "job" not in told
    assert main(["cancel", str(recipe.run_path)]) == 2
    assert "was not submitted to Slurm; Ctrl-C in its terminal" in capsys.readouterr().err


def test_logs_of_a_run_on_this_machine(
    recipe: Recipe, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Followed to the end of the run; Slurm is not asked, for it may not be there."""
    monkeypatch.setattr("megatron_txssm.jobs.logs.slurm.queue", lambda: pytest.fail("asked Slurm"))
    logs = recipe.run_path / "logs"
    logs.mkdir(parents=True)
    (recipe.run_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert main(["logs", str(recipe.run_path)]) == 2 and "the run has not started" in capsys.readouterr().err
    (logs / "rank_0.log").write_text("one\ntwo\nthree\n")
    (logs / "rank_1.log").write_text("other\n")
    assert main(["logs", str(recipe.run_path), "-f", "--lines", "2"]) == 0
    assert main(["logs", str(recipe.run_path), "--rank", "1"]) == main(["why", str(recipe.run_path)]) == 0
    assert capsys.readouterr().out.startswith("two\nthree\nother\n")
    assert main(["logs", str(recipe.run_path), "--rank", "7"]) == 2
    assert "rank_7.log does not exist; it has rank_0.log, rank_1.log" in capsys.readouterr().err


def test_why_of_a_run_that_trains(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    recipe.run_path.mkdir(parents=True)
    (recipe.run_path / "recipe.yaml").write_text(recipe.to_yaml())
    # By another process than the one that asks.
    holder = Holder.myself()
    file = recipe.run_path / "running.json"
    file.touch()
    said = dataclasses.replace(holder, token="another", inode=file.stat().st_ino)
    file.write_text(json.dumps(dataclasses.asdict(said)))
    assert main(["why", str(recipe.run_path)]) == 0
    told = capsys.readouterr().out
    assert f"training now   process {holder.pid} on {holder.host}" in told
    assert "  now  " not in told and "job" not in told


def send_when(*signals: tuple[Path, int]) -> threading.Thread:
    """Send this process the signals one after another, each once its file is there."""

    def wait_and_send() -> None:
        for file, number in signals:
            end = time.monotonic() + 300
            while not file.exists() and time.monotonic() < end:
                time.sleep(0.05)
            os.kill(os.getpid(), number)

    thread = threading.Thread(target=wait_and_send)
    thread.start()
    return thread


SAVES = """
trap 'echo 12 > $RUN/checkpoints/latest_checkpointed_iteration.txt; exit 0' TERM
touch $RUN/ready; for i in $(seq 3000); do sleep 0.1; done; exit 9
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_lets_the_workers_save(
    number: int, launch: Callable[..., int], recipe: Recipe, capfd: pytest.CaptureFixture[str]
) -> None:
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    thread = send_when((recipe.run_path / "ready", number))
    assert launch(SAVES) == 128 + number
    thread.join()
    output = capfd.readouterr()
    assert "stopping after this step and saving" in output.out
    assert f"stopped; {recipe.checkpoint_path} holds step 12, from which the same command resumes" in output.out
    assert output.err == ""
    assert {n: signal.getsignal(n) for n in handlers} == handlers


def test_the_second_ctrl_c_ends_workers_that_do_not_stop(
    launch: Callable[..., int], recipe: Recipe, capfd: pytest.CaptureFixture[str]
) -> None:
    run = recipe.run_path
    thread = send_when((run / "ready", signal.SIGINT), (run / "told", signal.SIGINT))
    trains = "for i in $(seq 3000); do sleep 0.1; done; touch $RUN/end"
    assert launch(f"trap 'touch $RUN/told' TERM; touch $RUN/ready; {trains}") == 130
    assert not (run / "end").exists()
    thread.join()
    output = capfd.readouterr()
    assert "stopped; there is no checkpoint to resume from" in output.out
    assert output.err == ""


def test_a_handler_of_signals_imports_nothing() -> None:
    """A second signal may interrupt it: `timeout` sends its own twice."""
    script = (
        "import sys; from megatron_txssm.training.processes import _StopSignals\n"
        "with _StopSignals(saves=False): print('psutil' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_ctrl_c_while_the_workers_start_is_quiet(
    launch: Callable[..., int], recipe: Recipe, capfd: pytest.CaptureFixture[str]
) -> None:
    thread = send_when((recipe.run_path / "ready", signal.SIGINT))
    assert launch("touch $RUN/ready; exec sleep 300") == 130
    thread.join()
    assert capfd.readouterr().err == ""


def test_a_fault_after_ctrl_c_is_still_a_fault(
    launch: Callable[..., int], recipe: Recipe, capfd: pytest.CaptureFixture[str]
) -> None:
    # Such as a full disk while saving.
    thread = send_when((recipe.run_path / "ready", signal.SIGINT))
    assert launch("trap 'exit 1' TERM; touch $RUN/ready; for i in $(seq 3000); do sleep 0.1; done") == 1
    thread.join()
    assert "rank 0 failed (exit code 1)" in capfd.readouterr().err


def test_an_ignored_hang_up_stays_ignored(launch: Callable[..., int], recipe: Recipe) -> None:
    # nohup txssm pretrain … &
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        thread = send_when((recipe.run_path / "ready", signal.SIGHUP))
        assert launch("touch $RUN/ready; sleep 1.5") == 0
        thread.join()
    finally:
        signal.signal(signal.SIGHUP, previous)
