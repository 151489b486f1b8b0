"""`txssm recipes`: the table of recipes, one recipe in full, its Megatron arguments, or the table of fields."""

import argparse
import dataclasses
import json
import shlex
import sys
from typing import Any

from megatron_txssm.cli.parsing import add_verb
from megatron_txssm.errors import UserError
from megatron_txssm.home import BATCH_SCRIPTS
from megatron_txssm.recipe.loader import load_recipe, recipe_folders, recipe_names
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.terminal import print_table


def add_parser(subparsers: Any) -> None:
    parser = add_verb(
        subparsers,
        "recipes",
        [
            "txssm recipes",
            "txssm recipes transxssm_320m",
            "txssm recipes transxssm_320m --megatron-args --set parallel.tensor_model_parallel_size=2",
            "txssm recipes --fields",
        ],
    )
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="name or path; without one, all are listed")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override a field; repeatable")
    parser.add_argument("--megatron-args", action="store_true", help="print Megatron's command line for RECIPE")
    parser.add_argument("--fields", action="store_true", help="print every recipe field with its Megatron argument")


def run(args: argparse.Namespace) -> int:
    if args.fields:
        _print_fields()
    elif args.recipe is not None:
        _print_recipe(args.recipe, args.set, args.megatron_args)
    elif args.set or args.megatron_args:
        raise UserError("--set and --megatron-args need a RECIPE; `txssm recipes` lists them")
    else:
        _print_table()
    return 0


def _print_recipe(name: str, overrides: list[str], megatron: bool) -> None:
    recipe = load_recipe(name, overrides)
    if not megatron:
        print(recipe.to_yaml(), end="")
        return
    print(shlex.join(_megatron_words(recipe)))


def _megatron_words(recipe: Recipe) -> list[str]:
    """Megatron's command line; where the corpus is not made yet, without what only it knows."""
    from megatron_txssm.recipe.corpus_tokenizer import NoCorpus
    from megatron_txssm.session.arguments import megatron_arguments

    try:
        return megatron_arguments(recipe)
    except NoCorpus as error:
        print(f"without the corpus's --train-data-path, --valid-data-path and tokenizer: {error}", file=sys.stderr)
    words = megatron_arguments(dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, corpus=None)))
    if recipe.data.tokenizer_type is None:
        # What a recipe without a corpus would have.
        place = words.index("--tokenizer-type")
        del words[place : place + 2]
    return words


def _print_table() -> None:
    from megatron_txssm.architecture.parameters import count_parameters

    rows = []
    for name in recipe_names():
        recipe = load_recipe(name)
        model, training = recipe.model, recipe.training
        repeats = model.num_layers // len(model.layer_pattern)
        rows.append(
            (
                name,
                f"{repeats} x {model.layer_pattern}",
                str(model.hidden_size),
                str(model.ffn_hidden_size),
                f"{count_parameters(recipe.sizes).total / 1e6:,.1f}M",
                f"{training.seq_length:,}",
                f"{training.global_batch_tokens:,}",
                f"{recipe.optimizer.learning_rate:g}",
                recipe.description,
            )
        )
    print_table(("recipe", "layers", ">hidden", ">ffn", ">params", ">length", ">batch", ">lr", "about"), rows)
    print("S: state-space layer, A: attention layer; length and batch in tokens.")
    print("`txssm recipes NAME` shows one in full.")
    folders = " and ".join(str(folder) for folder in recipe_folders() if folder.is_dir())
    print(f"The recipes are read from {folders}, batch scripts from {BATCH_SCRIPTS}.")


def _print_fields() -> None:
    from megatron_txssm.recipe.schema import SECTIONS
    from megatron_txssm.recipe.setting import section_fields, type_name

    rows = []
    for name, section in {"": Recipe, **SECTIONS}.items():
        for field in section_fields(section):
            rules = field.setting
            # As one would write it in a recipe.
            default = "required" if field.required else json.dumps(field.default).strip('"')
            kind = " | ".join(rules.choices) or type_name(field.type)
            dotted = f"{name}.{field.name}".lstrip(".")
            rows.append((dotted, default, kind, rules.explanation, " ".join(rules.flags)))
    rows.append(("megatron.*", "", "any", "any other Megatron argument, by its name or flag", "that argument"))
    print_table(("field", "default", "type", "meaning", "Megatron argument"), rows)
