"""The registry: what serving may load, and under which names.

An adapter's identity is the digest of its files; `name@digest` never changes meaning, and `name` is an alias of the one
digest that the registry lists.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from gradientspace_ray.run import RunDirectory, RunError

REGISTRY = "registry.json"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
BASE, GENERALIST, AUTO = "base", "generalist", "auto"


class UnknownModelError(KeyError):
    """A model id that names nothing in the registry."""


class Adapter(BaseModel):
    """One adapter that serving may load."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    digest: str
    folder: str
    """PEFT folder, relative to the run directory."""
    title: str = ""
    examples: int = 0
    """Training examples."""

    @property
    def id(self) -> str:
        """`name@digest`, the id that never changes meaning."""
        return f"{self.name}@{self.digest}"


class Registry(BaseModel):
    """Everything that serving reads before it loads anything."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: int = 1
    base_model: str
    dtype: str = "float32"
    compute_dtype: str = "float32"
    max_tokens: int
    """Longest conversation that the run trained on, in tokens."""
    generalist: Adapter
    experts: tuple[Adapter, ...]
    """In the order of the router's labels."""
    router: str = "router"
    """Folder of the router, relative to the run directory."""
    router_digest: str

    def resolve(self, model_id: str) -> Adapter | None:
        """The adapter behind a model id (`<name>` or `<name>@<digest>`); None for `base`.

        Raises:
            UnknownModelError: nothing is called so.
        """
        if model_id == BASE:
            return None
        for adapter in (self.generalist, *self.experts):
            if model_id in (adapter.name, adapter.id):
                return adapter
        raise UnknownModelError(model_id)

    def model_ids(self) -> list[str]:
        """Every id that a client may ask for, `auto` first."""
        return [AUTO, BASE, self.generalist.name, *(expert.name for expert in self.experts)]


def adapter_digest(folder: Path) -> str:
    """Twelve hex digits of the SHA-256 of a PEFT folder's weights and configuration."""
    return _digest(lambda name: (folder / name).read_bytes())


def committed_digest(run: RunDirectory, folder: str) -> str:
    """`adapter_digest` of a folder as it is in the run directory now, whatever this process fetched before.

    Raises:
        RunError: a file of the adapter is missing.
    """
    return _digest(lambda name: run.read_bytes(f"{folder}/{name}"))


def _digest(read: Callable[[str], bytes]) -> str:
    content = hashlib.sha256()
    for name in ADAPTER_FILES:
        content.update(name.encode())
        content.update(read(name))
    return content.hexdigest()[:12]


class TrainedExpert(BaseModel):
    """What a committed expert says about itself, out of its `training.json`."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    name: str
    cluster: int
    examples: int
    folder: str = ""
    """PEFT folder, relative to the run directory."""


def trained_experts(run: RunDirectory) -> list[TrainedExpert]:
    """The run's experts in the order of their clusters, which is the order of the router's labels.

    Raises:
        RunError: there is none, one has no usable `training.json`, or the clusters are not 0 .. K - 1, each with one
            expert.
    """
    folders = [f"experts/{name}" for name in run.names("experts")]
    experts = [
        run.read_model(f"{folder}/training.json", TrainedExpert).model_copy(update={"folder": folder})
        for folder in folders
    ]
    experts.sort(key=lambda expert: expert.cluster)
    if not experts or [expert.cluster for expert in experts] != list(range(len(experts))):
        found = ", ".join(f"{expert.folder} (cluster {expert.cluster})" for expert in experts) or "none"
        raise RunError(f"{run.uri}: expected one expert for each cluster, found {found}; run the experts stage again")
    return experts


def write_registry(run: RunDirectory, registry: Registry) -> None:
    """Commit the registry to the run directory."""
    run.write_json(REGISTRY, registry.model_dump(mode="json"))


def read_registry(run: RunDirectory) -> Registry:
    """The run's registry.

    Raises:
        RunError: the run has none yet, or one that is damaged or of another version.
    """
    return run.read_model(REGISTRY, Registry)
