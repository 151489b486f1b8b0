"""The states of nodes, as sinfo of Slurm 22.05 shows them."""

import os
from pathlib import Path

import pytest

from megatron_txssm.errors import UserError
from megatron_txssm.slurm.nodes import Node, node_states

# Keeps its arguments and variables.
SINFO = """\
#!/bin/bash
here=$(dirname "$0")
printf '%s\\n' "$@" > "$here/sinfo.args"
env > "$here/sinfo.env"
cat "$here/states"
"""


@pytest.fixture
def sinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a stand-in for sinfo, which shows its file `states`."""
    (tmp_path / "sinfo").write_text(SINFO)
    (tmp_path / "sinfo").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.defpath}")
    return tmp_path


def test_states_reasons_and_times(sinfo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SINFO_FORMAT", "%N")
    rows = [
        ("n1", "idle", "Unknown", "none"),
        ("n2", "down*", "1795859540", "Not responding"),
        # An administrator may write anything.
        ("n3", "drng", "1795859549", "a b|c\nd\x1fe"),
        ("n4", "alloc*", "Unknown", "none"),
    ]
    (sinfo / "states").write_text("".join("\x1e" + "\x1f".join(row) + "\n" for row in rows))
    found = node_states(["n1", "n2", "n3", "n4"])
    assert found == [
        Node("n1", "idle", "", None),
        Node("n2", "down*", "Not responding", 1795859540),
        Node("n3", "drng", "a b|c d e", 1795859549),
        Node("n4", "alloc*", "", None),
    ]
    assert [node.is_lost for node in found] == [False, True, False, True]
    assert [node.is_unfit for node in found] == [False, True, True, True]
    assert "--nodes=n1,n2,n3,n4" in (sinfo / "sinfo.args").read_text()
    environment = (sinfo / "sinfo.env").read_text().splitlines()
    assert "SLURM_TIME_FORMAT=%s" in environment and "SINFO_FORMAT=%N" not in environment


@pytest.mark.parametrize("text", ["", "garbage\n", "\x1en1\x1fidle\n", "n1 idle\n\x1e"])
def test_an_answer_that_is_none(sinfo: Path, text: str) -> None:
    (sinfo / "states").write_text(text)
    assert node_states(["n1"]) == []


def test_no_answer(sinfo: Path) -> None:
    (sinfo / "sinfo").write_text("#!/bin/bash\necho 'Unable to contact slurm controller' >&2\nexit 1\n")
    with pytest.raises(UserError, match="Slurm does not answer"):
        node_states(["n1"])
