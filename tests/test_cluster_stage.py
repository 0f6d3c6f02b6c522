"""The cluster stage on coordinates with planted groups: its files, their order, and that it repeats."""

import json
import re

import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import load
from sklearn.metrics import adjusted_rand_score
from synthetic_run import EXAMPLE_SCHEMA, synthetic_recipe
from test_clusters import planted

from gradientspace_ray.run import RunDirectory, RunError
from gradientspace_ray.stages.cluster import cluster

SIZES = (20, 35, 27)
WORDS = (["apple", "pear"], ["violin", "organ"], ["river", "stone"])
FILES = ("clusters/assignments.parquet", "clusters/centroids.safetensors", "clusters/quality.json")


def make_run(folder, sizes=SIZES, labelled=True, rows_NK=None):
    run = RunDirectory(folder)
    if rows_NK is None:
        rows_NK, truth = planted(sizes, 0.08)
    else:
        truth = np.zeros(len(rows_NK), dtype=int)
    ids = [f"{index:016x}" for index in range(len(truth))]
    run.write_table(
        "sketch/coordinates.parquet",
        pa.table({"id": ids, "coordinates": pa.array(rows_NK.tolist(), pa.list_(pa.float32()))}),
    )
    projection = pa.array(np.pad(rows_NK, ((0, 0), (0, 128 - rows_NK.shape[1]))).tolist(), pa.list_(pa.float32()))
    run.write_table("sketch/projection.parquet", pa.table({"id": ids, "projection": projection}))
    examples = []
    for place, (id_, group) in enumerate(zip(ids, truth, strict=True)):
        prompt = f"Tell me of the {WORDS[group][0]} and the {WORDS[group][1]}"
        messages = [{"role": "user", "content": prompt}]
        domain = WORDS[group][0] if labelled else None
        tokens = {"tokens": 50 + place, "label_tokens": 20 + place}
        examples.append({"id": id_, "messages": messages, "prompt": prompt, "domain": domain, **tokens})
    run.write_table("examples/train.parquet", pa.Table.from_pylist(examples[::-1], schema=EXAMPLE_SCHEMA))
    return run, truth


def recipe_for(**clusters):
    return synthetic_recipe("model", "encoder", clusters=clusters, sketch={"projection": 128})


@pytest.mark.parametrize("method", ["graph", "kmeans"])
def test_planted_groups_come_out(tmp_path, method):
    run, truth = make_run(tmp_path)
    summary = cluster(recipe_for(method=method), run)
    assert summary.made == "3 clusters: organ-violin 35, river-stone 27, apple-pear 20"
    assert summary.counts["ari"] == pytest.approx(1)

    assignments = run.read_table("clusters/assignments.parquet")
    assert assignments.schema.field("cluster").type == pa.int32()
    assert np.array_equal(assignments["cluster"].to_numpy(), np.array([2, 0, 1])[truth])
    quality = run.read_json("clusters/quality.json")
    assert quality["count"] == quality["chosen_count"] == 3
    assert quality["sizes"] == [35, 27, 20]
    assert quality["method"] == method
    assert quality["terms"][2] == ["apple", "pear"]
    assert quality["stability"] > (0.95 if method == "graph" else 0.6)
    assert quality["ari"] == quality["nmi"] == quality["purity"] == pytest.approx(1)
    assert all(0 < value < 1 for value in quality["coherence"])
    assert quality["conflicting_pairs"]["inside"] < quality["conflicting_pairs"]["between"]
    assert "3" in quality["candidates"]
    for label, typical in enumerate(quality["typical"]):
        assert {assignments["cluster"][int(id_, 16)].as_py() for id_ in typical} == {label}

    centroids_CK = load(run.read_bytes("clusters/centroids.safetensors"))["centroids"]
    rows_NK = np.array(run.read_table("sketch/coordinates.parquet")["coordinates"].to_pylist())
    mean = (rows_NK / np.linalg.norm(rows_NK, axis=1, keepdims=True))[truth == 1].mean(axis=0)
    assert np.allclose(centroids_CK[0], mean / np.linalg.norm(mean), atol=1e-6)


def test_it_repeats_to_the_byte_and_does_not_read_the_labels(tmp_path):
    run, _ = make_run(tmp_path / "a")
    blind, _ = make_run(tmp_path / "b", labelled=False)
    first = cluster(recipe_for(), run)
    before = {name: run.read_bytes(name) for name in FILES}
    assert cluster(recipe_for(), run) == first
    assert before == {name: run.read_bytes(name) for name in FILES}
    assert cluster(recipe_for(), blind).output == first.output
    quality = json.loads(blind.read_bytes("clusters/quality.json"))
    assert not {"ari", "nmi", "purity"} & set(quality)


def test_tokens_and_length_are_judged(tmp_path):
    run, truth = make_run(tmp_path)
    cluster(recipe_for(), run)
    quality = run.read_json("clusters/quality.json")
    tokens_N = 50 + np.arange(sum(SIZES))
    assert quality["tokens"] == [int(tokens_N[truth == group].sum()) for group in (1, 2, 0)]
    assert quality["response_tokens"][0] == int((tokens_N - 30)[truth == 1].sum())
    assert quality["length"]["longer"][1:] == [1, 0]
    assert quality["nn_purity"] > 0.95
    assert quality["variance_inside"]["share"] < quality["variance_inside"]["at_random"]
    # Words tell these clusters apart as well as length does.
    assert quality["called"] == ["", "", ""]


@pytest.mark.parametrize(
    ("method", "found"), [("random", 0.0), ("length", 0.6), ("random_projection_64", 0.9), ("kmeans", 0.9)]
)
def test_every_method_makes_as_many_clusters_as_the_gradients_have(tmp_path, method, found):
    run, truth = make_run(tmp_path)
    recipe = recipe_for(method=method)
    summary = cluster(recipe, run)
    labels = run.read_table("clusters/assignments.parquet")["cluster"].to_numpy()
    assert summary.counts["clusters"] == 3
    assert adjusted_rand_score(truth, labels) == pytest.approx(found, abs=0.25)
    before = {name: run.read_bytes(name) for name in FILES}
    assert cluster(recipe, run) == summary
    assert before == {name: run.read_bytes(name) for name in FILES}


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_embeddings_are_those_of_the_prompts_whatever_the_number_of_workers(tmp_path, tiny_encoder_dir):
    run, truth = make_run(tmp_path)
    results = []
    for workers in (1, 3):
        recipe = synthetic_recipe("model", tiny_encoder_dir, clusters={"method": "embedding", "count": 3})
        evaluate = recipe.evaluate.model_copy(update={"workers": workers})
        cluster(recipe.model_copy(update={"evaluate": evaluate}), run)
        results.append([run.read_bytes(name) for name in FILES])
    assert results[0] == results[1]
    # There are three prompts.
    assert adjusted_rand_score(truth, run.read_table("clusters/assignments.parquet")["cluster"].to_numpy()) == 1


def test_outliers_may_be_left_out(tmp_path):
    rows_NK, _ = planted(SIZES, 0.6)
    strange = np.zeros((len(rows_NK) + 3, rows_NK.shape[1] + 2))
    strange[:-3, :-2], strange[-3:-1, -2:] = rows_NK, np.eye(2)
    run, _ = make_run(tmp_path, rows_NK=strange)
    summary = cluster(recipe_for(outliers="leave_out"), run)
    labels = run.read_table("clusters/assignments.parquet")["cluster"].to_numpy()
    assert set(labels[-3:]) == {-1}
    assert set(labels[:-3]) >= {0, 1, 2}
    left_out = run.read_json("clusters/quality.json")["left_out"]
    assert left_out["examples"] == (labels == -1).sum() < 12
    assert summary.made.endswith(f"; {left_out['examples']} left out")
    cluster(recipe_for(), run)
    assert run.read_json("clusters/quality.json")["left_out"]["examples"] == 0
    with pytest.raises(ValueError, match=r"leaves \d+ of 85 examples, which cannot form 84 clusters; set it to assign"):
        cluster(recipe_for(outliers="leave_out", count=84), run)
    everything_is_one, _ = make_run(tmp_path / "zero", rows_NK=np.zeros((9, 4)))
    for count in ("auto", 1):
        assert cluster(recipe_for(outliers="leave_out", count=count), everything_is_one).made.endswith(" 9")


def test_no_cluster_is_too_small_when_outliers_are_left_out(tmp_path):
    rows_NK, _ = planted((40, 7), 0.6)
    strange = np.zeros((len(rows_NK) + 8, rows_NK.shape[1] + 8))
    strange[:-8, :-8], strange[-8:, -8:] = rows_NK, np.eye(8)
    run, _ = make_run(tmp_path, rows_NK=strange)
    assert cluster(recipe_for(outliers="leave_out", count=2, min_examples=8), run).counts["sizes"] == [47]
    assert cluster(recipe_for(outliers="leave_out", count=2, min_examples=7), run).counts["sizes"] == [40, 7]


def test_numbers_that_are_not_finite_are_named(tmp_path):
    run, _ = make_run(tmp_path)
    ids = run.read_table("sketch/coordinates.parquet")["id"]
    rows = np.ones((len(ids), 4), dtype=np.float32)
    rows[3, 1] = np.nan
    run.write_table("sketch/coordinates.parquet", pa.table({"id": ids, "coordinates": rows.tolist()}))
    with pytest.raises(RunError, match=r"coordinates.parquet: the numbers of example 0{15}3 are not finite; run the"):
        cluster(recipe_for(), run)


def test_stability_knows_of_small_clusters_that_were_merged(tmp_path):
    run, _ = make_run(tmp_path)
    assert cluster(recipe_for(count=3, min_examples=24), run).counts["clusters"] == 2
    assert run.read_json("clusters/quality.json")["stability"] > 0.9


def test_a_projection_of_other_examples_is_refused(tmp_path):
    run, _ = make_run(tmp_path)
    run.write_table("sketch/projection.parquet", run.read_table("sketch/projection.parquet").slice(1))
    with pytest.raises(RunError, match=r"projection.parquet is not about .*; run the gradients stage again"):
        cluster(recipe_for(method="random_projection_64"), run)


def test_the_count_may_be_given_and_small_clusters_are_merged(tmp_path):
    run, _ = make_run(tmp_path)
    assert cluster(recipe_for(count=2), run).counts["clusters"] == 2
    assert run.read_json("clusters/quality.json")["candidates"] == {}
    assert cluster(recipe_for(count=3, min_examples=24), run).counts["clusters"] == 2
    assert cluster(recipe_for(count=3, min_examples=500), run).made.startswith("1 cluster: ")
    with pytest.raises(ValueError, match="82 examples cannot form 83 clusters"):
        cluster(recipe_for(count=83), run)


@pytest.mark.parametrize("rows_NK", [np.ones((1, 4)), np.zeros((9, 4)), np.ones((9, 4)), np.eye(2)])
def test_degenerate_sketches_are_one_cluster(tmp_path, rows_NK):
    run, _ = make_run(tmp_path, rows_NK=rows_NK)
    summary = cluster(recipe_for(min_examples=1), run)
    assert re.fullmatch(rf"1 cluster: [a-z0-9-]+ {len(rows_NK)}", summary.made)


def test_a_sketch_of_other_examples_is_refused(tmp_path):
    run, _ = make_run(tmp_path)
    table = run.read_table("examples/train.parquet")
    run.write_table("examples/train.parquet", table.slice(1))
    with pytest.raises(RunError, match=r"is not about examples/train.parquet; run the gradients stage again"):
        cluster(recipe_for(), run)
