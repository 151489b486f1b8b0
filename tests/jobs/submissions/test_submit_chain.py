"""`txssm submit --chain`: what is queued, refused and taken back; scripts play Slurm."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_txssm.cli.main import main
from megatron_txssm.errors import UserError
from megatron_txssm.evaluation.harness import tasks as harness_tasks
from megatron_txssm.jobs import submit
from megatron_txssm.jobs.submission import submission
from tests.data.in_process import web_recipe
from tests.jobs.submissions.stand_in_cluster import LAYOUT, MICRO, Cluster, assert_refused, submit_demo


@pytest.fixture
def corpus(tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, ...]]:
    """The fields of a run on a corpus that counts as sharded."""
    monkeypatch.setattr(submit, "_is_sharded", lambda directory: True)
    monkeypatch.setattr(submit, "check_run", lambda recipe, world_size: None)
    yield ("data.corpus=corpus", "data.tokenizer_type=NullTokenizer", MICRO)


def submit_chain(corpus: tuple[str, ...], *words: str) -> int:
    return main(["submit", "demo_cpu", *LAYOUT, "--chain", *(f"--set={text}" for text in corpus), *words])


def test_a_chain_is_queued_one_after_the_other(cluster: Cluster, corpus: tuple[str, ...]) -> None:
    assert submit_chain(corpus, "--after=7") == 0
    stages = [Path(words[-1]).stem for words in cluster.queued]
    assert stages == ["pretrain", "convert", "evaluate"]
    dependencies = [words[1:-1] for words in cluster.queued]
    assert dependencies == [[f"--dependency=afterok:{job}"] for job in ("7", "101", "102")]
    record = json.loads(Path("runs/demo/submission.json").read_text())
    assert record["jobs"] == {"pretrain": ["101"], "convert": ["102"], "evaluate": ["103"]}
    run = Path.cwd() / "runs" / "demo"
    assert f"\nset -- {run} {run}/export\n" in (run / "convert.sbatch").read_text()
    evaluate = (run / "evaluate.sbatch").read_text()
    assert "#SBATCH --nodes=2\n" in evaluate and "#SBATCH --ntasks-per-node=2\n" in evaluate
    # One core is enough.
    assert "#SBATCH --nodes=1\n" in (run / "convert.sbatch").read_text()


def test_a_chain_ends_with_the_tasks_of_the_recipe(cluster: Cluster, corpus: tuple[str, ...]) -> None:
    assert submit_chain(corpus, "--set", "evaluation.tasks=[piqa]", "--set", "evaluation.limit=5") == 0
    run = Path.cwd() / "runs" / "demo"
    assert [Path(words[-1]).stem for words in cluster.queued][-2:] == ["evaluate", "harness"]
    assert cluster.queued[-1][1:-1] == ["--dependency=afterok:103"]
    harness = (run / "harness.sbatch").read_text()
    assert f"\nset -- {run} --trust-recipe\n" in harness and "#SBATCH --ntasks-per-node=2\n" in harness


@pytest.mark.parametrize(
    ("tasks", "reason"),
    [
        ("[piqa, my.yaml]", "evaluation.tasks: my.yaml: no such file"),
        ("[piqa, a b]", "evaluation.data=no sets: no such folder; `txssm eval fetch 'no sets' --tasks piqa 'a b'`"),
    ],
)
def test_tasks_that_the_last_job_would_not_find(
    cluster: Cluster, corpus: tuple[str, ...], capsys: pytest.CaptureFixture[str], tasks: str, reason: str
) -> None:
    code = submit_chain(corpus, "--set", f"evaluation.tasks={tasks}", "--set", "evaluation.data=no sets")
    assert_refused(cluster, capsys, code, reason)


def test_tasks_that_lm_eval_does_not_have(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `task_manager` says it, which would take seconds."""

    def refuse(names: list[str]) -> None:
        assert names == ["piqq"]
        raise UserError("--tasks piqq: lm_eval has no such task")

    monkeypatch.setattr(harness_tasks, "task_manager", refuse)
    code = submit_demo(fields=("evaluation.tasks=[paper, piqq, my.yaml]",))
    assert_refused(cluster, capsys, code, "evaluation.tasks piqq: lm_eval has no such task")


@pytest.mark.parametrize("number", [2, 3])
def test_a_chain_that_breaks_off_is_taken_back(
    cluster: Cluster, corpus: tuple[str, ...], capsys: pytest.CaptureFixture[str], number: int
) -> None:
    (cluster.folder / "refuse_number").write_text(str(number))
    assert submit_chain(corpus) == 2
    assert "Socket timed out" in capsys.readouterr().err
    assert cluster.cancelled == ["101", "102"][: number - 1]


def test_a_disk_that_fills_up_takes_the_chain_back(
    cluster: Cluster, corpus: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = submission.write_json

    def full(path: Path, data: dict) -> None:
        if len(data["jobs"]) == 2:
            raise OSError(28, "No space left on device")
        write(path, data)

    monkeypatch.setattr(submission, "write_json", full)
    assert submit_chain(corpus) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert cluster.cancelled == ["101", "102"]


def test_a_job_that_is_gone_does_not_keep_the_others(
    cluster: Cluster, corpus: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    (cluster.folder / "refuse_number").write_text("3")
    with (cluster.folder / "scancel").open("a") as file:
        file.write('[ "$1" = 101 ] && { echo "scancel: error: Kill job error on job id 101" >&2; exit 1; }\nexit 0\n')
    assert submit_chain(corpus) == 2
    # The reason, not what followed from it.
    assert "Socket timed out" in capsys.readouterr().err
    assert cluster.cancelled == ["101", "102"]


def test_a_chain_does_not_convert_into_what_is_there(
    cluster: Cluster, corpus: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("runs/demo/export").mkdir(parents=True)
    assert submit_chain(corpus) == 2
    assert "export exists" in capsys.readouterr().err
    assert cluster.queued == []


def test_a_chain_without_texts_is_refused_before_anything_is_written(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts").mkdir()
    corpus = web_recipe(tmp_path, tmp_path / "texts")
    code = submit_chain((f"data.corpus={tmp_path}/corpus",), f"--corpus={corpus}")
    assert_refused(cluster, capsys, code, "texts holds no .parquet", "it is empty, or not a folder")


def test_a_chain_needs_a_corpus(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(cluster, capsys, submit_demo("--chain"), "--chain shards data.corpus")


def test_a_corpus_recipe_that_makes_another(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["submit", "demo_cpu", *LAYOUT, "--chain", "--corpus=smollm_corpus"])
    assert_refused(cluster, capsys, code, "smollm_corpus", "data.corpus=runs/demo/data/vocab_1024")
