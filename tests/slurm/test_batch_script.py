"""Batch scripts: options in the place of the template's, and words that bash hands on as they are."""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_txssm.errors import UserError
from megatron_txssm.home import HOME
from megatron_txssm.slurm import batch_script
from megatron_txssm.slurm.batch_script import load_site_settings, render

STAGES = sorted(path.stem for path in (HOME / "slurm").glob("*.sbatch"))
# What no shell may take apart.
WORDS = [
    "",
    " ",
    "a b",
    "$HOME",
    "$(id)",
    "`id`",
    "'",
    '"',
    "\\",
    "*",
    "~",
    "!!",
    "-rf",
    "a\nb",
    "#x",
    "é\u202e😀",
    "\t",
]


def options(script: str) -> list[str]:
    """The options that sbatch reads: those above the first command."""
    lines = script.split("\n")
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    return [line.removeprefix("#SBATCH --") for line in lines[:first] if line.startswith("#SBATCH")]


def run_script(script: str, tmp_path: Path) -> tuple[list[str], dict[str, str]]:
    """What the rendered script starts in place of entrypoint.sh: its words and environment."""
    home = tmp_path / "a home"
    (home / "slurm").mkdir(parents=True, exist_ok=True)
    entrypoint = home / "slurm" / "entrypoint.sh"
    entrypoint.write_text("#!/bin/bash\nprintf '%s\\0' \"$@\" --\nenv -0\n")
    entrypoint.chmod(0o755)
    path = tmp_path / "script"
    path.write_text(script.replace(f"TXSSM_HOME={HOME} ", f"TXSSM_HOME={shlex.quote(str(home))} "))
    output = subprocess.run(["bash", str(path)], check=True, capture_output=True, cwd=tmp_path).stdout
    found = output.decode().split("\0")
    end = found.index("--")
    return found[:end], dict(entry.split("=", 1) for entry in found[end + 1 :] if "=" in entry)


def test_there_are_the_stages() -> None:
    assert STAGES == ["convert", "evaluate", "harness", "pretrain", "shard"]


@pytest.mark.parametrize("stage", STAGES)
def test_every_template_renders_and_hands_its_words_on(stage: str, tmp_path: Path) -> None:
    script = render(stage, {}, WORDS)
    assert script.startswith("#!/usr/bin/env bash\n") and script.endswith("\n")
    words, environment = run_script(script, tmp_path)
    assert words == [stage, *WORDS]
    assert environment["TXSSM_PYTHON"] == sys.executable
    assert Path(environment["TXSSM_HOME"]).name == "a home"


def test_the_site_s_settings_are_named_in_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under sbatch --export=NONE the job has no variable of who submitted it."""
    monkeypatch.setenv("TXSSM_ENV", str(tmp_path / "the site's env.sh"))
    # Not there: the job says so itself where it was named, and needs none else.
    assert "TXSSM_ENV" not in render("pretrain", {})
    (tmp_path / "the site's env.sh").touch()
    script = render("pretrain", {})
    monkeypatch.delenv("TXSSM_ENV")
    assert run_script(script, tmp_path)[1]["TXSSM_ENV"] == str(tmp_path / "the site's env.sh")


def test_a_script_may_run_other_code_than_this(tmp_path: Path) -> None:
    script = render("pretrain", {}, home=tmp_path / "a b")
    assert f"export TXSSM_HOME='{tmp_path}/a b' TXSSM_PYTHON=" in script


@pytest.mark.parametrize("stage", STAGES)
def test_without_words(stage: str, tmp_path: Path) -> None:
    assert run_script(render(stage, {}), tmp_path)[0] == [stage]


@pytest.mark.parametrize("stage", STAGES)
def test_what_every_job_needs(stage: str) -> None:
    # A job whose predecessor failed must not wait for ever, one that starts again must not lose its output.
    assert {"requeue", "open-mode=append", "kill-on-invalid-dep=yes"} <= set(options(render(stage, {})))


def test_options_are_replaced_left_out_and_appended() -> None:
    before = options(render("pretrain", {}))
    assert "nodes=1" in before and "gpus-per-node=8" in before and "requeue" in before
    changed = {"nodes": "4", "gpus-per-node": "", "exclusive": None, "time": "1-00:00:00", "exclude": "n[1-3],n7"}
    after = options(render("pretrain", changed))
    kept = [text for text in before if text.partition("=")[0] not in changed]
    assert sorted(after) == sorted([*kept, "nodes=4", "exclusive", "time=1-00:00:00", "exclude=n[1-3],n7"])
    # In the template's order, so that the two can be compared.
    assert after.index("nodes=4") == before.index("nodes=1")


def test_an_option_can_lose_its_value() -> None:
    assert "nodes" in options(render("pretrain", {"nodes": None}))


def test_comments_of_the_template_do_not_reach_the_options() -> None:
    assert all(" " not in text and "#" not in text for text in options(render("pretrain", {})))


def test_a_word_is_no_option(tmp_path: Path) -> None:
    script = render("pretrain", {}, ["x\n#SBATCH --wrap=evil\n"])
    assert not any("evil" in text for text in options(script))
    assert run_script(script, tmp_path)[0] == ["pretrain", "x\n#SBATCH --wrap=evil\n"]


@pytest.mark.parametrize(
    "value", ["a b", "a\nb", "a;b", "$x", "`x`", "'x'", '"x"', "a#b", "é", "a\\b", "a&b", "\x00", "a\n"]
)
def test_an_option_that_is_no_plain_word_is_refused(value: str) -> None:
    with pytest.raises(UserError, match=r"--partition .* must be one plain word") as error:
        render("pretrain", {"partition": value})
    assert str(error.value).isprintable()
    with pytest.raises(UserError, match="must be one plain word"):
        render("pretrain", {f"x{value}": "1"})


# --- The site's settings.


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file for $TXSSM_ENV; what it sets is undone."""
    before = dict(os.environ)
    path = tmp_path / "the site's env.sh"
    monkeypatch.setenv("TXSSM_ENV", str(path))
    yield path
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


def test_settings_are_taken_over(settings: Path) -> None:
    settings.write_text(
        "export TXSSM_TEST_A='a b\nc=d'\n"
        # Without export, too: what is in the file is for the job.
        'TXSSM_TEST_B="$TXSSM_TEST_A!"\n'
        "TXSSM_TEST_C=\n"
        "TXSSM_WEBHOOK=https://hooks.example.org/secret\n"
        "echo noise\n"
    )
    load_site_settings()
    # sbatch would hand it to slurmctld, which writes it to its spool.
    assert "TXSSM_WEBHOOK" not in os.environ
    assert os.environ["TXSSM_TEST_A"] == "a b\nc=d"
    assert os.environ["TXSSM_TEST_B"] == "a b\nc=d!"
    assert os.environ["TXSSM_TEST_C"] == ""


def test_settings_may_use_what_is_not_set(settings: Path) -> None:
    # As `module load` does.
    settings.write_text('TXSSM_TEST_A="$TXSSM_TEST_NEVER_SET:x"\n')
    load_site_settings()
    assert os.environ["TXSSM_TEST_A"] == ":x"


def test_an_environment_that_is_no_text_is_kept(settings: Path) -> None:
    settings.write_bytes(b"TXSSM_TEST_A=$'\\xff\\xfe'\n")
    load_site_settings()
    assert os.environb[b"TXSSM_TEST_A"] == b"\xff\xfe"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("module load cuda && exit 3\nexit 3\n", r"exit code 3\)"),
        ("echo 'no such module' >&2\nfalse\n", r"exit code 1\): no such module"),
        ("if\n", r"syntax error"),
    ],
)
def test_settings_that_fail_are_named(settings: Path, text: str, reason: str) -> None:
    settings.write_text(f"export TXSSM_TEST_A=1\n{text}")
    with pytest.raises(UserError, match=reason) as error:
        load_site_settings()
    assert str(error.value).startswith(f"{settings} fails")
    assert "TXSSM_TEST_A" not in os.environ


def test_settings_that_are_named_must_be_there(settings: Path) -> None:
    with pytest.raises(UserError, match=r"TXSSM_ENV.*no such file"):
        load_site_settings()


def test_a_relative_name_is_not_looked_for_in_path(settings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = settings.parent / "bin"
    other.mkdir()
    (other / "env.sh").write_text("TXSSM_TEST_A=another\n")
    (settings.parent / "env.sh").write_text("TXSSM_TEST_A=here\n")
    monkeypatch.setenv("PATH", f"{other}:{os.environ['PATH']}")
    monkeypatch.setenv("TXSSM_ENV", "env.sh")
    monkeypatch.chdir(settings.parent)
    load_site_settings()
    assert os.environ["TXSSM_TEST_A"] == "here"


@pytest.mark.parametrize("name", [None, ""])
def test_without_a_name_those_of_the_checkout(
    settings: Path, monkeypatch: pytest.MonkeyPatch, name: str | None
) -> None:
    if name is None:
        monkeypatch.delenv("TXSSM_ENV")
    else:
        monkeypatch.setenv("TXSSM_ENV", name)
    monkeypatch.setattr(batch_script, "HOME", settings.parent)
    # None there: nothing to do.
    load_site_settings()
    (settings.parent / "slurm").mkdir()
    (settings.parent / "slurm" / "env.sh").write_text("TXSSM_TEST_A=1\n")
    load_site_settings()
    assert os.environ["TXSSM_TEST_A"] == "1"


# --- entrypoint.sh, which every job runs.


@pytest.fixture
def entrypoint(tmp_path: Path) -> Path:
    """A copy, in a home of its own, with a stand-in interpreter that shows its words and what it finds set."""
    home = tmp_path / "home"
    (home / "slurm").mkdir(parents=True)
    copy = home / "slurm" / "entrypoint.sh"
    copy.write_bytes((HOME / "slurm" / "entrypoint.sh").read_bytes())
    copy.chmod(0o755)
    python = tmp_path / "python"
    shown = '"${TXSSM_TEST_A-unset}" "${SLURM_EXPORT_ENV-unset}" "$TRITON_CACHE_DIR" "$OMP_NUM_THREADS"'
    python.write_text(f"#!/bin/bash\nprintf '%s\\n' \"$@\" -- {shown}\n")
    python.chmod(0o755)
    return copy


def run_entrypoint(entrypoint: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    left_out = ("TXSSM_", "SLURM_", "TRITON_", "OMP_")
    given = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    given |= {"TXSSM_PYTHON": str(entrypoint.parents[2] / "python"), "TMPDIR": str(entrypoint.parents[2])}
    return subprocess.run([str(entrypoint), *words], env=given | environment, capture_output=True, text=True)


def test_the_job_runs_the_supervisor_with_its_words(entrypoint: Path) -> None:
    done = run_entrypoint(entrypoint, "pretrain", "a b", "--set", "x=$y")
    *words, _, setting, _, cache, _ = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "")
    assert words == ["-m", "megatron_txssm.jobs.supervisor.supervisor", "a b", "--set", "x=$y"]
    assert setting == "unset"
    assert Path(cache).is_relative_to(entrypoint.parents[2])


def test_the_job_sees_the_settings_as_submit_does(entrypoint: Path) -> None:
    # Not exported, and made from what is not set.
    (entrypoint.parent / "env.sh").write_text('TXSSM_TEST_A="$TXSSM_TEST_NEVER_SET:x"\n')
    done = run_entrypoint(entrypoint, "pretrain", "recipe")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-4] == ":x"


def test_the_steps_get_the_jobs_environment(entrypoint: Path) -> None:
    # Of `sbatch --export=NONE`: srun would keep from the trainer that it is one.
    done = run_entrypoint(entrypoint, "pretrain", "recipe", SLURM_EXPORT_ENV="NONE")
    assert done.stdout.splitlines()[-3] == "unset"


@pytest.mark.parametrize(
    ("given", "threads"),
    [({}, "1"), ({"SLURM_CPUS_PER_TASK": "12"}, "12"), ({"SLURM_CPUS_PER_TASK": "12", "OMP_NUM_THREADS": "4"}, "4")],
)
def test_a_rank_starts_as_many_threads_as_it_has_cores(entrypoint: Path, given: dict[str, str], threads: str) -> None:
    assert run_entrypoint(entrypoint, "pretrain", "recipe", **given).stdout.splitlines()[-1] == threads


def test_the_job_imports_the_code_beside_its_script(entrypoint: Path, tmp_path: Path) -> None:
    """Not what the interpreter has installed, nor what the settings or the current folder offer."""
    for folder in (tmp_path / "home", tmp_path / "site", tmp_path / "here"):
        (folder / "megatron_txssm" / "jobs" / "supervisor").mkdir(parents=True)
        (folder / "megatron_txssm" / "jobs" / "supervisor" / "supervisor.py").write_text("print(__file__)\n")
    (entrypoint.parent / "env.sh").write_text(f"PYTHONPATH={tmp_path}/site\n")
    words = [str(entrypoint), "pretrain", "recipe"]
    environment = os.environ | {"TXSSM_PYTHON": sys.executable, "TXSSM_ENV": ""}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=tmp_path / "here")
    assert (done.stdout, done.stderr) == (f"{tmp_path}/home/megatron_txssm/jobs/supervisor/supervisor.py\n", "")


def test_an_unknown_stage_is_refused(entrypoint: Path) -> None:
    done = run_entrypoint(entrypoint, "train")
    assert (done.returncode, done.stdout) == (2, "")
    assert "unknown stage 'train'; use pretrain, shard, convert, evaluate or harness" in done.stderr


def test_a_killed_stage_waits_for_slurmctld(entrypoint: Path) -> None:
    """Its srun ends as after a SIGKILL; slurmctld takes the third requeue."""
    commands, asked = entrypoint.parents[2] / "bin", entrypoint.parents[2] / "asked"
    commands.mkdir()
    for name, text in {
        "srun": "exit 137",
        "scontrol": f"echo \"$@\" >> '{asked}'; [ $(wc -l < '{asked}') -ge 3 ]",
        "sleep": "",
    }.items():
        (commands / name).write_text(f"#!/bin/bash\n{text}\n")
        (commands / name).chmod(0o755)
    path = f"{commands}:{os.environ['PATH']}"
    done = run_entrypoint(entrypoint, "convert", "run", "out", SLURM_JOB_ID="17", PATH=path)
    assert done.returncode == 137
    assert asked.read_text().splitlines() == ["requeue 17"] * 3
