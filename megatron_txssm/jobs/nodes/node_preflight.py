"""Checks every node of a job before the trainer starts: GPUs, run folder, versions, clock, rendezvous, caches."""

import contextlib
import os
import secrets
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from megatron_txssm.errors import UserError
from megatron_txssm.files import write_json
from megatron_txssm.jobs.nodes.bandwidth_preflight import Bandwidth, json_lines, measure
from megatron_txssm.jobs.nodes.node_check import NodeCheck, NodeReport
from megatron_txssm.process_limits import open_files
from megatron_txssm.recipe.loader import find_recipe
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.sizes import checkpoint_bytes
from megatron_txssm.slurm.environment import rendezvous_port, srun_words, step_python
from megatron_txssm.training.launch.preflight import number_of_shards

# Between a node's clock and the first node's: a larger difference breaks code that compares file times.
MAX_CLOCK_SKEW_SECONDS = 5.0
PORTS_TO_TRY = 16
# Of two checkpoints, its log, and its record of a failure.
FILES_A_RANK = 8
_MODULE = "megatron_txssm.jobs.nodes.node_check"
_ENDED, _NO_ANSWER = "its check ended without an answer", "it did not answer"


class NodePreflight:
    """One run of node_check on every node; `port`: the rendezvous port, found free and reachable."""

    def __init__(self, recipe: Recipe, recipe_file: str, nodes: list[str], folder: Path, timeout_seconds: float):
        self.recipe = recipe
        self.recipe_file = recipe_file
        self.nodes = nodes
        self.folder = folder
        self.timeout_seconds = timeout_seconds
        self.port = 0

    def run(self) -> dict[str, list[str]]:
        """Unhealthy nodes -> their problems. All reports are written to preflight.json."""
        token = secrets.token_hex(16)
        (self.folder / "token").write_text(token)
        with _listener() as listener:
            self.port = listener.getsockname()[1]
            threading.Thread(target=_tell_time, args=(listener,), daemon=True).start()
            reports, silence = self._ask(token)
        problems = find_problems(reports, self.nodes, silence)
        bandwidth = Bandwidth()
        if not problems:
            bandwidth = measure(self.nodes, gpus_on_node(), self.port, self.timeout_seconds)
            problems = bandwidth.problems
        found = {"reports": reports, "problems": problems, "bandwidth": bandwidth.measured}
        write_json(self.folder / "preflight.json", found)
        for text in sorted({text for report in reports for text in report["warnings"]}):
            named = sorted(report["node"] for report in reports if text in report["warnings"])
            print(f"preflight: {', '.join(named)}: {text}", flush=True)
        for text in bandwidth.words:
            print(f"preflight: {text}", flush=True)
        for node, texts in problems.items():
            print(f"preflight: {node} is unhealthy: {'; '.join(texts)}", flush=True)
        return problems

    def _ask(self, token: str) -> tuple[list[NodeReport], str]:
        """The nodes' reports, and the problem of a node without a report."""
        count, saves = len(self.nodes), self.recipe.checkpoint.save_interval is not None
        checkpoints = self.recipe.checkpoint_path if saves else self.recipe.run_path
        check = NodeCheck(
            folder=self.recipe.run_path.resolve(),
            checkpoints=checkpoints.resolve(),
            recipe=find_recipe(self.recipe_file).resolve(),
            token=token,
            token_file=self.folder / "token",
            # This process's node, even if the job's first node is not among those asked.
            address=f"{os.environ.get('SLURMD_NODENAME', socket.gethostname())}:{self.port}",
            gpus=gpus_on_node(),
            free_bytes=checkpoint_bytes(self.recipe) if saves else 0,
            free_inodes=FILES_A_RANK * count * max(1, gpus_on_node()) if saves else 0,
            open_files=self._open_files(),
        )
        command = [
            *srun_words("preflight"),
            *(f"--nodes={count}", f"--nodelist={','.join(self.nodes)}", f"--ntasks={count}", "--ntasks-per-node=1"),
            *(step_python(), "-m", _MODULE, *check.words),
        ]
        silence = f"{_ENDED}; srun's messages above may say why"
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, errors="replace") as srun:
            try:
                output, _ = srun.communicate(timeout=self.timeout_seconds)
            except subprocess.TimeoutExpired:
                srun.kill()
                output, _ = srun.communicate()
                silence = (
                    f"{_NO_ANSWER} within {self.timeout_seconds:g} s; the import of a container's image or a cold "
                    "file system may take longer: --preflight-timeout"
                )
        return cast(list[NodeReport], json_lines(output, '{"node": ')), silence

    def _open_files(self) -> int:
        """Files that a rank keeps open; 0 if the data cannot be read, which the ranks report."""
        try:
            return open_files(number_of_shards(self.recipe))
        except UserError:
            return 0


def is_silence(problem: str) -> bool:
    """Whether a node's problem is that it did not report."""
    return problem.startswith((_ENDED, _NO_ANSWER))


def find_problems(reports: list[NodeReport], nodes: list[str], silence: str) -> dict[str, list[str]]:
    """Node -> problems: reported ones, and differences from others; `silence`: the problem of one without a report."""
    by_node = {report["node"]: report for report in reports}
    # In the nodes' order, not srun's: if two nodes differ, the first counts as correct.
    reports = [by_node[node] for node in nodes if node in by_node]
    problems = {node: list(by_node[node]["problems"]) for node in nodes if node in by_node}
    problems |= {node: [silence] for node in nodes if node not in by_node}
    for fact in reports[0]["facts"] if reports else ():
        usual = Counter(report["facts"][fact] for report in reports).most_common(1)[0][0]
        for report in reports:
            if (value := report["facts"][fact]) != usual:
                problems[report["node"]].append(f"{fact} is {value}, elsewhere {usual}")
    for report in reports:
        clock = report["clock"]
        if clock and abs(clock["ahead_seconds"]) - clock["uncertain_seconds"] > MAX_CLOCK_SKEW_SECONDS:
            problems[report["node"]].append(f"its clock is {-clock['ahead_seconds']:+.1f} s off that of {nodes[0]}")
    return {node: texts for node, texts in problems.items() if texts}


def gpus_on_node() -> int:
    """GPUs that Slurm gives the job on each node."""
    return int(os.environ.get("SLURM_GPUS_ON_NODE", "0"))


@contextlib.contextmanager
def _listener() -> Iterator[socket.socket]:
    """Listens on the first free one of the job's rendezvous ports; on any free port if many are taken."""
    for port in (*map(rendezvous_port, range(PORTS_TO_TRY)), 0):
        with contextlib.suppress(OSError):
            listener = socket.create_server(("", port))
            break
    else:
        raise UserError("this node has no free TCP port for the ranks' rendezvous")
    try:
        yield listener
    finally:
        # After close alone, the thread that waits for connections would keep the port.
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def _tell_time(listener: socket.socket) -> None:
    """Answer every connection with this machine's time, until the listener is closed."""
    with contextlib.suppress(OSError):
        while True:
            connection, _ = listener.accept()
            # A client that hangs up, such as a port scanner, must not end the loop.
            with connection, contextlib.suppress(OSError):
                connection.sendall(f"{time.time()!r}\n".encode())
