"""A report as one HTML page, from the template page.html: it loads nothing, and every value in it is escaped."""

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_txssm.errors import readable
from megatron_txssm.reporting.charts import Chart, Curve
from megatron_txssm.reporting.sections import Table

_HERE = Path(__file__).parent
# page.css has as many colours.
COLORS = 8


class Share(NamedTuple):
    """A part of a run's time, as a share of its wall time and as text."""

    name: str
    share: float
    text: str


class RunPart(NamedTuple):
    """What the page says on one run."""

    name: str
    # The recipe's description, and the run's folder.
    description: str
    folder: str
    color: int
    # Figures of goodput; empty without an attempt.
    goodput: dict[str, str]
    shares: Sequence[Share]
    attempts: Table
    # The resolved recipe as YAML; empty if it is not readable.
    recipe: str
    # Sentences on its data, and tables.
    data: Sequence[str]
    tables: Sequence[Table]
    evaluations: Table
    benchmarks: Table
    conversions: Table
    # What could not be read.
    problems: Sequence[str]


class Page(NamedTuple):
    """A report's contents."""

    runs: Sequence[RunPart]
    # The same for every run: a column or tile per name.
    states: Sequence[dict[str, str]]
    # Two charts that differ in their x axis, and others.
    losses: Sequence[Chart]
    others: Sequence[Chart]
    # How to read them.
    legend: str
    differences: Table | None
    facts: Table
    environment: Table
    # When and by which version it was made.
    made: str


def render(page: Page) -> str:
    """The page as HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: readable(value) if type(value) is str else value,
    )
    style, script = ((_HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    template = environment.get_template("page.html")
    return template.render(
        page=page,
        # Our own files, which are not escaped.
        style=Markup(style),
        script=Markup(script),
        script_sha256=digest,
        # The paths of curves, digits and letters.
        raw=Markup,
        chart_values=_chart_values,
        summary=_summary,
    )


def _chart_values(chart: Chart) -> dict[str, Any]:
    """For page.js."""
    curves = [{"name": each.curve.name, "color": each.curve.color, **each.values} for each in chart.curves]
    return {"range": chart.x_range, "x": chart.x_name, "curves": curves}


def _summary(chart: Chart) -> str:
    """A chart for those who do not see it."""
    return f"{chart.title} over {chart.x_name}: {'; '.join(_ends(each.curve) for each in chart.curves)}"


def _ends(curve: Curve) -> str:
    known = np.flatnonzero(np.isfinite(curve.y))
    first, last = (f"{curve.y[index]:.4g} at {curve.x[index]:,.0f}" for index in known[[0, -1]])
    return f"{curve.name} from {first} to {last}"
