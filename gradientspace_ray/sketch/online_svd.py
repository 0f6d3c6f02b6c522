"""Online SVD of a stream of gradients, with an exact ledger of its own error.

For a buffer of b rows G_b beside the k rows R kept so far: S = [R; G_b], C = S S^T = Q L Q^T, and with Q_k the columns
of the k largest eigenvalues
    R <- Q_k^T S        U <- [U Q_k,top ; Q_k,bottom].
By induction U has orthonormal columns and R = U^T G for all rows G seen so far, so U R is the projection U U^T G and
||G - U R||_F^2 = ||G||_F^2 - ||R||_F^2: the error is known without keeping G. (Incremental SVD: Brand 2002; Ross et
al. 2008. Merging partial results: Iwen and Ong, arXiv 1601.07010.) This holds for any orthonormal Q_k. The choice above
is greedy and has no bound in advance: a direction below the cut in every buffer is lost, however large it is in sum.
Frequent Directions (Ghashami, Liberty, Phillips, Woodruff, arXiv 1501.01711) has a bound, because it takes from the
kept directions what it takes from the lost. Here it chooses Q_k, and the ledger stays exact: see `shrunk_directions`.

What the greedy choice loses, it loses at the cut, so the sketch carries more rows than it shows: with twice as many,
one pass over the gradients of a language model, whose spectrum is flat, keeps 0.99 of what the exact SVD would, and
0.93 with no more (Halko, Martinsson, Tropp, arXiv 0909.4061, call this oversampling). All above holds for the leading
rows, too.

Inner products are taken in float64, rows are turned in float32, one block of columns at a time.

Shapes: N rows seen so far, B rows of a buffer, S = C + B stacked rows, D gradient entries, C rows carried, K <= C rows
shown, P parts of the columns.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch

from gradientspace_ray.sketch.directions import (
    blocks_of,
    gram,
    rotate,
    row_squares,
    shrunk_directions,
    top_directions,
)

Shrink = Literal["none", "frequent_directions"]
TURNED_AT_ONCE = 2**14
"""Columns of the rows that a processor turns before they are overwritten; see `blocks_of` for other devices."""
STORED = (torch.float32, torch.bfloat16)
SHORTEST_SQUARE = 2.0**-252
"""Of the length of a row that is scaled: a shorter one counts as zero, for float32 has not the scale that it takes."""
Scales = Sequence[tuple[slice, torch.Tensor]]  # columns, and the [S] factors of the stacked rows there


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
        rank: most rows shown; a sketch of at most `carried` rows is exact.
        carried: most rows carried, `rank` and the oversampling.
        shrink: how directions are chosen, `none` (greedy) or `frequent_directions`. The bound of the latter is on the
            error of G projected on what the carried rows span, which takes a second pass (`refinement.py`); U R and the
            ledger have none.
        dtype: of the stored rows. bfloat16 halves them, for tens of updates: R = U^T G then holds to about 1e-3 of
            ||G|| times the square root of their number, and the ledger to about 4e-3 of ||G||^2 at D = 50, and 1e-4 at
            D = 50,000. Each of hundreds adds less than bfloat16 can tell to a direction that all rows share, so that
            the ledger may be off by a third; merges of equal sketches add enough.
        buffer_rows: rows absorbed at once, b = c with c rows carried: the Gram matrix and the rotation of b rows take
            (c + b)^2 D / 2 + c (c + b) D multiply-adds, a row the least at b = sqrt(3) c, and 7 % more at c.
        energy_total: squared Frobenius norm of all rows seen.
        row_energies: [N] float64 on the CPU, the squared norm of each row as absorbed, after scaling.
        weights: T, [C, C] float64 on the CPU: T R is the Frequent Directions sketch of the rows seen. None without
            shrinking.
        shrunk: Delta, see `shrunk_directions`; 0 without shrinking, where it says nothing.
    """

    def __init__(
        self,
        rank: int,
        shrink: Shrink = "none",
        dtype: torch.dtype = torch.float32,
        oversampling: int | None = None,
    ) -> None:
        """Make an empty sketch.

        Args:
            rank: most rows shown, at least 1.
            shrink: see the class.
            dtype: of the stored rows, float32 or bfloat16.
            oversampling: rows carried beyond `rank`; None: as many more.

        Raises:
            ValueError: the rank is below 1, the oversampling below 0, or there is no such `shrink` or `dtype`.
        """
        if rank < 1:
            raise ValueError(f"a sketch keeps at least one row, got rank {rank}")
        if oversampling is not None and oversampling < 0:
            raise ValueError(f"oversampling adds rows, got {oversampling}")
        if shrink not in get_args(Shrink):
            raise ValueError(f"shrink={shrink!r}: give one of {', '.join(get_args(Shrink))}")
        if dtype not in STORED:
            raise ValueError(f"dtype={dtype}: give one of {', '.join(map(str, STORED))}")
        self.rank, self.shrink, self.dtype = rank, shrink, dtype
        self.carried = rank + (rank if oversampling is None else oversampling)
        self.buffer_rows = self.carried
        self._coordinates_NC = torch.zeros(0, 0, dtype=torch.float64)
        self._singular_values_C = torch.zeros(0, dtype=torch.float64)
        # Rows that were only put beside the others: S, whose directions are found when they are asked for.
        self._is_stacked = False
        self.energy_total = 0.0
        self.row_energies = torch.zeros(0, dtype=torch.float64)
        self.weights = None if shrink == "none" else torch.zeros(0, 0, dtype=torch.float64)
        self.shrunk = 0.0
        self._store_CD: torch.Tensor | None = None

    @classmethod
    def from_parts(
        cls,
        rank: int,
        oversampling: int,
        rows_CD: torch.Tensor,
        coordinates_NC: torch.Tensor,
        singular_values_C: torch.Tensor,
        row_energies_N: torch.Tensor,
        energy_total: float,
        shrink: Shrink = "none",
        weights_CC: torch.Tensor | None = None,
        shrunk: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> "OnlineSVD":
        """A sketch out of what another one carried; `rows_CD` is copied.

        Raises:
            ValueError: see `__init__`; or the shapes do not fit, or there are weights without shrinking or the reverse.
        """
        sketch = cls(rank, shrink, dtype, oversampling)
        count, kept = coordinates_NC.shape
        fits = len(rows_CD) == len(singular_values_C) == kept <= sketch.carried and len(row_energies_N) == count
        if not fits or (weights_CC is None) != (shrink == "none"):
            raise ValueError(f"these are not the parts of one sketch of rank {rank} with shrink={shrink!r}")
        sketch._coordinates_NC = coordinates_NC.to("cpu", torch.float64)
        sketch._singular_values_C = singular_values_C.to("cpu", torch.float64)
        sketch.row_energies = row_energies_N.to("cpu", torch.float64)
        sketch.weights = None if weights_CC is None else weights_CC.to("cpu", torch.float64)
        sketch.energy_total, sketch.shrunk = energy_total, shrunk
        if count:
            sketch._store_for(rows_CD)[:kept] = rows_CD
        return sketch

    @property
    def rows(self) -> torch.Tensor:
        """R, [K, D] of `dtype`, orthogonal rows of falling norm; a view that the next update overwrites."""
        return self.carried_rows[: self.rank]

    @property
    def coordinates(self) -> torch.Tensor:
        """U, [N, K] float64 on the CPU, orthonormal columns; row i is about the i-th row seen."""
        return self.carried_coordinates[:, : self.rank]

    @property
    def singular_values(self) -> torch.Tensor:
        """[K] float64 on the CPU, falling; the norms of `rows`."""
        return self.carried_singular_values[: self.rank]

    @property
    def energy(self) -> Energy:
        """The ledger of the rows shown."""
        return Energy(self.energy_total, float(self.singular_values.square().sum()))

    @property
    def carried_rows(self) -> torch.Tensor:
        """[C, D] of `dtype`, of which `rows` are the leading ones."""
        self._settle()
        return self._rows

    @property
    def carried_coordinates(self) -> torch.Tensor:
        """[N, C] float64 on the CPU, orthonormal columns; row i is about the i-th row seen."""
        self._settle()
        return self._coordinates_NC

    @property
    def carried_singular_values(self) -> torch.Tensor:
        """[C] float64 on the CPU, falling; the norms of `carried_rows`."""
        self._settle()
        return self._singular_values_C

    @property
    def dimension(self) -> int:
        """D; 0 before the first row."""
        return 0 if self._store_CD is None else self._store_CD.shape[1]

    @property
    def _rows(self) -> torch.Tensor:
        if self._store_CD is None:
            return torch.zeros(0, 0, dtype=self.dtype)
        return self._store_CD[: self._coordinates_NC.shape[1]]

    @torch.no_grad()
    def update(self, rows_ND: torch.Tensor, normalise: bool = False, parts: Sequence[slice] | None = None) -> None:
        """Absorb rows, `buffer_rows` at a time.

        Args:
            rows_ND: [N, D] of any float type, on any device, the same one each time; read only.
            normalise: scale each row to unit length first, at no extra pass over the rows (their norms stand on the
                diagonal of C). A zero row stays zero, and one shorter than 2^-126 becomes zero.
            parts: slices of the columns, all of them in order: scale each part of a row to one length before that, so
                that all count alike. A zero part stays zero.

        Raises:
            NonFiniteRowError: a row is not finite; whole buffers before it stay absorbed.
            ValueError: D differs from the rows before, the parts do not cover the columns, or they are given without
                `normalise`.
        """
        self._check_width(rows_ND)
        slices_P = column_parts(rows_ND.shape[1], parts, normalise)
        for start in range(0, rows_ND.shape[0], self.buffer_rows):
            rows_BD = rows_ND[start : start + self.buffer_rows]
            fits = self._rows.shape[0] + rows_BD.shape[0] <= self.carried
            (self._append if fits else self._absorb)(rows_BD, slices_P, normalise, start)

    def _append(self, rows_BD: torch.Tensor, slices_P: Sequence[slice], normalise: bool, first_row: int) -> None:
        """Put rows beside those that are carried, where there is room: R = U^T G holds as it is."""
        squares_PB = row_squares(rows_BD, slices_P).cpu()
        whole_B, energies_B = whole_scale(squares_PB, normalise, first_row)
        store_CD, count = self._store_for(rows_BD), rows_BD.shape[0]
        new = slice(self._rows.shape[0], self._rows.shape[0] + count)
        for columns, squares_B in zip(slices_P, squares_PB, strict=True):
            scale_B = ((unit_scale(squares_B) if normalise else 1.0) * whole_B).to(rows_BD.device)
            part_CD, part_BD = store_CD[new, columns], rows_BD[:, columns]
            for block in blocks_of(part_BD, TURNED_AT_ONCE):
                part_CD[:, block] = part_BD[:, block].double() * scale_B[:, None]
        unit_BB = torch.eye(count, dtype=torch.float64)
        self._coordinates_NC = torch.block_diag(self._coordinates_NC, unit_BB)
        self.weights = None if self.weights is None else torch.block_diag(self.weights, unit_BB)
        self._note(energies_B)
        self._is_stacked = True

    def _settle(self) -> None:
        """Turn rows that were put beside each other to orthogonal ones."""
        if self._is_stacked:
            none_MC = torch.zeros(0, 0, dtype=torch.float64)
            scales = [(slice(None), torch.ones(self._rows.shape[0], dtype=torch.float64))]
            self._combine(self._rows[:0], gram([self._rows]), scales, none_MC, none_MC)

    def _note(self, row_energies_N: torch.Tensor) -> None:
        self.row_energies = torch.cat([self.row_energies, row_energies_N])
        self.energy_total += float(row_energies_N.sum())

    def _absorb(self, rows_BD: torch.Tensor, slices_P: Sequence[slice], normalise: bool, first_row: int) -> None:
        """One buffer; the Gram matrices of the parts are scaled from their own diagonals, and added."""
        size = self._rows.shape[0] + rows_BD.shape[0]
        gram_SS = torch.zeros(size, size, dtype=torch.float64)
        squares_PB = torch.zeros(len(slices_P), rows_BD.shape[0], dtype=torch.float64)
        scales_PS = torch.ones(len(slices_P), size, dtype=torch.float64)
        new = slice(self._rows.shape[0], size)
        for index, columns in enumerate(slices_P):
            part_SS = gram([self._rows[:, columns], rows_BD[:, columns]])
            squares_PB[index] = part_SS.diagonal()[new]
            if normalise:
                scales_PS[index, new] = unit_scale(squares_PB[index])
            # Not scale * part * scale, which rounds the two halves differently.
            gram_SS += part_SS * torch.outer(scales_PS[index], scales_PS[index])
        whole_B, energies_B = whole_scale(squares_PB, normalise, first_row)
        whole_S = torch.cat([torch.ones(new.start, dtype=torch.float64), whole_B])
        gram_SS *= torch.outer(whole_S, whole_S)
        unit_BB = torch.eye(rows_BD.shape[0], dtype=torch.float64)
        self._combine(rows_BD, gram_SS, list(zip(slices_P, scales_PS * whole_S, strict=True)), unit_BB, unit_BB)
        self._note(energies_B)

    @torch.no_grad()
    def merge(self, other: "OnlineSVD") -> None:
        """Absorb another sketch, whose examples follow this one's; `rank` and `carried` stay, `other` is left as it is.

        Raises:
            ValueError: the sketches differ in D or in `shrink`.
        """
        if other.shrink != self.shrink:
            raise ValueError(f"a sketch with shrink={self.shrink!r} cannot absorb one with shrink={other.shrink!r}")
        if not other._coordinates_NC.shape[0]:
            return
        self._check_width(other._rows)
        gram_SS = gram([self._rows, other._rows])
        scales = [(slice(None), torch.ones(gram_SS.shape[0], dtype=torch.float64))]
        self._combine(other._rows, gram_SS, scales, other._coordinates_NC, other.weights)
        self.shrunk += other.shrunk
        self._note(other.row_energies)

    def _combine(
        self,
        rows_MD: torch.Tensor,
        gram_SS: torch.Tensor,
        scales: Scales,
        coordinates_NM: torch.Tensor,
        weights_MM: torch.Tensor | None,
    ) -> None:
        """One step on S = [R; M more rows], scaled part by part, with the Gram matrix of what is scaled."""
        if self.weights is None or weights_MM is None:
            directions_SC, singular_values_C = top_directions(gram_SS, self.carried)
        else:
            weights_SS = torch.block_diag(self.weights, weights_MM)
            directions_SC, singular_values_C, self.weights, delta = shrunk_directions(gram_SS, self.carried, weights_SS)
            self.shrunk += delta
        kept = self._rows.shape[0]
        self._turn([self._rows, rows_MD], directions_SC, scales)
        self._coordinates_NC = torch.cat(
            [self._coordinates_NC @ directions_SC[:kept], coordinates_NM @ directions_SC[kept:]]
        )
        self._singular_values_C = singular_values_C
        self._is_stacked = False

    def _turn(self, matrices: Sequence[torch.Tensor], directions_SC: torch.Tensor, scales: Scales) -> None:
        """Replace the rows by those of `directions_SC^T [matrices]`; a block is read whole before it is overwritten."""
        store_CD = self._store_for(matrices[-1])
        for columns, scale_S in scales:
            part_CD, parts = store_CD[:, columns], [matrix[:, columns] for matrix in matrices if matrix.shape[0]]
            weights_SC = (scale_S[:, None] * directions_SC).to(store_CD.device)
            for block in blocks_of(part_CD, TURNED_AT_ONCE):
                turned = rotate([part[:, block] for part in parts], weights_SC)
                part_CD[: turned.shape[0], block] = turned

    def reserve(self, dimension: int, device: torch.device | str) -> None:
        """Take the memory of the rows now, and not with the first of them."""
        self._store_CD = torch.empty(self.carried, dimension, dtype=self.dtype, device=device)

    def _store_for(self, like_ND: torch.Tensor) -> torch.Tensor:
        if self._store_CD is None:
            self.reserve(like_ND.shape[1], like_ND.device)
        assert self._store_CD is not None
        return self._store_CD

    def _check_width(self, rows_ND: torch.Tensor) -> None:
        if rows_ND.ndim != 2 or (self._store_CD is not None and rows_ND.shape[1] != self.dimension):
            wanted = f"N x {self.dimension}" if self._store_CD is not None else "N x D"
            raise ValueError(f"rows have the shape {tuple(rows_ND.shape)}, this sketch takes {wanted}")


def column_parts(width: int, parts: Sequence[slice] | None, normalise: bool) -> list[slice]:
    """The slices that are scaled apart; one of all `width` columns without `parts`.

    Raises:
        ValueError: see `OnlineSVD.update`.
    """
    if parts is None:
        return [slice(0, width)]
    if not normalise:
        raise ValueError("parts say what is scaled to one length; give normalise=True with them")
    ends = [0, *(part.stop for part in parts)]
    covered = [part.start for part in parts] == ends[:-1] and ends[-1] == width and ends == sorted(ends)
    if not covered or any(part.step not in (None, 1) for part in parts):
        raise ValueError(f"parts must cover the {width} columns in order, each from where the one before ends")
    return list(parts)


def unit_scale(squares: torch.Tensor) -> torch.Tensor:
    """What brings rows of these squared norms to unit length; 0 for a row that counts as zero."""
    return torch.where(squares >= SHORTEST_SQUARE, squares.rsqrt(), 0.0)


def whole_scale(squares_PB: torch.Tensor, normalise: bool, first_row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What scales whole rows, once each part of them has been scaled by `unit_scale` if they are normalised.

    Args:
        squares_PB: [P, B] float64, squared norms of the parts of each row as it came.
        normalise: to unit length.
        first_row: index of the first of the rows in the update.

    Returns:
        ([B] scales, [B] squared norms of the rows as absorbed).

    Raises:
        NonFiniteRowError: a squared norm is not finite.
    """
    squares_B = squares_PB.sum(dim=0)
    if not bool(squares_B.isfinite().all()):
        raise NonFiniteRowError(first_row + int((~squares_B.isfinite()).nonzero()[0]))
    if not normalise:
        return torch.ones_like(squares_B), squares_B
    parts_B = (squares_PB >= SHORTEST_SQUARE).sum(dim=0).double()
    return unit_scale(parts_B), (parts_B > 0).double()
