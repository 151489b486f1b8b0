"""A recipe made small has the same structure and the same legal layouts; what fuzzing draws can be repeated."""

import shlex
from pathlib import Path

import pytest

from megatron_txssm.check.fuzz import Draw, draw
from megatron_txssm.check.layouts import all_layouts
from megatron_txssm.check.shrink import left_out, shrink
from megatron_txssm.cli.parsing import build_parser
from megatron_txssm.errors import UserError
from megatron_txssm.recipe.changes import WITHOUT_FP8, changed
from megatron_txssm.recipe.loader import load_recipe, recipe_names
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.validation.validate import validate

TOKENS = Path("tokens")


def is_legal(recipe: Recipe) -> bool:
    try:
        validate(recipe)
    except UserError:
        return False
    return True


@pytest.mark.parametrize("nproc", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(
    ("name", "overrides"),
    [(name, []) for name in recipe_names()]
    + [
        ("llama3_320m", ["model.num_query_groups=3", "model.ffn_hidden_size=4098"]),
        (
            "llama3_320m",
            [f"model.layer_pattern={'*-' * 7}", "training.seq_length=4095", "training.global_batch_tokens=32760"],
        ),
        (
            "mamba2_320m",
            [f"model.layer_pattern={'M-' * 18}", "model.state_num_groups=2", "data.make_vocab_size_divisible_by=2"],
        ),
        ("transxssm_320m", ["model.layer_pattern=M-M-*-M-M-*-", "model.chunk_size=300"]),
        ("transxssm_320m", [f"model.layer_pattern={'M-' * 9}|{'M-' * 7}*-", "parallel.pipeline_model_parallel_size=2"]),
        (
            "transxssm_320m",
            [f"model.layer_pattern={'|'.join(['M-' * 6] * 8)}", "parallel.pipeline_model_parallel_size=8"],
        ),
        ("jamba_320m", ["model.chunk_size=8192", "model.length_scaling_base=1024", "model.state_size=33"]),
    ],
)
def test_a_small_recipe_has_the_layouts_of_the_large_one(name: str, overrides: list[str], nproc: int) -> None:
    recipe = load_recipe(name, overrides)
    small = shrink(recipe, TOKENS, nproc=nproc, steps=2)
    # FP8, which asks for sizes of its own, has no small counterpart.
    recipe = changed(recipe, WITHOUT_FP8)
    for layout in all_layouts(nproc)[1:]:
        assert is_legal(layout.of(small)) == is_legal(layout.of(recipe)), layout.name
    assert shrink(small, TOKENS, nproc=nproc, steps=2) == small


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("|".join(["M-" * 12] * 4), "M-|M-|M-|M-"),
        # Longer stages stay longer than others.
        ("|".join(["M-" * 12, "M-" * 11, "M-" * 12]), "M-M-|M-|M-M-"),
        ("|".join(["M-M-M-M-M-M-M-*-", "M-M-M-M-M-M-M-*-" * 2]), "M-*-|M-*-M-*-"),
        # So do the layers beside a border.
        ("M-M-M-M-M-M-M-M|-M-M-M-M-M-*", "M-M-M|-M-*"),
        # Nothing repeats, and nothing is large.
        ("MM-*-|M-*", "MM-*-|M-*"),
        ("M-M-M-M-|M-M-M-M-", "M-M-M-M-|M-M-M-M-"),
        ("M-" * 8 + "|M-*-", "M-M-M-|M-*-"),
    ],
)
def test_stages_are_shortened(pattern: str, wanted: str) -> None:
    recipe = load_recipe("transxssm_320m", [f"model.layer_pattern={pattern}", *stages_of(pattern)])
    small = shrink(recipe, TOKENS, nproc=4, steps=2)
    assert small.model.layer_pattern == wanted
    assert shrink(small, TOKENS, nproc=4, steps=2) == small


def stages_of(pattern: str) -> list[str]:
    return [f"parallel.pipeline_model_parallel_size={pattern.count('|') + 1}"]


def test_what_makes_the_model_stays() -> None:
    recipe = load_recipe(
        "jamba_1.3b",
        ["model.num_query_groups=8", "model.rope_scaling=linear", "model.rotary_interpolation_factor=4"],
    )
    small = shrink(recipe, TOKENS, nproc=4, steps=3)
    for name in (
        "attention_position_encoding",
        "position_encoding",
        "state_gated",
        "state_dt_bias",
        "rotary_base",
        "rope_scaling",
        "rotary_interpolation_factor",
        "rotary_table_precision",
        "tie_embeddings",
        "norm_epsilon",
    ):
        assert getattr(small.model, name) == getattr(recipe.model, name), name
    assert small.layers == recipe.layers[:16]
    assert small.model.num_attention_heads == 4 * (small.model.num_query_groups or 0)
    assert small.optimizer.learning_rate == recipe.optimizer.learning_rate
    assert small.train_iters == 3
    # As many chunks a sequence, up to what layouts can tell apart, and the embedding is padded.
    assert small.training.seq_length // small.model.chunk_size == 8
    assert small.padded_vocab_size > small.data.vocab_size
    assert small.megatron == {"overlap_grad_reduce": True, "overlap_param_gather": True}


@pytest.mark.parametrize(("nproc", "experts"), [(2, 10), (4, 12), (8, 8)])
def test_experts_stay_more_than_a_token_uses(nproc: int, experts: int) -> None:
    recipe = load_recipe("transxssm_320m_moe", ["model.moe_aux_loss_coeff=0.3"])
    small = shrink(recipe, TOKENS, nproc=nproc, steps=2).model
    assert (small.num_experts, small.moe_router_topk, small.moe_aux_loss_coeff) == (experts, 4, 0.3)
    assert small.moe_ffn_hidden_size is not None and 32 <= small.moe_ffn_hidden_size < 64
    assert (
        small.moe_shared_expert_intermediate_size is not None and 32 <= small.moe_shared_expert_intermediate_size < 64
    )
    # Few experts are as many as before.
    few = load_recipe(
        "demo_cpu_moe", ["model.moe_ffn_hidden_size=null", "model.moe_shared_expert_intermediate_size=null"]
    )
    small = shrink(few, TOKENS, nproc=nproc, steps=2).model
    assert (small.num_experts, small.moe_router_topk) == (8, 2)
    assert small.moe_ffn_hidden_size is small.moe_shared_expert_intermediate_size is None


def test_of_the_megatron_section_stays_what_gradients_depend_on() -> None:
    recipe = load_recipe(
        "llama3_320m", ["megatron.mock_data=false", "megatron.profile=true", "megatron.ddp-bucket-size=1000"]
    )
    assert left_out(recipe) == ["mock_data", "profile"]
    assert set(shrink(recipe, TOKENS, nproc=2, steps=1).megatron) == {
        "overlap_grad_reduce",
        "overlap_param_gather",
        "ddp_bucket_size",
    }


def fuzzed() -> list[Draw]:
    recipe = load_recipe("transxssm_320m")
    return [draw(recipe, 4, seed=3, number=number) for number in range(200)]


def test_fuzzing_draws_the_same_again_and_reaches_every_kind() -> None:
    draws = fuzzed()
    assert [each.changes for each in draws] == [each.changes for each in fuzzed()]
    for name, wanted in (
        ("model.position_encoding", {"rope", "conv1d_d", "a_t"}),
        ("model.state_gated", {True, False}),
        ("model.tie_embeddings", {True, False}),
        ("parallel.tensor_model_parallel_size", {1, 2, 4}),
        ("parallel.pipeline_model_parallel_size", {1, 2, 4}),
        ("parallel.context_parallel_size", {1, 2, 4}),
        ("parallel.expert_model_parallel_size", {1, 2, 4}),
        ("parallel.state_context_parallel", {"state_passing", "all_to_all"}),
        ("data.isolate_documents", {True, False}),
        ("parallel.virtual_pipeline_stages", {None, 2}),
        ("parallel.sequence_parallel", {True, False}),
        ("parallel.recompute", {"none", "selective", "full"}),
        ("megatron.overlap_grad_reduce", {None, True}),
        ("training.micro_batch_size", {1, 2}),
        ("parallel.expert_model_parallel_size", {1, 2, 4}),
        ("model.moe_router_topk", {2, 3}),
        ("model.moe_aux_loss_coeff", {0.0, 0.01, 0.3}),
    ):
        assert {each.changes[name] for each in draws} == wanted, name
    patterns = {frozenset(each.changes["model.layer_pattern"]) for each in draws}
    assert {*map(frozenset, ("M-", "*-", "M*", "M*-", "ME", "M-|", "*-|", "M*|", "M*-|", "ME|"))} <= patterns
    # Depths of multi-token prediction, with experts and without, behind one stage and behind several.
    of_depths = {symbols for symbols in patterns if "/" in symbols}
    assert {("E" in symbols, "|" in symbols) for symbols in of_depths} == {
        (experts, stages) for experts in (True, False) for stages in (True, False)
    }
    assert frozenset().union(*patterns) == {*"M*-E|/"}
    assert {each.processes for each in draws} == {1, 2, 4}


def test_fuzzing_draws_sizes_of_experts_where_there_are_any() -> None:
    shared_over = set()
    for each in (drawn.changes for drawn in fuzzed()):
        optional = [each[f"model.{name}"] for name in ("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size")]
        if "E" in each["model.layer_pattern"]:
            assert each["model.num_experts"] % each["parallel.expert_model_parallel_size"] == 0
            shared_over.add((each["parallel.expert_model_parallel_size"], *(size is None for size in optional)))
        else:
            assert each["model.num_experts"] is None and optional == [None, None]
            assert each["parallel.expert_model_parallel_size"] == 1
    assert shared_over >= {(size, own, shared) for size in (1, 2) for own in (True, False) for shared in (True, False)}


def test_a_printed_command_repeats_what_was_drawn() -> None:
    recipe = load_recipe("transxssm_320m")
    for drawn in fuzzed()[:50]:
        words = shlex.split(drawn.command(recipe, ["transxssm_320m", "--steps", "2", "--precision", "fp64"]))
        repeated = build_parser("check").parse_args(words[1:])
        again = load_recipe(repeated.recipe, repeated.overrides)
        sizes = {"nproc": repeated.nproc, "steps": repeated.steps}
        wanted = shrink(changed(recipe, drawn.changes), TOKENS, nproc=drawn.processes, steps=2)
        # An entry that is null says nothing.
        assert changed(shrink(again, TOKENS, **sizes), {}) == wanted
        assert repeated.layout == ["recipe"] and repeated.precision == "fp64"


def test_under_mup_it_is_as_much_wider_than_its_base() -> None:
    recipe = load_recipe("transxssm_320m", ["model.mup_base_hidden_size=256"])
    small = shrink(recipe, TOKENS, nproc=2, steps=2)
    assert small.sizes.logits_multiplier == recipe.sizes.logits_multiplier == 1 / 3
    assert shrink(small, TOKENS, nproc=2, steps=2) == small
