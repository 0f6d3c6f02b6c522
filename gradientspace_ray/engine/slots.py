"""Adapters in stacked slots, so that every row of a batch can use another adapter.

Each adapted linear layer keeps the adapters of all slots in two tensors. Slot 0 is all zeros: the base model. Smaller
adapters are padded with zeros up to the stack's LoRA rank, and the scaling (alpha / r) is folded into B, so that a row
costs two matrix products, whatever it uses.

Shapes: S slots, R LoRA rank of the stack, I and O input and output width of a layer, N rows of a batch, T tokens.
"""

import itertools
import json
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import linear

from gradientspace_ray.models.loading import CONFIG_FILE, LORA_A, LORA_B, PEFT_PREFIX, WEIGHTS_FILE, ModelError

BASE_SLOT = 0
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


def read_adapter(folder: str | Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Read a PEFT folder: layer name -> (A [r, I], B [O, r]), float32 as stored, the scaling folded into B.

    Raises:
        ModelError: the folder is no LoRA adapter, or one that uses a feature that slots do not compute (named).
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
        weights = load_file(folder / WEIGHTS_FILE)
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


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter and where its PEFT folder is on this machine."""

    id: str
    """Names one content for ever (`name@digest`)."""
    folder: Path


Verify = Callable[[AdapterFiles], None]
"""Raises when a folder does not hold what its id names. It is called after the folder was read, so that a folder
that is replaced in between is refused too."""


@dataclass(frozen=True)
class Lease:
    """The right to use a slot; the adapter in it stays while the lease lasts."""

    index: int
    adapter: AdapterFiles | None
    """None is the base model, in slot 0."""


class _Active:
    """Which slot each row of the coming forward pass uses: one slot for all rows, or one index a row."""

    slot: int = BASE_SLOT
    slots_N: Tensor | None = None


class SlottedLinear(nn.Module):
    """A frozen linear layer with the A and B of every slot."""

    def __init__(self, base: nn.Linear, slots: int, lora_rank: int, active: _Active) -> None:
        super().__init__()
        self.base = base
        self._active = active
        self.a_SRI: Tensor
        self.b_SOR: Tensor
        weight = base.weight
        self.register_buffer("a_SRI", weight.new_zeros(slots, lora_rank, base.in_features), persistent=False)
        self.register_buffer("b_SOR", weight.new_zeros(slots, base.out_features, lora_rank), persistent=False)

    def forward(self, x_NTI: Tensor) -> Tensor:
        """[N, T, I] -> [N, T, O]; with one slot for all rows, any leading dimensions will do."""
        y_NTO = self.base(x_NTI)
        slots_N = self._active.slots_N
        if slots_N is not None:
            a_NIR, b_NRO = self.a_SRI[slots_N].mT, self.b_SOR[slots_N].mT
            return y_NTO + torch.bmm(torch.bmm(x_NTI, a_NIR), b_NRO)
        slot = self._active.slot
        if slot == BASE_SLOT:
            return y_NTO
        return y_NTO + linear(linear(x_NTI, self.a_SRI[slot]), self.b_SOR[slot])


@dataclass
class _Slot:
    adapter_id: str | None = None
    """The adapter that the slot is meant for."""
    contents: str | None = None
    """The adapter whose weights are in the tensors."""
    users: int = 0
    last_used: int = 0


class Slots:
    """A model's adapter slots and who uses them.

    An adapter in use is never evicted: a slot is given to another adapter only when its last lease has ended, the least
    recently used first. Bookkeeping (`acquire`, `release`) is instant and safe from any thread. `load` and the forward
    pass belong to one thread at a time, because they touch the weights.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Iterable[str],
        lora_rank: int,
        capacity: int,
        verify: Verify | None = None,
    ) -> None:
        """Wrap linear layers of `model` in place.

        Args:
            model: the frozen base model.
            modules: full names of the linear layers that adapters may change.
            lora_rank: the largest rank that an adapter may have.
            capacity: adapters held at once, slot 0 not counted.
            verify: see `Verify`.

        Raises:
            ModelError: a name is no linear layer of this model.
        """
        self.lora_rank = lora_rank
        self._verify = verify
        self._active = _Active()
        self._layers: dict[str, SlottedLinear] = {}
        found = dict(model.named_modules())
        for name in sorted(modules):
            layer = found.get(name)
            if not isinstance(layer, nn.Linear):
                raise ModelError(f"{name}: an adapter changes it, but this base model has no linear layer of that name")
            self._layers[name] = SlottedLinear(layer, capacity + 1, lora_rank, self._active)
            model.set_submodule(name, self._layers[name])
        self._slots = [_Slot() for _ in range(capacity + 1)]
        self._clock = itertools.count(1)
        self._changed = threading.Condition()
        self._loading = threading.Lock()

    @classmethod
    def like(cls, model: nn.Module, folder: str | Path, capacity: int, verify: Verify | None = None) -> "Slots":
        """Slots for adapters of the same shape as the PEFT adapter in `folder` (its layers, its largest rank)."""
        matrices = read_adapter(folder)
        return cls(model, matrices, max(a_RI.shape[0] for a_RI, _ in matrices.values()), capacity, verify)

    def acquire(self, adapter: AdapterFiles | None) -> Lease | None:
        """Take a lease on an adapter's slot; end it with `release`.

        Returns:
            None when every slot is in use by another adapter. Before the first forward pass with the lease: `load`.
        """
        if adapter is None:
            return Lease(BASE_SLOT, None)
        with self._changed:
            index = self._find(adapter.id)
            if index is None:
                return None
            slot = self._slots[index]
            slot.adapter_id = adapter.id
            slot.users += 1
            slot.last_used = next(self._clock)
            return Lease(index, adapter)

    def _find(self, adapter_id: str) -> int | None:
        candidates = range(1, len(self._slots))
        for index in candidates:
            if self._slots[index].adapter_id == adapter_id:
                return index
        free = [index for index in candidates if not self._slots[index].users]
        return min(free, key=lambda index: self._slots[index].last_used, default=None)

    def release(self, lease: Lease) -> None:
        """End a lease. The adapter stays until its slot is needed."""
        if lease.adapter is None:
            return
        with self._changed:
            slot = self._slots[lease.index]
            slot.users -= 1
            if not slot.users and slot.contents != slot.adapter_id:
                slot.adapter_id, slot.last_used = None, 0
            self._changed.notify_all()

    def load(self, lease: Lease) -> None:
        """Read the adapter into its slot; nothing happens when it is there already.

        Raises:
            ModelError: the adapter does not fit this model or these slots.
            Exception: what `verify` raises; the slot keeps what it held.
        """
        slot = self._slots[lease.index]
        if lease.adapter is None or slot.contents == lease.adapter.id:
            return
        with self._loading:
            matrices = read_adapter(lease.adapter.folder)
            if self._verify is not None:
                self._verify(lease.adapter)
            self._check_fit(lease.adapter.folder, matrices)
            slot.contents = None
            for name, layer in self._layers.items():
                layer.a_SRI[lease.index].zero_()
                layer.b_SOR[lease.index].zero_()
                if name in matrices:
                    a_RI, b_OR = matrices[name]
                    layer.a_SRI[lease.index, : a_RI.shape[0]].copy_(a_RI)
                    layer.b_SOR[lease.index, :, : b_OR.shape[1]].copy_(b_OR)
            slot.contents = lease.adapter.id

    def _check_fit(self, folder: Path, matrices: dict[str, tuple[Tensor, Tensor]]) -> None:
        for name, (a_RI, b_OR) in matrices.items():
            layer = self._layers.get(name)
            if layer is None:
                raise ModelError(f"{folder}: changes {name}, which these slots do not hold; serve it from its own run")
            wanted = (layer.base.in_features, layer.base.out_features)
            if (a_RI.shape[1], b_OR.shape[0]) != wanted:
                raise ModelError(
                    f"{folder}: made for another base model: {name} is {a_RI.shape[1]} -> {b_OR.shape[0]} there "
                    f"and {wanted[0]} -> {wanted[1]} here"
                )
            if a_RI.shape[0] > self.lora_rank:
                raise ModelError(f"{folder}: {name} has LoRA rank {a_RI.shape[0]}, these slots hold {self.lora_rank}")

    @contextmanager
    def lease(self, adapter: AdapterFiles | None, timeout_s: float | None = None) -> Iterator[int]:
        """Hold an adapter for the length of the block, loaded; yields its slot. Waits while others use all slots.

        Raises:
            TimeoutError: no slot came free within `timeout_s`.
            ModelError: see `load`.
        """
        taken: list[Lease] = []

        def take() -> bool:
            lease = self.acquire(adapter)
            taken.extend([] if lease is None else [lease])
            return bool(taken)

        with self._changed:
            if not self._changed.wait_for(take, timeout_s):
                raise TimeoutError(f"{adapter}: all {len(self._slots) - 1} slots stayed in use for {timeout_s} s")
        try:
            self.load(taken[0])
            yield taken[0].index
        finally:
            self.release(taken[0])

    @contextmanager
    def rows(self, slots: Sequence[int]) -> Iterator[None]:
        """Within the block, row i of a forward pass uses slot `slots[i]`."""
        if len(set(slots)) == 1:
            self._active.slot = slots[0]
        else:
            device = next(iter(self._layers.values())).a_SRI.device
            self._active.slots_N = torch.tensor(list(slots), device=device)
        try:
            yield
        finally:
            self._active.slot, self._active.slots_N = BASE_SLOT, None

    def leases(self) -> dict[str, int]:
        """Adapter -> number of leases, for every adapter that has a slot."""
        with self._changed:
            return {slot.adapter_id: slot.users for slot in self._slots if slot.adapter_id is not None}
