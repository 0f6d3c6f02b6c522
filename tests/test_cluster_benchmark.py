"""The cluster benchmark on a tiny model and few made-up gradients: its numbers mean what they say."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmark_scripts import imported
from rich.console import Console
from sklearn.metrics import normalized_mutual_info_score

from gradientspace_ray.clusters.methods import clusters_of
from gradientspace_ray.gradients.per_sample import PerSampleGradients
from gradientspace_ray.models.loading import add_lora, load_base
from gradientspace_ray.sketch.online_svd import OnlineSVD

pytestmark = pytest.mark.slow

MODULES = ("clusters", "cluster_features", "cluster_gradients", "cluster_planted", "gradient_task", "gradients")
MODULES += ("gradient_methods", "sketch_methods")
NAMED = ("svd_64", "full_gradient", "random_projection_64", "random_projection_512", "random_projection_8192")
NAMED += ("embedding", "length")
VARIANTS = {"exact_svd_64", "exact_svd_16", "exact_svd_32", "exact_svd_128", "scaled: adam"}
VARIANTS |= {"scaled: plain", "scaled: module", "scaled: less", "scaled: none", "attention only", "mlp only"}
# The tiny model has two layers, so no last third.
VARIANTS |= {"early third", "middle third", "A only", "B only", "all after 2 steps", "response after 1 steps"}
AGREEMENT = {"ari", "nmi", "purity"}
EXAMPLES = 40


@pytest.fixture(scope="module")
def modules():
    with imported(*MODULES) as found:
        yield found


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
    assert dimensions["full_gradient"] > 10_000


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
        full_NN = modules["cluster_gradients"].coordinates_of_products(made["adam"])
        projection_NP = modules["cluster_features"].projected(full_NN, 8192, seed)
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
    features = modules["cluster_features"].Features("some", (rows_NK,), 8)
    result = module.judged(features, setting)
    assert result["nn_purity"] is None
    assert result["methods"]["graph"]["nmi"] is None
    module.show(report | {"features": {"some": result}}, Console(quiet=True))


def test_coordinates_have_the_products_of_the_gradients(made: dict[str, np.ndarray], modules) -> None:
    coordinates_of = modules["cluster_gradients"].coordinates_of_products
    parts = [product_NN for name, product_NN in made.items() if name.count(".") == 2]
    assert len(parts) >= 4
    whole_NN = np.sum(parts, axis=0, dtype=np.float64)
    norms_N = np.sqrt(np.diag(whole_NN))
    full_NN, kept_NN = coordinates_of(whole_NN), coordinates_of(whole_NN, unit=False)
    np.testing.assert_allclose(full_NN @ full_NN.T, whole_NN / np.outer(norms_N, norms_N), atol=1e-5)
    np.testing.assert_allclose(kept_NN @ kept_NN.T, whole_NN, atol=1e-5 * whole_NN.max())


def test_products_are_those_of_the_gradients(modules, words, made: dict[str, np.ndarray]) -> None:
    options = modules["clusters"].parse(words)
    task, gradients = modules["gradient_task"], modules["cluster_gradients"]
    folder = options.scratch / "products"
    folder.mkdir()
    rows = task.read_labelled_examples(task.mixture_folder(folder, EXAMPLES), EXAMPLES, options.model)
    model = add_lora(load_base(options.model), task.LORA_RANK, task.LORA_ALPHA, "all-linear", task.SEED)
    examples = [row.example for row in rows]
    ((_, moments),) = gradients.warmed_up(model, examples, [2], torch.float32, lambda _: None)
    expected = {"plain": {}, "adam": {"preconditioner": "adam"}, "less": {"preconditioner": "less"}}
    expected |= {"module": {"normalisation": "module"}}
    for name, options_of in expected.items():
        engine = PerSampleGradients(model, moments=moments, **options_of)
        rows_ND = engine.gradients(examples).double().numpy()
        found_NN = modules["cluster_features"]._product(made, name).astype(np.float64)
        lengths_N = np.sqrt(np.diag(found_NN))
        unit_ND = rows_ND / np.linalg.norm(rows_ND, axis=1, keepdims=True)
        np.testing.assert_allclose(found_NN / np.outer(lengths_N, lengths_N), unit_ND @ unit_ND.T, atol=1e-4)


def test_the_online_svd_sees_inner_products_alone(modules) -> None:
    rng = np.random.default_rng(0)
    rows_ND = (rng.normal(size=(300, 90)) @ rng.normal(size=(90, 2000))).astype(np.float32)
    full_NN = modules["cluster_gradients"].coordinates_of_products(rows_ND.astype(np.float64) @ rows_ND.T)
    found_NK = modules["cluster_features"].online_svd(full_NN)
    sketch = OnlineSVD(64)
    sketch.update(torch.from_numpy(rows_ND), normalise=True)
    expected_NK = (sketch.coordinates * sketch.singular_values).numpy()
    np.testing.assert_allclose(found_NK @ found_NK.T, expected_NK @ expected_NK.T, atol=2e-4)


def test_random_projections_keep_inner_products_in_the_mean(modules) -> None:
    full_NN = np.eye(3, dtype=np.float32)[[0, 0, 1]]
    made = [modules["cluster_features"].projected(full_NN, 64, seed) for seed in range(400)]
    products = np.array([rows @ rows.T for rows in made])
    np.testing.assert_allclose(products.mean(axis=0), full_NN @ full_NN.T, atol=5 * np.sqrt(2 / 64 / 400))
    assert np.var(products[:, 0, 2]) == pytest.approx(1 / 64, rel=0.3)


def test_features_that_are_there_are_not_made_again(report: dict, modules, folder: Path, words, monkeypatch) -> None:
    monkeypatch.setattr(modules["clusters"], "products_of_pass", None)
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
