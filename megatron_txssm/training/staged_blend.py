"""Blends that change during training: a sequence of stages, each with its own weights over the same shards.

Every shard is one GPTDataset, large enough for all stages together. A stage is a Megatron BlendedDataset over the
shards that it has weights for. Its draws from a shard begin where earlier stages ended, so each sample is drawn once.
The sample at an index depends only on that index: a run resumed at any step continues as if uninterrupted.
"""

import json
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split

from megatron_txssm.errors import UserError
from megatron_txssm.training.validation_sets import Sample


@dataclass(frozen=True)
class BlendStage:
    """One stage of the training data."""

    samples: int
    # One per shard, in the order of --train-data-path; 0: unused in this stage.
    weights: tuple[float, ...]

    def at_most(self) -> list[int]:
        """Maximum samples per shard in this stage: Megatron's blend exceeds a shard's share by less than one."""
        total = sum(self.weights)
        return [math.ceil(self.samples * weight / total) for weight in self.weights]


def parse_stages(text: str, shards: int, samples: int) -> list[BlendStage]:
    """Parse `--blend-stages`; UserError unless the stages match the shards and the training's number of samples."""
    try:
        stages = [BlendStage(int(stage["samples"]), tuple(map(float, stage["weights"]))) for stage in json.loads(text)]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--blend-stages is not a list of {{samples, weights}} ({error}); let data.stages make it"
        ) from None
    for number, stage in enumerate(stages, start=1):
        if len(stage.weights) != shards:
            raise UserError(f"--blend-stages: stage {number} has {len(stage.weights)} weights for {shards} shards")
    if sum(stage.samples for stage in stages) != samples:
        raise UserError(
            f"--blend-stages holds {sum(stage.samples for stage in stages)} samples, the training {samples}; "
            "leave out of `megatron:` what changes the number of samples"
        )
    return stages


class StagedBlend(torch.utils.data.Dataset):
    """The training samples of all stages, in order, over `datasets`, one per shard."""

    # Megatron's loader takes its batch size from it.
    split = Split.train

    def __init__(self, datasets: list[GPTDataset], stages: Sequence[BlendStage], config: GPTDatasetConfig) -> None:
        self.datasets = datasets
        # The end (exclusive) of each stage's samples.
        self.ends = list(accumulate(stage.samples for stage in stages))
        # For each stage: its shards, its blend of them, and the number of samples that earlier stages drew from each.
        self.stages: list[tuple[np.ndarray, BlendedDataset, np.ndarray]] = []
        drawn = np.zeros(len(datasets), dtype=np.int64)
        for stage in stages:
            members = np.flatnonzero(stage.weights)
            weights = [stage.weights[member] for member in members]
            blend = BlendedDataset([datasets[member] for member in members], weights, stage.samples, config)
            self.stages.append((members, blend, drawn[members]))
            drawn[members] += np.bincount(blend.dataset_index, minlength=len(members))
        assert all(count <= len(dataset) for count, dataset in zip(drawn, datasets, strict=True)), (
            "a shard is too short"
        )

    def __len__(self) -> int:
        return self.ends[-1]

    def locate(self, index: int) -> tuple[int, int]:
        """(dataset, index in it) of a training sample."""
        stage = bisect_right(self.ends, index)
        members, blend, drawn = self.stages[stage]
        local = index - (self.ends[stage] - len(blend))
        member = blend.dataset_index[local]
        return int(members[member]), int(drawn[member] + blend.dataset_sample_index[local])

    def __getitem__(self, index: int) -> Sample:
        dataset, sample = self.locate(index)
        return {"dataset_id": dataset, **self.datasets[dataset][sample]}


class StagedDatasetBuilder(BlendedMegatronDatasetBuilder):
    """Megatron's dataset builder, with a StagedBlend as the training split's blend."""

    def __init__(
        self, stages: str, num_samples: Sequence[Any], is_built_on_rank: Callable, config: GPTDatasetConfig
    ) -> None:
        """`stages`: the text of --blend-stages; `num_samples`: per split, None for one pass over all of it."""
        blends = config.blend_per_split
        if blends is None or (blend := blends[Split.train.value]) is None:
            raise UserError("--blend-stages needs --train-data-path, whose shards it weighs")
        prefixes, _ = blend
        self.stages = parse_stages(stages, len(prefixes), num_samples[Split.train.value])
        # As weights, so that each shard's dataset holds at least the samples that all stages may draw from it.
        needed = [sum(counts) for counts in zip(*(stage.at_most() for stage in self.stages), strict=True)]
        blends[Split.train.value] = (prefixes, [float(count) for count in needed])
        super().__init__(GPTDataset, [sum(needed), *num_samples[1:]], is_built_on_rank, config)

    def build_generic_dataset(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, cls: Any, is_built_on_rank: Callable, synchronize_ranks: bool, *args: Any
    ) -> Any:
        if cls is BlendedDataset and args[0][0].index_split is Split.train:
            cls, args = StagedBlend, (args[0], self.stages, self.config)
        return super().build_generic_dataset(cls, is_built_on_rank, synchronize_ranks, *args)
