"""Per-sample LoRA gradients out of padded batches: every example gets weights of its own, and autograd does the rest.

A and B are expanded to one view an example, [n, R, I] and [n, O, R], which are the leaves that autograd differentiates:
their gradients are the examples' gradients. Nothing is cut at borders and no formula of a gradient is written down, so
this path is independent of the packed one, and takes any attention that looks back only.

Shapes: n examples of a batch, P tokens of the longest of them; of a layer: I inputs, O outputs, R its LoRA rank.
"""

from typing import Any

import torch

from gradientspace_ray.gradients.coverage import CoverageError, LoraSite
from gradientspace_ray.gradients.layout import Batch, Target, branch_dtype


class PaddedLayer:
    """Stands in for one LoRA layer's forward pass; see `PackedLayer`, which has the same methods."""

    def __init__(self, site: LoraSite, adapter: str, target: Target) -> None:
        """Take the layer, and the columns of the result that are its own."""
        self.site = site
        self.scaling = float(site.module.scaling[adapter])
        self._target = target
        self._rows: list[int] = []
        self._shape = (0, 0)
        self._leaves: list[torch.Tensor] = []
        self._reached: set[int] = set()

    def begin(self, batch: Batch) -> None:
        """Expect a padded batch of these examples."""
        self._rows, self._shape = batch.rows, (len(batch.rows), max(batch.lengths))
        self._leaves, self._reached = [], set()
        for part, weight in enumerate((self.site.lora_a, self.site.lora_b)):
            leaf = weight.detach().expand(len(batch.rows), *weight.shape).requires_grad_()
            leaf.register_post_accumulate_grad_hook(lambda leaf, part=part: self._store(part, leaf))
            self._leaves.append(leaf)

    def end(self) -> None:
        """A layer whose output does not reach the loss has gradient zero."""
        if not self._reached:
            self._target.zero(self._rows)
        self._leaves = []

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The LoRA layer's forward pass, in the types of PEFT's own."""
        result = self.site.module.base_layer(x, *args, **kwargs)
        count, longest = self._shape
        if x.shape[:-1] not in (self._shape, (count * longest,)):
            raise CoverageError(
                f"{self.site.name}: sees {list(x.shape[:-1])} of {list(self._shape)} tokens; a layer behind a router "
                f"or a pooling cannot tell whose they are, leave it out of target_modules"
            )
        dtype = branch_dtype(self.site, x)
        with torch.autocast(x.device.type, enabled=False):
            a, b = (leaf.to(dtype) for leaf in self._leaves)
            # Some models flatten the batch before their linear layers.
            branch = (x.to(dtype).view(count, longest, -1) @ a.mT) @ b.mT
            return (result + branch.view_as(result) * self.scaling).to(result.dtype)

    def _store(self, part: int, leaf: torch.Tensor) -> None:
        """Move a leaf's gradient into the result as soon as it is there, so that one layer's are held at a time.

        It comes in parts where checkpointing differentiates every use of a layer by itself.
        """
        assert leaf.grad is not None
        target_N = self._target[part]
        for row, gradient in zip(self._rows, leaf.grad, strict=True):
            if part in self._reached:
                target_N[row].add_(gradient)
            else:
                target_N[row].copy_(gradient)
        leaf.grad = None
        self._reached.add(part)
