"""What people would use instead: assignment at random, by length, and by randomly projected gradients.

Sentence embeddings need nothing of their own: `kmeans.spherical_kmeans` reads them as it reads coordinates. c-BTM
(arXiv 2303.14177) does so with its features of the text, but balances the sizes.

Shapes: N examples, L of them whose gradients are not zero, F of them in the sample that is fitted, P numbers of a
random projection, C clusters.
"""

import warnings
from collections.abc import Iterator

import numpy as np
from sklearn.cluster import Birch
from sklearn.exceptions import ConvergenceWarning

from gradientspace_ray.clusters.kmeans import fit_kmeans
from gradientspace_ray.clusters.rows import NEGLIGIBLE_NORM, check_count, sample, unit_rows

BIRCH_EXAMPLES = 5000
"""ELREA fits its clusters on this many examples."""
BIRCH_THRESHOLD = 0.5
"""Largest radius of a subcluster, scikit-learn's default. Two unit rows with the cosine c have the radius
sqrt((1 - c) / 2), so they share a subcluster when c is one half or more. With a threshold of sqrt(1/2) or more,
orthogonal rows would share one, as they happen to come. Gradients of one skill, with cosines of about 0.1, lie
between: groups of them have a radius near 1, so no threshold makes subclusters of skills."""
NUMBERS_AT_ONCE = 2**24
"""Numbers of the projection that are copied together."""


def random_labels(examples: int, count: int, seed: int) -> np.ndarray:
    """Clusters at random, of equal sizes up to one.

    Args:
        examples: N.
        count: number of clusters.
        seed: decides who is in which.

    Returns:
        [N] labels below `count`, every one present.

    Raises:
        ValueError: more clusters than examples, or fewer than one.
    """
    check_count(count, examples)
    return np.random.default_rng([seed, 10]).permutation(examples) % count


def length_labels(tokens_N: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Clusters of like length, a control: k-means on the logarithms of the numbers of tokens.

    Args:
        tokens_N: tokens of each example; none counts as one.
        count: number of clusters wanted.
        seed: decides the starts.

    Returns:
        [N] labels below `count`; some may be absent when there are fewer lengths.

    Raises:
        ValueError: more clusters than examples, or fewer than one.
    """
    check_count(count, len(tokens_N))
    logarithms_N1 = np.log(np.maximum(tokens_N, 1.0))[:, None]
    return fit_kmeans(logarithms_N1, count, seed).labels_.astype(int)


def birch_labels(projection_NP: np.ndarray, count: int, seed: int) -> np.ndarray:
    """ELREA's recipe (Li et al., arXiv 2502.00089): BIRCH on a sample, then each example to the nearest mean by cosine.

    Rows are scaled to unit length here. Gradients are near-orthogonal, so BIRCH's tree holds each row of the sample by
    itself, but for those that are nearly the same; its global step, Ward's method, makes the clusters. Zero rows join
    the largest cluster.

    Args:
        projection_NP: random projections of the gradients, of any length. It is read in parts, and may be a memory
            map.
        count: number of clusters wanted.
        seed: decides the sample.

    Returns:
        [N] labels below `count`; some may be absent, as when the sample has fewer distinct directions.

    Raises:
        ValueError: more clusters than examples, or fewer than one; or a row that is not finite.
    """
    check_count(count, len(projection_NP))
    norms_N = _norms(projection_NP)
    live_N = norms_N > NEGLIGIBLE_NORM * norms_N.max()
    labels_N = np.zeros(len(projection_NP), dtype=int)
    if count == 1 or not live_N.any():
        return labels_N
    norms_N[~live_N] = np.inf
    live_L = np.flatnonzero(live_N)
    fitted_F = live_L[sample(len(live_L), BIRCH_EXAMPLES, [seed, 11])]
    means_CP = _birch_means(_scaled(projection_NP[fitted_F], norms_N[fitted_F]), count)
    for rows in _parts(projection_NP):
        labels_N[rows] = (_scaled(projection_NP[rows], norms_N[rows]) @ means_CP.T).argmax(axis=1)
    labels_N[~live_N] = np.bincount(labels_N[live_N]).argmax()
    return labels_N


def _birch_means(unit_FP: np.ndarray, count: int) -> np.ndarray:
    """Unit means, [at most `count`, P] float32, of the clusters that BIRCH finds."""
    with warnings.catch_warnings():
        # With fewer subclusters than wanted, each is a cluster: the caller sees it by the labels.
        warnings.simplefilter("ignore", ConvergenceWarning)
        found_F = Birch(threshold=BIRCH_THRESHOLD, n_clusters=count).fit(unit_FP).labels_
    means_CP = [unit_FP[found_F == label].mean(axis=0, dtype=np.float64) for label in np.unique(found_F)]
    return unit_rows(np.stack(means_CP)).astype(np.float32)


def _norms(projection_NP: np.ndarray) -> np.ndarray:
    """Lengths of the rows, [N] float64."""
    norms_N = np.empty(len(projection_NP))
    for rows in _parts(projection_NP):
        norms_N[rows] = np.linalg.norm(np.asarray(projection_NP[rows], dtype=np.float64), axis=1)
    if not np.isfinite(norms_N).all():
        bad = int((~np.isfinite(norms_N)).argmax())
        raise ValueError(f"the projection of example {bad} is not finite; run the gradients stage again")
    return norms_N


def _scaled(rows_NP: np.ndarray, norms_N: np.ndarray) -> np.ndarray:
    return (rows_NP / norms_N[:, None]).astype(np.float32)


def _parts(projection_NP: np.ndarray) -> Iterator[slice]:
    rows_at_once = max(1, NUMBERS_AT_ONCE // projection_NP.shape[1])
    return (slice(start, start + rows_at_once) for start in range(0, len(projection_NP), rows_at_once))
