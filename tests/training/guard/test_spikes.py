"""RUN/spikes.jsonl: what is read is what was recorded, whatever a kill left."""

from dataclasses import replace
from pathlib import Path

from megatron_txssm.training.guard.spikes import FILE, Spike, read_spikes, record_spike

SKIP = Spike(30, "skip", 9.0, 12.25, 3.5, 0.5, world_size=8, time=1.0)
REWIND = Spike(40, "rewind", None, None, 3.5, 7.0, world_size=8, time=2.0, jumped_from=37, back_to=20)


def test_a_spike_in_words() -> None:
    assert str(SKIP) == "spike at step 30: loss 9 (z-score 12.2), gradient norm 3.5 (z-score 0.5); not trained on"
    assert str(REWIND) == (
        "spike at step 40: loss NaN or infinite, gradient norm 3.5 (z-score 7.0); went back to the checkpoint of step "
        "20 and jumped over steps 37 to 40"
    )
    start = replace(REWIND, back_to=0)
    assert "went back to the start and jumped over" in str(start)
    assert str(replace(SKIP, action="stop")).endswith("; ended the run as diverged")


def test_only_a_rewind_jumps_over_steps() -> None:
    assert list(SKIP.jumped) == []
    assert list(REWIND.jumped) == [37, 38, 39, 40]


def test_the_last_line_of_a_step_counts(tmp_path: Path) -> None:
    assert read_spikes(tmp_path) == []
    again = replace(SKIP, loss=8.0)
    for spike in (REWIND, SKIP, again):
        record_spike(tmp_path, spike)
    assert read_spikes(tmp_path) == [again, REWIND]


def test_a_line_cut_short_by_a_kill_costs_only_itself(tmp_path: Path) -> None:
    record_spike(tmp_path, SKIP)
    with (tmp_path / FILE).open("a") as file:
        file.write('{"step": 35, "acti')
    record_spike(tmp_path, REWIND)
    with (tmp_path / FILE).open("a") as file:
        # Of another program, and of a later version.
        file.write('[1]\n{"step": 50}\n')
        file.write('{"step": 60, "action": "skip", "loss": 1, "loss_z_score": 7, "grad_norm": 1, "later": 1, ')
        file.write('"grad_norm_z_score": 1, "world_size": 1, "time": 1}\n')
    assert [spike.step for spike in read_spikes(tmp_path)] == [30, 40, 60]
