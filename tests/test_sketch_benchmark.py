"""The sketch benchmark on a tiny model and a tiny simulation: its numbers mean what they say."""

import importlib
import json
import math
from pathlib import Path

import pytest
import torch
from benchmark_scripts import imported

pytestmark = pytest.mark.slow

MODULES = ("sketch", "sketch_methods", "sketch_simulation", "gradients", "gradient_methods", "gradient_task")
OURS = ("online_svd", "online_svd_refined")
METHODS = ("exact", *OURS, "incremental_pca", "random_projection")
SHARDS, ROWS = 5, 4


@pytest.fixture(scope="module")
def benchmark():
    with imported(*MODULES) as found:
        yield found["sketch"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sketch-benchmark")


def run(benchmark, **options) -> dict:
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    benchmark.main([*words, "--threads", "1", *(["--simulate"] if "simulate_shards" in options else [])])
    return json.loads(Path(options["json"]).read_text())


@pytest.fixture(scope="module")
def options(folder: Path, tiny_model_dir: Path) -> dict:
    sizes = {"examples": 40, "rank": 4, "shard_size": 16, "warm_up_steps": 2}
    places = {"cache": folder / "gradients.f32", "scratch": folder}
    return {"model": tiny_model_dir, "dtype": "float32", **sizes, **places}


@pytest.fixture(scope="module")
def report(benchmark, folder: Path, options: dict) -> dict:
    return run(benchmark, json=folder / "made" / "sketch.json", **options)


@pytest.fixture(scope="module")
def gradients_ND(report: dict, options: dict) -> torch.Tensor:
    contents = torch.frombuffer(bytearray(options["cache"].read_bytes()), dtype=torch.float32)
    return contents.view(report["examples"], report["dimension"]).double()


def test_the_report_has_every_number(report: dict) -> None:
    assert (report["examples"], report["rank"], report["carried_rows"], report["shard_size"]) == (40, 4, 8, 16)
    assert (report["dtype"], report["data"], report["gradients_were_cached"]) == ("float32", None, False)
    assert report["failed"] == {}
    assert tuple(report["methods"]) == METHODS
    numbers = {"captured", "captured_of_optimum", "row_space_captured", "largest_angle_degrees", "shared", "seconds"}
    numbers |= {"cpu_seconds", "reading_seconds", "peak_mb", "passes", "batch_rows"}
    extra = {name: {"ledger_captured", "direct_captured"} for name in OURS}
    extra |= {"exact": {"direct_captured"}, "incremental_pca": {"row_space_captured_with_mean"}}
    for name, result in report["methods"].items():
        assert set(result) == numbers | extra.get(name, set())
        assert 0 <= result["largest_angle_degrees"] <= 90
        assert 0 <= result["shared"] <= 1 + 1e-9
        assert min(result["seconds"], result["cpu_seconds"], result["reading_seconds"], result["peak_mb"]) > 0


def test_exact_is_the_optimum(report: dict, gradients_ND: torch.Tensor) -> None:
    torch.testing.assert_close(gradients_ND.norm(dim=1), torch.ones(40, dtype=torch.float64), rtol=1e-6, atol=0)
    squares = torch.linalg.svdvals(gradients_ND).square()
    methods = report["methods"]
    assert methods["exact"]["captured"] == pytest.approx(float(squares[:4].sum() / squares.sum()), rel=1e-6)
    assert methods["exact"]["captured_of_optimum"] == 1
    assert methods["exact"]["largest_angle_degrees"] < 0.01
    for result in methods.values():
        assert result["row_space_captured"] <= methods["exact"]["captured"] + 1e-6
        assert result["captured_of_optimum"] == result["captured"] / methods["exact"]["captured"]
    assert methods["online_svd"]["captured"] <= methods["online_svd_refined"]["captured"] + 1e-6
    assert methods["online_svd_refined"]["captured_of_optimum"] > 0.97
    pca = methods["incremental_pca"]
    assert pca["row_space_captured"] < pca["row_space_captured_with_mean"]
    # Its four random directions are no better than any other ones.
    assert methods["random_projection"]["captured"] < 0.01


def test_the_ledger_is_what_the_gradients_say(report: dict) -> None:
    for name in OURS:
        result = report["methods"][name]
        assert result["captured"] == result["ledger_captured"] == pytest.approx(result["direct_captured"], abs=1e-4)
        assert result["ledger_captured"] <= result["row_space_captured"] + 1e-6


def test_a_ledger_that_is_wrong_is_refused(
    benchmark, report: dict, options: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = importlib.import_module("sketch_methods")
    wrong = lambda gradients, settings: methods.online_svd(gradients, settings)._replace(ledger=0.9)  # noqa: E731
    monkeypatch.setitem(methods.METHODS, "online_svd", wrong)
    monkeypatch.setattr(methods, "limit_memory", lambda size_bytes: None)
    place = {"gradients": str(options["cache"]), "exact_rows": str(tmp_path / "exact.f32")}
    sizes = {"examples": 40, "dimension": report["dimension"], "rank": 4, "shard_size": 16, "batch_rows": 8}
    settings = methods.Settings(**place, **sizes, oversampling=None, threads=1)
    methods.measure("exact", settings)
    with pytest.raises(methods.MethodError, match=r"says that it holds 0\.900000 of the energy, the gradients say 0\."):
        methods.measure("online_svd", settings)


def test_the_share_of_the_stage_is_what_was_measured(report: dict) -> None:
    stage = report["gradient_stage"]
    parts = [stage[f"{part}_seconds"] for part in ("gradient", "update", "save", "merge")]
    assert min(parts) > 0
    assert stage["seconds"] == pytest.approx(sum(parts))
    assert report["share_of_gradient_stage"] == pytest.approx(sum(parts[1:]) / sum(parts))
    assert 40 * 32 <= stage["tokens"] <= 40 * 512
    assert [cost["model"] for cost in report["arithmetic"]] == ["135M", "1B", "8B"]
    equal = [cost["share_at_equal_flops"] for cost in report["arithmetic"]]
    assert 1 > equal[0] > equal[1] > equal[2] > 0


def test_multiply_adds_are_those_of_what_is_appended_absorbed_and_turned_in_the_end(benchmark) -> None:
    multiply_adds = benchmark.multiply_adds
    # 8 rows beside none, 8 beside 8; then 4 beside 16, of which 16 are kept.
    assert multiply_adds(20, 8, 16) == 2 * 8 + 2 * 8 + (20 / 2 + 16) * 20
    # All fit, and are turned to as many.
    assert multiply_adds(16, 8, 16) == 2 * 8 + 2 * 8 + (16 / 2 + 16) * 16
    assert multiply_adds(3, 8, 16) == 2 * 3 + (3 / 2 + 3) * 3


def test_gradients_that_are_there_are_not_made_again(
    benchmark, report: dict, options: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = run(benchmark, json=tmp_path / "again.json", methods="random_projection", **options)
    assert again["gradients_were_cached"]
    assert again["gradient_stage"] == report["gradient_stage"]
    assert tuple(again["methods"]) == ("exact", "random_projection")
    for name in again["methods"]:
        assert again["methods"][name]["captured"] == report["methods"][name]["captured"]
    assert "gradients of an earlier call" in capsys.readouterr().out.replace("\n", " ")
    with pytest.raises(SystemExit, match="name another --cache"):
        run(benchmark, json=tmp_path / "other.json", **{**options, "examples": 39})


@pytest.fixture(scope="module")
def simulation(benchmark, folder: Path) -> dict:
    sizes = {"simulate_shards": SHARDS, "simulate_dimension": 150_000, "simulate_large_dimension": 300_000}
    return run(benchmark, json=folder / "simulation.json", rows=ROWS, rows_dtype="float32", scratch=folder, **sizes)


def test_a_simulation_merges_every_level(simulation: dict, folder: Path) -> None:
    tree, pair = simulation["tree"], simulation["pair"]
    assert [level["merges"] for level in tree["levels"]] == [2, 1, 1]
    assert [level["merges"] for level in pair["levels"]] == [1]
    for case, dimension in ((tree, 150_000), (pair, 300_000)):
        size = case["sketch_bytes"]
        assert size == ROWS * dimension * 4
        assert case["peak_storage_bytes"] <= (math.ceil(math.log2(case["shards"])) + 2) * size * 1.02
        assert case["energy_captured"] < case["energy_total"]
        assert max(case["norms_off"], case["coordinates_off"]) < 1e-5
        for level in case["levels"]:
            # Both children are read twice, for the Gram matrix and to be turned.
            assert level["bytes_read"] == pytest.approx(4 * size * level["merges"], rel=0.02)
            assert level["bytes_written"] == pytest.approx(size * level["merges"], rel=0.02)
            assert level["seconds"] > 0
    assert 0 < simulation["peak_rss_mb"] < 1000 * simulation["memory_limit_gb"]
    assert not list(folder.glob("sketch-simulation-*"))


def test_tables_are_printed_where_no_file_is_wanted(
    benchmark, simulation: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmark, "simulated", lambda options: simulation)
    benchmark.main(["--simulate", "--threads", "1"])
    assert f"{SHARDS} sketches of {ROWS} x 150000" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_the_large_run_is_worked_out_from_the_tree(simulation: dict) -> None:
    large, size = simulation["arithmetic"], ROWS * 20_971_520 * 4
    assert (large["shards"], len(large["levels"])) == (489, 9)
    assert sum(level["merges"] for level in large["levels"]) == 488
    assert large["bytes_written"] == (489 + 488) * size
    assert large["bytes_written_per_gpu"] == large["bytes_written"] / 64
    tree = simulation["tree"]
    merge_s = tree["merge_seconds"] / (tree["shards"] - 1)
    assert large["merge_seconds"] == pytest.approx(merge_s * 20_971_520 / tree["dimension"])
    assert large["gradient_seconds"] == pytest.approx(1e6 * 300 / 10_000 / 64)


def test_a_simulation_without_room_says_so(benchmark, tmp_path: Path) -> None:
    sizes = {"simulate_shards": 2, "simulate_dimension": 10**13, "simulate_large_dimension": 10}
    with pytest.raises(SystemExit, match="no room for 2 sketches of 128 x 10000000000000: give --scratch"):
        run(benchmark, json=tmp_path / "x.json", scratch=tmp_path, **sizes)


def test_wrong_options_are_refused(benchmark, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["--methods", "exact,magic"], "no method magic; there are exact, online_svd"),
        (["--examples", "64"], "64 examples have no more than 64 directions"),
        (["--simulate", "--simulate-shards", "1"], "one sketch cannot be merged"),
    ):
        with pytest.raises(SystemExit):
            benchmark.parse(["--json", "x", *words])
        assert message in capsys.readouterr().err
