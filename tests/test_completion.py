"""Completion at the tab key: asked as the shell asks, by a line and the file that the answer goes to."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_txssm.cli import build_parser
from megatron_txssm.completion import add_completers

pytest.importorskip("argcomplete", reason="argcomplete is not installed (requirements.txt)")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a run, and a recipe."""
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "recipe.yaml").touch()
    (tmp_path / "my_recipe.yaml").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def completed(folder: Path, line: str) -> list[str]:
    answer = folder / "answer"
    environment = os.environ | {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_SHELL": "bash",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    subprocess.run([sys.executable, "-m", "megatron_txssm.cli"], env=environment, check=True, stderr=subprocess.DEVNULL)
    return [word.strip() for word in answer.read_text().splitlines()]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("txssm pre", ["pretrain"]),
        ("txssm data tra", ["trace", "train-tokenizer"]),
        ("txssm pretrain demo_cpu --np", ["--nproc"]),
        ("txssm pretrain llama3_3", ["llama3_320m"]),
        ("txssm recipes my", ["my_recipe.yaml"]),
        ("txssm data shard smo", ["smollm_corpus"]),
        ("txssm why mi", ["mine"]),
        ("txssm evaluate runs/", ["runs/mine/"]),
        ("txssm pretrain demo_cpu --set optimizer.learn", ["optimizer.learning_rate="]),
        ("txssm convert export runs/mine out --layout ll", ["llama"]),
    ],
)
def test_completion(folder: Path, line: str, expected: list[str]) -> None:
    assert completed(folder, line) == expected


def test_what_is_completed_exists_in_the_parsers() -> None:
    """A renamed argument must not lose its completion."""
    for verb, dest in (("pretrain", "recipe"), ("why", "run"), ("generate", "model"), ("demo", "overrides")):
        parser = build_parser(verb)
        add_completers(parser)
        (verbs,) = (action.choices for action in parser._actions if action.dest == "verb")
        assert isinstance(verbs, dict)
        assert [action for action in verbs[verb]._actions if action.dest == dest and hasattr(action, "completer")]
