"""A simulated Slurm cluster (tools/slurm_sandbox) as the tests see it."""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "slurm_sandbox"
# Longer than anything takes here; whatever takes longer hangs.
PATIENCE = 300  # seconds


def search_path() -> str:
    """PATH with the folder of root's daemons, which not every user has in it."""
    return os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"


def why_not() -> str | None:
    """What this machine lacks for a cluster and what would help, or None."""
    missing = [name for name in ("slurmctld", "slurmd", "munged", "ip") if not shutil.which(name, path=search_path())]
    if os.geteuid() != 0 or missing:
        found = f"not found: {', '.join(missing)}" if missing else "not root"
        return (
            f"needs root and Debian's slurm-wlm and munge ({found}): "
            "apt-get install -y --no-install-recommends slurm-wlm munge iproute2"
        )
    probe = ["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "true"]
    if subprocess.run(probe, capture_output=True).returncode != 0:
        return "needs root that may make namespaces: start the container with --privileged"
    return None


@dataclass
class Sandbox:
    """A cluster with settings of its own. `env` is what its users' commands run with."""

    directory: Path
    env: dict[str, str]
    claim: socket.socket = field(repr=False)

    def command(self, *words: str, **changed: str) -> subprocess.CompletedProcess[str]:
        """Runs tools/slurm_sandbox, with some environment variables changed."""
        return subprocess.run(
            [str(SCRIPT), *words], env=self.env | changed, capture_output=True, text=True, timeout=PATIENCE
        )

    def must(self, *words: str) -> str:
        """The same; it has to succeed. Returns what it says."""
        done = self.command(*words)
        assert done.returncode == 0, f"slurm_sandbox {' '.join(words)}: exit {done.returncode}: {done.stderr}"
        return done.stdout + done.stderr

    def slurm(self, *words: str, cwd: Path | None = None) -> str:
        """Runs one of Slurm's commands and returns what it prints."""
        done = subprocess.run(words, env=self.env, cwd=cwd, capture_output=True, text=True, timeout=PATIENCE)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(words)}: exit {done.returncode}: {done.stderr}{done.stdout}")
        return done.stdout

    def node_states(self) -> dict[str, str]:
        """Every node's state in Slurm's words: idle, mix, alloc, comp, down, down*, idle*, ..."""
        lines = self.slurm("sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %t").splitlines()
        return {name: state for name, _, state in (line.partition(" ") for line in lines)}

    def wait_states(self, wanted: dict[str, str]) -> None:
        """Waits until each of these nodes is in its state."""
        end = time.monotonic() + PATIENCE
        while not wanted.items() <= (states := self.node_states()).items():
            assert time.monotonic() < end, f"after {PATIENCE} s the nodes are {states}, not {wanted}"
            time.sleep(0.2)

    def mend(self, nodes: list[str]) -> None:
        """Whatever was done to these nodes: waits until they are idle and start what they are given."""
        for node in nodes:
            self.must("poweron", node)
            self.must("plug", node)
        self.resume_all()
        # slurmctld may take a node that has just come back for idle before its slurmd answers.
        probe = ["srun", "--immediate=60", f"--nodes={len(nodes)}", f"--nodelist={','.join(nodes)}", "true"]
        end = time.monotonic() + PATIENCE
        while (done := subprocess.run(probe, env=self.env, capture_output=True, text=True)).returncode != 0:
            assert time.monotonic() < end, f"after {PATIENCE} s: {done.stderr}"
            self.resume_all()
        self.resume_all()

    def resume_all(self) -> None:
        """Waits until every node is idle, and resumes those that are drained or down."""
        end = time.monotonic() + PATIENCE
        while set((states := self.node_states()).values()) != {"idle"}:
            assert time.monotonic() < end, f"after {PATIENCE} s the nodes are {states}"
            self.resume_drained(states)
            time.sleep(0.5)

    def resume_drained(self, states: dict[str, str]) -> None:
        """As an administrator does after a look: Slurm drains a node whose processes it could not end in time."""
        for node, state in states.items():
            if state.startswith(("drain", "down")):
                subprocess.run(
                    ["scontrol", "update", f"NodeName={node}", "State=RESUME"], env=self.env, capture_output=True
                )

    def wait_idle(self, nodes: list[str]) -> None:
        self.wait_states(dict.fromkeys(nodes, "idle"))

    def job_state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, ...; Slurm forgets a job five minutes after its end."""
        return self.slurm("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").strip()

    def wait_job(self, job: str, state: str) -> None:
        end = time.monotonic() + PATIENCE
        while (now := self.job_state(job)) != state:
            if time.monotonic() > end:
                raise AssertionError(f"after {PATIENCE} s job {job} is {now}, not {state}")
            time.sleep(0.1)

    @contextmanager
    def closed(self, partition: str) -> Iterator[None]:
        """Within a `with` block, no job starts in this partition; those that run go on."""
        self.slurm("scontrol", "update", f"PartitionName={partition}", "State=DOWN")
        try:
            yield
        finally:
            self.slurm("scontrol", "update", f"PartitionName={partition}", "State=UP")

    def release(self, keep_logs: bool) -> None:
        """Takes the cluster down and gives its settings free."""
        self.must("down")
        if not keep_logs:
            shutil.rmtree(self.directory)
        self.claim.close()


def claim_sandbox() -> Sandbox:
    """A sandbox that is down, whose folder, network, interfaces and port no other test process uses.

    The claim is an address in Linux's abstract namespace: only one process has it, and it ends with that process. What
    a killed one left is cleared away by the next that gets its settings.
    """
    for number in range(26):
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0txssm-slurm-tests-{number}")
        except OSError:
            claim.close()
            continue
        # Not pytest's folder: its name is too long for the sockets that Slurm puts there.
        directory = Path(tempfile.gettempdir()) / f"txssm-slurm-tests-{number}"
        settings = {
            "DIR": str(directory),
            "NET": f"10.79.{number}",
            "PREFIX": "txt" + chr(ord("a") + number),
            "PORT": str(18000 + 10 * number),
        }
        env = {name: value for name, value in os.environ.items() if not name.startswith(("TXSSM_", "SLURM", "SBATCH_"))}
        # Every submission would build its model once; tests/planning/test_check_build.py does.
        env["TXSSM_CHECK_BUILD"] = "0"
        env |= {f"TXSSM_SANDBOX_{name}": value for name, value in settings.items()}
        env |= {"SLURM_CONF": str(directory / "etc" / "slurm.conf"), "PATH": search_path()}
        sandbox = Sandbox(directory, env, claim)
        # Of a killed test process, or of one whose tests failed and which kept its logs.
        sandbox.must("down")
        if directory.exists():
            shutil.rmtree(directory)
        return sandbox
    raise RuntimeError("all 26 settings for test sandboxes are in use")
