"""DeepSpeed's configuration: what the recipe decides, what its `deepspeed` adds, and where the two differ."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradientspace_ray.recipe import RecipeError, TrainingSection, load_recipe
from gradientspace_ray.stages import train as train_stage
from gradientspace_ray.stages.deepspeed_engine import configuration


def configured(deepspeed=(), **changes):
    return configuration(TrainingSection(deepspeed=dict(deepspeed), **changes), "experts")


def flat(tree, path=""):
    """Dotted path -> value."""
    found = {}
    for key, value in tree.items():
        found |= flat(value, f"{path}{key}.") if isinstance(value, dict) and value else {f"{path}{key}": value}
    return found


def nested(path, value):
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


def test_the_recipe_decides_the_configuration():
    assert configured(zero_stage=2, max_grad_norm=0.3) == {
        "managed_gradient_accumulation": False,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.3,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": 2, "overlap_comm": False},
    }


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_offload_moves_the_optimizer_and_under_zero_3_the_weights(zero_stage):
    zero = configured(zero_stage=zero_stage, offload=True)["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "cpu"}
    assert zero.get("offload_param") == ({"device": "cpu"} if zero_stage == 3 else None)


def test_what_is_given_is_added_and_goes_before_the_defaults():
    given_tree = {
        "zero_optimization": {
            "overlap_comm": True,
            "stage3_param_persistence_threshold": 0,
            "offload_optimizer": {"pin_memory": True, "device": "cpu"},
        },
        "comms_logger": {"enabled": True},
        "wall_clock_breakdown": True,
    }
    before = json.dumps(given_tree)
    assert configured(given_tree, zero_stage=3, offload=True) == {
        "managed_gradient_accumulation": False,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "stage3_param_persistence_threshold": 0,
            "offload_optimizer": {"pin_memory": True, "device": "cpu"},
            "offload_param": {"device": "cpu"},
        },
        "comms_logger": {"enabled": True},
        "wall_clock_breakdown": True,
    }
    assert json.dumps(given_tree) == before


def test_a_configuration_of_other_trainers_with_auto_values_is_taken():
    # As Hugging Face's documentation gives it for ZeRO 2, without its optimizer's and scheduler's names.
    found = configured(
        {
            "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
            "bf16": {"enabled": "auto"},
            "optimizer": {"params": {"lr": "auto", "betas": "auto"}},
            "zero_optimization": {"stage": 2, "allgather_bucket_size": 2e8, "reduce_bucket_size": "auto"},
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
        },
        zero_stage=2,
    )
    assert "auto" not in flat(found).values()
    assert found["zero_optimization"] == {"stage": 2, "overlap_comm": False, "allgather_bucket_size": 2e8}
    assert found["gradient_clipping"] == 1.0
    assert not {"optimizer", "train_batch_size", "gradient_accumulation_steps"} & set(found)


CONFLICTS = [
    ("zero_optimization.stage", 3, "experts.zero_stage"),
    ("zero_optimization.offload_optimizer.device", "nvme", "experts.offload"),
    ("zero_optimization.offload_optimizer.device", "cpu", "experts.offload"),
    ("zero_optimization.offload_optimizer", "cpu", "experts.offload"),
    ("zero_optimization.offload_param.device", "cpu", "experts.offload"),
    ("zero_optimization", True, "experts.zero_stage"),
    ("zero_optimization.overlap_comm", True, "experts.zero_stage"),
    ("gradient_clipping", 0.5, "experts.max_grad_norm"),
    ("gradient_clipping", 0, "experts.max_grad_norm"),
    ("train_batch_size", 64, "experts.examples_per_step"),
    ("train_micro_batch_size_per_gpu", 4, "experts.tokens_per_batch"),
    ("gradient_accumulation_steps", 8, "experts.tokens_per_batch"),
    ("managed_gradient_accumulation", True, "experts.tokens_per_batch"),
    ("optimizer.type", "AdamW", "experts.learning_rate"),
    ("optimizer.params.lr", 1e-3, "experts.learning_rate"),
    ("optimizer", "AdamW", "experts.learning_rate"),
    ("scheduler.type", "WarmupLR", "experts.warmup_share"),
    ("activation_checkpointing.partition_activations", True, "experts.checkpointing"),
    ("fp16.enabled", True, "model.compute_dtype"),
    ("bf16.enabled", True, "model.compute_dtype"),
    ("torch_autocast.enabled", True, "model.compute_dtype"),
    ("amp.enabled", True, "model.compute_dtype"),
]


@pytest.mark.parametrize(("path", "value", "key"), CONFLICTS)
def test_a_conflict_names_both_keys(path, value, key):
    with pytest.raises(RecipeError) as caught:
        configured(nested(path, value))
    assert str(caught.value) == f"experts.deepspeed: {path} is decided by {key}; leave it out there"


def test_all_conflicts_are_named_in_one_line():
    with pytest.raises(RecipeError) as caught:
        configured({"zero_optimization": {"stage": 0}, "optimizer": {"type": "Adam", "params": {"lr": 1.0}}})
    assert str(caught.value) == (
        "experts.deepspeed: zero_optimization.stage is decided by experts.zero_stage, "
        "and optimizer.type is decided by experts.learning_rate, "
        "and optimizer.params.lr is decided by experts.learning_rate; leave it out there"
    )


@pytest.mark.parametrize(("path", "value", "key"), CONFLICTS)
@pytest.mark.parametrize("neutral", [False, None, "none", "auto", {}])
def test_what_asks_for_nothing_is_no_conflict(path, value, key, neutral):
    if any(name == path or name.startswith(f"{path}.") for name in flat(configured())):
        neutral = "auto"
    assert flat(configured(nested(path, neutral))).items() >= flat(configured()).items()


@given(zero_stage=st.integers(0, 3), offload=st.booleans(), clipping=st.floats(0.01, 10))
def test_what_the_recipe_decides_may_be_said_again(zero_stage, offload, clipping):
    changes = {"zero_stage": zero_stage, "offload": offload and zero_stage > 0, "max_grad_norm": clipping}
    found = configured(**changes)
    assert configured(found, **changes) == found


trees = st.recursive(
    st.integers() | st.text(max_size=3) | st.booleans() | st.none(),
    lambda inner: st.dictionaries(st.sampled_from(["stage", "overlap_comm", "zero_optimization", "a", "b"]), inner),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.sampled_from(["zero_optimization", "wall_clock_breakdown", "zero_force_ds_cpu_optimizer"]), trees
    )
)
def test_any_tree_is_merged_or_refused(tree):
    conflict = False
    try:
        found = flat(configured(tree, zero_stage=2))
    except RecipeError as error:
        found, conflict = {}, "is decided by experts.zero_stage" in str(error)
    assert conflict or found["zero_optimization.stage"] == 2
    for path, value in flat(tree).items():
        if not conflict and value not in ("auto", {}) and not path.startswith("zero_optimization.stage"):
            assert found[path] == value


def test_a_recipe_may_name_a_json_file(tmp_path):
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1, "reduce_bucket_size": 1000}}))
    recipe = load_recipe("tiny", [f"experts.deepspeed={path}"])
    assert recipe.experts.deepspeed == json.loads(path.read_text())
    assert configuration(recipe.experts, "experts")["zero_optimization"]["reduce_bucket_size"] == 1000
    train_stage.check(recipe)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"No such file"),
        ("{", r"no JSON file \(Expecting property name"),
        ("", r"no JSON file \(Expecting value"),
        ("[1]", r"valid dictionary, got \[1\]"),
    ],
)
def test_a_json_file_that_cannot_be_used_is_named(tmp_path, text, message):
    path = tmp_path / "zero.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe("tiny", [f"experts.deepspeed={path}"])
    assert "experts.deepspeed: " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("section", ["warmup", "experts"])
def test_the_stage_refuses_a_conflict_before_the_hours_are_spent(section):
    recipe = load_recipe("tiny", [f"{section}.deepspeed.optimizer.type=AdamW"])
    with pytest.raises(RecipeError, match=rf"^{section}\.deepspeed: optimizer\.type is decided by {section}\.learning"):
        train_stage.check(recipe)
