"""A task of tests/support/megatron_tasks.py: what Megatron's own model computes from a checkpoint."""

from pathlib import Path


def megatron_gradients(checkpoints: str, step: int, tokens: list[int], out: str) -> None:
    """Of the mean loss over `tokens`, by the parameter's name in the checkpoint, padding and all."""
    import torch
    from safetensors.torch import save_file

    from megatron_txssm.checkpoint.load import WEIGHTS_ONLY, load_model
    from megatron_txssm.model.shards import model_shards

    loaded = load_model(Path(checkpoints), WEIGHTS_ONLY, step=step)
    tokens_BL = torch.tensor([tokens])
    logits_BLV = loaded.model(tokens_BL, torch.arange(len(tokens))[None], None)
    vocab_size = loaded.recipe.data.vocab_size
    torch.nn.functional.cross_entropy(logits_BLV[0, :-1, :vocab_size], tokens_BL[0, 1:]).backward()
    gradients = {parameter.data_ptr(): parameter.grad for parameter in loaded.model.parameters()}
    whole: dict[str, torch.Tensor] = {}
    for shard in model_shards(loaded.model, instead=lambda tensor: gradients.get(tensor.data_ptr())):
        assert shard.data is not None
        whole.setdefault(shard.key, torch.full(shard.global_shape, torch.nan))[shard.global_slice()] = shard.data
    save_file(whole, out)
