"""Where a worker's words go: the terminal keeps what is meant for it, the log gets the rest."""

import os
import subprocess
import sys
from pathlib import Path

WORDS = """
import os, sys
print("python out")
print("python err", file=sys.stderr)
os.write(1, b"library out\\n")
os.write(2, b"library err\\n")
os.system("echo child out")
print("for the person", file=terminal)
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    # Buffered, as Python's output is unless somebody asked for the contrary.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def test_everything_but_the_terminals_lines_goes_to_the_log(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "rank_0.log"
    done = python(
        "from pathlib import Path\n"
        "from megatron_txssm.session.output import redirect_output\n"
        "print('before')\n"
        f"terminal = redirect_output(Path({str(log)!r}))\n" + WORDS
    )
    assert done.returncode == 0
    assert done.stdout == "before\nfor the person\n"
    assert done.stderr == ""
    lines = ["python out", "python err", "library out", "library err", "child out"]
    assert sorted(log.read_text().splitlines()) == sorted(lines)


def test_the_last_line_before_a_crash_is_in_the_log(tmp_path: Path) -> None:
    log = tmp_path / "rank_0.log"
    done = python(
        "import os\nfrom pathlib import Path\n"
        "from megatron_txssm.session.output import redirect_output\n"
        f"redirect_output(Path({str(log)!r}))\n"
        "print('iteration 7')\nos.kill(os.getpid(), 9)\n"
    )
    assert done.returncode == -9
    assert log.read_text() == "iteration 7\n"


def test_a_second_run_appends(tmp_path: Path) -> None:
    log = tmp_path / "rank_0.log"
    log.write_text("first run\n")
    python(
        "from pathlib import Path\nfrom megatron_txssm.session.output import redirect_output\n"
        f"redirect_output(Path({str(log)!r}))\nprint('second run')\n"
    )
    assert log.read_text() == "first run\nsecond run\n"


def test_for_a_while_only(tmp_path: Path) -> None:
    log = tmp_path / "generate.log"
    done = python(
        "import sys\nfrom pathlib import Path\n"
        "from megatron_txssm.session.output import output_redirected\n"
        "try:\n"
        f"    with output_redirected(Path({str(log)!r})) as terminal:\n"
        "        print('hidden')\n"
        "        print('shown', file=terminal)\n"
        "        raise ValueError\n"
        "except ValueError:\n"
        "    print('after')\n"
        "    print('an error', file=sys.stderr)\n"
    )
    assert (done.stdout, done.stderr) == ("shown\nafter\n", "an error\n")
    assert log.read_text() == "hidden\n"


def test_a_log_on_a_full_disk() -> None:
    """What is left of the log goes to the terminal, without a traceback."""
    done = python(
        "from pathlib import Path\n"
        "from megatron_txssm.errors import UserError\n"
        "from megatron_txssm.session.output import run_redirected\n"
        "try:\n"
        "    run_redirected(Path('/dev/full'), lambda _: print('a line', flush=True))\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    assert done.stdout == "a line\n/dev cannot be written: No space left on device; make room, and repeat the command\n"
    assert done.returncode == 0 and not done.stderr
