"""The recipe: every field with its type, default, unit, and the Megatron arguments that it sets.

`txssm recipes --fields` prints this table. A field without a default must be stated by the recipe or one it extends.
"""

# setting() returns a dataclasses.field.
# ruff: noqa: RUF009

from dataclasses import dataclass

from megatron_txssm.architecture.layer_pattern import check_pattern
from megatron_txssm.choices import (
    Ablation,
    AttentionPositionEncoding,
    ContextParallelMethod,
    DecayStyle,
    Fp8Format,
    Fp8Recipe,
    MuonCoefficientType,
    MuonMatmulPrecision,
    MuonScaleMode,
    MuonTpMode,
    OptimizerName,
    PositionEncoding,
    Precision,
    Recompute,
    RopeScaling,
    RotaryTablePrecision,
    ScheduleAtResume,
    SpikeAction,
    SsdBackend,
    TokenizerType,
    TransformerImpl,
    Verify,
    WsdDecayShape,
)
from megatron_txssm.recipe.settings.layers import Alternatives
from megatron_txssm.recipe.settings.setting import Blend, Counts, Stages, Steps, Weights, Words, setting, table

# These define TransXSSM and its baselines (arXiv:2506.09507, section 3 and appendix B.1), and make checkpoints loadable
# at every parallel layout. Recipes cannot change them.
FIXED_ARGUMENTS: tuple[tuple[str, ...], ...] = (
    ("--spec", "megatron_txssm.model.layer_specs", "transxssm_stack_spec"),
    ("--normalization", "RMSNorm"),
    ("--swiglu",),
    ("--disable-bias-linear",),
    ("--attention-dropout", "0"),
    ("--hidden-dropout", "0"),
    ("--ckpt-format", "torch_dist"),
    ("--dist-ckpt-optim-fully-reshardable",),
    # SIGTERM, which clusters send: finish the step, save, stop.
    ("--exit-signal-handler",),
)


@dataclass(frozen=True, kw_only=True)
class Model:
    """Architecture."""

    layer_pattern: str = setting(
        "layers: M state-space, * attention, - FFN, E experts; | between pipeline stages; / before the layers of each "
        "depth of multi-token prediction; spaces are ignored",
        "--hybrid-layer-pattern",
        owns=(
            "--num-layers",
            "--hybrid-override-pattern",
            "--mtp-num-layers",
            "--mtp-hybrid-override-pattern",
        ),
        check=check_pattern,
    )
    mtp_loss_scaling_factor: float = setting(
        "weight of the loss of multi-token prediction, the mean over its depths (arXiv:2412.19437)",
        "--mtp-loss-scaling-factor",
        default=0.1,
        at_least=0,
    )
    hidden_size: int = setting("channels of the residual stream (d_model)", "--hidden-size", at_least=1)
    ffn_hidden_size: int = setting("inner channels of the SwiGLU FFN", "--ffn-hidden-size", at_least=1)
    num_experts: int | None = setting(
        "experts of a layer of experts, each a SwiGLU FFN; null: the pattern has no E",
        "--num-experts",
        default=None,
        at_least=2,
    )
    # With one expert per token, its probability after the softmax over the chosen is always 1, without a gradient.
    moe_router_topk: int = setting(
        "experts that compute each token, weighted by the softmax of their logits",
        "--moe-router-topk",
        default=2,
        at_least=2,
    )
    moe_ffn_hidden_size: int | None = setting(
        "inner channels of each expert; null: ffn_hidden_size", "--moe-ffn-hidden-size", default=None, at_least=1
    )
    moe_shared_expert_intermediate_size: int | None = setting(
        "inner channels of an expert that computes every token; null: none",
        "--moe-shared-expert-intermediate-size",
        default=None,
        at_least=1,
    )
    moe_aux_loss_coeff: float = setting(
        "weight of the loss that balances the experts' load (arXiv:2101.03961)",
        "--moe-aux-loss-coeff",
        default=0.01,
        at_least=0,
    )
    num_attention_heads: int = setting("heads of an attention layer", "--num-attention-heads", at_least=1)
    num_query_groups: int | None = setting(
        "key/value heads of an attention layer; null: as many as heads",
        "--group-query-attention",
        "--num-query-groups",
        default=None,
        at_least=1,
    )
    kv_channels: int | None = setting(
        "channels per attention head; null: hidden_size / num_attention_heads",
        "--kv-channels",
        default=None,
        at_least=1,
    )
    attention_position_encoding: AttentionPositionEncoding = setting(
        "position encoding of attention layers",
        "--position-embedding-type",
        default="rope",
        owns=("--use-rotary-position-embeddings", "--no-position-embedding", "--no-rope-freq", "--rope-type"),
    )
    position_encoding: PositionEncoding = setting(
        "of state-space layers: rotation (rope), Mamba-2's convolution and D (conv1d_d), or only the decay (a_t)",
        "--position-encoding",
        default="rope",
    )
    state_size: int = setting(
        "recurrent state per head channel (d_state)", "--mamba-state-dim", default=128, at_least=1
    )
    state_num_heads: int | None = setting(
        "heads of a state-space layer; null: hidden_size / state_head_dim",
        "--mamba-num-heads",
        default=None,
        at_least=1,
    )
    state_head_dim: int = setting("channels per state-space head", "--mamba-head-dim", default=64, at_least=1)
    state_num_groups: int = setting(
        "groups of state-space heads that share B and C; a multiple of the tensor-parallel size",
        "--mamba-num-groups",
        default=4,
        at_least=1,
    )
    state_gated: bool = setting("Mamba-2's output gate and the grouped norm", "--state-space-gated", default=False)
    state_dt_bias: bool = setting(
        "a learned bias under the softplus of dt, as in Mamba-2",
        "--state-space-no-dt-bias",
        default=True,
    )
    chunk_size: int = setting("tokens per chunk of the state-space scan", "--ssd-chunk-size", default=256, at_least=1)
    ssd_backend: SsdBackend = setting(
        "what computes the scan: PyTorch, mamba-ssm's Triton kernels, or the kernels where they can run (auto)",
        "--ssd-backend",
        default="auto",
    )
    length_scaling_base: int | None = setting(
        "tokens beyond which C is scaled by log_base(position) (appendix A); null: never",
        "--length-scaling-base",
        default=None,
        at_least=2,
    )
    rotary_base: int = setting("base of the rotary frequencies", "--rotary-base", default=10_000, at_least=2)
    rope_scaling: RopeScaling = setting(
        "scaling of positions: linear divides them by rotary_interpolation_factor",
        default="none",
        refused={
            "dynamic": "changes the frequencies within a sequence, which contradicts a state accumulated under the old "
            "ones; use linear with rotary_interpolation_factor"
        },
        owns=("--use-rope-scaling", "--rope-scaling-factor", "--rotary-scaling-factor"),
    )
    rotary_interpolation_factor: int | None = setting(
        "divisor of positions under rope_scaling: linear",
        "--rotary-seq-len-interpolation-factor",
        default=None,
        at_least=1,
    )
    rotary_table_precision: RotaryTablePrecision = setting(
        "precision in which rotary angles are computed",
        "--rotary-table-precision",
        default="fp32",
    )
    tie_embeddings: bool = setting(
        "the LM head is the embedding's transpose",
        "--untie-embeddings-and-output-weights",
        default=True,
    )
    norm_epsilon: float = setting("added under RMSNorm's root", "--norm-epsilon", default=1e-5, above=0)
    ablation: Ablation | None = setting(
        "for `txssm study stability`: layers without residual connections, or without the norms before them; such "
        "models train and are evaluated, but have no Hugging Face format; null: with both",
        "--ablation",
        default=None,
    )
    init_method_std: float = setting(
        "standard deviation of initial weights", "--init-method-std", default=0.02, above=0
    )
    mup_base_hidden_size: int | None = setting(
        "muP: hidden_size of the narrower model that learning rate and init_method_std were chosen for; null: no muP",
        "--use-mup",
        "--mup-base-hidden-size",
        default=None,
        at_least=1,
        owns=("--mup-base-head-dim", "--mup-attn-scale-power"),
    )


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """Layout over processes; the rest of the world size is data parallelism."""

    tensor_model_parallel_size: int = setting(
        "processes that share each layer",
        "--tensor-model-parallel-size",
        default=1,
        at_least=1,
        owns=("--model-parallel-size",),
    )
    pipeline_model_parallel_size: int = setting(
        "processes that share the sequence of layers", "--pipeline-model-parallel-size", default=1, at_least=1
    )
    virtual_pipeline_stages: int | None = setting(
        "stages that each pipeline process holds (interleaved schedule); null: one",
        "--num-virtual-stages-per-pipeline-rank",
        default=None,
        at_least=1,
        owns=("--num-layers-per-virtual-pipeline-stage", "--no-overlap-p2p-communication"),
    )
    context_parallel_size: int = setting(
        "processes that share each sequence", "--context-parallel-size", default=1, at_least=1
    )
    state_context_parallel: ContextParallelMethod = setting(
        "what their state-space layers exchange: states between pieces of the sequence, or all activations",
        "--state-context-parallel",
        default="state_passing",
    )
    expert_model_parallel_size: int = setting(
        "data- and context-parallel processes that share the experts",
        "--expert-model-parallel-size",
        default=1,
        at_least=1,
    )
    sequence_parallel: bool = setting(
        "split norms and residuals over the tensor-parallel processes; no effect with one process",
        "--sequence-parallel",
        default=False,
    )
    use_distributed_optimizer: bool = setting(
        "shard the optimizer's state over data parallelism (ZeRO-1)", "--use-distributed-optimizer", default=False
    )
    recompute: Recompute = setting(
        "activations recomputed in the backward pass",
        "--recompute-granularity",
        "--recompute-method",
        "--recompute-num-layers",
        default="none",
        owns=("--recompute-activations", "--checkpoint-activations"),
    )


@dataclass(frozen=True, kw_only=True)
class Training:
    """Batches, length and precision."""

    seq_length: int = setting("tokens per sample", "--seq-length", "--max-position-embeddings", at_least=1)
    micro_batch_size: int = setting("samples per forward pass and process", "--micro-batch-size", default=1, at_least=1)
    global_batch_tokens: int = setting(
        "tokens per optimizer step, a multiple of seq_length",
        "--global-batch-size",
        at_least=1,
        owns=("--batch-size",),
    )
    train_tokens: int | None = setting(
        "tokens to train on, rounded up to whole steps; or state train_iters",
        "--train-iters",
        default=None,
        at_least=1,
        owns=("--train-samples",),
    )
    train_iters: int | None = setting(
        "optimizer steps; or state train_tokens", "--train-iters", default=None, at_least=1
    )
    precision: Precision = setting(
        "of weights and activations; the optimizer keeps fp32",
        "--bf16",
        default="bf16",
        owns=("--fp16",),
    )
    mask_end_of_document: bool = setting(
        "no loss where the model reads the end of a document; all other tokens of a step have equal weight",
        "--eod-mask-loss",
        # Otherwise Megatron averages per rank and micro-batch, however many tokens the mask leaves there.
        "--calculate-per-token-loss",
        default=False,
    )
    seed: int = setting("of initial weights and data order", "--seed", default=1234, at_least=0)
    transformer_impl: TransformerImpl = setting(
        "local: Megatron's own modules; transformer_engine: NVIDIA's, GPU only",
        "--transformer-impl",
        default="transformer_engine",
    )
    fp8: Fp8Format | None = setting(
        "FP8 in the layers' GEMMs: e4m3, or hybrid (e5m2 for gradients); null: none. local: emulated",
        "--fp8-format",
        default=None,
    )
    fp8_recipe: Fp8Recipe = setting(
        "what FP8 is scaled by: the maximum of earlier steps, of the tensor, of each block, of each block of 32",
        "--fp8-recipe",
        default="delayed",
    )
    fp8_attention: bool = setting(
        "FP8 in core attention, too; supported GPUs: docs/fp8.md", "--fp8-dot-product-attention", default=False
    )
    first_last_layers_bf16: int = setting(
        "number of first layers, and of last layers, that stay in bf16 under FP8",
        "--first-last-layers-bf16",
        "--num-layers-at-start-in-bf16",
        "--num-layers-at-end-in-bf16",
        default=0,
        at_least=0,
    )


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW, or Muon for matrices and AdamW for all else; their schedule."""

    name: OptimizerName = setting(
        "of matrices: AdamW, or Muon; vectors, embeddings and LM head always have AdamW",
        "--optimizer",
        default="adam",
        refused={"adamw": "is called adam; its weight decay is decoupled"},
    )
    learning_rate: float = setting("peak", "--lr", above=0)
    min_learning_rate_ratio: float = setting(
        "final learning rate, as a fraction of the peak",
        "--min-lr",
        default=0.1,
        at_least=0,
        at_most=1,
    )
    adam_beta1: float = setting("decay of the gradient's mean", "--adam-beta1", default=0.9, at_least=0, below=1)
    adam_beta2: float = setting("decay of the gradient's square", "--adam-beta2", default=0.999, at_least=0, below=1)
    adam_eps: float = setting("added to the root of the square", "--adam-eps", default=1e-8, above=0)
    muon_momentum: float = setting(
        "of Muon: decay of the gradient's mean", "--muon-momentum", default=0.95, at_least=0, below=1
    )
    muon_nesterov: bool = setting(
        "of Muon: orthogonalize the mean one step ahead (Nesterov)", "--muon-nesterov", default=True
    )
    muon_num_ns_steps: int = setting(
        "of Muon: Newton-Schulz steps of the orthogonalization", "--muon-num-ns-steps", default=5, at_least=1
    )
    muon_coefficient_type: MuonCoefficientType = setting(
        "of Muon: coefficients of the steps, as emerging_optimizers names them; they are made for 1, 5, 8, 5, 4 and 10 "
        "steps",
        "--muon-coefficient-type",
        default="quintic",
    )
    muon_scale_mode: MuonScaleMode = setting(
        "of Muon: an update is multiplied by √max(rows, columns); by √(rows/columns); or by that, but at least 1",
        "--muon-scale-mode",
        default="spectral",
    )
    muon_extra_scale_factor: float = setting(
        "of Muon: also multiplies its updates; with spectral, 0.2 makes them as large as AdamW's (arXiv:2502.16982)",
        "--muon-extra-scale-factor",
        default=0.2,
        above=0,
    )
    muon_fp32_matmul_prec: MuonMatmulPrecision = setting(
        "of Muon: Newton-Schulz in bf16 (medium), or in TF32 or fp32 (high)",
        "--muon-fp32-matmul-prec",
        default="medium",
    )
    muon_tp_mode: MuonTpMode = setting(
        "of Muon: each tensor-parallel process orthogonalizes whole matrices, or they share the products",
        "--muon-tp-mode",
        default="duplicated",
        refused={
            "blockwise": "orthogonalizes each tensor-parallel process's rows apart, so that the trained model depends "
            "on the layout; use duplicated or distributed"
        },
    )
    weight_decay: float = setting("decoupled; none on norms", "--weight-decay", default=0.01, at_least=0)
    clip_grad: float = setting("maximum global gradient norm; 0: no clipping", "--clip-grad", default=1.0, at_least=0)
    warmup_fraction: float = setting(
        "fraction of the steps with a linearly rising learning rate",
        "--lr-warmup-fraction",
        default=0.1,
        at_least=0,
        below=1,
        owns=("--lr-warmup-iters", "--lr-warmup-samples"),
    )
    decay_style: DecayStyle = setting(
        "shape of the learning rate after the warm-up",
        "--lr-decay-style",
        default="cosine",
    )
    wsd_decay_fraction: float | None = setting(
        "final fraction of the steps, in which WSD lowers the learning rate; required for WSD, not allowed otherwise",
        "--lr-wsd-decay-iters",
        default=None,
        above=0,
        below=1,
    )
    wsd_decay_shape: WsdDecayShape = setting(
        "how WSD lowers the learning rate",
        "--lr-wsd-decay-style",
        default="exponential",
    )
    schedule_at_resume: ScheduleAtResume = setting(
        "recipe: a resume continues under this recipe's length, batch, learning rate, decay and Adam settings; "
        "unchanged: it is refused if the checkpoint was trained under others",
        "--override-opt-param-scheduler",
        default="unchanged",
        owns=("--use-checkpoint-opt-param-scheduler",),
    )


@dataclass(frozen=True, kw_only=True)
class Data:
    """The corpus, or your own token files (.bin/.idx, named by their common prefix), and the tokenizer."""

    corpus: str | None = setting(
        "directory made by `txssm data shard`: training and validation data, and their tokenizer",
        "--train-data-path",
        "--valid-data-path",
        default=None,
        path=True,
    )
    weights: Weights | None = setting(
        "subset of the corpus -> its share of the tokens, in any unit; null: in proportion to the subsets' tokens",
        default=None,
    )
    stages: Stages | None = setting(
        "weights that change: consecutive {tokens, weights}, rounded to whole steps, the last for the rest",
        "--blend-stages",
        default=None,
    )
    train: Blend | None = setting(
        "training data instead of a corpus: a prefix, or a list of [weight, prefix]",
        "--train-data-path",
        default=None,
        path=True,
    )
    validation: Blend | None = setting("validation data, likewise", "--valid-data-path", default=None, path=True)
    blend: Blend | None = setting(
        "one mixture for training and validation, instead of the two above",
        "--data-path",
        default=None,
        path=True,
    )
    split: str | None = setting("shares of train, validation and test in blend: 99,1,0", "--split", default=None)
    recall_pairs: Counts | None = setting(
        "made-up samples instead, of multi-query associative recall (arXiv:2312.04927): their numbers of key-value "
        "pairs, in turn; loss and accuracy are of the answers",
        "--recall-pairs",
        default=None,
    )
    tokenizer_type: TokenizerType | None = setting(
        "Megatron's tokenizer class; null: the corpus's, otherwise HuggingFaceTokenizer, for made-up data "
        "NullTokenizer",
        "--tokenizer-type",
        default=None,
    )
    tokenizer_model: str | None = setting(
        "name on the Hugging Face hub, or path; null: the corpus's",
        "--tokenizer-model",
        default=None,
        path=True,
    )
    vocab_size: int = setting(
        "the tokenizer's tokens, before padding; null, or not stated: from the corpus's tokenizer",
        "--vocab-size",
        "--padded-vocab-size",
        at_least=1,
        found=True,
        owns=("--no-pad-vocab-size", "--disable-pad-vocab-size"),
    )
    make_vocab_size_divisible_by: int = setting(
        "the embedding's rows are padded to a multiple of this, independent of the tensor-parallel size",
        "--make-vocab-size-divisible-by",
        default=128,
        at_least=1,
    )
    isolate_documents: bool = setting(
        "attention and state do not cross document ends inside a sample",
        "--isolate-documents",
        default=False,
        owns=("--reset-position-ids", "--reset-attention-mask", "--dataloader-inter-document-masking"),
    )
    skip_steps: Steps | None = setting(
        "steps whose batches are read, but not trained on: numbers from 1, and ranges such as 1200-1210",
        default=None,
        owns=("--iterations-to-skip", "--result-rejected-tracker-filename"),
    )
    cache_path: str | None = setting(
        "folder of Megatron's shuffled indices; null: with the data, or in the run directory if that is read-only",
        "--data-cache-path",
        default=None,
        path=True,
    )


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Saving, and where to start from. A run resumes from its own newest checkpoint."""

    directory: str | None = setting(
        "null: checkpoints/ in the run directory",
        "--save",
        "--load",
        default=None,
        path=True,
    )
    save_interval: int | None = setting(
        "steps between checkpoints; null: neither save nor resume",
        "--save-interval",
        default=None,
        at_least=1,
        owns=("--persistent-save-interval",),
    )
    keep_last: int | None = setting(
        "how many of the newest checkpoints are kept: older ones are removed after a save; null: all",
        default=None,
        at_least=1,
        owns=("--save-retain-interval",),
    )
    keep_every: int | None = setting(
        "steps between older checkpoints that are kept as well; needs keep_last; null: none",
        default=None,
        at_least=1,
    )
    load_from: str | None = setting(
        "checkpoint directory whose weights a fresh run starts from, at step 0",
        "--pretrained-checkpoint",
        default=None,
        path=True,
    )
    branch_from: str | None = setting(
        "a step of another run (RUN/checkpoints/iter_0000100) that a fresh run continues, with optimizer and place in "
        "the data",
        "--pretrained-checkpoint",
        default=None,
        path=True,
    )
    verify: Verify = setting(
        "files checked against their checksums before a load: true: all, sample: all sizes, some contents; "
        "false: sizes only, and saves have no checksums",
        default=True,
    )


@dataclass(frozen=True, kw_only=True)
class Guard:
    """Spikes: steps whose loss or gradient norm is far above that of the steps before."""

    spike_action: SpikeAction | None = setting(
        "at a spike, skip the step's update, or rewind to a checkpoint and jump over the steps before the spike, too; "
        "null: train on",
        default=None,
    )
    spike_z_score: float = setting(
        "a spike is this many standard deviations above the mean of the window", default=6.0, above=0
    )
    spike_window: int = setting(
        "last trained steps that mean and deviation are taken over; the first so many are not judged",
        default=128,
        at_least=8,
    )
    rewind_steps: int = setting("steps before a spike that a rewind jumps over together with it", default=8, at_least=1)
    max_spikes: int = setting(
        "spikes within spike_window steps that are acted on; one more ends the run as diverged", default=8, at_least=1
    )


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scores on tasks of EleutherAI's lm-evaluation-harness, at validations and after the training."""

    tasks: Words | None = setting(
        "suites, tasks, groups and tags of lm_eval, and YAML files of tasks, as of `txssm eval harness`; null: none",
        default=None,
        path=True,
    )
    interval: int | None = setting(
        "steps between scores in the training, a multiple of logging.eval_interval; null: none there, only by "
        "`txssm submit --chain` and `txssm eval harness RUN`",
        default=None,
        at_least=1,
    )
    data: str | None = setting(
        "folder with data sets, which `txssm eval fetch` fills; null: as lm_eval finds them", default=None, path=True
    )
    num_fewshot: int | None = setting(
        "examples in each prompt; null: as the suite states, otherwise the task", default=None, at_least=0
    )
    limit: int | None = setting("only the first so many questions of each task; null: all", default=None, at_least=1)
    batch_size: int = setting("texts in a batch, for each data-parallel process", default=8, at_least=1)


@dataclass(frozen=True, kw_only=True)
class Logging:
    """Reports and their intervals."""

    log_interval: int = setting("steps between lines", "--log-interval", default=10, at_least=1)
    eval_interval: int | None = setting(
        "steps between validations; null: only at the end",
        "--eval-interval",
        default=None,
        at_least=1,
    )
    eval_iters: int | None = setting(
        "global batches per validation, the same each time; 0: none; null: every set in full, with a loss for each",
        "--eval-iters",
        default=10,
        at_least=0,
        owns=("--full-validation", "--multiple-validation-sets", "--validation-set-names"),
    )
    slow_throughput_fraction: float | None = setting(
        "a run is reported as slow below this fraction of its own median throughput; null: never",
        default=0.7,
        above=0,
        below=1,
    )
    tensorboard: bool = setting(
        "write TensorBoard files to tensorboard/ in the run directory",
        "--tensorboard-dir",
        default=True,
    )
    wandb_project: str | None = setting(
        "Weights & Biases project; a resumed run continues the same W&B run; null: no W&B",
        default=None,
        owns=("--wandb-project", "--wandb-save-dir"),
    )
    wandb_name: str | None = setting(
        "the run's name in W&B and MLflow; null: the recipe's name",
        default=None,
        owns=("--wandb-exp-name",),
    )
    mlflow_experiment: str | None = setting(
        "MLflow experiment; a resumed run continues the same MLflow run; null: no MLflow",
        default=None,
    )
    mlflow_tracking_uri: str | None = setting(
        "MLflow's server or database; null: $MLFLOW_TRACKING_URI, otherwise mlflow/mlflow.db in the run directory",
        default=None,
    )


SECTIONS: dict[str, type] = {
    "model": Model,
    "parallel": Parallel,
    "training": Training,
    "optimizer": Optimizer,
    "data": Data,
    "checkpoint": Checkpoint,
    "guard": Guard,
    "evaluation": Evaluation,
    "logging": Logging,
}

FIELDS = {name: table(section) for name, section in SECTIONS.items()}

ALTERNATIVES: Alternatives = (
    (("training.train_tokens",), ("training.train_iters",)),
    (
        ("data.corpus", "data.weights", "data.stages"),
        ("data.train", "data.validation"),
        ("data.blend", "data.split"),
        ("data.recall_pairs",),
        ("megatron.mock_data",),
    ),
    (("data.weights",), ("data.stages",)),
    (("checkpoint.load_from",), ("checkpoint.branch_from",)),
)
