"""A whole finetune: its steps, the loss of its held-out part, when it stops, and what it saves on the way."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from gradientspace_ray.examples.packing import Example
from gradientspace_ray.models.moments import AdamMoments
from gradientspace_ray.training.budget import TrainingSettings
from gradientspace_ray.training.engine import Engine
from gradientspace_ray.training.loop import ALONE, Step, Worker, heldout_loss, train
from gradientspace_ray.training.schedule import WHOLE_COSINE, plan_steps
from gradientspace_ray.training.state import TrainingState


class PreemptedError(RuntimeError):
    """This machine is about to be taken away; a checkpoint was saved."""


class Data(NamedTuple):
    """Examples of a finetune, the same on every worker."""

    train: Sequence[Example]
    heldout: Sequence[Example] = ()


class Outcome(NamedTuple):
    """What a finetune comes to."""

    state: TrainingState
    """At the end; `best` holds the weights to keep where there is a held-out part."""
    tokens: int
    """Seen in all steps, prompts included."""


def finetune(
    engine: Engine,
    data: Data,
    settings: TrainingSettings,
    *,
    seed: Sequence[int],
    cosine: tuple[float, float] = WHOLE_COSINE,
    moments: AdamMoments | None = None,
    keep_best_moments: bool = False,
    worker: Worker = ALONE,
    state: TrainingState | None = None,
    on_step: Callable[[Step, float | None], None] | None = None,
    save: Callable[[TrainingState], None] | None = None,
    must_leave: Callable[[Step], bool] = lambda step: False,
) -> Outcome:
    """Train to the end, or until the held-out loss has stopped falling.

    All workers call it with the same arguments, but for `worker`, `on_step` and `save`.

    Args:
        engine: holds the weights to begin with, of `state` where there is one, and an optimizer that has made no step.
        data: examples.
        settings: of the finetune.
        seed: decides the order of the examples.
        cosine: see `learning_rate`.
        moments: of the finetune that this one continues.
        keep_best_moments: beside the best weights, for another finetune to continue them.
        worker: this one.
        state: where an earlier try stood; None begins.
        on_step: called after every step, with the held-out loss where it was taken.
        save: called with what a checkpoint should hold, every `checkpoint_every` steps.
        must_leave: called after every step, with the same answer on every worker.

    Raises:
        PreemptedError: `must_leave` said so, and the state was saved.
        TrainingError: see `loop.train`.
    """
    lengths = [len(input_ids) for input_ids, _ in data.train]
    steps = plan_steps(len(lengths), settings.examples_per_step, settings.epochs, seed, lengths)
    losses, found = (list(state.losses), list(state.heldout)) if state else ([], [])
    best, best_moments = (state.best, state.best_moments) if state else (None, None)
    if earlier := state.moments if state else moments:
        engine.restore(earlier)
    started = time.monotonic() - (state.seconds if state else 0.0)

    def current() -> TrainingState:
        seconds = time.monotonic() - started
        weights, moments = engine.weights(), engine.moments()
        return TrainingState(tuple(losses), tuple(found), seconds, weights, moments, best, best_moments)

    for step in train(
        engine,
        data.train,
        steps,
        peak=settings.learning_rate,
        warmup_share=settings.warmup_share,
        cosine=cosine,
        tokens_per_batch=settings.tokens_per_batch,
        worker=worker,
        first=len(losses),
        seed=seed,
    ):
        losses.append(step.loss)
        is_last = step.number == step.total
        loss = None
        if data.heldout and (is_last or step.number % settings.evaluate_every == 0):
            loss = heldout_loss(engine, data.heldout, settings.tokens_per_batch, worker)
            if not found or loss < min(earlier for _, earlier in found):
                best, best_moments = engine.weights(), engine.moments() if keep_best_moments else None
            found.append((step.number, loss))
        if on_step:
            on_step(step, loss)
        leaving = must_leave(step)
        if is_last or _has_stalled([loss for _, loss in found], settings.patience):
            break
        if leaving or step.number % settings.checkpoint_every == 0:
            # All workers meet in gathering it, whoever keeps it.
            now = current()
            if save:
                save(now)
        if leaving:
            raise PreemptedError(f"left after step {step.number} of {step.total}")
    tokens = sum(lengths[index] for indices in steps[: len(losses)] for index in indices)
    return Outcome(current(), tokens)


def _has_stalled(losses: Sequence[float], patience: int | None) -> bool:
    """Whether the last `patience` losses were no lower than the lowest before them."""
    if patience is None or len(losses) <= patience:
        return False
    return min(losses[-patience:]) >= min(losses[:-patience])
