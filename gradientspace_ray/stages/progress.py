"""Progress that moves: bars on a terminal, a line now and then in a log, fed from this process or from Ray workers.

The one module of `stages/` that the other stages may import.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LOG_INTERVAL_S = 10.0
POLL_INTERVAL_S = 0.5


class Bars:
    """One line per task: `update` moves it. Safe to call from several threads."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._lock = threading.Lock()
        self._tasks: dict[str, Any] = {}
        self._printed: dict[str, tuple[float, float]] = {}
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
            clock = f"({now - self._started:.0f} s)"
            self._console.print(f"  {line}: {done:g}/{total:g} {note} {clock}", highlight=False, markup=False)

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
        self._lines: dict[str, tuple[float, float, str]] = {}
        self._parts: dict[str, dict[str, float]] = {}

    def report(self, line: str, done: float, total: float, note: str = "", part: str = "") -> None:
        """Keep the latest state of a line, the sum of its parts; a retried worker never moves its part back."""
        parts = self._parts.setdefault(line, {})
        if done >= parts.get(part, 0.0):
            parts[part] = done
            self._lines[line] = (sum(parts.values()), total, note)

    def lines(self) -> dict[str, tuple[float, float, str]]:
        """Line -> (done, total, note)."""
        return self._lines


@contextmanager
def watched_board() -> Iterator[Any]:
    """A board for Ray workers, shown on this process's terminal while the block runs. Yields the actor's handle."""
    board = Board.remote()  # type: ignore[attr-defined]
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
