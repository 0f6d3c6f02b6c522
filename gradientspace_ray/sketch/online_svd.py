"""Online SVD of a stream of gradients, with an exact ledger of its own error.

For a buffer of b rows G_b beside the k rows R kept so far: S = [R; G_b], C = S S^T = Q L Q^T, and with Q_k the columns
of the k largest eigenvalues
    R <- Q_k^T S        U <- [U Q_k,top ; Q_k,bottom].
By induction U has orthonormal columns and R = U^T G for all rows G seen so far, so U R is the projection U U^T G and
||G - U R||_F^2 = ||G||_F^2 - ||R||_F^2: the error is known without keeping G. (Incremental SVD: Brand 2002; Ross et
al. 2008. Merging partial results: Iwen and Ong, arXiv 1601.07010. The choice of the k directions is greedy; unlike
Frequent Directions, arXiv 1501.01711, it has no bound in advance.)

Rows are stored in float32; every product is taken in float64, one block of columns at a time.

Shapes: N rows seen so far, B rows of a buffer, S = K + B stacked rows, D gradient entries, K rows kept.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

COLUMNS_AT_ONCE = 2**14
"""Columns that are promoted to float64 at once."""


class Energy(NamedTuple):
    """Squared Frobenius norms: of all rows seen, and of their projection that the sketch keeps."""

    total: float = 0.0
    captured: float = 0.0

    @property
    def share(self) -> float:
        """Captured over total; 1 when there is nothing to capture."""
        return self.captured / self.total if self.total else 1.0


class NonFiniteRowError(ValueError):
    """A row that holds nan or infinity; `row` is its index among the rows of the update."""

    def __init__(self, row: int) -> None:
        super().__init__(f"row {row} of the update is not finite; the model or its precision is at fault")
        self.row = row


class OnlineSVD:
    """A sketch of the rows seen so far: `rows` R (K x D) and `coordinates` U (N x K), G being close to U R.

    Attributes:
        rank: most rows kept; a sketch of fewer than `rank` rows is exact.
        buffer_rows: rows absorbed at once, b = sqrt(2) rank, where the cost of a row is least: the Gram matrix and the
            rotation of b rows take (k + b)^2 D + k (k + b) D multiply-adds.
        coordinates: [N, K] float64 on the CPU, orthonormal columns; row i is about the i-th row seen.
        singular_values: [K] float64 on the CPU, falling; the norms of `rows`.
        energy: the ledger.
    """

    def __init__(self, rank: int) -> None:
        """Make an empty sketch.

        Args:
            rank: most rows kept, at least 1.

        Raises:
            ValueError: the rank is below 1.
        """
        if rank < 1:
            raise ValueError(f"a sketch keeps at least one row, got rank {rank}")
        self.rank = rank
        self.buffer_rows = math.ceil(math.sqrt(2) * rank)
        self.coordinates = torch.zeros(0, 0, dtype=torch.float64)
        self.singular_values = torch.zeros(0, dtype=torch.float64)
        self.energy = Energy()
        self._store_KD: torch.Tensor | None = None

    @classmethod
    def from_parts(
        cls,
        rank: int,
        rows_KD: torch.Tensor,
        coordinates_NK: torch.Tensor,
        singular_values_K: torch.Tensor,
        energy: Energy,
    ) -> "OnlineSVD":
        """A sketch out of what another one held; `rows_KD` is copied."""
        sketch = cls(rank)
        sketch.coordinates = coordinates_NK.to("cpu", torch.float64)
        sketch.singular_values = singular_values_K.to("cpu", torch.float64)
        sketch.energy = energy
        if coordinates_NK.shape[0]:
            sketch._store_for(rows_KD)[: rows_KD.shape[0]] = rows_KD
        return sketch

    @property
    def rows(self) -> torch.Tensor:
        """R, [K, D] float32, orthogonal rows of falling norm; a view that the next update overwrites."""
        if self._store_KD is None:
            return torch.zeros(0, 0)
        return self._store_KD[: self.singular_values.shape[0]]

    @property
    def dimension(self) -> int:
        """D; 0 before the first row."""
        return self.rows.shape[1]

    @torch.no_grad()
    def update(self, rows_ND: torch.Tensor, normalise: bool = False) -> None:
        """Absorb rows, `buffer_rows` at a time.

        Args:
            rows_ND: [N, D] of any float type, on any device, the same one each time; read only.
            normalise: scale each row to unit length first, at no extra pass over the rows (their norms stand on the
                diagonal of C). A zero row stays zero.

        Raises:
            NonFiniteRowError: a row is not finite; whole buffers before it stay absorbed.
            ValueError: D differs from the rows before.
        """
        self._check_width(rows_ND)
        for start in range(0, rows_ND.shape[0], self.buffer_rows):
            rows_BD = rows_ND[start : start + self.buffer_rows]
            gram_SS = gram([self.rows, rows_BD])
            kept = gram_SS.shape[0] - rows_BD.shape[0]
            squares_B = gram_SS.diagonal()[kept:]
            if not bool(squares_B.isfinite().all()):
                raise NonFiniteRowError(start + int((~squares_B.isfinite()).nonzero()[0]))
            scale_S = torch.ones(gram_SS.shape[0], dtype=torch.float64)
            if normalise:
                scale_S[kept:] = torch.where(squares_B > 0, squares_B.rsqrt(), 0.0)
                squares_B = (squares_B > 0).double()
            directions_SK, singular_values_K = top_directions(scale_S[:, None] * gram_SS * scale_S, self.rank)
            self._turn([self.rows, rows_BD], scale_S[:, None] * directions_SK)
            self.coordinates = torch.cat([self.coordinates @ directions_SK[:kept], directions_SK[kept:]])
            self._settle(singular_values_K, self.energy.total + float(squares_B.sum()))

    @torch.no_grad()
    def merge(self, other: "OnlineSVD") -> None:
        """Absorb another sketch, whose examples follow this one's; `rank` stays, `other` is left as it is.

        Raises:
            ValueError: the sketches differ in D.
        """
        if not other.coordinates.shape[0]:
            return
        self._check_width(other.rows)
        directions_SK, singular_values_K = top_directions(gram([self.rows, other.rows]), self.rank)
        kept = self.rows.shape[0]
        self._turn([self.rows, other.rows], directions_SK)
        self.coordinates = torch.cat(
            [self.coordinates @ directions_SK[:kept], other.coordinates @ directions_SK[kept:]]
        )
        self._settle(singular_values_K, self.energy.total + other.energy.total)

    def _settle(self, singular_values_K: torch.Tensor, energy_total: float) -> None:
        self.singular_values = singular_values_K
        self.energy = Energy(energy_total, float(singular_values_K.square().sum()))

    def _turn(self, parts: Sequence[torch.Tensor], weights_SK: torch.Tensor) -> None:
        """Replace the rows by `weights_SK^T [parts]`, in place: a block is read whole before it is overwritten."""
        store_KD = self._store_for(parts[-1])
        for columns in column_blocks(store_KD.shape[1]):
            turned = rotate([part[:, columns] for part in parts if part.shape[0]], weights_SK)
            store_KD[: turned.shape[0], columns] = turned

    def reserve(self, dimension: int, device: torch.device | str) -> None:
        """Take the memory of the rows now, and not with the first of them."""
        self._store_KD = torch.empty(self.rank, dimension, dtype=torch.float32, device=device)

    def _store_for(self, like_ND: torch.Tensor) -> torch.Tensor:
        if self._store_KD is None:
            self.reserve(like_ND.shape[1], like_ND.device)
        assert self._store_KD is not None
        return self._store_KD

    def _check_width(self, rows_ND: torch.Tensor) -> None:
        if rows_ND.ndim != 2 or (self._store_KD is not None and rows_ND.shape[1] != self.dimension):
            wanted = f"N x {self.dimension}" if self._store_KD is not None else "N x D"
            raise ValueError(f"rows have the shape {tuple(rows_ND.shape)}, this sketch takes {wanted}")


def column_blocks(width: int, columns: int = COLUMNS_AT_ONCE) -> list[slice]:
    """`width` columns cut into slices of `columns`, the last one shorter."""
    return [slice(start, min(start + columns, width)) for start in range(0, width, columns)]


def gram(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Inner products of stacked rows, summed in float64; Grams of column blocks add up to the whole one's.

    Args:
        parts: matrices of equal width; those without rows may have any width.

    Returns:
        [S, S] float64 on the CPU, S the rows of all parts together.
    """
    filled = [part for part in parts if part.shape[0]]
    total_rows = sum(part.shape[0] for part in filled)
    device = filled[0].device
    gram_SS = torch.zeros(total_rows, total_rows, dtype=torch.float64, device=device)
    for columns in column_blocks(filled[0].shape[1]):
        block = torch.cat([part[:, columns].double() for part in filled])
        gram_SS.addmm_(block, block.T)
    return gram_SS.cpu()


def top_directions(gram_SS: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The leading eigenvectors of a Gram matrix, and the singular values of the rows that it is made of.

    Signs are fixed (the largest entry of each vector is positive), so that equal input gives equal output.

    Returns:
        ([S, K] orthonormal columns, [K] falling), both float64, K = min(rank, S).
    """
    values_S, vectors_SS = torch.linalg.eigh(gram_SS)
    directions_SK = vectors_SS[:, -rank:].flip(1)
    largest_K = directions_SK.abs().argmax(dim=0)
    signs_K = directions_SK.gather(0, largest_K[None])[0].sign()
    return directions_SK * signs_K, values_S[-rank:].flip(0).clamp(min=0).sqrt()


def rotate(parts: Sequence[torch.Tensor], weights_SK: torch.Tensor) -> torch.Tensor:
    """`weights_SK^T` times the stacked rows of a column block.

    Returns:
        [K, columns] float64, on the device of the parts.
    """
    block = torch.cat([part.double() for part in parts])
    return weights_SK.T.to(block.device) @ block
