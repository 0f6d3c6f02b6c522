"""Clusters of planted groups: near-orthogonal gradients with a known group each."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import SpectralClustering
from sklearn.metrics import adjusted_rand_score
from sklearn.metrics.pairwise import cosine_similarity

from gradientspace_ray.clusters import graph
from gradientspace_ray.clusters.graph import graph_clusters, laplacian_eigenmap, neighbour_graph, unit_rows
from gradientspace_ray.clusters.kmeans import centroids, spherical_kmeans
from gradientspace_ray.clusters.selection import by_size, choose_count, merge_small


def planted(sizes, cosine, seed=0, width=1500, rank=32, subspace=2):
    """Coordinates (exact SVD) of unit gradients: a direction and a subspace of each group's own, and noise.

    `cosine` is the mean cosine of two gradients of a group.
    """
    rng = np.random.default_rng(seed)

    def unit(*shape):
        return unit_rows(rng.normal(size=shape))

    rows = []
    for size in sizes:
        own = np.sqrt(0.1 / subspace) * rng.normal(size=(size, subspace)) @ unit(subspace, width)
        rows.append(np.sqrt(cosine) * unit(1, width) + own + np.sqrt(0.9 - cosine) * unit(size, width))
    u_NN, values_N, _ = np.linalg.svd(unit_rows(np.concatenate(rows)), full_matrices=False)
    return (u_NN * values_N)[:, :rank], np.repeat(np.arange(len(sizes)), sizes)


@pytest.mark.parametrize("method", ["graph", "kmeans"])
@pytest.mark.parametrize("sizes", [(40, 40), (40, 40, 40), (40,) * 4, (30,) * 6])
def test_the_planted_number_is_chosen(sizes, method):
    # Groups that vary in a few directions of their own are for neighbourhoods; k-means gets rounder ones.
    subspace = 2 if method == "graph" else 40
    for seed, cosine in ((0, 0.05), (1, 0.1)):
        coordinates_NK, truth = planted(sizes, cosine, seed, subspace=subspace)
        count, candidates = choose_count(coordinates_NK, 8, method, 10, seed)
        assert count == len(sizes), candidates
        assert candidates[count]["stability"] > 0.95
        if method == "graph":
            labels = graph_clusters(coordinates_NK, count, 10, seed)
        else:
            labels = spherical_kmeans(coordinates_NK, count, seed)
        assert adjusted_rand_score(truth, labels) > 0.97


def test_uneven_groups_are_found_by_their_neighbourhoods():
    coordinates_NK, truth = planted((100, 60, 40, 25), 0.07)
    assert choose_count(coordinates_NK, 8, "graph", 10, 0)[0] == 4
    assert adjusted_rand_score(truth, graph_clusters(coordinates_NK, 4, 10, 0)) > 0.97


def test_noise_is_one_cluster():
    noise_NK = np.random.default_rng(0).normal(size=(120, 16))
    count, candidates = choose_count(noise_NK, 6, "graph", 10, 0)
    assert count == 1
    assert set(candidates) == {1, 2, 3, 4, 5, 6}


def test_choice_and_clusters_repeat():
    coordinates_NK, _ = planted((20, 20, 20), 0.07)
    assert choose_count(coordinates_NK, 5, "graph", 10, 3) == choose_count(coordinates_NK, 5, "graph", 10, 3)
    first, second = (graph_clusters(coordinates_NK, 3, 10, 3) for _ in range(2))
    assert np.array_equal(first, second)


def test_graph_clusters_are_those_of_scikit_learn():
    coordinates_NK, _ = planted((30, 25, 20), 0.05, rank=12)
    theirs = SpectralClustering(3, affinity="precomputed", assign_labels="kmeans", random_state=0)
    expected = theirs.fit_predict(neighbour_graph(coordinates_NK, 10))
    assert adjusted_rand_score(expected, graph_clusters(coordinates_NK, 3, 10, 0)) > 0.97


@settings(max_examples=25, deadline=None)
@given(count=st.integers(2, 30), width=st.integers(1, 8), neighbours=st.integers(1, 12), seed=st.integers(0, 10**6))
def test_graph_holds_the_cosines_of_the_nearest(count, width, neighbours, seed):
    rows_NK = np.random.default_rng(seed).normal(size=(count, width))
    weights = neighbour_graph(rows_NK, neighbours).toarray()
    cosines = cosine_similarity(rows_NK)
    np.fill_diagonal(cosines, -np.inf)
    expected = np.zeros_like(weights)
    for index in range(count):
        nearest = np.argsort(-cosines[index])[:neighbours]
        nearest = nearest[nearest != index]
        expected[index, nearest] = np.clip(cosines[index, nearest], 0, None)
    expected = (expected + expected.T) / 2
    if width > 1:
        assert np.allclose(weights, expected, atol=1e-7)
    assert np.array_equal(weights, weights.T)
    assert not weights.diagonal().any()


def test_a_zero_row_has_no_edges_and_displaces_no_neighbour():
    rows_NK = np.random.default_rng(0).normal(size=(6, 8))
    rows_NK[3] = 0
    weights = neighbour_graph(rows_NK, 2).toarray()
    assert not weights[3].any()
    others = [0, 1, 2, 4, 5]
    assert np.array_equal(weights[np.ix_(others, others)], neighbour_graph(rows_NK[others], 2).toarray())
    assert not neighbour_graph(np.zeros((4, 3)), 2).toarray().any()


@pytest.mark.parametrize("method", ["graph", "kmeans"])
@pytest.mark.parametrize("size", [0, 1e-15, 1e-9])
def test_gradients_of_zero_do_not_spoil_the_clusters(size, method):
    rng = np.random.default_rng(0)
    coordinates_NK, truth = planted((40, 40, 40), 0.1, subspace=2 if method == "graph" else 40)
    rows_NK = np.concatenate([coordinates_NK, size * rng.normal(size=(10, coordinates_NK.shape[1]))])
    order = rng.permutation(130)
    real = order < 120
    labels = {
        "graph": lambda: graph_clusters(rows_NK[order], 3, 10, 0),
        "kmeans": lambda: spherical_kmeans(rows_NK[order], 3, 0),
    }[method]()
    assert adjusted_rand_score(truth[order[real]], labels[real]) == 1
    assert set(labels[~real]) == {np.bincount(labels[real]).argmax()}
    assert choose_count(rows_NK[order], 6, method, 10, 0)[0] == 3


def test_rounding_is_no_direction():
    unit_NK = unit_rows(np.array([[3.0, 4.0], [1e-15, 0], [0, 1e-4], [0, 0]]))
    assert np.allclose(unit_NK, [[0.6, 0.8], [0, 0], [0, 1], [0, 0]])


def test_eigenmap_by_iteration_is_the_exact_one(monkeypatch):
    coordinates_NK, _ = planted((40, 30, 30), 0.07)
    weights = neighbour_graph(coordinates_NK, 10)
    exact_values, exact_vectors = laplacian_eigenmap(weights, 5, 0)
    degrees = weights.toarray().sum(axis=1)
    laplacian = np.eye(100) - weights.toarray() / np.sqrt(np.outer(degrees, degrees))
    assert np.allclose(exact_values, np.linalg.eigvalsh(laplacian)[:5], atol=1e-10)
    monkeypatch.setattr(graph, "DENSE_EXAMPLES", 10)
    values, vectors = laplacian_eigenmap(weights, 5, 0)
    assert np.allclose(values, exact_values, atol=1e-8)
    assert np.allclose(vectors, exact_vectors, atol=1e-6)
    assert np.allclose(laplacian_eigenmap(weights, 60, 0)[0], np.linalg.eigvalsh(laplacian)[:60], atol=1e-8)


def test_eigenmap_by_iteration_sees_every_component(monkeypatch):
    monkeypatch.setattr(graph, "DENSE_EXAMPLES", 10)
    blocks_NK = np.repeat(np.eye(5), 30, axis=0) + 0.01 * np.random.default_rng(0).random((150, 5))
    labels = graph_clusters(blocks_NK, 5, 6, 0)
    assert adjusted_rand_score(np.repeat(np.arange(5), 30), labels) == 1


@pytest.mark.parametrize("method", ["graph", "kmeans"])
def test_degenerate_input_gives_a_sane_answer(method):
    one = np.ones((1, 3))
    alike = np.ones((12, 3))
    zero = np.zeros((12, 3))
    for rows_NK in (one, alike, zero, np.eye(2), np.eye(3)):
        assert choose_count(rows_NK, 6, method, 10, 0) == (1, {})
    two_places = np.repeat(np.eye(2), 6, axis=0)
    assert choose_count(two_places, 6, method, 10, 0)[0] == 2
    with_zero_row = np.concatenate([planted((15, 15), 0.1)[0], np.zeros((1, 30))])
    assert choose_count(with_zero_row, 4, method, 10, 0)[0] == 2


@pytest.mark.parametrize(
    "cluster", [lambda rows, count: graph_clusters(rows, count, 5, 0), lambda r, c: spherical_kmeans(r, c, 0)]
)
def test_counts_that_cannot_be(cluster):
    rows_NK = np.random.default_rng(0).normal(size=(4, 3))
    for count in (0, 5):
        with pytest.raises(ValueError, match=r"4 examples cannot form .* clusters; set clusters.count to 1 \.\. 4"):
            cluster(rows_NK, count)
    assert set(cluster(rows_NK, 1)) == {0}
    assert len(cluster(rows_NK, 4)) == 4
    assert set(cluster(np.ones((6, 2)), 3)) <= {0, 1, 2}
    assert len(set(cluster(np.repeat(np.eye(2), 8, axis=0), 2))) == 2
    bad = rows_NK.copy()
    bad[2, 1] = np.nan
    with pytest.raises(ValueError, match="row 2 of the coordinates is not finite"):
        cluster(bad, 2)
    assert choose_count(np.zeros((0, 3)), 2, "graph", 10, 0) == (1, {})


def test_centroids_are_unit_means():
    rows_NK = np.array([[2.0, 0], [0, 3], [0, 5], [-1, 0]])
    assert np.allclose(centroids(rows_NK, np.array([0, 1, 1, 0])), [[0, 0], [0, 1]])
    assert np.allclose(centroids(rows_NK, np.array([0, 0, 1, 1])), np.array([[1, 1], [-1, 1]]) / np.sqrt(2))


def test_small_clusters_join_the_nearest():
    rows_NK = np.array([[1.0, 0]] * 5 + [[0, 1]] * 5 + [[0.9, 0.5]] * 2 + [[0.1, 0.9]])
    labels = np.array([7] * 5 + [3] * 5 + [0] * 2 + [1])
    assert merge_small(rows_NK, labels, 3).tolist() == [1] * 5 + [0] * 5 + [1] * 2 + [0]
    assert merge_small(rows_NK, labels, 1).tolist() == [3] * 5 + [2] * 5 + [0] * 2 + [1]
    assert set(merge_small(rows_NK, labels, 100)) == {0}


def test_labels_are_ordered_by_size():
    assert by_size(np.array([5, 2, 2, 9, 9, 9, 5])).tolist() == [1, 2, 2, 0, 0, 0, 1]
    assert by_size(np.array([4])).tolist() == [0]
