"""Numbers about a sketch, against what they are by definition."""

import numpy as np
import pytest

from gradientspace_ray.sketch.spectrum import describe_spectrum


def test_numbers_of_a_known_matrix():
    rng = np.random.default_rng(0)
    rows_ND = rng.normal(size=(40, 60)) * np.linspace(0.2, 3, 40)[:, None]
    u_NS, values_S, v_SD = np.linalg.svd(rows_ND, full_matrices=False)
    coordinates_NK = u_NS[:, :30] * values_S[:30]
    energies_N = np.square(rows_ND).sum(axis=1)
    found = describe_spectrum(values_S[:30], energies_N.sum(), coordinates_NK, energies_N)
    shares_N = np.square(rows_ND @ v_SD[:30].T).sum(axis=1) / energies_N
    assert found["captured_share"] == pytest.approx(np.square(values_S[:30]).sum() / energies_N.sum())
    assert found["captured_share_of_example"]["mean"] == pytest.approx(shares_N.mean())
    quantiles = found["captured_share_of_example"]["quantiles"]
    assert quantiles["0.5"] == pytest.approx(np.median(shares_N))
    assert (quantiles["0"], quantiles["1"]) == pytest.approx((shares_N.min(), shares_N.max()))
    reached_S = np.cumsum(np.square(values_S)) / energies_N.sum()
    for share in (0.5, 0.8, 0.9):
        assert found["rank_for_share"][f"{share:g}"] == {"rank": int(np.sum(reached_S < share)) + 1}


def test_what_was_not_kept_is_estimated_from_below():
    values = [2.0, 1.0, 1.0]
    found = describe_spectrum(values, 12.0, np.diag(values), np.array([4.0, 4.0, 4.0]))
    assert found["rank_for_share"] == {"0.5": {"rank": 3}, "0.8": {"at_least": 7}, "0.9": {"at_least": 8}}


def test_zero_gradients_have_nothing_to_lose():
    found = describe_spectrum([0.0], 0.0, np.zeros((2, 1)), np.zeros(2))
    assert found["captured_share"] == 1
    assert found["captured_share_of_example"]["mean"] == 1
    assert found["rank_for_share"]["0.9"] == {"rank": 1}
    lost = describe_spectrum([0.0], 3.0, np.zeros((2, 1)), np.array([3.0, 0.0]))
    assert lost["rank_for_share"]["0.5"] == {}
