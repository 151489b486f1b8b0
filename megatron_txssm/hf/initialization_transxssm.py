"""Weights of a new model: Megatron's initialization, and Mamba-2's for parameters of state-space layers."""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from megatron_txssm.hf.configuration_transxssm import TransXSSMConfig
from megatron_txssm.hf.ffn_transxssm import TransXSSMExperts, TransXSSMRouter
from megatron_txssm.hf.layers_transxssm import TransXSSMStateSpaceMixer


def initialize(module: nn.Module, config: TransXSSMConfig) -> None:
    """A module's own parameters, beyond what transformers itself initializes. As in training:

    normal with standard deviation initializer_range, divided by √(2 · layers) for projections into the residual stream;
    A uniform in [1, 16], dt log-uniform in [0.001, 0.1], the convolution uniform within ±1/√taps, D ones.
    """
    into_residual_stream = config.initializer_range / (2 * config.num_hidden_layers) ** 0.5
    if isinstance(module, nn.Linear) and getattr(module, "into_residual_stream", False):
        init.normal_(module.weight, std=into_residual_stream)
    if isinstance(module, TransXSSMRouter):
        init.normal_(module.weight, std=config.initializer_range)
    if isinstance(module, TransXSSMExperts):
        # The decorator of this class hides its parameters from type checkers.
        experts: Any = module
        init.normal_(experts.gate_up_proj, std=config.initializer_range)
        init.normal_(experts.down_proj, std=into_residual_stream)
    if isinstance(module, TransXSSMStateSpaceMixer):
        _initialize_mixer(module, config)


def _initialize_mixer(mixer: TransXSSMStateSpaceMixer, config: TransXSSMConfig) -> None:
    init.copy_(mixer.A_log, torch.empty_like(mixer.A_log).uniform_(1, 16).log())
    if mixer.dt_bias is not None:
        log_range = torch.tensor([1e-3, 1e-1]).log().tolist()
        dt = torch.empty_like(mixer.dt_bias).uniform_(*log_range).exp()
        init.copy_(mixer.dt_bias, dt + torch.log(-torch.expm1(-dt)))
    if config.position_encoding == "conv1d_d":
        init.ones_(mixer.D)
        bound = config.conv_kernel**-0.5
        for parameter in mixer.conv1d.parameters():
            init.uniform_(parameter, -bound, bound)
