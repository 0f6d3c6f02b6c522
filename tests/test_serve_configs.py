import shutil
import socket
import typing
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import torch
import yaml
from pydantic import BaseModel, ValidationError
from ray.serve import Application
from ray.serve.schema import DeploymentStatus, DeploymentStatusOverview, DeploymentStatusTrigger, ServeDeploySchema
from this_machine import HAS_IPV6
from tiny_run import make_run

from gradientspace_ray.registry import REGISTRY, adapter_digest, read_registry
from gradientspace_ray.run import RunDirectory, RunError
from gradientspace_ray.serving import app
from gradientspace_ray.serving.app import build
from gradientspace_ray.serving.arguments import ServeArguments
from gradientspace_ray.serving.key_file import KeyFileError

FAMILIES = [
    (socket.AF_INET, "127.0.0.1"),
    pytest.param(socket.AF_INET6, "::1", marks=pytest.mark.skipif(not HAS_IPV6, reason="this machine has no IPv6")),
]
CONFIGS = sorted((Path(__file__).parents[1] / "serve_configs").glob("*.yaml"))


def read_config(path):
    """Serve's part of a file: all of it, or what a KubeRay service embeds."""
    document = yaml.safe_load(path.read_text())
    return yaml.safe_load(document["spec"]["serveConfigV2"]) if document.get("kind") == "RayService" else document


def models_in(annotation):
    """The pydantic models that a field's annotation names."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in models_in(part)]


def unknown_keys(value, model, place=""):
    """Keys that Serve would ignore without a word (ray 2.60 keeps unknown keys for later versions)."""
    if isinstance(value, list):
        return [key for index, item in enumerate(value) for key in unknown_keys(item, model, f"{place}[{index}]")]
    if not isinstance(value, dict):
        return []
    names = {alias: field for name, field in model.model_fields.items() for alias in (name, field.alias) if alias}
    unknown = [f"{place}.{key}" for key in value if key not in names]
    for key in set(value) & set(names):
        for inner in models_in(names[key].annotation):
            unknown += unknown_keys(value[key], inner, f"{place}.{key}")
    return unknown


def test_there_are_configs():
    assert {path.name for path in CONFIGS} >= {"local.yaml", "gpu.yaml", "autoscaling.yaml"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_config_is_valid_to_the_last_key(path):
    config = read_config(path)
    ServeDeploySchema.model_validate(config)
    assert unknown_keys(config, ServeDeploySchema) == []
    for application in config["applications"]:
        assert application["import_path"] == f"{app.__name__}:{build.__name__}"
        ServeArguments.model_validate(application["args"])


def test_the_key_check_finds_a_typo_at_every_level():
    config = read_config(next(path for path in CONFIGS if path.name == "local.yaml"))
    config["proxy_locaton"] = "HeadOnly"
    config["http_options"]["prot"] = 1
    config["applications"][0]["deployments"] = [{"name": "Experts", "max_ongoing_request": 3}]
    assert sorted(unknown_keys(config, ServeDeploySchema)) == [
        ".applications[0].deployments[0].max_ongoing_request",
        ".http_options.prot",
        ".proxy_locaton",
    ]


def test_every_node_of_the_kuberay_service_says_how_ray_authenticates():
    text = next(path for path in CONFIGS if path.name == "kuberay-rayservice.yaml").read_text()
    cluster = yaml.safe_load(text)["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        assert {"name": "RAY_AUTH_MODE", "value": "disabled"} in container["env"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_slot": 3}, "max_slot"),
        ({"max_slots": 0}, "greater than or equal to 1"),
        ({"min_replicas": 3, "max_replicas": 2}, "min_replicas 3 is more than max_replicas 2"),
        ({"device": "tpu"}, "device"),
        ({"vllm": {}, "gpus_per_replica": 2}, "gpus_per_replica 2 is not vLLM's; set vllm.tensor_parallel_size"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    with pytest.raises(ValidationError, match=message):
        ServeArguments(run_dir="runs/x", **change)


def test_nothing_to_serve_is_one_line_before_anything_starts(tmp_path):
    with pytest.raises(RunError, match="no such run directory; make one with"):
        build(ServeArguments(run_dir=str(tmp_path / "none")))
    with pytest.raises(RunError, match=f"{REGISTRY} is missing"):
        build(ServeArguments(run_dir=str(tmp_path)))


@pytest.fixture
def run_dir(tmp_path):
    adapter = {"name": "generalist", "digest": "1", "folder": "generalist"}
    registry = {"base_model": "x", "max_tokens": 1, "generalist": adapter, "experts": [], "router_digest": "1"}
    RunDirectory(tmp_path).write_json(REGISTRY, registry)
    (tmp_path / "generalist").mkdir()
    (tmp_path / "router").mkdir()
    return tmp_path


@pytest.fixture(scope="module")
def made_run(tmp_path_factory, tiny_model_dir, tiny_encoder_dir):
    return make_run(tmp_path_factory.mktemp("configs") / "run", tiny_model_dir, tiny_encoder_dir)


def test_an_api_key_that_is_asked_for_must_be_there(made_run, monkeypatch):
    monkeypatch.delenv("SOME_KEY", raising=False)
    arguments = ServeArguments(run_dir=made_run.uri, api_key_env="SOME_KEY", max_replicas=3)
    with pytest.raises(KeyFileError, match="environment variable SOME_KEY is not set"):
        build(arguments)
    monkeypatch.setenv("SOME_KEY", "secret")
    assert isinstance(build(arguments), Application)


def test_every_deployment_gets_the_registry_as_it_was_read_once(made_run, tmp_path):
    """With the folders of the copies, which are there even when those of the run are gone."""
    shutil.copytree(made_run.path(), tmp_path / "run")
    run = RunDirectory(tmp_path / "run")
    before = read_registry(run)
    ingress = build(ServeArguments(run_dir=run.uri))._bound_deployment
    registry, router, experts, *_ = ingress.init_args
    bound = (router._bound_deployment.init_args, experts._bound_deployment.init_args)
    assert bound == ((run.uri, registry), (registry, ServeArguments(run_dir=run.uri)))
    assert registry.model_ids() == before.model_ids()
    shutil.rmtree(run.path("experts"))
    copies = [(adapter, run.fetch(adapter.folder)) for adapter in registry.adapters]
    assert all(folder.is_relative_to(run.path("releases")) for _, folder in copies)
    assert [adapter_digest(folder) for _, folder in copies] == [adapter.digest for adapter in before.adapters]


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("::1", "http://[::1]:80"),
        ("::", "http://[::1]:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("localhost", "http://localhost:80"),
    ],
)
def test_the_url_is_where_this_machine_reaches_the_endpoint(host, url):
    assert app.base_url(host, 80) == url


@pytest.mark.parametrize(("family", "host"), FAMILIES)
def test_a_port_in_use_is_one_line_that_names_it(family, host):
    with socket.socket(family) as other:
        other.bind((host, 0))
        other.listen()
        port = other.getsockname()[1]
        refused = pytest.raises(OSError, match=f"^port {port} on {host} is in use; choose another with --port$")
        with refused, app.reserved_port(host, port):
            pass


@pytest.mark.parametrize(("family", "host"), FAMILIES)
def test_a_reserved_port_is_for_a_server_that_shares_it(family, host):
    with app.reserved_port(host, 0) as port, socket.socket(family) as other, socket.socket(family) as server:
        with pytest.raises(OSError, match="in use"):
            other.bind((host, port))
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        server.bind((host, port))
        server.listen()
        with socket.create_connection((host, port), timeout=5), server.accept()[0]:
            pass
    with app.reserved_port(host, port) as again:
        assert again == port


def test_an_address_of_another_machine_is_one_line_that_names_it():
    refused = pytest.raises(OSError, match=r"^port 8000 on 198.51.100.1: .*; choose another --host or --port$")
    with refused, app.reserved_port("198.51.100.1", 8000):
        pass


def test_a_gpu_is_only_missed_where_ray_would_run_here(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    app.check_device("cpu")
    with pytest.raises(RuntimeError, match="no CUDA GPU for the experts; serve with --device cpu"):
        app.check_device("cuda")
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    app.check_device("cuda")


def test_the_wait_for_an_endpoint_is_not_a_busy_loop(monkeypatch):
    asked = []
    monkeypatch.setattr(app, "ANSWER_TIMEOUT_S", 0.35)
    monkeypatch.setattr(app.httpx, "get", lambda url, timeout: asked.append(url) or httpx.Response(503))
    with pytest.raises(RuntimeError, match="http://here does not answer"):
        app._wait_for("http://here")
    assert 1 <= len(asked) <= 5


def test_what_a_deployment_says_ends_with_the_cause():
    message = "It failed. Error:\nTraceback\n  File x\ngradientspace_ray.models.loading.ModelError: m: not there\n"
    assert app.last_line(message) == "m: not there"
    assert app.last_line("Traceback\nKeyError: 'x'") == "KeyError: 'x'"


@pytest.mark.parametrize("status", [DeploymentStatus.DEPLOY_FAILED, DeploymentStatus.UNHEALTHY])
def test_only_a_deployment_that_failed_is_blamed(monkeypatch, status):
    def refuse(*_, **__):
        raise RuntimeError("Serve's own text")

    def overview(status, message):
        return DeploymentStatusOverview(status, DeploymentStatusTrigger.UNSPECIFIED, {}, message)

    deployments = {
        "PromptRouter": overview(DeploymentStatus.UPDATING, "1 replica takes more than 30s to initialize."),
        "Ingress": overview(DeploymentStatus.HEALTHY, "all is well"),
    }
    applications = {app.APPLICATION: SimpleNamespace(deployments=deployments)}
    monkeypatch.setattr(app.serve, "run", refuse)
    monkeypatch.setattr(app.serve, "status", lambda: SimpleNamespace(applications=applications))
    with pytest.raises(RuntimeError, match=r"^Serve's own text$"):
        app._run(None)
    deployments["Experts"] = overview(status, "Traceback\n  File x\nValueError: no weights")
    with pytest.raises(RuntimeError, match=r"^Experts does not start: ValueError: no weights$"):
        app._run(None)
    applications.clear()
    with pytest.raises(RuntimeError, match=r"^Serve's own text$"):
        app._run(None)


def test_a_registry_that_promises_too_much_is_refused(run_dir):
    (run_dir / "router").rmdir()
    with pytest.raises(RunError, match="router is missing"):
        build(ServeArguments(run_dir=str(run_dir)))
