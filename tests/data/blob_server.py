"""A bucket on this machine: serves a folder's files over HTTP, as S3 clients understand it, and fails on demand.

The last part of a request's path names the file, so that http://HOST/ANY/PATH/NAME and s3://ANY/PATH/NAME (path-style)
are the same.
"""

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import cast

# What a request may meet instead of its file: an HTTP status, or one of these.
HANG, RESET, CUT_SHORT = "hang", "reset", "cut short"
Failure = int | str

_S3_CODES = {403: "AccessDenied", 404: "NoSuchKey", 500: "InternalError", 503: "SlowDown"}


@dataclass
class Bucket:
    """What the server does, set by the test, and what it saw."""

    folder: Path
    # Name -> failures of the requests to come, in order; then the file is served.
    failures: dict[str, list[Failure]] = field(default_factory=dict)
    # Of every request that `failures` says nothing about.
    always: Failure | None = None
    # Seconds before the answer.
    latency: Callable[[str], float] = lambda _: 0.0
    # Names in the order of their requests.
    requests: list[str] = field(default_factory=list)
    # The same in the order of the answers.
    answers: list[str] = field(default_factory=list)
    methods: set[str] = field(default_factory=set)
    outstanding: int = 0
    most_outstanding: int = 0
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)
    closing: threading.Event = field(default_factory=threading.Event)

    @contextlib.contextmanager
    def request(self, name: str) -> Iterator[Failure | None]:
        """Record a request while it is answered, and say how it fails."""
        with self.lock:
            self.requests.append(name)
            self.outstanding += 1
            self.most_outstanding = max(self.most_outstanding, self.outstanding)
            failures = self.failures.get(name)
            failure = failures.pop(0) if failures else self.always
        try:
            self.closing.wait(self.latency(name))
            # Before the answer is on its way: the client may look as soon as it has it.
            with self.lock:
                self.answers.append(name)
            yield failure
        finally:
            with self.lock:
                self.outstanding -= 1


class _Server(ThreadingHTTPServer):
    # Room for every connection of a test at once.
    request_queue_size = 128

    def __init__(self, bucket: Bucket) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.bucket = bucket


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Else each answer waits 40 ms for the client's delayed acknowledgement.
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        bucket = cast(_Server, self.server).bucket
        bucket.methods.add(self.command)
        name = self.path.partition("?")[0].rpartition("/")[2]
        with bucket.request(name) as failure:
            if failure == HANG:
                bucket.closing.wait()
                self.close_connection = True
            elif failure == RESET:
                # Closing with a zero linger time sends RST in place of FIN.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                self.close_connection = True
            elif isinstance(failure, int):
                self._answer(failure)
            elif not (bucket.folder / name).is_file():
                self._answer(404)
            else:
                self._answer(200, (bucket.folder / name).read_bytes(), missing_bytes=10 if failure == CUT_SHORT else 0)

    do_HEAD = do_GET

    def _answer(self, status: int, body: bytes | None = None, missing_bytes: int = 0) -> None:
        if body is None:
            code = _S3_CODES.get(status, "Unknown")
            body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) - missing_bytes])
        self.close_connection = self.close_connection or missing_bytes > 0

    def log_message(self, *_: object) -> None:
        """Nothing on the test's output."""


@contextlib.contextmanager
def serve_bucket(folder: Path) -> Iterator[Bucket]:
    """Serve a folder at `url` until the block ends; hanging requests end with it."""
    bucket = Bucket(folder)
    server = _Server(bucket)
    bucket.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield bucket
    finally:
        bucket.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


def unused_port() -> int:
    """A port of this machine that refuses connections."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
