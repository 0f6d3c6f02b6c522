"""The cluster stage on coordinates with planted groups: its files, their order, and that it repeats."""

import json
import re

import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import load
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
    examples = []
    for id_, group in zip(ids, truth, strict=True):
        messages = [{"role": "user", "content": f"Tell me of the {WORDS[group][0]} and the {WORDS[group][1]}"}]
        examples.append({"id": id_, "messages": messages, "domain": WORDS[group][0] if labelled else None})
    run.write_table("examples/train.parquet", pa.Table.from_pylist(examples[::-1], schema=EXAMPLE_SCHEMA))
    return run, truth


def recipe_for(**clusters):
    return synthetic_recipe("model", "encoder", clusters=clusters)


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
