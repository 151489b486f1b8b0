"""Over a hundred hostile values against the real commands of Slurm: each is refused, or arrives in the job as data.

The stand-in for the job's interpreter only writes down what it was started with.
"""

import contextlib
import io
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from megatron_txssm.cli.main import main
from megatron_txssm.data.corpus.shard import write_shard
from megatron_txssm.jobs.limits import Limits
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.recipe import Recipe
from tests.cluster.sandbox import PATIENCE, Sandbox

MODEL = {"layer_pattern": "*-", "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 2}
TRAINING = {
    "seq_length": 32,
    "global_batch_tokens": 128,
    "train_iters": 60,
    "precision": "fp32",
    "transformer_impl": "local",
}
STAND_IN = """\
#!{python} -ISE
import json, os, sys
with open(os.path.join({arrived!r}, os.environ["SLURM_JOB_ID"]), "w") as file:
    json.dump(sys.argv[1:], file)
"""

# TOUCH makes the file that must never be there.
SHELL = {
    "substitution": "$(TOUCH)",
    "backticks": "`TOUCH`",
    "semicolon": "; TOUCH",
    "single quotes": "'; TOUCH; '",
    "double quotes": '"; TOUCH; "',
    "and": "&& TOUCH &",
    "pipe": "| TOUCH",
    "redirection": "> SENTINEL",
    "process substitution": "<(TOUCH)",
    "line": "x\nTOUCH\n",
    "quoted line": "x'\nTOUCH\n'",
    "sbatch line": 'x\n#SBATCH --wrap="TOUCH"\n',
    "sbatch line in quotes": "x'\n#SBATCH --wrap='TOUCH'\n",
    "carriage return": "x\r\nTOUCH\r",
    "here document": "x\nEOF\nTOUCH\n",
    "variable": "${IFS}$((1+1))$HOME~",
    "history": "!!",
}
TEXT = {
    "job number": "%j-%x",
    "format": "%s%n{0}{x}",
    "right to left": "\u202egnp.slaunam\u202c",
    "zero": "\0",
    "zero inside": "a\0b",
    "symbol for zero": "\u2400",
    "terminal": "\x07\x1b[2J\x1b]0;x\x07",
    "10 kB": "x" * 10_000,
    "options": "-rf",
    "option of sbatch": "--wrap=TOUCH",
    "globs": "*?[a-z]{a,b}",
    "upwards": "../../up",
    "spaces": " a  b ",
    "tab": "\t",
    "empty": "",
    "backslashes": "\\\\n\\",
    "unicode": "é\u0301ß漢字😀",
    "unicode line ends": "a\u2028b\u2029c\x85d\ufeff",
    "half a character": "\udcff",
    "null": "null",
    "number": "007",
    "float": "1e3",
    "tag": "!!python/object/apply:os.system ['TOUCH']",
    "alias": "&a [*a]",
    "comment": "a # b",
    "mapping": "{a: [b, 'c': d]}",
    "dot": ".",
}
HOSTILE = SHELL | TEXT
# A command line cannot hold zeros, YAML no halves of characters.
NOT_IN_WORDS = {"zero", "zero inside"}
NOT_IN_FILES = {"half a character"}
# For a file system.
TOO_MUCH = ("line", "10 kB", *NOT_IN_FILES)

# Where Megatron, W&B or the file system takes any text; then where it must be plain.
FREE = ("description", "data.tokenizer_model", "logging.wandb_project", "logging.wandb_name", "megatron.wandb_entity")
PATHS = ("checkpoint.directory", "data.train", "RECIPE")
PLAIN = ("run_directory", "name")
OPTIONS = ("--account", "--partition", "--time", "--sbatch", "--after", "--corpus")


@dataclass
class Case:
    """One value in one place, and what became of it."""

    # A field of the recipe, an option, or RECIPE: the folder of the recipe's file.
    place: str
    kind: str
    value: str
    # What main returned, or a traceback.
    code: int | str = field(default="not run", init=False)
    stderr: str = field(default="", init=False)
    job: str | None = field(default=None, init=False)
    # What the stand-in was started with, the recipe in the file that it was given, and the job's account.
    argv: list[str] = field(default_factory=list, init=False)
    recipe: Recipe | None = field(default=None, init=False)
    account: str = field(default="", init=False)


def _cases() -> list[Case]:
    found = [Case("description", kind, text) for kind, text in HOSTILE.items()]
    kinds = list(HOSTILE)
    places = (*FREE[1:], *PATHS, *PLAIN, *OPTIONS)
    for start, place in enumerate(places):
        # Other values in every place.
        for number in range(6 if place in OPTIONS else 10):
            kind = kinds[(3 * start + 7 * number) % len(kinds)]
            # Of no process's command line; and job 7 there may be.
            if place not in (*OPTIONS, "RECIPE") or kind not in (*NOT_IN_WORDS, "number"):
                found.append(Case(place, kind, HOSTILE[kind]))
    # What the file system itself refuses.
    found += [
        Case(place, kind, HOSTILE[kind]) for place in (*PATHS, *PLAIN) for kind in ("line", "10 kB", *NOT_IN_FILES)
    ]
    found += [Case(place, "zero inside", HOSTILE["zero inside"]) for place in ("checkpoint.directory", "data.train")]
    # Words that look plain enough.
    accounts = ("%j", "a[1-2]", "a(b)*", "../x", "-rf", "--wrap=x", "a:b,c=d")
    runs = ("--wrap=SENTINEL", "-rf", "--", "a=b", "runs/x/../y", "@x")
    options = ("wrap=SENTINEL", "comment=$HOME", "x y", "-N9", "#=1", "=", "partition=")
    for place, values in (("--account", accounts), ("run_directory", runs), ("--sbatch", options)):
        found += [Case(place, value, value) for value in values]
    found += [Case(place, "empty", "") for place in ("--account", "--partition", "--time")]
    return list({(case.place, case.kind): case for case in found}.values())


CASES = _cases()


def as_yaml(data: Any) -> str:
    """As JSON, which is YAML but for characters beyond 16 bits."""
    pairs = r"\\u(d[89ab]..)\\u(d[c-f]..)"
    return re.sub(pairs, lambda pair: f"\\U{ord(json.loads(f'{chr(34)}{pair[0]}{chr(34)}')):08x}", json.dumps(data))


class Site:
    """A folder with data, a stand-in for the interpreter, and room for what the jobs say."""

    def __init__(self, folder: Path):
        self.folder = folder
        # All jobs that Slurm got.
        self.queued: set[str] = set()
        self.arrived = folder / "arrived"
        self.arrived.mkdir()
        stand_in = folder / "interpreter"
        stand_in.write_text(STAND_IN.format(python=sys.executable, arrived=str(self.arrived)))
        stand_in.chmod(0o755)
        # In the job entrypoint.sh reads it, after the batch script named its interpreter.
        self.settings = folder / "env.sh"
        self.settings.write_text(f"export TXSSM_PYTHON={stand_in}\n")
        # Deep enough for values that go upwards.
        self.home = folder / "a" / "b" / "c"
        self.home.mkdir(parents=True)
        self.tokens = folder / "tokens"
        write_shard([[1, 2, 3], [4, 5]], self.tokens, vocab_size=64, eod=0)

    def submit(self, case: Case, number: int) -> None:
        case.value = case.value.replace("TOUCH", f"touch {self.folder}/SENTINEL SENTINEL")
        words = self._words(case, number)
        stdout, stderr = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            try:
                case.code = main(["submit", *words, "--nodes=1", "--nproc-per-node=1"])
            except BaseException:
                case.code = traceback.format_exc(limit=-3)
        case.stderr = stderr.getvalue()
        jobs = [line.split()[2] for line in stdout.getvalue().split("\n") if line.startswith("pretrain: job ")]
        case.job = jobs[0] if jobs else None

    def _words(self, case: Case, number: int) -> list[str]:
        """The command line; its recipe is written, and its data are there, if a file may be called so."""
        recipe: dict[str, Any] = {
            "name": f"r{number}",
            "run_directory": f"runs/{number}",
            "model": MODEL,
            "training": TRAINING,
            "optimizer": {"learning_rate": 1e-3},
            "checkpoint": {"save_interval": 10},
            "logging": {"eval_iters": 0},
            "data": {"tokenizer_type": "NullTokenizer", "vocab_size": 64},
            "megatron": {"mock_data": True},
        }
        words: list[str] = []
        file = Path("recipes") / f"{number}.yaml"
        if case.place == "--corpus":
            recipe |= {"data": {"corpus": "nowhere", "vocab_size": 64}, "megatron": {}}
            words = ["--chain"]
        elif case.place == "data.train":
            recipe["megatron"] = {}
            with contextlib.suppress(OSError, ValueError):
                for suffix in (".bin", ".idx"):
                    target = Path(f"{case.value}{suffix}")
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.symlink_to(self.tokens.with_suffix(suffix))
        elif case.place == "data.tokenizer_model":
            recipe["data"]["tokenizer_type"] = "HuggingFaceTokenizer"
        if case.place == "RECIPE":
            file = file.parent / case.value / file.name
        elif case.place.startswith("--"):
            words.append(f"{case.place}={case.value}")
        elif case.kind in NOT_IN_WORDS or (number % 2 == 0 and case.kind not in NOT_IN_FILES):
            section, _, name = case.place.rpartition(".")
            (recipe[section] if section else recipe)[name] = case.value
        else:
            # In quotes, or null were no text.
            words = ["--set", f"{case.place}={case.value if case.kind in NOT_IN_FILES else as_yaml(case.value)}"]
        with contextlib.suppress(OSError, ValueError):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(as_yaml(recipe))
        return [str(file), *words]

    def listen(self, case: Case) -> None:
        """Take what the job said."""
        path = self.arrived / (case.job or "none")
        if path.exists():
            case.argv = json.loads(path.read_text())
            case.recipe = load_recipe(case.argv[2])


@pytest.fixture(scope="module")
def site(sandbox: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """After every case was submitted and every job has ended."""
    # Where nodes are down, submit warns.
    sandbox.wait_idle(["n1", "n2", "n3"])
    site = Site(tmp_path_factory.mktemp("hostile"))
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ.keys() - sandbox.env.keys():
            patch.delenv(name)
        for name, value in (sandbox.env | {"TXSSM_ENV": str(site.settings)}).items():
            patch.setenv(name, value)
        # What the settings set in this process.
        patch.setenv("TXSSM_PYTHON", "")
        patch.chdir(site.home)
        before = job_lines(sandbox).keys()
        for number, case in enumerate(CASES):
            site.submit(case, number)
        end = time.monotonic() + PATIENCE
        while any(state in ("PENDING", "RUNNING", "COMPLETING") for state, _ in job_lines(sandbox).values()):
            assert time.monotonic() < end, sandbox.slurm("squeue")
            time.sleep(0.1)
        after = job_lines(sandbox)
        for case in CASES:
            if case.job is not None:
                case.account = after[case.job][1] if case.job in after else "no such job"
                site.listen(case)
        site.queued = after.keys() - before
        yield site


def job_lines(sandbox: Sandbox) -> dict[str, tuple[str, str]]:
    """Job -> state, account."""
    lines = sandbox.slurm("squeue", "--states=all", "--noheader", "--format=%i %T %a").splitlines()
    return {job: (state, account) for job, state, account in (line.split(" ", 2) for line in lines)}


def field_value(recipe: Recipe, place: str) -> Any:
    section, _, name = place.rpartition(".")
    if section == "megatron":
        return recipe.megatron[name]
    return getattr(getattr(recipe, section) if section else recipe, name)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.place}: {case.kind}")
def test_a_value_is_refused_or_arrives(site: Site, case: Case) -> None:
    if case.job is None:
        assert case.code == 2, case.code
        assert case.stderr.startswith("error: ") and case.stderr.endswith("\n")
        lines = case.stderr.removesuffix("\n").split("\n")
        assert len(lines) == 1 or "\n" in case.value
        # Nothing that a terminal would obey, and short enough to read.
        assert all(line.isprintable() for line in lines), ascii(case.stderr)
        assert len(case.stderr) < 1500
        return
    assert (case.code, case.stderr) == (0, "")
    assert case.value or not case.place.startswith("--"), "nothing is no option"
    assert case.recipe is not None, "the job did not start the supervisor"
    run = case.recipe.run_path.resolve() if case.recipe.run_path.is_absolute() else site.home / case.recipe.run_path
    run = Path(os.path.normpath(run))
    assert case.argv == ["-m", "megatron_txssm.jobs.supervisor.supervisor", f"{run}/recipe.yaml", *Limits().words]
    # The run's recipe holds paths from the root; the tokenizer's, where there is such a file.
    place = os.path.normpath(site.home / case.value)
    if case.place == "data.train":
        assert case.recipe.data.train == ((1.0, place),)
    elif case.place in ("checkpoint.directory", "run_directory"):
        # Empty: the default one.
        value = field_value(case.recipe, case.place)
        assert os.path.normpath(value) == place if case.value else value == ""
    elif case.place == "data.tokenizer_model":
        assert field_value(case.recipe, case.place) in (case.value, place)
    elif case.place == "--account":
        assert case.account == case.value
    elif not case.place.startswith("--") and case.place != "RECIPE":
        assert field_value(case.recipe, case.place) == case.value


def test_nothing_was_run_and_nothing_else_was_queued(site: Site) -> None:
    assert [path for path in site.folder.rglob("SENTINEL*") if path.is_file() and " " not in path.name] == []
    assert site.queued == {case.job for case in CASES if case.job is not None}


def test_there_were_a_hundred_of_both_kinds(site: Site) -> None:
    assert len({(case.place, case.value) for case in CASES}) == len(CASES) > 100
    assert all(case.code != "not run" for case in CASES)
    arrived = [case for case in CASES if case.recipe is not None]
    refused = [case for case in CASES if case.code == 2]
    assert len(arrived) > 50 and len(refused) > 50
    # Free text arrives; where a batch script or a folder is named after it, it does not.
    assert {case.place for case in arrived} >= {*FREE, *PATHS, *PLAIN, "--account"}
    assert {case.place for case in refused} >= {*PATHS, *PLAIN, *OPTIONS}
