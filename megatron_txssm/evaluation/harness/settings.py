"""What is evaluated, and how."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_txssm import __version__
from megatron_txssm.checkpoint.checksums import CHECKSUMS
from megatron_txssm.errors import require_count
from megatron_txssm.files import file_sha256
from megatron_txssm.versions import package_versions

_PACKAGES = ("lm_eval", "torch", "transformers", "megatron-core", "datasets")


@dataclass(frozen=True)
class HarnessSettings:
    """The options of an evaluation that its results depend on."""

    tasks: tuple[str, ...]
    # Examples in each prompt; None: as the suite's table says.
    num_fewshot: int | None = None
    # Questions of each task; None: all.
    limit: int | None = None
    # Texts in a batch, for each replica.
    batch_size: int = 8

    def __post_init__(self) -> None:
        require_count(batch_size=self.batch_size, limit=self.limit)
        require_count(0, num_fewshot=self.num_fewshot)

    def described(self) -> dict[str, Any]:
        return asdict(self) | {"tasks": [*self.tasks]}


@dataclass(frozen=True)
class ModelIdentity:
    """Which weights are evaluated, and what computes with them."""

    # For the user: where it is.
    description: str
    # "megatron" or "huggingface".
    computed_by: str
    step: int | None
    # Of the checkpoint's checksums, or of the weights' files.
    sha256: str
    precision: str

    def described(self) -> dict[str, Any]:
        versions = {"megatron_txssm": __version__, **package_versions(_PACKAGES)}
        return asdict(self) | {"versions": versions}

    def folder_name(self, settings: HarnessSettings, processes: int) -> str:
        """A name for the folder of an evaluation: the same command gives the same, another one another."""
        facts = self.described() | {"description": None, "processes": processes} | settings.described()
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.computed_by if self.step is None else f'step_{self.step}'}-{digest}"


def checkpoint_sha256(folder: Path) -> str:
    """Of a step's files: their names and sizes, and their checksums or, of an earlier version's, their index."""
    sizes = sorted((file.name, file.stat().st_size) for file in folder.glob("*.distcp"))
    sums = folder / CHECKSUMS
    index = file_sha256(sums if sums.is_file() else folder / ".metadata")
    return hashlib.sha256(json.dumps([sizes, index]).encode()).hexdigest()


def hf_sha256(folder: Path) -> str:
    files = [*sorted(folder.glob("*.safetensors")), folder / "config.json"]
    return hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest()
