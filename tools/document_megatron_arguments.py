"""Generates docs/megatron-arguments.md from the tables of recipe/megatron_arguments/table.py and recipe/schema.py.

python tools/document_megatron_arguments.py > docs/megatron-arguments.md
"""

import textwrap
from collections.abc import Iterable

from megatron_txssm.recipe.megatron_arguments.section import owners
from megatron_txssm.recipe.megatron_arguments.table import PASSES, REFUSED
from megatron_txssm.recipe.schema import FIXED_ARGUMENTS

INTRODUCTION = """\
# Megatron's arguments

Every argument of Megatron 0.19.2 is either a recipe field, or fixed for all recipes, or passed on from the recipe's
`megatron:` section, or refused. `tools/document_megatron_arguments.py` generates this page from the tables that the
recipe loader uses (`megatron_txssm/recipe/megatron_arguments/table.py`, `megatron_txssm/recipe/schema.py`). A test
compares the tables with Megatron's parser.

In the `megatron:` section, name an argument by its name in Megatron's namespace or by its flag, with dashes or
underscores: `overlap_grad_reduce: true`, `--overlap-grad-reduce: true`; `bias_swiglu_fusion: false`,
`no_bias_swiglu_fusion: true`. All spellings are the same entry, and the last one read takes effect. `null` removes an
inherited entry. Mistakes are reported when the recipe is read.

## Passed on

None of these changes the model's function. Each name is followed by the kind of value: nothing for true or false, (on)
if true is the default.
"""


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for about, text in PASSES.items():
        parts.append(_paragraph(f"**{about[0].upper()}{about[1:]}**", map(_passed, text.split())))
    parts.append("## Refused\n\n`*` matches any ending.\n")
    parts += [_paragraph(f"**{reason}**", map("`{}`".format, text.split())) for reason, text in REFUSED.items()]
    parts.append("## The same in every recipe\n")
    parts.append("".join(f"- `{' '.join(words)}`\n" for words in FIXED_ARGUMENTS))
    parts.append("## Fields of a recipe\n\n| Megatron | recipe |\n|---|---|")
    return "\n".join(parts) + "\n" + "".join(f"| `{flag}` | `{field}` |\n" for flag, field in sorted(owners().items()))


def _passed(text: str) -> str:
    name, _, kind = text.partition(":")
    kind = {"": "", "off": " (on)"}.get(kind, f" {kind.replace('|', ', ').replace('+', ' (list)')}")
    return f"`{name}`{kind}"


def _paragraph(heading: str, items: Iterable[str]) -> str:
    words = f"{heading}: {'; '.join(items)}."
    return textwrap.fill(words, 120, break_long_words=False, break_on_hyphens=False) + "\n"


if __name__ == "__main__":
    print(page(), end="")
