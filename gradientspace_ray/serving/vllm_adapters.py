"""The adapters that vLLM holds: verified copies on this machine, each loaded once, counted while in use.

vLLM reads an adapter again whenever its own cache has dropped it, from the same path and without a question. So it is
given a private copy, made and verified here, that nothing else writes to.
"""

import asyncio
import json
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from gradientspace_ray.engine.adapters import read_adapter
from gradientspace_ray.models.loading import (
    CONFIG_FILE,
    LORA_A,
    LORA_B,
    PEFT_PREFIX,
    WEIGHTS_FILE,
    ModelError,
    resolve_model,
)
from gradientspace_ray.registry import ADAPTER_FILES, adapter_digest
from gradientspace_ray.run import MissingFileError, RunDirectory
from gradientspace_ray.serving.messages import Place, RunChangedError

PATTERNS = ("rank_pattern", "alpha_pattern")
Layers = Mapping[str, tuple[int, int]]
"""Name of a linear layer -> its input and output width."""
T = TypeVar("T")


def copy_verified(place: Place, folder: Path) -> None:
    """Copy an adapter's two files, and no others, out of a run directory and check that they are what the id says.

    Args:
        place: the adapter, in a local run directory or an object store.
        folder: where to; made.

    Raises:
        RunChangedError: the run no longer holds this adapter.
        RunError: the run directory cannot be read.
        OSError: the copy cannot be written.
    """
    folder.mkdir(parents=True)
    # Not `fetch`: that keeps what it copied before, and a run may have put another adapter there.
    run = RunDirectory(place.run_uri)
    try:
        for name in ADAPTER_FILES:
            (folder / name).write_bytes(run.read_bytes(f"{place.folder}/{name}"))
    except MissingFileError as error:
        raise _changed(place) from error
    if adapter_digest(folder) != place.id.rpartition("@")[2]:
        raise _changed(place)


def _changed(place: Place) -> RunChangedError:
    return RunChangedError(
        f"{place.folder} no longer holds {place.id}; release the run again: gradientspace release RUN_DIR"
    )


def linear_layers(base_model: str) -> Layers:
    """The linear layers of a model, from its configuration alone.

    Args:
        base_model: a local folder, or a Hugging Face name.
    """
    config = AutoConfig.from_pretrained(resolve_model(base_model))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


def check_fits(folder: Path, layers: Layers, max_lora_rank: int) -> None:
    """Refuse an adapter that vLLM would compute wrongly, or not at all.

    vLLM takes a smaller matrix than the layer's without a word, and one LoRA rank and alpha for all layers.

    Args:
        folder: PEFT's two files.
        layers: of the base model.
        max_lora_rank: that vLLM was started with.

    Raises:
        ModelError: it says why, without the folder's path.
    """
    try:
        matrices = read_adapter(folder)
    except ModelError as error:
        raise ModelError(str(error).removeprefix(f"{folder}: ")) from error
    config = json.loads((folder / CONFIG_FILE).read_text())
    used = [name for name in PATTERNS if config.get(name)]
    if used:
        raise ModelError(f"vLLM does not read {', '.join(used)}; train one LoRA rank and alpha for all layers")
    rank = config.get("r")
    for name, (a_RI, b_OR) in matrices.items():
        widths = a_RI.shape[1], b_OR.shape[0]
        if layers.get(name) != widths:
            found = f"{layers[name][0]} to {layers[name][1]}" if name in layers else "no such layer"
            raise ModelError(f"made for another base model: {name} maps {widths[0]} to {widths[1]}, here {found}")
        if a_RI.shape[0] != rank:
            raise ModelError(f"{name} has LoRA rank {a_RI.shape[0]}, {CONFIG_FILE} says {rank}; save the adapter again")
    if rank > max_lora_rank:
        raise ModelError(f"its LoRA rank {rank} is more than max_lora_rank {max_lora_rank}; raise vllm.max_lora_rank")


def write_empty(folder: Path, layers: Layers) -> None:
    """An adapter that changes nothing, for the base model where vLLM needs one in its place."""
    name, (inputs, outputs) = next(iter(layers.items()))
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": [name]}
    folder.mkdir(parents=True)
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    zeros = {LORA_A: torch.zeros(1, inputs), LORA_B: torch.zeros(outputs, 1)}
    save_file({f"{PEFT_PREFIX}{name}{factor}": tensor for factor, tensor in zeros.items()}, folder / WEIGHTS_FILE)


@dataclass
class _Held(Generic[T]):
    loading: "asyncio.Task[T]"
    users: int = 0


class Shelf(Generic[T]):
    """Adapters by id: loaded when first asked for, once, and unloaded for room when nobody uses them any more.

    More than `capacity` are held while more are in use: what is in use stays.
    """

    def __init__(
        self, capacity: int, load: Callable[[Place], Awaitable[T]], unload: Callable[[T], Awaitable[None]]
    ) -> None:
        """An empty shelf.

        Args:
            capacity: adapters to hold while no more are in use.
            load: makes an adapter ready; its errors reach all who wait for the adapter, and the next one asks again.
            unload: is given what `load` returned, once, when the adapter must go.
        """
        self._capacity = capacity
        self._load = load
        self._unload = unload
        self.loads = 0
        """Adapters loaded, in total."""
        self.load_s = 0.0
        """Seconds that these loads took, in total."""
        self.evictions = 0
        """Adapters unloaded, in total."""
        self._held: OrderedDict[str, _Held[T]] = OrderedDict()
        self._unloading: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def lease(self, place: Place) -> AsyncIterator[T]:
        """What `load` made of an adapter, for the length of the block. Loading goes on when one who waits gives up.

        Raises:
            Exception: what `load` raises.
        """
        held = self._held.get(place.id) or self._begin(place)
        self._held.move_to_end(place.id)
        held.users += 1
        try:
            yield await asyncio.shield(held.loading)
        finally:
            held.users -= 1
            self._make_room()

    def preload(self, place: Place) -> bool:
        """Begin to load an adapter that nobody asked for, unless another would have to go for it.

        Returns:
            Whether it has begun; a lease waits for it, and is told its error.
        """
        if place.id in self._held or len(self._held) >= self._capacity:
            return False
        self._begin(place)
        return True

    def leases(self) -> dict[str, int]:
        """Adapter -> how many use it now, for every adapter that is ready or on its way."""
        return {adapter_id: held.users for adapter_id, held in self._held.items()}

    def _begin(self, place: Place) -> _Held[T]:
        held = self._held[place.id] = _Held(asyncio.create_task(self._loaded(place)))
        held.loading.add_done_callback(lambda _: self._make_room())
        return held

    async def _loaded(self, place: Place) -> T:
        begin_s = time.monotonic()
        try:
            value = await self._load(place)
        except BaseException:
            del self._held[place.id]
            raise
        self.loads += 1
        self.load_s += time.monotonic() - begin_s
        return value

    def _make_room(self) -> None:
        ready = [id_ for id_, held in self._held.items() if held.loading.done()]
        idle = [id_ for id_ in ready if not self._held[id_].users]
        for adapter_id in idle[: max(len(ready) - self._capacity, 0)]:
            self.evictions += 1
            task = asyncio.create_task(self._away(self._held.pop(adapter_id).loading.result()))
            self._unloading.add(task)
            task.add_done_callback(self._unloading.discard)

    async def _away(self, value: T) -> None:
        await self._unload(value)
