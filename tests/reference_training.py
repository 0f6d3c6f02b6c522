"""A finetune in plain PyTorch: what the engines and the stages are compared with."""

import math

import numpy as np
import torch
from tiny_models import random_causal_lm, tiny_llama_config
from torch.nn import functional

from gradientspace_ray.models.loading import add_lora


def random_examples(count, seed=0, low=0, high=250):
    """(input_ids, labels) of 6 to 40 tokens; the second half has labels."""
    rng = np.random.default_rng(seed)
    examples = []
    for _ in range(count):
        input_ids = rng.integers(low, high, rng.integers(6, 40)).tolist()
        half = len(input_ids) // 2
        examples.append((input_ids, [-100] * half + input_ids[half:]))
    return examples


def tiny_adapted_model(seed=0):
    """The tiny Llama with eager attention and a fresh LoRA of rank 4."""
    model = random_causal_lm(tiny_llama_config(), seed).requires_grad_(False)
    model.set_attn_implementation("eager")
    return add_lora(model, rank=4, alpha=8, target_modules="all-linear", seed=seed)


def small_adapted_model():
    """One layer with eager attention and a fresh LoRA of two projections: the fastest; some weights are of odd size."""
    config = tiny_llama_config(num_hidden_layers=1, intermediate_size=129)
    model = random_causal_lm(config).requires_grad_(False)
    model.set_attn_implementation("eager")
    return add_lora(model, rank=3, alpha=6, target_modules=("q_proj", "down_proj"), seed=0)


def trainable(model):
    return [weight for weight in model.parameters() if weight.requires_grad]


def flat_weights(model):
    return torch.cat([weight.detach().flatten() for weight in trainable(model)])


def mean_loss(model, examples):
    """Mean over the label tokens of all examples, each example in a forward pass of its own."""
    losses = []
    for input_ids, labels in examples:
        logits = model(input_ids=torch.tensor([input_ids])).logits[0, :-1]
        targets = torch.tensor(labels[1:])
        losses.append(functional.cross_entropy(logits, targets, reduction="none")[targets != -100])
    return torch.cat(losses).mean()


def adamw(model, weight_decay=0.0):
    return torch.optim.AdamW(trainable(model), weight_decay=weight_decay)


def plain_training(
    model,
    examples,
    steps,
    *,
    peak,
    warmup_share,
    cosine=(0.0, 1.0),
    weight_decay=0.0,
    max_grad_norm=1.0,
    optimizer=None,
):
    """Linear rise, part of a cosine to a tenth, AdamW, clipping; one worker, no packing. Returns the losses."""
    optimizer = optimizer or adamw(model, weight_decay)
    rising = round(len(steps) * warmup_share)
    losses = []
    for index, step in enumerate(steps):
        falling = max(0, index - rising) / max(1, len(steps) - 1 - rising)
        angle = math.pi * (cosine[0] * (1 - falling) + cosine[1] * falling)
        rate = peak * (0.1 + 0.45 * (1 + math.cos(angle)))
        optimizer.param_groups[0]["lr"] = rate * ((index + 1) / (rising + 1) if index < rising else 1)
        loss = mean_loss(model, [examples[i] for i in step])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable(model), max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def assert_moments_are(moments, model, optimizer, message=""):
    """Compare moments with the state of the optimizer that trained a model's one adapter, `default`."""
    weights = {name.replace(".default.", "."): weight for name, weight in model.named_parameters()}
    weights = {name: weight for name, weight in weights.items() if weight.requires_grad}
    for key, part in (("exp_avg", moments.first), ("exp_avg_sq", moments.second)):
        assert set(part) == set(weights), message
        for name, weight in weights.items():
            wanted = optimizer.state[weight][key]
            assert part[name].dtype == torch.float32
            assert part[name].shape == wanted.shape, f"{message} {name}"
            error = float((part[name] - wanted).norm() / wanted.norm())
            assert error < 1e-3, f"{message} {key} of {name} is off by {error:.1e}"
    assert moments.step == next(iter(optimizer.state.values()))["step"], message
    group = optimizer.param_groups[0]
    assert (moments.betas, moments.eps) == (group["betas"], group["eps"])


def give_moments(optimizer, model, moments):
    """Give an AdamW that has made no step these moments, by the way that PyTorch loads an optimizer's state."""
    names = [name.replace(".default.", ".") for name, weight in model.named_parameters() if weight.requires_grad]
    state = {
        place: {
            "step": torch.tensor(float(moments.step)),
            "exp_avg": moments.first[name],
            "exp_avg_sq": moments.second[name],
        }
        for place, name in enumerate(names)
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
