"""Per-sample LoRA gradients out of packed rows: sums over tokens, cut at the examples' borders.

For a layer y = W x + s B A x with u = A x, d = dL/dy and v = s B^T d, example i has
    g_A = sum_t v_t x_t^T   [R, I]        g_B = s sum_t d_t u_t^T   [O, R]
with t over its tokens: the sums that the ordinary weight gradient takes over all tokens of the row. So they are
products of slices of the same matrices, at the same number of operations, written where they belong.

Shapes: N examples of the result, n of a packed row, T tokens of the row; of a layer: I inputs, O outputs, R its rank.
"""

import logging
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from gradientspace_ray.gradients.coverage import HOOKS, CoverageError, LoraSite
from gradientspace_ray.gradients.layout import Batch, Target, branch_dtype

log = logging.getLogger(__name__)
GROUPED_CAPABILITY = (9, 0)
GROUPED_MULTIPLE = 8
"""Widths that a grouped product takes: rows of 16 bytes in bfloat16."""


class PackedLayer:
    """Stands in for one LoRA layer's forward pass; its backward pass writes each example's gradient into its row."""

    def __init__(self, site: LoraSite, adapter: str, target: Target) -> None:
        """Take the layer, and the columns of the result that are its own."""
        self.site = site
        self.scaling = float(site.module.scaling[adapter])
        # Whoever hooks the base layer wants it called.
        base = site.module.base_layer
        hooked = "forward" in vars(base) or any(getattr(base, hooks) for hooks in HOOKS)
        self.fusable = type(base) is nn.Linear and not hooked
        self._target = target
        self._batch: Batch | None = None
        self._tokens = 0
        self._written = False
        # The layer's input may need no gradient, and a loaded adapter is frozen: this connects the layer to the loss.
        self._anchor = torch.empty(0, requires_grad=True)

    def begin(self, batch: Batch) -> None:
        """Expect a packed row of these examples."""
        self._batch, self._tokens, self._written = batch, sum(batch.lengths), False

    def end(self) -> None:
        """A layer whose output does not reach the loss has gradient zero."""
        if not self._written and self._batch:
            self._target.zero(self._batch.rows)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The LoRA layer's forward pass."""
        base = self.site.module.base_layer
        tokens = x.numel() // x.shape[-1]
        if tokens != self._tokens:
            raise CoverageError(
                f"{self.site.name}: sees {tokens} of {self._tokens} tokens; a layer behind a router or a pooling "
                f"cannot tell whose they are, leave it out of target_modules"
            )
        if self.fusable and x.dtype == base.weight.dtype == branch_dtype(self.site, x):
            return _LoraLinear.apply(x, self._anchor, self)
        return _LoraBranch.apply(base(x, *args, **kwargs), x, self._anchor, self)

    def write(self, x_TI: torch.Tensor, su_TR: torch.Tensor, d_TO: torch.Tensor, v_TR: torch.Tensor) -> None:
        """Store g_A and g_B of every example; a layer that is used twice adds up."""
        assert self._batch is not None
        batch = self._batch
        for target_N, left, right in ((self._target.a_NRI, v_TR, x_TI), (self._target.b_NOR, d_TO, su_TR)):
            if _grouped_fits(left, right):
                products = functional.grouped_mm(left.t(), right, offs=batch.device_ends)
                store = target_N.index_add_ if self._written else target_N.index_copy_
                store(0, batch.device_rows, products.to(target_N.dtype))
                continue
            segments = zip(batch.rows, left.split(batch.lengths), right.split(batch.lengths), strict=True)
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


class _LoraLinear(torch.autograd.Function):
    """W x + s B A x, whose backward pass hands the per-token factors of the weight gradients to its layer.

    W and the branch add into one result, and so do their gradients of x: no matrix of the layer's width is made twice.
    Writing happens in the backward pass only, so activation checkpointing, which runs the forward pass again, is safe.
    The scaling s always multiplies a [T, R] matrix.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, anchor: torch.Tensor, layer: PackedLayer) -> torch.Tensor:
        base = layer.site.module.base_layer
        assert isinstance(base, nn.Linear)
        with torch.autocast(x.device.type, enabled=False):
            x_TI = _tokens(x)
            a, b, su_TR = _scaled_u(layer, x_TI, x.dtype)
            result_TO = functional.linear(x_TI, base.weight, base.bias).addmm_(su_TR, b.t())
        ctx.save_for_backward(x, su_TR, a, b, base.weight)
        ctx.layer = layer
        return result_TO.view(*x.shape[:-1], result_TO.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, su_TR, a, b, weight_OI = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            d_TO = _tokens(d)
            v_TR = (d_TO @ b).mul_(ctx.layer.scaling)
            ctx.layer.write(_tokens(x), su_TR, d_TO, v_TR)
            dx = (d_TO @ weight_OI).addmm_(v_TR, a).view_as(x) if ctx.needs_input_grad[0] else None
        return dx, None, None


class _LoraBranch(torch.autograd.Function):
    """The same for a base layer of any kind, which is called as it is and differentiated by autograd.

    The products are taken in the type that PEFT's own forward pass takes them in; it differs from the layer's output
    for a bfloat16 base without autocast.
    """

    @staticmethod
    def forward(
        ctx: Any, result: torch.Tensor, x: torch.Tensor, anchor: torch.Tensor, layer: PackedLayer
    ) -> torch.Tensor:
        dtype = branch_dtype(layer.site, x)
        with torch.autocast(x.device.type, enabled=False):
            a, b, su_TR = _scaled_u(layer, _tokens(x), dtype)
            # x as it came, not its cast copy: the layers that share it share the memory too.
            ctx.save_for_backward(x, su_TR, a, b)
            ctx.layer = layer
            return torch.addmm(_tokens(result).to(dtype), su_TR, b.t()).to(result.dtype).view_as(result)

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


def _scaled_u(
    layer: PackedLayer, x_TI: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A, B and s A x, all in `dtype`."""
    a, b = (weight.detach().to(dtype) for weight in (layer.site.lora_a, layer.site.lora_b))
    return a, b, (x_TI.to(dtype) @ a.t()).mul_(layer.scaling)


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
    """Compare a grouped product with its slices, once a device: not every GPU has the kernel, and kernels differ."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < GROUPED_CAPABILITY:
        return False
    lengths = [1, 130, 17, 64]
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(sum(lengths), width, generator=generator, device=device) for width in (8, 64))
    ends = torch.tensor(lengths, dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
    try:
        grouped = functional.grouped_mm(left.bfloat16().t(), right.bfloat16(), offs=ends).float()
    except RuntimeError as error:
        log.info("no grouped products on %s: %s", device, error)
        return False
    pairs = zip(left.bfloat16().float().split(lengths), right.bfloat16().float().split(lengths), strict=True)
    sliced = torch.stack([left_seg.t() @ right_seg for left_seg, right_seg in pairs])
    return bool((grouped - sliced).norm() < 0.01 * sliced.norm())
