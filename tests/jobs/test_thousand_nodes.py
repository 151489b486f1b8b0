"""A job of 1,000 nodes with 8 ranks each, on paper: Slurm's commands are stand-ins that count how often they are asked.

`pytest -s tests/jobs/test_thousand_nodes.py` prints the figures.
"""

import collections
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_txssm.jobs.attempts import attempts
from tests.support.recipes import FOUR_LAYERS, tokens_of, write_recipe

NODES, RANKS_PER_NODE = 1000, 8
# One stand-in for all commands; it writes its name and words down.
COMMAND = """\
#!{python}
import json, os, sys
name, words, folder = os.path.basename(sys.argv[0]), sys.argv[1:], {folder!r}
with open(folder + "/calls", "a") as file:
    file.write(" ".join([name, *words])[:60] + "\\n")
nodes = [f"n{{number}}" for number in range(1, {nodes} + 1)]
if name == "scontrol" and words[:2] == ["show", "hostnames"]:
    print("\\n".join(nodes))
elif name == "srun" and "--job-name=preflight" in words:
    facts = {{"recipe sha256": "0" * 64, "python": "3.12.1", **{{f"package{{number}}": "1.0" for number in range(7)}}}}
    clock = {{"ahead_seconds": 0.0, "uncertain_seconds": 0.1}}
    for node in nodes:
        print(json.dumps({{"node": node, "problems": [], "warnings": [], "clock": clock, "facts": facts}}))
elif name == "srun":
    run = {run!r}
    for rank in range({nodes} * {ranks}):
        open(f"{{run}}/logs/rank_{{rank}}.log", "a").write("iteration 1\\n")
    os.makedirs(run + "/checkpoints/iter_0000060")
    for name in (".metadata", "metadata.json"):
        open(run + "/checkpoints/iter_0000060/" + name, "w").write("{{}}")
    open(run + "/checkpoints/latest_checkpointed_iteration.txt", "w").write("60")
    open(run + "/metrics.jsonl", "a").write(json.dumps({{"iteration": 60, "lm loss": 1.0, "grad_norm": 1.0}}) + "\\n")
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    commands, run = tmp_path / "bin", tmp_path / "run"
    commands.mkdir()
    (run / "logs").mkdir(parents=True)
    for name in ("srun", "scontrol", "squeue", "sinfo", "scancel"):
        text = COMMAND.format(
            python=sys.executable, folder=str(tmp_path), run=str(run), nodes=NODES, ranks=RANKS_PER_NODE
        )
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    return os.environ | {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": f"n[1-{NODES}]",
        "SLURM_JOB_PARTITION": "main",
        "SLURM_NTASKS_PER_NODE": str(RANKS_PER_NODE),
        "SLURMD_NODENAME": "n1",
    }


def test_a_job_of_a_thousand_nodes(tmp_path: Path, environment: dict[str, str]) -> None:
    run = tmp_path / "run"
    changes = {"name": "wide", "training.train_iters": 60, "checkpoint.save_interval": 10}
    recipe = write_recipe(run / "recipe.yaml", FOUR_LAYERS, tokens_of(tmp_path / "tokens"), changes, run=run)
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "megatron_txssm.jobs.supervisor.supervisor", str(recipe)],
        env=environment,
        capture_output=True,
        text=True,
    )
    seconds = time.monotonic() - began
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (attempt,) = attempts(tmp_path / "run")
    assert attempt.cause == "finished" and len(attempt.nodes) == NODES

    calls = collections.Counter(line.split()[0] for line in (tmp_path / "calls").read_text().strip().split("\n"))
    # However many nodes there are: slurmctld serves others, too.
    assert calls["srun"] == 2 and sum(calls.values()) - calls["srun"] <= 4, calls
    # Nothing is said node by node.
    assert len(done.stdout) < 2000, done.stdout
    files = {
        str(folder.relative_to(tmp_path)): sum(path.is_file() for path in folder.iterdir())
        for folder in (tmp_path / "run", tmp_path / "run" / "logs", attempt.folder)
    }
    size = (attempt.folder / "preflight.json").stat().st_size
    print(f"\n{NODES} nodes, {NODES * RANKS_PER_NODE} ranks: {seconds:.1f} s, calls {dict(calls)}, files {files}")
    print(f"preflight.json {size / 1e3:.0f} kB, attempt.json {(attempt.folder / 'attempt.json').stat().st_size} bytes")
    assert json.loads((attempt.folder / "preflight.json").read_text())["problems"] == {}
    # Nothing but the ranks' own logs grows with the ranks.
    assert max(count for name, count in files.items() if name != "run/logs") < 10
