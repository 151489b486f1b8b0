"""One worker of a run: runs Megatron's pretrain loop on a recipe."""

import contextlib
import faulthandler
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from megatron_txssm.errors import UserError
from megatron_txssm.process_limits import allow_open_files
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.session.arguments import whole_validation_arguments
from megatron_txssm.session.hooks import Listener, listen, listening
from megatron_txssm.session.output import redirect_output
from megatron_txssm.session.start import model_config, start_megatron
from megatron_txssm.slurm.environment import attempt_folder, end_process, end_with_launcher
from megatron_txssm.training.launch.preflight import check_machine, check_run, is_finished, make_run_directory
from megatron_txssm.training.launch.run_lock import RunLock
from megatron_txssm.training.not_finite import NOT_THE_SAME, SAME_AGAIN, explain_not_finite
from megatron_txssm.training.old_checkpoints import removing_old_checkpoints
from megatron_txssm.training.resuming import SoundLoads
from megatron_txssm.training.saving import explain_full_disk, keep_recipe, prepare_saves
from megatron_txssm.training.watch.flight_recorder import dump_when_asked, prepare_recorder

if TYPE_CHECKING:
    from megatron_txssm.training.watch.monitor import TrainingMonitor


def run_worker(recipe: Recipe, work: Callable[[Recipe, TextIO], None] | None = None) -> int:
    """Train a recipe, or do other `work` with it, as the rank given by the environment.

    Returns 0 at the end, or after an exit signal, interval or duration stopped the run and everything was saved.
    Otherwise the process exits at once: with exit code 1 for a failure of this rank, 2 for a user error.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    log = recipe.run_path / "logs" / f"rank_{rank}.log"
    terminal = sys.stdout
    end_with_launcher()
    try:
        check_run(recipe, world_size)
        if is_finished(recipe):
            if rank == 0:
                print(f"{recipe.name}: already finished; {recipe.checkpoint_path} holds step {recipe.train_iters}")
            return 0
        if os.environ.get("LOCAL_RANK", "0") == "0":
            check_machine(recipe, int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))
        allow_open_files()
        make_run_directory(recipe)
        with RunLock(recipe) if rank == 0 else contextlib.nullcontext():
            terminal = redirect_output(log)
            prepare_recorder(attempt_folder())
            write_stacks_when_asked(attempt_folder(), rank)
            (work or pretrain)(recipe, terminal)
    except UserError as error:
        # The launcher goes by the class name, which must not be that of a subclass.
        _report(UserError(str(error)), terminal)
        end_process(2)
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:  # a failure of this rank; torch's CheckpointException is a BaseException
        import traceback

        # On a full disk, both may fail.
        with contextlib.suppress(OSError):
            traceback.print_exc()
        with contextlib.suppress(OSError):
            _report(explain_full_disk(recipe, error), terminal, log=log)
        end_process(1)
    return 0


def _report(error: BaseException, terminal: TextIO, log: Path | None = None) -> None:
    """Pass the error to torchrun's agent, which knows which rank failed first; under srun, print it."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
    elif log is None:
        print(f"error: {error}", file=terminal)
    else:
        message = f"rank {os.environ['RANK']} failed: {type(error).__name__}: {error}"
        print(f"error: {message}\nIts log: {log}", file=terminal)


@listening()
def pretrain(
    recipe: Recipe,
    terminal: TextIO,
    *,
    after: Sequence[str] = (),
    listeners: Sequence[Callable[["TrainingMonitor"], Listener]] = (),
) -> None:
    """Initialise Megatron from the recipe and run its loop to the end.

    after: Megatron's arguments after the recipe's own; listeners: make further listeners to the loop.
    """
    # Placed first, so that entries of the recipe's `megatron:` section override them.
    before = whole_validation_arguments(recipe, int(os.environ["WORLD_SIZE"]))
    args = start_megatron(recipe, before=before, after=after)
    import torch.distributed
    from megatron.core.enums import ModelType
    from megatron.training import pretrain as megatron_pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_txssm.checkpoint.former_checkpoint import FormerCheckpoints
    from megatron_txssm.checkpoint.load import FailedLoads
    from megatron_txssm.training.forward_step import datasets_provider, forward_step
    from megatron_txssm.training.guard.skipped_steps import SkippedSteps
    from megatron_txssm.training.guard.spike_guard import SpikeGuard
    from megatron_txssm.training.watch.display import describe_run
    from megatron_txssm.training.watch.monitor import TrainingMonitor
    from megatron_txssm.training.watch.tracker_backends import tracking

    if args.rank == 0:
        keep_recipe(recipe, recipe.run_path)
        if args.fp8 and args.transformer_impl == "local":
            emulated = f"FP8 ({args.fp8_recipe}) is emulated, since Transformer Engine is not installed"
            print(f"{emulated}: the same rounding, but no speedup", file=terminal, flush=True)
    monitor = TrainingMonitor(recipe, terminal)
    monitor.say(describe_run(recipe, args.world_size))
    # In this order: SoundLoads reports unsound checkpoints in its own words.
    listen(SoundLoads(recipe, monitor.say))
    listen(FailedLoads())
    listen(FormerCheckpoints())
    prepare_saves(recipe, args.rank, monitor.say)
    # Megatron's handler saves and stops on SIGTERM, which clusters send; let Ctrl-C do the same.
    signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    listen(monitor)
    listen(SkippedSteps(recipe))
    for make in listeners:
        listen(make(monitor))
    if recipe.guard.spike_action is not None:
        listen(SpikeGuard(recipe, monitor.say))
    try:
        with (
            removing_old_checkpoints(recipe, args.rank, monitor.say),
            tracking(recipe, monitor.warn) as monitor.trackers,
        ):
            megatron_pretrain(
                pretrain_cfg_container_from_args(args, model_config(args)),
                datasets_provider,
                ModelType.encoder_or_decoder,
                forward_step,
            )
    except SystemExit as stop:  # Megatron's exit after an exit signal, interval or duration: all is saved
        # Its bare sys.exit() follows an error message.
        if stop.code in (SAME_AGAIN, NOT_THE_SAME):
            raise FloatingPointError(explain_not_finite(recipe, stop.code)) from None
        if stop.code != 0:
            raise RuntimeError(f"Megatron ended with exit code {stop.code}; see the log of this rank") from None
        note_signal()
    finally:
        monitor.close()
    torch.distributed.destroy_process_group()


def write_stacks_when_asked(attempt: Path | None, rank: int) -> None:
    """On SIGUSR2, write the stacks of all threads to stderr, to show where the process is stuck.

    In a job, also dump the last collectives into the attempt's folder. Processes of the data loader ignore the signal:
    their stacks would be mistaken for the worker's.
    """
    if attempt is not None:
        dump_when_asked(attempt, rank)
    faulthandler.register(signal.SIGUSR2, all_threads=True, chain=attempt is not None)

    def be_silent() -> None:
        faulthandler.unregister(signal.SIGUSR2)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)

    os.register_at_fork(after_in_child=be_silent)


def note_signal() -> None:
    """Tell the supervisor of a batch job, if any, that a signal ended the loop and everything was saved."""
    from megatron.training.global_vars import get_signal_handler

    folder, handler = attempt_folder(), get_signal_handler()
    # Other early ends are requested by the recipe, such as megatron.exit_interval. Megatron stops all ranks when one
    # has received a signal, and that need not be rank 0.
    if folder is not None and handler is not None and handler._signal_received:
        (folder / "stopped").touch()
