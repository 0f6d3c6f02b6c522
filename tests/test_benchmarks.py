"""The gradient benchmark on a tiny model: its numbers mean what they say. The peers are not needed."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from benchmark_scripts import imported

METHODS = ("floor", "engine", "loop", "vmap")


@pytest.fixture(scope="module")
def benchmark():
    with imported("gradients", "gradient_methods", "gradient_task") as found:
        yield found["gradients"]


@pytest.fixture(scope="module")
def report(benchmark, tmp_path_factory: pytest.TempPathFactory) -> dict:
    path = tmp_path_factory.mktemp("benchmark") / "made" / "gradients.json"
    options = {"shape": "tiny", "examples": 3, "rounds": 2, "tokens-per-batch": 400, "peak-tflops": 1}
    options |= {"json": path, "methods": ",".join(METHODS)}
    benchmark.main([word for name, value in options.items() for word in (f"--{name}", str(value))])
    return json.loads(path.read_text())


def test_the_report_has_every_number(report: dict) -> None:
    assert {"machine", "model", "dtype", "examples", "tokens", "dimension", "methods", "skipped"} < set(report)
    assert report["peers_head"] == "all"
    assert set(report["machine"]) == {"cores", "memory_gb", "device", "torch", "threads"}
    assert report["machine"]["device"] == "cpu"
    assert (report["model"], report["dtype"], report["examples"]) == ("tiny", "float32", 3)
    assert 3 * 32 <= report["tokens"] <= 3 * 512
    assert list(report["methods"]) == [*METHODS]
    numbers = {"seconds", "tokens_per_second", "ratio_to_floor", "peak_mb", "max_relative_error", "settings"}
    for name, result in report["methods"].items():
        extra = {"model_flops_utilisation"} if name in {"floor", "engine"} else set()
        assert set(result) == numbers | extra
        assert min(result[number] for number in numbers - {"settings", "max_relative_error"}) > 0
    assert report["methods"]["floor"]["ratio_to_floor"] == 1
    assert report["methods"]["engine"]["settings"] == {"tokens_per_batch": 400}


def test_every_method_computes_the_same_gradients(report: dict) -> None:
    assert {name: result["max_relative_error"] for name, result in report["methods"].items()} == pytest.approx(
        dict.fromkeys(METHODS, 0), abs=1e-5
    )


def test_the_result_counts_as_memory(report: dict) -> None:
    result_mb = report["examples"] * report["dimension"] * 4 / 1e6
    for name in ("engine", "loop", "vmap"):
        assert report["methods"][name]["peak_mb"] > result_mb


def test_peak_memory_is_exact(benchmark) -> None:
    kept = []

    def call() -> None:
        first = torch.empty(1000, dtype=torch.float64)
        del first
        kept.append(torch.empty(500, dtype=torch.float32))
        second = torch.empty(3000, dtype=torch.uint8)
        del second

    before = torch.empty(10**6)  # what lived before does not count
    assert benchmark.peak_bytes(call, torch.device("cpu")) == 8000
    assert benchmark.peak_bytes(lambda: torch.empty(1000), torch.device("cpu")) == 4000
    assert benchmark.peak_bytes(lambda: before.zero_(), torch.device("cpu")) == 0


def test_a_method_that_is_not_installed_is_left_out(benchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = benchmark.METHODS["loop"]._replace(package="no_such_package")
    monkeypatch.setitem(benchmark.METHODS, "opacus", absent)
    task = benchmark.make_task("unused", "tiny", None, 2, torch.float32, "cpu")
    methods, skipped = benchmark.measure(task, ["opacus"], 1, 400, lambda line: None)
    assert list(methods) == ["floor"]
    assert "make peers" in skipped["opacus"]


def test_examples_of_files_are_shared_out(benchmark, tmp_path: Path, tiny_model_dir: Path) -> None:
    for name, letter in {"a": "a", "b": "b"}.items():
        conversations = [
            [{"role": "user", "content": letter * size}, {"role": "assistant", "content": letter}]
            for size in (1, 40, 50, 60, 900)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"messages": turns}) for turns in conversations))
    task = importlib.import_module("gradient_task")
    examples = task.read_examples(str(tmp_path), 5, str(tiny_model_dir))
    assert examples == task.read_examples(str(tmp_path), 5, str(tiny_model_dir))
    assert all(32 <= len(ids) == len(labels) <= 512 and labels[-1] == ids[-1] for ids, labels in examples)
    answers = [ids[-2] for ids, _ in examples]
    assert sorted(answers.count(answer) for answer in set(answers)) == [2, 3]
    with pytest.raises(task.TaskError, match=r"a\.jsonl: . examples of 32 to 512 tokens, needed are 6"):
        task.read_examples(str(tmp_path), 12, str(tiny_model_dir))


def test_an_unknown_method_is_refused(benchmark, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.parse(["--json", "x", "--methods", "engine,magic"])
    assert "no method magic; there are floor, engine" in capsys.readouterr().err
