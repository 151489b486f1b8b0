"""The study of stability: the paper's hybrid, and without residual connections, pre-norms or FFNs (section 3)."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_txssm.architecture.layer_pattern import FFN, STATE_SPACE
from megatron_txssm.checkpoint.steps import saved_step
from megatron_txssm.errors import UserError
from megatron_txssm.evaluation.states import RESULTS, evaluate_states
from megatron_txssm.files import JsonObject
from megatron_txssm.recipe.changes import changed
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.validation.validate import validate
from megatron_txssm.reporting.plot import COLOURS, write_figure
from megatron_txssm.reporting.series import Series, read_series
from megatron_txssm.studies.conduct import Study
from megatron_txssm.studies.data import corpus_overrides
from megatron_txssm.studies.states import States, largest_norms, mean_norms
from megatron_txssm.studies.study import StudyRun, check_comparable, runs_of
from megatron_txssm.studies.summary import Spread, VariantResult, keep_results, summarize
from megatron_txssm.terminal import print_table
from megatron_txssm.training.guard.window import SpikeWindow

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME = "stability"
REFERENCE = "as_paper"
VARIANTS = (REFERENCE, "no_residual", "no_norm", "no_ffn")
# States are measured in samples so many times as long as the training's, this many of them.
_LONGER, _SAMPLES = 2, 4


def stability(
    preset: str = "small",
    *,
    folder: Path | None = None,
    corpus: str | None = None,
    overrides: Sequence[str] = (),
    command: str = "",
) -> Study:
    """The study of what keeps a hybrid stable.

    preset: a name in data.PRESETS; the hybrid's recipe is position_encoding_PRESET. folder: the study's; default:
    runs/studies/stability-PRESET. The rest is as in `position_encoding.position_encoding`.
    """
    return Study(
        name=NAME,
        folder=folder or default_folder(preset),
        variants=variants(preset, [*corpus_overrides(preset, corpus, overrides), *overrides]),
        check=partial(check_comparable, varied=("model.layer_pattern", "model.ablation")),
        show=show,
        facts={"preset": preset, "command": command},
        may_diverge=True,
        measure=measure_states,
    )


def default_folder(preset: str) -> Path:
    return Path("runs", "studies", f"{NAME}-{preset}")


def variants(preset: str, overrides: Sequence[str]) -> dict[str, Recipe]:
    """The recipes by name, with changed fields of all."""
    # Transformer Engine's norms are parts of linear layers, so all variants have the local modules.
    hybrid = load_recipe(f"position_encoding_{preset}", ["training.transformer_impl=local", *overrides])
    pattern = hybrid.model.layer_pattern
    if FFN not in pattern or not hybrid.has_state_space:
        raise UserError(f"model.layer_pattern={pattern} is the hybrid's: it needs state-space layers (M) and FFNs (-)")
    found = {
        REFERENCE: hybrid,
        "no_residual": changed(hybrid, {"model.ablation": "no_residual"}),
        "no_norm": changed(hybrid, {"model.ablation": "no_norm"}),
        "no_ffn": changed(hybrid, {"model.layer_pattern": _without_ffn(hybrid)}),
    }
    for recipe in found.values():
        validate(recipe)
    return found


def _without_ffn(recipe: Recipe) -> str:
    """The pattern with state-space layers of as many parameters, evenly spread, in place of the FFNs."""
    sizes, pattern = recipe.sizes, recipe.model.layer_pattern
    assert sizes.state_space is not None
    # Each has a norm before it.
    per_ffn = (sizes.ffn_weights + sizes.hidden_size) / (sizes.state_space.num_params() + sizes.hidden_size)
    first, *others = pattern.split(FFN)
    ends = [round(per_ffn * number) for number in range(len(others) + 1)]
    return first + "".join(
        STATE_SPACE * (after - before) + rest for (before, after), rest in zip(pairwise(ends), others, strict=True)
    )


def measure_states(run: StudyRun) -> None:
    """Measure the states of a run's newest checkpoint, unless it has none or that has been done."""
    step = saved_step(run.recipe.checkpoint_path)
    known = _states(run)
    if step is None or (known is not None and known["step"] == step):
        return
    length = run.recipe.training.seq_length
    every = math.gcd(256, length)
    code = evaluate_states(run.path, _states_folder(run), length=_LONGER * length, samples=_SAMPLES, every=every)
    if code > 128:
        # Ctrl-C or SIGTERM, which ends the study, too.
        print("stopped; the same command continues", flush=True)
        sys.exit(code)
    if code:
        print(f"{run.path.name}: its states could not be measured")


def _states_folder(run: StudyRun) -> Path:
    return run.path / "evaluation" / "states"


def _states(run: StudyRun) -> States | None:
    """What `measure_states` has found; None: nothing yet, or the file is something else's."""
    try:
        found = json.loads((_states_folder(run) / RESULTS).read_bytes())
        curves = [layer[name] for layer in found["layers"] for name in ("mean", "largest")]
        whole = "step" in found and curves and {len(curve) for curve in curves} == {len(found["positions"])}
        return found if whole and run.recipe.training.seq_length in found["positions"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True)
class Course:
    """How one training went."""

    run: StudyRun
    series: Series
    # None: not measured.
    states: States | None

    @classmethod
    def of(cls, run: StudyRun) -> "Course":
        return cls(run, read_series(run.path), _states(run))

    @cached_property
    def spikes(self) -> int:
        """Steps far above those before, in loss or gradient norm, as `guard` judges them; also those not finite."""
        guard, found = self.run.recipe.guard, 0
        window = SpikeWindow(min(guard.spike_window, max(8, self.run.recipe.train_iters // 10)), guard.spike_z_score)
        for loss, norm in zip(self.series.loss.tolist(), self.series.grad_norm.tolist(), strict=True):
            if window.is_spike(window.z_scores(loss, norm)):
                found += 1
            else:
                window.add(loss, norm)
        return found

    def as_json(self) -> JsonObject:
        states: JsonObject | None = None
        if self.states is not None:
            mean, largest = mean_norms(self.states["layers"]), largest_norms(self.states["layers"])
            states = {
                "step": self.states["step"],
                "positions": self.states["positions"],
                "mean": [_known(value) for value in mean],
                "largest": [_known(value) for value in largest],
            }
        return {
            "diverged": self.run.has_diverged,
            "steps": self.run.steps_done,
            "last_loss": _known(_last(self.series.loss)),
            "spikes": self.spikes,
            "median_gradient_norm": _known(_over(np.nanmedian, self.series.grad_norm)),
            "largest_gradient_norm": _known(_over(np.nanmax, self.series.grad_norm)),
            "states": states,
        }


def show(folder: Path) -> None:
    """Print how the runs of the study went, as far as they have, and write results.json and results.png."""
    summary = summarize(folder, [*VARIANTS])
    courses = {name: [Course.of(run) for run in runs_of(folder) if run.variant == name] for name in VARIANTS}
    base = summary.results[0]
    _print_tables(summary.results, base, courses)
    diverged = sum(course.run.has_diverged for found in courses.values() for course in found)
    unfinished = summary.unfinished - diverged
    if unfinished:
        print(f"{unfinished} runs are not finished: means over different seeds cannot be compared yet.")
    found: JsonObject = {
        result.name: {
            **result.as_json(),
            f"loss_minus_{REFERENCE}": result.behind(base).as_json(),
            "runs": {str(course.run.number): course.as_json() for course in courses[result.name]},
        }
        for result in summary.results
    }
    keep_results(folder, summary, {"variants": found, "unfinished_runs": unfinished})
    _plot(courses, folder / "results.png")


def _print_tables(
    results: Sequence[VariantResult], base: VariantResult, courses: Mapping[str, Sequence[Course]]
) -> None:
    """How well the models learn, then their gradients and states: two tables, each for 80 columns."""
    learnt, sizes = [], []
    for result in results:
        found = courses[result.name]
        norms = [norms for course in found if (norms := _ends(course)) is not None]
        learnt.append(
            (
                result.name,
                f"{result.parameters:,}",
                f"{sum(course.run.has_diverged for course in found)} of {len(found)}",
                Spread.of([*result.losses.values()]).text(".4f"),
                result.behind(base).text("+.4f"),
                f"{sum(course.spikes for course in found)}",
            )
        )
        sizes.append(
            (
                result.name,
                Spread.of([_over(np.nanmedian, course.series.grad_norm) for course in found]).text(".3g"),
                f"{max((_over(np.nanmax, course.series.grad_norm) for course in found), default=math.nan):.3g}",
                *(Spread.of([*each]).text(".3g") for each in (zip(*norms, strict=True) if norms else ((), ()))),
            )
        )
    print_table(("variant", ">params", ">diverged", ">loss", f">loss - {base.name}", ">spikes"), learnt)
    print()
    print_table(("variant", ">gradient norm", ">largest", ">state norm", f">at {_LONGER}x the length"), sizes)
    print(
        "loss: of validation, of finished runs, mean ± standard deviation over the seeds; gradient norm: median over "
        "the steps,\nand the largest of any run; state norm: of a head, mean over heads and layers, after the "
        "training's length and beyond."
    )


def _ends(course: Course) -> tuple[float, float] | None:
    """The states' mean norm after the training's length, and at the end."""
    if course.states is None:
        return None
    norms = mean_norms(course.states["layers"])
    return norms[course.states["positions"].index(course.run.recipe.training.seq_length)], norms[-1]


def _over(function: Any, values: np.ndarray) -> float:
    """A statistic of the finite values; NaN if there are none."""
    finite = values[np.isfinite(values)]
    return float(function(finite)) if len(finite) else math.nan


def _last(values: np.ndarray) -> float:
    return float(values[-1]) if len(values) else math.nan


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _plot(courses: Mapping[str, Sequence[Course]], picture: Path) -> None:
    """Loss and gradient norm over the steps, state norm over position; a curve for each run, coloured by variant."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.0, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    losses, gradients, states = figure.subplots(1, 3)
    for colour, (name, found) in zip(COLOURS, courses.items(), strict=False):
        for number, course in enumerate(found):
            style = {"color": colour, "linewidth": 1.0, "alpha": 0.8, "label": "" if number else name}
            losses.plot(course.series.step, course.series.loss, **style)
            gradients.plot(course.series.step, course.series.grad_norm, **style)
            if course.run.has_diverged:
                losses.plot(course.series.step[-1:], course.series.loss[-1:], "x", color=colour)
            if course.states is not None:
                states.plot(course.states["positions"], mean_norms(course.states["layers"]), **style)
    _finish(losses, "training loss (nats/token); x: diverged", "step")
    _finish(gradients, "gradient norm", "step")
    _finish(states, "norm of a head's state, mean", "position (tokens)")
    gradients.set_yscale("log")
    states.set_yscale("log")
    for length in {course.run.recipe.training.seq_length for found in courses.values() for course in found}:
        states.axvline(length, color="0.6", linestyle="--", linewidth=0.8)
    losses.legend(frameon=False)
    write_figure(figure, picture)


def _finish(axes: "Axes", label: str, over: str) -> None:
    axes.set(ylabel=label, xlabel=over)
    axes.grid(True, color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
