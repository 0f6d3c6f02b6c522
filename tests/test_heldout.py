"""What a finetune holds out: whole groups, unknown to the generalist, to stop by and to choose the weights by."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference_training import mean_loss
from test_train_stage import (
    CLUSTERS,
    EXAMPLES,
    EXPERTS,
    NAMES,
    WARMUP,
    expert_folders,
    on_ray,
    opened,
    recipe_for,
    record,
    write_examples,
)

from gradientspace_ray.examples.splits import hashed_position
from gradientspace_ray.run import RunDirectory
from gradientspace_ray.stages import train
from gradientspace_ray.stages.finetune_worker import examples_of
from gradientspace_ray.training.engine import TrainingError

SHARE = 0.3
HOLDING_OUT = {
    "warmup": {**WARMUP, "epochs": 1},
    # A rate at which the loss of other examples rises again.
    "experts": {
        **EXPERTS,
        "epochs": 30,
        "learning_rate": 3e-2,
        "heldout_share": SHARE,
        "evaluate_every": 2,
        "patience": 3,
    },
    "single_lora": {"train": False},
}


@given(st.text(), st.text())
def test_positions_are_shares_that_case_and_spacing_leave_alone(key, purpose):
    assert 0 <= hashed_position(key, purpose) < 1
    assert hashed_position(key) == hashed_position(f"  {' '.join(key.split())} ")


def test_positions_are_even_and_one_purpose_says_nothing_of_another():
    positions_NP = np.array(
        [[hashed_position(f"key {n}"), hashed_position(f"key {n}", "held out: ")] for n in range(4000)]
    )
    counts, _ = np.histogram(positions_NP[:, 0], bins=10, range=(0, 1))
    # 400 are expected in each, with a standard deviation of 19.
    assert abs(counts - 400).max() < 80
    assert abs(np.corrcoef(positions_NP.T)[0, 1]) < 0.06


@pytest.fixture
def run(tmp_path):
    run = RunDirectory(tmp_path / "run")
    write_examples(run, EXAMPLES)
    return run


def ids(table):
    return set(table["id"].to_pylist())


def test_what_experts_hold_out_is_trained_on_by_nobody(run, tiny_model_dir):
    recipe = recipe_for(tiny_model_dir, **HOLDING_OUT)
    keys = dict(
        zip(*(run.read_table("examples/train.parquet")[name].to_pylist() for name in ("id", "split_key")), strict=True)
    )
    generalist, none = examples_of(recipe, run, "warmup", None, ["id"])
    single, held_out = examples_of(recipe, run, "experts", None, ["id"])
    assert none.num_rows == 0
    assert held_out.num_rows > 3
    assert ids(generalist) == ids(single)
    assert ids(single) | ids(held_out) == set(keys)
    assert not {keys[place] for place in ids(single)} & {keys[place] for place in ids(held_out)}
    parts = [examples_of(recipe, run, "experts", cluster, ["id"]) for cluster in range(2)]
    for part, whole in zip(zip(*parts, strict=True), (single, held_out), strict=True):
        assert ids(part[0]) | ids(part[1]) == ids(whole)
        assert not ids(part[0]) & ids(part[1])


def test_a_part_that_leaves_nothing_is_told(run, tiny_model_dir):
    write_examples(run, EXAMPLES[:1], [0])
    recipe = recipe_for(tiny_model_dir, experts={**EXPERTS, "heldout_share": 0.999999})
    with pytest.raises(TrainingError, match="lower the heldout_share of warmup and experts"):
        examples_of(recipe, run, "warmup", None, ["id"])


@on_ray
def test_experts_stop_early_and_keep_the_weights_of_the_lowest_held_out_loss(ray_cluster, run, tiny_model_dir):
    recipe = recipe_for(tiny_model_dir, **HOLDING_OUT)
    train.warmup(recipe, run)
    train.experts(recipe, run)
    stopped = 0
    for cluster, name in enumerate(NAMES):
        folder = expert_folders(run)[name]
        made = record(folder)
        found = dict(made["heldout"])
        assert made["best_step"] == min(found, key=found.get)
        stopped += made["steps"] < 30 * CLUSTERS.count(cluster) * (1 - SHARE) // 5
        held_out = examples_of(recipe, run, "experts", cluster, ["input_ids", "labels"])[1].to_pylist()
        assert made["heldout_examples"] == len(held_out)
        with torch.no_grad():
            loss = mean_loss(opened(tiny_model_dir, folder), [(row["input_ids"], row["labels"]) for row in held_out])
        assert float(loss) == pytest.approx(found[made["best_step"]], abs=1e-4)
    assert stopped
