"""Progress that moves: bars on a terminal, a line now and then in a log, fed from this process or from Ray workers.

All stages may import it.
"""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LOG_INTERVAL_S = 10.0
POLL_INTERVAL_S = 0.5
MERGE_SHARE = 0.1
"""Of a worker's CPUs: what extraction leaves to the merges that go on meanwhile, and what one of them asks for."""
DEATHS = 20
"""Workers that may die of one task: one dies with every machine that is lost."""
MERGE_PATIENCE_S = 300.0
"""Merges of which no task begins or ends for so long find no free processor, and nothing waits for them."""


class Bars:
    """One line per task: `update` moves it. Safe to call from several threads."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._lock = threading.Lock()
        self._tasks: dict[str, Any] = {}
        self._printed: dict[str, tuple[float, float]] = {}
        self._first: dict[str, tuple[float, float]] = {}
        self._started = self._last_print = time.monotonic()
        self._progress = Progress(
            TextColumn("  {task.description:<24}", markup=False),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=self._console,
            transient=True,
        )

    def update(self, line: str, done: float, total: float, note: str = "") -> None:
        """Show that `done` of `total` units of `line` are finished; `note` stands behind the bar."""
        with self._lock:
            if self._console.is_terminal:
                if line not in self._tasks:
                    self._tasks[line] = self._progress.add_task(line, total=total, note=note)
                self._progress.update(self._tasks[line], completed=done, total=total, note=note)
            else:
                self._log(line, done, total, note)

    def _log(self, line: str, done: float, total: float, note: str) -> None:
        now = time.monotonic()
        last_time, last_done = self._printed.get(line, (0.0, -1.0))
        due = now - last_time >= LOG_INTERVAL_S and done > last_done
        finished = done >= total > last_done
        # Where nothing moves, as while models load, the seconds do.
        silent = done < total and now - self._last_print >= LOG_INTERVAL_S
        if due or finished or silent:
            self._printed[line] = (now, done)
            self._last_print = now
            clock = f"({now - self._started:.0f} s{self._left(line, done, total, now)})"
            text = f"  {line}: {done:g}/{total:g} {note} {clock}"
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _left(self, line: str, done: float, total: float, now: float) -> str:
        # What waits, loads, or begins anew says nothing about the speed.
        if done <= self._first.get(line, (now, done))[1]:
            self._first[line] = (now, done)
        first_time, first_done = self._first[line]
        if not first_done < done < total:
            return ""
        seconds = (total - done) * (now - first_time) / (done - first_done)
        return f", about {seconds:.0f} s left" if seconds < 100 else f", about {seconds / 60:.0f} min left"

    def __enter__(self) -> "Bars":
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


@ray.remote(num_cpus=0)
class Board:
    """Where workers leave their progress; `report.remote(line, done, total, note)`."""

    def __init__(self) -> None:
        self._lines: dict[str, tuple[float, str]] = {}
        self._parts: dict[str, dict[str, tuple[float, float]]] = {}
        self._since: dict[str, float] = {}
        self._counts: Counter[str] = Counter()
        self._owed = 0
        self._merged_at = time.monotonic()

    def begin(self, line: str, done: float, total: float) -> None:
        """Start a line anew, with what was done before."""
        self._parts[line] = {"": (done, 0.0)}
        self._lines[line] = (total, "")
        self._since[line] = time.monotonic()

    def report(self, line: str, done: float, total: float, note: str = "", part: str = "", tokens: float = 0.0) -> None:
        """Keep the latest state of a line, the sum of its parts; a retried worker never moves its part back."""
        parts = self._parts.setdefault(line, {})
        self._since.setdefault(line, time.monotonic())
        if (done, tokens) >= parts.get(part, (0.0, 0.0)):
            parts[part] = (done, tokens)
            self._lines[line] = (total, note)

    def count(self, **amounts: float) -> None:
        """Add to the totals that the stage reports at its end."""
        self._counts.update(amounts)

    def counts(self) -> dict[str, float]:
        """All totals."""
        return dict(self._counts)

    def owe(self, merges: int) -> None:
        """Keep how many merges are to be done."""
        if not self._owed:
            self.merging()
        self._owed = merges

    def merging(self) -> None:
        """Note that a task of a merge begins or ends."""
        self._merged_at = time.monotonic()

    def backlog(self) -> int:
        """How many merges there are to do; none where nobody comes to them, so that what waits for them cannot hang."""
        return self._owed if time.monotonic() - self._merged_at < MERGE_PATIENCE_S else 0

    def lines(self) -> dict[str, tuple[float, float, str]]:
        """Line -> (done, total, note)."""
        return {line: self._line(line, total, note) for line, (total, note) in self._lines.items()}

    def _line(self, line: str, total: float, note: str) -> tuple[float, float, str]:
        parts = self._parts[line].values()
        done, tokens = sum(part[0] for part in parts), sum(part[1] for part in parts)
        seconds = time.monotonic() - self._since.get(line, 0.0)
        # What an earlier run has done has no tokens here; and less than a second says nothing about the speed.
        made = sum(part[0] for part in parts if part[1])
        speed = f"{made / seconds:.1f} examples/s, {tokens / seconds:,.0f} tokens/s" if tokens and seconds > 1 else ""
        return done, total, ", ".join(text for text in (note, speed) if text)


def on_this_node() -> NodeAffinitySchedulingStrategy:
    """Where an actor of the driver is lost with the driver, and with no other machine."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def counts_of(board: Any) -> dict[str, float]:
    """The totals that a board holds; none when it was lost, which costs the report of a stage and nothing else."""
    try:
        counts: dict[str, float] = ray.get(board.counts.remote())
    except ray.exceptions.RayActorError:
        return {}
    return counts


@contextmanager
def counted(board: Any) -> Iterator[None]:
    """Add the seconds of the block to the stage's totals, and say that somebody merges."""
    started = time.monotonic()
    board.merging.remote()
    try:
        yield
    finally:
        seconds = time.monotonic() - started
        board.merging.remote()
        board.count.remote(merging_s=seconds, working_s=seconds)


@contextmanager
def watched_board() -> Iterator[Any]:
    """A board for Ray workers, shown on this process's terminal while the block runs. Yields the actor's handle."""
    board = Board.options(scheduling_strategy=on_this_node()).remote()  # type: ignore[attr-defined]
    stop = threading.Event()
    with Bars() as bars:

        def show() -> None:
            while True:
                last = stop.wait(POLL_INTERVAL_S)
                try:
                    lines = ray.get(board.lines.remote(), timeout=10)
                except ray.exceptions.RayError:
                    return
                for line, (done, total, note) in lines.items():
                    bars.update(line, done, total, note)
                if last:
                    return

        thread = threading.Thread(target=show, name="progress", daemon=True)
        thread.start()
        try:
            yield board
        finally:
            stop.set()
            thread.join(timeout=15)
            ray.kill(board)
