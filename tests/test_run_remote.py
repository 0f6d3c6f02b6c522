"""The run directory on an object store behind a network that fails."""

import math
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from flaky_proxy import FlakyProxy
from pyarrow import fs

from gradientspace_ray import retries
from gradientspace_ray.run import RunDirectory, RunError

PARTS = "PUT .*partNumber"
PYARROW_TRIES = 31
"""How often pyarrow sends a request to S3 that fails, in six seconds."""
DATA = os.urandom(4_000_000)


@pytest.fixture(autouse=True)
def quick_tries(monkeypatch):
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.01)


@pytest.fixture
def place(object_store):
    return object_store()


@pytest.fixture
def proxy(place):
    with FlakyProxy(re.search(r"endpoint_override=([^&]+)", place)[1]) as proxy:
        yield proxy


@pytest.fixture
def patient(proxy, place):
    """A run directory behind the proxy, as it is opened everywhere: pyarrow, too, tries again."""
    return RunDirectory(proxy.through(place))


@pytest.fixture
def run(proxy, patient):
    """A run directory behind the proxy, whose pyarrow gives up at once: only the run directory tries again."""
    patient.filesystem = fs.S3FileSystem(
        endpoint_override=proxy.url.removeprefix("http://"),
        scheme="http",
        region="us-east-1",
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1),
    )
    return patient


@pytest.fixture
def server(place):
    """The same run directory by a network that is well."""
    return RunDirectory(place)


def fill(folder, content):
    (folder / "deep").mkdir()
    (folder / "deep/rows").write_bytes(content * 1_000_000)
    (folder / "training.json").write_bytes(content)


def commit(run, content):
    with run.staged("generalist", last="training.json") as folder:
        fill(folder, content)


def whole(content):
    return {"deep/rows": 1_000_000 * len(content), "training.json": len(content)}


def test_pyarrow_itself_mends_one_cut(proxy, patient, server):
    proxy.cut(PARTS, after=1_000_000)
    patient.write_bytes("x", DATA)
    assert proxy.cuts == 1
    assert len([request for request in proxy.requests if "?uploads" in request]) == 1
    assert server.read_bytes("x") == DATA


def test_a_write_that_is_cut_more_often_than_pyarrow_tries(proxy, patient, server):
    proxy.cut(PARTS, after=1_000_000, times=PYARROW_TRIES + 1)
    patient.write_bytes("x", DATA)
    assert proxy.cuts == PYARROW_TRIES + 1
    assert len([request for request in proxy.requests if "?uploads" in request]) == 2
    assert server.read_bytes("x") == DATA


@pytest.mark.slow
def test_a_network_that_stays_away_is_given_up_after_some_twenty_seconds(proxy, patient, server, monkeypatch):
    monkeypatch.undo()
    server.write_bytes("x", b"old")
    proxy.cut(PARTS, after=1_000_000, times=math.inf)
    started = time.monotonic()
    with pytest.raises(OSError, match="AWS Error NETWORK_CONNECTION"):
        patient.write_bytes("x", DATA)
    assert 10 < time.monotonic() - started < 35
    assert server.read_bytes("x") == b"old"


@pytest.mark.parametrize("size", [4_000_000, 12_000_000])
def test_nothing_is_seen_of_a_write_that_never_gets_through(proxy, run, server, size):
    data = os.urandom(size)
    server.write_bytes("old", b"old")
    # The last part, so that those before it have reached the server.
    proxy.cut(f"{PARTS}={1 + size // 10_000_000}", after=1_000_000, times=math.inf)
    for name in ("old", "new"):
        with pytest.raises(OSError, match="AWS Error NETWORK_CONNECTION") as error:
            run.write_bytes(name, data)
        assert "\n" not in str(error.value)
    assert proxy.cuts == 2 * retries.TRIES
    assert server.read_bytes("old") == b"old"
    assert not server.exists("new")
    proxy.mend()
    run.write_bytes("old", data)
    assert server.read_bytes("old") == data


def test_a_write_whose_answer_is_lost_is_done_again(proxy, run, server):
    proxy.cut("POST .*uploadId", of="answer", after=20)
    run.write_bytes("x", DATA)
    assert proxy.cuts == 1
    assert server.read_bytes("x") == DATA


@pytest.mark.parametrize("asked", ["HEAD", "GET"])
def test_a_read_that_is_cut_gives_all_bytes(proxy, run, server, asked):
    server.write_bytes("x", DATA)
    proxy.cut(f"{asked} .*/x", of="answer", after=0 if asked == "HEAD" else 1_000_000, times=2)
    assert run.read_bytes("x") == DATA
    assert proxy.cuts == 2
    proxy.cut("GET .*/x", of="answer", after=1_000_000, times=math.inf)
    with pytest.raises(OSError, match="AWS Error"):
        run.read_bytes("x")


def test_a_fetch_that_is_cut_copies_all(proxy, run, server):
    commit(server, b"1")
    proxy.cut("GET .*/rows", of="answer", after=100_000, times=2)
    copy = run.fetch("generalist")
    assert proxy.cuts == 2
    assert (copy / "deep/rows").read_bytes() == b"1" * 1_000_000
    assert (copy / "training.json").read_bytes() == b"1"


def test_a_staged_folder_whose_upload_is_cut_commits_all_the_same(proxy, run, server):
    commit(server, b"old")
    proxy.cut("PUT .*rows.*partNumber", after=100_000)
    proxy.cut("POST .*training.json")
    commit(run, b"new")
    assert proxy.cuts == 2
    assert server.sizes("generalist") == whole(b"new")
    assert server.read_bytes("generalist/training.json") == b"new"


def test_a_staged_folder_that_does_not_get_through_has_no_marker(proxy, run, server):
    commit(server, b"old")
    proxy.cut("PUT .*rows.*partNumber", after=100_000, times=math.inf)
    with pytest.raises(OSError, match="AWS Error NETWORK_CONNECTION"):
        commit(run, b"new")
    assert server.sizes("generalist") == {}
    proxy.mend()
    commit(run, b"new")
    assert server.sizes("generalist") == whole(b"new")


def test_listings_and_deletions_get_through(proxy, run, server):
    for name in ("a/x", "a/b/y"):
        server.write_bytes(name, b"123")
    for act, found in (
        (lambda: run.names("a"), ["b", "x"]),
        (lambda: run.sizes("a"), {"x": 3, "b/y": 3}),
        (lambda: run.exists("a/x"), True),
        (lambda: run.exists("a/z"), False),
        (lambda: run.delete("a/x"), None),
        (lambda: run.delete("a"), None),
    ):
        before = proxy.cuts
        proxy.cut(times=2)
        assert act() == found
        assert proxy.cuts == before + 2
    assert server.sizes("a") == {}


def test_a_deletion_whose_answer_is_lost_is_no_error(proxy, run, server):
    for name in ("x", "a/y"):
        server.write_bytes(name, b"1")
    proxy.cut("DELETE .*/x", of="answer")
    run.delete("x")
    proxy.cut(r"POST .*\?delete", of="answer")
    run.delete("a")
    assert proxy.cuts == 2
    assert not server.exists("x")
    assert not server.exists("a/y")


ACTS = {
    "read": lambda run: run.read_bytes("x"),
    "write": lambda run: run.write_bytes("x", b"new"),
    "list": lambda run: run.names(""),
    "look": lambda run: run.exists("x"),
    "delete": lambda run: run.delete("x"),
    "fetch": lambda run: run.fetch("x"),
}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("status", [500, 503])
def test_a_server_that_is_not_well_is_asked_again(proxy, run, server, act, status):
    server.write_bytes("x", b"old")
    proxy.refuse(status, times=2)
    ACTS[act](run)
    assert proxy.cuts == 2


@pytest.mark.parametrize("act", ACTS)
def test_what_is_forbidden_is_not_tried_again(proxy, patient, server, act):
    server.write_bytes("x", b"old")
    proxy.refuse(403, times=math.inf)
    with pytest.raises(OSError, match="ACCESS_DENIED"):
        ACTS[act](patient)
    assert proxy.cuts == 1
    assert server.read_bytes("x") == b"old"


def test_a_bucket_that_is_not_there_is_not_waited_for(proxy, place, monkeypatch):
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 60.0)
    run = RunDirectory(proxy.through(place).replace("s3://runs/", "s3://nowhere/"))
    with pytest.raises(OSError, match="NO_SUCH_BUCKET"):
        run.write_bytes("x", b"1")
    assert run.names("") == []
    with pytest.raises(RunError, match="x is missing"):
        run.read_bytes("x")


def test_errors_of_this_machine_are_not_waited_for(run, monkeypatch):
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 60.0)
    run.write_bytes("x", b"1")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fs, "copy_files", full)
    with pytest.raises(OSError, match="No space"):
        run.fetch("x")


def test_a_server_that_has_gone_is_given_up(proxy, run):
    proxy.stop()
    with pytest.raises(OSError, match="AWS Error NETWORK_CONNECTION") as error:
        run.names("")
    assert "\n" not in str(error.value)


WRITING = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin deaf to it
from gradientspace_ray.run import RunDirectory
run = RunDirectory(sys.argv[1])
try:
    run.write_bytes("x", b"n" * int(sys.argv[2]))
except KeyboardInterrupt:
    sys.exit(3)
"""


@pytest.mark.parametrize(
    ("number", "moment", "size"),
    [(signal.SIGINT, r"\?uploads", 12_000_000), (signal.SIGKILL, "partNumber=2", 30_000_000)],
    ids=["interrupted", "killed"],
)
def test_a_process_that_ends_while_it_writes_leaves_the_old_or_the_new(proxy, patient, server, number, moment, size):
    status = 0
    # One that has ended before the signal came shows nothing.
    for _ in range(20):
        server.write_bytes("x", b"old")
        before = len(proxy.requests)
        with subprocess.Popen([sys.executable, "-c", WRITING, patient.uri, str(size)]) as process:
            deadline = time.monotonic() + 60
            while not any(re.search(moment, request) for request in proxy.requests[before:]):
                assert time.monotonic() < deadline
                time.sleep(0.0005)
            process.send_signal(number)
            status = process.wait(60)
        if status:
            break
    assert status == (3 if number == signal.SIGINT else -signal.SIGKILL)
    assert server.read_bytes("x") in (b"old", b"n" * size)
