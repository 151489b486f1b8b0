"""metrics.jsonl as arrays: repeated steps, attempts, lines of earlier versions, lines cut short."""

import json
import math

import numpy as np

from megatron_txssm.reporting.series import read_series


def write(run, *lines):
    run.mkdir(exist_ok=True)
    with open(run / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def step(number, loss, **fields):
    return {"iteration": number, "lm loss": loss, "grad_norm": 0.5, "consumed_tokens": 64 * number} | fields


def start(number, tensor):
    return {"iteration": number, "start": {"tensor_model_parallel_size": tensor, "world_size": 2}}


def test_of_a_repeated_step_the_last_execution_counts_and_attempts_are_told_apart(tmp_path):
    write(tmp_path, start(0, 1), *(step(n, 9.0 - n, step_flops=100.0, time=10.0 + n) for n in (1, 2, 3)))
    write(tmp_path, {"iteration": 3, "validation-a lm loss": 7.5}, {"iteration": 3, "validation-a lm loss": 7.0})
    write(tmp_path, start(1, 2), step(2, 5.0, step_flops=100.0, time=20.0))
    # Continues where the last one ended: only its own line tells it apart.
    write(tmp_path, start(2, 1), step(3, 4.0, step_flops=100.0, time=30.0))
    series = read_series(tmp_path)
    assert series.step.tolist() == [1, 2, 3] and series.loss.tolist() == [8.0, 5.0, 4.0]
    assert series.flops.tolist() == [100.0, 200.0, 300.0] and series.tokens.tolist() == [64, 128, 192]
    assert series.attempt.tolist() == [0, 1, 2]
    assert [(s.step, s.time, s.layout["tensor_model_parallel_size"]) for s in series.starts] == [
        (0, 11.0, 1),
        (1, 20.0, 2),
        (2, 30.0, 1),
    ]
    assert list(series.validation) == ["validation-a"] and series.validation["validation-a"].loss.tolist() == [7.0]


def test_lines_of_earlier_versions_and_torn_lines(tmp_path):
    rate = {"model_tflops_per_second_per_rank": 2.0, "world_size": 3, "step_seconds": 4.0}
    write(tmp_path, step(1, math.nan, **rate), step(2, 3.0, **rate), step(2, 2.0), {"iteration": "x", "grad_norm": 1})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('[1]\n{"iteration": 3, "lm loss": 1.0, "grad_')
    series = read_series(tmp_path)
    assert series.step.tolist() == [1, 2] and math.isnan(series.loss[0]) and series.loss[1] == 2.0
    # The second step was repeated without a rate, as by the earliest versions.
    assert series.flops.tolist() == [24e12, 24e12] and np.isnan(series.time).all()
    assert [found.step for found in series.starts] == [0, 1]


def test_a_run_without_steps_is_empty(tmp_path):
    assert len(read_series(tmp_path).step) == 0 and len(read_series(tmp_path / "none").loss) == 0
