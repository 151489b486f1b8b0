"""Reports events of a run through a webhook: Slack, Mattermost and similar services show the field "text".

The address is a secret: it is read from the environment variable TXSSM_WEBHOOK, and never printed or written.
"""

import atexit
import http.client
import json
import os
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from megatron_txssm.errors import readable

VARIABLE = "TXSSM_WEBHOOK"
# Per attempt: for the connection, and for each response.
TIMEOUT_SECONDS = 5.0
# Before the second and the third attempt.
PAUSES_SECONDS = (1.0, 4.0)
# For messages in flight when the process ends.
LAST_SECONDS = 10.0
# Some services reject longer messages.
_TEXT_LENGTH = 3000
_under_way: list[threading.Thread] = []


def notify(run: Path, event: str, text: str, **facts: object) -> None:
    """Post that `event` (failed, hung, excluded, requeued, finished, slow …) happened to a run; returns at once.

    `facts`: fields for programs, such as job, attempt, step, nodes, cause. Does nothing without TXSSM_WEBHOOK. Never
    raises: a failing webhook only prints a line to stderr. A thread posts; at exit the process waits for it, for at
    most `LAST_SECONDS`.
    """
    address = os.environ.get(VARIABLE, "").strip()
    if not address:
        return
    try:
        message = json.dumps(_message(run, event, text, facts), default=str).encode()
        thread = threading.Thread(target=_deliver, args=(address, event, message), name="notify", daemon=True)
        thread.start()
        _under_way.append(thread)
    except Exception as error:  # no failure here may end the run
        _complain(event, type(error).__name__)


@atexit.register
def wait_for_notifications(seconds: float = LAST_SECONDS) -> None:
    """Wait for messages in flight, for at most `seconds`."""
    deadline = time.monotonic() + seconds
    while _under_way:
        _under_way.pop().join(max(0.0, deadline - time.monotonic()))


def _message(run: Path, event: str, text: str, facts: dict[str, object]) -> dict[str, object]:
    known = {"run": str(run), "event": event, "job": os.environ.get("SLURM_JOB_ID"), "time": round(time.time(), 3)}
    words = readable(f"{run.name}: {event}: {text}")[:_TEXT_LENGTH]
    # Replaces unpaired surrogates, which a file name may contain.
    return known | facts | {"text": words.encode(errors="replace").decode()}


def _deliver(address: str, event: str, message: bytes) -> None:
    """Post one message, with at most three attempts."""
    problem, retry = _post(address, message)
    for pause in PAUSES_SECONDS:
        if not retry:
            break
        time.sleep(pause)
        problem, retry = _post(address, message)
    if problem:
        _complain(event, problem)


def _post(address: str, message: bytes) -> tuple[str, bool]:
    """(problem, whether a retry may succeed). The errors' own texts are not used: they may contain the address."""
    try:
        if urllib.parse.urlsplit(address).scheme not in ("http", "https"):
            return "its address must begin with http:// or https://", False
        request = urllib.request.Request(address, message, {"Content-Type": "application/json"}, method="POST")
        # Proxies come from http_proxy, https_proxy and no_proxy in the environment.
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=TIMEOUT_SECONDS):
            return "", False
    except urllib.error.HTTPError as error:
        error.close()
        words = f"{error.code} {http.client.responses.get(error.code, '')}".strip()
        if 300 <= error.code < 400:
            return f"it answers {words}; set the address that it redirects to", False
        return f"it answers {words}", error.code >= 500 or error.code in (408, 425, 429)
    except urllib.error.URLError as error:
        return _reason(error.reason), True
    except OSError as error:
        return _reason(error), True
    except Exception as error:  # http.client's, for an invalid address
        return type(error).__name__, False


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """urllib would follow a redirect with a GET, which posts nothing, to an address that the response chooses."""

    def redirect_request(self, *_: object) -> None:
        return None


def _reason(error: str | BaseException) -> str:
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)
    return "no answer in time" if isinstance(error, TimeoutError) else type(error).__name__


def _complain(event: str, problem: str) -> None:
    try:
        print(f"{VARIABLE}: the message '{event}' was not delivered: {problem}", file=sys.stderr, flush=True)
    except (OSError, ValueError):
        # A full disk or a closed stream.
        return
