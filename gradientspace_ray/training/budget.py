"""How long each finetune trains and how fast it learns, so that experts and baseline are compared at equal terms.

The training tokens of a run are what was asked for. Tokens include prompts; a fraction of a pass has that share of its
tokens, to half an example: see `plan_steps`. The learning rate of all is the generalist's, fitted to their steps.
"""

from gradientspace_ray.recipe import (
    BudgetSection,
    ExpertsSection,
    Rate,
    SingleLoraSection,
    TrainingSection,
    WarmupSection,
)
from gradientspace_ray.training.schedule import WHOLE_COSINE, scaled_rate, step_size


class TrainingSettings(TrainingSection):
    """A recipe's section with all that the budget, the model and the cluster decide."""

    learning_rate: Rate


def warmup_settings(section: WarmupSection, budget: BudgetSection, tokens: int) -> WarmupSection:
    """The generalist's settings, with the passes that the budget leaves it.

    Args:
        section: the recipe's `warmup`.
        budget: the recipe's.
        tokens: of one pass over the generalist's examples.
    """
    if budget.tokens is None:
        return section
    return section.model_copy(update={"epochs": budget.tokens * budget.generalist_share / tokens})


def experts_settings(
    section: ExpertsSection, warmup: WarmupSection, budget: BudgetSection, tokens: int
) -> ExpertsSection:
    """The settings of all experts, with the passes that the budget leaves each of them.

    Args:
        section: the recipe's `experts`.
        warmup: the recipe's.
        budget: the recipe's.
        tokens: of one pass over all the experts' examples.
    """
    changes = {
        "learning_rate": section.learning_rate or _rate(warmup, section.examples_per_step),
        "warmup_share": _rise(section.start, section),
    }
    if budget.tokens is not None:
        changes["epochs"] = budget.tokens * (1 - budget.generalist_share) / tokens
    return section.model_copy(update=changes)


def one_expert(settings: ExpertsSection, examples: int) -> ExpertsSection:
    """The settings of the expert of so many examples: smaller steps where there would be too few.

    Args:
        settings: from `experts_settings`.
        examples: of the expert.
    """
    assert settings.learning_rate is not None
    size = step_size(examples, settings.epochs, settings.examples_per_step, settings.min_steps)
    rate = scaled_rate(settings.learning_rate, settings.examples_per_step, size)
    return settings.model_copy(update={"examples_per_step": size, "learning_rate": rate})


def single_lora_settings(
    section: SingleLoraSection,
    warmup: WarmupSection,
    experts: ExpertsSection,
    generalist_tokens: int,
    expert_tokens: int,
) -> TrainingSection:
    """The baseline's settings: as many tokens as made the experts, the generalist's among them where they continue it.

    Args:
        section: the recipe's `single_lora`.
        warmup: the recipe's.
        experts: the experts' resolved settings.
        generalist_tokens: that the generalist was trained on.
        expert_tokens: of one pass over the experts' examples, which are the baseline's.
    """
    epochs = experts.epochs
    if section.start == "fresh" and experts.start == "generalist":
        epochs += generalist_tokens / expert_tokens
    size = section.examples_per_step or experts.examples_per_step
    changes = {
        "epochs": epochs,
        "examples_per_step": size,
        "learning_rate": section.learning_rate or _rate(warmup, size),
        "warmup_share": _rise(section.start, warmup),
    }
    return experts.model_copy(update=changes)


def cosine_of(start: str, warmup: WarmupSection) -> tuple[float, float]:
    """The part of the cosine that a finetune goes along which starts from the `generalist`, or `fresh`."""
    return (warmup.cosine_share, 1.0) if start == "generalist" else WHOLE_COSINE


def _rate(warmup: WarmupSection, examples_per_step: int) -> float:
    """The generalist's learning rate, fitted to another size of steps."""
    assert warmup.learning_rate is not None, "see stages.train.with_learning_rate"
    return scaled_rate(warmup.learning_rate, warmup.examples_per_step, examples_per_step)


def _rise(start: str, section: TrainingSection) -> float:
    """Share of the steps in which the learning rate rises: what continues the generalist has its rise behind it."""
    return 0.0 if start == "generalist" else section.warmup_share
