import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

from gradientspace_ray.examples.quickstart import quickstart_examples
from gradientspace_ray.examples.splits import hashed_position
from gradientspace_ray.recipe import RouterSection
from gradientspace_ray.router.encoder import PromptEncoder
from gradientspace_ray.router.novelty import (
    BOUND_PROMPTS,
    FALSE_ALARM_RATE,
    NEIGHBOURS,
    ROUNDING,
    SAMPLE_PROMPTS,
    balanced_sample,
    fit_novelty,
    left_out_similarities,
    lower_bound,
    similarities,
)

GIBBERISH = (
    *("asdkjh qwoeiu zxmcnb", "lorem blorp fnarg quix", "xxxxxxxx", "?!?!?!?!", "jfj38 fj3k9 d0s0", "0x3f 0x9a 0x11"),
    *("qwertyuiop asdfghjkl", "aaaa bbbb cccc dddd", "%$#@ &*( )_+", "blah blah blah zorp"),
)
FOREIGN = (
    *("Wie wird das Wetter morgen in Berlin?", "Quelle est la capitale de l'Australie ?", "今天天气怎么样"),
    *("Escribe un correo a mi jefe pidiendo vacaciones.", "Come si prepara la carbonara?", "Какая сегодня погода?"),
    *("Jak ugotować pierogi?", "Mikä on Suomen pääkaupunki?", "ما هي عاصمة مصر؟", "日本で一番高い山は何ですか"),
)
UNRELATED = (
    *("What is the capital of Australia?", "How do I treat a sprained ankle?", "Explain photosynthesis to a child."),
    *("Who won the 1998 World Cup?", "Translate good morning to French.", "Give me a recipe for lentil soup."),
    *("What are the symptoms of diabetes?", "Write an email to my landlord about the broken heater."),
    *("What is the difference between a virus and a bacterium?", "Recommend three books about the Roman Empire."),
    *("How does a jet engine work?", "Summarize the plot of Hamlet.", "Name the planets of the solar system."),
    *("Is it legal to record a phone call in California?", "Write a SQL query that joins two tables."),
    *("How do I reset my router password?", "Plan a three day trip to Lisbon.", "What does the second amendment say?"),
    *("Which yoga poses help with back pain?", "How do I remove a wine stain from a carpet?"),
)


def unit_vectors(count, width=16, seed=0, centre=None):
    points = np.random.default_rng(seed).normal(size=(count, width))
    points = points if centre is None else centre + 0.5 * points / width**0.5
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("sample", [1, 3, 5, 200])
def test_a_similarity_is_the_mean_cosine_of_scikit_learns_neighbours(sample):
    kept, asked = unit_vectors(sample), unit_vectors(30, seed=1)
    count = min(NEIGHBOURS, sample)
    distances, _ = NearestNeighbors(n_neighbors=count, metric="cosine").fit(kept).kneighbors(asked)
    np.testing.assert_allclose(similarities(asked, kept), (1 - distances).mean(axis=1), atol=1e-6)
    assert similarities(asked[:0], kept).shape == (0,)


def test_half_precision_moves_a_similarity_by_less_than_a_thousandth():
    kept, asked = unit_vectors(300, width=384), unit_vectors(50, width=384, seed=1)
    np.testing.assert_allclose(similarities(asked, kept.astype(np.float16)), similarities(asked, kept), atol=1e-3)


def test_a_prompt_is_measured_without_its_own_group():
    kept = unit_vectors(60)
    groups = [f"group {index // 3}" for index in range(60)]
    expected = [
        similarities(kept[[index]], kept[[other for other in range(60) if other // 3 != index // 3]])[0]
        for index in range(60)
    ]
    np.testing.assert_allclose(left_out_similarities(kept, groups, kept, groups), expected, atol=1e-6)
    assert (left_out_similarities(kept, ["one"] * 60, kept, ["one"] * 60) == -1).all()


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=80).map(np.array), st.integers(1, 90), st.integers(0, 2**32 - 1)
)
def test_a_sample_has_as_many_of_each_cluster_as_it_can(labels, count, seed):
    chosen = balanced_sample(labels, count, seed)
    assert len(chosen) == len(set(chosen.tolist())) == min(count, len(labels))
    assert (np.diff(chosen) > 0).all()
    assert np.array_equal(chosen, balanced_sample(labels, count, seed))
    sizes, taken = np.bincount(labels, minlength=5), np.bincount(labels[chosen], minlength=5)
    short = taken[taken < sizes]
    assert not len(short) or taken.max() - short.min() <= 1


@given(st.lists(st.floats(-1, 1), max_size=400), st.floats(0.001, 0.5))
def test_no_larger_share_than_the_rate_lies_below_the_bound(values, rate):
    bound = lower_bound(np.array(values), rate)
    allowed = int(rate * (len(values) + 1))
    if not allowed:
        assert bound is None
    else:
        assert bound == pytest.approx(sorted(values)[allowed - 1] - ROUNDING)
        assert sum(value < bound for value in values) < allowed


def test_another_prompt_falls_below_the_bound_as_often_as_said():
    generator = np.random.default_rng(0)
    alarms = []
    for _ in range(4000):
        *known, other = generator.beta(8, 3, size=200)
        alarms.append(other < lower_bound(np.array(known), FALSE_ALARM_RATE))
    assert np.mean(alarms) <= FALSE_ALARM_RATE + 3 * (FALSE_ALARM_RATE / 4000) ** 0.5


def made_fit(training, validation, seed=0):
    centres = unit_vectors(3, seed=9)
    labels = np.arange(training) % 3
    train = np.stack([unit_vectors(1, seed=index, centre=centres[index % 3])[0] for index in range(training)])
    held_out = [unit_vectors(1, seed=10_000 + index, centre=centres[index % 3])[0] for index in range(validation)]
    validation_encodings = np.stack(held_out) if held_out else np.zeros((0, 16), np.float32)
    groups = [str(index) for index in range(training)]
    return train, validation_encodings, fit_novelty(train, labels, groups, validation_encodings, seed)


@pytest.mark.parametrize(
    ("training", "validation", "says"), [(98, 0, False), (60, 38, False), (99, 0, True), (60, 39, True)]
)
def test_too_few_prompts_call_nothing_strange(training, validation, says):
    _, _, fit = made_fit(training, validation)
    assert (fit.min_similarity is not None) == (fit.sample_MH is not None) == says
    assert (fit.training_prompts, fit.validation_prompts) == (training, validation)


def test_false_alarms_are_counted_and_the_fit_is_deterministic():
    train, validation, fit = made_fit(300, 120)
    assert fit.sample_MH.dtype == np.float16
    assert fit.training_false_alarms + fit.validation_false_alarms == int(FALSE_ALARM_RATE * 421) - 1 == 3
    assert fit.validation_false_alarms == (similarities(validation, fit.sample_MH) < fit.min_similarity).sum()
    assert (similarities(-train, fit.sample_MH) < fit.min_similarity).all(), "the opposite of everything is strange"
    _, _, again = made_fit(300, 120)
    assert again.min_similarity == fit.min_similarity
    assert np.array_equal(again.sample_MH, fit.sample_MH)


def unbalanced_mixture(seed, diffuse, compact):
    """Prompts of one wide cluster and of five narrow ones, and their clusters."""
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(6), [diffuse, *[compact] * 5])
    spread = np.where(labels == 0, 1.5, 0.2)[:, None]
    points = np.eye(16)[labels] + spread * generator.normal(size=(len(labels), 16)) / 4
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32), labels


@pytest.mark.parametrize("validation", [0, 50, 600])
def test_the_rate_is_that_of_the_mixture_however_unbalanced_its_clusters(validation):
    """Five sixths of the sample are of the narrow clusters, and 88 % of the prompts of the wide one."""
    rates = []
    for seed in range(3):
        train, labels = unbalanced_mixture(seed, 12000, 340)
        held_out, _ = unbalanced_mixture(100 + seed, 3000, 85)
        fresh, _ = unbalanced_mixture(200 + seed, 3000, 85)
        drawn = np.random.default_rng(seed).permutation(len(held_out))[:validation]
        fit = fit_novelty(train, labels, [str(index) for index in range(len(train))], held_out[drawn], seed)
        assert (fit.training_prompts, len(fit.sample_MH)) == (BOUND_PROMPTS, SAMPLE_PROMPTS)
        rates.append((similarities(fresh, fit.sample_MH) < fit.min_similarity).mean())
    assert 0.005 <= np.mean(rates) <= 0.013, rates


@pytest.fixture(scope="module")
def quickstart():
    """The encoder, and the mixture's encodings of each split, with their clusters (the skills) and groups."""
    rows = quickstart_examples(0)
    encoder = PromptEncoder(RouterSection().encoder, RouterSection().max_tokens)
    encodings = encoder.encode([row["messages"][0]["content"] for row in rows])
    _, labels = np.unique([row["domain"] for row in rows], return_inverse=True)
    position = np.array([hashed_position(row["group"]) for row in rows])
    return encoder, encodings, labels, np.array([row["group"] for row in rows]), position


@pytest.mark.bundled
def test_strangers_are_told_from_the_quickstart_mixture(quickstart):
    encoder, encodings, labels, groups, position = quickstart
    test, validation = position < 0.15, (position >= 0.15) & (position < 0.25)
    train = ~test & ~validation
    fit = fit_novelty(encodings[train], labels[train], groups[train].tolist(), encodings[validation], 0)
    own = similarities(encodings[test], fit.sample_MH)
    assert (own < fit.min_similarity).mean() <= 0.03
    for strangers in (GIBBERISH, FOREIGN, UNRELATED):
        found = similarities(encoder.encode(strangers), fit.sample_MH)
        assert roc_auc_score(np.repeat([1, 0], [len(own), len(found)]), np.concatenate([own, found])) > 0.995
        # The plot of Hamlet is much like the stories.
        assert (found < fit.min_similarity).mean() >= 0.95


@pytest.mark.bundled
def test_false_alarms_are_as_rare_as_said_over_many_splits(quickstart):
    _, encodings, labels, groups, position = quickstart
    alarms = []
    for shift in np.arange(0, 1, 0.05):
        moved = (position + shift) % 1
        test, validation = moved < 0.15, (moved >= 0.15) & (moved < 0.25)
        train = ~test & ~validation
        fit = fit_novelty(encodings[train], labels[train], groups[train].tolist(), encodings[validation], 0)
        alarms.append((similarities(encodings[test], fit.sample_MH) < fit.min_similarity).mean())
    assert np.mean(alarms) <= 0.015
