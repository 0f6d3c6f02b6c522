"""Products of tall row blocks by column blocks, and the directions that a sketch keeps of them.

Shapes: S stacked rows, D columns, K directions kept.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

COLUMNS_AT_ONCE = 2**11
"""Columns that a processor copies at once: a block of a few hundred rows then stays in its cache."""
COLUMNS_ON_ACCELERATOR = 2**17
"""Columns that any other device copies or turns at once: it pays for each product that it is asked for, and not for the
size of a copy. In float64, 256 rows of them are 268 MB."""
STRIP_ROWS = 80
"""Rows of a Gram matrix that are computed at once, from the diagonal on; narrower strips cost more than they skip."""


def column_blocks(width: int, columns: int) -> list[slice]:
    """`width` columns cut into slices of `columns`, the last one shorter."""
    return [slice(start, min(start + columns, width)) for start in range(0, width, columns)]


def blocks_of(matrix_SD: torch.Tensor, on_processor: int = COLUMNS_AT_ONCE) -> list[slice]:
    """The columns of a matrix cut as its device likes them; `on_processor` at a time if that is a processor."""
    columns = on_processor if matrix_SD.device.type == "cpu" else COLUMNS_ON_ACCELERATOR
    return column_blocks(matrix_SD.shape[1], columns)


def gram(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """Inner products of stacked rows, in float64; Grams of column blocks add up to the whole one's.

    Args:
        matrices: of equal width; those without rows may have any width.

    Returns:
        [S, S] float64 on the CPU, exactly symmetric, S the rows of all matrices together.
    """
    filled = [matrix for matrix in matrices if matrix.shape[0]]
    total_rows = sum(matrix.shape[0] for matrix in filled)
    gram_SS = filled[0].new_zeros(total_rows, total_rows, dtype=torch.float64)
    for block in _stacked_blocks(filled, torch.float64):
        for start in range(0, total_rows, STRIP_ROWS):
            strip = slice(start, start + STRIP_ROWS)
            gram_SS[strip, start:].addmm_(block[strip], block[start:].T)
    upper_SS = gram_SS.triu()
    return (upper_SS + upper_SS.triu(1).T).cpu()


def products(first_KD: torch.Tensor, second_MD: torch.Tensor) -> torch.Tensor:
    """Inner products of the rows of one matrix with those of another, [K, M] float64 on the CPU."""
    products_KM = first_KD.new_zeros(first_KD.shape[0], second_MD.shape[0], dtype=torch.float64)
    for block in _stacked_blocks([first_KD, second_MD], torch.float64):
        products_KM.addmm_(block[: first_KD.shape[0]], block[first_KD.shape[0] :].T)
    return products_KM.cpu()


def row_squares(rows_BD: torch.Tensor, slices_P: Sequence[slice]) -> torch.Tensor:
    """Squared norms of the parts of each row, [P, B] float64 on the device of the rows."""
    squares_PB = rows_BD.new_zeros(len(slices_P), rows_BD.shape[0], dtype=torch.float64)
    for squares_B, columns in zip(squares_PB, slices_P, strict=True):
        for block in _stacked_blocks([rows_BD[:, columns]], torch.float64):
            squares_B += torch.linalg.vecdot(block, block)
    return squares_PB


def rotate(matrices: Sequence[torch.Tensor], weights_SK: torch.Tensor) -> torch.Tensor:
    """`weights_SK^T` times the stacked rows, in float32: rows are rounded to that, or to less, when they are stored.

    Returns:
        [K, columns] float32, on the device of the matrices.
    """
    filled = [matrix for matrix in matrices if matrix.shape[0]]
    weights_KS = weights_SK.T.to(filled[0].device, torch.float32).contiguous()
    rotated = filled[0].new_empty(weights_KS.shape[0], filled[0].shape[1], dtype=torch.float32)
    with _full_float32(rotated.device.type):
        for block, columns in zip(_stacked_blocks(filled, torch.float32), blocks_of(rotated), strict=True):
            rotated[:, columns] = weights_KS @ block
    return rotated


def _stacked_blocks(matrices: Sequence[torch.Tensor], dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """[S, columns] of one column block after the other, all in the same memory.

    A copy is aligned as PyTorch aligns, so that products do not depend on where the matrices came to lie.
    """
    total_rows, blocks = sum(matrix.shape[0] for matrix in matrices), blocks_of(matrices[0])
    scratch = matrices[0].new_empty(total_rows * (blocks[0].stop if blocks else 0), dtype=dtype)
    for columns in blocks:
        size = columns.stop - columns.start
        block = scratch[: total_rows * size].view(total_rows, size)
        for matrix, rows in zip(matrices, block.split([len(matrix) for matrix in matrices]), strict=True):
            rows.copy_(matrix[:, columns])
        yield block


@contextmanager
def _full_float32(device_type: str) -> Iterator[None]:
    """Full float32 products, whatever the process has allowed in whichever way; those of float64 need no guard."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    allowed = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, allowed, strict=True):
            backend.fp32_precision = precision


def top_directions(gram_SS: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The leading eigenvectors of a Gram matrix, and the singular values of the rows that it is made of.

    Signs are fixed (the largest entry of each vector is positive), so that equal input gives equal output.

    Returns:
        ([S, K] orthonormal columns, [K] falling), both float64, K = min(rank, S).
    """
    values_S, vectors_SS = torch.linalg.eigh(gram_SS)
    directions_SK = vectors_SS[:, -rank:].flip(1)
    return directions_SK * _signs(directions_SK), values_S[-rank:].flip(0).clamp(min=0).sqrt()


def _signs(vectors_SK: torch.Tensor) -> torch.Tensor:
    """[K], the sign of the largest entry of each column."""
    return vectors_SK.gather(0, vectors_SK.abs().argmax(dim=0)[None])[0].sign()


def shrunk_directions(
    gram_SS: torch.Tensor, rank: int, weights_SS: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """One step of Frequent Directions that keeps what it takes from the rows in weights beside them.

    With R = U^T G and a matrix T, B = T R is the Frequent Directions sketch. For stacked rows S (of R and a buffer, or
    of two sketches), C = S S^T and P the stacked weights (T and I, or T_1 and T_2, on the diagonal):
        P C P^T = Q L Q^T       delta = L_k+1       F = diag(sqrt(1 - delta / L_j)), j <= k       B' = F Q_k^T P S.
    P^T Q_k = W X (QR) gives B' = F X^T (W^T S), and E, the eigenvectors of W^T C W, makes the rows orthogonal:
        R' = (W E)^T S          T' = F X^T E        B' = T' R'.
    W E has orthonormal columns, so that R' = U'^T G as ever. What F takes whole needs no column of W; such columns hold
    the leading eigenvectors of C beside the others.

    Guarantee (proofs of arXiv 1501.01711, theorem 1.1 with l = k + 1; to rounding). Each step takes at most delta from
    B^T B in any direction, and at least (k + 1) delta from its trace. Hence, with Delta the sum of all deltas (of both
    sides, after a merge) and G_j the best approximation of rank j <= k, k the least rank on the way,
        0 <= G^T G - B^T B <= Delta I,      Delta <= ||G - G_j||_F^2 / (k + 1 - j),
    and G projected on the row space of R has an error of at most (1 + j / (k + 1 - j)) ||G - G_j||_F^2. That projection
    is G V V^T, which takes a second pass over G (`refinement.py`). The ledger is about U U^T G, which misses what a
    direction held before it was kept, and after it was shrunk away: on a long stream its error is far larger.

    Args:
        gram_SS: C, [S, S] float64.
        rank: k.
        weights_SS: P, [S, S] float64.

    Returns:
        (directions W E [S, K], singular values of R' [K] falling, T' [K, K], delta), float64, K = min(rank, S).
    """
    vectors_SL, roots_L = top_directions(weights_SS @ gram_SS @ weights_SS.T, rank + 1)
    squares_L, kept = roots_L.square(), min(rank, gram_SS.shape[0])
    delta = float(squares_L[kept:].sum())  # one at most
    left_K = squares_L[:kept] - delta
    # What is left of a row below the rounding of L has no direction of its own.
    active = int((left_K > gram_SS.shape[0] * torch.finfo(torch.float64).eps * squares_L[0]).sum())
    factors_A = (left_K[:active] / squares_L[:active]).sqrt()
    basis_SS, triangle_SA = torch.linalg.qr(weights_SS.T @ vectors_SL[:, :active], mode="complete")
    span_SK = basis_SS[:, :active]
    if active < kept:
        beside = basis_SS[:, active:]
        span_SK = torch.cat([span_SK, beside @ top_directions(beside.T @ gram_SS @ beside, kept - active)[0]], dim=1)
    turn_KK, singular_values_K = top_directions(span_SK.T @ gram_SS @ span_SK, kept)
    directions_SK = span_SK @ turn_KK
    signs_K = _signs(directions_SK)
    weights_KK = torch.zeros(kept, kept, dtype=torch.float64)
    weights_KK[:active] = factors_A[:, None] * (triangle_SA[:active].T @ turn_KK[:active]) * signs_K
    return directions_SK * signs_K, singular_values_K, weights_KK, delta
