import json
import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import fs

from gradientspace_ray import retries
from gradientspace_ray.run import MissingFileError, RunDirectory, RunError, StageRecord, digest_of

MARKER = "training.json"


@pytest.fixture(autouse=True)
def quick_tries(monkeypatch):
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.01)


@pytest.fixture(params=["local", "s3"])
def run(request, tmp_path):
    """An empty run directory, on this machine's disk and on an object store."""
    uri = tmp_path / "run" if request.param == "local" else request.getfixturevalue("object_store")()
    return RunDirectory(uri)


@pytest.fixture
def remote(object_store):
    return RunDirectory(object_store())


def fill(folder, content):
    for name in ("adapter_config.json", "deep/adapter_model.safetensors", MARKER):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)


def commit(run, name, content):
    with run.staged(name, last=MARKER) as folder:
        fill(folder, content)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def whole(content):
    return dict.fromkeys(["adapter_config.json", "deep/adapter_model.safetensors", MARKER], content)


def test_files_tables_and_json_come_back(run):
    run.write_json("a/b.json", {"x": [1, "é"]})
    run.write_table("t.parquet", pa.table({"id": ["a", "b"], "v": [1.0, 2.0]}))
    assert run.read_json("a/b.json") == {"x": [1, "é"]}
    assert run.read_table("t.parquet", ["v"]).to_pydict() == {"v": [1.0, 2.0]}
    assert run.names("") == ["a", "t.parquet"]
    assert run.names("missing") == []
    run.delete("a")
    run.delete("never there")
    assert not run.exists("a/b.json")


def test_a_uri_alone_opens_the_same_directory_elsewhere(run):
    run.write_bytes("sub/x", b"1")
    assert RunDirectory(run.uri).read_bytes("sub/x") == b"1"
    assert RunDirectory(run.uri_of("sub")).read_bytes("x") == b"1"
    assert RunDirectory(run.uri).uri == run.uri
    assert RunDirectory(Path(run.path()) if run.is_local else run.uri).uri == run.uri


def test_the_environment_can_name_the_server(object_store, monkeypatch):
    uri, _, options = object_store().partition("?")
    monkeypatch.setenv("AWS_ENDPOINT_URL", options.split("=")[1].split("&")[0])
    RunDirectory(f"{uri}?region=us-east-1").write_bytes("x", b"1")
    assert RunDirectory(f"{uri}?{options}").read_bytes("x") == b"1"


def test_a_missing_file_is_named(run):
    with pytest.raises(RunError, match=r"nothing\.json is missing"):
        run.read_json("nothing.json")
    with pytest.raises(MissingFileError, match="nothing is missing"):
        run.fetch("nothing")


def test_a_missing_file_is_told_from_a_broken_one_by_those_who_know_no_runs(run):
    with pytest.raises(FileNotFoundError) as error:
        run.read_bytes("sketch/plan.json")
    message = f"{run.path('sketch/plan.json')} is missing; run the stage that makes it again"
    copy = pickle.loads(pickle.dumps(error.value))
    assert isinstance(copy, RunError)
    assert str(error.value) == str(copy) == message
    run.write_bytes("sketch/plan.json", b"{")
    with pytest.raises(RunError) as error:
        run.read_json("sketch/plan.json")
    assert not isinstance(error.value, OSError)


def test_a_file_that_is_replaced_while_it_is_read_is_read_again(remote, monkeypatch):
    remote.record("prepare", StageRecord(status="done", digest="d" * 16))
    read, lengths = RunDirectory._read, [40, 10_000]

    def torn(self, path):
        data = read(self, path).to_pybytes()
        return data.ljust(lengths[-1], b"}")[: lengths.pop()] if lengths else data

    monkeypatch.setattr(RunDirectory, "_read", torn)
    assert remote.manifest().stages["prepare"].digest == "d" * 16
    assert not lengths


def test_the_sizes_of_a_folder_s_files(run):
    run.write_bytes("sketch/plan.json", b"123")
    run.write_bytes("sketch/shards/0/rows.npy", b"12345")
    run.write_bytes("sketch/shards/0/empty", b"")
    run.write_bytes("sketches/other", b"1")
    assert run.sizes("sketch") == {"plan.json": 3, "shards/0/rows.npy": 5, "shards/0/empty": 0}
    assert run.sizes("sketch/shards/0") == {"rows.npy": 5, "empty": 0}
    assert run.sizes("")["sketch/plan.json"] == 3
    assert run.sizes("nothing") == {}


def at_once(count, act):
    """What each of some threads that start together returns, or raises."""
    barrier, outcomes = threading.Barrier(count), []

    def run_one():
        barrier.wait(30)
        try:
            outcomes.append(act())
        except OSError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=run_one) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def test_a_folder_may_be_deleted_by_several_at_once(run):
    for _ in range(5 if run.is_local else 1):
        for index in range(200 if run.is_local else 8):
            run.write_bytes(f"shards/{index}/deep/rows", b"1")
        assert at_once(4, lambda: RunDirectory(run.uri).delete("shards")) == [None] * 4
        assert not run.exists("shards")
    run.write_bytes("x", b"1")
    assert at_once(4, lambda: RunDirectory(run.uri).delete("x")) == [None] * 4


def test_a_file_may_be_written_by_several_at_once(run):
    written = [bytes([65 + index]) * 200_000 for index in range(6)]
    left = list(written)
    assert at_once(6, lambda: run.write_bytes("a/x", left.pop())) == [None] * 6
    assert run.read_bytes("a/x") in written
    assert run.names("a") == ["x"]


@pytest.mark.parametrize("gone", ["the folder", "the part"])
def test_a_write_outlives_the_removal_of_its_folder(tmp_path, monkeypatch, gone):
    run, replace, removed = RunDirectory(tmp_path), os.replace, []

    def too_late(source, target):
        if not removed:
            removed.append(source)
            shutil.rmtree(Path(target).parent) if gone == "the folder" else os.unlink(source)
        replace(source, target)

    monkeypatch.setattr(os, "replace", too_late)
    run.write_bytes("a/b/x", b"1")
    assert run.read_bytes("a/b/x") == b"1"
    assert run.names("a/b") == ["x"]
    assert removed


def test_a_directory_without_a_run_says_how_to_start_one(run):
    with pytest.raises(RunError) as error:
        run.require()
    assert str(error.value) == f"{run.uri} holds no run; start one with: gradientspace run quickstart"
    run.record("prepare", StageRecord(status="running", digest="d"))
    run.require()


@pytest.mark.parametrize("data", [b'{"stages": {', b"\xff\xfe{}", b""])
def test_a_damaged_json_file_is_named_in_one_line(run, data):
    run.write_bytes("clusters/quality.json", data)
    with pytest.raises(RunError) as error:
        run.read_json("clusters/quality.json")
    message = str(error.value)
    assert message.startswith(f"{run.path('clusters/quality.json')} cannot be used (")
    assert message.endswith(f"delete {run.path('manifest.json')} and run again, what is finished is kept")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'{"stages": {', "Invalid JSON: EOF while parsing"),
        (b"[]", "Input should be an object"),
        (
            b'{"stages": {"prepare": {"status": "dun", "digest": 3}}}',
            "stages: prepare: status: Input should be .*, and 1 more",
        ),
    ],
)
def test_a_damaged_manifest_is_named_in_one_line(run, data, reason):
    run.write_bytes("manifest.json", data)
    with pytest.raises(RunError, match=reason) as error:
        run.manifest()
    message = str(error.value)
    assert message.startswith(f"{run.path('manifest.json')} cannot be used (")
    assert message.endswith(f"; delete {run.path('manifest.json')} and run again, what is finished is kept")
    assert "\n" not in message


def test_a_staged_folder_appears_whole_or_not_at_all(run):
    def interrupted():
        with run.staged("generalist", last=MARKER) as folder:
            fill(folder, "half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not run.exists("generalist")
    commit(run, "generalist", "one")
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert run.read_bytes(f"generalist/{MARKER}") == b"one"
    assert run.names(".staging") == []


def test_a_staged_folder_replaces_the_old_one(run):
    with run.staged("router") as folder:
        (folder / "only in the first").write_text("x")
        fill(folder, "one")
    commit(run, "router", "two")
    assert contents(run.fetch("router")) == whole("two")
    assert run.names(".staging") == []


KILLED_WHILE_IT_STAGES = """
import os, sys
from gradientspace_ray.run import RunDirectory
with RunDirectory(sys.argv[1]).staged("generalist") as folder:
    (folder / "half").write_text("1")
    print(folder, flush=True)
    os.kill(os.getpid(), 9)
"""


def killed_while_it_stages(run):
    command = [sys.executable, "-c", KILLED_WHILE_IT_STAGES, run.uri]
    folder = Path(subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip())
    assert (folder / "half").exists()
    return folder


def test_what_a_killed_process_staged_for_an_object_store_is_removed_by_the_next_one(remote):
    folder = killed_while_it_stages(remote)
    code = f"from gradientspace_ray.run import RunDirectory\nwith RunDirectory({remote.uri!r}).staged('x'): pass"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
    assert not folder.parent.exists()


def test_what_killed_processes_left_is_swept(tmp_path):
    run = RunDirectory(tmp_path / "run")
    kept = {"a.tmp": 1, "deep/0123456789.tmp": 1, "deep/x.npy.0123zzzz.tmp": 1, "deep/x.npy": 1}
    left = ["sketch/deep/x.npy.01ab23cd.tmp", "sketch/plan.json.ffffffff.tmp"]
    for name in (*(f"sketch/{name}" for name in kept), *left, "manifest.json.01ab23cd.tmp"):
        run.write_bytes(name, b"1")
    folder = killed_while_it_stages(run)
    run.sweep("sketch")
    assert run.sizes("sketch") == kept
    assert not folder.exists()
    assert run.exists("manifest.json.01ab23cd.tmp")
    run.sweep()
    assert run.names("") == ["sketch"]
    RunDirectory(tmp_path / "nothing").sweep()


def test_nothing_is_swept_on_an_object_store(remote):
    remote.write_bytes("x.01ab23cd.tmp", b"1")
    remote.sweep()
    assert remote.names("") == ["x.01ab23cd.tmp"]


def test_a_worker_that_fails_while_it_uploads_leaves_no_marker(remote, monkeypatch):
    commit(remote, "generalist", "old")
    put = RunDirectory._put_one

    def fails_half_way(self, name, source):
        if "deep" not in name:
            raise OSError("connection reset")
        put(self, name, source)

    monkeypatch.setattr(RunDirectory, "_put_one", fails_half_way)
    with pytest.raises(OSError, match="connection reset"):
        commit(remote, "generalist", "new")
    monkeypatch.undo()
    assert not remote.exists(f"generalist/{MARKER}"), "half a folder must not look complete"
    commit(remote, "generalist", "new")
    assert contents(remote.fetch("generalist")) == whole("new")


def test_the_old_marker_goes_first_and_the_new_one_comes_last(remote, caplog):
    commit(remote, "generalist", "old")
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="werkzeug"):
        commit(remote, "generalist", "new")
    changes = [change for line in caplog.messages for change in re.findall(r"(?:PUT|POST|DELETE) \S+", line)]
    key = f"{remote.path('generalist')}/{MARKER}"
    assert changes[0] == f"DELETE /{key}"
    first = next(index for index, change in enumerate(changes[1:], 1) if key in change)
    assert all(key in change for change in changes[first:])
    for other in ("adapter_config.json", "deep/adapter_model.safetensors"):
        assert any(change.startswith("POST") and f"{other}?uploadId=" in change for change in changes[:first])


def test_a_fetch_that_fails_half_way_leaves_nothing_to_reuse(remote, monkeypatch):
    commit(remote, "generalist", "x" * 1000)
    copy_files = fs.copy_files

    def dies_half_way(source, destination, **filesystems):
        copy_files(source, destination, **filesystems)
        (Path(destination) / MARKER).write_text("x")
        raise OSError("no space left on device")

    monkeypatch.setattr(fs, "copy_files", dies_half_way)
    with pytest.raises(OSError, match="no space"):
        remote.fetch("generalist")
    monkeypatch.undo()
    assert contents(remote.fetch("generalist")) == whole("x" * 1000)


def test_a_copy_is_made_once_and_again_when_it_was_removed(remote, monkeypatch):
    commit(remote, "a/generalist", "x")
    remote.write_bytes("a/recipe.yaml", b"name: x")
    copy = remote.fetch("a/generalist")
    assert copy.name == "generalist"
    assert remote.fetch("a/recipe.yaml").read_text() == "name: x"
    assert sorted(path.name for path in remote.fetch("a").iterdir()) == ["generalist", "recipe.yaml"]
    with monkeypatch.context() as patch:
        patch.setattr(fs, "copy_files", None)
        assert RunDirectory(remote.uri).fetch("a/generalist") == copy
    for path in (copy / MARKER, copy / "adapter_config.json", copy / "deep/adapter_model.safetensors"):
        path.unlink()
    (copy / "deep").rmdir()
    copy.rmdir()
    assert contents(remote.fetch("a/generalist")) == whole("x")


def test_threads_that_fetch_at_once_get_whole_folders(remote):
    commit(remote, "generalist", "x")
    barrier, found = threading.Barrier(6), []

    def fetch():
        barrier.wait(30)
        found.append(contents(remote.fetch("generalist")))

    threads = [threading.Thread(target=fetch) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [whole("x")] * 6


FETCHING = """
import os, sys
from gradientspace_ray.run import RunDirectory
run = RunDirectory(sys.argv[1])
mine = run.fetch("x")
child = os.fork()
if child == 0:
    assert run.fetch("x") != mine
    print(run.fetch("x"), flush=True)
    sys.exit()
assert os.waitpid(child, 0)[1] == 0
assert mine.exists(), "the child removed what its parent fetched"
print(mine)
"""


def test_copies_are_a_process_s_own_and_go_with_it(remote):
    remote.write_bytes("x", b"1")
    command = [sys.executable, "-c", FETCHING, remote.uri]
    copies = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()
    assert len(set(copies)) == 2
    assert not any(Path(copy).parents[1].exists() for copy in copies)


def test_what_a_killed_process_fetched_is_removed_by_the_next_one(remote):
    remote.write_bytes("x", b"1")
    fetch = "print(RunDirectory(sys.argv[1]).fetch('x'), flush=True)"
    code = f"import sys\nfrom gradientspace_ray.run import RunDirectory\n{fetch}"
    killed = [sys.executable, "-c", f"{code}\nimport os\nos.kill(os.getpid(), 9)", remote.uri]
    left = Path(subprocess.run(killed, capture_output=True, text=True, timeout=60).stdout.strip()).parents[1]
    assert left.exists()
    subprocess.run([sys.executable, "-c", code, remote.uri], check=True, capture_output=True, timeout=60)
    assert not left.exists()


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    run = RunDirectory(tmp_path)
    run.write_bytes("x", b"old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        run.write_bytes("x", b"new")
    assert run.read_bytes("x") == b"old"
    assert run.names("") == ["x"]


def test_the_manifest_keeps_every_stage(run):
    run.record("prepare", StageRecord(status="done", digest="d1", counts={"examples": 3}))
    run.record("warmup", StageRecord(status="running", digest="d2"))
    stages = RunDirectory(run.uri).manifest().stages
    assert list(stages) == ["prepare", "warmup"]
    assert stages["prepare"].counts == {"examples": 3}


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.lists(st.integers())))
def test_the_digest_does_not_depend_on_the_order_of_keys(value):
    shuffled = dict(reversed(list(value.items())))
    assert digest_of(value) == digest_of(shuffled) == digest_of(json.loads(json.dumps(value)))
