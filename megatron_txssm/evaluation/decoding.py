"""Decodes token by token with a Megatron or transformers model, with a cache of keys, values and states."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megatron_txssm.convert.proof.stepping import HfText, next_token_logits
from megatron_txssm.errors import UserError
from megatron_txssm.evaluation.sampling import Sampling

if TYPE_CHECKING:
    import torch

    from megatron_txssm.checkpoint.load import LoadedModel


class Decoder(Protocol):
    """A model that continues one text."""

    # Description for the user.
    description: str
    # The token that ends a text; None: unknown.
    eod: int | None

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: list[int]) -> str: ...

    def next_logits(self, tokens: list[int]) -> "torch.Tensor":
        """[vocabulary] fp32 logits of the token after `tokens`, which continue the text read so far."""
        ...


class MegatronDecoder:
    """A loaded checkpoint, in Megatron's own model.

    `capacity`: maximum number of tokens of a text, of prompt and answer together.
    """

    def __init__(self, loaded: "LoadedModel", checkpoints: Path, capacity: int):
        self.model, self.tokenizer, self.vocab_size = loaded.model, loaded.tokenizer, loaded.recipe.data.vocab_size
        self.description = f"step {loaded.iteration} of {checkpoints}"
        self.eod = loaded.tokenizer.eod
        self.begin(capacity)

    def begin(self, capacity: int) -> None:
        """Begin a new text."""
        from megatron.core.inference.contexts.static_context import StaticInferenceContext

        self.context = StaticInferenceContext(max_batch_size=1, max_sequence_length=capacity)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.tokenize(text)

    def decode(self, tokens: list[int]) -> str:
        return self.tokenizer.detokenize(tokens)

    def next_logits(self, tokens: list[int]) -> "torch.Tensor":
        return next_token_logits(self.model, self.context, tokens, self.vocab_size)


class HfDecoder:
    """A folder of weights, or a model's name on the Hugging Face hub; its code is never executed."""

    def __init__(self, name: str):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        # Registers our class with AutoModelForCausalLM.
        import megatron_txssm.hf  # noqa: F401
        from megatron_txssm.convert.huggingface.folder import lacks_a_class, open_hf_folder
        from megatron_txssm.convert.huggingface.model import load_hf_model

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            if Path(name).is_dir() and lacks_a_class(Path(name)):
                model: Any = load_hf_model(open_hf_folder(Path(name)))
            else:
                model = AutoModelForCausalLM.from_pretrained(
                    name, dtype="auto", use_safetensors=True, trust_remote_code=False
                )
            self.tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except UserError:
            raise
        except Exception as error:  # the hub, transformers and safetensors raise many kinds
            raise UserError(f"{name} cannot be loaded: {str(error).strip().partition(chr(10))[0]}") from None
        self.model = model.to(device).eval()
        self.begin()
        self.description = f"{name}: {type(model).__name__}, {model.num_parameters():,} parameters"
        self.eod = self.tokenizer.eos_token_id

    def begin(self) -> None:
        """Begin a new text."""
        self.text = HfText(self.model)

    def encode(self, text: str) -> list[int]:
        # Special tokens as the tokenizer adds them: an export's adds none, other models may need theirs.
        return self.tokenizer(text).input_ids

    def decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens)

    def next_logits(self, tokens: list[int]) -> "torch.Tensor":
        return self.text.next_logits(tokens)


def generate_tokens(
    decoder: Decoder, prompt: list[int], max_new_tokens: int, sampling: Sampling, seed: int
) -> Iterator[int]:
    """Yield the tokens after `prompt`.

    The prompt is read in one pass. Each token then has the same cost, except in attention layers, whose cost grows with
    the number of keys.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    text, tokens = list(prompt), prompt
    for _ in range(max_new_tokens):
        token = sample(decoder.next_logits(tokens), sampling, generator, text)
        yield token
        tokens = [token]
        text.append(token)


def sample(logits_V: "torch.Tensor", sampling: Sampling, generator: "torch.Generator", text: list[int]) -> int:
    """Choose one token id after `text`."""
    import torch

    if sampling.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(text)), device=logits_V.device)
        logits = logits_V[seen]
        penalty = sampling.repetition_penalty
        logits_V = logits_V.index_copy(0, seen, torch.where(logits > 0, logits / penalty, logits * penalty))
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    values, ids = logits_V.topk(min(sampling.top_k or len(logits_V), len(logits_V)))
    probabilities = torch.softmax(values / sampling.temperature, dim=-1).cpu()
    # The likeliest token is always kept, however small top_p is.
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill(before >= sampling.top_p, 0.0)
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])
