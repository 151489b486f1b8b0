"""The logits after each token of a text, step by step, from a Megatron or transformers model."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class HfText:
    """A text read by a transformers model, with its cache; with `use_cache: false`, all of it is read each time."""

    def __init__(self, model: "PreTrainedModel"):
        self.model, self.seen = model, list[int]()
        self.cache: Any = None

    def next_logits(self, tokens: list[int]) -> "torch.Tensor":
        """[vocabulary] fp32 logits of the token after `tokens`, which continue the text."""
        import torch

        from megatron_txssm.hf import CACHE_NAME

        cached = self.model.config.use_cache
        self.seen += tokens
        with torch.inference_mode():
            tokens_BL = torch.tensor([tokens if cached else self.seen], device=self.model.device)
            output = self.model(tokens_BL, use_cache=cached, logits_to_keep=1, **{CACHE_NAME: self.cache})
        self.cache = getattr(output, CACHE_NAME)
        return output.logits[0, -1].float()


def next_token_logits(model: Any, context: Any, tokens: list[int], vocab_size: int) -> "torch.Tensor":
    """[vocab_size] fp32 logits of the token after `tokens`, from a Megatron model; `context`: what it has read so far.

    The embedding's padding rows, from `vocab_size` on, are not tokens.
    """
    import torch

    # Not inference_mode: a model in training keeps buffers, such as those of its collectives.
    with torch.no_grad():
        tokens_BL = torch.tensor([tokens], device=torch.cuda.current_device())
        positions_BL = torch.arange(len(tokens), device=tokens_BL.device)[None] + context.sequence_len_offset
        logits_BLV = model(tokens_BL, positions_BL, None, inference_context=context, runtime_gather_output=True)
    context.increment_sequence_len_offset(len(tokens))
    return logits_BLV[0, -1, :vocab_size].float()
