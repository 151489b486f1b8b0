"""What a node says of itself before training, and what is made of it."""

import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_txssm.home import HOME
from megatron_txssm.jobs.nodes import node_check, node_preflight
from megatron_txssm.jobs.nodes.node_check import NodeCheck, report
from megatron_txssm.jobs.nodes.node_preflight import MAX_CLOCK_SKEW_SECONDS, NodePreflight, find_problems
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.sizes import checkpoint_bytes
from megatron_txssm.slurm.environment import rendezvous_port
from megatron_txssm.training.launch.preflight import make_run_directory

GB = 10**9


@contextlib.contextmanager
def answering(answer: bytes | None) -> Iterator[str]:
    """HOST:PORT of one who gives every caller this answer; None: who hangs up."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection:
                    connection.sendall(answer or b"")

    threading.Thread(target=serve, daemon=True).start()
    yield f"127.0.0.1:{listener.getsockname()[1]}"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[NodeCheck]:
    """Of a node that is fit."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "token").write_text("secret")
    (run / "recipe.yaml").write_text("name: x\n")
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    with answering(f"{time.time()!r}\n".encode()) as address:
        yield NodeCheck(
            folder=run,
            checkpoints=run,
            recipe=run / "recipe.yaml",
            token="secret",
            token_file=run / "token",
            address=address,
            gpus=0,
            free_bytes=1000,
            free_inodes=10,
            open_files=100,
        )


def test_a_node_that_is_fit(check: NodeCheck) -> None:
    found = report(check)
    assert found["node"] == "n1"
    assert found["problems"] == []
    assert "no GPU was requested: not checked" in found["warnings"]
    assert found["facts"]["python"] == sys.version.split()[0]
    assert found["facts"]["torch"].startswith("2.")
    assert found["facts"]["mamba-ssm"] == "none"
    assert len(found["facts"]["recipe sha256"]) == 64
    # Nothing is left behind.
    assert sorted(path.name for path in check.folder.iterdir()) == ["recipe.yaml", "token"]


# --- The run folder.


def test_a_process_that_may_not_open_the_shards(check: NodeCheck) -> None:
    check = replace(check, open_files=2**62)
    [problem] = report(check)["problems"]
    assert problem.endswith(f"(ulimit -Hn); a rank needs {2**62} for its shards")


def test_a_limit_of_the_sites(check: NodeCheck, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TXSSM_PREFLIGHT_OPEN_FILES", str(2**62))
    [problem] = report(check)["problems"]
    assert problem.endswith(f"(ulimit -Hn); a rank needs {2**62} for its shards")
    monkeypatch.setenv("TXSSM_PREFLIGHT_OPEN_FILES", "off")
    check = replace(check, open_files=2**62)
    assert report(check)["problems"] == []
    monkeypatch.setenv("TXSSM_PREFLIGHT_OPEN_FILES", "many")
    found = report(check)
    assert len(found["problems"]) == 1
    assert "TXSSM_PREFLIGHT_OPEN_FILES=many is neither a number nor off: using the default" in found["warnings"]


def test_too_few_inodes(check: NodeCheck, monkeypatch: pytest.MonkeyPatch) -> None:
    check = replace(check, free_inodes=2**62)
    if os.statvfs(check.folder).f_files == 0:
        # As btrfs says of itself.
        assert report(check)["problems"] == []
        return
    [problem] = report(check)["problems"]
    assert problem.startswith(f"{check.folder} has room for ") and "TXSSM_PREFLIGHT_FREE_INODES" in problem
    monkeypatch.setenv("TXSSM_PREFLIGHT_FREE_INODES", "1")
    assert report(check)["problems"] == []


def test_too_little_shared_memory(check: NodeCheck, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TXSSM_PREFLIGHT_SHM_MB", "1e12")
    [problem] = report(check)["problems"]
    assert problem.startswith("/dev/shm has ") and "(limit 1e+12: TXSSM_PREFLIGHT_SHM_MB)" in problem


def test_a_folder_that_is_not_shared(check: NodeCheck) -> None:
    check.token_file.write_text("of another node")
    assert report(check)["problems"] == [f"{check.folder} is not the first node's: it must be on a shared file system"]
    check.token_file.unlink()
    assert report(check)["problems"] == [f"{check.folder} does not exist: it must be on a shared file system"]


def test_a_file_in_the_place_of_the_folder(check: NodeCheck, tmp_path: Path) -> None:
    check = replace(check, folder=tmp_path / "file")
    check.folder.touch()
    assert report(check)["problems"] == [f"{check.folder} cannot be written: Not a directory"]


def test_too_little_space(check: NodeCheck) -> None:
    free = os.statvfs(check.folder)
    check = replace(check, free_bytes=free.f_blocks * free.f_frsize + 1)
    (problem,) = report(check)["problems"]
    assert problem.startswith(f"{check.folder} has ")
    assert problem.endswith(f" GB left; a checkpoint takes {check.free_bytes / GB:.1f} GB")


@pytest.mark.parametrize(
    ("options", "reason"),
    [("ro", "Read-only file system"), ("size=16k", "No space left on device"), ("nr_inodes=1", "No space left")],
)
def test_a_file_system_that_takes_no_file(check: NodeCheck, tmp_path: Path, options: str, reason: str) -> None:
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode != 0:
        pytest.skip("needs root that may make mount namespaces: start the container with --privileged")
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    # In a process of its own, whose mounts nobody else sees.
    words = [
        f"--folder={mounted}",
        f"--checkpoints={mounted}",
        f"--recipe={check.recipe}",
        "--token=secret",
        f"--token-file={check.token_file}",
    ]
    words += [f"--address={check.address}", "--gpus=0", "--free-bytes=1"]
    script = f'mount -t tmpfs -o {options} none "$0" && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", script, str(mounted), sys.executable, node_check.__file__, *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (problem,) = json.loads(done.stdout)["problems"]
    assert problem.startswith(f"{mounted} cannot be written: {reason}")


# --- Clock and rendezvous.


@pytest.mark.parametrize("ahead", [-3600.0, 0.0, 3600.0])
def test_the_first_nodes_clock_is_read(check: NodeCheck, ahead: float) -> None:
    with answering(f"{time.time() + ahead!r}\n".encode()) as address:
        clock = report(replace(check, address=address))["clock"]
    assert clock is not None
    assert abs(clock["ahead_seconds"] - ahead) < 60
    assert 0 <= clock["uncertain_seconds"] < 60


@pytest.mark.parametrize("answer", [b"noon\n", b"\xff\n", b"", None])
def test_another_service_at_the_port(check: NodeCheck, answer: bytes | None) -> None:
    with answering(answer) as address:
        found = report(replace(check, address=address))
    assert found["clock"] is None
    assert found["problems"][0].startswith(f"the rendezvous at {address} cannot be reached (")


def test_a_port_that_cannot_be_reached(check: NodeCheck) -> None:
    with answering(None) as address:
        pass
    found = report(replace(check, address=address))
    assert found["clock"] is None
    assert "Connection refused" in found["problems"][0]


def test_a_host_that_has_no_address(check: NodeCheck) -> None:
    check = replace(check, address="no-such-host.invalid:29500")
    assert report(check)["problems"][0].startswith("the rendezvous at no-such-host.invalid:29500 cannot be reached (")


# --- Caches and versions.


MOUNTS = """\
overlay / overlay rw 0 0
server:/home /home nfs4 rw 0 0
tmpfs /home/me/local tmpfs rw 0 0
lustre /home2 lustre rw 0 0
user@host:/x /mnt/my\\040disk fuse.sshfs rw 0 0
"""


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/home/me/.triton", "nfs4"),
        ("/home", "nfs4"),
        ("/home2/x", "lustre"),
        ("/mnt/my disk/x", "fuse.sshfs"),
        ("/home/me/local/triton", None),
        ("/homes/x", None),
        ("/scratch/x", None),
    ],
)
def test_a_cache_on_a_network_file_system(
    check: NodeCheck, monkeypatch: pytest.MonkeyPatch, folder: str, kind: str | None
) -> None:
    read = Path.read_text

    def read_text(path: Path, *words: Any, **named: Any) -> str:
        return MOUNTS if str(path) == "/proc/mounts" else read(path, *words, **named)

    monkeypatch.setattr(Path, "read_text", read_text)
    # Which would make the folders.
    monkeypatch.setattr(node_check, "_check_owner", lambda *words: None)
    monkeypatch.setenv("TRITON_CACHE_DIR", folder)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/scratch")
    texts = [text for text in report(check)["warnings"] if "GPU" not in text]
    expected = f"TRITON_CACHE_DIR={folder} is on {kind}; set it to a folder on the node's own disk (slurm/env.sh)"
    assert texts == ([] if kind is None else [expected])


def test_a_cache_of_somebody_else(check: NodeCheck, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cache = tmp_path / "triton"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    assert report(check)["problems"] == [] and cache.stat().st_mode & 0o777 == 0o700
    if os.geteuid() != 0:
        pytest.skip("needs root, to give a folder away")
    os.chown(cache, 4711, 4711)
    assert report(check)["problems"] == [
        f"TRITON_CACHE_DIR={cache} belongs to user 4711, not to this job's; set another in slurm/env.sh"
    ]


def test_a_recipe_that_cannot_be_read_is_a_fact(check: NodeCheck) -> None:
    check.recipe.unlink()
    assert report(check)["facts"]["recipe sha256"] == "unreadable (No such file or directory)"


def test_a_user_without_a_name_is_no_obstacle() -> None:
    # As in a container whose /etc/passwd does not know the user.
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    # Twice, as that user may not read the libraries' files.
    source = Path(node_check.__file__).read_text()
    code = f"import os\nfor user in 0, 4711:\n    os.setuid(user)\n    exec({source!r}, {{'__name__': 'x'}})"
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(HOME)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- Over the nodes.


def says(node: str, **changed: Any) -> Any:
    facts = {"recipe sha256": "ab", "torch": "2.9", **changed.pop("facts", {})}
    clock = {"ahead_seconds": 0.0, "uncertain_seconds": 0.01}
    return {"node": node, "problems": [], "warnings": [], "clock": clock, "facts": facts} | changed


NODES = ["n1", "n2", "n3"]


def test_all_fit() -> None:
    assert find_problems([says(node) for node in reversed(NODES)], NODES, "silent") == {}


def test_a_nodes_own_problems_and_silence() -> None:
    reports = [says("n1"), says("n3", problems=["a", "b"])]
    assert find_problems(reports, NODES, "silent") == {"n2": ["silent"], "n3": ["a", "b"]}
    assert find_problems([], NODES, "silent") == {node: ["silent"] for node in NODES}


def test_the_node_that_differs_is_named() -> None:
    reports = [says("n1", facts={"torch": "2.8"}), says("n2"), says("n3")]
    assert find_problems(reports, NODES, "") == {"n1": ["torch is 2.8, elsewhere 2.9"]}


@pytest.mark.parametrize("order", [1, -1])
def test_of_two_that_differ_the_first_counts(order: int) -> None:
    # In whatever order srun hands on what they say.
    reports = [says("n1", facts={"recipe sha256": "ab"}), says("n2", facts={"recipe sha256": "cd"})]
    assert find_problems(reports[::order], NODES[:2], "") == {"n2": ["recipe sha256 is cd, elsewhere ab"]}


@pytest.mark.parametrize("sign", [1, -1])
def test_a_clock_that_is_off(sign: int) -> None:
    def off(ahead: float, uncertain: float) -> dict[str, list[str]]:
        clock = {"ahead_seconds": sign * ahead, "uncertain_seconds": uncertain}
        return find_problems([says("n1"), says("n2", clock=clock)], NODES[:2], "")

    # The first node is ahead: this one is behind.
    assert off(30.0, 0.1) == {"n2": [f"its clock is {-sign * 30.0:+.1f} s off that of n1"]}
    assert off(MAX_CLOCK_SKEW_SECONDS, 0.0) == {}
    # It may be the network that was slow.
    assert off(30.0, 26.0) == {}


def test_a_node_that_does_not_know_the_time_is_not_compared() -> None:
    assert find_problems([says("n1", clock=None, problems=["x"])], NODES[:1], "") == {"n1": ["x"]}


@pytest.fixture(autouse=True)
def job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for name in list(os.environ):
        if name.startswith("TXSSM_PREFLIGHT_"):
            monkeypatch.delenv(name)


def test_a_caller_that_hangs_up_does_not_end_the_clock() -> None:
    with node_preflight._listener() as listener:
        port = listener.getsockname()[1]
        for _ in range(3):
            caller = socket.create_connection(("127.0.0.1", port))
            # Close with a reset, as a scan of the ports does.
            caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            caller.close()
        thread = threading.Thread(target=node_preflight._tell_time, args=(listener,), daemon=True)
        thread.start()
        with socket.create_connection(("127.0.0.1", port), timeout=300) as connection:
            theirs = float(connection.makefile().readline())
    assert abs(theirs - time.time()) < 60
    thread.join(timeout=300)
    assert not thread.is_alive()


def test_a_port_in_use_is_no_obstacle() -> None:
    ports = [rendezvous_port(attempt) for attempt in range(16)]
    with contextlib.ExitStack() as others:
        with node_preflight._listener() as listener:
            assert listener.getsockname()[1] in ports
        for port in ports:
            # Another process of this machine may have it.
            with contextlib.suppress(OSError):
                others.enter_context(socket.create_server(("", port)))
        with node_preflight._listener() as listener:
            assert listener.getsockname()[1] not in ports


# --- The whole check, with a stand-in for srun: every "node" is this machine.

SRUN = """\
#!/bin/bash
here=$(dirname "$0")
printf '%s\\n' "$@" > "$here/words"
while [[ $1 == --* ]]; do shift; done
echo "srun: job 7 queued and waiting for resources"
for node in 127.0.0.1 127.0.0.2; do
    [ -e "$here/silent_$node" ] || SLURMD_NODENAME=$node "$@"
done
exit 1
"""


@pytest.fixture
def preflight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NodePreflight:
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "srun").write_text(SRUN)
    (folder / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("TXSSM_SRUN_OPTIONS", "--container-image='a b'")
    monkeypatch.delenv("SLURM_GPUS_ON_NODE", raising=False)
    monkeypatch.setenv("SLURMD_NODENAME", "127.0.0.1")
    recipe = load_recipe("demo_cpu", [f"run_directory={tmp_path}/run"])
    make_run_directory(recipe)
    attempt = recipe.run_path / "attempts" / "0001"
    attempt.mkdir(parents=True)
    file = recipe.run_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    return NodePreflight(recipe, str(file), ["127.0.0.1", "127.0.0.2"], attempt, timeout_seconds=600)


def test_every_node_is_asked(preflight: NodePreflight, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert preflight.run() == {}
    words = (tmp_path / "bin" / "words").read_text().splitlines()
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--container-image=a b"} <= set(words)
    assert f"--free-bytes={checkpoint_bytes(preflight.recipe)}" in words
    assert f"--address=127.0.0.1:{preflight.port}" in words and "--nodelist=127.0.0.1,127.0.0.2" in words
    written = json.loads((preflight.folder / "preflight.json").read_text())
    assert [found["node"] for found in written["reports"]] == preflight.nodes
    assert written["problems"] == {}
    assert "preflight: 127.0.0.1, 127.0.0.2: no GPU was requested: not checked\n" in capfd.readouterr().out


def test_a_node_that_does_not_answer(
    preflight: NodePreflight, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bin" / "silent_127.0.0.2").touch()
    words = "its check ended without an answer; srun's messages above may say why"
    assert preflight.run() == {"127.0.0.2": [words]}
    assert f"preflight: 127.0.0.2 is unhealthy: {words}\n" in capfd.readouterr().out


def test_a_node_that_takes_too_long(preflight: NodePreflight, tmp_path: Path) -> None:
    """Its own answer never comes; that of the other counts, however long that takes."""
    srun = tmp_path / "bin" / "srun"
    # The time is over when one has answered: without a clock's help.
    srun.write_text(SRUN.replace("exit 1\n", f"touch '{tmp_path}/one'\nexec sleep 1000\n"))
    (tmp_path / "bin" / "silent_127.0.0.2").touch()
    communicate = subprocess.Popen.communicate

    def when_one_has_answered(process: subprocess.Popen[str], **words: Any) -> Any:
        if words.get("timeout") == preflight.timeout_seconds:
            end = time.monotonic() + 600
            while not (tmp_path / "one").exists() and time.monotonic() < end:
                time.sleep(0.02)
            words["timeout"] = 0.1
        return communicate(process, **words)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess.Popen, "communicate", when_one_has_answered)
        problems = preflight.run()
    assert list(problems) == ["127.0.0.2"]
    (problem,) = problems["127.0.0.2"]
    assert problem.startswith("it did not answer within 600 s; the import of a container's image")
    assert problem.endswith("--preflight-timeout")


def test_the_room_is_looked_for_where_the_checkpoints_go(
    preflight: NodePreflight, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    elsewhere = tmp_path / "elsewhere"
    recipe = load_recipe("demo_cpu", [f"run_directory={tmp_path}/run", f"checkpoint.directory={elsewhere}"])
    elsewhere.mkdir()
    # As many bytes as no disk has.
    preflight.recipe = recipe
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(node_preflight, "checkpoint_bytes", lambda recipe: 10**24)
        problems = preflight.run()
    assert set(problems) == set(preflight.nodes)
    assert all(text.startswith(f"{elsewhere} has ") for texts in problems.values() for text in texts)


def test_a_second_check_finds_the_port_free(preflight: NodePreflight, capfd: pytest.CaptureFixture[str]) -> None:
    # The trainer's rendezvous takes it over: nothing may hold it any more.
    preflight.run()
    with socket.create_server(("", preflight.port)):
        pass
