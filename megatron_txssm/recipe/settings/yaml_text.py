"""Reading and writing recipe text: YAML with unsurprising scalars, and only plain data.

YAML 1.1, which PyYAML implements, reads 1e-4 as a string, `no` as false, 010 as 8 and 12:30 as 750. Here the scalars
are those of YAML 1.2's core schema. Duplicate keys, aliases and non-string keys are rejected.
"""

import re
from collections.abc import Sequence
from typing import Any, ClassVar

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from megatron_txssm.errors import UserError

_SCALARS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*\.[0-9]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)


# As PyYAML's scanner says.
_ALIAS = "while scanning an alias"


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise ComposerError(_ALIAS, None, "aliases (*name) are not allowed", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_scalar(self, node: yaml.ScalarNode) -> Any:
        value = super().construct_scalar(node)
        # Neither paths nor command lines can contain it.
        if isinstance(value, str) and "\0" in value:
            raise ConstructorError(None, None, "a text contains a zero byte", node.start_mark)
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise ConstructorError(None, None, f"key {key!r} is not a string", key_node.start_mark)
            if key in seen:
                raise ConstructorError(None, None, f"key {key!r} appears twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}


for _tag, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)


def _represent_list(dumper: yaml.SafeDumper, items: Any) -> yaml.Node:
    flat = not any(isinstance(item, list | tuple | dict) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=flat)


_Dumper.add_representer(list, _represent_list)
_Dumper.add_representer(tuple, _represent_list)


def load_yaml(text: str, source: str) -> Any:
    """The data in `text`; UserError names `source`, the line and the reason."""
    try:
        # A subclass of SafeLoader: tags cannot create objects.
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}" if mark else ""
        remedy = "; quote a text that begins with *, such as '*-*-'" if error.context == _ALIAS else ""
        raise UserError(f"{source}{place}: not valid YAML: {error.problem or error.context}{remedy}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{source}: not valid YAML: {reason}") from None


def key_line(text: str, keys: Sequence[str]) -> int | None:
    """The line of the innermost key of a path of `keys` that `text` states; None if it states none."""
    node, line = yaml.compose(text, Loader=_Loader), None
    for key in keys:
        entries = node.value if isinstance(node, yaml.MappingNode) else []
        name, node = next(((name, value) for name, value in entries if name.value == key), (None, None))
        if name is None:
            break
        line = name.start_mark.line + 1
    return line


def dump_yaml(data: object) -> str:
    """`data` as text that `load_yaml` reads back unchanged."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=120)
