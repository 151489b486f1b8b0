"""A run that goes on with other samples a step than before."""

import json
import math

import pytest

from tests.support.tiny_run import TinyRun

LEARNING_RATE, STEPS = 1e-3, 6


@pytest.mark.slow
def test_the_schedule_reaches_its_end_with_other_samples_a_step(tiny: TinyRun) -> None:
    fields = ["optimizer.warmup_fraction=0", "logging.eval_iters=0", "checkpoint.save_interval=2"]
    begun = tiny.pretrain(fields=[*fields, "training.train_iters=2"])
    assert begun.code == 0, begun.stderr
    # Half as long, so twice as many.
    other = [f"training.train_iters={STEPS}", "training.seq_length=16", "megatron.override_opt_param_scheduler=true"]
    done = tiny.pretrain(fields=[*fields, *other])
    assert done.code == 0, done.stderr
    lines = [json.loads(line) for line in (tiny.run / "metrics.jsonl").read_text().splitlines()]
    rates = {line["iteration"]: line["learning_rate"] for line in lines if "learning_rate" in line}
    low = 0.1 * LEARNING_RATE
    for step in range(3, STEPS + 1):
        cosine = 0.5 * (1 + math.cos(math.pi * (step - 1) / STEPS))
        assert rates[step] == pytest.approx(low + (LEARNING_RATE - low) * cosine, rel=1e-9), step
