"""Workers and machines that die while four experts train at once, on a real cluster of three nodes.

What comes out must be what an undisturbed run makes, and no finetune may begin anew.
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
import pyarrow as pa
import pytest
import yaml
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2
from reference_training import random_examples
from safetensors.torch import load_file

from gradientspace_ray.models.loading import add_lora, load_base, save_adapter
from gradientspace_ray.models.moments import save_moments
from gradientspace_ray.run import RunDirectory
from gradientspace_ray.training.engine import PlainEngine
from gradientspace_ray.training.loop import train

NODES, CPUS = 3, 4
EXPERTS, EXAMPLES, WORKERS = 4, 12, 2
PATIENCE_S = 400
SCHEDULE = {"peak": 1e-2, "warmup_share": 0.0, "tokens_per_batch": 200}
# The stage alone, as a driver of its own: what is before it is written by the test.
DRIVER = """
import sys, ray
from gradientspace_ray.recipe import load_recipe
from gradientspace_ray.run import RunDirectory
from gradientspace_ray.stages import train
ray.init(log_to_driver=False)
train.experts(load_recipe(sys.argv[1]), RunDirectory(sys.argv[2]))
"""
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def cluster():
    """A head that does no work, and three nodes: any two of them hold all workers."""
    machines = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(NODES):
        machines.add_node(num_cpus=CPUS)
    yield machines
    machines.shutdown()


@pytest.fixture(scope="module")
def recipe(tiny_model_dir, tmp_path_factory):
    """A file: four clusters of their own tokens, 120 steps for each expert, a checkpoint after every fourth."""
    path = tmp_path_factory.mktemp("training-chaos") / "recipe.yaml"
    finetune = {"epochs": 40, "learning_rate": 5e-4, "examples_per_step": 4, "tokens_per_batch": 64}
    finetune |= {"workers": WORKERS, "zero_stage": 2}
    tree = {
        "name": "chaos",
        "model": {"name": str(tiny_model_dir)},
        "data": {"sources": ["quickstart"]},
        "lora": {"rank": 4, "alpha": 16},
        "experts": {**finetune, "max_concurrent": EXPERTS, "checkpoint_every": 4},
        "single_lora": {"train": False},
        "compute": {"retries": 6},
    }
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def generalist(tiny_model_dir, tmp_path_factory):
    """Folder of an adapter with moments that are not zero, which the experts continue."""
    folder = tmp_path_factory.mktemp("generalist")
    model = add_lora(load_base(str(tiny_model_dir)), 4, 16, "all-linear", 0)
    engine = PlainEngine(model)
    list(train(engine, random_examples(8), [[0, 1, 2, 3], [4, 5, 6, 7]], **SCHEDULE))
    save_adapter(model, folder)
    save_moments(engine.moments(), folder)
    return folder


def prepared(folder, generalist):
    """A run directory that has everything before the experts."""
    run = RunDirectory(folder)
    shutil.copytree(generalist, folder / "generalist")
    examples = [
        example
        for cluster in range(EXPERTS)
        for example in random_examples(EXAMPLES, seed=cluster, low=10 + 50 * cluster, high=50 + 50 * cluster)
    ]
    columns = {
        "id": pa.array([f"{index:016x}" for index in range(len(examples))]),
        "input_ids": pa.array([ids for ids, _ in examples], pa.list_(pa.int32())),
        "labels": pa.array([labels for _, labels in examples], pa.list_(pa.int32())),
        "tokens": pa.array([len(ids) for ids, _ in examples], pa.int32()),
    }
    run.write_table("examples/train.parquet", pa.table(columns))
    clusters = pa.array([index // EXAMPLES for index in range(len(examples))], pa.int32())
    run.write_table("clusters/assignments.parquet", pa.table({"id": columns["id"], "cluster": clusters}))
    run.write_json("clusters/quality.json", {"names": [f"skill-{index}" for index in range(EXPERTS)]})
    return folder


def start(cluster, recipe, run_dir):
    log = open(f"{run_dir}.log", "ab")  # noqa: SIM115
    environment = {**os.environ, "RAY_ADDRESS": cluster.address}
    command = [sys.executable, "-c", DRIVER, str(recipe), str(run_dir)]
    return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


class Watch:
    """Looks at the checkpoints all the time: which steps each finetune saved, in their order."""

    def __init__(self, run_dir):
        self.folder = Path(run_dir) / "checkpoints"
        self.saved = {}
        self._seen = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self):
        while not self._stop.wait(0.005):
            for state in list(self.folder.glob("*/*/state.json")):
                with contextlib.suppress(FileNotFoundError):
                    mark = (state.parent.parent.name, state.stat().st_ino)
                    if mark not in self._seen:
                        self._seen.add(mark)
                        self.saved.setdefault(mark[0], []).append(int(state.parent.name))

    def wait_for(self, count):
        """Until so many checkpoints were saved, by all finetunes together."""
        deadline = time.monotonic() + PATIENCE_S
        while sum(map(len, self.saved.values())) < count:
            assert time.monotonic() < deadline, f"{self.saved} after {PATIENCE_S} s"
            time.sleep(0.005)

    def end(self):
        self._stop.set()
        self._thread.join()


@pytest.fixture(scope="module")
def undisturbed(cluster, recipe, generalist, tmp_path_factory):
    """Name with digest -> weights of each expert, of a run that nothing happened to."""
    run_dir = prepared(tmp_path_factory.mktemp("undisturbed"), generalist)
    assert start(cluster, recipe, run_dir).wait(PATIENCE_S) == 0
    return adapters(run_dir)


def adapters(run_dir):
    folders = sorted((Path(run_dir) / "experts").iterdir())
    return {folder.name: load_file(folder / "adapter_model.safetensors") for folder in folders}


def workers_of(node):
    """The processes on a node that train."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    return [p for p in raylet.children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]


def busy_node(cluster, rng):
    """One of the nodes on which something trains."""
    return rng.choice([node for node in cluster.worker_nodes if workers_of(node)])


def check(run_dir, watch, undisturbed):
    watch.end()
    for name, steps in watch.saved.items():
        assert steps == sorted(set(steps)), f"{name} began anew: {steps}"
    found = adapters(run_dir)
    # A name carries the digest of the weights: equal names are equal bits.
    assert list(found) == list(undisturbed)
    for name, weights in undisturbed.items():
        for key, weight in weights.items():
            assert float((found[name][key] - weight).abs().max()) <= 1e-6, f"{name}: {key}"
    assert not (run_dir / "checkpoints").exists()


@pytest.mark.parametrize("seed", [0])
def test_a_killed_worker_and_a_killed_node(cluster, recipe, generalist, undisturbed, tmp_path, seed):
    rng = random.Random(seed)
    run_dir = prepared(tmp_path / "run", generalist)
    watch, driver = Watch(run_dir), start(cluster, recipe, run_dir)
    moments = sorted(rng.sample(range(2, 60), 2))
    watch.wait_for(moments[0])
    rng.choice(workers_of(busy_node(cluster, rng))).send_signal(signal.SIGKILL)
    watch.wait_for(moments[1])
    assert driver.poll() is None
    cluster.remove_node(busy_node(cluster, rng), allow_graceful=False)
    try:
        assert driver.wait(PATIENCE_S) == 0
    finally:
        cluster.add_node(num_cpus=CPUS)
    check(run_dir, watch, undisturbed)


def test_on_a_preemption_notice_a_checkpoint_is_saved_and_no_failure_counted(
    cluster, recipe, generalist, undisturbed, tmp_path
):
    rng = random.Random(1)
    run_dir = prepared(tmp_path / "run", generalist)
    tree = yaml.safe_load(recipe.read_text())
    # No checkpoint but that of the notice, and no failure to spare.
    tree["experts"]["checkpoint_every"], tree["compute"]["retries"] = 1000, 0
    alone = tmp_path / "recipe.yaml"
    alone.write_text(yaml.safe_dump(tree))
    watch, driver = Watch(run_dir), start(cluster, alone, run_dir)
    deadline = time.monotonic() + PATIENCE_S
    while not any((run_dir / "tensorboard").glob("*/*")):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    node = busy_node(cluster, rng)
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, why = GcsClient(address=cluster.address).drain_node(
        node.node_id, reason, "taken away", int((time.time() + PATIENCE_S) * 1000)
    )
    assert accepted, why
    try:
        assert driver.wait(PATIENCE_S) == 0
    finally:
        cluster.remove_node(node, allow_graceful=False)
        cluster.add_node(num_cpus=CPUS)
    assert watch.saved
    check(run_dir, watch, undisturbed)
