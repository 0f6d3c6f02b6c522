"""What is said of clusters: terms against the formula, names, and clusters of nothing but long answers."""

import itertools
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from gradientspace_ray.clusters import description, rows
from gradientspace_ray.clusters.quality import length

TEXTS = ["def add(a, b): return a + b", "def sub(a): return a", "def mul(): return x"] * 2
STORIES = ["once upon a time a fox", "once there was an owl", "upon the hill a fox", "once a fox slept"]


def terms_of(texts, labels, count=9):
    return description.distinguishing_terms(*description.term_shares(texts, np.array(labels)), count)


def test_terms_tell_the_clusters_apart():
    code, stories = terms_of(TEXTS + STORIES, [0] * 6 + [1] * 4, 3)
    assert code[:2] == ["def", "return"]
    assert stories[0] == "fox"
    assert not set(code) & set(stories)


def test_terms_follow_the_formula():
    texts = ["apple pear", "apple", "pear plum", "plum plum plum"]
    # Shares: apple 1, 0; pear .5, .5 (no more frequent in one than in the other); plum 0, 1.
    assert terms_of(texts, [0, 0, 1, 1]) == [["apple"], ["plum"]]
    vocabulary, shares_CV = description.term_shares(texts, np.array([0, 0, 1, 1]))
    assert vocabulary == ["apple", "pear", "plum"]
    assert shares_CV.tolist() == [[1, 0.5, 0], [0, 0.5, 1]]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 20), min_size=5, max_size=5), min_size=2, max_size=4))
def test_terms_are_ranked_by_the_formula(twentieths):
    shares_CV = np.array(twentieths) / 20
    shares_CV[0] = np.maximum(shares_CV[0], 0.05)
    vocabulary = list("vwxyz")
    found = description.distinguishing_terms(vocabulary, shares_CV, 9)
    for cluster, terms in enumerate(found):
        others = np.delete(shares_CV, cluster, axis=0).mean(axis=0)
        scores = (shares_CV[cluster] - others) * np.log(1 + 1 / shares_CV.sum(axis=0))
        assert set(terms) == {vocabulary[v] for v in range(5) if scores[v] > 1e-9}
        ranked = [scores[vocabulary.index(term)] for term in terms]
        assert all(a >= b - 1e-12 for a, b in itertools.pairwise(ranked))


def test_a_word_of_all_clusters_speaks_for_none():
    texts = ["kindly boil water"] * 18 + ["boil water"] * 2 + ["kindly fox"] * 16 + ["fox owl"] * 4
    assert terms_of(texts, [0] * 20 + [1] * 20) == [["boil", "water", "kindly"], ["fox", "owl"]]


def test_terms_of_texts_without_words():
    assert terms_of(["1 + 1", "2"], [0, 1]) == [[], []]
    assert terms_of(["did you", "does it"], [0, 1]) == [[], []]
    assert terms_of(["one apple", "apple"], [0, 0])[0][0] == "apple"
    assert terms_of([], []) == []


def test_only_an_empty_vocabulary_is_taken_for_no_words():
    class Unreadable(str):
        def __getitem__(self, _):
            raise ValueError("cannot be read")

    with pytest.raises(ValueError, match="cannot be read"):
        description.term_shares([Unreadable("apple")], np.array([0]))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.sets(st.sampled_from(["apple", "pear", "plum"]))), min_size=3, max_size=30)
)
def test_the_best_words_auc_is_that_of_scikit_learn(pairs):
    labels = np.unique([label for label, _ in pairs], return_inverse=True)[1]
    texts = [" ".join(sorted(words)) for _, words in pairs]
    vocabulary, shares_CV = description.term_shares(texts, labels)
    found = description.term_auc(shares_CV, np.bincount(labels))
    for label in range(labels.max() + 1):
        if (labels == label).all():
            assert found[label] == 0.5
            continue
        aucs = [roc_auc_score(labels == label, [word in text.split() for text in texts]) for word in vocabulary]
        assert found[label] == pytest.approx(max([0.5, *aucs, *(1 - auc for auc in aucs)]))


def test_what_is_told_by_length_alone_is_called_so():
    longer = [0.95, 0.95, 0.03, 0.91, 0.8, None]
    words = [0.90, 0.97, 0.6, 0.905, 0.5, 0.5]
    called = description.called_by_length(longer, words)
    assert called == ["long answers", "", "short answers", "long answers", "", ""]
    names = description.cluster_names([["fox", "owl"]] * 6, called, [])
    assert names[:3] == ["long-answers-fox", "fox-owl", "short-answers-fox"]
    assert names[3:] == ["long-answers-fox-3", "fox-owl-4", "fox-owl-5"]
    assert description.cluster_names([[]], ["long answers"], []) == ["long-answers"]


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
    names = description.cluster_names(terms, [""] * 8, ["base"])
    assert names == [
        "def-return-value", "def-return-value-1", "equation-root", "cluster-3", "cluster-4", "base-5", "fox",
        "x" * 24 + "-" + "y" * 24,
    ]  # fmt: skip
    assert all(re.fullmatch(r"[a-z0-9-]+", name) for name in names)


def test_names_prefer_terms_that_no_earlier_name_has():
    terms = [["module", "self", "raise"], ["module", "raise", "self", "type"], ["module", "self"]]
    assert description.cluster_names(terms, ["", "", ""], []) == ["module-self", "raise-type", "module-self-2"]
    assert description.cluster_names([["story", "stories", "tale"]], [""], []) == ["story-tale"]
    assert description.cluster_names([["cat", "car", "cats"]], [""], []) == ["cat-car"]
    assert description.cluster_names([["equation", "equations", "root"]], [""], []) == ["equation-root"]


@given(
    st.lists(st.tuples(st.lists(st.text(max_size=6), max_size=3), st.sampled_from(["", "long answers"])), max_size=8)
)
@settings(max_examples=50, deadline=None)
def test_any_terms_give_unique_slugs(found):
    names = description.cluster_names([terms for terms, _ in found], [kind for _, kind in found], ["a", "b"])
    assert len(set(names)) == len(found)
    assert all(re.fullmatch(r"[a-z0-9-]+", name) and name not in "ab" for name in names)


@pytest.mark.parametrize("block_numbers", [4, 1 << 16])
def test_typical_examples_are_nearest_the_middle(monkeypatch, block_numbers):
    monkeypatch.setattr(rows, "BLOCK_NUMBERS", block_numbers)
    rows_NK = np.array([[1, 0.5], [1, 0], [1, -0.4], [9, 9], [0, 1.0], [0.1, 1]])
    ids, labels = ["a", "b", "c", "x", "d", "e"], np.array([0, 0, 0, -1, 1, 1])
    assert description.typical(ids, rows_NK, labels, 2)[0] == ["b", "c"]
    assert set(description.typical(ids, rows_NK, labels, 9)[1]) == {"d", "e"}
    assert description.typical(ids, rows_NK, np.full(6, -1), 2) == []


def test_every_cluster_has_some_texts(monkeypatch):
    monkeypatch.setattr(description, "TEXT_EXAMPLES", 100)
    monkeypatch.setattr(description, "MIN_TEXT_EXAMPLES", 20)
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, -1], [700, 190, 10, 100]))
    chosen = description.text_sample(labels, 0)
    assert np.bincount(labels[chosen]).tolist() == [77, 21, 10]
    assert (np.diff(chosen) > 0).all()
    assert np.array_equal(chosen, description.text_sample(labels, 0))
    assert not np.array_equal(chosen, description.text_sample(labels, 1))
    few = np.array([0, -1, 1, 0])
    assert description.text_sample(few, 0).tolist() == [0, 2, 3]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(0, 9))
def test_many_clusters_do_not_multiply_the_texts(sizes, seed):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(description, "TEXT_EXAMPLES", 60)
        patch.setattr(description, "MIN_TEXT_EXAMPLES", 20)
        chosen = description.text_sample(labels, seed)
    assert len(set(chosen.tolist())) == len(chosen) <= 120
    least = min(20, 60 // len(sizes))
    for size, read in zip(sizes, np.bincount(labels[chosen], minlength=len(sizes)), strict=True):
        assert read == min(size, max(least, 60 * size // len(labels)))


def described(texts, labels, tokens, reserved=()):
    labels = np.array(labels)
    rows_NK = np.random.default_rng(0).normal(size=(len(labels), 4))
    return description.describe(
        [f"id{index}" for index in range(len(labels))],
        rows_NK,
        labels,
        texts_of=lambda chosen: [texts[index] for index in chosen],
        longer=length(labels, np.array(tokens))["longer"],
        reserved=reserved,
        seed=0,
    )


def test_a_description_of_every_cluster():
    texts = [*TEXTS, "no cluster has this", *STORIES]
    found = described(texts, [0] * 6 + [-1] + [1] * 4, range(11), reserved=["def-return"])
    assert json.loads(json.dumps(found)) == found
    assert found["names"][0] == "def-return-0"
    assert found["names"][1].startswith("fox-")
    assert found["called"] == ["", ""]
    assert "cluster" not in found["terms"][0] + found["terms"][1]
    assert [len(ids) for ids in found["typical"]] == [5, 4]


def test_clusters_that_differ_by_length_alone_are_named_by_it():
    texts = ["boil the water", "boil an egg", "eat an egg", "drink water"] * 10
    found = described(texts, [0] * 20 + [1] * 20, [5] * 20 + [50] * 20)
    assert found["called"] == ["short answers", "long answers"]
    assert found["names"] == ["short-answers", "long-answers"]


def test_a_description_of_nothing():
    assert described(["text"], [-1], [3]) == {"names": [], "terms": [], "typical": [], "called": []}
