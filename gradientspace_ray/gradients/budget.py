"""How many tokens one forward and backward pass may hold: measured, not guessed."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MOST_TOKENS = {"cpu": 1024, "cuda": 16384}
"""Longer rows are no faster: a processor's cache is full, or a GPU busy, well before."""
USABLE_SHARE = {"cpu": 0.5, "cuda": 0.85}
"""Share of the free memory that is taken: a machine's memory has other users, a GPU's seldom."""


class MemoryMeter:
    """Most bytes of tensors that were alive at once in a block of code, beside those that were there before."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.peak_bytes = 0

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Measure the block, backward passes included: a GPU's allocator knows, on a CPU every new tensor is seen."""
        if self._device.type != "cuda":
            with _LiveBytes() as live:
                yield
            self.peak_bytes = live.peak
            return
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        yield
        self.peak_bytes = torch.cuda.max_memory_allocated(self._device) - before


class _LiveBytes(TorchDispatchMode):
    """Follows the storages that operations make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        # A view, or a result written into an operand, is no memory of its own.
        operands = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(results):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in operands and key not in self._alive:
                self._alive[key] = storage.nbytes()
                weakref.finalize(storage, self._alive.pop, key, None)
        self.peak = max(self.peak, sum(self._alive.values()))
        return results


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def largest_budget(bytes_per_token: float, device: torch.device) -> int:
    """The largest number of tokens that fits into the free memory of a device, and is of use.

    Args:
        bytes_per_token: that a forward and backward pass takes.
        device: of the model.
    """
    kind = "cuda" if device.type == "cuda" else "cpu"
    return max(1, min(MOST_TOKENS[kind], int(USABLE_SHARE[kind] * free_bytes(device) / bytes_per_token)))


def free_bytes(device: torch.device) -> int:
    """Memory that tensors on a device can still take, including what PyTorch holds in reserve."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
