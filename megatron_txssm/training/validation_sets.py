"""What a validation reads: the same samples every time, each of them as often as any other.

Megatron's own iterators move on from one validation to the next, begin elsewhere after a resume, and repeat samples of
a whole set where the data-parallel ranks do not divide it. Two losses of one model would then differ by their samples.
"""

import math
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from megatron.core.datasets.utils import Split
from torch.utils.data import ConcatDataset


def fixed_validation(validation: Any, args: Any) -> Any:
    """Megatron's validation set, or list of sets, for its loaders: one validation reads all of it, once.

    `args`: Megatron's; with --eval-iters its loader is told to begin at the first sample, whatever a checkpoint says.
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


def samples_of_one_validation(args: Any) -> int:
    return args.eval_iters * args.eval_global_batch_size


def of_each_set(iterators: Any, args: Any) -> Any:
    """Megatron's iterators, as its validation of several sets reads them: for each set those of all virtual stages.

    Megatron hands over for each virtual stage those of all sets, and would give a stage the tokens of one set and the
    next stage the labels of another.
    """
    if args.multiple_validation_sets and args.virtual_pipeline_model_parallel_size is not None:
        return [list(of_set) for of_set in zip(*iterators, strict=True)]
    return iterators


class FirstSamples:
    """The first `count` of `samples`, over and over: a loader that moves on reads them again.

    `endless`: for a loader that reads a set once; one that begins anew at its end shall see the end.
    """

    # Megatron's loader takes its batch size from it.
    split = Split.valid

    def __init__(self, samples: Any, count: int, *, endless: bool):
        self.samples, self.count, self.endless = samples, count, endless

    def __len__(self) -> int:
        return sys.maxsize if self.endless else self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        # Token files without weights are not repeated where they hold too few.
        return self.samples[index % self.count % len(self.samples)]


class WholeSet:
    """A validation set, filled up to a multiple of `copies` with samples whose loss does not count."""

    split = Split.valid

    def __init__(self, samples: Any, copies: int):
        self.samples, self.copies = samples, copies

    def __len__(self) -> int:
        return math.ceil(len(self.samples) / self.copies) * self.copies

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.samples[min(index, len(self.samples) - 1)]
        return sample if index < len(self.samples) else sample | {"loss_mask": sample["loss_mask"] * 0}


def by_subset(datasets: Sequence[Any]) -> list[ConcatDataset]:
    """One set for each folder of shards, in their order; `datasets` are GPTDatasets, one for each shard.

    Megatron makes a set of every shard, and a corpus has hundreds of them.
    """
    folders = groupby(datasets, key=lambda dataset: Path(dataset.dataset_path).parent)
    return [ConcatDataset(list(shards)) for _, shards in folders]
