"""TransXSSM as a transformers model; importing this registers it with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from megatron_txssm.hf.cache_transxssm import TransXSSMCache
from megatron_txssm.hf.configuration_transxssm import TransXSSMConfig
from megatron_txssm.hf.modeling_transxssm import TransXSSMForCausalLM, TransXSSMModel

AutoConfig.register("transxssm", TransXSSMConfig)
AutoModel.register(TransXSSMConfig, TransXSSMModel)
AutoModelForCausalLM.register(TransXSSMConfig, TransXSSMForCausalLM)

__all__ = ["TransXSSMCache", "TransXSSMConfig", "TransXSSMForCausalLM", "TransXSSMModel"]
