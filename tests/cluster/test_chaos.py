"""Machines, workers and drivers that die in the gradients stage, on a real cluster of several nodes.

What comes out must be, to the bit, what an undisturbed run makes; and nothing that was committed is made again.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import yaml
from ray.cluster_utils import Cluster

from gradientspace_ray.run import RunDirectory

ROOT = Path(__file__).parents[2]
WORKERS = 3
SHARDS = 16
PATIENCE_S = 240
pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def cluster():
    """A head that does no work, and three nodes of one CPU each."""
    machines = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(WORKERS):
        machines.add_node(num_cpus=1)
    yield machines
    machines.shutdown()


@pytest.fixture(scope="module")
def prepared(cluster, tiny_model_dir, tmp_path_factory):
    """(recipe file, run directory in which all before the gradients is done)."""
    folder = tmp_path_factory.mktemp("chaos")
    recipe = {
        "name": "chaos",
        "model": {"name": str(tiny_model_dir), "compute_dtype": "float32"},
        "data": {"sources": ["quickstart"], "max_examples": 220, "max_tokens": 2048},
        "lora": {"rank": 4},
        "warmup": {"epochs": 0.1, "tokens_per_batch": 1024},
        "gradients": {"examples_per_shard": 10, "tokens_per_batch": 1024, "workers": WORKERS, "preconditioner": "none"},
        "sketch": {"rank": 16},
        "clusters": {"count": 3},
        "compute": {"cpus_per_worker": 1},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert start(cluster, path, folder / "prepared", until="warmup").wait(PATIENCE_S) == 0
    return path, folder / "prepared"


def start(cluster, recipe, run_dir, until="cluster", **changes):
    """A driver in a process of its own, as a submitted job is."""
    sets = [word for name, value in changes.items() for word in ("--set", f"{name.replace('__', '.')}={value}")]
    command = [sys.executable, ROOT / "jobs/pipeline.py", recipe, "--run-dir", run_dir, "--until", until, *sets]
    log = open(f"{run_dir}.log", "ab")  # noqa: SIM115
    environment = {**os.environ, "RAY_ADDRESS": cluster.address}
    return subprocess.Popen([str(word) for word in command], env=environment, stdout=log, stderr=log)


def files_of(run_dir):
    return {str(path.relative_to(run_dir)) for path in Path(run_dir).rglob("*") if path.is_file()}


def results_of(run_dir):
    """Bytes of everything that the stages up to the clusters leave, but for the manifest, which has times in it."""
    names = sorted(name for name in files_of(run_dir) if name.startswith(("sketch/", "clusters/")))
    return {name: (Path(run_dir) / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def undisturbed(cluster, prepared):
    """Run directories that nothing happened to, by whether there is a second pass."""
    recipe, before = prepared
    finished = {}
    for refine in (False, True):
        run_dir = finished[refine] = before.with_name(f"undisturbed-{refine}")
        shutil.copytree(before, run_dir)
        watch = Watch(run_dir)
        assert start(cluster, recipe, run_dir, sketch__refine=refine).wait(PATIENCE_S) == 0
        watch.end()
        counts = RunDirectory(run_dir).manifest().stages["gradients"].counts
        assert counts["shards"] >= SHARDS
        assert len(watch.committed) == counts["shards_made"] == counts["shards"] * (1 + refine)
    return finished


class Watch:
    """Looks at the run directory all the time: which shards were committed, and whether one was committed again."""

    def __init__(self, run_dir):
        self.shards = Path(run_dir) / "sketch" / "shards"
        self.committed = {}
        self.again = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self):
        while not self._stop.wait(0.01):
            for shard in list(self.shards.glob("*")):
                with contextlib.suppress(FileNotFoundError):
                    mark = (shard / "sketch.json").stat()
                    mark = (mark.st_ino, mark.st_mtime_ns)
                    if self.committed.setdefault(shard.name, mark) != mark:
                        self.again.append(shard.name)

    def wait_for(self, count):
        """Until so many shards are committed."""
        deadline = time.monotonic() + PATIENCE_S
        while len(self.committed) < count:
            assert time.monotonic() < deadline, f"{len(self.committed)} shards after {PATIENCE_S} s"
            time.sleep(0.01)

    def end(self):
        self._stop.set()
        self._thread.join()


def kill_extractor(rng):
    """SIGKILL to one of the processes that make gradients."""
    processes = psutil.process_iter(["cmdline"])
    found = [process for process in processes if "Extractor" in " ".join(process.info["cmdline"])]
    if found:
        rng.choice(found).send_signal(signal.SIGKILL)
    return bool(found)


def check(run_dir, undisturbed, watch):
    watch.end()
    assert watch.again == []
    expected, found = results_of(undisturbed), results_of(run_dir)
    assert list(found) == list(expected)
    assert [name for name in expected if found[name] != expected[name]] == []
    assert files_of(run_dir) - {"error.log"} == files_of(undisturbed)


@pytest.mark.parametrize("seed", [0])
def test_killed_workers(cluster, prepared, undisturbed, seed):
    rng = random.Random(seed)
    recipe, before = prepared
    run_dir = before.with_name(f"workers-{seed}")
    shutil.copytree(before, run_dir)
    watch, driver = Watch(run_dir), start(cluster, recipe, run_dir)
    for moment in sorted(rng.sample(range(1, SHARDS - 4), 2)):
        watch.wait_for(moment)
        time.sleep(rng.uniform(0, 0.3))
        assert kill_extractor(rng)
    assert driver.wait(PATIENCE_S) == 0
    check(run_dir, undisturbed[False], watch)


@pytest.mark.parametrize("seed", [1])
def test_a_killed_node(cluster, prepared, undisturbed, seed):
    rng = random.Random(seed)
    recipe, before = prepared
    run_dir = before.with_name(f"node-{seed}")
    shutil.copytree(before, run_dir)
    watch, driver = Watch(run_dir), start(cluster, recipe, run_dir)
    watch.wait_for(rng.randrange(1, SHARDS - 4))
    time.sleep(rng.uniform(0, 0.3))
    cluster.remove_node(rng.choice(list(cluster.worker_nodes)), allow_graceful=False)
    try:
        assert driver.wait(PATIENCE_S) == 0
    finally:
        cluster.add_node(num_cpus=1)
    check(run_dir, undisturbed[False], watch)


@pytest.mark.parametrize("seed", [2])
def test_a_killed_driver(cluster, prepared, undisturbed, seed):
    """In the first pass, when all shards of it are there and the last merges go on, and in the second pass."""
    rng = random.Random(seed)
    recipe, before = prepared
    run_dir = before.with_name(f"driver-{seed}")
    shutil.copytree(before, run_dir)
    watch = Watch(run_dir)
    shards = RunDirectory(undisturbed[True]).manifest().stages["gradients"].counts["shards"]
    for moment in (rng.randrange(1, SHARDS - 4), shards, shards + rng.randrange(1, SHARDS - 4)):
        driver = start(cluster, recipe, run_dir, sketch__refine=True)
        watch.wait_for(moment)
        time.sleep(rng.uniform(0, 0.3))
        driver.kill()
        driver.wait()
    assert start(cluster, recipe, run_dir, sketch__refine=True).wait(PATIENCE_S) == 0
    check(run_dir, undisturbed[True], watch)
