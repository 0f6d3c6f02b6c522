"""Saved sketches into one, block by block: a node of the tree out of its children.

Every method is a linear map of the children's stacked rows S, R = W^T S, and of their coordinates, which are rotated by
the same W; it differs in W alone:

* `merge`, of sketches: the leading eigenvectors of S S^T, as in `OnlineSVD`.
* `sum`, of the sums of a second pass: the identity for each child.
* `refine`, of all sums: `refined_directions`.

The work is cut into parts of whole column blocks, which may be done at the same time by different processes: their
Gram matrices meet in `solve`, which saves W, and every part of the rows is then turned by it. A part holds one block of
each child in memory. How the columns are cut depends on D alone, so the result does not depend on who does what.

Shapes: N examples, K rows of a node, S rows of its children together.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from gradientspace_ray.sketch.columns import (
    CONNECTIONS,
    TURN,
    SavedFile,
    SavedSketch,
    SketchError,
    SketchRecord,
    Store,
    open_sketch,
    save_block,
    save_record,
)
from gradientspace_ray.sketch.directions import gram, products, rotate, shrunk_directions, top_directions
from gradientspace_ray.sketch.refinement import refined_directions
from gradientspace_ray.sketch.tree import ROOT, Node

PART_BLOCKS = 8
LEAVES_AT_ONCE = 4
"""Of which projections are read: these are large, where coordinates are small."""
MATCHING = ("kind", "dimension", "dtype", "block_columns", "shrink")


class Coordinates(NamedTuple):
    """Of one shard's examples in the sketch of all."""

    ids: list[str]
    coordinates_NK: torch.Tensor
    """U, float64."""
    row_energies_N: torch.Tensor
    """Squared norms of the rows that were sketched, float64."""


def open_children(store: Store, node: Node) -> list[SavedSketch]:
    """The sketches that a node is made of.

    Raises:
        SketchError: one is missing or not readable, or they do not fit together.
    """
    children = [open_sketch(store, child.folder) for child in node.children]
    for child in children[1:]:
        for key in MATCHING:
            values = [getattr(saved.record, key) for saved in (children[0], child)]
            if values[0] != values[1]:
                places = f"{children[0].folder} and {child.folder}"
                raise SketchError(f"{places} cannot be merged: {key} is {values[0]} and {values[1]}")
    return children


def parts_of(record: SketchRecord) -> list[list[str]]:
    """The blocks of the parts into which the work on such a sketch is cut."""
    return [record.blocks[start : start + PART_BLOCKS] for start in range(0, len(record.blocks), PART_BLOCKS)]


def part_gram(store: Store, node: Node, part: int) -> torch.Tensor:
    """A part's share of what `solve` needs of the rows' inner products, float64.

    For a merge, the products of one child's rows with the other's, [K, K']: those of a child's own are orthogonal, and
    their norms are its singular values. For a refinement, the Gram matrix of the sums, [K, K]. For a sum, nothing.

    Raises:
        SketchError: a child is missing or damaged.
    """
    children = open_children(store, node)
    blocks = parts_of(children[0].record)[part]
    if node.method == "sum" or (node.method == "merge" and len(children) == 1):
        for child in children:
            child.check(blocks)
        return torch.zeros(0, 0, dtype=torch.float64)
    if node.method == "refine":
        return sum_of([gram([children[0].block(block)]) for block in blocks])
    return sum_of([products(*(child.block(block) for child in children)) for block in blocks])


def solve(store: Store, node: Node, grams: Sequence[torch.Tensor]) -> SketchRecord:
    """Save the directions W of a node, and return its record without blocks; the root's are the leading `rank` ones.

    Args:
        store: where the sketches are.
        node: with children.
        grams: of all parts, in order.

    Raises:
        SketchError: a child is missing or damaged.
    """
    children = open_children(store, node)
    records = [child.record for child in children]
    like = records[0]
    carried = like.rank + like.oversampling
    shrunk, weights = sum(record.shrunk for record in records), {}
    singular_values_K = torch.zeros(0, dtype=torch.float64)
    if node.method == "sum":
        directions_SK = torch.eye(like.rows, dtype=torch.float64).repeat(len(records), 1)
    elif node.method == "refine":
        directions_SK, singular_values_K = refined_directions(sum_of(grams), _projections_gram(store, node), like.rank)
    elif like.shrink == "none":
        directions_SK, singular_values_K = top_directions(_stacked_gram(records, grams), carried)
    else:
        weights_SS = torch.block_diag(*(child.small()["weights"] for child in children))
        directions_SK, singular_values_K, weights_KK, delta = shrunk_directions(
            _stacked_gram(records, grams), carried, weights_SS
        )
        shrunk, weights = shrunk + delta, {"weights": weights_KK}
    if node.folder == ROOT:
        directions_SK, singular_values_K = directions_SK[:, : like.rank], singular_values_K[: like.rank]
        weights = {}
    changes = {
        "name": node.name,
        "kind": "sums" if node.method == "sum" else "svd",
        "rows": directions_SK.shape[1],
        "examples": sum(record.examples for record in records),
        "energy_total": sum(record.energy_total for record in records),
        "energy_captured": float(singular_values_K[: like.rank].square().sum()) if node.method != "sum" else None,
        "singular_values": singular_values_K.tolist(),
        "shrunk": shrunk,
        "ids": [],
        "files": {TURN: save_block(store, node.folder, TURN, {"directions": directions_SK, **weights})},
    }
    return like.model_copy(update=changes)


def turn(store: Store, node: Node, record: SketchRecord, part: int) -> dict[str, SavedFile]:
    """Write a part of the blocks of a node whose directions are saved.

    Raises:
        SketchError: a child is missing or damaged, or the directions are not those of `record`.
    """
    children = open_children(store, node)
    directions_SK = SavedSketch(store, node.folder, record).tensors(TURN)["directions"]
    dtype = getattr(torch, record.dtype)
    files = {}
    for block in parts_of(children[0].record)[part]:
        rows = rotate([child.block(block) for child in children], directions_SK)
        files[block] = save_block(store, node.folder, block, {"rows": rows.to(dtype)})
    return files


def commit(store: Store, node: Node, record: SketchRecord, parts: Sequence[dict[str, SavedFile]]) -> SketchRecord:
    """Commit a node whose blocks are written, all parts in order; returns the whole record."""
    blocks = {name: saved for part in parts for name, saved in part.items()}
    whole = record.model_copy(update={"files": blocks | record.files})
    save_record(store, node.folder, whole)
    return whole


def merge_saved(store: Store, node: Node) -> SketchRecord:
    """Make a node out of its children, one part after the other.

    Raises:
        SketchError: a child is missing or damaged, or they do not fit together.
    """
    parts = range(len(parts_of(open_children(store, node)[0].record)))
    record = solve(store, node, [part_gram(store, node, part) for part in parts])
    return commit(store, node, record, [turn(store, node, record, part) for part in parts])


def coordinates_of(store: Store, root: Node) -> Iterator[Coordinates]:
    """The examples of every leaf, in order, in the sketch of the root.

    Raises:
        SketchError: a file is missing, truncated or altered.
    """
    saved = open_sketch(store, root.folder)
    branches = [(root, torch.eye(saved.record.rows, dtype=torch.float64))]
    # An object store takes many requests at once: branches are walked side by side.
    while len(branches) < CONNECTIONS and any(node.children for node, _ in branches):
        branches = [below for node, turned_KR in branches for below in _below(store, node, turned_KR)]
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        for found in pool.map(lambda branch: list(_coordinates(store, *branch)), branches):
            yield from found


def projections_of(store: Store, root: Node) -> Iterator[tuple[list[str], torch.Tensor]]:
    """(ids, [N, P] float32) of every leaf, in the order of `coordinates_of`; a few leaves are in memory at once.

    Raises:
        SketchError: a file is missing, truncated or altered, or a leaf has no projection.
    """
    leaves = root.leaves
    with ThreadPoolExecutor(LEAVES_AT_ONCE) as pool:
        for start in range(0, len(leaves), LEAVES_AT_ONCE):
            found = [open_sketch(store, leaf.folder) for leaf in leaves[start : start + LEAVES_AT_ONCE]]
            projections = pool.map(SavedSketch.projection, found)
            yield from zip([saved.record.ids for saved in found], projections, strict=True)


def _coordinates(store: Store, node: Node, turned_KR: torch.Tensor) -> Iterator[Coordinates]:
    """`turned_KR` takes coordinates in the node's rows to those in the root's."""
    if not node.children:
        saved = open_sketch(store, node.folder)
        small = saved.small()
        yield Coordinates(saved.record.ids, small["coordinates"] @ turned_KR, small["row_energies"])
        return
    for below in _below(store, node, turned_KR):
        yield from _coordinates(store, *below)


def _below(store: Store, node: Node, turned_KR: torch.Tensor) -> list[tuple[Node, torch.Tensor]]:
    """The children of a node, each with what takes coordinates in its rows to those in the root's; a leaf as it is."""
    if not node.children:
        return [(node, turned_KR)]
    directions_SK = open_sketch(store, node.folder).small()["directions"]
    counts = [open_sketch(store, child.folder).record.rows for child in node.children]
    return [
        (child, part_SK @ turned_KR) for child, part_SK in zip(node.children, directions_SK.split(counts), strict=True)
    ]


def _stacked_gram(records: Sequence[SketchRecord], grams: Sequence[torch.Tensor]) -> torch.Tensor:
    """[S, S], out of the products of one child's rows with the other's."""
    squares_S = torch.tensor(
        [value for record in records for value in record.singular_values], dtype=torch.float64
    ).square()
    stacked_SS, kept = torch.diag(squares_S), records[0].rows
    if len(records) == 2:
        products_KK = sum_of(grams)
        stacked_SS[:kept, kept:], stacked_SS[kept:, :kept] = products_KK, products_KK.T
    return stacked_SS


def _projections_gram(store: Store, node: Node) -> torch.Tensor:
    """Y^T Y, summed over the leaves in order."""

    def of_leaf(leaf: Node) -> torch.Tensor:
        projections_NK = open_sketch(store, leaf.folder).small()["coordinates"]
        return projections_NK.T @ projections_NK

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        return sum_of(pool.map(of_leaf, node.leaves))


def sum_of(matrices: Iterable[torch.Tensor]) -> torch.Tensor:
    """The sum of equal shapes, in order."""
    return functools.reduce(torch.add, matrices)
