"""The gradients stage on a real Ray: resume, damage, bad shards, the tree, and the numbers against autograd."""

import re
import threading
import time

import deadly_extractor
import numpy as np
import pyarrow as pa
import pytest
import torch
from flaky_proxy import FlakyProxy
from ray import cloudpickle
from synthetic_run import synthetic_recipe, write_adapter, write_examples

from gradientspace_ray.errors import one_line
from gradientspace_ray.gradients.per_sample import PerSampleGradients
from gradientspace_ray.models.loading import load_adapter, load_base
from gradientspace_ray.pipeline import STAGES
from gradientspace_ray.run import RunDirectory, RunError
from gradientspace_ray.sketch.columns import open_sketch
from gradientspace_ray.sketch.merging import merge_saved
from gradientspace_ray.sketch.projection import RandomProjection
from gradientspace_ray.sketch.tree import merge_tree
from gradientspace_ray.stages import conclude
from gradientspace_ray.stages import extract as extract_stage
from gradientspace_ray.stages.progress import watched_board

COUNT = 22
OUTPUTS = ["coordinates.parquet", "rows", "spectrum.json"]
gradients = next(stage for stage in STAGES if stage.name == "gradients").functions[0]
pytestmark = [pytest.mark.ray, pytest.mark.slow]


def recipe_for(model_dir, sketch=None, retries=2, **settings):
    sections = {
        "gradients": {
            "examples_per_shard": 5,
            "tokens_per_batch": 256,
            "workers": 2,
            "preconditioner": "none",
            **settings,
        },
        "sketch": {"rank": 30, **(sketch or {})},
        "compute": {"cpus_per_worker": 0.5, "retries": retries},
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
    found = []
    for row in rows:
        ids, labels = (torch.tensor([row[key]]) for key in ("input_ids", "labels"))
        loss = model(input_ids=ids, labels=labels).loss
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]).double())
    return [row["id"] for row in rows], torch.nn.functional.normalize(torch.stack(found), dim=1)


def coordinates(run):
    table = run.read_table("sketch/coordinates.parquet")
    return table["id"].to_pylist(), np.array(table["coordinates"].to_pylist())


def results(run):
    return {name: run.read_bytes(f"sketch/{name}") for name in run.sizes("sketch")}


def shards_of(recipe, run):
    return extract_stage.plan(recipe, run)


def extract_all(recipe, run):
    """Commit all shards, and merge nothing, as a driver that died at a bad moment; returns their names in order."""
    names = [shard.name for shard in shards_of(recipe, run)]
    with watched_board() as board:
        assert sorted(extract_stage.extract(recipe, run, board, shards_of(recipe, run), names)) == names
    return names


def flip(run, name):
    data = bytearray(run.read_bytes(name))
    data[-1] ^= 1
    run.write_bytes(name, bytes(data))


def cut(run, name):
    run.write_bytes(name, run.read_bytes(name)[:-8])


@pytest.fixture(scope="module")
def undisturbed(ray_cluster, tiny_model_dir, tmp_path_factory):
    run = new_run(tmp_path_factory.mktemp("undisturbed"), tiny_model_dir)
    summary = gradients(recipe_for(tiny_model_dir), run)
    assert summary.counts["shards_made"] == 5
    assert summary.counts["merges"] == 4
    return results(run)


def test_sketch_of_a_run_on_an_object_store_is_that_of_its_gradients(
    ray_cluster, object_store, tiny_model_dir, undisturbed, capfd
):
    place, recipe = object_store(), recipe_for(tiny_model_dir)
    with FlakyProxy(re.search(r"endpoint_override=([^&]+)", place)[1]) as proxy:
        run = new_run(proxy.through(place), tiny_model_dir)
        # In the middle of commits, of shards and of merges, and of reads.
        proxy.cut(r"PUT .*shards/.*block", after=3000, times=3)
        proxy.cut(r"PUT .*shards/.*sketch.json", after=100, times=2)
        proxy.cut(r"PUT .*merged/.*", after=1000, times=3)
        proxy.cut(r"GET .*block", after=2000, of="answer", times=2)
        summary = gradients(recipe, run)
        assert proxy.cuts == 10
    run = RunDirectory(place)
    assert run.names("sketch") == OUTPUTS
    ids, gradients_ND = autograd_gradients(run, tiny_model_dir)
    found_ids, coordinates_NK = coordinates(run)
    assert found_ids == ids
    assert np.allclose(coordinates_NK @ coordinates_NK.T, (gradients_ND @ gradients_ND.T).numpy(), atol=2e-4)
    spectrum = run.read_json("sketch/spectrum.json")
    assert spectrum["energy_total"] == pytest.approx(COUNT)
    assert spectrum["captured_share"] == pytest.approx(1, abs=1e-6)
    assert spectrum["captured_share_of_example"]["quantiles"]["0"] == pytest.approx(1, abs=1e-4)
    assert spectrum["dimension"] == gradients_ND.shape[1]
    values_K = torch.linalg.svdvals(gradients_ND)
    assert np.allclose(spectrum["singular_values"], values_K, atol=1e-4)
    reached_K = values_K.square().cumsum(0) / COUNT
    assert spectrum["rank_for_share"]["0.8"] == {"rank": int((reached_K < 0.8).sum()) + 1}
    rows_KD = open_sketch(run, "sketch/rows").rows().double()
    u_NK = torch.tensor(coordinates_NK) / torch.tensor(spectrum["singular_values"])
    assert torch.allclose(u_NK @ rows_KD, gradients_ND, atol=1e-4)
    assert results(run) == undisturbed

    assert "sketching took" in summary.made
    assert 0 < summary.counts["sketching_s"] < summary.counts["working_s"]
    assert summary.counts["tokens"] == sum(run.read_table("examples/train.parquet")["tokens"].to_pylist())

    # Once more, as after a kill before the manifest's entry: nothing is computed.
    assert gradients(recipe, run).counts["shards_made"] == 0
    assert results(run) == undisturbed
    noise = capfd.readouterr().err
    assert "ray-data.log" not in noise
    assert "Traceback" not in noise
    assert f"gradients: {COUNT}/{COUNT}" in noise
    assert "shards: 5/5 100% of the energy kept" in noise


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_no_bit(ray_cluster, tiny_model_dir, tmp_path, undisturbed, workers):
    run = new_run(tmp_path / "run", tiny_model_dir)
    gradients(recipe_for(tiny_model_dir, workers=workers), run)
    assert results(run) == undisturbed


def test_what_is_stored_grows_with_the_logarithm_of_the_shards(ray_cluster, tiny_model_dir, tmp_path):
    run = new_run(tmp_path / "run", tiny_model_dir)
    stored, most, done = (tmp_path / "run/sketch"), 0, threading.Event()

    def look():
        nonlocal most
        while not done.wait(0.01):
            most = max(most, len(list(stored.glob("*/*/block-00000.safetensors"))))

    thread = threading.Thread(target=look)
    thread.start()
    summary = gradients(recipe_for(tiny_model_dir, workers=1, examples_per_shard=1), run)
    done.set()
    thread.join()
    assert summary.counts["shards_made"] == COUNT
    # A sketch waits at each level; one merge may wait for its turn while another shard is made, each of two sketches.
    assert 0 < most <= COUNT.bit_length() + 5


def left_behind(recipe, run):
    """What a driver leaves that died when all shards were there and one pair was merged: (shards, the pair)."""
    names = extract_all(recipe, run)
    pair = merge_tree(names).children[0].children[0]
    merge_saved(run, pair)
    for leaf in pair.children:
        for block in open_sketch(run, leaf.folder).record.blocks:
            run.delete(f"{leaf.folder}/{block}")
    return names, pair


def test_a_stage_that_was_killed_goes_on_where_it_stood(ray_cluster, tiny_model_dir, tmp_path, undisturbed):
    run, recipe = new_run(tmp_path / "run", tiny_model_dir), recipe_for(tiny_model_dir)
    names, _ = left_behind(recipe, run)
    # As when its upload was cut.
    run.delete(f"sketch/shards/{names[4]}/sketch.json")
    summary = gradients(recipe, run)
    assert (summary.counts["shards_made"], summary.counts["merges"]) == (1, 3)
    assert summary.counts["sketches_damaged"] == 0
    assert results(run) == undisturbed


@pytest.mark.parametrize("merged", [False, True])
def test_damage_of_before_is_found_and_made_good(ray_cluster, tiny_model_dir, tmp_path, undisturbed, merged, capfd):
    run, recipe = new_run(tmp_path / "run", tiny_model_dir), recipe_for(tiny_model_dir)
    names, pair = left_behind(recipe, run)
    shards = [f"sketch/shards/{name}" for name in names]
    if merged:
        flip(run, f"{pair.folder}/block-00000.safetensors")
        expected, place = (1, 2, 4), pair.folder
    else:
        run.delete(f"{shards[0]}/coordinates.safetensors")
        cut(run, f"{shards[1]}/coordinates.safetensors")
        flip(run, f"{shards[2]}/block-00000.safetensors")
        cut(run, f"{shards[3]}/block-00000.safetensors")
        cut(run, f"{shards[4]}/sketch.json")
        expected, place = (5, 5, 3), shards[2]
    summary = gradients(recipe, run)
    assert tuple(summary.counts[key] for key in ("sketches_damaged", "shards_made", "merges")) == expected
    assert f"sketches that were damaged and made again: {expected[0]}" in summary.made
    assert f"damaged: {expected[0]}/{expected[0]} {place}" in capfd.readouterr().err
    assert results(run) == undisturbed


def test_damage_between_commit_and_merge_stops_nothing(ray_cluster, tiny_model_dir, tmp_path, monkeypatch):
    """A worker waits while merges wait, and those above the damaged sketch are not made."""
    run = new_run(tmp_path / "run", tiny_model_dir)
    extract, flipped = extract_stage.extract, []

    def with_damage(*arguments, **options):
        for name in extract(*arguments, **options):
            if name.startswith("00001") and not flipped:
                flipped.append(name)
                flip(run, f"sketch/shards/{name}/block-00000.safetensors")
            yield name

    monkeypatch.setattr(extract_stage, "extract", with_damage)
    summary = gradients(recipe_for(tiny_model_dir, workers=1, examples_per_shard=1), run)
    assert summary.counts["sketches_damaged"] == 1
    assert summary.counts["shards_made"] == COUNT + 1
    assert summary.counts["captured_share"] == pytest.approx(1, abs=1e-5)


def test_merges_that_fail_for_ever_say_why(ray_cluster, tiny_model_dir, tmp_path):
    run, recipe = new_run(tmp_path / "run", tiny_model_dir), recipe_for(tiny_model_dir, retries=0, workers=1)
    pair = merge_tree([shard.name for shard in shards_of(recipe, run)]).children[0].children[0]
    # Where its folder should be.
    run.write_bytes(pair.folder, b"")
    with pytest.raises(RunError, match=rf"sketch could not be merged in 2 tries: .*{pair.name}") as caught:
        gradients(recipe, run)
    assert str(caught.value) == one_line(caught.value)
    assert len(run.names("sketch/shards")) == 5


def die_at_the_end(recipe, run, monkeypatch):
    """Merge all, and leave the last step undone."""

    def die(*_):
        raise OSError("killed")

    with monkeypatch.context() as dying:
        dying.setattr(conclude, "finish", die)
        with pytest.raises(OSError, match="killed"):
            gradients(recipe, run)


def test_what_another_recipe_left_is_not_taken_for_this_one_s(
    ray_cluster, tiny_model_dir, tmp_path, undisturbed, monkeypatch
):
    run, recipe = new_run(tmp_path / "run", tiny_model_dir), recipe_for(tiny_model_dir)
    die_at_the_end(recipe, run, monkeypatch)
    leaves = [shard.name for shard in shards_of(recipe, run)]
    flip(run, f"sketch/shards/{leaves[1]}/coordinates.safetensors")
    flip(run, "sketch/rows/block-00000.safetensors")
    assert gradients(recipe, run).counts["sketches_damaged"] == 2
    assert results(run) == undisturbed
    die_at_the_end(recipe_for(tiny_model_dir, sketch={"rank": 4}), run, monkeypatch)
    assert gradients(recipe, run).counts["shards_made"] == 5
    assert results(run) == undisturbed


def without_labels(run, chosen):
    """Take the labels of some examples, so that they have no gradient; returns the ids of all, sorted."""
    rows = run.read_table("examples/train.parquet").to_pylist()
    ids = sorted(row["id"] for row in rows)
    for row in rows:
        if row["id"] in {ids[index] for index in chosen}:
            row["labels"] = [-100] * len(row["labels"])
    schema = run.read_table("examples/train.parquet").schema
    run.write_table("examples/train.parquet", pa.Table.from_pylist(rows, schema=schema))
    return ids


def test_bad_shards_stop_the_run_or_are_skipped(ray_cluster, tiny_model_dir, tmp_path, capfd):
    run = new_run(tmp_path / "run", tiny_model_dir)
    ids = without_labels(run, [7, 12])
    stopping = recipe_for(tiny_model_dir, retries=1)
    bad = shards_of(stopping, run)[1:3]
    with pytest.raises(extract_stage.ShardError) as caught:
        gradients(stopping, run)
    assert str(caught.value) == one_line(caught.value)
    names = "|".join(shard.name for shard in bad)
    assert re.match(rf"shard ({names}): .*no token counts.*\(and 1 more\)", str(caught.value))
    shown = capfd.readouterr().err
    assert "Traceback" not in shown
    assert re.search(rf"failed shards: 2/2 ({names}): .*no token counts", shown)
    assert f"gradients: {COUNT}/{COUNT}" in shown
    for shard in bad:
        quarantined = run.read_json(f"sketch/quarantine/{shard.name}.json")
        assert (quarantined["attempts"], quarantined["ids"]) == (2, list(shard.ids))
        assert "no token counts" in quarantined["traceback"]
    assert len(run.names("sketch/shards")) == 3

    skipping = recipe_for(tiny_model_dir, retries=0, on_bad_shard="skip")
    summary = gradients(skipping, run)
    assert (summary.counts["shards"], summary.counts["shards_made"], summary.counts["shards_skipped"]) == (5, 0, 2)
    assert "shards that failed and were skipped, see sketch/quarantine: 2 of 5" in summary.made
    assert coordinates(run)[0] == [id_ for id_ in ids if id_ not in {*bad[0].ids, *bad[1].ids}]
    assert run.names("sketch/quarantine") == [f"{shard.name}.json" for shard in bad]

    # What a run makes that skips from the start is the same, and stays while there is none without bad shards.
    other = new_run(tmp_path / "other", tiny_model_dir)
    without_labels(other, [7, 12])
    assert gradients(skipping, other).output == summary.output
    made = {name: data for name, data in results(other).items() if "quarantine" not in name}
    with pytest.raises(extract_stage.ShardError):
        gradients(stopping, run)
    assert {name: data for name, data in results(run).items() if "quarantine" not in name} == made


def test_nothing_goes_on_after_an_interrupt(ray_cluster, tiny_model_dir, tmp_path, monkeypatch):
    run, recipe = new_run(tmp_path / "run", tiny_model_dir), recipe_for(tiny_model_dir, workers=1, examples_per_shard=1)
    extract = extract_stage.extract

    def interrupted(*arguments, **options):
        for name in extract(*arguments, **options):
            yield name
            if name.startswith("00003"):
                raise KeyboardInterrupt

    with monkeypatch.context() as pressed:
        pressed.setattr(extract_stage, "extract", interrupted)
        with pytest.raises(KeyboardInterrupt):
            gradients(recipe, run)
    # What was under way may end.
    time.sleep(2)
    there = run.sizes("sketch")
    time.sleep(3)
    assert run.sizes("sketch") == there
    committed = sum(name.startswith("shards/") and name.endswith("sketch.json") for name in there)
    assert 4 <= committed < COUNT
    assert gradients(recipe, run).counts["shards_made"] == COUNT - committed


def test_when_all_shards_are_bad_nothing_can_be_skipped(ray_cluster, tiny_model_dir, tmp_path):
    run = new_run(tmp_path / "run", tiny_model_dir, count=4)
    without_labels(run, range(4))
    with pytest.raises(RunError, match=r"all 1 shards have failed.*sketch/quarantine says why"):
        gradients(recipe_for(tiny_model_dir, retries=0, on_bad_shard="skip"), run)
    unknown = recipe_for(tiny_model_dir, retries=0)
    unknown = unknown.model_copy(update={"model": unknown.model.model_copy(update={"name": "/no/such/model"})})
    with pytest.raises(extract_stage.ShardError, match=r"shard .*: /no/such/model: the model cannot be loaded"):
        gradients(unknown, run)
    schema = run.read_table("examples/train.parquet").schema
    run.write_table("examples/train.parquet", pa.Table.from_pylist([], schema=schema))
    with pytest.raises(extract_stage.ShardError, match="holds no examples"):
        gradients(unknown, run)


def test_a_shard_that_kills_its_worker_is_bad(ray_cluster, tiny_model_dir, tmp_path, monkeypatch):
    run, recipe = new_run(tmp_path / "run", tiny_model_dir), recipe_for(tiny_model_dir, retries=1)
    # Workers cannot import it.
    cloudpickle.register_pickle_by_value(deadly_extractor)
    monkeypatch.setattr(extract_stage, "Extractor", deadly_extractor.DeadlyExtractor)
    with pytest.raises(extract_stage.ShardError, match=r"shard 00001\..*: its worker died 2 times; if memory ran out"):
        gradients(recipe, run)
    assert (tmp_path / "run/deaths").read_text() == "xx"
    assert len(run.names("sketch/shards")) == 4
    # Where it does not, the shard is a good one again.
    monkeypatch.undo()
    assert len(run.names("sketch/quarantine")) == 1
    extract_all(recipe, run)
    assert run.names("sketch/quarantine") == []


def test_one_shard(ray_cluster, tiny_model_dir, tmp_path):
    run = new_run(tmp_path / "run", tiny_model_dir, count=3)
    assert gradients(recipe_for(tiny_model_dir), run).counts["merges"] == 1
    _, gradients_ND = autograd_gradients(run, tiny_model_dir)
    assert np.allclose(coordinates(run)[1] @ coordinates(run)[1].T, gradients_ND @ gradients_ND.T, atol=2e-4)
    before = results(run)
    assert gradients(recipe_for(tiny_model_dir), run).counts["shards_made"] == 0
    for name in ("coordinates.parquet", "rows/block-00000.safetensors", "spectrum.json"):
        cut(run, f"sketch/{name}")
        assert gradients(recipe_for(tiny_model_dir), run).counts["shards_made"] == 1
        assert results(run) == before


def test_a_second_pass_comes_closer_to_the_optimum(ray_cluster, tiny_model_dir, tmp_path):
    run = new_run(tmp_path / "run", tiny_model_dir)
    settings = {"rank": 4, "oversampling": 0}
    gradients(recipe_for(tiny_model_dir, sketch=settings), run)
    once = run.read_json("sketch/spectrum.json")["energy_captured"]
    summary = gradients(recipe_for(tiny_model_dir, sketch=settings | {"refine": True}), run)
    assert summary.counts["shards_made"] == 10
    assert run.names("sketch") == OUTPUTS
    twice = run.read_json("sketch/spectrum.json")["energy_captured"]
    _, gradients_ND = autograd_gradients(run, tiny_model_dir)
    best = float(torch.linalg.svdvals(gradients_ND)[:4].square().sum())
    assert once < twice <= best * (1 + 1e-6)
    assert twice > 0.97 * best
    # The ledger still holds.
    values_K = torch.tensor(run.read_json("sketch/spectrum.json")["singular_values"])
    u_NK = torch.tensor(coordinates(run)[1]) / values_K
    assert torch.allclose(u_NK.T @ u_NK, torch.eye(4, dtype=torch.float64), atol=1e-5)
    error = (gradients_ND - u_NK @ open_sketch(run, "sketch/rows").rows().double()).square().sum()
    assert COUNT - twice == pytest.approx(float(error), rel=1e-5)


def test_a_random_projection_of_every_gradient_is_kept_beside_the_sketch(
    ray_cluster, tiny_model_dir, tmp_path, undisturbed
):
    # Fewer rows than a shard has examples, so that a shard takes two buffers.
    settings, place = {"projection": 4096, "rank": 2, "oversampling": 1}, "sketch/projection.parquet"
    once, twice = (new_run(tmp_path / name, tiny_model_dir) for name in ("once", "twice"))
    recipe = recipe_for(tiny_model_dir, sketch=settings, workers=1, normalisation="module")
    assert gradients(recipe, once).outputs == (place,)
    refining = recipe_for(tiny_model_dir, sketch=settings | {"refine": True}, workers=2, normalisation="module")
    gradients(refining, twice)
    made = results(once)
    assert twice.read_bytes(place) == made["projection.parquet"]

    model = load_adapter(load_base(str(tiny_model_dir)), once.fetch("generalist"), trainable=True)
    rows = sorted(once.read_table("examples/train.parquet").to_pylist(), key=lambda row: row["id"])
    engine = PerSampleGradients(model, normalisation="module")
    alone_ND = torch.cat([engine.gradients([(row["input_ids"], row["labels"])]) for row in rows])
    table = once.read_table(place)
    assert table["id"].to_pylist() == [row["id"] for row in rows] == coordinates(once)[0]
    expected_NP = RandomProjection(engine.dimension, 4096).project(alone_ND)
    assert np.allclose(np.array(table["projection"].to_pylist()), expected_NP, atol=1e-5)

    assert gradients(recipe, once).counts["shards_made"] == 0
    flip(once, place)
    assert gradients(recipe, once).counts["shards_made"] == 5
    assert results(once) == made
    # It does not stay where none is wanted.
    assert gradients(recipe_for(tiny_model_dir), once).outputs == ()
    assert results(once) == undisturbed
