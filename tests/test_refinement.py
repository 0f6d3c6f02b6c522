"""The second pass against the exact SVD, and against the sketch that it begins with."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradientspace_ray.sketch import refinement
from gradientspace_ray.sketch.directions import blocks_of, gram, rotate
from gradientspace_ray.sketch.online_svd import NonFiniteRowError, OnlineSVD
from gradientspace_ray.sketch.refinement import Refinement, refined_directions

SHRINKS = ("none", "frequent_directions")


def random_rows(count, width, seed, decay=0.97):
    """Rows with a slowly falling spectrum, as gradients have."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(width, min(count, width), generator=generator))[0]
    scales = decay ** torch.arange(basis.shape[1])
    return torch.randn(count, basis.shape[1], generator=generator) * scales @ basis.T


def sketch_of(rows_ND, rank, shrink="none", dtype=torch.float32, oversampling=0):
    sketch = OnlineSVD(rank, shrink, dtype, oversampling)
    sketch.update(rows_ND)
    return sketch


def refined(passed, rank):
    """(R as it is stored, U, singular values, and R before it is rounded) of a finished pass."""
    projections = passed.projections
    directions, singular_values = refined_directions(gram([passed.sums]), projections.T @ projections, rank)
    unrounded_RD = directions.T @ passed.sums.double()
    return rotate([passed.sums], directions), projections @ directions, singular_values, unrounded_RD


def check_refined(passed, rows_ND, rank, tolerance=1e-5):
    """U orthonormal, R = U^T G with orthogonal rows, and the ledger. Returns the singular values."""
    rows_ND = rows_ND.double()
    stored_RD, u_NR, singular_values, unrounded_RD = refined(passed, rank)
    scale = float(rows_ND.norm())
    kept = len(singular_values)
    assert stored_RD.dtype == torch.float32
    r_RD = stored_RD.double()
    assert torch.allclose(u_NR.T @ u_NR, torch.eye(kept, dtype=torch.float64), atol=1e-7)
    assert float((u_NR.T @ rows_ND - r_RD).norm()) <= tolerance * scale
    captured = float(singular_values.square().sum())
    error = float((rows_ND - u_NR @ r_RD).square().sum())
    assert abs(passed.energy_total - captured - error) <= tolerance * scale**2
    squares_RR = torch.diag(singular_values.square())
    assert float((unrounded_RD @ unrounded_RD.T - squares_RR).norm()) <= 1e-9 * scale**2
    assert float((r_RD @ r_RD.T - squares_RR).norm()) <= tolerance * scale**2
    assert torch.allclose(passed.row_energies, rows_ND.square().sum(dim=1), rtol=1e-9)
    assert passed.sums.dtype == torch.float32
    return singular_values


def check_not_below(singular_values, sketch, energy_total):
    """No singular value falls, up to the rounding of float32."""
    size = min(len(singular_values), len(sketch.singular_values))
    gained = singular_values[:size].square() - sketch.singular_values[:size].square()
    assert float(gained.min()) >= -1e-6 * energy_total
    assert float(sketch.singular_values[size:].square().sum()) <= 1e-6 * energy_total


@pytest.mark.parametrize("oversampling", [0, 16])
@pytest.mark.parametrize("shrink", SHRINKS)
def test_a_second_pass_comes_closer_to_the_exact_svd(shrink, oversampling):
    rows_ND = random_rows(600, 300, 0, decay=0.99)
    sketch = sketch_of(rows_ND, 16, shrink, oversampling=oversampling)
    passed = Refinement(sketch.carried_rows)
    passed.update(rows_ND)
    assert passed.sums.shape == (16 + oversampling, 300)
    singular_values = check_refined(passed, rows_ND, 16)
    check_not_below(singular_values, sketch, passed.energy_total)
    exact = torch.linalg.svdvals(rows_ND.double())[:16]
    assert bool((singular_values <= exact * (1 + 1e-6)).all())
    missed_once = float((exact.square() - sketch.singular_values.square()).sum())
    missed_twice = float((exact.square() - singular_values.square()).sum())
    assert missed_twice < 0.5 * missed_once


def test_rows_carried_beside_those_shown_help_the_second_pass_too():
    rows_ND = random_rows(600, 300, 0, decay=0.99)
    best, missed = float(torch.linalg.svdvals(rows_ND.double())[:16].square().sum()), []
    for oversampling in (0, 8, 16):
        passed = Refinement(sketch_of(rows_ND, 16, oversampling=oversampling).carried_rows)
        passed.update(rows_ND)
        missed.append(best - float(check_refined(passed, rows_ND, 16).square().sum()))
    assert missed[0] > 3 * missed[1] > 9 * missed[2] > 0


@pytest.mark.parametrize("normalise", [False, True])
def test_hundreds_of_updates_keep_the_sums(normalise):
    rows_ND = random_rows(600, 300, 1, decay=0.99).repeat(1, 7)
    passed = Refinement(sketch_of(rows_ND, 8, oversampling=8).carried_rows)
    for part in rows_ND.split(3):
        passed.update(part, normalise=normalise)
    if normalise:
        rows_ND = torch.nn.functional.normalize(rows_ND.double(), dim=1)
    sums_KD = passed.projections.T @ rows_ND.double()
    assert float((passed.sums - sums_KD).norm()) <= 1e-6 * float(sums_KD.norm())
    for rank in (8, 16):
        check_refined(passed, rows_ND, rank)


def test_with_the_bound_of_frequent_directions_the_ledger_has_it_too():
    size, rank = OnlineSVD(4, oversampling=0).buffer_rows, 4
    first, later = torch.zeros(size, 12), torch.zeros(size, 12)
    first[range(rank), range(rank)] = 10
    later[0, rank] = 3
    rows_ND = torch.cat([first, *[later] * 300])
    squares = torch.linalg.svdvals(rows_ND.double()).square()
    for shrink, holds in (("none", False), ("frequent_directions", True)):
        passed = Refinement(sketch_of(rows_ND, rank, shrink).rows)
        passed.update(rows_ND)
        captured = float(check_refined(passed, rows_ND, rank).square().sum())
        bounds = [(1 + j / (rank + 1 - j)) * float(squares[j:].sum()) for j in range(rank + 1)]
        assert (passed.energy_total - captured <= min(bounds) + 1e-6 * passed.energy_total) == holds


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    width=st.integers(1, 50),
    rank=st.integers(1, 25),
    seed=st.integers(0, 10**6),
    shrink=st.sampled_from(SHRINKS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    oversampling=st.none() | st.integers(0, 8),
)
def test_what_is_guaranteed_holds_for_any_stream(counts, width, rank, seed, shrink, dtype, oversampling):
    parts = [random_rows(count, width, seed + index) for index, count in enumerate(counts)]
    parts[-1][0] = 0
    rows_ND = torch.cat(parts)
    if not rows_ND.any():
        return
    sketch = sketch_of(rows_ND, rank, shrink, dtype, oversampling)
    passed = Refinement(sketch.carried_rows)
    for part in parts:
        passed.update(part)
    # A narrow store makes a direction of its own rounding, which is only as independent as `DEPENDENT` asks.
    singular_values = check_refined(passed, rows_ND, rank, tolerance=1e-4)
    if dtype == torch.float32:
        check_not_below(singular_values, sketch, passed.energy_total)


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(0, 60), min_size=1, max_size=5), seed=st.integers(0, 10**6))
def test_sums_over_shards_are_the_sum_of_the_whole(cuts, seed):
    rows_ND = random_rows(60, 40, seed)
    basis_KD = sketch_of(rows_ND, 8).rows
    whole = Refinement(basis_KD)
    whole.update(rows_ND, normalise=True)
    shards = []
    for shard in rows_ND.tensor_split(sorted(cuts)):
        shards.append(Refinement(basis_KD))
        shards[-1].update(shard, normalise=True)
    total = torch.stack([shard.sums for shard in shards]).sum(dim=0)
    assert torch.allclose(total, whole.sums, atol=1e-5)
    assert torch.allclose(torch.cat([shard.projections for shard in shards]), whole.projections, atol=1e-12)
    assert torch.allclose(torch.cat([shard.row_energies for shard in shards]), whole.row_energies)


@pytest.mark.parametrize("shrink", SHRINKS)
def test_a_rank_deficient_sketch_gives_fewer_directions(shrink):
    # Of whole numbers: their products are exact, so that no rounding adds a fourth direction.
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.randint(-5, 6, size, generator=generator).float() for size in ((50, 3), (3, 40)))
    rows_ND = left @ right
    passed = Refinement(sketch_of(rows_ND, 10, shrink).rows)
    passed.update(rows_ND)
    singular_values = check_refined(passed, rows_ND, 10)
    assert len(singular_values) == 3
    assert torch.allclose(singular_values, torch.linalg.svdvals(rows_ND.double())[:3], rtol=1e-5)


def test_an_ill_conditioned_spectrum_keeps_its_identities():
    left, _, right = torch.linalg.svd(random_rows(80, 60, 4).double(), full_matrices=False)
    rows_ND = (left @ torch.diag(torch.logspace(0, -8, 60, dtype=torch.float64)) @ right).float()
    sketch = sketch_of(rows_ND, 20)
    passed = Refinement(sketch.rows)
    passed.update(rows_ND)
    singular_values = check_refined(passed, rows_ND, 20)
    check_not_below(singular_values, sketch, passed.energy_total)
    assert len(singular_values) == 20


def test_nearly_dependent_columns_are_where_the_threshold_cuts():
    rows_ND = random_rows(200, 50, 5, decay=1.0)
    base = torch.linalg.qr(torch.randn(50, 2, generator=torch.Generator().manual_seed(6)))[0].T
    for angle, kept in ((1e-1, 2), (2e-3, 2), (1e-5, 1)):
        passed = Refinement(torch.stack([base[0], base[0] + angle * base[1]]))
        passed.update(rows_ND)
        assert len(check_refined(passed, rows_ND, 2, tolerance=1e-4)) == kept


def test_fewer_directions_are_the_leading_ones():
    rows_ND = random_rows(90, 60, 7)
    passed = Refinement(sketch_of(rows_ND, 12).rows)
    passed.update(rows_ND)
    all_values = check_refined(passed, rows_ND, 12)
    assert torch.allclose(check_refined(passed, rows_ND, 5), all_values[:5])


def test_more_rows_in_the_basis_than_examples_is_exact():
    rows_ND = random_rows(6, 40, 8)
    passed = Refinement(random_rows(20, 40, 9))
    passed.update(rows_ND)
    singular_values = check_refined(passed, rows_ND, 20)
    assert torch.allclose(singular_values, torch.linalg.svdvals(rows_ND.double()), rtol=1e-5)


def test_zero_rows_of_the_basis_and_of_the_data_stay_zero():
    basis_KD, rows_ND = random_rows(5, 30, 10), random_rows(40, 30, 11)
    basis_KD[3] = 0
    rows_ND[7] = 0
    passed = Refinement(basis_KD)
    passed.update(rows_ND)
    assert not passed.sums[3].any()
    assert not passed.projections[:, 3].any()
    assert not passed.projections[7].any()
    assert len(check_refined(passed, rows_ND, 5)) == 4


def test_a_row_too_short_for_float32_to_scale_counts_as_zero():
    basis_KD, rows_ND = random_rows(5, 30, 10), random_rows(8, 30, 11)
    rows_ND[:2] = (rows_ND[:2].double() * 1e-40).float()
    rows_ND[2, :10] = (rows_ND[2, :10].double() * 1e-40).float()
    assert rows_ND[:2].any()
    assert rows_ND[2, :10].any()
    passed = Refinement(basis_KD)
    passed.update(rows_ND, normalise=True, parts=[slice(0, 10), slice(10, 30)])
    assert passed.row_energies.tolist() == pytest.approx([0, 0, 1, 1, 1, 1, 1, 1])
    assert not passed.projections[:2].any()
    assert bool(passed.sums.isfinite().all())


def test_nothing_but_zeros():
    passed = Refinement(torch.zeros(3, 7))
    passed.update(torch.zeros(4, 7), normalise=True)
    r_RD, u_NR, singular_values, _ = refined(passed, 3)
    assert (r_RD.shape, u_NR.shape, singular_values.shape) == ((0, 7), (4, 0), (0,))
    assert passed.energy_total == 0


@settings(max_examples=20, deadline=None)
@given(
    widths=st.lists(st.integers(1, 15), min_size=1, max_size=5), seed=st.integers(0, 10**6), with_parts=st.booleans()
)
def test_rows_are_scaled_as_by_the_first_pass(widths, seed, with_parts):
    width = sum(widths)
    rows_ND = random_rows(30, width, seed) * torch.logspace(-3, 3, width)
    rows_ND[2] = 0
    rows_ND[5, : widths[0]] = 0
    ends = torch.tensor(widths).cumsum(0).tolist()
    parts = [slice(end - size, end) for end, size in zip(ends, widths, strict=True)] if with_parts else None
    sketch = OnlineSVD(30)
    sketch.update(rows_ND, normalise=True, parts=parts)
    passed = Refinement(sketch.rows)
    passed.update(rows_ND, normalise=True, parts=parts)
    scaled_ND = sketch.coordinates @ sketch.rows.double()
    assert torch.equal(passed.row_energies, sketch.row_energies)
    assert torch.allclose(passed.projections.T @ scaled_ND, passed.sums.double(), atol=1e-4)


def test_blocks_of_columns_and_of_rows_do_not_change_the_result(monkeypatch):
    rows_ND = random_rows(50, 100, 12)
    basis_KD = sketch_of(rows_ND, 8).rows
    parts = [slice(0, 33), slice(33, 100)]
    whole, blocked = Refinement(basis_KD), Refinement(basis_KD)
    whole.update(rows_ND, normalise=True, parts=parts)
    monkeypatch.setattr(blocks_of, "__defaults__", (7,))
    monkeypatch.setattr(refinement, "ROWS_AT_ONCE", 9)
    monkeypatch.setattr(refinement, "TURNED_AT_ONCE", 17)
    blocked.update(rows_ND, normalise=True, parts=parts)
    assert torch.allclose(whole.sums, blocked.sums, atol=1e-5)
    assert torch.allclose(whole.projections, blocked.projections, atol=1e-12)


def test_equal_input_gives_equal_bytes_and_input_is_left_alone():
    rows_ND = random_rows(50, 64, 13)
    basis_KD = sketch_of(rows_ND, 8).rows
    before = [rows_ND.clone(), basis_KD.clone()]
    first, second = Refinement(basis_KD), Refinement(basis_KD)
    first.update(rows_ND, normalise=True)
    second.update(rows_ND, normalise=True)
    assert torch.equal(first.sums, second.sums)
    assert torch.equal(refined(first, 8)[0], refined(second, 8)[0])
    assert torch.equal(rows_ND, before[0])
    assert torch.equal(basis_KD, before[1])


def test_bad_input_is_refused_and_leaves_no_trace():
    passed = Refinement(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"shape \(2, 4\), this basis takes N x 3"):
        passed.update(torch.ones(2, 4))
    with pytest.raises(ValueError, match="parts must cover the 3 columns"):
        passed.update(torch.ones(2, 3), normalise=True, parts=[slice(0, 2)])
    bad = torch.ones(4, 3)
    bad[3, 1] = float("nan")
    with pytest.raises(NonFiniteRowError, match="row 3 of the update is not finite"):
        passed.update(bad)
    assert not passed.sums.any()
    assert not len(passed.projections)
