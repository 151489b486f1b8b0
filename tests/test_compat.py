"""What compat.py takes from Megatron and mends in it: at an upgrade, these say what has moved."""

import ast
import importlib
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from megatron_txssm import compat

PINNED = {"megatron-core": "0.19.2"}


@pytest.mark.parametrize("package", PINNED)
def test_checked_versions(package: str) -> None:
    assert version(package) == PINNED[package], "read compat.py against the new release, then change this pin"


def test_requirements_pin_the_same_versions() -> None:
    text = (Path(__file__).parents[1] / "requirements.txt").read_text()
    assert "megatron-core[training]==0.19.2" in text


def test_every_imported_name_exists() -> None:
    tree = ast.parse(Path(compat.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    names = [(node.module, alias.name) for node in imports for alias in node.names if "megatron." in str(node.module)]
    assert ("megatron.core.ssm.utils", "_split_tensor_factory") in names
    for module, name in names:
        assert hasattr(importlib.import_module(str(module)), name), (module, name)


def test_get_args_is_megatrons(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.training import global_vars

    args = object()
    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", args)
    assert compat.get_args() is args


@pytest.fixture
def unmended(monkeypatch: pytest.MonkeyPatch):
    """Megatron as its wheel has it, whatever an earlier test mended."""
    import megatron.core.datasets.utils as utils
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    load = DistributedOptimizer.load_state_dict
    load = getattr(load, "__wrapped__", load)
    monkeypatch.setattr(compat, "_mended", False)
    monkeypatch.setattr(DistributedOptimizer, "load_state_dict", load)
    monkeypatch.setattr(utils, "compile_helpers", lambda: "compiled")
    return utils, DistributedOptimizer


def test_mending_twice_wraps_once(unmended) -> None:
    _, optimizer = unmended
    plain = optimizer.load_state_dict
    compat.mend_megatron()
    mended = optimizer.load_state_dict
    assert mended is not plain
    assert mended.__wrapped__ is plain
    compat.mend_megatron()
    assert optimizer.load_state_dict is mended


def test_state_is_loaded_without_autograd(unmended, monkeypatch: pytest.MonkeyPatch) -> None:
    _, optimizer = unmended
    leaf = torch.zeros(4, requires_grad=True)

    def load_state_dict(self, state) -> None:
        leaf.view(-1)[:2].copy_(state)

    monkeypatch.setattr(optimizer, "load_state_dict", load_state_dict)
    with pytest.raises(RuntimeError, match="leaf"):
        load_state_dict(None, torch.ones(2))
    compat.mend_megatron()
    optimizer.load_state_dict(None, torch.ones(2))
    assert leaf.tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("makefile", [False, True])
def test_helpers_are_compiled_only_where_they_can_be(
    unmended, makefile: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    utils, _ = unmended
    monkeypatch.setattr(utils, "__file__", str(tmp_path / "utils.py"))
    if makefile:
        (tmp_path / "Makefile").touch()
    compat.mend_megatron()
    assert utils.compile_helpers() == ("compiled" if makefile else None)


def test_the_wheel_ships_the_compiled_helpers() -> None:
    # Otherwise leaving the compilation out would end in an ImportError.
    import megatron.core.datasets.helpers_cpp as helpers

    assert callable(helpers.build_sample_idx_int32)
