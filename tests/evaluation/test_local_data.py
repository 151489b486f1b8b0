"""txssm eval fetch: data sets come from a hub into a folder, from which the harness reads them without one."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import pytest
from huggingface_hub import constants

from megatron_txssm.cli.main import main
from megatron_txssm.errors import UserError
from megatron_txssm.evaluation.harness.harness import check_files
from megatron_txssm.evaluation.harness.local_data import data_from, fetched_commits
from megatron_txssm.evaluation.harness.settings import HarnessSettings
from megatron_txssm.evaluation.harness.tasks import MissingData, load_tasks

NAME, COMMIT = "EleutherAI/lambada_openai", "1234567890abcdef1234567890abcdef12345678"
CONFIGS = [
    {"config_name": "default", "data_files": [{"split": "test", "path": "data/en.jsonl"}]},
    {"config_name": "de", "data_files": [{"split": "test", "path": "data/de.jsonl"}]},
]
FILES = {
    "README.md": f"---\nconfigs: {json.dumps(CONFIGS)}\n---\n",
    "data/en.jsonl": "".join(json.dumps({"text": f"word {number} and the last"}) + "\n" for number in range(3)),
    "data/de.jsonl": '{"text": "noch eins"}\n',
}


class Hub(BaseHTTPRequestHandler):
    """A hub with one data set, of which two configurations have a file each."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        content: bytes | None = None
        if path.startswith(f"/datasets/{NAME}/resolve/{COMMIT}/"):
            content = FILES[path.rpartition(f"{COMMIT}/")[2]].encode()
        elif path.startswith(f"/api/datasets/{NAME}/tree"):
            listed = [{"type": "file", "path": file, "size": len(text), "oid": file} for file, text in FILES.items()]
            content = json.dumps(listed).encode()
        elif path.startswith(f"/api/datasets/{NAME}"):
            siblings = [{"rfilename": file} for file in FILES]
            info = {"id": NAME, "sha": COMMIT, "siblings": siblings, "cardData": {"configs": CONFIGS}, "tags": []}
            content = json.dumps(info | {"private": False, "downloads": 0, "likes": 0}).encode()
        self.send_response(404 if content is None else 200)
        self.send_header("Content-Length", str(len(content or b"")))
        self.send_header("ETag", f'"{path.rpartition("/")[2]}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body and content:
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + template[template.index("/{repo_id}") :]
        )
        yield
        server.shutdown()


@pytest.mark.usefixtures("hub")
def test_a_fetched_task_is_read_from_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    assert main(["eval", "fetch", str(folder), "--tasks", "lambada_openai"]) == 0
    assert (folder / NAME / "data" / "en.jsonl").is_file()
    assert not (folder / NAME / "data" / "de.jsonl").exists(), "only what the task reads"
    assert fetched_commits(folder) == {NAME: COMMIT}
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    before: Any = datasets.load_dataset
    with data_from(folder):
        task = load_tasks(["lambada_openai"]).tasks["tasks"]["lambada_openai"]
    assert datasets.load_dataset is before
    assert [document["text"] for document in task.test_docs()] == [f"word {n} and the last" for n in range(3)]


def test_what_is_not_in_the_folder_is_named(tmp_path: Path) -> None:
    with data_from(tmp_path), pytest.raises(UserError) as raised:
        load_tasks(["piqa"])
    assert f"{tmp_path} does not have the data set baber/piqa" in str(raised.value)
    assert f"`txssm eval fetch {tmp_path} --tasks piqa`" in str(raised.value)
    with data_from(tmp_path), pytest.raises(MissingData):
        datasets.load_dataset("some/thing")


def test_a_damaged_record_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    (tmp_path / "fetched.json").write_text('{"baber/piqa": "12')
    with pytest.raises(UserError, match=r"fetched.json is damaged; remove it, and repeat `txssm eval fetch`"):
        check_files(HarnessSettings(("piqa",)), tmp_path)


def test_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """No one listens at port 9."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert main(["eval", "fetch", str(tmp_path / "data"), "--tasks", "piqa"]) == 2
    error = capsys.readouterr().err
    assert "the data set baber/piqa cannot be fetched (ConnectError" in error and "HF_ENDPOINT" in error
    assert error.count("\n") == 1
