"""Fixtures shared by the suite. The environment is set before anything imports Ray, DeepSpeed or transformers."""

import os

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import torch
from hypothesis import settings
from moto.server import ThreadedMotoServer
from tiny_models import save_tiny_encoder, save_tiny_model

torch.set_num_threads(1)

# The same examples every time, so that a change passes or fails by itself; HYPOTHESIS_PROFILE=search looks for others.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("search", max_examples=2000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random two-layer Llama with a byte-level tokenizer and a chat template."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def tiny_encoder_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random two-layer BERT encoder with its tokenizer."""
    return save_tiny_encoder(tmp_path_factory.mktemp("tiny-encoder"))


@pytest.fixture(scope="session")
def object_store() -> Iterator[Callable[[], str]]:
    """Gives a new URI at every call, on a server in this process that speaks the S3 API."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    httpx.put(f"{url}/runs").raise_for_status()
    with pytest.MonkeyPatch.context() as patch:
        # In the environment, so that processes that the tests start have them too.
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield lambda: f"s3://runs/{uuid.uuid4().hex}/?endpoint_override={url}&region=us-east-1"
    server.stop()


@pytest.fixture(scope="session")
def ray_cluster(object_store: Callable[[], str]) -> Iterator[None]:
    """One local Ray for the whole session: four logical CPUs, so that small actors fit beside each other.

    The object store comes first: its credentials are in the environment that Ray's workers start with.
    """
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=200_000_000,
        log_to_driver=False,
    )
    yield
    ray.shutdown()
