"""The set-up: tools/bootstrap run against stand-ins for Python and uv, and the pins against the lock. No network."""

import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Everything bootstrap reads. The package itself is not needed: the stand-in for uv installs nothing.
BOOTSTRAP_INPUTS = (
    "tools/bootstrap",
    "requirements.lock",
    "tests/te/requirements.txt",
    "tests/ops/requirements.txt",
    "tests/hf/requirements.txt",
    "pyproject.toml",
    ".python-version",
)
# What bootstrap may call from the system. PATH holds these and the stand-ins alone, so no other Python is found.
SYSTEM_TOOLS = ["bash", "env", "realpath", "sha256sum", "cut", "awk", "sort", "df", "flock"]
SYSTEM_TOOLS += ["mkdir", "mv", "rm", "cat", "chmod", "sleep"]

# Leaves a trace of every call, and fails or takes long when told to.
FAKE_UV = """#!/usr/bin/env bash
echo "$*" >> "$UV_CALLS"
[[ $1 == pip ]] || exit 1
sleep "${UV_SECONDS:-0}"
exit "${UV_EXIT:-0}"
"""

# Passes bootstrap's probe and makes an empty environment at once; the real venv module takes seconds (ensurepip).
QUICK_PYTHON = f"""#!/usr/bin/env bash
case "$*" in
  *_base_executable*) echo "$0" ;;
  "-m venv "*) mkdir "$3/bin" && cat "$0" > "$3/bin/python" && chmod +x "$3/bin/python" ;;
  *) exec "{sys.executable}" "$@" ;;
esac
"""
REAL_PYTHON = f"""#!/usr/bin/env bash
exec "{sys.executable}" "$@"
"""


class Checkout:
    """A copy of what bootstrap needs, a PATH without any Python, and stand-ins put on it one by one."""

    def __init__(self, folder: Path):
        self.root = folder / "check out"  # a blank in the path must not matter
        self.bin = folder / "bin"
        self.home = folder / "home"
        self.uv_calls_file = folder / "uv-calls"
        for path in (self.root, self.bin, self.home):
            path.mkdir(parents=True)
        for name in BOOTSTRAP_INPUTS:
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.root / name)
        for tool in SYSTEM_TOOLS:
            where = shutil.which(tool)
            assert where, f"these tests need {tool}"
            (self.bin / tool).symlink_to(where)

    def add_executable(self, name: str, text: str) -> None:
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)

    def add_python(self) -> None:
        self.add_executable("python3.12", QUICK_PYTHON)

    def add_uv(self) -> None:
        self.add_executable("uv", FAKE_UV)

    def environment(self, **extra: str) -> dict[str, str]:
        return {"PATH": str(self.bin), "HOME": str(self.home), "UV_CALLS": str(self.uv_calls_file), **extra}

    def bootstrap(self, **extra: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.root / "tools/bootstrap"], env=self.environment(**extra), capture_output=True, text=True, timeout=600
        )

    def uv_calls(self) -> list[str]:
        return self.uv_calls_file.read_text().splitlines() if self.uv_calls_file.exists() else []

    @property
    def state(self) -> str:
        return (self.root / ".venv/bootstrap.state").read_text().strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


@pytest.fixture
def ready(checkout: Checkout) -> Checkout:
    """A checkout whose .venv was made by one successful run (the packages are missing: uv is a stand-in)."""
    checkout.add_python()
    checkout.add_uv()
    done = checkout.bootstrap()
    assert done.returncode == 0, done.stderr
    return checkout


@pytest.mark.parametrize("script", ["tools/bootstrap", ".ci/run"])
def test_scripts_parse_and_may_be_executed(script: str):
    subprocess.run(["bash", "-n", ROOT / script], check=True)
    assert os.access(ROOT / script, os.X_OK)


def test_without_python_3_12_the_remedies_are_named(checkout: Checkout):
    done = checkout.bootstrap()
    assert done.returncode == 2
    for remedy in ("pyenv install 3.12", "uv python install 3.12", "apt install python3.12", "PYTHON="):
        assert remedy in done.stderr
    assert not (checkout.root / ".venv").exists()


def test_a_python_that_fails_or_has_another_version_is_not_taken(checkout: Checkout):
    # pyenv's shim: it is on PATH, and fails when no 3.12 is selected.
    checkout.add_executable(
        "python3.12", "#!/usr/bin/env bash\necho 'pyenv: python3.12: command not found' >&2\nexit 127\n"
    )
    # Another version, as far as bootstrap can tell: its probe exits with 1.
    checkout.add_executable("python3", "#!/usr/bin/env bash\nexit 1\n")
    assert checkout.bootstrap().returncode == 2


def test_a_wrong_PYTHON_is_an_error_even_when_another_would_do(checkout: Checkout):
    checkout.add_python()
    done = checkout.bootstrap(PYTHON="/nonexistent/python3.12")
    assert done.returncode == 2
    assert "PYTHON=/nonexistent/python3.12" in done.stderr


def test_pyenv_versions_are_found_behind_a_failing_shim(checkout: Checkout):
    """With the real Python, probe and venv module; the other tests use a quick stand-in."""
    checkout.add_uv()
    checkout.add_executable("python3.12", "#!/usr/bin/env bash\nexit 127\n")
    version = checkout.home / ".pyenv/versions/3.12.1/bin"
    version.mkdir(parents=True)
    checkout.add_executable("real-python", REAL_PYTHON)
    (version / "python3.12").symlink_to(checkout.bin / "real-python")
    done = checkout.bootstrap()
    assert done.returncode == 0, done.stderr
    # Outside of the virtual environment that runs these tests, and with a pip of its own.
    config = (checkout.root / ".venv/pyvenv.cfg").read_text()
    assert f"home = {Path(sys._base_executable).parent}\n" in config  # pyright: ignore[reportAttributeAccessIssue]
    assert (checkout.root / ".venv/bin/pip").exists()


def test_packages_come_from_the_lock_with_hashes_and_nothing_else(ready: Checkout):
    locked, editable, *beside = [call for call in ready.uv_calls() if call.startswith("pip install")]
    assert "--require-hashes" in locked and "--requirement requirements.lock" in locked
    assert "--no-deps" in editable and "--no-build-isolation" in editable and "--editable ." in editable
    for call, name in zip(beside, ("transformer_engine", "transformers_newest", "mamba_ssm"), strict=True):
        assert "--require-hashes" in call and "--no-deps" in call and f"/.venv/{name} " in call
    # Built without its CUDA part: what installs the whole of it must not find this wheel.
    assert "--no-cache-dir" in beside[-1]


def test_a_second_run_returns_at_once(ready: Checkout):
    calls = len(ready.uv_calls())
    done = ready.bootstrap()
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert len(ready.uv_calls()) == calls


@pytest.mark.parametrize("changed", ["requirements.lock", "pyproject.toml"])
def test_a_changed_input_updates_the_environment_in_place(ready: Checkout, changed: str):
    kept = ready.root / ".venv/installed-by-the-user"
    kept.touch()
    before = ready.state
    with (ready.root / changed).open("a") as file:
        file.write("\n# changed\n")
    calls = len(ready.uv_calls())
    assert ready.bootstrap().returncode == 0
    assert len(ready.uv_calls()) == calls + 5
    assert ready.state != before
    assert kept.exists()


def test_a_failed_installation_is_not_taken_for_complete(checkout: Checkout):
    checkout.add_python()
    checkout.add_uv()
    failed = checkout.bootstrap(UV_EXIT="1")
    assert failed.returncode == 1
    assert "HTTPS_PROXY" in failed.stderr and "Traceback" not in failed.stderr
    assert checkout.state == "incomplete"
    half_written = checkout.root / ".venv/half-written"
    half_written.touch()

    again = checkout.bootstrap()
    assert again.returncode == 0, again.stderr
    assert checkout.state != "incomplete"
    assert not half_written.exists(), "the rest of an interrupted run must be removed"


def test_a_killed_run_is_not_taken_for_complete(checkout: Checkout):
    checkout.add_python()
    checkout.add_uv()
    process = subprocess.Popen(
        [checkout.root / "tools/bootstrap"],
        env=checkout.environment(UV_SECONDS="60"),
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while not checkout.uv_calls() and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, 9)
    process.wait()
    assert checkout.state == "incomplete"
    done = checkout.bootstrap()
    assert done.returncode == 0, done.stderr


def test_two_at_once_install_once(checkout: Checkout):
    checkout.add_python()
    checkout.add_uv()
    both = [
        subprocess.Popen(
            [checkout.root / "tools/bootstrap"],
            env=checkout.environment(UV_SECONDS="1"),
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    messages = [process.communicate(timeout=600)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], messages
    # The lock, the package, the Python parts of Transformer Engine and mamba-ssm, the newest transformers.
    assert len([call for call in checkout.uv_calls() if call.startswith("pip install")]) == 5
    assert sum("waiting for it" in message for message in messages) == 1


def test_a_moved_checkout_is_made_anew(ready: Checkout):
    moved = ready.root.rename(ready.root.with_name("moved"))
    ready.root = moved
    done = ready.bootstrap()
    assert done.returncode == 0
    assert "moved" in (moved / ".venv/bootstrap.root").read_text()


def test_the_uv_inside_the_environment_does_not_replace_it(ready: Checkout):
    inner = ready.root / ".venv/bin/uv"
    shutil.copy(ready.bin / "uv", inner)
    (ready.bin / "uv").unlink()
    (ready.root / ".venv/bootstrap.state").write_text("incomplete\n")
    done = ready.bootstrap(PATH=f"{inner.parent}:{ready.bin}", TXSSM_BOOTSTRAP_NEED_GB="1000000")
    assert "installing with pip needs" in done.stderr


def test_an_environment_of_the_users_own_is_left_alone(checkout: Checkout):
    checkout.add_python()
    own = checkout.root / ".venv/bin/python"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    done = checkout.bootstrap()
    assert done.returncode == 2
    assert "was not made by tools/bootstrap" in done.stderr
    assert own.read_text() == "mine"


def test_a_small_disk_is_refused_before_anything_is_written(checkout: Checkout):
    checkout.add_python()
    checkout.add_uv()
    done = checkout.bootstrap(TXSSM_BOOTSTRAP_NEED_GB="1000000")
    assert done.returncode == 2
    assert "1000000 GB" in done.stderr and "MB are free" in done.stderr
    assert not (checkout.root / ".venv").exists()


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(text: str) -> dict[str, str]:
    """{name: version} of the `name[extra]==version` lines of a requirements file."""
    return {canonical(m[1]): m[2] for m in re.finditer(r"^([\w.-]+)(?:\[[\w,-]+\])?==([^\s;\\]+)", text, re.MULTILINE)}


def requirement_lines(text: str) -> list[str]:
    return [line for line in map(str.strip, text.splitlines()) if line and not line.startswith("#")]


def test_every_direct_dependency_is_pinned_and_locked_at_the_same_version():
    direct = (ROOT / "requirements.txt").read_text()
    locked = pins((ROOT / "requirements.lock").read_text())
    assert len(pins(direct)) == len(requirement_lines(direct)), "every line of requirements.txt needs =="
    assert {name: locked.get(name) for name in pins(direct)} == pins(direct), "run `make lock`"


def test_what_the_package_declares_is_pinned():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {canonical(re.split(r"[\[<>=!~ ;]", line)[0]) for line in declared}
    assert names <= set(pins((ROOT / "requirements.txt").read_text()))


def test_the_lock_has_hashes_and_only_pypi_builds():
    text = (ROOT / "requirements.lock").read_text()
    entries = re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)[1:]
    assert len(entries) == len(pins(text))
    without_hash = [entry.split()[0] for entry in entries if "--hash=sha256:" not in entry]
    assert not without_hash
    # A local version (torch 2.13.0+cpu) or an address would mean another index than PyPI.
    assert not [name for name, version in pins(text).items() if "+" in version]
    assert "://" not in text and "--index" not in text and "--extra-index" not in text and "--find-links" not in text


def test_the_gpu_requirements_name_no_impostor_and_contradict_no_pin():
    gpu = pins((ROOT / "requirements-gpu.txt").read_text())
    assert "apex" not in gpu, "PyPI's apex is not NVIDIA's"
    locked = pins((ROOT / "requirements.lock").read_text())
    assert not {name for name in gpu if name in locked and locked[name] != gpu[name]}


def test_one_python_version_everywhere():
    version = (ROOT / ".python-version").read_text().strip()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["requires-python"].startswith(f">={version}")
    assert project["tool"]["pyright"]["pythonVersion"] == version
    assert project["tool"]["ruff"]["target-version"] == "py" + version.replace(".", "")


def test_every_file_that_the_documents_link_to_exists():
    documents = [ROOT / "README.md", *ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    missing = []
    for document in sorted(set(documents)):
        for target in re.findall(r"\]\(([^)\s#]+)", document.read_text()):
            if "://" not in target and not (document.parent / target).exists():
                missing.append(f"{document.relative_to(ROOT)} -> {target}")
    assert not missing


def test_every_make_target_that_the_documents_and_scripts_name_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set()
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "Makefile", ROOT / ".pre-commit-config.yaml"):
        named |= set(re.findall(r"(?:`|entry: )make (?:--no-print-directory )?([a-z-]+)", path.read_text()))
    named |= set(re.findall(r"make --no-print-directory (?:--keep-going )?([a-z]+)", (ROOT / ".ci/run").read_text()))
    assert named and named <= targets


def test_make_help_lists_the_targets():
    out = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("demo", "test", "check", "lock", "clean"):
        assert re.search(rf"^  make {target} ", out, re.MULTILINE)
