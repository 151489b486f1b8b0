"""The steps to skip and the spike guard, as recipes state them."""

from typing import Any

import pytest

from megatron_txssm.errors import UserError
from megatron_txssm.recipe.loader import load_recipe

REWIND = ["guard.spike_action=rewind", "checkpoint.save_interval=160"]


def loaded(*fields: str) -> Any:
    return load_recipe("demo_cpu", ["training.train_iters=320", *fields])


def test_steps_and_ranges_are_written_out() -> None:
    assert loaded().skip_steps == frozenset()
    assert loaded("data.skip_steps=[7, '10-12', 319-320, '12']").skip_steps == {7, 10, 11, 12, 319, 320}


@pytest.mark.parametrize("entry", ["0", "-3", "'12-10'", "'a'", "1.5", "true", "null", "[1]", "'1-2-3'", "'0-4'", "''"])
def test_a_malformed_step_is_refused(entry: str) -> None:
    with pytest.raises(UserError, match=r"data\.skip_steps=.*must (be a list of steps|have steps from 1)"):
        loaded(f"data.skip_steps=[5, {entry}]")


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        (["data.skip_steps=5"], "must be a list of steps and of ranges"),
        (["data.skip_steps=[321]"], "321 is beyond the last step, 320"),
        (["data.skip_steps=['5-999999999999999']"], "5-999999999999999 is beyond the last step, 320"),
        (["data.skip_steps=['1-3']"], "data.skip_steps has step 1"),
        (["megatron.iterations_to_skip=[5]"], "data.skip_steps"),
        (["megatron.result_rejected_tracker_filename=rejected.log"], "data.skip_steps"),
        (["guard.spike_action=stop"], "must be one of skip, rewind or null"),
        (["guard.spike_z_score=0"], "must be above 0"),
        (["guard.spike_window=7"], "must be at least 8"),
        (["guard.max_spikes=0"], "must be at least 1"),
        (["guard.rewind_steps=0"], "must be at least 1"),
        (["guard.spike_action=rewind", "checkpoint.save_interval=null"], "save_interval=null saves none"),
        ([*REWIND, "checkpoint.keep_last=1"], "set checkpoint.keep_last=2"),
        ([*REWIND, "checkpoint.keep_last=4", "guard.rewind_steps=601"], "set checkpoint.keep_last=5"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_queued(fields: list[str], wanted: str) -> None:
    with pytest.raises(UserError, match=wanted):
        loaded(*fields)


def test_the_guard_is_off_unless_asked_for() -> None:
    assert loaded().guard.spike_action is None
    # Without it, its other fields are free.
    assert loaded("guard.spike_window=400", "checkpoint.save_interval=null").guard.spike_window == 400
    assert loaded("checkpoint.keep_last=1").checkpoint.keep_last == 1
    assert load_recipe("demo_cpu", ["guard.spike_action=skip", "guard.spike_window=64"]).guard.spike_action == "skip"


def test_enough_checkpoints_are_kept_to_go_back_to() -> None:
    assert loaded(*REWIND, "checkpoint.keep_last=2").guard.spike_action == "rewind"
    assert loaded(*REWIND, "checkpoint.keep_last=5", "guard.rewind_steps=640").guard.rewind_steps == 640
