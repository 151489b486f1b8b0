"""Divides work over the replicas of a model: rank 0 runs the harness, the other ranks compute their part of a batch."""

from collections.abc import Callable, Sequence
from typing import Any

from megatron_txssm.evaluation.harness.models import Answer, Model, Prompt, Question, answer, complete


def answer_batch(model: Model, questions: Sequence[Question]) -> list[list[Answer]]:
    return answer(model, questions)


def complete_each(model: Model, prompts: Sequence[Prompt]) -> list[str]:
    return [complete(model, prompt) for prompt in prompts]


type Work = Callable[[Model, Sequence[Any]], list[Any]]


class OneProcess:
    """A model in this process alone."""

    replicas = 1

    def __init__(self, model: Model):
        self.model = model

    def share(self, work: Work, items: Sequence[Any]) -> list[Any]:
        """The result for each item, in their order."""
        return work(self.model, items)


class Replicas:
    """A Megatron model on all ranks: each data-parallel replica does its share of a batch."""

    def __init__(self, model: Model):
        from megatron.core import parallel_state

        self.model = model
        self.replicas = parallel_state.get_data_parallel_world_size()
        self._replica = parallel_state.get_data_parallel_rank()
        ranks = (parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_context_parallel_rank())
        # Logits are on the last stage.
        self._speaks = ranks == (0, 0) and parallel_state.is_pipeline_last_stage()

    def share(self, work: Work, items: Sequence[Any]) -> list[Any]:
        """On rank 0: the result for each item, in their order; the other ranks must be in `follow`."""
        self._broadcast((work, list(items)))
        results: list[Any] = [None] * len(items)
        for part in self._compute(work, items):
            if part is not None:
                replica, made = part
                results[replica :: self.replicas] = made
        return results

    def follow(self) -> None:
        """On the other ranks: take part in the work of rank 0 until it calls `end`."""
        while True:
            work, items = self._broadcast(None)
            if work is None:
                return
            self._compute(work, items)

    def end(self) -> None:
        """On rank 0: let the other ranks go."""
        self._broadcast((None, ()))

    def _broadcast(self, order: Any) -> Any:
        import torch.distributed

        box = [order]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def _compute(self, work: Work, items: Sequence[Any]) -> list[Any]:
        """Each rank's part, of those that speak for a replica."""
        import torch.distributed

        own = items[self._replica :: self.replicas]
        # Replicas compute together if experts are divided over them.
        made = work(self.model, own or items[:1])[: len(own)]
        parts: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, (self._replica, made) if self._speaks else None)
        return parts
