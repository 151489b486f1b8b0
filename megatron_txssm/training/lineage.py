"""Traces a training step back to its documents: which they are, where they come from, which rank read them.

The training samples are rebuilt in one process, without a model, by the same functions and arguments as in training.
Each sample is then followed through Megatron's indices to its documents.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from megatron_txssm.errors import UserError
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.validation.validate import validate
from megatron_txssm.session.start import megatron_initialized


@dataclass(frozen=True)
class Part:
    """The part of a document in a sample. Ranges are [from, to), in tokens."""

    subset: str
    # For example 00012.train.
    shard: str
    # Index in its shard, from 0.
    document: int
    # Range in the sample's seq_length + 1 tokens: the model reads all but the last and predicts all but the first.
    sample_tokens: tuple[int, int]
    # Range in the document's tokens, the last of which is the end-of-document token.
    document_tokens: tuple[int, int]
    # Source file, relative to the subset's source; row in it, from 0; URL or path, None if the source has none.
    file: str = ""
    row: int = -1
    origin: str | None = None


@dataclass(frozen=True)
class TracedSample:
    """One sample of a global batch: the rank that computes it, and its documents. All numbers count from 0."""

    # Index in the global batch.
    sample: int
    data_parallel_rank: int
    # Index of the rank's forward pass in this step, and of the sample in it.
    micro_batch: int
    position: int
    documents: tuple[Part, ...]


class TrainingData:
    """The training samples of a recipe, as `world_size` processes read them.

    UserError for a recipe without a corpus, a layout that does not fit, or arguments that make the order of samples
    depend on more than the step. Builds Megatron's index files, as training does, if they do not exist.
    """

    def __init__(self, recipe: Recipe, world_size: int) -> None:
        if recipe.data.corpus is None:
            raise UserError(f"{recipe.name} has no data.corpus; only a corpus records the sources of its documents")
        validate(recipe, world_size=world_size)
        self.recipe = recipe
        self.corpus = Path(recipe.data.corpus)
        with megatron_initialized(recipe, world_size) as args:
            from megatron.training import get_tokenizer
            from megatron.training.training import get_train_valid_test_num_samples

            from megatron_txssm.training.forward_step import datasets_provider

            self.data_parallel_size: int = args.data_parallel_size
            # The splits are built independently, so this does not change the training split.
            args.valid_data_path = None
            self.samples: Any = datasets_provider(list(get_train_valid_test_num_samples()))[0]
            self.tokenizer: Any = get_tokenizer()
        # With a single shard, Megatron builds no blend.
        self.shards: list[Any] = getattr(self.samples, "datasets", [self.samples])

    def trace(self, step: int, samples: Iterable[int] | None = None) -> list[TracedSample]:
        """The samples of a step (from 1), or only those with the given numbers; UserError if out of range."""
        batch = self.recipe.global_batch_size
        if not 1 <= step <= self.recipe.train_iters:
            raise UserError(f"--step {step} is not a step of {self.recipe.name}; use 1 to {self.recipe.train_iters}")
        traced = []
        for number in range(batch) if samples is None else samples:
            if not 0 <= number < batch:
                raise UserError(f"--sample {number} is not in the global batch; use 0 to {batch - 1}")
            # Same order as MegatronPretrainingSampler: one micro-batch to every rank in turn, then the next round.
            rest, position = divmod(number, self.recipe.training.micro_batch_size)
            micro_batch, rank = divmod(rest, self.data_parallel_size)
            parts = tuple(self._parts((step - 1) * batch + number))
            traced.append(TracedSample(number, rank, micro_batch, position, parts))
        return _with_sources(traced, self.corpus)

    def text(self, part: Part) -> str:
        """The part of a document that is in a sample, decoded."""
        prefix = str(self.corpus / part.subset / part.shard)
        (shard,) = (shard for shard in self.shards if shard.dataset_path == prefix)
        start, end = part.document_tokens
        tokens = shard.dataset.get(part.document, offset=start, length=end - start)
        return self.tokenizer.detokenize(tokens.tolist())

    def _parts(self, index: int) -> Iterator[Part]:
        """The documents of a training sample, in order, without their sources."""
        shard, sample = self._locate(index)
        path = Path(shard.dataset_path)
        place = shard.shuffle_index[sample]
        (first, offset), (last, end) = shard.sample_index[place].tolist(), shard.sample_index[place + 1].tolist()
        at = 0
        for number in range(first, last + 1):
            document = int(shard.document_index[number])
            start = offset if number == first else 0
            # The next sample begins at `end`, with the last token of this one.
            stop = end + 1 if number == last else int(shard.dataset.sequence_lengths[document])
            yield Part(path.parent.name, path.name, document, (at, at + stop - start), (start, stop))
            at += stop - start
        assert at == self.recipe.training.seq_length + 1

    def _locate(self, index: int) -> tuple[Any, int]:
        """(GPTDataset of a shard, index in it) of a training sample."""
        if len(self.shards) == 1:
            return self.shards[0], index
        if hasattr(self.samples, "locate"):
            shard, sample = self.samples.locate(index)
        else:
            shard, sample = self.samples.dataset_index[index], self.samples.dataset_sample_index[index]
        return self.shards[shard], int(sample)


def _with_sources(traced: list[TracedSample], corpus: Path) -> list[TracedSample]:
    """The samples with each document's source, from the table beside its shard."""
    wanted: dict[tuple[str, str], set[int]] = {}
    for sample in traced:
        for part in sample.documents:
            wanted.setdefault((part.subset, part.shard), set()).add(part.document)
    sources = {key: _read_sources(corpus / key[0] / f"{key[1]}.parquet", rows) for key, rows in wanted.items()}

    def sourced(part: Part) -> Part:
        return dataclasses.replace(part, **sources[part.subset, part.shard][part.document])

    return [dataclasses.replace(sample, documents=tuple(map(sourced, sample.documents))) for sample in traced]


class _Source(TypedDict):
    file: str
    row: int
    origin: str | None


def _read_sources(table: Path, documents: Iterable[int]) -> dict[int, _Source]:
    """Document number -> its source, as in a Part."""
    import pyarrow
    import pyarrow.parquet

    rows = sorted(documents)
    try:
        columns = pyarrow.parquet.read_table(table, columns=["file", "row", "origin"]).take(rows)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{table}: not readable as the sources of a shard ({error}); shard that task again") from None
    return dict(zip(rows, columns.to_pylist(), strict=True))
