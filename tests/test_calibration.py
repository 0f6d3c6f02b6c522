import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradientspace_ray.router.calibration import (
    calibrate,
    calibrated,
    choose_threshold,
    expected_calibration_error,
    fit_temperature,
    nll,
)


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


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.3, 0.5, 0.55, 0.7, 0.9, 1.0]), losses, losses), min_size=1, max_size=20))
def test_the_threshold_is_the_best_of_all_and_the_lowest_of_equals(rows):
    confidence, expert, generalist = (np.array(column) for column in zip(*rows, strict=True))

    def loss(threshold):
        return np.where(confidence >= threshold, expert, generalist).mean()

    candidates = [0.0, *np.unique(confidence)]
    best = min(loss(candidate) for candidate in candidates)
    lowest = next(candidate for candidate in candidates if loss(candidate) <= best + 1e-9)
    chosen = choose_threshold(confidence, expert, generalist)
    assert loss(chosen.value) == pytest.approx(best, abs=1e-9)
    assert chosen.loss == pytest.approx(best, abs=1e-9)
    assert chosen.abstained == pytest.approx((confidence < chosen.value).mean())
    assert chosen.value <= lowest + 1e-9


def test_experts_that_always_help_never_abstain():
    chosen = choose_threshold(np.array([0.4, 0.6, 0.9]), np.array([1.0, 1.0, 1.0]), np.array([2.0, 2.0, 2.0]))
    assert (chosen.value, chosen.abstained) == (0.0, 0.0)


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
