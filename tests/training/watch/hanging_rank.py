"""One of several ranks over gloo that hangs as argv says; prints `ready` when it is about to."""

import faulthandler
import os
import signal
import sys
import threading
import time
from pathlib import Path

from megatron_txssm.training.watch.flight_recorder import dump_when_asked, prepare_recorder

attempt, how = Path(sys.argv[1]), sys.argv[2]
rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
prepare_recorder(attempt)
dump_when_asked(attempt, rank)
faulthandler.register(signal.SIGUSR2, all_threads=True, chain=True)

import torch
import torch.distributed as dist

dist.init_process_group("gloo")
pairs = [dist.new_group([first, first + 1], group_desc="TENSOR_MODEL_PARALLEL_GROUP") for first in range(0, ranks, 2)]
pair = pairs[rank // 2]
numbers = torch.ones(8)
for _ in range(3):
    dist.all_reduce(numbers)
dist.all_reduce(numbers, group=pair)
print("ready", flush=True)
if how == "sleep" and rank == 1:
    time.sleep(600)
if how == "stop" and rank == 1:
    os.kill(os.getpid(), signal.SIGSTOP)
threading.Timer(600, os._exit, (1,)).start()
dist.all_reduce(numbers, group=pair)
dist.all_reduce(numbers)
