"""What a checkpoint's recipe becomes where one process without a GPU loads it."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_txssm.checkpoint.load import (
    WEIGHTS_ONLY,
    FailedLoads,
    checkpoint_recipe,
    load_options,
    one_process_recipe,
)
from megatron_txssm.recipe.changes import changed
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.session.arguments import megatron_arguments, parse_megatron_arguments
from megatron_txssm.session.hooks import Call

CLUSTER = (
    "parallel.tensor_model_parallel_size=4",
    "parallel.sequence_parallel=true",
    "parallel.pipeline_model_parallel_size=2",
    "parallel.virtual_pipeline_stages=3",
    "megatron.tp_comm_overlap=true",
    "megatron.--nccl-ub=true",
    "megatron.grad-reduce-in-bf16=true",
    "megatron.use_torch_optimizer_for_cpu_offload=true",
)
# What somebody else's recipe might ask for, in any spelling.
HOSTILE = (
    "megatron.--trust-remote-code=true",
    "megatron.non-persistent-ckpt-type=global",
    "megatron.non_persistent_global_ckpt_dir=/tmp/theirs",
    "megatron.flight_recorder_dump_path=/tmp/anywhere",
)


def for_one_process(*overrides: str) -> Recipe:
    return one_process_recipe(changed(load_recipe("transxssm_1.3b", overrides), WEIGHTS_ONLY))


def test_what_only_a_cluster_needs_is_left_out() -> None:
    recipe = for_one_process(*CLUSTER)
    parallel = recipe.parallel
    assert parallel.tensor_model_parallel_size == parallel.pipeline_model_parallel_size == 1
    assert parallel.virtual_pipeline_stages is None and not parallel.sequence_parallel
    words = megatron_arguments(recipe)
    for word in ("overlap", "nccl", "grad-reduce", "offload"):
        assert not [flag for flag in words if word in flag], word
    assert words[words.index("--transformer-impl") + 1] == "local"
    # What the model computes is the recipe's.
    assert recipe.model == load_recipe("transxssm_1.3b").model


def test_a_foreign_recipe_names_no_code_and_no_files() -> None:
    recipe = for_one_process(*HOSTILE)
    args = parse_megatron_arguments(megatron_arguments(recipe))
    assert not args.trust_remote_code
    assert args.non_persistent_ckpt_type is None and args.non_persistent_global_ckpt_dir is None
    assert args.flight_recorder_dump_path is None


def test_what_only_serves_training_is_left_out() -> None:
    """The depths with their loss's weight, and a validation on all data, of which there are none."""
    recipe = for_one_process(
        "model.layer_pattern=M-*-/*-", "model.mtp_loss_scaling_factor=0.3", "logging.eval_iters=null"
    )
    assert recipe.model == load_recipe("transxssm_1.3b", ["model.layer_pattern=M-*-"]).model


def test_the_weights_of_an_fp8_run_load_in_fp32(tmp_path: Path) -> None:
    """As a conversion's proof loads them; FP8 itself goes with bf16 only."""
    words = ["data.tokenizer_type=NullTokenizer", "data.vocab_size=1000"]
    recipe = load_recipe("transxssm_1.3b_fp8_h100", ["data.train=a", "data.validation=b", *words])
    (tmp_path / "recipe.yaml").write_text(recipe.frozen(tmp_path))
    training = checkpoint_recipe(tmp_path, {"training.precision": "fp32", **WEIGHTS_ONLY}).training
    assert (training.precision, training.fp8, training.fp8_attention) == ("fp32", None, False)


def test_a_prompt_is_read_as_the_corpus_was() -> None:
    """Without what a tokenizer puts around a text."""
    recipe = for_one_process()
    for step, expected in ((None, None), (0, None), (7, 7)):
        args = parse_megatron_arguments([*megatron_arguments(recipe), *load_options(Path("there"), step)])
        assert args.tokenizer_hf_no_include_special_tokens
        assert (args.load, args.ckpt_step, args.no_load_optim) == ("there", expected, True)


@pytest.mark.parametrize(
    "error", [KeyError((None, 0.002, 0.0002)), AssertionError("OptimizerParamScheduler: class input value 0.002 and …")]
)
def test_a_step_of_another_schedule_is_answered_with_the_field(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As where the newest checkpoint is damaged, and the one before was trained under the schedule of before.
    options = SimpleNamespace(load=str(tmp_path), pretrained_checkpoint=None)
    monkeypatch.setattr("megatron_txssm.compat.get_args", lambda: options)
    monkeypatch.setattr("megatron_txssm.checkpoint.saved_model.damage_of_newest", lambda folder: "")

    def fail() -> None:
        raise error

    with pytest.raises(RuntimeError, match=r"set optimizer\.schedule_at_resume=recipe to continue"):
        FailedLoads().around_load(Call(), fail)
