"""The samples of a validation: the same every time, each equally often.

Megatron's own iterators advance from one validation to the next, start elsewhere after a resume, and repeat samples of
a whole set if its size is not divisible by the data-parallel ranks. Losses of one model would then differ by their
samples.
"""

import math
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

from megatron.core.datasets.utils import Split
from torch.utils.data import ConcatDataset

from megatron_txssm.compat import MegatronArguments

# "tokens", "labels", "loss_mask", "position_ids" [L], and numbers of a dataset.
type Sample = dict[str, Any]


class Samples(Protocol):
    """A dataset of Megatron's, or one of ours around it."""

    def __len__(self) -> int: ...
    def __getitem__(self, idx: int, /) -> Sample: ...


def fixed_validation(validation: Any, args: MegatronArguments) -> Any:
    """Megatron's validation set, or list of sets, wrapped so that one validation reads all of it once.

    `args`: Megatron's; with --eval-iters its loader is set to begin at the first sample, regardless of the checkpoint.
    """
    if validation is None or (not args.full_validation and args.eval_iters == 0):
        return validation
    if args.full_validation:
        sets = validation if isinstance(validation, list) else [validation]
        if args.validation_set_names:
            sets = by_subset(sets)
        return [WholeSet(samples, args.data_parallel_size) for samples in sets]
    args.consumed_valid_samples = 0
    return FirstSamples(validation, samples_of_one_validation(args), endless=args.dataloader_type == "single")


def samples_of_one_validation(args: MegatronArguments) -> int:
    return args.eval_iters * args.eval_global_batch_size


def of_each_set[T](iterators: list[list[T]], args: MegatronArguments) -> list[list[T]]:
    """Megatron's iterators, regrouped for its validation of several sets: per set, those of all virtual stages.

    Megatron passes them per virtual stage, which would pair one set's tokens with another set's labels across stages.
    """
    if args.multiple_validation_sets and args.virtual_pipeline_model_parallel_size is not None:
        return [list(of_set) for of_set in zip(*iterators, strict=True)]
    return iterators


class FirstSamples:
    """The first `count` of `samples`, cyclically: a loader that advances reads them again.

    `endless`: for loaders that read a set once; loaders that restart at the end need the real length.
    """

    # Megatron's loader takes its batch size from it.
    split = Split.valid

    def __init__(self, samples: Samples, count: int, *, endless: bool):
        self.samples, self.count, self.endless = samples, count, endless

    def __len__(self) -> int:
        return sys.maxsize if self.endless else self.count

    def __getitem__(self, idx: int) -> Sample:
        # Token files without weights are not repeated if they hold too few samples.
        return self.samples[idx % self.count % len(self.samples)]


class WholeSet:
    """A validation set, padded to a multiple of `copies` with samples whose loss is masked."""

    split = Split.valid

    def __init__(self, samples: Samples, copies: int):
        self.samples, self.copies = samples, copies

    def __len__(self) -> int:
        return math.ceil(len(self.samples) / self.copies) * self.copies

    def __getitem__(self, idx: int) -> Sample:
        sample = self.samples[min(idx, len(self.samples) - 1)]
        return sample if idx < len(self.samples) else sample | {"loss_mask": sample["loss_mask"] * 0}


def by_subset(datasets: Sequence[Any]) -> list[ConcatDataset[Sample]]:
    """One set per folder of shards, in order; `datasets` are GPTDatasets, one per shard.

    Megatron makes one set per shard, and a corpus has hundreds.
    """
    folders = groupby(datasets, key=lambda dataset: Path(dataset.dataset_path).parent)
    return [ConcatDataset(list(shards)) for _, shards in folders]
