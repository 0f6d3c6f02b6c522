"""A whole finetune on the plain engine: what it keeps, when it stops, and that one who resumes does the same."""

import copy
import math
import tempfile
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_training import (
    adamw,
    assert_moments_are,
    flat_weights,
    mean_loss,
    plain_training,
    random_examples,
    small_adapted_model,
)

from gradientspace_ray.models.attention import SEGMENTED
from gradientspace_ray.models.checkpointing import activation_checkpointing
from gradientspace_ray.models.moments import AdamMoments
from gradientspace_ray.training.budget import TrainingSettings
from gradientspace_ray.training.engine import PlainEngine, TrainingError, set_weights
from gradientspace_ray.training.finetune import Data, PreemptedError, finetune
from gradientspace_ray.training.schedule import plan_steps
from gradientspace_ray.training.state import load_state, save_state

SEED = [3, 1]
# The tokens of the two parts are told apart by themselves.
TRAIN, HELD_OUT = random_examples(8, seed=1, high=120), random_examples(3, seed=2, low=130)
SETTINGS = TrainingSettings(
    epochs=1.75, learning_rate=3e-2, examples_per_step=2, weight_decay=0.01, max_grad_norm=0.5, tokens_per_batch=50
)
BOTH = Data(TRAIN, HELD_OUT)
STEPS = 7
LIVELY = {"learning_rate": 0.8, "max_grad_norm": 10.0, "evaluate_every": 1}
"""With these the held-out loss rises and falls."""


class KilledError(Exception):
    pass


original = cache(small_adapted_model)


def fresh_model(dropout=0.0, attention=SEGMENTED):
    model = copy.deepcopy(original())
    model.set_attn_implementation(attention)
    if dropout:
        for module in model.modules():
            if hasattr(module, "lora_dropout"):
                module.lora_dropout["default"] = torch.nn.Dropout(dropout).train()
    return model


def planned(examples, examples_per_step, epochs):
    return plan_steps(len(examples), examples_per_step, epochs, SEED, [len(input_ids) for input_ids, _ in examples])


def made(data=BOTH, changes=(), state=None, dropout=0.0, seed=SEED, start=None, **calls):
    """Outcome of a finetune of a fresh model that was given the weights of `state`, or `start`."""
    model = fresh_model(dropout)
    if weights := state.weights if state else start:
        set_weights(model, weights)
    section = SETTINGS.model_copy(update=dict(changes))
    engine = PlainEngine(model, torch.float32, section.weight_decay, section.max_grad_norm)
    return finetune(engine, data, section, seed=seed, state=state, **calls)


def interrupted(folder, stops, **arguments):
    """Outcome of a finetune that is killed after each of these steps and goes on from its last checkpoint."""
    saved = []

    def on_step(stop, step, heldout):
        if step.number == stop:
            raise KilledError

    def save(state):
        saved.append(folder / f"{len(saved)}")
        save_state(state, saved[-1])

    for stop in [*stops, None]:
        # What a worker before this one drew, nobody knows.
        torch.manual_seed(len(saved) + 100)
        state = load_state(saved[-1]) if saved else None
        try:
            return made(**arguments, state=state, on_step=partial(on_step, stop), save=save)
        except KilledError:
            continue
    raise AssertionError("unreachable")


def assert_equal_tensors(found, wanted):
    assert (found is None) == (wanted is None)
    assert set(found or {}) == set(wanted or {})
    for name, value in (wanted or {}).items():
        assert torch.equal(found[name], value), name


def assert_same(found, wanted):
    assert found.tokens == wanted.tokens
    assert found.state.losses == wanted.state.losses
    assert found.state.heldout == wanted.state.heldout
    assert found.state.best_step == wanted.state.best_step
    assert_equal_tensors(found.state.weights, wanted.state.weights)
    assert_equal_tensors(found.state.best, wanted.state.best)
    ours, theirs = found.state.moments, wanted.state.moments
    assert_equal_tensors(ours.first, theirs.first)
    assert_equal_tensors(ours.second, theirs.second)
    assert (ours.step, ours.betas, ours.eps) == (theirs.step, theirs.betas, theirs.eps)


@cache
def generalist():
    """Outcome of a finetune along the first half of the cosine."""
    return made(Data(TRAIN[:5]), cosine=(0.0, 0.5))


def continuing(is_true):
    """What tells a finetune to go on from there."""
    return {"moments": generalist().state.moments, "cosine": (0.5, 1.0)} if is_true else {}


@cache
def undisturbed(heldout, dropout, continues=False, **changes):
    data = Data(TRAIN, HELD_OUT if heldout else ())
    return made(data, changes.items(), dropout=dropout, **continuing(continues))


@settings(max_examples=15)
@given(
    stops=st.lists(st.integers(1, STEPS), min_size=1, max_size=3),
    checkpoint_every=st.integers(1, 4),
    evaluate_every=st.integers(1, 4),
    patience=st.none() | st.integers(1, 2),
    heldout=st.booleans(),
    dropout=st.sampled_from([0.0, 0.3]),
    continues=st.booleans(),
)
def test_one_who_is_killed_and_resumes_ends_where_the_undisturbed_one_does(
    stops, checkpoint_every, evaluate_every, patience, heldout, dropout, continues
):
    changes = {**LIVELY, "evaluate_every": evaluate_every, "patience": patience}
    with tempfile.TemporaryDirectory() as folder:
        found = interrupted(
            Path(folder),
            stops,
            data=Data(TRAIN, HELD_OUT if heldout else ()),
            changes={**changes, "checkpoint_every": checkpoint_every}.items(),
            dropout=dropout,
            **continuing(continues),
        )
    assert_same(found, undisturbed(heldout, dropout, continues, **changes))


@pytest.mark.parametrize("stop", range(1, STEPS))
def test_one_whose_machine_is_taken_away_saves_leaves_and_goes_on_later(tmp_path, stop):
    with pytest.raises(PreemptedError, match=rf"^left after step {stop} of {STEPS}$"):
        made(
            must_leave=lambda step: step.number == stop,
            save=lambda state: save_state(state, tmp_path),
            dropout=0.3,
            changes=LIVELY.items(),
        )
    state = load_state(tmp_path)
    assert state.step == stop
    torch.manual_seed(99)
    assert_same(made(state=state, dropout=0.3, changes=LIVELY.items()), undisturbed(True, 0.3, **LIVELY))


def test_one_who_must_leave_when_all_is_done_stays():
    saved = []
    outcome = made(must_leave=lambda step: step.number == STEPS, save=saved.append)
    assert outcome.state.step == STEPS
    assert saved == []


def test_what_is_drawn_differs_by_step_and_by_seed():
    still = TrainingSettings(epochs=4, learning_rate=1e-12)

    def losses(dropout, seed):
        # One example has but one order.
        model = fresh_model(dropout)
        set_weights(model, undisturbed(True, 0.0, **LIVELY).state.weights)
        return finetune(PlainEngine(model), Data(TRAIN[:1]), still, seed=[seed]).state.losses

    assert len(set(losses(0.3, 0) + losses(0.3, 1))) == 8
    assert len(set(losses(0.0, 0) + losses(0.0, 1))) == 1
    assert losses(0.3, 0) == losses(0.3, 0)


def test_checkpoints_come_every_so_many_steps_and_none_at_the_end():
    saved = []
    made(changes={"checkpoint_every": 5}.items(), save=saved.append)
    assert [state.step for state in saved] == [5]
    saved.clear()
    made(changes={"checkpoint_every": 3}.items(), save=saved.append)
    assert [state.step for state in saved] == [3, 6]


@pytest.fixture(scope="module")
def reference():
    """Losses, model, and the held-out loss and weights after each step of a plain loop."""
    model = fresh_model(attention="eager")
    optimizer = adamw(model, 0.01)
    after = []

    def observe(*_):
        with torch.no_grad():
            after.append((float(mean_loss(model, HELD_OUT)), flat_weights(model).clone()))

    optimizer.register_step_post_hook(observe)
    steps = planned(TRAIN, 2, 1.75)
    losses = plain_training(model, TRAIN, steps, peak=0.1, warmup_share=0.1, max_grad_norm=10.0, optimizer=optimizer)
    return steps, losses, after


@pytest.mark.parametrize("evaluate_every", [1, 3, 20])
def test_losses_and_what_is_kept_are_those_of_a_plain_loop(reference, evaluate_every):
    steps, losses, after = reference
    changes = {**LIVELY, "learning_rate": 0.1, "evaluate_every": evaluate_every}
    told = []
    outcome = made(changes=changes.items(), on_step=lambda step, heldout: told.append((step.number, heldout)))
    state = outcome.state
    np.testing.assert_allclose(state.losses, losses, atol=1e-4)
    places = [number for number in range(1, STEPS + 1) if number % evaluate_every == 0 or number == STEPS]
    assert [step for step, _ in state.heldout] == places
    np.testing.assert_allclose([loss for _, loss in state.heldout], [after[at - 1][0] for at in places], atol=1e-4)
    assert told == [(number, dict(state.heldout).get(number)) for number in range(1, STEPS + 1)]
    best = min(places, key=lambda at: after[at - 1][0])
    assert state.best_step == best
    kept, last = (torch.cat([weight.flatten() for weight in part.values()]) for part in (state.best, state.weights))
    torch.testing.assert_close(kept, after[best - 1][1], atol=1e-4, rtol=0)
    torch.testing.assert_close(last, after[-1][1], atol=1e-4, rtol=0)
    assert outcome.tokens == sum(len(TRAIN[index][0]) for step in steps for index in step)


def test_two_that_continue_one_another_are_one_plain_loop_with_one_optimizer():
    first, second = TRAIN[:5], TRAIN[5:]
    model = fresh_model(attention="eager")
    optimizer = adamw(model, 0.01)
    parts = [(first, 0.1, (0.0, 0.5)), (second, 0.0, (0.5, 1.0))]
    losses = [
        plain_training(
            model,
            examples,
            planned(examples, 2, 1.75),
            peak=3e-2,
            warmup_share=rise,
            cosine=cosine,
            max_grad_norm=0.5,
            optimizer=optimizer,
        )
        for examples, rise, cosine in parts
    ]
    before = generalist().state
    after = made(Data(second), {"warmup_share": 0.0}.items(), start=before.weights, **continuing(True)).state
    np.testing.assert_allclose([*before.losses, *after.losses], [*losses[0], *losses[1]], atol=1e-4)
    assert_moments_are(after.moments, model, optimizer)
    assert after.moments.step == len(before.losses) + len(after.losses)
    weights = torch.cat([weight.flatten() for weight in after.weights.values()])
    torch.testing.assert_close(weights, flat_weights(model), atol=1e-4, rtol=0)


def test_the_weights_that_are_kept_have_the_lowest_held_out_loss():
    outcome = undisturbed(True, 0.0, **LIVELY)
    lowest = min(loss for _, loss in outcome.state.heldout)
    assert lowest < outcome.state.heldout[-1][1], "the last weights are the best, which proves little"
    losses = []
    for weights in (outcome.state.best, outcome.state.weights):
        model = fresh_model(attention="eager")
        set_weights(model, weights)
        with torch.no_grad():
            losses.append(float(mean_loss(model, HELD_OUT)))
    assert losses == pytest.approx([lowest, outcome.state.heldout[-1][1]], abs=1e-4)


def test_what_is_held_out_is_not_trained_on_and_changes_nothing(monkeypatch):
    seen, tokens = [], []
    call = PlainEngine.__call__

    def watched(engine, packed):
        seen.append((torch.is_grad_enabled(), packed.input_ids[0]))
        tokens.append(packed.input_ids.numel() * torch.is_grad_enabled())
        return call(engine, packed)

    monkeypatch.setattr(PlainEngine, "__call__", watched)
    outcome = made(changes={"evaluate_every": 2}.items())
    assert {bool(ids.max() >= 130) for is_trained, ids in seen if is_trained} == {False}
    assert {bool(ids.min() >= 130) for is_trained, ids in seen if not is_trained} == {True}
    assert outcome.tokens == sum(tokens)
    alone = made(Data(TRAIN))
    assert alone.state.losses == outcome.state.losses
    assert_equal_tensors(alone.state.weights, outcome.state.weights)
    assert (alone.state.best, alone.state.best_step, alone.state.heldout) == (None, None, ())


class ScriptedEngine:
    """Trains nothing; the losses of what is held out, which is one row, are read off a list."""

    def __init__(self, heldout):
        self.optimizer = SimpleNamespace(param_groups=[{"lr": 0.0}])
        self._heldout = iter(heldout)
        self.steps = 0

    def __call__(self, packed):
        loss = 1.0 if torch.is_grad_enabled() else next(self._heldout)
        return torch.full((len(packed.label_ids),), loss, dtype=torch.float64)

    def backward(self, loss):
        pass

    def step(self):
        self.steps += 1

    def weights(self):
        return {"steps": torch.tensor(float(self.steps))}

    def moments(self):
        return AdamMoments({}, {}, self.steps, (0.9, 0.999), 1e-8)


@given(
    heldout=st.lists(st.integers(1, 5), min_size=1, max_size=12),
    patience=st.none() | st.integers(1, 4),
    every=st.integers(1, 3),
)
def test_patience_and_the_best_are_those_of_a_loop_that_counts(heldout, patience, every):
    total = len(heldout) * every
    lowest, best_step, waited, stop = math.inf, 0, 0, total
    for place, loss in enumerate(heldout, 1):
        if loss < lowest:
            lowest, best_step, waited = loss, place * every, 0
        else:
            waited += 1
        if waited == patience:
            stop = place * every
            break
    section = TrainingSettings(
        learning_rate=1e-3,
        epochs=total,
        examples_per_step=1,
        heldout_share=0.1,
        patience=patience,
        evaluate_every=every,
    )
    examples = Data([([1, 2], [1, 2])], [([3, 4, 5], [3, 4, 5])])
    outcome = finetune(ScriptedEngine(heldout), examples, section, seed=[0])
    assert outcome.state.best_moments is None
    outcome = finetune(ScriptedEngine(heldout), examples, section, seed=[0], keep_best_moments=True)
    assert (outcome.state.step, outcome.state.best_step) == (stop, best_step)
    assert (outcome.state.best_moments.step, outcome.state.moments.step) == (best_step, stop)
    assert outcome.state.best == {"steps": torch.tensor(float(best_step))}
    assert outcome.state.heldout == tuple((at, heldout[at // every - 1]) for at in range(every, stop + 1, every))
    assert outcome.tokens == 2 * stop


def test_patience_ends_a_real_finetune_early():
    whole = undisturbed(True, 0.0, **LIVELY)
    curve = [loss for _, loss in whole.state.heldout]
    rises = next(at for at in range(1, STEPS) if curve[at] >= min(curve[:at]))
    assert rises < STEPS - 1, "no early stop to see"
    early = undisturbed(True, 0.0, **LIVELY, patience=1)
    assert early.state.step == rises + 1
    assert early.state.losses == whole.state.losses[: rises + 1]
    assert early.state.best_step == rises


@pytest.mark.parametrize(("count", "epochs", "steps"), [(3, 1, 1), (3, 2.4, 3), (1, 1, 1), (1, 3, 3), (2, 0.1, 1)])
def test_fewer_examples_than_a_step_takes(count, epochs, steps):
    examples = TRAIN[:count]
    changes = {"epochs": epochs, "examples_per_step": 64}
    outcome = made(Data(examples, HELD_OUT[:1]), changes.items())
    plan = planned(examples, 64, epochs)
    assert outcome.state.step == len(plan) == steps
    assert outcome.tokens == sum(len(examples[index][0]) for step in plan for index in step)
    model = fresh_model(attention="eager")
    losses = plain_training(model, examples, plan, peak=3e-2, warmup_share=0.1, weight_decay=0.01, max_grad_norm=0.5)
    np.testing.assert_allclose(outcome.state.losses, losses, atol=1e-4)


def test_a_held_out_part_without_label_tokens_is_an_error():
    with pytest.raises(TrainingError, match="held-out part has no label tokens"):
        made(Data(TRAIN, [([5, 6, 7], [5, -100, -100])]))


def test_a_held_out_loss_that_is_not_finite_is_an_error():
    saved = []
    changes = {"learning_rate": 1e30, "max_grad_norm": 1e30, "evaluate_every": 1, "checkpoint_every": 1}
    with pytest.raises(TrainingError, match=r"held-out loss is (nan|inf); give a lower learning_rate"):
        made(changes=changes.items(), save=saved.append)
    assert saved == []


def test_time_of_all_tries_is_counted(tmp_path):
    saved = []
    made(changes={"checkpoint_every": 6}.items(), save=saved.append)
    assert saved[0].seconds > 0
    save_state(saved[0], tmp_path)
    assert made(state=load_state(tmp_path)).state.seconds > saved[0].seconds


def test_activation_checkpointing_changes_nothing():
    section = SETTINGS.model_copy(update=LIVELY)
    model = fresh_model()
    engine = PlainEngine(model, torch.float32, section.weight_decay, section.max_grad_norm)
    with activation_checkpointing(model):
        outcome = finetune(engine, BOTH, section, seed=SEED)
    assert_same(outcome, undisturbed(True, 0.0, **LIVELY))
