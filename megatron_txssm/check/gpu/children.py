"""Processes of `txssm check gpu` and `txssm bench`.

Each has a log, a result and a time limit, and ends with its parent.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

WORKER = "megatron_txssm.check.gpu.worker"
USER_ERROR = 2


class Child:
    """A worker process; worker.py describes the tasks."""

    def __init__(
        self,
        folder: Path,
        name: str,
        task: dict[str, Any],
        environment: dict[str, str],
        *,
        waits: bool,
        worker: str | None = None,
    ):
        """`waits`: it only prepares until `begin` is called; `worker`: the module that is run (default: WORKER)."""
        self.name, self.log = name, folder / f"{name}.log"
        self._result, self._turn = folder / f"{name}.result.json", folder / f"{name}.turn"
        file = folder / f"{name}.task.json"
        turn = str(self._turn) if waits else None
        task = {**task, "result": str(self._result), "turn": turn, "parent": os.getpid()}
        file.write_text(json.dumps(task), encoding="utf-8")
        # PYTHONSAFEPATH: a json.py in the current folder must not be imported.
        environment = os.environ | {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"} | environment
        with open(self.log, "wb") as stream:
            self._process = subprocess.Popen(
                [sys.executable, "-m", worker or WORKER, str(file)],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=environment,
                # Ctrl-C only reaches this process, which ends the others.
                start_new_session=True,
            )
        self.began = time.monotonic()

    def begin(self) -> None:
        self._turn.touch()
        self.began = time.monotonic()

    def wait(self, deadline: float) -> dict[str, Any]:
        """The result; {"error": why}; or {"refused": why} if the machine or an installation lacks something.

        The process is killed at `deadline` (of the monotonic clock).
        """
        try:
            code = self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            code = None
            self.end()
        if self._result.exists():
            return json.loads(self._result.read_text(encoding="utf-8"))
        if code is None:
            return {"error": f"not finished after {time.monotonic() - self.began:.0f} s"}
        if code == USER_ERROR:
            return {"refused": self._last_words().removeprefix("error: ")}
        return {"error": f"{self._last_words()} (exit code {code})"}

    def _last_words(self) -> str:
        lines = [line.strip() for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines()]
        lines = [line for line in lines if line]
        errors = [line for line in lines if line.startswith("error: ")]
        return (errors or lines or ["no output"])[-1][:300]

    def end(self) -> None:
        """Kill it and the processes it started, if it is still running."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
