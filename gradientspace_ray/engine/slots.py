"""Adapters in slots, so that every row of a batch can use another adapter.

A slot is one row of a matrix, and every adapted linear layer has its own columns of it, so that a whole adapter moves
in one copy. Slot 0 is all zeros: the base model. Smaller adapters are padded with zeros up to the slots' LoRA rank, and
the scaling (alpha / r) is folded into B.

Rows that all use one slot multiply with its matrices where they are. Rows of different slots need one matrix each, in
one stack: they have copies, made when a row's slot changes and not at every step, because a step of one token takes
about as long as reading the weights.

Shapes: S slots, P parameters of a slot, R LoRA rank of the slots, I and O input and output width of a layer, N rows of
a batch, T tokens.
"""

import itertools
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from gradientspace_ray.engine.adapters import AdapterFiles, Matrices, read_adapter
from gradientspace_ray.models.loading import ModelError

BASE_SLOT = 0
# Matrices begin at multiples of this many numbers, as the kernels for GPUs and for wide vectors like them.
ALIGNMENT = 64


@dataclass(frozen=True)
class Lease:
    """The right to use a slot; the adapter in it stays while the lease lasts."""

    index: int
    adapter: AdapterFiles | None
    """None is the base model, in slot 0."""


@dataclass(frozen=True)
class SlotStatistics:
    """What happened to the slots so far."""

    leases: dict[str, int]
    """Adapter -> number of leases, for every adapter that has a slot."""
    loads: int
    evictions: int
    load_s: float
    """Seconds, of all loads together."""


class _Active:
    """Which slot the rows of the coming forward pass use: one for all, or each row its copy."""

    slot: int = BASE_SLOT
    rows: int | None = None
    """Number of rows with copies of their own."""


class SlottedLinear(nn.Module):
    """A frozen linear layer with the A and B of every slot."""

    def __init__(self, base: nn.Linear, active: _Active) -> None:
        super().__init__()
        self.base = base
        self._active = active
        self.views: list[tuple[Tensor, Tensor]]
        """A [R, I] and B [R, O] of every slot, as views: indexing anew costs about as much as a small product."""
        self.a_NIR: Tensor
        self.b_NRO: Tensor

    def forward(self, x_NTI: Tensor) -> Tensor:
        """[N, T, I] -> [N, T, O]; with one slot for all rows, any leading dimensions will do.

        Raises:
            ModelError: rows of different slots came in another shape.
        """
        y_NTO: Tensor = self.base(x_NTI)
        if self._active.rows is not None:
            if x_NTI.ndim != 3 or x_NTI.shape[0] != self._active.rows:
                raise ModelError(
                    f"a linear layer reads {list(x_NTI.shape)} for {self._active.rows} rows, so their adapters cannot "
                    "be told apart; serve a base model of another architecture"
                )
            # In place, and so not cast by autocast.
            return y_NTO.baddbmm_(torch.bmm(x_NTI, self.a_NIR), self.b_NRO.to(y_NTO.dtype))
        slot = self._active.slot
        if slot == BASE_SLOT:
            return y_NTO
        a_RI, b_RO = self.views[slot]
        # A view, or it raises: a copy would lose the adapter's part.
        y_NTO.view(-1, y_NTO.shape[-1]).addmm_(linear(x_NTI.flatten(0, -2), a_RI), b_RO.to(y_NTO.dtype))
        return y_NTO


@dataclass
class _Slot:
    adapter_id: str | None = None
    users: int = 0
    last_used: int = 0
    version: int = 0
    """Another number for every content that the slot had."""


class Slots:
    """A model's adapter slots and who uses them.

    An adapter in use is never evicted: a slot is given to another adapter only when its last lease has ended, the least
    recently used first. All but `leases` and `statistics` belongs to one thread, that of the forward pass.
    """

    def __init__(self, model: nn.Module, modules: Iterable[str], lora_rank: int, capacity: int) -> None:
        """Wrap linear layers of `model` in place.

        Args:
            model: the frozen base model.
            modules: full names of the linear layers that adapters may change.
            lora_rank: the largest rank that an adapter may have.
            capacity: adapters held at once, slot 0 not counted.

        Raises:
            ModelError: a name is no linear layer of this model.
        """
        self.lora_rank = lora_rank
        self._active = _Active()
        self._layers: dict[str, SlottedLinear] = {}
        found = dict(model.named_modules())
        for name in sorted(modules):
            layer = found.get(name)
            if not isinstance(layer, nn.Linear):
                raise ModelError(f"{name}: an adapter changes it, but this base model has no linear layer of that name")
            self._layers[name] = SlottedLinear(layer, self._active)
            model.set_submodule(name, self._layers[name])
        self._columns, width = self._layout()
        like = next((layer.base.weight for layer in self._layers.values()), torch.empty(0))
        self._slots_SP = like.new_zeros(capacity + 1, width)
        self._rows_NP = like.new_zeros(0, width)
        self._row_contents: list[tuple[int, int] | None] = []
        """Slot and version of each row's copy."""
        self._viewed = 0
        """How many rows' copies the layers see."""
        for name, layer in self._layers.items():
            layer.views = list(zip(*map(torch.unbind, self._matrices(name, self._slots_SP)), strict=True))
        self._slots = [_Slot() for _ in range(capacity + 1)]
        self._clock = itertools.count(1)
        self._lock = threading.Lock()
        self._loads, self._evictions, self._load_s = 0, 0, 0.0

    @property
    def capacity(self) -> int:
        """Adapters held at once."""
        return len(self._slots) - 1

    @classmethod
    def like(cls, model: nn.Module, folder: str | Path, capacity: int) -> "Slots":
        """Slots for adapters of the same shape as the PEFT adapter in `folder` (its layers, its largest rank)."""
        matrices = read_adapter(folder)
        return cls(model, matrices, max(a_RI.shape[0] for a_RI, _ in matrices.values()), capacity)

    def _layout(self) -> tuple[dict[str, tuple[int, int]], int]:
        """Layer -> where its A and its B begin in a slot; and the size of a slot."""
        columns, end = {}, 0
        for name, layer in self._layers.items():
            starts = []
            for width in (layer.base.in_features, layer.base.out_features):
                starts.append(end)
                end += -(-self.lora_rank * width // ALIGNMENT) * ALIGNMENT
            columns[name] = (starts[0], starts[1])
        return columns, end

    def _matrices(self, name: str, stack_SP: Tensor) -> tuple[Tensor, Tensor]:
        """Views of a layer's A [S, R, I] and B [S, R, O] in a stack of slots."""
        base, rank = self._layers[name].base, self.lora_rank
        a, b = self._columns[name]
        a_SRI = stack_SP[:, a : a + rank * base.in_features].unflatten(1, (rank, base.in_features))
        b_SRO = stack_SP[:, b : b + rank * base.out_features].unflatten(1, (rank, base.out_features))
        return a_SRI, b_SRO

    def acquire(self, adapter: AdapterFiles | None, matrices: Matrices, unused: bool = False) -> Lease | None:
        """Take a lease on an adapter's slot, loaded; end it with `release`.

        Args:
            adapter: None is the base model.
            matrices: the adapter's, copied into the slot if it is not there already.
            unused: take only a slot that holds nothing yet.

        Returns:
            None when every slot is in use by another adapter.

        Raises:
            ModelError: the adapter does not fit this model or these slots; the slots keep what they hold.
        """
        if adapter is None:
            return Lease(BASE_SLOT, None)
        if len(self._slots) == 1:
            raise ModelError(f"{adapter.folder}: this engine has no slot for adapters; set at least one")
        index = self._find(adapter.id, unused)
        if index is None:
            return None
        slot = self._slots[index]
        if slot.adapter_id != adapter.id:
            self._check_fit(adapter.folder, matrices)
            self._load(index, adapter.id, matrices)
        with self._lock:
            slot.users += 1
            slot.last_used = next(self._clock)
        return Lease(index, adapter)

    def _find(self, adapter_id: str, unused: bool) -> int | None:
        candidates = range(1, len(self._slots))
        for index in candidates:
            if self._slots[index].adapter_id == adapter_id:
                return index
        free = [index for index in candidates if not self._slots[index].users]
        if unused:
            free = [index for index in free if self._slots[index].adapter_id is None]
        return min(free, key=lambda index: self._slots[index].last_used, default=None)

    @torch.inference_mode()
    def _load(self, index: int, adapter_id: str, matrices: Matrices) -> None:
        started = time.perf_counter()
        slot = self._slots[index]
        with self._lock:
            self._evictions += slot.adapter_id is not None
            slot.adapter_id, slot.last_used = None, 0  # until all is copied
            slot.version = next(self._clock)
        if not all(self._fills(name, matrices) for name in self._layers):
            self._slots_SP[index].zero_()
        for name, (a_RI, b_OR) in matrices.items():
            (to_a_RI, to_b_RO), rank = self._layers[name].views[index], a_RI.shape[0]
            to_a_RI[:rank].copy_(a_RI)
            to_b_RO[:rank].copy_(b_OR.T)
        with self._lock:
            slot.adapter_id = adapter_id
            self._loads += 1
            self._load_s += time.perf_counter() - started

    def _fills(self, name: str, matrices: Matrices) -> bool:
        return name in matrices and matrices[name][0].shape[0] == self.lora_rank

    def _check_fit(self, folder: Path, matrices: Matrices) -> None:
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

    def release(self, lease: Lease) -> None:
        """End a lease. The adapter stays until its slot is needed."""
        if lease.adapter is not None:
            with self._lock:
                self._slots[lease.index].users -= 1

    @contextmanager
    def rows(self, slots: Sequence[int]) -> Iterator[None]:
        """Within the block, row i of a forward pass uses slot `slots[i]`."""
        if len(set(slots)) == 1:
            self._active.slot = slots[0]
        else:
            self._copy_rows(slots)
            self._active.rows = len(slots)
        try:
            yield
        finally:
            self._active.slot, self._active.rows = BASE_SLOT, None

    @torch.inference_mode()
    def _copy_rows(self, slots: Sequence[int]) -> None:
        """Bring every row's copy of its slot up to date."""
        rows = len(slots)
        if rows > len(self._row_contents):
            self._rows_NP = self._slots_SP.new_empty(max(rows, 2 * len(self._row_contents)), self._slots_SP.shape[1])
            self._row_contents = [None] * len(self._rows_NP)
            self._viewed = 0
        if rows != self._viewed:
            for name, layer in self._layers.items():
                a_NRI, layer.b_NRO = self._matrices(name, self._rows_NP[:rows])
                layer.a_NIR = a_NRI.mT
            self._viewed = rows
        for row, slot in enumerate(slots):
            content = slot, self._slots[slot].version
            if self._row_contents[row] != content:
                self._rows_NP[row].copy_(self._slots_SP[slot])
                self._row_contents[row] = content

    def leases(self) -> dict[str, int]:
        """Adapter -> number of leases, for every adapter that has a slot."""
        return self.statistics().leases

    def statistics(self) -> SlotStatistics:
        """What the slots hold, and what happened to them so far."""
        with self._lock:
            leases = {slot.adapter_id: slot.users for slot in self._slots if slot.adapter_id is not None}
            return SlotStatistics(leases, self._loads, self._evictions, self._load_s)
