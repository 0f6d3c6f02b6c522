"""A contender in a process of its own.

One that shared a process with others would be slowed down by the threads that they keep, idle as they are; see
`gradientspace_ray.engine.threads`.
"""

import asyncio
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import replace
from multiprocessing import get_context
from types import TracebackType
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from serving_engines import Setup
from serving_load import Answer, Request, Trace, play
from sketch_methods import MethodError
from transformers.utils import logging as transformers_logging

Open = Callable[[Setup], AbstractAsyncContextManager[Answer]]
P = ParamSpec("P")
T = TypeVar("T")


class _Opened(NamedTuple):
    """The contender of this process."""

    loop: asyncio.AbstractEventLoop
    stack: AsyncExitStack
    answer: Answer


_opened: list[_Opened] = []


class ContenderProcess:
    """Opens a contender in another process, where it lasts as long as the block."""

    def __init__(self, name: str, how: Open, setup: Setup) -> None:
        """Nothing is started yet.

        Args:
            name: for messages.
            how: opens the contender; a function of a module.
            setup: see there.
        """
        self._name, self._how, self._setup = name, how, setup
        self._process = ProcessPoolExecutor(1, mp_context=get_context("spawn"))

    def __enter__(self) -> "ContenderProcess":
        """Start the process and open the contender.

        Raises:
            AnswerError: the contender cannot be opened.
            MethodError: the process ended.
        """
        try:
            # Without what this process has loaded.
            self._call(_begin, self._how, replace(self._setup))
        except BaseException:
            self._process.shutdown()
            raise
        return self

    def play(self, requests: Sequence[Request], limit_s: float) -> list[Trace]:
        """What came of the requests; see `serving_load.play`.

        Raises:
            MethodError: the process ended.
        """
        return self._call(_play, requests, limit_s)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the contender and end its process.

        Raises:
            MethodError: the process had ended before, and nothing else went wrong.
        """
        try:
            self._call(_end)
        except MethodError:
            if error is None:
                raise
        finally:
            self._process.shutdown()

    def _call(self, function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        try:
            return self._process.submit(function, *arguments, **named).result()
        except BrokenExecutor as error:
            raise MethodError(f"{self._name}: its process ended; there may be too little memory") from error


def _begin(how: Open, setup: Setup) -> None:
    torch.set_num_threads(setup.threads)
    # Peers warn about what they were asked for.
    warnings.filterwarnings("ignore")
    transformers_logging.set_verbosity_error()
    loop, stack = asyncio.new_event_loop(), AsyncExitStack()
    asyncio.set_event_loop(loop)
    _opened.append(_Opened(loop, stack, loop.run_until_complete(stack.enter_async_context(how(setup)))))


def _play(requests: Sequence[Request], limit_s: float) -> list[Trace]:
    loop, _, answer = _opened[0]
    return loop.run_until_complete(play(requests, answer, limit_s))


def _end() -> None:
    loop, stack, _ = _opened.pop()
    loop.run_until_complete(stack.aclose())
    loop.close()
