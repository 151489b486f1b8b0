"""The model's part of Megatron's training loop: datasets, forward step and loss.

B=batch  L=sequence length
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.parallel_state import get_context_parallel_group
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_tokenizer
from megatron.training.training import update_seqlen_stats_from_cu_seqlens
from megatron.training.utils import get_blend_and_blend_per_split
from torch import Tensor
from torch.nn import Module

from megatron_txssm.compat import get_args
from megatron_txssm.errors import UserError
from megatron_txssm.model.context_parallel import Zigzag
from megatron_txssm.model.documents import PackedDocuments
from megatron_txssm.training.recall import ACCURACY, answers, recall_datasets
from megatron_txssm.training.staged_blend import StagedDatasetBuilder
from megatron_txssm.training.validation_sets import fixed_validation, samples_of_one_validation

# Sum of token losses in nats, number of tokens, reported values.
type Loss = tuple[Tensor, Tensor, dict[str, Tensor]]

BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids")


def datasets_provider(num_samples: list[Any], vp_stage: int | None = None) -> list[Any]:
    """Megatron's train, validation and test GPTDataset over blends of `.bin/.idx` shards, with `--blend-stages`.

    `num_samples`: per split, None for one pass over all of it. For validation, Megatron requests enough samples for all
    validations of the training; ours read the same samples each time, so the set does not depend on the training's
    length. Every pipeline stage and tensor-parallel rank reads its own batches, in the same order.
    """
    if get_args().recall_pairs:
        return recall_datasets(num_samples, get_args())
    train, validation, test = dataset_builder(num_samples).build()
    return [train, fixed_validation(validation, get_args()), test]


# Tells Megatron that every rank may call the provider.
datasets_provider.is_distributed = True  # pyright: ignore[reportFunctionMemberAccess]


def dataset_builder(num_samples: Sequence[Any]) -> BlendedMegatronDatasetBuilder:
    """The builder of `datasets_provider`, which has not read any token file; UserError if the recipe contradicts it."""
    args = get_args()
    if num_samples[1] is not None:
        num_samples = [num_samples[0], samples_of_one_validation(args), num_samples[2]]
    tokenizer: Any = WithoutPadding(checked_tokenizer())
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=args.eod_mask_loss,
        # Positions restart with every document; forward_step finds the documents by them.
        inter_document_masking=args.isolate_documents,
        # Attention is causal by construction; a mask would cost L² bytes per sample.
        create_attention_mask=False,
    )
    if args.blend_stages is None:
        kind = MockGPTDataset if args.mock_data else GPTDataset
        return BlendedMegatronDatasetBuilder(kind, list(num_samples), lambda: True, config)
    return StagedDatasetBuilder(args.blend_stages, num_samples, lambda: True, config)


def checked_tokenizer() -> Any:
    """Megatron's tokenizer; UserError if it has more tokens than the embedding has rows."""
    args = get_args()
    tokenizer: Any = get_tokenizer()
    if tokenizer.vocab_size > args.vocab_size:
        raise UserError(
            f"data.vocab_size={args.vocab_size} is less than the {tokenizer.vocab_size} tokens of "
            f"data.tokenizer_model={args.tokenizer_model}; set data.vocab_size={tokenizer.vocab_size}"
        )
    return tokenizer


class WithoutPadding:
    """A tokenizer for Megatron's datasets, whose samples contain no padding.

    The datasets mask the loss of every token with the padding id and replace it by token 0, although documents may
    contain that token.
    """

    pad = -1

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        # Not during construction, such as by pickle.
        if name == "tokenizer":
            raise AttributeError(name)
        return getattr(self.tokenizer, name)


def forward_step(data_iterator: Iterator[dict[str, Tensor]], model: Module) -> tuple[Tensor, Callable[[Tensor], Loss]]:
    """Run one micro-batch through this stage: (output, function from the output to Megatron's loss triple)."""
    batch = next(data_iterator)
    documents = None
    if get_args().isolate_documents:
        documents = packed_documents(batch["position_ids"])
        count_documents(batch["position_ids"], model)
    tokens, labels, loss_mask, position_ids = (on_this_rank(batch[key]) for key in BATCH_KEYS)
    if get_args().recall_pairs and not model.training:
        logits = model(tokens, position_ids, None, packed_seq_params=documents, runtime_gather_output=True)
        return logits, partial(answers_function, loss_mask, labels)
    # Only the losses of prediction depths need the mask here.
    output = model(tokens, position_ids, None, labels=labels, loss_mask=loss_mask, packed_seq_params=documents)
    return output, partial(loss_function, loss_mask)


def packed_documents(position_ids_BL: Tensor) -> PackedDocuments:
    """The documents of a micro-batch, from positions that restart with each document."""
    return PackedDocuments.from_position_ids(position_ids_BL.to(torch.cuda.current_device(), non_blocking=True))


def count_documents(position_ids_BL: Tensor, model: Any) -> None:
    """Report document lengths to Megatron's loop, which sums them over the ranks to count attention's FLOPs."""
    # Once per micro-batch: a rank with several virtual stages receives it once per stage.
    if model.training and not get_attr_wrapped_model(model, "vp_stage"):
        positions = position_ids_BL.flatten()
        starts = (positions == 0).nonzero().flatten()
        ends = torch.nn.functional.pad(starts, (0, 1), value=len(positions))
        update_seqlen_stats_from_cu_seqlens(ends.to(torch.int32))


def on_this_rank(whole_BL: Tensor) -> Tensor:
    """This context-parallel rank's tokens, on its device."""
    own = Zigzag.of(get_context_parallel_group()).own(whole_BL)
    return own.to(torch.cuda.current_device(), non_blocking=True)


def loss_function(loss_mask_BL: Tensor, losses_BL: Tensor) -> Loss:
    """The loss of a micro-batch.

    A triple, because Megatron multiplies the loss of a pair by the context-parallel size, which silently doubles
    gradients.
    """
    mask = loss_mask_BL.view(-1).float()
    loss = torch.sum(losses_BL.view(-1).float() * mask)
    num_tokens = mask.sum().detach().to(torch.int)
    return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens.float()])}


def answers_function(loss_mask_BL: Tensor, labels_BL: Tensor, logits_BLV: Tensor) -> Loss:
    """The loss of a micro-batch of associative recall from its logits, and the share of right answers."""
    losses_BL, right = answers(logits_BLV, labels_BL, loss_mask_BL)
    loss, num_tokens, reported = loss_function(loss_mask_BL, losses_BL)
    return loss, num_tokens, reported | {ACCURACY: right}
