"""Neighbours, the clusters of many examples that a sample decides, and outliers."""

import builtins

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import block_diag
from sklearn.metrics import adjusted_rand_score
from test_clusters import planted
from threadpoolctl import threadpool_limits

from gradientspace_ray.clusters import graph, kmeans, neighbours, outliers, rows
from gradientspace_ray.clusters.methods import clusters_of
from gradientspace_ray.clusters.neighbours import label_by_neighbours, nearest_others

SEARCHES = ("exact", "faiss")
if_any_rows = settings(max_examples=30, deadline=None)


def unit(count, width, seed):
    return rows.unit_rows(np.random.default_rng(seed).normal(size=(count, width)))


@pytest.mark.parametrize("search", SEARCHES)
@if_any_rows
@given(count=st.integers(3, 40), width=st.integers(2, 9), wanted=st.integers(1, 12), seed=st.integers(0, 10**6))
def test_nearest_others_are_those_of_all_pairs(search, count, width, wanted, seed):
    unit_NK, used = unit(count, width, seed), min(wanted, count - 1)
    cosines_NM, indices_NM = nearest_others(unit_NK, used, search)
    all_NN = unit_NK @ unit_NK.T
    np.fill_diagonal(all_NN, -np.inf)
    assert np.allclose(cosines_NM, -np.sort(-all_NN, axis=1)[:, :used], atol=1e-6)
    assert np.allclose(np.take_along_axis(all_NN, indices_NM, axis=1), cosines_NM, atol=1e-6)


@pytest.mark.parametrize("search", SEARCHES)
def test_equal_rows_are_each_others_neighbours_and_not_their_own(search):
    unit_NK = np.repeat(unit(3, 4, 0), 6, axis=0)
    cosines_NM, indices_NM = nearest_others(unit_NK, 5, search)
    assert np.allclose(cosines_NM, 1, atol=1e-6)
    assert all(
        index not in found and set(found) <= set(range(index // 6 * 6, index // 6 * 6 + 6))
               for index, found in enumerate(indices_NM.tolist()))  # fmt: skip


@pytest.mark.parametrize("search", SEARCHES)
def test_a_query_gets_the_label_with_the_most_cosine(search, monkeypatch):
    monkeypatch.setattr(neighbours, "QUERIES_AT_ONCE", 7)
    places_LK, queries_QK = unit(30, 5, 1), unit(25, 5, 2)
    labels_L = np.random.default_rng(3).integers(0, 4, 30)
    cosines_QL = queries_QK @ places_LK.T
    expected = []
    for cosines_L in cosines_QL:
        nearest = np.argsort(-cosines_L)[:6]
        sums = [sum(max(cosines_L[i], 1e-9) for i in nearest if labels_L[i] == label) for label in range(4)]
        expected.append(int(np.argmax(sums)))
    assert label_by_neighbours(queries_QK, places_LK, labels_L, 6, search).tolist() == expected
    assert label_by_neighbours(-places_LK[:1], places_LK[:1], labels_L[:1], 6, search).tolist() == [labels_L[0]]


def test_without_faiss_the_error_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without_faiss(name, *arguments, **options):
        if name == "faiss":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_faiss)
    with pytest.raises(ValueError, match=r"pip install 'gradientspace-ray\[faiss\]'"):
        nearest_others(unit(5, 3, 0), 2, "faiss")


@pytest.mark.parametrize("method", ["graph", "kmeans"])
@pytest.mark.parametrize("search", SEARCHES)
def test_a_sample_decides_the_clusters_of_many(method, search, monkeypatch):
    coordinates_NK, truth = planted((200, 150, 150), 0.1, subspace=2 if method == "graph" else 40)
    coordinates_NK[::50] = 0
    live = np.arange(500) % 50 > 0
    for module in (graph, kmeans):
        monkeypatch.setattr(module, "FIT_EXAMPLES", 150)
    first, second = (clusters_of(coordinates_NK, 3, method, 10, 0, search) for _ in range(2))
    assert np.array_equal(first, second)
    assert adjusted_rand_score(truth[live], first[live]) > 0.97
    assert set(first[~live]) == {np.bincount(first[live]).argmax()}


def rows_with_outliers():
    """Groups of 100, 80 and 60, a looser one of 60, six examples that are like no other, and two zero rows."""
    tight_NK, _ = planted((100, 80, 60), 0.3)
    loose_NK, _ = planted((60,), 0.05, seed=1)
    width = tight_NK.shape[1] + loose_NK.shape[1] + 6
    rows_NK = np.zeros((308, width))
    rows_NK[:240, : tight_NK.shape[1]] = tight_NK
    rows_NK[240:300, tight_NK.shape[1] : -6] = loose_NK
    rows_NK[300:306, -6:] = np.eye(6)
    return rows_NK


@pytest.mark.parametrize("fitted", [20_000, 200])
def test_outliers_are_the_examples_without_a_neighbourhood(fitted, monkeypatch):
    monkeypatch.setattr(outliers, "FIT_EXAMPLES", fitted)
    rows_NK = rows_with_outliers()
    order = np.random.default_rng(0).permutation(len(rows_NK))
    found = set(order[outliers.outliers(rows_NK[order], 10, 0)])
    assert {306, 307} <= found
    # Of the six, those in the sample are each other's neighbours at most.
    assert len(found & set(range(300, 306))) >= 5
    # A loose group is one all the same.
    assert len(found & set(range(240, 300))) <= 3
    assert len(found & set(range(240))) <= 3


def test_degenerate_input_has_no_outliers_but_zero_rows():
    assert not outliers.outliers(np.ones((1, 3)), 10, 0).any()
    assert not outliers.outliers(np.ones((9, 3)), 10, 0).any()
    assert not outliers.outliers(np.eye(4), 10, 0).any()
    assert outliers.outliers(np.zeros((3, 2)), 10, 0).all()
    near_NK = 1 + 0.01 * np.random.default_rng(0).normal(size=(5, 8))
    assert not outliers.outliers(np.concatenate([np.ones((20, 8)), near_NK]), 10, 0).any()
    assert outliers.outliers(np.array([[1.0, 0], [0, 0], [1, 0.1]]), 10, 0).tolist() == [False, True, False]


@if_any_rows
@given(count=st.integers(3, 40), wanted=st.integers(1, 5), seed=st.integers(0, 10**6))
def test_spherical_kmeans_is_at_a_fixed_point(count, wanted, seed):
    unit_NK, wanted = unit(count, 4, seed), min(wanted, count)
    labels = kmeans.spherical_kmeans(unit_NK, wanted, seed)
    present = np.unique(labels)
    means_CK = rows.unit_rows(np.stack([unit_NK[labels == label].sum(axis=0) for label in present]))
    assert np.array_equal(present[(unit_NK @ means_CK.T).argmax(axis=1)], labels)


@pytest.mark.parametrize("method", ["graph", "kmeans"])
def test_no_bit_depends_on_the_number_of_threads(method, monkeypatch):
    monkeypatch.setattr(graph, "DENSE_EXAMPLES", 50)
    coordinates_NK = np.random.default_rng(0).normal(size=(700, 12))
    # Some are equal, so that neighbours are a matter of order.
    coordinates_NK[350:] = coordinates_NK[np.arange(350) % 40]
    found = []
    for threads in (1, 4):
        with threadpool_limits(threads):
            unit_NK = rows.unit_rows(coordinates_NK)
            found.append((clusters_of(coordinates_NK, 7, method, 10, 0), *nearest_others(unit_NK, 5)))
    for first, second in zip(*found, strict=True):
        assert np.array_equal(first, second)


def test_a_graph_in_pieces_has_every_eigenvalue_as_often_as_it_should(monkeypatch):
    monkeypatch.setattr(graph, "DENSE_EXAMPLES", 10)
    pieces = [unit(size, 6, size) for size in (60, 50, 40, 30, 1)]
    rows_NK = block_diag(*pieces)
    weights = graph.neighbour_graph(rows_NK, 6)
    values_E, vectors_NE = graph.laplacian_eigenmap(weights, 12, 0)
    degrees_N = weights.toarray().sum(axis=1)
    roots_N = np.where(degrees_N > 0, 1 / np.sqrt(np.where(degrees_N > 0, degrees_N, 1)), 0)
    laplacian_NN = np.diag((degrees_N > 0).astype(float)) - weights.toarray() * np.outer(roots_N, roots_N)
    assert (values_E < 1e-9).sum() == 5
    assert np.allclose(values_E, np.linalg.eigvalsh(laplacian_NN)[:12], atol=1e-8)
    assert np.allclose(laplacian_NN @ vectors_NE, vectors_NE * values_E, atol=1e-6)
    assert np.allclose(vectors_NE.T @ vectors_NE, np.eye(12), atol=1e-8)
    # More pieces than clusters: the smallest join those that they are near.
    labels = graph.graph_clusters(rows_NK, 3, 6, 0)
    assert set(labels) == {0, 1, 2}
    assert all(len(set(labels[start:stop])) == 1 for start, stop in ((0, 60), (60, 110), (110, 150)))
