"""Shell completion: verbs and options, recipes, runs, and the fields of --set.

argcomplete runs `txssm` itself at each press of the tab key, with the line in $COMP_LINE, so the imports must be light.
"""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_txssm.cli.parsing import VERBS, build_parser

# Commands whose RECIPE is a corpus recipe.
_OF_CORPORA = ("txssm data shard", "txssm data train-tokenizer")


def complete(**answer: Any) -> None:
    """Answer the shell and end the process; `answer`: arguments of argcomplete.autocomplete."""
    import argcomplete

    typed = os.environ.get("COMP_LINE", "").split()
    parser = build_parser(next((word for word in typed[1:] if word in VERBS), None))
    add_completers(parser)
    argcomplete.autocomplete(parser, **answer)


def add_completers(parser: argparse.ArgumentParser) -> None:
    """Give arguments their completers, by name."""
    completers = {
        "recipe": _recipes,
        "source": _recipes,
        "overrides": _fields,
        "run": _runs,
        "model": _folders,
        "checkpoint": _folders,
        "a": _folders,
        "b": _folders,
        "folder": _folders,
        "corpus": _corpora,
        "corpora": _corpora,
    }
    for action in _actions(parser):
        if action.dest in completers and not action.choices:
            setattr(action, "completer", completers[action.dest])


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from _actions(below)


def _files(prefix: str, *patterns: str) -> list[str]:
    """Folders and matching files in the folder that is typed."""
    folder = Path(prefix) if prefix.endswith("/") else Path(prefix).parent
    found = {path for pattern in ("*/", *patterns) for path in folder.glob(pattern)}
    return [f"{path}/" if path.is_dir() else str(path) for path in sorted(found)]


def _recipes(prefix: str, parser: argparse.ArgumentParser, **rest: object) -> list[str]:
    from megatron_txssm.recipe.loader import recipe_names

    if parser.prog in _OF_CORPORA:
        return _corpora(prefix)
    return [*recipe_names(), *_files(prefix, "*.yaml")]


def _corpora(prefix: str, **_: object) -> list[str]:
    from megatron_txssm.recipe.corpus.loader import CORPUS_RECIPES

    return [*CORPUS_RECIPES.names(), *_files(prefix, "*.yaml")]


def _folders(prefix: str, **_: object) -> list[str]:
    return _files(prefix)


def _runs(prefix: str, **_: object) -> list[str]:
    return [*(path.parent.name for path in sorted(Path("runs").glob("*/recipe.yaml"))), *_files(prefix)]


def _fields(**_: object) -> list[str]:
    from megatron_txssm.recipe.schema import SECTIONS
    from megatron_txssm.recipe.settings.setting import section_fields

    return [f"{name}.{field.name}=" for name, section in SECTIONS.items() for field in section_fields(section)]
