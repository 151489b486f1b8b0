"""The parallel layouts that a check compares with one process."""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_txssm.choices import CONTEXT_PARALLEL_METHODS
from megatron_txssm.errors import UserError
from megatron_txssm.recipe.changes import ONE_MODEL_PARALLEL_RANK, Changes, changed
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.sizes import data_parallel_size, divisors
from megatron_txssm.recipe.validation.validate import validate

# The recipe's own layout.
AS_STATED = "recipe"
ONE_PROCESS: Changes = {
    **ONE_MODEL_PARALLEL_RANK,
    "parallel.state_context_parallel": "state_passing",
    "parallel.use_distributed_optimizer": False,
    "parallel.recompute": "none",
    "megatron.overlap_grad_reduce": None,
    "megatron.overlap_param_gather": None,
}
_OVERLAP: Changes = {"megatron.overlap_grad_reduce": True, "megatron.overlap_param_gather": True}
_ZERO1: Changes = {"parallel.use_distributed_optimizer": True}


# Compared by identity, for use as a dict key: `changes` is not hashable.
@dataclass(frozen=True, eq=False)
class Layout:
    """A name such as tp2_sp_pp2, its number of processes, and its changes to a recipe."""

    name: str
    processes: int
    changes: Changes

    def of(self, recipe: Recipe) -> Recipe:
        return changed(recipe, self.changes)


def all_layouts(nproc: int) -> list[Layout]:
    """The recipe's own layout, and all layouts of 1, …, `nproc` processes (divisors of `nproc` only), legal or not."""
    found = [Layout(AS_STATED, nproc, {})]
    for name in ("full", "selective"):
        found.append(Layout(f"recompute_{name}", 1, ONE_PROCESS | {"parallel.recompute": name}))
    for processes in divisors(nproc):
        for tensor in divisors(processes):
            for pipeline in divisors(processes // tensor):
                for context in divisors(processes // tensor // pipeline):
                    sizes = {"tp": tensor, "pp": pipeline, "cp": context}
                    found += _variants(processes, sizes | {"dp": processes // (tensor * pipeline * context)})
                    found += _expert_variants(processes, sizes)
    return found


def why_not(layout: Layout, recipe: Recipe, small: Recipe) -> str | None:
    """Why a recipe cannot have this layout, in its own numbers if they are the cause; None if it can."""
    try:
        data_parallel_size(layout.of(recipe), layout.processes)
        validate(layout.of(recipe))
        validate(layout.of(small), layout.processes)
    except UserError as error:
        return str(error)
    return None


def _expert_variants(processes: int, sizes: dict[str, int]) -> Iterator[Layout]:
    """The same division with experts shared by all of its data- and context-parallel processes, under ZeRO-1 or not."""
    tensor, pipeline, context = sizes.values()
    shared_by = processes // (tensor * pipeline)
    if shared_by == 1:
        return
    changes: Changes = {
        "parallel.tensor_model_parallel_size": tensor,
        "parallel.sequence_parallel": tensor > 1,
        "parallel.pipeline_model_parallel_size": pipeline,
        "parallel.context_parallel_size": context,
        "parallel.expert_model_parallel_size": shared_by,
    }
    parts = [f"{axis}{size}{'_sp' if axis == 'tp' else ''}" for axis, size in sizes.items() if size > 1]
    name = "_".join([*parts, f"ep{shared_by}"])
    yield Layout(name, processes, ONE_PROCESS | changes)
    if context < shared_by:
        yield Layout(f"{name}_zero1", processes, ONE_PROCESS | changes | _ZERO1)


def _variants(processes: int, sizes: dict[str, int]) -> Iterator[Layout]:
    """The variants of one division of the processes: each feature by itself on one axis, all of them on several."""
    mixed = sum(size > 1 for size in sizes.values()) > 1
    parts = [_parts(axis, size, mixed) for axis, size in sizes.items() if size > 1]
    combined: list[tuple[str, Changes]] = [("", {})] if parts else []
    for choices in parts:
        combined = [(f"{name}_{more}", done | changes) for name, done in combined for more, changes in choices]
    for name, changes in combined:
        yield Layout(name.lstrip("_"), processes, ONE_PROCESS | changes)


def _parts(axis: str, size: int, mixed: bool) -> list[tuple[str, Changes]]:
    """The ways to use `size` processes on one axis: (name, changes)."""
    name = f"{axis}{size}"
    if axis == "tp":
        plain = {"parallel.tensor_model_parallel_size": size}
        ways = [(name, plain), (f"{name}_sp", plain | {"parallel.sequence_parallel": True})]
        return ways[1:] if mixed else ways
    if axis == "pp":
        plain = {"parallel.pipeline_model_parallel_size": size}
        return [(name, plain), (f"{name}_vpp2", plain | {"parallel.virtual_pipeline_stages": 2})]
    if axis == "cp":
        plain = {"parallel.context_parallel_size": size}
        return [
            (
                name if method == "state_passing" else f"{name}_{method}",
                plain | {"parallel.state_context_parallel": method},
            )
            for method in CONTEXT_PARALLEL_METHODS
        ]
    ways = [(name, {}), (f"{name}_zero1", _ZERO1), (f"{name}_zero1_overlap", _ZERO1 | _OVERLAP)]
    return ways[2:] if mixed else ways
