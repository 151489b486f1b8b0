"""Options of sbatch as sites and users write them: what passes, what a run decides itself, what hurts if left out."""

import os

import pytest

from megatron_txssm.errors import UserError
from megatron_txssm.slurm.sbatch_options import OURS, check_time, costly_defaults, parse_options
from megatron_txssm.slurm.time_limit import limit_seconds


def test_options_as_people_write_them() -> None:
    texts = ["exclusive", "mem=0", "exclude=n[1-3,7]", "comment=a=b", "gres=gpu:h100:8", "time=1-00:00:00"]
    assert parse_options(texts, "--sbatch") == {
        "exclusive": None,
        "mem": "0",
        "exclude": "n[1-3,7]",
        "comment": "a=b",
        "gres": "gpu:h100:8",
        "time": "1-00:00:00",
    }
    # The last counts.
    assert parse_options(["mem=0", "mem=1G"], "--sbatch") == {"mem": "1G"}
    assert parse_options([], "--sbatch") == {}


@pytest.mark.parametrize(
    "text", ["", "=", "=x", "-N4", "--exclusive", "mem 0", "a\nb", "1=2", "comment=$x", "x=é", "_x", "mem=0 "]
)
def test_what_is_no_option_is_refused(text: str) -> None:
    with pytest.raises(UserError) as error:
        parse_options(["exclusive", text], "--sbatch")
    assert str(error.value).startswith("--sbatch ") and repr(text) in str(error.value)


@pytest.mark.parametrize(
    ("text", "ours"),
    [
        ("nodes=3", "set by --nodes"),
        ("ntasks=4", "set by --nproc-per-node or --gpus-per-node"),
        ("ntasks-per-node=4", "set by --nproc-per-node or --gpus-per-node"),
        ("tasks-per-node=4", "set by --nproc-per-node or --gpus-per-node"),
        ("gpus-per-node=4", "set by --gpus-per-node"),
        ("gpus=4", "set by --gpus-per-node"),
        ("signal=TERM@5", "set by --stop-before"),
        ("dependency=singleton", "set by --after"),
        ("job-name=x", "set by the recipe's name"),
        ("output=x", "fixed: a run's jobs write to its folder"),
        ("error=x", "fixed: a run's jobs write to its folder"),
        ("open-mode=truncate", "fixed: a run's jobs write to its folder"),
        ("requeue", "fixed: a run's jobs restart by themselves"),
        ("no-requeue", "fixed: a run's jobs restart by themselves"),
        ("no-kill", "fixed: a run's jobs restart by themselves"),
        ("kill-on-invalid-dep=no", "fixed: a run's jobs restart by themselves"),
    ],
)
def test_what_a_run_decides_itself_is_refused(text: str, ours: str) -> None:
    with pytest.raises(UserError) as error:
        parse_options(["exclusive", text], "TXSSM_SBATCH_OPTIONS")
    assert str(error.value).startswith(f"TXSSM_SBATCH_OPTIONS '{text}' is {ours}")


@pytest.mark.parametrize("text", ["nodes", "ntasks-per-n=4", "sig=TERM@5", "no-req", "out=x", "tim=1", "par=x"])
def test_the_beginning_of_an_option_is_not_enough(text: str) -> None:
    # sbatch would take it for the option, and what it means here would not be known.
    with pytest.raises(UserError, match=r"must be the whole name of an option|is set by"):
        parse_options([text], "--sbatch")


def test_every_beginning_of_what_is_refused_is_refused() -> None:
    for name in OURS:
        for end in range(1, len(name) + 1):
            if name[:end] not in ("no",):
                with pytest.raises(UserError):
                    parse_options([name[:end]], "--sbatch")


def test_an_option_of_a_newer_slurm_passes() -> None:
    assert parse_options(["quantum-cores=4"], "--sbatch") == {"quantum-cores": "4"}


# --- Time limits.


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("01:00:00", 3600),
        ("1-0", 86400),
        ("2-12:30", 2 * 86400 + 12 * 3600 + 1800),
        ("1-00:00:01", 86401),
        ("0", float("inf")),
        ("0:00", float("inf")),
        ("UNLIMITED", float("inf")),
        ("infinite", float("inf")),
    ],
)
def test_a_time_limit_in_each_of_slurms_formats(text: str, seconds: float) -> None:
    assert limit_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "noon", "1:", "1-", "-5", "1:2:3:4", "1.5", "٣", "1-2:3:4:5"])
def test_what_is_no_time_limit_is_left_to_sbatch(text: str) -> None:
    assert limit_seconds(text) is None
    check_time({"time": text}, 120)


@pytest.mark.parametrize("text", ["2", "2:00", "0:01", "0:2:0"])
def test_a_limit_that_ends_before_it_begins(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=rf"^--time {text} is \d+ s, and --stop-before 120 makes .* longer limit"):
        check_time({"time": text}, 120)
    check_time({"time": text}, 0)
    monkeypatch.setenv("SBATCH_TIMELIMIT", text)
    with pytest.raises(UserError, match=rf"^SBATCH_TIMELIMIT {text} is"):
        check_time({}, 120)
    # What is stated overrules the variable.
    check_time({"time": "1:00:00"}, 120)


# --- What hurts if nobody asks for it.


@pytest.mark.parametrize(
    ("options", "variables", "words"),
    [
        ({}, [], ["cpus-per-task=N", "mem=0", "exclusive"]),
        ({"exclusive": None}, [], ["mem=0"]),
        ({"cpus-per-task": "12", "mem": "0", "exclusive": "user"}, [], []),
        ({"cpus-per-gpu": "12", "mem-per-gpu": "100G"}, [], ["exclusive"]),
        ({}, ["SBATCH_EXCLUSIVE", "SBATCH_MEM_PER_NODE"], []),
    ],
)
def test_costly_defaults_are_named(
    options: dict[str, str | None], variables: list[str], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(os.environ):
        if name.startswith("SBATCH_"):
            monkeypatch.delenv(name)
    for name in variables:
        monkeypatch.setenv(name, "1")
    assert [text.split(" ")[0] for text in costly_defaults(options)] == words
