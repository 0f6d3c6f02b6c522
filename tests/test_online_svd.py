"""The sketch against the exact SVD of everything it saw."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradientspace_ray.gradients.layout import Column
from gradientspace_ray.gradients.per_sample import normalise as normalised_gradients
from gradientspace_ray.sketch import online_svd
from gradientspace_ray.sketch.directions import blocks_of
from gradientspace_ray.sketch.online_svd import NonFiniteRowError, OnlineSVD

SHRINKS = ("none", "frequent_directions")


def random_rows(count, width, seed, decay=0.8):
    """Rows with a falling spectrum, as gradients have."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(width, min(count, width), generator=generator))[0]
    scales = decay ** torch.arange(basis.shape[1])
    return torch.randn(count, basis.shape[1], generator=generator) * scales @ basis.T


def flat_rows(count, width, seed, power=0.3):
    """Rows with a slowly falling spectrum, as the gradients of a language model have."""
    generator = torch.Generator().manual_seed(seed)
    basis_DD = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    return torch.randn(count, width, generator=generator) * torch.arange(1, width + 1) ** -power @ basis_DD.T


def check_identities(sketch, rows_ND, tolerance=1e-5):
    """Of the rows shown and of those carried: U orthonormal, R = U^T G orthogonal, and the ledger against the error."""
    rows_ND = rows_ND.double()
    scale = float(rows_ND.norm()) or 1.0
    assert sketch.energy.total == sketch.energy_total == pytest.approx(scale**2 if rows_ND.norm() else 0.0, rel=1e-9)
    assert sketch.energy.captured == float(sketch.singular_values.square().sum())
    assert torch.allclose(sketch.row_energies, rows_ND.square().sum(dim=1), rtol=1e-9)
    shown = (sketch.rows, sketch.coordinates, sketch.singular_values)
    carried = (sketch.carried_rows, sketch.carried_coordinates, sketch.carried_singular_values)
    for part, most in ((shown, sketch.rank), (carried, sketch.carried)):
        assert part[0].shape == (min(most, len(rows_ND)), rows_ND.shape[1])
        check_rows(*part, rows_ND, tolerance, tolerance)


def check_rows(r_KD, u_NK, values_K, rows_ND, rows_tolerance, ledger_tolerance):
    r_KD, rows_ND = r_KD.double(), rows_ND.double()
    scale, captured = float(rows_ND.norm()) or 1.0, float(values_K.square().sum())
    assert torch.allclose(u_NK.T @ u_NK, torch.eye(u_NK.shape[1], dtype=torch.float64), atol=1e-10)
    assert float((u_NK.T @ rows_ND - r_KD).norm()) <= rows_tolerance * scale
    error = float((rows_ND - u_NK @ r_KD).square().sum())
    assert abs(scale**2 * bool(rows_ND.any()) - captured - error) <= ledger_tolerance * scale**2
    assert torch.allclose(r_KD.norm(dim=1), values_K, atol=rows_tolerance * scale)
    assert float((r_KD @ r_KD.T - values_K.square().diag()).norm()) <= ledger_tolerance * scale**2
    assert captured == pytest.approx(float(r_KD.square().sum()), abs=ledger_tolerance * scale**2)
    assert bool((values_K.diff() <= 0).all())


def check_bounds(sketch, rows_ND):
    """The guarantee of Frequent Directions for the rows carried, against the exact spectrum."""
    rows_ND = rows_ND.double()
    r_CD = sketch.carried_rows.double()
    kept_ED, carried = sketch.weights @ r_CD, sketch.carried
    squares = torch.linalg.svdvals(rows_ND).square()
    slack = 1e-6 * float(squares.sum())
    lost = torch.linalg.eigvalsh(rows_ND.T @ rows_ND - kept_ED.T @ kept_ED)
    assert -slack <= float(lost[0])
    assert float(lost[-1]) <= sketch.shrunk + slack
    beside = float((rows_ND - rows_ND @ torch.linalg.pinv(r_CD, rtol=1e-6) @ r_CD).square().sum())
    for j in range(min(carried, len(squares)) + 1):
        tail = float(squares[j:].sum())
        assert sketch.shrunk <= tail / (carried + 1 - j) + slack
        assert beside <= (1 + j / (carried + 1 - j)) * tail + slack


def test_all_rows_kept_is_the_exact_svd():
    rows_ND = random_rows(40, 90, 0)
    sketch = OnlineSVD(rank=40, oversampling=0)
    for part in rows_ND.split([7, 1, 20, 12]):
        sketch.update(part)
    exact = torch.linalg.svdvals(rows_ND.double())
    assert torch.allclose(sketch.singular_values, exact, atol=1e-5 * float(exact[0]))
    assert torch.allclose((sketch.coordinates @ sketch.rows.double()).float(), rows_ND, atol=1e-5)
    assert sketch.energy.share == pytest.approx(1)


def test_truncated_sketch_is_close_to_the_best_of_its_rank():
    rows_ND = random_rows(200, 300, 1, decay=0.9)
    best = float(torch.linalg.svdvals(rows_ND.double())[:16].square().sum())
    for oversampling, share in ((0, 0.98), (None, 0.999)):
        sketch = OnlineSVD(rank=16, oversampling=oversampling)
        sketch.update(rows_ND)
        assert share * best <= sketch.energy.captured <= best * (1 + 1e-9)
        check_identities(sketch, rows_ND)


@pytest.mark.parametrize("seed", range(2))
def test_rows_carried_beside_those_shown_recover_most_of_what_one_pass_loses(seed):
    rows_ND, rank = flat_rows(1000, 300, seed), 16
    best = float(torch.linalg.svdvals(rows_ND.double())[:rank].square().sum())
    shares = {}
    for oversampling in (0, 4, None, 3 * rank):
        sketch = OnlineSVD(rank, oversampling=oversampling)
        sketch.update(rows_ND)
        check_identities(sketch, rows_ND)
        shares[oversampling] = sketch.energy.captured / best
    assert sorted(shares.values()) == list(shares.values())
    assert shares[0] < 0.95
    assert 0.97 < shares[None] < shares[3 * rank] <= 1 + 1e-9


@pytest.mark.parametrize("shrink", SHRINKS)
def test_as_many_examples_as_rows_are_carried_stay_exact(shrink):
    rows_ND = flat_rows(12, 40, 3)
    whole, left, right = (OnlineSVD(6, shrink) for _ in range(3))
    for part in rows_ND.split(5):
        whole.update(part)
    left.update(rows_ND[:7])
    right.update(rows_ND[7:])
    left.merge(right)
    exact = torch.linalg.svdvals(rows_ND.double())
    for sketch in (whole, left):
        check_identities(sketch, rows_ND)
        assert torch.allclose(sketch.carried_singular_values, exact, rtol=1e-6)
        assert torch.equal(sketch.singular_values, sketch.carried_singular_values[:6])
        assert torch.allclose(sketch.carried_coordinates @ sketch.carried_rows.double(), rows_ND.double(), atol=1e-5)
        assert sketch.shrunk == 0
    whole.update(rows_ND[:1] + 1)
    assert whole.energy_total - float(whole.carried_singular_values.square().sum()) > 1e-3 * whole.energy_total


@pytest.mark.parametrize("shrink", SHRINKS)
def test_a_merge_keeps_its_own_size(shrink):
    parts = flat_rows(60, 30, 4).split(30)
    for own, others in (((5, 0), (3, 9)), ((3, 9), (5, 0))):
        sketch, other = (
            OnlineSVD(own[0], shrink, oversampling=own[1]),
            OnlineSVD(others[0], shrink, oversampling=others[1]),
        )
        sketch.update(parts[0])
        other.update(parts[1])
        before = other.carried_rows.clone()
        sketch.merge(other)
        check_identities(sketch, torch.cat(parts))
        assert (sketch.rank, sketch.carried) == (own[0], sum(own))
        assert torch.equal(other.carried_rows, before)


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(1, 25), min_size=1, max_size=5),
    width=st.integers(1, 60),
    rank=st.integers(1, 30),
    seed=st.integers(0, 10**6),
    normalise=st.booleans(),
    shrink=st.sampled_from(SHRINKS),
    oversampling=st.none() | st.integers(0, 8),
)
def test_identities_hold_for_any_stream(counts, width, rank, seed, normalise, shrink, oversampling):
    parts = [random_rows(count, width, seed + index) for index, count in enumerate(counts)]
    parts[-1][0] = 0
    sketch = OnlineSVD(rank, shrink, oversampling=oversampling)
    for part in parts:
        sketch.update(part, normalise=normalise)
    rows_ND = torch.cat(parts)
    if normalise:
        rows_ND = torch.nn.functional.normalize(rows_ND.double(), dim=1, eps=1e-300)
    check_identities(sketch, rows_ND)
    if shrink != "none":
        check_bounds(sketch, rows_ND)


@settings(max_examples=25, deadline=None)
@given(
    counts=st.lists(st.integers(1, 30), min_size=2, max_size=5),
    rank=st.integers(1, 40),
    seed=st.integers(0, 10**6),
    shrink=st.sampled_from(SHRINKS),
    oversampling=st.none() | st.integers(0, 8),
)
def test_merge_keeps_the_identities(counts, rank, seed, shrink, oversampling):
    parts = [random_rows(count, 50, seed + index) for index, count in enumerate(counts)]
    merged = OnlineSVD(rank, shrink, oversampling=oversampling)
    for part in parts:
        sketch = OnlineSVD(rank, shrink, oversampling=oversampling)
        sketch.update(part)
        merged.merge(sketch)
    check_identities(merged, torch.cat(parts))
    if shrink != "none":
        check_bounds(merged, torch.cat(parts))


def hard_rows(kind, count, width, seed):
    generator = torch.Generator().manual_seed(seed)
    rows_ND = torch.randn(count, width, generator=generator, dtype=torch.float64)
    if kind == "ill-conditioned":
        left, _, right = torch.linalg.svd(rows_ND, full_matrices=False)
        rows_ND = left @ torch.diag(torch.logspace(0, -8, min(count, width), dtype=torch.float64)) @ right
    elif kind == "rank-deficient":
        rows_ND = rows_ND[:, :3] @ rows_ND[:3]
    elif kind == "duplicated":
        rows_ND = rows_ND[torch.arange(count) % 5]
    elif kind == "orthonormal":
        rows_ND = torch.eye(width, dtype=torch.float64)[torch.arange(count) % width]
    elif kind == "uneven":
        rows_ND = rows_ND * torch.logspace(-6, 6, count, dtype=torch.float64)[:, None]
    rows_ND[count // 2] = 0
    return rows_ND.float()


# Measured on these streams: at most 0.0081 and 8.6e-4.
BF16_ROWS, BF16_LEDGER = 0.02, 2e-3
HARD = ("ill-conditioned", "rank-deficient", "duplicated", "orthonormal", "uneven", "noise")


def stream(kind, shrink, dtype, rank=6, count=1200, width=70):
    """Hundreds of updates of 1 to 5 rows, in sketches of many sizes that are merged one into the other."""
    rows_ND = hard_rows(kind, count, width, 7)
    total = OnlineSVD(rank, shrink, dtype)
    start, step = 0, 0
    while start < count:
        shard = OnlineSVD(rank, shrink, dtype)
        for _ in range(1 + step % 90):
            step += 7
            shard.update(rows_ND[start : start + 1 + step % 5])
            start += 1 + step % 5
        total.merge(shard)
    return total, rows_ND


@pytest.mark.parametrize("shrink", SHRINKS)
@pytest.mark.parametrize("kind", HARD)
def test_hundreds_of_updates_and_uneven_merges_keep_the_ledger(kind, shrink):
    sketch, rows_ND = stream(kind, shrink, torch.float32)
    check_identities(sketch, rows_ND)
    if shrink != "none":
        check_bounds(sketch, rows_ND)


@pytest.mark.parametrize("shrink", SHRINKS)
@pytest.mark.parametrize("kind", HARD)
def test_rows_in_bfloat16_lose_what_their_type_says(kind, shrink):
    sketch, rows_ND = stream(kind, shrink, torch.bfloat16)
    assert sketch.rows.dtype == torch.bfloat16
    for part in (
        (sketch.rows, sketch.coordinates, sketch.singular_values),
        (sketch.carried_rows, sketch.carried_coordinates, sketch.carried_singular_values),
    ):
        check_rows(*part, rows_ND, BF16_ROWS, BF16_LEDGER)


def test_merge_without_truncation_does_not_depend_on_the_tree():
    parts = [random_rows(10, 80, seed) for seed in range(4)]

    def sketch_of(*chosen):
        sketch = OnlineSVD(rank=40, oversampling=0)
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


@pytest.mark.parametrize("oversampling", [0, None])
def test_hundreds_of_turns_in_float32_keep_the_rows_and_the_ledger(oversampling):
    rows_ND = flat_rows(800, 300, 5).repeat(1, 7)
    sketch = OnlineSVD(8, oversampling=oversampling)
    for part in rows_ND.split(2):
        sketch.update(part, normalise=True)
    # Measured: at most 5e-7 of ||G||, and 4e-8 of its square.
    check_identities(sketch, torch.nn.functional.normalize(rows_ND.double(), dim=1))


def test_blocks_of_columns_do_not_change_the_result(monkeypatch):
    rows_ND = random_rows(30, 100, 3)
    whole, blocked = OnlineSVD(8), OnlineSVD(8)
    whole.update(rows_ND, normalise=True)
    monkeypatch.setattr(blocks_of, "__defaults__", (7,))
    monkeypatch.setattr(online_svd, "TURNED_AT_ONCE", 17)
    blocked.update(rows_ND, normalise=True)
    assert torch.allclose(whole.carried_rows, blocked.carried_rows, atol=1e-6)


def test_unit_scaling_survives_extreme_norms():
    rows_ND = random_rows(6, 20, 4)
    scaled = rows_ND * torch.tensor([1e-15, 1e15, 1.0, 1e-6, 1e6, 0.0])[:, None]
    sketch = OnlineSVD(6)
    sketch.update(scaled, normalise=True)
    assert sketch.energy.total == pytest.approx(5)
    check_identities(sketch, torch.nn.functional.normalize(scaled.double(), dim=1, eps=1e-300))


@pytest.mark.parametrize("parts", [None, [slice(0, 8), slice(8, 20)]])
def test_a_row_too_short_for_float32_to_scale_counts_as_zero(parts):
    rows_ND = random_rows(9, 20, 4)
    expected = OnlineSVD(3)
    short_ND = rows_ND.double() * torch.tensor([1e-39, 1e-44, *[1.0] * 7], dtype=torch.float64)[:, None]
    # A short part of the third row is nothing beside the other one.
    short_ND[2, :8] *= 1e-39
    whole_ND = torch.cat([torch.zeros(2, 20), rows_ND[2:]])
    whole_ND[2, :8] = 0
    expected.update(whole_ND, normalise=True, parts=parts)
    for rows in (short_ND.float(), short_ND):
        sketch = OnlineSVD(3)
        sketch.update(rows, normalise=True, parts=parts)
        sketch.update(rows[:0])
        assert sketch.energy == expected.energy
        assert torch.allclose(sketch.rows, expected.rows, atol=1e-6)
        assert not sketch.row_energies[:2].any()


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
    assert torch.equal(first.carried_rows, second.carried_rows)
    assert torch.equal(first.carried_coordinates, second.carried_coordinates)
    assert torch.equal(rows_ND, before)


def test_memory_taken_in_advance_changes_nothing():
    rows_ND = random_rows(50, 64, 5)
    first, second = OnlineSVD(8), OnlineSVD(8)
    second.reserve(64, "cpu")
    assert second.rows.shape == (0, 64)
    with pytest.raises(ValueError, match="this sketch takes N x 64"):
        second.update(torch.ones(2, 4))
    first.update(rows_ND)
    second.update(rows_ND)
    assert torch.equal(first.carried_rows, second.carried_rows)


def test_bfloat16_rows_are_taken_as_they_are():
    rows_ND = random_rows(20, 30, 6).bfloat16()
    sketch = OnlineSVD(20)
    sketch.update(rows_ND)
    check_identities(sketch, rows_ND.float())


@pytest.mark.parametrize(("rank", "oversampling", "carried"), [(1, 0, 1), (5, None, 10), (5, 3, 8), (64, 0, 64)])
def test_the_buffer_is_nearly_the_cheapest(rank, oversampling, carried):
    sketch = OnlineSVD(rank, oversampling=oversampling)
    assert (sketch.rank, sketch.carried) == (rank, carried)
    sizes = range(1, 3 * carried + 2)
    costs = {size: ((carried + size) ** 2 / 2 + carried * (carried + size)) / size for size in sizes}
    assert costs[sketch.buffer_rows] <= 1.08 * min(costs.values())


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
    with pytest.raises(ValueError, match="oversampling adds rows, got -1"):
        OnlineSVD(2, oversampling=-1)
    with pytest.raises(ValueError, match="shrink='both': give one of none, frequent_directions"):
        OnlineSVD(2, shrink="both")
    with pytest.raises(ValueError, match=r"dtype=torch.float16: give one of torch.float32, torch.bfloat16"):
        OnlineSVD(2, dtype=torch.float16)
    with pytest.raises(ValueError, match="shrink='none' cannot absorb one with shrink='frequent_directions'"):
        sketch.merge(OnlineSVD(2, "frequent_directions"))


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(1, 25),
    widths=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    rank=st.integers(1, 12),
    seed=st.integers(0, 10**6),
    shrink=st.sampled_from(SHRINKS),
)
def test_parts_are_normalised_as_the_gradients_of_modules_are(count, widths, rank, seed, shrink):
    edges = np.cumsum([0, *widths]).tolist()
    rows_ND = random_rows(count, edges[-1], seed) * torch.logspace(-4, 3, edges[-1])
    rows_ND[0, : edges[1]] = 0
    rows_ND[count // 2] = 0
    columns = [Column(name, edge, (1, 1)) for edge in edges[:-1] for name in "AB"]
    wanted_ND = rows_ND.double()
    normalised_gradients(wanted_ND, columns, "module")
    sketch, wanted = OnlineSVD(rank, shrink), OnlineSVD(rank, shrink)
    parts = [slice(*edge) for edge in pairwise(edges)]
    for start in range(0, count, 7):
        sketch.update(rows_ND[start : start + 7], normalise=True, parts=parts)
        wanted.update(wanted_ND[start : start + 7])
    check_identities(sketch, wanted_ND)
    assert torch.allclose(sketch.singular_values, wanted.singular_values, atol=1e-5)


def test_parts_that_do_not_cover_the_columns_are_refused():
    sketch, rows_ND = OnlineSVD(2), torch.ones(2, 6)
    for parts in (
        [],
        [slice(0, 5)],
        [slice(1, 6)],
        [slice(0, 3), slice(4, 6)],
        [slice(0, 4), slice(3, 6)],
        [slice(0, 7), slice(7, 6)],
        [slice(None)],
        [slice(0, 6, 2)],
    ):
        with pytest.raises(ValueError, match="parts must cover the 6 columns in order"):
            sketch.update(rows_ND, normalise=True, parts=parts)
    with pytest.raises(ValueError, match="give normalise=True with them"):
        sketch.update(rows_ND, parts=[slice(0, 6)])
    assert not sketch.coordinates.shape[0]


def test_a_row_that_is_not_finite_in_one_part_leaves_the_sketch_as_it_was():
    sketch = OnlineSVD(2)
    sketch.update(random_rows(3, 6, 0))
    before = sketch.rows.clone()
    bad = torch.ones(2, 6)
    bad[1, 5] = float("inf")
    with pytest.raises(NonFiniteRowError, match="row 1 of the update"):
        sketch.update(bad, normalise=True, parts=[slice(0, 3), slice(3, 6)])
    assert torch.equal(sketch.rows, before)
    assert sketch.coordinates.shape == (3, 2)


@pytest.mark.parametrize("shrink", SHRINKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sketch_goes_on_from_its_parts(shrink, dtype):
    first, whole = OnlineSVD(6, shrink, dtype), OnlineSVD(6, shrink, dtype)
    early, late = random_rows(30, 40, 9), random_rows(25, 40, 10)
    first.update(early)
    whole.update(early)
    first_KD = first.rows.clone()
    again = OnlineSVD.from_parts(
        rank=6,
        oversampling=6,
        rows_CD=first.carried_rows,
        coordinates_NC=first.carried_coordinates,
        singular_values_C=first.carried_singular_values,
        row_energies_N=first.row_energies,
        energy_total=first.energy_total,
        shrink=shrink,
        weights_CC=first.weights,
        shrunk=first.shrunk,
        dtype=dtype,
    )
    assert again.energy == first.energy
    again.update(late)
    assert torch.equal(first.rows, first_KD)
    whole.update(late)
    for name in ("rows", "carried_rows", "carried_coordinates", "carried_singular_values", "row_energies"):
        assert torch.equal(getattr(again, name), getattr(whole, name))
    assert again.energy == whole.energy
    assert again.shrunk == whole.shrunk
    if shrink != "none":
        assert torch.equal(again.weights, whole.weights)


def test_parts_of_different_sketches_do_not_make_one():
    two_NC, two_C = torch.eye(2), torch.ones(2)
    parts = {
        "rows_CD": torch.ones(2, 3),
        "coordinates_NC": two_NC,
        "singular_values_C": two_C,
        "row_energies_N": two_C,
        "energy_total": 6.0,
    }
    assert OnlineSVD.from_parts(1, 1, **parts).carried == 2
    for oversampling, change in (
        (0, {}),
        (1, {"shrink": "frequent_directions"}),
        (1, {"weights_CC": two_NC}),
        (1, {"rows_CD": torch.ones(1, 3)}),
        (1, {"singular_values_C": torch.ones(1)}),
        (1, {"row_energies_N": torch.ones(3)}),
    ):
        with pytest.raises(ValueError, match="not the parts of one sketch of rank 1"):
            OnlineSVD.from_parts(1, oversampling, **{**parts, **change})
