"""The gradient stage on a real Ray: shards, resume, damage, the merge tree, and the numbers against autograd."""

import dataclasses
import json
import shutil
from unittest.mock import MagicMock

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from synthetic_run import synthetic_recipe, write_adapter, write_examples

from gradientspace_ray.errors import one_line
from gradientspace_ray.gradients.per_sample import ExampleTooLargeError, PerSampleGradients
from gradientspace_ray.models.loading import load_adapter, load_base
from gradientspace_ray.models.moments import AdamMoments, MomentsError, save_moments
from gradientspace_ray.run import RunDirectory, RunError, digest_of
from gradientspace_ray.sketch.columns import load_sketch
from gradientspace_ray.sketch.tree import merge_tree
from gradientspace_ray.stages import extract as extract_stage
from gradientspace_ray.stages.extract import extract, plan_shards
from gradientspace_ray.stages.merge import _merge_node, merge

COUNT = 22


def recipe_for(model_dir, **gradients):
    sections = {
        "gradients": {"examples_per_shard": 5, "tokens_per_batch": 256, "workers": 2, **gradients},
        "sketch": {"rank": 30},
        "compute": {"cpus_per_worker": 0.5},
    }
    return synthetic_recipe(model_dir, model_dir, **sections)


def new_run(folder, model_dir, count=COUNT):
    run = RunDirectory(folder)
    write_examples(run, model_dir, "train", count, True, 0)
    write_adapter(run, "generalist", model_dir, 1)
    return run


def autograd_gradients(run, model_dir):
    """Unit gradients by plain autograd, one example at a time, in the order of sorted ids."""
    model = load_adapter(load_base(str(model_dir)), run.fetch("generalist"), trainable=True)
    rows = sorted(run.read_table("examples/train.parquet").to_pylist(), key=lambda row: row["id"])
    weights = [weight for name, weight in model.named_parameters() if "lora_" in name]
    gradients = []
    for row in rows:
        ids, labels = (torch.tensor([row[key]]) for key in ("input_ids", "labels"))
        loss = model(input_ids=ids, labels=labels).loss
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]).double())
    return [row["id"] for row in rows], torch.nn.functional.normalize(torch.stack(gradients), dim=1)


def coordinates(run):
    table = run.read_table("sketch/coordinates.parquet")
    return table["id"].to_pylist(), np.array(table["coordinates"].to_pylist())


def test_shards_follow_from_the_ids_and_the_settings():
    ids = [f"{index:02d}" for index in range(13)]
    shards = plan_shards(ids[::-1], 5, {"rank": 4})
    assert [len(shard.ids) for shard in shards] == [5, 4, 4]
    assert [id_ for shard in shards for id_ in shard.ids] == ids
    assert plan_shards(ids, 5, {"rank": 4}) == shards
    assert not {s.name for s in shards} & {s.name for s in plan_shards(ids, 5, {"rank": 5})}
    more = plan_shards([*ids, "99"], 5, {"rank": 4})
    assert shards[0].name == more[0].name
    assert shards[-1].name != more[-1].name
    assert len(plan_shards(["a"], 100, None)) == 1
    assert shards[0].name == f"00000.{digest_of([ids[:5], {'rank': 4}])}"


def test_the_recipe_decides_how_gradients_are_made(tiny_model_dir, tmp_path):
    run = new_run(tmp_path / "run", tiny_model_dir)
    options = {"preconditioner": "less", "normalisation": "module", "dtype": "bfloat16", "loss": "sum"}
    recipe = recipe_for(tiny_model_dir, **options, checkpointing=True, tokens_per_batch="auto")
    with pytest.raises(MomentsError, match=r"optimizer_moments.safetensors is missing.*--again warmup"):
        extract_stage._decisive(recipe, run)
    model = load_adapter(load_base(str(tiny_model_dir)), run.fetch("generalist"))
    columns = PerSampleGradients(model).columns
    first, second = ({name: torch.full(shape, value) for name, _, shape in columns} for value in (1e-4, 1e-6))
    moments = AdamMoments(first, second, 5, (0.9, 0.999), 1e-8)
    save_moments(moments, tmp_path / "run/generalist")
    decisive = extract_stage._decisive(recipe, run)
    engine = extract_stage.Extractor(recipe, run.uri, MagicMock(), COUNT)._engine
    examples = [([5, 6, 7, 8, 9, 10], [-100, -100, 7, 8, 9, 10]), ([9, 3, 4], [-100, 3, 4])]
    expected = PerSampleGradients(
        model, loss="sum", preconditioner="less", moments=moments, normalisation="module"
    ).gradients(examples)
    gradients = engine.gradients(examples)
    assert gradients.dtype == torch.bfloat16
    torch.testing.assert_close(gradients.float(), expected, rtol=0.01, atol=1e-4)
    save_moments(dataclasses.replace(moments, step=6), tmp_path / "run/generalist")
    assert extract_stage._decisive(recipe, run) != decisive


def test_an_example_that_does_not_fit_into_memory_is_named(tiny_model_dir, tmp_path, monkeypatch):
    run, recipe = new_run(tmp_path / "run", tiny_model_dir), recipe_for(tiny_model_dir)
    extractor = extract_stage.Extractor(recipe, run.uri, MagicMock(), COUNT)
    ids = sorted(run.read_table("examples/train.parquet")["id"].to_pylist())
    engine = extractor._engine

    def gradients(examples, out):
        raise ExampleTooLargeError(2, "its 9 tokens do not fit")

    monkeypatch.setattr(engine, "gradients", gradients)
    shard = plan_shards(ids, 5, None)[1]
    (failure,) = extractor({"name": np.array([shard.name]), "ids": np.array([shard.ids])})["failure"]
    assert failure == f"shard {shard.name}: example {shard.ids[2]} (examples/train.parquet): its 9 tokens do not fit"


def test_a_gradient_that_is_not_finite_names_its_example(tiny_model_dir, tmp_path):
    run, recipe = new_run(tmp_path / "run", tiny_model_dir), recipe_for(tiny_model_dir)
    extractor = extract_stage.Extractor(recipe, run.uri, MagicMock(), COUNT)
    ids = sorted(run.read_table("examples/train.parquet")["id"].to_pylist())
    gradients = extractor._engine.gradients
    seen = 0

    def poisoned(examples, out):
        nonlocal seen
        gradients(examples, out)
        if seen <= 20 < seen + len(examples):
            out[20 - seen, 3] = torch.nan
        seen += len(examples)
        return out

    extractor._engine.gradients = poisoned
    extractor._buffer_BD = extractor._buffer_BD[:8]
    result = extractor({"name": np.array(["00000.shard"]), "ids": np.array([ids], dtype=object)})
    assert result["failure"] == [
        f"shard 00000.shard: the gradient of example {ids[20]} (examples/train.parquet) is not finite; "
        "remove it from the data, or lower warmup.learning_rate"
    ]
    assert not run.exists("sketch/shards/00000.shard")


@pytest.mark.ray
@pytest.mark.slow
def test_sketch_of_a_run_on_an_object_store_is_that_of_its_gradients(ray_cluster, object_store, tiny_model_dir, capfd):
    run, recipe = new_run(object_store(), tiny_model_dir), recipe_for(tiny_model_dir)
    summary = extract(recipe, run)
    assert summary.counts == {"examples": COUNT, "shards": 5, "shards_reused": 0, "sketches_damaged": 0}
    assert len(run.names("sketch/shards")) == 5
    first_bytes = {name: run.read_bytes(f"sketch/shards/{name}/sketch.json") for name in run.names("sketch/shards")}

    # A committed shard is reused, a damaged one is made again, to the byte.
    damaged = run.names("sketch/shards")[1]
    run.write_bytes(f"sketch/shards/{damaged}/block-00000.safetensors", run_bytes_with_a_flip(run, damaged))
    run.delete(f"sketch/shards/{run.names('sketch/shards')[2]}")
    summary = extract(recipe, run)
    assert summary.counts["shards_reused"] == 3
    assert summary.counts["sketches_damaged"] == 1
    assert first_bytes == {name: run.read_bytes(f"sketch/shards/{name}/sketch.json") for name in first_bytes}

    summary = merge(recipe, run)
    assert sorted(run.names("sketch")) == ["coordinates.parquet", "plan.json", "rows", "spectrum.json"]
    ids, gradients_ND = autograd_gradients(run, tiny_model_dir)
    found_ids, coordinates_NK = coordinates(run)
    assert found_ids == ids
    products = coordinates_NK @ coordinates_NK.T
    assert np.allclose(products, (gradients_ND @ gradients_ND.T).numpy(), atol=2e-4)
    spectrum = run.read_json("sketch/spectrum.json")
    assert spectrum["energy_total"] == pytest.approx(COUNT)
    assert spectrum["captured_share"] == pytest.approx(1, abs=1e-6)
    assert spectrum["dimension"] == gradients_ND.shape[1]
    assert np.allclose(spectrum["singular_values"], torch.linalg.svdvals(gradients_ND), atol=1e-4)
    sketch, _ = load_sketch(run.fetch("sketch/rows"))
    assert torch.allclose(sketch.coordinates @ sketch.rows.double(), gradients_ND, atol=1e-4)

    # Both halves again, as after a kill before the manifest's entry: nothing is computed.
    summary = extract(recipe, run)
    assert summary.counts["shards_reused"] == 5
    assert merge(recipe, run).counts["merges"] == 0
    assert np.array_equal(coordinates(run)[1], coordinates_NK)

    noise = capfd.readouterr().err
    assert "ray-data.log" not in noise
    assert "Traceback" not in noise
    assert f"gradients: {COUNT}/{COUNT}" in noise


def run_bytes_with_a_flip(run, shard):
    data = bytearray(run.read_bytes(f"sketch/shards/{shard}/block-00000.safetensors"))
    data[-1] ^= 1
    return bytes(data)


@pytest.mark.ray
@pytest.mark.slow
def test_a_merge_that_was_killed_goes_on_where_it_stood(ray_cluster, tiny_model_dir, tmp_path):
    recipe = recipe_for(tiny_model_dir)
    run = new_run(tmp_path / "run", tiny_model_dir)
    extract(recipe, run)
    whole = RunDirectory(tmp_path / "whole")
    shutil.copytree(run.path(), whole.path())
    merge(recipe, whole)

    # Killed after one pair was merged: that node is there, its leaves are gone.
    root = merge_tree(run.read_json("sketch/plan.json")["leaves"])
    *_, left = iter_first_parents(root)

    ray.get(_merge_node.remote(run.uri, left, recipe.sketch.rank))
    assert len(run.names("sketch/shards")) == 3

    summary = extract(recipe, run)
    assert summary.counts["shards_reused"] == 5
    summary = merge(recipe, run)
    assert summary.counts["merges"] == 3
    for name in ("sketch/coordinates.parquet", "sketch/spectrum.json", "sketch/rows/block-00000.safetensors"):
        assert run.read_bytes(name) == whole.read_bytes(name)

    # A leaf that vanished is an error that says what to do.
    run.delete("sketch/rows")
    with pytest.raises(RunError, match="run the gradients stage again"):
        merge(recipe, run)


def iter_first_parents(node):
    while node.children:
        yield node
        node = node.children[0]


@pytest.mark.ray
@pytest.mark.slow
def test_one_shard_and_errors_that_name_their_shard(ray_cluster, tiny_model_dir, tmp_path, capfd):
    run, recipe = new_run(tmp_path / "run", tiny_model_dir, count=3), recipe_for(tiny_model_dir)
    extract(recipe, run)
    assert merge(recipe, run).counts["merges"] == 1
    assert len(coordinates(run)[0]) == 3

    rows = run.read_table("examples/train.parquet").to_pylist()
    for row in rows:
        row["labels"] = [-100] * len(row["labels"])
    schema = run.read_table("examples/train.parquet").schema
    run.write_table("examples/train.parquet", pa.Table.from_pylist(rows, schema=schema))
    run.delete("sketch")
    with pytest.raises(extract_stage.ShardError) as caught:
        extract(recipe, run)
    assert str(caught.value).startswith("shard 00000.")
    assert one_line(caught.value) == str(caught.value)
    assert "no token counts" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "Traceback" not in capfd.readouterr().err

    unknown = recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": "/no/such/model"})})
    with pytest.raises(extract_stage.ShardError, match=r"shard .*: /no/such/model: the model cannot be loaded"):
        extract(unknown, run)

    run.write_table("examples/train.parquet", pa.Table.from_pylist([], schema=schema))
    with pytest.raises(extract_stage.ShardError, match="holds no examples"):
        extract(recipe, run)
    assert json.loads(run.read_bytes("sketch/plan.json"))["examples"] == 3
