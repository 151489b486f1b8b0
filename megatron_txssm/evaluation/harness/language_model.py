"""lm_eval's view of a model: log-likelihoods and continuations of texts, asked in batches."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import batched
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_txssm.errors import UserError, shown
from megatron_txssm.evaluation.harness.models import Answer, Prompt, Question
from megatron_txssm.evaluation.harness.ranks import OneProcess, Replicas, Work, answer_batch, complete_each
from megatron_txssm.evaluation.harness.responses import Responses

# As in lm_eval's other models: new tokens of a task that states no number.
_MAX_NEW_TOKENS = 256
# Shows the progress of a number of requests: called with the number of those that are done.
type Bar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
# The texts as lm_eval has them, the context's tokens, the continuation's.
type Pair = tuple[Any, list[int], list[int]]


class HarnessModel(TemplateLM):
    """Answers lm_eval's requests; a batch has `batch_size` texts for each replica of the model."""

    def __init__(self, ranks: OneProcess | Replicas, responses: Responses, batch_size: int, bar: Bar):
        super().__init__()
        self.ranks, self.responses, self.bar = ranks, responses, bar
        self.decoder, self.max_length = ranks.model.decoder, ranks.model.max_length
        self._batch = batch_size * ranks.replicas
        # Requests whose beginning was cut off, and that were given less room for an answer.
        self.truncated = self.shortened = 0

    @property
    def eot_token_id(self) -> int:
        """The token before a text without context."""
        if self.decoder.eod is None:
            raise UserError(f"{self.decoder.description}: its tokenizer has no token that ends a text")
        return self.decoder.eod

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.decoder.encode(string)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[Answer]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: list[Pair], **kwargs: Any) -> list[Answer]:
        return self._answers(requests, "log-likelihoods")

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        windows = [list(self._windows(request.args[0])) for request in requests]
        answers = iter(self._answers([window for text in windows for window in text], "windows of texts"))
        return [sum(next(answers)[0] for _ in text) for text in windows]

    def _windows(self, text: str) -> Iterator[Pair]:
        """Parts of a text, of at most the model's length, of which each token is in one."""
        tokens = self.tok_encode(text)
        for part in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
            yield (None, *make_disjoint_window(part))

    def _answers(self, pairs: Sequence[Pair], what: str) -> list[Answer]:
        """Continuations of the same tokens, such as the letters of a choice, are read from one pass."""
        together: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}
        places = [self._place(*pair) for pair in pairs]
        for tokens, continuation in places:
            together.setdefault(tokens, {})[continuation] = None
        questions = [Question(tokens, tuple(continuations)) for tokens, continuations in together.items()]
        found: dict[tuple[tuple[int, ...], tuple[int, ...]], Answer] = {}
        answers = self._ask(answer_batch, questions, lambda question: len(question.tokens), what)
        for question, made in zip(questions, answers, strict=True):
            for continuation, (loglikelihood, likeliest) in zip(question.continuations, made, strict=True):
                found[question.tokens, continuation] = (loglikelihood, likeliest)
        return [found[place] for place in places]

    def _place(
        self, texts: Any, context: list[int], continuation: list[int]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What the model reads, and the continuation; as in lm_eval, a long text loses its beginning."""
        if not 0 < len(continuation) <= self.max_length:
            raise UserError(
                f"a task has a continuation of {len(continuation)} tokens, and the model reads 1 to {self.max_length}; "
                f"leave that task out (context and continuation: {shown(texts)})"
            )
        whole = context + continuation
        self.truncated += len(whole) > self.max_length + 1
        return tuple(whole[-(self.max_length + 1) : -1]), tuple(continuation)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        prompts = [self._prompt(*request.args, task=request.task_name) for request in requests]
        return self._ask(complete_each, prompts, lambda prompt: len(prompt.tokens), "continuations")

    def _prompt(self, context: str, options: dict[str, Any], *, task: str | None) -> Prompt:
        try:
            settings: Any = normalize_gen_kwargs(options, _MAX_NEW_TOKENS)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"task {task}: its generation_kwargs are wrong ({error}); correct them in its file"
            ) from error
        if settings["max_gen_toks"] < 1 or not all(isinstance(stop, str | None) for stop in settings["until"]):
            raise UserError(
                f"task {task}: its generation_kwargs have max_gen_toks {settings['max_gen_toks']} and until "
                f"{shown(settings['until'])}; they need at least 1 and texts: correct them in its file"
            )
        if settings["do_sample"]:
            raise UserError(f"task {task} draws its answers at random; only greedy ones can be computed here")
        # Half of the text at most, so that a short model has a question to answer.
        room = min(settings["max_gen_toks"], self.max_length // 2)
        self.shortened += room < settings["max_gen_toks"]
        tokens = self.tok_encode(context) or [self.prefix_token_id]
        self.truncated += len(tokens) > self.max_length - room
        return Prompt(tuple(tokens[room - self.max_length :]), tuple(filter(None, settings["until"])), room)

    def _ask(self, work: Work, items: Sequence[Any], length: Callable[[Any], int], what: str) -> list[Any]:
        """The model's responses, those that are kept and the others; longest first, so that the time left is known."""
        order = sorted(range(len(items)), key=lambda number: (-length(items[number]), items[number]))
        results: list[Any] = [None] * len(items)
        with self.bar(what, len(items)) as advance:
            # `batched` takes memory for as many as it is told.
            for numbers in batched(order, min(self._batch, len(order) or 1)):
                batch = [items[number] for number in numbers]
                responses = self.responses.of(batch)
                if responses is None:
                    self.responses.add(batch, self.ranks.share(work, batch))
                    responses = self.responses.of(batch)
                assert responses is not None
                for number, response in zip(numbers, responses, strict=True):
                    results[number] = response
                advance(len(batch))
        return results
