"""Lets Megatron train on fake tensors, which have shapes but no memory, as one rank of a world that does not exist."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch._C._distributed_c10d import FakeWork  # pyright: ignore[reportAttributeAccessIssue]
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Module

from megatron_txssm.ops import ssd_blocks, tracing
from megatron_txssm.planning.dry_run.watch import Watch

# Arguments for start_megatron. NaN is looked for, and steps are repeated, by reading values.
FAKE_PROCESSES = ("--fake-process-group", "--no-initialization")
WITHOUT_A_LOOK_AT_VALUES = ("--rerun-mode=disabled", "--no-check-for-nan-in-loss-and-grad")


class FakeWatch(Watch):
    """A watch that also answers what fake tensors cannot: collectives, and the value of a number."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            self._count(func, args)
            return _done(func, args)
        if func is torch.ops.aten._local_scalar_dense.default:
            return _some_value(args[0].dtype)
        return super().__torch_dispatch__(func, types, args, kwargs)


def _done(func: Any, args: tuple[Any, ...]) -> Any:
    """What a collective returns: its output tensors as they are, and work that is done."""
    work = FakeWork().boxed()
    kinds = [str(kind.type) for kind in func._schema.returns]
    return work if len(kinds) == 1 else tuple(work if "Work" in kind else args[0] for kind in kinds)


def _some_value(dtype: torch.dtype) -> float | int | bool:
    if dtype == torch.bool:
        return False
    return 1.0 if dtype.is_floating_point else 1


@contextlib.contextmanager
def replaced(attributes: list[tuple[Any, str, Any]]) -> Iterator[None]:
    """In this context, each (owner, name, replacement) of `attributes` is in place."""
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in attributes:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, replacement)
        yield


@contextlib.contextmanager
def on_fake_tensors() -> Iterator[None]:
    """In this context, all tensors are fake, and modules and groups work with them."""
    from megatron.core.optimizer import clip_grads
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    from megatron_txssm.model.documents import PackedDocuments
    from megatron_txssm.training import forward_step

    changed: list[tuple[Any, str, Any]] = [
        (Module, "_apply", _apply_in_place),
        (torch.distributed, "all_gather_object", _gather_own),
        (torch.distributed, "broadcast_object_list", lambda *_, **__: None),
        (clip_grads, "l2_norm_impl", _norm),
        # Our operators take fake tensors for a compiler's, and a compiler gets other code.
        (tracing, "_is_plain", lambda _: True),
        (MoEAlltoAllTokenDispatcher, "preprocess", _balanced(MoEAlltoAllTokenDispatcher.preprocess)),
        (PackedDocuments, "segments", _segments),
        # It looks at values to count FLOPs.
        (forward_step, "count_documents", lambda *_: None),
    ]
    with replaced(changed), contextlib.ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        # Buffers kept from an earlier run are other fakes.
        stack.callback(ssd_blocks._kept_scratch.__dict__.clear)
        yield


def _apply_in_place(self: Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Module:
    """Module._apply for moves and casts; torch's own swaps tensors, which the weak references to fakes forbid."""
    for child in self.children() if recurse else ():
        child._apply(fn)
    for holder in (self._parameters, self._buffers):
        for name, tensor in holder.items():
            if tensor is None:
                continue
            with torch.no_grad():
                made = fn(tensor)
            if made.dtype != tensor.dtype:
                setattr(self, name, _like(made, tensor))
    return self


def _like(made: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """A cast parameter is one, with what Megatron has noted on it."""
    if not isinstance(tensor, torch.nn.Parameter):
        return made
    parameter = torch.nn.Parameter(made, tensor.requires_grad)
    vars(parameter).update(vars(tensor))
    return parameter


def _gather_own(object_list: list[Any], obj: Any, group: Any = None) -> None:
    object_list[:] = [obj] * len(object_list)


def _balanced(preprocess: Callable[..., Any]) -> Callable[..., Any]:
    """The token dispatcher's plan where each expert gets as many tokens; the real one follows from values."""

    def plan(self: Any, routing_map: torch.Tensor) -> Any:
        preprocess(self, routing_map)
        tokens, ranks = self.num_out_tokens, self.ep_size * self.tp_size
        if ranks > 1:
            self.input_splits = self.output_splits = np.full(self.ep_size, tokens // self.ep_size)
            self.output_splits_tp = np.full(self.tp_size, tokens)
        each = tokens // self.num_experts
        self.num_global_tokens_per_local_expert = np.full((ranks, self.num_local_experts), each)
        self.sort_input_by_local_experts = np.arange(self.num_experts * self.tp_size)
        self.restore_output_by_local_experts = self.sort_input_by_local_experts
        return np.full(self.num_local_experts, each * ranks)

    return plan


def _segments(self: Any, zigzag: Any) -> list[Any]:
    """Of step.py's documents."""
    from megatron_txssm.model.documents import _of_row
    from megatron_txssm.planning.dry_run.step import document_positions

    if zigzag not in self._segments:
        rows, length = self.position_BL.shape
        positions = document_positions(length)
        self._segments[zigzag] = [s for row in range(rows) for s in _of_row(row, positions, zigzag)]
    return self._segments[zigzag]


def _norm(_chunk: int, _flag: Any, lists: list[list[torch.Tensor]], _per_tensor: bool) -> tuple[torch.Tensor, None]:
    """Megatron's own reads the norms of all tensors into a new one."""
    return torch.stack([tensor.norm() for tensor in lists[0]]).norm(), None
