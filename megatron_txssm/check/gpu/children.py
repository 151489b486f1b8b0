"""Processes of `txssm check gpu`: each has a log and a result, a limit, and does not outlive its parent."""

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
    """A worker that was started; see worker.py for what a task holds."""

    def __init__(self, folder: Path, name: str, task: dict[str, Any], environment: dict[str, str], *, waits: bool):
        """`waits`: it prepares itself only, until `begin`."""
        self.name, self.log = name, folder / f"{name}.log"
        self._result, self._turn = folder / f"{name}.result.json", folder / f"{name}.turn"
        file = folder / f"{name}.task.json"
        turn = str(self._turn) if waits else None
        task = {**task, "result": str(self._result), "turn": turn, "parent": os.getpid()}
        file.write_text(json.dumps(task), encoding="utf-8")
        # PYTHONSAFEPATH: a json.py in the current folder is not to be imported.
        environment = os.environ | {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"} | environment
        with open(self.log, "wb") as stream:
            self._process = subprocess.Popen(
                [sys.executable, "-m", WORKER, str(file)],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=environment,
                # Ctrl-C is for us alone, who end them all.
                start_new_session=True,
            )
        self.began = time.monotonic()

    def begin(self) -> None:
        self._turn.touch()
        self.began = time.monotonic()

    def wait(self, deadline: float) -> dict[str, Any]:
        """What it found, or a sentence: {"error": ...}, or {"refused": ...} where the machine or an installation lacks
        something; it is ended at `deadline` (of the monotonic clock)."""
        try:
            code = self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            code = None
            self.end()
        if self._result.exists():
            return json.loads(self._result.read_text(encoding="utf-8"))
        if code is None:
            return {"error": f"not done after {time.monotonic() - self.began:.0f} s"}
        if code == USER_ERROR:
            return {"refused": self._last_words().removeprefix("error: ")}
        return {"error": f"{self._last_words()} (exit code {code})"}

    def _last_words(self) -> str:
        lines = [line.strip() for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines()]
        lines = [line for line in lines if line]
        errors = [line for line in lines if line.startswith("error: ")]
        return (errors or lines or ["no word"])[-1][:300]

    def end(self) -> None:
        """Kill it and what it started, unless it has ended."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
