"""All parallel layouts of a recipe on N GPUs, and why each other one is illegal."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from megatron_txssm.choices import CONTEXT_PARALLEL_METHODS
from megatron_txssm.errors import UserError
from megatron_txssm.recipe.changes import ONE_MODEL_PARALLEL_RANK, Changes, changed
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.sizes import divisors
from megatron_txssm.recipe.validation.layout_checks import check_world_size
from megatron_txssm.recipe.validation.validate import validate

# Samples. GEMMs gain little beyond 8 of the usual lengths; a larger one that the recipe states is considered, too.
MICRO_BATCHES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Layout:
    """How a training is divided over GPUs; every size is a number of ranks but for the last two."""

    tensor: int = 1
    pipeline: int = 1
    # Stages that each pipeline rank holds.
    virtual: int = 1
    context: int = 1
    expert: int = 1
    data: int = 1
    sequence_parallel: bool = False
    # What context-parallel state-space layers exchange.
    state_context: str = "state_passing"
    zero1: bool = True
    recompute: str = "none"
    # Samples.
    micro_batch: int = 1

    @property
    def gpus(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data

    @cached_property
    def name(self) -> str:
        """Such as tp2_sp_pp4_vpp3_dp8_zero1_full_mb1."""
        sizes = {"tp": self.tensor, "pp": self.pipeline, "vpp": self.virtual, "cp": self.context, "ep": self.expert}
        parts = []
        for axis, size in sizes.items():
            if size > 1:
                parts.append(f"{axis}{size}")
            if axis == "tp" and self.sequence_parallel:
                parts.append("sp")
            if axis == "cp" and self.state_context == "all_to_all":
                parts.append("a2a")
        parts += [f"dp{self.data}"] if self.data > 1 else []
        parts += ["zero1"] if self.zero1 else []
        parts += [self.recompute] if self.recompute != "none" else []
        return "_".join([*parts, f"mb{self.micro_batch}"])

    @property
    def changes(self) -> Changes:
        """The recipe's fields that make this layout."""
        return {
            "parallel.tensor_model_parallel_size": self.tensor,
            "parallel.sequence_parallel": self.sequence_parallel,
            "parallel.pipeline_model_parallel_size": self.pipeline,
            "parallel.virtual_pipeline_stages": self.virtual if self.virtual > 1 else None,
            "parallel.context_parallel_size": self.context,
            "parallel.state_context_parallel": self.state_context,
            "parallel.expert_model_parallel_size": self.expert,
            "parallel.use_distributed_optimizer": self.zero1,
            "parallel.recompute": self.recompute,
            "training.micro_batch_size": self.micro_batch,
        }

    def of(self, recipe: Recipe) -> Recipe:
        return changed(recipe, self.changes)


LAYOUT_FIELDS = tuple(Layout().changes)
# Parts of a layout's name, and the field of the number after them.
_SIZES = {"tp": "tensor", "pp": "pipeline", "vpp": "virtual", "cp": "context", "ep": "expert", "dp": "data"}
_SIZES |= {"mb": "micro_batch"}
_WORDS: dict[str, dict[str, Any]] = {
    "sp": {"sequence_parallel": True},
    "a2a": {"state_context": "all_to_all"},
    "zero1": {"zero1": True},
    "full": {"recompute": "full"},
    "selective": {"recompute": "selective"},
}


def layout_named(name: str) -> Layout:
    """The layout of a name such as tp2_sp_pp4_zero1_mb1, whose parts may come in any order; UserError otherwise.

    `data` is 0 if the name does not state it.
    """
    found: dict[str, Any] = {}
    for part in name.split("_"):
        fields = _fields_of(part)
        if fields is None:
            known = ", ".join([*(f"{axis}N" for axis in _SIZES), *_WORDS])
            raise UserError(f"--layout {name}: {part!r} is no part of a layout; join some of {known} by _")
        if found.keys() & fields.keys():
            raise UserError(f"--layout {name} states with {part!r} what another part states; leave one out")
        found |= fields
    return Layout(**({"zero1": False, "data": 0} | found))


def _fields_of(part: str) -> dict[str, Any] | None:
    axis = part.rstrip("0123456789")
    size = part.removeprefix(axis)
    if axis in _SIZES and size and int(size) > 0:
        return {_SIZES[axis]: int(size)}
    return _WORDS.get(part)


def layout_of(recipe: Recipe, gpus: int) -> Layout:
    """The recipe's own layout on so many GPUs; UserError if it is illegal there."""
    validate(recipe, gpus)
    parallel = recipe.parallel
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    context = parallel.context_parallel_size
    return Layout(
        tensor=tensor,
        pipeline=pipeline,
        virtual=parallel.virtual_pipeline_stages or 1,
        context=context,
        expert=parallel.expert_model_parallel_size,
        data=gpus // (tensor * pipeline * context),
        sequence_parallel=parallel.sequence_parallel and tensor > 1,
        state_context=parallel.state_context_parallel,
        zero1=parallel.use_distributed_optimizer,
        recompute=parallel.recompute,
        micro_batch=recipe.training.micro_batch_size,
    )


@dataclass(frozen=True)
class Refused:
    """A layout that the recipe cannot have, with all that would divide it further, and why."""

    layout: Layout
    reason: str


@dataclass(frozen=True)
class Candidates:
    """All layouts on some GPUs, legal and not."""

    legal: list[Layout]
    refused: list[Refused]


def candidates(recipe: Recipe, gpus: int, per_node: int, fixed: Mapping[str, Any] | None = None) -> Candidates:
    """Every legal layout on `gpus` GPUs in nodes of `per_node`, and the refused ones.

    fixed: dotted layout fields with the value that they must have. An illegal division is refused as soon as one axis
    contradicts the recipe, without what would be divided further. Sequence parallelism and ZeRO-1 need less memory and
    send no more than their absence, so they are off only if fixed; Muon has no ZeRO-1. Nothing is recomputed unless
    fixed: whether to is no question of legality.
    """
    search = _Search(recipe, gpus, per_node, dict(fixed or {}))
    legal = list(search.layouts())
    return Candidates(legal, search.refused)


def is_legal(recipe: Recipe, gpus: int, per_node: int, fixed: Mapping[str, Any] | None = None) -> bool:
    """Whether `candidates` has a legal layout."""
    return next(_Search(recipe, gpus, per_node, dict(fixed or {})).layouts(), None) is not None


class _Search:
    """One axis after another, each checked by the recipe's own validation before the next is divided."""

    def __init__(self, recipe: Recipe, gpus: int, per_node: int, fixed: dict[str, Any]):
        self.recipe, self.gpus, self.per_node, self.fixed = recipe, gpus, per_node, fixed
        # The axes that are not divided yet must not refuse those that are.
        self.undivided = changed(recipe, ONE_MODEL_PARALLEL_RANK | {"training.micro_batch_size": 1})
        self.refused: list[Refused] = []

    def layouts(self) -> Iterator[Layout]:
        for tensor in self._tensor():
            for pipeline in self._pipeline(tensor):
                for context in self._context(pipeline):
                    for expert in self._expert(context):
                        yield from self._micro_batch(expert)

    def _tensor(self) -> Iterator[Layout]:
        zero1 = self.fixed.get("parallel.use_distributed_optimizer", self.recipe.optimizer.name != "muon")
        recompute = self.fixed.get("parallel.recompute", "none")
        for size in self._sizes("parallel.tensor_model_parallel_size", divisors(self.gpus)):
            layout = Layout(tensor=size, zero1=zero1, recompute=recompute)
            if self.gpus % size:
                self._refuse(layout, f"{self.gpus} GPUs cannot be divided by tensor_model_parallel_size={size}")
            elif size == 1 and self.recipe.megatron.get("tp_comm_overlap"):
                self._refuse(layout, "megatron.tp_comm_overlap=True needs tensor_model_parallel_size above 1")
            elif self.gpus > self.per_node and self.per_node % size:
                self._refuse(layout, f"tensor_model_parallel_size={size} does not stay within nodes of {self.per_node}")
            else:
                stated = self.fixed.get("parallel.sequence_parallel", True)
                yield from self._legal(replace(layout, sequence_parallel=size > 1 and stated))

    def _pipeline(self, layout: Layout) -> Iterator[Layout]:
        left = self.gpus // layout.tensor
        layers = len(self.recipe.layers)
        for size in self._sizes("parallel.pipeline_model_parallel_size", divisors(left)):
            if left % size:
                self._refuse(replace(layout, pipeline=size), f"{left} GPUs cannot be divided by pipeline {size}")
                continue
            if size > layers:
                return
            virtual = self.fixed.get("parallel.virtual_pipeline_stages", ())
            counts = [virtual or 1] if virtual != () else self._virtual(size, layers)
            for count in counts:
                yield from self._legal(replace(layout, pipeline=size, virtual=count))

    def _virtual(self, pipeline: int, layers: int) -> list[int]:
        """One stage per rank, and every number of them that gives each the same number of layers."""
        if pipeline == 1 or layers % pipeline:
            return [1]
        # Virtual stages of one layer would separate every mixer from its FFN.
        return [count for count in divisors(layers // pipeline) if count == 1 or layers > pipeline * count]

    def _context(self, layout: Layout) -> Iterator[Layout]:
        left = self.gpus // (layout.tensor * layout.pipeline)
        for size in self._sizes("parallel.context_parallel_size", divisors(left)):
            if left % size:
                self._refuse(replace(layout, context=size), f"{left} GPUs cannot be divided by context {size}")
                continue
            divided = replace(layout, context=size, data=left // size)
            if self.recipe.global_batch_size % divided.data:
                # Nothing that would divide it further changes that; this only states the reason.
                yield from self._legal(divided, self.gpus, check_world_size)
                continue
            methods = CONTEXT_PARALLEL_METHODS if size > 1 and self.recipe.has_state_space else ("state_passing",)
            for method in self._sizes("parallel.state_context_parallel", methods):
                yield from self._legal(replace(divided, state_context=method))

    def _expert(self, layout: Layout) -> Iterator[Layout]:
        sharing = layout.data * layout.context
        sizes = divisors(sharing, self.recipe.model.num_experts or 1) if self.recipe.has_experts else (1,)
        # Checked with the micro-batch.
        for size in self._sizes("parallel.expert_model_parallel_size", sizes):
            yield replace(layout, expert=size)

    def _micro_batch(self, layout: Layout) -> Iterator[Layout]:
        samples = self.recipe.global_batch_size // layout.data
        sizes = sorted({*MICRO_BATCHES, self.recipe.training.micro_batch_size})
        check = validate
        for size in self._sizes("training.micro_batch_size", [s for s in sizes if s == 1 or s <= samples]):
            for legal in self._legal(replace(layout, micro_batch=size), self.gpus, check):
                # More samples contradict nothing else.
                check = check_world_size
                yield legal

    def _sizes(self, name: str, sizes: Any) -> Any:
        return (self.fixed[name],) if name in self.fixed else sizes

    def _legal(
        self, layout: Layout, world_size: int | None = None, check: Callable[..., None] = validate
    ) -> Iterator[Layout]:
        """The layout if the recipe can have it, otherwise nothing, and the reason among the refused."""
        try:
            check(changed(self.undivided, layout.changes), world_size)
        except UserError as error:
            self._refuse(layout, str(error))
        else:
            yield layout

    def _refuse(self, layout: Layout, reason: str) -> None:
        self.refused.append(Refused(layout, reason))
