"""Why an attempt ended, from what Slurm 21.08 to 26.05, torch's error handler and the supervisor leave."""

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed import DistBackendError, DistNetworkError, DistStoreError
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from megatron_txssm.errors import UserError
from megatron_txssm.jobs.attempts import Attempt, attempts
from megatron_txssm.jobs.diagnosis.causes import CAUSES, cause_of
from megatron_txssm.jobs.diagnosis.diagnosis import Diagnosis, close, diagnose, record, recorded
from megatron_txssm.jobs.nodes.node_preflight import find_problems
from megatron_txssm.jobs.supervisor.decision import RETRIED
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.training.guard.spike_guard import Diverged, Rewind
from tests.jobs.some_attempt import some_attempt
from tests.training.watch.some_dump import entry, write_dump

KILLED_WORKER = """\
srun: error: n2: task 1: Killed
srun: launch/slurm: _step_signal: Terminating StepId=21.1
slurmstepd-n1: error: *** STEP 21.1 ON n1 CANCELLED AT 2026-11-24T14:38:51 ***
srun: error: n1: task 0: Exited with exit code 1
srun: Force Terminated StepId=21.1
"""
CANCELLED_STEP = """\
slurmstepd-n1: error: *** STEP 1.0 ON n1 CANCELLED AT 2026-11-24T14:08:39 ***
srun: Job step aborted: Waiting up to 7 seconds for job step to finish.
srun: error: n2: task 1: Killed
srun: launch/slurm: _step_signal: Terminating StepId=1.0
srun: error: n1: task 0: Killed
"""
CANCELLED_JOB = """\
srun: Job step aborted: Waiting up to 7 seconds for job step to finish.
slurmstepd-n1: error: *** STEP 5.0 ON n1 CANCELLED AT 2026-11-24T14:09:45 ***
slurmstepd-n1: error: *** JOB 5 ON n1 CANCELLED AT 2026-11-24T14:09:45 ***
srun: got SIGCONT
srun: forcing job termination
"""
PREEMPTED = """\
srun: Job step aborted: Waiting up to 7 seconds for job step to finish.
slurmstepd-n1: error: *** STEP 5.0 ON n1 CANCELLED AT 2026-11-24T14:09:45 DUE TO PREEMPTION ***
slurmstepd-n1: error: *** JOB 5 ON n1 CANCELLED AT 2026-11-24T14:09:45 DUE TO PREEMPTION ***
srun: got SIGCONT
srun: forcing job termination
"""
LOST_NODE = """\
srun: error: n1: task 0: Exited with exit code 1
srun: error: Node failure on n2
slurmstepd-n1: error: *** JOB 25 ON n1 CANCELLED AT 2026-11-24T14:45:18 DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR \
DETAILS ***
"""
TIME_LIMIT = "slurmstepd-n1: error: *** JOB 5 ON n1 CANCELLED AT 2026-11-24T14:09:45 DUE TO TIME LIMIT ***\n"
REQUEUED = "slurmstepd-n1: error: *** JOB 5 ON n1 CANCELLED AT 2026-11-24T14:09:45 DUE TO JOB REQUEUE ***\n"
BOTH_EXITED = "srun: error: n1: tasks 0-1: Exited with exit code 1\n"

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.77.0.12]:29999"
NCCL = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:3699, remote process exited or there was "
    "a network error, NCCL version 2.27.5\nncclRemoteError: A call failed possibly due to a network error or a remote "
    "process exiting prematurely.\nLast error:\nsocketProgress: Connection closed by remote peer n2<41000>"
)
NCCL_MEMORY = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:3699, unhandled cuda error (run with "
    "NCCL_DEBUG=INFO for details), NCCL version 2.27.5\nncclUnhandledCudaError: Call to CUDA function failed.\n"
    "Last error:\nCuda failure 2 'out of memory'"
)
CUDA_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB"

Say = Callable[..., None]


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    return some_attempt(tmp_path, exit_code=1)


@pytest.fixture
def say(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> Say:
    """Let a rank say, by torch's own handler, what ended it, `at` so many seconds after the attempt's start."""

    def say(rank: int, error: BaseException, at: float = 60.0) -> None:
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(attempt.folder / f"rank_{rank}.json"))
        monkeypatch.setattr(time, "time", lambda: attempt.started + at)
        get_error_handler().record_exception(error)
        monkeypatch.undo()

    return say


# --- What srun and slurmstepd say.


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        # srun knows best where a task ran.
        (KILLED_WORKER, Diagnosis("killed", "killed by SIGKILL", 1, "n2")),
        ("srun: error: n2: task 3: Killed\n", Diagnosis("killed", "killed by SIGKILL", 3, "n2")),
        (
            "srun: error: n2: task 2: Segmentation fault (core dumped)\n",
            Diagnosis("killed", "killed by SIGSEGV", 2, "n2"),
        ),
        ("srun: error: n2: tasks 2-3: Aborted\n", Diagnosis("killed", "killed by SIGABRT", 2, "n2")),
        ("srun: error: n1: tasks 0,3: Bus error\n", Diagnosis("killed", "killed by SIGBUS", 0, "n1")),
        # The first is the cause.
        ("srun: error: n2: task 2: Aborted\nsrun: error: n1: task 0: Killed\n", Diagnosis("killed", "", 2, "n2")),
        # srun ends the others with it.
        ("srun: error: n1: task 0: Terminated\nsrun: error: n2: task 2: Killed\n", Diagnosis("killed", "", 2, "n2")),
        (
            "srun: error: n1: task 0: Out Of Memory\n",
            Diagnosis("out_of_memory", "out of memory, according to Slurm", 0, "n1"),
        ),
        (CANCELLED_STEP, Diagnosis("step_cancelled")),
        (CANCELLED_JOB, Diagnosis("cancelled")),
        (PREEMPTED, Diagnosis("preempted")),
        (TIME_LIMIT, Diagnosis("time_limit_hit")),
        (REQUEUED, Diagnosis("requeued")),
    ],
)
def test_what_slurm_says(attempt: Attempt, output: str, expected: Diagnosis) -> None:
    found = diagnose(attempt, finished=False, output=output)
    assert (found.cause, found.rank, found.node) == (expected.cause, expected.rank, expected.node)
    assert expected.detail in found.detail


def test_the_node_that_was_lost_is_named(attempt: Attempt) -> None:
    found = diagnose(attempt, finished=False, output=LOST_NODE)
    assert (found.cause, found.node) == ("node_failure", "n2")


def test_a_reason_counts_whichever_node_speaks_last(attempt: Attempt) -> None:
    # Each node's slurmstepd has a line of its own, and not all state the reason.
    other = PREEMPTED.splitlines()[1].replace("n1", "n2").replace(" DUE TO PREEMPTION", "")
    assert diagnose(attempt, finished=False, output=f"{PREEMPTED}{other}\n").cause == "preempted"
    assert diagnose(attempt, finished=False, output=f"{other}\n{PREEMPTED}").cause == "preempted"


def test_a_task_that_ends_without_a_word_is_named(attempt: Attempt) -> None:
    # A worker that ends before it can write an error record: an import that fails, os._exit.
    found = diagnose(attempt, finished=False, output=BOTH_EXITED)
    assert (found.cause, found.rank, found.node) == ("failed", 0, "n1")
    assert "exit code 1" in found.detail.lower()


def test_nothing_at_all(attempt: Attempt) -> None:
    attempt.exit_code = None
    assert diagnose(attempt, finished=False, output="") == Diagnosis("unknown")


def test_what_slurm_says_of_anything_else_is_handed_on(attempt: Attempt) -> None:
    line = "srun: error: Unable to create step for job 21: Requested node configuration is not available"
    found = diagnose(
        attempt, finished=False, output=f"2026-11-24T14:09:45 START attempt 1\n{line}\nsrun: error: more\n"
    )
    assert found == Diagnosis("unknown", line)


def test_what_a_trainer_prints_is_not_taken_for_slurms_words(attempt: Attempt, say: Say) -> None:
    say(3, ValueError("no *** JOB 5 ON n1 CANCELLED AT noon *** and no srun: error: n1: task 0: Killed"))
    found = diagnose(attempt, finished=False, output="srun: error: n2: task 3: Exited with exit code 1\n")
    assert (found.cause, found.rank) == ("failed", 3)


# --- What the ranks say.


def test_the_exception_is_the_cause_not_the_connections_it_broke(attempt: Attempt, say: Say) -> None:
    # Records have whole seconds, and clocks differ: that others seem to be earlier means nothing.
    say(0, RuntimeError(GLOO), at=59)
    say(1, DistBackendError(NCCL), at=60)
    say(2, ConnectionResetError(104, "Connection reset by peer"), at=60)
    say(3, IndexError("index 7 is out of range"), at=60)
    found = diagnose(attempt, finished=False, output=BOTH_EXITED)
    assert found == Diagnosis("failed", "IndexError: index 7 is out of range", 3, "n2")
    assert str(found) == "a rank failed: rank 3 on n2: IndexError: index 7 is out of range"


def test_the_first_of_two_exceptions(attempt: Attempt, say: Say) -> None:
    say(0, ValueError("later"), at=100)
    say(1, ValueError("earlier"), at=99)
    assert diagnose(attempt, finished=False, output="").detail == "ValueError: earlier"


def test_of_the_same_second_the_lowest_rank(attempt: Attempt, say: Say) -> None:
    # A mistake that all make: the answer must not depend on the order in which a file system lists its files.
    for rank in (3, 1, 2, 0):
        say(rank, ValueError("the same"))
    assert diagnose(attempt, finished=False, output="").rank == 0


def test_a_killed_rank_is_the_cause_of_broken_connections(attempt: Attempt, say: Say) -> None:
    say(0, RuntimeError(GLOO))
    output = KILLED_WORKER.replace("task 1", "task 2")
    assert diagnose(attempt, finished=False, output=output) == Diagnosis("killed", "killed by SIGKILL", 2, "n2")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(GLOO),
        DistBackendError(NCCL),
        DistNetworkError(
            "The client socket has timed out after 600000ms while trying to connect to (10.77.0.11, 20021)."
        ),
        DistStoreError("Timed out after 601 seconds waiting for clients. 3/4 clients joined."),
        RuntimeError("[Rank 2] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE)"),
        BrokenPipeError(32, "Broken pipe"),
    ],
)
def test_only_broken_connections(attempt: Attempt, say: Say, error: Exception) -> None:
    say(3, RuntimeError(GLOO), at=61)
    say(2, error, at=60)
    found = diagnose(attempt, finished=False, output=BOTH_EXITED)
    assert (found.cause, found.rank, found.node) == ("connection_lost", 2, "n2")
    assert found.detail.startswith(type(error).__name__)


@pytest.mark.parametrize(
    "text",
    [
        "the global batch of 3 samples is not divisible by micro_batch_size=2",
        "data.train=/data/connections: no such file",
        "NCCL_SOCKET_IFNAME=eth9 is no interface of this node",
    ],
)
def test_a_mistake_in_the_recipe_is_refused(attempt: Attempt, say: Say, text: str) -> None:
    attempt.exit_code = 2
    say(1, RuntimeError(GLOO), at=50)
    say(0, UserError(text))
    found = diagnose(attempt, finished=False, output=BOTH_EXITED)
    assert found == Diagnosis("refused", text)
    assert found.cause not in RETRIED


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError(CUDA_MEMORY), MemoryError("out of memory"), DistBackendError(NCCL_MEMORY)]
)
def test_memory(attempt: Attempt, say: Say, error: Exception) -> None:
    say(0, RuntimeError(GLOO), at=59)
    say(2, error)
    found = diagnose(attempt, finished=False, output="")
    assert (found.cause, found.rank, found.node) == ("out_of_memory", 2, "n2")


def test_a_long_exception_keeps_its_end_where_the_advice_is(attempt: Attempt, say: Say) -> None:
    say(1, ValueError("a\n\nb" + "x" * 3000 + " do this"))
    found = diagnose(attempt, finished=False, output="")
    assert found.detail == "ValueError: a b" + "x" * 3000 + " do this"
    say(1, ValueError("a\n\nb" + "x" * 1_000_000 + " do this"))
    found = diagnose(attempt, finished=False, output="")
    assert found.detail.startswith("ValueError: a bxxx") and found.detail.endswith("xxx do this")
    assert len(found.detail) <= 4000


SAVE = (
    "the checkpoint of step 40 could not be written to /runs/a/checkpoints: {} (0.000 GB are free there); once that is "
    "fixed, the same command continues from step 30, the newest complete checkpoint"
)


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (RuntimeError(SAVE.format(OSError(28, "No space left on device"))), "disk_full"),
        (RuntimeError(SAVE.format(OSError(122, "Disk quota exceeded", "/runs/a/__0_0.distcp"))), "disk_full"),
        (OSError(28, "No space left on device", "/runs/a/metrics.jsonl"), "disk_full"),
        # A user's error, by its class; but not theirs to mend in the recipe.
        (UserError("run_directory=/runs/a cannot be written: No space left on device"), "disk_full"),
        (UserError("run_directory=/runs/a cannot be written: Read-only file system"), "node_file_system"),
        (OSError(30, "Read-only file system", "/runs/a/metrics.jsonl"), "node_file_system"),
        (OSError(116, "Stale file handle"), "node_file_system"),
        (OSError(5, "Input/output error"), "node_file_system"),
        (OSError(107, "Transport endpoint is not connected", "/runs/a"), "node_file_system"),
        (OSError(108, "Cannot send after transport endpoint shutdown", "/lustre/a"), "node_file_system"),
        (OSError(19, "No such device", "/runs/a"), "node_file_system"),
        (
            DistBackendError(
                "NCCL error in: ProcessGroupNCCL.cpp:3699, unhandled system error, NCCL version 2.27.5\n"
                "ncclSystemError: System call or external library call failed.\nLast error:\nError while"
                "  creating shared memory segment /dev/shm/nccl-cbb1Vf (size 33030528), error: No space left on "
                "device (28)"
            ),
            "node_file_system",
        ),
        (FloatingPointError("weights are NaN or infinite after step 40, which is not saved"), "nan"),
        # Of an earlier version.
        (
            RuntimeError("the loss or a gradient of step 40 is NaN or infinite; the newest checkpoint, of step 30"),
            "nan",
        ),
        (torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"), "bad_gpu"),
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), "bad_gpu"),
        (torch.AcceleratorError("CUDA error: uncorrectable NVLink error detected during the execution"), "bad_gpu"),
        (
            torch.AcceleratorError("CUDA error: Invalid access of peer GPU memory over nvlink or a hardware error"),
            "bad_gpu",
        ),
        (RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"), "bad_gpu"),
        (
            DistBackendError(NCCL_MEMORY.replace("2 'out of memory'", "214 'uncorrectable ECC error encountered'")),
            "bad_gpu",
        ),
        (RuntimeError("NVML: GPU is lost. Reboot the system to recover this GPU"), "bad_gpu"),
        (RuntimeError("NVRM: Xid (PCI:0000:3b:00): 79, pid=4711, GPU has fallen off the bus."), "bad_gpu"),
        # A program's mistake, whatever the GPU.
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), "failed"),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), "failed"),
        # Of a socket: another rank's end.
        (OSError(107, "Transport endpoint is not connected; connection lost"), "connection_lost"),
        (MemoryError(), "out_of_memory"),
        (OSError(12, "Cannot allocate memory"), "out_of_memory"),
    ],
)
def test_the_cause_that_an_exception_tells(attempt: Attempt, say: Say, error: Exception, cause: str) -> None:
    # Others wait for this rank, and may say so before it.
    say(0, RuntimeError(GLOO), at=50)
    say(3, error)
    found = diagnose(attempt, finished=False, output=BOTH_EXITED)
    assert found.cause == cause
    if cause != "connection_lost":
        assert (found.rank, found.node) == (3, "n2")
        assert found.detail.startswith(type(error).__name__)


def test_a_cause_of_a_later_version_is_named() -> None:
    found = Diagnosis("cosmic_ray", "bit 7", 3, "n2")
    assert (str(found), found.remedy) == ("cosmic ray: rank 3 on n2: bit 7", "read the job's output")


NOT_FINITE = (
    "the loss or a gradient of step 41 is NaN or infinite on rank 2 (node n2, GPU 0: loss), rank 3 (node n2, GPU 1: "
    "loss); computed again on the same GPU, it came out {} (Megatron's exit code {}). The last sound checkpoint is …"
)


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (NOT_FINITE.format("the same: the training diverges, or that GPU is broken", 16), "nan"),
        (NOT_FINITE.format("differently: a passing error of that GPU is likely", 17), "bad_gpu"),
    ],
)
def test_a_result_that_is_not_finite_names_its_origin(attempt: Attempt, say: Say, error: str, cause: str) -> None:
    # All ranks end with the same words.
    for rank in range(4):
        say(rank, FloatingPointError(error))
    found = diagnose(attempt, finished=False, output="")
    assert (found.cause, found.rank, found.node) == (cause, 2, "n2")


@pytest.mark.parametrize("error", [Rewind, Diverged])
def test_the_spike_guard_blames_no_rank(attempt: Attempt, say: Say, error: type[Exception]) -> None:
    for rank in range(4):
        say(rank, error("spike at step 40: loss 9 (z-score 8.0)"))
    found = diagnose(attempt, finished=False, output=KILLED_WORKER)
    assert found == Diagnosis(error.__name__.lower(), "spike at step 40: loss 9 (z-score 8.0)")


def test_a_certain_cause_explains_what_else_fails(attempt: Attempt, say: Say) -> None:
    say(0, KeyError("what the other did not send"), at=50)
    say(3, OSError(28, "No space left on device"), at=60)
    found = diagnose(attempt, finished=False, output=KILLED_WORKER)
    assert (found.cause, found.rank) == ("disk_full", 3)


def test_a_quota_has_another_remedy() -> None:
    disk = Diagnosis("disk_full", "OSError: [Errno 28] No space left on device")
    quota = Diagnosis("disk_full", "OSError: [Errno 122] Disk quota exceeded: '/runs/a'")
    assert "make room" in disk.remedy and "quota -s" in quota.remedy


def test_a_file_of_the_run_that_only_one_node_misses(attempt: Attempt, say: Say) -> None:
    metrics = attempt.run / "metrics.jsonl"
    metrics.touch()
    say(0, FileNotFoundError(2, "No such file or directory", str(metrics)))
    assert diagnose(attempt, finished=False, output="").cause == "node_file_system"
    # Missing here, too: a mistake.
    metrics.unlink()
    assert diagnose(attempt, finished=False, output="").cause == "failed"


@pytest.mark.parametrize("signal", ["Killed", "Bus error", "Segmentation fault", "Aborted"])
def test_memory_is_blamed_for_sigkill_only(attempt: Attempt, signal: str) -> None:
    found = diagnose(attempt, finished=False, output=f"srun: error: n2: task 3: {signal}\n")
    assert found.cause == "killed" and ("memory is the usual reason" in found.remedy) == (signal == "Killed")


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("OSError: [Errno 28] No space left on device", "disk_full"),
        ("CUDA error: uncorrectable ECC error encountered", "bad_gpu"),
        ("iteration 40/60 | loss 3.9", "killed"),
    ],
)
def test_a_killed_ranks_log_may_say_more(attempt: Attempt, line: str, cause: str) -> None:
    log = attempt.run / "logs" / "rank_1.log"
    log.parent.mkdir()
    log.write_text(f"something\n{line}\n")
    found = diagnose(attempt, finished=False, output=KILLED_WORKER)
    assert (found.cause, found.rank) == (cause, 1)
    if cause != "killed":
        assert found.detail == f"killed by SIGKILL: {line}" and "memory" not in found.remedy
        # Of an earlier attempt.
        os.utime(log, (attempt.started - 1, attempt.started - 1))
        assert diagnose(attempt, finished=False, output=KILLED_WORKER).cause == "killed"
        # Or the job's output has it.
        assert diagnose(attempt, finished=False, output=f"{KILLED_WORKER}{line}\n").cause == cause


def test_ranks_that_nccl_aborts_waited_for_another(attempt: Attempt) -> None:
    log = attempt.run / "logs" / "rank_1.log"
    log.parent.mkdir()
    log.write_text("[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE)\n")
    found = diagnose(attempt, finished=False, output="srun: error: n1: task 1: Aborted (core dumped)\n")
    assert found.cause == "connection_lost" and "Watchdog" in found.detail


def test_the_supervisors_own_errors_have_causes() -> None:
    assert cause_of(f"OSError: {OSError(30, 'Read-only file system', '/runs/a/attempts/0001')}") == "node_file_system"
    assert cause_of("ValueError: no room") is None


def test_a_record_that_is_only_text(attempt: Attempt) -> None:
    # What torch's launcher writes for a process that could not start.
    (attempt.folder / "rank_2.json").write_text(json.dumps({"message": "TypeError: no such entry point"}))
    found = diagnose(attempt, finished=False, output="")
    assert found == Diagnosis("failed", "TypeError: no such entry point", 2, "n2")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"message": null}',
        '{"message": {}}',
        '{"message": {"message": 3}}',
        '{"message": {"message": "ValueError: x", "extraInfo": null}}',
        '{"message": {"message": "ValueError: x", "extraInfo": {"timestamp": "noon"}}}',
        "\x00\x00\x00\x00",
    ],
)
def test_a_damaged_record_is_no_obstacle(attempt: Attempt, say: Say, text: str) -> None:
    (attempt.folder / "rank_0.json").write_text(text)
    say(3, IndexError("the cause"))
    found = diagnose(attempt, finished=False, output="")
    assert (found.cause, found.detail, found.rank) == ("failed", "IndexError: the cause", 3)


def test_other_files_of_the_attempt_are_no_records(attempt: Attempt) -> None:
    for name in ("rank_.json", "rank_x.json", "rank_0.json.n1.17.partial", "preflight.json"):
        (attempt.folder / name).write_text(json.dumps({"message": "ValueError: x"}))
    assert diagnose(attempt, finished=False, output="").cause == "unknown"


# --- What the supervisor knows.


def test_a_finished_run_is_finished_whatever_came_after(attempt: Attempt, say: Say) -> None:
    say(0, RuntimeError(GLOO))
    assert diagnose(attempt, finished=True, output=KILLED_WORKER) == Diagnosis("finished")


def test_an_unfit_node(attempt: Attempt) -> None:
    attempt.failed_nodes = {"n2": ["1 of 2 GPUs respond", "no room"]}
    found = diagnose(attempt, finished=False, output="")
    assert found == Diagnosis("preflight", "1 of 2 GPUs respond; no room", node="n2")
    assert str(found) == "a node failed the preflight on n2: 1 of 2 GPUs respond; no room"


def test_no_node_answers(attempt: Attempt) -> None:
    """That is no node's fault, but Slurm's."""
    words = find_problems([], attempt.nodes, "it did not answer within 300 s; the import may take longer")
    attempt.failed_nodes = words
    assert diagnose(attempt, finished=False, output="").node is None
    attempt.failed_nodes = {"n2": words["n2"]}
    assert diagnose(attempt, finished=False, output="").node == "n2"


def test_no_node_has_room(attempt: Attempt) -> None:
    """Another node would have no more: it is the disk that is full. One alone has lost its file system."""
    words = ["/runs/a has 1.0 GB left; a checkpoint takes 2.0 GB", "/runs/a has room for 3 more files (inodes, df -i)"]
    attempt.failed_nodes = dict.fromkeys(attempt.nodes, words)
    assert diagnose(attempt, finished=False, output="") == Diagnosis("disk_full", words[0])
    attempt.failed_nodes["n2"] = [*words, "1 of 2 GPUs respond"]
    assert diagnose(attempt, finished=False, output="").cause == "preflight"
    attempt.failed_nodes = {"n2": words}
    assert diagnose(attempt, finished=False, output="").cause == "preflight"
    # A node's own disk.
    own = "TRITON_CACHE_DIR=/tmp/triton cannot be made: No space left on device"
    attempt.failed_nodes = {node: [own] for node in attempt.nodes}
    assert diagnose(attempt, finished=False, output="").cause == "preflight"


@pytest.mark.parametrize(
    ("silent", "rank", "node", "words"),
    [
        ([], None, None, "every rank wrote its stacks"),
        ([3], 3, "n2", "rank 3 did not answer"),
        ([1, 2], 1, "n1", "ranks 1, 2 did not answer"),
        ([0, 1, 2, 3], None, None, "no rank wrote its stacks: the run's file system or the network was unavailable"),
        # slurmctld was away, and nobody was asked.
        (None, None, None, "no step for 61 s"),
    ],
)
def test_a_hang(attempt: Attempt, silent: list[int] | None, rank: int | None, node: str | None, words: str) -> None:
    attempt.hang = {"seconds": 61.4, "silent_ranks": silent}
    # The step's end is the supervisor's doing.
    found = diagnose(attempt, finished=False, output=CANCELLED_STEP)
    assert (found.cause, found.rank, found.node) == ("hung", rank, node)
    assert "no step for 61 s" in found.detail and words in found.detail
    assert ("stacks" in found.detail) == (silent is not None)


@pytest.mark.parametrize("silent", [[], None])
def test_a_rank_that_hangs_and_answers_is_known_by_the_others_dumps(attempt: Attempt, silent: list[int] | None) -> None:
    every = ("0", "default_pg")
    for rank in (0, 1, 2):
        write_dump(attempt.folder, rank, [entry(0, every, 7, state="started")], {0: (7, 6)}, {every: "[0, 1, 2, 3]"})
    write_dump(attempt.folder, 3, [entry(0, every, 6)], {0: (6, 6)}, {every: "[0, 1, 2, 3]"})
    attempt.hang = {"seconds": 61.4, "silent_ranks": silent}
    found = diagnose(attempt, finished=False, output=CANCELLED_STEP)
    assert (found.cause, found.rank, found.node) == ("hung", 3, "n2")


def test_the_ranks_were_told_to_stop(attempt: Attempt) -> None:
    attempt.exit_code = 0
    (attempt.folder / "stopped").touch()
    assert diagnose(attempt, finished=False, output="") == Diagnosis("stopped")


def test_megatron_ended_the_loop_by_itself(attempt: Attempt) -> None:
    attempt.exit_code = 0
    found = diagnose(attempt, finished=False, output="")
    assert found == Diagnosis("megatron_exit")
    assert found.cause not in RETRIED


def test_told_to_stop_without_a_reason_is_a_persons_doing(attempt: Attempt) -> None:
    attempt.told_to_stop = True
    assert diagnose(attempt, finished=False, output="").cause == "cancelled"
    # It saved, too; that does not make it less cancelled.
    attempt.exit_code = 0
    (attempt.folder / "stopped").touch()
    assert diagnose(attempt, finished=False, output="").cause == "cancelled"
    assert diagnose(attempt, finished=False, output=PREEMPTED).cause == "preempted"


# --- Whatever stands there.


def test_any_output_has_a_cause_and_words_for_it(tmp_path: Path) -> None:
    draw = random.Random(20250609)
    texts = [KILLED_WORKER, CANCELLED_STEP, CANCELLED_JOB, PREEMPTED, LOST_NODE, TIME_LIMIT, REQUEUED, BOTH_EXITED]
    lines = [line for text in texts for line in text.splitlines()]
    lines += [
        "srun: error: n9: task 4711: Killed",
        "srun: error: n1: task ,-: Killed",
        "srun: error: n1: tasks 3-: Real-time signal 7",
        f"srun: error: n1: task {'9' * 5000}: Killed",
        "slurmstepd-n1: error: *** JOB 5 ON n1 CANCELLED AT noon DUE TO  ***",
    ]
    attempt = some_attempt(tmp_path)
    seen = set()
    for _ in range(3000):
        words = []
        for _ in range(draw.randrange(6)):
            line = draw.choice(lines)
            if draw.random() < 0.5:
                at = draw.randrange(len(line))
                line = line[:at] + draw.choice(["", "\0", "7", ",", " ", "***", "\n", "\udcff", "-"]) + line[at + 1 :]
            words.append(line)
        noise = draw.randbytes(draw.randrange(40)).decode(errors="replace")
        attempt.exit_code = draw.choice([None, 0, 1, 137, 143])
        attempt.told_to_stop = draw.random() < 0.1
        found = diagnose(attempt, finished=False, output=draw.choice(["\n", noise]).join([*words, noise]))
        assert found.cause in CAUSES
        # srun names a lost node; a damaged name is what it is.
        assert (
            found.node is None or found.node.startswith("n") or found.rank is not None or found.cause == "node_failure"
        )
        assert found.summary and found.summary in str(found)
        seen.add(found.cause)
    # Random texts that reached one branch only would prove little.
    assert seen >= {"killed", "cancelled", "step_cancelled", "preempted", "node_failure", "unknown", "megatron_exit"}


def test_megabytes_of_output_take_no_time(attempt: Attempt) -> None:
    text = "srun: error: " * 100_000 + "*** JOB 5 ON n1 CANCELLED AT " * 50_000 + "\nsrun: error: n2: task 2: Killed\n"
    begin = time.process_time()
    assert diagnose(attempt, finished=False, output=text).cause == "killed"
    assert time.process_time() - begin < 5


# --- From the run folder.


def test_close_reads_what_the_run_folder_holds(tmp_path: Path) -> None:
    recipe = load_recipe("demo_cpu", [f"run_directory={tmp_path}/run"])
    recipe.checkpoint_path.mkdir(parents=True)
    (recipe.checkpoint_path / "latest_checkpointed_iteration.txt").write_text("160\n")
    (recipe.run_path / "metrics.jsonl").write_text('{"iteration": 171, "grad_norm": 1.0}\n')
    output = tmp_path / "job.out"
    # Of the attempt before: it is over.
    output.write_text(PREEMPTED)
    attempt = some_attempt(recipe.run_path, output=str(output), output_offset=output.stat().st_size)
    with output.open("a") as file:
        file.write(KILLED_WORKER)
    found = close(attempt, recipe)
    assert found == Diagnosis("killed", "killed by SIGKILL", 1, "n2")
    assert (attempt.last_step, attempt.saved_after) == (171, 160)
    assert attempt.ended is not None and attempt.ended > attempt.started
    attempt.save()
    (read,) = attempts(recipe.run_path)
    assert recorded(read) == found


def test_close_knows_a_finished_run(tmp_path: Path) -> None:
    recipe = load_recipe("demo_cpu", [f"run_directory={tmp_path}/run"])
    recipe.checkpoint_path.mkdir(parents=True)
    (recipe.checkpoint_path / "latest_checkpointed_iteration.txt").write_text(f"{recipe.train_iters}\n")
    (recipe.checkpoint_path / f"iter_{recipe.train_iters:07d}").mkdir()
    (recipe.checkpoint_path / f"iter_{recipe.train_iters:07d}" / ".metadata").write_text("index")
    assert close(some_attempt(recipe.run_path), recipe).cause == "finished"


def test_an_attempt_without_an_end_has_no_diagnosis(attempt: Attempt) -> None:
    assert recorded(attempt) is None
    record(attempt, Diagnosis("killed", "x", 1, "n1"))
    assert recorded(attempt) == Diagnosis("killed", "x", 1, "n1")


def test_every_retried_cause_is_a_cause_and_all_have_words() -> None:
    assert set(CAUSES) >= RETRIED
    assert all(summary for summary, _ in CAUSES.values())
    # A finished run leaves nothing to do.
    assert [cause for cause, (_, remedy) in CAUSES.items() if not remedy] == ["finished"]


@pytest.mark.parametrize(
    "during, words", [("start", "no first step for 61 s"), ("save", "the checkpoint was not complete for 61 s")]
)
def test_a_hang_outside_of_a_step(tmp_path: Path, during: str, words: str) -> None:
    attempt = some_attempt(tmp_path, hang={"seconds": 61.0, "silent_ranks": [], "during": during})
    assert diagnose(attempt, False, "").detail.startswith(words)


def test_a_killed_supervisor(tmp_path: Path) -> None:
    """Another one ends its step, of whose end srun says what it always does."""
    output = (
        "2026-11-26T07:00:00 END supervisor: killed by signal 9\n"
        "slurmstepd-n1: error: *** STEP 3.1 ON n1 CANCELLED AT 2026-11-26T07:00:01 ***\n"
        "srun: error: n1: task 0: Killed\n"
    )
    found = diagnose(some_attempt(tmp_path), False, output)
    assert found == Diagnosis("supervisor_killed", "killed by SIGKILL")


def test_a_lost_node_of_a_job_that_outlives_it(tmp_path: Path) -> None:
    """Under --no-kill."""
    output = (
        "srun: error: Node failure on n2\n"
        "srun: error: n1: task 0: Killed\n"
        "srun: launch/slurm: _step_signal: Terminating StepId=16.1\n"
        "srun: Force Terminated StepId=16.1\n"
    )
    assert diagnose(some_attempt(tmp_path), False, output) == Diagnosis("node_failure", node="n2")


def test_a_killed_srun(tmp_path: Path) -> None:
    """It prints nothing, and its ranks train on: nobody else says why."""
    found = diagnose(some_attempt(tmp_path, exit_code=-9), False, "")
    assert found == Diagnosis("srun_killed", "killed by SIGKILL")
