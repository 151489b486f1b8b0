"""The tokenizer stored beside a run's checkpoints, which then need neither the corpus nor a hub.

CHECKPOINTS/recipe.yaml     the resolved recipe
CHECKPOINTS/tokenizer/      tokenizer.json or tokenizer.model, and facts.json (data/tokenizer/install.py)
"""

import contextlib
import shutil
import sys
import tempfile
from pathlib import Path

from megatron_txssm.data.tokenizer.install import install_tokenizer
from megatron_txssm.errors import UserError, readable
from megatron_txssm.files import file_sha256
from megatron_txssm.recipe.corpus.schema import TokenizerSource
from megatron_txssm.recipe.corpus.tokenizer import TokenizerFacts, read_tokenizer_facts, tokenizer_model
from megatron_txssm.recipe.recipe import Recipe


def keep_tokenizer(recipe: Recipe, checkpoints: Path) -> None:
    """Copy the recipe's tokenizer beside its checkpoints; only warns if that fails, since training can continue."""
    partial = checkpoints / "tokenizer.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        source = _stated_source(recipe)
        if source is None:
            return
        install_tokenizer(source, partial)
    except UserError as error:
        print(readable(f"warning: no tokenizer is stored beside the checkpoints: {error}"), file=sys.stderr)
        shutil.rmtree(partial, ignore_errors=True)
        return
    shutil.rmtree(checkpoints / "tokenizer", ignore_errors=True)
    partial.rename(checkpoints / "tokenizer")


def kept_tokenizer(checkpoints: Path) -> TokenizerFacts | None:
    """The facts of the tokenizer beside the checkpoints; None if there is none (an older run)."""
    return read_tokenizer_facts(checkpoints) if (checkpoints / "tokenizer" / "facts.json").is_file() else None


def tokenizer_source(recipe: Recipe, checkpoints: Path) -> TokenizerSource | None:
    """The tokenizer beside the checkpoints, otherwise the recipe's; None if the recipe has none.

    UserError if the recipe's is in a corpus that does not exist.
    """
    facts = kept_tokenizer(checkpoints)
    if facts is None:
        return _stated_source(recipe)
    return TokenizerSource(type=facts.type, model=tokenizer_model(checkpoints, facts), eod_token=facts.eod_token)


def other_tokenizer(recipe: Recipe, checkpoints: Path) -> str:
    """How the recipe's tokenizer differs from the one beside checkpoints; empty if not, or if one is unknown."""
    kept = kept_tokenizer(checkpoints)
    own = None if kept is None else _stated_source(recipe)
    beside = None if kept is None else tokenizer_source(recipe, checkpoints)
    if kept is None or own is None or beside is None:
        return ""
    ours = _fingerprint(own)
    if ours is None or ours == _fingerprint(beside):
        return ""
    # The stored copy may be formatted differently from its source.
    if _fingerprint_as_kept(own) in (None, kept.fingerprint, _fingerprint_as_kept(beside)):
        return ""
    return f"SHA-256 {kept.fingerprint[:12]} in {checkpoints / 'tokenizer'}, {ours[:12]} in {own.model}"


def _fingerprint(source: TokenizerSource) -> str | None:
    """SHA-256 of a tokenizer's file; None if it is not on this machine."""
    path = Path(source.model)
    file = path / "tokenizer.json" if path.is_dir() else path
    return file_sha256(file) if file.is_file() else None


def _fingerprint_as_kept(source: TokenizerSource) -> str | None:
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(UserError):
        return install_tokenizer(source, Path(folder) / "tokenizer").fingerprint
    return None


def _stated_source(recipe: Recipe) -> TokenizerSource | None:
    model = recipe.tokenizer_model
    if model is None or recipe.tokenizer_type == "NullTokenizer":
        return None
    corpus = Path(recipe.data.corpus or "")
    stated = recipe.data.tokenizer_model is not None or recipe.data.corpus is None
    return TokenizerSource(
        type=recipe.tokenizer_type, model=model, eod_token=None if stated else read_tokenizer_facts(corpus).eod_token
    )
