"""The Serve application: `build` for `serve run` and config files, `start` for the command line."""

import errno
import hashlib
import logging
import os
import socket
import time
from typing import Annotated, Any, Literal

import httpx
from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray import serve
from ray.serve import Application

from gradientspace_ray.connection import connect
from gradientspace_ray.registry import REGISTRY, read_registry
from gradientspace_ray.run import RunDirectory, RunError
from gradientspace_ray.serving.experts import Experts
from gradientspace_ray.serving.ingress import MAX_ONGOING_REQUESTS, Ingress
from gradientspace_ray.serving.router import MAX_ONGOING_PROMPTS, PromptRouter

API_KEY_ENV = "GRADIENTSPACE_API_KEY"
ANSWER_TIMEOUT_S = 30.0
# Small, so that an endpoint with one replica of everything fits two CPUs.
INGRESS_CPUS, ROUTER_CPUS = 0.1, 0.2
QUIET = {"log_level": "WARNING", "enable_access_log": False}
Positive = Annotated[int, Field(ge=1)]


class ServeArguments(BaseModel):
    """Arguments of the application, from a config file's `args` or from the command line."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    run_dir: str
    """The run to serve: a local folder, or an `s3://` or `gs://` URI."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the experts compute."""
    max_slots: Positive = 8
    """Adapters that one replica of the experts holds at once."""
    max_tokens: Positive = 2048
    """Most tokens of one answer; requests for more are refused."""
    min_replicas: Positive = 1
    """Replicas of the experts; more than this, up to `max_replicas`, come with load."""
    max_replicas: Positive = 1
    target_ongoing_requests: Annotated[float, Field(gt=0)] = 4
    """Requests per replica that autoscaling aims at."""
    max_ongoing_requests: Positive = 32
    """Answers that one replica generates at once."""
    max_queued_requests: Positive = 256
    """Requests that wait for a replica; more get status 429."""
    cpus_per_replica: Annotated[float, Field(ge=0)] = 1
    gpus_per_replica: Annotated[float, Field(ge=0)] = 0
    api_key_env: str | None = None
    """Environment variable with the key that clients must send; null takes GRADIENTSPACE_API_KEY if it is set."""

    @model_validator(mode="after")
    def _check(self) -> "ServeArguments":
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is more than max_replicas {self.max_replicas}")
        return self


def build(arguments: ServeArguments) -> Application:
    """The application: ingress -> router, experts.

    Raises:
        RunError: there is nothing to serve in the run directory.
        ValueError: the API key's variable is not set.
    """
    run = RunDirectory(arguments.run_dir)
    _check_run(run)
    scaling: dict[str, Any] = {"num_replicas": arguments.min_replicas}
    if arguments.max_replicas > arguments.min_replicas:
        scaling = {
            "num_replicas": "auto",
            "autoscaling_config": {
                "min_replicas": arguments.min_replicas,
                "max_replicas": arguments.max_replicas,
                "target_ongoing_requests": arguments.target_ongoing_requests,
            },
        }
    experts = serve.deployment(
        ray_actor_options={"num_cpus": arguments.cpus_per_replica, "num_gpus": arguments.gpus_per_replica},
        max_ongoing_requests=arguments.max_ongoing_requests,
        max_queued_requests=arguments.max_queued_requests,
        **scaling,
    )(Experts).bind(run.uri, arguments.device, arguments.max_slots, arguments.max_tokens)
    router = serve.deployment(ray_actor_options={"num_cpus": ROUTER_CPUS}, max_ongoing_requests=MAX_ONGOING_PROMPTS)(
        PromptRouter
    ).bind(run.uri)
    ingress = serve.deployment(ray_actor_options={"num_cpus": INGRESS_CPUS}, max_ongoing_requests=MAX_ONGOING_REQUESTS)(
        Ingress
    )
    return ingress.bind(run.uri, router, experts, _api_key_sha256(arguments.api_key_env))


def start(arguments: ServeArguments, host: str, port: int) -> str:
    """Serve from the Ray cluster that `connect` finds or starts, and return when the endpoint answers.

    Args:
        arguments: what to serve.
        host: address to listen on.
        port: 0 takes a free one.

    Returns:
        The endpoint's base URL, without `/v1`.

    Raises:
        OSError: the address is taken or not this machine's; nothing was started.
        RunError: there is nothing to serve in the run directory; nothing was started.
        RuntimeError: the endpoint does not come up.
    """
    port = _free_port(host, port)
    application = build(arguments)
    connect(arguments.device)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port}, logging_config=QUIET)
    serve.run(application, name="gradientspace", route_prefix="/", logging_config=QUIET)
    url = f"http://{host}:{port}"
    _wait_for(url.replace("//0.0.0.0:", "//127.0.0.1:"))
    return url


def _check_run(run: RunDirectory) -> None:
    if not run.exists():
        raise RunError(f"{run.uri}: no such run directory; make one with: gradientspace run quickstart")
    if not run.exists(REGISTRY):
        raise RunError(
            f"{run.uri}: {REGISTRY} is missing, the run has no router yet; finish it with: gradientspace run"
        )
    registry = read_registry(run)
    folders = [registry.router, registry.generalist.folder, *(expert.folder for expert in registry.experts)]
    missing = [folder for folder in folders if not run.exists(folder)]
    if missing:
        raise RunError(f"{run.uri}: {missing[0]} is missing; finish the run with: gradientspace run")


def _api_key_sha256(variable: str | None) -> str | None:
    """Digest of the key, so that the key itself is not kept in Serve's state."""
    key = os.environ.get(variable or API_KEY_ENV, "")
    if variable and not key:
        raise ValueError(f"api_key_env: the environment variable {variable} is not set")
    return hashlib.sha256(key.encode()).hexdigest() if key else None


def _free_port(host: str, port: int) -> int:
    """Fail now if the port is taken: Serve shares ports (SO_REUSEPORT) and would start beside the other program."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = "is in use; choose another with --port" if error.errno == errno.EADDRINUSE else error.strerror
            raise OSError(error.errno, f"port {port} on {host} {reason}") from error
        return int(probe.getsockname()[1])


def _wait_for(url: str) -> None:
    deadline = time.monotonic() + ANSWER_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/health", timeout=5).is_success:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise RuntimeError(
        f"{url} does not answer; if Serve already runs on this Ray cluster, stop it with: serve shutdown"
    )
