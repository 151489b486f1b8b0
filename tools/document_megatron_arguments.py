"""Write docs/megatron-arguments.md from the tables of recipe/megatron_table.py and schema.py.

python tools/document_megatron_arguments.py > docs/megatron-arguments.md
"""

import textwrap
from collections.abc import Iterable

from megatron_txssm.recipe.megatron_section import owners
from megatron_txssm.recipe.megatron_table import PASSES, REFUSED
from megatron_txssm.recipe.schema import FIXED_ARGUMENTS

INTRODUCTION = """\
# Megatron's arguments

What becomes of every argument of Megatron 0.19.2: it is a recipe's field, or the same in every recipe, or passed on
from the recipe's `megatron:` section, or refused. `tools/document_megatron_arguments.py` makes this page from the table
that recipes are read with (`megatron_txssm/recipe/megatron_table.py`); a test compares that with Megatron's parser.

In the section write an argument by its name in Megatron's namespace or by its flag, with dashes or underscores:
`overlap_grad_reduce: true`, `--overlap-grad-reduce: true`; `bias_swiglu_fusion: false`, `no_bias_swiglu_fusion: true`.
They are one entry, and the one that is read last holds. `null` takes an inherited entry out. A mistake is reported when
the recipe is read.

## Passed on

None changes the model's function. After the name stands what it takes: nothing for true or false, (on) where it is true
unless stated.
"""


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for about, text in PASSES.items():
        parts.append(_paragraph(f"**{about[0].upper()}{about[1:]}**", map(_passed, text.split())))
    parts.append("## Refused\n\nA `*` stands for any ending.\n")
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
