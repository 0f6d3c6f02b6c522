import json
from pathlib import Path

import jsonschema
import ray.autoscaler
import yaml

ROOT = Path(__file__).parents[1]


def test_cluster_yaml_is_valid_for_the_ray_cluster_launcher():
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    jsonschema.validate(config, schema)
    assert config["head_node_type"] in config["available_node_types"]


def test_cluster_images_run_the_ray_that_the_constraints_pin():
    pinned = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("ray=="))
    version = pinned.removeprefix("ray==")
    docker = yaml.safe_load((ROOT / "cluster.yaml").read_text())["docker"]
    assert f":{version}-" in docker["head_image"]
    assert f":{version}-" in docker["worker_image"]
    job = yaml.safe_load((ROOT / "jobs" / "kuberay-rayjob.yaml").read_text())
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == version
