import multiprocessing
import os
import threading
import time

import pytest

from gradientspace_ray import lease
from gradientspace_ray.lease import Lease
from gradientspace_ray.run import RunDirectory, RunError


@pytest.fixture(params=["local", "s3"])
def run(request, tmp_path, monkeypatch):
    """An empty run directory, on this machine's disk and on an object store."""
    monkeypatch.setattr(lease, "SETTLE_S", 0.05)
    uri = tmp_path / "run" if request.param == "local" else request.getfixturevalue("object_store")()
    return RunDirectory(uri)


def hold(path, ready, done):
    with Lease(RunDirectory(path)):
        ready.set()
        done.wait(30)


def test_a_second_driver_is_refused_and_a_dead_one_is_not_waited_for(run):
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    holder = context.Process(target=hold, args=(run.uri, ready, done))
    holder.start()
    assert ready.wait(30)
    with pytest.raises(RunError, match=f"in use by process {holder.pid}"), Lease(RunDirectory(run.uri)):
        pass
    holder.kill()
    holder.join()
    with Lease(RunDirectory(run.uri)):
        assert run.read_json("lease.json")["pid"] == os.getpid()
    assert not run.exists("lease.json")


def lease_of(host="elsewhere", age_s=0.0):
    return {"owner": "x", "host": host, "pid": 1, "renewed_at": time.time() - age_s}


def test_a_stale_lease_of_another_machine_is_taken_over(run):
    run.write_json("lease.json", lease_of(age_s=3600))
    with Lease(run) as held:
        held.check()
    run.write_json("lease.json", lease_of())
    with pytest.raises(RunError, match="elsewhere"), Lease(run):
        pass


@pytest.mark.parametrize("data", [b"", b"{", b'{"owner": "x"}'])
def test_a_damaged_lease_is_nobody_s(run, data):
    run.write_bytes("lease.json", data)
    with Lease(run) as held:
        held.check()


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def renewals():
    return [thread for thread in threading.enumerate() if thread.name == "run-lease"]


def test_a_driver_that_lost_its_lease_learns_of_it_and_leaves_the_other_one_alone(run, monkeypatch):
    monkeypatch.setattr(lease, "RENEWAL_S", 0.02)
    other = lease_of()
    with Lease(run) as held:
        held.check()
        thread = renewals()[0]
        # Between two renewals this one has read the lease and is about to write it, so the other may be written over.
        wait_until(lambda: run.write_json("lease.json", other) or run.read_json("lease.json") == other)
        wait_until(lambda: run.write_json("lease.json", other) or not thread.is_alive())
        with pytest.raises(RunError, match="another driver took over; let it finish, then run again"):
            held.check()
    assert run.read_json("lease.json") == other


def test_a_lease_that_is_gone_counts_as_lost(run):
    with Lease(run) as held:
        run.delete("lease.json")
        with pytest.raises(RunError, match="another driver took over"):
            held.check()


def test_renewal_goes_on_after_an_error(run, monkeypatch):
    monkeypatch.setattr(lease, "RENEWAL_S", 0.02)
    write, failures = RunDirectory.write_json, []

    def fails_twice(self, name, value):
        if threading.current_thread().name == "run-lease" and len(failures) < 2:
            failures.append(name)
            raise OSError("the network is down")
        write(self, name, value)

    monkeypatch.setattr(RunDirectory, "write_json", fails_twice)
    with Lease(run) as held:
        taken_at = run.read_json("lease.json")["renewed_at"]
        wait_until(lambda: run.read_json("lease.json")["renewed_at"] > taken_at)
        held.check()
    assert failures == ["lease.json"] * 2
    assert not run.exists("lease.json")


@pytest.mark.parametrize("before", ["nothing", "a stale lease"])
def test_of_drivers_that_start_at_once_one_gets_the_run(run, monkeypatch, before):
    monkeypatch.setattr(lease, "SETTLE_S", 0.5)
    drivers = 6 if run.is_local else 3
    for _ in range(10 if run.is_local else 1):
        if before == "a stale lease":
            run.write_json("lease.json", lease_of(age_s=3600))
        start, end = threading.Barrier(drivers), threading.Barrier(drivers)
        outcomes = []

        def drive(start=start, end=end, outcomes=outcomes):
            start.wait(30)
            try:
                with Lease(RunDirectory(run.uri)) as held:
                    end.wait(30)
                    held.check()
                    outcomes.append("got it")
            except RunError as error:
                outcomes.append(str(error))
                end.wait(30)

        threads = [threading.Thread(target=drive) for _ in range(drivers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(outcomes) == drivers
        assert outcomes.count("got it") == 1, outcomes


def test_an_error_in_the_block_gives_the_lease_back(run):
    with pytest.raises(ZeroDivisionError), Lease(run):
        raise ZeroDivisionError
    assert not run.exists("lease.json")
    assert renewals() == []
