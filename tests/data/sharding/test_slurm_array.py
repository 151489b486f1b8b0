"""Job arrays on a cluster that scripts play: every unfinished task in one job, within what Slurm allows."""

import collections
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import dill
import pytest

from megatron_txssm.cli.main import main
from megatron_txssm.data.corpus.manifest import Plan, Slice, logging_folder, manifest_path, write_plan
from megatron_txssm.data.sharding import run_local, slurm_array
from megatron_txssm.data.sharding.plan import plan_subset
from megatron_txssm.errors import UserError
from megatron_txssm.recipe.corpus.loader import load_corpus_recipe
from megatron_txssm.recipe.corpus.schema import CorpusRecipe
from tests.data.corpus_recipes import corpus_bytes
from tests.data.in_process import run_tasks_here, shard, web_recipe

# About the real sizes: (files, bytes of each).
SIZES = {"fineweb-edu-dedup": (234, 2_190_000_000), "cosmopedia-v2": (104, 1_180_000_000), "python-edu": (4, 245e6)}

SBATCH = """\
#!/bin/bash
here=$(dirname "$0")
number=$(( $(ls "$here/submitted" | grep -c args) + 1 ))
if [ -e "$here/refuse_from" ] && [ "$number" -ge "$(cat "$here/refuse_from")" ]; then
    echo "sbatch: error: Batch job submission failed: Invalid account" >&2
    exit 1
fi
printf '%s\\n' "$@" > "$here/submitted/$number.args"
cp "${@: -1}" "$here/submitted/$number.sh"
cat "$here/answer" | sed "s/NUMBER/$((1000 + number))/"
"""
SCONTROL = """\
#!/bin/bash
case "$1 $2" in
    "show config") cat "$(dirname "$0")/config" ;;
    "show hostnames") echo node1 ;;
    *) exit 1 ;;
esac
"""
SQUEUE = """\
#!/bin/bash
here=$(dirname "$0")
printf '%s ' "$@" >> "$here/squeue.args"
for word in "$@"; do
    case "$word" in --name=*) grep -s "^${word#--name=} " "$here/queue" | cut -d ' ' -f 2 ;; esac
done
exit 0
"""
# Runs its command here.
SRUN = """\
#!/bin/bash
[ "$1 $2" = "--kill-on-bad-exit=1 --cpus-per-task=1" ] || exit 1
shift 2
exec "$@"
"""


@dataclass
class Cluster:
    folder: Path

    def allow(self, max_array_size: int) -> None:
        (self.folder / "config").write_text(
            f"Configuration data as of now\nAccountingStorageHost   = db\nMaxArraySize            = {max_array_size}\n"
            "MaxJobCount             = 10000\n"
        )

    def queue(self, job_name: str, *job_ids: int) -> None:
        (self.folder / "queue").write_text("".join(f"{job_name} {job_id}\n" for job_id in job_ids))

    @property
    def submissions(self) -> list[tuple[list[str], str]]:
        """(arguments of sbatch, the script it was given), in their order."""
        folder = self.folder / "submitted"
        numbers = range(1, 1 + len(list(folder.glob("*.args"))))
        return [((folder / f"{n}.args").read_text().splitlines(), (folder / f"{n}.sh").read_text()) for n in numbers]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    folder = tmp_path / "slurm"
    (folder / "submitted").mkdir(parents=True)
    for name, script in (("sbatch", SBATCH), ("scontrol", SCONTROL), ("squeue", SQUEUE), ("srun", SRUN)):
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    (folder / "answer").write_text("Submitted batch job NUMBER\n")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    found = Cluster(folder)
    found.allow(1001)
    return found


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The tasks that jobs run, in place of running them."""
    found: list[int] = []
    monkeypatch.setattr(slurm_array._Array, "_run_for_rank", lambda self, rank, **_: found.append(rank))
    before = signal.getsignal(signal.SIGUSR1)
    yield found
    signal.signal(signal.SIGUSR1, before)


def full_corpus(folder: Path, *overrides: str) -> tuple[CorpusRecipe, Plan]:
    recipe = load_corpus_recipe("smollm_corpus", [f"output={folder / 'corpus'}", *overrides])
    plan = Plan(
        {
            name: plan_subset(name, recipe.subsets[name], [(f"{n:05d}.parquet", int(size)) for n in range(files)])
            for name, (files, size) in SIZES.items()
        }
    )
    write_plan(recipe.path, plan)
    return recipe, plan


def tiny_corpus(folder: Path, *overrides: str, tasks: int = 5) -> tuple[CorpusRecipe, Plan]:
    recipe = load_corpus_recipe(web_recipe(folder, folder), overrides)
    plan = Plan({"web": tuple((Slice(f"{task}.jsonl", 0, 1, 10),) for task in range(tasks))})
    write_plan(recipe.path, plan)
    return recipe, plan


def finish(recipe: CorpusRecipe, subset: str, *tasks: int) -> None:
    """As far as submitting is concerned."""
    for task in tasks:
        path = manifest_path(recipe.path, subset, task)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")


def array_indices(script: str) -> range:
    found = re.search(r"^#SBATCH --array=0-(\d+)(%\d+)?$", script, re.MULTILINE)
    assert found, script
    return range(int(found[1]) + 1)


def run_jobs(submissions: list[tuple[list[str], str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the nodes do for every index of every array."""
    for arguments, script in submissions:
        exported = dict(word.split("=") for word in arguments[0].removeprefix("--export=").split(",")[1:])
        pickled = re.search(r"^set -- (\S+executor\.pik)$", script, re.MULTILINE)
        assert pickled and arguments[0].startswith("--export=ALL,")
        with open(pickled[1], "rb") as stream:
            executor = dill.load(stream)
        with monkeypatch.context() as environment:
            for index in array_indices(script):
                for name, value in (exported | {"SLURM_ARRAY_TASK_ID": str(index)}).items():
                    environment.setenv(name, value)
                executor.run()


@pytest.mark.parametrize(("allowed", "in_recipe"), [(1001, None), (100, None), (1001, 250), (100, 10_000)])
def test_the_full_corpus_is_submitted_within_the_array_size_and_every_task_once(
    tmp_path: Path,
    cluster: Cluster,
    ranks: list[int],
    monkeypatch: pytest.MonkeyPatch,
    allowed: int,
    in_recipe: int | None,
) -> None:
    recipe, plan = full_corpus(tmp_path, *([f"slurm.max_array_size={in_recipe}"] if in_recipe else []))
    cluster.allow(allowed)
    limit = in_recipe or allowed
    tasks = {name: files * math.ceil(size / recipe.subsets[name].task_bytes) for name, (files, size) in SIZES.items()}
    assert {name: len(plan.tasks[name]) for name in tasks} == tasks and sum(tasks.values()) > 1000

    submitted = slurm_array.submit(recipe, plan)
    assert {name: len(ids) for name, ids in submitted.items()} == {
        name: math.ceil(number / limit) for name, number in tasks.items()
    }
    # The ids that sbatch gave, and no job beside the arrays.
    submissions = cluster.submissions
    assert [number for ids in submitted.values() for number in ids] == [
        str(1001 + number) for number in range(len(submissions))
    ]
    for arguments, script in submissions:
        assert max(array_indices(script)) < limit
        assert "merge_stats" not in script and not any("--dependency" in word for word in arguments)

    for name in tasks:
        mine = [job for job in submissions if f"#SBATCH --job-name=smollm_corpus-{name}\n" in job[1]]
        ranks.clear()
        run_jobs(mine, monkeypatch)
        assert sorted(ranks) == list(range(tasks[name]))


def test_only_what_is_unfinished_is_submitted_again(
    tmp_path: Path, cluster: Cluster, ranks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, plan = full_corpus(tmp_path, "slurm.max_array_size=100")
    slurm_array.submit(recipe, plan)
    number = len(cluster.submissions)
    total = len(plan.tasks["fineweb-edu-dedup"])
    finish(recipe, "fineweb-edu-dedup", *(task for task in range(total) if task % 7 != 3))
    monkeypatch.setattr(run_local, "write_subset_manifest", lambda *_: None)
    finish(recipe, "cosmopedia-v2", *range(len(plan.tasks["cosmopedia-v2"])))
    # datatrove's own mark, without the shard that it stands for.
    marks = logging_folder(recipe.path, "fineweb-edu-dedup") / "completions"
    marks.mkdir()
    (marks / "00003").touch()

    submitted = slurm_array.submit(recipe, plan)
    left = [task for task in range(total) if task % 7 == 3]
    again = cluster.submissions[number:]
    assert {name: len(ids) for name, ids in submitted.items()} == {"fineweb-edu-dedup": 2, "python-edu": 1}
    run_jobs([job for job in again if "smollm_corpus-fineweb" in job[1]], monkeypatch)
    assert sorted(ranks) == left


def test_nothing_is_submitted_once_all_is_finished(
    tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, plan = tiny_corpus(tmp_path)
    finish(recipe, "web", *range(5))
    monkeypatch.setattr(run_local, "write_subset_manifest", lambda *_: None)
    assert slurm_array.submit(recipe, plan) == {} and cluster.submissions == []


def test_a_job_that_is_queued_stops_the_submission_of_all(tmp_path: Path, cluster: Cluster) -> None:
    recipe, plan = full_corpus(tmp_path)
    cluster.queue("smollm_corpus-python-edu", 77, 76, 76)
    with pytest.raises(UserError, match=r"jobs 76, 77 of smollm_corpus-python-edu are still queued or running"):
        slurm_array.submit(recipe, plan)
    assert cluster.submissions == []
    cluster.queue("another-web", 78)
    assert len(slurm_array.submit(recipe, plan)) == 3


def test_the_script_says_what_the_recipe_says_and_bash_can_read_it(tmp_path: Path, cluster: Cluster) -> None:
    recipe, plan = tiny_corpus(
        tmp_path,
        "slurm.partition=cpu,long",
        "slurm.time=1-12:00:00",
        "slurm.cpus_per_task=2",
        "slurm.memory_per_cpu_gb=6",
        "slurm.workers=3",
        "slurm.sbatch=[account=lab, exclusive, qos=high]",
    )
    assert slurm_array.submit(recipe, plan) == {"web": ["1001"]}
    ((_, script),) = cluster.submissions
    options = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    logs = logging_folder(recipe.path, "web").resolve() / "slurm_logs"
    assert sorted(options) == sorted(
        [
            "account=lab",
            "array=0-4%3",
            "cpus-per-task=2",
            f"error={logs}/%A_%a.out",
            "exclusive",
            "job-name=recipe-web",
            "kill-on-invalid-dep=yes",
            "mem-per-cpu=6G",
            "nodes=1",
            "open-mode=append",
            f"output={logs}/%A_%a.out",
            "partition=cpu,long",
            "qos=high",
            "requeue",
            "time=1-12:00:00",
        ]
    )
    # Options after the first command would be comments to sbatch.
    lines = script.splitlines()
    assert lines[0].startswith("#!") and all(line.startswith("#SBATCH") for line in lines[2 : 2 + len(options)])
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_without_a_partition_the_clusters_default_is_taken(tmp_path: Path, cluster: Cluster) -> None:
    slurm_array.submit(*tiny_corpus(tmp_path))
    ((_, script),) = cluster.submissions
    assert "--partition" not in script and "--qos" not in script


def test_an_output_that_a_script_cannot_name_is_refused(tmp_path: Path, cluster: Cluster) -> None:
    folder = tmp_path / "two words"
    folder.mkdir()
    with pytest.raises(UserError, match="contains characters that a batch script cannot; use another output"):
        slurm_array.submit(*tiny_corpus(folder))
    assert cluster.submissions == []


def test_what_sbatch_refuses_is_one_clear_error(tmp_path: Path, cluster: Cluster, capfd: pytest.CaptureFixture) -> None:
    recipe, plan = tiny_corpus(tmp_path, "slurm.max_array_size=2")
    (cluster.folder / "refuse_from").write_text("2")
    with pytest.raises(UserError, match=r"^--slurm: sbatch .* was refused \(exit code 1\); submitted before: 1001$"):
        slurm_array.submit(recipe, plan)
    # sbatch's own reason is for the user, too.
    assert capfd.readouterr().err.count("Invalid account") == 1
    assert len(cluster.submissions) == 1


@pytest.mark.parametrize("missing", ["scontrol", "squeue", "sbatch"])
def test_a_machine_without_slurm_is_named(
    tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    (cluster.folder / missing).unlink()
    # bash and the tools of the scripts, and nothing of a Slurm that this machine may have.
    for tool in ("bash", "cat", "sed", "ls", "grep", "cp", "dirname", "cut"):
        (cluster.folder / tool).symlink_to(
            next(Path(d) / tool for d in ("/usr/bin", "/bin") if (Path(d) / tool).exists())
        )
    for script in ("scontrol", "squeue", "sbatch"):
        if script != missing:
            text = (cluster.folder / script).read_text().replace("#!/bin/bash", f"#!{cluster.folder / 'bash'}")
            (cluster.folder / script).write_text(text)
    monkeypatch.setenv("PATH", str(cluster.folder))
    with pytest.raises(UserError, match=f"there is no {missing} on this machine; run it on a login node"):
        slurm_array.submit(*tiny_corpus(tmp_path))


def test_a_slurm_that_fails_is_named_with_its_reason(tmp_path: Path, cluster: Cluster) -> None:
    (cluster.folder / "scontrol").write_text("#!/bin/bash\necho 'Unable to contact slurm controller' >&2\nexit 1\n")
    with pytest.raises(UserError, match="scontrol show config: Unable to contact slurm controller"):
        slurm_array.submit(*tiny_corpus(tmp_path))


def test_a_cluster_that_does_not_tell_its_limit_has_slurms_default(cluster: Cluster) -> None:
    assert slurm_array.cluster_max_array_size() == 1001
    cluster.allow(40_001)
    assert slurm_array.cluster_max_array_size() == 40_001
    (cluster.folder / "config").write_text("AccountingStorageHost = db\n")
    assert slurm_array.cluster_max_array_size() == 1001


@pytest.mark.parametrize(
    ("answer", "found"),
    [("Submitted batch job NUMBER on cluster blue\n", "1001"), ("NUMBER;blue\n", "1001"), ("NUMBER\n", "1001")],
)
def test_the_number_of_a_job_is_found_in_every_answer(
    tmp_path: Path, cluster: Cluster, answer: str, found: str
) -> None:
    (cluster.folder / "answer").write_text(answer)
    assert slurm_array.submit(*tiny_corpus(tmp_path)) == {"web": [found]}


def test_an_answer_without_a_number_is_named(tmp_path: Path, cluster: Cluster) -> None:
    (cluster.folder / "answer").write_text("done\n")
    with pytest.raises(UserError, match="sbatch answers 'done', without a job's number"):
        slurm_array.submit(*tiny_corpus(tmp_path))


def test_a_task_of_an_array_does_not_submit(tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, plan = tiny_corpus(tmp_path)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    with pytest.raises(UserError, match="this is a task of a job array; submit from a login node"):
        slurm_array.submit(recipe, plan)
    assert cluster.submissions == []


def test_the_jobs_make_the_bytes_that_this_machine_makes(
    tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """`data shard --slurm`, then the batch script as a node runs it, for every index."""
    source = tmp_path / "source"
    source.mkdir()
    for name in "ab":
        lines = [json.dumps({"text": f"document {number} of {name}"}) + "\n" for number in range(20)]
        (source / f"{name}.jsonl").write_text("".join(lines))
    recipe = web_recipe(tmp_path, source, task_bytes=100)
    assert main(["data", "shard", str(recipe), "--slurm", "--set", f"output={tmp_path / 'jobs'}"]) == 0
    out = capsys.readouterr().out
    assert "web: job array 1001\n" in out and f"follow with: txssm data status {tmp_path / 'jobs'}" in out

    ((arguments, script),) = cluster.submissions
    assert array_indices(script) == range(2)
    for index in array_indices(script):
        variables = {
            "SLURM_ARRAY_TASK_ID": str(index),
            "RUN_OFFSET": "0",
            "SLURM_NODELIST": "node1",
            "SLURM_JOB_ID": "1",
        }
        done = subprocess.run(
            ["bash"], input=script, text=True, capture_output=True, env=os.environ | variables, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
    assert arguments[0] == "--export=ALL,RUN_OFFSET=0"

    run_tasks_here(monkeypatch)
    assert shard(recipe) == 0
    expected = corpus_bytes(tmp_path / "corpus")
    assert corpus_bytes(tmp_path / "jobs") == expected
    assert collections.Counter(Path(path).suffix for path in expected)[".bin"] == 2

    capsys.readouterr()
    assert main(["data", "shard", str(recipe), "--slurm"]) == 0
    assert "all tasks are finished" in capsys.readouterr().out
    assert len(cluster.submissions) == 1


def test_an_array_submitted_by_an_earlier_version_finds_its_classes() -> None:
    """In another process: the names stay in sys.modules."""
    code = """
import pickle
from megatron_txssm.data.sharding.array_task import know_earlier_names
know_earlier_names()
for module, name in (
    ("data.corpus_recipe", "CorpusRecipe"), ("recipe.corpus_recipe", "SubsetSource"),
    ("data.manifest", "Plan"), ("data.shard_task", "ShardTask"), ("data.slurm_array", "_Array"),
):
    print(pickle.loads(f"cmegatron_txssm.{module}\\n{name}\\n.".encode()).__module__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [
        "megatron_txssm.recipe.corpus.schema",
        "megatron_txssm.recipe.corpus.schema",
        "megatron_txssm.data.corpus.manifest",
        "megatron_txssm.data.sharding.shard_task",
        "megatron_txssm.data.sharding.slurm_array",
    ]
