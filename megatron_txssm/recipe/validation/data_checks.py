"""Checks of a recipe's data and tokenizer. Each error gives name, value and remedy."""

from collections.abc import Sequence
from pathlib import Path

from megatron_txssm.errors import UserError
from megatron_txssm.recipe.recipe import Recipe


def check_tokenizer_file(recipe: Recipe) -> None:
    """UserError if the tokenizer is a file that does not exist."""
    model = recipe.tokenizer_model
    if model and recipe.tokenizer_type == "SentencePieceTokenizer" and not Path(model).is_file():
        raise UserError(f"data.tokenizer_model={model}: no such file (a relative path starts at {Path.cwd()})")


def check_data(recipe: Recipe) -> None:
    """UserError unless there is one source of data, with what belongs to it."""
    data = recipe.data
    mock = recipe.megatron.get("mock_data")
    sources = ["megatron.mock_data"] if mock else []
    sources += [f"data.{name}" for name in ("corpus", "train", "blend", "recall_pairs") if getattr(data, name)]
    if len(sources) > 1:
        raise UserError(f"{' and '.join(sources)} exclude each other; state one")
    if not sources:
        raise UserError(
            "data.corpus is missing: a directory made by `txssm data shard`; or state data.train, your own token "
            "files, or set megatron.mock_data=true to train on made-up tokens"
        )
    _check_blend(recipe)
    if mock and recipe.logging.eval_iters is None:
        raise UserError(
            "logging.eval_iters=null validates on all data, and megatron.mock_data has 200 million tokens; "
            "set logging.eval_iters to a number of batches, such as 10"
        )
    if data.recall_pairs:
        _check_recall(recipe, data.recall_pairs)
    if mock:
        _check_tokenizer(recipe)
        return
    if data.validation and not data.train:
        raise UserError(
            "data.validation needs data.train; a corpus has its own, and data.blend is divided by data.split"
        )
    if data.blend and data.split is None:
        raise UserError("data.blend needs data.split, such as '99,1,0': shares of train, validation and test")
    if data.split is not None and not data.blend:
        raise UserError(
            f"data.split={data.split!r} needs data.blend; a corpus, data.train and data.validation are used whole"
        )
    tested = any(share.strip(" 0.") for share in (data.split or "").split(",")[2:])
    # `txssm eval loss` sets skip_train and does not read the test set.
    if tested and recipe.logging.eval_iters is None and not recipe.megatron.get("skip_train"):
        raise UserError(
            f"data.split={data.split!r} has a test set, which Megatron cannot read in full after training; "
            "set its share, the third, to 0, or logging.eval_iters to a number of batches"
        )
    if data.train and not data.validation and recipe.logging.eval_iters != 0:
        raise UserError("data.validation is missing; state it, or set logging.eval_iters=0")
    _check_tokenizer(recipe)


def _check_recall(recipe: Recipe, counts: Sequence[int]) -> None:
    if len(set(counts)) < len(counts):
        raise UserError(f"data.recall_pairs={[*counts]} has a number of pairs twice; state each once")
    pairs = max(counts)
    stated = f"data.recall_pairs with {pairs} pairs"
    # Two tokens for each pair, and two for each query; keys are one half of the vocabulary, without token 0.
    for field, value, needed in (
        ("training.seq_length", recipe.training.seq_length, 4 * pairs),
        ("data.vocab_size", recipe.data.vocab_size, 2 * (pairs + 1)),
    ):
        if value < needed:
            raise UserError(f"{stated} needs {field} of at least {needed}, not {value}; raise it, or state fewer pairs")
    if recipe.logging.eval_iters not in (None, 0):
        raise UserError(
            f"logging.eval_iters={recipe.logging.eval_iters}: the held-out samples of data.recall_pairs are read "
            "whole, so that every number of pairs is; set logging.eval_iters=null"
        )
    if recipe.prediction_depths:
        raise UserError(
            f"model.layer_pattern={recipe.model.layer_pattern} predicts further tokens, but in samples of "
            "data.recall_pairs an answer is not followed by another; leave out what follows the /"
        )


def _check_tokenizer(recipe: Recipe) -> None:
    data = recipe.data
    if data.corpus is None and recipe.tokenizer_type != "NullTokenizer" and not data.tokenizer_model:
        raise UserError(f"data.tokenizer_model is missing for tokenizer_type={recipe.tokenizer_type}")


def _check_blend(recipe: Recipe) -> None:
    """Checks of the subsets' mixture that do not need the corpus."""
    data, iters = recipe.data, recipe.stage_iters
    if data.weights and data.stages:
        raise UserError("data.weights and data.stages exclude each other; each stage has its own weights")
    for name in ("weights", "stages"):
        if getattr(data, name) and data.corpus is None:
            raise UserError(f"data.{name} needs data.corpus, whose subsets it names; leave it out")
    if iters[-1] < 1:
        raise UserError(
            f"data.stages: {sum(iters[:-1])} steps before the last stage leave none of the {recipe.train_iters} to it; "
            "shorten the stages or train longer (to run only the beginning, set megatron.exit_interval)"
        )
