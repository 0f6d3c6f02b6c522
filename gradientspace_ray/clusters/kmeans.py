"""Spherical k-means: clusters of directions.

Shapes: N examples, L of them whose coordinates are not zero, K coordinates, C clusters.
"""

import numpy as np

from gradientspace_ray.clusters.graph import around_zero_rows, check_count, fit_kmeans, unit_rows


def spherical_kmeans(coordinates_NK: np.ndarray, count: int, seed: int) -> np.ndarray:
    """k-means on unit vectors, then each example to the nearest direction by cosine; zero rows to the largest cluster.

    Args:
        coordinates_NK: coordinates of the examples, scaled to unit length here.
        count: number of clusters wanted.
        seed: decides the starts.

    Returns:
        [N] labels below `count`; some may be absent when the examples have fewer distinct directions.

    Raises:
        ValueError: more clusters than examples, or fewer than one.
    """
    check_count(count, len(coordinates_NK))

    def cluster(unit_LK: np.ndarray) -> np.ndarray:
        centres_CK = fit_kmeans(unit_LK, min(count, len(unit_LK)), seed).cluster_centers_
        return (unit_LK @ unit_rows(centres_CK).T).argmax(axis=1)

    return around_zero_rows(unit_rows(coordinates_NK), cluster)


def centroids(coordinates_NK: np.ndarray, labels_N: np.ndarray) -> np.ndarray:
    """Directions of the clusters: unit means of the unit coordinates.

    Args:
        coordinates_NK: coordinates of the examples.
        labels_N: cluster of each, 0 .. C - 1, every one present.

    Returns:
        [C, K] float64; zero where a cluster's examples cancel out or are all zero.
    """
    unit_NK = unit_rows(coordinates_NK)
    return unit_rows(np.stack([unit_NK[labels_N == label].mean(axis=0) for label in range(labels_N.max() + 1)]))
