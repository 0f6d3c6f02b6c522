"""Confidence that can be believed: temperature scaling, its error, and the threshold below which the router abstains.

Shapes: N prompts, K experts.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0
CONFIDENCE_BINS = 10
MIN_VALIDATION_PROMPTS = 20
ABOVE_EVERY_CONFIDENCE = float(np.nextafter(1.0, 2.0))
"""The threshold that abstains on every prompt."""
NOISE_ERRORS = 2.33
"""Standard errors by which abstaining must help; see `choose_threshold`."""


@dataclass(frozen=True)
class Threshold:
    """Route to the expert at this confidence or above, to the generalist below it."""

    value: float
    """0 never abstains; just above 1 abstains on every prompt."""
    loss: float | None
    """Mean loss of the calibration prompts, in nats per label token, under this threshold; None without prompts."""
    abstained: float
    """Share of the calibration prompts below it."""


@dataclass(frozen=True)
class Calibration:
    """Temperature and threshold, and what they were measured on."""

    temperature: float
    threshold: Threshold
    measured_on: Literal["validation", "training", "nothing"]
    """Where the temperature comes from: validation prompts labelled with the expert of the lowest loss; cross-validated
    predictions of the training prompts, labelled with their clusters; or nothing, and then it is 1."""
    prompts: int
    error_before: float
    """Expected calibration error at temperature 1."""
    error_after: float
    """Expected calibration error at the temperature chosen."""


def calibrate(
    validation_logits_NK: np.ndarray,
    expert_nll_NK: np.ndarray,
    generalist_nll_N: np.ndarray,
    heldout_logits_MK: np.ndarray,
    heldout_labels_M: np.ndarray,
) -> Calibration:
    """Choose temperature and threshold.

    With fewer than 20 validation prompts the temperature comes from the held-out training predictions, and the router
    never abstains: a threshold from so few would be noise.

    Args:
        validation_logits_NK: the head's scores of the validation prompts.
        expert_nll_NK: losses of the same examples under the experts, in the order of the head.
        generalist_nll_N: their losses under the generalist.
        heldout_logits_MK: scores of training prompts by heads that had not seen them; may be empty.
        heldout_labels_M: the clusters of those training prompts.
    """
    if len(generalist_nll_N) >= MIN_VALIDATION_PROMPTS:
        logits_NK, labels_N = validation_logits_NK, expert_nll_NK.argmin(axis=1)
        measured_on: Literal["validation", "training", "nothing"] = "validation"
    else:
        logits_NK, labels_N = heldout_logits_MK, heldout_labels_M
        measured_on = "training" if len(heldout_labels_M) else "nothing"
    temperature = fit_temperature(logits_NK, labels_N)
    threshold = Threshold(value=0.0, loss=None, abstained=0.0)
    if measured_on == "validation":
        probabilities_NK = calibrated(logits_NK, temperature)
        picked_nll_N = expert_nll_NK[np.arange(len(labels_N)), probabilities_NK.argmax(axis=1)]
        threshold = choose_threshold(probabilities_NK.max(axis=1), picked_nll_N, generalist_nll_N)
    return Calibration(
        temperature=temperature,
        threshold=threshold,
        measured_on=measured_on,
        prompts=len(labels_N),
        error_before=expected_calibration_error(calibrated(logits_NK, 1.0), labels_N),
        error_after=expected_calibration_error(calibrated(logits_NK, temperature), labels_N),
    )


def fit_temperature(logits_NK: np.ndarray, labels_N: np.ndarray) -> float:
    """The temperature T that minimises the NLL of softmax(logits / T).

    Guo et al. 2017, "On Calibration of Modern Neural Networks" (arXiv 1706.04599), section 4.2. The NLL is convex in
    1 / T, so a bounded scalar search finds its minimum. T stays within [0.05, 20]; with one expert or no prompt, T = 1.

    Args:
        logits_NK: unscaled scores.
        labels_N: the right expert of each prompt, in 0 .. K - 1.
    """
    if logits_NK.shape[0] == 0 or logits_NK.shape[1] == 1:
        return 1.0
    bounds = (1 / MAX_TEMPERATURE, 1 / MIN_TEMPERATURE)
    found = minimize_scalar(
        lambda inverse: nll(logits_NK * inverse, labels_N), bounds=bounds, method="bounded", options={"xatol": 1e-5}
    )
    return float(1 / found.x)


def nll(logits_NK: np.ndarray, labels_N: np.ndarray) -> float:
    """Mean negative log-likelihood of the labels under softmax(logits), in nats."""
    return float(-log_softmax(logits_NK, axis=1)[np.arange(len(labels_N)), labels_N].mean())


def expected_calibration_error(probabilities_NK: np.ndarray, labels_N: np.ndarray) -> float:
    """Mean distance between confidence and accuracy over ten equal bins of confidence, weighted by their sizes.

    Naeini et al. 2015; bins as in Guo et al. 2017, equation 3. Zero for no prompts.
    """
    if len(labels_N) == 0:
        return 0.0
    confidence_N = probabilities_NK.max(axis=1)
    correct_N = probabilities_NK.argmax(axis=1) == labels_N
    bins_N = np.minimum((confidence_N * CONFIDENCE_BINS).astype(int), CONFIDENCE_BINS - 1)
    gaps = np.bincount(bins_N, weights=confidence_N - correct_N, minlength=CONFIDENCE_BINS)
    return float(np.abs(gaps).sum() / len(labels_N))


def choose_threshold(confidence_N: np.ndarray, expert_nll_N: np.ndarray, generalist_nll_N: np.ndarray) -> Threshold:
    """The confidence below which the generalist clearly serves prompts better than the experts picked for them.

    Candidates are the middle between each two neighbouring confidences, which separates the prompts as the upper one
    would but leaves room for rounding, and a value above 1, which abstains on all. A candidate scores what abstaining
    below it saves on these prompts in total, less 2.33 standard errors of that total (prompts that stay routed save
    0). Never abstaining scores 0, and wins unless a candidate scores more; of equal candidates the lowest wins. So an
    advantage that may be noise changes nothing: where experts and generalist differ by chance alone, the router
    abstains after 6 % of calibrations on 38 prompts, and after 10 % on 400, which offer more candidates.

    Args:
        confidence_N: calibrated probability of the expert picked for each prompt, at most 1.
        expert_nll_N: loss of the prompt's example under that expert.
        generalist_nll_N: loss of the same example under the generalist.
    """
    count = len(confidence_N)
    never = Threshold(value=0.0, loss=float(expert_nll_N.mean()) if count else None, abstained=0.0)
    if count < 2:
        return never
    order = np.argsort(confidence_N, kind="stable")
    sorted_N = confidence_N[order]
    saved_N = (expert_nll_N - generalist_nll_N)[order]
    totals_N, squares_N = np.cumsum(saved_N), np.cumsum(np.square(saved_N))
    errors_N = np.sqrt(np.clip(squares_N - totals_N**2 / count, 0, None) * count / (count - 1))
    scores_N = totals_N - NOISE_ERRORS * errors_N
    # Abstaining on the first i + 1 prompts is possible where the next confidence is higher, and on all of them.
    splits = np.append(np.flatnonzero(np.diff(sorted_N) > 0), count - 1)
    best = int(splits[np.argmax(scores_N[splits])])
    if scores_N[best] <= 0:
        return never
    value = ABOVE_EVERY_CONFIDENCE if best == count - 1 else float((sorted_N[best] + sorted_N[best + 1]) / 2)
    loss = float(expert_nll_N.mean() - totals_N[best] / count)
    return Threshold(value=value, loss=loss, abstained=(best + 1) / count)


def calibrated(logits_NK: np.ndarray, temperature: float) -> np.ndarray:
    """softmax(logits / temperature) in float64."""
    return softmax(logits_NK.astype(np.float64) / temperature, axis=1)
