"""The arguments of the application: what a config file's `args` may say, and what the command line fills in."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gradientspace_ray.serving.vllm import VllmArguments

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0)]


class ArgumentError(ValueError):
    """Arguments that cannot be used; one line that names the key and the mend."""


class ServeArguments(BaseModel):
    """Arguments of the application."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    run_dir: str
    """The run to serve: a local folder, or an `s3://` or `gs://` URI."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the experts compute."""

    vllm: VllmArguments | None = None
    """Have vLLM generate, with these settings (`{}` for its defaults); null is the engine of this package. Slots, rows
    and cache below are the latter's."""
    max_slots: Positive = 8
    """Adapters that one replica of the experts holds at once, ready to compute."""
    max_rows: Positive = 16
    """Answers that one replica generates in one forward pass; further ones take turns by expert."""
    prefill_tokens: Positive = 256
    """Tokens of a prompt that are read between two steps of the answers under way."""
    cache_tokens: Positive | None = None
    """Most tokens of keys and values in memory, over all rows; null is what the engine takes by itself."""
    prefix_cache_tokens: Count = 16_384
    """Tokens of prompts and answers whose keys and values are kept for prompts that begin alike; 0 keeps none."""

    max_tokens: Positive = 2048
    """Most tokens of one answer; requests for more are refused."""
    max_choices: Positive = 8
    """Most answers to one request (`n` times its prompts)."""
    max_body_bytes: Positive = 2**20
    """Longest body of a request."""
    start_timeout_s: Annotated[float, Field(gt=0)] = 120
    """A request that has no first token by then gets status 503. A replica that must start first needs part of it."""

    min_replicas: Count = 1
    """Replicas of the experts; more, up to `max_replicas`, come with load. 0: none while nobody asks."""
    max_replicas: Positive = 1
    target_ongoing_requests: Annotated[float, Field(gt=0)] = 12
    """Requests per replica of the experts that autoscaling aims at."""
    upscale_delay_s: Amount = 10
    downscale_delay_s: Amount = 300
    max_ongoing_requests: Positive = 256
    """Requests that one replica of the experts has at once, under way or in a queue where experts take turns; further
    ones wait first come, first served."""
    max_queued_requests: Positive = 256
    """Requests that wait for a replica, at each replica of the ingress; more get status 429."""
    max_requests: Positive = 1000
    """Requests inside one replica of the ingress, answers under way included; more get status 429."""
    router_replicas: Positive = 1
    ingress_replicas: Positive = 1
    cpus_per_replica: Amount = 1
    """Of the experts, and, rounded up, the threads of the model's products. `gradientspace serve` takes what the
    machine has, if there is one replica and no Ray cluster to join."""
    gpus_per_replica: Amount = 0
    """Of this package's engine; vLLM takes `vllm.tensor_parallel_size`."""
    max_surge_percent: Annotated[int, Field(ge=0, le=100)] = 0
    """Replicas of the experts that start before old ones stop, when the application is deployed again: no request is
    lost above 0, where the Ray cluster has room for them."""
    shutdown_timeout_s: Amount = 120
    """How long a replica that is taken away may finish its answers."""
    start_attempts: Positive = 3
    """Failures in a row to start the first replica of a deployment before the endpoint gives up."""

    api_key_env: str | None = None
    """Environment variable with the keys of clients, separated by commas; null takes GRADIENTSPACE_API_KEY if set."""
    admin_key_env: str | None = None
    """Environment variable with the keys of the admin routes; null takes GRADIENTSPACE_ADMIN_KEY if set."""
    keys_file: str | None = None
    """YAML file with keys and their limits, beside or instead of the environment's."""
    allow_anonymous: bool = False
    """Serve other machines without a key. False: without keys, the endpoint answers its own machine alone."""
    log_prompts: bool = False
    """Write prompts and answers into the request log."""

    @model_validator(mode="after")
    def _check(self) -> "ServeArguments":
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is more than max_replicas {self.max_replicas}")
        if self.max_rows > self.max_ongoing_requests:
            fewer = f"max_rows {self.max_rows} is more than max_ongoing_requests {self.max_ongoing_requests}"
            raise ValueError(f"{fewer}, so that rows would stay empty")
        if self.vllm is not None and self.gpus_per_replica:
            raise ValueError(
                f"gpus_per_replica {self.gpus_per_replica:g} is not vLLM's; set vllm.tensor_parallel_size instead"
            )
        return self


def read_arguments(settings: Mapping[str, Any], assignments: Iterable[str] = ()) -> ServeArguments:
    """Arguments of the command line.

    Args:
        settings: by key.
        assignments: further ones, such as `max_slots=16`; values are YAML.

    Raises:
        ArgumentError: a key or a value cannot be used.
    """
    tree = dict(settings)
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise ArgumentError(f"--set {assignment}: write it as key=value")
        try:
            tree[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ArgumentError(f"--set {assignment}: the value is not valid YAML") from error
    try:
        return ServeArguments.model_validate(tree)
    except ValidationError as error:
        problems = [_explain(".".join(map(str, found["loc"])), found["type"], found["msg"]) for found in error.errors()]
        raise ArgumentError("; ".join(problems)) from error


def _explain(key: str, kind: str, message: str) -> str:
    if kind != "extra_forbidden":
        return f"{key}: {message[:1].lower()}{message[1:]}" if key else message.removeprefix("Value error, ")
    near = difflib.get_close_matches(key, ServeArguments.model_fields, n=1, cutoff=0.5)
    return f"{key}: there is no such argument" + (f"; did you mean {near[0]}?" if near else "")
