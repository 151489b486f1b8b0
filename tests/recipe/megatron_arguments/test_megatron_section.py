"""The `megatron:` section: one spelling, known arguments, and a table that covers all of Megatron's parser."""

import argparse
import runpy
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from megatron_txssm.errors import UserError
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.megatron_arguments.section import owners, passing, resolve
from megatron_txssm.recipe.megatron_arguments.table import NAMES_OF_FIELDS, OTHER_FLAGS, REFUSED
from megatron_txssm.recipe.schema import FIXED_ARGUMENTS
from megatron_txssm.session.arguments import _parser, megatron_arguments, parse_megatron_arguments

REPOSITORY = Path(__file__).parents[3]
OWN_DATA = ("data.train=a", "data.validation=a", "data.tokenizer_model=b")
FIXED = {words[0] for words in FIXED_ARGUMENTS}
OWNED = {f"--{flag.replace('_', '-')}" for flag in owners()}
ACTIONS = {action.dest: action for action in _parser()._actions}


def spelled(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_")


def is_switch(action: argparse.Action) -> bool:
    return action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction)


def kind(action: argparse.Action) -> tuple[str, tuple[str, ...], bool]:
    """An argument's values in the table's notation."""
    if is_switch(action):
        return ("off" if action.default is True else "on"), (), False
    name = getattr(action.type, "__name__", "text")
    choices = tuple(str(getattr(choice, "name", choice)) for choice in action.choices or ())
    return (name if name in ("int", "float") and not choices else "text"), choices, action.nargs is not None


def test_every_argument_of_megatron_is_in_exactly_one_table() -> None:
    """After an upgrade: add the arguments named here to the tables and the docs."""
    misplaced = {}
    for name, action in ACTIONS.items():
        ours = bool((FIXED | OWNED) & set(action.option_strings))
        places = [*(["ours"] if ours else []), *(["passes"] if name in passing() else [])]
        places += [reason for reason, text in REFUSED.items() for word in text.split() if fnmatchcase(name, word)]
        if len(places) != 1:
            misplaced[name] = places
    assert misplaced == {}


def test_the_tables_name_nothing_else() -> None:
    patterns = [word for text in REFUSED.values() for word in text.split()]
    assert [word for word in patterns if not any(fnmatchcase(name, word) for name in ACTIONS)] == []
    assert set(passing()) <= set(ACTIONS) and set(NAMES_OF_FIELDS) <= set(ACTIONS)
    flags = {flag for action in ACTIONS.values() for flag in action.option_strings}
    assert flags >= OWNED and set(OTHER_FLAGS) <= {spelled(flag) for flag in flags}


def test_every_flag_means_what_megatron_takes_it_for() -> None:
    for action in _parser()._actions:
        for flag in action.option_strings:
            if {flag} & (FIXED | OWNED) or spelled(flag) in ACTIONS:
                continue
            # Either flag of a pair sets the argument; `--no-x` negates it.
            off = action.const is False or (isinstance(action, argparse.BooleanOptionalAction) and "--no-" in flag)
            assert resolve(flag) == (action.dest, off), flag


@pytest.mark.parametrize("name", passing())
def test_what_passes_has_megatrons_kind_and_arrives(name: str) -> None:
    found, action = passing()[name], ACTIONS[name]
    expected = kind(action)
    # Fewer than Megatron's choices: these layers lack the other modules, and other graphs were never run with them.
    if name not in ("recompute_modules", "cuda_graph_impl"):
        written = "text" if found.kind == "path" else found.kind
        assert (written, found.choices, found.is_list) == expected
    values: list[Any] = (
        [True, False] if found.is_switch else [found.choices[-1] if found.choices else SAMPLES[found.kind]]
    )
    for value in values:
        found.check(value)
        arrived = getattr(parse_megatron_arguments(found.words(value)), name)
        listed = arrived if isinstance(arrived, list) else [arrived]
        assert [str(getattr(item, "name", item or False)) for item in listed] == [str(value)]


SAMPLES = {"int": 3, "float": 0.25, "text": "odd text", "path": "a/b"}


def test_the_page_is_made_from_the_tables() -> None:
    """python tools/document_megatron_arguments.py > docs/megatron-arguments.md"""
    page = runpy.run_path(str(REPOSITORY / "tools" / "document_megatron_arguments.py"))["page"]
    assert (REPOSITORY / "docs" / "megatron-arguments.md").read_text(encoding="utf-8") == page()


@pytest.mark.parametrize(
    ("override", "name", "value"),
    [
        ("overlap_grad_reduce=true", "overlap_grad_reduce", True),
        ("overlap-grad-reduce=true", "overlap_grad_reduce", True),
        ("--overlap-grad-reduce=true", "overlap_grad_reduce", True),
        ("overlap_grad_reduce=false", "overlap_grad_reduce", False),
        ("recompute_modules=[core_attn, mlp]", "recompute_modules", ["core_attn", "mlp"]),
        ("recompute_modules=core_attn", "recompute_modules", ["core_attn"]),
        # The flag negates the name in the namespace.
        ("bias_swiglu_fusion=false", "bias_swiglu_fusion", False),
        ("bias_swiglu_fusion=true", "bias_swiglu_fusion", True),
        ("no_bias_swiglu_fusion=true", "bias_swiglu_fusion", False),
        ("no_bias_swiglu_fusion=false", "bias_swiglu_fusion", True),
        ("disable-gloo-process-groups=true", "use_gloo_process_groups", False),
        ("use_gloo_process_groups=false", "use_gloo_process_groups", False),
        ("exit_interval=7", "exit_interval", 7),
        ("log_timers_to_tensorboard=null", "log_timers_to_tensorboard", False),
    ],
)
def test_an_argument_passes_under_any_spelling(override: str, name: str, value: object) -> None:
    recipe = load_recipe("demo_cpu", [*OWN_DATA, f"megatron.{override}"])
    assert list(recipe.megatron) == [name]
    assert getattr(parse_megatron_arguments(megatron_arguments(recipe)), name) == value


def test_another_spelling_replaces_what_was_inherited(tmp_path: Path) -> None:
    inherited = tmp_path / "inherited.yaml"
    inherited.write_text(
        "extends: transxssm_320m\nmegatron: {--overlap-grad-reduce: false, no-bias-swiglu-fusion: true}\n"
    )
    recipe = load_recipe(inherited, ["megatron.bias-swiglu-fusion=true"])
    assert recipe.megatron == {"overlap_grad_reduce": False, "overlap_param_gather": True, "bias_swiglu_fusion": True}


@pytest.mark.parametrize("second", ["overlap-grad-reduce", "--overlap_grad_reduce"])
def test_two_spellings_in_one_file_are_a_contradiction(tmp_path: Path, second: str) -> None:
    file = tmp_path / "twice.yaml"
    file.write_text(f"extends: demo_cpu\nmegatron: {{overlap_grad_reduce: true, {second}: false}}\n")
    with pytest.raises(UserError, match="is set twice, once under another spelling"):
        load_recipe(file)


@pytest.mark.parametrize("key", ["mock_data", "mock-data", "--mock-data"])
def test_readers_of_the_section_know_every_spelling(key: str) -> None:
    recipe = load_recipe("transxssm_320m", [f"megatron.{key}=true"])
    assert recipe.megatron["mock_data"] is True
    assert recipe.data.corpus is None and recipe.tokenizer_type == "NullTokenizer"


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("overlap_grad_reduc=true", "Megatron has no such argument; did you mean 'overlap_grad_reduce'?"),
        ("no_exit_interval=true", "Megatron has no such argument"),
        ("hidden_size=5", "set model.hidden_size instead, the recipe's field for --hidden-size"),
        ("--lr=5", "set optimizer.learning_rate instead"),
        ("layernorm_epsilon=1e-6", "set model.norm_epsilon instead"),
        ("fp16=true", "set training.precision instead"),
        ("train_samples=5", "set training.train_tokens instead"),
        ("hybrid_layer_pattern=M-", "set model.layer_pattern instead"),
        ("eod_mask_loss=true", "set training.mask_end_of_document instead"),
        ("calculate_per_token_loss=true", "set training.mask_end_of_document instead"),
        ("lr_wsd_decay_iters=5", "set optimizer.wsd_decay_fraction instead"),
        ("swiglu=true", "every recipe has --swiglu; leave it out"),
        ("hidden_dropout=0.1", "every recipe has --hidden-dropout 0"),
        ("yaml_cfg=x", "it replaces arguments"),
        ("rotary_percent=0.5", "Unified RoPE rotates every channel"),
        ("apply_layernorm_1p=true", "it would change what the model computes"),
        ("fp32_residual_connection=true", "it would change what the model computes"),
        ("window_size=[4, 0]", "it would change what the model computes"),
        ("rampup_batch_size=[8, 8, 100]", "state training.global_batch_tokens"),
        ("fp4_format=e2m1", "FP4 is not supported"),
        ("moe_router_topk=2", "set model.moe_router_topk instead"),
        ("num_experts=4", "set model.num_experts instead"),
        ("moe_token_dispatcher_type=allgather", "every recipe with experts sends their tokens by alltoall"),
        ("moe_router_load_balancing_type=none", "every recipe with experts balances their load by aux_loss"),
        ("moe_router_dtype=fp64", "every recipe with experts routes in fp32"),
        ("moe_grouped_gemm=true", "experts are one grouped GEMM with transformer_impl: transformer_engine"),
        ("moe_layer_recompute=true", "by parallel.recompute: selective with megatron.recompute_modules: [moe]"),
        ("expert_model_parallel_size=2", "set parallel.expert_model_parallel_size instead"),
        ("moe_z_loss_coeff=0.001", "it would change what experts compute"),
        ("moe_layer_freq=2", "model.layer_pattern says which layers are experts"),
        ("moe_enable_deepep=true", "it was not tried with the experts of these models"),
        ("exit_interval=soon", "must be an integer"),
        ("exit_interval=1.5", "must be an integer"),
        ("lr_warmup_init=slow", "must be a number"),
        ("attention_backend=magic", "must be one of flash, fused, unfused, local, auto"),
        ("exit_interval=true", "must be a value, not true"),
        ("exit_interval=[1, 2]", "must be one value, not a list"),
        ("overlap_grad_reduce=1", "must be true or false"),
        ("recompute_modules=[layernorm]", "must be one of core_attn, mlp, moe, shared_experts"),
        ("cp_comm_type=[--yaml-cfg, x]", "begins with a dash"),
    ],
)
def test_what_is_refused_is_named(override: str, wanted: str) -> None:
    with pytest.raises(UserError) as error:
        load_recipe("demo_cpu", [*OWN_DATA, f"megatron.{override}"])
    message = str(error.value)
    assert message.startswith(f"--set megatron.{override}: megatron.{override.split('=')[0]}")
    assert wanted in message
