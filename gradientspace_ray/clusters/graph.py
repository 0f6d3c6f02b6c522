"""Clusters of the nearest-neighbour graph.

Gradients of one skill are near-orthogonal, so neighbourhoods carry the signal and centroids do not. Spectral clustering
after Ng, Jordan and Weiss (NIPS 2001): the leading eigenvectors of the normalised graph, rows scaled to unit length,
then k-means.

Shapes: N examples, L of them whose coordinates are not zero, K coordinates, M neighbours, C clusters, E eigenvectors.
"""

import numpy as np
from scipy.linalg import eigh
from scipy.sparse import csr_matrix, diags, identity
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import eigsh
from threadpoolctl import threadpool_limits

from gradientspace_ray.clusters.kmeans import fit_kmeans
from gradientspace_ray.clusters.neighbours import Search, label_by_neighbours, nearest_others
from gradientspace_ray.clusters.rows import FIT_EXAMPLES, around_zero_rows, check_count, sample, unit_rows

NEGLIGIBLE_COSINE = 1e-6
DENSE_EXAMPLES = 2000
"""Up to this many examples of a component, eigenvectors are computed without iteration, which is exact and quick."""


def neighbour_graph(coordinates_NK: np.ndarray, neighbours: int, search: Search = "exact") -> csr_matrix:
    """Symmetric graph of each example's nearest neighbours by cosine.

    The weight of an edge is the cosine, where positive, halved when only one end counts the other as a neighbour. A
    zero row has no direction, so it has no edges and is nobody's neighbour.

    Args:
        coordinates_NK: of any length; they are scaled to unit length.
        neighbours: of each example; at most all other rows that are not zero are used.
        search: see `nearest_others`.

    Returns:
        [N, N] sparse weights in 0 .. 1, zero diagonal.
    """
    unit_NK = unit_rows(coordinates_NK)
    count = unit_NK.shape[0]
    live = np.flatnonzero(unit_NK.any(axis=1))
    used = min(neighbours, len(live) - 1)
    if used < 1:
        return csr_matrix((count, count))
    cosines_LM, indices_LM = nearest_others(unit_NK[live], used, search)
    # Orthogonal rows have a cosine of rounding, which would tie pieces of the graph to each other.
    weights = np.where(cosines_LM > NEGLIGIBLE_COSINE, cosines_LM, 0).ravel()
    graph = csr_matrix((weights, (np.repeat(live, used), live[indices_LM.ravel()])), shape=(count, count))
    graph = (graph + graph.T) / 2
    graph.eliminate_zeros()
    return graph


def laplacian_eigenmap(graph: csr_matrix, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The lowest eigenvalues and eigenvectors of the normalised Laplacian I - D^-1/2 W D^-1/2.

    Each connected component is solved by itself: its eigenvectors are zero elsewhere, and it has the eigenvalue 0 once,
    so that no iteration has to find a multiple one. An example without neighbours is a component. Signs are fixed.

    Args:
        graph: symmetric weights.
        count: number of eigenvectors; at most N are returned.
        seed: decides the start vectors, where they are found by iteration.

    Returns:
        ([E] rising, in 0 .. 2; [N, E]). Of equal values, that of the larger component comes first.
    """
    size = graph.shape[0]
    count = min(count, size)
    degrees_N = np.asarray(graph.sum(axis=1)).ravel()
    roots_N = np.divide(1.0, np.sqrt(degrees_N), out=np.zeros_like(degrees_N), where=degrees_N > 0)
    affinity = (diags(roots_N) @ graph @ diags(roots_N)).tocsr()
    components, component_N = connected_components(graph, directed=False)
    largest_first = np.argsort(-np.bincount(component_N), kind="stable")[:count]
    # Every component has the value 0, so of its other values no more than the rest of the count are wanted.
    others = max(0, count - components)
    values, places, vectors = [], [], []
    for component in largest_first:
        members_L = np.flatnonzero(component_N == component)
        wanted = min(others + 1, len(members_L))
        root_L1 = np.sqrt(np.maximum(degrees_N[members_L, None], 0 if len(members_L) > 1 else 1))
        block_LE = root_L1 / np.linalg.norm(root_L1)
        values.append(np.zeros(1))
        if wanted > 1:
            found_E, found_LE = _leading(affinity[members_L][:, members_L], wanted, seed)
            values.append(np.clip(1 - found_E[1:], 0, 2))
            block_LE = np.hstack([block_LE, found_LE[:, 1:]])
        places.append(members_L)
        vectors.append(block_LE)
    values_E = np.concatenate(values)
    vectors_NE, start = np.zeros((size, len(values_E))), 0
    for members_L, block_LE in zip(places, vectors, strict=True):
        vectors_NE[members_L, start : start + block_LE.shape[1]] = block_LE
        start += block_LE.shape[1]
    order_E = np.argsort(values_E, kind="stable")[:count]
    return values_E[order_E], vectors_NE[:, order_E]


def _leading(affinity_LL: csr_matrix, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` largest eigenvalues, falling, and their vectors: those of one component."""
    # Of several threads, last bits depend on their number.
    with threadpool_limits(1):
        return _solved(affinity_LL, count, seed)


def _solved(affinity_LL: csr_matrix, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    size = affinity_LL.shape[0]
    if size <= DENSE_EXAMPLES or count >= size - 1:
        values_E, vectors_LE = eigh(affinity_LL.toarray(), subset_by_index=(size - count, size - 1))
    else:
        start_L = np.random.default_rng([seed, 0]).normal(size=size)
        # Shifted to be positive, so that the leading eigenvalues are the largest in magnitude as well.
        vectors_kept = min(size, 4 * count + 20)
        values_E, vectors_LE = eigsh(affinity_LL + identity(size), k=count, which="LA", v0=start_L, ncv=vectors_kept)
        values_E = values_E - 1
    order_E = np.argsort(-values_E, kind="stable")
    values_E, vectors_LE = values_E[order_E], vectors_LE[:, order_E]
    largest_E = np.abs(vectors_LE).argmax(axis=0)
    return values_E, vectors_LE * np.sign(vectors_LE[largest_E, np.arange(count)])


def eigenmap_clusters(vectors_NE: np.ndarray, count: int, seed: int) -> np.ndarray:
    """k-means on the first `count` eigenvectors, rows scaled to unit length.

    Returns:
        [N] int64 labels; -1 where all these eigenvectors are zero, as in the smallest of more than `count` components.
    """
    unit_NE = unit_rows(vectors_NE[:, :count])
    placed_N = unit_NE.any(axis=1)
    labels_N = np.full(len(unit_NE), -1)
    labels_N[placed_N] = fit_kmeans(unit_NE[placed_N], min(count, int(placed_N.sum())), seed).labels_
    return labels_N


def graph_clusters(
    coordinates_NK: np.ndarray, count: int, neighbours: int, seed: int, search: Search = "exact"
) -> np.ndarray:
    """Clusters of the neighbour graph; zero rows, which have no place in it, join the largest cluster.

    Of more than `FIT_EXAMPLES` examples a seeded sample is clustered so, and the rest join the cluster that most of
    their nearest neighbours in the sample have, so that the time grows linearly.

    Args:
        coordinates_NK: coordinates of the examples, scaled to unit length here.
        count: number of clusters wanted.
        neighbours: see `neighbour_graph`.
        seed: decides the sample and the starts of k-means.
        search: see `nearest_others`.

    Returns:
        [N] labels below `count`; some may be absent when the examples have fewer distinct places.

    Raises:
        ValueError: more clusters than examples, or fewer than one.
    """
    check_count(count, len(coordinates_NK))
    if count == 1:
        return np.zeros(len(coordinates_NK), dtype=int)

    def cluster(unit_LK: np.ndarray) -> np.ndarray:
        chosen = sample(len(unit_LK), FIT_EXAMPLES, [seed, 4])
        fitted_FK, used = unit_LK[chosen], min(count, len(chosen))
        _, vectors_FE = laplacian_eigenmap(neighbour_graph(fitted_FK, neighbours, search), used, seed)
        labels_F = eigenmap_clusters(vectors_FE, used, seed)
        labels_L = np.full(len(unit_LK), -1)
        labels_L[chosen] = labels_F
        rest_L, placed_F = labels_L < 0, labels_F >= 0
        if rest_L.any():
            places = (fitted_FK[placed_F], labels_F[placed_F])
            labels_L[rest_L] = label_by_neighbours(unit_LK[rest_L], *places, neighbours, search)
        return labels_L

    return around_zero_rows(unit_rows(coordinates_NK), cluster)
