#!/usr/bin/env python3
"""The planner's formulas beside dry runs, for random legal layouts: how far off memory and traffic are.

.venv/bin/python tools/check_planner.py                       # 40 layouts, about 20 minutes on one core
.venv/bin/python tools/check_planner.py --count 8 --seed 2 --recipes transxssm_70b llama3_70b
"""

import argparse
import random
from collections import Counter

from megatron_txssm.errors import UserError
from megatron_txssm.planning.dry_run.run import DryRunFailed, dry_run
from megatron_txssm.planning.layouts import candidates
from megatron_txssm.planning.memory import DEVICE_BYTES
from megatron_txssm.planning.ranking import estimated_usage
from megatron_txssm.planning.usage import Usage
from megatron_txssm.recipe.loader import load_recipe

RECIPES = [f"{kind}_{size}" for size in ("320m", "1.3b") for kind in ("transxssm", "mamba2", "llama3", "jamba")]
RECIPES += ["transxssm_70b", "llama3_70b", "transxssm_320m_moe", "transxssm_7b_moe"]
GPUS = (1, 8, 16, 64, 256)
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=40, metavar="N", help="layouts (default: 40)")
    parser.add_argument("--seed", type=int, default=1, metavar="N")
    parser.add_argument("--recipes", nargs="+", default=RECIPES, metavar="RECIPE")
    args = parser.parse_args()
    draw = random.Random(args.seed)
    errors: list[float] = []
    for number in range(args.count):
        name = args.recipes[number % len(args.recipes)]
        recipe = load_recipe(name)
        layouts: list = []
        while not layouts:
            gpus = draw.choice(GPUS)
            layouts = candidates(recipe, gpus, 8).legal
        layout = draw.choice(layouts)
        stage = draw.randrange(layout.pipeline)
        recipe = layout.of(recipe)
        where = f"{name:20} {layout.name:44} stage {stage}"
        try:
            exact = dry_run(recipe, gpus, stage * (gpus // layout.pipeline))
        except (UserError, DryRunFailed) as error:
            print(f"{where}: no dry run: {error}", flush=True)
            continue
        formula = estimated_usage(recipe, gpus, stage)
        # The dry run has nothing but tensors.
        errors.append((formula.peak - DEVICE_BYTES) / exact.peak - 1)
        print(
            f"{where}: {exact.peak / GIB:6.2f} GiB, formula {errors[-1]:+.1%}; {_traffic(formula, exact)}", flush=True
        )
    within = sum(abs(error) <= 0.03 for error in errors)
    print(f"memory: {within} of {len(errors)} within 3%, from {min(errors):+.1%} to {max(errors):+.1%}")


def _traffic(formula: Usage, exact: Usage) -> str:
    """By collective, as groups may have the same ranks; what differs by more than 2%."""
    ours, theirs = _by_collective(formula), _by_collective(exact)
    found = [
        f"{name} {ours[name] / 2**20:.0f} MiB, dry run {theirs[name] / 2**20:.0f}"
        for name in sorted(ours | theirs)
        if abs(ours[name] - theirs[name]) > 0.02 * max(theirs[name], 1) and max(ours[name], theirs[name]) > 2**20
    ]
    return "; ".join(found) or "traffic within 2%"


def _by_collective(usage: Usage) -> Counter[str]:
    total: Counter[str] = Counter()
    for (collective, _), size in usage.traffic.items():
        total[collective] += size
    return total


if __name__ == "__main__":
    main()
