"""Per-sample gradients as Adam would scale them, with the moments that the warm-up's optimizer ended with.

Shapes: N examples, D LoRA parameters.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from gradientspace_ray.models.moments import MEND, MOMENTS_FILE, AdamMoments, MomentsError

Kind = Literal["adam", "less"]
BLOCK_COLUMNS = 2**17
"""Columns changed at once: temporaries are N of these, not N gradients."""


class Preconditioner:
    """Scales gradients, entry by entry, with m and v as the optimizer left them after t steps.

    `adam`: g / (sqrt(v / (1 - beta2^t)) + eps), with the denominators of the optimizer's last step (Kingma and Ba,
    arXiv 1412.6980, algorithm 1). There is no momentum: it is one factor for each column, whatever the rows.

    `less`: m' / sqrt(v' + eps) with m' = beta1 m + (1 - beta1) g and v' = beta2 v + (1 - beta2) g^2, as the code of
    LESS does (Xia et al., arXiv 2402.04333; `obtain_gradients_with_adam` in `collect_grad_reps.py`): no bias
    correction, and eps inside of the root. beta1 m is the same in all rows and pulls them towards each other.
    """

    def __init__(
        self,
        kind: Kind,
        moments: AdamMoments,
        columns: Sequence[tuple[str, int, tuple[int, int]]],
        device: str | torch.device = "cpu",
    ) -> None:
        """Lay the moments out as gradients are; the device then holds one float32 row of D for `adam`, two for `less`.

        Args:
            kind: see the class.
            moments: of the adapter whose gradients are scaled.
            columns: (name, offset, shape) of each weight in a gradient, see `PerSampleGradients.columns`.
            device: where the gradients are.

        Raises:
            MomentsError: the moments are another adapter's, of an optimizer that made no step, or not finite.
        """
        _check(moments, columns)
        beta1, beta2 = moments.betas
        second_D = _flat(moments.second, columns, device)
        self._kind, self._beta1, self._beta2, self._eps = kind, beta1, beta2, moments.eps
        self._dimension = len(second_D)
        if kind == "adam":
            self._denominator_D = second_D.div_(1 - beta2**moments.step).sqrt_().add_(moments.eps)
        else:
            self._decayed_first_D = _flat(moments.first, columns, device).mul_(beta1)
            self._decayed_second_D = second_D.mul_(beta2)

    def apply(self, gradients_ND: torch.Tensor) -> None:
        """Change every row in place; each entry is computed in float32, and rounded to the buffer's type once.

        Args:
            gradients_ND: [N, D], float32 or bfloat16, on the device of the moments.

        Raises:
            ValueError: another shape or type.
        """
        if gradients_ND.dtype not in (torch.float32, torch.bfloat16) or gradients_ND.shape[1:] != (self._dimension,):
            raise ValueError(
                f"gradients are {gradients_ND.dtype} {tuple(gradients_ND.shape)}; "
                f"needed: float32 or bfloat16 (N, {self._dimension})"
            )
        for start in range(0, self._dimension, BLOCK_COLUMNS):
            columns = slice(start, start + BLOCK_COLUMNS)
            block = gradients_ND[:, columns]
            if block.dtype == torch.float32:
                self._scale(block, columns)
            else:
                values = block.float()
                self._scale(values, columns)
                block.copy_(values)

    def _scale(self, values: torch.Tensor, columns: slice) -> None:
        """`apply` for some of the columns, in place, in float32."""
        if self._kind == "adam":
            values.div_(self._denominator_D[columns])
            return
        second = torch.addcmul(self._decayed_second_D[columns], values, values, value=1 - self._beta2)
        values.mul_(1 - self._beta1).add_(self._decayed_first_D[columns]).div_(second.add_(self._eps).sqrt_())


def _check(moments: AdamMoments, columns: Sequence[tuple[str, int, tuple[int, int]]]) -> None:
    """Refuse moments of other weights than these, or that say nothing about them."""
    if moments.step < 1:
        raise _unusable("the optimizer made no step")
    for part in (moments.first, moments.second):
        for name, _, shape in columns:
            if name not in part:
                raise _unusable(f"they are another adapter's, without {name}")
            if part[name].shape != shape:
                raise _unusable(f"they are another adapter's, {name} is {tuple(part[name].shape)} and not {shape}")
            if not bool(torch.isfinite(part[name]).all()):
                raise _unusable(f"{name} is not finite, which a lower warmup.learning_rate avoids")
        if part is moments.second and any(bool((part[name] < 0).any()) for name, _, _ in columns):
            raise _unusable("a second moment is negative")
        more = sorted(set(part) - {name for name, _, _ in columns})
        if more:
            raise _unusable(f"they are another adapter's, with {more[0]}")


def _unusable(reason: str) -> MomentsError:
    return MomentsError(f"{MOMENTS_FILE}: the moments cannot be used, {reason}; {MEND}")


def _flat(
    part: Mapping[str, torch.Tensor], columns: Sequence[tuple[str, int, tuple[int, int]]], device: str | torch.device
) -> torch.Tensor:
    """[D] float32, each weight's moments where its gradient stands; memory of its own."""
    flat_D = torch.empty(sum(rows * width for _, _, (rows, width) in columns), dtype=torch.float32, device=device)
    for name, offset, (rows, width) in columns:
        flat_D[offset : offset + rows * width] = part[name].flatten()
    return flat_D
