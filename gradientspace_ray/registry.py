"""The registry: what serving may load, and under which names.

An adapter's identity is the digest of its files; `name@digest` never changes meaning, and `name` is an alias of the one
digest that the registry lists. What a registry lists can be checked here without loading any of it.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open

from gradientspace_ray.run import RunDirectory, RunError

REGISTRY = "registry.json"
CONFIG_FILE, WEIGHTS_FILE = ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
HEAD_FILE, SETTINGS_FILE = ROUTER_FILES = ("head.safetensors", "router.json")
HEAD_TENSORS = ("weight", "bias")
"""What has a row for each expert in the head's file; there may be more, such as a sample of training prompts."""
BASE, GENERALIST, AUTO = "base", "generalist", "auto"
MAX_LORA_RANK = 1024
PICKLED = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib"})
"""Suffixes of weights whose loading can run code."""
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
"""Types of adapter weights, as safetensors calls them."""
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
NAME = re.compile(r"[A-Za-z0-9._-]+")
ModelT = TypeVar("ModelT", bound=BaseModel)


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

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """The generalist and the experts."""
        return (self.generalist, *self.experts)

    def resolve(self, model_id: str) -> Adapter | None:
        """The adapter behind a model id (`<name>` or `<name>@<digest>`); None for `base`.

        Raises:
            UnknownModelError: nothing is called so.
        """
        if model_id == BASE:
            return None
        for adapter in self.adapters:
            if model_id in (adapter.name, adapter.id):
                return adapter
        raise UnknownModelError(model_id)

    def model_ids(self) -> list[str]:
        """Every id that a client may ask for, `auto` first."""
        return [AUTO, BASE, self.generalist.name, *(expert.name for expert in self.experts)]


def adapter_digest(folder: Path) -> str:
    """Twelve hex digits of the SHA-256 of a PEFT folder's weights and configuration."""
    return _digest(ADAPTER_FILES, lambda name: (folder / name).read_bytes())


def router_digest(folder: Path) -> str:
    """Twelve hex digits of the SHA-256 of a router's files.

    Raises:
        OSError: a file is missing.
    """
    return router_files_digest({name: (folder / name).read_bytes() for name in ROUTER_FILES})


def router_files_digest(files: Mapping[str, bytes]) -> str:
    """`router_digest` of files that are read already: the name of each of `ROUTER_FILES` -> what it holds."""
    return _digest(ROUTER_FILES, files.__getitem__)


def committed_digest(run: RunDirectory, folder: str) -> str:
    """`adapter_digest` of a folder as it is in the run directory now, whatever this process fetched before.

    Raises:
        RunError: a file of the adapter is missing.
    """
    return _digest(ADAPTER_FILES, lambda name: run.read_bytes(f"{folder}/{name}"))


def _digest(names: tuple[str, ...], read: Callable[[str], bytes]) -> str:
    content = hashlib.sha256()
    for name in names:
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


class LayerShape(NamedTuple):
    """What an adapter adds to one linear layer: B A, A [lora_rank, in_features] and B [out_features, lora_rank]."""

    lora_rank: int
    in_features: int
    out_features: int


class _LoraConfig(BaseModel):
    """What is checked of PEFT's `adapter_config.json`."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    peft_type: Literal["LORA"]
    r: Annotated[int, Field(ge=1, le=MAX_LORA_RANK)]
    target_modules: Annotated[str | list[str], Field(min_length=1)]
    rank_pattern: dict[str, int] | None = None


class _RouterLabels(BaseModel):
    """What is checked of `router.json`."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    labels: tuple[str, ...]


def name_problems(registry: Registry) -> list[str]:
    """Names and folders in a registry that serving could not tell apart, or should not read; one line each."""
    problems = []
    taken = {AUTO, BASE}
    if registry.generalist.name != GENERALIST:
        problems.append(f"the generalist is called {registry.generalist.name!r}; call it {GENERALIST}")
    if not registry.experts:
        problems.append("there is no expert; finish the run")
    for adapter in registry.adapters:
        if adapter.name in taken or not NAME.fullmatch(adapter.name):
            problems.append(f"{adapter.name!r} is no name for an adapter: taken already, or not made of {NAME.pattern}")
        taken.add(adapter.name)
    for folder in (registry.router, *(adapter.folder for adapter in registry.adapters)):
        path = PurePosixPath(folder)
        if not path.parts or path.is_absolute() or ".." in path.parts:
            problems.append(f"{folder!r} is no folder inside the run directory")
    return problems


def file_problems(registry: Registry, root: Path) -> list[str]:
    """What keeps files from being served as the registry says: wrong content, or nothing that serving can load.

    Of weights only the header is read, and all bytes for the digest; no tensor is made.

    Args:
        registry: says what should be there; `name_problems` finds none.
        root: what the registry's folders are relative to.

    Returns:
        One line for each problem, which begins with the folder.
    """
    problems = []
    for adapter in registry.adapters:
        problems += _told(adapter.folder, _adapter_problems, adapter, root / adapter.folder)
    return problems + _told(registry.router, _router_problems, registry, root / registry.router)


def _told(place: str, look: Callable[[ModelT, Path], Iterator[str]], what: ModelT, folder: Path) -> list[str]:
    problems: list[str] = []
    try:
        problems.extend(look(what, folder))
    except FileNotFoundError as error:
        problems.append(f"{Path(error.filename).name} is missing")
    except (OSError, ValueError) as error:
        problems.append(str(error))
    return [f"{place}: {problem}" for problem in problems]


def _adapter_problems(adapter: Adapter, folder: Path) -> Iterator[str]:
    digest = adapter_digest(folder)
    if digest != adapter.digest:
        yield f"holds other content ({digest}) than {adapter.id}"
    adapter_layers(folder)


def _router_problems(registry: Registry, folder: Path) -> Iterator[str]:
    digest = router_digest(folder)
    if digest != registry.router_digest:
        yield f"holds another router ({digest}) than the registry names ({registry.router_digest})"
    labels = _read(folder / SETTINGS_FILE, _RouterLabels).labels
    experts = tuple(expert.name for expert in registry.experts)
    if labels != experts:
        yield f"names {', '.join(labels)} for the experts {', '.join(experts)}"
    head = _header(folder / HEAD_FILE)
    if any(head.get(name, [])[:1] != [len(labels)] for name in HEAD_TENSORS):
        yield f"{HEAD_FILE} has no row for each of {len(labels)} experts"


def misfits(registry: Registry, root: Path, served: Mapping[str, LayerShape]) -> list[str]:
    """Adapters that slots cannot hold which were made for `served`; one line each.

    Args:
        registry: see `file_problems`, which finds none.
        root: see `file_problems`.
        served: `adapter_layers` of the adapter that the slots were made for.
    """
    largest = max(shape.lora_rank for shape in served.values())
    problems = []
    for adapter in registry.adapters:
        for name, shape in adapter_layers(root / adapter.folder).items():
            wanted = served.get(name)
            if wanted is None:
                problems.append(f"{adapter.folder}: changes {name}, which the adapters of this endpoint do not")
            elif shape[1:] != wanted[1:]:
                found = f"{shape.in_features} -> {shape.out_features}"
                expected = f"{wanted.in_features} -> {wanted.out_features}"
                problems.append(f"{adapter.folder}: made for another base model: {name} is {found}, not {expected}")
            elif shape.lora_rank > largest:
                problems.append(f"{adapter.folder}: has LoRA rank {shape.lora_rank}, the endpoint's slots {largest}")
            else:
                continue
            break
    return problems


def adapter_layers(folder: Path) -> dict[str, LayerShape]:
    """Layers that a PEFT folder changes, by PEFT's names, from its configuration and its weights' header.

    Raises:
        OSError: a file is missing.
        ValueError: it is no LoRA adapter that serving could load.
    """
    config = _read(folder / CONFIG_FILE, _LoraConfig)
    shapes = _header(folder / WEIGHTS_FILE)
    layers = {}
    for key in [key for key in shapes if key.endswith(LORA_A)]:
        name = key.removesuffix(LORA_A)
        a_shape, b_shape = shapes.pop(key), shapes.pop(name + LORA_B, [])
        if len(a_shape) != 2 or len(b_shape) != 2 or a_shape[0] != b_shape[1]:
            raise ValueError(f"lora_A {a_shape} and lora_B {b_shape} of {name} do not fit together")
        shape = LayerShape(a_shape[0], a_shape[1], b_shape[0])
        if not config.rank_pattern and shape.lora_rank != config.r:
            raise ValueError(f"{name} has LoRA rank {shape.lora_rank}, but {CONFIG_FILE} says {config.r}")
        targets = config.target_modules
        if not isinstance(targets, str) and not any(f".{name}".endswith(f".{target}") for target in targets):
            raise ValueError(f"{name} is not among the target_modules of {CONFIG_FILE}")
        layers[name] = shape
    if shapes or not layers:
        raise ValueError(f"{min(shapes)} cannot be served, only LoRA can" if shapes else "holds no LoRA weights")
    return layers


def _header(file: Path) -> dict[str, list[int]]:
    """Tensor -> shape. safetensors checks on opening that the header covers the file exactly."""
    try:
        with safe_open(file, "numpy") as tensors:
            slices = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118
            others = {piece.get_dtype() for piece in slices.values()} - FLOATS
            if others:
                raise ValueError(f"{file.name} has weights of type {min(others)}; save them as floating point")
            return {key: piece.get_shape() for key, piece in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"{file.name} is no safetensors file ({str(error).splitlines()[0]})") from error


def _read(file: Path, model: type[ModelT]) -> ModelT:
    try:
        return model.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = "".join(f"{part}: " for part in first["loc"])
        raise ValueError(f"{file.name} cannot be used ({place}{first['msg']})") from error
