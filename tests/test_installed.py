"""The wheel, made from the sdist and installed where there is no checkout: recipes and batch scripts come along."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.slurm.some_queue import write_queue

ROOT = Path(__file__).parents[1]
# What the build reads.
SOURCES = ("megatron_txssm", "recipes", "slurm", "pyproject.toml", "setup.py", "README.md", "LICENSE")
UV = (sys.executable, "-m", "uv")
FIELDS = ("megatron.mock_data=true", "logging.eval_iters=1")


def relative_files(*patterns: str) -> set[str]:
    return {str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern)}


MODULES = relative_files("megatron_txssm/**/*.py", "megatron_txssm/reporting/page.*")
RESOURCES = relative_files("recipes/**/*.yaml", "slurm/*.sbatch", "slurm/entrypoint.sh", "slurm/env.example.sh")


def run(*words: str | Path, cwd: Path, **variables: str) -> str:
    """What a command prints, without the checkout and the settings of whoever runs the tests."""
    left_out = ("PYTHON", "TXSSM_", "SLURM_", "SBATCH_", "VIRTUAL_ENV", "UV_", "PIP_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    done = subprocess.run(words, cwd=cwd, env=environment | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "env.sh"))
        else:
            shutil.copy2(ROOT / name, source / name)
    (source / "slurm" / "env.sh").write_text("export TXSSM_WEBHOOK=secret\n")
    # What an earlier build leaves.
    (source / "build" / "lib" / "megatron_txssm").mkdir(parents=True)
    (source / "build" / "lib" / "megatron_txssm" / "moved.py").touch()
    build = (*UV, "build", "--no-build-isolation", "--offline", "--no-cache", "--no-config", "--python", sys.executable)
    # An sdist, and the wheel from that; then another wheel straight from the checkout, as `pip install .` makes it.
    run(*build, "--out-dir", folder, source, cwd=folder)
    run(*build, "--out-dir", folder / "direct", "--wheel", source, cwd=folder)
    return folder


@dataclass
class Installed:
    # A virtual environment, and the folder in which the commands run.
    environment: Path
    folder: Path

    @property
    def package(self) -> Path:
        return self.environment / "lib" / "python3.12" / "site-packages" / "megatron_txssm"

    def txssm(self, *words: str | Path, **variables: str) -> str:
        return run(self.environment / "bin" / "txssm", *words, cwd=self.folder, **variables)


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """In an environment that sees this one's libraries, but not the checkout, within another project's repository."""
    folder = tmp_path_factory.mktemp("project")
    found = Installed(folder / ".venv", folder)
    venv = (*UV, "venv", "--offline", "--no-config", "--no-project")
    run(*venv, "--python", sys.executable, found.environment, cwd=folder)
    # Python adds the folder, without running the .pth file in it that adds the checkout.
    (found.package.parent / "libraries.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    (wheel,) = built.glob("*.whl")
    install = (*UV, "pip", "install", "--offline", "--no-cache", "--no-config", "--no-deps")
    run(*install, "--python", found.environment, wheel, cwd=folder)
    run("git", "init", "--quiet", cwd=folder)
    identity = ("-c", "user.name=x", "-c", "user.email=x@example.org")
    run("git", *identity, "commit", "--quiet", "--allow-empty", "--message=x", cwd=folder)
    return found


def test_the_wheels_hold_all_modules_recipes_and_batch_scripts(built: Path) -> None:
    wheels = [*built.glob("*.whl"), *built.glob("direct/*.whl")]
    assert len(wheels) == 2
    for wheel in wheels:
        names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
        assert names == MODULES | {f"megatron_txssm/resources/{name}" for name in RESOURCES}


def test_the_sdist_holds_no_settings_of_a_site(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert MODULES | RESOURCES | {"setup.py", "pyproject.toml"} <= names
    assert "slurm/env.sh" not in names


def test_recipes_are_found_and_their_place_is_told(installed: Installed) -> None:
    table = installed.txssm("recipes")
    assert str(ROOT) not in table
    names = {path.stem for path in (ROOT / "recipes").glob("*.yaml")} - {"base"}
    assert names <= {line.split()[0] for line in table.splitlines()}
    resources = installed.package / "resources"
    assert table.endswith(f"recipes: {resources}/recipes\nbatch scripts: {resources}/slurm\n")
    assert "layer_pattern: M-M-M-M-M-M-M-*-\n" in installed.txssm("recipes", "demo_cpu")


def test_recipes_of_the_current_folder_go_first(installed: Installed, tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text("extends: demo_cpu\ndescription: ours\n")
    table = Installed(installed.environment, tmp_path).txssm("recipes")
    assert "ours\n" in table and "demo_cpu " in table
    assert f"recipes: {tmp_path}/recipes\nrecipes: {installed.package}/resources/recipes\n" in table


def test_a_corpus_recipe_is_found(installed: Installed) -> None:
    """Its sources are on the network; these lie here."""
    texts = installed.folder / "texts"
    texts.mkdir()
    (texts / "a.jsonl").write_text(json.dumps({"text": "a text", "blob_id": "1"}) + "\n")
    subsets = ("fineweb-edu-dedup", "cosmopedia-v2", "python-edu")
    plan = installed.txssm(
        "data", "shard", "smollm_corpus", "--plan", *(f"--set=subsets.{name}.source={texts}" for name in subsets)
    )
    assert [line.split()[0] for line in plan.splitlines() if line.startswith(subsets)] == list(subsets)


def test_a_recipe_is_trained(installed: Installed) -> None:
    fields = (*FIELDS, "run_directory=trained")
    fields += ("parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false", "training.seq_length=64")
    fields += ("training.micro_batch_size=1", "training.global_batch_tokens=64", "training.train_iters=2")
    installed.txssm("pretrain", "demo_cpu", *(f"--set={text}" for text in fields), OMP_NUM_THREADS="1")
    lines = map(json.loads, (installed.folder / "trained" / "metrics.jsonl").read_text().splitlines())
    assert [line["iteration"] for line in lines if "lm loss" in line] == [1, 2]


# --- Jobs.

SUPERVISOR = "megatron_txssm/jobs/supervisor/supervisor.py"
# In the place of a job's Python: says what the job would import.
SHOWN = """\
#!/bin/sh
exec {python} -c 'import megatron_txssm.jobs.supervisor.supervisor as s, megatron_txssm.home as h
print(s.__file__, h.RECIPES)'
"""
SBATCH = """\
#!/bin/sh
[ "$1" = --test-only ] || echo 17
"""


@pytest.fixture(scope="module")
def cluster(installed: Installed) -> dict[str, str]:
    """Variables with which Slurm is there."""
    folder = installed.folder / "bin"
    folder.mkdir()
    shown = SHOWN.format(python=installed.environment / "bin" / "python")
    for name, text in {"sbatch": SBATCH, "shown": shown}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    write_queue(folder)
    (folder / "env.sh").write_text(f"TXSSM_PYTHON={folder}/shown\n")
    return {"PATH": f"{folder}:{os.environ['PATH']}", "TXSSM_ENV": str(folder / "env.sh")}


def submit(installed: Installed, cluster: dict[str, str], run_directory: str, words: Sequence[str]) -> str:
    fields = (*FIELDS, f"run_directory={run_directory}", "training.micro_batch_size=1")
    layout = ("--nodes=1", "--nproc-per-node=2")
    return installed.txssm("submit", "demo_cpu", *layout, *(f"--set={text}" for text in fields), *words, **cluster)


def run_job(script: Path, folder: Path) -> str:
    """What a submitted script prints, started as with `sbatch --export=NONE`."""
    return run("bash", script, cwd=folder, SLURM_JOB_ID="17")


def test_a_job_runs_a_copy_of_the_installed_code(installed: Installed, cluster: dict[str, str]) -> None:
    submit(installed, cluster, "frozen", ())
    folder = installed.folder / "frozen"
    record = json.loads((folder / "submission.json").read_text())
    # That of the repository around it is not the code's.
    assert record["git_commit"] is None
    code = Path(record["code"])
    assert code.parent == folder / "code" and code.name.startswith("0.1.0-")
    files = {str(path.relative_to(code)) for path in code.rglob("*") if path.is_file()}
    assert files == MODULES | RESOURCES
    assert run_job(folder / "pretrain.sbatch", installed.folder) == f"{code}/{SUPERVISOR} {code}/recipes\n"


def test_a_job_without_a_copy_runs_the_installed_code(installed: Installed, cluster: dict[str, str]) -> None:
    shown = submit(installed, cluster, "unfrozen", ("--no-freeze-code", "--dry-run"))
    assert not (installed.folder / "unfrozen").exists()
    script = installed.folder / "shown.sbatch"
    script.write_text(shown.rpartition("\ndemo_cpu: ")[0] + "\n")
    place = installed.package
    assert run_job(script, installed.folder) == f"{place.parent}/{SUPERVISOR} {place}/resources/recipes\n"
