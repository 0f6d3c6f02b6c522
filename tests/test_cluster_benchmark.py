"""The cluster benchmark on a tiny model and few made-up gradients: its numbers mean what they say."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import normalized_mutual_info_score

from gradientspace_ray.clusters.methods import clusters_of

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[1] / "jobs" / "benchmarks"
MODULES = ("clusters", "cluster_features", "cluster_gradients", "cluster_planted", "gradient_task", "gradients")
MODULES += ("gradient_methods", "sketch_methods")
NAMED = ("svd_64", "full_gradient", "random_projection_64", "random_projection_512", "random_projection_8192")
NAMED += ("embedding", "length")
VARIANTS = {
    "exact_svd_64",
    "exact_svd_16",
    "exact_svd_32",
    "exact_svd_128",
    "scale kept",
    "module layers",
    "adam",
    "less",
}
# The tiny model has two layers, so no last third.
VARIANTS |= {"attention only", "mlp only", "early third", "middle third", "A only", "B only"}
VARIANTS |= {"all after 2 steps", "response after 1 steps"}
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
        assert set(result) == {"dimensions", "nn_purity", "methods"}
        assert 0 <= result["nn_purity"] <= 1
        assert set(result["methods"]) == {"graph", "kmeans"}
        for found in result["methods"].values():
            assert set(found) == {"ari", "nmi", "purity", "stability", "variance_inside"}
            assert 0 <= found["nmi"] <= 1 >= found["stability"]
            assert 0 < found["variance_inside"] <= 1
    dimensions = {name: result["dimensions"] for name, result in report["features"].items()}
    assert dimensions["random_projection_8192"] == 8192
    assert dimensions["exact_svd_16"] == 16
    assert dimensions["length"] == 2
    assert dimensions["full_gradient"] == EXAMPLES


def test_the_numbers_are_those_of_the_features(report: dict, made: dict[str, np.ndarray], modules, words) -> None:
    options = modules["clusters"].parse(words)
    data = modules["gradient_task"].mixture_folder
    labels_N = clusters_of(made["random_projection_512"], report["count"], "kmeans", options.neighbours, 0)
    folder = options.scratch / "again"
    folder.mkdir()
    rows = modules["gradient_task"].read_labelled_examples(data(folder, EXAMPLES), EXAMPLES, options.model)
    domains = [row.record.domain for row in rows]
    found = report["features"]["random_projection_512"]
    assert found["methods"]["kmeans"]["nmi"] == pytest.approx(normalized_mutual_info_score(domains, labels_N))
    cosines_NN = np.corrcoef(made["random_projection_512"])
    unit_NK = made["random_projection_512"] / np.linalg.norm(made["random_projection_512"], axis=1, keepdims=True)
    cosines_NN = unit_NK @ unit_NK.T
    np.fill_diagonal(cosines_NN, -1)
    same = [domains[index] == domains[other] for index, other in enumerate(cosines_NN.argmax(axis=1))]
    assert found["nn_purity"] == pytest.approx(np.mean(same))


def test_all_features_are_of_the_same_gradients(made: dict[str, np.ndarray], modules) -> None:
    coordinates_of = modules["cluster_gradients"].coordinates_of_products
    parts = [made[name] for name in made if name.count(".") == 3]
    assert len(parts) >= 4
    whole_NN = np.sum(parts, axis=0, dtype=np.float64)
    full_NN = coordinates_of(whole_NN)
    norms_N = np.sqrt(np.diag(whole_NN))
    np.testing.assert_allclose(full_NN @ full_NN.T, whole_NN / np.outer(norms_N, norms_N), atol=1e-5)
    # 40 gradients fit into 64 directions, so the online SVD is exact here, and its inner products are theirs.
    np.testing.assert_allclose(made["svd"] @ made["svd"].T, full_NN @ full_NN.T, atol=1e-5)
    projected_NP = made["random_projection_8192"]
    errors_NN = projected_NP @ projected_NP.T - full_NN @ full_NN.T
    assert np.sqrt(np.mean(np.square(errors_NN))) < 2 / np.sqrt(8192)
    kept_NN = coordinates_of(whole_NN, unit=False)
    np.testing.assert_allclose(kept_NN @ kept_NN.T, whole_NN, atol=1e-5 * whole_NN.max())


def test_features_that_are_there_are_not_made_again(report: dict, modules, folder: Path, words, monkeypatch) -> None:
    monkeypatch.setattr(modules["clusters"], "features_of_pass", None)
    again = run(modules, folder / "again.json", *words)
    assert again == report


def test_planted_groups_are_found(modules, folder: Path) -> None:
    report = run(modules, folder / "planted.json", "--planted", "--sizes", "600,3000")
    assert [row["examples"] for row in report["planted"]] == [600, 3000]
    for row in report["planted"]:
        assert row["count"] == row["groups"] == 6
        assert row["ari"] > 0.95
        assert row["seconds"] == pytest.approx(
            sum(row[f"{part}_seconds"] for part in ("choose", "cluster", "outliers"))
        )
        assert 0 < row["peak_gb"] < 4
