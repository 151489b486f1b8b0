"""Notifications, posted to real HTTP servers of this machine: the good, the slow, the broken."""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from megatron_txssm import notify as module
from megatron_txssm.notify import notify, wait_for_notifications

SECRET = "/services/T0/s3cr3t"
# Whatever takes longer hangs.
PATIENCE = 600


class Hook:
    """A webhook that answers with the given codes, one a request, then with 200."""

    def __init__(self, *codes: int, location: str = ""):
        self.codes = list(codes)
        self.requests: list[tuple[str, str, dict[str, Any]]] = []
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                hook.requests.append((self.command, self.path, json.loads(body)))
                self.send_response(hook.codes.pop(0) if hook.codes else 200)
                if location:
                    self.send_header("Location", location)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def do_GET(self) -> None:
                hook.requests.append((self.command, self.path, {}))
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server.server_port}"

    @property
    def address(self) -> str:
        return f"http://{self.host}{SECRET}"


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Hook]]:
    """Makes webhooks, the last of which is the site's."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name == "SLURM_JOB_ID":
            monkeypatch.delenv(name)
    monkeypatch.setattr(module, "PAUSES_SECONDS", (0.0, 0.0))
    hooks: list[Hook] = []

    def make(*codes: int, **options: Any) -> Hook:
        hooks.append(Hook(*codes, **options))
        monkeypatch.setenv(module.VARIABLE, hooks[-1].address)
        return hooks[-1]

    yield make
    for made in hooks:
        made.server.shutdown()
        made.server.server_close()


def send(event: str = "failed", text: str = "rank 3 on n2", **facts: Any) -> None:
    notify(Path("/runs/big"), event, text, **facts)
    wait_for_notifications(PATIENCE)


def test_people_read_its_text_and_programs_its_fields(
    hook: Callable[..., Hook], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    server = hook()
    send(attempt=2, step=480, nodes=["n1", "n2"], cause="failed", folder=Path("/runs"))
    [(method, path, message)] = server.requests
    assert (method, path) == ("POST", SECRET)
    assert message.pop("time") > 1.7e9
    assert message == {
        "text": "big: failed: rank 3 on n2",
        "run": "/runs/big",
        "event": "failed",
        "job": "17",
        "attempt": 2,
        "step": 480,
        "nodes": ["n1", "n2"],
        "cause": "failed",
        "folder": "/runs",
    }
    assert capfd.readouterr() == ("", "")


def test_what_the_caller_knows_better_holds(hook: Callable[..., Hook]) -> None:
    server = hook()
    send(job="18")
    assert server.requests[0][2]["job"] == "18"


def test_any_text_arrives(hook: Callable[..., Hook], capfd: pytest.CaptureFixture[str]) -> None:
    server = hook()
    send(text="Köln 日本 🚀 \x1b[31m \udcff")
    send(text="word " * 5000)
    assert server.requests[0][2]["text"] == r"big: failed: Köln 日本 🚀 \x1b[31m \udcff"
    assert len(server.requests[1][2]["text"]) == 3000
    assert capfd.readouterr() == ("", "")


def test_without_a_webhook_nothing_happens(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    for value in ("", "  "):
        monkeypatch.setenv(module.VARIABLE, value)
        send()
    monkeypatch.delenv(module.VARIABLE)
    send()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("codes", [(500,), (503, 502), (429,)])
def test_a_webhook_that_is_busy_is_tried_again(
    codes: tuple[int, ...], hook: Callable[..., Hook], capfd: pytest.CaptureFixture[str]
) -> None:
    server = hook(*codes)
    send()
    assert len(server.requests) == len(codes) + 1
    assert capfd.readouterr() == ("", "")


def test_one_that_stays_broken_costs_a_line(hook: Callable[..., Hook], capfd: pytest.CaptureFixture[str]) -> None:
    server = hook(*[500] * 9)
    send("hung")
    assert len(server.requests) == 3
    said = capfd.readouterr().err
    assert said == "TXSSM_WEBHOOK: the message 'hung' was not delivered: it answers 500 Internal Server Error\n"


def test_a_refusal_is_not_tried_again(hook: Callable[..., Hook], capfd: pytest.CaptureFixture[str]) -> None:
    server = hook(404)
    send()
    assert len(server.requests) == 1
    assert "it answers 404 Not Found" in capfd.readouterr().err


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(code: int, hook: Callable[..., Hook], capfd: pytest.CaptureFixture[str]) -> None:
    other = hook()
    server = hook(code, location=f"http://{other.host}/elsewhere")
    send()
    assert (len(server.requests), other.requests) == (1, [])
    said = capfd.readouterr().err
    assert f"it answers {code}" in said and "set the address that it redirects to" in said


def test_proxies_of_the_environment_are_used(hook: Callable[..., Hook], monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = hook()
    monkeypatch.setenv("http_proxy", f"http://{proxy.host}")
    monkeypatch.setenv(module.VARIABLE, f"http://hooks.invalid{SECRET}")
    send()
    assert [path for _, path, _ in proxy.requests] == [f"http://hooks.invalid{SECRET}"]


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        (f"http://127.0.0.1:1{SECRET}", "Connection refused"),
        (f"https://127.0.0.1:1{SECRET}", "Connection refused"),
        (f"http://127.0.0.1:port{SECRET}", "InvalidURL"),
        (f"http://127.0.0.1{SECRET} and more", "InvalidURL"),
        (f"http://[::1{SECRET}", "ValueError"),
        (f"file://{SECRET}", "must begin with http"),
        (f"ftp://127.0.0.1{SECRET}", "must begin with http"),
        (SECRET, "must begin with http"),
        (f"http://user:{SECRET[1:]}@127.0.0.1:1/", ""),
        (f"http://{SECRET.replace('/', '')}.invalid/", ""),
    ],
)
def test_the_address_is_never_printed(
    address: str,
    problem: str,
    hook: Callable[..., Hook],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(module.VARIABLE, address)
    send()
    said = capfd.readouterr().err
    assert problem in said and said.count("\n") == 1
    assert not re.search("s3cr3t|T0|127", said)


def test_a_fact_that_cannot_be_written_costs_a_line(
    hook: Callable[..., Hook], capfd: pytest.CaptureFixture[str]
) -> None:
    server = hook()
    circle: list[Any] = []
    circle.append(circle)
    send(circle=circle)
    assert server.requests == []
    assert "was not delivered: ValueError" in capfd.readouterr().err


# A server that takes the message and never answers.
HANGING = """
import socket, sys
from pathlib import Path
server = socket.create_server(("127.0.0.1", 0))
from megatron_txssm import notify
notify.TIMEOUT_SECONDS = {timeout}
notify.LAST_SECONDS = 600
import os
os.environ["TXSSM_WEBHOOK"] = f"http://127.0.0.1:{{server.getsockname()[1]}}/s3cr3t"
notify.notify(Path("run"), "hung", "none for 1800 s")
notify.wait_for_notifications({last})
print("left behind" if any(t.name == "notify" for t in __import__("threading").enumerate()) else "given up")
"""


@pytest.mark.parametrize(("timeout", "last", "said"), [(600, 0.1, "left behind"), (0.1, 600, "given up")])
def test_a_hanging_server_holds_nobody_up(timeout: float, last: float, said: str) -> None:
    code = HANGING.format(timeout=timeout, last=last)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (0, f"{said}\n"), done.stderr
    assert done.stderr == (
        "" if said == "left behind" else "TXSSM_WEBHOOK: the message 'hung' was not delivered: no answer in time\n"
    )


def test_a_process_that_ends_waits_for_its_message(hook: Callable[..., Hook]) -> None:
    server = hook()
    code = "from pathlib import Path; from megatron_txssm import notify as n; n.notify(Path('r'), 'finished', '')"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE, env=os.environ.copy())
    assert [message["event"] for _, _, message in server.requests] == ["finished"]
