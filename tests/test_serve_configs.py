import typing
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel, ValidationError
from ray.serve import Application
from ray.serve.schema import ServeDeploySchema

from gradientspace_ray.registry import REGISTRY
from gradientspace_ray.run import RunDirectory, RunError
from gradientspace_ray.serving import app
from gradientspace_ray.serving.app import ServeArguments, build

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
    assert {path.name for path in CONFIGS} >= {"local.yaml", "gpu.yaml"}


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_slot": 3}, "max_slot"),
        ({"max_slots": 0}, "greater than or equal to 1"),
        ({"min_replicas": 3, "max_replicas": 2}, "min_replicas 3 is more than max_replicas 2"),
        ({"device": "tpu"}, "device"),
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


def test_an_api_key_that_is_asked_for_must_be_there(run_dir, monkeypatch):
    monkeypatch.delenv("SOME_KEY", raising=False)
    arguments = ServeArguments(run_dir=str(run_dir), api_key_env="SOME_KEY", max_replicas=3)
    with pytest.raises(ValueError, match="environment variable SOME_KEY is not set"):
        build(arguments)
    monkeypatch.setenv("SOME_KEY", "secret")
    assert isinstance(build(arguments), Application)


def test_a_registry_that_promises_too_much_is_refused(run_dir):
    (run_dir / "router").rmdir()
    with pytest.raises(RunError, match="router is missing"):
        build(ServeArguments(run_dir=str(run_dir)))
