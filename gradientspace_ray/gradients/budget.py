"""How many tokens one forward and backward pass may hold: measured, not guessed."""

from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch
from torch import nn

MOST_TOKENS = {"cpu": 1024, "cuda": 16384}
"""Longer rows are no faster: a processor's cache is full, or a GPU busy, well before."""
USABLE_SHARE = {"cpu": 0.5, "cuda": 0.85}
"""Share of the free memory that is taken: a machine's memory has other users, a GPU's seldom."""
TRANSIENT_SHARE, RECOMPUTED_SHARE = 0.25, 4.0
"""What a backward pass holds at once beside the tensors that the forward pass saved for it, as a share of those; the
second with activation checkpointing, which saves little and makes a layer's activations again."""


class MemoryMeter:
    """Most bytes that a forward and backward pass takes: on a GPU as its allocator says, else by what is saved."""

    def __init__(self, model: nn.Module, device: torch.device, checkpointed: bool) -> None:
        self._model, self._device = model, device
        self._share = RECOMPUTED_SHARE if checkpointed else TRANSIENT_SHARE
        self._sizes: dict[int, int] = {}
        self._before = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)

    def peak_bytes(self) -> int:
        """After the backward pass."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return int((1 + self._share) * sum(self._sizes.values()))

    @contextmanager
    def forward_pass(self) -> Iterator[None]:
        """Count what the block saves for the backward pass, each storage once; the model's weights are there anyway."""
        weights = {
            tensor.untyped_storage().data_ptr() for tensor in (*self._model.parameters(), *self._model.buffers())
        }

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                self._sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield


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
