"""Sums over clusters of unit coordinates, block by block, so that a million examples need no second copy.

Shapes: N examples, K coordinates, C clusters, B examples of a block, S chosen examples. A label below 0 is an example
that no cluster has.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_matrix

from gradientspace_ray.clusters.rows import NEGLIGIBLE_NORM

BLOCK_EXAMPLES = 1 << 16


class ClusterSums(NamedTuple):
    """Of the unit coordinates of each cluster, float64."""

    counts_C: np.ndarray
    """int64."""
    sums_CK: np.ndarray
    squares_C: np.ndarray
    """Sums of squared lengths: the examples that are not zero."""


def cluster_sums(coordinates_NK: np.ndarray, labels_N: np.ndarray) -> ClusterSums:
    """Counts, sums and sums of squares of each cluster's unit coordinates; zero rows count and add nothing."""
    clusters = cluster_count(labels_N)
    sums_CK, squares_C = np.zeros((clusters, coordinates_NK.shape[1])), np.zeros(clusters)
    for block, unit_BK in unit_blocks(coordinates_NK):
        places = np.flatnonzero(labels_N[block] >= 0)
        entries = (np.ones(len(places)), (labels_N[block][places], places))
        members_CB = csr_matrix(entries, shape=(clusters, len(unit_BK)))
        sums_CK += members_CB @ unit_BK
        squares_C += members_CB @ np.square(unit_BK).sum(axis=1)
    return ClusterSums(np.bincount(labels_N[labels_N >= 0], minlength=clusters), sums_CK, squares_C)


def unit_blocks(coordinates_NK: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Runs of examples and their coordinates, [B, K] float64 of unit length, see `row_lengths`."""
    lengths_N = row_lengths(coordinates_NK)
    for block in _blocks(len(coordinates_NK)):
        yield block, _scaled(coordinates_NK[block], lengths_N[block])


def unit_at(coordinates_NK: np.ndarray, chosen_S: np.ndarray) -> np.ndarray:
    """Coordinates of the chosen examples, [S, K] float64 of unit length, see `row_lengths`."""
    return _scaled(coordinates_NK[chosen_S], row_lengths(coordinates_NK)[chosen_S])


def row_lengths(coordinates_NK: np.ndarray) -> np.ndarray:
    """Lengths of the rows, [N] float64; 0 for one shorter than a millionth of the longest, which has no direction.

    Raises:
        ValueError: not a matrix, or not finite.
    """
    if coordinates_NK.ndim != 2:
        raise ValueError(f"coordinates have the shape {coordinates_NK.shape}; needed: examples x coordinates")
    lengths_N = np.empty(len(coordinates_NK))
    for block in _blocks(len(coordinates_NK)):
        lengths_N[block] = np.linalg.norm(coordinates_NK[block].astype(np.float64), axis=1)
    if not np.isfinite(lengths_N).all():
        bad = int((~np.isfinite(lengths_N)).argmax())
        raise ValueError(f"the coordinates of example {bad} are not finite; make the sketch again")
    lengths_N[lengths_N <= NEGLIGIBLE_NORM * lengths_N.max(initial=0)] = 0
    return lengths_N


def cluster_count(labels_N: np.ndarray) -> int:
    """Number of clusters that the labels name; 0 where every example is left out."""
    return int(labels_N.max(initial=-1)) + 1


def _blocks(examples: int) -> Iterator[slice]:
    for start in range(0, examples, BLOCK_EXAMPLES):
        yield slice(start, min(start + BLOCK_EXAMPLES, examples))


def _scaled(rows_BK: np.ndarray, lengths_B: np.ndarray) -> np.ndarray:
    rows_BK = rows_BK.astype(np.float64)
    rows_BK /= np.where(lengths_B > 0, lengths_B, np.inf)[:, None]
    return rows_BK
