"""Fetches texts that a corpus only refers to: each row's blob by its id, from any fsspec URL, in the rows' order.

An example is the python-edu subset of SmolLM-Corpus: its rows have a `blob_id`, and the text is the gzipped object
s3://softwareheritage/content/BLOB_ID of a public bucket.
"""

import contextlib
import gzip
import io
import random
import re
import threading
import zlib
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import fsspec
import fsspec.config
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from megatron_txssm.data.corpus.manifest import UNREACHABLE_BLOB
from megatron_txssm.data.sharding.broken_rows import (
    CORRUPT_BLOB,
    EMPTY_TEXT,
    INVALID_UTF8,
    MISSING_BLOB,
    BrokenRows,
)
from megatron_txssm.data.sharding.readers import RowReader
from megatron_txssm.errors import UserError

# Ids come from the internet: only this form may become part of a URL or a path.
_BLOB_ID = re.compile(r"[0-9a-fA-F]{40}")
_GZIP_MAGIC = b"\x1f\x8b"
# Maximum bytes of one text; a small gzip file may expand to any size.
LARGEST_TEXT = 2**28
# Blobs in flight or waiting for their turn, so that one slow answer does not leave the threads idle.
WINDOW_PER_THREAD = 4
# Seconds until an unreachable host is given up; a reachable one answers in milliseconds.
CONNECT_TIMEOUT = 5.0


@dataclass(frozen=True)
class Blob:
    """The result of one fetch: a text, or the reason why there is none."""

    text: str = ""
    # One of broken_rows' reasons; empty if there is a text.
    reason: str = ""
    detail: str = ""
    # Size of the object as stored.
    stored_bytes: int = 0


def with_texts(reader: RowReader) -> Generator[Document]:
    """The documents of a reader, with the texts of their blobs if its subset has blobs."""
    source = reader.subset
    if source.blob_field is None:
        return reader.run()
    fetch = FetchBlobs(source.blob_url, threads=source.blob_threads, decode_errors=source.blob_decode_errors)
    fetch.broken = reader.broken
    return fetch.run(reader.run())


class FetchBlobs(PipelineStep):
    """Sets each document's text to the blob that its metadata names; reports documents without one to `broken`.

    Reads metadata "blob" (the id), "file" and "row" (the place, for `broken`). Documents keep their order. The step
    reads up to WINDOW_PER_THREAD * threads documents ahead.
    """

    name = "blobs"
    type = "FETCH"

    def __init__(
        self,
        blob_url: str,
        *,
        threads: int = 16,
        decode_errors: str = "strict",
        storage_options: dict[str, object] | None = None,
        timeout: float = 20.0,
        retries: int = 4,
        backoff: float = 0.5,
        max_unreachable_in_a_row: int = 32,
    ) -> None:
        """blob_url: "s3://BUCKET/{blob_id}" or another fsspec URL; blobs may be gzipped or plain.

        decode_errors: how bytes.decode treats bytes that are not UTF-8; strict makes them a broken row.
        storage_options: of the filesystem; they override our own (s3: anonymous, one try per request).
        timeout: seconds for an answer. Then up to `retries` further tries, after pauses of at most backoff, 2 backoff,
        4 backoff … seconds.
        max_unreachable_in_a_row: consecutive unreachable blobs after which the task stops.
        """
        super().__init__()
        self.blob_url = blob_url
        self.threads = threads
        self.decode_errors = decode_errors
        self.storage_options = storage_options or {}
        self.timeout = timeout
        self.retries = retries
        self.backoff = backoff
        self.max_unreachable_in_a_row = max_unreachable_in_a_row
        # Of the running task; set before the step runs.
        self.broken: BrokenRows | None = None

    def run(self, data: Iterable[Document] | None = None, rank: int = 0, world_size: int = 1) -> Generator[Document]:
        """UserError if the bucket cannot be reached, or `broken` exceeds its limits."""
        assert self.broken is not None, "FetchBlobs.broken must be set before the step runs"
        # Not yet reported to `broken`: if the bucket cannot be reached, that is the error to show, not a share of rows.
        waiting: list[tuple[Document, Blob]] = []
        with contextlib.closing(self._fetch_in_order(data or ())) as fetched:
            for document, blob in fetched:
                waiting.append((document, blob))
                if blob.reason != UNREACHABLE_BLOB:
                    yield from self._settle(waiting, self.broken)
                elif len(waiting) >= self.max_unreachable_in_a_row:
                    raise UserError(
                        f"blob_url={self.blob_url!r} cannot be reached: {len(waiting)} blobs in a row failed, the last "
                        f"({document.metadata['blob']}) with {blob.detail}. Check the network, the proxy and blob_url, "
                        "and run again: finished tasks are kept."
                    )
            yield from self._settle(waiting, self.broken)

    def _settle(self, waiting: list[tuple[Document, Blob]], broken: BrokenRows) -> Iterator[Document]:
        for document, blob in waiting:
            if blob.reason:
                broken.report(document.metadata["file"], document.metadata["row"], blob.reason, blob.detail)
                continue
            self.stat_update("fetched")
            self.stat_update("bytes", value=blob.stored_bytes, unit="blob")
            document.text = blob.text
            yield document
        waiting.clear()

    def _fetch_in_order(self, data: Iterable[Document]) -> Generator[tuple[Document, Blob]]:
        fetcher = _Fetcher(self)
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="fetch")
        window: deque[tuple[Document, Future[Blob]]] = deque()

        def first() -> tuple[Document, Blob]:
            document, future = window.popleft()
            with self.track_time("blob"):
                return document, future.result()

        try:
            for document in data:
                window.append((document, pool.submit(fetcher.fetch, document.metadata.get("blob"))))
                if len(window) >= WINDOW_PER_THREAD * self.threads:
                    yield first()
            while window:
                yield first()
        finally:
            # At an early end, do not wait for answers: requests in flight end with their own timeout.
            fetcher.stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)


class _Fetcher:
    """The part of the step that threads share; lives as long as one run, since clients cannot be pickled."""

    def __init__(self, step: FetchBlobs) -> None:
        options = _default_options(step) | step.storage_options
        try:
            # A separate instance, since its settings are changed below.
            self.filesystem, self.path = fsspec.url_to_fs(step.blob_url, skip_instance_cache=True, **options)
        except (ImportError, ValueError, TypeError) as error:
            raise UserError(f"blob_url={step.blob_url!r} cannot be opened: {error}") from error
        if hasattr(self.filesystem, "retries"):
            # s3fs itself tries five times, with pauses that cannot be interrupted.
            self.filesystem.retries = 1
        self.step = step
        self.stopped = threading.Event()

    def fetch(self, blob_id: object) -> Blob:
        """Fetch one text. Errors become a reason; only a bug raises."""
        if not isinstance(blob_id, str) or not _BLOB_ID.fullmatch(blob_id):
            return Blob(reason=MISSING_BLOB, detail=f"{blob_id!r:.80} is not a SHA-1 in hex")
        try:
            stored = self._read(self.path.replace("{blob_id}", blob_id))
        # Each filesystem has its own errors, and those of botocore and aiohttp are not even OSErrors.
        except Exception as error:
            reason = MISSING_BLOB if _is_missing(error) else UNREACHABLE_BLOB
            return Blob(reason=reason, detail=f"{type(error).__name__}: {error}")
        try:
            text = _unpack(stored).decode("utf-8", self.step.decode_errors)
        except UnicodeDecodeError as error:
            return Blob(reason=INVALID_UTF8, detail=f"blob {blob_id}: {error.reason} at byte {error.start}")
        except (OSError, EOFError, zlib.error) as error:
            return Blob(reason=CORRUPT_BLOB, detail=f"blob {blob_id}: {error}")
        if not text:
            return Blob(reason=EMPTY_TEXT, detail=f"blob {blob_id}")
        return Blob(text, stored_bytes=len(stored))

    def _read(self, path: str) -> bytes:
        """The stored bytes; raises the last error if all tries fail, or the run has ended."""
        pause = self.step.backoff
        for tries_left in reversed(range(self.step.retries + 1)):
            try:
                return self.filesystem.cat_file(path)
            except Exception as error:
                # Tasks that failed together must not retry together.
                if _is_missing(error) or not tries_left or self.stopped.wait(pause * random.uniform(0.5, 1)):
                    raise
                pause *= 2
        raise AssertionError("unreachable")


def _default_options(step: FetchBlobs) -> dict[str, object]:
    protocol = step.blob_url.partition("://")[0]
    if protocol in ("s3", "s3a"):
        return {
            # The archive's bucket is public; for a private mirror, set FSSPEC_S3_ANON=false.
            "anon": fsspec.config.conf.get("s3", {}).get("anon", True),
            # With more than one, s3fs would ask for each blob's size before the blob.
            "max_concurrency": 1,
            "config_kwargs": {
                "connect_timeout": CONNECT_TIMEOUT,
                "read_timeout": step.timeout,
                "retries": {"total_max_attempts": 1},
                "max_pool_connections": step.threads,
            },
        }
    if protocol in ("http", "https"):
        import aiohttp

        # trust_env: use the proxy that the environment names, as s3fs does.
        timeout = aiohttp.ClientTimeout(total=step.timeout, sock_connect=CONNECT_TIMEOUT)
        return {"client_kwargs": {"timeout": timeout, "trust_env": True}}
    return {}


def _is_missing(error: Exception) -> bool:
    """Whether the bucket answered that there is no such object. S3 answers 403 if looking for a key is forbidden."""
    return isinstance(error, FileNotFoundError | PermissionError) or getattr(error, "status", None) in (401, 403, 410)


def _unpack(stored: bytes) -> bytes:
    """The content of a gzip file, other data unchanged; OSError, EOFError or zlib.error if it is damaged."""
    if not stored.startswith(_GZIP_MAGIC):
        return stored
    with gzip.GzipFile(fileobj=io.BytesIO(stored)) as stream:
        content = stream.read(LARGEST_TEXT + 1)
    if len(content) > LARGEST_TEXT:
        raise OSError(f"unpacks to more than {LARGEST_TEXT:,} bytes")
    return content
