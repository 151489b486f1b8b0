"""TransXSSM as a transformers model; importing this registers it with transformers' Auto classes."""

from megatron_txssm.errors import RequirementError

try:
    # First: on unsupported versions of transformers, the imports below fail with less clear errors.
    from megatron_txssm.hf.versions_transxssm import CACHE_NAME
except ImportError as error:
    raise RequirementError(str(error)) from None

# isort: split
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from megatron_txssm.hf.cache_transxssm import TransXSSMCache
from megatron_txssm.hf.configuration_transxssm import TransXSSMConfig
from megatron_txssm.hf.modeling_transxssm import TransXSSMForCausalLM, TransXSSMModel
from megatron_txssm.hf.standalone import write_code

TransXSSMConfig.write_code = staticmethod(write_code)
AutoConfig.register("transxssm", TransXSSMConfig)
AutoModel.register(TransXSSMConfig, TransXSSMModel)
AutoModelForCausalLM.register(TransXSSMConfig, TransXSSMForCausalLM)

__all__ = ["CACHE_NAME", "TransXSSMCache", "TransXSSMConfig", "TransXSSMForCausalLM", "TransXSSMModel"]
