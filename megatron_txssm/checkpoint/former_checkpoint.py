"""Checkpoints of versions that built Megatron's GPTModel: they load into a HybridModel, optimizer state included.

Their parameters have other names (architecture/former_names.py); values, shapes and components are the same.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from megatron_txssm.architecture.former_names import former_name
from megatron_txssm.architecture.layer_pattern import layers
from megatron_txssm.checkpoint.tensors import Shape
from megatron_txssm.session.hooks import Call, Listener, checkpoint_reads

_FORMER = "decoder.final_layernorm.weight"
# An empty entry of HybridModel's.
_NOT_SAVED = "output_layer._extra_state"


class FormerCheckpoints(Listener):
    """Lets load_checkpoint read a former checkpoint."""

    def around_load(self, call: Call, proceed: Callable[[], Any]) -> Any:
        with checkpoint_reads(load=_load, load_common_state_dict=_load_common):
            return proceed()


def _is_former(common: dict[str, Any]) -> bool:
    saved_by = common.get("args")
    return saved_by is not None and not getattr(saved_by, "hybrid_layer_pattern", None)


def _load_common(load_common: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Megatron's load_common_state_dict, with this run's layers in a former checkpoint's arguments."""
    common = load_common(*args, **kwargs)
    if _is_former(common):
        _as_if_saved_now(common["args"])
    return common


def _load(load: Callable[..., Any], sharded_state_dict: Any, checkpoint_dir: Any, *args: Any, **kwargs: Any) -> Any:
    """Megatron's dist_checkpointing.load, by former names if the checkpoint has them."""
    from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
    from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase
    from megatron.core.dist_checkpointing.serialization import load_common_state_dict

    if not _is_former(load_common_state_dict(checkpoint_dir)):
        return load(sharded_state_dict, checkpoint_dir, *args, **kwargs)
    all_layers = layers(_args().hybrid_layer_pattern)

    def find(entry: Any) -> Any:
        if not isinstance(entry, ShardedBase):
            return entry
        if entry.key == _NOT_SAVED:
            return LocalNonpersistentObject(entry.data)
        entry.key = former_name(entry.key, all_layers)
        return entry

    state_dict = load(dict_list_map_inplace(find, sharded_state_dict), checkpoint_dir, *args, **kwargs)
    _as_if_saved_now(state_dict["args"])
    return state_dict


def _args() -> Any:
    from megatron_txssm.compat import get_args

    return get_args()


def _as_if_saved_now(saved_by: Any) -> None:
    """Megatron compares the number of layers, and would itself convert checkpoints of models without a pattern."""
    for name in ("hybrid_layer_pattern", "num_layers"):
        setattr(saved_by, name, getattr(_args(), name))


def with_present_names(index: Any, shapes: dict[str, Shape], all_layers: str) -> Any:
    """torch's Metadata of a checkpoint with the names of `shapes`, whether it has these or the former names."""
    if _FORMER not in index.state_dict_metadata:
        return index
    present = {former_name(name, all_layers): name for name in shapes}
    entries = {present.get(name, name): entry for name, entry in index.state_dict_metadata.items()}
    pieces = {replace(key, fqn=present.get(key.fqn, key.fqn)): piece for key, piece in index.storage_data.items()}
    return replace(index, state_dict_metadata=entries, storage_data=pieces)
