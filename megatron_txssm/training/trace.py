"""Prints the documents of a training step, with their sources and the rank that reads them."""

import dataclasses
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megatron_txssm.errors import require_positive
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.sizes import smallest_world_size
from megatron_txssm.session.output import output_redirected
from megatron_txssm.training.lineage import TracedSample, TrainingData


def trace(
    recipe: str | Path,
    step: int,
    *,
    sample: int | None = None,
    nproc: int | None = None,
    overrides: Sequence[str] = (),
    as_json: bool = False,
) -> int:
    """Print the documents of a training step (from 1), their sources and ranks; returns the exit code.

    recipe: must have data.corpus; overrides: changed fields, as "a.b=c". sample: only this one of the global batch
    (from 0), with its text; None: all, without text. nproc: processes of the run (None: as few as the layout needs).
    as_json: one JSON object instead of a table. Initialises Megatron in this process, so call it once.
    """
    require_positive(nproc=nproc)
    loaded = load_recipe(recipe, overrides)
    processes = smallest_world_size(loaded) if nproc is None else nproc
    # Megatron prints hundreds of lines.
    with tempfile.TemporaryDirectory(prefix="txssm-trace-") as folder, output_redirected(Path(folder) / "log"):
        data = TrainingData(loaded, processes)
        traced = data.trace(step, None if sample is None else [sample])
        # One per document, only for a single sample.
        texts = [] if sample is None else [data.text(part) for part in traced[0].documents]
    if as_json:
        _print_json(step, processes, data.data_parallel_size, traced, texts)
    else:
        _print_table(loaded, step, data.data_parallel_size, traced)
        _print_texts(traced, texts)
    return 0


def _print_json(step: int, nproc: int, ranks: int, traced: list[TracedSample], texts: list[str]) -> None:
    samples = [dataclasses.asdict(sample) for sample in traced]
    for document, text in zip(samples[0]["documents"], texts, strict=bool(texts)):
        document["text"] = text
    found = {"step": step, "processes": nproc, "data_parallel_size": ranks, "samples": samples}
    print(json.dumps(found, indent=1, ensure_ascii=False))


def _print_table(recipe: Recipe, step: int, ranks: int, traced: list[TracedSample]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("sample", "rank", "micro-batch", "position", "tokens"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("subset", "source", "origin"):
        table.add_column(column, overflow="fold")
    table.add_column("of shard, document, tokens", no_wrap=True)
    for sample in traced:
        place = (sample.sample, sample.data_parallel_rank, sample.micro_batch, sample.position)
        for number, part in enumerate(sample.documents):
            table.add_row(
                *(map(str, place) if number == 0 else [""] * len(place)),
                _range(part.sample_tokens),
                part.subset,
                f"{part.file}:{part.row}",
                part.origin or "",
                f"{part.shard} {part.document} {_range(part.document_tokens)}",
            )
    print(
        f"step {step} of {recipe.name}, {ranks} data-parallel rank{'s' if ranks > 1 else ''}; a sample's tokens are "
        f"0-{recipe.training.seq_length}, the last of which is only predicted; all numbers but the step's count from 0"
    )
    # In a file or pipe, each row is one line.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 400
    console = Console(markup=False, highlight=False, width=width)
    if console.measure(table, options=console.options.update(width=10_000)).maximum > width:
        _print_list(traced)
    else:
        console.print(table)


def _print_list(traced: list[TracedSample]) -> None:
    """The same as a list, if the table is wider than the terminal."""
    for sample in traced:
        rank, micro_batch, position = sample.data_parallel_rank, sample.micro_batch, sample.position
        print(f"sample {sample.sample}: rank {rank}, micro-batch {micro_batch}, position {position}")
        for part in sample.documents:
            print(f"  tokens {_range(part.sample_tokens)}: {part.subset} {part.file}:{part.row}")
            if part.origin:
                print(f"    {part.origin}")
            print(f"    {part.shard}, document {part.document}, its tokens {_range(part.document_tokens)}")


def _print_texts(traced: list[TracedSample], texts: list[str]) -> None:
    for part, text in zip(traced[0].documents, texts, strict=bool(texts)):
        print(f"\n--- {part.subset} {part.file}:{part.row} {part.origin or ''}".rstrip())
        print(text)


def _range(tokens: tuple[int, int]) -> str:
    """First and last token, both inclusive."""
    return f"{tokens[0]}-{tokens[1] - 1}"
