"""The trainings of `txssm check gpu`: small runs that are compared in pairs; speed.py has the timed ones."""

from dataclasses import dataclass, field
from pathlib import Path

from megatron_txssm.architecture.layer_pattern import MODULE
from megatron_txssm.check.tokens import write_tokens

STEPS, STOP = 10, 5
SMALL_VOCABULARY = 1024

TRANSFORMER_ENGINE = "training.transformer_impl=transformer_engine"
FP8 = ("training.fp8=hybrid", "training.fp8_recipe=delayed", "megatron.fp8_amax_history_len=16")
DETERMINISTIC = "megatron.deterministic_mode=true"


@dataclass(frozen=True)
class Training:
    """One training on one device, by Megatron's own loop, in its own process and folder."""

    name: str
    recipe: str
    settings: tuple[str, ...]
    on_cpu: bool = False
    # Name of the training whose run it continues.
    continues: str | None = None
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def needs_transformer_engine(self) -> bool:
        return TRANSFORMER_ENGINE in self.settings

    def overrides(self, folder: Path, tokens: Path) -> tuple[str, ...]:
        """Its settings, with a run directory in `folder` and generated `tokens` instead of a corpus."""
        return (
            *(f"data.{name}=null" for name in ("corpus", "weights", "stages", "train", "validation")),
            f"data.blend={tokens}",
            "data.split=100,0,0",
            "data.tokenizer_type=NullTokenizer",
            "data.tokenizer_model=null",
            "training.train_tokens=null",
            "checkpoint.save_interval=null",
            "logging.log_interval=1",
            "logging.eval_iters=0",
            "logging.eval_interval=null",
            "logging.tensorboard=false",
            f"run_directory={folder / (self.continues or self.name)}",
            *self.settings,
        )


def tokens_for(folder: Path, vocab_size: int) -> Path:
    """The token file for this vocabulary size in `folder`, created if missing."""
    prefix = folder / f"tokens_{vocab_size}"
    return prefix if prefix.with_suffix(".idx").exists() else write_tokens(prefix, vocab_size)


def _small(name: str, *settings: str, **options: object) -> Training:
    """Eight layers, one of them attention, with heads of 128 channels, as FP8 attention requires on Hopper."""
    sizes = (
        f"model.layer_pattern={MODULE}",
        "model.hidden_size=256",
        "model.num_attention_heads=2",
        "model.ffn_hidden_size=768",
        "model.state_num_groups=2",
        f"data.vocab_size={SMALL_VOCABULARY}",
        "training.seq_length=512",
        "training.micro_batch_size=4",
        "training.global_batch_tokens=2048",
        f"training.train_iters={STEPS}",
        "training.transformer_impl=local",
        "optimizer.learning_rate=1e-3",
        "optimizer.warmup_fraction=0.0",
        "optimizer.decay_style=constant",
    )
    return Training(name, "transxssm_320m", (*sizes, *settings), **options)  # pyright: ignore[reportArgumentType]


# Makes Transformer Engine log its choice of attention backend.
_SAY_BACKENDS = {"NVTE_DEBUG": "1", "NVTE_DEBUG_LEVEL": "2"}
# One block size per kernel: compiling and trying all takes a minute, and the first wave covers the tuned kernels.
_UNTUNED = {"MAMBA_DETERMINISTIC": "1"}
_SAVE = f"checkpoint.save_interval={STOP}"

# The trainings of a wave run at the same time. The first wave compiles kernels for the others.
WAVES: tuple[tuple[Training, ...], ...] = (
    (
        _small("cpu", "training.precision=fp32", on_cpu=True),
        _small("bf16"),
        _small("deterministic", DETERMINISTIC, _SAVE),
    ),
    (
        _small("fp32", "training.precision=fp32", environment=_UNTUNED),
        _small("te", TRANSFORMER_ENGINE, environment=_SAY_BACKENDS),
        _small("fp8", TRANSFORMER_ENGINE, *FP8, environment=_SAY_BACKENDS),
        _small("fp8_attention", TRANSFORMER_ENGINE, *FP8, "training.fp8_attention=true", environment=_SAY_BACKENDS),
        _small("isolated", "data.isolate_documents=true", environment=_UNTUNED),
        _small("isolated_te", TRANSFORMER_ENGINE, "data.isolate_documents=true", environment=_SAY_BACKENDS | _UNTUNED),
        _small("deterministic_again", DETERMINISTIC),
        _small("stopped", DETERMINISTIC, _SAVE, f"megatron.exit_interval={STOP}"),
        _small("stopped_fp8", TRANSFORMER_ENGINE, *FP8, _SAVE, f"megatron.exit_interval={STOP}"),
    ),
    (
        _small("resumed", DETERMINISTIC, _SAVE, continues="stopped"),
        _small("resumed_fp8", TRANSFORMER_ENGINE, *FP8, _SAVE, continues="stopped_fp8"),
    ),
)


@dataclass(frozen=True)
class Agreement:
    """Two trainings whose losses differ by at most `bound` nats per token in each of the first steps."""

    claim: str
    training: str
    reference: str
    bound: float


# Bounds: bf16 has 8 bits, TF32 10, FP8 3 or 4. Measured on an H100: docs/gpu-results.
AGREEMENTS = (
    Agreement("fp32 (TF32 in the kernels), local modules, against the CPU", "fp32", "cpu", 0.01),
    Agreement("bf16, local modules, against the CPU's fp32", "bf16", "cpu", 0.05),
    Agreement("bf16, Transformer Engine's modules against local ones", "te", "bf16", 0.05),
    Agreement("FP8 in GEMMs, against bf16", "fp8", "te", 0.15),
    Agreement("FP8 in GEMMs and attention, against bf16", "fp8_attention", "te", 0.15),
    Agreement("isolated documents, local modules against the other's", "isolated_te", "isolated", 0.05),
    Agreement("deterministic mode: the same losses twice, bit for bit", "deterministic_again", "deterministic", 0.0),
    Agreement("stopped and resumed, deterministic: bit for bit", "resumed", "deterministic", 0.0),
    Agreement("FP8, stopped and resumed, with its history", "resumed_fp8", "fp8", 0.05),
)


SMALL_LENGTH, SMALL_BATCH = 64, 2
# `--small`: appended to the settings of every training.
SMALL_SIZES = (
    *(
        f"model.layer_pattern={MODULE}",
        "model.hidden_size=64",
        "model.num_attention_heads=2",
        "model.ffn_hidden_size=96",
    ),
    *("model.state_size=16", "model.state_head_dim=16", "model.state_num_groups=2"),
    *(f"training.seq_length={SMALL_LENGTH}", f"training.micro_batch_size={SMALL_BATCH}"),
    f"training.global_batch_tokens={SMALL_LENGTH * SMALL_BATCH}",
    *("training.transformer_impl=local", f"data.vocab_size={SMALL_VOCABULARY}"),
)
# data.vocab_size of the real recipes.
VOCABULARY = 50277
