"""Random projections against the explicit matrix, and their inner products against the formula, over many hashes."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gradientspace_ray.gradients.per_sample import normalise
from gradientspace_ray.sketch import projection
from gradientspace_ray.sketch.online_svd import NonFiniteRowError, OnlineSVD
from gradientspace_ray.sketch.projection import RandomProjection, fold


def rows_of(count, dimension, seed=0):
    return torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed))


def matrix_of(dimension, width, seed=0):
    """[D, P] float64: a one with a sign in each row."""
    raw = np.random.Philox(key=seed).random_raw(dimension)
    matrix = np.zeros((dimension, width))
    matrix[np.arange(dimension), raw // 2 % width] = np.where(raw % 2, -1, 1)
    return torch.from_numpy(matrix)


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(0, 9), dimension=st.integers(1, 300), width=st.integers(1, 400), seed=st.integers(0, 2**64 - 1)
)
@example(count=3, dimension=1, width=1, seed=0)
@example(count=1, dimension=9000, width=64, seed=1)
def test_it_is_the_product_with_a_matrix_of_signs(count, dimension, width, seed):
    rows_ND = rows_of(count, dimension)
    found_NP = RandomProjection(dimension, width, seed=seed).project(rows_ND)
    assert found_NP.dtype == torch.float32
    torch.testing.assert_close(
        found_NP.double(), rows_ND.double() @ matrix_of(dimension, width, seed), atol=1e-5, rtol=0
    )


def test_it_is_linear():
    map_, (x_ND, y_ND) = RandomProjection(700, 32), (rows_of(4, 700, seed) for seed in (1, 2))
    mixed = 2 * map_.project(x_ND) - 3 * map_.project(y_ND)
    torch.testing.assert_close(map_.project(2 * x_ND - 3 * y_ND), mixed, atol=1e-4, rtol=0)


def test_entries_and_signs_are_even_and_independent():
    dimension, width, seeds = 1000, 16, range(20)
    columns_DD = torch.eye(dimension)
    found_SDP = torch.stack([RandomProjection(dimension, width, seed=seed).project(columns_DD) for seed in seeds])
    assert ((found_SDP != 0).sum(dim=2) == 1).all()
    assert (found_SDP.abs().sum(dim=2) == 1).all()
    # One of 32 cells for every column: its entry and its sign.
    cells_SD = 2 * found_SDP.abs().argmax(dim=2) + (found_SDP.sum(dim=2) > 0)
    expected = cells_SD.numel() / 32
    chi_square = float((torch.bincount(cells_SD.flatten(), minlength=32) - expected).square().sum() / expected)
    # Of 31 degrees of freedom: mean 31, standard deviation 7.9.
    assert 8 < chi_square < 62
    # Other seeds, and neighbouring columns, have the same cell once in 32 times.
    for same in (cells_SD[1:] == cells_SD[:-1], cells_SD[:, 1:] == cells_SD[:, :-1]):
        assert float(same.double().mean()) == pytest.approx(1 / 32, abs=4 * (1 / 32 / same.numel()) ** 0.5)


def test_the_seed_alone_decides_the_projection():
    first, again, other = (RandomProjection(500, 64, seed=seed).project(torch.eye(500)) for seed in (4, 4, 5))
    assert torch.equal(first, again)
    assert torch.equal(first.double(), matrix_of(500, 64, 4))
    assert not torch.equal(first, other)


def test_inner_products_have_the_mean_and_the_variance_of_a_dense_matrix():
    dimension, width, count = 12, 8, 6000
    rows_2D = rows_of(2, dimension).double()
    # One large entry, which a hash has to meet as a whole.
    rows_2D[:, 3] = 3.0
    x_D, y_D = rows_2D
    mean = float(x_D @ y_D)
    squares = float((x_D.square() * y_D.square()).sum())
    variance = (float(x_D @ x_D) * float(y_D @ y_D) + mean**2 - 2 * squares) / width
    hashed = [RandomProjection(dimension, width, seed=seed).project(rows_2D) for seed in range(count)]
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(count, dimension, width)) / width**0.5
    dense = np.einsum("kd,ndp->nkp", rows_2D.numpy(), signs)
    for projected in (torch.stack(hashed).double().numpy(), dense):
        products_N = (projected[:, 0] * projected[:, 1]).sum(axis=1)
        squares_N = np.square(products_N - mean)
        assert abs(products_N.mean() - mean) < 3 * (variance / count) ** 0.5
        assert abs(squares_N.mean() - variance) < 3 * squares_N.std() / count**0.5
        assert squares_N.std() / count**0.5 < 0.05 * variance


@pytest.mark.parametrize("width", [1, 64, 512, 4096])
def test_what_is_folded_is_a_projection_of_the_same_seed(width):
    rows_ND = rows_of(5, 20_000)
    wide_NP = RandomProjection(20_000, 4096, seed=3).project(rows_ND, normalise=True)
    narrow_NP = RandomProjection(20_000, width, seed=3).project(rows_ND, normalise=True)
    torch.testing.assert_close(fold(wide_NP, width), narrow_NP, atol=2e-5, rtol=0)
    assert np.allclose(fold(wide_NP.numpy(), width), narrow_NP, atol=2e-5, rtol=0)


@pytest.mark.parametrize("width", [0, 3, 16])
def test_only_divisors_can_be_folded_to(width):
    with pytest.raises(ValueError, match=f"8 numbers cannot be folded to {width}; give a divisor"):
        fold(torch.zeros(2, 8), width)


def test_no_bit_depends_on_the_blocks_or_on_the_other_rows(monkeypatch):
    rows_ND, map_ = rows_of(33, 5000), RandomProjection(5000, 64)
    expected_NP = map_.project(rows_ND, normalise=True)
    for columns in (1000, 4999, 10**6):
        monkeypatch.setattr(projection, "COLUMNS_AT_ONCE", columns)
        assert torch.equal(map_.project(rows_ND, normalise=True), expected_NP)
    monkeypatch.setattr(projection, "DRAWN_AT_ONCE", 777)
    again = RandomProjection(5000, 64)
    for start, count in ((0, 1), (31, 2), (5, 20)):
        part = slice(start, start + count)
        assert torch.equal(again.project(rows_ND[part], normalise=True), expected_NP[part])
    # Nor on how they lie in memory.
    assert torch.equal(map_.project(rows_ND.T.contiguous().T, normalise=True), expected_NP)


def test_narrow_rows_are_summed_in_float32():
    rows_ND = rows_of(4, 50_000).bfloat16()
    found_NP = RandomProjection(50_000, 4).project(rows_ND)
    torch.testing.assert_close(found_NP.double(), rows_ND.double() @ matrix_of(50_000, 4), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", ["none", "example", "module"])
def test_rows_are_scaled_as_the_sketch_scales_them(kind):
    rows_ND = rows_of(6, 60) * torch.logspace(-12, 12, 6)[:, None]
    rows_ND[1] = 0
    rows_ND[2, 10:25] = 0
    columns = [("w", start, ()) for offset in (0, 10, 25) for start in (offset, offset + 4)]
    scaled_ND = rows_ND.double()
    normalise(scaled_ND, columns, kind)
    parts = [slice(0, 10), slice(10, 25), slice(25, 60)] if kind == "module" else None
    found_NP = RandomProjection(60, 16).project(rows_ND, kind != "none", parts)
    lengths_N = scaled_ND.norm(dim=1, keepdim=True)
    assert ((found_NP - scaled_ND @ matrix_of(60, 16)).abs() <= 1e-6 * lengths_N).all()
    # D entries of their own keep lengths.
    wide_NP = RandomProjection(60, 10**6, seed=1).project(rows_ND, kind != "none", parts)
    sketch = OnlineSVD(6)
    sketch.update(rows_ND, kind != "none", parts)
    torch.testing.assert_close(wide_NP.double().square().sum(dim=1), sketch.row_energies, rtol=1e-6, atol=0)
    assert not found_NP[1].any()


def test_rows_are_only_read():
    rows_ND = rows_of(3, 40)
    before = rows_ND.clone()
    RandomProjection(40, 8).project(rows_ND, normalise=True)
    assert torch.equal(rows_ND, before)


def test_what_cannot_be_projected_is_refused():
    map_, rows_ND = RandomProjection(40, 8), rows_of(3, 40)
    with pytest.raises(ValueError, match=r"shape \(3, 39\), this projection takes N x 40"):
        map_.project(rows_ND[:, :39])
    with pytest.raises(ValueError, match="parts must cover the 40 columns"):
        map_.project(rows_ND, True, [slice(0, 39)])
    rows_ND[1, 7] = torch.inf
    with pytest.raises(NonFiniteRowError) as caught:
        map_.project(rows_ND)
    assert caught.value.row == 1
    for dimension, width in ((0, 8), (40, 0), (40, 2**31)):
        with pytest.raises(ValueError, match="give 1 or more of each"):
            RandomProjection(dimension, width)
