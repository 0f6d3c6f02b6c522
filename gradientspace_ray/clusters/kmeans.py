"""Spherical k-means: clusters of directions.

Shapes: N examples, L of them whose coordinates are not zero, K coordinates, C clusters.
"""

import warnings

import numpy as np
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

from gradientspace_ray.clusters.rows import FIT_EXAMPLES, around_zero_rows, check_count, sample, unit_rows
from gradientspace_ray.clusters.sums import cluster_sums

STARTS = 10
"""Starts of k-means, the best of which is kept."""
MAX_ROUNDS = 100


def spherical_kmeans(coordinates_NK: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Spherical k-means (Dhillon and Modha, Machine Learning 42, 2001); zero rows go to the largest cluster.

    It begins with the clusters of scikit-learn's k-means on unit vectors. Of more than `FIT_EXAMPLES` examples the
    directions are those of a seeded sample.

    Args:
        coordinates_NK: coordinates of the examples, scaled to unit length here.
        count: number of clusters wanted.
        seed: decides the sample and the starts.

    Returns:
        [N] labels below `count`; some may be absent when the examples have fewer distinct directions.

    Raises:
        ValueError: more clusters than examples, or fewer than one.
    """
    check_count(count, len(coordinates_NK))

    def cluster(unit_LK: np.ndarray) -> np.ndarray:
        fitted_FK = unit_LK[sample(len(unit_LK), FIT_EXAMPLES, [seed, 4])]
        centres_CK = fit_kmeans(fitted_FK, min(count, len(fitted_FK)), seed).cluster_centers_
        return (unit_LK @ _directions(fitted_FK, unit_rows(centres_CK)).T).argmax(axis=1)

    with threadpool_limits(1):
        return around_zero_rows(unit_rows(coordinates_NK), cluster)


def _directions(unit_FK: np.ndarray, directions_CK: np.ndarray) -> np.ndarray:
    """Unit means of the rows that are nearest to them by cosine, [C, K], from a first guess."""
    labels_F = np.full(len(unit_FK), -1)
    for _ in range(MAX_ROUNDS):
        previous_F, labels_F = labels_F, (unit_FK @ directions_CK.T).argmax(axis=1)
        if np.array_equal(previous_F, labels_F):
            break
        sums_CK = np.stack([unit_FK[labels_F == label].sum(axis=0) for label in range(len(directions_CK))])
        # One that lost its rows stays where it was.
        directions_CK = np.where(sums_CK.any(axis=1, keepdims=True), unit_rows(sums_CK), directions_CK)
    return directions_CK


def centroids(coordinates_NK: np.ndarray, labels_N: np.ndarray) -> np.ndarray:
    """Directions of the clusters: unit means of the unit coordinates.

    Args:
        coordinates_NK: coordinates of the examples.
        labels_N: cluster of each, 0 .. C - 1, every one present; below 0 for an example of none.

    Returns:
        [C, K] float64; zero where a cluster's examples cancel out or are all zero.
    """
    counts_C, sums_CK, _ = cluster_sums(coordinates_NK, labels_N)
    return unit_rows(sums_CK / counts_C[:, None])


def fit_kmeans(rows_NK: np.ndarray, count: int, seed: int) -> KMeans:
    """scikit-learn's k-means, fitted; some clusters stay empty where there are fewer distinct rows."""
    # Of several threads, sums are added in the order in which they come, and last bits differ from run to run.
    with warnings.catch_warnings(), threadpool_limits(1):
        # The caller sees it by the labels.
        warnings.filterwarnings("ignore", "Number of distinct clusters")
        return KMeans(count, n_init=STARTS, random_state=seed).fit(rows_NK)
