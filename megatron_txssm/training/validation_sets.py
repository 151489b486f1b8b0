"""A validation loss for each subset of a corpus, where every validation set is read whole.

Megatron makes a set of every shard, and a corpus has hundreds of them.
"""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from megatron.core.datasets.utils import Split
from torch.utils.data import ConcatDataset


class SubsetValidation(ConcatDataset):
    """The validation shards of one subset, one after another."""

    # Megatron's loader takes its batch size from it.
    split = Split.valid


def by_subset(datasets: Sequence[Any]) -> list[SubsetValidation]:
    """One set for each folder of shards, in their order; `datasets` are GPTDatasets, one for each shard."""
    folders = groupby(datasets, key=lambda dataset: Path(dataset.dataset_path).parent)
    return [SubsetValidation(list(shards)) for _, shards in folders]
