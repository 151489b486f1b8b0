"""Training on associative recall: the loss and the accuracy are of the answers, at any layout and after a resume."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from megatron.core.datasets.utils import Split

from megatron_txssm.metrics import MetricsLine, each_line
from megatron_txssm.recipe.changes import Changes
from megatron_txssm.training.recall import RecallSamples, answers, recall_datasets
from tests.support.megatron_tasks import Task, run_tasks, train
from tests.support.recipes import write_recipe

RECALL: Changes = {
    "data.recall_pairs": (2, 4),
    "training.train_iters": 4,
    "checkpoint.save_interval": 2,
    "logging.eval_iters": None,
    "logging.eval_interval": 4,
    # Not so small that the accuracies are all 0.
    "optimizer.learning_rate": 0.02,
}
# Name -> changes, trained in this order.
RUNS: dict[str, list[Changes]] = {
    "whole": [{}],
    "resumed": [{"megatron.exit_interval": 2}, {"megatron.exit_interval": None}],
    "tensor_parallel": [{"parallel.tensor_model_parallel_size": 2}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tasks = tmp_path_factory.mktemp("recall"), list[Task]()
    for name, parts in RUNS.items():
        for number, changes in enumerate(parts):
            file = write_recipe(folder / f"{name}_{number}.yaml", RECALL, changes, run=folder / name)
            tasks.append((train, {"recipe": file}))
    run_tasks(2, tasks, folder / "ranks")
    return folder


def lines(folder: Path, name: str) -> list[MetricsLine]:
    return list(each_line(folder / name / "metrics.jsonl"))


def losses(folder: Path, name: str) -> list[float]:
    return [line["lm loss"] for line in lines(folder, name) if "lm loss" in line]


def validation(folder: Path, name: str) -> dict[str, float]:
    return {key: value for key, value in lines(folder, name)[-1].items() if key.startswith("validation")}


def test_every_number_of_pairs_has_its_loss_and_accuracy(folder: Path) -> None:
    found = validation(folder, "whole")
    kinds = ("lm loss", "accuracy")
    assert list(found) == [f"validation-{pairs}_pairs {kind}" for pairs in (2, 4) for kind in kinds]
    # A hundred samples of each.
    for pairs in (2, 4):
        right = found[f"validation-{pairs}_pairs accuracy"] * 100 * pairs
        assert right == pytest.approx(round(right), abs=1e-3) and 0 < right < 100 * pairs


def test_a_resume_continues_bit_for_bit(folder: Path) -> None:
    assert len(losses(folder, "whole")) == 4
    assert losses(folder, "resumed") == losses(folder, "whole")
    assert validation(folder, "resumed") == validation(folder, "whole")


def test_another_layout_finds_the_same(folder: Path) -> None:
    assert losses(folder, "tensor_parallel") == pytest.approx(losses(folder, "whole"), rel=1e-4)
    assert validation(folder, "tensor_parallel") == pytest.approx(validation(folder, "whole"), rel=1e-3, abs=5.1e-3)


def arguments(seed: int, **changes: object) -> Namespace:
    given: dict[str, object] = {"seed": seed, "seq_length": 32, "vocab_size": 64, "recall_pairs": [2, 4]}
    return Namespace(**given | {"full_validation": True, "data_parallel_size": 1} | changes)


def test_samples_depend_on_seed_and_index_and_those_of_a_validation_on_neither_the_seed() -> None:
    (first, held_out, _), (other, same, _) = (recall_datasets([8, None, 0], arguments(seed)) for seed in (1, 2))
    again = RecallSamples(Split.train, 8, [2, 4], arguments(1))
    assert [int(first[index]["loss_mask"].sum()) for index in range(4)] == [2, 4, 2, 4]
    assert torch.equal(first[5]["tokens"], again[5]["tokens"])
    for unlike in (other[5], first[7], held_out[1][5]):
        assert not torch.equal(first[5]["tokens"], unlike["tokens"])
    assert len(held_out) == 2 and len(held_out[0]) == 100
    assert torch.equal(held_out[0][3]["tokens"], same[0][3]["tokens"])


def test_only_answers_count() -> None:
    labels = torch.tensor([[3, 0, 1, 0]])
    logits = torch.nn.functional.one_hot(torch.tensor([[3, 0, 2, 0]]), 4) * 5.0
    losses, right = answers(logits, labels, torch.tensor([[1.0, 0.0, 1.0, 0.0]]))
    assert right.tolist() == [1, 2]
    assert losses[0, 2].item() == pytest.approx(5 + losses[0, 0].item())
