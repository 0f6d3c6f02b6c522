"""Adapters on this machine's disk and in its memory: what is read, what is refused, what is kept."""

import json
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from gradientspace_ray.engine.threads import in_passing_thread
from gradientspace_ray.models.loading import CONFIG_FILE, LORA_A, LORA_B, PEFT_PREFIX, WEIGHTS_FILE, ModelError

Matrices = dict[str, tuple[Tensor, Tensor]]
"""Layer name -> (A [r, I], B [O, r]), with the scaling folded into B."""
# Keys of PEFT's LoRA configuration that change the forward pass in ways that slots do not compute.
UNSUPPORTED_KEYS = (
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
)


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter and where its PEFT folder is on this machine."""

    id: str
    """Names one content for ever (`name@digest`)."""
    folder: Path


Verify = Callable[[AdapterFiles], None]
"""Raises when a folder does not hold what its id names. It is called after the folder was read, so that a folder
that is replaced in between is refused too."""


def read_adapter(folder: str | Path) -> Matrices:
    """Read a PEFT folder: layer name -> (A [r, I], B [O, r]), as stored, the scaling folded into B.

    Raises:
        ModelError: the folder is no LoRA adapter, or one that uses a feature that slots do not compute (named).
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
        # Not mapped: what another run puts into the file later must not change what was read.
        weights = load((folder / WEIGHTS_FILE).read_bytes())
    except (OSError, SafetensorError, ValueError) as error:  # ValueError: neither UTF-8 nor JSON
        raise ModelError(f"{folder}: not a PEFT adapter ({str(error).splitlines()[0]})") from error
    if not isinstance(config, dict):
        raise ModelError(f"{folder}: not a PEFT adapter ({CONFIG_FILE} holds no JSON object)")
    _refuse_unsupported(folder, config)
    matrices = {}
    for key in sorted(key for key in weights if key.endswith(LORA_A)):
        name = key.removeprefix(PEFT_PREFIX).removesuffix(LORA_A)
        a_RI, b_OR = weights.pop(key), weights.pop(key.removesuffix(LORA_A) + LORA_B, None)
        if b_OR is None or a_RI.ndim != 2 or b_OR.ndim != 2 or a_RI.shape[0] != b_OR.shape[1]:
            raise ModelError(f"{folder}: {name}: lora_A and lora_B do not fit together; save the adapter again")
        matrices[name] = a_RI, b_OR * _scaling(config, name, a_RI.shape[0])
    if weights or not matrices:
        found = f"cannot serve {sorted(weights)[0]}" if weights else "holds no LoRA weights"
        raise ModelError(f"{folder}: {found}; only LoRA on linear layers is served")
    return matrices


def _refuse_unsupported(folder: Path, config: dict[str, Any]) -> None:
    used = [key for key in UNSUPPORTED_KEYS if config.get(key)]
    if config.get("peft_type") != "LORA":
        used.insert(0, f"peft_type {config.get('peft_type')}")
    if config.get("bias", "none") != "none":
        used.append(f"bias {config['bias']}")
    if used:
        raise ModelError(f"{folder}: adapters with {', '.join(used)} cannot be served; train plain LoRA")


def _scaling(config: dict[str, Any], name: str, rank: int) -> float:
    """PEFT's factor of B A: alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (arXiv 2312.03732, equation 5)."""
    patterns = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(list(patterns), name), config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


@dataclass
class _Reading:
    """An adapter that is being read, and how many threads want it."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    threads: int = 0


class HostCache:
    """Adapters in this machine's memory, read once; the least recently used goes first.

    Safe from any thread. Different adapters are read at the same time, one adapter never twice at the same time.
    """

    def __init__(self, capacity: int = 64, verify: Verify | None = None) -> None:
        """Hold at most `capacity` adapters; for `verify`, see `Verify`."""
        self._capacity = capacity
        self._verify = verify
        self._held: OrderedDict[str, Matrices] = OrderedDict()
        self._reading: dict[str, _Reading] = {}
        self._lock = threading.Lock()

    def get(self, adapter: AdapterFiles) -> Matrices:
        """The adapter's matrices, read if they are not held. It blocks while it reads.

        Raises:
            ModelError: see `read_adapter`.
            Exception: what `verify` raises. Nothing is held then, and the next `get` reads again.
        """
        with self._only_reader(adapter.id):
            with self._lock:
                if adapter.id in self._held:
                    self._held.move_to_end(adapter.id)
                    return self._held[adapter.id]
            try:
                matrices = in_passing_thread(lambda: read_adapter(adapter.folder))
            finally:  # what is wrong with files that are not the adapter's own is of no interest
                if self._verify is not None:
                    self._verify(adapter)
            with self._lock:
                self._held[adapter.id] = matrices
                while len(self._held) > self._capacity:
                    self._held.popitem(last=False)
        return matrices

    def peek(self, adapter_id: str) -> Matrices | None:
        """The adapter's matrices if they are held; it never blocks for long."""
        with self._lock:
            if adapter_id in self._held:
                self._held.move_to_end(adapter_id)
            return self._held.get(adapter_id)

    def held(self) -> list[str]:
        """Ids of the adapters in memory, the least recently used first."""
        with self._lock:
            return list(self._held)

    @contextmanager
    def _only_reader(self, adapter_id: str) -> Iterator[None]:
        with self._lock:
            reading = self._reading.setdefault(adapter_id, _Reading())
            reading.threads += 1
        try:
            with reading.lock:
                yield
        finally:
            with self._lock:
                reading.threads -= 1
                if not reading.threads:
                    del self._reading[adapter_id]
