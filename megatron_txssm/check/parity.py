"""txssm check parity: loss and gradients of a recipe's parallel layouts, compared with one process."""

import itertools
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron_txssm.architecture.layer_pattern import DEPTH
from megatron_txssm.check.layouts import ONE_PROCESS, Layout, all_layouts, why_not
from megatron_txssm.check.shrink import left_out, shrink
from megatron_txssm.check.tokens import write_tokens
from megatron_txssm.errors import UserError, nearest, readable, require_positive
from megatron_txssm.files import unwound_by_signals
from megatron_txssm.recipe.changes import changed
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.terminal import print_table, progress_bar

if TYPE_CHECKING:
    from megatron_txssm.check.runs import Run

Precision = Literal["fp64", "fp32"]
# Bounds by precision: nats per token, and ‖g − g_one‖ / ‖g_one‖ of a parameter.
BOUNDS: dict[Precision, tuple[float, float]] = {"fp32": (1e-6, 1e-5), "fp64": (1e-9, 1e-7)}
# Exit code if a layout computes something other than one process.
DIFFERENT = 3


class RunFailed(Exception):
    """The reference run failed, for a reason other than a user error."""


@dataclass(frozen=True)
class Verdict:
    """A layout's errors against one process, or its failure."""

    loss_error: float = math.inf
    gradient_error: float = math.inf
    # The parameter with the largest gradient error.
    parameter: str = ""
    failure: str | None = None
    precision: Precision = "fp32"

    @property
    def same(self) -> bool:
        loss_bound, gradient_bound = BOUNDS[self.precision]
        return self.loss_error <= loss_bound and self.gradient_error <= gradient_bound

    @property
    def word(self) -> str:
        return "same" if self.same else "FAILED" if self.failure else "DIFFERENT"


@unwound_by_signals()
def check_parity(
    recipe: str | Path,
    *,
    nproc: int = 4,
    overrides: Sequence[str] = (),
    layouts: Sequence[str] = (),
    steps: int = 2,
    precision: Precision = "fp64",
) -> int:
    """Compare a recipe's parallel layouts with one process, and print a table; 0 if all are the same, else DIFFERENT.

    recipe: a name or a YAML file, with fields changed by `overrides` ("a.b=c"); it is shrunk. layouts: names such as
    "tp2_sp", or "recipe" for the recipe's own; none: all legal ones of up to `nproc` processes. steps: optimizer steps.
    UserError if there is nothing to compare.
    """
    require_positive(nproc=nproc, steps=steps)
    loaded = load_recipe(recipe, overrides)
    with tempfile.TemporaryDirectory(prefix="txssm-check-") as name:
        folder = Path(name)
        small = shrink(loaded, folder / "tokens", nproc=nproc, steps=steps)
        legal, refused = legal_layouts(loaded, small, nproc, layouts)
        if not legal:
            raise UserError(f"--nproc {nproc}: no layout of {loaded.name} to compare:\n{listed(refused)}")
        print(described(loaded, small, precision), flush=True)
        write_tokens(folder / "tokens")
        try:
            verdicts = compare(small, legal, folder, precision)
        except RunFailed as error:
            print(readable(f"error: {error}"), file=sys.stderr)
            return DIFFERENT
    _print_table(verdicts)
    print(bounds(precision))
    if refused:
        print(f"\nnot legal for this recipe:\n{listed(refused)}")
    different = [layout.name for layout, verdict in verdicts.items() if not verdict.same]
    if different:
        print(f"\nNOT the same as one process: {', '.join(different)}")
        return DIFFERENT
    print(f"\nthe same as one process: all {len(verdicts)} layout{'s' if len(verdicts) > 1 else ''}")
    return 0


def bounds(precision: Precision) -> str:
    loss_bound, gradient_bound = BOUNDS[precision]
    return f"bounds: {loss_bound:g} nats per token, {gradient_bound:g} of the norm of a parameter's gradient"


def described(recipe: Recipe, small: Recipe, precision: Precision) -> str:
    """One line on what is compared, and one on what is left out of the recipe."""
    model, training = small.model, small.training
    layers = DEPTH.join([small.layers, *small.prediction_depths])
    lines = [
        f"{recipe.name}, made small: {len(small.layers)} layers ({layers}), hidden_size {model.hidden_size}, "
        f"{small.global_batch_size} samples of {training.seq_length} tokens, {training.train_iters} steps, {precision}"
    ]
    if entries := left_out(recipe):
        lines.append(f"without megatron: {', '.join(entries)}")
    return "\n".join(lines)


def compare(small: Recipe, layouts: Sequence[Layout], folder: Path, precision: Precision) -> dict[Layout, Verdict]:
    """Run each layout and one process, and compare them; UserError or RunFailed if the one process has no result."""
    from megatron_txssm.check.runs import RecipeRun, run_all

    reference = RecipeRun(folder / "one_process", changed(small, ONE_PROCESS))
    runs = {layout: RecipeRun(folder / layout.name, layout.of(small)) for layout in layouts}
    sizes = sorted({1, *(layout.processes for layout in layouts)})
    with progress_bar("comparing layouts", len(runs) + 1) as advance:
        for size in sizes:
            batch = [run for layout, run in runs.items() if layout.processes == size]
            run_all(size, [reference, *batch] if size == 1 else batch, precision=precision, advance=advance)
            if size == 1 and (refusal := reference.refusal()):
                raise UserError(refusal)
            if size == 1 and (failure := reference.failure()):
                raise RunFailed(f"one process fails, and there is nothing to compare with: {failure}")
    return {layout: verdict(run, reference, precision) for layout, run in runs.items()}


def verdict(run: "Run", reference: "Run", precision: Precision) -> Verdict:
    """Compare two runs of one recipe."""
    from megatron_txssm.check.runs import worst_gradient

    if failure := run.failure():
        return Verdict(failure=failure)
    losses, expected = run.losses(), reference.losses()
    steps = sorted(expected)
    if losses.keys() != expected.keys():
        return Verdict(failure=f"it has losses of the steps {sorted(losses)}, one process of {steps}")
    errors = [abs(losses[step] - expected[step]) for step in steps]
    gradient_error, parameter = worst_gradient(run, reference, steps)
    loss_error = math.inf if any(map(math.isnan, errors)) else max(errors)
    return Verdict(loss_error, gradient_error, parameter, precision=precision)


def legal_layouts(
    recipe: Recipe, small: Recipe, nproc: int, names: Sequence[str]
) -> tuple[list[Layout], list[tuple[Layout, str]]]:
    """The layouts to compare (all, or those in `names`), and the illegal ones for this recipe, with their reasons."""
    found = all_layouts(nproc)
    known = [layout.name for layout in found]
    for name in names:
        if name not in known:
            hint = nearest(name, known) or f"; use some of {', '.join(known)}"
            raise UserError(f"--layout {name}: no layout of up to {nproc} processes has this name{hint}")
    asked = [layout for layout in found if not names or layout.name in names]
    reasons = [(layout, why_not(layout, recipe, small)) for layout in asked]
    refused = [(layout, reason) for layout, reason in reasons if reason is not None]
    if names and refused:
        layout, reason = refused[0]
        raise UserError(f"--layout {layout.name}: {reason}")
    return [layout for layout, reason in reasons if reason is None], refused


def listed(refused: Sequence[tuple[Layout, str]]) -> str:
    """One line per reason, with the layouts that it applies to."""

    def of(entry: tuple[Layout, str]) -> str:
        return entry[1]

    groups = itertools.groupby(sorted(refused, key=of), key=of)
    return "\n".join(f"  {', '.join(layout.name for layout, _ in group)}: {reason}" for reason, group in groups)


def _print_table(verdicts: dict[Layout, Verdict]) -> None:
    rows = []
    for layout, result in verdicts.items():
        errors = ("", "") if result.failure else (f"{result.loss_error:.1e}", f"{result.gradient_error:.1e}")
        rows.append((layout.name, str(layout.processes), result.word, *errors, result.parameter))
    print_table(("layout", ">processes", "verdict", ">loss error", ">worst gradient error", "of"), rows)
    for line in _failures(verdicts):
        print(line)


def _failures(verdicts: dict[Layout, Verdict]) -> Iterator[str]:
    return (f"{layout.name}: {result.failure}" for layout, result in verdicts.items() if result.failure)
