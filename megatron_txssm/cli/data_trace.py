"""txssm data trace: the documents of a training step, with their sources and the rank that reads them."""

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_txssm.errors import UserError
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.sizes import smallest_world_size

if TYPE_CHECKING:
    from megatron_txssm.training.lineage import TracedSample


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a recipe with data.corpus; a run keeps its own, runs/NAME/recipe.yaml")
    parser.add_argument("--step", type=int, required=True, metavar="N", help="training step, from 1, as in the logs")
    parser.add_argument(
        "--sample", type=int, metavar="K", help="only sample K of the global batch, from 0, with its text"
    )
    parser.add_argument(
        "--nproc", type=int, metavar="P", help="processes of the run (default: as few as the layout needs)"
    )
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", dest="overrides", help="change a field")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    recipe = load_recipe(args.recipe, args.overrides)
    nproc = smallest_world_size(recipe) if args.nproc is None else args.nproc
    if nproc < 1:
        raise UserError(f"--nproc {nproc} must be at least 1")
    from megatron_txssm.session.output import output_redirected
    from megatron_txssm.training.lineage import TrainingData

    # Megatron prints hundreds of lines.
    with tempfile.TemporaryDirectory(prefix="txssm-trace-") as folder, output_redirected(Path(folder) / "log"):
        data = TrainingData(recipe, nproc)
        traced = data.trace(args.step, None if args.sample is None else [args.sample])
        # One a document, only where a single sample is asked for.
        texts = [] if args.sample is None else [data.text(part) for part in traced[0].documents]
    if args.json:
        _print_json(args.step, nproc, data.data_parallel_size, traced, texts)
    else:
        _print_table(recipe, args.step, data.data_parallel_size, traced)
        _print_texts(traced, texts)
    return 0


def _print_json(step: int, nproc: int, ranks: int, traced: list["TracedSample"], texts: list[str]) -> None:
    samples = [dataclasses.asdict(sample) for sample in traced]
    for document, text in zip(samples[0]["documents"], texts, strict=bool(texts)):
        document["text"] = text
    found = {"step": step, "processes": nproc, "data_parallel_size": ranks, "samples": samples}
    print(json.dumps(found, indent=1, ensure_ascii=False))


def _print_table(recipe: Recipe, step: int, ranks: int, traced: list["TracedSample"]) -> None:
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
    # Into a file or pipe, one row stays one line.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 400
    console = Console(markup=False, highlight=False, width=width)
    if console.measure(table, options=console.options.update(width=10_000)).maximum > width:
        _print_list(traced)
    else:
        console.print(table)


def _print_list(traced: list["TracedSample"]) -> None:
    """The same where the table is wider than the terminal."""
    for sample in traced:
        rank, micro_batch, position = sample.data_parallel_rank, sample.micro_batch, sample.position
        print(f"sample {sample.sample}: rank {rank}, micro-batch {micro_batch}, position {position}")
        for part in sample.documents:
            print(f"  tokens {_range(part.sample_tokens)}: {part.subset} {part.file}:{part.row}")
            if part.origin:
                print(f"    {part.origin}")
            print(f"    {part.shard}, document {part.document}, its tokens {_range(part.document_tokens)}")


def _print_texts(traced: list["TracedSample"], texts: list[str]) -> None:
    for part, text in zip(traced[0].documents, texts, strict=bool(texts)):
        print(f"\n--- {part.subset} {part.file}:{part.row} {part.origin or ''}".rstrip())
        print(text)


def _range(tokens: tuple[int, int]) -> str:
    """From the first to the last token, both included."""
    return f"{tokens[0]}-{tokens[1] - 1}"
