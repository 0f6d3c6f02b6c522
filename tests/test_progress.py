"""What the board knows of lines, speeds and merges; without Ray."""

import pytest

from gradientspace_ray.stages import progress


class Clock:
    now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.fixture
def board(clock):
    return progress.Board.__ray_metadata__.modified_class()


def test_what_was_done_before_says_nothing_about_the_speed(board, clock):
    board.begin("gradients", 600, 620)
    clock.now = 10
    board.report("gradients", 5, 620, part="a", tokens=100.0)
    board.report("gradients", 3, 620, part="a", tokens=60.0)
    board.report("gradients", 1, 620, part="b", tokens=20.0)
    assert board.lines() == {"gradients": (606, 620, "0.6 examples/s, 12 tokens/s")}
    # Another go, after one of the two was lost.
    board.begin("gradients", 601, 620)
    assert board.lines() == {"gradients": (601, 620, "")}


def test_shards_wait_for_merges_that_go_on_and_for_no_others(board, clock):
    assert board.backlog() == 0
    board.owe(3)
    assert board.backlog() == 3
    clock.now += progress.MERGE_PATIENCE_S - 1
    board.merging()
    clock.now += progress.MERGE_PATIENCE_S - 1
    board.owe(4)
    assert board.backlog() == 4
    clock.now += 2
    assert board.backlog() == 0
    board.owe(0)
    board.owe(1)
    assert board.backlog() == 1
