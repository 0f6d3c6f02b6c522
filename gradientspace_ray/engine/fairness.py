"""Whose request is next: one queue per adapter, and the adapters take turns."""

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T", bound=Hashable)
MAX_OVERTAKES = 8


@dataclass
class _Line(Generic[T]):
    """The requests of one adapter, first come, first served."""

    waiting: deque[T]
    overtaken: int = 0
    """Admissions that passed the request at the head, since it is there."""


class FairQueue(Generic[K, T]):
    """Requests wait in a line per adapter, and the lines take turns.

    A request at the head of its line that cannot be admitted, because no slot or no cache is free, keeps its turn and
    may be overtaken by `max_overtakes` admissions; then no line behind it is served until it goes. So, from the moment
    that a request has `q` others before it in its line, at most `q + (q + 1) * (a + max_overtakes)` requests are
    admitted before it, when never more than `a` other lines wait at once.
    """

    def __init__(self, max_overtakes: int = MAX_OVERTAKES) -> None:
        self._max_overtakes = max_overtakes
        self._lines: dict[K, _Line[T]] = {}
        """In the order of their turns."""

    def __len__(self) -> int:
        return sum(len(line.waiting) for line in self._lines.values())

    def waiting(self) -> dict[K, int]:
        """Line -> number of requests in it."""
        return {key: len(line.waiting) for key, line in self._lines.items()}

    def push(self, key: K, request: T) -> None:
        """Add a request at the end of the line `key`; a line that was empty has the last turn."""
        self._lines.setdefault(key, _Line(deque())).waiting.append(request)

    def remove(self, key: K, request: T) -> bool:
        """Take a request out that is no longer wanted; False if it is not in the line."""
        line = self._lines.get(key)
        if line is None or request not in line.waiting:
            return False
        if line.waiting[0] == request:
            line.overtaken = 0
        line.waiting.remove(request)
        if not line.waiting:
            del self._lines[key]
        return True

    def admit(self, admissible: Callable[[T], bool]) -> T | None:
        """Take out the next request, if any can go.

        Args:
            admissible: whether there is room for a request; when it says so, the request goes.
        """
        passed: list[_Line[T]] = []
        for key, line in self._lines.items():
            request = line.waiting[0]
            if admissible(request):
                for other in passed:
                    other.overtaken += 1
                self._served(key, line)
                return request
            if line.overtaken >= self._max_overtakes:
                return None
            passed.append(line)
        return None

    def _served(self, key: K, line: _Line[T]) -> None:
        line.waiting.popleft()
        line.overtaken = 0
        del self._lines[key]
        if line.waiting:
            self._lines[key] = line
