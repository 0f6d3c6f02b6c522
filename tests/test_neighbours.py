"""Neighbours, the clusters of many examples that a sample decides, and outliers."""

import builtins

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score
from sklearn.neighbors import LocalOutlierFactor
from test_clusters import planted

from gradientspace_ray.clusters import graph, kmeans, neighbours, outliers, rows
from gradientspace_ray.clusters.methods import clusters_of
from gradientspace_ray.clusters.neighbours import label_by_neighbours, mean_cosines, nearest_others

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


@if_any_rows
@given(count=st.integers(2, 40), kept=st.integers(2, 40), wanted=st.integers(1, 12), seed=st.integers(0, 10**6))
def test_mean_cosines_leave_an_example_itself_out(count, kept, wanted, seed):
    unit_NK = unit(count, 5, seed)
    places = rows.sample(count, min(kept, count), [seed])
    cosines_NL = unit_NK @ unit_NK[places].T
    cosines_NL[places, np.arange(len(places))] = -np.inf
    used = min(wanted, len(places) - 1)
    expected = -np.sort(-cosines_NL, axis=1)[:, :used].mean(axis=1)
    assert np.allclose(mean_cosines(unit_NK, places, wanted), expected, atol=1e-6)


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


def test_outliers_are_the_examples_without_a_neighbourhood(monkeypatch):
    coordinates_NK, _ = planted((100, 80, 60), 0.1)
    rng = np.random.default_rng(0)
    strange = np.zeros((6, coordinates_NK.shape[1] + 6))
    strange[:, -6:] = np.eye(6)
    rows_NK = np.concatenate([np.pad(coordinates_NK, ((0, 0), (0, 6))), strange, np.zeros((2, strange.shape[1]))])
    order = rng.permutation(len(rows_NK))
    found = outliers.outliers(rows_NK[order], 10, 0)
    assert set(order[found]) >= set(range(240, 248))
    assert found.sum() < 8 + 12
    local = LocalOutlierFactor(10, contamination=6 / 246).fit_predict(rows.unit_rows(rows_NK[:246])) < 0
    assert set(np.flatnonzero(local)) == set(range(240, 246))
    monkeypatch.setattr(outliers, "FIT_EXAMPLES", 120)
    assert set(order[outliers.outliers(rows_NK[order], 10, 0)]) >= set(range(240, 248))


def test_degenerate_input_has_no_outliers_but_zero_rows():
    assert not outliers.outliers(np.ones((1, 3)), 10, 0).any()
    assert not outliers.outliers(np.ones((9, 3)), 10, 0).any()
    assert not outliers.outliers(np.eye(4), 10, 0).any()
    assert outliers.outliers(np.zeros((3, 2)), 10, 0).all()
    assert outliers.outliers(np.array([[1.0, 0], [0, 0], [1, 0.1]]), 10, 0).tolist() == [False, True, False]
