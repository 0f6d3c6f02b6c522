"""Rows of coordinates: their directions, samples of them, and rows that have no direction.

Shapes: N examples, L of them whose coordinates are not zero, K coordinates.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

FIT_EXAMPLES = 20_000
"""Of more examples than this, clusters are those of a sample, which the rest join."""
BLOCK_NUMBERS = 2**22
"""Numbers that are copied together."""
NEGLIGIBLE_NORM = 1e-6
"""Of the longest row. A zero gradient leaves the sketch with coordinates of about 1e-16, a direction of rounding."""


def row_lengths(coordinates_NK: np.ndarray) -> np.ndarray:
    """Lengths of the rows, [N] float64; 0 for one shorter than a millionth of the longest, which has no direction.

    Raises:
        ValueError: not a matrix, or not finite.
    """
    if coordinates_NK.ndim != 2:
        raise ValueError(f"coordinates have the shape {coordinates_NK.shape}; needed: examples x coordinates")
    lengths_N = np.empty(len(coordinates_NK))
    for block in blocks_of(coordinates_NK):
        lengths_N[block] = np.linalg.norm(coordinates_NK[block].astype(np.float64), axis=1)
    if not np.isfinite(lengths_N).all():
        bad = int((~np.isfinite(lengths_N)).argmax())
        raise ValueError(f"row {bad} of the coordinates is not finite; run the gradients stage again")
    lengths_N[lengths_N <= NEGLIGIBLE_NORM * lengths_N.max(initial=0)] = 0
    return lengths_N


def unit_rows(coordinates_NK: np.ndarray) -> np.ndarray:
    """Rows scaled to unit length, [N, K] float64; those without a direction, see `row_lengths`, become zero.

    Raises:
        ValueError: not a matrix with at least one row, or not finite.
    """
    rows_NK = np.asarray(coordinates_NK)
    if rows_NK.ndim != 2 or not rows_NK.size:
        raise ValueError(f"coordinates have the shape {rows_NK.shape}; needed: at least one example and one coordinate")
    return scaled(rows_NK, row_lengths(rows_NK))


def unit_at(coordinates_NK: np.ndarray, chosen_S: np.ndarray) -> np.ndarray:
    """Coordinates of the chosen examples, [S, K] float64 of unit length, see `row_lengths`."""
    return scaled(coordinates_NK[chosen_S], row_lengths(coordinates_NK)[chosen_S])


def unit_blocks(coordinates_NK: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Runs of examples and their coordinates, [., K] float64 of unit length, see `row_lengths`."""
    lengths_N = row_lengths(coordinates_NK)
    for block in blocks_of(coordinates_NK):
        yield block, scaled(coordinates_NK[block], lengths_N[block])


def blocks_of(rows_NK: np.ndarray) -> Iterator[slice]:
    """Runs of rows whose copies in float64 are small."""
    at_once = max(1, BLOCK_NUMBERS // max(1, rows_NK.shape[1]))
    return (slice(start, min(start + at_once, len(rows_NK))) for start in range(0, len(rows_NK), at_once))


def scaled(rows_NK: np.ndarray, lengths_N: np.ndarray) -> np.ndarray:
    """Rows over their lengths, float64; zero where the length is."""
    scaled_NK = rows_NK.astype(np.float64)
    scaled_NK /= np.where(lengths_N > 0, lengths_N, np.inf)[:, None]
    return scaled_NK


def sample(examples: int, size: int, seed: Sequence[int]) -> np.ndarray:
    """Sorted indices of at most `size` of the examples, drawn without replacement."""
    if examples <= size:
        return np.arange(examples)
    return np.sort(np.random.default_rng(seed).choice(examples, size, replace=False))


def around_zero_rows(unit_NK: np.ndarray, cluster: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Cluster the rows that are not zero; the zero rows get the label of the largest cluster.

    Args:
        unit_NK: rows of unit length or zero.
        cluster: the L rows that are not zero, at least one -> their labels [L], 0 or above.

    Returns:
        [N] labels; all 0 when every row is zero.
    """
    live_N = unit_NK.any(axis=1)
    if live_N.all():
        return cluster(unit_NK)
    labels_N = np.zeros(len(unit_NK), dtype=int)
    if live_N.any():
        labels_L = cluster(unit_NK[live_N])
        labels_N[live_N], labels_N[~live_N] = labels_L, np.bincount(labels_L).argmax()
    return labels_N


def check_count(count: int, examples: int) -> None:
    """Refuse a number of clusters that these examples cannot have.

    Raises:
        ValueError: fewer than one, or more than there are examples.
    """
    if not 1 <= count <= examples:
        raise ValueError(f"{examples} examples cannot form {count} clusters; set clusters.count to 1 .. {examples}")
