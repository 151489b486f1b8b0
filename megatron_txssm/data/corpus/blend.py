"""Computes Megatron's blend of shards from a corpus, the weights of its subsets and a number of tokens.

Weights are shares of the tokens and belong to subsets. Megatron's weights belong to shards: a subset's weight is
divided over its shards in proportion to their tokens. If weights change during training (stages), Megatron's own blend
gets their average, and `--blend-stages` (see training/staged_blend.py) states those of each stage.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_txssm.data.corpus.manifest import Corpus, ShardRecord, Subset, open_corpus, read_plan
from megatron_txssm.data.corpus.shard import check_shard
from megatron_txssm.errors import UserError, nearest
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.settings.setting import Blend, Weights, argument


@dataclass(frozen=True)
class Share:
    """The tokens drawn from one subset."""

    subset: str
    # Share of all tokens drawn.
    weight: float
    # Training tokens of the subset.
    available: int
    drawn: float

    @property
    def epochs(self) -> float:
        return self.drawn / self.available


@dataclass(frozen=True)
class Stage:
    """A part of the training with one blend."""

    tokens: int
    # Shares, which sum to 1.
    weights: Weights


@dataclass(frozen=True)
class CorpusBlend:
    """A corpus and the stages of its blend, in order; at least one."""

    corpus: Corpus
    stages: tuple[Stage, ...]

    @property
    def average(self) -> Stage:
        """All stages averaged into one."""
        if len(self.stages) == 1:
            return self.stages[0]
        tokens = sum(stage.tokens for stage in self.stages)
        names = dict.fromkeys(name for stage in self.stages for name in stage.weights)
        drawn = {name: sum(stage.tokens * stage.weights.get(name, 0) for stage in self.stages) for name in names}
        return Stage(tokens, {name: drawn[name] / tokens for name in names})

    def shares(self, stage: Stage) -> list[Share]:
        subsets = self.corpus.subsets
        return [
            Share(name, weight, subsets[name].tokens("train"), weight * stage.tokens)
            for name, weight in stage.weights.items()
        ]

    def shards(self, split: str) -> list[tuple[str, str, ShardRecord]]:
        """(subset, path prefix, record) of every shard that any stage draws from, in Megatron's order."""
        return [
            (name, prefix, record)
            for name in self.average.weights
            for prefix, record in _filled_shards(self.corpus.subsets[name], split)
        ]

    def shard_weights(self, split: str, weights: Weights) -> list[float]:
        """The weight of each of `shards(split)`; 0 if its subset has none."""
        tokens = {name: self.corpus.subsets[name].tokens(split) for name in self.average.weights}
        return [weights.get(name, 0.0) * record.tokens / tokens[name] for name, _, record in self.shards(split)]

    def megatron_blend(self, split: str) -> Blend:
        """(weight, path prefix) of each shard, averaged over the stages."""
        prefixes = [prefix for _, prefix, _ in self.shards(split)]
        return tuple(zip(self.shard_weights(split, self.average.weights), prefixes, strict=True))


def blend_corpus(corpus: Corpus, tokens: int, weights: Mapping[str, float] | None = None) -> CorpusBlend:
    """One blend for all `tokens`; weights in any unit (None: in proportion to the subsets' training tokens)."""
    if weights is None:
        weights = {name: subset.tokens("train") for name, subset in corpus.subsets.items() if subset.tokens("train")}
        if not weights:
            raise UserError(f"{corpus.directory} holds no training document; check its sources")
    return CorpusBlend(corpus, (Stage(tokens, _normalised(weights, corpus)),))


def recipe_blend(recipe: Recipe) -> CorpusBlend:
    """The blend of a recipe with data.corpus; UserError if the corpus is unfinished or lacks a subset that it names."""
    data, batch = recipe.data, recipe.training.global_batch_tokens
    assert data.corpus is not None
    parts = [stage["weights"] for stage in data.stages or ()] or ([data.weights] if data.weights else [])
    try:
        # A subset without a weight may be unfinished.
        corpus = open_corpus(data.corpus, {name for weights in parts for name in weights} if parts else None)
    except UserError as error:
        raise type(error)(f"data.corpus: {error}") from None
    if data.stages is None:
        return blend_corpus(corpus, recipe.train_iters * batch, data.weights)
    weights = [_normalised(stage["weights"], corpus) for stage in data.stages]
    return CorpusBlend(corpus, tuple(Stage(n * batch, w) for n, w in zip(recipe.stage_iters, weights, strict=True)))


def corpus_arguments(recipe: Recipe) -> list[str]:
    """Megatron's arguments for a recipe's corpus: its shards with their weights, and its stages if it has any."""
    blend = recipe_blend(recipe)
    words = argument("--train-data-path", blend.megatron_blend("train"))
    validation = blend.megatron_blend("validation")
    if recipe.logging.eval_iters is None:
        # Every set is read whole: Megatron then rejects weights, and takes non-numeric words as bare prefixes.
        words += ["--valid-data-path", *(prefix for _, prefix in validation)]
        # One loss per subset, not per shard: see training/validation_sets.py.
        words += ["--validation-set-names", *dict.fromkeys(name for name, _, _ in blend.shards("validation"))]
    elif recipe.logging.eval_iters > 0:
        words += argument("--valid-data-path", validation)
    if len(blend.stages) > 1:
        words += ["--blend-stages", _stages_text(blend, recipe)]
    return words


def check_corpus(recipe: Recipe) -> None:
    """UserError unless the recipe's corpus is finished, its shards are whole and its tokenizer is the recipe's."""
    blend = recipe_blend(recipe)
    _check_tokenizer(blend.corpus, recipe)
    splits = ["train"] if recipe.logging.eval_iters == 0 else ["train", "validation"]
    if "validation" in splits and not blend.shards("validation"):
        raise UserError(
            f"data.corpus={blend.corpus.directory}: no validation documents in {', '.join(blend.average.weights)}; "
            "set logging.eval_iters=0, or shard it again, to another output, with a larger validation_fraction"
        )
    for split in splits:
        for _, prefix, record in blend.shards(split):
            found = check_shard(prefix)
            if (found.documents, found.tokens) != (record.documents, record.tokens):
                raise UserError(
                    f"{prefix}.bin holds {found.tokens} tokens in {found.documents} documents, its manifest says "
                    f"{record.tokens} in {record.documents}; redo the tasks that `txssm data verify` lists"
                )
            whole = split == "validation" and recipe.logging.eval_iters is None
            if whole and record.tokens <= recipe.training.seq_length:
                # `txssm eval` reads all of it.
                evaluates = recipe.megatron.get("skip_train")
                remedy = "state a smaller length" if evaluates else "set logging.eval_iters to a number"
                raise UserError(
                    f"{prefix}.bin holds {record.tokens} tokens, less than one sample of seq_length="
                    f"{recipe.training.seq_length} and the token after it; {remedy}"
                )


def _normalised(weights: Mapping[str, float], corpus: Corpus) -> Weights:
    """Weights that sum to 1; UserError for a subset that the corpus lacks, or that has no training tokens."""
    for name in weights:
        if name not in corpus.subsets:
            known = read_plan(corpus.directory).tasks
            raise UserError(
                f"the weights name {name!r}, but {corpus.directory} holds {', '.join(known)}{nearest(name, known)}"
            )
        if not corpus.subsets[name].tokens("train"):
            raise UserError(
                f"subset {name} of {corpus.directory} holds no training tokens; leave it out of the weights"
            )
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def _filled_shards(subset: Subset, split: str) -> list[tuple[str, ShardRecord]]:
    return [(prefix, record) for prefix, record in subset.shards(split) if record.tokens > 0]


def _stages_text(blend: CorpusBlend, recipe: Recipe) -> str:
    stages = [
        {"samples": iters * recipe.global_batch_size, "weights": blend.shard_weights("train", stage.weights)}
        for iters, stage in zip(recipe.stage_iters, blend.stages, strict=True)
    ]
    return json.dumps(stages, separators=(",", ":"))


def _check_tokenizer(corpus: Corpus, recipe: Recipe) -> None:
    facts, data = corpus.tokenizer, recipe.data
    if data.tokenizer_type not in (None, facts.type):
        raise UserError(
            f"data.tokenizer_type={data.tokenizer_type}, but {corpus.directory} was made with a {facts.type}; "
            "leave data.tokenizer_type out"
        )
    if data.tokenizer_model is not None and _fingerprint(Path(data.tokenizer_model)) not in (None, facts.fingerprint):
        raise UserError(
            f"data.tokenizer_model={data.tokenizer_model} is not the tokenizer that {corpus.directory} was made with; "
            "leave data.tokenizer_model out"
        )
    if data.vocab_size < facts.vocab_size:
        raise UserError(
            f"data.vocab_size={data.vocab_size} is less than the {facts.vocab_size} tokens of {corpus.directory}; "
            f"set data.vocab_size={facts.vocab_size}"
        )


def _fingerprint(model: Path) -> str | None:
    """SHA-256 of a tokenizer's local file; None if it is a name on the Hub."""
    file = model / "tokenizer.json" if model.is_dir() else model
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None
