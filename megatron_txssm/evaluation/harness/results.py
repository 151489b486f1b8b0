"""What an evaluation found: its results file, its line in the history, its table beside the paper's numbers."""

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from megatron_txssm.errors import UserError
from megatron_txssm.evaluation.harness.language_model import HarnessModel
from megatron_txssm.evaluation.harness.settings import HarnessSettings, ModelIdentity
from megatron_txssm.evaluation.harness.suites import BENCHMARKS, OF_TABLE_3, TABLE_3
from megatron_txssm.evaluation.harness.tasks import FEWSHOT_SEED
from megatron_txssm.files import append_json, write_results
from megatron_txssm.terminal import print_table


def described_results(
    found: dict[str, Any],
    shown: Sequence[str],
    model: ModelIdentity,
    settings: HarnessSettings,
    asked: HarnessModel,
    commits: dict[str, str],
) -> dict[str, Any]:
    """The content of results.json, from what lm_eval's evaluate() returns; `shown`: tasks and groups for the table."""
    return {
        "model": model.described(),
        "settings": settings.described() | {"fewshot_seed": FEWSHOT_SEED, "replicas": asked.ranks.replicas},
        "max_length": asked.max_length,
        "truncated_requests": asked.truncated,
        "shortened_answers": asked.shortened,
        "datasets": commits,
        "shown": [*shown],
        "tasks": {name: _task(name, found) for name in found["results"]},
        "time": round(time.time(), 3),
    }


def _task(name: str, found: dict[str, Any]) -> dict[str, Any]:
    samples = found["samples"].get(name)
    config = found["configs"].get(name, {})
    return {
        "metrics": {metric: {"value": value, "stderr": error} for metric, (value, error) in _metrics(name, found)},
        "num_fewshot": found["n-shot"].get(name),
        "version": found["versions"].get(name),
        "samples": found["n-samples"].get(name),
        "dataset": None if samples is None else [config.get("dataset_path"), config.get("dataset_name")],
        # Of its questions, prompts and right answers.
        "sha256": None if samples is None else _hash(samples),
    }


def _metrics(name: str, found: dict[str, Any]) -> Iterator[tuple[str, tuple[float, float | None]]]:
    """Metric -> its value and standard error; None where lm_eval has none."""
    values = found["results"][name]
    for key, value in values.items():
        metric, comma, of_filter = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
            error = values.get(f"{metric}_stderr,{of_filter}")
            yield key, (float(value), float(error) if isinstance(error, int | float) else None)


def _hash(samples: Sequence[dict[str, Any]]) -> str:
    parts = (sample[part] for sample in samples for part in ("doc_hash", "prompt_hash", "target_hash"))
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def keep(results: dict[str, Any], folder: Path) -> None:
    """Write results.json, and append it to history.jsonl in the folder above; UserError if the disk is full."""
    write_results(folder / "results.json", results)
    try:
        append_json(folder.parent / "history.jsonl", results)
    except OSError as error:
        raise UserError(
            f"{folder.parent / 'history.jsonl'} cannot be written: {error.strerror}; make room, and repeat the command"
        ) from error


def scores(results: dict[str, Any]) -> dict[str, float]:
    """ "TASK/METRIC" -> its value, of the metrics that count; without infinity and NaN, which JSON does not have."""
    return {
        f"{name}/{metric.removesuffix(',none')}": found["value"]
        for name in results["shown"]
        for metric, found in _wanted(name, results)
        if math.isfinite(found["value"])
    }


def _wanted(name: str, results: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The metrics of a task or group that count."""
    wanted = BENCHMARKS[name].metric if name in BENCHMARKS else ""
    for metric, found in results["tasks"][name]["metrics"].items():
        # LAMBADA also has a perplexity.
        if not wanted or metric == wanted or metric.startswith("perplexity"):
            yield metric, found


def print_results(results: dict[str, Any], terminal: TextIO) -> None:
    """A row per metric that counts, and the mean of the paper's table 3 beside the paper's."""
    print_table(("task", ">examples", "metric", ">value", ">stderr", ">questions"), list(_rows(results)), terminal)
    if results["truncated_requests"]:
        print(
            f"{results['truncated_requests']:,} requests exceeded the model's {results['max_length']:,} tokens; "
            "their beginning was left out",
            file=terminal,
        )
    if results["shortened_answers"]:
        print(
            f"{results['shortened_answers']:,} answers were given {results['max_length'] // 2:,} tokens, half of the "
            "model's length, which is less than their task allows",
            file=terminal,
        )
    if set(OF_TABLE_3) & results["tasks"].keys():
        print(file=terminal)
        _print_table_3(results, terminal)


def _rows(results: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for name in results["shown"]:
        task = results["tasks"][name]
        for metric, found in _wanted(name, results):
            error, samples = found["stderr"], task["samples"]
            yield (
                name,
                "" if task["num_fewshot"] is None else str(task["num_fewshot"]),
                metric.removesuffix(",none"),
                _figure(found["value"]),
                "" if error is None else _figure(error),
                f"{samples['effective']:,}" if samples else "",
            )


def _figure(value: float) -> str:
    """A perplexity of a model that knows nothing may have thirty digits."""
    return f"{value:,.4f}" if abs(value) < 1e6 else f"{value:.3e}"


def _print_table_3(results: dict[str, Any], terminal: TextIO) -> None:
    missing = [name for name in OF_TABLE_3 if name not in results["tasks"]]
    own = "-"
    if not missing:
        values = [results["tasks"][name]["metrics"][BENCHMARKS[name].metric]["value"] for name in OF_TABLE_3]
        own = f"{100 * sum(values) / len(values):.2f}"
    columns = ("table 3, mean in percent", ">this model", *(f">{name}" for name in TABLE_3["320M"]))
    rows = [(f"paper, {size}", own, *(f"{value:.2f}" for value in means.values())) for size, means in TABLE_3.items()]
    print_table(columns, rows, terminal)
    if missing:
        print(f"this model's mean needs {', '.join(missing)} as well", file=terminal)
    if results["settings"]["limit"] is not None:
        print("with --limit, the numbers are not comparable", file=terminal)
