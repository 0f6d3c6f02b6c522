"""The budget: the tokens that the plans really train on are those that the recipe asked for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradientspace_ray.recipe import BudgetSection, ExpertsSection, SingleLoraSection, WarmupSection
from gradientspace_ray.training.budget import (
    cosine_of,
    experts_settings,
    one_expert,
    single_lora_settings,
    warmup_settings,
)
from gradientspace_ray.training.schedule import plan_steps

WARMUP = WarmupSection(epochs=2, learning_rate=3e-3, examples_per_step=16, weight_decay=0.1, cosine_share=0.4)
EXPERTS = ExpertsSection(
    epochs=1.5, learning_rate=1e-3, examples_per_step=4, min_steps=3, patience=2, heldout_share=0.1
)


def tokens_seen(settings, lengths):
    steps = plan_steps(len(lengths), settings.examples_per_step, settings.epochs, [7, 1], lengths)
    return sum(lengths[index] for step in steps for index in step)


def changed(settings, original):
    """Names of what differs."""
    return {name for name in type(original).model_fields if getattr(settings, name) != getattr(original, name)}


@st.composite
def ragged_runs(draw):
    """Lengths of all examples, and of those of each cluster; some are in none."""
    lengths = draw(st.lists(st.integers(1, 300), min_size=2, max_size=60))
    clusters = draw(st.lists(st.integers(-1, 4), min_size=len(lengths), max_size=len(lengths)))
    parts = [[n for n, own in zip(lengths, clusters, strict=True) if own == cluster] for cluster in range(5)]
    return lengths, [part for part in parts if part] or [lengths]


@given(run=ragged_runs(), passes=st.floats(0.05, 6), share=st.floats(0.05, 0.95))
def test_generalist_and_experts_together_see_the_tokens_of_the_budget(run, passes, share):
    lengths, parts = run
    budget = BudgetSection(tokens=max(1, round(passes * sum(lengths))), generalist_share=share)
    warmup = warmup_settings(WARMUP, budget, sum(lengths))
    experts = experts_settings(EXPERTS, WARMUP, budget, sum(map(sum, parts)))
    own = tokens_seen(warmup, lengths)
    assert abs(own - budget.tokens * share) <= max(lengths)
    seen = [tokens_seen(one_expert(experts, len(part)), part) for part in parts]
    rest = budget.tokens * (1 - share)
    for tokens, part in zip(seen, parts, strict=True):
        # By the size of its cluster.
        assert abs(tokens - rest * sum(part) / sum(map(sum, parts))) <= max(part)
    assert abs(own + sum(seen) - budget.tokens) <= max(lengths) + sum(map(max, parts))
    assert changed(warmup, WARMUP) <= {"epochs"}
    assert changed(experts, EXPERTS) <= {"epochs", "warmup_share"}


@given(
    run=ragged_runs(),
    tokens=st.none() | st.integers(100, 20_000),
    share=st.floats(0.05, 0.95),
    start=st.sampled_from(["generalist", "fresh"]),
    experts_start=st.sampled_from(["generalist", "fresh"]),
)
def test_the_single_lora_sees_as_many_tokens_as_made_the_experts(run, tokens, share, start, experts_start):
    lengths, parts = run
    everything = [length for part in parts for length in part]
    budget = BudgetSection(tokens=tokens, generalist_share=share)
    warmup = warmup_settings(WARMUP, budget, sum(lengths))
    experts = EXPERTS.model_copy(update={"start": experts_start})
    experts = experts_settings(experts, WARMUP, budget, sum(everything))
    section = SingleLoraSection(start=start)
    single = single_lora_settings(section, WARMUP, experts, tokens_seen(warmup, lengths), sum(everything))
    wanted = sum(tokens_seen(one_expert(experts, len(part)), part) for part in parts)
    allowed = max(everything) + sum(map(max, parts))
    # A fresh one has to catch up with what the experts have from the generalist; one that continues it has that too.
    if start == "fresh" and experts_start == "generalist":
        wanted += tokens_seen(warmup, lengths)
        allowed += max(lengths)
    assert abs(tokens_seen(single, everything) - wanted) <= allowed


@pytest.mark.parametrize("epochs", [1, 2])
def test_without_a_budget_whole_passes_of_the_single_lora_are_equal_to_the_token(epochs):
    lengths = np.random.default_rng(0).integers(5, 500, 90).tolist()
    parts = [lengths[:50], lengths[50:80], lengths[80:]]
    warmup = WARMUP.model_copy(update={"epochs": epochs})
    experts = EXPERTS.model_copy(update={"epochs": 3})
    single = single_lora_settings(SingleLoraSection(), WARMUP, experts, epochs * sum(lengths), sum(lengths))
    experts_tokens = sum(tokens_seen(one_expert(experts, len(part)), part) for part in parts)
    assert tokens_seen(single, lengths) == tokens_seen(warmup, lengths) + experts_tokens == (3 + epochs) * sum(lengths)


def test_without_a_budget_the_epochs_are_the_recipes():
    assert warmup_settings(WARMUP, BudgetSection(), 1000) == WARMUP
    experts = EXPERTS.model_copy(update={"start": "fresh"})
    assert experts_settings(experts, WARMUP, BudgetSection(), 1000) == experts


def test_a_budget_of_known_numbers():
    # 1,000 tokens, a quarter of them the generalist's, over passes of 500 and 300.
    budget = BudgetSection(tokens=1000, generalist_share=0.25)
    assert warmup_settings(WARMUP, budget, 500).epochs == pytest.approx(0.5)
    assert experts_settings(EXPERTS, WARMUP, budget, 300).epochs == pytest.approx(2.5)


def test_what_continues_the_generalist_goes_the_rest_of_its_cosine_without_another_rise():
    assert cosine_of("generalist", WARMUP) == (0.4, 1.0)
    assert cosine_of("fresh", WARMUP) == (0.0, 1.0)
    fresh = EXPERTS.model_copy(update={"start": "fresh", "warmup_share": 0.3})
    for experts, rise in ((EXPERTS, 0.0), (fresh, 0.3)):
        assert experts_settings(experts, WARMUP, BudgetSection(), 10).warmup_share == rise
    warmup = WARMUP.model_copy(update={"warmup_share": 0.2})
    for start, rise in (("generalist", 0.0), ("fresh", 0.2)):
        assert single_lora_settings(SingleLoraSection(start=start), warmup, EXPERTS, 10, 10).warmup_share == rise


def test_the_generalists_learning_rate_is_everyones_unless_they_have_their_own():
    # Steps of half the size have 0.7 times the rate; those above 8 examples count as 8.
    experts = experts_settings(EXPERTS.model_copy(update={"learning_rate": None}), WARMUP, BudgetSection(), 10)
    assert experts.learning_rate == pytest.approx(3e-3 / 2**0.5)
    assert experts_settings(EXPERTS, WARMUP, BudgetSection(), 10).learning_rate == 1e-3
    single = single_lora_settings(SingleLoraSection(), WARMUP, EXPERTS, 20, 10)
    assert (single.learning_rate, single.examples_per_step, single.epochs) == (pytest.approx(3e-3 / 2**0.5), 4, 3.5)
    single = single_lora_settings(SingleLoraSection(examples_per_step=16), WARMUP, EXPERTS, 20, 10)
    assert (single.learning_rate, single.examples_per_step) == (3e-3, 16)
    section = SingleLoraSection(learning_rate=2e-4, examples_per_step=5, start="generalist")
    single = single_lora_settings(section, WARMUP, EXPERTS, 10, 10)
    assert (single.learning_rate, single.examples_per_step, single.epochs) == (2e-4, 5, 1.5)


def test_what_has_no_key_of_its_own_the_single_lora_has_from_the_experts():
    single = single_lora_settings(SingleLoraSection(), WARMUP, EXPERTS, 10, 10)
    assert changed(single, EXPERTS) == {"epochs", "learning_rate"}


def test_a_small_cluster_takes_smaller_steps():
    small = one_expert(EXPERTS, 4)
    assert changed(small, EXPERTS) == {"examples_per_step", "learning_rate"}
    # Four examples one and a half times, in at least three steps.
    assert small.examples_per_step == 2
    assert small.learning_rate == pytest.approx(1e-3 / 2**0.5)
    assert len(plan_steps(4, 2, small.epochs, 0)) == 3
    assert one_expert(EXPERTS, 400) == EXPERTS


@pytest.mark.parametrize("workers", [1, 3, 8])
def test_the_number_of_workers_does_not_change_what_is_trained(workers):
    settings = EXPERTS.model_copy(update={"workers": workers})
    assert one_expert(settings, 4).examples_per_step == 2
