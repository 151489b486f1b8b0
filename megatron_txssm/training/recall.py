"""Training on multi-query associative recall: datasets for Megatron's loop, and the accuracy of the answers.

B=batch  L=sequence length  V=vocabulary
"""

from typing import Any

import numpy as np
import torch
from megatron.core.datasets.utils import Split
from torch import Tensor
from torch.nn.functional import cross_entropy

from megatron_txssm.compat import MegatronArguments
from megatron_txssm.data.recall import VALIDATION_SAMPLES, recall_sample
from megatron_txssm.training.validation_sets import Sample, WholeSet

ACCURACY = "accuracy"


class RecallSamples(torch.utils.data.Dataset[Sample]):
    """Samples with these numbers of pairs in turn. Each depends on split, seed and index alone."""

    def __init__(self, split: Split, count: int, pairs: list[int], args: MegatronArguments):
        # Megatron's loader takes its batch size from the split.
        self.split, self.count, self.pairs = split, count, pairs
        # The same questions for every seed of the training.
        self.seed = args.seed if split is Split.train else 0
        self.sizes = args.seq_length, args.vocab_size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        pairs = self.pairs[index % len(self.pairs)]
        draw = np.random.default_rng((self.split.value, self.seed, index, pairs))
        tokens, labels, is_query = map(torch.from_numpy, recall_sample(draw, pairs, *self.sizes))
        positions = torch.arange(len(tokens))
        return {"tokens": tokens, "labels": labels, "loss_mask": is_query.float(), "position_ids": positions}


def recall_datasets(num_samples: list[Any], args: MegatronArguments) -> list[Any]:
    """Megatron's train, validation and test data; a validation set for each number of pairs."""
    train = None if num_samples[0] is None else RecallSamples(Split.train, num_samples[0], args.recall_pairs, args)
    if not args.full_validation:
        return [train, None, None]
    held_out = [RecallSamples(Split.valid, VALIDATION_SAMPLES, [pairs], args) for pairs in args.recall_pairs]
    return [train, [WholeSet(samples, args.data_parallel_size) for samples in held_out], None]


def answers(logits_BLV: Tensor, labels_BL: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor]:
    """The losses [B, L] in nats, and [2] fp32: the likeliest tokens that are the labels, of how many that count."""
    losses_BL = cross_entropy(logits_BLV.float().transpose(1, 2), labels_BL, reduction="none")
    right_BL = (logits_BLV.argmax(-1) == labels_BL) * mask_BL
    return losses_BL, torch.stack([right_BL.sum(), mask_BL.sum()])
