"""What deployments refuse by themselves, without Serve: experts that cannot start, bodies that do not come."""

import asyncio
import shutil

import pytest
import torch
from fastapi import Request
from tiny_run import EXPERTS, make_run

from gradientspace_ray.models.loading import ModelError
from gradientspace_ray.registry import read_registry
from gradientspace_ray.serving.api_errors import ApiError
from gradientspace_ray.serving.arguments import ServeArguments
from gradientspace_ray.serving.experts import Experts, _compute_dtype
from gradientspace_ray.serving.ingress import _read_body
from gradientspace_ray.serving.messages import RunChangedError

AGAIN = "; release the run again: gradientspace release RUN_DIR$"


@pytest.fixture(scope="module")
def made_run(tmp_path_factory, tiny_model_dir, tiny_encoder_dir):
    return make_run(tmp_path_factory.mktemp("deployments") / "run", tiny_model_dir, tiny_encoder_dir)


@pytest.fixture
def run(made_run, tmp_path):
    """A copy to change."""
    shutil.copytree(made_run.path(), tmp_path / "run")
    return type(made_run)(tmp_path / "run")


def start_experts(run, registry):
    return Experts(registry, ServeArguments(run_dir=run.uri, max_slots=2, max_tokens=8))


def test_a_base_model_that_is_not_there_is_named(run):
    registry = read_registry(run).model_copy(update={"base_model": "no/such-model"})
    with pytest.raises(ModelError, match=r"^no/such-model: the model cannot be loaded"):
        start_experts(run, registry)


@pytest.mark.parametrize("change", ["gone", "replaced"])
def test_a_run_with_another_generalist_is_refused(run, change):
    registry = read_registry(run)
    start_experts(run, registry)
    shutil.rmtree(run.path("generalist"))
    if change == "replaced":
        shutil.copytree(run.path(registry.resolve(EXPERTS[0]).folder), run.path("generalist"))
    with pytest.raises(RunChangedError, match=f"generalist no longer holds {registry.generalist.id}{AGAIN}"):
        start_experts(run, registry)


@pytest.mark.parametrize(
    ("device", "named", "expected"),
    [
        ("cpu", "bfloat16", torch.float32),
        ("cuda", "bfloat16", torch.bfloat16),
        ("cuda", "float32", torch.float32),
    ],
)
def test_products_are_bfloat16_only_on_a_gpu(run, device, named, expected):
    registry = read_registry(run).model_copy(update={"compute_dtype": named})
    assert _compute_dtype(registry, device) is expected


def test_a_body_that_does_not_come_ends_the_request():
    """Its place is one that others could have."""

    async def read(parts):
        async def receive():
            return parts.pop(0) if parts else await asyncio.Event().wait()

        request = Request({"type": "http", "headers": [(b"content-type", b"application/json")]}, receive)
        return await _read_body(request, 10, timeout_s=0.05)

    begun, ended = ({"type": "http.request", "body": b"{}", "more_body": more} for more in (True, False))
    assert asyncio.run(read([begun, ended])) == b"{}{}"
    with pytest.raises(ApiError, match=r"did not come within 0.05 s") as caught:
        asyncio.run(read([begun]))
    assert (caught.value.status, caught.value.code) == (408, "request_timeout")
