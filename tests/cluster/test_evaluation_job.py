"""txssm eval harness --submit: a job that is queued again goes on with its responses."""

import json
import shlex
from pathlib import Path

from megatron_txssm.data.tokenizer.huggingface import export_tokenizer
from megatron_txssm.data.tokenizer.sentencepiece import train_sentencepiece
from megatron_txssm.recipe.corpus.schema import TokenizerSource
from tests.cluster.sandbox import Sandbox
from tests.cluster.test_chain import wait_for
from tests.cluster.training_job import OVER, txssm
from tests.evaluation.tiny_tasks import write_tasks
from tests.hf.tiny import tiny_model

# The job is queued again after the first answers; were it over by then, Slurm would start it again all the same.
QUESTIONS = 60


def write_model(folder: Path) -> Path:
    texts = [f"def function_{number}(value): return value + {number}\n" for number in range(50)]
    tokenizer = train_sentencepiece(texts, folder.parent / "tokenizer", 300)
    tiny_model(vocab_size=300, max_position_embeddings=32).save_pretrained(folder)
    export_tokenizer(TokenizerSource(type="SentencePieceTokenizer", model=str(tokenizer)), folder, texts[0])
    return folder


def test_a_job_that_is_queued_again_goes_on(sandbox: Sandbox, tmp_path: Path) -> None:
    model = write_model(tmp_path / "it's a $(model) of 5%j")
    task = write_tasks(tmp_path / "tasks")["multiple_choice"]
    questions = task.parent / "questions.jsonl"
    lines = [json.loads(line) for line in questions.read_text().splitlines()]
    many = [line | {"question": f"{turn} {line['question']}"} for turn in range(QUESTIONS // 12) for line in lines]
    questions.write_text("".join(json.dumps(line) + "\n" for line in many))
    words = ["eval", "harness", model.name, "--batch-size", "1", "--tasks", str(task), "--num-fewshot", "0"]
    words += ["--submit", "--nodes", "1", "--nproc-per-node"]
    refused = txssm(sandbox, *words, "2", cwd=tmp_path)
    assert refused.returncode == 2 and "one process" in refused.stderr
    shown = txssm(sandbox, *words, "1", "--dry-run", cwd=tmp_path)
    assert shown.returncode == 0 and shlex.quote(str(model)) in shown.stdout
    output = model / "evaluation" / "harness"
    assert not output.exists()

    done = txssm(sandbox, *words, "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    [job] = json.loads((output / "submission.json").read_text())["jobs"]["harness"]
    log = output / "logs" / f"harness-{job}.out"
    assert str(log) in done.stdout
    again = txssm(sandbox, *words, "1", cwd=tmp_path)
    assert again.returncode == 2 and f"already has job {job}" in again.stderr

    def said() -> str:
        return log.read_text() if log.exists() else "no log"

    def answered() -> bool:
        return any(file.stat().st_size for file in output.glob("*/responses.jsonl"))

    wait_for(answered, said)
    sandbox.slurm("scontrol", "requeue", job)
    # Slurm lets a job that was queued again wait for two minutes.
    sandbox.slurm("scontrol", "update", f"JobId={job}", "StartTime=now")
    wait_for(lambda: "start 2" in said() and sandbox.job_state(job) in OVER, said)
    assert sandbox.job_state(job) == "COMPLETED", said()
    assert "going on with" in said()
    [results] = output.glob("*/results.json")
    assert json.loads(results.read_text())["tasks"]["tiny_multiple_choice"]["metrics"]
    assert txssm(sandbox, "logs", str(output)).stdout in said()
    assert f"job {job} is finished" in txssm(sandbox, "why", str(output)).stdout
