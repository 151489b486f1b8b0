"""The model of a recipe, as `megatron.training.pretrain` builds it from the recipe's arguments, in one process."""

from typing import Any

import pytest
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import global_vars
from megatron.training.argument_utils import hybrid_config_from_args
from megatron.training.arguments import validate_args

from megatron_txssm.platform import prepare_platform
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.session.arguments import megatron_arguments, parse_megatron_arguments


def build_model(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A HybridModel; needs the fixture `one_process`."""
    return build_with_arguments(recipe, prepare_platform(), monkeypatch)


def build_with_arguments(recipe: Recipe, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The same with Megatron arguments behind the recipe's, where the platform's are not wanted."""
    args = parse_megatron_arguments([*megatron_arguments(recipe), *arguments])
    args.rank, args.world_size = 0, 1
    args._is_global_batch_size_explicitly_specified = True
    validate_args(args)
    args.padded_vocab_size = recipe.padded_vocab_size
    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", args)
    config = hybrid_config_from_args(args)
    return config.get_builder_cls()(config).build_model(ProcessGroupCollection.use_mpu_process_groups())
