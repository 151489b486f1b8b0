"""The corpus recipe: where the texts of a corpus lie, how they are tokenised, and where the shards go.

A YAML file of recipes/corpora/, or any path. Each section's fields are declared below, once, as in recipe/schema.py.
"""

# setting() returns a dataclasses.field.
# ruff: noqa: RUF009

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_txssm.errors import UserError
from megatron_txssm.recipe.loader import nearest
from megatron_txssm.recipe.setting import Field, Words, convert, section_fields, setting, shown, type_name
from megatron_txssm.recipe.yaml_text import dump_yaml, load_yaml

_PACKAGE_CORPORA = Path(__file__).parents[2] / "recipes" / "corpora"
# Names that become folders, file names and Slurm job names.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
FILTER = re.compile(r"\s*([A-Za-z_][\w.]*)\s*(==|!=|>=|<=|>|<)\s*(\S.*?)\s*")
# {field} in an origin.
PLACEHOLDER = re.compile(r"\{([A-Za-z_][\w.]*)\}")


@dataclass(frozen=True, kw_only=True)
class TokenizerSource:
    """The tokenizer, copied into the corpus."""

    type: str = setting(
        "Megatron's tokenizer class",
        default="HuggingFaceTokenizer",
        choices=("HuggingFaceTokenizer", "SentencePieceTokenizer"),
    )
    model: str = setting("tokenizer.json, a folder that holds one, a name on the Hugging Face hub, or a .model file")
    eod_token: str | None = setting("the token that ends a document; null: the tokenizer's own", default=None)
    encoder: str = setting(
        "auto: gigatoken where it can load the tokenizer, else the reference; reference: tokenizers or sentencepiece",
        default="auto",
        choices=("auto", "reference"),
    )


@dataclass(frozen=True, kw_only=True)
class SubsetSource:
    """One subset: its files, what of them is taken, and what faults are borne."""

    source: str = setting("folder with .parquet or .jsonl(.gz, .zst) files: a path, hf://…, s3://…, any fsspec URL")
    glob: str = setting("which files of the folder", default="**/*.*")
    max_files: int | None = setting("only the first files, in the order of their names", default=None, at_least=1)
    text_field: str = setting("field with the text", default="text")
    blob_field: str | None = setting("field with the id of the text's blob, which is fetched; null: none", default=None)
    blob_url: str = setting(
        "where blobs lie, gzipped or not; {blob_id} is replaced", default="s3://softwareheritage/content/{blob_id}"
    )
    blob_threads: int = setting("fetches at a time and task", default=16, at_least=1)
    blob_decode_errors: str = setting(
        "what to do with bytes that are not UTF-8: strict counts the row as broken",
        default="strict",
        choices=("strict", "ignore", "replace"),
    )
    origin: str | None = setting(
        "where a document comes from, such as '{repo_name}/{path}'; null: unknown", default=None
    )
    filters: Words = setting("conditions on fields that a row must meet, such as 'int_score >= 4'", default=())
    limit: int | None = setting("documents per task; null: all", default=None, at_least=1)
    validation_fraction: float = setting(
        "share of the documents held out, chosen by a hash of their text", default=0.0005, at_least=0, below=1
    )
    task_bytes: int = setting(
        "source bytes of one task; larger parquet files are divided", default=500_000_000, at_least=1
    )
    max_broken_fraction: float = setting("rows that may be unusable, as a share", default=0.001, at_least=0)
    max_broken_files: int = setting("files per task that may be unreadable", default=0, at_least=0)


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """The job array of `--slurm`."""

    partition: str | None = setting("null: the cluster's default", default=None)
    time: str = setting("limit of one task", default="04:00:00")
    cpus_per_task: int = setting("cores of one task", default=1, at_least=1)
    memory_per_cpu_gb: int = setting("GiB", default=4, at_least=1)
    workers: int | None = setting("tasks at a time; null: no limit", default=None, at_least=1)
    max_array_size: int | None = setting(
        "tasks of one job array; null: what the cluster allows", default=None, at_least=1
    )
    sbatch: Words = setting("further options of sbatch, such as 'account=lab'", default=())


@dataclass(frozen=True, kw_only=True)
class CorpusRecipe:
    """A complete corpus recipe; `load_corpus_recipe` makes and checks it."""

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


_TOP = {field.name: field for field in section_fields(CorpusRecipe)}
_SECTIONS = {"tokenizer": TokenizerSource, "slurm": Slurm}


def load_corpus_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> CorpusRecipe:
    """The checked recipe of a file, or of a name in recipes/corpora/; overrides: "subsets.web.limit=100"."""
    path = find_corpus_recipe(str(name_or_path))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a corpus recipe: {error}") from None
    data = load_yaml(text, str(path))
    if not isinstance(data, dict) or not isinstance(data.get("subsets"), dict) or not data["subsets"]:
        raise UserError(f"{path}: a corpus recipe has output, tokenizer and subsets; see recipes/corpora/")
    data = {"name": path.stem, **data}
    for override in overrides:
        _override(data, override)
    return _build(data, str(path))


def find_corpus_recipe(name: str) -> Path:
    """The file of a corpus recipe, of a corpus directory, or of a name in recipes/corpora/."""
    if (Path(name) / "corpus.yaml").is_file():
        return Path(name) / "corpus.yaml"
    if name.endswith((".yaml", ".yml")) or "/" in name:
        return Path(name)
    paths = {
        path.stem: path
        for folder in (_PACKAGE_CORPORA, Path("recipes/corpora"))
        for path in sorted(folder.glob("*.yaml"))
    }
    if name not in paths:
        raise UserError(
            f"no corpus recipe is named {shown(name)}{nearest(name, paths)}; there are {', '.join(sorted(paths))}, "
            "and a path ends in .yaml"
        )
    return paths[name]


def _override(data: dict[str, Any], text: str) -> None:
    name, equals, value = text.partition("=")
    parts = name.strip().split(".")
    if not equals or not all(parts) or len(parts) > 3:
        raise UserError(f"--set {text}: write it as output=PATH, section.field=value or subsets.NAME.field=value")
    for part in parts[:-1]:
        data = data.setdefault(part, {})
        if not isinstance(data, dict):
            raise UserError(f"--set {text}: {part} is no section")
    data[parts[-1]] = load_yaml(value, f"--set {text}")


def _build(data: dict[str, Any], source: str) -> CorpusRecipe:
    known = [*_TOP, *_SECTIONS, "subsets"]
    for key in data:
        if key not in known:
            raise UserError(f"{source}: unknown key {key!r}{nearest(str(key), known)}")
    top = _section(_TOP, {key: data[key] for key in data if key in _TOP}, "", source)
    sections = {
        key: section(**_section(_fields(section), data.get(key) or {}, f"{key}.", source))
        for key, section in _SECTIONS.items()
    }
    fields = _fields(SubsetSource)
    subsets = {
        str(name): SubsetSource(**_section(fields, entries or {}, f"subsets.{name}.", source))
        for name, entries in data["subsets"].items()
    }
    recipe = CorpusRecipe(**top, **sections, subsets=subsets)
    try:
        _check(recipe)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    return recipe


def _fields(section: type) -> dict[str, Field]:
    return {field.name: field for field in section_fields(section)}


def _section(fields: dict[str, Field], entries: Any, prefix: str, source: str) -> dict[str, Any]:
    if not isinstance(entries, dict):
        raise UserError(f"{source}: {prefix.rstrip('.')}={shown(entries)} must be a section with fields")
    values = {}
    for name, value in entries.items():
        if name not in fields:
            raise UserError(f"{source}: unknown key {prefix + str(name)!r}{nearest(str(name), fields)}")
        try:
            values[name] = convert(value, fields[name])
        except ValueError as error:
            raise UserError(f"{source}: {prefix}{name}={shown(value)} {error}") from None
    for name, field in fields.items():
        if field.required and name not in values:
            raise UserError(
                f"{source}: {prefix}{name} is missing ({field.setting.explanation}; {type_name(field.type)})"
            )
    return values


def _check(recipe: CorpusRecipe) -> None:
    for kind, name in (("name", recipe.name), *(("subset", name) for name in recipe.subsets)):
        if not _NAME.fullmatch(name) or name in ("tokenizer", "logs"):
            raise UserError(
                f"{kind} {shown(name)} must be letters, digits, '.', '_', '+' and '-', as it names a folder"
            )
    for name, subset in recipe.subsets.items():
        for condition in subset.filters:
            if not FILTER.fullmatch(condition):
                raise UserError(
                    f"subsets.{name}.filters: {shown(condition)} must be FIELD OPERATOR VALUE, such as 'int_score >= 4'"
                )
        if "{blob_id}" not in subset.blob_url:
            raise UserError(f"subsets.{name}.blob_url={shown(subset.blob_url)} must hold {{blob_id}}")
        if subset.origin is not None and not PLACEHOLDER.search(subset.origin):
            raise UserError(f"subsets.{name}.origin={shown(subset.origin)} must name a field, such as '{{url}}'")
    _check_slurm(recipe.slurm)


def _check_slurm(slurm: Slurm) -> None:
    """What is written into a batch script must be one plain word: nothing that a shell or sbatch would read further."""
    words = {"partition": slurm.partition or "", "time": slurm.time}
    words |= {f"sbatch[{number}]": option for number, option in enumerate(slurm.sbatch)}
    for name, word in words.items():
        if not re.fullmatch(r"[\w.,:=@%/+-]*", word, re.ASCII):
            raise UserError(f"slurm.{name}={shown(word)} must be one word of letters, digits and . , : = @ % / + -")
