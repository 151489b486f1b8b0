"""Transformer Engine's real Python classes without its compiled modules and a GPU; a pytest plugin (-p te_stub).

The wheel `transformer-engine` (1.2 MB) holds the Python package; the kernels are another wheel of 276 MB and an
extension that is compiled on a GPU node. Constructing a module needs none of them: here they are stubs, whose
functions raise. Also stubbed: onnxscript and onnx (for the export of models) and einops (in a cache of attention),
which the wheel imports without naming them in its metadata.

Where the extension was compiled (tools/build_te_cpu), it is used, and only those three are stubbed.

Install before the first import of Megatron, and only in a process of its own: with the bare wheel on the path, `import
transformer_engine` raises RuntimeError, which Megatron's `except ImportError` does not catch.
"""

import importlib
import importlib.machinery
import importlib.util
import os
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock


class _Member:
    """A member of an enumeration of the compiled module: equal to itself, hashable, an index."""

    def __init__(self, name: str, value: int):
        self.name, self.value = name, value

    def __index__(self) -> int:
        return self.value

    __int__ = __index__

    def __repr__(self) -> str:
        return f"<stub of {self.name}>"


class _Enumeration(type):
    """Makes the members that are asked for, numbered in that order."""

    @property
    def __members__(cls) -> dict[str, _Member]:
        return {name: member for name, member in vars(cls).items() if isinstance(member, _Member)}

    def __getattr__(cls, name: str) -> _Member:
        if name.startswith("__"):
            raise AttributeError(name)
        member = _Member(f"{cls.__name__}.{name}", len(cls.__members__))
        setattr(cls, name, member)
        return member


class CompiledStub(types.ModuleType):
    """Has any class and any function; calling a function is an error."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made: Any = _Enumeration(name, (), {"__init__": lambda *_, **__: None}) if name[0].isupper() else _kernel(name)
        setattr(self, name, made)
        return made


def _kernel(name: str) -> Any:
    def kernel(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"{name} is a kernel of Transformer Engine, which this process has only the Python part of")

    return kernel


def install() -> None:
    assert "megatron.core" not in sys.modules, "Megatron has looked for Transformer Engine already"
    stubs: dict[str, Any] = {name: mock.MagicMock(name=name) for name in ("onnx", "onnxscript", "einops")}
    compiled = is_compiled()
    if not compiled:
        # Under this variable the package looks for no compiled library.
        os.environ["NVTE_PROJECT_BUILDING"] = "1"
        extension: Any = CompiledStub("transformer_engine_torch")
        extension.get_cudnn_version = lambda: 92000
        stubs["transformer_engine_torch"] = extension
    for name, stub in stubs.items():
        stub.__spec__ = importlib.machinery.ModuleSpec(name, None)
        sys.modules[name] = stub
    if compiled:
        # Its libraries, which the extension is linked to.
        importlib.import_module("torch")
        importlib.import_module("transformer_engine.pytorch")
        return
    import transformer_engine.common as common  # pyright: ignore[reportMissingImports]

    common.load_framework_extension = lambda framework: None
    # The line before tried to import it, in vain.
    for name in [name for name in sys.modules if name.startswith("transformer_engine.pytorch")]:
        del sys.modules[name]
    importlib.import_module("transformer_engine.pytorch")


def is_compiled() -> bool:
    """Whether the package on the path holds its extension."""
    spec = importlib.util.find_spec("transformer_engine")
    folders = spec.submodule_search_locations if spec else None
    return any(list(Path(folder).glob("wheel_lib/transformer_engine_torch*.so")) for folder in folders or ())


install()
