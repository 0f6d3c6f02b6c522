"""Random projections of gradients: the features that other methods cluster (LESS, arXiv 2402.04333; ELREA).

A CountSketch (Charikar, Chen, Farach-Colton 2002; feature hashing: Weinberger et al., arXiv 0902.2206): with a random
entry h(j) and a random sign s(j) for each of the D columns, p_i = sum of s(j) x_j over h(j) = i. Inner products are
kept in the mean, and for independent h and s
    Var <p(x), p(y)> = (|x|^2 |y|^2 + <x, y>^2 - 2 sum_j x_j^2 y_j^2) / P,
which is what a dense matrix of random signs over sqrt(P) has (Achlioptas 2003), at D additions a gradient instead of
P D, and with a table of D entries instead of the matrix.

Shapes: N gradients, B of them at once, D gradient entries, C columns of a block, P numbers of a projection, S parts of
the columns.
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch

from gradientspace_ray.sketch.directions import blocks_of, column_blocks, row_squares
from gradientspace_ray.sketch.online_svd import column_parts, unit_scale, whole_scale

COLUMNS_AT_ONCE = 2**12
"""Columns that a processor adds at once; see `blocks_of` for other devices."""
DRAWN_AT_ONCE = 2**20
ArrayT = TypeVar("ArrayT", np.ndarray, torch.Tensor)


class RandomProjection:
    """A fixed projection from `dimension` columns to `width` numbers.

    Columns are hashed by the raw stream of NumPy's Philox, which NumPy keeps as it is: equal arguments are the same
    projection in every process, on every device.
    """

    def __init__(self, dimension: int, width: int, device: torch.device | str = "cpu", seed: int = 0) -> None:
        """Draw entries and signs: 5 bytes a column on the device.

        Args:
            dimension: D, at least 1.
            width: P, from 1 to 2^31 - 1.
            device: where gradients are.
            seed: of the hash.

        Raises:
            ValueError: there are no columns, or no numbers to project them to.
        """
        if dimension < 1 or not 1 <= width < 2**31:
            raise ValueError(f"no projection of {dimension} columns to {width} numbers; give 1 or more of each")
        self.dimension, self.width = dimension, width
        self._entries_D = torch.empty(dimension, dtype=torch.int32, device=device)
        self._signs_D = torch.empty(dimension, dtype=torch.int8, device=device)
        stream = np.random.Philox(key=seed)
        for columns in column_blocks(dimension, DRAWN_AT_ONCE):
            raw_C = stream.random_raw(columns.stop - columns.start)
            # A remainder, which leaves the same one by each divisor of the width: see `fold`.
            self._entries_D[columns] = torch.from_numpy(((raw_C >> 1) % width).astype(np.int32))
            self._signs_D[columns] = torch.from_numpy(1 - 2 * (raw_C & 1).astype(np.int8))

    @torch.no_grad()
    def project(
        self, rows_ND: torch.Tensor, normalise: bool = False, parts: Sequence[slice] | None = None
    ) -> torch.Tensor:
        """Project rows as a sketch sees them; on a processor, no bit of a row's numbers depends on the other rows.

        Args:
            rows_ND: [N, D] of any float type, on the device; read only, one block of columns at a time.
            normalise: see `OnlineSVD.update`, which scales rows alike.
            parts: see there.

        Returns:
            [N, P] float32 on the device, summed in float32.

        Raises:
            NonFiniteRowError: a row is not finite.
            ValueError: D differs, or see `OnlineSVD.update`.
        """
        if rows_ND.ndim != 2 or rows_ND.shape[1] != self.dimension:
            raise ValueError(f"rows have the shape {tuple(rows_ND.shape)}, this projection takes N x {self.dimension}")
        slices_S = column_parts(self.dimension, parts, normalise)
        squares_SN = row_squares(rows_ND, slices_S)
        whole_N, _ = whole_scale(squares_SN, normalise, 0)
        projection_NP = rows_ND.new_zeros(rows_ND.shape[0], self.width, dtype=torch.float32)
        for columns, squares_N in zip(slices_S, squares_SN, strict=True):
            scale_N = ((unit_scale(squares_N) if normalise else 1.0) * whole_N).float()
            part_ND, entries, signs = rows_ND[:, columns], self._entries_D[columns], self._signs_D[columns]
            for block in blocks_of(part_ND, COLUMNS_AT_ONCE):
                block_NC = (part_ND[:, block].float() * scale_N[:, None]).mul_(signs[block])
                _add(projection_NP, entries[block].long(), block_NC)
        return projection_NP


def _add(projection_NP: torch.Tensor, entries_C: torch.Tensor, block_NC: torch.Tensor) -> None:
    """Add each column to its entry, in an order that does not change from one call to the next."""
    if projection_NP.device.type == "cpu":
        projection_NP.scatter_add_(1, entries_C.expand(block_NC.shape), block_NC)
    else:
        # An accelerator scatters in any order, and this by sorted entries.
        projection_NP.T.index_put_((entries_C,), block_NC.T, accumulate=True)


def fold(projection_NP: ArrayT, width: int) -> ArrayT:
    """A narrower projection out of a wider one, [N, width]: that of the same seed, to rounding.

    Args:
        projection_NP: [N, P].
        width: a divisor of P.

    Raises:
        ValueError: it is none.
    """
    if width < 1 or projection_NP.shape[1] % width:
        raise ValueError(f"{projection_NP.shape[1]} numbers cannot be folded to {width}; give a divisor")
    return projection_NP.reshape(projection_NP.shape[0], projection_NP.shape[1] // width, width).sum(1)
