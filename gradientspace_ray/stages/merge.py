"""The sketches of shards into one: a fixed binary tree of Ray tasks, every node a checkpoint in the run directory.

Two siblings are merged as soon as both are committed, while other shards are still being made, and their rows are
removed; so no more is stored than a sketch for each level of the tree and for each worker.
"""

import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from gradientspace_ray.errors import one_line
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
from gradientspace_ray.sketch.survey import SavedSketches
from gradientspace_ray.sketch.tree import (
    BASIS,
    LEAVES,
    MERGED,
    QUARANTINE,
    ROOT,
    Node,
    merge_tree,
    refinement_tree,
    to_read,
)
from gradientspace_ray.stages.progress import DEATHS, MERGE_SHARE, counts_of
from gradientspace_ray.stages.repair import repair

LINES = {False: "shards", True: "second pass, shards"}
"""Of the progress, by whether a pass is the refining one."""
SPECTRUM = "sketch/spectrum.json"
POLL_INTERVAL_S = 0.1


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
        RunError: merges failed, or sketches were damaged, again and again.
    """
    run.delete(SPECTRUM)
    rounds, failure = recipe.compute.retries + 2, None
    for index in range(rounds):
        root = tree(recipe, run, leaves, refining)
        # What this driver has seen being written is read, and checked, when it is used.
        made, saved = repair(recipe, run, board, root, check_all=not index)
        if not made:
            return root
        merging = _Merging(recipe, run, board, made, saved, len(leaves), LINES[refining])
        merging.run(extract)
        failure = merging.failure or failure
    reason = one_line(failure) if failure else "sketches that were written are missing"
    raise RunError(f"{run.path('sketch')} could not be merged in {rounds} tries: {reason}") from failure


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
        if not record.energy_total:
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
        facts = {
            "plan": _plan_digest(recipe, leaves),
            "root": root.name,
            "rank": record.rank,
            "dimension": record.dimension,
            "examples": len(ids),
            "shards": len(leaves),
            "shards_skipped": len(leaves) - len(root.leaves),
        }
        spectrum = describe_spectrum(record.singular_values, record.energy_total, coordinates_NK, row_energies_N)
        run.write_json(SPECTRUM, facts | spectrum)


def is_finished(recipe: Recipe, run: RunDirectory, leaves: Sequence[str]) -> bool:
    """Whether `finish` was here last, with the same shards; what goes on after it removes the spectrum first."""
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
    """One go at the nodes that are missing: two siblings are merged when both are there, `workers` pairs at a time."""

    def __init__(
        self,
        recipe: Recipe,
        run: RunDirectory,
        board: Any,
        made: Sequence[Node],
        saved: SavedSketches,
        shards: int,
        line: str,
    ) -> None:
        self._recipe, self._run, self._board, self._shards, self._line = recipe, run, board, shards, line
        self._made = {node.name: node for node in made}
        self._parents = {child.name: node for node in made for child in node.children}
        self._waiting = {node.name: {child.name for child in node.children} & {*self._made} for node in made}
        self._ready = deque(node for node in made if node.children and not self._waiting[node.name])
        self._pending: dict[Any, Node] = {}
        self._shards_there = shards - sum(not node.children for node in made)
        # Of the sketches that are merged into no other yet.
        self._records = {node.name: saved.record(node) for node in to_read(made)}
        self.failure: Exception | None = None
        """The last one."""

    def run(self, extract: Callable[[Collection[str]], Iterator[str]]) -> None:
        """Make them all, but for what is damaged or fails, and what is above it: the next go sees to that."""
        leaves = {node.name for node in self._made.values() if not node.children}
        arriving = _in_background(extract(leaves)) if leaves else None
        while arriving or self._ready or self._pending:
            while self._ready and len(self._pending) < self._recipe.gradients.workers:
                self._submit(self._ready.popleft())
            if arriving and not self._take(arriving):
                arriving = None
            self._collect(timeout_s=0 if arriving else None)
            self._board.owe.remote(len(self._ready) + len(self._pending))

    def _take(self, arriving: "SimpleQueue[str | Exception | None]") -> bool:
        """Take note of the next shard, if there is one; False when no more will come."""
        with suppress(Empty):
            found = arriving.get(timeout=POLL_INTERVAL_S)
            if isinstance(found, Exception):
                raise found
            if found is None:
                return False
            self._shards_there += 1
            try:
                self._note(self._made[found], open_sketch(self._run, self._made[found].folder).record)
            except SketchError as error:
                self.failure = error
        return True

    def _submit(self, node: Node) -> None:
        """Grams of all parts -> directions -> the parts turned -> commit; each task waits for those before it."""
        options: dict[str, Any] = {
            "num_cpus": MERGE_SHARE * self._recipe.compute.cpus_per_worker,
            "max_retries": DEATHS,
            "scheduling_strategy": "SPREAD",
        }
        place, parts = (self._run.uri, self._board, node), range(len(parts_of(self._records[node.children[0].name])))
        grams = [_gram.options(**options).remote(*place, part) for part in parts]
        record = _solve.options(**options).remote(*place, *grams)
        turned = [_turn.options(**options).remote(*place, part, record) for part in parts]
        self._pending[_commit.options(**options).remote(*place, record, *turned)] = node

    def _collect(self, timeout_s: float | None) -> None:
        """Take note of the merges that are done."""
        if not self._pending:
            return
        most = 1 if timeout_s is None else len(self._pending)
        finished, _ = ray.wait(list(self._pending), num_returns=most, timeout=timeout_s)
        for task in finished:
            node = self._pending.pop(task)
            try:
                self._note(node, ray.get(task))
            except ray.exceptions.RayError as error:
                self.failure = error

    def _note(self, node: Node, record: SketchRecord) -> None:
        """A node is there: the last child of a parent makes that one ready."""
        for child in node.children:
            self._records.pop(child.name, None)
        self._records[node.name] = record
        if parent := self._parents.get(node.name):
            self._waiting[parent.name].discard(node.name)
            if not self._waiting[parent.name]:
                self._ready.append(parent)
        records = [record for record in self._records.values() if record.energy_captured is not None]
        total = sum(record.energy_total for record in records)
        captured = sum(record.energy_captured or 0.0 for record in records)
        note = f"{captured / total:.0%} of the energy kept" if total else ""
        self._board.report.remote(self._line, self._shards_there, self._shards, note)


def _in_background(names: Iterator[str]) -> "SimpleQueue[str | Exception | None]":
    """What an iterator yields, as it comes, and then its error or None."""
    arriving: SimpleQueue[str | Exception | None] = SimpleQueue()

    def follow() -> None:
        try:
            for name in names:
                arriving.put(name)
            arriving.put(None)
        except Exception as error:  # noqa: BLE001 - raised where the queue is read
            arriving.put(error)

    threading.Thread(target=follow, name="shards", daemon=True).start()
    return arriving


@ray.remote
def _gram(run_uri: str, board: Any, node: Node, part: int) -> Any:
    """None where the node is there: its children's rows have gone, and nobody needs them."""
    run = RunDirectory(run_uri)
    with _counted(board):
        return None if is_complete(run, node.folder, node.name) else part_gram(run, node, part)


@ray.remote
def _solve(run_uri: str, board: Any, node: Node, *grams: Any) -> SketchRecord:
    run = RunDirectory(run_uri)
    if is_complete(run, node.folder, node.name):
        return open_sketch(run, node.folder).record
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
        children = [open_sketch(run, child.folder) for child in node.children]
        run.delete(*(f"{child.folder}/{block}" for child in children for block in child.record.blocks))
    return record


@contextmanager
def _counted(board: Any) -> Iterator[None]:
    """Add the seconds of the block to the stage's totals, and say that somebody merges."""
    started = monotonic()
    board.work.remote(1)
    try:
        yield
    finally:
        seconds = monotonic() - started
        board.work.remote(-1)
        board.count.remote(merging_s=seconds, working_s=seconds)


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
    damaged = int(counts.get("damaged", 0))
    if damaged:
        made.append(f"{damaged} damaged sketches were made again")
    return Summary(
        made="; ".join(made),
        # It names the shards, and with them all that decides the result.
        output=spectrum["root"],
        counts={
            "sketch_examples": spectrum["examples"],
            "dimension": spectrum["dimension"],
            "sketch_rank": kept,
            "captured_share": round(share, 6),
            "shards": spectrum["shards"],
            "shards_made": int(counts.get("shards", 0)),
            "shards_skipped": skipped,
            "sketches_damaged": damaged,
            "merges": int(counts.get("merges", 0)),
            "tokens": int(counts.get("tokens", 0)),
            "working_s": round(working_s, 2),
            "sketching_s": round(sketching_s, 2),
        },
    )
