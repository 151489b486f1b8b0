"""The corpus recipe: a corpus's source texts, its tokenizer, and the output folder of its shards.

A YAML file in recipes/corpora/, or at any path. Each section's fields are declared once, below, as in recipe/schema.py.
"""

# setting() returns a dataclasses.field.
# ruff: noqa: RUF009

import contextlib
import dataclasses
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_txssm.errors import UserError, nearest, shown
from megatron_txssm.home import RECIPES
from megatron_txssm.recipe.settings.setting import Field, Words, convert, section_fields, setting, type_name
from megatron_txssm.recipe.settings.yaml_text import dump_yaml, load_yaml

# The copy of the recipe in a corpus directory.
KEPT_RECIPE = "corpus.yaml"
# Names that become folders, file names and Slurm job names.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
# Names in a corpus directory that are not subsets.
_TAKEN = ("tokenizer", "logs", "plan.json", KEPT_RECIPE)
FILTER = re.compile(r"\s*([A-Za-z_][\w.]*)\s*(==|!=|>=|<=|>|<)\s*([^\s=].*?)\s*")
# A {field} of an origin.
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
    blob_decode_errors: str = setting(
        "what to do with bytes that are not UTF-8: strict counts the row as broken",
        default="strict",
        choices=("strict", "ignore", "replace"),
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
    """A complete corpus recipe; `load_corpus_recipe` creates and checks it."""

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
    """The checked recipe from a file, or from a name in recipes/corpora/; overrides: "subsets.web.limit=100"."""
    path = find_corpus_recipe(str(name_or_path))
    if os.path.isdir(path) or (not os.path.exists(path) and path.suffix not in (".yaml", ".yml")):
        raise UserError(f"{path} holds no corpus (no {KEPT_RECIPE}); {how_to_make(path)}")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        hint = nearest(path.name, [file.name for file in path.parent.glob("*.y*ml")])
        raise UserError(f"{path}: no such corpus recipe{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a corpus recipe: {error}") from None
    data = load_yaml(text, str(path))
    if not isinstance(data, dict):
        raise UserError(f"{path}: a corpus recipe has output, tokenizer and subsets; see recipes/corpora/")
    data = {"name": path.stem, **data}
    if path.name == KEPT_RECIPE and (path.parent / "plan.json").exists():
        # The corpus may have been moved.
        data["output"] = str(path.parent)
    for override in overrides:
        _override(data, override)
    return _build(data, str(path))


def find_corpus_recipe(name: str) -> Path:
    """The file of a corpus recipe, of a corpus directory, or of a name in recipes/corpora/."""
    # Path.is_file would raise for an overlong name.
    if os.path.isfile(Path(name) / KEPT_RECIPE):
        return Path(name) / KEPT_RECIPE
    if name.endswith((".yaml", ".yml")) or "/" in name:
        return Path(name)
    paths = corpus_recipe_files()
    if name not in paths:
        raise UserError(
            f"no corpus recipe is named {shown(name)}{nearest(name, paths)}; there are {', '.join(sorted(paths))}, "
            "and a path ends in .yaml"
        )
    return paths[name]


def how_to_make(directory: str | Path) -> str:
    """A remedy for a directory without a corpus: a neighbouring corpus, or the command that makes one."""
    directory = Path(directory)
    if hint := nearest(directory.name, [path.parent.name for path in directory.parent.glob("*/plan.json")]):
        return hint.removeprefix("; ")
    # This recipe reads files that the demo writes first.
    commands = {name: f"txssm data shard {name}" for name in corpus_recipe_files()} | {"python_library": "txssm demo"}
    for name, command in commands.items():
        # Skip broken recipes: they are unrelated to the error being reported.
        with contextlib.suppress(UserError):
            if load_corpus_recipe(name).path.resolve() == directory.resolve():
                return f"make it: {command}"
    return "`txssm data shard RECIPE` makes one, of a corpus recipe as docs/data.md describes it"


def corpus_recipe_files() -> dict[str, Path]:
    """Name -> file of the corpus recipes of this repository and of the current directory's recipes/corpora/."""
    folders = (RECIPES / "corpora", Path("recipes/corpora"))
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}


def _override(data: dict[str, Any], text: str) -> None:
    name, equals, value = text.partition("=")
    parts = name.strip().split(".")
    if parts[0] == "subsets" and len(parts) > 3:
        # A subset's name may contain dots.
        parts = [parts[0], ".".join(parts[1:-1]), parts[-1]]
    if not equals or not all(parts) or len(parts) > 3:
        raise UserError(f"--set {text}: write it as output=PATH, section.field=value or subsets.NAME.field=value")
    new = _typed_text(value) if _is_text(parts) else load_yaml(value, f"--set {text}")
    for part in parts[:-1]:
        # An empty section is still a section.
        data[part] = {} if data.get(part) is None else data[part]
        data = data[part]
        if not isinstance(data, dict):
            raise UserError(f"--set {text}: {part} is not a section")
    data[parts[-1]] = new


def _typed_text(value: str) -> Any:
    """The typed text, so that no quotes are needed for a partition 007, a glob *.parquet, an origin {url}."""
    try:
        data = load_yaml(value, "")
    except UserError:
        return value
    return data if data is None or isinstance(data, str) else value


def _is_text(parts: list[str]) -> bool:
    section = {1: CorpusRecipe, 2: _SECTIONS.get(parts[0]), 3: SubsetSource if parts[0] == "subsets" else None}
    owner = section[len(parts)]
    field = _fields(owner).get(parts[-1]) if owner else None
    return field is not None and "string" in type_name(field.type).split()


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
    if not isinstance(data.get("subsets"), dict) or not data["subsets"]:
        raise UserError(f"{source}: subsets={shown(data.get('subsets'))} must name one or more subsets, each a section")
    fields = _fields(SubsetSource)
    subsets = {
        str(name): SubsetSource(**_section(fields, entries or {}, f"subsets.{name}.", source))
        for name, entries in data["subsets"].items()
    }
    recipe = CorpusRecipe(**top, **sections, subsets=subsets)
    try:
        check_corpus_recipe(recipe)
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


def check_corpus_recipe(recipe: CorpusRecipe) -> None:
    """UserError for invalid values."""
    for kind, name in (("name", recipe.name), *(("subset", name) for name in recipe.subsets)):
        if not _NAME.fullmatch(name):
            raise UserError(
                f"{kind} {shown(name)} must be letters, digits, '.', '_', '+' and '-', as it names a folder"
            )
        if kind == "subset" and name in _TAKEN:
            raise UserError(f"subset {shown(name)} must have another name: the corpus has a file or folder named so")
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
    """Values in a batch script must be one plain word, so that neither a shell nor sbatch interprets them."""
    words = {"time": slurm.time} | ({} if slurm.partition is None else {"partition": slurm.partition})
    words |= {f"sbatch[{number}]": option for number, option in enumerate(slurm.sbatch)}
    for name, word in words.items():
        if not re.fullmatch(r"[\w.,:=@%/+-]+", word, re.ASCII):
            raise UserError(f"slurm.{name}={shown(word)} must be one word of letters, digits and . , : = @ % / + -")
        if name.startswith("sbatch") and not re.match(r"[a-z]", word):
            raise UserError(f"slurm.{name}={shown(word)} must be an option's long name without dashes, or NAME=VALUE")
