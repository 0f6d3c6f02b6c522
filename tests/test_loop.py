"""One worker's steps against a loop in plain PyTorch; DeepSpeed's engines are in test_deepspeed_engine.py."""

import math

import numpy as np
import pytest
import torch
from reference_training import (
    adamw,
    flat_weights,
    mean_loss,
    plain_training,
    random_examples,
    tiny_adapted_model,
    trainable,
)
from test_per_sample import DTYPES, autocast

from gradientspace_ray.models.attention import SEGMENTED
from gradientspace_ray.models.loading import load_adapter
from gradientspace_ray.registry import adapter_digest
from gradientspace_ray.training.budget import TrainingSettings
from gradientspace_ray.training.checkpoints import TrainingRecord, save
from gradientspace_ray.training.engine import PlainEngine, TrainingError
from gradientspace_ray.training.loop import heldout_loss, train
from gradientspace_ray.training.schedule import plan_steps

EXAMPLES = random_examples(24)
STEPS = plan_steps(24, 5, 4, 0)
SETTINGS = TrainingSettings(learning_rate=1e-2, warmup_share=0.1, weight_decay=0.01, max_grad_norm=0.5)
SCHEDULE = {"peak": SETTINGS.learning_rate, "warmup_share": SETTINGS.warmup_share}
RECORD = TrainingRecord(
    key="0", name="x", examples=1, tokens=1, steps=1, seconds=0, workers=1, zero_stage=0, losses=[1.0]
)


def plain_engine(model, compute_dtype=torch.float32):
    return PlainEngine(model, compute_dtype, SETTINGS.weight_decay, SETTINGS.max_grad_norm)


def plainly_trained(steps):
    """Losses, model and optimizer of a plain loop."""
    model = tiny_adapted_model()
    optimizer = adamw(model, SETTINGS.weight_decay)
    losses = plain_training(
        model, EXAMPLES, steps, **SCHEDULE, max_grad_norm=SETTINGS.max_grad_norm, optimizer=optimizer
    )
    return losses, model, optimizer


@pytest.fixture(scope="module")
def reference():
    """Losses and weights of a plain loop."""
    losses, model, _ = plainly_trained(STEPS)
    return losses, flat_weights(model)


def segmented_model():
    model = tiny_adapted_model()
    model.set_attn_implementation(SEGMENTED)
    return model


@pytest.mark.parametrize("tokens_per_batch", [1, 60, 4096])
def test_losses_and_weights_are_those_of_a_plain_loop(reference, tokens_per_batch):
    model = segmented_model()
    made = list(train(plain_engine(model), EXAMPLES, STEPS, **SCHEDULE, tokens_per_batch=tokens_per_batch))
    assert len(made) == 20
    np.testing.assert_allclose([step.loss for step in made], reference[0], atol=1e-4)
    torch.testing.assert_close(flat_weights(model), reference[1], atol=1e-4, rtol=0)
    assert [step.tokens for step in made] == [sum(len(EXAMPLES[i][0]) for i in step) for step in STEPS]
    assert [(step.number, step.total) for step in made] == [(number, 20) for number in range(1, 21)]


def test_a_model_that_reads_padded_batches_has_the_same_losses(reference):
    model = tiny_adapted_model()
    model.set_attn_implementation("sdpa")
    made = train(plain_engine(model), EXAMPLES, STEPS, **SCHEDULE, tokens_per_batch=60)
    np.testing.assert_allclose([step.loss for step in made], reference[0], atol=1e-4)


def test_the_held_out_loss_is_the_mean_over_label_tokens_and_changes_nothing():
    model = segmented_model()
    before = flat_weights(model)
    with torch.no_grad():
        wanted = mean_loss(tiny_adapted_model(), EXAMPLES[:7])
    assert heldout_loss(plain_engine(model), EXAMPLES[:7], 60) == pytest.approx(float(wanted), abs=1e-5)
    assert torch.equal(flat_weights(model), before)
    assert all(weight.grad is None for weight in trainable(model))


def float32_logits(module, inputs, output):
    output.logits = output.logits.float()
    return output


@pytest.mark.parametrize(("dtype", "compute_dtype"), DTYPES)
def test_every_precision_is_that_of_a_plain_loop(dtype, compute_dtype):
    models = [tiny_adapted_model(), tiny_adapted_model()]
    for model, attention in zip(models, ("sdpa", SEGMENTED), strict=True):
        model.set_attn_implementation(attention)
        for weight in model.parameters():
            weight.data = weight.data.to(weight.dtype if weight.requires_grad else dtype)
    plain, ours = models
    before = flat_weights(plain)
    plain.register_forward_hook(float32_logits)
    clipped = {"weight_decay": SETTINGS.weight_decay, "max_grad_norm": SETTINGS.max_grad_norm}
    with autocast(compute_dtype):
        losses = plain_training(plain, EXAMPLES, STEPS[:8], **SCHEDULE, **clipped)
    engine = plain_engine(ours, compute_dtype)
    found = [step.loss for step in train(engine, EXAMPLES, STEPS[:8], **SCHEDULE, tokens_per_batch=60)]
    rounding = DTYPES[dtype, compute_dtype]
    np.testing.assert_allclose(found, losses, rtol=rounding / 10)
    wanted, moved = flat_weights(plain) - before, flat_weights(ours) - before
    assert float((moved - wanted).norm() / wanted.norm()) < rounding


def test_a_loss_that_is_not_finite_stops_before_its_update():
    model = segmented_model()
    engine = plain_engine(model)
    with torch.no_grad():
        trainable(model)[0][0, 0] = torch.nan
    before = flat_weights(model)
    with pytest.raises(TrainingError, match=r"loss is nan at step 1 of 20 \(learning rate 0\.0033\)"):
        list(train(engine, EXAMPLES, STEPS, **SCHEDULE, tokens_per_batch=64))
    torch.testing.assert_close(flat_weights(model), before, equal_nan=True)


def test_a_step_without_label_tokens_is_an_error():
    engine = plain_engine(segmented_model())
    with pytest.raises(TrainingError, match="step 1 has no label tokens"):
        next(train(engine, [([5, 6, 7], [5, -100, -100])], [[0]], **SCHEDULE, tokens_per_batch=64))


def test_a_gradient_that_is_not_finite_is_an_error():
    engine = plain_engine(segmented_model())
    backward = engine.backward
    engine.backward = lambda loss: backward(loss * math.inf)
    with pytest.raises(TrainingError, match=r"the gradient is nan at step 1 of 1 .*; give a lower learning_rate"):
        next(train(engine, [([5, 6, 7], [5, 6, 7])], [[0]], **SCHEDULE, tokens_per_batch=64))


def test_saved_adapter_has_the_weights_and_the_same_digest_every_time(tmp_path):
    model = segmented_model()
    weights = plain_engine(model).weights()
    save(model, weights, RECORD, tmp_path / "a")
    save(model, weights, RECORD, tmp_path / "b")
    assert adapter_digest(tmp_path / "a") == adapter_digest(tmp_path / "b")
    assert TrainingRecord.model_validate_json((tmp_path / "a" / "training.json").read_text()) == RECORD
    again = load_adapter(tiny_adapted_model(seed=0).unload(), tmp_path / "a", trainable=True)
    assert torch.equal(flat_weights(again), flat_weights(model))


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    model = segmented_model()
    with torch.no_grad():
        trainable(model)[3][0, 0] = torch.inf
    with pytest.raises(TrainingError, match="is not finite after 1 steps"):
        save(model, plain_engine(model).weights(), RECORD, tmp_path / "a")
    assert not (tmp_path / "a").exists()
