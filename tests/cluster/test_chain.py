"""From texts to an evaluated model in one command: shard, train TP2 x DP2, export, evaluate."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml

from megatron_txssm.recipe.changes import Changes
from tests.cluster.sandbox import Sandbox
from tests.cluster.training_job import txssm
from tests.data.corpora import library_texts
from tests.data.corpus_recipes import corpus_bytes, run_data
from tests.data.in_process import web_recipe
from tests.support.recipes import write_recipe

TASKS = 4
PATIENCE = 600  # seconds


def write_chain(folder: Path, broken: bool = False) -> tuple[Path, Path]:
    """The recipes of a run and of its corpus: four files of text, each a task."""
    source = folder / "source"
    source.mkdir()
    texts = library_texts(200)
    for task in range(TASKS):
        rows = [json.dumps({"text": text[:2000]}) + "\n" for text in texts[task::TASKS]]
        (source / f"{task}.jsonl").write_text("no JSON\n" * 20 if broken else "".join(rows))
    corpus = web_recipe(folder, source, validation_fraction=0.1, task_bytes=1_000)
    fields = yaml.safe_load(corpus.read_text()) | {"slurm": {"memory_per_cpu_gb": 1}}
    (folder / "texts.yaml").write_text(yaml.safe_dump(fields))
    changes: Changes = {
        "name": "chain",
        "parallel.tensor_model_parallel_size": 2,
        "parallel.sequence_parallel": True,
        "parallel.use_distributed_optimizer": True,
        "training.global_batch_tokens": 256,
        "data.corpus": str(folder / "corpus"),
        "data.vocab_size": 1200,
        "data.make_vocab_size_divisible_by": 16,
        "checkpoint.save_interval": 10,
        "logging.eval_iters": 2,
    }
    return write_recipe(folder / "chain.yaml", changes, run=folder / "run"), folder / "texts.yaml"


def submit_chain(sandbox: Sandbox, recipe: Path, corpus: Path) -> dict[str, list[str]]:
    layout = ["--nodes", "2", "--nproc-per-node", "2"]
    done = txssm(sandbox, "submit", str(recipe), *layout, "--chain", "--corpus", str(corpus), cwd=recipe.parent)
    assert done.returncode == 0, done.stderr
    return json.loads((recipe.parent / "run" / "submission.json").read_text())["jobs"]


def wait_for(condition: Callable[[], bool], what: Callable[[], str]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, what()
        time.sleep(0.1)


def kill_task(task: int) -> None:
    """kill -9 of the Python that does one element of the array, as soon as there is one."""

    def found() -> bool:
        for process in psutil.process_iter():
            try:
                parent = process.parent()
                environment, command = process.environ(), " ".join(process.cmdline())
            except psutil.Error:
                continue
            # Not the batch script's shell and its srun, which have the variable as well.
            if not parent or "slurmstepd" not in parent.name():
                continue
            if environment.get("SLURM_ARRAY_TASK_ID") == str(task) and "data.sharding.array_task" in command:
                process.kill()
                return True
        return False

    wait_for(found, lambda: f"task {task} did not begin")


@pytest.mark.slow
def test_a_chain_runs_through_although_a_task_is_killed(sandbox: Sandbox, tmp_path: Path) -> None:
    recipe, corpus = write_chain(tmp_path)
    jobs = submit_chain(sandbox, recipe, corpus)
    run = tmp_path / "run"
    assert list(jobs) == ["shard", "pretrain", "convert", "evaluate"]
    array = jobs["shard"][0]
    kill_task(2)

    def logs():
        return "\n".join(path.read_text(errors="replace")[-3000:] for path in tmp_path.rglob("*.out"))

    wait_for(lambda: sandbox.job_state(jobs["evaluate"][0]) in ("COMPLETED", "CANCELLED", "FAILED", ""), logs)
    states = {stage: sandbox.job_state(ids[0]).split()[-1] for stage, ids in jobs.items()}
    assert states == dict.fromkeys(jobs, "COMPLETED"), logs()

    # The array: four tasks, the killed one twice, and the bytes that one machine makes.
    outputs = {path.stem: path.read_text() for path in tmp_path.rglob(f"{array}_*.out")}
    assert sorted(outputs) == [f"{array}_{task}" for task in range(TASKS)]
    starts = {name: text.count("START shard") for name, text in outputs.items()}
    assert starts == {f"{array}_{task}": 2 if task == 2 else 1 for task in range(TASKS)}
    alone = run_data("shard", str(corpus), "--workers", "1", "--set", f"output={tmp_path / 'alone'}")
    assert alone.returncode == 0, alone.stderr
    # Megatron's shuffled indices lie beside the shards that it trained on.
    sharded = {path: content for path, content in corpus_bytes(tmp_path / "corpus").items() if "/cache/" not in path}
    assert sharded == corpus_bytes(tmp_path / "alone")

    # The training: four ranks on two nodes, and what one process alone does.
    (attempt,) = (json.loads(path.read_text()) for path in run.glob("attempts/*/attempt.json"))
    assert (attempt["nodes"], attempt["nproc_per_node"], attempt["cause"]) == (["n1", "n2"], 2, "finished")
    assert (run / "checkpoints" / "latest_checkpointed_iteration.txt").read_text().strip() == "20"
    one = [f"parallel.{name}" for name in ("tensor_model_parallel_size=1", "sequence_parallel=false")]
    one += [f"run_directory={tmp_path / 'one'}", "training.train_iters=20"]
    done = txssm(
        sandbox, "pretrain", str(recipe), "--nproc", "1", *(word for field in one for word in ("--set", field))
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = losses(run), losses(tmp_path / "one")
    assert len(ours) == 20
    # fp32, over four ranks and over one.
    assert ours == pytest.approx(theirs, abs=1e-5)

    assert (run / "export" / "model.safetensors").exists()
    assert json.loads((run / "export" / "verification.json").read_text())["passed"]
    assert json.loads((run / "export" / "export.json").read_text())["step"] == 20
    assert json.loads((run / "evaluation" / "validation.json").read_text())["step"] == 20


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["lm loss"] for line in lines if "lm loss" in line]


def test_a_chain_whose_first_link_fails_leaves_nothing_pending(sandbox: Sandbox, tmp_path: Path) -> None:
    jobs = submit_chain(sandbox, *write_chain(tmp_path, broken=True))
    followers = [jobs[stage][0] for stage in ("pretrain", "convert", "evaluate")]

    def queue():
        return sandbox.slurm("squeue", "--noheader", "--format=%F %j %T %r")

    ours = {job for ids in jobs.values() for job in ids}
    wait_for(lambda: not ours & {line.split()[0] for line in queue().splitlines()}, queue)
    assert {sandbox.job_state(job) for job in followers} == {"CANCELLED"}
    assert not (tmp_path / "run" / "attempts").exists()
