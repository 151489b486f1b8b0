"""The model's code as files beside exported weights, independent of this package and Megatron."""

import re
from pathlib import Path

import megatron_txssm

# config.json's auto_map, by which transformers finds the classes in those files.
AUTO_MAP = {
    "AutoConfig": "configuration_transxssm.TransXSSMConfig",
    "AutoModel": "modeling_transxssm.TransXSSMModel",
    "AutoModelForCausalLM": "modeling_transxssm.TransXSSMForCausalLM",
}
_ENTRY = "megatron_txssm.hf.modeling_transxssm"
_IMPORT = re.compile(r"^( *)from (megatron_txssm(?:\.\w+)*)\.(\w+) import", re.MULTILINE)


def code_files() -> dict[str, str]:
    """File name -> content: the model's module and all modules of ours that it imports, flat in one folder.

    `from megatron_txssm.ops.ssd import ssd` becomes `from .ssd import ssd`; the rest is copied unchanged.
    """
    files: dict[str, str] = {}
    waiting = [_ENTRY]
    while waiting:
        module = waiting.pop()
        name = module.rpartition(".")[2] + ".py"
        if name in files:
            continue
        text = Path(megatron_txssm.__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py").read_text()
        waiting += [f"{package}.{imported}" for _, package, imported in _IMPORT.findall(text)]
        files[name] = _IMPORT.sub(r"\1from .\3 import", text)
    return dict(sorted(files.items()))


def write_code(folder: Path) -> dict[str, str]:
    """Write `code_files` into `folder`; returns a copy of AUTO_MAP."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in code_files().items():
        (folder / name).write_text(text, encoding="utf-8")
    return dict(AUTO_MAP)
