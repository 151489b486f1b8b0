#!/usr/bin/env python3
"""The planner's step times beside measured ones, on this machine: calibrated in one layout, then eight others.

On CPUs, two processes with a core each. Prints the error of each layout, and Kendall's tau of the two orders.

.venv/bin/python tools/check_step_times.py        # about 6 minutes on two quiet cores
"""

import argparse
import dataclasses
import itertools
import statistics

from megatron_txssm.planning.calibration.measure import calibrate, timed_trainings
from megatron_txssm.planning.dry_run.run import WITHOUT_DATA
from megatron_txssm.planning.layouts import layout_named
from megatron_txssm.planning.ranking import Estimates
from megatron_txssm.planning.rates import Cluster
from megatron_txssm.recipe.changes import changed
from megatron_txssm.recipe.loader import load_recipe

PROCESSES = 2
SIZES = (
    "model.hidden_size=384",
    "model.num_attention_heads=6",
    "model.ffn_hidden_size=1024",
    "data.vocab_size=4096",
    "training.seq_length=256",
    "training.global_batch_tokens=2048",
    "training.micro_batch_size=1",
    "parallel.use_distributed_optimizer=true",
)
LAYOUTS = (
    "tp2_mb1",
    "tp2_sp_mb1",
    "tp2_sp_mb4",
    "pp2_mb1",
    "pp2_mb4",
    "pp2_vpp2_mb1",
    "cp2_zero1_mb1",
    "cp2_a2a_zero1_mb2",
    "dp2_zero1_mb4",
    "dp2_full_mb1",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo_cpu", metavar="RECIPE")
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS, metavar="NAME")
    args = parser.parse_args()
    recipe = changed(load_recipe(args.recipe, SIZES), WITHOUT_DATA)
    calibration = calibrate(recipe, PROCESSES)
    print(calibration.measured)
    estimates = Estimates(recipe, Cluster(calibration.gpu, PROCESSES, calibration.corrections))
    named = [layout_named(name) for name in args.layouts]
    layouts = [dataclasses.replace(layout, data=layout.data or 1) for layout in named]
    trained = timed_trainings([layout.of(recipe) for layout in layouts], PROCESSES)
    measured = [statistics.median(found["steps"]) for found in trained]
    planned = [estimates.plan(layout).time.total for layout in layouts]
    errors = [ours / theirs - 1 for ours, theirs in zip(planned, measured, strict=True)]
    for layout, ours, theirs, error in zip(layouts, planned, measured, errors, strict=True):
        print(f"{layout.name:24} {theirs:7.3f} s, planned {ours:7.3f}: {error:+.1%}")
    print(f"mean absolute error {statistics.mean(map(abs, errors)):.1%}; Kendall's tau {tau(planned, measured):.2f}")


def tau(ours: list[float], theirs: list[float]) -> float:
    """Kendall's tau: of all pairs, those in the same order less those in the other."""
    pairs = list(itertools.combinations(range(len(ours)), 2))
    same = sum((ours[one] < ours[other]) == (theirs[one] < theirs[other]) for one, other in pairs)
    return (2 * same - len(pairs)) / len(pairs)


if __name__ == "__main__":
    main()
