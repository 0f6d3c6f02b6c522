import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradientspace_ray.router.calibration import (
    NOISE_ERRORS,
    calibrate,
    calibrated,
    choose_threshold,
    expected_calibration_error,
    fit_temperature,
    nll,
)
from gradientspace_ray.router.classifier import RouterSettings, decide


def sampled(count, experts, temperature, seed):
    """Logits whose softmax at `temperature` is the true distribution of the labels."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(count, experts)) * 3
    probabilities = calibrated(logits, temperature)
    labels = np.array([generator.choice(experts, p=row) for row in probabilities])
    return logits, labels


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_that_made_the_labels_is_found(temperature):
    logits, labels = sampled(8000, 4, temperature, 0)
    assert fit_temperature(logits, labels) == pytest.approx(temperature, rel=0.06)


def test_the_temperature_is_the_minimum_of_torchs_cross_entropy():
    logits, labels = sampled(200, 3, 2.0, 1)
    ours = fit_temperature(logits, labels)

    def loss(temperature):
        return torch.nn.functional.cross_entropy(torch.tensor(logits) / temperature, torch.tensor(labels)).item()

    assert nll(logits / ours, labels) == pytest.approx(loss(ours), abs=1e-9)
    assert loss(ours) <= min(loss(other) for other in np.geomspace(0.05, 20, 400)) + 1e-6


def test_calibration_lowers_the_error_of_an_overconfident_router():
    logits, labels = sampled(4000, 4, 4.0, 2)
    before = expected_calibration_error(calibrated(logits, 1.0), labels)
    after = expected_calibration_error(calibrated(logits, fit_temperature(logits, labels)), labels)
    assert after < 0.03 < before


def test_expected_calibration_error_by_hand():
    # Two prompts at confidence .95 of which one is right, two at .65 of which both are right.
    probabilities = np.array([[0.95, 0.05], [0.95, 0.05], [0.65, 0.35], [0.65, 0.35]])
    error = expected_calibration_error(probabilities, np.array([0, 1, 0, 0]))
    assert error == pytest.approx(0.5 * 0.45 + 0.5 * 0.35)
    assert expected_calibration_error(np.zeros((0, 2)), np.zeros(0, int)) == 0


losses = st.floats(0, 4, allow_nan=False).map(lambda value: round(value, 2))


@given(st.lists(st.tuples(st.sampled_from([0.3, 0.5, 0.55, 0.7, 0.9, 1.0]), losses, losses), min_size=2, max_size=40))
def test_the_threshold_is_the_best_of_all_and_the_lowest_of_equals(rows):
    confidence, expert, generalist = (np.array(column) for column in zip(*rows, strict=True))

    def score(threshold):
        saved = np.where(confidence >= threshold, 0.0, expert - generalist)
        return saved.sum() - NOISE_ERRORS * np.sqrt(len(saved)) * saved.std(ddof=1)

    # Just above 1 is above every confidence: abstaining on all.
    candidates = [0.0, *np.unique(confidence), np.nextafter(1, 2)]
    best = max(score(candidate) for candidate in candidates)
    lowest = next(candidate for candidate in candidates if score(candidate) >= best - 1e-6)
    chosen = choose_threshold(confidence, expert, generalist)
    assert score(chosen.value) == pytest.approx(best, abs=1e-5)
    assert chosen.loss == pytest.approx(np.where(confidence >= chosen.value, expert, generalist).mean(), abs=1e-9)
    assert chosen.abstained == pytest.approx((confidence < chosen.value).mean())
    assert chosen.value <= lowest + 1e-9 or score(chosen.value) > score(lowest)


def test_experts_that_always_help_never_abstain():
    chosen = choose_threshold(np.array([0.4, 0.6, 0.9]), np.array([1.0, 1.0, 1.0]), np.array([2.0, 2.0, 2.0]))
    assert (chosen.value, chosen.abstained) == (0.0, 0.0)


@pytest.mark.parametrize("experts", [1, 4])
def test_experts_that_are_always_worse_are_never_routed_to(experts):
    logits = np.random.default_rng(0).normal(size=(38, experts))
    confidence = calibrated(logits, 1.0).max(axis=1)
    chosen = choose_threshold(confidence, np.full(38, 2.3), np.full(38, 2.0))
    assert chosen.abstained == 1
    assert chosen.loss == pytest.approx(2.0)
    certain = np.full((3, experts), -1e9)
    certain[:, 0] = 0
    settings_ = RouterSettings(
        encoder="",
        view="conversation",
        max_tokens=1,
        labels=tuple(f"expert-{index}" for index in range(experts)),
        temperature=1.0,
        threshold=chosen.value,
    )
    decisions = decide(
        np.concatenate([logits, certain]), RouterSettings.model_validate_json(settings_.model_dump_json())
    )
    assert {decision.expert for decision in decisions} == {None}


def test_noise_rarely_abstains():
    abstained = []
    for seed in range(300):
        generator = np.random.default_rng(seed)
        confidence, difference = generator.uniform(0.3, 1, 38), generator.normal(0, 0.1, 38)
        abstained.append(choose_threshold(confidence, 2 + difference, np.full(38, 2.0)).abstained > 0)
    assert np.mean(abstained) <= 0.1


def test_a_clear_advantage_below_a_confidence_is_used():
    generator = np.random.default_rng(0)
    confidence = np.linspace(0.3, 0.99, 38)
    expert = 2 + np.where(confidence < 0.6, 0.3, -0.3) + generator.normal(0, 0.1, 38)
    chosen = choose_threshold(confidence, expert, np.full(38, 2.0))
    assert chosen.value == pytest.approx(0.6, abs=0.02)


def test_one_prompt_says_nothing():
    assert choose_threshold(np.ones(1), np.array([3.0]), np.array([1.0])).abstained == 0
    assert choose_threshold(np.ones(0), np.ones(0), np.ones(0)).loss is None


def test_few_validation_prompts_leave_the_temperature_to_the_training_prompts():
    heldout_logits, heldout_labels = sampled(2000, 3, 2.0, 3)
    few = (np.zeros((5, 3)), np.ones((5, 3)), np.zeros(5))
    chosen = calibrate(*few, heldout_logits, heldout_labels)
    assert (chosen.measured_on, chosen.prompts, chosen.threshold.value) == ("training", 2000, 0.0)
    assert chosen.temperature == pytest.approx(2.0, rel=0.1)
    nothing = calibrate(*few, np.zeros((0, 3)), np.zeros(0, int))
    assert (nothing.measured_on, nothing.temperature) == ("nothing", 1.0)


def test_validation_labels_are_the_experts_of_the_lowest_loss():
    logits, labels = sampled(3000, 3, 2.0, 4)
    expert_nll = 1.0 - np.eye(3)[labels]
    chosen = calibrate(logits, expert_nll, np.full(3000, 0.5), np.zeros((0, 3)), np.zeros(0, int))
    assert chosen.measured_on == "validation"
    assert chosen.temperature == pytest.approx(2.0, rel=0.1)
    # The generalist's loss of 0.5 equals the expert's expected loss at a confidence of one half.
    assert chosen.threshold.value == pytest.approx(0.5, abs=0.08)


def test_one_expert_is_always_certain():
    chosen = calibrate(np.zeros((30, 1)), np.ones((30, 1)), np.full(30, 2.0), np.zeros((0, 1)), np.zeros(0, int))
    assert (chosen.temperature, chosen.threshold.value, chosen.error_after) == (1.0, 0.0, 0.0)
