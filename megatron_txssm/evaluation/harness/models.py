"""The two kinds of models that the harness asks: a Megatron checkpoint's and transformers'.

Texts of a batch are padded at their end. Every layer is causal, attention and state-space layers alike, so no position
of a text sees its padding; experts have no capacity that it could take.

B=text  L=position  V=vocabulary
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from megatron_txssm.errors import UserError
from megatron_txssm.evaluation.decoding import Decoder, HfDecoder, MegatronDecoder

if TYPE_CHECKING:
    import torch

    from megatron_txssm.checkpoint.load import LoadedModel


class Question(NamedTuple):
    """Tokens that a model reads, and continuations whose tokens end with the one after the last of them."""

    tokens: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]


# Of a continuation: the sum of its tokens' log-probabilities, in nats, and whether each is the likeliest there.
Answer = tuple[float, bool]


class Prompt(NamedTuple):
    """Tokens to continue greedily, until the new text has one of `until` or this many tokens."""

    tokens: tuple[int, ...]
    until: tuple[str, ...]
    max_new_tokens: int


class Model(Protocol):
    """A language model for the harness."""

    @property
    def decoder(self) -> Decoder: ...

    # Tokens of the longest text that it was trained on.
    max_length: int

    def logits(self, tokens_BL: "torch.Tensor") -> "torch.Tensor | None":
        """[B, L, V] logits of the token after each position, in the model's own precision; None: on another rank."""
        ...

    def forget(self, capacity: int) -> None:
        """Let the decoder begin a new text, of at most `capacity` tokens."""
        ...


class MegatronModel:
    """A checkpoint's HybridModel on this rank, and on the others of its tensor-parallel group."""

    def __init__(self, loaded: "LoadedModel", name: Path):
        self.max_length = loaded.recipe.training.seq_length
        self.decoder = MegatronDecoder(loaded, name, self.max_length)
        self.model, self.vocab_size = loaded.model, loaded.recipe.data.vocab_size

    def logits(self, tokens_BL: "torch.Tensor") -> "torch.Tensor | None":
        import torch

        tokens_BL = tokens_BL.to(torch.cuda.current_device())
        positions_BL = torch.arange(tokens_BL.shape[1], device=tokens_BL.device).expand_as(tokens_BL)
        return self.model(tokens_BL, positions_BL, None, runtime_gather_output=True)[..., : self.vocab_size]

    def forget(self, capacity: int) -> None:
        self.decoder.begin(capacity)


class HfModel:
    """A folder of weights that transformers or our class loads."""

    def __init__(self, folder: Path):
        self.decoder = HfDecoder(str(folder))
        self.model: Any = self.decoder.model
        self.max_length = getattr(self.model.config, "max_position_embeddings", 0)
        if self.max_length < 1:
            raise UserError(
                f"{folder / 'config.json'} has no max_position_embeddings above 0; state the length of its training"
            )

    def logits(self, tokens_BL: "torch.Tensor") -> "torch.Tensor":
        return self.model(tokens_BL.to(self.model.device), use_cache=False).logits

    def forget(self, capacity: int) -> None:
        self.decoder.begin()


def answer(model: Model, questions: Sequence[Question]) -> list[list[Answer]]:
    """The answers to each question, in one batch; none on ranks without logits."""
    import torch

    longest = max(len(question.tokens) for question in questions)
    padded = [[*question.tokens, *[0] * (longest - len(question.tokens))] for question in questions]
    # Not inference_mode: a model in training keeps buffers, such as those of its collectives.
    with torch.no_grad():
        logits_BLV = model.logits(torch.tensor(padded))
        if logits_BLV is None:
            return []
        return [list(_answers(logits_BLV[row], question)) for row, question in enumerate(questions)]


def _answers(logits_LV: "torch.Tensor", question: Question) -> Iterator[Answer]:
    import torch

    end = len(question.tokens)
    for continuation in question.continuations:
        wanted_L = torch.tensor(continuation, device=logits_LV.device)
        log_probabilities_LV = logits_LV[end - len(continuation) : end].float().log_softmax(-1)
        own_L = log_probabilities_LV.gather(-1, wanted_L[:, None])
        yield own_L.double().sum().item(), bool((log_probabilities_LV.argmax(-1) == wanted_L).all())


def complete(model: Model, prompt: Prompt) -> str:
    """The greedy continuation of a prompt, up to its first stop."""
    decoder = model.decoder
    model.forget(len(prompt.tokens) + prompt.max_new_tokens)
    tokens, new = list(prompt.tokens), list[int]()
    while len(new) < prompt.max_new_tokens:
        token = int(decoder.next_logits(tokens).argmax())
        if token == decoder.eod:
            break
        new.append(token)
        if any(stop in decoder.decode(new) for stop in prompt.until):
            break
        tokens = [token]
    text = decoder.decode(new)
    return text[: min((place for stop in prompt.until if (place := text.find(stop)) >= 0), default=len(text))]
