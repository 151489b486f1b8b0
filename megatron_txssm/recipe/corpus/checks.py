"""Checks between a corpus recipe's fields. Each error gives name, value and remedy."""

import re

from megatron_txssm.errors import UserError, shown
from megatron_txssm.recipe.corpus.schema import FILTER, KEPT_RECIPE, PLACEHOLDER, CorpusRecipe, Slurm

# Names that become folders, file names and Slurm job names.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
# Names in a corpus directory that are not subsets.
_TAKEN = ("tokenizer", "logs", "plan.json", KEPT_RECIPE)


def check_corpus_recipe(recipe: CorpusRecipe) -> None:
    """UserError for invalid values."""
    for kind, name in (("name", recipe.name), *(("subset", name) for name in recipe.subsets)):
        if not _NAME.fullmatch(name):
            raise UserError(
                f"{kind} {shown(name)} must be letters, digits, '.', '_', '+' and '-', as it names a folder"
            )
        if kind == "subset" and name in _TAKEN:
            raise UserError(
                f"subset {shown(name)} must have another name: the corpus has a file or folder of that name"
            )
    for name, subset in recipe.subsets.items():
        for condition in subset.filters:
            if not FILTER.fullmatch(condition):
                raise UserError(
                    f"subsets.{name}.filters: {shown(condition)} must be FIELD OPERATOR VALUE, such as 'int_score >= 4'"
                )
        if "{blob_id}" not in subset.blob_url:
            raise UserError(f"subsets.{name}.blob_url={shown(subset.blob_url)} must contain {{blob_id}}")
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
