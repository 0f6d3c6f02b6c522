"""The finetunes on a real Ray with real DeepSpeed engines: what they commit, and what a second run does with it."""

import hashlib
import json
import time

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from peft import PeftModel
from reference_training import (
    adamw,
    assert_moments_are,
    flat_weights,
    give_moments,
    mean_loss,
    plain_training,
    random_examples,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gradientspace_ray.examples.splits import hashed_position
from gradientspace_ray.models.loading import add_lora, load_adapter
from gradientspace_ray.models.moments import MOMENTS_FILE, load_moments
from gradientspace_ray.recipe import parse_recipe
from gradientspace_ray.registry import adapter_digest, committed_digest
from gradientspace_ray.run import RunDirectory, digest_of
from gradientspace_ray.stages import finetune_worker, finetunes, train
from gradientspace_ray.stages.finetune_worker import ORDER_PURPOSE, Finetune, examples_of
from gradientspace_ray.stages.finetunes import committed
from gradientspace_ray.training.budget import TrainingSettings
from gradientspace_ray.training.engine import TrainingError
from gradientspace_ray.training.schedule import plan_steps

SEED = 7
NAMES = ["low-bytes", "high-bytes"]
# Two skills that tell themselves apart: tokens from two ranges of the vocabulary.
SKILLS = [random_examples(20, seed=1, low=10, high=40), random_examples(12, seed=2, low=120, high=150)]
EXAMPLES = [example for pair in zip(SKILLS[0][:12], SKILLS[1], strict=True) for example in pair] + SKILLS[0][12:]
CLUSTERS = [0, 1] * 12 + [0] * 8
HELD_OUT = random_examples(6, seed=3, low=10, high=40) + random_examples(6, seed=4, low=120, high=150)
WARMUP = {"epochs": 5, "learning_rate": 3e-2, "examples_per_step": 8, "tokens_per_batch": 100, "cosine_share": 0.6}
EXPERTS = {"epochs": 1, "examples_per_step": 5, "tokens_per_batch": 100}


def on_ray(test):
    return pytest.mark.ray(pytest.mark.slow(test))


def write_examples(run, examples, clusters=CLUSTERS, groups=None):
    columns = {
        "id": pa.array([f"{index:016x}" for index in range(len(examples))]),
        "input_ids": pa.array([ids for ids, _ in examples], pa.list_(pa.int32())),
        "labels": pa.array([labels for _, labels in examples], pa.list_(pa.int32())),
        "tokens": pa.array([len(ids) for ids, _ in examples], pa.int32()),
        "split_key": pa.array(groups or [f"question {index // 2}" for index in range(len(examples))]),
    }
    run.write_table("examples/train.parquet", pa.table(columns))
    run.write_table(
        "clusters/assignments.parquet", pa.table({"id": columns["id"], "cluster": pa.array(clusters, pa.int32())})
    )
    run.write_json("clusters/quality.json", {"count": 2, "names": NAMES})


def recipe_for(model_dir, **changes):
    tree = {
        "name": "tiny",
        "seed": SEED,
        "model": {"name": str(model_dir), "compute_dtype": "float32"},
        "data": {"sources": ["quickstart"]},
        "lora": {"rank": 4, "alpha": 8},
        "warmup": WARMUP,
        "experts": {**EXPERTS, "zero_stage": 2, "workers": 2},
        "single_lora": {"start": "generalist", "examples_per_step": 5},
        "compute": {"retries": 0},
    }
    return parse_recipe({**tree, **changes})


def base(model_dir):
    return AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation="eager").requires_grad_(False)


def opened(model_dir, folder):
    return PeftModel.from_pretrained(base(model_dir), folder)


def record(folder):
    return json.loads((folder / "training.json").read_text())


def expert_folders(run):
    return {folder.partition("@")[0]: run.fetch(f"experts/{folder}") for folder in run.names("experts")}


@pytest.fixture(scope="module")
def recipe(tiny_model_dir):
    return recipe_for(tiny_model_dir)


@pytest.fixture(scope="module")
def run(object_store):
    """On an object store, where the workers commit what they trained."""
    run = RunDirectory(object_store())
    write_examples(run, EXAMPLES)
    return run


@pytest.fixture(scope="module")
def generalist(ray_cluster, recipe, run):
    """The warm-up's summary."""
    return train.warmup(recipe, run)


@pytest.fixture(scope="module")
def experts(generalist, recipe, run):
    """Two runs of the experts stage: in the first one, an example of the second cluster cannot be read.

    Returns the first one's error, what it left, and the second one's summary.
    """
    run.write_bytes("experts/old-name@0123456789ab/training.json", b'{"key": "of another clustering"}')
    unreadable = [*EXAMPLES[:1], ([100_000] * 9, [100_000] * 9), *EXAMPLES[2:]]
    write_examples(run, unreadable)
    with pytest.raises(TrainingError) as error:
        train.experts(recipe, run)
    left = {folder: record(run.fetch(f"experts/{folder}")) for folder in run.names("experts")}
    logs = run.names("failures")
    write_examples(run, EXAMPLES)
    return str(error.value), left, logs, train.experts(recipe, run)


@pytest.fixture(params=["local", "s3"])
def empty_run(request, tmp_path):
    return RunDirectory(tmp_path if request.param == "local" else request.getfixturevalue("object_store")())


def finetune_of(cluster):
    name = "generalist" if cluster is None else "low-bytes"
    return Finetune(
        name=name,
        section="warmup",
        settings=TrainingSettings(learning_rate=1e-3),
        cluster=cluster,
        start=None,
        cosine=(0.0, 1.0),
        key="the key",
        tokens=10,
        steps=1,
    )


def write_adapter(run, cluster, weights=b"weights"):
    """A committed adapter of `finetune_of(cluster)`; returns its folder."""
    finetune = finetune_of(cluster)
    made = {"key": finetune.key, "name": finetune.name, "cluster": cluster, "examples": 1, "tokens": 10, "steps": 1}
    made |= {"seconds": 1.0, "workers": 1, "zero_stage": 1, "losses": [1.0]}
    files = {"adapter_config.json": b"{}", "adapter_model.safetensors": weights}
    run.write_bytes("scratch/adapter_config.json", files["adapter_config.json"])
    run.write_bytes("scratch/adapter_model.safetensors", files["adapter_model.safetensors"])
    digest = committed_digest(run, "scratch")
    folder = finetune.name if cluster is None else f"experts/{finetune.name}@{digest}"
    files |= {} if cluster is not None else {MOMENTS_FILE: b"moments"}
    with run.staged(folder, last="training.json") as staged:
        for name, data in files.items():
            (staged / name).write_bytes(data)
        (staged / "training.json").write_text(json.dumps(made))
    return folder


@pytest.mark.parametrize("cluster", [None, 0])
def test_a_whole_adapter_counts_as_committed(empty_run, cluster):
    assert committed(empty_run, finetune_of(cluster)) is None
    folder = write_adapter(empty_run, cluster)
    made = committed(empty_run, finetune_of(cluster))
    assert (made.folder, made.record.losses) == (folder, [1.0])
    assert made.digest == adapter_digest(empty_run.fetch(folder))
    assert committed(empty_run, finetune_of(cluster).model_copy(update={"key": "another"})) is None


@pytest.mark.parametrize("cluster", [None, 0])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "training.json"])
def test_an_adapter_without_one_of_its_files_is_not_committed(empty_run, cluster, name):
    folder = write_adapter(empty_run, cluster)
    empty_run.delete(f"{folder}/{name}")
    assert committed(empty_run, finetune_of(cluster)) is None


@pytest.mark.parametrize("cluster", [None, 0])
@pytest.mark.parametrize("data", [b"", b'{"key": "the key"', b'{"key": "the key"}', b"[]"])
def test_an_adapter_with_a_damaged_record_is_not_committed(empty_run, cluster, data):
    folder = write_adapter(empty_run, cluster)
    empty_run.write_bytes(f"{folder}/training.json", data)
    assert committed(empty_run, finetune_of(cluster)) is None


def test_an_expert_whose_digest_is_not_that_of_its_files_is_not_committed(empty_run):
    folder = write_adapter(empty_run, 0)
    empty_run.write_bytes(f"{folder}/adapter_model.safetensors", b"weigh")
    assert committed(empty_run, finetune_of(0)) is None
    other = write_adapter(empty_run, 0, b"other weights")
    assert committed(empty_run, finetune_of(0)).folder == other


def test_the_single_lora_sees_what_the_experts_see_and_the_generalist_everything(empty_run, tiny_model_dir):
    left_out = {0, 3, 30}
    recipe = recipe_for(tiny_model_dir)
    write_adapter(empty_run, None)
    plans = {}
    for kind, places in (("all", set()), ("some", left_out)):
        clusters = [-1 if place in places else cluster for place, cluster in enumerate(CLUSTERS)]
        write_examples(empty_run, EXAMPLES, clusters)
        plans[kind] = {
            "generalist": train.plan_generalist(recipe, empty_run),
            **dict(zip((0, 1, "single_lora"), train.plan_experts(recipe, empty_run), strict=True)),
        }
    tokens = {kind: {name: plan.tokens for name, plan in own.items()} for kind, own in plans.items()}
    lengths = [len(ids) for ids, _ in EXAMPLES]
    assert plans["some"]["generalist"] == plans["all"]["generalist"]
    assert tokens["all"]["generalist"] == 5 * sum(lengths)
    assert tokens["all"]["single_lora"] == sum(lengths)
    assert tokens["some"]["single_lora"] == sum(lengths) - sum(lengths[place] for place in left_out)
    for own in tokens.values():
        assert own["single_lora"] == own[0] + own[1]
    assert plans["some"]["single_lora"].key != plans["all"]["single_lora"].key

    table = examples_of(recipe, empty_run, "experts", None, ["input_ids"])[0]
    kept = [list(ids) for place, (ids, _) in enumerate(EXAMPLES) if place not in left_out]
    assert table["input_ids"].to_pylist() == kept
    write_examples(empty_run, EXAMPLES, [0] * len(EXAMPLES))
    with pytest.raises(TrainingError, match=r"cluster 1 of clusters/assignments.parquet holds no training examples"):
        examples_of(recipe, empty_run, "experts", 1, ["input_ids"])


def test_a_cluster_that_would_be_held_out_as_a_whole_is_trained_on(empty_run, tiny_model_dir):
    # Examples of one group are held out together.
    write_examples(empty_run, EXAMPLES, CLUSTERS, groups=[f"group {cluster}" for cluster in CLUSTERS])
    held_out = [hashed_position(f"group {cluster}", finetune_worker.HELD_OUT) for cluster in (0, 1)]
    share = (min(held_out) + max(held_out)) / 2
    recipe = recipe_for(tiny_model_dir, experts={**EXPERTS, "heldout_share": share})
    for cluster, position in enumerate(held_out):
        trained, heldout = examples_of(recipe, empty_run, "experts", cluster, ["id"])
        assert (trained.num_rows, heldout.num_rows) == (CLUSTERS.count(cluster), 0)
        assert (position < share) == (cluster == held_out.index(min(held_out)))
    single, heldout = examples_of(recipe, empty_run, "experts", None, ["id"])
    assert (single.num_rows, heldout.num_rows) == (len(EXAMPLES), 0)
    # The generalist sees none of it.
    known = examples_of(recipe, empty_run, "warmup", None, ["id"])[0]
    assert known.num_rows == CLUSTERS.count(held_out.index(max(held_out)))


@pytest.mark.parametrize("changed", [(0, 3), (1, -1)])
def test_other_tokens_or_labels_of_the_same_text_are_another_finetune(empty_run, tiny_model_dir, changed):
    recipe = recipe_for(tiny_model_dir)
    write_examples(empty_run, EXAMPLES)
    before = train.plan_generalist(recipe, empty_run)
    assert train.plan_generalist(recipe, empty_run) == before
    column, place = changed
    examples = [tuple(map(list, example)) for example in EXAMPLES]
    examples[5][column][place] = 7
    write_examples(empty_run, examples)
    after = train.plan_generalist(recipe, empty_run)
    assert (after.key != before.key, after.tokens, after.steps) == (True, before.tokens, before.steps)


def test_other_tokens_of_one_cluster_change_nothing_for_another(empty_run, tiny_model_dir):
    recipe = recipe_for(tiny_model_dir, experts={**EXPERTS, "start": "fresh"}, single_lora={"train": False})
    write_examples(empty_run, EXAMPLES)
    before = train.plan_experts(recipe, empty_run)
    examples = [tuple(map(list, example)) for example in EXAMPLES]
    examples[1][0][3] = 7
    write_examples(empty_run, examples)
    after = train.plan_experts(recipe, empty_run)
    assert [its.key == own.key for its, own in zip(after, before, strict=True)] == [True, False]


@pytest.mark.parametrize("changed", ["weights", "moments", "cosine_share"])
def test_what_continues_another_generalist_is_another_finetune(empty_run, tiny_model_dir, changed):
    def keys(experts, single_lora):
        recipe = recipe_for(
            tiny_model_dir,
            warmup={**WARMUP, "cosine_share": share},
            experts={**EXPERTS, "start": experts},
            single_lora={"start": single_lora},
        )
        return [plan.key for plan in train.plan_experts(recipe, empty_run)]

    share = 0.6
    write_examples(empty_run, EXAMPLES)
    write_adapter(empty_run, None)
    before = keys("generalist", "fresh"), keys("generalist", "generalist"), keys("fresh", "fresh")
    if changed == "cosine_share":
        share = 0.7
    else:
        name = MOMENTS_FILE if changed == "moments" else "adapter_model.safetensors"
        empty_run.write_bytes(f"generalist/{name}", b"others")
    after = keys("generalist", "fresh"), keys("generalist", "generalist"), keys("fresh", "fresh")
    assert [[old != now for old, now in zip(*pair, strict=True)] for pair in zip(before, after, strict=True)] == [
        [True, True, False],
        [True, True, True],
        [False, False, False],
    ]


def test_fresh_experts_go_along_the_whole_cosine_and_rise_first(empty_run, tiny_model_dir):
    write_examples(empty_run, EXAMPLES)
    recipe = recipe_for(
        tiny_model_dir,
        warmup={**WARMUP, "warmup_share": 0.2},
        experts={**EXPERTS, "start": "fresh", "warmup_share": 0.3},
        single_lora={"start": "fresh"},
    )
    *experts, single = train.plan_experts(recipe, empty_run)
    assert {(plan.start, plan.cosine, plan.settings.warmup_share) for plan in experts} == {(None, (0.0, 1.0), 0.3)}
    assert (single.start, single.cosine, single.settings.warmup_share) == (None, (0.0, 1.0), 0.2)
    rates = [plan.settings.learning_rate for plan in (*experts, single)]
    assert rates == pytest.approx([3e-2 * (5 / 8) ** 0.5] * 3)


@on_ray
def test_generalist_is_that_of_a_plain_loop(generalist, run, tiny_model_dir):
    model = add_lora(base(tiny_model_dir), 4, 8, "all-linear", SEED)
    steps = plan_steps(len(EXAMPLES), 8, 5, [SEED, ORDER_PURPOSE["warmup"]])
    optimizer = adamw(model)
    losses = plain_training(model, EXAMPLES, steps, peak=3e-2, warmup_share=0.1, cosine=(0.0, 0.6), optimizer=optimizer)
    made = record(run.fetch("generalist"))
    np.testing.assert_allclose(made["losses"], losses, atol=1e-4)
    torch.testing.assert_close(
        flat_weights(load_adapter(base(tiny_model_dir), run.fetch("generalist"), trainable=True)),
        flat_weights(model),
        atol=1e-4,
        rtol=0,
    )
    assert_moments_are(load_moments(run.fetch("generalist")), model, optimizer)
    assert made["steps"] == len(steps) == generalist.counts["steps"]
    assert made["tokens"] == 5 * sum(len(ids) for ids, _ in EXAMPLES)
    assert (made["workers"], made["zero_stage"]) == (1, 1)
    moments = hashlib.sha256((run.fetch("generalist") / MOMENTS_FILE).read_bytes()).hexdigest()
    assert generalist.output == digest_of([adapter_digest(run.fetch("generalist")), moments])


@on_ray
def test_generalist_lowers_the_loss_of_examples_that_it_has_not_seen(generalist, run, tiny_model_dir):
    with torch.no_grad():
        before = mean_loss(base(tiny_model_dir), HELD_OUT)
        after = mean_loss(opened(tiny_model_dir, run.fetch("generalist")), HELD_OUT)
    assert after < before - 0.3


@on_ray
@pytest.mark.parametrize("name", [*NAMES, "single_lora"])
def test_experts_continue_the_generalist_as_a_plain_loop_does(experts, run, tiny_model_dir, name):
    folder = run.fetch("single_lora") if name == "single_lora" else expert_folders(run)[name]
    examples = EXAMPLES
    if name != "single_lora":
        examples = [e for e, cluster in zip(EXAMPLES, CLUSTERS, strict=True) if cluster == NAMES.index(name)]
    model = load_adapter(base(tiny_model_dir), run.fetch("generalist"), trainable=True)
    optimizer = adamw(model)
    give_moments(optimizer, model, load_moments(run.fetch("generalist")))
    steps = plan_steps(len(examples), 5, 1, [SEED, ORDER_PURPOSE["experts"]])
    peak = 3e-2 * (5 / 8) ** 0.5
    losses = plain_training(model, examples, steps, peak=peak, warmup_share=0, cosine=(0.6, 1.0), optimizer=optimizer)
    made = record(folder)
    np.testing.assert_allclose(made["losses"], losses, atol=1e-4)
    assert (made["workers"], made["zero_stage"], made["examples"]) == (2, 2, len(examples))
    with torch.no_grad():
        found = mean_loss(opened(tiny_model_dir, folder), HELD_OUT)
        torch.testing.assert_close(found, mean_loss(model, HELD_OUT), atol=1e-4, rtol=0)


@on_ray
def test_single_lora_sees_as_many_tokens_as_all_experts(experts, run):
    folders = expert_folders(run)
    assert record(run.fetch("single_lora"))["tokens"] == sum(record(folders[name])["tokens"] for name in NAMES)


@on_ray
def test_folders_are_named_by_their_digest_and_hold_an_adapter_that_names_its_base(experts, run, tiny_model_dir):
    for folder in run.names("experts"):
        path = run.fetch(f"experts/{folder}")
        assert folder.partition("@")[2] == adapter_digest(path)
        assert not (path / MOMENTS_FILE).exists()
        assert json.loads((path / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny_model_dir)
        assert all(weight.dtype == torch.float32 for weight in load_file(path / "adapter_model.safetensors").values())


@on_ray
def test_a_failed_finetune_leaves_the_others_and_is_named_in_one_line(experts, run):
    message, left, logs, _ = experts
    assert "\n" not in message
    assert "2 of 3 finetunes failed" in message
    assert "high-bytes: IndexError: index out of range in self" in message
    assert f"mend that, then: gradientspace resume '{run.uri}'" in message
    assert logs == ["high-bytes.log", "single_lora.log"]
    assert "low-bytes" in {folder.partition("@")[0] for folder in left}


@on_ray
def test_the_next_run_trains_only_what_is_missing_and_removes_what_is_stale(experts, run):
    _, left, _, summary = experts
    kept = next(folder for folder in left if folder.startswith("low-bytes@"))
    # Not a copy that was fetched before.
    assert run.read_json(f"experts/{kept}/training.json") == left[kept]
    assert "old-name@0123456789ab" in left
    assert sorted(expert_folders(run)) == sorted(NAMES)
    assert summary.counts["experts"] == 2
    assert run.names("failures") == []
    assert not run.exists("checkpoints")


@on_ray
def test_a_finished_stage_trains_nothing(experts, recipe, run, monkeypatch):
    monkeypatch.setattr(finetunes, "_launch", None)
    assert train.experts(recipe, run) == experts[3]
    assert train.warmup(recipe, run).made.startswith("generalist from 32 examples")


@on_ray
def test_without_the_baseline_its_folder_goes_and_no_expert_is_trained_again(experts, recipe, run, tiny_model_dir):
    before = {name: record(folder) for name, folder in expert_folders(run).items()}
    single = (run.fetch("single_lora") / "training.json").read_text()
    train.experts(recipe_for(tiny_model_dir, single_lora={"train": False}), run)
    assert {name: record(folder) for name, folder in expert_folders(run).items()} == before
    assert not run.exists("single_lora")
    assert single


@on_ray
def test_a_loss_that_is_not_finite_is_not_tried_again(ray_cluster, tiny_model_dir, tmp_path):
    run = RunDirectory(tmp_path)
    write_examples(run, EXAMPLES)
    section = {**WARMUP, "learning_rate": 1e30, "max_grad_norm": 1e30}
    recipe = recipe_for(tiny_model_dir, warmup=section, compute={"retries": 50})
    with pytest.raises(TrainingError, match=r"generalist: the loss is nan at step 2 of 20 \(learning rate 6\.7e\+29\)"):
        train.warmup(recipe, run)
    assert not run.exists("generalist")


@on_ray
def test_ctrl_c_ends_the_trainer_and_its_workers(ray_cluster, tiny_model_dir, tmp_path, monkeypatch):
    run = RunDirectory(tmp_path)
    write_examples(run, EXAMPLES)
    recipe = recipe_for(tiny_model_dir, warmup={**WARMUP, "epochs": 10_000})
    ray_wait, calls = ray.wait, []

    def interrupted_wait(tasks, **arguments):
        calls.append(tasks)
        if len(calls) > 1:
            return ray_wait(tasks, **arguments)
        deadline = time.monotonic() + 90
        while ray.available_resources()["CPU"] == 4:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        raise KeyboardInterrupt

    monkeypatch.setattr(finetunes.ray, "wait", interrupted_wait)
    with pytest.raises(KeyboardInterrupt):
        train.warmup(recipe, run)
    assert len(calls) == 2
    deadline = time.monotonic() + 60
    while ray.available_resources()["CPU"] < 4:
        assert time.monotonic() < deadline, "a worker is still running"
        time.sleep(0.5)
