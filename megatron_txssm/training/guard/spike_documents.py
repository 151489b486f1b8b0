"""The spikes of a run and the documents of their batches, for `txssm why`."""

import shlex
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_txssm.errors import UserError
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.session.output import output_redirected
from megatron_txssm.terminal import doing
from megatron_txssm.training.guard.spikes import Spike, read_spikes

if TYPE_CHECKING:
    from megatron_txssm.training.lineage import Part

# Of the last spikes, those with their documents; of a batch, the source files; of a file, the rows.
SPIKES, FILES, ROWS = 3, 8, 8


def explain_spikes(run: Path, recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(name, text) of the last spikes of a run, what was done, and their documents; empty if there are none.

    Reads the corpus, for which it initialises Megatron in this process.
    """
    spikes = read_spikes(run)
    if len(spikes) > SPIKES:
        yield "spikes", f"{len(spikes)} steps, the last {SPIKES} of which follow; {run / 'spikes.jsonl'} has all"
    spikes = spikes[-SPIKES:]
    found = _documents(recipe, spikes)
    for spike in spikes:
        yield "spike", str(spike).removeprefix("spike at ")
        for text in found[spike.step]:
            yield "  documents", text
    if spikes:
        command = f"txssm data trace {shlex.quote(str(run / 'recipe.yaml'))} --step {spikes[-1].step}"
        yield "", f"the whole batch, by sample and rank: {command}"


def _documents(recipe: Recipe, spikes: list[Spike]) -> dict[int, list[str]]:
    """Step -> the documents of its batch, a line per source file; or why they are unknown."""
    from megatron_txssm.training.lineage import TrainingData

    if not spikes:
        return {}
    with (
        tempfile.TemporaryDirectory(prefix="txssm-spikes-") as folder,
        output_redirected(Path(folder) / "log") as terminal,
        doing("tracing the documents of the spikes", terminal),
    ):
        try:
            data = TrainingData(recipe, spikes[-1].world_size)
            traced = {spike.step: data.trace(spike.step) for spike in spikes}
        except (UserError, OSError) as error:
            return {spike.step: [f"unknown: {error}"] for spike in spikes}
    return {
        step: list(by_file(part for sample in samples for part in sample.documents)) for step, samples in traced.items()
    }


def by_file(parts: "Iterable[Part]") -> Iterator[str]:
    """Lines such as "web 0001.parquet: rows 3, 17 (512 tokens)", the files with most tokens first."""
    files: dict[tuple[str, str], list[Part]] = {}
    for part in parts:
        files.setdefault((part.subset, part.file), []).append(part)
    ordered = sorted(files.items(), key=lambda item: -_tokens(item[1]))
    for (subset, file), found in ordered[:FILES]:
        rows = sorted({part.row for part in found})
        more = f" and {len(rows) - ROWS} more" if len(rows) > ROWS else ""
        word = "row" if len(rows) == 1 else "rows"
        yield f"{subset} {file}: {word} {', '.join(map(str, rows[:ROWS]))}{more} ({_tokens(found):,} tokens)"
    if len(ordered) > FILES:
        yield f"and {len(ordered) - FILES} more files"


def _tokens(parts: "list[Part]") -> int:
    return sum(part.sample_tokens[1] - part.sample_tokens[0] for part in parts)
