"""Sums over clusters of unit coordinates, block by block, so that a million examples need no second copy.

Shapes: N examples, K coordinates, C clusters, B examples of a block. A label below 0 is an example
that no cluster has.
"""

from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_matrix

from gradientspace_ray.clusters.rows import unit_blocks


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


def cluster_count(labels_N: np.ndarray) -> int:
    """Number of clusters that the labels name; 0 where every example is left out."""
    return int(labels_N.max(initial=-1)) + 1
