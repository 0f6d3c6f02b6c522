import json
import multiprocessing
import os
import time

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradientspace_ray.run import RunDirectory, RunError, StageRecord, digest_of


def test_files_tables_and_json_come_back(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.write_json("a/b.json", {"x": [1, "é"]})
    run.write_table("t.parquet", pa.table({"id": ["a", "b"], "v": [1.0, 2.0]}))
    assert run.read_json("a/b.json") == {"x": [1, "é"]}
    assert run.read_table("t.parquet", ["v"]).to_pydict() == {"v": [1.0, 2.0]}
    assert run.names("") == ["a", "t.parquet"]
    assert run.names("missing") == []


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RunError, match=r"nothing\.json is missing"):
        RunDirectory(tmp_path).read_json("nothing.json")


def test_a_staged_folder_appears_whole_or_not_at_all(tmp_path):
    run = RunDirectory(tmp_path)

    def interrupted():
        with run.staged("generalist") as folder:
            (folder / "weights").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not run.exists("generalist")
    assert run.names(".staging") == []
    for content in ("one", "two"):
        with run.staged("generalist") as folder:
            (folder / "weights").write_text(content)
        assert (run.fetch("generalist") / "weights").read_text() == content


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    run = RunDirectory(tmp_path)
    run.write_bytes("x", b"old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        run.write_bytes("x", b"new")
    assert run.read_bytes("x") == b"old"
    assert run.names("") == ["x"]


def test_the_manifest_keeps_every_stage(tmp_path):
    run = RunDirectory(tmp_path)
    run.record("prepare", StageRecord(status="done", digest="d1", counts={"examples": 3}))
    run.record("warmup", StageRecord(status="running", digest="d2"))
    stages = RunDirectory(tmp_path).manifest().stages
    assert list(stages) == ["prepare", "warmup"]
    assert stages["prepare"].counts == {"examples": 3}


def hold(path, ready, done):
    with RunDirectory(path).lease():
        ready.set()
        done.wait(30)


def test_a_second_driver_is_refused_and_a_dead_one_is_not_waited_for(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    holder = context.Process(target=hold, args=(str(tmp_path), ready, done))
    holder.start()
    assert ready.wait(30)
    with pytest.raises(RunError, match=f"in use by process {holder.pid}"), RunDirectory(tmp_path).lease():
        pass
    holder.kill()
    holder.join()
    with RunDirectory(tmp_path).lease():
        assert RunDirectory(tmp_path).read_json("lease.json")["pid"] == os.getpid()
    assert not RunDirectory(tmp_path).exists("lease.json")


def test_a_stale_lease_of_another_machine_is_taken_over(tmp_path):
    run = RunDirectory(tmp_path)
    lease = {"owner": "x", "host": "elsewhere", "pid": 1, "renewed_at": time.time() - 3600}
    run.write_json("lease.json", lease)
    with run.lease():
        pass
    run.write_json("lease.json", lease | {"renewed_at": time.time()})
    with pytest.raises(RunError, match="elsewhere"), run.lease():
        pass


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.lists(st.integers())))
def test_the_digest_does_not_depend_on_the_order_of_keys(value):
    shuffled = dict(reversed(list(value.items())))
    assert digest_of(value) == digest_of(shuffled) == digest_of(json.loads(json.dumps(value)))
