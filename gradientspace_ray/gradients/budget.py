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
TRANSIENT_SHARE = 0.25
"""What a backward pass holds at once beside the tensors that the forward pass saved for it, as a share of those."""


class SavedBytes:
    """Counts what the forward pass saves for the backward pass."""

    def __init__(self) -> None:
        self._sizes: dict[int, int] = {}

    @property
    def total(self) -> int:
        """Bytes; a storage that several tensors share counts once."""
        return sum(self._sizes.values())

    @contextmanager
    def counting(self, model: nn.Module) -> Iterator[None]:
        """Count while the block runs; the model's own weights are there anyway and do not count."""
        weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

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
        bytes_per_token: that the forward pass saves.
        device: of the model.
    """
    usable = USABLE_SHARE[device.type] * free_bytes(device)
    return max(1, min(MOST_TOKENS[device.type], int(usable / ((1 + TRANSIENT_SHARE) * bytes_per_token))))


def free_bytes(device: torch.device) -> int:
    """Memory that tensors on a device can still take, including what PyTorch holds in reserve."""
    if device.type == "cpu":
        return int(psutil.virtual_memory().available)
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error of PyTorch says that memory ran out, on a GPU or on the machine."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
