"""What stands of a tree of sketches, compared with its checksums before it is built on."""

from collections.abc import Sequence
from typing import Any

import ray

from gradientspace_ray.recipe import Recipe
from gradientspace_ray.run import RunDirectory
from gradientspace_ray.sketch.columns import SketchError, open_sketch
from gradientspace_ray.sketch.survey import SavedSketches, small_files
from gradientspace_ray.sketch.tree import Node, missing, to_read
from gradientspace_ray.stages.progress import DEATHS, MERGE_SHARE

SMALL_FILES_PER_TASK = 64


def repair(
    recipe: Recipe, run: RunDirectory, board: Any, root: Node, check_all: bool
) -> tuple[list[Node], SavedSketches]:
    """Delete what stands of the tree and cannot be used; returns the nodes that must be made, and what stands.

    Args:
        recipe: the run's.
        run: the run directory.
        board: counts what is damaged, and shows the first file.
        root: of the tree.
        check_all: compare what stands with its checksums even where nothing must be made.
    """
    saved = SavedSketches(run)
    made = missing(root, saved.has_record, saved.has_rows)
    there = saved.of(root)
    damage: dict[str, str] = {}
    if there and (made or check_all):
        read = {node.name for node in to_read(made)} | {root.name}
        jobs = [[(node.folder, saved.record(node).blocks)] for node in there if node.name in read]
        small = [(node.folder, small_files(saved.record(node))) for node in there]
        jobs += [small[start : start + SMALL_FILES_PER_TASK] for start in range(0, len(small), SMALL_FILES_PER_TASK)]
        task = _damage.options(num_cpus=MERGE_SHARE * recipe.compute.cpus_per_worker, max_retries=DEATHS)
        for found in ray.get([task.remote(run.uri, job) for job in jobs]):
            damage |= found
        run.delete(*damage)
        saved = SavedSketches(run)
        made = missing(root, saved.has_record, saved.has_rows)
    damage |= {node.folder: f"{node.folder}: files are missing, or cut off" for node in made if saved.is_torn(node)}
    if damage:
        board.count.remote(damaged=len(damage))
        board.report.remote("damaged", len(damage), len(damage), next(iter(damage.values())))
    # Of another tree, damaged, or merged once and needed again: it must not be taken for finished.
    run.delete(*(node.folder for node in made if saved.is_committed(node) or node is root))
    return made, saved


@ray.remote
def _damage(run_uri: str, job: Sequence[tuple[str, Sequence[str]]]) -> dict[str, str]:
    """Folders of the sketches of which a file is not what was written, and why."""
    run = RunDirectory(run_uri)
    damage: dict[str, str] = {}
    for folder, files in job:
        try:
            open_sketch(run, folder).check(files)
        except SketchError as error:
            damage[folder] = str(error).partition(";")[0]
    return damage
