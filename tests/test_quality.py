"""Judgements of clusters against direct computation and scikit-learn."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.metrics.pairwise import cosine_similarity

from gradientspace_ray.clusters import quality

TEXTS = ["def add(a, b): return a + b", "def sub(a): return a", "def mul(): return x"] * 2
STORIES = ["once upon a time a fox", "once there was an owl", "upon the hill a fox", "once a fox slept"]
SUMS = ["solve the equation plainly", "the equation has a root", "équation équation"]


def test_coherence_and_conflicts_against_all_pairs():
    rng = np.random.default_rng(0)
    rows_NK, labels = rng.normal(size=(40, 6)) + 0.5, np.arange(40) % 3
    cosines = cosine_similarity(rows_NK)
    for label, found in enumerate(quality.coherence(rows_NK, labels)):
        inside = cosines[np.ix_(labels == label, labels == label)][np.triu_indices((labels == label).sum(), 1)]
        assert found == pytest.approx(inside.mean())
    upper = np.triu_indices(40, 1)
    same = (labels[:, None] == labels)[upper]
    conflicts = quality.conflicting_pairs(rows_NK, labels, 0)
    assert conflicts["inside"] == pytest.approx((cosines[upper][same] < 0).mean())
    assert conflicts["between"] == pytest.approx((cosines[upper][~same] < 0).mean())


def test_coherence_of_degenerate_clusters():
    assert quality.coherence(np.ones((1, 2)), np.array([0])) == [1.0]
    assert quality.coherence(np.zeros((3, 2)), np.zeros(3, dtype=int)) == [0.0]
    assert quality.conflicting_pairs(np.ones((1, 2)), np.array([0]), 0) == {"inside": None, "between": None}
    assert quality.conflicting_pairs(np.zeros((3, 2)), np.array([0, 0, 1]), 0) == {"inside": 0.0, "between": 0.0}


def test_many_examples_are_sampled(monkeypatch):
    monkeypatch.setattr(quality, "PAIR_EXAMPLES", 100)
    rows_NK = np.random.default_rng(0).normal(size=(500, 4))
    first, second = (quality.conflicting_pairs(rows_NK, np.arange(500) % 2, 1) for _ in range(2))
    assert first == second
    assert first["inside"] == pytest.approx(0.5, abs=0.06)


def test_stability_is_one_for_clusters_that_return_and_low_for_chance():
    labels = np.arange(60) % 3
    assert quality.stability(labels, lambda chosen: (labels[chosen] + 1) % 3, 5, 0) == 1
    rng = np.random.default_rng(0)
    assert abs(quality.stability(labels, lambda chosen: rng.integers(0, 3, len(chosen)), 20, 0)) < 0.1
    assert quality.stability(labels[:2], lambda chosen: labels[chosen], 5, 0) is None


def test_subsamples_are_repeatable_sorted_and_differ():
    first, second = (quality.subsample_indices(50, 4, 7) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(len(set(chosen)) == 40 and (np.diff(chosen) > 0).all() for chosen in first)
    assert not np.array_equal(first[0], first[1])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["a", "b", "c", None])), min_size=1, max_size=40))
def test_agreement_is_that_of_scikit_learn_on_the_labelled(pairs):
    labels, truth = np.array([label for label, _ in pairs]), [name for _, name in pairs]
    found = quality.agreement(labels, truth)
    known = [(label, name) for label, name in pairs if name is not None]
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


def test_terms_tell_the_clusters_apart():
    texts, labels = TEXTS + STORIES, np.array([0] * 6 + [1] * 4)
    code, stories = quality.distinguishing_terms(texts, labels, 3)
    assert code[:2] == ["def", "return"]
    assert stories[0] == "fox"
    assert not set(code) & set(stories)


def test_terms_follow_the_formula():
    texts = ["apple pear", "apple", "pear plum", "plum plum plum"]
    first, second = quality.distinguishing_terms(texts, np.array([0, 0, 1, 1]), 9)
    # Shares: apple 1, 0; pear .5, .5 (no more frequent in one than in the other); plum 0, 1.
    assert (first, second) == (["apple"], ["plum"])


def test_terms_of_texts_without_words():
    assert quality.distinguishing_terms(["1 + 1", "2"], np.array([0, 1]), 3) == [[], []]
    assert quality.distinguishing_terms(["one apple", "apple"], np.array([0, 0]), 3)[0][0] == "apple"


def test_names_are_unique_slugs():
    terms = [
        ["def", "return_value"],
        ["def", "return_value"],
        ["Équation", "root"],
        ["数学"],
        [],
        ["base"],
        ["fox", "fox"],
        ["x" * 300, "y" * 300],
    ]
    names = quality.cluster_names(terms, reserved=["base"])
    assert names == [
        "def-return-value", "def-return-value-1", "equation-root", "cluster-3", "cluster-4", "base-5", "fox",
        "x" * 24 + "-" + "y" * 24,
    ]  # fmt: skip
    assert all(re.fullmatch(r"[a-z0-9-]+", name) for name in names)


@given(st.lists(st.lists(st.text(max_size=6), max_size=3), max_size=8))
@settings(max_examples=50, deadline=None)
def test_any_terms_give_unique_slugs(terms):
    names = quality.cluster_names(terms, reserved=["a", "b"])
    assert len(set(names)) == len(terms)
    assert all(re.fullmatch(r"[a-z0-9-]+", name) and name not in "ab" for name in names)


def test_typical_examples_are_nearest_the_middle():
    rows_NK = np.array([[1, 0.5], [1, 0], [1, -0.4], [0, 1.0], [0.1, 1]])
    ids = ["a", "b", "c", "d", "e"]
    assert quality.typical(ids, rows_NK, np.array([0, 0, 0, 1, 1]), 2)[0] == ["b", "c"]
    assert set(quality.typical(ids, rows_NK, np.array([0, 0, 0, 1, 1]), 9)[1]) == {"d", "e"}
