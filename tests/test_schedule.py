"""The plan of a finetune, against PyTorch's schedulers and against what every plan must keep."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from gradientspace_ray.training.schedule import learning_rate, plan_rows, plan_steps


@pytest.mark.parametrize(("total", "share"), [(40, 0.1), (40, 0.0), (7, 0.5), (100, 0.03)])
def test_learning_rate_is_that_of_pytorchs_schedulers(total, share):
    rising = round(total * share)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
    rise = LinearLR(optimizer, start_factor=1 / (rising + 1), end_factor=1.0, total_iters=max(1, rising))
    fall = CosineAnnealingLR(optimizer, T_max=total - 1 - rising, eta_min=3e-5)
    scheduler = SequentialLR(optimizer, [rise, fall], milestones=[rising]) if rising else fall
    if not rising:
        optimizer.param_groups[0]["lr"] = 3e-4
    for step in range(total):
        assert learning_rate(step, total, 3e-4, share) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("total", [1, 2, 3])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_learning_rate_of_a_very_short_finetune_is_positive_and_at_most_the_peak(total, share):
    assert all(0 < learning_rate(step, total, 1.0, share) <= 1.0 for step in range(total))


@given(
    count=st.integers(1, 60), per_step=st.integers(1, 20), epochs=st.floats(0.01, 3.5), seed=st.integers(0, 2**32 - 1)
)
def test_plan_sees_every_example_once_an_epoch(count, per_step, epochs, seed):
    steps = plan_steps(count, per_step, epochs, seed)
    seen = Counter(index for step in steps for index in step)
    assert seen.total() == max(1, round(count * epochs))
    times = [seen[index] for index in range(count)]
    assert max(times) - min(times) <= 1
    assert all(1 <= len(step) <= per_step for step in steps)
    assert all(len(set(step)) == len(step) for step in steps)


def test_steps_of_an_epoch_are_of_nearly_equal_size():
    assert [len(step) for step in plan_steps(17, 8, 1, 0)] == [6, 6, 5]


def test_plan_repeats_by_seed_and_every_epoch_has_its_own_order():
    assert plan_steps(30, 4, 2, [3, 1]) == plan_steps(30, 4, 2, [3, 1])
    assert plan_steps(30, 4, 1, [3, 1]) != plan_steps(30, 4, 1, [3, 2])
    first, second = plan_steps(30, 30, 2, 0)
    assert first != second
    assert sorted(first) == sorted(second)


def test_no_examples_is_an_error():
    with pytest.raises(ValueError, match="at least one example"):
        plan_steps(0, 8, 1, 0)


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=30),
    tokens_per_batch=st.integers(1, 120),
    world_size=st.integers(1, 5),
    data=st.data(),
)
def test_workers_share_a_step_and_make_equally_many_passes(lengths, tokens_per_batch, world_size, data):
    step = data.draw(st.lists(st.sampled_from(range(len(lengths))), min_size=1, unique=True))
    workers = [plan_rows(step, lengths, tokens_per_batch, rank, world_size) for rank in range(world_size)]
    assert len({len(rows) for rows in workers}) == 1
    counted = [index for rows in workers for indices, counts in rows if counts for index in indices]
    assert sorted(counted) == sorted(step)
    for rank, rows in enumerate(workers):
        mine = {index for indices, counts in rows if counts for index in indices}
        assert mine == set(step[rank::world_size])
        for indices, _ in rows:
            assert len(indices) == 1 or sum(lengths[i] for i in indices) <= tokens_per_batch
