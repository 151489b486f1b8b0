"""A worker of a tiny run that sleeps in each forward pass for the seconds that RUN/slow_RANK says.

Samples of throughput are as short as can be: one at each check, and a check every other step.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

from megatron_txssm import platform
from megatron_txssm.cli import main as cli
from megatron_txssm.training.watch import stragglers, throughput

throughput.SAMPLE_SECONDS = 0.0
stragglers.CHECK_STEPS = 2
slow = Path(sys.argv[1]).parent / f"slow_{os.environ['RANK']}"
prepare = platform.prepare_platform


def prepare_and_slow_down() -> list[str]:
    arguments = prepare()
    # Imports Megatron, for which the platform must be prepared.
    from megatron_txssm.training import forward_step

    prompt_step = forward_step.forward_step

    def slow_step(*args: Any) -> Any:
        # Empty while the test writes it anew.
        time.sleep(float(slow.read_text() or 0))
        return prompt_step(*args)

    forward_step.forward_step = slow_step
    return arguments


platform.prepare_platform = prepare_and_slow_down
sys.exit(cli.main(["pretrain", *sys.argv[1:]]))
