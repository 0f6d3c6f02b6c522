"""Partial sketches into one: a fixed binary tree of Ray tasks, every node a checkpoint in the run directory."""

import shutil
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from gradientspace_ray.recipe import Recipe
from gradientspace_ray.run import RunDirectory, RunError, Summary
from gradientspace_ray.sketch.columns import (
    RECORD,
    SketchRecord,
    copy_saved,
    is_complete,
    merge_saved,
    read_coordinates,
    read_record,
)
from gradientspace_ray.sketch.tree import LEAVES, MERGED, ROOT, Node, merge_tree, missing
from gradientspace_ray.stages.progress import watched_board

LINE = "merge"
PLAN = "sketch/plan.json"


def merge(recipe: Recipe, run: RunDirectory) -> Summary:
    """Merge the sketches of the plan's shards, and write the coordinates of all examples and the spectrum.

    Inputs are removed as soon as their parent is committed, so no more than the sketches of one level, and those being
    made, are stored at once.

    Raises:
        RunError: a shard's sketch is missing.
    """
    root = merge_tree(run.read_json(PLAN)["leaves"])
    made = list(missing(root, lambda node: is_complete(run.filesystem, run.path(node.folder), node.name)))
    lost = [node.folder for node in made if not node.children]
    if lost:
        raise RunError(f"{run.path(lost[0])} is missing or not whole; run the gradients stage again")
    if made:
        _run_tree(recipe, run, made)
    record = _write_results(run)
    for folder in (LEAVES, MERGED):
        run.delete(folder)
    share, kept = record.energy.share, len(record.singular_values)
    made_line = f"{len(record.ids)} gradients of {record.dimension:,} numbers"
    return Summary(
        made=f"{made_line}; {kept} directions hold {share:.0%} of their energy",
        counts={
            "sketch_examples": len(record.ids),
            "dimension": record.dimension,
            "sketch_rank": kept,
            "captured_share": round(share, 6),
            "merges": len(made),
        },
    )


def _run_tree(recipe: Recipe, run: RunDirectory, made: list[Node]) -> None:
    """One task a node; a task waits for its children's."""
    task = _merge_node.options(
        num_cpus=recipe.compute.cpus_per_worker,
        max_retries=recipe.compute.retries,
        retry_exceptions=[OSError],
    )
    running: dict[str, Any] = {}
    with watched_board() as board:
        for node in made:
            before = [running[child.name] for child in node.children if child.name in running]
            running[node.name] = task.remote(run.uri, node, recipe.sketch.rank, *before)
        pending = list(running.values())
        while pending:
            board.report.remote(LINE, len(made) - len(pending), len(made))
            finished, pending = ray.wait(pending)
            ray.get(finished)
        board.report.remote(LINE, len(made), len(made))


@ray.remote
def _merge_node(run_uri: str, node: Node, rank: int, *_before: None) -> None:
    """Commit one node of the tree and remove its children; nothing is made twice when it is tried again."""
    run = RunDirectory(run_uri)
    if not is_complete(run.filesystem, run.path(node.folder), node.name):
        inputs = [run.fetch(child.folder) for child in node.children]
        with run.staged(node.folder, last=RECORD) as folder:
            if len(inputs) == 2:
                merge_saved(inputs[0], inputs[1], folder, rank, node.name)
            else:
                copy_saved(inputs[0], folder, node.name)
        if not run.is_local:
            for copy in inputs:
                shutil.rmtree(copy)
    for child in node.children:
        run.delete(child.folder)


def _write_results(run: RunDirectory) -> SketchRecord:
    """`coordinates.parquet` and `spectrum.json`, out of the root's folder."""
    folder = run.fetch(ROOT)
    record = read_record(folder)
    u_NK, singular_values_K = read_coordinates(folder, record)
    coordinates_NK = (u_NK * singular_values_K).numpy().astype(np.float32)
    rows = pa.FixedSizeListArray.from_arrays(coordinates_NK.ravel(), coordinates_NK.shape[1])
    table = pa.table({"id": record.ids, "coordinates": rows.cast(pa.list_(pa.float32()))})
    run.write_table("sketch/coordinates.parquet", table)
    run.write_json(
        "sketch/spectrum.json",
        {
            "rank": record.rank,
            "dimension": record.dimension,
            "examples": len(record.ids),
            "singular_values": record.singular_values,
            "energy_total": record.energy_total,
            "energy_captured": record.energy_captured,
            "captured_share": record.energy.share,
        },
    )
    return record
