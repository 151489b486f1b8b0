"""txssm eval needle: whether models find a number in a long text, by the text's length and the number's place."""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np

from megatron_txssm.checkpoint.saved_model import find_checkpoints
from megatron_txssm.convert.huggingface.folder import is_hf_folder
from megatron_txssm.convert.proof.proof import sample_text
from megatron_txssm.data.tokenizer.huggingface import export_tokenizer
from megatron_txssm.data.tokenizer.kept_tokenizer import tokenizer_source
from megatron_txssm.errors import UserError, require_count
from megatron_txssm.evaluation.harness.harness import evaluate_tasks, harness_recipe
from megatron_txssm.evaluation.harness.settings import HarnessSettings
from megatron_txssm.files import write_results
from megatron_txssm.metrics import each_line
from megatron_txssm.reporting.plot import write_figure
from megatron_txssm.slurm.environment import is_worker
from megatron_txssm.studies.haystack import Haystack, cells, task_name, write_tasks
from megatron_txssm.terminal import doing, print_table

RESULTS, PICTURE = "needle.json", "needle.png"
# Each has the name of its per cent.
MOST_DEPTHS = 101
# Characters of Python's manual, of which all of it has about 700,000.
_MANUAL = 10**6


def evaluate_needle(
    models: Sequence[Path],
    output: Path,
    *,
    lengths: Sequence[int],
    depths: int = 5,
    samples: int = 10,
    text: Path | None = None,
    batch_size: int = 1,
    overrides: Sequence[str] = (),
    nproc: int | None = None,
    port: int | None = None,
) -> int:
    """Ask each model, print a table of lengths and depths, write needle.json and needle.png; the exit code.

    models: runs, their checkpoints, or Hugging Face folders. output: the folder for all results. lengths: tokens of a
    text with its question and answer. depths: places of the needle, evenly from the text's beginning to its end.
    samples: questions of each length and depth. text: a file with prose (None: Python's manual). The rest is as in
    `harness.evaluate_tasks`; an interrupted evaluation goes on where it was. UserError for a length that a model does
    not read.
    """
    if is_worker():
        raise UserError("txssm eval needle starts processes of its own; run it without srun or torchrun")
    require_count(samples=samples, batch_size=batch_size)
    if not 1 <= depths <= MOST_DEPTHS:
        raise UserError(f"--depths {depths} must be from 1 to {MOST_DEPTHS}, a place for each per cent")
    if (overrides or nproc is not None or port is not None) and all(map(is_hf_folder, models)):
        raise UserError("--set, --nproc and --port are for checkpoints, and all models are Hugging Face folders")
    lengths = list(dict.fromkeys(lengths))
    places = [place / max(1, depths - 1) for place in range(depths)]
    prose = _read(text)
    for model in models:
        _check_lengths(model, lengths, overrides)
    found: dict[str, dict[str, float]] = {}
    for model in models:
        name = _name(model, found)
        options = {} if is_hf_folder(model) else {"overrides": overrides, "nproc": nproc, "port": port}
        with doing(f"hiding numbers for {name}"), _written(output):
            tasks = write_tasks(output.absolute() / name / "tasks", _haystack(model, prose), lengths, places, samples)
        settings = HarnessSettings(tuple(map(str, tasks)), num_fewshot=0, batch_size=batch_size)
        print(f"{name}:", flush=True)
        code = evaluate_tasks(model, settings, output=output / name, **options)
        if code != 0:
            return code
        *_, results = each_line(output / name / "history.jsonl")
        found[name] = _scores(results)
    with _written(output):
        show(found, lengths, places, output)
    return 0


@contextmanager
def _written(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror}); make room, or name another --output") from None


def _read(text: Path | None) -> str:
    if text is None:
        return sample_text(_MANUAL)
    try:
        prose = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {text} cannot be read: {error}") from None
    if not prose.strip():
        raise UserError(f"--text {text} is empty; name a file with prose")
    return prose


def _name(model: Path, others: Mapping[str, Any]) -> str:
    """The model's folder's, with a number where another model has the same."""
    path = Path(os.path.abspath(model))
    name = path.parent.name if path.name == "checkpoints" else path.name
    numbered = (f"{name}_{number}" for number in count(2))
    return next(each for each in chain([name], numbered) if each not in others)


def _check_lengths(model: Path, lengths: Sequence[int], overrides: Sequence[str]) -> None:
    if is_hf_folder(model):
        longest = _longest(model)
        remedy = f"max_position_embeddings in {model / 'config.json'}"
    else:
        longest = harness_recipe(find_checkpoints(model), overrides).training.seq_length
        remedy = "--set training.seq_length=N"
    if too_long := [length for length in lengths if length > longest]:
        raise UserError(
            f"--lengths {too_long[0]}: {model} reads {longest} tokens; leave it out, or raise it by {remedy}"
        )


def _longest(folder: Path) -> int:
    """max_position_embeddings of a Hugging Face folder, of any class."""
    try:
        found = json.loads((folder / "config.json").read_bytes())["max_position_embeddings"]
        return int(found)
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{folder / 'config.json'} has no max_position_embeddings; state the length of its training"
        ) from None


def _haystack(model: Path, prose: str) -> Haystack:
    from tokenizers import Tokenizer

    if is_hf_folder(model):
        file = model / "tokenizer.json"
        if not file.is_file():
            raise UserError(f"{model} has no tokenizer.json, by which the length of a text is measured")
        return Haystack(Tokenizer.from_file(str(file)), prose)
    checkpoints = find_checkpoints(model)
    source = tokenizer_source(harness_recipe(checkpoints, ()), checkpoints)
    if source is None:
        raise UserError(f"{checkpoints} has no tokenizer, by which the length of a text is measured")
    with tempfile.TemporaryDirectory(prefix="txssm-tokenizer-") as folder:
        export_tokenizer(source, Path(folder), "a text")
        return Haystack(Tokenizer.from_file(f"{folder}/tokenizer.json"), prose)


def _scores(results: Mapping[str, Any]) -> dict[str, float]:
    """Task -> the share of its questions that were answered."""
    return {name: task["metrics"]["acc,none"]["value"] for name, task in results["tasks"].items()}


def show(
    found: Mapping[str, Mapping[str, float]], lengths: Sequence[int], depths: Sequence[float], output: Path
) -> None:
    """Print and write what was found. found: model -> task -> share of the questions that were answered."""
    write_results(output / RESULTS, {"lengths": [*lengths], "depths": [*depths], "found": {**found}})
    rows = [
        (model, f"{length:,}", *(f"{scores[task_name(length, depth)]:.0%}" for depth in depths))
        for model, scores in found.items()
        for length in lengths
    ]
    print_table(("model", ">tokens", *(f">depth {depth:.0%}" for depth in depths)), rows)
    _plot(found, lengths, depths, output / PICTURE)
    print(f"share of the numbers that were found; {output / RESULTS}, {output / PICTURE}")


def _plot(
    found: Mapping[str, Mapping[str, float]], lengths: Sequence[int], depths: Sequence[float], picture: Path
) -> None:
    """A heat map for each model, side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 3.0 * len(found), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, len(found), squeeze=False)[0]
    images: list[Any] = []
    for axes, (model, scores) in zip(all_axes, found.items(), strict=True):
        shares = np.array([scores[task_name(*cell)] for cell in cells(lengths, depths)])
        shown = {"cmap": "viridis", "vmin": 0, "vmax": 1, "aspect": "auto"}
        images.append(axes.imshow(shares.reshape(len(lengths), -1).T, **shown))
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45)
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axes.set_title(model, fontsize=10)
        axes.set_xlabel("tokens")
    all_axes[0].set_ylabel("depth")
    figure.colorbar(images[0], ax=all_axes, label="found")
    write_figure(figure, picture)
