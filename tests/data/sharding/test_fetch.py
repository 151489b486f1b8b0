"""Fetching blobs: every text in its place, faults named, and a bucket that is gone stops the task soon."""

import gzip
import hashlib
import random
import subprocess
import sys
import threading
import time
from contextlib import closing

import dill
import pytest
from datatrove.data import Document

from megatron_txssm.data.corpus.manifest import UNREACHABLE_BLOB
from megatron_txssm.data.sharding import fetch
from megatron_txssm.data.sharding.broken_rows import (
    CORRUPT_BLOB,
    EMPTY_TEXT,
    INVALID_UTF8,
    MISSING_BLOB,
    BrokenRows,
)
from megatron_txssm.data.sharding.fetch import WINDOW_PER_THREAD, FetchBlobs
from megatron_txssm.errors import UserError
from tests.data.blob_server import CUT_SHORT, HANG, RESET, serve_bucket, unused_port
from tests.data.corpora import PYTHON_EDU, library_texts, make_smollm_corpus, python_edu_row, write_blob

PATIENCE = 300  # seconds
TEXTS = library_texts(40)
IDS = [python_edu_row(0, text)["blob_id"] for text in TEXTS]


@pytest.fixture
def bucket(tmp_path):
    for blob_id, text in zip(IDS, TEXTS, strict=True):
        write_blob(tmp_path, blob_id, text)
    with serve_bucket(tmp_path) as bucket:
        yield bucket


def _documents(ids=None):
    for row, blob in enumerate(IDS if ids is None else ids):
        yield Document(text="", id=str(row), metadata={"blob": blob, "file": "train.parquet", "row": row})


def _step(url, **options):
    step = FetchBlobs(url, **{"backoff": 0.001, "timeout": 5.0, **options})
    step.broken = BrokenRows("python-edu", max_broken_fraction=1)
    return step


def _http(bucket, **options):
    return _step(f"{bucket.url}/content/{{blob_id}}", **options)


def _s3(bucket, **options):
    return _step("s3://softwareheritage/content/{blob_id}", storage_options={"endpoint_url": bucket.url}, **options)


def _texts(step, ids=None):
    return [document.text for document in step.run(_documents(ids))]


def _faults(step):
    return [(place["row"], place["reason"]) for place in step.broken.places]


@pytest.mark.parametrize("where", [_http, _s3])
def test_texts_keep_their_order_whatever_the_latency(bucket, where):
    latencies = random.Random(0)
    bucket.latency = lambda _: latencies.uniform(0, 0.02)
    step = where(bucket, threads=8)
    documents = list(step.run(_documents()))
    assert [document.text for document in documents] == TEXTS
    assert [document.id for document in documents] == [str(row) for row in range(len(TEXTS))]
    assert sorted(bucket.answers) == sorted(IDS) and bucket.answers != IDS
    assert bucket.methods == {"GET"}
    assert 2 <= bucket.most_outstanding <= 8
    assert step.stats["fetched"].total == len(TEXTS)
    assert step.stats["bytes"].total == sum((bucket.folder / blob_id).stat().st_size for blob_id in IDS)
    assert step.broken is not None and step.broken.counts == {}


def test_a_folder_of_blobs(tmp_path):
    sources = make_smollm_corpus(tmp_path / "corpus", documents_per_subset=30)
    texts = sources.texts[PYTHON_EDU]
    ids = [python_edu_row(0, text)["blob_id"] for text in texts]
    assert _texts(_step(sources.blob_url), ids) == texts


@pytest.mark.parametrize("where", [_http, _s3])
@pytest.mark.parametrize("failure", [500, 503, 429, RESET, CUT_SHORT])
def test_transport_failures_are_tried_again(bucket, where, failure):
    bucket.failures = {IDS[3]: [failure] * 2, IDS[7]: [failure]}
    step = where(bucket, threads=4, retries=3)
    assert _texts(step, IDS[:10]) == TEXTS[:10]
    # aiohttp itself tries once more where a connection that it kept open is reset.
    assert failure == RESET or bucket.requests.count(IDS[3]) == 3
    assert _faults(step) == []


@pytest.mark.parametrize("where", [_http, _s3])
def test_a_hanging_request_ends_with_its_timeout(bucket, where):
    bucket.failures = {IDS[1]: [HANG]}
    begin = time.monotonic()
    # Many tries, as a loaded machine may be late with the others' answers, too.
    assert _texts(where(bucket, timeout=1, retries=10), IDS[:3]) == TEXTS[:3]
    assert time.monotonic() - begin >= 1  # the server would hang for ever


@pytest.mark.parametrize("where", [_http, _s3])
def test_no_more_tries_than_asked_for(bucket, where):
    bucket.failures = {IDS[1]: [503] * 100}
    step = where(bucket, retries=2)
    assert _texts(step, IDS[:3]) == [TEXTS[0], TEXTS[2]]
    assert bucket.requests.count(IDS[1]) == 3
    assert _faults(step) == [(1, UNREACHABLE_BLOB)]


@pytest.mark.parametrize("where", [_http, _s3])
def test_a_missing_blob_is_not_tried_again(bucket, where):
    bucket.failures = {IDS[2]: [403]}
    (bucket.folder / IDS[0]).unlink()
    step = where(bucket)
    assert _texts(step, IDS[:4]) == [TEXTS[1], TEXTS[3]]
    assert _faults(step) == [(0, MISSING_BLOB), (2, MISSING_BLOB)]
    assert sorted(bucket.requests) == sorted(IDS[:4])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        pytest.param(lambda data: data[:-12], CORRUPT_BLOB, id="cut short"),
        pytest.param(lambda data: data[:-8] + bytes(4) + data[-4:], CORRUPT_BLOB, id="wrong checksum"),
        pytest.param(lambda _: gzip.compress(b"caf\xe9"), INVALID_UTF8, id="Latin-1"),
        pytest.param(lambda _: gzip.compress(b""), EMPTY_TEXT, id="empty"),
        pytest.param(lambda _: None, MISSING_BLOB, id="gone"),
    ],
)
def test_a_damaged_blob_is_reported_with_its_place(tmp_path, damage, reason):
    for blob_id, text in zip(IDS[:5], TEXTS, strict=False):
        write_blob(tmp_path, blob_id, text)
    path = tmp_path / IDS[2]
    damaged = damage(path.read_bytes())
    path.unlink() if damaged is None else path.write_bytes(damaged)
    step = _step(f"file://{tmp_path}/{{blob_id}}")
    assert _texts(step, IDS[:5]) == [TEXTS[0], TEXTS[1], TEXTS[3], TEXTS[4]]
    assert _faults(step) == [(2, reason)]
    assert step.broken is not None and IDS[2] in step.broken.places[0]["detail"]


def test_other_ways_to_decode_and_plain_blobs(tmp_path):
    (tmp_path / IDS[0]).write_bytes(gzip.compress(b"caf\xe9\n"))
    (tmp_path / IDS[1]).write_bytes("schön\n".encode())
    url = f"file://{tmp_path}/{{blob_id}}"
    assert _texts(_step(url, decode_errors="ignore"), IDS[:2]) == ["caf\n", "schön\n"]
    assert _texts(_step(url, decode_errors="replace"), IDS[:2]) == ["caf\ufffd\n", "schön\n"]


def test_a_blob_that_unpacks_without_end_is_corrupt(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "LARGEST_TEXT", 1000)
    write_blob(tmp_path, IDS[0], "x" * 1000)
    write_blob(tmp_path, IDS[1], "x" * 1001)
    step = _step(f"file://{tmp_path}/{{blob_id}}")
    assert _texts(step, IDS[:2]) == ["x" * 1000]
    assert _faults(step) == [(1, CORRUPT_BLOB)]


NO_IDS = ["../secret", "/etc/passwd", "", None, 7, IDS[0] + "\n", IDS[0][:-1], "٣" * 40, "{blob_id}", "x" * 40]


@pytest.mark.parametrize("evil", NO_IDS, ids=ascii)
def test_only_an_id_reaches_a_path(tmp_path, evil):
    (tmp_path / "secret").write_text("not for training")
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    write_blob(blobs, IDS[0], TEXTS[0])
    step = _step(f"file://{blobs}/{{blob_id}}")
    assert _texts(step, [evil, IDS[0]]) == [TEXTS[0]]
    assert _faults(step) == [(0, MISSING_BLOB)]
    assert step.broken is not None and "not a SHA-1" in step.broken.places[0]["detail"]


@pytest.mark.parametrize("protocol", ["http", "s3"])
def test_a_bucket_that_cannot_be_reached_stops_the_task(protocol):
    endpoint = f"http://127.0.0.1:{unused_port()}"
    if protocol == "s3":
        step = _step("s3://bucket/{blob_id}", storage_options={"endpoint_url": endpoint}, max_unreachable_in_a_row=8)
    else:
        step = _step(endpoint + "/{blob_id}", max_unreachable_in_a_row=8)
    # The bucket is the thing to name, though the very first row is one too many.
    step.broken = BrokenRows("python-edu", max_broken_fraction=0)
    step.broken.seen(5000)
    read = []

    def endless():
        for row in range(1_000_000):
            read.append(row)
            blob = hashlib.sha1(str(row).encode()).hexdigest()
            yield Document(text="", id="", metadata={"blob": blob, "file": "a.parquet", "row": row})

    # How soon it stops shows in how much was read: a time limit would be that of the machine.
    with pytest.raises(UserError, match="cannot be reached: 8 blobs in a row") as caught:
        list(step.run(endless()))
    assert step.blob_url in str(caught.value) and "finished tasks are kept" in str(caught.value)
    assert len(read) <= WINDOW_PER_THREAD * 16 + 8


def test_failures_count_only_in_a_row(bucket):
    failing = [index for index in range(40) if index % 4]
    bucket.failures = {IDS[index]: [503] * 9 for index in failing}
    step = _http(bucket, retries=0, max_unreachable_in_a_row=4)
    assert _texts(step) == TEXTS[::4]
    assert _faults(step) == [(index, UNREACHABLE_BLOB) for index in failing]
    bucket.always = 503
    with pytest.raises(UserError, match="4 blobs in a row"):
        _texts(_http(bucket, retries=0, max_unreachable_in_a_row=4))


def test_no_more_is_read_ahead_than_the_window(bucket):
    read = []

    def counted():
        for document in _documents():
            read.append(document.id)
            yield document

    for number, _ in enumerate(_http(bucket, threads=2).run(counted())):
        assert len(read) <= number + WINDOW_PER_THREAD * 2
    assert bucket.most_outstanding <= 2


def _fetching_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("fetch")]


def _wait_for_threads():
    deadline = time.monotonic() + PATIENCE
    while _fetching_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert _fetching_threads() == []


def test_an_early_end_leaves_no_thread(bucket):
    bucket.failures = {IDS[5]: [503] * 100}
    # A pause of hours between tries ends with the run.
    with closing(_http(bucket, threads=4, backoff=100 * PATIENCE).run(_documents())) as documents:
        assert next(documents).text == TEXTS[0]
        assert _fetching_threads()
    _wait_for_threads()


def test_an_early_end_fetches_no_more(bucket):
    ended = threading.Event()
    # Seconds: none for the first; the others wait for the end.
    bucket.latency = lambda name: float(name != IDS[0] and not ended.wait(PATIENCE))
    with closing(_http(bucket, threads=1, timeout=PATIENCE).run(_documents())) as documents:
        assert next(documents).text == TEXTS[0]
    ended.set()
    _wait_for_threads()
    # Of the four in the window, the second was under way at most.
    assert len(bucket.requests) <= 2


def test_an_error_of_the_reader_passes_and_leaves_no_thread(bucket):
    def failing():
        yield from _documents(IDS[:20])
        raise OSError("disk on fire")

    with pytest.raises(OSError, match="disk on fire"):
        list(_http(bucket, threads=2).run(failing()))
    _wait_for_threads()


def test_an_unknown_protocol_is_the_users_mistake():
    with pytest.raises(UserError, match="blob_url='nosuch://bucket"):
        _texts(_step("nosuch://bucket/{blob_id}"))


def test_the_step_travels_to_another_process(bucket, tmp_path):
    step = _s3(bucket)
    assert _texts(step, IDS[:2]) == TEXTS[:2]
    pickled = tmp_path / "step.pickle"
    # A step that has run, too: it holds no client.
    pickled.write_bytes(dill.dumps((step, list(_documents(IDS[:5])))))
    program = (
        "import dill, sys; step, documents = dill.load(open(sys.argv[1], 'rb'))\n"
        "sys.stdout.buffer.write(dill.dumps([document.text for document in step.run(documents)]))"
    )
    output = subprocess.run(
        [sys.executable, "-c", program, pickled], capture_output=True, check=True, timeout=600
    ).stdout
    assert dill.loads(output) == TEXTS[:5]
