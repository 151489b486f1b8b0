"""Blends that change during training: what each stage draws, that nothing is drawn twice, and that a resume obeys."""

import json
import random
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from megatron_txssm.errors import UserError
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.training.lineage import TrainingData
from megatron_txssm.training.staged_blend import BlendStage, StagedBlend, parse_stages
from tests.data.corpus_fixture import FIRST_TOKEN, make_corpus, make_recipe, numbered_documents, random_documents
from tests.support.tiny_run import Done, sets, txssm

# Of 20 steps of 16 samples: 8, then 3, then the other 9.
STAGES = (
    "data.stages=[{tokens: 4096, weights: {a: 3, b: 1}}, {tokens: 1536, weights: {b: 1}},{weights: {c: 2, a: 1, b: 1}}]"
)
ENDS = (8 * 16, 11 * 16, 20 * 16)
SHARES = ({"a": 0.75, "b": 0.25}, {"b": 1.0}, {"c": 0.5, "a": 0.25, "b": 0.25})
STAGE_ITERS = (8, 3, 9)


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus in which every token stands at one place, and no subset is used up."""
    folder = tmp_path_factory.mktemp("staged")
    first, subsets = FIRST_TOKEN, {}
    for name, counts in {"a": (120, 60, 60), "b": (200, 40), "c": (130,)}.items():
        subsets[name] = []
        for count in counts:
            subsets[name].append(numbered_documents(count, seed=first, first=first))
            first = subsets[name][-1][-1][-1] + 1
    return make_recipe(folder, make_corpus(folder / "corpus", subsets))


def subset_of(blend: StagedBlend, index: int) -> str:
    dataset, _ = blend.locate(index)
    return Path(str(blend.datasets[dataset].dataset_path)).parent.name


def test_every_stage_draws_by_its_own_weights_and_nothing_is_drawn_twice(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, [STAGES])
    assert recipe.stage_iters == STAGE_ITERS
    blend = TrainingData(recipe, 1).samples
    assert isinstance(blend, StagedBlend) and len(blend) == ENDS[-1]
    for start, end, shares in zip((0, *ENDS), ENDS, SHARES, strict=False):
        drawn = Counter(subset_of(blend, index) for index in range(start, end))
        assert drawn.keys() == shares.keys()
        for subset, share in shares.items():
            # Megatron's blend is off by less than one sample a shard, of which a subset has three at most.
            assert abs(drawn[subset] - share * (end - start)) < 3
    assert len({blend.locate(index) for index in range(len(blend))}) == len(blend)
    # Every prediction but the ends of documents is another token of the corpus: no shard has been used up.
    labels = np.concatenate([blend[index]["labels"].numpy() for index in range(len(blend))])
    predicted = labels[labels >= FIRST_TOKEN]
    assert len(predicted) > 9000 and len(np.unique(predicted)) == len(predicted)


def test_a_shard_is_read_in_its_own_order_through_all_stages(recipe_file: Path) -> None:
    blend = TrainingData(load_recipe(recipe_file, [STAGES]), 1).samples
    for dataset in range(len(blend.datasets)):
        samples = [sample for where, sample in map(blend.locate, range(len(blend))) if where == dataset]
        assert samples == list(range(len(samples)))


def test_no_stage_draws_more_than_is_made_ready() -> None:
    from megatron.core.datasets import helpers

    draw = random.Random(0)
    for _ in range(200):
        weights = (0.5, *(draw.choice((0.0, 1.0, 1e-6, draw.random())) for _ in range(draw.randrange(1, 40))))
        stage = BlendStage(draw.randrange(1, 500), weights)
        members = np.flatnonzero(weights)
        shares = np.array([weights[member] for member in members]) / sum(weights)
        dataset, sample = np.zeros(stage.samples, np.int16), np.zeros(stage.samples, np.int64)
        # Compiled, so unknown to the type checker.
        helpers.build_blending_indices(dataset, sample, shares, len(members), stage.samples, False)  # pyright: ignore
        drawn = np.zeros(len(weights), int)
        drawn[members] = np.bincount(dataset, minlength=len(members))
        assert (drawn <= stage.at_most()).all()


@pytest.mark.parametrize("documents", [1, 2, 3])
def test_shards_that_are_used_up_to_the_last_sample_and_beyond(tmp_path: Path, documents: int) -> None:
    # 16 samples a document, to the token; two stages and 320 samples read them up to ten times.
    sizes = [[FIRST_TOKEN] * 512] * documents
    corpus = make_corpus(tmp_path / "corpus", {"a": [sizes, sizes], "b": [sizes]})
    stages = "data.stages=[{tokens: 5120, weights: {a: 1}}, {weights: {a: 1, b: 2}}]"
    blend = TrainingData(load_recipe(make_recipe(tmp_path, corpus), [stages]), 1).samples
    assert len({blend.locate(index) for index in range(len(blend))}) == len(blend) == 320
    assert all(blend[index]["tokens"].shape == (32,) for index in range(320))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("[", "is not a list of"),
        ('[{"samples": 3}]', "is not a list of"),
        ('[{"samples": 10, "weights": [1]}]', "stage 1 has 1 weights for 2 shards"),
        ('[{"samples": 9, "weights": [1, 0]}]', "holds 9 samples, the training 10"),
    ],
)
def test_stages_that_do_not_fit_the_training_are_named(text: str, wanted: str) -> None:
    with pytest.raises(UserError, match=wanted):
        parse_stages(text, shards=2, samples=10)


def losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return {line["iteration"]: line["lm loss"] for line in lines if "lm loss" in line}


@pytest.mark.slow
def test_a_run_resumed_within_a_later_stage_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    documents = random_documents(900, seed=0)
    subsets = {"a": [documents[:300], documents[300:400]], "b": [documents[400:900]]}
    corpus = make_corpus(tmp_path / "corpus", subsets)
    fields = ["data.stages=[{tokens: 1536, weights: {a: 3, b: 1}}, {weights: {b: 1}}]", "training.train_iters=7"]

    def pretrain(name: str, *more: str) -> Done:
        recipe = make_recipe(tmp_path / name, corpus)
        done = txssm(
            "pretrain", str(recipe), "--nproc", "2", *sets([*fields, f"data.cache_path={tmp_path / name}/cache", *more])
        )
        assert done.code == 0, done.stderr
        return done

    with ThreadPoolExecutor(max_workers=2) as pool:
        whole = pool.submit(pretrain, "whole")
        # Three steps of the first stage, two of the second.
        stopped = pool.submit(pretrain, "stopped", "checkpoint.save_interval=100", "megatron.exit_interval=5")
        whole.result()
        stopped.result()
    assert max(losses(tmp_path / "stopped")) == 5
    pretrain("stopped", "checkpoint.save_interval=100")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    assert set(losses(tmp_path / "whole")) == set(range(1, 8))
    # What has been trained writes without the tokens that it was trained on.
    for subset in subsets:
        shutil.rmtree(corpus / subset)
    checkpoints = tmp_path / "stopped" / "run" / "checkpoints"
    done = txssm("generate", str(checkpoints), "--prompt", "def", "--max-new-tokens", "3")
    assert done.code == 0 and "step 7" in done.stdout, done.stderr
