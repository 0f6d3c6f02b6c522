"""Frequent Directions against the paper, and on streams that defeat the greedy choice; products against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_online_svd import SHRINKS, check_bounds, check_identities, flat_rows, random_rows

from gradientspace_ray.sketch.directions import blocks_of, gram, rotate, shrunk_directions
from gradientspace_ray.sketch.online_svd import OnlineSVD
from gradientspace_ray.sketch.refinement import Refinement

SIZES = [(4, 0), (2, 2)]
"""Rows shown, and rows carried beside them."""


def plain_frequent_directions(parts, rank):
    """As in the paper: the SVD of what is kept and what comes, its squares less the first that is lost."""
    kept_ED, shrunk = torch.zeros(0, parts[0].shape[1], dtype=torch.float64), 0.0
    for part in parts:
        _, values, vectors = torch.linalg.svd(torch.cat([kept_ED, part.double()]), full_matrices=False)
        delta = float(values[rank] ** 2) if len(values) > rank else 0.0
        kept_ED = (values[:rank] ** 2 - delta).clamp(min=0).sqrt()[:, None] * vectors[:rank]
        shrunk += delta
    return kept_ED, shrunk


@settings(max_examples=30, deadline=None)
@given(
    rank=st.integers(1, 10),
    oversampling=st.sampled_from([0, 0, 3, None]),
    buffers=st.integers(1, 8),
    width=st.integers(1, 40),
    seed=st.integers(0, 10**6),
)
def test_frequent_directions_are_those_of_the_paper(rank, oversampling, buffers, width, seed):
    sketch = OnlineSVD(rank, "frequent_directions", oversampling=oversampling)
    parts = [random_rows(sketch.buffer_rows, width, seed + index, decay=0.95) for index in range(buffers)]
    for part in parts:
        sketch.update(part)
    plain_ED, shrunk = plain_frequent_directions(parts, sketch.carried)
    kept_ED = sketch.weights @ sketch.carried_rows.double()
    scale = float(torch.cat(parts).double().square().sum())
    assert torch.allclose(kept_ED.T @ kept_ED, plain_ED.T @ plain_ED, atol=1e-5 * scale)
    assert sketch.shrunk == pytest.approx(shrunk, abs=1e-6 * scale)
    assert float(torch.linalg.matrix_norm(sketch.weights, 2)) <= 1 + 1e-12


def hidden_direction(carried, buffers):
    """Strong rows first, then buffers that each hold a little of one direction, below the cut every time."""
    size = OnlineSVD(carried, oversampling=0).buffer_rows
    first = torch.zeros(size, carried + 1 + size)
    first[range(carried), range(carried)] = 10
    later = torch.zeros(size, carried + 1 + size)
    later[0, carried] = 3
    return [first, *[later] * buffers]


@pytest.mark.parametrize(("rank", "oversampling"), SIZES)
def test_a_direction_below_every_cut_is_lost_to_the_greedy_choice_alone(rank, oversampling):
    parts = hidden_direction(carried=4, buffers=400)
    rows_ND = torch.cat(parts).double()
    greedy = OnlineSVD(rank, oversampling=oversampling)
    frequent = OnlineSVD(rank, "frequent_directions", oversampling=oversampling)
    for part in parts:
        greedy.update(part)
        frequent.update(part)
    for sketch in (greedy, frequent):
        check_identities(sketch, rows_ND)
    hidden_D = torch.linalg.svd(rows_ND)[2][0]
    carried_CD = greedy.carried_rows.double()
    assert float((carried_CD @ hidden_D).norm()) < 1e-9
    assert greedy.energy.share < 0.11
    lost_DD = rows_ND.T @ rows_ND - carried_CD.T @ carried_CD
    bound = float(torch.linalg.svdvals(rows_ND)[1:].square().sum()) / 4
    assert float(torch.linalg.matrix_norm(lost_DD, 2)) > 30 * bound
    check_bounds(frequent, rows_ND)
    assert frequent.shrunk <= bound
    assert float(frequent.carried_singular_values.square().sum()) > 0.9 * frequent.energy_total


@pytest.mark.parametrize(("rank", "oversampling"), SIZES)
def test_frequent_directions_bound_an_adversary_in_a_tree_of_merges(rank, oversampling):
    parts = hidden_direction(carried=4, buffers=63)
    sketches = []
    for part in parts:
        sketches.append(OnlineSVD(rank, "frequent_directions", oversampling=oversampling))
        sketches[-1].update(part)
    while len(sketches) > 1:
        for left, right in zip(sketches[::2], sketches[1::2], strict=True):
            left.merge(right)
        sketches = sketches[::2]
    check_identities(sketches[0], torch.cat(parts))
    check_bounds(sketches[0], torch.cat(parts))


def test_the_bound_is_that_of_the_rows_carried():
    rows_ND = flat_rows(400, 60, 0)
    squares = torch.linalg.svdvals(rows_ND.double()).square()
    plain = OnlineSVD(8, "frequent_directions", oversampling=0)
    default = OnlineSVD(8, "frequent_directions")
    for sketch in (plain, default):
        for part in rows_ND.split(3):
            sketch.update(part)
        check_identities(sketch, rows_ND)
        check_bounds(sketch, rows_ND)
        assert sketch.weights.shape == (sketch.carried, sketch.carried)
    bounds = [min(float(squares[j:].sum()) / (carried + 1 - j) for j in range(carried + 1)) for carried in (8, 16)]
    # The bound of 16 rows is not kept with 8, and it is the smaller one.
    assert default.shrunk <= bounds[1] < plain.shrunk <= bounds[0]


def test_directions_that_are_shrunk_away_keep_their_place_while_it_is_free():
    sketch = OnlineSVD(4, "frequent_directions", oversampling=0)
    sketch.update(torch.eye(12)[:6])
    assert not sketch.weights.any()
    assert sketch.shrunk == pytest.approx(1)
    sketch.update(2 * torch.eye(12)[6:8])
    assert sketch.energy.captured == pytest.approx(2 + 8)
    check_identities(sketch, torch.cat([torch.eye(12)[:6], 2 * torch.eye(12)[6:8]]))


def test_without_a_cut_both_choices_are_the_exact_svd():
    rows_ND = random_rows(20, 30, 8)
    for shrink in SHRINKS:
        sketch = OnlineSVD(25, shrink, oversampling=0)
        for part in rows_ND.split(3):
            sketch.update(part)
        exact = torch.linalg.svdvals(rows_ND.double())
        assert torch.allclose(sketch.singular_values, exact, atol=1e-6 * float(exact[0]))
        assert sketch.shrunk == 0
        if shrink != "none":
            kept_ED = sketch.weights @ sketch.carried_rows.double()
            assert torch.allclose(kept_ED.T @ kept_ED, rows_ND.double().T @ rows_ND.double(), atol=1e-5)


def test_shrunk_directions_of_nothing_but_zeros():
    directions, singular_values, weights, delta = shrunk_directions(
        torch.zeros(5, 5, dtype=torch.float64), 3, torch.eye(5, dtype=torch.float64)
    )
    assert torch.equal(directions.T @ directions, torch.eye(3, dtype=torch.float64))
    assert not singular_values.any()
    assert not weights.any()
    assert delta == 0


KERNEL_WIDTHS = (1, 333, 2047, 2048, 2049, 5000)


def stacked(count, width):
    """(matrices of several types, all their rows in float64)."""
    rows = random_rows(count, width, count)
    matrices = [rows, torch.zeros(0, 0), random_rows(3, width, 1).bfloat16(), rows[:1].double() / 3]
    return matrices, torch.cat([matrix.double() for matrix in matrices if len(matrix)])


@pytest.mark.parametrize("width", KERNEL_WIDTHS)
def test_gram_is_exactly_symmetric_and_right(width):
    for count in (1, 79, 80, 81, 155, 200):
        matrices, stacked_SD = stacked(count, width)
        found_SS = gram(matrices)
        assert found_SS.dtype == torch.float64
        assert torch.equal(found_SS, found_SS.T)
        assert torch.allclose(found_SS, stacked_SD @ stacked_SD.T, atol=1e-12)


@pytest.mark.parametrize("width", KERNEL_WIDTHS)
def test_rotate_rounds_no_more_than_float32(width):
    matrices, stacked_SD = stacked(81, width)
    weights_SK = random_rows(85, 11, 2).double()
    found_KD = rotate(matrices, weights_SK)
    assert found_KD.dtype == torch.float32
    assert torch.allclose(found_KD.double(), weights_SK.T @ stacked_SD, atol=1e-6, rtol=0)
    padded_SD = torch.zeros(85, width + 3)[:, 1 : width + 1].copy_(stacked_SD)
    assert torch.equal(rotate([padded_SD], weights_SK), found_KD)


@pytest.fixture
def precision():
    """What stands in `torch.backends` after a process has chosen a float32 precision; it is undone."""
    backends = (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    yield lambda: [backend.fp32_precision for backend in backends]
    torch.set_float32_matmul_precision("highest")
    for backend in backends:
        backend.fp32_precision = "none"


@pytest.mark.parametrize("choice", ["high", "medium", "legacy", "new"])
def test_products_are_in_full_float32_whatever_the_process_allows(precision, choice):
    matrices, weights_SK = [random_rows(300, 4096, 0)], random_rows(300, 64, 1).double()
    expected_KD = rotate(matrices, weights_SK)
    if choice == "legacy":
        torch.backends.cuda.matmul.allow_tf32 = True
    elif choice == "new":
        torch.backends.fp32_precision = "tf32"
    else:
        torch.set_float32_matmul_precision(choice)
    before = precision()
    assert torch.equal(rotate(matrices, weights_SK), expected_KD)
    assert precision() == before


def test_autocast_changes_no_bit_of_a_sketch_its_merge_and_a_second_pass():
    rows_ND = random_rows(60, 5000, 0, decay=0.95)

    def results():
        sketch, other = OnlineSVD(6), OnlineSVD(6)
        # What fits, what does not, and rows that wait to be turned when they are merged.
        for of, part_ND in ((sketch, rows_ND[:7]), (sketch, rows_ND[7:50]), (other, rows_ND[50:])):
            of.update(part_ND, normalise=True, parts=[slice(0, 3000), slice(3000, 5000)])
        updated = [sketch.carried_rows.clone(), sketch.carried_coordinates, sketch.row_energies]
        sketch.merge(other)
        passed = Refinement(sketch.carried_rows)
        passed.update(rows_ND, normalise=True)
        merged = [sketch.carried_rows, sketch.carried_coordinates, sketch.carried_singular_values]
        return [*updated, *merged, passed.sums, passed.projections, passed.row_energies]

    expected = results()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = results()
        assert torch.is_autocast_enabled("cpu")
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_blocks_are_wide_on_every_device_but_a_processor():
    for device, counts in (("cpu", (129, 17)), ("meta", (3, 3))):
        matrix_SD = torch.empty(0, 2**18 + 1, device=device)
        assert (len(blocks_of(matrix_SD)), len(blocks_of(matrix_SD, 2**14))) == counts
