"""The closed vocabularies of recipes, Megatron's arguments and the model, each named once."""

from typing import Literal, get_args

# Of a state-space layer: "rope" rotates C and B (TransXSSM); "conv1d_d" is Mamba-2's short causal convolution on x, B
# and C, and the skip D; "a_t" is the bare recurrence.
PositionEncoding = Literal["rope", "conv1d_d", "a_t"]
POSITION_ENCODINGS: tuple[PositionEncoding, ...] = get_args(PositionEncoding)
AttentionPositionEncoding = Literal["rope", "none"]

# What computes the scan; "auto" is mamba-ssm's Triton kernels if they can run, otherwise PyTorch.
SsdBackend = Literal["auto", "torch", "triton"]
SSD_BACKENDS: tuple[SsdBackend, ...] = get_args(SsdBackend)

# What context-parallel ranks exchange in a state-space layer: the states between pieces of the sequence, or all
# activations, so that each rank scans a share of the heads.
ContextParallelMethod = Literal["state_passing", "all_to_all"]
CONTEXT_PARALLEL_METHODS: tuple[ContextParallelMethod, ...] = get_args(ContextParallelMethod)

# What the layers leave out, against the paper's: their residual connections, or the norms before them.
Ablation = Literal["no_residual", "no_norm"]
ABLATIONS: tuple[Ablation, ...] = get_args(Ablation)

RopeScaling = Literal["none", "linear"]
RotaryTablePrecision = Literal["fp32", "fp64"]
Recompute = Literal["none", "selective", "full"]
Precision = Literal["fp32", "bf16"]
TransformerImpl = Literal["local", "transformer_engine"]
Fp8Format = Literal["hybrid", "e4m3"]
Fp8Recipe = Literal["delayed", "tensorwise", "blockwise", "mxfp8"]
DecayStyle = Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"]
OptimizerName = Literal["adam", "muon"]
MuonScaleMode = Literal["spectral", "unit_rms_norm", "shape_scaling"]
MuonCoefficientType = Literal["simple", "quintic", "polar_express", "cans", "aol", "deepseekv4"]
MuonTpMode = Literal["duplicated", "distributed"]
MuonMatmulPrecision = Literal["medium", "high"]
WsdDecayShape = Literal["exponential", "linear", "cosine", "minus_sqrt"]
# If a checkpoint was trained under another schedule: refuse to resume, or continue under the recipe's.
ScheduleAtResume = Literal["unchanged", "recipe"]

# Megatron's tokenizer classes: those that a corpus may have, and the one that reads no text.
CorpusTokenizerType = Literal["HuggingFaceTokenizer", "SentencePieceTokenizer"]
TokenizerType = Literal["HuggingFaceTokenizer", "SentencePieceTokenizer", "NullTokenizer"]
# "reference" is tokenizers or sentencepiece; "auto" is gigatoken where it can load the tokenizer.
EncoderChoice = Literal["auto", "reference"]
# What happens to bytes that are not UTF-8, as bytes.decode names it.
DecodeErrors = Literal["strict", "ignore", "replace"]

# What happens at a spike of the loss or of the gradient norm.
SpikeAction = Literal["skip", "rewind"]

# How much of a checkpoint is checked before a load: all files, some, sizes only.
Verify = Literal[True, "sample", False]
