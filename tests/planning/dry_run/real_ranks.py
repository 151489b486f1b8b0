"""One rank of trainings on real tensors, under torchrun: writes what each used beside the dry run's task.

torchrun --nproc-per-node 2 real_ranks.py TASKS.json
"""

import json
import os
import sys
from pathlib import Path

from megatron_txssm.ops.ssd_blocks import _kept_scratch
from megatron_txssm.planning.dry_run.worker import run, write
from megatron_txssm.platform import prepare_platform

prepare_platform()
from megatron_txssm.compat import forget_training

for task in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
    write(run(task, fake=False), Path(task["result"]).with_name(f"real_{os.environ['RANK']}.json"))
    forget_training()
    # The next run's buffers may be smaller.
    _kept_scratch.__dict__.clear()
