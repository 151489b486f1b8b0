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


def _throughput(found: dict[str, Any]) -> str:
    rows = [Row(**row) for row in found["summary"]]
    tables = [
        f"**{part}**\n\n{_markdown(columns(part), map(cells, of_part))}"
        for part in PARTS
        if (of_part := [row for row in rows if row.part == part])
    ]
    return "\n".join(tables)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "position_encoding": _position_encoding,
    "mqar": _mqar,
    "throughput": _throughput,
}


def _spread(found: dict[str, float], form: str) -> str:
    """Mean and standard deviation; None, which stands for NaN in JSON, is of one seed."""
    deviation = float("nan") if found["deviation"] is None else found["deviation"]
    return Spread(found["mean"], deviation).text(form)


def _markdown(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [[column.removeprefix(">") for column in columns], ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


if __name__ == "__main__":
    for page, text in pages().items():
        page.write_text(text, encoding="utf-8")
