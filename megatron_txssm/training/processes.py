"""Starts a run's workers, one process each, on this machine; under torchrun or srun, this process is one of them."""

import contextlib
import importlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, TextIO

from megatron_txssm.errors import UserError
from megatron_txssm.process_limits import allow_open_files
from megatron_txssm.process_tree import signal_descendants
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.sizes import smallest_world_size
from megatron_txssm.slurm.environment import adopt_slurm_step, is_worker
from megatron_txssm.training.guard.spikes import REWIND
from megatron_txssm.training.launch.ended import forget_local_end, note_local_end
from megatron_txssm.training.launch.preflight import (
    check_machine,
    check_run,
    is_finished,
    make_run_directory,
    saved_step,
    warnings,
)
from megatron_txssm.training.launch.run_lock import check_not_running

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def pretrain(
    recipe: str | Path,
    *,
    work: Callable[[Recipe, TextIO], None] | None = None,
    overrides: Sequence[str] = (),
    nproc: int | None = None,
    port: int | None = None,
) -> int:
    """Train a recipe, from its newest checkpoint if there is one; returns the exit code.

    recipe: a name listed by `txssm recipes`, or a YAML file; work: what a worker does with it (None: it trains, as
    `evaluation.harness.in_training.train_and_score` does, but without scores of evaluation.tasks);
    overrides: changed fields, as "a.b=c". Under torchrun and srun this process is one of the workers; otherwise it
    starts `nproc` workers on this machine (None: as few as the layout needs), which meet at TCP `port` (None: any free
    port). UserError if the recipe, its data or its checkpoint are wrong.
    """
    checked = load_recipe(str(recipe), overrides)
    adopt_slurm_step()
    if is_worker():
        from megatron_txssm.training.pretrain import run_worker

        return run_worker(checked, work)
    return launch(checked, nproc, worker_command("pretrain", str(recipe), overrides=overrides), port=port)


def worker_command(verb: str, *words: str, overrides: Sequence[str]) -> list[str]:
    """The command line of `txssm` that each worker runs."""
    return [verb, *words, *(word for text in overrides for word in ("--set", text))]


def launch(recipe: Recipe, nproc: int | None, command: list[str], *, port: int | None = None, resumes: str = "") -> int:
    """Run `txssm COMMAND` in `nproc` processes of this machine (None: as few as the layout needs) and wait.

    Returns the exit code. `resumes`: from where the same command resumes, if not from a checkpoint.

    All checks come before anything is written or started. On Ctrl-C or SIGTERM, workers that train finish their step,
    save and stop; others stop at once.
    """
    if nproc is None:
        nproc = smallest_world_size(recipe)
    if nproc < 1:
        raise UserError(f"--nproc {nproc} must be at least 1")
    check_run(recipe, world_size=nproc)
    if port is not None:
        _check_port(port)
    if is_finished(recipe):
        print(f"{recipe.name}: already finished; {recipe.checkpoint_path} holds step {recipe.train_iters}")
        return 0
    check_machine(recipe, nproc)
    allow_open_files()
    check_not_running(recipe)
    make_run_directory(recipe)
    forget_local_end(recipe.run_path)
    print(f"{recipe.name}: {nproc} process{'es' if nproc > 1 else ''}, run directory {recipe.run_path}", flush=True)
    for warning in warnings(recipe):
        print(f"warning: {warning}", flush=True)
    while (code := _launch_workers(recipe, nproc, command, port or 0, resumes)) is None:
        print(f"{recipe.name}: starting again, as the spike guard went back", flush=True)
    return code


def _launch_workers(recipe: Recipe, nproc: int, command: list[str], port: int, resumes: str) -> int | None:
    """The exit code; None if the workers must be started again.

    Port 0: the rendezvous binds a free port itself, because one chosen here could be taken before.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousConnectionError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The failure is reported once, below; the agent would only report exit codes.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # Workers share the cores; by default each would start as many threads as there are cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // nproc)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=recipe.name,
        rdzv_backend="c10d",
        rdzv_endpoint=f"localhost:{port}",
        # Otherwise a port that cannot be bound is assumed to be another launcher's, and waited for.
        rdzv_configs={"is_host": True},
        # Also the workers' address: this machine's hostname may not resolve.
        local_addr="localhost",
        max_restarts=0,
        # The other signals are handled here: torch would only give the workers 30 s to save.
        signals_to_handle="SIGQUIT",
    )
    with _StopSignals(saves=recipe.checkpoint.save_interval is not None) as stop:
        try:
            elastic_launch(config, sys.executable)("-u", "-m", "megatron_txssm.cli", *command)
        except RendezvousConnectionError as error:
            raise UserError(f"no TCP port for the processes' rendezvous (--port {port}): {error.__cause__}") from None
        except ChildFailedError as failures:
            went_back = _message(failures).startswith(f"{REWIND}: ")
            if went_back and stop.received is None:
                return None
            if not went_back and (stop.received is None or not _ended_by_signal(failures)):
                return _explain(failures, recipe)
    if stop.received is None:
        note_local_end(recipe.run_path, 0, "its processes ended without an error")
        return 0
    note_local_end(recipe.run_path, 128 + stop.received, f"it was told to stop ({signal.Signals(stop.received).name})")
    step = None if recipe.checkpoint.save_interval is None else saved_step(recipe.checkpoint_path)
    if step is not None:
        resumes = f"{recipe.checkpoint_path} holds step {step}"
    if resumes:
        print(f"stopped; {resumes}, from which the same command resumes")
    else:
        print("stopped; there is no checkpoint to resume from")
    return 128 + stop.received


def _ended_by_signal(failures: "ChildFailedError") -> bool:
    """Whether the workers ended by the signals that stop a run (at once or while starting), not by a fault."""
    codes = {failure.exitcode for failure in failures.failures.values()}
    return codes <= {-signal.SIGINT, -signal.SIGTERM, -signal.SIGKILL, 128 + signal.SIGINT, 128 + signal.SIGTERM}


def _explain(failures: "ChildFailedError", recipe: Recipe) -> int:
    """Report once what ended the run; 2 for a user error, 1 for a failure."""
    rank, failure = failures.get_first_failure()
    message = _message(failures)
    kind, _, text = message.partition(": ")
    if kind == UserError.__name__:
        note_local_end(recipe.run_path, 2, text)
        raise UserError(text)
    # Without an error file, the message is only torch's advice on how to create one.
    if "pytorch.org" in message:
        message = "it ended without an error message"
    log = recipe.run_path / "logs" / f"rank_{rank}.log"
    note_local_end(recipe.run_path, 1, f"rank {rank} failed (exit code {failure.exitcode}): {message}", str(log))
    print(f"error: rank {rank} failed (exit code {failure.exitcode}): {message}\nIts log: {log}", file=sys.stderr)
    return 1


def _message(failures: "ChildFailedError") -> str:
    """What the first rank to fail reported."""
    _, failure = failures.get_first_failure()
    message = failure.message
    return str(message.get("message", "") if isinstance(message, dict) else message)


class _StopSignals:
    """On the first Ctrl-C, SIGTERM or hang-up the workers finish their step and save, on the second they are killed.

    The workers have their own sessions, so a terminal's Ctrl-C does not reach them: they are sent SIGTERM.
    """

    received: int | None = None

    def __init__(self, *, saves: bool):
        self.does = "stopping after this step and saving" if saves else "stopping"

    def __enter__(self) -> "_StopSignals":
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        # A second signal interrupts the handler of the first, and must not find the module half imported.
        importlib.import_module("psutil")
        # Ignored signals stay ignored: nohup, and background jobs of a script.
        heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
        self.previous = {number: signal.signal(number, self._handle) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.received is None:
            self.received = number
            # After a hang-up the terminal is gone.
            with contextlib.suppress(OSError):
                print(f"\n{self.does} (press Ctrl-C again to stop at once)", flush=True)
            signal_descendants(os.getpid(), signal.SIGTERM, recursive=False)
            return
        signal_descendants(os.getpid(), signal.SIGKILL)


def _check_port(port: int) -> None:
    """Bind the port on all addresses, as the rendezvous will."""
    try:
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("", port))
    except (OSError, OverflowError) as error:
        raise UserError(f"--port {port} cannot be used: {error}; use another, or leave --port out") from None
