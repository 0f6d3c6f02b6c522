"""Saved sketches merged by column blocks along the tree, against the SVD of all rows and the merge in memory."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gradientspace_ray.run import RunDirectory
from gradientspace_ray.sketch import merging
from gradientspace_ray.sketch.columns import (
    RECORD,
    TURN,
    SketchError,
    is_complete,
    load_sketch,
    open_sketch,
    save_sketch,
    save_sums,
)
from gradientspace_ray.sketch.directions import gram
from gradientspace_ray.sketch.merging import (
    commit,
    coordinates_of,
    merge_saved,
    part_gram,
    parts_of,
    projections_of,
    solve,
    turn,
)
from gradientspace_ray.sketch.online_svd import OnlineSVD
from gradientspace_ray.sketch.refinement import Refinement, refined_directions
from gradientspace_ray.sketch.spectrum import describe_spectrum
from gradientspace_ray.sketch.tree import BASIS, ROOT, merge_tree, missing, refinement_tree, to_read

WIDTH, BLOCK = 50, 4


@pytest.fixture
def store(tmp_path):
    return RunDirectory(tmp_path)


def leaves_of(store, counts, rank, *, seed=0, **options):
    """Save one sketch for each count, and return (names, all rows)."""
    names, parts = [f"{index:05d}.leaf" for index in range(len(counts))], []
    for index, (name, count) in enumerate(zip(names, counts, strict=True)):
        rows = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed + index))
        sketch = OnlineSVD(rank, **options)
        sketch.update(rows, normalise=True)
        save_sketch(store, f"sketch/shards/{name}", sketch, [f"{index}-{i}" for i in range(count)], BLOCK, name)
        parts.append(torch.nn.functional.normalize(rows.double(), dim=1))
    return names, torch.cat(parts)


def make_all(store, root):
    for node in missing(root, lambda node: not node.children, lambda node: True):
        merge_saved(store, node)


def in_memory(store, node):
    """The sketch of a node, merged as the tree says from the saved ones of its leaves."""
    if not node.children:
        return load_sketch(store, node.folder)[0]
    sketch, *others = [in_memory(store, child) for child in node.children]
    for other in others:
        sketch.merge(other)
    return sketch


def orthonormal(u_NK):
    return torch.allclose(u_NK.T @ u_NK, torch.eye(u_NK.shape[1], dtype=torch.float64), atol=1e-10)


def assembled(store, root):
    """U [N, K], R [K, D] and the ids of a finished tree."""
    shards = list(coordinates_of(store, root))
    u_NK = torch.cat([shard.coordinates_NK for shard in shards])
    return u_NK, open_sketch(store, root.folder).rows().double(), [id_ for shard in shards for id_ in shard.ids]


@settings(max_examples=15, deadline=None)
@given(
    counts=st.lists(st.integers(1, 14), min_size=1, max_size=7),
    rank=st.integers(1, 60),
    seed=st.integers(0, 10**6),
    oversampling=st.none() | st.integers(0, 8),
)
@example(counts=[2], rank=1, seed=0, oversampling=None)
@example(counts=[14, 14, 14, 14], rank=WIDTH + 3, seed=0, oversampling=0)
def test_the_tree_keeps_the_ledger(tmp_path_factory, counts, rank, seed, oversampling):
    store = RunDirectory(tmp_path_factory.mktemp("tree"))
    names, rows_ND = leaves_of(store, counts, rank, seed=seed, oversampling=oversampling)
    carried = 2 * rank if oversampling is None else rank + oversampling
    root = merge_tree(names)
    make_all(store, root)
    u_NK, r_KD, ids = assembled(store, root)
    assert r_KD.shape == (min(rank, len(ids)), WIDTH)
    assert ids == [f"{index}-{i}" for index, count in enumerate(counts) for i in range(count)]
    record = open_sketch(store, ROOT).record
    assert record.examples == len(ids)
    assert (record.rank, record.oversampling, record.rows) == (rank, carried - rank, len(r_KD))
    assert orthonormal(u_NK)
    assert torch.allclose(u_NK.T @ rows_ND, r_KD, atol=1e-5)
    error = float((rows_ND - u_NK @ r_KD).square().sum())
    assert record.energy_total == pytest.approx(len(ids))
    assert record.energy_total - record.energy_captured == pytest.approx(error, abs=1e-5 * len(ids))
    if carried >= len(ids):
        exact = torch.nn.functional.pad(torch.linalg.svdvals(rows_ND), (0, len(ids)))[: len(r_KD)]
        assert np.allclose(record.singular_values, exact, atol=1e-5)


@pytest.mark.parametrize("oversampling", [0, 3, None])
@pytest.mark.parametrize("shrink", ["none", "frequent_directions"])
def test_the_root_shows_what_the_merge_in_memory_shows(store, shrink, oversampling):
    names, rows_ND = leaves_of(store, [12, 9, 20, 4, 15], 6, shrink=shrink, oversampling=oversampling)
    root = merge_tree(names)
    make_all(store, root)
    sketch = in_memory(store, root)
    u_NK, r_KD, _ = assembled(store, root)
    record = open_sketch(store, ROOT).record
    assert r_KD.shape == (6, WIDTH)
    assert torch.allclose(r_KD.float(), sketch.rows, atol=1e-5)
    assert torch.allclose(u_NK, sketch.coordinates, atol=1e-5)
    assert np.allclose(record.singular_values, sketch.singular_values, rtol=1e-6)
    assert (record.energy_total, record.energy_captured) == pytest.approx(tuple(sketch.energy), rel=1e-6)
    assert record.shrunk == pytest.approx(sketch.shrunk, rel=1e-6)
    assert torch.allclose(u_NK.T @ rows_ND, r_KD, atol=1e-5)
    assert open_sketch(store, ROOT).tensors(TURN).keys() == {"directions"}
    # Below it, every node carries all.
    for node in root.children:
        rows = min(sketch.carried, open_sketch(store, node.folder).record.examples)
        assert open_sketch(store, node.folder).record.rows == rows


def test_a_tree_captures_more_with_rows_beside_those_shown(store):
    captured = {}
    for oversampling in (0, None):
        names, rows_ND = leaves_of(store, [40] * 8, 6, oversampling=oversampling)
        root = merge_tree(names)
        make_all(store, root)
        captured[oversampling] = open_sketch(store, ROOT).record.energy_captured
    best = float(torch.linalg.svdvals(rows_ND)[:6].square().sum())
    assert captured[0] < 0.95 * best
    assert best - captured[None] < 0.6 * (best - captured[0])


def test_equal_files_give_equal_bytes(tmp_path):
    contents = []
    for place in ("a", "b"):
        store = RunDirectory(tmp_path / place)
        names, _ = leaves_of(store, [12, 9, 7], 6, shrink="frequent_directions")
        make_all(store, merge_tree(names))
        files = {name: store.read_bytes(f"sketch/{name}") for name in store.sizes("sketch")}
        contents.append(files)
    assert contents[0] == contents[1]
    assert len(contents[0]) == 5 * 15


@pytest.mark.parametrize("shrink", ["none", "frequent_directions"])
def test_a_saved_merge_is_the_merge_in_memory(store, shrink):
    names, _ = leaves_of(store, [12, 9], 6, shrink=shrink)
    # No root, and so with all rows that are carried.
    root = merge_tree(names, folder=BASIS)
    record = merge_saved(store, root)
    sketches = []
    for index, count in enumerate([12, 9]):
        sketch = OnlineSVD(6, shrink)
        sketch.update(torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(index)), normalise=True)
        # As they were saved: turned, and rounded once more.
        assert sketch.carried_rows.shape == (count, WIDTH)
        sketches.append(sketch)
    sketches[0].merge(sketches[1])
    u_NK, r_KD, _ = assembled(store, root)
    assert record.rows == 12
    # The saved one takes the rows of each child to be orthogonal, which they are to the rounding of float32.
    assert torch.allclose(r_KD.float(), sketches[0].carried_rows, atol=2e-6)
    assert torch.allclose(u_NK, sketches[0].carried_coordinates, atol=1e-6)
    assert record.energy_captured == pytest.approx(sketches[0].energy.captured)
    assert record.shrunk == pytest.approx(sketches[0].shrunk)
    assert (record.shrunk > 0) == (shrink != "none")
    if shrink != "none":
        weights = open_sketch(store, root.folder).tensors(TURN)["weights"]
        assert torch.allclose(weights, sketches[0].weights, atol=1e-6)


def test_how_the_work_is_cut_does_not_change_a_bit(store, tmp_path, monkeypatch):
    names, _ = leaves_of(store, [12, 9], 6)
    root = merge_tree(names)
    monkeypatch.setattr(merging, "PART_BLOCKS", 3)
    merge_saved(store, root)
    expected = {name: store.read_bytes(f"{ROOT}/{name}") for name in store.sizes(ROOT)}
    assert len(expected) == 13 + 2
    store.delete(ROOT)
    parts = range(len(parts_of(open_sketch(store, root.children[0].folder).record)))
    assert len(parts) == 5
    # In any order, and twice, as by processes that are tried again.
    grams = {part: part_gram(store, root, part) for part in reversed(parts)}
    record = solve(store, root, [grams[part] for part in parts])
    files = {part: turn(store, root, record, part) for part in [3, *reversed(parts)]}
    assert not is_complete(store, ROOT, root.name)
    commit(store, root, record, [files[part] for part in parts])
    assert {name: store.read_bytes(f"{ROOT}/{name}") for name in store.sizes(ROOT)} == expected


def test_directions_that_are_not_the_record_s_turn_nothing(store):
    names, _ = leaves_of(store, [12, 9, 7], 6)
    root = merge_tree(names)
    left = root.children[0]
    grams = [part_gram(store, left, part) for part in range(2)]
    record = solve(store, left, grams)
    turn(store, left, record, 0)
    solve(store, left, grams[:1])
    with pytest.raises(SketchError, match=TURN):
        turn(store, left, record, 0)


def test_a_refinement_along_the_tree_is_that_of_all_rows(store):
    counts, rank = [12, 9, 7], 6
    names, rows_ND = leaves_of(store, counts, rank)
    first = merge_tree(names, folder=BASIS)
    make_all(store, first)
    basis = open_sketch(store, BASIS).rows()
    again = [f"{index:05d}.again" for index in range(3)]
    parts = rows_ND.float().split(counts)
    for index, (name, part) in enumerate(zip(again, parts, strict=True)):
        refinement = Refinement(basis)
        refinement.update(part, normalise=True)
        ids = [f"{index}-{i}" for i in range(len(part))]
        save_sums(store, f"sketch/shards/{name}", refinement, ids, rank, BLOCK, name)
    root = refinement_tree(again)
    make_all(store, root)
    u_NK, r_KD, _ = assembled(store, root)
    record = open_sketch(store, ROOT).record
    sums = open_sketch(store, root.children[0].folder).record
    assert (len(basis), sums.kind, sums.rows, sums.energy_captured) == (2 * rank, "sums", 2 * rank, None)
    assert (record.kind, record.rank, record.rows, r_KD.shape) == ("svd", rank, rank, (rank, WIDTH))
    whole = Refinement(basis)
    whole.update(rows_ND.float(), normalise=True)
    values_R = refined_directions(gram([whole.sums]), whole.projections.T @ whole.projections, rank)[1]
    assert np.allclose(record.singular_values, values_R, rtol=1e-6)
    assert torch.allclose(u_NK.T @ u_NK, torch.eye(rank, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(u_NK.T @ rows_ND, r_KD, atol=1e-5)
    best = float(torch.linalg.svdvals(rows_ND)[:rank].square().sum())
    before = open_sketch(store, BASIS).record.energy_captured
    assert before < record.energy_captured <= best * (1 + 1e-6)


def test_a_second_pass_over_nothing_but_zeros_leaves_no_rows(store):
    for name in "ab":
        refinement = Refinement(torch.zeros(6, WIDTH))
        refinement.update(torch.zeros(4, WIDTH), normalise=True)
        save_sums(store, f"sketch/shards/{name}", refinement, [f"{name}{i}" for i in range(4)], 3, BLOCK, name)
    root = refinement_tree(["a", "b"])
    make_all(store, root)
    u_NK, r_KD, ids = assembled(store, root)
    assert (u_NK.shape, r_KD.shape, len(ids)) == ((8, 0), (0, WIDTH), 8)
    record = open_sketch(store, ROOT).record
    assert (record.singular_values, record.energy_captured) == ([], 0)
    found = describe_spectrum(record.singular_values, record.energy_total, u_NK.numpy(), np.zeros(8))
    assert (found["captured_share"], found["rank_for_share"]["0.5"]) == (1, {})


@pytest.mark.parametrize("at_once", [1, 2, 50])
def test_projections_come_in_the_order_of_the_coordinates(store, monkeypatch, at_once):
    monkeypatch.setattr(merging, "LEAVES_AT_ONCE", at_once)
    names, parts = [f"{index:05d}.leaf" for index in range(5)], []
    for index, name in enumerate(names):
        parts.append(torch.randn(index + 1, 7, generator=torch.Generator().manual_seed(index)))
        sketch, ids = OnlineSVD(3), [f"{index}-{i}" for i in range(index + 1)]
        sketch.update(torch.nn.functional.pad(parts[-1], (0, WIDTH - 7)))
        save_sketch(store, f"sketch/shards/{name}", sketch, ids, BLOCK, name, parts[-1])
    root = merge_tree(names, without=names[1:2])
    make_all(store, root)
    found = list(projections_of(store, root))
    assert [ids for ids, _ in found] == [shard.ids for shard in coordinates_of(store, root)]
    assert torch.equal(torch.cat([part for _, part in found]), torch.cat([parts[0], *parts[2:]]))
    lacking, _ = leaves_of(store, [3, 2], 3)
    with pytest.raises(SketchError, match=r"00000\.leaf/coordinates.safetensors holds no projection"):
        list(projections_of(store, merge_tree(lacking)))


def test_bfloat16_rows_hold_to_their_precision(store):
    names, _ = leaves_of(store, [12, 9], 30, dtype=torch.bfloat16)
    record = merge_saved(store, merge_tree(names))
    assert record.dtype == "bfloat16"
    assert record.energy_captured == pytest.approx(record.energy_total, rel=3e-3)


def test_sketches_that_do_not_fit_are_refused(store):
    leaves_of(store, [12], 6)
    other = OnlineSVD(6, dtype=torch.bfloat16)
    other.update(torch.randn(3, WIDTH))
    save_sketch(store, "sketch/shards/x", other, ["a", "b", "c"], BLOCK, "x")
    with pytest.raises(SketchError, match="dtype is float32 and bfloat16"):
        merge_saved(store, merge_tree(["00000.leaf", "x"]))
    with pytest.raises(SketchError, match=f"y/{RECORD} is missing"):
        merge_saved(store, merge_tree(["00000.leaf", "y"]))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 13])
def test_the_tree_covers_its_leaves_in_order(count):
    leaves = [f"leaf-{index}" for index in range(count)]
    root = merge_tree(leaves)
    assert [leaf.name for leaf in root.leaves] == leaves
    made = missing(root, lambda node: False, lambda node: False)
    assert sum(not node.children for node in made) == count
    assert made[-1] == root
    assert root.folder == ROOT
    assert len({node.folder for node in made}) == len(made)
    assert merge_tree(leaves) == root
    assert merge_tree([*leaves, "more"]).name != root.name
    refined = refinement_tree(leaves)
    assert [leaf.name for leaf in refined.leaves] == leaves
    assert (refined.folder, refined.method) == (ROOT, "refine")
    assert not {node.name for node in missing(refined, lambda _: False, lambda _: False) if node.children} & {
        node.name for node in made
    }


def test_leaves_that_are_left_out_change_only_what_is_above_them():
    leaves = [f"leaf-{index}" for index in range(8)]
    whole, without = merge_tree(leaves), merge_tree(leaves, without=["leaf-5"])
    assert [leaf.name for leaf in without.leaves] == [leaf for leaf in leaves if leaf != "leaf-5"]
    assert without.children[0] == whole.children[0]
    assert without.children[1].children[1] == whole.children[1].children[1]
    assert without.children[1].children[0].name == "leaf-4"
    lone = merge_tree(leaves, without=leaves[1:])
    assert [child.name for child in lone.children] == ["leaf-0"]
    with pytest.raises(ValueError, match="no sketches"):
        merge_tree(leaves, without=leaves)
    with pytest.raises(ValueError, match="no sketches"):
        merge_tree([])


def test_nothing_is_asked_for_twice():
    root = merge_tree(["a", "b", "c", "d", "e"])
    pair, other = root.children[0].children
    merged = {pair.name, "a", "b", "e"}
    # The rows of a and b have gone, and nobody needs them.
    made = missing(root, lambda node: node.name in merged, lambda node: node.name not in ("a", "b"))
    assert [node.name for node in made] == ["c", "d", other.name, root.children[0].name, root.name]
    assert {node.name for node in to_read(made)} == {pair.name, "e"}
    # The pair is lost: its leaves are needed again, with their rows.
    made = missing(root, lambda node: node.name in merged - {pair.name}, lambda node: node.name not in ("a", "b"))
    assert [node.name for node in made][:3] == ["a", "b", pair.name]
    # What is small of a merged leaf is lost: the leaf is made again, and nothing above it.
    everything = {node.name for node in missing(root, lambda _: False, lambda _: False)}
    made = missing(root, lambda node: node.name in everything - {"b"}, lambda node: node.name == root.name)
    assert [node.name for node in made] == ["b"]
