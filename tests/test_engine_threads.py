"""Threads that compute leave nothing behind."""

import subprocess
import sys

import pytest
import torch

from gradientspace_ray.engine.threads import in_passing_thread

TEAMS = """
import os, time, torch
from gradientspace_ray.engine.threads import in_passing_thread
threads = lambda: len(os.listdir("/proc/self/task"))
compute = lambda: torch.ones(4_000_000).exp().sum().item()
torch.set_num_threads(3)
before = threads()
one = in_passing_thread(lambda: (compute(), threads())[1])
deadline = time.monotonic() + 20
while threads() > before and time.monotonic() < deadline:  # they end a moment later
    time.sleep(0.01)
between = threads()
compute()
print(one - before, between - before, threads() - before)
"""


def test_what_is_computed_or_raised_comes_back():
    assert in_passing_thread(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        in_passing_thread(lambda: 1 // 0)


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or "OpenMP" not in torch.__config__.parallel_info(),
    reason="counts the threads of OpenMP's teams as Linux shows them",
)
def test_the_team_of_a_passing_thread_ends_with_it_and_a_lasting_one_s_stays():
    counts = subprocess.run([sys.executable, "-c", TEAMS], capture_output=True, text=True, check=True).stdout
    # The thread itself and two more of its team; nobody; the main thread's team.
    assert counts.split() == ["3", "0", "2"]
