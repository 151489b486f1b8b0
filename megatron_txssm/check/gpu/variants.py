"""More trainings of `txssm check gpu`: baselines, experts, prediction depths, Muon, muP, the guard, a CUDA graph."""

from megatron_txssm.architecture.layer_pattern import EXPERTS, FFN, MODULE
from megatron_txssm.check.gpu.speed import AS_A_GRAPH
from megatron_txssm.check.gpu.trainings import (
    DETERMINISTIC,
    SAVE,
    STOP_THERE,
    TRANSFORMER_ENGINE,
    Agreement,
    Training,
    small_training,
)
from megatron_txssm.recipe.changes import Changes

_EXPERTS: Changes = {
    "model.layer_pattern": MODULE.replace(FFN, EXPERTS),
    "model.num_experts": 8,
    "model.moe_router_topk": 2,
    "model.moe_ffn_hidden_size": 256,
    "model.moe_shared_expert_intermediate_size": 256,
}
_PREDICTION: Changes = {"model.layer_pattern": f"{MODULE}/*-"}
_MUON: Changes = {
    "optimizer.name": "muon",
    "parallel.use_distributed_optimizer": False,
    "megatron.overlap_param_gather": None,
}
_MUP: Changes = {"model.mup_base_hidden_size": 128}
_GUARD: Changes = {"guard.spike_action": "skip"}
_GRAPH: Changes = TRANSFORMER_ENGINE | AS_A_GRAPH

# As trainings.WAVES.
WAVES: tuple[tuple[Training, ...], ...] = (
    (
        small_training("plain", TRANSFORMER_ENGINE),
        small_training("mamba2", {}, recipe="mamba2_320m"),
        small_training("experts", _EXPERTS, recipe="transxssm_320m_moe"),
        small_training("prediction", _PREDICTION),
        small_training("muon", _MUON | DETERMINISTIC | SAVE),
        small_training("stopped_muon", _MUON | DETERMINISTIC | STOP_THERE),
        small_training("mup", _MUP),
        small_training("stopped_graph", _GRAPH | STOP_THERE),
    ),
    (
        small_training("resumed_muon", _MUON | DETERMINISTIC | SAVE, continues="stopped_muon"),
        small_training("resumed_graph", _GRAPH | SAVE, continues="stopped_graph"),
        small_training("mamba2_torch", {"model.ssd_backend": "torch"}, recipe="mamba2_320m"),
        small_training("mamba2_te", TRANSFORMER_ENGINE, recipe="mamba2_320m"),
        small_training("experts_te", TRANSFORMER_ENGINE | _EXPERTS, recipe="transxssm_320m_moe"),
        small_training("prediction_te", TRANSFORMER_ENGINE | _PREDICTION),
        small_training("muon_te", TRANSFORMER_ENGINE | _MUON),
        small_training("mup_te", TRANSFORMER_ENGINE | _MUP),
        small_training("guard", TRANSFORMER_ENGINE | _GUARD),
    ),
)

# Bounds as of trainings.AGREEMENTS in bf16; a token whose expert changes by rounding moves the loss further.
AGREEMENTS = (
    Agreement("Mamba-2's kernels against PyTorch, bf16", "mamba2", "mamba2_torch", 0.05),
    Agreement("Mamba-2, Transformer Engine's modules against local ones", "mamba2_te", "mamba2", 0.05),
    Agreement("experts, Transformer Engine's grouped GEMMs against local modules", "experts_te", "experts", 0.1),
    Agreement("prediction, Transformer Engine's modules against local ones", "prediction_te", "prediction", 0.05),
    Agreement("Muon, Transformer Engine's modules against local ones", "muon_te", "muon", 0.05),
    Agreement("Muon, stopped and resumed, deterministic: bit for bit", "resumed_muon", "muon", 0.0),
    Agreement("muP, Transformer Engine's modules against local ones", "mup_te", "mup", 0.05),
    Agreement("the spike guard, without spikes", "guard", "plain", 0.05),
    Agreement("one CUDA graph a step, stopped and resumed", "resumed_graph", "plain", 0.05),
)
