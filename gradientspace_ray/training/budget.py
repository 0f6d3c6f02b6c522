"""How many passes over its examples each finetune makes, so that the training tokens of a run are what was asked for.

Tokens include prompts. A fraction of a pass has that share of its tokens, to half an example: see `plan_steps`.
"""

from gradientspace_ray.recipe import BudgetSection, ExpertsSection, SingleLoraSection, TrainingSection
from gradientspace_ray.training.schedule import step_size


def warmup_settings(section: TrainingSection, budget: BudgetSection, tokens: int) -> TrainingSection:
    """The generalist's settings, with the passes that the budget leaves it.

    Args:
        section: the recipe's `warmup`.
        budget: the recipe's.
        tokens: of one pass over the generalist's examples.
    """
    if budget.tokens is None:
        return section
    return section.model_copy(update={"epochs": budget.tokens * budget.generalist_share / tokens})


def experts_settings(section: ExpertsSection, budget: BudgetSection, tokens: int) -> ExpertsSection:
    """The settings of all experts, with the passes that the budget leaves each of them.

    Args:
        section: the recipe's `experts`.
        budget: the recipe's.
        tokens: of one pass over all the experts' examples.
    """
    if budget.tokens is None:
        return section
    return section.model_copy(update={"epochs": budget.tokens * (1 - budget.generalist_share) / tokens})


def one_expert(settings: ExpertsSection, examples: int) -> ExpertsSection:
    """The settings of the expert of so many examples: smaller steps where there would be too few."""
    size = step_size(examples, settings.epochs, settings.examples_per_step, settings.min_steps)
    return settings.model_copy(update={"examples_per_step": size})


def single_lora_settings(
    section: SingleLoraSection,
    warmup: TrainingSection,
    experts: ExpertsSection,
    warmup_tokens: int,
    expert_tokens: int,
) -> TrainingSection:
    """The baseline's settings: as many tokens as made the experts, the generalist's among them where they continue it.

    Args:
        section: the recipe's `single_lora`.
        warmup: the generalist's resolved settings.
        experts: the experts' resolved settings.
        warmup_tokens: of one pass over the generalist's examples.
        expert_tokens: of one pass over the experts' examples, which are the baseline's.
    """
    epochs = experts.epochs
    if section.start == "fresh" and experts.start == "generalist":
        epochs += warmup.epochs * warmup_tokens / expert_tokens
    changes = {
        "epochs": epochs,
        "learning_rate": section.learning_rate or experts.learning_rate,
        "examples_per_step": section.examples_per_step or experts.examples_per_step,
    }
    return experts.model_copy(update=changes)
