"""vLLM as the engine of the experts, for GPU clusters: its arguments, and what they come to in Ray's configuration.

The deployment is Ray's `LLMServer` with this project's `generate` on it, in one process with vLLM's client, and not a
deployment before an `LLMServer`. Through a handle, LLMServer gives Server-Sent Events in lumps of 50 ms, error texts
with vLLM's internals in them, and adapters out of object stores alone. In its process the engine gives typed outputs
token by token, a closed iterator ends its request at once, and a prompt is rendered and an answer sent once.

This module loads neither torch nor vLLM; `ray.serve.llm` cannot be imported without vLLM, so that what does is in
`vllm_server`, which `vllm_experts` imports by name.
"""

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, get_args

from packaging.requirements import Requirement
from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray.serve import Application

from gradientspace_ray.registry import ADAPTER_FILES, Registry
from gradientspace_ray.run import RunDirectory

INSTALL = "pip install 'gradientspace-ray[vllm]'"
SERVER_MODULE = "gradientspace_ray.serving.vllm_server"
LoraRank = Literal[1, 8, 16, 32, 64, 128, 256, 320, 512]
"""What vLLM 0.29 takes as `max_lora_rank`."""
Positive = Annotated[int, Field(ge=1)]

_ONE_MACHINE = "a replica computes on one machine, where its adapters are; set tensor_parallel_size, or more replicas"
_OF_THE_RUN = "the run directory names the base model and its adapters"
FIXED = {
    "model": _OF_THE_RUN,
    "served_model_name": _OF_THE_RUN,
    "tokenizer": _OF_THE_RUN,
    "lora_modules": _OF_THE_RUN,
    "enable_lora": "adapters are what this endpoint serves",
    "skip_tokenizer_init": "answers are text",
    "logprobs_mode": "log-probabilities are those before temperature, penalties and biases",
    "distributed_executor_backend": _ONE_MACHINE,
    "pipeline_parallel_size": _ONE_MACHINE,
    "data_parallel_size": _ONE_MACHINE,
    "data_parallel_size_local": _ONE_MACHINE,
    "nnodes": _ONE_MACHINE,
}
"""Engine arguments that nobody may set, and why."""


class VllmUnavailableError(RuntimeError):
    """vLLM is not installed, or not in the version that Ray works with; the message says how to get it."""


class VllmArguments(BaseModel):
    """How vLLM runs the base model and its adapters."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    tensor_parallel_size: Positive = 1
    """GPUs that one replica's model is split over, all in one machine."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of each GPU's memory for weights, adapters, and keys and values."""
    max_model_len: Positive | None = None
    """Most tokens of a prompt and its answer together; null is as many as the model reads."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] | None = None
    """Type of weights and products. null: the run's compute type on a GPU, float32 on a CPU; auto: the model's own."""
    max_loras: Positive = 8
    """Adapters in GPU memory: as many as one forward pass can mix."""
    max_cpu_loras: Positive = 32
    """Adapters in host memory; one that comes back from there is not read again."""
    max_lora_rank: LoraRank | None = None
    """Largest LoRA rank that an adapter may have, now or in a later release; null fits the run's adapters."""
    enable_prefix_caching: bool = True
    """Keep keys and values of prompts for others that begin alike, with the same adapter."""
    accelerator_type: str | None = None
    """Only on machines with this accelerator, in Ray's spelling (`H100`, `A10G`)."""
    engine_kwargs: dict[str, Any] = {}
    """Further engine arguments by vLLM's own names."""

    @model_validator(mode="after")
    def _check(self) -> "VllmArguments":
        if self.max_cpu_loras < self.max_loras:
            raise ValueError(f"max_cpu_loras {self.max_cpu_loras} is less than max_loras {self.max_loras}")
        for name in self.engine_kwargs:
            if name in type(self).model_fields:
                raise ValueError(f"engine_kwargs.{name}: set vllm.{name} instead")
            if name in FIXED:
                raise ValueError(f"engine_kwargs.{name} cannot be set: {FIXED[name]}")
        return self


def check_installed() -> None:
    """Find out now whether vLLM can run, and is the version that the installed Ray was made for.

    Raises:
        VllmUnavailableError: no.
    """
    if importlib.util.find_spec("vllm") is None:
        raise VllmUnavailableError(f"vLLM is not installed; install it with: {INSTALL}")
    # vLLM's builds for other hardware have other names, and the same module.
    builds = importlib.metadata.packages_distributions().get("vllm", ["vllm"])
    version = importlib.metadata.version(builds[0])
    for line in importlib.metadata.requires("ray") or ():
        wanted = Requirement(line)
        if wanted.name == "vllm" and not wanted.specifier.contains(version, prereleases=True):
            ray = importlib.metadata.version("ray")
            raise VllmUnavailableError(
                f"vLLM {version} is installed, Ray {ray} works with vllm{wanted.specifier}; install it with: {INSTALL}"
            )


def base_id(base_model: str) -> str:
    """The base model's name for Ray and vLLM, where a colon would end it."""
    return base_model.replace("%", "%25").replace(":", "%3A")


def lora_name(base_model: str, adapter_id: str) -> str:
    """`<base>:<expert>@<digest>`: what vLLM knows an adapter by.

    vLLM keys its prefix cache by this name alone. The digest in it makes equal names equal weights, so that nothing
    stale is ever found there.
    """
    return f"{base_id(base_model)}:{adapter_id}"


def fitting_rank(ranks: Iterable[int], configured: int | None) -> int:
    """`max_lora_rank` for adapters of these ranks: `configured`, or the smallest that vLLM takes.

    Raises:
        ValueError: one of them does not fit.
    """
    largest = max(ranks)
    allowed = get_args(LoraRank)
    limit = configured if configured is not None else max(allowed)
    if largest > limit:
        mend = "raise vllm.max_lora_rank" if limit < max(allowed) else "train smaller ones"
        raise ValueError(f"the run has adapters of LoRA rank {largest}, vLLM is set to at most {limit}; {mend}")
    return configured if configured is not None else min(rank for rank in allowed if rank >= largest)


class _AdapterConfiguration(BaseModel):
    r: Positive


def adapter_ranks(run: RunDirectory, registry: Registry) -> list[int]:
    """LoRA ranks of the generalist and the experts, by their configurations in the run directory.

    Raises:
        RunError: a configuration is missing, or has no rank.
    """
    return [
        run.read_model(f"{adapter.folder}/{ADAPTER_FILES[0]}", _AdapterConfiguration).r
        for adapter in (registry.generalist, *registry.experts)
    ]


def engine_kwargs(arguments: VllmArguments, dtype: str, max_lora_rank: int) -> dict[str, Any]:
    """Engine arguments for vLLM.

    Args:
        arguments: the typed ones and those passed through.
        dtype: what `arguments.dtype` null means.
        max_lora_rank: what `arguments.max_lora_rank` null means.
    """
    settings: dict[str, Any] = {
        "enable_lora": True,
        "max_lora_rank": max_lora_rank,
        "dtype": arguments.dtype or dtype,
        **arguments.model_dump(include={"tensor_parallel_size", "gpu_memory_utilization", "max_model_len"}),
        **arguments.model_dump(include={"max_loras", "max_cpu_loras", "enable_prefix_caching"}),
    }
    given = {name: value for name, value in settings.items() if value is not None}
    return given | arguments.engine_kwargs


def vllm_experts(
    run: RunDirectory,
    registry: Registry,
    arguments: VllmArguments,
    *,
    device: Literal["cpu", "cuda"],
    cpus: float,
    max_tokens: int,
    options: Mapping[str, Any],
) -> Application:
    """The experts deployment on vLLM, with the face of `experts.Experts`.

    Args:
        run: where the registry's adapters are.
        registry: of the run.
        arguments: of vLLM.
        device: `cpu` needs a build of vLLM for it.
        cpus: of one replica.
        max_tokens: most tokens of one answer.
        options: Serve's options of the deployment (replicas, queues), without `ray_actor_options`.

    Raises:
        VllmUnavailableError: vLLM cannot run here.
        RunError: an adapter's configuration is missing.
        ValueError: an adapter does not fit `max_lora_rank`, or vLLM does not know an engine argument.
    """
    check_installed()
    rank = fitting_rank(adapter_ranks(run, registry), arguments.max_lora_rank)
    dtype = registry.compute_dtype if device == "cuda" else "float32"
    server = importlib.import_module(SERVER_MODULE)
    application: Application = server.deployment(
        registry.base_model,
        arguments,
        engine_kwargs(arguments, dtype, rank),
        device=device,
        cpus=cpus,
        max_tokens=max_tokens,
        options=options,
    )
    return application
