"""Where the gradient of each LoRA layer stands in the result, and in which type its products are taken.

Shapes: N examples, D LoRA parameters; of a layer: I inputs, O outputs, R its LoRA rank.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from gradientspace_ray.gradients.coverage import LoraSite


class Column(NamedTuple):
    """Where one LoRA weight stands in a gradient."""

    name: str
    """As in PEFT's files, without the adapter's name."""
    offset: int
    shape: tuple[int, int]


class Batch(NamedTuple):
    """One packed row, or padded batch, of examples."""

    rows: list[int]
    """Of the result, one for each example."""
    lengths: list[int]
    """Tokens of each example."""
    device_rows: torch.Tensor
    """`rows`, int64 on the model's device: moved once for all layers, because moving waits for the device."""
    device_ends: torch.Tensor
    """Where each example ends in the packed row, int32 on the model's device."""


class Target(NamedTuple):
    """The part of the result that belongs to one layer: two views of it."""

    a_NRI: torch.Tensor
    b_NOR: torch.Tensor

    def zero(self, rows: Sequence[int]) -> None:
        """Set these examples' gradients to zero."""
        for row in rows:
            self.a_NRI[row].zero_()
            self.b_NOR[row].zero_()


def columns_of(sites: Sequence[LoraSite]) -> tuple[Column, ...]:
    """The weights that make up a gradient, A before B of each layer."""
    columns: list[Column] = []
    offset = 0
    for site in sites:
        for factor, weight in (("lora_A", site.lora_a), ("lora_B", site.lora_b)):
            rows, width = weight.shape
            columns.append(Column(f"{site.name}.{factor}.weight", offset, (rows, width)))
            offset += weight.numel()
    return tuple(columns)


def targets_of(columns: Sequence[Column], gradients_ND: torch.Tensor) -> list[Target]:
    """The target of every layer, in order: views of `gradients_ND`, whose rows are contiguous."""
    views = [
        gradients_ND[:, offset : offset + rows * width].unflatten(1, (rows, width))
        for _, offset, (rows, width) in columns
    ]
    return [Target(a, b) for a, b in zip(views[::2], views[1::2], strict=True)]


def branch_dtype(site: LoraSite, x: torch.Tensor) -> torch.dtype:
    """Type of PEFT's LoRA products: autocast's, or that of the LoRA weights, to which PEFT casts a layer's input."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return site.lora_a.dtype
