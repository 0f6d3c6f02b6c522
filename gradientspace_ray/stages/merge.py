"""The sketches of shards into one: a fixed binary tree of Ray tasks, every node a checkpoint in the run directory.

Two siblings are merged as soon as both are committed, while other shards are still being made, and their rows are
removed; so no more is stored than a sketch for each level of the tree and for each worker.
"""

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

import ray

from gradientspace_ray.errors import one_line
from gradientspace_ray.recipe import Recipe
from gradientspace_ray.run import RunDirectory, RunError
from gradientspace_ray.sketch.columns import (
    SavedFile,
    SketchError,
    SketchRecord,
    is_committed,
    is_complete,
    open_sketch,
)
from gradientspace_ray.sketch.merging import commit, part_gram, parts_of, solve, turn
from gradientspace_ray.sketch.survey import SavedSketches
from gradientspace_ray.sketch.tree import (
    BASIS,
    LEAVES,
    QUARANTINE,
    ROOT,
    Node,
    merge_tree,
    refinement_tree,
    to_read,
)
from gradientspace_ray.stages.progress import DEATHS, MERGE_SHARE, counted
from gradientspace_ray.stages.repair import repair

LINES = {False: "shards", True: "second pass, shards"}
"""Of the progress, by whether a pass is the refining one."""
INTERVAL_S = 0.05
CANCEL_PATIENCE_S = 10.0


def tree(recipe: Recipe, run: RunDirectory, leaves: Sequence[str], refining: bool) -> Node:
    """The tree over the shards of a pass; those that failed are left out, where the recipe says so.

    Raises:
        RunError: all shards have failed.
    """
    without = quarantined(run, leaves) if recipe.gradients.on_bad_shard == "skip" else set()
    if len(without) == len(leaves):
        raise RunError(f"all {len(leaves)} shards have failed; {run.path(QUARANTINE)} says why")
    if refining:
        return refinement_tree(leaves, without)
    return merge_tree(leaves, without, BASIS if recipe.sketch.refine else ROOT)


def quarantined(run: RunDirectory, leaves: Collection[str]) -> set[str]:
    """Which of the shards have failed, and were not made since."""
    failed = {name.removesuffix(".json") for name in run.names(QUARANTINE)} & set(leaves)
    return {name for name in failed if not is_committed(run, f"{LEAVES}/{name}", name)}


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
    goes, failure = recipe.compute.retries + 2, None
    for index in range(goes + 1):
        root = tree(recipe, run, leaves, refining)
        # What this driver has seen being written is read, and checked, when it is used.
        made, saved = repair(recipe, run, board, root, check_all=not index)
        if not made:
            return root
        if index < goes:
            merging = _Merging(recipe, run, board, made, saved, len(leaves), LINES[refining])
            merging.run(extract)
            failure = merging.failure or failure
    reason = one_line(failure) if failure else "sketches that were written are missing"
    raise RunError(f"{run.path('sketch')} could not be merged in {goes} tries: {reason}") from failure


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
        self._waiting = {node.name: {need.name for need in _needs(node)} & {*self._made} for node in made}
        self._needed_by: dict[str, list[Node]] = defaultdict(list)
        for node in made:
            for name in self._waiting[node.name]:
                self._needed_by[name].append(node)
        self._ready = deque(node for node in made if node.children and not self._waiting[node.name])
        self._arriving: SimpleQueue[str | None] = SimpleQueue()
        self._stopped = threading.Event()
        # The last task of a merge -> (its node, all its tasks).
        self._pending: dict[Any, tuple[Node, list[Any]]] = {}
        self._shards_there = shards - sum(not node.children for node in made)
        # Of the sketches that are merged into no other yet.
        self._records = {node.name: saved.record(node) for node in to_read(made)}
        self.failure: Exception | None = None
        """The last one."""
        board.begin.remote(line, self._shards_there, shards)

    def run(self, extract: Callable[[Collection[str]], Iterator[str]]) -> None:
        """Make them all, but for what is damaged or fails, and what is above it: the next go sees to that."""
        leaves = {node.name for node in self._made.values() if not node.children}
        # Ray Data stops when the thread that iterates is interrupted, which can only be the main one.
        with ThreadPoolExecutor(1) as pool:
            try:
                scheduling = pool.submit(self._schedule)
                for name in extract(leaves) if leaves else ():
                    self._arriving.put(name)
                self._arriving.put(None)
                scheduling.result()
            finally:
                self._stopped.set()

    def _schedule(self) -> None:
        more = True
        while not self._stopped.is_set() and (more or self._ready or self._pending):
            while self._ready and len(self._pending) < self._recipe.gradients.workers:
                self._submit(self._ready.popleft())
            more = more and self._take()
            self._collect()
            self._board.owe.remote(len(self._ready) + len(self._pending))
        # What goes on alone would be in the way of who comes next.
        tasks = [task for _, tasks in self._pending.values() for task in tasks]
        for task in tasks:
            ray.cancel(task)
        if tasks:
            ray.wait(tasks, num_returns=len(tasks), timeout=CANCEL_PATIENCE_S)

    def _take(self) -> bool:
        """Take note of the next shard, if there is one; False when no more will come."""
        with suppress(Empty):
            name = self._arriving.get(timeout=INTERVAL_S)
            if name is None:
                return False
            self._shards_there += 1
            try:
                self._note(self._made[name], open_sketch(self._run, self._made[name].folder).record)
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
        done = _commit.options(**options).remote(*place, record, *turned)
        self._pending[done] = node, [*grams, record, *turned, done]

    def _collect(self) -> None:
        """Take note of the merges that are done."""
        if not self._pending:
            return
        finished, _ = ray.wait(list(self._pending), timeout=INTERVAL_S)
        for task in finished:
            node, _ = self._pending.pop(task)
            try:
                self._note(node, ray.get(task))
            except ray.exceptions.RayError as error:
                self.failure = error

    def _note(self, node: Node, record: SketchRecord) -> None:
        """A node is there: the last one that another waits for makes that one ready."""
        for child in node.children:
            self._records.pop(child.name, None)
        self._records[node.name] = record
        for above in self._needed_by[node.name]:
            self._waiting[above.name].discard(node.name)
            if not self._waiting[above.name]:
                self._ready.append(above)
        records = [record for record in self._records.values() if record.energy_captured is not None]
        total = sum(record.energy_total for record in records)
        captured = sum(record.energy_captured or 0.0 for record in records)
        note = f"{captured / total:.0%} of the energy kept" if total else ""
        self._board.report.remote(self._line, self._shards_there, self._shards, note)


def _needs(node: Node) -> Sequence[Node]:
    """What must be there to make a node: a refinement reads the projections of all its leaves."""
    return (*node.children, *node.leaves) if node.method == "refine" else node.children


@ray.remote
def _gram(run_uri: str, board: Any, node: Node, part: int) -> Any:
    """None where the node is there: its children's rows have gone, and nobody needs them."""
    run = RunDirectory(run_uri)
    with counted(board):
        return None if is_complete(run, node.folder, node.name) else part_gram(run, node, part)


@ray.remote
def _solve(run_uri: str, board: Any, node: Node, *grams: Any) -> SketchRecord:
    run = RunDirectory(run_uri)
    if is_complete(run, node.folder, node.name):
        return open_sketch(run, node.folder).record
    with counted(board):
        return solve(run, node, grams)


@ray.remote
def _turn(run_uri: str, board: Any, node: Node, part: int, record: SketchRecord) -> dict[str, SavedFile]:
    run = RunDirectory(run_uri)
    with counted(board):
        return {} if is_complete(run, node.folder, node.name) else turn(run, node, record, part)


@ray.remote
def _commit(run_uri: str, board: Any, node: Node, record: SketchRecord, *parts: dict[str, SavedFile]) -> SketchRecord:
    """Commit the node, and remove its children's rows."""
    run = RunDirectory(run_uri)
    with counted(board):
        if is_complete(run, node.folder, node.name):
            record = open_sketch(run, node.folder).record
        else:
            record = commit(run, node, record, parts)
            board.count.remote(merges=1)
        children = [open_sketch(run, child.folder) for child in node.children]
        run.delete(*(f"{child.folder}/{block}" for child in children for block in child.record.blocks))
    return record
