"""What training needs: the initialization, the loss, gradient checkpointing, compilation, and that it learns."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
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
    worst_difference,
)

variants = pytest.mark.parametrize("variant", VARIANTS)


@variants
def test_states_start_as_mamba_2_starts_them(variant: str) -> None:
    """dt log-uniform in [0.001, 0.1], A uniform in [1, 16], D ones; 64 heads in every layer."""
    torch.manual_seed(0)
    config = tiny_config(variant, state_num_heads=64, state_head_dim=4, hidden_size=64)
    model = AutoModelForCausalLM.from_config(config)
    mixers = [module for module in model.modules() if isinstance(module, TransXSSMStateSpaceMixer)]
    assert len(mixers) == (config.layer_types or []).count("linear_attention")
    A = torch.cat([mixer.A_log.exp() for mixer in mixers])
    assert 1 <= A.min() < 2 and 15 < A.max() <= 16.001 and abs(A.mean() - 8.5) < 1
    for mixer in mixers:
        assert (mixer.dt_bias is not None) is config.state_dt_bias
        if mixer.dt_bias is not None:
            dt = F.softplus(mixer.dt_bias)
            assert 0.999e-3 < dt.min() < 2e-3 and 0.05 < dt.max() < 1.001e-1
            assert abs(dt.log().mean() - torch.tensor(1e-2).log()) < 0.5
        if config.position_encoding == "conv1d_d":
            assert torch.equal(mixer.D, torch.ones(64))
    assert 0.9 < model.model.layers[0].mlp.up_proj.weight.std() / config.initializer_range < 1.1
    assert torch.equal(model.model.norm.weight, torch.ones(64))


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
    # As the Trainer asks where it accumulates gradients over several batches.
    summed = model(ids, labels=labels, num_items_in_batch=torch.tensor(7)).loss
    torch.testing.assert_close(summed.double(), torch.stack(losses).sum() / 7, rtol=1e-6, atol=0)


@variants
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_gradient_checkpointing_changes_no_gradient(variant: str, reentrant: bool) -> None:
    """Also where the configuration asks for a cache, which it has none of then."""
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


@variants
@pytest.mark.parametrize("inputs", ["ids", "mask", "positions", "labels"])
def test_the_whole_forward_compiles_to_one_graph(variant: str, inputs: str) -> None:
    model, (ids, mask) = tiny_model(variant), padded_left()
    options: dict[str, Any] = {
        "ids": {},
        "mask": {"attention_mask": mask},
        "positions": {"position_ids": torch.cat([torch.arange(13), torch.arange(27)])[None]},
        "labels": {"attention_mask": mask, "labels": ids},
    }[inputs]
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    expected, output = model(ids, use_cache=False, **options), compiled(ids, use_cache=False, **options)
    assert worst_difference(output.logits, expected.logits) < 1e-5
    if inputs == "labels":
        torch.testing.assert_close(output.loss, expected.loss)
        output.loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


@variants
@torch.no_grad()
def test_decoding_compiles_to_one_graph(variant: str) -> None:
    """A prompt and two tokens behind it, each through a compiled forward with a cache."""
    model, ids = tiny_model(variant), random_ids(2, 22)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    cache, logits = None, []
    for part in ids.split([20, 1, 1], dim=1):
        output = compiled(part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    assert worst_difference(torch.cat(logits, dim=1), model(ids).logits) < 1e-4


def test_the_embedding_of_the_padding_token_is_trained() -> None:
    """Here the token that ends a document is the padding, too."""
    model = tiny_model(tie_word_embeddings=False)
    ids = random_ids(1, 12)
    ids[0, 5] = PADDING
    model(ids, labels=ids).loss.backward()
    gradient = model.model.embed_tokens.weight.grad
    assert gradient is not None and gradient[PADDING].norm() > 1e-6
