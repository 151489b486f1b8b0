"""The arguments that TransXSSM adds to Megatron's own, and the state-space sizes read from both."""

from argparse import ArgumentParser, Namespace
from typing import Any

from megatron_txssm.architecture.state_space_config import StateSpaceConfig
from megatron_txssm.choices import ABLATIONS, CONTEXT_PARALLEL_METHODS, POSITION_ENCODINGS, SSD_BACKENDS

# Used where Megatron was started without our arguments (stock pretrain_hybrid.py --spec).
DEFAULTS: dict[str, Any] = {
    "position_encoding": "rope",
    "state_space_gated": False,
    "state_space_no_dt_bias": False,
    "ssd_chunk_size": 256,
    "ssd_backend": "auto",
    "length_scaling_base": None,
    "rotary_table_precision": "fp32",
    "state_context_parallel": "state_passing",
    "isolate_documents": False,
    "ablation": None,
}


def add_transxssm_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add our argument group to Megatron's parser (its `extra_args_provider`)."""
    group = parser.add_argument_group(title="TransXSSM")
    group.add_argument("--position-encoding", choices=POSITION_ENCODINGS, help="of the state-space layers")
    group.add_argument("--state-space-gated", action="store_true", help="Mamba-2's output gate and grouped RMSNorm")
    group.add_argument("--state-space-no-dt-bias", action="store_true", help="no learned bias under dt's softplus")
    group.add_argument("--ssd-chunk-size", type=int, help="tokens per chunk of the state-space scan")
    group.add_argument("--ssd-backend", choices=SSD_BACKENDS, help="what computes the state-space scan")
    group.add_argument("--length-scaling-base", type=int, help="scale C by log_base(position) beyond this many tokens")
    group.add_argument("--rotary-table-precision", choices=("fp32", "fp64"), help="precision of the angles")
    group.add_argument(
        "--state-context-parallel", choices=CONTEXT_PARALLEL_METHODS, help="what state-space layers exchange"
    )
    group.add_argument("--ablation", choices=ABLATIONS, help="layers without residual connections, or without norms")
    group.add_argument("--isolate-documents", action="store_true", help="neither attention nor state crosses documents")
    # A field of Megatron's TransformerConfig, which Megatron fills from arguments of the same name.
    group.add_argument("--fp8-dot-product-attention", action="store_true", help="FP8 in core attention (needs FP8)")
    group.add_argument("--blend-stages", help="JSON of a training blend that changes (recipes: data.stages)")
    group.add_argument("--recall-pairs", type=int, nargs="+", help="train on associative recall (data.recall_pairs)")
    parser.set_defaults(**DEFAULTS)
    return parser


def state_space_config(args: Namespace) -> StateSpaceConfig:
    """The mixer's sizes from Megatron's parsed arguments (`--mamba-*` are Megatron's own) and ours."""
    ours = {name: getattr(args, name, default) for name, default in DEFAULTS.items()}
    num_heads = args.mamba_num_heads or args.hidden_size // args.mamba_head_dim
    return StateSpaceConfig(
        hidden_size=args.hidden_size,
        num_heads=num_heads,
        head_dim=args.mamba_head_dim,
        state_size=args.mamba_state_dim,
        num_groups=args.mamba_num_groups,
        position_encoding=ours["position_encoding"],
        gated=ours["state_space_gated"],
        dt_bias=not ours["state_space_no_dt_bias"],
        chunk_size=ours["ssd_chunk_size"],
        ssd_backend=ours["ssd_backend"],
        length_scaling_base=ours["length_scaling_base"],
        context_parallel_method=ours["state_context_parallel"],
    )
