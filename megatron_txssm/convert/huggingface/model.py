"""Loads a transformers model from a folder of weights in any format, without executing code from the folder."""

from typing import TYPE_CHECKING, Any

from megatron_txssm.convert.formats.config import hf_config
from megatron_txssm.convert.formats.format import ARCHITECTURES
from megatron_txssm.convert.formats.mapping import plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel
from megatron_txssm.convert.huggingface.folder import HfFolder


def load_hf_model(source: HfFolder) -> "PreTrainedModel":
    """A model for inference, in fp32.

    Formats with a class in transformers are loaded by it. The others are first converted to our class's tensors.
    """
    import torch
    from transformers import AutoModelForCausalLM

    # Registers our class with AutoModelForCausalLM.
    from megatron_txssm.hf import TransXSSMConfig, TransXSSMForCausalLM

    if source.format in ARCHITECTURES:
        options: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False, "attn_implementation": "sdpa"}
        return AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32, **options).eval()
    config = TransXSSMConfig(**hf_config(source.recipe, "transxssm"))
    sizes, state = source.recipe.sizes, {}
    for group in plan("transxssm", source.shapes):
        state |= group.to_hf(source.read(group.megatron), sizes)
    model = TransXSSMForCausalLM(config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    return model.float().eval()
