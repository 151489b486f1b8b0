"""What a validation reads: the same samples every time; of a corpus, the shards of a folder are one set."""

import json
import math
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.datasets.utils import Split
from megatron.training.datasets.data_samplers import MegatronFullValidationSampler, MegatronPretrainingSampler

from megatron_txssm.data.corpus.blend import corpus_arguments
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.training.validation_sets import WholeSet, by_subset, fixed_validation, of_each_set
from tests.data.corpus_fixture import make_corpus, make_recipe, random_documents
from tests.support.tiny_run import VOCAB_SIZE, TinyRun


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


def test_a_set_is_filled_up_with_samples_that_do_not_count() -> None:
    filled = WholeSet(Samples(5), copies=4)
    assert len(filled) == 8
    assert [int(filled[index]["tokens"][0]) for index in range(8)] == [0, 1, 2, 3, 4, 4, 4, 4]
    assert [float(filled[index]["loss_mask"].sum()) for index in range(8)] == [3, 3, 3, 3, 3, 0, 0, 0]


class Samples:
    """Samples whose tokens are their number."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        assert 0 <= index < self.count
        return {"tokens": torch.full((3,), index), "loss_mask": torch.ones(3)}


def megatrons(**changes: Any) -> Namespace:
    """Megatron's arguments, as a checkpoint of 40 validations would have them."""
    given: dict[str, Any] = {
        "full_validation": False,
        "validation_set_names": None,
        "eval_iters": 3,
        "eval_global_batch_size": 8,
        "data_parallel_size": 1,
        "dataloader_type": "single",
        "consumed_valid_samples": 40 * 24,
    }
    return Namespace(**given | changes)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("held", [20, 24, 1000])
def test_each_validation_reads_the_first_samples(ranks: int, held: int) -> None:
    """Through Megatron's own sampler, on every rank."""
    args = megatrons()
    samples: Any = fixed_validation(Samples(held), args)
    assert samples.split is Split.valid, "or Megatron reads it with the batch size of training"
    readers = [
        iter(MegatronPretrainingSampler(len(samples), args.consumed_valid_samples, 2, rank, ranks))
        for rank in range(ranks)
    ]
    for _ in range(3):
        read = []
        for _ in range(24 // 2 // ranks):
            read += [int(samples[index]["tokens"][0]) for reader in readers for index in next(reader)]
        assert read == [number % held for number in range(24)]


def test_a_loader_that_begins_anew_sees_the_end() -> None:
    samples = fixed_validation(Samples(1000), megatrons(dataloader_type="cyclic"))
    assert len(samples) == 24


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_set_read_whole_counts_each_sample_once(ranks: int) -> None:
    args = megatrons(full_validation=True, data_parallel_size=ranks, eval_iters=None)
    for samples in fixed_validation([Samples(21), Samples(2)], args):
        read = Counter()
        for rank in range(ranks):
            for (index,) in MegatronFullValidationSampler(len(samples), rank, ranks):
                read[int(samples[index]["tokens"][0])] += int(samples[index]["loss_mask"][0])
        assert read == dict.fromkeys(range(samples.samples.count), 1)
        assert len({len(MegatronFullValidationSampler(len(samples), rank, ranks)) for rank in range(ranks)}) == 1


def test_virtual_stages_read_the_same_set() -> None:
    of_stages = [["web 0", "books 0", "code 0"], ["web 1", "books 1", "code 1"]]
    several = {"multiple_validation_sets": True, "virtual_pipeline_model_parallel_size": 2}
    wanted = [["web 0", "web 1"], ["books 0", "books 1"], ["code 0", "code 1"]]
    assert of_each_set(of_stages, megatrons(**several)) == wanted
    for less in ({"multiple_validation_sets": False}, {"virtual_pipeline_model_parallel_size": None}):
        assert of_each_set(of_stages, megatrons(**several | less)) is of_stages


def test_where_nothing_is_validated() -> None:
    assert fixed_validation(None, megatrons()) is None
    samples = Samples(5)
    assert fixed_validation(samples, megatrons(eval_iters=0)) is samples


def test_a_recipe_names_a_set_for_each_subset(tmp_path: Path) -> None:
    subsets = {
        name: [random_documents(20, seed=seed) for seed in seeds] for name, seeds in {"a": (0, 1), "b": (2,)}.items()
    }
    recipe = make_recipe(tmp_path, make_corpus(tmp_path / "corpus", subsets, validation=subsets))
    words = corpus_arguments(load_recipe(recipe, ["logging.eval_iters=null"]))
    names = words[words.index("--validation-set-names") + 1 :][:2]
    prefixes = words[words.index("--valid-data-path") + 1 : words.index("--validation-set-names")]
    assert [Path(prefix).parent.name for prefix in prefixes] == ["a", "a", "b"] and names == ["a", "b"]


@pytest.mark.slow
@pytest.mark.parametrize("stages", [1, 2])
def test_a_pipeline_with_larger_micro_batches_reads_a_set_whole(tiny: TinyRun, stages: int) -> None:
    layout = ["parallel.pipeline_model_parallel_size=2", "training.micro_batch_size=2", "model.layer_pattern=M-*-M-*-"]
    layout.append(f"parallel.virtual_pipeline_stages={stages}")
    done = tiny.pretrain(fields=[*layout, "logging.eval_iters=null", "training.train_iters=1"])
    assert done.code == 0, done.stdout + done.stderr
    last = json.loads((tiny.run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["validation lm loss"] == pytest.approx(math.log(VOCAB_SIZE), abs=0.1)


@pytest.mark.slow
def test_all_validations_read_the_same_samples(tiny: TinyRun) -> None:
    """At a learning rate that changes nothing; stopped after two of three validations, and resumed on two ranks."""
    fields = ["training.train_iters=5", "optimizer.learning_rate=1e-30", "checkpoint.save_interval=3"]
    fields += ["logging.eval_interval=2", "logging.eval_iters=2"]
    for words, more in ([], ["megatron.exit_interval=4"]), (["--nproc", "2"], []):
        done = tiny.pretrain(*words, fields=[*fields, *more])
        assert done.code == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (tiny.run / "metrics.jsonl").read_text().splitlines()]
    losses = {line["iteration"]: line["validation lm loss"] for line in lines if "validation lm loss" in line}
    assert list(losses) == [2, 4, 5]
    assert losses[2] == losses[4] == pytest.approx(losses[5], abs=1e-6)


@pytest.mark.slow
def test_a_run_with_a_test_set_reports_it_and_ends(tiny: TinyRun) -> None:
    """Not before the processes of its loader, which nobody may keep alive."""
    mixture = ["data.train=null", "data.validation=null", f"data.blend={tiny.folder}/data", "data.split='80,10,10'"]
    done = tiny.pretrain(fields=[*mixture, "training.train_iters=2"])
    assert done.code == 0, done.stderr
    lines = [json.loads(line) for line in (tiny.run / "metrics.jsonl").read_text().splitlines()]
    losses = [[name for name in line if name.endswith("lm loss")] for line in lines[1:]]
    assert losses == [["lm loss"], ["lm loss"], ["validation lm loss"], ["test lm loss"]]
