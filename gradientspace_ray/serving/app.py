"""The Serve application: `build` for `serve run` and config files, `endpoint` for the command line."""

import contextlib
import errno
import logging
import os
import re
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import torch
from ray import serve
from ray.serve import Application
from ray.serve.schema import DeploymentStatus

from gradientspace_ray.publishing import keep
from gradientspace_ray.registry import REGISTRY, Registry, name_problems, read_registry
from gradientspace_ray.releases import own_release
from gradientspace_ray.run import RunDirectory, RunError
from gradientspace_ray.serving.arguments import ServeArguments
from gradientspace_ray.serving.experts import Experts
from gradientspace_ray.serving.exposure import refuse_exposure
from gradientspace_ray.serving.ingress import Ingress
from gradientspace_ray.serving.key_file import read_keys
from gradientspace_ray.serving.router import MAX_ONGOING_PROMPTS, PromptRouter
from gradientspace_ray.serving.vllm import vllm_experts

APPLICATION = "gradientspace"
ANSWER_TIMEOUT_S = 30.0
# Small, so that an endpoint with one replica of everything fits two CPUs.
INGRESS_CPUS, ROUTER_CPUS = 0.1, 0.2
# Where this machine reaches what listens on all of its addresses.
REACHED_AT = {"0.0.0.0": "127.0.0.1", "::": "::1"}
# Serve has a message for a deployment that only takes long, too.
FAILED = (DeploymentStatus.DEPLOY_FAILED, DeploymentStatus.UNHEALTHY)
logger = logging.getLogger(__name__)
QUIET = {"log_level": "WARNING", "enable_access_log": False}


def build(arguments: ServeArguments) -> Application:
    """The application: ingress -> router, experts.

    All of its replicas share the registry as it is now, and serve copies of its files: the run may be run again.

    Raises:
        RunError: there is nothing to serve in the run directory.
        ReleaseError: a file of the run is not what its registry says.
        KeyFileError: the API keys cannot be used.
        VllmUnavailableError: vLLM is asked for, and cannot run here.
    """
    arguments = arguments.model_copy(update={"run_dir": RunDirectory(arguments.run_dir).uri})
    keys = read_keys(arguments.keys_file, arguments.api_key_env, arguments.admin_key_env)
    registry = _read_run(arguments.run_dir)
    experts = _experts(arguments, registry)
    router = serve.deployment(
        num_replicas=arguments.router_replicas,
        ray_actor_options={"num_cpus": ROUTER_CPUS},
        max_surge_percent=100,
        max_ongoing_requests=MAX_ONGOING_PROMPTS,
        max_queued_requests=arguments.max_queued_requests,
        **_starting_and_ending(arguments),
    )(PromptRouter).bind(arguments.run_dir, registry)
    ingress = serve.deployment(
        num_replicas=arguments.ingress_replicas,
        ray_actor_options={"num_cpus": INGRESS_CPUS},
        max_surge_percent=100,
        # Refused in OpenAI's shape by the ingress itself, before Serve would.
        max_ongoing_requests=2 * arguments.max_requests,
        **_starting_and_ending(arguments),
    )(Ingress)
    return ingress.bind(registry, router, experts, keys, arguments)


def _experts(arguments: ServeArguments, registry: Registry) -> Application:
    options = {
        **_replicas(arguments),
        "max_ongoing_requests": arguments.max_ongoing_requests,
        "max_queued_requests": arguments.max_queued_requests,
        "max_surge_percent": arguments.max_surge_percent,
    }
    if arguments.vllm is not None:
        return vllm_experts(
            RunDirectory(arguments.run_dir),
            registry,
            arguments.vllm,
            device=arguments.device,
            cpus=arguments.cpus_per_replica,
            max_tokens=arguments.max_tokens,
            options=options | _starting_and_ending(arguments),
        )
    resources = {"num_cpus": arguments.cpus_per_replica, "num_gpus": arguments.gpus_per_replica}
    deployment = serve.deployment(ray_actor_options=resources, **options, **_starting_and_ending(arguments))(Experts)
    return deployment.bind(registry, arguments)


def _starting_and_ending(arguments: ServeArguments) -> dict[str, Any]:
    return {
        "max_constructor_retry_count": arguments.start_attempts,
        "graceful_shutdown_timeout_s": arguments.shutdown_timeout_s,
    }


def _replicas(arguments: ServeArguments) -> dict[str, Any]:
    """How many replicas of the experts there are."""
    if arguments.max_replicas == arguments.min_replicas:
        return {"num_replicas": arguments.min_replicas}
    return {
        "num_replicas": "auto",
        "autoscaling_config": {
            "min_replicas": arguments.min_replicas,
            "max_replicas": arguments.max_replicas,
            "target_ongoing_requests": arguments.target_ongoing_requests,
            "upscale_delay_s": arguments.upscale_delay_s,
            "downscale_delay_s": arguments.downscale_delay_s,
        },
    }


def check_keys(arguments: ServeArguments, host: str) -> None:
    """Find out now that an endpoint at this address would not start for want of keys.

    Raises:
        KeyFileError: the API keys cannot be used.
        ExposedError: strangers could use the endpoint.
    """
    keys = read_keys(arguments.keys_file, arguments.api_key_env, arguments.admin_key_env)
    refuse_exposure(host, keys, arguments.allow_anonymous)


def check_device(device: str) -> None:
    """Find out now what would otherwise wait for ever: no replica starts on a local Ray that lacks its GPU.

    Raises:
        RuntimeError: the experts need a GPU, and Ray will run on this machine, which has none.
    """
    if device == "cuda" and not os.environ.get("RAY_ADDRESS") and not torch.cuda.is_available():
        raise RuntimeError(
            "this machine has no CUDA GPU for the experts; serve with --device cpu, or set RAY_ADDRESS to a Ray cluster"
        )


def own_share(arguments: ServeArguments, cpus: int) -> ServeArguments:
    """What a replica of the experts takes of a machine where the arguments leave that open.

    On a GPU that is one. On the CPUs of a machine of its own, a single replica takes what the router and the ingress
    leave, and no more than PyTorch has threads; on a Ray cluster that others share it stays what `ServeArguments` says.

    Args:
        arguments: as they were given.
        cpus: of a local Ray.
    """
    if arguments.vllm is not None:
        return arguments
    given = arguments.model_fields_set
    if arguments.device == "cuda":
        return arguments if "gpus_per_replica" in given else arguments.model_copy(update={"gpus_per_replica": 1})
    if os.environ.get("RAY_ADDRESS") or "cpus_per_replica" in given or arguments.max_replicas > 1:
        return arguments
    others = INGRESS_CPUS * arguments.ingress_replicas + ROUTER_CPUS * arguments.router_replicas
    left = min(float(torch.get_num_threads()), cpus - others)
    return arguments.model_copy(update={"cpus_per_replica": max(1.0, round(left, 3))})


@contextlib.contextmanager
def endpoint(application: Application, host: str, port: int) -> Iterator[str]:
    """Serve on the Ray cluster that this process is connected to, for the length of the block.

    Afterwards the application is gone from a Ray cluster that lives on, and Serve with it if this call started it.

    Args:
        application: what `build` returns.
        host: address to listen on.
        port: what `reserved_port` yields.

    Yields:
        The endpoint's base URL, without `/v1`, as this machine reaches it. It answers.

    Raises:
        RuntimeError: an endpoint of this application runs on the Ray cluster already, or a deployment does not start
            (with its own error), or nothing answers at the address.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    before = serve.status()
    if APPLICATION in before.applications:
        raise RuntimeError(f"this Ray cluster already runs an endpoint ({APPLICATION}); stop it with: serve shutdown")
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port}, logging_config=QUIET)
        _run(application)
        url = base_url(host, port)
        _wait_for(url)
        yield url
    finally:
        _stop(serve_ran_before=bool(before.proxies))


def _run(application: Application) -> None:
    try:
        serve.run(application, name=APPLICATION, route_prefix="/", logging_config=QUIET)
    except RuntimeError as error:
        # Serve's own text only names the deployment; why it does not start is in its status.
        application_status = serve.status().applications.get(APPLICATION)
        deployments = application_status.deployments if application_status else {}
        causes = [
            f"{name} does not start: {last_line(deployment.message)}"
            for name, deployment in deployments.items()
            if deployment.status in FAILED and deployment.message
        ]
        raise RuntimeError(causes[0] if causes else str(error)) from error


def _stop(serve_ran_before: bool) -> None:
    others = serve.status().applications.keys() - {APPLICATION}
    if serve_ran_before or others:
        serve.delete(APPLICATION)
    elif os.environ.get("RAY_ADDRESS"):
        serve.shutdown()
    # A local Ray ends with this process and takes Serve along at once.


def last_line(message: str) -> str:
    """The last line of a deployment's message, which is where its traceback says what went wrong.

    The names of this package's own errors are left out: their messages stand by themselves.
    """
    line = [line.strip() for line in message.splitlines() if line.strip()][-1]
    return re.sub(r"^gradientspace_ray\.[\w.]+: ", "", line)


def base_url(host: str, port: int) -> str:
    """Where this machine reaches an endpoint that listens on `host`."""
    host = REACHED_AT.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _read_run(uri: str) -> Registry:
    run = RunDirectory(uri)
    if not run.exists():
        raise RunError(f"{run.uri}: no such run directory; make one with: gradientspace run quickstart")
    if not run.exists(REGISTRY):
        raise RunError(f"{run.uri}: {REGISTRY} is missing, the run has no router yet; {_finish(run)}")
    registry = read_registry(run)
    folders = [registry.router, *(adapter.folder for adapter in registry.adapters)]
    missing = [folder for folder in folders if not run.exists(folder)]
    if missing:
        raise RunError(f"{run.uri}: {missing[0]} is missing; {_finish(run)}")
    if problems := name_problems(registry):
        raise RunError(f"{run.uri}: {problems[0]}; {_finish(run)}")
    try:
        return keep(run, run, own_release(run, registry)).registry
    except OSError as error:
        logger.warning("%s cannot be written (%s): serving what is in its place", run.uri, error)
        return registry


def _finish(run: RunDirectory) -> str:
    return f"finish the run with: gradientspace run {run.path('recipe.yaml')} --run-dir {run.uri}"


@contextlib.contextmanager
def reserved_port(host: str, port: int) -> Iterator[int]:
    """The port to listen on, kept for the length of the block: Ray opens many ports when it starts, perhaps this one.

    Serve gets past the reservation because its sockets share ports (SO_REUSEPORT); for the same reason it would start
    beside another server, so a port that is taken is refused here.

    Args:
        host: address to listen on.
        port: 0 takes a free one.

    Raises:
        OSError: the port is taken, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe, socket.socket(family) as held:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            if port:
                probe.bind((host, port))
                probe.close()
            held.bind((host, port))
        except OSError as error:
            place = f"port {port} on {host}"
            if error.errno == errno.EADDRINUSE:
                raise OSError(f"{place} is in use; choose another with --port") from error
            raise OSError(f"{place}: {error.strerror}; choose another --host or --port") from error
        yield int(held.getsockname()[1])


def _wait_for(url: str) -> None:
    deadline = time.monotonic() + ANSWER_TIMEOUT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health", timeout=5).is_success:
                return
        time.sleep(0.1)
    raise RuntimeError(
        f"{url} does not answer; if Serve already runs on this Ray cluster, stop it with: serve shutdown"
    )
