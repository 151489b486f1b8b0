"""Generates the tables of measurements in docs/*.md from docs/results/*.json.

python tools/document_results.py      # a page has the place of each: <!-- results/NAME.json --> … <!-- end -->
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_txssm.bench.models import PARTS
from megatron_txssm.bench.summary import Row, cells, columns
from megatron_txssm.studies.summary import Spread

DOCS = Path(__file__).parents[1] / "docs"
PLACE = re.compile(r"(<!-- results/(\w+)\.json -->\n).*?(<!-- end -->)", re.DOTALL)


def pages() -> dict[Path, str]:
    """The pages that have tables of results, as they should be."""
    written = {page: page.read_text(encoding="utf-8") for page in sorted(DOCS.glob("*.md"))}
    return {page: PLACE.sub(_filled, text) for page, text in written.items() if PLACE.search(text)}


def _filled(place: re.Match[str]) -> str:
    begin, name, end = place.groups()
    found = json.loads((DOCS / "results" / f"{name}.json").read_text(encoding="utf-8"))
    table = next(make for prefix, make in TABLES.items() if name.startswith(prefix))
    return f"{begin}\n{table(found)}\n{end}"


def _position_encoding(found: dict[str, Any]) -> str:
    heads = ("variant", "perplexity", "loss − hybrid_rope", "steps/s", "paper's perplexity", "paper's steps/s")
    return _markdown(
        heads,
        (
            (
                f"`{name}`",
                _spread(of_variant["perplexity"], ".1f"),
                _spread(of_variant["loss_minus_hybrid_rope"], "+.3f"),
                _spread(of_variant["steps_per_second"], ".2f"),
                of_variant["paper"]["perplexity"],
                of_variant["paper"]["steps_per_second"],
            )
            for name, of_variant in found["variants"].items()
        ),
    )


def _mqar(found: dict[str, Any]) -> str:
    pairs = [*next(iter(found["variants"].values()))["accuracy"]]
    return _markdown(
        ("model", *(f"{count} pairs" for count in pairs)),
        (
            (f"`{name}`", *(_spread(of_variant["accuracy"][count], ".3f") for count in pairs))
            for name, of_variant in found["variants"].items()
        ),
    )


def _stability(found: dict[str, Any]) -> str:
    heads = (
        "variant",
        "loss − as_paper",
        "spikes",
        "gradient norm, median",
        "largest",
        "state norm, end of training's length",
    )
    return _markdown(
        heads,
        (
            (
                f"`{name}`",
                _spread(of_variant["loss_minus_as_paper"], "+.3f"),
                sum(run["spikes"] for run in runs),
                _range([run["median_gradient_norm"] for run in runs]),
                f"{max(run['largest_gradient_norm'] for run in runs):.3g}",
                _range([run["states"]["mean"][0] for run in runs]),
            )
            for name, of_variant in found["variants"].items()
            for runs in [[*of_variant["runs"].values()]]
        ),
    )


def _scaling(found: dict[str, Any]) -> str:
    return _markdown(
        ("model", "parameters", "loss", "loss − transxssm"),
        (
            (
                f"`{name}`",
                f"{of_variant['parameters']:,}",
                Spread.of([*of_variant["loss_by_seed"].values()]).text(".3f"),
                _spread(of_variant["loss_minus_transxssm"], "+.3f"),
            )
            for name, of_variant in found["variants"].items()
        ),
    )


def _throughput(found: dict[str, Any]) -> str:
    rows = [Row(**row) for row in found["summary"]]
    tables = [
        f"**{part}**\n\n{_markdown(columns(part), map(cells, of_part))}"
        for part in PARTS
        if (of_part := [row for row in rows if row.part == part])
    ]
    return "\n".join(tables)


def _length(found: dict[str, Any]) -> str:
    """The loss of each part of the samples, by model and remedy, over its seeds."""
    rows = []
    for model, by_seed in found["models"].items():
        seeds = [*by_seed.values()]
        for remedy in seeds[0]["loss"]:
            of_parts = zip(*(seed["loss"][remedy] for seed in seeds), strict=True)
            rows.append((model, remedy, *(Spread.of([*losses]).text(".2f") for losses in of_parts)))
    starts = next(iter(found["models"].values()))["1"]["starts"]
    return _markdown(("model", "remedy", *(f"from {start:,}" for start in starts)), rows)


def _merge(found: dict[str, Any]) -> str:
    """The loss of each model, and how far it is from the first one's, seed by seed."""
    base, *_ = found["loss"].values()
    return _markdown(
        ("model", "loss", "against the last step"),
        (
            (
                model,
                Spread.of([*by_seed.values()]).text(".3f"),
                Spread.of([by_seed[seed] - base[seed] for seed in by_seed]).text("+.3f"),
            )
            for model, by_seed in found["loss"].items()
        ),
    )


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "position_encoding": _position_encoding,
    "mqar": _mqar,
    "scaling": _scaling,
    "stability": _stability,
    "throughput": _throughput,
    "length": _length,
    "merge": _merge,
}


def _spread(found: dict[str, float], form: str) -> str:
    """Mean and standard deviation; None, which stands for NaN in JSON, is of one seed."""
    deviation = float("nan") if found["deviation"] is None else found["deviation"]
    return Spread(found["mean"], deviation).text(form)


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.2g} to {max(values):.2g}"


def _markdown(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [[column.removeprefix(">") for column in columns], ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


if __name__ == "__main__":
    for page, text in pages().items():
        page.write_text(text, encoding="utf-8")
