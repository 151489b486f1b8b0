"""`txssm report`: runs as one self-contained HTML page."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import numpy as np

from megatron_txssm import __version__
from megatron_txssm.errors import UserError
from megatron_txssm.files import write_file_atomically
from megatron_txssm.jobs.attempts import Attempt, find_run, load_run
from megatron_txssm.jobs.goodput import Goodput, all_attempts, goodput, goodput_cells
from megatron_txssm.jobs.run_jobs import jobs_of
from megatron_txssm.recipe.changes import differences
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.reporting.charts import Chart, Curve, chart
from megatron_txssm.reporting.page import COLORS, Page, RunPart, Share, render
from megatron_txssm.reporting.runs import ask_queue
from megatron_txssm.reporting.sections import (
    Table,
    attempts_table,
    benchmarks_table,
    conversions_table,
    environment,
    evaluations_table,
    lineage,
    model_facts,
)
from megatron_txssm.reporting.series import Series, read_series
from megatron_txssm.reporting.state import state_cells
from megatron_txssm.slurm.client import Job
from megatron_txssm.terminal import doing

# Beginnings of attempts that a chart marks.
_MOST_MARKS = 60
# Recipe fields that differ between any two runs.
_NAMES = ("name", "description", "run_directory")


@dataclass
class _Run:
    """What was found in a run folder; a part that is not readable is empty, and named in `problems`."""

    folder: Path
    label: str
    series: Series
    recipe: Recipe | None = None
    # By the names of state.py.
    cells: dict[str, str] = field(default_factory=dict)
    attempts: list[Attempt] = field(default_factory=list)
    goodput: Goodput | None = None
    problems: list[str] = field(default_factory=list)

    def tried[T](self, read: Callable[[], T], default: T) -> T:
        """What `read` returns; the default, with an entry in `problems`, if that is not readable."""
        try:
            return read()
        except (UserError, OSError) as error:
            self.problems.append(str(error))
            return default


def report(runs: Sequence[str | Path], *, out: str | Path | None = None) -> int:
    """Write one HTML page on some runs, their curves laid over one another; returns the exit code, 0.

    Args:
        runs: each a run folder, a name under runs/, or the number of one of its jobs
        out: the page, *.html, which is replaced (None: RUN/report.html; of several runs, report.html in this folder)

    The page says which parts of a run are not readable. UserError if one is no run, or the page cannot be written.
    """
    folders = [find_run(run) for run in runs]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("a run is named twice; name each once")
    page = Path(out) if out is not None else Path("report.html")
    if out is None and len(folders) == 1:
        page = folders[0] / page
    if page.suffix not in (".html", ".htm"):
        raise UserError(f"--out {page} does not end in .html; name an HTML file")
    with doing("reading the runs"):
        queue, labels = ask_queue(folders), _labels(folders)
        found = [_read(folder, label, queue) for folder, label in zip(folders, labels, strict=True)]
        content = render(_page(found)).encode(errors="replace")
    try:
        write_file_atomically(page, content)
    except OSError as error:
        raise UserError(f"{page} cannot be written: {error.strerror}; name another page with --out") from None
    print(f"{page}: {len(content):,} bytes")
    return 0


def _labels(folders: Sequence[Path]) -> list[str]:
    """The folders' names, or, where these are the same, their paths."""
    names = [folder.resolve().name for folder in folders]
    return [
        name if names.count(name) == 1 else str(folder.resolve()) for name, folder in zip(names, folders, strict=True)
    ]


def _read(folder: Path, label: str, queue: list[Job] | None) -> _Run:
    run = _Run(folder, label, read_series(folder))
    run.recipe = run.tried(lambda: load_run(folder), None)
    run.cells = run.tried(lambda: state_cells(folder, run.recipe, run.series, queue), {})
    run.attempts = run.tried(lambda: all_attempts(folder), [])
    jobs = run.tried(lambda: jobs_of(folder, queue or []), [])
    states = [job.state for job in jobs if job.script.stem == "pretrain"]
    if run.attempts:
        run.goodput = run.tried(lambda: goodput(folder, states[0] if states else None), None)
    return run


def _page(runs: Sequence[_Run]) -> Page:
    recipes = {run.label: run.recipe for run in runs if run.recipe is not None}
    environments = {run.label: run.tried(lambda run=run: environment(run.folder, run.attempts), {}) for run in runs}
    facts = {label: model_facts(recipe) for label, recipe in recipes.items()}
    changes = differences(list(recipes.values()), but=_NAMES) if len(recipes) > 1 else {}
    rows = [(name, *map(_value, values)) for name, values in changes.items()]
    known = dict.fromkeys(name for run in runs for name, text in run.cells.items() if text)
    losses = [found for by_tokens in (False, True) if (found := _losses(runs, by_tokens)) is not None]
    others = [found for found in _other_charts(runs) if found is not None]
    return Page(
        states=[{name: run.cells.get(name, "") for name in known} for run in runs],
        losses=losses,
        others=others,
        legend=_legend([*losses, *others]),
        facts=_side_by_side("Model and training", facts),
        differences=Table("Fields that differ", ("field", *recipes), rows) if len(recipes) > 1 else None,
        environment=_side_by_side("Code, machines and versions", environments),
        runs=[_part(run, index % COLORS) for index, run in enumerate(runs)],
        made=f"{time.strftime('%Y-%m-%d %H:%M:%S %Z')}, megatron_txssm {__version__}",
    )


def _part(run: _Run, color: int) -> RunPart:
    data, tables = ([], []) if run.recipe is None else _data(run.recipe)
    return RunPart(
        name=run.label,
        description="" if run.recipe is None else run.recipe.description,
        folder=str(run.folder.resolve()),
        color=color,
        goodput={} if run.goodput is None else goodput_cells(run.goodput),
        shares=[] if run.goodput is None else _shares(run.goodput),
        attempts=attempts_table(run.attempts),
        recipe="" if run.recipe is None else run.recipe.to_yaml(),
        data=data,
        tables=tables,
        evaluations=evaluations_table(run.folder),
        benchmarks=benchmarks_table(run.folder),
        conversions=conversions_table(run.folder),
        problems=run.problems,
    )


def _data(recipe: Recipe) -> tuple[list[str], list[Table]]:
    """A corpus that has been moved or removed is no fault of the run."""
    try:
        return lineage(recipe)
    except (UserError, OSError) as error:
        return [f"The data are not readable here: {error}"], []


def _shares(found: Goodput) -> list[Share]:
    parts = {
        "active": found.active,
        "repeated": found.repeated,
        "queue or stopped": found.queue,
        "starts": found.start,
        "saves and the rest": found.other,
    }
    wall = max(found.wall, 1e-9)
    return [Share(name, seconds / wall, str(timedelta(seconds=round(seconds)))) for name, seconds in parts.items()]


def _side_by_side(caption: str, columns: Mapping[str, Mapping[str, str]]) -> Table:
    """A row per name, a column per run."""
    names = dict.fromkeys(name for column in columns.values() for name in column)
    rows = [(name, *(column.get(name, "") for column in columns.values())) for name in names]
    return Table(caption, ("", *(columns if len(columns) > 1 else ("value",))), rows)


def _value(value: object) -> str:
    return "" if value is None else str(value)


def _legend(charts: Sequence[Chart]) -> str:
    """One line on what lines, bands, dots and dashes are, where there are any."""
    curves = [each for found in charts for each in found.curves]
    windows = sorted({each.window for each in curves} - {1})
    parts = {
        f"line: mean over {' or '.join(f'{window:,}' for window in windows)} steps": windows,
        "band: all single steps": any(each.band for each in curves),
        "dots: validation": any(each.curve.dots for each in curves),
        "dashed: resumed": any(found.marks for found in charts),
    }
    said = "; ".join(text for text, is_there in parts.items() if is_there)
    return f"{said[:1].upper()}{said[1:]}." if said else ""


def _losses(runs: Sequence[_Run], by_tokens: bool) -> Chart | None:
    curves = []
    for index, run in enumerate(runs):
        series, several = run.series, len(runs) > 1
        x = series.tokens if by_tokens else series.step
        color = index % COLORS if several else 0
        curves.append(Curve(run.label if several else "training", x, series.loss, color))
        for number, (name, found) in enumerate(series.validation.items(), 1):
            at = np.interp(found.step, series.step, series.tokens) if by_tokens and len(series.step) else found.step
            label = f"{run.label} {name}" if several else name
            curves.append(Curve(label, at, found.loss, color if several else number % COLORS, dots=True, smooth=False))
    x_name, marks = ("tokens", ()) if by_tokens else ("steps", _marks(runs))
    return chart("Loss", curves, x_name=x_name, y_name="nats per token", log=True, marks=marks)


def _other_charts(runs: Sequence[_Run]) -> list[Chart | None]:
    def curves(column: str, *, smooth: bool = True) -> list[Curve]:
        names = [run.label if len(runs) > 1 else column.replace("_", " ") for run in runs]
        return [
            Curve(name, run.series.step, getattr(run.series, column), index % COLORS, smooth=smooth)
            for index, (name, run) in enumerate(zip(names, runs, strict=True))
        ]

    marks, rate = _marks(runs), curves("learning_rate", smooth=False)
    return [
        chart("Learning rate", rate, x_name="steps", y_name="", from_zero=True, marks=marks),
        chart("Gradient norm", curves("grad_norm"), x_name="steps", y_name="", log=True, marks=marks),
        chart(
            *("Throughput", curves("tokens_per_second")),
            x_name="steps",
            y_name="tokens per second",
            from_zero=True,
            marks=marks,
        ),
    ]


def _marks(runs: Sequence[_Run]) -> list[float]:
    """The steps at which a single run was resumed; none if there are too many to tell apart."""
    steps = [float(start.step) for start in runs[0].series.starts[1:]] if len(runs) == 1 else []
    return steps if len(steps) <= _MOST_MARKS else []
