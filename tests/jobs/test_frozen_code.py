"""A run's own copy of the code: what is on the disk, whole, and once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_txssm.errors import UserError
from megatron_txssm.home import HOME
from megatron_txssm.jobs.submission.frozen_code import FrozenCode


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A checkout, with what Python and a site leave in one."""
    home = tmp_path / "home"
    for name in (
        "megatron_txssm/__init__.py",
        "megatron_txssm/jobs/supervisor/supervisor.py",
        "megatron_txssm/__pycache__/x.cpython-312.pyc",
        "recipes/corpora/a.yaml",
        "slurm/entrypoint.sh",
        "slurm/env.sh",
        "slurm/env.sh~",
        "slurm/our_site.sh",
        "tests/test_x.py",
        ".git/HEAD",
    ):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(f"# {name}\n")
    (home / "slurm" / "entrypoint.sh").chmod(0o755)
    return home


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_copy_holds_what_a_job_runs(home: Path, tmp_path: Path) -> None:
    # Not committed, and not even known to git: it is what would run now.
    (home / "megatron_txssm" / "new.py").write_text("x = 1\n")
    code = FrozenCode(home, tmp_path / "run", "0123456789abcdef+changes")
    assert code.path.parent == tmp_path / "run" / "code" and code.path.name.startswith("0123456789ab-")
    assert not code.folder.exists()
    code.write()
    assert files(code.path) == {
        "megatron_txssm/__init__.py",
        "megatron_txssm/jobs/supervisor/supervisor.py",
        "megatron_txssm/new.py",
        "recipes/corpora/a.yaml",
        "slurm/entrypoint.sh",
    }
    assert os.access(code.path / "slurm" / "entrypoint.sh", os.X_OK)
    # Nothing half done is left.
    assert list(code.folder.iterdir()) == [code.path]


def test_the_same_code_is_copied_once_and_other_code_beside_it(home: Path, tmp_path: Path) -> None:
    first = FrozenCode(home, tmp_path / "run", None)
    first.write()
    inode = first.path.stat().st_ino
    again = FrozenCode(home, tmp_path / "run", None)
    again.write()
    assert again.path == first.path and again.path.stat().st_ino == inode
    # What Python leaves in it is no change.
    (first.path / "megatron_txssm" / "__pycache__").mkdir()
    (first.path / "megatron_txssm" / "__pycache__" / "y.pyc").touch()
    again.write()
    assert again.path.stat().st_ino == inode
    (home / "megatron_txssm" / "jobs" / "supervisor" / "supervisor.py").write_text("changed\n")
    other = FrozenCode(home, tmp_path / "run", None)
    other.write()
    assert other.path != first.path and first.path.is_dir()
    (other.folder / ".left-by-a-killed-one").mkdir()
    other.remove_others()
    assert list(other.folder.iterdir()) == [other.path]


def test_a_copy_that_somebody_changed_is_made_anew(home: Path, tmp_path: Path) -> None:
    code = FrozenCode(home, tmp_path / "run", None)
    code.write()
    (code.path / "megatron_txssm" / "__init__.py").write_text("changed\n")
    code.write()
    assert (code.path / "megatron_txssm" / "__init__.py").read_text() == "# megatron_txssm/__init__.py\n"


def test_code_that_changes_while_it_is_copied_is_refused(home: Path, tmp_path: Path) -> None:
    code = FrozenCode(home, tmp_path / "run", None)
    (home / "megatron_txssm" / "__init__.py").write_text("changed\n")
    with pytest.raises(UserError, match="has changed while it was copied; submit again"):
        code.write()
    assert list(code.folder.iterdir()) == []


def test_a_folder_whose_name_python_would_split_is_refused(home: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"contains a colon.*--no-freeze-code"):
        FrozenCode(home, tmp_path / "a:b", None)


def test_a_copy_of_this_checkout_runs_by_itself(tmp_path: Path) -> None:
    """From the checkout's own folder, with an interpreter that has the checkout installed."""
    code = FrozenCode(HOME, tmp_path / "run", None)
    code.write()
    assert sum(path.stat().st_size for path in code.path.rglob("*") if path.is_file()) < 5_000_000
    text = "import megatron_txssm.jobs.supervisor.supervisor as s, megatron_txssm.recipe.loader as r\n"
    text += "from megatron_txssm.home import RECIPES\n"
    text += "print(s.__file__, r.load_recipe('demo_cpu').name, RECIPES)"
    environment = os.environ | {"PYTHONPATH": str(code.path), "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", text], env=environment, cwd=HOME, capture_output=True, text=True)
    place = code.path
    expected = f"{place}/megatron_txssm/jobs/supervisor/supervisor.py demo_cpu {place}/recipes\n"
    assert (done.stdout, done.stderr) == (expected, "")
