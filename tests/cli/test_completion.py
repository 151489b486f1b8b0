"""Completion at the tab key: asked as the shell asks, by a line and the file that the answer goes to."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_txssm.cli.completion import add_completers
from megatron_txssm.cli.parsing import build_parser

pytest.importorskip("argcomplete", reason="argcomplete is not installed (requirements.txt)")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a run, and a recipe."""
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "recipe.yaml").touch()
    (tmp_path / "my_recipe.yaml").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def asked(line: str) -> dict[str, str]:
    """The variables by which a shell asks for what may follow `line`."""
    return {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_SHELL": "bash",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }


# In a process of its own, as argcomplete takes descriptors 8 and 9 for the shell's.
ANSWER_ALL = """
import io, json, os, sys
from megatron_txssm.cli.completion import complete

class Ended(Exception):
    pass

def end(code):
    raise Ended

answers = []
for variables in json.load(sys.stdin):
    os.environ.update(variables)
    answer = io.StringIO()
    try:
        complete(output_stream=answer, exit_method=end)
    except Ended:
        answers.append([word.strip() for word in answer.getvalue().splitlines()])
print(json.dumps(answers))
"""
EXPECTED = {
    "txssm pre": ["pretrain"],
    "txssm data tra": ["trace", "train-tokenizer"],
    "txssm pretrain demo_cpu --np": ["--nproc"],
    "txssm pretrain llama3_3": ["llama3_320m", "llama3_320m_gqa"],
    "txssm recipes my": ["my_recipe.yaml"],
    "txssm data shard smo": ["smollm_corpus"],
    "txssm why mi": ["mine"],
    "txssm eval loss runs/": ["runs/mine/"],
    "txssm pretrain demo_cpu --set optimizer.learn": ["optimizer.learning_rate="],
    "txssm convert export runs/mine out --layout ll": ["llama"],
}


@pytest.mark.usefixtures("folder")
def test_completion() -> None:
    questions = json.dumps([asked(line) for line in EXPECTED])
    command = [sys.executable, "-c", ANSWER_ALL]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, input=questions, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert dict(zip(EXPECTED, json.loads(done.stdout), strict=True)) == EXPECTED


def test_the_command_answers_a_shell(folder: Path) -> None:
    environment = os.environ | asked("txssm data tra") | {"_ARGCOMPLETE_STDOUT_FILENAME": str(folder / "answer")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    subprocess.run([sys.executable, "-m", "megatron_txssm.cli"], env=environment, check=True, stderr=subprocess.DEVNULL)
    assert (folder / "answer").read_text().split() == ["trace", "train-tokenizer"]


def test_what_is_completed_exists_in_the_parsers() -> None:
    """A renamed argument must not lose its completion."""
    for verb, dest in (("pretrain", "recipe"), ("why", "run"), ("generate", "model"), ("demo", "overrides")):
        parser = build_parser(verb)
        add_completers(parser)
        (verbs,) = (action.choices for action in parser._actions if action.dest == "verb")
        assert isinstance(verbs, dict)
        assert [action for action in verbs[verb]._actions if action.dest == dest and hasattr(action, "completer")]
