"""A validation loss for each subset: the shards of one folder are one set, in order, none left out."""

import json
import math
from pathlib import Path

import pytest
from megatron.core.datasets.utils import Split

from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.training.validation_sets import by_subset
from tests.data.corpus_fixture import make_corpus, make_recipe, random_documents
from tests.training.tiny_run import VOCAB_SIZE, TinyRun


class Shard:
    """As much of a GPTDataset as a validation set needs."""

    def __init__(self, path: str, samples: int) -> None:
        self.dataset_path, self.samples = path, samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[str, int]:
        return self.dataset_path, index


def test_shards_of_a_folder_are_one_set() -> None:
    shards = [Shard("corpus/web/00000.validation", 2), Shard("corpus/web/00003.validation", 1), Shard("corpus/b/0", 3)]
    web, books = by_subset(shards)
    assert [web[index] for index in range(len(web))] == [
        ("corpus/web/00000.validation", 0),
        ("corpus/web/00000.validation", 1),
        ("corpus/web/00003.validation", 0),
    ]
    assert len(books) == 3
    assert web.split is Split.valid, "or Megatron reads it with the batch size of training"


def test_a_recipe_names_a_set_for_each_subset(tmp_path: Path) -> None:
    subsets = {
        name: [random_documents(20, seed=seed) for seed in seeds] for name, seeds in {"a": (0, 1), "b": (2,)}.items()
    }
    recipe = make_recipe(tmp_path, make_corpus(tmp_path / "corpus", subsets, validation=subsets))
    words = load_recipe(recipe, ["logging.eval_iters=null"]).corpus_arguments
    names = words[words.index("--validation-set-names") + 1 :][:2]
    prefixes = words[words.index("--valid-data-path") + 1 : words.index("--validation-set-names")]
    assert [Path(prefix).parent.name for prefix in prefixes] == ["a", "a", "b"] and names == ["a", "b"]


@pytest.mark.slow
def test_a_pipeline_with_larger_micro_batches_reads_a_set_whole(tiny: TinyRun) -> None:
    layout = ["parallel.pipeline_model_parallel_size=2", "training.micro_batch_size=2"]
    done = tiny.pretrain(fields=[*layout, "logging.eval_iters=null", "training.train_iters=1"])
    assert done.code == 0, done.stdout + done.stderr
    last = json.loads((tiny.run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["validation lm loss"] == pytest.approx(math.log(VOCAB_SIZE), abs=0.1)
