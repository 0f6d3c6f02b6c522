"""Why an engine's thread should be the only one that computes.

OpenMP keeps a team of threads for every thread that computed, until that ends. Where all teams together have more
threads than there are cores, GNU's OpenMP, which PyTorch uses on Linux, no longer spins while it waits, and every small
product begins and ends with a call of the operating system: on two cores a second team, idle all the time, makes a step
of the base model take 1.2 times as long, and one of eight experts 1.7 times.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def in_passing_thread(work: Callable[[], T]) -> T:
    """What `work` returns or raises, run on a thread that ends with it, and its team of OpenMP's with the thread."""
    with ThreadPoolExecutor(1, thread_name_prefix="passing") as thread:
        return thread.submit(work).result()
