"""`txssm plan`: the best layouts of a recipe on N GPUs, or how it scales."""

import dataclasses
import math
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_txssm.architecture.gpus import GIB, GPUS, Gpu
from megatron_txssm.errors import UserError, require_positive
from megatron_txssm.files import unwound_by_signals
from megatron_txssm.planning.corrections import UNCHANGED, read_calibration
from megatron_txssm.planning.layouts import LAYOUT_FIELDS, Layout, layout_named
from megatron_txssm.planning.nearest import Answer, answer
from megatron_txssm.planning.overlay import check_overlay, write_overlay
from megatron_txssm.planning.rates import Cluster
from megatron_txssm.planning.report import Request, show_answer
from megatron_txssm.planning.sweep import show_sweep
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.validation.fp8_checks import check_fp8_on
from megatron_txssm.terminal import terminal_width

DEFAULT_GPU = "h100-sxm"
MOST_GPUS = 1_000_000
# A cluster that is not there yet has every kernel.
NEW_CUDNN = (9, 24, 0)


@unwound_by_signals()
def plan(
    name: str,
    *,
    gpus: int | None,
    gpu: str | None = None,
    rates: Path | None = None,
    calibrate: Path | None = None,
    nodes_of: int | None = None,
    gpu_memory: float | None = None,
    memory_fraction: float = 0.92,
    target_tokens: int | None = None,
    top: int = 5,
    layout: str | None = None,
    dry_runs: int = 3,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    sweep: Sequence[int] = (),
    plot: Path | None = None,
) -> int:
    """Print the plan of a recipe and write the best layout to `out`; returns the exit code.

    gpu: a name of architecture/gpus.py, by default the measured one of `rates`, otherwise h100-sxm.
    rates: a file that `calibrate` wrote. calibrate: measure this machine with `gpus` processes, and only write this.
    gpu_memory: GiB of a GPU instead of its data sheet's. memory_fraction: what tensors may take of it.
    layout: a name as the plan prints them: this layout alone. dry_runs: how many of the best are dry-run.
    overrides: --set options; a layout field that one sets keeps that value.
    Returns 1 if nothing meets the request and the nearest answer was printed.
    """
    require_positive(gpus=gpus, nodes_of=nodes_of, target_tokens=target_tokens, top=top)
    for number in (gpus or 0, *sweep):
        if number > MOST_GPUS:
            raise UserError(f"{number:,} GPUs are more than any cluster has; plan for at most {MOST_GPUS:,}")
    if dry_runs < 0:
        raise UserError(f"--dry-runs {dry_runs} must be at least 0")
    if not 0 < memory_fraction <= 1:
        raise UserError(f"--memory-fraction {memory_fraction:g} must be above 0 and at most 1, such as 0.92")
    if gpu_memory is not None and not 0 < gpu_memory < math.inf:
        raise UserError(f"--gpu-memory {gpu_memory:g} must be a number of GiB above 0, such as 80")
    recipe = load_recipe(name, overrides)
    if calibrate is not None:
        return _calibrate(recipe, gpus, calibrate)
    if out is not None:
        check_overlay(out, recipe)
    stated = [text.partition("=")[0].strip() for text in overrides]
    fixed = _fixed(recipe, stated)
    if layout is not None:
        if fixed:
            raise UserError(f"--layout {layout} and --set {next(iter(fixed))} state the same field; leave one out")
        fixed = _named(layout, gpus, sweep).changes
    cluster = cluster_of(gpu, nodes_of, gpu_memory, rates)
    _check_fp8(recipe, cluster)
    limit = memory_fraction * cluster.gpu.memory_bytes
    tokens = target_tokens or recipe.train_iters * recipe.training.global_batch_tokens
    if sweep:
        for option, value in (("--gpus", gpus), ("--out", out)):
            if value is not None:
                raise UserError(f"{option} {value} has no effect on a sweep; leave it out, or --sweep")
        require_positive(sweep=min(sweep))
        return show_sweep(recipe, cluster, limit, sorted(set(sweep)), fixed, plot)
    if plot is not None:
        raise UserError(f"--plot {plot} draws a sweep; add --sweep, such as --sweep 8,64,512")
    if gpus is None:
        raise UserError("--gpus is missing: how many to plan for, such as --gpus 64; or --sweep 8,64,512")
    found = answer(recipe, gpus, cluster, limit, fixed)
    if found.problem:
        print_wrapped(f"{found.problem}{_instead(found)}")
        print()
    best = show_answer(Request(recipe, cluster, tokens, top), found, dry_runs)
    if found.problem or best is None:
        why = "this is not what was asked for" if found.problem else "no dry run fits; --dry-runs 0 goes by formula"
        print(f"\n{why}" if out is None else f"\n{out} was not written, as {why}")
        return 1
    if out is not None:
        about = f"{best.layout.name} on {found.gpus} {cluster.gpu.name}, planned from {recipe.name}"
        write_overlay(out, name, recipe, best.layout, stated, about)
        print(f"\nwrote {out}: txssm pretrain {out}, or txssm submit {out}")
    return 0


def print_wrapped(text: str) -> None:
    """Print a sentence, in a terminal no wider than that."""
    width = terminal_width(sys.stdout)
    print(text if width is None else textwrap.fill(text, max(width, 20), break_on_hyphens=False))


def _instead(found: Answer) -> str:
    if found.ranking.best is not None:
        return f"; the nearest number that works is {found.gpus}:"
    if found.ranking.smallest is not None:
        return "; nor on more of them: use GPUs with more memory, or a smaller model or sequence"
    return ""


def _named(name: str, gpus: int | None, sweep: Sequence[int]) -> Layout:
    """The layout of this name; UserError if it is one of another number of GPUs."""
    layout = layout_named(name)
    if layout.data and sweep:
        raise UserError(f"--layout {name} states the GPUs that --sweep varies; leave dp{layout.data} out")
    if layout.data and gpus is not None and layout.gpus != gpus:
        raise UserError(f"--layout {name} has {layout.gpus} GPUs, not --gpus {gpus}; leave dp{layout.data} out")
    return layout


def _fixed(recipe: Recipe, stated: Sequence[str]) -> dict[str, Any]:
    """The layout fields that --set states, with their values."""
    found = {}
    for dotted in stated:
        if dotted in LAYOUT_FIELDS:
            section, _, field = dotted.partition(".")
            found[dotted] = getattr(getattr(recipe, section), field)
    return found


def _calibrate(recipe: Recipe, processes: int | None, file: Path) -> int:
    from megatron_txssm.planning.calibration.measure import calibrate

    if processes is None:
        raise UserError("--gpus is missing: how many of this machine to measure, such as --gpus 8")
    if not file.absolute().parent.is_dir():
        raise UserError(f"--calibrate {file}: its folder does not exist; make it, or name another")
    calibration = calibrate(recipe, processes)
    try:
        calibration.write(file)
    except OSError as error:
        raise UserError(f"--calibrate {file} cannot be written: {error.strerror}; name another file") from error
    print(f"\nwrote {file}: txssm plan {recipe.name} --rates {file} --gpus {processes}")
    return 0


def cluster_of(
    name: str | None, per_node: int | None = None, memory: float | None = None, rates: Path | None = None
) -> Cluster:
    """GPUs of this kind in nodes of `per_node` (default: usual ones); memory: GiB instead of the data sheet's.

    rates: those of the machine that this file describes.
    """
    if rates is None:
        gpu, corrections = _gpu(name or DEFAULT_GPU), UNCHANGED
    else:
        measured = read_calibration(rates)
        gpu, corrections = measured.gpu, measured.corrections
        if name not in (None, gpu.name):
            raise UserError(f"--gpu {name}: --rates {rates} were measured on {gpu.name}; leave one of them out")
    if memory is not None:
        gpu = dataclasses.replace(gpu, memory_bytes=int(memory * GIB))
    return Cluster(gpu, per_node or gpu.per_node, corrections)


def _check_fp8(recipe: Recipe, cluster: Cluster) -> None:
    """UserError if the GPU does not support the recipe's FP8 settings."""
    try:
        check_fp8_on(recipe, cluster.gpu.capability, NEW_CUDNN)
    except UserError as error:
        raise UserError(f"--gpu {cluster.gpu.name}: {error}; or name another --gpu") from None


def _gpu(name: str) -> Gpu:
    known = {gpu.name: gpu for gpu in GPUS}
    if name not in known:
        raise UserError(f"--gpu {name} is unknown; use one of {', '.join(known)}")
    return known[name]
