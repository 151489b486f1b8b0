"""Which ranks did not join which collective: real dumps of hanging ranks over gloo, and dumps as NCCL writes them."""

import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_txssm.training.watch.collective_trace import PREFIX, explain_hang, missing_ranks, read_trace
from tests.training.watch.some_dump import entry, write_dump

WORKER = Path(__file__).parent / "hanging_rank.py"
PATIENCE = 600  # seconds


def wait_until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"after {PATIENCE} s still waiting for {what}"
        time.sleep(0.5)


@pytest.fixture
def hang(tmp_path: Path) -> Any:
    """Starts ranks that hang, waits for what explains it, and asks for their dumps."""
    processes: list[subprocess.Popen[str]] = []

    def start(how: str, ranks: int) -> None:
        with socket.create_server(("localhost", 0)) as server:
            port = str(server.getsockname()[1])
        for rank in range(ranks):
            environment = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
            log = (tmp_path / f"rank_{rank}.log").open("w")
            command = [sys.executable, str(WORKER), str(tmp_path), how]
            processes.append(
                subprocess.Popen(
                    command, env=os.environ | environment | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log, text=True
                )
            )
        for rank in range(ranks):
            wait_until(lambda rank=rank: "ready" in (tmp_path / f"rank_{rank}.log").read_text(), f"rank {rank}")

    def ask() -> list[str]:
        for process in processes:
            assert process.poll() is None
            process.send_signal(signal.SIGUSR2)
        return sorted(explain_hang(tmp_path, len(processes)))

    yield start, ask
    for process in processes:
        process.kill()
        process.wait()


# How rank 1 hangs, how many ranks write a dump, and what is said behind each line.
HANGS = {"sleep": (4, ""), "stop": (3, " (rank 1 left no dump)")}


@pytest.mark.slow
@pytest.mark.parametrize("how", HANGS)
def test_the_rank_that_does_not_come_is_named(hang: Any, how: str, tmp_path: Path) -> None:
    """Rank 0 waits for it among the pair, ranks 2 and 3 for both among all."""
    start, ask = hang
    start(how, 4)
    dumps, note = HANGS[how]
    lines = [
        f"rank 1 did not join all_reduce 2 of TENSOR_MODEL_PARALLEL_GROUP, in which rank 0 waited{note}",
        f"rank 1 did not join all_reduce 4 of all ranks, in which ranks 2, 3 waited{note}",
    ]
    # A rank may not have come yet to the collective in which it will hang.
    wait_until(lambda: ask() == lines and len(list(tmp_path.glob(f"{PREFIX}?"))) == dumps, "the explanation")
    assert missing_ranks(tmp_path, 4) == [1]
    # The stacks are in the log all the same.
    assert "most recent call first" in (tmp_path / "rank_0.log").read_text()


TP = ("5", "TENSOR_MODEL_PARALLEL_GROUP")
PP = ("7", "PIPELINE_MODEL_PARALLEL_GROUP")
WORLD = ("0", "default_pg")


def test_groups_are_told_apart_by_their_names_not_by_each_ranks_numbers(tmp_path: Path) -> None:
    # On rank 3, the second group that it made is another.
    ranks = {WORLD: "[0, 1, 2, 3]", TP: "[2, 3]"}
    write_dump(tmp_path, 2, [entry(0, WORLD, 9), entry(1, TP, 41, state="started")], {0: (9, 9), 1: (41, 40)}, ranks)
    write_dump(tmp_path, 3, [entry(0, WORLD, 9), entry(2, TP, 40)], {0: (9, 9), 2: (40, 40)}, ranks)
    for rank in (0, 1):
        write_dump(tmp_path, rank, [entry(0, WORLD, 10, state="scheduled")], {0: (10, 9)}, {WORLD: "[0, 1, 2, 3]"})
    assert explain_hang(tmp_path, 4) == [
        "rank 3 did not join all_reduce 10 of all ranks, in which ranks 0, 1 waited",
        "rank 3 did not join all_reduce 41 of TENSOR_MODEL_PARALLEL_GROUP, in which rank 2 waited",
    ]
    assert missing_ranks(tmp_path, 4) == [3]


@pytest.mark.slow
def test_torchs_own_tool_finds_the_same_in_the_same_dumps(tmp_path: Path) -> None:
    """It needs every rank's dump, and NCCL."""
    for rank in range(4):
        last = 2 if rank == 3 else 3
        calls = [entry(0, WORLD, number, record_id=number - 1) for number in range(1, last + 1)]
        write_dump(tmp_path, rank, calls, {0: (last, 2)}, {WORLD: "[0, 1, 2, 3]"})
    assert explain_hang(tmp_path, 4) == ["rank 3 did not join all_reduce 3 of all ranks, in which ranks 0, 1, 2 waited"]
    tool = [sys.executable, "-m", "torch.distributed.flight_recorder.fr_trace", str(tmp_path), "--prefix", PREFIX]
    done = subprocess.run(tool, capture_output=True, text=True, timeout=PATIENCE)
    assert "Not all ranks joining collective, sequence number: 3" in done.stdout + done.stderr
    assert "missing ranks: {3}" in done.stdout + done.stderr


def test_a_receive_waits_for_its_sender(tmp_path: Path) -> None:
    """By the ranks within the group: 1 of [2, 6] is rank 6."""
    ranks = {PP: "[2, 6]"}
    message = entry(3, PP, 0, "nccl:recv 0<-1", is_p2p=True, state="started", retired=False)
    write_dump(tmp_path, 2, [entry(3, PP, 0, "nccl:send 0->1", is_p2p=True), message], {}, ranks)
    write_dump(tmp_path, 6, [], {}, ranks)
    assert explain_hang(tmp_path, 8) == [
        "rank 6 did not join recv of PIPELINE_MODEL_PARALLEL_GROUP, in which rank 2 waited"
    ]
    assert missing_ranks(tmp_path, 8) == [6]


def test_ranks_that_call_different_things_are_told(tmp_path: Path) -> None:
    ranks = {WORLD: "[0, 1, 2]"}
    for rank in (0, 1, 2):
        call = "nccl:all_gather" if rank == 1 else "nccl:all_reduce"
        write_dump(tmp_path, rank, [entry(0, WORLD, 6), entry(0, WORLD, 7, call, state="started")], {0: (7, 6)}, ranks)
    assert explain_hang(tmp_path, 3) == [
        "the ranks' programs diverged at collective 7 of all ranks: rank 1 called all_gather; "
        "ranks 0, 2 called all_reduce",
        "every rank joined all_reduce 7 of all ranks, which does not complete: check the network",
    ]
    assert missing_ranks(tmp_path, 3) == []


def test_nobody_is_said_to_have_joined_of_whom_nothing_is_known(tmp_path: Path) -> None:
    """Neither who belongs to the group nor what rank 1, without a dump, did."""
    write_dump(tmp_path, 0, [entry(1, TP, 5, state="started")], {1: (5, 4)}, {})
    assert explain_hang(tmp_path, 2) == [] and missing_ranks(tmp_path, 2) == []


def test_where_all_wait_for_each_other_all_is_told(tmp_path: Path) -> None:
    """Rank 0 is in one group's collective, rank 1 in the other's."""
    other = ("8", "DATA_PARALLEL_GROUP")
    ranks = {TP: "[0, 1]", other: "[0, 1]"}
    first, second = entry(1, TP, 5, state="started"), entry(2, other, 3, state="started")
    write_dump(tmp_path, 0, [entry(2, other, 2), first], {1: (5, 4), 2: (2, 2)}, ranks)
    write_dump(tmp_path, 1, [entry(1, TP, 4), second], {1: (4, 4), 2: (3, 2)}, ranks)
    assert explain_hang(tmp_path, 2) == [
        "rank 1 did not join all_reduce 5 of TENSOR_MODEL_PARALLEL_GROUP, in which rank 0 waited",
        "rank 0 did not join all_reduce 3 of DATA_PARALLEL_GROUP, in which rank 1 waited",
    ]
    assert missing_ranks(tmp_path, 2) == []


def test_a_thousand_ranks_are_not_all_named(tmp_path: Path) -> None:
    ranks = {WORLD: str(list(range(1024)))}
    for rank in range(24, 1024):
        write_dump(tmp_path, rank, [entry(0, WORLD, 7, state="started")], {0: (7, 6)}, ranks)
    [line] = explain_hang(tmp_path, 1024)
    assert line == (
        "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 16 more did not join all_reduce 7 of all ranks, in which "
        "ranks 24, 25, 26, 27, 28, 29, 30, 31 and 992 more waited "
        "(ranks 0, 1, 2, 3, 4, 5, 6, 7 and 16 more left no dump)"
    )


def test_without_dumps_nothing_is_said(tmp_path: Path) -> None:
    assert explain_hang(tmp_path, 4) == [] and missing_ranks(tmp_path, 4) == []
    assert explain_hang(tmp_path / "none", 4) == []


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch evil",)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no pickle",
        pickle.dumps({"entries": []})[:-4],
        pickle.dumps([1]),
        pickle.dumps(Evil()),
        pickle.dumps({"entries": [Evil()]}),
        pickle.dumps({"entries": [{}], "pg_status": 3}),
        pickle.dumps({"entries": 5, "pg_config": {"0": []}}),
    ],
)
def test_what_is_no_dump_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.chdir(tmp_path)
    write_dump(tmp_path, 0, [entry(0, WORLD, 7, state="started")], {0: (7, 6)}, {WORLD: "[0, 1]"})
    (tmp_path / f"{PREFIX}1").write_bytes(content)
    (tmp_path / f"{PREFIX}x").write_bytes(content)
    assert [line.split(",")[0] for line in explain_hang(tmp_path, 2)] == [
        "rank 1 did not join all_reduce 7 of all ranks"
    ]
    assert not (tmp_path / "evil").exists()


def test_only_plain_containers_are_unpickled() -> None:
    for harmful in (Evil(), {"entries": Path("x")}, print):
        with pytest.raises(pickle.UnpicklingError, match="a dump holds no"):
            read_trace(pickle.dumps(harmful))
