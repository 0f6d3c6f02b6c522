"""Clusters of the nearest-neighbour graph.

Gradients of one skill are near-orthogonal, so neighbourhoods carry the signal and centroids do not. Spectral clustering
after Ng, Jordan and Weiss (NIPS 2001): the leading eigenvectors of the normalised graph, rows scaled to unit length,
then k-means.

Shapes: N examples, L of them whose coordinates are not zero, K coordinates, M neighbours, C clusters, E eigenvectors.
"""

import warnings
from collections.abc import Callable

import numpy as np
from scipy.sparse import csr_matrix, diags, identity
from scipy.sparse.linalg import eigsh
from sklearn.cluster import KMeans
from sklearn.neighbors import NearestNeighbors

DENSE_EXAMPLES = 1500
"""Up to this many examples all eigenvectors are computed at once, which is exact and quick."""
STARTS = 10
"""Starts of k-means, the best of which is kept."""
NEGLIGIBLE_NORM = 1e-6
"""Of the longest row. A zero gradient leaves the sketch with coordinates of about 1e-16, a direction of rounding."""


def unit_rows(coordinates_NK: np.ndarray) -> np.ndarray:
    """Rows scaled to unit length, float64; a row shorter than a millionth of the longest becomes zero.

    Raises:
        ValueError: not a matrix with at least one row, or not finite.
    """
    rows_NK = np.asarray(coordinates_NK, dtype=np.float64)
    if rows_NK.ndim != 2 or not rows_NK.size:
        raise ValueError(f"coordinates have the shape {rows_NK.shape}; needed: at least one example and one coordinate")
    if not np.isfinite(rows_NK).all():
        bad = int((~np.isfinite(rows_NK)).any(axis=1).argmax())
        raise ValueError(f"the coordinates of example {bad} are not finite; make the sketch again")
    norms_N1 = np.linalg.norm(rows_NK, axis=1, keepdims=True)
    return np.divide(rows_NK, norms_N1, out=np.zeros_like(rows_NK), where=norms_N1 > NEGLIGIBLE_NORM * norms_N1.max())


def neighbour_graph(coordinates_NK: np.ndarray, neighbours: int) -> csr_matrix:
    """Symmetric graph of each example's nearest neighbours by cosine.

    The weight of an edge is the cosine, where positive, halved when only one end counts the other as a neighbour. A
    zero row has no direction, so it has no edges and is nobody's neighbour.

    Args:
        coordinates_NK: of any length; they are scaled to unit length.
        neighbours: of each example; at most all other rows that are not zero are used.

    Returns:
        [N, N] sparse weights in 0 .. 1, zero diagonal.
    """
    unit_NK = unit_rows(coordinates_NK)
    count = unit_NK.shape[0]
    live = np.flatnonzero(unit_NK.any(axis=1))
    used = min(neighbours, len(live) - 1)
    if used < 1:
        return csr_matrix((count, count))
    # On unit rows, distance^2 = 2 - 2 cosine; asked without arguments, an example is not its own neighbour.
    distances_LM, indices_LM = NearestNeighbors(n_neighbors=used, algorithm="brute").fit(unit_NK[live]).kneighbors()
    weights = np.clip(1 - distances_LM**2 / 2, 0, None).ravel()
    graph = csr_matrix((weights, (np.repeat(live, used), live[indices_LM.ravel()])), shape=(count, count))
    graph = (graph + graph.T) / 2
    graph.eliminate_zeros()
    return graph


def laplacian_eigenmap(graph: csr_matrix, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The lowest eigenvalues and eigenvectors of the normalised Laplacian I - D^-1/2 W D^-1/2.

    An example without neighbours is a component of its own: its eigenvalue is 0, too. Signs are fixed.

    Args:
        graph: symmetric weights.
        count: number of eigenvectors; at most N are returned.
        seed: decides the start vector, where they are found by iteration.

    Returns:
        ([E] rising, in 0 .. 2; [N, E]).
    """
    size = graph.shape[0]
    count = min(count, size)
    degrees_N = np.asarray(graph.sum(axis=1)).ravel()
    roots_N = np.divide(1.0, np.sqrt(degrees_N), out=np.zeros_like(degrees_N), where=degrees_N > 0)
    affinity = diags(roots_N) @ graph @ diags(roots_N) + diags((degrees_N == 0).astype(float))
    if size <= DENSE_EXAMPLES or count >= size - 1:
        values_N, vectors_NN = np.linalg.eigh(affinity.toarray())
        values_E, vectors_NE = values_N[::-1][:count], vectors_NN[:, ::-1][:, :count]
    else:
        start_N = np.random.default_rng([seed, 0]).normal(size=size)
        # Shifted to be positive, so that the leading eigenvalues are the largest in magnitude as well.
        vectors_kept = min(size, 4 * count + 20)
        values_E, vectors_NE = eigsh(affinity + identity(size), k=count, which="LA", v0=start_N, ncv=vectors_kept)
        order_E = np.argsort(-values_E, kind="stable")
        values_E, vectors_NE = values_E[order_E] - 1, vectors_NE[:, order_E]
    largest_E = np.abs(vectors_NE).argmax(axis=0)
    signs_E = np.sign(vectors_NE[largest_E, np.arange(count)])
    return np.clip(1 - values_E, 0, 2), vectors_NE * signs_E


def eigenmap_clusters(vectors_NE: np.ndarray, count: int, seed: int) -> np.ndarray:
    """k-means on the first `count` eigenvectors, rows scaled to unit length. Returns labels [N] int64."""
    return fit_kmeans(unit_rows(vectors_NE[:, :count]), count, seed).labels_.astype(int)


def spectral_clusters(coordinates_NK: np.ndarray, count: int, neighbours: int, seed: int) -> np.ndarray:
    """Clusters of the neighbour graph; zero rows, which have no place in it, join the largest cluster.

    Args:
        coordinates_NK: coordinates of the examples, scaled to unit length here.
        count: number of clusters wanted.
        neighbours: see `neighbour_graph`.
        seed: decides the starts of k-means.

    Returns:
        [N] labels below `count`; some may be absent when the examples have fewer distinct places.

    Raises:
        ValueError: more clusters than examples, or fewer than one.
    """
    check_count(count, len(coordinates_NK))
    if count == 1:
        return np.zeros(len(coordinates_NK), dtype=int)

    def cluster(unit_LK: np.ndarray) -> np.ndarray:
        used = min(count, len(unit_LK))
        _, vectors_LE = laplacian_eigenmap(neighbour_graph(unit_LK, neighbours), used, seed)
        return eigenmap_clusters(vectors_LE, used, seed)

    return around_zero_rows(unit_rows(coordinates_NK), cluster)


def around_zero_rows(unit_NK: np.ndarray, cluster: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Cluster the rows that are not zero; the zero rows get the label of the largest cluster.

    Args:
        unit_NK: rows of unit length or zero.
        cluster: the L rows that are not zero, at least one -> their labels [L], 0 or above.

    Returns:
        [N] labels; all 0 when every row is zero.
    """
    live_N = unit_NK.any(axis=1)
    labels_N = np.zeros(len(unit_NK), dtype=int)
    if live_N.any():
        labels_L = cluster(unit_NK[live_N])
        labels_N[live_N], labels_N[~live_N] = labels_L, np.bincount(labels_L).argmax()
    return labels_N


def fit_kmeans(rows_NK: np.ndarray, count: int, seed: int) -> KMeans:
    """scikit-learn's k-means, fitted; some clusters stay empty where there are fewer distinct rows."""
    with warnings.catch_warnings():
        # The caller sees it by the labels.
        warnings.filterwarnings("ignore", "Number of distinct clusters")
        return KMeans(count, n_init=STARTS, random_state=seed).fit(rows_NK)


def check_count(count: int, examples: int) -> None:
    """Refuse a number of clusters that these examples cannot have.

    Raises:
        ValueError: fewer than one, or more than there are examples.
    """
    if not 1 <= count <= examples:
        raise ValueError(f"{examples} examples cannot form {count} clusters; set clusters.count to 1 .. {examples}")
