"""What people would use instead of the clusters of the graph."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.hierarchy import fcluster, linkage
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from sklearn.metrics.pairwise import cosine_similarity

from gradientspace_ray.clusters import baselines, rows
from gradientspace_ray.clusters.baselines import BIRCH_THRESHOLD, birch_labels, length_labels, random_labels

pytestmark = pytest.mark.filterwarnings("error")


def gradients(sizes, width=2048, cosine=0.1, seed=0):
    """Rows [N, width] float32 of groups with this mean cosine inside, near 0 between, and of various lengths; truth."""
    rng = np.random.default_rng(seed)

    def unit(*shape):
        rows = rng.normal(size=shape)
        return rows / np.linalg.norm(rows, axis=-1, keepdims=True)

    rows = [np.sqrt(cosine) * unit(1, width) + np.sqrt(1 - cosine) * unit(size, width) for size in sizes]
    truth = np.repeat(np.arange(len(sizes)), sizes)
    order = rng.permutation(len(truth))
    lengths_N1 = rng.uniform(0.1, 10, size=(len(truth), 1))
    return (lengths_N1 * np.concatenate(rows)[order]).astype(np.float32), truth[order]


def scaled(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@given(examples=st.integers(1, 200), share=st.floats(0, 1), seed=st.integers(0, 2**32 - 1))
def test_random_clusters_are_of_equal_size(examples, share, seed):
    count = 1 + int(share * (examples - 1))
    sizes = np.bincount(random_labels(examples, count, seed), minlength=count)
    assert len(sizes) == count
    assert sizes.max() - sizes.min() <= 1
    assert np.array_equal(random_labels(examples, count, seed), random_labels(examples, count, seed))


def test_random_clusters_know_nothing_of_the_order():
    labels = random_labels(3000, 3, 0)
    assert abs(adjusted_rand_score(np.arange(3000) // 1000, labels)) < 0.01
    assert abs(adjusted_rand_score(labels, random_labels(3000, 3, 1))) < 0.01


@given(
    tokens=st.lists(st.integers(0, 4096), min_size=1, max_size=60), share=st.floats(0, 1), seed=st.integers(0, 10**6)
)
@settings(max_examples=30)
def test_clusters_of_length_are_ranges_of_length(tokens, share, seed):
    tokens_N = np.array(tokens)
    count = 1 + int(share * (len(tokens) - 1))
    labels = length_labels(tokens_N, count, seed)
    assert labels.min() >= 0
    assert labels.max() < count
    ordered = labels[np.argsort(tokens_N, kind="stable")]
    assert (np.diff(ordered) != 0).sum() == len(set(ordered)) - 1
    assert len(set(labels)) <= len(set(np.maximum(tokens_N, 1)))
    assert np.array_equal(length_labels(tokens_N, count, seed), labels)


def test_clusters_of_length_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    truth = np.repeat([0, 1, 2], (50, 80, 70))
    tokens_N = np.round(np.exp(np.log([20, 90, 400])[truth] + 0.2 * rng.normal(size=200))).astype(int)
    labels = length_labels(tokens_N, 3, 0)
    theirs = KMeans(3, n_init=10, random_state=0).fit_predict(np.log(tokens_N)[:, None])
    assert adjusted_rand_score(theirs, labels) == 1
    assert adjusted_rand_score(truth, labels) > 0.97


@pytest.mark.parametrize("cosine", [0.07, 0.1, 0.3])
def test_birch_finds_planted_groups_as_wards_method_does(cosine):
    rows_NP, truth = gradients((60, 50, 40, 30), cosine=cosine)
    labels = birch_labels(rows_NP, 4, 0)
    assert adjusted_rand_score(truth, labels) > 0.97
    unit_NP = scaled(rows_NP.astype(np.float64))
    cosines = cosine_similarity(unit_NP) - np.eye(180)
    assert np.sqrt((1 - cosines.max()) / 2) > BIRCH_THRESHOLD, "each row is a subcluster"
    ward = fcluster(linkage(unit_NP, "ward"), 4, "maxclust")
    means_CP = np.stack([unit_NP[ward == label].mean(axis=0) for label in np.unique(ward)])
    assert adjusted_rand_score(cosine_similarity(unit_NP, means_CP).argmax(axis=1), labels) == 1


def test_rows_that_are_nearly_the_same_are_one_subcluster():
    rng = np.random.default_rng(0)
    directions_CP = rng.normal(size=(3, 64))
    rows_NP = np.repeat(directions_CP, (40, 20, 10), axis=0) + 0.1 * rng.normal(size=(70, 64))
    truth = np.repeat([0, 1, 2], (40, 20, 10))
    assert adjusted_rand_score(truth, birch_labels(rows_NP, 3, 0)) == 1
    assert adjusted_rand_score(truth, birch_labels(rows_NP, 8, 0)) == 1, "there are no more subclusters than three"


def test_of_many_examples_a_sample_is_fitted_and_the_rest_join_the_nearest_mean(monkeypatch, tmp_path):
    rows_NP, truth = gradients((300, 200, 100))
    rows_NP[::50] = 0
    live = rows_NP.any(axis=1)
    fitted = []
    fit = baselines._birch_means
    monkeypatch.setattr(baselines, "BIRCH_EXAMPLES", 200)
    monkeypatch.setattr(baselines, "_birch_means", lambda unit, count: fitted.append(unit) or fit(unit, count))
    labels = birch_labels(rows_NP, 3, 5)
    assert fitted[0].shape == (200, rows_NP.shape[1])
    np.testing.assert_allclose(np.linalg.norm(fitted[0], axis=1), 1, atol=1e-6)
    assert adjusted_rand_score(truth[live], labels[live]) > 0.97
    assert set(labels[~live]) == {np.bincount(labels[live]).argmax()}

    np.save(tmp_path / "projection.npy", rows_NP)
    monkeypatch.setattr(rows, "BLOCK_NUMBERS", 64 * rows_NP.shape[1] + 1)
    on_disk = np.load(tmp_path / "projection.npy", mmap_mode="r")
    assert np.array_equal(birch_labels(on_disk, 3, 5), labels)
    assert np.array_equal(birch_labels(1e-9 * rows_NP.astype(np.float64), 3, 5), labels)


@settings(max_examples=40)
@given(
    count=st.integers(1, 12), examples=st.integers(1, 12), width=st.integers(1, 6), seed=st.integers(0, 10**6),
    places=st.integers(0, 4),
)  # fmt: skip
def test_any_rows_get_labels_without_a_warning(count, examples, width, seed, places):
    rng = np.random.default_rng(seed)
    # Row 0 of the places is zero, so that equal rows, zero rows and both occur.
    table = np.concatenate([np.zeros((1, width)), rng.normal(size=(places, width))])
    rows_NP = table[rng.integers(0, places + 1, size=examples)]
    if count > examples:
        with pytest.raises(ValueError, match=f"{examples} examples cannot form {count} clusters; set clusters.count"):
            birch_labels(rows_NP, count, seed)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        labels = birch_labels(rows_NP, count, seed)
    assert labels.dtype == int
    assert labels.min() >= 0
    assert labels.max() < count
    assert np.array_equal(birch_labels(rows_NP, count, seed), labels)
    for place in table:
        alike = (rows_NP == place).all(axis=1)
        assert len(set(labels[alike])) <= 1


def test_equal_and_opposite_rows():
    assert set(birch_labels(np.ones((9, 3)), 4, 0)) == {0}
    assert set(birch_labels(np.zeros((9, 3)), 4, 0)) == {0}
    assert set(length_labels(np.full(9, 30), 4, 0)) == {0}
    assert sorted(birch_labels(np.array([[0.0, 2], [0, -3]]), 2, 0)) == [0, 1]
    assert birch_labels(np.array([[1.0, 0], [0, 2], [0, 1e-9], [0, 3]]), 2, 0).tolist() in ([0, 1, 1, 1], [1, 0, 0, 0])
    assert set(birch_labels(np.array([[1.0, 0], [-1, 0]] * 3), 1, 0)) == {0}


@pytest.mark.parametrize(
    "cluster",
    [
        lambda examples, count: random_labels(examples, count, 0),
        lambda examples, count: length_labels(np.arange(1, examples + 1), count, 0),
        lambda examples, count: birch_labels(np.eye(max(examples, 1))[:examples], count, 0),
    ],
    ids=["random", "length", "birch"],
)
def test_counts_that_cannot_be(cluster):
    for examples, count in ((4, 0), (4, 5), (0, 1)):
        with pytest.raises(ValueError, match=f"{examples} examples cannot form {count} clusters; set clusters.count"):
            cluster(examples, count)
    assert cluster(1, 1).tolist() == [0]
    assert sorted(cluster(4, 4)) == [0, 1, 2, 3]


def test_a_projection_that_is_not_finite_is_named():
    rows_NP = np.ones((4, 3), np.float32)
    rows_NP[2, 1] = np.nan
    with pytest.raises(ValueError, match="row 2 of the coordinates is not finite"):
        birch_labels(rows_NP, 2, 0)
