"""Training: initialization, loss, gradient checkpointing, and that the model learns."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_txssm.hf.layers_transxssm import TransXSSMStateSpaceMixer
from tests.hf.tiny import (
    PADDING,
    VARIANTS,
    VOCABULARY,
    padded_left,
    random_ids,
    tiny_config,
    tiny_model,
)
from tests.support.distributions import assert_uniform

variants = pytest.mark.parametrize("variant", VARIANTS)


@variants
def test_weights_start_as_in_training(variant: str) -> None:
    """As drawn by megatron_txssm.model.initialization; a mixer's from Mamba-2's distributions."""
    torch.manual_seed(0)
    config = tiny_config(
        variant, hidden_size=64, state_num_heads=256, state_head_dim=1, state_size=32, initializer_range=0.05
    )
    model = AutoModelForCausalLM.from_config(config)
    drawn: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        drawn.setdefault(name.removesuffix(".weight").rpartition(".")[2], []).append(parameter.detach().flatten())
        if parameter.dim() == 2 or ".experts." in name:
            into_residual_stream = name.removesuffix(".weight").endswith(("o_proj", "down_proj", "out_proj"))
            std = 0.05 / 6**0.5 if into_residual_stream else 0.05
            # Four standard errors of a standard deviation.
            assert abs(parameter.std().item() / std - 1) < 4 / (2 * parameter.numel()) ** 0.5, name
        elif "norm" in name or name.endswith(".D"):
            assert torch.equal(parameter, torch.ones_like(parameter)), name
    assert_uniform(torch.cat(drawn["A_log"]).exp(), 1, 16)
    if config.state_dt_bias:
        assert_uniform(F.softplus(torch.cat(drawn["dt_bias"]).double()).log(), math.log(1e-3), math.log(1e-1))
    if config.position_encoding == "conv1d_d":
        for mixer in (module for module in model.modules() if isinstance(module, TransXSSMStateSpaceMixer)):
            for parameter in mixer.conv1d.parameters():
                assert_uniform(parameter.detach().flatten(), -0.5, 0.5)


@variants
def test_the_loss_is_the_next_tokens_cross_entropy(variant: str) -> None:
    model, ids = tiny_model(variant), random_ids(3, 30)
    labels = ids.clone()
    labels[0, :12], labels[2, 25:] = -100, -100
    output = model(ids, labels=labels)
    logarithms = output.logits.double().log_softmax(-1)
    losses = [
        -logarithms[row, t - 1, labels[row, t]] for row in range(3) for t in range(1, 30) if labels[row, t] != -100
    ]
    torch.testing.assert_close(output.loss.double(), torch.stack(losses).mean(), rtol=1e-6, atol=0)
    # As the Trainer does when it accumulates gradients over several batches.
    summed = model(ids, labels=labels, num_items_in_batch=torch.tensor(7)).loss
    torch.testing.assert_close(summed.double(), torch.stack(losses).sum() / 7, rtol=1e-6, atol=0)


@variants
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_gradient_checkpointing_changes_no_gradient(variant: str, reentrant: bool) -> None:
    """Also where the configuration enables the cache, which checkpointing switches off."""
    model, (ids, mask) = tiny_model(variant).train(), padded_left()
    gradients = []
    for use_cache in (False, True):
        model.zero_grad()
        output = model(ids, attention_mask=mask, labels=ids, use_cache=use_cache)
        output.loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        if use_cache:
            assert output.past_key_values is None
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
    assert model.is_activation_checkpointing
    assert len(gradients[0]) == len(list(model.parameters()))
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-5, atol=1e-7)


@variants
def test_it_learns_a_text(variant: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(variant)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = random_ids(1, 12).repeat(2, 3)
    losses = []
    for _ in range(40):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert abs(losses[0] - torch.tensor(float(VOCABULARY)).log().item()) < 0.1
    assert losses[-1] < 0.1


def test_the_embedding_of_the_padding_token_is_trained() -> None:
    """Here the end-of-document token is also the padding token."""
    model = tiny_model(tie_word_embeddings=False)
    ids = random_ids(1, 12)
    ids[0, 5] = PADDING
    model(ids, labels=ids).loss.backward()
    gradient = model.model.embed_tokens.weight.grad
    assert gradient is not None and gradient[PADDING].norm() > 1e-6
