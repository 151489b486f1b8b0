"""The losses on a model card: those of its step, each said once, with the step where it is an earlier one."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

from megatron_txssm.convert.logged_losses import losses_at


def write(run: Path, *lines: dict[str, Any], torn: str = "") -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines) + torn
    (run / "metrics.jsonl").write_text(text)


def test_the_losses_of_a_step(tmp_path: Path) -> None:
    assert losses_at(tmp_path, 4) == {}
    steps = [{"iteration": step, "lm loss": 9.0 - step, "grad_norm": 1.0} for step in range(1, 8)]
    steps.insert(3, {"iteration": 3, "validation lm loss": 6.5})
    write(tmp_path, *steps, torn='{"iteration": 4, "lm l')
    assert losses_at(tmp_path, 3) == {"training loss": 6.0, "validation loss": 6.5}
    assert losses_at(tmp_path, 4) == {"training loss": 5.0, "validation loss, at step 3": 6.5}


def test_a_run_that_went_back(tmp_path: Path) -> None:
    steps = [{"iteration": step, "lm loss": loss} for step, loss in ((1, 5.0), (2, 4.0), (3, 3.0), (2, 4.5))]
    write(tmp_path, *steps)
    assert losses_at(tmp_path, 3) == {"training loss": 3.0}
    assert losses_at(tmp_path, 2) == {"training loss": 4.5}


def test_each_set_has_its_loss_and_an_evaluation_is_worth_more(tmp_path: Path) -> None:
    write(tmp_path, {"iteration": 2, "validation-web lm loss": 4.0, "validation-books lm loss": 3.0})
    assert losses_at(tmp_path, 2) == {"validation loss, web": 4.0, "validation loss, books": 3.0}
    write(tmp_path, {"iteration": 2, "lm loss": 5.0}, {"iteration": 2, "validation lm loss": 3.9})
    (tmp_path / "evaluation").mkdir()
    evaluation = {"step": 2, "sets": {"web": {"loss": 4.25}}}
    (tmp_path / "evaluation" / "validation.json").write_text(json.dumps(evaluation))
    # The run's own is of a few batches of the same data: two figures for one thing.
    assert losses_at(tmp_path, 2) == {"training loss": 5.0, "validation loss, web": 4.25}


def test_a_long_run_takes_no_memory(tmp_path: Path) -> None:
    facts = {f"fact {number}": number / 7 for number in range(12)}
    write(tmp_path, *({"iteration": step, "lm loss": 1.0 * step, **facts} for step in range(5000)))
    tracemalloc.start()
    assert losses_at(tmp_path, 17) == {"training loss": 17.0}
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # All lines at once are 7 MB.
    assert peak < 1e6
