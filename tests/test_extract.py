"""The extraction of gradients: shards, what decides them, and the errors of one; without Ray."""

import dataclasses
from unittest.mock import MagicMock

import pytest
import torch
from synthetic_run import synthetic_recipe, write_adapter, write_examples

from gradientspace_ray.gradients.per_sample import ExampleTooLargeError, PerSampleGradients
from gradientspace_ray.models.loading import load_adapter, load_base
from gradientspace_ray.models.moments import AdamMoments, MomentsError, save_moments
from gradientspace_ray.run import RunDirectory, digest_of
from gradientspace_ray.stages import extract as extract_stage
from gradientspace_ray.stages.extract import plan_shards

COUNT = 22


def recipe_for(model_dir, **gradients):
    sections = {
        "gradients": {
            "examples_per_shard": 5,
            "tokens_per_batch": 256,
            "workers": 2,
            "preconditioner": "none",
            **gradients,
        },
        "sketch": {"rank": 30},
        "compute": {"cpus_per_worker": 0.5},
    }
    return synthetic_recipe(model_dir, model_dir, **sections)


def new_run(folder, model_dir, count=COUNT):
    run = RunDirectory(folder)
    write_examples(run, model_dir, "train", count, True, 0)
    write_adapter(run, "generalist", model_dir, 1)
    return run


def extractor_of(recipe, run):
    return extract_stage.Extractor(recipe, run.uri, MagicMock(), MagicMock(), COUNT, refining=False)


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
    engine = extractor_of(recipe, run)._engine
    examples = [([5, 6, 7, 8, 9, 10], [-100, -100, 7, 8, 9, 10]), ([9, 3, 4], [-100, 3, 4])]
    # The sketch normalises.
    expected = PerSampleGradients(model, loss="sum", preconditioner="less", moments=moments).gradients(examples)
    gradients = engine.gradients(examples)
    assert gradients.dtype == torch.bfloat16
    torch.testing.assert_close(gradients.float(), expected, rtol=0.01, atol=2e-3)
    save_moments(dataclasses.replace(moments, step=6), tmp_path / "run/generalist")
    assert extract_stage._decisive(recipe, run) != decisive


def test_an_example_that_does_not_fit_into_memory_is_named(tiny_model_dir, tmp_path, monkeypatch):
    run, recipe = new_run(tmp_path / "run", tiny_model_dir), recipe_for(tiny_model_dir)
    extractor = extractor_of(recipe, run)
    ids = sorted(run.read_table("examples/train.parquet")["id"].to_pylist())
    engine = extractor._engine

    def gradients(examples, out, on_batch):
        raise ExampleTooLargeError(2, "its 9 tokens do not fit")

    monkeypatch.setattr(engine, "gradients", gradients)
    shard = plan_shards(ids, 5, None)[1]
    failure, trace = extractor._try(shard)
    assert failure == f"example {shard.ids[2]} (examples/train.parquet): its 9 tokens do not fit"
    assert "ExampleTooLargeError" in trace


def test_a_gradient_that_is_not_finite_names_its_example(tiny_model_dir, tmp_path):
    run, recipe = new_run(tmp_path / "run", tiny_model_dir), recipe_for(tiny_model_dir)
    recipe = recipe.model_copy(update={"compute": recipe.compute.model_copy(update={"retries": 0})})
    extractor = extractor_of(recipe, run)
    ids = sorted(run.read_table("examples/train.parquet")["id"].to_pylist())
    gradients = extractor._engine.gradients
    seen = 0

    def poisoned(examples, out, on_batch):
        nonlocal seen
        gradients(examples, out, on_batch)
        if seen <= 20 < seen + len(examples):
            out[20 - seen, 3] = torch.nan
        seen += len(examples)
        return out

    extractor._engine.gradients = poisoned
    extractor._buffer_BD = extractor._buffer_BD[:8]
    failure, _ = extractor._try(extract_stage.Shard("00000.shard", tuple(ids)))
    assert failure == (
        f"the gradient of example {ids[20]} (examples/train.parquet) is not finite; "
        "remove it from the data, or lower warmup.learning_rate"
    )
    assert not run.exists("sketch/shards/00000.shard")
