"""The command line: help in under a second, exit codes, one line per mistake."""

import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_txssm.cli import VERBS, build_parser, main


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "megatron_txssm.cli", *words], capture_output=True, text=True)


def test_help_answers_in_under_a_second() -> None:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = run("--help")
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0
        assert all(verb in done.stdout for verb in VERBS)
        assert "examples:" in done.stdout
    assert min(seconds) < 1


@pytest.mark.parametrize("module", ["megatron_txssm", "megatron_txssm.cli", "megatron_txssm.recipe.show"])
def test_imports_are_light(module: str) -> None:
    heavy = "{'torch', 'megatron', 'numpy', 'transformers', 'rich'} & set(sys.modules)"
    code = f"import sys, {module}; sys.exit(str({heavy}) if {heavy} else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_examples(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    assert f"  txssm {verb}" in capsys.readouterr().out


def test_a_users_mistake_is_one_line_and_exit_code_2() -> None:
    done = run("recipes", "transxssm_320")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: no recipe is named 'transxssm_320'; did you mean 'transxssm_320m'?")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["recipe"], "did you mean 'recipes'?"),
        (["recipes", "--megatron-args"], "need a RECIPE"),
        (["recipes", "demo_cpu", "--set", "training.sed=1"], "did you mean 'seed'?"),
    ],
)
def test_mistakes_return_2(words: list[str], wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert wanted in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["--no-such-option"], ["recipes", "--no-such-option"]])
def test_argparses_own_errors_exit_with_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert "usage: txssm" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["--version"])
    assert capsys.readouterr().out == "txssm 0.1.0\n"


def test_interrupt_and_closed_pipe_are_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    import megatron_txssm.cli as cli

    def interrupted(words: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupted)
    assert main([]) == 130
    done = subprocess.run(
        f"{shlex.quote(sys.executable)} -m megatron_txssm.cli recipes --fields | head -n 1",
        shell=True,
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""


def test_the_table_shows_every_recipe_with_its_size() -> None:
    done = run("recipes")
    assert done.returncode == 0
    assert "base" not in done.stdout
    rows = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    assert "320.8M" in rows["transxssm_320m"]
    assert "3 x SSSSSSSA" in rows["transxssm_1.3b"]
    assert "2,097,152" in rows["llama3_1.3b"]


def test_megatrons_arguments_need_no_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", "transxssm_320m", "--megatron-args"]) == 0
    out, error = capsys.readouterr()
    words = shlex.split(out)
    assert words[words.index("--hidden-size") + 1] == "768"
    assert not {"--train-data-path", "--tokenizer-type", "--tokenizer-model"} & set(words)
    assert error.startswith("without the corpus's --train-data-path, ") and error.count("\n") == 1
    assert error.endswith("; make it: txssm data shard smollm_corpus\n")


def test_one_recipe_is_printed_in_full() -> None:
    done = run("recipes", "llama3_320m", "--set", "training.seed=7")
    assert "seed: 7" in done.stdout
    fields = run("recipes", "--fields").stdout
    assert "training.global_batch_tokens" in fields
    assert "--mamba-state-dim" in fields
