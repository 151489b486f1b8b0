"""A model in training, divided as the training has it, as the harness asks it.

B=text  L=position  V=vocabulary
"""

from collections.abc import Iterator
from contextlib import contextmanager
from math import lcm
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_txssm.checkpoint.load import LoadedModel
from megatron_txssm.evaluation.harness.models import MegatronModel
from megatron_txssm.recipe.recipe import Recipe

if TYPE_CHECKING:
    import torch

# Transformer Engine's FP8 GEMMs need a multiple of this many tokens.
_FP8_TOKENS = 16


class DividedModel(MegatronModel):
    """The stages on this rank of a model whose tensors, layers, experts and sequences are divided over ranks.

    Megatron's schedule passes a batch through the pipeline, in a micro-batch for each stage. Texts are padded to a
    length that can be divided.
    """

    def __init__(self, stages: list[Any], loaded: LoadedModel, name: Path):
        super().__init__(loaded, name)
        self.stages, self.parallel, self.multiple = stages, loaded.recipe.parallel, text_multiple(loaded.recipe)

    def logits(self, tokens_BL: "torch.Tensor") -> "torch.Tensor | None":
        """[B, L, V] logits of the token after each position, on the last stage; None on the others."""
        import torch
        from megatron.core.parallel_state import get_context_parallel_group
        from megatron.core.pipeline_parallel import get_forward_backward_func

        from megatron_txssm.model.context_parallel import Zigzag

        texts, length = tokens_BL.shape
        stages = self.parallel.pipeline_model_parallel_size
        # Virtual stages need one micro-batch for each stage.
        number = stages if len(self.stages) > 1 else min(stages, texts)
        padding = (0, -length % self.multiple, 0, -texts % number)
        tokens_BL = torch.nn.functional.pad(tokens_BL, padding).to(torch.cuda.current_device())
        micro_batches = tokens_BL.chunk(number)
        zigzag = Zigzag.of(get_context_parallel_group())

        def forward_step(batches: Iterator[torch.Tensor], stage: Any) -> tuple[torch.Tensor, None]:
            whole_BL = next(batches)
            positions_BL = torch.arange(whole_BL.shape[1], device=whole_BL.device).expand_as(whole_BL)
            return stage(zigzag.own(whole_BL), zigzag.own(positions_BL), None, runtime_gather_output=True), None

        with _untimed(self.stages[0].config):
            outputs = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=[iter(micro_batches) for _ in self.stages],
                model=self.stages,
                num_microbatches=number,
                seq_length=tokens_BL.shape[1],
                micro_batch_size=len(micro_batches[0]),
                forward_only=True,
            )
        if not outputs:
            return None
        whole_LBV = zigzag.gather_tokens(torch.cat(outputs)[..., : self.vocab_size].transpose(0, 1))
        return whole_LBV.transpose(0, 1)[:texts, :length]


@contextmanager
def _untimed(config: Any) -> Iterator[None]:
    """Within a `with` block, Megatron's schedules do not use the timers of the training, as in its validations."""
    timers, config.timers = config.timers, None
    try:
        yield
    finally:
        config.timers = timers


def text_multiple(recipe: Recipe) -> int:
    """A text must have a multiple of this many tokens while the recipe's model trains."""
    parallel = recipe.parallel
    on_rank = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    if recipe.training.fp8 is not None:
        on_rank = lcm(on_rank, _FP8_TOKENS)
    ranks = parallel.context_parallel_size
    # Megatron gives each rank two pieces of a sequence.
    return on_rank if ranks == 1 else ranks * lcm(on_rank, 2)


def reads_whole_texts(recipe: Recipe) -> bool:
    """Whether the recipe's model, while it trains, reads texts of any length in one pass on each rank."""
    parallel = recipe.parallel
    divisions = (parallel.pipeline_model_parallel_size, parallel.expert_model_parallel_size, text_multiple(recipe))
    return max(divisions) == 1
