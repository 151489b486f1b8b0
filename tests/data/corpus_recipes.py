"""Corpus recipes over the fixtures of corpora.py, tokenizers trained on the same text, and runs of the command line."""

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.data.corpora import SmolLMSources, library_texts

EOD_TOKEN = "<|endoftext|>"


@functools.cache
def byte_level_bpe() -> str:
    """A byte-level BPE in the manner of GPT-NeoX-20B, as tokenizer.json."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        special_tokens=[AddedToken(EOD_TOKEN, special=True)],  # pyright: ignore[reportArgumentType]
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(library_texts(200), trainer)
    return tokenizer.to_str()


def write_byte_level_bpe(folder: Path) -> dict[str, str]:
    """The `tokenizer` section of a recipe that uses it."""
    path = folder / "tokenizer.json"
    path.write_text(byte_level_bpe(), encoding="utf-8")
    return {"model": str(path), "eod_token": EOD_TOKEN}


def smollm_recipe(folder: Path, sources: SmolLMSources, tokenizer: dict[str, str], **subset_fields: Any) -> Path:
    """A recipe over the three subsets in folder/corpus; `subset_fields` hold for each of them."""
    common = {"task_bytes": 20_000, "validation_fraction": 0.1, **subset_fields}
    subsets: dict[str, Any] = {name: {"source": str(path), **common} for name, path in sources.folders.items()}
    subsets["fineweb-edu-dedup"]["origin"] = "{metadata.url}"
    subsets["python-edu"] |= {
        "blob_field": "blob_id",
        "blob_url": sources.blob_url,
        "origin": "{repo_name}{path}",
    }
    return write_recipe(folder, {"output": str(folder / "corpus"), "tokenizer": tokenizer, "subsets": subsets})


def write_recipe(folder: Path, recipe: dict[str, Any]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def shard_command(recipe: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "megatron_txssm.cli", "data", "shard", str(recipe), *words]


def run_data(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`txssm data WORDS` in a process of its own."""
    command = [sys.executable, "-m", "megatron_txssm.cli", "data", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=cwd, env=os.environ)


def corpus_bytes(directory: Path) -> dict[str, bytes]:
    """Every file that a corpus consists of, by its path; without logs."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and "logs" not in path.relative_to(directory).parts and path.name != "corpus.yaml"
    }
