"""The sketches of shards into one: a fixed binary tree of Ray tasks, every node a checkpoint in the run directory.

Two siblings are merged as soon as both are committed, while other shards are still being made, and their rows are
removed; so no more is stored than a sketch for each level of the tree and for each worker.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from time import monotonic
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from gradientspace_ray.recipe import Recipe
from gradientspace_ray.run import RunDirectory, RunError, Summary, digest_of
from gradientspace_ray.sketch.columns import (
    RECORD,
    SavedFile,
    SketchError,
    SketchRecord,
    is_complete,
    open_sketch,
)
from gradientspace_ray.sketch.merging import commit, coordinates_of, part_gram, parts_of, solve, turn
from gradientspace_ray.sketch.spectrum import describe_spectrum
from gradientspace_ray.sketch.survey import SavedSketches, record_or_none, small_files
from gradientspace_ray.sketch.tree import (
    BASIS,
    LEAVES,
    MERGED,
    QUARANTINE,
    ROOT,
    Node,
    merge_tree,
    missing,
    refinement_tree,
    to_read,
)
from gradientspace_ray.stages.progress import MERGE_SHARE, counts_of

LINE = "shards"
SPECTRUM = "sketch/spectrum.json"
DEATHS = 20
"""Workers that may die of one task: one dies with every machine that is lost."""
SMALL_FILES_PER_TASK = 64


def tree(recipe: Recipe, run: RunDirectory, leaves: Sequence[str], refining: bool) -> Node:
    """The tree over the shards of a pass; those that failed are left out, where the recipe says so.

    Raises:
        RunError: all shards have failed.
    """
    without = {name.removesuffix(".json") for name in run.names(QUARANTINE)} & set(leaves)
    without = without if recipe.gradients.on_bad_shard == "skip" else set()
    if len(without) == len(leaves):
        raise RunError(f"all {len(leaves)} shards have failed; {run.path(QUARANTINE)} says why")
    if refining:
        return refinement_tree(leaves, without)
    return merge_tree(leaves, without, BASIS if recipe.sketch.refine else ROOT)


def merge(
    recipe: Recipe,
    run: RunDirectory,
    board: Any,
    leaves: Sequence[str],
    extract: Callable[[Collection[str]], Iterator[str]],
    refining: bool = False,
) -> Node:
    """Have the sketch of all shards: make what is missing of the tree, and return its root.

    Args:
        recipe: the run's.
        run: the run directory.
        board: where progress is reported.
        leaves: names of all shards of the pass, in order.
        extract: makes the sketches of the shards that it is given, and yields the name of each when it is committed.
        refining: whether these are sums for the sketch at `BASIS`.

    Raises:
        RunError: sketches were damaged again and again.
    """
    rounds = recipe.compute.retries + 2
    for _ in range(rounds):
        root = tree(recipe, run, leaves, refining)
        made = _prepare(recipe, run, board, root)
        if not made:
            return root
        _Merging(recipe, run, board, root, made, len(leaves)).run(extract)
    raise RunError(
        f"{run.path('sketch')}: sketches were damaged {rounds} times after they were written; check the disk"
    )


def finish(recipe: Recipe, run: RunDirectory, board: Any, leaves: Sequence[str], root: Node) -> None:
    """Write the coordinates of all examples and the spectrum.

    Args:
        recipe: the run's.
        run: the run directory.
        board: holds the times of the stage.
        leaves: names of all shards of the first pass.
        root: of the last tree, complete.

    Raises:
        RunError: there is nothing to keep.
    """
    with _counted(board):
        record = open_sketch(run, root.folder).record
        if not record.rows:
            raise RunError(f"all gradients are zero; look at the answers in {run.path('examples')}")
        ids: list[str] = []
        coordinates_NK = np.empty((record.examples, record.rows), dtype=np.float32)
        row_energies_N = np.empty(record.examples)
        for shard in coordinates_of(run, root):
            rows = slice(len(ids), len(ids) + len(shard.ids))
            coordinates_NK[rows] = shard.coordinates_NK.numpy() * record.singular_values
            row_energies_N[rows] = shard.row_energies_N.numpy()
            ids.extend(shard.ids)
        column = pa.FixedSizeListArray.from_arrays(coordinates_NK.ravel(), record.rows).cast(pa.list_(pa.float32()))
        run.write_table("sketch/coordinates.parquet", pa.table({"id": ids, "coordinates": column}))
        facts = {"plan": _plan_digest(recipe, leaves), "rank": record.rank, "dimension": record.dimension}
        facts |= {"examples": len(ids), "shards": len(leaves), "shards_skipped": len(leaves) - len(root.leaves)}
        spectrum = describe_spectrum(record.singular_values, record.energy_total, coordinates_NK, row_energies_N)
        run.write_json(SPECTRUM, facts | spectrum)


def is_finished(recipe: Recipe, run: RunDirectory, leaves: Sequence[str]) -> bool:
    """Whether `finish` has been here with the same shards."""
    has_all = all(run.exists(name) for name in (SPECTRUM, "sketch/coordinates.parquet", f"{ROOT}/{RECORD}"))
    if not has_all:
        return False
    spectrum = run.read_json(SPECTRUM)
    bad = spectrum.get("shards_skipped") and recipe.gradients.on_bad_shard == "stop"
    return spectrum.get("plan") == _plan_digest(recipe, leaves) and not bad


def clear(run: RunDirectory, board: Any) -> Summary:
    """Remove what led to the sketch, and sum up the stage."""
    for folder in (LEAVES, MERGED, BASIS):
        run.delete(folder)
    spectrum = run.read_json(SPECTRUM)
    if not spectrum["shards_skipped"]:
        run.delete(QUARANTINE)
    run.sweep("sketch")
    return _summary(counts_of(board), spectrum)


def _plan_digest(recipe: Recipe, leaves: Sequence[str]) -> str:
    return digest_of([list(leaves), recipe.sketch.refine])


class _Merging:
    """One go at the nodes that are missing: merges are submitted as their children come."""

    def __init__(
        self, recipe: Recipe, run: RunDirectory, board: Any, root: Node, made: Sequence[Node], shards: int
    ) -> None:
        self._recipe, self._run, self._board, self._shards = recipe, run, board, shards
        self._saved = SavedSketches(run)
        self._made = {node.name: node for node in made}
        self._parents = {child.name: node for node in made for child in node.children}
        self._waiting = {
            node.name: {child.name for child in node.children if child.name in self._made} for node in made
        }
        self._tasks: dict[str, Any] = {}
        self._pending: dict[Any, Node] = {}
        self._shards_there = shards - sum(not node.children for node in made)
        # Energies of the sketches that are merged into no other yet.
        self._energies = {node.name: self._saved.record(node) for node in to_read(made) if self._saved.has_record(node)}

    def run(self, extract: Callable[[Collection[str]], Iterator[str]]) -> None:
        """Make them all, but for what is damaged or has failed: the next go sees to that."""
        for node in self._made.values():
            if node.children and not self._waiting[node.name] and node.name not in self._tasks:
                self._submit(node, self._saved.record(node.children[0]))
        leaves = {node.name for node in self._made.values() if not node.children}
        if leaves:
            for name in extract(leaves):
                self._shards_there += 1
                record = open_sketch(self._run, self._made[name].folder).record
                self._settle(self._made[name], record)
                self._came(name, record)
                self._collect(timeout_s=0)
        while self._pending:
            self._collect(timeout_s=None)

    def _came(self, name: str, record: SketchRecord) -> None:
        """A node is there, or will be when what is submitted is done: the last child of a parent brings that one."""
        parent = self._parents.get(name)
        if parent is None:
            return
        self._waiting[parent.name].discard(name)
        if not self._waiting[parent.name]:
            self._submit(parent, record)

    def _submit(self, node: Node, like: SketchRecord) -> None:
        """Grams of all parts -> directions -> the parts turned -> commit; each task waits for those before it."""
        options: dict[str, Any] = {
            "num_cpus": MERGE_SHARE * self._recipe.compute.cpus_per_worker,
            "max_retries": DEATHS,
        }
        options["scheduling_strategy"] = "SPREAD"
        self._board.owe.remote(node.name)
        place, parts = (self._run.uri, self._board, node), range(len(parts_of(like)))
        children = [self._tasks[child.name] for child in node.children if child.name in self._tasks]
        grams = [_gram.options(**options).remote(*place, part, *children) for part in parts]
        record = _solve.options(**options).remote(*place, *grams)
        turned = [_turn.options(**options).remote(*place, part, record) for part in parts]
        done = _commit.options(**options).remote(*place, record, *turned)
        self._tasks[node.name] = done
        self._pending[done] = node
        self._came(node.name, like)

    def _collect(self, timeout_s: float | None) -> None:
        """Take note of the merges that are done."""
        if not self._pending:
            return
        finished, _ = ray.wait(list(self._pending), timeout=timeout_s)
        for task in finished:
            node = self._pending.pop(task)
            try:
                self._settle(node, ray.get(task))
            except SketchError:
                # The next go finds what is damaged, and makes it again.
                continue

    def _settle(self, node: Node, record: SketchRecord) -> None:
        for child in node.children:
            self._energies.pop(child.name, None)
        self._energies[node.name] = record
        records = [record for record in self._energies.values() if record.energy_captured is not None]
        total = sum(record.energy_total for record in records)
        captured = sum(record.energy_captured or 0.0 for record in records)
        note = f"{captured / total:.0%} of the energy kept" if total else ""
        self._board.report.remote(LINE, self._shards_there, self._shards, note)


@ray.remote
def _gram(run_uri: str, board: Any, node: Node, part: int, *_children: SketchRecord) -> Any:
    """None where the node is there: its children's rows have gone, and nobody needs them."""
    run = RunDirectory(run_uri)
    with _counted(board):
        return None if is_complete(run, node.folder, node.name) else part_gram(run, node, part)


@ray.remote
def _solve(run_uri: str, board: Any, node: Node, *grams: Any) -> SketchRecord:
    run = RunDirectory(run_uri)
    if is_complete(run, node.folder, node.name):
        return open_sketch(run, node.folder).record
    if (before := record_or_none(run, node.folder)) and before.name != node.name:
        run.delete(node.folder)
    with _counted(board):
        return solve(run, node, grams)


@ray.remote
def _turn(run_uri: str, board: Any, node: Node, part: int, record: SketchRecord) -> dict[str, SavedFile]:
    run = RunDirectory(run_uri)
    with _counted(board):
        return {} if is_complete(run, node.folder, node.name) else turn(run, node, record, part)


@ray.remote
def _commit(run_uri: str, board: Any, node: Node, record: SketchRecord, *parts: dict[str, SavedFile]) -> SketchRecord:
    """Commit the node, and remove its children's rows."""
    run = RunDirectory(run_uri)
    with _counted(board):
        if is_complete(run, node.folder, node.name):
            record = open_sketch(run, node.folder).record
        else:
            record = commit(run, node, record, parts)
            board.count.remote(merges=1)
        for child in node.children:
            for block in open_sketch(run, child.folder).record.blocks:
                run.delete(f"{child.folder}/{block}")
        board.settle.remote(node.name)
    return record


@contextmanager
def _counted(board: Any) -> Iterator[None]:
    """Add the seconds of the block to the stage's totals."""
    started = monotonic()
    try:
        yield
    except SketchError:
        # What waits for this merge is not made in this go, and nobody may wait for it.
        board.settle.remote()
        raise
    seconds = monotonic() - started
    board.count.remote(merging_s=seconds, working_s=seconds)


def _prepare(recipe: Recipe, run: RunDirectory, board: Any, root: Node) -> list[Node]:
    """Compare what stands with its checksums, and delete what differs; returns the nodes that must be made."""
    saved = SavedSketches(run)
    made = missing(root, saved.has_record, saved.has_rows)
    if not made:
        return made
    read = {node.name for node in to_read(made)}
    there = saved.of(root)
    files = [(node.folder, saved.record(node).blocks) for node in there if node.name in read]
    jobs = [[job] for job in files]
    small = [(node.folder, small_files(saved.record(node))) for node in there]
    jobs += [small[start : start + SMALL_FILES_PER_TASK] for start in range(0, len(small), SMALL_FILES_PER_TASK)]
    task = _damaged.options(num_cpus=MERGE_SHARE * recipe.compute.cpus_per_worker, max_retries=DEATHS)
    damaged = {folder for found in ray.get([task.remote(run.uri, job) for job in jobs]) for folder in found}
    board.count.remote(damaged=len(damaged))
    for folder in damaged:
        run.delete(folder)
    saved = SavedSketches(run)
    made = missing(root, saved.has_record, saved.has_rows)
    for node in made:
        # Merged once, and needed again: it must not be taken for finished.
        if saved.has_record(node):
            run.delete(node.folder)
    return made


@ray.remote
def _damaged(run_uri: str, job: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """Folders of the sketches of which a file is not what was written."""
    run, damaged = RunDirectory(run_uri), []
    for folder, files in job:
        try:
            open_sketch(run, folder).check(files)
        except SketchError:
            damaged.append(folder)
    return damaged


def _summary(counts: dict[str, float], spectrum: dict[str, Any]) -> Summary:
    kept, share = len(spectrum["singular_values"]), spectrum["captured_share"]
    working_s = counts.get("working_s", 0.0)
    sketching_s = counts.get("sketching_s", 0.0) + counts.get("merging_s", 0.0)
    skipped = spectrum["shards_skipped"]
    made = [
        f"{spectrum['examples']} gradients of {spectrum['dimension']:,} numbers",
        f"{kept} directions hold {share:.0%} of their energy",
    ]
    if working_s:
        made.append(f"sketching took {sketching_s / working_s:.1%} of the work")
    if skipped:
        made.append(f"{skipped} of {spectrum['shards']} shards failed and were skipped, see {QUARANTINE}")
    return Summary(
        made="; ".join(made),
        counts={
            "sketch_examples": spectrum["examples"],
            "dimension": spectrum["dimension"],
            "sketch_rank": kept,
            "captured_share": round(share, 6),
            "shards": spectrum["shards"],
            "shards_made": int(counts.get("shards", 0)),
            "shards_skipped": skipped,
            "sketches_damaged": int(counts.get("damaged", 0)),
            "merges": int(counts.get("merges", 0)),
            "tokens": int(counts.get("tokens", 0)),
            "working_s": round(working_s, 2),
            "sketching_s": round(sketching_s, 2),
        },
    )
