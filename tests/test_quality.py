"""Judgements of clusters against direct computation, scikit-learn and scipy."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import f_oneway, mannwhitneyu
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, roc_auc_score
from sklearn.metrics.pairwise import cosine_similarity

from gradientspace_ray.clusters import quality, rows, selection, sums
from gradientspace_ray.clusters.rows import unit_rows

labels_with_left_out = st.lists(st.integers(-1, 3), min_size=1, max_size=40)


def closed_up(labels):
    """The same labels such that 0 .. C - 1 are all present; those below 0 stay."""
    labels = np.array(labels)
    labels[labels >= 0] = np.unique(labels[labels >= 0], return_inverse=True)[1]
    return labels


def rows_for(labels, seed=0):
    """Random rows, every seventh of which is zero."""
    rows_NK = np.random.default_rng(seed).normal(size=(len(labels), 5)) + 0.4
    rows_NK[::7] = 0
    return rows_NK


@settings(max_examples=40, deadline=None)
@given(labels_with_left_out, st.sampled_from([np.float32, np.float64]), st.integers(1, 9))
def test_sums_do_not_depend_on_the_blocks(labels, dtype, block):
    labels = closed_up(labels)
    rows_NK = rows_for(labels).astype(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "BLOCK_NUMBERS", block * rows_NK.shape[1])
        counts_C, sums_CK, squares_C = sums.cluster_sums(rows_NK, labels)
    unit_NK = unit_rows(rows_NK)
    for label in range(labels.max() + 1):
        members = unit_NK[labels == label]
        assert counts_C[label] == len(members)
        assert np.allclose(sums_CK[label], members.sum(axis=0))
        assert squares_C[label] == pytest.approx(np.square(members).sum())
    assert len(counts_C) == labels.max() + 1


def test_rows_without_a_direction_and_rows_that_are_not_finite():
    rows_NK = np.array([[3.0, 4.0], [1e-9, 0.0], [0.0, 0.0]])
    assert rows.row_lengths(rows_NK).tolist() == [5.0, 0.0, 0.0]
    assert rows.unit_at(rows_NK, np.array([1, 0])).tolist() == [[0.0, 0.0], [0.6, 0.8]]
    assert np.array_equal(rows.unit_at(rows_NK, np.arange(3)), unit_rows(rows_NK))
    with pytest.raises(ValueError, match="row 1 of the coordinates is not finite; run the gradients stage again"):
        rows.row_lengths(np.array([[1.0], [np.nan]]))
    with pytest.raises(ValueError, match=r"the shape \(3,\); needed: examples x coordinates"):
        rows.row_lengths(np.zeros(3))


def test_coherence_and_conflicts_against_all_pairs():
    rng = np.random.default_rng(0)
    rows_NK, labels = rng.normal(size=(40, 6)) + 0.5, np.arange(40) % 4 - 1
    cosines = cosine_similarity(rows_NK)
    for label, found in enumerate(quality.coherence(rows_NK, labels)):
        inside = cosines[np.ix_(labels == label, labels == label)][np.triu_indices((labels == label).sum(), 1)]
        assert found == pytest.approx(inside.mean())
    placed = labels >= 0
    upper = np.triu_indices(placed.sum(), 1)
    cosines, same = cosines[np.ix_(placed, placed)][upper], (labels[placed][:, None] == labels[placed])[upper]
    conflicts = quality.conflicting_pairs(rows_NK, labels, 0)
    assert conflicts["inside"] == pytest.approx((cosines[same] < 0).mean())
    assert conflicts["between"] == pytest.approx((cosines[~same] < 0).mean())


def test_coherence_of_degenerate_clusters():
    assert quality.coherence(np.ones((1, 2)), np.array([0])) == [1.0]
    assert quality.coherence(np.zeros((3, 2)), np.zeros(3, dtype=int)) == [0.0]
    assert quality.coherence(np.ones((2, 2)), np.array([-1, -1])) == []
    assert quality.conflicting_pairs(np.ones((1, 2)), np.array([0]), 0) == {"inside": None, "between": None}
    assert quality.conflicting_pairs(np.zeros((3, 2)), np.array([0, 0, 1]), 0) == {"inside": 0.0, "between": 0.0}


def test_many_examples_are_sampled(monkeypatch):
    monkeypatch.setattr(quality, "PAIR_EXAMPLES", 100)
    rows_NK = np.random.default_rng(0).normal(size=(500, 4))
    first, second = (quality.conflicting_pairs(rows_NK, np.arange(500) % 2, 1) for _ in range(2))
    assert first == second
    assert first["inside"] == pytest.approx(0.5, abs=0.06)


@settings(max_examples=60, deadline=None)
@given(labels_with_left_out, st.integers(0, 9))
def test_variance_inside_is_that_of_the_distances_to_the_means(labels, seed):
    labels = closed_up(labels)
    rows_NK = rows_for(labels, seed)
    unit_LK, placed = unit_rows(rows_NK)[labels >= 0], labels[labels >= 0]
    found = quality.variance_inside(rows_NK, labels)
    if len(placed) < 2:
        assert found == {"share": 1.0, "at_random": 1.0}
        return
    total = np.square(unit_LK - unit_LK.mean(axis=0)).sum()
    inside = sum(
        np.square(members - members.mean(axis=0)).sum() for c in set(placed) for members in [unit_LK[placed == c]]
    )
    assert found["share"] == pytest.approx(inside / total if total > 1e-9 else 1.0, abs=1e-6)
    assert found["at_random"] == (len(placed) - len(set(placed))) / (len(placed) - 1)


def test_variance_at_random_is_what_shuffled_labels_leave():
    rng = np.random.default_rng(0)
    rows_NK, labels = rng.normal(size=(60, 4)) + 1, np.repeat([0, 1, 2, -1], [30, 15, 10, 5])
    found = quality.variance_inside(rows_NK, labels)["at_random"]
    rows_NK = rows_NK[labels >= 0]
    shares = [quality.variance_inside(rows_NK, rng.permutation(labels[labels >= 0]))["share"] for _ in range(400)]
    assert np.mean(shares) == pytest.approx(found, abs=4 * np.std(shares) / 20)


@pytest.mark.parametrize(
    ("rows_NK", "labels", "share"),
    [
        (np.ones((4, 3)), [0, 0, 1, 1], 1.0),
        (np.zeros((4, 3)), [0, 0, 1, 1], 1.0),
        (np.eye(4), [0, 0, 0, 0], 1.0),
        (np.eye(4), [0, 1, 2, 3], 0.0),
        (np.repeat(np.eye(2), 2, axis=0), [0, 0, 1, 1], 0.0),
    ],
)
def test_variance_of_degenerate_clusters(rows_NK, labels, share):
    assert quality.variance_inside(rows_NK, np.array(labels))["share"] == pytest.approx(share)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-1, 3), st.integers(0, 60)), min_size=1, max_size=40))
def test_length_is_eta_squared_and_the_auc(pairs):
    labels, tokens = closed_up([label for label, _ in pairs]), np.array([count for _, count in pairs])
    found = quality.length(labels, tokens)
    labels, tokens = labels[labels >= 0], tokens[labels >= 0]
    logs = np.log(np.maximum(tokens, 1))
    assert len(found["longer"]) == len(set(labels))
    for label, longer in enumerate(found["longer"]):
        inside = labels == label
        if inside.all():
            assert longer is None
            continue
        assert longer == pytest.approx(roc_auc_score(inside, tokens))
        statistic = mannwhitneyu(tokens[inside], tokens[~inside]).statistic
        assert longer == pytest.approx(statistic / (inside.sum() * (~inside).sum()))
    groups = [logs[labels == label] for label in set(labels)]
    within, total = (
        sum(np.square(g - g.mean()).sum() for g in groups),
        np.square(logs - logs.mean()).sum() if groups else 0,
    )
    assert found["explained"] == pytest.approx(1 - within / total if total > 1e-9 else 0.0, abs=1e-9)
    if 1 < len(groups) < len(logs) and within > 1e-9:
        # eta^2 from the F statistic of a one-way analysis of variance.
        ratio = f_oneway(*groups).statistic * (len(groups) - 1) / (len(logs) - len(groups))
        assert found["explained"] == pytest.approx(ratio / (1 + ratio), abs=1e-9)


def test_stability_is_one_for_clusters_that_return_and_low_for_chance():
    labels = np.arange(60) % 3
    assert quality.stability(labels, lambda chosen: (labels[chosen] + 1) % 3, 5, 0) == 1
    rng = np.random.default_rng(0)
    assert abs(quality.stability(labels, lambda chosen: rng.integers(0, 3, len(chosen)), 20, 0)) < 0.1
    assert quality.stability(labels[:2], lambda chosen: labels[chosen], 5, 0) is None


def test_stability_of_fewer_than_two_clusters_says_nothing():
    for labels in (np.zeros(9, dtype=int), np.repeat([-1, 0], [4, 5]), np.full(9, -1)):
        assert quality.stability(labels, lambda chosen: np.zeros(len(chosen), dtype=int), 5, 0) is None


def test_stability_asks_only_for_examples_that_have_a_cluster():
    labels, asked = np.arange(60) % 4 - 1, []

    def again(chosen):
        asked.append(chosen)
        return labels[chosen]

    assert quality.stability(labels, again, 3, 0) == 1
    assert [len(chosen) for chosen in asked] == [36] * 3
    assert all((labels[chosen] >= 0).all() and (np.diff(chosen) > 0).all() for chosen in asked)
    assert quality.stability(np.array([0, 1, -1, -1]), again, 3, 0) is None


def test_subsamples_are_repeatable_sorted_and_differ():
    first, second, other = (quality.subsample_indices(50, 4, seeds) for seeds in ([7, 2], [7, 2], [7, 3]))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(len(set(chosen)) == 40 and (np.diff(chosen) > 0).all() for chosen in first)
    # Every subsample is another one, and those of other seeds too.
    assert len({chosen.tobytes() for chosen in first + other}) == 8


def test_stability_is_not_measured_on_the_subsamples_that_chose_the_count(monkeypatch):
    asked, chose = [], []

    def subsample_indices(*arguments):
        drawn = quality.subsample_indices(*arguments)
        chose.extend(drawn)
        return drawn

    def again(chosen):
        asked.append(chosen.tobytes())
        return labels[chosen]

    monkeypatch.setattr(selection, "subsample_indices", subsample_indices)
    labels = np.arange(60) % 3
    rows_NK = np.random.default_rng(0).normal(size=(60, 4)) + 3 * np.eye(4)[labels]
    selection.choose_count(rows_NK, 4, "kmeans", 5, 0)
    judged(rows_NK, labels, again=again)
    assert len(asked) == len(chose) == 10
    assert not {chosen.tobytes() for chosen in chose} & set(asked)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(-1, 3), st.sampled_from(["a", "b", "c", None])), min_size=1, max_size=40))
def test_agreement_is_that_of_scikit_learn_on_the_labelled(pairs):
    labels, truth = np.array([label for label, _ in pairs]), [name for _, name in pairs]
    found = quality.agreement(labels, truth)
    known = [(label, name) for label, name in pairs if name is not None and label >= 0]
    if not known:
        assert found == {}
        return
    clusters, names = zip(*known, strict=True)
    assert found["ari"] == pytest.approx(adjusted_rand_score(names, clusters))
    assert found["nmi"] == pytest.approx(normalized_mutual_info_score(names, clusters))
    most = sum(
        max([n for c, n in known if c == cluster].count(name) for name in set(names)) for cluster in set(clusters)
    )
    assert found["purity"] == pytest.approx(most / len(known))


def test_nearest_neighbour_purity_against_all_cosines():
    rng = np.random.default_rng(0)
    group = np.arange(80) % 3
    rows_NK = (rng.normal(size=(80, 6)) + 2 * np.eye(6)[group]) * rng.uniform(0.1, 9, size=(80, 1))
    rows_NK[5] = 0
    truth = [None if index % 10 == 3 else f"d{group[index]}" for index in range(80)]
    known = [index for index in range(80) if truth[index] and index != 5]
    cosines = cosine_similarity(rows_NK[known])
    np.fill_diagonal(cosines, -2)
    expected = np.mean([group[known[nearest]] == group[i] for i, nearest in zip(known, cosines.argmax(1), strict=True)])
    assert 0.5 < expected < 1
    assert quality.nearest_neighbour_purity(rows_NK, truth, 0) == pytest.approx(expected)
    assert quality.nearest_neighbour_purity(rows_NK.astype(np.float32), truth, 0) == pytest.approx(expected)


def test_nearest_neighbour_purity_of_a_sample_and_of_nothing(monkeypatch):
    rows_NK, truth = np.repeat(np.eye(3), 50, axis=0), np.repeat(["a", "b", "c"], 50).tolist()
    rows_NK += np.random.default_rng(0).normal(size=rows_NK.shape) * 0.01
    monkeypatch.setattr(quality, "NEIGHBOUR_EXAMPLES", 30)
    assert quality.nearest_neighbour_purity(rows_NK, truth, 0) == 1
    assert quality.nearest_neighbour_purity(rows_NK[:2], ["a", None], 0) is None
    assert quality.nearest_neighbour_purity(np.zeros((3, 2)), ["a", "a", "b"], 0) is None
    # An example that another one equals has that one for its neighbour, and never itself.
    assert quality.nearest_neighbour_purity(np.ones((2, 2)), ["a", "b"], 0) == 0


def judged(rows_NK, labels, domains=None, again=None):
    labels = np.array(labels)
    return quality.judge(
        rows_NK,
        labels,
        domains=domains or [None] * len(labels),
        tokens_N=np.arange(len(labels), dtype=np.int32) + 10,
        response_tokens_N=np.arange(len(labels), dtype=np.int32) + 1,
        cluster_again=again or (lambda chosen: labels[chosen]),
        seed=0,
    )


def test_judgement_holds_every_key_and_is_json():
    rng = np.random.default_rng(0)
    labels = np.array([0] * 8 + [1] * 6 + [-1] * 2)
    rows_NK = (rng.normal(size=(16, 5)) * 0.3 + np.eye(5)[labels]).astype(np.float32)
    found = judged(rows_NK, labels, ["a"] * 8 + ["b"] * 6 + [None] * 2)
    assert json.loads(json.dumps(found)) == found
    assert list(found) == [
        *("count", "sizes", "tokens", "response_tokens", "left_out", "coherence", "conflicting_pairs"),
        *("variance_inside", "stability", "length", "ari", "nmi", "purity", "nn_purity"),
    ]
    assert found["count"] == 2
    assert found["sizes"] == [8, 6]
    assert found["tokens"] == [sum(range(10, 18)), sum(range(18, 24))]
    assert found["response_tokens"] == [sum(range(1, 9)), sum(range(9, 15))]
    assert found["left_out"] == {"examples": 2, "tokens": 24 + 25, "response_tokens": 15 + 16}
    assert found["length"]["longer"] == [0.0, 1.0]
    assert found["stability"] == found["ari"] == found["nmi"] == found["purity"] == 1
    assert found["variance_inside"]["share"] < found["variance_inside"]["at_random"]
    assert found == judged(rows_NK, labels, ["a"] * 8 + ["b"] * 6 + [None] * 2)


def test_judgement_without_labels_has_no_keys_of_labels():
    found = judged(np.eye(4), [0, 0, 1, 1])
    assert not {"ari", "nmi", "purity", "nn_purity"} & set(found)


@pytest.mark.parametrize("rows_NK", [np.ones((1, 2)), np.zeros((4, 3)), np.ones((4, 3))])
@pytest.mark.parametrize("label", [0, -1])
def test_judgement_of_degenerate_clusters(rows_NK, label):
    found = judged(rows_NK, [label] * len(rows_NK), ["a"] * len(rows_NK))
    assert found["count"] == len(found["sizes"]) == len(found["coherence"]) == label + 1
    assert found["variance_inside"] == {"share": 1.0, "at_random": 1.0}
    assert found["length"] == {"explained": 0.0, "longer": [None] * (label + 1)}
    assert found["stability"] is None
    json.dumps(found, allow_nan=False)


def test_of_many_examples_a_sample_is_clustered_again(monkeypatch):
    monkeypatch.setattr(quality, "STABILITY_EXAMPLES", 50)
    labels, asked = np.arange(200) % 2, []

    def again(chosen):
        asked.append(chosen)
        return labels[chosen]

    assert judged(rows_for(labels), labels, again=again)["stability"] == 1
    assert [len(chosen) for chosen in asked] == [40] * 10
    assert len(set(np.concatenate(asked).tolist())) == 50
    assert max(chosen.max() for chosen in asked) > 100
