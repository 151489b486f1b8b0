"""txssm check parity --fuzz: compares random legal architectures, lengths and layouts with one process."""

import dataclasses
import math
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from megatron_txssm.architecture.layer_pattern import BORDER, DEPTH, EXPERTS
from megatron_txssm.check.layouts import AS_STATED, ONE_PROCESS
from megatron_txssm.check.parity import DIFFERENT, Precision, Verdict, bounds, verdict
from megatron_txssm.check.shrink import as_words, shrink
from megatron_txssm.check.tokens import write_tokens
from megatron_txssm.choices import CONTEXT_PARALLEL_METHODS
from megatron_txssm.errors import UserError, require_positive
from megatron_txssm.files import unwound_by_signals
from megatron_txssm.recipe.changes import WITHOUT_FP8, Changes, changed
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.sizes import divisors
from megatron_txssm.recipe.validation.validate import validate
from megatron_txssm.terminal import progress_bar

# Configurations per launch: they share processes, whose imports take longer than ten runs.
CHUNK = 50
_WITHOUT_EXPERTS: Changes = {
    "num_experts": None,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": None,
    "moe_shared_expert_intermediate_size": None,
    "moe_aux_loss_coeff": 0.01,
}
# Enough to see the pattern.
MOST_DIFFERENT = 10


@dataclass(frozen=True)
class Draw:
    """One configuration: its changes to the recipe, including the layout, and its number of processes."""

    changes: Changes
    processes: int

    def command(self, recipe: Recipe, words: Sequence[str]) -> str:
        """The command line that compares only this configuration; `words`: the original recipe and options."""
        layout = ["--nproc", str(self.processes), "--layout", AS_STATED]
        return shlex.join(["txssm", "check", "parity", *words, *layout, *as_words(recipe, self.changes)])


@unwound_by_signals()
def fuzz_parity(
    recipe: str | Path,
    count: int,
    *,
    nproc: int = 4,
    overrides: Sequence[str] = (),
    seed: int = 0,
    steps: int = 2,
    precision: Precision = "fp64",
) -> int:
    """Compare `count` random configurations with one process each; 0 if all are the same, else DIFFERENT.

    Architecture, length, batch and a layout of up to `nproc` processes are random; the rest is the recipe's. A seed
    always gives the same configurations. For one that differs, the command that compares only it is printed.
    """
    require_positive(nproc=nproc, steps=steps, fuzz=count)
    loaded, begin = load_recipe(recipe, overrides), time.monotonic()
    words = [str(recipe), "--steps", str(steps), "--precision", precision]
    words += [word for text in overrides for word in ("--set", text)]
    draws = [draw(loaded, nproc, seed, number) for number in range(count)]
    print(f"{len(draws)} configurations by seed {seed}, on up to {nproc} processes", flush=True)
    different, largest = 0, Verdict(0.0, 0.0)
    with tempfile.TemporaryDirectory(prefix="txssm-check-") as name, progress_bar("runs", 2 * len(draws)) as advance:
        folder = Path(name)
        tokens = write_tokens(folder / "tokens")
        for first in range(0, len(draws), CHUNK):
            chunk = draws[first : first + CHUNK]
            small = [shrink(changed(loaded, d.changes), tokens, nproc=d.processes, steps=steps) for d in chunk]
            results = compare(chunk, small, folder / "runs", precision, advance)
            for drawn, result in zip(chunk, results, strict=True):
                if result.same:
                    largest = _larger(largest, result)
                else:
                    different += 1
                    _report(result, drawn.command(loaded, words))
            shutil.rmtree(folder / "runs")
            if different >= MOST_DIFFERENT:
                print(f"stopped after {first + len(chunk)} configurations")
                draws = draws[: first + len(chunk)]
                break
    print(
        f"{len(draws) - different} of {len(draws)} the same as one process, in {time.monotonic() - begin:.0f} s; "
        f"largest loss error of these {largest.loss_error:.1e}, gradient error {largest.gradient_error:.1e} "
        f"({largest.parameter}); {bounds(precision)}"
    )
    return DIFFERENT if different else 0


def compare(
    draws: list[Draw], recipes: list[Recipe], folder: Path, precision: Precision, advance: Callable[[int], object]
) -> list[Verdict]:
    """Run each configuration as drawn and in one process; those with the same number of processes share a launch."""
    from megatron_txssm.check.runs import RecipeRun, run_all

    references = [
        RecipeRun(folder / f"{number}_one", changed(recipe, ONE_PROCESS)) for number, recipe in enumerate(recipes)
    ]
    runs = [RecipeRun(folder / f"{number}", recipe) for number, recipe in enumerate(recipes)]
    for size in sorted({1, *(drawn.processes for drawn in draws)}):
        batch = [run for run, drawn in zip(runs, draws, strict=True) if drawn.processes == size]
        run_all(size, [*references, *batch] if size == 1 else batch, precision=precision, advance=advance)
    verdicts = []
    for run, reference in zip(runs, references, strict=True):
        failure = reference.failure()
        verdicts.append(Verdict(failure=f"one process: {failure}") if failure else verdict(run, reference, precision))
    return verdicts


def _larger(a: Verdict, b: Verdict) -> Verdict:
    worse = max(a, b, key=lambda each: each.gradient_error)
    return dataclasses.replace(worse, loss_error=max(a.loss_error, b.loss_error))


def _report(result: Verdict, command: str) -> None:
    errors = f"loss error {result.loss_error:.1e}, gradient error {result.gradient_error:.1e} ({result.parameter})"
    print(f"{result.word}: {result.failure or errors}\n  {command}", flush=True)


def draw(recipe: Recipe, nproc: int, seed: int, number: int) -> Draw:
    """Configuration `number` of a seed: the same in every run, independent of the others."""
    random = Random(f"{seed}:{number}")
    parallel = [size for size in divisors(nproc) if size > 1]
    processes = random.choice(parallel) if parallel and random.random() < 0.9 else 1
    # Draws are nearly always legal; the others are rejected by the same rules as a user's recipe.
    for _ in range(1000):
        layout = _layout(random, processes)
        drawn = Draw(_architecture(random, layout) | _batch(random, layout, processes) | layout, processes)
        try:
            validate(changed(recipe, drawn.changes), None)
            validate(shrink(changed(recipe, drawn.changes), Path(), nproc=processes, steps=1), processes)
        except UserError:
            continue
        return drawn
    raise UserError(f"--nproc {nproc}: no legal configuration was found for {recipe.name}")


def _layout(random: Random, processes: int) -> Changes:
    """Sizes whose product divides `processes` (the rest is data parallelism), and the settings that depend on them."""
    sizes = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "context_parallel_size": 1}
    rest = processes
    while rest > 1:
        prime = next(d for d in divisors(rest) if d > 1)
        axis = random.choice([*sizes, "data"])
        if axis in sizes:
            sizes[axis] *= prime
        rest //= prime
    tensor, pipeline, context = sizes.values()
    zero1, data = random.random() < 0.6, processes // (tensor * pipeline * context)
    experts = random.choice(list(divisors(data * context)))
    overlap = True if zero1 and data > 1 and random.random() < 0.5 else None
    changes = ONE_PROCESS | {f"parallel.{name}": size for name, size in sizes.items()}
    if context > 1:
        changes["parallel.state_context_parallel"] = random.choice(CONTEXT_PARALLEL_METHODS)
    # Comparing one process with itself is meaningless.
    recompute = ("none", "none", "none", "selective", "full") if processes > 1 else ("selective", "full")
    return changes | {
        "parallel.sequence_parallel": tensor > 1 and random.random() < 0.5,
        "parallel.virtual_pipeline_stages": 2 if pipeline == 2 and random.random() < 0.5 else None,
        "parallel.expert_model_parallel_size": experts,
        "parallel.use_distributed_optimizer": zero1,
        "parallel.recompute": random.choice(recompute),
        "megatron.overlap_grad_reduce": overlap,
        "megatron.overlap_param_gather": overlap,
    }


def _pattern(random: Random, kinds: str, stages: int) -> str:
    """Random layers of these kinds: in stages of any lengths, or of one length without borders."""
    if random.random() < 0.5:
        return BORDER.join("".join(random.choice(kinds) for _ in range(random.randint(1, 4))) for _ in range(stages))
    length = stages * random.randint(1, max(1, 8 // stages))
    return "".join(random.choice(kinds) for _ in range(length))


def _depths(random: Random, kinds: str) -> str:
    """Up to two depths of multi-token prediction, of some of these layers."""
    layers = "".join(random.choice(kinds) for _ in range(random.randint(1, 2)))
    return (DEPTH + layers) * random.choice((0, 0, 0, 1, 2))


def _architecture(random: Random, layout: Changes) -> Changes:
    tensor = layout["parallel.tensor_model_parallel_size"]
    stages = layout["parallel.pipeline_model_parallel_size"] * (layout["parallel.virtual_pipeline_stages"] or 1)
    all_to_all = layout["parallel.state_context_parallel"] == "all_to_all"
    shared_by = tensor * (layout["parallel.context_parallel_size"] if all_to_all else 1)
    experts = layout["parallel.expert_model_parallel_size"]
    kinds = random.choice(("M-", "*-", "M-M-*-", "M-*-", "MMM*-", "M**--", "ME", "ME*-", "EE*M"))
    pattern = _pattern(random, kinds, stages) + _depths(random, kinds)
    if EXPERTS not in pattern:
        layout["parallel.expert_model_parallel_size"] = 1
    position_encoding = random.choice(("rope", "rope", "conv1d_d", "a_t"))
    attention_rope = random.random() < 0.7
    groups = shared_by * random.choice((1, 1, 2, 3))
    query_groups = random.choice((None, tensor, 2 * tensor))
    interpolation = random.choice((None, None, None, 2, 3))
    changes = {
        "layer_pattern": pattern,
        **(_experts(random, tensor, experts) if EXPERTS in pattern else _WITHOUT_EXPERTS),
        "hidden_size": random.randint(16, 64),
        "ffn_hidden_size": 2 * tensor * random.randint(2, 60 // tensor),
        "num_attention_heads": random.randint(1, 3) * (query_groups or tensor),
        "num_query_groups": query_groups,
        "kv_channels": 2 * random.randint(1, 8) if attention_rope else random.randint(1, 16),
        "attention_position_encoding": "rope" if attention_rope else "none",
        "position_encoding": position_encoding,
        "state_size": 2 * random.randint(1, 12) if position_encoding == "rope" else random.randint(1, 24),
        "state_num_heads": groups * random.randint(1, 3),
        "state_head_dim": random.randint(2, 12),
        "state_num_groups": groups,
        "state_gated": random.random() < 0.5,
        "state_dt_bias": random.random() < 0.7,
        "chunk_size": random.choice((1, 2, 7, 8, 13, 16, 20, 31, 64)),
        "length_scaling_base": random.choice((None, None, 2, 10, 30)),
        "rotary_base": random.choice((10_000, 500)),
        "rope_scaling": "linear" if interpolation else "none",
        "rotary_interpolation_factor": interpolation,
        "rotary_table_precision": random.choice(("fp32", "fp64")),
        "tie_embeddings": random.random() < 0.5,
        "mtp_loss_scaling_factor": random.choice((0.1, 1.0)) if DEPTH in pattern else 0.1,
        "init_method_std": random.choice((0.05, 0.1, 0.2)),
    }
    return {f"model.{name}": value for name, value in changes.items()}


def _experts(random: Random, tensor: int, shared_by: int) -> Changes:
    count = shared_by * random.choice((2, 3))
    return {
        "num_experts": count,
        "moe_router_topk": random.randint(2, min(3, count)),
        "moe_ffn_hidden_size": random.choice((None, 2 * tensor * random.randint(2, 16))),
        "moe_shared_expert_intermediate_size": random.choice((None, 2 * tensor * random.randint(2, 16))),
        "moe_aux_loss_coeff": random.choice((0.0, 0.01, 0.3)),
    }


def _batch(random: Random, layout: Changes, processes: int) -> Changes:
    """Length, batch and packing of documents."""
    tensor, context = layout["parallel.tensor_model_parallel_size"], layout["parallel.context_parallel_size"]
    unit = (tensor if layout["parallel.sequence_parallel"] else 1) * (2 * context if context > 1 else 1)
    seq_length = unit * random.randint(math.ceil(17 / unit), 64 // unit)
    micro_batch_size = random.randint(1, 2)
    return {
        "training.seq_length": seq_length,
        "training.micro_batch_size": micro_batch_size,
        "training.global_batch_tokens": seq_length * micro_batch_size * processes * random.randint(1, 2),
        "training.seed": random.randint(0, 9999),
        "data.isolate_documents": random.random() < 0.5,
        **WITHOUT_FP8,
    }
