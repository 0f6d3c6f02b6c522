"""The plan of a finetune, against PyTorch's schedulers and against what every plan must keep."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from gradientspace_ray.training.schedule import learning_rate, lora_rate, plan_rows, plan_steps, scaled_rate, step_size


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


@given(parts=st.lists(st.integers(2, 30), min_size=1, max_size=4), share=st.sampled_from([0.0, 0.2]))
def test_finetunes_that_continue_one_another_go_along_one_cosine(parts, share):
    # Each but the first begins again at the rate where the one before ended.
    rising = round(parts[0] * share)
    total = sum(parts) - len(parts) + 1 - rising
    whole = [learning_rate(step, total, 2.0, 0.0) for step in range(total)]
    begun = 0
    for place, steps in enumerate(parts):
        falling = steps - (rising if place == 0 else 0)
        cosine = (begun / max(1, total - 1), (begun + falling - 1) / max(1, total - 1))
        rates = [learning_rate(step, steps, 2.0, share if place == 0 else 0.0, cosine) for step in range(steps)]
        assert rates[steps - falling :] == pytest.approx(whole[begun : begun + falling])
        begun += falling - 1


def test_a_rise_ends_where_its_part_of_the_cosine_begins():
    rates = [learning_rate(step, 10, 1.0, 0.2, (0.5, 1.0)) for step in range(10)]
    assert rates[:3] == pytest.approx([0.55 / 3, 0.55 * 2 / 3, 0.55])
    assert rates[-1] == pytest.approx(0.1)


def test_wider_models_and_smaller_steps_have_lower_rates():
    assert lora_rate(576, 8) == 2e-3
    assert lora_rate(576, 2) == 1e-3
    assert lora_rate(576, 32) == 2e-3
    # As published for a Llama of 8B beside one whose width is 2,000.
    assert lora_rate(4096, 8) / lora_rate(2000, 8) == pytest.approx(2.86e-4 / 5e-4, rel=0.01)


def test_the_rate_of_other_steps_grows_with_the_root_of_their_size():
    assert scaled_rate(4e-3, 8, 2) == pytest.approx(2e-3)
    assert scaled_rate(1e-3, 2, 8) == pytest.approx(2e-3)
    assert scaled_rate(1e-3, 3, 3) == 1e-3


def test_steps_above_those_measured_do_not_change_the_rate():
    assert scaled_rate(1e-3, 8, 64) == scaled_rate(1e-3, 64, 32) == 1e-3
    assert scaled_rate(1e-3, 64, 2) == scaled_rate(1e-3, 8, 2) == pytest.approx(5e-4)


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
    assert abs(seen.total() - max(1, count * epochs)) <= 0.5
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


@given(
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=40),
    per_step=st.integers(1, 9),
    epochs=st.floats(0.01, 3.5),
    seed=st.integers(0, 99),
)
def test_a_fraction_of_an_epoch_is_one_of_its_tokens(lengths, per_step, epochs, seed):
    steps = plan_steps(len(lengths), per_step, epochs, seed, lengths)
    seen = [index for step in steps for index in step]
    tokens, wanted = sum(lengths[index] for index in seen), epochs * sum(lengths)
    assert abs(tokens - wanted) <= max(lengths) / 2 or len(seen) == 1
    # The order is that of whole epochs, which it leaves early.
    whole = plan_steps(len(lengths), len(lengths), 4, seed)
    assert seen == [index for step in whole for index in step][: len(seen)]
    # One example less, or more, is no nearer.
    following = whole[len(seen) // len(lengths)][len(seen) % len(lengths)]
    others = [tokens + lengths[following], *([tokens - lengths[seen[-1]]] if len(seen) > 1 else [])]
    assert all(abs(tokens - wanted) <= abs(other - wanted) + 1e-6 for other in others)


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_whole_epochs_are_whole_whatever_the_lengths(epochs):
    lengths = np.random.default_rng(0).integers(1, 1000, 37).tolist()
    assert plan_steps(37, 5, epochs, 7, lengths) == plan_steps(37, 5, epochs, 7)
    # As a budget gives them, which divides by the tokens of a pass.
    share = epochs * sum(lengths) * 0.3 / (0.3 * sum(lengths))
    assert plan_steps(37, 5, share, 7, lengths) == plan_steps(37, 5, epochs, 7)


@given(count=st.integers(1, 80), epochs=st.floats(0.05, 4), per_step=st.integers(1, 20), min_steps=st.integers(0, 40))
def test_steps_are_made_smaller_only_where_there_would_be_too_few(count, epochs, per_step, min_steps):
    size = step_size(count, epochs, per_step, min_steps)
    assert 1 <= size <= per_step
    assert len(plan_steps(count, size, epochs, 0)) >= min_steps or size == 1
    # The next larger size makes too few, up to what the ends of epochs add.
    assert size == per_step or count * epochs < (size + 1) * min_steps


@pytest.mark.parametrize(("count", "epochs"), [(3, 0.5), (1, 1), (2, 0.1), (100, 2)])
def test_without_a_least_number_of_steps_their_size_is_as_given(count, epochs):
    assert step_size(count, epochs, 8, 0) == 8


def test_step_size_of_a_known_case():
    # 40 examples twice are 80: 10 steps of 8, 20 steps of 4, and at most 80 steps of 1.
    assert [step_size(40, 2, 8, wanted) for wanted in (10, 11, 20, 21, 80, 1000)] == [8, 7, 4, 3, 1, 1]


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
