"""The sketch against the exact SVD of everything it saw."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradientspace_ray.sketch import online_svd
from gradientspace_ray.sketch.online_svd import NonFiniteRowError, OnlineSVD


def random_rows(count, width, seed, decay=0.8):
    """Rows with a falling spectrum, as gradients have."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(width, min(count, width), generator=generator))[0]
    scales = decay ** torch.arange(basis.shape[1])
    return torch.randn(count, basis.shape[1], generator=generator) * scales @ basis.T


def check_identities(sketch, rows_ND, tolerance=1e-5):
    """R = U^T G, U orthonormal, and the ledger against the error computed from the rows."""
    rows_ND = rows_ND.double()
    u_NK, r_KD = sketch.coordinates, sketch.rows.double()
    scale = float(rows_ND.norm()) or 1.0
    assert torch.allclose(u_NK.T @ u_NK, torch.eye(u_NK.shape[1], dtype=torch.float64), atol=1e-10)
    assert float((u_NK.T @ rows_ND - r_KD).norm()) <= tolerance * scale
    error = float((rows_ND - u_NK @ r_KD).square().sum())
    assert sketch.energy.total == pytest.approx(scale**2 if rows_ND.norm() else 0.0, rel=1e-9)
    assert abs(sketch.energy.total - sketch.energy.captured - error) <= tolerance * scale**2
    assert torch.allclose(r_KD.norm(dim=1), sketch.singular_values, atol=tolerance * scale)


def test_all_rows_kept_is_the_exact_svd():
    rows_ND = random_rows(40, 90, 0)
    sketch = OnlineSVD(rank=40)
    for part in rows_ND.split([7, 1, 20, 12]):
        sketch.update(part)
    exact = torch.linalg.svdvals(rows_ND.double())
    assert torch.allclose(sketch.singular_values, exact, atol=1e-5 * float(exact[0]))
    assert torch.allclose((sketch.coordinates @ sketch.rows.double()).float(), rows_ND, atol=1e-5)
    assert sketch.energy.share == pytest.approx(1)


def test_truncated_sketch_is_close_to_the_best_of_its_rank():
    rows_ND = random_rows(200, 300, 1, decay=0.9)
    sketch = OnlineSVD(rank=16)
    sketch.update(rows_ND)
    best = float(torch.linalg.svdvals(rows_ND.double())[:16].square().sum())
    assert 0.98 * best <= sketch.energy.captured <= best * (1 + 1e-9)
    check_identities(sketch, rows_ND)


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(1, 25), min_size=1, max_size=5),
    width=st.integers(1, 60),
    rank=st.integers(1, 30),
    seed=st.integers(0, 10**6),
    normalise=st.booleans(),
)
def test_identities_hold_for_any_stream(counts, width, rank, seed, normalise):
    parts = [random_rows(count, width, seed + index) for index, count in enumerate(counts)]
    parts[-1][0] = 0
    sketch = OnlineSVD(rank)
    for part in parts:
        sketch.update(part, normalise=normalise)
    rows_ND = torch.cat(parts)
    if normalise:
        rows_ND = torch.nn.functional.normalize(rows_ND.double(), dim=1, eps=1e-300)
    check_identities(sketch, rows_ND)
    assert sketch.rows.shape == (min(rank, len(rows_ND)), width)


@settings(max_examples=25, deadline=None)
@given(counts=st.lists(st.integers(1, 30), min_size=2, max_size=5), rank=st.integers(1, 40), seed=st.integers(0, 10**6))
def test_merge_keeps_the_identities(counts, rank, seed):
    parts = [random_rows(count, 50, seed + index) for index, count in enumerate(counts)]
    merged = OnlineSVD(rank)
    for part in parts:
        sketch = OnlineSVD(rank)
        sketch.update(part)
        merged.merge(sketch)
    check_identities(merged, torch.cat(parts))


def test_merge_without_truncation_does_not_depend_on_the_tree():
    parts = [random_rows(10, 80, seed) for seed in range(4)]

    def sketch_of(*chosen):
        sketch = OnlineSVD(rank=40)
        sketch.update(torch.cat(chosen))
        return sketch

    left = sketch_of(parts[0], parts[1])
    left.merge(sketch_of(parts[2], parts[3]))
    right = sketch_of(parts[0])
    tail = sketch_of(parts[1], parts[2])
    tail.merge(sketch_of(parts[3]))
    right.merge(tail)
    assert torch.allclose(left.singular_values, right.singular_values, atol=1e-5)
    products = [s.coordinates @ torch.diag(s.singular_values.square()) @ s.coordinates.T for s in (left, right)]
    assert torch.allclose(*products, atol=1e-4)


def test_a_long_stream_keeps_its_ledger():
    sketch = OnlineSVD(rank=4)
    parts = [random_rows(6, 40, seed) for seed in range(150)]
    for part in parts:
        sketch.update(part, normalise=True)
    check_identities(sketch, torch.nn.functional.normalize(torch.cat(parts).double(), dim=1))


def test_blocks_of_columns_do_not_change_the_result(monkeypatch):
    rows_ND = random_rows(30, 100, 3)
    whole, blocked = OnlineSVD(8), OnlineSVD(8)
    whole.update(rows_ND, normalise=True)
    monkeypatch.setattr(online_svd.column_blocks, "__defaults__", (7,))
    blocked.update(rows_ND, normalise=True)
    assert torch.allclose(whole.rows, blocked.rows, atol=1e-6)


def test_unit_scaling_survives_extreme_norms():
    rows_ND = random_rows(6, 20, 4)
    scaled = rows_ND * torch.tensor([1e-15, 1e15, 1.0, 1e-6, 1e6, 0.0])[:, None]
    sketch = OnlineSVD(6)
    sketch.update(scaled, normalise=True)
    assert sketch.energy.total == pytest.approx(5)
    check_identities(sketch, torch.nn.functional.normalize(scaled.double(), dim=1, eps=1e-300))


def test_zero_rows_only():
    sketch = OnlineSVD(3)
    sketch.update(torch.zeros(5, 7), normalise=True)
    assert sketch.energy == (0, 0)
    assert sketch.energy.share == 1
    assert not sketch.rows.any()
    assert sketch.coordinates.isfinite().all()


def test_equal_input_gives_equal_bytes_and_input_is_left_alone():
    rows_ND = random_rows(50, 64, 5)
    before = rows_ND.clone()
    first, second = OnlineSVD(8), OnlineSVD(8)
    first.update(rows_ND, normalise=True)
    second.update(rows_ND, normalise=True)
    assert torch.equal(first.rows, second.rows)
    assert torch.equal(first.coordinates, second.coordinates)
    assert torch.equal(rows_ND, before)


def test_bfloat16_rows_are_taken_as_they_are():
    rows_ND = random_rows(20, 30, 6).bfloat16()
    sketch = OnlineSVD(20)
    sketch.update(rows_ND)
    check_identities(sketch, rows_ND.float())


def test_buffer_is_the_cheapest():
    for rank in (1, 5, 64, 128):
        costs = {size: ((rank + size) ** 2 + rank * (rank + size)) / size for size in range(1, 3 * rank + 2)}
        assert costs[OnlineSVD(rank).buffer_rows] <= 1.01 * min(costs.values())


def test_bad_input_is_refused():
    sketch = OnlineSVD(2)
    sketch.update(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"shape \(2, 4\), this sketch takes N x 3"):
        sketch.update(torch.ones(2, 4))
    bad = torch.ones(4, 3)
    bad[3, 1] = float(np.nan)
    with pytest.raises(NonFiniteRowError, match="row 3 of the update is not finite") as caught:
        sketch.update(bad)
    assert caught.value.row == 3
    with pytest.raises(ValueError, match="at least one row"):
        OnlineSVD(0)
