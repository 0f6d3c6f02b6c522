"""Sketches on disk: what is read back, merged block by block, or refused."""

import json
import shutil

import pytest
import torch
from pyarrow import fs

from gradientspace_ray.sketch.columns import (
    COORDINATES,
    SketchError,
    check_sketch,
    copy_saved,
    is_complete,
    load_sketch,
    merge_saved,
    read_record,
    save_sketch,
)
from gradientspace_ray.sketch.online_svd import OnlineSVD
from gradientspace_ray.sketch.tree import merge_tree, missing, to_read

WIDTH, BLOCK = 50, 16


def saved(folder, seed, count=12, rank=6, dtype="float32", prefix="", **options):
    folder.mkdir()
    rows_ND = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))
    sketch = OnlineSVD(rank)
    sketch.update(rows_ND, normalise=True)
    save_sketch(folder, sketch, [f"{prefix}{seed}-{i}" for i in range(count)], dtype, BLOCK, **options)
    return sketch


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0), ("bfloat16", 2**-8)])
def test_load_gives_back_what_was_saved(tmp_path, dtype, tolerance):
    sketch = saved(tmp_path / "a", 0, dtype=dtype)
    loaded, ids = load_sketch(tmp_path / "a")
    assert ids == [f"0-{i}" for i in range(12)]
    assert torch.allclose(loaded.rows, sketch.rows, atol=0, rtol=tolerance)
    assert torch.equal(loaded.coordinates, sketch.coordinates)
    assert torch.equal(loaded.singular_values, sketch.singular_values)
    assert loaded.energy == sketch.energy
    assert len(read_record(tmp_path / "a").blocks) == 4


def test_a_loaded_sketch_goes_on(tmp_path):
    sketch = saved(tmp_path / "a", 0)
    loaded, _ = load_sketch(tmp_path / "a")
    more = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(9))
    sketch.update(more)
    loaded.update(more)
    assert torch.equal(sketch.rows, loaded.rows)


@pytest.mark.parametrize("rank", [3, 6, 40])
def test_streamed_merge_is_the_svd_of_the_stacked_rows(tmp_path, rank):
    first, second = saved(tmp_path / "a", 0, count=12), saved(tmp_path / "b", 1, count=4)
    (tmp_path / "out").mkdir()
    record = merge_saved(tmp_path / "a", tmp_path / "b", tmp_path / "out", rank, name="ab")
    merged, ids = load_sketch(tmp_path / "out")
    assert ids == [f"0-{i}" for i in range(12)] + [f"1-{i}" for i in range(4)]
    assert record.name == "ab"
    u_SK, values_K, v_KD = torch.linalg.svd(torch.cat([first.rows, second.rows]).double(), full_matrices=False)
    assert torch.allclose(merged.singular_values, values_K[:rank], atol=1e-6)
    stacked = torch.block_diag(first.coordinates, second.coordinates)
    expected = stacked @ u_SK[:, :rank] * values_K[:rank] @ v_KD[:rank]
    assert torch.allclose(merged.coordinates @ merged.rows.double(), expected, atol=1e-6)
    assert merged.energy.total == first.energy.total + second.energy.total
    assert merged.energy.captured == pytest.approx(float(values_K[:rank].square().sum()))


@pytest.mark.parametrize("rank", [6, 9])
def test_streamed_merge_is_the_merge_in_memory(tmp_path, rank):
    first, second = saved(tmp_path / "a", 0, rank=rank), saved(tmp_path / "b", 1, rank=rank)
    (tmp_path / "out").mkdir()
    merge_saved(tmp_path / "a", tmp_path / "b", tmp_path / "out", rank)
    first.merge(second)
    streamed, _ = load_sketch(tmp_path / "out")
    assert torch.allclose(streamed.rows, first.rows, atol=1e-6)
    assert torch.allclose(streamed.coordinates, first.coordinates, atol=1e-9)


def test_merge_of_bfloat16_sketches_holds_to_its_precision(tmp_path):
    first = saved(tmp_path / "a", 0, rank=30, dtype="bfloat16")
    saved(tmp_path / "b", 1, rank=30, dtype="bfloat16")
    (tmp_path / "out").mkdir()
    record = merge_saved(tmp_path / "a", tmp_path / "b", tmp_path / "out", 30)
    assert record.dtype == "bfloat16"
    assert record.energy_total == pytest.approx(first.energy.total * 2)
    assert record.energy_captured == pytest.approx(record.energy_total, rel=3e-3)


def test_equal_sketches_give_equal_bytes(tmp_path):
    saved(tmp_path / "a", 0)
    saved(tmp_path / "b", 0)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


def alter(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("name", ["block-00002.safetensors", COORDINATES, "sketch.json"])
@pytest.mark.parametrize("damage", [truncate, alter, lambda path: path.unlink()])
def test_damage_is_found_and_named(tmp_path, name, damage):
    saved(tmp_path / "a", 0)
    saved(tmp_path / "b", 1)
    (tmp_path / "out").mkdir()
    if name == "sketch.json" and damage is alter:
        (tmp_path / "b" / name).write_text(json.dumps({"rank": 1}))
    else:
        damage(tmp_path / "b" / name)
    for act in (
        lambda: load_sketch(tmp_path / "b"),
        lambda: check_sketch(tmp_path / "b"),
        lambda: merge_saved(tmp_path / "a", tmp_path / "b", tmp_path / "out", 6),
    ):
        with pytest.raises(SketchError) as caught:
            act()
        assert str(tmp_path / "b" / name) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_sketches_that_do_not_fit_are_refused(tmp_path):
    saved(tmp_path / "a", 0)
    saved(tmp_path / "b", 1, dtype="bfloat16")
    (tmp_path / "out").mkdir()
    with pytest.raises(SketchError, match="dtype is float32 and bfloat16"):
        merge_saved(tmp_path / "a", tmp_path / "b", tmp_path / "out", 6)
    with pytest.raises(SketchError, match="both hold example 0-0"):
        merge_saved(tmp_path / "a", tmp_path / "a", tmp_path / "out", 6)
    with pytest.raises(ValueError, match="cannot be saved with 1 ids"):
        save_sketch(tmp_path / "out", load_sketch(tmp_path / "a")[0], ["x"])


def test_completeness_is_seen_without_reading(tmp_path):
    saved(tmp_path / "a", 0, name="zero")
    local = fs.LocalFileSystem()
    assert is_complete(local, str(tmp_path / "a"), "zero")
    assert not is_complete(local, str(tmp_path / "a"), "one")
    assert not is_complete(local, str(tmp_path / "b"), "zero")
    truncate(tmp_path / "a" / COORDINATES)
    assert not is_complete(local, str(tmp_path / "a"), "zero")


def test_a_copy_has_a_name_of_its_own(tmp_path):
    saved(tmp_path / "a", 0, name="leaf")
    (tmp_path / "out").mkdir()
    copy_saved(tmp_path / "a", tmp_path / "out", "root")
    assert check_sketch(tmp_path / "out").name == "root"
    shutil.rmtree(tmp_path / "a")
    assert load_sketch(tmp_path / "out")[1][0] == "0-0"


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 13])
def test_tree_covers_its_leaves_in_order(count):
    leaves = [f"leaf-{index}" for index in range(count)]
    root = merge_tree(leaves)
    assert list(root.leaves) == leaves
    made = list(missing(root, lambda node: False))
    assert sum(not node.children for node in made) == count
    assert made[-1] == root
    assert root.folder == "sketch/rows"
    assert len({node.folder for node in made}) == len(made)
    assert merge_tree(leaves) == root
    assert merge_tree([*leaves, "more"]).name != root.name


def test_tree_asks_for_nothing_under_what_is_there():
    root = merge_tree(["a", "b", "c", "d", "e"])
    left = root.children[0].children[0]
    there = {left.name, "e"}
    made = list(missing(root, lambda node: node.name in there))
    names = [node.name for node in made]
    assert {node.name for node in to_read(made)} == there
    assert names == ["c", "d", root.children[0].children[1].name, root.children[0].name, root.name]
    with pytest.raises(ValueError, match="no sketches"):
        merge_tree([])
