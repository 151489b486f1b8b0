"""From a recipe's name or path to a checked `Recipe`: files, `extends:`, and `--set a.b=c` on top.

A recipe is merged from layers: the file at the root of the `extends:` chain, the files that extend it, then each --set.
Every layer is checked separately, so that a mistake is reported with its location.
"""

import difflib
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_txssm.errors import UserError, nearest, shown
from megatron_txssm.home import RECIPES
from megatron_txssm.recipe.former import refusal, translated
from megatron_txssm.recipe.megatron_section import entry, known_names, passing
from megatron_txssm.recipe.paths import each_path, expanded
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.schema import ALTERNATIVES, SECTIONS
from megatron_txssm.recipe.setting import Field, convert, section_fields, type_name
from megatron_txssm.recipe.validate import validate
from megatron_txssm.recipe.yaml_text import load_yaml

_TOP = {field.name: field for field in section_fields(Recipe)}
_FIELDS = {name: {field.name: field for field in section_fields(section)} for name, section in SECTIONS.items()}

# Dotted field name -> value; `megatron.x`, x a name in Megatron's namespace, for the `megatron:` section.
Layer = dict[str, Any]


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The checked recipe from a file or a name in recipes/, with `overrides` such as "training.train_iters=20"."""
    path = find_recipe(name_or_path)
    layers = [_checked(_parse_override(text), f"--set {text}", None) for text in overrides]
    return _build(_file_layers(path) + layers, path)


def recipe_names() -> list[str]:
    """The recipes that can be run by name: those of the current directory's recipes/ and of this repository's."""
    paths = {path.stem: path for path in reversed(_recipe_files())}
    return sorted(name for name, path in paths.items() if not _read(path).get("abstract"))


def find_recipe(name_or_path: str | Path) -> Path:
    """The file of a recipe; UserError names the nearest known recipe."""
    text = os.path.expanduser(name_or_path)
    if text.endswith((".yaml", ".yml")) or "/" in text:
        return Path(text)
    for path in _recipe_files():
        if path.stem == text:
            return path
    known = sorted({path.stem for path in _recipe_files()})
    raise UserError(
        f"no recipe is named {shown(text)}{nearest(text, known)}; `txssm recipes` lists them, and a path ends in .yaml"
    )


def recipe_folders() -> list[Path]:
    """The folders in which a recipe is looked up by its name, in that order."""
    return list(dict.fromkeys(folder.resolve() for folder in (Path("recipes"), RECIPES)))


def _recipe_files() -> list[Path]:
    return [path for folder in recipe_folders() for path in sorted(folder.glob("*.yaml"))]


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe file{_near_file(path)}") from None
    except IsADirectoryError:
        inside = [str(file) for file in sorted(path.glob("*.y*ml"))]
        hint = f"name a file in it: {', '.join(inside[:5])}" if inside else "a recipe is a YAML file"
        raise UserError(f"{path}: cannot be read as a recipe: it is a folder; {hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a recipe: {error}") from None
    data = load_yaml(text, str(path))
    if not isinstance(data, dict):
        raise UserError(f"{path}: a recipe is a mapping of {', '.join(SECTIONS)}, not {shown(data)}")
    return translated(data)


def _file_layers(path: Path, chain: tuple[Path, ...] = ()) -> list[Layer]:
    """The layers of a file and of the files that it extends, the root first."""
    data = dict(_read(path))
    here = path.resolve()
    if here in chain:
        raise UserError(f"{path}: extends itself: {' -> '.join(p.name for p in (*chain, here))}")
    base, abstract = data.pop("extends", None), data.pop("abstract", False)
    if not isinstance(abstract, bool):
        raise UserError(f"{path}: abstract={shown(abstract)} must be true or false")
    if abstract and not chain:
        raise UserError(f"{path}: this recipe is abstract: it states only what others share; extend it")
    layer = _checked(data, str(path), path.parent.absolute())
    if base is None:
        return [layer]
    if not isinstance(base, str) or not base:
        raise UserError(f"{path}: extends={shown(base)} must be the path or name of one recipe")
    # Fields that identify this recipe are not inherited.
    inherited = _file_layers(_extended(base, path), (*chain, here))
    for below in inherited:
        for name in ("name", "description"):
            below.pop(name, None)
    return [*inherited, layer]


def _extended(base: str, path: Path) -> Path:
    beside = path.parent / base
    if beside.suffix in (".yaml", ".yml") or "/" in base:
        if not os.path.exists(beside):
            raise UserError(f"{path}: extends={shown(base)}: no such recipe file as {beside}{_near_file(beside)}")
        return beside
    beside = path.parent / f"{base}.yaml"
    try:
        return beside if beside.exists() else find_recipe(base)
    except UserError as error:
        raise UserError(f"{path}: extends={shown(base)}: {error}") from None


def _near_file(path: Path) -> str:
    """A hint: the file in the same folder that may be meant."""
    return nearest(str(path), map(str, path.parent.glob("*.y*ml")))


def _parse_override(text: str) -> dict[str, Any]:
    name, equals, value = text.partition("=")
    parts = name.strip().split(".")
    if not equals or not all(parts) or len(parts) > 2:
        raise UserError(f"--set {text}: write it as section.field=value, such as training.train_iters=20")
    known = _field(parts)
    # A text field takes the typed text, so that a name such as 007 needs no quotes.
    is_text = known is not None and "string" in type_name(known.type)
    data: Any = value
    # YAML would take a leading * for an alias.
    if not (is_text and value.startswith("*")):
        data = load_yaml(value, f"--set {text}")
    if is_text and isinstance(data, bool | int | float):
        data = value
    for part in reversed(parts):
        data = {part: data}
    return data


def _field(parts: Sequence[str]) -> Field | None:
    if len(parts) == 1:
        return _TOP.get(parts[0])
    return _FIELDS.get(parts[0], {}).get(parts[1])


def _checked(data: dict[str, Any], source: str, folder: Path | None) -> Layer:
    """One layer with known names and correctly typed values; `folder` is its file's, None for the command line."""
    layer: Layer = {}
    command_line = folder is None
    known = [*_TOP, *SECTIONS, "megatron", *([] if command_line else ["extends", "abstract"])]
    for name, value in data.items():
        if name in _TOP:
            layer[name] = _converted(value, _TOP[name], name, source, folder)
        elif name in _FIELDS or name == "megatron":
            # An empty section has no entries.
            entries = {} if value is None and not command_line else value
            if not isinstance(entries, dict):
                raise UserError(f"{source}: {name}={shown(value)} must be a section with fields")
            layer.update(_checked_section(name, entries, source, folder))
        else:
            raise UserError(f"{source}: unknown key {name!r}{nearest(name, known) or _elsewhere(name)}")
    return layer


def _checked_section(section: str, entries: dict[str, Any], source: str, folder: Path | None) -> Layer:
    layer: Layer = {}
    for name, value in entries.items():
        dotted = f"{section}.{name}"
        if section == "megatron":
            known, converted = _megatron_entry(name, _plain(value, dotted, source), source, folder)
            if f"megatron.{known}" in layer:
                raise UserError(f"{source}: {dotted} is set twice, once under another spelling; state it once")
            layer[f"megatron.{known}"] = converted
        elif name in _FIELDS[section]:
            layer[dotted] = _converted(value, _FIELDS[section][name], dotted, source, folder)
        else:
            hint = refusal(dotted, entries) or nearest(name, _FIELDS[section]) or _elsewhere(name)
            raise UserError(f"{source}: unknown key {dotted!r}{hint}")
    return layer


def _elsewhere(name: str) -> str:
    """A hint: another section's field of the same or a similar name."""
    homes = {field: f"{section}.{field}" for section, fields in _FIELDS.items() for field in fields}
    matches = difflib.get_close_matches(name, homes, n=1)
    return f"; did you mean {homes[matches[0]]!r}?" if matches else ""


# Rejected by name: users may know it from other models.
_DYNAMIC = (
    "changes the frequencies within a sequence, which contradicts a state accumulated under the old ones; "
    "use linear with rotary_interpolation_factor"
)


def _converted(value: Any, field: Field, dotted: str, source: str, folder: Path | None) -> Any:
    if dotted == "model.rope_scaling" and value == "dynamic":
        raise UserError(f"{source}: {dotted}='dynamic' {_DYNAMIC}")
    try:
        converted = convert(value, field)
        return each_path(converted, lambda path: expanded(path, folder)) if field.setting.path else converted
    except ValueError as error:
        hint = nearest(value, field.setting.choices) if isinstance(value, str) else ""
        raise UserError(f"{source}: {dotted}={shown(value)} {error}{hint}") from None


def _megatron_entry(name: str, value: Any, source: str, folder: Path | None) -> tuple[str, Any]:
    try:
        known, converted = entry(name, value)
        is_path = passing()[known].kind == "path"
        return known, each_path(converted, lambda path: expanded(path, folder)) if is_path else converted
    except KeyError as unknown:
        hint = nearest(unknown.args[0], known_names())
        raise UserError(f"{source}: megatron.{name}: Megatron has no such argument{hint}") from None
    except ValueError as error:
        raise UserError(f"{source}: megatron.{name}={shown(value)}{error}") from None


def _plain(value: Any, dotted: str, source: str) -> Any:
    """A scalar or a list of scalars for Megatron's parser, which checks the rest."""
    scalar = str | int | float | bool | None
    if isinstance(value, scalar) or (isinstance(value, list) and all(isinstance(item, scalar) for item in value)):
        return value
    raise UserError(f"{source}: {dotted}={shown(value)} must be one value or a list of values")


def _build(layers: list[Layer], path: Path) -> Recipe:
    merged: Layer = {}
    for layer in layers:
        for groups in ALTERNATIVES:
            for stated in groups:
                if layer.get(stated[0]) is not None:
                    others = [group for group in groups if group is not stated]
                    for name in itertools.chain(*others):
                        merged.pop(name, None)
        merged.update(layer)
    merged.setdefault("name", path.stem)
    if merged.get("data.vocab_size") is None and merged.get("data.corpus") is not None:
        merged["data.vocab_size"] = _corpus_vocab_size(merged["data.corpus"], path)
    sections = {name: _section(name, merged, path) for name in SECTIONS}
    top = {name: merged[name] for name in _TOP if name in merged}
    megatron = {k.partition(".")[2]: v for k, v in merged.items() if k.startswith("megatron.")}
    recipe = Recipe(**top, **sections, megatron=megatron)
    try:
        validate(recipe)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return recipe


def _corpus_vocab_size(corpus: str, path: Path) -> int:
    from megatron_txssm.recipe.corpus_tokenizer import read_tokenizer_facts

    try:
        return read_tokenizer_facts(Path(corpus)).vocab_size
    except UserError as error:
        raise UserError(
            f"{path}: data.vocab_size is not stated, and data.corpus={corpus} does not provide it ({error}); "
            "state it to use the recipe before the corpus is made"
        ) from None


def _section(section: str, merged: Layer, path: Path) -> Any:
    values = {}
    for field in _FIELDS[section].values():
        dotted = f"{section}.{field.name}"
        if dotted in merged and not (field.setting.found and merged[dotted] is None):
            values[field.name] = merged[dotted]
        elif field.required:
            raise UserError(f"{path}: {dotted} is missing ({field.setting.explanation}; {type_name(field.type)})")
    return SECTIONS[section](**values)
