"""Per-sample LoRA gradients out of packed rows: sums over tokens, cut at the examples' borders.

For a layer y = W x + s B A x with u = A x, d = dL/dy and v = s B^T d, example i has
    g_A = sum_t v_t x_t^T   [R, I]        g_B = s sum_t d_t u_t^T   [O, R]
with t over its tokens: the sums that the ordinary weight gradient takes over all tokens of the row. So they are
products of slices of the same matrices, at the same number of operations, written where they belong.

Shapes: N examples of the result, n of a packed row, T tokens of the row; of a layer: I inputs, O outputs, R its rank.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from gradientspace_ray.examples.packing import Packed
from gradientspace_ray.gradients.coverage import HOOKS, CoverageError, LoraSite
from gradientspace_ray.gradients.layout import Target, branch_dtype

GROUPED_CAPABILITY = (9, 0)
GROUPED_MULTIPLE = 8
"""Widths that a grouped product takes: rows of 16 bytes in bfloat16."""


class PackedLayer:
    """Stands in for one LoRA layer's forward pass; its backward pass writes each example's gradient into its row."""

    def __init__(self, site: LoraSite, adapter: str, target: Target) -> None:
        """Take the layer, and the columns of the result that are its own."""
        self.site = site
        self.scaling = float(site.module.scaling[adapter])
        # In place only where nothing holds the layer's output: a plain linear layer does not need it again.
        base = site.module.base_layer
        self.in_place = type(base) is nn.Linear and not any(getattr(base, hooks) for hooks in HOOKS)
        self._target = target
        self._rows: list[int] = []
        self._lengths: list[int] = []
        self._tokens = 0
        self._ends: torch.Tensor | None = None
        self._written = False
        # The layer's input may need no gradient, and a loaded adapter is frozen: this connects the layer to the loss.
        self._anchor = torch.empty(0, requires_grad=True)

    def begin(self, rows: list[int], packed: Packed) -> None:
        """Expect a packed row whose examples belong to these rows of the result."""
        self._rows, self._written = rows, False
        self._lengths, self._tokens = packed.lengths, packed.input_ids.shape[1]
        self._ends = packed.cu_seqlens[1:]

    def end(self) -> None:
        """A layer that no token reached has gradient zero."""
        if not self._written:
            self._target.zero(self._rows)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The LoRA layer's forward pass."""
        result = self.site.module.base_layer(x, *args, **kwargs)
        tokens = x.numel() // x.shape[-1]
        if tokens != self._tokens:
            raise CoverageError(
                f"{self.site.name}: sees {tokens} of {self._tokens} tokens; a layer behind a router or a pooling "
                f"cannot tell whose they are, leave it out of target_modules"
            )
        return _LoraBranch.apply(result, x, self._anchor, self)

    def write(self, x_TI: torch.Tensor, su_TR: torch.Tensor, d_TO: torch.Tensor, v_TR: torch.Tensor) -> None:
        """Store g_A and g_B of every example; a layer that is used twice adds up."""
        for target_N, left, right in ((self._target.a_NRI, v_TR, x_TI), (self._target.b_NOR, d_TO, su_TR)):
            if _grouped_fits(left, right):
                assert self._ends is not None
                products = functional.grouped_mm(left.t(), right, offs=self._ends.to(left.device))
                rows = torch.tensor(self._rows, device=left.device)
                store = target_N.index_add_ if self._written else target_N.index_copy_
                store(0, rows, products.to(target_N.dtype))
                continue
            segments = zip(self._rows, left.split(self._lengths), right.split(self._lengths), strict=True)
            for row, left_seg, right_seg in segments:
                _store_product(target_N[row], left_seg.t(), right_seg, add=self._written)
        self._written = True


def _store_product(target: torch.Tensor, left: torch.Tensor, right: torch.Tensor, add: bool) -> None:
    if target.dtype != left.dtype:
        product = left @ right
        target.copy_(target + product if add else product)
    elif add:
        target.addmm_(left, right)
    else:
        torch.mm(left, right, out=target)


class _LoraBranch(torch.autograd.Function):
    """Adds s B A x to W x; its backward pass hands the per-token factors of the weight gradients to its layer.

    Writing happens in the backward pass only, so activation checkpointing, which runs the forward pass again, is safe.
    The scaling s always multiplies a [T, R] matrix, never one of the layer's width. The products are taken in the type
    that PEFT's own forward pass takes them in; it differs from the layer's output for a bfloat16 base without autocast.
    """

    @staticmethod
    def forward(
        ctx: Any, result: torch.Tensor, x: torch.Tensor, anchor: torch.Tensor, layer: PackedLayer
    ) -> torch.Tensor:
        dtype = branch_dtype(layer.site, x)
        with torch.autocast(x.device.type, enabled=False):
            a, b = (weight.detach().to(dtype) for weight in (layer.site.lora_a, layer.site.lora_b))
            x_TI, result_TO = _tokens(x), _tokens(result)
            su_TR = (x_TI.to(dtype) @ a.t()).mul_(layer.scaling)
            # x as it came, not its cast copy: the layers that share it share the memory too.
            ctx.save_for_backward(x, su_TR, a, b)
            ctx.layer = layer
            if layer.in_place and result.dtype == dtype and result.is_contiguous():
                ctx.mark_dirty(result)
                result_TO.addmm_(su_TR, b.t())
                return result
            return torch.addmm(result_TO.to(dtype), su_TR, b.t()).to(result.dtype).view_as(result)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, su_TR, a, b = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            d_TO = _tokens(d).to(a.dtype)
            v_TR = (d_TO @ b).mul_(ctx.layer.scaling)
            ctx.layer.write(_tokens(x).to(a.dtype), su_TR, d_TO, v_TR)
            dx = (v_TR @ a).view_as(x).to(x.dtype) if ctx.needs_input_grad[1] else None
        return d, dx, None, None


def _tokens(matrix: torch.Tensor) -> torch.Tensor:
    """[..., width] -> [T, width]."""
    return matrix.reshape(-1, matrix.shape[-1])


def _grouped_fits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether all examples' products are to be taken in one launch: a GPU's time goes into launching small ones."""
    aligned = left.shape[1] % GROUPED_MULTIPLE == 0 and right.shape[1] % GROUPED_MULTIPLE == 0
    contiguous = left.is_contiguous() and right.is_contiguous()
    return left.is_cuda and left.dtype == torch.bfloat16 and aligned and contiguous and _grouped_agrees(left.device)


@lru_cache
def _grouped_agrees(device: torch.device) -> bool:
    """Compare a grouped product with its slices, once a device: kernels for ragged groups differ between GPUs."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < GROUPED_CAPABILITY:
        return False
    lengths = [1, 130, 17, 64]
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(sum(lengths), width, generator=generator, device=device) for width in (8, 64))
    ends = torch.tensor(lengths, dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
    grouped = functional.grouped_mm(left.bfloat16().t(), right.bfloat16(), offs=ends).float()
    pairs = zip(left.bfloat16().float().split(lengths), right.bfloat16().float().split(lengths), strict=True)
    sliced = torch.stack([left_seg.t() @ right_seg for left_seg, right_seg in pairs])
    return bool((grouped - sliced).norm() < 0.01 * sliced.norm())
