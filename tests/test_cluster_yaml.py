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


def test_every_aws_node_reaches_the_run_directory():
    # Left alone, the launcher gives a profile to the head only.
    types = yaml.safe_load((ROOT / "cluster.yaml").read_text())["available_node_types"]
    profiles = [node["node_config"]["IamInstanceProfile"] for node in types.values()]
    assert len(profiles) == 2
    assert profiles[0] == profiles[1]


def test_kubernetes_and_aws_say_whether_ray_asks_for_tokens():
    for name in ("cluster.yaml", "jobs/kuberay-rayjob.yaml", "serve_configs/kuberay-rayservice.yaml"):
        assert "RAY_AUTH_MODE" in (ROOT / name).read_text(), name


def test_cluster_images_run_the_ray_that_the_constraints_pin():
    pinned = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("ray=="))
    version = pinned.removeprefix("ray==")
    docker = yaml.safe_load((ROOT / "cluster.yaml").read_text())["docker"]
    assert f":{version}-" in docker["head_image"]
    assert f":{version}-" in docker["worker_image"]
    job = yaml.safe_load((ROOT / "jobs" / "kuberay-rayjob.yaml").read_text())
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == version
