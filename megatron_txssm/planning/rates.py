"""How much of its data sheet a GPU reaches, each figure with its source; docs/planner.md has the same table."""

import math
from dataclasses import dataclass

from megatron_txssm.architecture.gpus import Gpu
from megatron_txssm.planning.corrections import UNCHANGED, Corrections, Link


@dataclass(frozen=True)
class Rate:
    """A figure of the step time's model: its meaning, its value, and where it is from."""

    meaning: str
    value: float
    source: str


_NOON = "2026-11-27-h100-noon.json"
GEMM = Rate("large bf16 GEMMs, of the peak", 0.74, "fitted to the five steps below; alone about 0.85")
GEMM_FP8 = Rate(
    "large FP8 GEMMs with their casts, of the peak", 0.52, "from 46 of 312 ms saved, 2026-11-26-h100-afternoon.json"
)
GEMM_BYTES = Rate(
    "share of a GEMM's operands' time that its products do not hide",
    0.4,
    f"by hand, to a dozen of the GEMMs of {_NOON}",
)
MEMORY = Rate("memory-bound operators, of the bandwidth", 0.88, f"copies and sums of 128 MiB and more, {_NOON}")
ADAM = Rate("the fused Adam, of the bandwidth", 0.76, f"2.54 of 3.35 TB/s, {_NOON}")
ATTENTION = Rate("flash attention, of the peak", 0.44, "65,536 tokens, heads of 64 channels, 2026-11-27-h100.json")
ATTENTION_WIDE = Rate(
    "flash attention with heads of 128 channels and more", 0.6, "assumed; not measured by this project"
)
SCAN_FORWARD = Rate("bytes that the scan seems to move per token and channel", 38, f"65,536 tokens, {_NOON}")
SCAN_BACKWARD = Rate("likewise, backward", 154, f"65,536 tokens, {_NOON}")
LAUNCH = Rate("seconds to start and end one GEMM", 2.5e-6, f"by hand, likewise, {_NOON}")
SMALL = Rate("seconds of a layer's small kernels, a pass", 22e-6, "fitted to the five steps below")
LINK = Rate("collectives, of a link's bandwidth", 0.8, "assumed; not measured by this project")
LATENCY = Rate("seconds of a collective within a node", 12e-6, "assumed; not measured by this project")
LATENCY_NETWORK = Rate(
    "seconds of a collective between nodes, for each doubling of them", 30e-6, "assumed; not measured by this project"
)
OVERLAP = Rate("share of the passes that can hide data parallelism's collectives", 0.9, "assumed")
TENSOR_OVERLAP = Rate("share of tensor parallelism's that tp_comm_overlap hides", 0.5, "assumed")
RATES = (
    GEMM,
    GEMM_FP8,
    GEMM_BYTES,
    MEMORY,
    ADAM,
    ATTENTION,
    ATTENTION_WIDE,
    SCAN_FORWARD,
    SCAN_BACKWARD,
    LAUNCH,
    SMALL,
    LINK,
    LATENCY,
    LATENCY_NETWORK,
    OVERLAP,
    TENSOR_OVERLAP,
)


# Compared by identity, as Share is.
@dataclass(frozen=True, eq=False)
class Cluster:
    """GPUs in nodes, and what they were measured to differ by from these rates."""

    gpu: Gpu
    per_node: int
    corrections: Corrections = UNCHANGED

    def gemm_seconds(self, tokens: int, outputs: int, inputs: int, *, fp8: bool = False) -> float:
        """One product [tokens, inputs] · [inputs, outputs], or either of its gradients."""
        flops = 2.0 * tokens * outputs * inputs
        peak = self.gpu.bf16_flops * GEMM.value
        if fp8 and self.gpu.fp8_flops is not None:
            peak = self.gpu.fp8_flops * GEMM_FP8.value
        operands = 2.0 * (tokens * outputs + tokens * inputs + outputs * inputs)
        return flops / peak + GEMM_BYTES.value * self.memory_seconds(operands) + LAUNCH.value

    def memory_seconds(self, moved: float) -> float:
        """Bytes read and written."""
        return moved / (self.gpu.memory_bandwidth * MEMORY.value)

    def adam_seconds(self, moved: float) -> float:
        return moved / (self.gpu.memory_bandwidth * ADAM.value)

    def attention_seconds(self, flops: float, channels: int) -> float:
        """Products of flash attention with heads of so many channels."""
        rate = ATTENTION_WIDE if channels >= 128 else ATTENTION
        return flops / (self.gpu.bf16_flops * rate.value)

    def collective_seconds(self, collective: str, size: float, members: int, stride: int) -> float:
        """One call among `members` ranks, `stride` apart; size: bytes of the largest tensor."""
        if members == 1 or size == 0:
            return 0.0
        local = max(1, min(members, self.per_node // stride))
        inside = local == members
        factor, assumed = sent_bytes(collective, members), self.gpu.node_bandwidth * LINK.value
        if inside:
            link = self.corrections.links.get(collective, Link(LATENCY.value, assumed))
            return factor * size / link.bandwidth + link.latency
        # Each of the group's GPUs of a node has its own adapter; a ring between nodes uses them all.
        bandwidth = min(assumed, self.gpu.network_bandwidth * local * LINK.value)
        if collective == "all_to_all":
            # What leaves the node goes through this GPU's own adapter.
            bandwidth, factor = self.gpu.network_bandwidth * LINK.value, (members - local) / members
        return factor * size / bandwidth + LATENCY_NETWORK.value * math.log2(members / local)


def sent_bytes(collective: str, members: int) -> float:
    """What each of `members` ranks in a ring sends, relative to the largest tensor."""
    share = (members - 1) / members
    return {"all_reduce": 2 * share, "send_recv": 1.0, "broadcast": 1.0}.get(collective, share)


def group_shape(
    group: str, tensor: int, context: int, data: int = 1, expert: int = 1, pipeline: int = 1
) -> tuple[int, int]:
    """(members, stride) of a process group in Megatron's order of ranks: tensor, context, data, pipeline."""
    stage = tensor * context * data
    if group == "tp":
        return tensor, 1
    if group == "cp":
        return context, tensor
    if group in ("dp", "dp_cp"):
        return data * context, tensor
    if group == "ep":
        return expert, tensor
    if group == "expert_dp":
        return data * context // expert, tensor * expert
    return (pipeline, stage) if group == "pp" else (min(pipeline, 2), stage)
