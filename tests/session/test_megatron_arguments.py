"""Recipe fields and the `megatron:` section as Megatron's own parser reads them."""

import pytest

from megatron_txssm.errors import UserError
from megatron_txssm.recipe.loader import load_recipe, recipe_names
from megatron_txssm.session.arguments import (
    megatron_arguments,
    parse_megatron_arguments,
    whole_validation_arguments,
)

# Instead of a corpus, which would have to exist.
OWN_DATA = ("data.train=a", "data.validation=a", "data.tokenizer_model=b")


def parsed(name: str, *overrides: str):
    return parse_megatron_arguments(megatron_arguments(load_recipe(name, [*OWN_DATA, *overrides])))


@pytest.mark.parametrize("name", recipe_names())
def test_megatrons_parser_takes_every_recipe(name: str) -> None:
    recipe = load_recipe(name, OWN_DATA)
    args = parse_megatron_arguments(megatron_arguments(recipe))
    assert args.spec == ["megatron_txssm.model.layer_specs", "transxssm_stack_spec"]
    assert args.hidden_size == recipe.model.hidden_size
    assert args.hybrid_layer_pattern.replace("|", "") == recipe.layers
    assert args.state_space_gated is recipe.model.state_gated
    assert not args.state_space_no_dt_bias
    assert args.ffn_hidden_size == recipe.model.ffn_hidden_size
    assert args.padded_vocab_size == recipe.padded_vocab_size
    assert args.global_batch_size * args.seq_length == recipe.training.global_batch_tokens
    assert args.min_lr == pytest.approx(0.1 * args.lr)
    assert args.bf16 is (recipe.training.precision == "bf16")
    assert not args.add_bias_linear and args.swiglu and args.normalization == "RMSNorm"
    assert args.untie_embeddings_and_output_weights is not recipe.model.tie_embeddings
    assert (args.attention_dropout, args.hidden_dropout) == (0.0, 0.0)
    assert args.save == args.load == str(recipe.checkpoint_path)


def test_the_state_space_sizes_survive_the_way_through_megatron() -> None:
    from megatron_txssm.model.arguments import state_space_config

    for override in ("model.length_scaling_base=4096", "model.ssd_backend=torch", "model.state_dt_bias=false"):
        recipe = load_recipe("mamba2_1.3b", [*OWN_DATA, override])
        assert state_space_config(parse_megatron_arguments(megatron_arguments(recipe))) == recipe.state_space
    assert recipe.state_space is not None and not recipe.state_space.dt_bias


def test_fields_with_their_own_rendering() -> None:
    args = parsed(
        "transxssm_320m",
        "model.num_query_groups=4",
        "model.tie_embeddings=false",
        "model.state_dt_bias=false",
        "model.rope_scaling=linear",
        "model.rotary_interpolation_factor=4",
        "parallel.recompute=full",
        "parallel.tensor_model_parallel_size=2",
        "parallel.sequence_parallel=true",
        "parallel.pipeline_model_parallel_size=2",
        "parallel.virtual_pipeline_stages=3",
        "training.train_tokens=2_000_000",
        "checkpoint.load_from=elsewhere",
        "data.tokenizer_model=--odd",
        "data.train=[[0.25, a], [0.75, b]]",
    )
    assert (args.group_query_attention, args.num_query_groups) == (True, 4)
    assert args.untie_embeddings_and_output_weights and args.state_space_no_dt_bias
    assert args.rotary_seq_len_interpolation_factor == 4
    assert (args.recompute_granularity, args.recompute_method, args.recompute_num_layers) == ("full", "uniform", 2)
    assert args.sequence_parallel and args.overlap_p2p_comm
    # Two processes with three stages each.
    assert args.hybrid_layer_pattern == "M-M-M-M-|M-M-M-*-|" * 2 + "M-M-M-M-|M-M-M-*-"
    # 2,000,000 tokens are 1.9 batches of 2^20.
    assert args.train_iters == 2
    assert args.pretrained_checkpoint == "elsewhere"
    # Text that looks like a flag stays text.
    assert args.tokenizer_model == "--odd"
    assert args.train_data_path == ["0.25", "a", "0.75", "b"]


def test_sequence_parallelism_needs_tensor_parallelism() -> None:
    assert parsed("demo_cpu").sequence_parallel
    assert not parsed("demo_cpu", "parallel.tensor_model_parallel_size=1").sequence_parallel


def test_without_an_interval_nothing_is_saved() -> None:
    args = parsed("demo_cpu", "checkpoint.save_interval=null", "logging.tensorboard=false")
    assert args.save is args.load is args.tensorboard_dir is None


def test_a_command_line_that_megatron_cannot_parse() -> None:
    with pytest.raises(UserError, match="unrecognized arguments: --no-such-flag"):
        parse_megatron_arguments(["--no-such-flag"])


def test_a_whole_validation_reads_each_set_once() -> None:
    whole = ["logging.eval_iters=null", "training.micro_batch_size=4", "parallel.pipeline_model_parallel_size=2"]
    pipeline = load_recipe("demo_cpu", whole)  # with tensor_model_parallel_size=2
    assert whole_validation_arguments(pipeline, 8) == ["--eval-micro-batch-size=1", "--eval-global-batch-size=2"]
    interleaved = load_recipe("demo_cpu", [*whole, "parallel.virtual_pipeline_stages=2"])
    assert whole_validation_arguments(interleaved, 8) == ["--eval-micro-batch-size=1", "--eval-global-batch-size=4"]
    assert whole_validation_arguments(load_recipe("demo_cpu", ["logging.eval_iters=2"]), 8) == []
