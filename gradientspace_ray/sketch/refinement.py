"""One more pass over the gradients, which turns a finished sketch into a better one of the same size.

With V the rows of the sketch, scaled to unit length, the pass gathers Y = G V^T (N x K) and Z = Y^T G (K x D). Y has a
row for each example, and Z is a sum over them: Z of a union is the sum. The columns of U = Y W, for any W with
W^T (Y^T Y) W = I, are an orthonormal basis of what Y spans, and R = W^T Z = U^T G exactly, so that the ledger of
`online_svd.py` holds. This is one step of subspace (power) iteration on the space of examples, with a Rayleigh-Ritz
step at its end (Halko, Martinsson, Tropp 2011, arXiv 0909.4061, algorithms 4.4 and 5.1).

What is guaranteed, to rounding, with R_1 = U_1^T G the rows of the first sketch, V_1 an orthonormal basis of what they
span (d x D), and s_i the i-th largest singular value: for every i,
    s_i(R_1) <= s_i(G V_1^T) <= s_i(R) <= s_i(G),
because R_1 V_1^T = U_1^T (G V_1^T), and G V_1^T = U (U^T G V_1^T) = U (R V_1^T). So at any rank the second sketch
captures no less than the first; and at rank K its ledger counts at most ||G - G V_1^T V_1||_F^2 as lost, which after
Frequent Directions has the bound that `shrunk_directions` states. A single example may lose.

Shapes: N examples, B of them at once, D gradient entries, K rows of the basis, R directions kept, P parts of columns.
"""

from collections.abc import Sequence

import torch

from gradientspace_ray.sketch.directions import blocks_of, rotate, top_directions
from gradientspace_ray.sketch.online_svd import TURNED_AT_ONCE, column_parts, unit_scale, whole_scale

ROWS_AT_ONCE = 256
"""Examples between two roundings of the sums to float32."""
DEPENDENT = 2.0**-23
"""Below this eigenvalue of the matrix of cosines between the columns of Y, a direction of theirs is left out: see
`refined_directions`."""


class Refinement:
    """What a second pass gathers.

    Attributes:
        sums: Z, [K, D] float32 on the device of the basis. Entries are of the order of a squared gradient: norms of
            rows must lie between about 1e-18 and 1e18.
        projections: Y, [N, K] float64 on the CPU, in the order of the updates.
        row_energies: [N] float64 on the CPU, the squared norm of each row as absorbed, after scaling.
    """

    def __init__(self, basis_KD: torch.Tensor) -> None:
        """Begin a pass.

        Args:
            basis_KD: [K, D] of any float type, on any device: rows of a finished sketch. Read only, and held; zero
                rows stay zero.
        """
        squares_K = torch.zeros(basis_KD.shape[0], dtype=torch.float64, device=basis_KD.device)
        for columns in blocks_of(basis_KD):
            squares_K += basis_KD[:, columns].double().square().sum(dim=1)
        self._basis_KD, self._scale_K = basis_KD, unit_scale(squares_K)
        self.sums = torch.zeros(basis_KD.shape, dtype=torch.float32, device=basis_KD.device)
        self.projections = torch.zeros(0, basis_KD.shape[0], dtype=torch.float64)
        self.row_energies = torch.zeros(0, dtype=torch.float64)

    @property
    def energy_total(self) -> float:
        """Squared Frobenius norm of all rows as absorbed."""
        return float(self.row_energies.sum())

    @torch.no_grad()
    def update(self, rows_ND: torch.Tensor, normalise: bool = False, parts: Sequence[slice] | None = None) -> None:
        """Absorb rows, which are read twice, `ROWS_AT_ONCE` at a time.

        Args:
            rows_ND: [N, D] of any float type, on the device of the basis; read only.
            normalise: see `OnlineSVD.update`, which scales rows alike.
            parts: see there.

        Raises:
            NonFiniteRowError: a row is not finite; the `ROWS_AT_ONCE` before it stay absorbed.
            ValueError: D is not the basis's, or see `OnlineSVD.update`.
        """
        width = self.sums.shape[1]
        if rows_ND.ndim != 2 or rows_ND.shape[1] != width:
            raise ValueError(f"rows have the shape {tuple(rows_ND.shape)}, this basis takes N x {width}")
        slices_P = column_parts(width, parts, normalise)
        for start in range(0, rows_ND.shape[0], ROWS_AT_ONCE):
            self._absorb(rows_ND[start : start + ROWS_AT_ONCE], slices_P, normalise, start)

    def _absorb(self, rows_BD: torch.Tensor, slices_P: Sequence[slice], normalise: bool, first_row: int) -> None:
        projections_BK, scales_PB, energies_B = self._project(rows_BD, slices_P, normalise, first_row)
        for columns, scale_B in zip(slices_P, scales_PB, strict=True):
            rows_part_BD, sums_part_KD = rows_BD[:, columns], self.sums[:, columns]
            weights_BK = scale_B[:, None] * projections_BK
            for block in blocks_of(sums_part_KD, TURNED_AT_ONCE):
                share = rotate([rows_part_BD[:, block]], weights_BK)
                sums_part_KD[:, block] = sums_part_KD[:, block].double() + share
        self.projections = torch.cat([self.projections, projections_BK.cpu()])
        self.row_energies = torch.cat([self.row_energies, energies_B.cpu()])

    def _project(
        self, rows_BD: torch.Tensor, slices_P: Sequence[slice], normalise: bool, first_row: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scaled rows times the basis [B, K], the scale of each part [P, B], and squared norms [B] after scaling."""
        projections_BK = rows_BD.new_zeros(rows_BD.shape[0], self.sums.shape[0], dtype=torch.float64)
        squares_PB = rows_BD.new_zeros(len(slices_P), rows_BD.shape[0], dtype=torch.float64)
        scales_PB = torch.ones_like(squares_PB)
        for index, columns in enumerate(slices_P):
            rows_part_BD, basis_part_KD = rows_BD[:, columns], self._basis_KD[:, columns]
            products_BK = torch.zeros_like(projections_BK)
            for block in blocks_of(rows_part_BD):
                rows = rows_part_BD[:, block].double()
                squares_PB[index] += rows.square().sum(dim=1)
                products_BK.addmm_(rows, basis_part_KD[:, block].double().T)
            if normalise:
                scales_PB[index] = unit_scale(squares_PB[index])
            projections_BK += scales_PB[index][:, None] * products_BK
        whole_B, energies_B = whole_scale(squares_PB, normalise, first_row)
        return projections_BK * whole_B[:, None] * self._scale_K, scales_PB * whole_B, energies_B


def refined_directions(
    gram_KK: torch.Tensor, projections_gram_KK: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What turns the sums of a second pass into a sketch: R = directions^T Z, with coordinates U = Y directions.

    With A = Z Z^T, M = Y^T Y and W^T M W = I, the eigenvectors of W^T A W of the `rank` largest eigenvalues make the
    rows of R orthogonal. W comes from the eigenvectors of D M D, the cosines between the columns of Y, D their inverse
    lengths: these are of the order of singular values and may span many magnitudes, so that M is ill-conditioned even
    where the columns are orthogonal (van der Sluis 1969: no other scaling makes it better by more than a factor K).

    Where columns of Y depend on each other, as those of a rank-deficient sketch do, W has fewer than K columns. A
    direction with the eigenvalue m of D M D multiplies the rounding of Z, 2^-24 of ||G||, by 1 / sqrt(m); left out, it
    takes at most m ||G||^2 off the energy that is guaranteed. `DEPENDENT`, the rounding of float32, bounds the first
    by 2e-4 of ||G|| in that one direction (the ledger feels its square, and what of it lies along R), and the second
    by 1.2e-7 of ||G||^2.

    Args:
        gram_KK: A, [K, K] float64.
        projections_gram_KK: M, [K, K] float64.
        rank: most directions kept, at least 1.

    Returns:
        (directions [K, R], singular values of G's projection [R] falling), both float64; R is at most `rank` and the
        rank of Y, and 0 if that is zero.
    """
    scale_K = unit_scale(projections_gram_KK.diagonal())
    cosines_K, vectors_KK = torch.linalg.eigh(projections_gram_KK * torch.outer(scale_K, scale_K))
    independent = cosines_K > DEPENDENT
    whitening = scale_K[:, None] * vectors_KK[:, independent] * cosines_K[independent].rsqrt()
    if not whitening.shape[1]:
        return whitening, torch.zeros(0, dtype=torch.float64)
    directions, singular_values_R = top_directions(whitening.T @ gram_KK @ whitening, rank)
    return whitening @ directions, singular_values_R
