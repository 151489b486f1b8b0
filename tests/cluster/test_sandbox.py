"""tools/slurm_sandbox: a cluster that does what real ones do, goes away without a trace, and says what is wrong."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import sandbox as sandbox_module
from tests.cluster.sandbox import PATIENCE, SCRIPT, Sandbox, claim_sandbox, why_not

NODES = ["n1", "n2", "n3"]
# A job that shows that it lives, until it is told to end.
JOB = """\
#!/bin/bash
hostname > started
while ! [ -e go ]; do date +%s.%N > alive; sleep 0.1; done
echo "$(hostname) ${SLURM_RESTART_COUNT:-0}" > ended
"""


@pytest.fixture(autouse=True)
def no_jobs(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test finds and leaves the common cluster idle."""
    yield
    if "sandbox" in request.fixturenames:
        sandbox: Sandbox = request.getfixturevalue("sandbox")
        sandbox.slurm("scancel", "--user=root")
        sandbox.resume_all()


@pytest.fixture(scope="module")
def second(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    """Settings for another cluster; its tests start and end it themselves."""
    if lacks := why_not():
        pytest.skip(lacks)
    second = claim_sandbox()
    yield second
    second.release(keep_logs=request.session.testsfailed > 0)


def submit(sandbox: Sandbox, folder: Path, *options: str) -> str:
    (folder / "job.sh").write_text(JOB)
    return sandbox.slurm("sbatch", "--parsable", *options, "job.sh", cwd=folder).strip()


def wait_for_file(path: Path) -> str:
    end = time.monotonic() + PATIENCE
    while not path.exists() or not path.read_text():
        assert time.monotonic() < end, f"no {path.name} after {PATIENCE} s"
        time.sleep(0.1)
    return path.read_text()


def restarts(sandbox: Sandbox, job: str) -> int:
    words = sandbox.slurm("scontrol", "show", "job", job).split()
    return int(next(word.removeprefix("Restarts=") for word in words if word.startswith("Restarts=")))


def one_error(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """It ended with 2 and one line that has these parts."""
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert done.stderr.startswith("slurm_sandbox: error: ")
    assert done.stderr.count("\n") == 1
    for part in parts:
        assert part in done.stderr


def traces(sandbox: Sandbox) -> list[str]:
    """What is there of a sandbox outside its folder: processes, mounts, network interfaces."""
    found = [path.name for path in Path("/sys/class/net").glob(sandbox.env["TXSSM_SANDBOX_PREFIX"] + "*")]
    for process in Path("/proc").glob("[0-9]*"):
        for name in ("cmdline", "environ", "mountinfo"):
            try:
                text = (process / name).read_bytes()
            except OSError:  # it ended meanwhile, or is a zombie, which has none of these
                continue
            if str(sandbox.directory).encode() in text:
                found.append(f"{process}/{name}: {(process / 'cmdline').read_bytes()}")
    return found


def wait_no_traces(sandbox: Sandbox) -> None:
    """What was killed by others than the sandbox may take a moment to go."""
    end = time.monotonic() + PATIENCE
    while left := traces(sandbox):
        assert time.monotonic() < end, left
        time.sleep(0.1)


# --- What a cluster does.


def test_a_job_runs_on_every_node_but_not_on_the_host(sandbox):
    assert sorted(sandbox.slurm("srun", "--nodes=3", "hostname").split()) == NODES
    assert socket.gethostname().split(".")[0] not in sandbox.slurm("sinfo", "--noheader", "--Node", "--format=%N")


def test_nodes_reach_each_other_by_name(sandbox):
    code = "import socket; socket.create_server(('n1', 7000)).accept()[0].sendall(socket.gethostname().encode())"
    with subprocess.Popen([str(SCRIPT), "shell", "n1", "python3", "-c", code], env=sandbox.env) as server:
        code = (
            "import socket, time\n"
            "for _ in range(3000):\n"
            "    try: print(socket.create_connection(('n1', 7000), 1).recv(9).decode(), socket.gethostname()); break\n"
            "    except ConnectionRefusedError: time.sleep(0.1)\n"
        )
        assert sandbox.must("shell", "n2", "python3", "-c", code) == "n1 n2\n"
        assert server.wait(300) == 0


def test_gpus_are_counted_out(sandbox):
    ask = ["srun", "--nodes=1", "bash", "-c", "echo ${CUDA_VISIBLE_DEVICES-none}"]
    assert sandbox.slurm(*ask) == "none\n"
    assert sandbox.slurm(ask[0], "--gpus-per-node=2", *ask[1:]) == "0,1\n"
    with pytest.raises(RuntimeError, match="not available"):
        sandbox.slurm(ask[0], "--gpus-per-node=3", *ask[1:])


def test_nodes_share_the_files_but_not_dev_shm(sandbox, tmp_path):
    name = f"of_n1_{os.getpid()}"
    sandbox.must("shell", "n1", "touch", f"/dev/shm/{name}", str(tmp_path / name))
    assert sandbox.must("shell", "n1", "ls", "/dev/shm") == f"{name}\n"
    assert sandbox.must("shell", "n2", "ls", "/dev/shm") == ""
    assert not Path("/dev/shm", name).exists()
    assert (tmp_path / name).exists()


def test_shell_stays_in_the_folder_and_passes_on_words_and_exit(sandbox):
    assert sandbox.must("shell", "n3", "pwd").strip() == os.getcwd()
    assert sandbox.must("shell", "n3", "printf", "<%s>", "a b", "$HOME") == "<a b><$HOME>"
    assert sandbox.command("shell", "n3", "bash", "-c", "exit 7").returncode == 7


def test_slurm_works_on_a_node_that_was_told_nothing(sandbox):
    assert sandbox.must("shell", "n1", "env", "-u", "SLURM_CONF", "sinfo", "-h", "-p", "main", "-o", "%D") == "3\n"


def test_users_who_are_not_root_submit_jobs(sandbox):
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    assert sandbox.slurm(*nobody, "srun", "--chdir=/", "id", "-u") == "65534\n"


def test_ended_processes_leave_no_zombies_on_a_node(sandbox):
    sandbox.slurm("srun", "--nodelist=n1", "bash", "-c", "for i in 1 2 3; do (setsid sleep 0.125 &); done")
    end = time.monotonic() + PATIENCE
    # They sleep, are zombies for a moment at most, and are gone.
    while "0.125" in (left := sandbox.must("shell", "n1", "ps", "-e", "-o", "args=")) or "<defunct>" in left:
        assert time.monotonic() < end, left
        time.sleep(0.1)


def test_a_job_of_high_preempts_one_of_main_which_comes_back(sandbox, tmp_path):
    low, high = tmp_path / "low", tmp_path / "high"
    low.mkdir()
    high.mkdir()
    preempted = submit(sandbox, low, "--nodes=3", "--exclusive", "--requeue")
    wait_for_file(low / "started")
    preempting = submit(sandbox, high, "--nodes=1", "--exclusive", "--partition=high")
    wait_for_file(high / "started")
    assert sandbox.job_state(preempted) == "PENDING"
    (high / "go").touch()
    (low / "go").touch()
    sandbox.wait_job(preempting, "COMPLETED")
    sandbox.wait_job(preempted, "COMPLETED")
    assert (low / "ended").read_text().split()[1] == "1"


@pytest.mark.slow
def test_a_power_cut_requeues_the_job_and_the_node_comes_back(sandbox, tmp_path):
    job = submit(sandbox, tmp_path, "--nodelist=n2", "--requeue")
    assert wait_for_file(tmp_path / "started") == "n2\n"
    sandbox.must("poweroff", "n2")
    last = (tmp_path / "alive").read_text()
    assert "n2: powered off\n" in sandbox.must("status")
    one_error(sandbox.command("shell", "n2"), "n2", "poweron n2")
    sandbox.wait_states({"n2": "down*"})
    assert sandbox.job_state(job) == "PENDING"
    assert (tmp_path / "alive").read_text() == last
    sandbox.must("poweron", "n2")
    sandbox.wait_job(job, "RUNNING")
    assert restarts(sandbox, job) == 1
    (tmp_path / "go").touch()
    assert wait_for_file(tmp_path / "ended") == "n2 1\n"
    sandbox.wait_idle(["n2"])


@pytest.mark.slow
def test_a_pulled_cable_takes_a_node_down_until_it_is_plugged(sandbox):
    sandbox.must("unplug", "n3")
    assert "n3: unplugged\n" in sandbox.must("status")
    sandbox.wait_states({"n1": "idle", "n2": "idle", "n3": "down*"})
    sandbox.must("plug", "n3")
    sandbox.wait_idle(["n3"])


def test_a_job_outlives_slurmd(sandbox, tmp_path):
    job = submit(sandbox, tmp_path, "--nodelist=n1")
    wait_for_file(tmp_path / "started")
    sandbox.must("kill-slurmd", "n1")
    assert "n1: on, without slurmd\n" in sandbox.must("status")
    (tmp_path / "alive").unlink()
    wait_for_file(tmp_path / "alive")
    sandbox.must("start-slurmd", "n1")
    assert "n1: on\n" in sandbox.must("status")
    (tmp_path / "go").touch()
    sandbox.wait_job(job, "COMPLETED")
    assert (tmp_path / "ended").read_text() == "n1 0\n"
    assert sandbox.slurm("srun", "--nodelist=n1", "hostname") == "n1\n"


def test_a_job_outlives_slurmctld(sandbox, tmp_path):
    job = submit(sandbox, tmp_path, "--nodelist=n1")
    wait_for_file(tmp_path / "started")
    # slurmctld writes down what it knows every five seconds; a younger job would be forgotten.
    while (sandbox.directory / "state" / "job_state").stat().st_mtime < (tmp_path / "started").stat().st_mtime:
        time.sleep(0.1)
    sandbox.must("kill-slurmctld")
    assert "slurmctld: killed\n" in sandbox.must("status")
    (tmp_path / "alive").unlink()
    sandbox.must("start-slurmctld")
    # It answers at once, and knows the job.
    assert sandbox.job_state(job) == "RUNNING"
    wait_for_file(tmp_path / "alive")
    (tmp_path / "go").touch()
    sandbox.wait_job(job, "COMPLETED")
    assert (tmp_path / "ended").read_text() == "n1 0\n"


def test_what_is_done_already_is_no_mistake(sandbox):
    for words in (["poweron", "n1"], ["plug", "n1"], ["start-slurmd", "n1"], ["start-slurmctld"]):
        sandbox.must(*words)
    assert sandbox.node_states() == dict.fromkeys(NODES, "idle")
    assert sandbox.slurm("srun", "--nodelist=n1", "hostname") == "n1\n"


# --- Up and down.


def test_up_when_up(sandbox):
    for words in (["up"], ["up", "3"]):
        assert "already up with 3 nodes" in sandbox.must(*words)
    one_error(sandbox.command("up", "2"), "3", "not 2", "down")
    one_error(sandbox.command("up", TXSSM_SANDBOX_CPUS="4"), "CPUS is 8", "not 4", "down")
    assert sandbox.node_states() == dict.fromkeys(NODES, "idle")


def test_env_is_for_eval(sandbox):
    # Neither root nor the settings of `up` are needed for it.
    bare = {"PATH": sandbox.env["PATH"], "TXSSM_SANDBOX_DIR": str(sandbox.directory)}
    script = f'eval "$({SCRIPT} env)" && sinfo --noheader --partition=main --format=%D'
    done = subprocess.run(["bash", "-c", script], env=bare, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("3\n", "")


def test_two_live_side_by_side_and_down_leaves_nothing(sandbox, second):
    settings = {"CPUS": "3", "GPUS": "0", "MEMORY_MB": "1200"}
    done = second.command("up", "1", **{f"TXSSM_SANDBOX_{name}": value for name, value in settings.items()})
    assert done.returncode == 0, done.stderr
    try:
        assert second.slurm("sinfo", "--noheader", "--partition=main", "--format=%n %c %m %G") == "n1 3 1200 (null)\n"
        # They fit although nobody said what memory they want.
        assert second.slurm("srun", "--ntasks=3", "hostname") == "n1\n" * 3
        assert traces(second)
        second.slurm("sbatch", "--output=/dev/null", "--wrap=sleep 600")
    finally:
        second.must("down")
    assert traces(second) == []
    assert (second.directory / "log" / "slurmctld.log").stat().st_size > 0
    assert second.command("status").returncode == 1
    one_error(second.command("env"), "not up", "slurm_sandbox up")
    one_error(second.command("poweroff", "n1"), "not up", "slurm_sandbox up")
    assert "down" in second.must("down")
    assert sandbox.node_states() == dict.fromkeys(NODES, "idle")


def test_up_after_everything_was_killed(second):
    second.must("up", "1")
    for file in (second.directory / "run").glob("*.pid"):
        os.kill(int(file.read_text().split()[0]), signal.SIGKILL)
    assert second.command("status").returncode == 1
    try:
        second.must("up", "2")
        second.wait_idle(["n1", "n2"])
    finally:
        second.must("down")
    wait_no_traces(second)


def test_an_interrupted_up_leaves_nothing(second):
    with subprocess.Popen([str(SCRIPT), "up", "9"], env=second.env, stderr=subprocess.PIPE, text=True) as up:
        end = time.monotonic() + PATIENCE
        while not (second.directory / "run" / "node_n1.pid").exists():
            assert time.monotonic() < end
            time.sleep(0.01)
        up.send_signal(signal.SIGTERM)
        assert up.stderr is not None
        assert "interrupted" in up.stderr.read()
    assert up.returncode == 1
    assert traces(second) == []


def test_what_belongs_to_another_is_left_alone(sandbox, second):
    for name in ("PREFIX", "NET", "PORT"):
        variable = f"TXSSM_SANDBOX_{name}"
        done = second.command("up", **{variable: sandbox.env[variable]})
        one_error(done, variable, "another")
        second.must("down")
        assert traces(second) == []
    assert sandbox.slurm("srun", "--nodes=3", "hostname").count("\n") == 3


# --- Mistakes.


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["--help"]),
        (["reboot"], ["'reboot'", "--help"]),
        (["down", "now"], ["'down'", "'now'"]),
        (["plug", "n1", "n2"], ["'plug'", "'n2'"]),
        (["poweroff"], ["'poweroff'", "n1 to n3"]),
        (["poweroff", "n4"], ["'n4'", "n1 to n3"]),
        (["shell", "localhost"], ["'localhost'", "n1 to n3"]),
        (["kill-slurmd", "n0"], ["'n0'", "n1 to n3"]),
    ],
)
def test_wrong_words(sandbox, words, parts):
    one_error(sandbox.command(*words), *parts)
    assert sandbox.node_states() == dict.fromkeys(NODES, "idle")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NODES", "0"),
        ("NODES", "two"),
        ("NODES", "201"),
        ("CPUS", "-1"),
        ("GPUS", "17"),
        ("MEMORY_MB", "8G"),
        ("NET", "10.78.0.0/24"),
        ("PREFIX", "tx-1"),
        ("PORT", "80"),
        ("DIR", "relative/folder"),
        ("DIR", "/with a blank"),
        ("DIR", "/etc/passwd"),
    ],
)
def test_wrong_settings(second, name, value):
    one_error(second.command("up", **{f"TXSSM_SANDBOX_{name}": value}), name, f"'{value}'", "give")
    assert traces(second) == []


def test_wrong_count_of_nodes(second):
    one_error(second.command("up", "many"), "NODES", "'many'", "up 3")


def test_not_root(second):
    # The checkout may lie where only root can read.
    script = shutil.copy(SCRIPT, second.directory / "slurm_sandbox")
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    for words in (["up"], ["down"], ["shell", "n1"]):
        done = subprocess.run([*nobody, script, *words], env=second.env, capture_output=True, text=True)
        one_error(done, "root", "sudo", words[0])


def test_a_folder_of_somebody_else(second):
    theirs = second.directory / "theirs"
    theirs.mkdir()
    os.chown(theirs, 65534, 65534)
    link = second.directory / "link"
    link.symlink_to(second.directory)
    for folder in (theirs, link):
        one_error(second.command("up", TXSSM_SANDBOX_DIR=str(folder)), "TXSSM_SANDBOX_DIR", str(folder), "root")


def test_without_slurm(second, tmp_path):
    for name in ("bash", "env", "realpath", "uname", "cut", "stat", "awk"):
        found = shutil.which(name)
        assert found
        (tmp_path / name).symlink_to(found)
    one_error(second.command("up", PATH=str(tmp_path)), "munge", "slurm-wlm", "apt-get install")


def test_the_tests_say_what_they_lack(monkeypatch):
    monkeypatch.setattr(sandbox_module.shutil, "which", lambda name, path: None if name == "slurmd" else "/bin/" + name)
    lacks = why_not()
    assert lacks and "slurmd" in lacks and "apt-get install" in lacks and "root" in lacks


def test_help_names_every_command_and_setting():
    done = subprocess.run([str(SCRIPT), "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    text = SCRIPT.read_text()
    commands = ("up", "down", "status", "env", "shell", "poweroff", "poweron", "unplug", "plug", "kill-slurmd")
    for word in (*commands, "start-slurmd", "kill-slurmctld", "start-slurmctld"):
        assert word in done.stdout
    for line in text.split("known='")[1].split("'")[0].splitlines():
        name, default = line.split()[:2]
        assert any(f"TXSSM_SANDBOX_{name} " in said and f"({default})" in said for said in done.stdout.splitlines())
