"""Pictures of runs: what is drawn, and that the same metrics give the same bytes."""

import json
from typing import Any

import numpy as np
import pytest

from megatron_txssm.errors import UserError
from megatron_txssm.reporting import plot
from megatron_txssm.reporting.plot import plot_runs


def a_run(folder, steps):
    folder.mkdir()
    of_step = {"grad_norm": 0.5}
    lines = [of_step | {"iteration": n, "lm loss": 8.0 / n, "consumed_tokens": 9 * n} for n in range(1, steps + 1)]
    lines.append({"iteration": steps, "validation lm loss": 5.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize(("name", "steps"), [("one.png", 1), ("one.png", 300), ("one.svg", 30)])
def test_a_picture_comes_out_and_is_the_same_each_time(tmp_path, name, steps):
    run, pictures = a_run(tmp_path / "run", steps), []
    for folder in ("a", "b"):
        path = plot_runs([run], tmp_path / folder / name, baselines={"unigram": 6.5, "bigram": 4.4})
        assert [entry.name for entry in path.parent.iterdir()] == [path.name]
        pictures.append(path.read_bytes())
    assert pictures[0].startswith(b"\x89PNG" if name.endswith("png") else b"<?xml")
    assert pictures[0] == pictures[1]


def test_every_run_is_in_every_panel_over_what_was_asked(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plot, "write_figure", lambda figure, path: drawn.append(figure))
    runs = [a_run(tmp_path / "short", 20), a_run(tmp_path / "long", 100)]
    plot_runs(runs, tmp_path / "x.png", panels=["loss", "throughput"], over="tokens", smooth=5)
    loss, throughput = drawn[0].axes
    labels = [label for label in loss.get_legend_handles_labels()[1] if "validation" not in label]
    assert labels == ["short, mean over 5 steps", "long, mean over 5 steps"]
    # Of each run all steps, their mean, and the validation.
    assert [len(line.get_xdata()) for line in loss.lines] == [20, 20, 1, 100, 100, 1]
    assert [line.get_xdata()[-1] for line in loss.lines] == [180] * 3 + [900] * 3
    assert loss.lines[3].get_ydata()[3] == 2.0
    # The first steps' losses of 8 and 4 are outside.
    assert 5.0 < loss.get_ylim()[1] < 8.0
    assert throughput.texts[0].get_text() == "no values in metrics.jsonl"


def test_of_many_points_no_spike_is_lost():
    values = np.ones(100_000)
    values[77_777], values[5], values[6] = 50.0, np.nan, -3.0
    x, y = plot._extremes(np.arange(100_000.0), values)
    assert len(x) <= plot.MOST_POINTS and (x[y == 50.0], x[y == -3.0]) == ([77_777], [6])
    assert (np.diff(x) > 0).all()


def test_mistakes_are_user_errors(tmp_path):
    run = a_run(tmp_path / "run", 3)
    mistakes: list[tuple[str, dict[str, Any]]] = [
        ("has no step yet", {"runs": [tmp_path]}),
        ("--over x: use one of steps, tokens, flops", {"over": "x"}),
        ("--panel y: use one of loss, ", {"panels": ["y"]}),
        ("--smooth 0 must be at least 1", {"smooth": 0}),
        ("has no FLOPs", {"over": "flops"}),
        ("named twice", {"runs": [run, tmp_path / "x" / ".." / "run"]}),
        ("ends in .png, .svg, .pdf", {"picture": tmp_path / "x.jpg"}),
        ("cannot be written", {"picture": run / "metrics.jsonl" / "x.png"}),
    ]
    for mistake, options in mistakes:
        with pytest.raises(UserError, match=mistake):
            plot_runs(**{"runs": [run], "picture": tmp_path / "x.png"} | options)
    assert not (tmp_path / "x.png").exists()
