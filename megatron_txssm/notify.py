"""Tells people, through a webhook, what happened to a run: Slack, Mattermost and the like show the field "text".

The address, which is a secret, is in the site's environment variable TXSSM_WEBHOOK and is never printed or written.
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
from typing import Any

from megatron_txssm.errors import readable

VARIABLE = "TXSSM_WEBHOOK"
# Of one try: for a connection, and for each answer of the other side.
TIMEOUT_SECONDS = 5.0
# Before the second try, and the third.
PAUSES_SECONDS = (1.0, 4.0)
# For what is under way when the process ends.
LAST_SECONDS = 10.0
# Longer messages are refused by some services.
_TEXT_LENGTH = 3000
_under_way: list[threading.Thread] = []


def notify(run: Path, event: str, text: str, **facts: Any) -> None:
    """Post that `event` (failed, hung, excluded, requeued, finished, slow …) happened to a run; returns at once.

    `facts`: fields for programs, such as job, attempt, step, nodes, cause. Nothing happens without TXSSM_WEBHOOK. Never
    raises: a webhook that does not work costs a line on stderr. A thread posts; the process's end waits for it,
    `LAST_SECONDS` at most.
    """
    address = os.environ.get(VARIABLE, "").strip()
    if not address:
        return
    try:
        message = json.dumps(_message(run, event, text, facts), default=str).encode()
        thread = threading.Thread(target=_deliver, args=(address, event, message), name="notify", daemon=True)
        thread.start()
        _under_way.append(thread)
    except Exception as error:  # whatever it is, a run does not end for it
        _complain(event, type(error).__name__)


@atexit.register
def wait_for_notifications(seconds: float = LAST_SECONDS) -> None:
    """Let the messages that are under way arrive, for `seconds` at most."""
    deadline = time.monotonic() + seconds
    while _under_way:
        _under_way.pop().join(max(0.0, deadline - time.monotonic()))


def _message(run: Path, event: str, text: str, facts: dict[str, Any]) -> dict[str, Any]:
    known = {"run": str(run), "event": event, "job": os.environ.get("SLURM_JOB_ID"), "time": round(time.time(), 3)}
    words = readable(f"{run.name}: {event}: {text}")[:_TEXT_LENGTH]
    # No half of a character pair, which a file name may hold.
    return known | facts | {"text": words.encode(errors="replace").decode()}


def _deliver(address: str, event: str, message: bytes) -> None:
    """One message, at most three times."""
    problem, retry = _post(address, message)
    for pause in PAUSES_SECONDS:
        if not retry:
            break
        time.sleep(pause)
        problem, retry = _post(address, message)
    if problem:
        _complain(event, problem)


def _post(address: str, message: bytes) -> tuple[str, bool]:
    """(what went wrong, whether it may go well later). Errors' own texts may hold the address."""
    try:
        if urllib.parse.urlsplit(address).scheme not in ("http", "https"):
            return "its address must begin with http:// or https://", False
        request = urllib.request.Request(address, message, {"Content-Type": "application/json"}, method="POST")
        # Proxies as the environment's http_proxy, https_proxy and no_proxy say.
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
    except Exception as error:  # http.client's, for an address that is none
        return type(error).__name__, False


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """urllib would follow with a GET, which posts nothing, and to whoever the answer names."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _reason(error: str | BaseException) -> str:
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)
    return "no answer in time" if isinstance(error, TimeoutError) else type(error).__name__


def _complain(event: str, problem: str) -> None:
    try:
        print(f"{VARIABLE}: the message '{event}' was not delivered: {problem}", file=sys.stderr, flush=True)
    except (OSError, ValueError):
        # A full disk, or a stream that is closed.
        return
