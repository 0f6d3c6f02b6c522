"""Who does the tasks of the study of experts: processes of one thread each, the most urgent task first."""

import asyncio
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import count
from typing import Any

from expert_study_worker import Place, Task, answer_of, key_of, one_thread, perform

Tell = Callable[[str], None]


class Desk:
    """Hands out tasks; what is in the cache, or asked for already, is not done again. Made inside of an event loop."""

    def __init__(self, place: Place, processes: int, tell: Tell) -> None:
        self._place, self._tell = place, tell
        self._processes = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), one_thread)
        self._queue: asyncio.PriorityQueue[tuple[float, int, str, str, Task]] = asyncio.PriorityQueue()
        self._answers: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self._numbers = count()
        self._servants = [asyncio.create_task(self._serve()) for _ in range(processes)]

    async def do(self, urgency: float, name: str, task: Task) -> tuple[str, dict[str, Any]]:
        """(key, answer) of a task.

        Args:
            urgency: the lowest goes first; among equals, who asked first.
            name: for the line that is told when it is done.
            task: what is to be done.

        Raises:
            Exception: what the task raised.
        """
        key = key_of(self._place, task)
        if key not in self._answers:
            answer = self._answers[key] = asyncio.get_running_loop().create_future()
            if known := answer_of(self._place, key):
                answer.set_result(known)
            else:
                self._queue.put_nowait((urgency, next(self._numbers), name, key, task))
        return key, await self._answers[key]

    async def _serve(self) -> None:
        while True:
            _, _, name, key, task = await self._queue.get()
            loop = asyncio.get_running_loop()
            try:
                answer = await loop.run_in_executor(self._processes, perform, self._place, key, task)
            except Exception as error:  # noqa: BLE001 - it is raised where the answer is awaited
                self._answers[key].set_exception(error)
                continue
            self._tell(f"{time.strftime('%H:%M:%S')} {name}: {answer['seconds']:.0f} s")
            self._answers[key].set_result(answer)

    def close(self) -> None:
        """End the processes when they have done what they are at; the rest is left."""
        for servant in self._servants:
            servant.cancel()
        self._processes.shutdown(cancel_futures=True)
