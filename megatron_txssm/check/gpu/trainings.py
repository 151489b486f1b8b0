"""The trainings of `txssm check gpu`: small runs that are compared in pairs; speed.py has the timed ones."""

from dataclasses import dataclass, field
from pathlib import Path

from megatron_txssm.architecture.layer_pattern import MODULE
from megatron_txssm.check.tokens import write_tokens
from megatron_txssm.recipe.changes import WITHOUT_REPORTS, WITHOUT_TOKENIZER, WITHOUT_TOKENS, Changes, changed
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.recipe import Recipe

STEPS, STOP = 10, 5
SMALL_VOCABULARY = 1024

LOCAL: Changes = {"training.transformer_impl": "local"}
TRANSFORMER_ENGINE: Changes = {"training.transformer_impl": "transformer_engine"}
FP8: Changes = TRANSFORMER_ENGINE | {
    "training.fp8": "hybrid",
    "training.fp8_recipe": "delayed",
    "megatron.fp8_amax_history_len": 16,
}
FP32: Changes = {"training.precision": "fp32"}
ISOLATED: Changes = {"data.isolate_documents": True}
DETERMINISTIC: Changes = {"megatron.deterministic_mode": True}


@dataclass(frozen=True)
class Training:
    """One training on one device, by Megatron's own loop, in its own process and folder."""

    name: str
    # The recipe that it changes, by name.
    recipe: str
    changes: Changes
    on_cpu: bool = False
    # Name of the training whose run it continues.
    continues: str | None = None
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def needs_transformer_engine(self) -> bool:
        return TRANSFORMER_ENGINE.items() <= self.changes.items()

    def changed_recipe(self, folder: Path, tokens: Path, changes: Changes | None = None) -> Recipe:
        """Its recipe, unchecked, with a run directory in `folder` and generated `tokens` instead of a corpus.

        `changes` come last.
        """
        surroundings = surroundings_of(folder / (self.continues or self.name), tokens)
        return changed(load_recipe(self.recipe), surroundings | self.changes | (changes or {}))


def surroundings_of(run_directory: Path, tokens: Path) -> Changes:
    """What makes of any recipe a run on generated `tokens` that reports each step, and neither validates nor saves."""
    return {
        **WITHOUT_TOKENS,
        **WITHOUT_TOKENIZER,
        **WITHOUT_REPORTS,
        "data.blend": ((1.0, str(tokens)),),
        "data.split": "100,0,0",
        "training.train_tokens": None,
        "checkpoint.save_interval": None,
        "checkpoint.keep_last": None,
        "checkpoint.keep_every": None,
        "logging.log_interval": 1,
        "logging.eval_iters": 0,
        "logging.eval_interval": None,
        "run_directory": str(run_directory),
    }


def tokens_for(folder: Path, vocab_size: int) -> Path:
    """The token file for this vocabulary size in `folder`, created if missing."""
    prefix = folder / f"tokens_{vocab_size}"
    return prefix if prefix.with_suffix(".idx").exists() else write_tokens(prefix, vocab_size)


def small_training(
    name: str,
    changes: Changes,
    *,
    recipe: str = "transxssm_320m",
    on_cpu: bool = False,
    continues: str | None = None,
    environment: dict[str, str] | None = None,
) -> Training:
    """Eight layers, one of them attention, with heads of 128 channels, as FP8 attention requires on Hopper."""
    sizes: Changes = {
        "model.layer_pattern": MODULE,
        "model.hidden_size": 256,
        "model.num_attention_heads": 2,
        "model.ffn_hidden_size": 768,
        "model.state_num_groups": 2,
        "data.vocab_size": SMALL_VOCABULARY,
        "training.seq_length": 512,
        "training.micro_batch_size": 4,
        "training.global_batch_tokens": 2048,
        "training.train_iters": STEPS,
        "optimizer.learning_rate": 1e-3,
        "optimizer.warmup_fraction": 0.0,
        "optimizer.decay_style": "constant",
    }
    return Training(name, recipe, LOCAL | sizes | changes, on_cpu, continues, environment or {})


# Makes Transformer Engine log its choice of attention backend.
_SAY_BACKENDS = {"NVTE_DEBUG": "1", "NVTE_DEBUG_LEVEL": "2"}
# One block size per kernel: compiling and trying all takes a minute, and the first wave covers the tuned kernels.
UNTUNED = {"MAMBA_DETERMINISTIC": "1"}
SAVE: Changes = {"checkpoint.save_interval": STOP}
STOP_THERE: Changes = SAVE | {"megatron.exit_interval": STOP}

# The trainings of a wave run at the same time. The first wave compiles kernels for the others. What is resumed comes as
# early as it can: on a slow CPU, the last wave may not fit the budget.
WAVES: tuple[tuple[Training, ...], ...] = (
    (
        small_training("cpu", FP32, on_cpu=True),
        small_training("bf16", {}),
        small_training("deterministic", DETERMINISTIC | SAVE),
        small_training("stopped", DETERMINISTIC | STOP_THERE),
    ),
    (
        small_training("resumed", DETERMINISTIC | SAVE, continues="stopped"),
        small_training("te", TRANSFORMER_ENGINE, environment=_SAY_BACKENDS),
        small_training("fp8", FP8, environment=_SAY_BACKENDS),
        small_training("stopped_fp8", FP8 | STOP_THERE),
        small_training("deterministic_again", DETERMINISTIC),
        small_training("fp32", FP32, environment=UNTUNED),
    ),
    (
        small_training("resumed_fp8", FP8 | SAVE, continues="stopped_fp8"),
        small_training("fp8_attention", FP8 | {"training.fp8_attention": True}, environment=_SAY_BACKENDS),
        small_training("isolated", ISOLATED, environment=UNTUNED),
        small_training("isolated_te", TRANSFORMER_ENGINE | ISOLATED, environment=_SAY_BACKENDS | UNTUNED),
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
    Agreement("isolated documents, Transformer Engine's modules against local ones", "isolated_te", "isolated", 0.05),
    Agreement("deterministic mode: the same losses twice, bit for bit", "deterministic_again", "deterministic", 0.0),
    Agreement("stopped and resumed, deterministic: bit for bit", "resumed", "deterministic", 0.0),
    Agreement("FP8, stopped and resumed, with its history", "resumed_fp8", "fp8", 0.05),
)


SMALL_LENGTH, SMALL_BATCH = 64, 2
# `--small`: replaces the sizes of every training.
SMALL_SIZES: Changes = LOCAL | {
    "model.hidden_size": 64,
    "model.num_attention_heads": 2,
    "model.ffn_hidden_size": 96,
    "model.state_size": 16,
    "model.state_head_dim": 16,
    "model.state_num_groups": 2,
    "training.seq_length": SMALL_LENGTH,
    "training.micro_batch_size": SMALL_BATCH,
    "training.global_batch_tokens": SMALL_LENGTH * SMALL_BATCH,
    "data.vocab_size": SMALL_VOCABULARY,
}
# data.vocab_size of the real recipes.
VOCABULARY = 50277
