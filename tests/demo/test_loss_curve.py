"""The loss curve: which lines of the metrics count, and that a PNG is written."""

import json

import pytest

from megatron_txssm.demo.loss_curve import TRAINING_KEY, VALIDATION_KEY, plot_loss_curve
from megatron_txssm.errors import UserError
from megatron_txssm.metrics import values_by_step


def _write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_resumed_run_overrides_what_it_repeats(tmp_path):
    lines = [{"iteration": i, TRAINING_KEY: 9.0 - i} for i in range(1, 6)]
    lines += [{"iteration": 4, VALIDATION_KEY: 4.5}, {"iteration": 5, "tokens_per_second": 100.0}]
    lines += [{"iteration": i, TRAINING_KEY: 1.0 - i} for i in range(4, 8)] + [{"iteration": 4, VALIDATION_KEY: 4.25}]
    path = _write(tmp_path / "metrics.jsonl", lines)
    assert values_by_step(path, TRAINING_KEY) == {1: 8.0, 2: 7.0, 3: 6.0, 4: -3.0, 5: -4.0, 6: -5.0, 7: -6.0}
    assert values_by_step(path, VALIDATION_KEY) == {4: 4.25}


def test_broken_lines_and_values_are_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1, "lm loss": 5.0}\n\n[1]\n{"iteration": 2, "lm loss": NaN}\n{"iteration": 3, "lm l')
    assert values_by_step(path, TRAINING_KEY) == {1: 5.0}


@pytest.mark.parametrize("iterations", [1, 30, 300])
def test_a_picture_comes_out_and_is_the_same_each_time(tmp_path, iterations):
    records = [{"iteration": i, TRAINING_KEY: 8.0 / i} for i in range(1, iterations + 1)]
    metrics = _write(tmp_path / "metrics.jsonl", [*records, {"iteration": iterations, VALIDATION_KEY: 5.0}])
    pictures = []
    for name in ("a/one.png", "b/two.png"):
        path = plot_loss_curve(metrics, tmp_path / name, baselines={"unigram": 6.5, "bigram": 4.4})
        assert [entry.name for entry in path.parent.iterdir()] == [path.name]
        pictures.append(path.read_bytes())
    assert pictures[0].startswith(b"\x89PNG")
    assert pictures[0] == pictures[1]


def test_nothing_to_draw_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        plot_loss_curve(tmp_path / "none.jsonl", tmp_path / "x.png", baselines={})
    metrics = _write(tmp_path / "metrics.jsonl", [{"iteration": 1}])
    with pytest.raises(UserError, match='has no "lm loss"'):
        plot_loss_curve(metrics, tmp_path / "x.png", baselines={})
    assert not (tmp_path / "x.png").exists()
