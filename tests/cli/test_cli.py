"""The command line: help in under a second, exit codes, one line per mistake."""

import itertools
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_txssm.cli.main import main
from megatron_txssm.cli.parsing import GROUPS, VERBS, build_parser


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "megatron_txssm.cli", *words], capture_output=True, text=True)


def test_help_names_the_verbs() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert all(verb in done.stdout for verb in VERBS)
    assert "examples:" in done.stdout


@pytest.mark.parametrize("module", ["megatron_txssm", "megatron_txssm.cli", "megatron_txssm.cli.recipes"])
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
    # A former name's examples have the present one.
    assert f"  txssm {'eval' if verb == 'evaluate' else verb}" in capsys.readouterr().out


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


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--no-such-option"], "usage: txssm [-h]"),
        (["--versoin"], "--versoin: did you mean --version?"),
        (["recipes", "--no-such-option"], "usage: txssm recipes"),
        (["pretrain", "demo_cpu", "--nporc", "2"], "unrecognized arguments: --nporc 2; --nporc: did you mean --nproc?"),
        (["pretrain", "demo_cpu", "--nporc=2"], "--nporc: did you mean --nproc?"),
        (["check", "parity", "demo_cpu", "--layot", "tp2"], "--layot: did you mean --layout?"),
        (["submit", "demo_cpu", "--nods", "2"], "arguments are required: --nodes; --nods: did you mean --nodes?"),
        (["submit", "demo_cpu", "--nodes"], "--nodes: expected one argument\n"),
    ],
)
def test_argparses_own_errors_exit_with_2(words: list[str], wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert wanted in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["data"], ["check"], ["convert"]])
def test_without_a_verb_or_command_the_help_is_shown(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    # 2, not 0: a script whose variable is empty has got nothing done.
    assert main(words) == 2
    out, error = capsys.readouterr()
    assert out.startswith(" ".join(["usage: txssm", *words])) and "examples:" in out and not error


def test_every_verb_is_in_one_group_of_the_help() -> None:
    assert sorted(verb for verbs in GROUPS.values() for verb in verbs) == sorted(VERBS)


# Prints the heavy modules that the help of each verb and command imports.
ALL_HELP = """
import contextlib, io, sys
from megatron_txssm.cli.main import main
from megatron_txssm.cli.parsing import VERBS, build_parser

def names(parser):
    commands = [action.choices for action in parser._actions if action.dest == "command"]
    return list(commands[0]) if commands else []

for verb in VERBS:
    (verbs,) = (action.choices for action in build_parser(verb)._actions if action.dest == "verb")
    for words in ([verb], *([verb, name] for name in names(verbs[verb]))):
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
            main([*words, "--help"])
        assert out.getvalue().startswith(" ".join(["usage: txssm", *words]))
        print(*words, *(sorted(set(sys.argv[1:]) & set(sys.modules))))
"""
HEAVY = ("torch", "megatron", "transformers", "numpy", "pyarrow", "tokenizers", "huggingface_hub", "matplotlib")


def test_no_help_imports_what_takes_seconds() -> None:
    done = subprocess.run([sys.executable, "-c", ALL_HELP, *HEAVY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown = done.stdout.splitlines()
    assert {"serve", "convert export", "data train-tokenizer", "check parity"} <= set(shown), done.stdout
    assert not [line for line in shown if set(line.split()) & set(HEAVY)]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["--version"])
    assert capsys.readouterr().out == "txssm 0.1.0\n"


def test_interrupt_and_closed_pipe_are_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    import megatron_txssm.cli.main as cli

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


def test_letters_that_the_terminal_lacks_and_no_output_fail_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text('extends: demo_cpu\ndescription: "größer"\n', encoding="utf-8")
    command = [sys.executable, "-m", "megatron_txssm.cli", "recipes", str(tmp_path / "mine.yaml")]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "description: gr\\xf6\\xdfer\n" in done.stdout
    closed = subprocess.run(f"{shlex.join(command)} >&-", shell=True, capture_output=True, text=True)
    assert (closed.returncode, closed.stderr) == (0, "")


def test_a_deleted_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    command = f'cd gone && rmdir "$PWD" && {shlex.quote(sys.executable)} -m megatron_txssm.cli recipes'
    # -m looks for the module in the current folder.
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: the current folder has been deleted; change to one that is there\n"


def test_the_table_shows_every_recipe_with_its_size() -> None:
    done = run("recipes")
    assert done.returncode == 0
    rows = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    assert "base" not in rows
    assert "320.8M" in rows["transxssm_320m"]
    assert "3 x M-M-M-M-M-M-M-*-" in rows["transxssm_1.3b"]
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
    assert error.startswith("--train-data-path, ") and error.count("\n") == 1
    assert error.endswith("; make it: txssm data shard smollm_corpus\n")


def test_one_recipe_is_printed_in_full() -> None:
    done = run("recipes", "llama3_320m", "--set", "training.seed=7")
    assert "seed: 7" in done.stdout
    fields = run("recipes", "--fields").stdout
    assert "training.global_batch_tokens" in fields
    assert "--mamba-state-dim" in fields


def documented_commands() -> list[str]:
    """Every `txssm …` of the help's examples and of the code blocks in README.md and docs/."""
    root = Path(__file__).parents[2]
    lines = []
    for page in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        for block in page.read_text(encoding="utf-8").split("```")[1::2]:
            lines += block.replace("\\\n", " ").splitlines()
    for verb in VERBS:
        (verbs,) = (action.choices for action in build_parser(verb)._actions if action.dest == "verb")
        assert isinstance(verbs, dict)
        lines += verbs[verb].epilog.splitlines()
    return sorted({line.strip() for line in lines if line.strip().startswith("txssm ")})


def test_documented_commands_have_the_options_that_they_show() -> None:
    commands = documented_commands()
    assert len(commands) > 50
    for line in commands:
        # Several on a line; no shell runs here, so what is behind < or | is none of the command's.
        for command in line.partition("  #")[0].split("; "):
            words = list(itertools.takewhile(lambda word: word not in ("<", "|", ">"), shlex.split(command)))[1:]
            try:
                build_parser(words[0]).parse_args(words)
            except SystemExit:
                pytest.fail(f"{line!r} does not parse")
