"""Weights of linear layers in the layout that oneDNN multiplies fastest, for float32 on CPUs.

A step of one token a row multiplies few rows with every weight, for which a general product is far from the memory's
speed: on the CPU where it was measured, packed weights make it 1.2 to 2 times as fast, and long prompts no slower.
PyTorch packs weights so when it compiles a model for inference; here no compiler is needed.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

# Rows that the layout is made for; other numbers are multiplied as well.
TYPICAL_ROWS = 16
# A packed product may differ from the plain one by this part of the largest entry: both round, in another order.
TOLERANCE = 1e-4


class PackedLinear(nn.Module):
    """A frozen `nn.Linear` whose weight is packed."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self._bias = layer.bias
        self._packed = _pack(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return _multiply(x, self._packed, self._bias)


def pack(model: nn.Module) -> int:
    """Pack the weights of a model's linear layers, in place; the plain ones are freed.

    A layer is left as it is where it is not float32 on a CPU, or is of a subclass that may compute something else.

    Returns:
        Number of packed layers; 0 where this PyTorch or processor does not pack.
    """
    layers = {name: layer for name, layer in model.named_modules() if _can_be_packed(layer)}
    if not layers or not _works():
        return 0
    for name, layer in layers.items():
        model.set_submodule(name, PackedLinear(layer))
    return len(layers)


def _can_be_packed(layer: Any) -> bool:
    return type(layer) is nn.Linear and layer.weight.dtype is torch.float32 and layer.weight.device.type == "cpu"


@torch.inference_mode()
def _works() -> bool:
    """Whether packed products are there, and right: the operators are PyTorch's own, and not promised to anybody."""
    if not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(96, 64, generator=generator), torch.randn(96, generator=generator)
    x = torch.randn(2, 5, 64, generator=generator)
    try:
        packed = _multiply(x, _pack(weight), bias)
    except (AttributeError, RuntimeError):
        return False
    plain = linear(x, weight, bias)
    return packed.shape == plain.shape and bool((packed - plain).abs().max() <= TOLERANCE * plain.abs().max())


@torch.inference_mode()
def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), TYPICAL_ROWS)
    return packed


def _multiply(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return product
