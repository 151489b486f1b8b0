"""What a study's finished runs show: perplexity over the seeds, steps per second, as a table, JSON and a picture."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from megatron_txssm.architecture.parameters import count_parameters
from megatron_txssm.files import Json, JsonObject, write_results
from megatron_txssm.metrics import each_line, perplexity
from megatron_txssm.recipe.paper import Measured
from megatron_txssm.reporting.plot import COLOURS, write_figure
from megatron_txssm.reporting.series import read_series
from megatron_txssm.studies.study import TIMING, TIMING_WARMUP_STEPS, StudyRun, runs_of, study_facts
from megatron_txssm.terminal import print_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Spread(NamedTuple):
    """A mean and the sample standard deviation; NaN with one value, or an infinite one."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        array = np.asarray(values)
        mean = float(array.mean()) if len(array) else math.nan
        finite = len(array) > 1 and math.isfinite(mean)
        return cls(mean, float(array.std(ddof=1)) if finite else math.nan)

    def as_json(self) -> JsonObject:
        return {name: value if math.isfinite(value) else None for name, value in self._asdict().items()}

    def text(self, form: str) -> str:
        if math.isnan(self.mean):
            return ""
        deviation = "" if math.isnan(self.deviation) else f" ± {self.deviation:{form.lstrip('+')}}"
        return format(self.mean, form) + deviation


@dataclass(frozen=True)
class VariantResult:
    """The finished runs of a variant."""

    name: str
    parameters: int
    # Seed -> nats per token on the validation data, after the last step.
    losses: dict[int, float]
    # Medians: of each timing run, or of each finished run if there are none.
    steps_per_second: list[float]

    @property
    def perplexity(self) -> Spread:
        return Spread.of([*map(perplexity, self.losses.values())])

    def as_json(self) -> JsonObject:
        return {
            "parameters": self.parameters,
            "loss_by_seed": {str(seed): loss for seed, loss in self.losses.items()},
            "perplexity": self.perplexity.as_json(),
            "steps_per_second": Spread.of(self.steps_per_second).as_json(),
        }

    def behind(self, reference: "VariantResult") -> Spread:
        """How much higher its losses are than the reference's, seed by seed, as both saw the same data in each."""
        both = self.losses.keys() & reference.losses.keys()
        return Spread.of([self.losses[seed] - reference.losses[seed] for seed in sorted(both)])


@dataclass(frozen=True)
class Summary:
    """All variants' results, in the order of the study."""

    results: list[VariantResult]
    seeds: list[int]
    # Whether the steps were timed in runs of their own, one after another.
    timed_apart: bool

    @property
    def unfinished(self) -> int:
        return sum(len(self.seeds) - len(result.losses) for result in self.results)


def summarize(folder: Path, order: list[str]) -> Summary:
    """`order`: the variants' names. UserError if the folder holds no study."""
    study_facts(folder)
    runs, timing = runs_of(folder), [run for run in runs_of(folder, TIMING) if run.is_finished]
    results = []
    for name in order:
        of_variant = [run for run in runs if run.variant == name]
        finished = {run.number: run for run in of_variant if run.is_finished}
        timed = [run for run in timing if run.variant == name] if timing else list(finished.values())
        losses = {seed: loss for seed, run in finished.items() if (loss := _final_loss(run)) is not None}
        parameters = count_parameters(of_variant[0].recipe.sizes).total if of_variant else 0
        rates = [rate for run in timed if (rate := _steps_per_second(run)) is not None]
        results.append(VariantResult(name, parameters, losses, rates))
    return Summary(results, sorted({run.number for run in runs}), bool(timing))


def show_comparison(folder: Path, order: list[str], reference: str, paper: Mapping[str, Measured]) -> None:
    """Print a table of the variants against one of them, and write results.json and results.png.

    paper: by variant; of its own sizes and data.
    """
    summary = summarize(folder, order)
    (base,) = [result for result in summary.results if result.name == reference]
    _print_table(summary, base, paper)
    variants: JsonObject = {
        result.name: {
            **result.as_json(),
            f"loss_minus_{reference}": result.behind(base).as_json(),
            "paper": {**paper[result.name]._asdict()},
        }
        for result in summary.results
    }
    keep_results(folder, summary, {"variants": variants})
    _plot(folder / "results.png", summary, str(study_facts(folder)["study"]))


def keep_results(folder: Path, summary: Summary, found: JsonObject) -> None:
    """Write what was `found` to results.json, with the command, the data and the environment of the runs."""
    about: JsonObject = {
        **study_facts(folder),
        "environment": _environment(folder),
        "unfinished_runs": summary.unfinished,
        "steps_timed_in_runs_of_their_own": summary.timed_apart,
    }
    write_results(folder / "results.json", about | found)
    print(f"{folder / 'results.json'}, {folder / 'results.png'}")


def _print_table(summary: Summary, base: VariantResult, paper: Mapping[str, Measured]) -> None:
    columns = ("variant", ">params", ">seeds", ">perplexity", f">loss - {base.name}", ">steps/s")
    rows = [
        (
            result.name,
            f"{result.parameters:,}",
            str(len(result.losses)),
            result.perplexity.text(".3f"),
            result.behind(base).text("+.4f"),
            Spread.of(result.steps_per_second).text(".3f"),
            f"{paper[result.name].perplexity:.2f}",
            f"{paper[result.name].steps_per_second:.1f}",
        )
        for result in summary.results
    ]
    print_table((*columns, ">paper's perplexity", ">paper's steps/s"), rows)
    print("perplexity: mean ± standard deviation over the seeds; losses are subtracted seed by seed, nats per token.")
    if summary.timed_apart:
        print("steps/s: mean ± standard deviation over rounds of short runs, one at a time, the variants in turn.")
    else:
        print("steps/s: of the trainings, which may have shared the machine with each other.")
    print_unfinished(summary)


def print_unfinished(summary: Summary) -> None:
    if summary.unfinished:
        print(f"{summary.unfinished} runs are not finished: means over different seeds cannot be compared yet.")


def _plot(picture: Path, summary: Summary, title: str) -> None:
    """Perplexity and steps per second of each variant, with their standard deviations; each seed as a small dot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 1.2 + 0.42 * len(summary.results)), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    _dots(left, summary, "validation perplexity", [[*map(perplexity, r.losses.values())] for r in summary.results])
    _dots(right, summary, "steps per second", [result.steps_per_second for result in summary.results])
    left.set_yticks(range(len(summary.results)), [result.name for result in summary.results])
    left.invert_yaxis()
    left.set_title(title, loc="left", fontsize=11)
    write_figure(figure, picture)


def _dots(axes: "Axes", summary: Summary, label: str, values: list[list[float]]) -> None:
    for row, found in enumerate(values):
        if found:
            mean, deviation = Spread.of(found)
            axes.plot(found, [row] * len(found), "o", color=COLOURS[0], alpha=0.35, markersize=4)
            axes.errorbar(mean, row, xerr=deviation, fmt="o", color=COLOURS[0], capsize=3)
    axes.set_xlabel(label)
    axes.grid(True, axis="x", color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def _final_loss(run: StudyRun) -> float | None:
    """The mean over the validation sets after the last step; None if it is not known."""
    last = [
        losses.loss[-1]
        for name, losses in read_series(run.path).validation.items()
        if name.startswith("validation") and losses.step[-1] == run.recipe.train_iters
    ]
    return float(np.mean(last)) if last else None


def _steps_per_second(run: StudyRun) -> float | None:
    """Of the median step; None if there are only the first, slower ones."""
    seconds = read_series(run.path).seconds[TIMING_WARMUP_STEPS:]
    return 1 / float(np.nanmedian(seconds)) if np.isfinite(seconds).any() else None


def _environment(folder: Path) -> list[Json]:
    """What the runs were trained with: each distinct environment that their metrics.jsonl name."""
    found: list[Json] = []
    for run in runs_of(folder):
        for line in each_line(run.path / "metrics.jsonl"):
            if (named := line.get("environment")) is not None and named not in found:
                found.append(named)
    return found
