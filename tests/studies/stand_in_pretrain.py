"""`txssm pretrain` as a study sees it, without Megatron: python -I stand_in_pretrain.py RUN/recipe.yaml.

One line of metrics.jsonl for each step of 20, from the last one; SIGTERM ends it after its step. A run whose name has
"slow" in it waits at step 10 until it is told to stop; one with "broken" fails there.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
run = Path(sys.argv[1]).parent
metrics = run / "metrics.jsonl"
(run / "threads").write_text(os.environ["OMP_NUM_THREADS"])
step = len(metrics.read_text().splitlines()) if metrics.exists() else 0
with (run / "starts").open("a") as starts:
    print(step, file=starts)
while step < 20 and not told:
    step += 1
    with metrics.open("a") as file:
        print(json.dumps({"iteration": step, "grad_norm": 1.0}), file=file)
    if step == 10 and "broken" in run.name:
        print("out of memory")
        sys.exit(1)
    while step == 10 and "slow" in run.name and not told:
        time.sleep(0.01)
with (run / "starts").open("a") as starts:
    print("end", file=starts)
sys.exit(143 if told else 0)
