"""The corpus recipe: a corpus's source texts, its tokenizer, and the output folder of its shards.

A YAML file in recipes/corpora/, or at any path. Each section's fields are declared once, below, as in recipe/schema.py.
"""

# setting() returns a dataclasses.field.
# ruff: noqa: RUF009

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

from megatron_txssm.choices import CorpusTokenizerType, DecodeErrors, EncoderChoice
from megatron_txssm.recipe.settings.setting import Words, setting
from megatron_txssm.recipe.settings.yaml_text import dump_yaml

# The copy of the recipe in a corpus directory.
KEPT_RECIPE = "corpus.yaml"
FILTER = re.compile(r"\s*([A-Za-z_][\w.]*)\s*(==|!=|>=|<=|>|<)\s*([^\s=].*?)\s*")
# A {field} of an origin.
PLACEHOLDER = re.compile(r"\{([A-Za-z_][\w.]*)\}")


@dataclass(frozen=True, kw_only=True)
class TokenizerSource:
    """The tokenizer, copied into the corpus."""

    type: CorpusTokenizerType = setting(
        "Megatron's tokenizer class",
        default="HuggingFaceTokenizer",
    )
    model: str = setting("tokenizer.json, a folder that holds one, a name on the Hugging Face hub, or a .model file")
    eod_token: str | None = setting("the token that ends a document; null: the tokenizer's own", default=None)
    encoder: EncoderChoice = setting(
        "auto: gigatoken where it can load the tokenizer, else the reference; reference: tokenizers or sentencepiece",
        default="auto",
    )


@dataclass(frozen=True, kw_only=True)
class SubsetSource:
    """One subset: its files, which rows are used, how many faults are tolerated."""

    source: str = setting("folder with .parquet or .jsonl(.gz, .zst) files: a path, hf://…, s3://…, any fsspec URL")
    glob: str = setting("which files of the folder", default="**/*.*")
    max_files: int | None = setting("only this many files, the first in order of name", default=None, at_least=1)
    text_field: str = setting("field with the text", default="text")
    blob_field: str | None = setting("field with the id of a blob to fetch as the text; null: none", default=None)
    blob_url: str = setting(
        "URL of blobs, gzipped or not; {blob_id} is replaced", default="s3://softwareheritage/content/{blob_id}"
    )
    blob_threads: int = setting("concurrent fetches per task", default=16, at_least=1)
    blob_decode_errors: DecodeErrors = setting(
        "what to do with bytes that are not UTF-8: strict counts the row as broken",
        default="strict",
    )
    origin: str | None = setting(
        "where a document comes from, such as '{repo_name}/{path}'; null: unknown", default=None
    )
    filters: Words = setting("conditions that a row's fields must meet, such as 'int_score >= 4'", default=())
    limit: int | None = setting("documents per task; null: all", default=None, at_least=1)
    validation_fraction: float = setting(
        "share of the documents held out, chosen by a hash of their text", default=0.0005, at_least=0, below=1
    )
    task_bytes: int = setting(
        "source bytes of one task; larger parquet files are divided", default=500_000_000, at_least=1
    )
    max_broken_fraction: float = setting("tolerated fraction of unusable rows", default=0.001, at_least=0)
    max_broken_files: int = setting("tolerated unreadable files per task", default=0, at_least=0)


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """The job array of `--slurm`."""

    partition: str | None = setting("null: the cluster's default", default=None)
    time: str = setting("time limit of one task", default="04:00:00")
    cpus_per_task: int = setting("cores of one task", default=1, at_least=1)
    memory_per_cpu_gb: int = setting("GiB", default=4, at_least=1)
    workers: int | None = setting("tasks of one job array that run at once; null: no limit", default=None, at_least=1)
    max_array_size: int | None = setting(
        "tasks of one job array; null: what the cluster allows", default=None, at_least=1
    )
    sbatch: Words = setting("other sbatch options, such as 'account=lab'", default=())


@dataclass(frozen=True, kw_only=True)
class CorpusRecipe:
    """A complete corpus recipe; `loader.load_corpus_recipe` creates and checks it."""

    name: str = setting("of the corpus; by default the file's name")
    description: str = setting("one line", default="")
    output: str = setting("folder of the corpus")
    tokenizer: TokenizerSource
    subsets: dict[str, SubsetSource]
    slurm: Slurm

    @property
    def path(self) -> Path:
        return Path(self.output)

    def to_yaml(self) -> str:
        """Every field with its value."""
        return dump_yaml(dataclasses.asdict(self))


SECTIONS: dict[str, type] = {"tokenizer": TokenizerSource, "slurm": Slurm}
