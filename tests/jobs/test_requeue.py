"""How a job is requeued, and whether other nodes can take the place of bad ones."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_txssm.errors import UserError
from megatron_txssm.jobs.supervisor.decision import Decision
from megatron_txssm.jobs.supervisor.requeue import requeue, requeue_without, spare_nodes_refusal
from megatron_txssm.slurm import client as slurm
from tests.jobs.some_attempt import some_attempt

NODES = ["n1", "n2"]
# A requeued job's process, so that Slurm need not kill it; the code is that of a failure.
LEAVES = pytest.raises(SystemExit, match=str(os.EX_TEMPFAIL))


@pytest.fixture(autouse=True)
def pass_time(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Makes sleeping take no time; lists the sleeps."""
    slept: list[float] = []
    now = [1000.0]

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    monkeypatch.setattr("time.sleep", sleep)
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return slept


@pytest.fixture
def sinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the stand-in answers; without the file it fails."""
    folder = tmp_path / "bin"
    folder.mkdir()
    answer, asked = folder / "answer", folder / "asked"
    (folder / "sinfo").write_text(
        f"#!/bin/sh\nprintf '%s\\n' \"$@\" > '{asked}'\ncat '{answer}' 2> /dev/null && exit 0\n"
        "echo 'slurm_load_partitions: Unable to contact slurm controller' >&2\nexit 1\n"
    )
    (folder / "sinfo").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return answer


@pytest.mark.parametrize("state", ["idle", "alloc", "mix", "comp", "resv", "plnd", "idle~", "idle#"])
def test_a_node_that_can_take_the_place(tmp_path: Path, sinfo: Path, state: str) -> None:
    sinfo.write_text(f"n1 alloc\nn2 alloc\nn3 {state}\n")
    assert spare_nodes_refusal(["n2"], NODES, "main") is None
    words = (sinfo.parent / "asked").read_text().splitlines()
    assert "--partition=main" in words and "--Node" in words


@pytest.mark.parametrize(
    "state", ["down", "down*", "drain", "drain*", "drng", "drng@", "fail", "failg", "maint", "unk", "idle*", "inval"]
)
def test_a_node_that_cannot(tmp_path: Path, sinfo: Path, state: str) -> None:
    sinfo.write_text(f"n1 alloc\nn2 alloc\nn3 {state}\n")
    why_not = spare_nodes_refusal(["n2"], NODES, "main")
    assert why_not == "partition main has no node that could replace n2"


def test_an_unfit_node_is_no_spare_node(tmp_path: Path, sinfo: Path) -> None:
    sinfo.write_text("n1 alloc\nn2 idle\nn3 drain\n")
    assert spare_nodes_refusal(["n2"], NODES, "main") is not None
    sinfo.write_text("n1 alloc\nn2 idle\n")
    assert spare_nodes_refusal(["n2"], NODES, "main") is not None


def test_where_every_node_is_unfit_the_nodes_are_not_to_blame(tmp_path: Path, sinfo: Path) -> None:
    sinfo.write_text("n1 idle\nn2 idle\nn3 idle\nn4 idle\n")
    assert spare_nodes_refusal(["n1", "n2"], NODES, "main") == "every node failed the preflight"


def test_a_node_that_is_left_out_already_is_no_spare_node(sinfo: Path) -> None:
    sinfo.write_text("n1 idle\nn2 idle\nn3 idle\nn4 idle\n")
    assert spare_nodes_refusal(["n2"], NODES, "main", ["n4"]) is None
    assert spare_nodes_refusal(["n2"], NODES, "main", ["n3", "n4"]) is not None


def test_a_silent_controller_is_waited_for(
    sinfo: Path, monkeypatch: pytest.MonkeyPatch, pass_time: list[float]
) -> None:
    def come_back(seconds: float) -> None:
        pass_time.append(seconds)
        if sum(pass_time) > 7200:
            sinfo.write_text("n1 alloc\nn2 alloc\nn3 idle\n")

    monkeypatch.setattr("time.sleep", come_back)
    assert spare_nodes_refusal(["n2"], NODES, "main") is None
    assert max(pass_time) <= 15


@pytest.fixture
def signal_mask() -> Iterator[None]:
    """A requeue blocks SIGTERM for the rest of the process's life."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


# What scontrol said on Slurm 22.05 while slurmctld was killed, started, or busy.
AWAY = [
    "Unexpected message received for job 21",
    "Unable to contact slurm controller (connect failure) for job 21",
    "slurm_job_requeue error: Zero Bytes were transmitted or received",
    "Job can not be altered now, try again later for job 21",
    "words of a later version",
]


class Slurm:
    """Plays scontrol and squeue; `answers`: to the next `scontrol requeue`s, empty for one that it takes."""

    def __init__(self, *answers: str, excluded: str = "", up: bool = True):
        self.answers, self.excluded, self.up = list(answers), excluded, up
        self.said: list[tuple[str, ...]] = []

    def __call__(self, *command: str, **_: object) -> str:
        if command == ("scontrol", "ping"):
            return f"Slurmctld(primary) at n0 is {'UP' if self.up else 'DOWN'}\n"
        self.said.append(command)
        if command[1].startswith("requeue") and self.answers and (answer := self.answers.pop(0)):
            raise UserError(f"{' '.join(command)}: {answer}")
        return ""

    def queue(self) -> list[slurm.Job]:
        script = Path("/r/pretrain.sbatch")
        return [slurm.Job("21", "x", "RUNNING", "None", "n[1-2]", "main", script, self.excluded, 0)]


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch, signal_mask: None) -> Callable[[Slurm], Slurm]:
    def play(played: Slurm) -> Slurm:
        monkeypatch.setattr(slurm, "run_slurm", played)
        monkeypatch.setattr(slurm, "queue", played.queue)
        monkeypatch.setattr(slurm, "hostnames", lambda nodes: {"n[7-8]": ["n7", "n8"], "": []}.get(nodes, [nodes]))
        return played

    return play


@pytest.mark.parametrize("away", AWAY)
def test_a_requeue_is_tried_until_slurm_takes_it(play: Callable[[Slurm], Slurm], away: str) -> None:
    played = play(Slurm(away, away))
    with LEAVES:
        requeue("21")
    assert played.said == [("scontrol", "requeue", "21")] * 3


def test_a_slurmctld_that_is_away_for_a_day_is_waited_for(
    play: Callable[[Slurm], Slurm], pass_time: list[float]
) -> None:
    played = play(Slurm(*["Unexpected message received"] * 6000, up=False))
    with LEAVES:
        requeue("21")
    assert len(played.said) == 6001 and sum(pass_time) > 24 * 3600


def test_one_that_answers_and_keeps_refusing_is_not(play: Callable[[Slurm], Slurm], pass_time: list[float]) -> None:
    play(Slurm(*["words of a later version"] * 6000))
    with pytest.raises(UserError, match="words of a later version"):
        requeue("21")
    assert 900 < sum(pass_time) < 1000


@pytest.mark.parametrize(
    "refusal",
    ["Requested operation is presently disabled for job 21", "Invalid job id specified", "Access/permission denied"],
)
def test_a_refusal_is_not_tried_again(play: Callable[[Slurm], Slurm], refusal: str) -> None:
    played = play(Slurm(*[refusal] * 9))
    with pytest.raises(UserError, match=refusal):
        requeue("21")
    assert played.said == [("scontrol", "requeue", "21")]


def test_a_job_that_is_pending_already_was_requeued(play: Callable[[Slurm], Slurm]) -> None:
    played = play(Slurm("Zero Bytes were transmitted or received", "Job is pending execution for job 21"))
    with LEAVES:
        requeue("21", ["n2"])
    assert played.said[2:] == [("scontrol", "update", "JobId=21", "ExcNodeList=n2")]


def test_a_requeue_keeps_the_nodes_that_were_left_out_before(play: Callable[[Slurm], Slurm]) -> None:
    played = play(Slurm(excluded="n[7-8]"))
    with LEAVES:
        requeue("21", ["n2", "n7"])
    update = ("scontrol", "update", "JobId=21", "ExcNodeList=n2,n7,n8")
    assert played.said == [("scontrol", "requeue", "21"), update]


def test_a_queue_without_the_job_loses_no_exclusions(
    play: Callable[[Slurm], Slurm], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some versions of squeue print an empty list while slurmctld is away."""
    played = play(Slurm(excluded="n[7-8]"))
    answers = [[], [], played.queue()]
    monkeypatch.setattr(slurm, "queue", lambda: answers.pop(0))
    with LEAVES:
        requeue("21", ["n2"])
    assert played.said[-1] == ("scontrol", "update", "JobId=21", "ExcNodeList=n2,n7,n8")


def test_a_held_job(play: Callable[[Slurm], Slurm]) -> None:
    played = play(Slurm())
    with LEAVES:
        requeue("21", hold=True)
    assert played.said == [("scontrol", "requeuehold", "21")]


@pytest.mark.parametrize(
    ("states", "by_user", "expected"),
    [
        # n2 was left out when attempt 1 failed there; the job runs on n1 and n3 now, and n1 is to blame.
        ("n1 idle\nn2 idle\nn3 idle\nn4 idle\n", False, Decision("requeue", leave_out=("n1",))),
        ("n1 idle\nn2 idle\nn3 idle\n", False, Decision("requeue", leave_out=("n1",), take_back=("n2",))),
        (
            "n1 idle\nn2 drain\nn3 idle\n",
            False,
            Decision("end", "partition main has no node that could replace n1"),
        ),
        (
            "n1 idle\nn2 idle\nn3 idle\n",
            True,
            Decision("end", "partition main has no node that could replace n1"),
        ),
    ],
)
def test_a_job_whose_nodes_would_be_too_few_takes_back_those_that_it_left_out(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    play: Callable[[Slurm], Slurm],
    states: str,
    by_user: bool,
    expected: Decision,
) -> None:
    played = play(Slurm(excluded="n2"))
    monkeypatch.setattr(slurm, "run_slurm", lambda *words: states if words[0] == "sinfo" else played(*words))
    monkeypatch.setenv("SLURM_JOB_PARTITION", "main")
    other_job = {"job_id": "20"} if by_user else {}
    before = [some_attempt(tmp_path, 1, nodes=["n1", "n2"], **other_job), some_attempt(tmp_path, 2, nodes=["n1", "n3"])]
    assert requeue_without("21", ["n1"], ["n1", "n3"], before) == expected


def test_a_node_that_is_taken_back_is_excluded_no_more(play: Callable[[Slurm], Slurm]) -> None:
    played = play(Slurm(excluded="n[7-8]"))
    with LEAVES:
        requeue("21", ["n1"], take_back=["n7"])
    assert played.said[-1] == ("scontrol", "update", "JobId=21", "ExcNodeList=n1,n8")
    said = str(Decision("requeue", leave_out=("n1",), take_back=("n7",)))
    assert said == "the job was requeued without n1, and with n7 again, as no other node is left"
