"""From a recipe's file to its fields: `extends:`, and `--set a.b=c` on top.

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
from megatron_txssm.recipe.settings.kind import SUFFIXES, Kind, near_file
from megatron_txssm.recipe.settings.paths import each_path, expanded
from megatron_txssm.recipe.settings.setting import Field, convert
from megatron_txssm.recipe.settings.source import Source
from megatron_txssm.recipe.settings.yaml_text import load_yaml

# Section -> field -> value. Section "" has the fields outside of sections, "subsets.web" those of the subset web; None
# removes an inherited subset.
Layer = dict[str, dict[str, Any] | None]
Merged = dict[str, dict[str, Any]]
# Groups of dotted fields: if a layer states the first of one group, the fields of the others below it are dropped.
Alternatives = tuple[tuple[tuple[str, ...], ...], ...]


def file_layers(kind: Kind, path: Path, chain: tuple[Path, ...] = ()) -> list[Layer]:
    """The layers of a file and of the files that it extends, the root first."""
    data, source = kind.read(path)
    here = path.resolve()
    if here in chain:
        raise UserError(f"{path}: extends itself: {' -> '.join(p.name for p in (*chain, here))}")
    base, abstract = data.pop("extends", None), data.pop("abstract", False)
    if not isinstance(abstract, bool):
        raise source.error(f"abstract={shown(abstract)} must be true or false", "abstract")
    if abstract and not chain:
        raise UserError(f"{path}: this {kind.noun} is abstract: it states only what others share; extend it")
    layer = _checked(kind, data, source)
    if base is None:
        return [layer]
    if not isinstance(base, str) or not base:
        raise source.error(f"extends={shown(base)} must be the path or name of one {kind.noun}", "extends")
    inherited = file_layers(kind, _extended(kind, base, path, source), (*chain, here))
    for top in filter(None, (below.get("") for below in inherited)):
        for name in kind.own:
            top.pop(name, None)
    return [*inherited, layer]


def _extended(kind: Kind, base: str, path: Path, source: Source) -> Path:
    beside = path.parent / base
    stated = f"extends={shown(base)}"
    if beside.suffix in SUFFIXES or "/" in base:
        if not os.path.exists(beside):
            message = f"{stated}: no such {kind.noun} file as {beside}{near_file(beside)}"
            raise source.error(message, "extends")
        return beside
    beside = path.parent / f"{base}.yaml"
    try:
        return beside if beside.exists() else kind.find(base)
    except UserError as error:
        raise source.error(f"{stated}: {error}", "extends") from None


def override(kind: Kind, text: str) -> Layer:
    """The layer of one --set option, such as "training.train_iters=20"."""
    source = Source(f"--set {text}")
    name, equals, value = text.partition("=")
    parts = name.strip().split(".")
    depth = 3 if parts[0] in kind.named else 2
    if len(parts) > depth == 3:
        # A subset's name may contain dots.
        parts = [parts[0], ".".join(parts[1:-1]), parts[-1]]
    if not equals or not all(parts) or len(parts) > depth:
        raise source.error(f"write it as {kind.usage}")
    table = kind.fields.get("" if len(parts) == 1 else parts[0], {})
    # The field that the option names; a section is none.
    field = table.get(parts[-1]) if len(parts) in (1, depth) else None
    data = _typed_text(value, source) if field and field.is_text else load_yaml(value, source.name)
    for part in reversed(parts):
        data = {part: data}
    return _checked(kind, data, source)


def _typed_text(value: str, source: Source) -> Any:
    """The typed text, so that no quotes are needed for a partition 007, a glob *.parquet, an origin {url}."""
    try:
        data = load_yaml(value, source.name)
    except UserError:
        # Between quotes it is no syntax; characters that no file may contain are still refused.
        load_yaml("'" + value.replace("'", "''") + "'", source.name)
        return value
    return data if data is None or isinstance(data, str) else value


def _checked(kind: Kind, data: dict[str, Any], source: Source) -> Layer:
    """A layer with known names and correctly typed values."""
    layer: Layer = {}
    top = kind.fields[""]
    for name, value in data.items():
        if name in top:
            stated = layer[""] = layer.get("") or {}
            stated[name] = _converted(value, top[name], source, name)
        elif name in kind.named:
            for key, entries in _named(name, value, source).items():
                section = f"{name}.{key}"
                layer[section] = (
                    None if entries is None else _section(kind, kind.fields[name], entries, source, name, key)
                )
        elif name in kind.open:
            layer[name] = _open_section(kind, name, value, source)
        elif name in kind.fields:
            layer[name] = _section(kind, kind.fields[name], value, source, name)
        else:
            known = [*top, *kind.sections, *([] if source.is_command_line else ["extends", "abstract"])]
            raise source.error(f"unknown key {name!r}{nearest(name, known) or _elsewhere(kind, name)}", name)
    return layer


def _named(name: str, value: Any, source: Source) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        raise source.error(f"{name}={shown(value)} must name one or more {name}, each a section", name)
    return value


def _entries(value: Any, source: Source, *keys: str) -> dict[str, Any]:
    # An empty section has no entries.
    entries = {} if value is None and not source.is_command_line else value
    if not isinstance(entries, dict):
        raise source.error(f"{'.'.join(keys)}={shown(value)} must be a section with fields", *keys)
    return entries


def _section(kind: Kind, table: dict[str, Field], value: Any, source: Source, *keys: str) -> dict[str, Any]:
    entries = _entries(value, source, *keys)
    for name in entries:
        if name not in table:
            dotted = ".".join((*keys, name))
            hint = kind.replacement(dotted, entries) or nearest(name, table) or _elsewhere(kind, name)
            raise source.error(f"unknown key {dotted!r}{hint}", *keys, name)
    return {name: _converted(entry, table[name], source, *keys, name) for name, entry in entries.items()}


def _open_section(kind: Kind, section: str, value: Any, source: Source) -> dict[str, Any]:
    stated: dict[str, Any] = {}
    for name, entry in _entries(value, source, section).items():
        known, converted = kind.open[section](name, entry, source)
        if known in stated:
            message = f"{section}.{name} is set twice, once under another spelling; state it once"
            raise source.error(message, section, name)
        stated[known] = converted
    return stated


def _elsewhere(kind: Kind, name: str) -> str:
    """A hint: another section's field of the same or a similar name."""
    tables = {section: table for section, table in kind.fields.items() if section and section not in kind.named}
    homes = {field: f"{section}.{field}" for section, table in tables.items() for field in table}
    matches = difflib.get_close_matches(name, homes, n=1)
    return f"; did you mean {homes[matches[0]]!r}?" if matches else ""


def _converted(value: Any, field: Field, source: Source, *keys: str) -> Any:
    try:
        converted = convert(value, field)
        if field.setting.check:
            field.setting.check(converted)
        return each_path(converted, lambda path: expanded(path, source.folder)) if field.setting.path else converted
    except ValueError as error:
        hint = nearest(value, field.choices) if isinstance(value, str) else ""
        raise source.error(f"{'.'.join(keys)}={shown(value)} {error}{hint}", *keys) from None
    except UserError as error:
        raise source.error(str(error), *keys) from None


def merged(layers: Sequence[Layer], alternatives: Alternatives = ()) -> Merged:
    """The fields that the layers state together; later ones win."""
    result: Merged = {}
    for layer in layers:
        for groups in alternatives:
            for stated in groups:
                if _value(layer, stated[0]) not in (None, False):
                    for dotted in itertools.chain(*(group for group in groups if group is not stated)):
                        section, _, name = dotted.partition(".")
                        result.get(section, {}).pop(name, None)
        for section, values in layer.items():
            if values is None and section in result:
                del result[section]
            else:
                result.setdefault(section, {}).update(values or {})
    return result


def _value(layer: Layer, dotted: str) -> Any:
    section, _, name = dotted.partition(".")
    return (layer.get(section) or {}).get(name)


def complete(table: dict[str, Field], stated: dict[str, Any], prefix: str, path: Path) -> dict[str, Any]:
    """The keyword arguments of a section's dataclass; UserError if a required field is missing."""
    values = {}
    for field in table.values():
        if field.name in stated and not (field.setting.found and stated[field.name] is None):
            values[field.name] = stated[field.name]
        elif field.required:
            needed = f"{field.setting.explanation}; {field.type_name}"
            raise UserError(f"{path}: {f'{prefix}.{field.name}'.lstrip('.')} is missing ({needed})")
    return values
