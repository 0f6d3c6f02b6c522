"""Rows of coordinates: their directions, samples of them, and rows that have no direction.

Shapes: N examples, L of them whose coordinates are not zero, K coordinates.
"""

from collections.abc import Callable, Sequence

import numpy as np

FIT_EXAMPLES = 20_000
"""Of more examples than this, clusters are those of a sample, which the rest join."""
NEGLIGIBLE_NORM = 1e-6
"""Of the longest row. A zero gradient leaves the sketch with coordinates of about 1e-16, a direction of rounding."""


def unit_rows(coordinates_NK: np.ndarray) -> np.ndarray:
    """Rows scaled to unit length, float64; a row shorter than a millionth of the longest becomes zero.

    Raises:
        ValueError: not a matrix with at least one row, or not finite.
    """
    rows_NK = np.array(coordinates_NK, dtype=np.float64)
    if rows_NK.ndim != 2 or not rows_NK.size:
        raise ValueError(f"coordinates have the shape {rows_NK.shape}; needed: at least one example and one coordinate")
    squares_N = np.einsum("nk,nk->n", rows_NK, rows_NK)
    if not np.isfinite(squares_N).all():
        bad = int((~np.isfinite(squares_N)).argmax())
        raise ValueError(f"the coordinates of example {bad} are not finite; make the sketch again")
    norms_N = np.sqrt(squares_N)
    live_N = norms_N > NEGLIGIBLE_NORM * norms_N.max()
    rows_NK /= np.where(live_N, norms_N, 1)[:, None]
    rows_NK[~live_N] = 0
    return rows_NK


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
