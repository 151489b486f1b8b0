"""A report's plain tables: attempts, environment, data, evaluations, benchmarks, conversions."""

import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from megatron_txssm.architecture.parameters import count_parameters
from megatron_txssm.data.corpus.blend import CorpusBlend, Stage, recipe_blend
from megatron_txssm.data.corpus.shard import check_shard
from megatron_txssm.errors import UserError
from megatron_txssm.jobs.attempts import Attempt
from megatron_txssm.jobs.local_attempts import start_lines
from megatron_txssm.metrics import MetricsLine, each_line
from megatron_txssm.recipe.corpus.loader import load_corpus_recipe
from megatron_txssm.recipe.corpus.schema import KEPT_RECIPE
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.reporting.charts import short
from megatron_txssm.slurm.submission import read_submission
from megatron_txssm.typed_json import read_json

# Characters of a cell: the detail of a failure may be a page.
_LONGEST = 400


class Table(NamedTuple):
    """A table of texts; `>name` aligns a column to the right, for numbers."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def attempts_table(attempts: Sequence[Attempt]) -> Table:
    """One row per attempt, the first first."""
    columns = ("#", "job", "nodes", "began", ">took", ">last step", ">checkpoint", "ended")
    return Table("Attempts", columns, [_attempt_row(attempt) for attempt in attempts])


def _attempt_row(attempt: Attempt) -> tuple[str, ...]:
    if attempt.ended is None:
        took, end = "", "runs, or its end was not recorded"
    else:
        took = str(timedelta(seconds=round(max(0.0, attempt.ended - attempt.started))))
        cause = str(attempt.cause or "").replace("_", " ")
        code = f"exit code {attempt.exit_code}" if attempt.exit_code is not None and not cause else ""
        end = "; ".join(text for text in (cause or code, cut(attempt.detail), attempt.action) if text)
    return (
        str(attempt.number),
        attempt.job_id or "local",
        _nodes(attempt.nodes),
        when(attempt.started),
        took,
        _number(attempt.last_step),
        _number(attempt.saved_after),
        end,
    )


def _nodes(nodes: Sequence[str]) -> str:
    return ", ".join(nodes) if len(nodes) <= 4 else f"{len(nodes)} nodes: {nodes[0]} … {nodes[-1]}"


def environment(run: Path, attempts: Sequence[Attempt]) -> dict[str, str]:
    """Name -> value of what the run folder records about code, machines and versions; a change in time is an arrow."""
    found: dict[str, list[str]] = {}
    submission = read_submission(run)
    for _, start in start_lines(run / "metrics.jsonl"):
        about = start.get("environment")
        for name, value in about.items() if isinstance(about, dict) else ():
            found.setdefault(name, []).append(str(value))
        layout = start.get("start")
        if isinstance(layout, dict):
            found.setdefault("layout", []).append(", ".join(f"{name} {value}" for name, value in layout.items()))
    for attempt in attempts:
        for name, value in _preflight_facts(attempt).items():
            found.setdefault(name, []).append(value)
    if attempts and attempts[-1].job_id:
        found["nodes"] = [_nodes(attempts[-1].nodes)]
        found["processes"] = [str(len(attempts[-1].nodes) * attempts[-1].nproc_per_node)]
    for name in ("version", "git_commit", "submitted", "command"):
        if value := submission.get(name):
            found[name.replace("_", " ")] = [str(value)]
    return {name: " → ".join(dict.fromkeys(values)) for name, values in found.items()}


def _preflight_facts(attempt: Attempt) -> dict[str, str]:
    """Versions on an attempt's first node, as the check of the nodes found them; empty without a check."""
    try:
        facts = read_json(attempt.folder / "preflight.json")["reports"][0]["facts"]
        return {str(name): str(value) for name, value in facts.items() if value != "none"}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def model_facts(recipe: Recipe) -> dict[str, str]:
    """Name -> value of a recipe's main sizes."""
    parameters, training, parallel = count_parameters(recipe.sizes), recipe.training, recipe.parallel
    active = f", {short(parameters.active)} active" if parameters.active != parameters.total else ""
    layout = {
        "TP": parallel.tensor_model_parallel_size,
        "PP": parallel.pipeline_model_parallel_size,
        "CP": parallel.context_parallel_size,
        "EP": parallel.expert_model_parallel_size,
    }
    return {
        "parameters": f"{short(parameters.total)}{active}",
        "layers": recipe.model.layer_pattern,
        "hidden size": f"{recipe.model.hidden_size:,}",
        "sequence length": f"{training.seq_length:,}",
        "batch": f"{training.global_batch_tokens:,} tokens",
        "steps": f"{recipe.train_iters:,}",
        "tokens": short(recipe.train_iters * training.global_batch_tokens),
        "learning rate": f"{recipe.optimizer.learning_rate:g}",
        "precision": f"{training.precision}{', fp8 ' + str(training.fp8) if training.fp8 else ''}",
        "layout": ", ".join(f"{name} {size}" for name, size in layout.items() if size > 1) or "data parallel",
    }


def lineage(recipe: Recipe) -> tuple[list[str], list[Table]]:
    """Sentences and tables on the data that a run draws its tokens from. UserError if they cannot be read."""
    data, said = recipe.data, []
    if recipe.checkpoint.load_from is not None:
        said.append(f"The weights began as those of {recipe.checkpoint.load_from}.")
    if data.corpus is not None:
        blend = recipe_blend(recipe)
        return [*said, *_corpus_facts(blend)], _corpus_tables(blend)
    if data.recall_pairs:
        pairs = ", ".join(map(str, data.recall_pairs))
        return [*said, f"It trains on made-up samples of associative recall with {pairs} pairs."], []
    rows = [
        (split, prefix, f"{weight:g}", *_shard_facts(prefix))
        for split, blend in (("training", data.train), ("validation", data.validation), ("both", data.blend))
        for weight, prefix in blend or ()
    ]
    if not rows:
        return [*said, "It trains on Megatron's mock data." if recipe.megatron.get("mock_data") else "No data."], []
    columns = ("for", "token file", ">weight", ">documents", ">tokens")
    return said, [Table("Token files", columns, rows)]


def _shard_facts(prefix: str) -> tuple[str, str]:
    try:
        found = check_shard(prefix)
    except UserError:
        return "missing", "missing"
    return f"{found.documents:,}", f"{found.tokens:,}"


def _corpus_facts(blend: CorpusBlend) -> Iterator[str]:
    corpus, facts = blend.corpus, blend.corpus.tokenizer
    yield f"Corpus: {corpus.directory}."
    yield f"Tokenizer: {facts.type}, {facts.vocab_size:,} tokens, SHA-256 {facts.fingerprint}."


def _corpus_tables(blend: CorpusBlend) -> list[Table]:
    sources = _sources(blend.corpus.directory)
    columns = ("subset", ">weight", ">shards", ">documents", ">tokens", ">drawn", ">epochs", "source")
    stages = blend.stages if len(blend.stages) > 1 else ()
    named = [(f"Stage {number}", stage) for number, stage in enumerate(stages, 1)]
    named.append(("All stages" if stages else "Training data", blend.average))
    return [
        Table(f"{name}: {stage.tokens:,} tokens drawn", columns, list(_subset_rows(blend, stage, sources)))
        for name, stage in named
    ]


def _subset_rows(blend: CorpusBlend, stage: Stage, sources: dict[str, str]) -> Iterator[tuple[str, ...]]:
    for share in blend.shares(stage):
        subset = blend.corpus.subsets[share.subset]
        yield (
            share.subset,
            f"{share.weight:.4f}",
            f"{len(subset.shards('train')):,}",
            f"{subset.documents('train'):,}",
            f"{share.available:,}",
            f"{share.drawn:,.0f}",
            f"{share.epochs:.2f}",
            sources.get(share.subset, ""),
        )


def _sources(directory: Path) -> dict[str, str]:
    """Subset -> where its texts came from, by the corpus's recipe; empty if that is not readable."""
    try:
        return {name: subset.source for name, subset in load_corpus_recipe(directory / KEPT_RECIPE).subsets.items()}
    except UserError:
        return {}


def evaluations_table(run: Path) -> Table:
    """One row per validation set and call of `txssm eval loss`; of earlier versions, only the last call."""
    folder = run / "evaluation"
    found = list(each_line(folder / "history.jsonl")) or _json_object(folder / "validation.json")
    rows = [
        (
            _number(line.get("step")),
            str(name),
            _fixed(losses.get("loss")),
            _fixed(losses.get("perplexity"), 2),
            _number(losses.get("tokens")),
            when(line.get("time")),
        )
        for line in found
        for name, losses in (line["sets"].items() if isinstance(line.get("sets"), dict) else ())
        if isinstance(losses, dict)
    ]
    return Table("Evaluations", (">step", "set", ">nats/token", ">perplexity", ">tokens", "when"), rows)


def benchmarks_table(run: Path) -> Table:
    """One row per task, metric and call of `txssm eval harness`."""
    rows = []
    for line in each_line(run / "evaluation" / "harness" / "history.jsonl"):
        step, limited = _object(line, "model").get("step"), _object(line, "settings").get("limit") is not None
        shown, tasks = line.get("shown"), _object(line, "tasks")
        # Without the parts of groups, such as the 57 of MMLU.
        for name in map(str, shown if isinstance(shown, list) else ()):
            task = _object(tasks, name)
            metrics = _object(task, "metrics")
            rows += [
                (
                    _number(step),
                    f"{name} (--limit)" if limited else name,
                    _number(task.get("num_fewshot")),
                    metric.removesuffix(",none"),
                    _fixed(_object(metrics, metric).get("value")),
                    _fixed(_object(metrics, metric).get("stderr")),
                    when(line.get("time")),
                )
                for metric in metrics
            ]
    return Table("Benchmarks", (">step", "task", ">examples", "metric", ">value", ">stderr", "when"), rows)


def conversions_table(run: Path) -> Table:
    """One row per `txssm convert export` from the run."""
    rows = []
    for line in each_line(run / "conversions.jsonl"):
        proof = line.get("proof")
        proven = "; ".join(map(str, proof)) if isinstance(proof, list) else ""
        layout, out = str(line.get("layout", "")), str(line.get("out", ""))
        rows.append((_number(line.get("step")), layout, out, cut(proven) or "not verified", when(line.get("time"))))
    return Table("Conversions", (">step", "layout", "folder", "proof", "when"), rows)


def _object(line: MetricsLine, name: str) -> MetricsLine:
    """The object of that name in another; empty if it is something else."""
    found = line.get(name)
    return found if isinstance(found, dict) else {}


def _json_object(file: Path) -> list[MetricsLine]:
    """The object in a JSON file; none if it is not there or holds something else."""
    try:
        found = read_json(file)
    except (OSError, ValueError):
        return []
    return [found] if isinstance(found, dict) else []


def when(seconds: Any) -> str:
    """Local time of seconds since the epoch; empty if that is no time."""
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds)) if seconds is not None else ""
    except (TypeError, ValueError, OverflowError, OSError):
        return ""


def cut(text: str) -> str:
    """At most the first characters of a text, in one line."""
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else ""


def _fixed(value: Any, digits: int = 4) -> str:
    return f"{value:,.{digits}f}" if isinstance(value, int | float) else ""
