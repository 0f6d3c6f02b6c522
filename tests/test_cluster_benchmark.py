"""The cluster benchmark on a tiny model and few made-up gradients: its numbers mean what they say."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from sklearn.metrics import normalized_mutual_info_score

from gradientspace_ray.clusters.methods import clusters_of

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[1] / "jobs" / "benchmarks"
MODULES = ("clusters", "cluster_features", "cluster_gradients", "cluster_planted", "gradient_task", "gradients")
MODULES += ("gradient_methods", "sketch_methods")
NAMED = ("svd_64", "full_gradient", "random_projection_64", "random_projection_512", "random_projection_8192")
NAMED += ("embedding", "length")
VARIANTS = {"exact_svd_64", "exact_svd_16", "exact_svd_32", "exact_svd_128", "adam", "less"}
VARIANTS |= {"normalised: example", "normalised: module", "normalised: none", "attention only", "mlp only"}
# The tiny model has two layers, so no last third.
VARIANTS |= {"early third", "middle third", "A only", "B only", "all after 2 steps", "response after 1 steps"}
AGREEMENT = {"ari", "nmi", "purity"}
EXAMPLES = 40


@pytest.fixture(scope="module")
def modules():
    with pytest.MonkeyPatch.context() as patch:
        # As for a script that is run: its folder is where its imports are looked for.
        patch.syspath_prepend(FOLDER)
        yield {name: importlib.import_module(name) for name in MODULES}
        for name in MODULES:
            sys.modules.pop(name, None)


def run(modules, path: Path, *words: str) -> dict:
    modules["clusters"].main([*words, "--json", str(path), "--threads", "1"])
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cluster-benchmark")


@pytest.fixture(scope="module")
def words(folder: Path, tiny_model_dir: Path, tiny_encoder_dir: Path) -> list[str]:
    options = {"model": tiny_model_dir, "encoder": tiny_encoder_dir, "dtype": "float32", "examples": EXAMPLES}
    options |= {"warm-up-steps": "2,1", "labels": "response,all", "cache": folder / "cache", "scratch": folder}
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def report(modules, folder: Path, words: list[str]) -> dict:
    return run(modules, folder / "made" / "clusters.json", *words)


@pytest.fixture(scope="module")
def made(report: dict, folder: Path) -> dict[str, np.ndarray]:
    (path,) = (folder / "cache").glob("*.2.response.npz")
    return dict(np.load(path))


def test_the_report_has_every_number(report: dict) -> None:
    assert (report["examples"], report["data"], report["dtype"]) == (EXAMPLES, None, "float32")
    assert len(report["domains"]) == 4
    assert set(report["features"]) == {*NAMED} | VARIANTS
    assert set(report["baselines"]) == {"random", "embedding", *NAMED[2:5], "length"}
    for result in report["features"].values():
        assert set(result) - {"nn_purity_of_seeds"} == {"dimensions", "nn_purity", "methods"}
        assert 0 <= result["nn_purity"] <= 1
        assert set(result["methods"]) == {"graph", "kmeans"}
        for found in result["methods"].values():
            assert set(found) == {*AGREEMENT, "stability", "length_explained", "variance_inside", "at_domains"}
            assert set(found["at_domains"]) == AGREEMENT
            assert 0 <= found["nmi"] <= 1 >= found["stability"]
            assert 0 < found["variance_inside"] <= 1
    dimensions = {name: result["dimensions"] for name, result in report["features"].items()}
    assert dimensions["random_projection_8192"] == 8192
    assert dimensions["exact_svd_16"] == 16
    assert dimensions["length"] == 2
    assert dimensions["full_gradient"] == EXAMPLES


def test_the_numbers_are_those_of_the_features(report: dict, made: dict[str, np.ndarray], modules, words) -> None:
    options = modules["clusters"].parse(words)
    folder = options.scratch / "again"
    folder.mkdir()
    task = modules["gradient_task"]
    rows = task.read_labelled_examples(task.mixture_folder(folder, EXAMPLES), EXAMPLES, options.model)
    domains = [row.record.domain for row in rows]
    found = report["features"]["random_projection_8192"]
    agreements, purities = [], []
    for seed in range(3):
        projection_NP = made[f"projection.{report['normalisation']}.{seed}"]
        labels_N = clusters_of(projection_NP, report["count"], "kmeans", options.neighbours, 0)
        agreements.append(normalized_mutual_info_score(domains, labels_N))
        unit_NP = projection_NP / np.linalg.norm(projection_NP, axis=1, keepdims=True)
        cosines_NN = unit_NP @ unit_NP.T
        np.fill_diagonal(cosines_NN, -1)
        nearest = cosines_NN.argmax(axis=1)
        purities.append(np.mean([domains[index] == domains[other] for index, other in enumerate(nearest)]))
    assert found["methods"]["kmeans"]["nmi"] == pytest.approx(np.mean(agreements))
    assert found["nn_purity"] == pytest.approx(np.mean(purities))
    assert found["nn_purity_of_seeds"] == pytest.approx(purities)


def test_without_domains_there_is_no_agreement(report: dict, modules) -> None:
    module = modules["clusters"]
    rows_NK = np.random.default_rng(0).normal(size=(20, 8))
    setting = module.Setting([None] * 20, np.full(20, 5), rows_NK, 2, 5)
    features = importlib.import_module("cluster_features").Features("some", (rows_NK,))
    result = module.judged(features, setting)
    assert result["nn_purity"] is None
    assert result["methods"]["graph"]["nmi"] is None
    module.show(report | {"features": {"some": result}}, Console(quiet=True))


def test_all_features_are_of_the_same_gradients(made: dict[str, np.ndarray], modules) -> None:
    coordinates_of = modules["cluster_gradients"].coordinates_of_products
    parts = [made[name] for name in made if name.count(".") == 3 and name.startswith("products")]
    assert len(parts) >= 4
    whole_NN = np.sum(parts, axis=0, dtype=np.float64)
    norms_N = np.sqrt(np.diag(whole_NN))
    example_NN = whole_NN / np.outer(norms_N, norms_N)
    module_NN = made["products.module"] / np.sqrt(np.outer(*2 * [made["products.module"].diagonal()]))
    for name, expected_NN in (("example", example_NN), ("module", module_NN)):
        # 40 gradients fit into 64 directions, so the online SVD is exact here, and its inner products are theirs.
        np.testing.assert_allclose(made[f"svd.{name}"] @ made[f"svd.{name}"].T, expected_NN, atol=1e-5)
        projected_NP = made[f"projection.{name}.0"]
        errors_NN = projected_NP @ projected_NP.T - expected_NN
        assert np.sqrt(np.mean(np.square(errors_NN))) < 2 / np.sqrt(8192)
    full_NN, kept_NN = coordinates_of(whole_NN), coordinates_of(whole_NN, unit=False)
    np.testing.assert_allclose(full_NN @ full_NN.T, example_NN, atol=1e-5)
    np.testing.assert_allclose(kept_NN @ kept_NN.T, whole_NN, atol=1e-5 * whole_NN.max())


def test_features_that_are_there_are_not_made_again(report: dict, modules, folder: Path, words, monkeypatch) -> None:
    monkeypatch.setattr(modules["clusters"], "features_of_pass", None)
    again = run(modules, folder / "again.json", *words)
    assert again == report


def test_planted_groups_are_found(modules, folder: Path) -> None:
    report = run(modules, folder / "planted.json", "--planted", "--sizes", "600,3000")
    assert [(row["examples"], row["cosine"]) for row in report["planted"]] == [
        (600, 0.07), (3000, 0.07), (600, 0.04), (3000, 0.04),
    ]  # fmt: skip
    for row in report["planted"]:
        assert row["count"] == row["groups"] == 6
        assert row["ari"] > 0.95
        assert row["outliers"] < 0.02 * row["examples"]
        assert row["seconds"] == pytest.approx(sum(row[key] for key in row if key.endswith("_seconds")))
        assert 0 < row["peak_gb"] < 4
